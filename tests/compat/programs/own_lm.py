"""Models of one's own: a subclass of LM that edits what is sent, and one of BaseLM."""

import asyncio
import json
import os
from types import SimpleNamespace

import dspylite as dspy


class Polite(dspy.LM):
    def forward(self, prompt=None, messages=None, **kwargs):
        messages = [*messages[:-1], {"role": "user", "content": "polite"}]
        return super().forward(prompt=prompt, messages=messages, **kwargs)

    async def aforward(self, prompt=None, messages=None, **kwargs):
        messages = [*messages[:-1], {"role": "user", "content": "awaited"}]
        return await super().aforward(prompt=prompt, messages=messages, **kwargs)


class Canned(dspy.BaseLM):
    def forward(self, prompt=None, messages=None, **kwargs):
        message = SimpleNamespace(content="[[ ## answer ## ]]\nCanned\n\n[[ ## completed ## ]]")
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")],
            usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            model=self.model,
        )


lm = Polite("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
predict = dspy.Predict("question -> answer")
with dspy.context(lm=lm):
    called = predict(question="Who?").answer
    awaited = asyncio.run(predict.acall(question="Who?")).answer
with dspy.context(lm=Canned(model="canned", temperature=0.5)):
    canned = predict(question="Who?").answer
print(
    json.dumps(
        {
            "called": called,
            "awaited": awaited,
            "canned": canned,
            "calls": len(lm.history),
            "direct": lm.forward(messages=[{"role": "user", "content": ""}])
            .choices[0]
            .message.content,
            "prefixes": [dspy.infer_prefix(name) for name in ("some_attr", "HTMLText2")],
        }
    )
)
