"""The one border where a provider's failure becomes one of ours.

A failure is classified by its HTTP status and its shape, not by the type of the library that raised
it. Not here: making the call (the engines), and reading an answer (`models/answers.py`).
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dspylite.errors import (
    MAX_MESSAGE_CHARS,
    ContentFilterError,
    ContextWindowExceededError,
    LMAuthError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
)
from dspylite.schema.secrets import redact

_TIMEOUT_NAMES = re.compile(r"Timeout|TimedOut")
_TRANSPORT_NAMES = re.compile(
    r"APIConnection|Connect(ion)?Error|ConnectionReset|RemoteProtocol|ReadError|WriteError|"
    r"ServerDisconnected|ClientOSError|ClientPayload|IncompleteRead|ProtocolError|BrokenPipe"
)
_CONTEXT_WINDOW = re.compile(
    r"context_length_exceeded|maximum context length|context window|prompt is too long|"
    r"input is too long|ContextWindowExceeded",
    re.IGNORECASE,
)
_CONTENT_FILTER = re.compile(
    r"content_filter|content_policy|content management policy|ContentPolicyViolation", re.IGNORECASE
)
_NO_KEY = re.compile(r"Missing credentials|api_key client option must be set")
_RETRY_AFTER = ("retry-after-ms", "retry-after")
_REQUEST_ID = ("x-request-id", "request-id", "x-amzn-requestid", "apim-request-id")


def shows_secret(error: BaseException, secrets: Sequence[str]) -> bool:
    """Tell whether an exception, or one that would be printed with it, holds a secret."""
    texts = [str(each) for each in _chain(error)]
    return any(redact(text, secrets) != text for text in texts)


def translate_error(
    error: BaseException,
    *,
    model: str,
    secrets: Iterable[str] = (),
    handled: BaseException | None = None,
) -> LMError:
    """Turn what a provider's library raised into one of our errors.

    Args:
        error: What was raised. One of ours is returned as it is.
        model: The model asked.
        secrets: Strings that must not appear in the new error.
        handled: What the caller was handling when it made the call; that is another failure, whose
            headers and class say nothing about this one.
    """
    if isinstance(error, LMError):
        return error
    secrets = list(secrets)
    links = list(_chain(error, until=handled))
    headers = _headers(links)
    status = _status(error)
    body = _body(links)
    code = redact(_code(error, body, status) or "", secrets) or None
    text = redact(f"{getattr(error, 'message', None) or error}", secrets)
    kind = _kind(links, status, f"{text} {code}")
    if not headers and _NO_KEY.search(text):
        kind = LMAuthError  # nothing was sent
    if status in {408, 500} and not headers:
        status = None  # litellm writes these where there was no answer, or none that it understood
    request_id = _first(headers, _REQUEST_ID) or getattr(error, "request_id", None)
    details: dict[str, Any] = {
        "model": model,
        "provider": getattr(error, "llm_provider", None) or model.partition("/")[0],
        "provider_code": code,
        "status": status,
        "request_id": None if request_id is None else redact(str(request_id), secrets),
        "retry_after": retry_after_s(headers),
        "body": None if body is None else redact(_written(body), secrets),
    }
    message = f"{model}: {f'HTTP {status}: ' if status else ''}{text or type(error).__name__}"
    if kind is LMUnexpectedError:
        message = f"{model}: {type(error).__name__}: {text}"
    return kind(message=message, **details)


def error_of_answer(
    *,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    model: str,
    secrets: Iterable[str] = (),
) -> LMError:
    """Turn an HTTP answer that is no success into one of our errors.

    Args:
        status: HTTP status.
        headers: Names in lower case.
        body: Whatever the server wrote: OpenAI's error object, an HTML page, nothing.
        model: The model asked.
        secrets: Strings that must not appear in the error.
    """
    secrets = list(secrets)
    written = redact(body[: 4 * MAX_MESSAGE_CHARS].decode("utf-8", "replace"), secrets)
    said = error_object(body)
    code = redact(str(said.get("code") or said.get("type") or ""), secrets) or None
    text = redact(str(said["message"]), secrets) if said.get("message") else written.strip()
    request_id = _first(headers, _REQUEST_ID)
    return _kind((), status, f"{text} {code}")(
        message=f"{model}: HTTP {status}: {text or 'an empty answer'}",
        model=model,
        provider=model.partition("/")[0],
        provider_code=code,
        status=status,
        request_id=None if request_id is None else redact(request_id, secrets),
        retry_after=retry_after_s(headers),
        body=written or None,
    )


def error_object(body: bytes) -> Mapping[str, Any]:
    """Find OpenAI's error object in an answer; empty where there is none."""
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    said = read.get("error", read) if isinstance(read, Mapping) else read
    if isinstance(said, Mapping):
        return said
    return {"message": said} if isinstance(said, str) else {}


