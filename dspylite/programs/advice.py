"""What `Refine` asks of the model between two attempts, and how the next one is told.

Not here: the attempts (`programs/sampling.py`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspylite.abc import Io
from dspylite.adapters.values import format_value, to_json
from dspylite.errors import CallCancelledError, clip
from dspylite.programs.base import Module
from dspylite.programs.predict import Predict
from dspylite.runtime.settings import overlay_with, settings
from dspylite.schema.grammar import PARSE_LOCK
from dspylite.schema.records import Outputs
from dspylite.schema.signature import Field, InputField, OutputField, Signature

logger = logging.getLogger(__name__)

_MAX_CHARS = 4_000
"""Shown of one value; guessed, so that a few long documents leave room for the rest."""

_HINT = "hint_"  # DSPy's name
_NOTHING_TO_SAY = frozenset({"", "n/a", "na", "none", "null"})


class OfferFeedback(Signature):
    """A program was run, and its result is worth less than the threshold.

    First find out which of its predictors caused that, if any. Then write for each predictor what
    to do when the same or similar inputs come again. A predictor sees nothing of this run, so its
    advice must stand for itself: say when it applies, what went wrong, and what to do instead, in
    words that can be followed to the letter. For a predictor that did its part well write N/A.
    """

    program_code: str = InputField(desc="The source of the program")
    modules_defn: str = InputField(desc="What each predictor is given, gives, and is told to do")
    program_inputs: str = InputField(desc="What the program was called with")
    program_trajectory: str = InputField(desc="What each predictor got and gave, in order")
    program_outputs: str = InputField(desc="What the program returned")
    reward_code: str = InputField(desc="The source of the function that gave the reward")
    target_threshold: float | None = InputField(desc="The reward to reach; null means the highest")
    reward_value: float = InputField(desc="The reward that was given")
    module_names: list[str] = InputField(desc="The names of the predictors that need advice")
    discussion: str = OutputField(desc="What went wrong, and where")
    advice: dict[str, str] = OutputField(
        desc="For each name in `module_names` its advice: the situation, the mistake made in it, "
        "and what to do instead; or N/A"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """One attempt, as the model is shown it.

    Attributes:
        program: The program that ran.
        inputs: What it was called with.
        calls: Its trace.
        answer: What it returned.
        reward_fn: What judged the answer.
        reward: How.
        threshold: What would have been good enough; None: nothing would.
    """

    program: Module
    inputs: Mapping[str, Any]
    calls: Sequence[tuple[Any, Mapping[str, Any], Any]]
    answer: Any
    reward_fn: Callable[..., Any]
    reward: float
    threshold: float | None


async def ask_for_advice(io: Io, review: Review) -> dict[str, str] | None:
    """Return advice by predictor name; of those that need none, nothing.

    A failure gives None and is logged, because an attempt can do without.
    """
    try:
        with overlay_with(trace=None):
            found: Any = await Predict(OfferFeedback).plan(io, (), _asked(review))
    except CallCancelledError:
        raise
    except Exception as error:  # logged
        logger.warning("no advice came, so the next attempt goes without: %s", error)
        logger.debug("what went wrong there", exc_info=error)
        return None
    advice: dict[str, str] = found.advice
    return {
        name: text
        for name, text in advice.items()
        if text.strip().rstrip(".").lower() not in _NOTHING_TO_SAY
    }


def _asked(review: Review) -> dict[str, Any]:
    """Write an attempt as the inputs of `OfferFeedback`, with the LM to ask."""
    named = review.program.named_predictors()
    names = {id(predictor): name for name, predictor in named}
    calls = [
        {
            "module_name": names.get(id(predictor), type(predictor).__name__),
            "inputs": _shown(inputs),
            "outputs": _shown(outputs),
        }
        for predictor, inputs, outputs in review.calls
    ]
    lm = settings.lm or next((each.lm for _, each in named if each.lm is not None), None)
    return {
        "lm": lm,
        "program_code": _source(review.program),
        "modules_defn": "\n\n".join(_definition(name, each) for name, each in named),
        "program_inputs": to_json(_shown(review.inputs), indent=2),
        "program_trajectory": to_json(calls, indent=2),
        "program_outputs": to_json(_shown(review.answer), indent=2),
        "reward_code": _source(review.reward_fn),
        "target_threshold": review.threshold,
        "reward_value": review.reward,
        "module_names": [name for name, _ in named],
    }


def give_hints(program: Module, hints: Mapping[str, str]) -> dict[int, str]:
    """Give predictors their advice as a further input, in a program that is the caller's alone.

    Returns:
        The name of that input by the predictor's `id`.
    """
    given: dict[int, str] = {}
    for name, predictor in program.named_predictors():
        if name not in hints:
            continue
        field = _HINT
        while field in predictor.signature.fields:  # as inside another `Refine`
            field += "_"
        hint = InputField(desc="Advice from an earlier attempt", default=hints[name])
        predictor.signature = predictor.signature.append(field, hint)
        given[id(predictor)] = field
    return given


def _shown(value: Any) -> Any:
    """Write the values of a record as texts, long ones shortened."""
    if isinstance(value, Mapping | Outputs):
        return {name: clip(format_value(each), _MAX_CHARS) for name, each in value.items()}
    return clip(format_value(value), _MAX_CHARS)


def _definition(name: str, predictor: Any) -> str:
    signature = predictor.signature
    return "\n".join(
        [
            f"{name}:",
            "  Inputs:",
            *map(_line, signature.input_fields.values()),
            "  Outputs:",
            *map(_line, signature.output_fields.values()),
            "  Instructions:",
            textwrap.indent(signature.instructions, "    "),
        ]
    )


def _line(field: Field) -> str:
    return f"    {field.name} ({field.type_name})" + (f": {field.desc}" if field.desc else "")


def _source(thing: Any) -> str:
    """Return the source of a function, or of the class of an object; its name where that is all."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    code = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    if str(code.__module__).startswith("dspylite.programs."):  # its parts tell more than its code
        return repr(thing)
    try:
        with PARSE_LOCK:  # a class is looked for in its parsed file
            return textwrap.dedent(inspect.getsource(code))
    except Exception:  # noqa: BLE001  # typed into a prompt, not written in Python, or edited since
        return f"{code.__qualname__} (its source is not to be had)"
