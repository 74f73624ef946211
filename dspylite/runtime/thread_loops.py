"""An event loop for each thread that runs async code without being in a loop.

And tasks of asyncio's own loops that nobody awaits. The only file of the runtime that imports
asyncio. Not here: when such a loop or task is needed (`runtime/bridge.py`, `runtime/loops.py`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from dspylite.runtime.cancellation import CANCELLATION

T = TypeVar("T")


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
        loop = self._loop
        task = loop.create_task(_await(fn))
        flag = CANCELLATION.get()

        def stop() -> None:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                pass  # it has ended just now, and its thread with it

        handle = flag and flag.watch(stop)
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            if flag is not None:
                flag.check()
            raise
        finally:  # also after KeyboardInterrupt: nothing stays behind for the next call
            if flag is not None:
                flag.unwatch(handle)
            self._cancel_rest()

    def _cancel_rest(self) -> None:
        if rest := asyncio.all_tasks(self._loop):
            for task in rest:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))

    def end(self) -> None:
        if self.usable() and not self._loop.is_running():
            # By it the sessions that live as long as their loop hear that it ends.
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def __del__(self) -> None:
        if self.usable() and not self._loop.is_running():
            self._loop.close()


async def _await(fn: Callable[..., Awaitable[T]]) -> T:
    return await fn()


_LOCAL = threading.local()
_INHERITED: list[_ThreadLoop] = []
"""Loops of a parent process: closing one would take the parent's sockets out of its selector."""


def run_on_thread_loop(fn: Callable[..., Awaitable[T]]) -> T:
    """Run an async function to its end on this thread, in the loop that the thread keeps."""
    loop: _ThreadLoop | None = getattr(_LOCAL, "loop", None)
    if loop is None or not loop.usable():
        if loop is not None:
            _INHERITED.append(loop)
        loop = _LOCAL.loop = _ThreadLoop()
    return loop.run(fn)


def end_thread_loop() -> None:
    """Close the loop that this thread keeps, if it has one, with what was opened in it.

    For threads of ours that end. Threads of others close it with themselves, and what was opened in
    it when the next loop opens something.
    """
    loop: _ThreadLoop | None = vars(_LOCAL).pop("loop", None)
    if loop is not None:
        loop.end()


_TASKS: set[asyncio.Task[None]] = set()
"""Those that run; an event loop itself holds its tasks weakly only."""


def start_task(plan: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Start a task of the running loop that nobody awaits."""
    task = asyncio.get_running_loop().create_task(plan())
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


def is_cancelled() -> bool:
    """Tell whether the running task was told to stop, by itself or with a scope around it."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
