"""What the answers of an endpoint say of the load it can take: a state machine told the time.

Pure: it reads no clock and takes no lock. Not here: who waits for whom (`models/adaptive.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import add
from typing import Literal

from dspylite.errors import (
    DeadlineExceededError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
)

Outcome = Literal["ok", "throttled", "unavailable", "neutral"]
"""What a request says of its endpoint: it served, it asked for less, it is down, or nothing."""

UNAVAILABLE = frozenset({502, 503, 504, 529})
"""What servers and the gateways before them say when they cannot serve now, but soon."""

# Without a source these are guesses, tried on the scenarios of `tests/benchmarks/overload.py`.
_START = 4.0  # places at first: what is tried too much is refused, and doubling is quick anyway
_SILENCE_S = 0.1  # refusals come within it, so that doubling need not wait for a slow model
_BETA = 0.7  # what is kept in a cut; RFC 9438 and botocore
_SCALE = 0.1  # of the cubic, in shares of its top: a doubling takes 3.6 s without bad news
_K = math.cbrt((1 - _BETA) / _SCALE)  # s from a cut until its top is reached again: 1.44
_FIRST_RATE = 20.0  # requests/s: least top of the first rate, when hardly anything was measured
_LEAST_RATE = 0.5  # requests/s; botocore's `_MIN_RATE`
_CATCH_UP_S = 0.002  # lateness that the next request makes good; a quarter of a slow spacing
_LOW = 0.9  # share of the top below which failures cannot come from the load that was cut
_CLEAN = 5  # answers without a failure before what was cut is raised again; after one, 10
_CLEAN_S = 1.5  # or so long without any, where answers take long
_FAILURES = 4  # that make a share worth a verdict
_SUSPICIOUS = 0.035  # share of failures in the long run that cuts keep below where they help
_CALM_S = 30.0  # without a cut, after which single failures are chance again
_RUN = 20  # failures in a row after which an endpoint counts as down
_IDLE_S = (
    2.0  # nobody called, as while a breaker is open; TCP restarts after idleness too, RFC 5681
)
_PROBE_S = (0.25, 1.6)  # first and longest time between probes; with jitter at most 2 s


def cubic(top: float, seconds: float, unit_s: float = 1.0) -> float:
    """Return how much is tried so long after a cut: back to `top` after 1.44 units, then beyond.

    `top * (1 + 0.1 * (seconds / unit_s - 1.44) ** 3)`, for a start at 0.7 of the top. Its flat
    middle makes it stay long where the limit was found. Unlike in the sources the scale is
    relative, because limits reach from a few requests a minute to hundreds a second.

    Args:
        top: What was just enough, in requests or requests a second.
        seconds: Time since the cut.
        unit_s: How fast it climbs, in seconds.

    Example:
        >>> [round(cubic(100, seconds)) for seconds in (0, 1, 1.44, 2, 4)]
        [70, 99, 100, 102, 267]

    Source:
        RFC 9438 (CUBIC), section 4.2: https://www.rfc-editor.org/rfc/rfc9438#section-4.2
        botocore, `botocore/retries/throttling.py` (adaptive mode): https://github.com/boto/botocore
    """
    units: float = seconds / unit_s - _K
    return top * (1 + _SCALE * units * units * units)


def seconds_until(top: float, value: float) -> float:
    """Return when `cubic(top, seconds)` reaches a value: its inverse, for a value of top or more.

    Example:
        >>> round(seconds_until(100, 267), 2)
        4.0
    """
    return _K + math.cbrt(max(0.0, value / top - 1) / _SCALE)


def outcome_of(error: BaseException) -> tuple[Outcome, float | None]:
    """Return what a failure says of the endpoint, and the seconds it asked to be left alone.

    Example:
        >>> outcome_of(LMRateLimitError(retry_after=7)), outcome_of(LMServerError(status=500))
        (('throttled', 7), ('neutral', None))
    """
    match error:
        case LMRateLimitError():
            return "throttled", error.retry_after
        case DeadlineExceededError():
            return "neutral", None  # ours, not the endpoint's
        case LMServerError() if error.status in UNAVAILABLE:
            return "unavailable", error.retry_after
        case LMTransportError() | LMTimeoutError():
            return "unavailable", error.retry_after
        case _:
            return "neutral", None


class Admission:
    """A ticket of `AdaptiveGate`; its holder sets `outcome` and `retry_after_s` before it leaves.

    Args:
        is_patient: Whether the holder waits while the endpoint is down; one that has a fallback
            does not.

    Attributes:
        refused: The holder must not call at all.
    """

    __slots__ = (
        "gone", "granted", "granted_at", "is_patient", "is_probe", "look_again_at", "outcome",
        "refused", "retry_after_s", "wake",
    )  # fmt: skip

    def __init__(self, *, is_patient: bool = True) -> None:
        self.is_patient = is_patient
        self.granted = self.gone = self.is_probe = self.refused = False
        self.granted_at = 0.0
        self.look_again_at: float | None = None
        self.wake: Callable[[], None] | None = None
        self.outcome: Outcome = "neutral"
        self.retry_after_s: float | None = None


class Control:
    """The rules of the gate as a state machine: it is told the time, and takes no lock.

    *Limit*: callers inside. It doubles with each round trip, or each 0.1 s without a refusal, until
    the first overload: 3 failures and more than a fifth. *Rate*: requests a second, from the first
    overload by 429 on. Overload cuts what was at its bound to 0.7; requests sent before a cut count
    no more. After some clean answers both follow `cubic` up to and past what was served last.

    *Chance*: failures may have nothing to do with the load (one bad machine behind a gateway, a
    quota that others use up). Then cuts do not help, and would go on for ever; see `_judge`.

    Args:
        rand: Gives a number in [0, 1).
        max_pause_s: Longest `Retry-After` that is kept to, in seconds.
    """

    def __init__(self, *, rand: Callable[[], float], max_pause_s: float) -> None:
        self._rand, self._max_pause_s = rand, max_pause_s
        self.inside = 0
        self.limit = self.limit_top = _START
        self.rate: float | None = None  # requests/s; None until a 429
        self.rate_top = 0.0
        self.plain = True  # neither paused, nor limited by rate, nor down: the limit decides alone
        self.has_answered = False  # anything at all
        self.usual_s: float | None = None  # what an answer takes
        self.down_since: float | None = None  # when the run of failures began that made it down
        self._slow_start = True
        self._admitted_at = self._next_at = self._paused_until = -math.inf
        self._cut_at = self._failed_at = self._climb_from = -math.inf
        self._sent = self._failures = self._clean = 0  # to requests sent after the last cut
        self._low = self._held = False  # below the last top; kept there until a verdict
        self._share = self._suspected = 0.0  # of failures, over 64 answers; then, at the last cut
        self._trial = 0.0  # share of failures before the second cut of a trial; 0 outside of one
        self._background = 0.0  # share of failures that a lower load did not cure
        self._run, self._run_began = 0, 0.0
        self._probe_out, self._probe_at, self._probe_s = False, 0.0, _PROBE_S[0]
        self._bucket, self._buckets = 0, [0] * 6  # successes in this half second, and before

    # -- letting in ------------------------------------------------------------------------------

    def opens_at(self, now: float) -> float:
        """Return when the next caller may pass, if nobody leaves before; infinity for never."""
        if self.down_since is not None:
            return math.inf if self._probe_out else max(self._probe_at, self._paused_until)
        opens_at = max(self._paused_until, self._next_at if self.rate is not None else -math.inf)
        if self.inside < int(self.limit + 0.5):
            return opens_at
        # All places are taken; the time since the last caller without a refusal stands for answers.
        grows_at = self._admitted_at + _SILENCE_S
        if self._held:
            if self._trial or self._share > _SUSPICIOUS:
                return math.inf
            held_until = self._failed_at + _CLEAN_S * self._slowness()
            if now < held_until:
                return max(opens_at, held_until)
            self._held, self._trial, self._climb_from = False, 0.0, now
        if not self._slow_start:
            grows_at = max(
                grows_at,
                self._climb_from + seconds_until(self.limit_top, int(self.limit + 0.5) + 0.5),
            )
        if now < grows_at:
            return max(opens_at, grows_at)
        self.limit = self.limit * 2 if self._slow_start else int(self.limit + 0.5) + 0.5
        return opens_at

    def admit(self, ticket: Admission, now: float) -> None:
        """Count a caller in."""
        is_idle = not self.inside and self.limit < _START and self.down_since is None
        if is_idle and now - self._admitted_at > _IDLE_S:
            self._recover(now)  # what was learnt so long ago says nothing about now
        self.inside += 1
        self._sent += 1
        ticket.granted = True
        ticket.granted_at = self._admitted_at = now
        if self.plain:
            return
        if self.down_since is not None:
            ticket.is_probe = self._probe_out = True
        elif self.rate is not None:
            earliest = now - max(_CATCH_UP_S, 0.25 / self.rate)
            self._next_at = max(self._next_at, earliest) + 1 / self.rate
        self._set_plain(now)

    def _set_plain(self, now: float) -> None:
        self.plain = self.down_since is None and self.rate is None and self._paused_until <= now

    # -- learning --------------------------------------------------------------------------------

    def settle(self, ticket: Admission, now: float) -> None:
        """Count a caller out, and learn from its outcome."""
        inside = self.inside
        self.inside = max(0, inside - 1)  # a fork may have come in between
        if ticket.is_probe:
            self._probe_out = False
        if ticket.outcome == "ok":
            self._settle_ok(ticket, now, inside)
        elif ticket.outcome != "neutral":
            self._settle_bad(ticket, now, inside)

    def _settle_ok(self, ticket: Admission, now: float, inside: int) -> None:
        self._run, self.has_answered = 0, True
        took_s = now - ticket.granted_at
        self.usual_s = (
            took_s if self.usual_s is None else self.usual_s + (took_s - self.usual_s) / 8
        )
        bucket = int(now * 2)
        if bucket != self._bucket:
            self._roll(bucket)
        self._buckets[0] += 1
        if self.down_since is not None:
            self._recover(now)
        if ticket.granted_at >= self._cut_at:
            self._clean += 1
            self._share -= self._share / 64
            self._judge(now)
        if self._held:
            return
        seconds = now - self._climb_from
        if inside >= int(self.limit + 0.5):  # a limit that is not used learns nothing
            target = math.inf if self._slow_start else cubic(self.limit_top, seconds)
            self.limit = max(self.limit, min(self.limit + 1, target))
        if self.rate is not None and seconds > 0:
            target = cubic(self.rate_top, seconds, self._slowness())
            self.rate = max(self.rate, min(target, 2 * self._accepted(now)))
        if self._low and not self._is_low():
            self._low = False
            if not self._failures:
                self._background /= 2
            self._sent = self._failures = 0

    def _settle_bad(self, ticket: Admission, now: float, inside: int) -> None:
        wait_s = ticket.retry_after_s
        if wait_s is not None and 0 < wait_s <= self._max_pause_s:
            self._paused_until = max(self._paused_until, now + wait_s)
            self.plain = False
        if ticket.outcome == "throttled":
            self._run = 0  # it is there
            if self.down_since is not None:
                self._recover(now)
        elif self._is_down(ticket, now):
            return
        if ticket.granted_at < self._cut_at:  # sent before the last cut: known, but says how far
            self.limit_top = max(1.0, min(self.limit_top, inside - 1.0))
            self.limit = min(self.limit, max(1.0, _BETA * self.limit_top))
            self._climb_from = max(self._climb_from, self._paused_until)
            return
        self._failures += 1
        self._failed_at, self._clean = now, 0
        self._share += (1 - self._share) / 64
        throttled = ticket.outcome == "throttled"
        if wait_s is not None:
            self._cut(now, inside, throttled=throttled)
        elif now - self._cut_at > _CALM_S * self._slowness():
            if self._failures >= 3 and self._failures > 0.2 * (self._sent - inside + 1):
                self._share = 0.0
                self._cut(now, inside, throttled=throttled)
        elif self._low:
            if self._failures >= _FAILURES and self._failures > 0.55 * self._sent:
                self._trial = self._share = self._background = 0.0  # it takes far less than before
                self._cut(now, inside, throttled=throttled)
        elif self._failures > (2 * self._background * self._sent + 6 if self._background else 0):
            self._cut(now, inside, throttled=throttled)
        self._judge(now)

    def _cut(self, now: float, inside: int, *, throttled: bool) -> None:
        if self.rate is None or inside >= int(self.limit + 0.5):
            self.limit_top = max(1.0, min(self.limit, inside - 1.0))
            self.limit = max(1.0, _BETA * self.limit_top)
        if throttled:
            accepted = self._accepted(now)
            if self.rate is None:
                self.rate = self.rate_top = max(accepted, _FIRST_RATE)
            else:
                self.rate_top = max(accepted, _BETA * self.rate, _LEAST_RATE)
            self.rate = max(_LEAST_RATE, _BETA * min(self.rate, self.rate_top))
            self._next_at = now + 1 / self.rate
        self._begin(now, low=True)

    def _begin(self, now: float, *, low: bool) -> None:
        """Begin to count anew."""
        self._cut_at = self._failed_at = now
        self._suspected = self._share
        self._climb_from = max(now, self._paused_until)
        self._low, self._held, self._slow_start = low, low, not low
        self._sent = self._failures = self._clean = 0
        self._set_plain(now)

    def _slowness(self) -> float:
        # Where requests are few all goes slower, so that probing costs no larger share of them.
        return 1.0 if self.rate is None else max(1.0, 5.0 / self.rate_top)

    def _is_low(self) -> bool:
        rate_is_low = self.rate is None or self.rate < _LOW * self.rate_top
        return rate_is_low and self.limit < _LOW * self.limit_top

    def _judge(self, now: float) -> None:
        """Decide after a cut whether to go up again, to cut once more, or to take the cuts back.

        A load of 0.7 of what was just served cannot be too much. If as large a share fails below
        it, and below 0.7 of that, the cause is another: the cuts are taken back, and from then on
        twice that share is borne.
        """
        if not self._held:
            if self._sent >= 100:  # the latest count most
                self._sent, self._failures = self._sent // 2, self._failures // 2
            return
        if self._failures < _FAILURES:
            if self._trial or self._share > _SUSPICIOUS:
                # If chance were the cause, so few failures in so many would be luck: e ** -3.
                share = self._trial or max(self._suspected, _SUSPICIOUS)
                clean, needed = self._sent, int((self._failures + 3) / share)
            else:
                clean, needed = self._clean, 2 * _CLEAN if self._failures else _CLEAN
            if clean >= needed:
                self._held, self._trial, self._climb_from = False, 0.0, now
                self._failures = self._sent = 0
            return
        share = self._failures / self._sent
        expected = max(0.0, 1 - (1 - self._trial) / _BETA)  # if the load were the cause
        if self._trial and (self._trial + expected) / 2 < share < 0.5:
            self._background, self._trial = share, 0.0
            self.rate, self.limit = None, self.limit_top
            self._begin(now, low=False)
        else:
            self._trial = share
            self.limit = max(1.0, _BETA * self.limit)
            if self.rate is not None:
                self.rate_top = self.rate
                self.rate = max(_LEAST_RATE, _BETA * self.rate)
            self._begin(now, low=True)

    # -- outages ---------------------------------------------------------------------------------

    def _is_down(self, ticket: Admission, now: float) -> bool:
        if not self._run:
            self._run_began = now
        self._run += 1
        if self._run < _RUN:
            return False
        if self.down_since is None:
            self.down_since, self._probe_s = self._run_began, _PROBE_S[0]
            self.plain = False
        elif not ticket.is_probe:
            return True
        self._probe_at = now + self._probe_s * (0.75 + 0.5 * self._rand())
        self._probe_s = min(_PROBE_S[1], 2 * self._probe_s)
        return True

    def _recover(self, now: float) -> None:
        """Start as with an endpoint that is not known; what is known of its rate stays."""
        self.down_since = None
        self.limit = self.limit_top = _START
        self._begin(now, low=False)

    # -- the rate that is served -----------------------------------------------------------------

    def _roll(self, bucket: int) -> None:
        passed = max(0, min(6, bucket - self._bucket))
        self._buckets = [0] * passed + self._buckets[: 6 - passed]
        self._bucket = bucket

    def _accepted(self, now: float) -> float:
        """Return the most successes in a second of the last three."""
        if (bucket := int(now * 2)) != self._bucket:
            self._roll(bucket)
        most: int = max(map(add, self._buckets, self._buckets[1:]))
        return most
