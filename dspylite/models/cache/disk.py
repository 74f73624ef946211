"""The file that answers outlive the process in: diskcache, told to unpickle and to open nothing.

Any thread reads; one thread at a time writes. Not here: that thread, and what is done about a file
that is locked, full or damaged (`store.py`).
"""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspylite.models.cache.contract import (
    SET_ASIDE,
    BusyError,
    DamagedError,
    UnavailableError,
    database_in,
)
from dspylite.models.cache.rows import MAX_ROW_BYTES, BadRowError

_BUSY_S = 0.1
"""How long sqlite itself waits for a lock; less than a caller waits, so that it hears of it."""
_SETTINGS: Mapping[str, Any] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "least-recently-stored",  # any other writes on each read
    "cull_limit": 10,
    "sqlite_auto_vacuum": 1,  # full
    "sqlite_cache_size": 2048,  # pages
    "sqlite_journal_mode": "wal",
    # A mapped file that somebody cuts short ends the process with SIGBUS.
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,  # normal
    "disk_min_file_size": 0,  # without effect, as is the next
    "disk_pickle_protocol": 0,
}
"""All of diskcache's settings: those that are not given are taken from the file, which is not to be
believed."""
_GET = f"""
SELECT mode, filename IS NOT NULL, CASE WHEN typeof(value) = 'blob' THEN value END
FROM Cache WHERE key = ? AND raw = 1 AND length(value) <= {MAX_ROW_BYTES}
"""
_MOST_READERS = 8
_LOOK_S = 1.0
"""How often readers look whether their file is still in its place."""
_COUNTERS = {"count", "size", "hits", "misses"}


