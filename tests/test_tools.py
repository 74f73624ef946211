"""`Tool`: what a model is told of a function, what reaches the function, and who waits for it.

Not here: calls that models want made (`test_native_tools.py`), agents (`test_react.py`), tools of
other libraries (`test_mcp.py`).
"""

from __future__ import annotations

import copy
import decimal
import enum
import functools
import json
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal

import anyio
import pydantic
import pytest

import dspylite as dspy
from dspylite import (
    BaseCallback,
    CallCancelledError,
    DeadlineExceededError,
    Tool,
    ToolCalls,
    ToolError,
    asyncify,
    check_cancelled,
    context,
)
from dspylite.adapters.types.functions import without_references
from dspylite.runtime.clock import Deadline
from dspylite.runtime.frames import CURRENT_CALL
from dspylite.testing import FakeServer, Reply


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(pydantic.BaseModel):
    name: str
    tags: list[str] = []


class Trip(pydantic.BaseModel):
    to: Place
    stops: list[Place] = []


class Tree(pydantic.BaseModel):
    kids: list[Tree] = []


class Shop:
    """Sells things."""

    def __init__(self, price: int = 1) -> None:
        self.price = price

    def buy(self, count: int) -> int:
        """Buy some."""
        return self.price * count

    @classmethod
    def of(cls, price: int) -> int:
        """Open one."""
        return cls(price).price

    @staticmethod
    def greet(name: str) -> str:
        """Say hello."""
        return f"hello {name}"

    def __call__(self, count: float) -> float:
        """Ask for the price."""
        return self.price * count


def plain(x: int, y: str = "s") -> str:
    """Join two things."""
    return f"{x}{y}"


async def later(x: int) -> int:
    """Double, later."""
    await anyio.lowlevel.checkpoint()
    return 2 * x


async def now_or_later(x: int) -> int:
    return 2 * x


def decorated(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


def choices(
    color: Color = Color.RED,
    size: Literal["s", "l"] = "s",
    count: int | None = None,
    cost: decimal.Decimal = decimal.Decimal("1.5"),
    level: Annotated[int, pydantic.Field(ge=1, description="how high")] = 2,
) -> str:
    return f"{color} {size} {count} {cost} {level}"


def travel(trip: Trip, others: list[Place], by_name: dict[str, Place]) -> str:
    return f"{type(trip.to).__name__} {[p.name for p in others]} {sorted(by_name)}"


# --- what a model is told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("func", "name", "desc", "types"),
    [
        (plain, "plain", "Join two things.", {"x": "integer", "y": "string"}),
        (later, "later", "Double, later.", {"x": "integer"}),
        (Shop(2).buy, "buy", "Buy some.", {"count": "integer"}),
        (Shop.of, "of", "Open one.", {"price": "integer"}),
        (Shop.greet, "greet", "Say hello.", {"name": "string"}),
        (Shop(2), "Shop", "Ask for the price.", {"count": "number"}),
        (Shop, "Shop", "Sells things.", {"price": "integer"}),
        (Place, "Place", "", {"name": "string", "tags": "array"}),
        (
            functools.partial(plain, y="t"),
            "plain",
            "Join two things.",
            {"x": "integer", "y": "string"},
        ),
        (decorated(plain), "plain", "Join two things.", {"x": "integer", "y": "string"}),
    ],
)
def test_a_function_in_any_form_says_its_name_words_and_types(
    func: Callable[..., Any], name: str, desc: str, types: dict[str, str]
) -> None:
    """The annotations of this file are texts, as under `from __future__ import annotations`."""
    tool = Tool(func)
    assert (tool.name, tool.desc) == (name, desc)
    assert {arg: schema["type"] for arg, schema in tool.args.items()} == types


