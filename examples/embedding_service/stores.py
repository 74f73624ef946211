"""What a vector store must be able to do, and the one that needs no other package.

Not here: Chroma (`chroma_store.py`).
"""

from __future__ import annotations

import heapq
import json
import math
import operator
import sqlite3
import threading
from array import array
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dspylite import EmbeddingMatrix
from examples.embedding_service.documents import Document
from examples.embedding_service.errors import UnavailableError

_KEPT_COLLECTIONS = 32  # whose vectors are kept in memory; guessed


@dataclass(frozen=True, slots=True)
class Embedded:
    """A document whose chunks all have a vector."""

    document: Document
    chunks: Sequence[str]
    vectors: Sequence[array[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A chunk that was found, and its cosine with the question."""

    document_id: str
    title: str
    chunk: int
    text: str
    score: float
    metadata: Mapping[str, str]


class Store(Protocol):
    """Keeps the chunks of documents in collections, by (document id, number of the chunk).

    Every method raises `UnavailableError` where the store does not answer.

    Attributes:
        name: What a health check shows.
        max_rows: Most chunks in one call of `replace`; a document may not have more.
    """

    name: str
    max_rows: int

    def replace(self, collection: str, documents: Sequence[Embedded]) -> None:
        """Store the documents, each once, in the place of what was stored of them.

        When it returns, all is stored, and no chunk is left of a longer earlier form. Each
        document's chunks appear together. Storing the same again changes nothing.
        """
        ...

    def search(self, collection: str, vector: Sequence[float], k: int) -> list[Hit]:
        """Return the nearest chunks, the nearest first."""
        ...

    def count(self) -> tuple[int, int]:
        """Count documents and chunks of all collections."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunks (
    collection TEXT NOT NULL, document_id TEXT NOT NULL, chunk INTEGER NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL, vector BLOB NOT NULL,
    PRIMARY KEY (collection, document_id, chunk)
);
"""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The vectors of a collection, and whose they are."""

    places: list[tuple[str, int]]
    matrix: EmbeddingMatrix


class BuiltinStore:
    """An exact search over vectors in one SQLite file, or in memory.

    It reads all vectors of a user for a search, and is meant for up to some ten thousand chunks.

    Args:
        path: The file; None keeps all in memory.
    """

    name = "builtin"
    max_rows = 5_000

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()  # guards the connection and the kept rows
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {_SCHEMA}")
        self._kept: OrderedDict[str, _Rows] = OrderedDict()

    def replace(self, collection: str, documents: Sequence[Embedded]) -> None:
        """Store the documents, each once, in one transaction."""
        rows = [
            (
                *(collection, item.document.document_id, number, item.document.title, chunk),
                *(json.dumps(item.document.metadata), _unit(vector).tobytes()),
            )
            for item in documents
            for number, (chunk, vector) in enumerate(zip(item.chunks, item.vectors, strict=True))
        ]
        with self._using() as db:
            db.executemany(
                "DELETE FROM chunks WHERE collection = ? AND document_id = ?",
                [(collection, item.document.document_id) for item in documents],
            )
            _check_width(db, collection, {len(row[-1]) for row in rows})
            db.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._kept.pop(collection, None)

    def search(self, collection: str, vector: Sequence[float], k: int) -> list[Hit]:
        """Return the nearest chunks, compared one by one."""
        rows = self._rows_of(collection)
        if not rows.places:
            return []
        scores = rows.matrix.dot(_unit(array("f", vector)))
        best = heapq.nsmallest(k, range(len(scores)), key=lambda row: (-scores[row], row))
        hits: list[Hit] = []
        with self._using() as db:
            for row in best:
                document_id, chunk = rows.places[row]
                found = db.execute(
                    "SELECT title, text, metadata FROM chunks "
                    "WHERE collection = ? AND document_id = ? AND chunk = ?",
                    (collection, document_id, chunk),
                ).fetchone()
                if found is not None:  # it was replaced meanwhile
                    hits.append(
                        Hit(
                            document_id=document_id,
                            title=found[0],
                            chunk=chunk,
                            text=found[1],
                            score=scores[row],
                            metadata=json.loads(found[2]),
                        )
                    )
        return hits

    def count(self) -> tuple[int, int]:
        """Count documents and chunks of all collections."""
        with self._using() as db:
            documents, chunks = db.execute(
                "SELECT count(*) FILTER (WHERE chunk = 0), count(*) FROM chunks"
            ).fetchone()
        return documents, chunks

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _rows_of(self, collection: str) -> _Rows:
        with self._using() as db:
            if collection not in self._kept:
                places: list[tuple[str, int]] = []
                values = array("f")
                for document_id, chunk, vector in db.execute(
                    "SELECT document_id, chunk, vector FROM chunks WHERE collection = ? "
                    "ORDER BY document_id, chunk",
                    (collection,),
                ):
                    places.append((document_id, chunk))
                    values.frombytes(vector)
                width = len(values) // len(places) if places else 0
                self._kept[collection] = _Rows(places, EmbeddingMatrix(values, width))
                while len(self._kept) > _KEPT_COLLECTIONS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(collection)
            return self._kept[collection]

    @contextmanager
    def _using(self) -> Generator[sqlite3.Connection]:
        """Use the connection alone, in one transaction."""
        with self._lock:
            try:
                with self._db:
                    yield self._db
            except sqlite3.Error as error:
                raise UnavailableError(
                    f"The file of the vectors cannot be used: {error}.", retry_after=5
                ) from error


def _check_width(db: sqlite3.Connection, collection: str, sizes: set[int]) -> None:
    """Let only vectors of one width into a collection: others cannot be compared with them.

    Raises:
        UnavailableError: The model gives vectors of another width than before.
    """
    kept = db.execute(
        "SELECT length(vector) FROM chunks WHERE collection = ? LIMIT 1", (collection,)
    ).fetchone()
    widths = sorted(size // 4 for size in sizes | ({kept[0]} if kept else set()))
    if len(widths) > 1:
        raise UnavailableError(
            f"Vectors of {' and '.join(map(str, widths))} numbers do not fit together; "
            "the model's server has changed."
        )


def _unit(vector: array[float]) -> array[float]:
    """Return a vector of length 1 in the same direction; zeros stay what they are."""
    length = math.sqrt(sum(map(operator.mul, vector, vector)))
    return array("f", (value / length for value in vector)) if length else vector
