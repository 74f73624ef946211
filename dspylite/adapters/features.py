"""What a signature's types ask of an adapter beyond text: tools, outputs beside it, a conversation.

Looks at marks of the types (`kind_of`), and loads none of them: most programs use none. Not here:
what is then done (`adapters/native.py`, `adapters/turns.py`).
"""

from __future__ import annotations

import enum
import functools
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspylite.adapters.content import kind_of
from dspylite.schema.grammar import register_type
from dspylite.schema.signature import Signature

if TYPE_CHECKING:
    from dspylite.adapters.types.base import Type


class Silence(enum.Enum):
    """What stands for a value that is not written."""

    NOT_SAID = "not said again"


NOT_SAID = Silence.NOT_SAID
"""Default of an input that stands in an earlier turn of the conversation."""


class SpecialFields(typing.NamedTuple):
    """Fields of a signature that are more than text in a message.

    Attributes:
        tools: The input with the tools.
        calls: The output for calls of them.
        beside: Outputs that a feature of the model may give, with their types.
        history: The input that holds the conversation.
    """

    tools: str | None
    calls: str | None
    beside: Mapping[str, type[Type]]
    history: str | None


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
        found = special_fields(signature)
        return found.calls is not None or any(self.takes(kind) for kind in found.beside.values())

    def takes(self, kind: type[Type]) -> bool:
        """Tell whether outputs of a type may come beside the text."""
        return self.response_types is None or kind in self.response_types


@functools.lru_cache(maxsize=1024)
def special_fields(signature: type[Signature]) -> SpecialFields:
    """Find the fields of a signature that are more than text in a message."""
    outputs = {name: field.annotation for name, field in signature.output_fields.items()}
    inputs = {name: field.annotation for name, field in signature.input_fields.items()}
    return SpecialFields(
        tools=next((name for name, kind in inputs.items() if _holds_tools(kind)), None),
        calls=next((name for name, kind in outputs.items() if kind_of(kind) == "tool calls"), None),
        beside={
            name: kind
            for name, kind in outputs.items()
            if kind_of(kind) is not None and kind.is_native_output()
        },
        history=next((name for name, kind in inputs.items() if _is_history(kind)), None),
    )


def _holds_tools(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (list, tuple, Sequence):
        annotation = next(iter(typing.get_args(annotation)), None)
    return kind_of(annotation) == "tool"


def _is_history(annotation: Any) -> bool:
    kinds = typing.get_args(annotation) or (annotation,)  # also beside None
    is_union = typing.get_origin(annotation) in {typing.Union, types.UnionType, None}
    return is_union and any(kind_of(kind) == "history" for kind in kinds)


@functools.lru_cache(maxsize=1024)
def without(signature: type[Signature], names: tuple[str, ...]) -> type[Signature]:
    """Return a signature without some fields; made once."""
    for name in names:
        signature = signature.delete(name)
    return signature


_TYPES: Mapping[str, str] = {
    "Audio": "audio",
    "Citations": "citations",
    "Code": "text",
    "Document": "citations",
    "File": "file",
    "History": "history",
    "Image": "image",
    "Reasoning": "text",
    "Tool": "tools",
    "ToolCallResults": "tools",
    "ToolCalls": "tools",
}
"""Types that texts of signatures may name, by the file in `adapters/types/`."""


def _load(name: str) -> type:
    module = importlib.import_module(f"{__package__}.types.{_TYPES[name]}")
    found: type = getattr(module, name)
    return found


for _name in _TYPES:
    register_type(_name, functools.partial(_load, _name))
