"""Programs in DSPy's documented style run here and there with equal results.

Each file of `compat/programs/` is run as it stands, and with `import dspy` where DSPy is installed,
against the same scripted server. What DSPy 3.4.1 gave is kept in `compat/expected/`; write it anew
by `DSPYLITE_RECORD=1` in an environment that has DSPy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspylite.testing import FakeServer
from tests.compat.scripts import SCRIPTS, answer_of

HERE = Path(__file__).parent / "compat"
PROGRAMS = sorted(path.stem for path in (HERE / "programs").glob("*.py"))
HAS_DSPY = importlib.util.find_spec("dspy") is not None
RECORDS = bool(os.environ.get("DSPYLITE_RECORD"))


def run(name: str, text: str) -> Any:
    """Run a program against its own server; return the JSON that it prints."""
    with FakeServer(answer=answer_of(name)) as server:
        done = subprocess.run(
            [sys.executable, "-c", text],
            env={**os.environ, "API_BASE": server.base_url, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def text_of(name: str) -> str:
    return (HERE / "programs" / f"{name}.py").read_text(encoding="utf-8")


def for_dspy(text: str) -> str:
    """Change the import, and nothing else."""
    return text.replace("import dspylite as dspy", "import dspy").replace("dspylite.", "dspy.")


def expected(name: str) -> Any:
    return json.loads((HERE / "expected" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_program_is_scripted_and_none_is_lost() -> None:
    """A program without a script would not be run."""
    assert set(PROGRAMS) == set(SCRIPTS)
    assert len(PROGRAMS) >= 17


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_gives_what_dspy_gives(name: str) -> None:
    """A program written for DSPy runs here by changing its import."""
    assert run(name, text_of(name)) == expected(name)


@pytest.mark.skipif(not HAS_DSPY, reason="DSPy is not installed here")
@pytest.mark.parametrize("name", PROGRAMS)
def test_dspy_itself_gives_what_is_expected(name: str) -> None:
    """What is kept as DSPy's result is what it gives today."""
    found = run(name, for_dspy(text_of(name)))
    if RECORDS:
        path = HERE / "expected" / f"{name}.json"
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == expected(name)
