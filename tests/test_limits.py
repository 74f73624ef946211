"""`RateLimit` and `MaxConcurrency`: what one endpoint is asked at most, over all threads and loops.

Not here: waiting at a gate as such (`test_flow.py`), and retries (`test_middleware.py`).
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
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspylite
from dspylite.abc import Engine, Middleware
from dspylite.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    LMConfigurationError,
    LMError,
    LMRateLimitError,
    LMServerError,
    OverloadedError,
)
from dspylite.models.limits import NOT_SENT, MaxConcurrency, QueuePlaces
from dspylite.models.middleware import chain
from dspylite.models.rates import Line, RateLimit, Turn, Window, estimate_tokens
from dspylite.runtime.clock import Deadline
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.schema.messages import LMDelta, LMOutput, LMRequest, LMResponse, Message, Usage
from dspylite.testing import FakeClock, FakeServer

REQUEST = LMRequest(model="m", messages=[{"role": "user", "content": "hi"}])
ANSWER = LMResponse(outputs=(LMOutput(text="hello"),))


def user(content: Any) -> list[Message]:
    return [{"role": "user", "content": content}]


def worth(tokens: int) -> LMRequest:
    """A request that is estimated to cost so many tokens."""
    return LMRequest(model="m", messages=user(""), params={"max_tokens": tokens})


def answer_of(tokens: int) -> LMResponse:
    return LMResponse(outputs=(LMOutput(text="hello"),), usage=Usage(total_tokens=tokens, calls=1))


class Leaf:
    """An engine that notes the time of each request and does what it is told to."""

    def __init__(self, *does: LMResponse | BaseException | Callable[[], LMResponse]) -> None:
        self._does = list(does)
        self.starts: list[float] = []

    def call(self, request: LMRequest) -> LMResponse:
        self.starts.append(BLOCKING.now())
        does = self._does.pop(0) if self._does else ANSWER
        if isinstance(does, BaseException):
            raise does
        return does if isinstance(does, LMResponse) else does()

    async def acall(self, request: LMRequest) -> LMResponse:
        return self.call(request)


class Pieces:
    """A stream of one piece that ends, breaks or goes on for ever."""

    def __init__(self, *, then: Exception | None = None, tokens: int = 0) -> None:
        self._then = then
        self._pieces = [LMDelta(text="hel")]
        self._tokens = tokens
        self.closed = 0

    def call(self) -> LMDelta | None:
        if self._pieces:
            return self._pieces.pop()
        if self._then is not None:
            raise self._then
        return None

    async def acall(self) -> LMDelta | None:
        return self.call()

    def close(self) -> None:
        self.closed += 1

    @property
    def response(self) -> LMResponse:
        return answer_of(self._tokens)

    def opened(self) -> LMResponse:
        return LMResponse(outputs=(), stream=self)


def ask(policy: Middleware, leaf: Engine, request: LMRequest = REQUEST) -> LMResponse:
    async def plan() -> LMResponse:
        return await chain([policy], leaf, BLOCKING)(request)

    return run_flow(plan())


async def ask_async(policy: Middleware, leaf: Engine, request: LMRequest = REQUEST) -> LMResponse:
    return await chain([policy], leaf, ASYNC)(request)


Ask = Callable[[Middleware, Engine, LMRequest], Awaitable[LMResponse]]


async def ask_blocking(policy: Middleware, leaf: Engine, request: LMRequest) -> LMResponse:
    return ask(policy, leaf, request)


both_drivers = pytest.mark.parametrize(
    "asking", [ask_blocking, ask_async], ids=["blocking", "async"]
)


def exit_of_child(check: Callable[[], bool]) -> int:
    """Run a check in a forked child; 0 if it held, a signal's number if the child hung."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def restless() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can, so that a missing lock shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Slow(int):
    """A number that lets other threads run while it is compared with."""

    def __gt__(self, other: int) -> bool:
        for _ in range(50):
            pass
        return int(self) > other


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


# --- Requests and tokens in a minute: when a request may go -------------------------------------

