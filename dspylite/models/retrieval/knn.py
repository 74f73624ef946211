"""`KNN`: the examples of a set whose inputs are nearest to the given ones.

Not here: how texts become vectors and which are near (`models/retrieval/nearest.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dspylite.abc import Io
from dspylite.errors import InputFieldError
from dspylite.models.matrix import EmbeddingMatrix
from dspylite.models.retrieval.nearest import (
    Vectorizer,
    checked_embedder,
    checked_k,
    embed_texts,
    nearest,
)
from dspylite.models.retrieval.search import Rows
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.schema.records import Example


class KNN:
    """The `k` examples of a set whose inputs are nearest to the given ones.

    Inputs become one text, `"name: value | name: value"`, whose vectors are compared by their dot
    products. Examples that are equally near come in the order of the set. Threads and tasks may
    share one.

    Args:
        k: Examples per call; all of them where the set has fewer.
        trainset: Examples that know their inputs (`example.with_inputs(...)`).
        vectorizer: An `Embedder`, or a function from a list of texts to one vector per text, sync
            or async.

    Attributes:
        k: As given.
        embedding: The vectorizer.

    Raises:
        InputFieldError: An example does not know its inputs.
        LMConfigurationError: `k` or `vectorizer` cannot work.
        EmbeddingError: The vectorizer did not give one good vector per text.

    Example:
        >>> from dspylite.models.embedder import Embedder
        >>> examples = [
        ...     Example(question=q, answer=a).with_inputs("question")
        ...     for q, a in [("How old is the sun?", "old"), ("What do cats eat?", "fish")]
        ... ]
        >>> knn = KNN(k=1, trainset=examples, vectorizer=Embedder("offline/hashing"))
        >>> knn(question="What do dogs eat?")[0].answer
        'fish'
    """

    def __init__(self, k: int, trainset: Iterable[Example], vectorizer: Vectorizer) -> None:
        self.k = checked_k(k)
        self._examples = tuple(trainset)
        self.embedding = checked_embedder(vectorizer)
        texts = [_text_of(index, example) for index, example in enumerate(self._examples)]
        self._rows = Rows(run_flow(embed_texts(BLOCKING, vectorizer, texts)))

    @property
    def trainset(self) -> list[Example]:
        """The examples, in a new list."""
        return list(self._examples)

    @property
    def trainset_vectors(self) -> EmbeddingMatrix:
        """The vectors of the examples' inputs; they cannot be changed."""
        return self._rows.matrix.toreadonly()

    def __call__(self, **kwargs: Any) -> list[Example]:
        """Return the examples nearest to the inputs, the nearest first.

        Args:
            **kwargs: Inputs by name, in the order in which the examples have theirs.

        Raises:
            InputFieldError: There is no input.
            EmbeddingShapeError: The vector has another dimension than those of the examples.
        """
        return run_flow(self._plan(BLOCKING, kwargs))

    async def acall(self, **kwargs: Any) -> list[Example]:
        """Await the examples; otherwise as the call."""
        return await self._plan(ASYNC, kwargs)

    async def _plan(self, io: Io, inputs: Mapping[str, Any]) -> list[Example]:
        if not inputs:
            raise InputFieldError("`KNN` needs inputs by name, such as `knn(question=...)`.")
        k, texts = checked_k(self.k), [_as_text(inputs)]
        (hits,) = await nearest(io, self._rows, self.embedding, texts, k, is_cosine=False)
        return [self._examples[index] for index, _ in hits]

    def __repr__(self) -> str:
        return f"KNN(k={self.k}, {len(self._examples)} examples)"


def _text_of(index: int, example: Example) -> str:
    try:
        return _as_text(dict(example.inputs().items()))
    except (AttributeError, ValueError) as error:
        raise InputFieldError(f"Example {index} of the trainset cannot be used: {error}") from None


def _as_text(inputs: Mapping[str, Any]) -> str:
    return " | ".join(f"{name}: {value}" for name, value in inputs.items())
