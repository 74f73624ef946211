"""The settings: one process default, and an overlay per context that names only what it changes.

Reads take no lock. Not here: what a setting means when it is not set; that default belongs to
whoever reads it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack, overload

from dspylite.abc import Adapter, LanguageModel, StreamSink
from dspylite.errors import SavingError, SettingsError, nearest
from dspylite.runtime.frames import CURRENT_CALL, ITEM_INDEX, CallFrame
from dspylite.runtime.listeners import tell
from dspylite.runtime.saved_settings import write_settings

T = TypeVar("T")

# Guards the read-change-swap of `_process`; never held while calling out.
_CONFIGURE_LOCK = threading.Lock()
_process: Mapping[str, Any] = {}  # the process default, only ever replaced whole
_OVERLAY: ContextVar[Mapping[str, Any] | None] = ContextVar("dspylite_overlay", default=None)


class SettingsWarning(UserWarning):
    """A change of settings will not be seen where it was made."""


class SettingsChanges(TypedDict, total=False):
    """The keys of `configure` and `context`, for type checkers; must match those of `Settings`."""

    lm: LanguageModel | None
    adapter: Adapter | None
    callbacks: list[Any] | tuple[Any, ...]
    trace: list[Any] | None
    track_usage: bool
    usage_tracker: Any
    budget: Any
    send_stream: StreamSink | None
    cache_namespace: str | None
    parse_retries: int
    deadline_s: float | None
    disable_history: bool
    max_history_size: int
    max_history_bytes: int
    redact_history: Callable[[Any], Any] | None
    max_trace_size: int
    num_threads: int
    max_errors: int | None
    async_max_workers: int | None
    provide_traceback: bool | None
    warn_on_type_mismatch: bool
    experimental: bool
    allow_tool_async_sync_conversion: bool
    extra: Mapping[str, Any]


class Key(Generic[T]):
    """One setting: its name, its value when nobody set it, and the check of a new value."""

    __slots__ = ("_check", "default", "name")

    def __init__(self, default: T, check: Callable[[str, Any], T]) -> None:
        self.default = default
        self._check = check
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: Settings, owner: type) -> T: ...

    def __get__(self, instance: Settings | None, owner: type) -> T | Self:
        if instance is None:
            return self
        name = self.name
        overlay = _OVERLAY.get()
        if overlay is not None and name in overlay:
            return overlay[name]  # type: ignore[no-any-return]  # `check` made it a T
        value: T = _process.get(name, self.default)
        return value

    def check(self, value: Any) -> T:
        """Return the value in its stored form.

        Raises:
            SettingsError: The value is impossible for this key.
        """
        return self._check(self.name, value)


def _component(wanted: type[T], example: str) -> Callable[[str, Any], T | None]:
    # isinstance with a Protocol costs more than the rest of `context`.
    accepted: set[type] = {type(None)}

    def check(name: str, value: Any) -> T | None:
        if type(value) in accepted:
            return value  # type: ignore[no-any-return]  # its type passed the check below before
        if isinstance(value, wanted) and not isinstance(value, type):
            accepted.add(type(value))
            return value
        hint = f"LM({value!r})" if name == "lm" and isinstance(value, str) else example
        raise SettingsError(
            f"`{name}` must be {example} or None, not {value!r}; write `{name}={hint}`."
        )

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"`{name}` must be True or False, not {value!r}.")
    return value


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _at_least(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(
                f"`{name}` must be a whole number of at least {least}, not {value!r}."
            )
        return value

    return check


def check_deadline(name: str, value: Any) -> float | None:
    """Return a time limit in seconds; None is none.

    Raises:
        SettingsError: It is no positive number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SettingsError(f"`{name}` must be a positive number of seconds, not {value!r}.")
    return float(value)


def _optional(check: Callable[[str, Any], int]) -> Callable[[str, Any], int | None]:
    return lambda name, value: None if value is None else check(name, value)


def _optional_text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise SettingsError(f"`{name}` must be a text or None, not {value!r}.")


