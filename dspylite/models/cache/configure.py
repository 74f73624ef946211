"""Which cache this process uses: made on the first use, as the environment says, or by the user.

Not here: what a cache does (`cache.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from dspylite.errors import SettingsError, nearest
from dspylite.models.cache.cache import (
    DEFAULT_DISK_BYTES,
    DEFAULT_MEMORY_BYTES,
    DEFAULT_MEMORY_ENTRIES,
    Cache,
)
from dspylite.runtime.forks import watch_forks

_MODE_VARIABLE = "DSPYLITE_CACHE"
_MODES = ("on", "memory", "off")


class _Current:
    """The cache of this process, if it is made already."""

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        self.lock = threading.Lock()  # held while the cache is made, which opens nothing


_current = _Current()


def current_cache() -> Cache:
    """Return the cache that calls use, making it as the environment says if there is none.

    Raises:
        SettingsError: `DSPYLITE_CACHE` says something unknown.
    """
    found = _current.cache
    if found is not None:
        return found
    with _current.lock:
        if _current.cache is None:
            _current.cache = _from_environment()
        return _current.cache


def use_cache(cache: Cache) -> None:
    """Have all calls from now on use another cache; what the one before must write is written.

    Raises:
        SettingsError: It is no `Cache`.
    """
    if not isinstance(cache, Cache):
        raise SettingsError(  # callers without a checker come here
            f"`dspylite.cache` must be a `dspylite.Cache(...)`, not {cache!r}; to have no cache, "
            "use `configure_cache(enable_disk_cache=False, enable_memory_cache=False)`."
        )
    with _current.lock:
        before, _current.cache = _current.cache, cache
    if before is not None and before is not cache:
        before.close()


def configure_cache(
    enable_disk_cache: bool | None = True,
    enable_memory_cache: bool | None = True,
    disk_cache_dir: str | os.PathLike[str] | None = None,
    disk_size_limit_bytes: int | None = DEFAULT_DISK_BYTES,
    memory_max_entries: int = DEFAULT_MEMORY_ENTRIES,
    restrict_pickle: bool = True,
    safe_types: Sequence[type[Any]] | None = None,
    *,
    memory_size_limit_bytes: int = DEFAULT_MEMORY_BYTES,
) -> None:
    """Have all calls of this process from now on use a new cache; from any thread, at any time.

    Without it the environment decides on the first call: `DSPYLITE_CACHE` is `on` (the default),
    `memory` or `off`, and `DSPYLITE_CACHE_DIR` says where.

    Args:
        enable_disk_cache: Whether answers outlive the process.
        enable_memory_cache: Whether answers are kept in this process.
        disk_cache_dir: Where the files are. None: as `Cache` says.
        disk_size_limit_bytes: Most bytes on disk.
        memory_max_entries: Most answers in memory.
        restrict_pickle: Accepted from DSPy programs; nothing is ever unpickled.
        safe_types: The same.
        memory_size_limit_bytes: Most bytes in memory.

    Raises:
        SettingsError: A limit is no positive number.

    Example:
        >>> configure_cache(enable_disk_cache=False, enable_memory_cache=False)
        >>> current_cache()
        Cache(off)
    """
    del restrict_pickle, safe_types
    use_cache(
        Cache(
            enable_disk_cache=enable_disk_cache,
            enable_memory_cache=enable_memory_cache,
            disk_cache_dir=disk_cache_dir,
            disk_size_limit_bytes=disk_size_limit_bytes,
            memory_max_entries=memory_max_entries,
            memory_size_limit_bytes=memory_size_limit_bytes,
        )
    )


def _from_environment() -> Cache:
    mode = os.environ.get(_MODE_VARIABLE, "").strip().lower() or "on"
    if mode not in _MODES:
        raise SettingsError(
            f"`{_MODE_VARIABLE}` is {mode!r}. {nearest(mode, _MODES)}Use one of: "
            f"{', '.join(_MODES)}."
        )
    return Cache(enable_disk_cache=mode == "on", enable_memory_cache=mode != "off")
