"""Values as plain JSON data: what a file can hold, converted without loss or refused by name.

Not here: values as the text of a prompt (`adapters/values.py`), and files (`runtime/files.py`).
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import ipaddress
import math
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic_core import to_jsonable_python

from dspylite.errors import SavingError
from dspylite.schema.records import Example

MAX_DEPTH = 48
"""Deepest nesting of a value that is saved.

With what stands around a value in a file it stays below the 64 levels that are read.
"""

_AS_TEXT = (
    decimal.Decimal,
    uuid.UUID,
    pathlib.PurePath,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
)
"""What a prompt shows as its text, and a type annotation makes of that text again."""


def plain(value: Any, where: str) -> Any:
    """Return a value as JSON data: records, models, dates, enums and bytes as a prompt shows them.

    Args:
        value: The value; it is not changed and not shared with the result.
        where: What it is, for the error.

    Raises:
        SavingError: Something in it is no data, and no file can hold it.

    Example:
        >>> plain({"on": datetime.date(2024, 5, 1), "tags": ("a", "b")}, "demo")
        {'on': '2024-05-01', 'tags': ['a', 'b']}
    """
    return _plain(value, where, 0)


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SavingError(
            f"`{where}` nests deeper than {MAX_DEPTH} levels, or holds itself; shorten it."
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, where, depth + 1)
    if isinstance(value, str):
        return _text(str(value), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SavingError(f"`{where}` is {value}, which JSON cannot hold; use None.")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        ordered: list[Any] = sorted(value, key=repr)
        return [_plain(item, where, depth + 1) for item in ordered]
    if (pairs := _pairs(value, where)) is not None:
        made: dict[str, Any] = {}
        for key, item in pairs:
            name = _key(key, where)
            if name in made:
                raise SavingError(f"Two keys of `{where}` are {name!r} as text; rename one.")
            made[name] = _plain(item, f"{where}.{name}", depth + 1)
        return made
    return _scalar(value, where)


def _pairs(value: Any, where: str) -> list[tuple[Any, Any]] | None:
    """Return what a value consists of, if it consists of named parts."""
    if isinstance(value, Mapping | Example):
        return list(value.items())
    if isinstance(value, pydantic.BaseModel):
        try:
            dumped = value.model_dump(mode="json", by_alias=True)  # by the names that are read back
        except Exception as error:  # whatever a serializer of the user's raises is reported as ours
            raise _no_data(value, where, f": {error}") from error
        if isinstance(dumped, dict):
            return list(dumped.items())
        return None  # type: ignore[unreachable]  # a model whose serializer gives a text
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _scalar(value: Any, where: str) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return to_jsonable_python(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise SavingError(
                f"`{where}` holds bytes that are no UTF-8 text, which JSON cannot hold; encode "
                "them, such as by `base64.b64encode`."
            ) from None
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, pydantic.BaseModel):
        return _text(str(value.model_dump(mode="json")), where)
    raise _no_data(value, where, "")


def _no_data(value: Any, where: str, reason: str) -> SavingError:
    kind = type(value)
    return SavingError(
        f"`{where}` is a `{kind.__module__}.{kind.__qualname__}`, which JSON cannot hold{reason}. "
        "Replace it by plain data, or take it away before saving and set it after loading."
    )


def _text(text: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise SavingError(
                f"`{where}` holds half of a character (a lone surrogate), which no file can hold; "
                "write `text.encode('utf-8', 'replace').decode()`."
            ) from None
    return text


def _key(key: Any, where: str) -> str:
    if isinstance(key, enum.Enum):
        key = key.value
    if isinstance(key, str):
        return _text(str(key), where)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int | float):
        return repr(key)
    if isinstance(key, datetime.date | datetime.time | uuid.UUID | decimal.Decimal):
        return str(_scalar(key, where))
    raise SavingError(f"A key of `{where}` is {key!r}; JSON has texts as keys only.")
