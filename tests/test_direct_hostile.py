"""The direct transports against servers and proxies that break the rules, byte by byte.

Not here: what a well-spoken server can do wrong (`test_direct_wire.py`, `test_faults.py`).
"""

from __future__ import annotations

import collections
import gzip
import json
import math
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

import anyio.to_thread
import pytest

from dspylite import LM
from dspylite.errors import (
    DeadlineExceededError,
    LMError,
    LMRateLimitError,
    LMServerError,
    LMTransportError,
    LMUnexpectedError,
)
from dspylite.models.direct import awaiting, blocking
from dspylite.models.direct.environment import split_proxy
from dspylite.models.direct.events import EventReader
from dspylite.models.direct.heads import authority_of
from dspylite.models.direct.wire import BodyReader, HttpRequest, Limits, Watch, cause_to_show
from dspylite.testing import FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
PASSWORD = "pa55-word-of-the-proxy"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
awaited = pytest.mark.usefixtures("one_loop")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")

Handler = Callable[[socket.socket, str], None]
"""Answers one request, of which it is given the prompt."""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no proxy of the machine reach a test."""
    for name in _PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class RawServer:
    """A server that says whatever a test has it say.

    Attributes:
        heads: Of all requests.
        connections: How many were accepted.
    """

    def __init__(self, handler: Handler, *, reads: bool = True) -> None:
        self._handler = handler
        self._reads = reads
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._accepted: list[socket.socket] = []
        self.port: int = self._listening.getsockname()[1]
        self.heads: list[str] = []
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> RawServer:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in (self._listening, *self._accepted):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()

    def lm(self, **options: Any) -> LM:
        base = f"http://127.0.0.1:{self.port}/v1"
        given = {"api_base": base, "api_key": KEY, "num_retries": 0, "engine": "direct"}
        return LM("openai/m", **given | options)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.connections += 1
                self._accepted.append(sock)
                if self._reads:
                    thread = threading.Thread(target=self._serve, args=(sock,))
                    self._threads.append(thread)
                    thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError), sock.makefile("rb") as stream:
            while True:
                lines: list[str] = []
                while (line := stream.readline().decode().rstrip("\r\n")) or not lines:
                    if not line:
                        return
                    lines.append(line)
                fields = dict(line.lower().split(": ", 1) for line in lines[1:])
                body = stream.read(int(fields.get("content-length", 0)))
                self.heads.append("\n".join(lines))
                prompt = json.loads(body)["messages"][0]["content"] if body else ""
                self._handler(sock, prompt)


def said(text: str = "hi") -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "\r\n"]
    return "\r\n".join(lines).encode() + body


def friendly(sock: socket.socket, prompt: str) -> None:
    sock.sendall(answer(said(f"to {prompt[:20]}")))


def begin_stream(sock: socket.socket, prompt: str) -> None:
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked"
    sock.sendall(b"%s\r\n\r\n%x\r\n%s\r\n" % (head, len(event), event))


def failure(lm: LM, prompt: str = "hello", **options: Any) -> LMError:
    with pytest.raises(LMError) as caught:
        lm(prompt, **options)
    return caught.value


async def afailure(lm: LM, prompt: str = "hello", **options: Any) -> LMError:
    with pytest.raises(LMError) as caught:
        await lm.acall(prompt, **options)
    return caught.value


def hosts(head: str) -> list[str]:
    return [line for line in head.lower().split("\n") if line.startswith("host:")]


# --- Connections ---------------------------------------------------------------------------------


def test_connection_with_a_malformed_chunk_is_not_used_again() -> None:
    """The next call would read what the server says late to the first (B 4.13)."""
    is_asked_again = threading.Event()

    def handler(sock: socket.socket, prompt: str) -> None:
        if prompt == "first":
            sock.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
            is_asked_again.wait(5)
            sock.sendall(answer(said("to first")))
        else:
            is_asked_again.set()
            friendly(sock, prompt)

    with RawServer(handler) as server:
        lm = server.lm(timeout=3)
        assert type(failure(lm, "first")) is LMTransportError
        assert lm("second") == ["to second"]
        assert server.connections == 2


def test_connection_that_was_idle_for_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something on its way may have forgotten it, and says so to nobody (B 4.7)."""
    with RawServer(friendly) as server:
        lm = server.lm()
        lm("first")
        lm("second")
        assert server.connections == 1
        monkeypatch.setattr(blocking, "KEEP_ALIVE_S", -1.0)
        lm("third")
        assert server.connections == 2
        monkeypatch.undo()
        lm("fourth")
        assert server.connections == 2


