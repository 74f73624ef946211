"""Which policies an LM has by its parameters, and what they do together, against a real server.

Not here: what each policy decides (`test_middleware.py`, `test_limits.py`, `test_breaker.py`,
`test_adaptive.py`), and other models (`test_fallback.py`).
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.abc import Io, Next
from dspylite.errors import (
    CircuitOpenError,
    LMConfigurationError,
    LMError,
    LMRateLimitError,
    LMServerError,
    OverloadedError,
)
from dspylite.models.adaptive import Adaptive
from dspylite.models.breaker import CircuitBreaker
from dspylite.models.fallback import Fallback
from dspylite.models.limits import MaxConcurrency
from dspylite.models.middleware import in_order, place_of
from dspylite.models.rates import RateLimit
from dspylite.models.retry import Retry, RetryBudget
from dspylite.schema.messages import LMRequest, LMResponse
from dspylite.testing import FakeClock, FakeLM, FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
RETRIED = [408, 409, 425, 429, 500, 502, 503, 504, 529]
OVERLOAD = [429, 502, 503, 504, 529]
ORDINARY = [408, 409, 425, 500]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    """Make an LM of the direct engine; only what a test is about is given."""
    given = {"api_base": server.base_url, "api_key": KEY, "engine": "direct", **options}
    return dspy.LM("openai/m", **given)


def statuses(server: FakeServer) -> list[int | None]:
    return [request.status for request in server.requests]


def places(lm: dspy.BaseLM) -> list[str]:
    return [place_of(policy) for policy in lm.middleware]


def policy_of(lm: dspy.BaseLM, place: str) -> Any:
    (found,) = (policy for policy in lm.middleware if place_of(policy) == place)
    return found


class Noting:
    """A policy that lets calls pass and writes down who it saw."""

    def __init__(self, place: str = "call") -> None:
        self.place = place
        self.seen: list[str] = []

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        self.seen.append(request.model)
        return await call_next(request)


# --- Which, and in which order -------------------------------------------------------------------

CHAINS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, ["cache", "retry", "adaptive"]),
    "no retries": ({"num_retries": 0}, ["cache", "retry", "adaptive"]),
    "not adaptive": ({"adaptive": False}, ["cache", "retry"]),
    "rpm": ({"rpm": 60}, ["cache", "retry", "rate", "adaptive"]),
    "tpm": ({"tpm": 60}, ["cache", "retry", "rate", "adaptive"]),
    "both rates": ({"rpm": 6, "tpm": 60}, ["cache", "retry", "rate", "rate", "adaptive"]),
    "concurrency": ({"max_concurrency": 2}, ["cache", "retry", "concurrency", "adaptive"]),
    "breaker": ({"circuit_breaker": True}, ["cache", "retry", "breaker", "adaptive"]),
    "own breaker": (
        {"circuit_breaker": CircuitBreaker()},
        ["cache", "retry", "breaker", "adaptive"],
    ),
    "fallbacks": ({"fallbacks": [FakeLM()]}, ["cache", "fallback", "retry", "breaker", "adaptive"]),
    "no breaker": (
        {"fallbacks": [FakeLM()], "circuit_breaker": False},
        ["cache", "fallback", "retry", "adaptive"],
    ),
    "fallback as middleware": (
        {"middleware": [Fallback([FakeLM()])]},
        ["cache", "fallback", "retry", "breaker", "adaptive"],
    ),
    "all": (
        {
            "middleware": [Noting("attempt"), Noting("call")],
            "fallbacks": [FakeLM()],
            "rpm": 6,
            "max_concurrency": 3,
        },
        [
            "call",
            "cache",
            "fallback",
            "retry",
            "breaker",
            "rate",
            "concurrency",
            "adaptive",
            "attempt",
        ],
    ),
    "all taken away": (
        dict.fromkeys(("max_concurrency", "max_queue", "rpm", "tpm", "fallbacks", "middleware"))
        | {"max_retry_wait_s": None, "patience_s": None, "num_retries": None},
        ["cache", "retry", "adaptive"],
    ),
}


@pytest.mark.parametrize(("options", "chain"), list(CHAINS.values()), ids=list(CHAINS))
def test_parameters_choose_the_policies_and_the_chain_their_order(
    options: dict[str, Any], chain: list[str]
) -> None:
    """A cache hit must cost no token of a limit, and nobody may hold a place while it waits."""
    assert places(dspy.LM("openai/m", api_base="http://x.invalid/v1", **options)) == chain


def test_a_model_without_a_network_is_not_held_back() -> None:
    """An offline model or one of the user's own has no endpoint to be careful with."""
    assert places(dspy.OfflineLM()) == ["retry"]
    assert places(dspy.BaseLM("own/model")) == ["retry"]
    assert places(dspy.BaseLM("own/model", adaptive=True)) == ["retry", "adaptive"]


