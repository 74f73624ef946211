"""Measure a program on a set of examples."""

import json
import os

import dspylite as dspy
from dspylite.evaluate import answer_exact_match

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)

devset = [
    dspy.Example(question="Capital of France?", answer="Paris").with_inputs("question"),
    dspy.Example(question="Capital of Peru?", answer="Lima").with_inputs("question"),
    dspy.Example(question="Capital of Kenya?", answer="Nairobi").with_inputs("question"),
]


def length_metric(example, prediction, trace=None):
    """Score by the length of the answer."""
    return len(prediction.answer) / 10


program = dspy.Predict("question -> answer")
evaluate = dspy.Evaluate(devset=devset, metric=answer_exact_match, num_threads=2)
exact = evaluate(program)
length = evaluate(program, metric=length_metric)
print(
    json.dumps(
        {
            "exact": exact.score,
            "length": length.score,
            "answers": [prediction.answer for _, prediction, _ in exact.results],
            "scores": [bool(score) for _, _, score in exact.results],
            "questions": [example.question for example, _, _ in length.results],
        }
    )
)
