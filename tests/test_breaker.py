"""`CircuitBreaker`: when an endpoint is left alone, how it is tried again, and what is told of it.

Not here: what answers meanwhile (`test_fallback.py`, once there is one).
"""

from __future__ import annotations

import copy
import http.client
import json
import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite
from dspylite.abc import Engine, Middleware
from dspylite.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.breaker import (
    BUCKETS,
    LOST_PROBE_S,
    Attempt,
    Circuit,
    CircuitBreaker,
    Counts,
    Failure,
    Health,
    Outcome,
    outcome_of,
)
from dspylite.models.limits import NOT_SENT, MaxConcurrency
from dspylite.models.middleware import chain
from dspylite.models.retry import Retry
from dspylite.runtime.clock import Deadline
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.schema.messages import LMDelta, LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeClock, FakeServer, Reply

REQUEST = LMRequest(model="openai/m", messages=[{"role": "user", "content": "hi"}])
ANSWER = LMResponse(outputs=(LMOutput(text="hello"),))
DOWN = LMServerError("no healthy upstream", status=503)


class Leaf:
    """An engine that does what its script says and answers afterwards."""

    def __init__(self, *does: LMResponse | BaseException) -> None:
        self._does = list(does)
        self.calls = 0

    def call(self, request: LMRequest) -> LMResponse:
        self.calls += 1
        does = self._does.pop(0) if self._does else ANSWER
        if isinstance(does, BaseException):
            raise does
        return does

    async def acall(self, request: LMRequest) -> LMResponse:
        return self.call(request)


class Pieces:
    """A stream of some pieces that ends or breaks."""

    def __init__(self, count: int = 2, *, then: Exception | None = None) -> None:
        self._left = count
        self._then = then

    def call(self) -> LMDelta | None:
        if self._left:
            self._left -= 1
            return LMDelta(text="hel")
        if self._then is not None:
            raise self._then
        return None

    async def acall(self) -> LMDelta | None:
        return self.call()

    def close(self) -> None:
        pass

    @property
    def response(self) -> LMResponse:
        return ANSWER


def streamed(pieces: Pieces) -> LMResponse:
    return LMResponse(outputs=(), stream=pieces)


def ask(policy: Middleware, leaf: Engine) -> LMResponse:
    async def plan() -> LMResponse:
        return await chain([policy], leaf, BLOCKING)(REQUEST)

    return run_flow(plan())


async def ask_async(policy: Middleware, leaf: Engine) -> LMResponse:
    return await chain([policy], leaf, ASYNC)(REQUEST)


Ask = Callable[[Middleware, Engine], Awaitable[LMResponse]]


async def ask_blocking(policy: Middleware, leaf: Engine) -> LMResponse:
    return ask(policy, leaf)


both_drivers = pytest.mark.parametrize(
    "asking", [ask_blocking, ask_async], ids=["blocking", "async"]
)


def attempt(breaker: CircuitBreaker, does: LMResponse | BaseException = ANSWER) -> str:
    """Make a call and name what came of it."""
    try:
        ask(breaker, Leaf(does))
    except LMError as error:
        return type(error).__name__
    return "answer"


def opened(**parameters: Any) -> CircuitBreaker:
    """A breaker that has just opened, at the time 0."""
    breaker = CircuitBreaker(**{"min_calls": 1, **parameters})
    attempt(breaker, DOWN)
    assert breaker.health().state == "open"
    return breaker


@pytest.fixture
def restless() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can, so that a missing lock shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Slow(float):
    """A time that lets other threads run while it is compared."""

    def __lt__(self, other: float) -> bool:
        for _ in range(5_000):
            pass
        return float(self) < other


def error_classes(base: type[LMError] = LMError) -> Iterator[type[LMError]]:
    yield base
    for below in base.__subclasses__():
        yield from error_classes(below)


# --- What a failed call says of its endpoint -----------------------------------------------------


