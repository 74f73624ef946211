"""Every kind of failure of a real server, through both engines: the error, and all that it tells.

Not here: failures of open streams that were read in part (`test_streams.py`), time limits
(`test_deadlines.py`), and errors on their way between processes.
"""

from __future__ import annotations

import copy
import pickle
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from dspylite import LM, Embedder
from dspylite.errors import (
    MAX_MESSAGE_CHARS,
    ContentFilterError,
    ContextWindowExceededError,
    LMAuthError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.litellm_door import load_litellm
from dspylite.testing import FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
TIMEOUT_S = 0.4
SOON_S = 5.0
"""Far above what any of these takes on a busy machine, far below any library's own limits."""


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address."""
    load_litellm()  # which takes seconds, and is not what these tests bound
    with FakeServer() as server:
        yield server


awaited = pytest.mark.usefixtures("one_loop")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")


@pytest.fixture(params=["direct", "litellm"])
def engine(request: pytest.FixtureRequest) -> str:
    """Run a test through both engines."""
    name: str = request.param
    return name


def lm_of(server: FakeServer, engine: str, **options: Any) -> LM:
    given = {"api_base": server.base_url, "api_key": KEY, "num_retries": 0, "engine": engine}
    return LM("openai/m", **given | options)


# --- The matrix ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What the server does, and what the error has to tell.

    Attributes:
        reply: What the server does.
        error: The class of the error.
        status: Of the answer; None where there was no answer, or a good one.
        code: The provider's own name for the failure.
        said: What is in the message.
        retry_after: Seconds that the server asks to wait.
        has_id: Whether the error has the id of the request.
        litellm: What is otherwise through litellm, and why is said where it is defined.
    """

    reply: Reply
    error: type[LMError]
    status: int | None = None
    code: str | None = None
    said: str = ""
    retry_after: float | None = None
    has_id: bool = True
    litellm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def timeout_s(self) -> float:
        return TIMEOUT_S if self.reply.hang else 10.0

    def told(self, engine: str) -> dict[str, Any]:
        told = {
            "error": self.error,
            "status": self.status,
            "code": self.code,
            "retry_after": self.retry_after,
            "has_id": self.has_id,
        }
        return told | (dict(self.litellm) if engine == "litellm" else {})


FORGOTTEN: Mapping[str, Any] = {"has_id": False}
"""litellm reads a good answer itself, and of one that it cannot read it forgets the headers."""


def status(number: int, error: type[LMError], code: str | None = None) -> Fault:
    wait_s = 7.0 if number in {429, 503} else None
    return Fault(
        reply=Reply(status=number, headers={"retry-after": "7"} if wait_s else {}),
        error=error,
        status=number,
        code=code or ("invalid_request_error" if number < 500 else "server_error"),
        said=f"HTTP {number}: ",
        retry_after=wait_s,
    )


STATUSES = {
    400: status(400, LMInvalidRequestError),
    401: status(401, LMAuthError, "invalid_api_key"),
    403: status(403, LMAuthError),
    404: status(404, LMInvalidRequestError, "not_found"),
    408: status(408, LMTimeoutError),
    409: status(409, LMServerError),
    422: status(422, LMInvalidRequestError),
    429: status(429, LMRateLimitError, "rate_limit_exceeded"),
    500: status(500, LMServerError),
    502: status(502, LMServerError),
    503: status(503, LMServerError),
    529: status(529, LMServerError),
}
HTML = f"<html><h1>Bad Gateway</h1>{'<br>' * 9_000}</html>"
COMPLETION = '{"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": []}'
SAID_TWICE = 'data: {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": "a "}}]}\n\n'
SSE = {"content-type": "text/event-stream"}

FAULTS = {f"{number}": fault for number, fault in STATUSES.items()} | {
    "dropped before the answer": Fault(
        reply=Reply(drop="before"), error=LMTransportError, has_id=False
    ),
    "dropped after the headers": Fault(
        reply=Reply(drop="headers"), error=LMTransportError, has_id=False
    ),
    "dropped in the body": Fault(reply=Reply(drop="body"), error=LMTransportError, has_id=False),
    "hangs": Fault(reply=Reply(hang=True), error=LMTimeoutError, has_id=False),
    "bad JSON": Fault(
        reply=Reply(body='{"id": "x", "choices": [{"mess'),
        error=LMServerError,
        litellm=FORGOTTEN,
    ),
    "HTML with 200": Fault(reply=Reply(body=HTML), error=LMServerError, litellm=FORGOTTEN),
    "HTML with 503": Fault(
        reply=Reply(status=503, body=HTML), error=LMServerError, status=503, said="Bad Gateway"
    ),
    "no healthy upstream": Fault(
        reply=Reply(status=503, body="no healthy upstream"),
        error=LMServerError,
        status=503,
        said="no healthy upstream",
    ),
    "empty 503": Fault(reply=Reply(status=503, body=""), error=LMServerError, status=503),
    "empty 200": Fault(reply=Reply(body=""), error=LMServerError, litellm=FORGOTTEN),
    "null": Fault(reply=Reply(body="null"), error=LMServerError, litellm=FORGOTTEN),
    # Of an answer that can be read the error has the answer's own id.
    "no choices": Fault(reply=Reply(body=COMPLETION), error=LMServerError, has_id=False),
    "error with 200": Fault(
        reply=Reply(body='{"error": {"message": "out of memory", "code": 503}}'),
        error=LMServerError,
        status=503,
        code="503",
        said="out of memory",
        litellm={"code": None, "has_id": False},
    ),
    "prompt too long": Fault(
        reply=Reply(status=400, error_code="context_length_exceeded"),
        error=ContextWindowExceededError,
        status=400,
        code="context_length_exceeded",
    ),
    "prompt refused": Fault(
        reply=Reply(status=400, error_code="content_filter"),
        error=ContentFilterError,
        status=400,
        code="content_filter",
    ),
    "answer refused": Fault(
        reply=Reply(text="", finish_reason="content_filter"),
        error=ContentFilterError,
        has_id=False,
    ),
}
STREAMED = {
    "503 of a stream": Fault(
        reply=Reply(status=503, headers={"retry-after": "7"}),
        error=LMServerError,
        status=503,
        code="server_error",
        retry_after=7.0,
    ),
    "HTML in place of a stream": Fault(
        reply=Reply(body=HTML), error=LMServerError, litellm=FORGOTTEN
    ),
    "JSON in place of a stream": Fault(
        reply=Reply(body=COMPLETION), error=LMServerError, litellm=FORGOTTEN
    ),
    "empty stream": Fault(
        reply=Reply(body="", headers=SSE), error=LMServerError, litellm=FORGOTTEN
    ),
    "stream of its end only": Fault(
        reply=Reply(body="data: [DONE]\n\n", headers=SSE), error=LMServerError, litellm=FORGOTTEN
    ),
    "cut stream": Fault(reply=Reply(cut_after=1), error=LMServerError, litellm=FORGOTTEN),
    "dropped stream": Fault(
        reply=Reply(drop="body", cut_after=1), error=LMTransportError, has_id=False
    ),
    "malformed event": Fault(
        reply=Reply(body=SAID_TWICE + 'data: {"id": "x", "choi\n\n', headers=SSE),
        error=LMServerError,
        litellm=FORGOTTEN,
    ),
    "event that is a list": Fault(
        reply=Reply(body=SAID_TWICE + "data: [1]\n\n", headers=SSE),
        error=LMServerError,
        litellm=FORGOTTEN | {"error": LMTransportError},  # which its library makes of anything
    ),
    "error in a stream": Fault(
        reply=Reply(
            body=SAID_TWICE + 'data: {"error": {"message": "out of memory", "code": 503}}\n\n',
            headers=SSE,
        ),
        error=LMServerError,
        status=503,
        code="503",
        said="out of memory",
        litellm=FORGOTTEN | {"status": None},
    ),
    "answer of a stream refused": Fault(
        reply=Reply(text="", finish_reason="content_filter"),
        error=ContentFilterError,
        litellm=FORGOTTEN,
    ),
}
each_fault = pytest.mark.parametrize("fault", list(FAULTS.values()), ids=list(FAULTS))
each_streamed = pytest.mark.parametrize("fault", list(STREAMED.values()), ids=list(STREAMED))


def failure(lm: LM) -> LMError:
    with pytest.raises(LMError) as caught:
        lm("hello")
    return caught.value


async def afailure(lm: LM) -> LMError:
    with pytest.raises(LMError) as caught:
        await lm.acall("hello")
    return caught.value


def stream_failure(lm: LM) -> LMError:
    with pytest.raises(LMError) as caught, lm.stream("hello") as stream:
        list(stream)
    return caught.value


async def astream_failure(lm: LM) -> LMError:
    async def read() -> None:
        async with await lm.astream("hello") as stream:
            async for _ in stream:
                pass

    with pytest.raises(LMError) as caught:
        await read()
    return caught.value


def told(error: LMError, server: FakeServer) -> dict[str, Any]:
    (request,) = server.requests  # more would be retries that nobody asked for
    return {
        "error": type(error),
        "status": error.status,
        "code": error.provider_code,
        "retry_after": error.retry_after_s,
        "has_id": error.request_id == request.request_id,
    }


def judge(error: LMError, fault: Fault, server: FakeServer, engine: str) -> None:
    """Compare an error with what it has to tell, on both sides of a pickle."""
    assert told(error, server) == fault.told(engine)
    if engine == "direct" or not fault.litellm:
        assert fault.said in error.message
    assert error.model == "openai/m"
    assert max(len(error.message), len(error.body or "")) < MAX_MESSAGE_CHARS + 50
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.args, vars(twin)) == (str(error), error.args, vars(error))


