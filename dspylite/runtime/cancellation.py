"""The flag by which work is told to stop: a batch that was interrupted, a caller that went away.

It is carried by the context into every thread and task of the work, and seen by model calls, by
waits between attempts and in line, and between the items of a batch. Not here: who raises it, and
the waits that see it (`runtime/flow.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from dspylite.errors import CallCancelledError


class Cancellation:
    """A flag that is raised once and never lowered, over some piece of work.

    It is raised with the one around it, and raises those inside it. As a context manager it is the
    flag of all work started in the block. Safe to use from any thread; it takes no lock, because
    each step that matters is one operation of a dict.

    Args:
        parent: The flag of the work that this work is part of.

    Example:
        >>> with Cancellation() as flag:
        ...     flag.cancel("the user pressed stop")
        ...     check_cancelled()
        Traceback (most recent call last):
        ...
        dspylite.errors.CallCancelledError: Cancelled: the user pressed stop.
    """

    __slots__ = ("_in_parent", "_parent", "_reason", "_token", "_watchers")

    def __init__(self, parent: Cancellation | None = None) -> None:
        self._reason: str | None = None
        self._watchers: dict[object, Callable[[], object]] = {}
        self._token: Token[Cancellation | None] | None = None
        self._parent = parent
        self._in_parent = None if parent is None else parent.watch(self._follow)

    @property
    def reason(self) -> str | None:
        """Why the work must stop; None while it need not."""
        return self._reason

    def cancel(self, reason: str) -> None:
        """Raise the flag; a repeat does nothing.

        Args:
            reason: Said in the error that the work meets, such as `"the client went away"`.
        """
        if self._reason is None:
            self._reason = reason
        while self._watchers:
            try:
                _, tell = self._watchers.popitem()
            except KeyError:  # another thread took the last one
                break
            tell()

    def check(self) -> None:
        """Go on only while the flag is down.

        Raises:
            CallCancelledError: It is raised.
        """
        if self._reason is not None:
            raise CallCancelledError(f"Cancelled: {self._reason}.")

    def watch(self, tell: Callable[[], object]) -> object:
        """Have a function called when the flag is raised; at once if it is.

        Args:
            tell: Called once, on the thread that raises the flag; it must not block or raise.

        Returns:
            What `unwatch` takes.
        """
        handle = object()
        self._watchers[handle] = tell
        if self._reason is not None and self._watchers.pop(handle, None) is not None:
            tell()
        return handle

    def unwatch(self, handle: object) -> None:
        """Forget a function; one that was called already is gone anyway."""
        self._watchers.pop(handle, None)

    def close(self) -> None:
        """Part from the flag around this one, when the work is over."""
        if self._parent is not None:
            self._parent.unwatch(self._in_parent)

    def _follow(self) -> None:
        assert self._parent is not None  # only a parent calls this
        self.cancel(self._parent.reason or "the work around it was")

    def __enter__(self) -> Self:
        self._token = CANCELLATION.set(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if self._token is not None:
            try:
                CANCELLATION.reset(self._token)
            except ValueError:
                pass  # left in another context: what was set ended with the context it was set in


CANCELLATION: ContextVar[Cancellation | None] = ContextVar("dspylite_cancellation", default=None)
"""The flag of the innermost work that this context belongs to."""


def check_cancelled() -> None:
    """Go on only while nobody asked this work to stop.

    Model calls, waits and batches look by themselves. A long computation of your own in a worker
    thread can call it now and then, so that it ends soon after Ctrl-C, after the cancellation of
    the task that awaits it, or after the client of a web service went away.

    Raises:
        CallCancelledError: Somebody did.

    Example:
        >>> check_cancelled()
    """
    flag = CANCELLATION.get()
    if flag is not None:
        flag.check()
