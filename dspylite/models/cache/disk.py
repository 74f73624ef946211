"""The file that answers outlive the process in: diskcache, told to unpickle and to open nothing.

Any thread reads; one thread at a time writes. Not here: that thread, and what is done about a file
that is locked, full or damaged (`store.py`); what every connection is protected from
(`connections.py`).
"""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from dspylite.models.cache.connections import (
    BUSY_S,
    Readers,
    close_quietly,
    connect,
    faults,
    has_rows,
    inode_of,
    is_sound,
    is_there,
)
from dspylite.models.cache.contract import (
    SET_ASIDE,
    BusyError,
    DamagedError,
    UnavailableError,
    database_in,
)
from dspylite.models.cache.rows import BadRowError
from dspylite.runtime.forks import loading

_SETTINGS: Mapping[str, Any] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "least-recently-stored",  # any other writes on each read
    "cull_limit": 0,  # while a transaction lasts, the file stays as long as it is, and all would go
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
_PUT = """
INSERT INTO Cache(key, raw, store_time, access_time, access_count, size, mode, value)
VALUES (?, 1, ?, ?, 0, 0, 1, ?)
ON CONFLICT(key, raw) DO UPDATE SET store_time = excluded.store_time, expire_time = NULL,
access_time = excluded.access_time, access_count = 0, tag = NULL, size = 0, mode = 1,
filename = NULL, value = excluded.value
"""
"""What diskcache does to set a row of bytes, and to put one in the place of another. Mode 1 is its
`MODE_RAW`; what such a row takes is counted by pages, and not by its size."""
_COUNTERS = {"count", "size", "size_limit", "hits", "misses"}


