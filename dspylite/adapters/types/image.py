"""`Image`: a picture as a URL or as its own bytes.

Not here: fetching (`fetching.py`), and what images share with other media (`media.py`).
"""

from __future__ import annotations

import io
import os
import re
import urllib.parse
import warnings
from collections.abc import Mapping
from typing import Any, Self, cast

import pydantic

from dspylite.adapters.types.media import (
    MAX_BYTES,
    AnyPath,
    Media,
    check_size,
    data_uri,
    is_data_uri,
    kind_of_bytes,
    kind_of_name,
    read_file,
    shown_source,
    split_data_uri,
)
from dspylite.errors import MediaError

KINDS = ("image/", "application/pdf")
"""What may stand where an image is wanted; several providers read a PDF there."""

MAX_URL_CHARS = 16_384
"""Longest URL that is no data URI."""

_WEB = frozenset({"http", "https"})
_SCHEMES = _WEB | {"gs"}
_UNSET: Any = object()
_UNFIT_IN_URL = re.compile(r"[\x00-\x20\x7f]")


class Image(Media):
    """An image for a model to look at.

    Nothing is fetched or read here: a URL stays a URL, which the provider follows. Use `from_url`
    to download it and `from_path` to read a file.

    Args:
        source: A URL (`https:`, `http:`, `gs:`), a data URI, the bytes of a PNG, JPEG, GIF, WEBP,
            BMP, TIFF, AVIF, HEIC or PDF, a Pillow image, `{"url": ...}`, or another `Image`.
        download: Deprecated; use `from_url`.
        verify: Deprecated; use `from_url`.
        **data: The field `url`, in the place of `source`.

    Attributes:
        url: The URL or data URI.

    Raises:
        MediaError: It is none of these, or larger than `MAX_BYTES`.

    Example:
        >>> Image("https://example.org/cat.png").format()
        [{'type': 'image_url', 'image_url': {'url': 'https://example.org/cat.png'}}]
        >>> Image(b"GIF89a...")
        Image(url='data:image/gif;base64,… (12 characters)')
    """

    url: str

    model_config = pydantic.ConfigDict(
        str_strip_whitespace=True,
        json_schema_extra={"description": "An image, by its URL or as a data URI."},
    )

    def __init__(
        self,
        source: Any = None,
        /,
        *,
        download: Any = _UNSET,
        verify: Any = _UNSET,
        **data: Any,
    ) -> None:
        is_old = download is not _UNSET or verify is not _UNSET
        if is_old and source is None:
            # Values of models come here by keyword; none of them may start a download.
            raise MediaError(
                "Image: `download` and `verify` go with a positional source only. Use "
                "`Image.from_url(url, verify=...)` to download one."
            )
        if source is not None and "url" in data:
            raise MediaError("Image: give a source or `url`, not both.")
        if is_old:
            warnings.warn(
                "`Image(..., download=, verify=)` is deprecated. Use `Image.from_url(url, "
                "verify=...)` to download an image, `Image.from_path(path)` to read a file.",
                DeprecationWarning,
                stacklevel=2,
            )
        if source is not None:
            data["url"] = source
        is_wanted = download is not _UNSET and bool(download)
        if is_wanted and isinstance(source, str) and _scheme(source.strip()) in _WEB:
            checks = True if verify is _UNSET else bool(verify)
            data["url"] = type(self).from_url(source, verify=checks).url
        super().__init__(**data)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            fields = dict(cast("Mapping[str, Any]", value))
            return {**fields, "url": _reference(fields["url"])} if "url" in fields else fields
        return {"url": _reference(value)}

    def format(self) -> list[dict[str, Any]]:
        """Write the image as a content part."""
        return [{"type": "image_url", "image_url": {"url": self.url}}]

    @classmethod
    def from_url(
        cls,
        url: str,
        verify: bool = True,
        timeout: float | None = 30.0,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> Self:
        """Download an image.

        Whatever host the URL names is asked, private ones included, and redirects are followed:
        check URLs that come from others, or from a model, before they come here.

        Args:
            url: `http:` or `https:`.
            verify: Whether the server's certificate is checked.
            timeout: Seconds for all of it, redirects and body included; None for no limit but the
                deadline of the call in progress.
            max_bytes: Most bytes that are taken.

        Raises:
            MediaError: It is no such URL, or the image is too large.
            MediaFetchError: The server could not be reached in time, refused, or sent no image.
        """
        from dspylite.adapters.types.fetching import fetch  # noqa: PLC0415  # loads HTTP and TLS

        kind, data = fetch(
            url, verify=verify, timeout=timeout, max_bytes=max_bytes, wanted="an image", kinds=KINDS
        )
        return cls.model_construct(url=data_uri(kind, data))

    @classmethod
    def from_path(cls, file_path: AnyPath, *, max_bytes: int = MAX_BYTES) -> Self:
        """Read an image from a file.

        Args:
            file_path: Where it is.
            max_bytes: Most bytes that are read.

        Raises:
            MediaError: It is no readable file of an image, or larger than that.
        """
        data = read_file(file_path, max_bytes=max_bytes)
        kind = kind_of_bytes(data) or kind_of_name(file_path)
        if kind is None or not data or not kind.startswith(KINDS):
            raise MediaError(
                f"{os.fspath(file_path)!r} is no image: it is {_kind_words(kind, data)}."
            )
        return cls.model_construct(url=data_uri(kind, data))

    @classmethod
    def from_file(cls, file_path: AnyPath) -> Self:
        """Read an image from a file; deprecated, use `from_path`."""
        warnings.warn(
            "`Image.from_file` is deprecated; use `Image.from_path`.",
            DeprecationWarning,
            stacklevel=2,
        )
        return cls.from_path(file_path)

    @classmethod
    def from_PIL(cls, pil_image: Any) -> Self:  # noqa: N802  # DSPy's spelling
        """Take a Pillow image; deprecated, use `Image(pil_image)`."""
        warnings.warn(
            "`Image.from_PIL` is deprecated; use `Image(pil_image)`.",
            DeprecationWarning,
            stacklevel=2,
        )
        return cls(pil_image)


def _kind_words(kind: str | None, data: bytes) -> str:
    return "empty" if not data else (kind or "of no known kind")


def _reference(source: Any) -> str:
    """Return the URL or data URI of whatever an image may be made of."""
    if isinstance(source, Mapping):
        fields = dict(cast("Mapping[str, Any]", source))
        if fields.keys() != {"url"} or isinstance(fields["url"], Mapping):
            raise MediaError("A dict of an image has the form `{'url': ...}`.")
        return _reference(fields["url"])
    if isinstance(source, Image):
        return source.url
    if isinstance(source, str):
        return _checked_url(source.strip())
    if isinstance(source, bytes | bytearray | memoryview):
        return _of_bytes(bytes(source))
    if callable(getattr(source, "save", None)) and hasattr(source, "format"):
        return _of_pillow(source)
    if isinstance(source, os.PathLike):
        raise MediaError("A path is no image. Read it with `Image.from_path(path)`.")
    raise MediaError(
        f"An image is made of a URL, a data URI, bytes or a Pillow image, not of "
        f"`{type(source).__name__}`."
    )


def _of_bytes(data: bytes, *, hint: str | None = None) -> str:
    check_size(data, max_bytes=MAX_BYTES, wanted="an image")
    kind = kind_of_bytes(data) or hint
    if kind is None or not kind.startswith(KINDS):
        raise MediaError(
            f"The {len(data):,} bytes are {_kind_words(kind, data)}, no image of a known kind. "
            "Give another kind as a data URI."
        )
    return data_uri(kind, data)


def _of_pillow(image: Any) -> str:
    """Have a Pillow image write itself, in the format it was read from."""
    form = str(image.format or "PNG")
    written = io.BytesIO()
    try:
        image.save(written, format=form)
    except (OSError, ValueError, KeyError) as error:
        raise MediaError(f"The Pillow image cannot be written as {form}: {error}.") from error
    return _of_bytes(written.getvalue(), hint=f"image/{form.lower()}")


def _checked_url(url: str) -> str:
    if is_data_uri(url):
        kind, encoded = split_data_uri(url, max_bytes=MAX_BYTES, wanted="an image")
        if not kind.startswith(KINDS) or not encoded:
            raise MediaError(
                f"{shown_source(url)!r} is no image. Another kind of file is a `File`."
            )
        return url
    if len(url) > MAX_URL_CHARS:
        raise MediaError(f"A URL of {len(url):,} characters is too long; images go as data URIs.")
    scheme = _scheme(url)
    if scheme not in _SCHEMES:
        raise MediaError(
            f"{shown_source(url)!r} is no URL of `http:`, `https:` or `gs:` and no data URI. "
            "Read a local file with `Image.from_path(path)`."
        )
    return url


def _scheme(url: str) -> str:
    """Return the scheme of a whole URL that names a host; else an empty text."""
    if _UNFIT_IN_URL.search(url):
        return ""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme if parts.hostname else ""
    except ValueError:
        return ""
