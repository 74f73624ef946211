"""A second start for items that take long, where it is asked for, and never otherwise (B 2.5)."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.testing import FakeLM, FakeServer
from tests.batch_forms import Run, as_tasks, as_tasks_on_trio, forms, on_threads

AT_ONCE = 0.02  # so soon that any item which waits for something is started again


class Attempts:
    """Tells the attempts at an item apart: the original is number 0."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.begun = [threading.Event() for _ in range(4)]

    def begin(self) -> int:
        number = next(self._numbers)
        self.begun[number].set()
        return number


def hedged(run: Run, work: Callable[[], Any], **options: Any) -> dspy.Outcome[Any]:
    parallel = dspy.Parallel(
        num_threads=1, on_error="return", **{"hedge_after_s": AT_ONCE, **options}
    )
    (outcome,) = run(parallel, [(work, ())])
    return outcome  # type: ignore[no-any-return]


@forms
def test_no_item_is_started_twice_unless_asked(run: Run) -> None:
    """Each start may be a paid call (B 2.5)."""
    begun: list[int] = []
    release = threading.Event()

    def work(x: int) -> None:
        begun.append(x)
        release.wait(AT_ONCE * 5)

    outcomes = run(dspy.Parallel(num_threads=4, on_error="return"), [(work, (x,)) for x in "abcd"])
    assert sorted(begun) == list("abcd")
    assert [outcome.attempts for outcome in outcomes] == [1] * 4


@forms
def test_an_item_that_ends_in_time_is_not_started_again(run: Run) -> None:
    """The copy is for stragglers (B 2.5)."""
    begun: list[int] = []
    outcomes = run(
        dspy.Parallel(num_threads=4, on_error="return", hedge_after_s=20),
        [(begun.append, (x,)) for x in range(50)],
    )
    assert sorted(begun) == list(range(50))
    assert {outcome.attempts for outcome in outcomes} == {1}


@forms
def test_there_is_one_copy_at_most(run: Run) -> None:
    """However long both take (B 2.5)."""
    begun: list[int] = []
    lock = threading.Lock()
    release = threading.Event()

    def work(x: int) -> None:
        with lock:
            begun.append(x)
            if len(begun) == 4:  # two items, twice each
                threading.Timer(AT_ONCE * 5, release.set).start()
        assert release.wait(20)

    outcomes = run(
        dspy.Parallel(num_threads=2, on_error="return", hedge_after_s=AT_ONCE),
        [(work, (x,)) for x in range(2)],
    )
    assert Counter(begun) == {0: 2, 1: 2}
    assert [(outcome.ok, outcome.attempts) for outcome in outcomes] == [(True, 2)] * 2


@forms
def test_the_copys_result_counts_and_the_original_is_told_to_stop(run: Run) -> None:
    """It sees its flag, wherever it looks (B 2.5)."""
    attempts, told = Attempts(), threading.Event()
    seen: list[str] = []

    def work() -> str:
        if attempts.begin():
            return "the copy's"
        try:
            while not told.wait(0.005):
                dspy.check_cancelled()
        except dspy.CallCancelledError as error:
            seen.append(str(error))
            told.set()
        return "the original's"

    outcome = hedged(run, work)
    assert (outcome.ok, outcome.value, outcome.attempts) == (True, "the copy's", 2)
    assert told.wait(20)
    assert seen == ["Cancelled: the item has ended."]


@forms
def test_the_originals_result_counts_and_the_copy_is_told_to_stop(run: Run) -> None:
    """The copy may be the slower one (B 2.5)."""
    attempts, told = Attempts(), threading.Event()

    def work() -> str:
        if attempts.begin() == 0:
            assert attempts.begun[1].wait(20)
            return "the original's"
        try:
            while not told.wait(0.005):
                dspy.check_cancelled()
        except dspy.CallCancelledError:
            told.set()
        return "the copy's"

    outcome = hedged(run, work)
    assert (outcome.ok, outcome.value, outcome.attempts) == (True, "the original's", 2)
    assert told.wait(20)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_loser_is_cancelled_where_it_is_a_task(backend: str) -> None:
    """It does not go on until it looks (B 2.5)."""
    cancelled: list[int] = []
    numbers = itertools.count()

    async def work() -> int:
        number = next(numbers)
        if number == 0:
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.append(number)
        return number

    outcome = hedged(as_tasks if backend == "asyncio" else as_tasks_on_trio, work)
    assert (outcome.ok, outcome.value, outcome.attempts) == (True, 1, 2)
    assert cancelled == [0]


@forms
def test_the_losers_call_is_broken_off(run: Run) -> None:
    """The server must not go on working for nobody (B 2.5)."""
    attempts = Attempts()
    with FakeServer() as server, server.hold():
        lm = dspy.LM("openai/m", api_base=server.base_url, api_key="k", engine="direct")

        def work() -> str:
            if attempts.begin():
                server.wait_for_requests(1)
                return "the copy's"
            lm("word")
            raise AssertionError("nobody answers")

        assert hedged(run, work).value == "the copy's"
        server.wait_until_idle()
        (request,) = server.requests
        assert request.client_left


@forms
def test_where_both_fail_the_first_error_counts(run: Run) -> None:
    """The second one is often but a consequence (B 2.5)."""
    attempts, copy_failed = Attempts(), threading.Event()

    def work() -> None:
        if attempts.begin():
            copy_failed.set()
            raise ValueError("of the copy, first")
        assert copy_failed.wait(20)
        raise KeyError("of the original")

    outcome = hedged(run, work)
    # The two ends are recorded by their threads in either order.
    assert isinstance(outcome.error, ValueError | KeyError)
    assert outcome.attempts == 2

    def work_in_order() -> None:
        if attempts.begin() == 2:
            assert attempts.begun[3].wait(20)
            raise KeyError("of the original, first")
        dspy.check_cancelled()
        _let_the_other_end()
        raise ValueError("of the copy")

    outcome = hedged(run, work_in_order)
    assert isinstance(outcome.error, KeyError)
    assert outcome.attempts == 2


