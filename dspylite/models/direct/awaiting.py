"""HTTP on asyncio, over one aiohttp session for each event loop.

A session ends with its loop. Not here: the blocking form (`blocking.py`), which serves trio too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import math
import socket
import urllib.parse
import weakref
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import current_token

from dspylite.errors import DSPyError, LMError, LMTimeoutError, LMTransportError
from dspylite.models.direct.environment import proxy_for, split_proxy, tls_context
from dspylite.models.direct.heads import MAX_LINE_BYTES
from dspylite.models.direct.wire import (
    CONNECT_S,
    ERROR_BODY_S,
    WIND_UP_S,
    BodyReader,
    HttpAnswer,
    HttpRequest,
    Limits,
    Watch,
    cause_to_show,
    is_blank,
    without_user_info,
)
from dspylite.runtime.forks import loading, watch_forks

_DNS_CACHE_S = 60
_KEEP_ALIVE_S = 30.0
"""How long an idle connection is kept; below what common servers and balancers allow (60 s)."""
_LOOKUPS = 8  # names looked up at once per loop; guessed
_LARGE_BODY_BYTES = 1024 * 1024
"""Above this aiohttp wants a file, which it sends in pieces."""
_OTHER_DESCRIPTORS = 0.75
"""Share of the process's file descriptors that connections may take."""


@functools.cache
def _load_aiohttp() -> Any:
    with loading():
        import aiohttp  # noqa: PLC0415  # costs 150 ms, so on the first call only

    return aiohttp


