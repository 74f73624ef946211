"""The command line: `dspylite demo`.

Not here: what a command does (`demo.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dspylite.demo import run_demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="dspylite", description="Run programs made of language-model calls."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="answer questions over documents in four ways: threads, a plain pool, asyncify, acall",
        description=(
            "Answer questions over documents in four ways. Works offline; set DSPYLITE_MODEL (and "
            "DSPYLITE_API_BASE, and the provider's key) to ask a real model."
        ),
    )
    demo.add_argument(
        "--docs",
        type=Path,
        help="a folder of .md or .txt files to read; the project's own documentation by default",
    )
    demo.add_argument("--threads", type=int, default=8, help="threads of the batch (8)")
    demo.add_argument(
        "question", nargs="*", help="questions to ask; a set about the documentation by default"
    )
    options = parser.parse_args(argv)
    try:
        code = run_demo(folder=options.docs, questions=options.question, threads=options.threads)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
