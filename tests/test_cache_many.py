"""Many keys at once: `read_many` and `write_many` are `read` and `write` for each, and quicker.

Not here: single rows, and all else that is true of both (`test_cache_disk.py` and its neighbours).
"""

from __future__ import annotations

import logging
import os
import pickle
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspylite.models.cache import connections, contract, store
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.rows import MAX_ROW_BYTES
from dspylite.schema.messages import LMOutput, LMResponse
from tests.cache_tools import MakeCache, database, lock_on, python, said_by

NO_LOCK_S = 2.5
"""A call may wait 0.25 s; a machine under load needs some more."""


def key(number: int) -> str:
    return f"{number:064x}"


def vector(number: int, length: int = 30) -> array[float]:
    return array("f", [number] * length)


def vectors(numbers: Sequence[int]) -> dict[str, array[float]]:
    return {key(number): vector(number) for number in numbers}


def keys(numbers: Sequence[int]) -> list[str]:
    return [key(number) for number in numbers]


def is_right(found: dict[str, Any], numbers: Sequence[int]) -> bool:
    """Return whether each value is the vector of its key."""
    expected = vectors(numbers)
    return all(expected[name] == value for name, value in found.items())


def change(directory: Path, statement: str, *values: Any) -> None:
    """Change the database as anybody with sqlite can."""
    with closing(sqlite3.connect(database(directory))) as connection, connection:
        connection.execute(statement, values)


def written(cache: Cache, numbers: Sequence[int]) -> Cache:
    """Have vectors on disk."""
    cache.write_many(vectors(numbers))
    assert cache.flush(20)
    return cache


# --- The same as key by key ----------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(lambda each: array("f", each)),
    st.text(max_size=5).map(lambda text: LMResponse(outputs=(LMOutput(text=text),))),
)
KEYS = st.sampled_from("abcdefgh")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.dictionaries(KEYS, VALUES)),
        st.tuples(st.just("read"), st.sets(KEYS).map(sorted)),
        st.tuples(st.just("drop"), KEYS),
        st.tuples(st.just("spoil"), KEYS),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("forget"), st.none()),
    ),
    max_size=12,
)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("disk", [True, False])
def test_many_at_once_are_each_by_itself(
    tmp_path_factory: pytest.TempPathFactory, memory: bool, disk: bool
) -> None:
    """B 5.4: whatever is kept, read, dropped and spoilt, values and counts are the same."""

    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(STEPS)
    def run(steps: list[tuple[str, Any]]) -> None:
        place = tmp_path_factory.mktemp("c")
        many, single = [
            Cache(disk, memory, disk_cache_dir=place / name) for name in ("many", "single")
        ]
        for what, given_ in steps:
            if what == "write":
                many.write_many(given_)
                for name, value in given_.items():
                    single.write(name, value)
            elif what == "read":
                each = {name: single.read(name) for name in given_}
                assert many.read_many(given_) == {k: v for k, v in each.items() if v is not None}
            for cache in (many, single):
                if what == "drop":
                    cache.drop(given_)
                elif what == "forget":
                    cache.reset_memory_cache()
                elif what in {"flush", "spoil"}:
                    assert cache.flush(20)
                directory = Path(cache.disk_cache_dir or "")
                if what == "spoil" and disk and database(directory).exists():
                    change(directory, "UPDATE Cache SET value = x'00' WHERE key = ?", given_)
        stats = []
        for cache in (many, single):
            cache.flush(20)
            cache.close()
            # Rows of a key that is written twice are one or two, as the thread finds them.
            stats.append(replace(cache.stats(), writes=0))
        assert stats[0] == stats[1]

    run()


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("memory", [True, False])
def test_values_may_be_changed_if_they_are_copied(
    tmp_path: Path, cache_in: MakeCache, copied: bool, memory: bool
) -> None:
    """B 5.3: what a caller does to its values changes none that is kept, if it asked for that."""
    cache = cache_in(tmp_path / "c", enable_memory_cache=memory)
    given_ = {**vectors(range(3)), "list": [1], "text": "a"}
    cache.write_many(given_, copied=copied)
    if copied:
        given_[key(1)][0] = 7.0
    for round_ in range(4):  # from memory or the queue, then from the disk, then from memory
        if round_ == 2:
            assert cache.flush(20)
            cache.reset_memory_cache()
        found = cache.read_many([*given_, "no"], copied=copied)
        assert found == {**vectors(range(3)), "list": [1], "text": "a"}
        if copied:
            found[key(0)][0] = 9.0
            found["list"].append(2)
    if memory and not copied:
        assert cache.read_many([key(1)], copied=False)[key(1)] is found[key(1)]


