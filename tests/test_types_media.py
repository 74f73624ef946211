"""`Image`, `Audio` and `File`: what they are made of, what is refused, and that nothing is opened.

Not here: downloads (`test_types_fetching.py`).
"""

from __future__ import annotations

import base64
import copy
import io
import os
import pickle
import socket
import struct
import sys
import threading
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspylite as dspy
from dspylite.adapters.types.media import MAX_BYTES, MAX_FILE_BYTES, kind_of_bytes

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(100))
WAV = b"RIFF\0\0\0\0WAVEfmt " + bytes(50)
KINDS = [dspy.Image, dspy.Audio, dspy.File]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64(data)}"


def box(brand: bytes, *more: bytes) -> bytes:
    inside = b"ftyp" + brand + bytes(4) + b"".join(more)
    return struct.pack(">I", len(inside) + 4) + inside + bytes(30)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "image/jpeg"),
        (b"GIF87a", "image/gif"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\1\2\3\4WEBPVP8 ", "image/webp"),
        (b"BM" + struct.pack("<IHHI", 90, 0, 0, 54) + bytes(40), "image/bmp"),
        (b"II*\0" + bytes(8), "image/tiff"),
        (b"MM\0*" + bytes(8), "image/tiff"),
        (box(b"avif"), "image/avif"),
        (box(b"mif1", b"mif1", b"avif"), "image/avif"),
        (box(b"heic"), "image/heic"),
        (box(b"mif1", b"heic"), "image/heic"),
        (box(b"mif1"), "image/heif"),
        (box(b"M4A "), "audio/mp4"),
        (b"%PDF-1.7", "application/pdf"),
        (WAV, "audio/wav"),
        (b"ID3\4", "audio/mpeg"),
        (b"\xff\xfb\x90\0", "audio/mpeg"),
        (b"fLaC\0", "audio/flac"),
        (b"OggS\0", "audio/ogg"),
        (b"FORM\0\0\0\0AIFF", "audio/aiff"),
        (b"\x1aE\xdf\xa3\x01\x42\x82\x84webm", "audio/webm"),
        (b"\xff\xf1\x50\0", None),  # AAC, which has no layer where MP3 has one
        (b"BMW is a car and no bitmap at all, you know", None),
        (b"hello", None),
        (b"", None),
        (b"RIFF", None),
        (b"\0\0\0\x14ftyp", None),
        (b"\xff\xff\xff\xffftypxxxx", None),
        (box(b"isom", b"mp42"), None),
    ],
)
def test_kind_is_told_by_the_first_bytes(data: bytes, kind: str | None) -> None:
    assert kind_of_bytes(data) == kind


@given(st.binary(max_size=80))
def test_kind_of_any_bytes_is_told_or_not(data: bytes) -> None:
    """What looks may meet anything, a box that claims to be longer than it is among it."""
    assert kind_of_bytes(data) is None or "/" in str(kind_of_bytes(data))


# --- images --------------------------------------------------------------------------------------


class Picture:
    """What Pillow's images have, as far as they are asked."""

    def __init__(self, form: str | None, written: bytes = PNG) -> None:
        self.format = form
        self._written = written

    def save(self, into: io.BytesIO, format: str) -> None:
        if format == "BAD":
            raise OSError("cannot write mode RGBA as JPEG")
        into.write(self._written)
        self.saved_as = format


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("https://example.org/a.png?x=1#f", None),
        ("http://127.0.0.1:8000/a", None),
        ("gs://bucket/object.png", None),
        ("  https://example.org/a.png\n", "https://example.org/a.png"),
        ("HTTPS://example.org/a.png", "HTTPS://example.org/a.png"),
        (data_uri(PNG), None),
        (f"DATA:image/svg+xml;charset=utf-8;base64,{b64(b'<svg/>')}", None),
        (data_uri(b"%PDF-1.7", "application/pdf"), None),
        (PNG, data_uri(PNG)),
        (bytearray(PNG), data_uri(PNG)),
        (memoryview(PNG), data_uri(PNG)),
        ({"url": "https://example.org/a.png"}, "https://example.org/a.png"),
        (dspy.Image("gs://b/o"), "gs://b/o"),
        (Picture(None), data_uri(PNG)),
        (Picture("GIF", b"GIF89a."), data_uri(b"GIF89a.", "image/gif")),
        (Picture("PPM", b"P6..."), data_uri(b"P6...", "image/ppm")),
    ],
)
def test_image_is_made_of(source: Any, url: str | None) -> None:
    image = dspy.Image(source)
    assert image.url == (source if url is None else url)
    assert dspy.Image(url=source) == image
    assert image.format() == [{"type": "image_url", "image_url": {"url": image.url}}]


