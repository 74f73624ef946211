"""Tools of MCP servers, real ones in processes of their own; those of LangChain; `LoopHome`.

Not here: `Tool` itself (`test_tools.py`).
"""

from __future__ import annotations

import copy
import functools
import pickle
import queue
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pydantic
import pytest
import trio
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

import dspylite
from dspylite import (
    DeadlineExceededError,
    FlowError,
    Module,
    ReAct,
    Tool,
    ToolError,
    asyncify,
    context,
)
from dspylite.runtime.clock import Deadline
from dspylite.runtime.loops import poster
from dspylite.testing import FakeLM

SERVER = textwrap.dedent(
    """
    import asyncio, logging, os, socket, sys
    import uvicorn
    from mcp.server.mcpserver import MCPServer
    from mcp.types import ImageContent, TextContent
    from pydantic import BaseModel

    logging.disable()
    server = MCPServer("test")
    inside = asyncio.Event()

    class Place(BaseModel):
        name: str
        tags: list[str] = []

    @server.tool()
    def add(x: int, y: int = 1) -> int:
        "Add two numbers."
        return x + y

    @server.tool()
    def describe(place: Place, others: list[Place] | None = None) -> str:
        return f"{place.name} {place.tags} {len(others or [])}"

    @server.tool()
    def place() -> Place:
        return Place(name="Basel", tags=["a"])

    @server.tool()
    def mixed() -> list[TextContent | ImageContent]:
        image = ImageContent(type="image", data="AAAA", mime_type="image/png")
        return [TextContent(type="text", text="one"), image, TextContent(type="text", text="two")]

    @server.tool()
    def fail() -> str:
        raise ValueError("no such thing")

    @server.tool()
    async def enter() -> str:
        await inside.wait()
        return "entered"

    @server.tool()
    async def open() -> str:
        inside.set()
        return "opened"

    @server.tool()
    async def hang() -> str:
        await asyncio.sleep(3600)

    @server.tool()
    def die() -> str:
        os._exit(3)

    if "http" not in sys.argv:
        server.run("stdio")
    else:
        listening = socket.create_server(("127.0.0.1", 0))
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(server.streamable_http_app(), log_config=None)
        uvicorn.Server(config).run(sockets=[listening])
    """
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(SERVER, "utf-8")
    return path


@asynccontextmanager
async def session_of(script: Path) -> AsyncIterator[ClientSession]:
    parameters = StdioServerParameters(command=sys.executable, args=[str(script)])
    async with stdio_client(parameters) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        yield session


async def tools_of(session: Any, **options: Any) -> dict[str, Tool]:
    listed = (await session.list_tools()).tools
    return {tool.name: Tool.from_mcp_tool(session, tool, **options) for tool in listed}


# --- what a server says and gives ----------------------------------------------------------------


@pytest.mark.anyio
async def test_tools_of_a_server_say_what_they_take_and_give(script: Path) -> None:
    """Arguments are checked here, before a round trip; results come as text."""
    async with session_of(script) as session:
        tools = await tools_of(session)
        assert (tools["add"].desc, tools["add"].required) == ("Add two numbers.", ("x",))
        assert tools["add"].args["y"]["default"] == 1
        assert "$ref" not in str(tools["describe"].args)
        assert await tools["add"].acall(x=2, y="3") == "5"
        place = {"name": "Basel", "tags": ["x"]}
        given = await tools["describe"].acall(place=place, others=[place, place])
        assert given == "Basel ['x'] 2"
        with pytest.raises(ToolError, match="no argument `z`"):
            await tools["add"].acall(x=1, z=1)
        with pytest.raises(ToolError, match="needs `x`"):
            await tools["add"].acall()
        with pytest.raises(ToolError, match="`fail` failed"):
            await tools["fail"].acall()


@pytest.mark.anyio
async def test_structured_results_come_as_values_where_they_are_asked_for(script: Path) -> None:
    """A program that goes on with the result need not parse text."""
    async with session_of(script) as session:
        tools = await tools_of(session, result_mode="structured")
        assert await tools["place"].acall() == {"name": "Basel", "tags": ["a"]}
        assert (await tools["add"].acall(x=1)) == {"result": 2}


@pytest.mark.anyio
async def test_parts_that_are_no_text_are_not_lost(script: Path) -> None:
    """They stand where they came, between the texts."""
    async with session_of(script) as session:
        first, image, last = await (await tools_of(session))["mixed"].acall()
    assert (first, image.type, image.data, last) == ("one", "image", "AAAA", "two")


@pytest.mark.anyio
async def test_calls_of_one_session_run_at_the_same_time(script: Path) -> None:
    """The first ends only after the second."""
    gave: dict[str, Any] = {}
    with anyio.fail_after(20):
        async with session_of(script) as session:
            tools = await tools_of(session)

            async def call(name: str) -> None:
                gave[name] = await tools[name].acall()

            async with anyio.create_task_group() as group:
                group.start_soon(call, "enter")
                await anyio.wait_all_tasks_blocked()
                group.start_soon(call, "open")
    assert gave == {"enter": "entered", "open": "opened"}


@pytest.mark.anyio
async def test_a_server_that_dies_or_hangs_is_an_error_in_time(script: Path) -> None:
    """Bounded, and named; later calls of the same session fail at once (B 4.4)."""
    with anyio.fail_after(30):
        async with session_of(script) as session:
            tools = await tools_of(session)
            with Deadline(0.3), pytest.raises(DeadlineExceededError):
                await tools["hang"].acall()
            for name, args in (("die", {}), ("add", {"x": 1})):
                with pytest.raises(Exception, match=r"(?i)clos"):
                    await tools[name].acall(**args)


@pytest.mark.anyio
async def test_an_agent_works_with_the_tools_of_a_server(script: Path) -> None:
    """Its failures are observed like any other tool's, the server's death included."""

    def step(name: str, **args: Any) -> dict[str, Any]:
        return {"next_thought": "so", "next_tool_name": name, "next_tool_args": args}

    steps = [step("add", x=1, y=2), step("fail"), step("die"), step("add", x=1), step("finish")]
    lm = FakeLM([*steps, {"reasoning": "so", "answer": "3"}])
    with anyio.fail_after(30):
        async with session_of(script) as session:
            agent = ReAct("question -> answer", (await tools_of(session)).values())
            with context(lm=lm):
                result = await copy.deepcopy(agent).acall(question="q?")
    seen = [result.trajectory[f"observation_{n}"] for n in range(5)]
    assert (seen[0], result.answer) == ("3", "3")
    assert seen[1].startswith("Execution error in fail: ToolError: The server reports")
    assert seen[2].startswith("Execution error in die: ")
    assert seen[3].startswith("Execution error in add: ")


# --- over HTTP -----------------------------------------------------------------------------------


# On trio the SDK's client leaves open generators of its own behind, which warn.
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")


@contextmanager
def http_server(script: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the server in a process of its own, listening at a port that was free."""
    command = [sys.executable, str(script), "http"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/mcp", process
        finally:
            process.kill()


@asynccontextmanager
async def http_session_of(url: str) -> AsyncIterator[ClientSession]:
    async with (
        streamable_http_client(url) as (read, write),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        yield session


@on_asyncio
async def test_tools_of_a_server_over_http_work_as_those_of_a_process(script: Path) -> None:
    """The transport is the session's affair: results, failures and deadlines are the same."""
    with anyio.fail_after(40), http_server(script) as (url, _):
        async with http_session_of(url) as session:
            tools = await tools_of(session)
            assert await tools["add"].acall(x=2, y="3") == "5"
            with pytest.raises(ToolError, match="`fail` failed"):
                await tools["fail"].acall()
            with Deadline(0.3), pytest.raises(DeadlineExceededError):
                await tools["hang"].acall()
            call = functools.partial(tools["add"], x=3)
            assert await anyio.to_thread.run_sync(call) == "4"  # after the hanging one was left
            structured = await tools_of(session, result_mode="structured")
            assert await structured["place"].acall() == {"name": "Basel", "tags": ["a"]}


@on_asyncio
async def test_an_agent_of_many_tasks_works_over_one_http_session(script: Path) -> None:
    """Each task sees the results of its own calls."""

    async def run(agent: ReAct[..., Any], number: int) -> None:
        wish = {"next_thought": "", "next_tool_name": "add", "next_tool_args": {"x": number}}
        finish = {"next_thought": "", "next_tool_name": "finish", "next_tool_args": {}}
        with context(lm=FakeLM([wish, finish, {"reasoning": "so", "answer": "so"}])):
            result = await agent.acall(question="q?")
        assert result.trajectory["observation_0"] == str(number + 1)

    with anyio.fail_after(40), http_server(script) as (url, _):
        async with http_session_of(url) as session:
            agent = ReAct("question -> answer", (await tools_of(session)).values())
            async with anyio.create_task_group() as group:
                for number in range(8):
                    group.start_soon(run, agent, number)


@on_asyncio
async def test_a_server_over_http_that_has_died_is_an_error_in_time(script: Path) -> None:
    """The SDK ends the whole session then, and the calls in it, with the refused connection."""

    async def use(url: str, process: subprocess.Popen[str]) -> None:
        async with http_session_of(url) as session:
            tools = await tools_of(session)
            assert await tools["add"].acall(x=1) == "2"
            process.kill()
            await anyio.to_thread.run_sync(process.wait)
            await tools["add"].acall(x=1)

    with anyio.fail_after(40), http_server(script) as (url, process):
        with pytest.raises(BaseExceptionGroup) as caught:
            await use(url, process)
        assert "connection attempts failed" in "".join(traceback.format_exception(caught.value))


# --- from other threads and loops ----------------------------------------------------------------


@contextmanager
def living_elsewhere(script: Path, backend: str) -> Iterator[dict[str, Tool]]:
    """Keep a session in a loop of another thread, as services do."""
    made: queue.Queue[Any] = queue.Queue()

    async def live() -> None:
        leave = anyio.Event()
        post = poster()
        async with session_of(script) as session:
            made.put((await tools_of(session), leave, post))
            await leave.wait()

    thread = threading.Thread(target=anyio.run, args=(live,), kwargs={"backend": backend})
    thread.start()
    tools, leave, post = made.get(timeout=20)
    try:
        yield tools
    finally:
        post(leave.set)
        thread.join(20)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_sync_program_calls_the_tools_from_any_thread(script: Path, backend: str) -> None:
    """Each call finds its way to the loop that the session lives in."""
    with living_elsewhere(script, backend) as tools:
        assert tools["add"](x=1) == "2"
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda n: tools["add"](x=n), range(16))) == [
                str(n + 1) for n in range(16)
            ]
        with Deadline(0.3), pytest.raises(DeadlineExceededError):
            tools["hang"]()
        assert tools["add"](x=1) == "2"
    with pytest.raises(FlowError, match="has ended"):
        tools["add"](x=1)


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_another_event_loop_awaits_the_tools(script: Path, backend: str) -> None:
    """Awaited directly, the session's own events would never wake this loop."""
    with anyio.fail_after(30), living_elsewhere(script, backend) as tools:
        assert await tools["add"].acall(x=1) == "2"
        with anyio.move_on_after(0.3) as scope:
            await tools["hang"].acall()
        assert scope.cancelled_caught
        assert await tools["add"].acall(x=2) == "3"


