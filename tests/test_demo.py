"""`python -m dspylite demo`, as a user runs it.

Not here: how its answers are found (the offline model's tests).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dspylite.demo import QUESTIONS
from dspylite.testing import FakeServer

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"
WAYS = ["Parallel on ", "plain ThreadPoolExecutor", "asyncio through asyncify", "through acall"]
SAME = "All four ways gave the same answers."


def demo(
    *arguments: str | Path, root: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    ours = ("DSPYLITE_", "OPENAI_", "LITELLM_", "COLUMNS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-m", "dspylite", "demo", *map(str, arguments)],
        cwd=root,
        env={**inherited, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def rows(done: subprocess.CompletedProcess[str], label: str) -> list[str]:
    """Return the texts of one kind of row of the table, its wrapped lines joined."""
    pattern = rf"^ *(?:\d+ )?{label}  (.*(?:\n {{11}}\S.*)*)"
    return [re.sub(r"\s+", " ", text) for text in re.findall(pattern, done.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def shown() -> subprocess.CompletedProcess[str]:
    """Run the demo as `make demo` does."""
    return demo()


def test_demo_succeeds_quietly(shown: subprocess.CompletedProcess[str]) -> None:
    """It is the first thing a newcomer sees."""
    assert (shown.returncode, shown.stderr) == (0, "")


def test_demo_names_the_four_ways(shown: subprocess.CompletedProcess[str]) -> None:
    """What is demonstrated is that one program runs in each of them."""
    for way in WAYS:
        assert re.search(rf"^.*{way}.* {len(QUESTIONS)} answers in \d", shown.stdout, re.MULTILINE)


def test_demo_answers_each_question_from_a_named_source(
    shown: subprocess.CompletedProcess[str],
) -> None:
    """A table of question, answer, source and who worked on it."""
    assert rows(shown, "asked") == list(QUESTIONS)
    assert len(list(filter(None, rows(shown, "answer")))) == len(QUESTIONS)
    sources = rows(shown, "source")
    assert len(sources) == len(QUESTIONS)
    assert all((ROOT / "docs" / source.partition(",")[0]).is_file() for source in sources)


def test_demo_shows_who_worked(shown: subprocess.CompletedProcess[str]) -> None:
    """Threads of the batch, of the plain pool and of the loop, and a task: one of each per row."""
    for workers in rows(shown, "worker"):
        names = [re.sub(r" \d+ ms$", "", worker) for worker in workers.split(", ")]
        kinds = [re.sub(r"[-_]?\d+$", "", name) for name in names]
        assert kinds == ["dspylite-worker", "plain-pool", "AnyIO worker thread", "Task"]


def test_four_ways_give_the_same_answers(shown: subprocess.CompletedProcess[str]) -> None:
    """The demo compares them itself, and fails where they differ."""
    assert shown.stdout.rstrip().endswith(SAME)
    assert re.search(rf"^Usage.*: {4 * len(QUESTIONS)} calls,", shown.stdout, re.MULTILINE)


def test_demo_reads_other_documents_and_answers_other_questions(tmp_path: Path) -> None:
    """The way to try it on one's own texts."""
    (tmp_path / "animals.txt").write_text(
        "The blue whale is the largest animal that has ever lived, longer than three buses.\n\n"
        "The bumblebee bat weighs less than two grams and lives in caves in western Thailand.\n"
    )
    (tmp_path / "plants.md").write_text(
        "# Plants\n\nThe oldest living tree is a bristlecone pine that grows in California.\n"
    )
    done = demo("--docs", tmp_path, "--threads", "2", "Where does the bumblebee bat live?")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done, "asked") == ["Where does the bumblebee bat live?"]
    assert "Thailand" in rows(done, "answer")[0]
    assert rows(done, "source") == ["animals.txt"]
    assert "Documents: 3 passages. Questions: 1" in done.stdout
    assert "Parallel on 2 threads" in done.stdout
    assert SAME in done.stdout


@pytest.mark.parametrize("folder", ["", "missing"], ids=["empty", "missing"])
def test_folder_without_documents_is_told_in_a_sentence(tmp_path: Path, folder: str) -> None:
    """A wrong path is the user's to mend, so it is named, without a traceback."""
    done = demo("--docs", tmp_path / folder)
    assert done.returncode == 2
    assert "there is nothing to read in" in done.stdout + done.stderr
    assert str(tmp_path / folder) in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_installed_package_demonstrates_itself_without_docs(tmp_path: Path) -> None:
    """A wheel has no `docs/`; then the demo reads the package's own descriptions."""
    shutil.copytree(
        ROOT / "dspylite", tmp_path / "dspylite", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = demo(root=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert SAME in done.stdout
    assert all(source.partition(",")[0].endswith(".py") for source in rows(done, "source"))


# --- With a model over HTTP --------------------------------------------------------------------


def question_in(body: Mapping[str, object]) -> str:
    messages: Any = body["messages"]
    asked = re.search(r"\[\[ ## question ## \]\]\n(.+)", messages[-1]["content"])
    assert asked
    return asked[1]


def answer_in_form(body: Mapping[str, object]) -> str:
    return f"[[ ## answer ## ]]\nabout {question_in(body)!r}\n\n[[ ## completed ## ]]"


def test_demo_asks_a_real_model_each_question_in_each_way() -> None:
    """The server's log is the judge: every question arrives four times, with the key."""
    with FakeServer(answer=answer_in_form, api_keys=[KEY]) as server:
        done = demo(
            DSPYLITE_MODEL="openai/some-model",
            DSPYLITE_API_BASE=server.base_url,
            OPENAI_API_KEY=KEY,
        )
        requests = server.requests
    assert Counter(question_in(r.json) for r in requests) == dict.fromkeys(QUESTIONS, 4)
    assert {request.status for request in requests} == {200}
    assert done.returncode == 0
    assert "Model: openai/some-model over HTTP." in done.stdout
    assert rows(done, "answer") == [f"about {question!r}" for question in QUESTIONS]
    assert SAME in done.stdout


def test_refused_key_is_told_in_a_sentence() -> None:
    """Neither a traceback nor the key; what to look at is named."""
    with FakeServer(api_keys=["sk-the-right-key"]) as server:
        done = demo(
            "What is a plan?",
            DSPYLITE_MODEL="openai/some-model",
            DSPYLITE_API_BASE=server.base_url,
            OPENAI_API_KEY=KEY,
        )
        assert [request.status for request in server.requests] == [401]
    told = done.stdout + done.stderr
    assert done.returncode == 1
    assert "LMAuthError: openai/some-model: HTTP 401: " in told
    assert "the API key is missing or not one of this server's" in told
    assert "Traceback" not in told
    assert KEY not in told


def test_impossible_endpoint_is_told_in_a_sentence() -> None:
    """A mistake in a variable is found before anything is asked."""
    done = demo(DSPYLITE_MODEL="openai/some-model", DSPYLITE_API_BASE="localhost:8000")
    assert done.returncode == 2
    assert "`api_base` must be a URL" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    """`dspylite demo | head` is a likely first try."""
    done = subprocess.run(
        f"'{sys.executable}' -m dspylite demo | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.startswith("Model: ")
    assert done.stderr == ""


def test_command_without_a_name_says_how_to_use_it() -> None:
    """`python -m dspylite` alone names the command there is."""
    done = subprocess.run(
        [sys.executable, "-m", "dspylite"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "demo" in done.stderr
