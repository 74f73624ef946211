"""HTTP exchanges of the direct engine that are broken off half-way, and what nobody learns from it.

Not here: the flag, and the waits between exchanges (`test_cancellation.py`).
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.errors import CallCancelledError
from dspylite.models.adaptive import Adaptive
from dspylite.models.breaker import CircuitBreaker
from dspylite.models.limits import MaxConcurrency
from dspylite.models.rates import RateLimit
from dspylite.models.retry import Retry
from dspylite.runtime.cancellation import Cancellation
from dspylite.testing import FakeServer, Reply

SOON_S = 5.0
"""Far above what stopping takes on a busy machine, far below any limit of an exchange."""


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


def lm_of(api_base: str, **options: Any) -> dspy.LM:
    given = {"api_base": api_base, "api_key": "none", "num_retries": 0, "engine": "direct"}
    return dspy.LM("openai/m", **given | options)


class Worker:
    """Work on a thread of its own, under a flag of its own."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.flag = Cancellation()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        with self.flag:
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                self._error = error

    def end(self) -> BaseException | None:
        """Wait until the thread has ended; return what its work raised."""
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), "it still waits"
        return self._error

    def cancelled(self) -> CallCancelledError:
        """Raise the flag, wait until the thread has ended, and return the error of its work."""
        self.flag.cancel("the test says so")
        error = self.end()
        assert type(error) is CallCancelledError
        assert "the test says so" in str(error)
        assert error.__cause__ is not error
        assert self.flag._watchers == {}
        return error


# --- Every moment of an exchange ------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
EVENT = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
EVENTS = OK + b"content-type: text/event-stream\r\n"
MOMENTS: dict[str, tuple[bytes, bytes]] = {
    # what is sent at once, and what is then sent again and again
    "before the head": (b"", b""),
    "in the head": (OK + b"x-slow: ", b"a"),
    "in a head that stands still": (OK, b""),
    "before the body": (OK + b"content-length: 999999\r\n\r\n", b""),
    "in an announced body": (OK + b"content-length: 999999\r\n\r\n", b" "),
    "in a chunked body": (OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "in a chunked body that stands still": (OK + b"transfer-encoding: chunked\r\n\r\n5\r\n1", b""),
    "in a body up to the close": (OK + b"connection: close\r\n\r\n", b" "),
    "in the text of a failure": (b"HTTP/1.1 500 No\r\ncontent-length: 999999\r\n\r\n", b" "),
    "in a stream": (EVENTS + b"connection: close\r\n\r\n" + EVENT, b": alive\n\n"),
    "in a stream that stands still": (
        EVENTS + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(EVENT), EVENT),
        b"",
    ),
}


class SlowServer:
    """Answers one request without ever coming to an end, until the client has left.

    Attributes:
        begun: Set when what is sent at once was sent.
        left: Set when the client has closed the connection.
    """

    def __init__(
        self, head: bytes, drop: bytes, tls: ssl.SSLContext | None, *, reads: bool = True
    ) -> None:
        self.begun, self.left = threading.Event(), threading.Event()
        self._head, self._drop, self._tls, self._reads = head, drop, tls, reads
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SOON_S)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def base_url(self) -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def _serve(self) -> None:
        plain, _ = self._listener.accept()
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(plain)
            client.settimeout(SOON_S)
            if self._tls is not None:
                client = stack.enter_context(self._tls.wrap_socket(client, server_side=True))
            client.recv(1024 if self._reads else 1)
            client.sendall(self._head)
            self.begun.set()
            client.settimeout(0.01)
            ends_at = time.monotonic() + 2 * SOON_S
            while time.monotonic() < ends_at:
                try:
                    if self._drop:
                        client.sendall(self._drop)
                    if not client.recv(1 << 20 if self._reads else 1):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                return
        self.left.set()

    def close(self) -> None:
        self._thread.join(3 * SOON_S)
        self._listener.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """Make a certificate for this machine, signed by itself, and a server's context with it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no `openssl` to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    key, chain = folder / "key.pem", folder / "chain.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            *("-keyout", str(key), "-out", str(chain)),
        ],
        check=True,
        capture_output=True,
        timeout=20,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    return chain, context


def _call(lm: dspy.LM) -> None:
    lm("hi")


def _read_stream(lm: dspy.LM) -> None:
    with lm.stream("hi") as stream:
        list(stream)


@pytest.mark.parametrize("wire", ["plain", "tls"])
@pytest.mark.parametrize("how", [_call, _read_stream], ids=["call", "stream"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_exchange_is_broken_off_at_every_moment(
    moment: str,
    how: Callable[[dspy.LM], None],
    wire: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server sees the connection close, and the thread goes on at once (B 3.2)."""
    context = None
    if wire == "tls":
        chain, context = request.getfixturevalue("tls")
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    server = SlowServer(*MOMENTS[moment], context)
    try:
        worker = Worker(lambda: how(lm_of(server.base_url)))
        assert server.begun.wait(SOON_S)
        worker.cancelled()
        assert server.left.wait(SOON_S)
    finally:
        server.close()


