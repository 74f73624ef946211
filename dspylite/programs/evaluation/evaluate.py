"""`Evaluate`: a program run over a set of examples and scored.

Not here: one item (`programs/evaluation/scoring.py`), and how results are shown and written
(`programs/evaluation/table.py`, `programs/evaluation/export.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from dspylite.abc import Io
from dspylite.concurrency.outcome import Outcome, batch_error
from dspylite.concurrency.parallel import Parallel
from dspylite.concurrency.run import Progress
from dspylite.errors import EvaluationError, InputFieldError, nearest
from dspylite.programs.base import Module
from dspylite.programs.evaluation.export import check_target, write_csv, write_json
from dspylite.programs.evaluation.result import EvaluationResult, Row
from dspylite.programs.evaluation.rows import Rows, as_rows
from dspylite.programs.evaluation.scoring import Metric, Scoring, as_number, metric_name
from dspylite.programs.evaluation.table import show_table
from dspylite.runtime.calls import Observed
from dspylite.runtime.flow import ASYNC, BLOCKING, Both, run_flow
from dspylite.runtime.progress import can_draw
from dspylite.runtime.settings import settings
from dspylite.schema.messages import Usage
from dspylite.schema.records import Example, Prediction

logger = logging.getLogger(__name__)

_FilePath = str | PathLike[str]
_OPTIONS = (
    "devset metric num_threads display_progress display_table max_errors provide_traceback "
    "failure_score save_as_csv save_as_json"
).split()


class Evaluate:
    """Measures programs: runs one over examples, scores each prediction, gives the mean.

    Items run on threads, or with `acall` as tasks, each in its own copy of the caller's context, as
    in `Parallel`. One `Evaluate` may be used any number of times and by several threads at once.

    An item fails where the program raises, or the metric raises or returns no number. It counts
    with `failure_score`, and its error is kept in `result.errors`.

    Args:
        devset: Examples that say by `with_inputs` which of their values the program is given. An
            iterator is read once, here.
        metric: Called as `metric(example, prediction)`; gives a bool, a number, or a prediction
            with a `score`. Sync or async; a module such as `SemanticF1()` is one, too. None: each
            call names one.
        num_threads: Threads (or tasks). None: `settings.num_threads`.
        display_progress: Whether a bar is drawn on stderr, if that is a terminal and the extra
            `progress` is installed; or a function, called as `progress(done, total, errors)`
            after each item.
        display_table: Whether the results are shown as a table on stdout or in the notebook; a
            number shows that many rows.
        max_errors: Failures at which the evaluation ends with a `BatchError` that keeps what
            finished. None: `settings.max_errors`, which by default has no bound.
        provide_traceback: Whether failures are logged with their traceback. None: as the settings
            say.
        failure_score: What a failed item counts.
        save_as_csv: A file to write the results to, as a table.
        save_as_json: A file to write the results to, as a list of objects.
        **kwargs: Nothing more; DSPy's class takes anything.

    Attributes:
        devset: The examples.
        metric: As given.
        num_threads: As given.
        display_progress: As given.
        display_table: As given.
        max_errors: As given.
        provide_traceback: As given.
        failure_score: As given.
        save_as_csv: As given.
        save_as_json: As given.

    Raises:
        EvaluationError: An option is unknown or impossible.
        SettingsError: A number is impossible.

    Example:
        >>> from dspylite.programs.evaluation.metrics import answer_exact_match
        >>> devset = [
        ...     Example(question="1 + 1", answer="2").with_inputs("question"),
        ...     Example(question="2 + 2", answer="five").with_inputs("question"),
        ... ]
        >>> def program(question):
        ...     return Prediction(answer=str(sum(int(part) for part in question.split(" + "))))
        >>> Evaluate(devset=devset, metric=answer_exact_match)(program)
        EvaluationResult(score=50.0, results=<list of 2 results>)
    """

    kind: ClassVar[str] = "evaluate"

    def __init__(
        self,
        *,
        devset: Iterable[Any],
        metric: Metric | None = None,
        num_threads: int | None = None,
        display_progress: bool | Progress = False,
        display_table: bool | int = False,
        max_errors: int | None = None,
        provide_traceback: bool | None = None,
        failure_score: float = 0.0,
        save_as_csv: _FilePath | None = None,
        save_as_json: _FilePath | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            raise EvaluationError(
                f"`Evaluate` has no option `{name}`. {nearest(name, _OPTIONS)}"
                "Predictions and scores are always in `result.results`."
            )
        self.devset = _rereadable(devset)
        self.metric = metric
        self.num_threads = num_threads
        self.display_progress = display_progress
        self.display_table = display_table
        self.max_errors = max_errors
        self.provide_traceback = provide_traceback
        self.failure_score = failure_score
        self.save_as_csv = save_as_csv
        self.save_as_json = save_as_json
        # What can be found wrong now is not found at the end of a long program.
        if metric is not None:
            _checked_metric(metric)
        _checked_limit(display_table)
        _checked_number("failure_score", failure_score)
        self._parallel(num_threads, display_progress)

    def __call__(
        self,
        program: Callable[..., Any],
        metric: Metric | None = None,
        devset: Iterable[Any] | None = None,
        num_threads: int | None = None,
        display_progress: bool | Progress | None = None,
        display_table: bool | int | None = None,
        callback_metadata: Mapping[str, Any] | None = None,
        save_as_csv: _FilePath | None = None,
        save_as_json: _FilePath | None = None,
    ) -> EvaluationResult:
        """Evaluate a program and wait for it on this thread.

        What is not given, or None, is as the constructor was told.

        Args:
            program: A module or function, sync or async, called with an example's inputs by name.
            metric: Another metric.
            devset: Other examples.
            num_threads: Another number of threads.
            display_progress: Another choice of progress.
            display_table: Another choice of table.
            callback_metadata: Handed to callbacks among the inputs of this call.
            save_as_csv: Another file.
            save_as_json: Another file.

        Returns:
            The score in percent, and an (example, prediction, score) for each example in their
            order. `get_lm_usage()` tells the tokens that program and metric took together.

        Raises:
            EvaluationError: There is no example, no metric, or no place for a file; or, after the
                run, a file could not be written, and `.result` keeps what was found.
            InputFieldError: One of the examples does not say which of its values are inputs.
            BatchError: `max_errors` was reached; it keeps what finished, in the form of `results`.
            BatchInterrupted: Ctrl-C, a `KeyboardInterrupt` that keeps what finished, likewise.
            FlowError: An event loop runs on this thread; await `acall`.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        return run_flow(self._plan(BLOCKING, given))

    async def acall(
        self,
        program: Callable[..., Any],
        metric: Metric | None = None,
        devset: Iterable[Any] | None = None,
        num_threads: int | None = None,
        display_progress: bool | Progress | None = None,
        display_table: bool | int | None = None,
        callback_metadata: Mapping[str, Any] | None = None,
        save_as_csv: _FilePath | None = None,
        save_as_json: _FilePath | None = None,
    ) -> EvaluationResult:
        """Evaluate a program as tasks of this event loop; otherwise as the call."""
        given = {name: value for name, value in locals().items() if name != "self"}
        return await self._plan(ASYNC, given)

    async def _plan(self, io: Io, given: Mapping[str, Any]) -> EvaluationResult:
        with Observed("evaluate", self, dict(given)) as call:
            call.outputs = result = await self._evaluated(io, given)
        return result

    async def _evaluated(self, io: Io, given: Mapping[str, Any]) -> EvaluationResult:
        def chosen(name: str) -> Any:
            return getattr(self, name) if given[name] is None else given[name]

        program = _checked_program(given["program"])
        metric = _checked_metric(chosen("metric"))
        parallel = self._parallel(chosen("num_threads"), chosen("display_progress"))
        shown = _checked_limit(chosen("display_table"))
        targets = _checked_targets(chosen("save_as_csv"), chosen("save_as_json"))
        items = list(_items(_rereadable(chosen("devset"))))
        if not items:
            raise EvaluationError("`devset` is empty, so there is nothing to evaluate.")

        outcomes = await io.call(_RUN, parallel, Scoring(program, metric), items)
        _check_errors(outcomes, parallel.max_errors)
        result = _result(items, outcomes, float(self.failure_score))
        _report(result, self.failure_score)
        if shown is not None or targets:
            rows = as_rows(result, metric_name(metric))
            if shown is not None:
                show_table(rows, None if shown is True else shown)
            for name, (write, target) in targets.items():
                try:
                    await io.any(write, rows, target)
                except Exception as error:
                    raise EvaluationError(
                        f"`{name}={str(target)!r}` could not be written ({error}); the results "
                        "are in this error's `.result`.",
                        result=result,
                    ) from error
        return result

    def _parallel(self, num_threads: int | None, progress: bool | Progress) -> Parallel:
        if progress is True and not can_draw():
            logger.warning(
                "display_progress draws with rich, which is not installed: "
                "`pip install dspylite[progress]`; going on without a bar"
            )
            progress = False
        return Parallel(
            num_threads,
            settings.max_errors if self.max_errors is None else self.max_errors,
            provide_traceback=self.provide_traceback,
            on_error="return",
            progress=progress,
        )


