# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Every public name, used as a user would. Type checkers read this; nothing runs it.

A line that must be an error says so twice, once for each checker; when the error goes away, mypy's
`warn_unused_ignores` and the first line of this file make both checkers fail.
"""

import dataclasses
import threading
from array import array
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO, assert_type

import dspylite as dspy
from dspylite.abc import Io, Next
from dspylite.concurrency.parallel_executor import ParallelExecutor
from dspylite.evaluate.metrics import F1
from dspylite.integrations.opentelemetry import OpenTelemetryCallback, instrument
from dspylite.models.cache.remembered import request_cache
from dspylite.runtime.frames import ACTIVE_CALL_ID
from dspylite.runtime.history import HistoryEntry
from dspylite.testing import (
    DummyLM,
    DummyVectorizer,
    FakeClock,
    FakeEmbedder,
    FakeLM,
    FakeServer,
    RecordedRequest,
    Reply,
)


class QA(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField(desc="what to answer")
    k: int = dspy.InputField(default=3)
    answer: str = dspy.OutputField()


class Grade(dspy.Signature):
    """Grade the essay."""

    essay: str = dspy.InputField(desc="the text", prefix="Essay:", max_length=10_000)
    marks: list[int] = dspy.OutputField(desc="one per criterion", min_length=1)
    passed: bool = dspy.OutputField()


class StrictGrade(Grade):
    """Grade the essay, and say why."""

    reason: str = dspy.OutputField()


# --- The promise: a class signature tells a checker the inputs and the outputs -------------------


def outputs_are_known() -> None:
    result = dspy.Predict(QA)(question="x")
    assert_type(result, QA)
    assert_type(result.answer, str)
    assert_type(result.question, str)
    assert_type(dspy.Predict(Grade)(essay="...").marks, list[int])
    assert_type(dspy.Predict(StrictGrade)(essay="...").passed, bool)
    assert_type(dspy.Predict(StrictGrade)(essay="...").reason, str)
    print(result.nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    result.answer.nope()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def inputs_are_known() -> None:
    predict = dspy.Predict(QA)
    predict(question="x")
    predict(question="x", k=5)
    predict(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict(k=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict("x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict(question=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    predict(question="x", k="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    predict(question="x", answer="y")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def a_result_is_a_record_too() -> None:
    result = dspy.Predict(QA)(question="x")
    assert_type(result["answer"], Any)
    assert_type(result.toDict(), dict[str, Any])
    assert_type(result.completions, dspy.Completions)
    assert_type(result.get_lm_usage(), dict[str, dict[str, int]] | None)


async def it_survives_acall() -> None:
    predict = dspy.Predict(QA)
    result = await predict.acall(question="x", k=5)
    assert_type(result, QA)
    assert_type(result.answer, str)
    await predict.acall(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await predict.acall(question=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    print(result.nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def it_survives_asyncify() -> None:
    ask = dspy.asyncify(dspy.Predict(QA))
    result = await ask(question="x", k=5)
    assert_type(result, QA)
    assert_type(result.answer, str)
    await ask(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await ask(question=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    print(result.nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def it_survives_bind_and_pools(pool: dspy.ThreadPoolExecutor) -> None:
    ask = dspy.bind(dspy.Predict(QA))
    assert_type(ask(question="x").answer, str)
    ask(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(pool.submit(dspy.Predict(QA), question="x"), Future[QA])
    assert_type(dspy.syncify(dspy.Predict(QA))(question="x").answer, str)


async def it_survives_batch() -> None:
    predict = dspy.Predict(QA)
    inputs = [{"question": "x"}]
    assert_type(predict.batch(inputs), list[QA])
    assert_type(predict.batch(inputs, 4, 10, on_error="raise", timeout_s=60), list[QA])
    assert_type(predict.batch(inputs, on_error="return"), list[dspy.Outcome[QA]])
    assert_type(predict.batch(inputs, on_error="return")[0].unwrap().answer, str)
    assert_type(
        predict.batch(inputs, return_failed_examples=True),
        tuple[list[QA | None], list[Any], list[BaseException]],
    )
    assert_type(await predict.abatch(inputs), list[QA])
    assert_type(await predict.abatch(inputs, on_error="return"), list[dspy.Outcome[QA]])
    for index, outcome in predict.batch_iter(inputs, 4, hedge_after_s=2.5):
        assert_type(index, int)
        assert_type(outcome, dspy.Outcome[QA])
    async for _, outcome in predict.abatch_iter(inputs, max_errors=3):
        assert_type(outcome.unwrap().answer, str)
    print(predict.batch(inputs)[0].nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    predict.batch(inputs, on_error="ignore")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


async def it_survives_chain_of_thought() -> None:
    think = dspy.ChainOfThought(QA)
    result = think(question="x")
    assert_type(result, QA)
    assert_type(result.answer, str)
    assert_type(result["reasoning"], Any)
    assert_type((await think.acall(question="x")).answer, str)
    assert_type(think.batch([{"question": "x"}]), list[QA])
    think(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    print(result.nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


# --- A text signature stays dynamic --------------------------------------------------------------


async def text_signatures_are_dynamic() -> None:
    predict = dspy.Predict("question -> answer", temperature=0.2)
    result = predict(question="x")
    assert_type(result, dspy.Prediction)
    assert_type(result.anything, Any)
    assert_type((await predict.acall(question="x")).anything, Any)
    assert_type(predict.batch([{"question": "x"}]), list[dspy.Prediction])
    assert_type(dspy.ChainOfThought("question -> answer")(question="x").reasoning, Any)
    assert_type(dspy.ReAct(QA, [len], max_iters=3)(question="x"), QA)
    assert_type(dspy.ReAct("question -> answer", [len])(question="x").trajectory, Any)
    assert_type(dspy.ReActV2(QA, [dspy.Tool(len)])(question="x").answer, str)
    assert_type(dspy.Predict(dspy.Signature("question -> answer"))(question="x").anything, Any)


def made_signatures_are_dynamic() -> None:
    made = dspy.make_signature(
        {"question": (str, dspy.InputField()), "answer": (str, dspy.OutputField(desc="short"))},
        "Answer the question.",
        signature_name="Made",
    )
    assert_type(dspy.Predict(made)(question="x").anything, Any)
    assert_type(dspy.ChainOfThought(made)(question="x").anything, Any)
    edited = QA.with_instructions("Be brief.").append("source", dspy.OutputField(), str)
    assert_type(dspy.Predict(edited)(question="x").source, Any)
    assert_type(dspy.infer_prefix("shortAnswer"), str)


# --- Programs and batches ------------------------------------------------------------------------


class Pipeline(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict(QA)
        self.grade = dspy.Predict("answer -> score: float")

    def forward(self, question: str) -> dspy.Prediction:
        answer = self.ask(question=question).answer
        return dspy.Prediction(answer=answer, score=self.grade(answer=answer).score)


async def programs(lm: dspy.LM) -> None:
    program = Pipeline()
    assert_type(program(question="x"), Any)
    assert_type(await program.acall(question="x"), Any)
    assert_type(program.batch(({"question": q} for q in "ab"), num_threads=2), list[Any])
    assert_type(program.batch([], on_error="return"), list[dspy.Outcome[Any]])
    assert_type(await program.abatch([], progress=lambda done, total, errors: None), list[Any])
    assert_type(dspy.syncify(program), Pipeline)
    assert_type(program.deepcopy(), Pipeline)
    assert_type(program.reset_copy(), Pipeline)
    program.set_lm(lm)
    for path, predictor in program.named_predictors():
        print(path.upper(), predictor.demos)
    run = dspy.Parallel(num_threads=4, max_errors=10, on_error="return", timeout_s=60.0)
    print(run([(program, {"question": "x"}), (len, ("abc",))]))
    print(await run.acall([(program, dspy.Example(question="x").with_inputs("question"))]))
    dspy.Parallel(on_error="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def outcomes(outcome: dspy.Outcome[QA]) -> str:
    if outcome.ok:
        return outcome.unwrap().answer
    assert_type(outcome.value, QA | None)
    assert_type(outcome.error, BaseException | None)
    return f"{outcome.index}: {outcome.attempts} attempts, {outcome.seconds:.1f} s"


def records() -> None:
    example = dspy.Example({"question": "1+1?"}, answer="2").with_inputs("question")
    assert_type(example.inputs(), dspy.Example)
    assert_type(dict(example.items()), dict[str, Any])
    assert_type(example.keys(include_dspy=True), list[str])
    prediction = dspy.Prediction(answer="Paris", score=0.5)
    assert_type(prediction.answer, Any)
    assert_type(prediction + 1, float)
    assert_type(2 * prediction - prediction, float)
    print(prediction + "1")  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue]
    assert_type(prediction > 0.1, bool)
    completions = dspy.Completions([{"answer": "a"}, {"answer": "b"}])
    assert_type(completions.answer, list[Any])
    assert_type([each.answer for each in completions], list[Any])
    assert_type(dspy.Prediction.from_completions({"answer": ["a", "b"]}), dspy.Prediction)


# --- Settings and threads ------------------------------------------------------------------------


def changing_settings(lm: dspy.LM) -> None:
    dspy.configure(lm=lm, adapter=dspy.ChatAdapter(), num_threads=8, max_errors=None)
    dspy.configure(adapter=dspy.JSONAdapter(), callbacks=[dspy.BaseCallback()])
    with dspy.context(lm=dspy.OfflineLM(), trace=[]):
        assert_type(dspy.settings.num_threads, int)
    with dspy.settings.restore(dspy.settings.snapshot()):
        assert_type(dspy.settings.track_usage, bool)
    dspy.configure(num_thread=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    dspy.configure(num_threads="8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dspy.configure(lm="openai/gpt-4o-mini")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def hidden(entry: HistoryEntry) -> HistoryEntry | None:
    assert_type(entry.outputs, tuple[str | dict[str, Any], ...])
    assert_type(entry.cost, float | None)
    assert_type(entry["usage"], Any)
    assert_type(entry.get("cost"), Any | None)
    return dataclasses.replace(entry, messages=()) if entry.prompt else None


def histories(lm: dspy.LM, program: dspy.Module, file: TextIO) -> None:
    dspy.configure(max_history_bytes=1_000_000, redact_history=hidden)
    dspy.inspect_history()
    dspy.inspect_history(n=2, file=file)
    lm.inspect_history(3)
    program.inspect_history(3, file)
    assert_type([entry.model for entry in lm.history], list[str])
    dspy.configure(redact_history="hide")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dspy.inspect_history("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Keeper(dspy.Module):
    """A program of the user's."""


