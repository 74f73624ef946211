"""What servers and callers may do that nobody foresaw: each ends in one of our errors.

Not here: what travels wrongly over the wire (`test_direct_hostile.py`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dspylite as dspy
from dspylite.errors import LMConfigurationError, LMError, LMServerError, LMTimeoutError
from dspylite.models.deltas import Assembly
from dspylite.models.rates import Line
from dspylite.models.translate import retry_after_s
from dspylite.runtime.gates import Places
from dspylite.testing import FakeLM, FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    usual = {"num_retries": 0, "api_key": KEY, "engine": "direct", "api_base": server.base_url}
    return dspy.LM("openai/m", **{**usual, **options})


def answer(**changes: Any) -> Reply:
    message = {"role": "assistant", "content": "hi", **changes.pop("message", {})}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return Reply(body=json.dumps({"id": "x", "choices": [choice], **changes}))


UNREADABLE = {
    "choices a number": answer(choices=5),
    "choices a text": answer(choices="oops"),
    "choices of texts": answer(choices=["oops"]),
    "tool calls of texts": answer(message={"tool_calls": ["x"]}),
    "tool calls a number": answer(message={"tool_calls": 5}),
    "content a number": answer(message={"content": 5}),
}


@pytest.mark.parametrize("reply", UNREADABLE.values(), ids=UNREADABLE)
def test_answer_of_an_unknown_shape_is_a_failure_of_the_server(
    reply: Reply, server: FakeServer
) -> None:
    """A bare `TypeError` would pass every retry and fallback by (B 4.7)."""
    server.script(reply)
    with pytest.raises(LMServerError):
        lm_of(server)("hi")


READABLE = {
    "usage a text": (answer(usage="x"), ["hi"]),
    "usage a list": (answer(usage=[1]), ["hi"]),
    "details a text": (answer(usage={"prompt_tokens_details": "x"}), ["hi"]),
    "content of parts": (
        answer(message={"content": [{"type": "text", "text": "a"}, {"text": "b"}]}),
        ["ab"],
    ),
}


@pytest.mark.parametrize(("reply", "said"), READABLE.values(), ids=READABLE)
def test_answer_with_odd_trimmings_is_still_read(
    reply: Reply, said: list[str], server: FakeServer
) -> None:
    """What was paid for is not thrown away for a count that cannot be read."""
    server.script(reply)
    assert lm_of(server)("hi") == said


EVENTS = {
    "index a list": {"choices": [{"index": [1], "delta": {"content": "a"}}]},
    "content a number": {"choices": [{"index": 0, "delta": {"content": 5}}]},
    "arguments a dict": {
        "choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": {"a": 1}}}]}}]
    },
    "tool calls a number": {"choices": [{"index": 0, "delta": {"tool_calls": 5}}]},
    "choices a number": {"choices": 5},
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_event_of_an_unknown_shape_breaks_the_stream(event: dict[str, Any]) -> None:
    """A stream ends in its answer or in one of our errors (B 4.7)."""
    with pytest.raises(LMServerError):
        Assembly(model="m").read_event(json.dumps(event).encode())


def test_tool_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    """Some compatible servers leave the index out, and send whole calls one by one."""
    assembly = Assembly(model="m")
    for name in ("f", "g"):
        call = {"id": f"call_{name}", "function": {"name": name, "arguments": "{}"}}
        assembly.add({"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": None}]})
    assembly.add({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    assembly.finish()
    calls = assembly.response.outputs[0].tool_calls
    assert [(call["id"], call["function"]["name"]) for call in calls] == [
        ("call_f", "f"),
        ("call_g", "g"),
    ]


def test_long_arguments_in_many_pieces_take_linear_time() -> None:
    """A model may write a file into an argument, a few characters a piece (B 4.13)."""
    assembly = Assembly(model="m")
    piece = {"index": 0, "function": {"arguments": "x" * 40}}
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]}
    for _ in range(150_000):  # a minute and more, if each piece copied those before it
        assembly.add(chunk)
    (call,) = assembly.response.outputs[0].tool_calls
    assert len(call["function"]["arguments"]) == 6_000_000


def test_thoughts_in_tags_are_parted_in_streams_too(server: FakeServer) -> None:
    """A program reads the same answer whichever way it came."""
    server.script(Reply(chunks=["<think>h", "m</think>", "4"]))
    with lm_of(server).stream("2+2?") as stream:
        list(stream)
    (output,) = stream.response.outputs
    assert (output.reasoning, output.text) == ("hm", "4")


@pytest.mark.parametrize(
    "said", ["Mon, 01 Jan 99999999999999 00:00:00 GMT", "+9999999999999999999999", "1e999", "-"]
)
def test_absurd_retry_after_is_none(said: str) -> None:
    """A header must not turn a 429 into an exception of the calendar."""
    assert retry_after_s({"retry-after": said}) is None or retry_after_s({"retry-after": said}) > 0  # type: ignore[operator]


def test_key_that_a_function_made_is_not_shown(server: FakeServer) -> None:
    """Tokens that expire are secrets as well (B 7.4)."""
    key = "sk-made-by-a-function-123"
    lm = lm_of(server, api_key=lambda: key)
    server.script(*[Reply(status=401, body=f"bad key {key}")] * 2, Reply(body=f"<p>{key}</p>"))
    for _ in range(3):
        with pytest.raises(LMError) as raised:
            lm("hi")
        assert key not in f"{raised.value} {vars(raised.value)}"
    server.script(Reply(status=401, body=f"bad key {key}"))
    with pytest.raises(LMError) as raised, lm.stream("hi"):
        pass
    assert key not in f"{raised.value} {vars(raised.value)}"


# --- What callers give ---------------------------------------------------------------------------


OF_THE_LM = ["rpm", "max_concurrency", "num_retries", "price", "engine", "patience_s", "fallbacks"]


@pytest.mark.parametrize("name", OF_THE_LM)
def test_what_belongs_to_the_lm_is_refused_in_a_call(name: str, server: FakeServer) -> None:
    """Sent to the provider it would be a 400, or worse, be ignored."""
    with pytest.raises(LMConfigurationError, match=rf"lm\.copy\({name}=5\)"):
        lm_of(server)("hi", **{name: 5})
    assert server.requests == ()


@pytest.mark.parametrize("engine", ["direct", "litellm"])
def test_what_tells_calls_apart_is_not_sent(engine: str, server: FakeServer) -> None:
    """DSPy's programs pass `cache` and `rollout_id` with single calls."""
    lm_of(server, engine=engine)("hi", cache=False, rollout_id=3)
    assert set(server.requests[0].json) == {"model", "messages"}


