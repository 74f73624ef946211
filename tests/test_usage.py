"""The bill of every way to call agrees with the server's own log (B 4.10).

Not here: trackers as such, histories and traces (`test_tracking.py`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

import dspylite as dspy
from dspylite.testing import FakeServer, Reply
from tests.caching import QA, cache_in, lm_at, written

ITEMS = 16
QUICK = dspy.Retry(max_retries=3, base_s=0.001)


@pytest.fixture(autouse=True)
def cache() -> Iterator[dspy.Cache]:
    with cache_in(None) as mine:
        yield mine


# --- what the server does ------------------------------------------------------------------------


class Weather:
    """One way for a server to answer, and the settings of whoever calls it."""

    lm: ClassVar[Mapping[str, Any]] = {}
    settings: ClassVar[Mapping[str, Any]] = {}
    config: ClassVar[Mapping[str, Any]] = {}

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        return written("Paris")

    def is_first(self, body: Mapping[str, Any]) -> bool:
        prompt = str(body["messages"])
        is_new = prompt not in self._seen
        self._seen.add(prompt)
        return is_new

    def questions(self) -> list[str]:
        return [f"number {number} " + "word " * number for number in range(ITEMS)]


class Fine(Weather):
    """All is well."""


class Retried(Weather):
    """Each request fails the first time."""

    lm: ClassVar[Mapping[str, Any]] = {"middleware": [QUICK], "num_retries": 3}

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        return Reply(status=500) if self.is_first(body) else super().answer(body)


class Failing(Weather):
    """Some requests are refused, some fail."""

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        length = len(str(body["messages"]))
        return Reply(status=400 if length % 2 else 500) if length % 3 else super().answer(body)


class Fallback(Weather):
    """The first model is down."""

    lm: ClassVar[Mapping[str, Any]] = {"circuit_breaker": False}

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        return Reply(status=503) if body["model"] == "m" else super().answer(body)


class Repaired(Weather):
    """No answer has the form that was asked for, until the model is told so."""

    settings: ClassVar[Mapping[str, Any]] = {"parse_retries": 2}

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        return "no form" if len(body["messages"]) < 6 else super().answer(body)


class InJson(Weather):
    """The model writes JSON, whatever it is asked for."""

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        return '{"answer": "Paris"}'


class Several(Weather):
    """Three answers to each question."""

    config: ClassVar[Mapping[str, Any]] = {"n": 3}


class Cached(Weather):
    """Half of the questions were asked before."""

    def questions(self) -> list[str]:
        return super().questions()[: ITEMS // 2] * 2


class Shared(Weather):
    """All ask the same at once."""

    def questions(self) -> list[str]:
        return ["the same"] * ITEMS


class Stormy(Weather):
    """Cached, failing, retried, repaired and falling back, all in one."""

    lm: ClassVar[Mapping[str, Any]] = {
        "middleware": [QUICK],
        "num_retries": 3,
        "circuit_breaker": False,
    }
    settings: ClassVar[Mapping[str, Any]] = {"parse_retries": 1}

    def answer(self, body: Mapping[str, Any]) -> str | Reply:
        length = len(str(body["messages"]))
        if self.is_first(body) or (length % 5 == 0 and body["model"] == "m"):
            return Reply(status=503)
        return "no form" if length % 4 == 0 else super().answer(body)

    def questions(self) -> list[str]:
        return super().questions()[: ITEMS // 2] * 2


WEATHERS = [Fine, Retried, Failing, Fallback, Repaired, InJson, Several, Cached, Shared, Stormy]
weathers = pytest.mark.parametrize("weather", WEATHERS, ids=lambda kind: kind.__name__.lower())


class Bill:
    """What the server says that everything cost."""

    def __init__(self, server: FakeServer) -> None:
        server.wait_until_idle()
        self.answered = [each for each in server.requests if each.usage is not None]
        self.failed = len(server.requests) - len(self.answered)

    def tokens(self) -> list[int]:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return [sum(each.usage[name] for each in self.answered) for name in names]  # type: ignore[index, misc]

    def by_model(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for each in self.answered:
            name = f"openai/{each.json['model']}"
            found[name] = found.get(name, 0) + each.usage["total_tokens"]  # type: ignore[index, operator]
        return found


def tokens(usage: dspy.Usage) -> list[int]:
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


def summed(usages: Sequence[Mapping[str, Mapping[str, int]] | None]) -> list[int]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "calls")
    rows = [row for usage in usages if usage is not None for row in usage.values()]
    return [sum(row[name] for row in rows) for name in names]


@contextmanager
def billed(kind: type[Weather]) -> Iterator[tuple[Weather, Any]]:
    """Run a block in a weather; the tracker around it must agree with the server's log."""
    weather = kind()
    with FakeServer(answer=weather.answer) as server:
        given: dict[str, Any] = {"adaptive": False, "api_key": "none", **weather.lm}
        if "circuit_breaker" in given:
            given["fallbacks"] = [
                lm_at(server, "openai/other", **given | {"circuit_breaker": False})
            ]
        lm = lm_at(server, **given)
        with dspy.context(lm=lm, **weather.settings), dspy.track_usage() as tracker:
            yield weather, dspy.Predict(QA, **weather.config)
        bill, counts = Bill(server), tracker.counts.values()
        assert tokens(tracker.total) == bill.tokens()
        assert sum(count.answered for count in counts) == len(bill.answered) == tracker.total.calls
        assert sum(count.failed for count in counts) == bill.failed
        assert sum(count.cached for count in counts) == tracker.total.cached_calls
        assert {
            name: usage.total_tokens for name, usage in tracker.by_model.items() if usage.calls
        } == bill.by_model()
        assert bill.answered
        assert bool(bill.failed) == (kind in {Retried, Failing, Fallback, Stormy})
        weather.bill = bill  # type: ignore[attr-defined]