def status_of_error(error: Any) -> int:
    """Return the status that an error object stands for where its answer said 200.

    Servers that begin to answer before they fail have said 200 by then, and put it in the error.
    """
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _kind(links: Sequence[BaseException], status: int | None, text: str) -> type[LMError]:
    names = " ".join(cls.__name__ for each in links for cls in type(each).__mro__)
    if _CONTEXT_WINDOW.search(text) or "ContextWindowExceeded" in names:
        return ContextWindowExceededError
    if status in {400, 403, None} and (_CONTENT_FILTER.search(text) or "ContentPolicy" in names):
        return ContentFilterError
    if status in {401, 402, 403}:
        return LMAuthError
    if status == 429:
        return LMRateLimitError
    if status == 408 or (status is None and _TIMEOUT_NAMES.search(names)):
        return LMTimeoutError
    if status in {None, 500} and _TRANSPORT_NAMES.search(names):
        return LMTimeoutError if _TIMEOUT_NAMES.search(names) else LMTransportError
    if status is None:
        return LMUnexpectedError
    if status >= 500 or status in {409, 425}:  # a conflict and "too early" may pass, too
        return LMServerError
    return LMInvalidRequestError if status >= 300 else LMUnexpectedError


def _chain(error: BaseException, until: BaseException | None = None) -> Iterator[BaseException]:
    seen = {id(until)}
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    for holder in (error, getattr(error, "response", None)):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int):
            return status
        if isinstance(status, str) and status.isdecimal():
            return int(status)
    return None


def _code(error: BaseException, body: Any, status: int | None) -> str | None:
    said = body if isinstance(body, Mapping) else {}
    code = said.get("code") or said.get("type") or getattr(error, "code", None)
    if code is None or (str(code) == str(status) and "code" not in said):
        return None  # a library's own, which says nothing that the status does not
    return str(code)


def _body(links: Sequence[BaseException]) -> Any:
    """Find what the provider wrote, wherever a library keeps it: an error object, or text."""
    bodies = (getattr(each, "body", None) for each in links)
    return next((body for body in bodies if body and isinstance(body, str | Mapping)), None)


def _written(body: Any) -> str:
    return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, default=str)


def _headers(links: Sequence[BaseException]) -> dict[str, str]:
    """Collect the answer's headers from wherever a library keeps them, names in lower case."""
    found: dict[str, str] = {}
    for each in links:
        for holder in (
            getattr(each, "litellm_response_headers", None),
            getattr(getattr(each, "response", None), "headers", None),
            getattr(each, "headers", None),
        ):
            if isinstance(holder, Mapping):
                for name, value in holder.items():
                    plain = str(name).lower().removeprefix("llm_provider-")
                    found.setdefault(plain, str(value))
    return found


def _first(headers: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((headers[name] for name in names if name in headers), None)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read how long a provider asks to wait, in seconds; None if it does not say.

    Understands `retry-after-ms`, and `retry-after` as seconds or as an HTTP date.

    Example:
        >>> retry_after_s({"retry-after": "1.5"}), retry_after_s({"retry-after-ms": "250"})
        (1.5, 0.25)
    """
    for name in _RETRY_AFTER:
        raw = headers.get(name)
        if raw is None:
            continue
        try:
            seconds = float(raw) / (1000 if name.endswith("-ms") else 1)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(raw).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if not math.isnan(seconds) and seconds != float("inf"):  # a header may say anything
            return max(0.0, seconds)
    return None
