"""Arithmetic of rows of float32 numbers: exactly, and the same with and without numpy.

Not here: the block that holds the rows (`models/matrix.py`), searching one block many times
(`models/retrieval/search.py`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from dspylite.models.numpy_door import load_numpy

_SHORTEST = 1e-10
"""What a shorter vector is divided by in place of its length, so that zeros stay. DSPy's value."""

_CHUNK_VALUES = 1 << 18  # 2 MB as float64
_FLOAT32_ROUNDING = 2.0**-24
_FLOAT32_TINY = 2.0**-120  # above all that float32 products lose below their smallest number
_FLOAT32_SHORT = 2.0**-40  # the squares of what is no shorter are far above the smallest number

# A product of two float32 numbers is exact in float64, so a dot product is rounded by its additions
# alone. Both ways below add from left to right, and therefore agree to the last bit: neither
# `sum` (compensated since Python 3.12) nor a BLAS (any order, and another one in the last rows).


class Block(NamedTuple):
    """Rows of float32 numbers in one memory.

    Attributes:
        values: All numbers, row after row.
        dim: How many a row has; at least 1.
    """

    values: memoryview[float]
    dim: int

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.values) // self.dim

    def rows(self) -> Iterator[list[float]]:
        """Give the numbers of each row."""
        for start in range(0, len(self.values), self.dim):
            yield cast("list[float]", self.values[start : start + self.dim].tolist())

    def array(self, np: Any) -> Any:
        """Return an array of numpy that shares the memory."""
        return np.asarray(self.values).reshape(-1, self.dim)


def dots_of(block: Block, vector: Sequence[float]) -> list[float]:
    """Return the dot product of each row with a vector."""
    np = load_numpy()
    if np is None:
        return [dot(row, vector) for row in block.rows()]
    query = np.asarray(vector, dtype=np.float64)
    return cast("list[float]", _dots(np, block.array(np), query, np.arange(block.size)).tolist())


def cosines_of(block: Block, vector: Sequence[float]) -> list[float]:
    """Return the cosine of the angle between each row and a vector; 0 where one is all zeros."""
    np = load_numpy()
    if np is None:
        length = math.sqrt(dot(vector, vector))
        return [_cosine(row, vector, length) for row in block.rows()]
    query = np.asarray(vector, dtype=np.float64)
    rows = np.arange(block.size)
    return cast("list[float]", _cosines(np, block.array(np), query, rows).tolist())


def top_dots(
    block: Block, vector: Sequence[float], k: int, longest: float | None = None
) -> list[tuple[int, float]]:
    """Return (row, dot product) of the `k` rows with the largest ones, the lower row first of two.

    Args:
        block: The rows.
        vector: As many float32 numbers as a row has.
        k: How many; all rows if there are fewer.
        longest: Length of the longest row, where it is known.
    """
    k = min(k, block.size)
    if not k:
        return []
    np = load_numpy()
    if np is None:
        return _largest(dots_of(block, vector), k)
    query = np.asarray(vector, dtype=np.float64)
    rows = dot_candidates(np, block, query, k, longest)
    return _ranked(np, rows, _dots(np, block.array(np), query, rows), k)


def top_cosines(block: Block, vector: Sequence[float], k: int) -> list[tuple[int, float]]:
    """Return (row, cosine) of the `k` rows with the largest ones, the lower row first of two."""
    k = min(k, block.size)
    np = load_numpy()
    if np is None:
        return _largest(cosines_of(block, vector), k)
    query = np.asarray(vector, dtype=np.float64)
    rows = cosine_candidates(np, block, query, k)
    return _ranked(np, rows, _cosines(np, block.array(np), query, rows), k)


def longest_row(block: Block) -> float:
    """Return the length of the longest row, by numpy, which must be there."""
    np = load_numpy()
    assert np is not None
    return float(lengths(np, block.array(np)).max())


def unit_rows(block: Block) -> memoryview[Any]:
    """Return the rows at length 1; a row of zeros stays one."""
    np = load_numpy()
    if np is None:
        values = array("f")
        for row in block.rows():
            length = max(math.sqrt(dot(row, row)), _SHORTEST)
            values.extend(number / length for number in row)
        return memoryview(values)
    rows = block.array(np)
    made = np.empty_like(rows)
    divisors = np.maximum(lengths(np, rows), _SHORTEST)
    for part in _chunks(*rows.shape):
        made[part] = rows[part] / divisors[part, None]
    return memoryview(made.reshape(-1))


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    """Add the products from left to right."""
    sums: deque[float] = deque(itertools.accumulate(map(operator.mul, one, other)), maxlen=1)
    return sums.pop()