def test_schemas_of_all_kinds_of_types_hold_no_references() -> None:
    """Providers differ in what references they follow."""
    schemas = Tool(choices).args
    assert schemas["color"]["enum"] == ["red", "blue"]
    assert schemas["color"]["default"] == "red"
    assert schemas["size"] == {"enum": ["s", "l"], "type": "string", "default": "s"}
    assert schemas["count"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert schemas["level"] == {
        "default": 2, "description": "how high", "minimum": 1, "type": "integer",
    }  # fmt: skip
    trip = Tool(travel)
    assert "$" not in json.dumps(trip.args)
    assert trip.args["trip"]["properties"]["stops"]["items"]["required"] == ["name"]
    assert trip.required == ("trip", "others", "by_name")
    assert "$ref" not in json.dumps(Tool(lambda tree: tree, arg_types={"tree": Tree}).args)


def test_an_annotation_that_cannot_be_found_costs_only_its_own_argument() -> None:
    """One missing import must not let all arguments through unchecked."""

    def odd(x: int, y: NoSuchType) -> int:  # type: ignore[name-defined]  # noqa: F821
        return x

    assert Tool(odd).args == {"x": {"type": "integer"}, "y": {}}


def test_a_schema_that_grows_without_end_is_bounded() -> None:
    """A hostile server's 40 definitions come to 2**40 values when written out."""
    definitions: dict[str, Any] = {
        f"A{n}": {
            "properties": {"l": {"$ref": f"#/$defs/A{n + 1}"}, "r": {"$ref": f"#/$defs/A{n + 1}"}}
        }
        for n in range(40)
    }
    definitions["A40"] = {"type": "string"}
    written = without_references({"$ref": "#/$defs/A0", "$defs": definitions})
    assert len(json.dumps(written)) < 2_000_000
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    assert without_references(deep)


def generate(x: int) -> Iterator[int]:
    yield x


async def agenerate(x: int) -> AsyncIterator[int]:
    yield x


@pytest.mark.parametrize(
    ("func", "said"),
    [
        ("a text", "needs a function"),
        (len, "only be passed by position"),
        (generate, "is a generator"),
        (agenerate, "is a generator"),
        (dict, "cannot be read"),
    ],
)
def test_what_no_model_could_call_is_refused_when_the_tool_is_made(func: Any, said: str) -> None:
    """Found at the model's first call, it would cost a run."""
    with pytest.raises(ToolError, match=said):
        Tool(func)


def test_what_the_user_tells_goes_before_what_the_function_says() -> None:
    """Functions of libraries have poor names and no types."""
    tool = Tool(
        lambda **kw: kw,
        name="look",
        desc="Look it up.",
        args={"q": {"type": "string"}, "n": {"type": "integer", "default": 3}},
        arg_types={"q": str, "n": int},
        arg_desc={"q": "what to look up"},
    )
    function = tool.format_as_litellm_function_call()["function"]
    assert function["name"] == "look"
    assert function["parameters"]["required"] == ["q"]
    assert function["parameters"]["properties"]["q"]["description"] == "what to look up"
    assert tool(q="x", n="4") == {"q": "x", "n": 4}
    with pytest.raises(ToolError, match="Did you mean `q`"):
        tool(Q="x")


# --- what reaches the function -------------------------------------------------------------------


def test_arguments_arrive_as_the_types_that_are_declared() -> None:
    """A model writes JSON; the function wants its own classes."""
    assert Tool(choices)(color="blue", size="l", cost="2.5") == "Color.BLUE l None 2.5 2"
    trip = {"to": {"name": "Basel"}}
    given = Tool(travel)(trip=trip, others=[{"name": "a"}], by_name={"k": {"name": "b"}})
    assert given == "Place ['a'] ['k']"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "needs `x` too"),
        ({"x": "many"}, "`x` of `plain`: Input should be a valid integer"),
        ({"x": 1, "z": 2}, "no argument `z`"),
        ({"x": None}, "`x` of `plain`"),
    ],
)
def test_arguments_that_do_not_fit_never_reach_the_function(
    args: dict[str, Any], said: str
) -> None:
    """The error names the argument, so that a model can mend it."""
    with pytest.raises(ToolError, match=said):
        Tool(plain)(**args)


def test_an_argument_may_be_named_like_anything_of_ours() -> None:
    """`self`, `func`, `io` and `args` are names that functions have."""

    def odd(self: int, func: int, io: int, args: int, kwargs: int, name: int) -> int:
        return self + func + io + args + kwargs + name

    assert Tool(odd)(**dict.fromkeys(("self", "func", "io", "args", "kwargs", "name"), 1)) == 6


