"""The places of worker threads: kept until the thread ends, given back once (B 3.1, 3.2, 3.3).

Not here: what makes a thread end (`test_cancellation.py`).
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.errors import CallCancelledError
from dspylite.runtime.bridge import call_async
from dspylite.runtime.cancellation import Cancellation
from dspylite.runtime.workers import ON_DAEMONS, _loop, call_in_thread
from dspylite.testing import FakeServer

SOON_S = 5.0
"""Far above what anything here takes on a busy machine; whatever takes longer hangs."""

BACKENDS = ["asyncio", "trio"]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    given = {"api_base": server.base_url, "api_key": "none", "num_retries": 0, "engine": "direct"}
    return dspy.LM("openai/m", **given | options)


class Hall:
    """A function for worker threads that counts who is in it, and that a test may hold.

    Attributes:
        most: The most that were in it at once.
        entered: How often it was begun.
    """

    def __init__(self, lm: Callable[[str], object] | None = None) -> None:
        self._changed = threading.Condition()
        self._lm = lm
        self._is_open = False
        self.inside = self.most = self.entered = 0

    def stay(self) -> str:
        """Stay until the hall is opened, whatever the flag says; then ask the LM, if any."""
        with self._changed:
            self.inside += 1
            self.entered += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_open, 4 * SOON_S)
        try:
            if self._lm is not None:
                self._lm("from the hall")
        finally:
            with self._changed:
                self.inside -= 1
                self._changed.notify_all()
        return "stayed"

    def open(self) -> None:
        """Let everybody go on, now and later."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait until something about the hall is so."""
        with self._changed:
            assert self._changed.wait_for(is_so, SOON_S)

    async def await_(self, is_so: Callable[[], bool]) -> None:
        """Await likewise."""
        await anyio.to_thread.run_sync(self.wait_for, is_so)


async def until(is_so: Callable[[], object]) -> None:
    """Await until something is so, and fail if that takes long."""
    with anyio.fail_after(SOON_S):
        while not is_so():
            await anyio.sleep(0.001)


async def check_places(width: int) -> None:
    """See that exactly so many calls can run at once: all places are free, and none too many."""
    limiter = _loop().limiter()
    await until(lambda: limiter.statistics().borrowed_tokens == 0)
    assert limiter.total_tokens == width
    hall = Hall()
    results: list[str] = []

    async def run() -> None:
        results.append(await dspy.asyncify(hall.stay)())

    with anyio.fail_after(4 * SOON_S):
        async with anyio.create_task_group() as group:
            for _ in range(width + 2):
                group.start_soon(run)
            await hall.await_(lambda: hall.inside == width)
            await until(lambda: limiter.statistics().tasks_waiting == 2)
            assert hall.entered == width
            hall.open()
    assert (hall.most, results) == (width, ["stayed"] * (width + 2))


async def cancelled(
    hall: Hall, calls: int, width: int, work: Callable[[], Awaitable[object]]
) -> None:
    """Start calls, cancel them when as many are in the hall as there are places."""
    began = hall.entered

    async def run() -> None:
        await work()

    async with anyio.create_task_group() as group:
        for _ in range(calls):
            group.start_soon(run)
        await hall.await_(lambda: hall.entered == began + width)
        started = time.monotonic()
        group.cancel_scope.cancel()
    assert time.monotonic() - started < SOON_S


# --- Cancelled calls ------------------------------------------------------------------------------


async def test_thirty_cancels_at_width_two(server: FakeServer) -> None:
    """At most 2 threads live, no further call is made, and then 2 new calls run at once (B 3.2)."""
    lm = lm_of(server)
    hall = Hall(lm)
    with dspy.context(async_max_workers=2):
        await cancelled(hall, 30, 2, dspy.asyncify(hall.stay))
        assert (hall.inside, hall.most, hall.entered) == (2, 2, 2)
        hall.open()
        await hall.await_(lambda: hall.inside == 0)
        assert (hall.most, hall.entered, server.requests) == (2, 2, ())
        with server.hold():
            async with anyio.create_task_group() as group:
                for _ in range(2):
                    group.start_soon(dspy.asyncify(lm), "new")
                await anyio.to_thread.run_sync(server.wait_for_requests, 2)
                group.cancel_scope.cancel()
        await check_places(2)
    assert [request.prompt for request in server.requests] == ["new", "new"]


