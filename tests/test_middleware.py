"""`Retry` and the chain: when a request is sent again, after how long, and in which order.

Not here: retries over real HTTP (`test_lm_over_http.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspylite.abc import Io, Middleware, Next
from dspylite.errors import (
    ContextWindowExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)
from dspylite.models.middleware import chain
from dspylite.models.retry import Retry
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeClock

REQUEST = LMRequest(model="m", messages=[{"role": "user", "content": "hi"}])
ANSWER = LMResponse(outputs=(LMOutput(text="hello"),))


class Leaf:
    """An engine that fails as its script says and answers afterwards."""

    def __init__(self, *failures: BaseException, log: list[str] | None = None) -> None:
        self._failures = list(failures)
        self._log = log
        self.calls = 0

    def call(self, request: LMRequest) -> LMResponse:
        self.calls += 1
        if self._log is not None:
            self._log.append(f"leaf {request.model}")
        if self._failures:
            raise self._failures.pop(0)
        return ANSWER

    async def acall(self, request: LMRequest) -> LMResponse:
        return self.call(request)


def full(max_retries: int = 3, **options: float) -> Retry:
    """A policy without chance: it waits the longest that it may."""
    return Retry(max_retries=max_retries, rand=lambda: 1.0, **options)


def ask(policies: Sequence[Middleware], leaf: Leaf) -> LMResponse:
    async def plan() -> LMResponse:
        return await chain(policies, leaf, BLOCKING)(REQUEST)

    return run_flow(plan())


async def ask_async(policies: Sequence[Middleware], leaf: Leaf) -> LMResponse:
    return await chain(policies, leaf, ASYNC)(REQUEST)


def error_classes(base: type[LMError] = LMError) -> Iterator[type[LMError]]:
    yield base
    for below in base.__subclasses__():
        yield from error_classes(below)


# --- The decision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "longest_s"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (7, 30), (1_100, 30)]
)
def test_wait_doubles_with_each_attempt_up_to_the_cap(attempt: int, longest_s: float) -> None:
    """An outage must not be met with a storm, and no wait may become endless (or overflow)."""
    assert full(9_999).delay(attempt, LMServerError()) == longest_s


@pytest.mark.parametrize(("drawn", "wait_s"), [(0.0, 0.0), (0.25, 1.0), (0.5, 2.0)])
def test_wait_is_a_uniform_share_of_the_longest(drawn: float, wait_s: float) -> None:
    """Full jitter keeps many clients from coming back at the same moment."""
    assert Retry(max_retries=9, rand=lambda: drawn).delay(4, LMServerError()) == wait_s


@given(
    attempt=st.integers(1, 10_000),
    drawn=st.floats(0, 1, exclude_max=True),
    base_s=st.floats(1e-6, 1e6),
    max_wait_s=st.floats(1e-6, 1e6),
)
def test_wait_lies_between_zero_and_the_cap(
    attempt: int, drawn: float, base_s: float, max_wait_s: float
) -> None:
    """Whatever the numbers, a wait is one that can be slept."""
    retry = Retry(max_retries=10_000, base_s=base_s, max_wait_s=max_wait_s, rand=lambda: drawn)
    wait_s = retry.delay(attempt, LMServerError())
    assert wait_s is not None
    assert 0 <= wait_s <= max_wait_s


@pytest.mark.parametrize(
    ("max_retries", "attempts"), [(0, 1), (1, 2), (2, 3), (3, 4)], ids=lambda n: str(n)
)
def test_max_retries_counts_the_attempts_after_the_first(max_retries: int, attempts: int) -> None:
    """`num_retries=0` must mean that a request is sent once."""
    retry = full(max_retries)
    given_up = [retry.delay(attempt, LMServerError()) is None for attempt in range(1, 6)]
    assert given_up.index(True) + 1 == attempts


def test_only_passing_failures_are_retried() -> None:
    """A refused request stays refused; sending it again costs money and hides the cause."""
    retried = {cls for cls in error_classes() if full().delay(1, cls()) is not None}
    assert retried == {LMRateLimitError, LMServerError, LMTimeoutError, LMTransportError}


@pytest.mark.parametrize(
    ("asked_s", "wait_s"),
    [(0.0, 0.0), (0.02, 0.02), (7.0, 7.0), (30.0, 30.0), (30.01, None), (3_600.0, None)],
)
def test_wait_asked_for_is_kept_or_the_error_raised(asked_s: float, wait_s: float | None) -> None:
    """A provider knows best when to come back; beyond the cap the caller decides."""
    assert full().delay(1, LMRateLimitError(retry_after=asked_s)) == wait_s


def test_wait_asked_for_does_not_revive_what_is_given_up() -> None:
    """`Retry-After` on a 400, or after the last attempt, is no reason to send again."""
    assert full(1).delay(2, LMRateLimitError(retry_after=1)) is None
    assert full(1).delay(1, LMInvalidRequestError(retry_after=1)) is None


@pytest.mark.parametrize("max_retries", [-1, True, "3", None, 1.5])
def test_impossible_number_of_retries_is_refused_when_made(max_retries: object) -> None:
    """A mistake is found where it was made, not at the first failure."""
    with pytest.raises(LMConfigurationError, match="`num_retries` must be 0 or more"):
        Retry(max_retries=max_retries)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["base_s", "max_wait_s"])
@pytest.mark.parametrize("wait_s", [0.0, -1.0, math.nan])
def test_wait_that_is_not_positive_is_refused_when_made(name: str, wait_s: float) -> None:
    """A wait of 0 would be a storm, a negative one an error in `sleep`."""
    with pytest.raises(LMConfigurationError, match="positive seconds"):
        full(**{name: wait_s})


# --- Doing it, through both drivers ------------------------------------------------------------

RUNS = {
    "no failure": ([], 1, []),
    "one that passes": ([LMServerError()], 2, [0.5]),
    "different ones": ([LMTimeoutError(), LMTransportError(), LMRateLimitError()], 4, [0.5, 1, 2]),
    "waits asked for": ([LMRateLimitError(retry_after=9), LMServerError()], 3, [9, 1]),
}
GIVEN_UP = {
    "for good": ([LMAuthError()], 1, []),
    "for good, later": ([LMServerError(), ContextWindowExceededError()], 2, [0.5]),
    "attempts used up": ([LMServerError() for _ in range(9)], 4, [0.5, 1, 2]),
    "wait too long": ([LMRateLimitError(retry_after=31)], 1, []),
    "not ours": ([ValueError("a bug")], 1, []),
}


def cases(table: dict[str, object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("failures", "attempts", "waits"), list(table.values()), ids=list(table)
    )


@cases(RUNS)
def test_blocking_retry_waits_and_answers(
    failures: list[BaseException], attempts: int, waits: list[float]
) -> None:
    """A failure that passes is not the program's business."""
    leaf = Leaf(*failures)
    with FakeClock() as clock:
        assert (ask([full()], leaf)).outputs == ANSWER.outputs
    assert (leaf.calls, clock.sleeps) == (attempts, waits)


