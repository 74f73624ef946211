"""The one door to litellm: it is loaded here and nowhere else, and its failures become ours.

Not here: what it is called for (`models/litellm.py`).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio

from dspylite.errors import CallCancelledError, DeadlineExceededError, LMTimeoutError
from dspylite.models.knowledge import Knowledge, knowledge_of_row
from dspylite.models.translate import shows_secret, translate_error
from dspylite.runtime.bridge import call_within
from dspylite.runtime.clock import deadline_error, time_left
from dspylite.runtime.forks import loading
from dspylite.runtime.workers import call_in_thread
from dspylite.schema.secrets import secrets_of

T = TypeVar("T")

_loaded: list[Any] = []


def load_litellm() -> Any:
    """Import litellm once, whatever thread asks first, and return the module.

    It is told to use the price list it ships instead of fetching one over the network, unless the
    user chose otherwise through `LITELLM_LOCAL_MODEL_COST_MAP`, and not to print advice.
    """
    if not _loaded:
        with loading():  # one thread at a time: litellm imports itself in circles
            if not _loaded:
                os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
                import litellm  # noqa: PLC0415  # costs seconds, so on the first call only

                litellm.suppress_debug_info = True
                _loaded.append(litellm)
    return _loaded[0]


@functools.lru_cache(maxsize=1024)
def known_by_table(model: str) -> Knowledge:
    """Look up in litellm's own table what is known of a model; never asks the network.

    Nothing is known of models that are not in the table.
    """
    try:
        row = load_litellm().get_model_info(model)
    except Exception:  # noqa: BLE001  # an unknown model, whatever litellm raises for it
        return Knowledge()
    return knowledge_of_row(row)


async def load_litellm_without_blocking() -> Any:
    """Return the module; where it must be imported first, a worker thread does it."""
    return _loaded[0] if _loaded else await call_in_thread(load_litellm)


@contextmanager
def border(arguments: Mapping[str, Any]) -> Generator[None, None, None]:
    """Let every failure of the block leave as one of ours."""
    handled = sys.exception()
    try:
        yield
    except CallCancelledError:  # says nothing about the provider
        raise
    except Exception as error:  # the border: what a provider's library raises is translated here
        secrets = secrets_of(arguments)
        ours = translate_error(error, model=arguments["model"], secrets=secrets, handled=handled)
        if ours is error:
            raise
        # Causes are printed with the traceback; where one holds a key, none must be.
        raise ours from (None if shows_secret(error, secrets) else error)


def in_time(model: str, fn: Callable[[], T]) -> T:
    """Call litellm on this thread, or where the call has a deadline, beside it.

    Its own time limits start anew with each byte, so only leaving it behind keeps a deadline.
    """
    left = time_left()
    if left is None:
        return fn()
    try:
        return call_within(left, fn)
    except TimeoutError as error:
        # An LMTimeoutError is one too, and says more.
        raise error if isinstance(error, LMTimeoutError) else _late(model) from error


async def in_time_async(model: str, fn: Callable[[], Awaitable[T]]) -> T:
    """Await litellm, no longer than the deadline of the call allows."""
    left = time_left()
    if left is None:
        return await fn()
    with anyio.move_on_after(max(0.0, left)):
        return await fn()
    raise _late(model)


def _late(model: str) -> DeadlineExceededError:
    return deadline_error(f"{model} was asked")
