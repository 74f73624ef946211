"""Single calls made into batches: each gets its own answer, and nobody waits in vain (B 6.7)."""

from __future__ import annotations

import asyncio
import copy
import importlib
import itertools
import linecache
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.concurrency import batching
from dspylite.concurrency.batching import LINGER_S, Call, Line
from dspylite.errors import BatchShapeError, CallCancelledError, ClosedError, DeadlineExceededError
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.clock import Deadline
from dspylite.runtime.tracking import SharedTracker, UsageTracker
from dspylite.schema.messages import Usage
from dspylite.testing import FakeClock, FakeServer, Reply

LIMIT_S = 30.0
"""Far above what anything here takes; a hang ends there."""
NEVER_S = 1_000.0
"""A window that no test sees the end of."""
ROOT = Path(__file__).resolve().parent.parent


class Tally:
    """Counts, and waits for a count."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.count = 0

    def up(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, LIMIT_S), self.count


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> Tally:
    """Count the items that stand in any line."""
    counter, add = Tally(), Line.add

    def counted(line: Line, call: Call) -> None:
        add(line, call)
        counter.up()

    monkeypatch.setattr(Line, "add", counted)
    return counter


class HandClock(FakeClock):
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = Tally()
        self._waiting: list[tuple[float, threading.Event]] = []

    def wait(self, event: threading.Event, seconds: float | None) -> None:
        if seconds is not None:
            self._waiting.append((self.now() + seconds, event))
        self.waits.up()
        assert event.wait(LIMIT_S)

    def advance(self, seconds: float) -> None:
        self.sleep(seconds)
        for ends_at, event in list(self._waiting):
            if ends_at <= self.now():
                event.set()


class Held:
    """A batch function that stands still until it may go on, and knows what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.entered = Tally()
        self.go = threading.Event()

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(list(items))
        self.entered.up()
        assert self.go.wait(LIMIT_S)
        return [("done", item) for item in items]


def double(items: list[int]) -> list[int]:
    return [2 * item for item in items]


def start(fn: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call on a thread of its own."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(fn(*args))
        except BaseException as error:  # noqa: BLE001  # the test looks at it
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def start_tasks(backend: str, fn: Callable[[Any], Awaitable[Any]], items: Sequence[Any]) -> Any:
    """Await for each item as tasks of one event loop, on a thread of its own."""
    results: list[Future[Any]] = [Future() for _ in items]

    async def one(result: Future[Any], item: Any) -> None:
        try:
            result.set_result(await fn(item))
        except Exception as error:  # noqa: BLE001  # the test looks at it
            result.set_exception(error)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for result, item in zip(results, items, strict=True):
                group.start_soon(one, result, item)

    start(lambda: anyio.run(main, backend=backend))
    return results


def answers(results: Sequence[Future[Any]]) -> list[Any]:
    return [result.result(LIMIT_S) for result in results]


def errors(results: Sequence[Future[Any]]) -> list[BaseException | None]:
    return [result.exception(LIMIT_S) for result in results]


def call_within(seconds: float, fn: Callable[[Any], Any], item: Any) -> Any:
    with dspy.context(deadline_s=seconds):
        return fn(item)


def batcher_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "dspylite-batcher"]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A closed batcher leaves no thread; others may be in their last moment."""
    before = set(batcher_threads())
    yield
    for thread in set(batcher_threads()) - before:
        thread.join(LINGER_S + LIMIT_S)
        assert not thread.is_alive()


# --- when batches go out -------------------------------------------------------------------------


def test_callers_of_every_kind_share_a_batch() -> None:
    """Threads, and tasks of two asyncio loops and a trio loop (B 6.7)."""
    held = Held()
    held.go.set()
    with dspy.MicroBatcher(held, max_batch_size=8, max_wait_time=NEVER_S) as batcher:
        results = [start(batcher, item) for item in (0, 1)]
        results += start_tasks("asyncio", batcher.acall, (2, 3))
        results += start_tasks("asyncio", batcher.acall, (4, 5))
        results += start_tasks("trio", batcher.acall, (6, 7))
        assert answers(results) == [("done", item) for item in range(8)]
    assert [sorted(batch) for batch in held.batches] == [list(range(8))]


def test_a_batch_goes_out_at_the_end_of_its_window(came: Tally) -> None:
    """As many seconds after its first item, not after its last (B 6.7)."""
    held = Held()
    held.go.set()
    with HandClock() as clock, dspy.MicroBatcher(held, max_wait_time=0.5) as batcher:
        first = start(batcher, "a")
        clock.waits.wait_for(1)
        clock.advance(0.4)
        second = start(batcher, "b")
        came.wait_for(2)
        assert not held.batches
        clock.advance(0.1)
        assert answers([first, second]) == [("done", "a"), ("done", "b")]
    assert held.batches == [["a", "b"]]


def test_no_window_sends_at_once() -> None:
    """DSPy's never sends then (B 6.7)."""
    with dspy.MicroBatcher(double, max_wait_time=0) as batcher:
        assert batcher(4) == 8


def test_one_batch_runs_at_once_and_items_gather_meanwhile(came: Tally) -> None:
    """A function that is not made for threads is never run twice at once (B 6.7)."""
    held = Held()
    with dspy.MicroBatcher(held, 4, 0) as batcher:
        first = start(batcher, 0)
        held.entered.wait_for(1)
        rest = [start(batcher, item) for item in range(1, 8)]
        came.wait_for(8)
        assert held.batches == [[0]]
        held.go.set()
        assert answers([first, *rest]) == [("done", item) for item in range(8)]
    assert sorted(map(len, held.batches)) == [1, 3, 4]


def test_as_many_batches_run_at_once_as_allowed(came: Tally) -> None:
    """A full one goes out while others run (B 6.7)."""
    held = Held()
    with dspy.MicroBatcher(held, 2, NEVER_S, max_concurrency=3) as batcher:
        results = [start(batcher, item) for item in range(8)]
        came.wait_for(8)
        held.entered.wait_for(3)
        assert len(held.batches) == 3
        held.go.set()
        assert sorted(answers(results)) == [("done", item) for item in range(8)]
    assert list(map(len, held.batches)) == [2, 2, 2, 2]


