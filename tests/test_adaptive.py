"""The adaptive gate: how it finds what an endpoint can take, in virtual time and over real HTTP.

Not here: the same scenarios with real time (`python -m tests.benchmarks.overload`), when a failed
call asks again (`test_middleware.py`), and waiting at a gate as such (`test_flow.py`).
"""

from __future__ import annotations

import copy
import heapq
import http.client
import itertools
import json
import os
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest

from dspylite.abc import Io
from dspylite.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    LMAuthError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.adaptive import Adaptive, AdaptiveGate
from dspylite.models.limits import was_sent
from dspylite.models.middleware import chain
from dspylite.models.overload import Admission, Outcome, cubic, outcome_of, seconds_until
from dspylite.models.retry import Retry
from dspylite.runtime.clock import Deadline
from dspylite.runtime.flow import ASYNC, BLOCKING, Both, run_flow
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeClock, FakeServer, Reply

REQUEST = LMRequest(model="m", messages=[{"role": "user", "content": "hi"}])
ANSWER = LMResponse(outputs=(LMOutput(text="hello"),))

both_drivers = pytest.mark.parametrize("io", [BLOCKING, ASYNC], ids=["blocking", "async"])


# --- A world in virtual time ---------------------------------------------------------------------

Answer = tuple[int, float, float | None]
"""What a server says: status, seconds until then, and `Retry-After`."""


class World:
    """Callers, one gate, and a server, all in virtual time; a retry waits as `Retry` does."""

    def __init__(
        self, server: Callable[[float], Answer], *, items: int, callers: int, seed: int = 0
    ) -> None:
        self.server, self.items, self.todo = server, items, items
        self.draw = random.Random(seed)
        self.gate = AdaptiveGate(rand=self.draw.random)
        self.now = 0.0
        self.sent: list[float] = []
        self.served: list[float] = []
        self.failed = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        for _ in range(callers):
            self.at(0.0, self._next_item)

    @property
    def requests_per_item(self) -> float:
        return len(self.sent) / self.items

    @property
    def seconds(self) -> float:
        return max(self.served)

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), act))

    def run(self) -> World:
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
        assert (self.gate.waiting, self.gate.control.inside) == (0, 0)
        return self

    def _next_item(self) -> None:
        if self.todo:
            self.todo -= 1
            self._enter(Caller(self, began=self.now))

    def _enter(self, caller: Caller) -> None:
        caller.ticket = self.gate.ask(self.now)
        caller.ticket.wake = caller.wake
        caller.wait()

    def send(self, caller: Caller) -> None:
        ticket = caller.ticket
        if ticket.refused:
            self.gate.leave(ticket, self.now)
            self.failed += 1
            self.at(self.now, self._next_item)
            return
        self.sent.append(self.now)
        status, seconds, retry_after_s = self.server(self.now)

        def end() -> None:
            ticket.outcome = OUTCOMES[status]
            ticket.retry_after_s = retry_after_s
            self.gate.leave(ticket, self.now)
            if status == 200:
                self.served.append(self.now)
                self._next_item()
            elif self.now - caller.began > 120:
                self.failed += 1
                self._next_item()
            else:
                wait_s = 0.5 * self.draw.random() if retry_after_s is None else retry_after_s
                self.at(self.now + wait_s, lambda: self._enter(caller))

        self.at(self.now + seconds, end)


OUTCOMES: dict[int, Outcome] = {200: "ok", 429: "throttled", 503: "unavailable"}


class Caller:
    """One item on its way; waits at the gate as the drivers do."""

    def __init__(self, world: World, *, began: float) -> None:
        self.world, self.began = world, began
        self.ticket = Admission()
        self.round = 0

    def wake(self) -> None:
        """Come 0.1 ms later, as a thread would."""
        self._in(1e-4, look=False)

    def wait(self) -> None:
        if self.ticket.granted:
            self.round += 1
            self.world.send(self)
        elif self.ticket.look_again_at is not None:
            self._in(max(0.0, self.ticket.look_again_at - self.world.now), look=True)

    def _in(self, seconds: float, *, look: bool) -> None:
        self.round += 1
        mine = self.round

        def come() -> None:
            if self.round == mine:
                if look:
                    self.world.gate.look(self.world.now)
                if self.round == mine:
                    self.wait()

        self.world.at(self.world.now + seconds, come)


def healthy(latency_s: float) -> Callable[[float], Answer]:
    return lambda now: (200, latency_s, None)


def by_chance(
    share: float, status: int, latency_s: float, seed: int = 0
) -> Callable[[float], Answer]:
    """Refuse exactly so many of each 100 requests, in random order."""
    draw, deck = random.Random(seed), list[bool]()

    def serve(now: float) -> Answer:
        if not deck:
            deck.extend(number < share * 100 for number in range(100))
            draw.shuffle(deck)
        return (status, 0.003, None) if deck.pop() else (200, latency_s, None)

    return serve


