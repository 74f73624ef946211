"""What images, audio and files share: data URIs, the kind of bytes, files that are read.

Not here: fetching (`fetching.py`).
"""

from __future__ import annotations

import binascii
import errno
import os
import re
import stat
import typing
from typing import Any

import pydantic

from dspylite.adapters.types.base import Type
from dspylite.errors import MediaError, clip
from dspylite.schema.secrets import shown_url

MAX_BYTES = 20_000_000
"""Largest image or audio unless `max_bytes` says otherwise; about what providers take."""

MAX_FILE_BYTES = 32_000_000
"""Largest file unless `max_bytes` says otherwise; about what providers take."""

AnyPath = str | os.PathLike[str]

_HEAD = re.compile(r"data:(?P<kind>[^,]*),", re.IGNORECASE)
_MAX_HEAD_CHARS = 200
_KIND = re.compile(r"[a-z0-9!#$&^_.+-]{1,100}/[a-z0-9!#$&^_.+-]{1,100}")
_CHUNK_BYTES = 1_000_000

_EXTENSIONS = {
    "aac": "audio/aac",
    "aif": "audio/aiff",
    "aiff": "audio/aiff",
    "avif": "image/avif",
    "bmp": "image/bmp",
    "css": "text/css",
    "csv": "text/csv",
    "doc": "application/msword",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "epub": "application/epub+zip",
    "flac": "audio/flac",
    "gif": "image/gif",
    "gz": "application/gzip",
    "heic": "image/heic",
    "heif": "image/heif",
    "htm": "text/html",
    "html": "text/html",
    "ico": "image/vnd.microsoft.icon",
    "jpe": "image/jpeg",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "js": "text/javascript",
    "json": "application/json",
    "m4a": "audio/mp4",
    "md": "text/markdown",
    "mov": "video/quicktime",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "mpeg": "video/mpeg",
    "mpg": "video/mpeg",
    "odt": "application/vnd.oasis.opendocument.text",
    "oga": "audio/ogg",
    "ogg": "audio/ogg",
    "opus": "audio/opus",
    "pdf": "application/pdf",
    "png": "image/png",
    "ppt": "application/vnd.ms-powerpoint",
    "pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    "py": "text/x-python",
    "rtf": "application/rtf",
    "svg": "image/svg+xml",
    "tar": "application/x-tar",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "toml": "application/toml",
    "tsv": "text/tab-separated-values",
    "txt": "text/plain",
    "wav": "audio/wav",
    "weba": "audio/webm",
    "webm": "video/webm",
    "webp": "image/webp",
    "xls": "application/vnd.ms-excel",
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "xml": "text/xml",
    "yaml": "application/yaml",
    "yml": "application/yaml",
    "zip": "application/zip",
}
"""Kinds by a file's ending, here and not from the system, so that each machine finds the same."""

_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"%PDF-", "application/pdf"),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
)
_IN_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}
_BRANDS = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"hevc": "image/heic",
    b"mif1": "image/heif",
    b"msf1": "image/heif",
    b"M4A ": "audio/mp4",
    b"M4B ": "audio/mp4",
}


class Media(Type):
    """Base of images, audio and files: frozen, strict, and without their bytes in any `repr`."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except pydantic.ValidationError as error:
            raise MediaError(_reasons(type(self).__name__, error)) from None

    def __str__(self) -> str:
        return repr(self)

    def __repr_args__(self) -> typing.Iterable[tuple[str | None, Any]]:
        """Name the fields that are set, none in full that may be long or secret."""
        for name, value in super().__repr_args__():
            if value is not None:
                yield name, shown_source(value) if isinstance(value, str) else value


def _reasons(name: str, error: pydantic.ValidationError) -> str:
    """Say what is wrong in our words where they are ours, else in pydantic's."""
    said: list[str] = []
    for each in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in each["loc"])
        text = each["msg"].removeprefix("Value error, ")
        said.append(text if not place or each["type"] == "value_error" else f"`{place}`: {text}")
    return f"{name}: {'; '.join(said)}"


def shown_source(source: str) -> str:
    """Return a source as it may be shown: without the bytes, without secrets of a URL.

    Example:
        >>> shown_source("data:image/png;base64,iVBORw0KGgo=")
        'data:image/png;base64,… (12 characters)'
    """
    head = _HEAD.match(source, 0, _MAX_HEAD_CHARS)
    if head is not None:
        return f"{head[0]}… ({len(source) - len(head[0])} characters)"
    return clip(shown_url(source), 200)


def data_uri(kind: str, data: bytes) -> str:
    """Write bytes as a data URI.

    Example:
        >>> data_uri("text/plain", b"hi")
        'data:text/plain;base64,aGk='
    """
    return f"data:{kind};base64,{base64_text(data)}"


