"""A conversation as messages: the turns of a `History`, with the calls of tools in them.

Loaded for signatures with such an input only. Not here: how the values of one turn are written
(`adapters/base.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import pydantic

from dspylite.adapters.content import ContentBuilder
from dspylite.adapters.features import without
from dspylite.adapters.types.history import History
from dspylite.adapters.types.tools import ToolCall, ToolCallResult, ToolCallResults, ToolCalls
from dspylite.adapters.values import format_value, to_json
from dspylite.errors import InputFieldError
from dspylite.schema.messages import Message
from dspylite.schema.signature import Signature

RESULTS = "tool_call_results"
"""Name under which results are told to a model that knows no messages of tools."""


class Writer(Protocol):
    """What writes the values of one turn; an `Adapter`."""

    def format_user_message_content(
        self, signature: type[Signature], inputs: Mapping[str, Any], prefix: str = ""
    ) -> str | list[dict[str, Any]]:
        """Write the inputs."""
        ...

    def format_assistant_message_content(
        self, signature: type[Signature], outputs: Mapping[str, Any]
    ) -> str:
        """Write the outputs."""
        ...

    def format_input(self, signature: type[Signature], name: str, text: str) -> str:
        """Write one input."""
        ...

    def escape(self, signature: type[Signature], text: str) -> str:
        """Make text of others harmless."""
        ...

    @property
    def use_native_function_calling(self) -> bool:
        """Whether calls are told in the provider's own form."""
        ...


def turns_of(name: str, given: Any) -> Sequence[Mapping[str, Any]]:
    """Return the turns of a conversation, which may also come as DSPy's saved dict or as a list.

    Raises:
        InputFieldError: It is none.
    """
    if given is None:
        return ()
    if isinstance(given, History):
        return given.messages
    try:
        return History.model_validate(
            {"messages": given} if isinstance(given, list) else given
        ).messages
    except pydantic.ValidationError:
        raise InputFieldError(
            f"The input `{name}` must be a `History` of turns, each a dict of values by field; not "
            f"a value of the type `{type(given).__name__}`."
        ) from None


def conversation(
    writer: Writer, signature: type[Signature], turns: Iterable[Mapping[str, Any]]
) -> list[Message]:
    """Write turns as messages. A turn holds inputs, outputs or both; other keys are passed over."""
    messages: list[Message] = []
    for turn in turns:
        given = tuple(name for name in signature.input_fields if turn.get(name) is not None)
        if given:
            # Adapters escape by the whole signature, so it is cut only where a value is missing.
            is_whole = all(n in given or not f.required for n, f in signature.input_fields.items())
            asked = signature if is_whole else _only(signature, given)
            content = writer.format_user_message_content(asked, {n: turn[n] for n in given})
            messages.append({"role": "user", "content": content})
        messages += _answer(writer, signature, turn)
    return messages


def _answer(writer: Writer, signature: type[Signature], turn: Mapping[str, Any]) -> list[Message]:
    name, calls = _calls_of(turn)
    results = None
    if calls is not None and calls.tool_call_results is not None:
        results = ToolCallResults.model_validate(calls.tool_call_results)
    # Where the model must write its calls as text, it is shown them as text too.
    is_native = calls is not None and writer.use_native_function_calling
    is_native = is_native and name not in signature.output_fields
    said = tuple(
        each
        for each in signature.output_fields
        if turn.get(each) is not None and not (is_native and each == name)
    )
    shown = dict(turn)
    if calls is not None and name is not None and not is_native:
        shown[name] = ToolCalls(tool_calls=calls.tool_calls)
    values = {each: shown[each] for each in said}
    text = writer.format_assistant_message_content(signature, values) if said else ""
    messages: list[Message] = []
    if is_native and calls is not None and results is not None and _belong(calls, results):
        wanted = [_as_message_call(call) for call in calls.tool_calls]
        messages.append({"role": "assistant", "content": text or None, "tool_calls": wanted})
        pictured: list[ToolCallResult] = []
        for result in results.tool_call_results:
            sink = ContentBuilder()
            value = writer.escape(signature, format_value(result.value, sink))
            if sink.has_parts:  # which many providers refuse in a message of a tool
                pictured.append(result)
                value = "(in the next message)"
            messages.append(
                {"role": "tool", "tool_call_id": result.call_id or "", "content": value}
            )
        return [*messages, _told(writer, signature, pictured)] if pictured else messages
    if text:
        messages.append({"role": "assistant", "content": text})
    if results is not None:
        messages.append(_told(writer, signature, results.tool_call_results))
    return messages


def _told(writer: Writer, signature: type[Signature], results: Iterable[ToolCallResult]) -> Message:
    """Write results as an input, with their parts that are no text."""
    builder = ContentBuilder(functools.partial(writer.escape, signature))
    listed = to_json([dict(result) for result in results], sink=builder)
    told = writer.format_input(signature, RESULTS, listed)
    return {"role": "user", "content": builder.content(told)}


def _calls_of(turn: Mapping[str, Any]) -> tuple[str | None, ToolCalls | None]:
    for name, value in turn.items():
        if isinstance(value, ToolCalls):
            return name, value
        if isinstance(value, Mapping) and "tool_calls" in value:
            return name, ToolCalls.model_validate(dict(value))
    return None, None


def _belong(calls: ToolCalls, results: ToolCallResults) -> bool:
    """Tell whether each call has an id and its own result, as providers demand."""
    ids = [call.id for call in calls.tool_calls]
    return all(ids) and ids == [result.call_id for result in results.tool_call_results]


def _as_message_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": to_json(call.args)}
    return {"id": call.id, "type": "function", "function": function}


def _only(signature: type[Signature], names: tuple[str, ...]) -> type[Signature]:
    return without(signature, tuple(name for name in signature.fields if name not in names))
