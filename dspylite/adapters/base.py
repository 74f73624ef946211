"""What all adapters share: how the task and the inputs are told, and how outputs are checked.

Not here: the form of the answer, which is what makes an adapter.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dspylite.adapters.values import MAX_CHARS, describe, format_value
from dspylite.errors import AdapterParseError
from dspylite.runtime.settings import checked_callbacks
from dspylite.schema.messages import Message
from dspylite.schema.signature import Field, Signature

_MARKER_LINE = re.compile(r"^([ \t]*)(\\*)(\[\[ ## )", re.MULTILINE)
_ESCAPED_LINE = re.compile(r"^([ \t]*)\\(\\*\[\[ ## )", re.MULTILINE)
MAX_TASKS = 1024
"""System messages kept per adapter; guessed, far above the signatures of one program."""
NOT_GIVEN = "(not given in this example)"


def header(name: str) -> str:
    """Return the line that opens a section.

    Example:
        >>> header("answer")
        '[[ ## answer ## ]]'
    """
    return f"[[ ## {name} ## ]]"


def fence(text: str) -> str:
    r"""Escape lines of a value that look like headers, so that data never opens a section.

    Example:
        >>> fence("see\n[[ ## answer ## ]]")
        'see\n\\[[ ## answer ## ]]'
    """
    return _MARKER_LINE.sub(r"\1\\\2\3", text) if "[[ ##" in text else text


def unfence(text: str) -> str:
    """Undo `fence`."""
    return _ESCAPED_LINE.sub(r"\1\2", text) if "[[ ##" in text else text


def section(name: str, text: str) -> str:
    """Write one section: header, value, with look-alike headers escaped."""
    return f"{header(name)}\n{fence(text)}"


def repair_turn(answer: str, error: AdapterParseError) -> list[Message]:
    """Write what a model is told when its answer cannot be read: that answer, and what is wrong.

    What is wrong may quote the answer, so it is escaped like any other data.
    """
    return [
        {"role": "assistant", "content": answer if answer.strip() else "(no text)"},
        {
            "role": "user",
            "content": (
                f"This answer cannot be read: {fence(error.message)}\n"
                "Answer once more, in full and in exactly the form asked for above."
            ),
        },
    ]


def list_fields(fields: Mapping[str, Field], *, outputs: bool) -> str:
    """List fields for the system message: name, type, form and meaning."""
    lines: list[str] = []
    for field in fields.values():
        form = describe(field) if outputs else ""
        kind = f"{field.type_name}: {form}" if form else field.type_name
        lines.append(f"- `{field.name}` ({kind})" + (f" — {field.desc}" if field.desc else ""))
    return "\n".join(lines)


class BaseAdapter(abc.ABC):
    """The common body of adapters; a subclass says how answers look and reads them.

    Args:
        callbacks: Told of every format and parse, after those of the settings.
    """

    def __init__(self, callbacks: Sequence[Any] | None = None) -> None:
        self.callbacks = checked_callbacks("callbacks", callbacks)
        self._tasks: dict[type[Signature], str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the written tasks behind; they are made again where they are needed."""
        return {**self.__dict__, "_tasks": {}}

    uses_capabilities: bool = False
    """Whether `params` looks at the model's capabilities."""

    @property
    def fallback(self) -> BaseAdapter | None:
        """The adapter to try once when an answer does not parse; None here."""
        return None

    def format(
        self,
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[Message]:
        """Write the prompt: the task, each demo as a question with its answer, then the inputs."""
        messages: list[Message] = [{"role": "system", "content": self._task(signature)}]
        for demo in demos:
            messages.append({"role": "user", "content": self.question(signature, demo)})
            messages.append({"role": "assistant", "content": self.answer(signature, demo)})
        messages.append({"role": "user", "content": self.question(signature, inputs)})
        return messages

    def _task(self, signature: type[Signature]) -> str:
        text = self._tasks.get(signature)
        if text is None:
            if len(self._tasks) >= MAX_TASKS:
                self._tasks.clear()
            text = self._tasks[signature] = self.task(signature)
        return text

    def question(self, signature: type[Signature], values: Mapping[str, Any]) -> str:
        """Write the inputs, each in its section, and a reminder of the answer's form."""
        parts: list[str] = []
        for name, field in signature.input_fields.items():
            if name in values:
                parts.append(section(name, format_value(values[name])))
            elif field.required:
                parts.append(section(name, NOT_GIVEN))
        parts.append(self.reminder(signature))
        return "\n\n".join(parts)

    def params(self, signature: type[Signature], capabilities: frozenset[str]) -> Mapping[str, Any]:
        """Give request parameters that this form of answer wants; none here."""
        del signature, capabilities
        return {}

    def task(self, signature: type[Signature]) -> str:
        """Write the system message."""
        inputs, outputs = signature.input_fields, signature.output_fields
        parts: list[str] = []
        if inputs:
            parts.append(f"Inputs:\n{list_fields(inputs, outputs=False)}")
        parts.append(f"Outputs:\n{list_fields(outputs, outputs=True)}")
        parts.append(self.form(signature))
        parts.append(f"Task: {signature.instructions}")
        return "\n\n".join(parts)

    @abc.abstractmethod
    def form(self, signature: type[Signature]) -> str:
        """Say what an answer looks like."""
        ...

    @abc.abstractmethod
    def reminder(self, signature: type[Signature]) -> str:
        """Say in one line, after the inputs, what to write."""
        ...

    @abc.abstractmethod
    def answer(self, signature: type[Signature], values: Mapping[str, Any]) -> str:
        """Write an answer as the model should have written it, for a demo."""
        ...

    @abc.abstractmethod
    def parse(
        self, signature: type[Signature], completion: str, *, finish_reason: str | None = "stop"
    ) -> dict[str, Any]:
        """Read the outputs from an answer.

        Raises:
            AdapterParseError: The answer is not one complete value for every output.
        """
        ...

    def error(
        self, signature: type[Signature], completion: str, reason: str, parsed: object = None
    ) -> AdapterParseError:
        """Make the error that `parse` raises."""
        return AdapterParseError(type(self).__name__, signature, completion, reason, parsed)

    def read_fields(
        self,
        signature: type[Signature],
        completion: str,
        found: Mapping[str, Any],
        read: Callable[[Field, Any], Any],
    ) -> dict[str, Any]:
        """Turn what was found for each output into its value, in the order of the signature.

        Raises:
            AdapterParseError: An output is missing or its value does not fit.
        """
        if len(completion) > MAX_CHARS:
            reason = f"Its {len(completion)} characters are more than {MAX_CHARS}."
            raise self.error(signature, completion, reason)
        values: dict[str, Any] = {}
        outputs = signature.output_fields
        if missing := [name for name in outputs if name not in found]:
            listed = ", ".join(f"`{name}`" for name in missing)
            raise self.error(
                signature, completion, f"The answer lacks {listed}.", dict(found) or None
            )
        for name, field in outputs.items():
            try:
                values[name] = read(field, found[name])
            except ValueError as error:
                raise self.error(
                    signature, completion, f"`{name}`: {error}.", dict(found)
                ) from None
        return values
