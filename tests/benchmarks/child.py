"""One measurement in a process of its own: run the function named on the command line, as JSON.

Not here: the functions (`starting.py`, `calls.py`, `parts.py`), and who starts the processes
(`measuring.py`). It imports next to nothing, because the start of the process is measured too.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run `MODULE:FUNCTION ARGUMENT...`; write its result, or its error, to the first stdout."""
    # What libraries print must not get between the lines of the result.
    out = os.dup(1)
    os.dup2(2, 1)
    module, _, function = sys.argv[1].partition(":")
    result: dict[str, object]
    try:
        __import__(f"tests.benchmarks.{module}")
        measure = getattr(sys.modules[f"tests.benchmarks.{module}"], function)
        result = measure(*sys.argv[2:])
    except Exception as error:  # noqa: BLE001  # the table shows it
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[0]}"}
    import json

    os.write(out, json.dumps(result).encode())
    # No farewells: threads of libraries may still run, and closing 5,000 connections takes time.
    os._exit(0)
