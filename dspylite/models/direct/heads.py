"""The heads of HTTP/1.1 messages as text, and back.

Not here: bodies and their framing, which are the standard library's (`blocking.py`).
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LINE_BYTES = 65_536
MAX_HEADERS = 200
"""Both as in other clients; a head beyond them is no head of an answer."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer.

    Attributes:
        status: HTTP status.
        reason: What the server calls it.
        version: 10 or 11.
        headers: Names in lower case; of repeated ones the last.
    """

    status: int
    reason: str
    version: int
    headers: dict[str, str]


def authority_of(scheme: str, host: str, port: int | None) -> str:
    """Write a host as it is asked for: its port is left out where it is the scheme's own.

    Example:
        >>> authority_of("https", "x.example", 443), authority_of("https", "::1", 80)
        ('x.example', '[::1]:80')
    """
    where = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return where if port in {None, _DEFAULT_PORTS.get(scheme)} else f"{where}:{port}"


def head_of(
    method: str,
    target: str,
    *,
    host: str,
    headers: Mapping[str, str],
    body: bytes | None,
) -> bytes:
    r"""Write a request: its head, and the body behind it.

    Args:
        method: `"POST"` or `"GET"`.
        target: Path and query; for a proxy the whole URL.
        host: As `authority_of` writes it; a `host` among the headers takes its place.
        headers: Checked already: names in lower case, no line breaks, ASCII.
        body: None for none.

    Example:
        >>> head_of("GET", "/v1", host="x", headers={"accept": "*/*"}, body=None)
        b'GET /v1 HTTP/1.1\r\nhost: x\r\naccept: */*\r\n\r\n'
    """
    lines = [f"{method} {target} HTTP/1.1"]
    if "host" not in headers:
        lines.append(f"host: {host}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1") + (body or b"")


def read_head(stream: Any) -> Head:
    """Read the head of an answer, skipping what servers say before it (1xx).

    Args:
        stream: Has `readline(limit)`.

    Raises:
        http.client.HTTPException: It is no head of an answer, or none came.
    """
    while True:
        line = _line(stream)
        if not line:
            raise http.client.RemoteDisconnected("the server closed the connection unasked")
        version, _, rest = line.partition(" ")
        code, _, reason = rest.partition(" ")
        if version not in {"HTTP/1.1", "HTTP/1.0"} or not (code.isdecimal() and len(code) == 3):
            raise http.client.BadStatusLine(line[:200])
        headers = _read_headers(stream)
        if not code.startswith("1"):
            return Head(int(code), reason, 11 if version == "HTTP/1.1" else 10, headers)


def _read_headers(stream: Any) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADERS):
        line = _line(stream)
        if not line:
            return headers
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if not colon or not name or name != name.strip():
            raise http.client.HTTPException(f"no header line: {line[:200]!r}")
        if name == "content-length" and headers.get(name, value) != value:
            raise http.client.HTTPException("two content-lengths that differ")
        headers[name] = value
    raise http.client.HTTPException(f"more than {MAX_HEADERS} headers")


def _line(stream: Any) -> str:
    line: bytes = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise http.client.LineTooLong("header line")
    return line.decode("latin-1").rstrip("\r\n")
