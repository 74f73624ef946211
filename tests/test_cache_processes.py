"""One cache directory and many processes: started at once, ending at once, and forked in between.

Not here: processes that are killed, and locks that stay (`test_cache_faults.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspylite.testing import FakeServer
from tests.cache_tools import (
    SPAWN_LIMIT_S,
    MakeCache,
    asked_anew,
    lm_of,
    python,
    right_rows,
    said_by,
    start,
)

IS_FULL = os.environ.get("DSPYLITE_SOAK") == "1"
PROCESSES = 16
THREADS = 32
ROWS_PER_THREAD = 200 if IS_FULL else 4

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module, which echoes."""
    with FakeServer() as server:
        yield server


# A process starts when it reads a line, so that all of them begin at once; the interpreter and the
# imports take longest. It ends as programs do: nobody flushes, unless there is more to write than
# the end of a process waits for.
SHARE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from dspylite.models.cache.cache import Cache
from tests.cache_tools import question, right_rows
directory, process, threads, rows = Path(sys.argv[1]), *map(int, sys.argv[2:5])
print("ready", flush=True)
sys.stdin.readline()
cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)

def work(thread):
    first = (process * threads + thread) * rows
    for number in range(first, first + rows):
        cache.put({"number": number}, {"says": question(number)})
        right_rows(cache, [number, number - rows, number % 97])
        cache.put({"number": -1 - number % 10}, {"says": question(-1 - number % 10)})  # everyone's

with ThreadPoolExecutor(threads) as pool:
    list(pool.map(work, range(threads)))
if rows > 4:
    cache.flush()
