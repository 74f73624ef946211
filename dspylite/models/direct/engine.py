"""The engine that speaks OpenAI's protocol itself: chat, streams, lists of models.

It never loads litellm. Not here: embeddings (`embedding.py`), how bytes travel (`blocking.py`,
`awaiting.py`), and where to (`providers.py`).
"""

from __future__ import annotations

import functools
import json
import re
import urllib.parse
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import Any

from dspylite.abc import Io
from dspylite.errors import (
    MAX_MESSAGE_CHARS,
    FlowError,
    LMConfigurationError,
    LMInvalidRequestError,
    LMServerError,
    LMUnexpectedError,
)
from dspylite.models.answers import read_chat_response, surrogate_error
from dspylite.models.deltas import Assembly
from dspylite.models.direct.events import EventReader
from dspylite.models.direct.providers import Endpoint, endpoint_of
from dspylite.models.direct.wire import (
    FIRST_BYTE_S,
    IDLE_S,
    MAX_BODY_BYTES,
    TOTAL_S,
    HttpAnswer,
    HttpRequest,
    Limits,
)
from dspylite.models.streams import close_stream
from dspylite.models.translate import error_of_answer, status_of_error
from dspylite.runtime.clock import time_left
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.forks import loading
from dspylite.runtime.loops import running_library
from dspylite.runtime.workers import call_in_thread, open_in_thread
from dspylite.schema.messages import LMDelta, LMRequest, LMResponse
from dspylite.schema.secrets import redact, secrets_of

TRANSPORT = frozenset(
    {
        "api_key",
        "api_base",
        "base_url",
        "timeout",
        "max_response_bytes",
        "extra_headers",
        "headers",
        "extra_body",
        "organization",
    }
)
"""Parameters that say how to send; all others are sent."""

SPOKEN = TRANSPORT | frozenset(
    """
    audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens
    max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty
    prompt_cache_key reasoning_effort response_format safety_identifier seed service_tier stop store
    stream_options temperature tool_choice tools top_logprobs top_p user verbosity
    web_search_options

    best_of chat_template_kwargs guided_choice guided_grammar guided_json guided_regex ignore_eos
    length_penalty min_p min_tokens repetition_penalty skip_special_tokens stop_token_ids
    structured_outputs top_k
    """.split()
)
"""Parameters of chat completions that OpenAI's API and vLLM's take as they are."""

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_HEADERS = {
    "content-type": "application/json",
    "accept": "application/json, text/event-stream",
    "accept-encoding": "gzip",
    "user-agent": "dspylite",
}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_REDIRECTS = frozenset({307, 308})
_MAX_REDIRECTS = 3
_REASONING_NAMES = ("o1", "o3", "o4", "gpt-5")


@functools.cache
def _blocking() -> Any:
    # Loads the standard library's HTTP and TLS, which are half the memory of this package's import.
    with loading():
        from dspylite.models.direct import blocking  # noqa: PLC0415

    return blocking


@functools.cache
def _awaiting() -> Any:
    with loading():
        from dspylite.models.direct import awaiting  # noqa: PLC0415

    return awaiting


def preload() -> None:
    """Load both transports, their libraries and the certificates; nothing is sent."""
    _blocking().preload()
    _awaiting().preload()


async def close_connections() -> None:
    """Close the connections of the running event loop; a later request opens new ones.

    Those of sync calls belong to the process and stay, as do those of other loops.
    """
    if _awaiting.cache_info().currsize and running_library() == "asyncio":
        await _awaiting().close_connections()


class _Send:
    """One exchange, in the transport that fits the driver; which is loaded on its first use."""

    def call(self, request: HttpRequest) -> HttpAnswer:
        answer: HttpAnswer = _blocking().send(request)
        return answer

    def acall(self, request: HttpRequest) -> Awaitable[HttpAnswer]:
        awaited: Awaitable[HttpAnswer] = _awaiting().send(request)
        return awaited


class _Open:
    """The opening of a stream, likewise."""

    def call(self, request: HttpRequest) -> Any:
        return _blocking().open_stream(request)

    def acall(self, request: HttpRequest) -> Awaitable[Any]:
        awaited: Awaitable[Any] = _awaiting().open_stream(request)
        return awaited


_SEND, _OPEN = _Send(), _Open()


class DirectChat:
    """Chat completions; stateless, so it is shared, copied and pickled at will."""

    __slots__ = ()

    def call(self, request: LMRequest) -> LMResponse:
        """Send and wait on this thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        return run_flow(_complete(BLOCKING, request))

    async def acall(self, request: LMRequest) -> LMResponse:
        """Send and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # aiohttp knows no other
            return await open_in_thread(self.call, close_stream, request)
        return await _complete(ASYNC, request)


async def _complete(io: Io, request: LMRequest) -> LMResponse:
    endpoint = endpoint_of(request.model, request.params)
    body = chat_body(request, endpoint.model)
    if request.stream:
        return await _open_stream(io, request, endpoint, body)
    answer = await post(
        io, endpoint, "/chat/completions", body, model=request.model, params=request.params
    )
    read = read_json(answer, request.model, params=request.params, endpoint=endpoint)
    return read_chat_response(read, model=request.model)