@each_fault
def test_fault_has_its_error(fault: Fault, server: FakeServer, engine: str) -> None:
    """Each failure is one request and one error of ours, whole and in time (B 4.7, B 9C)."""
    server.script(fault.reply)
    started = time.monotonic()
    error = failure(lm_of(server, engine, timeout=fault.timeout_s))
    judge(error, fault, server, engine)
    assert time.monotonic() - started < SOON_S


@awaited
@on_asyncio
@each_fault
async def test_fault_has_its_error_when_awaited(
    fault: Fault, server: FakeServer, engine: str
) -> None:
    """The async forms meet failures elsewhere, and tell the same of them (B 4.7, B 9C)."""
    server.script(fault.reply)
    started = time.monotonic()
    error = await afailure(lm_of(server, engine, timeout=fault.timeout_s))
    judge(error, fault, server, engine)
    assert time.monotonic() - started < SOON_S


@each_streamed
def test_fault_of_a_stream_has_its_error(fault: Fault, server: FakeServer, engine: str) -> None:
    """A stream that goes wrong must never look like a short answer (B 4.7, B 4.14)."""
    server.script(fault.reply)
    judge(stream_failure(lm_of(server, engine)), fault, server, engine)


@awaited
@on_asyncio
@each_streamed
async def test_fault_of_a_stream_has_its_error_when_awaited(
    fault: Fault, server: FakeServer, engine: str
) -> None:
    """Likewise on an event loop (B 4.7, B 4.14)."""
    server.script(fault.reply)
    judge(await astream_failure(lm_of(server, engine)), fault, server, engine)


