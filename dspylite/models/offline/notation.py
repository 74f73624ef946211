"""Reads the notation in which a prompt may show the form of a JSON object, back into a schema.

Not here: what else a prompt asks for (`prompts.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 64
"""Deepest nesting that is read."""

_SIMPLE: Mapping[str, Mapping[str, Any]] = {
    "string": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "any": {},
}
_BOUNDS: Mapping[str, tuple[str, ...]] = {  # must match `adapters/baml.py`
    ">=": ("minimum",),
    ">": ("exclusiveMinimum",),
    "<=": ("maximum",),
    "<": ("exclusiveMaximum",),
    "multiple of": ("multipleOf",),
    "min length": ("minLength", "minItems", "minProperties"),
    "max length": ("maxLength", "maxItems"),
    "min items": ("minItems", "minProperties"),
    "max items": ("maxItems", "maxProperties"),
    "pattern": ("pattern",),
}
_BLANK = re.compile(r"\s*")
_COMMENT = re.compile(r"[ \t\n]*# ([^\n]*)\n")
_BARE_KEY = re.compile(r"[^\s:,{}\[\]()\"]+")
_WORD = re.compile(r"[^\s,{}\[\]()\"]+")
_BOUND = re.compile(r"(>=|>|<=|<|multiple of|m(?:in|ax) (?:length|items)|pattern) ")
_FORMAT = re.compile(r"[a-z][a-z0-9/+-]*(?=[,)])")
_NAMED = re.compile(r"\n\n(?:# [^\n]*\n)*([^\s:]+): (?=\{|\(|\[|\")")
_DECODER = json.JSONDecoder()


def read_notation(text: str, start: int) -> dict[str, Any]:
    r"""Read an object and the named ones below it, from a place in a prompt on.

    What is not understood becomes a schema that anything fits.

    Example:
        >>> read_notation("{\n  n: int (>= 1),\n}", 0)["properties"]
        {'n': {'type': 'integer', 'minimum': 1}}
    """
    reader = _Reader(text, start)
    try:
        whole = reader.object(0)
    except (ValueError, RecursionError):
        return {"type": "object", "properties": reader.properties}
    definitions: dict[str, Any] = {}
    while named := _NAMED.match(text, reader.place):
        reader.place = named.end()
        try:
            definitions[named[1]] = reader.type(0)
        except (ValueError, RecursionError):
            break
    return {**whole, "$defs": definitions} if definitions else whole


class _Reader:
    """A place in a text, moved on by what is read there."""

    def __init__(self, text: str, place: int) -> None:
        self.text = text
        self.place = place
        self.properties: dict[str, Any] = {}

    def _takes(self, word: str) -> bool:
        found = self.text.startswith(word, self.place)
        self.place += len(word) if found else 0
        return found

    def _blank(self) -> None:
        found = _BLANK.match(self.text, self.place)
        self.place = found.end() if found else self.place

    def _json(self) -> Any:
        value, self.place = _DECODER.raw_decode(self.text, self.place)
        return value

    def object(self, depth: int) -> dict[str, Any]:
        """Read `{key: type, ...}`."""
        if not self._takes("{"):
            raise ValueError("no object")
        properties: dict[str, Any] = {}
        if depth == 0 and not self.properties:
            self.properties = properties  # also if the rest cannot be read
        while True:
            comments: list[str] = []
            while comment := _COMMENT.match(self.text, self.place):
                comments.append(comment[1])
                self.place = comment.end()
            self._blank()
            if self._takes("}"):
                return {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                }
            key = self._key()
            if not self._takes(": "):
                raise ValueError("no type")
            start = self.place
            try:
                schema = self.type(depth + 1)
                if not self.text.startswith(",\n", self.place):
                    raise ValueError("words")
            except ValueError:  # a type that describes itself in words
                schema = {}
                end = self.text.find(",\n", start)
                self.place = end if end >= 0 else len(self.text)
            self._takes(",")
            if comments:
                schema = {**schema, "description": " ".join(comments)}
            properties[key] = schema

    def _key(self) -> str:
        if self.text.startswith('"', self.place):
            return str(self._json())
        found = _BARE_KEY.match(self.text, self.place)
        if found is None:
            raise ValueError("no key")
        self.place = found.end()
        return found[0]

    def type(self, depth: int) -> dict[str, Any]:
        """Read alternatives between "or"."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        choices = [self._bounded(depth)]
        while self._takes(" or "):
            choices.append(self._bounded(depth))
        values = [each["const"] for each in choices if each.keys() == {"const"}]
        if len(values) > 1:
            choices = [{"enum": values}, *(each for each in choices if each.keys() != {"const"})]
        return choices[0] if len(choices) == 1 else {"anyOf": choices}

    def _bounded(self, depth: int) -> dict[str, Any]:
        schema = self._atom(depth)
        while self._takes("[]"):
            schema = {"type": "array", "items": schema}
        if not self._takes(" ("):
            return schema
        bounds: dict[str, Any] = {}
        while not self._takes(")"):
            if found := _BOUND.match(self.text, self.place):
                self.place = found.end()
                bounds.update(dict.fromkeys(_BOUNDS[found[1]], self._json()))
            elif found := _FORMAT.match(self.text, self.place):
                self.place = found.end()
                bounds["contentMediaType" if "/" in found[0] else "format"] = found[0]
            else:
                raise ValueError("no bound")
            self._takes(", ")
        if isinstance(branches := schema.get("anyOf"), list):
            return {**schema, **bounds, "anyOf": [{**branch, **bounds} for branch in branches]}
        return {**schema, **bounds}

    def _atom(self, depth: int) -> dict[str, Any]:
        char = self.text[self.place : self.place + 1]
        if char == "{":
            return self.object(depth)
        if self._takes("("):
            schema = self.type(depth + 1)
            if not self._takes(")"):
                raise ValueError("not closed")
            return schema
        if self._takes("["):
            return self._array(depth)
        if self._takes("dict["):
            keys = self.type(depth + 1)
            self._takes(", ")
            values = self.type(depth + 1)
            if not self._takes("]"):
                raise ValueError("not closed")
            names = {} if keys == {"type": "string"} else {"propertyNames": keys}
            return {"type": "object", "additionalProperties": values, **names}
        if char == '"':
            return {"const": self._json()}
        found = _WORD.match(self.text, self.place)
        if found is None:
            raise ValueError("no type")
        self.place = found.end()
        word = found[0]
        if word in _SIMPLE:
            return dict(_SIMPLE[word])
        try:
            return {"const": _DECODER.decode(word)}
        except ValueError:
            return {"$ref": f"#/$defs/{word}"}

    def _array(self, depth: int) -> dict[str, Any]:
        is_list = self.text.startswith("\n", self.place)
        self._blank()
        items: list[Any] = []
        while not self._takes("]"):
            items.append(self.type(depth + 1))
            self._takes(", ")
            self._blank()
        if is_list:
            return {"type": "array", "items": items[0] if items else {}}
        count = len(items)
        return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}
