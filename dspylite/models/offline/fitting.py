"""Makes a value that fits a JSON schema out of what an inquiry finds, for the offline reader.

Not here: how single numbers, dates and choices are found (`scalars.py`), and how an output's
type is told in a prompt (`reading.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from dspylite.models.offline.evidence import Inquiry
from dspylite.models.offline.scalars import (
    bounded_number,
    find_confidence,
    find_format,
    find_number,
    is_true,
    pick_choice,
)
from dspylite.models.offline.sentences import MAX_SPAN_CHARS

Schema = Mapping[str, Any]

MAX_DEPTH = 12
"""Deepest nesting written; a schema that demands more cannot be met."""

MAX_VALUES = 500
"""Most values written for one output, whatever its schema demands."""

MAX_TEXT_CHARS = 100_000
"""Longest text written to reach a `minLength`."""

UNKNOWN = "unknown"
"""Text written inside a structured value where nothing was found."""

_LIST_LENGTH = 3  # items of a list whose length is free; guessed
_LEAST: Mapping[str, Any] = {"array": [], "object": {}, "string": "", "boolean": False}
_BOUNDS = frozenset(
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength minItems "
    "maxItems minProperties pattern".split()
)
_SLOW_PATTERN = re.compile(r"\)[*+{]")  # a repeated group can take exponential time


class Found(NamedTuple):
    """A value, and whether the evidence gave it or nothing did."""

    value: Any
    found: bool


class Fitter:
    """Answers one inquiry in the shape that a schema demands.

    Args:
        inquiry: What is asked, and where the answer is looked for.
        definitions: Schemas that a `$ref` names.

    Example:
        >>> from dspylite.models.offline.evidence import Evidence, Passage
        >>> evidence = Evidence([Passage(text="The old bridge is 312 m long.")])
        >>> fitter = Fitter(Inquiry("How long is the bridge?", "", evidence))
        >>> fitter.fit({"type": "integer", "minimum": 1})
        Found(value=312, found=True)
    """

    def __init__(self, inquiry: Inquiry, definitions: Schema | None = None) -> None:
        self._inquiry = inquiry
        self._definitions = definitions or {}
        self._left = MAX_VALUES
        self._path: list[str] = []  # names of the `$ref`s being followed, from the outermost
        self._depth = 0

    def fit(self, schema: object, topic: str = "", nth: int = 0) -> Found:
        """Make a value of a schema.

        Args:
            schema: A JSON schema as pydantic writes it; what it cannot say is not kept.
            topic: Name and meaning of what is wanted.
            nth: How many answers to skip, so that the items of a list differ.
        """
        shape = _mapping(schema)
        self._left -= 1
        if self._left < 0 or self._depth > MAX_DEPTH:
            return Found(_LEAST.get(_kind(shape)), False)
        name = _ref(shape)
        self._depth += 1
        self._path += [name] if name else []
        try:
            return (
                self.fit(self._definitions.get(name), topic, nth)
                if name
                else self._fit(shape, topic, nth)
            )
        finally:
            self._depth -= 1
            if name:
                self._path.pop()

    def _fit(self, schema: Schema, topic: str, nth: int) -> Found:
        if "const" in schema:
            return Found(schema["const"], True)
        if choices := _sequence(schema.get("enum")):
            return Found(*pick_choice(self._inquiry, choices, topic, nth))
        for key in ("anyOf", "oneOf"):
            if branches := _sequence(schema.get(key)):
                bounds = {name: bound for name, bound in schema.items() if name in _BOUNDS}
                return self._alternative([{**bounds, **_mapping(b)} for b in branches], topic, nth)
        if parts := _sequence(schema.get("allOf")):
            return self.fit(parts[0], topic, nth)
        match _kind(schema):
            case "object":
                return self._object(schema, topic, nth)
            case "array":
                return self._array(schema, topic)
            case "integer" | "number" as kind:
                return self._number(schema, topic, nth, whole=kind == "integer")
            case "boolean":
                return Found(*is_true(self._inquiry, topic))
            case "null":
                return Found(None, False)
            case _:
                return self._text(schema, topic, nth)

    def _alternative(self, branches: Sequence[Schema], topic: str, nth: int) -> Found:
        """Take the first alternative that something is found for, else null, else the first."""
        real = [branch for branch in branches if branch.get("type") != "null"]
        if real and real[0].get("type") == "number":  # pydantic's decimal: a number, or its text
            real = [branch for branch in real if branch.get("type") != "string"]
        ending = [branch for branch in real if _ref(branch) not in self._path]
        nullable = any(branch.get("type") == "null" for branch in branches)
        first: Found | None = None
        for branch in ending if ending or nullable else real:
            made = self.fit(branch, topic, nth)
            if made.found:
                return made
            first = first or made
        return Found(None, False) if nullable or first is None else first

    def _object(self, schema: Schema, topic: str, nth: int) -> Found:
        properties = _mapping(schema.get("properties"))
        required = _sequence(schema.get("required"))
        made: dict[str, Any] = {}
        found = False
        for name, inner in properties.items():
            is_tag = not {"const", "enum"}.isdisjoint(_mapping(inner))  # it may tell a union apart
            if name not in required and not is_tag and self._too_deep(inner):
                continue
            about = f"{name} {_mapping(inner).get('description', '')}"
            value = self.fit(inner, about[:MAX_SPAN_CHARS], nth)
            made[name] = value.value
            found = found or value.found
        if not properties:  # a dict: its keys' type is often not told, so it gets as few as may be
            for place in range(min(_size(schema, "minProperties", 0), MAX_VALUES)):
                names = _sequence(_mapping(schema.get("propertyNames")).get("enum"))
                key = str(names[place]) if place < len(names) else str(place + 1)
                made[key] = self.fit(schema.get("additionalProperties"), topic, place).value
        return Found(made, found)

    def _array(self, schema: Schema, topic: str) -> Found:
        heads = _sequence(schema.get("prefixItems"))
        items = schema.get("items")
        least = _size(schema, "minItems", len(heads))
        most = _size(schema, "maxItems", max(least, _LIST_LENGTH))
        if self._too_deep(items):
            most = least
        elif self._is_object(items):  # a second one would repeat the first
            most = min(most, max(least, 1))
        if items == {"type": "string"} and (label := self._inquiry.label(topic)):
            listed = dict.fromkeys(part.strip(" .") for part in re.split(r"[,;]", label))
            parts = list(listed)[: _size(schema, "maxItems", MAX_VALUES)]
            if len(parts) >= least:
                return Found(parts, True)
        made: list[Any] = []
        found = False
        for place in range(min(most, MAX_VALUES)):
            if place < len(heads):
                value = self.fit(heads[place], topic, heads[:place].count(heads[place]))
            else:
                value = self.fit(items, topic, place)
            if place >= least and (not value.found or value.value in made):
                break
            made.append(value.value)
            found = found or value.found
            if self._left < 0:
                break
        return Found(made, found)

    def _is_object(self, schema: object) -> bool:
        shape = _mapping(schema)
        name = _ref(shape)
        return _kind(_mapping(self._definitions.get(name)) if name else shape) == "object"

    def _too_deep(self, schema: object) -> bool:
        """Whether to leave out what need not be there: it recurs, or lies deep."""
        return self._depth > MAX_DEPTH // 2 or _ref(_mapping(schema)) in self._path

    def _number(self, schema: Schema, topic: str, nth: int, *, whole: bool) -> Found:
        try:
            low, high = _number_bounds(schema, whole=whole)
            step = schema.get("multipleOf")
            step = step if isinstance(step, int | float) and step > 0 else None

            def fits(value: float) -> bool:
                if not low <= value <= high or (whole and not isinstance(value, int)):
                    return False
                return step is None or abs(value / step - round(value / step)) < 1e-9

            share = None if whole else find_confidence(self._inquiry, topic)
            if share is not None and fits(share):
                return Found(share, True)
            number = find_number(self._inquiry, topic, fits, nth)
            if number is not None:
                return Found(number, True)
            default = bounded_number(low, high, step=step, nth=nth)
            return Found(int(default) if whole else default, False)
        except (
            OverflowError,
            ValueError,
        ):  # bounds that are beyond what a float holds, or no numbers
            return Found(0, False)

    def _text(self, schema: Schema, topic: str, nth: int) -> Found:
        made = self._free_text(schema, topic, nth)
        least = min(_size(schema, "minLength", 0), MAX_TEXT_CHARS)
        text = made.value
        if schema.get("format") == "binary":  # whose bounds count bytes
            text = text.encode("ascii", "ignore").decode("ascii")
        text = clip_text(text, _size(schema, "maxLength", MAX_TEXT_CHARS))
        return Found(text + "." * (least - len(text)), made.found)

    def _free_text(self, schema: Schema, topic: str, nth: int) -> Found:
        texts = self._inquiry.texts(topic)
        if isinstance(pattern := schema.get("pattern"), str):
            words = (word.strip(".,;:!?\"'()`") for text in texts for word in text.split())
            return _matching(pattern, words, nth)
        form = schema.get("format") or schema.get("contentMediaType")
        if isinstance(form, str) and (made := find_format(form, texts, nth)):
            return Found(*made)
        if nth == 0 and (label := self._inquiry.label(topic)):
            return Found(label, True)
        matches = self._inquiry.find(topic)
        return (
            Found(matches[nth].span.answer, True) if nth < len(matches) else Found(UNKNOWN, False)
        )


def clip_text(text: str, limit: int) -> str:
    """Cut a text to at most `limit` characters, between words if that loses less than half.

    Example:
        >>> clip_text("The cache keeps answers.", 12), clip_text("unbelievable", 4)
        ('The cache', 'unbe')
    """
    if len(text) <= limit:
        return text
    end = text.rfind(" ", 0, limit + 1)
    return text[: end if end > limit // 2 else limit].rstrip(" ,;:")


def _matching(pattern: str, words: Any, nth: int) -> Found:
    """Find a word that a pattern matches; patterns that may take very long are not tried."""
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return Found(UNKNOWN, False)
    if _SLOW_PATTERN.search(pattern):
        return Found(UNKNOWN, False)
    matching = list(dict.fromkeys(w for w in words if 0 < len(w) <= 64 and compiled.search(w)))
    return Found(matching[nth], True) if nth < len(matching) else Found(UNKNOWN, False)


def _mapping(value: object) -> Schema:
    return cast("Schema", value) if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[Any]:
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def _ref(schema: Schema) -> str | None:
    ref = schema.get("$ref")
    return ref.rpartition("/")[2] if isinstance(ref, str) else None


def _kind(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((k for k in cast("list[object]", kind) if k != "null"), "null")
    if isinstance(kind, str):
        return kind
    return "object" if "properties" in schema else "array" if "items" in schema else "string"


def _size(schema: Schema, name: str, default: int) -> int:
    size = schema.get(name)
    return size if isinstance(size, int) and size >= 0 else default


def _number_bounds(schema: Schema, *, whole: bool) -> tuple[float, float]:
    """Read the bounds, both inclusive: an exclusive one moves in by 1 or by the next float."""
    low: float = -math.inf
    high: float = math.inf
    if isinstance(given := schema.get("minimum"), int | float):
        low = given
    if isinstance(given := schema.get("exclusiveMinimum"), int | float):
        low = max(low, math.floor(given) + 1 if whole else math.nextafter(given, math.inf))
    if isinstance(given := schema.get("maximum"), int | float):
        high = given
    if isinstance(given := schema.get("exclusiveMaximum"), int | float):
        high = min(high, math.ceil(given) - 1 if whole else math.nextafter(given, -math.inf))
    return low, high
