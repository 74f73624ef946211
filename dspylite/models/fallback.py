"""`Fallback`: other models that answer where the first one cannot.

Not here: leaving a failing model alone for a while (`models/breaker.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from dspylite.abc import Io, LanguageModel, Next
from dspylite.errors import (
    CircuitOpenError,
    LMConfigurationError,
    LMError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    OverloadedError,
)
from dspylite.models.middleware import Place, failed_attempt, successful_attempt
from dspylite.runtime.tracking import note_request
from dspylite.schema.messages import Attempt, LMRequest, LMResponse
from dspylite.schema.secrets import without_secrets

_NOT_PASSED_ON = frozenset({"api_base", "base_url", "api_version", "organization", "deadline_s"})
"""What, beside keys and headers, is for the first model alone: its endpoint and account, and the
deadline, which is in force already and must not replace a nearer one of a fallback's own."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Lets other models answer where the first one cannot.

    They are tried in order, each with its own policies, with the parameters of the call but not
    those of the first model; what a call says of endpoint and key is for the first model alone.
    The response says who answered.

    Attributes:
        lms: The other models.
        on: Errors that make the next one try. Refused requests (400, 401 and so on) are not among
            the usual ones: another model would hide a mistake.

    Raises:
        LMConfigurationError: There is no model, something is none, or `on` is no tuple of errors.
    """

    place: ClassVar[Place] = "fallback"

    lms: Sequence[LanguageModel]
    on: tuple[type[BaseException], ...] = (
        LMRateLimitError,
        LMServerError,
        LMTimeoutError,
        LMTransportError,
        CircuitOpenError,
        OverloadedError,
    )

    def __post_init__(self) -> None:
        given: object = self.lms
        if not isinstance(given, list | tuple) or not given:
            raise LMConfigurationError(
                f"`fallbacks` must be a list of models, not {self.lms!r}; write `fallbacks=[lm]`."
            )
        for lm in self.lms:
            if not isinstance(lm, LanguageModel):
                raise LMConfigurationError(f"One of `fallbacks` is {lm!r}, which is no LM.")
        object.__setattr__(self, "lms", tuple(self.lms))
        object.__setattr__(self, "on", checked_errors(self.on))

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Ask the first model, then each of the others until one answers."""
        made: list[Attempt] = []
        caught: tuple[type[BaseException], ...] = (LMError, *self.on)

        async def ask(lm: LanguageModel) -> LMResponse:
            may_go = without_secrets(request.asked)
            asked = {name: may_go[name] for name in may_go.keys() - _NOT_PASSED_ON}
            return await lm.plan(io, request.messages, asked, stream=request.stream)

        ways: list[Callable[[], Awaitable[LMResponse]]] = [
            lambda: call_next(request),
            *(partial(ask, lm) for lm in self.lms),
        ]
        for position, way in enumerate(ways, 1):
            started = io.now()
            try:
                response = await way()
            except caught as error:
                if isinstance(error, LMError):
                    made += error.attempts or [failed_attempt(request, error, io.now() - started)]
                    error.attempts = tuple(made)
                left = io.time_left()
                is_last = position == len(ways) or not isinstance(error, self.on)
                if is_last or (left is not None and left <= 0):
                    raise
                continue
            if not made:
                return response
            answered_by = response.answered_by or request.model
            # One that had to ask a fallback of its own has noted that itself.
            if position == 1 or answered_by in {request.model, self.lms[position - 2].model}:
                note_request(answered_by, "fallbacks")
            done = response.attempts or (successful_attempt(request, response, io.now() - started),)
            return replace(response, attempts=(*made, *done))
        raise AssertionError("the last way returns or raises")


def checked_errors(classes: object) -> tuple[type[BaseException], ...]:
    """Return error classes as a tuple.

    Raises:
        LMConfigurationError: They are no tuple or list of error classes.
    """
    listed: list[object] = list(classes) if isinstance(classes, tuple | list) else [classes]
    found = [each for each in listed if isinstance(each, type) and issubclass(each, BaseException)]
    if len(found) < len(listed):
        raise LMConfigurationError(
            "The errors that make a fallback try must be a tuple of classes, such as "
            f"`fallback_on=(LMServerError,)`, not {classes!r}."
        )
    return tuple(found)