def test_only_what_the_endpoint_may_be_blamed_for_is_a_failure() -> None:
    """A refused request, a full queue or a spent budget must not take a good endpoint away."""
    blamed = {cls for cls in error_classes() if outcome_of(cls()) == "failure"}
    assert blamed == {
        LMRateLimitError,
        LMServerError,
        LMTimeoutError,
        LMTransportError,
        DeadlineExceededError,
    }


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyboardInterrupt(), GeneratorExit()], ids=repr
)
def test_what_is_no_error_of_a_call_says_nothing(error: BaseException) -> None:
    """A bug in our code, or a caller that leaves, is not the endpoint's fault."""
    assert outcome_of(error) == "unknown"


def test_a_deadline_in_line_says_nothing_and_one_under_way_is_a_failure() -> None:
    """An endpoint that hangs must be seen as failing, a crowd of callers must not."""
    in_line, under_way = DeadlineExceededError("in line"), DeadlineExceededError("hang")
    in_line.add_note(NOT_SENT)
    assert (outcome_of(in_line), outcome_of(under_way)) == ("unknown", "failure")


@both_drivers
async def test_waiting_for_a_place_until_the_deadline_leaves_the_circuit_closed(
    asking: Ask,
) -> None:
    """The queue is ours; whoever holds the places is counted by itself."""
    places, breaker = MaxConcurrency(1), CircuitBreaker(min_calls=1)
    await asking(places, Leaf(streamed(Pieces())))

    class Inner:
        async def handle(self, request: Any, call_next: Any, io: Any) -> LMResponse:
            async def held(request: LMRequest) -> LMResponse:
                return await places.handle(request, call_next, io)

            return await breaker.handle(request, held, io)

    with FakeClock(), Deadline(1), pytest.raises(DeadlineExceededError):
        await asking(Inner(), Leaf())
    assert breaker.health() == Health()


# --- The window ----------------------------------------------------------------------------------


def test_calls_are_forgotten_after_the_window() -> None:
    """Failures of an hour ago must not open a circuit."""
    counts = Counts(10.0)
    for now in range(5):
        counts.add(now=now, failed=now % 2 == 0)
    totals = [counts.totals(now) for now in (4, 9.9, 10, 11, 12, 13, 14, 99)]
    assert totals == [(2, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0), (0, 0)]


def test_memory_of_the_window_is_bounded() -> None:
    """A service runs for months and counts every call."""
    counts = Counts(10.0)
    for step in range(100_000):
        counts.add(now=step / 100, failed=False)
    assert len(counts._buckets) <= BUCKETS
    assert counts.totals(999.99) == (1_000, 0)


def test_a_clock_read_before_another_threads_count_is_no_harm() -> None:
    """Two threads may read the clock in one order and count in the other."""
    counts = Counts(10.0)
    counts.add(now=5.01, failed=True)
    counts.add(now=4.99, failed=True)
    assert (counts.totals(14.9), counts.totals(15)) == ((0, 2), (0, 0))


# --- The decisions, as tables --------------------------------------------------------------------

Step = tuple[float, Outcome]
F: Outcome = "failure"
S: Outcome = "success"
U: Outcome = "unknown"

