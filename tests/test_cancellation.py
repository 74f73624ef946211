"""The flag by which work is told to stop, and every wait that sees it (B 3.2).

Not here: exchanges that are broken off half-way (`test_cancelled_exchanges.py`), and the places of
worker threads (`test_worker_places.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.errors import CallCancelledError
from dspylite.models.adaptive import Adaptive
from dspylite.models.limits import MaxConcurrency
from dspylite.models.litellm_door import load_litellm
from dspylite.models.rates import RateLimit
from dspylite.runtime.bridge import call_async, call_within
from dspylite.runtime.cancellation import CANCELLATION, Cancellation, check_cancelled
from dspylite.testing import FakeLM, FakeServer, Reply

LONG_S = 20.0
"""How long work would go on that nobody stops; a test that waits for it fails."""
SOON_S = 5.0
"""Far above what stopping takes on a busy machine, far below `LONG_S`."""


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    given = {"api_base": server.base_url, "api_key": "none", "num_retries": 0, "engine": "direct"}
    return dspy.LM("openai/m", **given | options)


def until(is_so: Callable[[], object]) -> None:
    """Wait on this thread until something is so, and fail if that takes long."""
    ends_at = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < ends_at, "it never came to be so"
        time.sleep(0.001)


async def cancel(call: Callable[[], Awaitable[object]], *, when: Callable[[], object]) -> None:
    """Start a call, cancel it when `when` has returned, and see that it waits no longer."""

    async def run() -> None:
        await call()

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await anyio.to_thread.run_sync(when)
        cancelled_at = time.monotonic()
        group.cancel_scope.cancel()
    assert time.monotonic() - cancelled_at < SOON_S


# --- The flag ------------------------------------------------------------------------------------


def test_a_flag_is_raised_once_and_keeps_its_first_reason() -> None:
    """The first who stops the work says why; later ones find it stopped."""
    flag = Cancellation()
    flag.check()
    assert flag.reason is None
    flag.cancel("the client went away")
    flag.cancel("something else")
    assert flag.reason == "the client went away"
    with pytest.raises(CallCancelledError, match=r"Cancelled: the client went away\."):
        flag.check()


def test_a_flag_is_raised_with_the_one_around_it_and_never_the_other_way() -> None:
    """An item that is stopped does not stop its batch; a batch stops all its items."""
    outer = Cancellation()
    items = [Cancellation(outer) for _ in range(2)]
    inside = Cancellation(items[0])
    items[0].cancel("its time was up")
    assert (outer.reason, items[1].reason) == (None, None)
    assert inside.reason == "its time was up"
    outer.cancel("Ctrl-C")
    assert [item.reason for item in items] == ["its time was up", "Ctrl-C"]


def test_work_begun_inside_stopped_work_is_stopped_from_the_start() -> None:
    """The flag around may be raised before the one inside it exists."""
    outer = Cancellation()
    outer.cancel("too late")
    assert Cancellation(outer).reason == "too late"
    assert outer._watchers == {}


def test_a_closed_flag_is_forgotten_by_the_one_around_it() -> None:
    """Else a long run would keep a flag for each call that it ever made."""
    outer = Cancellation()
    inner = Cancellation(outer)
    assert len(outer._watchers) == 1
    inner.close()
    inner.close()
    assert outer._watchers == {}
    outer.cancel("later")
    assert inner.reason is None


def test_watchers_are_called_once_each_and_those_that_left_not_at_all() -> None:
    """At the raising, or at once where the flag is raised already."""
    flag, told = Cancellation(), list[str]()
    flag.watch(lambda: told.append("first"))
    left = flag.watch(lambda: told.append("left"))
    flag.unwatch(left)
    flag.unwatch(left)
    flag.cancel("now")
    flag.cancel("again")
    flag.unwatch(flag.watch(lambda: told.append("late")))
    assert told == ["first", "late"]
    assert flag._watchers == {}


def test_each_watcher_is_called_exactly_once_in_every_race() -> None:
    """Threads that begin to watch, and two that raise the flag, at the same moment."""
    for _ in range(150):
        flag, together = Cancellation(), threading.Barrier(6)
        told: list[list[int]] = [[] for _ in range(40)]

        def watch(
            mine: list[list[int]], flag: Cancellation = flag, meet: threading.Barrier = together
        ) -> None:
            meet.wait(SOON_S)
            for each in mine:
                flag.watch(lambda each=each: each.append(1))

        def raise_it(flag: Cancellation = flag, meet: threading.Barrier = together) -> None:
            meet.wait(SOON_S)
            flag.cancel("now")

        threads = [threading.Thread(target=watch, args=(told[i::4],)) for i in range(4)]
        threads += [threading.Thread(target=raise_it) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON_S)
        assert told == [[1]] * 40
        assert flag._watchers == {}


def test_a_child_made_while_the_parent_is_raised_is_always_raised() -> None:
    """No moment exists at which a new flag would miss the raising."""
    for _ in range(300):
        outer, together = Cancellation(), threading.Barrier(2)
        made: list[Cancellation] = []

        def make(
            outer: Cancellation = outer,
            meet: threading.Barrier = together,
            made: list[Cancellation] = made,
        ) -> None:
            meet.wait(SOON_S)
            made += [Cancellation(outer) for _ in range(10)]

        thread = threading.Thread(target=make)
        thread.start()
        together.wait(SOON_S)
        outer.cancel("now")
        thread.join(SOON_S)
        assert {flag.reason for flag in made} == {"now"}


def test_a_block_has_its_flag_and_gives_the_outer_one_back() -> None:
    """What is started in the block belongs to it, what is started after it does not."""
    check_cancelled()
    with Cancellation() as outer:
        with Cancellation(outer) as inner:
            assert CANCELLATION.get() is inner
            inner.cancel("stop")
            with pytest.raises(CallCancelledError):
                dspy.check_cancelled()
        assert CANCELLATION.get() is outer
        dspy.check_cancelled()
    assert CANCELLATION.get() is None
    assert outer._watchers == {}


def test_a_block_left_in_another_context_does_not_raise() -> None:
    """As web frameworks leave the block of a dependency that yields (B 1.5)."""
    flag = Cancellation()
    contextvars.copy_context().run(flag.__enter__)
    flag.__exit__(None, None, None)


def _in_a_bound_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=dspy.bind(work))
    thread.start()
    thread.join(SOON_S)


def _in_our_pool(work: Callable[[], Any]) -> None:
    with dspy.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(SOON_S)


def _in_a_propagated_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    with dspy.propagate_to_threads():
        thread.start()
    thread.join(SOON_S)


def _in_a_batch(work: Callable[[], Any]) -> None:
    dspy.Parallel(num_threads=2)([(work, ())])


def _in_abatch(work: Callable[[], Any]) -> None:
    anyio.run(dspy.Parallel(num_threads=2).acall, [(work, ())])


def _in_asyncify(work: Callable[[], Any]) -> None:
    anyio.run(dspy.asyncify(work))


def _in_an_async_function(work: Callable[[], Any]) -> None:
    async def run() -> None:
        work()

    dspy.syncify(run)()


def _within_a_time(work: Callable[[], Any]) -> None:
    call_within(SOON_S, work)


WAYS = [
    _in_a_bound_thread, _in_our_pool, _in_a_propagated_thread, _in_a_batch, _in_abatch,
    _in_asyncify, _in_an_async_function, _within_a_time,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_the_flag_reaches_work_in_every_thread_and_task(
    way: Callable[[Callable[[], Any]], None],
) -> None:
    """Wherever the context goes, the flag goes, and it ends with the block (B 1.6, 3.2)."""
    seen: list[str | None] = []
    raised = threading.Event()

    def work() -> None:
        flag = CANCELLATION.get()
        if flag is None:
            seen.append("none")
            return
        flag.watch(raised.set)
        outer.cancel("from outside")
        assert raised.wait(SOON_S)
        seen.append(flag.reason)

    with Cancellation() as outer, contextlib.suppress(CallCancelledError, dspy.BatchError):
        way(work)
    until(lambda: seen)
    assert "from outside" in str(seen[0])
    assert outer._watchers == {}
    seen.clear()
    way(lambda: seen.append(None if CANCELLATION.get() is None else CANCELLATION.get().reason))  # type: ignore[union-attr]
    assert seen == [None]


def test_a_flag_raised_as_an_async_function_ends_harms_nobody() -> None:
    """Its loop is closed by then, and other watchers must still hear of it (B 3.2)."""
    told: list[Callable[[], object]] = []

    async def look() -> None:
        told.extend(flag._watchers.values())  # what a raiser of the flag holds at this moment

    with Cancellation() as flag:
        thread = threading.Thread(target=dspy.bind(lambda: call_async(look)))
        thread.start()
        thread.join(SOON_S)
    (tell,) = told
    tell()


# --- Who sees it: the thread of a cancelled asyncified call ends wherever it waits ----------------


@dataclass
class Scene:
    """Some sync work that is stopped half-way.

    Attributes:
        work: Runs in a worker thread.
        begun: Returns when it has come to the place where it waits.
        requests: What the server has seen in all when the work has ended.
    """

    work: Callable[[], object]
    begun: Callable[[], object]
    requests: int
    go_on: threading.Event


SCENES: list[Callable[[FakeServer], contextlib.AbstractContextManager[Scene]]] = []


def scene(
    make: Callable[[FakeServer], Generator[Scene]],
) -> Callable[[FakeServer], contextlib.AbstractContextManager[Scene]]:
    """Note a place at which work may be when it is cancelled."""
    made = contextlib.contextmanager(make)
    SCENES.append(made)
    return made


@scene
def before_the_next_call(server: FakeServer) -> Generator[Scene]:
    lm, started, go_on = lm_of(server), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert go_on.wait(LONG_S)
        lm("must not be asked")

    yield Scene(work, lambda: started.wait(SOON_S), 0, go_on)


@scene
def before_the_next_call_of_a_program(server: FakeServer) -> Generator[Scene]:
    started, go_on = threading.Event(), threading.Event()
    predict = dspy.Predict("question -> answer")

    def work() -> None:
        started.set()
        assert go_on.wait(LONG_S)
        with dspy.context(lm=lm_of(server)):
            predict(question="must not be asked")

    yield Scene(work, lambda: started.wait(SOON_S), 0, go_on)


@scene
def before_the_next_batch_of_texts(server: FakeServer) -> Generator[Scene]:
    started, go_on = threading.Event(), threading.Event()
    embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key="none", engine="direct")

    def work() -> None:
        started.set()
        assert go_on.wait(LONG_S)
        embedder.embed(["must not be asked"])

    yield Scene(work, lambda: started.wait(SOON_S), 0, go_on)


@scene
def between_two_attempts(server: FakeServer) -> Generator[Scene]:
    server.script(Reply(status=503, headers={"retry-after": "20"}))
    lm = lm_of(server, num_retries=3, adaptive=False)

    def begun() -> None:
        server.wait_for_requests(1)
        server.wait_until_idle()

    yield Scene(lambda: lm("busy"), begun, 1, threading.Event())


@scene
def in_line_for_a_place(server: FakeServer) -> Generator[Scene]:
    policy = MaxConcurrency(1)
    lm = lm_of(server, middleware=[policy])
    with dspy.ThreadPoolExecutor(1) as pool, server.hold():
        pool.submit(lm, "inside")
        server.wait_for_requests(1)
        yield Scene(
            lambda: lm("in line"), lambda: until(lambda: policy.waiting), 1, threading.Event()
        )
        assert policy.waiting == 0
    lm("the place is free again")


@scene
def in_line_for_a_turn(server: FakeServer) -> Generator[Scene]:
    policy = RateLimit(rpm=1)
    lm = lm_of(server, middleware=[policy])
    lm("the only one in this minute")
    yield Scene(
        lambda: lm("next minute"), lambda: until(lambda: policy.waiting), 1, threading.Event()
    )
    assert policy.waiting == 0


@scene
def in_line_at_the_adaptive_gate(server: FakeServer) -> Generator[Scene]:
    server.script(Reply(status=429, headers={"retry-after": "20"}))
    lm = lm_of(server)
    with pytest.raises(dspy.LMRateLimitError):
        lm("closes the gate")
    (gate,) = [policy.gate for policy in lm.middleware if isinstance(policy, Adaptive)]
    yield Scene(lambda: lm("waits"), lambda: until(lambda: gate.waiting), 1, threading.Event())
    assert (gate.waiting, gate.control.inside) == (0, 0)


@scene
def between_two_items(server: FakeServer) -> Generator[Scene]:
    lm, started, go_on = lm_of(server), threading.Event(), threading.Event()

    def item(number: int) -> None:
        started.set()
        assert go_on.wait(LONG_S)
        if number:
            lm("must not be asked")

    yield Scene(
        lambda: dspy.Parallel(num_threads=1).over(item, range(9)),
        lambda: started.wait(SOON_S),
        0,
        go_on,
    )


@scene
def in_code_that_looks(server: FakeServer) -> Generator[Scene]:
    started = threading.Event()

    def work() -> None:
        ends_at = time.monotonic() + LONG_S
        while time.monotonic() < ends_at:
            dspy.check_cancelled()
            started.set()

    yield Scene(work, lambda: started.wait(SOON_S), 0, threading.Event())


@scene
def in_an_async_function_called_from_sync(server: FakeServer) -> Generator[Scene]:
    started = threading.Event()

    async def wait() -> None:
        started.set()
        await anyio.sleep(LONG_S)

    yield Scene(dspy.syncify(wait), lambda: started.wait(SOON_S), 0, threading.Event())


@scene
def in_an_async_only_module(server: FakeServer) -> Generator[Scene]:
    lm = lm_of(server)

    class Asks(dspy.Module):
        async def aforward(self) -> Any:
            return await lm.acall("held")

    with server.hold():
        yield Scene(Asks(), lambda: server.wait_for_requests(1), 1, threading.Event())


@scene
def in_a_call_of_litellm_with_a_deadline(server: FakeServer) -> Generator[Scene]:
    lm = lm_of(server, engine="litellm", deadline_s=LONG_S)
    load_litellm()  # which may take longer than a test waits
    with server.hold():
        yield Scene(lambda: lm("held"), lambda: server.wait_for_requests(1), 1, threading.Event())
    server.wait_until_idle()  # what was left behind ends, and its connection is kept


@scene
def in_a_function_with_a_time_limit(server: FakeServer) -> Generator[Scene]:
    started, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        go_on.wait(LONG_S)

    yield Scene(
        lambda: call_within(LONG_S, wait), lambda: started.wait(SOON_S), 0, threading.Event()
    )
    go_on.set()


@scene
def in_an_exchange(server: FakeServer) -> Generator[Scene]:
    lm = lm_of(server, num_retries=3)
    with server.hold():
        yield Scene(lambda: lm("held"), lambda: server.wait_for_requests(1), 1, threading.Event())


@scene
def in_some_exchanges_side_by_side(server: FakeServer) -> Generator[Scene]:
    lm = lm_of(server)
    with server.hold():
        yield Scene(
            lambda: dspy.Parallel(num_threads=3).over(lm, ["a", "b", "c", "never", "never"]),
            lambda: server.wait_for_requests(3),
            3,
            threading.Event(),
        )


@pytest.mark.parametrize("place", SCENES, ids=lambda make: make.__name__)
async def test_a_cancelled_call_ends_its_thread_wherever_it_waits(
    place: Callable[[FakeServer], contextlib.AbstractContextManager[Scene]], server: FakeServer
) -> None:
    """The caller goes on at once; the thread sees the flag, and asks nobody any more (B 3.2)."""
    ended, errors = threading.Event(), list[BaseException]()
    with place(server) as at:

        def program() -> None:
            try:
                at.work()
            except BaseException as error:
                errors.append(error)
                raise
            finally:
                ended.set()

        await cancel(dspy.asyncify(program), when=at.begun)
        at.go_on.set()
        assert await anyio.to_thread.run_sync(ended.wait, SOON_S)
        assert len(server.requests) == at.requests
    assert [type(error) for error in errors] == [CallCancelledError]
    assert errors[0].__cause__ is not errors[0]
    assert "was cancelled" in str(errors[0])


async def test_a_call_nested_in_a_cancelled_one_is_told_too() -> None:
    """An asyncified call inside another, through the loop and back to a thread (B 3.2)."""
    started, ended = threading.Event(), threading.Event()

    def inner() -> None:
        try:
            ends_at = time.monotonic() + LONG_S
            while time.monotonic() < ends_at:
                dspy.check_cancelled()
                started.set()
        except CallCancelledError:
            ended.set()
            raise

    def outer() -> None:
        anyio.from_thread.run(dspy.asyncify(inner))

    for width in (1, 2):
        started.clear()
        ended.clear()
        with dspy.context(async_max_workers=width):
            await cancel(dspy.asyncify(outer), when=lambda: started.wait(SOON_S))
            assert await anyio.to_thread.run_sync(ended.wait, SOON_S)
            with anyio.fail_after(SOON_S):
                assert await dspy.asyncify(lambda: "free")() == "free"


def test_a_stopped_batch_keeps_what_it_had_and_tells_why() -> None:
    """The flag around a batch ends it at an item's border, with the results so far (B 3.2)."""

    def item(number: int) -> int:
        if number == 3:
            flag.cancel("enough")
        return number

    with Cancellation() as flag, pytest.raises(CallCancelledError, match="enough") as caught:
        dspy.Parallel(num_threads=1).over(item, range(100))
    assert set(dspy.finished_results(caught.value)) >= {0, 1, 2}
    assert set(dspy.finished_results(caught.value)) <= {0, 1, 2, 3}


