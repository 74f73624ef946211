"""Calls answered from the cache, judged by the log of a real server.

Not here: equal calls at once (`test_cache_flights.py`), and what makes two calls equal
(`test_cache_keys.py`).
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pydantic import BaseModel, ConfigDict

import dspylite as dspy
from dspylite.models.cache import configure
from dspylite.models.cache.configure import configure_cache, current_cache, use_cache
from dspylite.models.cache.memory import MemoryCache
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeServer, Reply
from tests.caching import QA, cache_in, lm_at, written


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(answer=written("Paris")) as server:
        yield server


@pytest.fixture(autouse=True)
def key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dspy.Cache]:
    """Run a test with each level alone answering, as far as a test clears the memory."""
    with cache_in(tmp_path / "cache" if request.param == "disk" else None) as mine:
        yield mine


@pytest.fixture
def memory() -> Iterator[dspy.Cache]:
    with cache_in(None) as mine:
        yield mine


def forget_memory(cache: dspy.Cache) -> None:
    """Leave the answers to the disk, where there is one."""
    if cache.disk_cache is not None:
        assert cache.flush(10)
        cache.reset_memory_cache()


# --- the ways to ask -----------------------------------------------------------------------------


async def by_call(lm: dspy.LM) -> Any:
    return lm("Capital?")


async def by_acall(lm: dspy.LM) -> Any:
    return await lm.acall("Capital?")


async def by_stream(lm: dspy.LM) -> Any:
    with lm.stream("Capital?") as stream:
        return ["".join(piece.text for piece in stream)]


async def by_astream(lm: dspy.LM) -> Any:
    async with await lm.astream("Capital?") as stream:
        return ["".join([piece.text async for piece in stream])]


async def by_messages(lm: dspy.LM) -> Any:
    return lm(messages=[{"content": "Capital?", "role": "user"}])


Ask = Callable[[dspy.LM], Awaitable[Any]]
WAYS = [by_call, by_acall, by_stream, by_astream, by_messages]
ways = pytest.mark.parametrize("ask", WAYS, ids=lambda way: way.__name__)


@ways
async def test_a_second_call_makes_no_request_however_either_is_made(
    ask: Ask, cache: dspy.Cache, server: FakeServer
) -> None:
    """Sync, awaited and streamed calls share one key and one answer (B 5.3)."""
    lm = lm_at(server)
    first = await ask(lm)
    for again in WAYS:
        forget_memory(cache)
        assert await again(lm_at(server)) == first == [written("Paris")]
    assert len(server.requests) == 1
    hits = cache.stats().disk_hits if cache.disk_cache else cache.stats().memory_hits
    assert (hits, cache.stats().misses, len(cache.flights)) == (len(WAYS), 1, 0)


async def test_a_predictor_is_answered_from_the_cache_in_both_forms(
    cache: dspy.Cache, server: FakeServer
) -> None:
    """A program run twice costs once, and says so on each prediction."""
    predict = dspy.Predict(QA)
    with dspy.context(lm=lm_at(server)):
        paid = await predict.acall(question="Capital?")
        forget_memory(cache)
        found = [predict(question="Capital?"), await predict.acall(question="Capital?")]
    assert [each.answer for each in found] == [paid.answer] * 2 == ["Paris"] * 2
    assert paid.get_lm_usage()["openai/m"]["calls"] == 1
    for each in found:
        usage = each.get_lm_usage()["openai/m"]
        assert (usage["calls"], usage["total_tokens"], usage["cached_calls"]) == (0, 0, 1)
        assert [(made.model, made.cached) for made in each.get_lm_attempts()] == [
            ("openai/m", True)
        ]
    assert len(server.requests) == 1


def test_both_engines_share_the_answers(
    memory: dspy.Cache, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who carries a request says nothing of its answer."""
    for engine in ("direct", "litellm", "direct"):
        assert lm_at(server, engine=engine)("Capital?") == [written("Paris")]
    assert len(server.requests) == 1


