"""`Embedder`: texts to vectors, through a hosted model, a function of your own, or offline hashing.

Not here: the block of vectors (`models/matrix.py`), and how texts are hashed
(`models/offline/hashing.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Protocol

from dspylite.abc import Io
from dspylite.errors import (
    EmbeddingShapeError,
    InputFieldError,
    LMConfigurationError,
    MissingExtraError,
)
from dspylite.models.direct.engine import DirectEmbedding
from dspylite.models.direct.providers import provider_of
from dspylite.models.engines import checked_engine
from dspylite.models.litellm import LiteLLMEmbedding
from dspylite.models.matrix import EmbeddingMatrix, read_vector
from dspylite.models.numpy_door import load_numpy
from dspylite.models.offline.engine import OFFLINE_PREFIX
from dspylite.models.offline.hashing import hash_embedding
from dspylite.models.parameters import check_params
from dspylite.models.retry import Retry
from dspylite.runtime.cancellation import check_cancelled
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.settings import settings
from dspylite.schema.messages import Usage

HASHING_MODEL = "offline/hashing"
DEFAULT_HASH_DIMENSIONS = 512

EmbedFunction = Callable[Concatenate[list[str], ...], Any]
"""From a list of texts to one vector per text, sync or async; takes further keywords too."""


class _Backend(Protocol):
    """What turns one batch of texts into rows."""

    async def rows(self, texts: list[str], io: Io) -> tuple[list[Any], Usage]: ...


@dataclass(frozen=True, slots=True)
class _Hosted:
    engine: DirectEmbedding | LiteLLMEmbedding
    retry: Retry

    async def rows(self, texts: list[str], io: Io) -> tuple[list[Any], Usage]:
        async def send(batch: list[str]) -> tuple[list[Any], Usage]:
            found, usage = await io.call(self.engine, batch)
            return _in_order(found, len(batch)), usage

        return await self.retry.run(send, texts, io, model=self.engine.model)


@dataclass(frozen=True, slots=True)
class _Function:
    function: EmbedFunction
    arguments: Mapping[str, Any]

    async def rows(self, texts: list[str], io: Io) -> tuple[list[Any], Usage]:
        made: Any = await io.any(self.function, texts, **self.arguments)
        if made is None or not hasattr(made, "__len__"):
            raise EmbeddingShapeError(
                f"The embedding function returned {made!r:.100} instead of one vector per text."
            )
        return list(made), Usage()


@dataclass(frozen=True, slots=True)
class _Hashing:
    dimensions: int

    def call(self, texts: list[str]) -> list[array[float]]:
        return [hash_embedding(text, self.dimensions) for text in texts]

    async def rows(self, texts: list[str], io: Io) -> tuple[list[Any], Usage]:
        words = sum(len(text.split()) for text in texts)
        rows: list[Any] = list(await io.any(self.call, texts))
        return rows, Usage(prompt_tokens=words, total_tokens=words, calls=1)


class Embedder:
    """Turns texts into vectors, in order, from threads and tasks alike.

    Args:
        model: A hosted model (`"openai/text-embedding-3-small"`), `"offline/hashing"`, or a
            function from a list of texts to one vector per text; the function may be async.
        batch_size: Most texts in one request.
        caching: Whether vectors may be reused.
        max_concurrency: Most batches under way at once, per call of `embed`.
        num_retries: Further attempts of a batch after a failure that may pass.
        engine: Who makes the requests: `"direct"`, `"litellm"` or `"auto"`, as for `LM`.
        **kwargs: Sent with every request (`api_key`, `api_base`, `dimensions`, `timeout` ...), or
            passed to the function. `offline/hashing` takes `dimensions` (512) alone.

    Raises:
        LMConfigurationError: A parameter cannot work.

    Example:
        >>> Embedder("offline/hashing", dimensions=64).embed(["a cat", "a dog"]).shape
        (2, 64)
    """

    def __init__(
        self,
        model: str | EmbedFunction,
        batch_size: int = 200,
        caching: bool = True,
        *,
        max_concurrency: int = 4,
        num_retries: int = 3,
        engine: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_concurrency", max_concurrency)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LMConfigurationError(f"`{name}` must be at least 1, not {value!r}.")
        self.model = model
        self.batch_size = batch_size
        self.caching = caching
        self.max_concurrency = max_concurrency
        self.num_retries = num_retries
        self.kwargs = dict(kwargs)
        self._backend = _backend(model, num_retries, checked_engine(engine), self.kwargs)

    def embed(self, texts: Sequence[str]) -> EmbeddingMatrix:
        """Turn texts into vectors and wait on this thread.

        Args:
            texts: n strings. Equal strings are sent once.

        Returns:
            A float32 block of shape (n, dim), row i for texts[i].

        Raises:
            EmbeddingShapeError: There was not one vector per text, or one has another dimension.
            EmbeddingValueError: A vector holds NaN, infinity, null or no number.
            LMError: The provider failed and the attempts are used up.
        """
        return run_flow(self.plan(BLOCKING, texts))

    async def aembed(self, texts: Sequence[str]) -> EmbeddingMatrix:
        """Turn texts into vectors and await it; otherwise as `embed`."""
        return await self.plan(ASYNC, texts)

    def __call__(self, inputs: str | Sequence[str]) -> Any:
        """Turn a text or texts into a numpy array of shape (dim,) or (n, dim).

        Raises:
            MissingExtraError: numpy is not installed; `embed` does without it.
        """
        return _as_numpy(self.embed(_as_list(inputs)), inputs)

    async def acall(self, inputs: str | Sequence[str]) -> Any:
        """Await the numpy array; otherwise as `__call__`."""
        return _as_numpy(await self.aembed(_as_list(inputs)), inputs)

    async def plan(self, io: Io, texts: Sequence[str]) -> EmbeddingMatrix:
        """Turn texts into vectors through a driver, as part of another plan."""
        texts = list(_checked_texts(texts))  # read once: an iterator would be empty the next time
        first_index: dict[str, int] = {}
        for index, text in enumerate(texts):
            first_index.setdefault(text, index)
        unique = list(first_index)
        batches = [
            unique[start : start + self.batch_size]
            for start in range(0, len(unique), self.batch_size)
        ]

        async def embed_batch(batch: list[str]) -> list[array[float]]:
            check_cancelled()
            rows, usage = await self._backend.rows(batch, io)
            if len(rows) != len(batch):
                raise EmbeddingShapeError(
                    f"{len(batch)} texts gave {len(rows)} vectors; nothing of this batch is used."
                )
            tracker = settings.usage_tracker
            if tracker is not None and usage.calls:
                tracker.add(str(self.model), usage)
            return [
                read_vector(row, first_index[text]) for row, text in zip(rows, batch, strict=True)
            ]

        made = await io.map(embed_batch, batches, limit=self.max_concurrency)
        vectors = dict(zip(unique, (vector for rows in made for vector in rows), strict=True))
        return EmbeddingMatrix.from_rows(vectors[text] for text in texts)

    def __repr__(self) -> str:
        name = (
            self.model
            if isinstance(self.model, str)
            else getattr(self.model, "__name__", "function")
        )
        return f"Embedder({name!r}, batch_size={self.batch_size})"


def _backend(
    model: str | EmbedFunction, num_retries: int, engine: str, kwargs: Mapping[str, Any]
) -> _Backend:
    retry = Retry(max_retries=num_retries)
    if callable(model):
        return _Function(model, kwargs)
    if not isinstance(model, str) or not model.strip():
        raise LMConfigurationError(
            "`model` must be a name such as 'openai/text-embedding-3-small' or a function, "
            f"not {model!r}."
        )
    if not model.startswith(OFFLINE_PREFIX):
        check_params(kwargs)
        if engine == "direct" and provider_of(model) is None:
            raise LMConfigurationError(
                f"The direct engine asks OpenAI-compatible servers, not {model!r}; leave `engine` "
                "out, or write 'openai/<name>' with `api_base=` if the server is compatible."
            )
        is_direct = engine != "litellm" and provider_of(model) is not None
        made = DirectEmbedding if is_direct else LiteLLMEmbedding
        return _Hosted(made(model, kwargs), retry)
    dimensions = kwargs.get("dimensions", DEFAULT_HASH_DIMENSIONS)
    if model != HASHING_MODEL or set(kwargs) - {"dimensions"}:
        raise LMConfigurationError(
            f"`{HASHING_MODEL}` is the only offline embedder and takes `dimensions` alone, "
            f"not {model!r} with {sorted(kwargs)}."
        )
    if isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1:
        raise LMConfigurationError(f"`dimensions` must be at least 1, not {dimensions!r}.")
    return _Hashing(dimensions)


def _in_order(rows: Sequence[Mapping[str, Any]], wanted: int) -> list[Any]:
    """Put the rows of an answer in the order of their `index`; they may come in any other."""
    given: list[Any] = [row.get("index") for row in rows]
    # Servers that send no index at all send the rows in order.
    indices = given if any(index is not None for index in given) else list(range(len(rows)))
    if set(indices) != set(range(wanted)) or len(rows) != wanted:
        raise EmbeddingShapeError(
            f"{wanted} texts gave {len(rows)} vectors (with indices {indices[:8]}"
            f"{'...' if len(indices) > 8 else ''}); nothing of this batch is used."
        )
    ordered: list[Any] = [None] * wanted
    for index, row in zip(indices, rows, strict=True):
        ordered[index] = row.get("embedding")
    return ordered


def _checked_texts(texts: Sequence[str]) -> Iterator[str]:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise InputFieldError(
            f"`embed` takes a list of texts, not {texts!r:.100}; write `embed([text])` for one."
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputFieldError(f"Text {index} is not a string but {text!r:.100}.")
        yield text


def _as_list(inputs: str | Sequence[str]) -> Sequence[str]:
    return [inputs] if isinstance(inputs, str) else inputs


def _as_numpy(block: EmbeddingMatrix, inputs: str | Sequence[str]) -> Any:
    np = load_numpy()
    if np is None:
        raise MissingExtraError(
            "Calling an embedder returns a numpy array: `pip install dspylite[numpy]`, or use "
            "`embedder.embed(texts)`, which needs no numpy."
        )
    matrix = np.asarray(block)
    return matrix[0] if isinstance(inputs, str) else matrix
