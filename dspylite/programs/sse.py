"""A streamed program as server-sent events, for a web service.

Not here: what the events are (`programs/stream_events.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable
from typing import Any, overload

from dspylite.adapters.values import to_json
from dspylite.errors import DSPyError, InputFieldError
from dspylite.programs.stream_events import as_plain

logger = logging.getLogger(__name__)

_DONE = "data: [DONE]\n\n"

# Of events they end no line, but many a client looks for lines as `str.splitlines` does.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


@overload
def streaming_response(streamer: AsyncIterable[Any]) -> AsyncGenerator[str, None]: ...


@overload
def streaming_response(streamer: Iterable[Any]) -> Generator[str, None, None]: ...


def streaming_response(streamer: Any) -> Any:
    r"""Write what a streamed program gives as server-sent events, ended by `data: [DONE]`.

    Each is one JSON object, with a key that tells its kind: `prediction`, `stream_response`,
    `status_message`, `chunk` (a piece of a model's answer in OpenAI's form), or `value`. NaN and
    infinity are null in it. A failure is an `event: error` with the body of `error.to_http()`,
    which names nothing behind the service, and there is no `[DONE]` after it. Closing the iterator
    closes the stream.

    Args:
        streamer: What the function made by `streamify` gave, async or sync.

    Returns:
        An iterator of the same kind, for `StreamingResponse(..., media_type="text/event-stream")`.

    Raises:
        InputFieldError: It is not iterable.

    Example:
        >>> from dspylite.programs.stream_events import StatusMessage
        >>> list(streaming_response([StatusMessage("Asking\n\nthe model")]))
        ['data: {"status_message": "Asking\\n\\nthe model"}\n\n', 'data: [DONE]\n\n']
    """
    if isinstance(streamer, AsyncIterable):
        return _async_lines(streamer)
    if isinstance(streamer, Iterable):
        return _lines(streamer)
    raise InputFieldError(
        f"`streaming_response` takes what a streamed program gives, not {streamer!r}; call the "
        "function that `streamify` has made."
    )


async def _async_lines(streamer: AsyncIterable[Any]) -> AsyncGenerator[str, None]:
    try:
        async for event in streamer:
            yield _line(event)
        yield _DONE
    except Exception as error:  # noqa: BLE001  # the response has begun: the stream must tell of it
        yield _error_line(error)
    finally:
        if close := getattr(streamer, "aclose", None):
            await close()


def _lines(streamer: Iterable[Any]) -> Generator[str, None, None]:
    try:
        for event in streamer:
            yield _line(event)
        yield _DONE
    except Exception as error:  # noqa: BLE001  # the response has begun: the stream must tell of it
        yield _error_line(error)
    finally:
        if close := getattr(streamer, "close", None):
            close()


def _line(event: Any) -> str:
    data = to_json(as_plain(event))
    if "NaN" in data or "Infinity" in data:
        data = to_json(json.loads(data, parse_constant=lambda _: None))
    # Half a character, which a model may have written, cannot be sent.
    data = data.encode("utf-8", "replace").decode("utf-8").translate(_LINE_ENDS)
    return f"data: {data}\n\n"


def _error_line(error: Exception) -> str:
    if isinstance(error, DSPyError):
        logger.warning("a stream ended with %s", type(error).__name__)
        logger.debug("%s", error)
        answer = error.to_http()
    else:
        logger.error("a stream ended with %s", type(error).__name__, exc_info=error)
        answer = DSPyError().to_http()
    return f"event: error\ndata: {to_json(answer.body)}\n\n"
