"""The cache's second level: rows on disk that no call ever waits for long.

Reading takes microseconds and is given up after 0.25 s; writing is left to one thread. Whatever is
wrong with the disk is a miss, one warning and a count. Not here: the database itself (`disk.py`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from dspylite.models.cache.contract import (
    KEYS_AT_ONCE,
    BusyError,
    CacheStore,
    CrowdedError,
    DamagedError,
    UnavailableError,
    database_in,
)
from dspylite.models.cache.exits import MOST_AT_EXIT_S, close_at_exit, note
from dspylite.models.cache.rows import BadRowError
from dspylite.models.cache.salt import make_salt, read_salt
from dspylite.runtime.forks import hold_forks, loading, watch_forks

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 0.25
"""How long a call waits for the disk before it does without."""
MOST_QUEUED_BYTES = 64_000_000
"""Rows that wait to be written; what comes beyond them is not kept."""
MOST_AT_ONCE = 100
"""Rows in one transaction; a fork waits for its end, as do other processes."""
GATHER_S = 0.05
"""How long the thread that writes waits for further rows after the first: a transaction costs as
much as several rows, and each turn of that thread takes time from those that call."""
FORK_WAIT_S = 2.0
"""How long a fork waits for those who read or write. Sixteen busy threads hold up the one that
writes for longer than `LONGEST_WAIT_S`; a child of a fork that did not wait has no disk."""
AT_EXIT_S = 2.0
"""How long the end of the process waits for the next rows to be written."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.25
"""How long the writing thread waits after it met another process's lock; short beside `AT_EXIT_S`,
or many processes that end at once would not all be heard."""
_ALONE_S = 1.0
"""How long a disk that could not be used is left alone; guessed."""

Count = Literal[
    "writes", "dropped_writes", "rejected_rows", "damaged", "busy", "unavailable", "timeouts"
]

_Answer = TypeVar("_Answer")


