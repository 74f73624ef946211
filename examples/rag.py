"""Questions answered from a corpus: passages are retrieved, and a model reads them.

Offline by default; DSPYLITE_MODEL and DSPYLITE_EMBEDDER name other models (with DSPYLITE_API_BASE
and their key).
"""

import os
import tempfile

import dspylite as dspy

CORPUS = [
    "Baikal in Siberia is the deepest lake.",
    "Lake Superior has the largest surface.",
    "The Amazon flows to the Atlantic.",
    "The Danube flows to the Black Sea.",
    "Batian is the highest peak of Mount Kenya.",
    "Kibo is the highest peak of Kilimanjaro.",
]

QUESTIONS = [
    "Which lake is the deepest?",
    "Where does the Danube flow to?",
    "What is the highest peak of Mount Kenya?",
]


class Answer(dspy.Signature):
    """Answer the question from the passages."""

    passages: list[str] = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Rag(dspy.Module):
    """Retrieves, then reads."""

    def __init__(self, search: dspy.Embeddings) -> None:
        self.search = search
        self.read = dspy.Predict(Answer)

    def forward(self, question: str) -> dspy.Prediction:
        found = self.search(question)
        answer = self.read(passages=found.passages, question=question).answer
        return dspy.Prediction(answer=answer, sources=found.indices)


def main() -> list[str]:
    api_base = os.environ.get("DSPYLITE_API_BASE")
    embedder = dspy.Embedder("offline/hashing")
    if name := os.environ.get("DSPYLITE_EMBEDDER"):
        embedder = dspy.Embedder(name, api_base=api_base)
    lm = dspy.LM(os.environ.get("DSPYLITE_MODEL", "offline/extractive"), api_base=api_base)

    with tempfile.TemporaryDirectory() as directory:
        dspy.Embeddings(CORPUS, embedder, k=2).save(directory)  # embedded once ...
        search = dspy.Embeddings.from_saved(directory, embedder)  # ... for all later runs
    with dspy.context(lm=lm):
        answers = Rag(search).batch([{"question": q} for q in QUESTIONS], num_threads=4)
    return [
        f"{question} -> {found.answer} {found.sources}"
        for question, found in zip(QUESTIONS, answers, strict=True)
    ]


if __name__ == "__main__":
    print("\n".join(main()))