FAILURES = (dspy.LMError, dspy.AdapterParseError)


def asked(predict: Any, question: str) -> Any:
    try:
        return predict(question=question)
    except FAILURES:
        return None


async def aasked(predict: Any, question: str) -> Any:
    try:
        return await predict.acall(question=question)
    except FAILURES:
        return None


# --- the ways to call ----------------------------------------------------------------------------


def in_a_loop(predict: Any, questions: list[str]) -> list[Any]:
    return [asked(predict, question) for question in questions]


def in_parallel_of(width: int) -> Callable[[Any, list[str]], list[Any]]:
    def run(predict: Any, questions: list[str]) -> list[Any]:
        return dspy.Parallel(num_threads=width)([(asked, (predict, q)) for q in questions])

    run.__name__ = f"parallel_{width}"
    return run


def in_a_plain_pool(predict: Any, questions: list[str]) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(dspy.bind(lambda q: asked(predict, q)), questions))


def in_nested_batches(predict: Any, questions: list[str]) -> list[Any]:
    inner = dspy.Parallel(num_threads=4)

    def some(part: list[str]) -> list[Any]:
        return inner([(asked, (predict, question)) for question in part])

    parts = [questions[start : start + 4] for start in range(0, len(questions), 4)]
    return list(chain(*dspy.Parallel(num_threads=4)([(some, (part,)) for part in parts])))


WAYS = [
    in_a_loop,
    in_parallel_of(1),
    in_parallel_of(4),
    in_parallel_of(64),
    in_a_plain_pool,
    in_nested_batches,
]


@weathers
@pytest.mark.parametrize("run", WAYS, ids=lambda way: way.__name__)
def test_usage_over_threads_is_the_servers(
    run: Callable[[Any, list[str]], list[Any]], weather: type[Weather]
) -> None:
    """In sum, by model, by request and on the predictions (B 4.10)."""
    with billed(weather) as (here, predict):
        found = run(predict, here.questions())
    check_predictions(found, here)


async def as_tasks(predict: Any, questions: list[str]) -> list[Any]:
    found: list[Any] = []

    async def ask(question: str) -> None:
        found.append(await aasked(predict, question))

    async with anyio.create_task_group() as group:
        for question in questions:
            group.start_soon(ask, question)
    return found


async def by_asyncify(predict: Any, questions: list[str]) -> list[Any]:
    found: list[Any] = []
    ask_it = dspy.asyncify(asked)

    async def ask(question: str) -> None:
        found.append(await ask_it(predict, question))

    async with anyio.create_task_group() as group:
        for question in questions:
            group.start_soon(ask, question)
    return found


