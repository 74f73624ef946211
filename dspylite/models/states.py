"""A language model as plain data, without secrets, and made anew from such data.

What a file says is not taken on trust: neither an endpoint, to which it would send the prompts, nor
a class. Not here: files (`programs/saving.py`).
"""

from __future__ import annotations

import builtins
import inspect
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import dspylite.errors as error_tree
from dspylite.errors import DSPyError, SavingError
from dspylite.models.breaker import CircuitBreaker
from dspylite.models.knowledge import Price
from dspylite.models.policies import POLICY_NAMES, Policies
from dspylite.runtime.imports import class_at
from dspylite.schema.plain import plain
from dspylite.schema.secrets import saved_params, saved_url

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLASS_KEY = "_dspy_lm_class"
"""Where DSPy writes the class of an LM."""

DSPY_LM = "dspy.clients.lm.LM"
"""What DSPy calls its own LM, and so do we, so that each reads what the other writes."""

BUILT_IN: dict[str, type[Any]] = {}
"""The LM classes that need no trust, by the name in the file; filled where they are defined."""

_OF_DSPY = ("finetuning_model", "launch_kwargs", "train_kwargs", "prompt_cache", "async_engine")
_ENGINES = ("auto", "direct", "litellm")  # must match `models/engines.py`

_HARMLESS = frozenset(
    """
    model model_type cache temperature max_tokens max_completion_tokens top_p top_k min_p n stop
    seed presence_penalty frequency_penalty repetition_penalty logit_bias logprobs top_logprobs
    response_format reasoning_effort reasoning verbosity thinking parallel_tool_calls modalities
    service_tier user timeout max_response_bytes deadline_s rollout_id drop_params api_version
    extra_body use_developer_role engine capabilities price num_retries
    """.split()
) | (POLICY_NAMES - {"middleware"})
"""What is taken from a file that nobody vouches for: it changes the answer, not who is asked.

A list of what is allowed, because providers have ever more ways to name an address.
"""
_NAMES_A_PLACE = re.compile(
    r"url|uri|host|endpoint|proxy|proxies|server|webhook|callback|(^|_)base|model_list|fallback",
    re.IGNORECASE,
)


@runtime_checkable
class HasState(Protocol):
    """What can be saved as data."""

    def dump_state(self) -> dict[str, Any]:
        """Return plain data from which it can be made anew."""
        ...


def dump_lm(lm: Any, kwargs: Mapping[str, Any], policies: Policies, price: Price | None) -> Any:
    """Return the state of an LM: its parameters without secrets, its policies as data.

    Raises:
        SavingError: A parameter is no data.
    """
    cls = type(lm)
    named = next((path for path, known in BUILT_IN.items() if known is cls), None)
    state: dict[str, Any] = {
        CLASS_KEY: named or f"{cls.__module__}.{cls.__qualname__}",
        "model": saved_url(lm.model),
        "model_type": lm.model_type,
        "cache": lm.cache,
    }
    kept, left_out = saved_params(kwargs)
    state.update({name: plain(value, f"LM({name}=)") for name, value in kept.items()})
    if state["model"] != lm.model:
        left_out.append("model (a part)")
    if told := [name for name in left_out if name != "api_key"]:
        logger.warning(
            "not saved, because secrets may be in it: %s of %r; give it again after loading",
            ", ".join(told),
            state["model"],
        )
    state.update(_policies_as_data(policies))
    if price is not None:
        # Twelve digits, so that 0.15 comes back as 0.15.
        each = (price.input_usd * 1e6, price.output_usd * 1e6)
        state["price"] = [float(f"{usd:.12g}") for usd in each]
    return state


