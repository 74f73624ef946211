"""One value as text and back: how an input is written, how an output is described and read.

Reading mends syntax noise (code fences, trailing commas, Python's spelling of JSON) and never a
missing tail. Not here: where in a prompt or an answer the value stands.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError, to_jsonable_python

from dspylite.adapters.content import PartsSink, formats_itself, formatted
from dspylite.errors import SignatureError
from dspylite.schema.records import Example
from dspylite.schema.signature import Field

MAX_DEPTH = 64
"""Deepest nesting of a value read; deeper ones are hostile or broken."""

MAX_CHARS = 4_000_000
"""Longest text read as one value."""

_MAX_ERRORS = 10_000
"""Errors of one value that are looked at; the details of a million need gigabytes."""

_NUMBER_BOUNDS = frozenset({"gt", "ge", "lt", "le", "multiple_of"})
_TEXT_BOUNDS = frozenset({"min_length", "max_length", "pattern"})


def format_value(value: Any, sink: PartsSink | None = None) -> str:
    """Write a value for a prompt: text as it is, anything structured as JSON.

    Args:
        value: Anything.
        sink: Who takes the parts of it that are no text; without one they are written as JSON too.

    Example:
        >>> format_value("a text"), format_value(["a", "b"]), format_value(None)
        ('a text', '["a", "b"]', 'null')
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if formats_itself(type(value)):
        value = _written(value, sink)
    return value if isinstance(value, str) else to_json(value, sink=sink)


def _written(value: Any, sink: PartsSink | None) -> Any:
    """Write a `Type`: as it says itself where a sink takes its parts, or it is read as a text.

    So an answer of an earlier turn stands in a prompt as the model is to write it.
    """
    if sink is not None:
        return formatted(value, sink)
    kind: Any = type(value)
    return value.format() if _is_text(kind) else value


def to_json(value: Any, *, indent: int | None = None, sink: PartsSink | None = None) -> str:
    """Write any value as JSON; what JSON does not know is written as its text."""
    known = _jsonable if sink is None else functools.partial(_jsonable, sink=sink)
    try:
        return json.dumps(value, ensure_ascii=False, default=known, indent=indent)
    except TypeError:  # a key that is no text; `default` is not asked about keys
        return json.dumps(_with_text_keys(value, sink), ensure_ascii=False, indent=indent)


def _jsonable(value: Any, sink: PartsSink | None = None) -> Any:
    if formats_itself(type(value)) and (written := _written(value, sink)) is not value:
        return written
    if isinstance(value, Example):
        return dict(value.items())
    if isinstance(value, pydantic.BaseModel):
        # By the names that are read back.
        return value.model_dump(mode="json", by_alias=True, context=sink)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return to_jsonable_python(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value)


def _with_text_keys(value: Any, sink: PartsSink | None) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {_key(key): _with_text_keys(item, sink) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_text_keys(item, sink) for item in value]
    return _with_text_keys(_jsonable(value, sink), sink)


def _key(key: Any) -> Any:
    if key is None or isinstance(key, str | int | float):
        return key
    return str(_jsonable(key))


def describe(field: Field) -> str:
    """Say in words what form an output's text must have; empty for free text.

    Example:
        >>> describe(Field(kind="output", name="n", annotation=int, constraints=(("ge", 1),)))
        'a whole number, ge=1'
    """
    parts = [_describe_type(field.annotation)]
    parts += [f"{name}={value!r}" for name, value in field.constraints if name != "examples"]
    return ", ".join(part for part in parts if part)


