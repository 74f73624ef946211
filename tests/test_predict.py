"""`Predict`: mistakes found before a request, what applies to a call, answers that stay apart.

Not here: prompts and answers as text (`test_*_adapter.py`), modules made of predictors.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import anyio
import pytest
from typing_extensions import TypedDict

import dspylite
from dspylite import (
    AdapterParseError,
    ChainOfThought,
    ChatAdapter,
    Example,
    InputField,
    InputFieldError,
    JSONAdapter,
    LMConfigurationError,
    LMNotConfiguredError,
    LMServerError,
    OutputField,
    Predict,
    SettingsError,
    Signature,
    SignatureError,
    TruncatedError,
    track_usage,
)
from dspylite.models.base import BaseLM
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeLM


class QA(Signature):
    """Answer the question."""

    question: str = InputField()
    k: int = InputField(default=3)
    answer: str = OutputField()


def ask(predict: Any, model: BaseLM, /, **inputs: Any) -> Any:
    with dspylite.context(lm=model):
        return predict(**inputs)


def prompt_of(request: LMRequest) -> str:
    return "\n".join(str(message["content"]) for message in request.messages)


# --- the plain case ------------------------------------------------------------------------------


def test_prediction_has_the_outputs_with_their_types() -> None:
    """The whole road once: text in, typed values out, the cost on the prediction."""
    lm = FakeLM([{"answer": "Paris", "score": 0.9}])
    found = ask(Predict("question -> answer, score: float"), lm, question="Capital of France?")
    assert (found.answer, found.score) == ("Paris", 0.9)
    assert found.get_lm_usage() == {"fake/lm": lm.history[-1].usage}
    assert "Capital of France?" in prompt_of(lm.requests[0])


def test_own_lm_goes_before_the_settings() -> None:
    """A program may give one predictor a cheaper model."""
    own, other = FakeLM([{"answer": "own"}]), FakeLM([{"answer": "other"}])
    predict = Predict(QA)
    predict.lm = own
    assert ask(predict, other, question="q").answer == "own"
    assert other.requests == ()


async def test_acall_equals_call() -> None:
    """One body serves both, so nothing may differ but the waiting."""
    lm = FakeLM(default={"answer": "a"})
    predict = Predict(QA, temperature=0.5)
    with dspylite.context(lm=lm):
        called = predict(question="q")
        awaited = await predict.acall(question="q")
    assert awaited == called
    assert awaited.get_lm_usage() == called.get_lm_usage()
    assert lm.requests[0] == lm.requests[1]


# --- mistakes, found before any request ----------------------------------------------------------


def refused(
    error: type[Exception], call: Callable[[Any], Any], predict: Any = None, *, lm: Any = None
) -> str:
    """Make the call, expect the error, and check that nothing was sent and nothing counted."""
    lm = FakeLM(default={"answer": "a"}) if lm is None else lm
    predict = Predict(QA) if predict is None else predict
    with dspylite.context(lm=lm), pytest.raises(error) as raised:
        call(predict)
    assert lm.requests == ()
    assert type(raised.value) is error
    return str(raised.value)


def test_no_lm_says_how_context_crosses_threads() -> None:
    """A worker that lost its context is the commonest cause, and is told the way (B 1.8)."""
    with dspylite.context(lm=None), pytest.raises(LMNotConfiguredError) as raised:
        Predict(QA)(question="q")
    for way in (
        "configure(lm=",
        "context(lm=",
        "ThreadPoolExecutor",
        "bind(fn)",
        "propagate_to_threads",
    ):
        assert way in str(raised.value)


def test_plain_thread_without_an_lm_in_sight_gets_the_same_sentence() -> None:
    """The overlay of a `context` does not cross into a plain thread by itself."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            Predict(QA)(question="q")
        except LMNotConfiguredError as error:
            errors.append(error)

    with dspylite.context(lm=FakeLM()):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    assert "bind(fn)" in str(errors[0])


