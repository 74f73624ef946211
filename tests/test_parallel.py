"""Batches: order, outcomes, limits, nothing lost and nothing run twice (B 2.1 to 2.5, 2.7)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.testing import FakeLM
from tests.batch_forms import Run, forms, on_threads


def double(x: int) -> int:
    """Give twice the number."""
    return 2 * x


class Halve(dspy.Module):
    """Halves even numbers and refuses odd ones."""

    def forward(self, x: int) -> int:
        if x % 2:
            raise ValueError(f"{x} is odd")
        return x // 2


@forms
def test_results_come_in_input_order(run: Run) -> None:
    """Whoever finishes first, result i belongs to item i (B 2.2)."""
    assert run(dspy.Parallel(num_threads=4), [(double, (x,)) for x in range(50)]) == [
        2 * x for x in range(50)
    ]


def test_the_last_item_to_finish_still_stands_first() -> None:
    """Item 0 ends only after all others did."""
    others_done = threading.Semaphore(0)

    def work(x: int) -> int:
        if x == 0:
            for _ in range(7):
                assert others_done.acquire(timeout=5)
        else:
            others_done.release()
        return x

    assert dspy.Parallel(num_threads=8)([(work, (x,)) for x in range(8)]) == list(range(8))


@forms
@pytest.mark.parametrize(
    "inputs",
    [
        {"x": 4},
        (4,),
        [4],
        4,
        dspy.Example(x=4, label="two").with_inputs("x"),
    ],
    ids=["dict", "tuple", "list", "value", "example"],
)
def test_every_form_of_inputs_is_understood(run: Run, inputs: Any) -> None:
    """DSPy programs pass all of these (B 2.1)."""

    def program(x: int) -> int:
        return x // 2

    assert run(dspy.Parallel(), [(program, inputs)]) == [2]


@forms
def test_any_iterable_will_do(run: Run) -> None:
    """Lists, generators and other iterables (B 2.1)."""
    for pairs in (
        [(double, (1,))],
        ((double, (1,)) for _ in range(1)),
        itertools.repeat((double, (1,)), 1),
        {"only": (double, (1,))}.values(),
    ):
        assert run(dspy.Parallel(num_threads=2), pairs) == [2]


async def test_an_async_iterable_will_do() -> None:
    """Items that arrive over time (B 2.1)."""

    async def pairs() -> AsyncIterator[Any]:
        for x in range(10):
            await anyio.sleep(0)
            yield double, (x,)

    assert await dspy.Parallel(num_threads=3).acall(pairs()) == [2 * x for x in range(10)]


def test_the_sync_form_names_the_async_one_for_an_async_iterable() -> None:
    """The remedy stands in the error."""

    async def pairs() -> AsyncIterator[Any]:
        yield double, (1,)

    with pytest.raises(dspy.InputFieldError, match="acall"):
        dspy.Parallel()(pairs())  # type: ignore[arg-type]


@forms
def test_an_empty_input_gives_an_empty_result(run: Run) -> None:
    """It must not hang either."""
    assert run(dspy.Parallel(), []) == []
    assert run(dspy.Parallel(), iter(())) == []


def test_the_input_is_read_only_as_workers_become_free() -> None:
    """A million rows are never read into memory ahead of the work (B 2.1)."""
    read: list[int] = []
    busy, release = threading.Barrier(3), threading.Event()

    def work(_: int) -> None:
        if not release.is_set():
            busy.wait(5)
            assert release.wait(5)

    def pairs() -> Iterator[Any]:
        for x in range(100):
            read.append(x)
            yield work, (x,)

    thread = threading.Thread(target=dspy.Parallel(num_threads=2), args=(pairs(),))
    thread.start()
    busy.wait(5)
    assert len(read) == 2
    release.set()
    thread.join(5)
    assert len(read) == 100


def test_memory_beyond_the_results_stays_constant() -> None:
    """Four times the items take four times the results and nothing else (B 2.1)."""

    def peak(count: int) -> int:
        tracemalloc.start()
        results = dspy.Parallel(num_threads=2)((double, (1,)) for _ in range(count))
        assert len(results) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(100)
    assert peak(8_000) < 8 * peak(2_000)


@forms
def test_all_items_are_tried_and_all_results_kept_when_some_fail(run: Run) -> None:
    """990 good results of 1,000 must not be thrown away (B 2.2)."""
    with pytest.raises(dspy.BatchError, match="10 of 100 items failed") as caught:
        run(dspy.Parallel(num_threads=4), [(Halve(), {"x": x}) for x in _every_tenth_odd(100)])
    error = caught.value
    assert sorted(error.errors) == list(range(0, 100, 10))
    assert len(error.results) == 90
    assert error.results[1] == 1
    assert error.untried == 0
    assert error.__cause__ is error.errors[0]


def _every_tenth_odd(count: int) -> list[int]:
    return [2 * x + (x % 10 == 0) for x in range(count)]


@forms
def test_on_error_return_gives_an_outcome_per_item(run: Run) -> None:
    """A failure is never a bare None (B 2.2)."""
    outcomes = run(
        dspy.Parallel(num_threads=2, on_error="return"),
        [(Halve(), {"x": 4}), (Halve(), {"x": 5}), (lambda: None, ())],
    )
    assert [(o.index, o.ok, o.value, o.attempts) for o in outcomes] == [
        (0, True, 2, 1),
        (1, False, None, 1),
        (2, True, None, 1),
    ]
    assert str(outcomes[1].error) == "5 is odd"
    assert outcomes[0].seconds >= 0
    assert outcomes[2].unwrap() is None
    with pytest.raises(ValueError, match="5 is odd"):
        outcomes[1].unwrap()


@forms
def test_dspys_triple_is_given_on_request(run: Run) -> None:
    """`return_failed_examples=True` is DSPy's own form (B 2.2)."""
    bad = (Halve(), {"x": 5})
    results, failed, errors = run(
        dspy.Parallel(num_threads=2, return_failed_examples=True), [(Halve(), {"x": 4}), bad]
    )
    assert (results, failed) == ([2, None], [bad])
    assert [str(error) for error in errors] == ["5 is odd"]


