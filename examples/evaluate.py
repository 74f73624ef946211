"""Two programs measured over the same questions: scores, failures, a metric of one's own, a table.

Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE and its key).
"""

import os
from typing import Any

import dspylite as dspy
from dspylite.evaluate.metrics import F1

FACTS = "The Nile flows north. The Amazon is wide. The Rhine is long."

DEVSET = [
    dspy.Example(question=question, answer=answer).with_inputs("question")
    for question, answer in [
        ("What flows north?", "the Nile flows north"),
        ("What is wide?", "The Amazon is wide!"),
        ("What is long?", "The Rhine"),
        ("", "What do you mean?"),
    ]
]


class Ask(dspy.Module):
    """Answers from the facts, and refuses an empty question."""

    def __init__(self) -> None:
        self.answer = dspy.Predict("context, question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        if not question:
            raise ValueError("empty")
        return self.answer(context=FACTS, question=question)


def always_nile(question: str) -> dspy.Prediction:
    """Answer without looking: what any program must beat."""
    del question
    return dspy.Prediction(answer="The Nile flows north.")


def overlap(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> float:
    """Score by the words that both answers share."""
    del trace
    return F1(pred.answer, [example.answer])


def main() -> None:
    lm = dspy.LM(
        os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
        api_base=os.environ.get("DSPYLITE_API_BASE"),
    )
    with dspy.context(lm=lm):
        evaluate = dspy.Evaluate(devset=DEVSET, metric=dspy.answer_exact_match, num_threads=4)
        for program in (always_nile, Ask()):
            print(f"{getattr(program, '__name__', 'Ask')}: {evaluate(program)}")

        result = evaluate(Ask(), metric=overlap, display_table=True)
    for index, error in result.errors.items():
        print(f"failed: item {index}, {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