MINUTES: dict[str, tuple[dict[str, int], list[tuple[float, int]], list[float]]] = {
    # limits, (arrival, tokens) of calls one after the other, when each goes
    "below the limit": ({"rpm": 3}, [(0, 0), (1, 0), (2, 0)], [0, 1, 2]),
    "a burst, then the rest": ({"rpm": 2}, [(0, 0)] * 5, [0, 0, 60, 60, 120]),
    "each waits for its own": ({"rpm": 2}, [(0, 0), (50, 0), (55, 0), (56, 0)], [0, 50, 60, 110]),
    "no fixed minutes": ({"rpm": 2}, [(58, 0), (59, 0), (61, 0)], [58, 59, 118]),
    "just not yet": ({"rpm": 1}, [(0, 0), (59.9, 0)], [0, 60]),
    "exactly a window later": ({"rpm": 1}, [(0, 0), (60, 0)], [0, 60]),
    "tokens below the limit": ({"tpm": 100}, [(0, 50), (1, 50)], [0, 1]),
    "tokens that wait": ({"tpm": 100}, [(0, 50), (1, 50), (2, 1)], [0, 1, 60]),
    "many small ones for a big one": ({"tpm": 100}, [(0, 30), (9, 30), (20, 90)], [0, 9, 69]),
    "a small one not past a limit": ({"tpm": 100}, [(0, 90), (1, 20), (1, 10)], [0, 60, 60]),
    "larger than the window": ({"tpm": 100}, [(0, 500), (1, 1), (2, 500)], [0, 60, 120]),
    "both, requests first": ({"rpm": 1, "tpm": 100}, [(0, 1), (1, 1)], [0, 60]),
    "both, tokens first": ({"rpm": 9, "tpm": 100}, [(0, 99), (1, 2)], [0, 60]),
}


@both_drivers
@pytest.mark.parametrize(("limits", "calls", "starts"), list(MINUTES.values()), ids=list(MINUTES))
async def test_calls_go_as_soon_as_the_last_60_seconds_allow(
    asking: Ask, limits: dict[str, int], calls: list[tuple[float, int]], starts: list[float]
) -> None:
    """Going too early is refused by the provider, going too late wastes the quota (B 4.5)."""
    limit, leaf = RateLimit(**limits), Leaf()
    with FakeClock() as clock:
        for arrival, tokens in calls:
            clock.sleep(arrival - clock.now())
            await asking(limit, leaf, worth(tokens) if tokens else REQUEST)
    assert leaf.starts == starts


@settings(deadline=None, max_examples=150)
@given(
    rpm=st.none() | st.integers(1, 5),
    tpm=st.integers(1, 60),
    calls=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 80)), max_size=30),
)
def test_no_60_seconds_see_more_than_the_limits_and_nobody_waits_longer(
    rpm: int | None, tpm: int, calls: list[tuple[int, int]]
) -> None:
    """Judged by counting all requests anew for each, which the limiter must not do (B 4.5)."""
    limit, leaf, log = RateLimit(rpm=rpm, tpm=tpm), Leaf(), list[tuple[float, int]]()
    with FakeClock() as clock:
        for gap, tokens in calls:
            clock.sleep(gap)
            arrival = clock.now()
            ask(limit, leaf, worth(tokens))

            def may_go(now: float, tokens: int = tokens) -> bool:
                recent = [spent for start, spent in log if start > now - 60]
                fits = sum(recent) + min(tokens, tpm) <= tpm
                return fits and (rpm is None or len(recent) < rpm)

            ends = [arrival, *(start + 60 for start, _ in log if start + 60 > arrival)]
            assert leaf.starts[-1] == next(end for end in ends if may_go(end))
            log.append((leaf.starts[-1], min(tokens, tpm)))


@both_drivers
@pytest.mark.parametrize(
    ("used", "next_goes_at"), [(10, 0), (90, 60), (5_000, 60), (0, 60)], ids=str
)
async def test_tokens_are_corrected_by_what_the_provider_counted(
    asking: Ask, used: int, next_goes_at: float
) -> None:
    """Estimates are far off, and would waste most of a quota; an unknown count changes nothing."""
    limit, leaf = RateLimit(tpm=100), Leaf(answer_of(used))
    with FakeClock():
        await asking(limit, leaf, worth(80))
        await asking(limit, leaf, worth(80 if used == 10 else 20 if used == 90 else 30))
    assert leaf.starts == [0, next_goes_at]


