"""`streamify`: a program whose answers come while they are written.

The program runs as a task or thread of its own, with a copy of its caller's context, and a bounded
queue lies between it and its reader. Not here: who listens to what (`programs/listening.py`), and
streams over HTTP (`programs/sse.py`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Generator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, ParamSpec, overload

import anyio
from anyio.lowlevel import current_token

from dspylite.abc import Io
from dspylite.errors import CallCancelledError, InputFieldError, ModuleError
from dspylite.programs.base import Module
from dspylite.programs.listening import ProgramSink, StreamListener, bind_listeners
from dspylite.programs.stream_events import (
    StatusCallback,
    StatusMessageProvider,
    checked_provider,
)
from dspylite.runtime.cancellation import CANCELLATION, Cancellation, check_cancelled
from dspylite.runtime.channels import Channel
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.loops import (
    STANDING_STILL,
    is_cancelled,
    post_quietly,
    poster,
    running_library,
    start_task,
    start_thread,
)
from dspylite.runtime.settings import pin, settings
from dspylite.runtime.threads import InContext, carried_context

logger = logging.getLogger(__name__)

P = ParamSpec("P")

_ROOM = 16
"""Events that may wait for their reader before the program waits for it; DSPy's number."""

_Produce = Callable[[Io, Channel[Any]], Coroutine[Any, Any, None]]


@overload
def streamify(
    program: Callable[P, Any],
    status_message_provider: StatusMessageProvider | None = ...,
    stream_listeners: Sequence[StreamListener] | None = ...,
    include_final_prediction_in_output_stream: bool = ...,
    is_async_program: bool = ...,
    async_streaming: Literal[True] = ...,
) -> Callable[P, AsyncGenerator[Any, None]]: ...


@overload
def streamify(
    program: Callable[P, Any],
    status_message_provider: StatusMessageProvider | None = ...,
    stream_listeners: Sequence[StreamListener] | None = ...,
    include_final_prediction_in_output_stream: bool = ...,
    is_async_program: bool = ...,
    *,
    async_streaming: Literal[False],
) -> Callable[P, Generator[Any, None, None]]: ...


def streamify(
    program: Callable[P, Any],
    status_message_provider: StatusMessageProvider | None = None,
    stream_listeners: Sequence[StreamListener] | None = None,
    include_final_prediction_in_output_stream: bool = True,
    is_async_program: bool = False,
    async_streaming: bool = True,
) -> Callable[P, Any]:
    """Return a function that runs a program and gives what it says while it runs.

    Its iterator gives `StatusMessage`s, a `StreamResponse` for each new piece of an output that a
    listener asks for, what the program sends itself, and at last its result. Without listeners it
    gives the pieces of the predictors' answers (`LMDelta`). A failure is raised where the iterator
    stands, after what came before it.

    The program sees the context in which the function was called, wherever it is read; its settings
    are fixed at that moment. It starts with the first step, and waits where its reader is slow.
    Leaving the iterator, by `break`, `close()` or `aclose()`, stops the program: its calls are
    broken off and no further one is made.

    Args:
        program: A module, or a function, sync or async. A module is awaited as by `acall`.
        status_message_provider: Words the status messages. None: tool calls are told.
        stream_listeners: Which outputs are wanted. None: all pieces of all answers.
        include_final_prediction_in_output_stream: Whether the result comes too, where the listeners
            heard something; where they did not, or there are none, it always comes.
        is_async_program: Whether to call `program.acall` of an object that is no module; an async
            function and an async module are known by themselves.
        async_streaming: Whether to give an async iterator, for asyncio and trio. Else a sync one,
            whose program runs in a thread.

    Raises:
        SignatureError: A listener's output or predictor does not exist, or is not the only one.
        ModuleError: `program` cannot be called, or `status_message_provider` is none.

    Example:
        >>> from dspylite.models.lm import OfflineLM
        >>> from dspylite.programs.predict import Predict
        >>> ask = streamify(
        ...     Predict("context, question -> answer"),
        ...     stream_listeners=[StreamListener("answer")],
        ...     async_streaming=False,
        ... )
        >>> with settings.context(lm=OfflineLM()):
        ...     events = ask(context="The Nile flows north.", question="Where does it flow?")
        >>> [type(event).__name__ for event in events]
        ['StreamResponse', 'Prediction']
    """
    if not callable(program):
        raise ModuleError(f"`streamify` takes a module or a function, not {program!r}.")
    listeners = bind_listeners(program, stream_listeners or ())
    provider = checked_provider(status_message_provider)
    call: Callable[..., Any] = getattr(program, "acall", program) if is_async_program else program

    def streamed(*args: P.args, **kwargs: P.kwargs) -> Any:
        values = settings.copy()

        async def produce(io: Io, channel: Channel[Any]) -> None:
            sink = ProgramSink(channel, listeners)
            callbacks = (*values["callbacks"], StatusCallback(provider, sink))
            pin({**values, "send_stream": sink, "callbacks": callbacks})
            if isinstance(program, Module):
                result = await program.plan(io, args, kwargs)
            else:
                result = await io.any(call, *args, **kwargs)
            if include_final_prediction_in_output_stream or not sink.has_spoken:
                await io.call(sink.put, result)

        production = _Production(produce)
        return _AsyncStream(production) if async_streaming else _Stream(production)

    try:
        functools.update_wrapper(streamed, program)
    except (AttributeError, TypeError):
        pass  # a module has no name and docstring of its own to take over
    return streamed


