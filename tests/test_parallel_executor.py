"""`ParallelExecutor`: DSPy's way to run a function over items.

Not here: how the items run (`test_parallel.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import dspylite
from dspylite.concurrency.parallel_executor import ParallelExecutor
from dspylite.errors import BatchError, FlowError, SettingsError


def halve(x: int) -> float:
    if x % 5 == 4:
        raise ValueError(f"not {x}")
    return x / 2


@pytest.mark.parametrize("num_threads", [1, 4])
def test_results_are_in_order_and_failures_are_told(num_threads: int) -> None:
    """One thread and several give the same."""
    executor = ParallelExecutor(num_threads=num_threads, disable_progress_bar=True)
    results = executor.execute(halve, range(10))
    assert results == [0, 0.5, 1, 1.5, None, 2.5, 3, 3.5, 4, None]
    assert executor.failed_indices == [4, 9]
    assert {index: str(error) for index, error in executor.exceptions_map.items()} == {
        4: "not 4",
        9: "not 9",
    }


@pytest.mark.parametrize(
    "item", [(1, 2), [1, 2], {"a": 1}, dspylite.Example(a=1).with_inputs("a"), None]
)
def test_function_is_called_with_the_item_as_it_is(item: Any) -> None:
    """Tuples, dicts and examples are one argument here, and not spread as by `Parallel`."""
    assert ParallelExecutor(2).execute(lambda each: [each], [item]) == [[item]]


def test_next_run_forgets_the_failures_of_the_one_before() -> None:
    """An executor may be used again."""
    executor = ParallelExecutor(2)
    executor.execute(halve, [4])
    assert executor.execute(halve, [2]) == [1]
    assert (executor.failed_indices, executor.exceptions_map) == ([], {})


def test_too_many_failures_end_the_run_and_keep_what_finished() -> None:
    """DSPy raises without them."""
    executor = ParallelExecutor(num_threads=1, max_errors=2)
    with pytest.raises(BatchError) as caught:
        executor.execute(halve, [2, 4, 9, 6, 8])
    assert caught.value.results == {0: 1}
    assert executor.failed_indices == [1, 2]


def test_items_are_run_at_once_with_the_settings_of_the_caller() -> None:
    """As everything that runs many items."""
    together = threading.Barrier(4)

    def look(_: int) -> Any:
        together.wait(10)
        return dspylite.settings.extra["who"]

    with dspylite.context(extra={"who": "me"}):
        assert ParallelExecutor(4).execute(look, range(4)) == ["me"] * 4


def test_items_may_come_from_a_generator() -> None:
    """Their number need not be known."""

    def items() -> Iterator[int]:
        yield from (2, 4)

    assert ParallelExecutor(2).execute(halve, items()) == [1, None]


def test_input_that_fails_is_raised() -> None:
    """A shorter list would pass for the whole."""

    def items() -> Iterator[int]:
        yield 2
        raise OSError("gone")

    with pytest.raises(BatchError, match="gone"):
        ParallelExecutor(2).execute(halve, items())


def test_dspys_arguments_are_taken_and_wrong_ones_refused() -> None:
    """In DSPy's order; what makes no sense is found when it is made."""
    executor = ParallelExecutor(2, 3, True, True, True, 60, 1)
    assert (executor.num_threads, executor.max_errors, executor.timeout) == (2, 3, 60)
    assert (executor.compare_results, executor.straggler_limit) == (True, 1)
    with pytest.raises(SettingsError, match="num_threads"):
        ParallelExecutor(num_threads=0)


@pytest.mark.anyio
async def test_running_loop_is_not_blocked() -> None:
    """It would stand still meanwhile."""
    with pytest.raises(FlowError):
        ParallelExecutor(2).execute(halve, [1])
