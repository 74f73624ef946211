"""`Retry`: sending a request again after a failure that may pass.

Not here: keeping calls back while an endpoint is overloaded (`models/adaptive.py`).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import ClassVar, TypeVar

from dspylite.abc import Io, Next
from dspylite.errors import LMConfigurationError, LMError, LMRateLimitError
from dspylite.models.middleware import Place, failed_attempt, successful_attempt
from dspylite.models.overload import UNAVAILABLE
from dspylite.runtime.forks import watch_forks
from dspylite.runtime.tracking import note_request
from dspylite.schema.messages import LMRequest, LMResponse

T = TypeVar("T")
X = TypeVar("X")


def uniform() -> float:
    """Draw from [0, 1); `random.random` itself would be pickled with its generator's state."""
    return random.random()


def is_overload(error: LMError) -> bool:
    """Tell whether an endpoint says that it cannot serve now, or has gone away for a while.

    Example:
        >>> from dspylite.errors import LMRateLimitError, LMServerError
        >>> is_overload(LMRateLimitError()), is_overload(LMServerError(status=503))
        (True, True)
        >>> is_overload(LMServerError(status=500))
        False
    """
    return isinstance(error, LMRateLimitError) or error.status in UNAVAILABLE or error.is_outage


class RetryBudget:
    """Bounds the retries of all calls to one endpoint, so that an outage is not made worse.

    A token bucket: each retry takes one token; each success gives a part of one back, and so does
    time. What is waited out (see `Retry`) takes none, because the waiting itself bounds it.

    Args:
        burst: Tokens at the start, and at most.
        per_success: Tokens given back by each success.
        per_s: Tokens given back each second.

    Source:
        Client-side throttling of retries: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
    """

    def __init__(self, *, burst: int = 100, per_success: float = 0.2, per_s: float = 1.0) -> None:
        self._burst = burst
        self._per_success = per_success
        self._per_s = per_s
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Start with a full bucket."""
        self._lock = threading.Lock()  # guards both below
        self._tokens = float(self._burst)
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Take a token for a retry; False if there is none."""
        with self._lock:
            if self._at is not None:
                gained = max(0.0, now - self._at) * self._per_s
                self._tokens = min(float(self._burst), self._tokens + gained)
            self._at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def give_back(self) -> None:
        """Note a success."""
        if self._tokens < self._burst:  # read without the lock: a full bucket is the usual case
            with self._lock:
                self._tokens = min(float(self._burst), self._tokens + self._per_success)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Sends a request again after a failure that may pass.

    Waits between attempts by exponential backoff with full jitter: uniformly between 0 and
    `min(max_wait_s, base_s * 2 ** (attempt - 1))`. A wait that the provider asks for is kept to
    instead; if it is longer than `max_wait_s`, or than the call's deadline allows, the error is
    raised at once and carries it as `retry_after_s`.

    An endpoint that says it is overloaded (429, 502, 503, 504, 529), or that answered before and
    has gone away, is waited for by time and not by count: up to `patience_s` from the first
    attempt. The gate before it (`Adaptive`) sees to it that few requests are spent on that.

    Attributes:
        max_retries: Further attempts after the first; 0 sends each request once.
        base_s: Longest wait before the first further attempt, in seconds.
        max_wait_s: Longest wait before any attempt, in seconds.
        patience_s: How long overload and outage are waited out, in seconds; 0 counts them like any
            other failure.
        rand: Gives a number in [0, 1).
        budget: Bounds the retries of all calls to an endpoint together. None: no bound.

    Raises:
        LMConfigurationError: `max_retries` is negative, or a wait is not positive.

    Source:
        Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    place: ClassVar[Place] = "retry"

    max_retries: int = 3
    base_s: float = 0.5
    max_wait_s: float = 30.0
    patience_s: float = 0.0
    rand: Callable[[], float] = uniform
    budget: RetryBudget | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        retries: object = self.max_retries
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise LMConfigurationError(
                f"`num_retries` must be 0 or more, not {self.max_retries!r}; 0 sends each request "
                "once."
            )
        waits: tuple[object, ...] = (self.base_s, self.max_wait_s, self.patience_s)
        are_numbers = all(
            isinstance(wait, int | float) and not isinstance(wait, bool) for wait in waits
        )
        # In this form it refuses NaN too.
        if not (are_numbers and self.base_s > 0 and self.max_wait_s > 0 and self.patience_s >= 0):
            raise LMConfigurationError(
                f"Waits must be positive seconds, not base_s={self.base_s!r}, "
                f"max_wait_s={self.max_wait_s!r}, patience_s={self.patience_s!r}."
            )

    def delay(self, attempt: int, error: LMError, *, waited_s: float = 0.0) -> float | None:
        """Return the seconds to wait after a failed attempt, or None to give up.

        Args:
            attempt: Which attempt failed, counting from 1 those that are counted.
            error: How it failed.
            waited_s: Seconds since the first attempt began.

        Example:
            >>> from dspylite.errors import LMAuthError, LMServerError
            >>> retry = Retry(rand=lambda: 1.0)
            >>> [retry.delay(attempt, LMServerError()) for attempt in (1, 2, 3, 4)]
            [0.5, 1.0, 2.0, None]
            >>> retry.delay(1, LMServerError(retry_after=7)), retry.delay(1, LMAuthError())
            (7, None)
            >>> patient = Retry(patience_s=60, rand=lambda: 1.0)
            >>> busy = LMServerError(status=503)
            >>> patient.delay(9, busy, waited_s=50), patient.delay(9, busy, waited_s=61)
            (0.5, None)
        """
        if not error.retryable:
            return None
        is_waited_out = self.waits_out(error)
        if waited_s > self.patience_s if is_waited_out else attempt > self.max_retries:
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.max_wait_s else None
        if is_waited_out:
            # The gate does the waiting; this only keeps callers from coming all at once.
            return min(self.base_s, self.max_wait_s) * self.rand()
        # The exponent is capped: 2 ** 1100 is no float any more.
        longest = min(self.max_wait_s, self.base_s * 2.0 ** min(attempt - 1, 64))
        return longest * self.rand()

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Call until it succeeds, fails for good, or the attempts are used up."""
        failed: list[tuple[LMError, float]] = []
        started = io.now()
        try:
            response = await self.run(call_next, request, io, model=request.model, failed=failed)
        except LMError as error:
            error.attempts = tuple(failed_attempt(request, *each) for each in failed)
            raise
        if not failed:
            return response
        made = [failed_attempt(request, *each) for each in failed]
        seconds = io.now() - started - sum(attempt.seconds for attempt in made)
        return replace(response, attempts=(*made, successful_attempt(request, response, seconds)))

    async def run(
        self,
        call: Callable[[X], Awaitable[T]],
        argument: X,
        io: Io,
        *,
        model: str,
        failed: list[tuple[LMError, float]] | None = None,
    ) -> T:
        """Await `call(argument)` until it succeeds, fails for good, or the attempts are used up.

        Args:
            call: Makes one attempt.
            argument: What it is given each time.
            io: The driver.
            model: Who is asked; further attempts are counted under its name.
            failed: Receives each failure and the seconds that its attempt took.
        """
        started = began = io.now()
        failures = 0  # those that are counted, not waited out
        for attempt in count(1):
            try:
                result = await call(argument)
            except LMError as error:
                if failed is not None:
                    failed.append((error, io.now() - began))
                failures += not self.waits_out(error)
                wait_s = self._wait(failures, error, started, io)
                if wait_s is None:
                    if attempt > 1:
                        error.add_note(f"Gave up after {attempt} attempts.")
                    raise
            else:
                if self.budget is not None:
                    self.budget.give_back()
                return result
            await io.sleep(wait_s)
            note_request(model, "retried")
            began = io.now()
        raise AssertionError("count() never ends")

    def waits_out(self, error: LMError) -> bool:
        """Tell whether a failure is waited out by time, instead of being counted."""
        return self.patience_s > 0 and is_overload(error)

    def _wait(self, failures: int, error: LMError, started: float, io: Io) -> float | None:
        now = io.now()
        wait_s = self.delay(failures, error, waited_s=now - started)
        if wait_s is None:
            return None
        left = io.time_left()
        if left is not None and wait_s >= left:
            error.add_note(f"No further attempt fits into the {max(left, 0):.3g} s left.")
            return None
        is_counted = not self.waits_out(error)
        if self.budget is not None and is_counted and not self.budget.take(now):
            error.add_note("No further attempt: too many calls to this endpoint fail just now.")
            return None
        return wait_s
