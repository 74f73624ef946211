"""Equal calls under way at once: one request, and whoever makes it harms no other (B 5.5).

Not here: what happens when the answer is there already (`test_cache_calls.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.errors import CallCancelledError
from dspylite.models.cache.flights import Flight, Flights
from dspylite.runtime.cancellation import Cancellation
from dspylite.runtime.flow import BLOCKING, run_flow
from dspylite.schema.messages import LMRequest, LMResponse
from dspylite.testing import FakeClock, FakeServer, Reply
from tests.caching import QA, cache_in, lm_at, written

LIMIT_S = 20.0
"""Far above what anything here takes; a hang ends there."""
ANSWER = [written("Paris")]


class CountedFlights(Flights):
    """Tells how many have come, to lead or to wait."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._joined = 0

    def join(self, key: str, loop: object) -> tuple[Flight, bool]:
        found = super().join(key, loop)
        with self._changed:
            self._joined += 1
            self._changed.notify_all()
        return found

    def end(self, flight: Flight) -> None:
        super().end(flight)
        with self._changed:
            self._changed.notify_all()

    def wait_for_none(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: not len(self), LIMIT_S), len(self)

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._joined >= count, LIMIT_S), self._joined


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(answer=ANSWER[0]) as server:
        yield server


@pytest.fixture(autouse=True)
def flights() -> Iterator[CountedFlights]:
    """Give each test a cache in memory, in which nothing may be under way at the end."""
    with cache_in(None) as cache:
        counted = cache.flights = CountedFlights()
        yield counted
        counted.wait_for_none()


def lm_of(server: FakeServer, **kwargs: Any) -> dspy.LM:
    return lm_at(server, api_key="none", adaptive=False, **kwargs)


# --- callers of every kind -----------------------------------------------------------------------


def settle(result: Future[Any], error: BaseException | None, value: Any = None) -> None:
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)


def by_threads(lm: dspy.LM, count: int, **kwargs: Any) -> list[Future[Any]]:
    """Call from as many threads."""
    results: list[Future[Any]] = [Future() for _ in range(count)]

    def ask(result: Future[Any]) -> None:
        try:
            settle(result, None, lm("q", **kwargs))
        except BaseException as error:  # noqa: BLE001
            settle(result, error)

    for result in results:
        threading.Thread(target=ask, args=(result,), daemon=True).start()
    return results


def by_tasks(backend: str, lm: dspy.LM, count: int, **kwargs: Any) -> list[Future[Any]]:
    """Call from as many tasks of one event loop, on a thread of its own."""
    results: list[Future[Any]] = [Future() for _ in range(count)]

    async def ask(result: Future[Any]) -> None:
        try:
            settle(result, None, await lm.acall("q", **kwargs))
        except Exception as error:  # noqa: BLE001
            settle(result, error)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for result in results:
                group.start_soon(ask, result)

    threading.Thread(
        target=anyio.run, args=(main,), kwargs={"backend": backend}, daemon=True
    ).start()
    return results


Callers = Callable[..., list[Future[Any]]]
KINDS: dict[str, Callers] = {
    "threads": by_threads,
    "asyncio": lambda lm, count, **kwargs: by_tasks("asyncio", lm, count, **kwargs),
    "trio": lambda lm, count, **kwargs: by_tasks("trio", lm, count, **kwargs),
}
leaders = pytest.mark.parametrize("lead", KINDS.values(), ids=[f"{kind}-lead" for kind in KINDS])
followers = pytest.mark.parametrize(
    "follow", KINDS.values(), ids=[f"{kind}-follow" for kind in KINDS]
)


def values(results: list[Future[Any]]) -> list[Any]:
    return [result.result(LIMIT_S) for result in results]


def errors(results: list[Future[Any]]) -> list[BaseException | None]:
    return [result.exception(LIMIT_S) for result in results]


# --- one request ---------------------------------------------------------------------------------