def test_a_key_given_twice_counts_once(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: and what is not there is left out."""
    cache = written(cache_in(tmp_path / "c", enable_memory_cache=True), range(3))
    assert cache.read_many([key(1), key(1), key(8), key(1)]) == vectors([1])
    cache.reset_memory_cache()
    assert cache.read_many([key(1), key(1), key(8), key(1)]) == vectors([1])
    stats = cache.stats()
    assert (stats.memory_hits, stats.disk_hits) == (1, 1)
    assert cache.read_many([]) == {}
    cache.write_many({})


def test_a_value_without_a_form_leaves_no_other_out_of_order() -> None:
    """B 5.2: it is a `TypeError`, as for one."""
    cache = Cache(enable_disk_cache=False)
    with pytest.raises(TypeError):
        cache.write_many({**vectors(range(300)), "bad": object()})
    found = cache.read_many(keys(range(300)))
    assert is_right(found, range(300))
    with pytest.raises(TypeError):
        cache.write_many({"bad": array("d", [1.0])})


def test_a_value_longer_than_a_row_may_be_is_left_out(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.1: the others are kept."""
    cache = cache_in(tmp_path / "c", enable_memory_cache=True)
    cache.write_many({"a": "a", "long": "x" * MAX_ROW_BYTES, "b": "b"})
    assert cache.flush(20)
    assert cache.read_many(["a", "long", "b"]) == {"a": "a", "b": "b"}
    assert cache.stats().writes == 2


def test_a_digest_is_the_same_however_long_the_row(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.2: whatever the parts are that it is made from."""
    lengths = [0, 1, 505, 511, 512, 513, 1_536, 24_990, 25_000, 25_001, 100_000]
    given_ = {key(length): array("f", range(length)) for length in lengths}
    cache = cache_in(tmp_path / "c")
    cache.write_many(given_)
    assert cache.flush(20)
    assert cache.read_many(list(given_)) == given_
    assert {name: cache.read(name) for name in given_} == given_
    for length in lengths[1:]:
        change(
            tmp_path / "c",
            "UPDATE Cache SET value = substr(value, 1, length(value) - 4) || x'01020304'"
            " WHERE key = ?",
            key(length),
        )
    assert cache.read_many(list(given_)) == {key(0): array("f")}
    assert cache.stats().rejected_rows == len(lengths) - 1


def test_rows_that_wait_to_be_written_are_read(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: and those that are to be removed are not."""
    cache = written(cache_in(tmp_path / "c"), range(500))
    with cache_stopped(cache):
        cache.write_many({key(number): vector(-1) for number in range(0, 500, 2)})
        for number in range(0, 500, 5):
            cache.drop(key(number))
        found = cache.read_many(keys(range(510)))
    assert found == {
        key(number): vector(number if number % 2 else -1) for number in range(500) if number % 5
    }
    assert cache.flush(20)
    assert cache.read_many(keys(range(510))) == found


@contextmanager
def cache_stopped(cache: Cache) -> Iterator[None]:
    """Have the thread that writes write nothing."""
    assert cache.disk_cache is not None
    with cache.disk_cache._in_sqlite:  # the lock of whoever changes the file
        yield


def test_the_disk_is_asked_in_few_statements(
    tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.4: some hundred keys at a time, and memory before that."""
    cache = written(cache_in(tmp_path / "c"), range(1_000))
    asked: list[int] = []
    get_many = connections._Reader.get_many

    def watched(self: Any, keys: Sequence[str], until: float) -> Any:
        asked.append(len(keys))
        return get_many(self, keys, until)

    monkeypatch.setattr(connections._Reader, "get_many", watched)
    assert len(cache.read_many(keys(range(1_100)))) == 1_000
    assert asked == [contract.KEYS_AT_ONCE] * 5 + [100]


def test_nothing_is_made_by_looking(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.1: a program that only looks leaves no trace."""
    cache = cache_in(tmp_path / "a" / "b")
    assert cache.read_many(keys(range(300))) == {}
    cache.write_many({})
    assert cache.flush(20)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_off_keeps_nothing() -> None:
    """B 5.1: neither level is asked."""
    cache = Cache(enable_disk_cache=False, enable_memory_cache=False)
    cache.write_many(vectors(range(3)))
    assert cache.read_many(keys(range(3))) == {}
    assert cache.stats().memory_entries == 0


def test_memory_holds_its_bytes() -> None:
    """B 5.1: the last ones are there, those used longest ago are not."""
    cache = Cache(enable_disk_cache=False, memory_size_limit_bytes=100_000)
    cache.write_many(vectors(range(1_000)))
    assert 90_000 < cache.stats().memory_bytes <= 100_000
    found = cache.read_many(keys(range(1_000)))
    assert list(found) == keys(range(1_000 - len(found), 1_000))
    cache.write_many({key(5_000): vector(5, 40_000)}, in_memory=True)  # longer than all there is
    assert len(cache.read_many(keys(range(1_000)))) == len(found)


def test_memory_may_be_left_out(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.1: the disk has them all the same."""
    cache = cache_in(tmp_path / "c", enable_memory_cache=True)
    cache.write_many(vectors(range(3)), in_memory=False)
    assert cache.flush(20)
    assert cache.stats().memory_entries == 0
    assert cache.read_many(keys(range(3))) == vectors(range(3))
    assert cache.stats().memory_entries == 3


# --- Rows that somebody else has made ------------------------------------------------------------


class Payload:
    """Does something when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("way", ["pickle", "file", "mode", "text", "long", "cut", "other", "null"])
def test_a_bad_row_is_a_miss_by_itself(
    tmp_path: Path, cache_in: MakeCache, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """B 5.2: it is neither loaded nor believed, it goes, and its neighbours are served."""
    directory, foreign, marker = tmp_path / "c", tmp_path / "foreign", tmp_path / "it-ran"
    foreign.write_bytes(pickle.dumps(Payload(marker)))
    cache = written(cache_in(directory), range(250))
    statement, *values = {
        "pickle": ("mode = 4, value = ?", foreign.read_bytes()),
        "file": ("mode = 2, value = NULL, filename = ?", str(foreign)),
        "mode": ("mode = 'x'",),
        "text": ("value = 'a text'",),
        "long": (f"value = zeroblob({MAX_ROW_BYTES + 1})",),
        "cut": ("value = substr(value, 1, 20)",),
        "other": ("value = (SELECT value FROM Cache WHERE key = ?)", key(2)),
        "null": ("value = NULL",),
    }[way]
    for number in (7, 77, 247):
        change(directory, f"UPDATE Cache SET {statement} WHERE key = '{key(number)}'", *values)
    with caplog.at_level(logging.WARNING):
        assert len(cache.read_many(keys(range(250)))) == 247
        assert cache.flush(20)
        assert len(cache.read_many(keys(range(250)))) == 247
    assert cache.stats().rejected_rows == 3
    assert len(caplog.records) == 1
    written(cache, [7, 77, 247])
    assert cache.read_many(keys(range(250))) == vectors(range(250))
    cache.close()
    assert foreign.exists()
    assert not marker.exists()


def test_a_planted_file_row_that_is_written_over_takes_no_file_with_it(
    tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.2: the row is an ordinary one from then on, and the count of rows is right."""
    directory, foreign = tmp_path / "c", tmp_path / "foreign"
    foreign.write_text("mine")
    cache = written(cache_in(directory), range(10))
    change(
        directory,
        "UPDATE Cache SET mode = 2, filename = ?, size = 4, tag = 't', expire_time = 1, value = 'x'"
        f" WHERE key = '{key(3)}'",
        str(foreign),
    )
    written(cache, range(10))
    assert cache.read_many(keys(range(10))) == vectors(range(10))
    assert foreign.read_text() == "mine"
    with closing(sqlite3.connect(database(directory))) as connection:
        counters = dict(
            connection.execute("SELECT key, value FROM Settings WHERE key IN ('count', 'size')")
        )
        rows = set(
            connection.execute("SELECT raw, mode, size, tag, filename, expire_time FROM Cache")
        )
    assert counters == {"count": 10, "size": 0}
    assert rows == {(1, 1, 0, None, None, None)}


@pytest.mark.parametrize("collation", ["BLOB COLLATE NOCASE", "INTEGER"])
def test_a_key_that_is_not_asked_for_is_not_given(tmp_path: Path, collation: str) -> None:
    """B 5.2: a table that somebody has planted may find keys equal that are not."""
    directory = tmp_path / "c"
    (directory / "v1").mkdir(parents=True)
    statements = (
        f"CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key {collation}, raw INTEGER,"
        " mode INTEGER, filename TEXT, value BLOB)",
        "INSERT INTO Cache(key, raw, mode, value) VALUES ('abc', 1, 1, x'00')",
        "INSERT INTO Cache(key, raw, mode, value) VALUES ('123', 1, 1, x'00')",
        "INSERT INTO Cache(key, raw, mode, value) VALUES ('123', 1, 1, x'00')",
    )
    for statement in statements:
        change(directory, statement)
    cache = Cache(disk_cache_dir=directory)
    assert cache.disk_cache is not None
    given_ = list(cache.disk_cache.get_many(["ABC", "0123", "x"]))
    assert given_ == [{}]
    assert cache.read_many(["ABC", "0123", "123"]) == {}
    cache.close()


# --- Disks that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["EXCLUSIVE", "OWNED"])
def test_a_lock_is_waited_for_once(
    tmp_path: Path, cache_in: MakeCache, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """B 5.4: however many keys there are, and what they brought is written when it is gone."""
    directory = tmp_path / "c"
    written(cache_in(directory), range(10)).close()
    cache = cache_in(directory)
    with lock_on(database(directory), how):
        started = time.monotonic()
        found = cache.read_many(keys(range(5_000)))
        cache.write_many(vectors(range(5_000, 10_000)))
        assert time.monotonic() - started < NO_LOCK_S
        assert found == ({} if how == "OWNED" else vectors(range(10)))  # a log can be read
        assert cache.read_many(keys(range(9_000, 9_010))) == vectors(range(9_000, 9_010))
        assert not cache.flush(0.0)
        assert cache.stats().timeouts == (1 if how == "OWNED" else 0)
    assert cache.flush(20)
    assert cache.stats().dropped_writes == 0
    cache.close()
    again = cache_in(directory)
    assert again.read_many(keys(range(5_000, 10_000))) == vectors(range(5_000, 10_000))


def test_threads_that_read_keep_no_other_for_long(
    tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.4: where all readers are lent, it is given up once, and not for each slice."""
    cache = written(cache_in(tmp_path / "c"), range(10))
    monkeypatch.setattr(connections, "_MOST_READERS", 0)
    assert cache.disk_cache is not None
    cache.disk_cache._table.close()
    assert cache.read_many(keys(range(2_000))) == {}
    assert cache.stats().timeouts == 1


def test_damage_is_a_miss_and_is_set_aside(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: one call finds it, and the next rows are kept in another file."""
    directory = tmp_path / "c"
    written(cache_in(directory), range(1_000)).close()
    file = database(directory)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(4_096)
        opened.write(os.urandom(size - 4_096))
    cache = cache_in(directory)
    assert cache.read_many(keys(range(1_000))) == {}
    assert cache.flush(20)
    stats = cache.stats()
    assert (stats.damaged, stats.rejected_rows) == (1, 0)
    assert (directory / "damaged").exists()
    written(cache, range(1_000))
    assert cache.read_many(keys(range(1_000))) == vectors(range(1_000))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_serves_its_hits(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: what is written there is dropped, and counted."""
    directory = tmp_path / "c"
    written(cache_in(directory), range(300)).close()
    os.chmod(database(directory), 0o400)
    for folder in (directory / "v1", directory):
        os.chmod(folder, 0o500)
    try:
        cache = cache_in(directory)
        assert cache.read_many(keys(range(400))) == vectors(range(300))
        cache.write_many(vectors(range(300, 400)))
        cache.flush(20)
        assert cache.stats().dropped_writes == 100
    finally:
        for folder in (directory, directory / "v1"):
            os.chmod(folder, 0o700)


# --- More than may wait --------------------------------------------------------------------------


def test_a_full_queue_is_waited_for_while_it_empties(
    tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.4: a disk that takes rows gets all, were they a hundred times what may wait."""
    monkeypatch.setattr(store, "MOST_QUEUED_BYTES", 20_000)
    monkeypatch.setattr("dspylite.models.cache.cache.LONGEST_WAIT_S", 20.0)  # on a busy machine
    cache = cache_in(tmp_path / "c")
    cache.write_many(vectors(range(5_000)))
    assert cache.flush(20)
    assert (cache.stats().writes, cache.stats().dropped_writes) == (5_000, 0)
    assert cache.read_many(keys(range(5_000))) == vectors(range(5_000))


def test_a_full_queue_that_stays_is_waited_for_once(
    tmp_path: Path,
    cache_in: MakeCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """B 5.4: the rest is dropped, counted and told once; a single write waits for nothing."""
    cache = written(cache_in(tmp_path / "c"), [0])
    monkeypatch.setattr(store, "MOST_QUEUED_BYTES", 20_000)
    waits: list[float] = []
    assert cache.disk_cache is not None
    wait_for = cache.disk_cache._changed.wait_for

    def watched(what: Callable[[], bool], timeout: float | None = None) -> bool:
        waits.append(timeout or 0.0)
        return wait_for(what, timeout)

    with caplog.at_level(logging.WARNING), cache_stopped(cache):
        monkeypatch.setattr(cache.disk_cache._changed, "wait_for", watched)
        cache.write_many(vectors(range(1, 5_001)))
        cache.write(key(6_000), vector(6_000))
        monkeypatch.setattr(cache.disk_cache._changed, "wait_for", wait_for)
        assert len(waits) == 1
        assert 0 < waits[0] <= store.LONGEST_WAIT_S
        kept = cache.read_many(keys(range(1, 5_001)))
        assert 0 < len(kept) < 200
    assert len(caplog.records) == 1
    assert cache.flush(20)
    assert cache.stats().dropped_writes == 5_001 - len(kept)
    assert cache.stats().writes == 1 + len(kept)


# --- Many threads, many processes ----------------------------------------------------------------


def test_threads_that_read_and_write_many_get_their_own(
    tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.4: from memory too small for all of them, and from the disk."""
    cache = cache_in(tmp_path / "c", enable_memory_cache=True, memory_size_limit_bytes=200_000)
    ready = threading.Barrier(8)

    def work(thread: int) -> None:
        ready.wait(20)
        for turn in range(10):
            numbers = range((thread % 4) * 500, (thread % 4) * 500 + 600)
            cache.write_many(vectors(numbers[turn::10]))
            found = cache.read_many(keys(numbers))
            assert is_right(found, numbers)
            cache.read(key(numbers[turn]))
            if turn == 5 and thread == 0:
                cache.drop(key(numbers[0]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.flush(20)
    stats = cache.stats()
    assert (stats.rejected_rows, stats.damaged, stats.dropped_writes) == (0, 0, 0)
    assert len(cache.read_many(keys(range(2_100)))) >= 2_099


WORK = """
import sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from tests.test_cache_many import is_right, keys, vectors
cache = Cache(disk_cache_dir=Path(sys.argv[1]), enable_memory_cache=False)
number = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(5):
    mine = range(number * 1_000 + turn * 300, number * 1_000 + turn * 300 + 300)
    cache.write_many(vectors(mine))
    everybodys = range(5_000)
    found = cache.read_many(keys(everybodys))
    assert is_right(found, everybodys)
assert cache.flush(20)
stats = cache.stats()
assert (stats.rejected_rows, stats.damaged, stats.dropped_writes) == (0, 0, 0), stats
"""


def test_processes_that_read_and_write_many_lose_no_row(
    tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.4: four at once, whose rows overlap."""
    processes = [python(WORK, tmp_path / "c", number) for number in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        said_by(process)
    cache = cache_in(tmp_path / "c")
    assert cache.read_many(keys(range(4_500))) == vectors(range(4_500))


FORK = """
import os, signal, sys, threading
from pathlib import Path
from dspylite.models.cache import store
from dspylite.models.cache.cache import Cache
from tests.test_cache_many import is_right, keys, vectors
cache = Cache(disk_cache_dir=Path(sys.argv[1]), memory_size_limit_bytes=100_000)
store._ALONE_S = 0.0  # a disk that was locked is asked again at once
cache.write_many(vectors(range(500)))
assert cache.flush(20)
is_over, failed = threading.Event(), []

def call(thread):
    try:
        turn = 0
        while not is_over.is_set():
            turn += 1
            mine = range(1_000 * thread, 1_000 * thread + 300)
            cache.write_many(vectors(mine))
            found = cache.read_many(keys(range(500)))
            assert is_right(found, range(500))
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=call, args=(n + 1,)) for n in range(4)]
for thread in threads:
    thread.start()

def child(number):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    code = 1
    try:
        found = cache.read_many(keys(range(500)))
        assert is_right(found, range(500))
        cache.write_many(vectors(range(50_000 + number * 10, 50_000 + number * 10 + 10)))
        code = 0 if cache.flush(15) and not cache.stats().rejected_rows else 2
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)

children = []
for number in range(8):
    pid = os.fork()
    if pid == 0:
        child(number)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
is_over.set()
for thread in threads:
    thread.join(20)
assert not any(thread.is_alive() for thread in threads)
assert failed == [], failed[:3]
assert cache.flush(20)
assert cache.read_many(keys(range(50_000, 50_080))) == vectors(range(50_000, 50_080))
assert cache.stats().damaged == cache.stats().rejected_rows == 0, cache.stats()
print(*codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_forked_children_read_and_write_many(tmp_path: Path) -> None:
    """B 7.3: amid the work of four threads, none hangs or fails, and the parent goes on."""
    process = python(FORK, tmp_path / "c", flags=("-W", "ignore::DeprecationWarning"))
    assert said_by(process).split() == ["0"] * 8