@pytest.mark.parametrize(
    "source",
    [
        *("cat.png", "./cat.png", "/etc/passwd", r"C:\cat.png", "~/cat.png", "", " ", "//h/a.png"),
        *(
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "ftp://h/a",
            "javascript:alert(1)",
            "about:x",
        ),
        *("http://", "https:///a", "http:a.png", "http://[::1", "java\nscript:x", "http://a b/c"),
        *("http://h/\x00", "s3://b/o", "blob:https://h/x", "https://" + "a" * 20_000),
        *("data:", "data:,", "data:image/png", "data:image/png,abc", "data:image/png;base64"),
        *("data:image/png;base64,", "data:image/png;base64,aGk", "data:image/png;base64,a_-="),
        *("data:image/png;base64,aG\nk=", "data:image/png;base64,aGk=x", "data:;base64,aGk="),
        *("data:image/png;base64,é", "data:text/html;base64,aGk=", "data:video/mp4;base64,aGk="),
        *("data:image;base64,aGk=", "data:image/png" + ";x" * 200 + ";base64,aGk="),
        *(b"", b"hello", b"<svg/>", WAV, 5, 1.5, [], ["https://h/a"], object(), Path("cat.png")),
        *({}, {"url": {"url": "https://h/a"}}, {"url": "https://h/a", "x": 1}, {"image": "x"}),
        Picture("BAD"),
    ],
)
def test_what_is_no_image_is_refused(source: Any) -> None:
    with pytest.raises(dspy.MediaError, match=r"^Image: ."):
        dspy.Image(source)
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(dspy.Image).validate_python({"url": source, "extra": 1})


@pytest.mark.parametrize("source", ["cat.png", "file:///cat.png", Path("cat.png")])
def test_refused_path_names_the_remedy(source: Any) -> None:
    with pytest.raises(dspy.MediaError, match="from_path"):
        dspy.Image(source)


