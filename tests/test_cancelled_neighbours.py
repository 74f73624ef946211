"""What work is given on its way to threads, and whom a flag does not concern (B 1.6, 1.7, 3.2).

Not here: the ways without cancellation (`test_propagation.py`).
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.from_thread
import pytest

import dspylite as dspy
from dspylite.errors import CallCancelledError
from dspylite.runtime.bridge import call_within
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.testing import FakeLM

SOON_S = 5.0
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")

BACKENDS = ["asyncio", "trio"]
Work = Callable[[], Any]


class Sync(dspy.Module):
    """A module that must be run in a thread."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def forward(self) -> Any:
        return self.work()


def _on_daemons(work: Work, backend: str) -> Any:
    return anyio.run(dspy.Parallel(num_threads=2).aover, work, [()] * 2, backend=backend)[1]


def _on_daemons_of_a_module(work: Work, backend: str) -> Any:
    return anyio.run(Sync(work).abatch, [{}] * 2, 2, backend=backend)[1]


def _asyncified_in_an_item(work: Work, backend: str) -> Any:
    return anyio.run(
        dspy.Parallel(num_threads=2).aover, dspy.asyncify(work), [()] * 2, backend=backend
    )[1]


def _in_a_hedged_copy(work: Work, backend: str) -> Any:
    lock, calls = threading.Lock(), [0]
    ended = threading.Event()

    def item() -> Any:
        with lock:
            calls[0] += 1
            is_first = calls[0] == 1
        if is_first:
            ended.wait(SOON_S)  # the copy is faster
            return "the first attempt"
        try:
            return work()
        finally:
            ended.set()

    return dspy.Parallel(num_threads=1, hedge_after_s=0.01)([(item, ())])[0]


def _in_a_hedged_task(work: Work, backend: str) -> Any:
    calls: list[int] = []

    async def item() -> Any:
        calls.append(1)
        if len(calls) == 1:
            await anyio.sleep(SOON_S)
            return "the first attempt"
        return work()

    return anyio.run(
        dspy.Parallel(num_threads=1, hedge_after_s=0.01).acall, [(item, ())], backend=backend
    )[0]


def _in_an_item_with_limits(work: Work, backend: str) -> Any:
    return dspy.Parallel(num_threads=2, timeout_s=SOON_S)([(work, ()), (work, ())])[1]


def _in_a_helper_thread(work: Work, backend: str) -> Any:
    return call_within(SOON_S, work)


def _in_the_helper_of_a_running_loop(work: Work, backend: str) -> Any:
    async def inner() -> Any:
        return work()

    async def main() -> Any:
        return dspy.syncify(inner)()

    return anyio.run(main, backend=backend)


def _nested(work: Work, backend: str) -> Any:
    def outer() -> Any:
        return anyio.from_thread.run(dspy.asyncify(work))

    return anyio.run(dspy.asyncify(outer), backend=backend)


WAYS = [
    _on_daemons, _on_daemons_of_a_module, _asyncified_in_an_item, _in_a_hedged_copy,
    _in_a_hedged_task, _in_an_item_with_limits, _in_a_helper_thread,
    _in_the_helper_of_a_running_loop, _nested,
]  # fmt: skip


class Listener(dspy.BaseCallback):
    """Notes the parent of each call of a model."""

    def __init__(self) -> None:
        self.parents: list[str | None] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        frame = dspy.current_call()
        assert frame is not None
        self.parents.append(frame.parent_id)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_context_and_parent_arrive_in_every_thread(
    way: Callable[[Work, str], Any], backend: str
) -> None:
    """The user's own variables, the settings, and who called whom (B 1.6)."""
    listener, lm = Listener(), FakeLM(default="hi")

    class Outer(dspy.Module):
        def forward(self) -> tuple[str | None, Any]:
            frame = dspy.current_call()
            assert frame is not None
            return frame.call_id, way(self.ask, backend)

        def ask(self) -> tuple[str, int]:
            seen = request_id.get(), dspy.settings.max_trace_size
            request_id.set("changed in the worker")
            lm("hi")
            return seen

    token = request_id.set("mine")
    try:
        with dspy.context(callbacks=[listener], max_trace_size=77):
            mine, seen = Outer()()
    finally:
        assert request_id.get() == "mine"
        request_id.reset(token)
    assert seen == ("mine", 77)
    assert listener.parents
    if way is not _on_daemons_of_a_module:  # whose own call stands between
        assert set(listener.parents) == {mine}


