"""What is kept of calls: usage, histories, traces; each complete, bounded and without secrets.

Not here: what callbacks are told (`test_calls.py`).
"""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import pytest

import dspylite
from dspylite import (
    LM,
    AdapterParseError,
    LMServerError,
    Module,
    Parallel,
    Predict,
    Prediction,
    Usage,
    asyncify,
    bind,
    track_usage,
)
from dspylite.runtime.history import GLOBAL_HISTORY, History, HistoryEntry
from dspylite.runtime.tracking import UsageTracker, record_trace
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeClock, FakeLM

QA = "question -> answer"
QUESTIONS = [f"number {n} " + "word " * n for n in range(24)]


def a_model(name: str = "fake/lm", **kwargs: Any) -> FakeLM:
    return FakeLM(default={"answer": "one two three"}, model=name, **kwargs)


def counted_by(*lms: FakeLM) -> dict[str, dict[str, int]]:
    """Sum what the models themselves say that they counted, call by call."""
    sums: dict[str, Usage] = {}
    for lm in lms:
        for request in lm.requests:
            read = sum(len(str(message["content"]).split()) for message in request.messages)
            written = len("[[ ## answer ## ]] one two three [[ ## completed ## ]]".split())
            usage = Usage(
                prompt_tokens=read, completion_tokens=written, total_tokens=read + written, calls=1
            )
            sums[lm.model] = sums.get(lm.model, Usage()) + usage
    return {model: usage.as_dict() for model, usage in sums.items()}


# --- usage over threads and tasks ----------------------------------------------------------------


def in_a_loop(predict: Any, width: int) -> None:
    for question in QUESTIONS:
        predict(question=question)


def in_our_pool(predict: Any, width: int) -> None:
    with dspylite.ThreadPoolExecutor(width) as pool:
        list(pool.map(lambda q: predict(question=q), QUESTIONS))


def in_a_plain_pool(predict: Any, width: int) -> None:
    with ThreadPoolExecutor(width) as pool:
        list(pool.map(bind(lambda q: predict(question=q)), QUESTIONS))


def in_a_batch(predict: Any, width: int) -> None:
    predict.batch([{"question": q} for q in QUESTIONS], num_threads=width)


def in_parallel(predict: Any, width: int) -> None:
    Parallel(num_threads=width)([(predict, {"question": q}) for q in QUESTIONS])


async def in_tasks(predict: Any, width: int) -> None:
    async with anyio.create_task_group() as group:
        for question in QUESTIONS:
            group.start_soon(lambda q=question: predict.acall(question=q))


async def in_asyncify(predict: Any, width: int) -> None:
    with dspylite.context(async_max_workers=width):
        async with anyio.create_task_group() as group:
            for question in QUESTIONS:
                group.start_soon(lambda q=question: asyncify(predict)(question=q))


async def in_abatch(predict: Any, width: int) -> None:
    await predict.abatch([{"question": q} for q in QUESTIONS], num_threads=width)


@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize(
    "run",
    [in_a_loop, in_our_pool, in_a_plain_pool, in_a_batch, in_parallel],
    ids=lambda f: f.__name__,
)
def test_usage_is_summed_over_threads(run: Callable[[Any, int], None], width: int) -> None:
    """The bill of a block is what its calls cost, however many threads made them."""
    lm = a_model()
    with dspylite.context(lm=lm), track_usage() as tracker:
        run(Predict(QA), width)
    assert tracker.get_total_tokens() == tracker.usage_data == counted_by(lm)
    assert tracker.total.calls == len(QUESTIONS)


@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize("run", [in_tasks, in_asyncify, in_abatch], ids=lambda f: f.__name__)
async def test_usage_is_summed_over_tasks(run: Callable[[Any, int], Any], width: int) -> None:
    """The same on an event loop."""
    lm = a_model()
    with dspylite.context(lm=lm), track_usage() as tracker:
        await run(Predict(QA), width)
    assert tracker.get_total_tokens() == counted_by(lm)
    assert tracker.total.calls == len(QUESTIONS)


def test_inner_block_counts_its_own_calls_and_the_outer_counts_all() -> None:
    """A function may count for itself without taking anything from its caller's bill."""
    first, second = a_model("fake/first"), a_model("fake/second")
    predict = Predict(QA)
    with track_usage() as outer:
        predict(question="q", lm=first)
        with track_usage() as inner:
            predict(question="q q", lm=first)
            predict(question="q", lm=second)
        predict(question="q", lm=second)
    assert outer.get_total_tokens() == counted_by(first, second)
    assert {name: usage.calls for name, usage in inner.by_model.items()} == {
        "fake/first": 1,
        "fake/second": 1,
    }
    assert (inner.total.calls, outer.total.calls) == (2, 4)


