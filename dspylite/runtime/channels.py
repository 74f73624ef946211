"""A bounded queue between threads and tasks: whoever writes waits for the one who reads.

Each side may be a thread or a task of any event loop. Not here: who writes and who reads
(`programs/streaming.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

import anyio

from dspylite.runtime.cancellation import CANCELLATION, check_cancelled
from dspylite.runtime.loops import post_quietly, poster, running_library

T = TypeVar("T")
_Wake = Callable[[], object]


class Channel(Generic[T]):
    """Items on their way from any number of writers to one reader, each writer's in its order.

    Waiting ends with an error where the flag of the waiting work is raised.

    Args:
        size: Items that may wait to be read before writers wait too, at least 1.

    Example:
        >>> channel = Channel(2)
        >>> channel.put("a")
        >>> channel.end()
        >>> channel.get(), channel.get()
        (('a',), ())
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()  # guards all below; nobody is woken while it is held
        self._items: deque[T] = deque()
        self._readers: deque[_Wake] = deque()
        self._writers: deque[_Wake] = deque()
        self._is_ended = False
        self._error: BaseException | None = None

    def put_now(self, item: T) -> None:
        """Add an item without waiting, also where the channel is full; not after its end."""
        with self._lock:
            if not self._is_ended:
                self._items.append(item)
            reader = self._readers.popleft() if self._readers else None
        _wake(reader)

    def put(self, item: T) -> None:
        """Add an item, when there is room for it.

        On the thread of a running event loop it never waits: the reader may be one of its tasks.

        Raises:
            CallCancelledError: The work that writes was told to stop.
        """
        if running_library() is not None:
            check_cancelled()
            self.put_now(item)
            return
        while True:
            check_cancelled()
            changed = threading.Event()
            if self._has_put(item, changed.set):
                return
            with self._waiting(self._writers, changed.set):
                changed.wait()

    async def aput(self, item: T) -> None:
        """Add an item, when there is room for it; otherwise as `put`."""
        while True:
            check_cancelled()
            changed = anyio.Event()
            wake = partial(post_quietly, poster(), changed.set)
            if self._has_put(item, wake):
                return
            with self._waiting(self._writers, wake):
                await changed.wait()

    def get(self) -> tuple[T] | tuple[()]:
        """Wait for the next item; empty after the last.

        Raises:
            CallCancelledError: The work that reads was told to stop.
            BaseException: What the channel was ended with; once, after the last item.
        """
        while True:
            changed = threading.Event()
            taken = self._taken(changed.set)
            if taken is not None:
                return taken
            check_cancelled()
            with self._waiting(self._readers, changed.set):
                changed.wait()

    async def aget(self) -> tuple[T] | tuple[()]:
        """Await the next item; otherwise as `get`."""
        while True:
            changed = anyio.Event()
            wake = partial(post_quietly, poster(), changed.set)
            taken = self._taken(wake)
            if taken is not None:
                return taken
            check_cancelled()
            with self._waiting(self._readers, wake):
                await changed.wait()

    def end(self, error: BaseException | None = None) -> None:
        """Let nothing more come; a repeat does nothing.

        Args:
            error: Raised to the reader after the last item.
        """
        with self._lock:
            if not self._is_ended:
                self._is_ended = True
                self._error = error
            # Writers too: what they say now is heard by nobody.
            waiting = [*self._readers, *self._writers]
            self._readers.clear()
            self._writers.clear()
        for each in waiting:
            _wake(each)

    def _has_put(self, item: T, wake: _Wake) -> bool:
        """Add an item if there is room, else note whom to wake when there is."""
        with self._lock:
            if self._is_ended:
                return True
            if len(self._items) >= self._size:
                self._writers.append(wake)
                return False
            self._items.append(item)
            reader = self._readers.popleft() if self._readers else None
        _wake(reader)
        return True

    def _taken(self, wake: _Wake) -> tuple[T] | tuple[()] | None:
        """Take an item if there is one, else note whom to wake when there is."""
        with self._lock:
            if not self._items:
                if not self._is_ended:
                    self._readers.append(wake)
                    return None
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return ()
            item = self._items.popleft()
        self._let_write()
        return (item,)

    def _let_write(self) -> None:
        """Wake a writer for each free place."""
        with self._lock:
            free = max(0, self._size - len(self._items))
            woken = [self._writers.popleft() for _ in range(min(free, len(self._writers)))]
        for writer in woken:
            _wake(writer)

    @contextmanager
    def _waiting(self, queue: deque[_Wake], wake: _Wake) -> Generator[None, None, None]:
        """Be woken by the flag too; whoever then leaves passes on what it was woken for."""
        flag = CANCELLATION.get()
        handle = None if flag is None else flag.watch(wake)
        try:
            yield
        finally:
            if flag is not None:
                flag.unwatch(handle)
            with self._lock:
                if wake in queue:
                    queue.remove(wake)
            if queue is self._writers:
                self._let_write()


def _wake(who: _Wake | None) -> None:
    if who is not None:
        who()