@forms
def test_max_errors_stops_taking_items_and_says_what_was_not_tried(run: Run) -> None:
    """The bound is the user's; what finished is kept (B 2.2)."""
    ran: list[int] = []

    def work(x: int) -> None:
        ran.append(x)
        raise KeyError(x)

    with pytest.raises(dspy.BatchError, match="limit of 3 errors") as caught:
        run(dspy.Parallel(num_threads=1, max_errors=3), [(work, (x,)) for x in range(10)])
    assert ran == [0, 1, 2]
    assert caught.value.untried == 7
    outcomes = run(
        dspy.Parallel(num_threads=1, max_errors=3, on_error="return"),
        [(work, (x,)) for x in range(10)],
    )
    assert len(outcomes) == 10
    assert isinstance(outcomes[9].error, dspy.ItemSkippedError)
    assert outcomes[9].attempts == 0


def test_an_item_read_after_the_batch_stopped_is_not_run() -> None:
    """The caller has its results already; a late item would be paid for and lost."""
    reading, go_on = threading.Event(), threading.Event()
    ran: list[str] = []

    def fail() -> None:
        assert reading.wait(5)
        raise KeyError("stops the batch")

    def pairs() -> Iterator[Any]:
        yield fail, ()
        reading.set()
        assert go_on.wait(5)
        yield ran.append, ("late",)

    with pytest.raises(dspy.BatchError, match="limit of 1 errors"):
        dspy.Parallel(num_threads=2, max_errors=1)(pairs())
    workers = [t for t in threading.enumerate() if t.name.startswith("dspylite-worker")]
    go_on.set()
    for worker in workers:
        worker.join(5)
    assert ran == []


