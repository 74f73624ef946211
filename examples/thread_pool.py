"""Questions answered on a plain thread pool, each call under a context of its own.

Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE and its key).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import dspylite as dspy

FACTS = (
    "Mercury is the planet nearest to the sun. Jupiter is the largest planet. "
    "Saturn has the brightest rings. Neptune has the strongest winds."
)
QUESTIONS = [
    "Which planet is the largest?",
    "Which planet is nearest to the sun?",
    "Which planet has the strongest winds?",
    "Which planet has the brightest rings?",
]


def main() -> list[str]:
    lm = dspy.LM(
        os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
        api_base=os.environ.get("DSPYLITE_API_BASE"),
    )
    dspy.settings.configure(lm=lm)
    predict = dspy.Predict("context, question -> answer")

    def ask(question: str) -> str:
        with dspy.context(lm=lm):
            return predict(context=FACTS, question=question).answer

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(ask, QUESTIONS))


if __name__ == "__main__":
    for question, answer in zip(QUESTIONS, main(), strict=True):
        print(f"{question}  {answer}")
