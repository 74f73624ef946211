"""Files in the cache's directory that somebody else has made: never believed, never obeyed.

The usual attack is a pickle in diskcache's database (CVE-2025-69872). Not here: what happens by
itself to good files (`test_cache_faults.py`).
"""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import diskcache
import pytest

from dspylite.models.cache import rows
from dspylite.models.cache.cache import Cache
from dspylite.testing import FakeServer
from tests.cache_tools import (
    MakeCache,
    ask,
    asked_anew,
    database,
    lm_of,
    put_rows,
    question,
    right_rows,
)

SOON_S = 5.0
"""Far more than anything here takes, and far less than what would hang."""
GOOD = range(5)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module, which echoes."""
    with FakeServer() as server:
        yield server


class Payload:
    """Does something when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@contextmanager
def soon() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON_S


def warm(directory: Path) -> None:
    """Make a good cache of five rows, closed."""
    cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)
    put_rows(cache, GOOD)
    cache.close()


def key_of(number: int) -> str:
    return Cache(enable_disk_cache=False).cache_key({"number": number})


def change(directory: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    """Change the database as anybody with sqlite can."""
    with closing(sqlite3.connect(database(directory))) as connection, connection:
        for statement in statements:
            connection.execute(statement, values)


def plant(directory: Path, number: int, **columns: Any) -> None:
    """Put something into the columns of a number's row."""
    names = ", ".join(f"{name} = ?" for name in columns)
    change(
        directory,
        f"UPDATE Cache SET {names} WHERE key = '{key_of(number)}'",
        values=tuple(columns.values()),
    )


def use_in_every_way(cache: Cache, number: int) -> None:
    """Read, overwrite, read and delete one row."""
    assert cache.get({"number": number}) is None
    assert cache.flush(20)
    put_rows(cache, [number])
    assert right_rows(cache, [number]) == 1
    cache.drop(key_of(number))
    assert cache.flush(20)
    assert cache.get({"number": number}) is None


def evict(cache: Cache) -> None:
    """Write beyond a limit of 200,000 bytes, so that all that is older goes."""
    for number in range(100, 300):
        cache.put({"number": number}, "x" * 2_000)
        if number % 20 == 0:
            assert cache.flush(20)
    assert cache.flush(20)


def is_set_aside(directory: Path) -> bool:
    return (directory / "damaged").exists()


def assert_works(cache: Cache) -> None:
    """Writing and reading go on, whatever was found before."""
    with soon():
        put_rows(cache, range(10, 15))
        assert right_rows(cache, range(10, 15)) == 5


# --- Rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_inline", [True, False])
def test_a_pickle_is_never_loaded(tmp_path: Path, cache_in: MakeCache, is_inline: bool) -> None:
    """B 5.2: what stock diskcache has stored runs no code, however it comes to be touched."""
    directory, marker = tmp_path / "c", tmp_path / "it-ran"
    warm(directory)
    disk = diskcache.Disk(directory / "v1", min_file_size=10**9 if is_inline else 0)
    for number in (1, 2, 3):
        size, mode, name, value = disk.store(Payload(marker), read=False)
        plant(directory, number, size=size, mode=mode, filename=name, value=value)
    planted = list((directory / "v1").rglob("*.val"))
    assert len(planted) == (0 if is_inline else 3)
    # The payload is a live one.
    shutil.copytree(directory, tmp_path / "copy")
    with closing(diskcache.Cache(tmp_path / "copy" / "v1")) as stock:
        stock.get(key_of(1))
    assert marker.exists()
    marker.rmdir()

    cache = cache_in(directory, disk_size_limit_bytes=200_000)
    use_in_every_way(cache, 1)
    put_rows(cache, [2])
    assert right_rows(cache, [0, 2, 4]) == 3
    evict(cache)
    assert cache.get({"number": 3}) is None
    cache.clear()
    cache.close()
    assert not marker.exists()
    assert not is_set_aside(directory)
    assert cache.stats().rejected_rows == 1
    assert all(file.exists() for file in planted)


_watched: list[list[str]] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watched and event in {"open", "os.remove", "os.rename", "os.truncate"}:
        _watched[-1].append(str(args[0]))


@pytest.fixture(scope="module")
def watch() -> None:
    """Have Python tell of every file that it opens; for good, as hooks stay."""
    sys.addaudithook(_watch)


@pytest.fixture
def opened(watch: None) -> Iterator[list[str]]:
    """Give the names of files that Python opens, removes or renames while the test runs."""
    _watched.append([])
    yield _watched[-1]
    _watched.clear()


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_file_that_a_row_names_is_neither_opened_nor_removed(
    tmp_path: Path, cache_in: MakeCache, opened: list[str], mode: int, is_absolute: bool
) -> None:
    """B 5.2: a row of any mode that names a file reads nothing, and takes no file with it."""
    directory, foreign = tmp_path / "c", tmp_path / "foreign.txt"
    warm(directory)
    foreign.write_text("mine")
    name = str(foreign) if is_absolute else "../../foreign.txt"
    for number in GOOD:
        plant(directory, number, mode=mode, filename=name, size=4)
    opened.clear()
    cache = cache_in(directory, disk_size_limit_bytes=200_000)
    use_in_every_way(cache, 1)
    put_rows(cache, [2])
    evict(cache)
    cache.clear()
    cache.close()
    assert [name for name in opened if "foreign" in name] == []
    assert foreign.read_text() == "mine"
    assert not is_set_aside(directory)


def test_a_key_that_is_a_pickle_is_never_loaded(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.2: stock diskcache pickles keys too, and loads them when it walks over them."""
    directory, marker = tmp_path / "c", tmp_path / "it-ran"
    warm(directory)
    key, raw = diskcache.Disk(directory / "v1").put(Payload(marker))
    assert not raw
    change(
        directory,
        "INSERT INTO Cache(key, raw, mode, value, store_time) VALUES (?, 0, 1, 'x', 0)",
        values=(bytes(key),),
    )
    plant(directory, 1, raw=0)
    cache = cache_in(directory, disk_size_limit_bytes=200_000)
    assert right_rows(cache, GOOD) == 4
    evict(cache)
    cache.clear()
    assert not marker.exists()
    with pytest.raises(FileNotFoundError), closing(sqlite3.connect(":memory:")):
        pickle.loads(pickle.dumps(Payload(tmp_path / "no" / "such")))  # as it would have been


@pytest.mark.parametrize("column", ["value", "mode", "filename", "store_time", "expire_time"])
def test_a_text_that_is_none_is_a_miss(tmp_path: Path, cache_in: MakeCache, column: str) -> None:
    """B 5.2: sqlite keeps any bytes as a text; Python cannot read them."""
    directory = tmp_path / "c"
    warm(directory)
    change(directory, f"UPDATE Cache SET {column} = CAST(x'ff80fe' AS TEXT)")
    change(directory, "INSERT INTO Cache(key, raw) VALUES (CAST(x'ff80fe' AS TEXT), 1)")
    cache = cache_in(directory)
    right_rows(cache, [1])
    put_rows(cache, GOOD)  # over what is there
    assert right_rows(cache, GOOD) == 5
    assert cache.stats().damaged == 0
    assert cache.stats().rejected_rows == (0 if column.endswith("time") else 1)


def test_a_row_longer_than_memory_is_never_read(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.2: a row of hundreds of megabytes costs neither memory nor time."""
    directory = tmp_path / "c"
    warm(directory)
    change(directory, f"UPDATE Cache SET value = zeroblob(300000000) WHERE key = '{key_of(1)}'")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = cache_in(directory)
    with soon():
        assert right_rows(cache, GOOD) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert cache.stats().rejected_rows == 1
    put_rows(cache, [1])
    assert right_rows(cache, GOOD) == 5


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (b"J", DEEP),
        (b"R", b'{"outputs":' + DEEP + b"}"),
        (b"J", b"1" * 100_000),
        (b"J", b"{"),
        (b"R", b"{}"),
        (b"R", b"7"),
        (b"R", b'{"outputs":[{"text":1}],"usage":{},"model":"m","request_id":null}'),
        (b"R", b'{"outputs":7,"usage":7,"model":7,"request_id":7}'),
        (b"F", b"123"),
        (b"J", b"\xff\xfe"),
        (b"X", b"{}"),
        (b"P", pickle.dumps("x")),
    ],
)
def test_a_row_with_the_right_digest_need_not_make_sense(
    tmp_path: Path, cache_in: MakeCache, kind: bytes, payload: bytes
) -> None:
    """B 5.2: whoever knows the format can make digests; bad rows are misses all the same."""
    directory = tmp_path / "c"
    warm(directory)
    digest = rows._digest(key_of(1), kind, payload)
    plant(directory, 1, value=b"dspl\x01" + kind + digest + payload)
    cache = cache_in(directory)
    with soon():
        assert right_rows(cache, GOOD) == 4
    assert cache.stats().rejected_rows == 1
    assert_works(cache)


