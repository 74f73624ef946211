"""Equal requests under way at once: the first one asks, the others wait for its answer.

Not here: what is done with the answer (`cached.py`).
"""

from __future__ import annotations

import math
import threading
from contextvars import ContextVar

from dspylite.runtime.gates import Pass, wake
from dspylite.schema.messages import LMResponse

_LONGEST_AWAITED_S = 300.0
"""How long others wait for an answer: as long as an attempt may take by default. A leader whose
event loop stands still never ends its request."""
_LOOK_EVERY_S = 5.0
"""How soon others see that the leader's event loop is closed; guessed."""

LEADING: ContextVar[frozenset[str]] = ContextVar("dspylite_leading", default=frozenset())
"""Keys that this context is asking for: whoever waits for one of them would wait for itself."""


class Flight:
    """One request under way, and those who wait for its answer; a gate that opens at its end.

    Attributes:
        key: What it asks for, and in what time.
        loop: The event loop that makes it; None where a thread waits for it.
        thread: The thread that makes it.
        response: The answer; None while it is under way and where it failed.
    """

    def __init__(self, key: str, loop: object) -> None:
        self.key = key
        self.loop = loop
        self.thread = threading.get_ident()
        self.response: LMResponse | None = None
        # Without a lock, because a request may be ended by the garbage collector, which comes at
        # any moment, also to whoever holds one. Each step that matters is one operation of a dict.
        self._is_over = False
        self._waiting: dict[Pass, None] = {}
        self._look_at = self._until = math.inf

    def ask(self, now: float) -> Pass:
        """Wait for the end, but not for ever; the ticket is granted at once where that has come."""
        if not self._waiting:
            self._look_at = now + _LOOK_EVERY_S
            self._until = min(self._until, now + _LONGEST_AWAITED_S)
        ticket = Pass()
        ticket.look_again_at = self._look_at
        self._waiting[ticket] = None
        if self._is_over:
            ticket.granted = True
        return ticket

    def look(self, now: float) -> None:
        """Let all go where nobody makes the request any more, as far as one can see."""
        if now < self._look_at:
            return
        is_closed = getattr(self.loop, "is_closed", None)  # trio's loops end all that is in them
        if now >= self._until or (is_closed is not None and is_closed()):
            self.end()
            return
        self._look_at = now + _LOOK_EVERY_S
        for ticket in list(self._waiting):
            ticket.look_again_at = self._look_at

    def leave(self, ticket: Pass, now: float) -> None:
        """Wait no longer."""
        del now
        self._waiting.pop(ticket, None)

    @property
    def is_given_up(self) -> bool:
        """Whether those who waited went without an answer, and the request is still on the list."""
        return self._is_over and self.response is None

    def end(self) -> None:
        """Let all go who wait, and all who come."""
        self._is_over = True
        while self._waiting:
            try:
                ticket, _ = self._waiting.popitem()
            except KeyError:  # another thread took the last one
                break
            ticket.granted = True
            wake(ticket)


class Flights:
    """The requests under way, by key."""

    def __init__(self) -> None:
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Forget all: whoever asked is not here any more."""
        self._by_key: dict[str, Flight] = {}  # without a lock, as above

    def __len__(self) -> int:
        return len(self._by_key)

    def join(self, key: str, loop: object) -> tuple[Flight, bool]:
        """Return the request of a key that is under way, and whether the caller must make it.

        Args:
            key: What is asked for, and in what time.
            loop: The event loop of a caller that awaits; None for one that blocks its thread.
        """
        found = self._by_key.get(key)
        if found is not None:
            if not found.is_given_up:
                return found, False
            self.end(found)
        mine = Flight(key, loop)
        found = self._by_key.setdefault(key, mine)
        return found, found is mine

    def answered(self, flight: Flight, response: LMResponse) -> None:
        """Hand the answer to all who wait, and to all who come until it is kept or rejected."""
        flight.response = response
        flight.end()

    def end(self, flight: Flight) -> None:
        """Forget a request that failed, or whose answer is kept or rejected."""
        if self._by_key.get(flight.key) is flight:
            self._by_key.pop(flight.key, None)
        flight.end()
