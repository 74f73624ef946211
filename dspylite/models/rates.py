"""What one endpoint is asked at most in a minute: requests and tokens.

Not here: how many at once (`models/limits.py`), and a limit that finds itself from the endpoint's
answers (`models/adaptive.py`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final

from dspylite.abc import Io, Next
from dspylite.errors import (
    DeadlineExceededError,
    LMConfigurationError,
)
from dspylite.models.limits import NOT_SENT, check_count, is_whole, was_sent
from dspylite.models.streams import WatchedStream
from dspylite.runtime.clock import deadline_error
from dspylite.runtime.forks import watch_forks
from dspylite.runtime.gates import wake
from dspylite.schema.messages import DeltaSource, LMRequest, LMResponse

WINDOW_S = 60.0
"""What "a minute" in `rpm` and `tpm` is: any 60 seconds, not those of the clock on the wall."""

_CHARS_PER_TOKEN = 4
"""Source: https://help.openai.com/en/articles/4936856-what-are-tokens-and-how-to-count-them"""

_TOKENS_PER_IMAGE = 765
"""Counted for each part of a message that is no text.

Source: an image of 1024 x 1024 in high detail, https://platform.openai.com/docs/guides/images
"""

_GUESSED_ANSWER_TOKENS = 256
"""What an answer is taken to need where the request sets it no limit; guessed."""