def chat_body(request: LMRequest, model: str) -> dict[str, Any]:
    """Return what is sent for a chat request.

    Example:
        >>> chat = [{"role": "user", "content": "Hi"}]
        >>> chat_body(LMRequest(model="openai/m", messages=chat, params={"n": 2}), "m")
        {'model': 'm', 'messages': [{'role': 'user', 'content': 'Hi'}], 'n': 2}
    """
    params = request.params
    body: dict[str, Any] = {"model": model, "messages": list(request.messages)}
    body.update({name: value for name, value in params.items() if name not in TRANSPORT})
    if "max_tokens" in body and model.startswith(_REASONING_NAMES):
        body["max_completion_tokens"] = body.pop("max_tokens")  # these refuse the older name
    if request.stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True, **(params.get("stream_options") or {})}
    return body | (params.get("extra_body") or {})


async def post(
    io: Io,
    endpoint: Endpoint,
    path: str,
    body: Mapping[str, Any] | None,
    *,
    model: str,
    params: Mapping[str, Any],
) -> HttpAnswer:
    """Exchange one request for one successful answer."""
    request = _http_request(endpoint, path, body, model=model, params=params)
    answer = await io.call(_SEND, request)
    for _ in range(_MAX_REDIRECTS):
        if answer.status not in _REDIRECTS:
            break
        request = _redirected(request, answer.headers)
        answer = await io.call(_SEND, request)
    if 200 <= answer.status < 300:
        return answer
    raise error_of_answer(
        status=answer.status,
        headers=answer.headers,
        body=answer.body,
        model=model,
        secrets=secrets_of(shown_by(params, endpoint)),
    )


def _http_request(
    endpoint: Endpoint,
    path: str,
    body: Mapping[str, Any] | None,
    *,
    model: str,
    params: Mapping[str, Any],
) -> HttpRequest:
    own: dict[str, str] = {}
    if endpoint.key:
        own["authorization"] = f"Bearer {endpoint.key}"
    if organization := params.get("organization"):
        own["openai-organization"] = str(organization)
    for more in (params.get("headers"), params.get("extra_headers")):
        own.update((str(name).lower(), str(value)) for name, value in (more or {}).items())
    for name, value in own.items():
        if not _HEADER_NAME.fullmatch(name):
            raise LMConfigurationError(
                f"{model}: one of `extra_headers` has a name that no header can have.", model=model
            )
        if "\n" in value or "\r" in value or not value.isascii():
            raise LMConfigurationError(
                f"{model}: the header {name!r} (or the key in it) holds a line break or a "
                "character beyond ASCII, which cannot be sent.",
                model=model,
            )
    total_s = params.get("timeout")
    limits = Limits(
        total_s=TOTAL_S if total_s is None else total_s,
        # Whoever gives a slow model more time means the wait for its first byte too.
        first_byte_s=FIRST_BYTE_S if total_s is None else total_s,
        idle_s=IDLE_S,
        max_bytes=params.get("max_response_bytes") or MAX_BODY_BYTES,
    )
    left = time_left()
    if left is not None and left < limits.total_s:
        limits = replace(limits, total_s=max(left, 0.0), is_deadline=True)
    return HttpRequest(
        method="GET" if body is None else "POST",
        url=_joined(endpoint.base, path),
        headers={**_HEADERS, **own},
        body=None if body is None else _encoded(body, model),
        limits=limits,
        model=model,
    )


def _joined(base: str, path: str) -> str:
    """Put a path behind a base, before what it may have of a query."""
    if "?" not in base:
        return base + path
    where, _, query = base.partition("?")
    return f"{where.rstrip('/')}{path}?{query}"


def _encoded(body: Mapping[str, Any], model: str) -> bytes:
    try:
        return _JSON.encode(body).encode()
    except UnicodeEncodeError as error:
        raise surrogate_error(error, model) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise LMInvalidRequestError(
            f"{model}: the request cannot be written as JSON: {error}.", model=model
        ) from error


def _redirected(request: HttpRequest, headers: Mapping[str, str]) -> HttpRequest:
    """Follow a redirect on the same host; a key is sent to no other.

    Raises:
        LMUnexpectedError: It leads elsewhere.
    """
    target = urllib.parse.urljoin(request.url, headers.get("location", ""))
    here, there = urllib.parse.urlsplit(request.url), urllib.parse.urlsplit(target)
    if (here.scheme, here.netloc) != (there.scheme, there.netloc):
        raise LMUnexpectedError(
            f"{request.model}: the endpoint redirects to {there.scheme}://{there.hostname}, which "
            "is not followed, because the key would go with it. Give that as `api_base=` if it is "
            "right.",
            model=request.model,
        )
    return replace(request, url=target)


def shown_by(params: Mapping[str, Any], endpoint: Endpoint) -> Mapping[str, Any]:
    """Return the parameters with the key that is really sent, which a function may have made."""
    return {**params, "api_key": endpoint.key}