@both_drivers
async def test_tokens_of_a_stream_are_corrected_at_its_end(asking: Ask) -> None:
    """A streamed answer tells its tokens last."""
    limit, leaf = RateLimit(tpm=100), Leaf(Pieces(tokens=10).opened())
    with FakeClock():
        stream = (await asking(limit, leaf, worth(80))).stream
        assert stream is not None
        assert stream.call() == LMDelta(text="hel")
        assert await stream.acall() is None
        assert stream.response.usage.total_tokens == 10
        await asking(limit, leaf, worth(90))
    assert leaf.starts == [0, 0]


def test_a_correction_after_the_window_changes_nothing() -> None:
    """A call may take longer than a minute, and its tokens must not be given back twice."""
    window = Window(rpm=None, tpm=100)
    slow = Turn(80)
    window.add(slow, 0)
    assert window.fits(100, now=60)
    window.correct(slow, 500)
    assert (window.tokens, window.fits(100, now=61)) == (0, True)


def test_tokens_that_prove_fewer_let_the_next_go_at_once() -> None:
    """Those in line do not keep to what was planned when they came."""
    line = Line(None, 100)
    first = line.ask(100, 0, None)
    first.sent = True
    second, woken = line.ask(60, 1, None), threading.Event()
    second.wake = woken.set
    assert (second.granted, second.look_again_at, line.waiting) == (False, 60, 1)
    line.correct(first, 30, 2)
    assert (second.granted, second.expires, woken.is_set(), line.waiting) == (True, 62, True, 0)


@both_drivers
async def test_a_stream_that_tells_no_tokens_counts_as_estimated(asking: Ask) -> None:
    """Not every endpoint counts, and a broken answer was paid for too."""
    limit = RateLimit(tpm=100)
    leaf = Leaf(Pieces().opened(), Pieces(then=LMServerError("cut"), tokens=1).opened())
    with FakeClock():
        for error in (None, LMServerError):
            stream = (await asking(limit, leaf, worth(50))).stream
            assert stream is not None
            stream.call()
            if error is None:
                assert stream.call() is None
            else:
                with pytest.raises(error):
                    stream.call()
            stream.close()
        await asking(limit, leaf, worth(50))
    assert leaf.starts == [0, 0, 60]


@both_drivers
@pytest.mark.parametrize("error", [LMServerError("503"), LMRateLimitError("429")])
async def test_a_failed_request_counts_as_estimated(asking: Ask, error: LMError) -> None:
    """Providers count them too, so failing in a circle must not become faster than succeeding."""
    limit, leaf = RateLimit(rpm=9, tpm=100), Leaf(error)
    with FakeClock():
        with pytest.raises(type(error)):
            await asking(limit, leaf, worth(80))
        await asking(limit, leaf, worth(80))
    assert leaf.starts == [0, 60]


@both_drivers
async def test_a_request_that_was_not_sent_costs_nothing(asking: Ask) -> None:
    """A policy further in may refuse it, or let its deadline pass in line."""
    late = DeadlineExceededError("in line")
    late.add_note(NOT_SENT)
    not_sent = [OverloadedError("full"), CircuitOpenError("down"), late]
    limit, leaf = RateLimit(rpm=1, tpm=100), Leaf(*not_sent)
    with FakeClock():
        for error in not_sent:
            with pytest.raises(type(error)):
                await asking(limit, leaf, worth(80))
        await asking(limit, leaf, worth(80))
    assert leaf.starts == [0, 0, 0, 0]


# --- ... and who waits ---------------------------------------------------------------------------


@both_drivers
async def test_a_turn_after_the_deadline_is_refused_at_once_and_not_reserved(asking: Ask) -> None:
    """Waiting for what comes too late helps nobody, and others can have the turn (B 4.4)."""
    limit, leaf = RateLimit(rpm=1), Leaf()
    with FakeClock() as clock:
        await asking(limit, leaf, REQUEST)
        with Deadline(59), pytest.raises(DeadlineExceededError, match="rpm") as caught:
            await asking(limit, leaf, REQUEST)
        assert (clock.sleeps, caught.value.__notes__) == ([], [NOT_SENT])
        with Deadline(61):
            await asking(limit, leaf, REQUEST)
    assert (leaf.starts, clock.sleeps) == ([0, 60], [60])


