"""Which endpoint and key a model name stands for, by litellm's usual environment variables.

Not here: what is sent there (`engine.py`).
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspylite.errors import LMAuthError, LMConfigurationError

_OPENAI_BASE = "https://api.openai.com/v1"
_OPENAI_NAMES = ("gpt-", "chatgpt-", "o1", "o3", "o4", "text-embedding-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An OpenAI-compatible provider, as the first part of a model name says it.

    Attributes:
        name: The first part.
        key_variable: Environment variable of the key.
        base_variables: Environment variables of the endpoint; the first that is set counts.
        default_base: The endpoint without any; None where everybody has one of their own.
    """

    name: str
    key_variable: str
    base_variables: tuple[str, ...]
    default_base: str | None = None


_PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            name="openai",
            key_variable="OPENAI_API_KEY",
            base_variables=("OPENAI_BASE_URL", "OPENAI_API_BASE"),
            default_base=_OPENAI_BASE,
        ),
        Provider(
            name="hosted_vllm",
            key_variable="HOSTED_VLLM_API_KEY",
            base_variables=("HOSTED_VLLM_API_BASE",),
        ),
        Provider(
            name="litellm_proxy",
            key_variable="LITELLM_PROXY_API_KEY",
            base_variables=("LITELLM_PROXY_API_BASE",),
        ),
        Provider(
            name="lm_studio",
            key_variable="LM_STUDIO_API_KEY",
            base_variables=("LM_STUDIO_API_BASE",),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a request goes, and with whose key.

    Attributes:
        base: URL without a slash at its end.
        key: None where none is known; a server of one's own may need none.
        model: The name as the endpoint knows it.
    """

    base: str
    key: str | None
    model: str

    def __repr__(self) -> str:
        return f"Endpoint({self.base!r}, model={self.model!r})"


def provider_of(model: str) -> Provider | None:
    """Return the OpenAI-compatible provider that a model name stands for; None for others.

    Example:
        >>> provider_of("hosted_vllm/qwen").name, provider_of("gpt-4o-mini").name
        ('hosted_vllm', 'openai')
        >>> provider_of("anthropic/claude-sonnet-4-5") is None
        True
    """
    first, slash, _ = model.partition("/")
    if slash:
        return _PROVIDERS.get(first)
    return _PROVIDERS["openai"] if model.startswith(_OPENAI_NAMES) else None


def endpoint_of(model: str, params: Mapping[str, Any]) -> Endpoint:
    """Settle where a request goes.

    Args:
        model: With its provider in front.
        params: Of the request; `api_base` or `base_url`, and `api_key`, win over the environment.

    Raises:
        LMConfigurationError: The model's provider is not spoken here, or has no endpoint known.
        LMAuthError: OpenAI itself would be asked without a key.
    """
    provider = provider_of(model)
    if provider is None:
        raise LMConfigurationError(
            f"The direct engine speaks to OpenAI-compatible servers: {', '.join(_PROVIDERS)}. "
            f"For {model!r} use `engine='litellm'`, or write 'openai/<name>' with `api_base=` if "
            "its server is compatible.",
            model=model,
        )
    given = params.get("api_base") or params.get("base_url")
    from_environment = (os.environ.get(name) for name in provider.base_variables)
    base = given or next(filter(None, from_environment), None) or provider.default_base
    if not base:
        raise LMConfigurationError(
            f"{model}: no endpoint is known. Give `api_base=`, or set "
            f"`{provider.base_variables[0]}`.",
            model=model,
            provider=provider.name,
        )
    if "@" in urllib.parse.urlsplit(str(base)).netloc:
        raise LMConfigurationError(
            f"{model}: the endpoint's URL holds a user and a password. Leave them out, and give "
            "`extra_headers={'authorization': 'Basic ...'}`.",
            model=model,
        )
    key: Any = params.get("api_key")
    if callable(key):
        key = key()
    key = key or os.environ.get(provider.key_variable)
    if not key and base == _OPENAI_BASE:
        raise LMAuthError(
            f"{model}: no key. Give `api_key=`, or set `{provider.key_variable}`.",
            model=model,
            provider=provider.name,
        )
    name = model.removeprefix(f"{provider.name}/")
    return Endpoint(base=str(base).rstrip("/"), key=key.strip() if key else None, model=name)
