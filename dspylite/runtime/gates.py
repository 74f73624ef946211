"""A concurrency limit that threads and event loops share, first come first served.

Not here: how a caller waits (`Io.enter`), and what a limit is for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from dspylite.abc import Ticket
from dspylite.runtime.forks import watch_forks


class Pass:
    """A ticket of `Places`."""

    __slots__ = ("gone", "granted", "look_again_at", "wake")

    def __init__(self) -> None:
        self.granted = False
        self.look_again_at: float | None = None  # no time lets anybody in, only a leaver does
        self.wake: Callable[[], None] | None = None
        self.gone = False


class Places:
    """A gate with a number of places; use it with `io.enter(gate)`.

    A forked child starts with all places free.

    Args:
        count: How many callers may be inside at once, at least 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"A gate needs at least 1 place, not {count}.")
        self._count = count
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Forget who was inside and who waited."""
        self._lock = threading.Lock()  # guards both below; `wake` is called outside it
        self._free = self._count
        self._queue: deque[Pass] = deque()

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._queue)

    def ask(self, now: float) -> Pass:
        """Queue up; the ticket is granted at once where a place is free."""
        del now
        ticket = Pass()
        with self._lock:
            if self._free and not self._queue:
                self._free -= 1
                ticket.granted = True
            else:
                self._queue.append(ticket)
        return ticket

    def look(self, now: float) -> None:
        """Do nothing: time alone frees no place."""

    def leave(self, ticket: Pass, now: float) -> None:
        """Give the place to the next in the queue, or give up waiting; a repeat does nothing."""
        del now
        leaver: Pass | None = ticket
        while leaver is not None:
            heir = self._next_after(leaver)
            # One that cannot come any more passes its place on.
            leaver = None if heir is None or wake(heir) else heir

    def _next_after(self, ticket: Pass) -> Pass | None:
        with self._lock:
            if ticket.gone:
                return None
            ticket.gone = True
            if not ticket.granted:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                return None
            heir = self._queue.popleft() if self._queue else None
            if heir is None:
                self._free = min(self._count, self._free + 1)
            else:
                heir.granted = True
            return heir


def wake(ticket: Ticket) -> bool:
    """Tell the holder of a ticket that something changed; False if its event loop is closed."""
    call = ticket.wake
    if call is None:  # it has not begun to wait, and will look before it does
        return True
    try:
        call()
    except RuntimeError:
        return False
    return True
