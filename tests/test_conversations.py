"""`History`: turns before the question, in every adapter.

Not here: calls of tools in turns, and hostile texts (`test_injection.py`).
"""

from __future__ import annotations

from typing import Any

import pytest

import dspylite as dspy
from dspylite import (
    BAMLAdapter,
    ChatAdapter,
    History,
    InputField,
    JSONAdapter,
    OutputField,
    XMLAdapter,
)
from dspylite.adapters.base import Adapter
from dspylite.schema.signature import make_signature
from dspylite.testing import FakeLM

ADAPTERS = [ChatAdapter(), JSONAdapter(), XMLAdapter(), BAMLAdapter()]
every = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)


class Talk(dspy.Signature):
    """Answer."""

    question: str = InputField()
    history: History = InputField()
    hint: str = InputField(default="")
    answer: str = OutputField()
    score: int = OutputField()


def written(adapter: Adapter, turns: Any, demos: Any = ()) -> list[tuple[str, str]]:
    inputs = {"question": "now", "history": turns}
    messages = adapter.format(Talk, demos, inputs)
    return [(message["role"], str(message["content"])) for message in messages]


@every
def test_turns_stand_between_demos_and_the_question(adapter: Adapter) -> None:
    """Oldest first, each answer in the form that is asked for."""
    turns = [
        {"question": "q1", "answer": "a1", "score": 1},
        {"question": "q2", "answer": "a2", "score": 2},
    ]
    demo = {"question": "d", "answer": "e", "score": 0}
    found = written(adapter, History(messages=turns), [demo])
    assert [role for role, _ in found] == ["system", *["user", "assistant"] * 3, "user"]
    for place, word in enumerate(["d", "e", "q1", "a1", "q2", "a2", "now"], 1):
        assert word in found[place][1]
    for place, turn in ((4, turns[0]), (6, turns[1])):
        expected = {"answer": turn["answer"], "score": turn["score"]}
        assert adapter.parse(Talk, found[place][1]) == expected
    assert "history" not in found[0][1].partition("Task:")[0]
    assert "history" not in found[-1][1]


@every
@pytest.mark.parametrize(
    ("turn", "roles"),
    [
        ({"question": "q"}, ["user"]),
        ({"hint": "h"}, ["user"]),
        ({"answer": "a"}, ["assistant"]),
        ({"question": "q", "answer": None, "score": None}, ["user"]),
        ({"question": None, "answer": "a"}, ["assistant"]),
        ({"unknown": "x"}, []),
        ({"question": "q", "unknown": object()}, ["user"]),
        ({}, []),
    ],
)
def test_partial_turns_say_what_they_have(
    adapter: Adapter, turn: dict[str, Any], roles: list[str]
) -> None:
    """Unknown keys and None are passed over, and nothing is made up in their place."""
    found = written(adapter, History(messages=[turn]))[1:-1]
    assert [role for role, _ in found] == roles
    assert not any("not given" in text or "null" in text for _, text in found)


@every
def test_a_conversation_may_come_as_saved(adapter: Adapter) -> None:
    """As a list of turns, as the dict of a saved `History`, or not at all."""
    turns = [{"question": "q1", "answer": "a1"}]
    expected = written(adapter, History(messages=turns))
    assert written(adapter, turns) == expected
    assert written(adapter, {"messages": turns}) == expected
    assert len(written(adapter, None)) == 2
    assert written(adapter, History(messages=[])) == written(adapter, None)


@pytest.mark.parametrize("wrong", ["text", 5, [1], {"turns": []}])
def test_what_is_no_conversation_is_refused(wrong: Any) -> None:
    """By name, before anything is sent."""
    with pytest.raises(dspy.InputFieldError, match="`history` must be a `History`"):
        written(ADAPTERS[0], wrong)


def test_a_conversation_that_may_be_missing_is_one() -> None:
    """`History | None` is as usual as `History`."""
    fields = {
        "q": (str, InputField()),
        "past": (History | None, InputField(default=None)),
        "a": (str, OutputField()),
    }
    signature = make_signature(fields)
    past = History(messages=[{"q": "x", "a": "y"}])
    assert len(ChatAdapter().format(signature, [], {"q": "z", "past": past})) == 4
    assert len(ChatAdapter().format(signature, [], {"q": "z", "past": None})) == 2


def test_a_program_may_hold_the_conversation_itself() -> None:
    """Inputs and outputs of a call are a turn, as in DSPy's guides."""
    lm = FakeLM(lambda request: {"answer": f"said {len(request.messages)}", "score": 1})
    history = History(messages=[])
    with dspy.context(lm=lm):
        predict = dspy.Predict(Talk)
        for question in ("one", "two"):
            found = predict(question=question, history=history)
            history.messages.append({"question": question, **found})
    assert [turn["answer"] for turn in history.messages] == ["said 2", "said 4"]
