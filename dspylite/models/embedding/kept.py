"""Vectors kept per text, in the cache of this process: never per batch.

Not here: where they are kept (`models/cache/`), and what a source says its vectors depend on
(`sources.py`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping

from dspylite.abc import Io
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import current_cache
from dspylite.models.embedding.sources import Source

logger = logging.getLogger(__name__)

_MANY = 64
"""So many keys at once are looked up beside the event loop, which would stand still meanwhile."""


class Shelf:
    """Where the vectors of one source are kept, for the length of one call."""

    def __init__(self, source: Source, cache: Cache, base: str, salt: Callable[[], bytes]) -> None:
        self._source = source
        self._cache = cache
        self._base = base
        self._salt = salt

    @classmethod
    def of(cls, source: Source) -> Shelf | None:
        """Return the place of a source's vectors; None where they are not kept."""
        cache = current_cache()
        if not cache.is_on:
            return None
        # One salt for all of a call, also where the directory gets its own meanwhile.
        salt = cache.salt if cache.is_salt_kept else functools.cache(cache.salt)
        base = _base(source, cache, salt)
        return None if base is None else cls(source, cache, base, salt)

    async def find(self, io: Io, pieces: list[str]) -> dict[str, array[float]]:
        """Return the vectors that are kept, by what was sent for them; nobody may change them."""
        keys = _keys(self._base, pieces)
        read = functools.partial(self._cache.read_many, list(keys), copied=False)
        found = read() if len(keys) < _MANY else await io.any(read)
        vectors = {
            keys[key]: value
            for key, value in found.items()
            if isinstance(value, array) and value.typecode == "f"
        }
        self._cache.count("misses", len(pieces) - len(vectors))
        return vectors

    async def keep(self, io: Io, vectors: Mapping[str, array[float]]) -> None:
        """Keep vectors, unless what they depend on has changed since the call began."""
        if _base(self._source, self._cache, self._salt) != self._base:
            logger.debug("the parameters of %s changed under way; not kept", self._source.name)
            return
        base: str | None = self._base
        if not self._cache.is_salt_kept:
            # The directory is made now, and another process may have been faster with the salt.
            await io.any(functools.partial(self._cache.salt, make=True))
            base = _base(self._source, self._cache, self._cache.salt)
        if base is not None:
            keys = _keys(base, vectors)
            rows = {key: vectors[piece] for key, piece in keys.items()}
            await io.any(functools.partial(self._cache.write_many, rows, copied=False))

    def forget(self, pieces: Iterable[str]) -> None:
        """Keep the vectors of these no longer."""
        for key in _keys(self._base, pieces):
            self._cache.drop(key)


def _keys(base: str, pieces: Iterable[str]) -> dict[str, str]:
    start = hashlib.sha256(f"{base}\0".encode())
    keys: dict[str, str] = {}
    for piece in pieces:
        made = start.copy()
        made.update(piece.encode("utf-8", "surrogatepass"))
        keys[made.hexdigest()] = piece
    return keys


def _base(source: Source, cache: Cache, salt: Callable[[], bytes]) -> str | None:
    try:
        described = source.described(salt)
        return None if described is None else cache.cache_key(described)
    # A function among the parameters, or a key's function that fails: the engine says more.
    except Exception as error:  # noqa: BLE001  # logged here; the call goes on
        logger.debug("vectors of %s cannot be cached: %s", source.name, type(error).__name__)
        return None
