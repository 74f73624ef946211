"""Ctrl-C: a real signal sent to a real process, wherever its batch runs.

The parent waits for a word of the child before it sends the signal, and for nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.testing import FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
GONE_WITHIN_S = 1.0  # what is promised

# Items 0 to 2 give a result; each later one says that it was reached and then waits.
PREAMBLE = """
import atexit, json, sys, threading, time
import anyio
import dspylite as dspy

read, reached, lock = [], [], threading.Lock()

def inputs():
    for x in range(1000):
        read.append(x)
        yield {"x": x}

def report(error):
    found = {"type": type(error).__name__, "results": dspy.finished_results(error)}
    print(json.dumps(found | {"read": len(read)}), flush=True)

def say_reached(x):
    with lock:
        reached.append(x)
        if len(reached) == 2:
            print("ready", flush=True)

atexit.register(lambda: print(json.dumps({"read_at_the_end": len(read)}), flush=True))

class Work(dspy.Module):
    def forward(self, x):
        if x < 3:
            return 10 * x
        say_reached(x)
        self.wait(x)

    def wait(self, x):
        time.sleep(30)

class AsyncWork(dspy.Module):
    async def aforward(self, x):
        if x < 3:
            return 10 * x
        say_reached(x)
        await anyio.sleep(30)

class Call(Work):
    def wait(self, x):
        lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="k", engine="direct", num_retries=5,
                     max_retry_wait_s=60)
        lm("word")

class AsyncCall(dspy.Module):
    async def aforward(self, x):
        if x < 3:
            return 10 * x
        say_reached(x)
        lm = dspy.LM("openai/m", api_base=sys.argv[1], api_key="k", engine="direct", num_retries=5,
                     max_retry_wait_s=60)
        await lm.acall("word")

class Nested(Work):
    def wait(self, x):
        dspy.Parallel(num_threads=4)([(time.sleep, (30,)) for _ in range(8)])

class Iterated(Work):
    def batch(self, inputs, num_threads):
        for index, outcome in self.batch_iter(inputs, num_threads):
            assert outcome.unwrap() == 10 * index
            given[index] = outcome.value

given = {}
started = threading.Event()  # the signal must not meet the start of a thread
"""

WAYS = {
    "on the main thread": """
try:
    WORK.batch(inputs(), num_threads=2)
except KeyboardInterrupt as error:
    report(error)
    raise
""",
    "asyncio.run": """
import asyncio
try:
    asyncio.run(WORK.abatch(inputs(), num_threads=2))
except KeyboardInterrupt as error:
    report(error)
    raise
""",
    "trio.run": """
import trio
async def main():
    await WORK.abatch(inputs(), num_threads=2)
try:
    trio.run(main)
except BaseException as error:
    report(error)
    raise
""",
    "a thread while main waits": """
def work():
    started.wait()
    try:
        WORK.batch(inputs(), num_threads=2)
    except KeyboardInterrupt as error:
        report(error)
threading.Thread(target=work).start()
started.set()
threading.Event().wait()
""",
    "an event loop in a thread while main waits": """
import asyncio
def work():
    started.wait()
    try:
        asyncio.run(WORK.abatch(inputs(), num_threads=2))
    except KeyboardInterrupt as error:
        report(error)
threading.Thread(target=work).start()
started.set()
threading.Event().wait()
""",
    "an executor that main leaves by the error": """
from concurrent.futures import ThreadPoolExecutor
def work():
    started.wait()
    try:
        WORK.batch(inputs(), num_threads=2)
    except KeyboardInterrupt as error:
        report(error)
        raise
with ThreadPoolExecutor() as pool:
    future = pool.submit(work)
    started.set()
    future.result()
""",
    "an executor that nobody closes": """
from concurrent.futures import ThreadPoolExecutor
def work():
    started.wait()
    try:
        WORK.batch(inputs(), num_threads=2)
    except KeyboardInterrupt as error:
        report(error)
        raise
