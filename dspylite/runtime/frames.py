"""Which call is in progress and which batch item it works for, in each context.

Not here: who is told of calls (`runtime/calls.py`).
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

CallKind = Literal["module", "lm", "adapter_format", "adapter_parse", "tool", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFrame:
    """One call in progress.

    Attributes:
        call_id: Unique within this process and, in all likelihood, beyond.
        parent_id: The call that made this one, perhaps in another process; None at the top.
        item_index: Place in its batch of the item this call works for; None outside batches.
        kind: What was called.
        instance: The object called; None if that was in another process.
        method: The method called, where `with_callbacks` tells of it.
    """

    call_id: str
    parent_id: str | None
    item_index: int | None
    kind: CallKind
    instance: Any = field(default=None, repr=False, compare=False)
    method: str | None = None


CURRENT_CALL: ContextVar[CallFrame | None] = ContextVar("dspylite_call", default=None)
ITEM_INDEX: ContextVar[int | None] = ContextVar("dspylite_item_index", default=None)


def current_call() -> CallFrame | None:
    """Return the innermost call in progress in this context; None outside, or without callbacks."""
    return CURRENT_CALL.get()


class ActiveCallId:
    """The id of the innermost call in progress in this context, read as DSPy's variable is.

    It is read only: calls set it, and `bind` or `settings.restore` carry it elsewhere.
    """

    __slots__ = ()

    def get(self, default: str | None = None) -> str | None:
        """Return the id; `default` outside calls, or without callbacks."""
        frame = CURRENT_CALL.get()
        return default if frame is None else frame.call_id


ACTIVE_CALL_ID = ActiveCallId()


def set_item_index(index: int) -> None:
    """Note which batch item this context works for."""
    ITEM_INDEX.set(index)


def get_item_index() -> int | None:
    """Return which batch item this context works for; None outside batches."""
    return ITEM_INDEX.get()


SECOND_START: ContextVar[bool] = ContextVar("dspylite_second_start", default=False)
"""Whether this context works for an item that was started once more, because it hung."""


def is_second_start() -> bool:
    """Tell whether this context works for an item that was started once more, because it hung."""
    return SECOND_START.get()
