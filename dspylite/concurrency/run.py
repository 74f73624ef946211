"""One run over many items: what is taken, what is under way, how each item ended.

The state is shared by both drivers. Not here: an item itself (`concurrency/items.py`), how items
are waited for, on threads
(`concurrency/crew.py`) or as tasks (`concurrency/tasks.py`), and the forms of input and output that
users see (`concurrency/parallel.py`).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import AsyncIterable, Callable, Iterable
from contextvars import Context, ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from dspylite.concurrency.items import Item, Job, enter_item
from dspylite.concurrency.outcome import Outcome, skipped
from dspylite.errors import BatchError, CallCancelledError, ItemTimeoutError
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.forks import watch_forks
from dspylite.runtime.settings import settings
from dspylite.runtime.threads import carried_context
from dspylite.runtime.tracking import UsageTracker

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None, int], object]
"""Called after each item with (done, total or None if unknown, errors), from the worker."""


_NONE_YET: Any = object()
_HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a run stops early, and when an item is given up or started once more.

    Attributes:
        max_errors: Failures after which no further item is taken; None for no bound.
        timeout_s: Wall time of one item, in seconds.
        total_timeout_s: Wall time of the run, in seconds.
        hedge_after_s: Seconds after which an item that has not ended is started a second time.
    """

    max_errors: int | None = None
    timeout_s: float | None = None
    total_timeout_s: float | None = None
    hedge_after_s: float | None = None

    @property
    def is_watched(self) -> bool:
        """Whether somebody else than its worker may end an item."""
        return (self.timeout_s, self.total_timeout_s, self.hedge_after_s) != (None, None, None)


class Budget:
    """Workers that one outermost run and all runs nested in it may use together.

    Threads and tasks count alike. In a forked child only the one that forked is left.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._free = workers
        self._lock = threading.Lock()  # guards the count; nothing is called while it is held
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Count all workers but this one as free."""
        self._lock = threading.Lock()
        self._free = self._workers - 1

    def take(self, wanted: int) -> int:
        """Take up to `wanted` workers; return how many there were."""
        with self._lock:
            taken = max(0, min(wanted, self._free))
            self._free -= taken
            return taken

    def give(self, count: int = 1) -> None:
        """Give workers back."""
        with self._lock:
            self._free += count


BUDGET: ContextVar[Budget | None] = ContextVar("dspylite_worker_budget", default=None)
"""The workers of the outermost run that this context is part of; None outside of runs."""


