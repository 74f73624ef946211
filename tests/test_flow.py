"""One body for sync and async: what each driver does with a plan."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.abc import Io
from dspylite.errors import DeadlineExceededError
from dspylite.runtime.clock import Deadline, Latch
from dspylite.runtime.flow import ASYNC, BLOCKING, Both, run_flow
from dspylite.runtime.gates import Pass, Places, wake
from dspylite.runtime.loops import running_library
from dspylite.testing import FakeClock

Plan = Callable[[Io], Awaitable[Any]]


def on_a_plain_thread(plan: Plan) -> Any:
    return run_flow(plan(BLOCKING))  # type: ignore[arg-type]


def on_asyncio(plan: Plan) -> Any:
    return anyio.run(plan, ASYNC)


def on_trio(plan: Plan) -> Any:
    return anyio.run(plan, ASYNC, backend="trio")


drivers = pytest.mark.parametrize("drive", [on_a_plain_thread, on_asyncio, on_trio])


@drivers
def test_any_calls_sync_async_and_disguised_functions(drive: Callable[[Plan], Any]) -> None:
    """A user's function is called the right way without being asked what it is."""

    async def async_double(x: int) -> int:
        await anyio.sleep(0)
        return 2 * x

    def disguised(x: int) -> Any:
        return async_double(x)

    async def plan(io: Io) -> list[int]:
        return [
            await io.any(lambda x: 2 * x, 1),
            await io.any(async_double, 2),
            await io.any(disguised, 3),
            await io.any(functools.partial(async_double, 4)),
        ]

    assert drive(plan) == [2, 4, 6, 8]


@drivers
def test_call_picks_the_form_that_fits(drive: Callable[[Plan], Any]) -> None:
    """A leaf's blocking form never runs on an event loop, nor its async form without one."""

    async def acall() -> str:
        return "async"

    async def plan(io: Io) -> str:
        return await io.call(Both(lambda: "sync", acall))

    assert drive(plan) == ("sync" if drive is on_a_plain_thread else "async")


@drivers
def test_map_keeps_the_order_of_the_items(drive: Callable[[Plan], Any]) -> None:
    """Results belong to their items however long each took."""

    async def plan(io: Io) -> list[int]:
        async def double(x: int) -> int:
            return await io.any(lambda: 2 * x)

        return await io.map(double, range(20), limit=4)

    assert drive(plan) == [2 * x for x in range(20)]


@drivers
def test_map_runs_at_most_limit_at_once_and_really_that_many(
    drive: Callable[[Plan], Any],
) -> None:
    """The barrier opens only if 4 are under way together; the peak says that never 5 are."""
    lock, barrier = threading.Lock(), threading.Barrier(4)
    state = {"now": 0, "peak": 0}

    def work() -> None:
        with lock:
            state["now"] += 1
            state["peak"] = max(state["peak"], state["now"])
        barrier.wait(5)
        with lock:
            state["now"] -= 1

    async def plan(io: Io) -> None:
        async def one(_: int) -> None:
            await io.any(work)

        await io.map(one, range(12), limit=4)

    drive(plan)
    assert state["peak"] == 4


@drivers
def test_map_raises_the_items_own_error_and_stops(drive: Callable[[Plan], Any]) -> None:
    """No exception group appears where the sync form raises the error itself."""
    started: list[int] = []

    async def plan(io: Io) -> None:
        async def fail(x: int) -> None:
            started.append(x)
            raise KeyError(x)

        await io.map(fail, range(50), limit=1)

    with pytest.raises(KeyError):
        drive(plan)
    assert started == [0]


@drivers
def test_map_sees_a_failure_behind_an_item_that_hangs(drive: Callable[[Plan], Any]) -> None:
    """The first item waits for the end of the others' work; the second one has failed."""

    async def plan(io: Io) -> None:
        async def one(x: int) -> None:
            if x:
                raise KeyError(x)
            await io.sleep(60)

        await io.map(one, range(2), limit=2)

    with pytest.raises(KeyError):
        drive(plan)


