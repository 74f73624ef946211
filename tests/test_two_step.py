"""`TwoStepAdapter`: two models, one answer; judged by the log of a real server.

Not here: what the second step reads (`test_chat_adapter.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite import AdapterParseError, History, InputField, OutputField, TwoStepAdapter
from dspylite.adapters.base import header
from dspylite.schema.signature import make_signature
from dspylite.testing import FakeLM, FakeServer, Reply

SCORE = "question -> answer, score: int"


def extracted(**values: str) -> str:
    parts = [f"{header(name)}\n{value}" for name, value in values.items()]
    return "\n\n".join([*parts, header("completed")])


GOOD = extracted(answer="Paris", score="7")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(answer=GOOD) as server:
        yield server


def lm_at(server: FakeServer, model: str) -> dspy.LM:
    return dspy.LM(f"openai/{model}", api_base=server.base_url, api_key="none", adaptive=False)


@pytest.fixture(autouse=True)
def settings(server: FakeServer) -> Iterator[None]:
    adapter = TwoStepAdapter(lm_at(server, "small"))
    with dspy.context(lm=lm_at(server, "large"), adapter=adapter):
        yield


def models_asked(server: FakeServer) -> list[Any]:
    return [request.json["model"] for request in server.requests]


@pytest.mark.parametrize("awaited", [True, False], ids=["awaited", "called"])
async def test_a_free_answer_is_put_into_the_form(server: FakeServer, awaited: bool) -> None:
    """The large model is told no form, the small one gets its words as data; both are counted."""
    words = "It is Paris, I am sure: 7 of 10."
    server.script(
        Reply(text=words, usage={"prompt_tokens": 10, "completion_tokens": 5}),
        Reply(text=GOOD, usage={"prompt_tokens": 100, "completion_tokens": 50}),
    )
    predict = dspy.Predict(SCORE)
    with dspy.track_usage() as tracker:
        call = {"question": "Capital of France?"}
        found = await predict.acall(**call) if awaited else predict(**call)
    assert (found.answer, found.score) == ("Paris", 7)
    assert models_asked(server) == ["large", "small"]
    first, second = (str(request.json["messages"]) for request in server.requests)
    assert "[[ ## answer ## ]]" not in first
    assert "`score` (int: a whole number)" in first
    assert words in second
    usage = found.get_lm_usage()
    counts = {model: each["prompt_tokens"] for model, each in usage.items()}
    assert counts == {"openai/large": 10, "openai/small": 100}
    assert set(tracker.get_total_tokens()) == set(counts)


async def test_each_of_several_answers_is_extracted(server: FakeServer) -> None:
    """`n=2` makes one request to the large model and two to the small one."""
    server.script(
        Reply(text="words"),
        Reply(text=extracted(answer="a", score="1")),
        Reply(text=extracted(answer="b", score="2")),
    )
    found = await dspy.Predict(SCORE, n=2, temperature=1.0).acall(question="q")
    assert found.completions.answer == ["a", "b"]
    assert models_asked(server) == ["large", "small", "small"]


def test_an_extraction_in_sections_that_fails_is_tried_as_json(server: FakeServer) -> None:
    """The second step has the fallback of `ChatAdapter`."""
    server.script(Reply(text="words"), Reply(text="eh"), Reply(text='{"answer": "a", "score": 1}'))
    assert dspy.Predict(SCORE)(question="q").score == 1
    assert models_asked(server) == ["large", "small", "small"]


async def test_a_failed_extraction_names_both_steps(server: FakeServer) -> None:
    """The error bears the free answer, which is what the user wants to see."""
    server.script(Reply(text="words"), Reply(text="eh"), Reply(text="eh"))
    with pytest.raises(AdapterParseError, match="could not be extracted") as raised:
        await dspy.Predict(SCORE).acall(question="q")
    assert raised.value.adapter_name == "TwoStepAdapter"
    assert raised.value.lm_response == "words"


def test_an_empty_answer_is_not_extracted_from(server: FakeServer) -> None:
    """The small model would have to make something up."""
    server.script(Reply(text="  "))
    with pytest.raises(dspy.DSPyError):
        dspy.Predict(SCORE)(question="q")
    assert models_asked(server) == ["large"]


def test_a_failing_second_model_is_the_calls_failure(server: FakeServer) -> None:
    """As any failure of a model."""
    server.script(Reply(text="words"), Reply(status=401))
    with pytest.raises(dspy.LMAuthError):
        dspy.Predict(SCORE)(question="q")


def test_an_output_named_text_is_extracted() -> None:
    """The second step's own input has another name then."""
    small = FakeLM([extracted(text="t")])
    with dspy.context(lm=FakeLM(["the words"]), adapter=TwoStepAdapter(small)):
        assert dspy.Predict("question -> text")(question="q").text == "t"
    assert "the words" in str(small.requests[0].messages[-1]["content"])


def test_bounds_hold_in_the_second_step() -> None:
    """What is out of bounds is refused there."""
    signature = make_signature({"q": (str, InputField()), "n": (int, OutputField(ge=1, le=5))})
    small = FakeLM([extracted(n="9"), '{"n": 9}'])
    with (
        dspy.context(lm=FakeLM(["nine"]), adapter=TwoStepAdapter(small)),
        pytest.raises(AdapterParseError),
    ):
        dspy.Predict(signature)(q="q")


def test_callbacks_hear_of_both_models() -> None:
    """Each call of a model is one of theirs, within the predictor's."""
    heard: list[str] = []

    class Listener(dspy.BaseCallback):
        def on_lm_start(self, call_id: str, instance: Any, inputs: Any) -> None:
            heard.append(instance.model)

    large, small = FakeLM(["words"], model="large"), FakeLM([GOOD], model="small")
    with dspy.context(lm=large, adapter=TwoStepAdapter(small), callbacks=[Listener()]):
        dspy.Predict(SCORE)(question="q")
    assert heard == ["large", "small"]


async def test_cancelled_before_the_second_step_asks_nobody_more(server: FakeServer) -> None:
    """Whoever has left wants no extraction."""
    server.script(Reply(text="words"))
    with server.hold(), anyio.move_on_after(5) as scope:
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                await dspy.Predict(SCORE).acall(question="q")

            group.start_soon(ask)
            await anyio.to_thread.run_sync(server.wait_for_requests, 1)
            scope.cancel()
    assert scope.cancelled_caught
    server.wait_until_idle()
    assert models_asked(server) == ["large"]


def test_conversations_and_demos_are_told_in_words() -> None:
    """The answers of turns bear no form either, and the history is no input in the list."""
    signature = make_signature(
        {
            "question": (str, InputField()),
            "history": (History, InputField()),
            "answer": (str, OutputField()),
        }
    )
    adapter = TwoStepAdapter(FakeLM([]))
    history = History(messages=[{"question": "a", "answer": "b"}])
    demos = [{"question": "c", "answer": "d"}]
    messages = adapter.format(signature, demos, {"question": "e", "history": history})
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["role"] for message in messages] == roles
    assert (messages[2]["content"], messages[4]["content"]) == ("answer: d", "answer: b")
    assert "- `history`" not in str(messages[0]["content"])


def test_only_a_model_extracts() -> None:
    """Anything else is found when the adapter is made."""
    wrong: Any = "openai/gpt"
    with pytest.raises(dspy.LMConfigurationError, match="extraction_model"):
        TwoStepAdapter(wrong)
