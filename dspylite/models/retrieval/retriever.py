"""`Embeddings` and `EmbeddingsWithScores`: the passages of a corpus that are nearest to a query.

Not here: how texts become vectors and which are near (`nearest.py`), and the files of a saved
corpus (`saved.py`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from dspylite.abc import Io
from dspylite.errors import LMConfigurationError
from dspylite.models.matrix import EmbeddingMatrix
from dspylite.models.retrieval.nearest import (
    Vectorizer,
    checked_embedder,
    checked_k,
    checked_texts,
    embed_texts,
    nearest,
)
from dspylite.models.retrieval.saved import SavedCorpus, read_corpus, write_corpus
from dspylite.models.retrieval.search import Rows
from dspylite.runtime.calls import Observed
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.settings import checked_callbacks
from dspylite.schema.records import Prediction


@dataclass(frozen=True, slots=True)
class _State:
    """All that a query needs. It never changes, so no query sees half of a `load`."""

    passages: tuple[str, ...]
    rows: Rows
    embedder: Vectorizer
    k: int
    normalize: bool


class Embeddings:
    """A retriever: the `k` passages of a corpus that are nearest to a query, always exactly.

    The corpus is embedded when the retriever is made. Threads and tasks may share one retriever.
    Equal scores are ranked by the order of the corpus, and the results do not depend on whether
    numpy is installed; with it the search is faster.

    Args:
        corpus: The passages. A copy is kept.
        embedder: An `Embedder`, or a function from a list of texts to one vector per text, sync or
            async. A function gets the whole corpus at once.
        k: Passages per query; all of them where the corpus has fewer.
        callbacks: Told of every call, as of a module's, after those of the settings.
        cache: Only False; an `Embedder(caching=True)` is what keeps vectors.
        brute_force_threshold: Accepted for DSPy, which searches approximately, with FAISS, from so
            many passages on. Here nothing depends on it.
        normalize: Whether scores are cosines; otherwise they are dot products.

    Attributes:
        embedder: As given.
        normalize: As given.
        index: Always None: there is no approximate index.

    Raises:
        InputFieldError: The corpus is no list of strings.
        LMConfigurationError: `k`, `embedder` or `cache` cannot work.
        EmbeddingShapeError: There was not one vector per passage, or they differ in length.
        EmbeddingValueError: A vector holds NaN, infinity, null or no number.

    Example:
        >>> from dspylite.models.embedder import Embedder
        >>> search = Embeddings(
        ...     ["Cats sleep all day.", "The sun is a star."], Embedder("offline/hashing"), k=1
        ... )
        >>> search("Which star is near?").passages
        ['The sun is a star.']
    """

    callbacks: Sequence[Any] = ()
    _shows_scores: ClassVar[bool] = False
    _state: _State

    def __init__(
        self,
        corpus: Iterable[str],
        embedder: Vectorizer,
        k: int = 5,
        callbacks: Sequence[Any] | None = None,
        cache: bool = False,
        brute_force_threshold: int = 20_000,
        normalize: bool = True,
    ) -> None:
        del brute_force_threshold
        self.callbacks = checked_callbacks("callbacks", callbacks)
        if cache:
            raise LMConfigurationError(
                "A retriever keeps no answers; leave `cache` out, and give the embedder "
                "`caching=True` to keep vectors."
            )
        self._state = run_flow(_embedded(BLOCKING, corpus, embedder, k, normalize=normalize))

    @classmethod
    async def acreate(
        cls,
        corpus: Iterable[str],
        embedder: Vectorizer,
        k: int = 5,
        *,
        callbacks: Sequence[Any] | None = None,
        normalize: bool = True,
    ) -> Self:
        """Make a retriever without blocking the event loop while the corpus is embedded.

        Args:
            corpus: As of the class.
            embedder: As of the class.
            k: As of the class.
            callbacks: As of the class.
            normalize: As of the class.
        """
        told = checked_callbacks("callbacks", callbacks)
        state = await _embedded(ASYNC, corpus, embedder, k, normalize=normalize)
        made = cls.__new__(cls)
        made.__dict__.update(callbacks=told, _state=state)
        return made

    # -- queries ----------------------------------------------------------------------------------

    def __call__(self, query: str) -> Prediction:
        """Return the passages nearest to a query, the nearest first.

        Args:
            query: Any text.

        Returns:
            A prediction with `passages` and, for each, its place in the corpus in `indices`. Both
            are empty where the corpus is.

        Raises:
            InputFieldError: The query is no string.
            EmbeddingShapeError: Its vector has another dimension than those of the corpus.
            LMError: The embedder's provider failed.
        """
        return run_flow(self._called(BLOCKING, query))

    async def acall(self, query: str) -> Prediction:
        """Await the passages; otherwise as the call."""
        return await self._called(ASYNC, query)

    def forward(self, query: str) -> Prediction:
        """Do the work of a call. A subclass that overrides it is asked by `acall`, too."""
        return run_flow(self._found(BLOCKING, [query]))[0]

    def batch(self, queries: Sequence[str]) -> list[Prediction]:
        """Answer many queries, which are embedded together; one prediction each, in order."""
        return run_flow(self._batched(BLOCKING, queries))

    async def abatch(self, queries: Sequence[str]) -> list[Prediction]:
        """Await the answers to many queries; otherwise as `batch`."""
        return await self._batched(ASYNC, queries)

    async def _called(self, io: Io, query: str) -> Prediction:
        with Observed("module", self, {"query": query}) as call:
            if type(self).forward is Embeddings.forward:
                (result,) = await self._found(io, [query])
            else:
                result = await io.any(self.forward, query)
            call.outputs = result
        return result

    async def _batched(self, io: Io, queries: Sequence[str]) -> list[Prediction]:
        with Observed("module", self, {"queries": queries}, "batch") as call:
            call.outputs = results = await self._found(io, queries)
        return results

    async def _found(self, io: Io, queries: Sequence[str]) -> list[Prediction]:
        texts = list(checked_texts("query", queries))
        state = self._state
        found = await nearest(
            io, state.rows, state.embedder, texts, state.k, is_cosine=state.normalize
        )
        return [self._prediction(state.passages, hits) for hits in found]

    def _prediction(self, passages: Sequence[str], hits: list[tuple[int, float]]) -> Prediction:
        prediction = Prediction(
            passages=[passages[index] for index, _ in hits], indices=[index for index, _ in hits]
        )
        if self._shows_scores:
            prediction["scores"] = [score for _, score in hits]
        return prediction

    # -- what it holds ----------------------------------------------------------------------------

    @property
    def corpus(self) -> list[str]:
        """The passages, as a new list."""
        return list(self._state.passages)

    @property
    def corpus_embeddings(self) -> EmbeddingMatrix:
        """The vectors of the passages, of length 1 if `normalize`; they cannot be changed."""
        return self._state.rows.matrix.toreadonly()

    @property
    def k(self) -> int:
        """Passages per query; may be set."""
        return self._state.k

    @k.setter
    def k(self, k: int) -> None:
        self._state = replace(self._state, k=checked_k(k))

    @property
    def embedder(self) -> Vectorizer:
        """What embeds queries; may be set."""
        return self._state.embedder

    @embedder.setter
    def embedder(self, embedder: Vectorizer) -> None:
        self._state = replace(self._state, embedder=checked_embedder(embedder))

    @property
    def normalize(self) -> bool:
        """Whether scores are cosines."""
        return self._state.normalize

    @property
    def index(self) -> None:
        """None: there is no approximate index."""
        return

    # -- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the corpus, its vectors, `k` and `normalize` into a directory, for `from_saved`.

        The embedder is not saved, and with it no key. DSPy can read the directory. Files of an
        earlier save are replaced when the new ones are complete.

        Raises:
            OSError: The directory cannot be written to; an earlier save in it stays.
        """
        state = self._state
        write_corpus(
            path,
            SavedCorpus(
                corpus=state.passages,
                matrix=state.rows.matrix,
                k=state.k,
                normalize=state.normalize,
            ),
        )

    def load(self, path: str | os.PathLike[str], embedder: Vectorizer) -> Self:
        """Take over what a directory holds; queries under way still see what was here before.

        Args:
            path: A directory that `save` wrote, or DSPy's. Of the latter a FAISS index is not read.
            embedder: The one that the corpus was embedded with; it embeds the queries.

        Returns:
            This retriever.

        Raises:
            FileNotFoundError: The directory or one of its files is not there.
            SavedEmbeddingsError: The files are damaged or something else; nothing is taken over.
            LMConfigurationError: `embedder` is no embedder.
        """
        checked_embedder(embedder)
        saved = read_corpus(path)
        self._state = _State(saved.corpus, Rows(saved.matrix), embedder, saved.k, saved.normalize)
        return self

    @classmethod
    def from_saved(cls, path: str | os.PathLike[str], embedder: Vectorizer) -> Self:
        """Make a retriever from a saved directory, embedding nothing; otherwise as `load`."""
        return cls.__new__(cls).load(path, embedder)

    # -- copies -----------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Share the corpus and its vectors, which cannot change, and the callbacks."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        memo.update({id(callback): callback for callback in self.callbacks})
        for name, value in list(vars(self).items()):
            if name != "_state":
                twin.__dict__[name] = copy.deepcopy(value, memo)
        state = self._state
        twin.__dict__["_state"] = replace(state, embedder=copy.deepcopy(state.embedder, memo))
        return twin

    def __repr__(self) -> str:
        count, dim = self._state.rows.matrix.shape
        return f"{type(self).__name__}({count} passages, {dim} dimensions, k={self.k})"


class EmbeddingsWithScores(Embeddings):
    """An `Embeddings` whose predictions have `scores` as well: how near each passage is.

    Example:
        >>> from dspylite.models.embedder import Embedder
        >>> search = EmbeddingsWithScores(["a cat", "a dog"], Embedder("offline/hashing"), k=2)
        >>> found = search("a dog")
        >>> found.passages, round(found.scores[0], 4), found.scores[1] < 1
        (['a dog', 'a cat'], 1.0, True)
    """

    _shows_scores = True


async def _embedded(
    io: Io, corpus: Iterable[str], embedder: Vectorizer, k: int, *, normalize: bool
) -> _State:
    checked_embedder(embedder)
    checked_k(k)
    passages = tuple(checked_texts("passage", corpus))
    matrix = await embed_texts(io, embedder, list(passages)) if passages else _EMPTY
    if normalize:
        matrix = await io.any(matrix.normalized)
    return _State(passages, Rows(matrix), embedder, k, bool(normalize))


_EMPTY = EmbeddingMatrix.from_rows([])