@pytest.mark.parametrize("lm", ["openai/gpt-4o-mini", "", 5, FakeLM, ["openai/x"]])
@pytest.mark.parametrize(
    ("give", "error"),
    [
        (lambda lm: dspylite.configure(lm=lm), SettingsError),
        (lambda lm: dspylite.context(lm=lm), SettingsError),
        (lambda lm: Predict(QA).set_lm(lm), LMConfigurationError),
        (lambda lm: Predict(QA)(question="q", lm=lm), LMConfigurationError),
    ],
    ids=["configure", "context", "set_lm", "call"],
)
def test_lm_that_is_none_is_refused_where_it_is_given(
    give: Callable[[Any], Any], error: type[Exception], lm: Any
) -> None:
    """A model's name is not a model; the text shows the line that makes one of it."""
    before = dspylite.settings.lm
    message = refused(error, lambda _: give(lm))
    assert repr(lm) in message
    if isinstance(lm, str):
        assert f"LM({lm!r})" in message
    assert dspylite.settings.lm is before


def test_lm_assigned_as_a_name_is_refused_at_the_call() -> None:
    """An attribute cannot check itself; the call can."""
    predict = Predict(QA)
    predict.lm = "openai/gpt-4o-mini"  # type: ignore[assignment]
    assert "write `LM('openai/gpt-4o-mini')`" in refused(
        LMConfigurationError, lambda p: p(question="q"), predict
    )


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda p: p(), ["needs `question`", "write `predict(question=..., k=...)`"]),
        (lambda p: p(k=1), ["needs `question`"]),
        (lambda p: p(quesiton="q"), ["no input `quesiton`", "Did you mean `question`?"]),
        (
            lambda p: p(question="q", context="c"),
            ["no input `context`", "predict(question=..., k=...)"],
        ),
        (lambda p: p(question="q", answer="a"), ["no input `answer`"]),
        (lambda p: p(question="q", temperature=1), ["no input `temperature`"]),
        (lambda p: p("q"), ["by name, not by position (1 given)", "predict(question=..., k=...)"]),
        (lambda p: p("q", k=1), ["by name, not by position"]),
        (lambda p: p({"question": "q"}), ["by name, not by position"]),
        (lambda p: p(question="q", config="hot"), ["`config`", "'hot'", "dict"]),
        (lambda p: p(question="q", config=["n"]), ["`config`", "dict"]),
        (lambda p: p(question="q", demos="x"), ["`demos`", "'x'"]),
        (lambda p: p(question="q", demos=["x"]), ["`demos`", "'x'"]),
        (lambda p: p(question="q", demos=5), ["`demos`", "5"]),
    ],
)
def test_wrong_inputs_are_refused_with_the_right_call(
    call: Callable[[Any], Any], parts: list[str]
) -> None:
    """Each of these would cost a request whose answer nobody wanted."""
    message = refused(InputFieldError, call)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", ["lm", "demos", "config"])
@pytest.mark.parametrize(
    "give",
    [
        lambda more: Predict(QA, **more),
        lambda more: ChainOfThought(QA, **more),
        lambda more: Predict(QA).update_config(**more),
        lambda more: Predict(QA)(question="q", config=more),
    ],
    ids=["Predict", "CoT", "update_config", "call"],
)
def test_what_is_no_request_parameter_is_refused_in_the_config(
    give: Callable[[Any], Any], name: str
) -> None:
    """`Predict(QA, lm=cheap)` would send the model to the model, and ask the expensive one."""
    message = refused(InputFieldError, lambda _: give({name: FakeLM()}))
    assert f"`{name}` is no request parameter" in message
    assert f"predict.{name} = ..." in message


async def test_wrong_inputs_are_refused_when_awaited_too() -> None:
    """Both doors lead to the same check."""
    lm = FakeLM()
    with dspylite.context(lm=lm):
        for call in (Predict(QA).acall("q"), ChainOfThought(QA).acall(nope=1)):
            with pytest.raises(InputFieldError):
                await call
    assert lm.requests == ()


def test_bad_signature_for_one_call_is_refused() -> None:
    """An override is checked as the constructor's signature is."""
    refused(SignatureError, lambda p: p(question="q", signature="question"))
    refused(SignatureError, lambda p: p(question="q", signature=5))
    refused(SignatureError, lambda p: p(question="q", signature={"question": InputField()}))


def test_error_of_the_lm_passes_through_unchanged() -> None:
    """An outage is not an answer that did not parse: there is no second request through JSON."""
    lm = FakeLM([LMServerError("down", status=503)])
    with pytest.raises(LMServerError, match="down"):
        ask(Predict(QA), lm, question="q")
    assert len(lm.requests) == 1