def outage(begin: float, end: float, latency_s: float = 0.05) -> Callable[[float], Answer]:
    return lambda now: (503, 0.003, None) if begin <= now < end else (200, latency_s, None)


class Bucket:
    """So many requests a second, with a burst; 429 beyond."""

    def __init__(
        self,
        rate: Callable[[float], float] | float,
        burst: float,
        *,
        retry_after_s: float | None = None,
        latency_s: float = 0.005,
    ) -> None:
        self.rate, self.burst, self.tokens, self.at = rate, burst, burst, 0.0
        self.retry_after_s, self.latency_s = retry_after_s, latency_s

    def __call__(self, now: float) -> Answer:
        rate = self.rate(now) if callable(self.rate) else self.rate
        self.tokens = min(self.burst, self.tokens + (now - self.at) * rate)
        self.at = now
        if self.tokens < 1:
            return 429, 0.003, self.retry_after_s
        self.tokens -= 1
        return 200, self.latency_s, None


class Slots:
    """Serves so many at once and refuses the others."""

    def __init__(self, number: Callable[[float], int], status: int, latency_s: float) -> None:
        self.number, self.status, self.latency_s = number, status, latency_s
        self.busy_until: list[float] = []

    def __call__(self, now: float) -> Answer:
        self.busy_until = [until for until in self.busy_until if until > now]
        if len(self.busy_until) >= self.number(now):
            return self.status, 0.003, None
        self.busy_until.append(now + self.latency_s)
        return 200, self.latency_s, None


seeds = pytest.mark.parametrize("seed", range(3))


@seeds
def test_random_503s_cost_no_more_than_their_share(seed: int) -> None:
    """A busy gateway's chance failures lose no item and do not strangle the rest (B 4.12)."""
    world = World(by_chance(0.3, 503, 0.05, seed), items=1000, callers=32, seed=seed).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.45
    assert world.seconds < 10  # 4.8 s without any gate, where only `Retry` waits


@seeds
@pytest.mark.parametrize("begin", [0, 2])
def test_an_outage_costs_few_requests_and_ends_in_full_rate(begin: float, seed: int) -> None:
    """Waiting callers must neither hammer a dead endpoint nor miss its return (B 4.12)."""
    world = World(outage(begin, begin + 30), items=1500, callers=16, seed=seed).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.05
    served = sorted(at for at in world.served if at >= begin + 30)
    quarter = round(0.8 * 16 / 0.05 / 4)
    full = next(
        first for first, last in zip(served, served[quarter:], strict=False) if last - first <= 0.25
    )
    assert full <= begin + 30 + 3


@pytest.mark.parametrize(
    ("burst", "latency_s"), [(1, 0.005), (5, 0.005), (20, 0.005), (20, 0.2), (20, 1.0)]
)
def test_a_bare_429_teaches_the_rate(burst: float, latency_s: float) -> None:
    """Without a word from the provider the rate is found, and kept to (B 4.12)."""
    world = World(Bucket(20, burst, latency_s=latency_s), items=300, callers=32).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.10
    # A bucket without any burst refuses what comes a moment early, which costs a cut each time.
    slower = 1.35 if burst == 1 else 1.2
    assert world.seconds <= slower * ((300 - burst) / 20 + latency_s)


@pytest.mark.parametrize("burst", [1, 5, 20])
def test_a_429_with_retry_after_teaches_the_rate_too(burst: float) -> None:
    """Else each pause would end in the next refusal (B 4.12)."""
    world = World(Bucket(20, burst, retry_after_s=1), items=300, callers=32).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.5
    assert world.seconds <= 1.7 * (300 - burst) / 20


@pytest.mark.parametrize("status", [429, 503])
def test_slots_are_counted_from_the_refusals(status: int) -> None:
    """The number of places is found without a flood of refused requests (B 4.12)."""
    world = World(Slots(lambda now: 4, status, 0.2), items=200, callers=32).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.10
    assert world.seconds <= 1.7 * 10


@pytest.mark.parametrize(
    ("callers", "latency_s", "slower"), [(512, 0.05, 1.08), (128, 1.0, 1.06), (64, 5.0, 1.02)]
)
def test_a_healthy_endpoint_is_not_slowed(callers: int, latency_s: float, slower: float) -> None:
    """The start from few places must not be felt, neither with many callers nor a slow model."""
    world = World(healthy(latency_s), items=callers * 10 * 10, callers=callers).run()
    assert world.requests_per_item == 1
    assert world.seconds <= slower * 100 * latency_s


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("share", [0.05, 0.1])
def test_failures_that_no_load_causes_do_not_starve_the_rest(share: float, status: int) -> None:
    """Cutting does not help against chance, which is noticed, and the cuts are taken back."""
    slower: list[float] = []
    for seed in range(5):
        world = World(by_chance(share, status, 0.05, seed), items=6000, callers=32, seed=seed)
        assert world.run().failed == 0
        slower.append(world.seconds / (6000 * 0.05 / 32))
    assert sorted(slower)[2] <= 4
    assert max(slower) <= 12  # where it is not noticed: 50 and more


