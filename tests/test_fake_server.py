"""The fake server seen by real clients: its answers, each scripted fault, its gate and its log.

Not here: tests of this package's own clients against it.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import http.client
import json
import math
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import anyio
import anyio.to_thread
import httpx
import pytest

from dspylite.testing.journal import Journal
from dspylite.testing.server import Answer, FakeServer, Reply
from dspylite.testing.wire import HttpRequest

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with client_of(server) as opened:
        yield opened


def client_of(server: FakeServer, *, timeout_s: float = 10.0) -> httpx.Client:
    return httpx.Client(base_url=server.base_url, timeout=timeout_s, trust_env=False)


def ask(text: str = "hello there", **more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def chat(client: httpx.Client, text: str = "hello there", **more: object) -> httpx.Response:
    return client.post("/chat/completions", json=ask(text, **more))


def said(response: httpx.Response) -> list[Any]:
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def events(text: str) -> list[Any]:
    """Parse SSE; `[DONE]` stays a string."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


@contextlib.contextmanager
def raw_connection(server: FakeServer) -> Generator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        yield sock


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    while more := sock.recv(65536):
        received += more
    return received


def read_to_reset(sock: socket.socket) -> bytes:
    received = b""
    try:
        while more := sock.recv(65536):
            received += more
    except ConnectionResetError:
        return received
    raise AssertionError(f"the connection ended politely after {received!r}")


def post_bytes(body: bytes, *, path: str = CHAT, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# -- answers -----------------------------------------------------------------------------------


def test_chat_without_script_echoes_the_last_user_message(client: httpx.Client) -> None:
    """A deterministic answer that shows which question it belongs to."""
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "..."},
        {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "image_url"}]},
        {"role": "tool", "content": "..."},
    ]
    answer = client.post("/chat/completions", json={"model": "m", "messages": messages}).json()
    assert answer["choices"] == [
        {
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "echo: second"},
        }
    ]
    assert (answer["object"], answer["model"]) == ("chat.completion", "m")


def test_usage_is_counted_in_words_and_logged(server: FakeServer, client: httpx.Client) -> None:
    """Usage tracking is judged by the server's own count, so that count must be predictable."""
    server.script(Reply(text="one two three"))
    usage = chat(client, "a b").json()["usage"]
    assert usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert server.requests[0].usage == usage


def test_n_choices_take_the_texts_in_turn(server: FakeServer, client: httpx.Client) -> None:
    """Several completions of one request must be tellable apart."""
    server.script(Reply(texts=["x", "y"]), Reply(text="z"))
    assert said(chat(client, n=3)) == ["x", "y", "x"]
    assert said(chat(client, n=2)) == ["z", "z"]


def test_answer_may_be_a_text_a_reply_or_a_function() -> None:
    """Each kind of default suits another test."""

    def decide(body: Mapping[str, object]) -> str | Reply | None:
        answers: dict[object, str | Reply] = {"a": "text", "b": Reply(text="reply")}
        return answers.get(body["model"])

    cases: list[tuple[Answer, str, str]] = [
        ("fixed", "m", "fixed"),
        (Reply(text="fixed reply"), "m", "fixed reply"),
        (decide, "a", "text"),
        (decide, "b", "reply"),
        (decide, "c", "echo: hello there"),
    ]
    for answer, model, expected in cases:
        with FakeServer(answer=answer) as server, client_of(server) as client:
            assert said(chat(client, model=model)) == [expected]


def test_answer_function_that_raises_becomes_a_500_with_its_name() -> None:
    """A mistake in a test's own function must show itself instead of hanging the client."""
    broken = FakeServer(answer=lambda body: str(body["nothing"]))
    with broken as server, client_of(server) as client:
        response = chat(client)
    assert response.status_code == 500
    assert "KeyError: 'nothing'" in response.json()["error"]["message"]


def test_scripted_replies_come_in_order_and_then_the_default(
    server: FakeServer, client: httpx.Client
) -> None:
    """A script is a story: each request takes the next page."""
    server.script(Reply(text="1"), Reply(text="2"))
    assert server.pending_replies == 2
    assert [said(chat(client))[0] for _ in range(3)] == ["1", "2", "echo: hello there"]
    assert server.pending_replies == 0


def test_reply_without_text_takes_the_usual_words() -> None:
    """A fault can be scripted without repeating what the model says."""
    with FakeServer(answer=lambda body: "usual") as server, client_of(server) as client:
        server.script(Reply(headers={"x-extra": "1"}))
        response = chat(client)
    assert (said(response), response.headers["x-extra"]) == (["usual"], "1")


def test_rule_takes_its_own_requests_before_the_queue(
    server: FakeServer, client: httpx.Client
) -> None:
    """One tenant can be made to fail while the others go on."""
    server.script(Reply(text="queued"))
    server.script_for(lambda request: request.prompt == "b", Reply(text="1"), Reply(text="2"))
    server.script_for(lambda request: True)
    assert server.pending_replies == 3
    assert [said(chat(client, text))[0] for text in "babb"] == ["1", "queued", "2", "echo: b"]


