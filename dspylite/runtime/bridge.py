"""An async function called from sync code; sync ones side by side, or for a limited time.

No event loop is ever patched. Not here: a sync function awaited (`runtime/workers.py`), carrying
the context between threads of one's own (`runtime/threads.py`), and the drivers that use these
crossings (`runtime/flow.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from dspylite.errors import CallCancelledError
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.loops import (
    load_thread_loops,
    running_library,
    standing_still,
    start_thread,
)
from dspylite.runtime.threads import carried_context

P = ParamSpec("P")
T = TypeVar("T")
X = TypeVar("X")


def call_async(fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run an async function to its end from sync code and return its result.

    On a thread without a running event loop it runs on that thread, in a loop that the thread keeps
    for such calls. Inside a running loop (a notebook, say) it runs on a helper thread while this
    one waits, so the running loop stands still meanwhile; `await` it instead where that matters.
    Either way it sees the caller's context.
    """
    call = partial(fn, *args, **kwargs)
    run = load_thread_loops().run_on_thread_loop
    if running_library() is None:
        return cast("T", run(call))
    with standing_still():
        return cast("T", _await_helper(partial(run, call), None))


def call_within(seconds: float, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a sync function that cannot be told to hurry, and wait no longer than so many seconds.

    It runs on a thread of its own, in a copy of the caller's context. Where the time is up, the
    thread is left behind; it is a daemon, so it keeps no process from ending.

    Raises:
        TimeoutError: The time is up.
    """
    return _await_helper(partial(fn, *args, **kwargs), max(0.0, seconds))


def map_on_threads(fn: Callable[[X], T], items: Sequence[X], width: int) -> list[T]:
    """Call a sync function for each item, on so many threads, each call in a copy of the context.

    The first failure ends the work: calls under way are told by their flag, and waited for. Nothing
    is waited for where this thread itself is interrupted; the others are daemons, so what they hang
    in delays nobody.

    Returns:
        The results, in the order of the items.
    """
    with Cancellation(CANCELLATION.get()) as flag:
        results: list[Future[T]] = [Future() for _ in items]
        waiting = iter(zip(results, items, strict=True))  # one step of it is one operation
        context = carried_context()

        def one(item: X) -> T:
            flag.check()
            return context.copy().run(fn, item)

        def work() -> None:
            for result, item in waiting:
                deliver(result, partial(one, item))

        try:
            for place in range(width):
                try:
                    start_thread(work, "dspylite-map")
                except RuntimeError:  # the system has no more threads
                    if not place:
                        raise
                    break
            wait(results, return_when=FIRST_EXCEPTION)
            failed = (each for each in results if each.done() and each.exception() is not None)
            for each in failed:
                each.result()  # which raises it
            return [result.result() for result in results]
        except Exception:
            flag.cancel("another part of the same call failed")
            wait(results)
            raise
        finally:
            flag.cancel("nobody waits for it any more")


def _await_helper(work: Callable[[], T], seconds: float | None) -> T:
    """Run a function on a thread of its own; leave it behind when the time or our work is up."""
    result: Future[T] = Future()
    outer = CANCELLATION.get()
    with Cancellation(outer) as flag:
        target = partial(deliver, result, partial(carried_context().run, work))
        handle = None if outer is None else outer.watch(partial(_give_up, result, outer))
        try:
            start_thread(target, "dspylite-helper")  # Ctrl-C may come in here, too
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


def deliver(result: Future[Any], work: Callable[[], Any]) -> None:
    """Run a function and hand what becomes of it to the thread or task that waits for it."""
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


def came_from_thread(error: BaseException) -> bool:
    """Tell whether an exception was raised on a thread of ours and only handed over."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code is deliver.__code__:
            return True
        step = step.tb_next
    return False
