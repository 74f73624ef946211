"""OpenTelemetry: every call a span under its caller's, wherever it runs; metrics (B 4.15).

Not here: parents as callbacks hear of them (`test_calls.py`).
"""

import contextvars
import dataclasses
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import anyio
import pydantic
import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import dspylite
from dspylite import (
    LM,
    ChainOfThought,
    LMResponse,
    Module,
    OfflineLM,
    Parallel,
    Predict,
    Retry,
    asyncify,
    bind,
    settings,
    with_callbacks,
)
from dspylite.errors import SettingsError
from dspylite.integrations.genai import request_attributes, server_of, written, written_input
from dspylite.integrations.opentelemetry import OpenTelemetryCallback, instrument
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from dspylite.runtime.calls import Observed
from dspylite.schema.messages import LMOutput, Usage
from dspylite.testing import FakeLM, FakeServer, Reply

KEY = "sk-never-in-a-span"
ANSWER = "[[ ## reasoning ## ]]\nr\n\n[[ ## answer ## ]]\na\n\n[[ ## completed ## ]]"


class Traced:
    """A tracer and a meter in memory, and the callback that feeds them."""

    def __init__(self, **options: Any) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.callback = OpenTelemetryCallback(self.provider, self.meters, **options)
        self.tracer = self.provider.get_tracer("user")

    @property
    def spans(self) -> list[ReadableSpan]:
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (found,) = self.named(name)
        return found

    def parent_of(self, span: ReadableSpan) -> ReadableSpan | None:
        if span.parent is None:
            return None
        (found,) = [each for each in self.spans if each.context.span_id == span.parent.span_id]
        assert found.context.trace_id == span.context.trace_id
        return found

    def path(self, span: ReadableSpan) -> str:
        above = self.parent_of(span)
        return span.name if above is None else f"{self.path(above)} > {span.name}"

    def paths(self) -> list[str]:
        return sorted(self.path(span) for span in self.spans)

    def points(self, name: str) -> list[Any]:
        data: Any = self.reader.get_metrics_data()
        if data is None:
            return []
        found = [
            metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return [point for metric in found for point in metric.data.data_points]

    def tokens(self) -> dict[str, int]:
        points = self.points("gen_ai.client.token.usage")
        sums: dict[str, int] = {}
        for point in points:
            kind = point.attributes["gen_ai.token.type"]
            sums[kind] = sums.get(kind, 0) + point.sum
        return sums

    def check_whole(self) -> None:
        """No span is open, and each has the very parent that its call has."""
        assert self.callback._open == {}
        by_call = {attributes_of(span).get("dspylite.call_id"): span for span in self.spans}
        for span in self.spans:
            above = attributes_of(span).get("dspylite.parent_call_id")
            if above is not None:
                assert self.caller_of(span) is by_call[above]

    def caller_of(self, span: ReadableSpan) -> ReadableSpan | None:
        """Find the nearest span above that is a call's and not the user's own."""
        above = self.parent_of(span)
        while above is not None and "dspylite.call_id" not in attributes_of(above):
            above = self.parent_of(above)
        return above


@pytest.fixture
def traced() -> Iterator[Traced]:
    found = Traced()
    with dspylite.context(callbacks=[found.callback]):
        yield found
    found.check_whole()
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is logged: no failing callback, no context that could not be detached."""
    yield
    noise = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [
        r.getMessage() for r in noise if "opentelemetry" in r.name or "listeners" in r.name
    ] == []


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(answer=ANSWER) as found:
        yield found


def lm_of(server: FakeServer, **options: Any) -> LM:
    return LM("openai/m", api_base=server.base_url, api_key=KEY, **{"num_retries": 0, **options})


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


class Step(Module):
    def __init__(self) -> None:
        super().__init__()
        self.think = ChainOfThought("question -> answer")

    def forward(self, question: str) -> Any:
        return self.think(question=question)


class Program(Module):
    """Two steps and a predictor, each with its call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Step(), Step()
        self.last = Predict("question -> reasoning, answer")

    def forward(self, question: str) -> Any:
        self.first(question=question)
        self.second(question=question)
        return self.last(question=question)


class AsyncProgram(Program):
    async def aforward(self, question: str) -> Any:
        await self.first.acall(question=question)
        await self.second.acall(question=question)
        return await self.last.acall(question=question)


STEP = [
    "Step",
    "Step > ChainOfThought",
    "Step > ChainOfThought > Predict",
    "Step > ChainOfThought > Predict > chat m",
]
PATHS = ["P", "P > Predict", "P > Predict > chat m", *sorted([f"P > {path}" for path in STEP] * 2)]


def below_a_request(count: int) -> list[str]:
    """List the spans of as many programs, all called in one span of the user's."""
    own = [path.replace("P", "request > Program", 1) for path in PATHS]
    return ["request", *sorted(own * count)]


def check_programs(traced: Traced, count: int, *, has_index: bool = True) -> None:
    """Each of the items is one whole trace; nothing of one hangs on another."""
    traced.check_whole()
    roots = [span for span in traced.spans if span.parent is None]
    assert len(roots) == count
    assert len({span.context.trace_id for span in roots}) == count
    for root in roots:
        own = [s for s in traced.spans if s.context.trace_id == root.context.trace_id]
        found = sorted(traced.path(span).replace(root.name, "P", 1) for span in own)
        assert found == PATHS
        indexes = {attributes_of(span).get("dspylite.item_index") for span in own}
        assert len(indexes) == 1
    found_indexes = [attributes_of(root).get("dspylite.item_index") for root in roots]
    expected = list(range(count)) if has_index else [None] * count
    assert sorted(found_indexes, key=str) == sorted(expected, key=str)


# --- every span under its parent, wherever the work is done --------------------------------------


def test_items_of_a_batch_on_threads_are_whole_traces(traced: Traced, server: FakeServer) -> None:
    """Eight threads interleave, and their spans do not (B 1.6)."""
    with dspylite.context(lm=lm_of(server)):
        Program().batch([{"question": str(n)} for n in range(24)], num_threads=8)
    check_programs(traced, 24)


def test_items_of_parallel_are_whole_traces(traced: Traced, server: FakeServer) -> None:
    """The other form of a batch (B 1.6)."""
    program = Program()
    with dspylite.context(lm=lm_of(server)):
        Parallel(num_threads=8)([(program, {"question": str(n)}) for n in range(16)])
    check_programs(traced, 16)


@pytest.mark.parametrize("program", [Program, AsyncProgram])
async def test_items_of_a_batch_of_tasks_are_whole_traces(
    program: type[Program], traced: Traced, server: FakeServer
) -> None:
    """Tasks interleave on one thread, and sync programs run on worker threads (B 1.6)."""
    with dspylite.context(lm=lm_of(server)):
        await program().abatch([{"question": str(n)} for n in range(16)], num_threads=8)
    check_programs(traced, 16)


def test_calls_in_a_plain_pool_hang_below_the_users_span(
    traced: Traced, server: FakeServer
) -> None:
    """`bind` carries OpenTelemetry's context too (B 1.6)."""
    program = Program()
    with (
        dspylite.context(lm=lm_of(server)),
        ThreadPoolExecutor(8) as pool,
        traced.tracer.start_as_current_span("request"),
    ):
        list(pool.map(bind(lambda n: program(question=str(n))), range(8)))
    assert traced.paths() == below_a_request(8)


async def test_calls_through_asyncify_hang_below_the_users_span(
    traced: Traced, server: FakeServer
) -> None:
    """As from an async handler of a web service (B 1.6)."""
    ask = asyncify(Program())
    with dspylite.context(lm=lm_of(server)), traced.tracer.start_as_current_span("request"):
        async with anyio.create_task_group() as group:
            for n in range(4):
                group.start_soon(lambda n=n: ask(question=str(n)))
    assert traced.paths() == below_a_request(4)


def test_batch_inside_a_program_hangs_below_it(traced: Traced, server: FakeServer) -> None:
    """Items are worked on by other threads than the program that has them (B 1.6)."""

    class Many(Module):
        def forward(self) -> Any:
            return Step().batch([{"question": str(n)} for n in range(6)], num_threads=3)

    with dspylite.context(lm=lm_of(server)):
        Many()()
    assert traced.paths() == sorted(["Many", *[f"Many > {path}" for path in STEP] * 6])


def test_users_spans_nest_below_and_above_ours(traced: Traced) -> None:
    """Functions called in `forward` may have spans of their own."""

    class Own(Module):
        def __init__(self) -> None:
            super().__init__()
            self.predict = Predict("question -> answer")

        def forward(self) -> Any:
            with traced.tracer.start_as_current_span("mine"):
                self.predict(question="q")

    class Model(dspylite.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            with traced.tracer.start_as_current_span("http"):
                return {"choices": [{"message": {"content": ANSWER.partition("r\n\n")[2]}}]}

    with dspylite.context(lm=Model("own/m")), traced.tracer.start_as_current_span("request"):
        Own()()
    assert max(traced.paths(), key=len) == "request > Own > mine > Predict > chat m > http"


def test_parent_is_found_by_its_id_where_the_context_was_lost(traced: Traced) -> None:
    """Frames travel where a framework resets OpenTelemetry's own context."""
    from opentelemetry.context import Context, attach

    class Lost(Module):
        def forward(self) -> Any:
            before = trace.get_current_span()
            attach(Context())
            Predict("question -> answer")(question="q")
            attach(trace.set_span_in_context(before))

    def run() -> None:
        with dspylite.context(lm=FakeLM(default={"answer": "a"})):
            Lost()()

    thread = threading.Thread(target=bind(run))
    thread.start()
    thread.join(10)
    assert traced.path(traced.one("chat lm")) == "Lost > Predict > chat lm"


# --- retries, fallbacks, failures, cancellation --------------------------------------------------


def test_retried_call_is_one_span_with_its_failed_attempts(
    traced: Traced, server: FakeServer
) -> None:
    """Each attempt is not a call of the program, but one sees why it took so long."""
    server.script(Reply(status=503), Reply(status=503))
    lm = lm_of(server, middleware=[Retry(max_retries=3, base_s=0.001)])
    lm("hi")
    span = traced.one("chat m")
    assert attributes_of(span)["dspylite.attempts"] == 3
    events = [dict(event.attributes or {}) for event in span.events]
    assert [event["http.response.status_code"] for event in events] == [503, 503]
    assert span.status.status_code is StatusCode.UNSET


def test_fallback_hangs_below_the_model_it_stands_in_for(
    traced: Traced, server: FakeServer
) -> None:
    """And its tokens are counted once."""
    server.script(Reply(status=500))
    spare = LM("openai/spare", api_base=server.base_url, api_key=KEY)
    lm_of(server, fallbacks=[spare])("one two")
    assert traced.paths() == ["chat m", "chat m > chat spare"]
    first, second = map(attributes_of, traced.spans)
    assert "gen_ai.usage.input_tokens" not in first
    assert first["dspylite.answered_by"] == "openai/spare"
    usage = server.requests[-1].usage
    assert usage is not None
    assert second["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] == 2
    assert traced.tokens() == {
        "input": usage["prompt_tokens"],
        "output": usage["completion_tokens"],
    }


def test_streamed_fallback_is_counted_once_too(traced: Traced, server: FakeServer) -> None:
    """Its end comes later, and is told twice as well."""
    server.script(Reply(status=500), Reply(chunks=["a ", "b"]))
    spare = LM("openai/spare", api_base=server.base_url, api_key=KEY)
    with lm_of(server, fallbacks=[spare]).stream("one two") as stream:
        list(stream)
    assert traced.paths() == ["chat m", "chat m > chat spare"]
    assert traced.tokens() == {"input": 2, "output": stream.response.usage.completion_tokens}


@pytest.mark.parametrize("awaited", [False, True])
async def test_failure_is_on_every_span_that_it_passed(
    awaited: bool, traced: Traced, server: FakeServer
) -> None:
    """With its class, and without its words, which may be the prompt's."""
    server.script(Reply(status=400, body=b'{"error": {"message": "the secret prompt"}}'))
    with dspylite.context(lm=lm_of(server)), pytest.raises(dspylite.LMInvalidRequestError):
        await (AsyncProgram().acall(question="q") if awaited else asyncify(Program())(question="q"))
    assert len(traced.spans) == 5
    for span in traced.spans:
        assert span.status.status_code is StatusCode.ERROR
        assert attributes_of(span)["error.type"] == "LMInvalidRequestError"
        assert attributes_of(span)["http.response.status_code"] == 400
        assert "secret" not in span.to_json()
    (point,) = traced.points("gen_ai.client.operation.duration")
    assert point.attributes["error.type"] == "LMInvalidRequestError"


async def test_cancelled_calls_end_their_spans(traced: Traced) -> None:
    """None stays open (B 3.2, 4.15)."""
    lm, asked = FakeLM(), ChainOfThought("question -> answer")
    with dspylite.context(lm=lm), lm.hold():
        async with anyio.create_task_group() as group:
            for n in range(4):
                group.start_soon(lambda n=n: asked.acall(question=str(n)))
            await anyio.to_thread.run_sync(lm.wait_for_calls, 4)
            group.cancel_scope.cancel()
    assert len(traced.spans) == 4 * 3
    expected = anyio.get_cancelled_exc_class().__name__
    for span in traced.spans:
        assert str(attributes_of(span)["error.type"]).endswith(expected)
    traced.check_whole()


def test_interrupted_call_ends_its_span(traced: Traced) -> None:
    """Ctrl-C too (B 4.15)."""
    with pytest.raises(KeyboardInterrupt), dspylite.context(lm=FakeLM([KeyboardInterrupt()])):
        Program()(question="q")
    assert {attributes_of(s)["error.type"] for s in traced.spans} == {"KeyboardInterrupt"}


# --- streams -------------------------------------------------------------------------------------


def test_stream_is_a_span_until_its_end_and_no_parent_of_what_comes_meanwhile(
    traced: Traced, server: FakeServer
) -> None:
    """What a program does between two pieces is not the model's doing."""
    server.script(Reply(chunks=["a ", "b"]))
    request = traced.tracer.start_as_current_span("request")
    with request, lm_of(server).stream("one two") as stream:
        next(stream)
        with traced.tracer.start_as_current_span("between"):
            pass
        assert traced.named("chat m") == []
        list(stream)
    assert traced.paths() == ["request", "request > between", "request > chat m"]
    found = attributes_of(traced.one("chat m"))
    assert found["gen_ai.request.stream"] is True
    assert found["gen_ai.usage.input_tokens"] == 2


def test_stream_read_by_another_thread_ends_its_span(traced: Traced, server: FakeServer) -> None:
    """There the context is another one, and nothing is detached."""
    server.script(Reply(chunks=["a ", "b"]))
    stream = lm_of(server).stream("hi")
    thread = threading.Thread(target=lambda: list(stream))
    thread.start()
    thread.join(10)
    assert traced.one("chat m").status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("way", ["left", "broken", "refused"])
def test_stream_that_does_not_end_well_ends_its_span(
    way: str, traced: Traced, server: FakeServer
) -> None:
    """Left by its reader, cut by the server, or never begun."""
    reply = {
        "left": Reply(chunks=["a "] * 5_000, chunk_delay_s=0.005),
        "broken": Reply(chunks=["a ", "b"], cut_after=1),
        "refused": Reply(status=400),
    }[way]
    server.script(reply)
    try:
        with lm_of(server).stream("hi") as stream:
            next(stream)
            if way == "broken":
                list(stream)
    except dspylite.LMError:
        assert way != "left"
    status = traced.one("chat m").status.status_code
    assert status is (StatusCode.UNSET if way == "left" else StatusCode.ERROR)


async def test_cancelled_stream_ends_its_span(traced: Traced, server: FakeServer) -> None:
    """A client that goes away cancels the handler that reads it."""
    server.script(Reply(chunks=["a "] * 5_000, chunk_delay_s=0.005))
    with anyio.CancelScope() as scope:
        async with await lm_of(server).astream("hi") as stream:
            async for _ in stream:
                scope.cancel()
    assert "ancelled" in attributes_of(traced.one("chat m"))["error.type"]


def test_generator_closed_in_another_context_leaves_no_trace(traced: Traced) -> None:
    """A web server closes streams where it likes; no context is left behind nor complained of."""

    class Search:
        pass

    def steps() -> Iterator[int]:
        with Observed("module", Search(), {}):
            yield 1

    found = steps()
    contextvars.copy_context().run(next, found)
    contextvars.copy_context().run(found.close)
    assert attributes_of(traced.one("Search"))["error.type"] == "GeneratorExit"


# --- what spans say ------------------------------------------------------------------------------


def test_span_of_a_call_says_what_the_conventions_ask_for(
    traced: Traced, server: FakeServer
) -> None:
    """Backends compute costs and latencies from these names."""
    lm = lm_of(server, temperature=0.5, max_tokens=50)
    lm("one two", stop=["x"], n=2, top_p=0.9)
    span = traced.one("chat m")
    usage = server.requests[0].usage
    assert usage is not None
    found = attributes_of(span)
    assert found.pop("dspylite.call_id")
    assert found.pop("gen_ai.response.id")
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.stop_sequences": ("x",),
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "server.address": "127.0.0.1",
        "server.port": int(server.base_url.rpartition(":")[2].partition("/")[0]),
        "dspylite.cached": False,
        "dspylite.attempts": 1,
        "dspylite.answered_by": "openai/m",
    }
    assert span.kind is SpanKind.CLIENT


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        ("gpt-4o-mini", "openai", "gpt-4o-mini"),
        ("azure/mine", "azure.ai.openai", "mine"),
        ("bedrock/anthropic.claude", "aws.bedrock", "anthropic.claude"),
        ("openrouter/openai/gpt-4o", "openrouter", "openai/gpt-4o"),
        ("mine", "fakelm", "mine"),
    ],
)
def test_provider_is_spelled_as_the_conventions_have_it(
    model: str, provider: str, name: str, traced: Traced
) -> None:
    """Backends know the prices of providers by these names."""
    FakeLM(model=model)("hi")
    found = attributes_of(traced.one(f"chat {name}"))
    assert (found["gen_ai.provider.name"], found["gen_ai.request.model"]) == (provider, name)