def test_connections_ask_whether_the_other_side_lives() -> None:
    """A host that vanished during a long answer says nothing (B 4.7)."""
    with RawServer(friendly) as server:
        server.lm()("hello")
        pool = blocking._CLIENT.pool(f"http://127.0.0.1:{server.port}")
        kept = pool._get_conn()
        assert kept.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        pool._put_conn(kept)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Tell when a byte is waited for; cleared by the test before that."""
    begun, plain = threading.Event(), Watch.next_wait

    def next_wait(watch: Watch) -> float:
        left = plain(watch)
        begun.set()
        return left

    monkeypatch.setattr(Watch, "next_wait", next_wait)
    return begun


def test_stream_is_closed_from_another_thread(waiting: threading.Event) -> None:
    """Who stops an answer need not be who reads it (B 4.13)."""
    with RawServer(begin_stream) as server, ThreadPoolExecutor(1) as other:
        stream = server.lm().stream("hello")
        assert next(stream).text == "a"
        waiting.clear()
        reading = other.submit(lambda: list(stream))
        assert waiting.wait(5)
        started = time.monotonic()
        stream.close()
        error = reading.exception(timeout=5)
        assert time.monotonic() - started < 2
        assert error is None or isinstance(error, LMError)


@awaited
@on_asyncio
async def test_awaited_stream_is_closed_from_another_thread(waiting: threading.Event) -> None:
    """Its loop must hear of it, which sleeps until something happens (B 4.13)."""
    with RawServer(begin_stream) as server:
        stream = await server.lm().astream("hello")
        assert (await anext(stream)).text == "a"
        waiting.clear()

        def close() -> None:
            assert waiting.wait(5)
            stream.close()

        closing = threading.Thread(target=close)  # none of anyio's, whose ends wake the loop
        closing.start()
        started = time.monotonic()
        with anyio.move_on_after(5), suppress(LMError):
            async for _ in stream:
                pass
        closing.join()
        assert time.monotonic() - started < 2
        await stream.aclose()


# --- Time ----------------------------------------------------------------------------------------


@awaited
async def test_deadline_that_passes_while_sending_is_one() -> None:
    """A server that does not read is slow, and its connection is not broken (B 4.7)."""
    with RawServer(friendly, reads=False) as server:
        lm, large = server.lm(), "x" * 12_000_000
        error = await anyio.to_thread.run_sync(lambda: failure(lm, large, deadline_s=0.3))
        assert type(error) is DeadlineExceededError
        assert type(await afailure(lm, large, deadline_s=0.3)) is DeadlineExceededError


def test_sending_may_take_longer_than_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large prompts on slow lines do, and `timeout` allows for it (B 4.7)."""
    monkeypatch.setattr(blocking, "CONNECT_S", 0.05)
    here, there = socket.socketpair()
    watch = Watch(Limits(), "openai/m")
    token = blocking._WATCH.set(watch)
    try:
        with here, there, ThreadPoolExecutor(1) as other:
            pool = blocking._make_pool("http://slow.example")
            connection = pool._new_conn()
            connection.timeout, connection.sock = 0.05, here

            def read_late() -> int:
                time.sleep(0.2)  # longer than a connection may take, which is what this is about
                return sum(map(len, iter(lambda: there.recv(65536), b"")))

            reading = other.submit(read_late)
            connection.request("POST", "/v1", body=b"x" * 4_000_000, headers={})
            here.shutdown(socket.SHUT_WR)
            assert reading.result(timeout=10) > 4_000_000
    finally:
        blocking._WATCH.reset(token)


def test_long_times_are_not_rounded_up() -> None:
    """A deadline of 5.1 s is none of 6 s (B 4.7)."""
    assert awaiting._timeout(Limits(total_s=5.1), 5.1).ceil_threshold == math.inf


# --- Proxies and hosts ---------------------------------------------------------------------------


@awaited
@on_asyncio
async def test_password_of_a_proxy_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries quote the proxy's whole address, and tracebacks end up in logs (B 4.13)."""

    def refuse(sock: socket.socket, prompt: str) -> None:
        sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")

    with RawServer(refuse) as proxy:
        for number, place in enumerate((f"127.0.0.1:{proxy.port}", "127.0.0.1:bad")):
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:{PASSWORD}@{place}")
            lm = proxy.lm(api_base=f"https://behind-a-wall-{number}.example/v1")
            for error in (await afailure(lm), await anyio.to_thread.run_sync(failure, lm)):
                assert type(error) is LMTransportError
                assert PASSWORD not in "".join(traceback.format_exception(error))
        assert len(proxy.heads) == 2
        for head in proxy.heads:
            assert split_proxy(f"http://user:{PASSWORD}@x")[1] in head  # type: ignore[operator]


