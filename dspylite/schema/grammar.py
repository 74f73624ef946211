"""Reads `"context: list[str], question -> answer: float"` into names, types and defaults.

Not here: the signature class made from them (`schema/signature.py`).
"""

from __future__ import annotations

import ast
import datetime
import decimal
import enum
import functools
import keyword
import operator
import os
import threading
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Any

from dspylite.errors import SignatureError, clip, nearest
from dspylite.schema.callers import type_inside

MAX_CHARS = 20_000
"""Longest signature text; far above what a person writes, low enough to parse in a moment."""

MAX_DEPTH = 32
"""Deepest nesting of brackets; CPython's parser needs its own stack beyond about 90."""

REQUIRED: Any = ...
"""Stands for "has no default", as in pydantic."""

PARSE_LOCK = threading.RLock()  # a signal handler may enter it again
"""Guards `ast.parse`, and what calls it, which fails at random in threads on CPython 3.11."""

# Held around a fork, or a child would wait for a thread that it does not have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=PARSE_LOCK.acquire,
        after_in_parent=PARSE_LOCK.release,
        after_in_child=PARSE_LOCK.release,
    )

KNOWN_TYPES: Mapping[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, bytes, list, dict, tuple, set)},
    **{kind.__name__: kind for kind in (frozenset, object, complex, bytearray, NoneType)},
    **{kind.__name__: kind for kind in (Sequence, Iterable, Mapping, MutableMapping)},
    **{kind.__name__: kind for kind in (datetime.date, datetime.time, datetime.timedelta)},
    "datetime": datetime.datetime,
    "datetime.datetime": datetime.datetime,
    "datetime.date": datetime.date,
    "datetime.time": datetime.time,
    "datetime.timedelta": datetime.timedelta,
    "Decimal": decimal.Decimal,
    "UUID": uuid.UUID,
    "Any": Any,
    "Optional": typing.Optional,
    "Union": typing.Union,
    "Literal": typing.Literal,
    "List": list,
    "Dict": dict,
    "Tuple": tuple,
    "Set": set,
    "FrozenSet": frozenset,
}

_NAMESPACES = ("typing.", "t.")
_OWN_NAMESPACES = ("dspy.", "dspylite.")

_REGISTER_LOCK = threading.Lock()  # guards the exchange of `_registered`, which readers take as is
_registered: Mapping[str, Callable[[], type]] = MappingProxyType({})


def register_type(name: str, load: Callable[[], type]) -> None:
    """Let signature texts name a type of this package: `name`, or `dspy.name`.

    A type of the caller's own by that name goes before it.

    Args:
        name: The name.
        load: Gives the type, each time that a text names it.

    Raises:
        SignatureError: The name is no identifier.
    """
    global _registered  # noqa: PLW0603  # a mapping is exchanged whole, never written to
    check_name(name, "register_type")
    with _REGISTER_LOCK:
        _registered = MappingProxyType({**_registered, name: load})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedField:
    """One field of a signature text.

    Attributes:
        name: A Python identifier.
        annotation: The type; `str` where the text names none.
        typed: Whether the text names a type.
        default: The default value, or `REQUIRED`.
    """

    name: str
    annotation: Any
    typed: bool
    default: Any = REQUIRED


def parse_signature(
    text: str, custom_types: Mapping[str, Any] | None = None
) -> tuple[tuple[ParsedField, ...], tuple[ParsedField, ...]]:
    """Read a signature text into its input and output fields.

    Args:
        text: Names with optional types, `inputs -> outputs`. Types are the built-in ones, those of
            `typing` and `datetime`, and `custom_types`. An input may have a literal default.
        custom_types: Further types by the name the text uses.

    Raises:
        SignatureError: The text does not parse, a name comes twice, or a type is unknown.

    Example:
        >>> inputs, outputs = parse_signature("question, k: int = 3 -> answer: list[str]")
        >>> [(field.name, field.default) for field in inputs]
        [('question', Ellipsis), ('k', 3)]
        >>> outputs[0].annotation
        list[str]
    """
    try:
        return _read(text, {**KNOWN_TYPES, **(custom_types or {})})
    except RecursionError:  # a chain of operators or dots nests without any bracket
        raise SignatureError(f"`{_shown(text)}` nests deeper than a signature can.") from None


