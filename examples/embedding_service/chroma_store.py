"""Chroma as the vector store: embedded in this process, or a server that many share.

Not here: what a store promises (`stores.py`).
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dspylite.errors import MissingExtraError
from examples.embedding_service.errors import UnavailableError
from examples.embedding_service.stores import Embedded, Hit

try:
    import chromadb
    import httpx  # which comes with chromadb
    from chromadb.config import Settings
    from chromadb.errors import NotFoundError
except ImportError as missing:
    raise MissingExtraError("This store needs `pip install chromadb`.") from missing

_COUNT_KEPT_S = 2.0
"""How long counts are kept: Chroma counts documents by listing them, which health checks should
not ask for every second."""

_CONNECT_S, _ANSWER_S = 5.0, 60.0
"""How long a server may be silent; guessed. Without a limit, one that hangs would hold its worker,
and with it the documents, for ever."""


class ChromaStore:
    """One collection for each user and model.

    Rows are upserted under `document id:number`: `add` would keep the old row of an id. A user's
    own metadata lies in one field as JSON, so that no name of it can pass for one of ours.

    Args:
        make_client: Makes the client when it is first needed; again after a failure.
        name: What a health check shows.
    """

    def __init__(self, make_client: Callable[[], Any], name: str) -> None:
        self.name = name
        self.max_rows = 5_000  # until a client says what its server takes
        self._make_client = make_client
        self._lock = threading.Lock()  # guards what is kept
        self._client: Any = None
        self._collections: dict[str, Any] = {}
        self._counted: tuple[float, tuple[int, int]] | None = None

    @classmethod
    def embedded(cls, path: Path) -> ChromaStore:
        """Keep the vectors in files of this process alone."""
        settings = Settings(anonymized_telemetry=False)
        return cls(lambda: chromadb.PersistentClient(path=str(path), settings=settings), "chroma")

    @classmethod
    def at(cls, url: str) -> ChromaStore:
        """Keep the vectors in a server, which workers share."""
        return cls(lambda: _connect(url), "chroma-server")

    def replace(self, collection: str, documents: Sequence[Embedded]) -> None:
        """Upsert all chunks in one write, then remove those beyond the end of their document."""
        rows = [(item, number) for item in documents for number in range(len(item.chunks))]
        with self._reaching(collection) as kept:
            kept.upsert(
                ids=[_row_id(item, number) for item, number in rows],
                embeddings=[_plain(item.vectors[number]) for item, number in rows],
                documents=[item.chunks[number] for item, number in rows],
                metadatas=[
                    {
                        "document_id": item.document.document_id,
                        "chunk": number,
                        "title": item.document.title,
                        "metadata": json.dumps(item.document.metadata),
                    }
                    for item, number in rows
                ],
            )
            # Chunks are written together, so there are old ones beyond the end if the next is one.
            beyond = {_row_id(item, len(item.chunks)): item for item in documents}
            for row_id in kept.get(ids=list(beyond), include=[])["ids"]:
                item = beyond[row_id]
                kept.delete(
                    where={
                        "$and": [
                            {"document_id": {"$eq": item.document.document_id}},
                            {"chunk": {"$gte": len(item.chunks)}},
                        ]
                    }
                )

    def search(self, collection: str, vector: Sequence[float], k: int) -> list[Hit]:
        """Return the nearest chunks by Chroma's index."""
        with self._reaching(collection) as kept:
            found = kept.query(
                query_embeddings=[list(vector)],
                n_results=k,
                include=["documents", "metadatas", "distances"],
            )
        return [
            Hit(
                document_id=fields["document_id"],
                title=fields["title"],
                chunk=fields["chunk"],
                text=text,
                # NaN where a vector is all zeros.
                score=1.0 - distance if distance == distance else 0.0,  # noqa: PLR0124
                metadata=json.loads(fields["metadata"]),
            )
            for text, fields, distance in zip(
                found["documents"][0], found["metadatas"][0], found["distances"][0], strict=True
            )
        ]

    def count(self) -> tuple[int, int]:
        """Count documents and chunks of all collections, as of some seconds ago."""
        with self._lock:
            kept = self._counted
        if kept is not None and time.monotonic() < kept[0] + _COUNT_KEPT_S:
            with self._reaching(None) as client:
                client.heartbeat()
            return kept[1]
        documents = chunks = 0
        with self._reaching(None) as client:
            for collection in client.list_collections():
                if collection.name.startswith("es-"):
                    chunks += collection.count()
                    documents += len(collection.get(where={"chunk": 0}, include=[])["ids"])
        with self._lock:
            self._counted = time.monotonic(), (documents, chunks)
        return documents, chunks

    def close(self) -> None:
        """Let go of the client."""
        with self._lock:
            client, self._client = self._client, None
            self._collections.clear()
        if client is not None:
            sessions = _sessions(client)
            client.close()
            # It leaves the connections of its HTTP sessions open.
            for session in sessions:
                session.close()

    @contextmanager
    def _reaching(self, collection: str | None) -> Generator[Any]:
        """Give the collection, or the client, and say `UnavailableError` where it fails.

        Raises:
            UnavailableError: Chroma does not answer, or refuses.
        """
        try:
            yield self._connected() if collection is None else self._collection(collection)
        except Exception as error:  # httpx's, Chroma's own, of the Rust core; their types vary
            with self._lock:
                self._collections.clear()
                if isinstance(error, NotFoundError):  # a new server under the same address
                    self._counted = None
            raise UnavailableError(
                f"The vector store failed ({type(error).__name__}).", retry_after=5
            ) from error

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                client = self._make_client()  # may wait for the network; then all would wait anyway
                self.max_rows = min(self.max_rows, client.get_max_batch_size())
                self._client = client
            return self._client

    def _collection(self, name: str) -> Any:
        with self._lock:
            kept = self._collections.get(name)
        if kept is None:
            kept = self._connected().get_or_create_collection(
                name,
                configuration={"hnsw": {"space": "cosine"}},
                embedding_function=None,  # else Chroma would download a model of its own
            )
            with self._lock:
                self._collections[name] = kept
        return kept


def _connect(url: str) -> Any:
    """Return a client that waits for nothing endlessly, as Chroma's own does."""
    parts = urlsplit(url)
    is_encrypted = parts.scheme == "https"
    port = parts.port or (443 if is_encrypted else 80)
    host = parts.hostname or "localhost"
    shown = f"[{host}]" if ":" in host else host
    # Making the client asks the server, without a limit; so see first whether it answers.
    httpx.get(f"{parts.scheme}://{shown}:{port}/api/v2/heartbeat", timeout=_CONNECT_S)
    client = chromadb.HttpClient(
        host=host, port=port, ssl=is_encrypted, settings=Settings(anonymized_telemetry=False)
    )
    for session in _sessions(client):
        session.timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
    return client


def _sessions(client: Any) -> list[Any]:
    """Return the HTTP sessions of a client; one of embedded files has none."""
    parts = (client, getattr(client, "_admin_client", None))
    servers = (getattr(part, "_server", None) for part in parts)
    found = (getattr(server, "_session", None) for server in servers)
    return [session for session in found if session is not None]


def _row_id(item: Embedded, number: int) -> str:
    return f"{item.document.document_id}:{number}"


def _plain(vector: array[float]) -> list[float]:
    return vector.tolist()