def test_completions_answers_each_prompt(client: httpx.Client) -> None:
    """The older endpoint takes several prompts at once, and tokens in place of text."""
    answer = client.post("/completions", json={"prompt": ["a", "b"], "n": 2}).json()
    assert [choice["text"] for choice in answer["choices"]] == [
        "echo: a", "echo: a", "echo: b", "echo: b"
    ]  # fmt: skip
    tokens = client.post("/completions", json={"prompt": [[7, 8]]}).json()
    assert tokens["choices"][0]["text"] == "echo: 7 8"
    assert answer["model"] == "fake-model"


def test_tool_calls_may_be_short_or_whole(server: FakeServer, client: httpx.Client) -> None:
    """What an agent's loop needs, in one line of script."""
    whole = {"id": "x", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    server.script(Reply(tool_calls=[{"name": "f", "arguments": {"a": 1}}, whole]))
    (choice,) = chat(client).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {
            "id": "call_0",
            "type": "function",
            "function": {"name": "f", "arguments": '{"a": 1}'},
        },
        whole,
    ]


def test_usage_can_be_replaced_or_left_out(server: FakeServer, client: httpx.Client) -> None:
    """Providers differ in what they report, and some report nothing."""
    server.script(Reply(usage={"total_tokens": 99}), Reply(usage={}))
    assert chat(client).json()["usage"] == {"total_tokens": 99}
    assert "usage" not in chat(client).json()


def test_lone_surrogate_comes_back_as_its_escape(client: httpx.Client) -> None:
    """Half a character must not break the server that tests how clients treat it."""
    body = json.dumps(ask("\ud800"))
    assert r"echo: \ud800" in client.post("/chat/completions", content=body).text


# -- streams -----------------------------------------------------------------------------------


def test_stream_sends_words_a_finish_reason_and_done(client: httpx.Client) -> None:
    """The pieces put together are the text of an answer that is not streamed."""
    response = chat(client, "two words", stream=True)
    *chunks, done = events(response.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert response.headers["content-type"] == "text/event-stream"
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == ["echo: ", "two ", "words"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


def test_stream_ends_with_usage_when_asked(server: FakeServer, client: httpx.Client) -> None:
    """Only a client that asks gets the extra event, but the log has the count anyway."""
    response = chat(client, "a", stream=True, stream_options={"include_usage": True})
    *chunks, usage, _ = events(response.text)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks)
    chat(client, "a", stream=True)
    assert [request.usage for request in server.requests] == [usage["usage"]] * 2


def test_stream_interleaves_its_choices(server: FakeServer, client: httpx.Client) -> None:
    """A client that joins pieces without their index would mix them up here."""
    server.script(Reply(texts=["a b", "c"]))
    *chunks, _ = events(chat(client, stream=True, n=2).text)
    pieces = [chunk["choices"][0] for chunk in chunks]
    texts = [(p["index"], p["delta"]["content"]) for p in pieces if p["delta"].get("content")]
    assert texts == [(0, "a "), (1, "c"), (0, "b")]


def test_stream_takes_scripted_chunks(server: FakeServer, client: httpx.Client) -> None:
    """Field markers split at any place are what stream parsers stumble over."""
    server.script(Reply(chunks=["[[ #", "# a ##]]"], chunk_delay_s=0.001), Reply(chunks=["x", "y"]))
    *chunks, _ = events(chat(client, stream=True).text)
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert contents == ["", "[[ #", "# a ##]]", None]
    assert said(chat(client)) == ["xy"]


def test_stream_sends_a_tool_call_as_name_and_arguments(
    server: FakeServer, client: httpx.Client
) -> None:
    """Arguments arrive after the name, to be joined by their index."""
    server.script(Reply(tool_calls=[{"name": "f", "arguments": "{}"}]))
    chunks = events(chat(client, stream=True).text)[1:-2]
    calls = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks]
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": ""},
        {"arguments": "{}"},
    ]


def test_completions_streams_text(client: httpx.Client) -> None:
    """The older endpoint has no deltas."""
    *chunks, done = events(client.post("/completions", json={"prompt": "a", "stream": True}).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["echo: ", "a", ""]
    assert (chunks[0]["object"], done) == ("text_completion", "[DONE]")


def test_cut_stream_ends_politely_without_finish_reason_or_done(
    server: FakeServer, client: httpx.Client
) -> None:
    """The fault that is most easily taken for success."""
    server.script(Reply(text="a b c", cut_after=2))
    chunks = events(chat(client, stream=True).text)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "a ", "b "]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert server.requests[0].usage is None


def test_cut_stream_with_drop_is_reset_after_its_pieces(server: FakeServer) -> None:
    """What arrived before the reset is still readable."""
    server.script(Reply(text="a b c", cut_after=1, drop="body"))
    with raw_connection(server) as sock:
        sock.sendall(post_bytes(json.dumps(ask(stream=True)).encode()))
        received = read_to_reset(sock).decode()
    assert [event["choices"][0]["delta"]["content"] for event in events(received)] == ["", "a "]