async def test_a_flag_stops_an_awaited_batch() -> None:
    """Also one that is raised by another thread, while no task looks (B 3.2)."""
    started = threading.Event()

    async def item(number: int) -> int:
        if number < 3:
            return number
        started.set()
        await anyio.sleep(LONG_S)
        return number

    def stop() -> None:
        if started.wait(SOON_S):
            flag.cancel("enough")

    stopper = threading.Thread(target=stop)
    with Cancellation() as flag:
        stopper.start()
        with anyio.fail_after(SOON_S), pytest.raises(CallCancelledError, match="enough") as caught:
            await dspy.Parallel(num_threads=2).aover(item, range(100))
    stopper.join(SOON_S)
    assert dspy.finished_results(caught.value) == {0: 0, 1: 1, 2: 2}
    assert flag._watchers == {}


def test_models_and_embedders_of_ones_own_are_not_asked_either() -> None:
    """They have no transport of ours that would look at the flag (B 3.2)."""
    asked: list[str] = []

    class Own(dspy.BaseLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            asked.append("model")
            flag.cancel("while it was asked")
            raise dspy.LMServerError("try again")

    def embed(texts: list[str]) -> list[list[float]]:
        asked.append("embedder")
        return [[1.0]] * len(texts)

    lm = Own("own/m", num_retries=3)
    with Cancellation() as flag, pytest.raises(CallCancelledError):
        lm("the attempt after the first is not made")
    assert asked == ["model"]
    with flag:
        with pytest.raises(CallCancelledError):
            lm("hi")
        with pytest.raises(CallCancelledError):
            dspy.Embedder(embed).embed(["hi"])
    assert asked == ["model"]


# --- What stays behind ---------------------------------------------------------------------------


def _call_models(server: FakeServer) -> None:
    lm = lm_of(server, max_concurrency=8, rpm=10_000)
    with dspy.ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lm, [str(number) for number in range(400)]))) == 400
    for _ in range(20):
        with lm.stream("hi") as stream:
            assert list(stream)
        with lm.stream("hi") as stream:
            next(stream)  # and close it half-way