@pytest.mark.parametrize(
    ("params", "environment", "expected"),
    [
        ({}, {}, ("api.openai.com", 443)),
        ({}, {"OPENAI_BASE_URL": "http://localhost:8000/v1"}, ("localhost", 8000)),
        ({"api_base": "http://user:pass@host/v1"}, {}, ("host", 80)),
        ({"base_url": "https://[::1]:99/v1"}, {}, ("::1", 99)),
        ({"api_base": "nonsense"}, {}, (None, None)),
        ({"api_base": "http://host:port/"}, {}, (None, None)),
    ],
)
def test_server_is_the_endpoint_without_what_is_secret_in_it(
    params: dict[str, Any],
    environment: dict[str, str],
    expected: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the direct engine would choose it."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = server_of(LM("openai/m"), params)
    assert (found.get("server.address"), found.get("server.port")) == expected


@pytest.mark.parametrize(
    ("asked", "kind"), [({"type": "text"}, "text"), ({"type": "json_object"}, "json")]
)
def test_kind_of_output_is_the_one_asked_for(asked: Any, kind: str) -> None:
    """`{"type": "text"}` is the servers' own default, spelled out."""
    assert request_attributes({"response_format": asked})["gen_ai.output.type"] == kind


def test_span_tells_of_reasoning_and_of_what_the_provider_had_cached(traced: Traced) -> None:
    """They have prices of their own."""
    usage = Usage(
        prompt_tokens=9,
        completion_tokens=8,
        details={"cached_tokens": 4, "reasoning_tokens": 6},
    )
    output = LMOutput(text="a", reasoning="because")
    lm = FakeLM([LMResponse(outputs=(output,), usage=usage)], model_type="text")
    lm("hi", stop="x", response_format={"type": "json_object"})
    found = attributes_of(traced.one("text_completion lm"))
    assert found["gen_ai.usage.cache_read.input_tokens"] == 4
    assert found["gen_ai.usage.reasoning.output_tokens"] == 6
    assert found["gen_ai.request.stop_sequences"] == ("x",)
    assert found["gen_ai.output.type"] == "json"


def test_span_of_an_evaluation_is_named_by_its_class(traced: Traced) -> None:
    """Its calls hang below it."""

    class Measured:
        kind = "evaluate"

        @with_callbacks
        def __call__(self) -> float:
            Search()("planets")
            return 0.5

    Measured()()
    assert traced.paths() == ["Measured", "Measured > execute_tool web_search"]


def test_span_of_a_predictor_says_its_signature(traced: Traced) -> None:
    """The names of its fields are no content."""
    with dspylite.context(lm=FakeLM(default={"answer": "a"})):
        Predict("question -> answer")(question="q")
    span = traced.one("Predict")
    assert attributes_of(span)["dspylite.signature"] == "question -> answer"
    assert span.kind is SpanKind.INTERNAL


class Search:
    """A tool of a user's own."""

    kind = "tool"
    name = "web_search"

    @with_callbacks
    def __call__(self, query: str, api_key: str = "") -> str:
        return f"found {query}"

    @with_callbacks
    async def refresh(self) -> None: ...


def test_span_of_a_tool_is_named_by_the_tool(traced: Traced) -> None:
    """As the conventions have it."""
    Search()("planets")
    found = attributes_of(traced.one("execute_tool web_search"))
    assert found["gen_ai.operation.name"] == "execute_tool"
    assert found["gen_ai.tool.name"] == "web_search"


async def test_span_of_a_users_method_is_named_by_it(traced: Traced) -> None:
    """A class may have several."""

    class Steps:
        @with_callbacks
        async def plan_trip(self) -> None: ...

    await Steps().plan_trip()
    assert traced.one("Steps.plan_trip").status.status_code is StatusCode.UNSET


def test_adapters_get_spans_where_asked_for(server: FakeServer) -> None:
    """They cost little, and would be half of all spans."""
    traced = Traced(adapters=True)
    with dspylite.context(callbacks=[traced.callback], lm=lm_of(server)):
        Predict("question -> reasoning, answer")(question="q")
    assert [span.name for span in traced.spans] == [
        "Predict",
        "ChatAdapter.format",
        "chat m",
        "ChatAdapter.parse",
    ]
    traced.check_whole()


# --- content and secrets -------------------------------------------------------------------------


def everything_said(traced: Traced) -> str:
    return "".join(span.to_json() for span in traced.spans)


def test_no_content_is_in_spans_unless_asked_for(traced: Traced, server: FakeServer) -> None:
    """Prompts are the business of those who wrote them."""
    with dspylite.context(lm=lm_of(server)):
        Program()(question="whose birthday is it?")
    Search()("a private query")
    said = everything_said(traced)
    assert "birthday" not in said
    assert "private" not in said
    assert "[[ ##" not in said


@pytest.mark.parametrize("value", ["true", "TRUE", "span_only"])
def test_content_is_in_spans_where_the_environment_asks_for_it(
    value: str, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable that other instrumentations read; the argument wins over it."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", value)
    assert OpenTelemetryCallback(capture_content=False).capture_content is False
    traced = Traced()
    with dspylite.context(callbacks=[traced.callback], lm=lm_of(server)):
        Predict("question -> reasoning, answer")(question="whose birthday?")
    found = attributes_of(traced.one("chat m"))
    system, user = json.loads(found["gen_ai.input.messages"])
    assert (system["role"], user["role"]) == ("system", "user")
    assert "whose birthday?" in user["parts"][0]["content"]
    assert json.loads(found["gen_ai.output.messages"]) == [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": ANSWER}],
            "finish_reason": "stop",
        }
    ]
    module = attributes_of(traced.one("Predict"))
    assert json.loads(module["dspylite.inputs"]) == {"question": "whose birthday?"}
    assert json.loads(module["dspylite.outputs"]) == {"reasoning": "r", "answer": "a"}


