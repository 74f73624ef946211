"""Whether what came back is one good vector per text: order, number, dimensions, length.

Not here: the check of the numbers in a vector (`models/matrix.py`).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspylite.errors import EmbeddingShapeError

_MATRYOSHKA = re.compile(
    r"text-embedding-3-|qwen3-embedding|embeddinggemma|gemini-embedding"
    r"|nomic-embed-text-v(1\.5|2)|mxbai-embed-large|jina-embeddings-v[345]|jina-clip-v2"
    r"|snowflake-arctic-embed-(m-v1\.5|[ml]-v2)|voyage-(3-large|3\.5|4|code-3)|embed-v4"
    r"|-mrl-|matryoshka",
    re.IGNORECASE,
)
"""Models that were trained so that the first numbers of a vector are a vector by themselves, as
their makers say. Source of the idea: Kusupati et al., Matryoshka Representation Learning, 2022,
https://arxiv.org/abs/2205.13147"""

_UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of a vector of length 1 may be; float16 on the way costs as much."""


def in_order_of_index(rows: Sequence[Mapping[str, Any]], wanted: int) -> list[Any]:
    """Put the rows of an answer in the order of their `index`; they may come in any other.

    Raises:
        EmbeddingShapeError: There is not one row for each text.
    """
    given: list[Any] = [row.get("index") for row in rows]
    in_line = list(range(wanted))
    if given == in_line:
        return [row.get("embedding") for row in rows]
    # Servers that send no index at all send the rows in order.
    indices = given if any(index is not None for index in given) else list(range(len(rows)))
    if len(rows) != wanted or sorted(map(repr, indices)) != sorted(map(repr, in_line)):
        raise EmbeddingShapeError(
            f"{wanted} texts gave {len(rows)} vectors (with indices {indices[:8]}"
            f"{'...' if len(indices) > 8 else ''}); nothing of this batch is used."
        )
    ordered: list[Any] = [None] * wanted
    for index, row in zip(indices, rows, strict=True):
        ordered[index] = row.get("embedding")
    return ordered


def is_matryoshka(model: str) -> bool:
    """Tell by its name whether the vectors of a model may be cut.

    Example:
        >>> is_matryoshka("hosted_vllm/Qwen/Qwen3-Embedding-4B"), is_matryoshka("openai/e5-large")
        (True, False)
    """
    return bool(_MATRYOSHKA.search(model))


@dataclass(frozen=True, slots=True)
class Shape:
    """What vectors must be like, where the user has said how many dimensions are wanted.

    Attributes:
        model: Whose vectors they are, for the error.
        dimensions: How many numbers a vector has. None: as many as come.
        may_cut: Whether longer vectors are cut.
    """

    model: str
    dimensions: int | None = None
    may_cut: bool = False

    def fitted(self, vector: array[float], index: int) -> array[float]:
        """Return a vector of the wanted dimensions and, where they are wanted, of length 1.

        Servers that cut vectors do not all restore their length.

        Args:
            vector: As it came.
            index: Place of its text in the input, for the error.

        Raises:
            EmbeddingShapeError: It has fewer dimensions, or more and must not be cut.
        """
        wanted = self.dimensions
        if wanted is None:
            return vector
        if len(vector) < wanted:
            raise EmbeddingShapeError(
                f"The vector of text {index} has {len(vector)} dimensions, fewer than "
                f"`dimensions={wanted}`; {self.model} has no more to give.",
                index=index,
            )
        if len(vector) > wanted:
            if not self.may_cut:
                raise EmbeddingShapeError(
                    f"The vector of text {index} has {len(vector)} dimensions: the server of "
                    f"{self.model} ignores `dimensions={wanted}`. If the model was trained so that "
                    "its vectors may be cut, say `matryoshka=True`; else leave `dimensions` out.",
                    index=index,
                )
            vector = vector[:wanted]
        length = math.hypot(*vector)
        if length == 0.0 or abs(length - 1.0) <= _UNIT_TOLERANCE:
            return vector
        return array("f", [value / length for value in vector])