def base64_text(data: bytes) -> str:
    """Write bytes in base64, in one line."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def is_data_uri(source: str) -> bool:
    """Tell whether a text claims to be a data URI."""
    return source[:5].lower() == "data:"


def split_data_uri(uri: str, *, max_bytes: int, wanted: str) -> tuple[str, str]:
    """Check a data URI.

    Args:
        uri: The whole of it.
        max_bytes: Most bytes it may hold.
        wanted: What it should be, in words for an error.

    Returns:
        Its kind, such as `"image/png"`, and its base64.

    Raises:
        MediaError: It does not have the form `data:<kind>;base64,<data>`, or holds too much.
    """
    head = _HEAD.match(uri, 0, _MAX_HEAD_CHARS)
    kind, *options = head["kind"].split(";") if head else [""]
    kind = kind.strip().lower()
    if head is None or not is_kind(kind) or options[-1:] not in (["base64"], ["BASE64"]):
        raise MediaError(
            f"{clip(uri[:80])!r} is no data URI of {wanted}: its form is "
            "`data:<type>/<subtype>;base64,<data>`."
        )
    encoded = uri[head.end() :]
    check_base64(encoded, max_bytes=max_bytes, wanted=wanted)
    return kind, encoded


def check_base64(text: str, *, max_bytes: int, wanted: str) -> None:
    """Refuse what is no base64, or too much of it.

    Raises:
        MediaError: It is.
    """
    if len(text) // 4 * 3 > max_bytes + 2:
        raise too_large(wanted, max_bytes)
    try:
        size = len(binascii.a2b_base64(text.encode("ascii"), strict_mode=True))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise MediaError(f"the data of {wanted} is no base64: {_base64_fault(error)}.") from None
    if size > max_bytes:
        raise too_large(wanted, max_bytes)


def _base64_fault(error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"it holds {error.object[error.start]!r}"
    return str(error)


def too_large(wanted: str, max_bytes: int) -> MediaError:
    """Make the error of what is larger than it may be."""
    return MediaError(
        f"{wanted} is larger than {max_bytes:,} bytes. Make it smaller, or allow more by "
        "`max_bytes=` of the `from_...` methods."
    )


def check_size(data: bytes, *, max_bytes: int, wanted: str) -> None:
    """Refuse more bytes than are allowed.

    Raises:
        MediaError: There are.
    """
    if len(data) > max_bytes:
        raise too_large(wanted, max_bytes)


def kind_of_bytes(data: bytes) -> str | None:
    r"""Tell by its first bytes what something is; None where they do not say.

    Example:
        >>> kind_of_bytes(b"GIF89a..."), kind_of_bytes(b"RIFF\0\0\0\0WAVEfmt "), kind_of_bytes(b"?")
        ('image/gif', 'audio/wav', None)
    """
    for start, kind in _STARTS:
        if data.startswith(start):
            return kind
    if data.startswith(b"RIFF"):
        return _IN_RIFF.get(data[8:12])
    if data[4:8] == b"ftyp":
        return _brand(data)
    if data.startswith(b"BM") and len(data) >= 26 and data[6:10] == b"\0\0\0\0":
        return "image/bmp"
    if data.startswith(b"\x1aE\xdf\xa3") and b"webm" in data[:64]:
        return "audio/webm"
    if data.startswith(b"FORM") and data[8:11] == b"AIF":
        return "audio/aiff"
    if len(data) >= 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06:
        return "audio/mpeg"  # a frame of MP3 without tags; AAC's have no layer
    return None


def _brand(data: bytes) -> str | None:
    """Tell by the brands of an ISO media file; a general one may stand before the telling one."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
    kinds = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    telling = [kind for kind in kinds if kind != "image/heif"]
    return next(iter(telling or kinds), None)


def kind_of_name(path: AnyPath) -> str | None:
    """Tell by its ending what a file is; None where it does not say.

    Example:
        >>> kind_of_name("a/photo.JPG"), kind_of_name("README")
        ('image/jpeg', None)
    """
    ending = os.path.splitext(os.fspath(path))[1]
    return _EXTENSIONS.get(ending[1:].lower())


def read_file(path: AnyPath, *, max_bytes: int) -> bytes:
    """Read a regular file; a pipe, device or directory is refused and never waited for.

    Raises:
        MediaError: It is none, cannot be read, or is larger than `max_bytes`.
    """
    check_max_bytes(max_bytes)
    name = repr(os.fspath(path))
    try:
        # A pipe without a writer would block `open`; what is there may change after `stat`.
        _check_regular(os.stat(path), name)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            _check_regular(found, name)
            if found.st_size > max_bytes:
                raise too_large(f"the file {name}", max_bytes)
            data = _read_at_most(file, max_bytes + 1)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise MediaError(f"There is no file {name}.") from None
        raise MediaError(f"The file {name} cannot be read: {error.strerror}.") from None
    except MediaError:
        raise
    except ValueError:  # a NUL in it
        raise MediaError(f"{name} is no path.") from None
    check_size(data, max_bytes=max_bytes, wanted=f"the file {name}")
    return data


def _read_at_most(file: typing.BinaryIO, count: int) -> bytes:
    """Read in pieces, for `read` makes room for all it is asked for."""
    data = bytearray()
    while len(data) < count and (chunk := file.read(min(_CHUNK_BYTES, count - len(data)))):
        data += chunk
    return bytes(data)


def _check_regular(found: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"{name} is no regular file, so it is not read.")


def check_max_bytes(max_bytes: int) -> None:
    """Refuse a limit that is none.

    Raises:
        MediaError: It is no positive whole number.
    """
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise MediaError(f"`max_bytes` must be a positive whole number, not {max_bytes!r}.")


def is_kind(text: str) -> bool:
    """Tell whether a text is a MIME type without options."""
    return _KIND.fullmatch(text) is not None


def kind_from(found: str | None) -> str:
    """Return the kind in a content type or what a user gave as one, without its options.

    Raises:
        MediaError: It is none.

    Example:
        >>> kind_from("Image/PNG; charset=binary")
        'image/png'
    """
    kind = (found or "").partition(";")[0].strip().lower()
    if not is_kind(kind):
        raise MediaError(f"{clip(str(found), 80)!r} is no MIME type such as `image/png`.")
    return kind