def test_64_threads_and_three_loops_make_one_request(
    server: FakeServer, flights: CountedFlights
) -> None:
    """DSPy makes one for each; all get the answer, and are billed for one (B 5.5)."""
    lm = lm_of(server)
    with server.hold():
        results = by_threads(lm, 64)
        for kind in ("asyncio", "asyncio", "trio"):
            results += KINDS[kind](lm, 16)
        flights.wait_for(64 + 3 * 16)
        assert len(server.requests) == 1
    assert values(results) == [ANSWER] * (64 + 3 * 16)
    assert (len(server.requests), dspy.cache.stats().shared) == (1, 64 + 3 * 16 - 1)
    assert dspy.cache.stats().misses == 1


def test_a_late_comer_finds_the_first_answer_of_a_directory(
    server: FakeServer, tmp_path: Path
) -> None:
    """Its key was made before the directory had a salt, and must be that of the answer (B 5.5)."""
    first_is_kept = threading.Event()
    is_late = threading.Event()

    class Late(Flights):
        def join(self, key: str, loop: object) -> tuple[Flight, bool]:
            if threading.current_thread().name == "late":
                is_late.set()
                assert first_is_kept.wait(LIMIT_S)
            return super().join(key, loop)

    with cache_in(tmp_path / "new") as cache:
        cache.flights = Late()
        lm = lm_of(server)
        late = threading.Thread(target=lm, args=("?",), name="late")
        late.start()
        assert is_late.wait(LIMIT_S)
        lm("?")
        first_is_kept.set()
        late.join(LIMIT_S)
        cache.close()
    assert len(server.requests) == 1


def test_predictors_that_share_an_answer_are_billed_once(
    server: FakeServer, flights: CountedFlights
) -> None:
    """The sum over all that took part is the server's own (B 4.10)."""
    predict = dspy.Predict(QA)
    with (
        dspy.context(lm=lm_of(server)),
        dspy.track_usage() as tracker,
        dspy.ThreadPoolExecutor(16) as pool,
        server.hold(),
    ):
        results = [pool.submit(predict, question="q") for _ in range(16)]
        flights.wait_for(16)
    found = [result.result(LIMIT_S) for result in results]
    assert {each.answer for each in found} == {"Paris"}
    (request,) = server.requests
    assert request.usage is not None
    assert tracker.total.total_tokens == request.usage["total_tokens"]
    assert (tracker.total.calls, tracker.total.cached_calls) == (1, 15)
    bills = [each.get_lm_usage()["openai/m"] for each in found]
    assert sorted(bill["calls"] for bill in bills) == [0] * 15 + [1]


def test_unequal_requests_never_wait_for_each_other(server: FakeServer) -> None:
    """Whoever asks something else, or does not want to share, is not held up."""
    lm = lm_of(server)
    with server.hold():
        results = by_threads(lm, 1)
        server.wait_for_requests(1)
        for count, kwargs in enumerate(
            [{"temperature": 1.0}, {"rollout_id": 1}, {"cache": False}, {"api_key": "other"}], 2
        ):
            results += by_threads(lm, 1, **kwargs)
            server.wait_for_requests(count)
    assert values(results) == [ANSWER] * 5


def test_a_stream_neither_waits_nor_is_waited_for(server: FakeServer) -> None:
    """Its pieces are for one reader, who may take his time."""
    lm = lm_of(server)
    with lm.stream("q") as stream:
        assert lm("q") == ANSWER
        assert "".join(piece.text for piece in stream) == ANSWER[0]
    assert len(server.requests) == 2


