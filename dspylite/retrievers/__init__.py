"""DSPy's place for retrievers. Not here: the retrievers themselves (`models/retrieval.py`)."""

from dspylite.retrievers.embeddings import Embeddings, EmbeddingsWithScores

__all__ = ["Embeddings", "EmbeddingsWithScores"]
