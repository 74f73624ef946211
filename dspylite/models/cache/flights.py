"""Equal requests under way at once: the first one asks, the others wait for its answer.

Not here: what is done with the answer (`cached.py`).
"""

from __future__ import annotations

import threading
from contextvars import ContextVar

from dspylite.runtime.gates import Pass, wake
from dspylite.schema.messages import LMResponse

LEADING: ContextVar[frozenset[str]] = ContextVar("dspylite_leading", default=frozenset())
"""Keys that this context is asking for: whoever waits for one of them would wait for itself."""


class Flight:
    """One request under way, and those who wait for its answer; a gate that opens at its end.

    Attributes:
        key: What it asks for.
        response: The answer; None while it is under way and where it failed.
    """

    def __init__(self, key: str, lock: threading.Lock) -> None:
        self.key = key
        self.response: LMResponse | None = None
        self._lock = lock  # that of all flights; guards the two below
        self._is_over = False
        self._waiting: set[Pass] = set()

    def ask(self, now: float) -> Pass:
        """Wait for the end; the ticket is granted at once where that has come."""
        del now
        ticket = Pass()
        with self._lock:
            ticket.granted = self._is_over
            if not ticket.granted:
                self._waiting.add(ticket)
        return ticket

    def look(self, now: float) -> None:
        """Do nothing: time alone ends no request."""

    def leave(self, ticket: Pass, now: float) -> None:
        """Wait no longer."""
        del now
        with self._lock:
            self._waiting.discard(ticket)

    def take_off_waiting(self) -> set[Pass]:
        """End it and return who waited; the lock of all flights must be held."""
        self._is_over = True
        waiting, self._waiting = self._waiting, set()
        for ticket in waiting:
            ticket.granted = True
        return waiting


class Flights:
    """The requests under way, by key."""

    def __init__(self) -> None:
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Forget all: whoever asked is not here any more."""
        self._lock = threading.Lock()  # guards all flights; holders are woken outside it
        self._by_key: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def join(self, key: str) -> tuple[Flight, bool]:
        """Return the request of a key that is under way, and whether the caller must make it."""
        with self._lock:
            found = self._by_key.get(key)
            if found is not None:
                return found, False
            made = self._by_key[key] = Flight(key, self._lock)
            return made, True

    def answered(self, flight: Flight, response: LMResponse) -> None:
        """Hand the answer to all who wait, and to all who come until it is kept or rejected."""
        with self._lock:
            flight.response = response
            waiting = flight.take_off_waiting()
        for ticket in waiting:
            wake(ticket)

    def end(self, flight: Flight) -> None:
        """Forget a request that failed, or whose answer is kept or rejected."""
        with self._lock:
            if self._by_key.get(flight.key) is flight:
                del self._by_key[flight.key]
            waiting = flight.take_off_waiting()
        for ticket in waiting:
            wake(ticket)