@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_an_exchange_is_broken_off_while_it_is_sent(
    wire: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that reads nothing holds up a large request (B 3.2)."""
    context = None
    if wire == "tls":
        chain, context = request.getfixturevalue("tls")
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    server = SlowServer(b"", b"", context, reads=False)
    try:
        worker = Worker(lambda: lm_of(server.base_url)("x" * 30_000_000))
        assert server.begun.wait(SOON_S)
        worker.cancelled()
    finally:
        server.close()


def test_the_server_sees_a_held_call_leave(server: FakeServer) -> None:
    """And nothing of it is sent again, though retries are left (B 3.2)."""
    with server.hold():
        worker = Worker(lambda: lm_of(server.base_url, num_retries=5)("held"))
        server.wait_for_requests(1)
        worker.cancelled()
        server.wait_until_idle()
    assert [request.client_left for request in server.requests] == [True]


def test_a_flag_raised_before_the_request_sends_nothing(server: FakeServer) -> None:
    """Also where the flag is raised between the look at it and the sending (B 3.2)."""
    flag = Cancellation()

    class RaiseIt:
        async def handle(self, request: Any, call_next: Any, io: Any) -> Any:
            flag.cancel("just now")
            return await call_next(request)

    with flag, pytest.raises(CallCancelledError, match="just now"):
        lm_of(server.base_url, middleware=[RaiseIt()])("never sent")
    assert server.requests == ()


def test_one_flag_breaks_off_all_exchanges_under_it_and_no_others(server: FakeServer) -> None:
    """A neighbour on the same endpoint, with a flag of its own, is not disturbed (B 1.7, 3.2)."""
    lm = lm_of(server.base_url)
    neighbours: list[Any] = []
    with server.hold():
        worker = Worker(lambda: dspy.Parallel(num_threads=4).over(lm, ["held"] * 4))
        others = [Worker(lambda: neighbours.append(lm("neighbour"))) for _ in range(3)]
        server.wait_for_requests(7)
        worker.cancelled()
    assert [other.end() for other in others] == [None] * 3
    assert neighbours == [["echo: neighbour"]] * 3
    left = {request.prompt for request in server.requests if request.client_left}
    assert left == {"held"}


def test_a_flag_raised_as_an_exchange_ends_leaves_its_connection_alone() -> None:
    """By then the connection may be another caller's, who would see it break (B 1.7, 3.2)."""
    told: list[Callable[[], object]] = []
    flag = Cancellation()

    def answer(body: object) -> str:
        told.extend(flag._watchers.values())  # what a raiser of the flag holds at this moment
        return "hello"

    with FakeServer(answer=answer) as server:
        lm = lm_of(server.base_url)
        with flag:
            lm("first")
        assert told
        for tell in told:
            tell()
        lm("second")
        assert [request.connection for request in server.requests] == [0, 0]


def test_calls_cancelled_at_random_moments_break_nobody_elses(server: FakeServer) -> None:
    """Connections go from caller to caller, and with them must go no flag (B 1.7, 3.2)."""
    lm = lm_of(server.base_url, adaptive=False)
    over = threading.Event()
    rand = random.Random(1)

    def go_on_calling() -> None:
        while not over.is_set():
            lm("neighbour")

    neighbours = [Worker(go_on_calling) for _ in range(2)]
    for _ in range(200):
        worker = Worker(lambda: lm("cancelled"))
        over.wait(rand.random() * 0.004)
        worker.flag.cancel("at some moment")
        assert isinstance(worker.end(), CallCancelledError | None)
    over.set()
    assert [neighbour.end() for neighbour in neighbours] == [None, None]


# --- What nobody learns from it -------------------------------------------------------------------


def policy(lm: dspy.LM, kind: Any) -> Any:
    (found,) = [each for each in lm.middleware if isinstance(each, kind)]
    return found


def test_no_policy_takes_a_cancelled_call_for_a_failure(server: FakeServer) -> None:
    """The endpoint did nothing wrong: breaker, retries and gate stay as they were (B 3.2)."""
    lm = lm_of(server.base_url, num_retries=3, circuit_breaker=True, max_concurrency=40)
    lm("an answer, so that the gate knows the endpoint")
    gate, budget = policy(lm, Adaptive).gate, policy(lm, Retry).budget
    limit, tokens = gate.control.limit, budget._tokens
    for _ in range(4):
        server.clear()
        with server.hold():
            workers = [Worker(lambda: lm("held")) for _ in range(4)]
            server.wait_for_requests(4)
            for worker in workers:
                worker.cancelled()
    health = lm.health()
    assert (health.state, health.failures, health.last_error) == ("closed", 0, None)
    assert budget._tokens == tokens
    assert gate.control.limit >= limit
    assert (gate.control.inside, gate.control.rate, gate.control.down_since) == (0, None, None)
    assert policy(lm, MaxConcurrency).waiting == 0


def test_cancelled_calls_give_all_their_places_back(server: FakeServer) -> None:
    """Whether they had one or stood in line for it (B 3.2, 4.5)."""
    lm = lm_of(server.base_url, max_concurrency=2)
    places = policy(lm, MaxConcurrency)
    with server.hold():
        workers = [Worker(lambda: lm("held")) for _ in range(8)]
        server.wait_for_requests(2)
        ends_at = time.monotonic() + SOON_S
        while places.waiting < 6 and time.monotonic() < ends_at:
            time.sleep(0.001)
        for worker in workers:
            worker.flag.cancel("the test says so")
        for worker in workers:
            worker.cancelled()
    assert len(server.requests) <= 2 + 2  # a place may pass on to one whose flag is raised next
    server.clear()
    with server.hold():
        two = [Worker(lambda: lm("again")) for _ in range(2)]
        server.wait_for_requests(2)
    assert [worker.end() for worker in two] == [None, None]
    assert server.max_in_flight == 2


@pytest.mark.parametrize("below", [MaxConcurrency(1), None], ids=["concurrency", "adaptive"])
def test_a_call_cancelled_in_a_later_line_costs_no_turn(
    below: MaxConcurrency | None, server: FakeServer
) -> None:
    """It was never sent, so it must not count for the minute's requests (B 3.2, 4.5)."""
    rate = RateLimit(rpm=2)
    options: dict[str, Any] = {"middleware": [rate] if below is None else [rate, below]}
    if below is not None:
        options["adaptive"] = False
    lm = lm_of(server.base_url, **options)
    with contextlib.ExitStack() as stack:
        if below is None:
            gate = policy(lm, Adaptive).gate
            server.script(Reply(status=429, headers={"retry-after": "1"}))
            with pytest.raises(dspy.LMRateLimitError):
                lm("first")
            line: Any = gate
        else:
            stack.enter_context(server.hold())
            first = Worker(lambda: lm("first"))
            server.wait_for_requests(1)
            line = below
        worker = Worker(lambda: lm("in line"))
        ends_at = time.monotonic() + SOON_S
        while not line.waiting and time.monotonic() < ends_at:
            time.sleep(0.001)
        worker.cancelled()
    if below is not None:
        assert first.end() is None
    with dspy.context(deadline_s=SOON_S):
        assert lm("second") == ["echo: second"]
    assert len(server.requests) == 2


async def test_a_task_cancelled_in_a_later_line_costs_no_turn(server: FakeServer) -> None:
    """Likewise on an event loop, whose own cancellation comes without a flag (B 3.2, 4.5)."""
    below = MaxConcurrency(1)
    lm = lm_of(server.base_url, middleware=[RateLimit(rpm=2), below], adaptive=False)
    with server.hold():
        first = Worker(lambda: lm("first"))
        await anyio.to_thread.run_sync(server.wait_for_requests, 1)
        async with anyio.create_task_group() as group:
            group.start_soon(lm.acall, "in line")
            with anyio.fail_after(SOON_S):
                while not below.waiting:
                    await anyio.sleep(0.001)
            group.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(first.end) is None
    with dspy.context(deadline_s=SOON_S):
        assert await lm.acall("second") == ["echo: second"]


def test_a_cancelled_probe_gives_its_place_to_the_next_call(server: FakeServer) -> None:
    """It has told nothing of the endpoint; the circuit must not stay half open (B 3.2, 4.6)."""
    breaker = CircuitBreaker(min_calls=1, failure_ratio=0.5, cool_down_s=0.01)
    lm = lm_of(server.base_url, circuit_breaker=breaker, adaptive=False)
    server.script(Reply(status=500))
    with pytest.raises(dspy.LMServerError):
        lm("opens it")
    ends_at = time.monotonic() + SOON_S
    while breaker.health().next_probe_s and time.monotonic() < ends_at:
        time.sleep(0.001)
    with server.hold():
        worker = Worker(lambda: lm("the probe"))
        server.wait_for_requests(2)
        assert breaker.health().state == "half_open"
        with pytest.raises(dspy.CircuitOpenError):
            lm("not while the probe is out")
        worker.cancelled()
        assert breaker.health().state == "open"
        assert breaker.health().next_probe_s == 0.0
    assert lm("the next probe") == ["echo: the next probe"]
    assert breaker.health().state == "closed"


@pytest.mark.parametrize("on", [None, (Exception,)], ids=["usual", "any error"])
def test_a_cancelled_call_asks_no_fallback(on: Any, server: FakeServer) -> None:
    """Nobody wants the answer any more, whoever gives it (B 3.2, 4.6)."""
    with FakeServer() as other:
        fallback = lm_of(other.base_url)
        lm = lm_of(server.base_url, fallbacks=[fallback], fallback_on=on)
        with server.hold():
            worker = Worker(lambda: lm("held"))
            server.wait_for_requests(1)
            worker.cancelled()
        assert other.requests == ()


def test_a_stream_of_a_cancelled_reader_gives_its_place_back(server: FakeServer) -> None:
    """It holds one until it is over, and a flag is one of the ways to be over (B 3.2, 4.5)."""
    lm = lm_of(server.base_url, max_concurrency=1, circuit_breaker=True)
    begun = threading.Event()
    server.script(Reply(chunks=["a"] * 200, chunk_delay_s=0.1))

    def read() -> None:
        for _ in lm.stream("hi"):
            begun.set()

    worker = Worker(read)
    assert begun.wait(SOON_S)
    worker.cancelled()
    assert lm("the place is free") == ["echo: the place is free"]
    assert lm.health().failures == 0
    server.wait_until_idle()
    assert server.requests[0].client_left


def test_a_cancelled_call_is_told_to_callbacks_and_counts_nothing(server: FakeServer) -> None:
    """Whoever traces calls sees how it ended; usage knows only what was answered (B 4.10, 4.15)."""
    ends: list[BaseException | None] = []

    class Listener(dspy.BaseCallback):
        def on_lm_end(
            self, call_id: str, outputs: Any, exception: BaseException | None = None
        ) -> None:
            ends.append(exception)

    lm = lm_of(server.base_url, callbacks=[Listener()])
    with dspy.track_usage() as usage:
        with server.hold():
            worker = Worker(dspy.bind(lambda: lm("held")))
            server.wait_for_requests(1)
            worker.flag.cancel("no flag of the bound context, so this stops nothing")
        assert worker.end() is None
        flag = Cancellation()
        with server.hold(), flag:
            thread = threading.Thread(target=dspy.bind(lambda: _quietly(lambda: lm("held"))))
            thread.start()
            server.wait_for_requests(2)
            flag.cancel("the test says so")
            thread.join(SOON_S)
    assert [type(end) for end in ends] == [type(None), CallCancelledError]
    assert usage.by_model["openai/m"].calls == 1
    assert len(lm.history) == 1


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(CallCancelledError):
        work()
