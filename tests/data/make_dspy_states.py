"""Writes the state files under `dspy_3_4_1/` with DSPy itself, whose form they document.

Run it where DSPy 3.4.1 is installed: `python tests/data/make_dspy_states.py`. Not here: the tests
that load the files (`test_saving_dspy.py`), which need no DSPy.
"""

from __future__ import annotations

from pathlib import Path

import dspy
from dspy.teleprompt import BootstrapFewShot, LabeledFewShot
from dspy.utils import DummyLM

HERE = Path(__file__).parent / "dspy_3_4_1"


class Grade(dspy.Signature):
    """Grade the essay like a kind teacher."""

    essay: str = dspy.InputField(desc="as it was handed in")
    mark: int = dspy.OutputField(desc="1 is best")
    remarks: list[str] = dspy.OutputField()


class Rag(dspy.Module):
    """A program with every place where predictors can stand."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.ChainOfThought("context: list[str], question -> answer")
        self.steps = [
            dspy.Predict("question -> query"),
            dspy.Predict("query -> context: list[str]"),
        ]
        self.by_name = {"it's": dspy.Predict("text -> label"), 7: dspy.Predict("text -> title")}
        self.grade = dspy.Predict(Grade)

    def forward(self, question: str) -> dspy.Prediction:
        query = self.steps[0](question=question).query
        context = self.steps[1](query=query).context
        return self.answer(context=context, question=question)


TRAINSET = [
    dspy.Example(question="Largest planet?", answer="Jupiter").with_inputs("question"),
    dspy.Example(question="Nearest planet?", answer="Mercury").with_inputs("question"),
]


def answers(request: int) -> list[dict[str, str]]:
    rows = []
    for planet in ("Jupiter", "Mercury"):
        rows += [
            {"query": f"planet {planet}"},
            {"context": f'["{planet} is a planet.", "It is round."]'},
            {"reasoning": "It stands there.", "answer": planet},
        ]
    return rows * request


def main() -> None:
    HERE.mkdir(exist_ok=True)
    dspy.configure(lm=DummyLM(answers(4)))
    plain = Rag()
    plain.save(HERE / "plain.json")

    bootstrapped = BootstrapFewShot(
        metric=lambda example, prediction, trace=None: example.answer == prediction.answer,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        max_rounds=1,
    ).compile(Rag(), trainset=TRAINSET)
    bootstrapped.grade.signature = bootstrapped.grade.signature.with_instructions(
        "Grade the essay. Be strict — «très» strict."
    )
    bootstrapped.grade.lm = dspy.LM(
        "openai/gpt-4o-mini",
        temperature=0.3,
        max_tokens=500,
        api_base="http://models.example:8000/v1",
        api_key="sk-never-in-a-file",
    )
    bootstrapped.save(HERE / "bootstrapped.json")

    labeled = LabeledFewShot(k=2).compile(
        dspy.ChainOfThought("question -> answer"), trainset=TRAINSET
    )
    labeled.save(HERE / "labeled.json")

    single = dspy.Predict(Grade)
    single.demos = [dspy.Example(essay="I like cats.", mark=2, remarks=["short"])]
    single.save(HERE / "single.json")


if __name__ == "__main__":
    main()
