"""Running one row: a fresh process per measurement, peers in turn, medians.

Not here: what a process measures (`starting.py`, `calls.py`, `parts.py`), and what is printed
(`table.py`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.rows import Row
from tests.benchmarks.server import EMBEDDING_SERVER, ROOT, running

_LONGEST_S = 120.0
"""After which a child is given up; the slowest today takes about 20 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long and how often is measured."""

    seconds: float
    gathered: int
    rounds: int
    heavy_rounds: int
    """Rounds of the rows that are marked as heavy."""


@dataclass(slots=True)
class Measured:
    """What one peer did in one row: each figure once per round, or why there is none."""

    rounds: list[Mapping[str, float]] = field(default_factory=list)
    error: str | None = None

    def median(self, key: str) -> float | None:
        """Return the median of a figure over the rounds; None where there is none."""
        values = self.values(key)
        return statistics.median(values) if values else None

    def spread(self, key: str) -> float | None:
        """Return how far apart the rounds lie: (highest - lowest) / median; None for one round."""
        values, middle = self.values(key), self.median(key)
        return (max(values) - min(values)) / middle if middle and len(values) > 1 else None

    def values(self, key: str) -> list[float]:
        """List a figure of every round."""
        return [] if self.error else [one[key] for one in self.rounds if key in one]


def measure(
    row: Row,
    peers: tuple[str, ...],
    pace: Pace,
    *,
    server: list[str],
    folder: Path,
    tell: Callable[[str], None],
) -> dict[str, Measured]:
    """Measure a row for some of its peers.

    Every round asks every peer, beginning with another one each time, so that a slow minute of the
    machine falls on all of them. A peer that fails is not asked again.
    """
    found = {peer: Measured() for peer in peers}
    rounds = pace.heavy_rounds if row.heavy else pace.rounds
    for turn in range(-1 if row.warm_up else 0, rounds):
        first = turn % len(peers)
        for peer in peers[first:] + peers[:first]:
            if found[peer].error is None:
                tell(f"{row.name}: {peer}, round {max(turn, 0) + 1} of {rounds}")
                result = _once(row, peer, pace, server, folder)
                if isinstance(result, str):
                    found[peer].error = result
                elif turn >= 0:
                    found[peer].rounds.append(result)
    return found


def _once(
    row: Row, peer: str, pace: Pace, server: list[str], folder: Path
) -> Mapping[str, float] | str:
    """Measure one peer once, with a server of its own where the row needs one.

    A new server has a new port, so thousands of connections that the peer before has just closed
    cannot leave this one without addresses.
    """
    filled = [word.format(seconds=pace.seconds, gathered=pace.gathered) for word in row.arguments]
    if row.latency_ms is None:
        return _child([row.function, peer, *filled], folder)
    command = EMBEDDING_SERVER if row.serves == "embeddings" else server
    with running(command, row.latency_ms) as port:
        return _child([row.function, peer, str(port), *filled], folder)


def _child(words: list[str], folder: Path) -> Mapping[str, float] | str:
    """Run one measurement in a process of its own; return its figures, or what went wrong."""
    start = time.perf_counter()
    # `-c` rather than `-m`, which would load modules that then no longer count for the libraries.
    code = "from tests.benchmarks.child import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            cwd=ROOT,
            env=_environment(folder),
            timeout=_LONGEST_S,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_LONGEST_S:.0f} s"
    elapsed = time.perf_counter() - start
    try:
        result: dict[str, float | str] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"exit code {done.returncode}: {last}"
    if "error" in result:
        return str(result["error"])
    return {"process_s": elapsed} | {key: float(value) for key, value in result.items()}


def _environment(folder: Path) -> dict[str, str]:
    """Return the caller's environment without what would lead libraries elsewhere."""
    theirs = ("OPENAI_", "LITELLM_", "DSPY_", "DSPYLITE_", "PYTHON")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(theirs) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else importing litellm asks the network
        "DSPY_CACHEDIR": str(folder / "dspy"),
        "TMPDIR": str(folder),
    }
