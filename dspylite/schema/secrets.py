"""What must not be shown: which parameter is secret by its name, and known secrets in a text.

Not here: the messages themselves (`schema/messages.py`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

REDACTED = "[redacted]"

USER_INFO = re.compile(r"://[^/@\s]+@")
"""The `user:password@` of a URL."""

_SURE_NAME = re.compile(
    r"(^|[_-])(secrets?|passwords?|passwd|passphrase|credentials?|authorization|jwt)$"
    r"|(api|access|private|secret)[_-]?keys?$"  # as in `apiKey`
    r"|(access|auth|refresh|session|bearer)[_-]?tokens?$|client-?secret$|bearer[_-]token",
    re.IGNORECASE,
)
_LIKELY_NAME = re.compile(
    r"(^|[_-])(key|token|headers|auth|bearer|cookies?)$",  # but `sort_key`, `stop_token`
    re.IGNORECASE,
)
_LIKE_A_KEY = re.compile(r"(?=[^\s\d]{0,200}\d)\S{16}")
"""What a key looks like; a guess: a word of 16 characters or more with a digit among them."""
_SECRET_IN_QUERY = re.compile(  # bounded, so that no text takes longer than it is long
    r"([?&][^=?&#\s]{0,50}(?:key|token|secret|password|sig|signature)=)[^&#\s]+", re.IGNORECASE
)
_SECRET_PAIR = re.compile(
    r"(?<=[?&])[^=?&#\s]{0,50}(?:key|token|secret|password|sig|signature)=[^&#\s]*&?",
    re.IGNORECASE,
)
_SCHEMA_WORDS = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})

_MAX_DEPTH = 16
"""Deepest place in a parameter that is looked at; a guess beyond what providers take."""


@functools.lru_cache(maxsize=512)  # asked for each parameter of each call
def is_secret(name: str) -> bool:
    """Tell by its name whether a request parameter holds what nobody may see.

    Example:
        >>> [is_secret(name) for name in ("api_key", "extra_headers", "max_tokens")]
        [True, True, False]
    """
    return bool(_SURE_NAME.search(name) or _LIKELY_NAME.search(name))


def is_secret_attribute(name: str, value: Any) -> bool:
    """Tell by name and value whether an attribute of a program holds what nobody may see.

    A program's own names end in `key` and `token` for other reasons, too. So under such a name only
    a text that looks like a key is one.

    Example:
        >>> is_secret_attribute("api_key", "abc"), is_secret_attribute("sort_key", "name")
        (True, False)
    """
    if not (is_secret(name) and _holds_secret(value)):
        return False
    texts = list(_texts_in(value, 0))
    return bool(texts) and bool(
        _SURE_NAME.search(name) or any(_LIKE_A_KEY.search(text) for text in texts)
    )


def _texts_in(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple) and depth <= _MAX_DEPTH:
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(each, depth + 1)


def without_secrets(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that may go elsewhere: to another model, or to be shown."""
    return {name: value for name, value in params.items() if not is_secret(name)}


def shown_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters as they may be shown: no secrets, also inside of one or in a URL.

    Example:
        >>> shown_params({"api_key": "k", "n": 2, "extra_body": {"token": "t"}})
        {'n': 2, 'extra_body': {'token': '[redacted]'}}
    """
    seen: dict[int, Any] = {}
    return {name: _shown(value, seen) for name, value in without_secrets(params).items()}


def _shown(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    if isinstance(value, str):
        return shown_url(value)
    if not isinstance(value, dict | list | tuple):
        return value
    if depth > _MAX_DEPTH:
        return "…"
    if id(value) not in seen:  # each once, so that what holds itself ends
        seen[id(value)] = "…"
        if isinstance(value, dict):
            seen[id(value)] = {
                name: REDACTED
                if isinstance(name, str) and is_secret(name) and _holds_secret(each)
                else _shown(each, seen, depth + 1)
                for name, each in value.items()
            }
        else:
            seen[id(value)] = [_shown(each, seen, depth + 1) for each in value]
    return seen[id(value)]


def _holds_secret(value: Any) -> bool:
    """Tell a secret from the JSON schema of a tool's parameter that is named like one."""
    if isinstance(value, dict):
        return not _SCHEMA_WORDS & value.keys()
    return isinstance(value, str | bytes | list | tuple)


