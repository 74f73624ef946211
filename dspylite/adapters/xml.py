"""`XMLAdapter`: each output between tags of its own name.

Not here: how one value is read (`adapters/values.py`), and values that a model has written as
nested elements (`adapters/elements.py`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from dspylite.adapters.base import texts_of
from dspylite.adapters.elements import read_elements
from dspylite.adapters.sections import ChatAdapter
from dspylite.adapters.streaming import ElementReader, FieldReader
from dspylite.adapters.values import parse_text
from dspylite.schema.signature import Field, Signature


class XMLAdapter(ChatAdapter):
    """Asks for each output between tags of its name, and reads them back.

    Tags of the signature's fields that stand in a value are escaped by a backslash, so that no data
    opens or closes a field. An answer that does not parse is asked for once more as JSON, unless
    that is switched off.

    Args are those of `ChatAdapter`.
    """

    saved_parameters = ChatAdapter.saved_parameters

    def format_field_structure(self, signature: type[Signature]) -> str:
        """Show the elements of an answer."""
        if not signature.output_fields:
            return ""
        shape = "\n\n".join(_element(name, f"({name})") for name in signature.output_fields)
        return f"Write each output between its tags, in this order, and nothing else:\n\n{shape}"

    def user_message_output_requirements(self, signature: type[Signature]) -> str:
        """Name the elements to write."""
        names = ", then ".join(f"`<{name}>`" for name in signature.output_fields)
        return f"Write {names}, each closed by its end tag." if names else ""

    def escape(self, signature: type[Signature], text: str) -> str:
        """Put a backslash into tags of the signature's fields."""
        return _tags(signature).sub(r"<\\\1\2\3\4>", text) if "<" in text else text

    def format_input(self, signature: type[Signature], name: str, text: str) -> str:
        """Write one input between its tags."""
        text = self.escape(signature, text)
        if name not in signature.fields:  # such as what tools have given
            text = text.replace(f"</{name}", f"<\\/{name}")
        return _element(name, text)

    def format_assistant_message_content(
        self,
        signature: type[Signature],
        outputs: Mapping[str, Any],
        missing_field_message: str | None = None,
    ) -> str:
        """Write the elements of an answer."""
        texts = texts_of(signature, outputs, missing_field_message)
        return "\n\n".join(_element(name, self.escape(signature, text)) for name, text in texts)

    def parse(
        self, signature: type[Signature], completion: str, *, finish_reason: str | None = "stop"
    ) -> dict[str, Any]:
        """Read the elements of an answer.

        Only tags of declared outputs count; others are part of the value that they stand in. Prose
        around the elements is passed over.

        Raises:
            AdapterParseError: An output is missing, comes twice, is not closed, has a tag too many,
                or does not fit its type.
        """
        outputs = signature.output_fields
        found: dict[str, str] = {}
        name, start = "", 0
        for tag in _tags(signature).finditer(completion):
            backslashes, slash, tagged, _ = tag.groups()
            if backslashes or tagged not in outputs or (name and tagged != name):
                continue
            if bool(slash) != bool(name):
                what = "an end tag too many" if slash else "a start tag inside of itself"
                raise self.error(signature, completion, f"`{tagged}` has {what}: ambiguous.")
            if not slash:
                if tagged in found:
                    reason = f"`{tagged}` comes twice, which is ambiguous."
                    raise self.error(signature, completion, reason)
                name, start = tagged, tag.end()
            else:
                found[name] = self._unescape(signature, completion[start : tag.start()]).strip()
                name = ""
        if name and self.accept_truncated and finish_reason == "length":
            found[name] = self._unescape(signature, completion[start:]).strip()
        elif name:
            reason = f"`{name}` is not closed: the answer was cut."
            raise self.error(signature, completion, reason, found or None)
        return self.read_fields(signature, completion, found, _read_value)

    def stream_reader(self, signature: type[Signature]) -> FieldReader | None:
        """Make a reader of elements; None where a subclass reads answers in a way of its own."""
        if type(self).parse is not XMLAdapter.parse:
            return None
        return ElementReader(signature.output_fields, signature.fields)

    def _unescape(self, signature: type[Signature], text: str) -> str:
        return _escaped_tags(signature).sub(r"<\1\2\3\4>", text) if "<\\" in text else text


def _element(name: str, text: str) -> str:
    return f"<{name}>\n{text}\n</{name}>"


@functools.lru_cache(maxsize=1024)
def _tags(signature: type[Signature]) -> re.Pattern[str]:
    """Match tags of the signature's fields: backslashes, slash, name."""
    names = "|".join(re.escape(name) for name in signature.fields)
    return re.compile(rf"<(\\*)(/?)({names})([ \t]*)>")


@functools.lru_cache(maxsize=1024)
def _escaped_tags(signature: type[Signature]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in signature.fields)
    return re.compile(rf"<\\(\\*)(/?)({names})([ \t]*)>")


def _read_value(field: Field, text: str) -> Any:
    try:
        return parse_text(field, text)
    except ValueError:
        if field.annotation is str or not text.startswith("<"):
            raise
        return read_elements(field, text)
