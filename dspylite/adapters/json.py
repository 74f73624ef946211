"""`JSONAdapter`: all outputs as one JSON object.

With the provider's structured output where it has it.
Not here: mending and bounding of JSON (`adapters/values.py`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dspylite.abc import LanguageModel
from dspylite.adapters.base import Adapter
from dspylite.adapters.streaming import FieldReader
from dspylite.adapters.streaming_json import ObjectReader
from dspylite.adapters.values import json_schemas, parse_json, to_json, validate
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.signature import Signature

if TYPE_CHECKING:
    from dspylite.adapters.types.base import Type

MAX_OBJECTS = 16
"""Objects looked at in an answer that wraps its own in prose; more of them is ambiguous anyway."""

_STRUCTURE = re.compile(r'[{}"\\]')
_OPENING = re.compile(r"\{\s*[\"'/]")  # of an object; prose and formulas have braces too


class JSONAdapter(Adapter):
    """Asks for one JSON object that holds every output, and reads it back.

    Where the model takes a JSON schema the request carries one, so that the answer cannot have
    another shape.

    Args:
        callbacks: Told of every format and parse.
        use_native_function_calling: As for `Adapter`, but on by default.
        parallel_tool_calls: As for `Adapter`.
        native_response_types: As for `Adapter`.
    """

    saved_parameters = ("use_native_function_calling", "parallel_tool_calls")

    def __init__(
        self,
        callbacks: Sequence[Any] | None = None,
        use_native_function_calling: bool = True,
        parallel_tool_calls: bool | None = None,
        native_response_types: Sequence[type[Type]] | None = None,
    ) -> None:
        super().__init__(
            callbacks, use_native_function_calling, native_response_types, parallel_tool_calls
        )

    def needs_capabilities(self, signature: type[Signature]) -> bool:
        """Always: structured output depends on them."""
        del signature
        return True

    def prepare(
        self,
        signature: type[Signature],
        inputs: Mapping[str, Any],
        lm: LanguageModel,
        params: Mapping[str, Any],
    ) -> AdapterPlan:
        """Ask for the provider's structured output too, in the strictest form that it has."""
        plan = super().prepare(signature, inputs, lm, params)
        if "tools" in plan.params or not plan.written.output_fields:
            return plan  # the answer may be calls alone, and no JSON at all
        form = _structured(plan.written, lm.capabilities)
        return replace(plan, params={**form, **plan.params})

    def format_field_structure(self, signature: type[Signature]) -> str:
        """Show the keys of the object."""
        if not signature.output_fields:
            return ""
        shape = ", ".join(f'"{name}": <{name}>' for name in signature.output_fields)
        return f"Answer with one JSON object and nothing else:\n\n{{{shape}}}"

    def user_message_output_requirements(self, signature: type[Signature]) -> str:
        """Name the keys to write."""
        if not signature.output_fields:
            return ""
        names = ", ".join(f"`{name}`" for name in signature.output_fields)
        return f"Write one JSON object with the keys {names}."

    def format_assistant_message_content(
        self,
        signature: type[Signature],
        outputs: Mapping[str, Any],
        missing_field_message: str | None = None,
    ) -> str:
        """Write the object of an answer; keys that are missing are null."""
        names = [
            name
            for name in signature.output_fields
            if name in outputs or missing_field_message is not None
        ]
        return to_json({name: outputs.get(name) for name in names}, indent=2)

    def parse(
        self, signature: type[Signature], completion: str, *, finish_reason: str | None = "stop"
    ) -> dict[str, Any]:
        """Read the object of an answer, also from a code fence or out of surrounding prose.

        Raises:
            AdapterParseError: There is no such object or more than one, it is cut, a key is missing
                or comes twice, or a value does not fit its type.
        """
        del finish_reason  # the object's own closing brace tells that it is whole
        try:
            value = parse_json(completion)
        except ValueError as error:
            value = self._find_object(signature, completion, str(error))
        if not isinstance(value, dict):
            raise self.error(signature, completion, "The answer is JSON, but not one object.")
        return self.read_fields(signature, completion, value, validate)

    def stream_reader(self, signature: type[Signature]) -> FieldReader | None:
        """Make a reader of the object; None where a subclass reads answers in a way of its own."""
        if type(self).parse is not JSONAdapter.parse:
            return None
        return ObjectReader(signature.output_fields)

    def _find_object(self, signature: type[Signature], completion: str, reason: str) -> Any:
        spans, stray, cut = _outermost_braces(completion)
        if cut:  # what is closed already may lie inside, and would be taken for the whole
            reason = "it is cut, for a brace is never closed"
            raise self.error(signature, completion, f"The answer is not one JSON object: {reason}.")
        spans = [span for span in spans if _OPENING.match(completion, span[0])]
        found: list[dict[str, Any]] = []
        end_found, around = 0, ""
        for start, end in spans[:MAX_OBJECTS]:
            try:
                value = parse_json(completion[start:end])
            except ValueError:
                continue
            if isinstance(value, dict) and any(name in value for name in signature.output_fields):
                found.append(value)
                end_found, around = end, f"{completion[:start]} {completion[end:]}"
        count = len(found) if len(spans) <= MAX_OBJECTS else len(spans)
        if count > 1:
            reason = f"it holds {count} objects, which is ambiguous"
        elif found and (stray > end_found or _keys(signature).search(around)):
            # What ends too early may have been ended by a text quoted in it, without escapes.
            reason = "it goes on behind its end or begins before it, which is ambiguous"
        elif found:
            return found[0]
        raise self.error(signature, completion, f"The answer is not one JSON object: {reason}.")