def test_other_arguments_pass_where_the_function_takes_them() -> None:
    """`**kwargs` means that."""
    assert Tool(lambda x, **more: (x, more))(x=1, y=2) == (1, {"y": 2})


# --- from everywhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("func", [later, now_or_later, lambda x: 2 * x])
def test_sync_and_async_functions_can_be_called(func: Callable[..., Any]) -> None:
    """An agent does not know which of its tools are async."""
    assert Tool(func)(x=4) == 8


@pytest.mark.anyio
@pytest.mark.parametrize("func", [later, now_or_later, lambda x: 2 * x])
async def test_sync_and_async_functions_can_be_awaited(func: Callable[..., Any]) -> None:
    """The same from a loop; a sync one must not block it."""
    assert await Tool(func).acall(x=4) == 8
    assert await asyncify(Tool(func))(x=4) == 8


@pytest.mark.anyio
async def test_a_sync_tool_does_not_block_the_event_loop() -> None:
    """The tool ends only when another task of the same loop has run."""
    ran = threading.Event()

    def wait() -> bool:
        return ran.wait(5)

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: _set_soon(ran))
        assert await Tool(wait).acall() is True


async def _set_soon(event: threading.Event) -> None:
    event.set()


def test_callbacks_hear_of_a_tool_with_its_call_as_parent_of_what_it_does() -> None:
    """Traces show which tool asked which model (B 4.15)."""
    heard: list[Any] = []

    class Hear(BaseCallback):
        def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            frame = CURRENT_CALL.get()
            assert frame is not None
            heard.append(("start", instance.name, inputs, frame.parent_id, call_id))

        def on_tool_end(
            self, call_id: str, outputs: Any | None, exception: BaseException | None = None
        ) -> None:
            heard.append(("end", outputs, type(exception), call_id))

    inner = Tool(plain)
    outer = Tool(lambda: inner(x=1), name="outer")
    with context(callbacks=[Hear()]):
        outer()
        with pytest.raises(ToolError):
            inner(x="no")
    (start, inner_start, inner_end, end, _, failed) = heard
    assert start[:4] == ("start", "outer", {}, None)
    assert inner_start[:4] == ("start", "plain", {"x": 1}, start[4])
    assert inner_end[:3] == ("end", "1s", type(None))
    assert end == ("end", "1s", type(None), start[4])
    assert failed[2] is ToolError


# --- who waits, and how long ---------------------------------------------------------------------


class Hanging:
    """A tool that waits until it is told to stop."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.stopped = threading.Event()

    def sync(self) -> None:
        self.started.set()
        try:
            while not self.stopped.wait(0.01):
                check_cancelled()
        except CallCancelledError:
            self.stopped.set()
            raise

    async def asynchronous(self) -> None:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.stopped.set()


@pytest.mark.parametrize("form", ["sync", "asynchronous"])
def test_a_hanging_tool_ends_with_the_deadline_of_its_call(form: str) -> None:
    """Every wait is bounded, also for what is the user's (B 4.4); the tool is told to stop."""
    hanging = Hanging()
    with Deadline(0.2), pytest.raises(DeadlineExceededError, match="the tool `"):
        Tool(getattr(hanging, form))()
    assert hanging.stopped.wait(5)


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["sync", "asynchronous"])
async def test_a_hanging_tool_that_is_awaited_ends_with_the_deadline(form: str) -> None:
    """The same on asyncio and trio (B 4.4)."""
    hanging = Hanging()
    with Deadline(0.2), pytest.raises(DeadlineExceededError, match="the tool `"):
        await Tool(getattr(hanging, form)).acall()
    assert await anyio.to_thread.run_sync(hanging.stopped.wait, 5)


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["sync", "asynchronous"])
async def test_cancelling_the_caller_stops_the_tool(form: str) -> None:
    """A client that goes away leaves nothing running (B 3.2)."""
    hanging = Hanging()
    async with anyio.create_task_group() as group:
        group.start_soon(Tool(getattr(hanging, form)).acall)
        assert await anyio.to_thread.run_sync(hanging.started.wait, 5)
        group.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(hanging.stopped.wait, 5)