@awaited
@pytest.mark.parametrize("name", ["429", "dropped in the body", "hangs", "bad JSON"])
async def test_fault_has_its_error_on_either_event_loop(
    name: str, server: FakeServer, engine: str
) -> None:
    """Under trio the same goes through a worker thread, from which errors must return whole."""
    fault = FAULTS[name]
    server.script(fault.reply)
    judge(await afailure(lm_of(server, engine, timeout=fault.timeout_s)), fault, server, engine)


# --- Nobody there --------------------------------------------------------------------------------


def test_refused_connection_is_a_transport_error(engine: str) -> None:
    """A server that is down has no status, and may be up again soon (B 9C)."""
    with FakeServer() as gone:
        pass
    error = failure(lm_of(gone, engine))
    assert (type(error), error.status, error.retryable) == (LMTransportError, None, True)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


@awaited
@on_asyncio
async def test_awaited_refused_connection_is_a_transport_error(engine: str) -> None:
    """Likewise on an event loop (B 9C)."""
    with FakeServer() as gone:
        pass
    error = await afailure(lm_of(gone, engine))
    assert (type(error), error.status, error.retryable) == (LMTransportError, None, True)


def test_refused_connection_of_a_stream_is_a_transport_error(engine: str) -> None:
    """It is raised where the stream is opened, not at its first piece."""
    with FakeServer() as gone:
        pass
    with pytest.raises(LMTransportError):
        lm_of(gone, engine).stream("hello")


