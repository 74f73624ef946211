"""The gate that keeps calls to one endpoint at what it can take, and the policy that uses it.

Not here: what answers say of the load (`models/overload.py`), who shares a gate
(`models/policies.py`), and when a failed call asks again (`Retry`).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dspylite.abc import Gate, Io, Next
from dspylite.errors import (
    CircuitOpenError,
    LMError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.limits import NOT_SENT
from dspylite.models.overload import Admission, Control, outcome_of
from dspylite.models.retry import uniform
from dspylite.runtime.clock import CLOCK
from dspylite.runtime.forks import watch_forks
from dspylite.runtime.gates import wake
from dspylite.schema.messages import LMRequest, LMResponse

_TIMEOUTS = 3.0  # a timeout below so many usual answers is the caller's haste; guessed
LONG_PAUSE_S = 2.0
"""Longest time that a caller with a fallback stands in line for an endpoint; guessed."""


class AdaptiveGate:
    """Lets calls to one endpoint in as fast as it can take them; use it with `io.enter(gate)`.

    Callers are let in first come first served, whatever thread or event loop they are on. The
    number of places starts at 4 and doubles with each round trip until the first sign of overload,
    then follows `cubic`; so does the rate, once a 429 came. A `Retry-After` closes the gate for as
    long. After 20 failures in a row (502, 503, 504, 529, no connection, no answer in time) one
    caller at a time tries, at most every 2 s. A forked child starts afresh.

    Args:
        max_pause_s: A longer `Retry-After` does not close the gate, because whoever got it gives up
            and the next may as well be told the same.
        max_outage_s: An endpoint that has been down for longer is given up: those who wait get
            `CircuitOpenError` at once, all but one that goes on trying.
        rand: Gives a number in [0, 1).

    Source:
        Additive increase, multiplicative decrease: https://www.rfc-editor.org/rfc/rfc5681
    """

    def __init__(
        self,
        *,
        max_pause_s: float = 120.0,
        max_outage_s: float = 120.0,
        rand: Callable[[], float] = uniform,
    ) -> None:
        self.max_pause_s, self.max_outage_s, self._rand = max_pause_s, max_outage_s, rand
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Forget who was inside, who waited, and what was learnt."""
        self._lock = threading.Lock()  # guards all below; `wake` is called outside it
        self._queue: OrderedDict[Admission, None] = OrderedDict()
        self._impatient = 0  # of those in the queue
        self.control = Control(rand=self._rand, max_pause_s=self.max_pause_s)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the parameters, not who is inside or what was learnt."""
        given = {"max_pause_s": self.max_pause_s, "max_outage_s": self.max_outage_s}
        return partial(type(self), rand=self._rand, **given), ()

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._queue)

    def ask(self, now: float, *, is_patient: bool = True) -> Admission:
        """Queue up; the place is granted at once where that is possible.

        Args:
            now: Clock time in seconds.
            is_patient: Whether to wait while the endpoint is down; else the ticket is refused then.
        """
        ticket = Admission(is_patient=is_patient)
        control = self.control
        with self._lock:
            if control.plain and not self._queue and control.inside < int(control.limit + 0.5):
                control.admit(ticket, now)
                return ticket
            self._queue[ticket] = None
            self._impatient += not is_patient
            to_wake = self._advance(now)
        self._wake(to_wake, now)
        return ticket

    def look(self, now: float) -> None:
        """Let in whom the time that has passed lets in."""
        with self._lock:
            to_wake = self._advance(now)
        self._wake(to_wake, now)

    def leave(self, ticket: Admission, now: float) -> None:
        """Give the place back with its outcome, or give up waiting; a repeat does nothing."""
        with self._lock:
            to_wake = self._remove(ticket, now)
        if to_wake:
            self._wake(to_wake, now)

    def _remove(self, ticket: Admission, now: float) -> list[Admission]:
        if ticket.gone:
            return []
        ticket.gone = True
        if not ticket.granted:
            if ticket in self._queue:
                self._drop(ticket)
        elif not ticket.refused:
            self.control.settle(ticket, now)
        return self._advance(now) if self._queue else []

    def _advance(self, now: float) -> list[Admission]:
        """Let in as many as may pass; return them, and the new first in the queue."""
        to_wake: list[Admission] = []
        control, queue = self.control, self._queue
        while queue:
            head = next(iter(queue))
            opens_at = control.opens_at(now)
            down_s = None if control.down_since is None else now - control.down_since
            if opens_at <= now:
                control.admit(head, now)
            elif self._impatient and (down_s is not None or _is_long(opens_at - now)):
                for ticket in [each for each in queue if not each.is_patient]:
                    self._refuse(ticket)
                    to_wake.append(ticket)
                continue
            elif down_s is not None and down_s > self.max_outage_s:
                self._refuse(head)
                to_wake.append(head)
                continue
            else:
                known = head.look_again_at
                head.look_again_at = None if opens_at == math.inf else opens_at
                # Where it looks too early it is told the new time then.
                if head.look_again_at is not None and (known is None or opens_at < known):
                    to_wake.append(head)
                break
            self._drop(head)
            to_wake.append(head)
        return to_wake

    def _refuse(self, ticket: Admission) -> None:
        ticket.granted = ticket.refused = True
        self._drop(ticket)

    def _drop(self, ticket: Admission) -> None:
        del self._queue[ticket]
        self._impatient -= not ticket.is_patient

    def _wake(self, tickets: list[Admission], now: float) -> None:
        while tickets:
            ticket = tickets.pop()
            if not wake(ticket):  # its loop is closed: pass its place on
                with self._lock:
                    tickets += self._remove(ticket, now)


def _is_long(seconds: float) -> bool:
    """Tell whether who has something else to do should do that; a wait for a place is none."""
    return LONG_PAUSE_S < seconds < math.inf


@dataclass(frozen=True, slots=True)
class _Impatient:
    """A gate for those that have something else to do while the endpoint is down."""

    gate: AdaptiveGate

    def ask(self, now: float) -> Admission:
        return self.gate.ask(now, is_patient=False)

    def look(self, now: float) -> None:
        self.gate.look(now)

    def leave(self, ticket: Admission, now: float) -> None:
        self.gate.leave(ticket, now)


class Adaptive:
    """Sends each request through the gate of its endpoint, and tells the gate what became of it.

    Stands inside of `Retry`, so that each attempt asks anew. A stream gives its place back when it
    is opened.

    Args:
        gate: Shared by all callers of one endpoint and key.
        is_patient: Whether calls wait while the endpoint is down or has asked for a pause of more
            than 2 s. With a fallback at hand they had better not.

    Raises:
        CircuitOpenError: The call was not made, because the endpoint is down: for longer than the
            gate's `max_outage_s`, or at all where nobody waits.
    """

    __slots__ = ("_entrance", "gate", "is_patient")

    place: ClassVar[str] = "adaptive"

    def __init__(self, gate: AdaptiveGate, *, is_patient: bool = True) -> None:
        self.gate = gate
        self.is_patient = is_patient
        self._entrance: Gate[Admission] = gate if is_patient else _Impatient(gate)

    def __repr__(self) -> str:
        return f"Adaptive(is_patient={self.is_patient})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), is_patient=self.is_patient), (self.gate,)

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Wait for a place, call, give the place back with the outcome."""
        is_sent = False
        try:
            async with io.enter(self._entrance) as ticket:
                if ticket.refused:
                    raise self._refusal(request)
                is_sent = True
                try:
                    response = await call_next(request)
                except LMError as error:
                    self._note(ticket, error)
                    raise
                ticket.outcome = "ok"
                return response
        except BaseException as error:  # its time was up, or it was cancelled
            if not is_sent:
                error.add_note(NOT_SENT)
            raise

    def _refusal(self, request: LMRequest) -> CircuitOpenError:
        how = "is down or wants to be left alone"
        if self.is_patient:
            how = f"has been down for more than {self.gate.max_outage_s:g} s"
        return CircuitOpenError(
            f"{request.model}: the endpoint {how}; one call at a time goes on trying. Check its "
            "address and status page.",
            model=request.model,
        )

    def _note(self, ticket: Admission, error: LMError) -> None:
        control = self.gate.control
        if self._is_hasty(ticket, error):
            return
        ticket.outcome, ticket.retry_after_s = outcome_of(error)
        if error.status is not None:
            control.has_answered = True
        elif ticket.outcome == "unavailable":
            if not control.has_answered:
                ticket.outcome = "neutral"  # a wrong address, most likely, which no waiting cures
            else:  # one late answer is none; in the middle of an outage it is part of it
                is_down = control.down_since is not None
                error.is_outage = is_down or isinstance(error, LMTransportError)

    def _is_hasty(self, ticket: Admission, error: LMError) -> bool:
        """Tell whether a caller gave up so soon that it says nothing of the endpoint."""
        usual_s = self.gate.control.usual_s
        if usual_s is None or error.status is not None or not isinstance(error, LMTimeoutError):
            return False
        return CLOCK.get().now() - ticket.granted_at < _TIMEOUTS * usual_s
