"""The metrics: the values that DSPy 3.4.1 gives, and what they do with what is no text."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dspylite as dspy
from dspylite.evaluate import EM
from dspylite.evaluate.auto_evaluation import DecompositionalSemanticRecallPrecision
from dspylite.evaluate.metrics import (
    F1,
    HotPotF1,
    em_score,
    f1_score,
    hotpot_f1_score,
    precision_score,
)
from dspylite.programs.evaluation.judges import harmonic_mean
from dspylite.testing import FakeLM

# Computed by DSPy 3.4.1: prediction, reference, the prediction normalised, exact match, F1, F1 of
# HotPotQA, precision.
PAIRS = [
    ("Paris", "paris", "paris", True, 1.0, 1.0, 1.0),
    ("The Eiffel Tower!", "eiffel  tower", "eiffel tower", True, 1.0, 1.0, 1.0),
    ("Eiffel Tower is in Paris", "Paris", "eiffel tower is in paris", False, 1 / 3, 1 / 3, 0.2),
    ("Paris, France", "Paris", "paris france", False, 2 / 3, 2 / 3, 0.5),
    ("in Paris in France", "Paris in in in", "in paris in france", False, 0.75, 0.75, 0.75),
    ("", "", "", True, 0.0, 0.0, 0.0),
    ("the", "a", "", True, 0.0, 0.0, 0.0),
    ("", "Paris", "", False, 0.0, 0.0, 0.0),
    ("Paris", "", "paris", False, 0.0, 0.0, 0.0),
    ("yes", "yes", "yes", True, 1.0, 1.0, 1.0),
    ("Yes.", "no", "yes", False, 0.0, 0.0, 0.0),
    ("yes it is", "yes", "yes it is", False, 0.5, 0.0, 1 / 3),
    ("yes", "yes it is", "yes", False, 0.5, 0.0, 1.0),
    ("no", "No!", "no", True, 1.0, 1.0, 1.0),
    ("noanswer", "no answer", "noanswer", False, 0.0, 0.0, 0.0),
    ("No-Answer", "noanswer", "noanswer", True, 1.0, 1.0, 1.0),
    ("caf\xe9", "cafe\u0301", "cafe\u0301", True, 1.0, 1.0, 1.0),
    ("caf\xe9", "cafe", "cafe\u0301", False, 0.0, 0.0, 0.0),
    ("\u0130stanbul", "istanbul", "i\u0307stanbul", False, 0.0, 0.0, 0.0),
    ("Stra\xdfe", "STRASSE", "stra\xdfe", False, 0.0, 0.0, 0.0),
    ("1,000", "1000", "1000", True, 1.0, 1.0, 1.0),
    ("don't", "dont", "dont", True, 1.0, 1.0, 1.0),
    ("\u4e2d\u6587 a", "\u4e2d\u6587", "\u4e2d\u6587", True, 1.0, 1.0, 1.0),
    ("a\xa0b", "b", "b", True, 1.0, 1.0, 1.0),
    ("\u201cquoted\u201d", "quoted", "\u201cquoted\u201d", False, 0.0, 0.0, 0.0),
    ("an-a", "ana", "ana", True, 1.0, 1.0, 1.0),
    ("a.b", "b", "ab", False, 0.0, 0.0, 0.0),
    ("a b c d", "b d f", "b c d", False, 2 / 3, 2 / 3, 2 / 3),
    ("b b b", "b", "b b b", False, 0.5, 0.5, 1 / 3),
]

# Computed by DSPy 3.4.1: answer, passages, whether one of them has it.
PASSAGES: list[tuple[str | list[str], list[str], bool]] = [
    ("white rock", ["Basalt is dark.", "Chalk is a white rock."], True),
    ("art", ["party"], False),
    ("art", ["the art, now"], True),
    ("the", ["anything"], True),
    ("", [], False),
    ("", ["x"], True),
    ("caf\xe9", ["un cafe\u0301 noir"], True),
    ("cafe", ["un caf\xe9 noir"], False),
    ("3.5", ["about 35 m"], True),
    ("\u4e2d", ["\u4e2d\u6587"], False),
    ("$5", ["5 dollars"], True),
    ("new york city", ["new york"], False),
    (["no", "new york"], ["I like New-York", "New York"], True),
    ("a\u200db", ["a b"], True),
    ("x\u2013y", ["x \u2013 y"], True),
    ("\U0001f600", ["ok \U0001f600!"], True),
    ("\xad", ["x"], True),
]


@pytest.mark.parametrize(
    ("prediction", "reference", "normal", "exact", "f1", "hotpot", "precision"), PAIRS
)
def test_scores_of_two_texts_are_those_of_dspy(
    prediction: str,
    reference: str,
    normal: str,
    exact: bool,
    f1: float,
    hotpot: float,
    precision: float,
) -> None:
    """Numbers of papers and dashboards must not move because the runtime was exchanged."""
    assert dspy.normalize_text(prediction) == normal
    assert em_score(prediction, reference) is exact
    assert f1_score(prediction, reference) == pytest.approx(f1, rel=1e-15)
    assert hotpot_f1_score(prediction, reference) == pytest.approx(hotpot, rel=1e-15)
    assert precision_score(prediction, reference) == pytest.approx(precision, rel=1e-15)


@pytest.mark.parametrize(("answer", "passages", "found"), PASSAGES)
def test_an_answer_is_found_in_the_passages_where_dspy_finds_it(
    answer: str | list[str], passages: list[str], found: bool
) -> None:
    """DPR's cutting of words is done here without its regular-expression library."""
    example, prediction = dspy.Example(answer=answer), dspy.Prediction(context=passages)
    assert dspy.answer_passage_match(example, prediction) is found
    assert dspy.answer_passage_match(example, prediction, None) is found


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_keep_what_holds_for_every_text(one: str, other: str) -> None:
    """Normal forms are stable; scores lie in 0..1 and F1 does not care which side is which."""
    normal = dspy.normalize_text(one)
    assert dspy.normalize_text(normal).split() == dspy.normalize_text(f" {normal} ").split()
    assert em_score(one, one)
    assert 0 <= precision_score(one, other) <= 1
    assert 0 <= f1_score(one, other) <= 1
    assert f1_score(one, other) == pytest.approx(f1_score(other, one))
    assert hotpot_f1_score(one, other) in (0, f1_score(one, other))
    example = dspy.Example(answer=one)
    assert dspy.answer_passage_match(example, dspy.Prediction(context=[f"{other} | {one} | x"]))


