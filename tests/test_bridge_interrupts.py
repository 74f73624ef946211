"""Ctrl-C while sync and async code wait for each other (B 3.2, 3.5): real signals, real processes.

Not here: batches, and what a crossing does when nobody interrupts it (`test_bridge.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import asyncio, sys, threading, time
import anyio
import dspylite as dspy
from dspylite.runtime.bridge import call_within

left = threading.Event()

def tell():  # written by the system at once, so that no lock of a stream is in the way
    import os
    os.write(1, b"ready\\n")

async def wait():
    try:
        tell()
        await anyio.sleep(60)
    finally:
        left.set()

def look():
    try:
        tell()
        ends_at = time.monotonic() + 60
        while time.monotonic() < ends_at:
            dspy.check_cancelled()
            time.sleep(0.001)
    finally:
        left.set()

class AsyncOnly(dspy.Module):
    async def aforward(self):
        await wait()

class Outer(dspy.Module):
    async def aforward(self):
        return dspy.syncify(wait)()

async def call_sync():
    dspy.syncify(wait)()

def in_the_loop_of_a_notebook():
    loop = asyncio.new_event_loop()  # which leaves the signals alone, as a kernel's does
    try:
        loop.run_until_complete(call_sync())
    finally:
        loop.close()

PLACES = {
    "plainly": dspy.syncify(wait),
    "an async-only module": AsyncOnly(),
    "within a time": lambda: call_within(60, look),
    "async code within a time": lambda: call_within(60, dspy.syncify(wait)),
    "inside a running loop": in_the_loop_of_a_notebook,
    "inside a loop of trio": lambda: anyio.run(call_sync, backend="trio"),
    "inside an async module": Outer(),
    "asyncified": lambda: anyio.run(dspy.asyncify(look)),
    "asyncified on trio": lambda: anyio.run(dspy.asyncify(look), backend="trio"),
    "async code in an asyncified call": lambda: anyio.run(dspy.asyncify(dspy.syncify(wait))),
    "awaited": lambda: anyio.run(AsyncOnly().acall),
}

try:
    PLACES[sys.argv[1]]()
except BaseException as error:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(type(error).__name__, left.wait(5), flush=True)
"""

PLACES = [
    "plainly", "an async-only module", "within a time", "async code within a time",
    "inside a running loop", "inside a loop of trio", "inside an async module", "asyncified",
    "asyncified on trio", "async code in an asyncified call", "awaited",
]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_ends_the_waiting_and_what_was_waited_for(place: str) -> None:
    """The caller hears of it at once, the work on the other side stops, the process ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sent_at = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        seconds = time.monotonic() - sent_at
    finally:
        process.kill()
        process.wait(5)
    assert out.splitlines()[:1] == ["KeyboardInterrupt True"]
    assert err == ""
    assert seconds < 4.0
