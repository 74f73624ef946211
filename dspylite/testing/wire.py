"""HTTP/1.1 as the fake server reads and writes it: requests from a stream, answers' framing.

Not here: what is answered and when (`server.py`), and OpenAI's formats (`openai_format.py`).
"""

from __future__ import annotations

import asyncio  # noqa: TID251 -- a test server on raw streams, with a loop and a thread of its own
import http
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MAX_HEAD_BYTES = 64 * 1024
"""Longest request head, and longest line of a chunked body. Guessed; servers take 8 to 64 kB."""

LAST_CHUNK = b"0\r\n\r\n"
"""What ends a chunked body."""

_MAX_TRAILERS = 64  # guessed; no client of an LM sends any
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
# Winsock's `linger` holds two shorts, everybody else's two ints.
_RESET_ON_CLOSE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class UnreadableRequestError(Exception):
    """The bytes received are no request that this server reads.

    Attributes:
        status: The HTTP status to refuse it with.
        reason: One sentence for the body of the refusal.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One request, received in full.

    Attributes:
        method: As sent, such as `"POST"`.
        path: Target without its query.
        query: What followed the `?`, without it; empty where there was none.
        headers: Values by lower-case name; a repeated header is joined by `", "`.
        body: Decoded from its chunks, not from any content encoding.
        keep_alive: Whether the client would send another request on this connection.
        chunks_understood: Whether the answer may be chunked, which HTTP/1.0 does not know.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    keep_alive: bool
    chunks_understood: bool


class WatchedReader(asyncio.StreamReader):
    """A stream reader that tells that the other side has closed, also while nobody reads.

    `on_gone`, when set, is called on the loop at the end of the stream or at its loss. A client
    that only closes its sending half counts as gone too.
    """

    on_gone: Callable[[], object] | None = None

    def feed_eof(self) -> None:
        """Take the end of the stream from the transport."""
        super().feed_eof()
        if self.on_gone is not None:
            self.on_gone()

    def set_exception(self, exc: Exception) -> None:
        """Take the loss of the connection from the transport."""
        super().set_exception(exc)
        if self.on_gone is not None:
            self.on_gone()


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, max_body_bytes: int
) -> HttpRequest | None:
    """Wait for the next request of a connection and read it to its end.

    Args:
        reader: Where the request comes from, with a limit of `MAX_HEAD_BYTES`.
        writer: Where `100 Continue` goes for a client that asks before it sends its body.
        max_body_bytes: A longer body is refused, before it is read where it says its length.

    Returns:
        None when the client closed the connection, between two requests or inside of one.

    Raises:
        UnreadableRequestError: Not HTTP/1, or larger than allowed.
        OSError: The connection was lost.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, version, headers = _parse_head(head)
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, headers, max_body_bytes)
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError as error:
        reason = f"a head or a chunk's line is longer than {MAX_HEAD_BYTES} bytes"
        raise UnreadableRequestError(431, reason) from error
    path, _, query = target.partition("?")
    is_current = version == "HTTP/1.1"
    return HttpRequest(
        method=method,
        path=path,
        query=query,
        headers=headers,
        body=body,
        keep_alive=is_current and headers.get("connection", "").lower() != "close",
        chunks_understood=is_current,
    )


def _parse_head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    # A line break before the request line is allowed: some clients end a body with one too many.
    first, *rest = head.strip(b"\r\n").decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in {"HTTP/1.1", "HTTP/1.0"}:
        raise UnreadableRequestError(400, "the request line is not `METHOD target HTTP/1.1`")
    headers: dict[str, str] = {}
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise UnreadableRequestError(400, "a header line is not `name: value`")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    method, target, version = words
    return method, target, version, headers


async def _read_body(
    reader: asyncio.StreamReader, headers: Mapping[str, str], max_body_bytes: int
) -> bytes:
    encoding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if encoding is not None:
        # Both together is how requests are smuggled past a proxy.
        if encoding.lower() != "chunked" or length is not None:
            raise UnreadableRequestError(400, "only `transfer-encoding: chunked`, alone, is read")
        return await _read_chunks(reader, max_body_bytes)
    if length is None:
        return b""
    # `isdecimal` alone takes other scripts' digits, and 19 digits cover every length there is.
    if not (length.isascii() and length.isdecimal() and len(length) < 20):
        raise UnreadableRequestError(400, "`content-length` is not a number")
    size = int(length)
    _check_size(size, max_body_bytes)
    return await reader.readexactly(size) if size else b""


async def _read_chunks(reader: asyncio.StreamReader, max_body_bytes: int) -> bytes:
    body = bytearray()
    while True:
        digits = (await reader.readuntil(b"\r\n")).partition(b";")[0].strip()
        try:
            size = int(digits, 16)
        except ValueError as error:
            raise UnreadableRequestError(400, "a chunk's size is not a number") from error
        if size < 0:
            raise UnreadableRequestError(400, "a chunk's size is negative")
        if size == 0:
            break
        _check_size(len(body) + size, max_body_bytes)
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise UnreadableRequestError(400, "a chunk is longer than its size")
    for _ in range(_MAX_TRAILERS):
        if await reader.readuntil(b"\r\n") == b"\r\n":
            return bytes(body)
    raise UnreadableRequestError(431, f"more than {_MAX_TRAILERS} trailers")


def _check_size(size: int, max_body_bytes: int) -> None:
    if size > max_body_bytes:
        raise UnreadableRequestError(413, f"the body is longer than {max_body_bytes} bytes")


def head_bytes(status: int, headers: Mapping[str, str]) -> bytes:
    """Return the status line and the headers, with the empty line that ends them."""
    lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def chunk_bytes(data: bytes) -> bytes:
    """Frame bytes as one chunk; none give nothing, because an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a TCP reset, as a crashing server does, rather than politely."""
    sock: socket.socket = writer.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:  # pragma: no cover -- macOS refuses this when the client has left
        pass
    writer.transport.abort()
