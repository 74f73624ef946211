"""Which rows of a block are nearest to a vector: exactly, and the same with and without numpy.

Not here: where the vectors come from (`models/retrieval/nearest.py`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

from dspylite.models.matrix import EmbeddingMatrix
from dspylite.models.numpy_door import load_numpy

_SHORTEST = 1e-10
"""What a shorter vector is divided by in place of its length, so that zeros stay. DSPy's value."""

_CHUNK_VALUES = 1 << 18  # 2 MB as float64
_FLOAT32_ROUNDING = 2.0**-24
_FLOAT32_TINY = 2.0**-120  # above all that float32 products lose below their smallest number

# A product of two float32 numbers is exact in float64, so a dot product is rounded by its additions
# alone. Both ways below add from left to right, and therefore agree to the last bit: neither
# `sum` (compensated since Python 3.12) nor a BLAS (any order, and another one in the last rows).


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
        count = len(self.matrix)
        k = min(k, count)
        if not k:
            return []
        np = load_numpy()
        if np is None:
            other = list(vector)
            scores = [_dot(row.tolist(), other) for row in self.matrix]
            best = heapq.nlargest(k, range(count), key=scores.__getitem__)
            return [(row, scores[row]) for row in best]
        query = np.asarray(vector, dtype=np.float64)
        rows = self._candidates(np, query, k)
        products = _dots(np, np.asarray(self.matrix), query, rows)
        order = np.argsort(-products, kind="stable")[:k]
        return list(zip(rows[order].tolist(), products[order].tolist(), strict=True))

    def _candidates(self, np: Any, query: Any, k: int) -> Any:
        """Return, in order, all rows that can be among the `k` nearest; seldom many more.

        float32 products from the BLAS are fast. Summed in whatever order, each is off by less than
        dim * rounding * (length of the row) * (length of the query); whoever is behind the k-th by
        more than twice that is out. Eight times, for the rounding of this comparison too.
        """
        count, dim = self.matrix.shape
        if self._longest is None:
            self._longest = float(_lengths(np, np.asarray(self.matrix)).max())
        length = float(np.sqrt(query @ query))
        error = dim * (_FLOAT32_ROUNDING * self._longest * length + _FLOAT32_TINY)
        with np.errstate(all="ignore"):  # numbers near the end of float32
            rough = np.asarray(self.matrix) @ query.astype(np.float32)
            if not np.isfinite(rough).all():
                return np.arange(count)
            kth = float(np.partition(rough, count - k)[count - k])
            return np.flatnonzero(rough >= kth - 8 * error)


def normalized(matrix: EmbeddingMatrix) -> EmbeddingMatrix:
    """Return the block with rows of length 1; a row of zeros stays one."""
    np = load_numpy()
    if np is None:
        values = array("f")
        for row in matrix:
            numbers = cast("list[float]", row.tolist())
            length = max(math.sqrt(_dot(numbers, numbers)), _SHORTEST)
            values.extend(number / length for number in numbers)
        return EmbeddingMatrix(values, matrix.dim)
    block = np.asarray(matrix)
    made = np.empty_like(block)
    lengths = np.maximum(_lengths(np, block), _SHORTEST)
    for part in _chunks(*matrix.shape):
        made[part] = block[part] / lengths[part, None]
    return EmbeddingMatrix(memoryview(made.reshape(-1)), matrix.dim)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    sums: deque[float] = deque(itertools.accumulate(map(operator.mul, one, other)), maxlen=1)
    return sums.pop()


def _dots(np: Any, block: Any, query: Any, rows: Any) -> Any:
    found = np.empty(len(rows))
    for part in _chunks(len(rows), block.shape[1]):
        products = block[rows[part]] * query
        found[part] = np.add.accumulate(products, axis=1)[:, -1]
    return found


def _lengths(np: Any, block: Any) -> Any:
    found = np.empty(len(block))
    for part in _chunks(*block.shape):
        squares = np.square(block[part], dtype=np.float64)
        found[part] = np.add.accumulate(squares, axis=1)[:, -1]
    return np.sqrt(found)


def _chunks(count: int, dim: int) -> list[slice]:
    """Cut rows into pieces whose float64 copies stay small."""
    step = max(1, _CHUNK_VALUES // max(1, dim))
    return [slice(start, start + step) for start in range(0, count, step)]