def test_unknown_host_is_a_transport_error(engine: str) -> None:
    """A typo in a host name must not surface as an error of the socket library (B 4.7)."""
    lm = LM(
        "openai/m",
        api_base="http://no.such.host.invalid/v1",
        api_key=KEY,
        num_retries=0,
        engine=engine,
    )
    assert type(failure(lm)) is LMTransportError


# --- Embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["401", "429", "503", "dropped in the body", "hangs", "no healthy upstream"]
)
def test_fault_of_embeddings_has_its_error(name: str, server: FakeServer, engine: str) -> None:
    """There is one border for both kinds of request."""
    fault = FAULTS[name]
    server.script(fault.reply)
    embedder = Embedder(
        "openai/m",
        api_base=server.base_url,
        api_key=KEY,
        num_retries=0,
        engine=engine,
        timeout=fault.timeout_s,
    )
    with pytest.raises(LMError) as caught:
        embedder.embed(["a"])
    judge(caught.value, fault, server, engine)


# --- Secrets -------------------------------------------------------------------------------------


def everything_shown(error: BaseException) -> str:
    """Whatever of an error can reach a log: its text, its attributes, its traceback, its pickle."""
    printed = "".join(traceback.format_exception(error))
    return f"{error} {error!r} {vars(error)!r} {printed} {pickle.dumps(error)!r}"


ECHOES = {
    "message": Reply(status=401, text=f"Incorrect API key provided: {KEY}."),
    "code": Reply(status=400, text=f"bad token {KEY}", error_code=f"bad-{KEY}"),
    "page": Reply(status=500, body=f"<html>{KEY}</html>"),
    "late in a page": Reply(status=503, body=f"<html>{'x' * 1_980}{KEY}</html>"),
    "request id": Reply(status=503, headers={"x-request-id": f"{KEY}-1"}),
    "page with 200": Reply(body=f"<html>{KEY}</html>"),
    "error with 200": Reply(body=f'{{"error": {{"message": "{KEY}"}}}}'),
    "cut JSON": Reply(body=f'{{"id": "{KEY}", "choices": ['),
}
each_echo = pytest.mark.parametrize("reply", list(ECHOES.values()), ids=list(ECHOES))
STREAM_ECHOES = ECHOES | {
    "error event": Reply(
        body=f'{SAID_TWICE}data: {{"error": {{"message": "{KEY}"}}}}\n\n', headers=SSE
    ),
    "malformed event": Reply(body=f'{SAID_TWICE}data: {{"id": "{KEY}\n\n', headers=SSE),
    "request id of a cut stream": Reply(cut_after=1, headers={"x-request-id": KEY}),
}
each_stream_echo = pytest.mark.parametrize(
    "reply", list(STREAM_ECHOES.values()), ids=list(STREAM_ECHOES)
)


@each_echo
def test_echoed_key_is_not_shown(reply: Reply, server: FakeServer, engine: str) -> None:
    """Providers do echo keys; ours must not get from there into anybody's log (B 4.7, B 7.4)."""
    server.script(reply)
    assert KEY not in everything_shown(failure(lm_of(server, engine)))


@awaited
@on_asyncio
@each_echo
async def test_echoed_key_is_not_shown_when_awaited(
    reply: Reply, server: FakeServer, engine: str
) -> None:
    """Likewise on an event loop (B 4.7, B 7.4)."""
    server.script(reply)
    assert KEY not in everything_shown(await afailure(lm_of(server, engine)))


@each_stream_echo
def test_key_echoed_in_a_stream_is_not_shown(reply: Reply, server: FakeServer, engine: str) -> None:
    """A stream has more places for it (B 4.7, B 7.4)."""
    server.script(reply)
    assert KEY not in everything_shown(stream_failure(lm_of(server, engine)))
