"""What the cache asks of a place that outlives the process, and the ways in which that may fail.

Not here: the one there is, diskcache (`disk.py`), and what is done about failures (`store.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

FOLDER = "v1"
"""The database, its log and its index are in a folder, so that one rename sets all of it aside. A
change of what is in it takes another name."""
FILE = "cache.db"  # diskcache's own name for it
SET_ASIDE = "damaged"
KEYS_AT_ONCE = 200
"""Rows that are asked for at once: enough for asking to cost little beside them; so few that a disk
which takes 0.25 s for them is not slower than a request for what they hold."""


class BusyError(Exception):
    """Another process holds the database's lock."""


class CrowdedError(BusyError):
    """Other threads of this process are reading, or it is about to fork."""


class UnavailableError(Exception):
    """The database cannot be read or written: no permission, no space, no such folder."""


class DamagedError(Exception):
    """The database is none any more, or not one of this package.

    Attributes:
        inode: What tells the file from the next one of its name; 0 if that is not known.
    """

    inode = 0


class CacheStore(Protocol):
    """Rows by key that outlive the process.

    Any thread may read; what changes something is called from one thread at a time. Every method
    may raise `BusyError`, `UnavailableError` or `DamagedError`, and no other.
    """

    def get(self, key: str, timeout_s: float) -> bytes | None:
        """Return a row; None if there is none.

        Args:
            key: Its key.
            timeout_s: Seconds after which `BusyError` is raised.

        Raises:
            BadRowError: There is one that nobody should read.
        """
        ...

    def get_many(self, keys: Sequence[str], timeout_s: float) -> Mapping[str, bytes | None]:
        """Return the rows there are; None for one that nobody should read.

        Args:
            keys: `KEYS_AT_ONCE` at most.
            timeout_s: As for `get`.
        """
        ...

    def put(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Keep rows, all or none."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove rows, also such that cannot be read."""
        ...

    def clear(self) -> int:
        """Remove all rows; return how many there were."""
        ...

    def set_aside(self, damage: DamagedError) -> bool:
        """Put what is damaged out of the way; False if somebody has done so since it was seen."""
        ...

    def close(self) -> None:
        """Let go of all files; the next use opens them again."""
        ...

    def hold(self, timeout_s: float) -> bool:
        """Let no thread begin to read, and wait until none does; False if that took too long."""
        ...

    def let_go(self) -> None:
        """Let threads read again."""
        ...

    def abandon(self) -> Any:
        """Part from what a forked child must not touch; return it, to be kept referenced."""
        ...


def database_in(directory: Path) -> Path:
    """Return where the database of a cache directory is."""
    return directory / FOLDER / FILE
