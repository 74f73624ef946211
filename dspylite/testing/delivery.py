"""How an answer travels: at once, dripped, padded, compressed, cut or dropped, as its reply says.

Not here: what is in it (`openai_format.py`), and HTTP's own syntax (`wire.py`).
"""

from __future__ import annotations

import asyncio  # noqa: TID251 -- a test server on raw streams, with a loop and a thread of its own
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator

from dspylite.testing.openai_format import Rendered
from dspylite.testing.replies import Reply
from dspylite.testing.wire import LAST_CHUNK, HttpRequest, chunk_bytes, head_bytes, reset

_KEEPALIVE_EVERY_S = 0.02  # guessed: often enough to outpace the idle timeout of any test
_PADDING_BLOCK = b" " * (256 * 1024)
_LARGE_BYTES = 64 * 1024  # guessed: what any kernel takes at once from an idle connection
_FRAMING = {"connection", "content-length", "transfer-encoding"}


async def deliver(
    answer: Rendered,
    reply: Reply,
    *,
    to: asyncio.StreamWriter,
    request: HttpRequest,
    request_id: str,
    before_end: Callable[[], object],
) -> bool:
    """Send an answer with the faults of its reply, waiting for a slow reader where there is one.

    Args:
        answer: What to send.
        reply: How to send it. Its `delay_s` and `hang` are the caller's.
        to: The connection.
        request: What is answered.
        request_id: The `x-request-id` of the answer.
        before_end: Called once before the last bytes leave, so that a client which has its answer
            finds the books closed; before the reset of a dropped connection likewise.

    Returns:
        Whether the connection can carry another request.

    Raises:
        OSError: The connection was lost.
    """
    if reply.drop == "before":
        before_end()
        reset(to)
        return False
    headers = {"x-request-id": request_id}
    if answer.content_type:
        headers["content-type"] = answer.content_type
    if reply.gzip:
        headers["content-encoding"] = "gzip"
    given = {name.lower(): value for name, value in reply.headers.items()}
    # Where the script sets the framing itself, only the end of the connection is a safe end.
    keep_alive = request.keep_alive and _FRAMING.isdisjoint(given)
    if not keep_alive:
        headers["connection"] = "close"
    frame, end = _unframed, b""
    payloads: Iterable[bytes]
    if answer.is_stream or reply.padding_bytes or reply.keepalive_comments:
        payloads = _open_ended(answer, reply)
        if request.chunks_understood:
            headers["transfer-encoding"] = "chunked"
            frame, end = chunk_bytes, LAST_CHUNK
    else:
        whole = b"".join(_compressed(answer.pieces) if reply.gzip else answer.pieces)
        if answer.content_type:
            headers["content-length"] = str(len(whole))
        payloads = (_half(whole) if reply.drop == "body" else whole,)
    if reply.drop == "headers" or request.method == "HEAD":
        payloads, end = (), b""
    if reply.byte_delay_s:
        payloads = (bytes((byte,)) for payload in payloads for byte in payload)
    await _send(
        itertools.chain((head_bytes(reply.status, headers | given),), map(frame, payloads)),
        end=b"" if reply.drop else end,
        pause_s=_pause_s(reply),
        to=to,
        before_end=before_end,
    )
    if reply.drop:
        reset(to)
    return keep_alive and not reply.drop


async def _send(
    parts: Iterator[bytes],
    *,
    end: bytes,
    pause_s: float,
    to: asyncio.StreamWriter,
    before_end: Callable[[], object],
) -> None:
    """Write the head with the first part of the body, then part by part, each on its own."""
    part = next(parts) + next(parts, b"")
    # One part is looked ahead: what closes the books must know that a part is the last.
    for following in parts:
        to.write(part)
        await to.drain()
        if pause_s:
            await asyncio.sleep(pause_s)
        part = following
    part += end
    if len(part) > _LARGE_BYTES:
        # A write this long may block half-way, and until then the answer is not complete.
        to.write(part[:-1])
        await to.drain()
        part = part[-1:]
    before_end()
    to.write(part)
    await to.drain()


def _open_ended(answer: Rendered, reply: Reply) -> Iterator[bytes]:
    """Yield a body whose length nobody announces: a stream, or what goes on after the answer."""
    pieces: Iterable[bytes] = answer.pieces
    if reply.keepalive_comments and reply.body is None and not answer.is_stream:
        pieces = ()
    if reply.drop == "body" and (reply.cut_after is None or not answer.is_stream):
        pieces = (_half(b"".join(pieces)),)
    elif not reply.drop:
        pieces = itertools.chain(pieces, _padding(reply.padding_bytes))
        if reply.keepalive_comments:
            is_sse = answer.content_type == "text/event-stream"
            comment = b": keep-alive\n\n" if is_sse else b" "
            pieces = itertools.chain(pieces, itertools.repeat(comment))
    return iter(_compressed(pieces) if reply.gzip else pieces)


def _padding(size_bytes: int) -> Iterator[bytes]:
    for start in range(0, size_bytes, len(_PADDING_BLOCK)):
        yield _PADDING_BLOCK[: size_bytes - start]


def _compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(wbits=31)  # 31: the largest window, with gzip's own header
    for piece in pieces:
        # Flushed, so that each piece can be read when it arrives.
        yield compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH)
    yield compressor.flush()


def _half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def _unframed(data: bytes) -> bytes:
    return data


def _pause_s(reply: Reply) -> float:
    every_s = _KEEPALIVE_EVERY_S if reply.keepalive_comments else 0.0
    return reply.byte_delay_s or reply.chunk_delay_s or every_s
