"""Who called whom: the frame of the current call, and the callbacks told of its start and end.

Not here: what is counted or recorded of a call (`runtime/tracking.py`).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from dspylite.runtime.settings import settings

logger = logging.getLogger(__name__)

CallKind = Literal["module", "lm", "adapter_format", "adapter_parse", "tool", "evaluate"]


class BaseCallback:
    """Hears of calls. Override what you need; the others do nothing.

    Every `..._start` gets the call's id, the object called and its inputs; every `..._end` gets the
    same id, and what came out or the exception. `current_call()` tells the parent and the batch
    item. A callback that raises is logged and never harms the call. Callbacks run on the thread or
    task that makes the call, so they must not block.
    """

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A module was called."""

    def on_module_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A module returned or failed."""

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A language model was called."""

    def on_lm_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A language model answered or failed."""

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A prompt is about to be written."""

    def on_adapter_format_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A prompt was written, or could not be."""

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """An answer is about to be read."""

    def on_adapter_parse_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """An answer was read, or could not be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFrame:
    """One call in progress.

    Attributes:
        call_id: Unique within this process and, in all likelihood, beyond.
        parent_id: The call that made this one; None at the top.
        item_index: Place in its batch of the item this call works for; None outside batches.
    """

    call_id: str
    parent_id: str | None
    item_index: int | None


_CURRENT: ContextVar[CallFrame | None] = ContextVar("dspylite_call", default=None)
_ITEM: ContextVar[int | None] = ContextVar("dspylite_item_index", default=None)
_NUMBERS = itertools.count(1)


def current_call() -> CallFrame | None:
    """Return the innermost call in progress in this context; None outside, or without callbacks."""
    return _CURRENT.get()


def set_item_index(index: int) -> None:
    """Note which batch item this context works for."""
    _ITEM.set(index)


def get_item_index() -> int | None:
    """Return which batch item this context works for; None outside batches."""
    return _ITEM.get()


SECOND_START: ContextVar[bool] = ContextVar("dspylite_second_start", default=False)
"""Whether this context works for an item that was started once more, because it hung."""


def is_second_start() -> bool:
    """Tell whether this context works for an item that was started once more, because it hung."""
    return SECOND_START.get()


class Observed:
    """The span of one call, told to callbacks; with no callbacks it does nothing.

    Args:
        kind: Which pair of callback methods is called.
        instance: The object called; its own `callbacks` come after those of the settings.
        inputs: What it was called with.
    """

    __slots__ = (
        "_callbacks",
        "_frame",
        "_inputs",
        "_instance",
        "_is_left_open",
        "_kind",
        "_token",
        "outputs",
    )

    def __init__(self, kind: CallKind, instance: Any, inputs: dict[str, Any]) -> None:
        self._kind = kind
        self._instance = instance
        self._inputs = inputs
        self._callbacks: tuple[Any, ...] = ()
        self._frame: CallFrame | None = None
        self._token: Token[CallFrame | None] | None = None
        self._is_left_open = False
        self.outputs: Any = None

    def __enter__(self) -> Observed:
        own = getattr(self._instance, "callbacks", None) or ()
        self._callbacks = (*settings.callbacks, *own)
        if self._callbacks:
            parent = _CURRENT.get()
            self._frame = CallFrame(
                call_id=f"{os.getpid():x}-{next(_NUMBERS):x}-{os.urandom(4).hex()}",
                parent_id=parent.call_id if parent else None,
                item_index=_ITEM.get(),
            )
            self._token = _CURRENT.set(self._frame)
            self._tell("start", instance=self._instance, inputs=self._inputs)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is None:
            return
        if exc is not None or not self._is_left_open:
            self._tell("end", outputs=self.outputs, exception=exc)
        try:
            _CURRENT.reset(self._token)
        except ValueError:
            pass  # a generator closed from another context: its frame ended with its own context

    def leave_open(self) -> None:
        """Let the end of the block not be the end of the call; that is told by `finish`."""
        self._is_left_open = True

    def finish(self, outputs: Any, exception: BaseException | None = None) -> None:
        """Tell the end of a call that was left open."""
        self._tell("end", outputs=outputs, exception=exception)

    def _tell(self, moment: str, **details: Any) -> None:
        if self._frame is None:
            return
        _tell_all(self._callbacks, f"on_{self._kind}_{moment}", self._frame.call_id, details)


def _tell_all(callbacks: Iterable[Any], method: str, call_id: str, details: dict[str, Any]) -> None:
    for callback in callbacks:
        handler = getattr(callback, method, None)
        if handler is None:
            continue
        try:
            handler(call_id=call_id, **details)
        except Exception:  # reported here; a listener must never harm the call it listens to
            logger.warning("%s of %s failed", method, type(callback).__name__, exc_info=True)
