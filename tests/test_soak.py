"""A long run through every way to run many: nothing grows with the number of calls.

A short form runs with the suite. `DSPYLITE_SOAK=1 pytest -s -m soak` makes 100,000 calls and prints
its figures. The server is the benchmarks' own, in a process of its own, so that what is measured
here is dspylite's.

Not here: how fast calls are (`python -m tests.benchmarks`).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

import dspylite as dspy
from dspylite.runtime.cancellation import Cancellation
from tests.benchmarks.server import running, server_command

IS_FULL = os.environ.get("DSPYLITE_SOAK") == "1"
ROUNDS, CALLS_PER_WAY = (10, 1_667) if IS_FULL else (4, 150)
WARM_UP = 2
"""Rounds until what is kept on purpose (histories, connections, caches) has its size."""
BREAKS_PER_WAY = 40 if IS_FULL else 2
WIDTH = 16
SLOW_MS, SOON_S = 40.0, 0.01
"""How long answers take where they are not waited for, and when they are left. On a busy machine
some are there in time, which no test here minds."""

Ask = Callable[[list[dict[str, str]]], list[str]]
predict = dspy.Predict("question -> answer")


def questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"Question {number}?"} for number in range(count)]


# --- The ways ------------------------------------------------------------------------------------


def by_batch(inputs: list[dict[str, str]]) -> list[str]:
    return [p.answer for p in predict.batch(inputs, num_threads=WIDTH)]


def by_abatch(inputs: list[dict[str, str]]) -> list[str]:
    return [p.answer for p in anyio.run(predict.abatch, inputs, WIDTH)]


def by_batch_iter(inputs: list[dict[str, str]]) -> list[str]:
    found = predict.batch_iter(inputs, num_threads=WIDTH, timeout_s=30)
    return [outcome.value.answer for _, outcome in found]


def by_abatch_iter(inputs: list[dict[str, str]]) -> list[str]:
    async def main() -> list[str]:
        found = predict.abatch_iter(inputs, num_threads=WIDTH)
        return [outcome.value.answer async for _, outcome in found]

    return anyio.run(main)


def by_asyncify(inputs: list[dict[str, str]]) -> list[str]:
    ask, found = dspy.asyncify(predict), []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for each in inputs:
                group.start_soon(note, each)

    async def note(each: dict[str, str]) -> None:
        found.append((await ask(**each)).answer)

    anyio.run(main)
    return found


def by_bind_in_a_plain_pool(inputs: list[dict[str, str]]) -> list[str]:
    with ThreadPoolExecutor(WIDTH) as pool:
        return list(pool.map(dspy.bind(lambda each: predict(**each).answer), inputs))


WAYS: list[Ask] = [value for name, value in list(globals().items()) if name.startswith("by_")]


# --- The ways to be broken off -------------------------------------------------------------------


async def nap() -> None:
    """Async work without a model: sessions of ended threads wait for the next one to be made."""
    with anyio.move_on_after(SOON_S):
        await anyio.sleep(60)


def end_syncify(inputs: list[dict[str, str]]) -> None:
    dspy.Parallel(num_threads=WIDTH)([(dspy.syncify(nap), ()) for _ in inputs])


def end_calls_inside_a_loop(inputs: list[dict[str, str]]) -> None:
    async def main() -> None:
        for _ in inputs[:4]:
            dspy.syncify(nap)()

    anyio.run(main)


def end_asyncify(inputs: list[dict[str, str]]) -> None:
    ask = dspy.asyncify(predict)

    async def main() -> None:
        with anyio.move_on_after(SOON_S):
            async with anyio.create_task_group() as group:
                for each in inputs:
                    group.start_soon(lambda each=each: ask(**each))

    anyio.run(main)


def end_abatch(inputs: list[dict[str, str]]) -> None:
    async def main() -> None:
        with anyio.move_on_after(SOON_S):
            await predict.abatch(inputs, WIDTH)

    anyio.run(main)


def end_batch_by_the_time_of_its_items(inputs: list[dict[str, str]]) -> None:
    predict.batch(inputs, WIDTH, on_error="return", timeout_s=SOON_S)


def end_batch_by_its_whole_time(inputs: list[dict[str, str]]) -> None:
    predict.batch(inputs, WIDTH, on_error="return", total_timeout_s=SOON_S)


def end_batch_by_a_deadline(inputs: list[dict[str, str]]) -> None:
    with dspy.context(deadline_s=SOON_S):
        predict.batch(inputs, WIDTH, on_error="return")


def end_hedged_batch(inputs: list[dict[str, str]]) -> None:
    predict.batch(inputs, WIDTH, hedge_after_s=SOON_S)


def end_batch_iter(inputs: list[dict[str, str]]) -> None:
    with closing(predict.batch_iter(inputs * 2, num_threads=WIDTH)) as outcomes:
        next(outcomes)


def end_abatch_iter(inputs: list[dict[str, str]]) -> None:
    async def main() -> None:
        async with aclosing(predict.abatch_iter(inputs * 2, num_threads=WIDTH)) as outcomes:
            await anext(outcomes)

    anyio.run(main)


ENDS: list[Callable[[list[dict[str, str]]], None]] = [
    value for name, value in list(globals().items()) if name.startswith("end_")
]


# --- The figures ---------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What the process holds after a round."""

    threads: int
    loops: int
    descriptors: int
    blocks: int
    objects: int
    resident_kb: int