def test_nothing_is_counted_outside_the_block() -> None:
    """Two requests of a server count each for itself."""
    with dspylite.context(lm=a_model()):
        Predict(QA)(question="q")
        with track_usage() as tracker:
            pass
        Predict(QA)(question="q")
    assert (tracker.total, tracker.get_total_tokens()) == (Usage(), {})
    assert dspylite.settings.usage_tracker is None


def test_blocks_in_16_threads_count_each_its_own() -> None:
    """Tenants that share a model must not share a bill."""
    lm, predict = a_model(), Predict(QA)

    def serve(number: int) -> int:
        with dspylite.context(lm=lm), track_usage() as tracker:
            for _ in range(number):
                predict(question="q")
            return tracker.total.calls

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(serve, range(16))) == list(range(16))


def test_only_answered_calls_cost_tokens() -> None:
    """A failed attempt has no answer to count; the retried one is counted once."""
    lm = FakeLM([LMServerError("down"), LMServerError("down"), {"answer": "a"}], num_retries=2)
    with FakeClock(), dspylite.context(lm=lm), track_usage() as tracker:
        found = Predict(QA)(question="q")
    assert (len(lm.requests), tracker.total.calls) == (3, 1)
    assert found.get_lm_usage() == tracker.get_total_tokens()
    failing = FakeLM([LMServerError("down")])
    with track_usage() as tracker, pytest.raises(LMServerError):
        Predict(QA)(question="q", lm=failing)
    assert tracker.total == Usage()


def test_details_of_the_provider_are_summed_too() -> None:
    """Cached and reasoning tokens have prices of their own."""
    response = LMResponse(
        outputs=(LMOutput(text="[[ ## answer ## ]]\na\n[[ ## completed ## ]]"),),
        usage=Usage(prompt_tokens=5, calls=1, details={"cached_tokens": 4}),
    )
    with dspylite.context(lm=FakeLM([response, response])), track_usage() as tracker:
        Predict(QA)(question="q")
        Predict(QA)(question="q")
    assert tracker.total.details == {"cached_tokens": 8}
    assert tracker.usage_data["fake/lm"]["cached_tokens"] == 8


class TwoCalls(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Predict(QA), Predict(QA)

    def forward(self, question: str) -> Prediction:
        draft = self.first(question=question)
        final = self.second(question=draft.answer)
        return Prediction(answer=final.answer)


async def test_prediction_of_a_module_carries_all_calls_below_it_when_asked() -> None:
    """`settings.track_usage` is DSPy's way to a bill per request."""
    for awaited in (False, True):
        lm, program = a_model(), TwoCalls()
        with dspylite.context(lm=lm, track_usage=True):
            found = await program.acall(question="q") if awaited else program(question="q")
        assert found.get_lm_usage() == counted_by(lm)
        assert found.get_lm_usage()["fake/lm"]["calls"] == 2
    with dspylite.context(lm=a_model()):
        assert TwoCalls()(question="q").get_lm_usage() is None


@pytest.mark.parametrize("width", [1, 4])
async def test_usage_of_items_adds_up_to_that_of_the_batch(width: int) -> None:
    """Each outcome has its own bill, and nothing is billed twice or to the neighbour."""
    for awaited in (False, True):
        lm, program = a_model(), TwoCalls()
        inputs = [{"question": q} for q in QUESTIONS]
        with dspylite.context(lm=lm), track_usage() as tracker:
            if awaited:
                outcomes = await program.abatch(inputs, num_threads=width, on_error="return")
            else:
                batch = asyncify(partial(program.batch, on_error="return"))
                outcomes = await batch(inputs, num_threads=width)
        assert [outcome.usage["fake/lm"].calls for outcome in outcomes] == [2] * len(QUESTIONS)
        assert sum((o.usage["fake/lm"] for o in outcomes), Usage()) == tracker.total
        assert tracker.get_total_tokens() == counted_by(lm)
        sizes = [outcome.usage["fake/lm"].prompt_tokens for outcome in outcomes]
        assert sizes == sorted(sizes)  # the questions grow, so each bill is its own item's


def test_tracker_takes_calls_from_any_number_of_threads() -> None:
    """No count is lost between a read and a write."""
    outer = UsageTracker()
    inner = UsageTracker(outer)
    barrier = threading.Barrier(16, timeout=20)

    def add() -> None:
        barrier.wait()
        for _ in range(500):
            inner.add("m", Usage(prompt_tokens=1, calls=1))

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(add) for _ in range(16)]:
            future.result(20)
    assert inner.total == outer.total == Usage(prompt_tokens=8_000, calls=8_000)