def test_content_is_cut_to_its_bound() -> None:
    """A prompt of a megabyte does not choke the exporter; the latest messages are kept."""
    traced = Traced(capture_content=True, max_content_chars=100)
    lm = FakeLM(["y" * 1_000], callbacks=[traced.callback])
    messages = [{"role": "user", "content": f"{n} " + "x" * 60} for n in range(50)]
    lm(messages=messages)
    found = attributes_of(traced.one("chat lm"))
    kept = json.loads(found["gen_ai.input.messages"])
    assert [message["parts"][0]["content"][:3] for message in kept] == ["48 ", "49 "]
    assert len(found["gen_ai.input.messages"]) < 300
    assert len(found["gen_ai.output.messages"]) < 300


def test_pieces_of_messages_are_written_as_the_conventions_have_them() -> None:
    """Pictures are named and not copied; lone surrogates do not stop the exporter."""
    traced = Traced(capture_content=True)
    lm = FakeLM(["y"], callbacks=[traced.callback])
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    lm(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "see"}, picture]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "found"},
        ]
    )
    found = json.loads(attributes_of(traced.one("chat lm"))["gen_ai.input.messages"])
    assert [message["parts"] for message in found] == [
        [{"type": "text", "content": "see"}, {"type": "image_url"}],
        [{"type": "tool_call", "id": "c1", "name": "f", "arguments": "{}"}],
        [{"type": "tool_call_response", "id": "c1", "response": "found"}],
    ]


