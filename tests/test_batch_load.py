"""Batches under load: many items, several levels, and a system that has no more to give."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.testing import FakeLM
from tests.batch_forms import Run, as_tasks, forms, on_threads

ROOT = Path(__file__).resolve().parent.parent


backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class OddOnes(dspy.Module):
    """Refuses every twentieth number, in either form."""

    def forward(self, x: int) -> dict[str, int]:
        if x % 20 == 7:
            raise ValueError(f"{x} is bad") from KeyError(x)
        return {"x": x}


class AsyncOddOnes(dspy.Module):
    async def aforward(self, x: int) -> dict[str, int]:
        return OddOnes().forward(x)


def test_threads_and_tasks_give_the_same_outcomes_of_10000_items() -> None:
    """The two drivers share one engine, and no outcome depends on which (B 2.2)."""

    def told(outcomes: list[dspy.Outcome[Any]]) -> list[Any]:
        return [(o.index, o.ok, o.value, type(o.error), str(o.error), o.attempts) for o in outcomes]

    inputs = [{"x": x} for x in range(10_000)]
    found = [
        told(OddOnes().batch(inputs, 8, on_error="return")),
        told(anyio.run(lambda: AsyncOddOnes().abatch(inputs, 8, on_error="return"))),
        told(
            anyio.run(lambda: AsyncOddOnes().abatch(inputs, 8, on_error="return"), backend="trio")
        ),
    ]
    assert sum(not row[1] for row in found[0]) == 500
    assert found[0] == found[1] == found[2]


@forms
def test_one_parallel_serves_eight_threads_that_all_meet_errors(run: Run) -> None:
    """Counts, limits and results belong to a run (B 2.4)."""
    parallel, barrier = dspy.Parallel(num_threads=2, max_errors=5), threading.Barrier(8)
    caught: dict[int, dspy.BatchError] = {}

    def use(number: int) -> None:
        def work(x: int) -> tuple[int, int]:
            if x % (number + 2) == 0:
                raise ValueError(number)
            return number, x

        barrier.wait(20)
        try:
            run(parallel, [(work, (x,)) for x in range(200)])
        except dspy.BatchError as error:
            caught[number] = error

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number in range(8):
        error = caught[number]
        assert len(error.errors) in (5, 6)  # the other worker may have been in a bad one too
        assert {e.args for e in error.errors.values()} == {(number,)}
        assert all(value == (number, x) for x, value in error.results.items())
        assert len(error.results) + len(error.errors) + (error.untried or 0) == 200


# --- Several levels ------------------------------------------------------------------------------


class Crowd:
    """Counts how many are inside at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.inside = self.most = 0

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self.inside -= 1


@backends
@pytest.mark.parametrize(("levels", "width"), [(2, 8), (3, 8), (3, 3)])
def test_nested_tasks_share_the_width_of_the_outermost(
    backend: str, levels: int, width: int
) -> None:
    """8 x 8 x 8 items, and never more than 8 at once (B 2.9)."""
    crowd = Crowd()

    async def leaf(x: int) -> int:
        with crowd:
            await anyio.sleep(0.001)
        return x

    async def level(depth: int) -> Any:
        fn, inputs = (leaf, range(8)) if depth == 1 else (level, [depth - 1] * 8)
        return await dspy.Parallel(num_threads=width).acall([(fn, (x,)) for x in inputs])

    async def main() -> Any:
        with anyio.fail_after(30):
            return await level(levels)

    expected: Any = list(range(8))
    for _ in range(levels - 1):
        expected = [expected] * 8
    assert anyio.run(main, backend=backend) == expected
    assert 1 < crowd.most <= width


@backends
def test_sync_batches_inside_a_batch_of_tasks_share_its_width(backend: str) -> None:
    """Items that are sync, or asyncified, and run a batch of their own (B 2.9)."""
    crowd = Crowd()
    alive: list[int] = []

    def leaf(x: int) -> int:
        with crowd:
            alive.append(sum(t.name.startswith("dspylite-worker") for t in threading.enumerate()))
            time.sleep(0.001)
        return x

    def inner(_: int) -> list[int]:
        return dspy.Parallel(num_threads=8)([(leaf, (x,)) for x in range(8)])

    async def asyncified(x: int) -> list[int]:
        return await dspy.asyncify(inner)(x)

    async def main() -> Any:
        with anyio.fail_after(30):
            pairs = [(fn, (x,)) for x in range(8) for fn in (inner, asyncified)]
            return await dspy.Parallel(num_threads=4).acall(pairs)

    assert anyio.run(main, backend=backend) == [list(range(8))] * 16
    assert crowd.most <= 4
    # A thread for each item, one for each batch that has none to spare, and some on their way out.
    assert max(alive) <= 12


