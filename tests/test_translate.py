"""Real failures of a real server, through litellm: which error they become, and what is in it.

Not here: how often a failed request is sent again (`test_lm_over_http.py`).
"""

from __future__ import annotations

import email.utils
import logging
import pickle
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspylite import LM, Embedder
from dspylite.errors import (
    MAX_MESSAGE_CHARS,
    ContentFilterError,
    ContextWindowExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.translate import retry_after_s
from dspylite.schema.secrets import redact
from dspylite.testing import FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address."""
    with FakeServer() as server:
        yield server


awaited = pytest.mark.usefixtures("one_loop")


pytestmark = pytest.mark.usefixtures("engine")


def lm_of(server: FakeServer, **options: object) -> LM:
    return LM("openai/m", api_base=server.base_url, num_retries=0, **{"api_key": KEY, **options})


def failure(lm: LM) -> LMError:
    with pytest.raises(LMError) as caught:
        lm("hello")
    return caught.value


async def afailure(lm: LM) -> LMError:
    with pytest.raises(LMError) as caught:
        await lm.acall("hello")
    return caught.value


# --- Class and status --------------------------------------------------------------------------


class Case(NamedTuple):
    """What the server does, and what has to become of it."""

    reply: Reply
    error: type[LMError]
    status: int | None


STATUSES: dict[int, type[LMError]] = {
    400: LMInvalidRequestError,
    401: LMAuthError,
    402: LMAuthError,
    403: LMAuthError,
    404: LMInvalidRequestError,
    408: LMTimeoutError,
    409: LMServerError,
    418: LMInvalidRequestError,
    422: LMInvalidRequestError,
    425: LMServerError,
    429: LMRateLimitError,
    500: LMServerError,
    502: LMServerError,
    503: LMServerError,
    504: LMServerError,
    529: LMServerError,
}
CASES = {f"{status}": Case(Reply(status=status), cls, status) for status, cls in STATUSES.items()}
CASES |= {
    "HTML error page": Case(
        Reply(status=502, body=f"<html><h1>502 Bad Gateway</h1>{'<br>' * 9_000}</html>"),
        LMServerError,
        502,
    ),
    "no healthy upstream": Case(Reply(status=503, body="no healthy upstream"), LMServerError, 503),
    "dropped before the answer": Case(Reply(drop="before"), LMTransportError, None),
    "dropped after the headers": Case(Reply(drop="headers"), LMTransportError, None),
    "dropped in the body": Case(Reply(drop="body"), LMTransportError, None),
    "never answered": Case(Reply(hang=True), LMTimeoutError, None),
    "cut JSON": Case(Reply(body='{"id": "x", "choices": [{"mess'), LMServerError, None),
    "empty 200": Case(Reply(body=""), LMServerError, None),
    "HTML with 200": Case(Reply(body="<html>Welcome!</html>"), LMServerError, None),
    "null": Case(Reply(body="null"), LMServerError, None),
    "no choices": Case(
        Reply(body='{"id": "x", "object": "chat.completion", "model": "m", "choices": []}'),
        LMServerError,
        None,
    ),
    "prompt too long, by text": Case(
        Reply(status=400, text="This model's maximum context length is 8192 tokens."),
        ContextWindowExceededError,
        400,
    ),
    "prompt too long, by code": Case(
        Reply(status=400, text="Too many tokens.", error_code="context_length_exceeded"),
        ContextWindowExceededError,
        400,
    ),
    "content filter, by text": Case(
        Reply(status=400, text="The prompt triggered our content management policy."),
        ContentFilterError,
        400,
    ),
    "content filter, by code": Case(
        Reply(status=400, text="Not this.", error_code="content_filter"), ContentFilterError, 400
    ),
}
each_case = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def summary(error: LMError) -> tuple[type[LMError], int | None]:
    return type(error), error.status


@each_case
def test_failure_has_its_class_and_status(case: Case, server: FakeServer) -> None:
    """Programs decide by class; a status is only told where the server really sent one."""
    server.script(case.reply)
    timeout = TIMEOUT_S if case.reply.hang else 10
    assert summary(failure(lm_of(server, timeout=timeout))) == (case.error, case.status)


@awaited
@each_case
async def test_awaited_failure_has_its_class_and_status(case: Case, server: FakeServer) -> None:
    """litellm's async form goes another way inside; what comes out is the same."""
    server.script(case.reply)
    timeout = TIMEOUT_S if case.reply.hang else 10
    assert summary(await afailure(lm_of(server, timeout=timeout))) == (case.error, case.status)


def test_refused_connection_is_a_transport_error() -> None:
    """A server that is down is not a server that failed, and has no status."""
    with FakeServer() as gone:
        pass
    assert summary(failure(lm_of(gone))) == (LMTransportError, None)


@awaited
async def test_awaited_refused_connection_is_a_transport_error() -> None:
    """Likewise on an event loop."""
    with FakeServer() as gone:
        pass
    assert summary(await afailure(lm_of(gone))) == (LMTransportError, None)


@pytest.mark.parametrize("status", [401, 429, 503])
def test_failed_embedding_has_the_class_of_a_failed_chat(status: int, server: FakeServer) -> None:
    """There is one border for both kinds of request."""
    server.script(Reply(status=status))
    embedder = Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0)
    with pytest.raises(LMError) as caught:
        embedder.embed(["a"])
    assert summary(caught.value) == (STATUSES[status], status)


