"""How policies around a call form a chain, and in which order they stand.

A policy is one method `async def handle(self, request, call_next, io)`, which serves sync and async
callers alike. Not here: the policies, each in a file of its own, which of them an LM has
(`models/policies.py`), and the call itself (the engines).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from dspylite.abc import Engine, Io, Middleware, Next
from dspylite.errors import (
    DeadlineExceededError,
    LMAuthError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMTimeoutError,
)
from dspylite.runtime.clock import deadline_error
from dspylite.runtime.threads import is_async
from dspylite.runtime.tracking import note_request
from dspylite.schema.messages import Attempt, LMRequest, LMResponse

Place = Literal[
    "call",
    "cache",
    "budget",
    "fallback",
    "retry",
    "breaker",
    "rate",
    "concurrency",
    "adaptive",
    "attempt",
]
"""Where in the chain a policy stands, outermost first; what says nothing of it is a `"call"`."""

_ORDER = {name: number for number, name in enumerate(get_args(Place))}


def in_order(policies: Iterable[Middleware]) -> tuple[Middleware, ...]:
    """Sort policies into the order of `Place`; equal ones keep theirs.

    Raises:
        LMConfigurationError: One is no policy, or names a place that does not exist.
    """
    if not isinstance(policies, Iterable):
        raise LMConfigurationError(
            f"`middleware` must be a list of policies, not {policies!r}; write `middleware=[...]`."
        )
    listed = list(policies)
    for policy in listed:
        if isinstance(policy, type):
            raise LMConfigurationError(
                f"{policy!r} is a class and no middleware; write `{policy.__name__}()`."
            )
        handle = getattr(policy, "handle", None)
        # A decorator may hide that what it wraps is async.
        if not callable(handle) or not (is_async(handle) or is_async(inspect.unwrap(handle))):
            raise LMConfigurationError(
                f"{policy!r} is no middleware: it needs "
                "`async def handle(self, request, call_next, io)`."
            )
        if place_of(policy) not in _ORDER:
            raise LMConfigurationError(
                f"{policy!r} has the place {place_of(policy)!r}; there are: {', '.join(_ORDER)}."
            )
    return tuple(sorted(listed, key=lambda policy: _ORDER[place_of(policy)]))


def place_of(policy: Middleware) -> str:
    """Return where a policy wants to stand."""
    return str(getattr(policy, "place", "call"))


def failed_attempt(request: LMRequest, error: LMError, seconds: float) -> Attempt:
    """Note an attempt that failed."""
    model = error.model or request.model
    return Attempt(model=model, seconds=seconds, error=error.code, status=error.status)


def successful_attempt(request: LMRequest, response: LMResponse, seconds: float) -> Attempt:
    """Note an attempt that was answered."""
    model = response.answered_by or request.model
    return Attempt(model=model, seconds=seconds, usage=response.usage)


def chain(middleware: Sequence[Middleware], engine: Engine, io: Io) -> Next:
    """Put policies around an engine, the first one outermost."""

    async def leaf(request: LMRequest) -> LMResponse:
        try:
            return await io.call(engine, request)
        except LMError as error:
            if was_sent(error):
                note_request(request.model, "failed")
            left = io.time_left()
            is_late = isinstance(error, LMTimeoutError) and left is not None and left <= 0
            if not is_late or isinstance(error, DeadlineExceededError):
                raise
            raise deadline_error(f"{request.model} was asked ({error.message})") from error
        except BaseException:  # cancelled, or a model of the user's own failed in its own way
            note_request(request.model, "unfinished")
            raise

    handler: Next = leaf
    for policy in reversed(middleware):
        handler = _around(policy, handler, io)
    return handler


def was_sent(error: LMError) -> bool:
    """Tell whether an engine's failure is that of a request, and not of making one.

    Example:
        >>> from dspylite.errors import LMAuthError
        >>> was_sent(LMAuthError("no key")), was_sent(LMAuthError("wrong key", status=401))
        (False, True)
    """
    is_refused_here = isinstance(error, LMConfigurationError | LMAuthError | LMInvalidRequestError)
    return error.status is not None or not is_refused_here


def _around(policy: Middleware, call_next: Next, io: Io) -> Next:
    return lambda request: policy.handle(request, call_next, io)