# --- leaders that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=400), dspy.LMInvalidRequestError),
        (Reply(status=429), dspy.LMRateLimitError),
        (Reply(status=500), dspy.LMServerError),
        (Reply(drop="before"), dspy.LMTransportError),
        (Reply(drop="body"), dspy.LMError),
    ],
    ids=["400", "429", "500", "reset", "reset in the body"],
)
@leaders
@followers
def test_a_leaders_failure_is_its_own(
    *,
    lead: Callers,
    follow: Callers,
    reply: Reply,
    error: type[Exception],
    server: FakeServer,
    flights: CountedFlights,
) -> None:
    """One of those who waited asks, and its answer is that of all the others (B 5.5)."""
    lm = lm_of(server)
    server.script(reply)
    with server.hold():
        (leader,) = lead(lm, 1)
        flights.wait_for(1)
        results = follow(lm, 8)
        flights.wait_for(9)
    assert isinstance(leader.exception(LIMIT_S), error)
    assert values(results) == [ANSWER] * 8
    assert len(server.requests) == 2


def test_followers_end_in_bounded_time_when_all_leaders_fail(
    server: FakeServer, flights: CountedFlights
) -> None:
    """64 callers one after the other would take 64 time-outs; the third round is for all."""
    lm = lm_of(server)
    server.script(*[Reply(status=500)] * 64)
    with contextlib.ExitStack() as second:
        with contextlib.ExitStack() as first:
            first.enter_context(server.hold())
            results = by_threads(lm, 48)
            for kind in ("asyncio", "trio"):
                results += KINDS[kind](lm, 8)
            flights.wait_for(64)
            second.enter_context(server.hold())
        flights.wait_for(64 + 63)
        server.wait_for_requests(2)
        with server.hold():
            second.close()
            server.wait_for_requests(64, timeout_s=LIMIT_S)
            assert server.in_flight == 62
    failed = errors(results)
    assert {type(error) for error in failed} == {dspy.LMServerError}
    assert len({id(error) for error in failed}) == 64
    assert len(server.requests) == 64


def test_a_fallback_answers_all_who_wait_for_its_model(
    server: FakeServer, flights: CountedFlights
) -> None:
    """Each asks the first model for itself, and they share what the second says (B 4.6)."""
    with FakeServer(answer="other") as other:
        lm = lm_of(server, fallbacks=[lm_of(other, model="openai/other")], circuit_breaker=False)
        server.script(*[Reply(status=500)] * 8)
        with server.hold():
            results = by_threads(lm, 8)
            flights.wait_for(8)
        assert values(results) == [["other"]] * 8
        assert (len(other.requests), len(server.requests)) == (1, 8)


# --- leaders that go away ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@followers
def test_a_cancelled_task_leaves_its_request_to_another(
    backend: str, follow: Callers, server: FakeServer, flights: CountedFlights
) -> None:
    """Its caller went away; the others did not (B 5.5)."""
    lm = lm_of(server)
    results: list[Future[Any]] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lm.acall, "q")
            await anyio.to_thread.run_sync(server.wait_for_requests, 1)
            results.extend(follow(lm, 8))
            await anyio.to_thread.run_sync(flights.wait_for, 9)
            group.cancel_scope.cancel()

    with server.hold():
        anyio.run(main, backend=backend)
        server.wait_for_requests(2)
    assert values(results) == [ANSWER] * 8
    assert len(server.requests) == 2


@pytest.mark.parametrize("how", ["flag", "deadline", "ctrl-c", "exit"])
@followers
def test_a_thread_that_stops_leaves_its_request_to_another(
    how: str, follow: Callers, server: FakeServer, flights: CountedFlights
) -> None:
    """Whatever made it stop concerns itself alone (B 5.5)."""
    lm, flag, stop = lm_of(server), Cancellation(), threading.Event()

    class Stop:
        place = "attempt"

        async def handle(self, request: LMRequest, call_next: Any, io: Any) -> LMResponse:
            assert stop.wait(LIMIT_S)
            raise KeyboardInterrupt if how == "ctrl-c" else SystemExit

    leading = lm_of(server, middleware=[Stop()]) if how in {"ctrl-c", "exit"} else lm
    with server.hold():
        with flag:
            (leader,) = dspy_bound(leading, **({"deadline_s": 1.0} if how == "deadline" else {}))
        flights.wait_for(1)
        server.wait_for_requests(0 if how in {"ctrl-c", "exit"} else 1)
        results = follow(lm, 8)
        flights.wait_for(9)
        if how == "flag":
            flag.cancel("the test says so")
        stop.set()
        expected = {
            "flag": CallCancelledError,
            "deadline": dspy.DeadlineExceededError,
            "ctrl-c": KeyboardInterrupt,
            "exit": SystemExit,
        }
        assert type(leader.exception(LIMIT_S)) is expected[how]
        made = 1 if how in {"ctrl-c", "exit"} else 2
        server.wait_for_requests(made)
    assert values(results) == [ANSWER] * 8
    assert len(server.requests) == made