def test_a_limit_that_rises_is_found() -> None:
    """What was learnt from a bad time must not outlive it."""
    world = World(Bucket(lambda now: 5 if now < 20 else 200, 5), items=2100, callers=32).run()
    assert world.seconds <= 1.6 * 30
    world = World(Slots(lambda now: 1 if now < 10 else 64, 503, 0.1), items=3200, callers=64).run()
    assert world.seconds <= 1.6 * 15


def test_a_limit_that_falls_is_found() -> None:
    """Else a tightened quota would cost a flood of refused requests."""
    world = World(Bucket(lambda now: 20 if now < 10 else 5, 5), items=300, callers=32).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.15
    assert world.seconds <= 1.3 * 30


def test_a_slow_quota_is_kept_to() -> None:
    """A request a second, as free tiers have: no flood, and no standstill."""
    world = World(Bucket(1, 1), items=60, callers=16).run()
    assert world.failed == 0
    assert world.requests_per_item <= 1.6
    assert world.seconds <= 1.4 * 60


def test_an_endless_outage_ends_in_an_error() -> None:
    """A hang is a failure: after `max_outage_s` nobody waits any more."""
    world = World(outage(2, 10_000), items=1000, callers=16).run()
    assert len(world.served) + world.failed == 1000
    assert world.failed > 300
    assert world.now < 300


# --- The rules, one at a time --------------------------------------------------------------------


def leave(gate: AdaptiveGate, ticket: Admission, now: float, outcome: Outcome = "ok") -> None:
    ticket.outcome = outcome
    gate.leave(ticket, now)


def enter(gate: AdaptiveGate, now: float, count: int = 1) -> list[Admission]:
    """Ask until `count` are inside, and insist on it."""
    tickets = [gate.ask(now) for _ in range(count)]
    assert [ticket.granted for ticket in tickets] == [True] * count
    return tickets


def full(gate: AdaptiveGate, now: float) -> list[Admission]:
    """Take all places there are."""
    return enter(gate, now, int(gate.control.limit + 0.5) - gate.control.inside)


def broken(gate: AdaptiveGate, now: float, times: int = 20) -> None:
    """Let the endpoint be down."""
    for _ in range(times):
        ticket = Admission()
        gate.control.admit(ticket, now)
        leave(gate, ticket, now, "unavailable")


def test_the_curve_comes_back_to_its_top_and_stays_there() -> None:
    """Most time is spent near the limit that was found, which is why few requests are refused."""
    assert cubic(100, 0) == pytest.approx(70)
    assert cubic(100, 1.44) == pytest.approx(100, abs=0.1)
    assert 98 < cubic(100, 0.9) < 100 < cubic(100, 2) < 102
    assert cubic(100, 3.6) > 200
    assert cubic(1, 10, 5) == pytest.approx(cubic(1, 2))


@pytest.mark.parametrize("value", [100.0, 101.0, 150.0, 1000.0])
def test_the_inverse_of_the_curve_agrees_with_it(value: float) -> None:
    """The first in the queue sleeps until exactly then."""
    assert cubic(100, seconds_until(100, value)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (LMRateLimitError(), ("throttled", None)),
        (LMRateLimitError(retry_after=7), ("throttled", 7)),
        (LMServerError(status=502), ("unavailable", None)),
        (LMServerError(status=503, retry_after=2), ("unavailable", 2)),
        (LMServerError(status=504), ("unavailable", None)),
        (LMServerError(status=529), ("unavailable", None)),
        (LMTransportError(), ("unavailable", None)),
        (LMTimeoutError(), ("unavailable", None)),
        (DeadlineExceededError(), ("neutral", None)),
        (LMServerError(status=500), ("neutral", None)),
        (LMServerError(), ("neutral", None)),
        (LMAuthError(), ("neutral", None)),
        (LMInvalidRequestError(status=400), ("neutral", None)),
        (KeyError("x"), ("neutral", None)),
    ],
)
def test_an_error_says_what_it_says_of_the_endpoint(
    error: BaseException, outcome: tuple[Outcome, float | None]
) -> None:
    """A bug in a request must not slow the others, an overload must."""
    assert outcome_of(error) == outcome


