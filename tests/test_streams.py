"""Streamed answers through both engines: closing, breaking, retries before the first piece, counts.

Not here: what the pieces say (`test_engines.py`), and each kind of failure (`test_faults.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from dspylite import (
    LM,
    BaseCallback,
    LMStream,
    Module,
    OfflineLM,
    budget,
    context,
    track_usage,
)
from dspylite.errors import (
    DeadlineExceededError,
    LMError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.direct import engine as direct_engine
from dspylite.schema.messages import LMOutput, LMResponse
from dspylite.testing import FakeClock, FakeLM, FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
ENDLESS = Reply(chunks=["a "] * 5_000, chunk_delay_s=0.005)
"""A stream that ends only when its reader leaves, as far as a test can wait."""
SHORT = Reply(chunks=["a ", "b ", "c"])


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address."""
    with FakeServer() as server:
        yield server


awaited = pytest.mark.usefixtures("one_loop")


@pytest.fixture(params=["direct", "litellm"])
def engine(request: pytest.FixtureRequest) -> str:
    """Run a test through both engines."""
    name: str = request.param
    return name


def lm_of(server: FakeServer, engine: str, **options: Any) -> LM:
    given = {"api_base": server.base_url, "api_key": KEY, "num_retries": 0, "engine": engine}
    return LM("openai/m", **given | options)


def texts(server: FakeServer, lm: LM) -> list[str]:
    with lm.stream("hello") as stream:
        return [piece.text for piece in stream if piece.text]


async def atexts(lm: LM) -> list[str]:
    async with await lm.astream("hello") as stream:
        return [piece.text async for piece in stream if piece.text]


def check_left(server: FakeServer) -> None:
    """Check that the only stream was left by its reader before its end."""
    server.wait_until_idle()
    (request,) = server.requests
    assert request.client_left
    assert request.usage is None


# --- Leaving early -------------------------------------------------------------------------------


def test_closed_stream_closes_its_connection(server: FakeServer, engine: str) -> None:
    """A model that writes for nobody costs money; the server must hear of it at once (B 4.14)."""
    server.script(ENDLESS)
    stream = lm_of(server, engine).stream("hello")
    assert next(stream).text == "a "
    stream.close()
    check_left(server)
    assert list(stream) == []


def test_broken_loop_closes_the_connection(server: FakeServer, engine: str) -> None:
    """`break` out of the block is how most readers leave (B 4.14)."""
    server.script(ENDLESS)
    with lm_of(server, engine).stream("hello") as stream:
        for piece in stream:
            if piece.text:
                break
    check_left(server)


def test_raising_reader_closes_the_connection(server: FakeServer, engine: str) -> None:
    """A failure of the reader is its own, and leaves nothing open (B 4.14)."""
    server.script(ENDLESS)
    with (
        pytest.raises(ZeroDivisionError),
        lm_of(server, engine).stream("hello") as stream,
    ):
        1 / len(next(stream).reasoning)
    check_left(server)


def test_stream_that_nobody_read_is_closed(server: FakeServer, engine: str) -> None:
    """Whoever opens a stream and changes their mind owes nothing (B 4.14)."""
    server.script(ENDLESS)
    with lm_of(server, engine).stream("hello"):
        server.wait_for_requests(1)
    check_left(server)


@awaited
async def test_awaited_broken_loop_closes_the_connection(server: FakeServer, engine: str) -> None:
    """A handler whose client has gone leaves its loop (B 3.4)."""
    server.script(ENDLESS)
    async with await lm_of(server, engine).astream("hello") as stream:
        async for piece in stream:
            if piece.text:
                break
    await anyio.to_thread.run_sync(check_left, server)


@awaited
async def test_aclosed_stream_closes_its_connection(server: FakeServer, engine: str) -> None:
    """`aclose` is what frameworks call on a generator's behalf (B 3.4)."""
    server.script(ENDLESS)
    stream = await lm_of(server, engine).astream("hello")
    assert (await anext(stream)).text == "a "
    await stream.aclose()
    await anyio.to_thread.run_sync(check_left, server)


