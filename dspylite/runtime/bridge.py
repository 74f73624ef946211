"""Crosses between threads and event loops: a sync function awaited, an async function called.

No event loop is ever patched. Not here: carrying the context between threads of one's own
(`runtime/threads.py`), and the drivers that use these crossings (`runtime/flow.py`).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

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


def _hold_and_call(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> tuple[T]:
    # anyio runs this in a copy of the caller's context, which ends with the call.
    _HELD.set(_Held())
    return (fn(*args, **kwargs),)  # boxed: trio refuses a thread's result that is a coroutine


def running_library() -> str | None:
    """Tell which library runs an event loop on this thread right now.

    Returns:
        `"asyncio"`, `"trio"`, or None where no loop runs.
    """
    asyncio, trio = sys.modules.get("asyncio"), sys.modules.get("trio")
    # Another thread may be importing them at this moment; a half-made module runs no loop either.
    get_running_loop = getattr(asyncio, "get_running_loop", None)
    in_trio_run = getattr(getattr(trio, "lowlevel", None), "in_trio_run", None)
    if get_running_loop is not None:
        try:
            get_running_loop()
        except RuntimeError:
            pass
        else:
            return "asyncio"
    return "trio" if in_trio_run is not None and in_trio_run() else None


@functools.cache
def _load_thread_loops() -> Any:
    # Loads asyncio, which costs a third of the time that importing this package takes without it.
    from dspylite.runtime import thread_loops  # noqa: PLC0415

    return thread_loops


def call_async(fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run an async function to its end from sync code and return its result.

    On a thread without a running event loop it runs on that thread, in a loop that the thread keeps
    for such calls. Inside a running loop (a notebook, say) it runs on a helper thread while this
    one waits, so the running loop stands still meanwhile; `await` it instead where that matters.
    Either way it sees the caller's context.
    """
    call = partial(fn, *args, **kwargs)
    run = _load_thread_loops().run_on_thread_loop
    if running_library() is None:
        return cast("T", run(call))
    result: Future[T] = Future()
    context = carried_context()
    thread = threading.Thread(
        target=_deliver, args=(result, partial(context.run, run, call)), daemon=True
    )
    thread.start()
    return result.result()


def call_within(seconds: float, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a sync function that cannot be told to hurry, and wait no longer than so many seconds.

    It runs on a thread of its own, in a copy of the caller's context. Where the time is up, the
    thread is left behind; it is a daemon, so it keeps no process from ending.

    Raises:
        TimeoutError: The time is up.
    """
    result: Future[T] = Future()
    work = partial(carried_context().run, partial(fn, *args, **kwargs))
    threading.Thread(target=_deliver, args=(result, work), daemon=True).start()
    return result.result(max(0.0, seconds))


def _deliver(result: Future[Any], work: Callable[[], Any]) -> None:
    try:
        result.set_result(work())
    except BaseException as error:  # noqa: BLE001  # handed to the waiting thread, which raises it
        result.set_exception(error)
