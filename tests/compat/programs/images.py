"""Show pictures to a model."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)

DOT = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Compare(dspy.Signature):
    """Compare a picture with others."""

    picture: dspy.Image = dspy.InputField()
    others: list[dspy.Image] = dspy.InputField()
    same: bool = dspy.OutputField()
    words: str = dspy.OutputField()


prediction = dspy.Predict(Compare)(
    picture=dspy.Image("https://example.org/cat.png"),
    others=[dspy.Image(DOT), dspy.Image("https://example.org/dog.png")],
)
content = lm.history[-1]["messages"][-1]["content"]
shown = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
print(json.dumps({"same": prediction.same, "words": prediction.words, "shown": shown}))
