"""Single calls on their way into batches: who waits, which batch goes out when, on which thread.

Not here: what a batch asks, and what its results are to each caller (`concurrency/microbatch.py`).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from dspylite.abc import Clock
from dspylite.errors import ClosedError, OverloadedError
from dspylite.runtime.cancellation import Cancellation
from dspylite.runtime.clock import Latch
from dspylite.runtime.gates import Pass, wake
from dspylite.runtime.loops import end_kept_loop, start_thread

LINGER_S = 5.0
"""How long a thread without work waits for some before it ends, so that calls that come now and
then need no new thread each, and no new event loop; guessed."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When batches go out.

    Attributes:
        size: Most items in one.
        window_s: How long the first item waits for others.
        limit: Most batches at once.
        max_queue: Most items that wait; None: as many as come.
    """

    size: int
    window_s: float
    limit: float
    max_queue: int | None


class Kind(NamedTuple):  # made for every call, and a dataclass costs more
    """What calls must have in common to share a batch.

    Attributes:
        settings: The settings, in a form that tells them from others.
        within: The batchers for whose batches the callers work.
    """

    settings: Hashable
    within: frozenset[object]


class Call:
    """One item, and what became of it; a gate for its caller alone, and its ticket as well."""

    __slots__ = (
        "_line", "batch", "error", "granted", "item", "kind", "look_again_at", "overlay", "value",
        "wake",
    )  # fmt: skip

    def __init__(
        self, line: Line, item: Any, kind: Kind, overlay: Mapping[str, Any] | None
    ) -> None:
        self._line = line
        self.item = item
        self.kind = kind
        self.overlay = overlay
        self.batch: Batch | None = None
        self.value: Any = None
        self.error: Exception | None = None
        self.granted = False
        self.look_again_at: float | None = None  # the batch's thread keeps the time
        self.wake: Callable[[], None] | None = None

    def ask(self, now: float) -> Call:
        """Stand in line."""
        del now  # the caller's clock may be another than that of the batches
        self._line.add(self)
        return self

    def look(self, now: float) -> None:
        """Do nothing: only the batch lets its callers go."""

    def leave(self, ticket: Call, now: float) -> None:
        """Take the item back, where it is not answered."""
        del ticket, now
        if not self.granted:
            self._line.withdraw(self)

    def settle(self, value: Any, error: Exception | None = None) -> None:
        """Give the caller the result or the error."""
        self.value, self.error = value, error
        self.granted = True
        wake(self)


class Batch:
    """Calls that are answered together.

    Attributes:
        kind: What they have in common.
        overlay: The settings of their callers.
        due: When it goes out at the latest.
        calls: Those whose callers still wait.
        sent: Those whose items went out; None until then.
        flag: Raised when nobody waits for it any more.
    """

    __slots__ = ("calls", "due", "flag", "kind", "overlay", "sent")

    def __init__(self, first: Call, due: float) -> None:
        self.kind = first.kind
        self.overlay = first.overlay
        self.due = due
        self.calls: dict[Call, None] = {}
        self.sent: tuple[Call, ...] | None = None
        self.flag = Cancellation()


class _Worker:
    """A thread of a line, from the moment it is wanted."""

    __slots__ = ("changed", "has_begun", "is_given_up", "wanted_by")

    def __init__(self) -> None:
        self.wanted_by = threading.get_ident()
        self.changed = Latch()
        self.has_begun = False
        self.is_given_up = False


class Line:
    """Where calls wait, and the threads that send them on.

    There are as many threads as there are batches at once, and at most `rules.limit`. One of those
    without a batch keeps the time of the batch that is due next; the others end after a while. All
    are daemons, which keep no process from ending.

    It is a gate too: it opens when it is closed and all that it took is answered.

    Args:
        run: Answers all calls of a batch; must not raise.
        rules: When batches go out.
        clock: The time that they live by.
    """

    def __init__(self, run: Callable[[Batch], None], rules: Rules, clock: Clock) -> None:
        self._run = run
        self._rules = rules
        self._clock = clock
        self._lock = threading.Lock()  # guards all below; nobody is called while it is held
        self._open: dict[Kind, Batch] = {}  # with room for more; the one that is due first is first
        self._full: deque[Batch] = deque()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []  # those that wait, without the next one
        self._keeper: _Worker | None = None  # waits for the batch that is due first
        self._closers: list[Pass] = []
        self.is_closed = False

    # -- callers -----------------------------------------------------------------------------------

    def add(self, call: Call) -> None:
        """Put a call into the batch of its kind.

        Raises:
            ClosedError: The line is closed.
            OverloadedError: `max_queue` items wait already.
        """
        now = self._clock.now()
        try:
            with self._lock:
                self._check_room()
                batch = self._open.get(call.kind)
                is_first = batch is None
                if batch is None:
                    batch = self._open[call.kind] = Batch(call, now + self._rules.window_s)
                call.batch = batch
                batch.calls[call] = None
                is_full = len(batch.calls) >= self._rules.size
                if is_full:
                    self._full.append(batch)
                    del self._open[call.kind]
                worker = self._wanted(is_full=is_full) if is_full or is_first else None
            if worker is not None:
                self._rouse(worker)
        except Exception:
            raise
        except BaseException:  # Ctrl-C
            self._mend()
            self.withdraw(call)
            raise

    def withdraw(self, call: Call) -> None:
        """Forget a call; where its batch is under way and has no others left, tell it to stop."""
        with self._lock:
            batch = call.batch
            if batch is None or call not in batch.calls:
                return
            del batch.calls[call]
            if batch.calls:
                return
            if batch.sent is None:
                if self._open.get(batch.kind) is batch:
                    del self._open[batch.kind]
                else:
                    self._full.remove(batch)
                return
        batch.flag.cancel("nobody waits for its batch any more")

    def _mend(self) -> None:
        """Put right what Ctrl-C, which comes between any two steps, left half done on this thread.

        A thread may have been chosen and not told, or counted and not started, and then nobody
        would ever look after the items of the others.
        """
        me = threading.get_ident()
        with self._lock:
            for batch in self._full:
                if self._open.get(batch.kind) is batch:
                    del self._open[batch.kind]
            for worker in [each for each in self._workers if each.wanted_by == me]:
                worker.is_given_up = not worker.has_begun
                if worker.is_given_up:
                    self._workers.discard(worker)
            begun = [worker for worker in self._workers if worker.has_begun]
            other = None if begun else self._wanted(is_full=bool(self._full))
            closers = self._part_with(None) if other is None else []
        for worker in begun:
            worker.changed.set()  # it looks; for nothing, at worst
        if other is not None:
            self._rouse(other)
        _open(closers)

    def _check_room(self) -> None:
        if self.is_closed:
            raise closed_error()
        most = self._rules.max_queue
        if most is not None and sum(len(batch.calls) for batch in self._waiting()) >= most:
            raise OverloadedError(
                f"{most} items wait for their batches, which is all that `max_queue` allows. Call "
                "again later, let more batches run at once by `max_concurrency=`, or raise "
                "`max_queue=`."
            )

    def _waiting(self) -> Iterator[Batch]:
        yield from self._full
        yield from self._open.values()

    # -- closing -----------------------------------------------------------------------------------

    def close(self, *, drop: bool) -> None:
        """Take nothing more; what waits goes out now, or gets an error."""
        dropped: list[Call] = []
        try:
            self._close(dropped, drop=drop)
        except BaseException:  # Ctrl-C
            self._mend()
            self._close(dropped, drop=drop)
            raise

    def _close(self, dropped: list[Call], *, drop: bool) -> None:
        with self._lock:
            self.is_closed = True
            if drop:
                dropped.extend(call for batch in self._waiting() for call in batch.calls)
                self._open.clear()
                self._full.clear()
            idle, self._idle = self._idle, []
            if self._keeper is not None:
                idle.append(self._keeper)
                self._keeper = None
            wanted = None if idle else self._wanted(is_full=True)
        for worker in idle:
            worker.changed.set()
        if wanted is not None:
            self._rouse(wanted)
        for call in dropped:
            if call.granted:  # Ctrl-C came before it was woken
                wake(call)
            else:
                call.settle(None, closed_error())

    def ask(self, now: float) -> Pass:
        """Wait until all is answered."""
        del now
        ticket = Pass()
        with self._lock:
            if self.is_closed and not self._workers:
                ticket.granted = True
            else:
                self._closers.append(ticket)
        return ticket

    def look(self, now: float) -> None:
        """Do nothing: the last thread opens the gate."""

    def leave(self, ticket: Pass, now: float) -> None:
        """Wait no longer."""
        del now
        with self._lock:
            if ticket in self._closers:
                self._closers.remove(ticket)

    # -- threads -----------------------------------------------------------------------------------

    def _wanted(self, *, is_full: bool) -> _Worker | None:
        """Choose who looks after what waits; under the lock.

        Args:
            is_full: Whether a batch can go out, so that it is no help that somebody keeps the time.
        """
        if not self._full and not self._open:
            return None
        if self._keeper is not None:
            if not is_full:
                return None
            worker, self._keeper = self._keeper, None
            return worker
        if self._idle:
            return self._idle.pop()
        if len(self._workers) >= self._rules.limit:
            return None  # all are busy, and will look when they are done
        worker = _Worker()
        self._workers.add(worker)
        return worker

    def _rouse(self, worker: _Worker) -> None:
        if worker.has_begun:
            worker.changed.set()
            return
        try:
            # In an empty context: with `propagate_to_threads` it would keep that of one caller.
            Context().run(start_thread, partial(self._begin, worker), "dspylite-batcher")
        except RuntimeError:  # the system has no more threads, or the interpreter is ending
            self._work_here(worker)

    def _begin(self, worker: _Worker) -> None:
        with self._lock:
            if worker.is_given_up:
                return
            worker.has_begun = True
        while (batch := self._next(worker)) is not None:
            self._run(batch)

    def _work_here(self, worker: _Worker) -> None:
        """Send all that waits from this thread, unless there is another to do it."""
        while True:
            with self._lock:
                is_alone = len(self._workers) == 1
                batch = self._take(math.inf) if is_alone else None
                closers = self._part_with(worker) if batch is None else []
            if batch is None:
                _open(closers)
                return
            self._run(batch)

    def _next(self, worker: _Worker) -> Batch | None:
        """Wait for a batch that can go out; None when this thread must end."""
        ends_at: float | None = None
        other: _Worker | None = None
        while True:
            now = self._clock.now()
            with self._lock:
                if self._keeper is worker:
                    self._keeper = None
                elif worker in self._idle:
                    self._idle.remove(worker)
                batch = self._take(now)
                if batch is not None:
                    other = self._wanted(is_full=bool(self._full))
                    break
                if self.is_closed:
                    break
                worker.changed.clear()
                if self._open and self._keeper is None:
                    self._keeper, ends_at = worker, None
                    wait_s = next(iter(self._open.values())).due - now
                else:
                    ends_at = now + LINGER_S if ends_at is None else ends_at
                    if now >= ends_at:
                        self._workers.discard(worker)
                        return None
                    self._idle.append(worker)
                    wait_s = ends_at - now
            self._clock.wait(worker.changed, wait_s)
        if batch is not None:
            if other is not None:
                self._rouse(other)
            return batch
        try:
            end_kept_loop()  # whoever waits for the end waits for this too
        finally:
            with self._lock:
                closers = self._part_with(worker)
            _open(closers)
        return None

    def _take(self, now: float) -> Batch | None:
        """Take the batch that goes out next; None where none does yet; under the lock."""
        batch = self._full[0] if self._full else None
        oldest = next(iter(self._open.values()), None)
        is_due = oldest is not None and (self.is_closed or now >= oldest.due)
        if oldest is not None and is_due and (batch is None or oldest.due < batch.due):
            batch = self._open.pop(oldest.kind)
        elif batch is not None:
            self._full.popleft()
        if batch is not None:
            batch.sent = tuple(batch.calls)
        return batch

    def _part_with(self, worker: _Worker | None) -> list[Pass]:
        """Count a thread no longer; return the tickets of those who waited for the last one."""
        if worker is not None:
            self._workers.discard(worker)
        if not self.is_closed or self._workers:
            return []
        closers, self._closers = self._closers, []
        return closers


def _open(closers: list[Pass]) -> None:
    for ticket in closers:
        ticket.granted = True
        wake(ticket)


def closed_error() -> ClosedError:
    """Make the error of a call that came too late, or was dropped."""
    return ClosedError(
        "This batcher is closed: the item was not sent. Make another `MicroBatcher`, or close it "
        "when its last caller has its answer."
    )