def fault_of(error: BaseException) -> Exception:
    """Return a failure of sqlite, diskcache or the file system as one of the three above."""
    if isinstance(error, BusyError | UnavailableError | DamagedError):
        return error
    cause = error.__context__ if type(error).__name__ == "Timeout" else error  # diskcache's
    if isinstance(cause, OSError | MemoryError | sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return UnavailableError(str(cause))
    if isinstance(cause, sqlite3.Error):
        extended = getattr(cause, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR
        code = extended & 0xFF
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return BusyError(str(cause))
        is_damage = code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
        if not is_damage and extended != sqlite3.SQLITE_IOERR_SHORT_READ:
            return UnavailableError(str(cause))
    # The rest is what a file that somebody else has written makes diskcache stumble over.
    return DamagedError(f"{type(cause).__name__}: {cause}")


@functools.cache
def _load_diskcache() -> tuple[Any, Any]:
    """Import diskcache on its first use; return a cache class and the errors."""
    import diskcache  # noqa: PLC0415  # costs 20 ms, and loads pickle
    from diskcache.core import MODE_RAW  # noqa: PLC0415

    class SafeDisk(diskcache.Disk):  # type: ignore[misc]  # untyped
        """Keeps bytes under texts, inside the database. It unpickles, opens and removes nothing."""

        def __init__(self, directory: str, **settings: Any) -> None:
            del settings
            super().__init__(directory)

        def put(self, key: object) -> Any:
            if not isinstance(key, str):
                raise TypeError("Keys are texts.")
            return key, True

        def get(self, key: object, raw: object) -> Any:
            if not raw or not isinstance(key, str):
                raise BadRowError
            return key

        def store(self, value: object, read: bool, key: object = None) -> Any:
            if read or not isinstance(value, bytes):
                raise TypeError("Values are bytes.")
            return 0, MODE_RAW, None, memoryview(value)

        def fetch(self, mode: object, filename: object, value: object, read: bool) -> Any:
            return checked_row(mode, filename, value)

        def filename(self, key: object = None, value: object = None) -> Any:
            raise BadRowError

        def remove(self, file_path: object) -> None:
            """Leave alone whatever a row names."""

    return diskcache.Cache, SafeDisk


def checked_row(mode: object, filename: object, value: object) -> bytes:
    """Return a row's bytes.

    Args:
        mode: How diskcache would read it.
        filename: Whether, or which, file it names.
        value: What it holds.

    Raises:
        BadRowError: It is a pickle, names a file, or holds anything but bytes.
    """
    if mode != 1 or filename or not isinstance(value, bytes):  # 1: diskcache's MODE_RAW
        raise BadRowError
    return value


class DiskTable:
    """Rows by key in one database file, shared with other processes; a `CacheStore`.

    Args:
        directory: Where the database's folder is; both are made on the first write.
        size_limit_bytes: Beyond it the rows stored longest ago go.
    """

    def __init__(self, directory: Path, size_limit_bytes: int) -> None:
        self._directory = directory
        self._size_limit_bytes = size_limit_bytes
        self.file = database_in(directory)
        self.folder = self.file.parent
        self._readers = _Readers(self.file)
        self._open: Any = None
        self._connection: Any = None  # a forked child must never close it, so it is kept referenced
        self._inode = 0

    def get(self, key: str, timeout_s: float) -> bytes | None:
        """Return a row; None if there is none.

        Args:
            key: Its key.
            timeout_s: Seconds after which `BusyError` is raised.

        Raises:
            BadRowError: There is one that nobody should read.
        """
        with _faults():
            return self._readers.get(key, timeout_s)

    def put(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Keep rows, in one transaction."""
        with _faults():
            self._leave_if_moved()
            cache = self._opened()
            with cache.transact():
                for key, row in rows:
                    cache.set(key, row)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove rows, also such that diskcache cannot read."""
        if not self.file.exists():
            return
        with _faults():
            connection = _connect_to(self.file, "mode=rw")
            try:
                with connection:
                    connection.executemany(
                        "DELETE FROM Cache WHERE key = ?", [(key,) for key in keys]
                    )
            finally:
                connection.close()

    def clear(self) -> int:
        """Remove all rows; return how many there were."""
        if not self.file.exists():
            return 0
        with _faults():
            connection = _connect_to(self.file, "mode=rw")
            try:
                with connection:
                    return connection.execute("DELETE FROM Cache").rowcount
            finally:
                connection.close()

    def walk(self) -> Iterator[tuple[str | None, bytes | None]]:
        """Give every row with its key; None in the place of what nobody should read."""
        if not self.file.exists():
            return
        with _faults():
            connection = _connect_to(self.file, "mode=ro")
            try:
                connection.text_factory = bytes  # a planted text need be none
                rows = connection.execute("SELECT key, raw, mode, filename, value FROM Cache")
                for key, raw, mode, filename, value in rows:
                    text = key.decode(errors="replace") if isinstance(key, bytes) else None
                    try:
                        yield text if raw else None, checked_row(mode, filename, value)
                    except BadRowError:
                        yield text, None
            finally:
                connection.close()

    def check(self) -> None:
        """Have sqlite look over the whole file.

        Raises:
            DamagedError: It found something.
        """
        if not self.file.exists():
            return
        with _faults():
            connection = _connect_to(self.file, "mode=ro")
            try:
                found = connection.execute("PRAGMA quick_check(1)").fetchone()
                connection.execute("SELECT count(*) FROM Cache").fetchone()
            finally:
                connection.close()
            if found != ("ok",):
                raise DamagedError(str(found))

    def set_aside(self) -> None:
        """Put a damaged file out of the way, in place of the one set aside before.

        Does nothing where another process has done so since the file was opened.
        """
        is_ours = self._inode in {0, _inode_of(self.file)}
        self.close()
        if is_ours:
            with _faults():
                aside = self._directory / SET_ASIDE
                _remove(aside)
                try:
                    self.folder.rename(aside)
                except FileNotFoundError:  # another process was faster
                    pass

    def remove(self) -> None:
        """Remove the whole database, and what was set aside."""
        self.close()
        with _faults():
            _remove(self.folder)
            _remove(self._directory / SET_ASIDE)

    def close(self) -> None:
        """Let go of all files; the next use opens them again."""
        self._readers.close()
        self._close_writer()

    def _close_writer(self) -> None:
        held, self._open, self._connection, self._inode = self._open, None, None, 0
        if held is not None:
            _close_quietly(held)

    def hold(self, timeout_s: float) -> bool:
        """Let no thread begin to read, and wait until none does; False if that took too long."""
        return self._readers.hold(timeout_s)

    def let_go(self) -> None:
        """Let threads read again."""
        self._readers.let_go()

    def abandon(self) -> tuple[Any, ...]:
        """Part from what a forked child must not touch; return it, to be kept referenced."""
        return (self._open, self._connection, self._readers)

    def _opened(self) -> Any:
        if self._open is not None:
            return self._open
        self._make_file()
        self._check_settings()
        cache_class, disk_class = _load_diskcache()
        # Opening writes, and diskcache itself would wait a minute for a lock.
        _take_lock(self.file)
        self._open = cache_class(
            str(self.folder),
            timeout=_BUSY_S,
            disk=disk_class,
            size_limit=self._size_limit_bytes,
            **_SETTINGS,
        )
        self._connection = self._open._con  # noqa: SLF001  # see where it is declared
        return self._open

    def _make_file(self) -> None:
        # A directory that was there before keeps its permissions; the folder in it is ours.
        for folder in (self._directory, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.file.is_symlink():
            raise DamagedError("the database is a link to another file")
        # sqlite gives its log and index the permissions of the file.
        os.close(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600))
        self._inode = _inode_of(self.file)

    def _check_settings(self) -> None:
        connection = _connect_to(self.file, "mode=rw")
        try:
            known = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
            if known is None:
                return
            names = {name for (name,) in connection.execute("SELECT key FROM Settings")}
            odd = connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'view' OR "
                "(type = 'trigger' AND name NOT LIKE 'Settings!_%' ESCAPE '!')"
            ).fetchone()
        finally:
            connection.close()
        if odd or not names <= {*_SETTINGS, *_COUNTERS, "size_limit"}:
            raise DamagedError("the database was made by something else")

    def _leave_if_moved(self) -> None:
        """Close a file that another process has set aside, or that was removed."""
        if self._open is not None and self._inode != _inode_of(self.file):
            self._close_writer()


class _Readers:
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
        now = time.monotonic()
        reader, era = self._borrow(now, timeout_s)
        if reader is None:
            return None
        try:
            found = reader.get(key, now + timeout_s)
        except BadRowError:
            self._give_back(reader, era)
            raise
        except BaseException:
            self._give_back(None, era)
            reader.close()
            raise
        self._give_back(reader, era)
        return found

    def _borrow(self, now: float, timeout_s: float) -> tuple[_Reader | None, int]:
        with self._changed:
            if now >= self._look_at:
                self._look_at = now + _LOOK_S
                self._leave_if_moved()
            while self._is_held or (not self._idle and self._lent >= _MOST_READERS):
                if not self._changed.wait(timeout_s):
                    raise BusyError("other threads are reading")
            self._lent += 1
            era = self._era
            if self._idle:
                return self._idle.pop(), era
        try:
            reader = _Reader(self._file) if self._file.exists() else None
        except BaseException:
            self._give_back(None, era)
            raise
        if reader is None:
            self._give_back(None, era)
        return reader, era

    def _leave_if_moved(self) -> None:
        inode = _inode_of(self._file)
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
            self._changed.notify()
        if reader is not None and not is_kept:
            reader.close()

    def close(self) -> None:
        with self._changed:
            self._forget()

    def hold(self, timeout_s: float) -> bool:
        with self._changed:
            self._is_held = True
            return self._changed.wait_for(lambda: not self._lent, timeout_s)

    def let_go(self) -> None:
        with self._changed:
            self._is_held = False
            self._changed.notify_all()


class _Reader:
    """One connection for reading; used by one thread at a time."""

    def __init__(self, file: Path) -> None:
        self._until = 0.0
        try:
            # Not `mode=ro`: a reader of a log must be able to make the log's index.
            self._connection = self._connect(file, "mode=rw")
        except sqlite3.OperationalError:
            # Nothing can be written here. What is there may be read, but for the log.
            self._connection = self._connect(file, "mode=ro&immutable=1")

    def _connect(self, file: Path, how: str) -> sqlite3.Connection:
        connection = _connect_to(file, how)
        # A file made by somebody else may hold a table whose every reading takes for ever.
        connection.set_progress_handler(lambda: time.monotonic() > self._until, 10_000)
        self._until = time.monotonic() + _BUSY_S
        try:
            connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def get(self, key: str, until: float) -> bytes | None:
        self._until = until
        found = self._connection.execute(_GET, (key,)).fetchone()
        return None if found is None else checked_row(*found)

    def close(self) -> None:
        _close_quietly(self._connection)


class _faults:  # noqa: N801  # used like the functions of contextlib
    """Let every failure of the block leave as one of the three; a bad row is none."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadRowError):
            fault = fault_of(error)
            if fault is not error:
                raise fault from error


def _connect_to(file: Path, how: str) -> sqlite3.Connection:
    # `as_uri` quotes what a path may hold.
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?{how}", timeout=_BUSY_S, uri=True, check_same_thread=False
    )
    connection.execute("PRAGMA mmap_size = 0")
    return connection


def _take_lock(file: Path) -> None:
    """Wait for the write lock as long as a caller may, and let it go.

    Raises:
        sqlite3.OperationalError: Another process keeps it.
    """
    connection = _connect_to(file, "mode=rw")
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _close_quietly(connection: Any) -> None:
    try:
        connection.close()
    except sqlite3.Error:  # there is nothing more that could be done with it
        pass


def _inode_of(file: Path) -> int:
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