@pytest.mark.anyio
async def test_a_call_that_would_wait_for_itself_says_so(script: Path) -> None:
    """A sync call stops the loop that must answer it; from a worker thread it works (B 3.5)."""

    class Program(Module):
        def forward(self) -> Any:
            return tools["add"](x=1)

    with anyio.fail_after(30):
        async with session_of(script) as session:
            tools = await tools_of(session)
            with pytest.raises(FlowError, match="acall"):
                tools["add"](x=1)
            with pytest.raises(FlowError, match="acall"):
                Program()()
            with Deadline(20), pytest.raises(FlowError, match="acall"):
                tools["add"](x=1)
            assert await Program().acall() == "2"
            assert await asyncify(tools["add"])(x=1) == "2"
            agent = ReAct("question -> answer", [tools["add"]])
            wish = {"next_thought": "", "next_tool_name": "add", "next_tool_args": {"x": 1}}
            with context(lm=FakeLM([wish])), pytest.raises(FlowError, match="acall"):
                agent(question="q?")


class FakeSession:
    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        await anyio.lowlevel.checkpoint()
        part = SimpleNamespace(type="text", text=f"{name} {arguments}")
        return SimpleNamespace(content=[part], isError=name == "bad", structuredContent={"a": 1})


def test_a_tool_made_outside_of_any_loop_belongs_to_the_first_that_awaits_it() -> None:
    """Before that nobody knows where the session lives, and guessing might hang for ever."""
    told = SimpleNamespace(name="t", inputSchema={"properties": {"x": {"type": "integer"}}})
    tool = Tool.from_mcp_tool(FakeSession(), told)
    with pytest.raises(FlowError, match="inside of the loop"):
        tool(x=1)

    async def use() -> None:
        assert await tool.acall(x=1) == "t {'x': 1}"

    anyio.run(use)
    with pytest.raises(FlowError, match="has ended"):
        anyio.run(use)