def test_lone_surrogates_and_reasoning_are_written() -> None:
    """No exporter could send the one; the other is part of the answer."""
    traced = Traced(capture_content=True)
    asked = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    output = LMOutput(text="", reasoning="why", tool_calls=(asked,), finish_reason="tool_calls")
    lm = FakeLM([LMResponse(outputs=(output,))], callbacks=[traced.callback])
    lm("hi")
    (written,) = json.loads(attributes_of(traced.one("chat lm"))["gen_ai.output.messages"])
    assert written["finish_reason"] == "tool_calls"
    assert [part["type"] for part in written["parts"]] == ["reasoning", "tool_call"]
    with dspylite.context(callbacks=[traced.callback]):
        Search()("a \ud800 b")
    found = attributes_of(traced.one("execute_tool web_search"))
    assert json.loads(found["gen_ai.tool.call.arguments"])["query"] == "a ? b"
    assert json.loads(found["gen_ai.tool.call.result"]) == "found a ? b"


def test_value_that_cannot_be_written_costs_no_span() -> None:
    """Inputs are whatever the user passes."""

    class Shy:
        def __str__(self) -> str:
            raise RuntimeError("no")

    class Takes(Module):
        def forward(self, shy: Any) -> Any:
            return [1] * 1_000_000

    traced = Traced(capture_content=True)
    with dspylite.context(callbacks=[traced.callback]):
        Takes()(shy=Shy())
    found = attributes_of(traced.one("Takes"))
    assert found["dspylite.inputs"] == "<not written: RuntimeError>"
    assert json.loads(found["dspylite.outputs"]) == [1] * 200