future = ThreadPoolExecutor().submit(work)
started.set()
future.result()
""",
    "asyncio.to_thread": """
import asyncio
def work():
    started.wait()
    try:
        WORK.batch(inputs(), num_threads=2)
    except KeyboardInterrupt as error:
        report(error)
        raise
async def main():
    asyncio.get_running_loop().call_later(0, started.set)
    await asyncio.to_thread(work)
asyncio.run(main())
""",
}


class Child:
    """A process that is to be interrupted."""

    def __init__(self, code: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == "ready\n", (line, self._process.communicate(timeout=20))

    def interrupt(self) -> tuple[dict[str, Any], str]:
        """Send the signal; return what the child told of its end, and what stderr got."""
        sent_at = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        try:
            out, err = self._process.communicate(timeout=20)
        finally:
            self._process.kill()
        took_s = time.monotonic() - sent_at
        assert took_s < GONE_WITHIN_S, f"gone after {took_s:.2f} s; {err}"
        # Python dies by the signal for a `KeyboardInterrupt`, not for a class derived from it.
        is_derived = err.splitlines()[-1].startswith("dspylite.errors.BatchInterrupted")
        assert self._process.returncode == (1 if is_derived else -signal.SIGINT), err
        told: dict[str, Any] = {}
        for line in out.splitlines():
            told |= json.loads(line)
        return told, err

    def finish(self) -> tuple[int, str, str]:
        """Wait for an end of its own."""
        out, err = self._process.communicate(timeout=20)
        return self._process.returncode, out, err


def is_one_traceback(text: str) -> bool:
    """Tell whether a text is an exception as Python prints it, causes included, and no more."""
    known = (
        " ", "Traceback (most recent call last):", "KeyboardInterrupt", "dspylite.errors.",
        "asyncio.exceptions.CancelledError", "trio.Cancelled", "The above exception was",
        "During handling of",
    )  # fmt: skip
    return "Traceback" in text and all(line.startswith(known) for line in text.splitlines() if line)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("work", ["Work()", "Nested()"])
def test_ctrl_c_ends_the_process_within_a_second(way: str, work: str) -> None:
    """Items that sleep for 30 s, in a batch or one inside it, must not hold it (B 2.6)."""
    child = Child(PREAMBLE + WAYS[way].replace("WORK", work))
    child.wait_until_ready()
    told, err = child.interrupt()
    assert told["results"] == {"0": 0, "1": 10, "2": 20}
    assert told["read"] == told["read_at_the_end"] == 5, "an item was taken after the signal"
    assert is_one_traceback(err), err


JOINED = """
def work():
    started.wait()
    try:
        Work().batch(inputs(), num_threads=2)
    except KeyboardInterrupt as error:
        report(error)