@functools.lru_cache(maxsize=1024)
def unknown_types(text: str) -> tuple[str, ...]:
    """Return the names of types in a text that only its writer can explain.

    Raises:
        SignatureError: The text does not parse.

    Example:
        >>> unknown_types("q: str, spots: list[geo.Place] -> a: Literal['x'] | Colour")
        ('geo.Place', 'Colour')
    """
    try:
        names = [
            name
            for arguments, _ in _parse_text(text)
            for argument in arguments
            if argument.annotation is not None
            for name in _type_names(argument.annotation)
        ]
    except RecursionError:  # `parse_signature` says so
        return ()
    return tuple(dict.fromkeys(name for name in names if _known(name, KNOWN_TYPES) is None))


def _type_names(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(name)):
            yield name
        case ast.Name() | ast.Attribute():
            yield ast.unparse(node)
        case ast.BinOp(left=left, right=right):
            yield from _type_names(left)
            yield from _type_names(right)
        case ast.Subscript(value=base, slice=inside):
            kinds = list(_type_names(base))
            yield from kinds
            if not any(_known(kind, KNOWN_TYPES) is typing.Literal for kind in kinds):
                for part in inside.elts if isinstance(inside, ast.Tuple) else [inside]:
                    yield from _type_names(part)
        case _:
            pass


def _read(
    text: str, names: Mapping[str, Any]
) -> tuple[tuple[ParsedField, ...], tuple[ParsedField, ...]]:
    sides, where = _parse_text(text), _shown(text)
    seen: set[str] = set()
    parsed: list[tuple[ParsedField, ...]] = []
    for arguments, defaults in sides:
        fields: list[ParsedField] = []
        for argument, default in zip(arguments, defaults, strict=True):
            check_name(argument.arg, where)
            if argument.arg in seen:
                raise SignatureError(
                    f"The field `{_shown(argument.arg)}` comes twice in `{where}`; "
                    "give each field its own name."
                )
            seen.add(argument.arg)
            node = argument.annotation
            fields.append(
                ParsedField(
                    name=argument.arg,
                    annotation=str if node is None else _resolve(node, names, where),
                    typed=node is not None,
                    default=REQUIRED if default is None else _default(default, where),
                )
            )
        parsed.append(tuple(fields))
    inputs, outputs = parsed
    for field in outputs:
        if field.default is not REQUIRED:
            raise SignatureError(
                f"The output `{field.name}` has a default in `{where}`; only inputs can have one."
            )
    return inputs, outputs


def check_name(name: str, where: str) -> None:
    """Refuse a field name that could not be a keyword argument, or is reserved.

    Raises:
        SignatureError: The name is a Python keyword, no identifier, or starts with an underscore.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # a dict's key
        raise SignatureError(f"Names of fields are texts, not {name!r} (in `{where}`).")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise SignatureError(
            f"`{_shown(name)}` cannot be the name of a field (in `{where}`): use a Python "
            "identifier that is no keyword and does not start with an underscore."
        )


def _shown(piece: str) -> str:
    """Make a piece of a signature text short and printable, to be quoted in a message."""
    return clip(piece.strip(), 400).encode("utf-8", "backslashreplace").decode("utf-8")


@functools.lru_cache(maxsize=1024)
def _parse_text(
    text: str,
) -> tuple[tuple[tuple[ast.arg, ...], tuple[ast.expr | None, ...]], ...]:
    if len(text) > MAX_CHARS:
        raise SignatureError(f"A signature of {len(text)} characters is too long ({MAX_CHARS}).")
    sides, where = _split_arrow(text), _shown(text)
    if len(sides) != 2:
        raise SignatureError(
            f"`{where}` has {len(sides) - 1} arrows; write it as `inputs -> outputs`, "
            "for example `question -> answer`."
        )
    parsed = tuple(_parse_side(side, where) for side in sides)
    if not parsed[1][0]:
        raise SignatureError(f"`{where}` names no output; write one after the arrow.")
    return parsed


def _split_arrow(text: str) -> list[str]:
    """Split at arrows that stand outside brackets and quotes, and bound the nesting."""
    sides: list[str] = []
    start, depth, quote, index = 0, 0, "", 0
    while index < len(text):
        char = text[index]
        if quote:
            if char == "\\":
                index += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "[(":
            depth += 1
        elif char in "])":
            depth -= 1
        elif char == "#":
            raise SignatureError(f"`{_shown(text)}` has a `#`; a signature text holds no comments.")
        elif depth == 0 and text.startswith("->", index):
            sides.append(text[start:index])
            index += 1
            start = index + 1
        if not 0 <= depth <= MAX_DEPTH:
            raise SignatureError(
                f"The brackets of `{_shown(text)}` do not match, or nest deeper than {MAX_DEPTH}."
            )
        index += 1
    if depth or quote:
        raise SignatureError(f"A bracket or quote of `{_shown(text)}` is never closed.")
    sides.append(text[start:])
    return sides


def _parse_side(side: str, text: str) -> tuple[tuple[ast.arg, ...], tuple[ast.expr | None, ...]]:
    try:
        with PARSE_LOCK:
            tree = ast.parse(f"def signature({side}\n): pass")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SignatureError(
            f"`{_shown(side)}` in `{text}` does not parse ({error}); write fields as "
            "`name` or `name: type`, separated by commas."
        ) from None
    match tree.body:
        case [
            ast.FunctionDef(
                args=ast.arguments(
                    posonlyargs=[], args=arguments, vararg=None, kwonlyargs=[], kwarg=None
                ) as found,
                body=[ast.Pass()],
            )
        ]:
            missing = [None] * (len(arguments) - len(found.defaults))
            return tuple(arguments), (*missing, *found.defaults)
        case _:
            raise SignatureError(
                f"`{_shown(side)}` in `{text}` is more than a list of fields; write fields as "
                "`name` or `name: type`, separated by commas."
            )


def _default(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise SignatureError(
            f"The default `{_shown(ast.unparse(node))}` in `{text}` is not a literal; use a "
            "number, a string, a list of these and the like, or a class signature with "
            "`InputField(default=...)`."
        ) from None


def _resolve(node: ast.expr, names: Mapping[str, Any], text: str) -> Any:
    """Turn the syntax tree of a type into the type, without ever evaluating code."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(name)):
            return _lookup(name, names, text)
        case ast.Name() | ast.Attribute():
            return _lookup(ast.unparse(node), names, text)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            # Not `|`, which does not join every two of them (`None | None`).
            return typing.Union[_resolve(left, names, text), _resolve(right, names, text)]  # noqa: UP007
        case ast.Subscript(value=base, slice=inside):
            kind = _resolve(base, names, text)
            arguments = _arguments(kind, inside, names, text)
            try:
                return operator.getitem(kind, arguments[0] if len(arguments) == 1 else arguments)
            except TypeError as error:
                raise SignatureError(
                    f"`{_shown(ast.unparse(node))}` in `{text}` is no type: {error}."
                ) from None
        case _:
            raise SignatureError(f"`{_shown(ast.unparse(node))}` in `{text}` is not a type.")


