"""One item of a run: what is called for it, in which settings, and what became of it.

Not here: when it is taken and ended (`concurrency/run.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from dspylite.abc import Io
from dspylite.concurrency.outcome import Outcome
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.flow import Both
from dspylite.runtime.frames import SECOND_START, set_item_index
from dspylite.runtime.settings import pin
from dspylite.runtime.tracking import UsageTracker


class Job(NamedTuple):
    """One item, made callable.

    Attributes:
        target: The module or function to call.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Item:
    """One item that a worker has taken, and what became of it.

    Attributes:
        index: Its place in the input.
        source: The item as the user gave it; dropped when it succeeded and no attempt is left.
        started: When, on the monotonic clock.
        tracker: Counts what it spends.
        flag: Raised to stop it; None where nobody but the whole run is ever stopped.
        attempts: How often it was started.
        running: How many of these have not ended.
        has_worker: Whether its worker is still in it; False once that goes on to other items.
        value: What it returned.
        error: What it raised, the first time if it was started twice.
        ok: Whether it succeeded.
        seconds: Wall time to its end.
    """

    __slots__ = (
        "attempts", "error", "flag", "has_worker", "index", "ok", "running", "seconds", "source",
        "started", "tracker", "value",
    )  # fmt: skip

    def __init__(
        self, index: int, source: Any, parent: UsageTracker | None, flag: Cancellation | None
    ) -> None:
        self.index = index
        self.source = source
        self.started = time.monotonic()
        self.tracker = UsageTracker(parent)
        self.flag = flag
        self.attempts = self.running = 1
        self.has_worker = True
        self.value: Any = None
        self.error: BaseException | None = None
        self.ok = False
        self.seconds = 0.0

    def outcome(self) -> Outcome[Any]:
        """Return how it ended, in the form that users see."""
        return Outcome(
            index=self.index,
            ok=self.ok,
            value=self.value,
            error=self.error,
            attempts=self.attempts,
            seconds=self.seconds,
            usage=self.tracker.by_model,
        )


def enter_item(item: Item, pinned: Mapping[str, Any]) -> None:
    """Make this context that of an item: its index, its settings, its tracker and its flag."""
    set_item_index(item.index)
    SECOND_START.set(item.attempts > 1)
    pin({**pinned, "usage_tracker": item.tracker})
    if item.flag is not None:
        CANCELLATION.set(item.flag)


async def _acall(target: Any, args: Any, kwargs: Any) -> Any:
    return await target.acall(*args, **kwargs)


_PROGRAM: Both[[Any, Any, Any], Any] = Both(
    lambda target, args, kwargs: target(*args, **kwargs), _acall
)


async def invoke(io: Io, job: Job) -> Any:
    """Call what an item asks for, on the driver's side if it has one."""
    target, args, kwargs = job
    if hasattr(target, "acall"):
        return await io.call(_PROGRAM, target, args, kwargs)
    return await io.any(target, *args, **kwargs)