thread = threading.Thread(target=work)
thread.start()
started.set()
thread.join()
"""


@pytest.mark.skipif(
    sys.version_info < (3, 13), reason="an interrupted `join` takes the thread for ended"
)
def test_ctrl_c_ends_a_process_whose_main_thread_joins_the_batch() -> None:
    """Before Python 3.13 such a thread is cut off wherever it is, and tells nothing (B 2.6)."""
    child = Child(PREAMBLE + JOINED)
    child.wait_until_ready()
    told, err = child.interrupt()
    assert told["read_at_the_end"] == 5
    assert told["results"] == {"0": 0, "1": 10, "2": 20}
    assert is_one_traceback(err), err


@pytest.mark.parametrize("way", ["asyncio.run", "trio.run"])
def test_ctrl_c_ends_the_process_where_items_are_coroutines(way: str) -> None:
    """The event loop cancels them, and what had finished is still found (B 2.6)."""
    child = Child(PREAMBLE + WAYS[way].replace("WORK", "AsyncWork()"))
    child.wait_until_ready()
    told, err = child.interrupt()
    assert told["results"] == {"0": 0, "1": 10, "2": 20}
    assert told["read"] == told["read_at_the_end"] == 5
    assert is_one_traceback(err), err


CALLS = pytest.mark.parametrize(
    ("way", "work"),
    [
        ("on the main thread", "Call()"),
        ("a thread while main waits", "Call()"),
        ("an executor that main leaves by the error", "Call()"),
        ("asyncio.run", "Call()"),
        ("asyncio.run", "AsyncCall()"),
        ("trio.run", "AsyncCall()"),
    ],
)


@CALLS
def test_ctrl_c_breaks_calls_off_that_wait_for_an_answer(way: str, work: str) -> None:
    """A server that never answers is what one presses Ctrl-C for (B 2.6)."""
    with FakeServer() as server:
        server.script(*[Reply(hang=True)] * 2)
        child = Child(PREAMBLE + WAYS[way].replace("WORK", work), server.base_url)
        child.wait_until_ready()
        server.wait_for_requests(2)
        told, err = child.interrupt()
        server.wait_until_idle()
        assert len(server.requests) == 2, "a call was made after the signal"
    assert told["results"] == {"0": 0, "1": 10, "2": 20}
    assert told["read_at_the_end"] == 5
    assert is_one_traceback(err), err


@CALLS
def test_ctrl_c_breaks_off_the_wait_before_the_next_attempt(way: str, work: str) -> None:
    """`Retry-After: 30` is such a wait (B 2.6)."""
    with FakeServer() as server:
        server.script(*[Reply(status=500, headers={"retry-after": "30"})] * 2)
        child = Child(PREAMBLE + WAYS[way].replace("WORK", work), server.base_url)
        child.wait_until_ready()
        server.wait_for_requests(2)
        server.wait_until_idle()
        told, err = child.interrupt()
        assert len(server.requests) == 2, "a call was made after the signal"
    assert told["results"] == {"0": 0, "1": 10, "2": 20}
    assert told["read_at_the_end"] == 5
    assert is_one_traceback(err), err


@pytest.mark.parametrize("way", ["on the main thread", "a thread while main waits"])
def test_ctrl_c_ends_an_iterated_batch(way: str) -> None:
    """Its outcomes were given out one by one, so nothing of them is on the error (B 2.6)."""
    code = WAYS[way].replace("WORK", "Iterated()").replace("report(error)", "report_given(error)")
    child = Child(
        PREAMBLE
        + "def report_given(error):\n"
        + "    report(error)\n"
        + "    print(json.dumps({'given': given}), flush=True)\n"
        + code
    )
    child.wait_until_ready()
    told, err = child.interrupt()
    assert set(told["given"]) <= {"0", "1", "2"}
    assert told["results"] == {}
    assert told["read_at_the_end"] == 5
    assert is_one_traceback(err), err


ITERATED_AS_TASKS = """
async def main():
    async for index, outcome in AsyncWork().abatch_iter(inputs(), 2):
        given[index] = outcome.unwrap()
"""


@pytest.mark.parametrize(
    "run", ["import asyncio; asyncio.run(main())", "import trio; trio.run(main)"]
)
def test_ctrl_c_ends_a_batch_iterated_as_tasks(run: str) -> None:
    """The task that does the work ends with the loop, without a word (B 2.6)."""
    child = Child(PREAMBLE + ITERATED_AS_TASKS + run)
    child.wait_until_ready()
    told, err = child.interrupt()
    assert told["read_at_the_end"] == 5
    assert is_one_traceback(err), err


MAIN_ENDS = (
    PREAMBLE
    + """
def work():
    # Since Python 3.12 no thread can be started after the main one: both workers must be there.
    pairs = [(threading.main_thread().join, ()), (begun.set, ()), *[(abs, (-1,))] * 20]
    print(dspy.Parallel(num_threads=2)(pairs))