def test_a_full_queue_refuses_at_once(came: Tally) -> None:
    """What is under way does not count (B 6.7)."""
    held = Held()
    with dspy.MicroBatcher(held, 1, 0, max_queue=2) as batcher:
        results = [start(batcher, 0)]
        held.entered.wait_for(1)
        results += [start(batcher, item) for item in (1, 2)]
        came.wait_for(3)
        with pytest.raises(dspy.OverloadedError, match="max_queue"):
            batcher(3)
        held.go.set()
        assert len(answers(results)) == 3
        assert batcher(4) == ("done", 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_size": 0}, {"max_batch_size": True}, {"max_batch_size": 1.5},
        {"max_wait_time": -1}, {"max_wait_time": float("nan")}, {"max_wait_time": float("inf")},
        {"max_wait_time": "1"}, {"max_wait_time": True}, {"max_concurrency": 0}, {"max_queue": 0},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    """When it is made, and by name (B 6.7)."""
    with pytest.raises(dspy.SettingsError, match=next(iter(wrong))):
        dspy.MicroBatcher(double, **wrong)
    with pytest.raises(dspy.ModuleError, match="function over a list"):
        dspy.MicroBatcher("fn")  # type: ignore[arg-type]


# --- where the function runs ---------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_sync_function_blocks_no_event_loop() -> None:
    """It waits here for what another task does (B 6.7)."""
    told = threading.Event()

    def wait(items: list[int]) -> list[int]:
        assert told.wait(LIMIT_S)
        return items

    batcher = dspy.MicroBatcher(wait, max_wait_time=0)
    async with batcher, anyio.create_task_group() as group:
        group.start_soon(batcher.acall, 1)
        await anyio.wait_all_tasks_blocked()
        told.set()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_function_outlives_the_loops_of_its_callers(backend: str) -> None:
    """What it keeps open in its loop is of use to the next batch (B 6.7)."""
    loops: list[Any] = []

    async def work(items: list[int]) -> list[int]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return double(items)

    with dspy.MicroBatcher(work, max_wait_time=0) as batcher:
        assert anyio.run(batcher.acall, 1, backend=backend) == 2
        assert anyio.run(batcher.acall, 2, backend=backend) == 4
        assert batcher(3) == 6
        assert len(set(loops)) == 1
    assert loops[0].is_closed()


def test_a_function_that_only_looks_sync_is_awaited() -> None:
    """As decorators make them (B 6.7)."""

    async def work(items: list[int]) -> list[int]:
        return double(items)

    with dspy.MicroBatcher(lambda items: work(items), max_wait_time=0) as batcher:
        assert batcher(3) == 6


def test_a_call_is_a_part_of_other_programs() -> None:
    """In the items of a batch, and below asyncify (B 6.7)."""
    with dspy.MicroBatcher(double, 8, 0.01) as batcher:
        pairs = [(batcher, (item,)) for item in range(50)]
        assert dspy.Parallel(num_threads=8)(pairs) == [2 * item for item in range(50)]
        assert anyio.run(dspy.asyncify(batcher), 4) == 8


def test_calls_from_inside_do_not_wait_for_themselves() -> None:
    """At any depth, and where two batchers call each other (B 6.7)."""

    def halve(items: list[int]) -> list[int]:
        return [0 if item == 0 else 1 + batcher(item // 2) for item in items]

    with dspy.MicroBatcher(halve, 1, 0, max_queue=1) as batcher:
        assert batcher(8) == 4

    meet = threading.Barrier(2)

    def to_b(items: list[int]) -> list[int]:
        if items[0] < 10:
            meet.wait(LIMIT_S)
            return [b(item + 10) for item in items]
        return items

    def to_a(items: list[int]) -> list[int]:
        if items[0] < 10:
            meet.wait(LIMIT_S)
            return [a(item + 10) for item in items]
        return items

    with dspy.MicroBatcher(to_b, 1, 0) as a, dspy.MicroBatcher(to_a, 1, 0) as b:
        assert answers([start(a, 1), start(b, 2)]) == [11, 12]


# --- what the function returns -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "returned"),
    [
        ([], 0), ([1], 1), ([1, 2, 3, 4], 4), ((), 0), (None, None), ("abc", None),
        (b"abc", None), ({0: 1, 1: 2, 2: 3}, None), ({1, 2, 3}, None), (3, None),
    ],
    ids=repr,
)  # fmt: skip
def test_a_wrong_number_of_results_fails_all_at_once(made: Any, returned: int | None) -> None:
    """With DSPy's, callers wait for ever (B 6.7)."""
    with dspy.MicroBatcher(lambda _: made, 3, NEVER_S) as batcher:
        results = [start(batcher, item) for item in range(2)]
        results += start_tasks("trio", batcher.acall, (2,))
        found = errors(results)
    assert [type(error) for error in found] == [BatchShapeError] * 3
    assert all(isinstance(error, ValueError) for error in found)
    shapes = {
        (error.expected, error.returned) for error in found if isinstance(error, BatchShapeError)
    }
    assert shapes == {(3, returned)}
    assert len(set(map(id, found))) == 3


@pytest.mark.parametrize(
    "form",
    [tuple, iter, lambda rows: dict(enumerate(rows)).values()],
    ids=["tuple", "iter", "view"],
)
def test_any_list_of_results_will_do(form: Callable[[list[int]], Any]) -> None:
    """Whatever can be read in order (B 6.7)."""
    with dspy.MicroBatcher(lambda items: form(double(items)), max_wait_time=0) as batcher:
        assert batcher(2) == 4


class Proud:
    """Refuses to be compared, counted or shown."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("asked for its truth")

    def __repr__(self) -> str:
        raise AssertionError("shown")


def test_items_and_results_are_never_compared() -> None:
    """Arrays and data frames refuse that (B 6.7)."""
    items = [Proud() for _ in range(6)]
    with dspy.MicroBatcher(lambda batch: [[item] for item in batch], 3, NEVER_S) as batcher:
        found = answers([start(batcher, item) for item in items])
    for (value,), item in zip(found, items, strict=True):
        assert value is item


def test_an_embedder_gives_each_text_its_own_row() -> None:
    """Sync, async and called for an array (B 6.7)."""
    embedder = dspy.Embedder("offline/hashing", dimensions=32)
    texts = [f"text {number}" for number in range(9)]
    wanted = [row.tolist() for row in embedder.embed(texts)]
    for form in (embedder.embed, embedder.aembed):
        with dspy.MicroBatcher(form, 3, NEVER_S) as batcher:
            rows = answers([start(batcher, text) for text in texts])
        assert [row.tolist() for row in rows] == wanted


# --- failures ------------------------------------------------------------------------------------


def test_one_failed_item_takes_no_neighbour() -> None:
    """A `BatchError` says whose what is (B 6.7)."""

    def work(items: list[int]) -> list[int]:
        raise dspy.BatchError(
            "some",
            results={place: 2 * item for place, item in enumerate(items) if item < 3},
            errors={place: KeyError(item) for place, item in enumerate(items) if item == 3},
            untried=1,
        )

    with dspy.MicroBatcher(work, 5, NEVER_S) as batcher:
        results = [start(batcher, item) for item in range(5)]
        assert answers(results[:3]) == [0, 2, 4]
        failed, untried = errors(results[3:])
    assert isinstance(failed, KeyError)
    assert failed.args == (3,)
    assert isinstance(untried, dspy.ItemSkippedError)


@pytest.mark.parametrize(
    "inner",
    [
        dspy.BatchError(
            "inside", results={0: "x", 7: "y"}, errors={1: KeyError("b")}, untried=None
        ),
        dspy.BatchError("inside", results={0: "x"}, errors={}, untried=5),
        dspy.BatchError("inside", results={}, errors={}),
    ],
    ids=["further", "more", "none"],
)
def test_the_error_of_another_batch_is_not_taken_for_its_own(inner: dspy.BatchError) -> None:
    """One that the function made inside has other indices (B 6.7)."""

    def work(items: list[int]) -> list[int]:
        raise inner

    with dspy.MicroBatcher(work, 2, NEVER_S) as batcher:
        found = errors([start(batcher, item) for item in range(2)])
    assert [type(error) for error in found] == [dspy.BatchError] * 2


class OddError(Exception):
    """Cannot be built again from its arguments."""

    def __init__(self, code: int) -> None:
        super().__init__(f"failed with {code}")


class RefusingError(Exception):
    """Cannot be copied."""

    def __reduce__(self) -> Any:
        raise TypeError("no")


@pytest.mark.parametrize(
    "raised",
    [ValueError("no"), dspy.LMServerError("down", status=503), OddError(3), RefusingError("x")],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_goes_to_each_caller_and_gathers_no_frames(raised: Exception) -> None:
    """Also one that the function raises again and again (B 6.7)."""
    raised.add_note("of the batch")
    raised.__cause__ = KeyError("behind it")

    def work(items: list[int]) -> list[int]:
        raise raised.with_traceback(None)

    depths: list[int] = []
    with dspy.MicroBatcher(work, 2, NEVER_S) as batcher:
        for _ in range(3):
            found = errors([start(batcher, item) for item in range(2)])
            for error in found:
                assert type(error) is type(raised)
                assert str(error) == str(raised)
                assert error.__notes__ == ["of the batch"]
                assert error.__cause__ is raised.__cause__
                depths.append(len(traceback.extract_tb(error.__traceback__)))
                assert "work" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if isinstance(raised, ValueError | dspy.LMServerError):
                assert found[0] is not found[1]
                found[0].add_note("mine")  # type: ignore[union-attr]
                assert found[1].__notes__ == ["of the batch"]  # type: ignore[union-attr]
    assert max(depths) <= min(depths) + 4


@pytest.mark.parametrize(
    "raised",
    [KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError(), GeneratorExit()],
    ids=repr,
)
@pytest.mark.parametrize("is_async", [False, True])
def test_no_base_exception_hangs_a_caller_or_ends_its_loop(
    raised: BaseException, is_async: bool
) -> None:
    """And the batcher goes on (B 6.7)."""
    raises = True

    def work(items: list[int]) -> list[int]:
        if raises:
            raise raised
        return items

    async def awork(items: list[int]) -> list[int]:
        return work(items)

    with dspy.MicroBatcher(awork if is_async else work, 2, NEVER_S) as batcher:
        found = errors([start(batcher, 0), *start_tasks("asyncio", batcher.acall, (1,))])
        assert [type(error) for error in found] == [CallCancelledError] * 2
        if not is_async:  # an event loop makes others of them
            assert type(found[0].__cause__) is type(raised)  # type: ignore[union-attr]
        raises = False
        assert answers([start(batcher, 0), start(batcher, 1)]) == [0, 1]


# --- callers that give up ------------------------------------------------------------------------


def test_a_thread_that_is_told_to_stop_takes_its_item_back(came: Tally) -> None:
    """Its neighbours do not notice (B 6.7)."""
    held = Held()
    held.go.set()
    flag = Cancellation()

    def ask(item: int) -> Any:
        with flag:
            return batcher(item)

    with dspy.MicroBatcher(held, 3, NEVER_S) as batcher:
        first = start(batcher, 1)
        leaver = start(ask, 2)
        came.wait_for(2)
        flag.cancel("the test says so")
        assert isinstance(leaver.exception(LIMIT_S), CallCancelledError)
        assert isinstance(start(ask, 3).exception(LIMIT_S), CallCancelledError)
        rest = [start(batcher, item) for item in (4, 5)]
        assert len(answers([first, *rest])) == 3
    assert [sorted(batch) for batch in held.batches] == [[1, 4, 5]]


@pytest.mark.anyio
async def test_a_cancelled_task_takes_its_item_back() -> None:
    """Its neighbours do not notice (B 6.7)."""
    held = Held()
    held.go.set()
    batcher = dspy.MicroBatcher(held, 3, NEVER_S)
    async with batcher, anyio.create_task_group() as group:
        group.start_soon(batcher.acall, "kept")
        async with anyio.create_task_group() as inner:
            inner.start_soon(batcher.acall, "left")
            await anyio.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        assert not held.batches
        group.start_soon(batcher.acall, "late")
        group.start_soon(batcher.acall, "later")
    assert [sorted(batch) for batch in held.batches] == [["kept", "late", "later"]]


def test_a_deadline_ends_the_wait(came: Tally) -> None:
    """That of the settings, and what is left to the call around it (B 6.7)."""
    held = Held()
    with dspy.MicroBatcher(held, 3, NEVER_S) as batcher:
        first = start(batcher, 1)
        came.wait_for(1)
        with FakeClock():  # its time passes at once
            with pytest.raises(DeadlineExceededError, match="the item waited for its batch"):
                call_within(5, batcher, 2)
            with pytest.raises(DeadlineExceededError), Deadline(5):
                batcher(3)
        held.go.set()
        assert len(answers([first, start(batcher, 4), start(batcher, 5)])) == 3
    assert [sorted(batch) for batch in held.batches] == [[1, 4, 5]]


def test_a_batch_that_nobody_waits_for_is_told_to_stop(came: Tally) -> None:
    """But not before its last caller has left (B 6.7)."""
    flags = [Cancellation(), Cancellation()]
    entered, told = threading.Event(), threading.Event()
    seen: list[str | None] = []

    def work(items: list[int]) -> list[int]:
        flag = CANCELLATION.get()
        assert flag is not None
        flag.watch(told.set)
        entered.set()
        assert told.wait(LIMIT_S)
        seen.append(flag.reason)
        return items

    def ask(item: int) -> Any:
        with flags[item]:
            return batcher(item)

    with dspy.MicroBatcher(work, 2, NEVER_S) as batcher:
        results = [start(ask, item) for item in range(2)]
        assert entered.wait(LIMIT_S)
        flags[0].cancel("gone")
        assert isinstance(results[0].exception(LIMIT_S), CallCancelledError)
        assert not told.is_set()
        flags[1].cancel("gone")
        assert isinstance(results[1].exception(LIMIT_S), CallCancelledError)
        assert told.wait(LIMIT_S)
    assert seen == ["nobody waits for its batch any more"]


# --- settings ------------------------------------------------------------------------------------

TENANT: ContextVar[str] = ContextVar("tenant", default="nobody's")


def test_tenants_are_never_mixed() -> None:
    """The function has the settings of all its items, and no variable of one of them (B 6.7)."""
    seen: list[tuple[Any, str, list[str]]] = []

    def work(items: list[str]) -> list[str]:
        seen.append((dspy.settings.cache_namespace, TENANT.get(), sorted(items)))
        return [f"{dspy.settings.cache_namespace}:{item}" for item in items]

    def ask(tenant: str, number: int) -> str:
        TENANT.set(tenant)
        with dspy.context(cache_namespace="".join(tenant), extra={"tenant": [tenant][0]}):
            return batcher(f"{tenant}{number}")

    with dspy.MicroBatcher(work, 4, NEVER_S, max_concurrency=2) as batcher:
        pairs = [(tenant, number) for number in range(8) for tenant in ("a", "b", "c")]
        found = answers([start(ask, *pair) for pair in pairs])
    assert found == [f"{tenant}:{tenant}{number}" for tenant, number in pairs]
    assert len(seen) == 6  # full ones alone: equal settings share a batch
    for namespace, variable, items in seen:
        assert variable == "nobody's"
        assert {item[0] for item in items} == {namespace}


class Twin(dspy.OfflineLM):
    """Equal to all its kind, with another key."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Twin)

    __hash__ = dspy.OfflineLM.__hash__


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ({}, {}, True),
        ({"cache_namespace": "a"}, {"cache_namespace": "a"}, True),
        ({"cache_namespace": "a"}, {"cache_namespace": "b"}, False),
        ({"cache_namespace": "a"}, {}, False),
        ({"num_threads": 3, "parse_retries": 1}, {"parse_retries": 1, "num_threads": 3}, True),
        ({"extra": {"a": {"b": 1}}}, {"extra": {"a": {"b": 1}}}, True),
        ({"extra": {"a": 1}}, {"extra": {"a": True}}, False),
        ({"extra": {"a": [1]}}, {"extra": {"a": [1]}}, False),
        ({"trace": []}, {"trace": []}, False),
        ({"lm": Twin()}, {"lm": Twin()}, False),
        ({"callbacks": []}, {"callbacks": ()}, True),
    ],
    ids=repr,
)
def test_what_shares_a_batch(one: Any, other: Any, share: bool) -> None:
    """Equal plain values, or the same objects; not those that call themselves equal (B 6.7)."""

    def ask(changes: Any) -> Any:
        with dspy.context(**changes):
            return batcher(0)

    with (
        HandClock() as clock,
        dspy.MicroBatcher(lambda items: [len(items)] * len(items), 2, 0.5) as batcher,
    ):
        results = [start(ask, one), start(ask, other)]
        if not share:
            wait_for_waiting(batcher, 2)
            clock.waits.wait_for(1)
            clock.advance(0.5)
        assert answers(results) == ([2, 2] if share else [1, 1])


