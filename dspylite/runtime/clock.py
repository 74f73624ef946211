"""The clock that plans live by, and the deadline of the call in progress.

Not here: how a plan waits (`runtime/flow.py`).
"""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

import anyio

from dspylite.abc import Clock
from dspylite.errors import DeadlineExceededError


class Latch(threading.Event):
    """An event that one thread waits for, at a third of the cost.

    Whoever waits for a plain event takes a lock that the setter may hold still, and so is switched
    to twice; under load that costs more than all else in a wait.
    """

    def __init__(self) -> None:
        # Held while the event is not set; the base's own condition is never made.
        self._held = threading.Lock()
        self._held.acquire()

    def is_set(self) -> bool:
        """Tell whether it is set."""
        return not self._held.locked()

    def set(self) -> None:
        """Let the waiter go on; a repeat does nothing."""
        try:
            self._held.release()
        except RuntimeError:
            pass  # it is set

    def clear(self) -> None:
        """Let whoever waits next wait again."""
        self._held.acquire(blocking=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Block this thread until it is set or the seconds are over; tell whether it is set."""
        if not self._held.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            return False
        self.set()
        return True


class SystemClock:
    """The real time."""

    def now(self) -> float:
        """Return the monotonic clock's seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block this thread."""
        time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Wait on this event loop."""
        await anyio.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float | None) -> None:
        """Block this thread until the event is set or the seconds are over."""
        event.wait(None if seconds is None else min(seconds, threading.TIMEOUT_MAX))

    async def await_(self, event: anyio.Event, seconds: float | None) -> None:
        """Wait on this event loop until the event is set or the seconds are over."""
        if seconds is None:  # a scope for each of thousands that wait costs more than the rest
            await event.wait()
            return
        with anyio.move_on_after(seconds):
            await event.wait()


_SYSTEM_CLOCK = SystemClock()
CLOCK: ContextVar[Clock] = ContextVar("dspylite_clock", default=_SYSTEM_CLOCK)
"""The clock of this context's drivers; tests put another one here."""

_DEADLINE: ContextVar[float | None] = ContextVar("dspylite_deadline", default=None)


def time_left() -> float | None:
    """Return the seconds left until the deadline of this context; negative past it, None without.

    Example:
        >>> time_left() is None
        True
        >>> with Deadline(5):
        ...     4 < (time_left() or 0) <= 5
        True
    """
    deadline = _DEADLINE.get()
    return None if deadline is None else deadline - CLOCK.get().now()


def deadline_error(doing: str) -> DeadlineExceededError:
    """Make the error of a call whose time ran out.

    Args:
        doing: What it was doing, such as `"waiting for a place"`.
    """
    return DeadlineExceededError(
        f"The deadline passed while {doing}. Give the call more time by `deadline_s=`, or ask for "
        "less in one call."
    )


class Deadline:
    """A block that must end in so many seconds; of nested ones the nearest counts.

    Waits of plans inside it, in whatever thread or task the context reaches, end at the deadline
    with `DeadlineExceededError`.

    Args:
        seconds: From the moment the block is entered. None sets no deadline.
    """

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._token: Token[float | None] | None = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            mine, outer = CLOCK.get().now() + self._seconds, _DEADLINE.get()
            self._token = _DEADLINE.set(mine if outer is None else min(mine, outer))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is None:
            return
        try:
            _DEADLINE.reset(self._token)
        except ValueError:
            pass  # left in another context: what was set ended with the context it was set in
        self._token = None
