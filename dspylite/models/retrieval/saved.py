"""A corpus and its vectors as files: a directory of JSON and raw numbers, in DSPy's form.

`config.json` holds the passages and the options, `corpus_embeddings.npy` the vectors. DSPy reads
what is written here, and what DSPy wrote is read here. No pickle is ever loaded: an `.npy` file of
objects, which would be one, is refused. Not here: the search (`models/retrieval/search.py`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import stat
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dspylite.errors import SavedEmbeddingsError
from dspylite.models.matrix import EmbeddingMatrix

MAX_CONFIG_BYTES = 1 << 30
"""Most bytes of `config.json`, which is read at once; a guess at more than anybody has."""

MAX_DIM = 1 << 16
"""Most dimensions of a vector; embedding models have up to some thousands."""

_MAX_WAIT_S = 5.0
"""For whoever else is putting files into the directory, which takes a moment; guessed."""

_CONFIG, _VECTORS = "config.json", "corpus_embeddings.npy"
_FORMAT = 1

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # numpy's own limit
_HEADER = re.compile(
    r"\{'descr': '(?P<kind>[^']{1,20})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>[0-9, ]{0,60})\), \} *\n"
)
_CODES = {"<f4": "f", "<f8": "d"}
_READ_VALUES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCorpus:
    """What the files hold.

    Attributes:
        corpus: The passages.
        matrix: Their vectors, normalised if `normalize` says so.
        k: How many passages a query gives.
        normalize: Whether scores are cosines.
    """

    corpus: tuple[str, ...]
    matrix: EmbeddingMatrix
    k: int
    normalize: bool


def write_corpus(path: str | os.PathLike[str], saved: SavedCorpus) -> None:
    """Write the two files into a directory, which is made if need be.

    Each is complete before it takes the place of an older one, and of several saves at once one
    stays whole. The configuration comes last and bears the checksum of the vectors: a crash between
    the two is noticed when they are read.

    Raises:
        OSError: The directory cannot be made or written to; an older corpus in it stays.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}.{secrets.token_hex(4)}"
    new_vectors, new_config = directory / (_VECTORS + suffix), directory / (_CONFIG + suffix)
    try:
        checksum = _write(new_vectors, lambda file: _write_npy(file, saved.matrix))
        config = {
            "k": saved.k,
            "normalize": saved.normalize,
            "corpus": saved.corpus,
            "has_faiss_index": False,  # DSPy asks for it
            "format": _FORMAT,
            "crc32": checksum,
        }
        content = json.dumps(config, indent=1).encode("ascii")
        _write(new_config, lambda file: file.write(content))
        with _alone_in(directory):
            os.replace(new_vectors, directory / _VECTORS)
            os.replace(new_config, directory / _CONFIG)
    finally:
        new_vectors.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)


def read_corpus(path: str | os.PathLike[str]) -> SavedCorpus:
    """Read the two files of a directory, checking all that they say before it is believed.

    Memory is bounded by the sizes of the files.

    Raises:
        FileNotFoundError: The directory or one of its files is not there.
        SavedEmbeddingsError: They are damaged, do not belong together, or are something else.
    """
    config_file, vectors_file = Path(path, _CONFIG), Path(path, _VECTORS)
    for file in (Path(path), config_file, vectors_file):
        if not file.exists():
            raise FileNotFoundError(
                f"`{file}` is not there; a directory that `save` wrote has `{_CONFIG}` and "
                f"`{_VECTORS}`."
            )
    with contextlib.ExitStack() as files:
        with _alone_in(Path(path)):  # so that both are of one save; they may be replaced then
            opened_config = files.enter_context(_open(config_file))
            vectors = files.enter_context(_open(vectors_file))
        config = _read_config(opened_config, config_file)
        try:
            matrix, checksum = _read_npy(vectors, _size_of(vectors), len(config["corpus"]))
        except (EOFError, SavedEmbeddingsError) as error:
            raise SavedEmbeddingsError(f"`{vectors_file}` cannot be read: {error}") from None
    if config.get("crc32", checksum) != checksum:
        raise SavedEmbeddingsError(
            f"`{vectors_file}` is damaged, or of another save than `{config_file}`; save again."
        )
    return SavedCorpus(
        corpus=tuple(config["corpus"]),
        matrix=matrix,
        k=config["k"],
        normalize=config["normalize"],
    )


def _write(file: Path, write: Callable[[BinaryIO], Any]) -> Any:
    with file.open("xb") as opened:
        result = write(opened)
        opened.flush()
        os.fsync(opened.fileno())
    return result


def _open(file: Path) -> BinaryIO:
    if not stat.S_ISREG(file.stat().st_mode):  # a pipe would block, a device never end
        raise SavedEmbeddingsError(f"`{file}` cannot be read: it is not a regular file.")
    return file.open("rb")


def _size_of(opened: BinaryIO) -> int:
    return os.fstat(opened.fileno()).st_size


@contextlib.contextmanager
def _alone_in(directory: Path) -> Generator[None]:
    """Keep other threads and processes from putting files into a directory, or opening them.

    Without `flock`, and where somebody keeps it for `_MAX_WAIT_S`, nobody is kept from it: a mix of
    two saves is then found by its checksum.
    """
    try:
        import fcntl  # noqa: PLC0415  # not on every system

        opened = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        ends_at = time.monotonic() + _MAX_WAIT_S
        while not _locked(opened, fcntl.LOCK_EX | fcntl.LOCK_NB) and time.monotonic() < ends_at:
            time.sleep(0.002)  # noqa: TID251  # no plan comes here
        yield
    finally:
        _locked(
            opened, fcntl.LOCK_UN
        )  # which closing does not, if the process was forked meanwhile
        os.close(opened)


