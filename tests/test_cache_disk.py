"""The cache's two levels: where answers are, how many, who may read them, and what is never there.

Not here: files that somebody planted (`test_cache_hostile.py`), disks that fail
(`test_cache_faults.py`), many processes (`test_cache_processes.py`).
"""

from __future__ import annotations

import gc
import os
import sqlite3
import stat
import threading
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dspylite as dspy
from dspylite.errors import SettingsError
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import configure_cache, current_cache, use_cache
from dspylite.models.cache.memory import MemoryCache
from dspylite.runtime.settings import context
from dspylite.schema.messages import LMOutput, LMResponse
from dspylite.testing import FakeServer
from tests.cache_tools import (
    KEY,
    MakeCache,
    ask,
    asked_anew,
    database,
    lm_of,
    put_rows,
    python,
    question,
    right_rows,
    said_by,
)

IS_FULL = os.environ.get("DSPYLITE_SOAK") == "1"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module, which echoes."""
    with FakeServer() as server:
        yield server


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything_in(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


# --- Where answers are ---------------------------------------------------------------------------


def test_an_answer_outlives_its_process(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.1: what one process asked, the next one finds on disk and then in memory."""
    code = """
import sys
import dspylite as dspy
lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key=sys.argv[2], engine="direct")
with dspy.context(lm=lm):
    print(dspy.Predict("question -> answer")(question="Where?").answer)
"""
    server.script(dspy.testing.Reply(text=ANSWER))
    one = python(
        code, server.base_url, KEY, DSPYLITE_CACHE="on", DSPYLITE_CACHE_DIR=str(tmp_path / "c")
    )
    assert said_by(one).strip() == "Here"
    cache = cache_in(tmp_path / "c", enable_memory_cache=True)
    with context(lm=lm_of(server.base_url)):
        predict = dspy.Predict("question -> answer")
        assert [predict(question="Where?").answer for _ in range(3)] == ["Here"] * 3
    assert len(server.requests) == 1
    stats = cache.stats()
    assert (stats.disk_hits, stats.memory_hits, stats.misses) == (1, 2, 0)


ANSWER = "[[ ## answer ## ]]\nHere\n\n[[ ## completed ## ]]"