STEPS: dict[str, tuple[list[Step], str]] = {
    # the time and outcome of calls one after the other, the state after them
    "nothing": ([], "closed"),
    "fewer than min_calls": ([(0, F)] * 3, "closed"),
    "enough and all fail": ([(0, F)] * 4, "open"),
    "below the ratio": ([(0, S), (0, S), (0, S), (0, F), (0, F)], "closed"),
    "at the ratio": ([(0, S), (0, S), (0, F), (0, F)], "open"),
    "a success never opens": ([(0, F), (0, F), (0, F), (0, S)], "closed"),
    "forgotten before enough": ([(0, F), (0, F), (0, F), (10, F)], "closed"),
    "still remembered": ([(0, F), (0, F), (0, F), (8.9, F)], "open"),
    "says nothing": ([(0, U)] * 99, "closed"),
    "says nothing among failures": ([(0, F), (0, U), (0, F), (0, U), (0, F)], "closed"),
    "not yet probed": ([(0, F)] * 4 + [(4.9, S)], "open"),
    "probe succeeds": ([(0, F)] * 4 + [(5, S)], "closed"),
    "probe fails": ([(0, F)] * 4 + [(5, F)], "open"),
    "probe says nothing": ([(0, F)] * 4 + [(5, U)], "open"),
    "probe says nothing, the next succeeds": ([(0, F)] * 4 + [(5, U), (5, S)], "closed"),
    "closed afresh": ([(0, F)] * 4 + [(5, S), (5, F), (5, F)], "closed"),
    "ten in a row after many successes": ([(0, S)] * 40 + [(1, F)] * 10, "open"),
    "nine in a row after many successes": ([(0, S)] * 40 + [(1, F)] * 9, "closed"),
    "ten, but not in a row": ([(0, S)] * 40 + [(1, F)] * 9 + [(1, S)] + [(1, F)] * 9, "closed"),
    "closed and opened again": ([(0, F)] * 4 + [(5, S)] + [(6, F)] * 3, "open"),
    "cool-down grown": ([(0, F)] * 4 + [(5, F), (14.9, S)], "open"),
    "cool-down grown and over": ([(0, F)] * 4 + [(5, F), (15, S)], "closed"),
}


def small_circuit() -> Circuit:
    return Circuit(
        failure_ratio=0.5, window_s=10.0, min_calls=4, cool_down_s=5.0, max_cool_down_s=30.0
    )


@pytest.mark.parametrize(("steps", "state"), list(STEPS.values()), ids=list(STEPS))
def test_state_follows_from_the_outcomes(steps: list[Step], state: str) -> None:
    """The whole decision, without threads or real time (B 4.6)."""
    circuit, now = small_circuit(), 0.0
    for now, outcome in steps:
        let_through = circuit.begin(now)
        if isinstance(let_through, Attempt):
            circuit.end(let_through, outcome, now)
    assert circuit.health(now).state == state


def test_cool_down_doubles_with_each_failed_probe_up_to_its_cap_and_starts_anew() -> None:
    """A long outage is asked after ever less often, a new one soon."""
    circuit, now, waits = small_circuit(), 0.0, list[float]()
    for _ in range(2):
        for outcome in [F] * 4 + [F] * 4 + [S]:
            let_through = circuit.begin(now)
            assert isinstance(let_through, Attempt)
            circuit.end(let_through, outcome, now)
            wait_s = circuit.health(now).next_probe_s
            if wait_s is not None:
                waits.append(wait_s)
                now += wait_s
        now += 10  # the probe's success is forgotten
    assert waits == [5, 10, 20, 30, 30] * 2


@pytest.mark.parametrize(("asked_s", "wait_s"), [(None, 5), (1, 5), (7, 7), (30, 30), (900, 30)])
def test_cool_down_is_not_shorter_than_what_the_provider_asked_for(
    asked_s: float | None, wait_s: float
) -> None:
    """Coming back earlier is refused for certain; no header may shut a circuit for an hour."""
    circuit = small_circuit()
    failure = Failure.of(LMServerError("503", retry_after=asked_s))
    for _ in range(4):
        let_through = circuit.begin(0)
        assert isinstance(let_through, Attempt)
        circuit.end(let_through, F, 0, failure)
    assert circuit.begin(0) == wait_s


def test_calls_from_before_the_circuit_opened_decide_nothing() -> None:
    """Slow answers of an earlier time arrive while it is open, probing, or closed again."""
    circuit = small_circuit()
    old = [circuit.begin(0) for _ in range(12)]
    assert all(isinstance(each, Attempt) for each in old)

    def late(outcome: Outcome, now: float, count: int) -> str:
        for _ in range(count):
            let_through = old.pop()
            assert isinstance(let_through, Attempt)
            circuit.end(let_through, outcome, now)
        return circuit.health(now).state

    assert late(F, 0, 4) == "open"
    assert late(S, 1, 1) == late(U, 1, 1) == "open"
    probe = circuit.begin(5)
    assert isinstance(probe, Attempt)
    assert late(S, 6, 1) == late(F, 6, 1) == late(U, 6, 1) == "half_open"
    circuit.end(probe, S, 7)
    assert late(F, 8, 3) == "closed"
    assert circuit.health(8).failures == 0


