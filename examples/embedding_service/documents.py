"""What a document is, and how one is read from the body of a request.

Not here: the length of a body, which is checked while it arrives (`app.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message

from pydantic import BaseModel, ConfigDict, ValidationError

from examples.embedding_service.errors import InvalidInputError, UnsupportedTypeError

MAX_TITLE_CHARS = 200
MAX_METADATA = 32
MAX_METADATA_CHARS = 1_000
_MAX_HEAD_BYTES = 4_096  # of a form's part; the time to read one grows with its square
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A checked document of one user."""

    user: str
    text: str = field(repr=False)
    title: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def document_id(self) -> str:
        """The SHA-256 of the text: equal texts of a user are one document."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)

    text: str
    title: str = ""
    metadata: dict[str, str] = {}


def read_document(user: str, content_type: str, raw: bytes, title: str = "") -> Document:
    """Read a document from a body: JSON, plain text or a form with a file.

    Args:
        user: Whose it will be.
        content_type: As the request has it.
        raw: The body.
        title: Of a body that cannot carry one.

    Raises:
        UnsupportedTypeError: The body is of another kind.
        InvalidInputError: It is empty, not UTF-8, or has a part that cannot be used.
    """
    head = Message()
    head["content-type"] = content_type
    kind = head.get_content_type()
    if kind == "application/json":
        try:
            body = _Body.model_validate_json(raw)
        except ValidationError as error:
            raise InvalidInputError(_faults(error)) from None
        return checked(user, body.text, body.title, body.metadata)
    if kind == "text/plain" and content_type:
        return checked(user, _decoded(raw), title, {})
    if kind == "multipart/form-data":
        parts = _form(str(head.get_param("boundary", "")), raw)
        if "file" not in parts:
            raise InvalidInputError("The form has no part named `file`.")
        filename, content = parts["file"]
        named = _decoded(parts["title"][1]) if "title" in parts else title or filename
        return checked(user, _decoded(content), named, {})
    raise UnsupportedTypeError(
        "Send `application/json`, `text/plain` or `multipart/form-data` with a part `file`."
    )


def checked(user: str, text: str, title: str, metadata: Mapping[str, str]) -> Document:
    """Return the document.

    Raises:
        InvalidInputError: A part of it cannot be stored or shown.
    """
    for what, value in [("text", text), ("title", title), *metadata.items()]:
        _check_characters(what, value)
    if not text.strip():
        raise InvalidInputError("The document is empty.", code="empty")
    if len(title) > MAX_TITLE_CHARS:
        raise InvalidInputError(f"`title` is longer than {MAX_TITLE_CHARS} characters.")
    if len(metadata) > MAX_METADATA:
        raise InvalidInputError(f"`metadata` has more than {MAX_METADATA} entries.")
    for name, value in metadata.items():
        if not _NAME.fullmatch(name):
            raise InvalidInputError(
                "A name in `metadata` has at most 64 letters, digits, `_`, `.` and `-`."
            )
        if len(value) > MAX_METADATA_CHARS:
            raise InvalidInputError(
                f"`metadata` has a value longer than {MAX_METADATA_CHARS} characters."
            )
    # Shown in one line, wherever it came from.
    return Document(user=user, text=text, title=" ".join(title.split()), metadata=dict(metadata))


def check_question(text: str, max_chars: int = 4_000) -> str:
    """Return the text of a search.

    Raises:
        InvalidInputError: It is empty, too long or holds what no document can hold.
    """
    _check_characters("q", text)
    if not text.strip():
        raise InvalidInputError("`q` is empty.", code="empty")
    if len(text) > max_chars:
        raise InvalidInputError(f"`q` is longer than {max_chars} characters.")
    return text


def _check_characters(what: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"`{what:.64}` holds half of a character (a lone surrogate) at {error.start}.".encode(
                "ascii", "replace"
            ).decode()
        ) from None
    if "\0" in value:
        raise InvalidInputError(f"`{what:.64}` holds a NUL character; is it a binary file?")


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")  # what Windows' editors put in front is no text
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"The document is not UTF-8 text (byte {error.start}).", code="not_utf8"
        ) from None


def _form(boundary: str, raw: bytes) -> dict[str, tuple[str, bytes]]:
    """Return (filename, content) of a form's parts by name.

    Source:
        https://www.rfc-editor.org/rfc/rfc7578
    """
    if not boundary:
        raise InvalidInputError("The form's content type names no boundary.")
    mark = b"\r\n--" + boundary.encode("utf-8", "surrogateescape")
    pieces = (b"\r\n" + raw).split(mark)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise InvalidInputError("The form is cut off: its closing boundary is missing.")
    parts: dict[str, tuple[str, bytes]] = {}
    for piece in pieces[1:-1]:
        head, separator, content = piece.partition(b"\r\n\r\n")
        if not separator:
            raise InvalidInputError("A part of the form has no end of its head.")
        if len(head) > _MAX_HEAD_BYTES:
            raise InvalidInputError("A part of the form has a head that is too long.")
        message = Message()
        for line in head.decode("utf-8", "replace").split("\r\n"):
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-disposition":
                message["content-disposition"] = value.strip()
        name = str(message.get_param("name", "", "content-disposition"))
        filename = str(message.get_filename("") or "")
        parts[name] = (filename, content)
    return parts


def _faults(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    said = f"`{place:.100}`: {first['msg']}" if place else first["msg"]
    return f"The body cannot be used: {said}."
