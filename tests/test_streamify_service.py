"""Streamed programs as server-sent events, in FastAPI under a real uvicorn.

Not here: what a stream gives otherwise (`test_streamify.py`).
"""

from __future__ import annotations

import gc
import http.client
import json
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from dspylite import (
    LM,
    Module,
    Predict,
    Prediction,
    StatusMessage,
    StreamListener,
    StreamResponse,
    context,
    streamify,
    streaming_response,
)
from dspylite.errors import LMRateLimitError
from dspylite.integrations import fastapi as integration
from dspylite.testing import FakeServer, Reply
from tests.serving import get, served

KEY = "sk-key-of-this-test-0123456789"
PIECES = ["[[ ## ans", "wer ## ]]\nPar", "is\n\n", "twice", "\n\n[[ ## completed ## ]]"]
ENDLESS = Reply(chunks=["[[ ## answer ## ]]\n", *["a "] * 5_000], chunk_delay_s=0.005)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")


class Ask(Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        found: Prediction = self.ask(question=question)
        return found


class Awaited(Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = Predict("question -> answer")

    async def aforward(self, question: str) -> Prediction:
        found: Prediction = await self.ask.acall(question=question)
        return found


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "installed"])
def port(request: pytest.FixtureRequest, running: FakeServer) -> Iterator[int]:
    """Serve an app, with and without our integration installed."""
    app = FastAPI()
    if request.param:
        integration.install(app)
    lm = LM("openai/m", api_base=running.base_url, api_key=KEY, num_retries=0)
    listeners = [StreamListener("answer")]
    as_async = {
        "threaded": streamify(Ask(), stream_listeners=listeners),
        "awaited": streamify(Awaited(), stream_listeners=listeners),
    }
    as_sync = streamify(Ask(), stream_listeners=listeners, async_streaming=False)

    @app.get("/async/{name}")
    async def async_handler(name: str) -> StreamingResponse:
        with context(lm=lm):
            stream = streaming_response(as_async[name](question="?"))
        return StreamingResponse(stream, media_type="text/event-stream")

    @app.get("/sync")
    def sync_handler() -> StreamingResponse:
        with context(lm=lm):
            stream = streaming_response(as_sync(question="?"))
        return StreamingResponse(stream, media_type="text/event-stream")

    with served(app) as number:
        yield number
    gc.collect()


@pytest.fixture
def server(running: FakeServer) -> Iterator[FakeServer]:
    running.clear()
    yield running
    running.wait_until_idle()


def wait_until_left(server: FakeServer) -> None:
    """Wait as a busy service does, which collects garbage now and then.

    Starlette drops a sync iterator without closing it, in a cycle of references.
    """
    for _ in range(100):
        gc.collect()
        try:
            server.wait_until_idle(timeout_s=0.1)
        except TimeoutError:
            continue
        return


PATHS = ["/async/threaded", "/async/awaited", "/sync"]


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_is_served_as_events(path: str, port: int, server: FakeServer) -> None:
    """Each event is one line of JSON, whatever is in it; the settings are the handler's."""
    server.script(Reply(chunks=PIECES))
    status, headers, body = get(port, path)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    told = [json.loads(event.removeprefix("data: ")) for event in events]
    chunks = [event["stream_response"] for event in told[:-1]]
    assert "".join(chunk["chunk"] for chunk in chunks) == "Paris\n\ntwice"
    assert chunks[0] == {
        "predict_name": "ask",
        "signature_field_name": "answer",
        "chunk": "Par",
        "is_last_chunk": False,
    }
    assert chunks[-1]["is_last_chunk"]
    assert told[-1] == {"prediction": {"answer": "Paris\n\ntwice"}}


@pytest.mark.parametrize("path", PATHS)
def test_events_arrive_one_by_one_and_stop_with_their_reader(
    path: str, port: int, server: FakeServer
) -> None:
    """The answer has no end; the client leaves, and the model's stream is closed (B 3.4)."""
    server.script(ENDLESS)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        assert json.loads(response.readline().removeprefix(b"data: "))["stream_response"]
        assert server.in_flight == 1
        response.close()
    finally:
        connection.close()
    wait_until_left(server)
    assert [request.client_left for request in server.requests] == [True]


@pytest.mark.parametrize("path", PATHS)
def test_a_failure_in_the_stream_is_an_event_that_names_nothing(
    path: str, port: int, server: FakeServer
) -> None:
    """The status was sent long ago; key, model and endpoint stay inside; no end mark comes."""
    server.script(Reply(chunks=PIECES, cut_after=3))
    status, _, body = get(port, path)
    *_, event, rest = body.decode().split("\n\n")
    name, data = event.split("\n")
    assert (status, name, rest) == (200, "event: error", "")
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["type"] == "LMServerError"
    assert not any(secret in body.decode() for secret in (KEY, server.base_url, "openai/m"))
    assert "[DONE]" not in body.decode()


def lines(*events: Any, error: Exception | None = None) -> list[str]:
    def stream() -> Iterator[Any]:
        yield from events
        if error is not None:
            raise error

    return list(streaming_response(stream()))


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (Prediction(answer="a\nb"), '{"prediction": {"answer": "a\\nb"}}'),
        (StatusMessage("x\n\ndata: y"), '{"status_message": "x\\n\\ndata: y"}'),
        ("data: forged\n\nevent: error", '{"value": "data: forged\\n\\nevent: error"}'),
        (
            StreamResponse("p", "f", "c", is_last_chunk=True, item_index=0, is_restart=True),
            '{"stream_response": {"predict_name": "p", "signature_field_name": "f", "chunk": "c", '
            '"is_last_chunk": true, "item_index": 0, "is_restart": true}}',
        ),
        ("half \ud83d", '{"value": "half ?"}'),
        (Prediction(score=float("nan"), of="NaN"), '{"prediction": {"score": null, "of": "NaN"}}'),
        ("a\u2028b\u2029c\x85d", '{"value": "a\\u2028b\\u2029c\\u0085d"}'),
    ],
)
def test_every_event_is_one_line_of_data(event: Any, data: str) -> None:
    """No text of a model or user can end its event and forge another."""
    assert lines(event) == [f"data: {data}\n\n", "data: [DONE]\n\n"]
    assert lines(event)[0].encode()
    assert lines(event)[0].splitlines() == [f"data: {data}", ""]  # as httpx and others split it
    json.loads(data, parse_constant=pytest.fail)


def test_failures_of_others_are_told_without_their_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ours say their kind; of the others nothing is known to be fit for a stranger."""
    (limited,) = lines(error=LMRateLimitError("openai/m: slow down", retry_after=2))
    assert json.loads(limited.split("data: ")[1])["error"]["code"] == "rate_limit"
    assert "openai" not in limited
    assert "secret words" not in caplog.text
    (other,) = lines(error=ValueError("secret words"))
    assert "secret words" not in other
    assert "ValueError" not in other
    assert "secret words" in caplog.text  # for whoever runs the service


def test_closing_the_events_closes_the_stream() -> None:
    """Frameworks close what they were given, and not what lies behind it."""
    closed: list[str] = []

    def stream() -> Iterator[int]:
        try:
            yield 1
        finally:
            closed.append("sync")

    async def astream() -> Any:
        try:
            yield 1
        finally:
            closed.append("async")

    async def leave() -> None:
        inner = astream()  # held, so that nothing else closes it
        events = streaming_response(inner)
        await anext(events)
        await events.aclose()
        assert closed == ["sync", "async"]

    events = streaming_response(stream())
    next(events)
    events.close()
    anyio.run(leave)
    assert closed == ["sync", "async"]
