"""The threads that work on a run, and the thread that waits for them.

A run inside another shares its threads. Not here: what an item is (`concurrency/items.py`) and
how it ended (`concurrency/run.py`), and tasks of an event loop (`concurrency/tasks.py`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from dspylite.concurrency.items import Item, invoke
from dspylite.concurrency.run import Budget, Run
from dspylite.errors import CallCancelledError
from dspylite.runtime.flow import BLOCKING, run_flow
from dspylite.runtime.interrupts import LOOK_EVERY_S, is_main_interrupted
from dspylite.runtime.loops import start_thread

GRACE_S = 0.2
"""How long workers that were told to stop are waited for, so that those which see it at once have
ended when the caller goes on; guessed."""

_WORKER_NUMBERS = itertools.count(1)


class Crew:
    """Runs a run on threads, and keeps its time.

    Args:
        num_threads: Most items at once.
        room: Ended items that may wait to be fetched before the workers stand still. None: they
            are not fetched one by one.
    """

    def __init__(self, num_threads: int, room: int | None = None) -> None:
        self._num_threads = num_threads
        self._room = room
        self._ready: deque[Item] = deque()
        self._run: Run
        self._budget: Budget
        # Both over the run's lock, which guards all below; two, so that an item that is ready wakes
        # the one who waits for it, and not every worker that waits for room.
        self._changed: threading.Condition
        self._has_room: threading.Condition
        self._live = 0  # workers that are waited for
        self._ends_at: float | None = None
        self._hedge_after_s: float | None = None

    def hand_out(self, item: Item) -> None:
        """Take an ended item for `each`; called under the run's lock."""
        self._ready.append(item)
        self._changed.notify_all()

    # -- the thread that waits ---------------------------------------------------------------------

    def work(self, run: Run) -> None:
        """Run to the end and wait for it on this thread.

        Raises:
            CallCancelledError: The work that the run is part of was told to stop.
            KeyboardInterrupt: Ctrl-C, here or in the main thread.
        """
        for _ in self.each(run):
            raise AssertionError("items are handed out only where there is room")

    def each(self, run: Run) -> Generator[Item, None, None]:
        """Run to the end and give each item when it has ended.

        This thread works too where the run is nested, so that no thread only waits.

        Raises:
            CallCancelledError: As `work`.
            KeyboardInterrupt: As `work`.
        """
        self._run = run
        self._changed = threading.Condition(run.lock)
        self._has_room = threading.Condition(run.lock)
        run.open()
        waking = run.flag.watch(self._wake)
        try:
            works_too = self._start()
            while works_too and (item := run.take()) is not None:
                self._attempt(item)
                while self._ready:
                    yield self._fetch()
            while self._attend():
                yield self._fetch()
            run.flag.check()
        except BaseException as error:  # Ctrl-C, a flag, or a caller that asks for no more
            run.abort(_why(error))
            self._wake()
            if not isinstance(error, GeneratorExit):
                self._wait_a_moment()
            raise
        finally:
            run.flag.unwatch(
                waking
            )  # else the results would stay until the garbage collector comes
            run.close()

    def _start(self) -> bool:
        """Start the workers; tell whether this thread is one of them."""
        run, width = self._run, self._num_threads
        if run.total is not None:
            width = max(1, min(width, run.total))
        if run.limits.total_timeout_s is not None:
            self._ends_at = time.monotonic() + run.limits.total_timeout_s
        self._hedge_after_s = run.limits.hedge_after_s
        budget = run.outer_budget
        # A thread that keeps the time, or that is asked for what is ready, cannot work.
        works_too = budget is not None and not run.limits.is_watched
        if budget is None:
            budget = Budget(self._num_threads)
            run.set_budget(budget)
        self._budget = budget
        crew = left = budget.take(width - works_too)
        try:
            while left and run.goes_on():  # the first ones may have taken all there is
                left -= 1
                self._start_worker(budget)
        except RuntimeError:  # the system has no more threads; fewer will do
            if not self._live and not works_too and run.goes_on():
                raise
        finally:
            budget.give(left)
        if not crew and not works_too:  # nested, with no thread to spare: one more than the budget
            self._start_worker(None)
        return works_too

    def _fetch(self) -> Item:
        item = self._ready.popleft()
        if self._room is not None and len(self._ready) < self._room:
            with self._run.lock:
                self._has_room.notify()
        return item

    def _attend(self) -> bool:
        """Keep the time until something is ready; False when all is over."""
        run = self._run
        is_outermost = run.outer_budget is None
        is_main = threading.current_thread() is threading.main_thread()
        while True:
            with _interruptible(run.lock):
                if self._ready:
                    return True
                active = run.active
                # A worker that still reads the input of a stopped run is not waited for.
                if not active and (not self._live or (run.is_stopped and run.locks_ends)):
                    return False
                run.flag.check()
                late, slow, wait_s = self._late(active)
                if not late and not slow:
                    if is_outermost:  # also for Ctrl-C that does not wake a waiting thread
                        wait_s = min(LOOK_EVERY_S, LOOK_EVERY_S if wait_s is None else wait_s)
                    self._changed.wait(
                        None if wait_s is None else min(wait_s, threading.TIMEOUT_MAX)
                    )
            for item in slow:
                self._hedge(item)
            for item, error in late:
                if run.give_up(item, error):
                    self._lose_worker(item)
            if is_outermost and not is_main and is_main_interrupted():
                raise KeyboardInterrupt

    def _late(
        self, active: list[Item]
    ) -> tuple[list[tuple[Item, Exception]], list[Item], float | None]:
        """Find items whose time is up, items to start again, and how long to wait for others."""
        run, now = self._run, time.monotonic()
        limits = run.limits
        if self._ends_at is not None and now >= self._ends_at:
            run.stop_for_total_time()
            return [(item, run.timed_out(item, now - item.started)) for item in active], [], 0
        waits = [] if self._ends_at is None else [self._ends_at - now]
        late: list[tuple[Item, Exception]] = []
        slow: list[Item] = []
        for item in active:
            age = now - item.started
            if limits.timeout_s is not None:
                if age >= limits.timeout_s:
                    late.append((item, run.timed_out(item, limits.timeout_s)))
                    continue
                waits.append(limits.timeout_s - age)
            if self._hedge_after_s is not None and item.attempts == 1:
                if age >= self._hedge_after_s:
                    slow.append(item)
                else:
                    waits.append(self._hedge_after_s - age)
        # An item taken meanwhile is late no sooner than this.
        waits += [wait for wait in (limits.timeout_s, self._hedge_after_s) if wait is not None]
        return late, slow, min(waits, default=None)

    def _wait_a_moment(self) -> None:
        ends_at = time.monotonic() + GRACE_S
        with self._run.lock:
            while self._live and (left := ends_at - time.monotonic()) > 0:
                self._changed.wait(left)

    def _wake(self) -> None:
        with self._run.lock:
            self._changed.notify_all()
            self._has_room.notify_all()

    # -- the threads that work ---------------------------------------------------------------------

    def _start_worker(self, budget: Budget | None) -> None:
        with self._run.lock:
            self._live += 1
        try:
            _start_thread(self._work, budget)
        except RuntimeError:
            with self._run.lock:
                self._live -= 1
            raise

    def _work(self) -> None:
        run, is_waited_for = self._run, True
        try:
            while (item := run.take()) is not None:
                self._attempt(item)
                if item.flag is not None and not self._leave(item):
                    is_waited_for = False  # given up with its item; another has this one's place
                    return
                if self._room is not None:
                    self._wait_for_room(self._room)
        except BaseException as error:  # of a log handler, say; else the run would wait for ever
            run.stop(f"a worker failed ({type(error).__name__})")
            raise
        finally:
            if is_waited_for:
                with run.lock:
                    self._live -= 1
                    self._changed.notify_all()

    def _attempt(self, item: Item) -> bool:
        run = self._run
        error: BaseException | None = None
        value = None
        try:
            job = run.as_job(item.index, item.source)
            value = run.context_of(item).run(run_flow, invoke(BLOCKING, job))
        except BaseException as caught:  # noqa: BLE001  # a worker's border: SystemExit too is kept
            error = caught
        return run.end_attempt(item, error, value)

    def _leave(self, item: Item) -> bool:
        """Part a worker from its item; False if it was given up meanwhile."""
        with self._run.lock:
            is_mine = item.has_worker
            item.has_worker = False
            return is_mine

    def _lose_worker(self, item: Item) -> None:
        """Wait no longer for the worker of an item that ended without it; start another."""
        with self._run.lock:
            is_lost = item.has_worker
            item.has_worker = False
            self._live -= is_lost
            self._changed.notify_all()
        if is_lost and self._run.goes_on():
            try:
                self._start_worker(self._budget if self._budget.take(1) else None)
            except RuntimeError as error:
                if not self._live:  # nobody is left to work; what finished is kept
                    self._run.stop(f"no thread could be started ({error})")

    def _hedge(self, item: Item) -> None:
        """Start an item a second time, on a thread more than the others."""
        run = self._run
        if not run.begin_attempt(item):
            return

        def work() -> None:
            if not run.is_active(item):  # it ended while this thread was started
                return
            if self._attempt(item) and not run.is_active(item):
                self._lose_worker(item)

        try:
            _start_thread(work, self._budget if self._budget.take(1) else None)
        except RuntimeError:  # the system has no more threads; the originals may still end
            self._hedge_after_s = None
            run.drop_attempt(item)

    def _wait_for_room(self, room: int) -> None:
        with self._run.lock:
            while len(self._ready) >= room and not self._run.is_stopped:
                self._has_room.wait()


@contextmanager
def _interruptible(lock: AbstractContextManager[Any]) -> Generator[None, None, None]:
    """Hold a lock for a block that waits by a condition of it, which Ctrl-C may end anywhere.

    Between two of its steps `Condition.wait` does not hold the lock; ended there, it leaves a block
    that gives back what it has not, and fails so in the place of the interrupt.
    """
    try:
        with lock:
            yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _start_thread(work: Callable[[], None], budget: Budget | None) -> None:
    def run() -> None:
        try:
            work()
        finally:
            if budget is not None:
                budget.give()

    name = f"dspylite-worker-{next(_WORKER_NUMBERS)}"
    try:
        start_thread(run, name)
    except RuntimeError:
        if budget is not None:
            budget.give()
        raise


def _why(error: BaseException) -> str:
    if isinstance(error, GeneratorExit):
        return "nobody asked for the rest of its results"
    return "it was cancelled" if isinstance(error, CallCancelledError) else "it was interrupted"