GIVEN = {
    "retry": Retry(max_retries=7),
    "rate": RateLimit(rpm=7),
    "concurrency": MaxConcurrency(7),
    "breaker": CircuitBreaker(min_calls=7),
    "fallback": Fallback([FakeLM()]),
}


@pytest.mark.parametrize("place", GIVEN)
def test_a_given_policy_replaces_the_lms_own_of_its_place(place: str) -> None:
    """Two limits of one kind in a row would be one too many, and two retries would multiply."""
    lm = dspy.LM(
        "openai/m",
        api_base="http://x.invalid/v1",
        middleware=[GIVEN[place]],
        num_retries=2,
        rpm=1,
        max_concurrency=1,
        fallbacks=[FakeLM()],
    )
    assert policy_of(lm, place) is GIVEN[place]
    assert places(lm) == [
        *("cache", "fallback", "retry", "breaker", "rate", "concurrency", "adaptive")
    ]


def test_policies_of_one_place_keep_their_order() -> None:
    """What a user lists first stands outermost."""
    first, second = Noting(), Noting()
    assert in_order([second, Retry(), first]) == (second, first, Retry())


class SyncHandle:
    def handle(self, request: LMRequest, call_next: Next, io: Io) -> Any: ...


WRONG: dict[str, tuple[Any, str]] = {
    "no handle": ([object()], "is no middleware: it needs `async def handle"),
    "sync handle": ([SyncHandle()], "is no middleware: it needs `async def handle"),
    "a class": ([Noting], r"is a class and no middleware; write `Noting\(\)`"),
    "unknown place": (
        [Noting("outer")],
        "has the place 'outer'; there are: call, cache, budget, fallback",
    ),
    "not a list": (Noting(), "must be a list of policies"),
}


@pytest.mark.parametrize(("middleware", "message"), list(WRONG.values()), ids=list(WRONG))
def test_what_is_no_middleware_is_refused_when_the_lm_is_made(
    middleware: Any, message: str
) -> None:
    """A mistake shows where it was made, not in the first call of the night."""
    with pytest.raises(LMConfigurationError, match=message):
        dspy.LM("openai/m", middleware=middleware)
    with pytest.raises(LMConfigurationError, match=message):
        dspy.LM("openai/m").copy(middleware=middleware)


def test_a_decorated_handle_is_middleware() -> None:
    """A decorator that hides the `async` makes a policy no worse."""

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    class Decorated:
        @plain
        async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
            return await call_next(request)

    lm = dspy.LM("offline/extractive", middleware=[Decorated()])
    assert lm("What is up? The sky is up.")


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "queue of nothing": ({"max_queue": 3}, "give `max_concurrency=` too"),
    "no place": ({"max_concurrency": 0}, "`max_concurrency` must be"),
    "negative queue": ({"max_concurrency": 1, "max_queue": -1}, "`max_queue` must be"),
    "no rate": ({"rpm": 0}, "`rpm` must be"),
    "negative rate": ({"tpm": -5}, "`tpm` must be"),
    "negative retries": ({"num_retries": -1}, "`num_retries` must be"),
    "retries as text": ({"num_retries": "3"}, "`num_retries` must be"),
    "wait as text": ({"max_retry_wait_s": "3"}, "Waits must be positive seconds"),
    "no wait": ({"max_retry_wait_s": 0}, "Waits must be positive seconds"),
    "wait not a number": ({"max_retry_wait_s": math.nan}, "Waits must be positive seconds"),
    "negative patience": ({"patience_s": -1}, "Waits must be positive seconds"),
    "patience as text": ({"patience_s": "long"}, "Waits must be positive seconds"),
    "breaker as number": ({"circuit_breaker": 5}, "`circuit_breaker` must be True, False or"),
    "one fallback": ({"fallbacks": FakeLM()}, r"write `fallbacks=\[lm\]`"),
    "a name": ({"fallbacks": "openai/m"}, r"write `fallbacks=\[lm\]`"),
    "names": ({"fallbacks": ["openai/m"]}, "'openai/m', which is no LM"),
    "not an error": ({"fallback_on": (LMError, "503")}, "must be a tuple of classes"),
    "a number": ({"fallback_on": 503}, "must be a tuple of classes"),
}


