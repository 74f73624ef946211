"""One call of an embedder: which vectors are kept, which batches are sent, what becomes of each.

Not here: who is asked (`sources.py`), and the `Embedder` with its parameters.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspylite.abc import Io
from dspylite.errors import (
    BatchError,
    CallCancelledError,
    EmbeddingError,
    EmbeddingShapeError,
    LMError,
)
from dspylite.models.embedding.batches import batched
from dspylite.models.embedding.chunks import Chunk, pool
from dspylite.models.embedding.kept import Shelf
from dspylite.models.embedding.rows import Shape
from dspylite.models.embedding.sources import Source, may_be_one_text
from dspylite.models.embedding.tokens import Tokenizer
from dspylite.models.embedding.window import Window
from dspylite.models.matrix import EmbeddingMatrix, read_vector
from dspylite.runtime.cancellation import check_cancelled
from dspylite.runtime.settings import settings
from dspylite.schema.messages import Usage

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None, int], object]
"""Is told how many texts have ended, of how many, and how many of them failed."""

_MAX_VAIN = 12
"""How many failures of parts of a batch, while nothing of the call has succeeded, show that it is
not one text that breaks it; more than a batch of 1,000 takes to be halved down to one text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all calls of an embedder have in common.

    Attributes:
        source: Who is asked.
        shape: What vectors must be like.
        window: How long a text may be; None for any length.
        tokenizer: Counts tokens.
        batch_size: Most texts in a batch.
        max_batch_tokens: Most tokens in a batch.
        is_kept: Whether vectors are kept for the next call.
    """

    source: Source
    shape: Shape
    window: Window | None
    tokenizer: Tokenizer
    batch_size: int
    max_batch_tokens: int
    is_kept: bool


class Run:
    """One call.

    Args:
        plan: The embedder's.
        io: The driver.
        instruction: Stands before each text.
        progress: Is told of the progress.
    """

    def __init__(
        self, plan: Plan, io: Io, *, instruction: str = "", progress: Progress | None = None
    ) -> None:
        self._plan = plan
        self._io = io
        self._instruction = instruction
        self._progress = progress
        self._shelf: Shelf | None = None
        self._places: dict[str, int] = {}  # what is sent -> index of its text in the input
        self._parts: dict[str, list[Chunk]] = {}  # text -> its parts, where it has several
        self._vectors: dict[str, array[float]] = {}  # what is sent -> its vector
        self._failures: dict[str, Exception] = {}
        self._found: list[str] = []  # what was not sent, because its vector was kept
        self._lock = threading.Lock()  # guards the next; the progress callback runs inside it
        self._ended = 0
        self._dim = 0  # of the rows of this call; 0 until there is one
        self._is_stopped = False

    async def run(self, texts: Sequence[str]) -> EmbeddingMatrix:
        """Return one vector per text.

        Raises:
            BatchError: Some texts have a vector and others have none.
            Exception: None has one: what went wrong with the first.
        """
        pieces_of = await self._pieces(texts)
        self._tell(len(self._failures))
        if self._plan.is_kept:
            self._shelf = Shelf.of(self._plan.source)
        if self._shelf is not None:
            await self._take_kept(self._shelf)
        missing = [
            piece
            for piece in self._places
            if piece not in self._vectors and piece not in self._failures
        ]
        if missing:
            await self._io.map(
                self._send, await self._batches(missing), limit=self._plan.source.width
            )
        elif self._found:
            tracker = settings.usage_tracker
            if tracker is not None:
                tracker.add(self._plan.source.name, Usage(cached_calls=1))
        self._compare_dimensions()
        return self._matrix(texts, pieces_of)

    # -- before anything is sent -------------------------------------------------------------------

    async def _pieces(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """Return what is sent for each different text."""
        places: dict[str, int] = {}
        for index, text in enumerate(texts):
            places.setdefault(text, index)
        if self._plan.window is None:
            pieces_of = {text: [self._instruction + text] for text in places}
        else:  # which may take a moment
            pieces_of = await self._io.any(self._fitted, places, self._plan.window)
        for text, pieces in pieces_of.items():
            for piece in pieces:
                self._places.setdefault(piece, places[text])
        return pieces_of

    def _fitted(self, places: dict[str, int], window: Window) -> dict[str, list[str]]:
        room = window.room(self._instruction)
        pieces_of: dict[str, list[str]] = {}
        for text, index in places.items():
            try:
                parts = window.fitted(text, room, index)
            except LMError as error:
                pieces_of[text] = [self._instruction + text]
                self._failures[pieces_of[text][0]] = error
                continue
            pieces_of[text] = [self._instruction + part.text for part in parts]
            if len(parts) > 1:
                self._parts[text] = parts
        return pieces_of

    async def _take_kept(self, shelf: Shelf) -> None:
        wanted = [piece for piece in self._places if piece not in self._failures]
        for piece, vector in (await shelf.find(self._io, wanted)).items():
            try:
                self._vectors[piece] = self._plan.shape.fitted(vector, self._places[piece])
            except EmbeddingShapeError:
                continue  # the model has changed since; it is asked again
            self._found.append(piece)
        self._tell(len(self._found))

    async def _batches(self, pieces: list[str]) -> list[list[str]]:
        plan = self._plan
        split = partial(
            batched,
            max_count=plan.batch_size,
            max_tokens=plan.max_batch_tokens,
            tokenizer=plan.tokenizer,
        )
        if sum(map(len, pieces)) * 4 <= plan.max_batch_tokens:  # bytes of UTF-8 at most
            return split(pieces)
        return await self._io.any(split, pieces)

    # -- sending -----------------------------------------------------------------------------------

    async def _send(self, batch: list[str]) -> None:
        """Send a batch; if it fails and one text may be the reason, send its halves."""
        parts = deque([batch])
        vain = 0  # failures while nothing of the call had succeeded
        while parts and not self._is_stopped:
            check_cancelled()
            part = parts.popleft()
            error = await self._failure_of(part)
            if error is None:
                continue
            is_one_text = self._plan.source.is_divisible and may_be_one_text(error)
            vain += not self._dim
            if is_one_text and vain <= _MAX_VAIN and len(part) > 1:
                middle = len(part) // 2
                if vain == 2:  # the first half: before its parts the second, which may be whole
                    parts.extend((part[:middle], part[middle:]))
                else:
                    parts.extendleft((part[middle:], part[:middle]))
                continue
            if isinstance(error, LMError) and not (is_one_text and vain <= _MAX_VAIN):
                self._is_stopped = True  # it would be the same for every other batch
            self._fail(part, error)

    async def _failure_of(self, batch: list[str]) -> Exception | None:
        """Send a batch and take what it gives; return what went wrong instead."""
        try:
            rows = await self._plan.source.rows(batch, self._io)
        except CallCancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a function may raise anything; it is kept
            return error
        await self._accept(batch, rows)
        return None

    async def _accept(self, batch: list[str], rows: list[Any]) -> None:
        good: dict[str, array[float]] = {}
        for piece, row in zip(batch, rows, strict=True):
            index = self._places[piece]
            try:
                vector = read_vector(row, index)
                self._check_dimension(vector, index)
                self._vectors[piece] = self._plan.shape.fitted(vector, index)
            except EmbeddingError as error:
                self._fail([piece], error)
            else:
                good[piece] = vector
        if self._shelf is not None and good:
            await self._shelf.keep(self._io, good)
        self._tell(len(good))

    def _check_dimension(self, vector: array[float], index: int) -> None:
        if len(vector) == self._dim:  # read without the lock: it changes once
            return
        with self._lock:
            self._dim = self._dim or len(vector)
        if len(vector) != self._dim:
            raise EmbeddingShapeError(
                f"The vector of text {index} has {len(vector)} dimensions, the first has "
                f"{self._dim}.",
                index=index,
            )

    def _compare_dimensions(self) -> None:
        """Refuse vectors kept from before the model changed, and forget them."""
        if self._shelf is None or not self._found:
            return
        dims = {len(vector) for vector in self._vectors.values()}
        if len(dims) < 2:
            return
        self._shelf.forget(self._found)
        for piece in self._found:
            index = self._places[piece]
            self._failures[piece] = EmbeddingShapeError(
                f"The vector of text {index}, which was kept, has {len(self._vectors[piece])} "
                "dimensions, and others have not: the model has changed. What was kept is "
                "forgotten; call again.",
                index=index,
            )

    def _fail(self, pieces: Iterable[str], error: Exception) -> None:
        failed = dict.fromkeys(pieces, error)
        self._failures.update(failed)
        self._tell(len(failed))

    def _tell(self, ended: int) -> None:
        if self._progress is None or not ended:
            return
        with self._lock:
            self._ended += ended
            try:
                self._progress(self._ended, len(self._places), len(self._failures))
            except Exception:  # a broken progress display must not harm the call
                logger.warning("the progress callback failed", exc_info=True)

    # -- afterwards --------------------------------------------------------------------------------

    def _matrix(self, texts: Sequence[str], pieces_of: dict[str, list[str]]) -> EmbeddingMatrix:
        made = {text: self._made(text, pieces) for text, pieces in pieces_of.items()}
        vectors = [vector for text in texts if isinstance(vector := made[text], array)]
        if len(vectors) == len(texts):
            block = bytearray().join(vectors)
            return EmbeddingMatrix(memoryview(block).cast("f"), len(vectors[0]) if vectors else 0)
        raise self._error(texts, made)

    def _made(self, text: str, pieces: list[str]) -> array[float] | Exception | None:
        """Return the vector of a text; what went wrong; None where it was never sent."""
        failure = next((self._failures[p] for p in pieces if p in self._failures), None)
        if failure is not None:
            return failure
        vectors = [self._vectors[piece] for piece in pieces if piece in self._vectors]
        if len(vectors) < len(pieces):
            return None
        if len(vectors) == 1:
            return vectors[0]
        try:
            return pool(vectors, [part.tokens for part in self._parts[text]])
        except EmbeddingError as error:
            return error

    @staticmethod
    def _error(texts: Sequence[str], made: dict[str, array[float] | Exception | None]) -> Exception:
        results: dict[int, array[float]] = {}
        errors: dict[int, BaseException] = {}
        for index, text in enumerate(texts):
            if isinstance(found := made[text], array):
                results[index] = found[:]  # what is kept must not be changed through it
            elif found is not None:
                errors[index] = found
        first, error = next(iter(errors.items()))
        if not results:
            assert isinstance(error, Exception)
            return error
        untried = len(texts) - len(results) - len(errors)
        unsent = f" and {untried} were never sent" if untried else ""
        failed = BatchError(
            f"{len(errors)} of {len(texts)} texts have no vector{unsent}; what the others gave is "
            f"in `.results`. Text {first}: {type(error).__name__}: {error}",
            results=results,
            errors=errors,
            untried=untried,
        )
        failed.__cause__ = error
        return failed