def wait_for_waiting(batcher: dspy.MicroBatcher[Any, Any], count: int) -> None:
    """Wait until so many batches are being filled."""
    turns = threading.Event()
    for _ in range(int(LIMIT_S * 1000)):
        if len(batcher._line._open) == count:
            return
        turns.wait(0.001)
    raise AssertionError(len(batcher._line._open))


def test_what_a_caller_changes_while_it_waits_is_not_its_neighbours(came: Tally) -> None:
    """They were alike when they came, and the batch stays as that (B 6.7)."""
    mine = {"tenant": {"key": "ours"}}

    def ask(extra: Any) -> Any:
        with dspy.context(extra=extra):
            return batcher(0)

    with dspy.MicroBatcher(
        lambda items: [dspy.settings.extra["of"]["tenant"]["key"] for _ in items], 2, NEVER_S
    ) as batcher:
        first = start(ask, {"of": mine})
        came.wait_for(1)
        mine["tenant"]["key"] = "mine"
        second = start(ask, {"of": {"tenant": {"key": "ours"}}})
        assert answers([first, second]) == ["ours", "ours"]


def test_a_settings_value_that_holds_itself_is_no_trap() -> None:
    """It is told from others by what it is (B 6.7)."""
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with (
        dspy.MicroBatcher(double, max_wait_time=0) as batcher,
        dspy.context(extra=endless),
    ):
        assert batcher(1) == 2


