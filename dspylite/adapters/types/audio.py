"""`Audio`: a recording as its own bytes.

Not here: fetching (`fetching.py`), and what audio shares with other media (`media.py`).
"""

from __future__ import annotations

import math
import os
import re
import struct
import sys
import warnings
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import pydantic

from dspylite.adapters.types.media import (
    MAX_BYTES,
    AnyPath,
    Media,
    base64_text,
    check_base64,
    check_size,
    is_data_uri,
    kind_of_bytes,
    kind_of_name,
    read_file,
    split_data_uri,
)
from dspylite.errors import MediaError

KINDS = ("audio/",)

_FORMAT = re.compile(r"[a-z0-9.+_-]{1,40}")
_OTHER_NAMES = {"mpeg": "mp3", "wave": "wav", "vnd.wave": "wav"}
"""What providers call a format by another name than its MIME type does."""

_DEFAULT_RATE = 16_000
_NONE: Any = object()


class Audio(Media):
    """A recording for a model to hear.

    Nothing is fetched or read here: use `from_url` to download one and `from_path` to read a file.

    Args:
        source: A data URI, the bytes of a recording, an array of numpy or alike (frames, or frames
            by channels), a dict of the two fields, or another `Audio`.
        audio_format: What bytes are; found by looking at them, else `"wav"`.
        sampling_rate: Frames per second of an array; 16,000 by default.
        **data: The fields, in the place of `source`: `data` in base64, and `audio_format`.

    Attributes:
        data: The bytes in base64.
        audio_format: `"wav"`, `"mp3"`, `"flac"` ...

    Raises:
        MediaError: It is none of these, or larger than `MAX_BYTES`.

    Example:
        >>> Audio(b"ID3...").format()
        [{'type': 'input_audio', 'input_audio': {'data': 'SUQzLi4u', 'format': 'mp3'}}]
        >>> Audio(data="SUQzLi4u", audio_format="mp3")
        Audio(data='… (8 characters)', audio_format='mp3')
    """

    data: str
    audio_format: str

    model_config = pydantic.ConfigDict(
        json_schema_extra={
            "description": "A recording: its bytes in base64, and its format, such as `wav`."
        }
    )

    def __init__(self, source: Any = _NONE, /, **data: Any) -> None:
        if source is not _NONE:
            if "data" in data:
                raise MediaError("Audio: give a source or `data`, not both.")
            given_rate, given_format = (
                data.pop("sampling_rate", None),
                data.pop("audio_format", None),
            )
            if given_format is not None and _has_format(source):
                raise MediaError("Audio: the source says its format, so leave out `audio_format`.")
            if given_rate is not None and not hasattr(source, "shape"):
                raise MediaError("Audio: `sampling_rate` goes with an array only.")
            data = {**_fields(source, given_format, given_rate), **data}
            if isinstance(source, Audio):
                data["data"] = source  # which was checked by its own limit
        super().__init__(**data)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _fields(value, None, None)
        fields = dict(cast("Mapping[str, Any]", value))
        encoded = fields.get("data")
        if isinstance(encoded, Audio):
            fields["data"] = encoded.data
        elif isinstance(encoded, str):
            check_base64(encoded, max_bytes=MAX_BYTES, wanted="an audio")
            if not encoded:
                raise MediaError("the audio is empty.")
        if isinstance(said := fields.get("audio_format"), str):
            fields["audio_format"] = _format_name(said)
        return fields

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Leave out the bytes."""
        rest = [each for each in super().__repr_args__() if each[0] != "data"]
        return [("data", f"… ({len(self.data)} characters)"), *rest]

    def format(self) -> list[dict[str, Any]]:
        """Write the recording as a content part."""
        audio = {"data": self.data, "format": self.audio_format}
        return [{"type": "input_audio", "input_audio": audio}]

    @classmethod
    def from_url(
        cls,
        url: str,
        verify: bool = True,
        timeout: float | None = 30.0,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> Self:
        """Download a recording.

        Whatever host the URL names is asked, private ones included, and redirects are followed:
        check URLs that come from others, or from a model, before they come here.

        Args:
            url: `http:` or `https:`.
            verify: Whether the server's certificate is checked.
            timeout: Seconds for all of it, redirects and body included; None for no limit but the
                deadline of the call in progress.
            max_bytes: Most bytes that are taken.

        Raises:
            MediaError: It is no such URL, or the recording is too large.
            MediaFetchError: The server could not be reached in time, refused, or sent no audio.
        """
        from dspylite.adapters.types.fetching import fetch  # noqa: PLC0415  # loads HTTP and TLS

        kind, data = fetch(
            url, verify=verify, timeout=timeout, max_bytes=max_bytes, wanted="audio", kinds=KINDS
        )
        return cls.model_construct(data=base64_text(data), audio_format=_format_of_kind(kind))

    @classmethod
    def from_path(cls, file_path: AnyPath, *, max_bytes: int = MAX_BYTES) -> Self:
        """Read a recording from a file.

        Args:
            file_path: Where it is.
            max_bytes: Most bytes that are read.

        Raises:
            MediaError: It is no readable file of audio, or larger than that.
        """
        data = read_file(file_path, max_bytes=max_bytes)
        kind = kind_of_bytes(data) or kind_of_name(file_path)
        if kind is None or not data or not kind.startswith(KINDS):
            found = "empty" if not data else kind or "of no known kind"
            raise MediaError(f"{os.fspath(file_path)!r} is no audio: it is {found}.")
        return cls.model_construct(data=base64_text(data), audio_format=_format_of_kind(kind))

    @classmethod
    def from_file(cls, file_path: AnyPath) -> Self:
        """Read a recording from a file; deprecated, use `from_path`."""
        warnings.warn(
            "`Audio.from_file` is deprecated; use `Audio.from_path`.",
            DeprecationWarning,
            stacklevel=2,
        )
        return cls.from_path(file_path)

    @classmethod
    def from_array(cls, array: Any, sampling_rate: int, format: str = "wav") -> Self:
        """Make a recording of samples, as 16-bit PCM.

        Args:
            array: An array of numpy, torch or alike: frames, or frames by channels. Floats lie
                between -1 and 1, and louder ones are cut off; whole numbers are int16 or int32.
            sampling_rate: Frames per second.
            format: `"wav"`; what is encoded otherwise comes as bytes.

        Raises:
            MediaError: It is no such array, rate or format, or too long.

        Example:
            >>> import numpy
            >>> Audio.from_array(numpy.zeros(8000, dtype="float32"), 16_000).audio_format
            'wav'
        """
        if format.lower() != "wav":
            raise MediaError(
                f"Audio: arrays are written as `wav` only, not as {format!r}. Encode it yourself "
                "and give the bytes: `Audio(data, audio_format=...)`."
            )
        return cls(**_fields(array, None, sampling_rate))


def _has_format(source: Any) -> bool:
    if isinstance(source, Mapping):
        return "audio_format" in source
    return isinstance(source, Audio) or (isinstance(source, str) and is_data_uri(source))


def _fields(source: Any, audio_format: str | None, sampling_rate: Any) -> dict[str, Any]:
    """Return the fields of whatever an audio may be made of."""
    if isinstance(source, Audio):
        return {"data": source.data, "audio_format": source.audio_format}
    if isinstance(source, Mapping):
        fields = dict(cast("Mapping[str, Any]", source))
        return {**fields, "audio_format": audio_format} if audio_format else fields
    if isinstance(source, str):
        return _of_text(source.strip())
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        check_size(data, max_bytes=MAX_BYTES, wanted="an audio")
        found = kind_of_bytes(data)
        if audio_format is None and found is not None and not found.startswith(KINDS):
            raise MediaError(f"The bytes are {found}, no audio.")
        known = audio_format or (_format_of_kind(found) if found else "wav")
        return {"data": base64_text(data), "audio_format": known}
    if hasattr(source, "shape") and hasattr(source, "tolist"):
        if audio_format not in (None, "wav"):
            raise MediaError(f"Audio: arrays are written as `wav` only, not as {audio_format!r}.")
        data = _wav(source, _DEFAULT_RATE if sampling_rate is None else sampling_rate)
        return {"data": base64_text(data), "audio_format": "wav"}
    if isinstance(source, os.PathLike):
        raise MediaError("A path is no audio. Read it with `Audio.from_path(path)`.")
    raise MediaError(
        f"An audio is made of a data URI, bytes or an array, not of `{type(source).__name__}`."
    )


def _of_text(source: str) -> dict[str, Any]:
    if not is_data_uri(source):
        raise MediaError(
            "A text of an audio is a data URI. Read a local file with `Audio.from_path(path)`, "
            "download one with `Audio.from_url(url)`."
        )
    kind, encoded = split_data_uri(source, max_bytes=MAX_BYTES, wanted="an audio")
    if not kind.startswith(KINDS):
        raise MediaError(f"A data URI of {kind} is no audio.")
    return {"data": encoded, "audio_format": _format_of_kind(kind)}


def _format_of_kind(kind: str) -> str:
    return _format_name(kind.partition("/")[2])


def _format_name(said: str) -> str:
    name = said.strip().lower().removeprefix("x-")
    if not _FORMAT.fullmatch(name):
        raise MediaError(f"{said[:80]!r} is no format of audio such as `wav` or `mp3`.")
    return _OTHER_NAMES.get(name, name)


def _wav(samples: Any, rate: Any) -> bytes:
    """Write samples as a WAV file of 16-bit PCM."""
    if isinstance(rate, bool) or not isinstance(rate, int) or not 1 <= rate <= 1_000_000:
        raise MediaError(f"`sampling_rate` is the frames per second, not {rate!r}.")
    shape = tuple(int(each) for each in samples.shape)
    channels = shape[1] if len(shape) == 2 else 1
    if len(shape) not in (1, 2) or not shape[0] or not 1 <= channels <= 64:
        raise MediaError(
            f"An array of shape {shape} is no audio: it has frames, or frames by channels."
        )
    if shape[0] * channels * 2 > MAX_BYTES:
        raise MediaError(f"An array of shape {shape} is longer than {MAX_BYTES:,} bytes of audio.")
    rows: list[Any] = samples.tolist()
    flat = [each for row in rows for each in row] if len(shape) == 2 else rows
    pcm = _pcm(flat, str(samples.dtype).rpartition(".")[2])
    if sys.byteorder == "big":
        pcm.byteswap()
    data = pcm.tobytes()
    frame = 2 * channels
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + len(data), b"WAVE"),
        *(b"fmt ", 16, 1, channels, rate, rate * frame, frame, 16),
        *(b"data", len(data)),
    )
    return head + data


def _pcm(samples: Sequence[Any], dtype: str) -> array[int]:
    if dtype == "int16":
        return array("h", samples)
    if dtype == "int32":
        return array("h", [each >> 16 for each in samples])
    if not dtype.startswith(("float", "bfloat")):
        raise MediaError(f"Samples are floats, int16 or int32, not {dtype}.")
    if not all(map(math.isfinite, samples)):
        raise MediaError("A sample is not a finite number.")
    return array("h", [min(max(math.floor(each * 32_768), -32_768), 32_767) for each in samples])