@pytest.mark.parametrize("value", [b"", b"dspl\x01", b"x" * 1000, 7, 1.5, None, "text"])
def test_what_is_no_row_is_a_miss(tmp_path: Path, cache_in: MakeCache, value: Any) -> None:
    """B 5.2: bytes, numbers and texts of other programs are dropped and counted."""
    directory = tmp_path / "c"
    warm(directory)
    plant(directory, 1, value=value)
    cache = cache_in(directory)
    assert right_rows(cache, GOOD) == 4
    assert cache.flush(20)
    assert cache.stats().rejected_rows == 1
    with closing(sqlite3.connect(database(directory))) as connection:
        assert connection.execute("SELECT count(*) FROM Cache").fetchone() == (4,)


def test_a_row_under_another_key_is_a_miss(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.2: rows that change places are not taken for each other."""
    directory = tmp_path / "c"
    warm(directory)
    change(
        directory,
        f"UPDATE Cache SET value = (SELECT value FROM Cache WHERE key = '{key_of(2)}') "
        f"WHERE key = '{key_of(1)}'",
    )
    cache = cache_in(directory)
    assert right_rows(cache, GOOD) == 4
    assert cache.stats().rejected_rows == 1


def test_a_call_whose_row_was_poisoned_asks_anew(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.2: programs see their answers, whatever is in the file."""
    cache_in(tmp_path / "c")
    lm = lm_of(server.base_url)
    ask(lm, GOOD)
    cache_in(tmp_path / "c2")  # closes the first
    change(tmp_path / "c", "UPDATE Cache SET mode = 4, value = x'80049508'")
    cache = cache_in(tmp_path / "c")
    assert asked_anew(server, lm, GOOD) == 5
    assert cache.flush(20)
    assert asked_anew(server, lm, GOOD) == 0
    assert cache.stats().rejected_rows == 5


# --- Settings and schema -------------------------------------------------------------------------

BIG = 2**40
INFINITE = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sqlite_mmap_size", BIG),
        ("sqlite_journal_mode", "off"),
        ("sqlite_synchronous", "0; DROP TABLE Cache"),
        ("sqlite_cache_size", None),
        ("disk_min_file_size", "x"),
        ("disk_pickle_protocol", BIG),
        ("eviction_policy", "none"),
        ("cull_limit", -1),
        ("size", 10**15),
        ("size", -(10**15)),
        ("size", "x"),
        ("count", b"x"),
        ("directory", "/etc"),
        ("_sql", "x"),
    ],
)
def test_settings_in_the_file_are_not_obeyed(
    tmp_path: Path, cache_in: MakeCache, name: str, value: Any
) -> None:
    """B 5.2: diskcache takes its settings from the file; a file with others is set aside."""
    directory = tmp_path / "c"
    warm(directory)
    change(directory, "INSERT OR REPLACE INTO Settings VALUES (?, ?)", values=(name, value))
    cache = cache_in(directory)
    with soon():
        assert right_rows(cache, GOOD) == 5  # nothing wrong with these
    assert_works(cache)
    assert is_set_aside(directory)
    assert cache.stats().damaged == 1
    cache.close()
    with closing(sqlite3.connect(database(directory))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "statements",
    [
        ("ALTER TABLE Cache RENAME TO Old", f"CREATE VIEW Cache AS {INFINITE}"),
        ("ALTER TABLE Settings RENAME TO Old", f"CREATE VIEW Settings AS {INFINITE}"),
        (
            "DROP TABLE Cache",
            f"CREATE VIEW Cache(key, raw, mode, filename, value) AS SELECT i,1,1,NULL,i "
            f"FROM ({INFINITE})",
        ),
        (
            "CREATE TRIGGER Settings_x AFTER INSERT ON Cache BEGIN INSERT INTO Settings "
            f"SELECT i, i FROM ({INFINITE}); END",
        ),
        (
            "CREATE TRIGGER Settings_y AFTER DELETE ON Cache BEGIN "
            "UPDATE Settings SET value = a.key FROM Cache a, Cache b, Cache c, Cache d; END",
        ),
        ("CREATE TRIGGER other AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",),
        ("ALTER TABLE Cache ADD COLUMN more AS (hex(zeroblob(400000000)))",),
        ("CREATE INDEX Cache_more ON Cache(hex(zeroblob(1000)))",),
        ("CREATE TABLE More(x)",),
        ("DROP TABLE Cache", "CREATE TABLE Cache(x)"),
        ("DROP TABLE Cache", "CREATE VIRTUAL TABLE Cache USING fts5(key, raw, mode, value)"),
        tuple(f"CREATE INDEX Cache_{n} ON Cache(tag)" for n in range(40)),
    ],
)
def test_a_schema_of_somebody_else_is_not_used(
    tmp_path: Path, cache_in: MakeCache, statements: tuple[str, ...]
) -> None:
    """B 5.2: views, triggers and columns may compute for ever; the file is set aside unused."""
    directory = tmp_path / "c"
    warm(directory)
    with closing(sqlite3.connect(database(directory))) as connection:
        connection.execute("PRAGMA legacy_alter_table = 1")
        with connection:
            for statement in statements:
                try:
                    connection.execute(statement)
                except sqlite3.OperationalError as error:
                    if "fts5" in str(error):
                        pytest.skip("this sqlite has no fts5")
                    raise
    cache = cache_in(directory)
    with soon():
        right_rows(cache, GOOD)
    assert_works(cache)
    assert is_set_aside(directory)
    assert cache.stats().damaged == 1


