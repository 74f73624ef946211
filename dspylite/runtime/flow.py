"""The two drivers that run a plan: `BLOCKING` on the spot, `ASYNC` on an event loop.

A *plan* is an `async def` that receives an `Io` and waits only through it or through other plans,
so that one body serves sync and async callers. Not here: what plans do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from dspylite.abc import Clock, Dual, Gate, Io, Ticket
from dspylite.errors import FlowError
from dspylite.runtime.bridge import call_async, call_in_thread
from dspylite.runtime.threads import ThreadPoolExecutor, is_async

P = ParamSpec("P")
T = TypeVar("T")
X = TypeVar("X")
K = TypeVar("K", bound=Ticket)


class SystemClock:
    """The real time."""

    def now(self) -> float:
        """Return the monotonic clock's seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block this thread."""
        time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Wait on this event loop."""
        await anyio.sleep(seconds)


_SYSTEM_CLOCK = SystemClock()
CLOCK: ContextVar[Clock] = ContextVar("dspylite_clock", default=_SYSTEM_CLOCK)
"""The clock of this context's drivers; tests put another one here."""


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
        """Block this thread."""
        CLOCK.get().sleep(seconds)

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
        with ThreadPoolExecutor(width, thread_name_prefix="dspylite-map") as pool:
            futures = [pool.submit(_run_plan, plan, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @asynccontextmanager
    async def enter(self, gate: Gate[K]) -> AsyncGenerator[None, None]:
        """Block until the gate lets this thread in."""
        granted = threading.Event()
        ticket = gate.ask(granted.set)
        try:
            if not ticket.granted:
                granted.wait()
            yield
        finally:
            gate.leave(ticket)


class AsyncIo:
    """Waits by awaiting anyio, on asyncio and trio; sync functions go to worker threads."""

    async def call(self, dual: Dual[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await the async form."""
        return await dual.acall(*args, **kwargs)

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
        results: dict[int, T] = {}
        failures: list[Exception] = []
        waiting = iter(enumerate(items))

        async def work() -> None:
            for index, item in waiting:  # shared: each step of it happens between two awaits
                try:
                    results[index] = await plan(item)
                except Exception as error:  # noqa: BLE001  # raised below, alone, not in a group
                    failures.append(error)
                    group.cancel_scope.cancel()
                    return

        async with anyio.create_task_group() as group:
            for _ in range(min(limit, len(items))):
                group.start_soon(work)
        if failures:
            raise failures[0]
        return [results[index] for index in range(len(items))]

    @asynccontextmanager
    async def enter(self, gate: Gate[K]) -> AsyncGenerator[None, None]:
        """Await the gate."""
        granted = anyio.Event()
        token: Any = current_token().native_token
        # Posted, not called: two loops that wait for each other's release would stand still for
        # ever.
        post = getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon
        ticket = gate.ask(lambda: post(granted.set))
        try:
            if not ticket.granted:
                await granted.wait()
            yield
        finally:
            gate.leave(ticket)


def _run_plan(plan: Callable[[X], Awaitable[T]], item: X) -> T:
    return run_flow(_as_coroutine(plan, item))


async def _as_coroutine(plan: Callable[[X], Awaitable[T]], item: X) -> T:
    return await plan(item)


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
