"""How callbacks are asked and told things without harm to the work that they listen to.

Not here: what they are told, and when (`runtime/calls.py`).
"""

from __future__ import annotations

import logging
import sys
import weakref
from types import CoroutineType
from typing import Any

logger = logging.getLogger(__name__)

# The methods that failed, by class of callback, each with a token of whoever saw it first.
_failed: weakref.WeakKeyDictionary[type, dict[str, object]] = weakref.WeakKeyDictionary()


def tell(listener: Any, method: str, /, *args: Any, **details: Any) -> Any:
    """Call a method of a listener, if it has it; None if it has not, or if the method failed.

    The first failure of a method is a warning in the log. Later ones, of whatever instance of the
    class, are logged at DEBUG: a broken listener fails at every call, and says the same each time.
    """
    handled = sys.exception()
    try:
        handler = getattr(listener, method, None)
        if handler is None:
            return None
        told = handler(*args, **details)
        if isinstance(told, CoroutineType):
            told.close()  # else each call would warn of it once more
            raise TypeError(f"`{method}` is async, so it is never run; make it a plain function.")
        return told
    except Exception as error:  # reported here; a listener must never harm the call it listens to
        _part_from(error, handled)
        is_first = _is_first_failure(type(listener), method)
        logger.log(
            logging.WARNING if is_first else logging.DEBUG,
            "%s of %s failed%s",
            method,
            type(listener).__name__,
            "; further failures of it are logged at DEBUG" if is_first else " again",
            exc_info=True,
        )
        return None


def _part_from(error: BaseException, handled: BaseException | None) -> None:
    """Leave out of a traceback what was being dealt with anyway, whose text may quote an answer."""
    while error.__context__ is not None:
        if error.__context__ is handled:
            error.__context__ = None
            return
        error = error.__context__


def _is_first_failure(cls: type, method: str) -> bool:
    mine = object()
    # `setdefault` lets one of several threads win, without a lock.
    return _failed.setdefault(cls, {}).setdefault(method, mine) is mine
