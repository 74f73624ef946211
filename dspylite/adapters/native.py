"""Features of a model that stand in for text: its tool calls, its reasoning, its citations.

Loaded for signatures that have a use for them only. Not here: which those are
(`adapters/features.py`), how the rest is written and read (`adapters/base.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspylite.abc import LanguageModel
from dspylite.adapters.features import NativeFeatures, special_fields, without
from dspylite.adapters.types.base import Type
from dspylite.adapters.types.tools import Tool, ToolCalls
from dspylite.errors import AdapterParseError, SignatureError
from dspylite.schema.messages import LMOutput
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.signature import Signature

_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")

Parse = Callable[[type[Signature], LMOutput], dict[str, Any]]
"""Reads the outputs of a signature from the text of an answer."""


def plan_native(
    features: NativeFeatures,
    signature: type[Signature],
    inputs: Mapping[str, Any],
    lm: LanguageModel,
    params: Mapping[str, Any],
) -> AdapterPlan:
    """Leave to the model's features what they can do, and take it out of what is written.

    Raises:
        SignatureError: Tool calls are wanted and there is no input for the tools.
    """
    found, written, asked = special_fields(signature), signature, dict(params)
    if found.calls is not None and features.function_calling and found.tools is None:
        raise SignatureError(
            f"`{signature.__name__}` has the output `{found.calls}` for tool calls, and no "
            "input with the tools; add one of the type `list[Tool]`."
        )
    if found.calls is not None and found.tools is not None:
        if features.function_calling and "function_calling" in lm.capabilities:
            written = without(written, (found.calls, found.tools))
            asked = {**_tool_params(features, inputs[found.tools]), **asked}
        else:  # the tools stand in the text, and a request without them must not choose one
            asked = {name: value for name, value in asked.items() if name not in _OF_TOOLS}
    for name, kind in found.beside.items():
        if features.takes(kind):
            written = kind.adapt_to_native_lm_feature(written, name, lm, asked)
    return AdapterPlan(signature=signature, written=written, params=asked)


def written_tools(given: Any) -> Any:
    """Return the value of an input for tools as it is written into a prompt: functions as `Tool`s.

    Raises:
        ToolError: A function cannot be called by a model.
    """
    if isinstance(given, list | tuple):
        return [_as_tool(each) if callable(each) else each for each in given]
    return _as_tool(given) if callable(given) else given


def _as_tool(given: Any) -> Tool:
    return given if isinstance(given, Tool) else Tool(given)


def _tool_params(features: NativeFeatures, given: Any) -> dict[str, Any]:
    tools = list(given) if isinstance(given, list | tuple) else [given]
    definitions = [_as_tool(each).format_as_litellm_function_call() for each in tools]
    params: dict[str, Any] = {"tools": definitions} if definitions else {}
    if definitions and features.parallel_tool_calls is not None:
        params |= {"parallel_tool_calls": features.parallel_tool_calls, "tool_choice": "auto"}
    return params


def read_native(plan: AdapterPlan, output: LMOutput, parse: Parse) -> dict[str, Any]:
    """Read an answer of which parts may have come beside its text.

    Raises:
        AdapterParseError: The text is not one complete value for every output written in it, or
            the arguments of a call are no JSON.
    """
    found, written = special_fields(plan.signature), plan.written
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