def dspy_bound(lm: dspy.LM, **kwargs: Any) -> list[Future[Any]]:
    """Call from a thread that works under the flag of this context."""
    result: Future[Any] = Future()

    @dspy.bind
    def ask() -> None:
        try:
            settle(result, None, lm("q", **kwargs))
        except BaseException as error:  # noqa: BLE001
            settle(result, error)

    threading.Thread(target=ask, daemon=True).start()
    return [result]


# --- those who wait ------------------------------------------------------------------------------


@followers
def test_whoever_waits_keeps_its_own_deadline(
    follow: Callers, server: FakeServer, flights: CountedFlights
) -> None:
    """The leader may take longer than others have time (B 4.4)."""
    lm = lm_of(server)
    with server.hold():
        (leader,) = by_threads(lm, 1)
        flights.wait_for(1)
        failed = errors(follow(lm, 4, deadline_s=0.2))
        assert {type(error) for error in failed} == {dspy.DeadlineExceededError}
    assert (leader.result(LIMIT_S), len(server.requests)) == (ANSWER, 1)


async def test_whoever_waits_can_be_cancelled(server: FakeServer, flights: CountedFlights) -> None:
    """Nobody who gave up is woken, and the leader does not notice (B 3.2)."""
    lm = lm_of(server)
    with server.hold():
        (leader,) = by_threads(lm, 1)
        await anyio.to_thread.run_sync(flights.wait_for, 1)
        with Cancellation() as flag:
            results = dspy_bound(lm)
            await anyio.to_thread.run_sync(flights.wait_for, 2)
            flag.cancel("the test says so")
        assert {type(error) for error in errors(results)} == {CallCancelledError}
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as group:
                group.start_soon(lm.acall, "q")
                await anyio.to_thread.run_sync(flights.wait_for, 3)
                group.cancel_scope.cancel()
        (flight,) = flights._by_key.values()
        assert flight._waiting == {}
    assert (leader.result(LIMIT_S), len(server.requests)) == (ANSWER, 1)


def test_a_second_start_does_not_wait_for_the_first(server: FakeServer) -> None:
    """It is made because the first one hangs (B 2.5)."""
    server.script(Reply(hang=True))
    parallel = dspy.Parallel(num_threads=1, hedge_after_s=0.05, total_timeout_s=LIMIT_S)
    lm = lm_of(server)
    assert parallel([(lm, ("q",))]) == [ANSWER]
    assert len(server.requests) == 2
    server.wait_until_idle()


@leaders
def test_a_fallback_that_asks_the_same_does_not_wait_for_itself(
    lead: Callers, server: FakeServer
) -> None:
    """As where one LM is named twice."""
    lm = lm_of(server)
    server.script(Reply(status=500))
    twice = lm_of(server, fallbacks=[lm], circuit_breaker=False)
    assert values(lead(twice, 1, deadline_s=LIMIT_S)) == [ANSWER]
    assert len(server.requests) == 2
    assert lm("q") == ANSWER
    assert len(server.requests) == 2