def checked_callbacks(name: str, value: Any) -> tuple[Any, ...]:
    """Return callbacks as a tuple, which is not shared with the list they came in.

    Raises:
        SettingsError: They are no list.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise SettingsError(
            f"`{name}` must be a list of callbacks, not {value!r}; write `{name}=[it]`."
        )
    return tuple(value)


def _recorder(name: str, value: Any) -> list[Any] | None:
    if value is None or isinstance(value, list):
        return value
    raise SettingsError(f"`{name}` must be a list to record into, or None, not {value!r}.")


def _redaction(name: str, value: Any) -> Callable[[Any], Any] | None:
    if value is not None and (not callable(value) or iscoroutinefunction(value)):
        raise SettingsError(
            f"`{name}` must be a plain function from an entry to an entry or None, not {value!r}; "
            f"write `{name}=lambda entry: dataclasses.replace(entry, messages=())`."
        )
    function: Callable[[Any], Any] | None = value
    return function


def _anything(name: str, value: Any) -> Any:  # noqa: ARG001  # the shape of a check
    return value


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"`{name}` must be a dict of your own values, not {value!r}.")
    return dict(value)


class Settings:
    """What programs read while they run: `settings.lm`, `settings.num_threads` and so on.

    A read gives the value of the innermost `context` that names the key, else the process default
    made by `configure`. There is one instance, `dspylite.settings`.

    Attributes:
        lm: The language model of predictors that have none of their own. None: calls raise.
        adapter: Writes prompts and reads answers. None: `ChatAdapter()`.
        callbacks: Told of every call, in this order.
        trace: A list that receives `(predictor, inputs, prediction)` of every call; None records
            nothing.
        track_usage: Whether a module's prediction carries the tokens of all calls below it.
        usage_tracker: The tracker of the innermost `track_usage()`.
        budget: The budget of the innermost `budget()`.
        send_stream: Takes what a program says while it runs; inside of `streamify` only. A program
            may say something of its own: `await settings.send_stream.send(value)`, or
            `send_nowait(value)`. None in a block keeps its predictors from being streamed.
        cache_namespace: Calls of one namespace share cached answers, and with those of others
            nothing. None: calls with an `api_key` of their own share with that key's calls, all
            others with each other.
        parse_retries: How often a model is told why its answer cannot be read, and asked again.
        deadline_s: Longest time for a program or model call, in seconds, over waiting in line,
            retries and reading; a call made by another one has what is left to that one. None: no
            limit.
        disable_history: Whether finished calls are forgotten at once.
        max_history_size: Most calls kept in a history; 0 keeps none.
        max_history_bytes: Most memory that the calls kept in a history may take, by estimate; the
            oldest go first.
        redact_history: A function that is given the `HistoryEntry` of each finished call before it
            is kept anywhere, and returns the entry to keep, or None to keep nothing of the call.
            Where it fails nothing is kept. None: calls are kept as they are.
        max_trace_size: Most entries kept in `trace`; the oldest go first.
        num_threads: Threads of `Parallel` and `batch`.
        max_errors: Failures after which a batch takes no further item. None: it tries all.
        async_max_workers: Threads that `asyncify` and sync modules awaited with `acall` may use at
            once, per event loop. None: 40.
        provide_traceback: Whether failures in a batch are logged with their traceback.
        warn_on_type_mismatch: Whether an input of another type than declared gives a warning.
        experimental: Accepted from DSPy programs; without effect.
        allow_tool_async_sync_conversion: The same; async tools may always be called.
        extra: Your own values.
    """

    __slots__ = ()

    lm = Key[LanguageModel | None](None, _component(LanguageModel, "an LM"))
    adapter = Key[Adapter | None](None, _component(Adapter, "an adapter"))
    callbacks = Key[tuple[Any, ...]]((), checked_callbacks)
    trace = Key[list[Any] | None](None, _recorder)
    track_usage = Key[bool](False, _flag)
    usage_tracker = Key[Any](None, _anything)
    budget = Key[Any](None, _anything)
    send_stream = Key[StreamSink | None](None, _component(StreamSink, "the stream of `streamify`"))
    cache_namespace = Key[str | None](None, _optional_text)
    parse_retries = Key[int](0, _at_least(0))
    deadline_s = Key[float | None](None, check_deadline)
    disable_history = Key[bool](False, _flag)
    max_history_size = Key[int](1_000, _at_least(0))
    max_history_bytes = Key[int](8_000_000, _at_least(0))
    redact_history = Key[Callable[[Any], Any] | None](None, _redaction)
    max_trace_size = Key[int](10_000, _at_least(1))
    num_threads = Key[int](8, _at_least(1))
    max_errors = Key[int | None](None, _optional(_at_least(1)))
    async_max_workers = Key[int | None](None, _optional(_at_least(1)))
    provide_traceback = Key[bool | None](None, _optional_flag)
    warn_on_type_mismatch = Key[bool](True, _flag)
    experimental = Key[bool](False, _flag)
    allow_tool_async_sync_conversion = Key[bool](False, _flag)
    extra = Key[Mapping[str, Any]]({}, _mapping)

    def configure(self, **changes: Unpack[SettingsChanges]) -> None:
        """Change the process default, from any thread or task, any number of times.

        The last writer wins and no reader sees half of a change. A `context` around the caller that
        names the same key keeps its own value, and the caller is warned.

        Raises:
            SettingsError: A key is unknown or a value impossible; then nothing is changed.
        """
        global _process  # noqa: PLW0603  # the one process default, swapped under its lock
        checked = _checked(changes)
        overlay = _OVERLAY.get() or {}
        with _CONFIGURE_LOCK:
            _process = {**_process, **checked}
        if hidden := [name for name in checked if name in overlay]:
            warnings.warn(
                f"configure({', '.join(hidden)}=...) was called inside a `context` or a run that "
                f"has its own {', '.join(f'`{name}`' for name in hidden)}: the process default is "
                "changed, but this block keeps its value.",
                SettingsWarning,
                stacklevel=2,
            )

    def context(self, **changes: Unpack[SettingsChanges]) -> Overlay:
        """Override some settings for a block, and for all work started in it.

        Keys that are not named stay open: a `configure` made meanwhile is seen.

        Raises:
            SettingsError: A key is unknown or a value impossible.

        Example:
            >>> with settings.context(num_threads=3):
            ...     settings.num_threads
            3
        """
        return Overlay(_checked(changes))

    def snapshot(self) -> Snapshot:
        """Return all settings as they are here and now, for work that starts later or elsewhere.

        It knows the call in progress too: calls made after `restore` have that one as their parent,
        in whatever thread or process.
        """
        values = self.copy()
        carried: dict[str, str] = {}
        for callback in values["callbacks"]:
            found = tell(callback, "carry")
            if isinstance(found, Mapping):
                carried.update(found)
        frame = CURRENT_CALL.get()
        return Snapshot(
            values=values,
            frame=frame and replace(frame, instance=None),
            item_index=ITEM_INDEX.get(),
            carried=carried,
        )

    def restore(self, snapshot: Snapshot) -> Overlay:
        """Use a snapshot for a block, which is to the settings and callbacks as if it were there.

        Every key has the snapshot's value, and calls belong to the call and the batch item in which
        the snapshot was taken.
        """
        return _Restored(snapshot)

    def save(
        self,
        path: str | os.PathLike[str],
        modules_to_serialize: Sequence[Any] | None = None,
        exclude_keys: Sequence[str] | None = None,
    ) -> None:
        """Write all settings of here and now to a file of JSON; `load_settings` reads it.

        The LM without its keys and headers, an adapter of ours by its name. Nothing is left out
        silently: what no file can hold, such as callbacks, must be named in `exclude_keys`.

        Args:
            path: The file, which is replaced as a whole.
            modules_to_serialize: DSPy's; must be left out, because no code is written.
            exclude_keys: Settings to leave out.

        Raises:
            SavingError: A value is no data; its key is named.
            OSError: The file cannot be written.
        """
        if modules_to_serialize is not None:
            raise SavingError(
                "`modules_to_serialize` would write code into the file, which dspylite does not; "
                "leave it out."
            )
        write_settings(path, self.copy(), tuple(exclude_keys or ()))

    def copy(self) -> dict[str, Any]:
        """Return all settings as a new dict."""
        return {**_DEFAULTS, **_process, **(_OVERLAY.get() or {})}

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting by name, or `default` if there is no such setting."""
        return getattr(self, name) if name in KEYS else default

    def keys(self) -> Iterator[str]:
        """Return the names of all settings."""
        return iter(KEYS)

    def __getitem__(self, name: str) -> Any:
        if name not in KEYS:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in KEYS

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"There is no setting `{name}`. {nearest(name, KEYS)}".rstrip())

    def __setattr__(self, name: str, value: Any) -> None:
        raise SettingsError(
            f"Settings are not assigned: write `configure({name}=...)` for the process, "
            f"or `with context({name}=...):` for a block."
        )

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.copy().items())
        return f"Settings({inside})"