# --- inputs --------------------------------------------------------------------------------------


def test_default_is_used_unless_the_input_is_passed() -> None:
    """Also None is a value that was passed."""
    lm = FakeLM(default={"answer": "a"})
    for inputs, shown in (({}, "3"), ({"k": 7}, "7"), ({"k": None}, "null")):
        ask(Predict(QA), lm, question="q", **inputs)
        assert f"[[ ## k ## ]]\n{shown}\n" in prompt_of(lm.requests[-1])


NAMES = ["lm", "config", "demos", "signature", "io", "self", "args", "kwargs", "fn", "inputs"]
NAMES += ["instance", "call_id", "messages", "plan", "dual", "prompt", "kind", "callbacks", "base"]


@pytest.mark.parametrize("make", [Predict, ChainOfThought], ids=["Predict", "ChainOfThought"])
@pytest.mark.parametrize("name", NAMES)
async def test_inputs_and_outputs_may_have_any_name(make: Any, name: str) -> None:
    """Which words a signature uses is not for the parameters of our own functions to restrict."""
    lm = FakeLM(default={"reasoning": "r", "out": "a"})
    predict = make(f"{name} -> out")
    with dspylite.context(lm=lm, callbacks=[dspylite.BaseCallback()]):
        assert predict(**{name: "the value"}).out == "a"
        assert (await predict.acall(**{name: "the value"})).out == "a"
        assert (await dspylite.asyncify(predict)(**{name: "the value"})).out == "a"
        assert (await predict.abatch([{name: "the value"}]))[0].out == "a"
    assert len(lm.requests) == 4
    assert all(f"[[ ## {name} ## ]]\nthe value" in prompt_of(r) for r in lm.requests)
    lm = FakeLM(default={"reasoning": "r", name: "a"})
    found = ask(make(f"question -> {name}", n=2), lm, question="q")
    assert found[name] == found.completions[1][name] == "a"


class Row(TypedDict):
    n: int


class Shaped(Protocol):
    n: int