async def by_abatch(predict: Any, questions: list[str]) -> list[Any]:
    outcomes = await predict.abatch(
        [{"question": question} for question in questions], num_threads=8, on_error="return"
    )
    return [outcome.value if outcome.ok else None for outcome in outcomes]


@weathers
@pytest.mark.parametrize("run", [as_tasks, by_asyncify, by_abatch], ids=lambda way: way.__name__)
async def test_usage_over_tasks_is_the_servers(
    run: Callable[[Any, list[str]], Awaitable[list[Any]]], weather: type[Weather]
) -> None:
    """The same on asyncio and trio (B 4.10)."""
    with billed(weather) as (here, predict):
        found = await run(predict, here.questions())
    check_predictions(found, here)


def check_predictions(found: list[Any], here: Weather) -> None:
    """Predictions carry what they cost; what a failed call cost is on the tracker alone."""
    bill: Bill = here.bill  # type: ignore[attr-defined]
    assert len(found) == ITEMS
    if type(here) not in {Failing, Stormy}:
        assert None not in found
        usages = [each.get_lm_usage() for each in found]
        assert summed(usages) == [*bill.tokens(), len(bill.answered)]
        made = [attempt for each in found for attempt in each.get_lm_attempts()]
        assert sum(attempt.usage.total_tokens for attempt in made) == bill.tokens()[2]
        assert sum(attempt.error is not None for attempt in made) == bill.failed
    if type(here) is Shared:
        assert len(bill.answered) <= ITEMS


@weathers
@pytest.mark.parametrize("width", [1, 8])
def test_usage_of_items_adds_up_to_the_servers(weather: type[Weather], width: int) -> None:
    """Failed items too have a bill (B 4.10)."""
    with billed(weather) as (here, predict):
        outcomes = predict.batch(
            [{"question": question} for question in here.questions()],
            num_threads=width,
            on_error="return",
        )
    bill: Bill = here.bill  # type: ignore[attr-defined]
    total = sum((usage for each in outcomes for usage in each.usage.values()), dspy.Usage())
    assert (tokens(total), total.calls) == (bill.tokens(), len(bill.answered))
    assert total.calls + total.cached_calls >= sum(each.ok for each in outcomes)


@weathers
async def test_usage_of_streams_is_the_servers(weather: type[Weather]) -> None:
    """Counted when they end, and not when they are repeated from the cache (B 4.10)."""
    with billed(weather) as (here, _):
        lm = dspy.settings.lm
        for number, question in enumerate(here.questions()):
            try:
                if number % 2:
                    async with await lm.astream(question) as stream:
                        async for _ in stream:
                            pass
                else:
                    with lm.stream(question) as pieces:
                        for _ in pieces:
                            pass
            except dspy.LMError:
                pass


def test_a_stream_that_was_left_is_itemised(cache: dspy.Cache) -> None:
    """Nobody knows its tokens, and nobody counts it as answered."""
    with FakeServer() as server, dspy.track_usage() as tracker:
        with lm_at(server, api_key="none").stream("one two three") as stream:
            next(stream)
        counts = tracker.counts["openai/m"]
    assert (counts.unfinished, counts.answered, counts.failed) == (1, 0, 0)


async def test_a_request_that_was_cancelled_is_itemised(cache: dspy.Cache) -> None:
    """The server has it in its log, so that the sum of all counts is the number of requests."""
    with FakeServer() as server, dspy.track_usage() as tracker:
        lm = lm_at(server, api_key="none")
        with server.hold():
            async with anyio.create_task_group() as group:
                group.start_soon(lm.acall, "q")
                await anyio.to_thread.run_sync(server.wait_for_requests, 1)
                group.cancel_scope.cancel()
    counts = tracker.counts["openai/m"]
    assert (counts.unfinished, counts.answered, counts.failed) == (1, 0, 0)


def test_retries_fallbacks_and_failures_are_itemised() -> None:
    """Who pays can see why (B 4.10)."""
    with FakeServer() as server, FakeServer(answer=written("Paris")) as other:
        second = lm_at(other, "openai/other", api_key="none")
        lm = lm_at(
            server,
            api_key="none",
            middleware=[QUICK],
            fallbacks=[second],
            circuit_breaker=False,
            adaptive=False,
        )
        server.script(*[Reply(status=500)] * 8)
        with dspy.context(lm=lm), dspy.track_usage() as tracker:
            for _ in range(2):
                found = dspy.Predict(QA)(question="q")
    first, last = tracker.counts["openai/m"], tracker.counts["openai/other"]
    assert (first.failed, first.retried, first.answered) == (8, 6, 0)
    assert (last.answered, last.cached, last.fallbacks) == (1, 1, 2)
    assert [attempt.cached for attempt in found.get_lm_attempts()] == [False] * 4 + [True]


