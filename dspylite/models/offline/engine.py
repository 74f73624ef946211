"""The engine that answers without any model: `OfflineLM`'s.

Not here: how it reads a prompt and picks an answer (`reading.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from dspylite.runtime.forks import loading
from dspylite.runtime.workers import call_in_thread
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse, Message, Usage


@functools.cache
def _load_reader() -> Callable[[Sequence[Message]], str]:
    # A tenth of the time of importing this package, for something that few programs use.
    with loading():
        from dspylite.models.offline.reading import read_and_answer  # noqa: PLC0415

    return read_and_answer


OFFLINE_PREFIX = "offline/"
OFFLINE_MODEL = "offline/extractive"


class OfflineEngine:
    """Answers from the prompt alone; equal prompts give equal answers. Usage counts words."""

    __slots__ = ()

    def call(self, request: LMRequest) -> LMResponse:
        """Answer on this thread, `n` times the same."""
        return respond(request, _load_reader()(request.messages))

    async def acall(self, request: LMRequest) -> LMResponse:
        """Answer in a worker thread: reading a long prompt takes milliseconds of CPU."""
        return await call_in_thread(self.call, request)


def respond(request: LMRequest, text: str) -> LMResponse:
    """Make the response that gives a text `n` times, with usage counted in words."""
    count = max(1, int(request.params.get("n") or 1))
    read = sum(len(str(message["content"]).split()) for message in request.messages)
    written = len(text.split()) * count
    return LMResponse(
        outputs=(LMOutput(text=text, finish_reason="stop"),) * count,
        usage=Usage(
            prompt_tokens=read, completion_tokens=written, total_tokens=read + written, calls=1
        ),
        model=request.model,
    )
