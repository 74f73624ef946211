"""A program is given demos and saved as JSON; another process loads it and runs it.

Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE and its key).
"""

import os
import tempfile
from pathlib import Path

import dspylite as dspy


class Guide(dspy.Module):
    """Answers questions from what it is told."""

    def __init__(self) -> None:
        self.answer = dspy.ChainOfThought("context: list[str], question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        return self.answer(context=FACTS, question=question)


FACTS = [
    "Jupiter is the largest planet.",
    "Mercury is the planet nearest to the sun.",
]


def train() -> Guide:
    """Stand in for an optimiser: instructions and demos, as it would find them."""
    guide = Guide()
    predict = guide.answer.predict
    predict.signature = predict.signature.with_instructions("Answer from the context alone.")
    predict.demos = [
        dspy.Example(
            context=["Mars is red."],
            question="Which colour is Mars?",
            reasoning="The context names it.",
            answer="Mars is red.",
        )
    ]
    return guide


def main() -> list[str]:
    lm = dspy.LM(
        os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
        api_base=os.environ.get("DSPYLITE_API_BASE"),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guide.json"
        train().save(path)
        guide = Guide()  # as another process would
        guide.load(path)
        try:
            dspy.Predict("text -> label").load(path)
        except dspy.SavingError as error:
            told = str(error).replace(str(path), "guide.json")
    predict = guide.answer.predict
    lines = [f"{predict.signature.instructions} ({len(predict.demos)} demo)"]
    with dspy.context(lm=lm):
        lines += [guide(question=q).answer for q in ("Which planet is the largest?",)]
    return [*lines, told]


if __name__ == "__main__":
    print("\n".join(main()))
