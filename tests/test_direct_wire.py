"""What the direct engine sends, and what it takes from a server that means ill or is just broken.

Not here: what an exchange says (`test_engines.py`), and what the process around it is left with
(`test_direct_process.py`).
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from dspylite import LM, Embedder
from dspylite.errors import (
    MAX_MESSAGE_CHARS,
    BatchError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMServerError,
    LMTimeoutError,
    LMUnexpectedError,
)
from dspylite.models.direct.wire import BodyReader, Limits
from dspylite.testing import FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address."""
    with FakeServer() as server:
        yield server


awaited = pytest.mark.usefixtures("one_loop")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
each_engine = pytest.mark.parametrize("engine", ["direct", "litellm"])


def lm_of(server: FakeServer, **options: Any) -> LM:
    given = {"api_base": server.base_url, "api_key": KEY, "num_retries": 0, "engine": "direct"}
    return LM("openai/m", **given | options)


def failure(lm: LM, prompt: str = "hello", **options: Any) -> LMError:
    with pytest.raises(LMError) as caught:
        lm(prompt, **options)
    return caught.value


async def afailure(lm: LM, prompt: str = "hello", **options: Any) -> LMError:
    with pytest.raises(LMError) as caught:
        await lm.acall(prompt, **options)
    return caught.value


# --- How large an answer may be ------------------------------------------------------------------

LARGE = {
    "announced": Reply(text="x" * 5_000),
    "not announced": Reply(padding_bytes=5_000),
    "compressed": Reply(text="x" * 5_000, gzip=True),
    "compressed, without end": Reply(gzip=True, padding_bytes=10**9),
}
each_large = pytest.mark.parametrize("reply", list(LARGE.values()), ids=list(LARGE))


@each_large
def test_too_large_answer_is_refused(reply: Reply, server: FakeServer) -> None:
    """Memory is bounded by us, not by the server; and it would be as large again (B 4.13)."""
    server.script(reply)
    error = failure(lm_of(server, max_response_bytes=1_000, num_retries=5))
    assert (type(error), error.retryable) == (LMUnexpectedError, False)
    assert "max_response_bytes" in error.message
    assert len(server.requests) == 1


@awaited
@on_asyncio
@each_large
async def test_too_large_awaited_answer_is_refused(reply: Reply, server: FakeServer) -> None:
    """Likewise on an event loop (B 4.13)."""
    server.script(reply)
    error = await afailure(lm_of(server, max_response_bytes=1_000, num_retries=5))
    assert type(error) is LMUnexpectedError
    assert len(server.requests) == 1


def test_too_large_stream_is_refused(server: FakeServer) -> None:
    """A stream has no end to wait for, so its sum counts (B 4.13)."""
    server.script(Reply(chunks=["x" * 100] * 100))
    with (
        lm_of(server, max_response_bytes=3_000).stream("hello") as stream,
        pytest.raises(LMError, match="max_response_bytes"),
    ):
        list(stream)


def test_answer_of_the_largest_size_is_read(server: FakeServer) -> None:
    """A limit that is reached is not passed."""
    body = json.dumps({"choices": [{"message": {"content": "x" * 500}}]})
    server.script(Reply(body=body), Reply(body=body, gzip=True), Reply(body=body))
    for _ in range(2):
        assert lm_of(server, max_response_bytes=len(body))("hi") == ["x" * 500]
    assert "larger" in failure(lm_of(server, max_response_bytes=len(body) - 1)).message


