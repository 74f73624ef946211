"""What `dspylite.integrations.fastapi` does for an app, under a real uvicorn.

Not here: the example as a whole (`test_fastapi_service.py`), many tenants (`test_fastapi_load.py`).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Header, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import dspylite as dspy
from dspylite.errors import CallCancelledError, LMAuthError, LMRateLimitError, SettingsError
from dspylite.integrations.fastapi import (
    RequestBoundary,
    install,
    lifespan,
    settings_per_request,
)
from dspylite.runtime.cancellation import CANCELLATION
from dspylite.testing import FakeServer, Reply
from tests.serving import get, served

LIMIT_S = 10  # far above what anything here takes
PIECES = 3


def tenant() -> str:
    """Name the tenant that the settings of here and now belong to."""
    return str(dspy.settings.extra.get("tenant"))


def of_tenant(x_tenant: Annotated[str, Header()]) -> dict[str, object]:
    return {"extra": {"tenant": x_tenant}}


async def of_tenant_async(x_tenant: Annotated[str, Header()]) -> dict[str, object]:
    return {"extra": {"tenant": x_tenant}}


def of_tenant_in_a_block(x_tenant: Annotated[str, Header()]) -> Iterator[dict[str, object]]:
    yield {"extra": {"tenant": x_tenant}}


PER_TENANT = Depends(settings_per_request(of_tenant))


def installed(**options: bool) -> FastAPI:
    app = FastAPI()
    install(app, **options)
    return app


async def ask_in_this_task(
    app: Any, path: str = "/", headers: Mapping[str, str] | None = None, receive: Any = None
) -> tuple[int, bytes]:
    """Run one request in the caller's task, as an in-process ASGI transport does."""
    sent: list[Any] = []

    async def nothing_more() -> dict[str, Any]:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    named = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": named,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    with anyio.fail_after(LIMIT_S):
        await app(scope, receive or nothing_more, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"] if sent else 0, body


class Client:
    """A client that can go away in the middle."""

    def __init__(self, port: int, path: str, head: str = "", method: str = "GET") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())

    def read_until(self, ending: bytes) -> bytes:
        read = b""
        while not read.endswith(ending):
            piece = self.socket.recv(65_536)
            assert piece, read
            read += piece
        return read

    def leave(self) -> None:
        self.socket.close()


def wait(event: threading.Event) -> None:
    assert event.wait(LIMIT_S)


def wait_for_flag() -> None:
    """Wait, in a thread, until the work of here and now is told to stop."""
    flag = CANCELLATION.get()
    assert flag is not None
    raised = threading.Event()
    flag.watch(raised.set)
    wait(raised)


# --- Settings for each request -------------------------------------------------------------------


def app_of_tenants(make: Callable[..., Any], seen: queue.Queue[str]) -> FastAPI:
    app = FastAPI(dependencies=[Depends(settings_per_request(make))])
    install(app)

    @app.get("/sync")
    def sync() -> str:
        return tenant()

    @app.get("/async")
    async def asynchronous() -> str:
        return tenant()

    @app.get("/sync-stream")
    def sync_stream() -> StreamingResponse:
        return StreamingResponse(tenant() for _ in range(PIECES))

    @app.get("/async-stream")
    async def async_stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            for _ in range(PIECES):
                await anyio.lowlevel.checkpoint()
                yield tenant()

        return StreamingResponse(pieces())

    @app.get("/background")
    def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: seen.put(tenant()))

    @app.websocket("/websocket")
    async def websocket(connection: WebSocket) -> None:
        await connection.accept()
        await connection.send_text(tenant())
        await connection.close()

    return app


@pytest.mark.parametrize("make", [of_tenant, of_tenant_async, of_tenant_in_a_block])
def test_settings_of_a_request_reach_every_part_of_it(make: Callable[..., Any]) -> None:
    """Whatever kind of handler answers, it must use the tenant's own model and key. (B 1.1)"""
    seen: queue.Queue[str] = queue.Queue()
    app = app_of_tenants(make, seen)
    headers = {"x-tenant": "blue"}
    with served(app) as port:
        answers = {
            path: get(port, path, headers)[2].decode()
            for path in ("/sync", "/async", "/sync-stream", "/async-stream", "/background")
        }
    assert answers == {
        "/sync": '"blue"',
        "/async": '"blue"',
        "/sync-stream": "blue" * PIECES,
        "/async-stream": "blue" * PIECES,
        "/background": "null",
    }
    assert seen.get(timeout=LIMIT_S) == "blue"
    with TestClient(app).websocket_connect("/websocket", headers=headers) as connection:
        assert connection.receive_text() == "blue"