EARLIEST = {
    # limits, (start, tokens) of those that went, (turns, tokens) of those in line, tokens, earliest
    "nobody before": ({"rpm": 2}, [], (0, 0), 0, 30),
    "room left": ({"rpm": 2}, [(0, 0)], (0, 0), 0, 30),
    "the first to expire": ({"rpm": 2}, [(0, 0), (20, 0)], (0, 0), 0, 60),
    "the second to expire": ({"rpm": 2}, [(0, 0), (20, 0)], (1, 0), 0, 80),
    "a second round": ({"rpm": 2}, [(0, 0), (20, 0)], (3, 0), 0, 140),
    "far back in line": ({"rpm": 2}, [(0, 0), (20, 0)], (200, 0), 0, 60 + 6_000),
    "tokens left": ({"tpm": 100}, [(0, 50)], (0, 0), 50, 30),
    "tokens of the first": ({"tpm": 100}, [(0, 50), (20, 50)], (0, 0), 10, 60),
    "tokens of those in line": ({"tpm": 100}, [(0, 100)], (3, 150), 60, 180),
    "behind small ones in line": ({"rpm": 9, "tpm": 100}, [(0, 100)], (20, 20), 1, 60),
}


@pytest.mark.parametrize(
    ("limits", "went", "line", "tokens", "earliest"), list(EARLIEST.values()), ids=list(EARLIEST)
)
def test_earliest_turn_is_known_without_simulating_the_line(
    limits: dict[str, int],
    went: list[tuple[float, int]],
    line: tuple[int, int],
    tokens: int,
    earliest: float,
) -> None:
    """It decides who is refused at once, so it must never be later than the real turn."""
    window = Window(limits.get("rpm"), limits.get("tpm"))
    for start, spent in went:
        window.add(Turn(spent), start)
    assert window.earliest(tokens, 30, turns=line[0], queued=line[1]) == earliest


@settings(deadline=None)
@given(
    rpm=st.none() | st.integers(1, 4),
    tpm=st.none() | st.integers(1, 50),
    calls=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60)), min_size=1, max_size=25),
)
def test_nobody_is_refused_who_could_have_gone(
    rpm: int | None, tpm: int | None, calls: list[tuple[int, int]]
) -> None:
    """The line is run to its end and each turn compared with what was foretold."""
    line, foretold, turns, now = Line(rpm, tpm), list[float](), list[Turn](), 0

    def run_until(until: float) -> None:
        while line.waiting:
            first = next(turn for turn in turns if not turn.granted)
            assert first.look_again_at is not None
            if first.look_again_at > until:
                break
            line.look(first.look_again_at)

    for gap, tokens in calls:
        now += gap
        run_until(now)
        cost = tokens if tpm is None else min(tokens, tpm)
        queued = sum(turn.tokens for turn in turns if not turn.granted)
        fits = line._window.fits(cost, now)
        told = line._window.earliest(cost, now, turns=line.waiting, queued=queued)
        foretold.append(now if fits and not line.waiting else told)
        turns.append(line.ask(tokens, now, None))
    run_until(math.inf)
    starts = [turn.expires - 60 for turn in turns]
    assert starts == sorted(starts)
    assert all(earliest <= start for earliest, start in zip(foretold, starts, strict=True))
    if tpm is None:
        assert foretold == starts


async def test_a_cancelled_waiter_gives_its_turn_back() -> None:
    """A batch that is stopped must not leave an hour of reserved turns behind (B 4.5)."""
    limit, leaf = RateLimit(rpm=1), Leaf()

    async def give_up() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await ask_async(limit, leaf)

    scopes: list[anyio.CancelScope] = []
    await ask_async(limit, leaf)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(give_up)
            while limit.waiting < 100:
                await anyio.lowlevel.checkpoint()
            for scope in scopes:
                scope.cancel()
    assert limit.waiting == 0
    started = leaf.starts[0]
    assert limit._line.ask(0, started + 60, None).granted
    assert not limit._line.ask(0, started + 61, None).granted


def test_a_turn_granted_to_somebody_who_left_goes_to_the_next() -> None:
    """It may be granted in the moment in which its holder is cancelled."""
    line = Line(1, None)
    line.ask(0, 0, None).sent = True
    left, next_one = line.ask(0, 1, None), line.ask(0, 2, None)
    line.look(60)
    assert (left.granted, next_one.granted) == (True, False)
    line.leave(left, 61)
    line.leave(left, 62)
    assert (next_one.granted, next_one.expires, line.waiting) == (True, 121, 0)


