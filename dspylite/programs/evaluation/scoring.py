"""One item of an evaluation: the program's prediction for an example, and the metric's score of it.

Not here: the run over all examples (`programs/evaluation/evaluate.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

from dspylite.abc import Io
from dspylite.concurrency.items import Job, invoke
from dspylite.concurrency.outcome import told
from dspylite.errors import CallCancelledError, MetricError, clip
from dspylite.programs.evaluation.result import Row
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow

Metric = Callable[..., Any]
"""Called as `metric(example, prediction)`, sync or async; a module is one, too.

It returns a bool, a number, or a prediction with a `score`.
"""


class Scoring:
    """Runs a program on an example and scores what comes out, for threads and tasks alike.

    Args:
        program: A module or function, sync or async.
        metric: Scores what it returns.
    """

    def __init__(self, program: Any, metric: Metric) -> None:
        self._program = program
        self._metric = metric

    def __call__(self, example: Any, inputs: Mapping[str, Any]) -> Row:
        """Score one example on this thread."""
        return run_flow(self.plan(BLOCKING, example, inputs))

    async def acall(self, example: Any, inputs: Mapping[str, Any]) -> Row:
        """Score one example on this event loop."""
        return await self.plan(ASYNC, example, inputs)

    async def plan(self, io: Io, example: Any, inputs: Mapping[str, Any]) -> Row:
        """Score one example.

        Raises:
            MetricError: The metric raised, or gave no score.
        """
        prediction = await invoke(io, Job(self._program, (), inputs))
        name = metric_name(self._metric)
        try:
            score = await invoke(io, Job(self._metric, (example, prediction), {}))
            as_number(score)
        except CallCancelledError:
            raise
        except (Exception, SystemExit) as error:  # it is kept as the item's error
            raise MetricError(
                f"The metric `{name}` failed: {clip(told(error))}", prediction=prediction
            ) from error
        return example, prediction, score


def as_number(score: Any) -> float:
    """Return a score as a number, as scores are added up.

    Raises:
        TypeError: It is no number, nor a prediction with a `score`.
        ValueError: It is NaN or infinite.

    Example:
        >>> as_number(True), as_number(0.5)
        (1.0, 0.5)
    """
    if isinstance(score, str | bytes) or not isinstance(score, SupportsFloat):
        raise TypeError(
            f"it returned {score!r:.200} ({type(score).__name__}); a metric returns a bool, a "
            "number, or a prediction with a `score`."
        )
    number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}, which cannot be averaged.")
    return number


def metric_name(metric: Any) -> str:
    """Name a metric as tables and files do: a function by its name, else the class."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    return str(getattr(metric, "__name__", None) or type(metric).__name__)
