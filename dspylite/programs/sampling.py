"""`BestOfN` and `Refine`: a program run several times, of which the best answer counts.

Not here: choosing among answers that are there already (`programs/voting.py`), and what the model
is told between two attempts of `Refine` (`programs/advice.py`).
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspylite.abc import Io
from dspylite.concurrency.outcome import told
from dspylite.errors import (
    CallCancelledError,
    InputFieldError,
    ModuleError,
    SettingsError,
    clip,
)
from dspylite.programs.advice import Review, ask_for_advice, give_hints
from dspylite.programs.base import Module, Planned
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.settings import overlay_with, settings
from dspylite.runtime.tracking import record_traces, track_usage
from dspylite.schema.records import Outputs

logger = logging.getLogger(__name__)

Reward = Callable[[dict[str, Any], Any], float | Awaitable[float]]
"""What an answer is worth: `reward_fn(inputs, prediction)`, sync or async."""

_TEMPERATURE = 1.0
"""Of every attempt, unless a predictor has one of its own. DSPy's value."""

_NOTED_CHARS = 300
"""Kept of each further failure that is noted on the one raised; guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """One run of the program, and what it was worth."""

    index: int
    answer: Any
    reward: float
    trace: Sequence[tuple[Any, dict[str, Any], Any]]


@dataclass(slots=True, kw_only=True)
class _Contest:
    """The attempts of one call; several threads may report to it."""

    size: int
    threshold: float | None
    fail_count: int
    stop: Cancellation = field(default_factory=lambda: Cancellation(CANCELLATION.get()))
    best: _Attempt | None = None
    failures: dict[int, Exception] = field(default_factory=dict[int, Exception])
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards the three above

    def enter(self, attempt: _Attempt) -> None:
        """Compare an attempt with the best one; of equals the earlier wins.

        Raises:
            _OverError: It is good enough, so that nobody needs to go on.
        """
        with self.lock:
            best = self.best
            if best is None or (attempt.reward, -attempt.index) > (best.reward, -best.index):
                self.best = attempt
            if self.threshold is None or attempt.reward < self.threshold:
                return
            self.is_over = True
        self.stop.cancel("another attempt was good enough")
        raise _OverError

    def fail(self, index: int, error: Exception, *, is_late: bool) -> None:
        """Count a failure.

        Raises:
            _OverError: There are too many, or the time is up.
        """
        logger.debug("attempt %d of %d failed", index + 1, self.size, exc_info=error)
        with self.lock:
            if not self.is_over:  # else it may be because others ended it
                self.failures[index] = error
            if not self.is_over and not is_late and len(self.failures) <= self.fail_count:
                return
            self.is_over = True
        self.stop.cancel("another attempt failed")
        raise _OverError

    def winner(self) -> _Attempt:
        """Return the best attempt.

        Raises:
            Exception: There is none, or too many failed: the last failure, with notes of the
                others.
        """
        if self.best is not None and len(self.failures) <= self.fail_count:
            return self.best
        *before, last = self.failures.items()
        index, error = last
        if self.size > 1:
            error.add_note(f"This was attempt {index + 1} of {self.size}.")
        for place, other in before:
            said = clip(told(other), _NOTED_CHARS)
            error.add_note(f"Attempt {place + 1} failed with {said}")
        raise error


class _OverError(Exception):
    """No further attempt is needed; tells the driver to end those under way."""


class _Held:
    """Keeps a function where it is not taken for a part of the program that holds it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