def test_the_best_reference_counts() -> None:
    assert EM("Paris", ["London", "paris"]) is True
    assert EM("Paris", ["London"]) is False
    assert F1("in Paris", ["London", "Paris", "in"]) == 2 / 3
    assert HotPotF1("yes it is", ["yes", "it"]) == 0.5


@pytest.mark.parametrize("score", [EM, F1, HotPotF1])
@pytest.mark.parametrize("answers", [[], "Paris", ("Paris",), None])
def test_references_that_are_no_list_are_refused(score: Any, answers: Any) -> None:
    """A text would be taken for a list of letters, of which one is soon found."""
    with pytest.raises(dspy.EvaluationError, match="list of at least one text"):
        score("Paris", answers)
    assert issubclass(dspy.EvaluationError, ValueError)


@pytest.mark.parametrize("value", [None, 3, b"Paris", ["Paris"]])
def test_what_is_no_text_is_named(value: Any) -> None:
    """`None` from a model's optional field is no answer, and no riddle from `unicodedata`."""
    with pytest.raises(dspy.InputFieldError, match="Only texts can be compared"):
        dspy.normalize_text(value)


@pytest.mark.parametrize(
    ("answer", "frac", "matches"),
    [
        ("Eiffel Tower", 1.0, True),
        ("Eiffel Tower in Paris", 1.0, False),
        ("Eiffel Tower in Paris", 0.6, True),
        ("Eiffel Tower in Paris", 0.7, False),
        ("Louvre", 2, True),
        ("nothing of it", 0, True),
    ],
)
def test_exact_match_takes_one_answer_or_several_and_a_fraction(
    answer: str, frac: float, matches: bool
) -> None:
    example = dspy.Example(answer=["The Eiffel Tower", "Louvre"])
    prediction = dspy.Prediction(answer=answer)
    assert dspy.answer_exact_match(example, prediction, frac=frac) is matches
    only = dspy.Example(answer=answer)
    assert dspy.answer_exact_match(only, prediction) is True


@pytest.mark.parametrize("metric", [dspy.answer_exact_match, dspy.answer_passage_match])
def test_a_reference_of_another_kind_is_named(metric: Any) -> None:
    with pytest.raises(dspy.EvaluationError, match="must be a text or a list of texts, not 3"):
        metric(dspy.Example(answer=3), dspy.Prediction(answer="3", context=["3"]))


# --- Metrics that ask a model ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "mean"),
    [
        ((0, 0), 0.0),
        ((1, 1), 1.0),
        ((0.5, 1.0), 2 / 3),
        ((1.7, 0.5), 2 / 3),
        ((-1, 0.5), 0.0),
        ((0.2, 0.3), 0.24),
        ((0.66, 0.66), 0.66),
        ((math.nan, 1.0), 0.0),
    ],
)
def test_two_shares_are_joined_as_dspy_does(shares: tuple[float, float], mean: float) -> None:
    """But for NaN, which counts as 0 here and as 1 in DSPy."""
    assert harmonic_mean(*shares) == mean