def saved_params(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters as they may stand in a file, and the names of what was left out.

    Left out is what a name says is secret, at any depth, each text that holds one of these secrets,
    and user and password of a URL, whose rest stays.

    Example:
        >>> saved_params({"api_key": "k", "n": 2, "api_base": "https://me:pw@example.org/v1"})
        ({'n': 2, 'api_base': 'https://example.org/v1'}, ['api_key', 'api_base (a part)'])
    """
    known: list[str] = []
    _collect_secrets(params, known, 0)
    known += [text.partition(" ")[2] for text in known]  # "Bearer" is no part of the secret
    left_out: list[str] = []
    kept = _saved(params, "", [s for s in known if len(s) >= MIN_SECRET_CHARS], left_out, 0)
    return kept, left_out


def _collect_secrets(value: Any, found: list[str], depth: int, *, inside: bool = False) -> None:
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, str):
        if inside:
            found.append(value.strip())
    elif isinstance(value, Mapping):
        for name, each in value.items():
            is_named = isinstance(name, str) and is_secret(name) and _holds_secret(each)
            _collect_secrets(each, found, depth + 1, inside=inside or is_named)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect_secrets(each, found, depth + 1, inside=inside)


_LEFT_OUT: Any = object()


def _saved(value: Any, where: str, known: list[str], left_out: list[str], depth: int) -> Any:
    if isinstance(value, str):
        if any(secret in value for secret in known):
            left_out.append(where)
            return _LEFT_OUT
        url = saved_url(value)
        if url != value:
            left_out.append(f"{where} (a part)")
        return url
    if not isinstance(value, Mapping | list | tuple):
        return value
    if depth > _MAX_DEPTH:
        left_out.append(where)
        return _LEFT_OUT
    if not isinstance(value, Mapping):
        made = [_saved(each, where, known, left_out, depth + 1) for each in value]
        return [each for each in made if each is not _LEFT_OUT]
    kept: dict[Any, Any] = {}
    for name, each in value.items():
        path = f"{where}.{name}" if where else str(name)
        hides = isinstance(name, str) and is_secret(name) and (depth == 0 or _holds_secret(each))
        if hides:
            left_out.append(path)
        elif (found := _saved(each, path, known, left_out, depth + 1)) is not _LEFT_OUT:
            kept[name] = found
    return kept


def saved_url(text: str) -> str:
    """Return a text as it may stand in a file: a URL in it without user, password and keys.

    Example:
        >>> saved_url("https://me:pw@example.org/v1?api-key=k&version=2")
        'https://example.org/v1?version=2'
    """
    return _SECRET_PAIR.sub("", USER_INFO.sub("://", text)) if "://" in text else text


def without_userinfo(text: str) -> str:
    """Hide `user:password@` of a URL."""
    return USER_INFO.sub("://...@", text)


def shown_url(text: str) -> str:
    """Hide `user:password@` of a URL, and what is secret in its query.

    Example:
        >>> shown_url("https://me:pw@example.org/v1?api-key=k&version=2")
        'https://...@example.org/v1?api-key=...&version=2'
    """
    if "://" not in text:
        return text
    return _SECRET_IN_QUERY.sub(r"\1...", without_userinfo(text))


MIN_SECRET_CHARS = 6
"""Shorter "secrets" (a local server's `none`) would blot out ordinary words."""


def redact(text: str, secrets: Iterable[str]) -> str:
    """Replace known secrets in a text, also those that a server echoes back.

    Example:
        >>> redact("bad key sk-abcdefgh", ["sk-abcdefgh"])
        'bad key [redacted]'
    """
    for secret in sorted(secrets, key=len, reverse=True):  # one may be the start of another
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, REDACTED)
    return text


def secrets_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return every string that no error or log may show: the call's own and the environment's."""
    found: list[Any] = []
    # Another thread may take a variable away meanwhile, at which `items` would fail.
    environment = ((name, os.environ.get(name)) for name in os.environ)
    for name, value in (*arguments.items(), *environment):
        if is_secret(name):
            found += value.values() if isinstance(value, Mapping) else [value]
    # A key read from a file may end in a line break, which is quoted otherwise or not at all.
    texts = [
        line.strip() for value in found if isinstance(value, str) for line in value.split("\n")
    ]
    return texts + [text.partition(" ")[2] for text in texts]  # "Bearer" is no part of the secret