def test_usage_is_divided_among_the_callers() -> None:
    """Each item of a batch counts its own, and still shares requests; the sum is exact (B 6.7)."""
    with FakeServer(dimensions=4) as server:
        embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key="none")
        texts = ["a b", "c d", "e f", "g h i", "j"] * 2
        texts = [f"{text} {number}" for number, text in enumerate(texts)]
        batcher = dspy.MicroBatcher(embedder.embed, 5, NEVER_S)
        with batcher, dspy.track_usage() as usage:
            outcomes = dspy.Parallel(num_threads=5, on_error="return")(
                [(batcher, (text,)) for text in texts]
            )
        spent = [sum(used.prompt_tokens for used in each.usage.values()) for each in outcomes]
        asked = [sum(used.calls for used in each.usage.values()) for each in outcomes]
        words = sum(len(text.split()) for text in texts)
        assert len(server.requests) == 2
        assert sum(spent) == usage.total.prompt_tokens == words
        assert sum(asked) == usage.total.calls == 2
        assert min(spent) >= 2


def test_whoever_counts_shares_with_those_who_do_not() -> None:
    """In whatever order they come (B 6.7)."""
    with FakeServer(dimensions=4) as server:
        embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key="none")

        def count(text: str) -> int:
            with dspy.track_usage() as usage:
                batcher(text)
            return usage.total.prompt_tokens

        with dspy.MicroBatcher(embedder.embed, 4, NEVER_S) as batcher:
            first, second = start(batcher, "a b"), start(batcher, "c d")
            assert answers([start(count, "e f"), start(count, "g h")]) == [2, 2]
            answers([first, second])
        assert len(server.requests) == 1


