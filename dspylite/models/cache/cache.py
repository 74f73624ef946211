"""`Cache`: answers kept in memory and on disk, and which cache this process uses.

Not here: the policy of a call that asks it (`cached.py`).
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dspylite.errors import SettingsError
from dspylite.models.cache.flights import Flights
from dspylite.models.cache.keys import key_of
from dspylite.models.cache.memory import MemoryCache, held_bytes
from dspylite.models.cache.rows import (
    MAX_ROW_BYTES,
    BadRowError,
    decode_row,
    encode_row,
    own_copy,
)
from dspylite.models.cache.salt import SALT_BYTES
from dspylite.models.cache.store import LONGEST_WAIT_S, Count, DiskStore
from dspylite.runtime.forks import watch_forks

DEFAULT_DISK_BYTES = 1_000_000_000
DEFAULT_MEMORY_BYTES = 64_000_000
DEFAULT_MEMORY_ENTRIES = 1_000_000
"""DSPy's value; the bytes are what usually counts."""

_SALT_PAUSE_S = 5.0
"""How long a directory that could not take a salt is left alone; guessed."""
_DISK_COUNTS = get_args(Count)
_AT_ONCE = 200
"""Values for which the memory's lock is held at once; other threads wait some 0.1 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a cache has done in this process, and how it is.

    Attributes:
        memory_hits: Answers found in memory.
        disk_hits: Answers found on disk.
        misses: Requests that had to be made.
        shared: Requests that were answered by an equal one under way.
        writes: Answers that came to the disk.
        dropped_writes: Answers that should have, and did not: the disk was full, locked, missing.
        rejected_rows: Rows found on disk that were not to be believed.
        damaged: How often the file was damaged and set aside.
        busy: How often another process kept the file locked.
        unavailable: How often the disk could not be read or written.
        timeouts: Calls that went on without the disk's answer.
        memory_entries: Answers in memory now.
        memory_bytes: What they take.
    """

    memory_hits: int
    disk_hits: int
    misses: int
    shared: int
    writes: int
    dropped_writes: int
    rejected_rows: int
    damaged: int
    busy: int
    unavailable: int
    timeouts: int
    memory_entries: int
    memory_bytes: int


