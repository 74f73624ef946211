"""Connections to the cache's database file, which anybody may have damaged or planted.

A file is looked over before it is used, every failure leaves as one of the three that `contract.py`
names, and readers are lent to threads. Not here: what is written, and diskcache (`disk.py`).
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dspylite.models.cache.contract import (
    BusyError,
    CrowdedError,
    DamagedError,
    UnavailableError,
)
from dspylite.models.cache.rows import MAX_ROW_BYTES, BadRowError

BUSY_S = 0.1
"""How long sqlite itself waits for a lock; less than half of what a caller waits, because opening a
file and reading from it may each meet one."""
VALUE = f"""
CASE WHEN mode = 1 AND filename IS NULL AND typeof(value) = 'blob'
AND length(value) <= {MAX_ROW_BYTES} THEN value END
"""
"""A row's bytes; NULL for what is a pickle, names a file, is too long or no bytes at all, none of
which is ever read. Mode 1 is diskcache's `MODE_RAW`."""
_GET = f"SELECT {VALUE} FROM Cache WHERE key = ? AND raw = 1 LIMIT 1"
_GET_MANY = f"SELECT key, {VALUE} FROM Cache WHERE raw = 1 AND key IN ({{}}) LIMIT {{}}"
"""Bounded, because a table that somebody has planted need not have one row to a key."""
_MOST_READERS = 8
_LOOK_S = 1.0
"""How often readers look whether their file is still in its place."""
_CHECK_S = 1.0
"""Less than a fork waits for the thread that writes; a gigabyte takes longer."""
_MOST_SCHEMA = 20
"""Things in a database; diskcache makes 11."""
_SCHEMA = re.compile(
    r"CREATE (?:TABLE (?:Cache|Settings) ?\([^()]*\)"
    r"|(?:UNIQUE )?INDEX Cache_\w+ ON Cache ?\([\w, ]*\)"
    r"|TRIGGER Settings_\w+ AFTER (?:INSERT|UPDATE|DELETE) ON Cache FOR EACH ROW BEGIN"
    r" UPDATE Settings SET value = value [+-] (?:1|NEW\.size|OLD\.size|NEW\.size - OLD\.size)"
    r' WHERE key = "(?:count|size)"; END)'
)
"""What diskcache makes. A view, a trigger or a column of somebody else's may compute for ever; none
of these can be had without other words or a second pair of brackets."""

_DAMAGE = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,  # an index that lies; no row of ours can break one
    sqlite3.SQLITE_MISMATCH,
}


_Answer = TypeVar("_Answer")


def fault_of(error: BaseException, around: BaseException | None = None) -> Exception:
    """Return a failure of sqlite, diskcache or the file system as one of the three.

    Args:
        error: The failure.
        around: What was being handled when the attempt began, and has nothing to do with it.
    """
    cause = error
    while not isinstance(cause, BusyError | UnavailableError | DamagedError):
        # diskcache raises its own Timeout for a lock, and fails to roll back what sqlite has.
        if cause.__context__ is None or cause.__context__ is around:
            break
        cause = cause.__context__
    else:
        return cause
    if isinstance(cause, OSError | MemoryError | sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return UnavailableError(str(cause))
    if isinstance(cause, sqlite3.Error):
        extended = _code_of(cause)
        code = extended & 0xFF
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return BusyError(str(cause))
        if code == sqlite3.SQLITE_INTERRUPT:  # by us, after as long as anybody waits
            return CrowdedError(str(cause))
        is_damage = code in _DAMAGE
        if not is_damage and extended != sqlite3.SQLITE_IOERR_SHORT_READ:
            return UnavailableError(str(cause))
    # The rest is what a file that somebody else has written makes diskcache stumble over.
    return DamagedError(f"{type(cause).__name__}: {cause}")


class faults:  # noqa: N801  # used like the functions of contextlib
    """Let every failure of the block leave as one of the three; a bad row is none.

    Args:
        inode: Which file the block is about.
    """

    __slots__ = ("_around", "_inode")

    def __init__(self, inode: int) -> None:
        self._inode = inode

    def __enter__(self) -> None:
        self._around = sys.exception()  # a caller may be in the midst of its own `except`

    def __exit__(self, exc_type: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadRowError):
            fault = fault_of(error, self._around)
            if isinstance(fault, DamagedError) and not fault.inode:
                fault.inode = self._inode
            if fault is not error:
                raise fault from error


def connect(file: Path, how: str = "mode=rw") -> sqlite3.Connection | None:
    """Return a connection of the caller's own; None if there is no file.

    Raises:
        DamagedError: What is there is no file.
    """
    if not is_there(file):
        return None
    # `as_uri` quotes what a path may hold.
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?{how}", timeout=BUSY_S, uri=True, check_same_thread=False
    )
    connection.execute("PRAGMA mmap_size = 0")  # see `disk.py`
    connection.execute("PRAGMA cell_size_check = 1")
    return connection


