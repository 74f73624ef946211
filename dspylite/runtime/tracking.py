"""What is counted of finished calls, and which predictor was asked what: usage and traces.

Not here: what calls said (`runtime/history.py`), and telling callbacks (`runtime/calls.py`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dspylite.runtime.settings import overlay_with, settings
from dspylite.schema.messages import Usage

Cost = Callable[[Usage], float | None]
"""What tokens cost in US dollars; None where nobody knows."""

Event = Literal["failed", "retried", "fallbacks", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCounts:
    """What became of the requests to one model.

    Attributes:
        answered: Requests that were answered; their tokens are in the usage.
        failed: Requests that failed, whether the call they were made for did or not.
        retried: How many of the requests were made again after such a failure.
        unfinished: Requests that were cancelled, and streams that were left before their end, whose
            tokens nobody told.
        cached: Calls that took no request: their answer was kept, or on its way to another caller.
        fallbacks: Answers that this model gave in the place of another one.
    """

    answered: int = 0
    failed: int = 0
    retried: int = 0
    unfinished: int = 0
    cached: int = 0
    fallbacks: int = 0


class UsageTracker:
    """Counts the tokens of all calls made in its block, in whatever thread, task or loop they run.

    Args:
        parent: The tracker of the block around this one; it counts these calls too.
    """

    def __init__(self, parent: UsageTracker | None = None) -> None:
        self._parent = parent
        self._by_model: dict[str, Usage] = {}
        self._events: Counter[tuple[str, Event]] = Counter()
        self._cost_usd = 0.0
        self._to_be_priced: dict[str, tuple[Usage, Cost | None]] = {}
        self._lock = threading.Lock()  # guards the four; nothing is called while it is held

    def add(self, model: str, usage: Usage, cost: float | Cost | None = None) -> None:
        """Count one answered call.

        Args:
            model: Who answered.
            usage: Its tokens.
            cost: US dollars, or what tells those of this model's tokens when they are asked for;
                None where nobody knows.
        """
        with self._lock:
            self._by_model[model] = self._by_model.get(model, Usage()) + usage
            if isinstance(cost, int | float):
                self._cost_usd += cost
            elif usage.calls or usage.total_tokens:
                before, other = self._to_be_priced.get(model, (Usage(), None))
                self._to_be_priced[model] = (before + usage, cost or other)
        if self._parent is not None:
            self._parent.add(model, usage, cost)

    def note(self, model: str, event: Event) -> None:
        """Count something that happened to a request."""
        with self._lock:
            self._events[model, event] += 1
        if self._parent is not None:
            self._parent.note(model, event)

    @property
    def by_model(self) -> Mapping[str, Usage]:
        """The sums so far, by model name."""
        with self._lock:
            return dict(self._by_model)

    @property
    def total(self) -> Usage:
        """The sum so far over all models."""
        return sum(self.by_model.values(), Usage())

    @property
    def counts(self) -> Mapping[str, CallCounts]:
        """What became of the requests so far, by model name."""
        with self._lock:
            usages, events = dict(self._by_model), dict(self._events)
        return {
            model: CallCounts(
                answered=usages.get(model, Usage()).calls,
                cached=usages.get(model, Usage()).cached_calls,
                **{event: events.get((model, event), 0) for event in get_args(Event)},
            )
            for model in dict.fromkeys([*usages, *(model for model, _ in events)])
        }

    @property
    def cost_usd(self) -> float | None:
        """What the answered calls cost in US dollars; None if that of one is unknown.

        Prices are those of the LMs, else of litellm's own table, which the first look may load; it
        is never fetched. Discounts for cached tokens are not known here.
        """
        with self._lock:
            total, to_be_priced = self._cost_usd, list(self._to_be_priced.values())
        for usage, tell in to_be_priced:
            cost = None if tell is None else tell(usage)
            if cost is None:
                return None
            total += cost
        return total

    def get_total_tokens(self) -> dict[str, dict[str, int]]:
        """Return the sums so far by model name, as plain dicts (DSPy's form)."""
        return {model: usage.as_dict() for model, usage in self.by_model.items()}

    @property
    def usage_data(self) -> dict[str, dict[str, int]]:
        """The same as `get_total_tokens()`, under DSPy's other name."""
        return self.get_total_tokens()


class SharedTracker(UsageTracker):
    """Counts calls that are made for several callers at once, and gives each tracker its share.

    Tokens are divided by the number of callers; what remains, and what cannot be divided, such as
    the number of calls, goes to one of them. So the sum over all is what was spent.

    Args:
        trackers: That of each caller; None for one that counts nothing, whose share is left out.
    """

    def __init__(self, trackers: Iterable[UsageTracker | None]) -> None:
        super().__init__()
        callers = list(trackers)
        self._callers = len(callers)
        counted = Counter(map(id, callers))
        self._shares = [
            (tracker, counted[key]) for key, tracker in {id(each): each for each in callers}.items()
        ]

    def add(self, model: str, usage: Usage, cost: float | Cost | None = None) -> None:
        """Count one answered call."""
        super().add(model, usage, cost)
        start = 0
        for tracker, count in self._shares:
            end = start + count
            if tracker is not None:
                price = cost * count / self._callers if isinstance(cost, int | float) else cost
                tracker.add(model, _part_of(usage, start, end, self._callers), price)
            start = end

    def note(self, model: str, event: Event) -> None:
        """Count something that happened to a request."""
        super().note(model, event)
        tracker, _ = self._shares[-1]
        if tracker is not None:
            tracker.note(model, event)


def _part_of(usage: Usage, start: int, end: int, whole: int) -> Usage:
    def cut(count: int) -> int:
        return count * end // whole - count * start // whole

    return Usage(
        prompt_tokens=cut(usage.prompt_tokens),
        completion_tokens=cut(usage.completion_tokens),
        total_tokens=cut(usage.total_tokens),
        calls=cut(usage.calls),
        cached_calls=cut(usage.cached_calls),
        details={name: cut(count) for name, count in usage.details.items()},
    )


def note_request(model: str, event: Event) -> None:
    """Count what happened to a request, where somebody tracks usage."""
    tracker: UsageTracker | None = settings.usage_tracker
    if tracker is not None:
        tracker.note(model, event)


@contextmanager
def track_usage() -> Generator[UsageTracker, None, None]:
    """Count the tokens of all calls made in the block, in any thread or task started from it.

    The tracker tells them in sum (`total`), by model (`by_model`), what became of the requests
    (`counts`: failed, retried, cached ...), and what they cost (`cost_usd`).

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
        trace.append((predictor, dict(inputs), prediction))
        _shorten(trace)


def record_traces(calls: Iterable[tuple[Any, dict[str, Any], Any]]) -> None:
    """Append calls that were recorded apart to the trace, if this context has one."""
    trace = settings.trace
    if trace is not None:
        trace.extend(calls)
        _shorten(trace)


def _shorten(trace: list[Any]) -> None:
    limit = settings.max_trace_size
    while len(trace) > limit:
        try:
            del trace[0]
        except IndexError:  # another thread dropped it first
            break