def test_shares_of_usage_add_up() -> None:
    """Also of details and of prices, and where one caller counts nothing (B 6.7)."""
    whole = UsageTracker()
    one, other = UsageTracker(whole), UsageTracker(whole)
    shared = SharedTracker([one, other, one, None, other, one, other])
    used = Usage(prompt_tokens=101, total_tokens=103, calls=1, details={"cached_tokens": 13})
    shared.add("m", used, 0.7)
    shared.add("n", used, lambda usage: usage.total_tokens * 1.0)
    shared.note("m", "failed")
    assert shared.by_model["m"] == used
    assert shared.counts["m"].failed == 1
    for field in ("prompt_tokens", "total_tokens"):
        share = getattr(one.by_model["m"], field) + getattr(other.by_model["m"], field)
        assert share == getattr(whole.by_model["m"], field)
        assert abs(share - getattr(used, field) * 6 / 7) <= 1
    assert whole.by_model["m"].details["cached_tokens"] in {11, 12}
    assert whole.cost_usd == pytest.approx(0.6 + whole.by_model["n"].total_tokens)


# --- closing -------------------------------------------------------------------------------------


def test_closing_sends_what_waits_and_takes_no_more(came: Tally) -> None:
    """From several threads at once (B 6.7)."""
    held = Held()
    batcher = dspy.MicroBatcher(held, 4, NEVER_S)
    results = [start(batcher, item) for item in range(2)]
    came.wait_for(2)
    closing = [start(batcher.close) for _ in range(3)]
    held.entered.wait_for(1)
    with pytest.raises(ClosedError, match="closed"):
        batcher(2)
    with pytest.raises(RuntimeError):  # what DSPy's raises
        anyio.run(batcher.acall, 2)
    assert not any(each.done() for each in closing)
    held.go.set()
    assert sorted(answers(results)) == [("done", 0), ("done", 1)]
    assert answers(closing) == [None] * 3
    batcher.close()
    anyio.run(batcher.aclose)
    assert len(held.batches) == 1


def test_closing_can_drop_what_waits(came: Tally) -> None:
    """What is under way is answered still (B 6.7)."""
    held = Held()
    batcher = dspy.MicroBatcher(held, 1, 0)
    sent = start(batcher, 0)
    held.entered.wait_for(1)
    waiting = [start(batcher, 1), *start_tasks("trio", batcher.acall, (2,))]
    came.wait_for(3)
    closing = start(lambda: batcher.close(drop=True))
    assert [type(error) for error in errors(waiting)] == [ClosedError] * 2
    assert not closing.done()
    held.go.set()
    assert sent.result(LIMIT_S) == ("done", 0)
    assert closing.result(LIMIT_S) is None
    assert held.batches == [[0]]


@pytest.mark.anyio
async def test_an_async_block_closes_it() -> None:
    """And its loop goes on meanwhile (B 6.7)."""
    async with dspy.MicroBatcher(double, 8, NEVER_S) as batcher:
        results: list[int] = []

        async def ask(item: int) -> None:
            results.append(await batcher.acall(item))

        async with anyio.create_task_group() as group:
            for item in range(3):
                group.start_soon(ask, item)
            await anyio.wait_all_tasks_blocked()
            await batcher.aclose()
    assert sorted(results) == [0, 2, 4]


def test_the_end_of_a_closed_batcher_can_be_given_up() -> None:
    """Whoever waits for it has a deadline too (B 6.7)."""
    held = Held()
    batcher = dspy.MicroBatcher(held, 1, 0)
    result = start(batcher, 0)
    held.entered.wait_for(1)
    with FakeClock(), Deadline(1), pytest.raises(DeadlineExceededError):
        batcher.close()
    held.go.set()
    assert result.result(LIMIT_S) == ("done", 0)
    batcher.close()


