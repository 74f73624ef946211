"""What retrievers share: texts become vectors by whatever embeds, and the nearest rows are found.

Not here: the search among vectors (`models/retrieval/search.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from dspylite.abc import Io
from dspylite.errors import EmbeddingShapeError, InputFieldError, LMConfigurationError
from dspylite.models.embedder import Embedder
from dspylite.models.matrix import EmbeddingMatrix
from dspylite.models.retrieval.search import Rows

Vectorizer = Embedder | Callable[[list[str]], Any]
"""An embedder, or a function from a list of texts to one vector per text, sync or async."""


async def nearest(
    io: Io,
    rows: Rows,
    embedder: Vectorizer,
    texts: list[str],
    k: int,
    *,
    is_cosine: bool,
) -> list[list[tuple[int, float]]]:
    """Return, for each text, (row, score) of the `k` nearest rows.

    Raises:
        EmbeddingShapeError: The texts' vectors have another dimension than the rows.
    """
    if not texts or not len(rows.matrix):
        return [[] for _ in texts]
    queries = await embed_texts(io, embedder, texts, query=True)
    if queries.dim != rows.matrix.dim:
        raise EmbeddingShapeError(
            f"The vector of a query has {queries.dim} dimensions, those of the corpus have "
            f"{rows.matrix.dim}; both must come from the same embedder."
        )

    def search() -> list[list[tuple[int, float]]]:
        vectors = queries.normalized() if is_cosine else queries
        return [rows.nearest(vector, k) for vector in vectors]

    return await io.any(search)


async def embed_texts(
    io: Io, embedder: Vectorizer, texts: list[str], *, query: bool = False
) -> EmbeddingMatrix:
    """Return one vector per text, from an embedder or a function.

    Args:
        io: The driver.
        embedder: What embeds.
        texts: The texts.
        query: Whether they are queries, which some models want to be told.

    Raises:
        EmbeddingShapeError: There was not one vector per text, or they differ in length.
        EmbeddingValueError: A vector holds NaN, infinity, null or no number.
    """
    # A subclass with a `__call__` of its own means that one.
    if isinstance(embedder, Embedder) and type(embedder).__call__ is Embedder.__call__:
        return await embedder.plan(io, texts, query=query)
    made: Any = await io.any(embedder, list(texts))
    count = _count(made)
    if count != len(texts):
        kind = type(made).__name__  # of what may be too long to be shown
        raise EmbeddingShapeError(
            f"The embedding function gave {count} vectors for {len(texts)} texts, as `{kind}`."
        )
    return EmbeddingMatrix.from_rows(made)


def _count(made: Any) -> int | str:
    if isinstance(made, str | bytes | Mapping | Set):
        return "no"
    try:
        return len(made)
    except TypeError:  # an array without dimensions, an iterator
        return "no"


def checked_texts(what: str, texts: Iterable[str]) -> Iterable[str]:
    """Give each text in turn, as soon as it is known to be one.

    Raises:
        InputFieldError: It is no string, or the texts are no list.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InputFieldError(f"Give a list of strings as {what}, not {texts!r:.100}.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputFieldError(f"{what.capitalize()} {index} is not a string but {text!r:.100}.")
        yield text


def checked_k(k: int) -> int:
    """Return `k`.

    Raises:
        LMConfigurationError: It is no positive whole number.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise LMConfigurationError(f"`k` must be at least 1, not {k!r}.")
    return k


def checked_embedder(embedder: Vectorizer) -> Vectorizer:
    """Return the embedder.

    Raises:
        LMConfigurationError: It cannot be called.
    """
    if not callable(embedder):
        # Callers without a checker come here.
        hint = f"; write `Embedder({embedder!r})`" if isinstance(embedder, str) else ""  # type: ignore[unreachable]
        raise LMConfigurationError(
            f"`embedder` must be an `Embedder` or a function, not {embedder!r:.100}{hint}."
        )
    return embedder
