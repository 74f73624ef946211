"""Several tries at one question: the best of three, a refinement, and a vote.

The model server is a fake on this machine, which answers differently each time, so that the script
runs without a key; replace its address by that of your own.
"""

import itertools
import json
from collections.abc import Mapping

import dspylite as dspy
from dspylite.testing import FakeServer

TRIES = [
    "The museum is open daily except on Mondays, from nine to five.",
    "Daily except on Mondays, from nine to five.",
    "Nine to five.",
]


def section(name: str, text: str) -> str:
    return f"[[ ## {name} ## ]]\n{text}\n\n"


class Model:
    """What the fake server says: one try after the other, and advice where it is asked for."""

    def __init__(self) -> None:
        self.tries = itertools.cycle(TRIES)

    def __call__(self, body: Mapping[str, object]) -> str:
        if "program_trajectory" in json.dumps(body):
            advice = json.dumps({"self": "Leave out the days."})
            return section("discussion", "It is too long.") + section("advice", advice) + END
        return section("answer", next(self.tries)) + END


END = "[[ ## completed ## ]]"
QUESTION = "When is the museum open?"


def is_short(inputs: dict[str, str], prediction: dspy.Prediction) -> float:
    """An answer that is shorter than its question is a good one."""
    return 1.0 if len(prediction.answer) < len(inputs["question"]) else 0.0


def main() -> None:
    answer = dspy.Predict("question -> answer")
    best = dspy.BestOfN(answer, N=3, reward_fn=is_short, threshold=1.0)
    refine = dspy.Refine(answer, N=4, reward_fn=is_short, threshold=1.0)
    with FakeServer(answer=Model()) as server:
        lm = dspy.LM("openai/m", api_base=server.base_url, api_key="none")
        with dspy.context(lm=lm):
            print("one call: ", answer(question=QUESTION).answer)
            found = best(question=QUESTION)
            print("best of 3:", found.answer, f"({len(server.requests) - 1} tries)")
            server.clear()
            found = refine(question=f"{QUESTION} In short.")
            print("refined:  ", found.answer, f"({len(server.requests)} calls, advice included)")
            several = [answer(question=QUESTION, config={"rollout_id": f"v{n}"}) for n in range(6)]
            print("majority: ", dspy.majority([*several, found]).answer)


if __name__ == "__main__":
    main()