def test_a_tools_own_timeout_is_no_deadline() -> None:
    """What the tool raises is raised as it is, while the call has time left."""

    def slow() -> None:
        raise TimeoutError("the site is slow")

    with Deadline(30), pytest.raises(TimeoutError, match="the site is slow") as caught:
        Tool(slow)()
    assert not isinstance(caught.value, DeadlineExceededError)


# --- copies --------------------------------------------------------------------------------------


def test_a_copy_keeps_the_function_and_shares_no_words() -> None:
    """A function may hold a lock or a connection, which cannot be copied."""

    class Database:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def query(self, sql: str) -> str:
            with self.lock:
                return sql

    tool = Tool(Database().query)
    twin = copy.deepcopy(tool)
    twin.desc, twin.args["sql"]["description"] = "other", "other"
    assert twin.func == tool.func
    assert (tool.desc, "description" in tool.args["sql"]) == ("", False)
    assert twin(sql="select") == "select"


def test_a_tool_of_a_module_level_function_can_be_pickled() -> None:
    """Agents travel to other processes (B 7.2)."""
    twin = pickle.loads(pickle.dumps(Tool(plain, arg_desc={"x": "a number"})))
    assert twin(x="3") == "3s"
    assert twin.args == Tool(plain, arg_desc={"x": "a number"}).args


def test_calls_are_made_by_name_from_a_dict_or_a_list() -> None:
    """DSPy's forms of `execute`; functions in a list go by their own names."""
    calls = ToolCalls.from_dict_list([{"name": "plain", "args": {"x": 1}}])
    (call,) = calls.tool_calls
    assert call.execute([plain]) == call.execute({"plain": plain}) == call.execute([Tool(plain)])
    with pytest.raises(ToolError, match="Did you mean `plain`"):
        ToolCalls.from_dict_list([{"name": "plane"}]).tool_calls[0].execute([plain])


class Wanted(dspy.Signature):
    tools: list[dspy.Tool] = dspy.InputField()
    calls: dspy.ToolCalls = dspy.OutputField()


@pytest.mark.parametrize("native", [False, True])
def test_calls_from_a_predictor_know_the_tools_that_were_offered(native: bool) -> None:
    """DSPy's `call.execute()`; a model cannot choose another of the program's names."""
    said = [{"name": "twice", "args": {"x": 2}}, {"name": "plain", "args": {"x": 2}}]
    with FakeServer() as server:
        server.script(
            Reply(text="", tool_calls=[{"name": c["name"], "arguments": c["args"]} for c in said])
            if native
            else Reply(text=f"[[ ## calls ## ]]\n{json.dumps(said)}\n\n[[ ## completed ## ]]")
        )
        lm = dspy.LM("openai/gpt-4o", api_base=server.base_url, api_key="none", cache=False)
        adapter = dspy.ChatAdapter(use_native_function_calling=native)
        with dspy.context(lm=lm, adapter=adapter):
            found = dspy.Predict(Wanted)(tools=[Tool(lambda x: 2 * x, name="twice")])
    twice, other = found.calls.tool_calls
    assert twice.execute() == anyio.run(twice.aexecute) == 4
    with pytest.raises(ToolError, match="no tool `plain`"):
        other.execute()
    ids = [{**each, "id": call.id} for each, call in zip(said, (twice, other), strict=True)]
    assert found.calls == ToolCalls.from_dict_list(ids)  # the tools are no part of the value
    assert copy.deepcopy(twice).execute() == 4
    with pytest.raises(ToolError, match="does not know its tools"):
        pickle.loads(pickle.dumps(twice)).execute()


def test_calls_of_unknown_origin_ask_for_their_tools() -> None:
    """Names of the caller's are not looked up for a model, as DSPy does."""
    (call,) = ToolCalls.from_dict_list([{"name": "plain", "args": {"x": 1}}]).tool_calls
    with pytest.raises(ToolError, match=r"pass them: `call.execute\(\[tool, ...\]\)`"):
        call.execute()


@pytest.mark.anyio
async def test_a_call_is_made_of_given_functions_only() -> None:
    """A model that names `exec` must not find it in the module of whoever makes the call."""
    call = ToolCalls.from_dict_list([{"name": "open", "args": {}}]).tool_calls[0]
    with pytest.raises(ToolError, match="pass them"):
        call.execute()
    with pytest.raises(ToolError, match="pass them"):
        await call.aexecute()
