"""What is done with documents: cut, embedded together, stored.

Not here: who holds them meanwhile, and what is noted of the outcome (`runner.py`).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspylite.errors import (
    DSPyError,
    EmbeddingValueError,
    InputFieldError,
    LMInvalidRequestError,
)
from examples.embedding_service.documents import Document
from examples.embedding_service.stores import Embedded, Store
from examples.embedding_service.vectors import Vectors

logger = logging.getLogger(__name__)

SLICE = 256
"""Chunks embedded between two reports of progress; guessed. It also bounds what is repeated."""

_NOT_FOUND = {404, 405}  # a wrong model or address, and not a wrong text

Progress = Callable[[int, int, int], None]
"""Told (place of the document, chunks in all, chunks that have a vector)."""

IsHeld = Callable[[int], bool]
"""Asked, by the place of the document, before it is stored."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a document could not be stored, in words for its user.

    Attributes:
        may_pass: Whether trying the same again later may succeed.
    """

    code: str
    message: str
    may_pass: bool


Outcome = int | Failure
"""How many chunks were stored, or why none was."""


class Pipeline:
    """Stores documents, many at a time, so that one that fails takes no other with it.

    A document's chunks are all embedded before any is stored, and are stored in one write: of a
    document that fails nothing is stored, and what was stored of it before stays whole.

    Args:
        vectors: Cuts and embeds.
        store: Keeps the chunks.
        collection_of: Names a user's collection.
    """

    def __init__(self, vectors: Vectors, store: Store, collection_of: Callable[[str], str]) -> None:
        self._vectors = vectors
        self._store = store
        self._collection_of = collection_of

    def process(
        self,
        documents: Sequence[Document],
        progress: Progress,
        is_held: IsHeld = lambda place: True,  # noqa: ARG005
    ) -> list[Outcome]:
        """Store documents and return what became of each, in order.

        One that is not held any more is not stored: a later form may be there already.
        """
        split = [self._cut(document.text) for document in documents]
        cut: list[list[str]] = [[] if isinstance(chunks, Failure) else chunks for chunks in split]
        embedded = self._embed(cut, progress)
        outcomes: list[Outcome] = [
            chunks if isinstance(chunks, Failure) else self._fault(chunks, vectors) or len(chunks)
            for chunks, vectors in zip(split, embedded, strict=True)
        ]
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, int) and not is_held(place):
                outcomes[place] = Failure("unavailable", "Its worker was silent.", may_pass=True)
        # Of equal documents the last one is stored: a store refuses an id that comes twice.
        by_user: dict[str, dict[str, list[int]]] = {}
        for place, document in enumerate(documents):
            if isinstance(outcomes[place], int):
                places = by_user.setdefault(document.user, {})
                places.setdefault(document.document_id, []).append(place)
        for user, places in by_user.items():
            ready = [
                Embedded(documents[same[-1]], cut[same[-1]], _only_vectors(embedded[same[-1]]))
                for same in places.values()
            ]
            stored = self._store_all(self._collection_of(user), ready)
            for same, failure in zip(places.values(), stored, strict=True):
                if failure is not None:
                    for place in same:
                        outcomes[place] = failure
        return outcomes

    def _cut(self, text: str) -> list[str] | Failure:
        """Cut a text, and refuse one that cannot be stored before it costs anything."""
        try:
            chunks = self._vectors.split(text)
        except Exception as error:  # noqa: BLE001  # the others of the batch are innocent
            logger.warning("A document could not be cut: %s", _said(error))
            return Failure(*_told(error), _may_pass(error))
        if not chunks:
            return Failure("empty", "The document has no text.", may_pass=False)
        if len(chunks) > self._store.max_rows:
            return Failure(
                "too_many_chunks",
                f"The document has {len(chunks)} chunks; at most {self._store.max_rows} fit into "
                "one write. Send it in parts.",
                may_pass=False,
            )
        return chunks

    def _embed(
        self, cut: Sequence[Sequence[str]], progress: Progress
    ) -> list[list[array[float] | BaseException]]:
        """Embed the chunks of all documents together, in slices."""
        for place, chunks in enumerate(cut):
            if len(chunks) > SLICE:
                progress(place, len(chunks), 0)
        flat = [(place, chunk) for place, chunks in enumerate(cut) for chunk in chunks]
        made: list[list[array[float] | BaseException]] = [[] for _ in cut]
        for start in range(0, len(flat), SLICE):
            part = flat[start : start + SLICE]
            vectors = self._vectors.embed([chunk for _, chunk in part])
            if _all_refused(vectors) and len({place for place, _ in part}) > 1:
                vectors = self._embed_apart(part)
            for (place, _), vector in zip(part, vectors, strict=True):
                made[place].append(vector)
            for place in {place for place, _ in part}:
                if len(cut[place]) > SLICE:
                    progress(place, len(cut[place]), len(_only_vectors(made[place])))
        return made

    def _embed_apart(self, part: Sequence[tuple[int, str]]) -> list[array[float] | BaseException]:
        """Embed each document for itself, because one of them may have spoilt the batch."""
        made: list[array[float] | BaseException] = []
        places = dict.fromkeys(place for place, _ in part)  # in order
        for wanted in places:
            made += self._vectors.embed([chunk for place, chunk in part if place == wanted])
        return made

    def _fault(
        self, chunks: Sequence[str], vectors: Sequence[array[float] | BaseException]
    ) -> Failure | None:
        faults = [
            (number, vector)
            for number, vector in enumerate(vectors)
            if isinstance(vector, BaseException)
        ]
        # What is certain first: no later attempt would help.
        for number, error in sorted(faults, key=lambda fault: (_may_pass(fault[1]), fault[0])):
            logger.warning("Chunk %d could not be embedded: %s", number, _said(error))
            code, message = _told(error)
            return Failure(
                code,
                f"Chunk {number + 1} of {len(chunks)} could not be embedded: {message}",
                _may_pass(error),
            )
        return None

    def _store_all(self, collection: str, ready: Sequence[Embedded]) -> list[Failure | None]:
        """Store documents in as few writes as possible; a write that fails is taken apart."""
        failures: list[Failure | None] = []
        group: list[Embedded] = []
        rows = 0
        for item in ready:
            if group and rows + len(item.chunks) > self._store.max_rows:
                failures += self._store_group(collection, group)
                group, rows = [], 0
            group.append(item)
            rows += len(item.chunks)
        return failures + self._store_group(collection, group)

    def _store_group(self, collection: str, group: Sequence[Embedded]) -> list[Failure | None]:
        try:
            self._store.replace(collection, group)
        except Exception as error:  # noqa: BLE001  # becomes the outcome of its documents
            if len(group) > 1:
                half = len(group) // 2
                return self._store_group(collection, group[:half]) + self._store_group(
                    collection, group[half:]
                )
            logger.warning("A document could not be stored: %s (%s)", error, error.__cause__)
            code, message = _told(error)
            return [Failure(code, message, may_pass=True)]
        return [None] * len(group)


def _all_refused(vectors: Sequence[array[float] | BaseException]) -> bool:
    return all(isinstance(vector, BaseException) and not _may_pass(vector) for vector in vectors)


def _may_pass(error: BaseException) -> bool:
    """Tell whether an error may pass: all but those that are about the text itself.

    Wrong keys, models and dimensions are mended by whoever runs the service, so no document dies
    of them.
    """
    if isinstance(error, LMInvalidRequestError):
        return error.status in _NOT_FOUND
    return not isinstance(error, EmbeddingValueError | InputFieldError)


def _told(error: BaseException) -> tuple[str, str]:
    """Return an error's code, and what may be said of it to a user."""
    if isinstance(error, DSPyError):
        told = error.to_http().body["error"]
        return str(told["code"]), str(told["message"])
    return "internal", "The service failed."


def _said(error: BaseException) -> str:
    """Return an error in one line for the log; dspylite's own hide keys that they know."""
    return f"{type(error).__name__}: {error}" if isinstance(error, DSPyError) else repr(error)


def _only_vectors(vectors: Sequence[array[float] | BaseException]) -> list[array[float]]:
    return [vector for vector in vectors if not isinstance(vector, BaseException)]