def test_an_attempt_reports_once() -> None:
    """A stream may end in one thread and be closed in another."""
    circuit = small_circuit()
    let_through = circuit.begin(0)
    assert isinstance(let_through, Attempt)
    for outcome in (S, F, F, U):
        circuit.end(let_through, outcome, 0)
    health = circuit.health(0)
    assert (health.successes, health.failures) == (1, 0)


def test_a_probe_that_is_lost_does_not_shut_the_circuit_for_ever() -> None:
    """A stream that nobody reads or closes reports nothing."""
    circuit = small_circuit()
    for _ in range(4):
        let_through = circuit.begin(0)
        assert isinstance(let_through, Attempt)
        circuit.end(let_through, F, 0)
    lost = circuit.begin(5)
    assert circuit.begin(5 + LOST_PROBE_S - 1) == 5
    second = circuit.begin(5 + LOST_PROBE_S)
    assert isinstance(lost, Attempt)
    assert isinstance(second, Attempt)
    circuit.end(lost, F, 999)
    circuit.end(second, S, 999)
    assert circuit.health(999).state == "closed"


@pytest.mark.usefixtures("restless")
def test_exactly_one_of_racing_threads_is_the_probe() -> None:
    """An endpoint that is coming back must not be met by the whole crowd (B 4.6)."""
    for _ in range(20):
        circuit, barrier = small_circuit(), threading.Barrier(16)
        for _ in range(4):
            let_through = circuit.begin(0)
            assert isinstance(let_through, Attempt)
            circuit.end(let_through, F, 0)

        def race(_: int, barrier: threading.Barrier, circuit: Circuit) -> Attempt | float:
            barrier.wait(10)
            return circuit.begin(Slow(5.0))

        with ThreadPoolExecutor(16) as pool:
            begun = [pool.submit(race, n, barrier, circuit) for n in range(16)]
        results = [future.result() for future in begun]
        assert sorted(isinstance(each, Attempt) for each in results) == [False] * 15 + [True]