@pytest.mark.parametrize(
    ("annotation", "value", "warned"),
    [
        (str, "q", False),
        (float, 3, False),
        (list[str], ["q"], False),
        (int | None, 3, False),
        (int | None, None, False),
        (dict[str, int] | None, "x", True),
        (Row, {"n": 1}, False),
        (Shaped, object(), False),
        (int, "three", True),
        (list[str], "not a list", True),
    ],
)
def test_input_of_another_type_is_sent_with_a_warning(
    annotation: Any, value: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a hint, so it never fails a call, and never logs the value."""
    predict = Predict({"x": (annotation, InputField()), "answer": OutputField()})
    with caplog.at_level(logging.INFO, logger="dspylite"):
        assert ask(predict, FakeLM([{"answer": "a"}]), x=value).answer == "a"
    assert bool(caplog.records) == warned
    assert "three" not in caplog.text
    caplog.clear()
    with dspylite.context(warn_on_type_mismatch=False):
        ask(predict, FakeLM([{"answer": "a"}]), x=value)
    assert caplog.records == []


def test_demos_are_shown_before_the_question() -> None:
    """Examples, dicts and earlier predictions all serve."""
    lm = FakeLM(default={"answer": "a"})
    predict = Predict(QA)
    predict.demos = [Example(question="one", answer="1"), {"question": "two", "answer": "2"}]
    ask(predict, lm, question="three")
    assert [m["role"] for m in lm.requests[0].messages][1:5] == ["user", "assistant"] * 2
    ask(predict, lm, question="three", demos=[])
    assert len(lm.requests[1].messages) == 2
    assert len(predict.demos) == 2


# --- parameters ----------------------------------------------------------------------------------


def test_config_goes_from_the_lm_over_the_predictor_to_the_call() -> None:
    """The nearer to the call, the stronger."""
    lm = FakeLM(default={"answer": "a"}, temperature=0.1, max_tokens=10, top_p=0.5)
    predict = Predict(QA, temperature=0.2, max_tokens=20)
    ask(predict, lm, question="q", config={"temperature": 0.3})
    assert dict(lm.requests[0].params) == {"temperature": 0.3, "max_tokens": 20, "top_p": 0.5}
    predict.update_config(max_tokens=30)
    ask(predict, lm, question="q", config=None)
    assert dict(lm.requests[1].params) == {"temperature": 0.2, "max_tokens": 30, "top_p": 0.5}
    assert predict.config == {"temperature": 0.2, "max_tokens": 30}


def test_several_answers_become_completions() -> None:
    """`n=3` gives three predictions in one, the first of them at hand."""
    texts = [f"[[ ## answer ## ]]\n{name}\n[[ ## completed ## ]]" for name in "abc"]
    outputs = tuple(LMOutput(text=text, finish_reason="stop") for text in texts)
    found = ask(Predict(QA, n=3), FakeLM([LMResponse(outputs=outputs)]), question="q")
    assert found.answer == "a"
    assert found.completions.answer == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("lm_temperature", "config", "sent"),
    [
        (None, {"n": 2}, 0.7),
        (0.0, {"n": 2}, 0.7),
        (0.9, {"n": 2}, 0.9),
        (None, {"n": 2, "temperature": 0.0}, 0.7),
        (None, {"n": 2, "temperature": 1.1}, 1.1),
        (0.0, {"n": 1}, 0.0),
        (None, {}, None),
    ],
)
def test_temperature_is_raised_only_where_answers_would_be_equal(
    lm_temperature: float | None, config: dict[str, Any], sent: float | None
) -> None:
    """Several answers at temperature 0 are one answer, paid several times (DSPy does the same)."""
    lm = FakeLM(default={"answer": "a"}, temperature=lm_temperature)
    ask(Predict(QA), lm, question="q", config=config)
    assert lm.requests[0].params.get("temperature") == sent


def test_overrides_hold_for_one_call() -> None:
    """The predictor is shared; a call that wants something else must not change it."""
    predict, lm, other = Predict(QA), FakeLM(default={"answer": "a"}), FakeLM([{"n": 5}])
    found = ask(
        predict, lm, question="q", lm=other, signature="question -> n: int", config={"seed": 1}
    )
    assert found.n == 5
    assert (lm.requests, dict(other.requests[0].params)) == ((), {"seed": 1})
    assert ask(predict, lm, question="q").answer == "a"
    assert (predict.signature, predict.lm, predict.config) == (QA, None, {})


# --- an answer that does not parse ---------------------------------------------------------------


async def test_unreadable_answer_is_asked_for_once_more_as_json() -> None:
    """The second form is one that nearly every model keeps to; both requests are on the bill."""
    for awaited in (False, True):
        lm = FakeLM(["It is Paris.", '{"answer": "Paris"}'])
        with dspylite.context(lm=lm), track_usage() as tracker:
            predict = Predict(QA)
            found = await predict.acall(question="q") if awaited else predict(question="q")
        assert found.answer == "Paris"
        assert "JSON object" in prompt_of(lm.requests[1])
        spent = [entry.usage["total_tokens"] for entry in lm.history]
        assert found.get_lm_usage()["fake/lm"]["total_tokens"] == sum(spent)
        assert (
            found.get_lm_usage()["fake/lm"]["calls"] == tracker.total.calls == len(lm.requests) == 2
        )


def test_both_forms_unreadable_raise_with_the_first_as_cause() -> None:
    """The reader of the traceback sees both answers, and pays for two."""
    lm = FakeLM(["first", "second"])
    with track_usage() as tracker, pytest.raises(AdapterParseError) as raised:
        ask(Predict(QA), lm, question="q")
    assert (raised.value.adapter_name, raised.value.lm_response) == ("JSONAdapter", "second")
    cause = raised.value.__cause__
    assert isinstance(cause, AdapterParseError)
    assert (cause.adapter_name, cause.lm_response) == ("ChatAdapter", "first")
    assert tracker.total.calls == len(lm.requests) == 2


@pytest.mark.parametrize("adapter", [ChatAdapter(use_json_adapter_fallback=False), JSONAdapter()])
def test_adapter_without_a_fallback_asks_once(adapter: Any) -> None:
    """Whoever switches it off counts requests."""
    lm = FakeLM(["no form at all"])
    with dspylite.context(adapter=adapter), pytest.raises(AdapterParseError) as raised:
        ask(Predict(QA), lm, question="q")
    assert len(lm.requests) == 1
    assert raised.value.lm_response == "no form at all"


def test_cut_answer_is_not_taken_for_a_value() -> None:
    """A number that lost its tail is worse than no number, and would be cut again (B 4.14)."""
    text = "[[ ## price ## ]]\n12"
    cut = LMResponse(outputs=(LMOutput(text=text, finish_reason="length"),))
    lm = FakeLM([cut, '{"price": 1234}'])
    with pytest.raises(TruncatedError, match="max_tokens") as raised:
        ask(Predict("question -> price: int"), lm, question="q")
    assert (len(lm.requests), raised.value.lm_response) == (1, text)


def test_cut_text_is_taken_where_that_is_allowed() -> None:
    """A summary that stops in the middle may be better than none (B 4.14)."""
    text = "[[ ## answer ## ]]\nOnce upon a"
    cut = LMResponse(outputs=(LMOutput(text=text, finish_reason="length"),))
    with dspylite.context(adapter=ChatAdapter(accept_truncated=True)):
        assert ask(Predict(QA), FakeLM([cut]), question="q").answer == "Once upon a"


def test_one_unreadable_answer_of_several_asks_again_for_all() -> None:
    """`n` answers were wanted, and a shorter list would be taken for the model's choice."""
    good = LMOutput(text="[[ ## answer ## ]]\na\n[[ ## completed ## ]]", finish_reason="stop")
    bad = LMOutput(text="?", finish_reason="stop")
    lm = FakeLM([LMResponse(outputs=(good, bad)), '{"answer": "b"}'])
    assert ask(Predict(QA, n=2), lm, question="q").completions.answer == ["b", "b"]


# --- threads and tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [ChatAdapter(), JSONAdapter()], ids=["chat", "json"])
@pytest.mark.parametrize("shared", [Predict(QA), ChainOfThought(QA)], ids=["Predict", "CoT"])
def test_one_predictor_serves_16_threads_with_16_lms(shared: Any, adapter: Any) -> None:
    """No answer, prompt, bill or history may cross from one tenant to another."""
    arrived = threading.Barrier(16, timeout=20)

    def reply(request: LMRequest) -> Any:
        arrived.wait()  # all 16 are inside their own model at the same time
        name = request.model.removeprefix("fake/")
        return {"reasoning": "r", "answer": f"answer {name}"}

    def serve(number: int) -> None:
        lm = FakeLM(reply, model=f"fake/{number}", adapter=adapter)
        with dspylite.context(lm=lm, adapter=adapter), track_usage() as tracker:
            for turn in range(10):
                found = shared(question=f"from {number}, turn {turn}")
                assert found.answer == f"answer {number}"
                assert list(found.get_lm_usage()) == [f"fake/{number}"]
                assert f"from {number}, turn {turn}\n" in prompt_of(lm.requests[turn])
        assert (tracker.total.calls, list(tracker.by_model)) == (10, [f"fake/{number}"])
        assert len(lm.history) == 10

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(serve, number) for number in range(16)]:
            future.result(30)


def test_16_threads_share_one_lm_at_the_same_time() -> None:
    """The predictor holds no lock while the model answers."""
    lm = FakeLM(lambda r: {"answer": prompt_of(r).partition("number ")[2].partition("\n")[0]})
    predict = Predict(QA)

    def serve(number: int) -> str:
        with dspylite.context(lm=lm):
            return str(predict(question=f"number {number}").answer)

    with lm.hold(until=16), ThreadPoolExecutor(16) as pool:
        assert list(pool.map(serve, range(16))) == [str(number) for number in range(16)]
    assert lm.max_in_flight == 16


async def test_one_predictor_serves_16_tasks_with_16_lms() -> None:
    """Tasks interleave at every await, which is where a shared attribute would be overwritten."""
    predict, answers = Predict(QA), {}

    async def serve(number: int) -> None:
        with dspylite.context(lm=FakeLM(default={"answer": f"answer {number}"})):
            answers[number] = (await predict.acall(question="q")).answer

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(serve, number)
    assert answers == {number: f"answer {number}" for number in range(16)}
