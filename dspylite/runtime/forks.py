"""What a forked child must put right, and what must stand still while a process forks.

Locks that nobody will release, connections of the parent. Not here: what each object does about it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Resettable(Protocol):
    """Something that is of no use in a forked child as it is."""

    def reset_after_fork(self) -> None:
        """Start afresh; runs in the child, which has one thread, before anything else.

        It must take no lock that existed before the fork: its holder may not exist any more.
        """
        ...


class Holdable(Protocol):
    """Something that another thread must not be in the middle of when its process forks."""

    def before_fork(self) -> None:
        """Wait until it stands still, for a bounded time."""
        ...

    def after_fork(self) -> None:
        """Let it go on; runs in the parent."""
        ...


_watched: list[weakref.ref[Resettable]] = []
_held: list[weakref.ref[Holdable]] = []


def watch_forks(thing: Resettable) -> None:
    """Have `thing.reset_after_fork()` called in every child that is forked from now on."""
    # `list.append` and `list.remove` need no lock, so no fork can find one held.
    _watched.append(weakref.ref(thing, lambda ref: _forget(_watched, ref)))


def hold_forks(thing: Holdable) -> None:
    """Have `thing.before_fork()` and `after_fork()` called around every fork from now on."""
    _held.append(weakref.ref(thing, lambda ref: _forget(_held, ref)))


def _forget(refs: list[weakref.ref[T]], ref: weakref.ref[T]) -> None:
    try:
        refs.remove(ref)
    except ValueError:
        pass


def _reset_all() -> None:
    for ref in _watched:
        thing = ref()
        if thing is not None:
            thing.reset_after_fork()


def _hold_all() -> None:
    for ref in _held:
        thing = ref()
        if thing is not None:
            thing.before_fork()
    _LOADING.before_fork()  # last: whoever is waited for above may have something to load


def _let_go() -> None:
    _LOADING.after_fork()
    for ref in _held:
        thing = ref()
        if thing is not None:
            thing.after_fork()


_LONGEST_LOAD_S = 10.0
"""How long a fork waits for an import; litellm takes 3 to 10 s."""


class _Loading:
    """Imports that are under way; a child forked amid one could never make it."""

    def __init__(self) -> None:
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Start with nothing under way."""
        self.lock = threading.RLock()
        self._held_by: set[int] = set()  # threads that fork

    def before_fork(self) -> None:
        """Wait until what is being loaded is loaded."""
        if self.lock.acquire(timeout=_LONGEST_LOAD_S):
            self._held_by.add(threading.get_ident())

    def after_fork(self) -> None:
        """Let others load."""
        if threading.get_ident() in self._held_by:
            self._held_by.discard(threading.get_ident())
            self.lock.release()


_LOADING = _Loading()


@contextmanager
def loading() -> Generator[None]:
    """Let no fork happen while the block imports what calls load at their first use.

    Python's own lock of a module would stay locked in the child for ever.
    """
    with _LOADING.lock:
        yield


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_let_go, after_in_child=_reset_all)