def figures() -> Figures:
    gc.collect()
    objects = gc.get_objects()
    return Figures(
        threads=threading.active_count(),
        loops=sum(issubclass(type(each), asyncio.BaseEventLoop) for each in objects),
        descriptors=len(os.listdir("/proc/self/fd")),
        blocks=sys.getallocatedblocks(),
        objects=len(objects),
        resident_kb=int(Path("/proc/self/statm").read_text().split()[1]) * 4,
    )


def settled(threads: int) -> Figures:
    """Measure when the threads of the round have ended; they are told, and go in their time."""
    ends_at = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < ends_at:
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(0.01)
    return figures()


def containers() -> dict[str, int]:
    """Measure all that modules and classes of the package hold, by name."""
    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "dspylite":
            for attribute, value in list(vars(module).items()):
                if not attribute.startswith("__"):
                    found |= sizes(f"{name}.{attribute}", value)
    return found


def sizes(name: str, value: Any) -> dict[str, int]:
    """Measure one value, a cached function's cache, and what one of our objects or classes has."""
    if hasattr(value, "cache_info"):
        return {name: value.cache_info().currsize}
    is_ours = str(getattr(type(value), "__module__", "")).startswith("dspylite")
    is_our_class = isinstance(value, type) and value.__module__.startswith("dspylite")
    if is_ours or is_our_class:
        inside: Mapping[str, Any] = getattr(value, "__dict__", {})
        return {
            f"{name}.{attribute}": len(part)
            for attribute, part in list(inside.items())
            if isinstance(part, Sized) and not isinstance(part, type | str)
        }
    if isinstance(value, Sized) and not isinstance(value, type | str):
        return {name: len(value)}
    return {}


# --- The run -------------------------------------------------------------------------------------


