"""Carries the caller's context into threads.

By `bind`, `bind_iter`, `ThreadPoolExecutor`, `propagate_to_threads`.
Every task gets its own full copy of the context, so that the user's own ContextVars and tracing
spans travel with the settings, and nothing one task sets is seen by the next. Not here: crossing
between threads and event loops (`runtime/workers.py`, `runtime/bridge.py`).
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import sys
import threading
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from contextvars import Context, copy_context
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast, overload

from dspylite.errors import InputFieldError

P = ParamSpec("P")
T = TypeVar("T")


def carried_context() -> Context:
    """Return a copy of this context for another thread or loop to run in.

    The note that sniffio keeps of the running event loop stays behind: in another thread it would
    make anyio take that thread for one of this loop.
    """
    context = copy_context()
    if sniffio := sys.modules.get("sniffio"):
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


class InContext(Awaitable[T]):
    """An awaitable whose every step runs in a given context, on whatever loop awaits it."""

    __slots__ = ("_awaitable", "_context")

    def __init__(self, awaitable: Awaitable[T], context: Context) -> None:
        self._awaitable = awaitable
        self._context = context

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._awaitable.__await__()
        send = getattr(steps, "send", None)
        throw = getattr(steps, "throw", None)
        sent: Any = None
        try:
            while True:
                if send is None:
                    waiting = self._context.run(next, steps)
                else:
                    waiting = self._context.run(send, sent)
                while True:
                    try:
                        sent = yield waiting
                        break
                    except BaseException as error:  # cancellation too belongs to the inner code
                        if throw is None:
                            raise
                        waiting = self._context.run(throw, error)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            if close := getattr(steps, "close", None):
                self._context.run(close)


def is_async(fn: Callable[..., Any]) -> bool:
    """Tell whether calling `fn` gives a coroutine: async functions, partials, callables of such."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.iscoroutinefunction(fn):
        return True
    return not inspect.isroutine(fn) and inspect.iscoroutinefunction(type(fn).__call__)


def bind(fn: Callable[P, T]) -> Callable[P, T]:
    """Return `fn` tied to the context of here and now, to be run by any thread, loop or pool.

    Each call runs in its own copy of that context. Works for sync and async functions.

    Example:
        >>> import threading
        >>> from dspylite.runtime.settings import context, settings
        >>> seen = []
        >>> with context(num_threads=3):
        ...     thread = threading.Thread(target=bind(lambda: seen.append(settings.num_threads)))
        >>> thread.start()
        >>> thread.join()
        >>> seen
        [3]
    """
    captured = carried_context()

    if is_async(fn):

        @functools.wraps(fn)
        async def bound_async(*args: P.args, **kwargs: P.kwargs) -> Any:
            context = captured.copy()
            coroutine: Any = context.run(fn, *args, **kwargs)
            return await InContext(coroutine, context)

        return cast("Callable[P, T]", bound_async)  # the T of an async function is a coroutine

    @functools.wraps(fn)
    def bound(*args: P.args, **kwargs: P.kwargs) -> T:
        return captured.copy().run(fn, *args, **kwargs)

    return bound


@overload
def bind_iter(iterable: AsyncIterable[T]) -> AsyncIterator[T]: ...


@overload
def bind_iter(iterable: Iterable[T]) -> Iterator[T]: ...


def bind_iter(iterable: Any) -> Any:
    """Return an iterator whose every step runs in one copy of the context of here and now.

    A framework that asks a generator for its chunks from changing threads and contexts (a streaming
    response, say) then gives every chunk the same settings. Closing it closes the inner iterator.

    Args:
        iterable: A generator, any other iterable, or an async one.

    Raises:
        InputFieldError: It is neither.
    """
    context = carried_context()
    if isinstance(iterable, AsyncIterable):
        return _bound_async_steps(iterable, context)
    if isinstance(iterable, Iterable):
        return _bound_steps(iterable, context)
    raise InputFieldError(f"`bind_iter` takes an iterable or an async iterable, not {iterable!r}.")


