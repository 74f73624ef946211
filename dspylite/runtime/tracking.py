"""What is kept of finished calls: usage, history and traces, each off or bounded.

Not here: telling callbacks (`runtime/calls.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dspylite.runtime.settings import overlay_with, settings
from dspylite.schema.messages import LMResponse, Message, Usage, without_secrets


class UsageTracker:
    """Counts the tokens of all calls made in its block, in whatever thread, task or loop they run.

    Args:
        parent: The tracker of the block around this one; it counts these calls too.
    """

    def __init__(self, parent: UsageTracker | None = None) -> None:
        self._parent = parent
        self._lock = threading.Lock()  # guards `_by_model`; nothing is called while it is held
        self._by_model: dict[str, Usage] = {}

    def add(self, model: str, usage: Usage) -> None:
        """Count one answered call."""
        with self._lock:
            self._by_model[model] = self._by_model.get(model, Usage()) + usage
        if self._parent is not None:
            self._parent.add(model, usage)

    @property
    def by_model(self) -> Mapping[str, Usage]:
        """The sums so far, by model name."""
        with self._lock:
            return dict(self._by_model)

    @property
    def total(self) -> Usage:
        """The sum so far over all models."""
        return sum(self.by_model.values(), Usage())

    def get_total_tokens(self) -> dict[str, dict[str, int]]:
        """Return the sums so far by model name, as plain dicts (DSPy's form)."""
        return {model: usage.as_dict() for model, usage in self.by_model.items()}

    @property
    def usage_data(self) -> dict[str, dict[str, int]]:
        """The same as `get_total_tokens()`, under DSPy's other name."""
        return self.get_total_tokens()


@contextmanager
def track_usage() -> Generator[UsageTracker, None, None]:
    """Count the tokens of all calls made in the block, in any thread or task started from it.

    Example:
        >>> with track_usage() as tracker:
        ...     tracker.total.calls
        0
    """
    tracker = UsageTracker(settings.usage_tracker)
    with overlay_with(usage_tracker=tracker):
        yield tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One finished call, as `history` keeps it. Reads like DSPy's dict: `entry["messages"]`.

    Attributes:
        model: The model asked.
        messages: What it was sent.
        outputs: The texts it wrote.
        usage: Tokens, by the provider's names.
        kwargs: Request parameters; never a key or a header.
    """

    model: str
    messages: Sequence[Message]
    outputs: tuple[str, ...]
    usage: Mapping[str, int]
    kwargs: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class History:
    """The last calls, oldest first; bounded by `settings.max_history_size` when a call is added."""

    def __init__(self) -> None:
        self._entries: deque[HistoryEntry] = deque()

    def add(self, entry: HistoryEntry) -> None:
        """Keep a call, dropping the oldest beyond the bound."""
        limit = settings.max_history_size
        self._entries.append(entry)
        while len(self._entries) > limit:
            try:
                self._entries.popleft()
            except IndexError:  # another thread dropped it first
                break

    def clear(self) -> None:
        """Forget all calls."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[HistoryEntry]:
        return iter(self._copy())

    def __getitem__(self, index: int | slice) -> Any:
        return self._copy()[index]

    def _copy(self) -> list[HistoryEntry]:
        while True:
            try:
                return list(self._entries)
            except RuntimeError:  # a thread added while we copied; the copy takes microseconds
                continue

    def __getstate__(self) -> dict[str, Any]:
        """Leave the entries behind: a pickle after many calls is no larger than a fresh one."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start empty."""
        self._entries = deque()


_OPEN: ContextVar[tuple[History, ...]] = ContextVar("dspylite_open_histories", default=())


class recording_in:  # noqa: N801  # used like the functions of contextlib
    """Keep the calls made in the block in `history` too."""

    __slots__ = ("_history", "_token")

    def __init__(self, history: History) -> None:
        self._history = history

    def __enter__(self) -> None:
        self._token = _OPEN.set((*_OPEN.get(), self._history))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            _OPEN.reset(self._token)
        except ValueError:
            pass  # left in another context: what was set ended with the context it was set in


def record_call(
    *,
    model: str,
    messages: Sequence[Message],
    params: Mapping[str, Any],
    response: LMResponse,
    histories: Sequence[History | list[Any]],
    is_counted: bool = False,
) -> None:
    """Count one answered call where somebody asked for it, and keep it in the histories.

    Args:
        model: The model asked.
        messages: What it was sent.
        params: Request parameters.
        response: What it answered.
        histories: Those that keep it, besides the ones open in this context.
        is_counted: Whether the LM that really answered, a fallback, has counted it and told the
            open histories already.
    """
    tracker = settings.usage_tracker
    if tracker is not None and not is_counted:
        tracker.add(model, response.usage)
    if settings.disable_history:
        return
    entry = HistoryEntry(
        model=model,
        messages=messages,
        outputs=tuple(output.text for output in response.outputs),
        usage=response.usage.as_dict(),
        kwargs=without_secrets(params),
    )
    for history in (*histories, *(() if is_counted else _OPEN.get())):
        if isinstance(history, History):
            history.add(entry)
        else:  # a plain list, as some models of users keep one
            history.append(entry)


def record_trace(predictor: Any, inputs: Mapping[str, Any], prediction: Any) -> None:
    """Append one predictor call to the trace, if this context has one."""
    trace = settings.trace
    if trace is not None:
        limit = settings.max_trace_size
        trace.append((predictor, dict(inputs), prediction))
        while len(trace) > limit:
            try:
                del trace[0]
            except IndexError:  # another thread dropped it first
                break