def test_keepalive_comments_go_on_until_the_client_leaves(
    server: FakeServer, client: httpx.Client
) -> None:
    """Bytes that arrive are no content; the log shows that the client gave up."""
    server.script(Reply(text="a", cut_after=1, keepalive_comments=True))
    with client.stream("POST", "/chat/completions", json=ask(stream=True)) as response:
        lines = (line for line in response.iter_lines() if line.startswith(":"))
        assert [next(lines), next(lines)] == [": keep-alive"] * 2
        assert server.in_flight == 1
    server.wait_until_idle()
    assert (server.requests[0].client_left, server.requests[0].status) == (True, 200)


def test_keepalive_spaces_take_the_place_of_an_answer_that_is_no_stream(
    server: FakeServer, client: httpx.Client
) -> None:
    """Gateways keep slow unstreamed answers alive with spaces."""
    server.script(*[Reply(keepalive_comments=True)] * 2)
    with client.stream("POST", "/chat/completions", json=ask()) as response:
        assert next(response.iter_raw()).strip() == b""
    with client.stream("POST", "/embeddings", json={"input": "a"}) as response:
        assert next(response.iter_raw()).strip() == b""
    server.wait_until_idle()
    assert [request.client_left for request in server.requests] == [True, True]


def test_raw_events_may_be_followed_by_comments(server: FakeServer, client: httpx.Client) -> None:
    """Whatever was sent first, the stream then stays open and says nothing."""
    server.script(Reply(body="data: {}\n\n", keepalive_comments=True))
    with client.stream("POST", "/chat/completions", json=ask(stream=True)) as response:
        lines = (line for line in response.iter_lines() if line)
        assert [next(lines), next(lines)] == ["data: {}", ": keep-alive"]


# -- embeddings and models ---------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [None, 1, 5, 1536])
def test_vectors_are_deterministic_and_equal_in_both_encodings(
    server: FakeServer, client: httpx.Client, dimensions: int | None
) -> None:
    """Row i belongs to text i, whichever way it travels."""
    width = dimensions or 8
    question = {"input": ["a", "b"], "dimensions": dimensions}
    floats = client.post("/embeddings", json=question).json()
    coded = client.post("/embeddings", json={**question, "encoding_format": "base64"}).json()
    expected = [list(server.vector(text, dimensions=width)) for text in "ab"]
    assert [row["embedding"] for row in floats["data"]] == expected
    packed = [base64.b64decode(row["embedding"]) for row in coded["data"]]
    assert [list(struct.unpack(f"<{width}f", row)) for row in packed] == expected
    assert [row["index"] for row in coded["data"]] == [0, 1]
    assert floats["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert all(math.isclose(math.hypot(*row), 1, rel_tol=1e-6) for row in expected)


def test_single_text_and_tokens_are_embedded(server: FakeServer, client: httpx.Client) -> None:
    """All forms of `input` that OpenAI takes."""
    for given, text in [("a b", "a b"), ([1, 2], "1 2"), ([[3]], "3")]:
        (row,) = client.post("/embeddings", json={"input": given}).json()["data"]
        assert row["embedding"] == list(server.vector(text))


def test_scripted_vectors_come_as_given(server: FakeServer, client: httpx.Client) -> None:
    """Shuffled, missing, short and hollow rows are faults that clients must notice."""
    server.script(*[Reply(vectors={1: [1.0, None], 0: [0.5]})] * 2, Reply(usage={}))
    floats, coded = (
        client.post("/embeddings", json={"input": "abc", "encoding_format": encoding}).json()
        for encoding in ("float", "base64")
    )
    rows = [(row["index"], row["embedding"]) for row in floats["data"]]
    assert rows == [(1, [1.0, None]), (0, [0.5])]
    assert coded["data"][0]["embedding"] == [1.0, None]
    assert coded["data"][1]["embedding"] == base64.b64encode(struct.pack("<f", 0.5)).decode()
    assert "usage" not in client.post("/embeddings", json={"input": "a"}).json()


def test_models_lists_one_model_under_any_prefix(server: FakeServer) -> None:
    """Gateways put the API under prefixes of their own."""
    answer = httpx.get(f"http://127.0.0.1:{server.port}/deep/prefix/models", trust_env=False)
    assert [row["id"] for row in answer.json()["data"]] == ["fake-model"]


# -- refusals ----------------------------------------------------------------------------------


def test_what_is_wrong_is_refused_in_openai_format(
    server: FakeServer, client: httpx.Client
) -> None:
    """A refused request takes no scripted reply, so that the story goes on with the next one."""
    server.script(Reply(text="kept"))
    deep = "[" * 100_000
    for method, path, body, status in [
        ("POST", "/nowhere", "{}", 404),
        ("GET", "/chat/completions", None, 405),
        ("POST", "/chat/completions", "{", 400),
        ("POST", "/chat/completions", deep, 400),
        ("POST", "/chat/completions", "[]", 400),
        ("POST", "/chat/completions", "", 400),
        ("POST", "/chat/completions", "{}", 400),
        ("POST", "/chat/completions", json.dumps(ask(n=0)), 400),
        ("POST", "/embeddings", '{"input": []}', 400),
        ("POST", "/embeddings", '{"input": "a", "dimensions": true}', 400),
        ("POST", "/embeddings", '{"input": "a", "encoding_format": "int8"}', 400),
        ("POST", "/completions", "{}", 400),
    ]:
        response = client.request(method, path, content=body)
        assert (response.status_code, path) == (status, path)
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"]
    assert server.pending_replies == 1


def test_only_listed_keys_are_let_in() -> None:
    """A lost or foreign key must be seen by the server, not only by the client."""
    with FakeServer(api_keys=["good"]) as server, client_of(server) as client:
        responses = [
            client.post("/chat/completions", json=ask(), headers=headers)
            for headers in ({"authorization": "Bearer good"}, {"authorization": "Bearer bad"}, {})
        ]
    assert [response.status_code for response in responses] == [200, 401, 401]
    assert responses[1].json()["error"]["code"] == "invalid_api_key"
    assert [request.api_key for request in server.requests] == ["good", "bad", None]


@pytest.mark.parametrize(
    "options",
    [
        {"latency_s": -1.0},
        {"dimensions": 0},
        {"max_body_bytes": 0},
        {"api_keys": "one string"},
    ],
)
def test_impossible_server_options_are_refused(options: dict[str, Any]) -> None:
    """A mistake is found where it is made."""
    with pytest.raises(ValueError, match=next(iter(options))):
        FakeServer(**options)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": 100},
        {"drop": "sometimes"},
        {"delay_s": -1.0},
        {"byte_delay_s": math.inf},
        {"cut_after": -1},
        {"texts": "abc"},
        {"headers": {"x": "a\r\nb"}},
        {"headers": {"a b": "x"}},
    ],
)
def test_impossible_replies_are_refused(fields: dict[str, Any]) -> None:
    """A reply that could not be sent would show itself only in the middle of a test."""
    with pytest.raises(ValueError, match=next(iter(fields)).rstrip("s")):
        Reply(**fields)