@drivers
def test_map_of_nothing_is_empty(drive: Callable[[Plan], Any]) -> None:
    """An empty input is an ordinary one."""

    async def plan(io: Io) -> list[int]:
        async def one(x: int) -> int:
            return x

        return await io.map(one, [], limit=3)

    assert drive(plan) == []


@drivers
def test_sleeps_and_time_come_from_the_clock_of_the_context(drive: Callable[[Plan], Any]) -> None:
    """Tests of waits take no time."""

    async def plan(io: Io) -> float:
        start = io.now()
        await io.sleep(3600)
        return io.now() - start

    with FakeClock() as clock:
        assert drive(plan) == 3600
    assert clock.sleeps == [3600]


@drivers
def test_the_real_clock_really_waits(drive: Callable[[Plan], Any]) -> None:
    """Without a fake clock a sleep is a sleep."""

    async def plan(io: Io) -> bool:
        start = io.now()
        await io.sleep(0.02)
        return io.now() - start >= 0.019

    assert drive(plan)


def test_the_blocking_driver_has_no_event_loop() -> None:
    """Sync programs pay for no loop and cannot hang on one."""

    async def plan(io: Io) -> str | None:
        return running_library()

    assert on_a_plain_thread(plan) is None
    assert on_asyncio(plan) == "asyncio"
    assert on_trio(plan) == "trio"


def test_a_plan_that_awaits_past_its_io_fails_by_name() -> None:
    """A mistake in a middleware must not look like a hang."""

    async def bad_plan() -> None:
        await asyncio.sleep(0)

    with pytest.raises(dspy.FlowError, match="bad_plan"):
        run_flow(bad_plan())


async def test_an_async_sync_function_does_not_block_the_loop() -> None:
    """The loop runs other tasks while a worker thread holds the function."""
    started, release = threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        assert release.wait(5)
        return "done"

    async def open_when_started() -> None:
        while not started.is_set():
            await anyio.sleep(0.001)
        release.set()

    async with anyio.create_task_group() as group:
        group.start_soon(open_when_started)
        assert await ASYNC.any(work) == "done"


