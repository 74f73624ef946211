"""The direct engine and its process: connections, forks, loops, proxies, certificates, imports.

Not here: what it sends and takes (`test_direct_wire.py`).
"""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from dspylite import LM
from dspylite.errors import LMTransportError
from dspylite.models.direct.environment import proxy_for
from dspylite.testing import FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"
_CA_NAMES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no proxy of the machine reach a test."""
    for name in _PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer(dimensions=4) as server:
        yield server


awaited = pytest.mark.usefixtures("one_loop")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")


def lm_of(server: FakeServer, **options: Any) -> LM:
    given = {"api_base": server.base_url, "api_key": KEY, "num_retries": 0, "engine": "direct"}
    return LM("openai/m", **given | options)


def run_python(
    code: str, *arguments: str, flags: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _CA_NAMES}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


# --- Connections ---------------------------------------------------------------------------------


def connections(server: FakeServer) -> set[int]:
    return {request.connection for request in server.requests}


def test_connection_is_kept(server: FakeServer) -> None:
    """A new one for each call costs a round trip, and with TLS two more."""
    lm = lm_of(server)
    for number in range(20):
        lm(f"question {number}")
    assert len(server.requests) == 20
    assert len(connections(server)) == 1


@awaited
@on_asyncio
async def test_awaited_connection_is_kept(server: FakeServer) -> None:
    """Likewise on an event loop."""
    lm = lm_of(server)
    for number in range(20):
        await lm.acall(f"question {number}")
    assert len(server.requests) == 20
    assert len(connections(server)) == 1


def test_connection_is_kept_after_an_error(server: FakeServer) -> None:
    """An error that was read to its end says nothing about the connection."""
    lm = lm_of(server)
    for status in (400, 401, 422):
        server.script(Reply(status=status))
        with pytest.raises(Exception, match=str(status)):
            lm("hello")
    lm("hello")
    assert len(connections(server)) == 1


@awaited
async def test_connection_that_the_server_has_closed_is_not_used() -> None:
    """Servers close idle connections; the next call must not pay for it (B 4.7)."""
    with FakeServer() as server:
        lm = lm_of(server)
        lm("sync")
        await lm.acall("async")
        await anyio.to_thread.run_sync(server.close)
        server.start()
        assert lm("sync again") == ["echo: sync again"]
        assert await lm.acall("async again") == ["echo: async again"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_has_connections_of_its_own(server: FakeServer) -> None:
    """Two processes on one connection read each other's answers (B 7.3)."""
    lm = lm_of(server)
    lm("parent")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if lm("child") == ["echo: child"] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lm("parent again") == ["echo: parent again"]
    by_prompt = {request.prompt: request.connection for request in server.requests}
    assert by_prompt["parent"] == by_prompt["parent again"] != by_prompt["child"]


FORKED_LOOP = """
import asyncio, os, sys
import dspylite as dspy

lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="none", num_retries=0, engine="direct")

async def main():
    assert await lm.acall("parent") == ["echo: parent"]
    child = os.fork()
    if child == 0:
        # A loop cannot be shared between processes; the child starts one of its own.
        asyncio.events._set_running_loop(None)
        code = 1
        try:
            code = 0 if asyncio.run(lm.acall("child")) == ["echo: child"] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert await lm.acall("parent again") == ["echo: parent again"]

asyncio.run(main())
"""


FORKED_BETWEEN = """
import asyncio, os, sys
import dspylite as dspy

lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="none", num_retries=0, engine="direct")
loop = asyncio.new_event_loop()
assert loop.run_until_complete(lm.acall("parent")) == ["echo: parent"]
child = os.fork()
if child == 0:
    assert asyncio.run(lm.acall("child")) == ["echo: child"]
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert loop.run_until_complete(lm.acall("parent again", timeout=5)) == ["echo: parent again"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("code", [FORKED_LOOP, FORKED_BETWEEN], ids=["in it", "between runs"])
def test_child_forked_from_a_loop_has_connections_of_its_own(code: str, server: FakeServer) -> None:
    """The parent's connections, which its loop still watches, stay usable (B 7.3)."""
    run_python(code, server.base_url)
    by_prompt = {request.prompt: request.connection for request in server.requests}
    assert by_prompt["parent"] == by_prompt["parent again"] != by_prompt["child"]


