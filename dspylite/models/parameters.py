"""Checks of what a user gives an LM or an embedder, so that mistakes are found before any request.

Not here: what the parameters do.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Mapping
from typing import Any

from dspylite.errors import LMConfigurationError
from dspylite.schema.secrets import without_userinfo


def check_params(params: Mapping[str, Any]) -> None:
    """Refuse request parameters that no request could be made with; None is not given.

    Raises:
        LMConfigurationError: One of them cannot work.
    """
    check_url(params.get("api_base") or params.get("base_url"))
    check_numbers(
        **{
            name: params.get(name)
            for name in ("temperature", "max_tokens", "timeout", "max_response_bytes", "deadline_s")
        }
    )
    for name in ("headers", "extra_headers", "extra_body"):
        given = params.get(name)
        if given is not None and not isinstance(given, Mapping):
            raise LMConfigurationError(f"`{name}` must be a dict, not a {type(given).__name__}.")
    key = params.get("api_key")
    if not (key is None or isinstance(key, str) or callable(key)):
        raise LMConfigurationError(
            f"`api_key` must be a text, or a function that returns one, not a {type(key).__name__}."
        )


def check_url(url: Any) -> None:
    """Refuse an endpoint that no request can be sent to; None is the provider's own.

    Raises:
        LMConfigurationError: It is no http or https URL with a host.
    """
    if url is None:
        return
    try:
        parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    except ValueError:  # such as an unclosed bracket
        parts = None
    if parts is None or parts.scheme not in {"http", "https"} or not parts.netloc:
        raise LMConfigurationError(
            "`api_base` must be a URL such as 'http://localhost:8000/v1', not "
            f"{without_userinfo(url) if isinstance(url, str) else url!r}."
        )


def check_numbers(**numbers: Any) -> None:
    """Refuse parameters that no provider could take; None is not given.

    Raises:
        LMConfigurationError: One is no number, or too small.
    """
    for name, value in numbers.items():
        if value is None:
            continue
        least = 0 if name == "temperature" else 1e-9
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value < math.inf:
            bound = "0 or more" if name == "temperature" else "more than 0"
            raise LMConfigurationError(f"`{name}` must be a number of {bound}, not {value!r}.")


def copied(value: Any) -> Any:
    """Copy what a parameter can be changed in; a client or function among them is shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value
