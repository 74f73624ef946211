"""The three ways to run a `Parallel`, for tests of what holds in each: `@forms` gives `run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

import dspylite as dspy

Run = Callable[[dspy.Parallel, Any], Any]


def on_threads(parallel: dspy.Parallel, pairs: Any) -> Any:
    return parallel(pairs)


def as_tasks(parallel: dspy.Parallel, pairs: Any) -> Any:
    return anyio.run(parallel.acall, pairs)


def as_tasks_on_trio(parallel: dspy.Parallel, pairs: Any) -> Any:
    return anyio.run(parallel.acall, pairs, backend="trio")


forms = pytest.mark.parametrize("run", [on_threads, as_tasks, as_tasks_on_trio])