# -- scripted faults ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, "invalid_request_error", "invalid_api_key"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (529, "server_error", None),
    ],
)
def test_error_status_comes_in_openai_format_with_headers(
    server: FakeServer, client: httpx.Client, status: int, kind: str, code: str | None
) -> None:
    """Clients read the class of a failure from these fields."""
    server.script(Reply(status=status, headers={"Retry-After": "7"}))
    response = chat(client)
    error = response.json()["error"]
    assert (response.status_code, response.headers["retry-after"]) == (status, "7")
    assert (error["type"], error["code"]) == (kind, code)
    assert str(status) in error["message"]
    assert server.requests[0].usage is None


def test_error_takes_a_message_and_a_code(server: FakeServer, client: httpx.Client) -> None:
    """Context windows and content filters are told by code and message alone."""
    server.script(Reply(status=400, text="too long", error_code="context_length_exceeded"))
    error = chat(client).json()["error"]
    assert (error["message"], error["code"]) == ("too long", "context_length_exceeded")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        ("<html>bad gateway</html>", "text/html"),
        ("no healthy upstream", "text/plain"),
        ('{"choices": [', "application/json"),
        (b"data: {broken\n\n", "text/event-stream"),
        (": comment\n\n", "text/event-stream"),
        ("", "text/plain"),
    ],
)
def test_raw_body_is_sent_as_it_is(
    server: FakeServer, client: httpx.Client, body: str | bytes, content_type: str
) -> None:
    """Proxies answer in their own words, with and without an error status."""
    server.script(Reply(body=body), Reply(body=body, status=502))
    for status in (200, 502):
        response = chat(client)
        assert response.status_code == status
        assert response.content == (body if isinstance(body, bytes) else body.encode())
        assert response.headers["content-type"] == content_type


def test_redirect_and_no_content_have_empty_bodies(
    server: FakeServer, client: httpx.Client
) -> None:
    """Neither may be mistaken for an answer."""
    server.script(Reply(status=302, headers={"Location": "http://other.invalid/"}))
    server.script(Reply(status=204))
    redirect, nothing = chat(client), chat(client)
    assert (redirect.headers["location"], redirect.content) == ("http://other.invalid/", b"")
    assert (nothing.content, "content-length" in nothing.headers) == (b"", False)
    assert said(chat(client)) == ["echo: hello there"]


def test_drop_before_leaves_the_client_without_a_byte(server: FakeServer) -> None:
    """A reset, as from a crashing server."""
    server.script(Reply(drop="before"))
    with raw_connection(server) as sock:
        sock.sendall(post_bytes(json.dumps(ask()).encode()))
        assert read_to_reset(sock) == b""
    assert (server.requests[0].status, server.requests[0].client_left) == (None, False)


def test_drop_after_headers_leaves_a_status_without_body(server: FakeServer) -> None:
    """The status says 200, and yet there is no answer."""
    server.script(Reply(drop="headers"))
    with raw_connection(server) as sock:
        sock.sendall(post_bytes(json.dumps(ask()).encode()))
        head = read_to_reset(sock)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert (server.requests[0].status, server.requests[0].usage) == (200, None)


@pytest.mark.parametrize("stream", [False, True])
def test_drop_in_the_body_leaves_half_of_it(server: FakeServer, *, stream: bool) -> None:
    """Half an answer must never be taken for a whole one."""
    server.script(Reply(drop="body", text="word " * 50))
    with raw_connection(server) as sock:
        sock.sendall(post_bytes(json.dumps(ask(stream=stream)).encode()))
        received = read_to_reset(sock)
    assert b"word" in received
    assert b"usage" not in received
    assert b"[DONE]" not in received


