"""The event loop that runs here: which library's it is, and how work is given to it.

Not here: functions that cross between it and threads (`runtime/workers.py`, `runtime/bridge.py`).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, cast

from anyio.lowlevel import current_token

from dspylite.runtime.forks import loading

Post = Callable[[Callable[[], object]], None]
"""Has a function called by an event loop, from any thread, and waits for nothing."""


def poster() -> Post:
    """Return a function that has another function called by this event loop, from any thread.

    It never waits: two loops that wait for each other stand still for ever. It raises RuntimeError
    where the loop has ended.
    """
    return poster_of(current_token().native_token)


def poster_of(token: Any) -> Post:
    """Return the poster of an event loop, given anyio's token of it."""
    post: Any = getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon
    return cast("Post", post)


def post_quietly(post: Post, call: Callable[[], object]) -> None:
    """Have a function called by an event loop; nothing happens where the loop has ended."""
    try:
        post(call)
    except RuntimeError:
        pass  # its limits, its tasks and those who waited have ended with it


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


STANDING_STILL: ContextVar[frozenset[int]] = ContextVar(
    "dspylite_standing_still", default=frozenset()
)
"""Threads whose event loops stand still until the work of this context is done: whoever waits for
one of their tasks would wait for ever."""


@contextmanager
def standing_still() -> Generator[None, None, None]:
    """Let the work started in the block know that this thread's loop, if one runs, waits for it."""
    if running_library() is None:
        yield
        return
    token = STANDING_STILL.set(STANDING_STILL.get() | {threading.get_ident()})
    try:
        yield
    finally:
        STANDING_STILL.reset(token)


def start_task(plan: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Start a task of the running event loop that nobody waits for, in a copy of this context.

    For work whose results are fetched by whoever wants them. It ends with the loop at the latest.

    Args:
        plan: An async function without arguments; it must deal with its own errors.
    """
    if running_library() == "trio":
        lowlevel = sys.modules["trio"].lowlevel
        lowlevel.spawn_system_task(plan, context=copy_context())
    else:
        load_thread_loops().start_task(plan)


def is_cancelled() -> bool:
    """Tell whether the running task is told to stop.

    A cancellation that it meets otherwise, which asyncio allows, is that of a task it awaits.
    """
    return running_library() == "trio" or load_thread_loops().is_cancelled()


def is_in_notebook() -> bool:
    """Tell whether this is a notebook's process, whose cells block a running loop as they please.

    Example:
        >>> is_in_notebook()
        False
    """
    ipython = sys.modules.get("IPython")
    get_shell = getattr(ipython, "get_ipython", None)
    return getattr(get_shell and get_shell(), "kernel", None) is not None


@functools.cache
def load_thread_loops() -> Any:
    """Import `thread_loops.py` on its first use."""
    # Loads asyncio, which costs a third of the time that importing this package takes without it.
    with loading():
        from dspylite.runtime import thread_loops  # noqa: PLC0415

    return thread_loops


def start_thread(work: Callable[[], object], name: str) -> None:
    """Start a thread of ours: a daemon, which delays no exit and takes the loop it kept with it.

    Raises:
        RuntimeError: The system has no more threads.
    """

    def run() -> None:
        try:
            work()
        finally:
            end_kept_loop()

    threading.Thread(target=run, name=name, daemon=True).start()


def end_kept_loop() -> None:
    """Close the loop that this thread keeps, if it has one; threads of ours do so when they end."""
    # Missing, or not whole yet where another thread loads it: then this one keeps no loop.
    loops = sys.modules.get(f"{__package__}.thread_loops")
    if (end := getattr(loops, "end_thread_loop", None)) is not None:
        end()