def test_places_double_with_each_round_trip() -> None:
    """So 512 callers are all inside after 7 round trips."""
    gate = AdaptiveGate()
    inside = full(gate, 0.0)
    waiting = [gate.ask(0.0) for _ in range(512)]
    widths = []
    for step in range(7):
        for ticket in inside:
            leave(gate, ticket, step * 0.05)
        inside = [ticket for ticket in waiting if ticket.granted and not ticket.gone]
        widths.append(len(inside))
    assert widths == [8, 16, 32, 64, 128, 256, 8]  # the last ones found nobody waiting behind them


def test_places_that_are_not_used_do_not_grow() -> None:
    """A limit that was never tried says nothing."""
    gate = AdaptiveGate()
    for step in range(100):
        for ticket in enter(gate, step, 2):
            leave(gate, ticket, step)
    assert gate.control.limit == 4


def test_silence_opens_places_too() -> None:
    """A model that takes a minute to answer would otherwise take minutes to be used."""
    gate = AdaptiveGate()
    full(gate, 0.0)
    late = gate.ask(0.0)
    assert (late.granted, late.look_again_at) == (False, 0.1)
    gate.look(0.1)
    assert late.granted
    assert gate.control.limit == 8


def test_single_failures_cut_nothing() -> None:
    """One 503 in ten is chance until more is known."""
    gate = AdaptiveGate()
    for _ in range(3):
        *good, bad = enter(gate, 0.0, 4)
        leave(gate, bad, 0.0, "unavailable")
        for ticket in good * 3:
            leave(gate, ticket, 0.0)
        for _ in range(6):
            leave(gate, *enter(gate, 0.0), 0.0)
    assert gate.control.limit >= 4


def test_refusals_cut_once_for_all_that_were_under_way() -> None:
    """What was sent before the cut is no news, or one burst would end in a standstill."""
    gate = AdaptiveGate()
    gate.control.limit = 8.0
    inside = full(gate, 0.2)
    for ticket in inside[4:]:
        leave(gate, ticket, 0.3, "unavailable")
    assert gate.control.limit_top == 4  # those inside when the last one was refused
    assert gate.control.limit == pytest.approx(0.7 * 4)


def test_a_429_while_places_are_free_cuts_the_rate_alone() -> None:
    """Slow answers need many places, however few requests a second are allowed."""
    gate = AdaptiveGate()
    for ticket in enter(gate, 0.0, 4)[:3]:
        leave(gate, ticket, 0.0, "throttled")
    assert gate.control.rate == pytest.approx(0.7 * 20)
    gate.control.limit = gate.control.limit_top = 50.0
    gate.control._low = gate.control._held = False
    ticket = gate.ask(5.0)
    leave(gate, ticket, 5.0, "throttled")
    assert gate.control.limit == 50
    assert gate.control.rate == pytest.approx(0.7 * 0.7 * 0.7 * 20)


def test_after_a_429_requests_are_spaced() -> None:
    """The first in the queue knows when its time comes."""
    gate = AdaptiveGate()
    for ticket in enter(gate, 10.0, 3):
        leave(gate, ticket, 10.0, "throttled")
    gate.control.limit = 8.0
    first, second = gate.ask(10.0), gate.ask(10.0)
    spacing = 1 / (0.7 * 20)
    assert first.look_again_at == pytest.approx(10 + spacing)
    assert second.look_again_at is None
    woken: list[float] = []
    second.wake = lambda: woken.append(second.look_again_at or 0)
    gate.look(10 + spacing)
    assert first.granted
    assert woken == [pytest.approx(10 + 2 * spacing)]


@pytest.mark.parametrize("outcome", ["throttled", "unavailable"])
def test_retry_after_closes_the_gate_for_all(outcome: Outcome) -> None:
    """It is meant for the key, not for the thread that happened to read it (B 4.3)."""
    gate = AdaptiveGate()
    (ticket,) = enter(gate, 100.0)
    ticket.retry_after_s = 7.0
    leave(gate, ticket, 100.0, outcome)
    waiting = [gate.ask(100.0) for _ in range(5)]
    assert [ticket.look_again_at for ticket in waiting] == [107.0, None, None, None, None]
    gate.look(106.9)
    assert not any(ticket.granted for ticket in waiting)
    gate.look(107.2)
    assert waiting[0].granted


def test_a_longer_retry_after_never_shortens_and_an_absurd_one_does_not_close() -> None:
    """Waiting an hour for a daily quota helps nobody; who got the error is told."""
    gate = AdaptiveGate(max_pause_s=60)
    for wait_s in (30.0, 5.0, 3600.0):
        ticket = Admission()
        gate.control.admit(ticket, 0.0)
        ticket.retry_after_s = wait_s
        leave(gate, ticket, 0.0, "throttled")
    assert gate.ask(0.0).look_again_at == 30


