"""Tool calls that models make in their own way, over real HTTP; the same in text.

Not here: tools themselves (`test_tools.py`), agents (`test_react.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import dspylite
from dspylite import (
    LM,
    AdapterParseError,
    ChatAdapter,
    History,
    InputField,
    JSONAdapter,
    OutputField,
    Predict,
    Signature,
    Tool,
    ToolCallResults,
    ToolCalls,
    TruncatedError,
)
from dspylite.abc import Adapter
from dspylite.testing import FakeServer, Reply


def search(query: str, limit: int = 3) -> str:
    """Search the web."""
    return f"{limit} pages about {query}"


def now() -> str:
    """Tell the time."""
    return "noon"


class Act(Signature):
    """Answer, with tools."""

    question: str = InputField()
    history: History = InputField(default=None)
    tools: list[Tool] = InputField()
    thought: str = OutputField()
    calls: ToolCalls = OutputField()


TOOLS = [Tool(search), Tool(now)]
SEARCH = {"name": "search", "arguments": {"query": "cats"}, "id": "c1"}
NOW = {"name": "now", "arguments": {}, "id": "c2"}


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def ask(
    server: FakeServer,
    *replies: Reply,
    adapter: Adapter | None = None,
    can: frozenset[str] = frozenset({"function_calling"}),
    **inputs: Any,
) -> Any:
    server.script(*replies)
    lm = LM("openai/m", api_base=server.base_url, api_key="k", capabilities=can, num_retries=0)
    native = ChatAdapter(use_native_function_calling=True, use_json_adapter_fallback=False)
    with dspylite.context(lm=lm, adapter=native if adapter is None else adapter):
        return Predict(Act)(**{"question": "q?", "tools": TOOLS, **inputs})


def sent(server: FakeServer) -> Any:
    (request,) = server.requests
    return request.json


@pytest.mark.parametrize(
    "adapter", [ChatAdapter(use_native_function_calling=True), JSONAdapter()], ids=["chat", "json"]
)
def test_tools_go_to_the_provider_and_its_calls_come_back(
    server: FakeServer, adapter: Adapter
) -> None:
    """The definitions are sent as such, and stand nowhere in the text."""
    answer = ask(server, Reply(tool_calls=[SEARCH, NOW]), adapter=adapter)
    body = sent(server)
    assert [each["function"]["name"] for each in body["tools"]] == ["search", "now"]
    assert body["tools"][0]["function"]["parameters"]["required"] == ["query"]
    assert "Search the web" not in json.dumps(body["messages"])
    assert "response_format" not in body
    assert [(call.name, call.args) for call in answer.calls.tool_calls] == [
        ("search", {"query": "cats"}),
        ("now", {}),
    ]
    assert all(call.id for call in answer.calls.tool_calls)
    assert answer.thought is None
    assert [call.execute(TOOLS) for call in answer.calls.tool_calls] == [
        "3 pages about cats",
        "noon",
    ]


def test_text_beside_the_calls_is_read_too(server: FakeServer) -> None:
    """A model that explains its calls is not cut short."""
    text = "[[ ## thought ## ]]\nI look it up.\n\n[[ ## completed ## ]]"
    answer = ask(server, Reply(text=text, tool_calls=[SEARCH]))
    assert (answer.thought, len(answer.calls.tool_calls)) == ("I look it up.", 1)


def test_an_answer_without_calls_is_read_as_text(server: FakeServer) -> None:
    """A model need not call anything."""
    text = "[[ ## thought ## ]]\nNothing to do.\n\n[[ ## completed ## ]]"
    answer = ask(server, Reply(text=text))
    assert (answer.thought, answer.calls) == ("Nothing to do.", None)


@pytest.mark.parametrize("arguments", ["[1, 2]", "3", '"text"', '{"query": "ca', "{'a': }"])
def test_arguments_that_are_no_object_are_an_error(server: FakeServer, arguments: str) -> None:
    """What is cut or of another shape is never made up for (B 7.9)."""
    broken = {"type": "function", "id": "c", "function": {"name": "search", "arguments": arguments}}
    with pytest.raises(AdapterParseError, match="tool call cannot be read"):
        ask(server, Reply(tool_calls=[broken]))


def test_calls_cut_at_the_length_limit_say_so(server: FakeServer) -> None:
    """The remedy is another one than for nonsense (B 7.9)."""
    cut = {
        "type": "function",
        "id": "c",
        "function": {"name": "search", "arguments": '{"query": "c'},
    }
    with pytest.raises(TruncatedError, match="max_tokens"):
        ask(server, Reply(tool_calls=[cut], finish_reason="length"))


def test_a_model_is_told_why_its_call_cannot_be_read(server: FakeServer) -> None:
    """`parse_retries` holds for calls as for text."""
    broken = {"type": "function", "id": "c", "function": {"name": "search", "arguments": "[]"}}
    with dspylite.context(parse_retries=1):
        answer = ask(server, Reply(tool_calls=[broken]), Reply(tool_calls=[SEARCH]))
    assert answer.calls.tool_calls[0].args == {"query": "cats"}
    last = server.requests[-1].json["messages"][-1]["content"]
    assert "tool call cannot be read" in last


@pytest.mark.parametrize("parallel", [True, False, None])
def test_whether_several_calls_at_once_are_allowed_is_said(
    server: FakeServer, parallel: bool | None
) -> None:
    """Some tools must not run side by side; None leaves it to the provider."""
    adapter = ChatAdapter(use_native_function_calling=True, parallel_tool_calls=parallel)
    ask(server, Reply(tool_calls=[SEARCH]), adapter=adapter)
    assert sent(server).get("parallel_tool_calls") == parallel


@pytest.mark.parametrize("by_adapter", [True, False])
def test_a_model_without_the_feature_gets_the_tools_in_text(
    server: FakeServer, by_adapter: bool
) -> None:
    """No parameter is sent that it would refuse, `tool_choice` included."""
    calls = {"tool_calls": [{"name": "search", "args": {"query": "cats"}}]}
    text = (
        f"[[ ## thought ## ]]\nx\n\n[[ ## calls ## ]]\n{json.dumps(calls)}\n\n[[ ## completed ## ]]"
    )
    answer = ask(
        server,
        Reply(text=text),
        adapter=ChatAdapter(use_native_function_calling=not by_adapter),
        can=frozenset({"function_calling"} if by_adapter else ()),
        config={"tool_choice": "required", "parallel_tool_calls": True},
    )
    body = sent(server)
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(body)
    assert "Search the web." in body["messages"][-1]["content"]
    assert answer.calls.tool_calls[0].execute(TOOLS) == "3 pages about cats"


def test_functions_among_the_tools_are_told_in_text_as_tools_are() -> None:
    """Their addresses in memory would tell a model nothing, and end every cached answer."""
    told: list[Any] = []
    for tools in ([search, now], [Tool(search), Tool(now)]):
        adapter = ChatAdapter()
        messages = adapter.format(Act, [], {"question": "q?", "tools": tools})
        told.append(messages[-1]["content"])
    assert told[0] == told[1]
    assert "Search the web." in told[0]


def conversation() -> History:
    calls = ToolCalls.from_dict_list([SEARCH, NOW])
    results = ToolCallResults.from_tool_calls_and_values(calls, ["[[ ## answer ## ]]", {"h": 12}])
    done = ToolCalls(tool_calls=calls.tool_calls, tool_call_results=results)
    return History(messages=[{"question": "before?", "thought": "I look.", "calls": done}])


def test_a_conversation_with_calls_goes_out_as_messages_of_tools(server: FakeServer) -> None:
    """Providers demand that each call is followed by its result, under its id."""
    ask(server, Reply(tool_calls=[NOW]), history=conversation())
    messages = sent(server)["messages"]
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "user"]
    assert "I look." in messages[2]["content"]
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["c1", "c2"]
    assert [message["tool_call_id"] for message in messages[3:5]] == ["c1", "c2"]
    assert messages[4]["content"] == '{"h": 12}'


def test_pictures_of_tools_go_out_behind_the_messages_of_tools(server: FakeServer) -> None:
    """Many providers take nothing but text in a message of a tool."""
    calls = ToolCalls.from_dict_list([SEARCH, NOW])
    picture = dspylite.Image(url="https://e.org/a.png")
    results = ToolCallResults.from_tool_calls_and_values(calls, [[picture], "noon"])
    done = ToolCalls(tool_calls=calls.tool_calls, tool_call_results=results)
    turn = {"question": "before?", "thought": "I look.", "calls": done}
    ask(server, Reply(tool_calls=[NOW]), history=History(messages=[turn]))
    messages = sent(server)["messages"]
    assert [m["role"] for m in messages[2:]] == ["assistant", "tool", "tool", "user", "user"]
    assert [m["content"] for m in messages[3:5]] == ["(in the next message)", "noon"]
    parts = messages[5]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert "c1" in parts[2]["text"]
    assert "c2" not in str(parts)


@pytest.mark.parametrize("by_adapter", [True, False])
def test_a_model_that_writes_its_calls_is_shown_them_as_text(
    server: FakeServer, by_adapter: bool
) -> None:
    """A provider without the feature refuses the role of a tool; results stay data (B 7.9)."""
    text = (
        '[[ ## thought ## ]]\nx\n\n[[ ## calls ## ]]\n{"tool_calls": []}\n\n[[ ## completed ## ]]'
    )
    ask(
        server,
        Reply(text=text),
        adapter=ChatAdapter(use_native_function_calling=not by_adapter),
        can=frozenset({"function_calling"} if by_adapter else ()),
        history=conversation(),
    )
    messages = sent(server)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "user"]
    assert '"cats"' in messages[2]["content"]
    assert "[[ ## tool_call_results ## ]]" in messages[3]["content"]
    assert "\n[[ ## answer ## ]]" not in messages[3]["content"]


def test_a_history_survives_json(server: FakeServer) -> None:
    """It is kept in a database between two requests of a web service."""
    kept = History.model_validate(json.loads(conversation().model_dump_json()))
    ask(server, Reply(tool_calls=[NOW]), history=kept)
    messages = sent(server)["messages"]
    assert [m["role"] for m in messages[2:5]] == ["assistant", "tool", "tool"]