def read_json(
    answer: HttpAnswer, model: str, *, params: Mapping[str, Any], endpoint: Endpoint
) -> Mapping[str, Any]:
    """Read the body of a success; what of it gets into an error is without the secrets.

    Raises:
        LMError: It is no JSON object, or an error in disguise.
    """
    try:
        read = json.loads(answer.body)
    except (ValueError, RecursionError):
        read = None
    if isinstance(read, Mapping) and not read.get("error"):
        return read
    secrets = secrets_of(shown_by(params, endpoint))
    if isinstance(read, Mapping):
        raise error_of_answer(
            status=status_of_error(read["error"]),
            headers=answer.headers,
            body=answer.body,
            model=model,
            secrets=secrets,
        )
    written = redact(answer.body[: 4 * MAX_MESSAGE_CHARS].decode("utf-8", "replace"), secrets)
    raise LMServerError(
        f"{model}: the answer is no JSON object: {written[:200]!r}",
        model=model,
        provider=model.partition("/")[0],
        request_id=redact(answer.headers.get("x-request-id", ""), secrets) or None,
        body=written,
    )


# -- streams ---------------------------------------------------------------------------------------


async def _open_stream(
    io: Io, request: LMRequest, endpoint: Endpoint, body: Mapping[str, Any]
) -> LMResponse:
    http = _http_request(
        endpoint, "/chat/completions", body, model=request.model, params=request.params
    )
    stream = await io.call(_OPEN, http)
    for _ in range(_MAX_REDIRECTS):
        if stream.status not in _REDIRECTS:
            break
        stream.close()
        http = _redirected(http, stream.headers)
        stream = await io.call(_OPEN, http)
    secrets = secrets_of(shown_by(request.params, endpoint))
    request_id = redact(stream.headers.get("x-request-id", ""), secrets) or None
    if not 200 <= stream.status < 300:
        raise error_of_answer(
            status=stream.status,
            headers=stream.headers,
            body=await io.call(_READ_ALL, stream),
            model=request.model,
            secrets=secrets,
        )
    source = _Deltas(
        stream,
        EventReader(max_bytes=http.limits.max_bytes, model=request.model),
        Assembly(model=request.model, secrets=secrets, request_id=request_id),
    )
    return LMResponse(outputs=(), request_id=request_id, stream=source)


class _Ask:
    """A method of an open stream, which blocks in the one transport and is awaited in the other."""

    def __init__(self, method: str) -> None:
        self._method = method

    def call(self, stream: Any) -> Any:
        return getattr(stream, self._method)()

    def acall(self, stream: Any) -> Awaitable[Any]:
        awaited: Awaitable[Any] = getattr(stream, self._method)()
        return awaited


_READ, _READ_ALL, _WIND_UP = _Ask("read"), _Ask("read_all"), _Ask("wind_up")


class _Deltas:
    """An open stream: bytes become events, events become pieces of the answer."""

    def __init__(self, stream: Any, events: EventReader, assembly: Assembly) -> None:
        self._stream = stream
        self._events = events
        self._assembly = assembly
        self._ready: list[LMDelta] = []
        self._is_over = False

    def call(self) -> LMDelta | None:
        if not isinstance(self._stream, _blocking().BlockingStream):
            raise FlowError(
                "This stream was opened by `astream`, on an event loop: read it with `async for`."
            )
        return run_flow(self._next(BLOCKING))

    async def acall(self) -> LMDelta | None:
        if isinstance(self._stream, _blocking().BlockingStream):  # opened under trio
            try:
                return await call_in_thread(self.call)
            except BaseException:
                self.close()  # a thread that nobody awaits any more may wait for the next piece
                raise
        return await self._next(ASYNC)

    async def _next(self, io: Io) -> LMDelta | None:
        while not self._ready:
            if self._is_over:
                return None
            try:
                piece: bytes = await io.call(_READ, self._stream)
                for event in self._events.feed(piece) if piece else self._events.finish():
                    self._ready += self._assembly.read_event(event)
                    self._stream.content()
                if not piece or self._assembly.is_ended:
                    self._is_over = True
                    self._assembly.finish()
                    await io.call(_WIND_UP, self._stream)
            except BaseException:
                self._is_over = True
                self.close()
                raise
        return self._ready.pop(0)

    def close(self) -> None:
        self._is_over = True
        self._stream.close()

    @property
    def response(self) -> LMResponse:
        return self._assembly.response


# -- lists of models -----------------------------------------------------------------------------


async def list_models(io: Io, model: str, params: Mapping[str, Any]) -> list[str]:
    """Return the names of the models that the endpoint of `model` serves.

    Raises:
        LMError: Of the class that fits the failure.
    """
    endpoint = endpoint_of(model, params)
    answer = await post(io, endpoint, "/models", None, model=model, params=params)
    rows = read_json(answer, model, params=params, endpoint=endpoint).get("data")
    return [str(row["id"]) for row in rows or () if isinstance(row, Mapping) and "id" in row]