begun = threading.Event()
threading.Thread(target=work).start()
begun.wait()
"""
)


def test_a_batch_goes_on_where_the_main_thread_ended_by_itself() -> None:
    """Only Ctrl-C stops it; a script may well end before its threads (B 2.6)."""
    code, out, err = Child(MAIN_ENDS).finish()
    assert (code, err) == (0, "")
    assert str([None, None, *[1] * 20]) in out


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in sorted(signal.valid_signals())]


def test_signal_handlers_are_never_touched() -> None:
    """They are the application's, also while a batch runs (B 2.6)."""
    before = _handlers()
    seen = dspy.Parallel(num_threads=2)([(_handlers, ()) for _ in range(4)])
    assert [*seen, _handlers()] == [before] * 5


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_signal_handlers_are_left_to_the_event_loop(backend: str) -> None:
    """What asyncio and trio set is theirs alone (B 2.6)."""

    async def main() -> None:
        inside = _handlers()
        assert await dspy.Parallel(num_threads=2).acall([(_handlers, ())] * 4) == [inside] * 4
        assert _handlers() == inside

    before = _handlers()
    anyio.run(main, backend=backend)
    assert _handlers() == before


def interrupt_itself() -> None:
    raise KeyboardInterrupt("of the item")


def test_a_keyboard_interrupt_that_an_item_raises_is_that_items_error() -> None:
    """Ctrl-C never arrives in a worker thread, so this is something else (B 2.6)."""
    outcomes = dspy.Parallel(num_threads=2, on_error="return")(
        [(interrupt_itself, ()), (abs, (-1,))]
    )
    assert isinstance(outcomes[0].error, KeyboardInterrupt)
    assert outcomes[1].value == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_keyboard_interrupt_of_a_sync_item_is_its_error_in_an_event_loop_too(
    backend: str,
) -> None:
    """It was raised in a worker thread (B 2.6)."""
    outcomes = anyio.run(
        dspy.Parallel(num_threads=2, on_error="return").acall,
        [(interrupt_itself, ()), (abs, (-1,))],
        backend=backend,
    )
    assert isinstance(outcomes[0].error, KeyboardInterrupt)
    assert outcomes[1].value == 1


def test_a_batch_interrupted_in_this_thread_keeps_results_and_errors() -> None:
    """What was paid for is not lost, and what failed is told (B 2.6)."""
    import _thread

    blocked, release = threading.Event(), threading.Event()

    def work(x: int) -> int:
        if x == 1:
            raise ValueError("one")
        if x == 2:
            blocked.set()
            assert release.wait(20)
        return x

    def pairs() -> Iterator[Any]:
        yield from ((work, (x,)) for x in range(3))
        assert blocked.wait(20)
        _thread.interrupt_main()
        release.wait(20)

    with pytest.raises(dspy.BatchInterrupted) as caught:
        dspy.Parallel(num_threads=2)(pairs())
    release.set()
    error = caught.value
    assert error.results == dspy.finished_results(error) == {0: 0}
    assert str(error.errors[1]) == "one"
    assert error.untried == 0


def test_an_interrupt_between_the_steps_of_a_wait_keeps_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's wait does not hold its lock all the time, and Ctrl-C may come just then (B 2.6)."""
    wait, reentrant = threading.Condition.wait, type(threading.RLock())
    done, release, torn = threading.Event(), threading.Event(), []

    def torn_wait(self: Any, timeout: float | None = None) -> bool:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and isinstance(self._lock, reentrant) and done.is_set() and not torn:
            torn.append(self)
            self._release_save()
            raise KeyboardInterrupt
        return wait(self, timeout)

    def work(x: int) -> int:
        if x:
            done.set()
            assert release.wait(20)
        return x

    monkeypatch.setattr(threading.Condition, "wait", torn_wait)
    with pytest.raises(dspy.BatchInterrupted) as caught:
        dspy.Parallel(num_threads=1)([(work, (x,)) for x in range(2)])
    release.set()
    assert torn
    assert caught.value.results == {0: 0}