@pytest.mark.parametrize("drop", ["before", "headers", "body"])
def test_dropped_connection_is_a_transport_error_to_clients(
    server: FakeServer, client: httpx.Client, drop: Literal["before", "headers", "body"]
) -> None:
    """Whatever arrived before it, a reset must not pass for an answer."""
    server.script(Reply(drop=drop))
    with pytest.raises(httpx.TransportError):
        chat(client)
    assert said(chat(client)) == ["echo: hello there"]


def test_hung_request_ends_with_the_client(server: FakeServer) -> None:
    """A client's own timeout is seen by the server as a client that left."""
    server.script(Reply(hang=True), Reply(delay_s=60), Reply(text="well"))
    for _ in range(2):
        with client_of(server, timeout_s=0.05) as client, pytest.raises(httpx.ReadTimeout):
            chat(client)
    server.wait_until_idle()
    assert [r.client_left for r in server.requests] == [True, True]
    with client_of(server) as client:
        assert said(chat(client)) == ["well"]


def test_client_that_left_before_it_was_read_is_noticed(server: FakeServer) -> None:
    """The end of the stream may come together with the request."""
    with server.hold(), raw_connection(server) as sock:
        sock.sendall(post_bytes(json.dumps(ask()).encode()))
        sock.shutdown(socket.SHUT_WR)
        server.wait_for_requests(1)
        server.wait_until_idle()
    assert server.requests[0].client_left


def test_slow_drip_keeps_the_request_in_flight(server: FakeServer, client: httpx.Client) -> None:
    """Bytes that trickle in defeat a timeout between bytes, so a total one is needed."""
    server.script(Reply(body="x" * 1000, byte_delay_s=0.02))
    with client.stream("POST", "/chat/completions", json=ask()) as response:
        assert response.headers["content-length"] == "1000"
        received = response.iter_bytes()
        assert len(next(received)) < 1000
        assert server.in_flight == 1
    server.wait_until_idle()
    assert server.requests[0].client_left


def test_delayed_answers_arrive() -> None:
    """Both kinds of delay add up; a fast drip is a whole answer in the end."""
    with FakeServer(latency_s=0.02) as server, client_of(server) as client:
        server.script(Reply(delay_s=0.02, byte_delay_s=0.0001, text="slow"))
        assert said(chat(client)) == ["slow"]
        (request,) = server.requests
        assert request.answered_at is not None
        assert request.answered_at - request.received_at >= 0.04


@pytest.mark.parametrize("stream", [False, True])
def test_gzip_body_is_unpacked_by_the_client(
    server: FakeServer, client: httpx.Client, *, stream: bool
) -> None:
    """Compression is a matter of the transport, in streams too."""
    server.script(Reply(text="packed", gzip=True))
    response = chat(client, stream=stream)
    assert response.headers["content-encoding"] == "gzip"
    assert "packed" in response.text


def test_padding_makes_a_small_bomb_of_a_large_answer(
    server: FakeServer, client: httpx.Client
) -> None:
    """A megabyte of nothing, a thousandth of it on the wire."""
    server.script(Reply(text="x", padding_bytes=1_000_000, gzip=True))
    with client.stream("POST", "/chat/completions", json=ask()) as response:
        packed = b"".join(response.iter_raw())
    body = zlib.decompress(packed, wbits=31)
    assert len(packed) < 10_000
    assert len(body) > 1_000_000
    assert json.loads(body)["choices"][0]["message"]["content"] == "x"


def test_large_answer_arrives_whole(server: FakeServer, client: httpx.Client) -> None:
    """More than a kernel takes at once."""
    server.script(Reply(text="x" * 5_000_000))
    assert said(chat(client)) == ["x" * 5_000_000]
    assert server.requests[0].status == 200


def test_wrong_length_is_sent_as_scripted(server: FakeServer, client: httpx.Client) -> None:
    """A body shorter than announced ends with its connection, at once."""
    server.script(Reply(body="{}", headers={"Content-Length": "10"}))
    with pytest.raises(httpx.RemoteProtocolError):
        chat(client)
    assert said(chat(client)) == ["echo: hello there"]


# -- gate --------------------------------------------------------------------------------------


def open_clients(server: FakeServer, count: int) -> Sequence[http.client.HTTPConnection]:
    return [http.client.HTTPConnection("127.0.0.1", server.port, timeout=20) for _ in range(count)]


@pytest.mark.parametrize("count", [128, 300])
def test_many_kept_alive_connections_are_in_flight_at_once(server: FakeServer, count: int) -> None:
    """Both rounds run on the same connections, and no request waits for another one."""
    clients = open_clients(server, count)
    for round_number in (1, 2):
        with server.hold():
            for place, client in enumerate(clients):
                client.request("POST", CHAT, json.dumps(ask(f"{place}")))
            server.wait_for_requests(round_number * count, timeout_s=20)
            assert server.in_flight == count
        for place, client in enumerate(clients):
            answer = json.loads(client.getresponse().read())
            assert answer["choices"][0]["message"]["content"] == f"echo: {place}"
    for client in clients:
        client.close()
    assert (server.in_flight, server.max_in_flight) == (0, count)
    assert {request.connection for request in server.requests} == set(range(count))