_ANSWER_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def estimate_tokens(request: LMRequest) -> int:
    """Guess what a request will cost, before it is sent: its prompt and its longest answer.

    Args:
        request: Of its messages 4 characters count as a token, and what is no text as 765.
            `max_completion_tokens`, `max_tokens` or `max_output_tokens` count for each of the
            `n` answers; without any of them an answer is taken to have 256 tokens.

    Example:
        >>> prompt = [{"role": "user", "content": "x" * 400}]
        >>> estimate_tokens(LMRequest(model="m", messages=prompt, params={"max_tokens": 50}))
        150
        >>> estimate_tokens(LMRequest(model="m", messages=prompt))
        356
        >>> estimate_tokens(LMRequest(model="m", messages=prompt, is_written=False))
        100
    """
    chars = others = 0
    for message in request.messages:
        content = message.get("content")
        if isinstance(content, str):
            chars += len(content)
        elif content:
            for part in content:
                text = part.get("text")
                if isinstance(text, str):
                    chars += len(text)
                else:
                    others += 1
    read = -(-chars // _CHARS_PER_TOKEN) + others * _TOKENS_PER_IMAGE
    if not request.is_written:
        return read
    params = request.params
    limits = (params.get(name) for name in _ANSWER_LIMITS)
    answer = next((n for n in limits if is_whole(n) and n > 0), _GUESSED_ANSWER_TOKENS)
    n = params.get("n")
    answers = n if is_whole(n) and n > 0 else 1
    return read + answers * answer


class Turn:
    """A call's ticket in the line before an endpoint, and then its entry in the window.

    Attributes:
        tokens: What it counts for; never more than the whole window.
        expires: Clock time at which it stops counting; set when it is granted.
        sent: Set by the holder when its request goes out; before that, leaving gives it back.
        window: Where it counts; None before and after.
    """

    __slots__ = (
        "expires",
        "gone",
        "granted",
        "look_again_at",
        "number",
        "sent",
        "tokens",
        "wake",
        "window",
    )

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.granted = self.gone = self.sent = False
        self.look_again_at: float | None = None
        self.wake: Callable[[], None] | None = None
        self.window: Window | None = None
        self.expires = 0.0
        self.number = 0


class Window:
    """The requests of the last 60 seconds and their tokens; the pure part of `RateLimit`.

    Knows the time only from its arguments, and no threads: `Line` holds a lock around it. Each
    method takes constant time, summed over many calls; taking one back, logarithmic time.

    Args:
        rpm: Most requests in any 60 s; None for no limit.
        tpm: Most tokens in any 60 s; None for no limit.

    Example:
        >>> window = Window(rpm=2, tpm=None)
        >>> for now in (0, 10):
        ...     window.add(Turn(0), now)
        >>> window.fits(0, now=59.9), window.fits(0, now=60)
        (False, True)
    """

    __slots__ = ("_entries", "_number", "rpm", "tokens", "tpm")

    def __init__(self, rpm: int | None, tpm: int | None) -> None:
        self.rpm = rpm
        self.tpm = tpm
        self.tokens = 0
        self._entries: deque[Turn] = deque()  # in the order of their `number` and `expires`
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def next_expiry(self) -> float | None:
        """When the oldest entry stops counting; None while there is none."""
        return self._entries[0].expires if self._entries else None

    def fits(self, tokens: int, now: float) -> bool:
        """Tell whether a request of so many tokens may go now; an empty window takes any."""
        entries = self._entries
        while entries and entries[0].expires <= now:
            expired = entries.popleft()
            expired.window = None
            self.tokens -= expired.tokens
        if self.rpm is not None and len(entries) >= self.rpm:
            return False
        return self.tpm is None or self.tokens + tokens <= self.tpm

    def add(self, turn: Turn, now: float) -> None:
        """Let a request go now."""
        entries = self._entries
        # Two threads may read the clock in one order and come here in the other.
        turn.expires = max(now + WINDOW_S, entries[-1].expires if entries else 0.0)
        self._number += 1
        turn.number = self._number
        turn.window = self
        entries.append(turn)
        self.tokens += turn.tokens

    def discard(self, turn: Turn) -> None:
        """Count a request no more, because it was never sent; nothing happens if it expired."""
        if turn.window is self:
            turn.window = None
            del self._entries[bisect_left(self._entries, turn.number, key=_number_of)]
            self.tokens -= turn.tokens

    def correct(self, turn: Turn, tokens: int) -> None:
        """Count a request for what it really cost; nothing happens if it expired."""
        if turn.window is self:
            self.tokens += tokens - turn.tokens
            turn.tokens = tokens

    def earliest(self, tokens: int, now: float, *, turns: int, queued: int) -> float:
        """Return a time before which a request cannot go, because of those before it.

        It is exact where only `rpm` is limited and nobody gives up. With `tpm` the real time may be
        up to 60 s later; estimates that prove too high make it earlier.

        Args:
            tokens: What the request counts for.
            now: Clock time.
            turns: How many stand in line before it.
            queued: The tokens of those together.
        """
        entries = self._entries
        if not entries:
            return now
        start = now
        if self.rpm is not None:
            # The n-th request from here on takes the place of the one `rpm` places before it, and
            # may go when that one expires; round after round.
            before = len(entries) + turns - self.rpm
            rounds, place = divmod(before, self.rpm) if before >= 0 else (0, 0)
            if before >= 0 and place < len(entries):
                start = max(start, entries[place].expires + rounds * WINDOW_S)
        if self.tpm is not None:
            # All of them together need so many windows, the first of which began with the oldest.
            rounds = -(-(self.tokens + queued + tokens) // self.tpm) - 1
            if rounds > 0:
                start = max(start, entries[0].expires + (rounds - 1) * WINDOW_S)
        return start


def _number_of(turn: Turn) -> int:
    return turn.number


class Line:
    """The calls that wait for their turn, first come first served, from any thread and loop.

    Only the first in line keeps the time: it looks again whenever an entry of the window expires,
    so at most once for each. The others are told when they have become the first. That way a place
    given back, or tokens that were estimated too high, let the next go at once.

    Args:
        rpm: As of `Window`.
        tpm: As of `Window`.
    """

    def __init__(self, rpm: int | None, tpm: int | None) -> None:
        self._limits = rpm, tpm
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Forget who went and who waits: a child has a window of its own."""
        self._lock = threading.Lock()  # guards all below; `wake` is called outside it
        self._window = Window(*self._limits)
        self._waiting: OrderedDict[Turn, None] = OrderedDict()  # any of them leaves in O(1)
        self._queued_tokens = 0

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._waiting)

    @property
    def remembered(self) -> int:
        """How many requests are remembered."""
        return len(self._window)

    def ask(self, tokens: int, now: float, latest: float | None) -> Turn:
        """Queue up; the turn is granted at once where that is possible.

        Args:
            tokens: What the request is expected to cost; more than `tpm` counts as `tpm`, so that
                it needs an empty window and fills it.
            now: Clock time.
            latest: Clock time after which going would be of no use; None for no such time.

        Raises:
            DeadlineExceededError: It cannot go in time. Nothing was reserved.
        """
        turn = Turn(self._within(tokens))
        with self._lock:
            window = self._window
            if not self._waiting and window.fits(turn.tokens, now):
                window.add(turn, now)
                turn.granted = True
                return turn
            woken = self._let_go(now)  # the time that has passed may have shortened the line
            turns, queued = len(self._waiting), self._queued_tokens
            too_late = latest is not None and latest < window.earliest(
                turn.tokens, now, turns=turns, queued=queued
            )
            if not too_late:
                self._waiting[turn] = None
                self._queued_tokens = queued + turn.tokens
                woken += self._let_go(now)
        self._tell(woken, now)
        if too_late:
            raise deadline_error("waiting for its turn under `rpm` or `tpm`")
        return turn

    def look(self, now: float) -> None:
        """Let go whom the time that has passed lets go."""
        with self._lock:
            woken = self._let_go(now)
        self._tell(woken, now)

    def leave(self, turn: Turn, now: float) -> None:
        """Give back the turn of a request that was not sent; nothing happens for another one."""
        self._tell(self._give_back(turn, now), now)

    def _give_back(self, turn: Turn, now: float) -> list[Turn]:
        if turn.sent:
            return []
        with self._lock:
            if turn.gone:
                return []
            turn.gone = True
            if turn.granted:
                self._window.discard(turn)
            elif turn in self._waiting:
                del self._waiting[turn]
                self._queued_tokens -= turn.tokens
            return self._let_go(now)

    def correct(self, turn: Turn, tokens: int, now: float) -> None:
        """Count a request that was sent for what it really cost."""
        with self._lock:
            self._window.correct(turn, self._within(tokens))
            woken = self._let_go(now)
        self._tell(woken, now)

    def _within(self, tokens: int) -> int:
        tpm = self._limits[1]
        return tokens if tpm is None else min(tokens, tpm)

    def _let_go(self, now: float) -> list[Turn]:
        """Grant turns in order as far as they fit; return whom to tell. The lock is held."""
        woken: list[Turn] = []
        while self._waiting:
            first = next(iter(self._waiting))
            if not self._window.fits(first.tokens, now):
                again = self._window.next_expiry
                if first.look_again_at != again:
                    first.look_again_at = again
                    woken.append(first)
                break
            del self._waiting[first]
            self._queued_tokens -= first.tokens
            self._window.add(first, now)
            first.granted = True
            woken.append(first)
        return woken

    def _tell(self, woken: list[Turn], now: float) -> None:
        while woken:
            turn = woken.pop(0)
            if not wake(turn):
                woken += self._give_back(turn, now)  # it cannot come: the next one may


class _Asking:
    """The line as the gate of one call, which knows what the call costs."""

    __slots__ = ("_left", "_line", "_tokens")

    def __init__(self, line: Line, tokens: int, left: float | None) -> None:
        self._line = line
        self._tokens = tokens
        self._left = left

    def ask(self, now: float) -> Turn:
        return self._line.ask(self._tokens, now, None if self._left is None else now + self._left)

    def look(self, now: float) -> None:
        self._line.look(now)

    def leave(self, ticket: Turn, now: float) -> None:
        self._line.leave(ticket, now)


class RateLimit:
    """Sends no more than so many requests, and so many tokens, in any 60 seconds.

    Calls that would exceed it wait, first come first served, in whatever thread or event loop they
    run; a whole window may go at once if nothing went before. One that could not go before its
    deadline fails at once. What a request costs is estimated before it is sent (`estimate_tokens`)
    and corrected by the provider's count afterwards; a failed one counts for its estimate, since
    providers count it too. A request larger than `tpm` goes when nothing else counts.

    One object may be shared by any number of LMs, threads and loops. It holds for its process: a
    copy, an unpickled or a forked one starts with an empty window.

    Args:
        rpm: Most requests in any 60 s. None for no limit.
        tpm: Most tokens, read and written, in any 60 s. None for no limit.

    Raises:
        LMConfigurationError: Neither is given, or one is no whole number of at least 1.

    Example:
        >>> RateLimit(rpm=500, tpm=200_000)
        RateLimit(rpm=500, tpm=200000)

    Source:
        Failed requests count: https://platform.openai.com/docs/guides/rate-limits
    """

    place: ClassVar[str] = "rate"

    def __init__(self, *, rpm: int | None = None, tpm: int | None = None) -> None:
        if rpm is None and tpm is None:
            raise LMConfigurationError(
                "A `RateLimit` needs `rpm=` (requests a minute), `tpm=` (tokens a minute) or both; "
                "leave it out for no limit."
            )
        for name, value in (("rpm", rpm), ("tpm", tpm)):
            if value is not None:
                check_count(name, value, least=1, otherwise="None sets no limit")
        self.rpm: Final = rpm
        self.tpm: Final = tpm
        self._line = Line(rpm, tpm)

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return self._line.waiting

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Send the request when it is its turn.

        Raises:
            DeadlineExceededError: Its turn would come too late; nothing was sent or reserved.
        """
        line, counts = self._line, self.tpm is not None
        tokens = estimate_tokens(request) if counts else 0
        try:
            async with io.enter(_Asking(line, tokens, io.time_left())) as turn:
                turn.sent = True
        except DeadlineExceededError as error:
            error.add_note(NOT_SENT)
            raise
        try:
            response = await call_next(request)
        except BaseException as error:  # cancelled in a line behind this one, too
            if not was_sent(error):
                turn.sent = False
                line.leave(turn, io.now())
            raise
        if counts:
            if response.stream is not None:
                stream = _CountedStream(response.stream, line, turn, io)
                return replace(response, stream=stream)
            if used := response.usage.total_tokens:
                line.correct(turn, used, io.now())
        return response

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the limits, not the window."""
        return partial(type(self), rpm=self.rpm, tpm=self.tpm), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rpm={self.rpm}, tpm={self.tpm})"


class _CountedStream(WatchedStream):
    """A stream whose tokens are counted at its proper end; broken, it counts as estimated."""

    def __init__(self, source: DeltaSource, line: Line, turn: Turn, io: Io) -> None:
        super().__init__(source)
        self._line = line
        self._turn = turn
        self._io = io

    def ended(self) -> None:
        if used := self._source.response.usage.total_tokens:
            self._line.correct(self._turn, used, self._io.now())
