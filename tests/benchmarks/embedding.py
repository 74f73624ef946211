"""What a child process measures of embeddings: thousands of texts, in batches, to vectors.

Not here: the server (`embedding_server.py`). Libraries are imported inside, because a child process
loads one of them only.
"""

from __future__ import annotations

import array
import asyncio
import base64
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.embedding_server import BATCH, DIMENSIONS
from tests.benchmarks.peers import HEADERS, KEY, TIMEOUT_S, base

MODEL = "text-embedding-3-small"
_AT_ONCE = 8
"""Requests under way at once, where a client can have several: dspylite's default."""

Embed = Callable[[list[str]], Any]


def embed(peer: str, port: str, texts: str) -> dict[str, float]:
    """Embed so many texts once, after one batch for warming up; texts per second."""
    turn = _PEERS[peer](int(port))
    turn([f"warm {number}" for number in range(BATCH)])
    listed = [f"text number {number} of the corpus, of a few words" for number in range(int(texts))]
    cpu, start = time.process_time(), time.perf_counter()
    made = turn(listed)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if len(made) != len(listed) or len(made[-1]) != DIMENSIONS:
        raise ValueError(f"{len(made)} vectors of {len(made[-1])} numbers came back")
    return {"per_s": len(listed) / wall, "cpu_s": cpu / len(listed)}


def _embedder(module: str, **options: Any) -> Callable[[int], Embed]:
    def make(port: int) -> Embed:
        dspy: Any = __import__(module)
        own = {"api_base": base(port), "api_key": KEY, "caching": False, **options}
        embedder = dspy.Embedder(f"openai/{MODEL}", batch_size=BATCH, **own)
        return embedder.embed if module == "dspylite" else embedder  # type: ignore[no-any-return]

    return make


def _kept(port: int) -> Embed:
    """Keep each vector in memory and on disk, in a new directory."""
    import dspylite as dspy

    dspy.configure_cache(disk_cache_dir=tempfile.mkdtemp())
    return _embedder("dspylite", caching=True)(port)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))


def _litellm(port: int) -> Embed:
    import litellm

    def turn(texts: list[str]) -> Any:
        made: list[Any] = []
        for batch in _batches(texts):
            answer: Any = litellm.embedding(
                f"openai/{MODEL}", batch, api_base=base(port), api_key=KEY
            )
            made += [row["embedding"] for row in answer.data]
        return made

    return turn


def _openai(port: int) -> Embed:
    import openai

    client = openai.OpenAI(base_url=base(port), api_key=KEY, timeout=TIMEOUT_S)

    def turn(texts: list[str]) -> Any:
        made: list[Any] = []
        for batch in _batches(texts):
            answer = client.embeddings.create(model=MODEL, input=batch)
            made += [row.embedding for row in answer.data]
        return made

    return turn


def _aiohttp(port: int) -> Embed:
    """Ask by hand, for base64, several requests at once, and read each vector into an array."""
    import aiohttp

    async def turn(texts: list[str]) -> list[array.array[float]]:
        batches = list(_batches(texts))
        made: dict[int, list[array.array[float]]] = {}
        waiting = iter(enumerate(batches))
        async with aiohttp.ClientSession(headers=HEADERS) as session:

            async def work() -> None:
                for place, batch in waiting:
                    body = {"model": MODEL, "input": batch, "encoding_format": "base64"}
                    async with session.post(f"{base(port)}/embeddings", json=body) as answer:
                        read = json.loads(await answer.read())
                    made[place] = [
                        array.array("f", base64.b64decode(row["embedding"])) for row in read["data"]
                    ]

            await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
        return [vector for place in range(len(batches)) for vector in made[place]]

    return lambda texts: asyncio.run(turn(texts))


_PEERS: dict[str, Callable[[int], Embed]] = {
    "dspylite": _embedder("dspylite"),
    "dspylite-cache": _kept,
    "dspylite-litellm": _embedder("dspylite", engine="litellm"),
    "dspy": _embedder("dspy"),
    "litellm": _litellm,
    "openai": _openai,
    "aiohttp": _aiohttp,
}
