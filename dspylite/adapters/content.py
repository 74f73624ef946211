"""The content of one message: text, with the parts that are no text at their places.

Not here: what stands in a message (`adapters/base.py`), and which values have parts
(`adapters/types/`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any, Protocol


class ContentBuilder:
    """Takes the parts of values while a message is written, and splices them in at the end.

    In the text a mark stands for them, made with a random number of this message alone, so that no
    text of a user can ever be taken for one.

    Args:
        escape: How text that comes in parts is made harmless, as all data is.

    Example:
        >>> builder = ContentBuilder()
        >>> mark = builder.put([{"type": "image_url", "image_url": {"url": "https://e.org/a"}}])
        >>> [part["type"] for part in builder.content(f"Look: {mark}!")]
        ['text', 'image_url', 'text']
    """

    __slots__ = ("_escape", "_nonce", "_parts")

    def __init__(self, escape: Callable[[str], str] = str) -> None:
        self._escape = escape
        self._nonce = ""
        self._parts: list[list[dict[str, Any]]] = []

    @property
    def has_parts(self) -> bool:
        """Whether any value had parts."""
        return bool(self._parts)

    def put(self, parts: list[dict[str, Any]]) -> str:
        """Take content parts; return the mark that stands for them in the text."""
        self._nonce = self._nonce or secrets.token_hex(12)
        joined: list[dict[str, Any]] = []
        for part in parts:
            if _is_text(part):
                _add_text(joined, part["text"])  # before escaping: two halves may make a whole
            else:
                joined.append(part)
        self._parts.append([self._harmless(part) for part in joined])
        return f"@{self._nonce}-{len(self._parts) - 1}@"

    def _harmless(self, part: dict[str, Any]) -> dict[str, Any]:
        text = part.get("text")
        return {**part, "text": self._escape(text)} if isinstance(text, str) else dict(part)

    def _add(self, parts: list[dict[str, Any]], text: str) -> None:
        """Add text behind other text; on a line of its own where the two would make a marker."""
        before = parts[-1]["text"].rpartition("\n")[2] if parts and _is_text(parts[-1]) else ""
        line = text.partition("\n")[0]
        if before and line and self._escape(before + line) != self._escape(before) + line:
            text = f"\n{text}"
        _add_text(parts, text)

    def content(self, text: str) -> str | list[dict[str, Any]]:
        """Return the text as it is, or cut into parts where there are some."""
        if not self._parts:
            return text
        # Inside of JSON the mark has become a string, with quotes around it.
        pieces = re.split(f'("?)@{self._nonce}-([0-9]+)@\\1', text)
        found: list[dict[str, Any]] = []
        for place in range(0, len(pieces), 3):
            self._add(found, pieces[place])
            if place + 2 < len(pieces):
                for part in self._parts[int(pieces[place + 2])]:
                    if _is_text(part):
                        self._add(found, part["text"])
                    else:
                        found.append(part)
        return found


def _is_text(part: dict[str, Any]) -> bool:
    return part.keys() == {"type", "text"} and part["type"] == "text"


def _add_text(parts: list[dict[str, Any]], text: str) -> None:
    if not text:
        return
    if parts and _is_text(parts[-1]):
        parts[-1] = {"type": "text", "text": parts[-1]["text"] + text}
    else:
        parts.append({"type": "text", "text": text})


class PartsSink(Protocol):
    """Who takes the parts of a value while it is written; a `ContentBuilder`."""

    def put(self, parts: list[dict[str, Any]]) -> str:
        """Take content parts; return the mark that stands for them in the text."""
        ...


class Formats(Protocol):
    """A value that says itself how it stands in a prompt; a `Type`."""

    def format(self) -> Any:
        """Write the value."""
        ...


def kind_of(annotation: Any) -> str | None:
    """Tell what a type is to adapters; None for one that is none of ours.

    Types say so by a mark (`__field_kind__`), so that nobody must load them to ask.

    Returns:
        `"value"`, `"tool"` or `"tool calls"` of a `Type`; `"history"`.
    """
    kind = getattr(annotation, "__field_kind__", None) if isinstance(annotation, type) else None
    return kind if isinstance(kind, str) else None


def formats_itself(annotation: Any) -> bool:
    """Tell whether a type is a `Type`, whose values write themselves."""
    return kind_of(annotation) in {"value", "tool", "tool calls"}


def is_parts(written: Any) -> bool:
    """Tell whether what `format` gave are content parts, and not a JSON value."""
    return (
        isinstance(written, list)
        and bool(written)
        and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in written)
    )


def formatted(value: Formats, sink: PartsSink) -> Any:
    """Write a value as it says itself; parts go to the sink, and their mark stands for them."""
    written = value.format()
    return sink.put(written) if is_parts(written) else written