def test_twenty_failures_in_a_row_leave_one_probe() -> None:
    """A dead endpoint is asked by one caller at a time, ever more rarely."""
    gate = AdaptiveGate(rand=lambda: 0.5)
    broken(gate, 0.0, 19)
    assert gate.control.down_since is None
    broken(gate, 0.0, 1)
    waits, now = [], 0.0
    for _ in range(6):
        first, second = gate.ask(now), gate.ask(now)
        assert first.look_again_at is not None
        waits.append(first.look_again_at - now)
        now = first.look_again_at
        gate.look(now)
        assert (first.granted, second.granted, second.look_again_at) == (True, False, None)
        gate.leave(second, now)
        leave(gate, first, now, "unavailable")
    assert waits == pytest.approx([0.25, 0.5, 1.0, 1.6, 1.6, 1.6])


@pytest.mark.parametrize("outcome", ["ok", "throttled"])
def test_an_answer_ends_the_outage(outcome: Outcome) -> None:
    """All are let in again at once, from few places on."""
    gate = AdaptiveGate(rand=lambda: 0.5)
    broken(gate, 0.0)
    probe, second = gate.ask(0.25), gate.ask(0.25)
    assert (probe.granted, second.granted) == (True, False)
    leave(gate, probe, 0.3, outcome)
    assert second.granted
    assert gate.control.down_since is None


def test_a_cancelled_probe_makes_room_for_the_next() -> None:
    """A caller that is stopped says nothing of the endpoint, and must not block the others."""
    gate = AdaptiveGate(rand=lambda: 0.5)
    broken(gate, 0.0)
    probe, second = gate.ask(0.25), gate.ask(0.25)
    leave(gate, probe, 0.3, "neutral")
    assert second.granted
    assert second.is_probe


def test_late_failures_of_an_outage_do_not_move_the_probe() -> None:
    """Requests that hang from before would otherwise put it off for ever."""
    gate = AdaptiveGate(rand=lambda: 0.5)
    (late,) = enter(gate, 0.0)
    broken(gate, 0.0)
    leave(gate, late, 0.2, "unavailable")
    assert gate.ask(0.2).look_again_at == 0.25


def test_after_a_long_outage_callers_are_refused_and_one_probes() -> None:
    """They learn it at once, and the endpoint's return is still noticed."""
    gate = AdaptiveGate(max_outage_s=60, rand=lambda: 0.5)
    broken(gate, 0.0)
    waiting = gate.ask(0.0)
    probe = gate.ask(61.0)
    assert (waiting.granted, waiting.refused) == (True, False)  # it was first in line: the probe
    assert (probe.granted, probe.refused) == (True, True)
    leave(gate, probe, 61.0, "neutral")
    assert gate.control.inside == 1
    leave(gate, waiting, 61.0)
    assert not enter(gate, 61.0)[0].refused


# --- The queue -----------------------------------------------------------------------------------


def test_who_has_a_fallback_is_refused_at_once_while_others_wait() -> None:
    """One gate serves both: an outage must not hold callers that could be answered elsewhere."""
    gate = AdaptiveGate()
    broken(gate, 0.0)
    gate.control._probe_out = True
    patient, late = gate.ask(0.1), gate.ask(0.1, is_patient=False)
    assert (late.granted, late.refused, patient.granted) == (True, True, False)
    assert gate.waiting == 1


def test_who_has_a_fallback_in_line_when_the_endpoint_goes_down_is_refused() -> None:
    """Whoever came a moment before the outage is no worse off than who comes after."""
    gate = AdaptiveGate()
    held = full(gate, 0.0)
    patient, impatient = gate.ask(0.0), gate.ask(0.0, is_patient=False)
    woken = list[str]()
    impatient.wake = lambda: woken.append("impatient")
    gate.control.down_since = 0.1
    gate.control._probe_out = True
    gate.look(0.2)
    assert (impatient.refused, patient.granted, woken) == (True, False, ["impatient"])
    assert (gate.waiting, len(held) > 0) == (1, True)


def test_a_long_pause_refuses_who_has_a_fallback_and_a_short_one_does_not() -> None:
    """Two seconds are waited for; half a minute is better spent with the spare model."""
    for pause_s, is_refused in ((1.0, False), (30.0, True)):
        gate = AdaptiveGate()
        (ticket,) = enter(gate, 0.0)
        ticket.outcome, ticket.retry_after_s = "throttled", pause_s
        gate.leave(ticket, 0.0)
        assert gate.ask(0.1, is_patient=False).refused is is_refused