@pytest.mark.parametrize(("options", "message"), list(IMPOSSIBLE.values()), ids=list(IMPOSSIBLE))
def test_an_impossible_parameter_is_refused_when_the_lm_is_made(
    options: dict[str, Any], message: str
) -> None:
    """A typing mistake in a limit must not wait for the first overload to be found."""
    with pytest.raises(LMConfigurationError, match=message):
        dspy.LM("openai/m", **options)
    with pytest.raises(LMConfigurationError, match=message):
        dspy.LM("openai/m").copy(**options)


# --- A user's own policy -------------------------------------------------------------------------


def test_own_middleware_sees_the_call_once_or_each_attempt(server: FakeServer) -> None:
    """A cache wants the call, a meter of requests wants the attempts."""
    server.script(Reply(status=500), Reply(status=500))
    call, attempt = Noting(), Noting("attempt")
    with FakeClock():
        lm_of(server, middleware=[attempt, call], num_retries=2)("hi")
    assert (len(call.seen), len(attempt.seen), len(server.requests)) == (1, 3, 3)


async def test_own_middleware_serves_awaited_calls_too(server: FakeServer) -> None:
    """One `async def handle` is all a user writes."""
    server.script(Reply(status=500))
    call, attempt = Noting(), Noting("attempt")
    with FakeClock():
        await lm_of(server, middleware=[call, attempt], num_retries=1).acall("hi")
    assert (len(call.seen), len(attempt.seen), len(server.requests)) == (1, 2, 2)


def test_own_middleware_may_change_the_request_and_answer_itself(server: FakeServer) -> None:
    """Caches, filters and rewriting need nothing else."""

    class Shouting:
        async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
            (message,) = request.messages
            if message["content"] == "stop":
                return LMResponse(outputs=())
            louder = {**message, "content": str(message["content"]).upper()}
            return await call_next(
                LMRequest(model=request.model, messages=[louder], params=request.params)
            )

    lm = lm_of(server, middleware=[Shouting()])
    assert lm("hi") == ["echo: HI"]
    assert lm("stop") == []
    assert [request.prompt for request in server.requests] == ["HI"]


# --- Retries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", RETRIED)
@pytest.mark.parametrize("num_retries", [0, 1, 4])
def test_given_number_of_retries_is_exact(
    status: int, num_retries: int, server: FakeServer
) -> None:
    """Whoever names a number gets it, for overload as for any other failure (B 4.2)."""
    server.script(*[Reply(status=status)] * (num_retries + 1))
    with FakeClock() as clock, pytest.raises(LMError) as caught:
        lm_of(server, num_retries=num_retries, adaptive=False)("hi")
    assert statuses(server) == [status] * (num_retries + 1)
    assert len(clock.sleeps) == num_retries
    assert [made.status for made in caught.value.attempts] == statuses(server)


@pytest.mark.parametrize("status", ORDINARY)
def test_ordinary_failures_are_retried_three_times(status: int, server: FakeServer) -> None:
    """That is what DSPy's programs are used to."""
    server.script(*[Reply(status=status)] * 4)
    with FakeClock(), pytest.raises(LMError):
        lm_of(server)("hi")
    assert statuses(server) == [status] * 4