@pytest.mark.usefixtures("restless")
def test_no_outcome_is_lost_among_threads() -> None:
    """Otherwise the ratio would depend on luck."""
    circuit = Circuit(
        failure_ratio=1, window_s=10, min_calls=1_000, cool_down_s=5, max_cool_down_s=5
    )
    barrier = threading.Barrier(8)

    def count(index: int) -> None:
        barrier.wait(10)
        for step in range(500):
            let_through = circuit.begin(0)
            assert isinstance(let_through, Attempt)
            circuit.end(let_through, F if (index + step) % 5 == 0 else S, 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    health = circuit.health(0)
    assert (health.successes, health.failures) == (3_200, 800)


# --- Around calls --------------------------------------------------------------------------------


@both_drivers
async def test_an_open_circuit_refuses_at_once_and_sends_nothing(asking: Ask) -> None:
    """Callers of a dead endpoint get their answer, or their fallback, without a wait (B 4.6)."""
    breaker, leaf = CircuitBreaker(), Leaf(*[DOWN] * 5)
    with FakeClock() as clock:
        for _ in range(5):
            with pytest.raises(LMServerError):
                await asking(breaker, leaf)
        clock.sleep(2)
        with pytest.raises(CircuitOpenError) as caught:
            await asking(breaker, leaf)
        assert (leaf.calls, clock.sleeps) == (5, [2])
    error = caught.value
    assert (error.retry_after_s, error.model) == (3, "openai/m")
    assert str(error) == (
        "The endpoint of `openai/m` is left alone for 3.0 s, because 5 of its last 5 calls failed. "
        "The last failure was `LMServerError` (no healthy upstream). Call again later, or give the "
        "LM `fallbacks=[...]` that answer meanwhile."
    )


@both_drivers
async def test_a_probe_that_is_answered_closes_the_circuit(asking: Ask) -> None:
    """After an outage everything goes as before (B 4.6)."""
    with FakeClock() as clock:
        breaker = opened(min_calls=1)
        clock.sleep(5)
        assert await asking(breaker, Leaf()) == ANSWER
        assert (breaker.health().state, breaker.health().failures) == ("closed", 0)


@both_drivers
async def test_a_probe_that_fails_opens_it_for_longer(asking: Ask) -> None:
    """One failed call in a while is all that an outage costs (B 4.6)."""
    with FakeClock() as clock:
        breaker = opened(max_cool_down_s=60.0)
        clock.sleep(5)
        with pytest.raises(LMTimeoutError):
            await asking(breaker, Leaf(LMTimeoutError("slow")))
        assert (breaker.health().state, breaker.health().next_probe_s) == ("open", 10)


@both_drivers
@pytest.mark.parametrize("error", [LMAuthError("401"), LMInvalidRequestError("400"), OSError()])
async def test_a_probe_that_says_nothing_is_given_back(asking: Ask, error: Exception) -> None:
    """A bad request proves neither that the endpoint is back nor that it is not."""
    with FakeClock() as clock:
        breaker = opened()
        clock.sleep(5)
        with pytest.raises(type(error)):
            await asking(breaker, Leaf(error))
        assert breaker.health().next_probe_s == 0
        assert await asking(breaker, Leaf()) == ANSWER


async def test_a_cancelled_probe_is_given_back() -> None:
    """Otherwise a user who leaves would keep everybody from an endpoint that is back (B 4.6)."""

    class Hanging(Leaf):
        async def acall(self, request: LMRequest) -> LMResponse:
            with pytest.raises(CircuitOpenError, match="under way") as caught:
                await ask_async(breaker, Leaf())
            assert caught.value.retry_after == 5
            states.append(breaker.health())
            scope.cancel()
            await anyio.sleep_forever()
            raise AssertionError

    states: list[Health] = []
    with FakeClock() as clock:
        breaker = opened()
        clock.sleep(5)
        with anyio.CancelScope() as scope:
            await ask_async(breaker, Hanging())
        assert [(each.state, each.next_probe_s) for each in states] == [("half_open", None)]
        assert await ask_async(breaker, Leaf()) == ANSWER
    assert breaker.health().state == "closed"


def test_retries_stop_at_an_open_circuit() -> None:
    """Waiting for an endpoint that is left alone would hide the outage from the fallback."""
    breaker, leaf = CircuitBreaker(min_calls=2), Leaf(*[DOWN] * 9)

    async def plan() -> LMResponse:
        policies = [Retry(max_retries=5, rand=lambda: 1.0), breaker]
        return await chain(policies, leaf, BLOCKING)(REQUEST)

    with FakeClock() as clock, pytest.raises(CircuitOpenError):
        run_flow(plan())
    assert (leaf.calls, clock.sleeps) == (2, [0.5, 1.0])


class Http:
    """An engine that asks a server by plain HTTP, on this thread or in a worker thread."""

    def __init__(self, server: FakeServer) -> None:
        self._port = server.port

    def call(self, request: LMRequest) -> LMResponse:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        body = json.dumps({"model": request.model, "messages": request.messages})
        try:
            client.request("POST", "/v1/chat/completions", body)
            response = client.getresponse()
            response.read()
        finally:
            client.close()
        if response.status >= 500:
            raise LMServerError("the server failed", status=response.status)
        return ANSWER

    async def acall(self, request: LMRequest) -> LMResponse:
        return await anyio.to_thread.run_sync(self.call, request)


@pytest.fixture
def running() -> Iterator[FakeServer]:
    with FakeServer() as started:
        yield started


def test_the_server_sees_one_probe_of_threads_and_two_loops(server: FakeServer) -> None:
    """What arrives during an outage is 5 failures, and then one request per cool-down (B 4.6)."""
    breaker, engine = CircuitBreaker(), Http(server)
    server.script(*[Reply(status=503)] * 5)

    async def many() -> None:
        async def refused() -> None:
            with pytest.raises(CircuitOpenError):
                await ask_async(breaker, engine)

        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(refused)

    def crowd() -> int:
        """Let threads and loops call at once; return how many requests the server has seen."""
        loops = [pool.submit(anyio.run, many, backend=name) for name in ("asyncio", "trio")]
        calls = [pool.submit(ask, breaker, engine) for _ in range(12)]
        assert {type(call.exception(20)) for call in calls} == {CircuitOpenError}
        assert [loop.result(20) for loop in loops] == [None, None]
        return len(server.requests)

    with FakeClock() as clock, dspylite.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            with pytest.raises(LMServerError):
                ask(breaker, engine)
        assert crowd() == 5
        clock.sleep(5)
        with server.hold():
            probe = pool.submit(ask, breaker, engine)
            server.wait_for_requests(6)
            assert crowd() == 6
        assert probe.result(20) == ANSWER
        assert list(pool.map(lambda _: ask(breaker, engine), range(6))) == [ANSWER] * 6
    assert [request.status for request in server.requests] == [503] * 5 + [200] * 7


# --- Streams -------------------------------------------------------------------------------------

STREAMS: dict[str, tuple[Pieces, str, tuple[int, int]]] = {
    # the stream, what is done with it, successes and failures counted
    "read to the end": (Pieces(2), "ppe", (1, 0)),
    "empty": (Pieces(0), "e", (1, 0)),
    "read to the end and closed": (Pieces(1), "pec", (1, 0)),
    "closed early": (Pieces(2), "pc", (1, 0)),
    "closed unread": (Pieces(2), "c", (0, 0)),
    "broken": (Pieces(1, then=LMTransportError("reset")), "pbc", (0, 1)),
    "broken at once": (Pieces(0, then=LMServerError("cut")), "b", (0, 1)),
    "broken by a bug": (Pieces(1, then=ValueError("a bug")), "pb", (0, 0)),
    "under way": (Pieces(2), "pp", (0, 0)),
}


@both_drivers
@pytest.mark.parametrize(("pieces", "does", "counted"), list(STREAMS.values()), ids=list(STREAMS))
async def test_a_stream_counts_by_how_it_ends(
    asking: Ask, pieces: Pieces, does: str, counted: tuple[int, int]
) -> None:
    """An answer that breaks in the middle is no answer."""
    breaker, pieces = CircuitBreaker(), copy.copy(pieces)
    stream = (await asking(breaker, Leaf(streamed(pieces)))).stream
    assert stream is not None
    for step in does:
        if step == "c":
            stream.close()
        elif step == "b":
            with pytest.raises((LMError, ValueError)):
                await stream.acall()
        else:
            assert (await stream.acall() is None) == (step == "e")
    health = breaker.health()
    assert (health.successes, health.failures) == counted


def test_a_streamed_probe_closes_the_circuit_by_its_first_piece() -> None:
    """Others need not wait until a long answer is written; if it breaks, that counts anew."""
    with FakeClock() as clock:
        breaker = opened()
        clock.sleep(5)
        stream = ask(breaker, Leaf(streamed(Pieces(1, then=DOWN)))).stream
        assert stream is not None
        assert breaker.health().state == "half_open"
        stream.call()
        assert breaker.health().state == "closed"
        with pytest.raises(LMServerError):
            stream.call()
        assert (breaker.health().state, breaker.health().next_probe_s) == ("open", 5)


# --- What is told --------------------------------------------------------------------------------


def test_health_tells_state_counts_and_last_error() -> None:
    """Whoever is called at night wants to know this (B 4.6)."""
    with FakeClock() as clock:
        breaker = CircuitBreaker(min_calls=3, max_cool_down_s=60.0)
        assert breaker.health() == Health()
        said = [attempt(breaker, does) for does in (ANSWER, DOWN, LMRateLimitError("slow down"))]
        assert said == ["answer", "LMServerError", "LMRateLimitError"]
        clock.sleep(2)
        assert breaker.health() == Health(
            state="open",
            successes=1,
            failures=2,
            last_error="slow down",
            last_error_class="LMRateLimitError",
            last_error_code="rate_limit",
            times_opened=1,
            next_probe_s=3,
        )
        clock.sleep(28)
        assert attempt(breaker, DOWN) == "LMServerError"
        assert attempt(breaker) == "CircuitOpenError"
        health = breaker.health()
        assert (health.times_opened, health.next_probe_s) == (1, 10)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("bad key sk-proj-abcdef123456", "bad key [redacted]"),
        ("header: Bearer abc.def was refused", "header: Bearer [redacted] was refused"),
        ("no route to http://me:word@host/v1", "no route to http://[redacted]@host/v1"),
        ("two\n  lines", "two lines"),
        ("x" * 5_000, "x" * 200 + "… (200 more characters)"),
        ("", ""),
    ],
)
def test_last_error_is_short_and_without_keys(text: str, shown: str) -> None:
    """Health is shown on dashboards."""
    assert Failure.of(LMServerError(text)).text == shown


