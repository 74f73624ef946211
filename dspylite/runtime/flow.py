"""The two drivers that run a plan: `BLOCKING` on the spot, `ASYNC` on an event loop.

A *plan* is an `async def` that receives an `Io` and waits only through it or through other plans,
so that one body serves sync and async callers. Not here: what plans do.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

import anyio

from dspylite.abc import Clock, Dual, Gate, Io, Ticket
from dspylite.errors import FlowError
from dspylite.runtime.bridge import call_async, call_within, map_on_threads
from dspylite.runtime.cancellation import CANCELLATION, check_cancelled
from dspylite.runtime.clock import CLOCK, Latch, deadline_error, time_left
from dspylite.runtime.loops import poster, standing_still
from dspylite.runtime.threads import is_async
from dspylite.runtime.workers import call_in_thread

P = ParamSpec("P")
T = TypeVar("T")
X = TypeVar("X")
K = TypeVar("K", bound=Ticket)


@dataclass(frozen=True, slots=True)
class Both(Generic[P, T]):
    """A leaf made of two functions, one for each driver.

    Attributes:
        call: The blocking form.
        acall: The async form.
    """

    call: Callable[P, T]
    acall: Callable[P, Awaitable[T]]


class BlockingIo:
    """Waits by blocking the calling thread; no event loop exists on this path."""

    async def call(self, dual: Dual[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the blocking form."""
        return dual.call(*args, **kwargs)

    async def any(
        self, fn: Callable[P, T | Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a sync function on this thread, an async one through `call_async`."""
        if is_async(fn):
            return call_async(cast("Callable[P, Awaitable[T]]", fn), *args, **kwargs)
        value = fn(*args, **kwargs)
        # A decorated async function may not look like one.
        return call_async(_wait_for, value) if isinstance(value, Coroutine) else cast("T", value)

    async def sleep(self, seconds: float) -> None:
        """Block this thread, but no longer than its work may go on."""
        clock, flag = CLOCK.get(), CANCELLATION.get()
        if flag is None:
            clock.sleep(seconds)
            return
        stopped = Latch()
        handle = flag.watch(stopped.set)
        try:
            clock.wait(stopped, seconds)
        finally:
            flag.unwatch(handle)
        flag.check()

    def now(self) -> float:
        """Return the clock's seconds."""
        return CLOCK.get().now()

    async def map(
        self, plan: Callable[[X], Awaitable[T]], items: Sequence[X], *, limit: int
    ) -> list[T]:
        """Run the plans on `limit` threads, or on this one if one suffices."""
        width = min(limit, len(items))
        if width <= 1:
            return [await plan(item) for item in items]
        return map_on_threads(partial(_run_plan, plan), items, width)

    def time_left(self) -> float | None:
        """Return the seconds until the deadline of the call in progress; None without one."""
        return time_left()

    def enter(self, gate: Gate[K]) -> AbstractAsyncContextManager[K]:
        """Block until the gate lets this thread in."""
        return _Entry(gate, _wait_on_thread)


class AsyncIo:
    """Waits by awaiting anyio, on asyncio and trio; sync functions go to worker threads."""

    def call(self, dual: Dual[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Give the async form to be awaited."""
        return dual.acall(*args, **kwargs)

    async def any(
        self, fn: Callable[P, T | Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await an async function; run a sync one in a worker thread with this context."""
        if is_async(fn):
            return await cast("Callable[P, Awaitable[T]]", fn)(*args, **kwargs)
        value = await call_in_thread(fn, *args, **kwargs)
        return await value if isinstance(value, Coroutine) else cast("T", value)

    async def sleep(self, seconds: float) -> None:
        """Wait on this event loop."""
        await CLOCK.get().asleep(seconds)

    def now(self) -> float:
        """Return the clock's seconds."""
        return CLOCK.get().now()

    async def map(
        self, plan: Callable[[X], Awaitable[T]], items: Sequence[X], *, limit: int
    ) -> list[T]:
        """Run the plans as `limit` tasks; the first failure cancels the others."""
        width = min(limit, len(items))
        if width <= 1:
            return [await plan(item) for item in items]
        results: dict[int, T] = {}
        failures: list[BaseException] = []
        waiting = iter(enumerate(items))

        async def work() -> None:
            for index, item in waiting:  # shared: each step of it happens between two awaits
                try:
                    results[index] = await plan(item)
                except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001
                    failures.append(error)  # raised below, alone, not in a group
                    group.cancel_scope.cancel()
                    return
                except anyio.get_cancelled_exc_class() as error:
                    failures.append(error)  # it may be the plan's own, which nobody else tells of
                    group.cancel_scope.cancel()
                    raise

        async with anyio.create_task_group() as group:
            for _ in range(width):
                group.start_soon(work)
        if failures:
            raise failures[0]
        return [results[index] for index in range(len(items))]

    def time_left(self) -> float | None:
        """Return the seconds until the deadline of the call in progress; None without one."""
        return time_left()

    def enter(self, gate: Gate[K]) -> AbstractAsyncContextManager[K]:
        """Await the gate."""
        return _Entry(gate, _wait_on_loop)


class _Entry(Generic[K]):
    """A place in a gate for the length of a block; a class, because generators cost more."""

    __slots__ = ("_clock", "_gate", "_ticket", "_wait")

    def __init__(self, gate: Gate[K], wait: Callable[[Gate[K], K, Clock], Awaitable[None]]) -> None:
        self._gate = gate
        self._wait = wait
        self._clock = CLOCK.get()

    async def __aenter__(self) -> K:
        self._ticket = ticket = self._gate.ask(self._clock.now())
        if not ticket.granted:
            try:
                await self._wait(self._gate, ticket, self._clock)
            except BaseException:
                self._gate.leave(ticket, self._clock.now())
                raise
        return ticket

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._gate.leave(self._ticket, self._clock.now())


async def _wait_on_thread(gate: Gate[K], ticket: K, clock: Clock) -> None:
    changed = Latch()
    ticket.wake = changed.set
    flag = CANCELLATION.get()
    handle = flag and flag.watch(changed.set)
    try:
        while not ticket.granted:
            check_cancelled()
            seconds = _seconds_to_wait(ticket, clock)
            if not ticket.granted:  # it may have been since `wake` was set or the event cleared
                clock.wait(changed, seconds)
            changed.clear()
            gate.look(clock.now())
    finally:
        if flag is not None:
            flag.unwatch(handle)


async def _wait_on_loop(gate: Gate[K], ticket: K, clock: Clock) -> None:
    post = poster()
    while not ticket.granted:
        changed = anyio.Event()
        ticket.wake = partial(post, changed.set)
        seconds = _seconds_to_wait(ticket, clock)
        if not ticket.granted:  # it may have been before `wake` was set
            await clock.await_(changed, seconds)
        gate.look(clock.now())


def _seconds_to_wait(ticket: Ticket, clock: Clock) -> float | None:
    """Return the longest wait before the holder must look again or give up.

    Raises:
        DeadlineExceededError: The time of the call is up.
    """
    left = time_left()
    if left is not None and left <= 0:
        raise deadline_error("waiting for other calls to the same endpoint")
    again = ticket.look_again_at
    if again is None:
        return left
    seconds = max(0.0, again - clock.now())
    return seconds if left is None else min(seconds, left)


def _run_plan(plan: Callable[[X], Awaitable[T]], item: X) -> T:
    return run_flow(_as_coroutine(plan, item))


async def _as_coroutine(plan: Callable[[X], Awaitable[T]], item: X) -> T:
    return await plan(item)


async def within_deadline(io: Io, plan: Callable[[Io], Coroutine[Any, Any, T]], doing: str) -> T:
    """Run a plan that calls a user's functions, no longer than the call in progress may take.

    Where that has a deadline, the blocking driver runs the plan in a thread beside this one, which
    is left behind when the time is up and told by its flag to stop.

    Args:
        io: The driver.
        plan: An async function of a driver.
        doing: What is said in the error, such as `"the tool ran"`.

    Raises:
        DeadlineExceededError: The time is up.
    """
    left = io.time_left()
    if left is None:
        return await plan(io)
    if left <= 0:
        raise deadline_error(doing)
    return await io.call(
        Both(partial(_block_within, plan, left, doing), partial(_await_within, plan, left, doing))
    )


def _block_within(plan: Callable[[Io], Coroutine[Any, Any, T]], seconds: float, doing: str) -> T:
    with standing_still():
        try:
            return call_within(seconds, lambda: run_flow(plan(BLOCKING)))
        except TimeoutError as error:  # the plan's own one, if there is time left
            if (time_left() or 0.0) > 0:
                raise
            raise deadline_error(doing) from error


async def _await_within(
    plan: Callable[[Io], Coroutine[Any, Any, T]], seconds: float, doing: str
) -> T:
    with anyio.move_on_after(seconds):
        return await plan(ASYNC)
    raise deadline_error(doing)


async def _wait_for(value: Awaitable[T]) -> T:
    return await value


BLOCKING: Io = BlockingIo()
ASYNC: Io = AsyncIo()


def run_flow(plan: Coroutine[Any, Any, T]) -> T:
    """Run a plan that was given `BLOCKING` to its end on this thread, without an event loop.

    Raises:
        FlowError: The plan awaited something other than its `Io`.
    """
    try:
        plan.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    plan.close()
    name = getattr(plan, "__qualname__", type(plan).__name__)
    raise FlowError(
        f"`{name}` awaited something that only an event loop can wait for. "
        "A plan waits through its `io`: `io.call`, `io.any`, `io.sleep`, `io.map`, `io.enter`."
    )


async def own_form(io: Io, holder: Any, call: str, acall: str) -> Callable[..., Any] | None:
    """Find the method of a user's object that serves this driver, to be run by `io.any`.

    Args:
        io: The driver.
        holder: The object.
        call: Name of its sync method.
        acall: Name of its async method.

    Returns:
        Of two that are both meant the one of the driver's side, else the only one; None without.
    """
    cls: type = type(holder)
    stale = _stale_form(cls, call, acall)
    blocking = None if stale == call else getattr(holder, call, None)
    awaiting = None if stale == acall else getattr(holder, acall, None)
    if blocking is None or awaiting is None:
        return cast("Callable[..., Any] | None", blocking or awaiting)
    return cast("Callable[..., Any]", await io.call(_OWN_SIDE, blocking, awaiting))


async def _second(blocking: Any, awaiting: Any) -> Any:
    del blocking
    return awaiting


_OWN_SIDE: Both[[Any, Any], Any] = Both(lambda blocking, awaiting: blocking, _second)  # noqa: ARG005


@functools.lru_cache(maxsize=1024)
def _stale_form(cls: type, call: str, acall: str) -> str | None:
    """Name the form that a class left behind when it overrode one of a pair that it inherited.

    Of a base that has both, a subclass that overrides one of them means both; the other one would
    ignore its override.
    """
    homes: dict[str, int] = {}
    for place, base in enumerate(cls.__mro__):
        for name in (call, acall):
            if name in vars(base):
                homes.setdefault(name, place)
    if len(homes) < 2:
        return None
    near, far = sorted(homes, key=homes.__getitem__)
    return far if homes[near] < homes[far] and near in vars(cls.__mro__[homes[far]]) else None
