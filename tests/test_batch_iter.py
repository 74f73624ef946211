"""Batches whose outcomes are given one by one: order, backpressure, and being left half-way.

Not here: Ctrl-C (`test_interrupts.py`).
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.testing import FakeServer

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 3
MOST_AHEAD = 3 * WIDTH  # those under way, and two ended ones for each worker


class Program(dspy.Module):
    """Calls the same function from both forms, so that one test serves all three drivers."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Any) -> Any:
        return self.fn(x)


def on_threads(fn: Callable[[Any], Any], xs: Iterable[Any], **options: Any) -> list[Any]:
    return list(Program(fn).batch_iter(({"x": x} for x in xs), WIDTH, **options))


def _as_tasks(backend: str) -> Callable[..., list[Any]]:
    def run(fn: Callable[[Any], Any], xs: Iterable[Any], **options: Any) -> list[Any]:
        async def main() -> list[Any]:
            pairs = Program(fn).abatch_iter(({"x": x} for x in xs), WIDTH, **options)
            return [pair async for pair in pairs]

        return anyio.run(main, backend=backend)

    return run


forms = pytest.mark.parametrize(
    "run",
    [on_threads, _as_tasks("asyncio"), _as_tasks("trio")],
    ids=["threads", "asyncio", "trio"],
)
Run = Callable[..., list[Any]]


