"""`Fallback`: who answers where the first model cannot, what is told of it, and a whole outage.

Not here: when a circuit opens and closes by itself (`test_breaker.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.abc import Io
from dspylite.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMRateLimitError,
    LMServerError,
    LMTransportError,
)
from dspylite.models.breaker import CircuitBreaker
from dspylite.models.fallback import Fallback
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.history import GLOBAL_HISTORY
from dspylite.schema.messages import LMOutput, LMResponse, Message
from dspylite.testing import FakeClock, FakeLM, FakeServer, Reply

FIRST, SECOND, THIRD = "sk-of-the-first-one", "sk-of-the-second-one", "sk-of-the-third-one"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start the first model's server for the module."""
    with FakeServer(api_keys=[FIRST], answer="first") as server:
        yield server


@pytest.fixture(scope="module")
def running_others() -> Iterator[tuple[FakeServer, FakeServer]]:
    """Start the servers of the fallbacks for the module; each takes its own key only."""
    second = FakeServer(api_keys=[SECOND], answer="second")
    with second, FakeServer(api_keys=[THIRD], answer="third") as third:
        yield second, third


@pytest.fixture
def second(running_others: tuple[FakeServer, FakeServer]) -> FakeServer:
    running_others[0].clear()
    return running_others[0]


@pytest.fixture
def third(running_others: tuple[FakeServer, FakeServer]) -> FakeServer:
    running_others[1].clear()
    return running_others[1]


def lm_of(server: FakeServer, name: str, key: str, **options: Any) -> dspy.LM:
    """Make an LM that sends each request once, unless a test says more."""
    given = {"api_base": server.base_url, "api_key": key, "engine": "direct", "num_retries": 0}
    return dspy.LM(f"openai/{name}", **{**given, **options})


def chain_of(server: FakeServer, second: FakeServer, third: FakeServer, **options: Any) -> dspy.LM:
    others = [lm_of(second, "second", SECOND), lm_of(third, "third", THIRD)]
    return lm_of(server, "first", FIRST, fallbacks=others, **options)


def counts(*servers: FakeServer) -> list[int]:
    return [len(server.requests) for server in servers]


def whole(lm: dspy.BaseLM, prompt: str = "hi", **params: Any) -> LMResponse:
    """Call and return all that is known of the answer."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    return run_flow(lm.plan(BLOCKING, messages, params))


async def whole_awaited(lm: dspy.BaseLM) -> LMResponse:
    return await lm.plan(ASYNC, [{"role": "user", "content": "hi"}], {})


# --- Who is asked --------------------------------------------------------------------------------

FALLS_BACK: dict[str, Reply] = {
    **{str(status): Reply(status=status) for status in (408, 409, 425, 429, 500, 502, 503, 529)},
    "reset": Reply(drop="before"),
    "reset in the body": Reply(drop="body"),
    "no JSON": Reply(body="<html>no healthy upstream</html>"),
    "empty": Reply(body=""),
}


@pytest.mark.parametrize("reply", FALLS_BACK.values(), ids=list(FALLS_BACK))
def test_a_failing_endpoint_is_replaced(
    reply: Reply, server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Whatever an endpoint does when it is ill, the caller gets an answer (B 4.6)."""
    server.script(reply)
    assert chain_of(server, second, third)("hi") == ["second"]
    assert counts(server, second, third) == [1, 1, 0]


async def test_an_awaited_call_falls_back_too(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """One body serves both drivers (B 4.6)."""
    server.script(Reply(status=503))
    second.script(Reply(status=500))
    assert await chain_of(server, second, third).acall("hi") == ["third"]
    assert counts(server, second, third) == [1, 1, 1]


def test_fallbacks_are_tried_in_order(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """The list is the user's order of preference (B 4.6)."""
    server.script(Reply(status=503), Reply(status=503))
    second.script(Reply(status=429))
    lm = chain_of(server, second, third)
    assert [lm("hi"), lm("hi"), lm("hi")] == [["third"], ["second"], ["first"]]
    assert counts(server, second, third) == [3, 2, 1]


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, LMInvalidRequestError), (401, LMAuthError), (403, LMAuthError), (404, LMError)],
)
def test_a_refused_request_does_not_fall_back(
    status: int,
    error: type[LMError],
    server: FakeServer,
    second: FakeServer,
    third: FakeServer,
) -> None:
    """A wrong key or a mistake in the request must be seen, not paid for elsewhere (B 4.6)."""
    server.script(Reply(status=status))
    with pytest.raises(error):
        chain_of(server, second, third)("hi")
    assert counts(server, second, third) == [1, 0, 0]