def check_flat(
    port: int, a_round: Callable[[], None], calls_a_round: int, at_once: int = WIDTH
) -> None:
    """Run so many rounds, and check that what the process holds is the same after each.

    Args:
        port: Of the server.
        a_round: Makes the calls.
        calls_a_round: How many.
        at_once: Most requests under way at once.
    """
    lm = dspy.LM("openai/m", api_base=f"http://127.0.0.1:{port}/v1", api_key="k", engine="direct")
    at_first = figures()
    seen: list[Figures] = []
    held: dict[str, int] = {}
    settings = dspy.context(lm=lm, max_history_size=50, async_max_workers=WIDTH)
    with Cancellation() as flag, settings:
        for number in range(ROUNDS):
            started = time.monotonic()
            a_round()
            seconds = time.monotonic() - started
            if number < WARM_UP:
                held = containers()
            seen.append(settled(at_first.threads))
            print(f"round {number + 1}: {calls_a_round} calls in {seconds:.1f} s, {seen[-1]}")
            assert flag._watchers == {}
    assert held
    assert {name: n for name, n in containers().items() if n > held.get(name, 0)} == {}
    warm, last = seen[WARM_UP - 1], seen[-1]
    calls = (ROUNDS - WARM_UP) * calls_a_round
    assert last.threads <= at_first.threads
    assert last.loops <= warm.loops
    # A connection for each request that was under way at once stays open: one for each worker, and
    # one for each hedge beside it. Which round first needs all of them is chance.
    assert last.descriptors <= at_first.descriptors + at_once + 3
    # What connections and threads hold settles in some rounds; a leak is one object a call or more.
    assert last.blocks - warm.blocks < 300 + calls / 50
    assert last.objects - warm.objects < 100 + calls / 100
    assert last.resident_kb - warm.resident_kb < 4_096 + calls / 50


pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600 if IS_FULL else 120),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc"),
]


def test_nothing_grows_with_the_number_of_calls(tmp_path: Path) -> None:
    """A service runs for months; what leaks an object a call ends it in days (B 7.7)."""
    inputs = questions(CALLS_PER_WAY)

    def a_round() -> None:
        for way in WAYS:
            assert way(inputs) == ["Paris"] * len(inputs), way.__name__

    with running(server_command(tmp_path), 0.0) as port:
        check_flat(port, a_round, len(WAYS) * len(inputs))


def test_nothing_grows_with_the_number_of_calls_that_are_broken_off(tmp_path: Path) -> None:
    """Clients that go away and items whose time is up are a service's daily bread (B 7.7)."""
    inputs = questions(WIDTH)

    def a_round() -> None:
        for _ in range(BREAKS_PER_WAY):
            for leave in ENDS:
                leave(inputs)

    with running(server_command(tmp_path), SLOW_MS) as port:
        check_flat(port, a_round, BREAKS_PER_WAY * len(ENDS) * len(inputs), at_once=2 * WIDTH)


class Nothing(dspy.Module):
    """A program that costs no time."""

    def forward(self, number: int) -> int:
        return number

    async def aforward(self, number: int) -> int:
        return number


def test_a_run_without_end_keeps_nothing_of_its_items() -> None:
    """Time limits and hedges watch each item; what they need must go with it (B 2.1, 7.7)."""
    limits = {"timeout_s": 30.0, "hedge_after_s": 20.0}
    counts: list[int] = []

    def note(index: int) -> None:
        if index in {500, 1_500}:
            gc.collect()
            counts.append(len(gc.get_objects()))

    async def main() -> None:
        inputs = ({"number": number} for number in itertools.count())
        async with aclosing(Nothing().abatch_iter(inputs, num_threads=2, **limits)) as outcomes:
            async for index, _ in outcomes:
                note(index)
                if index > 1_600:
                    break

    inputs = ({"number": number} for number in itertools.count())
    with closing(Nothing().batch_iter(inputs, num_threads=2, **limits)) as outcomes:
        for index, _ in outcomes:
            note(index)
            if index > 1_600:
                break
    anyio.run(main)
    early, late, early_async, late_async = counts
    assert late - early < 200
    assert late_async - early_async < 200


def test_the_measure_sees_what_grows() -> None:
    """A measure that misses a registry would let every run pass."""
    before = containers()
    key = ("test_soak", object())
    from dspylite.models.endpoints import _SHARED, forget_endpoints

    _SHARED.get(key, lambda: {1})
    grown = {name for name, size in containers().items() if size > before.get(name, 0)}
    forget_endpoints()
    assert "dspylite.models.endpoints._SHARED._latest" in grown