# --- what is not reused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda lm: lm.copy(cache=False)("q"),
        lambda lm: lm("q", cache=False),
        lambda lm: dspy.Predict(QA, cache=False)(question="q", lm=lm),
        lambda lm: dspy.Predict(QA)(question="q", lm=lm, config={"cache": False}),
    ],
    ids=["lm", "call", "predict", "config"],
)
def test_cache_false_asks_each_time_and_keeps_nothing(
    ask: Callable[[dspy.LM], Any], memory: dspy.Cache, server: FakeServer
) -> None:
    """Per LM, per predictor and per call."""
    lm = lm_at(server)
    for _ in range(3):
        ask(lm)
    assert (len(server.requests), memory.stats().memory_entries) == (3, 0)
    assert all("cache" not in request.json for request in server.requests)


def test_copies_of_an_lm_keep_or_change_whether_it_is_cached(
    memory: dspy.Cache, server: FakeServer
) -> None:
    """A copy is its original but for what was named; None per call names nothing."""
    uncached = lm_at(server, cache=False)
    assert [lm.cache for lm in (uncached, uncached.copy(), uncached.copy(temperature=1))] == [
        False
    ] * 3
    cached = uncached.copy(cache=True)
    for lm in (cached, cached.copy(), pickle.loads(pickle.dumps(cached)), copy.deepcopy(cached)):
        assert lm("q", cache=None) == [written("Paris")]
    assert len(server.requests) == 1
    for lm in (pickle.loads(pickle.dumps(uncached)), copy.deepcopy(uncached)):
        lm("q")
    assert len(server.requests) == 3


def test_rollout_ids_are_requests_of_their_own_and_are_never_sent(
    memory: dspy.Cache, server: FakeServer
) -> None:
    """Ten samples of one question are ten requests, once."""
    lm, predict = lm_at(server), dspy.Predict(QA)
    for _ in range(2):
        for number in (None, 1, 2, "2", 0):
            lm("q", rollout_id=number)
            predict(question="q", lm=lm, config={"rollout_id": number})
            lm.copy(rollout_id=number)("q")
    assert len(server.requests) == 10
    assert all("rollout_id" not in request.json for request in server.requests)


def test_an_lm_that_is_not_cacheable_is_never_answered_from_the_cache(memory: dspy.Cache) -> None:
    """Nobody but its author knows what a model of one's own depends on; `cache_kind` says so."""
    calls: list[str] = []

    class Mine(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            calls.append(messages[-1]["content"])
            return {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}

    class Cacheable(Mine):
        @property
        def cache_kind(self) -> str:
            return "tests.Cacheable/1"

    for lm, expected in ((Mine("my/lm"), 2), (Cacheable("my/lm"), 1)):
        calls.clear()
        assert [lm("q"), lm("q")] == [["hello"]] * 2
        assert len(calls) == expected
    for _ in range(2):
        dspy.OfflineLM()("Paris is a city. What is a city?")
    assert memory.stats().memory_entries == 1


# --- tenants and endpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("api_key", "sk-one", "sk-two"),
        ("api_key", lambda: "sk-one", lambda: "sk-two"),
        ("extra_headers", {"x-tenant": "1"}, {"x-tenant": "2"}),
        ("extra_headers", {"authorization": "Bearer 1"}, {"authorization": "Bearer 2"}),
    ],
    ids=["text", "function", "header", "authorization"],
)
def test_tenants_never_share_an_answer(
    name: str, first: Any, second: Any, cache: dspy.Cache, server: FakeServer
) -> None:
    """A key or header that was given keeps its answers to itself (B 5.3)."""
    for given in (first, second, None):
        lm = lm_at(server, **({name: given} if given else {}))
        for _ in range(2):
            lm("q")
            forget_memory(cache)
    assert len(server.requests) == 3
    one = lm_at(server, **{name: first})
    assert (one("q"), len(server.requests)) == ([written("Paris")], 3)


