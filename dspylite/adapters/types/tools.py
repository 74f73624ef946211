"""`Tool`: a function that a model may call. `ToolCalls`, `ToolCallResults`: its wishes, what came.

Not here: asking a model for calls (`adapters/base.py`), and the loop of an agent
(`programs/react.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import pydantic
from pydantic_core import PydanticUndefined

from dspylite.abc import Io
from dspylite.adapters.types.base import Type
from dspylite.adapters.types.foreign_tools import LangChainTool, McpTool, read_langchain, read_mcp
from dspylite.adapters.types.functions import name_of, read_function, words_of
from dspylite.adapters.values import misfits, parse_json, to_json, type_adapter
from dspylite.errors import ToolError, nearest
from dspylite.runtime.calls import Observed
from dspylite.runtime.flow import ASYNC, BLOCKING, Both, run_flow, within_deadline
from dspylite.runtime.homes import LoopHome


class Tool(Type):
    """A function that a model may call, with the name, words and argument types it is told.

    What is not given is read from the function: its name, its docstring, its annotations. Sync and
    async functions work from sync and async programs alike. Arguments are checked and converted to
    their types before the function sees them.

    Args:
        func: The function, method or callable object.
        name: What the model calls it by.
        desc: What it does, in words for the model.
        args: JSON schema of each argument, by name.
        arg_types: Python type of each argument, by name.
        arg_desc: What each argument means, by name.

    Raises:
        ToolError: `func` cannot be called by a model.

    Example:
        >>> def add(x: int, y: int = 1) -> int:
        ...     "Add two numbers."
        ...     return x + y
        >>> tool = Tool(add)
        >>> tool.name, tool.desc, tool.args["y"]
        ('add', 'Add two numbers.', {'type': 'integer', 'default': 1})
        >>> tool(x="2")
        3
    """

    kind: ClassVar[str] = "tool"
    __field_kind__: ClassVar[str] = "tool"

    func: Callable[..., Any]
    name: str
    desc: str = ""
    args: dict[str, Any] = pydantic.Field(default_factory=dict)
    arg_types: dict[str, Any] = pydantic.Field(default_factory=dict)
    arg_desc: dict[str, str] = pydantic.Field(default_factory=dict)
    required: tuple[str, ...] = ()
    has_kwargs: bool = False

    def __init__(
        self,
        func: Callable[..., Any],
        name: str | None = None,
        desc: str | None = None,
        args: Mapping[str, Any] | None = None,
        arg_types: Mapping[str, Any] | None = None,
        arg_desc: Mapping[str, str] | None = None,
        **given: Any,
    ) -> None:
        if not callable(func):
            raise ToolError(f"A tool needs a function, not {func!r}.")
        read = read_function(func, arg_types or {}, arg_desc or {}, is_told=args is not None)
        fields: dict[str, Any] = {
            **read._asdict(),
            "func": func,
            "name": name or name_of(func),
            "desc": words_of(func) if desc is None else desc,
            "arg_desc": dict(arg_desc or {}),
        }
        if args is not None:  # what is told of them holds, and not what the function could take
            needed = tuple(name for name in args if "default" not in args[name])
            types = {**read.arg_types, **(arg_types or {})}
            fields |= {"args": dict(args), "arg_types": types, "required": needed}
            fields |= {"has_kwargs": False, **given}
        super().__init__(**fields)

    @classmethod
    def from_mcp_tool(
        cls,
        session: Any,
        tool: McpTool,
        *,
        result_mode: Literal["text", "structured"] = "text",
    ) -> Self:
        """Make a tool of one that a server of the Model Context Protocol offers.

        A session works in the event loop that it was opened in, and in no other. Made inside that
        loop, the tool finds its way there from every thread and every other loop; made outside of
        any, it is tied to the first loop that awaits it.

        Args:
            session: An open `ClientSession` or `Client`, or anything with their `call_tool`.
            tool: One of `(await session.list_tools()).tools`.
            result_mode: `"text"` gives the text of a result: a string, or a list where it has
                several parts, with those that are no text as they came. `"structured"` gives the
                structured content where the server sends some, else the same.

        Raises:
            ToolError: `result_mode` is neither. When called: the arguments do not fit, the server
                reports a failure, or the connection is gone.
        """
        return cls(**read_mcp(session, tool, result_mode))

    @classmethod
    def from_langchain(cls, tool: LangChainTool) -> Self:
        """Make a tool of one of LangChain's.

        Args:
            tool: What `@tool` of LangChain makes, or an object of a `BaseTool`'s subclass.
        """
        return cls(**read_langchain(tool))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy what is told to the model; the function stays the same one.

        It may hold a connection or a lock, and what it keeps is the user's to share or not.
        """
        memo = {} if memo is None else memo
        memo[id(self.func)] = self.func
        twin = self.model_copy()
        memo[id(self)] = twin
        for name in ("args", "arg_types", "arg_desc"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin

    def __call__(self, /, **kwargs: Any) -> Any:
        """Call the function on this thread; an async one is run to its end.

        Raises:
            ToolError: The arguments do not fit.
        """
        return run_flow(self.plan(BLOCKING, (), kwargs))

    async def acall(self, /, **kwargs: Any) -> Any:
        """Call the function and await it; a sync one runs in a worker thread.

        Raises:
            ToolError: The arguments do not fit.
        """
        return await self.plan(ASYNC, (), kwargs)

    async def plan(self, io: Io, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function through a driver, told to callbacks.

        Where the call in progress has a deadline, the function is waited for no longer; a sync one
        runs in a thread of its own then, and is told by its flag to stop.

        Raises:
            ToolError: The arguments do not fit.
            DeadlineExceededError: The time is up.
        """
        if args:
            raise ToolError(f"Arguments of `{self.name}` are passed by name, not by position.")
        with Observed("tool", self, dict(kwargs)) as call:
            work = functools.partial(self.func, **self.checked(kwargs))
            home: LoopHome | None = getattr(self.func, "home", None)

            async def run(io: Io) -> Any:
                if home is None:
                    return await io.any(work)
                there = Both(
                    functools.partial(home.call, work), functools.partial(home.acall, work)
                )
                return await io.call(there)

            call.outputs = await within_deadline(io, run, f"the tool `{self.name}` ran")
        return call.outputs

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments converted to their types.

        Raises:
            ToolError: One is unknown, missing, or does not fit.
        """
        converted: dict[str, Any] = {}
        for name, value in given.items():
            if name not in self.args and not self.has_kwargs:
                raise ToolError(
                    f"`{self.name}` has no argument `{name}`. {nearest(name, self.args)}"
                    f"It takes: {', '.join(self.args) or 'none'}."
                )
            wanted = self.arg_types.get(name, Any)
            if wanted is Any:
                converted[name] = value
                continue
            try:
                converted[name] = type_adapter(wanted, ()).validate_python(value)
            except pydantic.ValidationError as error:
                raise ToolError(
                    f"The argument `{name}` of `{self.name}`: {misfits(error)}."
                ) from None
        if missing := [name for name in self.required if name not in given]:
            raise ToolError(
                f"`{self.name}` needs {', '.join(f'`{name}`' for name in missing)} too."
            )
        return converted

    def format(self) -> dict[str, Any]:
        """Write the tool as JSON for a prompt."""
        return {"name": self.name, "desc": self.desc, "args": self._described()}

    def _described(self) -> dict[str, Any]:
        return {
            name: {**schema, **({"description": text} if (text := self.arg_desc.get(name)) else {})}
            for name, schema in self.args.items()
        }

    def format_as_litellm_function_call(self) -> dict[str, Any]:
        """Return the definition that OpenAI-compatible providers take among `tools`."""
        schema = {
            "type": "object",
            "properties": self._described(),
            "required": list(self.required),
        }
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.desc, "parameters": schema},
        }

    def __str__(self) -> str:
        words = f": {' '.join(self.desc.split())}" if self.desc else ""
        return f"`{self.name}`{words} Arguments: {to_json(self._described())}"

    def __repr__(self) -> str:
        return f"Tool(name={self.name!r}, desc={self.desc!r}, args={self.args!r})"


