"""What is noted of a call when it has ended: its budget, its usage, its place in the histories.

Not here: the call (`base.py`), and what counts and keeps (`runtime/`).
"""

from __future__ import annotations

from contextvars import copy_context
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol, cast

from dspylite.abc import Io, Next
from dspylite.errors import LMError
from dspylite.models.knowledge import Price
from dspylite.models.middleware import Place, failed_attempt, successful_attempt
from dspylite.models.streams import WatchedStream
from dspylite.runtime.budgets import current_budget
from dspylite.runtime.calls import LMOutputs, Observed
from dspylite.runtime.history import GLOBAL_HISTORY, History, keep_call
from dspylite.runtime.settings import settings
from dspylite.runtime.tracking import note_request
from dspylite.schema.messages import (
    Attempt,
    DeltaSource,
    LMDelta,
    LMOutput,
    LMRequest,
    LMResponse,
    Usage,
)


class PricedModel(Protocol):
    """What is asked of a model whose calls a budget may refuse."""

    def price(self, *, look_up: bool) -> Price | None:
        """Return what its tokens cost; None if nobody knows."""
        ...


class RecordedLM(PricedModel, Protocol):
    """What is asked of a model whose calls are noted."""

    model: str
    model_type: Any
    history: History

    def cost_of(self, usage: Usage) -> float | None:
        """Return what tokens cost in US dollars; None if nobody knows."""
        ...


class BudgetCheck:
    """Refuses a call that takes a request, if a budget around it is spent."""

    __slots__ = ("_lm",)

    place: ClassVar[Place] = "budget"

    def __init__(self, lm: PricedModel) -> None:
        self._lm = lm

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Go on only while the budget allows."""
        spending = current_budget()
        if spending is not None:
            if spending.limits_money:
                spending.check(await io.any(partial(self._lm.price, look_up=True)))
            else:
                spending.check()
        return await call_next(request)


class Record:
    """What is noted of one call when it is answered, or has failed."""

    __slots__ = ("_budget", "_lm", "_request")

    def __init__(self, lm: RecordedLM, request: LMRequest) -> None:
        self._lm = lm
        self._request = request
        self._budget = current_budget()

    @property
    def model(self) -> str:
        """Who was asked."""
        return self._lm.model

    def last_attempt(self, error: LMError, seconds: float) -> tuple[Attempt, ...]:
        """Return how the stream that broke is noted."""
        return error.attempts[-1:] or (failed_attempt(self._request, error, seconds),)

    def _cost(self, response: LMResponse, *, look_up: bool = False) -> float | None:
        """Return what an answer cost, if that is known; a table is loaded only if it may be."""
        return cost_of(self._lm.price(look_up=look_up), response.usage)

    def keep(self, response: LMResponse, seconds: float) -> LMResponse:
        """Sign, count and keep an answered call; return it signed."""
        is_counted = bool(response.answered_by)  # by the fallback that answered
        if not is_counted:
            made = response.attempts or (successful_attempt(self._request, response, seconds),)
            response = replace(response, answered_by=self._lm.model, attempts=made)
            if self._budget is not None and not response.cached:
                spent = self._cost(response, look_up=self._budget.limits_money)
                self._budget.add(response.usage, spent)
        tracker = settings.usage_tracker
        if tracker is not None and not is_counted:
            price = self._lm.price(look_up=False)  # another LM of this name may have another one
            cost = self._lm.cost_of if price is None else self._cost(response)
            tracker.add(self._lm.model, response.usage, cost)
        keep_call(
            model=self._lm.model,
            model_type=self._lm.model_type,
            messages=self._request.messages,
            params=self._request.params,
            response=response,
            outputs=plain_outputs(response),
            cost=None if is_counted else self._cost(response),
            seconds=seconds,
            histories=(self._lm.history,) if is_counted else (self._lm.history, GLOBAL_HISTORY),
            is_kept=is_counted,
        )
        return response


def cost_of(price: Price | None, usage: Usage) -> float | None:
    """Return what an answered request cost in US dollars; None if that is not known."""
    if price is None or (price.is_charged and not usage.total_tokens):
        return None  # where the server counted nothing, that is not known to cost nothing
    return price.of(usage)


class RecordedStream(WatchedStream):
    """A stream that is counted and kept when it has ended."""

    def __init__(self, opened: LMResponse, record: Record, call: Observed, io: Io) -> None:
        super().__init__(cast("DeltaSource", opened.stream))
        self._failed = tuple(made for made in opened.attempts if made.error is not None)
        self._record = record
        # It is counted for those who opened it, in whatever thread or task it is read.
        self._context = copy_context()
        self._call = call
        self._io = io
        self._started = io.now()
        self._signed: LMResponse | None = None
        self._ends = [True]

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer; signed, after the end."""
        return self._signed or super().response

    def call(self) -> LMDelta | None:
        """Wait on this thread for the next piece."""
        try:
            return super().call()
        except BaseException as error:
            self._stopped(error)
            raise

    async def acall(self) -> LMDelta | None:
        """Await the next piece on this event loop."""
        try:
            return await super().acall()
        except BaseException as error:
            self._stopped(error)
            raise

    def _stopped(self, error: BaseException) -> None:
        """Tell of a cancellation or Ctrl-C; of a failure, `broke` has told already."""
        if self._take_end():
            self._context.run(note_request, self._record.model, "unfinished")
            self._call.finish(None, error)

    def ended(self) -> None:
        """Count and keep the answer."""
        if self._take_end():
            signed = self._context.run(self._record.keep, super().response, self._seconds)
            # What failed before it was open is known here alone.
            made = (*self._failed, *signed.attempts[-1:])
            self._signed = replace(signed, attempts=made)
            self._call.finish(told_outputs(self._signed))

    def broke(self, error: Exception) -> None:
        """Count the failure, and sign it."""
        if self._take_end():
            self._context.run(note_request, self._record.model, "failed")
            if isinstance(error, LMError):
                error.attempts = (*self._failed, *self._record.last_attempt(error, self._seconds))
            self._call.finish(None, error)

    def closed(self) -> None:
        """Count a stream that was left."""
        if self._take_end():
            self._context.run(note_request, self._record.model, "unfinished")
            self._call.finish(told_outputs(super().response))

    @property
    def _seconds(self) -> float:
        return self._io.now() - self._started

    def _take_end(self) -> bool:
        """Tell the first of several ends from the others; `pop` needs no lock for that."""
        try:
            self._ends.pop()
        except IndexError:
            return False
        return True


def plain_outputs(response: LMResponse) -> list[str | dict[str, Any]]:
    """Return the answers as a call gives them: texts, or dicts where they hold more."""
    return [_plain_output(output) for output in response.outputs]


def told_outputs(response: LMResponse) -> LMOutputs:
    """Return the answers as callbacks are told them."""
    return LMOutputs(plain_outputs(response), response)


def _plain_output(output: LMOutput) -> str | dict[str, Any]:
    if not (output.reasoning or output.tool_calls or output.citations or output.logprobs):
        return output.text
    plain: dict[str, Any] = {"text": output.text}
    if output.reasoning:
        plain["reasoning_content"] = output.reasoning
    if output.tool_calls:
        plain["tool_calls"] = deepcopy(list(output.tool_calls))
    if output.citations:
        plain["citations"] = deepcopy(list(output.citations))
    if output.logprobs:
        plain["logprobs"] = deepcopy(output.logprobs)
    return plain