def test_keys_and_headers_are_in_no_span(server: FakeServer) -> None:
    """Not even where content is wanted."""
    traced = Traced(capture_content=True)
    server.script(Reply(status=401))
    headers = {"X-Secret": KEY}
    with dspylite.context(callbacks=[traced.callback], lm=lm_of(server, extra_headers=headers)):
        with pytest.raises(dspylite.LMAuthError):
            Program()(question="q")
        Predict("question -> reasoning, answer")(question="q", config={"api_key": KEY})
        Search()("q", api_key=KEY)
    assert len(traced.spans) == 5 + 2 + 1
    assert KEY not in everything_said(traced)


@dataclasses.dataclass
class Login:
    """An input of a user's own class."""

    user: str
    api_key: str


class Account(pydantic.BaseModel):
    user: str
    password: str


class Given(Module):
    def forward(self, **_: Any) -> None: ...


def test_secrets_are_left_out_of_objects_and_of_deep_places() -> None:
    """Their texts would tell them, as would that of what is too deep to be written (B 7.4)."""
    traced = Traced(capture_content=True)
    deep: Any = {"token": "hidden"}
    for _ in range(8):
        deep = {"a": deep}
    with dspylite.context(callbacks=[traced.callback]):
        Given()(
            own=[Login("me", "hidden"), Account(user="me", password="hidden")],
            deep=deep,
            headers_of_mine={"Authorization": "hidden", "x-api-key": "hidden", "apiKey": "hidden"},
        )
    found = attributes_of(traced.one("Given"))["dspylite.inputs"]
    assert "hidden" not in found
    assert json.loads(found)["own"] == [{"user": "me"}, {"user": "me"}]


