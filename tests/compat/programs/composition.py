"""A program made of modules: names, copies, LMs for all, saving and loading."""

import copy
import json
import os
import tempfile
from pathlib import Path

import dspylite as dspy


def at(model):
    return dspy.LM(f"openai/{model}", api_base=os.environ["API_BASE"], api_key="none", cache=False)


dspy.configure(lm=at("first"))


class Part(dspy.Module):
    def __init__(self, times):
        super().__init__()
        self.times = times
        self.predict = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.predict(question=question * self.times)


class Whole(dspy.Module):
    def __init__(self):
        super().__init__()
        self.parts = [Part(1), Part(2)]
        self.named = {"think": dspy.ChainOfThought("text -> title"), "part": Part(3)}

    def forward(self, question):
        return dspy.Prediction(answers=[part(question=question).answer for part in self.parts])


whole = Whole()
answers = whole(question="x").answers
whole.parts[0].predict.demos = [dspy.Example(question="q", answer="a").with_inputs("question")]
twin, deep, bare = whole.deepcopy(), copy.deepcopy(whole), whole.reset_copy()
twin.set_lm(at("second"))
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "whole.json"
    whole.save(file)
    loaded = Whole()
    loaded.load(file)
with dspy.context(lm=at("third")):
    in_context = whole(question="x").answers, twin(question="x").answers
print(
    json.dumps(
        {
            "answers": answers,
            "names": [name for name, _ in whole.named_predictors()],
            "modules": [name for name, _ in whole.named_sub_modules()],
            "in_context": in_context,
            "lm": twin.get_lm().model,
            "demos": [len(each.parts[0].predict.demos) for each in (twin, deep, bare, loaded)],
            "demo": loaded.parts[0].predict.demos[0]["answer"],
        }
    )
)