@pytest.mark.parametrize("is_mounted", [False, True])
async def test_settings_of_a_request_leave_no_trace_in_its_task(is_mounted: bool) -> None:
    """A server may run one request after the other in one task; the second has another tenant."""
    app = installed()
    inner = FastAPI() if is_mounted else app

    @inner.post("/tenant", dependencies=[PER_TENANT])
    async def with_settings() -> str:
        return tenant()

    @inner.post("/nobody")
    async def without_settings() -> str:
        return tenant()

    prefix = "/mounted" if is_mounted else ""
    if is_mounted:
        app.mount(prefix, inner)
    with dspy.context(extra={"tenant": "outer"}):
        for name in ("red", "blue"):
            answer = await ask_in_this_task(app, f"{prefix}/tenant", {"x-tenant": name})
            assert answer == (200, f'"{name}"'.encode())
            assert await ask_in_this_task(app, f"{prefix}/nobody") == (200, b'"outer"')
            assert (tenant(), CANCELLATION.get()) == ("outer", None)


@pytest.mark.parametrize("cancel_on_disconnect", [True, False])
def test_settings_of_a_request_do_not_reach_the_next_on_its_connection(
    cancel_on_disconnect: bool,
) -> None:
    """Proxies send the requests of many tenants over one connection. (B 9B)

    uvicorn starts a pipelined request from inside the last `send` of the one before it, and resumes
    reading a large upload from inside `receive` or the last `send`.
    """
    app = installed(cancel_on_disconnect=cancel_on_disconnect)

    def look() -> str:
        flag = CANCELLATION.get()
        assert flag is None or flag._parent is None, "the flag hangs on another request's"
        return tenant()

    @app.get("/somebody", dependencies=[PER_TENANT])
    async def somebody() -> str:
        return look()

    @app.get("/nobody")
    async def nobody() -> str:
        return look()

    @app.post("/unread", dependencies=[PER_TENANT])
    async def unread() -> str:
        await anyio.sleep(0.1)  # the server stops reading meanwhile
        return look()

    @app.post("/read", dependencies=[PER_TENANT])
    async def read(request: Request) -> str:
        await anyio.sleep(0.1)
        await request.body()
        return look()

    red = {"x-tenant": "red"}
    with served(app) as port:
        client = Client(port, "/somebody", "x-tenant: red\r\n")
        client.socket.sendall(b"GET /nobody HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: client.socket.recv(65_536), b""))
        client.leave()
        assert (answers.count(b'"red"'), answers.count(b'"None"')) == (1, 1)
        for path in ("/unread", "/read"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
            connection.request("POST", path, body=b"x" * 400_000, headers=red)
            assert connection.getresponse().read() == b'"red"'
            connection.request("GET", "/nobody")
            assert connection.getresponse().read() == b'"None"'
            connection.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_two_tenants_at_once_never_see_each_others_settings(kind: str) -> None:
    """Each looks while the other is between its first and its last look."""
    app = installed()
    together = threading.Barrier(2)

    @app.get("/sync", dependencies=[PER_TENANT])
    def sync() -> list[str]:
        looks = [tenant()]
        for _ in range(3):
            together.wait(LIMIT_S)
            looks.append(tenant())
        return looks

    @app.get("/async", dependencies=[PER_TENANT])
    async def asynchronous() -> list[str]:
        looks = [tenant()]
        for _ in range(3):
            await anyio.to_thread.run_sync(together.wait, LIMIT_S)
            looks.append(tenant())
        return looks

    with served(app) as port, ThreadPoolExecutor(2) as pool:
        names = ["red", "blue"]
        answers = pool.map(lambda name: get(port, f"/{kind}", {"x-tenant": name})[2], names)
        assert [json.loads(answer) for answer in answers] == [[name] * 4 for name in names]


def test_later_settings_override_earlier_ones_key_by_key() -> None:
    """An app's settings stay where a route names others."""
    app = FastAPI(dependencies=[Depends(settings_per_request(lambda: {"num_threads": 3}))])
    install(app)
    on_route = Depends(settings_per_request(lambda: {"max_errors": 2}))

    @app.get("/")
    def look(changes: Any = on_route) -> list[Any]:
        return [dspy.settings.num_threads, dspy.settings.max_errors, changes]

    with served(app) as port:
        assert json.loads(get(port, "/")[2]) == [3, 2, {"max_errors": 2}]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"lmm": None}, "Did you mean `lm`?"),
        ({"num_threads": 0}, "`num_threads` must be a whole number"),
        ("openai/m", "`wrong` must return settings by name"),
    ],
)
def test_impossible_settings_are_answered_with_500_and_logged(
    made: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller learns nothing of the inside; the owner learns the nearest key. (B 1.4)"""

    def wrong() -> Any:
        return made

    app = FastAPI(dependencies=[Depends(settings_per_request(wrong))])
    install(app)
    app.get("/")(lambda: None)
    with served(app) as port:
        status, _, body = get(port, "/")
    assert (status, json.loads(body)["error"]["code"]) == (500, "settings")
    assert said in caplog.text
    assert said not in body.decode()


def test_answer_that_cannot_be_read_is_logged_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a model wrote may quote what it was asked (B 4.11)."""
    app = FastAPI()
    install(app)

    @app.get("/")
    def ask() -> None:
        raise dspy.AdapterParseError("ChatAdapter", "question -> answer", "confidential")

    with served(app) as port, caplog.at_level("INFO"):
        status, _, body = get(port, "/")
    assert (status, "confidential" in body.decode()) == (502, False)
    assert "`ChatAdapter` could not read the answer for `question -> answer`." in caplog.text
    assert "confidential" not in caplog.text


async def test_settings_without_a_boundary_raise() -> None:
    """Without it they would last beyond the request, silently."""
    app = FastAPI(dependencies=[PER_TENANT])
    app.post("/")(lambda: None)
    with pytest.raises(SettingsError, match=r"install\(app\)"):
        await ask_in_this_task(app, headers={"x-tenant": "blue"})
    assert tenant() == "None"


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/handler", "/dependency"])
def test_failure_of_a_model_is_answered_with_its_status_and_wait(path: str) -> None:
    """A client that is told how long to wait does not come back too early. (B 9C)"""
    with FakeServer() as provider:
        provider.script(Reply(status=429, headers={"retry-after": "7"}))
        lm = dspy.LM("openai/m", api_base=provider.base_url, api_key="sk-1", num_retries=0)
        app = installed()

        def ask() -> str:
            return str(lm("Well?")[0])

        app.get("/handler")(ask)
        app.get("/dependency", dependencies=[Depends(ask)])(lambda: None)
        with served(app) as port:
            status, headers, body = get(port, path)
    assert (status, headers["retry-after"]) == (429, "7")
    assert headers.get_all("content-type") == ["application/json"]
    shown = json.loads(body)["error"]
    assert (shown["type"], shown["code"]) == ("LMRateLimitError", "rate_limit")
    assert shown["request_id"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LMAuthError("no"), None),
        (dspy.BatchError("1 failed", results={}, errors={0: ValueError("x")}), None),
        (dspy.InputFieldError("no"), 422),
    ],
)
async def test_every_error_of_the_tree_is_answered(error: Exception, status: int | None) -> None:
    """One handler serves the tree, so a new error needs no line in any app."""
    app = installed()

    @app.post("/")
    async def fail() -> None:
        raise error

    assert isinstance(error, dspy.DSPyError)
    expected = error.to_http()
    answered, body = await ask_in_this_task(app)
    assert (answered, json.loads(body)) == (expected.status, expected.body)
    assert status in {None, answered}