def is_there(file: Path) -> bool:
    """Return whether there is a database file.

    Raises:
        DamagedError: It, its log, its index or its folder is a link, a pipe or the like, which may
            lead elsewhere or block for ever.
    """
    found = [
        _is_plain(file.parent, stat.S_ISDIR),
        *(_is_plain(Path(f"{file}{end}"), stat.S_ISREG) for end in ("-wal", "-shm", "")),
    ]
    return found[-1]


def _is_plain(place: Path, is_right: Any) -> bool:
    try:
        mode = os.lstat(place).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not is_right(mode):
        raise DamagedError(f"`{place.name}` is not what it should be, but a link or the like")
    return True


def has_rows(connection: sqlite3.Connection) -> bool:
    """Return whether the table is there, which another process may be about to make.

    Raises:
        DamagedError: There is what diskcache would not make.
    """
    found = connection.execute(f"SELECT type, name, sql FROM sqlite_master LIMIT {_MOST_SCHEMA}")
    names: set[str] = set()
    for kind, name, sql in found:
        is_automatic = kind == "index" and sql is None
        if not is_automatic and not (isinstance(sql, str) and _SCHEMA.fullmatch(sql)):
            raise DamagedError("the database was made by something else")
        names.add(name)
    if len(names) == _MOST_SCHEMA:
        raise DamagedError("the database was made by something else")
    return "Cache" in names


def is_sound(connection: sqlite3.Connection) -> bool:
    """Return whether the pages make sense, as far as that can be told in a second."""
    until = time.monotonic() + _CHECK_S
    connection.set_progress_handler(lambda: time.monotonic() > until, 10_000)
    try:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if _code_of(error) & 0xFF == sqlite3.SQLITE_INTERRUPT:
            return True
        raise
    return bool(found == "ok")


