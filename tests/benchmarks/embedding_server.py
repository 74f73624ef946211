"""A local server of embeddings whose answers are ready before they are asked for.

Every answer holds a full batch of the same vectors, as base64 or as numbers, whichever was asked
for. Not here: the chat server (`server.c`), and what clients do (`embedding.py`).
"""

from __future__ import annotations

import array
import asyncio
import base64
import json
import math
import sys
import threading

BATCH = 200
DIMENSIONS = 1536


def _answer(*, as_base64: bool) -> bytes:
    rows: list[object] = []
    for row in range(BATCH):
        # Of full length when written as numbers, as those of a model are.
        vector = array.array("f", [math.sin(row + place) / 28 for place in range(DIMENSIONS)])
        sent: object = base64.b64encode(vector.tobytes()).decode() if as_base64 else list(vector)
        rows.append({"object": "embedding", "index": row, "embedding": sent})
    body = json.dumps(
        {
            "object": "list",
            "data": rows,
            "model": "text-embedding-3-small",
            "usage": {"prompt_tokens": 8 * BATCH, "total_tokens": 8 * BATCH},
        },
        separators=(",", ":"),
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


_BASE64, _NUMBERS = _answer(as_base64=True), _answer(as_base64=False)


class _Connection(asyncio.Protocol):
    """One client; at most one of its requests is under way."""

    _transport: asyncio.Transport

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        _, _, rest = bytes(self._data[:end]).lower().partition(b"\r\ncontent-length:")
        if len(self._data) < end + 4 + int(rest.partition(b"\r\n")[0] or 0):
            return
        answer = _BASE64 if b'"base64"' in self._data else _NUMBERS
        self._data.clear()
        if self._latency_s:
            self._loop.call_later(self._latency_s, self._transport.write, answer)
        else:
            self._transport.write(answer)


async def _serve(latency_s: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    server = await loop.create_server(lambda: _Connection(latency_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1]) / 1000))