def test_an_interrupted_block_waits_for_nothing(came: Tally) -> None:
    """Ctrl-C ends the program within a second (B 6.7)."""
    held = Held()
    batcher = dspy.MicroBatcher(held, 1, 0)
    sent = start(batcher, 0)
    held.entered.wait_for(1)
    waiting = start(batcher, 1)
    came.wait_for(2)
    with pytest.raises(KeyboardInterrupt), batcher:
        raise KeyboardInterrupt
    assert isinstance(waiting.exception(LIMIT_S), ClosedError)
    held.go.set()
    assert sent.result(LIMIT_S) == ("done", 0)


def test_its_own_function_may_close_it(came: Tally) -> None:
    """It cannot wait for itself, and what waits is sent (B 6.7)."""
    batches: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        came.wait_for(2)
        batcher.close()
        return items

    batcher = dspy.MicroBatcher(work, 1, 0)
    assert answers([start(batcher, 1), start(batcher, 2)]) == [1, 2]
    with pytest.raises(ClosedError):
        batcher(3)
    batcher.close()
    assert len(batches) == 2


def test_a_batch_under_way_may_call_inside_while_all_is_closed() -> None:
    """Its callers were let in before (B 6.7)."""
    closing: list[Future[Any]] = []

    def work(items: list[int]) -> list[int]:
        if items == [0]:
            return items
        batcher._line.close(drop=False)
        closing.append(start(batcher.close))
        return [batcher(0) for _ in items]

    batcher = dspy.MicroBatcher(work, 1, 0)
    assert batcher(5) == 0
    assert closing[0].result(LIMIT_S) is None


# --- threads -------------------------------------------------------------------------------------


def test_nothing_runs_while_nothing_is_asked() -> None:
    """One wake-up for each batch, none without, and at last no thread (B 6.7)."""
    with HandClock() as clock:
        batcher = dspy.MicroBatcher(double, 4, 0.5)
        before = len(batcher_threads())
        for turn in range(1, 4):
            results = [start(batcher, item) for item in range(4)]
            assert answers(results) == [0, 2, 4, 6]
            assert clock.waits.count <= 3 * turn
        assert len(batcher_threads()) == before + 1
        waits = clock.waits.count + (clock.waits.count == 0)
        clock.waits.wait_for(waits)
        worker = batcher_threads()[-1]
        for _ in range(20):  # the thread may not wait yet when the clock moves
            clock.advance(LINGER_S)
            worker.join(0.05)
        assert not worker.is_alive()
        assert answers([start(batcher, item) for item in range(4)]) == [0, 2, 4, 6]
        batcher.close()


def test_a_window_costs_two_wakes(came: Tally) -> None:
    """However many items come meanwhile (B 6.7)."""
    with HandClock() as clock, dspy.MicroBatcher(double, 1_000, 0.5) as batcher:
        results = [start(batcher, 0)]
        clock.waits.wait_for(1)
        results += [start(batcher, item) for item in range(1, 50)]
        came.wait_for(50)
        assert clock.waits.count == 1
        clock.advance(0.5)
        assert answers(results) == [2 * item for item in range(50)]


def test_closing_leaves_no_thread() -> None:
    """Also with many at once (B 6.7)."""
    before = set(batcher_threads())
    meet = threading.Barrier(4)

    async def work(items: list[int]) -> list[int]:
        meet.wait(LIMIT_S)
        return items

    with dspy.MicroBatcher(work, 1, 0, max_concurrency=4) as batcher:
        answers([start(batcher, item) for item in range(4)])
        assert len(set(batcher_threads()) - before) == 4
    for thread in set(batcher_threads()) - before:
        thread.join(LIMIT_S)


def test_without_threads_the_caller_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system has no more of them (B 6.7)."""

    def refuse(work: Callable[[], object], name: str) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(batching, "start_thread", refuse)
    batcher = dspy.MicroBatcher(double, 4, NEVER_S)
    assert batcher(2) == 4
    assert anyio.run(batcher.acall, 3) == 6
    assert answers([start(batcher, item) for item in range(8)]) == [2 * item for item in range(8)]
    batcher.close()


def test_ctrl_c_while_a_thread_starts_leaves_nobody_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next call starts another (B 6.7)."""
    real, begun = batching.start_thread, []

    def interrupt(work: Callable[[], object], name: str) -> None:
        begun.append(work)
        if len(begun) == 1:
            raise KeyboardInterrupt
        real(work, name)

    monkeypatch.setattr(batching, "start_thread", interrupt)
    with dspy.MicroBatcher(double, 1, 0) as batcher:
        with pytest.raises(KeyboardInterrupt):
            batcher(1)
        assert batcher(2) == 4
        begun[0]()  # it came too late, and takes nobody's work


