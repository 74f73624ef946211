"""What is kept of finished calls: the last of them, per model, per module and of all.

Not here: how many tokens they took (`runtime/tracking.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dspylite.runtime.settings import settings
from dspylite.schema.messages import LMResponse, Message, without_secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One finished call, as `history` keeps it. Reads like DSPy's dict: `entry["messages"]`.

    Attributes:
        model: The model asked.
        messages: What it was sent.
        outputs: The texts it wrote.
        usage: Tokens, by the provider's names.
        kwargs: Request parameters; never a key or a header.
    """

    model: str
    messages: Sequence[Message]
    outputs: tuple[str, ...]
    usage: Mapping[str, int]
    kwargs: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class History:
    """The last calls, oldest first; bounded by `settings.max_history_size` when a call is added."""

    def __init__(self) -> None:
        self._entries: deque[HistoryEntry] = deque()

    def add(self, entry: HistoryEntry) -> None:
        """Keep a call, dropping the oldest beyond the bound."""
        limit = settings.max_history_size
        self._entries.append(entry)
        while len(self._entries) > limit:
            try:
                self._entries.popleft()
            except IndexError:  # another thread dropped it first
                break

    def clear(self) -> None:
        """Forget all calls."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[HistoryEntry]:
        return iter(self._copy())

    def __getitem__(self, index: int | slice) -> Any:
        return self._copy()[index]

    def _copy(self) -> list[HistoryEntry]:
        while True:
            try:
                return list(self._entries)
            except RuntimeError:  # a thread added while we copied; the copy takes microseconds
                continue

    def __getstate__(self) -> dict[str, Any]:
        """Leave the entries behind: a pickle after many calls is no larger than a fresh one."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start empty."""
        self._entries = deque()


GLOBAL_HISTORY = History()
"""The last calls of all LMs of this process."""

_OPEN: ContextVar[tuple[History, ...]] = ContextVar("dspylite_open_histories", default=())


class recording_in:  # noqa: N801  # used like the functions of contextlib
    """Keep the calls made in the block in `history` too."""

    __slots__ = ("_history", "_token")

    def __init__(self, history: History) -> None:
        self._history = history

    def __enter__(self) -> None:
        self._token = _OPEN.set((*_OPEN.get(), self._history))

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
    messages: Sequence[Message],
    params: Mapping[str, Any],
    response: LMResponse,
    histories: Sequence[History | list[Any]],
    is_kept: bool = False,
) -> None:
    """Keep one answered call in the histories.

    Args:
        model: The model asked.
        messages: What it was sent.
        params: Request parameters.
        response: What it answered.
        histories: Those that keep it, besides the ones open in this context.
        is_kept: Whether the LM that really answered, a fallback, has told the open histories
            already.
    """
    if settings.disable_history:
        return
    entry = HistoryEntry(
        model=model,
        messages=messages,
        outputs=tuple(output.text for output in response.outputs),
        usage=response.usage.as_dict(),
        kwargs=without_secrets(params),
    )
    for history in (*histories, *(() if is_kept else _OPEN.get())):
        if isinstance(history, History):
            history.add(entry)
        else:  # a plain list, as some models of users keep one
            history.append(entry)
