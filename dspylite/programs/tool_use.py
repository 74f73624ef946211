"""What agents do with tools: which they have, one call of one, and what a model is told of it.

Not here: the loops of agents (`programs/react.py`, `programs/react_v2.py`), and calling a function
(`adapters/types/tools.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspylite.abc import Io
from dspylite.adapters.content import PartsSink
from dspylite.adapters.types.tools import Tool
from dspylite.adapters.values import format_value
from dspylite.errors import (
    BudgetExceededError,
    CallCancelledError,
    DeadlineExceededError,
    DSPyError,
    FlowError,
    SettingsError,
    SignatureError,
    ToolError,
    clip,
    nearest,
)
from dspylite.schema.secrets import redact, secrets_of, shown_url
from dspylite.schema.signature import Signature

MAX_OBSERVATION_CHARS = 100_000
"""Longest text of one result that a model is shown by default; guessed, about 25,000 tokens."""

_ENDS = (CallCancelledError, BudgetExceededError, FlowError)
"""Errors that no further step could mend: the work is to stop, is paid up, or cannot wait here."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one call of a tool gave.

    Attributes:
        value: What it returned, or the words of its failure.
        is_error: Whether it failed.
    """

    value: Any
    is_error: bool = False


async def observe(io: Io, tools: Mapping[str, Tool], name: Any, args: Any) -> Observation:
    """Call a tool as a model wants it; a failure is an observation too.

    Raises:
        DeadlineExceededError: The time of the agent is up, and not only that of the tool.
        CallCancelledError: The work was told to stop.
        BudgetExceededError: The tokens or the money are spent.
        FlowError: The tool cannot be waited for in this way.
    """
    try:
        if name not in tools:
            raise ToolError(
                f"There is no tool `{name}`. {nearest(str(name), tools)}The tools are: "
                f"{', '.join(tools)}."
            )
        if not isinstance(args, Mapping):
            raise ToolError(f"The arguments of `{name}` must be an object, not {args!r:.200}.")
        given = copy.deepcopy(dict(args))  # what the tool does to it is not what the model wished
        return Observation(await tools[name].plan(io, (), given))
    except Exception as error:
        if _ends_run(error, io):
            raise
        return Observation(f"Execution error in {name}: {words_of(error, args)}", is_error=True)


def _ends_run(error: BaseException, io: Io) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_ends_run(each, io) for each in error.exceptions)
    if isinstance(error, DeadlineExceededError):
        left = io.time_left()
        return left is not None and left <= 0
    return isinstance(error, _ENDS)


def words_of(error: BaseException, args: Any = None) -> str:
    """Say a failure to a model: its type and message, shortened and without known secrets."""
    if isinstance(error, BaseExceptionGroup):  # says only how many there are
        return clip("; ".join(words_of(each, args) for each in error.exceptions[:5]))
    notes = getattr(error, "__notes__", None)
    text = "\n".join(map(_words, [error, *(notes if isinstance(notes, list) else ())]))
    secrets = secrets_of(args if isinstance(args, Mapping) else {})
    name = type(error).__name__
    return clip(f"{name}: {shown_url(redact(text, secrets))}" if text.strip() else name)


def _words(error_or_note: Any) -> str:
    try:
        return str(error_or_note)
    except Exception:  # noqa: BLE001  # an exception of the user's, whose text fails
        return "(its message cannot be read)"


def as_text(value: Any, limit: int | None, sink: PartsSink | None = None) -> str:
    """Write what a tool gave, whatever it is: shortened, and as text that can be sent."""
    try:
        text = format_value(value, sink)
    except Exception as error:  # noqa: BLE001  # it holds itself, nests for ever, or refuses
        text = f"(a {type(value).__name__} that cannot be written: {type(error).__name__})"
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of characters, which no request can carry
        text = text.encode(errors="replace").decode()
    return text if limit is None else clip(text, limit)


def usable_tools(
    owner: str, tools: Iterable[Callable[..., Any] | Tool], own: Tool
) -> dict[str, Tool]:
    """Return the tools of an agent by name, with its own one at the end.

    Raises:
        ToolError: It is no list of functions, a name comes twice, or is that of the agent's own.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ToolError(
            f"`{owner}` takes a list of tools, not {tools!r:.200}; write `tools=[...]`."
        )
    found: dict[str, Tool] = {}
    for each in tools:
        tool = each if isinstance(each, Tool) else Tool(each)
        if tool.name == own.name:
            raise ToolError(
                f"`{own.name}` is the tool by which a model ends its work with `{owner}`; give "
                "yours another name: `Tool(func, name=...)`."
            )
        if tool.name in found:
            raise ToolError(
                f"Two tools are named `{tool.name}`, and a model could not tell them apart; name "
                "one otherwise: `Tool(func, name=...)`."
            )
        found[tool.name] = tool
    return {**found, own.name: own}


def check_names(owner: str, signature: type[Signature], reserved: Sequence[str]) -> None:
    """Refuse a signature with a field that the agent needs for itself.

    Raises:
        SignatureError: It has one.
    """
    for name in reserved:
        if name in signature.fields:
            raise SignatureError(
                f"`{owner}` keeps the name `{name}` for itself; name that field of "
                f"`{signature.signature}` otherwise."
            )


def whole_number(name: str, value: Any) -> int:
    """Return a count that must be at least 1.

    Raises:
        SettingsError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"`{name}` must be a whole number of at least 1, not {value!r}.")
    return value


def with_work(error: DSPyError, **done: Any) -> DSPyError:
    """Return a copy of an error that bears what the agent had done, as attributes.

    A copy, because the error may be on its way to another caller too.
    """
    twin: DSPyError = copy.copy(error)
    for name, value in done.items():
        setattr(twin, name, value)
    return twin


def call_overrides(
    signature: type[Signature], kwargs: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the inputs of a call from what else it says; a field of the signature is an input."""
    told = {n: v for n, v in kwargs.items() if n in names and n not in signature.input_fields}
    return {name: value for name, value in kwargs.items() if name not in told}, told
