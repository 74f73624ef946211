"""Streams of programs under the names of DSPy's `dspy.streaming`.

Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspylite.programs.listening import StreamListener
    from dspylite.programs.sse import streaming_response
    from dspylite.programs.stream_events import (
        StatusMessage,
        StatusMessageProvider,
        StreamEvent,
        StreamResponse,
    )
    from dspylite.programs.streaming import apply_sync_streaming, streamify

__all__ = [
    "StatusMessage",
    "StatusMessageProvider",
    "StreamEvent",
    "StreamListener",
    "StreamResponse",
    "apply_sync_streaming",
    "streamify",
    "streaming_response",
]