@pytest.mark.parametrize("status", OVERLOAD)
def test_overload_is_waited_out_beyond_three_retries(status: int, server: FakeServer) -> None:
    """A minute's outage must not lose an hour's batch (B 4.12)."""
    server.script(*[Reply(status=status)] * 30)
    with FakeClock() as clock:
        assert lm_of(server)("hi") == ["echo: hi"]
    assert statuses(server) == [status] * 30 + [200]
    assert clock.now() < 120


@pytest.mark.parametrize("patience_s", [None, 5.0])
def test_patience_ends(patience_s: float | None, running: FakeServer) -> None:
    """An endpoint that stays down must be reported at last, within the time that was given."""
    with FakeServer(answer=Reply(status=503)) as server, FakeClock() as clock:
        with pytest.raises((LMServerError, CircuitOpenError)):
            lm_of(server, patience_s=patience_s)("hi")
        longest_s = 120.0 if patience_s is None else patience_s
        assert longest_s * 0.9 < clock.now() < longest_s + 3
        assert len(server.requests) > 4


def test_no_patience_counts_overload_like_any_failure(server: FakeServer) -> None:
    """`patience_s=0` leaves DSPy's three retries."""
    server.script(*[Reply(status=503)] * 4)
    with FakeClock(), pytest.raises(LMServerError):
        lm_of(server, patience_s=0)("hi")
    assert statuses(server) == [503] * 4


@pytest.mark.parametrize("options", [{}, {"patience_s": 60.0}])
def test_zero_retries_send_a_request_once_whatever_the_patience(
    options: dict[str, Any], server: FakeServer
) -> None:
    """Whoever must not send twice, such as for money, says it once (B 4.2)."""
    server.script(Reply(status=503))
    with FakeClock() as clock, pytest.raises(LMServerError):
        lm_of(server, num_retries=0, **options)("hi")
    assert (statuses(server), clock.sleeps) == ([503], [])


def test_an_ordinary_failure_in_an_outage_is_not_the_last(server: FakeServer) -> None:
    """What was waited out uses up none of the retries for other failures."""
    server.script(*[Reply(status=503)] * 6, *[Reply(status=500)] * 3)
    with FakeClock():
        assert lm_of(server)("hi") == ["echo: hi"]
    assert statuses(server) == [503] * 6 + [500] * 3 + [200]


async def test_awaited_calls_wait_out_overload_too(server: FakeServer) -> None:
    """Both drivers share the policies."""
    server.script(*[Reply(status=529)] * 8)
    with FakeClock():
        assert await lm_of(server).acall("hi") == ["echo: hi"]
    assert statuses(server) == [529] * 8 + [200]


def test_longest_wait_between_attempts_is_kept(server: FakeServer) -> None:
    """A caller that needs its answer soon bounds the backoff (B 4.2)."""
    server.script(*[Reply(status=500)] * 12)
    with FakeClock() as clock:
        lm_of(server, num_retries=12, max_retry_wait_s=0.25)("hi")
    assert len(clock.sleeps) == 12
    assert max(clock.sleeps) <= 0.25


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("options", [{}, {"num_retries": 5}, {"patience_s": 600.0}])
def test_retry_after_above_the_longest_wait_is_raised_at_once(
    status: int, options: dict[str, Any], server: FakeServer
) -> None:
    """Nobody sleeps in a call for longer than allowed; the caller is told how long (B 4.2)."""
    server.script(Reply(status=status, headers={"retry-after": "8"}))
    with FakeClock() as clock, pytest.raises(LMError) as caught:
        lm_of(server, max_retry_wait_s=7, **options)("hi")
    assert (caught.value.retry_after_s, clock.sleeps) == (8.0, [])
    assert statuses(server) == [status]


def test_retry_after_up_to_the_longest_wait_is_kept_to(server: FakeServer) -> None:
    """The provider knows best when to come back (B 4.2)."""
    server.script(Reply(status=429, headers={"retry-after": "7"}))
    with FakeClock() as clock:
        lm_of(server, max_retry_wait_s=7)("hi")
    assert clock.now() == pytest.approx(7)


