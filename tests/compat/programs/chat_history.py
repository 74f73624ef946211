"""A conversation that remembers its turns."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


class Chat(dspy.Signature):
    """Answer in a friendly way."""

    history: dspy.History = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


predict = dspy.Predict(Chat)
history = dspy.History(messages=[])
answers = []
for question in ("Who wrote Faust?", "When was he born?"):
    outputs = predict(question=question, history=history)
    history.messages.append({"question": question, **outputs})
    answers.append(outputs.answer)
roles = [message["role"] for message in lm.history[-1]["messages"]]
print(json.dumps({"answers": answers, "roles": roles, "turns": history.messages}))
