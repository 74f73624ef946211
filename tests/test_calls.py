"""Callbacks and call frames: who is told what, in which order, and who called whom, on any thread.

Not here: what is counted and kept of calls (`test_tracking.py`).
"""

import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

import dspylite
from dspylite import (
    AdapterParseError,
    BaseCallback,
    CallCancelledError,
    ChatAdapter,
    JSONAdapter,
    LMServerError,
    Module,
    Parallel,
    Predict,
    asyncify,
    bind,
    current_call,
)
from dspylite.runtime.frames import ACTIVE_CALL_ID
from dspylite.testing import FakeLM, FakeServer, Reply


@dataclass(frozen=True)
class Event:
    name: str
    call_id: str
    parent_id: str | None
    item_index: int | None
    details: dict[str, Any]


class Recorder:
    """Hears everything, and notes the frame that it hears it in; a plain class without a base."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def note(call_id: str, **details: Any) -> None:
            frame = current_call()
            assert frame is not None
            assert frame.call_id == call_id
            found = Event(name, call_id, frame.parent_id, frame.item_index, details)
            self.events.append(found)

        return note

    def names(self) -> list[str]:
        return [event.name.removeprefix("on_") for event in self.events]

    def starts(self, kind: str = "module") -> list[Event]:
        return [event for event in self.events if event.name == f"on_{kind}_start"]

    def start_of(self, instance: Any) -> Event:
        (found,) = [e for e in self.events if e.details.get("instance") is instance]
        return found

    def end_of(self, start: Event) -> Event:
        (found,) = [e for e in self.events if e.call_id == start.call_id and e is not start]
        return found


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    with dspylite.context(callbacks=[found], lm=FakeLM(default={"answer": "a"})):
        yield found
    assert current_call() is None


class Outer(Module):
    """A program that runs its predictor in the way it was told."""

    def __init__(self, run: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.predict = Predict("question -> answer")
        self.run = run or (lambda predict: predict(question="q"))

    def forward(self, x: int = 0) -> Any:
        return self.run(self.predict)


class AsyncOuter(Outer):
    async def aforward(self, x: int = 0) -> Any:
        return await self.run(self.predict)

    forward = None  # type: ignore[assignment]


ORDER = [
    "module_start",
    "module_start",
    "adapter_format_start",
    "adapter_format_end",
    "lm_start",
    "lm_end",
    "adapter_parse_start",
    "adapter_parse_end",
    "module_end",
    "module_end",
]


# --- order and nesting ---------------------------------------------------------------------------


def test_events_come_in_the_order_of_the_call(recorder: Recorder) -> None:
    """A trace of a program is read from top to bottom."""
    Outer()()
    assert recorder.names() == ORDER


async def test_events_of_an_awaited_call_are_the_same(recorder: Recorder) -> None:
    """One body serves both, and tracing tools must not care which."""
    await Outer().acall()
    assert recorder.names() == ORDER
    recorder.events.clear()
    await AsyncOuter(lambda predict: predict.acall(question="q")).acall()
    assert recorder.names() == ORDER


def test_each_call_names_its_parent(recorder: Recorder) -> None:
    """Spans are drawn from these ids."""
    program = Outer()
    program()
    outer, inner = recorder.start_of(program), recorder.start_of(program.predict)
    lm = recorder.start_of(dspylite.settings.lm)
    assert outer.parent_id is None
    assert inner.parent_id == outer.call_id
    assert {e.parent_id for e in recorder.events if "adapter" in e.name} == {inner.call_id}
    assert lm.parent_id == inner.call_id
    assert len({event.call_id for event in recorder.events}) == len(ORDER) // 2


def test_start_tells_instance_and_inputs_and_end_tells_outputs(recorder: Recorder) -> None:
    """What went in and what came out is what one looks for in a trace."""
    program = Outer()
    found = program(5)
    outer, inner = recorder.start_of(program), recorder.start_of(program.predict)
    assert outer.details["inputs"] == {"args": (5,)}
    assert inner.details["inputs"] == {"question": "q"}
    assert recorder.end_of(outer).details == {"outputs": found, "exception": None}
    (format_start,) = recorder.starts("adapter_format")
    assert format_start.details["inputs"]["inputs"] == {"question": "q"}
    (lm_start,) = recorder.starts("lm")
    assert (
        lm_start.details["inputs"]["messages"] == recorder.end_of(format_start).details["outputs"]
    )
    assert recorder.end_of(lm_start).details["outputs"][0].startswith("[[ ## answer ## ]]")
    (parse_start,) = recorder.starts("adapter_parse")
    assert recorder.end_of(parse_start).details["outputs"] == {"answer": "a"}


def test_settings_callbacks_are_told_before_those_of_the_instance() -> None:
    """A tracer set for the whole process opens its span before, and in a fixed order."""
    told: list[str] = []

    class Named(BaseCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            told.append(f"{self.name} start")

        def on_module_end(
            self, call_id: str, outputs: Any, exception: BaseException | None = None
        ) -> None:
            told.append(f"{self.name} end")

    class Quiet(Module):
        def forward(self) -> None: ...

    with dspylite.context(callbacks=[Named("first"), Named("second")]):
        Quiet(callbacks=[Named("own")])()
    assert told == [
        "first start",
        "second start",
        "own start",
        "first end",
        "second end",
        "own end",
    ]


def test_callback_of_both_settings_and_object_is_told_once() -> None:
    """Told twice, one that counts would count twice, and one that traces would lose a span."""
    twice = Recorder()
    program = Outer()
    program.callbacks = [twice]
    with dspylite.context(callbacks=[twice], lm=FakeLM(default={"answer": "a"})):
        program()
    assert twice.names() == ORDER


def test_callbacks_of_one_object_hear_of_that_object_alone() -> None:
    """An LM's listener counts its requests, whoever makes them."""
    on_lm, on_adapter, on_module = Recorder(), Recorder(), Recorder()
    lm = FakeLM(default={"answer": "a"}, callbacks=[on_lm])
    program = Outer()
    program.callbacks = (on_module,)
    with dspylite.context(lm=lm, adapter=ChatAdapter(callbacks=[on_adapter])):
        program()
    assert on_lm.names() == ["lm_start", "lm_end"]
    assert on_module.names() == ["module_start", "module_end"]
    assert on_adapter.names() == ORDER[2:4] + ORDER[6:8]
    assert on_lm.starts("lm")[0].parent_id == on_module.starts()[0].call_id


