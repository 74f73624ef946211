"""`FakeLM`, `FakeEmbedder` and `FakeClock`: what users rely on when they test their programs.

Not here: DSPy's fakes (`test_dummies.py`), and the fake server (`test_fake_server.py`).
"""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.errors import LMAuthError, LMServerError
from dspylite.runtime.clock import CLOCK
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse, Usage
from dspylite.testing import FakeClock, FakeEmbedder, FakeLM

# --- FakeLM: the script ------------------------------------------------------------------------


def test_list_of_answers_is_taken_one_by_one() -> None:
    """The usual script: the first call gets the first answer."""
    lm = FakeLM(["one", "two"])
    assert [lm("a"), lm("b")] == [["one"], ["two"]]


def test_used_up_script_gives_the_default() -> None:
    """A call too many must be seen in the answer, not as a crash of the fake."""
    assert FakeLM([])("a") == ["No more answers are scripted."]
    assert FakeLM([], default="more")("a") == ["more"]


def test_dict_of_answers_goes_by_a_piece_of_the_last_message() -> None:
    """Threads ask in any order; the answer must not depend on it."""
    lm = FakeLM({"France": "Paris", "Italy": "Rome"}, default="?")
    chat = [{"role": "user", "content": "Italy"}, {"role": "user", "content": "And France?"}]
    assert [lm("Capital of Italy?"), lm(messages=chat), lm("Spain?")] == [
        ["Rome"],
        ["Paris"],
        ["?"],
    ]


def test_function_answers_from_the_request() -> None:
    """The most general script sees messages and parameters."""

    def answer(request: LMRequest) -> str:
        return f"{request.messages[-1]['content']} at {request.params['temperature']}"

    assert FakeLM(answer, temperature=0.5)("hi") == ["hi at 0.5"]


def test_answer_in_a_list_may_be_a_function() -> None:
    """One scripted step may depend on what was asked."""
    lm = FakeLM(["one", lambda request: str(request.messages[-1]["content"]).upper()])
    assert [lm("a"), lm("b")] == [["one"], ["B"]]


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "JSON"])
def test_dict_is_written_in_the_form_of_the_adapter(adapter: Any) -> None:
    """A test names outputs and their values, and not the text that a model would write."""
    lm = FakeLM([{"answer": "yes", "score": 0.5, "tags": ["a", "b"]}], adapter=adapter)
    with dspy.context(lm=lm, adapter=adapter):
        predict = dspy.Predict("question -> answer, score: float, tags: list[str]")
        prediction = predict(question="Well?")
    assert (prediction.answer, prediction.score, prediction.tags) == ("yes", 0.5, ["a", "b"])
    assert len(lm.requests) == 1


def test_response_is_given_as_it_is() -> None:
    """Finish reasons, usage and several outputs can be scripted too."""
    response = LMResponse(
        outputs=(LMOutput(text="cut", finish_reason="length"), LMOutput(text="whole")),
        usage=Usage(prompt_tokens=5, total_tokens=5, calls=1),
    )
    with dspy.track_usage() as tracker:
        assert FakeLM([response])("hi") == ["cut", "whole"]
    assert tracker.total.total_tokens == 5


def test_exception_is_raised() -> None:
    """Failures are scripted like answers, in their place."""
    lm = FakeLM(["one", LMAuthError("no"), "three"])
    assert lm("a") == ["one"]
    with pytest.raises(LMAuthError, match="no"):
        lm("b")
    assert lm("c") == ["three"]


def test_scripted_failure_is_retried_when_asked_for() -> None:
    """By default a fake fails at once; with `num_retries` it behaves like a real model."""
    with pytest.raises(LMServerError):
        FakeLM([LMServerError("down"), "up"])("hi")
    with FakeClock() as clock:
        assert FakeLM([LMServerError("down"), "up"], num_retries=1)("hi") == ["up"]
    assert len(clock.sleeps) == 1


def test_several_answers_are_equal() -> None:
    """`n` is honoured as by a real model."""
    assert FakeLM(["yes"])("hi", n=3) == ["yes"] * 3


def test_usage_counts_words() -> None:
    """Tests of usage can be written with a pencil."""
    with dspy.track_usage() as tracker:
        FakeLM(["four words in all"])("and three here", n=2)
    counted = {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11, "calls": 1}
    assert tracker.get_total_tokens() == {"fake/lm": counted}


