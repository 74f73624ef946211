"""Results as rows of named columns, as tables and files have them.

Not here: the forms of these (`programs/evaluation/table.py`, `programs/evaluation/export.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dspylite.programs.evaluation.result import EvaluationResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Results in columns.

    Attributes:
        columns: The names, in order.
        rows: The values of each result by column; those it does not have are missing.
        score: The column of the scores, the last one but for that of the errors.
        failed: Places of the items that failed.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    score: str
    failed: frozenset[int]


def as_rows(result: EvaluationResult, metric: str) -> Rows:
    """Lay results out in columns: the example's values, the prediction's, the score.

    A name that examples and predictions share becomes `example_name` and `pred_name`, in all rows;
    where that is a name already, the prefix stands more than once.
    A prediction that has no names of its own stands in the column `prediction`. Where items failed,
    a last column `error` says why.

    Args:
        result: What to lay out.
        metric: The name of the score's column, if no other column has it.
    """
    pairs = [(_named(example), _named(made)) for example, made, _ in result.results]
    shared = _keys(given for given, _ in pairs) & _keys(made for _, made in pairs)
    taken = _keys(record for pair in pairs for record in pair)
    places: dict[str, dict[str, str]] = {"example_": {}, "pred_": {}}
    for prefix, places_of in places.items():
        for name in sorted(shared):
            places_of[name] = _free(f"{prefix}{name}", taken, prefix)
            taken.add(places_of[name])
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for given, made in pairs:
        row: dict[str, Any] = {}
        for places_of, values in zip(places.values(), (given, made), strict=True):
            for name, value in values.items():
                row[places_of.get(name, name)] = value
        columns.update(dict.fromkeys(row))
        rows.append(row)
    score = _free(metric, columns)
    columns[score] = None
    for row, (_, _, value) in zip(rows, result.results, strict=True):
        row[score] = value
    if result.errors:
        error = _free("error", columns)
        columns[error] = None
        for index, problem in result.errors.items():
            rows[index][error] = as_text(problem, with_type=True)
    return Rows(columns=list(columns), rows=rows, score=score, failed=frozenset(result.errors))


def as_text(value: Any, *, with_type: bool = False) -> str:
    """Return a value as text, also if it refuses to be written."""
    name = type(value).__name__
    try:
        return f"{name}: {value}" if with_type else str(value)
    except Exception:  # noqa: BLE001  # the value's own `__str__` fails; results are not lost for it
        return f"<{name}>"


def _named(value: Any) -> Mapping[str, Any]:
    items: Any = getattr(value, "items", None)
    if callable(items):
        try:
            pairs: Any = items()
            return {str(name): content for name, content in pairs}
        except Exception:  # noqa: BLE001  # an `items` of another meaning; the value is shown whole
            pass
    return {"prediction": value}


def _keys(records: Iterable[Mapping[str, Any]]) -> set[str]:
    return {name for record in records for name in record}


def _free(name: str, taken: Collection[str], prefix: str = "metric_") -> str:
    while name in taken:
        name = f"{prefix}{name}"
    return name