_RUN: Both[[Parallel, Scoring, list[Any]], list[Outcome[Row]]] = Both(Parallel.over, Parallel.aover)

_Target = tuple[Callable[[Rows, Path], None], Path]


def _result(items: list[Any], outcomes: list[Outcome[Row]], failure: float) -> EvaluationResult:
    results = [
        outcome.unwrap() if outcome.ok else (item[0], Prediction(), failure)
        for item, outcome in zip(items, outcomes, strict=True)
    ]
    total = sum(as_number(score) for _, _, score in results)
    errors = {outcome.index: outcome.error for outcome in outcomes if outcome.error is not None}
    result = EvaluationResult(round(100 * total / len(results), 2), results, errors)
    usage: dict[str, Usage] = {}
    for outcome in outcomes:
        for model, spent in outcome.usage.items():
            usage[model] = usage.get(model, Usage()) + spent
    result.set_lm_usage(usage)
    return result


def _check_errors(outcomes: list[Outcome[Row]], most: int | None) -> None:
    """Refuse to call it a result where too much failed.

    Raises:
        BatchError: `most` items failed.
    """
    if most is not None and sum(not outcome.ok for outcome in outcomes) >= most:
        reason = f"the evaluation ended because the limit of {most} errors was reached"
        raise batch_error(outcomes, reason=reason, cause=None)