def test_image_without_anything_or_with_both_is_refused() -> None:
    for wrong in ({}, {"url": None}, {"source": "https://h/a"}, {"url": "https://h/a", "x": 1}):
        with pytest.raises(dspy.MediaError):
            dspy.Image(**wrong)
    with pytest.raises(dspy.MediaError, match="not both"):
        dspy.Image("https://h/a", url="https://h/b")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda path: dspy.Image.from_file(path), "Image.from_path"),
        (lambda path: dspy.Image.from_PIL(Picture(None)), r"Image\(pil_image\)"),
        (lambda path: dspy.Image("https://h/a", verify=False), "from_url"),
    ],
)
def test_deprecated_ways_name_the_new_one(
    call: Callable[[Path], Any], match: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.warns(DeprecationWarning, match=match) as caught:
        call(tmp_path / "a.png")
    assert caught[0].filename == __file__


# --- audio ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (data_uri(b"x", "audio/x-wav"), {}, (b"x", "wav")),
        (data_uri(b"x", "audio/mpeg"), {}, (b"x", "mp3")),
        (data_uri(b"x", "audio/ogg;codecs=opus"), {}, (b"x", "ogg")),
        (b"ID3x", {}, (b"ID3x", "mp3")),
        (b"anything", {}, (b"anything", "wav")),
        (b"anything", {"audio_format": "flac"}, (b"anything", "flac")),
        ({"data": b64(b"x"), "audio_format": "X-WAV"}, {}, (b"x", "wav")),
        ({"data": b64(b"x")}, {"audio_format": "mp3"}, (b"x", "mp3")),
        (dspy.Audio(b"fLaC"), {}, (b"fLaC", "flac")),
    ],
)
def test_audio_is_made_of(
    source: Any, options: dict[str, Any], expected: tuple[bytes, str]
) -> None:
    audio = dspy.Audio(source, **options)
    assert (base64.b64decode(audio.data), audio.audio_format) == expected
    part = {"data": audio.data, "format": audio.audio_format}
    assert audio.format() == [{"type": "input_audio", "input_audio": part}]


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("a.wav", {}),
        ("https://h/a.wav", {}),
        ("data:image/png;base64,aGk=", {}),
        ("data:audio/wav;base64,a", {}),
        ("data:audio/wav;base64,", {}),
        (PNG, {}),
        (b"", {}),
        (None, {}),
        (5, {}),
        (Path("a.wav"), {}),
        ({"data": "aGk="}, {}),
        ({"data": "aGk=", "audio_format": "wav", "x": 1}, {}),
        ({"data": "a", "audio_format": "wav"}, {}),
        ({"data": "aGk=", "audio_format": 'wav"}'}, {}),
        (b"x", {"sampling_rate": 8000}),
        (b"x", {"data": "aGk="}),
        (data_uri(b"x", "audio/wav"), {"audio_format": "mp3"}),
        (dspy.Audio(b"x"), {"audio_format": "mp3"}),
        ({"data": "aGk=", "audio_format": "wav"}, {"audio_format": "mp3"}),
        (np.zeros(4), {"audio_format": "flac"}),
        (np.zeros(4), {"sampling_rate": 0}),
        (np.zeros(4), {"sampling_rate": 44_100.5}),
        (np.zeros(0), {}),
        (np.zeros((2, 2, 2)), {}),
        (np.zeros((4, 0)), {}),
        (np.zeros((2, 100)), {}),
        (np.array(1.0), {}),
        (np.array([np.nan]), {}),
        (np.array([np.inf]), {}),
        (np.zeros(4, "uint8"), {}),
        (np.zeros(4, "int64"), {}),
        (np.array(["a"]), {}),
        (np.zeros(4, "complex64"), {}),
        (np.zeros(MAX_BYTES // 2 + 1, "int16"), {}),
    ],
)
def test_what_is_no_audio_is_refused(source: Any, options: dict[str, Any]) -> None:
    with pytest.raises(dspy.MediaError):
        dspy.Audio(source, **options)


def read_wav(audio: dspy.Audio) -> tuple[int, int, int, list[int]]:
    with wave.open(io.BytesIO(base64.b64decode(audio.data))) as file:
        frames = file.readframes(file.getnframes())
        samples = list(struct.unpack(f"<{len(frames) // 2}h", frames))
        return file.getnchannels(), file.getframerate(), file.getsampwidth(), samples


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_become_16_bit_samples_and_loud_ones_are_cut_off(dtype: str) -> None:
    """A sample that ran over would turn the loudest moment into a bang."""
    array = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 7.0, -7.0], dtype)
    expected = [0, 16_384, -16_384, 32_767, -32_768, 32_767, -32_768]
    assert read_wav(dspy.Audio.from_array(array, 8000)) == (1, 8000, 2, expected)
    assert read_wav(dspy.Audio(array)) == (1, 16_000, 2, expected)


@pytest.mark.parametrize(("dtype", "scale"), [("int16", 1), ("int32", 65_536)])
def test_whole_numbers_are_taken_as_samples(dtype: str, scale: int) -> None:
    array = np.array([[1, -2], [32_767, -32_768]], dtype) * np.array(scale, dtype)
    audio = dspy.Audio(array, sampling_rate=44_100)
    assert read_wav(audio) == (2, 44_100, 2, [1, -2, 32_767, -32_768])


@given(st.lists(st.integers(-32_768, 32_767), min_size=1, max_size=50), st.integers(1, 192_000))
def test_samples_of_any_array_come_back(samples: list[int], rate: int) -> None:
    audio = dspy.Audio.from_array(np.array(samples, "int16"), rate)
    assert read_wav(audio) == (1, rate, 2, samples)