def _locked(opened: int, operation: int) -> bool:
    """Tell whether a lock was had, or never can be."""
    import fcntl  # noqa: PLC0415  # as above

    try:
        fcntl.flock(opened, operation)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


# --- The configuration ---------------------------------------------------------------------------

_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "k": (lambda k: type(k) is int and k > 0, "a positive whole number"),
    "normalize": (lambda flag: type(flag) is bool, "true or false"),
    "corpus": (
        lambda corpus: isinstance(corpus, list) and all(type(text) is str for text in corpus),
        "a list of strings",
    ),
}


def _read_config(opened: BinaryIO, file: Path) -> dict[str, Any]:
    try:
        if _size_of(opened) > MAX_CONFIG_BYTES:
            raise SavedEmbeddingsError(f"it has more than {MAX_CONFIG_BYTES} bytes.")
        config = json.loads(opened.read())
        if not isinstance(config, dict):
            raise SavedEmbeddingsError("it holds no object.")
        if config.get("format", _FORMAT) != _FORMAT:
            raise SavedEmbeddingsError(
                f"it is of format {config['format']!r:.40}, which this version does not know."
            )
        for name, (fits, wanted) in _FIELDS.items():
            if name not in config or not fits(config[name]):
                found = f"{config[name]!r:.80}" if name in config else "missing"
                raise SavedEmbeddingsError(f"`{name}` must be {wanted}, and is {found}.")
    except (SavedEmbeddingsError, ValueError, RecursionError) as error:
        raise SavedEmbeddingsError(f"`{file}` cannot be read: {error}") from None
    return config


# --- The vectors, in numpy's format 1.0 ----------------------------------------------------------


def _write_npy(file: BinaryIO, matrix: EmbeddingMatrix) -> int:
    """Write float32 rows; return the checksum of the numbers."""
    shape = f"({len(matrix)}, {matrix.dim})"
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    fixed = len(_MAGIC) + 4
    # The numbers begin at a multiple of 64, so that they can be mapped into memory.
    header += " " * (-(fixed + len(header) + 1) % 64) + "\n"
    file.write(_MAGIC + b"\x01\x00" + len(header).to_bytes(2, "little") + header.encode("ascii"))
    checksum = 0
    for row in matrix:
        raw = _little_endian(array("f", row.tobytes()))
        checksum = zlib.crc32(raw, checksum)
        file.write(raw)
    return checksum


def _read_npy(file: BinaryIO, size: int, wanted_rows: int) -> tuple[EmbeddingMatrix, int]:
    """Read the rows and the checksum of the bytes behind them."""
    start = file.read(len(_MAGIC) + 2)
    if start[:-2] != _MAGIC or start[-2:] not in {b"\1\0", b"\2\0", b"\3\0"}:
        raise SavedEmbeddingsError("it is no `.npy` file.")
    length = int.from_bytes(file.read(2 if start[-2] == 1 else 4), "little")
    header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    described = _HEADER.fullmatch(header.decode("latin-1"))
    if len(header) != length or not described:
        raise SavedEmbeddingsError("its header is damaged.")
    kind = described["kind"]
    if "O" in kind:
        raise SavedEmbeddingsError("it holds pickled objects, which are never loaded.")
    if kind not in _CODES or described["fortran"] == "True":
        raise SavedEmbeddingsError(
            "its numbers must be little-endian float32 or float64 in C order; write it with "
            "`numpy.save(path, numpy.ascontiguousarray(vectors, dtype='<f4'))`."
        )
    shape = [int(number) for number in described["shape"].replace(" ", "").split(",") if number]
    if len(shape) != 2 or shape[0] != wanted_rows:
        raise SavedEmbeddingsError(
            f"its shape is {tuple(shape)} where {wanted_rows} passages need as many rows."
        )
    rows, dim = shape
    if dim > MAX_DIM or (rows and not dim):
        raise SavedEmbeddingsError(f"its vectors have {dim} dimensions, not 1 to {MAX_DIM}.")
    code = _CODES[kind]
    count = rows * dim
    if size - file.tell() != count * array(code).itemsize:
        raise SavedEmbeddingsError(
            f"{rows} x {dim} numbers need {count * array(code).itemsize} bytes, and it has "
            f"{size - file.tell()}."
        )
    values = array("f")
    checksum = 0
    while len(values) < count:
        part = array(code)
        part.fromfile(file, min(_READ_VALUES, count - len(values)))
        checksum = zlib.crc32(part, checksum)
        values.extend(array("f", _little_endian(part)))
    matrix = EmbeddingMatrix(values, dim if rows else 0)
    for index, row in enumerate(matrix):
        if not math.isfinite(math.fsum(map(abs, row))):
            raise SavedEmbeddingsError(f"the vector of passage {index} holds NaN or infinity.")
    return matrix, checksum


def _little_endian(values: array[Any]) -> array[Any]:
    """Swap the bytes on machines that have the other order."""
    if sys.byteorder == "big":
        values.byteswap()
    return values
