"""`request_cache`: what a user's function returns, kept in the cache of this process.

Not here: calls to models, which the cache knows by itself (`cached.py`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, ParamSpec, TypeVar, cast

from dspylite.abc import Io
from dspylite.errors import InputFieldError
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import current_cache
from dspylite.models.cache.keys import fingerprint
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.settings import settings
from dspylite.runtime.threads import is_async
from dspylite.schema.messages import LMResponse
from dspylite.schema.secrets import is_secret

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def request_cache(
    cache_arg_name: str | None = None,
    ignored_args_for_cache_key: Sequence[str] | None = None,
    enable_memory_cache: bool = True,
    *,
    maxsize: int | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Answer calls of a sync or async function from the cache, where equal calls were made before.

    Calls are equal if the function is, by its name and its code, and all its arguments, however
    they are passed; what it takes from a function around it counts as an argument, a global
    variable does not. Secrets among them, such as `api_key`, are part of the key as salted
    fingerprints, and so is `settings.cache_namespace`. Results are kept if they come back from JSON
    as they went. Others are returned and not kept, nor are those of calls with arguments that have
    no form in JSON, with one warning in the log; neither is None. A failure is never kept.
    `configure_cache` turns it off.

    Args:
        cache_arg_name: The argument that holds all that the result depends on, a dict. None: all
            arguments count.
        ignored_args_for_cache_key: Arguments, or names in that dict, that the result does not
            depend on, such as `self`.
        enable_memory_cache: Whether results are kept in memory, too, or on disk only.
        maxsize: Accepted from DSPy programs; the cache has its own bounds.

    Raises:
        InputFieldError: It is given no function, or one without an argument of that name.

    Example:
        >>> @request_cache()
        ... def square(x: int) -> int:
        ...     print("computed")
        ...     return x * x
        >>> from dspylite.models.cache.configure import configure_cache
        >>> configure_cache(enable_disk_cache=False)
        >>> square(3), square(x=3)
        computed
        (9, 9)
    """
    del maxsize

    def remember(fn: Callable[P, R]) -> Callable[P, R]:
        remembered = _Remembered(
            fn, cache_arg_name, tuple(ignored_args_for_cache_key or ()), enable_memory_cache
        )

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return run_flow(remembered.plan(BLOCKING, args, kwargs))

        @functools.wraps(fn)
        async def acall(*args: Any, **kwargs: Any) -> Any:
            return await remembered.plan(ASYNC, args, kwargs)

        return cast("Callable[P, R]", acall if is_async(fn) else call)

    return remember


class _Remembered:
    """A function, and how its calls are told apart."""

    def __init__(
        self,
        fn: Callable[..., Any],
        holder: str | None,
        ignored: tuple[str, ...],
        in_memory: bool,
    ) -> None:
        self._fn = fn
        self._holder = holder
        self._ignored = ignored
        self._in_memory = in_memory
        if not inspect.isroutine(fn) or not hasattr(fn, "__qualname__"):
            raise InputFieldError(
                f"`request_cache()` goes around a function or method, not {fn!r:.200}."
            )
        self._name = f"{fn.__module__}.{fn.__qualname__}"
        self._signature = inspect.signature(fn)
        self._code = _identity(fn)
        self._is_warned = False
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values())
        if holder is not None and holder not in self._signature.parameters and not takes_any:
            raise InputFieldError(
                f"`{self._name}` has no argument `{holder}`, which `cache_arg_name` names; it has "
                f"`{self._signature}`."
            )

    async def plan(self, io: Io, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        cache = current_cache()
        key = self._key(cache, args, kwargs) if cache.is_on else None
        found = None if key is None else cache.read(key)
        if found is not None:
            return found
        result = await io.any(self._fn, *args, **kwargs)
        if key is not None and result is not None:
            if _comes_back(result):
                cache.write(key, result, in_memory=self._in_memory)
            else:
                self._warn(f"its result, a {type(result).__name__}, does not come back from JSON")
        return result

    def _key(self, cache: Cache, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:
            return None  # the function itself says best what is wrong
        bound.apply_defaults()
        given: Any = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name)
        if self._holder is not None:
            given = given.get(self._holder)
            if not isinstance(given, Mapping):
                raise InputFieldError(
                    f"`{self._holder}` of `{self._name}` must be a dict, because `cache_arg_name` "
                    f"names it, and is {given!r:.200}."
                )
        around = inspect.getclosurevars(self._fn).nonlocals if inspect.isfunction(self._fn) else {}
        request: dict[str, Any] = {
            "function": self._name,
            "code": self._code,
            "namespace": settings.cache_namespace,
        }
        try:
            for place, values in (("arguments", given), ("around", around)):
                wanted = {name: v for name, v in values.items() if name not in self._ignored}
                secrets = {name: v for name, v in wanted.items() if is_secret(str(name))}
                request[place] = {name: v for name, v in wanted.items() if name not in secrets}
                if secrets:
                    request[f"secret {place}"] = fingerprint(secrets, cache.salt(make=True))
            return cache.cache_key(request)
        except TypeError as error:
            self._warn(f"what it depends on makes no key ({error})")
            return None

    def _warn(self, why: str) -> None:
        if not self._is_warned:
            self._is_warned = True
            logger.warning("what `%s` returns is not cached: %s", self._name, why)


def _identity(fn: Callable[..., Any]) -> str:
    """Tell functions of one name apart, such as those of two scripts, or before and after a change.

    Their constants and names count, their comments and places do not.
    """
    made = hashlib.blake2b(digest_size=16)
    left: list[Any] = [getattr(inspect.unwrap(fn), "__code__", None)]
    for code in left:  # which grows by the functions inside
        if isinstance(code, CodeType):
            inside = [each for each in code.co_consts if isinstance(each, CodeType)]
            plain = [each for each in code.co_consts if not isinstance(each, CodeType)]
            made.update(code.co_code + repr((plain, code.co_names, code.co_varnames)).encode())
            left += inside
    return made.hexdigest()


def _comes_back(value: Any) -> bool:
    """Tell whether the disk would give back what was kept, and not something like it."""
    if isinstance(value, LMResponse) or (isinstance(value, array) and value.typecode == "f"):
        return True
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
