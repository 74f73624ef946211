"""Who hears of calls: the callbacks, told of the start and the end of each.

Not here: the frame of the current call (`runtime/frames.py`), and what is counted or recorded of a
call (`runtime/tracking.py`).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from dspylite.runtime.frames import CURRENT_CALL, ITEM_INDEX, CallFrame, CallKind
from dspylite.runtime.listeners import tell
from dspylite.runtime.settings import settings
from dspylite.schema.messages import LMResponse

P = ParamSpec("P")
R = TypeVar("R")


class LMOutputs(list[str | dict[str, Any]]):
    """What a language model's call gave its caller, as `on_lm_end` is told it.

    Attributes:
        response: The whole answer: usage, model, finish reasons, request id, attempts, and whether
            it came from the cache.
    """

    __slots__ = ("response",)

    response: LMResponse

    def __init__(self, outputs: Sequence[str | dict[str, Any]], response: LMResponse) -> None:
        super().__init__(outputs)
        self.response = response

    def __reduce__(self) -> tuple[Any, ...]:
        """Give what makes it anew."""
        return (LMOutputs, (list(self), self.response))


class BaseCallback:
    """Hears of calls. Override what you need; the others do nothing.

    Every `..._start` gets the call's id, the object called and its inputs; every `..._end` gets the
    same id, and what came out or the exception, cancellation and Ctrl-C included. `current_call()`
    tells the parent and the batch item. A callback that raises is logged, once, and never harms the
    call. Callbacks run on the thread or task that makes the call, so they must not block.

    Those of the settings are told before those of the object called, each in the order given. One
    that is in both is told once.

    Example:
        >>> from dspylite.models.lm import OfflineLM
        >>> class Tokens(BaseCallback):
        ...     def on_lm_end(self, call_id, outputs, exception=None):
        ...         if outputs:
        ...             print(outputs.response.usage.calls)
        >>> OfflineLM(callbacks=[Tokens()])("Which is the largest planet?")[0] != ""
        1
        True
    """

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A module was called."""

    def on_module_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A module returned or failed."""

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A language model was called."""

    def on_lm_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A language model answered or failed."""

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A prompt is about to be written."""

    def on_adapter_format_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A prompt was written, or could not be."""

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """An answer is about to be read."""

    def on_adapter_parse_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """An answer was read, or could not be."""

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """A tool was called."""

    def on_tool_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """A tool returned or failed."""

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """An evaluation was begun."""

    def on_evaluate_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        """An evaluation was finished or failed."""

    def on_call_left_open(self, call_id: str) -> None:
        """A call gave its caller an open stream; its `..._end` comes with the stream's end.

        It is told where the call was made; the end, wherever the stream is ended.
        """

    def carry(self) -> Mapping[str, str]:
        """Return what `settings.snapshot()` takes along for `resume`; nothing secret."""
        return {}

    def resume(self, carried: Mapping[str, str]) -> Callable[[], None] | None:
        """Go on where `carry` was called, perhaps in another process; return what undoes it.

        It is called at the start of a block of `settings.restore(snapshot)`, and what it returns at
        the end of that block.
        """
        del carried
        return None


_NUMBERS = itertools.count(1)


class Observed:
    """The span of one call, told to callbacks; with no callbacks it does nothing.

    Args:
        kind: Which pair of callback methods is called.
        instance: The object called; its own `callbacks` come after those of the settings.
        inputs: What it was called with.
        method: The method called, if the kind does not say it.
    """

    __slots__ = (
        "_callbacks",
        "_frame",
        "_inputs",
        "_instance",
        "_is_left_open",
        "_kind",
        "_method",
        "_token",
        "outputs",
    )

    def __init__(
        self, kind: CallKind, instance: Any, inputs: dict[str, Any], method: str | None = None
    ) -> None:
        self._kind: CallKind = kind
        self._instance = instance
        self._inputs = inputs
        self._method = method
        self._callbacks: tuple[Any, ...] = ()
        self._frame: CallFrame | None = None
        self._token: Token[CallFrame | None] | None = None
        self._is_left_open = False
        self.outputs: Any = None

    def __enter__(self) -> Observed:
        self._callbacks = _listeners(self._instance)
        if self._callbacks:
            parent = CURRENT_CALL.get()
            self._frame = CallFrame(
                call_id=f"{os.getpid():x}-{next(_NUMBERS):x}-{os.urandom(4).hex()}",
                parent_id=parent.call_id if parent else None,
                item_index=ITEM_INDEX.get(),
                kind=self._kind,
                instance=self._instance,
                method=self._method,
            )
            self._token = CURRENT_CALL.set(self._frame)
            try:
                self._tell("start", instance=self._instance, inputs=self._inputs)
            except BaseException as error:  # Ctrl-C in a callback: the end is told too
                self.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is None:
            return
        try:
            if exc is not None or not self._is_left_open:
                self._tell("end", outputs=self.outputs, exception=exc)
            else:
                self._tell_all("on_call_left_open")
        finally:
            try:
                CURRENT_CALL.reset(self._token)
            except ValueError:
                pass  # a generator closed from another context: its frame ended with that context

    @property
    def is_heard(self) -> bool:
        """Whether anybody is told of this call."""
        return self._frame is not None

    def leave_open(self) -> None:
        """Let the end of the block not be the end of the call; that is told by `finish`."""
        self._is_left_open = True

    def finish(self, outputs: Any, exception: BaseException | None = None) -> None:
        """Tell the end of a call that was left open."""
        self._tell("end", outputs=outputs, exception=exception)

    def _tell(self, moment: str, **details: Any) -> None:
        if self._frame is not None:
            self._tell_all(f"on_{self._kind}_{moment}", **details)

    def _tell_all(self, method: str, **details: Any) -> None:
        if self._frame is None:
            return
        stopped: BaseException | None = None
        for callback in self._callbacks:
            try:
                tell(callback, method, call_id=self._frame.call_id, **details)
            except BaseException as error:  # noqa: BLE001  # Ctrl-C; raised when all have been told
                stopped = stopped or error
        if stopped is not None:
            raise stopped


def _listeners(instance: Any) -> tuple[Any, ...]:
    """Return who is told of the calls of an object, each once."""
    of_all, own = settings.callbacks, getattr(instance, "callbacks", None)
    if not own:
        return of_all
    return (*of_all, *(each for each in own if not any(each is other for other in of_all)))


# --- Methods of users' own classes ---------------------------------------------------------------

_KINDS: Mapping[Any, CallKind] = {
    "module": "module",
    "predictor": "module",
    "lm": "lm",
    "tool": "tool",
    "evaluate": "evaluate",
}
_ADAPTER_KINDS: Mapping[str, CallKind] = {"format": "adapter_format", "parse": "adapter_parse"}
_OURS = frozenset({"module", "predictor"})
_DOORS = frozenset({"__call__", "acall", "plan"})
_BODIES: Mapping[CallKind, frozenset[str]] = {
    "module": frozenset({"forward", "aforward"}),
    "lm": frozenset({"forward", "aforward"}),
    "adapter_format": frozenset({"format"}),
    "adapter_parse": frozenset({"parse"}),
}
"""Methods that a call reports already when it runs them."""


def with_callbacks(fn: Callable[P, R]) -> Callable[P, R]:
    """Make callbacks hear of a method of a class of your own, sync or async.

    They are told of a call of the kind that the instance's `kind` names (`"module"`, `"lm"`,
    `"tool"`, `"evaluate"`), of `format` and `parse` of an adapter, else of a module's; with the
    inputs by name. Modules, models and adapters report their calls themselves, so on the methods by
    which they are called it changes nothing.

    Example:
        >>> class Search:
        ...     kind = "tool"
        ...
        ...     @with_callbacks
        ...     def __call__(self, query: str, limit: int = 3) -> list[str]:
        ...         return [query] * limit
        >>> class Printed(BaseCallback):
        ...     def on_tool_start(self, call_id, instance, inputs):
        ...         print(inputs)
        >>> with settings.context(callbacks=[Printed()]):
        ...     len(Search()("planets"))
        {'query': 'planets', 'limit': 3}
        3
    """
    signature = inspect.signature(fn)
    name = getattr(fn, "__name__", "")

    def span_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observed | None:
        """Return the span of a call; None where nobody listens, or it is reported already."""
        if not args or not _listeners(args[0]):
            return None
        kind = _kind_of(args[0], name)
        if _reports_itself(args[0], kind, name):
            return None
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None  # the call itself will say so
        bound.apply_defaults()
        return Observed(kind, args[0], _by_name(bound), name)

    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            span = span_of(args, kwargs)
            if span is None:
                return await fn(*args, **kwargs)
            with span as call:
                call.outputs = await fn(*args, **kwargs)
            return call.outputs

        return cast("Callable[P, R]", awaited)

    @functools.wraps(fn)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        span = span_of(args, kwargs)
        if span is None:
            return fn(*args, **kwargs)
        with span as call:
            result = call.outputs = fn(*args, **kwargs)
        return result

    return called


def _kind_of(instance: Any, method: str) -> CallKind:
    named = _KINDS.get(getattr(instance, "kind", None))
    if named is not None:
        return named
    if hasattr(instance, "format") and hasattr(instance, "parse"):
        return _ADAPTER_KINDS.get(method, "module")
    return "lm" if _is_lm(type(instance)) else "module"


def _is_lm(cls: type) -> bool:
    # `isinstance` would read the properties of the protocol, and one of them loads litellm.
    return hasattr(cls, "plan") and hasattr(cls, "capabilities")


def _reports_itself(instance: Any, kind: CallKind, method: str) -> bool:
    is_ours = getattr(instance, "kind", None) in _OURS or _is_lm(type(instance))
    if method in _DOORS and is_ours:
        return True
    frame = CURRENT_CALL.get()
    return (
        frame is not None
        and frame.instance is instance
        and frame.kind == kind
        and method in _BODIES.get(kind, ())
    )


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Give the arguments but the first, those of `**kwargs` under their own names."""
    inputs: dict[str, Any] = {}
    for name, parameter in list(bound.signature.parameters.items())[1:]:
        value = bound.arguments[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(value)
        else:
            inputs[name] = value
    return inputs