stats = cache.stats()
bad = stats.rejected_rows, stats.damaged, stats.unavailable, stats.dropped_writes
print(*bad, flush=True)
"""


def test_many_processes_lose_no_row(tmp_path: Path, cache_in: MakeCache) -> None:
    """B 5.6: 16 processes with 32 threads each: no error, no lost write, no wrong answer."""
    directory = tmp_path / "c"
    processes = [
        python(SHARE, directory, number, THREADS, ROWS_PER_THREAD) for number in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [said_by(process).split() for process in processes] == [["0"] * 4] * PROCESSES
    cache = cache_in(directory)
    rows = PROCESSES * THREADS * ROWS_PER_THREAD
    assert right_rows(cache, range(rows)) == rows
    assert right_rows(cache, range(-10, 0)) == 10
    assert not (directory / "damaged").exists()


FIRST = """
import sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from tests.cache_tools import ask, lm_of
directory, process = Path(sys.argv[2]), int(sys.argv[3])
lm = lm_of(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
cache = Cache(disk_cache_dir=directory)
use_cache(cache)
ask(lm, range(process * 3, process * 3 + 3))
print(cache.salt().hex())
"""


def test_processes_that_start_at_once_share_one_salt(
    server: FakeServer, tmp_path: Path, cache_in: MakeCache
) -> None:
    """B 5.3: whoever makes the directory, a key's answers are found by all afterwards."""
    directory = tmp_path / "c"
    processes = [python(FIRST, server.base_url, directory, number) for number in range(PROCESSES)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    salts = {said_by(process).strip() for process in processes}
    assert salts == {(directory / "salt").read_bytes().hex()}
    assert len(server.requests) == PROCESSES * 3
    cache = cache_in(directory)
    lm = lm_of(server.base_url)
    assert asked_anew(server, lm, range(PROCESSES * 3)) == 0, cache.stats()
    other = lm_of(server.base_url, api_key="sk-of-another-tenant-000")
    assert asked_anew(server, other, range(3)) == 3
    assert {path.name for path in directory.iterdir()} == {"salt", "v1"}


# --- Ends ---

END = """
import sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from tests.cache_tools import put_rows, question, right_rows
cache = Cache(disk_cache_dir=Path(sys.argv[1]), enable_memory_cache=False)
if sys.argv[2] != "reads":
    put_rows(cache, range(5))
assert right_rows(cache, range(5)) == 5

class Late:
    def __init__(self, cache):
        self.cache = cache
    def __del__(self):
        self.cache.put({"number": 7}, {"says": 7})
        print(self.cache.get({"number": 1}), self.cache.flush(1), flush=True)

if sys.argv[2] == "late":
    late = Late(Cache(disk_cache_dir=Path(sys.argv[1]), enable_memory_cache=False))
"""


@pytest.mark.parametrize("what", ["writes", "reads", "late"])
def test_a_process_that_ends_closes_its_files(tmp_path: Path, what: str) -> None:
    """B 5.4: no log is left for others to read first, nothing warns, and nothing hangs.

    Python 3.11 waits for ever for a thread that is started when the interpreter ends.
    """
    directory = tmp_path / "c"
    said_by(python(END, directory, "writes"))
    process = python(END, directory, what, flags=("-X", "dev", "-W", "error"))
    out, err = process.communicate(timeout=SPAWN_LIMIT_S)
    assert (process.returncode, err) == (0, "")
    assert out == ("None True\n" if what == "late" else "")
    assert [file.name for file in (directory / "v1").iterdir()] == ["cache.db"]


# --- Forks ---------------------------------------------------------------------------------------

# Children leave by `os._exit`, as those of multiprocessing do; a child that hangs is killed by its
# alarm, whose status the parent sees.
FORK = """
import os, signal, sys, threading
from pathlib import Path
from dspylite.models.cache import store
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from tests.cache_tools import ask, lm_of, put_rows, question, right_rows
url, directory, is_busy = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "busy"
cache = Cache(disk_cache_dir=directory, enable_memory_cache=False)
use_cache(cache)
lm = lm_of(url)
# A disk that was locked is left alone for a second; here it is asked again at once.
store._ALONE_S = 0.0
ask(lm, range(20))
put_rows(cache, range(20))
is_over, failed = threading.Event(), []

def call(thread):
    number = 1_000 * (thread + 1)
    try:
        while not is_over.is_set():
            ask(lm, [number % 20, number])
            cache.put({"number": number}, {"says": question(number)})
            right_rows(cache, [number % 20, number])
            number += 1
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=call, args=(n,)) for n in range(16 if is_busy else 0)]
for thread in threads:
    thread.start()

def child(number):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    code = 1
    try:
        before = cache.stats().disk_hits
        ask(lm, range(20))
        found = right_rows(cache, range(20))
        ask(lm, range(100_000 + number * 10, 100_000 + number * 10 + 3))
        put_rows(cache, [100_000 + number])
        # Under load a lock may take longer than a call waits; a disk that is lost finds nothing.
        is_served = cache.stats().disk_hits - before >= found > 0 or cache.stats().timeouts
        code = 0 if is_served else 2
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)

children = []
for number in range(24):
    pid = os.fork()
    if pid == 0:
        child(number)
    children.append(pid)
    if len(children) % 4 == 0:  # so that they are started amid the work of others
        ask(lm, range(5))
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
is_over.set()
for thread in threads:
    thread.join(20)
assert not any(thread.is_alive() for thread in threads)
assert failed == [], failed[:3]
ask(lm, range(20))
put_rows(cache, [7])
assert right_rows(cache, range(20)) == 20
assert right_rows(cache, range(100_000, 100_024)) == codes.count(0), codes
assert cache.stats().damaged == cache.stats().rejected_rows == 0, cache.stats()
print(*codes)
"""


@forking
@pytest.mark.parametrize("how", ["idle", "busy"])
def test_forked_children_use_the_cache(server: FakeServer, tmp_path: Path, how: str) -> None:
    """B 7.3: no child hangs or fails, read or written as it was; the parent goes on."""
    flags = ("-W", "ignore::DeprecationWarning")
    out = said_by(python(FORK, server.base_url, tmp_path / "c", how, flags=flags))
    assert out.split() == ["0"] * 24


OWN = """
import os, sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from tests.cache_tools import put_rows, right_rows

def descriptors():
    places = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(place).endswith("cache.db") for place in places)

cache = Cache(disk_cache_dir=Path(sys.argv[1]), enable_memory_cache=False)
put_rows(cache, range(3))
assert right_rows(cache, range(3)) == 3
assert descriptors() == 2
pid = os.fork()
if pid == 0:
    assert right_rows(cache, range(3)) == 3
    assert descriptors() == 3
    put_rows(cache, range(3, 6))
    assert descriptors() == 4
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), right_rows(cache, range(6)))
"""


@forking
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_a_forked_child_opens_files_of_its_own(tmp_path: Path) -> None:
    """B 7.3: it does not use the connections of its parent."""
    out = said_by(python(OWN, tmp_path / "c", flags=("-W", "ignore::DeprecationWarning")))
    assert out == "0 6\n"


MULTI = """
import multiprocessing, sys
from pathlib import Path
from dspylite.models.cache.cache import Cache
from tests.cache_tools import put_rows, right_rows
from tests.test_cache_processes import write_one

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    if sys.argv[3] == "warm":
        cache = Cache(disk_cache_dir=Path(sys.argv[1]))
        put_rows(cache, [100])
    processes = [context.Process(target=write_one, args=(sys.argv[1], n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    print(*(process.exitcode for process in processes))
"""


def write_one(directory: str, number: int) -> None:
    from dspylite.models.cache.cache import Cache
    from tests.cache_tools import question

    Cache(disk_cache_dir=directory).put({"number": number}, {"says": question(number)})


@pytest.mark.parametrize("how", ["spawn", pytest.param("fork", marks=forking)])
@pytest.mark.parametrize("parent", ["cold", "warm"])
def test_what_children_of_multiprocessing_write_arrives(
    tmp_path: Path, cache_in: MakeCache, how: str, parent: str
) -> None:
    """B 5.6: they end without `atexit`, and their last rows are kept all the same."""
    script = tmp_path / "script.py"
    script.write_text(MULTI)
    process = start("-W", "ignore::DeprecationWarning", script, tmp_path / "c", how, parent)
    assert said_by(process).split() == ["0"] * 4
    assert right_rows(cache_in(tmp_path / "c"), range(4)) == 4
