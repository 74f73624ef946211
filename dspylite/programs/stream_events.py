"""What comes out of a streamed program, beside its result and the pieces of LMs.

Not here: how it gets out (`programs/streaming.py`), and who listens (`programs/listening.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dspylite.abc import StreamSink
from dspylite.errors import ModuleError
from dspylite.runtime.calls import BaseCallback
from dspylite.runtime.frames import current_call
from dspylite.runtime.threads import is_async
from dspylite.schema.messages import LMDelta
from dspylite.schema.records import Prediction


@dataclass(frozen=True, slots=True)
class StreamResponse:
    """A piece of one output of one predictor.

    Attributes:
        predict_name: Path of the predictor in the program, such as `"answer"`.
        signature_field_name: Name of the output.
        chunk: Its text since the piece before; empty in a last piece that only says so.
        is_last_chunk: Whether the output has ended.
        item_index: Place in its batch of the item it was written for; None outside batches.
        is_restart: Whether the model was asked again, because its answer could not be read: this
            piece begins the output anew, and those before it are void.
    """

    predict_name: str
    signature_field_name: str
    chunk: str
    is_last_chunk: bool
    item_index: int | None = None
    is_restart: bool = False


@dataclass(frozen=True, slots=True)
class StatusMessage:
    """What a program is doing, in words for its user.

    Attributes:
        message: The words.
    """

    message: str


StreamEvent: TypeAlias = StreamResponse | StatusMessage | LMDelta | Prediction
"""What a streamed program gives; besides, whatever it sends itself or returns."""


class StatusMessageProvider:
    """Says in words what a program is doing. Override what you need; None or "" says nothing.

    Only the start and the end of a tool call are told unless overridden. The methods run where the
    call is made, so they must be plain functions and not block. One that raises is logged, and does
    no harm.

    Example:
        >>> class Verbose(StatusMessageProvider):
        ...     def lm_start_status_message(self, instance, inputs):
        ...         return f"Asking {instance.model}"
    """

    def tool_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str | None:
        """Say that a tool is called."""
        del inputs
        return f"Calling tool {instance.name}..."

    def tool_end_status_message(self, outputs: Any) -> str | None:
        """Say that a tool has returned or failed."""
        del outputs
        return "The tool has finished; going on with the model."

    def module_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str | None:
        """Say that a module or predictor is called."""

    def module_end_status_message(self, outputs: Any) -> str | None:
        """Say that a module or predictor has returned or failed."""

    def lm_start_status_message(self, instance: Any, inputs: dict[str, Any]) -> str | None:
        """Say that a model is asked."""

    def lm_end_status_message(self, outputs: Any) -> str | None:
        """Say that a model has answered or failed."""


def checked_provider(given: Any) -> StatusMessageProvider:
    """Return who says what a program is doing; by default `StatusMessageProvider()`.

    Raises:
        ModuleError: It is no instance, or one of its methods is async.
    """
    if given is None:
        return StatusMessageProvider()
    if not isinstance(given, StatusMessageProvider):
        raise ModuleError(
            f"`status_message_provider` must be an instance of a `StatusMessageProvider`, not "
            f"{given!r}."
        )
    for name in vars(StatusMessageProvider):
        if name.endswith("_status_message") and is_async(getattr(given, name)):
            raise ModuleError(
                f"`{type(given).__name__}.{name}` is async; make it a plain function that returns "
                "a text."
            )
    return given


class StatusCallback(BaseCallback):
    """Puts status messages into a stream.

    Args:
        provider: Who words them.
        sink: The stream.
    """

    def __init__(self, provider: StatusMessageProvider, sink: StreamSink) -> None:
        self._provider = provider
        self._sink = sink

    def __reduce__(self) -> tuple[Any, ...]:
        """Stay in this process: in another one there is no stream to write to."""
        return (BaseCallback, ())

    def _say(self, message: str | None) -> None:
        if message:
            self._sink.send_nowait(StatusMessage(message))

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Tell of a module."""
        del call_id
        self._say(self._provider.module_start_status_message(instance, inputs))

    def on_module_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """Tell of a module's end."""
        del call_id, exception
        self._say(self._provider.module_end_status_message(outputs))

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Tell of a model."""
        del call_id
        self._say(self._provider.lm_start_status_message(instance, inputs))

    def on_lm_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """Tell of a model's answer."""
        del call_id, exception
        self._say(self._provider.lm_end_status_message(outputs))

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Tell of a tool, but for the one by which an agent says that it is done."""
        del call_id
        if not _is_finish(instance):
            self._say(self._provider.tool_start_status_message(instance, inputs))

    def on_tool_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """Tell of a tool's end."""
        del call_id, exception
        frame = current_call()
        if frame is None or not _is_finish(frame.instance):
            self._say(self._provider.tool_end_status_message(outputs))


def _is_finish(tool: Any) -> bool:
    return getattr(tool, "name", None) == "finish"


def as_plain(event: Any) -> Mapping[str, Any]:
    """Return an event as a dict for JSON, under a key that tells its kind.

    Example:
        >>> as_plain(StatusMessage("Asking")), as_plain("own")
        ({'status_message': 'Asking'}, {'value': 'own'})
    """
    match event:
        case Prediction():
            return {"prediction": dict(event.items())}
        case StatusMessage():
            return {"status_message": event.message}
        case StreamResponse():
            shown: dict[str, Any] = {
                "predict_name": event.predict_name,
                "signature_field_name": event.signature_field_name,
                "chunk": event.chunk,
                "is_last_chunk": event.is_last_chunk,
            }
            if event.item_index is not None:
                shown["item_index"] = event.item_index
            if event.is_restart:
                shown["is_restart"] = True
            return {"stream_response": shown}
        case LMDelta():
            return {"chunk": _as_chunk(event)}
        case _:
            return {"value": event}


def _as_chunk(piece: LMDelta) -> dict[str, Any]:
    """Write a piece of a model's answer in OpenAI's form."""
    delta: dict[str, Any] = {"content": piece.text}
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
    if piece.tool_calls:
        delta["tool_calls"] = list(piece.tool_calls)
    choice = {"index": piece.index, "delta": delta, "finish_reason": piece.finish_reason}
    marked = {} if piece.item_index is None else {"item_index": piece.item_index}
    return {"object": "chat.completion.chunk", "choices": [choice], **marked}
