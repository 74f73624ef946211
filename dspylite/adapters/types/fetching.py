"""Downloads of what a user names by URL, within limits of time, bytes, redirects and kinds.

Imported only when something is fetched, for it loads HTTP and TLS. Not here: which hosts may be
asked. Whoever calls `from_url` answers for the URL.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import math
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from dspylite.adapters.types.media import (
    check_max_bytes,
    is_kind,
    kind_of_bytes,
    kind_of_name,
    too_large,
)
from dspylite.errors import MediaError, MediaFetchError, clip
from dspylite.runtime.clock import time_left
from dspylite.schema.secrets import shown_url

MAX_REDIRECTS = 5

_UNTOLD = frozenset({"", "application/octet-stream", "binary/octet-stream", "application/ogg"})
"""Content types that do not say what something is; then its bytes and its name are asked."""

_CHUNK_BYTES = 65_536


def fetch(
    url: str,
    *,
    verify: bool,
    timeout: float | None,
    max_bytes: int,
    wanted: str,
    kinds: tuple[str, ...],
) -> tuple[str, bytes]:
    """Download something over HTTP.

    Args:
        url: `http:` or `https:`. A user and password in it are sent to its own host only.
        verify: Whether the server's certificate is checked.
        timeout: Seconds for all of it; None for no limit but the deadline of the call in progress.
        max_bytes: Most bytes that are taken, unpacked.
        wanted: What it should be, in words for errors.
        kinds: How its MIME type may begin.

    Returns:
        Its MIME type and its bytes.

    Raises:
        MediaError: An argument is wrong, or there are more bytes.
        MediaFetchError: The server could not be reached in time, refused, or sent something else.
    """
    check_max_bytes(max_bytes)
    shown = clip(shown_url(url), 200) if isinstance(url, str) else repr(url)
    timer = _Timer(timeout)
    request = _request(url, shown)
    try:
        with _opener(timer, verify=verify).open(request, timeout=timer.left()) as response:
            said = response.headers.get("content-type")
            _check_kind(said, kinds, wanted, shown)
            data = _body(response, max_bytes, wanted)
            last = urllib.parse.urlsplit(response.url).path
    except MediaError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise MediaFetchError(
            f"{shown} could not be fetched: the server answers {error.code}.", status=error.code
        ) from None
    except TimeoutError:
        raise _late(shown) from None
    except (OSError, http.client.HTTPException, zlib.error, ValueError) as error:
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
            raise _late(shown) from None
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        said = clip(shown_url(str(reason)), 200) or type(error).__name__
        raise MediaFetchError(f"{shown} could not be fetched: {said}.") from None
    kind = _plain_kind(said)
    if kind in _UNTOLD or not is_kind(kind):
        kind = kind_of_bytes(data) or kind_of_name(last) or ""
    if not data or not kind.startswith(kinds):
        found = "nothing" if not data else kind or "something of no known kind"
        raise MediaFetchError(f"{shown} is not {wanted}: the server sent {found}.")
    return kind, data


def _late(shown: str) -> MediaFetchError:
    return MediaFetchError(f"{shown} could not be fetched in time. `timeout=` sets the limit.")


class _Timer:
    """How long a whole download may still take."""

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not (
            isinstance(timeout, int | float) and math.isfinite(timeout) and timeout > 0
        ):
            raise MediaError(f"`timeout` is a positive number of seconds or None, not {timeout!r}.")
        limits = [each for each in (timeout, time_left()) if each is not None]
        self._ends_at = time.monotonic() + min(limits) if limits else None

    def left(self) -> float | None:
        """Return the seconds left, for a socket.

        Raises:
            TimeoutError: There are none.
        """
        if self._ends_at is None:
            return None
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _request(url: str, shown: str) -> urllib.request.Request:
    plain, user = _without_user(url) if isinstance(url, str) else ("", None)
    if not plain:
        raise MediaError(f"{shown!r} cannot be fetched: only `http:` and `https:` URLs can.")
    headers = {"User-Agent": "dspylite", "Accept-Encoding": "identity"}
    request = urllib.request.Request(plain, headers=headers)
    if user is not None:
        # Those that are not redirected stay with the host that they were given for.
        request.add_unredirected_header("Authorization", user)
    return request


def _without_user(url: str) -> tuple[str, str | None]:
    """Part a web URL and the header of its user and password; no URL if it is none."""
    url = url.strip()
    if any(each <= " " or each == "\x7f" for each in url):
        return "", None
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            return "", None
        user, is_given, host = parts.netloc.rpartition("@")
        # What no request line can carry is written as browsers write it.
        path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|")
        host = host if host.isascii() else host.encode("idna").decode("ascii")
        plain = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
        if not is_given:
            return plain, None
        token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode("ascii")
    except ValueError:  # no host, no port, or what no encoding takes
        return "", None
    return plain, f"Basic {token}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, to the web only."""

    max_repeats = max_redirections = MAX_REDIRECTS + 1  # so that the count below speaks first

    def __init__(self) -> None:
        self._left = MAX_REDIRECTS

    def redirect_request(  # noqa: PLR0917  # urllib's
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Make the next request."""
        fp.close()  # or its body would be read to the end, however long it is
        self._left -= 1
        if self._left < 0:
            raise MediaFetchError(f"More than {MAX_REDIRECTS} redirects were answered.")
        plain, _ = _without_user(newurl)
        if not plain:
            raise MediaFetchError(
                f"The server redirects to {clip(shown_url(newurl), 200)!r}, which is not followed."
            )
        return super().redirect_request(req, fp, code, msg, headers, plain)


def _opener(timer: _Timer, *, verify: bool) -> urllib.request.OpenerDirector:
    """Make what opens URLs of the web, by the environment's proxies, and of nothing else."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(timer),
        _Https(timer, verify=verify),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class _Http(urllib.request.HTTPHandler):
    def __init__(self, timer: _Timer) -> None:
        super().__init__()
        self._timer = timer

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Ask without TLS."""
        return self.do_open(_timed(http.client.HTTPConnection, self._timer), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, timer: _Timer, *, verify: bool) -> None:
        self._tls = ssl.create_default_context()
        if not verify:
            self._tls.check_hostname = False
            self._tls.verify_mode = ssl.CERT_NONE
        super().__init__(context=self._tls)
        self._timer = timer

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Ask over TLS."""
        connection = _timed(http.client.HTTPSConnection, self._timer)
        return self.do_open(connection, req, context=self._tls)


def _timed(kind: Callable[..., http.client.HTTPConnection], timer: _Timer) -> Any:
    """Return what makes connections of which every step is bounded by one time for all."""

    def connect(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
        made: Any = kind(*args, **kwargs)
        made.response_class = functools.partial(_TimedResponse, timer)
        made._create_connection = functools.partial(_connect, timer)  # noqa: SLF001  # no other way
        return cast("http.client.HTTPConnection", made)

    return connect


def _connect(timer: _Timer, address: tuple[str, int], *_: Any) -> socket.socket:
    """Connect to the first address of a host that answers; all of them share the time."""
    failure: OSError = OSError(f"the host {address[0]!r} has no address")
    for family, kind, protocol, _name, place in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(timer.left())
            made.connect(place)
            made.settimeout(timer.left())
        except OSError as error:
            made.close()
            failure = error
        else:
            return made
    raise failure


class _TimedResponse(http.client.HTTPResponse):
    """An answer whose reads end together with the time, however slowly the bytes drip."""

    def __init__(self, timer: _Timer, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(timer, sock))


class _TimedReader(io.RawIOBase):
    def __init__(self, timer: _Timer, sock: socket.socket) -> None:
        self._timer = timer
        self._socket = sock
        self._bytes: Any = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._socket.settimeout(self._timer.left())
        count: int | None = self._bytes.readinto(buffer)
        return count

    def close(self) -> None:
        self._bytes.close()
        super().close()


def _plain_kind(said: str | None) -> str:
    return (said or "").partition(";")[0].strip().lower()


def _check_kind(said: str | None, kinds: tuple[str, ...], wanted: str, shown: str) -> None:
    """Refuse by its head what is something else, before its body is read."""
    kind = _plain_kind(said)
    if kind not in _UNTOLD and not kind.startswith(kinds):
        raise MediaFetchError(f"{shown} is not {wanted}: the server sends {clip(kind, 80)}.")


def _body(response: Any, max_bytes: int, wanted: str) -> bytes:
    """Read a body to its end, unpacked."""
    packing = (response.headers.get("content-encoding") or "identity").strip().lower()
    unpack: Any = None
    if packing in {"gzip", "x-gzip", "deflate"}:
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
    elif packing != "identity":
        raise MediaFetchError(f"The server packs its answer as {clip(packing, 40)!r}, unasked.")
    length = response.length
    if length is not None and length > max_bytes:
        raise too_large(wanted, max_bytes)
    taken, read = bytearray(), 0
    while chunk := response.read1(_CHUNK_BYTES):
        read += len(chunk)
        room = min(max_bytes + 1 - len(taken), sys.maxsize)
        taken += chunk if unpack is None else unpack.decompress(chunk, room)
        if len(taken) > max_bytes or read > max_bytes:
            raise too_large(wanted, max_bytes)
        if unpack is not None and unpack.unused_data:
            raise MediaFetchError("The server packs its answer in several parts, unasked.")
    if (length is not None and read < length) or (unpack is not None and not unpack.eof):
        raise MediaFetchError("The server closed the connection before the end of its answer.")
    return bytes(taken)