@awaited
async def test_cancelled_reader_closes_the_connection(server: FakeServer, engine: str) -> None:
    """A cancelled task must not leave a model writing (B 3.4)."""
    server.script(ENDLESS)
    lm, is_reading = lm_of(server, engine), anyio.Event()

    async def read() -> None:
        async with await lm.astream("hello") as stream:
            async for _ in stream:
                is_reading.set()

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await is_reading.wait()
        group.cancel_scope.cancel()
    await anyio.to_thread.run_sync(check_left, server)


def test_connection_of_a_whole_stream_is_used_again(server: FakeServer) -> None:
    """A stream read to its end costs no connection; litellm's is closed instead."""
    server.script(*[SHORT] * 5)
    lm = lm_of(server, "direct")
    for _ in range(5):
        texts(server, lm)
    assert len({request.connection for request in server.requests}) == 1


# --- Breaking ------------------------------------------------------------------------------------


def test_pieces_before_a_cut_are_given_and_then_the_error(server: FakeServer, engine: str) -> None:
    """What was shown stays shown; only that it was all of it would be a lie (B 4.14)."""
    server.script(Reply(chunks=["a ", "b ", "c"], cut_after=2))
    found: list[str] = []
    with lm_of(server, engine).stream("hello") as stream, pytest.raises(LMServerError, match="cut"):
        found.extend(piece.text for piece in stream)
    assert "".join(found) == "a b "
    assert stream.response.outputs[0].finish_reason is None


@awaited
async def test_awaited_cut_stream_is_an_error(server: FakeServer, engine: str) -> None:
    """litellm ends a cut stream with a "stop" of its own (B 4.14)."""
    server.script(Reply(chunks=["a ", "b ", "c"], cut_after=2))
    with pytest.raises(LMServerError, match="cut"):
        await atexts(lm_of(server, engine))


@awaited
@pytest.mark.parametrize("reply", [Reply(cut_after=0), Reply(body="data: [DONE]\n\n")], ids=str)
async def test_empty_stream_is_an_error(reply: Reply, server: FakeServer, engine: str) -> None:
    """An empty answer that looks like one would be cached, shown and believed (B 4.14)."""
    server.script(reply)
    with pytest.raises(LMServerError):
        await atexts(lm_of(server, engine))


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_finish_reason_is_the_servers_own(reason: str, server: FakeServer, engine: str) -> None:
    """An adapter decides by it whether an answer is whole (B 4.14)."""
    server.script(Reply(chunks=["a"], finish_reason=reason))
    with lm_of(server, engine).stream("hello") as stream:
        reasons = [piece.finish_reason for piece in stream if piece.finish_reason]
    assert reasons == [reason]
    assert stream.response.outputs[0].finish_reason == reason


def test_keep_alive_comments_do_not_keep_a_stream_alive(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stuck model behind a polite proxy would hold its reader for ever (B 4.13)."""
    monkeypatch.setattr(direct_engine, "IDLE_S", 0.3)
    server.script(Reply(chunks=["a ", "b"], cut_after=1, keepalive_comments=True))
    found: list[str] = []
    with (
        lm_of(server, "direct").stream("hello") as stream,
        pytest.raises(LMTimeoutError, match="nothing more was said"),
    ):
        found.extend(piece.text for piece in stream)
    assert found == ["a "]
    check_left(server)


@awaited
async def test_keep_alive_comments_do_not_keep_an_awaited_stream_alive(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise on either event loop (B 4.13)."""
    monkeypatch.setattr(direct_engine, "IDLE_S", 0.3)
    server.script(Reply(chunks=["a ", "b"], cut_after=1, keepalive_comments=True))
    with pytest.raises(LMTimeoutError, match="nothing more was said"):
        await atexts(lm_of(server, "direct"))
    await anyio.to_thread.run_sync(check_left, server)


# --- Before the first piece, and after -----------------------------------------------------------


def test_stream_is_retried_until_it_opens(server: FakeServer, engine: str) -> None:
    """Nothing was shown yet, so nobody can notice (B 4.1)."""
    server.script(Reply(status=503), Reply(drop="before"), SHORT)
    with FakeClock() as clock:
        assert texts(server, lm_of(server, engine, num_retries=2)) == ["a ", "b ", "c"]
    assert len(server.requests) == 3
    assert len(clock.sleeps) == 2


@awaited
async def test_awaited_stream_is_retried_until_it_opens(server: FakeServer, engine: str) -> None:
    """Likewise on either event loop (B 4.1)."""
    server.script(Reply(status=503), Reply(status=503), SHORT)
    with FakeClock():
        assert await atexts(lm_of(server, engine, num_retries=2)) == ["a ", "b ", "c"]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(chunks=["a ", "b ", "c"], cut_after=1), LMServerError),
        (Reply(chunks=["a ", "b ", "c"], cut_after=1, drop="body"), LMTransportError),
    ],
    ids=["cut", "dropped"],
)
def test_stream_that_was_read_is_never_begun_anew(
    reply: Reply, error: type[LMError], server: FakeServer, engine: str
) -> None:
    """Its reader would get the beginning twice (B 4.14)."""
    server.script(reply)
    with pytest.raises(error):
        texts(server, lm_of(server, engine, num_retries=5))
    assert len(server.requests) == 1


