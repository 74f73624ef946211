"""The command line: `dspylite demo` and `dspylite cache`.

Not here: what a command does (`demo.py`, `models/cache/maintenance.py`).
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
    cache = commands.add_parser(
        "cache",
        help="look at the answers kept on disk, check them, or remove them",
        description="Look at the answers kept on disk, check them, or remove them.",
    )
    actions = cache.add_subparsers(dest="action", required=True)
    for action, what in {
        "info": "say how many answers there are, how old, and what was set aside",
        "clear": "remove all answers, and what was set aside",
        "verify": "check the whole file and each answer; exit code 1 if something is bad",
    }.items():
        made = actions.add_parser(action, help=what, description=f"{what.capitalize()}.")
        made.add_argument(
            "--dir",
            type=Path,
            help="the cache's directory; by default DSPYLITE_CACHE_DIR, else the user's",
        )
        if action == "verify":
            made.add_argument(
                "--drop", action="store_true", help="remove what is bad; set a damaged file aside"
            )
    options = parser.parse_args(argv)
    try:
        if options.command == "cache":
            # Loads sqlite3, which no other command needs.
            from dspylite.models.cache.maintenance import run_cache  # noqa: PLC0415

            code = run_cache(
                options.action, directory=options.dir, drop=getattr(options, "drop", False)
            )
        else:
            code = run_demo(
                folder=options.docs, questions=options.question, threads=options.threads
            )
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
