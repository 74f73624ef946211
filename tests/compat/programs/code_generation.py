"""Write code, and load a program whose state was saved."""

import json
import os
import tempfile

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


class WriteCode(dspy.Signature):
    """Write a function that does what is asked."""

    task: str = dspy.InputField()
    code: dspy.Code["python"] = dspy.OutputField()
    tests: list[str] = dspy.OutputField()


coder = dspy.ChainOfThought(WriteCode)
coder.predict.demos = [
    dspy.Example(task="identity", reasoning="trivial", code="def f(x):\n    return x", tests=[])
]
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "coder.json")
    coder.save(path)
    loaded = dspy.ChainOfThought(WriteCode)
    loaded.load(path)
prediction = loaded(task="double a number")
names: dict = {}
exec(prediction.code.code, names)
print(
    json.dumps(
        {
            "language": prediction.code.language,
            "result": names["double"](21),
            "tests": prediction.tests,
            "demos": [demo["task"] for demo in loaded.predict.demos],
        }
    )
)
