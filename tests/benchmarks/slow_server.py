"""The server in Python, for machines without a C compiler or without epoll.

It has the command line and the answers of `server.c`, and a far lower ceiling: its figures show
themselves as much as the clients. Not here: which of the two is started (`server.py`).
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

from tests.benchmarks.limits import allow_many_files

# Must match server.c.
_BODY = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,'
    b'"model":"gpt-4o-mini","choices":[{"index":0,"message":{"role":"assistant","content":'
    b'"[[ ## answer ## ]]\\nParis\\n\\n[[ ## completed ## ]]","refusal":null},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":120,'
    b'"completion_tokens":20,"total_tokens":140},"system_fingerprint":"fp_bench"}'
)
_REFUSAL = (
    b'{"error":{"message":"only POST /v1/chat/completions with a Content-Length",'
    b'"type":"invalid_request_error","param":null,"code":null}}'
)
_TARGET = b"POST /v1/chat/completions "


def _response(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


_GOOD = _response(b"200 OK", _BODY)
_BAD = _response(b"404 Not Found", _REFUSAL)


class _Connection(asyncio.Protocol):
    """One client; at most one of its requests is under way."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()
        self._whole = 0  # bytes of the request under way; 0 until its headers are complete
        self._found = self._keep = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._whole:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_headers(bytes(self._data[:end]))
        if len(self._data) < self._whole:
            return
        self._data.clear()
        self._whole = 0
        if self._latency_s and self._found:
            self._loop.call_later(self._latency_s, self._answer)
        else:
            self._answer()

    def _read_headers(self, headers: bytes) -> None:
        lower = headers.lower()
        _, length, rest = lower.partition(b"\r\ncontent-length:")
        self._whole = len(headers) + 4 + int(rest.partition(b"\r\n")[0] or 0)
        self._found = bool(length) and headers.startswith(_TARGET)
        _, _, connection = lower.partition(b"\r\nconnection:")
        self._keep = self._found and b"close" not in connection.partition(b"\r\n")[0]

    def _answer(self) -> None:
        self._transport.write(_GOOD if self._found else _BAD)
        if not self._keep:
            self._transport.close()


async def _serve(latency_s: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    server = await loop.create_server(lambda: _Connection(latency_s), "127.0.0.1", 0, backlog=8192)
    print(server.sockets[0].getsockname()[1], flush=True)

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await ended.wait()


class _Asker(asyncio.Protocol):
    """One connection of the load: it asks again as soon as it has its answer."""

    answers = 0
    _request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nContent-Length: 512\r\n\r\n" + b"x" * 512
    )

    def __init__(self) -> None:
        self._got = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got >= len(_GOOD):
            self._got = 0
            _Asker.answers += 1
            self._transport.write(self._request)


async def _load(port: int, count: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    for _ in range(count):
        await loop.create_connection(_Asker, "127.0.0.1", port)
    await asyncio.sleep(seconds)
    print(round(_Asker.answers / (time.perf_counter() - start)))


if __name__ == "__main__":
    allow_many_files()
    if sys.argv[1:2] == ["--load"]:
        asyncio.run(_load(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    else:
        asyncio.run(_serve(float(sys.argv[1]) / 1000 if sys.argv[1:] else 0.0))