# --- histories -----------------------------------------------------------------------------------


def test_history_keeps_the_last_calls_oldest_first() -> None:
    """It is a ring: a service that runs for weeks must not grow."""
    lm, program = a_model(), TwoCalls()
    with dspylite.context(lm=lm, max_history_size=3):
        for n in range(5):
            program(question=f"question {n}")
    for history in (lm.history, program.history):
        assert len(history) == 3
        prompts = [str(entry["messages"][-1]["content"]) for entry in history]
        assert ["question 4" in prompt for prompt in prompts] == [False, True, False]
    assert len(program.first.history) == len(program.second.history) == 3
    assert lm.history[-1] is program.second.history[-1]
    assert lm.history[-2:] == list(lm.history)[1:]


def test_history_entry_tells_the_whole_call() -> None:
    """`entry["..."]` is DSPy's spelling."""
    lm = a_model(temperature=0.5)
    lm("hello", max_tokens=7)
    (entry,) = lm.history
    assert entry["messages"] == [{"role": "user", "content": "hello"}]
    assert (entry["model"], entry["outputs"]) == ("fake/lm", (lm.history[0].outputs[0],))
    assert entry["kwargs"] == {"temperature": 0.5, "max_tokens": 7}
    assert entry["usage"]["prompt_tokens"] == 1
    assert GLOBAL_HISTORY[-1] is entry


@pytest.mark.parametrize("off", [{"disable_history": True}, {"max_history_size": 0}])
def test_nothing_is_kept_when_history_is_off(off: dict[str, Any]) -> None:
    """Some prompts must not stay in memory."""
    lm, program, before = a_model(), TwoCalls(), list(GLOBAL_HISTORY)
    with dspylite.context(lm=lm, **off), track_usage() as tracker:
        program(question="secret")
    assert (len(lm.history), len(program.history)) == (0, 0)
    assert all("secret" not in str(entry.messages) for entry in GLOBAL_HISTORY)
    assert len(list(GLOBAL_HISTORY)) <= len(before)
    assert tracker.total.calls == 2


def test_history_of_a_module_has_the_calls_made_in_its_threads() -> None:
    """A module that runs a batch inside sees what it spent there, and its neighbour does not."""

    class Inside(Module):
        def __init__(self) -> None:
            super().__init__()
            self.predict = Predict(QA)

        def forward(self, count: int) -> None:
            self.predict.batch([{"question": "q"}] * count, num_threads=4)

    one, other = Inside(), Inside()
    with dspylite.context(lm=a_model()), dspylite.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda m, n: m(n), [one, other], [5, 3]))
    assert (len(one.history), len(other.history)) == (5, 3)


def test_history_is_read_and_bounded_while_16_threads_add() -> None:
    """A debug page must be able to look while the service works."""
    history = History()
    entry = HistoryEntry(model="m", messages=[], outputs=(), usage={}, kwargs={})
    stop, sizes = threading.Event(), set()

    def add() -> None:
        for _ in range(1_000):
            history.add(entry)

    def read() -> None:
        while not stop.is_set():
            sizes.add(len(list(history)))

    reader = threading.Thread(target=read)
    with dspylite.context(max_history_size=50), dspylite.ThreadPoolExecutor(16) as pool:
        reader.start()
        for future in [pool.submit(add) for _ in range(16)]:
            future.result(20)
    stop.set()
    reader.join(20)
    assert len(history) == 50
    assert max(sizes) <= 50 + 16


@pytest.mark.parametrize(
    "carry", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))]
)
def test_copy_of_a_history_starts_empty(carry: Callable[[History], History]) -> None:
    """Programs are copied and pickled after many calls; the calls are not part of the program."""
    lm = a_model()
    lm("hello")
    twin = carry(lm.history)
    assert (len(twin), len(lm.history)) == (0, 1)
    twin.add(lm.history[0])
    assert (len(twin), len(lm.history)) == (1, 1)


SECRET = "sk-very-secret-0123456789"
SECRETS: dict[str, Any] = {
    "api_key": SECRET,
    "extra_headers": {"Authorization": f"Bearer {SECRET}"},
    "headers": {"x-key": SECRET},
    "default_headers": {"x-key": SECRET},
    "azure_ad_token": SECRET,
    "aws_secret_access_key": SECRET,
    "aws_session_token": SECRET,
    "vertex_credentials": SECRET,
    "client_secret": SECRET,
}


