"""Texts cut into chunks, and turned into vectors: the service's view of `dspylite.Embedder`.

Not here: what becomes of a document whose chunk has no vector (`pipeline.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import dspylite as dspy
from dspylite.errors import BatchError
from examples.embedding_service.config import Config


class Vectors:
    """Cuts and embeds with one embedder, which any thread may use.

    Args:
        config: The model, and how long chunks are.

    Raises:
        LMConfigurationError: The model's settings cannot work.
    """

    def __init__(self, config: Config) -> None:
        options: dict[str, Any] = {}
        if not config.model.startswith("offline/"):
            # What still fails is tried again later, without holding up a worker.
            options["num_retries"] = 1
        if config.api_base:
            options["api_base"] = config.api_base
        if config.embedding_key:
            options["api_key"] = config.embedding_key.get_secret_value()
        self._embedder = dspy.Embedder(
            config.model,
            dimensions=config.dimensions,
            instruction=config.instruction,
            query_instruction=config.query_instruction,
            tokenizer=config.tokenizer,
            **options,
        )
        self._chunk_tokens = config.chunk_tokens
        self._overlap = config.chunk_overlap

    def split(self, text: str) -> list[str]:
        """Cut a text into chunks that the model reads whole."""
        return self._embedder.split(text, self._chunk_tokens, self._overlap)

    def embed(self, chunks: Sequence[str]) -> list[array[float] | BaseException]:
        """Return a vector, or why there is none, for each chunk."""
        if not chunks:
            return []
        try:
            return [array("f", row) for row in self._embedder.embed(chunks)]
        except BatchError as error:
            return [
                array("f", error.results[index])
                if index in error.results
                else error.errors.get(index, error)
                for index in range(len(chunks))
            ]
        except Exception as error:  # noqa: BLE001  # judged by the pipeline, document by document
            return [error] * len(chunks)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question.

        Raises:
            LMError: The model failed.
        """
        head = (self.split(text) or [text])[0]  # what is longer would be cut by the model, silently
        return list(self._embedder.embed([head], query=True)[0])