def test_an_endpoint_that_nobody_called_for_a_while_is_met_anew() -> None:
    """While a breaker was open nothing was learnt, and one place would be a slow return."""
    gate = AdaptiveGate()
    for _ in range(6):
        for ticket in full(gate, 0.0):
            ticket.outcome = "unavailable"
            gate.leave(ticket, 0.0)
    assert gate.control.limit < 2
    (ticket,) = enter(gate, 1.0)
    leave(gate, ticket, 1.0)
    assert gate.control.limit < 2
    (ticket,) = enter(gate, 4.0)
    assert gate.control.limit == 4


def test_callers_are_let_in_first_come_first_served() -> None:
    """Nobody starves, whatever the others do."""
    gate = AdaptiveGate()
    gate.control._slow_start = False
    inside = full(gate, 0.0)
    waiting = [gate.ask(0.0) for _ in range(10)]
    for number, late in enumerate(waiting):
        leave(gate, inside.pop(0), 0.0, "neutral")
        inside.append(late)
        assert [each.granted for each in waiting] == [True] * (number + 1) + [False] * (9 - number)


def test_one_leaver_wakes_no_more_than_it_must() -> None:
    """With 5,000 waiting a release that told all of them would cost seconds."""
    gate = AdaptiveGate()
    gate.control._slow_start = False
    inside = full(gate, 0.0)
    woken: list[int] = []
    waiting = [gate.ask(0.0) for _ in range(5000)]
    for number, ticket in enumerate(waiting):
        ticket.wake = lambda number=number: woken.append(number)
    leave(gate, inside[0], 0.0, "neutral")
    assert set(woken) <= {0, 1}
    assert waiting[0].granted


def test_the_next_in_line_keeps_time_when_the_first_gives_up() -> None:
    """Otherwise nobody would look when the pause is over."""
    gate = AdaptiveGate()
    (ticket,) = enter(gate, 0.0)
    ticket.retry_after_s = 9.0
    leave(gate, ticket, 0.0, "throttled")
    first, second = gate.ask(0.0), gate.ask(0.0)
    woken: list[float | None] = []
    second.wake = lambda: woken.append(second.look_again_at)
    gate.leave(first, 1.0)
    assert woken == [9.0]
    assert gate.waiting == 1


def test_the_gate_can_be_asked_from_within_a_wake() -> None:
    """A wake is called outside the lock, so it cannot hang."""
    gate = AdaptiveGate()
    gate.control._slow_start = False
    inside = full(gate, 0.0)
    late = gate.ask(0.0)
    late.wake = lambda: gate.look(0.0)
    leave(gate, inside[0], 0.0, "neutral")
    assert late.granted


def test_a_place_left_to_closed_loops_goes_to_the_next() -> None:
    """Loops that ended while their callers waited must keep no place and no time."""

    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    gate = AdaptiveGate()
    gate.control._slow_start = False
    inside = full(gate, 0.0)
    for _ in range(2000):
        gate.ask(0.0).wake = closed
    last = gate.ask(0.0)
    leave(gate, inside[0], 0.0, "neutral")
    assert last.granted
    assert (gate.waiting, gate.control.inside) == (0, 4)


def test_leaving_twice_gives_no_second_place() -> None:
    """Otherwise the limit would grow with each mistake."""
    gate = AdaptiveGate()
    inside = full(gate, 0.0)
    gate.leave(inside[0], 0.0)
    gate.leave(inside[0], 0.0)
    assert gate.control.inside == 3


