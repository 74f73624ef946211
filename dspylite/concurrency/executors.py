"""`asyncify` and `syncify`: a program called from the other side of the sync/async border.

Not here: running many items (`concurrency/parallel.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast, overload

from dspylite.abc import Program
from dspylite.errors import ModuleError
from dspylite.runtime.bridge import call_async
from dspylite.runtime.settings import pin, settings
from dspylite.runtime.threads import is_async
from dspylite.runtime.workers import hand_over

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Program)


def asyncify(program: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """Return an async function that runs a sync program in a worker thread.

    The thread sees the caller's context, with the settings fixed at the moment of the call. At most
    `settings.async_max_workers` (40) run at once per event loop; an asyncified call made inside
    another is never blocked by it. A module awaited natively with `acall` needs no thread at all.

    Args:
        program: A module or any function.

    Raises:
        ModuleError: `program` is an async function, which can be awaited as it is.

    Example:
        >>> import anyio
        >>> anyio.run(asyncify(len), "four")
        4
    """
    if is_async(program):
        raise ModuleError(f"`{_name(program)}` is async already; await it as it is.")
    if not callable(program):
        raise ModuleError(f"`asyncify` takes a module or a function, not {program!r}.")

    async def awaitable(*args: P.args, **kwargs: P.kwargs) -> T:
        # Also in the items of a batch: a program made for threads may call back to its loop.
        given = (settings.copy(), program, args, kwargs)
        return cast("T", await hand_over(_pinned, given, {}, on_daemon=False))

    try:
        functools.update_wrapper(awaitable, program)
    except (AttributeError, TypeError):
        pass  # a module has no name and docstring of its own to take over
    return awaitable


def _pinned(values: Mapping[str, Any], program: Callable[..., T], args: Any, kwargs: Any) -> T:
    pin(values)  # in the call's own copy of the context
    return program(*args, **kwargs)


@overload
def syncify(program: M, in_place: bool = ...) -> M: ...


@overload
def syncify(program: Callable[P, Awaitable[T]], in_place: bool = ...) -> Callable[P, T]: ...


@overload
def syncify(program: T, in_place: bool = ...) -> T: ...


def syncify(program: Any, in_place: bool = True) -> Any:
    """Return an async program in a form that sync code can call.

    Works on a plain thread, in a worker thread, and inside a running event loop such as a
    notebook's, which stands still meanwhile. No event loop is patched. A module that has `aforward`
    alone can be called without this.

    Args:
        program: An async function, or a module with `aforward`.
        in_place: Whether a module is changed itself; otherwise a shallow copy is.

    Raises:
        ModuleError: `program` is neither.

    Example:
        >>> async def double(x: int) -> int:
        ...     return 2 * x
        >>> syncify(double)(4)
        8
    """
    if not hasattr(program, "aforward"):
        if not is_async(program):
            raise ModuleError(
                f"`{_name(program)}` is neither an async function nor a module with `aforward`."
            )

        @functools.wraps(program)
        def blocking(*args: Any, **kwargs: Any) -> Any:
            return call_async(program, *args, **kwargs)

        return blocking
    target = program if in_place else copy.copy(program)
    target.forward = functools.partial(call_async, target.aforward)
    return target


def _name(program: Any) -> str:
    return getattr(program, "__qualname__", None) or type(program).__name__