def test_only_wav_is_written() -> None:
    with pytest.raises(dspy.MediaError, match="wav"):
        dspy.Audio.from_array(np.zeros(4), 8000, format="flac")


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "part"),
    [
        (dspy.File(b"hello"), {"file_data": data_uri(b"hello", "application/octet-stream")}),
        (dspy.File(b"%PDF-1"), {"file_data": data_uri(b"%PDF-1", "application/pdf")}),
        (dspy.File(data_uri(b"x", "text/plain")), {"file_data": data_uri(b"x", "text/plain")}),
        (dspy.File(file_data=b64(b"x")), {"file_data": b64(b"x")}),
        (dspy.File({"file_id": "f"}), {"file_id": "f"}),
        (dspy.File({"file_id": "f"}, filename="n"), {"file_id": "f", "filename": "n"}),
        (dspy.File(dspy.File(file_id="f")), {"file_id": "f"}),
        (dspy.File.from_file_id("f", "n"), {"file_id": "f", "filename": "n"}),
        (
            dspy.File.from_bytes(b"a,b", filename="t.csv"),
            {"file_data": data_uri(b"a,b", "text/csv"), "filename": "t.csv"},
        ),
        (
            dspy.File.from_bytes(b"", "n", "text/x-mine"),
            {"file_data": "data:text/x-mine;base64,", "filename": "n"},
        ),
    ],
)
def test_file_is_made_of(file: dspy.File, part: dict[str, Any]) -> None:
    assert file.format() == [{"type": "file", "file": part}]


