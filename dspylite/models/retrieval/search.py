"""A block of vectors that is searched many times.

Not here: how it is searched (`models/vectors.py`), where the vectors come from
(`models/retrieval/nearest.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dspylite.models.matrix import EmbeddingMatrix, block_of
from dspylite.models.numpy_door import load_numpy
from dspylite.models.vectors import longest_row, top_dots


class Rows:
    """A block of vectors that is searched for the ones nearest to another.

    Args:
        matrix: The vectors. Nobody may change them any more.

    Example:
        >>> rows = Rows(EmbeddingMatrix.from_rows([[1, 0], [0, 1], [1, 1], [0, 1]]))
        >>> rows.nearest([0.0, 2.0], 3)
        [(1, 2.0), (2, 2.0), (3, 2.0)]
    """

    def __init__(self, matrix: EmbeddingMatrix) -> None:
        self.matrix = matrix
        self._longest: float | None = None  # two threads that ask first find the same

    def nearest(self, vector: Sequence[float], k: int) -> list[tuple[int, float]]:
        """Return (row, dot product) of the `k` rows with the largest dot products.

        Args:
            vector: As many float32 numbers as a row has.
            k: How many; all rows if there are fewer.

        Returns:
            The largest first; of equal ones the lower row first.
        """
        if not len(self.matrix):
            return []
        if self._longest is None and load_numpy() is not None:
            self._longest = longest_row(block_of(self.matrix))
        return top_dots(block_of(self.matrix), vector, k, self._longest)