def test_unknown_provider_is_refused_without_a_request(server: FakeServer) -> None:
    """A misspelt provider must not surface as a library's own exception."""
    error = failure(LM("nobody/m", api_key=KEY, num_retries=0, engine="litellm"))
    assert summary(error) == (LMInvalidRequestError, 400)
    assert server.requests == ()


# --- What else an error carries ----------------------------------------------------------------


def test_error_names_the_model_and_what_the_server_said(server: FakeServer) -> None:
    """The message alone must tell which model failed and why."""
    server.script(Reply(status=422, text="`top_p` is 7", error_code="bad_top_p"))
    error = failure(lm_of(server))
    assert str(error).startswith("openai/m: HTTP 422: ")
    assert str(error).endswith("`top_p` is 7")
    assert (error.model, error.provider, error.provider_code) == ("openai/m", "openai", "bad_top_p")


def test_message_without_an_answer_names_no_status(server: FakeServer) -> None:
    """litellm writes 500 where nothing came; nobody should search the server's log for it."""
    server.script(Reply(drop="before"))
    assert "HTTP" not in str(failure(lm_of(server)))


@pytest.mark.parametrize("status", [401, 429, 503])
def test_request_id_of_the_provider_is_kept(status: int, server: FakeServer) -> None:
    """It is what a provider's support asks for."""
    server.script(Reply(status=status))
    error = failure(lm_of(server))
    assert error.request_id == server.requests[0].request_id


@awaited
async def test_request_id_of_the_provider_is_kept_when_awaited(server: FakeServer) -> None:
    """Likewise on an event loop."""
    server.script(Reply(status=503))
    assert (await afailure(lm_of(server))).request_id == server.requests[0].request_id


RETRY_AFTER = {
    "seconds": ({"retry-after": "7"}, 7.0),
    "part of a second": ({"retry-after": "0.5"}, 0.5),
    "milliseconds": ({"retry-after-ms": "250"}, 0.25),
    "milliseconds are finer": ({"retry-after": "1", "retry-after-ms": "250"}, 0.25),
    "capital letters": ({"Retry-After": "7"}, 7.0),
    "a date gone by": ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    "negative": ({"retry-after": "-1"}, 0.0),
    "nonsense": ({"retry-after": "soon"}, None),
    "endless": ({"retry-after": "inf"}, None),
    "none": ({}, None),
}
each_retry_after = pytest.mark.parametrize(
    ("headers", "wait_s"), list(RETRY_AFTER.values()), ids=list(RETRY_AFTER)
)


