"""The progress bar of a batch, drawn by rich on stderr. The only file that imports it.

Not here: when progress is reported (`concurrency/run.py`, `models/embedding/run.py`).
"""

from __future__ import annotations

import functools
import sys
from types import TracebackType
from typing import Any, Self

from dspylite.errors import MissingExtraError
from dspylite.runtime.loops import is_in_notebook


class Bar:
    """A bar that is not drawn; `update` is None, so that a batch does not even report to it."""

    update: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar off the screen's live area."""


class _RichBar(Bar):
    def __init__(self, total: int | None) -> None:
        console, progress = _load_rich()
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=console.Console(stderr=True),
        )
        self._task = self._progress.add_task("batch", total=total)

    def update(self, done: int, total: int | None, errors: int) -> None:
        """Draw the state after an item."""
        label = f"batch ({errors} failed)" if errors else "batch"
        self._progress.update(self._task, completed=done, total=total, description=label)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()


def show_progress(total: int | None, *, wanted: bool) -> Bar:
    """Return the bar of a batch: drawn if it is wanted and stderr is a terminal or a notebook's.

    Raises:
        MissingExtraError: A bar should be drawn and rich is not installed.
    """
    if not wanted or not _is_watched():
        return Bar()
    return _RichBar(total)


def can_draw() -> bool:
    """Tell whether a bar can be drawn, or need not be because nobody would see it."""
    try:
        return not _is_watched() or bool(_load_rich())
    except MissingExtraError:
        return False


def _is_watched() -> bool:
    return sys.stderr.isatty() or is_in_notebook()


@functools.cache
def _load_rich() -> tuple[Any, Any]:
    try:
        # An extra, and only for a bar that is really drawn.
        from rich import console, progress  # noqa: PLC0415
    except ImportError:
        raise MissingExtraError(
            "`progress=True` draws with rich: `pip install dspylite[progress]`, or pass a function "
            "`progress(done, total, errors)`."
        ) from None
    return console, progress