async def test_errors_of_others_and_unasked_mapping_pass_through() -> None:
    """What is not ours is the app's affair; and an app may have handlers of its own."""
    app = installed(errors=False)

    @app.post("/ours")
    async def ours() -> None:
        raise SettingsError("no")

    @app.post("/theirs")
    async def theirs() -> None:
        raise LookupError("no")

    with pytest.raises(SettingsError):
        await ask_in_this_task(app, "/ours")
    with pytest.raises(LookupError):
        await ask_in_this_task(app, "/theirs")


def test_error_after_the_first_piece_cuts_the_connection(capfd: pytest.CaptureFixture[str]) -> None:
    """A client must not take half of an answer for the whole."""
    app = installed()

    @app.get("/")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "half"
            raise LMAuthError("no")

        return StreamingResponse(pieces())

    with served(app) as port, pytest.raises(http.client.IncompleteRead) as cut:
        get(port, "/")
    assert cut.value.partial == b"half"
    assert "LMAuthError" in capfd.readouterr().err  # uvicorn's own log


@pytest.mark.parametrize(
    ("error", "code"), [(LMRateLimitError("no"), 1013), (LMAuthError("no"), 1011)]
)
@pytest.mark.parametrize("is_accepted", [False, True])
def test_error_closes_a_websocket_with_a_code(
    error: Exception, code: int, is_accepted: bool
) -> None:
    """A websocket has no status; its client must know whether to try again."""
    app = installed()

    @app.websocket("/")
    async def fail(connection: WebSocket) -> None:
        if is_accepted:
            await connection.accept()
        raise error

    with (
        pytest.raises(WebSocketDisconnect) as closed,
        TestClient(app).websocket_connect("/") as connection,
    ):
        connection.receive_text()
    assert closed.value.code == code