def test_a_retry_budget_stops_the_storm(running: FakeServer) -> None:
    """100 calls that all fail would be 400 requests to a server that is ill already (B 4.2)."""
    with FakeServer(answer=Reply(status=500)) as server, FakeClock() as clock:
        lm = lm_of(server, max_retry_wait_s=0.001)
        for _ in range(100):
            with pytest.raises(LMServerError) as caught:
                lm("hi")
        # 100 retries in store, and one for each second that passed.
        assert len(server.requests) == 200
        assert clock.now() < 1
        assert any("too many calls" in note for note in caught.value.__notes__)


def test_a_retry_budget_recovers_with_success_and_time(server: FakeServer) -> None:
    """After an outage calls are protected by retries again."""
    budget = RetryBudget(burst=2, per_success=0.5, per_s=0.1)
    assert [budget.take(0) for _ in range(3)] == [True, True, False]
    budget.give_back()
    assert budget.take(0) is False
    budget.give_back()
    assert [budget.take(0), budget.take(0), budget.take(9), budget.take(19)] == [
        True,
        False,
        False,
        True,
    ]
    assert [budget.take(1e6) for _ in range(3)] == [True, True, False]


def test_the_retry_budget_is_one_for_all_threads_and_lms_of_an_endpoint(
    running: FakeServer,
) -> None:
    """A storm of many small clients is a storm too (B 4.2)."""
    with FakeServer(answer=Reply(status=500)) as server, ThreadPoolExecutor(8) as pool:

        def call(_: int) -> None:
            with pytest.raises(LMServerError):
                lm_of(server, max_retry_wait_s=0.001, adaptive=False)("hi")

        list(pool.map(call, range(80)))
        assert 80 + 100 <= len(server.requests) <= 80 + 100 + 20


# --- Limits --------------------------------------------------------------------------------------


async def ask_all(lms: list[dspy.LM], server: FakeServer, inside: int) -> None:
    """Call each LM on a thread and in a task at once; return when `inside` calls were held."""
    with anyio.fail_after(15):
        async with anyio.create_task_group() as group:
            with server.hold():
                for number, lm in enumerate(lms):
                    group.start_soon(anyio.to_thread.run_sync, lm, f"thread {number}")
                    group.start_soon(lm.acall, f"task {number}")
                await anyio.to_thread.run_sync(server.wait_for_requests, inside)


async def test_a_limit_is_shared_by_lms_threads_and_tasks(server: FakeServer) -> None:
    """A provider counts all that come with one key, whatever object sent it (B 4.5)."""
    lms = [lm_of(server, max_concurrency=3) for _ in range(4)]
    await ask_all(lms, server, inside=3)
    assert (server.max_in_flight, len(server.requests)) == (3, 8)


async def test_limits_of_two_keys_are_two(server: FakeServer) -> None:
    """One tenant's full line must not hold up another's (B 4.5)."""
    lms = [lm_of(server, max_concurrency=2, api_key=key) for key in ("sk-red", "sk-blue")]
    await ask_all(lms * 2, server, inside=4)
    assert (server.max_in_flight, len(server.requests)) == (4, 8)


async def test_limits_of_two_endpoints_are_two(server: FakeServer) -> None:
    """Two servers can take twice as much as one (B 4.5)."""
    other = server.base_url.replace("127.0.0.1", "localhost")
    here, there = lm_of(server, max_concurrency=2), lm_of(server, max_concurrency=2, api_base=other)
    assert policy_of(here, "concurrency") is not policy_of(there, "concurrency")
    assert policy_of(here, "adaptive").gate is not policy_of(there, "adaptive").gate


SAME: dict[str, dict[str, Any]] = {
    "a slash at the end": {"api_base": "http://x.invalid/v1/"},
    "another model": {"model": "openai/another"},
    "another parameter": {"temperature": 0.5},
    "another client of the server": {"model": "hosted_vllm/m"},
}