def _describe_type(annotation: Any) -> str:
    simple = {
        str: "",
        int: "a whole number",
        float: "a number",
        bool: "`true` or `false`",
        datetime.date: "a date as YYYY-MM-DD",
        datetime.datetime: "a date and time in ISO 8601",
        Any: "JSON",
    }
    if isinstance(annotation, typing.Hashable) and annotation in simple:
        return simple[annotation]
    if (choices := _choices(annotation)) is not None:
        return "exactly one of " + ", ".join(f"`{format_value(choice)}`" for choice in choices)
    alternatives = _alternatives(annotation)
    if alternatives and type(None) in alternatives and len(alternatives) == 2:
        (other,) = (kind for kind in alternatives if kind is not type(None))
        return f"{_describe_type(other) or 'text'}, or `null`"
    if own := _own_words(annotation):
        return own
    return f"JSON of this schema: {to_json(_terse(json_schema(annotation)))}"


def _own_words(annotation: Any) -> str:
    return str(annotation.description()) if formats_itself(annotation) else ""


def _terse(schema: Any) -> Any:
    """Leave out of a schema the titles that pydantic makes of the names that stand there anyway."""
    if isinstance(schema, list):
        return [_terse(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _terse(each) for name, each in value.items()}
        if key in {"properties", "$defs"}
        else value
        if key in {"default", "const", "enum", "examples"}
        else _terse(value)
        for key, value in schema.items()
        if key != "title"
    }


def json_schema(annotation: Any) -> dict[str, Any]:
    """Return the JSON schema of a type."""
    return type_adapter(annotation, ()).json_schema()


