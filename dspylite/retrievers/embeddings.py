"""DSPy's place for the retrievers over vectors. Not here: their code (`models/retrieval.py`)."""

from dspylite.models.retrieval import Embeddings, EmbeddingsWithScores

__all__ = ["Embeddings", "EmbeddingsWithScores"]
