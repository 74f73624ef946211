"""The README's road for newcomers: two commands, which exist and which CI runs too."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _shell_lines(page: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def _commands(script: str) -> list[str]:
    return [line.strip() for line in script.splitlines() if line.startswith("make ")]


def test_readme_has_exactly_two_setup_commands() -> None:
    """A newcomer needs one command to see it work and one to test it; `sh` blocks are these."""
    assert _shell_lines(_read("README.md")) == ["make demo", "make test"]


def test_each_setup_command_is_a_makefile_target() -> None:
    """A command that is documented but not there is the worst first impression."""
    targets = set(re.findall(r"^([a-z]+):", _read("Makefile"), flags=re.MULTILINE))
    named = {line.removeprefix("make ") for line in _shell_lines(_read("README.md"))}
    assert named - targets == set()


def test_ci_runs_the_checks_and_ends_with_the_suite() -> None:
    """CI and the README use the same command, and the suite's summary closes the log."""
    assert _commands(_read(".ci/run")) == ["make check", "make test"]
    assert _read(".ci/run").splitlines()[-1] == "make test"


def test_ci_script_is_executable() -> None:
    """CI starts it by its name."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