class Run:
    """The state of one run; used once.

    Args:
        items: What to run over, read as workers ask for more and never ahead of them.
        as_job: Makes an item callable; what it raises is that item's error.
        limits: When to stop.
        total: How many items there are, if known.
        progress: Told after each item.
        log_tracebacks: Whether failures are logged with their traceback.
        keeps_outcomes: Whether all is kept that `outcomes` can tell; else values and failures.
        hand_out: Receives each item when it has ended, under the run's lock, instead of keeping it.
    """

    def __init__(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        as_job: Callable[[int, Any], Job],
        *,
        limits: Limits,
        total: int | None,
        progress: Progress | None,
        log_tracebacks: bool,
        keeps_outcomes: bool = True,
        hand_out: Callable[[Item], object] | None = None,
    ) -> None:
        self.as_job = as_job
        self.limits = limits
        self.total = total
        self._progress = progress
        self._log_tracebacks = log_tracebacks
        self._keeps_outcomes = keeps_outcomes
        self._hand_out = hand_out
        self.is_async = not isinstance(items, Iterable)
        self._iterator: Any = iter(items) if isinstance(items, Iterable) else aiter(items)
        self.input_error: BaseException | None = None
        self.is_exhausted = False
        self.stop_reason = ""
        # `lock` guards the counts, the attempts of items, and the end of those items whose end
        # somebody may wait for; no user code runs while it is held. An item that just succeeds
        # does not take it: eight threads that meet at a lock spend their time there. `_active` is a
        # dict whose single steps are atomic, and who takes an item out of it has the last word on
        # that item.
        # One thread may take it twice, where the garbage collector closes the iterator of this very
        # run in the middle of a worker's step.
        self.lock = threading.RLock()
        self.locks_ends = limits.is_watched or limits.max_errors is not None or hand_out is not None
        # `_taking` guards the user's iterator and the places of items. Those of a list are taken
        # without it, because one step of `enumerate` is atomic: a thread that loses its turn with a
        # lock in hand has all others queue up behind it, for good where items are short.
        self._taking = threading.Lock()
        is_plain = type(items) in {list, tuple, range} and not self.locks_ends and _HAS_GIL
        self._numbered = enumerate(islice(cast("Any", items), total)) if is_plain else None
        # `_telling` keeps progress reports in order; it is taken before `lock`, never inside it.
        self._telling = threading.Lock()
        self._active: dict[int, Item] = {}
        # By index; `_NONE_YET` where no value is kept.
        self._values: list[Any] = [_NONE_YET] * (total or 0) if is_plain else []
        self._items: dict[int, Item] = {}  # failures, and with `keeps_outcomes` all
        self._taken = len(self._values)
        self._refused = 0
        self._ended = 0
        self._errors = 0
        self.outer_budget = BUDGET.get()
        self.flag = Cancellation()
        self._context = carried_context()
        self._parent_tracker: UsageTracker | None = settings.usage_tracker
        self._pinned = settings.copy()

    # -- the beginning of an item ------------------------------------------------------------------

    def goes_on(self) -> bool:
        """Tell whether further items are taken."""
        return not (self.is_exhausted or self.is_stopped)

    @property
    def is_stopped(self) -> bool:
        """Whether it ended before its input did."""
        return bool(self.stop_reason) or self.flag.reason is not None

    def open(self) -> None:
        """Take part in what surrounds the run, when it begins; `close` ends it."""
        self.flag = Cancellation(self._context.get(CANCELLATION))
        self._context.run(CANCELLATION.set, self.flag)

    def set_budget(self, budget: Budget) -> None:
        """Have the runs nested in this one share its workers."""
        self._context.run(BUDGET.set, budget)

    def stop(self, reason: str) -> None:
        """Take no further item.

        Args:
            reason: Why, such as `"it was interrupted"`.
        """
        self.stop_reason = self.stop_reason or reason

    def take(self) -> Item | None:
        """Start the next item; None at the end."""
        if not self.goes_on():  # also while another worker waits for the input
            return None
        if self._numbered is not None:
            try:
                return self._begin(*next(self._numbered))
            except StopIteration:
                self.is_exhausted = True
                return None
        with self._taking:
            if not self.goes_on():
                return None
            try:
                source = next(self._iterator)
            except StopIteration:
                self.is_exhausted = True
                return None
            except BaseException as error:  # noqa: BLE001  # the user's iterator; SystemExit too is kept
                self._input_failed(error)
                return None
            index = self._next_place()
        return self._begin(index, source)

    async def atake(self) -> Item | None:
        """Start the next item of an async iterable; None at the end. For one task at a time."""
        if not self.goes_on():
            return None
        try:
            source = await anext(self._iterator)
        except StopAsyncIteration:
            self.is_exhausted = True
            return None
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's iterator; it is kept
            self._input_failed(error)
            return None
        return self._begin(self._next_place(), source)

    def _input_failed(self, error: BaseException) -> None:
        self.input_error = error
        self.is_exhausted = True

    def _next_place(self) -> int:
        index = self._taken
        self._taken += 1
        if self._hand_out is None:
            self._values.append(_NONE_YET)
        return index

    def _begin(self, index: int, source: Any) -> Item | None:
        flag = Cancellation(self.flag) if self.limits.is_watched else None
        item = Item(index, source, self._parent_tracker, flag)
        self._active[index] = item
        if self.is_stopped:  # that came while the input was being read
            self._active.pop(index, None)
            with self.lock:
                self._refused += 1
            return None
        return item

    @property
    def active(self) -> list[Item]:
        """The items under way."""
        return list(self._active.copy().values())

    def is_active(self, item: Item) -> bool:
        """Tell whether an item is under way."""
        return item.index in self._active

    def context_of(self, item: Item) -> Context:
        """Return the context that one attempt at an item runs in."""
        context = self._context.copy()
        context.run(enter_item, item, self._pinned)
        return context

    # -- the end of an item ------------------------------------------------------------------------

    def end_attempt(self, item: Item, error: BaseException | None, value: Any) -> bool:
        """Record how one attempt at an item ended; False if it changed nothing any more."""
        if item.flag is None:
            return self._end(item, error, value)
        with self.lock:
            item.running -= 1
            if item.error is None:
                item.error = error
            if error is not None and item.running:
                return True  # the other attempt may still succeed
        return self._end(item, None if error is None else item.error, value)

    def begin_attempt(self, item: Item) -> bool:
        """Count a second attempt at an item; False where it has ended meanwhile."""
        with self.lock:
            if not self.is_active(item):
                return False
            item.attempts += 1
            item.running += 1
            return True

    def drop_attempt(self, item: Item) -> None:
        """Forget an attempt that could not be made; the other may have failed in the meantime."""
        with self.lock:
            item.attempts -= 1
            item.running -= 1
            is_over = not item.running
        if is_over:
            self._end(item, item.error)

    def give_up(self, item: Item, error: BaseException) -> bool:
        """End an item from outside; False if it has ended by itself."""
        return self._end(item, error)

    def _end(self, item: Item, error: BaseException | None, value: Any = None) -> bool:
        if self._progress is None:
            return self._record(item, error, value)
        with self._telling:
            if not self._record(item, error, value):
                return False
            self._ended += 1
            try:
                self._progress(self._ended, self.total, self._errors)
            except BaseException as failure:  # a broken progress display must not harm the batch
                if _is_ctrl_c(failure):
                    raise
                logger.warning("the progress callback failed", exc_info=True)
            return True

    def _record(self, item: Item, error: BaseException | None, value: Any) -> bool:
        if error is None and not self.locks_ends:
            return self._store(item, None, value)
        with self.lock:
            is_first = self._store(item, error, value)
        if is_first and item.flag is not None:
            if item.running:  # it was given up, or another attempt was faster
                item.flag.cancel("the item has ended")
            item.flag.close()
        if is_first and error is not None and self._log_tracebacks:
            # A triple, because an exception may be false, or refuse to say.
            triple = (type(error), error, error.__traceback__)
            logger.error("item %d failed", item.index, exc_info=triple)
        return is_first

    def _store(self, item: Item, error: BaseException | None, value: Any) -> bool:
        if self._active.pop(item.index, None) is None:
            return False
        item.error = error
        if error is None:
            item.ok = True
            if item.flag is None or not item.running:  # else another attempt may just begin
                item.source = None
        else:
            self._errors += 1
            most = self.limits.max_errors
            if most is not None and self._errors >= most:
                self.stop(f"the limit of {most} errors was reached")
        if self._hand_out is None and item.ok and not self._keeps_outcomes:
            self._values[item.index] = value
            return True
        item.value = value
        item.seconds = time.monotonic() - item.started
        if self._hand_out is None:
            self._items[item.index] = item
        else:
            self._hand_out(item)
        return True

    def timed_out(self, item: Item, timeout_s: float) -> ItemTimeoutError:
        """Make the error of an item that took too long."""
        return ItemTimeoutError(
            f"Item {item.index} was given {timeout_s:.3g} s and did not end in time.",
            index=item.index,
            timeout_s=timeout_s,
        )

    def stop_for_total_time(self) -> None:
        """Take no further item, because the time of the run is over."""
        self.stop(f"its {self.limits.total_timeout_s or 0:g} s were over")

    # -- the end of the run ------------------------------------------------------------------------

    def abort(self, reason: str) -> None:
        """Take no further item, and tell those under way to stop.

        Args:
            reason: As in `stop`.
        """
        self.stop(reason)
        self.flag.cancel(f"the batch stopped because {reason}")

    def close(self) -> None:
        """Let go of what surrounds the run, when it is over."""
        self.flag.close()

    def outcomes(self) -> list[Outcome[Any]]:
        """Return one outcome per item of the input, as far as it is known, in input order."""
        # An input that was read to its end has told its length; what it announced was a guess.
        is_read = self.is_exhausted and self.input_error is None
        known = self._taken if is_read else max(self._taken, self.total or 0)
        return [self._outcome(index) for index in range(known)]

    def _outcome(self, index: int) -> Outcome[Any]:
        if (item := self._items.get(index)) is not None:
            return item.outcome()
        value = self._values[index] if index < len(self._values) else _NONE_YET
        if value is not _NONE_YET:
            return Outcome(index=index, ok=True, value=value)
        reason = self.stop_reason or "the batch ended before it"
        if (item := self._active.get(index)) is not None:
            error = CallCancelledError(f"Item {index} was under way and did not end: {reason}.")
            return Outcome(index=index, ok=False, error=error, attempts=item.attempts)
        return skipped(index, reason)

    def values(self) -> list[Any] | None:
        """Return all values in input order; None where they are not kept or an item failed."""
        if self._keeps_outcomes or self._errors or self.stop_reason or self.input_error is not None:
            return None
        if self._values and self._values[-1] is _NONE_YET:  # a list that was shortened meanwhile
            return None
        return self._values

    @property
    def is_cut_short(self) -> bool:
        """Whether it stopped where nobody knows how many items were to come."""
        return bool(self.stop_reason) and self.total is None and not self.is_exhausted

    def rest(self) -> Outcome[Any]:
        """Return one outcome for all items of an input that was cut short."""
        return skipped(self._taken, f"{self.stop_reason}, and so were all items after it")

    def source(self, index: int) -> Any:
        """Return the item of a failure as the user gave it."""
        item = self._items.get(index) or self._active.get(index)
        return None if item is None else item.source

    def early_end(self) -> BatchError | None:
        """Make the error of a run whose items were handed out and that stopped before its end."""
        if self.input_error is not None:
            reason = "the input raised an error, so nobody knows how many items it has"
        elif self.stop_reason:
            reason = f"the batch stopped because {self.stop_reason}"
        else:
            return None
        started = self._taken - self._refused
        error = BatchError(
            f"{self._errors} of {started} items failed; {reason}. Their outcomes were handed out.",
            results={},
            errors={},
            untried=None if self.total is None else self.total - started,
        )
        error.__cause__ = self.input_error
        return error


def _is_ctrl_c(error: BaseException) -> bool:
    """Tell whether an exception is the user's Ctrl-C, which arrives in the main thread alone."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and isinstance(error, KeyboardInterrupt)