def test_refusal_tells_of_a_failure_that_the_window_has_forgotten() -> None:
    """A cool-down may be longer than the window."""
    with FakeClock() as clock:
        breaker = opened(window_s=1.0, cool_down_s=9.0)
        clock.sleep(5)
        with pytest.raises(CircuitOpenError, match="too many of its calls failed"):
            ask(breaker, Leaf())


# --- The object ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        *({"failure_ratio": value} for value in (0, 1.01, -0.5, math.nan, True, "0.5", None)),
        *({"min_calls": value} for value in (0, -1, 2.0, True, "5")),
        *({"window_s": value} for value in (0, -1, math.nan, math.inf, "30")),
        *({"cool_down_s": value} for value in (0, -1, math.nan, math.inf, "5")),
        *({"max_cool_down_s": value} for value in (0, 4.9, math.nan, math.inf)),
    ],
    ids=repr,
)
def test_impossible_parameter_is_refused_when_made(parameters: dict[str, Any]) -> None:
    """A mistake is found where it was made, not in the first outage."""
    (name,) = parameters
    with pytest.raises(LMConfigurationError, match=f"`{name}` must be"):
        CircuitBreaker(**parameters)


@pytest.mark.parametrize(("cool_down_s", "longest_s"), [(2.0, 5.0), (90.0, 90.0)])
def test_longest_cool_down_is_never_below_the_first(cool_down_s: float, longest_s: float) -> None:
    """Whoever only asks for a long cool-down gets it."""
    assert CircuitBreaker(cool_down_s=cool_down_s).max_cool_down_s == longest_s


@pytest.mark.parametrize(
    "twin_of",
    [lambda thing: pickle.loads(pickle.dumps(thing)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_a_copy_has_the_same_parameters_and_starts_closed(
    twin_of: Callable[[CircuitBreaker], CircuitBreaker],
) -> None:
    """LMs are copied and sent to workers; a lock must not travel, nor another process's outage."""
    breaker = opened(failure_ratio=0.25, window_s=7.0, cool_down_s=2.0, max_cool_down_s=3.0)
    twin = twin_of(breaker)
    assert twin.health() == Health()
    assert repr(twin) == repr(breaker)
    assert repr(twin) == (
        "CircuitBreaker(failure_ratio=0.25, window_s=7.0, min_calls=1, cool_down_s=2.0, "
        "max_cool_down_s=3.0)"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_starts_closed() -> None:
    """The thread that held the lock does not exist in the child."""
    breaker = opened()
    with breaker._circuit._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                is_closed = breaker.health() == Health()
                os._exit(0 if is_closed and attempt(breaker) == "answer" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    assert breaker.health().state == "open"


def test_it_says_its_place_in_the_chain() -> None:
    """An LM sorts its policies by it."""
    assert CircuitBreaker.place == "breaker"
