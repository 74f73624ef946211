"""`python -m tests.benchmarks.outage`: a primary that is down for a while, before a fallback.

Threads call one `LM` with `fallbacks=[...]` and default parameters all the time; the servers' logs
are the judge. Not here: outages of an endpoint without a fallback (`overload.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import dspylite
from dspylite.testing import FakeServer, Reply

_LATENCY_S = 0.05
_SHARE, _WINDOW_S = 0.8, 0.5  # "full rate" is so much of the rate before the outage, over so long
_BEFORE_S = 5.0  # the rate of its last half is the full one
_LONGEST_RETURN_S = 90.0


def serve(pipe: Connection, *, refuses: bool) -> None:
    """Run a primary and a fallback until the other end says so, then send both logs."""
    is_down = threading.Event()

    def answer(body: object) -> Reply:
        return Reply(status=503) if is_down.is_set() else Reply(delay_s=_LATENCY_S)

    with FakeServer(answer=answer) as primary, FakeServer(latency_s=_LATENCY_S) as fallback:
        pipe.send((primary.base_url, fallback.base_url))
        while (command := pipe.recv()) != "enough":
            if refuses:
                _ = primary.close() if command == "down" else primary.start()
            elif command == "down":
                is_down.set()
            else:
                is_down.clear()
            pipe.send(time.monotonic())
        for server in (primary, fallback):
            pipe.send([(r.received_at, r.answered_at, r.status) for r in server.requests])


class Callers:
    """Threads that call a model until told to stop."""

    def __init__(self, lm: dspylite.LM, threads: int) -> None:
        self._lm = lm
        self._stop = threading.Event()
        self.errors: list[Exception] = []
        self.slowest_s: list[float] = [0.0] * threads
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _call(self, number: int) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._lm(f"from {number}")
            except Exception as error:  # noqa: BLE001 -- counted and shown
                self.errors.append(error)
            self.slowest_s[number] = max(self.slowest_s[number], time.monotonic() - began)

    def stop(self) -> None:
        """End them."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def full_rate_at(served: Sequence[float], rate: float) -> float | None:
    """Return when so much of a rate was reached for half a second; None for never."""
    step = int(_SHARE * rate * _WINDOW_S)
    pairs = zip(served, served[step:], strict=False)
    return next((last for first, last in pairs if last - first <= _WINDOW_S), None)


def measure(seconds: float, threads: int, *, refuses: bool) -> None:
    """Run it once and print what happened."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(
        target=serve, args=(theirs,), kwargs={"refuses": refuses}, daemon=True
    )
    process.start()
    primary_url, fallback_url = pipe.recv()

    def tell(command: str) -> float:
        pipe.send(command)
        at: float = pipe.recv()
        return at

    options: dict[str, Any] = {"api_key": "k", "cache": False, "engine": "direct"}
    fallback = dspylite.LM("openai/fallback", api_base=fallback_url, **options)
    lm = dspylite.LM("openai/primary", api_base=primary_url, fallbacks=[fallback], **options)
    callers = Callers(lm, threads)
    time.sleep(_BEFORE_S)
    down_at = tell("down")
    time.sleep(seconds)
    up_at = tell("up")
    while lm.health().state != "closed" and time.monotonic() < up_at + _LONGEST_RETURN_S:
        time.sleep(0.05)
    time.sleep(5)
    callers.stop()
    pipe.send("enough")
    primary_log, fallback_log = pipe.recv(), pipe.recv()
    process.join(5)
    process.kill()

    served = sorted(at for _, at, status in primary_log if status == 200 and at is not None)
    rate = sum(down_at - _BEFORE_S / 2 <= at < down_at for at in served) / (_BEFORE_S / 2)
    during = [at for at, *_ in primary_log if down_at <= at < up_at]
    after = [at for at in served if at >= up_at]
    full_at = full_rate_at(after, rate)
    print(f"{'connections refused' if refuses else '503'} for {seconds:g} s, {threads} threads")
    print(f"  calls answered            {len(served) + len(fallback_log)}")
    print(f"  errors seen by callers    {len(callers.errors)}")
    print(f"  slowest call              {max(callers.slowest_s):.2f} s")
    print(f"  rate before               {rate:.0f} calls/s")
    print(f"  requests to the primary   {len(during)}", end="")
    print(f", {sum(at < down_at + 1 for at in during)} of them in the first second")
    print(f"  first answer after        {after[0] - up_at:.2f} s" if after else "  none after")
    print(f"  full rate after           {full_at - up_at:.2f} s" if full_at else "  never full")
    for text in sorted({repr(error)[:160] for error in callers.errors})[:3]:
        print("   ", text)


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.outage", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the outage")
    parser.add_argument("--threads", type=int, default=16, help="callers")
    parser.add_argument("--refused", action="store_true", help="no connection instead of 503")
    chosen = parser.parse_args()
    measure(chosen.seconds, chosen.threads, refuses=chosen.refused)


if __name__ == "__main__":
    main()