def test_nothing_is_made_before_the_first_write(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.1: a program that only looks leaves no trace, and no directory where none can be."""
    cache = cache_in(tmp_path / "a" / "b")
    assert cache.get({"number": 1}) is None
    cache.stats()
    cache.clear()
    cache.flush()
    assert list(tmp_path.iterdir()) == []
    ask(lm_of(server.base_url), [1])
    assert cache.flush(20)
    assert database(tmp_path / "a" / "b").is_file()


def test_nobody_else_may_read_the_files(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: the directory has mode 0700 and the files 0600, whatever the umask says."""
    before = os.umask(0)
    try:
        cache = cache_in(tmp_path / "c")
        cache.salt(make=True)
        put_rows(cache, range(3))
        right_rows(cache, range(3))
    finally:
        os.umask(before)
    folders = [tmp_path / "c", tmp_path / "c" / "v1"]
    files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
    assert {file.name for file in files} >= {"cache.db", "cache.db-wal", "cache.db-shm", "salt"}
    assert {mode_of(folder) for folder in folders} == {0o700}
    assert {mode_of(file) for file in files} == {0o600}


SAY_CACHE = """
from dspylite.models.cache.configure import current_cache
try:
    print(current_cache())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DSPYLITE_CACHE_DIR": "/x/y"}, "disk: /x/y"),
        ({"XDG_CACHE_HOME": "/xdg"}, "disk: /xdg/dspylite"),
        ({"HOME": "/home/me"}, "disk: /home/me/.cache/dspylite"),
        ({"DSPYLITE_CACHE": "off"}, "Cache(off)"),
        ({"DSPYLITE_CACHE": "Memory"}, "Cache(memory: 64,000,000 bytes)"),
        ({"DSPYLITE_CACHE": "memroy"}, "SettingsError `DSPYLITE_CACHE` is 'memroy'."),
    ],
)
def test_the_environment_says_where(environment: dict[str, str], said: str) -> None:
    """B 5.1: operators place or switch off the cache without a change of code."""
    usual = {"DSPYLITE_CACHE": "", "DSPYLITE_CACHE_DIR": "", "XDG_CACHE_HOME": ""}
    assert said in said_by(python(SAY_CACHE, **{**usual, **environment}))


def test_a_user_without_a_home_has_a_cache_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """B 5.1: service users without a home directory lose the second level, not their calls."""
    for name in ("HOME", "XDG_CACHE_HOME", "DSPYLITE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a uid without an entry
    cache = Cache()
    assert cache.disk_cache_dir is None
    cache.put({"number": 1}, {"says": 1})
    assert cache.get({"number": 1}) == {"says": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"disk_size_limit_bytes": 0},
        {"memory_max_entries": -1},
        {"memory_size_limit_bytes": "1"},
        {"disk_size_limit_bytes": float("nan")},
    ],
)
def test_a_limit_must_be_a_positive_number(wrong: dict[str, object]) -> None:
    """B 5.1: a mistake is seen where the cache is made."""
    with pytest.raises(SettingsError, match="must be a positive number"):
        Cache(**wrong)  # type: ignore[arg-type]


def test_another_cache_is_used_from_the_next_call_on(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.1: what waits to be written is written where it was asked for."""
    cache_in(tmp_path / "one")
    lm = lm_of(server.base_url)
    ask(lm, range(5))
    cache_in(tmp_path / "two")
    assert asked_anew(server, lm, range(5)) == 5
    cache_in(tmp_path / "one")
    assert asked_anew(server, lm, range(5)) == 0


# --- How much is kept ----------------------------------------------------------------------------


def test_memory_holds_its_bytes_under_threads() -> None:
    """B 5.1: eight threads that write and read never push it beyond the bound."""
    memory = MemoryCache(50_000, 1_000_000)
    beyond: list[int] = []

    def work(thread: int) -> None:
        for number in range(2_000):
            memory.put(f"{(thread * 7 + number) % 200}", number, 100 + number % 900)
            memory.get(f"{number % 200}")
            if number % 5 == 0:
                memory.delete(f"{number % 190}")
            if memory.size_bytes > 50_000 + 8 * 1_700:  # each thread may be about to drop
                beyond.append(memory.size_bytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert beyond == []
    assert 0 < memory.size_bytes <= 50_000
    for key in list(memory):
        memory.delete(key)
    assert memory.size_bytes == 0


def answer_with(ending: str) -> LMResponse:
    return LMResponse(outputs=(LMOutput(text="a" * 5_000 + ending),))


@pytest.mark.parametrize(
    "value_of",
    [
        lambda number: answer_with(f"{number}"),
        lambda number: answer_with(f"{number}\N{GRINNING FACE}"),
        lambda number: [{"row": number * 1_000 + each} for each in range(300)],
        lambda number: array("f", range(number, number + 1_000)),
    ],
    ids=["ascii", "emoji", "json", "floats"],
)
def test_memory_holds_its_bytes_whatever_is_kept(
    value_of: Callable[[int], Any], tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.1: an emoji makes each character of its text take four bytes."""
    limit = 2_000_000
    for place in ("written", "read"):
        cache = cache_in(tmp_path, enable_memory_cache=True, memory_size_limit_bytes=limit)
        gc.collect()
        tracemalloc.start()
        try:
            for number in range(300):
                if place == "written":
                    cache.put({"number": number}, value_of(number))
                else:
                    cache.get({"number": number})
            assert cache.flush(20)
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken < limit * 1.5
        cache.close()


def test_memory_forgets_what_was_used_longest_ago() -> None:
    """B 5.1: an answer in use stays."""
    memory = MemoryCache(1_000_000, 3)
    for number in range(3):
        memory.put(f"{number}", number, 10)
    memory.get("0")
    memory.put("3", 3, 10)
    assert sorted(memory) == ["0", "2", "3"]


def test_the_disk_holds_its_bytes(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.1: beyond the bound the oldest answers go; the newest stay."""
    limit = 400_000
    cache = cache_in(tmp_path / "c", disk_size_limit_bytes=limit)
    for start in range(0, 400, 20):
        for number in range(start, start + 20):
            cache.put({"number": number}, "x" * 5_000)
        assert cache.flush(20)
    cache.close()
    assert database(tmp_path / "c").stat().st_size <= limit * 1.2
    assert cache.get({"number": 0}) is None
    assert cache.get({"number": 399}) == "x" * 5_000


def test_an_answer_longer_than_a_row_may_be_is_not_kept(
    tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.1: one huge answer does not evict all others."""
    cache = cache_in(tmp_path / "c", enable_memory_cache=True)
    cache.put({"number": 1}, "x" * 16_000_001)
    assert cache.get({"number": 1}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_hits_leave_nothing_behind(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 7.7: descriptors and threads are flat over 100,000 hits from disk."""
    cache = cache_in(tmp_path / "c")
    put_rows(cache, range(20))
    hits = 100_000 if IS_FULL else 4_000

    def work(_: int) -> int:
        return right_rows(cache, range(20))

    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(64)))
        before = state()
        assert sum(pool.map(work, range(hits // 20))) == hits
        after = state()
    assert after[0] <= before[0] + 8 * 3  # a reader more than during the warm-up
    assert after[1] == before[1]


def test_caches_that_are_replaced_leave_nothing_open(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 7.7: fifty caches one after the other leave neither threads nor descriptors."""
    cache_in(tmp_path / "first")
    gc.collect()
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for number in range(50):
        configure_cache(disk_cache_dir=tmp_path / f"{number % 3}", enable_memory_cache=False)
        put_rows(current_cache(), range(number, number + 2))
        assert right_rows(current_cache(), range(number, number + 2)) == 2
    use_cache(Cache(enable_disk_cache=False))
    gc.collect()
    assert set(threading.enumerate()) - threads == set()  # one of an earlier test may have ended
    assert len(os.listdir("/proc/self/fd")) == descriptors


# --- Secrets -------------------------------------------------------------------------------------


def test_no_secret_is_in_any_file(server: FakeServer, tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.3: neither keys nor headers are stored, in any form that could be read."""
    header = "token-of-a-header-9876543210"
    cache = cache_in(tmp_path / "c")
    ask(lm_of(server.base_url, headers={"X-Token": header}), range(3))
    cache.flush(20)
    assert server.requests[0].api_key == KEY
    before = everything_in(tmp_path / "c")
    cache.close()
    for kept in (before, everything_in(tmp_path / "c")):
        assert question(1).encode() in kept
        assert KEY.encode() not in kept
        assert header.encode() not in kept


def test_a_salt_belongs_to_one_directory(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.3: a fingerprint learnt in one place is worth nothing in another."""
    salts = {cache_in(tmp_path / name).salt(make=True) for name in ("one", "two")}
    again = {cache_in(tmp_path / name).salt() for name in ("one", "two")}
    assert len(salts) == 2
    assert again == salts


def test_keys_given_as_arguments_separate_tenants(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.3: a tenant never gets what another one's key has paid for, now or after a restart."""
    cache_in(tmp_path / "c")
    one, two = (lm_of(server.base_url, api_key=f"sk-tenant-{name}-0000000") for name in "ab")
    assert asked_anew(server, one, range(3)) == 3
    assert asked_anew(server, two, range(3)) == 3
    cache_in(tmp_path / "c")
    assert asked_anew(server, one, range(3)) == 0
    assert asked_anew(server, two, range(3)) == 0
    assert asked_anew(server, lm_of(server.base_url, api_key="sk-tenant-c-0000000"), [1]) == 1


def test_keys_from_the_environment_share_answers(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.3: a key that is rotated keeps the cache."""
    cache_in(tmp_path / "c")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-last-month-000000")
    assert asked_anew(server, lm_of(server.base_url, api_key=None), range(3)) == 3
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-month-000000")
    assert asked_anew(server, lm_of(server.base_url, api_key=None), range(3)) == 0
    assert {request.api_key for request in server.requests} == {"sk-of-last-month-000000"}


def test_a_salt_that_is_none_is_made_anew(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.4: a pipe, an empty or a huge file in its place neither blocks nor is believed."""
    for name, plant in {
        "pipe": lambda file: os.mkfifo(file),
        "empty": lambda file: file.touch(),
        "huge": lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 10**10),
        "link": lambda file: file.symlink_to("/dev/zero"),
    }.items():
        directory = tmp_path / name
        directory.mkdir()
        plant(directory / "salt")
        made = cache_in(directory).salt(make=True)
        assert len(made) == 32
        assert cache_in(directory).salt() == made
        assert (directory / "salt").stat().st_size == 32


def test_a_file_system_without_links_has_a_salt_too(
    tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.3: or the answers of a key would be lost with each process."""

    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    made = cache_in(tmp_path / "c").salt(make=True)
    assert cache_in(tmp_path / "c").salt(make=True) == made
    assert (tmp_path / "c" / "salt").read_bytes() == made
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["salt"]
    assert mode_of(tmp_path / "c" / "salt") == 0o600


def test_a_salt_that_another_process_made_meanwhile_is_taken(
    tmp_path: Path, cache_in: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 5.3: one that is there already is used somewhere, and never replaced."""
    file = tmp_path / "c" / "salt"
    link = os.link

    def be_late(source: Path, target: Path) -> None:
        file.write_bytes(b"s" * 32)
        link(source, target)

    monkeypatch.setattr(os, "link", be_late)
    assert cache_in(tmp_path / "c").salt(make=True) == b"s" * 32
    assert file.read_bytes() == b"s" * 32


def test_only_bytes_are_in_the_database(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.2: values lie inline, as bytes of JSON, and no row names a file."""
    cache = cache_in(tmp_path / "c")
    ask(lm_of(server.base_url), range(3))
    cache.put({"number": 1}, {"says": "x" * 1_000_000})
    cache.close()
    with sqlite3.connect(database(tmp_path / "c")) as reading:
        rows = reading.execute(
            "SELECT DISTINCT typeof(key), raw, mode, filename, typeof(value) FROM Cache"
        ).fetchall()
    reading.close()
    assert rows == [("text", 1, 1, None, "blob")]
    assert sorted(file.name for file in (tmp_path / "c" / "v1").iterdir()) == ["cache.db"]