def test_fallback_is_heard_as_a_second_attempt(recorder: Recorder) -> None:
    """The reader of a trace sees why a second request went out."""
    with dspylite.context(lm=FakeLM(["?", '{"answer": "a"}'])):
        Predict("question -> answer")(question="q")
    assert recorder.names() == [ORDER[1], *ORDER[2:8], *ORDER[2:8], ORDER[-1]]
    first, second = recorder.starts("adapter_parse")
    assert isinstance(recorder.end_of(first).details["exception"], AdapterParseError)
    assert isinstance(second.details["instance"], JSONAdapter)


def test_no_frame_is_made_where_nobody_listens() -> None:
    """Programs without callbacks do not pay for them."""
    seen: list[Any] = []
    with dspylite.context(lm=FakeLM(default={"answer": "a"})):
        Outer(lambda predict: seen.append(current_call()))()
    assert seen == [None]


# --- failures ------------------------------------------------------------------------------------


async def test_end_is_told_the_exception(recorder: Recorder) -> None:
    """The very object that the caller gets, at every level that it passed."""
    error = LMServerError("down")
    for awaited in (False, True):
        recorder.events.clear()
        program = Outer()
        with dspylite.context(lm=FakeLM([error])), pytest.raises(LMServerError):
            await program.acall() if awaited else program()
        ends = [e for e in recorder.events if e.name in {"on_module_end", "on_lm_end"}]
        assert [e.details for e in ends] == [{"outputs": None, "exception": error}] * 3


async def test_cancelled_call_is_told_its_end(recorder: Recorder) -> None:
    """A span that is never closed would stay open in the tracer for ever."""
    lm = FakeLM(default={"answer": "a"})
    program = AsyncOuter(lambda predict: predict.acall(question="q"))
    with dspylite.context(lm=lm), lm.hold():
        async with anyio.create_task_group() as group:
            group.start_soon(program.acall)
            await anyio.to_thread.run_sync(lm.wait_for_calls, 1)
            group.cancel_scope.cancel()
    starts = [e for e in recorder.events if e.name.endswith("_start")]
    ends = [e for e in recorder.events if e.name.endswith("_end")]
    assert sorted(e.call_id for e in starts) == sorted(e.call_id for e in ends)
    assert isinstance(ends[-1].details["exception"], anyio.get_cancelled_exc_class())


