"""What an HTTP exchange is made of, and the limits that every answer must keep to.

Not here: sending (`blocking.py`, `awaiting.py`), and what the bytes mean (`engine.py`).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspylite.errors import (
    CallCancelledError,
    LMServerError,
    LMTimeoutError,
    LMUnexpectedError,
)
from dspylite.runtime.cancellation import Cancellation
from dspylite.runtime.clock import deadline_error
from dspylite.schema.secrets import USER_INFO

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

ERROR_BODY_S = 2.0
"""How long the text of a failure is waited for: its status and headers, which say what to do, are
there already. Guessed."""
WIND_UP_S = 0.2
"""How long the end of a body is waited for after the end of what it says, so that its connection
can be used again; guessed."""

MAX_GZIP_MEMBERS = 10_000
"""Parts of one compressed body; each costs time, even where it holds nothing."""

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

    __slots__ = (
        "_break_off", "_content_at", "_ends_at", "_flag", "_handle", "_limits", "_model",
        "_started_at", "failure",
    )  # fmt: skip

    def __init__(self, limits: Limits, model: str) -> None:
        self._limits = limits
        self._model = model
        self._started_at = time.monotonic()
        self._ends_at = self._started_at + limits.total_s
        self._content_at: float | None = None
        self.failure: LMTimeoutError | CallCancelledError | None = None
        self._flag: Cancellation | None = None
        self._handle: object = None
        self._break_off: list[Callable[[], None]] = []  # whoever takes it out may use it

    def heed(self, flag: Cancellation | None) -> None:
        """Break the exchange off as soon as a flag is raised, until `close`."""
        self._flag = flag
        if flag is not None:
            self._handle = flag.watch(self._stop)

    def on_stop(self, break_off: Callable[[], None]) -> None:
        """Say how the exchange is broken off while a thread waits in it."""
        self._break_off.append(break_off)
        if isinstance(self.failure, CallCancelledError):
            raise self.failure

    def close(self) -> None:
        """Heed the flag no longer: the exchange is over, and its connection may serve another."""
        self._break_off.clear()
        if self._flag is not None:
            self._flag.unwatch(self._handle)

    def _stop(self) -> None:
        reason = None if self._flag is None else self._flag.reason
        self.failure = CallCancelledError(f"{self._model}: cancelled while it was asked: {reason}.")
        try:
            break_off = self._break_off.pop()
        except IndexError:  # it has not begun, or has just ended
            return
        break_off()

    def next_wait(self) -> float:
        """Return the longest that the next byte may be waited for.

        Raises:
            LMTimeoutError: One of the limits is passed.
            CallCancelledError: The exchange was broken off.
        """
        if self.failure is not None:
            raise self.failure
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

    @property
    def is_over(self) -> bool:
        """Whether the time of the whole attempt is up."""
        return time.monotonic() >= self._ends_at - 0.001

    def error(self) -> LMTimeoutError:
        """Make the error of the limit that is passed, or nearest to it."""
        limits = self._limits
        if self.is_over:
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
        is_lenient: Whether to begin with any body, for an answer whose status says all; one that
            cannot be read counts as empty.

    Raises:
        LMServerError: The body is in a form nobody asked for.
        LMUnexpectedError: It is announced as too large.
    """

    __slots__ = (
        "_decoder", "_is_packed", "_is_readable", "_left", "_limits", "_members", "_model",
        "_packed_left",
    )  # fmt: skip

    def __init__(
        self, headers: Mapping[str, str], limits: Limits, model: str, *, is_lenient: bool = False
    ) -> None:
        self._limits = limits
        self._left = limits.max_bytes
        # What does not compress at all, in small pieces, grows.
        self._packed_left = 2 * limits.max_bytes + CHUNK_BYTES
        self._model = model
        self._members = 0
        self._decoder: Any = None
        encoding = headers.get("content-encoding", "identity").strip().lower()
        self._is_packed = "gzip" in encoding
        self._is_readable = encoding in {"identity", "", "gzip", "x-gzip"}
        if is_lenient:
            return
        if not self._is_readable:
            raise LMServerError(
                f"{model}: the answer is compressed by {encoding!r}, which was not asked for.",
                model=model,
            )
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limits.max_bytes:
            raise self._too_large()

    def feed(self, data: bytes) -> bytes:
        """Return what a piece of the body decompresses to.

        Raises:
            LMServerError: The body is not compressed as it says.
            LMUnexpectedError: It is too large.
        """
        if self._is_packed and self._is_readable:
            try:
                data = self._unpacked(data)
            except zlib.error as error:
                raise LMServerError(
                    f"{self._model}: the answer is no valid gzip ({error}).", model=self._model
                ) from error
        self._left -= len(data)
        if self._left < 0:
            raise self._too_large()
        return data if self._is_readable else b""

    def _unpacked(self, data: bytes) -> bytes:
        """Decompress a piece; a body may be many compressed parts, one behind the other."""
        self._packed_left -= len(data)
        if self._packed_left < 0:
            raise self._too_large()
        pieces: list[bytes] = []
        left = self._left + 1  # one more than allowed, by which it is known
        while data and left > 0:
            decoder = self._decoder
            if decoder is None or decoder.eof:
                if decoder is not None and not (data := data.lstrip(b"\0")):
                    break  # padding, as of tapes
                self._members += 1
                if self._members > MAX_GZIP_MEMBERS:
                    raise self._too_large()
                # 31: the largest window, with gzip's own header, without which it raises
                decoder = self._decoder = zlib.decompressobj(wbits=31)
            piece = decoder.decompress(data, left)
            pieces.append(piece)
            left -= len(piece)
            data = decoder.unused_data
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

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


def without_user_info(text: str) -> str:
    """Take user and password out of every URL in a text.

    Example:
        >>> without_user_info("url='http://user:word@proxy:3128'")
        "url='http://proxy:3128'"
    """
    return USER_INFO.sub("://", text)


def cause_to_show(error: BaseException) -> BaseException | None:
    """Return what may be printed as the cause of an error of ours: none that shows a password."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if USER_INFO.search(str(each)):
            return None
        each = each.__cause__ or each.__context__
    return error


def is_blank(data: bytes) -> bool:
    """Tell whether a piece of a body only keeps the connection open."""
    return not data.strip(_BLANKS)
