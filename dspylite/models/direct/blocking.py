"""HTTP from any thread, over urllib3's connection pools.

Every read is bounded by the attempt's own limits, headers included. Not here: the async form
(`awaiting.py`).
"""

from __future__ import annotations

import atexit
import codecs
import functools
import http.client
import io
import math
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from dspylite.errors import (
    CallCancelledError,
    DSPyError,
    LMError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.direct.environment import proxy_for, split_proxy, tls_context
from dspylite.models.direct.heads import Head, authority_of, head_of, read_head
from dspylite.models.direct.wire import (
    CHUNK_BYTES,
    CONNECT_S,
    ERROR_BODY_S,
    WIND_UP_S,
    BodyReader,
    HttpAnswer,
    HttpRequest,
    Watch,
    cause_to_show,
    is_blank,
    without_user_info,
)
from dspylite.runtime.cancellation import CANCELLATION
from dspylite.runtime.forks import loading, watch_forks

MAX_KEPT_CONNECTIONS = 1024
"""Idle connections kept for each host: as many as threads are likely to call at once. Those beyond
are closed after use."""

KEEP_ALIVE_S = 30.0
"""How long an idle connection is used again; below what common servers and balancers allow (60 s).
An older one may be forgotten somewhere on its way, which nobody tells."""

_RECORD_BYTES = 16 * 1024
"""What TLS sends at once, and waits for by itself."""

_WATCH: ContextVar[Watch | None] = ContextVar("dspylite_http_watch", default=None)
"""The watch of the exchange on this thread, for the connection, which urllib3 gives no way to pass
one to."""


class _TimedReader(io.RawIOBase):
    """A socket's reading end on which no read waits longer than the watch allows."""

    def __init__(self, raw: Any, sock: socket.socket, watch: Watch) -> None:
        self._raw = raw
        self._sock = sock
        self._watch = watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._sock.settimeout(self._watch.next_wait())
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """The standard library's answer, with every byte waited for under the exchange's watch.

    Attributes:
        is_complete: Whether the body was read to its end and found whole. The standard library
            closes an answer that it cannot read, too.
    """

    is_complete = False

    # What urllib3's pool notes on an answer and asks it for.
    retries: Any = None
    length_remaining: int | None = None
    version_string = "HTTP/1.1"
    _pool: Any = None
    _connection: Any = None

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._sock = sock
        watch = _WATCH.get()
        if watch is not None:
            plain: Any = self.fp
            self.fp = io.BufferedReader(_TimedReader(plain.detach(), sock, watch))

    def begin(self) -> None:
        """Read the head of the answer.

        The standard library reads it with its parser for e-mails, which costs as much as the whole
        rest of a call. What follows the head is left to the standard library.
        """
        head = read_head(self.fp)
        self.code = self.status = head.status
        self.reason, self.version = head.reason, head.version
        plain: Any = head.headers  # in the place of an e-mail's headers
        self.headers = self.msg = plain
        encoding = head.headers.get("transfer-encoding", "").lower()
        self.chunked = encoding == "chunked"
        self.chunk_left = None
        self.length = None if encoding else _announced_length(head)
        connection = head.headers.get("connection", "").lower()
        keeps = "close" not in connection if head.version == 11 else "keep-alive" in connection
        self.will_close = not keeps or (self.length is None and not self.chunked)

    def release(self) -> None:
        """Give the connection back to its pool, if the body was read to its end, else close it."""
        connection = vars(self).pop("_connection", None)  # one step: other threads may close, too
        if connection is None:
            return
        if self.is_complete:
            connection.kept_at = time.monotonic()
        else:
            _shut_down(self._sock)  # a thread that waits for a byte holds the lock of the reader
            self.close()
            connection.close()
        self._pool._put_conn(connection)  # noqa: SLF001  # as urllib3's own answers do


class _Client:
    """The connection pools of this process; a forked child starts with none."""

    def __init__(self) -> None:
        self._inherited: list[Any] = []
        self._lock = threading.Lock()  # guards the making of a pool; reads take no lock
        self._pools: dict[str, Any] = {}
        watch_forks(self)

    def reset_after_fork(self) -> None:
        # Kept, not closed: closing would say goodbye on connections that the parent still uses.
        self._inherited.append(self._pools)
        self._lock = threading.Lock()
        self._pools = {}

    def close(self) -> None:
        """Close every idle connection."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def pool(self, origin: str) -> Any:
        """Return the pool of a scheme and host, such as `"https://api.openai.com"`."""
        pool = self._pools.get(origin)
        if pool is None:
            with self._lock:
                pool = self._pools.get(origin)
                if pool is None:
                    pool = self._pools[origin] = _make_pool(origin)
        return pool


@functools.cache
def _load_urllib3() -> Any:
    with loading():
        import urllib3  # noqa: PLC0415  # costs 40 ms, so on the first call only

        codecs.lookup("idna")  # what names of hosts are written in, loaded when it is looked for

    return urllib3


def preload() -> None:
    """Load what the first exchange would load; nothing is sent."""
    _load_urllib3()
    tls_context()


def _connection_class(scheme: str, host: str) -> Any:
    """Make a connection that urllib3 opens and keeps, and on which each side says all at once.

    urllib3's own way wraps each answer twice and sends in two pieces, which costs twice the time;
    with many threads each piece also waits for its turn of the interpreter.

    Args:
        scheme: Of the connection itself, which may lead to a proxy.
        host: Of the endpoint, as requests name it.
    """
    connection = _load_urllib3().connection
    base: Any = connection.HTTPSConnection if scheme == "https" else connection.HTTPConnection

    class Connection(base):  # type: ignore[misc]
        kept_at = math.inf
        """When it was given back."""

        @property
        def is_connected(self) -> bool:
            if time.monotonic() - self.kept_at > KEEP_ALIVE_S:
                return False
            connected: bool = super().is_connected
            return connected

        def request(
            self, method: str, url: str, body: bytes | None = None, headers: Any = None, **_: Any
        ) -> None:
            if self.sock is None:
                self.connect()
            sock: Any = self.sock
            watch: Any = _WATCH.get()  # `open_stream` has set it
            watch.on_stop(functools.partial(_shut_down, sock))
            data = memoryview(head_of(method, url, host=host, headers=headers, body=body))
            # A plain socket counts its time over all of what is sent, TLS anew for each record.
            step = len(data) if type(sock) is socket.socket else _RECORD_BYTES
            for start in range(0, len(data), step):
                sock.settimeout(watch.next_wait())
                sock.sendall(data[start : start + step])

        def getresponse(self) -> _Response:
            response = _Response(self.sock)
            try:
                response.begin()
            except BaseException:
                response.close()
                raise
            if response.will_close:
                self.close()  # the answer holds the socket until it is read
            return response

    return Connection


def _make_pool(origin: str) -> Any:
    urllib3 = _load_urllib3()
    scheme, _, host = origin.partition("://")
    connections: Any = urllib3.connection.HTTPConnection
    options: dict[str, Any] = {
        "maxsize": MAX_KEPT_CONNECTIONS,
        "block": False,
        "socket_options": [
            *connections.default_socket_options,
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        ],
    }
    if scheme == "https":
        options["ssl_context"] = tls_context()
    proxy = proxy_for(scheme, host)
    if proxy is None:
        manager = urllib3.PoolManager(num_pools=1, **options)
    else:
        proxy, authorization = split_proxy(proxy)
        headers = None if authorization is None else {"proxy-authorization": authorization}
        manager = urllib3.ProxyManager(proxy, num_pools=1, proxy_headers=headers, **options)
    pool = manager.connection_from_url(origin)
    asked = urllib3.util.parse_url(origin)
    pool.ConnectionCls = _connection_class(
        pool.scheme, authority_of(scheme, asked.host.rstrip("."), asked.port)
    )
    return pool


_CLIENT = _Client()
atexit.register(_CLIENT.close)


class BlockingStream:
    """An answer that is read piece by piece.

    Attributes:
        status: HTTP status.
        headers: Names in lower case.
    """

    def __init__(self, response: Any, request: HttpRequest, watch: Watch) -> None:
        self._response = response
        self._request = request
        self._watch = watch
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        self._is_closed = False
        self._body = BodyReader(
            self.headers, request.limits, request.model, is_lenient=self.status >= 300
        )

    def read(self) -> bytes:
        """Wait for some more of the body; empty at its end.

        Raises:
            LMTransportError: The connection broke.
            LMTimeoutError: Nothing came in time.
        """
        try:
            while data := self._response.read1(CHUNK_BYTES):
                if decoded := self._body.feed(data):
                    return decoded
            self._watch.close()  # before it is asked whether it was broken off
            self._check_end()
            self._response.close()
            self._response.is_complete = True
            self._response.release()
        except (LMError, CallCancelledError):
            self.close()
            raise
        except Exception as error:  # noqa: BLE001  # the border: what urllib3 raises is translated here
            if self._is_closed:  # by another thread; what broke is only what that has broken
                raise self._closed_error() from None
            self.close()
            raise _translated(error, self._request, self._watch) from cause_to_show(error)
        return b""

    def _check_end(self) -> None:
        """Refuse a body that ended too early, which the standard library lets pass."""
        if self._watch.failure is not None:  # broken off, which may look like an end
            raise self._watch.failure
        if self._is_closed:
            raise self._closed_error()
        if self._response.length:
            raise http.client.IncompleteRead(b"", self._response.length)
        self._body.finish()

    def _closed_error(self) -> LMError:
        return LMTransportError(
            f"{self._request.model}: the answer was closed before its end.",
            model=self._request.model,
        )

    def content(self) -> None:
        """Note that what was read was content."""
        self._watch.content()

    def read_all(self) -> bytes:
        """Wait for the rest of the body; where the status is no success, what there is of it."""
        pieces: list[bytes] = []
        if self.status >= 300:
            self._watch.hurry(ERROR_BODY_S)
        try:
            while piece := self.read():
                pieces.append(piece)
                if not is_blank(piece):
                    self._watch.content()
        except LMError:
            if self.status < 300:
                raise
            # Status and headers say what to do; the text, whose rest is lost, only says why.
        return b"".join(pieces)

    def wind_up(self) -> None:
        """Read the last bytes of a body that has said all, or give the connection up."""
        self._watch.hurry(WIND_UP_S)
        try:
            while self.read():
                pass
        except LMError:
            pass  # `read` has closed it

    def close(self) -> None:
        """Close the connection, unless the body was read to its end; from any thread."""
        self._is_closed = not self._response.is_complete
        self._watch.close()
        self._response.release()


def open_stream(request: HttpRequest) -> BlockingStream:
    """Send a request and wait for the head of its answer.

    Raises:
        LMTransportError: No connection could be made, or it broke.
        LMTimeoutError: The answer did not begin in time.
        CallCancelledError: The work that asks was told to stop.
    """
    parts = urllib.parse.urlsplit(request.url)
    watch = Watch(request.limits, request.model)
    watch.heed(CANCELLATION.get())
    token = _WATCH.set(watch)
    try:
        left = watch.next_wait()
        pool = _CLIENT.pool(f"{parts.scheme}://{parts.netloc}")
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        if pool.proxy is not None and parts.scheme == "http":
            target = request.url  # a proxy must be told the host
        response = pool.urlopen(
            request.method,
            target,
            body=request.body,
            headers=request.headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            timeout=_load_urllib3().Timeout(connect=min(CONNECT_S, left), read=left),
            preload_content=False,
            decode_content=False,
        )
    except BaseException as error:
        watch.close()
        is_ours = isinstance(error, LMError | CallCancelledError)
        if is_ours or not isinstance(error, Exception):
            raise
        raise _translated(error, request, watch) from cause_to_show(error)
    finally:
        _WATCH.reset(token)
    try:
        return BlockingStream(response, request, watch)
    except LMError:
        watch.close()
        response.release()
        raise


def send(request: HttpRequest) -> HttpAnswer:
    """Send a request and wait for its whole answer.

    Raises:
        LMError: As `open_stream` and `BlockingStream.read`.
    """
    stream = open_stream(request)
    return HttpAnswer(stream.status, stream.headers, stream.read_all())


def _announced_length(head: Head) -> int | None:
    if head.status in {204, 304}:
        return 0
    announced = head.headers.get("content-length", "")
    return int(announced) if announced.isdecimal() else None


def _shut_down(sock: Any) -> None:
    """Wake every thread that waits on a socket, without closing what they still hold."""
    try:
        # Past TLS, whose state those threads use; TLS within TLS is no socket but has one.
        socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)
    except (OSError, TypeError):
        pass  # it is shut already


def _translated(error: Exception, request: HttpRequest, watch: Watch) -> DSPyError:
    if watch.failure is not None:
        return watch.failure
    exceptions = _load_urllib3().exceptions
    # What is nested innermost names no object of a library.
    nested = [each for each in error.args if isinstance(each, BaseException)]
    inner = nested[0] if nested else error.__cause__ or error
    # A refused connection and an unknown host count as "timeouts" to urllib3.
    if not isinstance(error, exceptions.NewConnectionError):
        if isinstance(error, exceptions.ConnectTimeoutError):
            if watch.is_over:
                return watch.error()
            return LMTimeoutError(
                f"{request.model}: no connection within the time allowed.", model=request.model
            )
        # One with a number is the system's, of a host that does not answer its questions.
        if isinstance(inner, TimeoutError):
            if inner.errno is None:
                return watch.error()
        elif isinstance(error, exceptions.TimeoutError):
            return watch.error()
    return LMTransportError(
        without_user_info(
            f"{request.model}: the connection failed: {type(inner).__name__}: {inner}"
        ),
        model=request.model,
    )