def test_fallback_takes_over_before_the_first_piece(server: FakeServer, engine: str) -> None:
    """A chat goes on when its first model is down (B 4.6)."""
    spare = LM("openai/spare", api_base=server.base_url, api_key=KEY, engine=engine)
    server.script(Reply(status=503), SHORT)
    lm = lm_of(server, engine, fallbacks=[spare])
    with lm.stream("hello") as stream:
        assert [piece.text for piece in stream if piece.text] == ["a ", "b ", "c"]
    assert [request.json["model"] for request in server.requests] == ["m", "spare"]
    assert stream.response.answered_by == "openai/spare"


@awaited
async def test_fallback_does_not_take_over_a_read_stream(server: FakeServer, engine: str) -> None:
    """Two models would answer in one text (B 4.6)."""
    spare = LM("openai/spare", api_base=server.base_url, api_key=KEY, engine=engine)
    server.script(Reply(chunks=["a ", "b"], cut_after=1))
    with pytest.raises(LMServerError):
        await atexts(lm_of(server, engine, fallbacks=[spare]))
    assert [request.json["model"] for request in server.requests] == ["m"]


@pytest.mark.parametrize("close", [True, False], ids=["closed", "read"])
def test_open_stream_holds_its_place(close: bool, server: FakeServer, engine: str) -> None:
    """The server is busy with it, so `max_concurrency` must count it until it is over (B 4.5)."""
    lm = lm_of(server, engine, max_concurrency=1, max_queue=0)
    with server.hold():
        pass  # from here on nothing is held; the next two are as fast as they can be
    server.script(ENDLESS if close else SHORT)
    stream = lm.stream("hello")
    with pytest.raises(LMError, match="max_concurrency"):
        lm("second")
    if close:
        stream.close()
    else:
        list(stream)
    assert lm("third") == ["echo: third"]
    assert [request.prompt for request in server.requests] == ["hello", "third"]


def test_broken_stream_gives_its_place_back(server: FakeServer, engine: str) -> None:
    """A place that is lost with each failure is an outage after a day (B 4.5)."""
    lm = lm_of(server, engine, max_concurrency=1, max_queue=0)
    server.script(Reply(cut_after=1))
    with pytest.raises(LMServerError):
        texts(server, lm)
    assert lm("second") == ["echo: second"]


# --- Counts and callbacks ------------------------------------------------------------------------


class Heard(BaseCallback):
    """Keeps what callbacks are told of the end of a call."""

    def __init__(self) -> None:
        self.starts = 0
        self.ends: list[tuple[Any, str | None]] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.starts += 1

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.ends.append((outputs, type(exception).__name__ if exception else None))


def test_stream_is_counted_as_the_server_counts_it(server: FakeServer, engine: str) -> None:
    """Usage comes after the last piece, and belongs to the call all the same (B 4.10)."""
    server.script(SHORT)
    lm = lm_of(server, engine)
    with track_usage() as tracker, lm.stream("one two") as stream:
        assert tracker.total.calls == 0
        list(stream)
    counted = server.requests[0].usage
    assert counted is not None
    usage = stream.response.usage
    assert usage == tracker.total
    assert usage.prompt_tokens == counted["prompt_tokens"] == 2
    assert usage.total_tokens == counted["total_tokens"] == 5
    assert lm.history[-1].outputs == ("a b c",)