async def test_thirty_cancels_one_after_another_at_width_two(server: FakeServer) -> None:
    """Each in the middle of its call; the places come back as fast as they are taken (B 3.2)."""
    lm = lm_of(server)
    lock, counts = threading.Lock(), {"now": 0, "most": 0}

    def program() -> None:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts.values())
        try:
            lm("held")
            lm("never asked")
        finally:
            with lock:
                counts["now"] -= 1

    with dspy.context(async_max_workers=2):
        with server.hold():
            for number in range(30):
                async with anyio.create_task_group() as group:
                    group.start_soon(dspy.asyncify(program))
                    await anyio.to_thread.run_sync(server.wait_for_requests, number + 1)
                    group.cancel_scope.cancel()
        await check_places(2)
    assert counts["now"] == 0
    assert counts["most"] in {1, 2}
    assert {request.prompt for request in server.requests} == {"held"}
    assert len(server.requests) == 30


async def test_a_function_that_does_not_look_keeps_its_place() -> None:
    """A third call waits for it, though nobody awaits it any more (B 3.2)."""
    hall, third = Hall(), list[str]()

    async def run() -> None:
        third.append(await dspy.asyncify(lambda: "third")())

    with dspy.context(async_max_workers=2):
        await cancelled(hall, 2, 2, dspy.asyncify(hall.stay))
        limiter = _loop().limiter()
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until(lambda: limiter.statistics().tasks_waiting == 1)
            await anyio.wait_all_tasks_blocked()
            assert third == []
            assert limiter.statistics().borrowed_tokens == 2
            hall.open()
        assert third == ["third"]
        await check_places(2)


async def test_a_place_is_not_given_back_before_its_thread_has_ended_on_daemons() -> None:
    """Batches use threads that keep no process alive; their places are counted alike (B 3.2)."""
    hall = Hall()
    with dspy.context(async_max_workers=2):
        parallel = dspy.Parallel(num_threads=8)
        await cancelled(hall, 1, 2, lambda: parallel.aover(lambda _: hall.stay(), range(8)))
        assert _loop().limiter().statistics().borrowed_tokens == 2
        hall.open()
        await check_places(2)
    assert hall.most == 2


async def test_a_call_cancelled_in_line_leaves_nothing() -> None:
    """Neither a place nor a flag in the one around it (B 3.2)."""
    hall = Hall()
    with dspy.context(async_max_workers=1), Cancellation() as outer:
        async with anyio.create_task_group() as group:
            group.start_soon(dspy.asyncify(hall.stay))
            await hall.await_(lambda: hall.inside == 1)
            (kept,) = outer._watchers
            limiter = _loop().limiter()
            for _ in range(20):
                async with anyio.create_task_group() as inner:
                    for _ in range(3):
                        inner.start_soon(dspy.asyncify(hall.stay))
                    await until(lambda: limiter.statistics().tasks_waiting == 3)
                    inner.cancel_scope.cancel()
                assert list(outer._watchers) == [kept]
                assert limiter.statistics().tasks_waiting == 0
            hall.open()
        assert outer._watchers == {}
        assert hall.entered == 1
        await check_places(1)


async def test_a_call_cancelled_before_it_begins_runs_nothing() -> None:
    """A scope that is cancelled already lets nobody into a thread (B 3.2)."""
    hall = Hall()
    hall.open()
    with dspy.context(async_max_workers=1), Cancellation() as outer:
        for _ in range(50):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await dspy.asyncify(hall.stay)()
        assert outer._watchers == {}
        await check_places(1)


@pytest.mark.parametrize("on_daemons", [False, True])
async def test_each_place_is_given_back_exactly_once_in_every_race(on_daemons: bool) -> None:
    """Cancelled in line, before the thread starts, while it runs, as it ends (B 3.2)."""
    rand = random.Random(3)
    never = threading.Event()
    lock, counts = threading.Lock(), {"now": 0, "most": 0}

    def work(seconds: float) -> None:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        never.wait(seconds)
        with lock:
            counts["now"] -= 1

    async def call() -> None:
        for _ in range(20):
            with anyio.move_on_after(rand.choice([0, 0.0005, 0.001, 0.002, 0.01])):
                await call_in_thread(work, rand.choice([0, 0, 0.0005, 0.001, 0.002]))

    with dspy.context(async_max_workers=3), Cancellation() as outer:
        token = ON_DAEMONS.set(on_daemons)
        try:
            async with anyio.create_task_group() as group:
                for _ in range(30):
                    group.start_soon(call)
        finally:
            ON_DAEMONS.reset(token)
        await check_places(3)
    assert counts["now"] == 0
    assert 1 <= counts["most"] <= 3
    assert outer._watchers == {}


