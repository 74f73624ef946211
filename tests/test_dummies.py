"""`DummyLM` and `DummyVectorizer`: what tests written for DSPy rely on.

What DSPy 3.4.1 gives was found by running it. Not here: `FakeLM` (`test_fake_models.py`).
"""

from __future__ import annotations

import copy
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

import dspylite as dspy
from dspylite.errors import LMConfigurationError, MissingExtraError
from dspylite.testing import DummyLM, DummyVectorizer, FakeLM

QA = "question -> answer"


def answers(lm: dspy.BaseLM, count: int, predict: Any = None, **inputs: Any) -> list[Any]:
    predict = predict or dspy.Predict(QA)
    with dspy.context(lm=lm):
        return [predict(**(inputs or {"question": "q"})).answer for _ in range(count)]


def test_list_is_taken_one_by_one_and_its_end_is_told() -> None:
    """DSPy's words, which tests compare with."""
    assert answers(DummyLM([{"answer": "red"}, {"answer": "blue"}]), 3) == [
        "red",
        "blue",
        "No more responses",
    ]


def test_dict_goes_by_a_piece_of_the_last_message() -> None:
    """Whoever asks, and in whatever order."""
    lm = DummyLM({"sky": {"answer": "blue"}, "grass": {"answer": "green"}})
    assert answers(lm, 2, question="What is the colour of grass?") == ["green", "green"]
    assert lm("What of the sea?") == ["No more responses"]


def test_demo_with_the_same_inputs_answers() -> None:
    """`follow_examples` tests that demos come to the model."""
    lm = DummyLM([{"answer": "red"}], follow_examples=True)
    predict = dspy.Predict(QA)
    predict.demos = [
        dspy.Example(question="Sky?", answer="blue"),
        dspy.Example(question="Grass?", answer="green"),
    ]
    assert answers(lm, 1, predict, question="Sky?") == ["blue"]
    assert answers(lm, 1, predict, question="Grass?") == ["green"]
    assert lm("Sea?") == ["No more responses"]


def test_reasoning_comes_with_each_answer() -> None:
    """As from a model that thinks before it writes."""
    (answer,) = DummyLM([{"answer": "red"}], reasoning=True)("q")
    assert isinstance(answer, dict)
    assert answer["reasoning_content"] == "Some reasoning"
    assert "red" in answer["text"]


def test_outputs_are_written_in_the_form_of_the_adapter() -> None:
    """The program under test uses the same one."""
    adapter = dspy.JSONAdapter()
    with dspy.context(adapter=adapter):
        assert answers(DummyLM([{"answer": "red"}], adapter=adapter), 1) == ["red"]


def test_several_answers_are_taken_for_one_call() -> None:
    """`n` takes as many from the list, as DSPy does."""
    lm = DummyLM([{"answer": "red"}, {"answer": "blue"}, {"answer": "green"}])
    with dspy.context(lm=lm):
        several = dspy.Predict(QA, n=2)(question="q")
    assert several.completions.answer == ["red", "blue"]
    assert answers(lm, 1) == ["green"]
    with dspy.track_usage() as tracker:
        DummyLM([{"answer": "a"}, {"answer": "b"}])("q", n=2)
    assert (tracker.total.calls, tracker.total.completion_tokens) == (1, 22)  # words of both


@pytest.mark.anyio
async def test_awaited_call_takes_the_next_answer() -> None:
    """Sync and async share the script."""
    lm = DummyLM([{"answer": "red"}, {"answer": "blue"}])
    with dspy.context(lm=lm):
        assert (await dspy.Predict(QA).acall(question="q")).answer == "red"
    assert answers(lm, 1) == ["blue"]


def test_it_is_a_fake_with_dspys_attributes() -> None:
    """`requests` and `hold` work, and DSPy's own reads too."""
    script = [{"answer": "red"}]
    lm = DummyLM(script)
    assert isinstance(lm, FakeLM)
    assert (lm.model, lm.kwargs) == ("dummy", {"temperature": 0.0, "max_tokens": 1000})
    assert (lm.answers, lm.follow_examples, lm.reasoning) == (script, False, False)
    answers(lm, 1)
    messages, outputs = lm.get_convo(0)
    assert messages[-1]["content"].startswith("[[ ## question ## ]]")
    assert "red" in outputs[0]
    assert len(lm.requests) == 1
    assert script == [{"answer": "red"}]


def test_copy_shares_the_script() -> None:
    """Optimisers and retries copy LMs."""
    lm = DummyLM([{"answer": "red"}, {"answer": "blue"}])
    assert [answers(lm.copy(temperature=1.0), 1), answers(copy.deepcopy(lm), 1)] == [
        ["red"],
        ["blue"],
    ]


@pytest.mark.parametrize(
    ("given", "kind"), [(["red"], "list of dicts"), ({"sky": "blue"}, "dict of dicts")]
)
def test_other_scripts_are_refused_when_it_is_made(given: Any, kind: str) -> None:
    """`FakeLM` takes them, and the error says so."""
    with pytest.raises(LMConfigurationError, match=f"takes a {kind}.*`FakeLM` takes texts"):
        DummyLM(given)


def test_each_answer_is_given_once_to_many_threads() -> None:
    """None twice, none lost."""
    lm = DummyLM([{"answer": str(n)} for n in range(160)])
    together = threading.Barrier(16)

    def take(_: int) -> list[Any]:
        together.wait(10)
        return answers(lm, 10)

    with ThreadPoolExecutor(16) as pool:
        taken = [answer for some in pool.map(take, range(16)) for answer in some]
    assert sorted(taken, key=int) == [str(n) for n in range(160)]


# --- DummyVectorizer -----------------------------------------------------------------------------


def test_vectors_are_those_of_dspy() -> None:
    """Nearest neighbours in a test written for DSPy stay the same."""
    pytest.importorskip("numpy")
    assert DummyVectorizer(8)(["hello", "a", ""]).tolist() == [
        [-0.25, -0.25, -0.25, 0.25, -0.25, -0.25, 0.75, 0.25],
        [0.0] * 8,
        [0.0] * 8,
    ]
    found = DummyVectorizer(max_length=5, n_gram=3)(["the quick brown fox", "über"])
    assert (found.dtype.name, found.shape) == ("float32", (2, 5))
    assert found.tolist() == [
        pytest.approx([0.335410, 0.335410, -0.223607, 0.335410, -0.782624], abs=1e-6),
        pytest.approx([-0.365148, -0.365148, -0.365148, 0.547723, 0.547723], abs=1e-6),
    ]


def test_vectorizer_leaves_the_random_numbers_of_the_process_alone() -> None:
    """DSPy seeds them for everybody."""
    random.seed(7)
    expected = random.random()
    random.seed(7)
    DummyVectorizer()
    assert random.random() == expected


def test_vectorizer_without_numpy_says_what_to_install() -> None:
    """It is an extra."""
    with mock.patch.dict(sys.modules, {"numpy": None}):
        vectorizer = DummyVectorizer()
        with pytest.raises(MissingExtraError, match=r"dspylite\[numpy\].*FakeEmbedder"):
            vectorizer(["a"])