class _Resolver:
    """Looks names up in threads of its own; the loop's default executor may be full."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(_LOOKUPS)

    async def resolve(
        self, host: str, port: int = 0, family: int = socket.AF_UNSPEC
    ) -> list[dict[str, Any]]:
        """Return the addresses of a host, in aiohttp's form."""
        found = await anyio.to_thread.run_sync(
            functools.partial(
                socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, family=family
            ),
            limiter=self._limiter,
            abandon_on_cancel=True,
        )
        return [
            {
                "hostname": host,
                "host": address[0],
                "port": address[1],
                "family": kind,
                "proto": protocol,
                "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            }
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


class _LoopClient:
    """The session of one event loop, and what the environment says about the hosts it asks."""

    def __init__(self, loop: Any) -> None:
        aiohttp = _load_aiohttp()
        self.loop = loop
        self._proxies: dict[str, tuple[str, str | None] | None] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=_most_connections(),
                limit_per_host=0,
                ttl_dns_cache=_DNS_CACHE_S,
                keepalive_timeout=_KEEP_ALIVE_S,
                resolver=_Resolver(),
                ssl=tls_context(),
                socket_factory=self._socket,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )
        self.keeper: AsyncGenerator[None, None] = self._close_with_loop()

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        # `asyncio.run` closes every async generator that is still open when its loop ends.
        try:
            yield
        finally:
            _CLIENTS.forget(self)
            await self.session.close()

    async def close_after_loop(self) -> None:
        """Close what the loop, which is closed, cannot close any more; waits for nothing."""
        await self.session.close()
        for sock in list(self._sockets):
            sock.close()

    def _socket(self, address: Any) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sockets.add(made)
        return made

    def proxy_for(self, scheme: str, host: str) -> tuple[str, str | None] | None:
        """Return the proxy for a host, as `split_proxy` does; None for none."""
        origin = f"{scheme}://{host}"
        if origin not in self._proxies:
            proxy = proxy_for(scheme, host)
            self._proxies[origin] = None if proxy is None else split_proxy(proxy)
        return self._proxies[origin]


class _Clients:
    """All sessions of this process, one for each event loop."""

    def __init__(self) -> None:
        self._inherited: list[Any] = []
        self._by_loop: dict[Any, _LoopClient] = {}
        watch_forks(self)

    async def get(self) -> _LoopClient:
        loop = current_token().native_token
        client = self._by_loop.get(loop)
        if client is None or client.session.closed:
            client = self._by_loop[loop] = _LoopClient(loop)
            await anext(client.keeper)
            await self._close_left_over()
        return client

    async def _close_left_over(self) -> None:
        """Close the sessions of loops that were closed without the ceremony of `asyncio.run`."""
        for loop in [loop for loop in list(self._by_loop) if loop.is_closed()]:
            client = self._by_loop.pop(loop, None)
            if client is not None:
                await client.close_after_loop()

    async def close_own(self) -> None:
        """Close the session of the running loop, if it has one."""
        client = self._by_loop.get(current_token().native_token)
        if client is not None:
            await client.keeper.aclose()

    def forget(self, client: _LoopClient) -> None:
        """Drop a client whose loop is about to end."""
        self._by_loop.pop(client.loop, None)

    def reset_after_fork(self) -> None:
        # Kept, not closed: the parent's selector would hear of it.
        self._inherited.append(self._by_loop)
        self._by_loop = {}

    def close(self) -> None:
        """Close the sessions of all loops that do not run, when the process ends."""
        for loop, client in self._by_loop.items():
            if loop.is_closed():
                with contextlib.suppress(StopIteration):
                    client.close_after_loop().send(None)
            elif not loop.is_running():
                loop.run_until_complete(client.session.close())
        self._by_loop = {}


_CLIENTS = _Clients()
atexit.register(_CLIENTS.close)


def preload() -> None:
    """Load what the first exchange would load; nothing is sent."""
    _load_aiohttp()
    tls_context()


async def close_connections() -> None:
    """Close the connections of the running loop; a later request opens new ones."""
    await _CLIENTS.close_own()


class AwaitedStream:
    """An answer that is read piece by piece on an event loop.

    Attributes:
        status: HTTP status.
        headers: Names in lower case.
    """

    def __init__(self, response: Any, request: HttpRequest, watch: Watch, loop: Any) -> None:
        self._response = response
        self._loop = loop
        self._request = request
        self._watch = watch
        self.status: int = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._body = BodyReader(
            self.headers, request.limits, request.model, is_lenient=self.status >= 300
        )

    async def read(self) -> bytes:
        """Await some more of the body; empty at its end.

        Raises:
            LMTransportError: The connection broke.
            LMTimeoutError: Nothing came in time.
        """
        content = self._response.content
        try:
            while not content.at_eof():
                left = self._watch.next_wait()
                data = content.read_nowait(-1)  # a scope costs more than the rest of a short read
                if not data and not content.at_eof():
                    with anyio.fail_after(left):
                        data = await content.readany()
                if decoded := self._body.feed(data):
                    return decoded
            self._body.finish()
        except BaseException as error:
            self.close()
            if isinstance(error, LMError) or not isinstance(error, Exception):
                raise
            raise _translated(error, self._request, self._watch) from cause_to_show(error)
        return b""

    def content(self) -> None:
        """Note that what was read was content."""
        self._watch.content()

    async def read_all(self) -> bytes:
        """Await the rest of the body; where the status is no success, what there is of it."""
        pieces: list[bytes] = []
        if self.status >= 300:
            self._watch.hurry(ERROR_BODY_S)
        try:
            while piece := await self.read():
                pieces.append(piece)
                if not is_blank(piece):
                    self._watch.content()
        except LMError:
            if self.status < 300:
                raise
            # Status and headers say what to do; the text, whose rest is lost, only says why.
        return b"".join(pieces)

    async def wind_up(self) -> None:
        """Read the last bytes of a body that has said all, or give the connection up."""
        self._watch.hurry(WIND_UP_S)
        try:
            while await self.read():
                pass
        except LMError:
            pass  # `read` has closed it

    def close(self) -> None:
        """Close the connection, unless the body was read to its end; from any thread."""
        loop = self._loop
        if _running_loop() is loop or not loop.is_running():
            self._response.close()
            return
        try:
            loop.call_soon_threadsafe(self._response.close)
        except RuntimeError:
            pass  # the loop has ended, and its connections with it


async def open_stream(request: HttpRequest) -> AwaitedStream:
    """Send a request and await the head of its answer.

    Raises:
        LMTransportError: No connection could be made, or it broke.
        LMTimeoutError: The answer did not begin in time.
    """
    client = await _CLIENTS.get()
    parts = urllib.parse.urlsplit(request.url)
    watch = Watch(request.limits, request.model)
    left = watch.next_wait()
    body, headers, proxy, proxy_headers = request.body, request.headers, None, None
    data = io.BytesIO(body) if body and len(body) > _LARGE_BODY_BYTES else body
    found = client.proxy_for(parts.scheme, parts.netloc)
    if found is not None:
        proxy, authorization = found
        if authorization is not None:
            proxy_headers = {"proxy-authorization": authorization}
            if parts.scheme == "http":  # the proxy reads the request itself
                headers = {**headers, **proxy_headers}
    try:
        response = await client.session.request(
            request.method,
            request.url,
            data=data,
            headers=headers,
            allow_redirects=False,
            proxy=proxy,
            proxy_headers=proxy_headers,
            timeout=_timeout(request.limits, left),
        )
    except Exception as error:  # noqa: BLE001  # the border: what aiohttp raises is translated here
        raise _translated(error, request, watch) from cause_to_show(error)
    try:
        return AwaitedStream(response, request, watch, client.loop)
    except LMError:
        response.close()
        raise


async def send(request: HttpRequest) -> HttpAnswer:
    """Send a request and await its whole answer.

    Raises:
        LMError: As `open_stream` and `AwaitedStream.read`.
    """
    stream = await open_stream(request)
    return HttpAnswer(stream.status, stream.headers, await stream.read_all())


def _timeout(limits: Limits, left: float) -> Any:
    # aiohttp's own timers cost less than a scope around the call; the watch has the pauses.
    return _load_aiohttp().ClientTimeout(
        total=limits.total_s,
        sock_connect=min(CONNECT_S, left),
        sock_read=limits.first_byte_s,
        ceil_threshold=math.inf,  # by default it rounds times above 5 s up
    )


def _running_loop() -> Any:
    """Return the event loop that runs on this thread; None for none."""
    try:
        return current_token().native_token
    except RuntimeError:
        return None


def _translated(error: Exception, request: HttpRequest, watch: Watch) -> DSPyError:
    if watch.failure is not None:
        return watch.failure
    aiohttp = _load_aiohttp()
    if isinstance(error, aiohttp.ConnectionTimeoutError) and not watch.is_over:
        return LMTimeoutError(
            f"{request.model}: no connection within the time allowed.", model=request.model
        )
    if isinstance(error, TimeoutError):
        return watch.error()
    return LMTransportError(
        without_user_info(
            f"{request.model}: the connection failed: {type(error).__name__}: {error}"
        ),
        model=request.model,
    )


def _most_connections() -> int:
    """Return how many connections one loop may open, so that files and pipes remain possible."""
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 0
    return max(64, int(soft * _OTHER_DESCRIPTORS))
