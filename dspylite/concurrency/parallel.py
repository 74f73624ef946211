"""`Parallel`: many calls of programs at once, results in input order, no failure lost.

Not here: how a run takes and runs its items (`concurrency/run.py`).
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Mapping,
    Sized,
)
from contextlib import aclosing, closing
from typing import Any, Literal, TypedDict

from dspylite.concurrency.crew import Crew
from dspylite.concurrency.items import Item, Job
from dspylite.concurrency.outcome import Outcome, batch_error, interrupted
from dspylite.concurrency.run import BUDGET, Limits, Progress, Run
from dspylite.concurrency.tasks import Tasks
from dspylite.errors import (
    BatchError,
    CallCancelledError,
    FlowError,
    InputFieldError,
    SettingsError,
)
from dspylite.runtime.loops import is_in_notebook, running_library, standing_still
from dspylite.runtime.progress import Bar, show_progress
from dspylite.runtime.settings import check_deadline, settings
from dspylite.runtime.threads import is_async
from dspylite.schema.records import Example

OnError = Literal["raise", "return"]
_AsJob = Callable[[int, Any], Job]
_ROOM = 2
"""Ended items for each worker that wait until they are asked for; guessed."""


class BatchOptions(TypedDict, total=False):
    """What `Module.batch` and `abatch` hand on to `Parallel`, for type checkers."""

    provide_traceback: bool | None
    disable_progress_bar: bool
    timeout: float
    straggler_limit: int
    timeout_s: float | None
    total_timeout_s: float | None
    hedge_after_s: float | None
    progress: bool | Progress


class Parallel:
    """Runs (program, inputs) pairs on several threads, or as several tasks with `acall`.

    Every item runs in its own copy of the caller's context, with the settings fixed when the run
    started. One `Parallel` may be used any number of times and by several threads at once.

    Args:
        num_threads: Threads (or tasks). None: `settings.num_threads`.
        max_errors: Failures after which no further item is taken. None: `settings.max_errors`,
            which by default has no bound, so that all items are tried.
        access_examples: Whether an `Example` is passed by its inputs as keywords (else as it is).
        return_failed_examples: DSPy's form of result: a triple of the results (None where an item
            failed), the failed items and their exceptions; nothing is raised then.
        provide_traceback: Whether failures are logged with their traceback. None: as the settings
            say.
        disable_progress_bar: Whether `progress=True` is overruled.
        timeout: Accepted from DSPy programs; stragglers are never run again, so it has no effect.
        straggler_limit: As `timeout`.
        on_error: `"raise"` a `BatchError` that keeps all results, after all items were tried; or
            `"return"` a list of `Outcome`.
        timeout_s: Wall time of one item, in seconds; an item that takes longer is reported as an
            `ItemTimeoutError` and never holds up the others. None: no bound.
        total_timeout_s: Wall time of the whole run, in seconds. None: no bound.
        hedge_after_s: Seconds after which an item that has not ended is started a second time,
            besides the first; whichever succeeds first counts, and the other is told to stop. Both
            may be paid for. None: every item runs once.
        progress: True draws a bar on stderr if that is a terminal (needs the extra `progress`); a
            function is called as `progress(done, total, errors)` after each item, one call at a
            time, so it must be quick.

    Raises:
        SettingsError: A number is impossible.

    Example:
        >>> double = lambda x: 2 * x
        >>> Parallel(num_threads=2)([(double, (1,)), (double, {"x": 2})])
        [2, 4]
    """

    def __init__(
        self,
        num_threads: int | None = None,
        max_errors: int | None = None,
        access_examples: bool = True,
        return_failed_examples: bool = False,
        provide_traceback: bool | None = None,
        disable_progress_bar: bool = False,
        timeout: float = 120,
        straggler_limit: int = 3,
        *,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        hedge_after_s: float | None = None,
        progress: bool | Progress = False,
    ) -> None:
        for name, value in (("num_threads", num_threads), ("max_errors", max_errors)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise SettingsError(
                    f"`{name}` must be a whole number of at least 1, not {value!r}."
                )
        if callable(progress) and is_async(progress):
            raise SettingsError("`progress` is called from workers, so it must not be async.")
        for name, seconds in (
            ("timeout_s", timeout_s),
            ("total_timeout_s", total_timeout_s),
            ("hedge_after_s", hedge_after_s),
        ):
            check_deadline(name, seconds)
        if on_error not in ("raise", "return"):
            raise SettingsError(f'`on_error` must be "raise" or "return", not {on_error!r}.')
        self.num_threads = num_threads
        self.max_errors = max_errors
        self.access_examples = access_examples
        self.return_failed_examples = return_failed_examples
        self.provide_traceback = provide_traceback
        self.disable_progress_bar = disable_progress_bar
        self.timeout = timeout
        self.straggler_limit = straggler_limit
        self.on_error = on_error
        self.timeout_s = timeout_s
        self.total_timeout_s = total_timeout_s
        self.hedge_after_s = hedge_after_s
        self.progress = progress

    def __call__(self, exec_pairs: Iterable[Any]) -> Any:
        """Run all pairs and wait for them on this thread.

        Args:
            exec_pairs: (program, inputs) pairs, read only as workers become free. Inputs are an
                `Example`, a dict of keywords, a tuple or list of positional arguments, or one
                value.

        Returns:
            The results in input order; or outcomes, or DSPy's triple, as the constructor says.

        Raises:
            BatchError: An item failed, or the input did; it keeps what finished.
            BatchInterrupted: Ctrl-C, a `KeyboardInterrupt` that keeps what finished.
            CallCancelledError: The work that this is part of was told to stop; a `BatchError`
                with what finished is its cause.
            FlowError: An event loop runs on this thread and would stand still; await `acall`.
        """
        return self._over(exec_pairs, self._pair_as_job)

    forward = __call__

    async def acall(self, exec_pairs: Iterable[Any] | AsyncIterable[Any]) -> Any:
        """Run all pairs as tasks of this event loop; otherwise as `__call__`.

        Modules are awaited natively; sync functions run in worker threads. Where the task is
        cancelled, `finished_results` finds in the exception what had finished.
        """
        return await self._aover(exec_pairs, self._pair_as_job)

    def over(self, program: Any, items: Iterable[Any]) -> Any:
        """Run one program over many inputs and wait; results as `__call__` gives them."""
        return self._over(items, self._item_as_job(program))

    async def aover(self, program: Any, items: Iterable[Any] | AsyncIterable[Any]) -> Any:
        """Run one program over many inputs as tasks of this event loop."""
        return await self._aover(items, self._item_as_job(program))

    def each(
        self, program: Any, items: Iterable[Any]
    ) -> Generator[tuple[int, Outcome[Any]], None, None]:
        """Run one program over many inputs; give (index, outcome) of each as soon as it ends.

        It begins with the first outcome asked for, keeps no outcome, and does not run ahead of the
        one who asks by more than a few items. Closing it, or dropping it, stops the workers.

        Args:
            program: A module or function.
            items: As for `over`.

        Raises:
            BatchError: After the last outcome, where the run stopped before its input ended: at
                `max_errors` or `total_timeout_s`, or because the input failed.
            FlowError: An event loop runs on this thread; use `aeach`.
        """
        self._check_items(items)
        _refuse_running_loop("abatch_iter")
        width = self._width()
        crew = Crew(width, _ROOM * width)
        bar = self._bar(items)
        with standing_still():  # as a notebook's does
            run = self._run(items, self._item_as_job(program), bar, hand_out=crew.hand_out)
        return self._outcomes(run, crew, bar)

    def aeach(
        self, program: Any, items: Iterable[Any] | AsyncIterable[Any]
    ) -> AsyncGenerator[tuple[int, Outcome[Any]], None]:
        """Run one program over many inputs as tasks of this event loop; otherwise as `each`."""
        self._check_items(items, may_be_async=True)
        width = self._width()
        tasks = Tasks(width, _ROOM * width)
        bar = self._bar(items)
        run = self._run(items, self._item_as_job(program), bar, hand_out=tasks.hand_out)
        return self._aoutcomes(run, tasks, bar)

    def _outcomes(
        self, run: Run, crew: Crew, bar: Bar
    ) -> Generator[tuple[int, Outcome[Any]], None, None]:
        with bar, closing(crew.each(run)) as items:
            for item in items:
                yield item.index, item.outcome()
        if (error := run.early_end()) is not None:
            raise error

    async def _aoutcomes(
        self, run: Run, tasks: Tasks, bar: Bar
    ) -> AsyncGenerator[tuple[int, Outcome[Any]], None]:
        with bar:
            try:
                async with aclosing(tasks.each(run)) as items:
                    async for item in items:
                        yield item.index, item.outcome()
            except BaseExceptionGroup as group:
                if _has_interrupt(group):
                    raise KeyboardInterrupt from group
                raise
        if (error := run.early_end()) is not None:
            raise error

    def _over(self, items: object, as_job: _AsJob) -> Any:
        checked = self._check_items(items)
        _refuse_running_loop("acall` or `abatch")
        with standing_still(), self._bar(checked) as bar:
            run = self._run(checked, as_job, bar)
            try:
                Crew(self._width()).work(run)
                return self._result(run)
            except KeyboardInterrupt as error:
                raise interrupted(run.outcomes()) from error
            except CallCancelledError as error:
                raise error from self._cut_short(run)

    async def _aover(self, items: object, as_job: _AsJob) -> Any:
        checked = self._check_items(items, may_be_async=True)
        with self._bar(checked) as bar:
            run = self._run(checked, as_job, bar)
            try:
                await Tasks(self._width()).work(run)
                return self._result(run)
            except BatchError:
                raise
            except BaseException as error:
                if _has_interrupt(error):
                    raise interrupted(run.outcomes()) from error
                error.__cause__ = self._cut_short(run)
                raise

    def _cut_short(self, run: Run) -> BatchError:
        return batch_error(
            run.outcomes(), reason=f"the batch stopped because {run.stop_reason}", cause=None
        )

    def _check_items(self, items: object, *, may_be_async: bool = False) -> Any:
        if isinstance(items, Iterable) or (may_be_async and isinstance(items, AsyncIterable)):
            return items
        form = (
            "an async iterable; await `acall` or `abatch`"
            if isinstance(items, AsyncIterable)
            else repr(items)
        )
        raise InputFieldError(f"A batch needs an iterable of items, not {form}.")

    def _width(self) -> int:
        return settings.num_threads if self.num_threads is None else self.num_threads

    def _bar(self, items: Any) -> Bar:
        # A batch inside another would draw over its bar.
        is_outermost = BUDGET.get() is None
        wanted = self.progress is True and not self.disable_progress_bar and is_outermost
        return show_progress(_size(items), wanted=wanted)

    def _run(
        self,
        items: Any,
        as_job: _AsJob,
        bar: Bar,
        hand_out: Callable[[Item], object] | None = None,
    ) -> Run:
        traceback = self.provide_traceback
        return Run(
            items,
            as_job,
            limits=Limits(
                max_errors=settings.max_errors if self.max_errors is None else self.max_errors,
                timeout_s=self.timeout_s,
                total_timeout_s=self.total_timeout_s,
                hedge_after_s=self.hedge_after_s,
            ),
            total=_size(items),
            progress=self.progress if callable(self.progress) else bar.update,
            log_tracebacks=bool(settings.provide_traceback if traceback is None else traceback),
            keeps_outcomes=self.on_error == "return" and not self.return_failed_examples,
            hand_out=hand_out,
        )

    def _result(self, run: Run) -> Any:
        values = run.values()
        if values is not None:
            return (values, [], []) if self.return_failed_examples else values
        outcomes = run.outcomes()
        failed = [outcome for outcome in outcomes if not outcome.ok]
        if isinstance(run.input_error, KeyboardInterrupt):  # Ctrl-C while this thread read it
            raise run.input_error
        if run.input_error is not None:
            reason = "the input raised an error, so nobody knows how many items it has"
            raise batch_error(outcomes, reason=reason, cause=run.input_error)
        if run.is_cut_short and (self.return_failed_examples or self.on_error == "return"):
            failed.append(run.rest())  # else a shorter list would pass for the whole
            outcomes.append(failed[-1])
        if self.return_failed_examples:
            values = [outcome.value for outcome in outcomes]
            return values, [run.source(o.index) for o in failed], [o.error for o in failed]
        if self.on_error == "return":
            return outcomes
        if failed or run.is_cut_short:
            reason = run.stop_reason and f"the batch stopped because {run.stop_reason}"
            raise batch_error(outcomes, reason=reason, cause=None, is_whole=not run.is_cut_short)
        return [outcome.value for outcome in outcomes]

    def _pair_as_job(self, index: int, pair: Any) -> Job:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[0]):
            raise InputFieldError(
                f"Item {index} must be a pair of a program and its inputs, not {pair!r:.200}; "
                "for one program over many inputs use `program.batch(inputs)`."
            )
        return self._as_job(pair[0], pair[1])

    def _item_as_job(self, program: Any) -> _AsJob:
        return lambda index, item: self._as_job(program, item)  # noqa: ARG005

    def _as_job(self, target: Any, inputs: Any) -> Job:
        args: tuple[Any, ...] = ()
        kwargs: Mapping[str, Any] = {}
        if isinstance(inputs, Example):
            if self.access_examples:
                kwargs = dict(inputs.inputs().items())
            else:
                args = (inputs,)
        elif isinstance(inputs, Mapping):
            kwargs = inputs
        elif isinstance(inputs, tuple):
            args = inputs
        elif isinstance(inputs, list) and not isinstance(target, Parallel):
            args = tuple(inputs)
        else:
            args = (inputs,)
        return Job(target, args, kwargs)


def _size(items: Any) -> int | None:
    try:
        return len(items) if isinstance(items, Sized) else None
    except Exception:  # noqa: BLE001  # a wrapper that asks a generator for its length, as progress bars do
        return None


def _refuse_running_loop(name: str) -> None:
    """Refuse to block an event loop, as long as it is not a notebook's.

    Raises:
        FlowError: One runs on this thread.
    """
    library = running_library()
    if library is not None and not is_in_notebook():
        raise FlowError(
            f"A batch that blocks its thread was called inside a running {library} event loop, "
            f"which would stand still meanwhile; await `{name}` instead."
        )


def _has_interrupt(error: BaseException) -> bool:
    """Tell whether Ctrl-C is what an event loop raised, alone or in a group."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)
