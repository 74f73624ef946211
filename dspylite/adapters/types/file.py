"""`File`: a document of any kind, as its own bytes or by a provider's id.

Not here: what files share with other media (`media.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self, cast

import pydantic

from dspylite.adapters.types.media import (
    MAX_FILE_BYTES,
    AnyPath,
    Media,
    check_base64,
    check_max_bytes,
    check_size,
    data_uri,
    is_data_uri,
    kind_from,
    kind_of_bytes,
    kind_of_name,
    read_file,
    split_data_uri,
)
from dspylite.errors import MediaError, clip

_FIELDS = ("file_data", "file_id", "filename")
_ANY_KIND = "application/octet-stream"
_NONE: Any = object()


class File(Media):
    """A file for a model to read, such as a PDF.

    Nothing is read here: use `from_path` for a file on disk.

    Args:
        source: Bytes, a data URI, a dict of the fields, or another `File`.
        **data: The fields, in the place of `source` or beside it.

    Attributes:
        file_data: The bytes, as a data URI or in base64; None if there is an id.
        file_id: The id that a provider gave the file when it was uploaded there.
        filename: What the model is told that it is called.

    Raises:
        MediaError: It is none of these, has no field set, or is larger than `MAX_FILE_BYTES`.

    Example:
        >>> File.from_bytes(b"%PDF-1.7 ...", filename="a.pdf")
        File(file_data='data:application/pdf;base64,… (16 characters)', filename='a.pdf')
        >>> File.from_file_id("file-1").format()
        [{'type': 'file', 'file': {'file_id': 'file-1'}}]
    """

    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None

    model_config = pydantic.ConfigDict(
        str_strip_whitespace=True,
        json_schema_extra={
            "description": "A file: a data URI, or the id of an uploaded one; its name."
        },
    )

    def __init__(self, source: Any = _NONE, /, **data: Any) -> None:
        if source is not _NONE:
            fields = _fields(source)
            if both := sorted(fields.keys() & data.keys()):
                raise MediaError(f"File: the source says {', '.join(both)}, so leave that out.")
            if isinstance(source, File) and source.file_data is not None:
                fields["file_data"] = source  # which was checked by its own limit
            data = {**fields, **data}
        super().__init__(**data)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        fields = _fields(value)
        encoded = fields.get("file_data")
        if isinstance(encoded, File) and encoded.file_data is not None:
            fields["file_data"] = encoded.file_data
        elif isinstance(encoded, str):
            encoded = encoded.strip()
            if is_data_uri(encoded):
                split_data_uri(encoded, max_bytes=MAX_FILE_BYTES, wanted="a file")
            else:
                check_base64(encoded, max_bytes=MAX_FILE_BYTES, wanted="a file")
        return fields

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Leave out the bytes."""
        shown = list(super().__repr_args__())
        if self.file_data is not None and not is_data_uri(self.file_data):
            rest = [each for each in shown if each[0] != "file_data"]
            return [("file_data", f"… ({len(self.file_data)} characters)"), *rest]
        return shown

    def format(self) -> list[dict[str, Any]]:
        """Write the file as a content part."""
        fields = {name: value for name in _FIELDS if (value := getattr(self, name))}
        return [{"type": "file", "file": fields}]

    @classmethod
    def from_path(
        cls,
        file_path: AnyPath,
        filename: str | None = None,
        mime_type: str | None = None,
        *,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> Self:
        """Read a file.

        Args:
            file_path: Where it is.
            filename: What the model is told that it is called; its name on disk by default.
            mime_type: What it is; found by its name, else by its first bytes.
            max_bytes: Most bytes that are read.

        Raises:
            MediaError: It is no readable file, or larger than that.
        """
        data = read_file(file_path, max_bytes=max_bytes)
        kind = mime_type or kind_of_name(file_path) or kind_of_bytes(data) or _ANY_KIND
        name = os.path.basename(os.fspath(file_path)) if filename is None else filename
        return cls.model_construct(file_data=data_uri(kind_from(kind), data), filename=name)

    @classmethod
    def from_bytes(
        cls,
        file_bytes: bytes,
        filename: str | None = None,
        mime_type: str | None = None,
        *,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> Self:
        """Take the bytes of a file.

        Args:
            file_bytes: All of them.
            filename: What the model is told that it is called.
            mime_type: What it is; found by its first bytes, else by its name, else
                `"application/octet-stream"`.
            max_bytes: Most bytes that are taken.

        Raises:
            MediaError: There are more, or the type is none.
        """
        check_max_bytes(max_bytes)
        data = bytes(file_bytes)
        check_size(data, max_bytes=max_bytes, wanted="the file")
        named = kind_of_name(filename) if filename else None
        kind = mime_type or kind_of_bytes(data) or named or _ANY_KIND
        return cls.model_construct(file_data=data_uri(kind_from(kind), data), filename=filename)

    @classmethod
    def from_file_id(cls, file_id: str, filename: str | None = None) -> Self:
        """Name a file that was uploaded to the provider."""
        return cls(file_id=file_id, filename=filename)


def _fields(source: Any) -> dict[str, Any]:
    """Return the fields of whatever a file may be made of."""
    if isinstance(source, File):
        found = {name: getattr(source, name) for name in _FIELDS}
        return {name: value for name, value in found.items() if value is not None}
    if isinstance(source, Mapping):
        fields = dict(cast("Mapping[str, Any]", source))
        if not any(fields.get(name) is not None for name in _FIELDS):
            raise MediaError("a file has at least one of `file_data`, `file_id` and `filename`.")
        return fields
    if isinstance(source, str):
        if not is_data_uri(source.strip()):
            raise MediaError(
                f"{clip(source, 80)!r} is no data URI. Read a local file with "
                "`File.from_path(path)`; name an uploaded one with `File.from_file_id(id)`."
            )
        return {"file_data": source}
    if isinstance(source, bytes | bytearray | memoryview):
        return {"file_data": File.from_bytes(bytes(source)).file_data}
    if isinstance(source, os.PathLike):
        raise MediaError("A path is no file yet. Read it with `File.from_path(path)`.")
    raise MediaError(f"A file is made of bytes or a data URI, not of `{type(source).__name__}`.")
