"""Adapters that users write, in DSPy's own ways, and what every adapter does with demos.

Not here: the adapters of the package, each with a file of its own.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

import dspylite as dspy
from dspylite import (
    Adapter,
    AdapterParseError,
    BAMLAdapter,
    ChatAdapter,
    Example,
    JSONAdapter,
    TwoStepAdapter,
    XMLAdapter,
)
from dspylite.adapters.base import NOT_GIVEN, header
from dspylite.schema.signature import make_signature
from dspylite.testing import FakeLM

QA = make_signature("question -> answer")


def written(value: str) -> str:
    return f"{header('answer')}\n{value}\n\n{header('completed')}"


class Lines(Adapter):
    """The least that a user writes: `format` and `parse` with DSPy's parameters."""

    def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
        shown = [f"{name}: {inputs[name]}" for name in signature.input_fields]
        return [{"role": "user", "content": "\n".join([*shown, *map(str, demos)])}]

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        found = dict(re.findall(r"(\w+): (.*)", completion))
        if set(found) != set(signature.output_fields):
            raise AdapterParseError("Lines", signature, completion)
        return found


class Bare(Lines):
    """One that never calls the constructor of its base."""

    def __init__(self, mark: str) -> None:
        self.mark = mark


class Old(ChatAdapter):
    """One whose `parse` takes more, as later versions do."""

    seen: Any = None

    def parse(self, signature: Any, completion: str, **kwargs: Any) -> dict[str, Any]:
        self.seen = kwargs
        return super().parse(signature, completion, **kwargs)


@pytest.mark.parametrize("adapter", [Lines(), Bare("x")], ids=["plain", "bare"])
async def test_format_and_parse_are_enough(adapter: Adapter) -> None:
    """Called, awaited, and asked directly as DSPy programs do."""
    lm = FakeLM(default="answer: x")
    with dspy.context(lm=lm, adapter=adapter):
        assert dspy.Predict(QA)(question="q").answer == "x"
        assert (await dspy.Predict(QA).acall(question="q")).answer == "x"
    assert adapter(lm, {}, QA, [], {"question": "q"}) == [{"answer": "x"}]
    assert await adapter.acall(lm, {"n": 2}, QA, [], {"question": "q"}) == [{"answer": "x"}] * 2
    assert {str(request.messages[0]["content"]) for request in lm.requests} == {"question: q"}
    assert pickle.loads(pickle.dumps(adapter)).format(QA, [], {"question": "q"})


async def test_its_errors_are_ours() -> None:
    """A repair turn is written for any adapter."""
    lm = FakeLM(["eh", "answer: x"])
    with dspy.context(lm=lm, adapter=Lines(), parse_retries=1):
        assert (await dspy.Predict(QA).acall(question="q")).answer == "x"
    with dspy.context(lm=FakeLM(["eh"]), adapter=Lines()), pytest.raises(AdapterParseError):
        dspy.Predict(QA)(question="q")


def test_parse_with_further_parameters_is_told_why_the_model_stopped() -> None:
    """By `finish_reason`, where it takes any."""
    adapter = Old()
    with dspy.context(lm=FakeLM([written("x")]), adapter=adapter):
        dspy.Predict(QA)(question="q")
    assert adapter.seen == {"finish_reason": "stop"}


class Calling(ChatAdapter):
    """`__call__` alone is overridden, which also serves `acall`."""

    def __call__(
        self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any
    ) -> list[dict[str, Any]]:
        rows = super().__call__(lm, lm_kwargs, signature, demos, inputs)
        return [{name: value.upper() for name, value in row.items()} for row in rows]


