"""`History`: the turns of a conversation, as values of a signature's fields.

Not here: how they stand before a question (`adapters/`), and the record of calls
(`runtime/history.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import pydantic


class History(pydantic.BaseModel):
    """Earlier turns of a conversation, for an input of a signature.

    Attributes:
        messages: One dict for each turn, oldest first; its keys are names of the signature's
            fields, inputs and outputs alike. The list is this history's own and may grow.

    Raises:
        pydantic.ValidationError: It is no list of dicts with texts as keys.

    Example:
        >>> history = History(messages=[{"question": "What is 2 + 2?", "answer": "4"}])
        >>> history.messages.append({"question": "And 2 + 3?", "answer": "5"})
        >>> len(history.messages)
        2
    """

    __field_kind__: ClassVar[str] = "history"

    messages: list[dict[str, Any]]

    model_config = pydantic.ConfigDict(
        defer_build=True,
        frozen=True,
        extra="forbid",
        json_schema_extra={"description": "Earlier turns of the conversation, oldest first."},
    )