LOOPS = """
import asyncio, gc, os, sys
import dspylite as dspy

base, ending = sys.argv[1:]

def lm_of(number):
    key = f"sk-of-tenant-{number:06}"
    return dspy.LM("openai/m", api_base=base, api_key=key, num_retries=0, engine="direct")

async def ask(number):
    stream = await lm_of(number).astream("hello")
    await stream.aclose()
    # Its connection is kept, and left to whatever becomes of the loop.
    assert await lm_of(number).acall("hello") == ["echo: hello"]

def run(number):
    if ending == "run":
        return asyncio.run(ask(number))
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(ask(number))
    finally:
        loop.close()

def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))

for number in range(3):
    run(number)
lm_of(0)("hello")
before = descriptors()
for number in range(200):
    run(number)
    lm_of(number)("hello")
print(descriptors() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are counted in /proc")
@pytest.mark.parametrize("ending", ["run", "closed by hand"])
def test_many_loops_and_keys_leave_nothing_open(ending: str, server: FakeServer) -> None:
    """A service that starts a loop for each request would run out of files (B 3.7)."""
    # asyncio itself warns, where it is asked to, of whatever a loop closed by hand still had.
    flags = ("-W", "default") if ending == "run" else ()
    done = run_python(LOOPS, server.base_url, ending, flags=flags)
    assert int(done.stdout) <= 5
    assert done.stderr == ""


# --- Other people's threads ----------------------------------------------------------------------


def test_full_default_executor_holds_no_call_up(server: FakeServer) -> None:
    """It belongs to the application, which may fill it with slow work (B 3.3)."""
    lm = lm_of(server, api_base=f"http://localhost:{server.port}/v1")
    over = threading.Event()

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(None, over.wait, 15) for _ in range(64)]
        try:
            with anyio.fail_after(10):
                return await lm.acall("hello")
        finally:
            over.set()
            await asyncio.gather(*jobs)

    with ThreadPoolExecutor(1) as other:  # this thread may have an unfinished loop of the plugin's
        assert other.submit(asyncio.run, main()).result() == ["echo: hello"]


NO_LITELLM = """
import asyncio, sys
import dspylite as dspy

options = {"api_base": sys.argv[1], "api_key": "none", "num_retries": 0}
lm, embedder = dspy.LM("openai/m", **options), dspy.Embedder("openai/m", **options)
predict = dspy.Predict("question -> answer")

async def main():
    await lm.acall("hello")
    async with await lm.astream("hello") as stream:
        assert "".join([piece.text async for piece in stream]) == "echo: hello"
    await embedder.aembed(["hello"])
    await lm.alist_models()

lm("hello")
with lm.stream("hello") as stream:
    assert "".join(piece.text for piece in stream) == "echo: hello"
embedder.embed(["hello"])
lm.list_models()
asyncio.run(main())
with dspy.context(lm=dspy.LM("openai/m", **options, price=(1, 1))), dspy.budget(usd=1):
    try:
        predict(question="?")
    except dspy.AdapterParseError:
        pass
