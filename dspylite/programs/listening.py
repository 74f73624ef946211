"""Who listens to a streamed program: to which output of which predictor, and what they hear.

Not here: how the program is run and its stream read (`programs/streaming.py`), and how an output is
found in an answer that is not whole yet (`adapters/streaming.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspylite.abc import Adapter, Io, StreamEar
from dspylite.adapters.streaming import FieldChunk, FieldReader
from dspylite.adapters.values import format_value
from dspylite.errors import SignatureError, nearest
from dspylite.models.answers import ThoughtsFilter
from dspylite.models.streams import source_of
from dspylite.programs.base import Module
from dspylite.programs.stream_events import StreamResponse
from dspylite.runtime.channels import Channel
from dspylite.runtime.flow import Both
from dspylite.runtime.frames import get_item_index
from dspylite.schema.messages import LMDelta, LMResponse
from dspylite.schema.plans import AdapterPlan


@dataclass(frozen=True)
class StreamListener:
    """Asks `streamify` for an output of a predictor, while it is written.

    It keeps nothing of what it hears, so one may serve any number of streams at once.

    Args:
        signature_field_name: Name of the output.
        predict: The predictor, or a module with one predictor that has the output. None: the only
            one in the program that has it.
        predict_name: Name in the `StreamResponse`s. Without `predict` it picks the predictor with
            this path, such as `"steps[0].predict"`. None: the predictor's path.
        allow_reuse: Whether each call of the predictor is heard, and not the first one only (in a
            batch: the first one of each item).
    """

    signature_field_name: str
    predict: Any = None
    predict_name: str | None = None
    allow_reuse: bool = False


@dataclass(frozen=True, slots=True)
class BoundListener:
    """A listener whose predictor is known."""

    field: str
    predict: Any
    name: str
    hears_all: bool


def bind_listeners(program: Any, listeners: Iterable[StreamListener]) -> tuple[BoundListener, ...]:
    """Find the predictor of each listener.

    Raises:
        SignatureError: There is none with such an output, or several.
    """
    found = program.named_predictors() if isinstance(program, Module) else []
    return tuple(_bound(program, listener, found) for listener in listeners)


def _bound(
    program: Any, listener: StreamListener, predictors: Sequence[tuple[str, Any]]
) -> BoundListener:
    if not isinstance(listener, StreamListener):
        # Callers without a checker come here.
        raise SignatureError(
            f"`stream_listeners` holds {listener!r}; write `StreamListener('answer')`."
        )
    wanted = listener.signature_field_name
    candidates = predictors
    where = f"`{getattr(program, '__name__', type(program).__name__)}`"
    if listener.predict is not None:
        if not isinstance(listener.predict, Module):
            raise SignatureError(f"`predict` must be a predictor, not {listener.predict!r}.")
        names = {id(each): path for path, each in predictors}
        candidates = [
            (names.get(id(each), type(listener.predict).__name__), each)
            for _, each in listener.predict.named_predictors()
        ]
        where = "the listener's `predict`"
    elif not isinstance(program, Module):
        raise SignatureError(
            f"{where} is no module, so its predictors are not known; give each listener its own: "
            f"`StreamListener({wanted!r}, predict=...)`."
        )
    elif listener.predict_name is not None:
        paths = [path for path, _ in predictors]
        candidates = [each for each in predictors if each[0] == listener.predict_name]
        if not candidates:
            raise SignatureError(
                f"{where} has no predictor `{listener.predict_name}`. "
                f"{nearest(listener.predict_name, paths)}It has: {', '.join(paths) or 'none'}."
            )
        where = f"`{listener.predict_name}`"
    fitting = [each for each in candidates if wanted in each[1].signature.output_fields]
    if not fitting:
        outputs = sorted({name for _, each in candidates for name in each.signature.output_fields})
        raise SignatureError(
            f"No predictor of {where} has an output `{wanted}`. {nearest(wanted, outputs)}"
            f"Outputs are: {', '.join(outputs) or 'none'}."
        )
    if len(fitting) > 1:
        raise SignatureError(
            f"Several predictors of {where} have an output `{wanted}`: "
            f"{', '.join(path for path, _ in fitting)}. Say which one: "
            f"`StreamListener({wanted!r}, predict=...)`."
        )
    ((path, predict),) = fitting
    return BoundListener(wanted, predict, listener.predict_name or path, listener.allow_reuse)


class ProgramSink:
    """Takes what one run of a program says, and knows who wants to hear what.

    Args:
        channel: Where it goes.
        listeners: Who listens. None: whoever reads the stream gets the pieces of each answer.
    """

    def __init__(self, channel: Channel[Any], listeners: Sequence[BoundListener]) -> None:
        self._channel = channel
        self.put = Both(channel.put, channel.aput)
        self._listeners = listeners
        self._heard: dict[tuple[int, int | None], object] = {}
        self.has_spoken = False

    async def send(self, value: Any) -> None:
        """Say something of one's own, when there is room for it."""
        await self._channel.aput(value)

    def send_nowait(self, value: Any) -> None:
        """Say something of one's own, without waiting."""
        self._channel.put_now(value)

    def ear_for(self, predictor: object) -> StreamEar | None:
        """Return who wants to hear the next answer of a predictor; None if nobody does."""
        if not self._listeners:
            return _PieceEar(self)
        mine = [
            each
            for place, each in enumerate(self._listeners)
            if each.predict is predictor and (each.hears_all or self._is_first(place))
        ]
        return _OutputEar(self, mine) if mine else None

    def _is_first(self, place: int) -> bool:
        mine = object()
        # `setdefault` lets one of several threads win, without a lock.
        return self._heard.setdefault((place, get_item_index()), mine) is mine


