"""What a child process measures of calls that are remembered: hits of the cache, and what is kept.

Not here: calls that are made each time (`calls.py`).
"""

from __future__ import annotations

import gc
import tempfile
import time
from typing import Any

from tests.benchmarks.peers import KEY, MODEL, QUESTION, base, check
from tests.benchmarks.starting import resident_mb

Result = dict[str, float]


def _predictor(peer: str, port: str, directory: str) -> tuple[Any, Any]:
    """Configure a library for the local server, with its cache on, in a directory of its own."""
    dspy: Any = __import__(peer)
    dspy.configure_cache(disk_cache_dir=directory)
    lm = dspy.LM(f"openai/{MODEL}", api_base=base(int(port)), api_key=KEY, num_retries=0)
    dspy.configure(lm=lm)
    return dspy, dspy.Predict("question -> answer")


def hits(peer: str, port: str, seconds: str, level: str) -> Result:
    """Ask for some seconds what was asked before; CPU and wall time of one answer.

    Args:
        peer: The library.
        port: The server's.
        seconds: How long.
        level: `"memory"`, or `"disk"`, for which memory is emptied before each call.
    """
    with tempfile.TemporaryDirectory() as directory:
        dspy, predict = _predictor(peer, port, directory)
        check(predict(question=QUESTION).answer)
        if hasattr(dspy.cache, "flush"):
            dspy.cache.flush()
        is_disk = level == "disk"
        count, cpu, start = 0, 0.0, time.perf_counter()
        while (wall := time.perf_counter() - start) < float(seconds):
            if count == 200:  # warm
                cpu, began = time.process_time(), wall
            if is_disk:
                dspy.cache.reset_memory_cache()
            check(predict(question=QUESTION).answer)
            count += 1
        count -= 200
        return {"cpu_s": (time.process_time() - cpu) / count, "wall_s": (wall - began) / count}


def growth(peer: str, port: str, first: str, last: str, kilobytes: str) -> Result:
    """Make many calls with long prompts and default settings; what the process grows by each."""
    with tempfile.TemporaryDirectory() as directory:
        _, predict = _predictor(peer, port, directory)
        text = "x" * (int(kilobytes) * 1000)
        before = 0.0
        for number in range(int(last)):
            if number == int(first):
                gc.collect()
                before = resident_mb()
            check(predict(question=f"{text} {number}").answer)
        gc.collect()
        return {"mb_per_call": (resident_mb() - before) / (int(last) - int(first))}