class NeverCompared:
    """Raises when somebody compares it or asks for its truth."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("asked for its truth")

    def __repr__(self) -> str:
        return "NeverCompared()"


@forms
@pytest.mark.parametrize(
    "value",
    [NeverCompared(), None, "cancelled", ValueError("a value"), KeyboardInterrupt, float("nan")],
    ids=repr,
)
def test_values_are_never_compared(run: Run, value: Any) -> None:
    """Arrays, exceptions, None and odd strings are results like others (B 2.3)."""
    (result,) = run(dspy.Parallel(), [(lambda: value, ())])
    assert result is value
    with pytest.raises(dspy.BatchError) as caught:
        run(dspy.Parallel(), [(lambda: value, ()), (Halve(), {"x": 5})])
    assert caught.value.results[0] is value


@forms
def test_numpy_arrays_are_results(run: Run) -> None:
    """`if result` on an array raises (B 2.3)."""
    np = pytest.importorskip("numpy")
    (result,) = run(dspy.Parallel(), [(lambda: np.zeros(3), ())])
    assert result.shape == (3,)


@forms
def test_a_parallel_used_twice_reports_only_its_own_run(run: Run) -> None:
    """No state stays between calls (B 2.4)."""
    parallel = dspy.Parallel(num_threads=2, on_error="return")
    first = run(parallel, [(Halve(), {"x": 5})])
    second = run(parallel, [(Halve(), {"x": 4})])
    assert [o.ok for o in first] == [False]
    assert [o.ok for o in second] == [True]


def test_a_parallel_used_by_eight_threads_at_once_reports_each_run_to_its_caller() -> None:
    """No state is shared between runs (B 2.4)."""
    parallel, barrier = dspy.Parallel(num_threads=2, on_error="return"), threading.Barrier(8)
    results: dict[int, list[Any]] = {}

    def use(number: int) -> None:
        def work(x: int) -> tuple[int, int]:
            if x == 3:
                raise ValueError(number)
            return number, x

        barrier.wait(5)
        results[number] = [
            o.value if o.ok else o.error.args for o in parallel([(work, (x,)) for x in range(20)])
        ]

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for number in range(8):
        expected: list[Any] = [(number, x) for x in range(20)]
        expected[3] = (number,)
        assert results[number] == expected


@forms
def test_every_item_runs_exactly_once(run: Run) -> None:
    """Stragglers are never run again: each run may be a paid call (B 2.5)."""
    ran: list[int] = []
    run(
        dspy.Parallel(num_threads=8, timeout=0, straggler_limit=100),
        [(ran.append, (x,)) for x in range(200)],
    )
    assert sorted(ran) == list(range(200))


def test_a_hung_item_is_reported_and_holds_up_nobody() -> None:
    """With one thread, the items behind a hung one still run (B 2.5)."""
    release = threading.Event()

    def work(x: int) -> int:
        if x == 1:
            release.wait(30)
        return x

    outcomes = dspy.Parallel(num_threads=1, on_error="return", timeout_s=0.2)(
        [(work, (x,)) for x in range(5)]
    )
    release.set()
    assert [o.ok for o in outcomes] == [True, False, True, True, True]
    error = outcomes[1].error
    assert isinstance(error, dspy.ItemTimeoutError)
    assert (error.index, error.timeout_s) == (1, 0.2)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_hung_task_is_cancelled_and_reported(backend: str) -> None:
    """The async form cancels what takes too long (B 2.5)."""
    cancelled: list[int] = []

    async def work(x: int) -> int:
        if x == 1:
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.append(x)
        return x

    parallel = dspy.Parallel(num_threads=1, on_error="return", timeout_s=0.1)
    outcomes = anyio.run(parallel.acall, [(work, (x,)) for x in range(3)], backend=backend)
    assert [o.ok for o in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, dspy.ItemTimeoutError)
    assert cancelled == [1]


def test_a_late_result_of_a_given_up_item_is_not_used() -> None:
    """An item reported as timed out stays so."""
    release, done = threading.Event(), threading.Event()

    def work() -> str:
        release.wait(30)
        done.set()
        return "late"

    outcomes = dspy.Parallel(on_error="return", timeout_s=0.05)([(work, ())])
    release.set()
    assert done.wait(5)
    assert not outcomes[0].ok


@forms
def test_the_total_time_bounds_the_batch(run: Run) -> None:
    """Finished results are kept, items under way time out, the rest are not tried (B 2.5)."""
    release = threading.Event()

    async def hang() -> None:
        await anyio.sleep_forever()

    def block() -> None:
        release.wait(30)

    hung = block if run is on_threads else hang
    outcomes = run(
        dspy.Parallel(num_threads=2, on_error="return", total_timeout_s=0.3),
        [(double, (1,)), (hung, ()), (hung, ()), (double, (2,))],
    )
    release.set()
    assert outcomes[0].value == 2
    assert isinstance(outcomes[1].error, dspy.ItemTimeoutError)
    assert isinstance(outcomes[2].error, dspy.ItemTimeoutError)
    assert isinstance(outcomes[3].error, dspy.ItemSkippedError)


@forms
def test_a_batch_cut_short_between_items_does_not_look_complete(run: Run) -> None:
    """Time runs out while a slow input is read: no item failed, yet some were not taken (B 2.2)."""
    over = threading.Event()

    def slowly() -> Iterator[Any]:
        yield double, (1,)
        over.wait(0.3)
        yield double, (2,)

    async def aslowly() -> AsyncIterator[Any]:
        yield double, (1,)
        await anyio.sleep(0.3)
        yield double, (2,)

    source = slowly() if run is on_threads else aslowly()
    with pytest.raises(dspy.BatchError, match=r"stopped because its 0\.1 s were over") as caught:
        run(dspy.Parallel(num_threads=1, total_timeout_s=0.1), source)
    assert caught.value.results == {0: 2}
    assert caught.value.errors == {}


@forms
def test_a_system_exit_is_that_items_error(run: Run) -> None:
    """One item must not end the process (B 2.7)."""

    def leave() -> None:
        raise SystemExit(3)

    outcomes = run(dspy.Parallel(on_error="return"), [(leave, ()), (double, (1,))])
    assert isinstance(outcomes[0].error, SystemExit)
    assert outcomes[1].value == 2


class StrangeExit(BaseException):
    """An exit that is none of Python's own, such as those of test runners."""