@pytest.mark.parametrize("raised", [ValueError("broken"), RecursionError(), StopIteration()])
async def test_raising_callback_is_logged_once_per_method_and_harms_nothing(
    raised: Exception, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A tracing outage must be no outage of the program, nor fill its log (B 4.15)."""

    class Broken(BaseCallback):
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            raise raised

        def on_lm_end(
            self, call_id: str, outputs: Any, exception: BaseException | None = None
        ) -> None:
            raise raised

        def on_adapter_parse_start(self) -> None:  # type: ignore[override]
            """Takes the wrong arguments, which is a mistake like any other."""

    caplog.set_level(logging.DEBUG, logger="dspylite.runtime.listeners")
    for awaited in (False, True):
        recorder.events.clear()
        with dspylite.context(callbacks=[Broken(), recorder]):
            program = Outer()
            found = await program.acall() if awaited else program()
        assert found.answer == "a"
        assert recorder.names() == ORDER
    logged = [record for record in caplog.records if "Broken" in record.getMessage()]
    warned = [each.getMessage() for each in logged if each.levelno == logging.WARNING]
    assert warned == [
        f"{method} of Broken failed; further failures of it are logged at DEBUG"
        for method in ("on_module_start", "on_lm_end", "on_adapter_parse_start")
    ]
    assert [each.levelno for each in logged].count(logging.DEBUG) == 8 - 3
    assert all(each.exc_info for each in logged)


def test_broken_callback_of_many_threads_is_logged_once(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """They all meet the first failure at once (B 4.15)."""
    barrier = threading.Barrier(8, timeout=10)

    class Broken(BaseCallback):
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            barrier.wait()
            raise ValueError("broken")

    class Quiet(Module):
        def forward(self) -> None: ...

    with dspylite.context(callbacks=[Broken()]):
        Quiet().batch([{}] * 8, num_threads=8)
    assert len(caplog.records) == 1


def test_raising_callback_does_not_hide_the_error_of_the_call() -> None:
    """The caller handles what really happened."""

    class Broken(BaseCallback):
        def on_lm_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            raise RuntimeError("broken")

    lm = FakeLM([LMServerError("down")], callbacks=[Broken()])
    with dspylite.context(lm=lm), pytest.raises(LMServerError, match="down"):
        Outer()()


def test_callback_whose_attributes_cannot_be_read_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A proxy of something that is gone raises before there is any method to call (B 4.15)."""

    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("gone")

    with dspylite.context(callbacks=[Gone()]):
        assert FakeLM(["x"])("hi") == ["x"]
    assert "on_lm_start of Gone failed" in caplog.text


def test_async_callback_is_told_to_be_none(caplog: pytest.LogCaptureFixture) -> None:
    """It would never be run, and Python would warn of each call, somewhere else."""

    class Async(BaseCallback):
        async def on_lm_start(  # type: ignore[override]
            self, call_id: str, instance: Any, inputs: dict[str, Any]
        ) -> None: ...

    with dspylite.context(callbacks=[Async()]):
        assert [FakeLM(["x"])("hi") for _ in range(3)] == [["x"]] * 3
    assert caplog.text.count("`on_lm_start` is async, so it is never run") == 1


@pytest.mark.parametrize("method", ["on_lm_start", "on_lm_end"])
def test_ctrl_c_in_a_callback_leaves_no_call_open(method: str, recorder: Recorder) -> None:
    """Else all later calls of the thread would be told as made by the one that is over."""

    class Stopped:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def stop(**details: Any) -> None:
                if name == method:
                    raise KeyboardInterrupt

            return stop

    lm = FakeLM(["x"], callbacks=[recorder])
    with dspylite.context(callbacks=[Stopped()]), pytest.raises(KeyboardInterrupt):
        lm("hi")
    assert recorder.names() == ["lm_start", "lm_end"]
    assert current_call() is None


def test_active_call_id_is_that_of_the_innermost_call() -> None:
    """Tracing tools written for DSPy read it; outside calls there is none."""
    seen: list[tuple[str, str | None]] = []

    class Look(BaseCallback):
        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            seen.append((call_id, ACTIVE_CALL_ID.get()))

    with dspylite.context(callbacks=[Look()], lm=FakeLM(default={"answer": "a"})):
        Outer().batch([{}] * 3, num_threads=3)
    assert all(told == found for told, found in seen)
    assert len({told for told, _ in seen}) == 3
    assert (ACTIVE_CALL_ID.get(), ACTIVE_CALL_ID.get("none")) == (None, "none")
    with pytest.raises(AttributeError):
        ACTIVE_CALL_ID.set("mine")  # type: ignore[attr-defined]  # pyright: ignore


def test_callbacks_may_be_assigned_as_a_list() -> None:
    """Those of an object are a tuple, so that no thread sees one half changed."""
    heard: list[str] = []

    class Hear(BaseCallback):
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append("module")

        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append("lm")

    lm, predict = FakeLM(default={"answer": "a"}), Predict("question -> answer")
    for each in (lm, predict):
        each.callbacks = [*each.callbacks, Hear()]
    with dspylite.context(lm=lm):
        predict(question="q")
        predict.deepcopy()(question="q")
    lm.copy()("q")
    assert heard == ["module", "lm", "module", "lm", "lm"]


def test_objects_without_any_handler_are_callbacks_too() -> None:
    """All methods are optional."""
    with dspylite.context(callbacks=[object()], lm=FakeLM(default={"answer": "a"})):
        assert Outer()().answer == "a"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), CallCancelledError("enough"), GeneratorExit()]
)
def test_end_is_told_of_what_is_no_ordinary_error(error: BaseException, recorder: Recorder) -> None:
    """Ctrl-C and cancellation end a call too (B 4.15)."""

    def leave(_: Any) -> None:
        raise error

    program = Outer(leave)
    with pytest.raises(type(error)):
        program()
    assert recorder.end_of(recorder.start_of(program)).details["exception"] is error