@pytest.mark.parametrize("change", SAME.values(), ids=list(SAME))
def test_what_is_shared_does_not_depend_on_what_is_asked(change: dict[str, Any]) -> None:
    """Limits belong to the account, not to the prompt (B 4.5)."""
    options = {"api_base": "http://x.invalid/v1", "api_key": KEY, "rpm": 6, "max_concurrency": 2}
    one = dspy.LM("openai/m", **options)
    two = one.copy(**change)
    for place in ("rate", "concurrency"):
        assert policy_of(one, place) is policy_of(two, place)
    assert policy_of(one, "adaptive").gate is policy_of(two, "adaptive").gate


def test_bare_names_of_openai_share_its_endpoint() -> None:
    """`gpt-4o` and `openai/gpt-4o-mini` spend the same account's limits (B 4.5)."""
    lms = [dspy.LM(name, api_key=KEY, rpm=6) for name in ("gpt-4o", "gpt-5", "openai/gpt-4o-mini")]
    assert len({id(policy_of(lm, "rate")) for lm in lms}) == 1


def test_a_rate_holds_over_two_lms(server: FakeServer) -> None:
    """A minute's requests are counted together (B 4.5)."""
    with FakeClock() as clock:
        for number in range(6):
            lm_of(server, rpm=3)(f"call {number}")
    assert clock.now() == pytest.approx(60, abs=20.1)
    assert len(server.requests) == 6


def test_a_full_queue_refuses_at_once(server: FakeServer) -> None:
    """A service says "busy" rather than letting a line grow without end (B 4.5)."""
    lm = lm_of(server, max_concurrency=1, max_queue=1)
    limit = policy_of(lm, "concurrency")
    with ThreadPoolExecutor(2) as pool, server.hold():
        first = pool.submit(lm, "first")
        server.wait_for_requests(1)
        second = pool.submit(lm, "second")
        waited = threading.Event()
        while limit.waiting < 1:
            assert not waited.wait(0.001)
        with pytest.raises(OverloadedError, match="max_queue"):
            lm("third")
        assert not first.done()
    assert first.result(5) + second.result(5) == ["echo: first", "echo: second"]
    assert [request.prompt for request in server.requests] == ["first", "second"]


def test_an_overloaded_error_is_not_retried(server: FakeServer) -> None:
    """What is refused here was refused to protect us; asking again at once would undo it."""
    lm = lm_of(server, max_concurrency=1, max_queue=0)
    with ThreadPoolExecutor(1) as pool, server.hold(), FakeClock() as clock:
        first = pool.submit(lm, "first")
        server.wait_for_requests(1)
        with pytest.raises(OverloadedError):
            lm("second")
        assert clock.sleeps == []
    assert first.result(5) == ["echo: first"]


# --- Copies --------------------------------------------------------------------------------------


def lm_with_everything(server: FakeServer) -> dspy.LM:
    return lm_of(
        server,
        num_retries=2,
        max_retry_wait_s=3.0,
        patience_s=4.0,
        max_concurrency=5,
        max_queue=6,
        rpm=700,
        tpm=80_000,
        fallbacks=[lm_of(server, api_key="sk-second")],
        fallback_on=(LMServerError, LMRateLimitError),
        circuit_breaker=CircuitBreaker(min_calls=9),
        middleware=[Noting()],
        price=(1, 2),
    )


