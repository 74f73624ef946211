"""`call_within`: a function that cannot be told to hurry, and a caller who cannot wait for it.

Not here: the other crossings (`test_bridge.py`).
"""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dspylite as dspy
from dspylite.runtime.bridge import call_within

ROOT = Path(__file__).resolve().parent.parent


def test_result_and_arguments_pass() -> None:
    """In time it is a call like any other."""

    def divide(a: int, *, by: int) -> float:
        return a / by

    assert call_within(10, divide, 6, by=3) == 2


@pytest.mark.parametrize("error", [ValueError("wrong"), TimeoutError("its own"), SystemExit(3)])
def test_an_error_of_the_function_is_passed_on(error: BaseException) -> None:
    """The very object, also where it looks like ours, and also one that ends programs."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        call_within(10, fail)
    assert caught.value is error


@pytest.mark.parametrize("seconds", [0.05, 0.0, -1.0])
def test_a_late_function_is_left_behind(seconds: float) -> None:
    """Its caller goes on when the time is up, whatever the function does (B 4.4)."""
    release, ended = threading.Event(), threading.Event()

    def wait() -> None:
        release.wait(10)
        ended.set()

    with pytest.raises(TimeoutError):
        call_within(seconds, wait)
    assert not ended.is_set()
    release.set()
    assert ended.wait(5)


def test_a_late_error_disturbs_nobody() -> None:
    """Nobody waits for it any more, so no thread may report it either."""
    release, raised = threading.Event(), list[object]()
    threads = list[threading.Thread]()

    def fail() -> None:
        threads.append(threading.current_thread())
        release.wait(10)
        raise ValueError("late")

    before = threading.excepthook
    threading.excepthook = raised.append
    try:
        with pytest.raises(TimeoutError):
            call_within(0.05, fail)
        release.set()
        threads[0].join(5)
    finally:
        threading.excepthook = before
    assert raised == []


def test_the_context_is_carried_and_not_written_to() -> None:
    """Settings, deadline and usage reach the function; what it sets stays with it (B 1.6)."""
    mine = contextvars.ContextVar("mine", default="unset")
    mine.set("outside")

    def look() -> tuple[str, int | None, str]:
        seen = mine.get()
        mine.set("inside")
        return seen, dspy.settings.num_threads, threading.current_thread().name

    with dspy.context(num_threads=7):
        seen, num_threads, thread = call_within(10, look)
    assert (seen, num_threads, mine.get()) == ("outside", 7, "outside")
    assert thread != threading.current_thread().name


def test_many_at_once_do_not_wait_for_each_other() -> None:
    """Each has a thread of its own; hanging ones must not use up a pool."""
    release, together = threading.Event(), threading.Barrier(8)
    try:
        for _ in range(16):
            with pytest.raises(TimeoutError):
                call_within(0, release.wait, 10)
        callers = [
            threading.Thread(target=call_within, args=(10, together.wait, 10)) for _ in range(8)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
        assert not together.broken
        assert not any(caller.is_alive() for caller in callers)
    finally:
        release.set()


def test_a_thread_left_behind_keeps_no_process_from_ending() -> None:
    """A worker that is told to stop must stop, though a provider's library hangs (B 4.4)."""
    code = (
        "import threading\n"
        "from dspylite.runtime.bridge import call_within\n"
        "try:\n"
        "    call_within(0.05, threading.Event().wait, 60)\n"
        "except TimeoutError:\n"
        "    print('left behind')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        cwd=ROOT,
    )
    assert (done.stdout.strip(), done.stderr) == ("left behind", "")