EXAMPLE = dspy.Example(question="Why?", response="It is warm and wet.")
PREDICTION = dspy.Prediction(response="It is warm.", context=["It was warm."])
JUDGES = {
    "semantic": (lambda **o: dspy.SemanticF1(**o), [{"recall": 0.5, "precision": 1.0}]),
    "decomposed": (
        lambda **o: dspy.SemanticF1(decompositional=True, **o),
        [
            {
                "ground_truth_key_ideas": "warm; wet",
                "system_response_key_ideas": "warm",
                "discussion": "one of two",
                "recall": 0.5,
                "precision": 1.0,
            }
        ],
    ),
    "grounded": (
        lambda **o: dspy.CompleteAndGrounded(**o),
        [
            {
                "ground_truth_key_ideas": "warm; wet",
                "system_response_key_ideas": "warm",
                "discussion": "one of two",
                "completeness": 0.5,
            },
            {"system_response_claims": "warm", "discussion": "supported", "groundedness": 1.0},
        ],
    ),
}


@pytest.fixture(params=JUDGES)
def judge(request: pytest.FixtureRequest) -> tuple[Any, FakeLM]:
    make, answers = JUDGES[request.param]
    scripted = [{"reasoning": "...", **answer} for answer in answers]
    return make, FakeLM(scripted * 2)


def test_a_judge_gives_a_score_or_with_a_trace_whether_it_suffices(
    judge: tuple[Any, FakeLM],
) -> None:
    """Optimisers pass a trace and want to know whether an example is good enough to be shown."""
    make, lm = judge
    with dspy.context(lm=lm):
        score = make()(EXAMPLE, PREDICTION).score
        verdict = make(threshold=0.67)(EXAMPLE, PREDICTION, trace=[]).score
    assert (score, verdict) == (2 / 3, False)


@pytest.mark.anyio
async def test_a_judge_is_awaited(judge: tuple[Any, FakeLM]) -> None:
    make, lm = judge
    with dspy.context(lm=lm):
        assert (await make().acall(EXAMPLE, PREDICTION, [])).score is True  # 2/3 >= 0.66


def test_a_judge_shows_the_model_what_it_compares(caplog: pytest.LogCaptureFixture) -> None:
    lm = FakeLM([{"reasoning": "...", **answer} for answer in JUDGES["grounded"][1]])
    with dspy.context(lm=lm):
        dspy.CompleteAndGrounded()(EXAMPLE, PREDICTION)
    first, second = (str(request.messages[-1]["content"]) for request in lm.requests)
    assert all(text in first for text in ("Why?", "warm and wet", "It is warm."))
    assert all(text in second for text in ("Why?", "It was warm.", "It is warm."))
    assert caplog.text == ""  # a list of passages is no mistake


def test_predictors_of_the_judges_have_the_names_and_fields_of_dspy() -> None:
    """A state that DSPy saved is loaded by these names."""
    asked = "question, ground_truth, system_response -> reasoning"
    ideas = "ground_truth_key_ideas, system_response_key_ideas, discussion"

    def parts(module: Any) -> dict[str, str]:
        named = ((name, part.signature) for name, part in module.named_predictors())
        return {
            name: f"{', '.join(each.input_fields)} -> {', '.join(each.output_fields)}"
            for name, each in named
        }

    assert {
        "semantic": parts(dspy.SemanticF1()),
        "decomposed": parts(dspy.SemanticF1(decompositional=True)),
        "grounded": parts(dspy.CompleteAndGrounded()),
    } == {
        "semantic": {"module.predict": f"{asked}, recall, precision"},
        "decomposed": {"module.predict": f"{asked}, {ideas}, recall, precision"},
        "grounded": {
            "completeness_module.predict": f"{asked}, {ideas}, completeness",
            "groundedness_module.predict": (
                "question, retrieved_context, system_response -> reasoning, "
                "system_response_claims, discussion, groundedness"
            ),
        },
    }
    assert DecompositionalSemanticRecallPrecision.output_fields["recall"].annotation is float


def test_a_passage_that_is_one_long_word_is_read_once() -> None:
    """As of a language without blanks; letter by letter it took minutes."""
    passage = "字" * 1_500_000
    assert not dspy.answer_passage_match(
        dspy.Example(answer="字"), dspy.Prediction(context=[passage])
    )
