"""What a child process measures of the parts of a call that need no server.

Not here: calls over the server (`calls.py`).
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import timeit
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Result = dict[str, float]
Prepare = Callable[[int], Callable[[], object]]
"""Makes so many items, and what runs over them."""

# Both libraries run the same lines.
_SETUP = """
import {module} as dspy
lm = dspy.LM("openai/m", api_key="sk-bench", cache=False, num_retries=0)
dspy.configure(lm=lm)
settings, context = dspy.settings, dspy.context
adapter, signature = dspy.ChatAdapter(), dspy.Predict("question -> answer").signature
inputs = {{"question": "What is the capital of France?"}}
completion = "[[ ## answer ## ]]\\nParis\\n\\n[[ ## completed ## ]]"
"""
_STATEMENTS = {
    "read": "settings.lm",
    "context": "with context(lm=lm): pass",
    "format": "adapter.format(signature, [], inputs)",
    "parse": "adapter.parse(signature, completion)",
    "build": "dspy.Predict('question -> answer')",
}


def statement(peer: str, name: str) -> Result:
    """Time one line of Python: the CPU time of its fastest of five repetitions.

    Source:
        Why the fastest: https://docs.python.org/3/library/timeit.html#timeit.Timer.repeat
    """
    timer = timeit.Timer(_STATEMENTS[name], _SETUP.format(module=peer), time.process_time)
    timer.timeit(100)
    number, _ = timer.autorange()
    number = max(1, number // 4)  # 0.05 s or more each
    return {"cpu_s": min(timer.repeat(5, number)) / number}


def batch(peer: str, count: str, small: str, threads: str) -> Result:
    """Run a module that does nothing over many items, and over few to see how the cost grows.

    Returns:
        The CPU time of the many; `growth`, how often it holds the CPU time of the few.
    """
    prepare = _pool_map(int(threads)) if peer == "pool.map" else _batch(peer, int(threads))
    prepare(100)()
    # The mean of several, because how often eight threads wake each other differs each time.
    few = statistics.fmean(_cpu_of(prepare(int(small))) for _ in range(10))
    many = _cpu_of(prepare(int(count)))
    return {"cpu_s": many, "per_item_s": many / int(count), "growth": many / few}


def _cpu_of(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def _pool_map(threads: int) -> Prepare:
    def nothing(item: str) -> None:
        return None

    def prepare(count: int) -> Callable[[], object]:
        items = [str(number) for number in range(count)]

        def run() -> None:
            with ThreadPoolExecutor(threads) as pool:
                assert len(list(pool.map(nothing, items))) == count

        return run

    return prepare


def _batch(peer: str, threads: int) -> Prepare:
    dspy: Any = __import__(peer)

    class Nothing(dspy.Module):  # type: ignore[misc]  # either library's
        def forward(self, question: str) -> str:
            return question

    program = Nothing()

    def prepare(count: int) -> Callable[[], object]:
        items = [
            dspy.Example(question=str(number)).with_inputs("question") for number in range(count)
        ]

        def run() -> None:
            done = program.batch(items, num_threads=threads, disable_progress_bar=True)
            assert len(done) == count

        return run

    return prepare


def in_a_thread(peer: str, seconds: str) -> Result:
    """Await a function that does nothing in a worker thread, again and again."""
    return asyncio.run(_in_a_thread(peer, float(seconds)))


async def _in_a_thread(peer: str, seconds: float) -> Result:
    call = _offload(peer)
    for _ in range(100):
        await call()
    count, cpu, start = 0, time.process_time(), time.perf_counter()
    while (wall := time.perf_counter() - start) < seconds:
        await call()
        count += 1
    return {"cpu_s": (time.process_time() - cpu) / count, "wall_s": wall / count}


def _offload(peer: str) -> Callable[[], Awaitable[Any]]:
    def nothing() -> None:
        return None

    if peer == "anyio":
        import anyio.to_thread

        return lambda: anyio.to_thread.run_sync(nothing)
    dspy: Any = __import__(peer)
    asyncify: Callable[[Callable[[], None]], Callable[[], Awaitable[Any]]] = dspy.asyncify
    return asyncify(nothing)