@functools.cache
def _load_diskcache() -> tuple[Any, Any]:
    """Import diskcache on its first use; return a cache class and the errors."""
    with loading():
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
            raise BadRowError  # rows are read elsewhere

        def filename(self, key: object = None, value: object = None) -> Any:
            raise BadRowError

        def remove(self, file_path: object) -> None:
            """Leave alone whatever a row names."""

    return diskcache.Cache, SafeDisk


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
        self._readers = Readers(self.file)
        self._open: Any = None
        self._connection: Any = None  # a forked child must never close it, so it is kept referenced
        self._inode = 0
        self._suspected = 0  # the file that last took no rows

    def get(self, key: str, timeout_s: float) -> bytes | None:
        """Return a row; None if there is none.

        Args:
            key: Its key.
            timeout_s: Seconds after which `BusyError` is raised.

        Raises:
            BadRowError: There is one that nobody should read.
        """
        return self._readers.get(key, timeout_s)

    def get_many(self, keys: Sequence[str], timeout_s: float) -> Mapping[str, bytes | None]:
        """Return the rows there are; None for one that nobody should read."""
        return self._readers.get_many(keys, timeout_s)

    def put(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Keep rows, in one transaction."""
        if self._open is not None and self._inode != inode_of(self.file):
            self.close()  # another process has set it aside; readers would see that a second later
        # Not `or`: an empty one is false.
        opened = self._open_writer() if self._open is None else self._open
        inode = self._inode
        try:
            with faults(inode):
                with opened.transact():
                    now = time.time()
                    # diskcache's own `set` takes thrice as long, of the GIL too.
                    # It is the connection of whichever thread this is.
                    opened._con.executemany(  # noqa: SLF001
                        _PUT, ((key, now, now, memoryview(row)) for key, row in rows)
                    )
                opened.cull()
        except UnavailableError:
            self._close_writer()
            self._look_closer(inode)
            raise
        except BaseException:
            self._close_writer()  # or a transaction that could not end would stay open
            raise
        self._suspected = 0

    def _look_closer(self, inode: int) -> None:
        """See once whether a file that takes no rows is damaged; such a one may seem full."""
        if self._suspected == inode:
            return
        self._suspected = inode
        with suppress(UnavailableError, BusyError), faults(inode):
            connection = connect(self.file)
            if connection is not None:
                with closing(connection):
                    if not is_sound(connection):
                        raise DamagedError("pages do not make sense")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove rows, also such that diskcache cannot read."""
        with self._connected() as connection:
            if connection is not None:
                connection.executemany("DELETE FROM Cache WHERE key = ?", [(key,) for key in keys])

    def clear(self) -> int:
        """Remove all rows; return how many there were."""
        with self._connected() as connection:
            return 0 if connection is None else connection.execute("DELETE FROM Cache").rowcount

    def drop(self, numbers: Iterable[int]) -> int:
        """Remove rows by their numbers, whatever their keys are; return how many there were."""
        with self._connected() as connection:
            if connection is None:
                return 0
            made = ((number,) for number in numbers)
            return connection.executemany("DELETE FROM Cache WHERE rowid = ?", made).rowcount

    def remove(self) -> None:
        """Remove the database, and what was set aside; other processes will begin another one."""
        self.set_aside(DamagedError())  # in one step, while others may be using it
        with faults(0):
            _remove(self._directory / SET_ASIDE)

    @contextmanager
    def _connected(self) -> Generator[sqlite3.Connection | None]:
        """Give a connection for one transaction; None where there are no rows."""
        with faults(inode_of(self.file)):
            connection = connect(self.file)
            if connection is None:
                yield None
                return
            with closing(connection), connection:
                yield connection if has_rows(connection) else None

    def set_aside(self, damage: DamagedError) -> bool:
        """Put a damaged file out of the way, in place of the one set aside before.

        Returns:
            False if somebody has done so since the damage was seen.
        """
        self.close()
        inode = inode_of(self.file)
        if damage.inode not in {0, inode}:
            return False
        with faults(inode):
            aside = self._directory / SET_ASIDE
            _remove(aside)
            try:
                self.folder.rename(aside)
            except FileNotFoundError:  # another process was faster
                return False
            finally:
                self._readers.close()  # those that were opened since, at what is now elsewhere
        return True

    def close(self) -> None:
        """Let go of all files; the next use opens them again."""
        self._readers.close()
        self._close_writer()

    def _close_writer(self) -> None:
        held, self._open, self._connection, self._inode = self._open, None, None, 0
        if held is not None:
            close_quietly(held)

    def hold(self, timeout_s: float) -> bool:
        """Let no thread begin to read, and wait until none does; False if that took too long."""
        return self._readers.hold(timeout_s)

    def let_go(self) -> None:
        """Let threads read again."""
        self._readers.let_go()

    def abandon(self) -> tuple[Any, ...]:
        """Part from what a forked child must not touch; return it, to be kept referenced."""
        return (self._open, self._connection, self._readers)

    def _open_writer(self) -> Any:
        with faults(inode_of(self.file)):
            if os.path.expandvars(self.folder) != str(self.folder):
                raise UnavailableError("diskcache would read a variable in the directory's name")
            self._make_file()
        self._inode = inode_of(self.file)
        with faults(self._inode):
            self._check_settings()
            self._open = self._opened()
            # See where it is declared.
            self._connection = self._open._con  # noqa: SLF001
            self._connection.text_factory = _lenient_text
            return self._open

    def _opened(self) -> Any:
        cache_class, disk_class = _load_diskcache()
        opened = cache_class.__new__(cache_class)
        try:
            opened.__init__(
                str(self.folder),
                timeout=BUSY_S,
                disk=disk_class,
                size_limit=self._size_limit_bytes,
                **_SETTINGS,
            )
        except BaseException:
            close_quietly(opened)
            raise
        return opened

    def _make_file(self) -> None:
        # A directory that was there before keeps its permissions; the folder in it is ours.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_there(self.file):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            # sqlite gives its log and index the permissions of the file. A file that is there may
            # be open in sqlite, and closing it anywhere in a process lets go of sqlite's locks.
            with suppress(FileExistsError):
                os.close(os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def _check_settings(self) -> None:
        """Refuse a file with settings that are not ours; wait for its lock as long as one may.

        diskcache puts the settings in force before it takes ours, and waits a minute for a lock.
        """
        connection = connect(self.file)
        if connection is None:
            return
        with closing(connection):
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_READONLY or not os.access(
                    self.file, os.W_OK
                ):
                    raise
                raise DamagedError("the file says that only later versions may write") from error
            is_made = has_rows(connection)
            (shrinks,) = connection.execute("PRAGMA auto_vacuum").fetchone()
            try:
                found = dict(connection.execute("SELECT key, value FROM Settings LIMIT 50"))
            except sqlite3.OperationalError:  # not made yet
                return
            finally:
                connection.execute("ROLLBACK")
        if is_made and not shrinks:  # everything would be evicted
            raise DamagedError("the database was made by something else")
        for name, value in found.items():
            if name in _COUNTERS:
                # No row of ours has a size; a wrong sum of them would evict all or nothing.
                is_ours = isinstance(value, int) and (
                    name != "size" or abs(value) <= self._size_limit_bytes
                )
            else:
                is_ours = _SETTINGS.get(name, ...) == value
            if not is_ours:
                raise DamagedError("the database was made by something else")


def _lenient_text(found: bytes) -> str:
    """Read a text that somebody may have planted, and that need be none."""
    return found.decode("utf-8", "replace")


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
