"""Results as a table: plain text on stdout, HTML in a notebook.

Not here: which columns there are (`programs/evaluation/rows.py`).
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from dspylite.programs.evaluation.rows import Rows, as_text
from dspylite.programs.evaluation.scoring import as_number
from dspylite.runtime.loops import is_in_notebook

logger = logging.getLogger(__name__)

MAX_CELL_CHARS = 40
"""Longest text of a cell; guessed, so that three or four columns fit a terminal."""
_MAX_HTML_CHARS = 400
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


class Table:
    """Rows as a reader sees them; `str()` gives text, notebooks ask for HTML.

    Values are clipped and their control characters escaped: what a model wrote cannot move the
    cursor, add lines or tags.

    Args:
        rows: What is shown.
        limit: Most rows shown; the last line says how many are not. None: all.
    """

    def __init__(self, rows: Rows, limit: int | None = None) -> None:
        self._rows = rows
        self._shown = rows.rows[:limit]
        self._hidden = len(rows.rows) - len(self._shown)

    def __str__(self) -> str:
        lines = self._lines(MAX_CELL_CHARS)
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        drawn = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*drawn, *self._rest()])

    def _repr_html_(self) -> str:
        head, *body = self._lines(_MAX_HTML_CHARS)
        rows = [_row_of(head, "th"), *(_row_of(cells, "td") for cells in body)]
        rest = "".join(f"<p>{text}</p>" for text in self._rest())
        return f"<table>{''.join(rows)}</table>{rest}"

    def _lines(self, limit: int) -> list[list[str]]:
        names = self._rows.columns
        return [
            [clipped(name, limit) for name in names],
            *(
                [self._cell(index, row, name, limit) for name in names]
                for index, row in enumerate(self._shown)
            ),
        ]

    def _cell(self, index: int, row: dict[str, Any], name: str, limit: int) -> str:
        if name not in row:
            return ""
        if name != self._rows.score:
            return clipped(as_text(row[name]), limit)
        number = as_number(row[name])
        is_good = number > 0 and index not in self._rows.failed
        text = str(row[name]) if isinstance(row[name], bool | int) else f"{number:.3f}"
        return f"{'✔' if is_good else '✘'} [{text}]"

    def _rest(self) -> list[str]:
        return [f"... and {self._hidden} more"] if self._hidden else []


def show_table(rows: Rows, limit: int | None = None) -> None:
    """Show results where the user looks: in the notebook's cell, else on stdout.

    It never raises: a result is not lost because nobody reads it.
    """
    table = Table(rows, limit)
    try:
        if is_in_notebook():
            sys.modules["IPython"].display.display(table)
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(str(table).encode(encoding, "backslashreplace").decode(encoding))
    except Exception:  # stdout is closed, or the notebook's display fails; it is logged
        logger.warning("the table of an evaluation could not be shown", exc_info=True)


def clipped(text: str, limit: int) -> str:
    r"""Return a text in one line of at most `limit` characters, control characters escaped.

    Example:
        >>> clipped("two\nlines", 20), clipped("a long text", 6)
        ('two\\nlines', 'a lon…')
    """
    start = text[: limit + 1]
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in start
    )
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def _row_of(cells: list[str], tag: str) -> str:
    inside = "".join(f"<{tag}>{cell.translate(_HTML)}</{tag}>" for cell in cells)
    return f"<tr>{inside}</tr>"
