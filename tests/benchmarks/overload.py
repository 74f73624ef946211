"""`python -m tests.benchmarks.overload`: what becomes of a batch when its endpoint is overloaded.

Each scenario is a real server in a process of its own, whose log is the judge, and real threads
that call one `LM`. The first five are those of the promised table. Not here: the speed of a call
(`python -m tests.benchmarks`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import anyio

import dspylite
from dspylite.testing import FakeServer, Reply

Decide = Callable[[float], Reply]
"""What a server answers so many seconds after its first request."""

_SHARE, _WINDOW_S = 0.8, 0.25  # "full rate" is so much of the ideal, over so long


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A server's way to fail, and who calls it.

    Attributes:
        title: What the server does.
        server: Makes its rule; called in the server's process.
        items: Calls to make, each of which must succeed.
        threads: Callers on threads.
        tasks: Callers on each of two event loops besides.
        ideal_s: Seconds that a caller who knew the server would take.
        most_requests: Promised bound of requests for an item; None where none is promised.
        most_time: Promised bound of time over ideal time.
        outage_s: When an outage begins and ends, in seconds after the first request.
        refuses: Whether connections are refused during the outage.
        latency_s: Of a good answer, to know the full rate after an outage.
    """

    title: str
    server: Callable[[], Decide]
    items: int
    threads: int
    tasks: int = 0
    ideal_s: float
    most_requests: float | None = None
    most_time: float | None = None
    outage_s: tuple[float, float] | None = None
    refuses: bool = False
    latency_s: float = 0.05


def healthy(latency_s: float) -> Decide:
    """Answer everything."""
    return lambda now: Reply(delay_s=latency_s)


def by_chance(status: int, share: float, latency_s: float) -> Decide:
    """Refuse exactly this share of each 100 requests, in random order."""
    draw, deck = random.Random(7), list[bool]()

    def decide(now: float) -> Reply:
        if not deck:
            deck.extend(number < share * 100 for number in range(100))
            draw.shuffle(deck)
        return Reply(status=status) if deck.pop() else Reply(delay_s=latency_s)

    return decide


def outage(begin_s: float, end_s: float, latency_s: float) -> Decide:
    """Answer 503 for a while."""
    return lambda now: Reply(status=503) if begin_s <= now < end_s else Reply(delay_s=latency_s)


def rate_limit(
    rate: Callable[[float], float], burst: float, retry_after: str = "", latency_s: float = 0.005
) -> Decide:
    """Answer 429 beyond a token bucket."""
    state = {"tokens": burst, "at": 0.0}
    headers = {"retry-after": retry_after} if retry_after else {}

    def decide(now: float) -> Reply:
        gained = (now - state["at"]) * rate(now)
        state.update(tokens=min(burst, state["tokens"] + gained), at=now)
        if state["tokens"] < 1:
            return Reply(status=429, headers=headers)
        state["tokens"] -= 1
        return Reply(delay_s=latency_s)

    return decide


def slots(number: int, status: int, latency_s: float) -> Decide:
    """Refuse whatever comes while so many are being served."""
    busy_until: list[float] = []

    def decide(now: float) -> Reply:
        busy_until[:] = [until for until in busy_until if until > now]
        if len(busy_until) >= number:
            return Reply(status=status)
        busy_until.append(now + latency_s)
        return Reply(delay_s=latency_s)

    return decide


TABLE = {
    "random-503": Scenario(
        title="30 % random 503",
        server=lambda: by_chance(503, 0.3, 0.05),
        items=1000, threads=32, ideal_s=1000 * 0.05 / 32, most_requests=1.45,
    ),
    "outage": Scenario(
        title="503 for 30 s, then fine",
        server=lambda: outage(0, 30, 0.05),
        items=1500, threads=16, ideal_s=30 + 1500 * 0.05 / 16, most_requests=1.05,
        outage_s=(0, 30),
    ),
    "rate": Scenario(
        title="20 requests/s, bare 429",
        server=lambda: rate_limit(lambda now: 20, 20),
        items=300, threads=32, ideal_s=14, most_requests=1.10, most_time=1.2,
    ),
    "rate-retry-after": Scenario(
        title="20 requests/s, Retry-After: 1",
        server=lambda: rate_limit(lambda now: 20, 20, "1"),
        items=300, threads=32, ideal_s=14, most_requests=1.5,
    ),
    "slots": Scenario(
        title="4 slots of 200 ms, else 429",
        server=lambda: slots(4, 429, 0.2),
        items=200, threads=32, ideal_s=10, most_requests=1.10, most_time=1.7,
    ),
}  # fmt: skip
OTHERS = {
    "random-429": Scenario(
        title="10 % random bare 429",
        server=lambda: by_chance(429, 0.1, 0.05),
        items=3000, threads=32, ideal_s=3000 * 0.05 / 32,
    ),
    "slots-503": Scenario(
        title="2 slots of 50 ms, else 503",
        server=lambda: slots(2, 503, 0.05),
        items=300, threads=32, ideal_s=7.5,
    ),
    "refused": Scenario(
        title="connections refused for 10 s",
        server=lambda: healthy(0.05),
        items=1500, threads=16, ideal_s=10 + 1500 * 0.05 / 16, outage_s=(2, 12), refuses=True,
    ),
    "rate-100": Scenario(
        title="100 requests/s, Retry-After: 2",
        server=lambda: rate_limit(lambda now: 100, 100, "2"),
        items=1000, threads=32, ideal_s=9,
    ),
    "healthy-slow": Scenario(
        title="healthy, 1 s",
        server=lambda: healthy(1.0),
        items=640, threads=128, ideal_s=5,
    ),
    "healthy-wide": Scenario(
        title="healthy, 250 ms, 256 threads",
        server=lambda: healthy(0.25),
        items=5120, threads=256, ideal_s=5,
    ),
    "rising": Scenario(
        title="5 requests/s, 200 after 15 s",
        server=lambda: rate_limit(lambda now: 5 if now < 15 else 200, 5),
        items=1075, threads=32, ideal_s=20,
    ),
    "falling": Scenario(
        title="40 requests/s, 10 after 8 s",
        server=lambda: rate_limit(lambda now: 40 if now < 8 else 10, 10),
        items=400, threads=32, ideal_s=15,
    ),
    "mixed": Scenario(
        title="50 requests/s, 16 threads, 2 loops",
        server=lambda: rate_limit(lambda now: 50, 50),
        items=500, threads=16, tasks=16, ideal_s=9,
    ),
}  # fmt: skip
SCENARIOS = TABLE | OTHERS


