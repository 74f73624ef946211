"""A disk that fails under the cache: damage, locks, no space, no permission, sudden death.

Always a miss or a right answer, never an error and never a wrong one. Not here: what somebody
planted (`test_cache_hostile.py`).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import dspylite as dspy
from dspylite.models.cache import store
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.connections import fault_of, inode_of
from dspylite.models.cache.contract import BusyError, DamagedError, UnavailableError
from dspylite.models.cache.disk import DiskTable
from dspylite.testing import FakeServer
from tests.cache_tools import (
    HOLD,
    MakeCache,
    ask,
    asked_anew,
    database,
    lm_of,
    lock_on,
    put_rows,
    python,
    right_rows,
    said_by,
)

IS_FULL = os.environ.get("DSPYLITE_SOAK") == "1"
DAMAGES = 1_000 if IS_FULL else 100
ROWS = range(40)
ROUNDS = 9
"""Damage that a row brings to light is dealt with at once; some needs a few of them. Seen: 4."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc, prctl and rlimits of Linux")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module, which echoes."""
    with FakeServer() as server:
        yield server


@pytest.fixture(scope="module")
def closed(running: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with forty answers in it, cleanly closed."""
    directory = tmp_path_factory.mktemp("closed") / "c"
    said_by(python(ASK, running.base_url, directory, len(ROWS)))
    assert [file.name for file in directory.glob("v1/*")] == ["cache.db"]
    return directory