# --- what the end of a model's call tells --------------------------------------------------------


def test_end_of_a_models_call_tells_the_whole_response(recorder: Recorder) -> None:
    """Listeners count tokens and look at finish reasons (B 4.15)."""
    lm = FakeLM(["hello"])
    lm("hi")
    told = recorder.end_of(recorder.starts("lm")[0]).details["outputs"]
    assert told == ["hello"]
    assert told.response.usage.calls == 1
    assert told.response.outputs[0].text == "hello"
    assert told.response.answered_by == lm.model
    copied = pickle.loads(pickle.dumps(told))
    assert (copied, copied.response) == (told, told.response)


async def test_cancelled_stream_is_told_the_cancellation() -> None:
    """A trace shows that nobody read it to its end (B 4.15)."""
    told: list[Any] = []

    class Heard(BaseCallback):
        def on_call_left_open(self, call_id: str) -> None:
            told.append("left open")

        def on_lm_end(
            self, call_id: str, outputs: Any, exception: BaseException | None = None
        ) -> None:
            told.append(exception)

    with FakeServer() as server, dspylite.context(callbacks=[Heard()]):
        server.script(Reply(chunks=["a "] * 10_000, chunk_delay_s=0.01))
        lm = dspylite.LM("openai/m", api_base=server.base_url, api_key="none")
        with anyio.CancelScope() as scope:
            async with await lm.astream("hi") as stream:
                async for _ in stream:
                    scope.cancel()
    assert told[0] == "left open"
    assert [type(each) for each in told[1:]] == [anyio.get_cancelled_exc_class()]


# --- across threads, tasks and batches -----------------------------------------------------------


def in_our_pool(predict: Any) -> None:
    with dspylite.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: predict(question=str(n)), range(4)))


def in_a_plain_pool(predict: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bind(lambda n: predict(question=str(n))), range(4)))