async def test_a_call_nested_in_one_that_was_left_behind_is_refused() -> None:
    """Its thread sees the flag there, and ends; on asyncio it would never have ended (B 3.2)."""
    hall, errors, inner = Hall(), list[BaseException](), Hall()

    def outer() -> None:
        hall.stay()
        try:
            anyio.from_thread.run(dspy.asyncify(inner.stay))
        except BaseException as error:
            errors.append(error)
            raise

    with dspy.context(async_max_workers=1):
        await cancelled(hall, 1, 1, dspy.asyncify(outer))
        hall.open()
        await check_places(1)
    assert [type(error) for error in errors] == [CallCancelledError]
    assert inner.entered == 0


async def test_the_places_of_nested_calls_come_back_from_every_race() -> None:
    """Calls inside calls, at width 1, cancelled at random moments (B 3.1, 3.2)."""
    rand = random.Random(5)

    def at_depth(depth: int) -> int:
        if depth:
            return 1 + anyio.from_thread.run(dspy.asyncify(at_depth), depth - 1)
        return 0

    async def call() -> None:
        for _ in range(10):
            with anyio.move_on_after(rand.choice([0, 0.001, 0.003, 0.01, 0.03])):
                assert await dspy.asyncify(at_depth)(3) == 3

    with dspy.context(async_max_workers=1), anyio.fail_after(6 * SOON_S):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(call)
        await check_places(1)
        assert await dspy.asyncify(at_depth)(3) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_daemons", [False, True])
def test_a_loop_may_end_before_the_thread_that_it_left_behind(
    backend: str, on_daemons: bool
) -> None:
    """The thread finds nobody to give its place back to, and ends quietly (B 3.2)."""
    hall = Hall()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        hall.stay()

    async def main() -> None:
        ON_DAEMONS.set(on_daemons)
        with dspy.context(async_max_workers=2):
            await cancelled(hall, 2, 2, partial(call_in_thread, work))

    noticed: list[object] = []
    before = threading.excepthook
    threading.excepthook = noticed.append
    try:
        anyio.run(main, backend=backend)
        assert hall.inside == 2
        hall.open()
        hall.wait_for(lambda: hall.inside == 0)
        if backend == "asyncio":  # trio keeps idle threads for the next loop
            for thread in threads:
                thread.join(SOON_S)
                assert not thread.is_alive()
    finally:
        threading.excepthook = before
    assert noticed == []


def test_a_thread_may_end_between_two_runs_of_its_loop() -> None:
    """As in sync code that calls async code again and again, on the loop of its thread (B 3.2)."""
    hall = Hall()

    async def leave_one_behind() -> None:
        await cancelled(hall, 1, 1, dspy.asyncify(hall.stay))

    def on_one_thread() -> None:
        with dspy.context(async_max_workers=1):
            call_async(leave_one_behind)
            assert hall.inside == 1
            hall.open()
            hall.wait_for(lambda: hall.inside == 0)
            call_async(check_places, 1)

    with dspy.ThreadPoolExecutor(1) as pool:
        pool.submit(on_one_thread).result(4 * SOON_S)


async def test_an_error_of_a_thread_that_was_left_behind_disturbs_nobody() -> None:
    """Nobody awaits it, so nobody may be shown it either (B 3.2)."""
    noticed: list[Any] = []
    before = threading.excepthook
    for on_daemons in (False, True):
        hall = Hall()

        def fail(hall: Hall = hall) -> None:
            hall.stay()
            raise ValueError("late")

        token = ON_DAEMONS.set(on_daemons)
        threading.excepthook = noticed.append
        try:
            with dspy.context(async_max_workers=2):
                await cancelled(hall, 2, 2, partial(call_in_thread, fail))
                hall.open()
                await check_places(2)
        finally:
            ON_DAEMONS.reset(token)
            threading.excepthook = before
    assert noticed == []


# --- Width and nesting ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2])
def test_two_loops_in_two_threads_have_places_of_their_own(width: int, backend: str) -> None:
    """Full on one loop is not full on the other, and neither waits for the other (B 3.1)."""
    halls = [Hall(), Hall()]
    errors: list[BaseException] = []

    async def main(hall: Hall) -> None:
        with dspy.context(async_max_workers=width), anyio.fail_after(4 * SOON_S):
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(dspy.asyncify(hall.stay))

    def run(hall: Hall) -> None:
        try:
            anyio.run(main, hall, backend=backend)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(hall,)) for hall in halls]
    for thread in threads:
        thread.start()
    for hall in halls:
        hall.wait_for(lambda hall=hall: hall.inside == width)  # type: ignore[misc]
    for hall in halls:
        hall.open()
    for thread in threads:
        thread.join(4 * SOON_S)
    assert errors == []
    assert [(hall.most, hall.entered) for hall in halls] == [(width, 5)] * 2