def _arguments(kind: Any, inside: ast.expr, names: Mapping[str, Any], text: str) -> tuple[Any, ...]:
    parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    if kind is typing.Literal:
        return tuple(_literal(part, text) for part in parts)
    return tuple(... if _is_ellipsis(part) else _resolve(part, names, text) for part in parts)


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _literal(node: ast.expr, text: str) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        value = node
    if isinstance(value, str | int | bool | bytes | None):
        return value
    raise SignatureError(f"`Literal[...]` in `{text}` takes strings, numbers and None only.")


def _known(name: str, names: Mapping[str, Any]) -> Any:
    """Return the type that a name has in a table of types, or None."""
    spellings = (name, *(name.removeprefix(each) for each in _NAMESPACES))
    return next((names[each] for each in spellings if each in names), None)


def _lookup(name: str, names: Mapping[str, Any], text: str) -> Any:
    if (kind := _known(name, names)) is not None:
        return kind
    root, *path = name.split(".")
    if path and (kind := type_inside(names.get(root), path)) is not None:
        return kind
    for spelling in (name, *(name.removeprefix(each) for each in _OWN_NAMESPACES)):
        if spelling in _registered:
            return _registered[spelling]()
    hint, name = nearest(name, (*names, *_registered)), _shown(name)
    raise SignatureError(
        f"The type `{name}` in `{text}` is unknown. {hint}"
        f'For a type of your own pass `custom_types={{"{name}": {name}}}`, or write the signature '
        "as a class."
    )


def type_name(annotation: Any) -> str:
    """Write a type as it would stand in a signature text.

    Example:
        >>> type_name(list[str]), type_name(typing.Optional[int]), type_name(typing.Literal["a"])
        ('list[str]', 'int | None', "Literal['a']")
    """
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Any:
        return "Any"
    if annotation is ...:
        return "..."
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return getattr(annotation, "__name__", None) or str(annotation)
    if origin is typing.Literal:
        return f"Literal[{', '.join(_literal_text(value) for value in arguments)}]"
    if origin is typing.Annotated:
        return type_name(arguments[0])
    parts = [type_name(argument) for argument in arguments]
    if origin is typing.Union or getattr(origin, "__name__", "") == "UnionType":
        return " | ".join(parts)
    return f"{getattr(origin, '__name__', str(origin))}[{', '.join(parts)}]"


def _literal_text(value: Any) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)