@cases(RUNS)
async def test_awaited_retry_waits_and_answers(
    failures: list[BaseException], attempts: int, waits: list[float]
) -> None:
    """One body serves both drivers, so both wait alike."""
    leaf = Leaf(*failures)
    with FakeClock() as clock:
        assert (await ask_async([full()], leaf)).outputs == ANSWER.outputs
    assert (leaf.calls, clock.sleeps) == (attempts, waits)


@cases(GIVEN_UP)
def test_blocking_retry_raises_the_last_failure(
    failures: list[BaseException], attempts: int, waits: list[float]
) -> None:
    """What is given up on is raised as it came, after no wait that nobody profits from."""
    leaf = Leaf(*failures)
    with FakeClock() as clock, pytest.raises(type(failures[attempts - 1])) as caught:
        ask([full()], leaf)
    assert caught.value is failures[attempts - 1]
    assert (leaf.calls, clock.sleeps) == (attempts, waits)


@cases(GIVEN_UP)
async def test_awaited_retry_raises_the_last_failure(
    failures: list[BaseException], attempts: int, waits: list[float]
) -> None:
    """The async form gives up at the same point."""
    leaf = Leaf(*failures)
    with FakeClock() as clock, pytest.raises(type(failures[attempts - 1])) as caught:
        await ask_async([full()], leaf)
    assert caught.value is failures[attempts - 1]
    assert (leaf.calls, clock.sleeps) == (attempts, waits)


