"""`dspylite cache`: what an operator sees of the answers on disk, and may do about them."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dspylite.models.cache.cache import Cache
from tests.cache_tools import MakeCache, database, put_rows, question, right_rows, said_by, start


def cache_command(*arguments: object, code: int = 0, **environment: str) -> str:
    return said_by(start("-m", "dspylite", "cache", *arguments, **environment), code=code)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a directory with forty answers in it."""
    cache = Cache(disk_cache_dir=tmp_path / "c", enable_memory_cache=False)
    put_rows(cache, range(40))
    cache.close()
    return tmp_path / "c"


def change(directory: Path, statement: str) -> None:
    with closing(sqlite3.connect(database(directory))) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize("action", ["info", "clear", "verify"])
def test_no_cache_is_said_and_none_is_made(tmp_path: Path, action: str) -> None:
    """B 5.4: looking at a cache never makes one."""
    place = tmp_path / "nothing"
    assert cache_command(action, "--dir", place) == f"There is no cache in {place}.\n"
    assert cache_command(action, DSPYLITE_CACHE_DIR=str(place)).startswith("There is no cache in")
    assert list(tmp_path.iterdir()) == []


def test_info_tells_what_is_there(directory: Path) -> None:
    """B 5.4: where it is, how large, how old, and what was set aside."""
    said = cache_command("info", "--dir", directory)
    size = database(directory).stat().st_size
    assert f"Directory: {directory}\n" in said
    assert f"On disk:   {size:,} bytes\n" in said
    assert "Answers:   40\n" in said
    assert "Oldest:    20" in said
    assert "Newest:    20" in said
    assert "Set aside" not in said
    (directory / "damaged").mkdir()
    (directory / "damaged" / "cache.db").write_bytes(b"x" * 1234)
    assert "Set aside: 1,234 bytes" in cache_command("info", "--dir", directory)


def test_info_tells_of_a_damaged_file(directory: Path) -> None:
    """B 5.4: a file that cannot be read is said to be so, and left as it is."""
    database(directory).write_bytes(b"x" * 5000)
    assert "damaged" in cache_command("info", "--dir", directory, code=1)
    assert database(directory).read_bytes() == b"x" * 5000


def test_verify_finds_bad_rows_and_drops_them_if_asked(
    directory: Path, cache_in: MakeCache, tmp_path: Path
) -> None:
    """B 5.2: pickles, rows with files, wrong digests and strange keys are found, and not loaded."""
    said = cache_command("verify", "--dir", directory)
    assert said == f"40 answers in {directory}, 0 of them bad.\n"
    marker = tmp_path / "it-ran"
    payload = f"cposix\nmkdir\n(V{marker}\ntR.".encode().hex()
    change(directory, f"UPDATE Cache SET mode = 4, value = x'{payload}' WHERE rowid = 1")
    change(directory, "UPDATE Cache SET filename = '/etc/passwd' WHERE rowid = 2")
    change(directory, "UPDATE Cache SET value = x'00' WHERE rowid = 3")
    change(directory, "UPDATE Cache SET key = CAST(x'ff' AS TEXT) WHERE rowid = 4")
    change(directory, "UPDATE Cache SET key = x'80', raw = 0 WHERE rowid = 5")
    said = cache_command("verify", "--dir", directory, code=1)
    assert said == f"40 answers in {directory}, 5 of them bad.\n"
    said = cache_command("verify", "--drop", "--dir", directory, code=1)
    assert said.endswith("Removed 5.\n")
    assert "35 answers" in cache_command("verify", "--dir", directory)
    assert right_rows(cache_in(directory), range(40)) == 35
    assert not marker.exists()


def test_verify_finds_a_damaged_file_and_sets_it_aside_if_asked(directory: Path) -> None:
    """B 5.4: also damage that no answer has met yet."""
    with database(directory).open("r+b") as file:
        file.seek(4096 * 2 + 100)
        file.write(b"x" * 4000)
    assert "is damaged" in cache_command("verify", "--dir", directory, code=1)
    assert not (directory / "damaged").exists()
    assert "is set aside" in cache_command("verify", "--drop", "--dir", directory, code=1)
    assert (directory / "damaged" / "cache.db").exists()
    assert cache_command("verify", "--dir", directory).startswith("0 answers")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_clear_removes_all_answers(directory: Path, is_damaged: bool) -> None:
    """B 5.4: nothing that was asked or answered is left in any file."""
    shutil.copytree(directory / "v1", directory / "damaged")
    if is_damaged:
        with database(directory).open("r+b") as file:
            file.write(b"x" * 100)
    what = "a damaged file" if is_damaged else "40 answers"
    said = cache_command("clear", "--dir", directory)
    assert said == f"Removed {what} from {directory}.\n"
    assert list(directory.iterdir()) == []


def test_a_process_that_runs_goes_on_after_a_clear(directory: Path, cache_in: MakeCache) -> None:
    """B 5.4: what it keeps from then on is kept."""
    cache = cache_in(directory)
    assert right_rows(cache, range(40)) == 40
    put_rows(cache, [40])
    assert "41 answers" in cache_command("clear", "--dir", directory)
    put_rows(cache, range(50, 55))
    assert right_rows(cache, range(50, 55)) == 5
    assert right_rows(cache, range(40)) == 0
    cache.close()
    assert question(52).encode() in database(directory).read_bytes()
    assert "Answers:   5\n" in cache_command("info", "--dir", directory)


def test_a_user_without_a_directory_is_told_what_to_do() -> None:
    """B 5.1: not a traceback."""
    code = (
        "import os, sys; os.path.expanduser = lambda path: path\n"
        "from dspylite.__main__ import main; sys.exit(main(['cache', 'info']))"
    )
    said = said_by(start("-c", code, DSPYLITE_CACHE_DIR="", XDG_CACHE_HOME=""), code=2)
    assert "--dir" in said
    assert os.environ.get("DSPYLITE_CACHE") == "off"
