"""The engine that reaches every provider through litellm. The only file that imports it.

litellm's own retries are off: one request is one request. Not here: policies around a call
(`models/middleware.py`), and what its errors mean (`models/translate.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from dspylite.abc import Engine
from dspylite.errors import (
    DeadlineExceededError,
    LMConfigurationError,
    LMTimeoutError,
    MissingExtraError,
)
from dspylite.models.answers import check_texts, read_chat_response, read_responses_answer
from dspylite.models.deltas import Assembly
from dspylite.models.knowledge import Knowledge, knowledge_of_row
from dspylite.models.translate import secrets_of, shows_secret, translate_error
from dspylite.runtime.bridge import call_in_thread, call_within, running_library
from dspylite.runtime.clock import Deadline, deadline_error, time_left
from dspylite.schema.messages import LMDelta, LMRequest, LMResponse, Message, Usage

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 300.0
"""Longest wait for one answer unless the LM says otherwise; litellm's own default is 6,000 s."""

_LOAD_LOCK = threading.Lock()  # guards the first import: litellm imports itself in circles
_loaded: list[Any] = []


def load_litellm() -> Any:
    """Import litellm once, whatever thread asks first, and return the module.

    It is told to use the price list it ships instead of fetching one over the network, unless the
    user chose otherwise through `LITELLM_LOCAL_MODEL_COST_MAP`, and not to print advice.
    """
    if not _loaded:
        with _LOAD_LOCK:
            if not _loaded:
                os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
                import litellm  # noqa: PLC0415  # costs seconds, so on the first call only

                litellm.suppress_debug_info = True
                _loaded.append(litellm)
    return _loaded[0]


@functools.lru_cache(maxsize=1024)
def known_by_table(model: str) -> Knowledge:
    """Look up in litellm's own table what is known of a model; never asks the network.

    Nothing is known of models that are not in the table.
    """
    try:
        row = load_litellm().get_model_info(model)
    except Exception:  # noqa: BLE001  # an unknown model, whatever litellm raises for it
        return Knowledge()
    return knowledge_of_row(row)


@contextmanager
def border(arguments: Mapping[str, Any]) -> Generator[None, None, None]:
    """Let every failure of the block leave as one of ours."""
    handled = sys.exception()
    try:
        yield
    except Exception as error:  # the border: what a provider's library raises is translated here
        secrets = secrets_of(arguments)
        ours = translate_error(error, model=arguments["model"], secrets=secrets, handled=handled)
        if ours is error:
            raise
        # Causes are printed with the traceback; where one holds a key, none must be.
        raise ours from (None if shows_secret(error, secrets) else error)


def _arguments(request: LMRequest) -> dict[str, Any]:
    check_texts(request.messages, request.model)
    return _common_arguments(request.model, request.params)