def _policies_as_data(policies: Policies) -> dict[str, Any]:
    usual = Policies()
    state: dict[str, Any] = {}
    for name in sorted(POLICY_NAMES | {"num_retries"}):
        value = getattr(policies, name)
        if value == getattr(usual, name):
            continue
        if name == "middleware":
            raise SavingError(
                f"`LM(middleware=)` holds {value!r}, which no file can hold; save "
                "`lm.copy(middleware=None)`, and give it again after loading."
            )
        if name == "fallbacks":
            value = [_dumped_fallback(lm) for lm in value]
        elif name == "fallback_on":
            value = [_name_of_error(cls) for cls in value]
        elif isinstance(value, CircuitBreaker):
            value = _breaker_as_data(value)
        state[name] = plain(value, f"LM({name}=)")
    return state


def _dumped_fallback(lm: Any) -> dict[str, Any]:
    if not isinstance(lm, HasState):
        raise SavingError(f"`LM(fallbacks=)` holds {lm!r}, which has no `dump_state()`.")
    return lm.dump_state()


def _name_of_error(cls: type[BaseException]) -> str:
    if _errors().get(cls.__name__) is not cls:
        raise SavingError(
            f"`LM(fallback_on=)` holds `{cls.__qualname__}`, an error class of your own, which a "
            "file cannot name; save `lm.copy(fallback_on=None)`."
        )
    return cls.__name__


def _errors() -> dict[str, type[BaseException]]:
    """Return the error classes that a file can name: Python's and ours."""
    found = {**vars(builtins), **vars(error_tree)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }


_BREAKER = ("failure_ratio", "window_s", "min_calls", "cool_down_s", "max_cool_down_s")


def _breaker_as_data(breaker: CircuitBreaker) -> dict[str, Any]:
    if type(breaker) is not CircuitBreaker:
        raise SavingError(
            f"`LM(circuit_breaker=)` is {breaker!r}, of a class of your own, which no file can "
            "hold; save `lm.copy(circuit_breaker=None)`."
        )
    return {name: getattr(breaker, name) for name in _BREAKER}


