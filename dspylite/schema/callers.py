"""Finds the type that a name means where a caller stands, by looking and never by running.

Not here: which names a signature text leaves open (`schema/grammar.py`).
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Annotated, Any, Literal, Optional

MAX_CALLERS = 64
"""How many callers are asked, from the nearest outwards.

High enough for programs that build their signatures deep inside helpers.
"""

_PACKAGE = __name__.partition(".")[0]

_EXAMPLES: tuple[Any, ...] = (
    *(int, list[int], int | str, Annotated[int, 0], Literal[0], typing.NewType("_Id", int)),
    *(typing.List, typing.List[int], Optional[int]),  # noqa: UP006, UP045  # classes of their own
)
_FORMS = (*{type(each) for each in _EXAMPLES}, getattr(typing, "TypeAliasType", type))
"""Of what classes the things are that can stand for a type."""

# Read past `__getattribute__` and `__getattr__`, which could run code.
_names_of_module: Callable[[Any], Mapping[str, Any]] = vars(types.ModuleType)["__dict__"].__get__
_names_of_class: Callable[[Any], Mapping[str, Any]] = vars(type)["__dict__"].__get__
_bases_of_class: Callable[[Any], tuple[type, ...]] = vars(type)["__mro__"].__get__


def type_seen_by_callers(name: str) -> Any:
    """Return the type that `name` is in a caller outside this package, or None.

    The nearest caller's local names are asked first, then those of its module, then the next
    caller. A name that is no type there is passed over.

    Args:
        name: An identifier, or several with dots between: `Place`, `geo.Place`, `Map.Place`.
    """
    root, *path = name.split(".")
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    asked = 0
    while frame is not None and asked < MAX_CALLERS:
        if not _is_ours(frame):
            asked += 1
            for names in (frame.f_locals, frame.f_globals):
                found = type_inside(_plain_get(names, root), path)
                if found is not None:
                    return found
        frame = frame.f_back
    return None


def type_inside(holder: Any, path: list[str]) -> Any:
    """Return the type reached from a module or class by attributes, or None if there is none.

    No attribute is computed for it: a property, or a module's `__getattr__`, does not run.

    Example:
        >>> import datetime
        >>> type_inside(datetime, ["datetime"]), type_inside(datetime, ["MINYEAR"])
        (<class 'datetime.datetime'>, None)
    """
    for part in path:
        if issubclass(type(holder), types.ModuleType):
            spaces = [_names_of_module(holder)]
        elif issubclass(type(holder), type):
            spaces = [_names_of_class(base) for base in _bases_of_class(holder)]
        else:
            return None
        holder = next((names[part] for names in spaces if part in names), None)
    return holder if issubclass(type(holder), _FORMS) or holder is Any else None


def _is_ours(frame: FrameType) -> bool:
    name = _plain_get(frame.f_globals, "__name__")
    return isinstance(name, str) and name.partition(".")[0] == _PACKAGE


def _plain_get(names: Any, name: str) -> Any:
    """Read a name without running the code of a class that only looks like a dict."""
    if isinstance(names, dict):
        return dict.get(typing.cast("dict[str, Any]", names), name)
    if type(names).__module__ == "builtins":  # the live view of a frame's locals, since 3.13
        return names.get(name)
    return None