def test_the_next_in_line_is_told_when_it_has_become_the_first() -> None:
    """Only the first keeps the time, so a next one that is not told would wait for ever."""
    line = Line(1, None)
    line.ask(0, 0, None).sent = True
    first, second = line.ask(0, 1, None), line.ask(0, 2, None)
    woken = threading.Event()
    second.wake = woken.set
    assert (first.look_again_at, second.look_again_at) == (60, None)
    line.look(60)
    assert (first.granted, second.granted) == (True, False)
    assert (second.look_again_at, woken.is_set()) == (120, True)


def test_a_turn_of_a_closed_loop_goes_to_the_next() -> None:
    """A loop that ended while it waited must not keep the line standing."""
    line = Line(1, None)
    line.ask(0, 0, None).sent = True

    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    line.ask(0, 1, None).wake = closed
    woken = threading.Event()
    second = line.ask(0, 2, None)
    second.wake = woken.set
    line.look(60)
    assert (second.granted, woken.is_set(), line.waiting) == (True, True, 0)


def test_leaving_the_middle_of_the_window_makes_room_there() -> None:
    """What is given back is that request's, not the oldest one's."""
    window = Window(rpm=3, tpm=100)
    turns = [Turn(10), Turn(20), Turn(30)]
    for now, turn in enumerate(turns):
        window.add(turn, now)
    window.discard(turns[1])
    window.discard(turns[1])
    assert (len(window), window.tokens, window.next_expiry) == (2, 40, 60)
    assert window.fits(60, now=3)
    assert (window.fits(99, now=61), window.fits(100, now=62)) == (False, True)
    assert (len(window), window.next_expiry) == (0, None)


@pytest.mark.usefixtures("restless")
def test_exactly_the_limit_is_granted_to_racing_threads() -> None:
    """Threads that ask in the same moment share one count (B 4.5)."""
    line, barrier = Line(1_000, None), threading.Barrier(8)

    def race(_: int) -> list[Turn]:
        barrier.wait(10)
        return [line.ask(0, 0.0, None) for _ in range(400)]

    with ThreadPoolExecutor(8) as pool:
        turns = [turn for some in pool.map(race, range(8)) for turn in some]
    for now, granted in [(0, 1_000), (59.9, 1_000), (60, 2_000), (120, 3_000), (180, 3_200)]:
        line.look(now)
        assert sum(turn.granted for turn in turns) == granted
    assert (line.waiting, line.remembered) == (0, 200)


def test_threads_and_two_loops_wait_in_one_line() -> None:
    """All of them go, each when it is its turn, and nobody is forgotten (B 4.5)."""
    limit, leaf = RateLimit(rpm=2), Leaf()

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(ask_async, limit, leaf)

    with FakeClock() as clock, dspylite.ThreadPoolExecutor(6) as pool:
        futures: list[Future[Any]] = [pool.submit(ask, limit, leaf) for _ in range(4)]
        futures += [pool.submit(anyio.run, many, backend=name) for name in ("asyncio", "trio")]
        for future in futures:
            future.result(20)
    assert len(leaf.starts) == 12
    assert clock.now() == 5 * 60
    assert sum(clock.sleeps) == 5 * 60  # only the first in line keeps the time


def test_memory_is_bounded_by_the_window() -> None:
    """A service runs for months."""
    line = Line(100, None)
    for now in range(20_000):
        line.ask(0, now, None).sent = True
        gone = line.ask(0, now, None)
        line.leave(gone, now)
    assert (line.remembered, line.waiting) == (60, 0)


# --- ... the estimate ----------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:..."}}
ESTIMATES: dict[str, tuple[list[Message], dict[str, Any], int]] = {
    "text and a limit": (user("x" * 40), {"max_tokens": 7}, 17),
    "rounded up": (user("x" * 41), {"max_tokens": 7}, 18),
    "the newer name": (user(""), {"max_completion_tokens": 7, "max_tokens": 9}, 7),
    "the newest name": (user(""), {"max_output_tokens": 7}, 7),
    "no limit": (user("x" * 40), {}, 266),
    "a limit that is none": (user("x" * 40), {"max_tokens": None}, 266),
    "several answers": (user("x" * 40), {"max_tokens": 7, "n": 3}, 31),
    "parts": (user([{"type": "text", "text": "x" * 40}, IMAGE]), {"max_tokens": 7}, 782),
    "no content": ([{"role": "assistant", "content": None}], {"max_tokens": 7}, 7),
}