# --- Clients that go away ------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["", "expect: something-else\r\n"])
def test_async_handler_ends_when_its_client_goes_away(head: str) -> None:
    """Nobody waits for the answer, and every token of it costs money."""
    app = installed()
    started, ended = threading.Event(), threading.Event()

    @app.get("/")
    async def handler() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with served(app) as port:
        client = Client(port, "/", head)
        wait(started)
        client.leave()
        wait(ended)


def test_sync_handler_is_told_that_its_client_went_away() -> None:
    """A thread cannot be cancelled; it stops at its next look."""
    app = installed()
    started = threading.Event()
    said: queue.Queue[str] = queue.Queue()

    @app.get("/")
    def handler() -> None:
        started.set()
        wait_for_flag()
        try:
            dspy.check_cancelled()
        except CallCancelledError as error:
            said.put(str(error))
            raise

    with served(app) as port:
        client = Client(port, "/")
        wait(started)
        client.leave()
        assert said.get(timeout=LIMIT_S) == "Cancelled: the client went away."


@pytest.mark.parametrize("is_async", [False, True])
def test_body_of_a_stream_ends_when_its_client_goes_away(
    is_async: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stream of the model behind it is closed with it, and nobody need read of it."""
    app = installed()
    closed = threading.Event()

    def pieces() -> Iterator[bytes]:
        try:
            yield b"first"
            wait_for_flag()
            dspy.check_cancelled()
        finally:
            closed.set()

    async def async_pieces() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await anyio.sleep_forever()
        finally:
            closed.set()

    @app.get("/")
    def stream() -> StreamingResponse:
        return StreamingResponse(async_pieces() if is_async else pieces())

    with served(app) as port:
        client = Client(port, "/")
        client.read_until(b"first\r\n")
        client.leave()
        wait(closed)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_middleware_around_sees_that_a_client_left(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette's raises for a request without a response; that is no error of the app."""
    app = installed()
    begun = threading.Event()
    seen: queue.Queue[int] = queue.Queue()

    @app.middleware("http")
    async def look(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        seen.put(response.status_code)
        return response

    @app.get("/sync")
    def sync() -> None:
        begun.set()
        wait_for_flag()
        dspy.check_cancelled()

    @app.get("/async")
    async def asynchronous() -> None:
        begun.set()
        await anyio.sleep_forever()

    with served(app) as port:
        client = Client(port, f"/{kind}")
        wait(begun)
        client.leave()
        assert seen.get(timeout=LIMIT_S) == 499
    assert caplog.records == []


def test_background_task_runs_on_after_its_client_went_away() -> None:
    """Its response was complete, so the client had no reason to stay."""
    app = installed()
    left = threading.Event()
    outcome: queue.Queue[str] = queue.Queue()

    async def work() -> None:
        try:
            await anyio.to_thread.run_sync(wait, left)
            for _ in range(20):  # turns of the loop, in which a cancellation would arrive
                await anyio.lowlevel.checkpoint()
            dspy.check_cancelled()
        except BaseException as error:
            outcome.put(repr(error))
            raise
        outcome.put("done")

    @app.get("/")
    async def handler(tasks: BackgroundTasks) -> str:
        tasks.add_task(work)
        return "ok"

    with served(app) as port:
        client = Client(port, "/")
        client.read_until(b'"ok"')
        client.leave()
        left.set()
        assert outcome.get(timeout=LIMIT_S) == "done"


def test_disconnect_is_ignored_where_that_was_asked_for() -> None:
    """Some work must be finished once it was begun."""
    app = installed(cancel_on_disconnect=False)
    started, left = threading.Event(), threading.Event()
    outcome: queue.Queue[str] = queue.Queue()

    @app.get("/")
    async def handler(request: Request) -> None:
        started.set()
        await anyio.to_thread.run_sync(wait, left)
        while not await request.is_disconnected():
            await anyio.lowlevel.checkpoint()
        outcome.put("done")

    with served(app) as port:
        client = Client(port, "/")
        wait(started)
        client.leave()
        left.set()
        assert outcome.get(timeout=LIMIT_S) == "done"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_threads_of_a_request_that_the_server_stops_are_told() -> None:
    """A server that ends cancels its tasks, and its threads must not go on for minutes."""
    app = installed()
    started, told = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @app.post("/")
    def handler() -> None:
        loop.call_soon_threadsafe(started.set)
        wait_for_flag()
        told.set()

    task = asyncio.create_task(ask_in_this_task(app))
    await asyncio.wait_for(started.wait(), LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await anyio.to_thread.run_sync(told.wait, LIMIT_S)


# --- Requests that stay --------------------------------------------------------------------------


def test_upload_arrives_whole_and_the_connection_serves_on() -> None:
    """What the boundary reads ahead must reach the app, and the next request too."""
    app = installed()

    @app.post("/stream")
    async def stream(request: Request) -> list[Any]:
        size = 0
        async for piece in request.stream():
            size += len(piece)
        return [size, await request.is_disconnected()]

    @app.post("/body")
    async def body(request: Request) -> list[Any]:
        size = len(await request.body())
        return [size, await request.is_disconnected()]

    @app.post("/unread")
    def unread() -> str:
        return "fine"

    upload = b"x" * 3_000_000
    with served(app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        answers = []
        for path in ("/stream", "/body", "/unread", "/stream"):
            connection.request("POST", path, upload if path != "/unread" else b"short")
            answers.append(json.loads(connection.getresponse().read()))
        connection.close()
    assert answers == [[len(upload), False], [len(upload), False], "fine", [len(upload), False]]


async def test_upload_is_read_at_most_one_message_ahead() -> None:
    """A server stops the sender when nobody reads; reading for the app would fill the memory."""
    read, most_ahead = 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        await (anyio.lowlevel.checkpoint() if read < 20 else anyio.sleep_forever())
        read += 1
        return {"type": "http.request", "body": b"%d," % read, "more_body": read < 20}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal most_ahead
        body, taken, more = b"", 0, True
        while more:
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            most_ahead = max(most_ahead, read - taken)
            message = await receive()
            taken, body, more = taken + 1, body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    _, body = await ask_in_this_task(RequestBoundary(app), receive=receive)
    assert body == b"".join(b"%d," % number for number in range(1, 21))
    assert most_ahead == 1


async def test_failure_of_the_servers_receive_reaches_the_reader() -> None:
    """A limit on bodies, say, that stands around the boundary."""
    app = installed()

    async def receive() -> dict[str, Any]:
        raise EOFError("too long")

    @app.post("/")
    async def read(request: Request) -> str:
        try:
            await request.body()
        except EOFError as error:
            return str(error)
        return "nothing"

    assert await ask_in_this_task(app, receive=receive) == (200, b'"too long"')


def test_body_that_the_app_does_not_want_is_not_invited() -> None:
    """A client that asks first must not send megabytes to be refused."""
    app = installed()

    @app.post("/refused")
    async def refuse() -> None:
        for _ in range(10):  # turns of the loop, in which the body would be asked for
            await anyio.lowlevel.checkpoint()
        raise dspy.InputFieldError("no")

    @app.post("/taken")
    async def take(request: Request) -> int:
        return len(await request.body())

    head = "expect: 100-continue\r\ncontent-length: 4\r\n"
    with served(app) as port:
        client = Client(port, "/refused", head, "POST")
        assert client.socket.recv(65_536).startswith(b"HTTP/1.1 422")
        client.leave()
        client = Client(port, "/taken", head, "POST")
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        client.socket.sendall(b"body")
        assert client.read_until(b"\r\n\r\n4").startswith(b"HTTP/1.1 200")
        client.leave()


async def test_boundary_inside_a_boundary_does_nothing() -> None:
    """An app that is mounted in another may be given to `install` as well."""
    outer, inner = installed(), installed()
    flags = []

    @inner.post("/fail")
    async def fail() -> None:
        flag = CANCELLATION.get()
        flags.append(None if flag is None else flag._parent)
        raise dspy.InputFieldError("no")

    outer.mount("/in", inner)
    assert (await ask_in_this_task(outer, "/in/fail"))[0] == 422
    assert flags == [None]


# --- The life of the app -------------------------------------------------------------------------


class Model(dspy.BaseLM):
    """Notes on which thread it is prepared."""

    def __init__(self) -> None:
        super().__init__("my/model")
        self.prepared_on: list[int] = []

    def preload(self) -> None:
        self.prepared_on.append(threading.get_ident())


def test_models_are_prepared_in_a_thread_before_the_first_request() -> None:
    """Neither the event loop nor a request waits for imports. (B 7.6)"""
    model = Model()
    app = FastAPI(lifespan=lifespan(preload=[model]))

    @app.get("/")
    async def look() -> tuple[list[int], int]:
        return model.prepared_on, threading.get_ident()

    with served(app) as port:
        (prepared_on,), loop_thread = json.loads(get(port, "/")[2])
    assert prepared_on not in {loop_thread, threading.get_ident()}


def test_so_many_sync_handlers_run_at_once() -> None:
    """More than anyio's 40 would otherwise wait in line, each for a model of its own."""
    count = 45
    together = threading.Barrier(count)
    app = FastAPI(lifespan=lifespan(sync_threads=count))
    app.get("/")(lambda: together.wait(LIMIT_S) >= 0)
    with served(app) as port, ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda _: get(port, "/")[0], range(count)))
    assert answers == [200] * count


async def test_lifespan_runs_the_apps_own_inside_and_restores_the_limit() -> None:
    """An app may have a database to open; a loop may go on to serve another app."""
    order: list[str] = []
    limiter = anyio.to_thread.current_default_thread_limiter()
    before = limiter.total_tokens

    @asynccontextmanager
    async def own(app: str) -> AsyncIterator[dict[str, str]]:
        order.append(f"{app} begins with {limiter.total_tokens:.0f}")
        yield {"of": app}
        order.append(f"{app} ends")

    async with lifespan(sync_threads=3, inner=own)("it") as state:
        assert state == {"of": "it"}
    async with lifespan()("it") as state:
        assert state is None
    assert order == ["it begins with 3", "it ends"]
    assert limiter.total_tokens == before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_end_of_the_app_closes_this_loops_connections() -> None:
    """A loop that goes on keeps no descriptor of an app that is gone."""
    with FakeServer(answer="Paris") as provider:
        lm = dspy.LM("openai/m", api_base=provider.base_url, api_key="sk-1")
        for _ in range(2):
            async with lifespan(preload=[lm])(None):
                for _ in range(2):
                    await lm.acall("Capital?")
        first, again, second, again_second = (r.connection for r in provider.requests)
    assert first == again != second == again_second


@pytest.mark.parametrize(
    "wrong",
    [
        {"sync_threads": 0},
        {"sync_threads": True},
        {"sync_threads": "9"},
        {"preload": ["m"]},
        {"preload": dspy.OfflineLM()},
    ],
)
def test_impossible_lifespan_raises_where_it_is_made(wrong: dict[str, Any]) -> None:
    """Not when the server starts, far from the line that is wrong."""
    with pytest.raises(SettingsError):
        lifespan(**wrong)


def test_missing_fastapi_is_named_with_its_remedy() -> None:
    """The extra is not installed with the library. (B 7.6)"""
    code = """
import sys
sys.modules["fastapi"] = None
import dspylite
try:
    import dspylite.integrations.fastapi
except dspylite.MissingExtraError as error:
    print(error)
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=50)
    assert "pip install dspylite[fastapi]" in printed
