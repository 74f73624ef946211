"""The engine that reaches every provider through litellm: chat, text, responses, embeddings.

litellm's own retries are off: one request is one request. Not here: how litellm is loaded
(`models/litellm_door.py`), and its streams (`models/litellm_streams.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from dspylite.abc import Engine
from dspylite.errors import LMConfigurationError, MissingExtraError
from dspylite.models.answers import check_texts, read_chat_response, read_responses_answer
from dspylite.models.direct.providers import provider_of
from dspylite.models.litellm_door import (
    border,
    in_time,
    in_time_async,
    load_litellm,
    load_litellm_without_blocking,
)
from dspylite.models.litellm_streams import LiteLLMStream
from dspylite.models.streams import close_stream
from dspylite.runtime.clock import time_left
from dspylite.runtime.loops import running_library
from dspylite.runtime.workers import open_in_thread
from dspylite.schema.messages import EmbeddingResponse, LMRequest, LMResponse, Message, Usage

DEFAULT_TIMEOUT_S = 300.0
"""Longest wait for one answer unless the LM says otherwise; litellm's own default is 6,000 s."""


def _arguments(request: LMRequest) -> dict[str, Any]:
    check_texts(request.messages, request.model)
    arguments = {"timeout": DEFAULT_TIMEOUT_S, **request.params, "model": request.model}
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


class _Call(Protocol):
    """One kind of call to litellm."""

    name: str
    """Of litellm's function, looked up at each call, because tracing tools replace it there."""

    def arguments(self, request: LMRequest) -> dict[str, Any]: ...

    def read(self, answer: Any, request: LMRequest, arguments: Mapping[str, Any]) -> LMResponse: ...


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
            answer = in_time(request.model, lambda: send(**arguments))
            return self.read(answer, request, arguments)

    async def acall(self: _Call, request: LMRequest) -> LMResponse:
        """Send and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # litellm's async form knows no other
            return await open_in_thread(cast("Engine", self).call, close_stream, request)
        arguments = self.arguments(request)
        with border(arguments):
            send = getattr(await load_litellm_without_blocking(), f"a{self.name}")
            answer = await in_time_async(request.model, lambda: send(**arguments))
            return self.read(answer, request, arguments)


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

    def read(self, answer: Any, request: LMRequest, arguments: Mapping[str, Any]) -> LMResponse:
        """Read a completion, or hold its stream."""
        if request.stream:
            source = LiteLLMStream(answer, model=request.model, params=arguments)
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

    def read(self, answer: Any, request: LMRequest, arguments: Mapping[str, Any]) -> LMResponse:
        """Read a completion."""
        del arguments
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

    def read(self, answer: Any, request: LMRequest, arguments: Mapping[str, Any]) -> LMResponse:
        """Read a response."""
        del arguments
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


class LiteLLMEmbedding(_LiteLLM):
    """Embeddings through litellm: a batch of texts to the raw rows of the answer."""

    __slots__ = ()
    name = "embedding"

    def arguments(self, request: LMRequest) -> dict[str, Any]:
        """Return what litellm is called with."""
        arguments: dict[str, Any] = _arguments(request) | {
            "max_retries": _NoRetries(),
            "input": [message["content"] for message in request.messages],
        }
        if arguments.get("encoding_format") == "base64":
            del arguments["encoding_format"]  # it hands the text on; the numbers are the same
        if "dimensions" in arguments and provider_of(request.model) is not None:
            # litellm refuses it for names that it does not know, though their servers may not.
            extra: Mapping[str, Any] = arguments.get("extra_body") or {}
            arguments["extra_body"] = {"dimensions": arguments.pop("dimensions"), **extra}
        return arguments

    def read(
        self, answer: Any, request: LMRequest, arguments: Mapping[str, Any]
    ) -> EmbeddingResponse:
        """Read the rows as they came."""
        del arguments
        rows: list[Any] = answer.data or []
        usage = answer.usage.model_dump() if answer.usage is not None else {}
        return EmbeddingResponse(
            outputs=(),
            rows=[row if isinstance(row, Mapping) else dict(row) for row in rows],
            usage=Usage.from_provider(usage),
            model=str(answer.model or request.model),
        )
