"""What a child process measures of its own start: importing a library, the first answer.

Not here: calls in a warm process (`calls.py`). Nothing is imported at the top but what the
interpreter has loaded anyway, because it would no longer count for the library.
"""

from __future__ import annotations

import os
import time

_MODULES = {"base": ("pydantic", "anyio", "diskcache")}


def importing(peer: str) -> dict[str, float]:
    """Import a library; CPU time of that, and resident memory of the whole process afterwards."""
    cpu, wall = time.process_time(), time.perf_counter()
    for module in _MODULES.get(peer, (peer,)):
        __import__(module)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu, "wall_s": wall, "memory_mb": resident_mb()}


def first_answer(peer: str, port: str) -> dict[str, float]:
    """Ask the server once; CPU time of the whole process from its start."""
    from tests.benchmarks.peers import SYNC, check

    check(SYNC[peer](int(port), 1)())
    return {"cpu_s": time.process_time(), "memory_mb": resident_mb()}


def resident_mb() -> float:
    """Return the memory that this process holds."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        import resource

        # The highest it ever was, in bytes on macOS: the nearest that can be had there.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