@forms
@pytest.mark.parametrize("error", [StrangeExit(), BaseExceptionGroup("", [SystemExit(1)])])
@pytest.mark.parametrize("is_async", [False, True])
def test_any_other_exit_is_that_items_error(run: Run, error: BaseException, is_async: bool) -> None:
    """Threads and tasks tell an item's end from the batch's in the same way (B 2.7)."""

    def leave() -> None:
        raise error

    async def aleave() -> None:
        raise error

    pairs = [(double, (1,)), (aleave if is_async else leave, ()), (double, (2,))]
    outcomes = run(dspy.Parallel(num_threads=2, on_error="return"), pairs)
    assert outcomes[1].error is error
    assert [outcomes[0].value, outcomes[2].value] == [2, 4]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_items_that_wait_for_nothing_do_not_stop_the_loop(backend: str) -> None:
    """Other tasks get their turns, and the total time is kept (B 2.5)."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await anyio.sleep(0)
            turns += 1

    async def at_once() -> None:
        pass

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(count_turns)
            with pytest.raises(dspy.BatchError, match=r"its 0\.3 s were over"):
                await dspy.Parallel(num_threads=4, total_timeout_s=0.3).acall(
                    (at_once, ()) for _ in range(2_000_000)
                )
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    assert turns >= 5


@forms
def test_an_input_that_raises_keeps_what_finished(run: Run) -> None:
    """A broken file half-way through the input loses nothing."""

    def pairs() -> Iterator[Any]:
        yield double, (1,)
        raise OSError("the file ends here")

    with pytest.raises(dspy.BatchError, match="the input raised") as caught:
        run(dspy.Parallel(num_threads=2), pairs())
    assert caught.value.results == {0: 2}
    assert isinstance(caught.value.__cause__, OSError)


@forms
def test_a_malformed_pair_is_that_items_error(run: Run) -> None:
    """Bad rows do not hide good ones."""
    outcomes = run(dspy.Parallel(on_error="return"), [(double, (1,)), "nonsense", (5, (1,))])
    assert [o.ok for o in outcomes] == [True, False, False]
    assert "nonsense" in str(outcomes[1].error)


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": 0},
        {"max_errors": 0},
        {"timeout_s": 0},
        {"total_timeout_s": -1},
        {"on_error": "ignore"},
        {"num_threads": "8"},
    ],
    ids=str,
)
def test_impossible_options_are_refused_when_it_is_made(options: dict[str, Any]) -> None:
    """Mistakes are found before anything runs."""
    with pytest.raises(dspy.SettingsError, match=repr(next(iter(options.values())))):
        dspy.Parallel(**options)


class UnsayableError(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise ValueError("no text")


@forms
def test_an_error_that_cannot_be_told_costs_no_result(run: Run) -> None:
    """`str()` of an item's error raises; the batch still tells what it has (B 2.2)."""

    async def fail_at_one(x: int) -> int:
        if x == 1:
            raise UnsayableError
        return x

    with pytest.raises(dspy.BatchError, match=r"The first error: UnsayableError\.") as caught:
        run(
            dspy.Parallel(num_threads=2),
            [(fail_at_one, (x,)) for x in range(4)],
        )
    assert caught.value.results == {0: 0, 2: 2, 3: 3}