def test_value_that_holds_itself_is_written_in_no_time() -> None:
    """A graph of objects has more ways through it than anybody could write."""
    loop: list[Any] = []
    loop.extend([loop] * 200)
    assert len(written(loop, 1_000)) <= 1_001


def test_content_of_messages_is_cut_in_whatever_form_it_is() -> None:
    """Tools answer in parts too, and some models give arguments as a dict."""
    arguments = {"text": "b" * 50_000}
    picture = {"type": "image_url", "image_url": {"url": "data:" + "i" * 50_000}}
    messages = [
        {"role": "user", "content": [picture] * 5_000},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": [{"type": "text", "text": "short"}, picture]},
    ]
    found = written_input({"messages": messages}, 1_000)
    assert len(found) < 2_000
    answered = json.loads(found)[-1]["parts"][0]["response"]
    assert answered == [{"type": "text", "content": "short"}, {"type": "image_url"}]
    assert "b" * 500 in found
    few = [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"a": [1, None]}}}]}]
    (part,) = json.loads(written_input({"messages": few}, 1_000))[0]["parts"]
    assert part["arguments"] == {"a": [1, None]}


# --- metrics -------------------------------------------------------------------------------------


def test_tokens_and_seconds_are_counted_as_the_server_counts(
    traced: Traced, server: FakeServer
) -> None:
    """From eight threads (B 4.10)."""
    with dspylite.context(lm=lm_of(server)):
        Program().batch([{"question": str(n)} for n in range(8)], num_threads=8)
    usages = [request.usage for request in server.requests]
    assert traced.tokens() == {
        "input": sum(usage["prompt_tokens"] for usage in usages if usage),
        "output": sum(usage["completion_tokens"] for usage in usages if usage),
    }
    (seconds,) = traced.points("gen_ai.client.operation.duration")
    assert seconds.count == len(usages) == 24
    assert seconds.explicit_bounds[:3] == (0.01, 0.02, 0.04)
    assert seconds.explicit_bounds[-1] == 81.92
    (tokens, _) = traced.points("gen_ai.client.token.usage")
    assert tokens.explicit_bounds == tuple(4**n for n in range(14))
    assert tokens.attributes == {
        **seconds.attributes,
        "gen_ai.token.type": tokens.attributes["gen_ai.token.type"],
    }
    assert set(seconds.attributes) == {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.response.model",
        "server.address",
        "server.port",
    }


