"""Streams opened by the items of a batch: every piece arrives and says whose it is.

Not here: streams one at a time (`test_streams.py`).
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

from dspylite import LM, LMDelta, Parallel
from dspylite.testing import FakeServer, Reply


def text_of_item(request: Mapping[str, object]) -> Reply:
    """Answer `item 3` with ten pieces that say which they are."""
    messages: Any = request["messages"]
    name = messages[-1]["content"]
    return Reply(chunks=[f"{name}: {n} " for n in range(10)])


def lm_of(server: FakeServer, engine: str = "direct") -> LM:
    return LM("openai/m", api_base=server.base_url, api_key="none", engine=engine)


def check_pieces(found: queue.SimpleQueue[LMDelta]) -> None:
    """Check that every piece of every item came, in order within its item, with its index."""
    texts: dict[int | None, list[str]] = {}
    while not found.empty():
        piece = found.get()
        if piece.text:
            texts.setdefault(piece.item_index, []).append(piece.text)
    assert texts == {index: [f"item {index}: {n} " for n in range(10)] for index in range(8)}


def test_streams_of_a_batch_bear_the_index_of_their_item(engine: str) -> None:
    """One consumer of many streams must know whose piece it holds (B 2.12)."""
    found: queue.SimpleQueue[LMDelta] = queue.SimpleQueue()
    with FakeServer(answer=text_of_item) as server:
        lm = lm_of(server, engine)
        lm("warm-up")  # of threads that come first, each would make litellm a client

        def work(prompt: str) -> int | None:
            with lm.stream(prompt) as stream:
                for piece in stream:
                    found.put(piece)
                return stream.item_index

        items = [(work, (f"item {n}",)) for n in range(8)]
        assert Parallel(num_threads=4)(items) == list(range(8))
    check_pieces(found)


async def test_awaited_streams_of_a_batch_bear_the_index_of_their_item() -> None:
    """The same in one event loop, where the pieces of all items come in between each other."""
    found: queue.SimpleQueue[LMDelta] = queue.SimpleQueue()
    with FakeServer(answer=text_of_item) as server:
        lm = lm_of(server)

        async def work(prompt: str) -> int | None:
            async with await lm.astream(prompt) as stream:
                async for piece in stream:
                    found.put(piece)
                return stream.item_index

        items = [(work, (f"item {n}",)) for n in range(8)]
        assert await Parallel(num_threads=8).acall(items) == list(range(8))
    check_pieces(found)


def test_stream_outside_a_batch_bears_no_index() -> None:
    """Index 0 would be somebody's."""
    with FakeServer() as server, lm_of(server).stream("hello") as stream:
        assert {piece.item_index for piece in stream} == {stream.item_index} == {None}