def test_a_copy_has_the_parameters_and_nothing_learnt() -> None:
    """Locks and waiting callers cannot cross to another process."""
    gate = AdaptiveGate(max_pause_s=5, max_outage_s=6)
    full(gate, 0.0)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert (twin.max_pause_s, twin.max_outage_s, twin.control.inside) == (5, 6, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_afresh() -> None:
    """The parent's callers and its held lock do not exist in the child."""
    gate = AdaptiveGate()
    late = full(gate, 0.0)[0]
    broken(gate, 0.0)
    gate._lock.acquire()
    child = os.fork()
    if not child:  # pragma: no cover -- coverage does not see it
        fresh = gate.waiting == gate.control.inside == 0 and gate.ask(0.0).granted
        gate.leave(late, 0.0)  # by the thread that forked inside of a call
        os._exit(0 if fresh and gate.control.inside == 0 and gate.ask(0.0).granted else 1)
    gate._lock.release()
    assert os.waitpid(child, 0)[1] == 0


# --- The policy ----------------------------------------------------------------------------------


class Leaf:
    """An engine that does what its script says, and answers afterwards."""

    def __init__(self, *script: BaseException | LMResponse) -> None:
        self.script = list(script)
        self.calls = 0

    def call(self, request: LMRequest) -> LMResponse:
        self.calls += 1
        does = self.script.pop(0) if self.script else ANSWER
        if isinstance(does, BaseException):
            raise does
        return does

    async def acall(self, request: LMRequest) -> LMResponse:
        return self.call(request)


async def ask(gate: AdaptiveGate, leaf: Leaf, io: Io, *outer: Retry) -> LMResponse:
    return await chain((*outer, Adaptive(gate)), leaf, io)(REQUEST)


@both_drivers
async def test_an_error_passes_unchanged_and_gives_the_place_back(io: Io) -> None:
    """The gate only listens."""
    gate, error = AdaptiveGate(), LMInvalidRequestError("no", status=400)
    with pytest.raises(LMInvalidRequestError) as caught:
        await ask(gate, Leaf(error), io)
    assert caught.value is error
    assert gate.control.inside == 0
    with pytest.raises(KeyError):
        await ask(gate, Leaf(KeyError("bug")), io)
    assert gate.control.inside == 0


@both_drivers
async def test_the_only_sleep_is_the_one_that_the_provider_asked_for(io: Io) -> None:
    """The gate adds nothing of its own to `Retry-After` (B 4.2)."""
    with FakeClock() as clock:
        gate = AdaptiveGate()
        answer = await ask(gate, Leaf(LMRateLimitError(retry_after=7.0)), io, Retry())
    assert answer.outputs == ANSWER.outputs
    assert clock.sleeps == [7.0]


@both_drivers
async def test_a_caller_waits_out_the_penalty_of_another(io: Io) -> None:
    """The second caller was never told, and waits all the same (B 4.3)."""
    with FakeClock() as clock:
        gate = AdaptiveGate()
        with pytest.raises(LMRateLimitError):
            await ask(gate, Leaf(LMRateLimitError(retry_after=7.0)), io)
        await ask(gate, Leaf(), io)
    assert clock.now() == 7
    assert gate.waiting == 0


@both_drivers
async def test_a_deadline_ends_the_wait_at_a_closed_gate(io: Io) -> None:
    """A penalty must not hold a call beyond its time, nor keep its place in the line (B 4.4)."""
    with FakeClock() as clock:
        gate = AdaptiveGate()
        with pytest.raises(LMRateLimitError):
            await ask(gate, Leaf(LMRateLimitError(retry_after=60.0)), io)
        leaf = Leaf()
        with Deadline(3), pytest.raises(DeadlineExceededError) as caught:
            await ask(gate, leaf, io)
    assert (clock.now(), gate.waiting, leaf.calls) == (3, 0, 0)
    assert not was_sent(caught.value)


@both_drivers
async def test_a_deadline_within_the_call_is_no_wait_in_line(io: Io) -> None:
    """The endpoint was asked, which a circuit breaker wants to know."""
    with pytest.raises(DeadlineExceededError) as caught:
        await ask(AdaptiveGate(), Leaf(DeadlineExceededError("late")), io)
    assert was_sent(caught.value)


@both_drivers
async def test_a_dead_endpoint_is_given_up_by_name(io: Io) -> None:
    """After `max_outage_s` a call ends at once and says why."""
    with FakeClock() as clock:
        gate = AdaptiveGate(max_outage_s=60)
        broken(gate, 0.0)
        gate.control._probe_out = True
        clock.sleep(61)
        leaf = Leaf()
        with pytest.raises(CircuitOpenError, match="more than 60 s"):
            await ask(gate, leaf, io)
    assert (leaf.calls, gate.control.inside) == (0, 0)


@both_drivers
async def test_an_endpoint_that_never_answered_is_not_waited_for(io: Io) -> None:
    """A misspelt address must fail fast, not be probed for minutes."""
    gate = AdaptiveGate()
    for _ in range(40):
        error = LMTransportError("refused")
        with pytest.raises(LMTransportError):
            await ask(gate, Leaf(error), io)
        assert not error.is_outage
    assert gate.control.down_since is None


@both_drivers
@pytest.mark.parametrize("first", [ANSWER, LMServerError("broken", status=500)])
async def test_an_endpoint_that_answered_once_and_is_gone_has_an_outage(
    io: Io, first: LMResponse | LMError
) -> None:
    """`Retry` waits for it by time, because it was there."""
    gate = AdaptiveGate()
    try:
        await ask(gate, Leaf(first), io)
    except LMServerError:
        pass
    error = LMTransportError("refused")
    with pytest.raises(LMTransportError):
        await ask(gate, Leaf(error), io)
    assert error.is_outage
    broken(gate, io.now(), 19)
    assert gate.control.down_since is not None


@both_drivers
async def test_a_timeout_belongs_to_the_outage_only_while_there_is_one(io: Io) -> None:
    """A slow answer is retried by count, a connection that hangs in an outage waited out."""
    with FakeClock() as clock:
        gate = AdaptiveGate()
        await ask(gate, Leaf(), io)
        alone, amid = LMTimeoutError("late"), LMTimeoutError("late")
        with pytest.raises(LMTimeoutError):
            await ask(gate, Leaf(alone), io)
        broken(gate, clock.now())
        with pytest.raises(LMTimeoutError):
            await ask(gate, Leaf(amid), io)
    assert (alone.is_outage, amid.is_outage) == (False, True)


class Stream:
    """An open stream that is never read."""

    response = ANSWER

    def call(self) -> None:
        return None

    async def acall(self) -> None:
        return None

    def close(self) -> None:
        pass


@both_drivers
async def test_an_open_stream_holds_no_place(io: Io) -> None:
    """Whoever forgets to close one must not shut the others out."""
    gate, opened = AdaptiveGate(), LMResponse(outputs=(), stream=Stream())
    assert await ask(gate, Leaf(opened), io) is opened
    assert gate.control.inside == 0


async def test_a_cancelled_waiter_gives_up_its_place_in_the_line() -> None:
    """A place that is granted to nobody would be lost for ever."""
    gate = AdaptiveGate()
    gate.control._slow_start = False
    now = ASYNC.now()
    inside = full(gate, now)
    with anyio.move_on_after(0.01) as scope:
        await ask(gate, Leaf(), ASYNC)
    assert scope.cancelled_caught
    assert gate.waiting == 0
    leave(gate, inside[0], now)
    with anyio.fail_after(5):
        assert await ask(gate, Leaf(), ASYNC) is ANSWER


async def test_a_cancelled_call_says_nothing_of_the_endpoint() -> None:
    """Users who close their browsers are no outage."""
    gate = AdaptiveGate()

    async def never() -> LMResponse:
        await anyio.sleep_forever()
        return ANSWER

    leaf: Any = Both(lambda request: ANSWER, lambda request: never())
    for _ in range(30):
        with anyio.move_on_after(0.001):
            await chain((Adaptive(gate),), leaf, ASYNC)(REQUEST)
    assert (gate.control.inside, gate.control.down_since, gate.control.limit) == (0, None, 4)


# --- Threads and event loops ---------------------------------------------------------------------


class Http:
    """The smallest engine that really sends."""

    def __init__(self, server: FakeServer) -> None:
        self.port = server.port

    def call(self, request: LMRequest) -> LMResponse:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            body = json.dumps({"messages": list(request.messages)})
            client.request("POST", "/v1/chat/completions", body)
            response = client.getresponse()
            response.read()
        finally:
            client.close()
        if response.status == 429:
            wait_s = response.headers.get("retry-after")
            raise LMRateLimitError(
                status=429, retry_after=None if wait_s is None else float(wait_s)
            )
        return ANSWER

    async def acall(self, request: LMRequest) -> LMResponse:
        return await anyio.to_thread.run_sync(self.call, request)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_at_most_one_request_arrives_during_the_penalty(backend: str) -> None:
    """32 threads and two event loops share one gate, and the server's log is the judge (B 4.3)."""
    gate = AdaptiveGate()
    with FakeServer() as server:
        leaf = Http(server)
        server.script(Reply(status=429, headers={"retry-after": "1"}))

        async def call(io: Io) -> LMResponse:
            return await chain((Retry(patience_s=20), Adaptive(gate)), leaf, io)(REQUEST)

        async def loop() -> None:
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(call, ASYNC)

        with pytest.raises(LMRateLimitError):
            run_flow(chain((Adaptive(gate),), leaf, BLOCKING)(REQUEST))
        with ThreadPoolExecutor(34) as pool:
            done = [pool.submit(lambda: run_flow(call(BLOCKING))) for _ in range(32)]
            done += [pool.submit(anyio.run, loop, backend=backend) for _ in range(2)]  # type: ignore[list-item]
            for future in done:
                future.result(20)
        refused, *later = server.requests
    assert refused.answered_at is not None
    during = [each for each in later if each.received_at < refused.answered_at + 1]
    assert len(during) <= 1
    assert [each.status for each in later] == [200] * (32 + 16)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_threads_and_loops_lose_no_place(backend: str) -> None:
    """8 threads and 2 loops, every outcome at random: all come through, all is given back."""
    gate, draw = AdaptiveGate(), random.Random(3)
    done: list[int] = []

    async def visit(io: Io) -> None:
        for number in range(40):
            async with io.enter(gate) as ticket:
                ticket.outcome = draw.choice(["ok"] * 8 + ["throttled", "unavailable", "neutral"])
                gate.control.rate = None  # spacing would only cost time
                gate.control._set_plain(io.now())
            done.append(number)

    async def loop() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(visit, ASYNC)

    threads = [threading.Thread(target=lambda: run_flow(visit(BLOCKING))) for _ in range(8)]
    threads += [threading.Thread(target=lambda: anyio.run(loop, backend=backend)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(done) == 24 * 40
    assert (gate.waiting, gate.control.inside) == (0, 0)
