"""Crosses between threads and event loops: a sync function awaited, an async function called.

No event loop is ever patched. Not here: carrying the context between threads of one's own
(`runtime/threads.py`), and the drivers that use these crossings (`runtime/flow.py`).
"""

from __future__ import annotations

import asyncio  # the loop that runs a user's async code for a caller that has none
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from dspylite.runtime.settings import settings
from dspylite.runtime.threads import carried_context

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_WORKERS = 40
"""Threads of one event loop; must match anyio's own default, which people size servers by."""

_LIMITERS: RunVar[dict[int, anyio.CapacityLimiter]] = RunVar("dspylite_thread_limiters")
_HELD: ContextVar[_Held | None] = ContextVar("dspylite_held_worker", default=None)


class _Held:
    """The worker slot that the current chain of calls already occupies.

    A call from inside it may use one more thread while the slot's own thread waits for it; without
    that, a nested call at full width would wait for its own caller.
    """

    __slots__ = ("_lent",)

    def __init__(self) -> None:
        self._lent: dict[object, anyio.CapacityLimiter] = {}

    def lend(self, owner: anyio.CapacityLimiter) -> anyio.CapacityLimiter:
        return self._lent.setdefault(owner, anyio.CapacityLimiter(1))


def _limiter() -> anyio.CapacityLimiter:
    """Return the limiter of this event loop at the current width; the loop's own, never shared."""
    width = settings.async_max_workers or DEFAULT_WORKERS
    try:
        limiters = _LIMITERS.get()
    except LookupError:
        limiters = {}
        _LIMITERS.set(limiters)
    limiter = limiters.get(width)
    if limiter is None:
        limiter = limiters[width] = anyio.CapacityLimiter(width)
    held = _HELD.get()
    if held is not None and limiter.available_tokens < 1:
        return held.lend(limiter)
    return limiter


async def call_in_thread(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a sync function in a worker thread, in a copy of the caller's context, and await it.

    At most `settings.async_max_workers` (40) run at once per event loop; a function that is itself
    run by one and comes back here is never blocked by its own slot. A cancelled caller waits until
    the thread ends, so that the slot is not given away while it is used.
    """
    (result,) = await anyio.to_thread.run_sync(
        partial(_hold_and_call, fn, *args, **kwargs), limiter=_limiter()
    )
    return result


def _hold_and_call(fn: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T]:
    # anyio runs this in a copy of the caller's context, which ends with the call.
    _HELD.set(_Held())
    return (fn(*args, **kwargs),)  # boxed: trio refuses a thread's result that is a coroutine


class _ThreadLoop:
    """The event loop of one thread that runs async code without being in a loop.

    Closed with the thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()

    def usable(self) -> bool:
        return self._pid == os.getpid() and not self._loop.is_closed()

    def run(self, fn: Callable[..., Awaitable[T]]) -> T:
        task = self._loop.create_task(_await(fn))
        try:
            return self._loop.run_until_complete(task)
        finally:  # also after KeyboardInterrupt: nothing stays behind for the next call
            self._cancel_rest()

    def _cancel_rest(self) -> None:
        if rest := asyncio.all_tasks(self._loop):
            for task in rest:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))

    def __del__(self) -> None:
        if self.usable() and not self._loop.is_running():
            self._loop.close()


async def _await(fn: Callable[..., Awaitable[T]]) -> T:
    return await fn()


_LOCAL = threading.local()
_INHERITED: list[_ThreadLoop] = []
"""Loops of a parent process: closing one would take the parent's sockets out of its selector."""


def _run_on_thread_loop(fn: Callable[..., Awaitable[T]]) -> T:
    loop: _ThreadLoop | None = getattr(_LOCAL, "loop", None)
    if loop is None or not loop.usable():
        if loop is not None:
            _INHERITED.append(loop)
        loop = _LOCAL.loop = _ThreadLoop()
    return loop.run(fn)


def in_event_loop() -> bool:
    """Tell whether this thread is running an event loop of any kind right now."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        trio = sys.modules.get("trio")
        return trio is not None and bool(trio.lowlevel.in_trio_run())
    return True


def call_async(fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run an async function to its end from sync code and return its result.

    On a thread without a running event loop it runs on that thread, in a loop that the thread keeps
    for such calls. Inside a running loop (a notebook, say) it runs on a helper thread while this
    one waits, so the running loop stands still meanwhile; `await` it instead where that matters.
    Either way it sees the caller's context.
    """
    call = partial(fn, *args, **kwargs)
    if not in_event_loop():
        return _run_on_thread_loop(call)
    result: Future[T] = Future()
    context = carried_context()
    thread = threading.Thread(
        target=_deliver, args=(result, partial(context.run, _run_on_thread_loop, call)), daemon=True
    )
    thread.start()
    return result.result()


def _deliver(result: Future[Any], work: Callable[[], Any]) -> None:
    try:
        result.set_result(work())
    except BaseException as error:  # noqa: BLE001  # handed to the waiting thread, which raises it
        result.set_exception(error)
