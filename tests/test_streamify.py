"""Streamed programs: what comes out, when, in which context, and what leaving them stops.

Not here: how outputs are found in an answer (`test_stream_readers.py`), and streams over HTTP
(`test_streamify_service.py`).
"""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from dspylite import (
    LM,
    Adapter,
    BaseCallback,
    Cache,
    ChainOfThought,
    ChatAdapter,
    JSONAdapter,
    LMDelta,
    Module,
    OfflineLM,
    Parallel,
    Predict,
    Prediction,
    StatusMessage,
    StatusMessageProvider,
    StreamListener,
    StreamResponse,
    Tool,
    context,
    settings,
    streamify,
    streaming,
    track_usage,
)
from dspylite.errors import (
    AdapterParseError,
    CallCancelledError,
    DSPyError,
    InputFieldError,
    LMServerError,
    ModuleError,
    SettingsError,
    SignatureError,
    TruncatedError,
)
from dspylite.runtime.cancellation import Cancellation
from dspylite.testing import FakeLM, FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
PIECES = ["[[ ## ans", "wer ## ]]\nPar", "is", "\n\n[[ ## comp", "leted ## ]]"]
ENDLESS = Reply(chunks=["[[ ## answer ## ]]\n", *["a "] * 5_000], chunk_delay_s=0.005)
"""An answer that ends only when its reader leaves, as far as a test can wait."""
ANSWER = [StreamListener("answer")]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


# Loops of a test end with its connections open; else a warning in whatever test comes next.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """End a test only when the threads of its streams have ended."""
    yield
    for thread in threading.enumerate():
        if thread.name == "dspylite-stream":
            thread.join(10)
            assert not thread.is_alive()
    gc.collect()


@pytest.fixture
def server(running: FakeServer) -> Iterator[FakeServer]:
    running.clear()
    yield running
    running.wait_until_idle()
    assert running.pending_replies == 0