@functools.lru_cache(maxsize=1024)
def _keys(signature: type[Signature]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in signature.output_fields)
    return re.compile(rf"""(["'])(?:{names})\1\s*:""")


def _outermost_braces(text: str) -> tuple[list[tuple[int, int]], int, bool]:
    """Find the spans of matching braces that lie in no other such span, in one pass.

    Quotes count inside braces only: outside, they are prose.

    Returns:
        The spans in order, the end of the last brace that closes nothing (0 without), and whether a
        brace is opened and never closed.
    """
    stray = 0
    opened: list[int] = []
    spans: list[tuple[int, int]] = []
    in_string, skip = False, -1
    for mark in _STRUCTURE.finditer(text):
        place, char = mark.start(), mark[0]
        if place == skip:
            continue
        if char == "\\":
            skip = place + 1 if in_string else -1
        elif char == '"':
            in_string = bool(opened) and not in_string
        elif in_string:
            continue
        elif char == "{":
            opened.append(place)
        elif opened:
            start = opened.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, place + 1))
        else:
            stray = place + 1
    return spans, stray, bool(opened)


def _structured(signature: type[Signature], capabilities: frozenset[str]) -> dict[str, Any]:
    if "json_schema" in capabilities and (schema := _strict_schema(signature)) is not None:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", signature.__name__)[:64]
        wanted = {"name": name, "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}
    if "json_object" in capabilities or "json_schema" in capabilities:
        return {"response_format": {"type": "json_object"}}
    return {}


def _strict_schema(signature: type[Signature]) -> dict[str, Any] | None:
    """Make the schema of the whole answer; None where a provider's strict form cannot say it.

    Strict forms want every key of every object named and required, so free-form dicts do not fit.
    """
    fields = signature.output_fields.items()
    properties, definitions = json_schemas({name: field.annotation for name, field in fields})
    whole: dict[str, Any] = {"type": "object", "properties": properties}
    if definitions:
        whole["$defs"] = definitions
    return whole if _close(whole) else None


def _close(node: Any) -> bool:
    """Make every object of a schema closed and complete; False if one is free-form."""
    if isinstance(node, list):
        return all(_close(item) for item in node)
    if not isinstance(node, dict):
        return True
    if node.get("type") == "object":
        if not node.get("properties"):
            return False
        node["additionalProperties"] = False
        node["required"] = list(node["properties"])
        for prop in node["properties"].values():
            if isinstance(prop, dict):
                prop.pop("default", None)
    elif not node:
        return False
    return all(_close(value) for value in node.values())
