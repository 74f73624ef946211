"""What the fake server saw: the log of requests, their counts, and who waits for either.

Not here: reading requests (`wire.py`) and deciding on answers (`server.py`).
"""

from __future__ import annotations

import asyncio  # noqa: TID251 -- a test server on raw streams, with a loop and a thread of its own
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from dspylite.testing.openai_format import last_user_text
from dspylite.testing.wire import HttpRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """One request as the server saw it, and what became of it.

    Attributes:
        index: Place in the order of arrival, from 0.
        connection: Number of the TCP connection, from 0; equal where it was kept alive.
        method: Such as `"POST"`.
        path: Without the query.
        query: Without the `?`.
        headers: Values by lower-case name.
        body: The parsed JSON, else the text; empty text where there was none.
        api_key: From `Authorization: Bearer`; None where there was none.
        request_id: The `x-request-id` of the answer.
        received_at: When its last byte had come, in seconds of `time.monotonic()`.
        in_flight: Requests in flight at that moment, this one included.
        answered_at: When its answer's last bytes left, or were dropped; None until then.
        status: Status sent; None until `answered_at`, and for good where nothing was sent.
        usage: What its answer counted for; None unless it was generated and sent to the end.
        client_left: Whether the client closed the connection before its answer was complete.
    """

    index: int
    connection: int
    method: str
    path: str
    query: str
    # A real key may get here by mistake, and a failed test prints what it compared.
    headers: Mapping[str, str] = field(repr=False)
    body: object
    api_key: str | None = field(repr=False)
    request_id: str
    received_at: float
    in_flight: int
    answered_at: float | None = None
    status: int | None = None
    usage: Mapping[str, object] | None = None
    client_left: bool = False

    @property
    def json(self) -> Mapping[str, object]:
        """The body's fields; none where it was no JSON object."""
        body: object = self.body
        return cast("Mapping[str, object]", body) if isinstance(body, dict) else {}

    @property
    def prompt(self) -> str:
        """The last user message, or the only prompt or input; empty where there is none."""
        return last_user_text(self.json)


class Entry:
    """A place in the log, whose frozen record is exchanged for a fuller one at the end."""

    __slots__ = ("is_open", "record")

    def __init__(self, record: RecordedRequest) -> None:
        self.record = record
        self.is_open = True


class Hold:
    """What requests are kept waiting for; unlike a single event it belongs to no loop."""

    def __init__(self) -> None:
        self.is_over = False
        self._waiting: set[asyncio.Event] = set()

    async def wait(self) -> None:
        """Wait on the server's loop until the hold is over."""
        if self.is_over:
            return
        # `is_over` is set before `wake` is posted, so a request that comes too early for the one
        # has its place in `_waiting` in time for the other.
        released = asyncio.Event()
        self._waiting.add(released)
        try:
            await released.wait()
        finally:
            self._waiting.discard(released)

    def wake(self) -> None:
        """Let go of those who wait; called on the server's loop."""
        for released in self._waiting:
            released.set()


class Journal:
    """The log and the counts of one server, for any number of readers and one writing loop.

    Args:
        max_recorded: Latest requests kept in the log. None keeps all.
    """

    def __init__(self, *, max_recorded: int | None) -> None:
        self._entries: deque[Entry] = deque(maxlen=max_recorded)
        self._holds: tuple[Hold, ...] = ()
        self._received = 0
        self._in_flight = 0
        self._max_in_flight = 0
        self._request_numbers = itertools.count(1)
        self.renew_lock()

    def renew_lock(self) -> None:
        """Forget who held the lock, as a forked child must: its holder may not exist there."""
        # Guards all of the above; notified when a count changes. Nothing is called inside of it.
        self._changed = threading.Condition(threading.Lock())

    def next_request_id(self) -> str:
        """Return the next `x-request-id`: `req-1`, `req-2` and so on."""
        return f"req-{next(self._request_numbers)}"

    def receive(self, request: HttpRequest, *, connection: int) -> tuple[Entry, tuple[Hold, ...]]:
        """Log a request, and return its entry with the holds that it has to wait for."""
        body: object
        try:
            body = json.loads(request.body) if request.body else ""
        except (ValueError, RecursionError):
            body = request.body.decode("utf-8", "replace")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        with self._changed:
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
            entry = Entry(
                RecordedRequest(
                    index=self._received,
                    connection=connection,
                    method=request.method,
                    path=request.path,
                    query=request.query,
                    headers=request.headers,
                    body=body,
                    api_key=key if scheme.lower() == "bearer" else None,
                    request_id=self.next_request_id(),
                    received_at=time.monotonic(),
                    in_flight=self._in_flight,
                )
            )
            self._received += 1
            self._entries.append(entry)
            self._changed.notify_all()
            return entry, self._holds

    def settle(
        self,
        entry: Entry,
        *,
        status: int | None,
        usage: Mapping[str, object] | None = None,
        client_left: bool = False,
    ) -> None:
        """Close the books of a request, the first time this is called for it."""
        with self._changed:
            if not entry.is_open:
                return
            entry.is_open = False
            entry.record = replace(
                entry.record,
                answered_at=time.monotonic(),
                status=status,
                usage=usage,
                client_left=client_left,
            )
            self._in_flight -= 1
            self._changed.notify_all()

    def begin_hold(self) -> Hold:
        """Make every request received from now on wait for the hold returned."""
        hold = Hold()
        with self._changed:
            self._holds = (*self._holds, hold)
        return hold

    def end_hold(self, hold: Hold) -> None:
        """Let requests pass again; those that wait already are let go by `hold.wake`."""
        with self._changed:
            self._holds = tuple(other for other in self._holds if other is not hold)
            hold.is_over = True

    def wait_for_requests(self, count: int, *, timeout_s: float) -> None:
        """Block until so many requests have arrived since the start or `clear`.

        Raises:
            TimeoutError: Fewer had arrived after `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._received >= count, timeout_s):
                raise TimeoutError(f"{self._counts()} after {timeout_s} s, not {count} received")

    def wait_until_idle(self, *, timeout_s: float) -> None:
        """Block until no request is in flight.

        Raises:
            TimeoutError: One still was after `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._in_flight == 0, timeout_s):
                raise TimeoutError(f"{self._counts()} after {timeout_s} s, not 0 in flight")

    def _counts(self) -> str:
        return f"{self._received} requests received and {self._in_flight} in flight"

    def records(self) -> tuple[RecordedRequest, ...]:
        """Return the log in order of arrival."""
        with self._changed:
            return tuple(entry.record for entry in self._entries)

    def in_flight(self) -> int:
        """Return the number of requests received and not yet settled."""
        with self._changed:
            return self._in_flight

    def max_in_flight(self) -> int:
        """Return the most requests in flight at once since the start or `clear`."""
        with self._changed:
            return self._max_in_flight

    def clear(self) -> None:
        """Empty the log and count anew; what is in flight stays so."""
        with self._changed:
            self._entries.clear()
            self._received = 0
            self._max_in_flight = self._in_flight