def test_error_tells_how_many_attempts_were_made() -> None:
    """Whoever reads the log must know that retrying was tried."""
    with FakeClock(), pytest.raises(LMServerError) as caught:
        ask([full(2)], Leaf(*(LMServerError() for _ in range(3))))
    assert caught.value.__notes__ == ["Gave up after 3 attempts."]


def test_error_of_a_single_attempt_says_nothing_of_attempts() -> None:
    """A note on every refused request would be noise."""
    with pytest.raises(LMAuthError) as caught:
        ask([full(2)], Leaf(LMAuthError()))
    assert not hasattr(caught.value, "__notes__")


async def test_cancelled_while_waiting_sends_nothing_more() -> None:
    """A caller that left must not cost another request."""
    with FakeClock(), anyio.CancelScope() as scope:

        class Leaving(Leaf):
            async def acall(self, request: LMRequest) -> LMResponse:
                scope.cancel()
                return self.call(request)

        leaf = Leaving(LMServerError())
        await ask_async([full()], leaf)
    assert (leaf.calls, scope.cancelled_caught) == (1, True)


# --- The chain ---------------------------------------------------------------------------------


class Noting:
    """A policy that writes down when it is entered and left, and marks the request."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        self._log.append(f"{self._name} in")
        marked = LMRequest(model=f"{request.model}{self._name}", messages=request.messages)
        try:
            return await call_next(marked)
        finally:
            self._log.append(f"{self._name} out")


def test_first_policy_is_outermost() -> None:
    """The order of the chain decides what an attempt costs, so it is the order of the list."""
    log: list[str] = []
    assert (ask([Noting("a", log), Noting("b", log)], Leaf(log=log))).outputs == ANSWER.outputs
    assert log == ["a in", "b in", "leaf mab", "b out", "a out"]


async def test_first_policy_is_outermost_when_awaited() -> None:
    """The async chain is the same chain."""
    log: list[str] = []
    answer = await ask_async([Noting("a", log), Noting("b", log)], Leaf(log=log))
    assert answer.outputs == ANSWER.outputs
    assert log == ["a in", "b in", "leaf mab", "b out", "a out"]


def test_each_attempt_passes_the_policies_inside_retry_anew() -> None:
    """A limit inside `Retry` counts attempts, and nobody holds it while waiting for the next."""
    log: list[str] = []
    with FakeClock() as clock:
        clock_log = Noting("gate", log)
        ask([full(), clock_log], Leaf(LMServerError(), log=log))
    assert log == ["gate in", "leaf mgate", "gate out"] * 2
    assert clock.sleeps == [0.5]


def test_policies_outside_retry_see_one_call() -> None:
    """A cache or a fallback around `Retry` sees the final outcome, once."""
    log: list[str] = []
    with FakeClock():
        ask([Noting("cache", log), full()], Leaf(LMServerError(), LMServerError()))
    assert log == ["cache in", "cache out"]


def test_chain_without_policies_is_the_engine() -> None:
    """An LM may have no policy at all."""
    assert (ask([], Leaf())).outputs == ANSWER.outputs


def test_policy_may_answer_without_the_engine() -> None:
    """That is what a cache does."""

    class Cached:
        async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
            return ANSWER

    leaf = Leaf()
    assert (ask([Cached()], leaf)).outputs == ANSWER.outputs
    assert leaf.calls == 0
