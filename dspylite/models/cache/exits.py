"""The end of a process that still has rows to write, or files open.

Not here: what a store then does, and how long it takes at most for the next rows (`store.py`).
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from typing import Protocol

MOST_AT_EXIT_S = 10.0
"""How long the end of the process waits for all rows to be written; guessed, after what a person
waits for a program that ended."""


class Closable(Protocol):
    """What is to be closed."""

    def close(self, timeout_s: float) -> None:
        """Write what waits, and close the files.

        Args:
            timeout_s: Seconds after which the rest is left.
        """
        ...


_stores: weakref.WeakSet[Closable] = weakref.WeakSet()
_closes_in: list[int] = []  # processes whose end is prepared


def note(store: Closable) -> None:
    """Have a store closed at the end, if `close_at_exit` is called by then."""
    _stores.add(store)


def close_at_exit() -> None:
    """Have the end of this process wait a little for rows still to be written, and close files.

    sqlite's log goes with the last process that closes the file; others need not read it first.
    """
    if os.getpid() in _closes_in:
        return
    _closes_in.append(os.getpid())
    atexit.register(_close_all)
    # Children of multiprocessing end without `atexit`.
    helper = sys.modules.get("multiprocessing.util")
    if helper is not None:
        helper.Finalize(None, _close_all, exitpriority=10)


def _close_all() -> None:
    deadline = time.monotonic() + MOST_AT_EXIT_S
    for store in list(_stores):
        store.close(max(0.0, deadline - time.monotonic()))
