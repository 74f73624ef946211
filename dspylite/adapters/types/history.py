"""`History`: the turns of a conversation, as an input."""

from __future__ import annotations

from typing import Any

import pydantic


class History(pydantic.BaseModel):
    """A conversation so far; its turns stand before the question as messages of their own.

    Attributes:
        messages: The turns, oldest first; each a dict from names of the signature's fields, inputs
            and outputs, to their values.

    Example:
        >>> history = History(messages=[{"question": "Capital of France?", "answer": "Paris"}])
        >>> len(history.messages)
        1
    """

    model_config = pydantic.ConfigDict(
        frozen=True, str_strip_whitespace=True, validate_assignment=True, extra="forbid"
    )

    messages: list[dict[str, Any]]
