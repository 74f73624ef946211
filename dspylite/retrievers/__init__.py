"""DSPy's place for retrievers. Not here: the retrievers themselves (`models/retrieval/`).

Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspylite.retrievers.embeddings import Embeddings, EmbeddingsWithScores

__all__ = ["Embeddings", "EmbeddingsWithScores"]