class _PieceEar:
    """Passes on the pieces as the model gives them."""

    def __init__(self, sink: ProgramSink) -> None:
        self._sink = sink

    async def hear(
        self, io: Io, opened: LMResponse, adapter: Adapter, plan: AdapterPlan
    ) -> LMResponse:
        """Pass on each piece; return the whole answer."""
        del adapter, plan
        source, index = source_of(opened), get_item_index()
        try:
            while (piece := await io.call(source)) is not None:
                await io.call(self._sink.put, replace(piece, item_index=index))
        finally:
            source.close()
        return source.response

    async def finish(self, io: Io, outputs: Mapping[str, Any]) -> None:
        """Do nothing: the pieces were all."""


class _OutputEar:
    """Passes on the outputs that somebody listens to."""

    def __init__(self, sink: ProgramSink, listeners: Sequence[BoundListener]) -> None:
        self._sink = sink
        self._listeners = listeners
        self._before: set[str] = set()  # outputs of which an earlier answer gave pieces
        self._begun: set[str] = set()  # of which this one did
        self._ended: set[str] = set()

    async def hear(
        self, io: Io, opened: LMResponse, adapter: Adapter, plan: AdapterPlan
    ) -> LMResponse:
        """Pass on what is new of each output; return the whole answer."""
        self._before |= self._begun
        self._begun, self._ended = set(), set()
        make: Any = getattr(adapter, "stream_reader", None)  # an adapter need not have it
        reader: FieldReader | None = make and make(plan.written)
        thoughts = ThoughtsFilter()
        source = source_of(opened)
        try:
            while (piece := await io.call(source)) is not None:
                if piece.index:
                    continue
                await self._hear_beside(io, plan, piece)
                text = thoughts.feed(piece.text)
                if piece.reasoning or opened.stream is None:  # the thoughts are parted already
                    text += thoughts.finish()
                for chunk in reader.feed(text) if reader is not None else ():
                    await self._say(io, chunk)
            if reader is not None:
                for chunk in (*reader.feed(thoughts.finish()), *reader.finish()):
                    await self._say(io, chunk)
        finally:
            source.close()
        return source.response

    async def _hear_beside(self, io: Io, plan: AdapterPlan, piece: LMDelta) -> None:
        """Pass on what a feature of the model adds to outputs that its text does not have."""
        if plan.written is plan.signature:
            return
        for each in self._listeners:
            output = plan.signature.output_fields.get(each.field)
            if output is None or each.field in plan.written.output_fields:
                continue
            read = getattr(output.annotation, "parse_stream_chunk", None)
            if read is not None and (text := read(piece)):
                await self._say(io, FieldChunk(each.field, text, is_last=False))

    async def finish(self, io: Io, outputs: Mapping[str, Any]) -> None:
        """Pass on outputs that could not be heard while they were written; end the others."""
        for name in dict.fromkeys(each.field for each in self._listeners):
            if name not in self._ended:
                value = None if name in self._begun else outputs.get(name)
                text = "" if value is None else format_value(value)
                await self._say(io, FieldChunk(name, text, is_last=True))

    async def _say(self, io: Io, chunk: FieldChunk) -> None:
        name, text, is_last = chunk
        is_restart = name in self._before and name not in self._begun
        for each in self._listeners:
            if each.field == name:
                self._begun.add(name)
                self._sink.has_spoken = True
                index = get_item_index()
                event = StreamResponse(each.name, name, text, is_last, index, is_restart)
                await io.call(self._sink.put, event)
        if is_last:
            self._ended.add(name)
