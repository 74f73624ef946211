"""When an endpoint that keeps failing is left alone, and how it is tried again.

Not here: what is done instead (a fallback), and when one call is sent again (`Retry`).
"""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final, Literal

from dspylite.abc import Io, Next
from dspylite.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    LMConfigurationError,
    LMError,
    clip,
)
from dspylite.models.limits import check_count, was_sent
from dspylite.models.streams import WatchedStream
from dspylite.runtime.clock import CLOCK
from dspylite.runtime.forks import watch_forks
from dspylite.schema.messages import DeltaSource, LMRequest, LMResponse
from dspylite.schema.secrets import REDACTED

State = Literal["closed", "open", "half_open"]
Outcome = Literal["success", "failure", "unknown"]

BUCKETS = 10
"""Into how many pieces the window is cut: it is exact to a tenth, and takes 10 small entries."""

LOST_PROBE_S = 600.0
"""After so long a probe whose end nobody reported is taken for lost; guessed, far above the 300 s
that a call may take by default."""

_SHOWN_CHARS = 200  # of an error's text: enough to know it again; guessed
_LIKELY_SECRET = re.compile(
    r"\b(?:sk|pk|rk|key)[-_][\w-]{6,}|(?<=Bearer )\S+|(?<=://)[^/@\s]+(?=@)", re.IGNORECASE
)


def outcome_of(error: BaseException) -> Outcome:
    """Tell what a failed call says about its endpoint.

    A failure is what the endpoint may be blamed for and what may pass: a 5xx, a 429, a timeout, a
    broken connection, and a deadline that passed after the request was sent, for that is how an
    endpoint that hangs looks. Nothing is said by a request that was refused (400, 401 and so on),
    by what ended here (a full queue, a deadline while in line, a spent budget), by a cancelled
    call, or by an exception that is not an `LMError`.

    Example:
        >>> from dspylite.errors import LMAuthError, LMServerError
        >>> outcome_of(LMServerError("503")), outcome_of(LMAuthError("401"))
        ('failure', 'unknown')
    """
    if not isinstance(error, LMError) or not was_sent(error):
        return "unknown"
    blamed = error.retryable or isinstance(error, DeadlineExceededError)
    return "failure" if blamed else "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How an endpoint has done lately.

    Attributes:
        state: `"closed"`: calls go through. `"open"`: they fail at once. `"half_open"`: one call,
            the probe, is under way to see whether the endpoint is back, and all others fail.
        successes: Calls answered in the window.
        failures: Calls in the window that failed in a way the endpoint may be blamed for.
        last_error: Text of the last such failure, shortened and without what looks like a key;
            None if there was none.
        last_error_class: Its class, such as `"LMServerError"`.
        last_error_code: Its code, such as `"server"`.
        times_opened: How often calls began to be refused.
        next_probe_s: Seconds until the next call is let through; 0.0 if it would be now, None
            unless `state` is `"open"`.
    """

    state: State = "closed"
    successes: int = 0
    failures: int = 0
    last_error: str | None = None
    last_error_class: str | None = None
    last_error_code: str | None = None
    times_opened: int = 0
    next_probe_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is remembered of a failed call; never the exception, which holds frames and requests.

    Attributes:
        text: Shortened, without what looks like a key.
        error_class: Name of the class.
        code: The error's code.
        retry_after: Seconds that the provider asked to wait.
    """

    text: str
    error_class: str
    code: str
    retry_after: float | None

    @classmethod
    def of(cls, error: LMError) -> Failure:
        """Take down an error.

        Example:
            >>> from dspylite.errors import LMServerError
            >>> Failure.of(LMServerError("no upstream for sk-1234567890")).text
            'no upstream for [redacted]'
        """
        # Clipped first as well, so that a long page is not searched; the rest of a key that the
        # cut went through would not look like one, so there is room beyond what is shown.
        text = _LIKELY_SECRET.sub(REDACTED, error.message[: 2 * _SHOWN_CHARS])
        return cls(
            text=clip(" ".join(text.split()), _SHOWN_CHARS),
            error_class=type(error).__name__,
            code=error.code,
            retry_after=error.retry_after,
        )