def in_threads(predict: Any) -> None:
    threads = [threading.Thread(target=bind(lambda: predict(question="q"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


def in_parallel(predict: Any) -> None:
    Parallel(num_threads=4)([(predict, {"question": str(n)}) for n in range(4)])


async def in_tasks(predict: Any) -> None:
    async with anyio.create_task_group() as group:
        for n in range(4):
            group.start_soon(lambda n=n: predict.acall(question=str(n)))


async def in_asyncify(predict: Any) -> None:
    ask = asyncify(predict)
    async with anyio.create_task_group() as group:
        for n in range(4):
            group.start_soon(lambda n=n: ask(question=str(n)))


async def in_abatch(predict: Any) -> None:
    await predict.abatch([{"question": str(n)} for n in range(4)], num_threads=4)


def check_nesting(recorder: Recorder, program: Module) -> None:
    """Each of four calls is complete, and hangs on the program and not on its neighbour."""
    outer = recorder.start_of(program)
    inner = [event for event in recorder.starts() if event is not outer]
    assert [event.parent_id for event in inner] == [outer.call_id] * 4
    assert sorted(e.parent_id or "" for e in recorder.starts("lm")) == sorted(
        e.call_id for e in inner
    )
    assert len({event.call_id for event in recorder.events}) * 2 == len(recorder.events)


@pytest.mark.parametrize("run", [in_our_pool, in_a_plain_pool, in_threads, in_parallel])
def test_parents_are_right_in_threads(run: Callable[[Any], None], recorder: Recorder) -> None:
    """All four calls are under way at once; a shared "current call" would mix them (B 1.6)."""
    program = Outer(run)
    lm: Any = dspylite.settings.lm
    with lm.hold(until=4):
        program()
    assert lm.max_in_flight == 4
    check_nesting(recorder, program)


@pytest.mark.parametrize("run", [in_tasks, in_asyncify, in_abatch])
async def test_parents_are_right_in_tasks(run: Callable[[Any], Any], recorder: Recorder) -> None:
    """Tasks interleave on one thread, and their context is their own all the same."""
    program = AsyncOuter(run)
    lm: Any = dspylite.settings.lm
    with lm.hold(until=4):
        await program.acall()
    assert lm.max_in_flight == 4
    check_nesting(recorder, program)


@pytest.mark.parametrize("run", ["batch", "Parallel", "abatch", "acall"])
async def test_every_call_of_an_item_names_the_item(run: str, recorder: Recorder) -> None:
    """Chunks, spans and log lines of 64 threads are told apart by it."""
    program, count = Outer(), 12
    if run == "batch":
        await asyncify(program.batch)([{"x": n} for n in range(count)], num_threads=4)
    elif run == "Parallel":
        await asyncify(Parallel(num_threads=4))([(program, {"x": n}) for n in range(count)])
    elif run == "abatch":
        await program.abatch([{"x": n} for n in range(count)], num_threads=4)
    else:
        await Parallel(num_threads=4).acall([(program, {"x": n}) for n in range(count)])
    for start in recorder.starts():
        if start.details["instance"] is program:
            index = start.details["inputs"]["x"]
            below = {start.call_id}
            found = [e for e in recorder.events if e.call_id in below or e.parent_id in below]
            assert [event.item_index for event in found] == [index] * len(found)
            assert len(found) == 4
    assert len(recorder.events) == count * len(ORDER)
    assert {event.item_index for event in recorder.events} == set(range(count))


def test_inner_batch_counts_its_own_items_and_gives_the_outer_index_back(
    recorder: Recorder,
) -> None:
    """A batch inside an item is a batch of its own."""
    indexes: list[Any] = []

    def outer_item(n: int) -> None:
        Parallel(num_threads=2)([(Predict("question -> answer"), {"question": "q"})] * 3)
        Outer(lambda _: indexes.append((n, current_call())))()

    Parallel(num_threads=2)([(outer_item, (n,)) for n in range(2)])
    inner = [e.item_index for e in recorder.starts() if isinstance(e.details["instance"], Predict)]
    assert sorted(inner, key=str) == [0, 0, 1, 1, 2, 2]
    assert sorted((n, frame.item_index) for n, frame in indexes) == [(0, 0), (1, 1)]


def test_no_index_is_left_behind_by_a_batch(recorder: Recorder) -> None:
    """A call after the batch works for no item."""
    program = Outer()
    program.batch([{"x": 1}], num_threads=1)
    recorder.events.clear()
    program()
    assert {event.item_index for event in recorder.events} == {None}


def test_a_failure_within_a_handled_one_does_not_tell_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is dealt with at that moment may quote an answer, and is not the listener's doing."""

    class Echo(dspylite.Module):
        def forward(self, text: str) -> str:
            return text

    class Broken(BaseCallback):
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            try:
                raise ValueError("its own trouble")
            except ValueError:
                raise KeyError("of the listener")  # noqa: B904  # with its context

    try:
        raise ValueError("an answer's text")
    except ValueError:
        assert Echo(callbacks=[Broken()])(text="hi") == "hi"
    assert "of the listener" in caplog.text
    assert "its own trouble" in caplog.text
    assert "an answer's text" not in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda it: dspylite.LM("openai/m", callbacks=it),
        lambda it: dspylite.OfflineLM().copy(callbacks=it),
        lambda it: dspylite.Predict("a -> b", callbacks=it),
        lambda it: dspylite.Module(callbacks=it),
        lambda it: dspylite.ChatAdapter(callbacks=it),
    ],
    ids=["LM", "copy", "Predict", "Module", "ChatAdapter"],
)
def test_a_callback_without_its_list_is_refused_when_the_object_is_made(
    make: Callable[[Any], Any],
) -> None:
    """At the first call it would be too late to say what to write."""
    with pytest.raises(dspylite.SettingsError, match=r"write `callbacks=\[it\]`"):
        make(BaseCallback())
    told = [BaseCallback()]
    assert make(told).callbacks == tuple(told)