def _call_failing_models(server: FakeServer) -> None:
    lm = lm_of(server, adaptive=False)
    faults = [
        Reply(status=500), Reply(drop="before"), Reply(drop="body"), Reply(drop="headers"),
        Reply(body="no json"), Reply(status=400), Reply(headers={"content-encoding": "br"}),
        Reply(status=307, headers={"location": "http://elsewhere.example/"}),
    ]  # fmt: skip
    for fault in faults * 5:
        server.script(fault)
        with pytest.raises(dspy.LMError):
            lm("hi")
        server.script(fault)
        with pytest.raises(dspy.LMError), lm.stream("hi") as stream:
            list(stream)


def _await_models(server: FakeServer) -> None:
    lm = lm_of(server)

    async def main() -> None:
        for _ in range(100):
            await lm.acall("hi")

    anyio.run(main)
    anyio.run(main, backend="trio")


def _asyncify(server: FakeServer) -> None:
    async def main() -> None:
        work = dspy.asyncify(lambda: None)
        for _ in range(1000):
            await work()

    anyio.run(main)
    anyio.run(main, backend="trio")


def _run_batches(server: FakeServer) -> None:
    lm = FakeLM(default="hi")
    for options in ({}, {"timeout_s": 10.0}, {"hedge_after_s": 10.0}, {"total_timeout_s": 10.0}):
        parallel = dspy.Parallel(num_threads=4, **options)  # type: ignore[arg-type]
        assert len(parallel.over(lm, ["hi"] * 300)) == 300
        assert len(list(parallel.each(lm, ["hi"] * 50))) == 50
        assert len(anyio.run(parallel.aover, lm, ["hi"] * 300)) == 300


