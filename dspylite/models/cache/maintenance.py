"""What `dspylite cache` does: look at a cache's directory, check all of it, empty it.

None of this makes a directory. Not here: the command line (`__main__.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

from dspylite.models.cache.cache import default_directory
from dspylite.models.cache.connections import VALUE, connect, faults, has_rows, inode_of
from dspylite.models.cache.contract import (
    FOLDER,
    SET_ASIDE,
    BusyError,
    DamagedError,
    UnavailableError,
    database_in,
)
from dspylite.models.cache.disk import DiskTable
from dspylite.models.cache.rows import BadRowError, decode_row

Action = Literal["info", "clear", "verify"]

_KEY = (
    "CASE WHEN raw = 1 AND typeof(key) = 'text' AND length(key) < 1000 THEN CAST(key AS BLOB) END"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What is in a cache's database.

    Attributes:
        rows: Answers, good or bad.
        bad: Numbers of the rows that are not what they should be; empty where nobody looked.
        oldest: When the first of them was stored, in seconds since 1970; None without rows.
        newest: When the last one was.
    """

    rows: int = 0
    bad: tuple[int, ...] = ()
    oldest: float | None = None
    newest: float | None = None


def survey(directory: Path, *, thorough: bool = False) -> Survey:
    """Look at the rows of a database, changing nothing.

    Args:
        directory: The cache's.
        thorough: Whether the whole file and the digest of each row are checked.

    Raises:
        DamagedError: It is damaged, or none of this package.
        BusyError: Another process keeps it locked.
        UnavailableError: It cannot be read.
    """
    file = database_in(directory)
    with faults(inode_of(file)):
        connection = connect(file) if os.access(file.parent, os.W_OK) else None
        # Where nothing may be written, not even a log's index can be made.
        connection = connection or connect(file, "mode=ro&immutable=1")
        if connection is None:
            return Survey()
        with closing(connection):
            if not has_rows(connection):
                return Survey()
            if thorough:
                (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                if found != "ok":
                    raise DamagedError(str(found))
            numbers = "count(*), min(store_time + 0.0), max(store_time + 0.0)"
            rows, oldest, newest = connection.execute(f"SELECT {numbers} FROM Cache").fetchone()
            bad: tuple[int, ...] = ()
            if thorough:
                found = connection.execute(f"SELECT rowid, {_KEY}, {VALUE} FROM Cache")
                bad = tuple(_bad_rows(found))
            return Survey(rows=rows, bad=bad, oldest=oldest, newest=newest)


def _bad_rows(found: Iterator[tuple[int, bytes | None, bytes | None]]) -> Iterator[int]:
    for number, key, row in found:
        try:
            if key is None or row is None:
                raise BadRowError
            decode_row(key.decode("utf-8", "replace"), row)
        except BadRowError:
            yield number


def run_cache(
    action: Action, *, directory: Path | None = None, drop: bool = False, out: TextIO | None = None
) -> int:
    """Do what `dspylite cache` is asked to, and print what came of it.

    Args:
        action: `"info"`, `"clear"` or `"verify"`.
        directory: The cache's; where this user's processes would have one by default.
        drop: Whether `"verify"` removes bad rows, and sets a damaged file aside.
        out: Where to print; stdout by default.

    Returns:
        0, or 1 if something is bad or could not be done, or 2 if there can be no directory.
    """
    say = partial(print, file=out or sys.stdout)
    place = directory or default_directory()
    if place is None:
        say("This user has no cache directory. Give one by --dir, or set DSPYLITE_CACHE_DIR.")
        return 2
    place = place.expanduser().absolute()
    try:
        if not any(os.path.lexists(place / name) for name in (FOLDER, SET_ASIDE)):
            say(f"There is no cache in {place}.")
            return 0
        if action == "info":
            return _tell(place, say)
        if action == "clear":
            return _clear(place, say)
        return _verify(place, say, drop=drop)
    except BusyError:
        say(f"Another process keeps the cache in {place} locked. Try again.")
    except (UnavailableError, OSError) as error:
        say(f"The cache in {place} cannot be used: {error}")
    return 1


def _tell(place: Path, say: partial[None]) -> int:
    say(f"Directory: {place}")
    say(f"On disk:   {_bytes_in(place / FOLDER):,} bytes")
    try:
        found = survey(place)
    except DamagedError as error:
        say(f"Answers:   unknown, the file is damaged: {error}")
        return 1
    say(f"Answers:   {found.rows:,}")
    if found.oldest is not None and found.newest is not None:
        say(f"Oldest:    {_when(found.oldest)}")
        say(f"Newest:    {_when(found.newest)}")
    aside = place / SET_ASIDE
    if os.path.lexists(aside):
        say(f"Set aside: {_bytes_in(aside):,} bytes in {aside}, since {_when(_changed(aside))}")
    return 0


def _clear(place: Path, say: partial[None]) -> int:
    try:
        rows = f"{survey(place).rows:,} answers"
    except DamagedError:
        rows = "a damaged file"
    DiskTable(place, 1).remove()
    say(f"Removed {rows} from {place}.")
    return 0


def _verify(place: Path, say: partial[None], *, drop: bool) -> int:
    table = DiskTable(place, 1)
    try:
        found = survey(place, thorough=True)
    except DamagedError as error:
        say(f"The file in {place} is damaged: {error}")
        if drop and table.set_aside(error):
            say(f"It is set aside in {place / SET_ASIDE}.")
        return 1
    say(f"{found.rows:,} answers in {place}, {len(found.bad):,} of them bad.")
    if drop and found.bad:
        say(f"Removed {table.drop(found.bad):,}.")
    return 1 if found.bad else 0


def _bytes_in(place: Path) -> int:
    files = [place, *place.rglob("*")] if place.is_dir() and not place.is_symlink() else [place]
    return sum(file.lstat().st_size for file in files if os.path.lexists(file) and file.is_file())


def _changed(place: Path) -> float:
    return place.lstat().st_ctime


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (OverflowError, ValueError, OSError):  # of a planted row
        return "unknown"