# --- Neighbours -----------------------------------------------------------------------------------


def _look_until_told(seen: list[int], number: int) -> None:
    ends_at = time.monotonic() + SOON_S
    while time.monotonic() < ends_at:
        try:
            dspy.check_cancelled()
        except CallCancelledError:
            seen.append(number)
            raise


@pytest.mark.parametrize("run", ["threads", *BACKENDS])
def test_an_item_whose_time_is_up_takes_no_neighbour_along(run: str) -> None:
    """It alone sees its flag; those beside and after it go on (B 1.7, 2.5, 3.2)."""
    told: list[int] = []
    is_told = threading.Event()

    def item(number: int) -> int:
        if number == 1:
            try:
                _look_until_told(told, number)
            finally:
                is_told.set()
        elif number == 0:
            is_told.wait(SOON_S)  # beside it, and longer
        dspy.check_cancelled()
        return number

    slow = 3.0  # above what item 0 may take beside it, on a busy machine
    parallel = dspy.Parallel(num_threads=2, timeout_s=slow, on_error="return")
    if run == "threads":
        outcomes = parallel.over(_with_less_time(item, 1), range(6))
    else:
        outcomes = anyio.run(parallel.aover, _with_less_time(item, 1), range(6), backend=run)
    assert [outcome.ok for outcome in outcomes] == [True, False, True, True, True, True]
    assert told == [1]


def _with_less_time(item: Callable[[int], int], short: int) -> Callable[[int], int]:
    """Raise the flag of one item early, as its time limit would."""

    def run(number: int) -> int:
        if number == short:
            flag = CANCELLATION.get()
            assert flag is not None
            timer = threading.Timer(0.05, flag.cancel, ["its time was up"])
            timer.start()
            try:
                return item(number)
            finally:
                timer.join(SOON_S)
        return item(number)

    return run


def test_the_loser_of_a_hedge_is_told_and_nobody_else() -> None:
    """Two attempts at one item share its flag; the other items have their own (B 2.5, 3.2)."""
    told: list[int] = []
    lock, attempts = threading.Lock(), [0]
    is_told = threading.Event()

    def item(number: int) -> int:
        if number:
            is_told.wait(SOON_S)
            dspy.check_cancelled()
            return number
        with lock:
            attempts[0] += 1
            is_first = attempts[0] == 1
        if is_first:
            try:
                _look_until_told(told, 0)
            finally:
                is_told.set()
        return 0

    parallel = dspy.Parallel(num_threads=2, hedge_after_s=0.05)
    assert parallel.over(item, range(2)) == [0, 1]
    assert is_told.wait(SOON_S)
    assert told == [0]


def test_work_begun_after_a_stopped_one_knows_nothing_of_it() -> None:
    """On the same threads, loops and objects (B 1.7, 3.2)."""
    lm = FakeLM(default="hi")
    parallel = dspy.Parallel(num_threads=2)
    with Cancellation() as flag:
        timer = threading.Timer(0.05, flag.cancel, ["stop"])
        timer.start()
        with pytest.raises(CallCancelledError):
            parallel.over(lambda number: _look_until_told([], number), range(9))
        timer.join(SOON_S)
    assert parallel.over(lm, ["a", "b"]) == [["hi"], ["hi"]]
    assert lm("c") == ["hi"]
    assert dspy.syncify(lm.acall)("d") == ["hi"]


async def test_a_loop_goes_on_after_a_stopped_request(anyio_backend: str) -> None:
    """Worker threads are used again, and must come without a flag (B 1.7, 3.2)."""
    started = threading.Event()

    def work() -> None:
        started.set()
        _look_until_told([], 0)

    for _ in range(5):
        started.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(dspy.asyncify(work))
            await anyio.to_thread.run_sync(started.wait, SOON_S)
            group.cancel_scope.cancel()
        flags = [await dspy.asyncify(lambda: CANCELLATION.get())() for _ in range(5)]
        assert [flag.reason for flag in flags if flag is not None] == [None] * 5
    assert CANCELLATION.get() is None