def test_a_fallback_of_a_fallback_is_one_answer_in_the_place_of_another() -> None:
    """However many models failed before it (B 4.10)."""
    with FakeServer() as server, dspy.track_usage() as tracker:
        server.script(Reply(status=500), Reply(status=500))
        third = lm_at(server, "openai/c", api_key="none")
        second = lm_at(server, "openai/b", api_key="none", num_retries=0, fallbacks=[third])
        lm_at(server, "openai/a", api_key="none", num_retries=0, fallbacks=[second])("q")
    found = {model: (each.answered, each.fallbacks) for model, each in tracker.counts.items()}
    assert found == {"openai/a": (0, 0), "openai/b": (0, 0), "openai/c": (1, 1)}


# --- money ---------------------------------------------------------------------------------------


def test_cost_is_what_each_lm_says_of_its_own_tokens() -> None:
    """Two tenants may pay two prices for one model; what is cached costs nothing (B 4.8)."""
    with FakeServer(answer="one two") as server, dspy.track_usage() as tracker:
        for price in ((1.0, 10.0), (2.0, 20.0)):
            lm = lm_at(server, api_key=f"sk-{price[0]}", price=price)
            for _ in range(3):
                lm("four words in it")
    assert len(server.requests) == 2
    assert tracker.cost_usd == pytest.approx((4 * 3.0 + 2 * 30.0) / 1e6)
    assert (tracker.total.calls, tracker.total.cached_calls) == (2, 4)


def test_an_unknown_price_makes_the_sum_unknown() -> None:
    """And never 0; but a call that cost nothing has no price to be known (B 4.8)."""
    with FakeServer() as server:
        known = lm_at(server, api_key="none", price=(1.0, 1.0))
        unknown = lm_at(server, "openai/no-such-model-anywhere", api_key="none")
        with dspy.track_usage() as tracker:
            known("q")
            cost = Bill(server).tokens()[2] / 1e6
            assert tracker.cost_usd == pytest.approx(cost)
            unknown("q")
            assert tracker.cost_usd is None
        with dspy.track_usage() as outer, dspy.track_usage() as inner:
            unknown("q")
        assert (outer.cost_usd, inner.cost_usd) == (0.0, 0.0)
    assert len(server.requests) == 2


def test_a_call_whose_tokens_nobody_counted_makes_the_sum_unknown() -> None:
    """It cost something; the history says None for it too (B 4.8)."""
    with FakeServer() as server:
        server.script(Reply(usage={}))
        lm = lm_at(server, api_key="none", price=(1.0, 1.0))
        with dspy.track_usage() as tracker:
            lm("q")
        assert (tracker.cost_usd, lm.history[-1].cost) == (None, None)
        server.script(Reply(usage={}))
        with dspy.track_usage() as tracker:
            lm_at(server, api_key="other", price=(0.0, 0.0))("q")
        assert tracker.cost_usd == 0.0


GUARDED = """
import socket, sys

real = socket.getaddrinfo
def guarded(host, *args, **kwargs):
    if host not in {"127.0.0.1", "localhost"}:
        print("LOOKED UP", host)
    return real(host, *args, **kwargs)
socket.getaddrinfo = guarded

import dspylite as dspy
from dspylite.testing import FakeServer

with FakeServer(answer="one two") as server:
    lm = dspy.LM("openai/gpt-4o-mini", api_base=server.base_url, api_key="none", cache=False)
    with dspy.track_usage() as tracker:
        lm("four words in it")
        assert "litellm" not in sys.modules
        print(tracker.cost_usd)
"""


def test_prices_come_from_a_table_that_is_never_fetched() -> None:
    """litellm's own, loaded when somebody asks for a cost (B 7.6)."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    (cost,) = done.stdout.split("\n")[:-1]
    # 0.15 and 0.60 dollars for a million.
    assert float(cost) == pytest.approx((4 * 0.15 + 2 * 0.6) / 1e6)