BOMB = """
import resource, sys, time
import anyio
import dspylite as dspy

lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="none", num_retries=0, engine="direct")
lm("warm-up")

async def awaited():
    await lm.acall("warm-up")
    return await timed(lm.acall)

async def timed(call):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        await call("now")
    except dspy.LMError as error:
        kind = type(error).__name__
    seconds = time.monotonic() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(kind, round(seconds, 3), grown // 1024)

async def blocking(prompt):
    return lm(prompt)

try:
    timed(blocking).send(None)
except StopIteration:
    pass
anyio.run(awaited)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="`ru_maxrss` has another unit elsewhere")
@pytest.mark.parametrize("packed", [True, False], ids=["gzip bomb", "200 MB"])
def test_huge_answer_ends_within_a_second_and_64_mb(packed: bool) -> None:
    """One broken or evil answer must not take the process with it (B 4.13)."""
    huge = Reply(padding_bytes=200_000_000, gzip=packed)
    with FakeServer() as server:
        server.script_for(lambda request: request.prompt == "now", huge, huge)
        done = run_python(BOMB, server.base_url)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, _, _ in lines] == ["LMUnexpectedError"] * 2
    assert max(float(seconds) for _, seconds, _ in lines) < 1 + 1  # a second for a busy machine
    assert max(int(megabytes) for _, _, megabytes in lines) < 64


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )


def test_one_piece_of_a_bomb_is_not_unpacked_further_than_allowed() -> None:
    """A thousand bytes become a million, all from one read of the socket (B 4.13)."""
    packer, zeros = zlib.compressobj(wbits=31), bytes(10**6)
    bomb = b"".join(packer.compress(zeros) for _ in range(100)) + packer.flush()
    reader = BodyReader({"content-encoding": "gzip"}, Limits(max_bytes=10**6), "openai/m")
    tracemalloc.start()
    try:
        with pytest.raises(LMUnexpectedError):
            reader.feed(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10 * 10**6
    finally:
        tracemalloc.stop()


def test_compressed_answer_is_read(server: FakeServer) -> None:
    """It is asked for, so gateways send it."""
    server.script(Reply(text="hello " * 100, gzip=True))
    assert lm_of(server)("hi") == ["hello " * 100]
    assert server.requests[0].headers["accept-encoding"] == "gzip"


@awaited
async def test_compressed_stream_is_read_as_it_comes(server: FakeServer) -> None:
    """Pieces must not wait in the decoder for the end."""
    server.script(Reply(chunks=["a ", "b"], gzip=True))
    async with await lm_of(server).astream("hi") as stream:
        assert [piece.text async for piece in stream if piece.text] == ["a ", "b"]


BROKEN = {
    "no gzip": Reply(body='{"choices": []}', headers={"content-encoding": "gzip"}),
    # All of the text is there, but for the end by which one knows that it is all.
    "cut gzip": Reply(
        body=gzip.compress(b'{"choices": [{"message": {"content": "so far"}}]}')[:-8],
        headers={"content-encoding": "gzip"},
    ),
    "not asked for": Reply(body="{}", headers={"content-encoding": "br"}),
}


@pytest.mark.parametrize("reply", list(BROKEN.values()), ids=list(BROKEN))
def test_broken_compression_is_an_error_of_ours(reply: Reply, server: FakeServer) -> None:
    """Never `zlib.error`, and never half of a text (B 4.7)."""
    server.script(reply)
    assert type(failure(lm_of(server))) is LMServerError


@pytest.mark.parametrize("status", [400, 503])
def test_text_of_an_error_is_clipped(status: int, server: FakeServer) -> None:
    """A log line is no place for a page (B 4.13)."""
    server.script(Reply(status=status, text="x" * 100_000))
    error = failure(lm_of(server))
    assert len(error.message) < MAX_MESSAGE_CHARS + 50
    assert len(error.body or "") < MAX_MESSAGE_CHARS + 50


# --- How long it may take ------------------------------------------------------------------------


@awaited
@pytest.mark.parametrize(
    "reply",
    [Reply(hang=True), Reply(text="x" * 500, byte_delay_s=0.02), Reply(keepalive_comments=True)],
    ids=["hang", "drip", "blanks"],
)
async def test_timeout_covers_the_whole_attempt(reply: Reply, server: FakeServer) -> None:
    """A limit that starts anew with each byte is none (B 4.13)."""
    server.script(reply, reply)
    lm = lm_of(server, timeout=0.3)
    started = time.monotonic()
    errors = [await afailure(lm), await anyio.to_thread.run_sync(failure, lm)]
    assert [type(error) for error in errors] == [LMTimeoutError] * 2
    assert time.monotonic() - started < 2 * 0.3 + 2
    await anyio.to_thread.run_sync(server.wait_until_idle)


# --- Where a request goes ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [307, 308])
def test_redirect_to_another_host_is_refused(status: int, server: FakeServer) -> None:
    """The key would go with it (B 4.13)."""
    with FakeServer() as elsewhere:
        target = f"{elsewhere.base_url}/chat/completions"
        server.script(*[Reply(status=status, headers={"location": target})] * 2)
        error = failure(lm_of(server))
        with pytest.raises(LMUnexpectedError):
            lm_of(server).stream("hello")
        assert elsewhere.requests == ()
    assert type(error) is LMUnexpectedError
    assert "127.0.0.1" in error.message
    assert KEY not in repr(vars(error))


@awaited
@on_asyncio
async def test_awaited_redirect_to_another_host_is_refused(server: FakeServer) -> None:
    """Likewise on an event loop (B 4.13)."""
    with FakeServer() as elsewhere:
        target = f"{elsewhere.base_url}/chat/completions"
        server.script(Reply(status=307, headers={"location": target}))
        assert type(await afailure(lm_of(server))) is LMUnexpectedError
        assert elsewhere.requests == ()


@pytest.mark.parametrize("status", [301, 302, 303])
def test_redirect_that_drops_the_body_is_not_followed(status: int, server: FakeServer) -> None:
    """A POST that becomes a GET asks something else."""
    server.script(Reply(status=status, headers={"location": "/v2/chat/completions"}))
    assert isinstance(failure(lm_of(server)), LMInvalidRequestError)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [307, 308])
def test_redirect_on_the_same_host_is_followed(status: int, server: FakeServer) -> None:
    """A gateway that adds a prefix is no danger, and gets the same body and key."""
    server.script(Reply(status=status, headers={"location": "/v2/chat/completions"}))
    assert lm_of(server)("hi") == ["echo: hi"]
    first, second = server.requests
    assert (first.path, second.path) == ("/v1/chat/completions", "/v2/chat/completions")
    assert (first.json, first.api_key) == (second.json, second.api_key)


def test_redirects_in_a_circle_end() -> None:
    """Each costs a request (B 4.1)."""
    circle = Reply(status=307, headers={"location": "/v1/chat/completions"})
    with FakeServer(answer=circle) as server:
        assert isinstance(failure(lm_of(server)), LMInvalidRequestError)
        assert 1 < len(server.requests) <= 5


# --- What is never sent --------------------------------------------------------------------------

HALF = "half of a pair: \ud83d"
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": HALF}],
    "system": [{"role": "system", "content": HALF}, {"role": "user", "content": "hi"}],
    "part": [{"role": "user", "content": [{"type": "text", "text": HALF}]}],
}


@each_engine
@pytest.mark.parametrize("messages", list(PROMPTS.values()), ids=list(PROMPTS))
def test_half_of_a_surrogate_pair_is_refused(
    messages: list[dict[str, Any]], engine: str, server: FakeServer
) -> None:
    """It is no text, and each library fails on it in a way of its own (B 4.13)."""
    with pytest.raises(LMInvalidRequestError, match="surrogate"):
        lm_of(server, engine=engine)(messages=messages)
    assert server.requests == ()


@awaited
@each_engine
async def test_half_of_a_surrogate_pair_is_refused_when_awaited(
    engine: str, server: FakeServer
) -> None:
    """Likewise on either event loop (B 4.13)."""
    error = await afailure(lm_of(server, engine=engine), HALF)
    assert type(error) is LMInvalidRequestError
    assert server.requests == ()


def test_half_of_a_surrogate_pair_is_refused_in_embeddings(server: FakeServer) -> None:
    """Texts cut in the middle of an emoji are common in documents (B 4.13)."""
    embedder = Embedder("openai/m", api_base=server.base_url, api_key=KEY, engine="direct")
    with pytest.raises(LMInvalidRequestError, match="surrogate"):
        embedder.embed([HALF])
    assert server.requests == ()
    with pytest.raises(BatchError, match=r"Text 1: LMInvalidRequestError.*surrogate") as caught:
        embedder.embed(["fine", HALF])
    assert (list(caught.value.results), list(caught.value.errors)) == ([0], [1])
    assert [request.json["input"] for request in server.requests] == [["fine"]]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), pytest.param(object(), id="object"), {1, 2}], ids=str
)
def test_parameter_that_is_no_json_is_refused(value: object, server: FakeServer) -> None:
    """`NaN` is no JSON, though Python writes it; a server's error would say less."""
    assert type(failure(lm_of(server), top_p=value)) is LMInvalidRequestError
    assert server.requests == ()


BAD_HEADERS: dict[str, dict[str, Any]] = {
    "key": {"api_key": f"{KEY}\r\nx-evil: 1"},
    "key with another letter": {"api_key": f"{KEY}é"},
    "value": {"extra_headers": {"x-token": f"{KEY}\nx-evil: 1"}},
    "name": {"extra_headers": {"x-evil: 1\r\nx-token": KEY}},
    "name with a space": {"extra_headers": {"x token": KEY}},
}


@pytest.mark.parametrize("options", list(BAD_HEADERS.values()), ids=list(BAD_HEADERS))
def test_header_that_would_be_two_is_refused(options: dict[str, Any], server: FakeServer) -> None:
    """It is a mistake or an attack; and the message must not quote the key in it (B 7.4)."""
    error = failure(lm_of(server, **options))
    assert (type(error), error.retryable) == (LMConfigurationError, False)
    assert KEY not in f"{error} {vars(error)}"
    assert server.requests == ()


def test_key_from_a_file_is_sent_without_its_line_break(server: FakeServer) -> None:
    """`open("key").read()` ends in one, and everybody does it."""
    lm_of(server, api_key=f"{KEY}\n")("hi")
    assert server.requests[0].api_key == KEY