def _let_the_other_end() -> None:
    threading.Event().wait(0.2)


@forms
def test_the_original_may_fail_while_its_copy_runs(run: Run) -> None:
    """The copy can still save the item (B 2.5)."""
    attempts, original_failed = Attempts(), threading.Event()

    def work() -> str:
        if attempts.begin() == 0:
            assert attempts.begun[1].wait(20)
            original_failed.set()
            raise ValueError("of the original")
        assert original_failed.wait(20)
        _let_the_other_end()
        return "the copy's"

    outcome = hedged(run, work)
    assert (outcome.ok, outcome.value, outcome.error) == (True, "the copy's", None)
    assert outcome.attempts == 2


@forms
def test_an_original_that_fails_before_its_copy_is_due_has_none(run: Run) -> None:
    """Hedging is not retrying (B 2.5)."""
    attempts = Attempts()

    def work() -> None:
        attempts.begin()
        raise ValueError("at once")

    outcome = hedged(run, work, hedge_after_s=20)
    assert outcome.attempts == 1
    assert attempts.begin() == 1


@forms
def test_the_tokens_of_both_attempts_are_counted(run: Run) -> None:
    """Both were paid for (B 2.5, 4.10)."""
    lm = FakeLM(default="two words")
    attempts = Attempts()

    def work() -> None:
        number = attempts.begin()
        lm("one " * (number + 1))
        assert attempts.begun[1].wait(20)
        if number == 0:
            _let_the_other_end()

    with dspy.track_usage() as tracker:
        outcome = hedged(run, work)
    assert outcome.attempts == 2
    assert outcome.usage["fake/lm"].prompt_tokens == 3
    assert tracker.total.prompt_tokens == 3


@forms
def test_a_time_limit_holds_for_both_attempts_together(run: Run) -> None:
    """`timeout_s` is the item's, from its first start (B 2.5)."""
    attempts, release = Attempts(), threading.Event()
    told = threading.Semaphore(0)

    def work() -> None:
        attempts.begin()
        while not release.wait(0.005):
            try:
                dspy.check_cancelled()
            except dspy.CallCancelledError:
                told.release()
                return

    outcome = hedged(run, work, timeout_s=0.3)
    assert isinstance(outcome.error, dspy.ItemTimeoutError)
    assert outcome.attempts == 2
    for _ in range(2):
        assert told.acquire(timeout=20)
    release.set()


@forms
def test_a_straggler_does_not_hold_the_batch(run: Run) -> None:
    """It is what hedging is for; its thread may hang on (B 2.5)."""
    release = threading.Event()
    begun: Counter[int] = Counter()
    lock = threading.Lock()

    def work(x: int) -> int:
        with lock:
            begun[x] += 1
            is_copy = begun[x] == 2
        if x % 10 == 3 and not is_copy:
            release.wait(30)
        return x

    parallel = dspy.Parallel(num_threads=2, on_error="return", hedge_after_s=0.1)
    outcomes = run(parallel, [(work, (x,)) for x in range(40)])
    assert not release.is_set()
    release.set()
    assert [outcome.value for outcome in outcomes] == list(range(40))
    stragglers = {x for x in range(40) if x % 10 == 3}
    assert {o.index for o in outcomes if o.attempts == 2} >= stragglers


@forms
def test_progress_counts_items_and_not_attempts(run: Run) -> None:
    """A hedged or timed-out item ends once (B 2.5, 2.10)."""
    reports: list[tuple[int, int | None, int]] = []
    release = threading.Event()

    def work(x: int) -> int:
        if x % 3 == 0:
            release.wait(30)
        return x

    parallel = dspy.Parallel(
        num_threads=3,
        on_error="return",
        hedge_after_s=AT_ONCE,
        timeout_s=0.3,
        progress=lambda *report: reports.append(report),
    )
    outcomes = run(parallel, [(work, (x,)) for x in range(6)])
    release.set()
    assert [outcome.ok for outcome in outcomes] == [False, True, True] * 2
    assert [report[0] for report in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1] == (6, 6, 2)


def test_a_copy_is_not_needed_where_no_thread_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The original may still end; the batch must not (B 2.5)."""
    first, refused = threading.Event(), threading.Event()
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if first.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        first.set()
        start(thread)

    def work() -> str:
        assert refused.wait(20)
        return "the original's"

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_one)
        outcome = hedged(on_threads, work)
    assert (outcome.value, outcome.attempts) == ("the original's", 1)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_copy_that_comes_too_late_is_not_called_without_its_input(backend: str) -> None:
    """An item that ends just when its copy is due has dropped its input already."""
    inputs: list[int] = []

    async def wait(x: int) -> int:
        inputs.append(x)
        await anyio.sleep(AT_ONCE)
        return x

    async def main() -> list[Any]:
        results: list[Any] = []
        parallel = dspy.Parallel(num_threads=50, hedge_after_s=AT_ONCE)
        async for _, outcome in parallel.aeach(wait, [(x,) for x in range(500)]):
            results.append(outcome.unwrap())
        return results

    assert sorted(anyio.run(main, backend=backend)) == list(range(500))
    assert None not in inputs
