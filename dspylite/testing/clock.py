"""`FakeClock`: time that passes only when somebody sleeps.

Not here: the drivers that read it (`runtime/flow.py`).
"""

from __future__ import annotations

import threading
from contextvars import Token
from types import TracebackType
from typing import Self

import anyio
from anyio.lowlevel import checkpoint

from dspylite.abc import Clock
from dspylite.runtime.clock import CLOCK


class FakeClock:
    """The clock of all waits inside its `with` block, and in the threads and tasks it reaches.

    A sleep returns at once and moves the clock, so that tests of retries and limits take no time.

    Args:
        start_s: What the clock shows first, in seconds.

    Attributes:
        sleeps: Every sleep so far, in seconds, in order.

    Example:
        >>> with FakeClock() as clock:
        ...     clock.sleep(60)
        >>> clock.now(), clock.sleeps
        (60.0, [60])
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._lock = threading.Lock()  # guards `_now` and `sleeps`
        self._now = start_s
        self.sleeps: list[float] = []
        self._token: Token[Clock] | None = None

    def now(self) -> float:
        """Return the seconds it shows."""
        with self._lock:
            return self._now

    def sleep(self, seconds: float) -> None:
        """Move the clock on."""
        with self._lock:
            self._now += max(0.0, seconds)
            self.sleeps.append(seconds)

    async def asleep(self, seconds: float) -> None:
        """Move the clock on, and let other tasks run."""
        self.sleep(seconds)
        await checkpoint()

    def wait(self, event: threading.Event, seconds: float | None) -> None:
        """Let the seconds pass at once, unless the event is set; without a limit, really wait."""
        if seconds is None:
            event.wait()
        elif not event.is_set():
            self.sleep(seconds)

    async def await_(self, event: anyio.Event, seconds: float | None) -> None:
        """Wait likewise on this event loop."""
        if seconds is None:
            await event.wait()
        elif not event.is_set():
            await self.asleep(seconds)

    def __enter__(self) -> Self:
        self._token = CLOCK.set(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the real clock back."""
        if self._token is not None:
            CLOCK.reset(self._token)
            self._token = None