class Counts:
    """Successes and failures of a sliding window, in 10 buckets; knows the time from its arguments.

    Args:
        window_s: Length of the window in seconds; what is older than 0.9 of it may be forgotten.

    Example:
        >>> counts = Counts(10.0)
        >>> counts.add(now=0.0, failed=True)
        >>> counts.add(now=5.0, failed=False)
        >>> counts.totals(9.9), counts.totals(10.0), counts.totals(15.0)
        ((1, 1), (1, 0), (0, 0))
    """

    __slots__ = ("_buckets", "_failures", "_successes", "_width")

    def __init__(self, window_s: float) -> None:
        self._width = window_s / BUCKETS
        self._buckets: deque[list[int]] = deque()  # [number, successes, failures]
        self._successes = self._failures = 0

    def add(self, *, now: float, failed: bool) -> None:
        """Count one call."""
        self._forget(now)
        number = int(now // self._width)
        buckets = self._buckets
        # Two threads may read the clock in one order and come here in the other.
        if not buckets or buckets[-1][0] < number:
            buckets.append([number, 0, 0])
        buckets[-1][2 if failed else 1] += 1
        if failed:
            self._failures += 1
        else:
            self._successes += 1

    def totals(self, now: float) -> tuple[int, int]:
        """Return successes and failures in the window that ends now."""
        self._forget(now)
        return self._successes, self._failures

    def _forget(self, now: float) -> None:
        oldest = int(now // self._width) - BUCKETS + 1
        buckets = self._buckets
        while buckets and buckets[0][0] < oldest:
            _, successes, failures = buckets.popleft()
            self._successes -= successes
            self._failures -= failures


class Attempt:
    """One call that a circuit let through; it reports its outcome once.

    Attributes:
        is_probe: Whether the outcome decides if the circuit closes.
        era: Which stay in a state it belongs to; its outcome says nothing about a later one.
        is_over: Whether it has reported.
    """

    __slots__ = ("era", "is_over", "is_probe")

    def __init__(self, *, era: int, is_probe: bool) -> None:
        self.era = era
        self.is_probe = is_probe
        self.is_over = False


FAILURES_IN_A_ROW = 10
"""So many failures with no success among them open a circuit; by chance that is one in a thousand
where half of the calls fail."""
MAX_COOL_DOWN_S = 5.0
"""Longest time between probes by default: a few in a minute cost nobody much, and a long outage
ends quickly. Guessed."""


class Circuit:
    """The state of a breaker, for any number of threads; it knows the time from its arguments.

    Args:
        failure_ratio: As of `CircuitBreaker`.
        window_s: As of `CircuitBreaker`.
        min_calls: As of `CircuitBreaker`.
        cool_down_s: As of `CircuitBreaker`.
        max_cool_down_s: As of `CircuitBreaker`.
    """

    def __init__(
        self,
        *,
        failure_ratio: float,
        window_s: float,
        min_calls: int,
        cool_down_s: float,
        max_cool_down_s: float,
    ) -> None:
        self._failure_ratio = failure_ratio
        self._window_s = window_s
        self._min_calls = min_calls
        self._first_cool_down_s = cool_down_s
        self._max_cool_down_s = max_cool_down_s
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Start closed: a child finds out by itself."""
        self._lock = threading.Lock()  # guards all below; nothing is called while it is held
        self._state: State = "closed"
        self._era = 0
        self._counts = Counts(self._window_s)
        self._cool_down_s = self._first_cool_down_s
        self._until = 0.0  # when the next probe may go, or when the one under way is lost
        self._last: Failure | None = None
        self._times_opened = 0
        self._in_a_row = 0

    def begin(self, now: float) -> Attempt | float:
        """Let a call through, as the probe if it is time for one; else return seconds to wait."""
        with self._lock:
            if self._state == "closed":
                return Attempt(era=self._era, is_probe=False)
            if now < self._until:
                # Nobody knows how long a probe takes; if it fails, it will be so long.
                return self._until - now if self._state == "open" else self._cool_down_s
            self._state = "half_open"
            self._era += 1
            self._until = now + LOST_PROBE_S
            return Attempt(era=self._era, is_probe=True)

    def end(
        self, attempt: Attempt, outcome: Outcome, now: float, failure: Failure | None = None
    ) -> None:
        """Count how an attempt ended; a repeat, or a report from an earlier era, is idle."""
        with self._lock:
            if attempt.is_over:
                return
            attempt.is_over = True
            if attempt.era != self._era:
                return
            if outcome == "unknown":
                if attempt.is_probe:  # it is given back: the next call is the probe
                    self._era += 1
                    self._state, self._until = "open", now
                return
            if failure is not None:
                self._last = failure
            if attempt.is_probe:
                self._judge(outcome, now)
            self._counts.add(now=now, failed=outcome == "failure")
            self._in_a_row = self._in_a_row + 1 if outcome == "failure" else 0
            if outcome == "failure" and self._state == "closed":
                successes, failures = self._counts.totals(now)
                total = successes + failures
                is_ratio = total >= self._min_calls and failures >= self._failure_ratio * total
                # A busy endpoint has so many successes in the window that the ratio comes late.
                if is_ratio or self._in_a_row >= max(FAILURES_IN_A_ROW, self._min_calls):
                    self._times_opened += 1
                    self._open(now)

    def prove(self, attempt: Attempt, now: float) -> None:
        """Close the circuit because a probe's answer began; the attempt goes on as another one."""
        with self._lock:
            if attempt.is_probe and not attempt.is_over and attempt.era == self._era:
                self._judge("success", now)
                attempt.is_probe, attempt.era = False, self._era

    def health(self, now: float) -> Health:
        """Return how the endpoint does."""
        with self._lock:
            successes, failures = self._counts.totals(now)
            last = self._last
            return Health(
                state=self._state,
                successes=successes,
                failures=failures,
                last_error=None if last is None else last.text,
                last_error_class=None if last is None else last.error_class,
                last_error_code=None if last is None else last.code,
                times_opened=self._times_opened,
                next_probe_s=max(0.0, self._until - now) if self._state == "open" else None,
            )

    def _judge(self, outcome: Outcome, now: float) -> None:
        """Decide by a probe. The lock is held."""
        if outcome == "success":
            self._era += 1
            self._state = "closed"
            self._cool_down_s = self._first_cool_down_s
            self._counts = Counts(self._window_s)
            self._in_a_row = 0
        else:
            self._cool_down_s = min(self._max_cool_down_s, 2 * self._cool_down_s)
            self._open(now)

    def _open(self, now: float) -> None:
        """Refuse calls until the cool-down is over. The lock is held."""
        asked_s = (self._last.retry_after if self._last else None) or 0.0
        self._era += 1
        self._state = "open"
        self._until = now + max(self._cool_down_s, min(asked_s, self._max_cool_down_s))


class CircuitBreaker:
    """Leaves an endpoint alone for a while when too many of its calls fail.

    While the circuit is closed, calls go through and are counted. It opens when at least
    `min_calls` ended within `window_s` and `failure_ratio` of them failed, or when 10 failed in a
    row (or `min_calls`, if that is more); then each call fails at once with `CircuitOpenError`,
    which costs no time and lets a fallback answer. One call, the probe, goes through after
    `cool_down_s`. If it is answered, the circuit closes and the count starts afresh; if it fails,
    the endpoint is left alone for twice as long as before, at most `max_cool_down_s`, which is as
    long as before unless it is given; if it says nothing about the endpoint or is cancelled, the
    next call is the probe. A cool-down is never shorter than what the provider asked for by
    `Retry-After`, up to `max_cool_down_s`. What counts as a failure is said at `outcome_of`. Calls
    that began before the circuit changed its state say nothing about the new one.

    A streamed answer counts as a success when it ends, or is closed after its first piece, and as a
    failure when it breaks; as the probe it closes the circuit by its first piece.

    One object may be shared by any number of LMs, threads and loops. It holds for its process: a
    copy, an unpickled or a forked one starts closed.

    Args:
        failure_ratio: Share of failures at which it opens, above 0 and at most 1.
        window_s: How long a call is counted, in seconds, exact to a tenth.
        min_calls: Calls that must have been counted before it opens.
        cool_down_s: Seconds from opening to the first probe.
        max_cool_down_s: Longest time between probes, in seconds. None: 5, or `cool_down_s` where
            that is longer.

    Raises:
        LMConfigurationError: A parameter cannot work.

    Example:
        >>> breaker = CircuitBreaker(min_calls=10, cool_down_s=2.0)
        >>> breaker.health().state
        'closed'

    Source:
        The pattern: https://martinfowler.com/bliki/CircuitBreaker.html. The defaults are guessed,
        between those of Resilience4j (50 %, 100 calls, 60 s) and Polly (10 %, 30 s, 5 s):
        https://resilience4j.readme.io/docs/circuitbreaker,
        https://www.pollydocs.org/strategies/circuit-breaker.html
    """

    place: ClassVar[str] = "breaker"

    def __init__(
        self,
        *,
        failure_ratio: float = 0.5,
        window_s: float = 30.0,
        min_calls: int = 5,
        cool_down_s: float = 5.0,
        max_cool_down_s: float | None = None,
    ) -> None:
        if not (_is_positive(failure_ratio) and failure_ratio <= 1):
            raise LMConfigurationError(
                f"`failure_ratio` must be a number above 0 and at most 1, not {failure_ratio!r}; "
                "0.5 opens when half of the calls fail."
            )
        check_count("min_calls", min_calls, least=1, otherwise="1 opens at the first failure")
        for name, seconds in (("window_s", window_s), ("cool_down_s", cool_down_s)):
            if not _is_positive(seconds):
                raise LMConfigurationError(
                    f"`{name}` must be a positive number of seconds, not {seconds!r}."
                )
        longest_s = (
            max(MAX_COOL_DOWN_S, cool_down_s) if max_cool_down_s is None else max_cool_down_s
        )
        if not (_is_positive(longest_s) and longest_s >= cool_down_s):
            raise LMConfigurationError(
                f"`max_cool_down_s` must be at least `cool_down_s={cool_down_s}` seconds, not "
                f"{max_cool_down_s!r}; make them equal for a cool-down that never grows."
            )
        self.failure_ratio: Final = failure_ratio
        self.window_s: Final = window_s
        self.min_calls: Final = min_calls
        self.cool_down_s: Final = cool_down_s
        self.max_cool_down_s: Final = longest_s
        self._circuit = Circuit(**self._parameters())

    def health(self) -> Health:
        """Return how the endpoint has done lately."""
        return self._circuit.health(CLOCK.get().now())

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Send the request, unless the endpoint is being left alone.

        Raises:
            CircuitOpenError: It is; nothing was sent. `retry_after_s` is the time until it is
                tried again.
        """
        circuit = self._circuit
        attempt = circuit.begin(io.now())
        if not isinstance(attempt, Attempt):
            raise self._refusal(request, attempt, io)
        try:
            response = await call_next(request)
        except BaseException as error:
            _end_with(error, circuit, attempt, io)
            raise
        if response.stream is not None:
            stream = _JudgedStream(response.stream, circuit, attempt, io)
            return replace(response, stream=stream)
        circuit.end(attempt, "success", io.now())
        return response

    def _refusal(self, request: LMRequest, wait_s: float, io: Io) -> CircuitOpenError:
        health = self._circuit.health(io.now())
        calls = health.successes + health.failures
        if health.state == "half_open":
            why = "one call is under way to see whether it is back"
        elif calls:
            why = f"{health.failures} of its last {calls} calls failed"
        else:
            why = "too many of its calls failed, and none was let through since"
        return CircuitOpenError(
            f"The endpoint of `{request.model}` is left alone for {wait_s:.1f} s, because {why}. "
            f"The last failure was `{health.last_error_class}` ({health.last_error or 'no text'}). "
            "Call again later, or give the LM `fallbacks=[...]` that answer meanwhile.",
            model=request.model,
            retry_after=wait_s,
        )

    def _parameters(self) -> dict[str, Any]:
        return {
            "failure_ratio": self.failure_ratio,
            "window_s": self.window_s,
            "min_calls": self.min_calls,
            "cool_down_s": self.cool_down_s,
            "max_cool_down_s": self.max_cool_down_s,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the parameters, not the state."""
        return partial(type(self), **self._parameters()), ()

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self._parameters().items())
        return f"{type(self).__name__}({inside})"


class _JudgedStream(WatchedStream):
    """A stream that reports to a circuit what becomes of it."""

    def __init__(self, source: DeltaSource, circuit: Circuit, attempt: Attempt, io: Io) -> None:
        super().__init__(source)
        self._circuit = circuit
        self._attempt = attempt
        self._io = io
        self._has_begun = False

    def moved(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._circuit.prove(self._attempt, self._io.now())

    def ended(self) -> None:
        self._circuit.end(self._attempt, "success", self._io.now())

    def broke(self, error: Exception) -> None:
        _end_with(error, self._circuit, self._attempt, self._io)

    def closed(self) -> None:
        outcome: Outcome = "success" if self._has_begun else "unknown"
        self._circuit.end(self._attempt, outcome, self._io.now())


def _end_with(error: BaseException, circuit: Circuit, attempt: Attempt, io: Io) -> None:
    outcome = outcome_of(error)
    failure = Failure.of(error) if outcome == "failure" and isinstance(error, LMError) else None
    circuit.end(attempt, outcome, io.now(), failure)


def _is_positive(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return 0 < number < math.inf  # in this form it refuses NaN too