@pytest.mark.parametrize(
    ("messages", "params", "tokens"), list(ESTIMATES.values()), ids=list(ESTIMATES)
)
def test_tokens_are_estimated_from_text_and_limit(
    messages: list[Message], params: dict[str, Any], tokens: int
) -> None:
    """Something must be reserved before the provider has counted."""
    request = LMRequest(model="m", messages=messages, params=params)
    assert estimate_tokens(request) == tokens


# --- Calls at once -------------------------------------------------------------------------------


class Http:
    """An engine that asks a server by plain HTTP, on this thread or in a worker thread."""

    def __init__(self, server: FakeServer) -> None:
        self._port = server.port

    def call(self, request: LMRequest) -> LMResponse:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        body = json.dumps({"model": request.model, "messages": request.messages})
        try:
            client.request("POST", "/v1/chat/completions", body)
            client.getresponse().read()
        finally:
            client.close()
        return ANSWER

    async def acall(self, request: LMRequest) -> LMResponse:
        return await anyio.to_thread.run_sync(self.call, request)


@pytest.fixture
def running() -> Iterator[FakeServer]:
    with FakeServer() as started:
        yield started


def test_the_server_never_sees_more_than_the_limit(server: FakeServer) -> None:
    """6 threads and 2 event loops share one limit, and really use all of it (B 4.5)."""
    limit, engine = MaxConcurrency(3), Http(server)

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(ask_async, limit, engine)

    with ThreadPoolExecutor(8) as pool:
        with server.hold():
            futures: list[Future[Any]] = [
                pool.submit(anyio.run, many, backend=name) for name in ("asyncio", "trio")
            ]
            futures += [pool.submit(ask, limit, engine) for _ in range(6)]
            server.wait_for_requests(3)
            while limit.waiting < 15:  # until then somebody might still go past the limit
                assert server.in_flight <= 3
            held = server.in_flight
        futures += [pool.submit(ask, limit, engine) for _ in range(30)]
        for future in futures:
            future.result(20)
    assert (held, server.max_in_flight, len(server.requests)) == (3, 3, 48)


@pytest.mark.usefixtures("restless")
def test_a_queue_that_threads_race_for_is_exact() -> None:
    """Looking at its length first and joining it afterwards would let too many in (B 4.5)."""
    for _ in range(20):
        places, barrier = QueuePlaces(2), threading.Barrier(8)

        def race(_: int, places: QueuePlaces, barrier: threading.Barrier) -> int:
            refused = 0
            barrier.wait(10)
            for _ in range(50):
                try:
                    places.ask_within(0, Slow(100))
                except OverloadedError:
                    refused += 1
            return refused

        with ThreadPoolExecutor(8) as pool:
            racing = [pool.submit(race, n, places, barrier) for n in range(8)]
        refused = sum(future.result() for future in racing)
        assert (refused, places.waiting) == (400 - 102, 100)


def test_exactly_the_queue_waits_and_the_rest_is_overloaded() -> None:
    """64 threads come at once: 3 go, 10 wait, and 51 are told so at once (B 4.5)."""
    limit, barrier, go_on = (
        MaxConcurrency(3, max_queue=10),
        threading.Barrier(64),
        threading.Event(),
    )

    def held() -> LMResponse:
        assert go_on.wait(20)
        return ANSWER

    leaf = Leaf(*[held] * 13)

    def race() -> LMResponse:
        barrier.wait(20)
        return ask(limit, leaf)

    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(race) for _ in range(64)]
        finished = as_completed(futures, timeout=10)
        try:
            refused = [next(finished).exception() for _ in range(51)]
            waiting = limit.waiting
        finally:
            go_on.set()
        answers = [future.result() for future in finished]
    assert {type(error) for error in refused} == {OverloadedError}
    assert (waiting, answers, len(leaf.starts)) == (10, [ANSWER] * 13, 13)


