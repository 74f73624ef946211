"""The page of promises and the tests that keep them name each other."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reference" / "promises.md").read_text("utf-8")
ROW = re.compile(r"^\| (\w+(?:\.\d+)?) \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = {row[1]: row[3] for row in ROW.finditer(PAGE)}
NAMED = re.compile(r"\bB (\d+(?:\.\d+)?[A-Z]?)\b")


def test_every_promise_that_a_test_names_is_on_the_page() -> None:
    """A reader of a test can look up what it keeps."""
    named = {
        (path.name, line)
        for path in TESTS.glob("test_*.py")
        for line in NAMED.findall(path.read_text("utf-8"))
    }
    assert {(name, line) for name, line in named if line not in ROWS} == set()


def test_every_test_file_on_the_page_exists() -> None:
    """A promise whose test is gone is no promise."""
    files = {name for tests in ROWS.values() for name in re.findall(r"test_\w+\.py", tests)}
    assert len(ROWS) > 20
    assert {name for name in files if not (TESTS / name).is_file()} == set()