def test_callbacks_hear_the_end_with_the_whole_answer(server: FakeServer, engine: str) -> None:
    """A trace of a stream ends with the stream, not with its beginning (B 4.15)."""
    server.script(SHORT)
    heard = Heard()
    with context(callbacks=[heard]), lm_of(server, engine).stream("hello") as stream:
        next(stream)
        assert (heard.starts, heard.ends) == (1, [])
        list(stream)
    assert heard.ends == [(["a b c"], None)]


def test_callbacks_hear_of_a_broken_stream(server: FakeServer, engine: str) -> None:
    """An error that comes late is an error (B 4.15)."""
    server.script(Reply(chunks=["a ", "b"], cut_after=1))
    heard = Heard()
    with context(callbacks=[heard]), pytest.raises(LMServerError):
        texts(server, lm_of(server, engine))
    assert heard.ends == [(None, "LMServerError")]


@awaited
async def test_callbacks_hear_of_a_stream_that_was_left(server: FakeServer, engine: str) -> None:
    """Leaving is no error, and what was read until then is told (B 4.15)."""
    server.script(ENDLESS)
    heard = Heard()
    with context(callbacks=[heard]):
        async with await lm_of(server, engine).astream("hello") as stream:
            await anext(stream)
    await anyio.to_thread.run_sync(check_left, server)
    ((outputs, error),) = heard.ends
    assert outputs[0].startswith("a ")
    assert error is None


def test_stream_that_is_refused_is_told_where_it_is_opened(server: FakeServer, engine: str) -> None:
    """No error waits for somebody to read the first piece."""
    server.script(Reply(status=429, headers={"retry-after": "9"}))
    with pytest.raises(LMRateLimitError) as caught:
        lm_of(server, engine).stream("hello")
    assert caught.value.retry_after_s == 9
    assert not isinstance(caught.value, DeadlineExceededError)


def test_stream_read_on_another_thread_is_counted_where_it_was_opened(
    server: FakeServer, engine: str
) -> None:
    """Frameworks read what a handler opened from threads of their own (B 1.1, 4.10)."""
    server.script(SHORT)
    lm = lm_of(server, engine)

    class Streaming(Module):
        def forward(self) -> LMStream:
            return lm.stream("one two")

    module, heard = Streaming(), Heard()
    with context(callbacks=[heard]), budget(tokens=100) as spending, track_usage() as tracker:
        stream = module()
        reader = threading.Thread(target=list, args=(stream,))
        reader.start()
        reader.join()
    assert heard.ends == [(["a b c"], None)]
    assert (spending.calls, len(module.history), tracker.total.calls) == (1, 1, 1)


# --- Models that do not stream -------------------------------------------------------------------


def test_model_that_cannot_stream_gives_its_answer_in_one_piece() -> None:
    """A program that streams can be tried offline, and tested with scripted answers."""
    lm = FakeLM([LMResponse(outputs=(LMOutput(text="a"), LMOutput(text="b", reasoning="why")))])
    with lm.stream("q") as stream:
        pieces = list(stream)
    assert [(p.index, p.text, p.reasoning) for p in pieces] == [(0, "a", ""), (1, "b", "why")]
    assert [output.text for output in stream.response.outputs] == ["a", "b"]
    assert len(lm.history) == 1


async def test_offline_model_streams_too() -> None:
    """The embedded default serves every endpoint of a service."""
    with track_usage() as tracker:
        async with await OfflineLM().astream("Snow is white. What colour is snow?") as stream:
            pieces = [piece async for piece in stream]
    assert "white" in pieces[0].text
    assert [piece.finish_reason for piece in pieces] == ["stop"]
    assert tracker.total == stream.response.usage
    assert tracker.total.calls == 1


def test_fallback_that_cannot_stream_takes_over(server: FakeServer) -> None:
    """An answer in one piece is better than none."""
    server.script(Reply(status=500))
    lm = lm_of(server, "direct", fallbacks=[FakeLM(["spare"])])
    with lm.stream("q") as stream:
        assert [piece.text for piece in stream] == ["spare"]
