"""What a forked child must put right, and what must stand still while a process forks.

Locks that nobody will release, connections of the parent. Not here: what each object does about it.
"""

from __future__ import annotations

import os
import weakref
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


def _let_go() -> None:
    for ref in _held:
        thing = ref()
        if thing is not None:
            thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_let_go, after_in_child=_reset_all)