@pytest.mark.parametrize(
    "options",
    [{"timeout_s": 20}, {"hedge_after_s": 20}, {"total_timeout_s": 20, "timeout_s": 10}],
    ids=str,
)
@forms
def test_nested_batches_with_limits_finish(run: Run, options: dict[str, float]) -> None:
    """Who keeps the time cannot work, and still nobody waits for ever (B 2.9)."""
    alive: list[int] = []

    def leaf(x: int) -> int:
        alive.append(sum(t.name.startswith("dspylite-worker") for t in threading.enumerate()))
        return x

    def level(depth: int) -> Any:
        fn, inputs = (leaf, range(4)) if depth == 1 else (level, [depth - 1] * 4)
        return dspy.Parallel(num_threads=4, **options)([(fn, (x,)) for x in inputs])

    pairs = [(level, (2,)) for _ in range(4)]
    assert run(dspy.Parallel(num_threads=4, **options), pairs) == [[list(range(4))] * 4] * 4
    # One for each batch under way that has none to spare: 4 + 4 + 4 x 4, and some on their way out.
    assert max(alive) <= 32


@pytest.mark.parametrize("seconds", [1e12, float("inf")])
@pytest.mark.parametrize("name", ["timeout_s", "total_timeout_s", "hedge_after_s"])
def test_a_limit_beyond_all_clocks_is_none(name: str, seconds: float) -> None:
    """A nested batch waits as long as it takes, which the system's waits refuse to (B 2.5)."""

    def inner() -> list[int]:
        limited = dspy.Parallel(num_threads=2, **{name: seconds})  # type: ignore[arg-type]
        return limited([(abs, (-1,)), (time.sleep, (0.05,))])  # type: ignore[no-any-return]

    assert dspy.Parallel()([(inner, ())]) == [[1, None]]


@forms
def test_tokens_of_a_nested_batch_count_for_its_item_too(run: Run) -> None:
    """Each level knows its own cost (B 2.2, 4.10)."""
    lm = FakeLM(default="two words")

    def inner(count: int) -> list[int]:
        outcomes = dspy.Parallel(num_threads=2, on_error="return")(
            [(lm, {"prompt": "word " * (x + 1)}) for x in range(count)]
        )
        return [outcome.usage["fake/lm"].prompt_tokens for outcome in outcomes]

    with dspy.track_usage() as tracker:
        outcomes = run(
            dspy.Parallel(num_threads=3, on_error="return"), [(inner, (n,)) for n in (1, 2, 3)]
        )
    assert [outcome.value for outcome in outcomes] == [[1], [1, 2], [1, 2, 3]]
    assert [outcome.usage["fake/lm"].prompt_tokens for outcome in outcomes] == [1, 3, 6]
    assert tracker.total.prompt_tokens == 10


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self) -> bool:
        return True


def test_a_nested_batch_draws_no_second_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bars on one line are none (B 2.10)."""
    pytest.importorskip("rich")

    def inner(_: int) -> list[int]:
        return dspy.Parallel(progress=True)([(abs, (-x,)) for x in range(77)])

    shown = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", shown)
        dspy.Parallel(num_threads=2, progress=True)([(inner, (x,)) for x in range(3)])
    assert "3/3" in shown.getvalue()
    assert "/77" not in shown.getvalue()


# --- Event loops ---------------------------------------------------------------------------------


@backends
def test_the_sync_forms_refuse_to_stop_an_event_loop(backend: str) -> None:
    """The error names the form that does not (B 2.8)."""

    async def main() -> None:
        module, parallel = OddOnes(), dspy.Parallel()
        with pytest.raises(dspy.FlowError, match=f"{backend}.*`abatch`"):
            module.batch([{"x": 1}])
        with pytest.raises(dspy.FlowError, match="`acall` or `abatch`"):
            parallel([(abs, (-1,))])
        with pytest.raises(dspy.FlowError, match="`abatch_iter`"):
            module.batch_iter([{"x": 1}])
        assert await module.abatch([{"x": 1}]) == [{"x": 1}]
        assert await parallel.acall([(abs, (-1,))]) == [1]

    anyio.run(main, backend=backend)


@backends
def test_the_sync_forms_run_in_a_notebook(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell blocks its kernel's loop as it pleases (B 2.8)."""
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", ipython)

    async def main() -> None:
        assert dspy.Parallel(num_threads=2)([(abs, (-1,))]) == [1]
        assert [o.value for _, o in OddOnes().batch_iter([{"x": 1}])] == [{"x": 1}]

    anyio.run(main, backend=backend)


def test_a_plain_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt has no kernel and no running loop, so a loop there is the program's (B 2.8)."""
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", ipython)

    async def main() -> None:
        with pytest.raises(dspy.FlowError):
            dspy.Parallel()([(abs, (-1,))])

    anyio.run(main)


