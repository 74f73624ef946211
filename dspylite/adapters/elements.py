"""A value that a model has written as nested elements, read by the JSON schema of its type.

Not here: the elements of a whole answer (`adapters/xml.py`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from dspylite.adapters.values import MAX_DEPTH, json_schema, validate
from dspylite.schema.signature import Field

_MARKUP = re.compile(r"<(/?)([^\s<>/]+)\s*(/?)>")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&amp;": "&"}
_ENTITY = re.compile("|".join(_ENTITIES))


class _Element:
    """One element: its name, its text before the first child, its children."""

    __slots__ = ("children", "name", "text")

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = ""
        self.children: list[_Element] = []


def read_elements(field: Field, text: str) -> Any:
    """Read a value of nested elements, such as `<name>Ada</name><tags><item>a</item></tags>`.

    Attributes, declarations and entities of documents are no part of it: nothing is expanded.

    Raises:
        ValueError: The elements are not closed in order, nest too deep, or are no such value.
    """
    root = _Element(field.name)
    root.children = _parse(text)
    schema = _schema_of(field)
    return validate(field, _value([root], schema, schema.get("$defs", {}), 0))


@functools.lru_cache(maxsize=1024)
def _cached_schema(annotation: Any) -> dict[str, Any]:
    return json_schema(annotation)


def _schema_of(field: Field) -> dict[str, Any]:
    try:
        return _cached_schema(field.annotation)
    except TypeError:  # a type that cannot be hashed
        return json_schema(field.annotation)


def _parse(text: str) -> list[_Element]:
    top = _Element("")
    path = [top]
    end = 0
    for mark in _MARKUP.finditer(text):
        between = text[end : mark.start()]
        end = mark.end()
        if not path[-1].children:
            path[-1].text += between
        if mark[1]:
            if len(path) == 1 or path[-1].name != mark[2]:
                raise ValueError(f"the end tag `</{mark[2][:40]}>` closes nothing")
            path.pop()
            continue
        if len(path) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        element = _Element(mark[2])
        path[-1].children.append(element)
        if not mark[3]:
            path.append(element)
    if len(path) > 1:
        raise ValueError(f"`<{path[-1].name[:40]}>` is not closed")
    if top.text.strip() or text[end:].strip():
        raise ValueError("there is text beside the elements")
    return top.children


def _value(
    elements: list[_Element], schema: Mapping[str, Any], definitions: Mapping[str, Any], depth: int
) -> Any:
    schema = _resolved(schema, elements[0], definitions)
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if schema.get("type") == "array":
        inside = _grouped(elements[0])
        items = inside["item"] if len(elements) == 1 and set(inside) == {"item"} else elements
        if len(elements) == 1 and not inside and not elements[0].text.strip():
            return []
        wanted = schema.get("items", {})
        return [_value([item], wanted, definitions, depth + 1) for item in items]
    if len(elements) > 1:
        raise ValueError(f"`<{elements[0].name[:40]}>` comes twice, which is ambiguous")
    element = elements[0]
    if not element.children:
        text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], element.text.strip())
        return {} if schema.get("type") == "object" and not text else text
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", {})
    others = others if isinstance(others, dict) else {}
    return {
        name: _value(found, properties.get(name, others), definitions, depth + 1)
        for name, found in _grouped(element).items()
    }


def _resolved(
    schema: Mapping[str, Any], element: _Element, definitions: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Follow a reference, and of alternatives take the one of the element's shape."""
    for _ in range(MAX_DEPTH):
        if "$ref" in schema:
            schema = definitions.get(schema["$ref"].rpartition("/")[2], {})
        elif "anyOf" in schema:
            choices = [each for each in schema["anyOf"] if each.get("type") != "null"]
            nested = [each for each in choices if each.get("type") not in {"string", "number"}]
            schema = next(iter(nested if element.children and nested else choices), {})
        else:
            break
    return schema


def _grouped(element: _Element) -> dict[str, list[_Element]]:
    groups: dict[str, list[_Element]] = {}
    for child in element.children:
        groups.setdefault(child.name, []).append(child)
    return groups