class _Offer:
    """The tools that a model was offered; no part of a call's value, and left behind by copies.

    Pickles and copies are without them, because tools are functions of this process.
    """

    __slots__ = ("tools",)

    def __init__(self, tools: Sequence[Any] | None = None) -> None:
        self.tools = tools

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Offer)

    def __hash__(self) -> int:
        return hash(_Offer)

    def __deepcopy__(self, memo: Any) -> _Offer:
        return self

    def __reduce__(self) -> tuple[type[_Offer], tuple[()]]:
        return _Offer, ()


class ToolCall(Type):
    """One call that a model wants made.

    Attributes:
        name: Of the tool.
        args: Arguments by name.
        id: The provider's id of the call, which its result must bear; None if it gave none.
    """

    name: str
    args: dict[str, Any]
    id: str | None = None
    _offer: _Offer = pydantic.PrivateAttr(default_factory=_Offer)

    def format(self) -> dict[str, Any]:
        """Write the call as JSON."""
        return {"name": self.name, "args": self.args}

    async def plan(self, io: Io, tools: Mapping[str, Any]) -> Any:
        """Make the call through a driver.

        Raises:
            ToolError: There is no such tool, or the arguments do not fit.
        """
        if self.name not in tools:
            raise ToolError(
                f"There is no tool `{self.name}`. {nearest(self.name, tools)}"
                f"The tools are: {', '.join(tools) or 'none'}."
            )
        found = tools[self.name]
        return await (found if isinstance(found, Tool) else Tool(found)).plan(io, (), self.args)

    def execute(self, functions: Mapping[str, Any] | Sequence[Any] | None = None) -> Any:
        """Make the call on this thread.

        Args:
            functions: The tools, or functions, by name or in a list. None: those that the model
                was offered, which the calls that a predictor gives know.

        Raises:
            ToolError: There is no such tool, or the arguments do not fit.
        """
        return run_flow(self.plan(BLOCKING, self._tools(functions)))

    async def aexecute(self, functions: Mapping[str, Any] | Sequence[Any] | None = None) -> Any:
        """Make the call and await it; otherwise as `execute`."""
        return await self.plan(ASYNC, self._tools(functions))

    def _tools(self, functions: Mapping[str, Any] | Sequence[Any] | None) -> Mapping[str, Any]:
        given = self._offer.tools if functions is None else functions
        if given is None:
            # No look at the caller's names, as in DSPy: a model would choose among all of them.
            raise ToolError(
                f"The call of `{self.name}` does not know its tools; pass them: "
                "`call.execute([tool, ...])`. Calls that come from a predictor know them."
            )
        if isinstance(given, Mapping):
            return given
        tools = [each if isinstance(each, Tool) else Tool(each) for each in given]
        return {tool.name: tool for tool in tools}