@pytest.mark.anyio
async def test_the_first_version_of_the_sdk_is_understood() -> None:
    """It spells attributes in camel case."""
    schema = {
        "properties": {"p": {"$ref": "#/$defs/P"}, "x": True},
        "required": ["p"],
        "$defs": {"P": {"type": "object", "title": "P"}},
    }
    told = SimpleNamespace(name="t", description=None, inputSchema=schema)
    tool = Tool.from_mcp_tool(FakeSession(), told, result_mode="structured")
    assert (tool.args["p"]["title"], tool.required, tool.desc) == ("P", ("p",), "")
    assert await tool.acall(p={}) == {"a": 1}
    bad = Tool.from_mcp_tool(FakeSession(), SimpleNamespace(name="bad", inputSchema={}))
    with pytest.raises(ToolError, match=r"`bad` failed: bad \{\}"):
        await bad.acall()
    with pytest.raises(ToolError, match="`result_mode`"):
        Tool.from_mcp_tool(FakeSession(), told, result_mode="json")  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="`call_tool`"):
        Tool.from_mcp_tool("session", told)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(tool)


@pytest.mark.anyio
async def test_a_server_may_name_its_arguments_as_it_likes() -> None:
    """`self` is an argument as good as any other, and a broken schema is no crash."""
    names = {"self": 1, "arguments": 2, "func": 3, "io": 4}
    schema = {"properties": {name: {} for name in names}, "$defs": 5, "definitions": None}
    told = SimpleNamespace(name="t", description=None, inputSchema=schema)
    assert await Tool.from_mcp_tool(FakeSession(), told).acall(**names) == f"t {names}"


