"""What tells one request from all others: its key, and what the key is made from.

Not here: what is kept under a key (`rows.py`), and where.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from dspylite.models.direct.providers import provider_of
from dspylite.schema.messages import LMRequest
from dspylite.schema.secrets import is_secret, without_userinfo

KEY_VERSION = 1
"""Part of every key; raised whenever equal keys could mean different requests."""

_NOT_IN_KEY = frozenset(
    {"api_base", "base_url", "timeout", "max_response_bytes", "stream", "stream_options"}
)
"""The endpoint has a place of its own in the key; the others change no answer."""
_HEADERS = ("headers", "extra_headers")
_WHO_ASKS = frozenset(
    """
    api_key userinfo token client_secret azure_ad_token azure_password zen_api_key
    aws_secret_access_key aws_session_token aws_web_identity_token
    vertex_credentials vertex_ai_credentials
    """.split()
)
"""Secrets that say who asks, by litellm's names. What only looks like one, such as `eos_token`, may
change the answer."""


def key_of(described: Mapping[str, Any]) -> str:
    """Return the key of a request: SHA-256 of its canonical JSON, in hexadecimal.

    The order of names never matters, the order of lists does.

    Args:
        described: The request, made of what JSON can say; pydantic models and classes too.

    Raises:
        TypeError: Something in it has no form in JSON, such as a function, or contains itself.

    Example:
        >>> key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
        True
        >>> key_of({"b": [1, 2]}) == key_of({"b": [2, 1]})
        False
    """
    return hashlib.sha256(_canonical({"version": KEY_VERSION, **described})).hexdigest()


def _in_json(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {"pydantic": _schema(type(value)), "value": value.model_dump(mode="json")}
    if isinstance(value, type) and issubclass(value, BaseModel):
        return {"pydantic": _schema(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"A {type(value).__name__} has no form in JSON.")


@functools.lru_cache(maxsize=512)
def _schema(model: type[BaseModel]) -> Mapping[str, Any]:
    return {"name": model.__qualname__, "schema": model.model_json_schema()}


# Escaped, half a surrogate pair and another half would read like one whole character.
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_in_json
)


def _canonical(value: Any) -> bytes:
    try:
        text = _ENCODER.encode(value)
    except (ValueError, RecursionError, PydanticUserError) as error:
        raise TypeError(f"It has no form in JSON: {type(error).__name__}.") from error
    return text.encode("utf-8", "surrogatepass")


def describe(
    request: LMRequest,
    *,
    kind: str,
    namespace: str | None,
    salt: Callable[[], bytes],
) -> dict[str, Any]:
    """Say all that the answer to a request depends on, in a form to make a key of.

    Secrets are in it as salted fingerprints only. A key given to the LM keeps tenants apart; one
    from the environment is no part of it. A namespace takes the place of the key. Headers, and what
    only has a secret's name, keep requests apart in any case, because they may change the answer.

    Args:
        request: The request, with the parameters that it would be sent with.
        kind: What else tells the model's answers from others, such as the kind of endpoint.
        namespace: `settings.cache_namespace`.
        salt: Gives that of this cache, which makes fingerprints worthless elsewhere.
    """
    params: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    headers: dict[str, Any] = {}
    for name, value in request.params.items():
        if name in _HEADERS:
            headers[name] = value
        elif is_secret(name):
            secrets[name] = value
        elif name not in _NOT_IN_KEY:
            params[name] = value
    endpoint = endpoint_text(request.model, request.params)
    if "@" in endpoint:
        secrets["userinfo"] = endpoint
        endpoint = without_userinfo(endpoint)
    described: dict[str, Any] = {
        "kind": kind,
        "model": request.model,
        "endpoint": endpoint,
        "params": params,
        "messages": request.messages,
    }
    if request.rollout_id is not None:
        described["rollout_id"] = request.rollout_id
    if namespace is not None:
        described["namespace"] = namespace
        secrets = {name: value for name, value in secrets.items() if name not in _WHO_ASKS}
    if secrets:
        described["tenant"] = fingerprint(secrets, salt())
    if headers:
        described["headers"] = fingerprint(headers, salt())
    return described


def fingerprint(secrets: Mapping[str, Any], salt: bytes) -> str:
    """Return what tells secrets from others without telling them.

    Args:
        secrets: By name; a function stands for what it returns.
        salt: Of this cache.
    """
    known = tuple((name, value() if callable(value) else value) for name, value in secrets.items())
    try:
        return _fingerprint(known, salt)
    except TypeError:  # dicts, as headers are, cannot be remembered
        return _fingerprint.__wrapped__(known, salt)


@functools.lru_cache(maxsize=256)  # made anew, it is a tenth of a hit
def _fingerprint(secrets: tuple[tuple[str, Any], ...], salt: bytes) -> str:
    return hashlib.blake2b(_canonical(dict(secrets)), key=salt, digest_size=16).hexdigest()


def endpoint_text(model: str, params: Mapping[str, Any]) -> str:
    """Return the endpoint that a request goes to, as far as it is known before it is sent.

    What the environment says counts, so that another endpoint there is another key here.

    Args:
        model: With its provider in front.
        params: Of the request; `api_base` or `base_url` win over the environment.
    """
    given = params.get("api_base") or params.get("base_url")
    if given:
        return str(given).rstrip("/")
    provider = provider_of(model)
    if provider is not None:
        variables, otherwise = provider.base_variables, provider.default_base or provider.name
    else:
        otherwise, slash, _ = model.partition("/")
        prefix = otherwise.upper()
        # litellm's spellings.
        variables = (f"{prefix}_API_BASE", f"{prefix}_BASE_URL") if slash else ()
    found = next(filter(None, map(os.environ.get, variables)), otherwise)
    return found.rstrip("/")