async def test_event_loop_of_the_client_may_wait_for_the_server(server: FakeServer) -> None:
    """The server's loop is its own, so that the client's loop cannot starve it."""
    async with httpx.AsyncClient(base_url=server.base_url, trust_env=False) as client:
        answers: dict[int, str] = {}

        async def call(number: int) -> None:
            answers[number] = said(await client.post("/chat/completions", json=ask(f"{number}")))[0]

        async with anyio.create_task_group() as tasks:
            with server.hold():
                for number in range(16):
                    tasks.start_soon(call, number)
                await anyio.to_thread.run_sync(server.wait_for_requests, 16)
                assert answers == {}
    assert answers == {number: f"echo: {number}" for number in range(16)}


def test_holds_may_overlap(server: FakeServer) -> None:
    """A request waits for all holds in force when it came, and for no later one."""
    first, second = open_clients(server, 2)
    with contextlib.ExitStack() as outer:
        with server.hold():
            first.request("GET", "/v1/models")
            server.wait_for_requests(1)
            outer.enter_context(server.hold())
            second.request("GET", "/v1/models")
            server.wait_for_requests(2)
        assert first.getresponse().read()
        assert server.in_flight == 1
    assert second.getresponse().read()
    first.close()
    second.close()


def test_hold_that_ends_before_it_is_waited_for_holds_nobody() -> None:
    """A request that was received in the block may reach the gate after the block."""
    entered, release = threading.Event(), threading.Event()

    def answer(body: Mapping[str, object]) -> str:
        entered.set()
        assert release.wait(10)
        return "on it goes"

    with FakeServer(answer=answer) as server:
        (client,) = open_clients(server, 1)
        with server.hold():
            client.request("POST", CHAT, json.dumps(ask()))
            assert entered.wait(10)
        release.set()
        assert b"on it goes" in client.getresponse().read()
        client.close()


def test_hold_outlives_a_restart(server: FakeServer) -> None:
    """An outage in the middle of a hold ends what was held, not the hold."""
    with contextlib.ExitStack() as hold:
        hold.enter_context(server.hold())
        for count in (1, 2):
            (client,) = open_clients(server, 1)
            client.request("GET", "/v1/models")
            server.wait_for_requests(count)
            if count == 1:
                server.close()
                client.close()
                server.start()
        hold.close()
        assert client.getresponse().read()
        client.close()
    with server.hold():
        server.close()
    assert [request.status for request in server.requests] == [None, 200]


def test_waiting_in_vain_tells_the_counts(server: FakeServer) -> None:
    """A failed test should say what had arrived instead."""
    (client,) = open_clients(server, 1)
    with server.hold():
        client.request("GET", "/v1/models")
        server.wait_for_requests(1)
        with pytest.raises(TimeoutError, match=r"1 requests received and 1 in flight .* not 2"):
            server.wait_for_requests(2, timeout_s=0.01)
        with pytest.raises(TimeoutError, match=r"1 in flight .* not 0"):
            server.wait_until_idle(timeout_s=0.01)
    client.close()


# -- log ---------------------------------------------------------------------------------------


def test_log_has_what_was_sent_and_what_was_answered(
    server: FakeServer, client: httpx.Client
) -> None:
    """The log alone must settle what a client did."""
    headers = {"Authorization": "Bearer secret-key", "X-Mine": "1"}
    first = client.post("/chat/completions?v=2", json=ask("hi"), headers=headers)
    second = client.post("/embeddings", content="no json")
    one, two = server.requests
    assert (one.index, one.method, one.path, one.query) == (0, "POST", CHAT, "v=2")
    assert (one.body, one.json, one.prompt) == (ask("hi"), ask("hi"), "hi")
    assert (one.headers["x-mine"], one.api_key) == ("1", "secret-key")
    assert (one.status, one.in_flight, one.client_left) == (200, 1, False)
    assert one.answered_at is not None
    assert one.received_at <= one.answered_at <= two.received_at
    assert (two.body, dict(two.json), two.prompt, two.status) == ("no json", {}, "", 400)
    assert [one.request_id, two.request_id] == ["req-1", "req-2"]
    assert [r.headers["x-request-id"] for r in (first, second)] == ["req-1", "req-2"]
    assert one.connection == two.connection == 0
    assert "secret-key" not in repr(one)


def test_answer_in_the_clients_hands_is_closed_in_the_log(
    server: FakeServer, client: httpx.Client
) -> None:
    """No test may have to wait between an answer and its entry in the log."""
    for _ in range(200):
        chat(client)
        assert (server.in_flight, server.requests[-1].status) == (0, 200)


def test_large_answer_is_in_flight_until_the_client_has_read_it(server: FakeServer) -> None:
    """What the kernel could not take yet is not answered yet."""
    server.script(Reply(body=b"x" * 32_000_000))
    with raw_connection(server) as sock:
        sock.sendall(post_bytes(json.dumps(ask()).encode()))
        assert sock.recv(10)
        assert server.in_flight == 1
    server.wait_until_idle()
    assert server.requests[0].client_left