@pytest.fixture(scope="module")
def killed(running: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with forty answers in it, whose process was killed."""
    directory = tmp_path_factory.mktemp("killed") / "c"
    said_by(python(ASK, running.base_url, directory, len(ROWS), "die"), code=-signal.SIGKILL)
    assert len([*directory.glob("v1/*")]) == 3
    return directory


ASK = """
import os, signal, sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from tests.cache_tools import ask, lm_of
cache = Cache(disk_cache_dir=Path(sys.argv[2]), enable_memory_cache=False)
use_cache(cache)
ask(lm_of(sys.argv[1]), range(int(sys.argv[3])))
assert cache.flush(20)
if sys.argv[4:]:
    os.kill(os.getpid(), signal.SIGKILL)
cache.close()
"""


def copy_of(directory: Path, place: Path) -> Path:
    shutil.copytree(directory, place)
    return place


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def rounds_until_settled(server: FakeServer, lm: dspy.LM, cache: Cache) -> list[int]:
    """Ask everything until all of it is kept; return how many questions were asked anew each time.

    A disk that fails must not be left alone meanwhile.
    """
    rounds: list[int] = []
    while not rounds or rounds[-1]:
        assert len(rounds) < ROUNDS, (rounds, cache.stats())
        rounds.append(asked_anew(server, lm, ROWS))
        assert cache.flush(20)
    return rounds


@pytest.fixture
def unforgiving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a disk that failed be used again at once, not a second later."""
    monkeypatch.setattr(store, "_ALONE_S", 0.0)


# --- Damage --------------------------------------------------------------------------------------


def test_a_good_copy_answers_everything(
    server: FakeServer, closed: Path, killed: Path, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.4: without damage nothing is asked anew, so the tests below can tell."""
    for directory in (closed, killed):
        cache_in(copy_of(directory, tmp_path / directory.parent.name))
        assert asked_anew(server, lm_of(server.base_url), ROWS) == 0


@pytest.mark.usefixtures("unforgiving")
@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal"])
def test_damage_anywhere_gives_no_wrong_answer(
    server: FakeServer,
    closed: Path,
    killed: Path,
    tmp_path: Path,
    cache_in: MakeCache,
    name: str,
) -> None:
    """B 5.4: bytes changed at random are found in the row, or the file is set aside."""
    chance = random.Random(54)
    lm = lm_of(server.base_url)
    aside = anew = 0
    for number in range(DAMAGES):
        directory = copy_of(killed if name.endswith("-wal") else closed, tmp_path / f"{number}")
        file = directory / "v1" / name
        length = chance.choice((1, 4, 100, 4096))
        offset = chance.choice((chance.randrange(200), chance.randrange(file.stat().st_size)))
        overwrite(file, offset, chance.randbytes(length))
        cache = cache_in(directory)
        anew += sum(rounds_until_settled(server, lm, cache))
        aside += (directory / "damaged").exists()
        assert cache.stats().damaged >= (directory / "damaged").exists()
        cache.close()
        shutil.rmtree(directory)
    assert anew > 0
    assert name.endswith("-wal") or DAMAGES // 5 < aside < DAMAGES


@pytest.mark.usefixtures("unforgiving")
@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal"])
def test_damage_while_it_is_open_gives_no_wrong_answer(
    server: FakeServer, killed: Path, tmp_path: Path, cache_in: MakeCache, name: str
) -> None:
    """B 5.4: a database damaged while running is set aside and another one begun."""
    chance = random.Random(55)
    lm = lm_of(server.base_url)
    for number in range(DAMAGES // 8):
        directory = copy_of(killed, tmp_path / f"{number}")
        cache = cache_in(directory)
        ask(lm, ROWS)
        put_rows(cache, [number])
        file = directory / "v1" / name
        for _ in range(3):
            length = chance.choice((1, 100, 4096, 20_000))
            overwrite(file, chance.randrange(file.stat().st_size), chance.randbytes(length))
            ask(lm, ROWS)
            cache.put({"number": number}, {"says": 1})
            cache.flush(20)
        cache.close()
        cache = cache_in(directory)
        rounds_until_settled(server, lm, cache)
        cache.close()
        shutil.rmtree(directory)


@pytest.mark.usefixtures("unforgiving")
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal"])
def test_a_file_cut_short_gives_no_wrong_answer(
    server: FakeServer,
    closed: Path,
    killed: Path,
    tmp_path: Path,
    cache_in: MakeCache,
    name: str,
    is_open: bool,
) -> None:
    """B 5.4: what a full disk or a broken copy leaves, also under our feet."""
    chance = random.Random(56)
    lm = lm_of(server.base_url)
    for number in range(DAMAGES // 8):
        directory = copy_of(closed if name == "cache.db" else killed, tmp_path / f"{number}")
        file = directory / "v1" / name
        cache = cache_in(directory)
        if is_open:
            ask(lm, ROWS)
            put_rows(cache, [1])
        length = chance.choice((0, chance.randrange(file.stat().st_size)))
        os.truncate(file, length)
        ask(lm, ROWS)
        assert cache.flush(20)
        ask(lm, ROWS)
        cache.close()
        cache = cache_in(directory)
        rounds_until_settled(server, lm, cache)
        cache.close()
        shutil.rmtree(directory)


def test_damage_is_told_once_and_set_aside(
    server: FakeServer,
    closed: Path,
    tmp_path: Path,
    cache_in: MakeCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """B 5.4: one warning, one count, and the damaged file is kept for whoever wants to look."""
    directory = copy_of(closed, tmp_path / "c")
    overwrite(database(directory), 0, b"x" * 4096)
    cache = cache_in(directory)
    lm = lm_of(server.base_url)
    with ThreadPoolExecutor(16) as pool:  # all of them find it
        list(pool.map(lambda number: ask(lm, [number]), ROWS))
    assert cache.flush(20)
    assert cache.stats().damaged == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (directory / "damaged" / "cache.db").read_bytes().startswith(b"xxxx")
    ask(lm, ROWS)  # one that was late to find it may still have put the others off
    assert cache.flush(20)
    assert asked_anew(server, lm, ROWS) == 0


def test_the_next_file_is_not_set_aside_for_the_last_ones_damage(tmp_path: Path) -> None:
    """B 5.4: who finds damage late, when another has begun anew, leaves the good file alone."""
    table = DiskTable(tmp_path / "c", 10**6)
    table.put([("key", b"row")])
    late = DamagedError("seen in the file before")
    late.inode = inode_of(table.file) + 1
    assert not table.set_aside(late)
    late.inode = inode_of(table.file)
    assert table.set_aside(late)
    table.close()


def test_no_reader_stays_at_a_file_that_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.4: one that is opened in the last moment would not see what is kept in the next file."""
    table = DiskTable(tmp_path / "c", 10**6)
    table.put([("key", b"row")])
    rename = Path.rename

    def read_first(path: Path, target: Path) -> Path:
        assert table.get("key", 1) == b"row"
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", read_first)
        assert table.set_aside(DamagedError())
    table.put([("next", b"row")])
    assert table.get("next", 1) == b"row"
    table.close()


def index_root(file: Path) -> int:
    with closing(sqlite3.connect(file)) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'Cache_key_raw'"
        ).fetchone()
    return 4096 * (int(page) - 1)


@pytest.mark.usefixtures("unforgiving")
@pytest.mark.parametrize("what", ["an index that lies", "a later version"])
def test_a_file_that_takes_no_rows_is_damaged_if_not_full(
    tmp_path: Path, cache_in: MakeCache, what: str
) -> None:
    """B 5.4: one changed byte makes sqlite say "disk is full" or "read-only", for good."""
    directory = tmp_path / "c"
    cache = cache_in(directory)
    put_rows(cache, ROWS)
    cache.close()
    file = database(directory)
    if what == "a later version":
        overwrite(file, 18, b"\x09")
    else:
        overwrite(file, index_root(file) + 16, b"\x00")
    cache = cache_in(directory)
    for _ in range(3):
        put_rows(cache, [number for number in range(60) if not right_rows(cache, [number])])
    assert right_rows(cache, range(60)) == 60
    assert cache.stats().damaged == 1


def test_a_call_amid_the_handling_of_an_error_takes_no_lock_for_damage(
    closed: Path, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.4: programs call models inside of `except` too, and that error is none of the disk's."""
    directory = copy_of(closed, tmp_path / "c")
    cache = cache_in(directory)
    with lock_on(database(directory), "OWNED"):
        try:
            raise ValueError("of the program")
        except ValueError:
            assert cache.get({"number": 1}) is None
    assert cache.flush(20)
    assert (cache.stats().damaged, cache.stats().timeouts) == (0, 1)
    assert not (directory / "damaged").exists()


def test_a_new_file_that_is_locked_is_not_damaged(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: rows that meet damage, and then a lock on the file begun anew, wait for it."""
    directory = tmp_path / "c"
    good = cache_in(tmp_path / "good")
    put_rows(good, ROWS)
    good.close()
    (directory / "v1").mkdir(parents=True)
    database(directory).write_bytes(b"x" * 5_000)
    cache = cache_in(directory)
    table = DiskTable(directory, 10**6)
    with lock_on(database(tmp_path / "good"), "IMMEDIATE"):
        with pytest.raises(DamagedError) as raised:
            table.put([("key", b"row")])
        try:
            raise raised.value
        except DamagedError as damage:
            table.set_aside(damage)
            (tmp_path / "good" / "v1").rename(directory / "v1")
            with pytest.raises(BusyError):
                table.put([("key", b"row")])
    table.close()
    assert right_rows(cache, ROWS) == 40


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, UnavailableError),
        (sqlite3.SQLITE_IOERR_WRITE, UnavailableError),
        (sqlite3.SQLITE_READONLY, UnavailableError),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, BusyError),
        (sqlite3.SQLITE_LOCKED, BusyError),
        (sqlite3.SQLITE_CORRUPT_INDEX, DamagedError),
        (sqlite3.SQLITE_NOTADB, DamagedError),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, DamagedError),
    ],
)
def test_each_failure_of_sqlite_is_one_of_three(code: int, kind: type[Exception]) -> None:
    """B 5.4: only damage sets a file aside; a full or locked one is good."""
    error = sqlite3.OperationalError("said by sqlite")
    error.sqlite_errorcode = code
    assert type(fault_of(error)) is kind


def fill_and_roll_back_twice(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    except sqlite3.OperationalError:
        connection.execute("ROLLBACK")
        connection.execute("ROLLBACK")


def test_a_disk_that_is_full_is_not_damage() -> None:
    """B 5.4: sqlite ends the transaction itself, and diskcache fails to end it once more."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t(x)")
        connection.execute("PRAGMA max_page_count = 3")
        connection.execute("BEGIN")
        with pytest.raises(sqlite3.OperationalError, match="rollback") as raised:
            fill_and_roll_back_twice(connection)
    assert isinstance(fault_of(raised.value), UnavailableError)


def test_a_directory_that_is_removed_is_made_again(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.4: `rm -rf` of the cache while a program runs is no accident."""
    cache = cache_in(tmp_path / "c")
    lm = lm_of(server.base_url)
    ask(lm, ROWS)
    assert cache.flush(20)
    shutil.rmtree(tmp_path / "c")
    ask(lm, ROWS)
    ask(lm, range(50, 60))
    assert cache.flush(20)
    assert database(tmp_path / "c").exists()
    assert asked_anew(server, lm, range(50, 60)) == 0


# --- Locks ---------------------------------------------------------------------------------------

NO_LOCK_S = 2.5
"""A call may wait 0.25 s; a machine under load needs some more, and diskcache waits 60."""


@pytest.mark.parametrize(
    ("how", "is_open"),
    [  # nobody can own a log that others have open
        ("IMMEDIATE", False),
        ("IMMEDIATE", True),
        ("EXCLUSIVE", False),
        ("EXCLUSIVE", True),
        ("OWNED", False),
    ],
)
def test_no_call_waits_for_another_processs_lock(
    server: FakeServer, closed: Path, tmp_path: Path, cache_in: MakeCache, how: str, is_open: bool
) -> None:
    """B 5.4: calls go on at once, and what they brought is written when the lock is gone."""
    directory = copy_of(closed, tmp_path / "c")
    cache = cache_in(directory)
    lm = lm_of(server.base_url)
    if is_open:
        ask(lm, range(3))
        put_rows(cache, range(3))
    with lock_on(database(directory), how):
        longest = 0.0
        for number in range(30, 60):
            started = time.monotonic()
            ask(lm, [number])
            longest = max(longest, time.monotonic() - started)
        assert longest < NO_LOCK_S
        assert not cache.flush(0.0)
        assert cache.stats().writes == (3 if is_open else 0)
        assert asked_anew(server, lm, range(50, 60)) == 0  # found among those that wait
    assert cache.flush(20)
    cache_in(directory)
    assert asked_anew(server, lm, range(60)) == 0
    assert cache.stats().damaged == 0
    assert cache.stats().dropped_writes == 0


def test_a_locked_file_is_not_read_without_its_log(closed: Path, tmp_path: Path) -> None:
    """B 5.4: only where nothing may be written; another's writes could be read half done."""
    directory = copy_of(closed, tmp_path / "c")
    table = DiskTable(directory, 10**6)
    with lock_on(database(directory), "OWNED"), pytest.raises(BusyError):
        table.get("key", 0.25)
    table.close()


def test_no_lock_is_lost_by_opening_the_file_once_more(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.6: closing a file lets go of all of a process's locks on it, sqlite's among them."""
    cache = cache_in(tmp_path / "c")
    put_rows(cache, [1])
    cache.close()
    assert right_rows(cache, [1]) == 1  # a reader, which keeps its lock
    put_rows(cache, [2])
    process = python(HOLD, database(tmp_path / "c"), "OWNED")
    _, err = process.communicate("\n", timeout=20)
    assert "database is locked" in err


def test_a_lock_that_stays_does_not_hold_up_the_end(closed: Path, tmp_path: Path) -> None:
    """B 5.4: the end of a process waits two seconds for the disk, not a minute."""
    directory = copy_of(closed, tmp_path / "c")
    code = """
import sys, time
from pathlib import Path
from dspylite.models.cache.cache import Cache
cache = Cache(disk_cache_dir=Path(sys.argv[1]))
cache.put({"number": 1}, {"says": 1})
"""
    with lock_on(database(directory), "IMMEDIATE"):
        started = time.monotonic()
        said_by(python(code, directory))
        assert time.monotonic() - started < 15


# --- No space, no permission ---------------------------------------------------------------------

FULL = """
import resource, signal, sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from tests.cache_tools import ask, database, lm_of, put_rows, right_rows
directory = Path(sys.argv[2])
cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)
use_cache(cache)
lm = lm_of(sys.argv[1])
ask(lm, range(20))
assert cache.flush(20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before = resource.getrlimit(resource.RLIMIT_FSIZE)
if sys.argv[3] == "at once":
    cache.close()
size = max(file.stat().st_size for file in (directory / "v1").iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5_000, before[1]))
ask(lm, range(20, 60))
cache.flush(20)
ask(lm, range(60, 70))
cache.flush(20)
stats = cache.stats()
assert stats.damaged == 0, stats
assert stats.dropped_writes > 0, stats
assert stats.unavailable > 0, stats
found = stats.disk_hits
ask(lm, range(20))
assert cache.stats().disk_hits >= found + 19, (found, cache.stats())
resource.setrlimit(resource.RLIMIT_FSIZE, before)
import time
until = time.monotonic() + 20
while cache.stats().writes == stats.writes and time.monotonic() < until:
    ask(lm, [100])
    cache.flush(20)
assert cache.stats().writes > stats.writes
assert cache.stats().damaged == 0, cache.stats()
print("fine")
"""


@linux
@pytest.mark.parametrize("when", ["at once", "while open"])
def test_a_full_disk_costs_only_what_it_cannot_keep(
    server: FakeServer, tmp_path: Path, when: str
) -> None:
    """B 5.4: calls go on, old answers are found, and writing begins again when there is space."""
    process = python(FULL, server.base_url, tmp_path / "c", when)
    try:
        out, err = process.communicate(timeout=50)
    finally:
        process.kill()
    assert out == "fine\n", err
    assert err.count("said once") == 1, err


READ = """
import ctypes, os, sys, time
from pathlib import Path
if os.geteuid() == 0:  # root is refused nothing, until it gives up its capabilities
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from tests.cache_tools import ask, lm_of
directory = Path(sys.argv[2])
try:
    (directory / "v1" / "x").touch()
except PermissionError:
    pass
else:
    raise SystemExit("it can be written")
cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)
use_cache(cache)
lm = lm_of(sys.argv[1])
ask(lm, range(40))
print(cache.stats().disk_hits)
ask(lm, range(100, 110))
cache.flush(20)
ask(lm, range(40))
print(cache.stats().disk_hits)
stats = cache.stats()
assert stats.damaged == 0, stats
assert stats.writes == 0 and stats.dropped_writes == 10 and stats.unavailable > 0, stats
"""


@linux
@pytest.mark.parametrize("left", ["closed", "killed"])
def test_a_read_only_directory_still_serves_its_hits(
    server: FakeServer, request: pytest.FixtureRequest, tmp_path: Path, left: str
) -> None:
    """B 5.4: a cache baked into an image answers, also when its process was killed."""
    directory = copy_of(request.getfixturevalue(left), tmp_path / "c")
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    process = python(READ, server.base_url, directory)
    try:
        out, err = process.communicate(timeout=50)
    finally:
        process.kill()
        for path in (directory, directory / "v1"):
            path.chmod(0o755)
    assert out.split() == ["40", "80"], (out, err)
    assert process.returncode == 0, err
    assert err.count("said once") == 1, err


@linux
def test_a_directory_that_may_not_be_entered_is_a_miss(
    server: FakeServer, closed: Path, tmp_path: Path
) -> None:
    """B 5.4: not even to look is allowed, and calls go on."""
    directory = copy_of(closed, tmp_path / "c")
    directory.chmod(0)
    process = python(READ, server.base_url, directory)
    try:
        out, err = process.communicate(timeout=50)
    finally:
        process.kill()
        directory.chmod(0o700)
    assert out.split() == ["0", "0"], (out, err)


def test_no_thread_to_write_is_no_error(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.4: where the system gives no more threads, answers are not kept, and calls go on."""
    cache = cache_in(tmp_path / "c")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        ask(lm_of(server.base_url), range(3))
        assert cache.flush(1)
    assert cache.stats().dropped_writes == 3
    ask(lm_of(server.base_url), range(3))
    assert cache.flush(20)
    assert cache.stats().writes == 3


# --- Sudden death --------------------------------------------------------------------------------

KILL = """
import os, random, signal, sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from tests.cache_tools import question, right_rows

def write(directory, number, pipe):
    cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)
    while True:
        cache.put({"number": number}, {"says": question(number)})
        number += 1
        if number % 20 == 0:
            cache.flush(20)
            os.write(pipe, number.to_bytes(4, "big"))

chance = random.Random(57)
directory = Path(sys.argv[1])
start = sure = 0
for _ in range(int(sys.argv[2])):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        write(directory, start, writing)
    for _ in range(chance.randrange(1, 30)):
        sure = int.from_bytes(os.read(reading, 4), "big")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)
    assert right_rows(cache, range(start, sure)) == sure - start
    right_rows(cache, range(sure, sure + 100))
    assert cache.flush(20)
    stats = cache.stats()
    assert stats.rejected_rows == stats.damaged == stats.unavailable == 0, stats
    cache.close()
    start = sure
print(sure)
"""


def test_a_killed_process_loses_no_file(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: after kill -9 in the midst of writing the next one finds all its rows."""
    directory = tmp_path / "c"
    sure = int(said_by(python(KILL, directory, 50)))
    assert right_rows(cache_in(directory), range(sure)) == sure
    assert not (directory / "damaged").exists()
    cache_in(tmp_path / "other")
    with closing(sqlite3.connect(database(directory))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