@pytest.mark.parametrize("status", [429, 503])
@each_retry_after
def test_retry_after_is_read_in_each_form(
    headers: dict[str, str], wait_s: float | None, status: int, server: FakeServer
) -> None:
    """`Retry` waits as long as the provider asks, in whatever form it asks."""
    server.script(Reply(status=status, headers=headers))
    error = failure(lm_of(server))
    assert (error.retry_after, error.retry_after_s) == (wait_s, wait_s)


@awaited
@each_retry_after
async def test_awaited_retry_after_is_read_in_each_form(
    headers: dict[str, str], wait_s: float | None, server: FakeServer
) -> None:
    """Likewise on an event loop."""
    server.script(Reply(status=429, headers=headers))
    assert (await afailure(lm_of(server))).retry_after == wait_s


def test_retry_after_as_a_date_is_the_time_until_then(server: FakeServer) -> None:
    """Proxies send dates; an hour is far above what the request itself takes."""
    date = email.utils.formatdate(time.time() + 3_600, usegmt=True)
    server.script(Reply(status=503, headers={"retry-after": date}))
    wait_s = failure(lm_of(server)).retry_after
    assert wait_s is not None
    assert 3_500 < wait_s <= 3_600


def told(error: LMError) -> tuple[type[LMError], int | None, float | None, str | None]:
    return type(error), error.status, error.retry_after, error.request_id


def test_failure_being_handled_says_nothing_of_the_next_one(server: FakeServer) -> None:
    """A second model is tried where the first one's error is caught; the two must not be mixed."""
    server.script(Reply(status=504, headers={"retry-after": "7"}))
    with FakeServer() as gone:
        pass
    try:
        lm_of(server)("hello")
    except LMServerError:
        error = failure(lm_of(gone))
    assert told(error) == (LMTransportError, None, None, None)


@awaited
async def test_awaited_failure_being_handled_says_nothing_of_the_next_one(
    server: FakeServer,
) -> None:
    """Likewise on an event loop."""
    server.script(Reply(status=504, headers={"retry-after": "7"}))
    with FakeServer() as gone:
        pass
    try:
        await lm_of(server).acall("hello")
    except LMServerError:
        error = await afailure(lm_of(gone))
    assert told(error) == (LMTransportError, None, None, None)