def test_requests_are_remembered_with_their_parameters() -> None:
    """What a program sent is half of what a test wants to know."""
    lm = FakeLM(["a", "b"], temperature=0.5)
    lm("one", seed=1)
    lm("two")
    assert [request.messages[-1]["content"] for request in lm.requests] == ["one", "two"]
    assert [dict(request.params) for request in lm.requests] == [
        {"temperature": 0.5, "seed": 1},
        {"temperature": 0.5},
    ]


def test_copy_of_a_program_shares_the_script() -> None:
    """A test keeps one fake, however often the program under test copies it."""
    lm = FakeLM(["one", "two"])
    predict = dspy.Predict("question -> answer")
    predict.lm = lm
    copies = [lm.copy(temperature=1.0), copy.deepcopy(lm)]
    assert [twin("hi") for twin in copies] == [["one"], ["two"]]
    assert len(lm.requests) == 2


# --- FakeLM: many at once ----------------------------------------------------------------------


def test_each_answer_is_given_once_to_many_threads() -> None:
    """32 threads take 320 answers: none twice, none lost."""
    lm = FakeLM([str(number) for number in range(320)])
    together = threading.Barrier(32)

    def take(_: int) -> list[object]:
        together.wait(10)
        return [lm("next")[0] for _ in range(10)]

    with ThreadPoolExecutor(32) as pool:
        taken = [answer for answers in pool.map(take, range(32)) for answer in answers]
    assert sorted(map(str, taken)) == sorted(map(str, range(320)))
    assert len(lm.requests) == 320


def test_held_callers_are_let_go_at_the_end_of_the_block() -> None:
    """While held, all are in flight and none is answered."""
    lm = FakeLM(lambda request: "done")
    with ThreadPoolExecutor(3) as pool:
        with lm.hold():
            calls = [pool.submit(lm, f"call {number}") for number in range(3)]
            lm.wait_for_calls(3)
            assert lm.requests == ()
            assert not any(call.done() for call in calls)
        assert [call.result(5) for call in calls] == [["done"]] * 3
    assert lm.max_in_flight == 3


def test_held_callers_are_let_go_when_enough_wait() -> None:
    """`until` makes a batch prove that its items run at the same time, inside one statement."""
    lm = FakeLM(lambda request: {"answer": "yes"})
    with dspy.context(lm=lm), lm.hold(until=4):
        dspy.Predict("question -> answer").batch(
            [{"question": str(number)} for number in range(8)], num_threads=4
        )
    assert (lm.max_in_flight, len(lm.requests)) == (4, 8)


def test_waiting_for_calls_that_do_not_come_ends() -> None:
    """A test that hangs says less than one that fails."""
    lm = FakeLM()
    lm("one")
    with pytest.raises(TimeoutError, match="1 of 2 calls arrived"):
        lm.wait_for_calls(2, timeout_s=0)


def test_calls_one_after_another_are_one_in_flight() -> None:
    """`max_in_flight` must not count what was never there at the same time."""
    lm = FakeLM(lambda request: "ok")
    for _ in range(3):
        lm("hi")
    assert lm.max_in_flight == 1


async def test_awaited_callers_are_held_and_let_go() -> None:
    """Tasks wait at the same door, without blocking their loop."""
    lm, answers = FakeLM(lambda request: "done"), list[Any]()

    async def ask() -> None:
        answers.append(await lm.acall("hi"))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            with lm.hold():
                for _ in range(3):
                    group.start_soon(ask)
                await anyio.to_thread.run_sync(lm.wait_for_calls, 3)
                assert answers == []
    assert answers == [["done"]] * 3
    assert lm.max_in_flight == 3


async def test_threads_and_tasks_are_held_together() -> None:
    """One door serves both kinds of callers; either alone would wait for ever."""
    lm, answers = FakeLM(lambda request: "done"), list[Any]()

    async def ask() -> None:
        answers.append(await lm.acall("hi"))

    async def ask_on_thread() -> None:
        answers.append(await anyio.to_thread.run_sync(lm, "hi"))

    with anyio.fail_after(10), lm.hold(until=2):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(ask_on_thread)
    assert answers == [["done"]] * 2


async def test_cancelled_caller_leaves_the_door() -> None:
    """A test that cancels must not leave its fake believing that somebody is inside."""
    lm = FakeLM(lambda request: "done")
    with anyio.fail_after(10), lm.hold():
        async with anyio.create_task_group() as group:
            group.start_soon(lm.acall, "hi")
            await anyio.to_thread.run_sync(lm.wait_for_calls, 1)
            group.cancel_scope.cancel()
    assert await lm.acall("again") == ["done"]
    assert (lm.max_in_flight, len(lm.requests)) == (1, 1)


