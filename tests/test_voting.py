"""`majority` and `MultiChainComparison`: one answer out of several.

Not here: how the answers came about (`test_sampling.py`).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite import Completions, InputFieldError, MultiChainComparison, Prediction, majority
from dspylite.programs.voting import default_normalize
from dspylite.testing import FakeLM, FakeServer, Reply
from tests.caching import lm_at, written


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(answer=written("said by default")) as server:
        yield server


# --- majority ------------------------------------------------------------------------------------

COLUMNS = {"note": ["1", "2", "3", "4"], "answer": ["Rome", "The Paris!", "paris", "Oslo"]}
ROWS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]


@pytest.mark.parametrize(
    "given",
    [
        Prediction.from_completions(COLUMNS),
        Completions(COLUMNS),
        Prediction.from_completions(COLUMNS).completions,
        ROWS,
        tuple(ROWS),
        [Prediction(row) for row in ROWS],
        [dspy.Example(row) for row in ROWS],
    ],
    ids=[
        "prediction",
        "completions",
        "its completions",
        "dicts",
        "tuple",
        "predictions",
        "records",
    ],
)
def test_commonest_value_wins_and_its_first_answer_is_returned_whole(given: Any) -> None:
    """In every form in which several answers come."""
    found = majority(given)
    assert found == Prediction(note="2", answer="The Paris!")
    assert isinstance(found, Prediction)
    assert len(found.completions) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "a", "b"], "b"),  # a tie: the one that came first
        (["a", "b", "B.", "c"], "b"),
        (["", "...", "...", "x"], "x"),  # nothing is left of the others
        (["B", "A", "(a)"], "A"),  # a choice, which DSPy takes for an article
        (["...", ""], "..."),  # of none is anything left
        (["An  apple", "apple", "pear"], "An  apple"),
        (["\u00e9t\u00e9", "e\u0301te\u0301", "x"], "\u00e9t\u00e9"),
        ([3, 4, 4], 4),  # what is no text is compared as it is
        ([["x", "y"], ["y"], ["y"]], ["y"]),
        ([{"k": 1}, {"k": 2}, {"k": 2}], {"k": 2}),
        ([None, "a", None], "a"),
    ],
)
def test_which_value_is_the_commonest(values: list[Any], expected: Any) -> None:
    """Most rows are what DSPy answers; it cannot compare what is no text."""
    assert majority([{"answer": value} for value in values]).answer == expected


def test_another_field_or_comparison_may_be_asked_for() -> None:
    """The last output is only the usual one."""
    rows = [{"city": "Rome", "answer": "x"}, {"city": "rome", "answer": "y"}, {"city": "Oslo"}]
    assert majority(rows, field="city").city == "Rome"
    assert majority([{"a": "x"}, {"a": "X"}, {"a": "X"}], normalize=None).a == "X"
    assert majority([{"a": "xa"}, {"a": "ya"}, {"a": "yb"}], lambda text: text[1]).a == "xa"
    skip_x = majority([{"a": "x"}, {"a": "x"}, {"a": "y"}], lambda v: None if v == "x" else v)
    assert skip_x.a == "y"


def test_majority_of_a_call_keeps_what_the_call_cost(server: FakeServer) -> None:
    """All completions were paid for."""
    server.script(Reply(texts=[written("Rome"), written("Paris"), written("paris")]))
    with dspy.context(lm=lm_at(server, api_key="sk-test")):
        several = dspy.Predict("question -> answer", n=3)(question="q")
    found = majority(several)
    assert found.answer == "Paris"
    assert found.get_lm_usage() == several.get_lm_usage()
    assert found.get_lm_attempts() == several.get_lm_attempts() != ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no answer to choose from"),
        ("Paris", "takes a prediction"),
        ({"answer": "x"}, "takes a prediction"),
        (3, "takes a prediction"),
        (["Paris"], "'Paris'"),
        ([{"answer": "x"}, {"anwser": "x"}], "has no `answer`.*`anwser`"),
        ([{}], "has no"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(given: Any, said: str) -> None:
    """The error says what was given."""
    with pytest.raises(InputFieldError, match=said):
        majority(given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The,  Eiffel  Tower!", "eiffel tower"),
        ("An Apple a day", "apple day"),
        ("theatre", "theatre"),
        ("  ", None),
        ("a.", "a"),
        ("the a", "the a"),
        ("\u00c9t\u00e9", "e\u0301te\u0301"),
    ],
)
def test_normalized_text_is_what_dspy_makes_of_it(text: str, expected: str | None) -> None:
    """But for a lone article, of which DSPy leaves nothing, so that choice A never wins."""
    assert default_normalize(text) == expected


# --- MultiChainComparison ------------------------------------------------------------------------


class Rhyme(dspy.Signature):
    """Find a rhyme."""

    word: str = dspy.InputField()
    rhyme: str = dspy.OutputField()
    score: float = dspy.OutputField()


ATTEMPTS: list[dict[str, Any]] = [
    {"reasoning": "It ends\nin -at.", "rhyme": "hat", "score": 0.5},
    {"rationale": "Short vowels.", "reasoning": "unused", "rhyme": "bat", "score": 0.75},
    {"rhyme": "sat", "score": 0.25},
]


@pytest.mark.parametrize("awaited", [False, True], ids=["called", "awaited"])
@pytest.mark.parametrize(
    "given",
    [
        ATTEMPTS,
        [Prediction(attempt) for attempt in ATTEMPTS],
    ],
    ids=["dicts", "predictions"],
)
async def test_attempts_are_shown_and_one_answer_comes_back(given: Any, awaited: bool) -> None:
    """Each with its reasoning, where it has one, whole."""
    lm = FakeLM(default={"rationale": "Weighed.", "rhyme": "cat", "score": 1})
    compare = MultiChainComparison(Rhyme)
    with dspy.context(lm=lm):
        if awaited:
            found = await compare.acall(given, word="mat")
        else:
            found = await anyio.to_thread.run_sync(lambda: compare(given, word="mat"))
    assert (found.rationale, found.rhyme, found.score) == ("Weighed.", "cat", 1.0)
    text = str(lm.requests[0].messages[-1]["content"])
    assert "[[ ## reasoning_attempt_1 ## ]]\nReasoning: It ends\nin -at.\nAnswer: 0.5\n" in text
    assert "[[ ## reasoning_attempt_2 ## ]]\nReasoning: Short vowels.\nAnswer: 0.75\n" in text
    assert "[[ ## reasoning_attempt_3 ## ]]\nAnswer: 0.25\n" in text
    assert lm.requests[0].params["temperature"] == 0.7


def test_completions_of_one_call_can_be_compared() -> None:
    """A prediction of `n` answers is `n` attempts."""
    lm = FakeLM([{"reasoning": "r", "answer": "a"}, {"rationale": "w", "answer": "b"}])
    with dspy.context(lm=lm):
        several = dspy.ChainOfThought("question -> answer", n=3)(question="q")
        compare = MultiChainComparison("question -> answer")
        assert compare(several, question="q").answer == "b"
        assert compare.predict.signature.signature == (
            "question, reasoning_attempt_1, reasoning_attempt_2, reasoning_attempt_3"
            " -> rationale, answer"
        )


def test_parts_and_parameters_have_dspys_names() -> None:
    """Saved programs find the predictor by its path."""
    compare = MultiChainComparison(Rhyme, M=2, temperature=None, max_tokens=50)
    assert [path for path, _ in compare.named_predictors()] == ["predict"]
    assert (compare.M, compare.last_key) == (2, "score")
    assert compare.predict.config == {"temperature": None, "max_tokens": 50}
    assert compare.predict.signature.instructions == "Find a rhyme."


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ATTEMPTS[:2], "compares 3 attempts and was given 2; .*M=3"),
        ([*ATTEMPTS, *ATTEMPTS], "given 6"),
        ([{"rhyme": "x"}] * 3, "has no `score`"),
        ("abc", "takes a prediction"),
        ([1, 2, 3], "must be a prediction or a dict"),
    ],
)
def test_attempts_that_do_not_fit_are_refused_before_any_request(given: Any, said: str) -> None:
    """The commonest mistake is another number of attempts than `M`."""
    lm = FakeLM()
    with dspy.context(lm=lm), pytest.raises(InputFieldError, match=said):
        MultiChainComparison(Rhyme)(given, word="mat")
    assert lm.requests == ()


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3"])
def test_impossible_number_of_attempts_is_refused_at_once(count: Any) -> None:
    """When the object is made."""
    with pytest.raises(dspy.SettingsError, match="`M` must be a whole number"):
        MultiChainComparison(Rhyme, M=count)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copy_compares_like_the_original(copied: Callable[[Any], Any]) -> None:
    """For processes."""
    twin = copied(MultiChainComparison(Rhyme, M=3))
    with dspy.context(lm=FakeLM([{"rationale": "w", "rhyme": "cat", "score": 1}])):
        assert twin(ATTEMPTS, word="mat").rhyme == "cat"