@forms
def test_an_input_that_does_not_know_its_length_will_do(run: Run) -> None:
    """A wrapper around a generator has a `__len__` that raises, as that of `tqdm` does (B 2.1)."""

    class Shown:
        def __iter__(self) -> Iterator[Any]:
            return ((double, (x,)) for x in range(3))

        def __len__(self) -> int:
            raise TypeError("object of type 'generator' has no len()")

    assert run(dspy.Parallel(num_threads=2), Shown()) == [0, 2, 4]


@forms
def test_an_input_that_is_shorter_than_it_says_has_no_missing_items(run: Run) -> None:
    """Its length was an estimate; only what it gave is an item (B 2.2)."""

    class Estimate:
        def __iter__(self) -> Iterator[Any]:
            return ((double, (x,)) for x in range(3))

        def __len__(self) -> int:
            return 5

    outcomes = run(dspy.Parallel(num_threads=2, on_error="return"), Estimate())
    assert [outcome.value for outcome in outcomes] == [0, 2, 4]


def test_something_that_is_no_batch_is_refused() -> None:
    """A single input in place of a list is a likely slip."""
    with pytest.raises(dspy.InputFieldError, match="5"):
        Halve().batch(5)  # type: ignore[arg-type,call-overload]


def test_progress_is_reported_after_each_item() -> None:
    """(done, total, errors), and the last report is complete."""
    reports: list[tuple[int, int | None, int]] = []
    dspy.Parallel(num_threads=2, on_error="return", progress=lambda *r: reports.append(r))(
        [(Halve(), {"x": x}) for x in range(6)]
    )
    assert [r[0] for r in reports] == [1, 2, 3, 4, 5, 6]
    assert {r[1] for r in reports} == {6}
    assert max(r[2] for r in reports) == 3


