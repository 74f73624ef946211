"""What must not be shown: how known secrets are found in a text and replaced.

Not here: which parameter is one by its name (`schema/messages.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from dspylite.schema.messages import REDACTED, is_secret

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
