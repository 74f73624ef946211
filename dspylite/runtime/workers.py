"""A sync function awaited: the worker threads of an event loop, and their places.

Not here: the other way round, an async function called (`runtime/bridge.py`).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar, current_token

from dspylite.runtime.bridge import deliver
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.loops import Post, post_quietly, poster_of, start_thread
from dspylite.runtime.settings import settings
from dspylite.runtime.threads import carried_context

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_WORKERS = 40
"""Threads of one event loop; must match anyio's own default, which people size servers by."""

ON_DAEMONS: ContextVar[bool] = ContextVar("dspylite_on_daemons", default=False)
"""Whether sync functions run on threads that keep no process from ending.

anyio's workers on asyncio do keep it: after Ctrl-C the process waits for a function that does not
look at its flag. They are needed where the function calls back by `anyio.from_thread`, as programs
do that somebody made async; the items of a batch have no loop to call back to."""

_ALONE = nullcontext()
_LOOP: RunVar[_Loop] = RunVar("dspylite_loop")
_HELD: ContextVar[_Handover | None] = ContextVar("dspylite_held_worker", default=None)


class _Loop:
    """What one event loop needs for its worker threads; never shared with another loop."""

    __slots__ = ("_limiters", "_token", "unlimited")

    def __init__(self) -> None:
        self._limiters: dict[int, anyio.CapacityLimiter] = {}
        self.unlimited = anyio.CapacityLimiter(math.inf)
        # Weak, because a `RunVar` keeps this object as long as there is the loop: for ever, else.
        self._token = weakref.ref(current_token().native_token)

    @property
    def post(self) -> Post:
        """The loop's poster, for callers on the loop."""
        return poster_of(self._token())

    def limiter(self) -> anyio.CapacityLimiter:
        """Return the limiter of the current width, or one that the caller's own slot lends."""
        width = settings.async_max_workers or DEFAULT_WORKERS
        limiter = self._limiters.get(width)
        if limiter is None:
            limiter = self._limiters[width] = anyio.CapacityLimiter(width)
        held = _HELD.get()
        if held is not None and limiter.available_tokens < 1:
            return held.lend(limiter)
        return limiter


def _loop() -> _Loop:
    try:
        return _LOOP.get()
    except LookupError:
        made = _Loop()
        _LOOP.set(made)
        return made


class _Handover:
    """A function on its way through a worker thread, and the place it takes there.

    The place is given back when the function has ended, not when its caller stops waiting for it:
    else more threads would run than there are places.
    """

    __slots__ = (
        "_args", "_ended", "_flag", "_fn", "_given_up", "_kwargs", "_lent", "_limiter", "_lock",
        "_place", "_post", "_started",
    )  # fmt: skip

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], loop: _Loop
    ) -> None:
        self._fn = fn
        self._args = args
        self._kwargs = kwargs
        self._post = loop.post
        self._limiter = loop.limiter()
        # Taken in our name: where the loop ends before the thread, the limiter keeps it for ever,
        # and would keep the loop by us.
        self._place = object()
        self._lent: dict[object, anyio.CapacityLimiter] | None = None
        self._lock = threading.Lock()  # guards the three below; nothing is called while it is held
        self._started = self._ended = self._given_up = False
        self._flag: Cancellation

    async def take_place(self) -> None:
        """Wait for a place."""
        try:
            self._limiter.acquire_on_behalf_of_nowait(self._place)
        except anyio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(self._place)
        self._flag = Cancellation(CANCELLATION.get())

    def lend(self, limiter: anyio.CapacityLimiter) -> anyio.CapacityLimiter:
        """Return the limiter for calls that the function itself makes while no place is free.

        One more thread may run for them while the function's own thread waits; without that, a
        nested call at full width would wait for its own caller.
        """
        if self._lent is None:
            self._lent = {}
        return self._lent.setdefault(limiter, anyio.CapacityLimiter(1))

    def on_thread(self) -> tuple[Any] | None:
        """Run the function; the result is boxed, because trio refuses one that is a coroutine."""
        with self._lock:
            if self._given_up:  # nobody waits any more, and the place is another's
                return None
            self._started = True
        # anyio runs this in a copy of the caller's context, which ends with the call.
        _HELD.set(self)
        CANCELLATION.set(self._flag)
        try:
            return (self._fn(*self._args, **self._kwargs),)
        finally:
            self._leave_thread()

    def _leave_thread(self) -> None:
        with self._lock:
            self._ended = True
            given_up = self._given_up
        if given_up:
            post_quietly(self._post, self._give_place_back)

    def end(self) -> None:
        """Stop waiting, because the function has ended or because the caller must not wait."""
        with self._lock:
            self._given_up = True
            is_running = self._started and not self._ended
        if is_running:
            self._flag.cancel("the task that awaited it was cancelled")
        else:
            self._give_place_back()
        self._flag.close()

    def _give_place_back(self) -> None:
        self._limiter.release_on_behalf_of(self._place)