@pytest.mark.parametrize("runner", [anyio.run, functools.partial(anyio.run, backend="trio")])
def test_a_loop_that_ends_in_the_middle_of_a_call_is_an_error(runner: Callable[..., Any]) -> None:
    """The thread that waits must not wait for ever."""
    called = threading.Event()

    class Stuck:
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
            called.set()
            await anyio.sleep_forever()

    made: queue.Queue[Tool] = queue.Queue()

    async def live() -> None:
        made.put(Tool.from_mcp_tool(Stuck(), SimpleNamespace(name="t", inputSchema={})))
        await anyio.to_thread.run_sync(called.wait, 10)

    thread = threading.Thread(target=runner, args=(live,))
    thread.start()
    with pytest.raises(FlowError, match="has ended"):
        made.get(timeout=10)()
    thread.join(10)


def test_context_travels_to_the_loop_of_the_session() -> None:
    """A tool that asks a model asks that of the caller (B 1.1)."""
    seen: list[Any] = []

    class Asking:
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
            seen.append(dspylite.settings.lm)
            return SimpleNamespace(content=[])

    made: queue.Queue[Any] = queue.Queue()

    async def live() -> None:
        leave = trio.Event()
        tool = Tool.from_mcp_tool(Asking(), SimpleNamespace(name="t", inputSchema={}))
        made.put((tool, leave, trio.lowlevel.current_trio_token()))
        await leave.wait()

    thread = threading.Thread(target=trio.run, args=(live,))
    thread.start()
    tool, leave, token = made.get(timeout=10)
    lm = FakeLM()
    with context(lm=lm):
        assert tool() == []
    token.run_sync_soon(leave.set)
    thread.join(10)
    assert seen == [lm]


# --- LangChain -----------------------------------------------------------------------------------


class Query(pydantic.BaseModel):
    text: str = pydantic.Field(description="what to look for")
    limit: int = 3


class FakeLangChainTool:
    """Has the attributes of `langchain_core.tools.BaseTool`."""

    name = "look"
    description = "Look it up."
    args_schema: Any = Query

    def invoke(self, given: dict[str, Any]) -> str:
        return f"sync {given}"

    async def ainvoke(self, given: dict[str, Any]) -> str:
        await anyio.lowlevel.checkpoint()
        return f"async {given}"


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_tool_of_langchain_is_called_in_the_form_that_it_has(*, is_async: bool) -> None:
    """Its default async form takes asyncio's own threads, and asyncio (B 3.3)."""
    foreign: Any = FakeLangChainTool()
    foreign.coroutine = foreign.ainvoke if is_async else None
    tool = Tool.from_langchain(foreign)
    assert (tool.name, tool.desc, tool.required) == ("look", "Look it up.", ("text",))
    assert tool.args["text"]["description"] == "what to look for"
    kind = "async" if is_async else "sync"
    assert await tool.acall(text="x", limit="2") == f"{kind} {{'text': 'x', 'limit': 2}}"
    assert tool(text="x") == f"{kind} {{'text': 'x'}}"


def test_a_tool_of_langchain_may_have_an_argument_of_any_name() -> None:
    """`invoke` is what we call by, and nothing to its author."""
    foreign: Any = FakeLangChainTool()
    foreign.args_schema = {"properties": {"invoke": {}, "self": {}}}
    assert Tool.from_langchain(foreign)(invoke=1, self=2) == "sync {'invoke': 1, 'self': 2}"


def test_schemas_of_langchain_may_be_json_or_absent() -> None:
    """Tools that LangChain has made of others have plain dicts."""
    foreign: Any = FakeLangChainTool()
    foreign.args_schema = Query.model_json_schema()
    assert Tool.from_langchain(foreign)(text="x") == "sync {'text': 'x'}"
    foreign.args_schema, foreign.args = None, {"text": {"type": "string"}}
    assert Tool.from_langchain(foreign).args == {"text": {"type": "string"}}
    with pytest.raises(ToolError, match="`invoke`"):
        Tool.from_langchain(Query)  # type: ignore[arg-type]