def half(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x // 2


@forms
def test_every_item_is_given_once_with_its_index_and_outcome(run: Run) -> None:
    """A failure is an outcome like any other (B 2.8)."""
    pairs = run(half, range(50))
    assert sorted(index for index, _ in pairs) == list(range(50))
    for index, outcome in pairs:
        assert (outcome.index, outcome.ok, outcome.attempts) == (index, index % 2 == 0, 1)
        if outcome.ok:
            assert outcome.value == index // 2
        else:
            assert str(outcome.error) == f"{index} is odd"


@forms
def test_who_ends_first_is_given_first(run: Run) -> None:
    """Item 0 ends last although it was begun first (B 2.8)."""
    others = threading.Semaphore(0)

    def work(x: int) -> int:
        if x == 0:
            for _ in range(5):
                assert others.acquire(timeout=20)
        else:
            others.release()
        return x

    indexes = [index for index, _ in run(work, range(6))]
    assert set(indexes) == set(range(6))
    assert indexes[0] != 0


@forms
def test_an_empty_input_gives_nothing(run: Run) -> None:
    """It must not hang either (B 2.8)."""
    assert run(half, []) == []


# --- Backpressure --------------------------------------------------------------------------------


def test_workers_do_not_run_ahead_of_a_slow_reader() -> None:
    """The input may be endless, and outcomes large (B 2.8)."""
    begun: list[int] = []
    outcomes = Program(begun.append).batch_iter(({"x": x} for x in itertools.count()), WIDTH)
    most = 0
    for fetched, _ in enumerate(outcomes, 1):
        most = max(most, len(begun) - fetched)
        if fetched == 300:
            break
    assert most <= MOST_AHEAD
    outcomes.close()


def test_workers_stand_still_where_nobody_asks() -> None:
    """The window is full after a while and stays so (B 2.8)."""
    begun: list[int] = []
    full = threading.Semaphore(0)

    def work(x: int) -> None:
        begun.append(x)
        full.release()

    outcomes = Program(work).batch_iter(({"x": x} for x in itertools.count()), WIDTH)
    next(outcomes)
    # Of those ended, 2 * WIDTH wait, and the workers that ended them stand still one by one.
    for _ in range(2 * WIDTH):
        assert full.acquire(timeout=20)
    assert not _grows(begun, beyond=1 + MOST_AHEAD)
    outcomes.close()


def _grows(items: list[Any], *, beyond: int) -> bool:
    """Give workers a while to do what they must not."""
    limit = threading.Event()
    for _ in range(20):
        if len(items) > beyond:
            return True
        limit.wait(0.01)
    return False


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_tasks_do_not_run_ahead_of_a_slow_reader(backend: str) -> None:
    """All of several tasks that wait for room go on when there is some (B 2.8)."""
    begun: list[int] = []

    async def work(x: int) -> int:
        begun.append(x)
        return x

    async def main() -> None:
        most = fetched = 0
        parallel = dspy.Parallel(num_threads=WIDTH)
        async with aclosing(parallel.aeach(work, ((x,) for x in range(200)))) as outcomes:
            async for _ in outcomes:
                fetched += 1
                for _ in range(10):
                    await anyio.sleep(0)  # the workers may do all they can
                most = max(most, len(begun) - fetched)
        assert fetched == 200
        assert WIDTH <= most <= MOST_AHEAD

    with_limit(main, backend)


def with_limit(main: Callable[[], Any], backend: str) -> None:
    async def limited() -> None:
        with anyio.fail_after(20):
            await main()

    anyio.run(limited, backend=backend)


# --- Left half-way -------------------------------------------------------------------------------


def begin_and_leave(leave: Callable[[Any, list[Any]], None]) -> None:
    """Leave an endless batch in which three items are under way, and look what goes on."""
    begun: list[int] = []
    flags: list[bool] = []
    under_way = threading.Semaphore(0)
    left = threading.Event()

    def work(x: int) -> None:
        begun.append(x)
        if x < 2:
            return
        under_way.release()
        assert left.wait(20)
        try:
            dspy.check_cancelled()
            flags.append(False)
        except dspy.CallCancelledError:
            flags.append(True)

    held = [Program(work).batch_iter(({"x": x} for x in itertools.count()), WIDTH)]
    next(held[0])
    workers = [t for t in threading.enumerate() if t.name.startswith("dspylite-worker")]
    for _ in range(WIDTH):
        assert under_way.acquire(timeout=20)
    leave(held[0], held)
    gc.collect()
    left.set()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
    assert sorted(begun) == list(range(2 + WIDTH))
    assert flags == [True] * WIDTH


def _drop(outcomes: Any, held: list[Any]) -> None:
    del outcomes
    held.clear()


def _drop_in_a_cycle(outcomes: Any, held: list[Any]) -> None:
    knot: list[Any] = [outcomes]
    knot.append(knot)
    held.clear()


@pytest.mark.parametrize(
    "leave",
    [lambda outcomes, held: outcomes.close(), _drop, _drop_in_a_cycle],
    ids=["closed", "dropped", "dropped in a cycle"],
)
def test_leaving_a_batch_stops_its_workers(leave: Callable[[Any, list[Any]], None]) -> None:
    """No further item begins, those under way are told, and the threads end (B 2.8)."""
    begin_and_leave(leave)


def test_a_batch_may_be_collected_in_the_middle_of_its_own_work() -> None:
    """The garbage collector runs in whatever thread allocates, whatever lock it holds (B 2.8)."""
    outcomes = Program(abs).batch_iter(({"x": x} for x in itertools.count()), WIDTH)
    next(outcomes)
    workers = [t for t in threading.enumerate() if t.name.startswith("dspylite-worker")]
    run = outcomes.gi_frame.f_locals["run"]
    held = [outcomes]
    del outcomes

    def collect() -> None:
        with run.lock:
            _drop_in_a_cycle(held[0], held)
            gc.collect()

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    for thread in (collector, *workers):
        thread.join(20)
        assert not thread.is_alive()


def test_a_batch_that_is_never_asked_starts_nothing() -> None:
    """It begins with the first outcome asked for (B 2.8)."""
    begun: list[int] = []
    Program(begun.append).batch_iter([{"x": 1}]).close()
    assert begun == []


def _lm(server: FakeServer) -> dspy.LM:
    return dspy.LM("openai/m", api_base=server.base_url, api_key="k", engine="direct")


def test_leaving_a_batch_breaks_off_its_calls() -> None:
    """The connections are closed, so that the server stops working too (B 2.8)."""
    with FakeServer() as server, server.hold():
        lm = _lm(server)
        programs = [(len, ("abc",)), (lm, ("word",)), (lm, ("word",)), *[(lm, ("late",))] * 20]
        outcomes = dspy.Parallel(num_threads=2).each(lambda *pair: pair[0](*pair[1]), programs)
        assert next(outcomes)[1].value == 3
        server.wait_for_requests(2)
        outcomes.close()
        server.wait_until_idle()
        assert [request.client_left for request in server.requests] == [True, True]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_leaving_a_batch_of_tasks_breaks_off_its_calls(backend: str) -> None:
    """As with threads (B 2.8)."""
    with FakeServer() as server, server.hold():
        lm = _lm(server)

        async def work(x: int) -> Any:
            return x if x == 0 else await lm.acall("word")

        async def main() -> None:
            async with aclosing(
                dspy.Parallel(num_threads=2).aeach(work, ((x,) for x in range(20)))
            ) as outcomes:
                assert (await anext(outcomes))[1].value == 0
                await anyio.to_thread.run_sync(server.wait_for_requests, 2)
            await anyio.to_thread.run_sync(server.wait_until_idle)
            assert [request.client_left for request in server.requests] == [True, True]

        with_limit(main, backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_batch_may_be_made_before_its_loop(backend: str) -> None:
    """It begins with the first outcome asked for, and belongs to that loop (B 2.8)."""
    outcomes = dspy.Parallel(num_threads=2).aeach(abs, [(-1,), (-2,)])

    async def main() -> None:
        assert sorted([outcome.value async for _, outcome in outcomes]) == [1, 2]

    with_limit(main, backend)


class Endless:
    """Async items that note when they begin and when they are cancelled."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.all_ended = anyio.Event()

    async def __call__(self, x: int) -> int:
        self.begun.append(x)
        if x == 0:
            return x
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.append(x)
            if len(self.cancelled) == WIDTH:
                self.all_ended.set()
        raise AssertionError("it sleeps for ever")

    def outcomes(self) -> Any:
        return dspy.Parallel(num_threads=WIDTH).aeach(self, ((x,) for x in itertools.count()))

    async def check_that_all_ended(self) -> None:
        await self.all_ended.wait()
        for _ in range(20):
            await anyio.sleep(0)
        assert sorted(self.begun) == list(range(WIDTH + 1))
        assert sorted(self.cancelled) == list(range(1, WIDTH + 1))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_batch_is_closed_by_another_task(backend: str) -> None:
    """A web framework does that with a response whose client left (B 2.8)."""

    async def main() -> None:
        work = Endless()
        outcomes = work.outcomes()
        assert (await anext(outcomes))[0] == 0
        async with anyio.create_task_group() as group:
            group.start_soon(outcomes.aclose)
        await work.check_that_all_ended()

    with_limit(main, backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_batch_ends_with_the_task_that_reads_it(backend: str) -> None:
    """A cancelled reader leaves no item under way (B 2.8)."""

    async def main() -> None:
        work = Endless()
        first = anyio.Event()

        async def read() -> None:
            async for _ in work.outcomes():
                first.set()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await first.wait()
            while len(work.begun) <= WIDTH:
                await anyio.sleep(0)
            group.cancel_scope.cancel()
        await work.check_that_all_ended()

    with_limit(main, backend)


LEFT_OPEN = """
import asyncio, itertools
import dspylite as dspy

async def work(x):
    if x:
        await asyncio.sleep(30)

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is no fault
    async for _ in dspy.Parallel(num_threads=3).aeach(work, ((x,) for x in itertools.count())):
        break
    {then}

asyncio.run(main())
"""


@pytest.mark.parametrize("then", ["pass", "await asyncio.sleep(0.01)", "raise SystemExit(0)"])
def test_an_async_batch_that_is_left_open_ends_with_its_loop(then: str) -> None:
    """`break` is how most readers leave, and nothing is printed for it (B 2.8)."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", LEFT_OPEN.format(then=then)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_async_batch_that_is_dropped_leaves_no_task() -> None:
    """asyncio closes it as soon as nobody can ask it any more (B 2.8)."""
    import asyncio

    async def main() -> None:
        work = Endless()
        outcomes = work.outcomes()
        assert (await anext(outcomes))[0] == 0
        while len(work.begun) <= WIDTH:
            await anyio.sleep(0)
        del outcomes
        gc.collect()
        await work.check_that_all_ended()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with_limit(main, "asyncio")


def test_an_async_batch_that_is_dropped_in_trio_stops_as_well() -> None:
    """trio warns of every generator left open, and closes it (B 2.8)."""

    async def main() -> None:
        work = Endless()
        outcomes = work.outcomes()
        assert (await anext(outcomes))[0] == 0
        while len(work.begun) <= WIDTH:
            await anyio.sleep(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del outcomes
            gc.collect()
            await work.check_that_all_ended()

    with_limit(main, "trio")


# --- Ends before the input does ------------------------------------------------------------------


def collect(run: Iterator[Any]) -> tuple[list[Any], dspy.BatchError]:
    pairs: list[Any] = []
    with pytest.raises(dspy.BatchError) as caught:
        pairs.extend(run)
    return pairs, caught.value


def _steps(backend: str | None, parallel: dspy.Parallel, fn: Any, inputs: Any) -> Iterator[Any]:
    """Give the outcomes of any of the three drivers, and what they end with."""
    if backend is None:
        yield from parallel.each(fn, inputs)
        return
    found: list[Any] = []

    async def main() -> None:
        with anyio.fail_after(20):
            async for pair in parallel.aeach(fn, inputs):
                found.append(pair)  # noqa: PERF401  # it counts also where the next step raises

    error: Exception | None = None
    try:
        anyio.run(main, backend=backend)
    except dspy.BatchError as caught:
        error = caught
    yield from found
    if error is not None:
        raise error


backends = pytest.mark.parametrize("backend", [None, "asyncio", "trio"])


@backends
def test_max_errors_ends_it_after_the_last_outcome(backend: str | None) -> None:
    """Every item that was begun is given first, and the counts are true (B 2.8)."""
    parallel = dspy.Parallel(num_threads=2, max_errors=3)
    pairs, error = collect(_steps(backend, parallel, half, [(x,) for x in range(100)]))
    failed = [index for index, outcome in pairs if not outcome.ok]
    assert len(failed) >= 3
    assert f"{len(failed)} of {len(pairs)} items failed" in str(error)
    assert "limit of 3 errors" in str(error)
    assert error.untried == 100 - len(pairs)
    assert sorted(index for index, _ in pairs) == list(range(len(pairs)))


@backends
def test_the_total_time_ends_it_after_the_last_outcome(backend: str | None) -> None:
    """Items under way are given as timed out (B 2.8)."""
    release = threading.Event()

    def work(x: int) -> int:
        if x:
            release.wait(20)
        return x

    parallel = dspy.Parallel(num_threads=2, total_timeout_s=0.3)
    pairs, error = collect(_steps(backend, parallel, work, [(x,) for x in range(10)]))
    release.set()
    outcomes = dict(pairs)
    assert outcomes.pop(0).value == 0
    assert sorted(outcomes) == [1, 2]
    assert all(isinstance(o.error, dspy.ItemTimeoutError) for o in outcomes.values())
    assert "2 of 3 items failed" in str(error)
    assert error.untried == 7


@backends
def test_an_input_that_raises_ends_it_after_the_last_outcome(backend: str | None) -> None:
    """What had been read is done, and the cause is told (B 2.8)."""

    def inputs() -> Iterator[Any]:
        yield from ((x,) for x in range(4))
        raise OSError("the file ends here")

    pairs, error = collect(_steps(backend, dspy.Parallel(num_threads=2), half, inputs()))
    assert sorted(index for index, _ in pairs) == [0, 1, 2, 3]
    assert "2 of 4 items failed; the input raised" in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.untried is None


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_input_is_read_as_it_comes(backend: str) -> None:
    """Items that arrive over time are given over time (B 2.8)."""

    async def main() -> None:
        send, receive = anyio.create_memory_object_stream[Any](0)

        async def inputs() -> AsyncIterator[Any]:
            async with receive:
                async for x in receive:
                    yield (x,)

        async with send, aclosing(dspy.Parallel().aeach(abs, inputs())) as outcomes:
            for x in range(5):
                async with anyio.create_task_group() as group:
                    group.start_soon(send.send, -x)
                    assert (await anext(outcomes))[1].value == x

    with_limit(main, backend)


# --- Nested, and large ---------------------------------------------------------------------------


@forms
def test_it_runs_inside_a_batch_on_the_same_workers(run: Run) -> None:
    """An item may read a batch of its own (B 2.8, 2.9)."""
    alive: list[int] = []

    def leaf(x: int) -> int:
        alive.append(sum(t.name.startswith("dspylite-worker") for t in threading.enumerate()))
        return x

    def outer(x: int) -> list[int]:
        inner = dspy.Parallel(num_threads=4).each(leaf, ((y,) for y in range(x)))
        return sorted(outcome.unwrap() for _, outcome in inner)

    pairs = run(outer, range(12))
    assert sorted(outcome.unwrap() for _, outcome in pairs) == [list(range(x)) for x in range(12)]
    assert max(alive) <= WIDTH + 3  # a few may still be on their way out


MEMORY = """
import sys
import dspylite as dspy

def resident_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

def noop(x):
    return None

count = int(sys.argv[1])
start = None
pairs = dspy.Parallel(num_threads=4).each(noop, ((x,) for x in range(count)))
for done, (index, outcome) in enumerate(pairs, 1):
    if done == count // 10:
        start = resident_kb()
print(done, resident_kb() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_however_many_items() -> None:
    """Outcomes are not kept; those of the last 54,000 would take 20 MB (B 2.1, 2.8)."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "60000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    count, grown_kb = map(int, done.stdout.split())
    assert count == 60_000
    assert grown_kb < 300, "a list of that length is larger"


def test_workers_that_wait_for_room_are_woken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that is ready wakes its reader, not every worker that stands still (B 2.8)."""
    wait, waits = threading.Condition.wait, itertools.count()

    def counted(condition: threading.Condition, timeout: float | None = None) -> bool:
        next(waits)
        return wait(condition, timeout)

    monkeypatch.setattr(threading.Condition, "wait", counted)
    for _ in dspy.Parallel(num_threads=400).each(half, [(2,)] * 5_000):
        pass
    assert next(waits) < 4 * 5_000
