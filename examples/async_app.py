"""One program awaited four ways: natively, as a batch, as results come, and on worker threads.

Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE and its key).
"""

import asyncio
import os

import dspylite as dspy

RIVERS = "The Nile flows north. The Rhine flows through Basel. The Amazon carries the most water."
QUESTIONS = [
    "Which river flows north?",
    "Which river carries the most water?",
    "Which river flows through Basel?",
]


class AskTwice(dspy.Module):
    """Asks, then asks for the answer in capitals: a program of two steps."""

    def __init__(self) -> None:
        self.ask = dspy.Predict("context, question -> answer")

    async def aforward(self, question: str) -> dspy.Prediction:
        found = await self.ask.acall(context=RIVERS, question=question)
        return dspy.Prediction(answer=found.answer, loud=found.answer.upper())


async def main() -> dict[str, list[str]]:
    lm = dspy.LM(
        os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
        api_base=os.environ.get("DSPYLITE_API_BASE"),
    )
    program = AskTwice()
    with dspy.context(lm=lm):
        natively = await asyncio.gather(*(program.acall(question=q) for q in QUESTIONS))
        as_batch = await program.abatch([{"question": q} for q in QUESTIONS], num_threads=2)
        as_they_come = [""] * len(QUESTIONS)
        inputs = ({"question": question} for question in QUESTIONS)
        async for index, outcome in program.abatch_iter(inputs, num_threads=2):
            as_they_come[index] = outcome.value.answer if outcome.ok else f"failed: {outcome.error}"
        # A sync program (here: the same one, called) on worker threads.
        ask = dspy.asyncify(program)
        in_threads = await asyncio.gather(*(ask(question=q) for q in QUESTIONS))
    return {
        "acall": [p.answer for p in natively],
        "abatch": [p.answer for p in as_batch],
        "abatch_iter": as_they_come,
        "asyncify": [p.answer for p in in_threads],
    }


if __name__ == "__main__":
    for way, answers in asyncio.run(main()).items():
        print(f"{way:>11}: {' '.join(answers)}")
