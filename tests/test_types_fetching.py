"""`from_url`: what is taken from a server, and that no server can hold or flood who asks it.

Against real servers on sockets. Not here: what images and audio are made of otherwise
(`test_types_media.py`).
"""

from __future__ import annotations

import base64
import gzip
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest

import dspylite as dspy
from dspylite.adapters.types.fetching import MAX_REDIRECTS
from dspylite.runtime.clock import Deadline

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
WAV = b"RIFF\0\0\0\0WAVEfmt " + bytes(50)
LIMIT_S = 0.5  # of a download that would never end
Script = Callable[[socket.socket, bytes], None]


class Server:
    """Does with each connection what the script of its path says, and keeps the request's head."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.heads: list[bytes] = []
        self._ended = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def at(self, path: str, script: Script) -> str:
        self.scripts[path] = script
        return self.url(path)

    def close(self) -> None:
        self._ended.set()
        self._socket.close()

    def wait(self, seconds: float) -> bool:
        return not self._ended.wait(seconds)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (more := connection.recv(65_536)):
                    return
                head += more
            self.heads.append(head)
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            try:
                self.scripts[path](connection, head)
            except OSError:
                pass  # who asked has gone away, as it should


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def answer(
    body: bytes = PNG, kind: str | None = "image/png", *, status: str = "200 OK", more: str = ""
) -> Script:
    typed = "" if kind is None else f"Content-Type: {kind}\r\n"

    def send(connection: socket.socket, _: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\n{typed}{more}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode("latin-1") + body)

    return send


def redirect(to: str) -> Script:
    return answer(b"", None, status="302 Found", more=f"Location: {to}\r\n")


def data_uri(body: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("image/png", "/a"),
        ("Image/PNG; charset=binary", "/a"),
        ("application/octet-stream", "/a"),
        (None, "/a"),
    ],
)
def test_image_is_downloaded_and_kept_as_a_data_uri(
    kind: str | None, path: str, server: Server
) -> None:
    """A storage service that does not say what it holds is not asked: the bytes tell."""
    assert dspy.Image.from_url(server.at(path, answer(PNG, kind))).url == data_uri(PNG)


def test_kind_is_told_by_the_name_where_bytes_do_not_tell_it(server: Server) -> None:
    url = server.at("/logo.svg", answer(b"<svg/>", "application/octet-stream"))
    assert dspy.Image.from_url(f"{url}?v=1").url == data_uri(b"<svg/>", "image/svg+xml")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("audio/x-wav", "wav"), ("audio/mpeg", "mp3"), ("audio/flac", "flac"), (None, "wav")],
)
def test_audio_is_downloaded_with_its_format(
    kind: str | None, expected: str, server: Server
) -> None:
    audio = dspy.Audio.from_url(server.at("/a", answer(WAV, kind)))
    assert (base64.b64decode(audio.data), audio.audio_format) == (WAV, expected)


def test_deprecated_download_fetches_from_a_positional_url_only(server: Server) -> None:
    """What comes by keyword may come from a model, and must start no request."""
    url = server.at("/a", answer())
    with pytest.warns(DeprecationWarning, match="from_url") as caught:
        assert dspy.Image(url, download=True).url == data_uri(PNG)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="from_url"):
        assert dspy.Image(url, download=False).url == url
    with pytest.raises(dspy.MediaError, match="positional"):
        dspy.Image(url=url, download=True)
    assert len(server.heads) == 1


@pytest.mark.parametrize("kind", [dspy.Image, dspy.Audio])
@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,aGk=", "gs://b/o"),
        *("cat.png", "http://", "https:///a", "javascript:alert(1)", "http://[::1", "http://h:x/"),
        *("http://a b/", "http://a\r\nX: y/", "", None, 5, "http://h:99999/"),
        *("http://h/\ud800", "http://\ud800@h/", "http://\ud800/", f"http://{'é' * 99}.org/"),
    ],
)
def test_only_the_web_is_fetched_from(kind: type[dspy.Image | dspy.Audio], url: str) -> None:
    with pytest.raises(dspy.MediaError, match="cannot be fetched"):
        kind.from_url(url)


@pytest.mark.parametrize("said", ["image/a,b", "image/\xe9", "image/x y", f"image/{'p' * 300}"])
def test_kind_that_is_none_is_found_in_the_bytes(said: str, server: Server) -> None:
    """Or the data URI would be one that is refused where it is read again, as from a saved demo."""
    url = dspy.Image.from_url(server.at("/a", answer(kind=said))).url
    assert dspy.Image(url).url == data_uri(PNG)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5"])
def test_timeout_that_is_none_is_refused(timeout: float, server: Server) -> None:
    with pytest.raises(dspy.MediaError, match="timeout"):
        dspy.Image.from_url(server.url("/a"), timeout=timeout)
    assert not server.heads


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "401 No", "304 Not Modified"])
def test_refusal_has_the_servers_status(status: str, server: Server) -> None:
    with pytest.raises(dspy.MediaFetchError, match=status[:3]) as caught:
        dspy.Image.from_url(server.at("/a", answer(status=status)))
    assert caught.value.status == int(status[:3])


@pytest.mark.parametrize(
    ("body", "kind", "match"),
    [
        (b"<html>log in</html>", "text/html", "the server sends text/html"),
        (PNG, "video/mp4", "the server sends video/mp4"),
        (b"hello", "application/octet-stream", "no known kind"),
        (b"hello", None, "no known kind"),
        (WAV, None, "audio/wav"),
        (b"", "image/png", "nothing"),
    ],
)
def test_what_is_no_image_is_refused(
    body: bytes, kind: str | None, match: str, server: Server
) -> None:
    """A page that asks to log in, called an image, would be paid for by the token."""
    with pytest.raises(dspy.MediaFetchError, match=match):
        dspy.Image.from_url(server.at("/a", answer(body, kind)))


def test_what_is_no_image_by_its_head_is_not_read(server: Server) -> None:
    def endless(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while True:
            connection.sendall(bytes(65_536))

    with pytest.raises(dspy.MediaFetchError, match="text/html"):
        dspy.Image.from_url(server.at("/a", endless))


# --- sizes ---------------------------------------------------------------------------------------


def test_size_that_is_announced_too_large_is_not_read(server: Server) -> None:
    def promise(connection: socket.socket, _: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 999999999\r\n\r\n"
        connection.sendall(head)
        server.wait(20)

    with pytest.raises(dspy.MediaError, match="larger than 20,000,000 bytes"):
        dspy.Image.from_url(server.at("/a", promise))


@pytest.mark.parametrize("framing", ["chunked", "until the end"])
def test_endless_body_is_left_at_the_limit(framing: str, server: Server) -> None:
    sent = 0

    def endless(connection: socket.socket, _: bytes) -> None:
        nonlocal sent
        is_chunked = framing == "chunked"
        extra = b"Transfer-Encoding: chunked\r\n" if is_chunked else b""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n" + extra + b"\r\n")
        piece = b"1000\r\n" + bytes(4096) + b"\r\n" if is_chunked else bytes(4096)
        while True:
            connection.sendall(piece)
            sent += 4096

    with pytest.raises(dspy.MediaError, match="larger than 100,000 bytes"):
        dspy.Image.from_url(server.at("/a", endless), max_bytes=100_000)
    assert sent < 50_000_000  # what fits into sockets' buffers, and not all there ever is


def test_limit_can_be_raised_and_is_exact(server: Server) -> None:
    url = server.at("/a", answer())
    assert dspy.Image.from_url(url, max_bytes=len(PNG)).url == data_uri(PNG)
    with pytest.raises(dspy.MediaError, match="larger"):
        dspy.Image.from_url(url, max_bytes=len(PNG) - 1)
    with pytest.raises(dspy.MediaError, match="max_bytes"):
        dspy.Image.from_url(url, max_bytes=0)


@pytest.mark.parametrize("packing", ["gzip", "identity"])
def test_limit_may_be_beyond_any_memory(packing: str, server: Server) -> None:
    body = gzip.compress(PNG) if packing == "gzip" else PNG
    url = server.at("/a", answer(body, more=f"Content-Encoding: {packing}\r\n"))
    assert dspy.Image.from_url(url, max_bytes=sys.maxsize).url == data_uri(PNG)


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_packed_answer_is_unpacked(packing: str, server: Server) -> None:
    """It was not asked for, and some servers pack all the same."""
    body = gzip.compress(PNG) if packing == "gzip" else zlib.compress(PNG)
    url = server.at("/a", answer(body, more=f"Content-Encoding: {packing}\r\n"))
    assert dspy.Image.from_url(url).url == data_uri(PNG)
    assert b"Accept-Encoding: identity" in server.heads[0]


def test_packed_bomb_is_left_at_the_limit(server: Server) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    url = server.at("/a", answer(bomb, more="Content-Encoding: gzip\r\n"))
    with pytest.raises(dspy.MediaError, match="larger"):
        dspy.Image.from_url(url, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("body", "packing", "match"),
    [
        (PNG, "br", "packs"),
        (b"no gzip at all", "gzip", "could not be fetched"),
        (gzip.compress(PNG)[:-20], "gzip", "before the end"),
        (gzip.compress(PNG[:50]) + gzip.compress(PNG[50:]), "gzip", "several parts"),
    ],
)
def test_packing_that_cannot_be_undone_is_an_error(
    body: bytes, packing: str, match: str, server: Server
) -> None:
    url = server.at("/a", answer(body, more=f"Content-Encoding: {packing}\r\n"))
    with pytest.raises(dspy.MediaFetchError, match=match):
        dspy.Image.from_url(url)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_body_that_is_cut_is_an_error(framing: str, server: Server) -> None:
    """Half an image is described with as much confidence as a whole one."""

    def cut(connection: socket.socket, _: bytes) -> None:
        is_chunked = framing == "chunked"
        extra = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: 999"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n" + extra + b"\r\n\r\n"
        connection.sendall(head + (b"400\r\n" if is_chunked else b"") + PNG)

    with pytest.raises(dspy.MediaFetchError):
        dspy.Image.from_url(server.at("/a", cut))


# --- time ----------------------------------------------------------------------------------------


def drip(server: Server, head: bytes) -> Script:
    """Send a head, then a byte now and then, each well within any limit between two bytes."""

    def send(connection: socket.socket, _: bytes) -> None:
        connection.sendall(head)
        while server.wait(0.02):
            connection.sendall(b"x")

    return send


DRIPS = {
    "body": b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 9999\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9999\r\n",
    "head": b"HTTP/1.1 200 OK\r\nX-Long: ",
    "status": b"HT",
}


@pytest.mark.parametrize("head", DRIPS.values(), ids=DRIPS)
@pytest.mark.timeout(30)
def test_slow_drip_ends_with_the_time_for_all_of_it(head: bytes, server: Server) -> None:
    """A limit between two bytes would let a server hold a thread for hours."""
    with pytest.raises(dspy.MediaFetchError, match="in time"):
        dspy.Image.from_url(server.at("/a", drip(server, head)), timeout=LIMIT_S)


@pytest.mark.timeout(30)
def test_deadline_of_the_call_bounds_a_download_too(server: Server) -> None:
    url = server.at("/a", drip(server, DRIPS["body"]))
    with Deadline(LIMIT_S), pytest.raises(dspy.MediaFetchError, match="in time"):
        dspy.Image.from_url(url, timeout=None)


@pytest.mark.timeout(30)
def test_time_is_one_for_all_redirects(server: Server) -> None:
    def slowly(connection: socket.socket, head: bytes) -> None:
        server.wait(0.3)
        redirect("/a")(connection, head)

    start = time.monotonic()
    with pytest.raises(dspy.MediaFetchError, match="in time"):
        dspy.Image.from_url(server.at("/a", slowly), timeout=LIMIT_S)
    assert len(server.heads) <= 2
    assert time.monotonic() - start < 20


def test_addresses_of_a_host_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have any number of addresses at which nobody answers."""
    asked: list[float | None] = []

    class Silent(socket.socket):
        def connect(self, address: object, /) -> None:
            asked.append(self.gettimeout())
            raise TimeoutError

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))] * 3
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    monkeypatch.setattr(socket, "socket", Silent)
    with pytest.raises(dspy.MediaFetchError, match="in time"):
        dspy.Image.from_url("http://silent.example/a", timeout=5)
    assert len(set(asked)) == 3  # each has less than the one before
    assert asked == sorted(asked, key=lambda left: -(left or 0))


