"""What the tests of cached calls share: a cache of their own, and a server that writes answers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import dspylite as dspy
from dspylite.models.cache.configure import current_cache, use_cache
from dspylite.testing import FakeServer

QA = "question -> answer"


def written(answer: object, name: str = "answer") -> str:
    """Write an answer as a model would."""
    return f"[[ ## {name} ## ]]\n{answer}\n\n[[ ## completed ## ]]"


def lm_at(server: FakeServer, model: str = "openai/m", **kwargs: Any) -> dspy.LM:
    """Make an LM that sends each request once, without a key of its own."""
    return dspy.LM(model, api_base=server.base_url, **{"num_retries": 0, **kwargs})


@contextlib.contextmanager
def cache_in(directory: Path | None, kind: type[dspy.Cache] = dspy.Cache) -> Generator[dspy.Cache]:
    """Have all calls in the block use a cache of its own; None keeps it in memory."""
    before = current_cache()
    mine = kind(enable_disk_cache=directory is not None, disk_cache_dir=directory)
    use_cache(mine)
    try:
        yield mine
    finally:
        use_cache(before)