print([name for name in ("litellm", "openai", "httpx", "pydantic_ai") if name in sys.modules])
"""


def test_litellm_is_never_loaded(server: FakeServer) -> None:
    """It costs seconds and 100 MB, which is why there is a direct engine (B 7.6)."""
    done = run_python(NO_LITELLM, server.base_url, DSPYLITE_ENGINE="auto")
    assert done.stdout == "[]\n"
    assert len(server.requests) >= 9


# --- Proxies -------------------------------------------------------------------------------------


@awaited
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_proxy_of_the_environment_is_used(
    variable: str, server: FakeServer, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    """Behind many a company's wall there is no other way out."""
    monkeypatch.setenv(variable, f"http://user:pa%20ss@127.0.0.1:{server.port}")
    case = "lower" if variable.islower() else "upper"  # a host of its own, asked for the first time
    host = f"{variable.replace('_', '-').lower()}-{case}-{anyio_backend}.example"
    lm = lm_of(server, api_base=f"http://{host}/v1")
    assert await lm.acall("async") == ["echo: async"]
    assert await anyio.to_thread.run_sync(lm, "sync") == ["echo: sync"]
    for request in server.requests:
        assert request.path == f"http://{host}/v1/chat/completions"
        assert request.headers["proxy-authorization"] == "Basic dXNlcjpwYSBzcw=="
        assert request.api_key == KEY


@awaited
async def test_no_proxy_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the same rack is not reached through the company's wall."""
    with FakeServer() as proxy, FakeServer() as model:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.1")
        lm = lm_of(model)
        assert await lm.acall("async") == ["echo: async"]
        assert await anyio.to_thread.run_sync(lm, "sync") == ["echo: sync"]
        assert (len(proxy.requests), len(model.requests)) == (0, 2)


def test_proxy_without_a_scheme_is_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HTTP_PROXY=proxy:3128` is what many files say."""
    monkeypatch.setenv("HTTPS_PROXY", "proxy:3128")
    assert proxy_for("https", "api.openai.com") == "http://proxy:3128"
    assert proxy_for("http", "api.openai.com") is None


def test_proxy_that_is_down_is_a_transport_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no library's own exception (B 4.7)."""
    with FakeServer() as gone:
        pass
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret-word@127.0.0.1:{gone.port}")
    lm = lm_of(gone, api_base="http://behind-a-dead-proxy.example/v1")
    with pytest.raises(LMTransportError) as caught:
        lm("hello")
    assert "secret-word" not in str(caught.value)


# --- Certificates --------------------------------------------------------------------------------

ANSWER = {"id": "x-1", "model": "m", "choices": [{"message": {"content": "hello"}}]}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


class _QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that refuses the certificate is what a test is about."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate for this machine, signed by itself."""
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
    return key, chain


@pytest.fixture(scope="module")
def tls_port(certificate: tuple[Path, Path]) -> Iterator[int]:
    """Serve one answer over TLS."""
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    server = _QuietServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


TLS = """
import asyncio, sys
import dspylite as dspy

lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="none", num_retries=0, engine="direct")

def told(call):
    try:
        return call()[0]
    except dspy.LMError as error:
        return f"{type(error).__name__}, {'certificate' in str(error).lower()}"

print(told(lambda: lm("hello")))
print(told(lambda: asyncio.run(lm.acall("hello"))))
"""


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_own_certificate_is_trusted_by_the_environment(
    variable: str, certificate: tuple[Path, Path], tls_port: int
) -> None:
    """A company's own authority is how its gateway is reached."""
    _, chain = certificate
    done = run_python(TLS, f"https://127.0.0.1:{tls_port}/v1", **{variable: str(chain)})
    assert done.stdout.split() == ["hello", "hello"]
    assert done.stderr == ""


def test_unknown_certificate_is_refused(tls_port: int) -> None:
    """Whoever is in between would get the key."""
    done = run_python(TLS, f"https://127.0.0.1:{tls_port}/v1")
    assert done.stdout.splitlines() == ["LMTransportError, True"] * 2


def test_certificate_for_another_name_is_refused(
    certificate: tuple[Path, Path], tls_port: int
) -> None:
    """A certificate proves a name, and only that name."""
    _, chain = certificate
    done = run_python(TLS, f"https://127.0.0.2:{tls_port}/v1", SSL_CERT_FILE=str(chain))
    assert all(line.startswith("LMTransportError") for line in done.stdout.splitlines())