@given(st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms"]), st.text()))
def test_any_retry_after_is_none_or_a_wait(headers: dict[str, str]) -> None:
    """A header may say anything; it must neither raise nor give a wait that cannot be slept."""
    wait_s = retry_after_s(headers)
    assert wait_s is None or 0 <= wait_s < float("inf")


@pytest.mark.parametrize("status", [400, 503])
def test_message_of_a_huge_error_page_is_bounded(status: int, server: FakeServer) -> None:
    """An error page of a proxy must not fill the log."""
    server.script(Reply(status=status, body=f"<html>{'x' * 20_000}</html>"))
    error = failure(lm_of(server))
    assert len(str(error)) < MAX_MESSAGE_CHARS + 50
    assert len(pickle.dumps(error)) < 3 * MAX_MESSAGE_CHARS


@each_case
def test_error_survives_pickle(case: Case, server: FakeServer) -> None:
    """Errors of worker processes reach their parent whole, without any of litellm's objects."""
    server.script(case.reply)
    error = failure(lm_of(server, timeout=TIMEOUT_S if case.reply.hang else 10))
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert (twin.args, vars(twin)) == (error.args, vars(error))


# --- Secrets -----------------------------------------------------------------------------------


def everything_shown(error: BaseException) -> str:
    """Whatever of an error can reach a log: its text, its attributes, its traceback, its pickle."""
    printed = "".join(traceback.format_exception(error))
    return f"{error} {error!r} {vars(error)!r} {printed} {pickle.dumps(error)!r}"


def echo(key: str) -> list[Reply]:
    """Answers of a server that tells the key it was given, wherever an answer has room for it."""
    return [
        Reply(status=401, text=f"Incorrect API key provided: {key}."),
        Reply(status=400, text=f"bad token {key}", error_code=f"bad-{key}"),
        Reply(status=429, text=key, headers={"retry-after": "0"}),
        Reply(status=500, body=f"<html>{key}</html>"),
        Reply(status=503, headers={"x-request-id": f"{key}-1"}),
        Reply(body=f"<html>{key}</html>"),
        Reply(body=f'{{"error": "{key}"}}'),
        Reply(body=f'{{"id": "{key}", "choices": ['),
    ]


each_echo = pytest.mark.parametrize("place", range(len(echo(""))))


@each_echo
def test_key_echoed_by_the_server_is_not_shown(place: int, server: FakeServer) -> None:
    """Providers do echo keys; ours must not get from there into anybody's log."""
    server.script(echo(KEY)[place])
    assert KEY not in everything_shown(failure(lm_of(server)))


@awaited
@each_echo
async def test_key_echoed_by_the_server_is_not_shown_when_awaited(
    place: int, server: FakeServer
) -> None:
    """Likewise on an event loop."""
    server.script(echo(KEY)[place])
    assert KEY not in everything_shown(await afailure(lm_of(server)))


@each_echo
def test_key_of_the_environment_is_not_shown(
    place: int, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was never passed as an argument is as secret as one that was."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script(echo(KEY)[place])
    error = failure(lm_of(server, api_key=None))
    assert server.requests[0].api_key == KEY
    assert KEY not in everything_shown(error)


def test_token_in_an_extra_header_is_not_shown(server: FakeServer) -> None:
    """`Bearer` is not part of the secret, so a server may echo the token without it."""
    server.script(Reply(status=401, text=f"unknown token {KEY}"))
    error = failure(lm_of(server, api_key="other", extra_headers={"x-auth": f"Bearer {KEY}"}))
    assert KEY not in everything_shown(error)


def test_key_that_starts_like_another_is_not_shown(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blotting out the shorter one first would leave the tail of the longer one."""
    monkeypatch.setenv("LONGER_API_KEY", KEY)
    server.script(Reply(status=401, text=f"bad key {KEY}"))
    assert KEY[12:] not in everything_shown(failure(lm_of(server, api_key=KEY[:12])))


def test_key_that_cannot_be_sent_is_not_shown(engine: str, server: FakeServer) -> None:
    """A key of two lines cannot be a header, and HTTP libraries complain by quoting it."""
    error = failure(lm_of(server, api_key=f"{KEY}\nsecond"))
    expected = LMTransportError if engine == "litellm" else LMConfigurationError
    assert isinstance(error, expected)
    assert KEY not in everything_shown(error)


def test_key_from_a_file_is_sent_without_its_line_break(server: FakeServer) -> None:
    """A file of one line ends in a line break that nobody means."""
    LM("openai/m", api_base=server.base_url, api_key=f"{KEY}\n", engine="direct")("hi")
    assert server.requests[0].api_key == KEY


def test_key_of_a_failed_embedding_is_not_shown(server: FakeServer) -> None:
    """The embedding engine has the same border."""
    server.script(Reply(status=401, text=f"Incorrect API key provided: {KEY}."))
    embedder = Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0)
    with pytest.raises(LMAuthError) as caught:
        embedder.embed(["a"])
    assert KEY not in everything_shown(caught.value)


def test_nothing_is_printed_or_logged_with_the_key(
    server: FakeServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """litellm prints advice and logs at will; at a usual level none of it may hold the key."""
    caplog.set_level(logging.INFO)
    server.script(*echo(KEY))
    for _ in echo(KEY):
        failure(lm_of(server))
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err + caplog.text


def test_harmless_cause_is_kept(server: FakeServer) -> None:
    """Where no secret is in sight the original failure helps whoever debugs."""
    server.script(Reply(status=503))
    cause = failure(lm_of(server, engine="litellm")).__cause__
    assert type(cause).__module__.startswith("litellm")


def test_words_shorter_than_a_key_stay() -> None:
    """A local server's `none` as a key would blot out half of the message otherwise."""
    assert redact("none of the keys fits", ["none", "keys"]) == "none of the keys fits"
