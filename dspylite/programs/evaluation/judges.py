"""Metrics that ask a model: `SemanticF1` and `CompleteAndGrounded`.

Not here: metrics that compare texts (`programs/evaluation/metrics.py`).
"""

from __future__ import annotations

from typing import Any

from dspylite.abc import Io
from dspylite.programs.base import Planned
from dspylite.programs.predict import ChainOfThought
from dspylite.schema.records import Prediction
from dspylite.schema.signature import InputField, OutputField, Signature

# The fields are DSPy's, in its order, so that programs saved there load here.


class SemanticRecallPrecision(Signature):
    """Judge how far a response says the same as a reference: its recall and its precision.

    Where you reason first, list the main points of each text and look for them in the other.
    """

    question: str = InputField()
    ground_truth: str = InputField()
    system_response: str = InputField()
    recall: float = OutputField(desc="part of the ground truth that the response says, 0.0 to 1.0")
    precision: float = OutputField(
        desc="part of the response that the ground truth says, 0.0 to 1.0"
    )


class DecompositionalSemanticRecallPrecision(Signature):
    """Judge how far a response says the same as a reference, point by point.

    List the main points of both texts, discuss which they share, then give recall and precision.
    """

    question: str = InputField()
    ground_truth: str = InputField()
    system_response: str = InputField()
    ground_truth_key_ideas: str = OutputField(desc="list of the ground truth's main points")
    system_response_key_ideas: str = OutputField(desc="list of the response's main points")
    discussion: str = OutputField(desc="which points both texts share")
    recall: float = OutputField(desc="part of the ground truth that the response says, 0.0 to 1.0")
    precision: float = OutputField(
        desc="part of the response that the ground truth says, 0.0 to 1.0"
    )


class AnswerCompleteness(Signature):
    """Judge how much of a reference a response says.

    List the main points of both texts, discuss which they share, then give the completeness.
    """

    question: str = InputField()
    ground_truth: str = InputField()
    system_response: str = InputField()
    ground_truth_key_ideas: str = OutputField(desc="list of the ground truth's main points")
    system_response_key_ideas: str = OutputField(desc="list of the response's main points")
    discussion: str = OutputField(desc="which points both texts share")
    completeness: float = OutputField(
        desc="part of the ground truth that the response says, 0.0 to 1.0"
    )


class AnswerGroundedness(Signature):
    """Judge how much of a response rests on the documents that were found for it.

    List what it claims beyond the obvious, discuss which of it follows from the documents and
    common sense, then give the groundedness.
    """

    question: str = InputField()
    retrieved_context: str | list[str] = InputField()
    system_response: str = InputField()
    system_response_claims: str = OutputField(desc="list of the response's claims worth checking")
    discussion: str = OutputField(desc="which claims the documents support")
    groundedness: float = OutputField(
        desc="part of the response that the documents support, 0.0 to 1.0"
    )


class SemanticF1(Planned):
    """Scores a response by asking a model how far it says the same as the example's.

    The score is the harmonic mean of the recall and precision that the model gives, each held
    within 0 and 1. Reads `example.question`, `example.response` and `pred.response`.

    Args:
        threshold: The score from which a response passes, where a `trace` is given.
        decompositional: Whether the model first lists the main points of both texts.

    Attributes:
        threshold: As given.
        module: The program that asks.

    Example:
        >>> from dspylite.runtime.settings import context
        >>> from dspylite.schema.records import Example
        >>> from dspylite.testing import FakeLM
        >>> judged = {"reasoning": "Half of it.", "recall": 0.5, "precision": 1.0}
        >>> with context(lm=FakeLM([judged])):
        ...     SemanticF1()(
        ...         Example(question="Why?", response="It is warm and wet."),
        ...         Prediction(response="It is warm."),
        ...     ).score
        0.6666666666666666
    """

    def __init__(self, threshold: float = 0.66, decompositional: bool = False) -> None:
        super().__init__()
        self.threshold = threshold
        self.module: ChainOfThought[..., Any] = ChainOfThought(
            DecompositionalSemanticRecallPrecision if decompositional else SemanticRecallPrecision
        )

    async def steps(self, io: Io, /, example: Any, pred: Any, trace: Any = None) -> Prediction:
        """Ask, and combine what the model gives.

        Args:
            io: The driver.
            example: Has `question` and `response`.
            pred: Has `response`.
            trace: None for a score; else it is a bool, whether the threshold was reached.
        """
        shares = await self.module.plan(
            io,
            (),
            {
                "question": example.question,
                "ground_truth": example.response,
                "system_response": pred.response,
            },
        )
        return _verdict(harmonic_mean(shares.precision, shares.recall), self.threshold, trace)


class CompleteAndGrounded(Planned):
    """Scores a response by asking a model how complete it is and how well its sources support it.

    The score is the harmonic mean of both, each held within 0 and 1. Reads `example.question`,
    `example.response`, `pred.response` and `pred.context`.

    Args:
        threshold: The score from which a response passes, where a `trace` is given.

    Attributes:
        threshold: As given.
        completeness_module: The program that compares with the example.
        groundedness_module: The program that compares with what was found.
    """

    def __init__(self, threshold: float = 0.66) -> None:
        super().__init__()
        self.threshold = threshold
        self.completeness_module: ChainOfThought[..., Any] = ChainOfThought(AnswerCompleteness)
        self.groundedness_module: ChainOfThought[..., Any] = ChainOfThought(AnswerGroundedness)

    async def steps(self, io: Io, /, example: Any, pred: Any, trace: Any = None) -> Prediction:
        """Ask both, and combine what the model gives.

        Args:
            io: The driver.
            example: Has `question` and `response`.
            pred: Has `response`, and `context` with what it rests on.
            trace: None for a score; else it is a bool, whether the threshold was reached.
        """
        complete = await self.completeness_module.plan(
            io,
            (),
            {
                "question": example.question,
                "ground_truth": example.response,
                "system_response": pred.response,
            },
        )
        grounded = await self.groundedness_module.plan(
            io,
            (),
            {
                "question": example.question,
                "retrieved_context": pred.context,
                "system_response": pred.response,
            },
        )
        score = harmonic_mean(grounded.groundedness, complete.completeness)
        return _verdict(score, self.threshold, trace)


def harmonic_mean(first: float, second: float) -> float:
    """Return the harmonic mean of two shares, each held within 0 and 1; NaN counts as 0.

    Example:
        >>> harmonic_mean(0.5, 1.7)
        0.6666666666666666
    """
    first, second = (min(1.0, max(0.0, share)) for share in (first, second))
    return 2 * first * second / (first + second) if first + second else 0.0


def _verdict(score: float, threshold: float, trace: Any) -> Prediction:
    return Prediction(score=score if trace is None else score >= threshold)
