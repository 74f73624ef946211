"""OpenTelemetry: a span for each call, under the span of its caller; tokens and seconds as metrics.

Needs `pip install dspylite[otel]`. Not here: who called whom (`runtime/frames.py`), how things are
named (`integrations/genai.py`), and where spans go, which is the application's choice.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, cast

from dspylite.errors import LMError, MissingExtraError, SettingsError
from dspylite.integrations.genai import (
    SECONDS_BUCKETS,
    TOKEN_BUCKETS,
    Attributes,
    clipped,
    error_type,
    name_of,
    provider_and_model,
    request_attributes,
    server_of,
    usage_attributes,
    written,
    written_input,
    written_output,
)
from dspylite.runtime.calls import BaseCallback
from dspylite.runtime.frames import CallFrame, current_call
from dspylite.runtime.settings import change_callbacks
from dspylite.schema.messages import Attempt, LMResponse, Usage

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context, attach, create_key, get_current, get_value, set_value
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as missing:
    raise MissingExtraError(
        "`dspylite.integrations.opentelemetry` needs OpenTelemetry, which is not installed: "
        "`pip install dspylite[otel]`."
    ) from missing

__all__ = ["Instrumentation", "OpenTelemetryCallback", "instrument"]

_CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_CAPTURE_VALUES = frozenset({"true", "1", "span_only", "span_and_event"})
_MARK: Final = create_key("dspylite-call")


@dataclass(frozen=True, slots=True)
class _Mark:
    """What an OpenTelemetry context knows of the call that it belongs to.

    Attributes:
        call_id: The innermost call.
        span: Its span; None where the call was in another process.
        owner: The callback whose span that is; there may be several, with providers of their own.
        pid: Of the process that made the mark; a forked child inherits those of its parent.
        before: The context around the call.
    """

    call_id: str | None
    span: Span | None
    owner: OpenTelemetryCallback
    pid: int
    before: Context


@dataclass(slots=True)
class _Open:
    """A call that has not ended.

    Attributes:
        span: Its span.
        started: When, by `time.perf_counter`.
        parent_id: The call that made it.
        shared: Attributes of its metrics; None for what has no metrics.
        told: The attempt that a call below has counted already, as a fallback's does.
    """

    span: Span
    started: float
    parent_id: str | None
    shared: Attributes | None = None
    told: Attempt | None = None


class OpenTelemetryCallback(BaseCallback):
    """Makes a span of each call: modules, models, tools, evaluations.

    A span is current while its call runs, so that spans of your own and of instrumented HTTP
    clients hang below it. Its parent is the call that made it, also on other threads and, under
    `settings.restore(snapshot)`, in other processes; at the top it is the span that is current.

    `settings.callbacks` is where it belongs; `instrument` puts it there. It can be pickled; in
    another process it uses that process's own providers.

    Args:
        tracer_provider: Where spans go. None: the global one.
        meter_provider: Where metrics go. None: the global one.
        capture_content: Whether prompts, answers, inputs and messages of errors are written into
            spans. None: as `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` says, else not.
        max_content_chars: Most characters of one such attribute; the rest is cut.
        adapters: Whether the writing of prompts and the reading of answers get spans too.
        max_open_calls: Most calls in progress that are kept in mind. Beyond it the oldest is ended,
            marked `dspylite.abandoned`.

    Raises:
        SettingsError: A limit is no positive number.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        capture_content: bool | None = None,  # noqa: FBT001  # as other instrumentations have it
        *,
        max_content_chars: int = 10_000,
        adapters: bool = False,
        max_open_calls: int = 10_000,
    ) -> None:
        for name, value in (
            ("max_content_chars", max_content_chars),
            ("max_open_calls", max_open_calls),
        ):
            if type(value) is not int or value < 1:
                raise SettingsError(
                    f"`{name}` must be a whole number of at least 1, not {value!r}."
                )
        if capture_content is None:
            capture_content = os.environ.get(_CAPTURE, "").strip().lower() in _CAPTURE_VALUES
        self.capture_content = capture_content
        self.max_content_chars = max_content_chars
        self.adapters = adapters
        self.max_open_calls = max_open_calls
        self._tracer = trace.get_tracer("dspylite", tracer_provider=tracer_provider)
        meter = metrics.get_meter("dspylite", meter_provider=meter_provider)
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        )
        self._seconds = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=SECONDS_BUCKETS,
        )
        # Each of its operations is atomic, so no lock is needed, which a fork could find held.
        self._open: dict[str, _Open] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel without the providers, which belong to their process."""
        options: dict[str, Any] = {
            "capture_content": self.capture_content,
            "max_content_chars": self.max_content_chars,
            "adapters": self.adapters,
            "max_open_calls": self.max_open_calls,
        }
        return (functools.partial(OpenTelemetryCallback, **options), ())

    # -- what callbacks hear ----------------------------------------------------------------------

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin a module's span."""
        attributes: Attributes = {}
        text = getattr(getattr(instance, "signature", None), "signature", None)
        if isinstance(text, str):
            attributes["dspylite.signature"] = text
        self._begin(call_id, name_of(instance), attributes, content=inputs)

    def on_module_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """End a module's span."""
        self._end(call_id, exception, lambda _: self._shown("dspylite.outputs", outputs))

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin an evaluation's span."""
        self._begin(call_id, name_of(instance), {}, content=inputs)

    def on_evaluate_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """End an evaluation's span."""
        self._end(call_id, exception, lambda _: self._shown("dspylite.outputs", outputs))

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin a tool's span."""
        name = str(getattr(instance, "name", None) or type(instance).__name__)
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": name,
            "gen_ai.tool.type": "function",
            **self._shown("gen_ai.tool.call.arguments", inputs),
        }
        self._begin(call_id, f"execute_tool {name}", attributes)

    def on_tool_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """End a tool's span."""
        self._end(call_id, exception, lambda _: self._shown("gen_ai.tool.call.result", outputs))

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin the span of a prompt's writing, if asked for."""
        del inputs
        if self.adapters:
            self._begin(call_id, f"{type(instance).__name__}.format", {})

    def on_adapter_format_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """End the span of a prompt's writing."""
        del outputs
        self._end(call_id, exception)

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin the span of an answer's reading, if asked for."""
        del inputs
        if self.adapters:
            self._begin(call_id, f"{type(instance).__name__}.parse", {})

    def on_adapter_parse_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """End the span of an answer's reading."""
        del outputs
        self._end(call_id, exception)

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Begin the span of a model's call."""
        params = {**getattr(instance, "kwargs", {}), **inputs}
        provider, model = provider_and_model(instance)
        kind = getattr(instance, "model_type", "chat")
        operation = "text_completion" if kind == "text" else "chat"
        shared: Attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
            **server_of(instance, params),
        }
        attributes = {
            **shared,
            **request_attributes(params),
            **self._content("gen_ai.input.messages", lambda limit: written_input(inputs, limit)),
        }
        self._begin(
            call_id, f"{operation} {model}", attributes, kind=SpanKind.CLIENT, shared=shared
        )

    def on_lm_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """End the span of a model's call, and count it."""
        response = getattr(outputs, "response", None)
        if isinstance(response, LMResponse):
            found = response
            self._end(call_id, exception, lambda call: self._answered(call, found))
        else:
            self._end(call_id, exception)

    def on_call_left_open(self, call_id: str) -> None:
        """Let what comes after a stream was opened not hang below it."""
        found = self._open.get(call_id)
        if found is not None:
            found.span.set_attribute("gen_ai.request.stream", True)
        _leave(call_id)

    def carry(self) -> Mapping[str, str]:
        """Name the current trace and span, as W3C's `traceparent` does."""
        frame = current_call()
        carrier: dict[str, str] = {}
        around = self._context_below(None if frame is None else frame.call_id, get_current())
        TraceContextTextMapPropagator().inject(carrier, context=around)
        return carrier

    def resume(self, carried: Mapping[str, str]) -> Callable[[], None] | None:
        """Make the span that was current at `carry` current here.

        If none was, what is current stays so, but for what a fork has left behind.
        """
        frame = current_call()
        before = get_current()
        if not carried and not _is_inherited(_mark_of(before)):
            return None
        around = Context() if _is_inherited(_mark_of(before)) else before
        found = TraceContextTextMapPropagator().extract(carried, around)
        mark = _Mark(None if frame is None else frame.call_id, None, self, os.getpid(), before)
        attach(set_value(_MARK, mark, found))

        def undo() -> None:
            if get_value(_MARK) is mark:
                attach(before)

        return undo

    # -- spans ------------------------------------------------------------------------------------

    def _begin(
        self,
        call_id: str,
        name: str,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        content: Mapping[str, Any] | None = None,
        shared: Attributes | None = None,
    ) -> None:
        frame = current_call()
        if frame is None or frame.call_id != call_id:
            frame = CallFrame(call_id=call_id, parent_id=None, item_index=None, kind="module")
        attributes["dspylite.call_id"] = call_id
        if frame.parent_id is not None:
            attributes["dspylite.parent_call_id"] = frame.parent_id
        if frame.item_index is not None:
            attributes["dspylite.item_index"] = frame.item_index
        if content is not None:
            attributes.update(self._shown("dspylite.inputs", content))
        before = get_current()
        made = _mark_of(before)
        if made is not None and made.call_id == call_id:
            before = made.before  # another callback has begun its span of this very call
        around = self._context_below(frame.parent_id, before)
        span = self._tracer.start_span(name, context=around, kind=kind, attributes=attributes)
        self._open[call_id] = _Open(span, time.perf_counter(), frame.parent_id, shared)
        mark = _Mark(call_id, span, self, os.getpid(), before)
        attach(set_value(_MARK, mark, trace.set_span_in_context(span, around)))
        if len(self._open) > self.max_open_calls:
            self._abandon_oldest()

    def _context_below(self, parent_id: str | None, current: Context) -> Context:
        """Return the context that a call made by another one belongs to."""
        mark = _mark_of(current)
        is_inherited = _is_inherited(mark)
        if mark is not None and not is_inherited and mark.call_id == parent_id:
            is_of_another = mark.owner is not self and trace.get_current_span(current) is mark.span
            if not is_of_another:
                return current
        known = None if parent_id is None else self._open.get(parent_id)
        if known is not None:
            return trace.set_span_in_context(known.span, current)
        return Context() if is_inherited else current

    def _abandon_oldest(self) -> None:
        try:
            oldest = self._open.pop(next(iter(self._open)), None)
        except (RuntimeError, StopIteration):
            return  # another thread changed it meanwhile; the next call tries again
        if oldest is not None:
            oldest.span.set_attribute("dspylite.abandoned", True)
            oldest.span.end()

    def _end(
        self,
        call_id: str,
        exception: BaseException | None,
        describe: Callable[[_Open], Attributes] | None = None,
    ) -> None:
        found = self._open.pop(call_id, None)
        try:
            if found is not None:
                if exception is not None:
                    self._failed(found, exception)
                elif describe is not None:
                    found.span.set_attributes(describe(found))
        finally:
            if found is not None:
                found.span.end()
            _leave(call_id)

    def _failed(self, call: _Open, error: BaseException) -> None:
        name = error_type(error)
        call.span.set_attribute("error.type", name)
        if isinstance(error, LMError):
            call.span.set_attribute("dspylite.error.code", error.code)
            if error.status is not None:
                call.span.set_attribute("http.response.status_code", error.status)
            self._attempted(call, error.attempts)
        event = {"exception.type": name}
        event.update(self._content("exception.message", lambda limit: clipped(str(error), limit)))
        call.span.add_event("exception", event)
        call.span.set_status(Status(StatusCode.ERROR, event.get("exception.message", name)))
        if call.shared is not None:
            self._took(call, {"error.type": name})

    def _answered(self, call: _Open, response: LMResponse) -> Attributes:
        """Count an answer; return the attributes that tell of it."""
        attributes: Attributes = {"dspylite.cached": response.cached}
        shared: Attributes = {}
        if response.model:
            attributes["gen_ai.response.model"] = shared["gen_ai.response.model"] = response.model
        if response.request_id:
            attributes["gen_ai.response.id"] = response.request_id
        reasons = [each.finish_reason for each in response.outputs if each.finish_reason]
        if reasons:
            attributes["gen_ai.response.finish_reasons"] = reasons
        if response.answered_by:
            attributes["dspylite.answered_by"] = response.answered_by
        self._attempted(call, response.attempts)
        attributes.update(
            self._content("gen_ai.output.messages", lambda limit: written_output(response, limit))
        )
        if response.cached:
            return attributes
        last = response.attempts[-1] if response.attempts else None
        if last is None or last is not call.told:  # else the fallback's own span has them
            attributes.update(usage_attributes(response.usage))
            self._count(call, response.usage, shared)
        parent = self._open.get(call.parent_id or "")
        if parent is not None:
            parent.told = last
        self._took(call, shared)
        return attributes

    def _attempted(self, call: _Open, attempts: Sequence[Attempt]) -> None:
        """Tell of the requests made, and of each that failed."""
        if not attempts:
            return
        call.span.set_attribute("dspylite.attempts", len(attempts))
        for attempt in attempts:
            if attempt.error is not None:
                event: Attributes = {
                    "dspylite.attempt.model": attempt.model,
                    "dspylite.attempt.seconds": attempt.seconds,
                    "dspylite.error.code": attempt.error,
                }
                if attempt.status is not None:
                    event["http.response.status_code"] = attempt.status
                call.span.add_event("dspylite.attempt_failed", event)

    def _count(self, call: _Open, usage: Usage, more: Attributes) -> None:
        if call.shared is None:
            return
        for kind, count in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
            if count:
                attributes = {**call.shared, **more, "gen_ai.token.type": kind}
                self._tokens.record(count, attributes)

    def _took(self, call: _Open, more: Attributes) -> None:
        if call.shared is not None:
            self._seconds.record(time.perf_counter() - call.started, {**call.shared, **more})

    def _shown(self, name: str, value: Any) -> Attributes:
        """Give a value as an attribute, if content is wanted."""
        if value is None:
            return {}
        return self._content(name, lambda limit: written(value, limit))

    def _content(self, name: str, write: Callable[[int], str]) -> Attributes:
        """Give content as an attribute, if it is wanted and can be written."""
        if not self.capture_content:
            return {}
        try:
            return {name: write(self.max_content_chars)}
        except Exception as error:  # noqa: BLE001  # the span says so; users' objects do as they like
            return {name: f"<not written: {error_type(error)}>"}