def _cross(server: FakeServer) -> None:
    async def nothing() -> None: ...

    for _ in range(300):
        call_within(SOON_S, int)
        call_async(nothing)


def _embed(server: FakeServer) -> None:
    embedder = dspy.Embedder(lambda texts: [[1.0]] * len(texts), batch_size=2)
    for _ in range(20):
        embedder.embed([str(number) for number in range(20)])


@pytest.mark.parametrize(
    "many",
    [
        _call_models, _call_failing_models, _await_models, _asyncify, _run_batches, _cross, _embed,
    ],
    ids=lambda many: many.__name__.strip("_"),
)  # fmt: skip
def test_a_flag_that_is_never_raised_keeps_nobody(
    many: Callable[[FakeServer], None], server: FakeServer
) -> None:
    """A service holds one for its whole life: thousands of calls must leave nothing (B 3.2)."""
    with Cancellation() as flag:
        many(server)
        until(lambda: not flag._watchers)


def test_work_that_goes_on_after_a_call_is_not_stopped_by_its_end() -> None:
    """What a call has started for later, such as a thread that logs, goes on (B 3.2)."""
    go_on, seen = threading.Event(), list[str | None]()

    def later() -> None:
        go_on.wait(SOON_S)
        flag = CANCELLATION.get()
        seen.append(None if flag is None else flag.reason)

    def start() -> threading.Thread:
        thread = threading.Thread(target=dspy.bind(later))
        thread.start()
        return thread

    async def start_async() -> threading.Thread:
        return start()

    async def in_a_running_loop() -> threading.Thread:
        return dspy.syncify(start_async)()

    threads = [
        call_within(SOON_S, start),
        anyio.run(in_a_running_loop),
        anyio.run(dspy.asyncify(start)),
        *dspy.Parallel(num_threads=2, timeout_s=SOON_S)([(start, ())]),
        *anyio.run(dspy.Parallel(num_threads=2, timeout_s=SOON_S).acall, [(start, ())]),
    ]
    go_on.set()
    for thread in threads:
        thread.join(SOON_S)
    assert seen == [None] * 5


def test_a_stream_opened_in_a_call_can_be_read_after_it(server: FakeServer) -> None:
    """The call has ended well, so nothing may break off what it gave back (B 3.2)."""
    lm = lm_of(server)
    server.script(Reply(chunks=["a", "b", "c"]))
    with call_within(SOON_S, lm.stream, "hi") as stream:
        assert "".join(piece.text for piece in stream) == "abc"
