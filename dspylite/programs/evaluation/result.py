"""What an evaluation found: `EvaluationResult`.

Not here: how it is shown (`programs/evaluation/table.py`) and written to files
(`programs/evaluation/export.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspylite.schema.records import Prediction

Row = tuple[Any, Any, Any]
"""An example, the prediction made for it, and the score of that prediction."""


class EvaluationResult(Prediction):
    """The score of a program over a set of examples, and what it is made of.

    Args:
        score: The mean of all scores in percent, rounded to two decimals.
        results: An (example, prediction, score) for each example, in their order.
        errors: What failed, by place of the example.

    Attributes:
        score: As given.
        results: As given. Where an item failed the prediction is an empty one, and the score that
            of failures.
        errors: As given. A `MetricError` where the metric failed; else what the program raised.

    Example:
        >>> EvaluationResult(50.0, [("1+1", Prediction(answer="2"), 0.5)])
        EvaluationResult(score=50.0, results=<list of 1 result>)
    """

    score: float
    results: list[Row]

    def __init__(
        self,
        score: float,
        results: Sequence[Row],
        errors: Mapping[int, BaseException] | None = None,
    ) -> None:
        super().__init__(score=score, results=list(results))
        self.__dict__["_errors"] = dict(errors or {})

    @property
    def errors(self) -> dict[int, BaseException]:
        """What failed, by place of the example."""
        found: dict[int, BaseException] = self.__dict__["_errors"]
        return found

    def __repr__(self) -> str:
        failed = f", errors=<of {_counted(self.errors, 'item')}>" if self.errors else ""
        return (
            f"{type(self).__name__}(score={self.score!r}, "
            f"results=<list of {_counted(self.results, 'result')}>{failed})"
        )


def _counted(things: Any, name: str) -> str:
    return f"{len(things)} {name}" if len(things) == 1 else f"{len(things)} {name}s"
