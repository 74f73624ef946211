"""Callers of another module: what a name means here is not what it means elsewhere."""

from collections.abc import Callable
from typing import Any

import pydantic

from dspylite import make_signature


class Spot(pydantic.BaseModel):
    """Not the `Spot` of the tests."""

    z: int


def signature_made_here(text: str) -> Any:
    """Make a signature in this module."""
    return make_signature(text)


def called_from_here(make: Callable[[], Any]) -> Any:
    """Call back."""
    return make()