def interrupt_at(line: int, fn: Callable[[], Any]) -> bool:
    """Call with a Ctrl-C before that line of those of the line of calls; tell whether it came."""
    passed = 0

    def step(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal passed
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # At the end of such a block no signal is heard before the lock is free.
        if event == "line" and "with self._lock" not in text:
            passed += 1
            if passed == line:
                sys.settrace(before)
                raise KeyboardInterrupt
        return step

    def enter(frame: FrameType, event: str, arg: object) -> Any:
        return step if frame.f_code.co_filename == batching.__file__ else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        fn()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return passed >= line


@pytest.mark.parametrize("is_warm", [False, True])
def test_ctrl_c_between_two_steps_of_a_call_takes_nobody_the_threads(is_warm: bool) -> None:
    """A thread that was chosen and not told, or counted and not started (B 6.7)."""
    for line in itertools.count(1):
        with dspy.MicroBatcher(double, 1, 0) as batcher:
            if is_warm:
                batcher(0)
            came_in_time = interrupt_at(line, lambda: batcher(1))  # called at once
            assert start(batcher, 2).result(LIMIT_S) == 4
        if not came_in_time:
            break
    assert line > 20


@pytest.mark.parametrize("drop", [False, True])
def test_ctrl_c_between_two_steps_of_closing_hangs_nobody(came: Tally, drop: bool) -> None:
    """What waited is answered or dropped, and closing again comes to an end (B 6.7)."""
    for line in itertools.count(1):
        batcher = dspy.MicroBatcher(double, 2, NEVER_S)
        waiting = start(batcher, 1)
        came.wait_for(line)
        came_in_time = interrupt_at(line, lambda: batcher.close(drop=drop))  # noqa: B023
        assert start(batcher.close).result(LIMIT_S) is None
        assert waiting.exception(LIMIT_S) is None or drop
        if not came_in_time:
            break
    assert line > 15


def test_propagated_contexts_do_not_reach_the_function() -> None:
    """That of whoever came first would be there for all (B 6.7)."""
    seen: list[str] = []

    def work(items: list[int]) -> list[int]:
        seen.append(TENANT.get())
        return items

    token = TENANT.set("first")
    try:
        with dspy.propagate_to_threads(), dspy.MicroBatcher(work, max_wait_time=0) as batcher:
            batcher(1)
    finally:
        TENANT.reset(token)
    assert seen == ["nobody's"]


def test_a_batch_leaves_nothing_to_the_next_one() -> None:
    """What the function sets ends with it, though the thread goes on (B 6.7)."""
    seen: list[str] = []

    def work(items: list[str]) -> list[str]:
        seen.append(TENANT.get())
        TENANT.set(items[0])
        return items

    with dspy.MicroBatcher(work, 1, 0) as batcher:
        assert [batcher(item) for item in "abc"] == ["a", "b", "c"]
    assert seen == ["nobody's"] * 3


def test_closing_waits_for_the_loops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process that ends then says so on stderr (B 6.7)."""
    ends, may_end = threading.Event(), threading.Event()

    def end() -> None:
        ends.set()
        assert may_end.wait(LIMIT_S)

    monkeypatch.setattr(batching, "end_kept_loop", end)
    batcher = dspy.MicroBatcher(double, 1, 0)
    assert batcher(1) == 2
    closing = start(batcher.close)
    assert ends.wait(LIMIT_S)
    assert not closing.done()
    may_end.set()
    assert closing.result(LIMIT_S) is None


# --- copies and processes ------------------------------------------------------------------------


def test_copies_have_the_parameters_and_nobody_waits_there(came: Tally) -> None:
    """A closed one gives an open one (B 6.7)."""
    with dspy.MicroBatcher(double, 3, NEVER_S, max_concurrency=2, max_queue=9) as batcher:
        waiting = start(batcher, 1)
        came.wait_for(1)
        for twin in (
            pickle.loads(pickle.dumps(batcher)),
            copy.copy(batcher),
            copy.deepcopy(batcher),
        ):
            assert twin.__getstate__() == batcher.__getstate__()
            with twin:
                assert answers([start(twin, item) for item in range(3)]) == [0, 2, 4]
        assert not waiting.done()
    assert waiting.result(LIMIT_S) == 2
    with copy.copy(batcher) as twin:
        assert answers([start(twin, item) for item in range(3)]) == [0, 2, 4]


def test_a_copy_shares_a_function_that_cannot_be_copied() -> None:
    """Such as a method of something with a lock: programs are copied with all they have (B 6.7)."""

    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def work(self, items: list[int]) -> list[int]:
            return items

    fn = Locked().work
    twin = copy.deepcopy(dspy.MicroBatcher(fn))
    assert twin.batch_fn is fn
    assert "work, max_batch_size=32, max_wait_time=0.1)" in repr(twin)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_with_nobody_waiting(came: Tally) -> None:
    """Neither the lock nor the threads of the parent are there (B 6.7)."""
    batcher = dspy.MicroBatcher(double, 2, NEVER_S)
    waiting = start(batcher, 1)
    came.wait_for(1)

    def child(queue: Any) -> None:
        results = [start(batcher, item) for item in (5, 6)]
        queue.put(answers(results))

    method = multiprocessing.get_context("fork")
    queue = method.SimpleQueue()
    with batcher._line._lock:
        process = method.Process(target=child, args=(queue,))
        process.start()
    assert queue.get() == [10, 12]
    process.join(LIMIT_S)
    assert not waiting.done()
    batcher.close()
    assert waiting.result(LIMIT_S) == 2


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import dspylite as dspy, threading, atexit, os, signal\n" + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


EXITS = {
    "idle": "b = dspy.MicroBatcher(list)\nprint(b(1))",
    "never_called": "b = dspy.MicroBatcher(list)\nprint(1)",
    "closed_async": (
        "async def work(items): return items\n"
        "with dspy.MicroBatcher(work, max_wait_time=0) as b: print(b(1))"
    ),
    "unclosed_async": (
        "async def work(items): return items\n"
        "b = dspy.MicroBatcher(work, max_wait_time=0)\nprint(b(1))"
    ),
    "under_way_for_a_daemon": (
        "entered = threading.Event()\n"
        "def work(items): entered.set(); threading.Event().wait(60)\n"
        "b = dspy.MicroBatcher(work, max_wait_time=0)\n"
        "threading.Thread(target=b, args=(1,), daemon=True).start()\n"
        "entered.wait(30); print(1)"
    ),
    # Others' threads go on when the main one has ended; then no thread can be started any more.
    "thread_after_main": (
        "b = dspy.MicroBatcher(list, max_wait_time=0.01)\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    print(b(1))\n"
        "threading.Thread(target=late).start()"
    ),
    "thread_over_main": (
        "b = dspy.MicroBatcher(list, 2, 0.3)\nthreading.Thread(target=lambda: print(b(1))).start()"
    ),
    "atexit": "b = dspy.MicroBatcher(list, 2, 0.01)\natexit.register(lambda: print(b(1)))",
}


@pytest.mark.parametrize("case", EXITS)
def test_a_process_ends_in_silence_and_no_answer_is_lost(case: str) -> None:
    """Closed or not (B 6.7)."""
    done = run(EXITS[case])
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "1", "")


def test_ctrl_c_ends_the_wait_of_the_main_thread_alone() -> None:
    """Its item is taken back; its neighbour is answered (B 6.7)."""
    done = run(
        "from dspylite.concurrency.batching import Line\n"
        "sent = []\n"
        "b = dspy.MicroBatcher(lambda items: sent.append(items) or items, 3, 1000)\n"
        "add = Line.add\n"
        "def added(line, call):\n"
        "    add(line, call)\n"
        "    if call.item == 1: threading.Thread(target=stop, args=(call,)).start()\n"
        "def stop(call):\n"
        "    while call.wake is None: pass\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "Line.add = added\n"
        "out = []\n"
        "neighbour = threading.Thread(target=lambda: out.append(b(2)))\n"
        "neighbour.start()\n"
        "try: b(1)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "b.close(); neighbour.join(); print(sent, out)\n"
    )
    assert (done.stdout, done.stderr) == ("interrupted\n[[2]] [2]\n", "")


# --- DSPy's documented use -----------------------------------------------------------------------


def test_dspys_name_and_use() -> None:
    """By its path, as a function in threads, and in a block (B 6.7)."""
    Unbatchify: Any = importlib.import_module("dspylite.utils.unbatchify").Unbatchify  # noqa: N806
    assert Unbatchify is dspy.Unbatchify is dspy.MicroBatcher
    sizes: list[int] = []

    def batch_fn(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        return [item * item for item in batch]

    with Unbatchify(batch_fn=batch_fn, max_batch_size=5, max_wait_time=0.05) as single:
        results = [start(lambda item=item: single(input_item=item)) for item in range(12)]
        assert answers(results) == [item * item for item in range(12)]
    assert max(sizes) <= 5
    assert sum(sizes) == 12


# --- all of it together --------------------------------------------------------------------------

TEXTS, PRODUCERS = 10_000, 50


def fails_where_bad(body: Any) -> Reply:
    is_bad = any("bad" in text for text in body["input"])
    return Reply(status=400, text="bad text") if is_bad else Reply()


class Judge:
    """What became of each text."""

    def __init__(self) -> None:
        self.ended = Tally()
        self.outcomes: dict[str, list[Any]] = {}
        self._lock = threading.Lock()

    def note(self, text: str, outcome: Any) -> None:
        with self._lock:
            self.outcomes.setdefault(text, []).append(outcome)
        self.ended.up()


def test_ten_thousand_texts_from_fifty_producers() -> None:
    """With failing requests, callers that leave and a shutdown, and the server agrees (B 6.7)."""
    rng = random.Random(7)
    texts = [f"{'bad' if rng.random() < 0.002 else 'text'} {number}" for number in range(TEXTS)]
    leavers = {text for text in texts if rng.random() < 0.03}
    shares = [texts[place::PRODUCERS] for place in range(PRODUCERS)]
    judge = Judge()

    with FakeServer(dimensions=4, answer=fails_where_bad, max_recorded=None) as server:
        embedder = dspy.Embedder(
            "openai/m", api_base=server.base_url, api_key="none", num_retries=0, caching=False
        )
        batcher = dspy.MicroBatcher(embedder.embed, 32, 0.01, max_concurrency=4)

        def produce(share: list[str]) -> None:
            for text in share:
                try:
                    if text in leavers:
                        with Cancellation() as flag:
                            timer = threading.Thread(target=flag.cancel, args=("left",))
                            timer.start()
                            judge.note(text, batcher(text))
                    else:
                        judge.note(text, batcher(text))
                except Exception as error:  # noqa: BLE001  # judged below
                    judge.note(text, error)

        async def aproduce(share: list[str]) -> None:
            for text in share:
                try:
                    if text in leavers:
                        with anyio.CancelScope() as scope:
                            async with anyio.create_task_group() as group:

                                async def leave(scope: anyio.CancelScope = scope) -> None:
                                    for _ in range(rng.randrange(40)):
                                        await anyio.lowlevel.checkpoint()
                                    scope.cancel()

                                group.start_soon(leave)
                                judge.note(text, await batcher.acall(text))
                                scope.cancel()
                        if text not in judge.outcomes:
                            judge.note(text, CallCancelledError("left"))
                    else:
                        judge.note(text, await batcher.acall(text))
                except BaseExceptionGroup as group_error:
                    judge.note(text, group_error.exceptions[0])
                except Exception as error:  # noqa: BLE001  # judged below
                    judge.note(text, error)

        threads = [start(produce, share) for share in shares[:24]]
        loops = [
            *start_tasks("asyncio", aproduce, shares[24:33]),
            *start_tasks("asyncio", aproduce, shares[33:42]),
            *start_tasks("trio", aproduce, shares[42:]),
        ]
        judge.ended.wait_for(TEXTS * 7 // 10)
        batcher.close()
        assert answers([*threads, *loops]) == [None] * PRODUCERS

        answered: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        for request in server.requests:
            inputs: Any = request.json["input"]
            assert len(inputs) <= 32
            sent.update(inputs)
            if request.status == 200:
                answered.update(inputs)

        assert server.in_flight == 0
        assert set(judge.outcomes) == set(texts)
        kinds: Counter[str] = Counter()
        for text, (outcome, *more) in judge.outcomes.items():
            assert not more
            if not isinstance(outcome, Exception):
                kinds["answered"] += 1
                assert outcome.tolist() == list(server.vector(text))
                assert answered[text] == 1
            elif isinstance(outcome, dspy.LMInvalidRequestError):
                kinds["failed"] += 1
                assert text.startswith("bad")  # the embedder finds it among its neighbours
                assert (sent[text] > 0, answered[text]) == (True, 0)
            elif isinstance(outcome, ClosedError):
                kinds["closed"] += 1
                assert text not in sent
            else:
                assert isinstance(outcome, CallCancelledError), outcome
                kinds["left"] += 1
                assert text in leavers
                assert answered[text] <= 1
        assert min(kinds[kind] for kind in ("answered", "failed", "closed", "left")) > 0, kinds
        assert kinds["answered"] > TEXTS // 3
        assert len(server.requests) < TEXTS // 4