def test_books_of_a_request_are_closed_once() -> None:
    """A client may leave between its answer's last byte and the kernel's taking it."""
    journal = Journal(max_recorded=None)
    request = HttpRequest(
        method="GET",
        path="/",
        query="",
        headers={},
        body=b"",
        keep_alive=True,
        chunks_understood=True,
    )
    entry, _ = journal.receive(request, connection=0)
    journal.settle(entry, status=200)
    journal.settle(entry, status=None, client_left=True)
    assert (entry.record.status, entry.record.client_left, journal.in_flight()) == (200, False, 0)


def test_clear_counts_anew_and_keeps_the_script(server: FakeServer, client: httpx.Client) -> None:
    """A warm-up should leave no trace in what is judged."""
    chat(client)
    server.script(Reply(text="scripted"))
    server.clear()
    assert (server.requests, server.max_in_flight) == ((), 0)
    assert said(chat(client)) == ["scripted"]
    assert [(request.index, request.request_id) for request in server.requests] == [(0, "req-2")]


def test_log_keeps_only_the_latest_when_bounded() -> None:
    """A hundred thousand calls must not grow the process that counts them."""
    with FakeServer(max_recorded=2) as server, client_of(server) as client:
        for text in "abc":
            chat(client, text)
        server.wait_for_requests(3)
        assert [(r.index, r.prompt) for r in server.requests] == [(1, "b"), (2, "c")]


# -- life --------------------------------------------------------------------------------------


def test_close_is_quick_with_hung_and_idle_connections() -> None:
    """The end of a test must not wait for the faults it has scripted."""
    threads = set(threading.enumerate())
    server = FakeServer(answer=Reply(hang=True)).start()
    idle, *hung = open_clients(server, 20)
    idle.connect()
    for client in hung:
        client.request("POST", CHAT, json.dumps(ask()))
    server.wait_for_requests(len(hung))
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 1
    for client in hung:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.getresponse()
        client.close()
    idle.close()
    assert set(threading.enumerate()) == threads
    assert server.in_flight == 0
    assert not any(request.client_left for request in server.requests)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors under /proc")
def test_servers_leave_no_descriptor_open() -> None:
    """A suite starts hundreds of servers."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with FakeServer() as server, client_of(server) as client:
            chat(client)
    assert len(os.listdir("/proc/self/fd")) == before


def test_close_right_after_connecting_leaves_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """Connections in the act of being accepted are closed too."""
    gc.collect()
    recwarn.clear()
    for _ in range(20):
        with FakeServer() as server:
            clients = open_clients(server, 10)
            for client in clients:
                client.connect()
        for client in clients:
            client.close()
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


def test_closed_server_refuses_and_returns_on_its_port(server: FakeServer) -> None:
    """An outage: refused connections, then the same address again."""
    url, threads = server.base_url, threading.active_count()
    assert server.start() is server
    assert threading.active_count() == threads
    server.close()
    server.close()
    with client_of(server) as client:
        with pytest.raises(httpx.ConnectError):
            chat(client)
        server.start()
        assert server.base_url == url
        assert said(chat(client)) == ["echo: hello there"]
    assert len(server.requests) == 1


def test_server_that_was_never_started_has_no_address() -> None:
    """The message says how to get one."""
    server = FakeServer()
    with server.hold(), pytest.raises(RuntimeError, match="with FakeServer"):
        _ = server.base_url
    server.close()


def test_answer_that_blocks_is_named_by_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stuck thread is an error, not a hang and not a leak in silence."""
    monkeypatch.setattr("dspylite.testing.server._JOIN_S", 0.05)
    entered, release = threading.Event(), threading.Event()

    def answer(body: Mapping[str, object]) -> str:
        entered.set()
        release.wait()
        return "late"

    server = FakeServer(answer=answer).start()
    (client,) = open_clients(server, 1)
    client.request("POST", CHAT, json.dumps(ask()))
    assert entered.wait(5)
    with pytest.raises(RuntimeError, match="blocks"):
        server.close()
    release.set()
    monkeypatch.undo()
    server.close()
    client.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forked_child_keeps_no_connection_open() -> None:
    """Otherwise clients would wait for ever on connections that the server has closed."""
    with FakeServer() as server, raw_connection(server) as held, raw_connection(server) as cut:
        with server.hold():
            held.sendall(post_bytes(json.dumps(ask()).encode()))
            server.wait_for_requests(1)
        assert held.recv(65536)
        server.script(Reply(drop="before"))
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover -- coverage does not see a child that ends like this
            os.close(write_end)
            code = 0 if len(server.requests) == 1 else 1
            server.close()
            os.read(read_end, 1)
            os._exit(code)
        os.close(read_end)
        try:
            cut.sendall(post_bytes(json.dumps(ask()).encode()))
            assert read_to_reset(cut) == b""
            server.close()
            assert held.recv(1) == b""
            with pytest.raises(ConnectionRefusedError), raw_connection(server):
                pass
        finally:
            os.close(write_end)
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


# -- hostile clients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n folded: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 99, 431),
    ],
)
def test_unreadable_request_is_refused_and_not_logged(sent: bytes, status: int) -> None:
    """Whatever the bytes, there is an answer that can be read, and an end."""
    with FakeServer(max_body_bytes=1000) as server, raw_connection(server) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        answer = read_to_end(sock)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"invalid_request_error" in answer
        assert server.requests == ()


