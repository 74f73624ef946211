"""Sort sentences by their feeling."""

import json
import os
from typing import Literal

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


class Emotion(dspy.Signature):
    """Classify the emotion of a sentence."""

    sentence: str = dspy.InputField()
    sentiment: Literal["sadness", "joy", "love", "anger", "fear", "surprise"] = dspy.OutputField()
    confidence: float = dspy.OutputField()


classify = dspy.Predict(Emotion)
found = []
for sentence in ("i started feeling a little vulnerable", "what a lovely day", "leave me alone!"):
    prediction = classify(sentence=sentence)
    found.append((prediction.sentiment, prediction.confidence))
print(json.dumps(found))