def test_progress_comes_in_order_and_before_the_results() -> None:
    """A slow report is neither overtaken by a later one nor left behind by the batch."""
    reports: list[int] = []
    first_waits = threading.Event()

    def report(done: int, total: int | None, errors: int) -> None:
        if done == 1:
            first_waits.wait(0.2)  # long enough for the other seven to finish
        reports.append(done)

    dspy.Parallel(num_threads=8, progress=report)([(double, (x,)) for x in range(8)])
    assert reports == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_progress_callback_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged instead."""

    def broken(*_: object) -> None:
        raise KeyError("broken")

    assert dspy.Parallel(progress=broken)([(double, (1,))]) == [2]
    assert "progress callback failed" in caplog.text


@forms
@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), asyncio.CancelledError()])
def test_a_progress_callback_that_wants_to_exit_harms_nothing(
    run: Run, error: BaseException
) -> None:
    """Such an exception once ended the worker, and the batch waited for it for ever (B 2.10)."""

    def leave(done: int, total: int | None, errors: int) -> None:
        del done, total, errors
        raise error

    pairs = [(double, (x,)) for x in range(5)]
    assert run(dspy.Parallel(num_threads=2, progress=leave), pairs) == [0, 2, 4, 6, 8]


def test_a_log_handler_that_raises_does_not_hang_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends and keeps what it has; the handler's error is the thread's."""
    thread_died = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: thread_died.set())

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    handler, log = Broken(), logging.getLogger("dspylite.concurrency.run")
    log.addHandler(handler)
    try:
        with pytest.raises(dspy.BatchError, match=r"a worker failed \(OSError\)") as caught:
            dspy.Parallel(num_threads=1, provide_traceback=True)(
                (Halve(), {"x": x}) for x in range(4)
            )
    finally:
        log.removeHandler(handler)
    assert thread_died.wait(5)
    assert caught.value.results == {0: 0}
    assert isinstance(caught.value.errors[1], ValueError)


def test_the_progress_bar_stays_off_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    """stdout stays empty, and a log file gets no control characters."""
    dspy.Parallel(progress=True)([(double, (1,))])
    assert capfd.readouterr() == ("", "")


def test_a_run_keeps_the_settings_of_its_start() -> None:
    """A batch is never split by a later `configure`."""
    old = dspy.settings.max_history_size

    def work(x: int) -> int:
        if x == 0:
            with pytest.warns(dspy.SettingsWarning):
                dspy.configure(max_history_size=old + 1)
        return dspy.settings.max_history_size

    try:
        values = dspy.Parallel(num_threads=1)([(work, (x,)) for x in range(3)])
    finally:
        dspy.configure(max_history_size=old)
    assert values == [old] * 3


@forms
def test_usage_is_counted_per_item(run: Run) -> None:
    """Each outcome knows its own cost, and the whole is their sum."""
    lm = FakeLM(default="two words")
    with dspy.track_usage() as tracker:
        outcomes = run(
            dspy.Parallel(num_threads=2, on_error="return"),
            [(lm, {"prompt": "word " * count}) for count in (1, 2, 3)],
        )
    assert [o.usage["fake/lm"].prompt_tokens for o in outcomes] == [1, 2, 3]
    assert tracker.total.prompt_tokens == 6


def test_three_levels_of_eight_finish_on_few_threads() -> None:
    """8 x 8 x 8 nested batches share the threads of the outermost."""
    most = 0
    lock = threading.Lock()

    def leaf(x: int) -> int:
        nonlocal most
        alive = [t for t in threading.enumerate() if t.name.startswith("dspylite-worker")]
        with lock:
            most = max(most, len(set(alive) - others))
        return x

    def level(depth: int) -> list[Any]:
        if depth == 0:
            return dspy.Parallel(num_threads=8)([(leaf, (x,)) for x in range(8)])
        return dspy.Parallel(num_threads=8)([(level, (depth - 1,)) for _ in range(8)])

    others = set(threading.enumerate())  # late workers of other tests
    assert level(2) == [[list(range(8))] * 8] * 8
    assert most <= 8 + 3  # one that has given its place back may not have left yet


def test_a_nested_batch_with_a_time_limit_finishes_when_no_thread_is_free() -> None:
    """The thread that keeps the time does not work, so another must be found."""

    def outer(_: int) -> list[Any]:
        return dspy.Parallel(num_threads=4, timeout_s=5)([(double, (x,)) for x in range(4)])

    assert dspy.Parallel(num_threads=2)([(outer, (x,)) for x in range(4)]) == [[0, 2, 4, 6]] * 4


def test_an_interrupt_of_the_caller_stops_the_taking_of_items() -> None:
    """The error reaches the caller at once, and workers take nothing more (B 2.6)."""
    started, release = threading.Event(), threading.Event()
    ran: list[int] = []

    def work(x: int) -> None:
        ran.append(x)
        started.set()
        release.wait(10)

    def items() -> Iterator[Any]:
        yield work, (0,)
        assert started.wait(5)
        import _thread

        _thread.interrupt_main()
        yield from ((work, (x,)) for x in range(1, 50))

    with pytest.raises(KeyboardInterrupt):
        dspy.Parallel(num_threads=2)(items())
    release.set()
    assert len(ran) <= 2


