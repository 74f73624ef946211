"""Embeddings over OpenAI's protocol: a batch of texts to the raw rows of the answer.

Not here: which texts make a batch, and whether the rows are vectors (`models/embedding/`).
"""

from __future__ import annotations

import binascii
import sys
from array import array
from collections.abc import Mapping
from typing import Any

from dspylite.abc import Io
from dspylite.errors import LMServerError
from dspylite.models.direct.engine import TRANSPORT, post, read_json
from dspylite.models.direct.providers import endpoint_of
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.loops import running_library
from dspylite.runtime.workers import call_in_thread
from dspylite.schema.messages import EmbeddingResponse, LMRequest, Usage


class DirectEmbedding:
    """Embeddings; stateless, so it is shared, copied and pickled at will.

    Vectors travel as base64, which is half the bytes and is read thirty times faster than numbers;
    servers that do not know it send numbers, which are read too.
    """

    __slots__ = ()

    def call(self, request: LMRequest) -> EmbeddingResponse:
        """Send one batch and wait on this thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        return run_flow(_embed(BLOCKING, request))

    async def acall(self, request: LMRequest) -> EmbeddingResponse:
        """Send one batch and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # aiohttp knows no other
            return await call_in_thread(self.call, request)
        return await _embed(ASYNC, request)


async def _embed(io: Io, request: LMRequest) -> EmbeddingResponse:
    model, params = request.model, request.params
    endpoint = endpoint_of(model, params)
    body: dict[str, Any] = {
        "model": endpoint.model,
        "input": [message["content"] for message in request.messages],
        "encoding_format": "base64",
    }
    body.update({name: value for name, value in params.items() if name not in TRANSPORT})
    body |= params.get("extra_body") or {}
    answer = await post(io, endpoint, "/embeddings", body, model=model, params=params)
    read = read_json(answer, model, params=params, endpoint=endpoint)
    rows = read.get("data")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise LMServerError(f"{model}: the answer has no list of vectors.", model=model)
    usage = read.get("usage")
    return EmbeddingResponse(
        outputs=(),
        rows=[{**row, "embedding": _vector(row.get("embedding"))} for row in rows],
        usage=Usage.from_provider(usage if isinstance(usage, Mapping) else None),
        model=str(read.get("model") or ""),
    )


def _vector(sent: Any) -> Any:
    """Read a vector of base64; what is none is left to the check of all vectors."""
    if not isinstance(sent, str):
        return sent
    vector = array("f")
    try:
        vector.frombytes(binascii.a2b_base64(sent, strict_mode=True))
    except ValueError:  # of either: no base64, or no whole number of float32s
        return sent
    if sys.byteorder == "big":
        vector.byteswap()  # it is little-endian on the wire
    return vector
