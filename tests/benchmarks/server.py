"""Starting and stopping the local server, and measuring how fast it is by itself.

Not here: what it answers (`server.c`, and `slow_server.py` where there is no C compiler; for
embeddings `embedding_server.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SOURCE = Path(__file__).with_name("server.c")
ROOT = _SOURCE.parent.parent.parent
EMBEDDING_SERVER = [sys.executable, "-m", "tests.benchmarks.embedding_server"]


def server_command(folder: Path) -> list[str]:
    """Return what starts the server, compiling it first where it has not been yet.

    Args:
        folder: Where the program goes if Python runs outside a virtual environment.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler:
        text = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
        # The environment's own folder, so that `make clean` takes the program away too.
        home = Path(sys.prefix) if sys.prefix != sys.base_prefix else folder
        program = home / f"dspylite-bench-server-{text}"
        if program.exists():
            return [str(program)]
        unready = program.with_suffix(f".{os.getpid()}")
        made = subprocess.run(
            [compiler, "-O2", "-o", str(unready), str(_SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode == 0:
            unready.replace(program)
            return [str(program)]
    return [sys.executable, "-m", "tests.benchmarks.slow_server"]


def is_slow(command: list[str]) -> bool:
    """Tell whether this is the server in Python."""
    return len(command) > 1


@contextmanager
def running(command: list[str], latency_ms: float) -> Iterator[int]:
    """Start a server that waits `latency_ms` before each answer; yield its port."""
    with subprocess.Popen(
        [*command, str(latency_ms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port:
                raise RuntimeError(f"The server {command} ended before it had a port.")
            yield int(port)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def ceiling(command: list[str], port: int, *, connections: int = 64, seconds: float = 1.0) -> int:
    """Measure how many requests per second a server answers to a load in its own language."""
    load = subprocess.run(
        [*command, "--load", str(port), str(connections), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    return int(load.stdout)