class Cache:
    """Answers by request, in memory and on disk.

    Safe to use from any number of threads, tasks, loops and processes. Values are JSON text or raw
    float32; nothing is ever pickled or unpickled. A disk that is locked, full, read-only or damaged
    is a miss, and never an error. A subclass may override `cache_key` to make other requests equal.

    Args:
        enable_disk_cache: Whether answers outlive the process.
        enable_memory_cache: Whether answers are kept in this process.
        disk_cache_dir: Where the files are; made on the first write. None: what
            `DSPYLITE_CACHE_DIR` says, else `dspylite` in the user's cache directory; a user who
            has none gets a cache in memory.
        disk_size_limit_bytes: Most bytes on disk; beyond it the oldest answers go. None: 1 GB.
        memory_max_entries: Most answers in memory.
        restrict_pickle: Accepted from DSPy programs; nothing is ever unpickled.
        safe_types: The same.
        memory_size_limit_bytes: Most bytes in memory; beyond it the least recently used go.

    Raises:
        SettingsError: A limit is no positive number.

    Example:
        >>> mine = Cache(enable_disk_cache=False)
        >>> mine.put({"question": "6 x 7"}, {"answer": 42})
        >>> mine.get({"question": "6 x 7"})
        {'answer': 42}
        >>> mine.stats().memory_hits
        1
    """

    def __init__(
        self,
        enable_disk_cache: bool | None = True,
        enable_memory_cache: bool | None = True,
        disk_cache_dir: str | os.PathLike[str] | None = None,
        disk_size_limit_bytes: int | None = None,
        memory_max_entries: int = DEFAULT_MEMORY_ENTRIES,
        restrict_pickle: bool = True,
        safe_types: Sequence[type[Any]] | None = None,
        *,
        memory_size_limit_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        del restrict_pickle, safe_types
        if disk_size_limit_bytes is None:
            disk_size_limit_bytes = DEFAULT_DISK_BYTES
        for name, value in (
            ("disk_size_limit_bytes", disk_size_limit_bytes),
            ("memory_max_entries", memory_max_entries),
            ("memory_size_limit_bytes", memory_size_limit_bytes),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise SettingsError(f"`{name}` must be a positive number, not {value!r}.")
        self.enable_disk_cache = bool(enable_disk_cache)
        self.enable_memory_cache = bool(enable_memory_cache)
        self.memory_cache = MemoryCache(
            int(min(memory_size_limit_bytes, sys.maxsize)),
            int(min(memory_max_entries, sys.maxsize)),
        )
        self.disk_cache: DiskStore | None = None
        directory = default_directory() if disk_cache_dir is None else Path(disk_cache_dir)
        if self.enable_disk_cache and directory is not None:
            self.disk_cache = DiskStore(
                directory.expanduser().absolute(), int(min(disk_size_limit_bytes, 2**62))
            )
        self.flights = Flights()
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._is_salt_kept = self.disk_cache is None
        self._ask_salt_at = 0.0
        self._counts = {"memory_hits": 0, "disk_hits": 0, "misses": 0, "shared": 0}
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Go on in a child with the answers there are; nothing of the parent is under way here."""
        self._lock = threading.Lock()  # guards the counts; nothing is called while it is held
        self.memory_cache.reset_after_fork()
        self.flights.reset_after_fork()

    @property
    def disk_cache_dir(self) -> str | None:
        """Where the files are; None without a disk level."""
        return None if self.disk_cache is None else str(self.disk_cache.directory)

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self.enable_memory_cache or self.disk_cache is not None

    # -- by request, as DSPy programs use it ------------------------------------------------------

    def cache_key(
        self,
        request: Mapping[str, Any],
        ignored_args_for_cache_key: Sequence[str] | None = None,
    ) -> str:
        """Return the key of a request.

        Args:
            request: What the answer depends on, made of what JSON can say.
            ignored_args_for_cache_key: Names in it that the answer does not depend on.

        Raises:
            TypeError: Something in it has no form in JSON.
        """
        ignored = ignored_args_for_cache_key or ()
        return key_of({name: value for name, value in request.items() if name not in ignored})

    def get(
        self,
        request: Mapping[str, Any],
        ignored_args_for_cache_key: Sequence[str] | None = None,
    ) -> Any:
        """Return what is kept for a request; None if nothing is, or the request has no key."""
        try:
            key = self.cache_key(request, ignored_args_for_cache_key)
        except TypeError:
            return None
        return self.read(key)

    def put(
        self,
        request: Mapping[str, Any],
        value: Any,
        ignored_args_for_cache_key: Sequence[str] | None = None,
        enable_memory_cache: bool = True,
    ) -> None:
        """Keep a value for a request.

        Args:
            request: As for `cache_key`.
            value: What JSON can say, an `array` of float32, or an `LMResponse`.
            ignored_args_for_cache_key: As for `cache_key`.
            enable_memory_cache: Whether it is kept in memory too.

        Raises:
            TypeError: The request or the value has no such form.
        """
        key = self.cache_key(request, ignored_args_for_cache_key)
        self.write(key, value, in_memory=enable_memory_cache)

    # -- by key, as calls use it ------------------------------------------------------------------

    def recall(self, key: str) -> Any:
        """Return what memory keeps under a key; None if nothing is there."""
        if not self.enable_memory_cache:
            return None
        found = self.memory_cache.get(key)
        if found is None:
            return None
        self.count("memory_hits")
        return own_copy(found)

    def read(self, key: str) -> Any:
        """Return what is kept under a key; None if nothing is. It waits 0.25 s at most."""
        found = self.recall(key)
        if found is not None or self.disk_cache is None:
            return found
        row = self.disk_cache.get(key)
        if row is None:
            return None
        try:
            found = decode_row(key, row)
        except BadRowError:
            self.disk_cache.reject(key)
            return None
        self.count("disk_hits")
        if self.enable_memory_cache:
            self.memory_cache.put(key, found, max(len(row), held_bytes(found)))
        return own_copy(found)

    def write(self, key: str, value: Any, *, in_memory: bool = True) -> None:
        """Keep a value; the disk gets it soon, and nobody waits for that.

        Raises:
            TypeError: The value has no form in JSON.
        """
        row = encode_row(key, value)
        if len(row) > MAX_ROW_BYTES:
            return
        if self.enable_memory_cache and in_memory:
            self.memory_cache.put(key, own_copy(value), max(len(row), held_bytes(value)))
        if self.disk_cache is not None:
            self.disk_cache.put(key, row)

    def read_many(self, keys: Sequence[str], *, copied: bool = True) -> dict[str, Any]:
        """Return what is kept under keys, without those that nothing is kept under.

        The same as `read` for each, and much quicker. The disk is waited for as long as it answers
        in 0.25 s what is asked at once, 200 keys; after that, the rest is not looked for there.

        Args:
            keys: Which; one that is there twice counts once.
            copied: Whether the caller may change the values. False: they are those that are kept.
        """
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        if self.enable_memory_cache:
            for some in _pieces(wanted):
                found |= self.memory_cache.get_many(some)
            if found:
                self.count("memory_hits", len(found))
                wanted = [key for key in wanted if key not in found]
                if copied:
                    found = {key: own_copy(value) for key, value in found.items()}
        if self.disk_cache is not None and wanted:
            for rows in self.disk_cache.get_many(wanted):
                found |= self._take(self.disk_cache, rows, copied=copied)
        return found

    def _take(
        self, disk: DiskStore, rows: Mapping[str, bytes], *, copied: bool
    ) -> Iterator[tuple[str, Any]]:
        """Give what rows from the disk hold, each checked by itself, and keep it in memory."""
        entries: list[tuple[str, Any, int]] = []
        for key, row in rows.items():
            try:
                value = decode_row(key, row)
            except BadRowError:
                disk.reject(key)
                continue
            entries.append((key, value, max(len(row), held_bytes(value))))
        if entries:
            self.count("disk_hits", len(entries))
        if self.enable_memory_cache:
            self.memory_cache.put_many(entries)
            is_shared = not copied
        else:
            is_shared = True
        for key, value, _ in entries:
            if value is not None:
                yield key, value if is_shared else own_copy(value)

    def write_many(
        self, values: Mapping[str, Any], *, in_memory: bool = True, copied: bool = True
    ) -> None:
        """Keep values; the same as `write` for each, and quicker.

        The disk gets them soon. Where more wait to be written than may, 64 MB, this waits until
        they are fewer, so that a coroutine leaves it to a thread; but no longer than 0.25 s for the
        next 200, and after that not at all. What finds no place is not kept on disk, and is told.

        Args:
            values: What is to be kept, by key.
            in_memory: Whether it is kept in memory too.
            copied: Whether the caller may go on changing the values. False: nobody does.

        Raises:
            TypeError: A value has no form in JSON; some of the others are kept.
        """
        is_taken = True
        in_memory = in_memory and self.enable_memory_cache
        for some in _pieces(list(values)):
            rows: list[tuple[str, bytes]] = []
            entries: list[tuple[str, Any, int]] = []
            for key in some:
                value = values[key]
                row = encode_row(key, value)
                if len(row) > MAX_ROW_BYTES:
                    continue
                rows.append((key, row))
                if in_memory:
                    kept = own_copy(value) if copied else value
                    entries.append((key, kept, max(len(row), held_bytes(value))))
            self.memory_cache.put_many(entries)
            if self.disk_cache is not None:
                is_taken = self.disk_cache.put_many(rows, LONGEST_WAIT_S if is_taken else 0.0)

    def drop(self, key: str) -> None:
        """Forget what is kept under a key."""
        self.memory_cache.delete(key)
        if self.disk_cache is not None:
            self.disk_cache.delete(key)

    def salt(self, *, make: bool = False) -> bytes:
        """Return what fingerprints of secrets are salted with.

        A directory has one; it is made together with the first answer that is kept there. Until
        then, and without a directory, this process has one of its own, which the directory takes
        over: the keys of calls under way stay what they are.

        Args:
            make: Whether the directory gets one now, if it has none.
        """
        if self._is_salt_kept or self.disk_cache is None or time.monotonic() < self._ask_salt_at:
            return self._salt
        found = self.disk_cache.salt(self._salt if make else None)
        if found is not None:
            self._salt, self._is_salt_kept = found, True
        elif make:
            self._ask_salt_at = time.monotonic() + _SALT_PAUSE_S
        return self._salt

    @property
    def is_salt_kept(self) -> bool:
        """Whether the salt is the one that other processes use too."""
        return self._is_salt_kept

    def count(self, what: str, number: int = 1) -> None:
        """Count something for `stats`."""
        with self._lock:
            self._counts[what] += number

    # -- as a whole -------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Tell what the cache has done in this process, and how it is."""
        with self._lock:
            counts = dict(self._counts)
        if self.disk_cache is None:
            disk = dict.fromkeys(_DISK_COUNTS, 0)
        else:
            disk = {name: self.disk_cache.counts[name] for name in _DISK_COUNTS}
        return CacheStats(
            **counts,
            **disk,
            memory_entries=len(self.memory_cache),
            memory_bytes=self.memory_cache.size_bytes,
        )

    def clear(self) -> None:
        """Forget all answers, in memory and on disk."""
        self.memory_cache.clear()
        if self.disk_cache is not None:
            self.disk_cache.clear()

    def reset_memory_cache(self) -> None:
        """Forget all answers in memory; those on disk stay."""
        self.memory_cache.clear()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all answers are on disk; False if that took too long.

        The end of the process does so by itself, for ten seconds at most.

        Args:
            timeout_s: Seconds. None: as long as it takes.
        """
        return self.disk_cache is None or self.disk_cache.flush(timeout_s)

    def close(self) -> None:
        """Write what waits and close the files; the next use opens them again."""
        if self.disk_cache is not None:
            self.disk_cache.close()

    def __repr__(self) -> str:
        levels = [
            f"memory: {self.memory_cache.size_limit_bytes:,} bytes"
            if self.enable_memory_cache
            else "",
            f"disk: {self.disk_cache_dir}" if self.disk_cache is not None else "",
        ]
        return f"Cache({', '.join(filter(None, levels)) or 'off'})"


def _pieces(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]


def default_directory() -> Path | None:
    """Return where the files are unless somebody says otherwise; None for users without a home."""
    given = os.environ.get("DSPYLITE_CACHE_DIR")
    if given:
        return Path(given)
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        place = "~/Library/Caches"
    else:
        place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return None if place is None else Path(place).expanduser() / "dspylite"
    except RuntimeError:  # no home, as some service users have none
        return None