@pytest.mark.parametrize(
    "make",
    [
        lambda: dspy.File(),
        lambda: dspy.File({}),
        lambda: dspy.File({"x": 1}),
        lambda: dspy.File({"file_id": "f", "x": 1}),
        lambda: dspy.File("report.pdf"),
        lambda: dspy.File("https://h/report.pdf"),
        lambda: dspy.File("data:text/plain,hello"),
        lambda: dspy.File(file_data="not base64!"),
        lambda: dspy.File(Path("report.pdf")),
        lambda: dspy.File(None),
        lambda: dspy.File({"file_id": "f"}, file_id="g"),
        lambda: dspy.File.from_bytes(b"x", mime_type="no type"),
        lambda: dspy.File.from_bytes(b"x", mime_type="text/plain\r\nX: y"),
    ],
)
def test_what_is_no_file_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(dspy.MediaError):
        make()


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.png", PNG, "image/png"),
        ("a.jpg", PNG, "image/png"),  # a wrong name does not deceive
        ("a.svg", b"<svg/>", "image/svg+xml"),
        ("noname", PNG, "image/png"),
        ("a.pdf", b"%PDF-1", "application/pdf"),
    ],
)
def test_image_is_read_from_a_path(name: str, data: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert dspy.Image.from_path(path).url == data_uri(data, kind)
    assert dspy.Image.from_path(str(path)).url == data_uri(data, kind)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [("a.mp3", b"?", "mp3"), ("a.x", WAV, "wav"), ("a.M4A", b"?", "mp4"), ("a.ogg", b"?", "ogg")],
)
def test_audio_is_read_from_a_path(name: str, data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    audio = dspy.Audio.from_path(path)
    assert (base64.b64decode(audio.data), audio.audio_format) == (data, expected)


def test_file_is_read_from_a_path_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"hello")
    assert dspy.File.from_path(path).format()[0]["file"] == {
        "file_data": data_uri(b"hello", "text/plain"),
        "filename": "notes.txt",
    }
    other = dspy.File.from_path(path, filename="n", mime_type="text/x-mine")
    assert other.format()[0]["file"] == {
        "file_data": data_uri(b"hello", "text/x-mine"),
        "filename": "n",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    kind: type[dspy.Image | dspy.Audio | dspy.File], tmp_path: Path
) -> None:
    """Opening a pipe without a writer blocks until the end of time, and `/dev/zero` has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s.png"))
    for name in ("pipe.png", "link.png", "s.png", "."):
        with pytest.raises(dspy.MediaError, match="no regular file"):
            kind.from_path(tmp_path / name)
    for wrong, match in {"gone.png": "There is no file", "a\0.png": "no path"}.items():
        with pytest.raises(dspy.MediaError, match=match):
            kind.from_path(f"{tmp_path}/{wrong}")
    with pytest.raises(dspy.MediaError, match="cannot be read"):
        kind.from_path(f"{tmp_path}/{'x' * 5000}")


@pytest.mark.parametrize("name", ["a.txt", "a.wav", "none", "empty.png"])
def test_file_of_something_else_is_no_image(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"" if "empty" in name else b"hello")
    with pytest.raises(dspy.MediaError, match="no image"):
        dspy.Image.from_path(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(dspy.MediaError, match="no audio"):
        dspy.Audio.from_path(tmp_path / "a.png")


@pytest.mark.parametrize("kind", KINDS)
def test_size_of_a_file_is_limited(
    kind: type[dspy.Image | dspy.Audio | dspy.File], tmp_path: Path
) -> None:
    """A sparse file has any size for nothing."""
    path = tmp_path / ("a.wav" if kind is dspy.Audio else "a.png")
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(dspy.MediaError, match="larger than"):
        kind.from_path(path)
    path.write_bytes(PNG if kind is not dspy.Audio else WAV)
    kind.from_path(path, max_bytes=path.stat().st_size)
    with pytest.raises(dspy.MediaError, match="max_bytes="):
        kind.from_path(path, max_bytes=path.stat().st_size - 1)
    for wrong in (0, -1, True, 1.5, None):
        with pytest.raises(dspy.MediaError, match="max_bytes"):
            kind.from_path(path, max_bytes=wrong)
    for beyond_any_memory in (10**12, sys.maxsize, 10**30):
        assert kind.from_path(path, max_bytes=beyond_any_memory)


@pytest.mark.parametrize("kind", KINDS)
def test_limit_can_be_raised_above_the_usual_one(
    kind: type[dspy.Image | dspy.Audio | dspy.File], tmp_path: Path
) -> None:
    start = WAV if kind is dspy.Audio else PNG
    path = tmp_path / "a"
    path.write_bytes(start + bytes(MAX_FILE_BYTES))
    made = kind.from_path(path, max_bytes=2 * MAX_FILE_BYTES)
    (encoded,) = [value for value in vars(made).values() if value and len(value) > 9]
    assert base64.b64decode(encoded.partition(",")[2] or encoded) == path.read_bytes()
    assert pickle.loads(pickle.dumps(made)) == made
    assert kind(made) == made
    holder = pydantic.create_model("Holder", held=kind)
    assert holder(held=made).held == made  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make",
    [
        lambda: dspy.Image(PNG + bytes(MAX_BYTES)),
        lambda: dspy.Image(data_uri(bytes(MAX_BYTES + 1))),
        lambda: dspy.Audio(bytes(MAX_BYTES + 1)),
        lambda: dspy.Audio(data=b64(bytes(MAX_BYTES + 1)), audio_format="wav"),
        lambda: dspy.File(bytes(MAX_FILE_BYTES + 1)),
        lambda: dspy.File.from_bytes(b"xx", max_bytes=1),
    ],
)
def test_size_of_what_is_given_is_limited(make: Callable[[], Any]) -> None:
    with pytest.raises(dspy.MediaError, match="larger"):
        make()


def test_largest_allowed_is_taken() -> None:
    assert dspy.Image(data_uri(bytes(MAX_BYTES))).url


# --- what models and strangers write -------------------------------------------------------------

OPENING = {"open", "socket.connect", "socket.getaddrinfo", "os.listdir", "subprocess.Popen"}
_seen: list[str] = []
_watched = threading.local()


def _spy(event: str, args: tuple[Any, ...]) -> None:
    if getattr(_watched, "on", False) and event in OPENING:
        _seen.append(f"{event} {args[0]!r}")


sys.addaudithook(_spy)

HOSTILE = [
    {"url": "http://169.254.169.254/latest/meta-data", "download": True},
    {"url": "http://169.254.169.254/", "download": True, "verify": False},
    {"url": "/etc/passwd"},
    {"url": "file:///etc/passwd"},
    {"source": "http://169.254.169.254/", "download": True},
    {"file_path": "/etc/passwd"},
    {"file_data": "/etc/passwd"},
    {"data": "/etc/hostname", "audio_format": "wav", "sampling_rate": 5},
    {"data": "http://169.254.169.254/", "audio_format": "wav"},
    "/etc/passwd",
    "http://169.254.169.254/",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_opens_anything_when_it_is_read(kind: type[Any], value: Any) -> None:
    """Answers of models are read as these types, and prompts may be written by strangers."""
    adapter = pydantic.TypeAdapter(kind)
    listed = pydantic.TypeAdapter(dict[str, list[kind]])
    _seen.clear()
    _watched.on = True
    try:
        for read in (adapter.validate_python, lambda each: listed.validate_python({"a": [each]})):
            try:
                read(value)
            except pydantic.ValidationError as error:
                str(error)
    finally:
        _watched.on = False
    assert _seen == []


def test_hostile_download_is_an_error_and_not_ignored() -> None:
    with pytest.raises(pydantic.ValidationError, match="positional"):
        dspy.Image.model_validate({"url": "http://169.254.169.254/", "download": True})


@pytest.mark.parametrize("kind", KINDS)
@given(value=st.recursive(st.none() | st.text() | st.binary() | st.integers(), st.lists))
@settings(max_examples=50)
def test_any_other_value_is_a_validation_error(kind: type[Any], value: Any) -> None:
    try:
        pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError:
        pass


# --- values --------------------------------------------------------------------------------------

bodies = st.binary(min_size=1, max_size=60)
media = st.one_of(
    bodies.map(lambda body: dspy.Image(data_uri(body))),
    st.sampled_from(["https://h/a", "gs://b/o"]).map(dspy.Image),
    bodies.map(lambda body: dspy.Audio(data=b64(body), audio_format="wav")),
    st.builds(
        lambda body, name: dspy.File(file_data=data_uri(body, "text/plain"), filename=name),
        bodies,
        st.none() | st.text(max_size=10),
    ),
)


@given(media)
def test_plain_fields_and_json_validate_back(value: Any) -> None:
    kind = type(value)
    assert kind.model_validate(value.model_dump()) == value
    assert kind.model_validate_json(value.model_dump_json()) == value
    assert kind(value) == value


@given(media)
def test_copies_and_pickles_are_equal(value: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
        assert twin == value
        assert hash(twin) == hash(value)


@pytest.mark.parametrize("kind", KINDS)
def test_json_schema_is_that_of_the_fields(kind: type[Any]) -> None:
    """It is what a model is shown, so no word of a docstring for developers is in it."""
    schema = pydantic.TypeAdapter(kind).json_schema()
    assert set(schema["properties"]) == set(kind.model_fields)
    assert schema["additionalProperties"] is False
    assert "from_path" not in str(schema)


@pytest.mark.parametrize(
    "value",
    [
        dspy.Image(data_uri(bytes(3000))),
        dspy.Audio(bytes(3000)),
        dspy.File(bytes(3000)),
        dspy.File(file_data=b64(bytes(3000))),
    ],
)
def test_bytes_are_never_shown(value: Any) -> None:
    """A log line of 27 MB helps nobody."""
    for shown in (repr(value), str(value), f"{value}", repr([value])):
        assert "AAAAAAAA" not in shown
        assert len(shown) < 200
        assert "characters" in shown


def test_password_of_a_url_is_never_shown() -> None:
    image = dspy.Image("https://me:hunter2hunter2@h/a?token=s3cr3ts3cr3t")
    with pytest.raises(dspy.MediaError) as caught:
        dspy.Image("ftp://me:hunter2hunter2@h/a?token=s3cr3ts3cr3t")
    with pytest.raises(pydantic.ValidationError) as nested:
        dspy.Image.model_validate({"url": "ftp://me:hunter2hunter2@h/a"})
    for shown in (repr(image), str(image), str(caught.value), str(nested.value)):
        assert "hunter2" not in shown
        assert "s3cr3t" not in shown
    assert "hunter2" in image.url


@pytest.mark.parametrize("value", [dspy.Image(PNG), dspy.Audio(WAV), dspy.File(b"x")])
def test_values_are_frozen(value: Any) -> None:
    for name in type(value).model_fields:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(value, name, "x")


def test_error_of_a_value_travels_between_processes(pool: Any) -> None:
    error = pool.submit(_failure).result(timeout=60)
    assert isinstance(error, dspy.MediaError)
    assert "from_path" in str(error)


def _failure() -> BaseException:
    try:
        dspy.Image("cat.png")
    except dspy.MediaError as error:
        return error
    raise AssertionError


def test_subclass_keeps_its_type_and_fields() -> None:
    class Photo(dspy.Image):
        taken: int = 0

    photo = Photo("https://h/a", taken=1900)
    assert (photo.url, photo.taken) == ("https://h/a", 1900)
    assert Photo.model_validate(photo.model_dump()) == photo
