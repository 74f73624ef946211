"""What is counted of finished calls, and which predictor was asked what: usage and traces.

Not here: what calls said (`runtime/history.py`), and telling callbacks (`runtime/calls.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from dspylite.runtime.settings import overlay_with, settings
from dspylite.schema.messages import Usage


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