def test_fallback_on_replaces_the_usual_errors(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Who wants another model on a refused key says so, and then only there (B 4.6)."""
    server.script(Reply(status=401), Reply(status=503))
    lm = chain_of(server, second, third, fallback_on=(LMAuthError,))
    assert lm("hi") == ["second"]
    with pytest.raises(LMServerError):
        lm("hi")
    assert counts(server, second, third) == [2, 1, 0]


def test_fallback_may_be_given_as_middleware(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """`Fallback([...], on=...)` is the same policy, written out (B 4.6)."""
    policy = Fallback([lm_of(second, "second", SECOND)], on=(LMServerError,))
    lm = lm_of(server, "first", FIRST, middleware=[policy], num_retries=None)
    server.script(*[Reply(status=503)] * 4, Reply(status=400))
    with FakeClock() as clock:
        assert lm("hi") == ["second"]
        assert clock.now() < 10  # it does not wait out the outage first
        assert lm.health().failures == 4
    with pytest.raises(LMInvalidRequestError):
        lm("hi")
    assert counts(server, second) == [5, 1]


@pytest.mark.parametrize("given", [[], (), None, "openai/m", [None], [FakeLM(), "openai/m"]])
def test_a_fallback_without_models_is_refused_when_made(given: Any) -> None:
    """A chain that would fail in the outage it is for is of no use."""
    with pytest.raises(LMConfigurationError):
        Fallback(given)


@pytest.mark.parametrize("on", [("503",), 503, (ValueError(),)])
def test_a_fallback_on_no_errors_is_refused_when_made(on: Any) -> None:
    """`except` would find it out in the middle of the outage."""
    with pytest.raises(LMConfigurationError, match="must be a tuple of classes"):
        Fallback([FakeLM()], on=on)


def test_a_fallback_takes_one_error_class_or_a_list() -> None:
    """Both are what people write."""
    fallback = FakeLM()
    assert Fallback([fallback], on=LMError).on == (LMError,)  # type: ignore[arg-type]
    assert Fallback([fallback], on=[LMError]).on == (LMError,)  # type: ignore[arg-type]


def test_an_exception_that_is_not_ours_falls_back_where_it_is_named() -> None:
    """A model of one's own may raise anything."""

    class Broken(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        Broken("own/broken", fallbacks=[FakeLM()])("hi")
    lm = Broken("own/broken", fallbacks=[FakeLM(default="ok")], fallback_on=(ZeroDivisionError,))
    assert lm("hi") == ["ok"]


def test_a_fallback_has_policies_of_its_own(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Each model retries as it was told to, and may have fallbacks itself."""
    server.script(Reply(status=500))
    second.script(*[Reply(status=500)] * 3)
    other = lm_of(second, "second", SECOND, num_retries=2, fallbacks=[lm_of(third, "third", THIRD)])
    with FakeClock():
        assert lm_of(server, "first", FIRST, fallbacks=[other])("hi") == ["third"]
    assert counts(server, second, third) == [1, 3, 1]


# --- What is sent --------------------------------------------------------------------------------


def test_parameters_of_the_call_go_to_the_fallback_and_those_of_the_first_lm_do_not(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Another provider must not get the first one's key, headers or settings (B 4.6)."""
    server.script(Reply(status=503))
    lm = chain_of(
        server,
        second,
        third,
        temperature=0.9,
        extra_headers={"x-secret": "of the first"},
        extra_body={"only": "first"},
        top_p=0.5,
    )
    assert lm("hi", max_tokens=5, stop=["END"]) == ["second"]
    (request,) = second.requests
    assert dict(request.json) == {
        "model": "second",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "stop": ["END"],
    }
    assert request.api_key == SECOND
    assert "x-secret" not in request.headers
    assert FIRST not in str(dict(request.headers))
    assert server.requests[0].headers["x-secret"] == "of the first"


def test_a_key_or_endpoint_named_by_the_call_is_for_the_first_model_alone(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A tenant's key must never be shown to another provider (B 4.6)."""
    server.script(Reply(status=503))
    lm = chain_of(server, second, third, api_key="sk-nobody")
    answer = lm(
        "hi", api_key=FIRST, api_base=server.base_url, extra_headers={"x-tenant": "t"}, seed=3
    )
    assert answer == ["second"]
    (request,) = second.requests
    assert (request.api_key, request.json["seed"]) == (SECOND, 3)
    assert "x-tenant" not in request.headers
    assert counts(server, second, third) == [1, 1, 0]


# --- What is told --------------------------------------------------------------------------------


def test_answer_says_who_gave_it_and_what_was_tried(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Cost and quality depend on who answered (B 4.6)."""
    server.script(Reply(status=503), Reply(status=500))
    second.script(Reply(status=429))
    with FakeClock():
        response = whole(chain_of(server, second, third, num_retries=1))
    assert response.answered_by == "openai/third"
    assert [(made.model, made.error, made.status) for made in response.attempts] == [
        ("openai/first", "server", 503),
        ("openai/first", "server", 500),
        ("openai/second", "rate_limit", 429),
        ("openai/third", None, None),
    ]
    assert response.attempts[-1].usage == response.usage
    assert all(made.usage.calls == 0 for made in response.attempts[:-1])


async def test_awaited_answer_says_who_gave_it(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Both drivers tell the same."""
    server.script(Reply(status=503))
    response = await whole_awaited(chain_of(server, second, third))
    assert response.answered_by == "openai/second"
    assert [made.status for made in response.attempts] == [503, None]


def test_answer_of_the_first_model_has_one_attempt(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """The usual call is told in the same form."""
    response = whole(chain_of(server, second, third))
    assert response.answered_by == "openai/first"
    assert [(made.model, made.error) for made in response.attempts] == [("openai/first", None)]


def test_prediction_tells_usage_and_attempts_by_model(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A bill is split by who was paid, and nothing is counted twice (B 4.10)."""
    server.script(Reply(status=503))
    second.script(Reply(text="[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"))
    with dspy.context(lm=chain_of(server, second, third)), dspy.track_usage() as tracker:
        prediction = dspy.Predict("question -> answer")(question="Well?")
    counted = second.requests[0].usage
    assert counted is not None
    assert prediction.answer == "yes"
    assert list(prediction.get_lm_usage()) == ["openai/second"]
    assert prediction.get_lm_usage()["openai/second"]["total_tokens"] == counted["total_tokens"]
    assert [(a.model, a.status) for a in prediction.get_lm_attempts()] == [
        ("openai/first", 503),
        ("openai/second", None),
    ]
    assert list(tracker.by_model) == ["openai/second"]
    assert (tracker.total.calls, tracker.total.total_tokens) == (1, counted["total_tokens"])


def test_both_histories_keep_the_call_and_the_global_one_once(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Whoever looks at either model finds it; nobody finds it twice (B 4.6)."""
    server.script(Reply(status=503))
    lm = chain_of(server, second, third)
    (fallback, unused) = lm.policies.fallbacks
    GLOBAL_HISTORY.clear()  # it may be full
    lm("hi", seed=1)
    assert [entry.outputs for entry in lm.history] == [("second",)]
    assert [entry.outputs for entry in fallback.history] == [("second",)]  # type: ignore[attr-defined]
    assert len(unused.history) == 0  # type: ignore[attr-defined]
    assert [entry.model for entry in GLOBAL_HISTORY] == ["openai/second"]


def test_a_budget_counts_the_fallbacks_answer_once(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Money is spent by who answered, at its price (B 4.8)."""
    server.script(Reply(status=503))
    lm = lm_of(
        server,
        "first",
        FIRST,
        price=(1, 1),
        fallbacks=[lm_of(second, "second", SECOND, price=(1000, 1000))],
    )
    with dspy.budget(usd=1) as spending:
        lm("one two three")
    counted = second.requests[0].usage
    assert counted is not None
    assert (spending.calls, spending.tokens_spent) == (1, counted["total_tokens"])
    assert spending.usd_spent == pytest.approx(spending.tokens_spent * 1e-3)


def test_callbacks_hear_of_both_calls_one_inside_the_other(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A trace shows that the second model was asked for the first (B 4.15)."""
    heard: list[tuple[str, str]] = []

    class Ear(dspy.BaseCallback):
        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append(("start", instance.model))

        def on_lm_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            heard.append(("end", f"{outputs} {type(exception).__name__}"))

    server.script(Reply(status=503))
    with dspy.context(callbacks=[Ear()]):
        chain_of(server, second, third)("hi")
    assert heard == [
        ("start", "openai/first"),
        ("start", "openai/second"),
        ("end", "['second'] NoneType"),
        ("end", "['second'] NoneType"),
    ]


# --- When all fail -------------------------------------------------------------------------------


def test_when_all_fail_the_last_error_tells_of_all(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """One look at the error must show what was tried (B 4.6)."""
    server.script(Reply(status=503), Reply(status=502))
    second.script(Reply(status=429))
    third.script(Reply(status=500))
    with FakeClock(), pytest.raises(LMServerError) as caught:
        chain_of(server, second, third, num_retries=1)("hi")
    assert (caught.value.status, caught.value.model) == (500, "openai/third")
    assert [(made.model, made.status) for made in caught.value.attempts] == [
        ("openai/first", 503),
        ("openai/first", 502),
        ("openai/second", 429),
        ("openai/third", 500),
    ]


def test_a_refusal_by_a_fallback_ends_the_chain_and_tells_of_all(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A wrong key of the spare model must be seen, together with why it was asked."""
    server.script(Reply(status=503))
    second.script(Reply(status=401))
    with pytest.raises(LMAuthError) as caught:
        chain_of(server, second, third)("hi")
    assert [made.status for made in caught.value.attempts] == [503, 401]
    assert counts(server, second, third) == [1, 1, 0]


def test_the_deadline_ends_the_chain(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A spare model must not start what nobody waits for any more (B 4.4)."""
    server.script(Reply(hang=True))
    lm = chain_of(server, second, third)
    with pytest.raises(DeadlineExceededError) as caught:
        lm("hi", deadline_s=0.3)
    assert [made.model for made in caught.value.attempts] == ["openai/first"]
    assert counts(server, second, third) == [1, 0, 0]


def test_a_fallbacks_own_deadline_leaves_time_for_the_next(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A slow spare model is given up in favour of the next one (B 4.4)."""
    server.script(Reply(status=503))
    second.script(Reply(hang=True))
    others = [lm_of(second, "second", SECOND, deadline_s=0.2), lm_of(third, "third", THIRD)]
    lm = lm_of(server, "first", FIRST, fallbacks=others)
    assert lm("hi", deadline_s=15) == ["third"]
    assert counts(server, second, third) == [1, 1, 1]
    second.wait_until_idle()


# --- Streams -------------------------------------------------------------------------------------


def test_a_stream_falls_back_before_its_first_piece(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """A reader sees one answer, from whoever could give it (B 4.6)."""
    server.script(Reply(status=503), Reply(status=503))
    lm = chain_of(server, second, third, num_retries=1)
    with FakeClock(), dspy.track_usage() as tracker, lm.stream("hi") as stream:
        assert "".join(piece.text for piece in stream) == "second"
    assert stream.response.answered_by == "openai/second"
    assert [(made.model, made.status) for made in stream.response.attempts] == [
        ("openai/first", 503),
        ("openai/first", 503),
        ("openai/second", None),
    ]
    assert stream.response.attempts[-1].usage == stream.response.usage
    assert list(tracker.by_model) == ["openai/second"]
    assert tracker.total.calls == 1
    assert counts(server, second, third) == [2, 1, 0]


async def test_an_awaited_stream_falls_back_before_its_first_piece(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """The async form is the same (B 4.6)."""
    server.script(Reply(status=503))
    second.script(Reply(drop="before"))
    with anyio.fail_after(10):
        async with await chain_of(server, second, third).astream("hi") as stream:
            text = "".join([piece.text async for piece in stream])
    assert (text, stream.response.answered_by) == ("third", "openai/third")
    assert [made.model for made in stream.response.attempts] == [
        "openai/first",
        "openai/second",
        "openai/third",
    ]


def test_a_stream_that_breaks_after_its_first_piece_is_not_begun_anew(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Two halves of two answers would be no answer (B 4.6)."""
    server.script(Reply(status=500), Reply(chunks=["one ", "two ", "three"], cut_after=2))
    lm = chain_of(server, second, third, num_retries=1)
    seen: list[str] = []
    with FakeClock(), pytest.raises(LMError) as caught, lm.stream("hi") as stream:
        seen += [piece.text for piece in stream]
    assert counts(server, second, third) == [2, 0, 0]
    assert [made.model for made in caught.value.attempts] == ["openai/first"] * 2
    assert caught.value.attempts[0].status == 500


# --- An outage -----------------------------------------------------------------------------------


class Outage:
    """A primary and a spare server, and threads that call all the time until told to stop."""

    def __init__(self, primary: FakeServer, spare: FakeServer, **options: Any) -> None:
        self.primary, self.spare = primary, spare
        fallback = dspy.LM(
            "openai/spare", api_base=spare.base_url, api_key="k", engine="direct", cache=False
        )
        self.lm = dspy.LM(
            "openai/primary",
            api_base=primary.base_url,
            api_key="k",
            engine="direct",
            fallbacks=[fallback],
            max_retry_wait_s=0.02,
            deadline_s=3,  # so that callers who stand in line are seen as errors
            **options,
        )
        self.stopped = threading.Event()
        self.errors: list[BaseException] = []

    def call_on(self) -> None:
        while not self.stopped.is_set():
            try:
                self.lm("hi")
            except Exception as error:  # noqa: BLE001 -- the test shows it
                self.errors.append(error)

    def wait_for(self, server: FakeServer, more: int) -> None:
        server.wait_for_requests(len(server.requests) + more, timeout_s=8)


@pytest.mark.parametrize("kind", ["503", "refused"])
@pytest.mark.parametrize("opens", [True, False], ids=["breaker opens", "breaker stays closed"])
def test_an_outage_of_the_primary_is_seen_by_no_caller(kind: str, opens: bool) -> None:
    """16 threads go on through an outage, the primary is left alone and found again (B 4.6).

    Also where the breaker does not open, as after many successes: then the gate of the endpoint
    must not hold up anybody who has a fallback.
    """
    is_down = threading.Event()

    def answer(body: object) -> Reply:
        return Reply(status=503) if is_down.is_set() else Reply(delay_s=0.002)

    breaker = CircuitBreaker(
        failure_ratio=0.05, min_calls=5 if opens else 10**6, cool_down_s=0.2, max_cool_down_s=0.4
    )
    with FakeServer(answer=answer) as primary, FakeServer(latency_s=0.002) as spare:
        outage = Outage(primary, spare, circuit_breaker=breaker)
        with ThreadPoolExecutor(16) as pool:
            for _ in range(16):
                pool.submit(outage.call_on)
            try:
                primary.wait_for_requests(50, timeout_s=10)
                assert outage.lm.health().state == "closed"
                if kind == "503":
                    is_down.set()
                else:
                    primary.close()
                outage.wait_for(spare, 300)  # nobody stands in line for the primary
                before = len(primary.requests)
                outage.wait_for(spare, 300)
                if kind == "503":
                    assert len(primary.requests) - before <= 40
                assert (outage.lm.health().times_opened > 0) is opens
                is_down.clear()
                primary.start()
                outage.wait_for(primary, 100)
            finally:
                outage.stopped.set()
    assert outage.errors == []
    assert len(spare.requests) >= 600


def test_health_tells_of_an_outage_before_in_and_after(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """Whoever watches a service sees which model is left alone, and since which error (B 4.6)."""
    breaker = CircuitBreaker(min_calls=3, cool_down_s=5)
    lm = chain_of(server, second, third, circuit_breaker=breaker, adaptive=False)
    with FakeClock() as clock:
        assert (lm.health().state, lm.health().failures) == ("closed", 0)
        server.script(*[Reply(status=503, text="no healthy upstream")] * 3)
        assert [lm("hi") for _ in range(6)] == [["second"]] * 6
        health = lm.health()
        assert (health.state, health.times_opened, health.failures) == ("open", 1, 3)
        assert health.last_error_class == "LMServerError"
        assert "no healthy upstream" in (health.last_error or "")
        assert health.next_probe_s == pytest.approx(5)
        clock.sleep(5)
        assert lm("hi") == ["first"]
        health = lm.health()
        assert (health.state, health.successes, health.next_probe_s) == ("closed", 1, None)
    assert counts(server, second, third) == [4, 6, 0]


def test_an_open_circuit_is_one_of_the_attempts(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """The answer says that the first model was passed over, and why (B 4.6)."""
    breaker = CircuitBreaker(min_calls=1)
    lm = chain_of(server, second, third, circuit_breaker=breaker)
    server.script(Reply(status=503))
    whole(lm)
    response = whole(lm)
    assert [(made.model, made.error) for made in response.attempts] == [
        ("openai/first", "circuit_open"),
        ("openai/second", None),
    ]
    assert counts(server, second, third) == [1, 2, 0]


def test_without_a_fallback_an_open_circuit_raises(server: FakeServer) -> None:
    """The caller is told at once, and when to come again; nothing is sent (B 4.6)."""
    lm = lm_of(server, "first", FIRST, circuit_breaker=CircuitBreaker(min_calls=2, cool_down_s=9))
    server.script(Reply(status=503), Reply(status=503))
    with FakeClock():
        for _ in range(2):
            with pytest.raises(LMServerError):
                lm("hi")
        with pytest.raises(CircuitOpenError) as caught:
            lm("hi")
    assert caught.value.retry_after_s == pytest.approx(9)
    assert len(server.requests) == 2


def test_a_breaker_is_shared_by_lms_of_one_model_and_told_apart_from_others(
    server: FakeServer,
) -> None:
    """What one request handler learnt of an endpoint, the next one's new LM knows (B 4.6)."""
    lms = [lm_of(server, name, FIRST, circuit_breaker=True) for name in ("a", "a", "b")]
    server.script(*[Reply(status=503)] * 5)
    for _ in range(5):
        with pytest.raises(LMServerError):
            lms[0]("hi")
    assert [lm.health().state for lm in lms] == ["open", "open", "closed"]


def test_health_without_a_breaker_says_how_to_get_one() -> None:
    """An LM that cannot know must not say that all is well."""
    with pytest.raises(LMConfigurationError, match="circuit_breaker=True"):
        dspy.LM("openai/m").health()


def test_a_refused_connection_from_the_start_falls_back(
    second: FakeServer, third: FakeServer
) -> None:
    """A service that starts during the outage works too (B 4.6)."""
    with FakeServer() as gone:
        base = gone.base_url
    lm = dspy.LM(
        "openai/gone",
        api_base=base,
        api_key="k",
        engine="direct",
        fallbacks=[lm_of(second, "second", SECOND)],
    )
    with FakeClock():
        response = whole(lm)
    assert response.answered_by == "openai/second"
    assert {made.error for made in response.attempts[:-1]} == {LMTransportError.default_code}


def test_a_rate_limit_that_is_too_long_to_wait_for_falls_back(
    server: FakeServer, second: FakeServer, third: FakeServer
) -> None:
    """With a spare model nobody waits an hour (B 4.6)."""
    server.script(Reply(status=429, headers={"retry-after": "3600"}))
    with FakeClock() as clock:
        assert chain_of(server, second, third, num_retries=3)("hi") == ["second"]
    assert clock.sleeps == []


def test_a_model_of_ones_own_may_be_a_fallback() -> None:
    """Anything with the contract of a language model will do."""

    class Canned:
        model = "own/canned"
        capabilities: frozenset[str] = frozenset()
        default_temperature = None

        async def plan(
            self, io: Io, messages: Any, params: Any, *, stream: bool = False
        ) -> LMResponse:
            return LMResponse(outputs=(LMOutput(text="canned"),))

    lm = FakeLM([LMRateLimitError("slow down")], fallbacks=[Canned()])
    assert lm("hi") == ["canned"]
