"""`ParallelExecutor`: one function over many items, as DSPy's evaluation and tools call it.

Not here: the run itself (`concurrency/parallel.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import TypeVar

from dspylite.concurrency.parallel import Parallel
from dspylite.errors import BatchError

T = TypeVar("T")
R = TypeVar("R")


class ParallelExecutor:
    """Runs a function on many items, with DSPy's arguments; new programs take `Parallel`.

    Settings and the context travel as with `Parallel`. What failed is told by attributes, which are
    those of the run that ended last.

    Args:
        num_threads: Threads. None: `settings.num_threads`.
        max_errors: Failures after which no further item is taken. None: `settings.max_errors`.
        disable_progress_bar: Whether no bar is drawn; `Parallel(progress=True)` draws one.
        provide_traceback: Whether failures are logged with their traceback.
        compare_results: Accepted from DSPy programs; without effect.
        timeout: As `compare_results`; stragglers are never run again.
        straggler_limit: As `compare_results`.

    Attributes:
        failed_indices: Places of the items that failed, in order.
        exceptions_map: What they raised, by place.

    Raises:
        SettingsError: A number is impossible.

    Example:
        >>> executor = ParallelExecutor(num_threads=2)
        >>> executor.execute(lambda x: 6 // x, [1, 0, 3]), executor.failed_indices
        ([6, None, 2], [1])
    """

    def __init__(
        self,
        num_threads: int | None = None,
        max_errors: int | None = None,
        disable_progress_bar: bool = False,
        provide_traceback: bool | None = None,
        compare_results: bool = False,
        timeout: float = 120,
        straggler_limit: int = 3,
    ) -> None:
        self._parallel = Parallel(
            num_threads=num_threads,
            max_errors=max_errors,
            provide_traceback=provide_traceback,
            disable_progress_bar=disable_progress_bar,
            timeout=timeout,
            straggler_limit=straggler_limit,
        )
        self.num_threads = num_threads
        self.max_errors = max_errors
        self.disable_progress_bar = disable_progress_bar
        self.provide_traceback = provide_traceback
        self.compare_results = compare_results
        self.timeout = timeout
        self.straggler_limit = straggler_limit
        self.failed_indices: list[int] = []
        self.exceptions_map: dict[int, BaseException] = {}

    def execute(self, function: Callable[[T], R], data: Iterable[T]) -> list[R | None]:
        """Call the function with each item and wait; results in the order of the items.

        An item that failed gives None, and is named in `failed_indices`.

        Args:
            function: Called as `function(item)`; a program, or any function.
            data: The items.

        Raises:
            BatchError: The run stopped before all items were tried, or reading them failed; it
                keeps what finished.
            BatchInterrupted: Ctrl-C; it keeps what finished.
            FlowError: An event loop runs on this thread.
        """
        self.failed_indices, self.exceptions_map = [], {}
        jobs: Iterable[tuple[T]] = ((item,) for item in data)
        if isinstance(data, Sized):
            jobs = list(jobs)
        try:
            results: list[R | None] = self._parallel.over(function, jobs)
        except BatchError as error:
            self.exceptions_map = dict(sorted(error.errors.items()))
            self.failed_indices = list(self.exceptions_map)
            is_of_an_item = any(error.__cause__ is each for each in error.errors.values())
            if error.untried != 0 or not is_of_an_item:
                raise
            count = len(error.results) + len(error.errors)
            return [error.results.get(index) for index in range(count)]
        return results