def saving(program: Keeper, lm: dspy.LM, path: Path) -> None:
    program.save(path)
    program.load(path, allow_unsafe_lm_state=True)
    assert_type(program.load_state(program.dump_state()), Keeper)
    assert_type(dspy.load(path, trust=["my_app", Keeper]), dspy.Module)
    assert_type(dspy.BaseLM.load_state(lm.dump_state()), dspy.BaseLM)
    assert_type(dspy.load_settings(path), dict[str, Any])
    dspy.settings.save(path, exclude_keys=["callbacks"])


def settings_warnings(warning: dspy.SettingsWarning) -> UserWarning:
    return warning


def read(text: str, *, times: int = 1) -> list[str]:
    return [text] * times


async def aread(text: str) -> list[str]:
    return [text]


async def crossing_threads(chunks: Iterator[str], stream: AsyncIterator[str]) -> None:
    assert_type(dspy.bind(read)("x", times=2), list[str])
    assert_type(await dspy.bind(aread)("x"), list[str])
    threading.Thread(target=dspy.bind(read), args=("x",)).start()
    assert_type(dspy.bind_iter(chunks), Iterator[str])
    assert_type(dspy.bind_iter(stream), AsyncIterator[str])
    assert_type(await dspy.asyncify(read)("x", times=2), list[str])
    assert_type(dspy.syncify(aread)("x"), list[str])
    with dspy.propagate_to_threads(), dspy.ThreadPoolExecutor(max_workers=4) as pool:
        assert_type(pool.submit(read, "x", times=2), Future[list[str]])
        assert_type(pool.map(read, ["x"]), Iterator[list[str]])
    dspy.bind(read)(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def counting() -> None:
    with dspy.track_usage() as tracker:
        assert_type(tracker.total, dspy.Usage)
        assert_type(tracker.get_total_tokens(), dict[str, dict[str, int]])
    assert_type((dspy.Usage(prompt_tokens=1) + dspy.Usage(calls=1)).total_tokens, int)


class Listener(dspy.BaseCallback):
    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        frame = dspy.current_call()
        assert_type(frame.item_index if frame is not None else None, int | None)


# --- Models --------------------------------------------------------------------------------------


class MyLM(dspy.BaseLM):
    def forward(
        self,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        return {"choices": [{"message": {"content": "Paris"}}]}


async def models() -> None:
    lm = dspy.LM("openai/gpt-4o-mini", temperature=0.2, api_base="http://localhost:8000/v1")
    assert_type(lm("Capital of France?"), list[str | dict[str, Any]])
    assert_type(
        await lm.acall(messages=[{"role": "user", "content": "Capital of France?"}], n=2),
        list[str | dict[str, Any]],
    )
    assert_type(lm.copy(temperature=1.0), dspy.LM)
    dspy.configure(lm=MyLM("my/model"))
    lm.middleware = (dspy.Retry(max_retries=5, base_s=0.1), *lm.middleware)
    dspy.LM()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def embed_texts(texts: list[str]) -> list[list[float]]:
    return [[float(len(text))] for text in texts]


async def aembed_texts(texts: list[str], *, scale: float = 1.0) -> list[list[float]]:
    return [[scale * len(text)] for text in texts]


def embed_numbers(numbers: list[int]) -> list[list[float]]:
    return [[float(number)] for number in numbers]


async def embedding() -> None:
    embedder = dspy.Embedder("openai/text-embedding-3-small", batch_size=100, dimensions=64)
    vectors = embedder.embed(["a", "b"])
    assert_type(vectors, dspy.EmbeddingMatrix)
    assert_type(vectors.shape, tuple[int, int])
    assert_type(vectors.tolist(), list[list[float]])
    assert_type(vectors.dot(vectors[0]), list[float])
    assert_type(vectors.normalized(), dspy.EmbeddingMatrix)
    assert_type(vectors.cosine([0.0, 1]), list[float])
    assert_type(vectors.top_k(vectors[0], k=3), list[tuple[int, float]])
    assert_type(vectors.copy(), dspy.EmbeddingMatrix)
    assert_type(await embedder.aembed(("a", "b")), dspy.EmbeddingMatrix)
    assert_type(await embedder.aembed(["a"], query=True, progress=True), dspy.EmbeddingMatrix)
    assert_type(embedder.split("a text", max_tokens=100, overlap=10), list[str])
    assert_type(embedder.copy(api_key="another"), dspy.Embedder)
    dspy.Embedder("openai/m", max_tokens=512, overflow="pool", tokenizer=lambda text: [len(text)])
    dspy.Embedder("openai/m", overflow="cut")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dspy.EmbeddingMatrix(array("f", [0.0, 1.0]), 2)
    dspy.EmbeddingMatrix.from_rows([[0.0, 1.0], (1, 0)])
    dspy.Embedder(embed_texts)
    dspy.Embedder(aembed_texts, scale=0.5)
    search = dspy.EmbeddingsWithScores(["a", "b"], embedder, k=1)
    assert_type(search("a"), dspy.Prediction)
    assert_type(await search.acall("a"), dspy.Prediction)
    assert_type(search.batch(["a", "b"]), list[dspy.Prediction])
    assert_type(search.load("corpus", embed_texts), dspy.EmbeddingsWithScores)
    assert_type(dspy.Embeddings.from_saved("corpus", aembed_texts), dspy.Embeddings)
    assert_type(await dspy.Embeddings.acreate(["a"], embed_texts), dspy.Embeddings)
    search(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dspy.Embeddings(["a"], embed_numbers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    knn = dspy.KNN(k=3, trainset=[dspy.Example(a=1).with_inputs("a")], vectorizer=embedder)
    assert_type(knn(a=1), list[dspy.Example])
    assert_type(await knn.acall(a=1), list[dspy.Example])
    dspy.Embedder(embed_numbers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# --- Errors --------------------------------------------------------------------------------------


def lm_errors(predict: dspy.Predict[..., dspy.Prediction]) -> float | None:
    try:
        predict(question="x")
    except (dspy.LMNotConfiguredError, dspy.LMConfigurationError, dspy.LMAuthError) as error:
        print(error.model, error.provider, error.code)
    except (dspy.ContextWindowExceededError, dspy.ContentFilterError) as error:
        refused: dspy.LMInvalidRequestError = error
        print(refused.provider_code)
    except (dspy.LMRateLimitError, dspy.LMServerError) as error:
        return error.retry_after_s
    except (dspy.LMTimeoutError, dspy.LMTransportError) as error:
        built_in: TimeoutError | ConnectionError = error
        print(built_in)
    except dspy.LMUnexpectedError as error:
        print(error.status, error.request_id)
    except dspy.LMError as error:
        assert_type(dspy.is_retryable_lm_error(error), bool)
        assert_type(error.retryable, bool)
    return None


def program_errors(error: dspy.DSPyError) -> ValueError | TypeError | None:
    match error:
        case dspy.SettingsError() | dspy.SignatureError():
            return error
        case dspy.InputFieldError() | dspy.ModuleError():
            return error
        case dspy.AdapterParseError():
            print(error.adapter_name, error.signature, error.lm_response, error.parsed_result)
        case dspy.BatchError():
            assert_type(error.results, dict[int, Any])
            assert_type(error.errors, dict[int, BaseException])
            assert_type(error.untried, int | None)
        case dspy.ItemSkippedError():
            assert_type(error.index, int)
        case dspy.ItemTimeoutError():
            assert_type(error.timeout_s, float)
        case dspy.EmbeddingShapeError() | dspy.EmbeddingValueError():
            return error
        case dspy.EmbeddingError():
            assert_type(error.index, int | None)
        case dspy.MetricError():
            print(error.prediction)
        case dspy.EvaluationError():
            return error
        case dspy.FlowError() | dspy.MissingExtraError() | dspy.CallCancelledError():
            print(error)
        case _:
            pass
    return None


def stopped(work: Callable[[], None]) -> dict[int, Any]:
    try:
        dspy.check_cancelled()
        work()
    except dspy.BatchInterrupted as interrupt:
        assert_type(interrupt.results, dict[int, Any])
        assert_type(interrupt.untried, int | None)
        return dspy.finished_results(interrupt)
    return {}


# --- Evaluation ----------------------------------------------------------------------------------


def overlap(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> float:
    return F1(pred.answer, [example["answer"]])


async def measured(devset: Iterator[dspy.Example]) -> dict[int, BaseException]:
    evaluate = dspy.Evaluate(devset=devset, metric=overlap, display_progress=True, display_table=5)
    result = evaluate(dspy.Predict(QA), save_as_json=Path("results.json"))
    assert_type(result, dspy.EvaluationResult)
    assert_type(result.score, float)
    for example, prediction, score in result.results:
        print(example, prediction, score)
    judge = dspy.SemanticF1(threshold=0.5, decompositional=True)
    result = await evaluate.acall(dspy.Predict(QA), judge, [], 4, callback_metadata={"step": 1})
    evaluate(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dspy.Evaluate(devset=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(dspy.normalize_text("x"), str)
    example, pred = dspy.Example(answer="x"), dspy.Prediction(answer="x")
    assert_type(dspy.answer_exact_match(example, pred, frac=0.5), bool)
    assert_type(dspy.answer_passage_match(example, pred), bool)
    print(dspy.CompleteAndGrounded(threshold=0.5), judge(example, pred).score)
    assert_type(dspy.evaluate.Evaluate, type[dspy.Evaluate])
    return result.errors


# --- Calls: policies, streams, deadlines, budgets -------------------------------------------------


class Logged:
    """A policy of a user."""

    async def handle(self, request: dspy.LMRequest, call_next: Next, io: Io) -> dspy.LMResponse:
        started = io.now()
        response = await call_next(request)
        print(request.model, io.now() - started, response.attempts)
        return response


def calls(spare: dspy.LM) -> None:
    lm = dspy.LM(
        "openai/m",
        engine="direct",
        num_retries=2,
        rpm=60,
        tpm=10_000,
        max_concurrency=4,
        max_queue=100,
        fallbacks=[spare],
        fallback_on=(dspy.LMServerError,),
        circuit_breaker=dspy.CircuitBreaker(cool_down_s=1.0),
        middleware=[Logged(), dspy.Retry(max_retries=1), dspy.MaxConcurrency(2)],
        price=(0.15, 0.6),
        deadline_s=30,
    )
    assert_type(lm.health(), dspy.Health)
    assert_type(lm.list_models(), list[str])
    lm.preload()
    assert_type(lm.supports_function_calling, bool)
    assert_type(lm.context_window, int | None)
    with lm.stream("Hi") as stream:
        for piece in stream:
            assert_type(piece, dspy.LMDelta)
            assert_type(piece.text, str)
            assert_type(piece.item_index, int | None)
    assert_type(stream.item_index, int | None)
    assert_type(stream.response.usage, dspy.Usage)
    dspy.Fallback([spare], on=(dspy.LMServerError,))
    dspy.RateLimit(rpm=10)
    with dspy.context(deadline_s=5.0), dspy.budget(tokens=1_000, usd=0.1) as spending:
        assert_type(spending.usd_spent, float | None)
    attempts = dspy.Prediction(answer="x").get_lm_attempts()
    assert_type(attempts, tuple[dspy.Attempt, ...])


async def awaited_stream(lm: dspy.LM) -> str:
    async with await lm.astream("Hi") as stream:
        return "".join([piece.text async for piece in stream])


def over_http(error: dspy.DSPyError) -> int:
    answer = error.to_http()
    assert_type(answer.headers, dict[str, str])
    return answer.status


# --- The cache, and what calls took ---------------------------------------------------------------


class ByQuestionOnly(dspy.Cache):
    def cache_key(
        self, request: Mapping[str, Any], ignored_args_for_cache_key: Sequence[str] | None = None
    ) -> str:
        return super().cache_key({"messages": request["messages"]}, ignored_args_for_cache_key)


def cached(lm: dspy.LM) -> None:
    dspy.configure_cache(True, True, "/tmp/x", 10_000, 100, memory_size_limit_bytes=1_000)
    assert_type(dspy.cache, dspy.Cache)
    dspy.cache = ByQuestionOnly(enable_disk_cache=False)
    assert_type(dspy.cache.stats(), dspy.CacheStats)
    assert_type(dspy.cache.stats().memory_hits, int)
    assert_type(dspy.cache.flush(1.0), bool)
    with dspy.context(cache_namespace="team", parse_retries=1), dspy.track_usage() as tracker:
        lm("Hi", cache=False, rollout_id=2)
    assert_type(tracker.counts["m"].retried, int)
    assert_type(tracker.cost_usd, float | None)
    assert_type(lm.cost_of(dspy.Usage()), float | None)


# --- Several tries, one answer -------------------------------------------------------------------


def is_short(inputs: dict[str, Any], prediction: Any) -> float:
    return float(len(prediction.answer) < 10)


async def judged(inputs: dict[str, Any], prediction: dspy.Prediction) -> float:
    return float(bool(prediction.answer))


async def sampled() -> None:
    best = dspy.BestOfN(dspy.Predict(QA), 3, is_short, 1.0, fail_count=1, num_threads=2)
    best(question="q")
    refine = dspy.Refine(module=best, N=3, reward_fn=judged, threshold=None)
    await refine.acall(question="q")
    refine.batch([{"question": "q"}])
    several = dspy.Predict("question -> answer", n=3)(question="q")
    assert_type(dspy.majority(several), dspy.Prediction)
    assert_type(dspy.majority(several.completions, field="answer"), dspy.Prediction)
    dspy.majority([{"answer": "a"}, {"answer": "b"}], normalize=str)
    dspy.MultiChainComparison(QA, M=3)(several, question="q")
    for path, part in best.named_sub_modules(dspy.Predict):
        assert_type(path, str)
        part.get_config()


# --- DSPy's spellings ----------------------------------------------------------------------------


@request_cache(ignored_args_for_cache_key=["k"])
def searched(query: str, k: int = 3) -> list[str]:
    return [query] * k


@request_cache("request", maxsize=3)
async def asked(request: dict[str, str]) -> str:
    return request["q"]


async def spelt_as_in_dspy() -> None:
    assert_type(searched("moon", k=2), list[str])
    assert_type(await asked({"q": "moon"}), str)
    executor = ParallelExecutor(num_threads=2, disable_progress_bar=True)
    assert_type(executor.execute(len, ["a", "b"]), list[int | None])
    assert_type(executor.exceptions_map, dict[int, BaseException])
    assert_type(ACTIVE_CALL_ID.get(), str | None)
    assert_type(dspy.SettingsError("no").code, str | None)
    assert_type(dspy.SettingsError("no").message, str)


# --- Fakes for tests -----------------------------------------------------------------------------


def fakes() -> None:
    lm = FakeLM([{"answer": "Paris"}, "text", ValueError("no")], default="?", num_retries=1)
    DummyLM({"Capital": {"answer": "Paris"}}).get_convo(0)
    DummyLM([{"answer": "Paris"}], follow_examples=True, reasoning=True, adapter=dspy.ChatAdapter())
    DummyVectorizer(max_length=8, n_gram=2)(["a"])
    FakeLM(lambda request: str(request.messages[-1]["content"]))
    with dspy.context(lm=lm), lm.hold(until=2):
        lm.wait_for_calls(2)
    assert_type(len(lm.requests), int)
    with FakeClock() as clock:
        assert_type(clock.sleeps, list[float])
    assert_type(FakeEmbedder(dimensions=4).batches, list[list[str]])
    with FakeServer(answer="Paris") as server:
        server.script(Reply(status=503), Reply())
        assert_type(server.requests[0], RecordedRequest)


def fakes_fit_where_models_go(make: Callable[..., Awaitable[str]]) -> None:
    dspy.configure(lm=FakeLM())
    dspy.Predict(QA).lm = FakeLM()
    assert_type(dspy.syncify(make)(), str)


# --- Callbacks -----------------------------------------------------------------------------------


class Counter(dspy.BaseCallback):
    def on_lm_end(
        self, call_id: str, outputs: object, exception: BaseException | None = None
    ) -> None:
        if isinstance(outputs, dspy.LMOutputs):
            assert_type(outputs.response, dspy.LMResponse)


class Tool:
    @dspy.with_callbacks
    def __call__(self, query: str, limit: int = 3) -> list[str]:
        return [query] * limit

    @dspy.with_callbacks
    async def ask(self, query: str) -> str:
        return query


async def listened_to(tool: Tool) -> None:
    assert_type(tool("x", limit=2), list[str])
    assert_type(await tool.ask("x"), str)
    if (frame := dspy.current_call()) is not None:
        assert_type(frame.parent_id, str | None)
    with dspy.context(callbacks=[Counter()]):
        dspy.settings.snapshot()


def traced() -> None:
    with instrument(capture_content=True, max_content_chars=1_000) as tracing:
        assert_type(tracing.callback, OpenTelemetryCallback)
    tracing.undo()
    dspy.configure(callbacks=[OpenTelemetryCallback(adapters=True, max_open_calls=100)])


class Java(dspy.Code):
    language = "java"


def types_of_fields(document: dspy.Document, cited: dspy.Citations, why: dspy.Reasoning) -> None:
    image = dspy.Image("https://example.org/a.png")
    assert_type(image.url, str)
    assert_type(dspy.Image.from_url("https://h/a", verify=False, timeout=None), dspy.Image)
    assert_type(dspy.Image.from_path("a.png", max_bytes=10), dspy.Image)
    dspy.Image.from_url("https://h/a", 5, "long")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(dspy.Audio(b"...", audio_format="mp3").data, str)
    assert_type(dspy.Audio.from_array([0.0], 8000), dspy.Audio)
    assert_type(dspy.File.from_path("a.pdf", "a.pdf", "application/pdf").filename, str | None)
    assert_type(dspy.File.from_file_id("f"), dspy.File)
    assert_type(Java(code="int a;").code, str)
    assert_type(Java.language, str)
    assert_type(document.title, str | None)
    assert_type([each.cited_text for each in cited], list[str])
    assert_type(cited[0].document_index, int | None)
    assert_type(cited[1:], list[dspy.Citations.Citation])
    assert_type(why + " so", str)
    assert_type(why + why, dspy.Reasoning)
    assert_type(why[0], str)
    assert_type(dspy.History(messages=[{"question": "a"}]).messages, list[dict[str, Any]])
    try:
        dspy.Image.from_url("https://h/a")
    except dspy.MediaFetchError as error:
        assert_type(error.status, int | None)


# --- Single calls made into batches --------------------------------------------------------------


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


async def lengths_later(texts: list[str]) -> tuple[int, ...]:
    return tuple(lengths(texts))


async def micro_batches(embedder: dspy.Embedder) -> None:
    with dspy.MicroBatcher(lengths, 8, 0.1, max_concurrency=2, max_queue=9) as length:
        assert_type(length, dspy.MicroBatcher[str, int])
        assert_type(length("a"), int)
        length(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with dspy.Unbatchify(lengths_later) as length:
        assert_type(await length.acall("a"), int)
        await length.aclose(drop=True)
    embed: dspy.MicroBatcher[str, memoryview[float]] = dspy.MicroBatcher(embedder.embed)
    assert_type(embed("a"), memoryview[float])
    assert_type(dspy.MicroBatcher(embedder.aembed)("a"), memoryview[float])


# --- Streams -------------------------------------------------------------------------------------


async def answer_later() -> str:
    return "later"


async def streamed(predict: Any) -> None:
    listeners = [dspy.StreamListener("answer", allow_reuse=True)]
    assert_type(
        dspy.streamify(answer_later, stream_listeners=listeners)(), AsyncGenerator[Any, None]
    )
    read = dspy.streamify(dspy.Predict(QA), async_streaming=False)
    assert_type(read(question="?"), Generator[Any, None, None])
    read(questoin="?")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    events = dspy.streaming_response(dspy.streamify(predict)(question="?"))
    assert_type(events, AsyncGenerator[str, None])
    assert_type(dspy.streaming_response(read(question="?")), Generator[str, None, None])
    piece = dspy.streaming.StreamResponse("p", "f", "c", is_last_chunk=True)
    assert_type(piece.item_index, int | None)
    with dspy.context(send_stream=None):
        if dspy.settings.send_stream is not None:
            await dspy.settings.send_stream.send(1)
