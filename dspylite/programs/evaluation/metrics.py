"""Metrics that compare texts: exact match, token F1, an answer found in a passage.

They are those of SQuAD, HotPotQA and DPR, as DSPy computes them. Not here: metrics that ask a model
(`programs/evaluation/judges.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dspylite.errors import EvaluationError, InputFieldError

N = TypeVar("N", bound=float)

_PUNCTUATION = {ord(character): None for character in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_VERDICTS = ("yes", "no", "noanswer")


def normalize_text(s: str) -> str:
    """Reduce a text to what counts when answers are compared.

    Accents are set apart from their letters (Unicode NFD); case, ASCII punctuation, the words "a",
    "an" and "the", and repeated white space are dropped.

    Raises:
        InputFieldError: `s` is not a text.

    Example:
        >>> normalize_text("The  Eiffel-Tower!")
        'eiffeltower'
    """
    if not isinstance(s, str):
        raise InputFieldError(f"Only texts can be compared, not {s!r:.200} ({type(s).__name__}).")
    bare = unicodedata.normalize("NFD", s).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


# --- One prediction and one reference -------------------------------------------------------------


def em_score(prediction: str, ground_truth: str) -> bool:
    """Tell whether two texts are the same after `normalize_text`."""
    return normalize_text(prediction) == normalize_text(ground_truth)


def precision_score(prediction: str, ground_truth: str) -> float:
    """Return the part of the prediction's words that are in the reference, from 0 to 1.

    Example:
        >>> precision_score("in Paris, France", "Paris")
        0.3333333333333333
    """
    return _overlap(_words(prediction), _words(ground_truth))[0]


def f1_score(prediction: str, ground_truth: str) -> float:
    """Return the harmonic mean of the precision and the recall of words, from 0 to 1.

    Two texts without any word have no word in common: 0.

    Example:
        >>> f1_score("in Paris", "Paris")
        0.6666666666666666

    Source:
        SQuAD, https://arxiv.org/abs/1606.05250, section 5
    """
    precision, recall = _overlap(_words(prediction), _words(ground_truth))
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def hotpot_f1_score(prediction: str, ground_truth: str) -> float:
    """Return `f1_score`, but 0 where one of the two is "yes", "no" or "noanswer" and they differ.

    Source:
        HotPotQA, https://github.com/hotpotqa/hotpot/blob/master/hotpot_evaluate_v1.py
    """
    said, meant = normalize_text(prediction), normalize_text(ground_truth)
    if said != meant and (said in _VERDICTS or meant in _VERDICTS):
        return 0.0
    return f1_score(prediction, ground_truth)


def _words(text: str) -> list[str]:
    return normalize_text(text).split()


def _overlap(said: list[str], meant: list[str]) -> tuple[float, float]:
    """Return precision and recall of words; a word counts as often as it stands on both sides."""
    common = sum((Counter(said) & Counter(meant)).values())
    return (common / len(said), common / len(meant)) if common else (0.0, 0.0)


# --- One prediction and several references --------------------------------------------------------


def EM(prediction: str, answers_list: list[str]) -> bool:  # noqa: N802  # DSPy's spelling
    """Tell whether a text is the same as one of the references after `normalize_text`.

    Raises:
        EvaluationError: `answers_list` is not a list, or is empty.

    Example:
        >>> EM("The Eiffel Tower", ["Eiffel tower", "Louvre"])
        True
    """
    return _best(em_score, prediction, answers_list)


def F1(prediction: str, answers_list: list[str]) -> float:  # noqa: N802  # DSPy's spelling
    """Return the best `f1_score` over the references; otherwise as `EM`."""
    return _best(f1_score, prediction, answers_list)


def HotPotF1(prediction: str, answers_list: list[str]) -> float:  # noqa: N802  # DSPy's spelling
    """Return the best `hotpot_f1_score` over the references; otherwise as `EM`."""
    return _best(hotpot_f1_score, prediction, answers_list)


def _best(score: Callable[[str, str], N], prediction: str, answers: list[str]) -> N:
    if not isinstance(answers, list) or not answers:
        raise EvaluationError(
            f"The reference answers must be a list of at least one text, not {answers!r:.200}."
        )
    return max(score(prediction, answer) for answer in answers)


# --- Metrics --------------------------------------------------------------------------------------


def answer_exact_match(example: Any, pred: Any, trace: Any = None, frac: float = 1.0) -> bool:
    """Tell whether `pred.answer` is the example's `answer`, or one of them.

    Args:
        example: Its `answer` is a text, or a list of texts of which each is right.
        pred: Its `answer` is a text.
        trace: Not used.
        frac: 1 asks for the same text after `normalize_text`; less, for that `F1` at least.

    Raises:
        EvaluationError: The example's `answer` is neither a text nor a list.

    Example:
        >>> from dspylite.schema.records import Example, Prediction
        >>> example = Example(answer=["Eiffel Tower", "Tour Eiffel"])
        >>> answer_exact_match(example, Prediction(answer="The Eiffel tower."))
        True
        >>> answer_exact_match(example, Prediction(answer="Eiffel Tower in Paris"), frac=0.6)
        True
    """
    del trace
    answers = _answers_of(example)
    return EM(pred.answer, answers) if frac >= 1.0 else F1(pred.answer, answers) >= frac


def answer_passage_match(example: Any, pred: Any, trace: Any = None) -> bool:
    """Tell whether one of the passages `pred.context` contains the example's `answer`.

    Words are compared, so "art" is not found in "party". An answer that has no word left after
    `normalize_text` is found in every passage.

    Args:
        example: Its `answer` is a text, or a list of texts of which each is right.
        pred: Its `context` is a list of texts.
        trace: Not used.

    Raises:
        EvaluationError: The example's `answer` is neither a text nor a list.

    Example:
        >>> from dspylite.schema.records import Example, Prediction
        >>> found = Prediction(context=["Basalt is dark.", "Chalk is a white rock."])
        >>> answer_passage_match(Example(answer="white rock"), found)
        True

    Source:
        The matching by words is that of DPR, https://arxiv.org/abs/2004.04906
    """
    del trace
    answers = [_tokens(normalize_text(answer)) for answer in _answers_of(example)]
    return any(
        _contains(passage, answer)
        for passage in map(_tokens, map(normalize_text, pred.context))
        for answer in answers
    )


def _answers_of(example: Any) -> list[str]:
    answers = example.answer
    if isinstance(answers, str):
        return [answers]
    if isinstance(answers, list):
        return answers
    raise EvaluationError(
        f"The example's `answer` must be a text or a list of texts, not {answers!r:.200}."
    )


def _tokens(text: str) -> list[str]:
    """Cut a text into runs of letters, digits and marks; any other visible character is a token."""
    tokens: list[str] = []
    word: list[str] = []
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)
        # A character that this Python does not know yet is most likely a letter of a newer Unicode.
        if kind == "Cn" or kind[0] in "LNM":
            word.append(character)
            continue
        if word:
            tokens.append("".join(word))
            word = []
        if kind[0] not in "ZC":
            tokens.append(character)
    if word:
        tokens.append("".join(word))
    return [token.lower() for token in tokens]


def _contains(passage: Sequence[str], answer: Sequence[str]) -> bool:
    width = len(answer)
    return any(
        passage[start : start + width] == answer for start in range(len(passage) - width + 1)
    )
