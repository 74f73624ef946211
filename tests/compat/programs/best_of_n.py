"""Take the best of several tries."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


def one_word(args, prediction):
    """Reward an answer of one word."""
    return 1.0 if len(prediction.answer.split()) == 1 else 0.3


qa = dspy.ChainOfThought("question -> answer")
best = dspy.BestOfN(module=qa, N=4, reward_fn=one_word, threshold=1.0)
chosen = best(question="Capital of Belgium?")

sampled = dspy.Predict("question -> answer", n=3)(question="Capital of Brazil?")
voted = dspy.majority(sampled, normalize=lambda text: text.lower())
print(
    json.dumps(
        {
            "answer": chosen.answer,
            "samples": sampled.completions.answer,
            "voted": voted.answer,
        }
    )
)
