"""Both engines, case by case: the same answers, errors and usage, and the same seen by the server.

Where they differ, the case says why; such a difference that is gone fails its case too. Not here:
what goes wrong on the way (`test_faults.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dspylite import LM, Embedder, track_usage
from dspylite.errors import LMError
from dspylite.models.endpoints import forget_endpoints
from dspylite.testing import FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALLS = [
    {"name": "look", "arguments": {"at": "sky"}},
    {"name": "look", "arguments": {"at": "sea"}},
]
VARIABLES = [
    f"{name}_{end}"
    for name in ("OPENAI", "HOSTED_VLLM", "LM_STUDIO", "LITELLM_PROXY")
    for end in ("API_KEY", "API_BASE", "BASE_URL")
]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address."""
    with FakeServer(dimensions=5) as server:
        yield server


awaited = pytest.mark.usefixtures("one_loop")
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"], scope="module")


# --- What is asked, and what is seen of it -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request and its expected outcome; `{base}` stands for the server's address.

    Attributes:
        reply: What the server says; None for its echo.
        kind: Of request: `"chat"`, `"stream"` or `"embed"`.
        model: The model asked.
        lm: Parameters of the LM besides the endpoint and the key.
        call: Parameters of the call.
        env: Environment variables.
        own: Whether the LM is given the endpoint and the key.
        wants: Some of what has to be seen, by name; as in `streamed`, `told`, `arrived`.
        sends: Some of what has to be in the request's body.
        differs: Why the engines differ in something that is seen, by its name.
    """

    reply: Reply | None = None
    kind: str = "chat"
    model: str = "openai/m"
    lm: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    own: bool = True
    wants: Mapping[str, Any] = field(default_factory=dict)
    sends: Mapping[str, Any] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)


def filled(value: Any, base: str) -> Any:
    return value.replace("{base}", base) if isinstance(value, str) else value


def options(case: Case, server: FakeServer, engine: str) -> dict[str, Any]:
    given = {"api_base": server.base_url, "api_key": KEY} if case.own else {}
    own = {name: filled(value, server.base_url) for name, value in case.lm.items()}
    return {"engine": engine, "num_retries": 0, **given, **own}


def question(case: Case) -> dict[str, Any]:
    return dict(case.call) if "messages" in case.call else {"prompt": "hi there", **case.call}


def ask(case: Case, server: FakeServer, engine: str) -> dict[str, Any]:
    """Return what the caller sees."""
    if case.kind == "embed":
        embedder = Embedder(case.model, **options(case, server, engine))
        return {"vectors": [list(row) for row in embedder.embed(case.call["texts"])]}
    lm = LM(case.model, **options(case, server, engine))
    if case.kind == "chat":
        return {"answers": lm(**question(case))}
    with lm.stream(**question(case)) as stream:
        pieces = list(stream)
    return streamed(pieces, stream.response)


async def aask(case: Case, server: FakeServer, engine: str) -> dict[str, Any]:
    """Return what an awaiting caller sees."""
    if case.kind == "embed":
        embedder = Embedder(case.model, **options(case, server, engine))
        return {"vectors": [list(row) for row in await embedder.aembed(case.call["texts"])]}
    lm = LM(case.model, **options(case, server, engine))
    if case.kind == "chat":
        return {"answers": await lm.acall(**question(case))}
    async with await lm.astream(**question(case)) as stream:
        pieces = [piece async for piece in stream]
    return streamed(pieces, stream.response)


def streamed(pieces: Sequence[Any], response: Any) -> dict[str, Any]:
    indices = sorted({piece.index for piece in pieces})
    return {
        "texts": [[p.text for p in pieces if p.index == i and p.text] for i in indices],
        "reasons": [[p.finish_reason for p in pieces if p.index == i][-1] for i in indices],
        "whole": [(o.text, o.finish_reason, o.reasoning) for o in response.outputs],
        "calls": [[dict(call) for call in output.tool_calls] for output in response.outputs],
        "stream usage": counts(response.usage),
        "answered by": response.model,
        "answer id": response.request_id.rpartition("-")[0],
    }


def told(error: LMError, server: FakeServer) -> dict[str, Any]:
    """Return what is seen of a failure."""
    ids = [request.request_id for request in server.requests]
    return {
        "error": type(error).__name__,
        "status": error.status,
        "retry after": error.retry_after_s,
        "provider code": error.provider_code,
        "model": error.model,
        "provider": error.provider,
        "is retryable": error.retryable,
        "has the server's request id": [error.request_id] == ids,
    }


def counts(usage: Any) -> tuple[int, int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.calls


def arrived(server: FakeServer) -> dict[str, Any]:
    """Return what the server saw of its only request."""
    if len(server.requests) != 1:
        return {"requests": len(server.requests)}
    (request,) = server.requests
    return {
        "requests": 1,
        "target": (request.method, request.path, request.query),
        "body": dict(request.json),
        "authorization": request.headers.get("authorization"),
        "headers": {k: v for k, v in request.headers.items() if k.startswith(("x-te", "openai-"))},
    }


def all_seen(server: FakeServer, told_caller: dict[str, Any], usage: Any) -> dict[str, Any]:
    # Through JSON, so that tuples and mappings of either library compare as what they hold.
    return dict(json.loads(json.dumps(told_caller | {"usage": usage} | arrived(server))))


def seen(case: Case, server: FakeServer, engine: str) -> dict[str, Any]:
    begin(case, server)
    with track_usage() as tracker:
        try:
            found = ask(case, server, engine)
        except LMError as error:
            found = told(error, server)
    return all_seen(server, found, counts(tracker.total))


async def awaited_seen(case: Case, server: FakeServer, engine: str) -> dict[str, Any]:
    begin(case, server)
    with track_usage() as tracker:
        try:
            found = await aask(case, server, engine)
        except LMError as error:
            found = told(error, server)
    return all_seen(server, found, counts(tracker.total))


def begin(case: Case, server: FakeServer) -> None:
    forget_endpoints()  # or the second engine would keep the pause that the first was asked for
    server.clear()
    if case.reply is not None:
        server.script(case.reply)


def judge(case: Case, direct: Mapping[str, Any], litellm: Mapping[str, Any]) -> None:
    """Compare what was seen through the two engines with the case and with each other."""
    wanted = json.loads(json.dumps(case.wants))
    for found in (direct, litellm):
        assert wanted == {name: found.get(name) for name in wanted}
        sends = json.loads(json.dumps(case.sends))
        assert sends == {name: found.get("body", {}).get(name) for name in sends}
    differing = {n for n in direct.keys() | litellm.keys() if direct.get(n) != litellm.get(n)}
    assert differing == set(case.differs), {n: (direct.get(n), litellm.get(n)) for n in differing}


# --- The table -----------------------------------------------------------------------------------


def completion(**message: object) -> Reply:
    """Say something that the fake server has no word for."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    details = {"completion_tokens_details": {"reasoning_tokens": 6}}
    usage = {"prompt_tokens": 1, "completion_tokens": 8, "total_tokens": 9, **details}
    return Reply(body=json.dumps(head | {"choices": [choice], "usage": usage}))