async def test_a_narrow_block_leaves_no_trace_whatever_happens_in_it() -> None:
    """Errors, cancels and nested calls inside `context(async_max_workers=1)` (B 3.1)."""

    def fail() -> None:
        raise ValueError("wrong")

    hall = Hall()
    with dspy.context(async_max_workers=1):
        with pytest.raises(ValueError, match="wrong"):
            await dspy.asyncify(fail)()
        await cancelled(hall, 3, 1, dspy.asyncify(hall.stay))
        hall.open()
        await check_places(1)
    together = threading.Barrier(40)
    with anyio.fail_after(2 * SOON_S):
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(dspy.asyncify(together.wait), SOON_S)


async def test_a_context_inside_the_thread_does_not_change_the_callers_width() -> None:
    """What a program sets for itself ends with its call (B 3.1)."""

    def program() -> int:
        with dspy.context(async_max_workers=1):
            return anyio.from_thread.run(dspy.asyncify(lambda: 1))

    with dspy.context(async_max_workers=3):
        assert await dspy.asyncify(program)() == 1
        await check_places(3)


@pytest.mark.parametrize("on_daemons", [False, True])
async def test_an_asyncified_function_can_call_its_loop_back(on_daemons: bool) -> None:
    """By anyio's own way, on both kinds of loop, and also in an item of a batch (B 3.1)."""

    async def on_loop(number: int) -> int:
        await anyio.sleep(0)
        return number + 1

    def program(number: int) -> int:
        anyio.from_thread.check_cancelled()
        return anyio.from_thread.run(on_loop, number)

    async def item(number: int) -> int:
        return await dspy.asyncify(program)(number)

    if on_daemons:
        assert await dspy.Parallel(num_threads=2).aover(item, range(5)) == [1, 2, 3, 4, 5]
    else:
        assert await item(0) == 1


# --- Other people's threads -----------------------------------------------------------------------


class OnlyForward(dspy.Module):
    """A module that must be run in a thread, and asks a model there."""

    def __init__(self, lm: dspy.LM) -> None:
        self.lm = lm

    def forward(self, question: str) -> Any:
        return self.lm(question)


async def _acall(lm: dspy.LM) -> Any:
    return await lm.acall("hi")


async def _acall_of_a_sync_module(lm: dspy.LM) -> Any:
    return await OnlyForward(lm).acall(question="hi")


async def _asyncified(lm: dspy.LM) -> Any:
    return await dspy.asyncify(OnlyForward(lm))(question="hi")


async def _abatch(lm: dspy.LM) -> Any:
    (answer,) = await OnlyForward(lm).abatch([{"question": "hi"}])
    return answer


async def _stream(lm: dspy.LM) -> Any:
    async with await lm.astream("hi") as stream:
        return ["".join([piece.text async for piece in stream])]


async def _nested(lm: dspy.LM) -> Any:
    return await dspy.asyncify(lambda: anyio.from_thread.run(_asyncified, lm))()


@pytest.mark.parametrize(
    "ask",
    [_acall, _acall_of_a_sync_module, _asyncified, _abatch, _stream, _nested],
    ids=lambda ask: ask.__name__.strip("_"),
)
async def test_full_executors_of_the_application_hold_nothing_up(
    ask: Callable[[dspy.LM], Awaitable[Any]], server: FakeServer, anyio_backend: str
) -> None:
    """Neither asyncio's default executor nor anyio's default limiter is ours to use (B 3.3)."""
    # A host by name, which must be looked up without the loop's default executor.
    lm = lm_of(server, api_base=f"http://localhost:{server.port}/v1")
    over = threading.Event()
    jobs: list[Any] = []
    full = anyio.to_thread.current_default_thread_limiter()
    held = [object() for _ in range(int(full.total_tokens))]
    if anyio_backend == "asyncio":
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(None, over.wait, 6 * SOON_S) for _ in range(64)]
    for each in held:
        full.acquire_on_behalf_of_nowait(each)
    try:
        with anyio.fail_after(SOON_S):
            assert await ask(lm) == ["echo: hi"]
    finally:
        over.set()
        for each in held:
            full.release_on_behalf_of(each)
        for job in jobs:
            await job
