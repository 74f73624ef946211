"""Answer a question from the passages that fit it best."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)

CORPUS = [
    "The Nile is the longest river of Africa.",
    "Mount Fuji is the highest mountain of Japan.",
    "The Danube flows through ten countries.",
    "Bread is made of flour, water and salt.",
]
WORDS = ("river", "mountain", "countries", "bread", "longest", "highest", "danube", "africa")


def embed(texts):
    """Count the words that matter."""
    return [[float(text.lower().count(word)) + 0.01 for word in WORDS] for text in texts]


search = dspy.retrievers.Embeddings(embedder=dspy.Embedder(embed), corpus=CORPUS, k=2)


class RAG(dspy.Module):
    """Search, then answer."""

    def __init__(self):
        self.respond = dspy.ChainOfThought("context: list[str], question -> response")

    def forward(self, question):
        """Answer one question."""
        context = search(question).passages
        return self.respond(context=context, question=question)


rag = RAG()
prediction = rag(question="What is the longest river of Africa?")
print(
    json.dumps(
        {
            "response": prediction.response,
            "reasoning": str(prediction.reasoning),
            "passages": search("How many countries does the Danube see?").passages,
            "predictors": [name for name, _ in rag.named_predictors()],
        }
    )
)