def serve(name: str, pipe: Connection) -> None:
    """Run a scenario's server until the other end says so, then send its log."""
    scenario = SCENARIOS[name]
    decide = scenario.server()
    began: list[float] = []
    first = threading.Event()

    def answer(body: object) -> Reply:
        now = time.monotonic()
        if not began:
            began.append(now)
            first.set()
        return decide(now - began[0])

    with FakeServer(answer=answer) as server:
        pipe.send(server.base_url)
        if scenario.refuses and scenario.outage_s is not None:
            begin_s, end_s = scenario.outage_s
            first.wait()
            time.sleep(begin_s)
            server.close()
            time.sleep(end_s - begin_s)
            server.start()
        pipe.recv()
        pipe.send([(each.received_at, each.answered_at, each.status) for each in server.requests])


@contextmanager
def serving(name: str) -> Iterator[tuple[str, Connection]]:
    """Run a scenario's server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=serve, args=(name, its), daemon=True)
    process.start()
    try:
        yield mine.recv(), mine
    finally:
        process.join(5)
        process.kill()


def caller(base_url: str) -> dspylite.LM:
    """Make what is measured."""
    return dspylite.LM("openai/m", api_base=base_url, api_key="k", engine="direct", cache=False)


def run_callers(scenario: Scenario, lm: dspylite.LM) -> list[Exception]:
    """Make all calls, and return the failures."""
    numbers, lock = count(), threading.Lock()  # guards both
    failures: list[Exception] = []

    def take() -> str | None:
        with lock:
            number = next(numbers)
        return f"item {number}" if number < scenario.items else None

    def on_thread() -> None:
        while (prompt := take()) is not None:
            try:
                lm(prompt)
            except Exception as error:  # noqa: BLE001 -- counted and shown
                with lock:
                    failures.append(error)

    async def on_task() -> None:
        while (prompt := take()) is not None:
            try:
                await lm.acall(prompt)
            except Exception as error:  # noqa: BLE001 -- counted and shown
                with lock:
                    failures.append(error)

    async def on_loop() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(scenario.tasks):
                group.start_soon(on_task)

    threads = [threading.Thread(target=on_thread) for _ in range(scenario.threads)]
    threads += [threading.Thread(target=anyio.run, args=(on_loop,)) for _ in range(2)][
        : 2 * bool(scenario.tasks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def full_rate_after_s(scenario: Scenario, log: Sequence[Any]) -> float | None:
    """Return the seconds from the end of the outage until the full rate; None if never reached."""
    if scenario.outage_s is None:
        return None
    end = log[0][0] + scenario.outage_s[1]
    served = sorted(at for _, at, status in log if status == 200 and at >= end)
    step = int(_SHARE * scenario.threads / scenario.latency_s * _WINDOW_S)
    pairs = zip(served, served[step:], strict=False)
    return next((last - end for first, last in pairs if last - first <= _WINDOW_S), None)


def measure(name: str) -> str:
    """Run a scenario once and return its row."""
    scenario = SCENARIOS[name]
    with serving(name) as (base_url, pipe):
        failures = run_callers(scenario, caller(base_url))
        pipe.send("enough")
        log = pipe.recv()
    took = max(at for _, at, _ in log if at is not None) - log[0][0]
    requests, time_ratio = len(log) / scenario.items, took / scenario.ideal_s
    row = f"{scenario.title:36} {len(failures):6} {requests:9.3f} {time_ratio:7.2f}"
    if scenario.outage_s is not None:
        after_s = full_rate_after_s(scenario, log)
        row += "  full rate " + ("never" if after_s is None else f"after {after_s:.2f} s")
    broken = (
        bool(failures)
        or requests > (scenario.most_requests or requests)
        or time_ratio > (scenario.most_time or time_ratio)
    )
    row += "  BROKEN" if broken and name in TABLE else ""
    return "\n    ".join([row, *sorted({repr(error)[:160] for error in failures})[:3]])


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.overload", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each scenario")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="may be repeated")
    parser.add_argument("--all", action="store_true", help="also those that no promise names")
    chosen = parser.parse_args()
    names = chosen.scenario or list(SCENARIOS if chosen.all else TABLE)
    print(f"{'scenario':36} {'failed':>6} {'requests':>9} {'time':>7}   (per item; of ideal)")
    for name in names:
        for _ in range(chosen.rounds):
            print(measure(name), flush=True)


if __name__ == "__main__":
    main()