def json_schemas(annotations: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the JSON schemas of several types by name, and the definitions that they share.

    Made together, two types of one name get definitions of two names.
    """
    schemas, shared = pydantic.TypeAdapter.json_schemas(
        [(name, "validation", type_adapter(a, ())) for name, a in annotations.items()]
    )
    return {name: schema for (name, _), schema in schemas.items()}, shared.get("$defs", {})


@functools.lru_cache(maxsize=4096)
def _cached_adapter(
    annotation: Any, constraints: tuple[tuple[str, Any], ...]
) -> pydantic.TypeAdapter[Any]:
    bounds = {name: value for name, value in constraints if name != "examples"}
    kind: Any = Annotated[annotation, pydantic.Field(**bounds)] if bounds else annotation
    try:
        return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(allow_inf_nan=False))
    except PydanticUserError:  # models and dataclasses bring a config of their own
        return pydantic.TypeAdapter(kind)


def type_adapter(
    annotation: Any, constraints: tuple[tuple[str, Any], ...]
) -> pydantic.TypeAdapter[Any]:
    """Return pydantic's reader of a type with bounds; made once per type."""
    try:
        return _cached_adapter(annotation, constraints)
    except TypeError:  # a type or bound that cannot be hashed
        return _cached_adapter.__wrapped__(annotation, constraints)


def takes_none(field: Field) -> bool:
    """Tell whether None is a value of the field's type.

    Example:
        >>> takes_none(Field(kind="output", name="n", annotation=int | None))
        True
    """
    annotation = field.annotation
    return annotation in (Any, object, None, type(None)) or any(
        each in (Any, None, type(None)) for each in _alternatives(annotation)
    )


def check_readable(field: Field) -> None:
    """Refuse an output whose type or bounds no answer could be read into.

    Raises:
        SignatureError: pydantic cannot read the type, or a bound does not go with it.
    """
    annotation = field.annotation
    if annotation is str and not field.constraints:
        return
    misfits = _NUMBER_BOUNDS if annotation is str else _TEXT_BOUNDS
    try:
        type_adapter(annotation, field.constraints)
        describe(field)
        if annotation in (str, int, float):
            for name, value in field.constraints:
                if name in misfits:
                    raise TypeError(f"`{name}={value!r}` is no bound of it")
    except (PydanticUserError, SchemaError, TypeError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split()).removesuffix(".")
        raise SignatureError(
            f"The output `{field.name}: {field.type_name}` cannot be read from an answer: "
            f"{reason}. Use a type that pydantic reads from JSON, with bounds that go with it."
        ) from error


def parse_text(field: Field, text: str) -> Any:
    """Read an output from the text a model wrote for it.

    Raises:
        ValueError: The text is not a value of the field's type; the message says why.
    """
    annotation = field.annotation
    text = text.strip()
    if annotation is str:
        return text if not field.constraints else _validated(field, text)
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters are more than {MAX_CHARS}")
    if formats_itself(annotation) and _is_text(annotation):
        return _validated(field, text)
    alternatives = _alternatives(annotation)
    if type(None) in alternatives and text in {"null", "None"}:
        return None
    if str in alternatives and set(alternatives) <= {str, type(None)}:
        return _validated(field, text)
    if (choices := _choices(annotation)) is not None:
        return _pick(choices, text)
    bare = _without_quotes(text)
    if annotation is bool and bare.lower() in {"true", "false", "yes", "no"}:
        return bare.lower() in {"true", "yes"}
    if annotation in (int, float) and not re.fullmatch(r"[-+]?[\d._]+([eE][-+]?\d+)?", bare):
        raise ValueError(f"{_excerpt(bare)} is not {_describe_type(annotation)}")
    try:
        value = parse_json(text)
    except ValueError:
        if text[:1] in {"{", "["} or "```" in text:
            raise  # meant as JSON and broken: reading it as text would hide that
        value = bare
    try:
        return _validated(field, value)
    except ValueError:
        if isinstance(value, str) or text[:1] in {"{", "["}:
            raise
        return _validated(field, bare)  # `2024-05-01` or `1234` may be what a str-like type wants


@functools.lru_cache(maxsize=1024)
def _is_text(kind: Any) -> bool:
    """Tell whether values of a type are written as plain text, as code is; it reads that itself."""
    try:
        return json_schema(kind).get("type") == "string"
    except PydanticUserError:  # JSON does not know it, such as a tool's function
        return False


def validate(field: Field, value: Any) -> Any:
    """Check and convert an output that already is a JSON value.

    Raises:
        ValueError: It is not a value of the field's type.
    """
    if field.annotation is str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = to_json(value)  # `"answer": 5` for a text is a model's usual slip
        if isinstance(value, str) and not field.constraints:
            return value
    try:
        return _validated(field, value)
    except ValueError:
        if (choices := _choices(field.annotation)) is None:
            raise
        return _pick(choices, format_value(value))


def _validated(field: Field, value: Any) -> Any:
    try:
        result = type_adapter(field.annotation, field.constraints).validate_python(value)
    except pydantic.ValidationError as error:
        raise ValueError(f"{_excerpt(value)} does not fit: {misfits(error)}") from None
    except TypeError as error:  # a bound that does not go with this member of a union
        raise ValueError(f"{_excerpt(value)} does not fit: {error}") from error
    _check_finite(result)
    return result


def misfits(error: pydantic.ValidationError) -> str:
    """Say what does not fit, and where: five places at most."""
    count = error.error_count()
    if count > _MAX_ERRORS:
        return f"{count} places in it are wrong"
    places = [
        (".".join(map(str, each["loc"])), each["msg"])
        for each in error.errors(include_url=False, include_input=False)[:5]
    ]
    return "; ".join(f"{place}: {said}" if place else said for place, said in places)


def _check_finite(result: Any) -> None:
    """Refuse numbers that are not finite inside models too, which would read them from a text."""
    rest = [result]
    while rest:
        item = rest.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                raise ValueError(f"{item} is not a finite number")
        elif isinstance(item, pydantic.BaseModel):
            if not item.model_config.get("allow_inf_nan"):
                rest.extend(vars(item).values())
        elif isinstance(item, dict):
            rest.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            rest.extend(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            rest.extend(getattr(item, field.name) for field in dataclasses.fields(item))


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _choices(annotation: Any) -> tuple[Any, ...] | None:
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return tuple(annotation)
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return typing.get_args(annotation)
    return ()


def _pick(choices: tuple[Any, ...], text: str) -> Any:
    """Find the one choice that the text names: exactly, else without regard to case.

    A value goes before a member's name: it is what prompts show and answers are written with.
    """
    text = text.strip()
    spelled = [(choice, _spellings(choice)) for choice in choices]
    named = [(choice, {choice.name}) for choice in choices if isinstance(choice, enum.Enum)]
    for fold in (str, str.casefold):
        for table in (spelled, named):
            for word in (fold(text), fold(_without_quotes(text))):
                found = [c for c, names in table if word in {fold(n).strip() for n in names}]
                if len(found) == 1:
                    return found[0]
    allowed = ", ".join(repr(format_value(choice)) for choice in choices)
    raise ValueError(f"{_excerpt(text)} is not one of {allowed}")


def _spellings(choice: Any) -> set[str]:
    return {format_value(choice), str(choice.value if isinstance(choice, enum.Enum) else choice)}


def _without_quotes(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'`":
        inner = text[1:-1]
        return inner if text[0] not in inner else text
    return text


def _without_fence(text: str) -> str:
    """Take a value out of a Markdown code fence that holds nothing else."""
    opening, newline, rest = text.partition("\n")
    if newline and opening.startswith("```") and rest.endswith("```"):
        return rest[:-3].strip()
    return text


def parse_json(text: str) -> Any:
    r"""Read one JSON value, mending syntax noise but nothing that is missing.

    Raises:
        ValueError: It is no JSON value, names a key twice, nests deeper than `MAX_DEPTH`, or holds
            NaN or infinity.

    Example:
        >>> parse_json("```json\n{'a': [1, 2,], 'b': True}\n```")
        {'a': [1, 2], 'b': True}
    """
    text = _without_fence(text.strip())
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters are more than {MAX_CHARS}")
    try:
        return load_json(text)
    except json.JSONDecodeError as first:
        try:
            return load_json(mend_json(text))
        except json.JSONDecodeError:
            raise ValueError(f"not JSON: {first}") from None


def load_json(text: str) -> Any:
    """Read strict JSON under the bounds of `parse_json`.

    Raises:
        ValueError: As `parse_json`; `json.JSONDecodeError` where the syntax is at fault.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    check_tree(value)
    return value


def check_tree(value: Any) -> None:
    """Refuse a value that nests too deep or holds a number that is not finite.

    Raises:
        ValueError: It does.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH and any(isinstance(item, dict | list) for item in level):
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{item} is not a finite number")
        level = deeper


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {_excerpt(name)} comes twice")
            seen.add(name)
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)

_NOISE = re.compile(
    r"""
      (?P<string>"(?:[^"\\]|\\.?)*+(?:"|\Z))   # never-closed ones too, or the search would restart
    | (?P<single>'(?:[^'\\]|\\.?)*+(?:(?P<closed>')|\Z))  # at each quote and turn quadratic
    | (?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z))
    | (?P<comma>,(?=\s*[\]}]))
    | (?P<word>\b(?:True|False|None)\b)
    """,
    re.VERBOSE | re.DOTALL,
)


# What would take text out of an object, or hide a key in another value, is no noise: text quoted
# without escapes could have put it there.
_QUOTE = re.compile(r"""\"|(?<!\w)'|'(?!\w)""")
_KEY = re.compile(r'"\s*:')


def mend_json(text: str) -> str:
    r"""Rewrite syntax noise as JSON: trailing commas, comments, Python's quotes and constants.

    Comments with quotes in them stay, and so do single-quoted texts that hold a key.

    Example:
        >>> mend_json("{'it': \"isn't\", 'ok': True,}")
        '{"it": "isn\'t", "ok": true}'
    """
    return _NOISE.sub(_mend, text)


def _mend(match: re.Match[str]) -> str:
    found = match[0]
    match match.lastgroup:
        case "single" if match["closed"]:
            inner = found[1:-1].replace("\\'", "'")
            if _KEY.search(inner):
                return found
            return '"' + re.sub(r'(?<!\\)"', r"\"", inner) + '"'
        case "comment":
            return found if _QUOTE.search(found) else ""
        case "comma":
            return ""
        case "word":
            return {"True": "true", "False": "false", "None": "null"}[found]
        case _:
            return found
