"""The progress bar: drawn on a terminal's stderr, nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

BATCH = """
import dspylite as dspy
print(dspy.Parallel(num_threads=2, progress=True)([(abs, (-x,)) for x in range(7)]))
"""

EVALUATION = """
import dspylite as dspy
devset = [dspy.Example(x=x, y=x).with_inputs("x") for x in range(4)]
evaluate = dspy.Evaluate(devset=devset, metric=lambda e, p: e.y == p.y, display_progress=True)
print(evaluate(lambda x: dspy.Prediction(y=x)).score)
"""

EMBEDDING = """
import dspylite as dspy
embedder = dspy.Embedder("offline/hashing", batch_size=3, dimensions=4)
print(embedder.embed([str(x) for x in range(7)], progress=True).shape)
"""

WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
"""


def run_on_terminal(code: str) -> tuple[int, str, str]:
    """Run code with a terminal as stderr; return exit code, stdout and what the terminal got."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=inner,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 4096):
            shown += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(outer)
    out, _ = process.communicate(timeout=20)
    return process.returncode, out.decode(), shown.decode()


def test_a_bar_is_drawn_on_the_terminal_and_stdout_stays_clean() -> None:
    """A program's output can be piped while its user watches the bar."""
    code, out, shown = run_on_terminal(BATCH)
    assert (code, out) == (0, "[0, 1, 2, 3, 4, 5, 6]\n")
    assert "7/7" in shown


def test_an_embedder_draws_the_same_bar() -> None:
    """Texts, like items: how many are done, of how many."""
    code, out, shown = run_on_terminal(EMBEDDING)
    assert (code, out) == (0, "(7, 4)\n")
    assert "7/7" in shown


def test_without_rich_the_error_says_what_to_install() -> None:
    """The bar is an extra."""
    code, _, shown = run_on_terminal(WITHOUT_RICH + BATCH)
    assert code == 1
    assert "pip install dspylite[progress]" in shown


def test_an_evaluation_goes_on_without_the_bar_that_it_cannot_draw() -> None:
    """Programs written for DSPy ask for one everywhere, and the scores are what they are for."""
    code, out, shown = run_on_terminal(WITHOUT_RICH + EVALUATION)
    assert (code, out) == (0, "100.0\n")
    assert "pip install dspylite[progress]" in shown
    code, out, shown = run_on_terminal(EVALUATION)
    assert (code, out) == (0, "100.0\n")
    assert "4/4" in shown
