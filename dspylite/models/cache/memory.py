"""The cache's first level: values in this process, the least recently used one dropped first.

Not here: what outlives the process (`disk.py`).
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dspylite.schema.messages import LMResponse

_ENTRY_BYTES = 700
"""What an entry takes beside its value: key, dict slot, objects; measured on CPython 3.11."""


def held_bytes(value: Any) -> int:
    """Return about how many bytes a value takes in memory; what is shared counts each time.

    That may be much more than its length as a row: one emoji makes each character of its text take
    four bytes, and a number in a list takes 36.

    Example:
        >>> held_bytes("a" * 1000) < 1100, held_bytes("a" * 1000 + chr(0x1F600)) > 4000
        (True, True)
    """
    if isinstance(value, array):  # of numbers, which are in it and not beside it
        return sys.getsizeof(value)
    total, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, LMResponse):
            left += [
                (part.text, part.reasoning, part.tool_calls, part.citations, part.logprobs)
                for part in each.outputs
            ]
            continue
        total += sys.getsizeof(each)
        if isinstance(each, Mapping):
            left += each.keys()
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each
    return total


class MemoryCache:
    """Values by key, bounded in bytes and in number.

    Safe to use from any number of threads. Values must not be changed by anybody.

    Args:
        size_limit_bytes: Most bytes of values, by the sizes they are put with.
        max_entries: Most values.
    """

    def __init__(self, size_limit_bytes: int, max_entries: int) -> None:
        self.size_limit_bytes = size_limit_bytes
        self.max_entries = max_entries
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Go on with the values there are; a thread of the parent may have been in the middle."""
        self._lock = threading.Lock()  # guards both below; nothing is called while it is held
        self._size = sum(size for _, size in self._values.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the values kept now."""
        return self._size

    def get(self, key: str) -> Any:
        """Return a value and note that it was used; None if there is none."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: str, value: Any, size: int) -> None:
        """Keep a value, dropping the least recently used ones beyond the bounds.

        Args:
            key: Its key.
            value: The value; one larger than the bound is not kept.
            size: What it takes, in bytes.
        """
        self.put_many([(key, value, size)])

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values that there are, and note that they were used.

        Nobody else is served meanwhile, so that callers hand over many keys in several calls.
        """
        values, found = self._values, {}
        with self._lock:
            for key in keys:
                entry = values.get(key)
                if entry is not None and entry[0] is not None:
                    values.move_to_end(key)
                    found[key] = entry[0]
        return found

    def put_many(self, entries: Iterable[tuple[str, Any, int]]) -> None:
        """Keep values; each is a key, a value and a size, as `put` takes them."""
        with self._lock:
            for key, value, size in entries:
                full_size = size + _ENTRY_BYTES
                self._drop(key)
                if full_size > self.size_limit_bytes:
                    continue
                self._values[key] = (value, full_size)
                self._size += full_size
                while self._size > self.size_limit_bytes or len(self._values) > self.max_entries:
                    _, (_, dropped) = self._values.popitem(last=False)
                    self._size -= dropped

    def delete(self, key: str) -> None:
        """Forget a value, if there is one."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: str) -> None:
        found = self._values.pop(key, None)
        if found is not None:
            self._size -= found[1]

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()
            self._size = 0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._values))