def _report(result: EvaluationResult, failure_score: float) -> None:
    logger.info("%s%% over %d examples", result.score, len(result.results))
    if result.errors:
        kinds = Counter(type(error).__name__ for error in result.errors.values())
        logger.warning(
            "%d of %d items failed and count as %s (%s); `result.errors` has them by index",
            len(result.errors),
            len(result.results),
            failure_score,
            ", ".join(f"{count} {name}" for name, count in kinds.items()),
        )


# --- Checks before the run ------------------------------------------------------------------------


def _rereadable(devset: Any) -> Any:
    """Return examples that can be read again for every evaluation.

    Raises:
        EvaluationError: They cannot be iterated over, or are one text or dict.
    """
    if not isinstance(devset, Iterable) or isinstance(devset, str | bytes | Mapping | Example):
        raise EvaluationError(f"`devset` must be a list of examples, not {devset!r:.200}.")
    return list(devset) if isinstance(devset, Iterator) else devset


def _items(devset: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give each example with its inputs.

    Raises:
        InputFieldError: One is no example, or does not say which of its values are inputs.
    """
    for index, example in enumerate(devset):
        if not isinstance(example, Example):
            hint = "; write `Example(**values).with_inputs(...)`" * isinstance(example, Mapping)
            raise InputFieldError(
                f"Item {index} of `devset` must be an example, not {example!r:.200}{hint}."
            )
        try:
            inputs = example.inputs()
        except ValueError as error:
            raise InputFieldError(f"Item {index} of `devset`: {error}") from error
        yield example, dict(inputs.items())


def _checked_program(program: Any) -> Any:
    if isinstance(program, type) and issubclass(program, Module):
        raise EvaluationError(f"`program` is a class; write `{program.__name__}(...)`.")
    if not callable(program):
        raise EvaluationError(f"`program` must be a module or function, not {program!r:.200}.")
    return program


def _checked_metric(metric: Any) -> Any:
    if metric is None:
        raise EvaluationError("There is no metric: pass `metric=` here or to `Evaluate`.")
    if isinstance(metric, type) and issubclass(metric, Module):
        raise EvaluationError(f"`metric` is a class; write `{metric.__name__}()`.")
    if not callable(metric):
        raise EvaluationError(f"`metric` must be a function or module, not {metric!r:.200}.")
    return metric


def _checked_limit(display_table: Any) -> Any:
    """Return how many rows are shown, True for all, None for no table."""
    if display_table is None or display_table is False or display_table == 0:
        return None
    if not isinstance(display_table, int) or display_table < 0:
        raise EvaluationError(
            f"`display_table` must be a bool or a number of rows, not {display_table!r}."
        )
    return display_table


def _checked_number(name: str, value: Any) -> None:
    try:
        as_number(value)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"`{name}` must be a number, not {value!r:.200}.") from error


def _checked_targets(as_csv: Any, as_json: Any) -> dict[str, _Target]:
    """Return what is to be written where, by parameter.

    Raises:
        EvaluationError: A file cannot be written there, or both are the same.
    """
    csv_target = check_target("save_as_csv", as_csv)
    json_target = check_target("save_as_json", as_json)
    if csv_target is not None and csv_target == json_target:
        raise EvaluationError(f"`save_as_csv` and `save_as_json` are one file, `{csv_target}`.")
    targets: dict[str, _Target] = {}
    if csv_target is not None:
        targets["save_as_csv"] = (write_csv, csv_target)
    if json_target is not None:
        targets["save_as_json"] = (write_json, json_target)
    return targets