def test_failed_call_leaves_the_door() -> None:
    """The same after a scripted failure."""
    lm = FakeLM([LMServerError("down"), "up"])
    with pytest.raises(LMServerError):
        lm("hi")
    lm("hi")
    assert lm.max_in_flight == 1


def test_nobody_is_at_the_door_while_waiting_for_a_retry() -> None:
    """A caller that sleeps between attempts holds no place, so it is not in flight."""
    lm = FakeLM([LMServerError("down"), "up"], num_retries=1)
    inside: list[int] = []

    class Watching(FakeClock):
        def sleep(self, seconds: float) -> None:
            inside.append(lm._door.inside)
            super().sleep(seconds)

    with Watching():
        lm("hi")
    assert inside == [0]


# --- FakeEmbedder ------------------------------------------------------------------------------


def test_fake_vectors_are_deterministic_and_of_unit_length() -> None:
    """Equal texts are equal in every test run, and a dot product is a cosine."""
    one, other = FakeEmbedder().embed(["a", "b"]), FakeEmbedder().embed(["b", "a"])
    assert one.shape == (2, 8)
    assert one.tolist() == other[::-1].tolist()
    assert one[0].tolist() != one[1].tolist()
    assert [math.hypot(*row) for row in one] == pytest.approx([1, 1])


def test_fake_embedder_remembers_its_batches() -> None:
    """What a program embeds, and in how many requests, can be asserted."""
    embedder = FakeEmbedder(dimensions=3, batch_size=2, max_concurrency=1)
    assert embedder.embed(["a", "b", "a", "c"]).shape == (4, 3)
    assert embedder.batches == [["a", "b"], ["c"]]


async def test_fake_embedder_can_be_awaited() -> None:
    """It is an embedder like any other."""
    embedder = FakeEmbedder()
    assert await embedder.aembed(["a"]) == FakeEmbedder().embed(["a"])
    assert embedder.batches == [["a"]]


# --- FakeClock ---------------------------------------------------------------------------------


async def read_and_sleep(io: Any) -> float:
    """Sleep for a minute and tell how long it took."""
    started = io.now()
    await io.sleep(60)
    return float(io.now() - started)


def test_blocking_waits_take_no_time() -> None:
    """An hour of retries is tested in a millisecond."""
    with FakeClock(start_s=100) as clock:
        assert run_flow(read_and_sleep(BLOCKING)) == 60
    assert (clock.now(), clock.sleeps) == (160, [60])


async def test_awaited_waits_take_no_time_and_let_others_run() -> None:
    """A fake sleep is still a point where other tasks get their turn."""
    others_turn = anyio.Event()

    async def other() -> None:
        others_turn.set()

    async with anyio.create_task_group() as group:
        with FakeClock() as clock:
            assert await read_and_sleep(ASYNC) == 60
            group.start_soon(other)
            while not others_turn.is_set() and len(clock.sleeps) < 100:
                await ASYNC.sleep(1)
    assert others_turn.is_set()
    assert clock.now() == sum(clock.sleeps)


def test_clock_is_seen_by_threads_that_carry_the_context() -> None:
    """Waits happen on worker threads of a batch, too."""
    lm = FakeLM(lambda request: LMServerError("down"), num_retries=2)

    class Ask(dspy.Module):
        def forward(self, number: int) -> Any:
            return lm(str(number))

    with FakeClock() as clock:
        Ask().batch([{"number": n} for n in range(4)], num_threads=4, on_error="return")
    assert len(clock.sleeps) == 8


def test_time_never_goes_back() -> None:
    """A wait that is over already takes none."""
    clock = FakeClock(start_s=5)
    clock.sleep(-3)
    assert clock.now() == 5


def test_real_clock_is_back_after_the_block() -> None:
    """Also when the block fails."""
    real = CLOCK.get()
    clock = FakeClock()

    def fail() -> None:
        with clock:
            assert CLOCK.get() is clock
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert CLOCK.get() is real


def test_clocks_can_be_nested() -> None:
    """The inner block's waits are the inner clock's."""
    with FakeClock() as outer:
        with FakeClock() as inner:
            run_flow(read_and_sleep(BLOCKING))
        run_flow(read_and_sleep(BLOCKING))
    assert (outer.sleeps, inner.sleeps) == ([60], [60])
