"""Features of a model that stand in for text: its tool calls, its reasoning, its citations.

Not here: how the rest is written and read (`adapters/base.py`), and the types themselves.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspylite.abc import LanguageModel
from dspylite.adapters.types.base import Type
from dspylite.adapters.types.tools import Tool, ToolCalls
from dspylite.errors import AdapterParseError, SignatureError
from dspylite.schema.messages import LMOutput
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.signature import Signature

_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")

Parse = Callable[[type[Signature], LMOutput], dict[str, Any]]
"""Reads the outputs of a signature from the text of an answer."""


@dataclass(frozen=True, slots=True)
class NativeFeatures:
    """Which features of a model an adapter uses, and how.

    Attributes:
        function_calling: Whether tools are called in the model's own way.
        response_types: Types of outputs that may come beside the text; None for every type that
            knows how.
        parallel_tool_calls: Whether several calls at once are allowed; None leaves it open.
    """

    function_calling: bool = False
    response_types: Sequence[type[Type]] | None = None
    parallel_tool_calls: bool | None = None

    def has_use_for(self, signature: type[Signature]) -> bool:
        """Tell whether any output could come by a feature of the model."""
        found = _special_fields(signature)
        return found.calls is not None or any(self._takes(kind) for kind in found.beside.values())

    def _takes(self, kind: type[Type]) -> bool:
        return self.response_types is None or kind in self.response_types

    def plan(
        self,
        signature: type[Signature],
        inputs: Mapping[str, Any],
        lm: LanguageModel,
        params: Mapping[str, Any],
    ) -> AdapterPlan:
        """Leave to the model's features what they can do, and take it out of what is written.

        Raises:
            SignatureError: Tool calls are wanted and there is no input for the tools.
        """
        found, written, asked = _special_fields(signature), signature, dict(params)
        if found.calls is not None and self.function_calling and found.tools is None:
            raise SignatureError(
                f"`{signature.__name__}` has the output `{found.calls}` for tool calls, and no "
                "input with the tools; add one of the type `list[Tool]`."
            )
        if found.calls is not None and found.tools is not None:
            if self.function_calling and "function_calling" in lm.capabilities:
                written = without(written, (found.calls, found.tools))
                asked = {**self._tool_params(inputs[found.tools]), **asked}
            else:  # the tools stand in the text, and a request without them must not choose one
                asked = {name: value for name, value in asked.items() if name not in _OF_TOOLS}
        for name, kind in found.beside.items():
            if self._takes(kind):
                written = kind.adapt_to_native_lm_feature(written, name, lm, asked)
        return AdapterPlan(signature=signature, written=written, params=asked)

    def _tool_params(self, given: Any) -> dict[str, Any]:
        tools = list(given) if isinstance(given, list | tuple) else [given]
        definitions = [
            (each if isinstance(each, Tool) else Tool(each)).format_as_litellm_function_call()
            for each in tools
        ]
        params: dict[str, Any] = {"tools": definitions} if definitions else {}
        if definitions and self.parallel_tool_calls is not None:
            params |= {"parallel_tool_calls": self.parallel_tool_calls, "tool_choice": "auto"}
        return params

    def read(self, plan: AdapterPlan, output: LMOutput, parse: Parse) -> dict[str, Any]:
        """Read an answer of which parts may have come beside its text.

        Raises:
            AdapterParseError: The text is not one complete value for every output written in it, or
                the arguments of a call are no JSON.
        """
        found, written = _special_fields(plan.signature), plan.written
        calls = None
        if found.calls is not None and output.tool_calls:
            calls = _tool_calls(plan, output)
        values: dict[str, Any] = {}
        if calls is None or (output.text.strip() and written.output_fields):
            try:
                values = parse(written, output) if written.output_fields else {}
            except AdapterParseError:
                if calls is None:
                    raise  # beside calls a model may write, or not write, what it likes
        beside = _as_dict(output)
        for name, kind in found.beside.items():
            if name not in written.output_fields or name not in values:
                values[name] = _beside(plan, kind, beside)
        if calls is not None and found.calls is not None:
            values[found.calls] = calls
        return {name: values.get(name) for name in plan.signature.output_fields}


def _beside(plan: AdapterPlan, kind: type[Type], response: Mapping[str, Any]) -> Any:
    try:
        return kind.parse_lm_response(response)
    except ValueError as error:  # pydantic's is one too
        reason = " ".join(str(error).split())
        raise AdapterParseError(
            kind.__name__, plan.signature, str(response.get("text", "")), reason
        ) from error


def _tool_calls(plan: AdapterPlan, output: LMOutput) -> ToolCalls:
    try:
        return ToolCalls.from_dict_list(output.tool_calls)
    except ValueError as error:  # pydantic's is one too
        reason = " ".join(str(error).split())
        raise AdapterParseError(
            "ToolCalls",
            plan.signature,
            str(list(output.tool_calls)),
            f"A tool call cannot be read: {reason}.",
        ) from error


def _as_dict(output: LMOutput) -> dict[str, Any]:
    given = {
        "text": output.text,
        "reasoning_content": output.reasoning,
        "tool_calls": list(output.tool_calls),
        "citations": list(output.citations),
    }
    return {name: value for name, value in given.items() if value}


class _Special(typing.NamedTuple):
    """Fields of a signature that a feature of the model may serve."""

    tools: str | None
    calls: str | None
    beside: Mapping[str, type[Type]]


@functools.lru_cache(maxsize=1024)
def _special_fields(signature: type[Signature]) -> _Special:
    tools = next(
        (
            name
            for name, field in signature.input_fields.items()
            if field.annotation is Tool
            or (
                typing.get_origin(field.annotation) in (list, tuple, Sequence)
                and typing.get_args(field.annotation)[:1] == (Tool,)
            )
        ),
        None,
    )
    outputs = {
        name: field.annotation
        for name, field in signature.output_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Type)
    }
    calls = next((name for name, kind in outputs.items() if kind is ToolCalls), None)
    hook = "adapt_to_native_lm_feature"
    beside = {
        name: kind
        for name, kind in outputs.items()
        if getattr(kind, hook).__func__ is not getattr(Type, hook).__func__
    }
    return _Special(tools, calls, beside)


@functools.lru_cache(maxsize=1024)
def without(signature: type[Signature], names: tuple[str, ...]) -> type[Signature]:
    """Return a signature without some fields; made once."""
    for name in names:
        signature = signature.delete(name)
    return signature
