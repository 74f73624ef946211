"""`EmbeddingMatrix`: n vectors of one dimension as a float32 block, without numpy.

Not here: making them (`models/embedder.py`), the arithmetic (`models/vectors.py`).
"""

from __future__ import annotations

import math
import operator
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, SupportsFloat, SupportsIndex, cast, overload

from dspylite.errors import EmbeddingShapeError, EmbeddingValueError, LMConfigurationError
from dspylite.models.vectors import Block, cosines_of, dots_of, top_cosines, unit_rows


class EmbeddingMatrix:
    """A float32 block of shape (n, dim): row i is the vector of text i.

    `np.asarray(embeddings)` shares the memory. Rows and slices share it too.

    Args:
        values: n * dim numbers, row after row, as an `array('f')` or a float32 memoryview.
        dim: Length of one vector.

    Raises:
        EmbeddingShapeError: The number of values is no multiple of `dim`.

    Example:
        >>> block = EmbeddingMatrix.from_rows([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> block.shape, block[0].tolist(), block[1:].shape
        ((3, 2), [1.0, 0.0], (2, 2))
    """

    __slots__ = ("_dim", "_values")

    def __init__(self, values: array[float] | memoryview[Any], dim: int) -> None:
        view = cast("memoryview[float]", memoryview(values))
        if view.format != "f" or dim < 0 or (len(view) % dim if dim else len(view)):
            raise EmbeddingShapeError(
                f"{len(view)} values of format {view.format!r} are not rows of {dim} float32 "
                "numbers."
            )
        self._values = view
        self._dim = dim

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[SupportsFloat]]) -> EmbeddingMatrix:
        """Build from any rows of numbers, checking each.

        Raises:
            EmbeddingShapeError: A row has another length than the first.
            EmbeddingValueError: A value is null, NaN, infinite or no number.
        """
        whole = _float32_view(rows, dims=2)
        if whole is not None and whole.shape and all(whole.shape):
            values = bytearray(whole)
            if _is_finite(values):  # and else look for the row
                return cls(memoryview(values).cast("f"), whole.shape[1])
        values, dim = bytearray(), -1
        for index, row in enumerate(rows):
            raw = _read(row, index)
            if dim < 0:
                dim = len(raw) // 4
            elif len(raw) != 4 * dim:
                raise EmbeddingShapeError(
                    f"The vector of text {index} has {len(raw) // 4} dimensions, "
                    f"the first has {dim}.",
                    index=index,
                )
            values += raw
        return cls(memoryview(values).cast("f"), max(dim, 0))

    @property
    def shape(self) -> tuple[int, int]:
        """(number of vectors, dimensions)."""
        return len(self), self._dim

    @property
    def dim(self) -> int:
        """Length of one vector."""
        return self._dim

    def __len__(self) -> int:
        return len(self._values) // self._dim if self._dim else 0

    @overload
    def __getitem__(self, index: SupportsIndex) -> memoryview[float]: ...

    @overload
    def __getitem__(self, index: slice) -> EmbeddingMatrix: ...

    def __getitem__(self, index: SupportsIndex | slice) -> memoryview[float] | EmbeddingMatrix:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                first, end = start * self._dim, max(start, stop) * self._dim
                return EmbeddingMatrix(self._values[first:end], self._dim)
            picked = array("f")
            for row in range(start, stop, step):
                picked.extend(self[row])
            return EmbeddingMatrix(picked, self._dim)
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"There are {len(self)} vectors, no number {row}.")
        row %= len(self)
        return self._values[row * self._dim : (row + 1) * self._dim]

    def __iter__(self) -> Iterator[memoryview[float]]:
        return (self[row] for row in range(len(self)))

    def tolist(self) -> list[list[float]]:
        """Return the rows as lists of floats."""
        return [cast("list[float]", row.tolist()) for row in self]

    def tobytes(self) -> bytes:
        """Return the block as raw float32 bytes in the machine's order."""
        return self._values.tobytes()

    def toreadonly(self) -> EmbeddingMatrix:
        """Return the same block, sharing the memory, through which nothing can be changed."""
        return EmbeddingMatrix(self._values.toreadonly(), self._dim)

    def copy(self) -> EmbeddingMatrix:
        """Return an equal block with memory of its own, which can be changed."""
        return EmbeddingMatrix(array("f", self.tobytes()), self._dim)

    def dot(self, vector: Sequence[float] | memoryview[Any]) -> list[float]:
        """Return the dot product of each row with a vector: cosine similarity for unit vectors.

        Raises:
            EmbeddingShapeError: The vector has another dimension.
        """
        self._check_dim(vector)
        return dots_of(
            block_of(self), vector.tolist() if isinstance(vector, memoryview) else vector
        )

    def normalized(self) -> EmbeddingMatrix:
        """Return the rows at length 1, in memory of their own; a row of zeros stays one.

        What is shorter than 1e-10 gets longer by 1e10, as in DSPy.
        """
        return EmbeddingMatrix(unit_rows(block_of(self)), self._dim)

    def cosine(self, vector: Iterable[SupportsFloat]) -> list[float]:
        """Return how alike each row is to a vector, from -1 to 1: the cosine of their angle.

        The lengths do not matter; with a vector of zeros it is 0. The same with and without numpy.

        Args:
            vector: As many numbers as a row has; taken as float32.

        Raises:
            EmbeddingShapeError: The vector has another dimension.
            EmbeddingValueError: The vector holds null, NaN, infinity or no number.

        Example:
            >>> EmbeddingMatrix.from_rows([[2, 0], [0, 3], [-1, 0]]).cosine([1, 0])
            [1.0, 0.0, -1.0]
        """
        query = self._query(vector)
        return cosines_of(block_of(self), query) if len(self) else []

    def top_k(self, vector: Iterable[SupportsFloat], k: int) -> list[tuple[int, float]]:
        """Return (row, cosine) of the `k` rows that are most like a vector, the best first.

        Of rows that are equally alike the lower one is first. The same with and without numpy.

        Args:
            vector: As many numbers as a row has; taken as float32.
            k: How many; all rows if there are fewer.

        Raises:
            EmbeddingShapeError: The vector has another dimension.
            EmbeddingValueError: The vector holds null, NaN, infinity or no number.
            LMConfigurationError: `k` is no whole number from 1.

        Example:
            >>> EmbeddingMatrix.from_rows([[2, 0], [0, 3], [-1, 0], [9, 0]]).top_k([1, 0], 2)
            [(0, 1.0), (3, 1.0)]
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise LMConfigurationError(f"`k` must be a whole number from 1, not {k!r:.100}.")
        query = self._query(vector)
        return top_cosines(block_of(self), query, k) if len(self) else []

    def _query(self, vector: Iterable[SupportsFloat]) -> list[float]:
        raw = _read(vector, None)
        numbers = cast("list[float]", memoryview(raw).cast("f").tolist())
        if len(self):
            self._check_dim(numbers)
        return numbers

    def _check_dim(self, vector: Sequence[float] | memoryview[Any]) -> None:
        if len(vector) != self._dim:
            raise EmbeddingShapeError(
                f"A vector of {len(vector)} dimensions does not match rows of {self._dim}."
            )

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What numpy reads to share the memory."""
        return {"version": 3, "shape": self.shape, "typestr": "=f4", "data": self._values}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EmbeddingMatrix):
            return NotImplemented
        return self.shape == other.shape and self._values == other._values

    # The memory can change under a hash.
    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as raw bytes."""
        return _from_bytes, (self.tobytes(), self._dim)

    def __repr__(self) -> str:
        return f"EmbeddingMatrix(shape={self.shape})"


def block_of(matrix: EmbeddingMatrix) -> Block:
    """Return the numbers as `models/vectors.py` takes them, sharing the memory."""
    values = matrix._values  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return Block(values, max(matrix.dim, 1))


def _from_bytes(raw: bytes, dim: int) -> EmbeddingMatrix:
    values = array("f")
    values.frombytes(raw)
    return EmbeddingMatrix(values, dim)


def read_vector(row: Any, index: int) -> array[float]:
    """Read one vector of numbers as float32, checking each value.

    Args:
        row: A sequence of numbers, or anything with `tolist()`. What is float32 already, as an
            `array("f")`, a memoryview or an array of numpy, is copied as it is.
        index: Place of its text in the input, for the error.

    Raises:
        EmbeddingValueError: A value is null, NaN, infinite or no number.
        EmbeddingShapeError: It is no sequence, or empty.
    """
    return array("f", _read(row, index))


def _read(row: Any, index: int | None) -> bytes:
    """Return the float32 bytes of the vector of a text, or of a query."""
    name = "The vector" if index is None else f"The vector of text {index}"
    if (view := _float32_view(row, dims=1)) is not None:
        raw = view.tobytes()
    else:
        if callable(tolist := getattr(row, "tolist", None)):
            row = tolist()
        if isinstance(row, str | bytes | bytearray | Mapping | Set) or not isinstance(
            row, Iterable
        ):
            raise EmbeddingShapeError(
                f"{name} is not a list of numbers: {row!r:.100}.", index=index
            )
        try:
            raw = array("f", row).tobytes()
        except (TypeError, OverflowError) as error:
            raise EmbeddingValueError(
                f"{name} holds something that is not a float32 number: {error}.",
                index=index,
            ) from None
    if not raw:
        raise EmbeddingShapeError(f"{name} is empty.", index=index)
    if not _is_finite(raw):
        raise EmbeddingValueError(f"{name} holds NaN or infinity.", index=index)
    return raw


def _float32_view(numbers: Any, *, dims: int) -> memoryview[Any] | None:
    """Return the memory of what is float32 already; None where values must be looked at."""
    kind = type(numbers)  # not of a subclass: one of numpy's hides values behind a mask
    if kind not in {array, memoryview} and (kind.__module__, kind.__name__) != ("numpy", "ndarray"):
        return None
    try:
        view = memoryview(numbers)
    except (BufferError, ValueError):  # a type of numpy's that no buffer can have
        return None
    return view if view.format == "f" and view.ndim == dims else None


_HIGH_BYTES = slice(3 if sys.byteorder == "little" else 0, None, 4)


def _is_finite(raw: bytes | bytearray) -> bool:
    """Tell whether float32 bytes hold neither NaN nor infinity."""
    high = raw[_HIGH_BYTES]
    if 0x7F not in high and 0xFF not in high:  # sign and exponent: nothing above 1.7e38
        return True
    return math.isfinite(math.fsum(map(abs, memoryview(raw).cast("f"))))
