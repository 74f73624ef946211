"""Streamed answers on their way to the caller: what users hold, and how policies watch them.

Not here: where the pieces come from (the engines), and how they are put together (`deltas.py`).
"""

from __future__ import annotations

import threading
from dataclasses import replace
from types import TracebackType
from typing import Self

from dspylite.errors import LMUnexpectedError
from dspylite.runtime.frames import get_item_index
from dspylite.schema.messages import DeltaSource, LMDelta, LMResponse


def close_stream(response: LMResponse) -> None:
    """Close the stream of a response that nobody will read, if it has one."""
    if response.stream is not None:
        response.stream.close()


class LMStream:
    """An answer that comes piece by piece, to `for` and to `async for` alike.

    Use it in a `with` (or `async with`) block, or read it to its end: leaving either closes the
    connection. An answer that breaks, is cut or stays empty raises; it never just ends. A model
    that cannot stream, such as the offline one, gives its answer in one piece.

    Attributes:
        item_index: Place in its batch of the item that opened it; None outside batches. Its pieces
            bear it too, so that the items of a batch may put theirs into one queue.

    Example:
        >>> from dspylite.testing import FakeServer
        >>> from dspylite.models.lm import LM
        >>> with FakeServer(answer="Paris") as server:
        ...     lm = LM("openai/m", api_base=server.base_url, api_key="none")
        ...     with lm.stream("Capital of France?") as stream:
        ...         text = "".join(piece.text for piece in stream)
        >>> text, stream.response.usage.calls
        ('Paris', 1)
    """

    def __init__(self, response: LMResponse) -> None:
        self._source = source_of(response)
        self._is_over = False
        self.item_index: int | None = get_item_index()

    def __del__(self) -> None:
        """Close what nobody closed, such as after a `break` without a `with`."""
        if getattr(self, "_is_over", True):
            return
        try:
            # On a thread of its own: this one may hold a lock that closing needs.
            threading.Thread(target=self._source.close, daemon=True).start()
        except RuntimeError:
            pass  # the interpreter ends, and its connections with it

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer; whole, with its usage, after the last piece."""
        return self._source.response

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> LMDelta:
        piece = self._source.call()
        if piece is None:
            self._end()
            raise StopIteration
        return self._marked(piece)

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._source.response.judge(is_readable=True)  # any text is

    def _marked(self, piece: LMDelta) -> LMDelta:
        return piece if self.item_index is None else replace(piece, item_index=self.item_index)

    def close(self) -> None:
        """Close the connection, if it is still open."""
        self._is_over = True
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LMDelta:
        piece = await self._source.acall()
        if piece is None:
            self._end()
            raise StopAsyncIteration
        return self._marked(piece)

    async def aclose(self) -> None:
        """Close the connection, if it is still open."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def source_of(response: LMResponse) -> DeltaSource:
    """Return the stream of a response; of one that has its outputs already, they are the pieces."""
    if response.stream is None and not response.outputs:
        raise LMUnexpectedError("A policy around the call has lost its stream.")
    return response.stream or _WholeAnswer(response)


class _WholeAnswer:
    """The answer of a model that does not stream, as one piece for each of its outputs."""

    def __init__(self, response: LMResponse) -> None:
        self.response = response
        self._pieces = iter(
            [
                LMDelta(
                    index=index,
                    text=output.text,
                    reasoning=output.reasoning or "",
                    tool_calls=tuple(
                        {"index": place, **call} for place, call in enumerate(output.tool_calls)
                    ),
                    finish_reason=output.finish_reason,
                )
                for index, output in enumerate(response.outputs)
            ]
        )

    def call(self) -> LMDelta | None:
        return next(self._pieces, None)

    async def acall(self) -> LMDelta | None:
        return self.call()

    def close(self) -> None:
        self._pieces = iter(())


class WatchedStream:
    """A stream that tells what becomes of it; the source does all the work.

    A subclass overrides `over`, or the moments one by one. More than one end may be told of, from
    several threads (one reads, another closes), so whoever listens must bear a repeat.

    Args:
        source: The stream of the policy or engine below.
    """

    def __init__(self, source: DeltaSource) -> None:
        self._source = source
        self._is_closed = False

    def call(self) -> LMDelta | None:
        """Wait on this thread for the next piece; None at the proper end, or after `close`."""
        try:
            piece = self._source.call()
        except Exception as error:
            self.broke(error)
            raise
        return self._told(piece)

    async def acall(self) -> LMDelta | None:
        """Await the next piece on this event loop; None at the proper end, or after `close`."""
        try:
            piece = await self._source.acall()
        except Exception as error:
            self.broke(error)
            raise
        return self._told(piece)

    def close(self) -> None:
        """Close the connection, from whatever thread."""
        self._is_closed = True
        try:
            self._source.close()
        finally:
            self.closed()

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer."""
        return self._source.response

    def _told(self, piece: LMDelta | None) -> LMDelta | None:
        if piece is not None:
            self.moved()
        elif not self._is_closed:  # else it is the end of reading, and not that of the answer
            self.ended()
        return piece

    def moved(self) -> None:
        """Hear that a piece has come."""

    def ended(self) -> None:
        """Hear that the stream came to its proper end."""
        self.over()

    def broke(self, error: Exception) -> None:
        """Hear that the stream failed."""
        del error
        self.over()

    def closed(self) -> None:
        """Hear that the holder needs no more of it."""
        self.over()

    def over(self) -> None:
        """Hear that nothing more will come, for whatever reason."""