KEYS: Mapping[str, Key[Any]] = {
    name: value for name, value in vars(Settings).items() if isinstance(value, Key)
}


_DEFAULTS: Mapping[str, Any] = {name: key.default for name, key in KEYS.items()}


def _checked(changes: Mapping[str, Any]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in KEYS:
            raise SettingsError(
                f"There is no setting `{name}`. {nearest(name, KEYS)}"
                'Values of your own go into `extra={"...": ...}`.'
            )
        checked[name] = KEYS[name].check(value)
    return checked


# Without slots, for which Python before 3.11.4 puts a `__getstate__` of its own over ours.
@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All settings of one moment, whole, and the call in progress then.

    What belongs to the process that took it (`trace`, `usage_tracker`, `budget`, `send_stream`)
    does not travel in a pickle.

    Attributes:
        values: Every key with its value.
        frame: The call in progress; None outside, or without callbacks.
        item_index: The batch item worked for; None outside batches.
        carried: What callbacks took along, such as the name of a trace.
    """

    values: Mapping[str, Any]
    frame: CallFrame | None = None
    item_index: int | None = None
    carried: Mapping[str, str] = field(default_factory=dict[str, str])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only its own process can use."""
        stays = {"trace", "usage_tracker", "budget", "send_stream"}
        return {
            "values": {name: value for name, value in self.values.items() if name not in stays},
            "frame": self.frame,
            "item_index": self.item_index,
            "carried": dict(self.carried),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what did not travel."""
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "values", {**_DEFAULTS, **state["values"]})


class Overlay:
    """A block in which some settings differ; made by `context(...)`, entered once at a time.

    Leaving it never raises, also when it is left in another context than it was entered in, as
    frameworks do with generators that they run on a thread pool.
    """

    __slots__ = ("_changes", "_token")

    def __init__(self, changes: Mapping[str, Any]) -> None:
        self._changes = changes
        self._token: Token[Mapping[str, Any] | None] | None = None

    def __enter__(self) -> None:
        if self._token is not None:
            raise SettingsError(
                "This `context(...)` is entered already; call `context(...)` again for each block."
            )
        outer = _OVERLAY.get()
        self._token = _OVERLAY.set({**outer, **self._changes} if outer else self._changes)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        token, self._token = self._token, None
        if token is not None:
            try:
                _OVERLAY.reset(token)
            except ValueError:
                pass  # left in another context: the overlay ended with the context it was set in


class _Restored(Overlay):
    """The block of a snapshot: its settings, its call, its batch item."""

    __slots__ = ("_frame", "_index", "_snapshot", "_undo")

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__({**_DEFAULTS, **snapshot.values})
        self._snapshot = snapshot
        self._frame: Token[CallFrame | None] | None = None
        self._index: Token[int | None] | None = None
        self._undo: list[Any] = []

    def __enter__(self) -> None:
        super().__enter__()
        self._frame = CURRENT_CALL.set(self._snapshot.frame)
        self._index = ITEM_INDEX.set(self._snapshot.item_index)
        for callback in self._snapshot.values["callbacks"]:
            self._undo.append(tell(callback, "resume", self._snapshot.carried))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._undo:
            undo = self._undo.pop()
            if callable(undo):
                tell(undo, "__call__")
        try:
            if self._index is not None and self._frame is not None:
                ITEM_INDEX.reset(self._index)
                CURRENT_CALL.reset(self._frame)
        except ValueError:
            pass  # left in another context, as `Overlay` bears it too
        self._index = self._frame = None
        super().__exit__(exc_type, exc, traceback)


def overlay() -> Mapping[str, Any] | None:
    """Return what the blocks around here have changed, as `pin` takes it."""
    return _OVERLAY.get()


def pin(values: Mapping[str, Any] | None) -> None:
    """Fix settings for the rest of the current context, without check.

    A run calls it inside each item's own copy of the context with the values of its snapshot, so
    that a later `configure` never splits the run.
    """
    _OVERLAY.set(values)


def overlay_with(**values: Any) -> Overlay:
    """Like `context`, for values that need no check; the package's own use."""
    return Overlay(values)


def change_callbacks(*, add: Sequence[Any] = (), remove: Sequence[Any] = ()) -> None:
    """Add callbacks to the process default and take others out, leaving the rest as it is."""
    global _process  # noqa: PLW0603  # as in `configure`
    gone = {id(callback) for callback in remove}
    with _CONFIGURE_LOCK:
        kept = [each for each in _process.get("callbacks", ()) if id(each) not in gone]
        _process = {**_process, "callbacks": (*kept, *add)}


settings = Settings()
configure = settings.configure
context = settings.context