def events(*choices: Mapping[str, object], usage: Mapping[str, int]) -> Reply:
    """Stream something that the fake server has no word for."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [head | {"choices": [{"index": 0, **choice}]} for choice in choices]
    chunks.append(head | {"choices": [], "usage": usage})
    data = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return Reply(body=f"{data}data: [DONE]\n\n", headers={"content-type": "text/event-stream"})


def look(number: int, at: str) -> dict[str, object]:
    function = {"name": "look", "arguments": json.dumps({"at": at})}
    return {"id": f"call_{number}", "type": "function", "function": function}


PARAMETERS: dict[str, Any] = {
    "stop": ["END", "."],
    "seed": 3,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {"1": 2},
    "logprobs": True,
    "top_logprobs": 2,
}
PICTURE = [
    {"type": "text", "text": "see"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
]
AFTER_A_TOOL = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [look(0, "sky")]},
    {"role": "tool", "tool_call_id": "call_0", "content": "blue"},
]
FOUND = {"text": "", "tool_calls": [look(0, "sky"), look(1, "sea")]}

ANSWERS = {
    "plain": Case(wants={"answers": ["echo: hi there"], "usage": (2, 3, 5, 1), "requests": 1}),
    "three answers": Case(
        reply=Reply(texts=["a", "b", "c"]),
        call={"n": 3},
        wants={"answers": ["a", "b", "c"], "usage": (2, 3, 5, 1)},
        sends={"n": 3},
    ),
    "parameters of the LM": Case(
        lm={"temperature": 0.5, "max_tokens": 7, "top_p": 0.9},
        sends={"temperature": 0.5, "max_tokens": 7, "top_p": 0.9},
    ),
    "parameters of the call": Case(call=PARAMETERS, sends=PARAMETERS),
    "user": Case(
        call={"user": "u-1"},
        differs={"body": "litellm leaves `user` out for names that are not OpenAI's own"},
    ),
    "limit for a reasoning model": Case(
        model="openai/gpt-5-mini", lm={"max_tokens": 99}, sends={"max_completion_tokens": 99}
    ),
    "effort": Case(
        model="openai/gpt-5-mini",
        lm={"reasoning_effort": "low"},
        sends={"reasoning_effort": "low"},
    ),
    "extra body": Case(
        call={"extra_body": {"top_k": 5, "guided": {"a": 1}}},
        sends={"top_k": 5, "guided": {"a": 1}, "extra_body": None},
    ),
    "parameters of vLLM": Case(
        model="hosted_vllm/m",
        call={"top_k": 5, "min_p": 0.1, "chat_template_kwargs": {"think": False}},
        sends={"top_k": 5, "min_p": 0.1, "chat_template_kwargs": {"think": False}},
    ),
    "extra headers": Case(
        lm={"extra_headers": {"X-Test": "a"}}, wants={"headers": {"x-test": "a"}}
    ),
    "headers": Case(lm={"headers": {"X-Test": "a"}}, wants={"headers": {"x-test": "a"}}),
    "organization": Case(
        lm={"organization": "org-1"}, wants={"headers": {"openai-organization": "org-1"}}
    ),
    "tools": Case(
        reply=Reply(text="", tool_calls=CALLS),
        call={"tools": [TOOL], "tool_choice": "auto"},
        wants={"answers": [FOUND]},
        sends={"tools": [TOOL], "tool_choice": "auto"},
    ),
    "tools and a text": Case(
        reply=Reply(text="so", tool_calls=CALLS),
        call={"tools": [TOOL], "parallel_tool_calls": True},
        wants={"answers": [FOUND | {"text": "so"}]},
    ),
    "after a tool": Case(
        call={"messages": AFTER_A_TOOL},
        wants={"answers": ["echo: q"]},
        differs={"body": "litellm leaves out the content of a message that is null"},
    ),
    "JSON object": Case(
        reply=Reply(text='{"a": 1}'),
        call={"response_format": {"type": "json_object"}},
        wants={"answers": ['{"a": 1}']},
        sends={"response_format": {"type": "json_object"}},
    ),
    "JSON of a schema": Case(
        reply=Reply(text='{"a": 1}'),
        call={"response_format": SCHEMA},
        wants={"answers": ['{"a": 1}']},
        sends={"response_format": SCHEMA},
    ),
    "reasoning": Case(
        reply=completion(content="4", reasoning_content="2+2"),
        wants={
            "answers": [{"text": "4", "reasoning_content": "2+2"}],
            "usage": (1, 8, 9, 1),
        },
    ),
    "reasoning by its newer name": Case(
        reply=completion(content="4", reasoning="2+2"),
        wants={"answers": [{"text": "4", "reasoning_content": "2+2"}]},
    ),
    "thoughts in the text": Case(
        reply=Reply(text="<think>hm</think>4"),
        wants={"answers": [{"text": "4", "reasoning_content": "hm"}]},
    ),
    "no content": Case(reply=completion(content=None), wants={"answers": [""]}),
    "no usage": Case(reply=Reply(usage={}), wants={"usage": (0, 0, 0, 1)}),
    "cut at the limit": Case(reply=Reply(text="a", finish_reason="length")),
    "any text": Case(
        reply=Reply(text="ж😀\u2028\x00"),
        call={"prompt": "żółw 😀 \u2028 \x00"},
        wants={"answers": ["ж😀\u2028\x00"]},
    ),
    "large prompt": Case(reply=Reply(text="ok"), call={"prompt": "x" * 200_000}),
    "picture": Case(
        call={"messages": [{"role": "user", "content": PICTURE}]},
        wants={"answers": ["echo: see"]},
        sends={"messages": [{"role": "user", "content": PICTURE}]},
    ),
}

KEY_OF_ENV = {"OPENAI_API_KEY": "sk-of-the-environment"}
BEARER = "Bearer sk-of-the-environment"
MADE_UP = {"authorization": "litellm makes a key up; a server of one's own may take offence"}

PLACES = {
    "base_url": Case(own=False, lm={"base_url": "{base}", "api_key": KEY}, wants={"requests": 1}),
    "trailing slash": Case(
        lm={"api_base": "{base}/"}, wants={"target": ("POST", "/v1/chat/completions", "")}
    ),
    "key function": Case(lm={"api_key": lambda: KEY}, wants={"authorization": f"Bearer {KEY}"}),
    "key of the environment": Case(
        own=False, lm={"api_base": "{base}"}, env=KEY_OF_ENV, wants={"authorization": BEARER}
    ),
    "given key before the environment's": Case(
        env=KEY_OF_ENV, wants={"authorization": f"Bearer {KEY}"}
    ),
    "OPENAI_BASE_URL": Case(
        own=False,
        env=KEY_OF_ENV | {"OPENAI_BASE_URL": "{base}"},
        wants={"authorization": BEARER, "requests": 1},
    ),
    "OPENAI_API_BASE": Case(
        own=False, env=KEY_OF_ENV | {"OPENAI_API_BASE": "{base}"}, wants={"requests": 1}
    ),
    "both of OpenAI's": Case(
        own=False,
        env=KEY_OF_ENV | {"OPENAI_API_BASE": "http://127.0.0.1:9", "OPENAI_BASE_URL": "{base}"},
        wants={"requests": 1},
    ),
    "hosted_vllm": Case(
        model="hosted_vllm/org/m",
        wants={"authorization": f"Bearer {KEY}"},
        sends={"model": "org/m"},
    ),
    "hosted_vllm by the environment": Case(
        model="hosted_vllm/m",
        own=False,
        env={"HOSTED_VLLM_API_BASE": "{base}", "HOSTED_VLLM_API_KEY": "sk-of-the-environment"},
        wants={"authorization": BEARER},
    ),
    "hosted_vllm without a key": Case(
        model="hosted_vllm/m", own=False, env={"HOSTED_VLLM_API_BASE": "{base}"}, differs=MADE_UP
    ),
    "lm_studio": Case(model="lm_studio/m", sends={"model": "m"}),
    "lm_studio by the environment": Case(
        model="lm_studio/m",
        own=False,
        env={"LM_STUDIO_API_BASE": "{base}", "LM_STUDIO_API_KEY": "sk-of-the-environment"},
        wants={"authorization": BEARER},
    ),
    "lm_studio without a key": Case(
        model="lm_studio/m", own=False, env={"LM_STUDIO_API_BASE": "{base}"}, differs=MADE_UP
    ),
    "litellm_proxy": Case(model="litellm_proxy/anthropic/m", sends={"model": "anthropic/m"}),
    "litellm_proxy by the environment": Case(
        model="litellm_proxy/m",
        own=False,
        env={"LITELLM_PROXY_API_BASE": "{base}", "LITELLM_PROXY_API_KEY": "sk-of-the-environment"},
        wants={"authorization": BEARER},
    ),
    "bare name of OpenAI's": Case(model="gpt-4o-mini", sends={"model": "gpt-4o-mini"}),
    "no key for OpenAI": Case(
        own=False, wants={"error": "LMAuthError", "is retryable": False, "requests": 0}
    ),
    "redirect on the same host": Case(
        reply=Reply(status=307, headers={"location": "/v2/chat/completions"}),
        wants={"answers": ["echo: hi there"], "requests": 2},
    ),
}

AS_BASE64 = {"body": "the direct engine asks for base64, a third of the bytes"}
TEXTS = {"texts": ["a", "b c", "ж"]}
STREAMS = {
    "embeddings": Case(
        kind="embed", call=TEXTS, wants={"usage": (4, 0, 4, 1), "requests": 1}, differs=AS_BASE64
    ),
    "embeddings of a width": Case(
        kind="embed",
        model="hosted_vllm/q",
        lm={"dimensions": 3},
        call=TEXTS,
        sends={"dimensions": 3, "model": "q"},
        differs=AS_BASE64,
    ),
    "embeddings refused": Case(
        kind="embed",
        reply=Reply(status=429, headers={"retry-after": "3"}),
        call=TEXTS,
        wants={"error": "LMRateLimitError", "retry after": 3},
        differs=AS_BASE64,
    ),
    "stream": Case(
        kind="stream",
        reply=Reply(chunks=["a ", "b"]),
        wants={"texts": [["a ", "b"]], "reasons": ["stop"], "usage": (2, 2, 4, 1)},
        sends={"stream": True, "stream_options": {"include_usage": True}},
    ),
    "stream of vLLM": Case(
        kind="stream", model="hosted_vllm/m", reply=Reply(chunks=["a ", "b"]), wants={"requests": 1}
    ),
    "stream of any text": Case(
        kind="stream",
        reply=Reply(chunks=["ж", "😀", "\u2028", "x\r\ny"]),
        wants={"texts": [["ж", "😀", "\u2028", "x\r\ny"]]},
    ),
    "stream of two answers": Case(
        kind="stream",
        reply=Reply(texts=["a b", "c d"]),
        call={"n": 2},
        wants={"texts": [["a ", "b"], ["c ", "d"]], "usage": (2, 4, 6, 1)},
        differs=dict.fromkeys(["reasons", "whole"], "litellm tells why the first one ended"),
    ),
    "stream of tool calls": Case(
        kind="stream",
        reply=Reply(text="", tool_calls=CALLS),
        call={"tools": [TOOL]},
        wants={"calls": [FOUND["tool_calls"]], "reasons": ["tool_calls"]},
    ),
    "stream with reasoning": Case(
        kind="stream",
        reply=events(
            {"delta": {"role": "assistant", "reasoning_content": "2+"}},
            {"delta": {"reasoning_content": "2"}},
            {"delta": {"content": "4"}},
            {"delta": {}, "finish_reason": "stop"},
            usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        ),
        wants={"texts": [["4"]], "whole": [("4", "stop", "2+2")], "usage": (1, 2, 3, 1)},
    ),
    "stream cut at the limit": Case(
        kind="stream",
        reply=Reply(chunks=["a ", "b"], finish_reason="length"),
        wants={"reasons": ["length"]},
    ),
    "stream without usage": Case(
        kind="stream",
        reply=Reply(chunks=["a ", "b"], usage={}),
        differs=dict.fromkeys(["usage", "stream usage"], "litellm counts words where nobody did"),
    ),
    "stream refused": Case(
        kind="stream",
        reply=Reply(status=429, headers={"retry-after": "3"}),
        wants={"error": "LMRateLimitError", "retry after": 3, "requests": 1},
    ),
}

REFUSALS = {
    f"status {status}": Case(
        reply=Reply(status=status, headers=headers, error_code=code),
        wants={"status": status, "has the server's request id": True},
    )
    for status, headers, code in (
        (400, {}, None),
        (401, {}, None),
        (404, {}, None),
        (422, {}, "bad_top_p"),
        (429, {"retry-after-ms": "250"}, None),
        (500, {}, None),
        (503, {"retry-after": "7"}, "overloaded"),
    )
}

TABLE = ANSWERS | PLACES | STREAMS | REFUSALS
each_case = pytest.mark.parametrize("case", list(TABLE.values()), ids=list(TABLE))
FEW = ["plain", "tools", "stream", "embeddings", "status 503"]


@pytest.fixture(autouse=True)
def environment(
    request: pytest.FixtureRequest, running: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set what the case says, and let no key or endpoint of the machine reach a test."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if "case" not in request.fixturenames:
        return
    for name, value in request.getfixturevalue("case").env.items():
        monkeypatch.setenv(name, filled(value, running.base_url))


@each_case
def test_engines_agree(case: Case, server: FakeServer) -> None:
    """`engine="auto"` changes between them by the call, which nobody must notice."""
    judge(case, seen(case, server, "direct"), seen(case, server, "litellm"))


@awaited
@on_asyncio
@each_case
async def test_engines_agree_when_awaited(case: Case, server: FakeServer) -> None:
    """The async forms of both go other ways inside; what comes out is the same."""
    judge(
        case,
        await awaited_seen(case, server, "direct"),
        await awaited_seen(case, server, "litellm"),
    )


@awaited
@on_trio
@pytest.mark.parametrize("case", [TABLE[name] for name in FEW], ids=FEW)
async def test_engines_agree_under_trio(case: Case, server: FakeServer) -> None:
    """Neither library knows trio, so calls go through a worker thread there."""
    judge(
        case,
        await awaited_seen(case, server, "direct"),
        await awaited_seen(case, server, "litellm"),
    )


@pytest.mark.parametrize("case", [TABLE[name] for name in FEW], ids=FEW)
def test_engines_agree_with_the_server_about_usage(case: Case, server: FakeServer) -> None:
    """Each must count what the server counted, or budgets and bills drift apart (B 4.10)."""
    for engine in ("direct", "litellm"):
        found = seen(case, server, engine)
        counted = server.requests[-1].usage
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert found["usage"][:3] == [(counted or {}).get(name, 0) for name in names]


WITHOUT_MCP = """
import sys
sys.modules["mcp"] = None  # as if it were not installed
import dspylite as dspy

tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="none", num_retries=0, engine="litellm")
print(lm("hello", tools=tools))
"""


def test_tools_go_through_litellm_without_its_optional_package() -> None:
    """litellm imports `mcp` wherever there are tools, to look for some of its own gateway."""
    with FakeServer() as own:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_MCP, own.base_url],
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.stdout == "['echo: hello']\n", done.stderr
        assert "_skip_mcp_handler" not in own.requests[0].json
