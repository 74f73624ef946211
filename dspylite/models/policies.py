"""Which policies stand around the calls of an LM, by its parameters.

Not here: what a policy does; each has a file of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from dspylite.abc import LanguageModel, Middleware
from dspylite.errors import LMConfigurationError
from dspylite.models.adaptive import LONG_PAUSE_S, Adaptive, AdaptiveGate
from dspylite.models.breaker import CircuitBreaker
from dspylite.models.cache.cached import Cached
from dspylite.models.endpoints import shared
from dspylite.models.fallback import Fallback, checked_errors
from dspylite.models.limits import MaxConcurrency, QueuePlaces, check_count
from dspylite.models.middleware import in_order, place_of
from dspylite.models.rates import RateLimit
from dspylite.models.retry import Retry, RetryBudget

DEFAULT_RETRIES = 3
"""DSPy's value."""
DEFAULT_MAX_WAIT_S = 30.0
"""Longest wait between two attempts; guessed."""
DEFAULT_PATIENCE_S = 120.0
"""How long overload is waited out: twice a rate limit's minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """The policies of one LM, as parameters.

    Attributes:
        num_retries: Further attempts after a failure that may pass. None: 3, and overload is waited
            out.
        max_retry_wait_s: Longest wait between two attempts, in seconds. None: 30, but 2 where a
            fallback could answer meanwhile.
        patience_s: How long overload and outage are waited out, in seconds. None: 120, but 0 where
            `num_retries` is given or there are fallbacks.
        max_concurrency: Most requests at once to this endpoint with this key.
        max_queue: Most calls that may wait for that; a further one raises `OverloadedError`.
        rpm: Most requests in a minute.
        tpm: Most tokens in a minute.
        fallbacks: Models that answer where this one cannot.
        fallback_on: Errors that make them try. None: those of failing endpoints.
        circuit_breaker: Leaves a failing endpoint alone for a while. True: with its usual
            parameters; None: where there are fallbacks.
        adaptive: Whether calls are held back while the endpoint is overloaded. None: where calls go
            over a network. With a fallback or a breaker nobody waits while it is down.
        middleware: Further policies; one that stands where another of these stands replaces it.
    """

    num_retries: int | None = None
    max_retry_wait_s: float | None = None
    patience_s: float | None = None
    max_concurrency: int | None = None
    max_queue: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    fallbacks: Sequence[LanguageModel] = field(default=())
    fallback_on: tuple[type[BaseException], ...] | None = None
    circuit_breaker: CircuitBreaker | bool | None = None
    adaptive: bool | None = None
    middleware: Sequence[Middleware] = field(default=())

    def __post_init__(self) -> None:
        for each in fields(self):  # None takes a parameter away
            if getattr(self, each.name) is None:
                object.__setattr__(self, each.name, each.default)
        if self.max_queue is not None and self.max_concurrency is None:
            raise LMConfigurationError(
                f"`max_queue={self.max_queue}` says how many may wait for a place; give "
                "`max_concurrency=` too."
            )
        if self.fallback_on is not None:
            checked_errors(self.fallback_on)
        if not isinstance(self.circuit_breaker, CircuitBreaker | bool | None):
            raise LMConfigurationError(
                "`circuit_breaker` must be True, False or a `CircuitBreaker(...)`, not "
                f"{self.circuit_breaker!r}."
            )

    @property
    def retries(self) -> int:
        """Further attempts after a failure that may pass."""
        return DEFAULT_RETRIES if self.num_retries is None else self.num_retries

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Return these policies with some parameters changed."""
        return replace(self, **changes)

    def build(
        self, endpoint: Hashable, model: str, *, is_remote: bool, cache_kind: str | None = None
    ) -> tuple[Middleware, ...]:
        """Make the chain, outermost first; what has a state is shared by all of an endpoint.

        Args:
            endpoint: Tells the endpoint and key from others.
            model: Told apart where one endpoint serves several.
            is_remote: Whether calls go over a network.
            cache_kind: What tells the model's cached answers from others; None keeps none.

        Raises:
            LMConfigurationError: A parameter cannot work.
        """
        given = in_order(self.middleware)
        taken = {place_of(policy) for policy in given} - {"call", "attempt"}
        has_fallback = bool(self.fallbacks) or "fallback" in taken
        retry = self._retry(endpoint, has_fallback=has_fallback)
        own: list[Middleware] = [retry]
        if cache_kind is not None:
            manner = f"{retry.max_retries} {retry.max_wait_s} {retry.patience_s}"
            own.append(Cached(cache_kind, manner))
        if self.fallbacks:
            on = {} if self.fallback_on is None else {"on": self.fallback_on}
            own.append(Fallback(self.fallbacks, **on))
        has_breaker = has_fallback if self.circuit_breaker is None else bool(self.circuit_breaker)
        if has_breaker:
            own.append(self._breaker(endpoint, model))
        if self.rpm is not None:
            own.append(shared(("rpm", endpoint, self.rpm), lambda: RateLimit(rpm=self.rpm)))
        if self.tpm is not None:
            own.append(shared(("tpm", endpoint, self.tpm), lambda: RateLimit(tpm=self.tpm)))
        if (limit := self.max_concurrency) is not None:
            check_count("max_concurrency", limit, least=1, otherwise="leave it out for no limit")
            places = shared(("places", endpoint, limit), lambda: QueuePlaces(limit))
            own.append(
                shared(
                    ("concurrency", endpoint, limit, self.max_queue),
                    lambda: MaxConcurrency(limit, max_queue=self.max_queue, places=places),
                )
            )
        if is_remote if self.adaptive is None else self.adaptive:
            is_patient = not (has_fallback or has_breaker or "breaker" in taken)
            own.append(self._gate(endpoint, is_patient=is_patient))
        return in_order([*given, *(policy for policy in own if place_of(policy) not in taken)])

    def _retry(self, endpoint: Hashable, *, has_fallback: bool) -> Retry:
        is_quick = self.num_retries is not None or has_fallback
        patience_s = self.patience_s
        if patience_s is None:
            patience_s = 0.0 if is_quick else DEFAULT_PATIENCE_S
        max_wait_s = self.max_retry_wait_s
        if max_wait_s is None:
            max_wait_s = LONG_PAUSE_S if has_fallback else DEFAULT_MAX_WAIT_S
        return Retry(
            max_retries=self.retries,
            max_wait_s=max_wait_s,
            patience_s=patience_s if self.retries else 0.0,
            budget=shared(("retry", endpoint), RetryBudget),
        )

    @staticmethod
    def _gate(endpoint: Hashable, *, is_patient: bool) -> Adaptive:
        return Adaptive(shared(("adaptive", endpoint), AdaptiveGate), is_patient=is_patient)

    def _breaker(self, endpoint: Hashable, model: str) -> CircuitBreaker:
        if isinstance(self.circuit_breaker, CircuitBreaker):
            return self.circuit_breaker
        return shared(("breaker", endpoint, model), CircuitBreaker)


POLICY_NAMES = frozenset(each.name for each in fields(Policies)) - {"num_retries"}