class _Sampler(Planned):
    """What `BestOfN` and `Refine` have in common: checks, one attempt, the choice."""

    def __init__(
        self,
        module: Module,
        N: int,  # noqa: N803  # DSPy's spelling
        reward_fn: Reward,
        threshold: float | None,
        *,
        fail_count: int | None,
        callbacks: Sequence[Any] | None,
    ) -> None:
        super().__init__(callbacks)
        name = type(self).__name__
        if not isinstance(module, Module):
            raise ModuleError(
                f"`{name}` runs a module, such as `Predict('question -> answer')`, not {module!r}."
            )
        if not callable(reward_fn):
            raise ModuleError(
                f"`reward_fn` must be a function of the inputs and the prediction that returns a "
                f"number, not {reward_fn!r}."
            )
        if threshold is not None:
            threshold = _number("threshold", threshold)
        self.module = module
        self.N = _count("N", N, least=1)
        self.threshold = threshold
        self.fail_count = self.N if fail_count is None else _count("fail_count", fail_count)
        self._reward = _Held(reward_fn)

    @property
    def reward_fn(self) -> Reward:
        """What an answer is worth."""
        fn: Reward = self._reward.value
        return fn

    async def steps(self, io: Io, /, *args: Any, **inputs: Any) -> Any:
        """Run the attempts and return the best answer, with the usage of all of them."""
        if args:
            raise InputFieldError(
                f"`{type(self).__name__}` takes its inputs by name, as `reward_fn` is given them "
                f"({len(args)} came by position): write `program(question=...)`."
            )
        contest = _Contest(size=self.N, threshold=self.threshold, fail_count=self.fail_count)
        with track_usage() as tracker:
            try:
                with contest.stop:
                    await self._run(io, inputs, contest)
            except (_OverError, CallCancelledError):
                if not contest.is_over:
                    raise
        best = contest.winner()
        record_traces(best.trace)
        if isinstance(best.answer, Outputs):
            best.answer.set_lm_usage(tracker.by_model)
        return best.answer

    async def _run(self, io: Io, inputs: dict[str, Any], contest: _Contest) -> None:
        raise NotImplementedError

    async def _attempt(
        self,
        io: Io,
        index: int,
        inputs: dict[str, Any],
        contest: _Contest,
        hints: Mapping[str, str] | None = None,
    ) -> _Attempt | None:
        """Run the program once on a copy of its own; None where that failed.

        Raises:
            _OverError: Nothing more is to be tried.
        """
        if contest.is_over:
            return None
        twin = _twin(self.module)
        # Now, because the program may make itself further ones while it runs.
        pairs = list(zip(twin.predictors(), self.module.predictors(), strict=True))
        for predictor, _ in pairs:
            predictor.config = {
                "temperature": _TEMPERATURE,
                **predictor.config,
                "rollout_id": _rollout_id(predictor, index),
            }
        hinted = give_hints(twin, hints or {})
        trace: list[Any] = []
        try:
            # Its own list, so that of two attempts at once each has its own calls.
            with overlay_with(trace=trace):
                answer = await twin.plan(io, (), dict(inputs))
                calls = _as_of_original(trace, pairs, hinted)
                reward = _checked(await io.any(self.reward_fn, dict(inputs), answer))
        except CallCancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # `winner` raises it where none succeeds
            left = io.time_left()
            contest.fail(index, error, is_late=left is not None and left <= 0)
            return None
        attempt = _Attempt(index=index, answer=answer, reward=reward, trace=calls)
        contest.enter(attempt)
        return attempt


class BestOfN(_Sampler):
    """Runs a program up to `N` times and returns the answer of the highest reward.

    Each attempt runs on a copy of the program, with a `rollout_id` of its own, so that the cache
    does not answer each alike, and at temperature 1.0 where a predictor has none of its own. The
    program itself is never changed, and one `BestOfN` may be used by many threads at once.

    Args:
        module: The program.
        N: Most attempts.
        reward_fn: What an answer is worth, called as `reward_fn(inputs, prediction)` with the
            inputs as a dict; sync or async. The higher the better; of equals the first wins.
        threshold: Reward at which no further attempt is made. None: all are made.
        fail_count: Failed attempts that are borne; one more is raised. None: all of them, as long
            as one succeeds.
        num_threads: Attempts at once. Where one reaches the threshold the others are broken off.
        callbacks: Told of every call, after those of the settings.

    Attributes:
        module: As given.
        N: As given.
        threshold: As given.
        fail_count: As given, or `N`.

    Raises:
        ModuleError: `module` is no module, or `reward_fn` no function.
        SettingsError: A number is impossible.

    Example:
        >>> from dspylite.programs.predict import Predict
        >>> from dspylite.runtime.settings import context
        >>> from dspylite.testing import FakeLM
        >>> def is_short(inputs, prediction):
        ...     return 1.0 if len(prediction.answer.split()) == 1 else 0.0
        >>> best = BestOfN(Predict("question -> answer"), N=3, reward_fn=is_short, threshold=1.0)
        >>> lm = FakeLM([{"answer": "It is Paris."}, {"answer": "Paris"}])
        >>> with context(lm=lm):
        ...     best(question="What is the capital of France?").answer, len(lm.requests)
        ('Paris', 2)
    """

    def __init__(
        self,
        module: Module,
        N: int,  # noqa: N803  # DSPy's spelling
        reward_fn: Reward,
        threshold: float | None,
        fail_count: int | None = None,
        *,
        num_threads: int = 1,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            module, N, reward_fn, threshold, fail_count=fail_count, callbacks=callbacks
        )
        self.num_threads = _count("num_threads", num_threads, least=1)

    async def _run(self, io: Io, inputs: dict[str, Any], contest: _Contest) -> None:
        async def attempt(index: int) -> None:
            await self._attempt(io, index, inputs, contest)

        await io.map(attempt, range(self.N), limit=self.num_threads)