def test_the_cancellation_of_another_task_is_an_items_error() -> None:
    """An item that awaits a cancelled task fails; its worker and the batch go on (B 2.2)."""

    async def work(x: int) -> int:
        if x < 3:
            other = asyncio.ensure_future(asyncio.sleep(20))
            other.cancel()
            await other
        return x

    outcomes = anyio.run(
        dspy.Parallel(num_threads=2, on_error="return").acall, [(work, (x,)) for x in range(6)]
    )
    assert [outcome.ok for outcome in outcomes] == [False] * 3 + [True] * 3
    assert all(isinstance(o.error, asyncio.CancelledError) for o in outcomes[:3])
    with pytest.raises(dspy.BatchError, match="3 of 6 items failed"):
        anyio.run(dspy.Parallel(num_threads=2).acall, [(work, (x,)) for x in range(6)])


@forms
@pytest.mark.parametrize("options", [{"on_error": "return"}, {"return_failed_examples": True}])
def test_a_list_that_was_cut_says_so_in_every_form(run: Run, options: dict[str, Any]) -> None:
    """Of an input of unknown length, a shorter list would pass for the whole (B 2.2)."""

    def refuse(x: int) -> int:
        if x == 2:
            raise ValueError("stops the batch")
        return x

    pairs = ((refuse, (x,)) for x in itertools.count())
    found = run(dspy.Parallel(num_threads=1, max_errors=1, **options), pairs)
    last = found[-1].error if isinstance(found, list) else found[2][-1]
    assert isinstance(last, dspy.ItemSkippedError)
    assert last.index == 3
    assert "limit of 1 errors was reached, and so were all items after it" in str(last)


def test_an_error_over_a_cut_input_does_not_guess_what_was_untried() -> None:
    """A count of the items that happened to be read would mislead (B 2.2)."""

    def refuse(x: int) -> int:
        raise ValueError("stops the batch")

    pairs = ((refuse, (x,)) for x in itertools.count())
    with pytest.raises(dspy.BatchError, match="nobody knows how many were not tried") as raised:
        dspy.Parallel(num_threads=1, max_errors=1)(pairs)
    assert raised.value.untried is None


def test_an_async_progress_callback_is_refused() -> None:
    """It would never be awaited (B 2.10)."""

    async def told(done: int, total: int | None, errors: int) -> None: ...

    with pytest.raises(dspy.SettingsError, match="must not be async"):
        dspy.Parallel(progress=told)


def test_a_forked_item_may_run_a_batch_of_its_own() -> None:
    """The other workers, and whatever they held, stay behind in the parent (B 7.3)."""

    def forking(x: int) -> int:
        child = os.fork()
        if child == 0:
            try:
                found = dspy.Parallel(num_threads=2)([(double, (n,)) for n in range(8)])
                os._exit(found != [2 * n for n in range(8)])
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert dspy.Parallel(num_threads=4)([(forking, (x,)) for x in range(8)]) == [0] * 8


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_list_that_changes_meanwhile_gives_no_wrong_results(change: str) -> None:
    """The batch is over what the list held at first; what is gone is said to be (B 2.2)."""
    items: list[Any] = [{"x": x} for x in range(0, 20, 2)]

    class Changing(dspy.Module):
        def forward(self, x: int) -> int:
            if x == 0 and change == "longer":
                items.extend({"x": x} for x in range(100))
            elif x == 0:
                del items[5:]
            return x

    if change == "longer":
        assert Changing().batch(items, num_threads=1) == list(range(0, 20, 2))
    else:
        with pytest.raises(dspy.BatchError) as raised:
            Changing().batch(items, num_threads=1)
        assert raised.value.results == {n: 2 * n for n in range(5)}
        assert raised.value.untried == 5
