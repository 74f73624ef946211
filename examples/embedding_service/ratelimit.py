"""How often a user may ask: a number of requests in a window that begins with the first.

Not here: who the user is (`auth.py`).
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Protocol, cast

import redis

from examples.embedding_service.errors import RateLimitedError
from examples.embedding_service.redis_tasks import PREFIX, reaching_redis

# One step: a crash between counting and setting the end of the window would lock a user out for
# ever. A key without an end, whoever made it, is given one.
_COUNT = """
local count = redis.call('INCR', KEYS[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  left = tonumber(ARGV[1])
  redis.call('PEXPIRE', KEYS[1], left)
end
return {count, left}
"""


class RateLimit(Protocol):
    """Counts the requests of users."""

    def check(self, user: str) -> None:
        """Count a request.

        Raises:
            RateLimitedError: It is one too many, and `retry_after` says when the next one passes.
            UnavailableError: The counter cannot be reached; nothing passes uncounted.
        """
        ...


class MemoryRateLimit:
    """Counts in this process.

    Args:
        limit: Requests in a window; 0 lets all pass.
        window_s: Its length.
    """

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._lock = threading.Lock()  # guards the windows
        self._windows: dict[str, tuple[float, int]] = {}  # end and count; users are configured

    def check(self, user: str) -> None:
        """Count a request."""
        if not self._limit:
            return
        now = time.monotonic()
        with self._lock:
            end, count = self._windows.get(user, (0.0, 0))
            if now >= end:
                end, count = now + self._window_s, 0
            self._windows[user] = end, count + 1
        _pass(count + 1, self._limit, end - now)


class RedisRateLimit:
    """Counts for all processes together.

    Args:
        client: To Redis.
        limit: Requests in a window; 0 lets all pass.
        window_s: Its length.
    """

    def __init__(self, client: redis.Redis, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_ms = math.ceil(window_s * 1000)
        self._count = client.register_script(_COUNT)

    def check(self, user: str) -> None:
        """Count a request."""
        if not self._limit:
            return
        with reaching_redis():
            answer: Any = self._count(keys=[f"{PREFIX}rate:{user}"], args=[self._window_ms])
        count, left_ms = cast("list[int]", answer)
        _pass(count, self._limit, left_ms / 1000)


def _pass(count: int, limit: int, left_s: float) -> None:
    if count > limit:
        raise RateLimitedError(
            f"More than {limit} requests; the next one passes in {math.ceil(left_s)} s.",
            retry_after=max(left_s, 0.001),
        )