def test_a_key_given_as_text_and_by_a_function_is_the_same_tenant(
    memory: dspy.Cache, server: FakeServer
) -> None:
    """It is the key that tells tenants apart, not how it is told."""
    lm_at(server, api_key="sk-one")("q")
    lm_at(server, api_key=lambda: "sk-one")("q")
    lm_at(server)("q", api_key="sk-one")
    assert len(server.requests) == 1


def test_keys_of_the_environment_share_the_answers(
    cache: dspy.Cache, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotating a key keeps the cache (B 5.3)."""
    for number in range(3):
        monkeypatch.setenv("OPENAI_API_KEY", f"sk-{number}")
        lm_at(server)("q")
        forget_memory(cache)
    assert [request.api_key for request in server.requests] == ["sk-0"]


def test_a_namespace_takes_the_place_of_the_key(memory: dspy.Cache, server: FakeServer) -> None:
    """Tenants that may share say so; those with one key can be kept apart (B 5.3)."""
    for namespace in ("a", "b", None):
        for key in ("sk-one", "sk-two"):
            with dspy.context(cache_namespace=namespace):
                lm_at(server, api_key=key)("q")
    assert [request.api_key for request in server.requests] == [
        "sk-one",
        "sk-one",
        "sk-one",
        "sk-two",
    ]


def test_each_endpoint_has_its_own_answers(
    memory: dspy.Cache, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A staging server must not answer for production, wherever its name comes from."""
    with FakeServer(answer="staging") as staging:
        assert lm_at(server)("q") == [written("Paris")]
        assert lm_at(staging)("q") == ["staging"]
        for there in (server, staging):
            monkeypatch.setenv("OPENAI_API_BASE", there.base_url + "/")
            from_environment = dspy.LM("openai/m", num_retries=0)
            assert from_environment("q") == lm_at(there)("q")
        assert (len(server.requests), len(staging.requests)) == (1, 1)


SEEN: ContextVar[str] = ContextVar("seen", default="sk-nobody")


def test_an_answer_is_kept_for_whoever_asked_and_not_for_whoever_reads_it(
    tmp_path: Path, server: FakeServer
) -> None:
    """A stream may be read after its tenant's block; the first one makes the salt (B 5.3)."""
    for name in ("namespace", "key"):
        with cache_in(tmp_path / name):
            lm = lm_at(server, api_key=SEEN.get)
            if name == "namespace":
                with dspy.context(cache_namespace="a"):
                    stream = lm.stream("q")
            else:
                token = SEEN.set("sk-a")
                stream = lm.stream("q")
                SEEN.reset(token)
            with stream:
                list(stream)
            server.clear()
            lm("q")
            assert len(server.requests) == 1
            with dspy.context(cache_namespace="a" if name == "namespace" else None):
                token = SEEN.set("sk-a")
                lm("q")
                SEEN.reset(token)
            assert len(server.requests) == 1


# --- only accepted answers are kept --------------------------------------------------------------


class Age(BaseModel):
    model_config = ConfigDict(extra="forbid")
    years: int


class Person(dspy.Signature):
    name: str = dspy.InputField()
    age: Age = dspy.OutputField()


BAD = {
    "no form": Reply(text="Well, let me think."),
    "cut": Reply(text="[[ ## age ## ]]\n{", finish_reason="length"),
    "pydantic": Reply(text=written('{"years": "many"}', "age")),
    "empty field": Reply(text=written("", "age")),
}


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
def test_an_answer_that_cannot_be_read_is_not_kept(
    reply: Reply, cache: dspy.Cache, server: FakeServer
) -> None:
    """The next one who asks gets another chance (B 4.9)."""
    lm, predict = lm_at(server), dspy.Predict(Person)
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    server.script(reply, Reply(text=written('{"years": 7}', "age")))
    with dspy.context(lm=lm, adapter=adapter):
        with pytest.raises(dspy.AdapterParseError):
            predict(name="Ann")
        assert cache.stats().memory_entries == 0
        assert predict(name="Ann").age == Age(years=7)
        forget_memory(cache)
        assert predict(name="Ann").age == Age(years=7)
    assert (len(server.requests), len(cache.flights)) == (2, 0)


def test_one_unreadable_answer_of_three_keeps_none(memory: dspy.Cache, server: FakeServer) -> None:
    """They are one answer of the provider; half of it would be read as all (B 4.9)."""
    server.script(Reply(texts=[written("a"), "no form", written("c")]))
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm_at(server), adapter=adapter), pytest.raises(dspy.AdapterParseError):
        dspy.Predict(QA, n=3)(question="q")
    assert (memory.stats().memory_entries, len(memory.flights)) == (0, 0)