@backends
def test_a_cancelled_batch_keeps_what_finished(backend: str) -> None:
    """The cancellation itself passes on, to whoever asked for it (B 2.2)."""
    caught: list[BaseException] = []

    async def work(x: int) -> int:
        if x > 2:
            await anyio.sleep_forever()
        return x

    async def main() -> None:
        with anyio.move_on_after(0.1) as scope:
            try:
                await dspy.Parallel(num_threads=2).acall([(work, (x,)) for x in range(9)])
            except BaseException as error:
                caught.append(error)
                raise
        assert scope.cancelled_caught

    anyio.run(main, backend=backend)
    assert dspy.finished_results(caught[0]) == {0: 0, 1: 1, 2: 2}


# --- The input, the system, the memory -----------------------------------------------------------


@pytest.mark.parametrize("limit", [{"total_timeout_s": 0.2}, {"max_errors": 1}], ids=str)
def test_an_input_that_hangs_does_not_hang_a_limited_batch(limit: dict[str, Any]) -> None:
    """A queue that nobody fills any more, say (B 2.5)."""
    reading, release = threading.Event(), threading.Event()

    def fail() -> None:
        assert reading.wait(20)
        raise ValueError("the only item")

    def pairs() -> Iterator[Any]:
        yield fail, ()
        reading.set()
        release.wait(30)

    outcome, rest = dspy.Parallel(num_threads=2, on_error="return", **limit)(pairs())
    assert not release.is_set()
    release.set()
    assert isinstance(outcome.error, ValueError)
    assert isinstance(rest.error, dspy.ItemSkippedError)


@backends
@pytest.mark.parametrize("limit", [{"total_timeout_s": 0.2}, {"max_errors": 1}], ids=str)
def test_an_async_input_that_hangs_does_not_hang_a_limited_batch(
    backend: str, limit: dict[str, Any]
) -> None:
    """As with threads (B 2.5)."""

    async def main() -> None:
        reading = anyio.Event()

        async def fail() -> None:
            await reading.wait()
            raise ValueError("the only item")

        async def pairs() -> AsyncIterator[Any]:
            yield fail, ()
            reading.set()
            await anyio.sleep_forever()

        with anyio.fail_after(20):
            parallel = dspy.Parallel(num_threads=2, on_error="return", **limit)
            outcome, rest = await parallel.acall(pairs())
        assert isinstance(outcome.error, ValueError)
        assert isinstance(rest.error, dspy.ItemSkippedError)

    anyio.run(main, backend=backend)


def _start_only(count: int) -> Callable[[threading.Thread], None]:
    """Make a system that has so many threads to give."""
    start, lock = threading.Thread.start, threading.Lock()
    left = [count]

    def start_some(thread: threading.Thread) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    return start_some


def test_fewer_threads_do_the_batch_where_there_are_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container's limit costs time, not the work (B 2.9)."""
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _start_only(2))
        results = dspy.Parallel(num_threads=50)([(abs, (-x,)) for x in range(500)])
    assert results == list(range(500))


def test_a_nested_batch_needs_no_thread_but_that_of_its_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only worker does the inner batches, too (B 2.9)."""

    def inner(x: int) -> list[int]:
        return dspy.Parallel(num_threads=4)([(abs, (-x,)), (abs, (-x,))])

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _start_only(1))
        results = dspy.Parallel(num_threads=4)([(inner, (x,)) for x in range(3)])
    assert results == [[x, x] for x in range(3)]


def test_a_short_input_of_unknown_length_starts_few_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many are allowed, no more are started once all items are taken (B 2.9)."""
    start, started = threading.Thread.start, itertools.count()

    def start_and_let_it_work(thread: threading.Thread) -> None:
        next(started)
        start(thread)
        thread.join(0.05)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_and_let_it_work)
        results = dspy.Parallel(num_threads=1_000)((abs, (-x,)) for x in range(3))
    assert results == [0, 1, 2]
    assert next(started) <= 3


def test_without_any_thread_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was lost, because nothing was begun (B 2.9)."""
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _start_only(0))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            dspy.Parallel(num_threads=2)([(abs, (-1,))])


def test_results_are_kept_where_no_thread_can_follow_a_hung_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only worker hangs, and the system has no other (B 2.5)."""
    release = threading.Event()

    def work(x: int) -> int:
        if x == 2:
            release.wait(30)
        return x

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _start_only(1))
        with pytest.raises(dspy.BatchError, match="no thread could be started") as caught:
            dspy.Parallel(num_threads=1, timeout_s=0.2)([(work, (x,)) for x in range(6)])
    release.set()
    assert caught.value.results == {0: 0, 1: 1}
    assert isinstance(caught.value.errors[2], dspy.ItemTimeoutError)
    assert caught.value.untried == 3


