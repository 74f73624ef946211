"""Tools of other libraries, as what makes a `Tool`: those of MCP servers, and LangChain's.

None of these libraries is imported: what is given is asked for its attributes alone. Not here:
`Tool` itself (`adapters/types/tools.py`), and the loop that a session lives in
(`runtime/homes.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import anyio

from dspylite.adapters.types.functions import without_references
from dspylite.errors import ToolError
from dspylite.runtime.homes import LoopHome

_TYPES: Mapping[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
_MODES = ("text", "structured")


class McpTool(Protocol):
    """What a server says of one of its tools; `mcp.types.Tool`."""

    name: str


class LangChainTool(Protocol):
    """A tool of LangChain; `langchain_core.tools.BaseTool`."""

    name: str


class SessionCall:
    """Calls one tool of a server, through a session, in the event loop that it lives in."""

    def __init__(self, session: Any, name: str, result_mode: str) -> None:
        self.home = LoopHome()
        self._session = session
        self._name = name
        self._mode = result_mode

    async def __call__(self, /, **arguments: Any) -> Any:
        """Call the tool; in another loop than the session's this would wait for ever."""
        try:
            result = await self._session.call_tool(self._name, arguments=arguments)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            raise ToolError(
                f"The connection to the server of `{self._name}` is closed; open a new session."
            ) from error
        return self._read(result)

    def _read(self, result: Any) -> Any:
        parts = [_text_or_part(part) for part in getattr(result, "content", None) or ()]
        given: Any = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else parts
        if _get(result, "is_error", "isError"):
            told = given if isinstance(given, str) else "\n".join(map(str, parts))
            raise ToolError(f"The server reports that `{self._name}` failed: {told}")
        if self._mode == "structured" and _is_set(result, "structured_content"):
            return _get(result, "structured_content", "structuredContent")
        return given

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCall:
        """The same one: a session cannot be copied."""
        return self


def read_mcp(session: Any, tool: McpTool, result_mode: str) -> dict[str, Any]:
    """Return the arguments of a `Tool` that calls one of a server's.

    Raises:
        ToolError: `result_mode` is unknown, or the session cannot call tools.
    """
    if result_mode not in _MODES:
        raise ToolError(f"`result_mode` must be one of {', '.join(_MODES)}, not {result_mode!r}.")
    if not callable(getattr(session, "call_tool", None)):
        raise ToolError(f"An MCP session has a method `call_tool`; {session!r} has none.")
    schema = _get(tool, "input_schema", "inputSchema") or {}
    return {
        "func": SessionCall(session, tool.name, result_mode),
        "name": tool.name,
        "desc": getattr(tool, "description", None) or "",
        **read_schema(schema),
    }


def read_langchain(tool: LangChainTool) -> dict[str, Any]:
    """Return the arguments of a `Tool` that calls one of LangChain's.

    Raises:
        ToolError: It is none.
    """
    given: Any = tool
    if not callable(getattr(given, "invoke", None)):
        raise ToolError(f"A tool of LangChain has a method `invoke`; {tool!r} has none.")
    schema: Any = getattr(given, "args_schema", None)
    types: dict[str, Any] = {}
    if isinstance(schema, type):
        fields: Mapping[str, Any] = getattr(schema, "model_fields", {})
        types = {name: field.annotation for name, field in fields.items()}
        schema = getattr(schema, "model_json_schema")()  # noqa: B009  # any pydantic's model
    elif schema is None:
        schema = {"properties": getattr(given, "args", {})}
    read = read_schema(schema)
    return {
        "func": functools.partial(_invoke, given.ainvoke if _is_async(given) else given.invoke),
        "name": given.name,
        "desc": getattr(given, "description", None) or "",
        **read,
        "arg_types": {**read["arg_types"], **types},
    }


def _invoke(invoke: Callable[[dict[str, Any]], Any], /, **arguments: Any) -> Any | Awaitable[Any]:
    return invoke(arguments)


def _is_async(tool: Any) -> bool:
    """Tell whether a tool has an async form of its own, and not only one that makes a thread."""
    if getattr(tool, "coroutine", None) is not None:
        return True
    own = getattr(type(tool), "_arun", None)
    return own is not None and not own.__module__.startswith("langchain_core.")


def read_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `Tool` whose arguments a JSON schema describes.

    Example:
        >>> read_schema({"properties": {"city": {"type": "string"}}, "required": ["city"]})[
        ...     "required"
        ... ]
        ('city',)
    """
    flat = without_references(schema)
    properties = flat.get("properties")
    args: dict[str, Any] = dict(properties) if isinstance(properties, Mapping) else {}
    args = {name: each if isinstance(each, dict) else {} for name, each in args.items()}
    required = flat.get("required")
    listed = required if isinstance(required, list) else []
    return {
        "args": args,
        "arg_types": {name: _type_of(each) for name, each in args.items()},
        "required": tuple(name for name in args if name in listed),
        "has_kwargs": bool(flat.get("additionalProperties", not args)),
    }


def _type_of(schema: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    return _TYPES.get(kind, Any) if isinstance(kind, str) else Any


def _text_or_part(part: Any) -> Any:
    text = getattr(part, "text", None)
    return text if getattr(part, "type", None) == "text" and isinstance(text, str) else part


def _get(holder: Any, name: str, old_name: str) -> Any:
    """Read an attribute that the first version of the SDK spells otherwise."""
    return getattr(holder, name, None) if hasattr(holder, name) else getattr(holder, old_name, None)


def _is_set(holder: Any, name: str) -> bool:
    """Tell whether the server sent structured content, be it null."""
    old_name = "structuredContent"
    fields: Any = getattr(holder, "model_fields_set", None)
    if fields is not None:
        return name in fields or old_name in fields
    return hasattr(holder, name) or hasattr(holder, old_name)
