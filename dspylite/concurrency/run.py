"""One run over many items: takes items, runs each in a context of its own, keeps every outcome.

The state is shared by both drivers; how items are waited for, on threads or as tasks, is what
differs. Not here: the forms of input and output that users see (`concurrency/parallel.py`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import anyio

from dspylite.abc import Io
from dspylite.concurrency.outcome import Outcome, skipped
from dspylite.errors import ItemTimeoutError
from dspylite.runtime.calls import set_item_index
from dspylite.runtime.flow import ASYNC, BLOCKING, Both, run_flow
from dspylite.runtime.settings import pin, settings
from dspylite.runtime.threads import InContext, carried_context
from dspylite.runtime.tracking import UsageTracker

logger = logging.getLogger(__name__)

_WORKER_NUMBERS = itertools.count(1)

Progress = Callable[[int, int | None, int], object]
"""Called after each item with (done, total or None if unknown, errors), from the worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One item, made callable.

    Attributes:
        index: Its place in the input.
        source: The item as the user gave it.
        target: The module or function to call.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    index: int
    source: Any
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a run stops early, and when an item is given up.

    Attributes:
        max_errors: Failures after which no further item is taken; None for no bound.
        timeout_s: Wall time of one item, in seconds.
        total_timeout_s: Wall time of the run, in seconds.
    """

    max_errors: int | None = None
    timeout_s: float | None = None
    total_timeout_s: float | None = None


async def _invoke(io: Io, job: Job) -> Any:
    if hasattr(job.target, "acall"):
        return await io.call(Both(job.target, job.target.acall), *job.args, **job.kwargs)
    return await io.any(job.target, *job.args, **job.kwargs)


class Budget:
    """Threads that one outermost run and all runs nested in it may use together."""

    def __init__(self, threads: int) -> None:
        self._lock = threading.Lock()  # guards the count; nothing is called while it is held
        self._free = threads

    def take(self, wanted: int) -> int:
        """Take up to `wanted` threads; return how many there were."""
        with self._lock:
            taken = max(0, min(wanted, self._free))
            self._free -= taken
            return taken

    def give(self) -> None:
        """Give one thread back."""
        with self._lock:
            self._free += 1


_BUDGET: ContextVar[Budget | None] = ContextVar("dspylite_thread_budget", default=None)


class _Taken(NamedTuple):
    """An item that a worker has taken from the input."""

    place: int  # a tuple has an `index` of its own
    source: Any
    started: float


class Run:
    """The state of one run; used once.

    Args:
        items: What to run over, read as workers ask for more and never ahead of them.
        as_job: Makes an item callable; what it raises is that item's error.
        limits: When to stop.
        total: How many items there are, if known.
        progress: Told after each item.
        log_tracebacks: Whether failures are logged with their traceback.
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
    ) -> None:
        self._iterator: Iterator[Any] | AsyncIterator[Any] = (
            iter(items) if isinstance(items, Iterable) else aiter(items)
        )
        self._as_job = as_job
        self._limits = limits
        self.total = total
        self._progress = progress
        self._log_tracebacks = log_tracebacks
        # `_lock` guards all that follows; no user code runs while it is held.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # `_taking` guards the user's iterator; it is taken before `_lock`, never inside it.
        self._taking = threading.Lock()
        # `_telling` keeps progress reports in order; it is taken before `_lock`, never inside it.
        self._telling = threading.Lock()
        self._outcomes: dict[int, Outcome[Any]] = {}
        self._sources: dict[int, Any] = {}  # of items under way or failed
        self._active: dict[int, float] = {}  # index -> start on the monotonic clock
        self._taken = 0
        self._errors = 0
        self._exhausted = False
        self._stop_reason = ""
        self.input_error: BaseException | None = None
        self._context = carried_context()
        self._parent_tracker: UsageTracker | None = settings.usage_tracker
        self._pinned = settings.snapshot().values
        self._deadline = (
            None if limits.total_timeout_s is None else time.monotonic() + limits.total_timeout_s
        )

    # -- what both drivers share ------------------------------------------------------------------

    @property
    def stop_reason(self) -> str:
        """Why the run stopped before its input ended; empty if it did not."""
        return self._stop_reason

    def _closed(self) -> bool:
        return self._exhausted or bool(self._stop_reason)

    def stop(self, reason: str) -> None:
        """Take no further item."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason
            self._changed.notify_all()

    def _begin(self, source: Any) -> _Taken | None:
        with self._lock:
            if self._stop_reason:  # it came while the input was being read; nobody waits any more
                return None
            index = self._taken
            self._taken += 1
            self._sources[index] = source
            started = self._active[index] = time.monotonic()
            return _Taken(index, source, started)

    def _end_of_input(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._exhausted = True
            self.input_error = error
            self._changed.notify_all()

    def finish(self, outcome: Outcome[Any]) -> bool:
        """Record how an item ended; False if it had been given up before."""
        if self._progress is None:
            return self._record(outcome) is not None
        with self._telling:
            counts = self._record(outcome)
            if counts is None:
                return False
            done, errors = counts
            try:
                self._progress(done, self.total, errors)
            except Exception:  # reported here; a broken progress display must not harm the batch
                logger.warning("the progress callback failed", exc_info=True)
            return True

    def _record(self, outcome: Outcome[Any]) -> tuple[int, int] | None:
        """Keep an outcome; return how many items are done and how many of them failed."""
        with self._lock:
            if outcome.index not in self._active:
                return None
            del self._active[outcome.index]
            self._outcomes[outcome.index] = outcome
            if outcome.ok:
                del self._sources[outcome.index]
            else:
                self._errors += 1
                most = self._limits.max_errors
                if most is not None and self._errors >= most and not self._stop_reason:
                    self._stop_reason = f"the limit of {most} errors was reached"
            if not self._active:
                self._changed.notify_all()
            return len(self._outcomes), self._errors

    def _context_of(self, index: int, tracker: UsageTracker) -> Context:
        context = self._context.copy()
        context.run(_enter_item, index, {**self._pinned, "usage_tracker": tracker})
        return context

    def _outcome(
        self,
        index: int,
        started: float,
        tracker: UsageTracker,
        error: BaseException | None,
        value: Any,
    ) -> Outcome[Any]:
        if error is not None and self._log_tracebacks:
            logger.error("item %d failed", index, exc_info=error)
        return Outcome(
            index=index,
            ok=error is None,
            value=value,
            error=error,
            seconds=time.monotonic() - started,
            usage=tracker.by_model,
        )

    def outcomes(self) -> list[Outcome[Any]]:
        """Return one outcome per item of the input, as far as it is known, in input order."""
        with self._lock:
            known = max(self._taken, self.total or 0)
            reason = self._stop_reason or "the batch ended before it"
            return [self._outcomes.get(index) or skipped(index, reason) for index in range(known)]

    def source(self, index: int) -> Any:
        """Return the item of a failure as the user gave it."""
        return self._sources.get(index)

    def _timed_out(self, index: int, timeout_s: float) -> Outcome[Any]:
        error = ItemTimeoutError(
            f"Item {index} was given {timeout_s:g} s and did not end in time.",
            index=index,
            timeout_s=timeout_s,
        )
        return Outcome(index=index, ok=False, error=error, seconds=timeout_s)

    # -- on threads -------------------------------------------------------------------------------

    def on_threads(self, num_threads: int) -> None:
        """Run to the end on worker threads and wait for it on this one.

        A run inside another shares its threads: this thread then works too, with as many others as
        the outermost run has to spare.
        """
        width = num_threads if self.total is None else max(1, min(num_threads, self.total))
        timed = self._limits.timeout_s is not None or self._deadline is not None
        budget = _BUDGET.get()
        works_too = budget is not None and not timed  # a thread that keeps the time cannot work
        if budget is None:
            budget = Budget(num_threads)
            self._context.run(_BUDGET.set, budget)
        crew = budget.take(width - works_too)
        try:
            for _ in range(crew):
                self._start_worker(budget)
            if works_too:
                self._work()
            elif not crew:  # nested and timed, with no thread to spare: one more than the budget
                self._start_worker(None)
            self._wait(budget)
        except BaseException:  # Ctrl-C: workers take nothing more; being daemons they delay no exit
            self.stop("it was interrupted")
            raise

    def _start_worker(self, budget: Budget | None) -> None:
        def work() -> None:
            try:
                self._work()
            finally:
                if budget is not None:
                    budget.give()

        name = f"dspylite-worker-{next(_WORKER_NUMBERS)}"
        threading.Thread(target=work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            if not self._run_item(taken):
                return  # given up for taking too long; another worker has this one's place

    def _take(self) -> _Taken | None:
        if self._closed():
            return None
        with self._taking:
            if self._closed():
                return None
            try:
                source = next(cast("Iterator[Any]", self._iterator))  # async inputs go by `_atake`
            except StopIteration:
                self._end_of_input()
                return None
            except Exception as error:  # noqa: BLE001  # the user's iterator; cause of the BatchError
                self._end_of_input(error)
                return None
            return self._begin(source)

    def _run_item(self, taken: _Taken) -> bool:
        index, source, started = taken
        tracker = UsageTracker(self._parent_tracker)
        context = self._context_of(index, tracker)
        error: BaseException | None = None
        value: Any = None
        try:
            job = self._as_job(index, source)
            value = context.run(run_flow, _invoke(BLOCKING, job))
        except BaseException as caught:  # noqa: BLE001  # a worker's border: SystemExit too is kept
            error = caught
        return self.finish(self._outcome(index, started, tracker, error, value))

    def _wait(self, budget: Budget) -> None:
        while True:
            late: list[tuple[int, float]] = []
            with self._lock:
                if self._closed() and not self._active:
                    break
                now = time.monotonic()
                late, wait_s = self._late(now)
                if not late:
                    self._changed.wait(wait_s)
            for index, timeout_s in late:
                if self.finish(self._timed_out(index, timeout_s)) and not self._closed():
                    self._start_worker(budget if budget.take(1) else None)
        with self._telling:  # the last report is out before the caller has its results
            return

    def _late(self, now: float) -> tuple[list[tuple[int, float]], float | None]:
        """Find items whose time is up, and how long to wait until the next may be."""
        if self._deadline is not None and now >= self._deadline:
            total = self._limits.total_timeout_s or 0.0
            self._stop_reason = self._stop_reason or f"its {total:g} s were over"
            return [(index, now - start) for index, start in self._active.items()], 0
        waits = [] if self._deadline is None else [self._deadline - now]
        late: list[tuple[int, float]] = []
        if (limit := self._limits.timeout_s) is not None:
            for index, start in self._active.items():
                if now >= start + limit:
                    late.append((index, limit))
                else:
                    waits.append(start + limit - now)
            waits.append(limit)  # an item taken meanwhile is late no sooner than this
        return late, min(waits, default=None)

    # -- as tasks ---------------------------------------------------------------------------------

    async def as_tasks(self, num_tasks: int) -> None:
        """Run to the end as tasks of this event loop."""
        width = num_tasks if self.total is None else max(1, min(num_tasks, self.total))
        taking = anyio.Lock()
        with anyio.CancelScope() as scope:
            if self._limits.total_timeout_s is not None:
                scope.deadline = anyio.current_time() + self._limits.total_timeout_s
            async with anyio.create_task_group() as group:
                for _ in range(width):
                    group.start_soon(self._work_as_task, taking)
        if scope.cancelled_caught:
            self.stop(f"its {self._limits.total_timeout_s:g} s were over")
            for index, start in list(self._active.items()):
                self.finish(self._timed_out(index, time.monotonic() - start))

    async def _work_as_task(self, taking: anyio.Lock) -> None:
        while True:
            async with taking:
                taken = await self._atake()
            if taken is None:
                return
            await self._run_item_as_task(taken)

    async def _atake(self) -> _Taken | None:
        if isinstance(self._iterator, Iterator):
            return self._take()
        if self._closed():
            return None
        try:
            source = await anext(self._iterator)
        except StopAsyncIteration:
            self._end_of_input()
            return None
        except Exception as error:  # noqa: BLE001  # the user's iterator; cause of the BatchError
            self._end_of_input(error)
            return None
        return self._begin(source)

    async def _run_item_as_task(self, taken: _Taken) -> None:
        index, source, started = taken
        tracker = UsageTracker(self._parent_tracker)
        context = self._context_of(index, tracker)
        error: BaseException | None = None
        value: Any = None
        timeout_s = self._limits.timeout_s
        with anyio.move_on_after(timeout_s) as scope:
            try:
                job = self._as_job(index, source)
                value = await InContext(context.run(_invoke, ASYNC, job), context)
            except (Exception, SystemExit) as caught:  # noqa: BLE001  # a worker's border: it is kept
                error = caught
        if scope.cancelled_caught and timeout_s is not None:
            self.finish(self._timed_out(index, timeout_s))
        else:
            self.finish(self._outcome(index, started, tracker, error, value))


def _enter_item(index: int, pinned: Mapping[str, Any]) -> None:
    set_item_index(index)
    pin(pinned)