def test_a_kept_answer_that_its_reader_refuses_is_asked_anew(
    cache: dspy.Cache, server: FakeServer
) -> None:
    """A plain call accepts anything; a predictor that gets its answer must not be stuck (B 4.9)."""
    lm, adapter = lm_at(server), dspy.ChatAdapter(use_json_adapter_fallback=False)
    predict = dspy.Predict(QA)
    prompt = adapter.format(predict.signature, [], {"question": "q"})
    server.script(Reply(text="no form at all"))
    assert lm(messages=prompt) == ["no form at all"]
    forget_memory(cache)
    with dspy.context(lm=lm, adapter=adapter):
        with pytest.raises(dspy.AdapterParseError):
            predict(question="q")
        assert len(server.requests) == 1
        forget_memory(cache)
        assert predict(question="q").answer == "Paris"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500),
        Reply(status=400),
        Reply(drop="body"),
        Reply(body="<html>"),
        Reply(status=503, body="no healthy upstream"),
    ],
    ids=["500", "400", "reset", "html", "503"],
)
def test_errors_are_not_kept(reply: Reply, memory: dspy.Cache, server: FakeServer) -> None:
    """A failure is of its moment."""
    lm = lm_at(server, adaptive=False)
    server.script(reply)
    with pytest.raises(dspy.LMError):
        lm("q")
    assert (memory.stats().memory_entries, len(memory.flights)) == (0, 0)
    assert (lm("q"), lm("q"), len(server.requests)) == (*[[written("Paris")]] * 2, 2)


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_stream_is_kept_only_when_it_came_to_its_proper_end(
    awaited: bool, memory: dspy.Cache, server: FakeServer
) -> None:
    """A cut one, and one that was left, are parts of an answer (B 4.14)."""
    lm = lm_at(server)

    async def read(most: int) -> None:
        if awaited:
            async with await lm.astream("q") as stream:
                left = most
                async for _ in stream:
                    left -= 1
                    if not left:
                        break
        else:
            with lm.stream("q") as pieces:
                for _, _ in zip(range(most), pieces, strict=False):
                    pass

    server.script(Reply(cut_after=2))
    with pytest.raises(dspy.LMError):
        await read(99)
    await read(1)
    assert (memory.stats().memory_entries, len(server.requests)) == (0, 2)
    await read(99)
    assert (memory.stats().memory_entries, lm("q")) == (1, [written("Paris")])
    assert len(server.requests) == 3


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_stream_that_is_read_on_after_it_was_closed_is_not_kept(
    awaited: bool, memory: dspy.Cache, server: FakeServer
) -> None:
    """Reading ends there, the answer does not: its first piece would be the answer for ever."""
    lm = lm_at(server)
    server.script(Reply(chunks=["Par", "is"]))
    if awaited:
        async with await lm.astream("q") as stream:
            first = (await anext(stream)).text
        async for _ in stream:
            pass  # what had arrived already
    else:
        with lm.stream("q") as pieces:
            first = next(pieces).text
        list(pieces)
    assert (first, memory.stats().memory_entries) == ("Par", 0)
    assert lm("q") == [written("Paris")]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(text=""),
        Reply(text="", finish_reason="length"),
        Reply(text="Here is", finish_reason="content_filter"),
    ],
    ids=["empty", "cut-in-thought", "filtered"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_says_nothing_is_not_kept(
    reply: Reply, streamed: bool, memory: dspy.Cache, server: FakeServer
) -> None:
    """A model that refused once, or thought until its limit, would be asked never again."""
    lm = lm_at(server)
    server.script(reply)
    if streamed:
        with lm.stream("q") as stream:
            list(stream)
    else:
        assert lm("q") == [reply.text]
    assert (memory.stats().memory_entries, len(memory.flights)) == (0, 0)
    assert (lm("q"), lm("q"), len(server.requests)) == (*[[written("Paris")]] * 2, 2)


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_request_that_changes_under_way_is_not_kept(
    awaited: bool, memory: dspy.Cache, server: FakeServer
) -> None:
    """Its answer may be that to another one; a chat goes on while a retry waits."""
    chat: Any = [{"role": "user", "content": "q"}]

    class GoesOn:
        place = "retry"

        async def handle(self, request: LMRequest, call_next: Any, io: Any) -> LMResponse:
            if len(chat) == 1:
                chat.append({"role": "user", "content": "No, r!"})
            answer: LMResponse = await call_next(request)
            return answer

    lm = lm_at(server, middleware=[GoesOn()])
    server.script(Reply(text="of r"))
    ask = lm.acall(messages=chat) if awaited else None
    assert (lm(messages=chat) if ask is None else await ask) == ["of r"]
    assert (memory.stats().memory_entries, len(memory.flights)) == (0, 0)
    del chat[1:]
    assert lm_at(server)("q") == [written("Paris")]


def test_a_tenant_that_changes_under_way_is_told_nothing_of_the_one_before(
    cache: dspy.Cache, server: FakeServer
) -> None:
    """The first answer of a directory gets its key when it is kept."""
    tenant = ["sk-a"]
    lm = lm_at(server, api_key=lambda: tenant[0])
    server.script(Reply(text="for a"))
    with ThreadPoolExecutor(1) as pool, server.hold():
        first = pool.submit(lm, "q")
        server.wait_for_requests(1)
        tenant[0] = "sk-b"
    assert first.result() == ["for a"]
    assert lm("q") == [written("Paris")]


# --- fallbacks -----------------------------------------------------------------------------------


@ways
async def test_a_fallbacks_answer_is_kept_under_its_own_name_only(
    ask: Ask, cache: dspy.Cache, server: FakeServer
) -> None:
    """The first model is asked again when it is back, and its answer is then its own (B 4.6)."""
    with FakeServer(answer="from the other") as other:
        lm = lm_at(
            server,
            fallbacks=[lm_at(other, "openai/other")],
            circuit_breaker=False,
            adaptive=False,
        )
        for _ in range(2):
            server.script(Reply(status=500))
            assert await ask(lm) == ["from the other"]
            forget_memory(cache)
        assert (len(server.requests), len(other.requests)) == (2, 1)
        assert len(cache.flights) == 0
        for _ in range(2):
            assert await ask(lm) == [written("Paris")]
        assert (len(server.requests), len(other.requests)) == (3, 1)


# --- a hit costs nothing -------------------------------------------------------------------------


def test_a_hit_takes_no_place_rate_or_budget(memory: dspy.Cache, server: FakeServer) -> None:
    """The limits protect the endpoint, which is not asked."""
    lm = lm_at(server, rpm=1, tpm=10_000, max_concurrency=1, max_queue=0)
    with dspy.budget(tokens=1):
        lm("q")  # the first is let through, and spends all
        for _ in range(20):
            assert lm("q", deadline_s=5) == [written("Paris")]
        with pytest.raises(dspy.BudgetExceededError):
            lm("another")
    other = lm_at(server, max_concurrency=1, max_queue=0)
    with dspy.ThreadPoolExecutor(1) as pool, server.hold():
        busy = pool.submit(other, "held")
        server.wait_for_requests(2)
        with pytest.raises(dspy.OverloadedError):
            other("refused")
        assert other("q") == [written("Paris")]
    assert busy.result(20) == [written("Paris")]


def test_a_hit_passes_an_open_circuit(memory: dspy.Cache, server: FakeServer) -> None:
    """What is known is said, also while the endpoint is down (B 4.6)."""
    breaker = dspy.CircuitBreaker(min_calls=1, failure_ratio=0.1)
    lm = lm_at(server, circuit_breaker=breaker)
    lm("q")
    server.script(Reply(status=500))
    with pytest.raises(dspy.LMServerError):
        lm("another")
    with pytest.raises(dspy.CircuitOpenError):
        lm("another")
    assert (lm("q"), len(server.requests)) == ([written("Paris")], 2)


# --- readers keep to themselves ------------------------------------------------------------------


def test_what_a_reader_changes_is_never_seen_by_the_next(
    cache: dspy.Cache, server: FakeServer
) -> None:
    """Readers own their answer, deep down; so does a callback that hears of it first."""

    class Vandal(dspy.BaseCallback):
        def on_lm_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            outputs[0]["tool_calls"][0]["function"]["arguments"] = "heard"
            outputs[0]["tool_calls"].clear()

    server.script(Reply(tool_calls=[{"name": "add", "arguments": {"a": 1}}]))
    lm = lm_at(server)
    with dspy.context(callbacks=[Vandal()]):
        lm("q")
    for _ in range(3):
        (answer,) = lm("q")
        (call,) = answer["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        call["function"]["arguments"] = "changed"
        call["function"]["name"] = "changed"
        answer["tool_calls"].clear()
        entry = lm.history[-1]
        entry["usage"].clear()
        forget_memory(cache)
    assert len(server.requests) == 1


def test_memory_gives_immutable_answers_without_a_copy(memory: dspy.Cache) -> None:
    """A hit of a long answer costs what a short one costs."""
    plain = LMResponse(outputs=(LMOutput(text="x" * 1000, finish_reason="stop"),))
    memory.put({"q": 1}, plain)
    assert memory.get({"q": 1}) is memory.get({"q": 1}) is plain
    memory.put({"q": 2}, {"a": []})
    memory.get({"q": 2})["a"].append(1)
    assert memory.get({"q": 2}) == {"a": []}


# --- the cache as an object ----------------------------------------------------------------------


def test_dspys_names_work_on_the_cache(tmp_path: Path, server: FakeServer) -> None:
    """Programs written for DSPy look into `dspy.cache`."""
    with cache_in(tmp_path / "cache"):
        cache = dspy.cache
        assert cache.disk_cache_dir == str(tmp_path / "cache")
        assert isinstance(cache.memory_cache, MemoryCache)
        request = {"model": "m", "messages": [{"role": "user", "content": "q"}], "id": 1}
        assert cache.get(request) is None
        cache.put(request, {"a": 1}, ignored_args_for_cache_key=["id"])
        assert cache.get(request) is None
        assert cache.get({**request, "id": 2}, ["id"]) == {"a": 1}
        cache.put(request, [1], enable_memory_cache=False)
        assert (len(cache.memory_cache), cache.get(request)) == (1, [1])
        lm_at(server)("q")
        assert (len(cache.memory_cache), len(list(cache.memory_cache))) == (3, 3)
        cache.reset_memory_cache()
        assert (len(cache.memory_cache), cache.get(request)) == (0, [1])


def test_the_cache_can_be_replaced_by_assignment(
    memory: dspy.Cache, tmp_path: Path, server: FakeServer
) -> None:
    """At any time; the LMs made before use the new one."""
    lm = lm_at(server)
    lm("q")
    before, mine = dspy.cache, dspy.Cache(disk_cache_dir=tmp_path)
    dspy.cache = mine
    assert dspy.cache is current_cache() is mine
    lm("q")
    dspy.cache = before
    lm("q")
    assert len(server.requests) == 2
    for wrong in (None, "off", dict, {}, dspy.Cache):
        with pytest.raises(dspy.SettingsError, match="must be a `dspylite"):
            dspy.cache = wrong  # type: ignore[assignment]
    assert dspy.cache is before


def test_the_cache_can_be_patched_for_a_block(memory: dspy.Cache) -> None:
    """As tests do it; deleting what was assigned puts back what was there."""
    mine = dspy.Cache(enable_disk_cache=False)
    with mock.patch.object(dspy, "cache", mine):
        assert current_cache() is mine
    assert current_cache() is memory


def test_configure_cache_takes_all_of_dspys_parameters(
    memory: dspy.Cache, tmp_path: Path, server: FakeServer
) -> None:
    """By name and by position."""
    configure_cache(
        enable_disk_cache=True,
        enable_memory_cache=False,
        disk_cache_dir=str(tmp_path),
        disk_size_limit_bytes=10_000_000,
        memory_max_entries=10,
        restrict_pickle=True,
        safe_types=[int],
    )
    assert dspy.cache.disk_cache_dir == str(tmp_path)
    lm = lm_at(server)
    lm("q")
    assert dspy.cache.flush(10)
    lm("q")
    assert (len(server.requests), len(dspy.cache.memory_cache)) == (1, 0)
    configure_cache(False, True, None, None, 1)
    for prompt in ("one", "two", "one"):
        lm(prompt)
    assert len(server.requests) == 4
    configure_cache(False, False)
    lm("one")
    lm("one")
    assert len(server.requests) == 6
    configure_cache(True, True, tmp_path, None, 10, False, None)
    lm("q")
    assert len(server.requests) == 6
    for wrong in ({"memory_max_entries": 0}, {"disk_size_limit_bytes": -1}):
        with pytest.raises(dspy.SettingsError, match="must be a positive number"):
            configure_cache(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "levels"),
    [("on", (True, True)), ("MEMORY", (False, True)), ("off", (False, False)), ("", (True, True))],
)
def test_the_environment_says_which_levels_there_are(
    said: str,
    levels: tuple[bool, bool],
    memory: dspy.Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`DSPYLITE_CACHE=off|memory`, and where (B 5.1)."""
    monkeypatch.setenv("DSPYLITE_CACHE", said)
    monkeypatch.setenv("DSPYLITE_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setattr(configure._current, "cache", None)
    found = dspy.cache
    assert (found.disk_cache is not None, found.enable_memory_cache) == levels
    assert found.disk_cache_dir in {None, str(tmp_path / "here")}
    assert not (tmp_path / "here").exists()
    monkeypatch.setenv("DSPYLITE_CACHE", "memroy")
    monkeypatch.setattr(configure._current, "cache", None)
    with pytest.raises(dspy.SettingsError, match="memory"):
        dspy.cache  # noqa: B018
    use_cache(memory)


def test_a_subclass_may_make_other_requests_equal(server: FakeServer) -> None:
    """As DSPy's documentation shows it."""

    class ByLastWord(dspy.Cache):
        def cache_key(self, request: Any, ignored_args_for_cache_key: Any = None) -> str:
            return str(request["messages"][-1]["content"].split()[-1])

    with cache_in(None, ByLastWord):
        lm = lm_at(server)
        assert lm("one thing") == lm("another thing")
        lm("one more")
    assert len(server.requests) == 2


async def test_a_call_whose_request_has_no_key_still_works(
    memory: dspy.Cache, server: FakeServer
) -> None:
    """A policy may see functions among the parameters; they are nothing to keep an answer by."""

    class Take:
        async def handle(self, request: LMRequest, call_next: Any, io: Any) -> LMResponse:
            assert callable(request.params["judge"])
            params = {k: v for k, v in request.params.items() if k != "judge"}
            from dataclasses import replace

            return await call_next(replace(request, params=params))  # type: ignore[no-any-return]

        place = "attempt"

    lm = lm_at(server, middleware=[Take()], judge=lambda text: True)
    for _ in range(2):
        assert lm("q") == await lm.acall("q") == [written("Paris")]
    assert (len(server.requests), len(memory.memory_cache), len(memory.flights)) == (4, 0, 0)
    for wrong in ({"f": len}, {"c": {1, 2}}):
        assert memory.get(wrong) is None
        with pytest.raises(TypeError):
            memory.put(wrong, 1)
    cyclic: dict[str, Any] = {}
    cyclic["me"] = cyclic
    assert memory.get(cyclic) is None
