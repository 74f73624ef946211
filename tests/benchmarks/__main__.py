"""`python -m tests.benchmarks`: measure dspylite and its peers side by side and print a table.

Not here: the rows (`rows.py`), and everything that measures them.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from tests.benchmarks.limits import allow_many_files
from tests.benchmarks.measuring import Pace, measure
from tests.benchmarks.rows import ROWS, TITLES, Row
from tests.benchmarks.server import ceiling, is_slow, running, server_command
from tests.benchmarks.table import render

_FULL = Pace(seconds=1.0, gathered=5000, rounds=5, heavy_rounds=3)
_QUICK = Pace(seconds=0.5, gathered=2000, rounds=3, heavy_rounds=1)
_PACKAGES = "dspylite dspy litellm openai httpx urllib3 aiohttp anyio pydantic".split()


def main() -> None:
    """Read the command line, measure, print."""
    chosen = _arguments()
    if chosen.list:
        for row in ROWS:
            print(f"{row.name:13} {_title(row, _FULL)}: {', '.join(row.peers)}")
        return
    pace = _QUICK if chosen.quick else _FULL
    if chosen.rounds:
        pace = replace(pace, rounds=chosen.rounds, heavy_rounds=chosen.rounds)
    rows = [row for row in ROWS if not chosen.only or row.name in chosen.only]
    allow_many_files()
    print(_header(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = server_command(folder)
        with running(command, 0) as port:
            kind = "Python, no C compiler was found" if is_slow(command) else "C"
            most = ceiling(command, port)
        print(f"Server ({kind}): {most:,} requests/s by itself.\n", flush=True)
        for row in rows:
            _run(row, pace, command, folder, chosen.peers)
    _tell("")


def _run(row: Row, pace: Pace, command: list[str], folder: Path, wanted: list[str] | None) -> None:
    peers = tuple(peer for peer in row.peers if not wanted or peer in wanted)
    if not peers:
        return
    found = measure(row, peers, pace, server=command, folder=folder, tell=_tell)
    _tell("")
    print(render(row, f"{_title(row, pace)} (`{row.name}`)", found), flush=True)


def _arguments() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter loops and fewer rounds")
    parser.add_argument("--rounds", type=int, metavar="N", help="ask each peer so often")
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help="these rows")
    parser.add_argument("--peers", nargs="+", choices=TITLES, metavar="PEER", help="these peers")
    parser.add_argument("--list", action="store_true", help="list rows and peers, measure nothing")
    return parser.parse_args()


def _title(row: Row, pace: Pace) -> str:
    return row.title.format(gathered=f"{pace.gathered:,}")


def _header() -> str:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{python}: {', '.join(versions)}."


def _tell(text: str) -> None:
    """Show on a terminal what is going on, on one line that is written over."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}", end="" if text else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
