"""What an HTTP exchange is made of, and the limits that every answer must keep to.

Not here: sending (`blocking.py`, `awaiting.py`), and what the bytes mean (`engine.py`).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from dspylite.errors import LMServerError, LMTimeoutError, LMUnexpectedError
from dspylite.runtime.clock import deadline_error

FIRST_BYTE_S = 120.0
"""Longest wait for an answer to begin; a model that answers in one piece thinks in this time."""
IDLE_S = 60.0
"""Longest pause between two pieces of content; comments and blanks that keep a line open do not
count as content."""
TOTAL_S = 300.0
"""Longest time for a whole attempt."""
MAX_BODY_BYTES = 16 * 1024 * 1024
"""Largest answer, decompressed. A completion of 100,000 tokens is below 1 MB."""
CHUNK_BYTES = 64 * 1024
CONNECT_S = 20.0
"""Longest wait for one connection to be made; guessed."""

WIND_UP_S = 0.2
"""How long the end of a body is waited for after the end of what it says, so that its connection
can be used again; guessed."""

_BLANKS = b" \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how large an answer may be.

    Attributes:
        total_s: Longest time for the attempt, from its start to the last byte.
        first_byte_s: Longest wait for the answer to begin.
        idle_s: Longest pause between two pieces of content.
        max_bytes: Largest body after decompression.
        is_deadline: Whether `total_s` is what a deadline has left.
    """

    total_s: float = TOTAL_S
    first_byte_s: float = FIRST_BYTE_S
    idle_s: float = IDLE_S
    max_bytes: int = MAX_BODY_BYTES
    is_deadline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One request, ready to be sent.

    Attributes:
        method: `"POST"` or `"GET"`.
        url: Absolute.
        headers: Names in lower case.
        body: What is sent.
        limits: What the answer must keep to.
        model: Named in errors.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    limits: Limits
    model: str

    def __repr__(self) -> str:  # headers and body are nobody's business
        return f"HttpRequest({self.method} for {self.model})"


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One answer, read to its end.

    Attributes:
        status: HTTP status.
        headers: Names in lower case; of repeated ones the last.
        body: Decompressed.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Watch:
    """The time limits of one attempt as it goes on.

    Real time, never a test's clock: sockets know no other.

    Attributes:
        failure: The error it raised, which a library may have wrapped in one of its own.
    """

    __slots__ = ("_content_at", "_ends_at", "_limits", "_model", "_started_at", "failure")

    def __init__(self, limits: Limits, model: str) -> None:
        self._limits = limits
        self._model = model
        self._started_at = time.monotonic()
        self._ends_at = self._started_at + limits.total_s
        self._content_at: float | None = None
        self.failure: LMTimeoutError | None = None

    def next_wait(self) -> float:
        """Return the longest that the next byte may be waited for.

        Raises:
            LMTimeoutError: One of the limits is passed.
        """
        now = time.monotonic()
        if self._content_at is None:
            ends_at = self._started_at + self._limits.first_byte_s
        else:
            ends_at = self._content_at + self._limits.idle_s
        left = min(ends_at, self._ends_at) - now
        if left <= 0:
            self.failure = self.error()
            raise self.failure
        return left

    def content(self) -> None:
        """Note that something was said."""
        self._content_at = time.monotonic()

    def hurry(self, seconds: float) -> None:
        """Allow no more than so many seconds from now on."""
        self._ends_at = min(self._ends_at, time.monotonic() + seconds)

    def error(self) -> LMTimeoutError:
        """Make the error of the limit that is passed, or nearest to it."""
        limits, now = self._limits, time.monotonic()
        if now >= self._ends_at - 0.001:
            if limits.is_deadline:
                late = deadline_error(f"{self._model} was asked")
                late.model = self._model
                return late
            what = f"the answer was not complete after {limits.total_s:.3g} s"
        elif self._content_at is None:
            what = f"no answer began within {limits.first_byte_s:.3g} s"
        else:
            what = f"nothing more was said for {limits.idle_s:.3g} s"
        return LMTimeoutError(
            f"{self._model}: {what}. Give it longer by `timeout=`.", model=self._model
        )


class BodyReader:
    """Decompresses a body piece by piece and keeps it within its limit.

    No more than the limit is ever in memory, however well the body is compressed.

    Args:
        headers: Of the answer.
        limits: As of the request.
        model: Named in errors.

    Raises:
        LMServerError: The body is in a form nobody asked for.
        LMUnexpectedError: It is announced as too large.
    """

    __slots__ = ("_decoder", "_left", "_limits", "_model")

    def __init__(self, headers: Mapping[str, str], limits: Limits, model: str) -> None:
        self._limits = limits
        self._left = limits.max_bytes
        self._model = model
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", "", "gzip", "x-gzip"}:
            raise LMServerError(
                f"{model}: the answer is compressed by {encoding!r}, which was not asked for.",
                model=model,
            )
        # 31: the largest window, with gzip's own header
        self._decoder = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limits.max_bytes:
            raise self._too_large()

    def feed(self, data: bytes) -> bytes:
        """Return what a piece of the body decompresses to.

        Raises:
            LMServerError: The body is not compressed as it says.
            LMUnexpectedError: It is too large.
        """
        if self._decoder is not None:
            try:
                data = self._decoder.decompress(data, self._left + 1)
            except zlib.error as error:
                raise LMServerError(
                    f"{self._model}: the answer is no valid gzip ({error}).", model=self._model
                ) from error
        self._left -= len(data)
        if self._left < 0:
            raise self._too_large()
        return data

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            LMServerError: The compressed body was cut.
        """
        if self._decoder is not None and not self._decoder.eof:
            raise LMServerError(f"{self._model}: the compressed answer was cut.", model=self._model)

    def _too_large(self) -> LMUnexpectedError:
        megabytes = self._limits.max_bytes / 1e6
        return LMUnexpectedError(  # not retryable: it would be as large again
            f"{self._model}: the answer is larger than {megabytes:.3g} MB and was not read "
            "further. Allow more by `max_response_bytes=`.",
            model=self._model,
        )


def is_blank(data: bytes) -> bool:
    """Tell whether a piece of a body only keeps the connection open."""
    return not data.strip(_BLANKS)
