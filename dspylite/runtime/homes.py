"""An async function that works in one event loop only, called from threads and other loops.

For what is tied to the loop that it was opened in, such as the session of a protocol. Not here:
functions that work in any loop (`runtime/bridge.py`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import current_token

from dspylite.errors import FlowError
from dspylite.runtime.cancellation import CANCELLATION, check_cancelled
from dspylite.runtime.clock import CLOCK, deadline_error, time_left
from dspylite.runtime.loops import (
    STANDING_STILL,
    Post,
    post_quietly,
    poster,
    poster_of,
    running_library,
    start_task,
)
from dspylite.runtime.threads import carried_context

T = TypeVar("T")

_LOOK_EVERY_S = 1.0
"""How soon those who wait see that the loop has ended without a word; guessed."""


class LoopHome:
    """The event loop in which something lives that works in no other.

    A function called through it always runs in that loop, as a task of its own with the context of
    the caller, who waits for it, cancels it when cancelled, and is told where it would wait for
    ever. Made inside a loop it is that loop's;
    made outside of any it becomes that of the first loop that awaits it.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._thread: int | None = None
        self._token: weakref.ref[Any] | None = None
        self._lock = threading.Lock()  # guards the two above while they are set
        if running_library() is not None:
            self._settle()

    def _settle(self) -> None:
        with self._lock:
            if self._token is None:
                self._thread = threading.get_ident()
                self._token = weakref.ref(current_token().native_token)

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run the function in its loop while this thread waits.

        Raises:
            FlowError: The loop has ended, or stands still until this thread is done.
            DeadlineExceededError: The time of the call is up.
            CallCancelledError: This work was told to stop.
        """
        if self._token is None:
            raise FlowError(
                "This works in one event loop only, and was made outside of any, so nobody knows "
                "where that is. Make it inside of the loop, or await it there: `acall`."
            )
        post = self._post(threading.get_ident())
        visit = _Visit(work)
        changed = threading.Event()
        flag = CANCELLATION.get()
        handle = flag and flag.watch(changed.set)
        try:
            visit.start(post, changed.set)
            while not visit.result.done():
                check_cancelled()
                left = time_left()
                if left is not None and left <= 0:
                    raise deadline_error("another event loop worked on it")
                self._check_running()
                CLOCK.get().wait(changed, _LOOK_EVERY_S if left is None else min(left, 1.0))
                changed.clear()
        finally:
            if flag is not None:
                flag.unwatch(handle)
            visit.leave(post)
        return visit.result.result()

    async def acall(self, work: Callable[[], Awaitable[T]]) -> T:
        """Await the function: right here if this is its loop, else there.

        Raises:
            FlowError: The loop has ended, or stands still until this one is done.
        """
        self._settle()
        if self._loop() is current_token().native_token:
            return await work()
        post, mine = self._post(None), poster()
        visit = _Visit(work)
        ended = anyio.Event()
        visit.start(post, partial(post_quietly, mine, ended.set))
        try:
            while not visit.result.done():
                self._check_running()
                with anyio.move_on_after(_LOOK_EVERY_S):
                    await ended.wait()
        finally:
            visit.leave(post)
        return visit.result.result()

    def _loop(self) -> Any:
        return None if self._token is None else self._token()

    def _post(self, asking: int | None) -> Post:
        self._check_running()
        if self._thread == asking or self._thread in STANDING_STILL.get():
            raise FlowError(
                "This works in the event loop of this thread only, and the loop stands still until "
                "this call returns. Await the program instead: `await program.acall(...)`."
            )
        return poster_of(self._loop())

    def _check_running(self) -> None:
        loop = self._loop()
        is_running = getattr(loop, "is_running", None)  # trio's tasks are cancelled at its end
        if loop is None or os.getpid() != self._pid or (is_running and not is_running()):
            raise _gone()

    def __reduce__(self) -> Any:
        """Refuse: another process has no such loop."""
        raise TypeError(
            "what is tied to an event loop, such as a tool of an MCP session, cannot be pickled; "
            "open the session and make the tool in the other process"
        )


def _gone() -> FlowError:
    return FlowError(
        "The event loop that this works in has ended, or is not running in this process; open what "
        "it needs anew, inside the loop that is to use it."
    )


class _Visit(Generic[T]):
    """One call of a function in another event loop."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self.result: Future[T] = Future()
        self._work = work
        self._scope: anyio.CancelScope | None = None  # made and cancelled in the loop itself
        self._is_left = False

    def start(self, post: Post, tell: Callable[[], object]) -> None:
        """Have the loop start it; `tell` is called, in that loop, when there is a result."""
        self._tell = tell
        try:
            post(partial(carried_context().run, self._begin))
        except RuntimeError as error:
            raise _gone() from error

    def _begin(self) -> None:
        start_task(self._run)

    def leave(self, post: Post) -> None:
        """Cancel it, where it still runs."""
        if not self.result.done():
            self._is_left = True
            post_quietly(post, self._cancel)

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def _run(self) -> None:
        with anyio.CancelScope() as self._scope:
            if self._is_left:
                return
            try:
                value = await self._work()
            except Exception as error:  # noqa: BLE001  # handed to the caller, who raises it
                self._set(partial(self.result.set_exception, error))
            except BaseException:  # cancelled, by us or with the loop
                self._set(partial(self.result.set_exception, _gone()))
                raise
            else:
                self._set(partial(self.result.set_result, value))

    def _set(self, set_: Callable[[], None]) -> None:
        try:
            set_()
        except InvalidStateError:
            return
        self._tell()
