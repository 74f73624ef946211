"""A concurrency limit that threads and event loops share, first come first served.

Not here: how a caller waits (`Io.enter`), and what a limit is for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class _Ticket:
    __slots__ = ("gone", "granted", "wake")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.granted = False
        self.gone = False
        self.wake = wake


class Places:
    """A gate with a number of places; use it with `io.enter(gate)`.

    Args:
        count: How many callers may be inside at once, at least 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"A gate needs at least 1 place, not {count}.")
        self._lock = threading.Lock()  # guards both below; `wake` is called outside it
        self._free = count
        self._queue: deque[_Ticket] = deque()

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._queue)

    def ask(self, wake: Callable[[], None]) -> _Ticket:
        """Queue up; `wake` is called once from any thread when a ticket that waited is granted."""
        ticket = _Ticket(wake)
        with self._lock:
            if self._free and not self._queue:
                self._free -= 1
                ticket.granted = True
            else:
                self._queue.append(ticket)
        return ticket

    def leave(self, ticket: _Ticket) -> None:
        """Give the place to the next in the queue, or give up waiting; a repeat does nothing."""
        with self._lock:
            if ticket.gone:
                return
            ticket.gone = True
            if not ticket.granted:
                self._queue.remove(ticket)
                return
            heir = self._queue.popleft() if self._queue else None
            if heir is None:
                self._free += 1
            else:
                heir.granted = True
        if heir is not None:
            try:
                heir.wake()
            except RuntimeError:
                # The heir's event loop is closed: it cannot come, pass the place on.
                self.leave(heir)
