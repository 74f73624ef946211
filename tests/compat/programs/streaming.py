"""Show an answer while it is written."""

import asyncio
import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)

predict = dspy.Predict("question -> answer, source")
stream_predict = dspy.streamify(
    predict,
    stream_listeners=[
        dspy.streaming.StreamListener(signature_field_name="answer"),
        dspy.streaming.StreamListener(signature_field_name="source"),
    ],
)


async def read_output_stream():
    """Put the pieces of each field together."""
    texts = {"answer": "", "source": ""}
    last = {}
    final = None
    async for chunk in stream_predict(question="Why is the sky blue?"):
        if isinstance(chunk, dspy.streaming.StreamResponse):
            texts[chunk.signature_field_name] += chunk.chunk
            last[chunk.signature_field_name] = chunk.is_last_chunk
        elif isinstance(chunk, dspy.Prediction):
            final = chunk
    return {
        "texts": {name: text.strip() for name, text in texts.items()},
        "last": last,
        "answer": final.answer,
        "source": final.source,
    }


print(json.dumps(asyncio.run(read_output_stream())))
