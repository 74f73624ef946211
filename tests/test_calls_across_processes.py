"""Who called whom where the work is done by another process (B 1.6).

Not here: threads and tasks (`test_calls.py`).
"""

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import dspylite
from dspylite import BaseCallback, Module, OfflineLM, Parallel, Predict, current_call, settings

METHODS = [
    name
    for name in ("spawn", "fork", "forkserver")
    if name in multiprocessing.get_all_start_methods()
]

Row = tuple[str, str | None, int | None]


class Noted(BaseCallback):
    """Notes the frames of modules; travels empty."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __reduce__(self) -> Any:
        return (Noted, ())

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        frame = current_call()
        assert frame is not None
        self.rows.append((call_id, frame.parent_id, frame.item_index))


def work(snapshot: Any) -> list[Row]:
    """Run a predictor in this process, and tell what its callback heard."""
    with settings.restore(snapshot):
        Predict("question -> answer")(question="q")
        rows: list[Row] = settings.callbacks[0].rows
    return rows


class Outer(Module):
    """A program that sends its work to a pool."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        super().__init__()
        self.send = lambda: pool.submit(work, settings.snapshot()).result(40)

    def forward(self) -> list[Row]:
        return self.send()


@pytest.fixture(scope="module", params=METHODS)
def workers(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context(request.param)
    with ProcessPoolExecutor(2, mp_context=context) as running:
        yield running


def test_call_in_a_worker_process_names_the_call_that_sent_it(workers: ProcessPoolExecutor) -> None:
    """One trace, though two processes made it."""
    noted = Noted()
    with dspylite.context(lm=OfflineLM(), callbacks=[noted]):
        for _ in range(3):
            ((_, parent, index),) = Outer(workers)()
            assert (parent, index) == (noted.rows[-1][0], None)


def test_call_in_a_worker_process_names_the_batch_item(workers: ProcessPoolExecutor) -> None:
    """Items whose work is done elsewhere are told apart there too."""
    noted = Noted()
    with dspylite.context(lm=OfflineLM(), callbacks=[noted]):
        found = Parallel(num_threads=2)([(Outer(workers), {})] * 4)
    sent = {call_id: index for call_id, _, index in noted.rows}
    assert [row[2] for (row,) in found] == [0, 1, 2, 3]
    assert [sent[row[1]] for (row,) in found] == [0, 1, 2, 3]


def test_work_sent_from_no_call_has_no_parent(workers: ProcessPoolExecutor) -> None:
    """Not even in a forked worker, which was forked in the middle of somebody's call."""
    with dspylite.context(lm=OfflineLM(), callbacks=[Noted()]):
        Outer(workers)()
        ((_, parent, index),) = workers.submit(work, settings.snapshot()).result(40)
    assert (parent, index) == (None, None)


def test_restoring_gives_the_call_around_back() -> None:
    """After the block everything is as before it."""
    noted = Noted()
    seen: list[Any] = []

    class Program(Module):
        def forward(self) -> None:
            with settings.restore(outside):
                seen.append(current_call())
            seen.append(current_call())

    with dspylite.context(callbacks=[noted]):
        outside = settings.snapshot()
        Program()()
    assert seen[0] is None
    assert seen[1].call_id == noted.rows[0][0]


def test_block_left_elsewhere_does_not_raise() -> None:
    """Frameworks run the two halves of a generator in different contexts."""
    import contextvars

    block = settings.restore(settings.snapshot())
    contextvars.copy_context().run(block.__enter__)
    contextvars.copy_context().run(block.__exit__, None, None, None)


def test_snapshot_in_a_call_pickles_without_what_was_called() -> None:
    """A program may hold what cannot travel."""

    class Program(Module):
        def forward(self) -> Any:
            self.unpicklable = lambda: 0
            return pickle.loads(pickle.dumps(settings.snapshot()))

    with dspylite.context(callbacks=[Noted()]):
        snapshot = Program()()
    assert snapshot.frame.instance is None
    assert snapshot.frame.kind == "module"


class Carrying(BaseCallback):
    """Takes a word along."""

    def __init__(self, word: str, told: list[str], *, broken: bool = False) -> None:
        self.word, self.told, self.broken = word, told, broken

    def carry(self) -> dict[str, str]:
        if self.broken:
            raise ValueError("broken")
        return {self.word: self.word.upper()}

    def resume(self, carried: Any) -> Any:
        self.told.append(f"resume {carried}")
        return lambda: self.told.append("undo")


def test_callbacks_take_along_what_they_need_and_go_on_with_it() -> None:
    """A tracer names its trace to the other side; one that fails harms nothing (B 4.15)."""
    told: list[str] = []
    with dspylite.context(callbacks=[Carrying("a", told), Carrying("b", told, broken=True)]):
        snapshot = settings.snapshot()
    with settings.restore(snapshot):
        told.append("inside")
    assert told == ["resume {'a': 'A'}"] * 2 + ["inside"] + ["undo"] * 2