def lengths(np: Any, rows: Any) -> Any:
    """Return the length of each row of an array, its squares added from left to right."""
    found = np.empty(len(rows))
    for part in _chunks(*rows.shape):
        squares = np.square(rows[part], dtype=np.float64)
        found[part] = np.add.accumulate(squares, axis=1)[:, -1]
    return np.sqrt(found)


def dot_candidates(np: Any, block: Block, query: Any, k: int, longest: float | None = None) -> Any:
    """Return, in order, all rows that can be among the `k` nearest; seldom many more.

    float32 products from the BLAS are fast. Summed in whatever order, each is off by less than
    dim * rounding * (length of the row) * (length of the query); whoever is behind the k-th by
    more than twice that is out. Eight times, for the rounding of this comparison too.
    """
    longest = longest_row(block) if longest is None else longest
    length = float(np.sqrt(query @ query))
    error = block.dim * (_FLOAT32_ROUNDING * longest * length + _FLOAT32_TINY)
    with np.errstate(all="ignore"):  # numbers near the end of float32
        rough = block.array(np) @ query.astype(np.float32)
        if not np.isfinite(rough).all():
            return np.arange(block.size)
        return _close(np, rough, k, 8 * error)


def cosine_candidates(np: Any, block: Block, query: Any, k: int) -> Any:
    """Return, in order, all rows that can have one of the `k` largest cosines.

    As `dot_candidates` does; the lengths are off by no more than the products. What is too short
    or too long for float32 squares is always among them.
    """
    length = float(np.sqrt(query @ query))
    unit = (query / (length or 1.0)).astype(np.float32)
    rows = block.array(np)
    with np.errstate(all="ignore"):
        sizes = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        rough = (rows @ unit) / sizes
        odd = ~((sizes > _FLOAT32_SHORT) & np.isfinite(sizes) & np.isfinite(rough))
        rough[odd] = 2.0  # above all cosines
        error = block.dim * (_FLOAT32_ROUNDING + _FLOAT32_TINY / _FLOAT32_SHORT)
        return _close(np, rough, min(k + int(odd.sum()), block.size), 16 * error)


def _close(np: Any, rough: Any, k: int, error: float) -> Any:
    kth = float(np.partition(rough, len(rough) - k)[len(rough) - k])
    return np.flatnonzero(rough >= kth - error)


def _largest(scores: list[float], k: int) -> list[tuple[int, float]]:
    best = heapq.nlargest(k, range(len(scores)), key=scores.__getitem__)
    return [(row, scores[row]) for row in best]


def _ranked(np: Any, rows: Any, scores: Any, k: int) -> list[tuple[int, float]]:
    order = np.argsort(-scores, kind="stable")[:k]
    return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))


def _cosine(row: Sequence[float], vector: Sequence[float], length: float) -> float:
    lengths_product = math.sqrt(dot(row, row)) * length
    if not lengths_product:
        return 0.0
    return max(-1.0, min(1.0, dot(row, vector) / lengths_product))  # rounding can pass 1


def _cosines(np: Any, block: Any, query: Any, rows: Any) -> Any:
    length = math.sqrt(dot(query.tolist(), query.tolist()))
    found = np.empty(len(rows))
    for part in _chunks(len(rows), block.shape[1]):
        picked = block[rows[part]]
        divisors = lengths(np, picked) * length
        products = np.add.accumulate(picked * query, axis=1)[:, -1]
        zero = divisors == 0
        found[part] = np.where(zero, 0.0, products / np.where(zero, 1.0, divisors))
    return np.clip(found, -1.0, 1.0)


def _dots(np: Any, block: Any, query: Any, rows: Any) -> Any:
    found = np.empty(len(rows))
    for part in _chunks(len(rows), block.shape[1]):
        products = block[rows[part]] * query
        found[part] = np.add.accumulate(products, axis=1)[:, -1]
    return found


def _chunks(count: int, dim: int) -> list[slice]:
    """Cut rows into pieces whose float64 copies stay small."""
    step = max(1, _CHUNK_VALUES // max(1, dim))
    return [slice(start, start + step) for start in range(0, count, step)]