def _mark_of(context: Context) -> _Mark | None:
    return cast("_Mark | None", get_value(_MARK, context))


def _is_inherited(mark: _Mark | None) -> bool:
    """Tell whether a context is that of the thread which forked this process."""
    return mark is not None and mark.pid != os.getpid()


def _leave(call_id: str) -> None:
    """Make the context around a call current again, where that of the call is.

    By attaching it and not by a token: a token cannot be used in another context than its own, in
    which streams and generators are ended, and OpenTelemetry logs an error for each that is.
    """
    mark = _mark_of(get_current())
    if mark is not None and mark.call_id == call_id:
        attach(mark.before)


class Instrumentation:
    """What `instrument` has set up; `undo` takes it back, as does the end of a `with` block.

    Attributes:
        callback: The one that is in the settings.
    """

    def __init__(self, callback: OpenTelemetryCallback) -> None:
        self.callback = callback

    def undo(self) -> None:
        """Take the callback out of the settings; calls in progress still end their spans."""
        change_callbacks(remove=[self.callback])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


_installed: list[OpenTelemetryCallback] = []


def instrument(
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    capture_content: bool | None = None,  # noqa: FBT001  # as other instrumentations have it
    *,
    max_content_chars: int = 10_000,
    adapters: bool = False,
    max_open_calls: int = 10_000,
) -> Instrumentation:
    """Trace all calls of this process, from now on; arguments as of `OpenTelemetryCallback`.

    It adds to the callbacks of the process default and leaves the others; called once more, it
    takes the place of its former self. A later `configure(callbacks=...)`, and a `context` with
    callbacks of its own, replace it like all others.

    Example:
        >>> from dspylite.models.lm import OfflineLM
        >>> with instrument() as tracing:
        ...     OfflineLM()("Which is the largest planet?")[0] != ""
        True
    """
    callback = OpenTelemetryCallback(
        tracer_provider,
        meter_provider,
        capture_content,
        max_content_chars=max_content_chars,
        adapters=adapters,
        max_open_calls=max_open_calls,
    )
    former = [*_installed]
    _installed[:] = [callback]
    change_callbacks(add=[callback], remove=former)
    return Instrumentation(callback)