class DiskStore:
    """Rows by key, on disk.

    Safe to use from any number of threads, tasks and loops, and before and after a fork.

    Args:
        directory: Where the files are.
        size_limit_bytes: Beyond it the rows stored longest ago go.
    """

    def __init__(self, directory: Path, size_limit_bytes: int) -> None:
        self.directory = directory
        self.size_limit_bytes = size_limit_bytes
        self.counts: dict[Count, int] = dict.fromkeys(get_args(Count), 0)
        self._file = database_in(directory)
        self._told: set[str] = set()  # what was warned of
        self._inherited: list[Any] = []  # of a parent process; never closed, so never let go
        self._quiet_for: set[int] = set()  # threads that fork while nobody is inside sqlite
        self._is_lost = False
        self._opened: CacheStore | None = None
        self._start_afresh()
        note(self)
        watch_forks(self)
        hold_forks(self)

    def _start_afresh(self) -> None:
        # Guards the next nine and `counts`; held for a few steps only, and taken before no other.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._rows: dict[str, bytes] = {}  # to be written; readable until they are
        self._unwanted: set[str] = set()  # keys to be removed
        self._queued_bytes = 0
        self._damage: DamagedError | None = None  # seen by a reader, and not set aside yet
        self._is_working = self._is_closing = self._is_idle = False
        self._in_a_hurry = 0  # callers that wait until all is written
        # Held by whoever changes the database, and over a fork; before `_changed`.
        self._in_sqlite = threading.Lock()
        self._pause_s = 0.0
        self._write_at = self._read_at = 0.0  # not before

    def before_fork(self) -> None:
        """Let no fork find a thread inside sqlite, whose locks the child would find held."""
        if not self._in_sqlite.acquire(timeout=FORK_WAIT_S):
            return
        if self._opened is None or self._opened.hold(FORK_WAIT_S):
            self._quiet_for.add(threading.get_ident())
        else:
            self._in_sqlite.release()
            self._opened.let_go()

    def after_fork(self) -> None:
        """Let the threads go on, in the process that forked."""
        if threading.get_ident() in self._quiet_for:
            self._quiet_for.discard(threading.get_ident())
            if self._opened is not None:
                self._opened.let_go()
            self._in_sqlite.release()

    def reset_after_fork(self) -> None:
        """Start a thread and connections of this process's own, when they are needed."""
        if self._opened is not None:
            self._inherited += [self._opened, self._opened.abandon()]
            self._opened = None
        # Otherwise a lock inside sqlite may be held for ever, and nobody must touch it.
        self._is_lost = self._is_lost or threading.get_ident() not in self._quiet_for
        self._quiet_for = set()
        self._start_afresh()

    # -- what callers use -------------------------------------------------------------------------

    def get(self, key: str) -> bytes | None:
        """Return a row, within 0.25 s; None if there is none."""
        row = self._rows.get(key)
        if row is not None or key in self._unwanted or not self._may_be_asked():
            return row
        try:
            return self._ask(lambda: self._table.get(key, LONGEST_WAIT_S))
        except BadRowError:
            self.reject(key)
            return None

    def get_many(self, keys: Sequence[str]) -> Iterator[Mapping[str, bytes]]:
        """Give the rows that there are, some at a time.

        The disk is waited for as long as it answers: 0.25 s for each `KEYS_AT_ONCE` keys, and no
        longer once it was silent for so long.
        """
        is_silent = False
        for start in range(0, len(keys), KEYS_AT_ONCE):
            found: dict[str, bytes] = {}
            wanted: list[str] = []
            for key in keys[start : start + KEYS_AT_ONCE]:
                row = self._rows.get(key)
                if row is not None:
                    found[key] = row
                elif key not in self._unwanted:
                    wanted.append(key)
            if wanted and not is_silent and self._may_be_asked():
                answer = self._ask(functools.partial(self._get_from_table, wanted))
                is_silent = answer is None
                for key, row in (answer or {}).items():
                    if row is None:
                        self.reject(key)
                    else:
                        found[key] = row
            yield found

    def _get_from_table(self, keys: Sequence[str]) -> Mapping[str, bytes | None]:
        return self._table.get_many(keys, LONGEST_WAIT_S)

    def _may_be_asked(self) -> bool:
        if self._is_out_of_use or (self._opened is None and not self._is_there()):
            return False
        return self._damage is None and time.monotonic() >= self._read_at

    def _ask(self, what: Callable[[], _Answer]) -> _Answer | None:
        """Read from the database; None if that cannot be done."""
        try:
            return what()
        except CrowdedError:
            self._count("timeouts")
        except BusyError as error:
            self._count("timeouts")
            self._leave_alone("busy", error)
        except UnavailableError as error:
            self._count("unavailable")
            self._leave_alone("unavailable", error)
        except DamagedError as error:
            with self._changed:
                self._damage = error
                self._wake_thread()
        return None

    def put(self, key: str, row: bytes) -> None:
        """Have a row written soon; nobody waits for it."""
        self.put_many([(key, row)], 0.0)

    def put_many(self, rows: Iterable[tuple[str, bytes]], patience_s: float) -> bool:
        """Have rows written soon; nobody waits for that, but for a place among those that wait.

        Args:
            rows: Keys and rows.
            patience_s: How long to wait for places, in seconds, all in all.

        Returns:
            Whether there was a place for each.
        """
        if self._is_lost:
            self._warn(
                "lost", "the process was forked in the midst of its use; it is not used here"
            )
            return False
        if self._is_out_of_use:
            return False
        dropped, until = 0, time.monotonic() + patience_s
        with self._changed:
            for key, row in rows:
                if self._has_place(row) or self._gets_place(row, until):
                    self._unwanted.discard(key)
                    self._queued_bytes += len(row) - len(self._rows.get(key, b""))
                    self._rows[key] = row
                    self._wake_thread()
                else:
                    dropped += 1
        if dropped:
            self._count("dropped_writes", dropped)
            self._warn("full", "more answers wait to be written than may; the next are not kept")
        return not dropped

    def _has_place(self, row: bytes) -> bool:
        return self._queued_bytes + len(row) <= MOST_QUEUED_BYTES

    def _gets_place(self, row: bytes, until: float) -> bool:
        """Wait until the thread has written enough; `_changed` must be held, and is let go."""
        left_s = until - time.monotonic()
        return left_s > 0 and self._changed.wait_for(lambda: self._has_place(row), left_s)

    def delete(self, key: str) -> None:
        """Have a row removed soon; it is not given any more."""
        if self._is_out_of_use:
            return
        with self._changed:
            self._queued_bytes -= len(self._rows.pop(key, b""))
            self._unwanted.add(key)
            self._wake_thread()

    def reject(self, key: str) -> None:
        """Have a row removed that was found not to be what it should."""
        self._count("rejected_rows")
        self._warn("rejected", "a row is damaged or not of this package; it is dropped")
        self.delete(key)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all rows are written; False if that took too long.

        Args:
            timeout_s: Seconds. None: as long as it takes.
        """
        with self._changed:
            self._in_a_hurry += 1
            self._is_idle = True  # or it would not be told
            if self._is_asked():  # and the thread may have been closed before it was heard
                self._wake_thread()
            try:
                return self._changed.wait_for(
                    lambda: not self._is_asked() and not self._is_working, timeout_s
                )
            finally:
                self._in_a_hurry -= 1

    def clear(self) -> bool:
        """Remove all rows; False if that could not be done."""
        with self._in_sqlite:
            with self._changed:
                self._forget_work()
            return self._is_done(self._table.clear)

    def close(self, timeout_s: float = MOST_AT_EXIT_S) -> None:
        """Write what waits, close the files and end the thread; the next use starts them again.

        Args:
            timeout_s: Seconds after which the rest is left to the thread; so it is after two
                seconds in which no row was written.
        """
        until = time.monotonic() + timeout_s
        written = -1
        while written < self.counts["writes"] and time.monotonic() < until:
            written = self.counts["writes"]
            if self.flush(min(AT_EXIT_S, max(0.0, until - time.monotonic()))):
                break
        with self._changed:
            thread = self._thread
            self._is_closing = thread is not None
            self._changed.notify_all()
        if thread is not None:
            thread.join(min(AT_EXIT_S, max(0.0, until - time.monotonic())))
        elif self._opened is not None:
            self._opened.close()

    def salt(self, proposed: bytes | None = None) -> bytes | None:
        """Return the salt that this directory's fingerprints are made with.

        Args:
            proposed: Becomes the salt where there is none.

        Returns:
            None where there is none, or none could be had.
        """
        try:
            found = read_salt(self.directory)
            if found is None and proposed is not None:
                found = make_salt(self.directory, proposed)
        except OSError as error:
            self._count("unavailable")
            self._warn("unavailable", str(error))
            return None
        return found

    @property
    def _is_out_of_use(self) -> bool:
        # At the interpreter's end locks are held by threads that will not run again, and on Python
        # 3.11 a thread that is started then is waited for without end.
        return self._is_lost or sys.is_finalizing()

    # -- the writing thread -----------------------------------------------------------------------

    def _wake_thread(self) -> None:
        """Have the thread look for work; `_changed` must be held."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="dspylite-cache", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there may be no more threads, or the process is about to end
                self.counts["dropped_writes"] += len(self._rows)
                self._forget_work()
                return
            self._thread = thread
            close_at_exit()
        elif self._is_idle:  # else it looks by itself, soon
            self._is_idle = False
            self._changed.notify_all()

    def _is_asked(self) -> bool:
        return bool(self._rows or self._unwanted or self._damage)

    def _run(self) -> None:
        while self._wait_for_work():
            with self._in_sqlite:
                with self._changed:
                    rows = dict(itertools.islice(self._rows.items(), MOST_AT_ONCE))
                    unwanted = set(self._unwanted)
                    self._is_working = True
                is_over = self._write(rows, unwanted)
                with self._changed:
                    self._is_working = False
                    if is_over:
                        self._strike_off(rows, unwanted)
                    self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False when the thread must end."""
        with self._changed:
            gathers_until: float | None = None
            while True:
                now, pause_s = time.monotonic(), None
                if self._is_asked():
                    if len(self._rows) >= MOST_AT_ONCE:  # there is nothing to gather for
                        gathers_until = now
                    gathers_until = now + GATHER_S if gathers_until is None else gathers_until
                    begin = self._write_at if self._in_a_hurry else gathers_until
                    pause_s = max(begin, self._write_at) - now
                    if pause_s <= 0:
                        return True
                if self._is_closing:
                    break
                self._is_idle = pause_s is None
                self._changed.wait(pause_s)
            self._is_closing = False
            self._thread = None
        # What was begun meanwhile belongs to the next thread, which waits for this lock.
        with self._in_sqlite:
            if self._opened is not None:
                self._opened.close()
        return False

    def _write(self, rows: dict[str, bytes], unwanted: set[str]) -> bool:
        """Write rows and remove others; False if that must be tried again."""
        try:
            self._attempt(lambda: self._change(rows, unwanted))
        except BusyError as error:
            self._count("busy")
            self._warn("busy", str(error))
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
            self._write_at = time.monotonic() + self._pause_s
            return False
        except (UnavailableError, DamagedError):
            self._count("dropped_writes", len(rows))
            self._write_at = time.monotonic() + _ALONE_S
            return True
        self._pause_s = 0.0
        self._count("writes", len(rows))
        return True

    def _change(self, rows: dict[str, bytes], unwanted: set[str]) -> None:
        with self._changed:
            damage, self._damage = self._damage, None
        if damage is not None:
            raise damage
        if unwanted:
            self._table.delete(unwanted)
        if rows:
            self._table.put(rows.items())

    def _strike_off(self, rows: dict[str, bytes], unwanted: set[str]) -> None:
        for key, row in rows.items():
            if self._rows.get(key) is row:
                del self._rows[key]
                self._queued_bytes -= len(row)
        self._unwanted -= unwanted

    def _forget_work(self) -> None:
        self._rows.clear()
        self._unwanted.clear()
        self._queued_bytes = 0

    # -- what may go wrong ------------------------------------------------------------------------

    @property
    def _table(self) -> CacheStore:
        opened = self._opened
        if opened is not None:
            return opened
        make = _load_table()
        close_at_exit()
        with self._changed:
            if self._opened is None:
                self._opened = make(self.directory, self.size_limit_bytes)
            return self._opened

    def _is_there(self) -> bool:
        try:
            return self._file.exists()
        except OSError:  # not even that may be asked
            return False

    def _is_done(self, work: Callable[[], object]) -> bool:
        try:
            self._attempt(work)
        except BusyError as error:
            self._warn("busy", str(error))
            return False
        except (UnavailableError, DamagedError):
            return False
        return True

    def _attempt(self, work: Callable[[], object]) -> None:
        """Change the database, or a new one if this one turns out to be damaged."""
        try:
            try:
                work()
            except DamagedError as error:
                if self._table.set_aside(error):
                    self._note_damage(error)
                work()
        except UnavailableError as error:
            self._count("unavailable")
            self._warn("unavailable", str(error))
            self._table.close()
            raise

    def _note_damage(self, error: DamagedError) -> None:
        self._count("damaged")
        self._warn("damaged", f"{error}; it is set aside, and a new one is begun")

    def _leave_alone(self, kind: str, error: Exception) -> None:
        """Have calls do without the disk for a moment, so that not each of them waits."""
        self._read_at = time.monotonic() + _ALONE_S
        self._warn(kind, str(error))

    def _count(self, what: Count, number: int = 1) -> None:
        with self._changed:
            self.counts[what] += number

    def _warn(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("the disk cache in %s: %s (said once)", self.directory, what)


@functools.cache
def _load_table() -> Callable[[Path, int], CacheStore]:
    """Import `disk.py` on its first use."""
    # Loads sqlite3, whose libraries a program without a cache on disk never needs.
    with loading():
        from dspylite.models.cache.disk import DiskTable  # noqa: PLC0415

    return DiskTable