@both_drivers
async def test_without_a_queue_nobody_waits(asking: Ask) -> None:
    """`max_queue=0` sheds all load that cannot be served at once."""
    limit = MaxConcurrency(1, max_queue=0)
    stream = (await asking(limit, Leaf(Pieces().opened()), REQUEST)).stream
    with pytest.raises(OverloadedError, match="`max_queue=`"):
        await asking(limit, Leaf(), REQUEST)
    assert stream is not None
    stream.close()
    assert await asking(limit, Leaf(), REQUEST) == ANSWER


@both_drivers
async def test_a_full_limit_ends_at_the_deadline_and_says_that_nothing_was_sent(
    asking: Ask,
) -> None:
    """A breaker must not blame the endpoint for it (B 4.4)."""
    limit, leaf = MaxConcurrency(1), Leaf(Pieces().opened())
    await asking(limit, leaf, REQUEST)
    with FakeClock() as clock, Deadline(3), pytest.raises(DeadlineExceededError) as caught:
        await asking(limit, leaf, REQUEST)
    assert (clock.sleeps, caught.value.__notes__, len(leaf.starts)) == ([3], [NOT_SENT], 1)


@both_drivers
async def test_a_deadline_that_passes_under_way_is_not_said_to_be_in_line(asking: Ask) -> None:
    """An endpoint that hangs must be seen as failing."""
    with pytest.raises(DeadlineExceededError) as caught:
        await asking(MaxConcurrency(1), Leaf(DeadlineExceededError("hang")), REQUEST)
    assert not hasattr(caught.value, "__notes__")


@both_drivers
@pytest.mark.parametrize("failure", [LMServerError("503"), ValueError("a bug")])
async def test_a_failed_call_gives_its_place_back(asking: Ask, failure: Exception) -> None:
    """Otherwise an outage would eat the limit up."""
    limit, leaf = MaxConcurrency(1, max_queue=0), Leaf(failure)
    with pytest.raises(type(failure)):
        await asking(limit, leaf, REQUEST)
    assert await asking(limit, leaf, REQUEST) == ANSWER


async def test_a_cancelled_call_gives_its_place_back() -> None:
    """A user who leaves must not shrink the service."""
    limit = MaxConcurrency(1, max_queue=0)

    class Hanging(Leaf):
        async def acall(self, request: LMRequest) -> LMResponse:
            scope.cancel()
            await anyio.sleep_forever()
            raise AssertionError

    with anyio.CancelScope() as scope:
        await ask_async(limit, Hanging())
    assert await ask_async(limit, Leaf()) == ANSWER


# --- ... and streams -----------------------------------------------------------------------------


async def read_on(stream: Any, *, awaited: bool) -> LMDelta | None:
    piece: LMDelta | None = await stream.acall() if awaited else stream.call()
    return piece


@both_drivers
@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("how", ["end", "break", "close", "all"])
async def test_a_stream_holds_its_place_until_it_is_over(
    asking: Ask, how: str, awaited: bool
) -> None:
    """An answer that is being written is a call under way (B 4.5)."""
    limit = MaxConcurrency(1, max_queue=0)
    pieces = Pieces(then=LMServerError("cut") if how == "break" else None)
    stream = (await asking(limit, Leaf(pieces.opened()), REQUEST)).stream
    assert stream is not None
    assert await read_on(stream, awaited=awaited) == LMDelta(text="hel")
    with pytest.raises(OverloadedError):
        await asking(limit, Leaf(), REQUEST)
    if how == "break":
        with pytest.raises(LMServerError):
            await read_on(stream, awaited=awaited)
    if how in {"end", "all"}:
        assert await read_on(stream, awaited=awaited) is None
    if how in {"close", "all"}:
        stream.close()
        stream.close()
    second = (await asking(limit, Leaf(Pieces().opened()), REQUEST)).stream
    with pytest.raises(OverloadedError):  # one place was given back, not two
        await asking(limit, Leaf(), REQUEST)
    assert pieces.closed == (2 if how in {"close", "all"} else 0)
    assert second is not None
    second.close()


