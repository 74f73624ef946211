"""What a child process measures of calls over the local server: one by one, many at once.

Not here: how a library makes its call (`peers.py`), and what needs no server (`parts.py`).
"""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import Callable

from tests.benchmarks.limits import allow_many_files
from tests.benchmarks.peers import ASYNC, SYNC, check

Result = dict[str, float]
_WARM_UP_CALLS = 100
"""litellm needs about so many until a call costs what all further ones do."""


def one_by_one(peer: str, port: str, seconds: str) -> Result:
    """Call for some seconds on one thread; CPU and wall time of one call."""
    call = SYNC[peer](int(port), 1)
    for _ in range(_WARM_UP_CALLS):
        check(call())
    count, cpu, start = 0, time.process_time(), time.perf_counter()
    while (wall := time.perf_counter() - start) < float(seconds):
        check(call())
        count += 1
    return {"cpu_s": (time.process_time() - cpu) / count, "wall_s": wall / count}


def one_by_one_async(peer: str, port: str, seconds: str) -> Result:
    """Await call after call for some seconds in one task; CPU and wall time of one call."""
    return asyncio.run(_one_by_one_async(peer, int(port), float(seconds)))


async def _one_by_one_async(peer: str, port: int, seconds: float) -> Result:
    call = await ASYNC[peer](port)
    for _ in range(_WARM_UP_CALLS):
        check(await call())
    count, cpu, start = 0, time.process_time(), time.perf_counter()
    while (wall := time.perf_counter() - start) < seconds:
        check(await call())
        count += 1
    return {"cpu_s": (time.process_time() - cpu) / count, "wall_s": wall / count}


def on_threads(peer: str, port: str, seconds: str, width: str, latency_ms: str) -> Result:
    """Call from many threads at once; right answers per second while all of them are busy.

    Every thread calls without a pause. What is finished between two looks at the counters counts,
    so neither the opening of the connections nor the last stragglers weigh. Calls that fail are
    counted apart, and are an error only if nothing else came.
    """
    allow_many_files()
    threads, stop, errors = int(width), threading.Event(), list[Exception]()
    done, failed = [0] * threads, [0] * threads  # a slot each, so that no lock is needed
    call = SYNC[peer](int(port), threads)
    check(call())

    def work(slot: int) -> None:
        while not stop.is_set():
            try:
                check(call())
                done[slot] += 1
            except Exception as error:  # noqa: BLE001  # counted, and the last one raised below
                failed[slot] += 1
                errors[:] = [error]

    for slot in range(threads):
        threading.Thread(target=work, args=(slot,), daemon=True).start()
    _wait_until(lambda: all(map(operator.or_, done, failed)), float(seconds) * 4)
    good, bad, cpu, start = sum(done), sum(failed), time.process_time(), time.perf_counter()
    time.sleep(float(seconds))
    good, bad = sum(done) - good, sum(failed) - bad
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    stop.set()
    if not good:
        raise errors[0] if errors else TimeoutError(f"no answer within {seconds} s")
    per_s = good / wall
    return {
        "per_s": per_s,
        "ideal": 100 * per_s * float(latency_ms) / 1000 / threads,
        "cpu_s": cpu / (good + bad),
        "failed": 100 * bad / (good + bad),
    }


def _wait_until(condition: Callable[[], bool], longest_s: float) -> None:
    """Wait for a condition, or for the time after which it is measured without."""
    end = time.perf_counter() + longest_s
    while not condition() and time.perf_counter() < end:
        time.sleep(0.05)


def gathered(peer: str, port: str, count: str) -> Result:
    """Gather many calls at once on one loop; calls per second from the first to the last."""
    allow_many_files()
    return asyncio.run(_gathered(peer, int(port), int(count)))


async def _gathered(peer: str, port: int, count: int) -> Result:
    call = await ASYNC[peer](port)
    check(await call())
    cpu, start = time.process_time(), time.perf_counter()
    answers = await asyncio.gather(*(call() for _ in range(count)), return_exceptions=True)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(errors) == count:
        raise errors[0]
    for answer in answers:
        if not isinstance(answer, BaseException):
            check(answer)
    return {
        "per_s": (count - len(errors)) / wall,
        "cpu_s": cpu / count,
        "failed": 100 * len(errors) / count,
    }
