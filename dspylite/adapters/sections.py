"""`ChatAdapter`: each output under a header line of its own, closed by an end marker.

Works with any chat model. Not here: how one value is read (`adapters/values.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspylite.adapters.base import Adapter, header, section, texts_of, unfence
from dspylite.adapters.json import JSONAdapter
from dspylite.adapters.streaming import FieldReader, SectionReader
from dspylite.adapters.values import parse_text
from dspylite.schema.signature import Signature

if TYPE_CHECKING:
    from dspylite.adapters.types.base import Type

END = "completed"
"""Name of the end marker; in a signature with an output of this name, of its second header."""

COMPLETE_REASONS = frozenset({"stop", "end_turn", "eos", "tool_calls"})
"""Reasons to stop that mean the model had said everything, by provider's spelling."""

# `\S`, not `\w`: an identifier may hold marks that are no word characters, as in Hindi.
_HEADER = re.compile(r"^[ \t]*\[\[ ## (\S+) ## \]\]", re.MULTILINE)


class ChatAdapter(Adapter):
    """Asks for each output under its own header line and reads them back.

    An answer that does not parse is asked for once more as JSON, unless that is switched off.

    Args:
        callbacks: Told of every format and parse.
        use_native_function_calling: As for `Adapter`.
        native_response_types: As for `Adapter`.
        use_json_adapter_fallback: Whether to ask once more through `JSONAdapter`.
        parallel_tool_calls: As for `Adapter`.
        accept_truncated: Whether an answer that stopped at its length limit is taken as it is, its
            last output cut, instead of being a `TruncatedError`.
    """

    saved_parameters = (
        "use_native_function_calling",
        "use_json_adapter_fallback",
        "parallel_tool_calls",
        "accept_truncated",
    )

    # Of a subclass that never calls `__init__`.
    accept_truncated: bool = False
    use_json_adapter_fallback: bool = False
    _fallback: Adapter | None = None

    def __init__(
        self,
        callbacks: Sequence[Any] | None = None,
        use_native_function_calling: bool = False,
        native_response_types: Sequence[type[Type]] | None = None,
        use_json_adapter_fallback: bool = True,
        parallel_tool_calls: bool | None = None,
        *,
        accept_truncated: bool = False,
    ) -> None:
        super().__init__(
            callbacks, use_native_function_calling, native_response_types, parallel_tool_calls
        )
        self.accept_truncated = accept_truncated
        self.use_json_adapter_fallback = use_json_adapter_fallback
        if use_json_adapter_fallback:
            self._fallback = JSONAdapter(
                callbacks, use_native_function_calling, parallel_tool_calls, native_response_types
            )

    @property
    def fallback(self) -> Adapter | None:
        """`JSONAdapter`, unless switched off."""
        return self._fallback

    def format_field_structure(self, signature: type[Signature]) -> str:
        """Show the sections of an answer."""
        outputs = signature.output_fields
        if not outputs:
            return ""
        shape = "\n\n".join(f"{header(name)}\n<{name}>" for name in outputs)
        return (
            "Write each output below its header line, in this order, then the end marker, and "
            f"nothing else:\n\n{shape}\n\n{header(END)}"
        )

    def user_message_output_requirements(self, signature: type[Signature]) -> str:
        """Name the sections to write."""
        if not signature.output_fields:
            return ""
        names = ", then ".join(f"`{header(name)}`" for name in signature.output_fields)
        return f"Write {names}, then `{header(END)}`."

    def format_assistant_message_content(
        self,
        signature: type[Signature],
        outputs: Mapping[str, Any],
        missing_field_message: str | None = None,
    ) -> str:
        """Write the sections of an answer."""
        texts = texts_of(signature, outputs, missing_field_message)
        return "\n\n".join([*(section(name, text) for name, text in texts), header(END)])

    def parse(
        self, signature: type[Signature], completion: str, *, finish_reason: str | None = "stop"
    ) -> dict[str, Any]:
        """Read the sections of an answer.

        Only the header lines of declared outputs open a section; other text that looks like one is
        part of the value it stands in.

        Raises:
            AdapterParseError: An output is missing, comes twice, does not fit its type, the end
                marker comes twice with text between, or the answer was cut off.
        """
        outputs = signature.output_fields
        marks = [m for m in _HEADER.finditer(completion) if m[1] in outputs or m[1] == END]
        found: dict[str, str] = {}
        complete, ended = False, 0
        for place, mark in enumerate(marks):
            name = mark[1]
            stop = marks[place + 1].start() if place + 1 < len(marks) else len(completion)
            if name == END and (END not in outputs or END in found):
                if complete and completion[ended : mark.start()].strip():
                    reason = "There is text between two end markers, which is ambiguous."
                    raise self.error(signature, completion, reason)
                complete, ended = True, mark.end()
            elif name in found:
                raise self.error(
                    signature, completion, f"`{name}` comes twice, which is ambiguous."
                )
            elif complete:
                raise self.error(signature, completion, f"`{name}` comes after the end marker.")
            else:
                found[name] = unfence(completion[mark.end() : stop]).strip()
        complete = complete or (self.accept_truncated and finish_reason == "length")
        is_cut = finish_reason not in COMPLETE_REASONS
        if not is_cut and not complete:  # a marker that has begun and does not end
            is_cut = completion[completion.rfind("\n") + 1 :].lstrip(" \t").startswith("[[ ##")
            is_cut = is_cut and not (marks and marks[-1].end() > completion.rfind("\n"))
        if is_cut and not complete:
            raise self.error(
                signature,
                completion,
                f"The answer has no end marker and the model stopped for `{finish_reason}`: "
                "it was cut.",
                found or None,
            )
        return self.read_fields(signature, completion, found, parse_text)

    def stream_reader(self, signature: type[Signature]) -> FieldReader | None:
        """Make a reader of sections; None where a subclass reads answers in a way of its own."""
        if type(self).parse is not ChatAdapter.parse:
            return None
        return SectionReader(signature.output_fields, END)
