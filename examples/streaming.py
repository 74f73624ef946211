"""A program whose answer is shown while it is written, from sync and from async code.

Against a server of its own that plays a model, because the offline model answers in one piece.
DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE and its key).
"""

import asyncio
import os
from contextlib import nullcontext
from typing import Any

import dspylite as dspy
from dspylite.testing import FakeServer, Reply

SAID = Reply(
    chunks=[
        *["[[ ## rea", "soning ## ]]\n", "Water falls ", "as rain.", "\n\n[[ ## ans"],
        *["wer ## ]]\n", "From ", "the ", "sky.", "\n\n[[ ## completed ## ]]"],
    ]
)


class Explain(dspy.Module):
    """Looks something up, then answers with its reasoning."""

    def __init__(self) -> None:
        self.look_up = dspy.Tool(lambda word: f"{word}: see clouds", name="encyclopedia")
        self.answer = dspy.ChainOfThought("question, found -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        found = self.look_up(word="rain")
        return self.answer(question=question, found=found)


class Words(dspy.StatusMessageProvider):
    """Says what happens in words for a user."""

    def tool_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str:
        return f"looking into the {instance.name} for {inputs['word']!r}"

    def tool_end_status_message(self, outputs: Any) -> str:
        return f"found {outputs!r}"


def show(event: Any) -> str:
    match event:
        case dspy.StatusMessage():
            return f"({event.message})"
        case dspy.StreamResponse():
            return f"{event.signature_field_name}: {event.chunk!r}"
        case _:
            return f"= {event.answer}"


OPTIONS: dict[str, Any] = {
    "status_message_provider": Words(),
    "stream_listeners": [dspy.StreamListener("reasoning"), dspy.StreamListener("answer")],
}


def from_sync_code() -> None:
    explain = dspy.streamify(Explain(), **OPTIONS, async_streaming=False)
    for event in explain(question="Where does rain come from?"):
        print("sync: ", show(event))


async def from_async_code() -> None:
    explain = dspy.streamify(Explain(), **OPTIONS)
    async for event in explain(question="Where does rain come from?"):
        print("async:", show(event))


def main() -> None:
    model = os.environ.get("DSPYLITE_MODEL")
    with nullcontext() if model else FakeServer() as server:
        if server is not None:
            server.script(SAID, SAID)
            lm = dspy.LM("openai/m", api_base=server.base_url, api_key="none", cache=False)
        else:
            lm = dspy.LM(str(model), api_base=os.environ.get("DSPYLITE_API_BASE"))
        with dspy.context(lm=lm):
            from_sync_code()
            asyncio.run(from_async_code())


if __name__ == "__main__":
    main()