def load_lm(root: type[T], cls: type[T], state: Any, *, trusted: bool) -> T:
    """Make an LM from its state.

    Args:
        root: The class of all LMs; asked for itself it gives the one that the state names.
        cls: The class that was asked.
        state: As `dump_lm` returns it, or DSPy.
        trusted: Whether the state may name an endpoint and a class of the user's.

    Raises:
        SavingError: It is no state of an LM, or names a class without being trusted.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise SavingError(f"The state of an LM is a dict of its parameters, not {state!r:.200}.")
    state = dict(state)
    path = state.pop(CLASS_KEY, None) or DSPY_LM
    if cls is root:
        cls = _named_class(root, path, trusted=trusted)
        own: Any = inspect.getattr_static(cls, "load_state")
        if own is not inspect.getattr_static(root, "load_state"):
            accepts = "allow_custom_lm_class" in inspect.signature(own.__func__).parameters
            load: Any = getattr(cls, "load_state")  # noqa: B009  # `T` is not known to have it
            made: T = load(state, **({"allow_custom_lm_class": trusted} if accepts else {}))
            return made
    elif path not in BUILT_IN and path != f"{cls.__module__}.{cls.__qualname__}":
        raise SavingError(
            f"The state is that of a `{path}` and not of a `{cls.__qualname__}`; load it by "
            "`BaseLM.load_state(state, allow_custom_lm_class=True)`, if you trust it."
        )
    params = _params(root, state, trusted=trusted)
    try:
        return cls(**params)
    except (DSPyError, TypeError) as error:
        raise SavingError(f"The saved LM cannot be made: {error}") from error


def _named_class(root: type[T], path: Any, *, trusted: bool) -> type[T]:
    if (known := BUILT_IN.get(path) if isinstance(path, str) else None) is not None:
        return known
    if not trusted:
        raise SavingError(
            f"The state names a class of its own for the LM, {path!r:.200}, which was not "
            "imported. If you trust whoever wrote it, load it with `allow_unsafe_lm_state=True` "
            "(of an LM's own `load_state`: `allow_custom_lm_class=True`)."
        )
    found = class_at(str(path))
    if not issubclass(found, root):
        raise SavingError(f"`{path}` is no LM; its class must come from `{root.__name__}`.")
    return found


def _params(root: type[Any], state: dict[str, Any], *, trusted: bool) -> dict[str, Any]:
    """Return the parameters in a state that are taken, telling which are not."""
    params = {name: value for name, value in state.items() if value is not None}
    ignored = [name for name in _OF_DSPY if params.pop(name, None)]
    if "finetuning_model" in state and params.get("num_retries") == 3:
        del params["num_retries"]  # DSPy writes its default out, and ours does more
    if params.get("engine") not in (None, *_ENGINES):
        ignored.append("engine")
        del params["engine"]
    if ignored:
        logger.warning("not part of this runtime and ignored: %s", ", ".join(sorted(ignored)))
    model = params.get("model")
    if not isinstance(model, str):
        raise SavingError(f"The state of an LM must name its `model`, not {model!r:.200}.")
    if not trusted:
        params = harmless_params(params, f"the LM {model!r}")
    if (fallbacks := params.get("fallbacks")) is not None:
        if not isinstance(fallbacks, list):
            raise SavingError(f"`fallbacks` must be a list of states, not {fallbacks!r:.200}.")
        params["fallbacks"] = [load_lm(root, root, each, trusted=trusted) for each in fallbacks]
    if (names := params.get("fallback_on")) is not None:
        params["fallback_on"] = _named_errors(names)
    if isinstance(breaker := params.get("circuit_breaker"), dict):
        try:
            params["circuit_breaker"] = CircuitBreaker(**breaker)
        except (DSPyError, TypeError) as error:
            raise SavingError(f"The saved `circuit_breaker` cannot be made: {error}") from error
    return params


def harmless_params(
    params: Mapping[str, Any], where: str, also: Collection[str] = ()
) -> dict[str, Any]:
    """Return the request parameters in a file that are taken though nobody vouches for it.

    Which are not is logged: an endpoint could be in them.

    Args:
        params: All that the file says.
        where: Whose they are, for the log.
        also: Names that are harmless here, beside those that are everywhere.

    Raises:
        SavingError: The model is named by an address.
    """
    model = params.get("model")
    if isinstance(model, str) and "://" in model:
        raise SavingError(
            f"The state names an endpoint as its model, {model!r:.200}. If you trust whoever "
            "wrote it, load it with `allow_unsafe_lm_state=True`."
        )
    kept = {
        name: value for name, value in params.items() if name in also or _is_harmless(name, value)
    }
    if refused := sorted(params.keys() - kept.keys()):
        logger.warning(
            "not taken from the saved state of %s: %s. An endpoint could be in it, to which your "
            "prompts would go; set it by hand, or, if you trust whoever wrote the state, load it "
            "with `allow_unsafe_lm_state=True`.",
            where,
            ", ".join(refused),
        )
    return kept


def _is_harmless(name: str, value: Any) -> bool:
    return name in _HARMLESS and (name != "extra_body" or not _names_a_place(value, 0))


def _names_a_place(value: Any, depth: int) -> bool:
    if isinstance(value, str):
        return "://" in value
    if depth > 16:  # deeper than any provider's parameter
        return True
    if isinstance(value, Mapping):
        return any(
            _NAMES_A_PLACE.search(str(name)) or _names_a_place(each, depth + 1)
            for name, each in value.items()
        )
    if isinstance(value, Sequence):
        return any(_names_a_place(each, depth + 1) for each in value)
    return False


def _named_errors(names: Any) -> tuple[type[BaseException], ...]:
    known = _errors()
    listed: list[Any] = names if isinstance(names, list) else [names]
    for name in listed:
        if not isinstance(name, str) or name not in known:
            raise SavingError(f"`fallback_on` names {name!r:.200}, which is no error known here.")
    return tuple(known[name] for name in listed)