def test_cached_answer_is_marked_and_costs_no_tokens(traced: Traced) -> None:
    """Nobody pays for it twice."""
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5, cached_calls=1)
    cached = LMResponse(outputs=(LMOutput(text="a"),), usage=usage, cached=True)
    FakeLM([cached])("hi")
    found = attributes_of(traced.one("chat lm"))
    assert found["dspylite.cached"] is True
    assert "gen_ai.usage.input_tokens" not in found
    assert traced.tokens() == {}


def test_second_equal_call_is_marked_as_cached(traced: Traced, server: FakeServer) -> None:
    """With the cache itself: one request, its tokens and seconds once."""
    use_cache(Cache(enable_disk_cache=False))
    lm = lm_of(server)
    assert lm("one two") == lm("one two")
    assert [attributes_of(span)["dspylite.cached"] for span in traced.spans] == [False, True]
    (request,) = server.requests
    assert request.usage is not None
    assert traced.tokens()["input"] == request.usage["prompt_tokens"]
    assert [point.count for point in traced.points("gen_ai.client.operation.duration")] == [1]


# --- bounds, harm, setting up --------------------------------------------------------------------


def test_calls_that_never_end_are_let_go_at_the_bound() -> None:
    """A hung thread must not keep spans for ever."""
    traced = Traced(max_open_calls=3)
    for number in range(10):
        traced.callback.on_module_start(str(number), Program(), {})
    assert list(traced.callback._open) == ["7", "8", "9"]
    ended = [attributes_of(span)["dspylite.abandoned"] for span in traced.spans]
    assert ended == [True] * 7
    for number in reversed(range(10)):
        traced.callback.on_module_end(str(number), None)
    assert len(traced.spans) == 10
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize("name", ["max_content_chars", "max_open_calls"])
def test_bound_that_cannot_be_is_refused_when_the_callback_is_made(name: str) -> None:
    """Not at the first call."""
    with pytest.raises(SettingsError, match=name):
        OpenTelemetryCallback(**{name: 0})