async def test_a_sync_call_inside_a_loop_does_not_wait_for_a_task_of_it(
    server: FakeServer, flights: CountedFlights
) -> None:
    """The task could never end: the loop stands still until the call returns (B 3.5)."""
    lm = lm_of(server)
    server.script_for(lambda request: request.index == 0, Reply(delay_s=0.2))
    async with anyio.create_task_group() as group:
        group.start_soon(lm.acall, "q")
        await anyio.to_thread.run_sync(server.wait_for_requests, 1)
        assert lm("q") == ANSWER
    assert len(server.requests) == 2


class Halting(dspy.BaseLM):
    """A model in this process whose first answer comes when `go_on` is set."""

    def __init__(self, name: str = "my/halting") -> None:
        super().__init__(name, num_retries=0)
        self.asked = 0
        self.go_on = anyio.Event()

    @property
    def cache_kind(self) -> str:
        return "tests.Halting/1"

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        self.asked += 1
        return {"choices": [{"message": {"content": ANSWER[0]}, "finish_reason": "stop"}]}

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.forward()
        if self.asked == 1:
            await self.go_on.wait()
        return answer


def test_two_loops_that_call_into_each_others_tasks_do_not_wait_for_ever() -> None:
    """Each stands still in a sync call that only a task of the other could answer (B 3.5)."""
    models = Halting("my/first"), Halting("my/second")
    both = threading.Barrier(2, timeout=LIMIT_S)
    found: list[Any] = []

    async def meet(mine: Halting, others: Halting) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(mine.acall, "q")
            with anyio.fail_after(LIMIT_S):
                while not mine.asked:
                    await anyio.sleep(0)
            both.wait()
            found.append(others("q"))
            mine.go_on.set()

    threads = [
        threading.Thread(target=anyio.run, args=(meet, *pair), daemon=True)
        for pair in (models, models[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert found == [ANSWER] * 2


class OnlyAwaited(dspy.Module):
    async def aforward(self, lm: dspy.BaseLM) -> Any:
        return await lm.acall("q")


@pytest.mark.parametrize("call", ["module", "batch", "batch_iter"])
async def test_what_a_standing_loop_waits_for_does_not_wait_for_its_tasks(
    call: str, flights: CountedFlights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook: the work is done on other threads, and the loop stands still (B 3.5)."""
    monkeypatch.setattr("dspylite.concurrency.parallel.is_in_notebook", lambda: True)
    lm, module = Halting(), OnlyAwaited()
    async with anyio.create_task_group() as group:
        group.start_soon(lm.acall, "q")
        await anyio.to_thread.run_sync(flights.wait_for, 1)
        if call == "module":
            assert module(lm=lm) == ANSWER
        elif call == "batch":
            assert dspy.Parallel(num_threads=2)([(lm, ("q",))] * 2) == [ANSWER] * 2
        else:
            found = list(module.batch_iter([{"lm": lm}], num_threads=2))
            assert [outcome.value for _, outcome in found] == [ANSWER]
        lm.go_on.set()


def test_nobody_waits_for_a_task_whose_loop_stands_still_on_its_own_thread(
    server: FakeServer, flights: CountedFlights
) -> None:
    """Neither a plain call, nor a task of the thread's next loop."""
    lm = lm_of(server)
    with asyncio.Runner() as runner:
        with server.hold():
            task = runner.get_loop().create_task(lm.acall("q"))
            runner.run(_sent(server))
        assert lm("q") == ANSWER
        dspy.cache.reset_memory_cache()
        assert asyncio.run(lm.acall("q")) == ANSWER
        assert len(server.requests) == 3
        assert runner.run(_awaited(task)) == ANSWER


def test_nobody_in_a_worker_thread_waits_for_a_task_that_waits_for_a_worker_thread(
    server: FakeServer,
) -> None:
    """On trio a request is made in a worker thread; the places were held by those who waited."""
    lm, places = lm_of(server), 2
    call = dspy.asyncify(lm)
    free, taken = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        taken.release()
        assert free.wait(LIMIT_S)

    async def main() -> None:
        with dspy.context(async_max_workers=places), anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as group:
                for _ in range(places):
                    group.start_soon(dspy.asyncify(hold))
                for _ in range(places):
                    await anyio.to_thread.run_sync(taken.acquire)
                for _ in range(places):  # first in line for a place
                    group.start_soon(call, "q")
                await anyio.wait_all_tasks_blocked()
                group.start_soon(lm.acall, "q")  # leads, and is the last in line
                await anyio.wait_all_tasks_blocked()
                free.set()

    anyio.run(main, backend="trio")
    assert 1 <= len(server.requests) <= 1 + places


def test_whoever_has_less_time_does_not_wait_for_one_that_has_more(
    server: FakeServer, flights: CountedFlights
) -> None:
    """`timeout` is how long a caller waits for its answer, whoever asks."""
    with server.hold():
        patient = by_threads(lm_of(server, timeout=LIMIT_S), 1)
        flights.wait_for(1)
        with pytest.raises(dspy.LMTimeoutError) as caught:
            lm_of(server, timeout=0.1)("q", deadline_s=5)
    assert not isinstance(caught.value, dspy.DeadlineExceededError)
    assert values(patient) == [ANSWER]


def test_whoever_has_a_fallback_does_not_wait_for_one_that_waits_overload_out(
    server: FakeServer, flights: CountedFlights
) -> None:
    """Its fallback would have answered long before."""
    with server.hold():
        patient = by_threads(lm_of(server, num_retries=None, patience_s=60), 1)
        flights.wait_for(1)
        quick = by_threads(lm_of(server), 1)
        server.wait_for_requests(2)
    assert values([*patient, *quick]) == [ANSWER] * 2


async def _awaited(task: asyncio.Task[Any]) -> Any:
    return await task


async def _sent(server: FakeServer) -> None:
    await asyncio.to_thread(server.wait_for_requests, 1)


def test_a_loop_that_is_closed_while_it_waits_harms_nobody(
    server: FakeServer, flights: CountedFlights
) -> None:
    """Whoever cannot be woken any more is passed by."""
    lm = lm_of(server)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it says that a task was left pending
    with server.hold():
        results = by_threads(lm, 1)
        flights.wait_for(1)
        task = loop.create_task(lm.acall("q"))
        loop.run_until_complete(asyncio.to_thread(flights.wait_for, 2))
        loop.run_until_complete(loop.shutdown_default_executor())
        results += by_threads(lm, 4)
        flights.wait_for(6)
        loop.close()
    assert values(results) == [ANSWER] * 5
    assert not task.done()
    del task
    gc.collect()


def test_a_leader_whose_loop_is_gone_leaves_its_request_to_another(
    flights: CountedFlights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may never be collected, so those who wait look whether the loop is closed (B 5.5)."""
    monkeypatch.setattr("dspylite.models.cache.flights._LOOK_EVERY_S", 0.05)
    lm = Halting()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    task = loop.create_task(lm.acall("q"))
    loop.run_until_complete(asyncio.sleep(0))
    flights.wait_for(1)
    results: list[Future[Any]] = []
    for kind in KINDS.values():
        results += kind(lm, 2)
    flights.wait_for(7)
    loop.close()
    assert values(results) == [ANSWER] * 6
    assert lm.asked == 2
    assert not task.done()
    del task, loop
    gc.collect()


def test_nobody_waits_for_ever_for_a_leader_that_stands_still(
    server: FakeServer, flights: CountedFlights
) -> None:
    """As long as an attempt may take; then whoever waited asks (B 5.5)."""
    lm = lm_of(server)
    lm("q")
    (key,) = dspy.cache.memory_cache
    dspy.cache.reset_memory_cache()
    flight, _ = flights.join(f"{key} None {lm.middleware[0].manner}", object())
    flight.thread = 0  # another's
    with FakeClock() as clock:
        assert lm("q") == ANSWER
        assert 300 <= clock.now() < 310
    assert len(server.requests) == 2


# --- between the answer and the verdict ----------------------------------------------------------


def test_followers_parse_the_leaders_unreadable_answer_for_themselves(
    server: FakeServer, flights: CountedFlights
) -> None:
    """It is an answer; whether it is of use is for each reader to say (B 4.9)."""
    predict, adapter = dspy.Predict(QA), dspy.ChatAdapter(use_json_adapter_fallback=False)
    server.script(Reply(text="no form"))
    with dspy.context(lm=lm_of(server), adapter=adapter):
        with dspy.ThreadPoolExecutor(8) as pool, server.hold():
            results = [pool.submit(predict, question="q") for _ in range(8)]
            flights.wait_for(8)
        assert {type(result.exception(LIMIT_S)) for result in results} == {dspy.AdapterParseError}
        assert (len(server.requests), len(flights), dspy.cache.stats().memory_entries) == (1, 0, 0)
        assert predict(question="q").answer == "Paris"


@pytest.mark.parametrize("verdict", ["accept", "reject", None])
def test_whoever_comes_between_answer_and_verdict_makes_no_request(
    verdict: str | None, server: FakeServer, flights: CountedFlights
) -> None:
    """And nothing is left behind where nobody gives a verdict."""
    lm = lm_of(server)
    response: Any = run_flow(lm.plan(BLOCKING, [{"role": "user", "content": "q"}], {}))
    assert len(flights) == 1
    for kind in KINDS.values():
        assert values(kind(lm, 2)) == [ANSWER] * 2
    assert len(server.requests) == 1
    if verdict is not None:
        getattr(response.verdict, verdict)()
        getattr(response.verdict, verdict)()
        assert len(flights) == 0
    del response
    gc.collect()
    assert len(flights) == 0
    assert lm("q") == ANSWER
    assert len(server.requests) == (1 if verdict == "accept" else 2)


# --- forks ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_that_is_forked_meanwhile_asks_for_itself(
    server: FakeServer, flights: CountedFlights
) -> None:
    """Whoever asked before the fork is not there any more (B 7.3)."""
    lm = lm_of(server)
    lm("warm")
    server.clear()
    with server.hold():
        results = by_threads(lm, 2)
        flights.wait_for(2)
        server.wait_for_requests(1)
        child = os.fork()
        if not child:
            signal.alarm(int(LIMIT_S))  # a child that hangs dies
            code = 1
            try:
                code = 0 if lm("q") == ANSWER and not len(dspy.cache.flights) else 2
            finally:
                os._exit(code)
        server.wait_for_requests(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert values(results) == [ANSWER] * 2
    assert len(server.requests) == 2


# --- all at once ---------------------------------------------------------------------------------


def test_many_threads_on_few_keys_all_end(flights: CountedFlights) -> None:
    """Leaders fail, answer what cannot be read, and meet late-comers, in no order (B 5.5)."""
    numbers = itertools.count()

    class Moody(dspy.BaseLM):
        @property
        def cache_kind(self) -> str:
            return "tests.Moody/1"

        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            number = next(numbers)
            if number % 3 == 0:
                raise dspy.LMServerError("moody", status=500)
            text = written("yes") if number % 3 == 1 else "no form"
            return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    predict, lm = dspy.Predict(QA), Moody("my/moody", num_retries=0)
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    start = threading.Barrier(16, timeout=LIMIT_S)

    def work(seed: int) -> int:
        chance = random.Random(seed)
        answered = 0
        start.wait()
        for _ in range(60):
            try:
                answered += predict(question=str(chance.randrange(40))).answer == "yes"
            except (dspy.LMServerError, dspy.AdapterParseError):
                pass
        return answered

    with dspy.context(lm=lm, adapter=adapter), dspy.ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(work, seed) for seed in range(16)]
        assert not wait(futures, LIMIT_S).not_done
    assert sum(future.result() for future in futures) > 16 * 30
    assert len(flights) == 0
