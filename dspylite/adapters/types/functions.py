"""What a function says of itself to a model: its name, its words, the types of its arguments.

Not here: calling it (`adapters/types/tools.py`).
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from pydantic_core import to_jsonable_python

from dspylite.adapters.values import MAX_DEPTH, json_schema
from dspylite.errors import ToolError

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MAX_NODES = 20_000
"""Values that a schema may come to when its references are written out; guessed, far above those of
any tool. Each of 30 definitions that names the next one twice makes more than a billion."""


class Parameters(typing.NamedTuple):
    """What the parameters of a function say.

    Attributes:
        args: JSON schema of each, by name.
        arg_types: Python type of each, by name.
        required: Names of those without a default.
        has_kwargs: Whether it takes arguments of any other name.
    """

    args: dict[str, Any]
    arg_types: dict[str, Any]
    required: tuple[str, ...]
    has_kwargs: bool


def read_function(
    func: Callable[..., Any],
    arg_types: Mapping[str, Any],
    arg_desc: Mapping[str, str],
    *,
    is_told: bool,
) -> Parameters:
    """Read the parameters of a function.

    Args:
        func: The function, method, class or callable object.
        arg_types: Types that count in place of the annotations.
        arg_desc: Words for the arguments.
        is_told: Whether the user told the arguments, so that they need not be readable.

    Raises:
        ToolError: They cannot be read, or cannot be passed by name, or it is a generator.
    """
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        raise ToolError(
            f"`{name_of(func)}` is a generator, and a tool gives one result; return a list of what "
            "it yields."
        )
    schemas: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    required: list[str] = []
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError) as error:
        if is_told:
            return Parameters({}, {}, (), has_kwargs=True)
        raise ToolError(
            f"The parameters of {func!r} cannot be read; give them as `args=` and `arg_types=`."
        ) from error
    names = _names_around(func)
    for name, parameter in parameters.items():
        if parameter.kind in _VARIADIC:
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            if is_told:
                continue
            raise ToolError(
                f"The parameter `{name}` of `{name_of(func)}` can only be passed by position, and "
                "models name their arguments; wrap the function in one that takes it by name."
            )
        kinds[name] = arg_types.get(name, _resolved(parameter.annotation, names))
        schemas[name] = schema_of(kinds[name])
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
        else:
            schemas[name]["default"] = _json_default(parameter.default)
        if name in arg_desc:
            schemas[name]["description"] = arg_desc[name]
    forms = {parameter.kind for parameter in parameters.values()}
    return Parameters(schemas, kinds, tuple(required), inspect.Parameter.VAR_KEYWORD in forms)


def _names_around(func: Callable[..., Any]) -> dict[str, Any]:
    """Return the names that the annotations of a function may use."""
    while isinstance(func, functools.partial):
        func = func.func
    if inspect.isclass(func):
        return dict(vars(sys.modules.get(func.__module__, types)))
    holder = inspect.unwrap(func if inspect.isroutine(func) else type(func).__call__)
    return dict(getattr(holder, "__globals__", {}))


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """Return the type that an annotation names; `Any` where it names none that can be found."""
    if annotation is inspect.Parameter.empty:
        return Any

    def holder() -> None: ...

    holder.__annotations__ = {"it": annotation}
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["it"]
    except (NameError, TypeError, SyntaxError, AttributeError):
        return Any  # of this argument; the others keep theirs


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of a callable object."""
    while isinstance(func, functools.partial):
        func = func.func
    return str(getattr(func, "__name__", type(func).__name__))


def words_of(func: Callable[..., Any]) -> str:
    """Return what a function's docstring says; empty without one."""
    while isinstance(func, functools.partial):
        func = func.func
    if inspect.isclass(func):
        return inspect.cleandoc(func.__dict__.get("__doc__") or "")  # not that of its base
    own = inspect.getdoc(func) or ""
    return own if inspect.isroutine(func) else (inspect.getdoc(type(func).__call__) or own)


def schema_of(annotation: Any) -> dict[str, Any]:
    """Return the JSON schema of an argument, without references where that is possible."""
    if annotation is Any:
        return {}
    try:
        return without_references(json_schema(annotation))
    except (pydantic.errors.PydanticUserError, pydantic.errors.PydanticSchemaGenerationError):
        return {}  # of a type that JSON does not know; the function gets the value as it comes


def without_references(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Write out what a JSON schema defines once and names elsewhere.

    A type that holds itself is written out once; so is one too deep or too large, which only a
    hostile server has.

    Example:
        >>> without_references({"$ref": "#/$defs/A", "$defs": {"A": {"type": "string"}}})
        {'type': 'string'}
    """
    named = [schema.get(key) for key in ("definitions", "$defs")]
    definitions = {k: v for each in named if isinstance(each, Mapping) for k, v in each.items()}
    rest = {name: value for name, value in schema.items() if name not in {"$defs", "definitions"}}
    written = _Inliner(definitions).inlined(rest, ())
    return written if isinstance(written, dict) else {}


class _Inliner:
    """Writes definitions out at the places that name them, up to a bound."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._left = _MAX_NODES

    def inlined(self, node: Any, inside: tuple[str, ...], depth: int = 0) -> Any:
        if not isinstance(node, list | dict):
            return node
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            return [] if isinstance(node, list) else {"type": "object"}
        if isinstance(node, list):
            return [self.inlined(item, inside, depth + 1) for item in node]
        name = str(node.get("$ref", "")).rpartition("/")[2]
        if name not in self._definitions:
            return {key: self.inlined(value, inside, depth + 1) for key, value in node.items()}
        if name in inside:  # a type that holds itself; one turn of it tells the model enough
            return {"type": "object"}
        rest = {key: value for key, value in node.items() if key != "$ref"}
        meant = self.inlined(self._definitions[name], (*inside, name), depth + 1)
        return {**meant, **rest} if isinstance(meant, dict) else rest


def _json_default(value: Any) -> Any:
    try:
        return to_jsonable_python(value)
    except (TypeError, ValueError):
        return str(value)
