"""What became of one item of a batch, and of the batch.

Not here: running it (`concurrency/parallel.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from dspylite.errors import BatchError, BatchInterrupted, ItemSkippedError
from dspylite.schema.messages import Usage

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T]):
    """How one item of a batch ended.

    Attributes:
        index: The item's place in the input.
        ok: Whether it succeeded; the only thing to test, since values are never compared.
        value: What it returned; None unless `ok`.
        error: What it raised, or why it was not run; None if `ok`.
        attempts: How often it was started: 1, or 0 if the batch stopped before it.
        seconds: Wall time from its start to its end.
        usage: Tokens it spent, by model name.
    """

    index: int
    ok: bool
    value: T | None = None
    error: BaseException | None = None
    attempts: int = 1
    seconds: float = 0.0
    usage: Mapping[str, Usage] = field(default_factory=dict[str, Usage])

    def unwrap(self) -> T:
        """Return the value, or raise the error.

        Example:
            >>> Outcome(index=0, ok=True, value="yes").unwrap()
            'yes'
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.value)  # a T whenever there is no error


def skipped(index: int, reason: str) -> Outcome[Any]:
    """Make the outcome of an item that was never started."""
    return Outcome(
        index=index,
        ok=False,
        error=ItemSkippedError(f"Item {index} was not tried: {reason}.", index=index),
        attempts=0,
    )


def batch_error(
    outcomes: Sequence[Outcome[Any]],
    *,
    reason: str,
    cause: BaseException | None,
    is_whole: bool = True,
) -> BatchError:
    """Make the error that tells of every failure and keeps every result.

    Args:
        outcomes: Of all items that are known.
        reason: Why the batch stopped early; empty where it did not.
        cause: What to name first, if it is not the first failure of an item.
        is_whole: Whether there are no items besides.
    """
    errors = {o.index: o.error for o in outcomes if o.error is not None and o.attempts}
    untried = sum(1 for o in outcomes if not o.attempts)
    first = next(iter(errors.values()), None) if cause is None else cause
    parts = [f"{len(errors)} of {len(outcomes)} items failed"]
    if not is_whole:
        parts.append("nobody knows how many were not tried")
    elif untried:
        parts.append(f"{untried} were not tried")
    if reason:
        parts.append(reason)
    text = "; ".join(parts)
    error = BatchError(
        f"{text}. The first error: {told(first)}. Finished results are in "
        "`.results`, errors in `.errors`, both by index."
        if first is not None
        else f"{text}. Finished results are in `.results` by index.",
        results={o.index: o.value for o in outcomes if o.ok},
        errors=errors,
        untried=untried if is_whole else None,
    )
    error.__cause__ = first
    return error


def interrupted(outcomes: Sequence[Outcome[Any]]) -> BatchInterrupted:
    """Make the `KeyboardInterrupt` that keeps what a batch had finished."""
    results = {o.index: o.value for o in outcomes if o.ok}
    return BatchInterrupted(
        f"The batch was interrupted; {len(results)} of {len(outcomes)} items had succeeded. They "
        "are in `.results` by index.",
        results=results,
        errors={o.index: o.error for o in outcomes if o.error is not None and o.attempts},
        untried=sum(1 for o in outcomes if not o.attempts),
    )


def told(error: BaseException) -> str:
    """Say an error in one line: its class, and what it says if it can."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001  # its own `__str__` fails; what finished must not be lost for that
        return name
