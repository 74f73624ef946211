"""Who is asking: API keys, and the one local user of a service that has none.

Not here: how often a user may ask (`ratelimit.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping

from examples.embedding_service.errors import ForbiddenError, UnauthorizedError

LOCAL_USER = "local"
MIN_KEY_CHARS = 16
_USER = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]*")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


class ApiKeys:
    """The accepted keys, kept as digests; the keys themselves are forgotten.

    Args:
        text: `user:key` pairs with commas between them. A user may have several keys, so that one
            can be replaced without an outage.

    Raises:
        ValueError: A pair cannot be read, a key is short, or two users share one. No message
            shows a key.
    """

    def __init__(self, text: str) -> None:
        self._users: dict[bytes, str] = {}
        for number, pair in enumerate(filter(None, map(str.strip, text.split(","))), 1):
            user, colon, key = (part.strip() for part in pair.partition(":"))
            if not colon or not _USER.fullmatch(user):
                raise ValueError(
                    f"pair {number} is not `user:key` with a user of letters, digits, "
                    "`_`, `.`, `@` and `-`"
                )
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"the key of `{user}` has other characters than plain letters, digits and "
                    "signs, which no header can carry"
                )
            if len(key) < MIN_KEY_CHARS:
                raise ValueError(f"the key of `{user}` is shorter than {MIN_KEY_CHARS} characters")
            if self._users.setdefault(_digest(key), user) != user:
                raise ValueError(f"the key of `{user}` is another user's as well")
        if text.strip() and not self._users:
            raise ValueError("there are no `user:key` pairs in it")

    def __bool__(self) -> bool:
        return bool(self._users)

    def user_of(self, authorization: str | None) -> str:
        """Return whose key it is, in a time that does not depend on how much of it is right.

        Raises:
            UnauthorizedError: There is no key, or it is nobody's.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("Send your API key as `Authorization: Bearer KEY`.")
        given, found = _digest(key.strip()), None
        for digest, user in self._users.items():  # all of them: leaving early would tell the place
            if hmac.compare_digest(digest, given):
                found = user
        if found is None:
            raise UnauthorizedError("This API key is not known.")
        return found

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._users)} keys)"


def check_local(client: str | None, headers: Mapping[str, str]) -> None:
    """Let in this machine's own programs and pages alone, for a service without keys.

    A page of another site that is open in the user's browser is no friend either: it may post
    blindly (told by `Origin`) or rename itself to this address (told by `Host`).

    Raises:
        ForbiddenError: The request comes from elsewhere.
    """
    host = headers.get("host", "")
    name = re.sub(r":\d+$", "", host)
    origin = headers.get("origin")
    if (
        not is_loopback(client or "")
        or name not in _LOCAL_NAMES
        or (origin is not None and origin != f"http://{host}")
    ):
        raise ForbiddenError(
            "This service has no API keys and therefore serves this machine alone; "
            "set EMBEDDING_SERVICE_API_KEYS to open it."
        )


def is_loopback(address: str) -> bool:
    """Tell whether an address, or `localhost`, can only be this machine."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