def test_tracer_that_fails_harms_no_call(caplog: pytest.LogCaptureFixture) -> None:
    """An outage of tracing is none of the program (B 4.15)."""

    class Broken(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            class Nothing:
                def start_span(self, *args: Any, **kwargs: Any) -> Any:
                    raise OSError("no disk")

            return Nothing()

    callback = OpenTelemetryCallback(Broken(shutdown_on_exit=False))
    with dspylite.context(callbacks=[callback], lm=FakeLM(default={"answer": "a"})):
        assert Predict("question -> answer")(question="q").answer == "a"
    assert len(caplog.records) == 2
    caplog.clear()


def test_instrument_adds_to_the_callbacks_and_undo_takes_it_away() -> None:
    """Other callbacks stay as they are."""
    other = object()
    before: Any = settings.snapshot().values
    dspylite.configure(callbacks=[other])
    try:
        tracing = instrument()
        assert settings.callbacks == (other, tracing.callback)
        again = instrument(capture_content=True)
        assert settings.callbacks == (other, again.callback)
        again.undo()
        assert settings.callbacks == (other,)
        with instrument() as third:
            assert settings.callbacks == (other, third.callback)
        assert settings.callbacks == (other,)
    finally:
        dspylite.configure(callbacks=before["callbacks"])


def test_missing_library_is_named_with_what_to_install() -> None:
    """Whoever imports it without the extra is told."""
    hidden = "import sys; sys.modules['opentelemetry'] = None"
    code = f"{hidden}; import dspylite.integrations.opentelemetry"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert "pip install dspylite[otel]" in done.stderr


# --- other processes -----------------------------------------------------------------------------


def trace_here(snapshot: Any) -> list[dict[str, Any]]:
    """Run a program in a worker process with its own exporter, and tell its spans."""
    traced = Traced()
    # In the place of the one that came along, whose spans go to the process's own exporter.
    snapshot = replace(snapshot, values={**snapshot.values, "callbacks": (traced.callback,)})
    with settings.restore(snapshot), traced.tracer.start_as_current_span("mine"):
        Predict("question -> answer")(question="q")
    left = trace.get_current_span().get_span_context()
    return [
        {
            "name": span.name,
            "trace": span.context.trace_id,
            "parent": span.parent and span.parent.span_id,
            "call": attributes_of(span).get("dspylite.parent_call_id"),
            "pid": os.getpid(),
            "left": left.trace_id if left.is_valid else None,
        }
        for span in traced.spans
    ]


class Sender(Module):
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        super().__init__()
        self.send = lambda: pool.submit(trace_here, settings.snapshot()).result(40)

    def forward(self) -> Any:
        return self.send()


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_work_in_another_process_continues_the_trace(method: str) -> None:
    """One trace, whose second half another process exports (B 1.6)."""
    traced = Traced()
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool,
        dspylite.context(callbacks=[traced.callback], lm=OfflineLM()),
    ):
        found = [Sender(pool)() for _ in range(2)]
        alone = pool.submit(trace_here, settings.snapshot()).result(40)
    for rows, root in zip(found, traced.named("Sender"), strict=True):
        assert [row["name"] for row in rows] == ["mine", "Predict", "chat extractive"]
        assert {row["trace"] for row in rows} == {root.context.trace_id}
        assert rows[0]["parent"] == root.context.span_id
        assert rows[1]["call"] == attributes_of(root)["dspylite.call_id"]
        assert rows[0]["pid"] != os.getpid()
    # Sent from no call: not even a forked worker believes itself in the one that it was forked in.
    assert (alone[0]["parent"], alone[1]["call"]) == (None, None)
    if method != "fork":
        assert (found[0][0]["left"], alone[0]["left"]) == (None, None)


def test_callback_travels_without_its_providers() -> None:
    """Snapshots are pickled with the callbacks in them."""
    callback = Traced(capture_content=True, max_content_chars=5, adapters=True).callback
    twin = pickle.loads(pickle.dumps(callback))
    assert (twin.capture_content, twin.max_content_chars, twin.adapters) == (True, 5, True)


def test_restored_snapshot_of_no_trace_leaves_what_is_current(traced: Traced) -> None:
    """Another callback may take something along, and the worker has a request of its own."""

    class Other(dspylite.BaseCallback):
        def carry(self) -> dict[str, str]:
            return {"request": "1"}

    with dspylite.context(callbacks=[traced.callback, Other()], lm=FakeLM(["x"])):
        snapshot = dspylite.settings.snapshot()
    token = attach(baggage.set_baggage("tenant", "a"))
    with traced.tracer.start_as_current_span("request"), dspylite.settings.restore(snapshot):
        assert dspylite.settings.lm is not None
        dspylite.settings.lm("hi")
        assert baggage.get_baggage("tenant") == "a"
    detach(token)
    assert traced.paths() == ["request", "request > chat lm"]


def test_two_callbacks_keep_their_traces_apart() -> None:
    """Where spans go to two places, each place must have the parents of its spans."""
    both = [Traced(), Traced()]
    callbacks = [each.callback for each in both]
    with dspylite.context(callbacks=callbacks, lm=FakeLM(default={"answer": "a"})):
        Predict("question -> answer")(question="q")
    for each in both:
        assert each.paths() == ["Predict", "Predict > chat lm"]
        each.check_whole()
    assert not trace.get_current_span().get_span_context().is_valid


def test_snapshot_of_no_trace_takes_nothing_along(traced: Traced) -> None:
    """Then a worker's own trace stays what it is."""
    assert settings.snapshot().carried == {}