_Call = ToolCall  # inside of `ToolCalls` the name is that of its attribute


class ToolCalls(Type):
    """The calls that a model wants made, as an output; in a conversation also what they gave.

    Attributes:
        tool_calls: The calls, in order.
        tool_call_results: What they gave, as a `ToolCallResults`, for a conversation.

    Example:
        >>> calls = ToolCalls.from_dict_list([{"name": "search", "args": {"query": "cats"}}])
        >>> calls.tool_calls[0].name
        'search'
    """

    __field_kind__: ClassVar[str] = "tool calls"
    ToolCall: ClassVar[type[_Call]] = ToolCall

    tool_calls: list[_Call]
    tool_call_results: Any = None

    @classmethod
    def from_dict_list(cls, tool_calls_dicts: Iterable[Mapping[str, Any]]) -> Self:
        """Make them of dicts: `{"name", "args"}`, or the form of a provider."""
        return cls(tool_calls=[ToolCall(**_call_fields(each)) for each in tool_calls_dicts])

    @classmethod
    def description(cls) -> str:
        """Show a model how calls are written."""
        return 'JSON such as {"tool_calls": [{"name": "search", "args": {"query": "cats"}}]}'

    def offer(self, tools: Any) -> None:
        """Let the calls know the tools that the model was offered, for `execute()`.

        Args:
            tools: One tool or a list of them.
        """
        given = _Offer(tuple(tools) if isinstance(tools, list | tuple) else (tools,))
        for call in self.tool_calls:
            call._offer = given  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

    def format(self) -> dict[str, Any]:
        """Write the calls as JSON, with what they gave."""
        written: dict[str, Any] = {"tool_calls": [call.format() for call in self.tool_calls]}
        if self.tool_call_results is not None:
            written["tool_call_results"] = self.tool_call_results
        return written

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, list):
            return {"tool_calls": [_call_fields(item) for item in data]}
        if isinstance(data, Mapping) and "tool_calls" in data:
            calls = data["tool_calls"]
            listed = isinstance(calls, list)
            return {**data, "tool_calls": [_call_fields(c) for c in calls] if listed else calls}
        if isinstance(data, Mapping) and {"name", "function"} & set(data):
            return {"tool_calls": [_call_fields(data)]}
        return data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Show a model what it is to write, and not what is filled in later."""
        schema = handler.resolve_ref_schema(
            super().__get_pydantic_json_schema__(core_schema, handler)
        )
        schema.get("properties", {}).pop("tool_call_results", None)
        return schema


def _call_fields(call: Any) -> Any:
    """Read one call in whatever form it comes.

    Raises:
        ValueError: Its arguments are no JSON object.
    """
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    inner: Mapping[str, Any] = function if isinstance(function, Mapping) else {}
    for name in ("args", "arguments"):
        args = call.get(name) if name in call else inner.get(name, PydanticUndefined)
        if args is not PydanticUndefined:
            break
    else:
        args = {}
    if isinstance(args, str):
        args = parse_json(args) if args.strip() else {}
    return {
        # Of OpenAI's `/responses`, results must bear the `call_id`, and not the item's own id.
        "id": call.get("call_id") or call.get("id"),
        "name": inner.get("name") or call.get("name"),
        "args": {} if args is None else args,
    }


class ToolCallResult(pydantic.BaseModel):
    """What one call gave.

    Attributes:
        name: Of the tool.
        value: What it returned, or the words of its failure.
        call_id: The id of the call.
        is_error: Whether it failed.
    """

    model_config = pydantic.ConfigDict(defer_build=True)

    name: str
    value: Any
    call_id: str | None = None
    is_error: bool = False


_Result = ToolCallResult


class ToolCallResults(pydantic.BaseModel):
    """What the calls of a model gave, in their order.

    Attributes:
        tool_call_results: One result for each call.
    """

    ToolCallResult: ClassVar[type[_Result]] = ToolCallResult

    model_config = pydantic.ConfigDict(defer_build=True)

    tool_call_results: list[_Result]

    @classmethod
    def from_tool_calls_and_values(
        cls,
        tool_calls: ToolCalls | Sequence[ToolCall],
        values: Sequence[Any],
        is_errors: Sequence[bool] | None = None,
    ) -> Self:
        """Join calls and what they gave.

        Raises:
            ValueError: There are more of one than of the other.
        """
        calls = tool_calls.tool_calls if isinstance(tool_calls, ToolCalls) else list(tool_calls)
        failed = [False] * len(calls) if is_errors is None else list(is_errors)
        if not len(calls) == len(values) == len(failed):
            raise ValueError(
                f"There are {len(calls)} calls, {len(values)} values and {len(failed)} marks of "
                "failure; give one of each for every call."
            )
        results = [
            ToolCallResult(call_id=call.id, name=call.name, value=value, is_error=is_error)
            for call, value, is_error in zip(calls, values, failed, strict=True)
        ]
        return cls(tool_call_results=results)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, list):
            return {"tool_call_results": data}
        if isinstance(data, Mapping) and "value" in data:
            return {"tool_call_results": [data]}
        return data
