"""What the tests of the cache on disk share: questions with answers of their own, and processes.

Not here: any test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspylite as dspy
from dspylite.models.cache.cache import Cache
from dspylite.testing import FakeServer

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-the-key-of-these-tests-0123456789"
SPAWN_LIMIT_S = 50

MakeCache = Callable[..., Cache]


def lm_of(base_url: str, **options: Any) -> dspy.LM:
    """Return a model at a fake server that echoes what it is asked."""
    given: dict[str, Any] = {"api_key": KEY, "num_retries": 0, "engine": "direct"}
    return dspy.LM("openai/m", api_base=base_url, **given | options)


def question(number: int) -> str:
    """Return a question that no other number has, of a page's length."""
    return f"What is {number}?" + f" {number}" * 40


def ask(lm: dspy.LM, numbers: Iterable[int]) -> None:
    """Ask questions; each must get its own answer, from wherever it comes."""
    for number in numbers:
        answer = lm(question(number))
        assert answer == [f"echo: {question(number)}"], number


def asked_anew(server: FakeServer, lm: dspy.LM, numbers: Iterable[int]) -> int:
    """Ask questions and return how many of them came to the server."""
    before = len(server.requests)
    ask(lm, numbers)
    return len(server.requests) - before


def put_rows(cache: Cache, numbers: Iterable[int]) -> None:
    """Keep rows of which each says what it is, and have them on disk."""
    for number in numbers:
        cache.put({"number": number}, {"says": question(number)})
    assert cache.flush(20)


def right_rows(cache: Cache, numbers: Iterable[int]) -> int:
    """Return how many rows are there; each must say what it is."""
    found = {number: cache.get({"number": number}) for number in numbers}
    for number, row in found.items():
        assert row is None or row == {"says": question(number)}, number
    return sum(row is not None for row in found.values())


def database(directory: Path) -> Path:
    """Return the file that the rows are in."""
    return directory / "v1" / "cache.db"


def python(
    code: str, *arguments: object, flags: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start a process of its own."""
    return start(*flags, "-c", code, *arguments, **environment)


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a Python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said_by(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """Wait for the end of a process and return what it printed."""
    try:
        out, err = process.communicate(timeout=SPAWN_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the process hangs: {out} {err}") from None
    assert process.returncode == code, (process.returncode, out, err)
    return out


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
if sys.argv[2] == "OWNED":
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    connection.execute("INSERT INTO Settings VALUES ('hits2', 0)")
    connection.execute("ROLLBACK")
else:
    connection.execute(f"BEGIN {sys.argv[2]}")
print("held", flush=True)
sys.stdin.readline()
connection.close()
"""


@contextmanager
def lock_on(file: Path, how: str) -> Iterator[None]:
    """Have another process hold the database's lock."""
    process = python(HOLD, file, how)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        said_by(process)
    finally:
        process.kill()
        process.communicate()