def test_refused_client_that_goes_on_sending_is_cut_off() -> None:
    """It gets its answer first, and no more than a moment."""
    with FakeServer(max_body_bytes=1) as server, raw_connection(server) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 413 ")


def test_clients_that_break_off_leave_no_word_on_stderr(
    server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tracebacks of a fake server would bury those of the test."""
    whole = post_bytes(json.dumps(ask("x" * 1000)).encode())
    for size in (0, 5, 60, len(whole) - 1):
        for polite in (True, False):
            with raw_connection(server) as sock:
                sock.sendall(whole[:size])
                if not polite:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.script(Reply(padding_bytes=100_000_000), Reply(byte_delay_s=0.001))
    for count in (1, 2):
        with raw_connection(server) as sock:
            sock.sendall(whole)
            assert sock.recv(10)
            server.wait_for_requests(count)
    server.wait_until_idle()
    assert [request.client_left for request in server.requests] == [True, True]
    with client_of(server) as client:
        assert chat(client).status_code == 200
    server.close()
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_pipelined_and_chunked_requests_are_read_in_order(server: FakeServer) -> None:
    """Clients differ in how they send; the log does not."""
    body = json.dumps(ask("chunked")).encode()
    chunked = b"POST %b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
    chunked += b"5;ext=1\r\n%b\r\n%x\r\n%b\r\n" % (body[:5], len(body) - 5, body[5:])
    chunked += b"0\r\nTrailer: x\r\n\r\n"
    plain = post_bytes(json.dumps(ask("plain")).encode(), headers="Connection: close\r\n")
    with raw_connection(server) as sock:
        sock.sendall(chunked + b"\r\n" + plain)
        answers = read_to_end(sock)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.index(b"echo: chunked") < answers.index(b"echo: plain")
    assert [request.prompt for request in server.requests] == ["chunked", "plain"]


def test_client_that_asks_first_is_told_to_go_on(server: FakeServer) -> None:
    """As `curl` does before a large body."""
    body = json.dumps(ask("big")).encode()
    head, _, _ = post_bytes(body, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with raw_connection(server) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert b"echo: big" in sock.recv(65536)


def test_old_clients_get_streams_without_chunks(server: FakeServer) -> None:
    """HTTP/1.0 has neither chunks nor kept-alive connections."""
    body = json.dumps(ask("old", stream=True)).encode()
    with raw_connection(server) as sock:
        sock.sendall(post_bytes(body).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, rest = read_to_end(sock).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"connection: close" in head
    assert rest.endswith(b"data: [DONE]\n\n")


def test_head_request_gets_no_body(client: httpx.Client) -> None:
    """Its connection would be out of step otherwise."""
    assert client.head("/models").status_code == 405
    assert client.get("/models").status_code == 200


# -- a client that users have ------------------------------------------------------------------


def test_openai_sdk_chats_streams_and_embeds(server: FakeServer) -> None:
    """What the SDK reads without complaint is OpenAI's format."""
    openai = pytest.importorskip("openai")
    server.script(Reply(text="hello"), Reply(text="a b"))
    server.script_for(lambda request: request.path.endswith("/embeddings"), Reply())
    question = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=server.base_url, api_key="k", max_retries=0) as sdk:
        answer = sdk.chat.completions.create(model="m", messages=question)
        stream = sdk.chat.completions.create(
            model="m", messages=question, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        vectors = sdk.embeddings.create(model="m", input=["x", "y"])
        models = list(sdk.models.list())
        server.script(Reply(status=429, headers={"retry-after": "1"}))
        with pytest.raises(openai.RateLimitError) as caught:
            sdk.chat.completions.create(model="m", messages=question)
    assert answer.choices[0].message.content == "hello"
    assert answer._request_id == "req-1"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a b"
    assert chunks[-1].usage.total_tokens == 3
    assert server.requests[2].json["encoding_format"] == "base64"
    assert [tuple(row.embedding) for row in vectors.data] == [server.vector(t) for t in "xy"]
    assert [model.id for model in models] == ["fake-model"]
    assert caught.value.response.headers["retry-after"] == "1"
    assert {request.api_key for request in server.requests} == {"k"}


def test_a_client_that_leaves_with_its_request_is_not_answered() -> None:
    """Its end may be read together with its request, before anybody listens for it."""
    request = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    with FakeServer() as server, server.hold():
        for count in range(1, 30):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(request)
            server.wait_for_requests(count)
            server.wait_until_idle()
    assert all(request.client_left for request in server.requests)


@pytest.mark.parametrize("wrong", ["Paris", {"text": "Paris"}, Reply])
def test_what_is_no_reply_is_refused_when_it_is_scripted(wrong: Any) -> None:
    """On the server it would be a 500, which retries hide."""
    with FakeServer() as server:
        with pytest.raises(TypeError, match="is no Reply; write"):
            server.script(Reply(), wrong)
        with pytest.raises(TypeError, match="is no Reply; write"):
            server.script_for(lambda request: True, wrong)
        assert server.pending_replies == 0