class Refine(_Sampler):
    """Like `BestOfN`, but each attempt is told what to do better than the one before.

    After an attempt below the threshold the model is shown the program, what its predictors were
    asked and answered, and the reward; it writes advice for each predictor, which the next attempt
    finds in its prompt as an input named `hint_`. That is one more call per attempt, made by the LM
    of the settings, else by the first that a predictor has. Where none comes, the attempt goes on
    with the advice before.

    Args:
        module: The program.
        N: Most attempts.
        reward_fn: As of `BestOfN`; its source is shown to the model.
        threshold: As of `BestOfN`.
        fail_count: As of `BestOfN`.
        callbacks: As of `BestOfN`.

    Attributes:
        module: As given.
        N: As given.
        threshold: As given.
        fail_count: As given, or `N`.

    Raises:
        ModuleError: `module` is no module, or `reward_fn` no function.
        SettingsError: A number is impossible.

    Example:
        >>> from dspylite.programs.predict import Predict
        >>> from dspylite.runtime.settings import context
        >>> from dspylite.testing import FakeLM
        >>> def is_short(inputs, prediction):
        ...     return 1.0 if len(prediction.answer.split()) == 1 else 0.0
        >>> refine = Refine(Predict("question -> answer"), N=2, reward_fn=is_short, threshold=1.0)
        >>> advice = {"discussion": "Too long.", "advice": {"self": "Answer with one word."}}
        >>> lm = FakeLM([{"answer": "It is Paris."}, advice, {"answer": "Paris"}])
        >>> with context(lm=lm):
        ...     refine(question="What is the capital of France?").answer
        'Paris'
        >>> "Answer with one word." in lm.requests[2].messages[-1]["content"]
        True
    """

    def __init__(
        self,
        module: Module,
        N: int,  # noqa: N803  # DSPy's spelling
        reward_fn: Reward,
        threshold: float | None,
        fail_count: int | None = None,
        *,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            module, N, reward_fn, threshold, fail_count=fail_count, callbacks=callbacks
        )

    async def _run(self, io: Io, inputs: dict[str, Any], contest: _Contest) -> None:
        hints: Mapping[str, str] = {}
        for index in range(self.N):
            attempt = await self._attempt(io, index, inputs, contest, hints)
            if attempt is not None and index < self.N - 1:
                review = Review(
                    program=self.module,
                    inputs=inputs,
                    calls=attempt.trace,
                    answer=attempt.answer,
                    reward_fn=self.reward_fn,
                    reward=attempt.reward,
                    threshold=self.threshold,
                )
                advice = await ask_for_advice(io, review)
                hints = hints if advice is None else advice


def _twin(module: Module) -> Module:
    """Copy a program for one attempt; what cannot be copied, such as a lock, is shared.

    Raises:
        ModuleError: A predictor stands in something that cannot be copied.
    """
    parts = [part for _, part in module.named_sub_modules()]
    # The LMs stay: their limits and histories are those of the program.
    memo: dict[int, Any] = {
        id(lm): lm for part in parts if (lm := vars(part).get("lm")) is not None
    }
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:  # each library has its own for what it does not copy
        for part in reversed(parts):  # so that what a part shares is known to what it is in
            for value in list(vars(part).values()):
                if isinstance(value, Module):
                    continue
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:  # noqa: BLE001  # as above
                    memo[id(value)] = value
        twin = copy.deepcopy(module, memo)
        own = {id(predictor): path for path, predictor in module.named_predictors()}
        for predictor in twin.predictors():
            if id(predictor) in own:
                raise ModuleError(
                    f"The predictor `{own[id(predictor)]}` stands in something that cannot be "
                    "copied, and each attempt needs its own; make it an attribute of the module."
                ) from error
        return twin


def _rollout_id(predictor: Any, index: int) -> Any:
    """Name an attempt; under an id that is there already, as inside another `BestOfN`, both."""
    start = predictor.config.get("rollout_id")
    if start is None:
        start = getattr(predictor.lm or settings.lm, "kwargs", {}).get("rollout_id")
    return index if start is None else f"{start}/{index}"


def _as_of_original(
    trace: Sequence[Any], pairs: Sequence[tuple[Any, Any]], hinted: Mapping[int, str]
) -> list[tuple[Any, dict[str, Any], Any]]:
    """Give an attempt's trace as if the program itself had run, without the hints."""
    original = {id(copied): predictor for copied, predictor in pairs}
    return [
        (
            original.get(id(predictor), predictor),
            {name: value for name, value in inputs.items() if name != hinted.get(id(predictor))},
            prediction,
        )
        for predictor, inputs, prediction in trace
    ]


def _checked(reward: Any) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(reward, str) or math.isnan(value):
        raise ModuleError(f"`reward_fn` must return a number, not {reward!r}.")
    return value


def _count(name: str, value: Any, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"`{name}` must be a whole number of at least {least}, not {value!r}.")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise SettingsError(f"`{name}` must be a number, or None for none, not {value!r}.")
    return float(value)