class Awaiting(ChatAdapter):
    """`acall` alone is overridden, which also serves `__call__`."""

    async def acall(
        self, model: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any
    ) -> Any:  # type: ignore[override]
        rows = await super().acall(model, lm_kwargs, signature, demos, inputs)
        return [{name: value.upper() for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("kind", [Calling, Awaiting])
async def test_an_own_call_is_used_by_both_forms(kind: type[Adapter]) -> None:
    """A user writes the one that the program needs; usage is counted all the same."""
    lm = FakeLM(default=written("x"))
    with dspy.context(lm=lm, adapter=kind(), track_usage=True):
        found = dspy.Predict(QA)(question="q")
        awaited = await dspy.Predict(QA).acall(question="q")
    assert (found.answer, awaited.answer) == ("X", "X")
    assert found.get_lm_usage()


class Hooked(ChatAdapter):
    """Every hook of DSPy's that writes a part of the prompt."""

    def format_field_description(self, signature: Any) -> str:
        return "FIELDS"

    def format_field_structure(self, signature: Any) -> str:
        return "FORM"

    def format_task_description(self, signature: Any) -> str:
        return "TASK"

    def format_user_message_content(
        self,
        signature: Any,
        inputs: Any,
        prefix: str = "",
        suffix: str = "",
        main_request: bool = False,
    ) -> str:
        return f"{prefix}Q {inputs.get('question')}{suffix}{'!' if main_request else ''}"

    def format_assistant_message_content(
        self, signature: Any, outputs: Any, missing_field_message: Any = None
    ) -> str:
        return f"A {outputs.get('answer', missing_field_message)}"


def texts(messages: Any) -> list[str]:
    return [str(message["content"]) for message in messages]


def test_each_hook_writes_its_part() -> None:
    """The names and parameters are DSPy's."""
    signature = make_signature(
        {
            "question": (str, dspy.InputField()),
            "history": (dspy.History, dspy.InputField()),
            "answer": (str, dspy.OutputField()),
        }
    )
    history = dspy.History(messages=[{"question": "h", "answer": "i"}])
    demos = [{"question": "d", "answer": "e"}]
    found = texts(Hooked().format(signature, demos, {"question": "q", "history": history}))
    assert found == ["FIELDS\n\nFORM\n\nTASK", "Q d", "A e", "Q h", "A i", "Q q!"]


def test_messages_and_reminder_may_be_replaced() -> None:
    """Whole groups of messages, too."""

    class Other(ChatAdapter):
        def format_system_message(self, signature: Any) -> str:
            return "S"

        def format_demos(self, signature: Any, demos: Any) -> Any:
            return [{"role": "user", "content": f"{len(demos)} demos"}]

        def format_conversation_history(
            self, signature: Any, history_field_name: str, inputs: Any
        ) -> Any:
            return [{"role": "user", "content": history_field_name}]

        def user_message_output_requirements(self, signature: Any) -> str:
            return "R"

    signature = make_signature(
        {"old": (dspy.History, dspy.InputField()), "answer": (str, dspy.OutputField())}
    )
    assert texts(Other().format(signature, [{}], {"old": None})) == ["S", "1 demos", "old", "R"]


def test_an_adapter_without_a_form_says_what_it_lacks() -> None:
    """The base alone writes no answers and reads none."""
    with pytest.raises(NotImplementedError, match="must say how its answers look"):
        Adapter().format(QA, [], {"question": "q"})
    with pytest.raises(NotImplementedError, match="must read answers"):
        Adapter().parse(QA, "x")


@pytest.mark.parametrize("adapter", [ChatAdapter(), XMLAdapter(), JSONAdapter(), BAMLAdapter()])
async def test_asked_directly_an_adapter_gives_rows(adapter: Adapter) -> None:
    """`adapter(lm, lm_kwargs, signature, demos, inputs)`, and the same awaited."""
    text = adapter.format_assistant_message_content(QA, {"answer": "x"})
    lm = FakeLM(default=text)
    given: dict[str, Any] = {
        "lm_kwargs": {}, "signature": QA, "demos": [], "inputs": {"question": "q"},
    }  # fmt: skip
    assert adapter(lm, **given) == [{"answer": "x"}]
    assert await adapter.acall(lm, **given) == [{"answer": "x"}]


# --- demos ---------------------------------------------------------------------------------------

EVERY = [ChatAdapter(), XMLAdapter(), JSONAdapter(), BAMLAdapter(), TwoStepAdapter(FakeLM([]))]
TWO = make_signature("question, hint -> answer, score: int | None")


def demo_messages(adapter: Adapter, demo: Any) -> list[str]:
    return texts(adapter.format(TWO, [demo], {"question": "q", "hint": "h"}))[1:-1]


@pytest.mark.parametrize("adapter", EVERY, ids=lambda adapter: type(adapter).__name__)
def test_demos_are_shown_with_what_they_have(adapter: Adapter) -> None:
    """As DSPy's optimisers save them, with marks of their own; what is missing is marked."""
    whole = {"question": "Q1", "hint": "H1", "answer": "A1", "score": 3}
    plain = demo_messages(adapter, whole)
    assert len(plain) == 2
    assert demo_messages(adapter, {"augmented": True, **whole, "other": 1}) == plain
    assert demo_messages(adapter, Example(whole)) == plain
    question, answer = demo_messages(adapter, {"question": "Q1", "answer": "A1"})
    assert NOT_GIVEN in question
    assert NOT_GIVEN in answer or '"score": null' in answer
    assert demo_messages(adapter, {"question": "Q1"}) == []
    assert demo_messages(adapter, {"question": "Q1", "answer": None, "score": None}) == []


@pytest.mark.parametrize("adapter", EVERY, ids=lambda adapter: type(adapter).__name__)
def test_none_in_a_demo_is_missing_unless_the_type_has_it(adapter: Adapter) -> None:
    """The model must not learn to answer `null` where a text is asked for."""
    missing = {"question": "Q1", "hint": None, "answer": None, "score": 3}
    absent = {"question": "Q1", "score": 3}
    assert demo_messages(adapter, missing) == demo_messages(adapter, absent)
    none = demo_messages(adapter, {"question": "Q", "hint": "H", "answer": "A", "score": None})
    assert NOT_GIVEN not in none[1]
    assert "null" in none[1]


@pytest.mark.parametrize("adapter", [ChatAdapter(), JSONAdapter(), XMLAdapter(), BAMLAdapter()])
@pytest.mark.parametrize(
    "value", [dspy.Code(code="a = 1\nb = '[[ ## answer ## ]]'"), dspy.Reasoning(content="so")]
)
def test_a_text_of_a_kind_is_shown_as_the_model_is_to_write_it(
    adapter: Adapter, value: Any
) -> None:
    """A model that writes as its demos and turns do would else give `{"code": ...}` as the code."""
    fields = {
        "question": (str, dspy.InputField()),
        "answer": (type(value), dspy.OutputField()),
        "others": (list[type(value)], dspy.OutputField()),
    }
    signature = make_signature(fields, "answer")
    outputs = {"answer": value, "others": [value]}
    shown = adapter.format_assistant_message_content(signature, outputs)
    assert "content" not in shown
    assert '"code"' not in shown
    assert adapter.parse(signature, shown) == outputs


def test_a_million_misfits_are_counted_and_not_listed() -> None:
    """Their details took minutes and four gigabytes, for a message that shows five of them."""
    fields = {"q": (str, dspy.InputField()), "answer": (list[int], dspy.OutputField())}
    signature = make_signature(fields, "answer")
    text = '{"answer": [' + ", ".join(['"x"'] * 20_000) + "]}"
    with pytest.raises(AdapterParseError, match="20000 places in it are wrong"):
        JSONAdapter().parse(signature, text)
    with pytest.raises(AdapterParseError, match=r"0: Input should be .*; 1: Input should be"):
        JSONAdapter().parse(signature, '{"answer": ["x", "y"]}')


class Halfway(ChatAdapter):
    """Forgets its base's `__init__`, as one that keeps something of its own easily does."""

    def __init__(self) -> None:
        self.own = 1


def test_an_adapter_that_forgets_the_init_of_its_base_works_without_a_fallback() -> None:
    """Told that it is no adapter, its author would look for the mistake elsewhere."""
    predict = dspy.Predict(QA)
    with dspy.context(lm=FakeLM([written("A"), "neither"]), adapter=Halfway()):
        assert predict(question="q?").answer == "A"
        with pytest.raises(AdapterParseError, match="`Halfway`"):
            predict(question="q?")


class OwnReading(TwoStepAdapter):
    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        return {"answer": f"read {completion}"}


def test_a_two_step_adapter_with_a_parse_of_its_own_reads_by_it() -> None:
    """An override that nobody calls would be a trap; no second model is asked then."""
    second = FakeLM(["never"])
    with dspy.context(lm=FakeLM(["free"]), adapter=OwnReading(second)):
        assert dspy.Predict(QA)(question="q?").answer == "read free"
    assert not second.requests


@pytest.mark.parametrize("gave", [[], None, {"answer": "A"}, ["A"]])
def test_a_call_of_ones_own_that_returns_no_rows_is_named(gave: Any) -> None:
    """An `IndexError` out of the depths would tell its author nothing."""

    class Own(ChatAdapter):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return gave

    with (
        dspy.context(lm=FakeLM(["x"]), adapter=Own()),
        pytest.raises(dspy.SettingsError, match=r"`Own.__call__` must return a list"),
    ):
        dspy.Predict(QA)(question="q?")