def lm_of(server: FakeServer, **options: Any) -> LM:
    return LM("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0, **options)


def answer(text: str, *names: str) -> str:
    sections = [f"[[ ## {name} ## ]]\n{text}" for name in names or ("answer",)]
    return "\n\n".join([*sections, "[[ ## completed ## ]]"])


class Sync(Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        found: Prediction = self.ask(question=question)
        return found


class Async(Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = Predict("question -> answer")

    async def aforward(self, question: str) -> Prediction:
        found: Prediction = await self.ask.acall(question=question)
        return found


PREDICT = Predict("question -> answer")


def function(question: str) -> Prediction:
    found: Prediction = PREDICT(question=question)
    return found


async def async_function(question: str) -> Prediction:
    found: Prediction = await PREDICT.acall(question=question)
    return found


OF_PREDICT = [StreamListener("answer", predict=PREDICT)]
PROGRAMS: list[tuple[Any, list[StreamListener], str]] = [
    (PREDICT, ANSWER, "self"),
    (Sync(), ANSWER, "ask"),
    (Async(), ANSWER, "ask"),
    (function, OF_PREDICT, "Predict"),
    (async_function, OF_PREDICT, "Predict"),
]
WAYS = ["sync", "asyncio", "trio", "sync in a loop"]


def events(way: str, program: Any, *, lm: Any = None, **options: Any) -> list[Any]:
    """Stream a program in one of the ways, called inside of a context and read outside of it."""
    inputs = options.pop("inputs", {"question": "?"})
    changes = {"lm": lm, **options.pop("changes", {})}
    is_sync = way.startswith("sync")
    streamed = streamify(program, async_streaming=not is_sync, **options)

    def opened() -> Any:
        with context(**changes):
            return streamed(**inputs)

    async def read() -> list[Any]:
        return list(opened()) if is_sync else [event async for event in opened()]

    if way == "sync":
        return list(opened())
    return anyio.run(read, backend="trio" if way == "trio" else "asyncio")


def until_failure(program: Any, lm: Any, **options: Any) -> tuple[list[Any], Exception | None]:
    """Stream a program on this thread; give what came before its failure, and that."""
    with context(lm=lm):
        stream = streamify(program, async_streaming=False, **options)(question="?")
    found: list[Any] = []
    try:
        for event in stream:
            found.append(event)  # noqa: PERF402  # what came before the failure is kept
    except Exception as error:  # noqa: BLE001  # for the test to look at
        assert list(stream) == []
        return found, error
    return found, None


def text_of(found: Sequence[Any], name: str = "answer") -> str:
    return "".join(
        event.chunk
        for event in found
        if isinstance(event, StreamResponse) and event.signature_field_name == name
    )


# --- What comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("program", "listeners", "name"), PROGRAMS)
def test_an_output_comes_in_the_pieces_of_the_model_and_the_result_at_last(
    program: Any, listeners: list[StreamListener], name: str, way: str, server: FakeServer
) -> None:
    """Every kind of program, on every side; the LM is that of the context of its call (B 1.1)."""
    server.script(Reply(chunks=PIECES))
    found = events(way, program, lm=lm_of(server), stream_listeners=listeners)
    assert found == [
        StreamResponse(name, "answer", "Par", is_last_chunk=False),
        StreamResponse(name, "answer", "is", is_last_chunk=False),
        StreamResponse(name, "answer", "", is_last_chunk=True),
        found[-1],
    ]
    assert (type(found[-1]), found[-1].answer) == (Prediction, "Paris")
    assert [request.json.get("stream") for request in server.requests] == [True]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_piece_is_read_before_the_model_has_ended(way: str, server: FakeServer) -> None:
    """The answer has no end, so whatever comes has come before it; leaving closes it (B 3.4)."""
    server.script(ENDLESS)
    is_sync = way.startswith("sync")
    streamed: Any = streamify(PREDICT, stream_listeners=ANSWER, async_streaming=not is_sync)

    async def read() -> None:
        with context(lm=lm_of(server)):
            if is_sync:
                with closing(streamed(question="?")) as stream:
                    assert next(stream).chunk == "a"
                    assert server.in_flight == 1
            else:
                async with aclosing(streamed(question="?")) as stream:
                    assert (await anext(stream)).chunk == "a"
                    assert server.in_flight == 1
        server_is_left = server.wait_until_idle
        await anyio.to_thread.run_sync(server_is_left)

    if way == "sync":
        with context(lm=lm_of(server)), closing(streamed(question="?")) as stream:
            assert next(stream).chunk == "a"
            assert server.in_flight == 1
        server.wait_until_idle()
    else:
        anyio.run(read, backend="trio" if way == "trio" else "asyncio")
    (request,) = server.requests
    assert request.client_left


def test_both_engines_give_the_same_pieces(engine: str, server: FakeServer) -> None:
    """A listener need not know which engine answers."""
    server.script(Reply(chunks=PIECES))
    found = events("sync", PREDICT, lm=lm_of(server, engine=engine), stream_listeners=ANSWER)
    assert [event.chunk for event in found[:-1]] == ["Par", "is", ""]


@pytest.mark.parametrize("way", WAYS)
def test_without_listeners_the_pieces_of_the_answer_come_as_they_are(
    way: str, server: FakeServer
) -> None:
    """As in DSPy; they are our own pieces, whatever the engine."""
    server.script(Reply(chunks=PIECES))
    *pieces, result = events(way, PREDICT, lm=lm_of(server))
    assert all(isinstance(piece, LMDelta) for piece in pieces)
    assert [piece.text for piece in pieces if piece.text] == PIECES
    assert result.answer == "Paris"


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (ChatAdapter(), answer("x\\ny", "first", "second")),
        (JSONAdapter(), '{"first": "x\\\\ny", "second": "x\\\\ny"}'),
    ],
)
def test_two_outputs_are_told_apart_by_name(
    adapter: Adapter, said: str, server: FakeServer
) -> None:
    """Only those that are listened to are given; both adapters unescape what they escape."""
    server.script(Reply(chunks=list(said)), Reply(chunks=list(said)))
    program = Predict("question -> first, second")
    both = [StreamListener("first"), StreamListener("second")]
    changes = {"adapter": adapter}
    found = events("sync", program, lm=lm_of(server), stream_listeners=both, changes=changes)
    assert text_of(found, "first") == text_of(found, "second") == found[-1].first == "x\\ny"
    one = events("sync", program, lm=lm_of(server), stream_listeners=both[1:], changes=changes)
    assert (text_of(one, "first"), text_of(one, "second")) == ("", "x\\ny")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<thi", "nk>\n[[ ## answer ## ]]\nno", "</think>", answer("yes")], "yes"),
        (["<think>no end\n", answer("yes")], "yes"),
        (["<thin air>", "\n" + answer("yes")], "yes"),
    ],
)
def test_thoughts_before_the_answer_are_no_part_of_it(
    pieces: list[str], expected: str, server: FakeServer
) -> None:
    """What `Predict` never reads, no listener hears."""
    server.script(Reply(chunks=pieces))
    found = events("sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER)
    assert text_of(found) == found[-1].answer == expected


class Shouting(ChatAdapter):
    """Reads answers in a way that no reader of pieces knows."""

    def parse(self, signature: Any, completion: str, **options: Any) -> dict[str, Any]:
        return {"answer": completion.upper()}


def test_an_adapter_without_a_reader_gives_each_output_in_one_piece(server: FakeServer) -> None:
    """Nothing that `parse` would read otherwise is shown before it has."""
    server.script(Reply(chunks=["par", "is"]))
    found = events(
        "sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER, changes={"adapter": Shouting()}
    )
    assert found[:-1] == [StreamResponse("self", "answer", "PARIS", is_last_chunk=True)]


class OwnWay(ChatAdapter):
    """Asks in a way of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"answer": "Paris", "other": 1}]


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_asks_in_its_own_way_gives_each_output_in_one_piece(way: str) -> None:
    """Whoever listens hears it, whoever answers."""
    found = events(
        way, PREDICT, lm=FakeLM([]), stream_listeners=ANSWER, changes={"adapter": OwnWay()}
    )
    assert found[:-1] == [StreamResponse("self", "answer", "Paris", is_last_chunk=True)]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_cannot_stream_gives_each_output_in_one_piece(way: str) -> None:
    """The stream is the same for whoever reads it."""
    found = events(way, PREDICT, lm=FakeLM([{"answer": "Paris"}]), stream_listeners=ANSWER)
    assert found[:-1] == [StreamResponse("self", "answer", "Paris", is_last_chunk=True)]
    assert found[-1].answer == "Paris"


def test_a_cached_answer_gives_each_output_in_one_piece(
    server: FakeServer, cache_in: Callable[..., Cache], tmp_path: Path
) -> None:
    """DSPy gives no piece then; a streamed answer is kept, and serves those that are not."""
    cache_in(tmp_path)
    server.script(Reply(chunks=PIECES))
    lm = lm_of(server)
    first = events("sync", PREDICT, lm=lm, stream_listeners=ANSWER)
    second = events("sync", PREDICT, lm=lm, stream_listeners=ANSWER)
    assert second[:-1] == [StreamResponse("self", "answer", "Paris", is_last_chunk=True)]
    with context(lm=lm):
        assert PREDICT(question="?").answer == first[-1].answer == "Paris"
    assert len(server.requests) == 1


def test_a_streamed_answer_that_cannot_be_read_is_not_kept(
    server: FakeServer, cache_in: Callable[..., Cache], tmp_path: Path
) -> None:
    """As without a stream: whoever asks the same gets another answer."""
    cache_in(tmp_path)
    server.script(Reply(text="no sections"), Reply(text=answer("Paris")))
    changes = {"adapter": ChatAdapter(use_json_adapter_fallback=False)}
    with pytest.raises(AdapterParseError):
        events("sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER, changes=changes)
    found = events("sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER, changes=changes)
    assert found[-1].answer == "Paris"
    assert len(server.requests) == 2


def test_a_streamed_answer_that_cannot_be_read_takes_no_other_ones_place(
    server: FakeServer, cache_in: Callable[..., Cache], tmp_path: Path
) -> None:
    """What another caller has kept meanwhile stays; nobody finds the bad one in between."""
    cache_in(tmp_path)
    server.script(Reply(chunks=["no sections "] * 40), Reply(text=answer("Paris")))
    with context(lm=lm_of(server), adapter=ChatAdapter(use_json_adapter_fallback=False)):
        stream = streamify(PREDICT, async_streaming=False)(question="?")
        next(stream)
        assert PREDICT(question="?").answer == "Paris"
        with pytest.raises(AdapterParseError):
            list(stream)
        assert PREDICT(question="?").answer == "Paris"
    assert len(server.requests) == 2


def test_of_several_answers_the_first_is_heard(server: FakeServer) -> None:
    """The pieces of the others, which come on the same wire, are not taken for its own."""
    server.script(Reply(texts=["[[ ## answer ## ]]\none", answer("two")]))
    found = events(
        "sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER,
        inputs={"question": "?", "config": {"n": 2}},
    )  # fmt: skip
    assert text_of(found) == "one"
    assert not found[0].is_last_chunk  # it was heard, and not read out at the end
    assert found[-1].completions.answer == ["one", "two"]


@pytest.mark.parametrize("include", [True, False])
def test_the_result_comes_unless_it_is_not_wanted_and_was_heard(
    include: bool, server: FakeServer
) -> None:
    """Without listeners, or where they heard nothing, it always comes."""
    server.script(Reply(text=answer("Paris")), Reply(text=answer("Paris")))
    options = {"include_final_prediction_in_output_stream": include}
    lm = lm_of(server)
    heard = events("sync", PREDICT, lm=lm, stream_listeners=ANSWER, **options)
    assert isinstance(heard[-1], Prediction) is include
    unheard = [StreamListener("answer", predict=Predict("question -> answer"))]
    found = events("sync", PREDICT, lm=lm, stream_listeners=unheard, **options)
    assert [type(event) for event in found] == [Prediction]
    found = events("sync", PREDICT, lm=FakeLM([{"answer": "Paris"}]), **options)
    assert isinstance(found[-1], Prediction)


def test_a_program_may_say_something_of_its_own_and_return_anything() -> None:
    """DSPy's `settings.send_stream`, from async and sync code; also None passes through."""

    async def talk() -> list[int]:
        assert settings.send_stream is not None
        await settings.send_stream.send("awaited")
        settings.send_stream.send_nowait(None)
        return [1]

    assert events("asyncio", talk, inputs={}) == ["awaited", None, [1]]
    assert settings.send_stream is None


class Twice(Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        self.ask(question=question)
        found: Prediction = self.ask(question=question)
        return found


@pytest.mark.parametrize(("reuse", "expected"), [(False, "one"), (True, "onetwo")])
def test_a_listener_hears_the_first_call_or_all(
    reuse: bool, expected: str, server: FakeServer
) -> None:
    """`allow_reuse`; and in a second run of the program it hears again, which DSPy's does not."""
    for _ in range(2):
        server.script(Reply(text=answer("one")), Reply(text=answer("two")))
        listeners = [StreamListener("answer", allow_reuse=reuse)]
        found = events("sync", Twice(), lm=lm_of(server), stream_listeners=listeners)
        assert text_of(found) == expected


@pytest.mark.parametrize("by_name", [True, False])
def test_of_several_predictors_one_is_picked(by_name: bool, server: FakeServer) -> None:
    """By its path, or by the predictor or module itself."""

    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Predict("question -> answer")
            self.second = ChainOfThought("question -> answer")

        def forward(self, question: str) -> Prediction:
            self.first(question=question)
            found: Prediction = self.second(question=question)
            return found

    server.script(Reply(text=answer("one")), Reply(text=answer("two", "reasoning", "answer")))
    program = Two()
    listener = (
        StreamListener("answer", predict_name="second.predict")
        if by_name
        else StreamListener("answer", predict=program.second)
    )
    found = events("sync", program, lm=lm_of(server), stream_listeners=[listener])
    assert text_of(found) == "two"
    assert {event.predict_name for event in found[:-1]} == {"second.predict"}


class Doubled(Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Predict("question -> answer")
        self.two = Predict("question -> answer, score: int")

    def forward(self) -> None: ...


@pytest.mark.parametrize(
    ("program", "listener", "words"),
    [
        (PREDICT, StreamListener("answr"), "Did you mean `answer`"),
        (PREDICT, StreamListener("question"), "no predictor|No predictor"),
        (Doubled(), StreamListener("answer"), "Several predictors.*one, two"),
        (Doubled(), StreamListener("answer", predict_name="tow"), "Did you mean `two`"),
        (Doubled(), StreamListener("score", predict_name="one"), "has an output `score`"),
        (Doubled(), StreamListener("answer", predict="one"), "must be a predictor"),
        (function, StreamListener("answer"), "is no module"),
        (PREDICT, "answer", "write `StreamListener"),
    ],
)
def test_a_listener_that_cannot_hear_is_refused_at_once(
    program: Any, listener: Any, words: str
) -> None:
    """When `streamify` is called, naming what there is; a ValueError, as DSPy's."""
    with pytest.raises(SignatureError, match=words) as caught:
        streamify(program, stream_listeners=[listener])
    assert isinstance(caught.value, ValueError)


def test_what_cannot_be_streamed_is_refused_at_once() -> None:
    """Programs, providers, and streams of somebody else."""

    class Waiting(StatusMessageProvider):
        async def lm_start_status_message(self, instance: Any, inputs: Any) -> str:  # type: ignore[override]
            return "asking"

    with pytest.raises(ModuleError, match="module or a function"):
        streamify(5)  # type: ignore[call-overload]
    with pytest.raises(ModuleError, match="make it a plain function"):
        streamify(PREDICT, Waiting())
    with pytest.raises(ModuleError, match="must be an instance"):
        streamify(PREDICT, StatusMessageProvider)  # type: ignore[call-overload]
    with pytest.raises(SettingsError, match="streamify"):
        context(send_stream=object())  # type: ignore[typeddict-item]
    with pytest.raises(InputFieldError):
        streaming.apply_sync_streaming([1])  # type: ignore[arg-type]
    with pytest.raises(InputFieldError):
        streaming.streaming_response(5)  # type: ignore[call-overload]


# --- Asking again --------------------------------------------------------------------------------


def test_an_answer_asked_for_again_begins_its_outputs_anew(server: FakeServer) -> None:
    """The fallback's pieces follow those of the answer that could not be read, and say so."""
    cut = Reply(chunks=["[[ ## answer ## ]]\nPa", "r", "\n[[ ## answer ## ]]\n"])
    server.script(cut, Reply(chunks=['{"answer": "Pa', 'ris"}']))
    with track_usage() as tracker:
        found = events("sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER)
    assert [(event.chunk, event.is_last_chunk, event.is_restart) for event in found[:-1]] == [
        ("Pa", False, False),
        ("r", False, False),
        ("", True, False),
        ("Pa", False, True),
        ("ris", True, False),
    ]
    assert found[-1].answer == "Paris"
    assert tracker.by_model["openai/m"].calls == len(server.requests) == 2


def test_a_repaired_answer_begins_its_outputs_anew(server: FakeServer) -> None:
    """`parse_retries` works as without a stream."""
    server.script(Reply(text="[[ ## answer ## ]]\n1\n[[ ## answer ## ]]"), Reply(text=answer("2")))
    found = events(
        "sync", PREDICT, lm=lm_of(server), stream_listeners=ANSWER, changes={"parse_retries": 1}
    )
    restarts = [event.is_restart for event in found[:-1]]
    assert restarts.count(True) == 1
    assert text_of(found[restarts.index(True) :]) == "2"


def test_retries_go_on_until_the_first_piece(server: FakeServer) -> None:
    """Then the stream breaks where it breaks, after the pieces that had come."""
    server.script(Reply(status=503), Reply(chunks=PIECES))
    lm = lm_of(server).copy(num_retries=1)
    assert text_of(events("sync", PREDICT, lm=lm, stream_listeners=ANSWER)) == "Paris"
    server.script(Reply(chunks=PIECES, cut_after=3))
    found, error = until_failure(PREDICT, lm, stream_listeners=ANSWER)
    assert isinstance(error, LMServerError)
    assert text_of(found) == "Paris"
    assert len(server.requests) == 3


def test_an_answer_that_was_cut_has_no_last_piece(server: FakeServer) -> None:
    """Its reader is told by the error, and is not made to believe that it was whole."""
    server.script(Reply(chunks=PIECES[:3], finish_reason="length"))
    found, error = until_failure(PREDICT, lm_of(server), stream_listeners=ANSWER)
    assert isinstance(error, TruncatedError)
    pieces = [(event.chunk, event.is_last_chunk) for event in found]
    assert pieces == [("Par", False), ("is", False)]


# --- Status messages -----------------------------------------------------------------------------


class Told(StatusMessageProvider):
    def module_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str:
        return f"{type(instance).__name__} starts"

    def module_end_status_message(self, outputs: Any) -> str:
        return "a module ends"

    def lm_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str:
        return f"{instance.model} starts"

    def lm_end_status_message(self, outputs: Any) -> str:
        raise ValueError("a broken provider")


@pytest.mark.parametrize("way", WAYS)
def test_status_messages_come_in_the_order_of_what_they_tell(way: str, server: FakeServer) -> None:
    """Among the pieces; a method that fails is logged and harms nothing."""
    server.script(Reply(chunks=PIECES))
    found = events(
        way, Sync(), lm=lm_of(server), stream_listeners=ANSWER, status_message_provider=Told()
    )
    shown = [
        event.message if isinstance(event, StatusMessage) else type(event).__name__
        for event in found
    ]
    assert shown == [
        "Sync starts",
        "Predict starts",
        "openai/m starts",
        *["StreamResponse"] * 3,
        "a module ends",
        "a module ends",
        "Prediction",
    ]


def test_tools_are_told_of_by_default_but_for_the_one_that_finishes() -> None:
    """Words are ours; the hooks are DSPy's."""

    def search(query: str) -> str:
        return query

    def finish() -> str:
        return "Completed."

    def work() -> str:
        Tool(search)(query="x")
        Tool(finish)()
        return "done"

    found = events("sync", work, inputs={})
    assert found == [
        StatusMessage("Calling tool search..."),
        StatusMessage("The tool has finished; going on with the model."),
        "done",
    ]


def test_callbacks_of_the_settings_hear_a_streamed_call_once(server: FakeServer) -> None:
    """The end comes with the whole answer; usage and history are recorded once."""
    ends: list[Any] = []

    class Hearing(BaseCallback):
        def on_lm_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            ends.append(list(outputs))

    server.script(Reply(chunks=PIECES))
    lm, program = lm_of(server), Sync()
    found = events(
        "sync", program, lm=lm, stream_listeners=ANSWER, changes={"callbacks": [Hearing()]}
    )
    assert ends == [["".join(PIECES)]]
    assert len(lm.history) == len(program.history) == 1
    assert found[-1].get_lm_usage()["openai/m"]["calls"] == 1
    assert found[-1].get_lm_attempts()[0].error is None


# --- Context -------------------------------------------------------------------------------------

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="none")


@pytest.mark.parametrize("way", WAYS)
def test_the_context_of_the_call_is_seen_wherever_the_stream_is_read(way: str) -> None:
    """Settings, and the user's own variables; no step of it raises in another context (B 1.5)."""

    def look() -> tuple[str, int]:
        return REQUEST_ID.get(), settings.num_threads

    token = REQUEST_ID.set("here")
    try:
        is_sync = way.startswith("sync")
        with context(num_threads=3):
            stream: Any = streamify(look, async_streaming=not is_sync)()
    finally:
        REQUEST_ID.reset(token)

    async def read() -> Any:
        return next(stream) if is_sync else await anext(stream)

    if way == "sync":
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(stream))
        thread.start()
        thread.join(10)
        assert found == [("here", 3)]
    else:
        backend = "trio" if way == "trio" else "asyncio"
        assert anyio.run(read, backend=backend) == ("here", 3)


@pytest.mark.parametrize("way", WAYS)
def test_pieces_of_a_batch_bear_the_index_of_their_item(way: str, server: FakeServer) -> None:
    """Each item's in their order; the first call of each item is heard (B 2.12)."""
    names = [f"item {index}" for index in range(6)]
    for name in names:
        said = [
            f"[[ ## answer ## ]]\n{name}:",
            *" one two three".split(" "),
            "\n[[ ## completed ## ]]",
        ]
        server.script_for(lambda request, name=name: name in request.prompt, Reply(chunks=said))  # type: ignore[misc]

    class Batch(Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = Predict("question -> answer")

        def forward(self) -> Any:
            return Parallel(num_threads=3)([(self.ask, {"question": name}) for name in names])

    found = events(way, Batch(), lm=lm_of(server), stream_listeners=ANSWER, inputs={})
    for index, name in enumerate(names):
        mine = [event for event in found[:-1] if event.item_index == index]
        assert "".join(event.chunk for event in mine) == f"{name}:onetwothree"
        assert [event.is_last_chunk for event in mine] == [False] * (len(mine) - 1) + [True]
    assert [each.answer for each in found[-1]] == [f"{name}:onetwothree" for name in names]


def test_a_stream_inside_of_a_stream_has_its_own_reader(server: FakeServer) -> None:
    """What the inner program says is the outer's only if it says it again."""

    def outer() -> str:
        inner = streamify(PREDICT, stream_listeners=ANSWER, async_streaming=False)
        return text_of(list(inner(question="?")))

    server.script(Reply(chunks=PIECES))
    assert events("sync", outer, inputs={}, lm=lm_of(server)) == ["Paris"]


def test_a_block_without_a_stream_is_not_heard(server: FakeServer) -> None:
    """`context(send_stream=None)` keeps what is inside of it to itself."""

    def quiet() -> str:
        with context(send_stream=None):
            found: str = PREDICT(question="?").answer
        return found

    server.script(Reply(text=answer("Paris")))
    assert events("sync", quiet, inputs={}, lm=lm_of(server)) == ["Paris"]


def test_a_snapshot_leaves_its_stream_behind() -> None:
    """What is pickled for another process holds no queue of this one."""

    def travel() -> Any:
        return pickle.loads(pickle.dumps(settings.snapshot())).values["send_stream"]

    assert events("sync", travel, inputs={}) == [None]


# --- Leaving and failing -------------------------------------------------------------------------


class OwnError(Exception):
    pass


def fail(question: str) -> None:
    PREDICT(question=question)
    raise OwnError("mine")


def test_a_failure_of_the_program_is_raised_as_it_was(server: FakeServer) -> None:
    """After what came before it; then the stream is at its end."""
    server.script(Reply(chunks=PIECES))
    found, error = until_failure(fail, lm_of(server), stream_listeners=OF_PREDICT)
    assert (type(error), str(error), text_of(found)) == (OwnError, "mine", "Paris")


@pytest.mark.anyio
async def test_a_failure_of_the_program_is_raised_as_it_was_to_async_readers(
    server: FakeServer,
) -> None:
    """As it was, and never as a group."""
    server.script(Reply(chunks=PIECES))
    with context(lm=lm_of(server)):
        stream = streamify(fail, stream_listeners=OF_PREDICT)(question="?")
    found: list[Any] = []

    async def read() -> None:
        async for event in stream:
            found.append(event)  # noqa: PERF401  # what came before the failure is kept

    with pytest.raises(OwnError, match="mine"):
        await read()
    assert text_of(found) == "Paris"
    assert [event async for event in stream] == []


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("way", ["sync", "asyncio"])
def test_an_exception_that_would_pass_for_the_end_is_an_error(
    way: str, error: type[Exception]
) -> None:
    """Nothing is silently lost."""

    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError):
        events(way, fail, inputs={})


class Steps(Module):
    """Asks again and again, and goes on after what stops other programs."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = Predict("question -> answer")
        self.ended = threading.Event()

    def forward(self, question: str) -> None:
        try:
            for _ in range(50):
                try:
                    self.ask(question=question)
                except DSPyError:
                    continue
        finally:
            self.ended.set()


@pytest.mark.parametrize("how", ["break", "close", "drop", "error"])
def test_leaving_a_sync_stream_stops_its_program(how: str, server: FakeServer) -> None:
    """The connection closes and no further request is made (B 3.4)."""
    program = Steps()
    server.script(ENDLESS)
    streamed = streamify(program, stream_listeners=ANSWER, async_streaming=False)
    with context(lm=lm_of(server)):
        stream = streamed(question="?")
    for _ in stream:
        break
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "error":
        with pytest.raises(ValueError, match="mine"):
            stream.throw(ValueError("mine"))
    del stream
    gc.collect()
    assert program.ended.wait(10)
    server.wait_until_idle()
    assert [request.client_left for request in server.requests] == [True]


@pytest.mark.anyio
@pytest.mark.parametrize("program_type", [Steps, Async])
@pytest.mark.parametrize("how", ["aclose", "drop", "cancel", "error"])
async def test_leaving_an_async_stream_stops_its_program(
    how: str, program_type: type[Module], server: FakeServer
) -> None:
    """Whether it is left by its reader, or with it (B 3.4)."""
    program = program_type()
    server.script(ENDLESS)
    streamed = streamify(program, stream_listeners=ANSWER)
    with context(lm=lm_of(server)):
        stream = streamed(question="?")
    assert (await anext(stream)).chunk == "a"
    if how == "aclose":
        await stream.aclose()
        assert [event async for event in stream] == []
    elif how == "error":
        with pytest.raises(ValueError, match="mine"):
            await stream.athrow(ValueError("mine"))
    elif how == "cancel":
        with anyio.CancelScope() as scope:
            async for _ in stream:
                scope.cancel()
    del stream
    gc.collect()
    await anyio.to_thread.run_sync(server.wait_until_idle)
    if isinstance(program, Steps):
        assert await anyio.to_thread.run_sync(program.ended.wait, 10)
    assert [request.client_left for request in server.requests] == [True]


def test_a_stream_that_nobody_reads_starts_nothing(server: FakeServer) -> None:
    """Neither a thread nor a request."""
    before = threading.active_count()
    with context(lm=lm_of(server)):
        stream = streamify(PREDICT, async_streaming=False)(question="?")
        other = streamify(PREDICT)(question="?")
    stream.close()
    anyio.run(other.aclose)
    assert (list(stream), threading.active_count()) == ([], before)
    assert server.requests == ()


def test_a_stream_closed_by_another_thread_while_it_starts_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A framework may close for a client that leaves while the first event is fetched."""
    ran: list[int] = []

    def close_meanwhile(parent: Any) -> Cancellation:
        closer = threading.Thread(target=stream.close)
        closer.start()
        closer.join(10)
        return Cancellation(parent)

    monkeypatch.setattr("dspylite.programs.streaming.Cancellation", close_meanwhile)
    stream = streamify(lambda: ran.append(1), async_streaming=False)()
    with pytest.raises(CallCancelledError):
        next(stream)
    assert (list(stream), ran) == ([], [])


def test_a_stream_whose_thread_cannot_start_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the machine has no more threads; a second step would wait for ever."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    stream = streamify(lambda: 1, async_streaming=False)()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            next(stream)
    assert list(stream) == []


def test_threads_and_connections_of_left_streams_do_not_pile_up(server: FakeServer) -> None:
    """A hundred readers that go away leave nothing behind."""
    lm = lm_of(server)
    streamed = streamify(PREDICT, stream_listeners=ANSWER, async_streaming=False)
    before = threading.active_count()
    for _ in range(30):
        server.script(ENDLESS)
        with context(lm=lm):
            stream = streamed(question="?")
        next(stream)
        del stream
    server.wait_until_idle()
    limit = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < limit:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert all(request.client_left for request in server.requests)


@pytest.mark.parametrize("way", ["sync", "asyncio", "trio"])
def test_a_program_waits_for_a_slow_reader(way: str) -> None:
    """It is never further ahead than the queue is long; leaving it then ends it too."""
    made: list[int] = []
    full = threading.Event()
    ended = threading.Event()

    def talk() -> None:
        channel: Any = settings.send_stream
        try:
            for number in range(1_000):
                made.append(number)
                if number == 17:
                    full.set()
                channel.put.call(number)
        finally:
            ended.set()

    async def atalk() -> None:
        assert settings.send_stream is not None
        try:
            for number in range(1_000):
                made.append(number)
                if number == 17:
                    full.set()
                await settings.send_stream.send(number)
        finally:
            ended.set()

    async def read() -> None:
        stream = streamify(atalk)()
        assert await anext(stream) == 0
        assert await anyio.to_thread.run_sync(full.wait, 10)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert len(made) == 18
        await stream.aclose()

    if way == "sync":
        stream = streamify(talk, async_streaming=False)()
        assert next(stream) == 0
        assert full.wait(10)
        assert len(made) == 18
        stream.close()
    else:
        anyio.run(read, backend=way)
    assert ended.wait(10)
    assert len(made) == 18


def test_a_sync_call_inside_of_an_async_program_does_not_wait_for_its_own_reader(
    server: FakeServer,
) -> None:
    """It holds up the loop on which its reader is a task, so its pieces do not wait for room."""

    async def block(question: str) -> Prediction:
        found: Prediction = PREDICT(question=question)
        return found

    server.script(Reply(chunks=["[[ ## answer ## ]]\n", *["a "] * 60, "\n[[ ## completed ## ]]"]))
    found = events("asyncio", block, lm=lm_of(server), stream_listeners=OF_PREDICT)
    assert text_of(found) == found[-1].answer


def test_work_around_a_stream_that_is_told_to_stop_stops_the_stream(server: FakeServer) -> None:
    """The flag of the caller reaches the program of a stream that it has opened."""
    server.script(ENDLESS)
    with Cancellation() as flag, context(lm=lm_of(server)):
        stream = streamify(PREDICT, stream_listeners=ANSWER, async_streaming=False)(question="?")
        next(stream)
        flag.cancel("the user pressed stop")
    with pytest.raises(CallCancelledError, match="pressed stop"):
        list(stream)
    server.wait_until_idle()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_ends_takes_its_streams_with_it(backend: str, server: FakeServer) -> None:
    """Also those that somebody still holds."""
    server.script(ENDLESS)
    held: list[Any] = []

    async def read() -> None:
        with context(lm=lm_of(server)):
            held.append(streamify(Async(), stream_listeners=ANSWER)(question="?"))
        await anext(held[0])

    anyio.run(read, backend=backend)
    server.wait_until_idle()
    assert [request.client_left for request in server.requests] == [True]


async def say_one_and_wait() -> None:
    assert settings.send_stream is not None
    await settings.send_stream.send(1)
    await anyio.sleep_forever()


@pytest.mark.parametrize("way", ["anext", "aclose"])
def test_a_stream_of_a_closed_loop_does_not_wait_for_it(way: str) -> None:
    """As by who runs a loop for each step, and closes it without ending its tasks."""
    stream = streamify(say_one_and_wait)()
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(anext(stream)) == 1
    loop.close()

    async def go_on() -> None:
        with anyio.fail_after(10):
            if way == "aclose":
                await stream.aclose()
            else:
                with pytest.raises(CallCancelledError, match="loop"):
                    await anext(stream)
            assert [event async for event in stream] == []

    anyio.run(go_on)


def test_many_streams_at_once_do_not_mix(server: FakeServer) -> None:
    """One streamed program, one listener, many readers, as a service has them."""
    names = [f"q{number:02}" for number in range(40)]
    for name in names:
        said = ["[[ ## answer ## ]]\n", *name, "\n[[ ## completed ## ]]"]
        server.script_for(lambda request, name=name: name in request.prompt, Reply(chunks=said))  # type: ignore[misc]
    streamed = streamify(Sync(), stream_listeners=ANSWER)

    async def read_all() -> list[str]:
        texts = [""] * len(names)

        async def read(index: int) -> None:
            texts[index] = text_of([event async for event in streamed(question=names[index])])

        async with anyio.create_task_group() as group:
            for index in range(len(names)):
                group.start_soon(read, index)
        return texts

    with context(lm=lm_of(server)):
        assert anyio.run(read_all) == names


# --- From async to sync --------------------------------------------------------------------------


def test_an_async_stream_is_read_by_sync_code(server: FakeServer) -> None:
    """DSPy's `apply_sync_streaming`, in the context of its caller."""
    server.script(Reply(chunks=PIECES))
    with context(lm=lm_of(server)):
        stream = streamify(PREDICT, stream_listeners=ANSWER)(question="?")
    found = list(streaming.apply_sync_streaming(stream))
    assert (text_of(found), found[-1].answer) == ("Paris", "Paris")


def test_leaving_the_sync_form_closes_the_async_one(server: FakeServer) -> None:
    """Its `finally` runs, and the program stops."""
    closed = threading.Event()

    async def count() -> AsyncIterator[int]:
        try:
            for number in range(1_000):
                yield number
        finally:
            closed.set()

    stream = streaming.apply_sync_streaming(count())
    assert next(stream) == 0
    stream.close()
    assert closed.wait(10)


def test_the_offline_model_streams_as_well() -> None:
    """So a program can be tried without any server."""
    found = events(
        "sync", Predict("context, question -> answer"), lm=OfflineLM(), stream_listeners=ANSWER,
        inputs={"context": "The Nile flows north.", "question": "Where does it flow?"},
    )  # fmt: skip
    assert text_of(found) == found[-1].answer