# --- redirects -----------------------------------------------------------------------------------


def test_redirects_are_followed(server: Server) -> None:
    server.at("/b", answer())
    server.at("/r", redirect(server.url("/b")))
    assert dspy.Image.from_url(server.at("/a", redirect("/r"))).url == data_uri(PNG)


def test_redirects_in_a_ring_end(server: Server) -> None:
    with pytest.raises(dspy.MediaFetchError, match=f"More than {MAX_REDIRECTS} redirects"):
        dspy.Image.from_url(server.at("/a", redirect("/a")))
    assert len(server.heads) <= MAX_REDIRECTS + 1


def test_as_many_redirects_as_allowed_are_followed(server: Server) -> None:
    for at in range(MAX_REDIRECTS):
        server.at(f"/{at}", redirect(f"/{at + 1}"))
    server.at(f"/{MAX_REDIRECTS}", answer())
    assert dspy.Image.from_url(server.url("/0")).url == data_uri(PNG)


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,aGk=", "gs://b/o"]
)
def test_redirect_leads_to_the_web_only(to: str, server: Server) -> None:
    with pytest.raises(dspy.MediaFetchError):
        dspy.Image.from_url(server.at("/a", redirect(to)))


def test_body_of_a_redirect_is_not_read(server: Server) -> None:
    def endless(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n")
        while True:
            connection.sendall(bytes(65_536))

    server.at("/b", answer())
    assert dspy.Image.from_url(server.at("/a", endless)).url == data_uri(PNG)


# --- secrets -------------------------------------------------------------------------------------


def test_password_goes_to_its_own_host_only(server: Server) -> None:
    other = Server()
    other.at("/b", answer())
    server.at("/a", redirect(other.url("/b")))
    url = f"http://me:p%40ss@127.0.0.1:{server.port}/a"
    assert dspy.Image.from_url(url).url == data_uri(PNG)
    token = base64.b64encode(b"me:p@ss")
    assert b"Authorization: Basic " + token in server.heads[0]
    assert b"Authorization" not in other.heads[0]
    other.close()


@pytest.mark.parametrize("script", [answer(status="403 No"), answer(b"x", "text/html")])
def test_no_error_shows_a_password(script: Script, server: Server) -> None:
    server.at("/a", script)
    url = f"http://me:hunter2hunter2@127.0.0.1:{server.port}/a?token=s3cr3ts3cr3t"
    with pytest.raises(dspy.MediaFetchError) as caught:
        dspy.Image.from_url(url)
    seen, error = "", BaseException()
    error = caught.value
    while error is not None:
        seen += f"{error!s}{error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "hunter2" not in seen
    assert "s3cr3t" not in seen


def test_server_that_is_not_there_is_our_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(dspy.MediaFetchError, match="could not be fetched"):
        dspy.Image.from_url(f"http://127.0.0.1:{port}/a")


@pytest.mark.parametrize(
    "said",
    [b"", b"hello", b"\0" * 100, b"HTTP/1.1 abc\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n"],
)
def test_server_that_speaks_no_http_is_our_error(said: bytes, server: Server) -> None:
    with pytest.raises(dspy.MediaFetchError):
        dspy.Image.from_url(server.at("/a", lambda connection, _: connection.sendall(said)))


def test_words_of_any_script_are_asked_for_as_browsers_do(server: Server) -> None:
    server.at("/%C3%BC%20x.png", answer())
    assert dspy.Image.from_url(server.url("/ü%20x.png")).url == data_uri(PNG)


def test_threads_download_at_once(server: Server) -> None:
    meeting = threading.Barrier(4, timeout=20)

    def together(connection: socket.socket, head: bytes) -> None:
        meeting.wait()
        answer(PNG)(connection, head)

    url = server.at("/a", together)
    with dspy.ThreadPoolExecutor(4) as pool:
        images = list(pool.map(dspy.Image.from_url, [url] * 4))
    assert {image.url for image in images} == {data_uri(PNG)}
