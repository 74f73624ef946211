"""Tell a reader what a program does, and read the stream without an event loop, too."""

import asyncio
import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


class Status(dspy.streaming.StatusMessageProvider):
    def lm_start_status_message(self, instance, inputs):
        return "asking"

    def lm_end_status_message(self, outputs):
        return "answered"

    def module_start_status_message(self, instance, inputs):
        return f"in {type(instance).__name__}"

    def tool_start_status_message(self, instance, inputs):
        return f"calling {instance.name}"

    def tool_end_status_message(self, outputs):
        return f"got {outputs}"


class Program(dspy.Module):
    def __init__(self):
        self.double = dspy.Tool(lambda x: 2 * x, name="double")
        self.predict = dspy.Predict("question, number -> answer")

    def forward(self, question):
        return self.predict(question=question, number=str(self.double(x=21)))


def listeners():
    return [dspy.streaming.StreamListener(signature_field_name="answer")]


ask = dspy.streamify(Program(), status_message_provider=Status(), stream_listeners=listeners())


async def read():
    statuses, text, final = [], "", None
    async for value in ask(question="How much?"):
        if isinstance(value, dspy.streaming.StatusMessage):
            statuses.append(value.message)
        elif isinstance(value, dspy.streaming.StreamResponse):
            text += value.chunk
        else:
            final = value.answer
    return {"statuses": statuses, "text": text.strip(), "final": final}


told = asyncio.run(read())
sync_ask = dspy.streamify(Program(), stream_listeners=listeners(), async_streaming=False)
chunks = [v for v in sync_ask(question="Again?") if isinstance(v, dspy.streaming.StreamResponse)]
told["sync"] = "".join(chunk.chunk for chunk in chunks).strip()
print(json.dumps(told))
