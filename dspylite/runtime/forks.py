"""What a forked child must put right: locks that nobody will release, connections of its parent.

Not here: what each object does about it.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Resettable(Protocol):
    """Something that is of no use in a forked child as it is."""

    def reset_after_fork(self) -> None:
        """Start afresh; runs in the child, which has one thread, before anything else.

        It must take no lock that existed before the fork: its holder may not exist any more.
        """
        ...


_watched: list[weakref.ref[Resettable]] = []


def watch_forks(thing: Resettable) -> None:
    """Have `thing.reset_after_fork()` called in every child that is forked from now on."""
    # `list.append` and `list.remove` need no lock, so no fork can find one held.
    _watched.append(weakref.ref(thing, _forget))


def _forget(ref: weakref.ref[Resettable]) -> None:
    try:
        _watched.remove(ref)
    except ValueError:
        pass


def _reset_all() -> None:
    for ref in _watched:
        thing = ref()
        if thing is not None:
            thing.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