class Listener:
    """Keeps the text of all that it is told."""

    def __init__(self) -> None:
        self.heard = ""

    def note(self, **details: Any) -> None:
        self.heard += repr(details)

    on_lm_start = on_lm_end = on_module_start = on_module_end = note
    on_adapter_format_start = on_adapter_parse_end = note


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("given", ["to the lm", "to the call", "to the predictor", "in the config"])
def test_keys_and_headers_are_never_kept_or_told(name: str, given: str) -> None:
    """Histories are printed, logged and sent to tracing services (B 7.4)."""
    secret, listener = {name: SECRETS[name]}, Listener()
    lm = a_model(**(secret if given == "to the lm" else {}))
    predict = Predict(QA, **(secret if given == "to the predictor" else {}))
    with dspylite.context(lm=lm, callbacks=[listener]):
        if given == "to the call":
            lm("hello", **secret)
        else:
            predict(question="q", **({"config": secret} if given == "in the config" else {}))
    assert lm.requests[0].params[name] == SECRETS[name]
    kept = repr([*lm.history, *predict.history, GLOBAL_HISTORY[-1]])
    for text in (kept, listener.heard, repr(lm), repr(predict), str(lm.history[-1]["kwargs"])):
        assert SECRET not in text
    assert "max_tokens" in LM("openai/m", max_tokens=3, **secret).copy(max_tokens=4).kwargs


# --- traces --------------------------------------------------------------------------------------


def test_trace_receives_every_predictor_call_in_order() -> None:
    """DSPy programs pass a list and read (predictor, inputs, prediction) from it."""
    trace: list[Any] = []
    program = TwoCalls()
    with dspylite.context(lm=a_model(), trace=trace):
        found = program(question="q")
    assert [predictor for predictor, _, _ in trace] == [program.first, program.second]
    assert [inputs for _, inputs, _ in trace] == [{"question": "q"}, {"question": "one two three"}]
    assert trace[-1][2].answer == found.answer


def test_nothing_is_traced_unless_asked_for() -> None:
    """A list that grows for ever was DSPy's default."""
    with dspylite.context(lm=a_model()):
        TwoCalls()(question="q")
    assert dspylite.settings.trace is None


def test_failed_call_is_not_in_the_trace() -> None:
    """A trace holds examples of what worked."""
    trace: list[Any] = []
    with dspylite.context(lm=FakeLM(["?"]), trace=trace), pytest.raises(AdapterParseError):
        Predict(QA)(question="q")
    assert trace == []


async def test_trace_receives_the_calls_of_all_workers() -> None:
    """The list is the user's own, so workers and tasks write into that one."""
    for run in ("batch", "abatch"):
        trace: list[Any] = []
        program = TwoCalls()
        inputs = [{"question": q} for q in QUESTIONS]
        with dspylite.context(lm=a_model(), trace=trace):
            call = program.abatch if run == "abatch" else asyncify(program.batch)
            await call(inputs, num_threads=4)
        assert len(trace) == 2 * len(QUESTIONS)


def test_trace_is_bounded_and_keeps_the_last() -> None:
    """An optimiser that forgets to take the list away must not fill the memory."""
    trace: list[Any] = [("old", {}, None)] * 5
    with dspylite.context(lm=a_model(), trace=trace, max_trace_size=3):
        for n in range(4):
            Predict(QA)(question=str(n))
    assert [inputs["question"] for _, inputs, _ in trace] == ["1", "2", "3"]


def test_trace_emptied_by_another_thread_does_not_fail_the_call() -> None:
    """Between the look at its length and the drop, somebody else may have dropped the last."""

    class Raced(list[Any]):
        def __len__(self) -> int:
            return super().__len__() + 1  # what it was a moment ago

    trace = Raced()
    with dspylite.context(trace=trace, max_trace_size=1):
        for n in range(3):
            record_trace("predictor", {"n": n}, "prediction")
    assert list.__len__(trace) <= 1


def test_request_of_a_call_is_not_changed_by_what_is_kept() -> None:
    """What the engine sees is whole, keys included; what is kept is a copy without them."""
    seen: list[LMRequest] = []

    def answer(request: LMRequest) -> Any:
        seen.append(request)
        return {"answer": "a"}

    with dspylite.context(lm=FakeLM(answer, api_key=SECRET)):
        Predict(QA)(question="q")
    assert seen[0].params["api_key"] == SECRET
