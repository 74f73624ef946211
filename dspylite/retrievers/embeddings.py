"""DSPy's place for the retrievers over vectors. Not here: their code (`models/retrieval/`).

Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspylite.models.retrieval.retriever import Embeddings, EmbeddingsWithScores

__all__ = ["Embeddings", "EmbeddingsWithScores"]