COPIES: dict[str, Callable[[dspy.LM], dspy.LM]] = {
    "pickle": lambda lm: pickle.loads(pickle.dumps(lm)),
    "deepcopy": copy.deepcopy,
    "copy()": lambda lm: lm.copy(),
    "copy(temperature=)": lambda lm: lm.copy(temperature=0.5),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_used_lm_has_all_its_policies(way: str, server: FakeServer) -> None:
    """A worker process keeps to the same limits and falls back like its parent (B 7.2)."""
    lm = lm_with_everything(server)
    server.script(Reply(status=500))
    with FakeClock():
        lm("before")
    twin = COPIES[way](lm)
    assert places(twin) == places(lm)
    retry = policy_of(twin, "retry")
    assert (retry.max_retries, retry.max_wait_s, retry.patience_s) == (2, 3.0, 4.0)
    limit = policy_of(twin, "concurrency")
    assert (limit.limit, limit.max_queue) == (5, 6)
    rates = [policy for policy in twin.middleware if place_of(policy) == "rate"]
    assert [(rate.rpm, rate.tpm) for rate in rates] == [(700, None), (None, 80_000)]
    assert policy_of(twin, "breaker").min_calls == 9
    assert policy_of(twin, "fallback").on == (LMServerError, LMRateLimitError)
    server.clear()
    server.script(*[Reply(status=500)] * 3)
    with FakeClock():
        assert twin("after") == ["echo: after"]
    assert [request.api_key for request in server.requests] == [KEY] * 3 + ["sk-second"]
    assert (len(lm.history), len(twin.history)) == (1, 1)


def test_a_pickle_is_no_larger_after_use(server: FakeServer) -> None:
    """What belongs to this process stays in it (B 7.2)."""
    lm = lm_with_everything(server)
    fresh = len(pickle.dumps(lm.copy(middleware=[])))
    used = lm.copy(middleware=[])
    for number in range(5):
        used(f"call {number}")
    assert len(pickle.dumps(used)) <= fresh + 8


def test_copy_with_a_changed_policy_builds_the_chain_anew(server: FakeServer) -> None:
    """A changed number must not leave the old policy at work."""
    lm = lm_of(server, num_retries=0, max_concurrency=2, rpm=6)
    assert policy_of(lm.copy(num_retries=4), "retry").max_retries == 4
    assert policy_of(lm.copy(max_concurrency=9), "concurrency").limit == 9
    assert places(lm.copy(max_concurrency=None, rpm=None)) == ["cache", "retry", "adaptive"]
    other = FakeLM(default="from the other")
    twin = lm.copy(fallbacks=[other])
    assert places(twin) == [
        *("cache", "fallback", "retry", "breaker", "rate", "concurrency", "adaptive")
    ]
    server.script(Reply(status=500))
    assert twin("hi") == ["from the other"]
    assert places(twin.copy(fallbacks=None)) == [
        "cache",
        "retry",
        "rate",
        "concurrency",
        "adaptive",
    ]
    assert places(lm) == ["cache", "retry", "rate", "concurrency", "adaptive"]
    assert "max_concurrency" not in lm.kwargs


def test_copy_with_another_key_leaves_the_old_limits_behind(server: FakeServer) -> None:
    """A tenant's LM made from a template must not queue with the template's own calls (B 4.5)."""
    lm = lm_of(server, max_concurrency=1)
    twin = lm.copy(api_key="sk-tenant")
    assert policy_of(lm, "concurrency") is not policy_of(twin, "concurrency")
    assert policy_of(lm, "concurrency") is policy_of(lm.copy(), "concurrency")


def test_policies_are_no_request_parameters(server: FakeServer) -> None:
    """A strict server refuses a body with names it does not know."""
    lm_with_everything(server)("hi")
    (request,) = server.requests
    assert dict(request.json) == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_adaptive_gate_is_impatient_where_something_else_can_be_done() -> None:
    """Callers with a fallback must not stand in line for an endpoint that is down (B 4.6)."""
    plain = dspy.LM("openai/m", api_key=KEY)
    for options in ({"fallbacks": [FakeLM()]}, {"circuit_breaker": True}):
        gate = policy_of(plain.copy(**options), "adaptive")
        assert isinstance(gate, Adaptive)
        assert not gate.is_patient
        assert gate.gate is policy_of(plain, "adaptive").gate
    assert policy_of(plain, "adaptive").is_patient


def test_waits_between_attempts_are_short_where_a_fallback_could_answer() -> None:
    """A `Retry-After` of half a minute is no reason to keep a caller from the spare model."""
    plain = dspy.LM("openai/m", api_key=KEY)
    spared = plain.copy(fallbacks=[FakeLM()])
    assert policy_of(plain, "retry").max_wait_s == 30
    assert policy_of(spared, "retry").max_wait_s == 2
    assert policy_of(spared.copy(max_retry_wait_s=9), "retry").max_wait_s == 9