def test_a_schema_of_somebody_else_is_set_aside_by_writing_too(
    tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.2: a program that has not read yet is as safe."""
    directory = tmp_path / "c"
    warm(directory)
    change(directory, "CREATE TRIGGER other AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END")
    cache = cache_in(directory)
    assert_works(cache)
    assert cache.stats().damaged == 1


# --- Places --------------------------------------------------------------------------------------


def foreign_database(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE mine(x)")
        connection.execute("INSERT INTO mine VALUES (1)")


def link_to_stock(file: Path) -> None:
    with closing(diskcache.Cache(file.parent.parent.parent / "stock")) as stock:
        stock.set("mine", 1)
    file.symlink_to(file.parent.parent.parent / "stock" / "cache.db")


def folder_is(make: Any) -> Any:
    def plant_it(file: Path) -> None:
        file.parent.rmdir()
        make(file.parent)

    return plant_it


def with_beside(ending: str, make: Any) -> Any:
    def plant_it(file: Path) -> None:
        warm(file.parent.parent)
        make(Path(f"{file}{ending}"))

    return plant_it


PLACES = {
    "link": link_to_stock,
    "dangling link": lambda file: file.symlink_to(file.parent / "nowhere"),
    "directory": lambda file: file.mkdir(),
    "pipe": os.mkfifo,
    "text": lambda file: file.write_text("hello " * 10_000),
    "foreign database": foreign_database,
    "folder is a file": folder_is(lambda folder: folder.write_text("x")),
    "folder is a pipe": folder_is(os.mkfifo),
    "folder is a link": folder_is(lambda folder: folder.symlink_to("/etc")),
    "log is a pipe": with_beside("-wal", os.mkfifo),
    "index is a pipe": with_beside("-shm", os.mkfifo),
    "log is a directory": with_beside("-wal", lambda file: file.mkdir()),
    "log is a link": with_beside("-wal", lambda file: file.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("reads_first", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_cache_is_set_aside(
    tmp_path: Path, cache_in: MakeCache, place: str, reads_first: bool
) -> None:
    """B 5.4: whatever stands in the file's place neither blocks nor is followed or changed."""
    directory = tmp_path / "c"
    (directory / "v1").mkdir(parents=True)
    PLACES[place](database(directory))
    foreign = tmp_path / "stock" / "cache.db"
    before = foreign.read_bytes() if foreign.exists() else b""
    cache = cache_in(directory)
    if reads_first:
        with soon():
            assert right_rows(cache, GOOD) == 0
    assert_works(cache)
    assert cache.stats().damaged == 1
    assert os.path.lexists(directory / "damaged")
    assert before == (foreign.read_bytes() if foreign.exists() else b"")


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_a_log_that_is_garbage_is_no_harm(tmp_path: Path, cache_in: MakeCache, ending: str) -> None:
    """B 5.4: what a crash or somebody left beside the file loses none of its rows."""
    directory = tmp_path / "c"
    warm(directory)
    Path(f"{database(directory)}{ending}").write_bytes(bytes(range(256)) * 400)
    cache = cache_in(directory)
    with soon():
        assert right_rows(cache, GOOD) == 5
    assert_works(cache)


def test_what_is_set_aside_takes_the_place_of_the_last(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: a file that is damaged again and again does not fill the disk."""
    directory = tmp_path / "c"
    directory.mkdir()
    (directory / "damaged").write_text("somebody's file, even")
    for number in range(3):
        (directory / "v1").mkdir(exist_ok=True)
        database(directory).write_text(f"damage {number} " * 1_000)
        cache = cache_in(directory)
        assert_works(cache)
        cache.close()
    assert sorted(path.name for path in directory.iterdir()) == ["damaged", "v1"]
    assert (directory / "damaged" / "cache.db").read_text().startswith("damage 2 ")


def test_a_directory_that_names_a_variable_is_not_written(
    tmp_path: Path, cache_in: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    """B 5.4: diskcache would put such a name's value in its place, and write there."""
    cache = cache_in(tmp_path / "$HOME")
    put_question = {"number": 1}
    cache.put(put_question, {"says": question(1)})
    assert cache.flush(20)
    assert cache.get(put_question) is None
    assert list(tmp_path.rglob("cache.db")) == []
    assert cache.stats().dropped_writes == 1
    assert "variable" in caplog.text