FEW_THREADS = """
import resource, threading
import dspylite as dspy
# Each thread reserves its stack; the room that is left is enough for a few.
threading.stack_size(64 << 20)
with open("/proc/self/status") as status:
    used_kb = next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
most = used_kb * 1024 + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
barrier = threading.Event()
def work(x):
    seen.add(threading.get_ident())
    barrier.wait(0.01)
    return x
seen = set()
assert dspy.Parallel(num_threads=64)([(work, (x,)) for x in range(200)]) == list(range(200))
print(len(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_lack_of_threads_is_survived() -> None:
    """As in a container with little memory (B 2.9)."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS],
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 64


@forms
def test_a_system_exit_ends_no_worker(run: Run) -> None:
    """However many items try (B 2.7)."""

    def leave(x: int) -> int:
        if x % 2:
            sys.exit(x)
        return x

    with pytest.raises(dspy.BatchError) as caught:
        run(dspy.Parallel(num_threads=3), [(leave, (x,)) for x in range(40)])
    assert caught.value.results == {x: x for x in range(0, 40, 2)}
    assert {x: e.code for x, e in caught.value.errors.items() if isinstance(e, SystemExit)} == {
        x: x for x in range(1, 40, 2)
    }


def _copies(value: Any) -> list[Any]:
    return [copy.deepcopy(value), *(pickle.loads(pickle.dumps(value, n)) for n in range(2, 6))]


def test_outcomes_and_the_errors_of_batches_can_be_copied() -> None:
    """They travel between processes and through queues (B 7.1)."""
    lm = FakeLM(default="two words")
    outcomes = dspy.Parallel(on_error="return")([(lm, ("one",)), (int, ("x",))])
    for copied in _copies(outcomes):
        assert [(o.index, o.ok, o.attempts) for o in copied] == [(0, True, 1), (1, False, 1)]
        assert copied[0].usage == outcomes[0].usage
        assert str(copied[1].error) == str(outcomes[1].error)
    interrupted = dspy.BatchInterrupted(
        "stopped", results={0: "a"}, errors={1: ValueError("b")}, untried=3
    )
    failed = dspy.BatchError("failed", results={0: "a"}, errors={1: ValueError("b")}, untried=3)
    for error in (interrupted, failed):
        error.add_note("a note")
        for copied in _copies(error):
            assert type(copied) is type(error)
            assert (str(copied), copied.results, copied.untried) == (str(error), {0: "a"}, 3)
            assert str(copied.errors[1]) == "b"
            assert copied.__notes__ == ["a note"]
            assert dspy.finished_results(copied) == {0: "a"}


class Row:
    """An input that can be seen to go away."""


@forms
def test_inputs_of_items_that_succeeded_are_not_kept(run: Run) -> None:
    """They may be documents; a failed one is kept, to be told of (B 2.1)."""
    rows: list[weakref.ref[Row]] = []

    def pairs() -> Iterator[Any]:
        for x in range(50):
            row = Row()
            rows.append(weakref.ref(row))
            yield lambda _, x=x: x, (row,)

    outcomes = run(dspy.Parallel(num_threads=2, on_error="return"), pairs())
    gc.collect()
    assert [outcome.value for outcome in outcomes] == list(range(50))
    assert [row() for row in rows] == [None] * 50


@pytest.mark.parametrize("run", [on_threads, as_tasks])
def test_results_are_let_go_with_their_list(run: Run) -> None:
    """A batch that is over is in no cycle that waits for the garbage collector (B 2.4)."""

    class Result:
        pass

    gc.collect()
    gc.disable()
    try:
        results = run(dspy.Parallel(num_threads=2), [(Result, ()) for _ in range(4)])
        kept = [weakref.ref(result) for result in results]
        del results
        for thread in threading.enumerate():
            if thread.name.startswith("dspylite-worker"):
                thread.join(5)
        assert not any(ref() for ref in kept)
    finally:
        gc.enable()


def test_inputs_are_let_go_while_the_batch_goes_on() -> None:
    """Else a million documents would be in memory at its end (B 2.1)."""
    rows: list[weakref.ref[Row]] = []
    most = 0

    def work(_: Row) -> None:
        nonlocal most
        most = max(most, sum(row() is not None for row in rows))

    def pairs() -> Iterator[Any]:
        for _ in range(200):
            row = Row()
            rows.append(weakref.ref(row))
            yield work, (row,)

    dspy.Parallel(num_threads=2, on_error="return")(pairs())
    assert most <= 10


def test_a_large_batch_takes_no_memory_beyond_its_results() -> None:
    """100 bytes an item are ten times the list of results (B 2.1)."""
    dspy.Parallel(num_threads=4).over(abs, [(1,)] * 100)  # what is made once
    tracemalloc.start()
    try:
        results = dspy.Parallel(num_threads=4).over(abs, ((1,) for _ in range(20_000)))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert results == [1] * 20_000
    assert most < 20_000 * 20
