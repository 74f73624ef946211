"""Tells a thread that Ctrl-C met the main thread, which alone hears of it.

No signal handler is touched. Not here: what is then stopped (`concurrency/crew.py`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

# Public, in spite of their names: they are documented with the module.
_current_exceptions: Callable[[], Mapping[int | None, Any]] = vars(sys)["_current_exceptions"]
_current_frames: Callable[[], Mapping[int, FrameType]] = vars(sys)["_current_frames"]

LOOK_EVERY_S = 0.2
"""How often a thread looks that must end soon after Ctrl-C, in seconds.

A waiting main thread too: not every system and not every `_thread.interrupt_main` wakes it."""


def is_main_interrupted() -> bool:
    """Tell whether a `KeyboardInterrupt` is on its way through the main thread, or has ended it.

    The main thread may be on its way out of a `with` block that waits for the very thread that
    asks, as that of an executor does; or it is gone, and the interpreter waits for its threads.
    """
    main = threading.main_thread()
    if not main.is_alive():
        return _was_last()
    handled: Any = _current_exceptions().get(main.ident)
    if isinstance(handled, tuple):  # Python 3.11 gives what `sys.exc_info` gives
        handled = handled[1]
    return isinstance(handled, KeyboardInterrupt) or (_was_last() and _is_leaving(main))


def _was_last() -> bool:
    """Tell whether the exception that nobody caught, printed last, was a `KeyboardInterrupt`."""
    return isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)


def _is_leaving(main: threading.Thread) -> bool:
    """Tell whether the interpreter is ending, and waits for executors' threads before all others.

    The main thread counts as alive meanwhile; only what it runs tells.
    """
    frame = _current_frames().get(main.ident or 0)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return (
        frame is not None
        and frame.f_code.co_name == "_shutdown"
        and frame.f_globals.get("__name__") == "threading"
    )
