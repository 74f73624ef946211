"""The only file that imports numpy: an extra, which makes arrays and searches faster.

Not here: what is done with it.
"""

from __future__ import annotations

from typing import Any


def load_numpy() -> Any | None:
    """Return numpy; None where it is not installed."""
    try:
        import numpy  # noqa: PLC0415  # slow to load, and few programs need it
    except ImportError:
        return None
    return numpy