def _bound_steps(iterable: Iterable[T], context: Context) -> Iterator[T]:
    iterator = context.run(iter, iterable)
    end = cast("Any", object())
    try:
        while (item := context.run(next, iterator, end)) is not end:
            yield item
    finally:
        if close := getattr(iterator, "close", None):
            context.run(close)


async def _bound_async_steps(iterable: AsyncIterable[T], context: Context) -> AsyncIterator[T]:
    iterator = context.run(aiter, iterable)
    try:
        while True:
            try:
                item = await InContext(context.run(anext, iterator), context)
            except StopAsyncIteration:
                return
            yield item
    finally:
        if close := getattr(iterator, "aclose", None):
            await InContext(context.run(close), context)


class ThreadPoolExecutor(concurrent.futures.ThreadPoolExecutor):
    """The standard thread pool, whose tasks run in a copy of the context that submitted them.

    A drop-in replacement: parameters, futures and `map` are the standard ones.

    Example:
        >>> from dspylite.runtime.settings import context, settings
        >>> with ThreadPoolExecutor(2) as pool, context(num_threads=3):
        ...     list(pool.map(lambda _: settings.num_threads, range(2)))
        [3, 3]
    """

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Schedule `fn(*args, **kwargs)` in a copy of the caller's context."""
        run: Any = carried_context().run
        return super().submit(run, fn, *args, **kwargs)


class _Propagation:
    """The two patches of the standard library, and how many blocks want them.

    A patch that somebody else patched over in the meantime cannot be taken out; it then stays in
    place and passes calls through unchanged.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below; nothing is called while it is held
        self._users = 0
        self._submit: Any = None  # the standard methods while ours stand in their place
        self._start: Any = None

    def _submit_with_context(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def submit(pool: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            if not self._users:
                return original(pool, fn, *args, **kwargs)
            # An empty context: a worker started here must not keep the first caller's settings.
            return Context().run(original, pool, carried_context().run, fn, *args, **kwargs)

        return submit

    def _start_with_context(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def start(thread: threading.Thread) -> None:
            if self._users:
                run = functools.partial(carried_context().run, thread.run)
                thread.run = run  # type: ignore[method-assign]  # for this one thread
            original(thread)

        return start

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            pool, thread = concurrent.futures.ThreadPoolExecutor, threading.Thread
            if self._submit is None:
                self._submit = pool.submit
                pool.submit = self._submit_with_context(pool.submit)  # type: ignore[method-assign]  # the patch
            if self._start is None:
                self._start = thread.start
                thread.start = self._start_with_context(thread.start)  # type: ignore[method-assign]  # the patch

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            pool, thread = concurrent.futures.ThreadPoolExecutor, threading.Thread
            if self._submit and getattr(pool.submit, "__wrapped__", None) is self._submit:
                pool.submit = self._submit  # type: ignore[method-assign, assignment]  # the patch
                self._submit = None
            if self._start and getattr(thread.start, "__wrapped__", None) is self._start:
                thread.start = self._start  # type: ignore[method-assign, assignment]  # the patch
                self._start = None


_PROPAGATION = _Propagation()


class ThreadPropagation:
    """The handle of one `propagate_to_threads()`; `close()` or the end of a `with` undoes it."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open = True
        _PROPAGATION.acquire()

    def close(self) -> None:
        """Undo it; the standard classes are restored when the last handle is closed. Idempotent."""
        if self._open:
            self._open = False
            _PROPAGATION.release()

    def __enter__(self) -> ThreadPropagation:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def propagate_to_threads() -> ThreadPropagation:
    """Make plain `ThreadPoolExecutor`s and `threading.Thread`s carry the context, process-wide.

    For code that one cannot change to use `bind` or `dspylite.ThreadPoolExecutor`, such as a
    library that starts its own threads. It patches `submit` and `start` of the standard classes.

    Returns:
        A handle: close it, or use it in a `with` block, to restore the standard classes.

    Example:
        >>> import threading
        >>> from dspylite.runtime.settings import context, settings
        >>> seen = []
        >>> with propagate_to_threads(), context(num_threads=3):
        ...     thread = threading.Thread(target=lambda: seen.append(settings.num_threads))
        ...     thread.start()
        >>> thread.join()
        >>> seen
        [3]
    """
    return ThreadPropagation()