class Peak:
    """Counts who is inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.peak = self.done = 0

    def enter(self) -> None:
        with self.lock:
            self.now += 1
            self.peak = max(self.peak, self.now)

    def leave(self) -> None:
        with self.lock:
            self.now -= 1
            self.done += 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_gate_is_shared_by_threads_and_two_event_loops(backend: str) -> None:
    """6 threads and 2 loops with 6 tasks each: never more inside than places, and no deadlock."""
    gate, peak = Places(3), Peak()

    async def visit(io: Io) -> None:
        for _ in range(30):
            async with io.enter(gate):
                peak.enter()
                await io.sleep(0.0002)
                peak.leave()

    async def loop() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(visit, ASYNC)

    threads = [threading.Thread(target=lambda: run_flow(visit(BLOCKING))) for _ in range(6)]
    threads += [threading.Thread(target=lambda: anyio.run(loop, backend=backend)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (peak.done, peak.now) == (18 * 30, 0)
    assert peak.peak == 3


async def test_a_cancelled_waiter_gives_up_its_place_in_the_queue() -> None:
    """A place granted to nobody would be lost for ever."""
    gate = Places(1)
    async with ASYNC.enter(gate):
        with anyio.move_on_after(0.01) as scope:
            async with ASYNC.enter(gate):
                raise AssertionError("the only place is taken")
        assert scope.cancelled_caught
        assert gate.waiting == 0
    with anyio.fail_after(5):
        async with ASYNC.enter(gate):
            pass


def test_a_place_left_to_a_closed_loop_goes_to_the_next() -> None:
    """A loop that ended while it waited must not keep the place."""
    gate = Places(1)
    first = gate.ask(0)

    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    gate.ask(0).wake = closed
    third_woken = threading.Event()
    third = gate.ask(0)
    third.wake = third_woken.set
    gate.leave(first, 0)
    assert third.granted
    assert third_woken.is_set()


def test_leaving_twice_gives_no_second_place() -> None:
    """Otherwise the limit would grow with each mistake."""
    gate = Places(1)
    ticket = gate.ask(0)
    gate.leave(ticket, 0)
    gate.leave(ticket, 0)
    assert gate.ask(0).granted
    assert not gate.ask(0).granted


@pytest.mark.parametrize("io", [BLOCKING, ASYNC], ids=["blocking", "async"])
async def test_a_deadline_ends_the_wait_for_a_place(io: Io) -> None:
    """A full gate must not hold a call beyond its time, and the place in the queue is given up."""
    gate = Places(1)
    gate.ask(0)
    with FakeClock() as clock, Deadline(3), pytest.raises(DeadlineExceededError, match="waiting"):
        async with io.enter(gate):
            raise AssertionError("the only place is taken")
    assert (clock.sleeps, gate.waiting) == ([3], 0)


def test_the_nearest_of_nested_deadlines_counts() -> None:
    """An inner call inherits the smaller one, and the outer one is back after it."""
    with FakeClock() as clock, Deadline(10):
        with Deadline(20):
            assert BLOCKING.time_left() == 10
        with Deadline(None), Deadline(2):
            clock.sleep(3)
            assert BLOCKING.time_left() == -1
        assert BLOCKING.time_left() == 7
    assert BLOCKING.time_left() is None


class _Timetable:
    """A gate that opens at given times, one caller each."""

    def __init__(self, *opens_at: float) -> None:
        self.opens_at = list(opens_at)
        self.queue: list[Pass] = []

    def ask(self, now: float) -> Pass:
        self.queue.append(Pass())
        ticket = self.queue[-1]
        self.look(now)
        return ticket

    def look(self, now: float) -> None:
        while self.queue and self.opens_at and self.opens_at[0] <= now:
            self.opens_at.pop(0)
            ticket = self.queue.pop(0)
            ticket.granted = True
            wake(ticket)
        if self.queue:
            self.queue[0].look_again_at = self.opens_at[0]
            wake(self.queue[0])

    def leave(self, ticket: Pass, now: float) -> None:
        pass


@pytest.mark.parametrize("io", [BLOCKING, ASYNC], ids=["blocking", "async"])
async def test_a_gate_can_open_by_time(io: Io) -> None:
    """Who waits looks again at the time that its ticket names, and not before."""
    gate = _Timetable(5, 7)
    with FakeClock() as clock:
        async with io.enter(gate):
            assert clock.now() == 5
        async with io.enter(gate):
            assert clock.now() == 7


def test_a_gate_that_opens_by_time_is_shared_by_threads() -> None:
    """Only the first in the queue keeps the time; the next is told when it has become the first."""
    start = time.monotonic()
    gate = _Locked(_Timetable(*(start + 0.01 * step for step in range(12))))
    inside: list[int] = []

    async def visit(number: int) -> None:
        async with BLOCKING.enter(gate):
            inside.append(number)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda number: run_flow(visit(number)), range(12), timeout=20))
    assert sorted(inside) == list(range(12))


class _Locked:
    """Another gate, one caller at a time in its methods."""

    def __init__(self, gate: _Timetable) -> None:
        self.gate = gate
        self.lock = threading.RLock()

    def ask(self, now: float) -> Pass:
        with self.lock:
            return self.gate.ask(now)

    def look(self, now: float) -> None:
        with self.lock:
            self.gate.look(now)

    def leave(self, ticket: Pass, now: float) -> None:
        pass


def test_a_gate_without_places_is_refused() -> None:
    """It would hang its first caller."""
    with pytest.raises(ValueError, match="at least 1"):
        Places(0)


def test_a_latch_is_an_event_in_every_way() -> None:
    """It is set before, while and after somebody waits, more than once."""
    latch, going = Latch(), threading.Event()
    assert not latch.is_set()
    for seconds in (0, -1, 0.001):
        assert not latch.wait(seconds)
    for _ in range(2):
        latch.set()
    assert latch.wait(0)
    assert latch.wait()
    assert latch.is_set()
    for _ in range(2):
        latch.clear()
    assert not latch.wait(0)

    def wait() -> None:
        going.set()
        latch.wait()

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert going.wait(30)
    latch.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
