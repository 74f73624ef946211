"""The policies around a call, and how they form a chain.

A policy is one method `async def handle(self, request, call_next, io)`, which serves sync and async
callers alike. Not here: the call itself (`models/litellm.py`, `models/offline/engine.py`).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from dspylite.abc import Engine, Io, Middleware, Next
from dspylite.errors import LMConfigurationError, LMError
from dspylite.schema.messages import LMRequest, LMResponse

T = TypeVar("T")


def _uniform() -> float:
    """Draw from [0, 1); `random.random` itself would be pickled with its generator's state."""
    return random.random()


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Sends a request again after a failure that may pass.

    Waits between attempts by exponential backoff with full jitter: uniformly between 0 and
    `min(max_wait_s, base_s * 2 ** (attempt - 1))`. A wait that the provider asks for is kept to
    instead; if it is longer than `max_wait_s`, the error is raised at once and carries it as
    `retry_after_s`.

    Attributes:
        max_retries: Further attempts after the first; 0 sends each request once.
        base_s: Longest wait before the first further attempt, in seconds.
        max_wait_s: Longest wait before any attempt, in seconds.
        rand: Gives a number in [0, 1).

    Raises:
        LMConfigurationError: `max_retries` is negative, or a wait is not positive.

    Source:
        Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    max_retries: int = 3
    base_s: float = 0.5
    max_wait_s: float = 30.0
    rand: Callable[[], float] = _uniform

    def __post_init__(self) -> None:
        retries: object = self.max_retries
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise LMConfigurationError(
                f"`num_retries` must be 0 or more, not {self.max_retries!r}; 0 sends each request "
                "once."
            )
        if not (self.base_s > 0 and self.max_wait_s > 0):  # in this form it refuses NaN too
            raise LMConfigurationError(
                f"Waits must be positive seconds, not base_s={self.base_s}, "
                f"max_wait_s={self.max_wait_s}."
            )

    def delay(self, attempt: int, error: LMError) -> float | None:
        """Return the seconds to wait after a failed attempt, or None to give up.

        Args:
            attempt: Which attempt failed, counting from 1.
            error: How it failed.

        Example:
            >>> from dspylite.errors import LMAuthError, LMServerError
            >>> retry = Retry(rand=lambda: 1.0)
            >>> [retry.delay(attempt, LMServerError()) for attempt in (1, 2, 3, 4)]
            [0.5, 1.0, 2.0, None]
            >>> retry.delay(1, LMServerError(retry_after=7)), retry.delay(1, LMAuthError())
            (7, None)
        """
        if not error.retryable or attempt > self.max_retries:
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.max_wait_s else None
        # The exponent is capped: 2 ** 1100 is no float any more.
        longest = min(self.max_wait_s, self.base_s * 2.0 ** min(attempt - 1, 64))
        return longest * self.rand()

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Call until it succeeds, fails for good, or the attempts are used up."""
        return await self.run(lambda: call_next(request), io)

    async def run(self, attempt_once: Callable[[], Awaitable[T]], io: Io) -> T:
        """Await `attempt_once()` until it succeeds, fails for good, or the attempts are used up."""
        for attempt in count(1):
            try:
                return await attempt_once()
            except LMError as error:
                wait_s = self.delay(attempt, error)
                if wait_s is None:
                    if attempt > 1:
                        error.add_note(f"Gave up after {attempt} attempts.")
                    raise
            await io.sleep(wait_s)
        raise AssertionError("count() never ends")


def chain(middleware: Sequence[Middleware], engine: Engine, io: Io) -> Next:
    """Put policies around an engine, the first one outermost."""

    async def leaf(request: LMRequest) -> LMResponse:
        return await io.call(engine, request)

    handler: Next = leaf
    for policy in reversed(middleware):
        handler = _around(policy, handler, io)
    return handler


def _around(policy: Middleware, call_next: Next, io: Io) -> Next:
    async def handle(request: LMRequest) -> LMResponse:
        return await policy.handle(request, call_next, io)

    return handle