@pytest.mark.parametrize(
    ("proxy", "place"),
    [
        ("http://a:b@c:1", "http://c:1"),
        ("http://a:b@d/e@c:1", "http://c:1"),
        ("http://c", "http://c"),
    ],
)
def test_proxy_is_parted_from_its_password(proxy: str, place: str) -> None:
    """Also where the password should have been quoted."""
    assert split_proxy(proxy)[0] == place


def test_cause_that_shows_a_password_is_not_shown() -> None:
    """A library's error is printed with ours."""
    error = ValueError("no such place")
    assert cause_to_show(error) is error
    error.__context__ = ValueError(f"http://user:{PASSWORD}@proxy")
    assert cause_to_show(error) is None
    request = HttpRequest(
        method="GET", url="", headers={}, body=None, limits=Limits(), model="openai/m"
    )
    watch = Watch(Limits(), "openai/m")
    for translated in (blocking._translated, awaiting._translated):
        shown = translated(ValueError(f"http://user:{PASSWORD}@proxy"), request, watch)
        assert PASSWORD not in str(shown)


def test_host_behind_a_proxy_is_the_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of many names choose by it (B 4.13)."""
    with RawServer(friendly) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        proxy.lm(api_base="http://plain-behind-a-proxy.example/v1")("hello")
        proxy.lm(api_base="http://plain-behind-a-proxy.example:8443/v1")("hello")
        assert [hosts(head) for head in proxy.heads] == [
            ["host: plain-behind-a-proxy.example"],
            ["host: plain-behind-a-proxy.example:8443"],
        ]


def test_host_within_a_tunnel_is_the_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is no party to what is said in it (B 4.13)."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    connection = blocking._make_pool("https://tunnelled.example")._new_conn()
    here, there = socket.socketpair()
    token = blocking._WATCH.set(Watch(Limits(), "openai/m"))
    try:
        with here, there:
            connection.host, connection.port = "proxy.example", 3128  # as urllib3 has it then
            connection.sock = here
            connection.request("GET", "/v1", headers={})
            assert b"\r\nhost: tunnelled.example\r\n" in there.recv(65536)
    finally:
        blocking._WATCH.reset(token)


def test_port_is_left_out_only_where_it_is_the_schemes_own() -> None:
    """The ports of the other scheme are ports like any."""
    cases = [("http", 80), ("http", 443), ("https", 443), ("https", 80), ("https", None)]
    written = [authority_of(scheme, "x", port) for scheme, port in cases]
    assert written == ["x", "x:443", "x", "x:80", "x"]


@awaited
async def test_host_that_is_given_is_the_only_one() -> None:
    """Two are refused by many servers, and mistaken for each other by the rest (B 4.13)."""
    with RawServer(friendly) as server:
        lm = server.lm(extra_headers={"Host": "virtual.example"})
        await anyio.to_thread.run_sync(lm, "hello")
        await lm.acall("hello")
        assert [hosts(head) for head in server.heads] == [["host: virtual.example"]] * 2


# --- Bodies --------------------------------------------------------------------------------------


def reader_of_gzip(max_bytes: int = 10**6) -> BodyReader:
    return BodyReader({"content-encoding": "gzip"}, Limits(max_bytes=max_bytes), "openai/m")


@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_gzip_of_many_members_is_one_text(step: int) -> None:
    """Servers that compress each piece by itself send it so (B 4.13)."""
    body = b"".join(gzip.compress(piece) for piece in (b"hello ", b"", b"world")) + bytes(100)
    reader = reader_of_gzip()
    read = [reader.feed(body[start : start + step]) for start in range(0, len(body), step)]
    reader.finish()
    assert b"".join(read) == b"hello world"


def test_bytes_behind_a_gzip_are_refused() -> None:
    """They would be kept, and copied with each that follows (B 4.13)."""
    reader = reader_of_gzip()
    assert reader.feed(gzip.compress(b"hello")) == b"hello"
    with pytest.raises(LMServerError, match="gzip"):
        reader.feed(b"junk" * 100)


@pytest.mark.parametrize("piece", [bytes(65536), gzip.compress(b"") * 3000], ids=["zeros", "empty"])
def test_gzip_that_holds_nothing_ends(piece: bytes) -> None:
    """What decompresses to nothing never reaches a limit of what it decompresses to (B 4.13)."""
    reader = reader_of_gzip()
    reader.feed(gzip.compress(b"hello"))
    with pytest.raises(LMUnexpectedError):
        collections.deque(map(reader.feed, [piece] * 1000), maxlen=0)


def test_empty_body_is_no_cut_gzip() -> None:
    """Proxies announce the encoding also of nothing."""
    reader = reader_of_gzip()
    reader.finish()
    reader.feed(gzip.compress(b"hello")[:-3])
    with pytest.raises(LMServerError, match="cut"):
        reader.finish()


LIMITED = "429 Too Many Requests"
UNREADABLE = {
    "brotli": answer(b"\x1b\x03\x00", LIMITED, "retry-after: 0.02", "content-encoding: br"),
    "no gzip": answer(b"slow down", LIMITED, "retry-after: 0.02", "content-encoding: gzip"),
    "cut": answer(b"x" * 100, LIMITED, "retry-after: 0.02", "connection: close")[:-90],
    "too large": answer(b"x" * 5000, LIMITED, "retry-after: 0.02"),
}


@awaited
@pytest.mark.parametrize("sent", list(UNREADABLE.values()), ids=list(UNREADABLE))
async def test_failure_with_an_unreadable_body_keeps_its_status(sent: bytes) -> None:
    """Status and headers say when to ask again; the body only explains (B 4.7)."""

    def handler(sock: socket.socket, prompt: str) -> None:
        sock.sendall(sent)
        if b"connection: close" in sent:
            sock.shutdown(socket.SHUT_RDWR)

    with RawServer(handler) as server:
        lm = server.lm(max_response_bytes=1000)
        errors = [await anyio.to_thread.run_sync(failure, lm), await afailure(lm)]
        with pytest.raises(LMError) as caught:
            await lm.astream("hello")
        for error in (*errors, caught.value):
            assert (type(error), error.status, error.retry_after) == (LMRateLimitError, 429, 0.02)
            assert "\ufffd" not in error.message


@awaited
async def test_long_headers_are_read() -> None:
    """Gateways write policies and whole tokens into them (B 4.13)."""
    with RawServer(
        lambda sock, _: sock.sendall(answer(said(), "200 OK", f"x: {'a' * 60_000}"))
    ) as (server):
        lm = server.lm()
        assert await anyio.to_thread.run_sync(lm, "hello") == ["hi"]
        assert await lm.acall("hello") == ["hi"]


@awaited
@on_asyncio
async def test_large_prompt_is_sent_without_a_warning() -> None:
    """Programs turn warnings into errors; and the loop has others to serve."""
    with RawServer(friendly) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert await server.lm().acall("x" * 2_000_000) == [f"to {'x' * 20}"]
    assert "content-length: 2" in server.heads[0].lower()


# --- Events --------------------------------------------------------------------------------------


def test_long_line_in_small_pieces_takes_time_in_proportion() -> None:
    """A picture is one line of megabytes, and takes the loop from all others (B 4.13)."""
    reader = EventReader(max_bytes=10**8, model="m")
    started = time.process_time()
    list(reader.feed(b"data: "))
    for _ in range(4096):
        assert list(reader.feed(b"x" * 1024)) == []
    (event,) = reader.feed(b"\n\n")
    assert len(event) == 4096 * 1024
    assert time.process_time() - started < 2  # once more than ten


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_events_are_the_same_in_any_pieces(end: bytes, mark: bytes, step: int) -> None:
    """A server chooses how its lines end, and a network where its pieces do."""
    lines = [b"data: one", b"", b": note", b"data:two", b"data: three", b"", b"data: last"]
    stream = mark + end.join(lines) + end
    reader = EventReader(max_bytes=len(stream), model="m")
    pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
    events = [event for piece in pieces for event in reader.feed(piece)]
    assert [*events, *reader.finish()] == [b"one", b"two\nthree", b"last"]


SLOW_REFUSAL = Reply(status=429, headers={"retry-after": "7"}, body="x" * 600, byte_delay_s=0.1)


@pytest.mark.timeout(20)
def test_slow_text_of_a_failure_does_not_hold_its_status_up() -> None:
    """What a 429 asks for is in its head; a minute of dripping text adds nothing (B 4.7)."""
    with FakeServer() as server:
        server.script(SLOW_REFUSAL)
        lm = LM("openai/m", api_base=server.base_url, api_key="none", num_retries=0)
        with pytest.raises(LMRateLimitError) as raised:
            lm("hi")
    assert raised.value.retry_after_s == 7


@pytest.mark.timeout(20)
@pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
async def test_slow_text_of_an_awaited_failure_does_not_hold_its_status_up() -> None:
    """Likewise on an event loop (B 4.7)."""
    with FakeServer() as server:
        server.script(SLOW_REFUSAL)
        lm = LM("openai/m", api_base=server.base_url, api_key="none", num_retries=0)
        with pytest.raises(LMRateLimitError) as raised:
            await lm.acall("hi")
    assert raised.value.retry_after_s == 7
