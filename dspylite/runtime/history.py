"""What is kept of finished calls: the last of them, per model, per module and of all.

Not here: how many tokens they took (`runtime/tracking.py`), and how they are shown
(`runtime/inspection.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from sys import getsizeof
from types import TracebackType
from typing import Any

from dspylite.errors import clip
from dspylite.runtime.settings import overlay_with, settings
from dspylite.schema.messages import LMResponse, Message
from dspylite.schema.secrets import redact, secrets_of, shown_params

logger = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 200
"""Longest piece of a prompt or an answer in a log line."""

CUT_TEXT_CHARS = 1_000
"""What is left of each text of a call that is too large to be kept whole."""

_OWN_BYTES = 1_000
"""What an entry takes beside its texts, its response included; measured on CPython 3.11, where a
short call of `Predict` takes 1.9 kB in all (`tests/test_history.py` measures it again)."""


_MESSAGE_BYTES = 240
"""A dict with a role and a content; measured likewise."""


def _new_id() -> str:
    return os.urandom(16).hex()  # as `uuid4().hex`, at a quarter of the cost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HistoryEntry(Mapping[str, Any]):
    """One answered call, as histories keep it: attributes, and a read-only mapping as in DSPy.

    `entry["usage"]`, `entry.get("cost")`, `"prompt" in entry` and `dict(entry)` work. A changed
    entry is made by `dataclasses.replace(entry, messages=())`.

    Attributes:
        model: The LM asked.
        messages: What it was sent; the messages of a chat that goes on later are those of then.
        outputs: The `n` answers as the call returned them: texts, or dicts where an answer holds
            more than text (`"text"`, `"reasoning_content"`, `"tool_calls"`).
        usage: Tokens, by the provider's names.
        kwargs: Request parameters; never a key or a header.
        response: The answer as a value, with its attempts; None where texts were cut or a
            `redact_history` is set, because it would tell them a second time.
        cost: US dollars; 0.0 for a cached answer, None if the LM was given no `price`.
        answered_at: When it was answered, in seconds since 1970; `timestamp` says it in ISO 8601.
        uuid: Tells this call from all others.
        response_model: The model that answered, as the provider names it.
        model_type: Kind of endpoint: `"chat"`, `"text"` or `"responses"`.
        cached: Whether it took no request of its own.
        seconds: How long it took, with retries and waits in line; None if unknown.
        size_bytes: What the entry is taken to need in memory; not among the mapping's keys.
    """

    model: str
    messages: Sequence[Message]
    outputs: tuple[str | dict[str, Any], ...]
    usage: Mapping[str, int]
    kwargs: Mapping[str, Any]
    response: LMResponse | None = field(default=None, repr=False)
    cost: float | None = None
    answered_at: float = field(default_factory=time.time)
    uuid: str = field(default_factory=_new_id)
    response_model: str = ""
    model_type: str = "chat"
    cached: bool = False
    seconds: float | None = None
    size_bytes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        size = _size_of(self.outputs, self.kwargs) + _OWN_BYTES
        for message in self.messages:
            # Most messages are a role and a text, and this is asked of each call.
            text = message.get("content") if isinstance(message, dict) else None
            is_plain = type(text) is str and len(message) == 2
            size += getsizeof(text) + _MESSAGE_BYTES if is_plain else _size_of(message)
        object.__setattr__(self, "size_bytes", size)

    @property
    def prompt(self) -> str | None:
        """The text, where the call was one user message of plain text; else None."""
        if len(self.messages) != 1 or not isinstance(self.messages[0], dict):
            return None
        content = self.messages[0].get("content")
        is_plain = self.messages[0].get("role") == "user" and isinstance(content, str)
        return content if is_plain and isinstance(content, str) else None

    @property
    def timestamp(self) -> str:
        """When it was answered: UTC, in ISO 8601."""
        return datetime.fromtimestamp(self.answered_at, UTC).isoformat(timespec="milliseconds")

    def __getitem__(self, name: str) -> Any:
        if name not in _ENTRY_KEYS:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_ENTRY_KEYS)

    def __len__(self) -> int:
        return len(_ENTRY_KEYS)


_ENTRY_KEYS = (
    *("prompt", "timestamp"),
    *(f.name for f in dataclasses.fields(HistoryEntry) if f.init and f.name != "answered_at"),
)


def _size_of(*values: Any) -> int:
    """Estimate what texts and the containers around them take; anything else counts little."""
    size, left, seen = 0, list(values), set[int]()
    for value in left:  # which grows meanwhile
        if type(value) is str:  # most are; this is asked of each call
            size += getsizeof(value)
        elif isinstance(value, _CONTAINERS):
            if id(value) not in seen:  # what holds itself ends here too
                seen.add(id(value))
                size += getsizeof(value)
                left += value.values() if isinstance(value, dict) else value
        else:
            size += getsizeof(value) if isinstance(value, _TEXTS) else 32
    return size


_TEXTS, _CONTAINERS = (str, bytes), (dict, list, tuple)


def fitted(entry: HistoryEntry, limit: int) -> HistoryEntry | None:
    """Return an entry of at most `limit` bytes.

    One that is larger has each text cut to 1,000 characters and no `response`. If that is still too
    large, None is returned.

    Example:
        >>> entry = HistoryEntry(
        ...     model="m",
        ...     messages=[{"role": "user", "content": "a" * 9000}],
        ...     outputs=(),
        ...     usage={},
        ...     kwargs={},
        ... )
        >>> fitted(entry, 5_000).messages[0]["content"][-24:]
        '… (8000 more characters)'
    """
    if entry.size_bytes <= limit:
        return entry
    cut = dataclasses.replace(
        entry,
        messages=_cut(entry.messages),
        outputs=tuple(_cut(entry.outputs)),
        kwargs=_cut(entry.kwargs),
        response=None,
    )
    return cut if cut.size_bytes <= limit else None


def _cut(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return clip(value, CUT_TEXT_CHARS)
    if depth > _MAX_DEPTH:
        return "…"
    if isinstance(value, dict):
        return {key: _cut(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(each, depth + 1) for each in value]
    return value


_MAX_DEPTH = 16
"""Deepest place in a parameter that is looked at; a guess beyond what providers take."""


class History:
    """The last calls, oldest first; safe to read and to add to from any thread.

    When a call is added, the oldest go until at most `settings.max_history_size` calls, of at most
    `settings.max_history_bytes` together, are left. A call larger than that is kept with its texts
    cut to 1,000 characters each. Copies and pickles of a history are empty.
    """

    def __init__(self) -> None:
        self._entries: deque[HistoryEntry] = deque()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What the calls kept are taken to need in memory."""
        return self._size_bytes

    def add(self, entry: HistoryEntry) -> None:
        """Keep a call, dropping the oldest beyond the bounds."""
        self.add_within(entry, settings.max_history_size, settings.max_history_bytes)

    def add_within(self, entry: HistoryEntry, limit: int, most_bytes: int) -> None:
        """Keep a call, within bounds that the caller has looked up."""
        fitting = fitted(entry, most_bytes) if limit else None
        if fitting is None:
            return
        dropped: list[HistoryEntry] = []  # freed after the lock: finalizers may run any code
        with _LOCK:
            self._entries.append(fitting)
            self._size_bytes += fitting.size_bytes
            while len(self._entries) > limit or self._size_bytes > most_bytes:
                oldest = self._entries.popleft()
                self._size_bytes -= oldest.size_bytes
                dropped.append(oldest)

    def clear(self) -> None:
        """Forget all calls."""
        with _LOCK:
            dropped, self._entries, self._size_bytes = self._entries, deque(), 0
        del dropped  # freed after the lock

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[HistoryEntry]:
        return iter(self._copy())

    def __getitem__(self, index: int | slice) -> Any:
        return self._copy()[index]

    def _copy(self) -> list[HistoryEntry]:
        with _LOCK:
            return list(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the entries behind: a pickle after many calls is no larger than a fresh one."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start empty."""
        self.__init__()  # type: ignore[misc]  # a subclass with arguments would bring its own


# Guards the entries and the sum of every history, each for about a microsecond; nothing is called
# while it is held, and no other lock is taken. It is one for all so that a fork can wait for it: a
# child finds no history half changed. A signal handler that makes a call may enter it again.
_LOCK = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


GLOBAL_HISTORY = History()
"""The last calls of all LMs of this process."""

_OPEN: ContextVar[tuple[History, ...]] = ContextVar("dspylite_open_histories", default=())


class recording_in:  # noqa: N801  # used like the functions of contextlib
    """Keep the calls made in the block in `history` too."""

    __slots__ = ("_history", "_token")

    def __init__(self, history: History) -> None:
        self._history = history

    def __enter__(self) -> None:
        found = _OPEN.get()
        # A module that calls itself keeps its calls once.
        is_open = any(each is self._history for each in found)
        self._token = _OPEN.set(found if is_open else (*found, self._history))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            _OPEN.reset(self._token)
        except ValueError:
            pass  # left in another context: what was set ended with the context it was set in


def keep_call(
    *,
    model: str,
    model_type: str = "chat",
    messages: Sequence[Message],
    params: Mapping[str, Any],
    response: LMResponse,
    outputs: Sequence[str | dict[str, Any]],
    cost: float | None = None,
    seconds: float | None = None,
    histories: Sequence[History | list[Any]],
    is_kept: bool = False,
) -> None:
    """Keep one answered call in the histories, and tell of it in a line of the log.

    Args:
        model: The model asked.
        model_type: Kind of endpoint.
        messages: What it was sent.
        params: Request parameters.
        response: What it answered.
        outputs: The answers as the call returns them.
        cost: US dollars; None if the price is unknown.
        seconds: How long it took.
        histories: Those that keep it, besides the ones open in this context.
        is_kept: Whether the LM that really answered, a fallback, has told the open histories, and
            the log, already.
    """
    is_logged = logger.isEnabledFor(logging.DEBUG) and not is_kept
    entry = None
    if not settings.disable_history and settings.max_history_size:
        redaction = settings.redact_history
        entry = HistoryEntry(
            model=model,
            messages=[_of_now(message) for message in messages],
            outputs=tuple(outputs),
            usage=response.usage.as_dict(),
            kwargs=shown_params(params),
            response=_plain(response) if redaction is None else None,
            cost=0.0 if response.cached else cost,
            response_model=response.model or model,
            model_type=model_type,
            cached=response.cached,
            seconds=seconds,
        )
        if redaction is not None:
            entry = _redacted(entry, redaction)
    if is_logged:
        _log(model, response, seconds, entry, params)
    limit, most_bytes = settings.max_history_size, settings.max_history_bytes
    if entry is not None:
        # What is too large is cut once, and shared.
        entry = fitted(entry, most_bytes)
    if entry is not None:
        for history in (*histories, *(() if is_kept else _OPEN.get())):
            if isinstance(history, History):
                history.add_within(entry, limit, most_bytes)
            else:  # a plain list, as some models of users keep one
                history.append(entry)


def _of_now(message: Message) -> Message:
    """Copy what a caller who goes on with the chat may change; texts are shared."""
    copied: Any = message
    if isinstance(message, dict):
        inside = {
            name: _copied(value, {})
            for name, value in message.items()
            if isinstance(value, dict | list)
        }
        copied = {**message, **inside}
    own: Message = copied
    return own


def _copied(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    if not isinstance(value, dict | list) or depth > _MAX_DEPTH:
        return value
    if id(value) not in seen:  # each once, so that what holds itself ends
        seen[id(value)] = value
        seen[id(value)] = (
            {name: _copied(each, seen, depth + 1) for name, each in value.items()}
            if isinstance(value, dict)
            else [_copied(each, seen, depth + 1) for each in value]
        )
    return seen[id(value)]


def _plain(response: LMResponse) -> LMResponse:
    """Leave out what is alive: the place of a verdict, and the stream."""
    if response.verdict is None and response.stream is None:
        return response
    return LMResponse(  # as `replace` does it, at a third of the cost
        outputs=response.outputs,
        usage=response.usage,
        model=response.model,
        request_id=response.request_id,
        answered_by=response.answered_by,
        attempts=response.attempts,
        cached=response.cached,
    )


_TOLD: set[tuple[str, str]] = set()
"""The failures of redactions that were logged: function and class of the error."""

_MAX_TOLD = 100


def _redacted(
    entry: HistoryEntry, redaction: Callable[[HistoryEntry], HistoryEntry | None]
) -> HistoryEntry | None:
    """Return the entry that may be kept; None if there is none, or the function failed."""
    try:
        with overlay_with(disable_history=True):  # calls that it makes would be redacted in turn
            kept = redaction(entry)
        if kept is None or _is_sound(kept):
            return kept
        failure = f"returned a {type(kept).__name__} that is no sound HistoryEntry, nor None"
    except Exception as error:  # noqa: BLE001  # told here, by its class alone: its text may quote the entry
        failure = f"raised {type(error).__name__}"
    name = getattr(redaction, "__qualname__", type(redaction).__qualname__)
    if (name, failure) not in _TOLD and len(_TOLD) < _MAX_TOLD:
        _TOLD.add((name, failure))
        logger.warning(
            "redact_history=%s %s; such calls are not kept in any history, and this is said once",
            name,
            failure,
        )
    return None


def _is_sound(entry: Any) -> bool:
    return isinstance(entry, HistoryEntry) and all(
        isinstance(each, list | tuple) for each in (entry.messages, entry.outputs)
    )


def _log(
    model: str,
    response: LMResponse,
    seconds: float | None,
    entry: HistoryEntry | None,
    params: Mapping[str, Any],
) -> None:
    """Tell of a call in one line; its texts are those that may be kept."""
    texts = ""
    if entry is not None:
        secrets = secrets_of(params)
        last = entry.messages[-1] if entry.messages else None
        asked = last.get("content") if isinstance(last, dict) else None
        answered = entry.outputs[0] if entry.outputs else ""
        texts = f": {_short(asked, secrets)} -> {_short(answered, secrets)}"
    logger.debug(
        "%s answered with %d tokens for %d%s%s%s",
        model,
        response.usage.completion_tokens,
        response.usage.prompt_tokens,
        "" if seconds is None else f" in {seconds:.3f} s",
        ", cached" if response.cached else "",
        texts,
    )


def _short(content: Any, secrets: Sequence[str]) -> str:
    text = content if isinstance(content, str) else ""
    if isinstance(content, dict):
        text = str(content.get("text") or content.get("tool_calls") or "")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        text = " ".join(str(part.get("text") or f"<{part.get('type')}>") for part in parts)
    # Secrets first: of one that is cut in two, the first half would stay. Quoted, so that a line
    # break in the text begins no line of the log.
    shown = redact(text[: 20 * MAX_LOGGED_CHARS], secrets)
    if len(shown) <= MAX_LOGGED_CHARS:
        return repr(shown)
    return f"{shown[:MAX_LOGGED_CHARS]!r}… ({len(text)} characters)"
