"""`model_type="text"` and `"responses"`: what litellm asks for us, and how it is read."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import dspylite as dspy
from dspylite.errors import LMConfigurationError, LMServerError, MissingExtraError
from dspylite.models import litellm as litellm_calls
from dspylite.models.answers import read_responses_answer
from dspylite.testing import FakeServer

KEY = "sk-key-of-this-test-0123456789"
MESSAGE = {
    "type": "message",
    "id": "msg_1",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Paris", "annotations": []}],
}


def response(*output: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": "completed",
        "model": "m",
        "output": list(output),
        "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "temperature": 1,
        "top_p": 1,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        **changes,
    }


class _Handler(BaseHTTPRequestHandler):
    seen: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:  # the standard library's name
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append((self.path, body))
        said = json.dumps(response(MESSAGE)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def responses_server() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A server of `/responses`, and what it has seen."""
    seen: list[tuple[str, dict[str, Any]]] = []
    handler = type("Handler", (_Handler,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()
        thread.join(10)


@pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="litellm needs it for this")
def test_responses_model_is_asked_by_its_own_protocol(
    responses_server: tuple[str, list[tuple[str, dict[str, Any]]]],
) -> None:
    """Newer models answer there first, and count tokens under other names."""
    base, seen = responses_server
    lm = dspy.LM("openai/m", model_type="responses", api_base=base, api_key=KEY, max_tokens=99)
    with dspy.track_usage() as tracker:
        assert lm("Capital of France?") == ["Paris"]
    ((path, body),) = seen
    assert path == "/v1/responses"
    assert body["max_output_tokens"] == 99
    assert body["input"] == [{"role": "user", "content": "Capital of France?"}]
    assert (tracker.total.prompt_tokens, tracker.total.completion_tokens) == (3, 2)


def test_missing_package_is_named_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """litellm itself only says that some module is missing."""
    monkeypatch.setattr(litellm_calls, "_has_mcp", lambda: False)
    lm = dspy.LM("openai/m", model_type="responses", api_base="http://127.0.0.1:1", api_key=KEY)
    with pytest.raises(MissingExtraError, match=r"dspylite\[responses\]"):
        lm("hi")


def test_text_model_gets_one_prompt() -> None:
    """Models without chat complete a text."""
    with FakeServer() as server:
        lm = dspy.LM("openai/m", model_type="text", api_base=server.base_url, api_key=KEY)
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert lm(messages=chat) == ["echo: Be brief.\n\nHi"]
        (request,) = server.requests
        assert request.path == "/v1/completions"


@pytest.mark.parametrize("model_type", ["text", "responses"])
def test_only_chat_can_be_streamed(model_type: Any) -> None:
    """It is said before anything is sent."""
    lm = dspy.LM("openai/m", model_type=model_type, api_base="http://127.0.0.1:1", api_key=KEY)
    with pytest.raises(LMConfigurationError, match="only chat"):
        lm.stream("hi")


REASONING = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


def test_reasoning_calls_and_cuts_are_read() -> None:
    """What is not text is told apart, as in chat."""
    answer = read_responses_answer(response(REASONING, MESSAGE, CALL), model="m")
    (output,) = answer.outputs
    assert (output.text, output.reasoning, output.finish_reason) == ("Paris", "hm", "tool_calls")
    assert output.tool_calls[0]["function"] == {"name": "f", "arguments": "{}"}
    cut = response(MESSAGE, incomplete_details={"reason": "max_output_tokens"})
    assert read_responses_answer(cut, model="m").outputs[0].finish_reason == "length"


def test_response_without_output_is_a_failure() -> None:
    """An empty success would be taken for an empty answer."""
    with pytest.raises(LMServerError, match="no output"):
        read_responses_answer(response(), model="m")