class Readers:
    """Connections for reading, which threads borrow; several, because each waits for the GIL."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = threading.Condition()  # guards all below; held for a few steps only
        self._idle: list[_Reader] = []
        self._lent = 0
        self._is_held = False
        self._era = 0  # raised when those that are lent must not come back
        self._inode = 0
        self._look_at = 0.0

    def get(self, key: str, timeout_s: float) -> bytes | None:
        """Return a row; None if there is none.

        Args:
            key: Its key.
            timeout_s: Seconds after which it is given up.

        Raises:
            BadRowError: There is one that nobody should read.
        """
        return self._ask(lambda reader, until: reader.get(key, until), timeout_s)

    def get_many(self, keys: Sequence[str], timeout_s: float) -> Mapping[str, bytes | None]:
        """Return the rows there are; None for one that nobody should read.

        Args:
            keys: Their keys.
            timeout_s: Seconds after which all are given up.
        """
        return self._ask(lambda reader, until: reader.get_many(keys, until), timeout_s) or {}

    def _ask(self, what: Callable[[_Reader, float], _Answer], timeout_s: float) -> _Answer | None:
        """Have a reader do something; None if there is nothing to read."""
        until = time.monotonic() + timeout_s
        reader, era = self._borrow(until)
        if reader is None:
            return None
        try:
            with faults(reader.inode):
                found = what(reader, until)
        except BadRowError:
            self._give_back(reader, era)
            raise
        except BaseException:
            self._give_back(None, era)
            reader.close()
            raise
        self._give_back(reader, era)
        return found

    def _borrow(self, until: float) -> tuple[_Reader | None, int]:
        with self._changed:
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + _LOOK_S
                self._leave_if_moved()
            if not self._changed.wait_for(self._is_free, until - now):
                raise CrowdedError("other threads are reading")
            self._lent += 1
            era = self._era
            if self._idle:
                return self._idle.pop(), era
        inode = inode_of(self._file)
        try:
            with faults(inode):
                reader = _open_reader(self._file, inode)
        except BaseException:
            self._give_back(None, era)
            raise
        if reader is None:
            self._give_back(None, era)
        return reader, era

    def _is_free(self) -> bool:
        return not self._is_held and (bool(self._idle) or self._lent < _MOST_READERS)

    def _leave_if_moved(self) -> None:
        inode = inode_of(self._file)
        if inode != self._inode:
            self._inode = inode
            self._forget()

    def _forget(self) -> None:
        self._era += 1
        idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()

    def _give_back(self, reader: _Reader | None, era: int) -> None:
        with self._changed:
            self._lent -= 1
            is_kept = era == self._era
            if reader is not None and is_kept:
                self._idle.append(reader)
            if self._is_held:
                self._changed.notify_all()  # among those who wait is the one that holds
            else:
                self._changed.notify()
        if reader is not None and not is_kept:
            reader.close()

    def close(self) -> None:
        """Close all connections; those that are lent, when they come back."""
        with self._changed:
            self._forget()

    def hold(self, timeout_s: float) -> bool:
        """Let no thread begin to read, and wait until none does; False if that took too long."""
        with self._changed:
            self._is_held = True
            return self._changed.wait_for(lambda: not self._lent, timeout_s)

    def let_go(self) -> None:
        """Let threads read again."""
        with self._changed:
            self._is_held = False
            self._changed.notify_all()


def _open_reader(file: Path, inode: int) -> _Reader | None:
    try:
        # Not `mode=ro`: a reader of a log must be able to make the log's index.
        return _Reader.open(file, inode, "mode=rw")
    except sqlite3.OperationalError as error:
        if _code_of(error) & 0xFF not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
            raise
    # Nothing can be written here. What is there may be read, but for the log.
    return _Reader.open(file, inode, "mode=ro&immutable=1")


class _Reader:
    """One connection for reading; used by one thread at a time.

    Attributes:
        inode: Which file it is at.
    """

    def __init__(self, connection: sqlite3.Connection, inode: int, *, is_immutable: bool) -> None:
        self.inode = inode
        self._connection = connection
        self._is_immutable = is_immutable
        self._until = time.monotonic() + BUSY_S
        # What is damaged may be longer to read than anybody waits.
        connection.set_progress_handler(lambda: time.monotonic() > self._until, 10_000)

    @classmethod
    def open(cls, file: Path, inode: int, how: str) -> _Reader | None:
        connection = connect(file, how)
        if connection is None:
            return None
        reader = cls(connection, inode, is_immutable="immutable" in how)
        try:
            if has_rows(connection):
                return reader
        except BaseException:
            reader.close()
            raise
        reader.close()
        return None

    def get(self, key: str, until: float) -> bytes | None:
        found = self._select(_GET, (key,), until)
        if not found:
            return None
        row: bytes | None = found[0][0]
        if row is None:
            raise BadRowError
        return row

    def get_many(self, keys: Sequence[str], until: float) -> dict[str, bytes | None]:
        places = ", ".join("?" * len(keys))
        found = self._select(_GET_MANY.format(places, len(keys)), keys, until)
        wanted = set(keys)
        # In a table that somebody has planted, another key may be as good as equal.
        return {key: row for key, row in found if key in wanted}

    def _select(self, statement: str, given: Sequence[str], until: float) -> list[Any]:
        self._until = until
        try:
            return self._connection.execute(statement, given).fetchall()
        except sqlite3.DatabaseError as error:
            if self._is_immutable:  # others may be writing, which it cannot see
                raise UnavailableError(str(error)) from None
            raise

    def close(self) -> None:
        close_quietly(self._connection)


def close_quietly(connection: Any) -> None:
    """Close a connection, or what has one, that may be past closing."""
    try:
        connection.close()
    except sqlite3.Error:  # there is nothing more that could be done with it
        pass


def inode_of(file: Path) -> int:
    """Return what tells a file from the next one of its name; 0 if there is none."""
    try:
        return os.lstat(file).st_ino
    except OSError:
        return 0


def _code_of(error: sqlite3.Error) -> int:
    # Errors of Python's own, such as a text that is no UTF-8, have none.
    return getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR
