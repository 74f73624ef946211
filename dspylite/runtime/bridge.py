"""Crosses between threads and event loops: a sync function awaited, an async function called.

No event loop is ever patched. Not here: carrying the context between threads of one's own
(`runtime/threads.py`), and the drivers that use these crossings (`runtime/flow.py`).
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar, current_token

from dspylite.errors import CallCancelledError
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.settings import settings
from dspylite.runtime.threads import carried_context

P = ParamSpec("P")
T = TypeVar("T")

Post = Callable[[Callable[[], object]], None]
"""Has a function called by an event loop, from any thread, and waits for nothing."""

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
        return _poster_of(self._token())

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
        _deliver(result, work)
        post_quietly(post, ended.set)

    threading.Thread(target=run, name="dspylite-worker", daemon=True).start()
    await ended.wait()
    return result.result()


def poster() -> Post:
    """Return a function that has another function called by this event loop, from any thread.

    It never waits: two loops that wait for each other stand still for ever. It raises RuntimeError
    where the loop has ended.
    """
    return _poster_of(current_token().native_token)


def _poster_of(token: Any) -> Post:
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
        _load_thread_loops().start_task(plan)


def is_cancelled() -> bool:
    """Tell whether the running task is told to stop.

    A cancellation that it meets otherwise, which asyncio allows, is that of a task it awaits.
    """
    return running_library() == "trio" or _load_thread_loops().is_cancelled()


def came_from_thread(error: BaseException) -> bool:
    """Tell whether an exception was raised on a thread of ours and only handed over."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code is _deliver.__code__:
            return True
        step = step.tb_next
    return False


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
    return cast("T", _await_helper(partial(run, call), None))


def call_within(seconds: float, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a sync function that cannot be told to hurry, and wait no longer than so many seconds.

    It runs on a thread of its own, in a copy of the caller's context. Where the time is up, the
    thread is left behind; it is a daemon, so it keeps no process from ending.

    Raises:
        TimeoutError: The time is up.
    """
    return _await_helper(partial(fn, *args, **kwargs), max(0.0, seconds))


def _await_helper(work: Callable[[], T], seconds: float | None) -> T:
    """Run a function on a thread of its own; leave it behind when the time or our work is up."""
    result: Future[T] = Future()
    outer = CANCELLATION.get()
    with Cancellation(outer) as flag:
        target = partial(_deliver, result, partial(carried_context().run, work))
        handle = None if outer is None else outer.watch(partial(_give_up, result, outer))
        try:
            threading.Thread(target=target, daemon=True).start()  # Ctrl-C may come in here, too
            return result.result(seconds)
        finally:
            if outer is not None:
                outer.unwatch(handle)
            if not result.done():
                flag.cancel("nobody waits for it any more")


def _give_up(result: Future[Any], flag: Cancellation) -> None:
    try:
        flag.check()
    except CallCancelledError as error:
        _settle(partial(result.set_exception, error))


def _deliver(result: Future[Any], work: Callable[[], Any]) -> None:
    try:
        value = work()
    except BaseException as error:  # noqa: BLE001  # handed to the waiting thread, which raises it
        _settle(partial(result.set_exception, error))
    else:
        _settle(partial(result.set_result, value))


def _settle(set_: Callable[[], None]) -> None:
    try:
        set_()
    except InvalidStateError:
        pass  # the waiting thread was told to stop at the same moment
