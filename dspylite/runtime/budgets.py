"""What the calls of a block may cost at most, in tokens and in money.

Not here: counting for its own sake (`runtime/tracking.py`), and what a call costs, which the LM
knows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from dspylite.errors import BudgetExceededError, LMConfigurationError, SettingsError
from dspylite.runtime.forks import watch_forks
from dspylite.runtime.settings import overlay_with, settings
from dspylite.schema.messages import Usage

NOT_ASKED: Final = object()
"""The price of a call whose caller does not look at prices; None means that it is unknown."""


class Budget:
    """Counts what calls cost, and refuses further ones when that is more than was allowed.

    Made by `budget(...)`. Safe to use from any number of threads, tasks and loops.

    Args:
        tokens: Most tokens, read and written; None for no limit.
        usd: Most US dollars; None for no limit.
        parent: The budget of the block around this one; it counts these calls and checks too.

    Raises:
        SettingsError: A limit is negative or no number.

    Example:
        >>> mine = Budget(tokens=100)
        >>> mine.add(Usage(total_tokens=120), usd=0.01)
        >>> mine.tokens_spent, mine.usd_spent, mine.calls
        (120, 0.01, 1)
        >>> mine.check()
        Traceback (most recent call last):
        ...
        dspylite.errors.BudgetExceededError: The budget of 100 tokens is spent: 1 call took 120. \
Raise `budget(tokens=...)`, or ask for less.
    """

    def __init__(
        self,
        *,
        tokens: int | None = None,
        usd: float | None = None,
        parent: Budget | None = None,
    ) -> None:
        _check_limit("tokens", tokens, int, "a whole number")
        _check_limit("usd", usd, (int, float), "a finite number")
        self.tokens: Final = tokens
        self.usd: Final = usd
        self._parent = parent
        self._tokens_spent = 0
        self._usd_spent: float | None = 0.0
        self._calls = 0
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Go on from what was spent before the fork; parent and child count on by themselves."""
        self._lock = threading.Lock()  # guards what was spent; nothing is called while it is held

    @property
    def limits_money(self) -> bool:
        """Whether this budget or one around it is in dollars, so that prices must be known."""
        return self.usd is not None or (self._parent is not None and self._parent.limits_money)

    @property
    def tokens_spent(self) -> int:
        """Tokens of the calls answered so far."""
        return self._tokens_spent

    @property
    def usd_spent(self) -> float | None:
        """Money for the calls answered so far; None as soon as one call's price was unknown."""
        return self._usd_spent

    @property
    def calls(self) -> int:
        """Calls answered so far."""
        return self._calls

    def check(self, price: object = NOT_ASKED) -> None:
        """Let a call be made, unless this budget or one around it is spent.

        Calls that are under way are not known yet, so many at once may overshoot the limit by what
        they cost together.

        Args:
            price: What is known of the call's price, in whatever form; only None matters, which
                means that nothing is known.

        Raises:
            BudgetExceededError: A limit is reached; the call must not be made.
            LMConfigurationError: Money is limited, and the price of this call or of an earlier one
                is unknown, so that the limit could not be kept.
        """
        self._check_own(price)
        if self._parent is not None:
            self._parent.check(price)

    def add(self, usage: Usage, usd: float | None) -> None:
        """Count one answered call, here and in the budgets around this one.

        Args:
            usage: Its tokens.
            usd: Its price in US dollars; None if it is unknown, which makes the sum unknown too.
        """
        with self._lock:
            self._calls += 1
            self._tokens_spent += usage.total_tokens
            if usd is None or not 0 <= usd < math.inf:  # in this form NaN is not known either
                self._usd_spent = None
            elif self._usd_spent is not None:
                self._usd_spent += usd
        if self._parent is not None:
            self._parent.add(usage, usd)

    def _check_own(self, price: object) -> None:
        with self._lock:
            tokens_spent, usd_spent, calls = self._tokens_spent, self._usd_spent, self._calls
        made = f"{calls} call took" if calls == 1 else f"{calls} calls took"
        if self.tokens is not None and tokens_spent >= self.tokens:
            raise BudgetExceededError(
                f"The budget of {self.tokens:,} tokens is spent: {made} {tokens_spent:,}. Raise "
                "`budget(tokens=...)`, or ask for less."
            )
        if self.usd is None:
            return
        if usd_spent is None or price is None:
            whose = "this call" if price is None else "an earlier call in the block"
            raise LMConfigurationError(
                f"The price of {whose} is unknown, so a budget of {self.usd:g} USD cannot be kept. "
                "Give the LM its price, or limit tokens: `budget(tokens=...)`."
            )
        if usd_spent >= self.usd:
            raise BudgetExceededError(
                f"The budget of {self.usd:g} USD is spent: {made} {usd_spent:.6g} USD. Raise "
                "`budget(usd=...)`, or ask for less."
            )

    def __repr__(self) -> str:
        return (
            f"Budget(tokens={self.tokens}, usd={self.usd}, tokens_spent={self._tokens_spent}, "
            f"usd_spent={self._usd_spent}, calls={self._calls})"
        )


def current_budget() -> Budget | None:
    """Return the budget of the innermost `budget(...)` around the caller; None without one."""
    found: Budget | None = settings.budget
    return found


@contextmanager
def budget(*, tokens: int | None = None, usd: float | None = None) -> Generator[Budget, None, None]:
    """Refuse calls made in the block, in any thread or task started from it, once it is spent.

    It is checked before each call: the first call past the limit raises `BudgetExceededError`.
    Calls already under way are finished and counted, so a block with many at once may overshoot
    by what these cost. Blocks may be nested: each counts and each checks.

    Args:
        tokens: Most tokens, read and written; 0 lets no call be made. None for no limit.
        usd: Most US dollars, likewise. Calls to an LM whose price is unknown are refused.

    Raises:
        SettingsError: A limit is negative or no number.

    Example:
        >>> with budget(tokens=50_000, usd=0.25) as spending:
        ...     pass  # call programs here
        >>> spending.tokens_spent, spending.usd_spent, spending.calls
        (0, 0.0, 0)
    """
    mine = Budget(tokens=tokens, usd=usd, parent=current_budget())
    with overlay_with(budget=mine):
        yield mine


def _check_limit(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    if value is None:
        return
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise SettingsError(
            f"`{name}` of a budget must be {what} of at least 0, not {value!r}; None sets no limit."
        )