BAD = {
    "timeout a text": {"timeout": "5"},
    "timeout nothing": {"timeout": 0},
    "timeout not a number": {"timeout": float("nan")},
    "headers a list": {"extra_headers": ["a"]},
    "body a list": {"extra_body": [1]},
    "size a text": {"max_response_bytes": "1"},
    "key a number": {"api_key": 5},
    "endpoint no URL": {"api_base": "junk"},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_parameter_is_refused_wherever_it_is_given(
    bad: dict[str, Any], server: FakeServer
) -> None:
    """A mistake is found at the earliest moment, and named."""
    (name,) = bad
    with pytest.raises(LMConfigurationError, match=name):
        lm_of(server, **bad)
    with pytest.raises(LMConfigurationError, match=name):
        lm_of(server).copy(**bad)
    with pytest.raises(LMConfigurationError, match=name):
        lm_of(server)("hi", **bad)
    assert server.requests == ()


def test_password_in_an_endpoint_is_refused_and_not_shown(server: FakeServer) -> None:
    """It would be ignored by one transport and sent by the other (B 7.4)."""
    lm = lm_of(server, api_base="http://user:hunter22@127.0.0.1:1/v1")
    with pytest.raises(LMConfigurationError, match="extra_headers") as raised:
        lm("hi")
    assert "hunter22" not in f"{raised.value} {lm!r}"
    with pytest.raises(LMConfigurationError) as raised:
        lm_of(server, api_base="ftp://user:hunter22@host/v1")
    assert "hunter22" not in str(raised.value)


def test_endpoint_with_a_query_keeps_it_behind_the_path(server: FakeServer) -> None:
    """Some gateways want their version there."""
    lm_of(server, api_base=f"{server.base_url}?api-version=1")("hi")
    assert server.requests[0].path.split("?")[0] == "/v1/chat/completions"


@pytest.mark.parametrize(
    "options", [{"tpm": 100_000}, {"engine": "litellm"}], ids=["tpm", "litellm"]
)
def test_message_without_content_is_a_message(options: dict[str, Any], server: FakeServer) -> None:
    """An assistant that only called tools has none."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]
    lm_of(server, **options)(messages=chat)
    assert len(server.requests) == 1


def test_key_of_a_single_call_has_limits_of_its_own(server: FakeServer) -> None:
    """What a provider asks of one tenant is not the other's business (B 4.3)."""
    lm = lm_of(server)
    server.script(Reply(status=429, headers={"retry-after": "60"}))
    with pytest.raises(LMError):
        lm("hi", api_key="sk-of-tenant-a")
    assert lm("hi", api_key="sk-of-tenant-b", deadline_s=5) == ["echo: hi"]
    assert lm("hi", deadline_s=5) == ["echo: hi"]


def test_one_limit_holds_whatever_queue_its_callers_allow(server: FakeServer) -> None:
    """Two LMs of one endpoint and key must not have two places each (B 4.5)."""
    one = lm_of(server, max_concurrency=2)
    other = one.copy(max_queue=100)
    with ThreadPoolExecutor(12) as pool:
        for future in [pool.submit(lm, "hi") for lm in (one, other) * 6]:
            assert future.result(20) == ["echo: hi"]
    assert server.max_in_flight <= 2


def test_impatient_callers_do_not_slow_the_others(server: FakeServer) -> None:
    """A timeout that is shorter than an answer takes says nothing of the endpoint (B 4.12)."""
    server.script(*[Reply(delay_s=0.15)] * 60)
    patient = lm_of(server)
    patient("to know what is usual")
    hasty = patient.copy(timeout=0.02)
    for _ in range(25):
        with pytest.raises(LMTimeoutError):
            hasty("hi")
    gate = next(policy.gate for policy in patient.middleware if hasattr(policy, "gate"))
    assert (gate.control.down_since, gate.control.limit >= 4) == (None, True)
    server.wait_until_idle()
    while server.pending_replies:
        patient("the rest")


# --- Places that nobody comes for -----------------------------------------------------------------


def closed() -> None:
    raise RuntimeError("Event loop is closed")


def test_place_left_to_thousands_of_closed_loops_is_not_lost() -> None:
    """Passing it on must not take a stack frame for each (B 4.5)."""
    gate = Places(1)
    first = gate.ask(0)
    for _ in range(3000):
        gate.ask(0).wake = closed
    gate.leave(first, 0)
    assert gate.waiting == 0
    assert gate.ask(0).granted


def test_turn_left_to_thousands_of_closed_loops_is_not_lost() -> None:
    """Likewise for requests in a minute (B 4.5)."""
    line = Line(1, None)
    first = line.ask(1, 0.0, None)
    for _ in range(3000):
        line.ask(1, 0.0, None).wake = closed
    line.leave(first, 0.0)
    assert line.waiting == 0
    assert line.ask(1, 0.0, None).granted


def test_stream_that_is_dropped_gives_its_place_back(server: FakeServer) -> None:
    """`break` without a `with` is the commonest way to leave a stream (B 4.5)."""
    server.script(Reply(chunks=["a"] * 50, chunk_delay_s=0.05))
    lm = lm_of(server, max_concurrency=1)
    for _ in lm.stream("hi"):
        break
    gc.collect()
    assert lm("next", deadline_s=10) == ["echo: next"]


def test_history_that_a_model_keeps_as_a_list_is_filled() -> None:
    """Models written for DSPy set `self.history = []`."""
    lm = FakeLM(["hi"])
    lm.history = []  # type: ignore[assignment]
    assert lm("hello") == ["hi"]
    assert [entry.outputs for entry in lm.history] == [("hi",)]
