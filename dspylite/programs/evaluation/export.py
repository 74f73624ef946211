"""Results as files: CSV and JSON.

Not here: which columns there are (`programs/evaluation/rows.py`).
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from dspylite.errors import EvaluationError
from dspylite.programs.evaluation.rows import Rows, as_text
from dspylite.programs.evaluation.scoring import as_number
from dspylite.schema.records import Example

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def check_target(name: str, path: str | os.PathLike[str] | None) -> Path | None:
    """Return where a file will be written, if it can be.

    Args:
        name: The parameter, for the message.
        path: As the user gave it; None for no file.

    Raises:
        EvaluationError: Its directory does not exist or cannot be written to, or something that is
            no file is there.
    """
    if path is None or path == "":
        return None
    target = Path(os.path.realpath(path))  # a link is written through, not replaced
    if not target.parent.is_dir():
        raise EvaluationError(f"`{name}={str(path)!r}`: there is no directory `{target.parent}`.")
    if target.exists() and not target.is_file():
        raise EvaluationError(f"`{name}={str(path)!r}` is there already and is no file.")
    if not os.access(target.parent, os.W_OK):
        raise EvaluationError(
            f"`{name}={str(path)!r}`: the directory `{target.parent}` cannot be written to."
        )
    return target


def write_csv(rows: Rows, target: Path) -> None:
    """Write a header and a line for each result, in UTF-8.

    A text at which a spreadsheet would compute (it begins with `=`, `+`, `-`, `@`, a tab or a line
    break, and is no number) gets an apostrophe in front: what a model wrote must not run
    as a formula in the program that opens the file. The JSON file has every value as it is.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_inert(name) for name in rows.columns])
    for row in rows.rows:
        cells = {name: _in_csv(value) for name, value in row.items()}
        cells[rows.score] = str(_plain_score(row[rows.score], whole=False))
        writer.writerow([cells.get(name, "") for name in rows.columns])
    _write(target, text.getvalue())


def write_json(rows: Rows, target: Path) -> None:
    """Write a list of one object for each result, in UTF-8, a result on a line.

    A value that JSON cannot express is written as its text.
    """
    lines: list[str] = []
    for row in rows.rows:
        cells = {**row, rows.score: _plain_score(row[rows.score], whole=True)}
        pairs = (f"{_in_json(name)}: {_in_json(value)}" for name, value in cells.items())
        lines.append(f"{{{', '.join(pairs)}}}")
    _write(target, "[" + ",\n ".join(lines) + "]\n")


def _plain_score(score: Any, *, whole: bool) -> Any:
    """Give a score as a number; with `whole`, one that says more than its number as it is."""
    if isinstance(score, int | float) or (whole and isinstance(score, Example)):
        return score
    return as_number(score)


def _in_csv(value: Any) -> str:
    return "" if value is None else _inert(as_text(value))


def _inert(text: str) -> str:
    if not text.startswith(_FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _in_json(value: Any) -> str:
    try:
        return json.dumps(value, default=_plain, ensure_ascii=False, allow_nan=False)
    except Exception:  # noqa: BLE001  # a value that cannot be expressed, or whose own methods fail
        return json.dumps(as_text(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Example):
        return value.toDict()
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json")
    if isinstance(value, set | frozenset):
        return list(value)
    if callable(getattr(value, "items", None)):
        return dict(value.items())
    return as_text(value)


def _write(target: Path, text: str) -> None:
    """Write a whole file or none: readers never see a half, and an older file is not lost."""
    part = target.with_name(f".{target.name}.{os.getpid():x}-{os.urandom(4).hex()}.part")
    try:
        # In JSON the replacement of a lone surrogate is its own escape; in CSV it is at least seen.
        with part.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
