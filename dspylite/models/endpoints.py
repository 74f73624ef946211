"""What all calls to one endpoint with one key share, in whatever LM, thread or loop they are made.

Not here: the things shared (`models/policies.py` names them).
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from dspylite.models.direct.providers import provider_of
from dspylite.runtime.forks import watch_forks

T = TypeVar("T")

_REMEMBERED = 2048
"""Endpoint states kept while no LM uses them, so that a program which makes an LM for each request
still knows how its endpoints are. A state takes about 2 kB."""


class _Shared:
    """Things by key: those in use, and the latest of the others."""

    def __init__(self) -> None:
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        self._lock = threading.Lock()  # guards both below; makers run inside it and are quick
        self._in_use: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._latest: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            found: T | None = self._in_use.get(key)
            if found is None:
                found = make()
                self._in_use[key] = found
            self._latest[key] = found
            self._latest.move_to_end(key)
            if len(self._latest) > _REMEMBERED:
                self._latest.popitem(last=False)
            return found


_SHARED = _Shared()


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """Return the one thing of a key in this process, making it where there is none.

    Args:
        key: Whose and what it is.
        make: Makes it; must be quick and must not come back here.
    """
    return _SHARED.get(key, make)


def forget_endpoints() -> None:
    """Forget how all endpoints are doing, as between two tests; LMs made before remember."""
    _SHARED.reset_after_fork()


def _provider(model: str) -> str:
    provider = provider_of(model)  # knows bare names, such as "gpt-4o-mini"
    return model.partition("/")[0] if provider is None else provider.name


def endpoint_id(model: str, params: Mapping[str, Any]) -> Hashable:
    """Return what tells an endpoint and key from others, without holding the key itself.

    Args:
        model: With its provider in front.
        params: Of the LM: `api_base` or `base_url`, `api_key`.
    """
    where = params.get("api_base") or params.get("base_url") or _provider(model)
    key = params.get("api_key")
    if isinstance(key, str):
        return (str(where).rstrip("/"), hashlib.sha256(key.encode("utf-8", "replace")).digest())
    return (str(where).rstrip("/"), key if isinstance(key, Hashable) else id(key))
