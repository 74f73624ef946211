"""Signatures whose annotations are text, for tests of modules with this future import."""

from __future__ import annotations

import datetime
from typing import Literal

import pydantic

import dspylite


class Place(pydantic.BaseModel):
    """A type of this module, which the annotations below name."""

    city: str


class Trip(dspylite.Signature):
    """Plan a trip."""

    wish: str = dspylite.InputField()
    days: int = dspylite.InputField(default=3)
    places: list[Place] = dspylite.OutputField(min_length=1)
    start: datetime.date | None = dspylite.OutputField()
    kind: Literal["walk", "swim"] = dspylite.OutputField()


def local_signature() -> type[dspylite.Signature]:
    """Make a signature inside a function, from a type that only this function knows."""

    class Local(pydantic.BaseModel):
        n: int

    class Count(dspylite.Signature):
        text: str = dspylite.InputField()
        found: list[Local] = dspylite.OutputField()

    return Count


def unresolvable_signature() -> type[dspylite.Signature]:
    """Name a type that is defined nowhere."""

    class Lost(dspylite.Signature):
        text: str = dspylite.InputField()
        found: Nowhere = dspylite.OutputField()  # type: ignore[name-defined]  # noqa: F821

    return Lost
