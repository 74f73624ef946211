"""`BAMLAdapter`: JSON whose form is shown in a short notation in place of a JSON schema.

Not here: how the object is read (`adapters/json.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspylite.adapters.base import list_fields
from dspylite.adapters.features import special_fields
from dspylite.adapters.json import JSONAdapter
from dspylite.adapters.types.base import Type
from dspylite.adapters.values import json_schemas, to_json
from dspylite.schema.signature import Signature

COMMENT_SYMBOL = "#"
"""Opens a comment of the notation."""

INDENTATION = "  "
"""Stands before each line of what is inside of an object."""

_SIMPLE = {
    "string": "string",
    "integer": "int",
    "number": "float",
    "boolean": "boolean",
    "null": "null",
}
_BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
    "minLength": "min length",
    "maxLength": "max length",
    "minItems": "min items",
    "maxItems": "max items",
    "minProperties": "min items",
    "maxProperties": "max items",
    "pattern": "pattern",
}


_CONSTRAINTS = {
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "multiple_of": "multiple of",
    "min_length": "min length",
    "max_length": "max length",
    "pattern": "pattern",
}


class BAMLAdapter(JSONAdapter):
    """Asks for one JSON object, and shows its types in a notation like BAML's.

    The prompt is shorter than with JSON schemas and easier to follow for small models. Descriptions
    of fields and docstrings of models stand in it as comments. Answers are read as `JSONAdapter`
    reads them.

    Args are those of `JSONAdapter`.

    Example:
        >>> from dspylite.schema.signature import make_signature
        >>> print(BAMLAdapter().format_field_structure(make_signature("note -> tags: list[str]")))
        Answer with one JSON object and nothing else, all keys in double quotes, of this form:
        <BLANKLINE>
        {
          tags: string[],
        }

    Source:
        The notation: https://docs.boundaryml.com/guide/baml-basics/prompt-engineering
    """

    def format_field_description(self, signature: type[Signature]) -> str:
        """List the inputs; the outputs are part of the form."""
        history = special_fields(signature).history
        inputs = {n: field for n, field in signature.input_fields.items() if n != history}
        return f"Inputs:\n{list_fields(inputs, outputs=False)}" if inputs else ""

    def format_field_structure(self, signature: type[Signature]) -> str:
        """Show the object with the type of each key."""
        if not signature.output_fields:
            return ""
        return (
            "Answer with one JSON object and nothing else, all keys in double quotes, of this "
            f"form:\n\n{notation(signature)}"
        )


def notation(signature: type[Signature]) -> str:
    """Write the form of an answer.

    A model that holds itself is written once, below the object, and named elsewhere.
    """
    fields = signature.output_fields
    properties, definitions = json_schemas({n: field.annotation for n, field in fields.items()})
    for name, field in fields.items():
        kind = field.annotation
        own = kind.description() if isinstance(kind, type) and issubclass(kind, Type) else ""
        properties[name] = {**properties[name], **_desc(field.desc)}
        if own:
            properties[name] = {"x-own": own, **_desc(field.desc)}
        bounds = [
            f"{_CONSTRAINTS.get(key, key)} {to_json(value)}"
            for key, value in field.constraints
            if key != "examples"
        ]
        if bounds and not own:
            properties[name]["x-bounds"] = ", ".join(bounds)
    writer = _Writer(definitions)
    parts = [writer.object(properties, 0)]
    for name in writer.named:  # which grows meanwhile
        comments = writer.comments(definitions[name].get("description"), 0)
        parts.append("\n".join([*comments, f"{name}: {writer.whole(definitions[name])}"]))
    return "\n\n".join(parts)


def _desc(text: str) -> dict[str, str]:
    return {"description": text} if text else {}


class _Writer:
    """Writes JSON schemas in the notation."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._recursive = {name for name in definitions if name in self._reached(name)}
        self.named: list[str] = []

    def _reached(self, name: str) -> set[str]:
        seen: set[str] = set()
        rest = list(_references(self._definitions[name]))
        while rest:
            each = rest.pop()
            if each not in seen and each in self._definitions:
                seen.add(each)
                rest += _references(self._definitions[each])
        return seen

    def whole(self, schema: Mapping[str, Any]) -> str:
        """Write what a name stands for."""
        return self._type(schema, 0)

    def comments(self, text: Any, indent: int) -> list[str]:
        """Write lines of comment."""
        if not isinstance(text, str):
            return []
        lines = (line.strip() for line in text.splitlines())
        return [f"{INDENTATION * indent}{COMMENT_SYMBOL} {line}" for line in lines if line]

    def object(self, properties: Mapping[str, Any], indent: int) -> str:
        """Write the keys of an object with their types."""
        lines = ["{"]
        for key, schema in properties.items():
            shown = self.comments(schema.get("description"), indent + 1)
            for name in _references_beside(schema):
                if name not in self._recursive:
                    inner = self._definitions.get(name, {}).get("description")
                    shown += [c for c in self.comments(inner, indent + 1) if c not in shown]
            lines += shown
            name = key if key.isidentifier() else json.dumps(key, ensure_ascii=False)
            lines.append(f"{INDENTATION * (indent + 1)}{name}: {self._type(schema, indent + 1)},")
        return "\n".join([*lines, f"{INDENTATION * indent}}}"])

    def _type(self, schema: Any, indent: int) -> str:
        if not isinstance(schema, Mapping):
            return "any"
        if "x-own" in schema:
            return str(schema["x-own"])
        bounds = [str(schema["x-bounds"])] if "x-bounds" in schema else []
        bounds += [
            f"{word} {json.dumps(schema[key], ensure_ascii=False)}"
            for key, word in _BOUNDS.items()
            if key in schema
        ]
        if "prefixItems" in schema:  # whose number shows
            bounds = []
        for key in ("format", "contentMediaType"):
            if isinstance(schema.get(key), str):
                bounds.insert(0, schema[key])
        shape = self._shape(schema, indent)
        if bounds and " or " in shape:
            shape = f"({shape})"
        return f"{shape} ({', '.join(bounds)})" if bounds else shape

    def _shape(self, schema: Mapping[str, Any], indent: int) -> str:
        if "$ref" in schema:
            return self._named(schema["$ref"].rpartition("/")[2], indent)
        if "const" in schema:
            return json.dumps(schema["const"], ensure_ascii=False)
        if "enum" in schema:
            return " or ".join(json.dumps(each, ensure_ascii=False) for each in schema["enum"])
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                choices = sorted(schema[key], key=_is_null)
                shapes = [self._type(each, indent) for each in choices]
                return " or ".join(dict.fromkeys(shapes))
        if schema.get("type") == "array":
            return self._array(schema, indent)
        if schema.get("type") == "object":
            if schema.get("properties"):
                return self.object(schema["properties"], indent)
            others = schema.get("additionalProperties")
            inner = self._type(others, indent) if isinstance(others, Mapping) else "any"
            keys = schema.get("propertyNames")
            return f"dict[{self._type(keys, indent) if keys else 'string'}, {inner}]"
        return _SIMPLE.get(str(schema.get("type")), "any")

    def _named(self, name: str, indent: int) -> str:
        if name in self._recursive:
            if name not in self.named:
                self.named.append(name)
            return name
        return self._type(self._definitions.get(name, {}), indent)

    def _array(self, schema: Mapping[str, Any], indent: int) -> str:
        if isinstance(first := schema.get("prefixItems"), list):
            return f"[{', '.join(self._type(each, indent) for each in first)}]"
        inner = self._type(schema.get("items", {}), indent + 1)
        if inner.startswith("{"):
            inside = INDENTATION * (indent + 1)
            return f"[\n{inside}{inner}\n{INDENTATION * indent}]"
        return f"({inner})[]" if " " in inner else f"{inner}[]"


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "null"


def _references(node: Any) -> list[str]:
    found: list[str] = []
    rest = [node]
    while rest:
        each = rest.pop()
        if isinstance(each, Mapping):
            if isinstance(each.get("$ref"), str):
                found.append(each["$ref"].rpartition("/")[2])
            rest += each.values()
        elif isinstance(each, list):
            rest += each
    return found


def _references_beside(schema: Mapping[str, Any]) -> list[str]:
    """Name what a key refers to itself, also beside null or in a list, and not deeper."""
    items = schema.get("items")
    each = [schema, *schema.get("anyOf", ()), *([items] if isinstance(items, Mapping) else [])]
    return [e["$ref"].rpartition("/")[2] for e in each if isinstance(e.get("$ref"), str)]