def holds_worker() -> bool:
    """Tell whether this work takes a place among the worker threads of an event loop.

    Whoever waits there for a task may wait for ever: the task may be waiting for a place.
    """
    return _HELD.get() is not None


async def call_in_thread(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a sync function in a worker thread, in a copy of the caller's context, and await it.

    At most `settings.async_max_workers` (40) run at once per event loop; a function that is itself
    run by one and comes back here is never blocked by its own slot. A cancelled caller waits no
    longer; the function is told by its flag to stop (`runtime/cancellation.py`), and keeps its slot
    until it does.
    """
    return cast("T", await hand_over(fn, args, kwargs, on_daemon=ON_DAEMONS.get()))


async def open_in_thread(
    fn: Callable[P, T], close: Callable[[T], object], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a function that opens something, as `call_in_thread` does.

    Args:
        fn: The function.
        close: Closes what it opened, where the caller was cancelled and never gets it.
        *args: For the function.
        **kwargs: For the function.
    """
    opened: list[T] = []
    is_gone = False

    def close_unwanted() -> None:
        try:
            unwanted = opened.pop()
        except IndexError:  # it is not open yet, or the other side closes it
            return
        close(unwanted)

    def run() -> T:
        made = fn(*args, **kwargs)
        opened.append(made)
        if is_gone:
            close_unwanted()
        return made

    try:
        return await call_in_thread(run)
    except BaseException:
        is_gone = True
        close_unwanted()
        raise


async def hand_over(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, on_daemon: bool
) -> Any:
    """Run a sync function as `call_in_thread` does.

    Args:
        fn: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        on_daemon: Whether its thread keeps no process from ending; such a one cannot call back by
            `anyio.from_thread`.
    """
    loop = _loop()
    handover = _Handover(fn, args, kwargs, loop)
    with _ALONE if _HELD.get() is None else _heeding_flag(loop.post):
        await handover.take_place()
        try:
            if on_daemon:
                boxed = await _on_daemon(handover.on_thread, loop)
            else:
                # The places are counted above; anyio's own count would end with the waiting.
                boxed = await anyio.to_thread.run_sync(
                    handover.on_thread, abandon_on_cancel=True, limiter=loop.unlimited
                )
        finally:
            handover.end()
    (result,) = cast("tuple[Any]", boxed)  # a caller that still waits has a result
    return result


@contextmanager
def _heeding_flag(post: Post) -> Generator[None, None, None]:
    """Cancel this task, which a worker thread has started, when the thread is told to stop.

    On asyncio, anyio does not where the thread's own caller has gone already: its next checkpoint
    would turn in circles for ever, and the thread would never end.

    Raises:
        CallCancelledError: The thread was told to stop.
    """
    flag = CANCELLATION.get()
    if flag is None:
        yield
        return
    flag.check()
    with anyio.CancelScope() as scope:
        handle = flag.watch(partial(post_quietly, post, scope.cancel))
        try:
            yield
        finally:
            flag.unwatch(handle)
    flag.check()


async def _on_daemon(work: Callable[[], T], loop: _Loop) -> T:
    result: Future[T] = Future()
    ended, post = anyio.Event(), loop.post
    work = partial(carried_context().run, work)

    def run() -> None:
        deliver(result, work)
        post_quietly(post, ended.set)

    start_thread(run, "dspylite-worker")
    await ended.wait()
    return result.result()
