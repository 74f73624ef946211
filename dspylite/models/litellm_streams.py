"""Streams of litellm's, as our sources of pieces.

Not here: how they are asked for (`models/litellm.py`).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Coroutine, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from anyio.lowlevel import current_token

from dspylite.models.deltas import Assembly
from dspylite.models.litellm_door import border, in_time, in_time_async
from dspylite.runtime.clock import Deadline, time_left
from dspylite.runtime.loops import running_library
from dspylite.runtime.workers import call_in_thread
from dspylite.schema.messages import LMDelta, LMResponse


class LiteLLMStream:
    """A stream of litellm's: a `DeltaSource` over its wrapper.

    litellm makes a finish reason up where a stream ends without one, so the wrapper is asked
    whether the provider had sent any.
    """

    def __init__(self, wrapper: Any, *, model: str, params: Mapping[str, Any]) -> None:
        self._wrapper: Any = wrapper
        self._arguments = {**params, "model": model}
        self._model = model
        self._assembly = Assembly(model=model)
        self._ready: list[LMDelta] = []
        self._is_over = False
        self._loop = current_token().native_token if running_library() == "asyncio" else None
        left = time_left()
        self._ends_at = None if left is None else time.monotonic() + left

    def call(self) -> LMDelta | None:
        """Wait on this thread for the next piece; None at the proper end."""
        with self._guard(), Deadline(self._left()):
            while not self._ready and not self._is_over:
                self._take(in_time(self._model, lambda: next(self._wrapper, None)))
        return self._ready.pop(0) if self._ready else None

    async def acall(self) -> LMDelta | None:
        """Await the next piece on this event loop; None at the proper end."""
        if not hasattr(self._wrapper, "__anext__") or running_library() != "asyncio":
            try:
                return await call_in_thread(self.call)
            except BaseException:
                self.close()  # a thread that nobody awaits any more may wait for the next piece
                raise
        with self._guard(), Deadline(self._left()):
            while not self._ready and not self._is_over:
                self._take(await in_time_async(self._model, lambda: anext(self._wrapper, None)))
        return self._ready.pop(0) if self._ready else None

    def close(self) -> None:
        """Close the connection; nothing happens where it is closed."""
        self._is_over = True
        stream, self._wrapper = self._wrapper, None
        _close_connection(stream, self._loop)

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer."""
        return self._assembly.response

    def _left(self) -> float | None:
        return None if self._ends_at is None else max(1e-3, self._ends_at - time.monotonic())

    @contextmanager
    def _guard(self) -> Generator[None, None, None]:
        try:
            with border(self._arguments):
                yield
        except BaseException:
            self.close()
            raise

    def _take(self, chunk: Any) -> None:
        if chunk is not None:
            self._ready += self._real(self._assembly.add(chunk))
            return
        self._is_over = True
        if self._wrapper is not None and _was_cut(self._wrapper):
            self._assembly.forget_ends()
        else:
            self._assembly.is_ended = True  # of several answers, litellm tells the end of one
        self._assembly.finish()
        self.close()

    def _real(self, deltas: list[LMDelta]) -> list[LMDelta]:
        return [delta for delta in deltas if not (delta.finish_reason and _was_cut(self._wrapper))]


def _was_cut(wrapper: Any) -> bool:
    """Tell whether the provider has sent no finish reason; True while it has not yet."""
    reasons = (
        getattr(wrapper, name, "unknown")
        for name in ("received_finish_reason", "intermittent_finish_reason")
    )
    return all(reason is None for reason in reasons)


def _close_connection(wrapper: Any, loop: Any) -> None:
    """Close the HTTP answer below litellm's wrapper and the SDK's stream in it."""
    inner: Any = getattr(wrapper, "completion_stream", None)
    response: Any = getattr(inner, "response", None)
    for holder in (response, inner):
        if not hasattr(holder, "close"):
            continue
        try:
            closing = holder.close()
        except Exception:  # noqa: BLE001  # the async forms refuse it; else it is given up
            closing = holder.aclose() if hasattr(holder, "aclose") else None
        if inspect.iscoroutine(closing):
            _finish_on(loop, closing)
        return


_closing: set[Any] = set()  # a loop itself does not keep its tasks


def _finish_on(loop: Any, closing: Coroutine[Any, Any, Any]) -> None:
    """Let an event loop close what only it can; whoever has called does not wait for that."""

    async def close_quietly() -> None:
        try:
            await closing
        except Exception:  # noqa: BLE001  # it is given up; nobody needs to know how
            pass

    def start() -> None:
        task = loop.create_task(close_quietly())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    try:
        loop.call_soon_threadsafe(start)
    except (AttributeError, RuntimeError):  # there is no loop, or it is closed with all it had
        closing.close()