def _common_arguments(model: str, params: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {"timeout": DEFAULT_TIMEOUT_S, **params, "model": model}
    arguments.pop("max_response_bytes", None)  # the direct engine's
    arguments.update(num_retries=0, max_retries=0)  # litellm's and the SDK's; ours are in the chain
    left = time_left()
    if left is not None and isinstance(timeout_s := arguments["timeout"], int | float):
        # So that what a deadline leaves behind ends soon. In steps, because litellm makes a client,
        # with connections of its own, for each value.
        arguments["timeout"] = min(timeout_s, 2.0 ** math.ceil(math.log2(max(left, 0.1))))
    if callable(key := arguments.get("api_key")):
        arguments["api_key"] = key()
    return arguments


def in_time(model: str, fn: Callable[[], T]) -> T:
    """Call litellm on this thread, or where the call has a deadline, beside it.

    Its own time limits start anew with each byte, so only leaving it behind keeps a deadline.
    """
    left = time_left()
    if left is None:
        return fn()
    try:
        return call_within(left, fn)
    except TimeoutError as error:
        # An LMTimeoutError is one too, and says more.
        raise error if isinstance(error, LMTimeoutError) else _late(model) from error


async def in_time_async(model: str, fn: Callable[[], Awaitable[T]]) -> T:
    """Await litellm, no longer than the deadline of the call allows."""
    left = time_left()
    if left is None:
        return await fn()
    with anyio.move_on_after(max(0.0, left)):
        return await fn()
    raise _late(model)


def _late(model: str) -> DeadlineExceededError:
    return deadline_error(f"{model} was asked")


class _Call(Protocol):
    """One kind of call to litellm."""

    name: str
    """Of litellm's function, looked up at each call, because tracing tools replace it there."""

    def arguments(self, request: LMRequest) -> dict[str, Any]: ...

    def read(self, answer: Any, request: LMRequest) -> LMResponse: ...


class _LiteLLM:
    """What the kinds of calls have in common; stateless, so it is shared and copied at will."""

    __slots__ = ()

    def call(self: _Call, request: LMRequest) -> LMResponse:
        """Send and wait on this thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        arguments = self.arguments(request)
        with border(arguments):
            send = getattr(load_litellm(), self.name)
            return self.read(in_time(request.model, lambda: send(**arguments)), request)

    async def acall(self: _Call, request: LMRequest) -> LMResponse:
        """Send and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # litellm's async form knows no other
            return await call_in_thread(cast("Engine", self).call, request)
        arguments = self.arguments(request)
        with border(arguments):
            send = getattr(await _load_without_blocking(), f"a{self.name}")
            answer = await in_time_async(request.model, lambda: send(**arguments))
            return self.read(answer, request)


class LiteLLMChat(_LiteLLM):
    """Chat completions through litellm, whole or as streams."""

    __slots__ = ()
    name = "completion"

    def arguments(self, request: LMRequest) -> dict[str, Any]:
        """Return what litellm is called with."""
        arguments = _arguments(request) | {"messages": list(request.messages)}
        if request.stream:
            options = {"include_usage": True, **(request.params.get("stream_options") or {})}
            arguments |= {"stream": True, "stream_options": options}
        if arguments.get("tools") and not _has_mcp():
            # Wherever there are tools, litellm looks for some of its own gateway with that package.
            arguments["_skip_mcp_handler"] = True
        return arguments

    def read(self, answer: Any, request: LMRequest) -> LMResponse:
        """Read a completion, or hold its stream."""
        if request.stream:
            source = LiteLLMStream(answer, model=request.model, params=request.params)
            return LMResponse(outputs=(), stream=source)
        return read_chat_response(answer, model=request.model)


class LiteLLMText(_LiteLLM):
    """Completions of a plain prompt, for models that know no chat."""

    __slots__ = ()
    name = "text_completion"

    def arguments(self, request: LMRequest) -> dict[str, Any]:
        """Return what litellm is called with: the messages' texts become one prompt."""
        _refuse_stream(request)
        arguments = _arguments(request)
        provider, slash, name = request.model.partition("/")
        if slash and provider == "openai":
            arguments["model"] = f"text-completion-openai/{name}"
        return arguments | {"prompt": "\n\n".join(_texts(request.messages))}

    def read(self, answer: Any, request: LMRequest) -> LMResponse:
        """Read a completion."""
        return read_chat_response(answer, model=request.model)


class LiteLLMResponses(_LiteLLM):
    """OpenAI's newer protocol, `/responses`."""

    __slots__ = ()
    name = "responses"

    def arguments(self, request: LMRequest) -> dict[str, Any]:
        """Return what litellm is called with.

        Raises:
            MissingExtraError: A package is missing that litellm needs for this protocol alone.
        """
        _refuse_stream(request)
        if not _has_mcp():
            raise MissingExtraError(
                "litellm makes calls to `/responses` with the package `mcp` only: "
                "`pip install dspylite[responses]`, or leave `model_type` out."
            )
        arguments = _arguments(request) | {"input": list(request.messages)}
        for older in ("max_tokens", "max_completion_tokens"):
            if older in arguments:
                arguments["max_output_tokens"] = arguments.pop(older)
        return arguments

    def read(self, answer: Any, request: LMRequest) -> LMResponse:
        """Read a response."""
        return read_responses_answer(answer, model=request.model)


@functools.cache
def _has_mcp() -> bool:
    return importlib.util.find_spec("mcp") is not None


def _refuse_stream(request: LMRequest) -> None:
    if request.stream:
        raise LMConfigurationError(
            f"{request.model}: only chat calls can be streamed; leave `model_type` out.",
            model=request.model,
        )


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (str(part["text"]) for part in content or () if "text" in part)


class _NoRetries(int):
    """A 0 that counts as given: litellm's embedding reads `max_retries or 2`."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


class LiteLLMEmbedding:
    """Embeddings through litellm: a batch of texts to the raw rows of the answer."""

    __slots__ = ("model", "params")

    def __init__(self, model: str, params: Mapping[str, Any]) -> None:
        self.model = model
        self.params = dict(params)

    def call(self, texts: Sequence[str]) -> tuple[list[Any], Usage]:
        """Send one batch and wait on this thread; return its rows as they came.

        Raises:
            LMError: Of the class that fits the failure.
        """
        arguments = self._arguments()
        with border(arguments):
            litellm = load_litellm()
            return _read_rows(
                in_time(self.model, lambda: litellm.embedding(input=list(texts), **arguments))
            )

    async def acall(self, texts: Sequence[str]) -> tuple[list[Any], Usage]:
        """Send one batch and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # litellm's async form knows no other
            return await call_in_thread(self.call, texts)
        arguments = self._arguments()
        with border(arguments):
            litellm = await _load_without_blocking()
            return _read_rows(
                await in_time_async(
                    self.model, lambda: litellm.aembedding(input=list(texts), **arguments)
                )
            )

    def _arguments(self) -> dict[str, Any]:
        return _common_arguments(self.model, self.params) | {"max_retries": _NoRetries()}


async def _load_without_blocking() -> Any:
    return _loaded[0] if _loaded else await call_in_thread(load_litellm)


def _read_rows(answer: Any) -> tuple[list[Any], Usage]:
    rows = [row if isinstance(row, Mapping) else dict(row) for row in answer.data or ()]
    usage = answer.usage.model_dump() if answer.usage is not None else {}
    return rows, Usage.from_provider(usage)


class LiteLLMStream:
    """A stream of litellm's: a `DeltaSource` over its wrapper.

    litellm makes a finish reason up where a stream ends without one, so the wrapper is asked
    whether the provider had sent any.
    """

    def __init__(self, wrapper: Any, *, model: str, params: Mapping[str, Any]) -> None:
        self._wrapper: Any = wrapper
        self._arguments = {**params, "model": model}
        self._model = model
        self._assembly = Assembly(model=model)
        self._ready: list[LMDelta] = []
        self._is_over = False
        self._loop = current_token().native_token if running_library() == "asyncio" else None
        left = time_left()
        self._ends_at = None if left is None else time.monotonic() + left

    def call(self) -> LMDelta | None:
        """Wait on this thread for the next piece; None at the proper end."""
        with self._guard(), Deadline(self._left()):
            while not self._ready and not self._is_over:
                self._take(in_time(self._model, lambda: next(self._wrapper, None)))
        return self._ready.pop(0) if self._ready else None

    async def acall(self) -> LMDelta | None:
        """Await the next piece on this event loop; None at the proper end."""
        if not hasattr(self._wrapper, "__anext__") or running_library() != "asyncio":
            return await call_in_thread(self.call)
        with self._guard(), Deadline(self._left()):
            while not self._ready and not self._is_over:
                self._take(await in_time_async(self._model, lambda: anext(self._wrapper, None)))
        return self._ready.pop(0) if self._ready else None

    def close(self) -> None:
        """Close the connection; nothing happens where it is closed."""
        self._is_over = True
        stream, self._wrapper = self._wrapper, None
        _close_connection(stream, self._loop)

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer."""
        return self._assembly.response

    def _left(self) -> float | None:
        return None if self._ends_at is None else max(1e-3, self._ends_at - time.monotonic())

    @contextmanager
    def _guard(self) -> Generator[None, None, None]:
        try:
            with border(self._arguments):
                yield
        except BaseException:
            self.close()
            raise

    def _take(self, chunk: Any) -> None:
        if chunk is not None:
            self._ready += self._real(self._assembly.add(chunk))
            return
        self._is_over = True
        if self._wrapper is not None and _was_cut(self._wrapper):
            self._assembly.forget_ends()
        else:
            self._assembly.is_ended = True  # of several answers, litellm tells the end of one
        self._assembly.finish()
        self.close()

    def _real(self, deltas: list[LMDelta]) -> list[LMDelta]:
        return [delta for delta in deltas if not (delta.finish_reason and _was_cut(self._wrapper))]


def _was_cut(wrapper: Any) -> bool:
    """Tell whether the provider has sent no finish reason; True while it has not yet."""
    reasons = (
        getattr(wrapper, name, "unknown")
        for name in ("received_finish_reason", "intermittent_finish_reason")
    )
    return all(reason is None for reason in reasons)


def _close_connection(wrapper: Any, loop: Any) -> None:
    """Close the HTTP answer below litellm's wrapper and the SDK's stream in it."""
    inner: Any = getattr(wrapper, "completion_stream", None)
    response: Any = getattr(inner, "response", None)
    for holder in (response, inner):
        if not hasattr(holder, "close"):
            continue
        try:
            closing = holder.close()
        except Exception:  # noqa: BLE001  # the async forms refuse it; else it is given up
            closing = holder.aclose() if hasattr(holder, "aclose") else None
        if inspect.iscoroutine(closing):
            _finish_on(loop, closing)
        return


_closing: set[Any] = set()  # a loop itself does not keep its tasks


def _finish_on(loop: Any, closing: Coroutine[Any, Any, Any]) -> None:
    """Let an event loop close what only it can; whoever has called does not wait for that."""

    async def close_quietly() -> None:
        try:
            await closing
        except Exception:  # noqa: BLE001  # it is given up; nobody needs to know how
            pass

    def start() -> None:
        task = loop.create_task(close_quietly())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    try:
        loop.call_soon_threadsafe(start)
    except (AttributeError, RuntimeError):  # there is no loop, or it is closed with all it had
        closing.close()