def test_a_stream_that_cannot_be_closed_gives_its_place_back() -> None:
    """The place is ours, whatever becomes of the connection."""

    class Stuck(Pieces):
        def close(self) -> None:
            raise OSError("stuck")

    limit = MaxConcurrency(1, max_queue=0)
    stream = ask(limit, Leaf(Stuck().opened())).stream
    assert stream is not None
    with pytest.raises(OSError, match="stuck"):
        stream.close()
    assert ask(limit, Leaf()) == ANSWER


def test_threads_that_end_one_stream_free_one_place() -> None:
    """One thread reads to the end while others close."""
    for _ in range(50):
        limit, barrier = MaxConcurrency(2, max_queue=0), threading.Barrier(4)
        streams = [ask(limit, Leaf(Pieces().opened())).stream for _ in range(2)]

        def end(close: bool, stream: Any, barrier: threading.Barrier) -> None:
            barrier.wait(10)
            if close:
                stream.close()
            else:
                stream.call()
                stream.call()

        with ThreadPoolExecutor(4) as pool:
            for index in range(4):
                pool.submit(end, index > 0, streams[0], barrier)
        ask(limit, Leaf(Pieces().opened()))
        with pytest.raises(OverloadedError):
            ask(limit, Leaf())


# --- Both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        *(partial(RateLimit, rpm=value) for value in (0, -1, 1.5, True, "60")),
        *(partial(RateLimit, tpm=value) for value in (0, -1, 1.5, True, "60")),
        RateLimit,
        *(partial(MaxConcurrency, value) for value in (0, -1, 1.5, True, None)),
        *(partial(MaxConcurrency, 1, max_queue=value) for value in (-1, 1.5, True)),
    ],
    ids=repr,
)
def test_impossible_limit_is_refused_when_made(make: Callable[[], Any]) -> None:
    """A mistake is found where it was made, and the message says what to write."""
    with pytest.raises(LMConfigurationError, match=r"`(rpm|tpm|max_\w+)[`=].*;"):
        make()


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
copied = pytest.mark.parametrize("twin_of", list(COPIES.values()), ids=list(COPIES))


@copied
def test_a_copied_limit_has_the_same_numbers_and_a_fresh_state(
    twin_of: Callable[[Any], Any],
) -> None:
    """LMs are copied and sent to workers; a lock or a full window must not travel."""
    rate, places = RateLimit(rpm=1, tpm=9), MaxConcurrency(1, max_queue=0)
    leaf = Leaf(Pieces().opened())
    with FakeClock() as clock:
        ask(rate, Leaf())
        ask(places, leaf)
        assert ask(twin_of(rate), leaf) == ask(twin_of(places), leaf) == ANSWER
        assert clock.sleeps == []
    assert repr(twin_of(rate)) == repr(rate) == "RateLimit(rpm=1, tpm=9)"
    assert repr(twin_of(places)) == repr(places) == "MaxConcurrency(1, max_queue=0)"


@forks
def test_a_forked_child_starts_afresh() -> None:
    """The thread that held a lock, or a place, does not exist in the child."""
    rate, places = RateLimit(rpm=1), MaxConcurrency(1, max_queue=0)
    ask(rate, Leaf())
    ask(places, Leaf(Pieces().opened()))

    def both_answer() -> bool:
        with Deadline(1):
            return ask(rate, Leaf()) == ask(places, Leaf()) == ANSWER

    with rate._line._lock, places._places._lock:
        assert exit_of_child(both_answer) == 0
    with pytest.raises(OverloadedError):
        ask(places, Leaf())


def test_calls_that_a_fork_cut_off_from_their_line_do_no_harm_in_the_child() -> None:
    """The code around a fork goes on in the child too, and leaves what it had entered."""
    line = Line(2, 100)
    sent, granted, waiting = (line.ask(tokens, 0, None) for tokens in (40, 30, 90))
    sent.sent = True
    line.reset_after_fork()
    line.ask(50, 0, None).sent = True
    line.correct(sent, 10, 1)
    for turn in (granted, waiting):
        line.leave(turn, 1)
    assert (line.remembered, line._window.tokens) == (1, 50)


def test_each_says_its_place_in_the_chain() -> None:
    """An LM sorts its policies by it."""
    assert (RateLimit.place, MaxConcurrency.place) == ("rate", "concurrency")
    assert all(type(policy.place) is str for policy in (RateLimit(rpm=1), MaxConcurrency(1)))