def apply_sync_streaming(async_generator: AsyncIterable[Any]) -> Generator[Any, None, None]:
    """Return a sync iterator over an async one, which is read by a thread of its own.

    It sees the context in which this function was called. Leaving the sync iterator closes the
    async one.

    Args:
        async_generator: Any async iterable, such as that of a streamed program.

    Raises:
        InputFieldError: It is none.
    """
    if not isinstance(async_generator, AsyncIterable):
        raise InputFieldError(
            f"`apply_sync_streaming` takes an async iterable, not {async_generator!r}."
        )

    async def read(channel: Channel[Any]) -> None:
        try:
            async for item in async_generator:
                await channel.aput(item)
        finally:
            if close := getattr(async_generator, "aclose", None):
                await close()

    async def produce(io: Io, channel: Channel[Any]) -> None:
        reading: Callable[..., Any] = read
        await io.any(reading, channel)

    return _Stream(_Production(produce))


class _Production:
    """The side of a stream that makes its items; it knows nothing of who reads them.

    Args:
        produce: Makes the items, and ends with the last one.
    """

    def __init__(self, produce: _Produce) -> None:
        self.channel = Channel[Any](_ROOM)
        self._produce = produce
        self._context = carried_context()
        self._flag: Cancellation | None = None
        self._starts = [True]
        self._is_left = False
        self._loop: Any = None  # on which it runs as a task

    def start_thread(self) -> None:
        """Start on a thread of its own, unless it has started."""
        if not self._may_start():
            return
        if running_library() is not None:  # it stands still while the reader waits for an item
            still = STANDING_STILL.get() | {threading.get_ident()}
            self._context.run(STANDING_STILL.set, still)
        run = partial(self._context.run, self._run_here)
        start_thread(run, "dspylite-stream")

    def start_task(self) -> None:
        """Start as a task of the running event loop, unless it has started."""
        if self._may_start():
            self._loop = current_token().native_token
            start_task(self._run_on_loop)

    async def next_of_task(self) -> tuple[Any] | tuple[()]:
        """Await the next item; where the loop of the task was closed over it, none will come."""
        is_closed = getattr(self._loop, "is_closed", None)  # trio's loops end all that is in them
        if is_closed is not None and is_closed():
            self._end(CallCancelledError("Cancelled: the event loop of the program ended."))
        return await self.channel.aget()

    def _may_start(self) -> bool:
        try:
            self._starts.pop()  # one of several readers wins, without a lock
        except IndexError:
            return False
        self._flag = Cancellation(self._context.run(CANCELLATION.get))
        self._context.run(CANCELLATION.set, self._flag)
        if self._is_left:  # by another thread, which saw no flag yet
            self.stop()
        return True

    def stop(self) -> None:
        """Tell it to stop, from whatever thread; nothing happens where it has ended."""
        self._is_left = True
        self._starts.clear()
        if self._flag is not None:
            self._flag.cancel("the reader of the stream left")

    def stop_aside(self) -> None:
        """Tell it to stop from a finaliser, whose thread may hold a lock that this needs."""
        if self._flag is None:
            return
        try:
            threading.Thread(target=self.stop, daemon=True).start()
        except RuntimeError:
            pass  # the interpreter ends, and its threads with it

    def _run_here(self) -> None:
        try:
            check_cancelled()
            run_flow(self._produce(BLOCKING, self.channel))
        except BaseException as error:  # noqa: BLE001  # handed to the reader, who raises it
            self._end(error)
        else:
            self._end(None)

    async def _run_on_loop(self) -> None:
        flag = self._flag
        assert flag is not None  # set by whoever started this
        error: BaseException | None = None
        try:
            with anyio.CancelScope() as scope:
                handle = flag.watch(partial(post_quietly, poster(), scope.cancel))
                try:
                    flag.check()
                    await InContext(self._produce(ASYNC, self.channel), self._context)
                finally:
                    flag.unwatch(handle)
            if scope.cancelled_caught:
                flag.check()
        except Exception as caught:  # noqa: BLE001  # handed to the reader, who raises it
            error = caught
        except BaseException as caught:
            error = caught
            if isinstance(caught, anyio.get_cancelled_exc_class()):
                if not is_cancelled():  # the program awaited a task that was cancelled
                    return
                error = CallCancelledError("Cancelled: the event loop of the program ended.")
                raise
        finally:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if self._flag is not None:
            self._flag.close()
        if isinstance(error, StopIteration | StopAsyncIteration):  # it would pass for the end
            stopped, error = error, RuntimeError(f"the program raised {type(error).__name__}")
            error.__cause__ = stopped
        self.channel.end(error)


