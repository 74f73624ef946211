"""How many calls one endpoint is asked at once.

Not here: how many in a minute (`models/rates.py`), a limit that finds itself from the endpoint's
answers (`models/adaptive.py`), and when an endpoint is left alone (`models/breaker.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final, TypeGuard

from dspylite.abc import Io, Next
from dspylite.errors import (
    CircuitOpenError,
    LMConfigurationError,
    OverloadedError,
)
from dspylite.models.streams import WatchedStream
from dspylite.runtime.gates import Pass, Places
from dspylite.schema.messages import DeltaSource, LMRequest, LMResponse

NOT_SENT = "The request had not been sent yet."
"""The note on an error of a call that ended while it stood in line here: it says nothing about the
endpoint, and costs no token of any limit."""


def was_sent(error: BaseException) -> bool:
    """Tell whether a request may have reached the endpoint before the call failed.

    Example:
        >>> from dspylite.errors import LMError
        >>> was_sent(LMError("reset")), was_sent(OverloadedError("full"))
        (True, False)
    """
    if isinstance(error, OverloadedError | CircuitOpenError):
        return False
    return NOT_SENT not in getattr(error, "__notes__", ())


class QueuePlaces(Places):
    """Places before which only so many may wait, as each caller says for itself."""

    def ask_within(self, now: float, max_queue: int | None) -> Pass:
        """Queue up; the ticket is granted at once where a place is free.

        Args:
            now: Clock time in seconds.
            max_queue: How many may wait; None for any number.

        Raises:
            OverloadedError: No place is free and the queue is full.
        """
        if max_queue is None:
            return self.ask(now)
        ticket = Pass()
        with self._lock:
            if self._free and not self._queue:
                self._free -= 1
                ticket.granted = True
                return ticket
            if len(self._queue) < max_queue:
                self._queue.append(ticket)
                return ticket
        raise OverloadedError(
            f"{self._count} calls to this endpoint are under way and {max_queue} wait, which "
            "is all that `max_concurrency` and `max_queue` allow. Send fewer at once, call again "
            "later, or raise `max_queue=`."
        )

    def hand_over(self, ticket: Pass) -> Pass:
        """Move a place to a new ticket, so that leaving with the old one does nothing."""
        heir = Pass()
        heir.granted = True
        with self._lock:
            ticket.gone = True
        return heir


@dataclass(frozen=True, slots=True)
class _Queue:
    """The places as the gate of a policy with a bound of its own."""

    places: QueuePlaces
    max_queue: int | None

    def ask(self, now: float) -> Pass:
        return self.places.ask_within(now, self.max_queue)

    def look(self, now: float) -> None:
        self.places.look(now)

    def leave(self, ticket: Pass, now: float) -> None:
        self.places.leave(ticket, now)


class MaxConcurrency:
    """Has at most so many calls under way at once, over all threads and event loops.

    Further calls wait, first come first served, as long as their deadline allows. A streamed answer
    is under way until it ends, breaks or is closed, so whoever holds one must close it.

    One object may be shared by any number of LMs, threads and loops. It holds for its process: a
    copy, an unpickled or a forked one starts with all places free.

    Args:
        limit: Most calls at once, at least 1.
        max_queue: Most calls that may wait; a further one fails at once with `OverloadedError`.
            0 lets none wait; None any number.
        places: Those of another such policy, to be shared with it.

    Raises:
        LMConfigurationError: A number is no whole one, or too small.

    Example:
        >>> MaxConcurrency(8, max_queue=100)
        MaxConcurrency(8, max_queue=100)
    """

    place: ClassVar[str] = "concurrency"

    def __init__(
        self, limit: int, *, max_queue: int | None = None, places: QueuePlaces | None = None
    ) -> None:
        check_count("max_concurrency", limit, least=1, otherwise="leave it out for no limit")
        if max_queue is not None:
            check_count("max_queue", max_queue, least=0, otherwise="None lets any number wait")
        self.limit: Final = limit
        self.max_queue: Final = max_queue
        self._places = QueuePlaces(limit) if places is None else places
        self._gate = _Queue(self._places, max_queue)

    @property
    def waiting(self) -> int:
        """How many calls wait for a place."""
        return self._places.waiting

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Send the request as soon as a place is free, and hold the place until it is answered.

        Raises:
            OverloadedError: So many wait that this one may not; nothing was sent.
            DeadlineExceededError: No place was free in time; nothing was sent.
        """
        places, inside = self._places, False
        try:
            async with io.enter(self._gate) as ticket:
                inside = True
                response = await call_next(request)
                if response.stream is None:
                    return response
                held = _HeldStream(response.stream, places, places.hand_over(ticket), io)
                return replace(response, stream=held)
        except BaseException as error:  # its time was up, or it was cancelled
            if not inside:
                error.add_note(NOT_SENT)
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the limits, not who is inside."""
        return partial(type(self), self.limit, max_queue=self.max_queue), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.limit}, max_queue={self.max_queue})"


class _HeldStream(WatchedStream):
    """A stream that has a place until it is over."""

    def __init__(self, source: DeltaSource, places: QueuePlaces, ticket: Pass, io: Io) -> None:
        super().__init__(source)
        self._places = places
        self._ticket = ticket
        self._io = io

    def over(self) -> None:
        self._places.leave(self._ticket, self._io.now())


def check_count(name: str, value: object, *, least: int, otherwise: str) -> None:
    """Refuse what is no whole number of at least `least`.

    Args:
        name: The parameter.
        value: What was given.
        least: The smallest value that works.
        otherwise: What to write for the smallest or for no limit, as the end of a sentence.

    Raises:
        LMConfigurationError: The value cannot work.
    """
    if not is_whole(value) or value < least:
        raise LMConfigurationError(
            f"`{name}` must be a whole number of at least {least}, not {value!r}; {otherwise}."
        )


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether a value is a whole number, which `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)