class _Stream(Generator[Any, None, None]):
    """What a streamed program says, for `for`; see `streamify`."""

    def __init__(self, production: _Production) -> None:
        self._production = production
        self._is_over = False

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        try:
            self._production.start_thread()
            taken = self._production.channel.get()
        except BaseException:
            self.close()
            raise
        if not taken:
            self._is_over = True
            raise StopIteration
        return taken[0]

    def send(self, value: Any, /) -> Any:
        """Do as `next`: the program takes no values."""
        del value
        return next(self)

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> Any:
        """Stop the program, and raise."""
        self.close()
        raise _made(typ, val, tb)

    def close(self) -> None:
        """Stop the program; its thread may take a moment to end."""
        self._is_over = True
        self._production.stop()

    def __del__(self) -> None:
        """Stop the program that nobody reads any more."""
        if not getattr(self, "_is_over", True):
            self._production.stop_aside()


class _AsyncStream(AsyncGenerator[Any, None]):
    """What a streamed program says, for `async for`; see `streamify`."""

    def __init__(self, production: _Production) -> None:
        self._production = production
        self._is_started = self._is_over = False

    async def __anext__(self) -> Any:
        if self._is_over:
            raise StopAsyncIteration
        self._is_started = True
        try:
            self._production.start_task()
            taken = await self._production.next_of_task()
        except BaseException:
            self._stop()
            raise
        if not taken:
            self._is_over = True
            raise StopAsyncIteration
        return taken[0]

    async def asend(self, value: Any, /) -> Any:
        """Do as `anext`: the program takes no values."""
        del value
        return await self.__anext__()

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> Any:
        """Stop the program, and raise."""
        await self.aclose()
        raise _made(typ, val, tb)

    def _stop(self) -> None:
        self._is_over = True
        self._production.stop()

    async def aclose(self) -> None:
        """Stop the program, and wait for its task; a thread of it may take a moment longer."""
        if self._is_over:
            return
        self._stop()
        if self._is_started:
            try:
                while await self._production.next_of_task():
                    pass
            except Exception as error:  # noqa: BLE001  # nobody asked for it; most say "cancelled"
                logger.debug("a stream that was left ended with %s", type(error).__name__)

    def __del__(self) -> None:
        """Stop the program that nobody reads any more."""
        if not getattr(self, "_is_over", True):
            self._production.stop_aside()


def _made(typ: Any, val: Any, tb: TracebackType | None) -> BaseException:
    """Return the exception that `throw` was given, in its old form with a type too."""
    error: BaseException = val if val is not None else typ() if isinstance(typ, type) else typ
    return error if tb is None else error.with_traceback(tb)
