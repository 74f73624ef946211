"""A retriever's files: DSPy's read, ours readable by numpy, damaged and hostile ones refused.

Not here: what a retriever finds (`test_retrieval.py`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import threading
import tracemalloc
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import dspylite as dspy
from dspylite.errors import LMConfigurationError, SavedEmbeddingsError
from dspylite.models.retrieval import saved as saved_files
from tests.letters import CORPUS, letter_counts

DSPYS = Path(__file__).parent / "data" / "dspy_retriever"
"""What `dspy.retrievers.Embeddings(CORPUS, letter_counts, k=3).save(...)` of DSPy 3.4.1 wrote."""

QUERY = "Which river flows through Cologne?"
CONFIG, VECTORS = "config.json", "corpus_embeddings.npy"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a retriever; tests change its files."""
    dspy.Embeddings(CORPUS, letter_counts, k=3).save(tmp_path / "saved")
    return tmp_path / "saved"


def never(texts: list[str]) -> Any:
    raise AssertionError("loading embeds nothing")


def loaded(path: Path) -> dspy.EmbeddingsWithScores:
    return dspy.EmbeddingsWithScores.from_saved(path, letter_counts)


def npy(block: Any, **options: Any) -> bytes:
    """Write an array as numpy does."""
    file = io.BytesIO()
    np.save(file, block, **options)
    return file.getvalue()


def described(header: str, data: bytes = b"", version: bytes = b"\1\0", length: int = -1) -> bytes:
    """Write an `.npy` file with a header of one's own."""
    width = 2 if version == b"\1\0" else 4
    size = len(header) if length < 0 else length
    return b"\x93NUMPY" + version + size.to_bytes(width, "little") + header.encode() + data


def shaped(shape: str, kind: str = "<f4", *, fortran: bool = False) -> str:
    return f"{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


# --- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("has_numpy", [True, False])
def test_directory_saved_by_dspy_loads_and_finds_what_dspy_found(has_numpy: bool) -> None:
    """Nobody pays for their corpus again."""
    with mock.patch.dict(sys.modules, {} if has_numpy else {"numpy": None}):
        search = loaded(DSPYS)
        found = search(QUERY)
    assert (search.k, search.normalize, search.corpus) == (3, True, CORPUS)
    assert found.indices == [0, 1, 3]
    assert found.scores == pytest.approx([0.8909686803, 0.7142894268, 0.6864234209], rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("make", [dspy.Embeddings, dspy.EmbeddingsWithScores])
def test_saved_retriever_finds_the_same_when_loaded(
    make: Any, normalize: bool, tmp_path: Path
) -> None:
    """(B 6.8) To the last bit, embedding nothing."""
    search = make(CORPUS, letter_counts, k=4, normalize=normalize)
    search.save(str(tmp_path / "new" / "place"))
    twin = make.from_saved(str(tmp_path / "new" / "place"), never)
    assert twin.corpus_embeddings == search.corpus_embeddings
    twin.embedder = letter_counts
    assert type(twin) is make
    assert twin(QUERY) == search(QUERY)
    assert (twin.k, twin.normalize) == (4, normalize)
    assert make(["else"], letter_counts).load(tmp_path / "new" / "place", letter_counts)(
        QUERY
    ) == search(QUERY)


def test_files_have_the_form_that_dspy_reads(saved: Path) -> None:
    """The fields it asks for, and an array that `numpy.load` takes without pickle."""
    assert sorted(os.listdir(saved)) == [CONFIG, VECTORS]
    config = json.loads((saved / CONFIG).read_text())
    dspys = json.loads((DSPYS / CONFIG).read_text())
    assert {name: config[name] for name in dspys} == dspys
    vectors = np.load(saved / VECTORS, allow_pickle=False)
    assert (vectors.dtype, vectors.shape) == (np.dtype("<f4"), (7, 14))
    assert vectors == pytest.approx(np.load(DSPYS / VECTORS), rel=1e-6)
    assert (saved / VECTORS).read_bytes()[:128] == (DSPYS / VECTORS).read_bytes()[:128]


@pytest.mark.parametrize("corpus", [[], ["one"], ["", " \n", "\ud800", "\x00", "日本", '"]}'] * 2])
def test_any_corpus_comes_back(corpus: list[str], tmp_path: Path) -> None:
    dspy.Embeddings(corpus, letter_counts).save(tmp_path)
    assert loaded(tmp_path).corpus == corpus
    assert len(np.load(tmp_path / VECTORS)) == len(corpus)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_vectors_that_numpy_wrote_are_read(kind: str, version: Any, saved: Path) -> None:
    """DSPy saves float64 where its embedder gives that."""
    block = np.array(letter_counts(CORPUS), dtype=kind) / 3
    file = io.BytesIO()
    np.lib.format.write_array(file, block, version=version)
    drop_checksum(saved)
    (saved / VECTORS).write_bytes(file.getvalue())
    assert np.asarray(loaded(saved).corpus_embeddings).tolist() == block.astype("<f4").tolist()


def test_vectors_are_little_endian_on_a_machine_of_the_other_order(saved: Path) -> None:
    """Directories are copied between machines."""
    raw = array("f", [1.0, 2.5])
    with mock.patch.object(sys, "byteorder", "big" if sys.byteorder == "little" else "little"):
        swapped = saved_files._little_endian(array("f", raw))
    swapped.byteswap()
    assert swapped == raw


def test_neither_embedder_nor_key_is_saved(tmp_path: Path) -> None:
    embedder = dspy.Embedder("offline/hashing", dimensions=4)
    embedder.kwargs["api_key"] = "sk-secret-of-this-test"
    dspy.Embeddings(CORPUS, embedder).save(tmp_path)
    assert b"sk-secret" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


# --- Saving over, saving in vain -----------------------------------------------------------------


def test_saving_again_replaces_the_old_and_leaves_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    dspy.Embeddings(CORPUS[:2], letter_counts, k=1).save(saved)
    assert loaded(saved).corpus == CORPUS[:2]
    assert sorted(os.listdir(saved)) == [CONFIG, VECTORS, "notes.txt"]


@pytest.mark.parametrize("number", [1, 2])
def test_save_that_fails_leaves_the_old_files(
    number: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, at the first file or at the second."""
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        dspy.Embeddings(CORPUS[:2], letter_counts, k=1).save(saved)
    assert loaded(saved).corpus == CORPUS
    assert sorted(os.listdir(saved)) == [CONFIG, VECTORS]


def test_crash_between_the_two_files_is_noticed(saved: Path, tmp_path: Path) -> None:
    """Vectors of another corpus of the same size would give wrong passages."""
    dspy.Embeddings(CORPUS[::-1], letter_counts).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / VECTORS, saved / VECTORS)
    with pytest.raises(SavedEmbeddingsError, match="another save"):
        loaded(saved)


def test_many_threads_save_one_retriever_to_one_place(tmp_path: Path) -> None:
    search = dspy.Embeddings(CORPUS, letter_counts)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(search.save, [tmp_path] * 40))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, VECTORS]
    assert loaded(tmp_path).corpus == CORPUS


def test_file_in_the_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        dspy.Embeddings(CORPUS, letter_counts).save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- What is not there, damaged or hostile -------------------------------------------------------


@pytest.mark.parametrize("missing", ["", CONFIG, VECTORS])
def test_missing_file_is_named(missing: str, saved: Path) -> None:
    """As an error of the kind that DSPy raises."""
    if missing:
        (saved / missing).unlink()
    else:
        shutil.rmtree(saved)
    with pytest.raises(FileNotFoundError, match=missing or "saved"):
        loaded(saved)


def test_failed_load_takes_nothing_over(saved: Path) -> None:
    search = dspy.Embeddings(["old"], letter_counts)
    (saved / CONFIG).write_text("{")
    with pytest.raises(SavedEmbeddingsError):
        search.load(saved, letter_counts)
    assert search(QUERY).passages == ["old"]


def test_load_with_something_that_is_no_embedder_is_refused(saved: Path) -> None:
    with pytest.raises(LMConfigurationError, match="Embedder"):
        dspy.Embeddings.from_saved(saved, "openai/m")  # type: ignore[arg-type]


def drop_checksum(saved: Path) -> None:
    change(crc32=None)(saved)
    config = json.loads((saved / CONFIG).read_text())
    del config["crc32"]
    (saved / CONFIG).write_text(json.dumps(config))


def change(**values: Any) -> Callable[[Path], None]:
    def apply(saved: Path) -> None:
        config = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps({**config, **values}))

    return apply


def config(content: str | bytes) -> Callable[[Path], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda saved: (saved / CONFIG).write_bytes(raw) and None


def without(name: str) -> Callable[[Path], None]:
    def apply(saved: Path) -> None:
        config = json.loads((saved / CONFIG).read_text())
        del config[name]
        (saved / CONFIG).write_text(json.dumps(config))

    return apply


def vectors(content: bytes) -> Callable[[Path], None]:
    def apply(saved: Path) -> None:
        drop_checksum(saved)
        (saved / VECTORS).write_bytes(content)

    return apply


def cut(name: str, to: int) -> Callable[[Path], None]:
    return lambda saved: os.truncate(saved / name, to)


def pipe(name: str) -> Callable[[Path], None]:
    def apply(saved: Path) -> None:
        (saved / name).unlink()
        os.mkfifo(saved / name)

    return apply


def flip(saved: Path) -> None:
    raw = bytearray((saved / VECTORS).read_bytes())
    raw[-3] ^= 1
    (saved / VECTORS).write_bytes(raw)


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("planted",)


OBJECTS = np.array([[Planted()]] * 7, dtype=object)
GOOD = npy(np.ones((7, 3), dtype="<f4"))
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "config empty": (config(""), CONFIG),
    "config cut": (cut(CONFIG, 60), CONFIG),
    "config not UTF-8": (config(b'{"k": "\xff\xfe\xfa"}'), CONFIG),
    "config a list": (config("[1, 2]"), "no object"),
    "config too deep": (config("[" * 200_000), CONFIG),
    "config a huge number": (config('{"k": ' + "9" * 5000 + "}"), CONFIG),
    "config a pipe": (pipe(CONFIG), "regular file"),
    "of a later version": (change(format=2), "format 2"),
    **{
        f"no {name}": (without(name), f"`{name}`.*missing") for name in ("k", "normalize", "corpus")
    },
    "k zero": (change(k=0), "`k`"),
    "k true": (change(k=True), "`k`"),
    "k a float": (change(k=1.5), "`k`"),
    "normalize a word": (change(normalize="no"), "`normalize`"),
    "corpus a string": (change(corpus="abcdefg"), "`corpus`"),
    "corpus of numbers": (change(corpus=[1] * 7), "`corpus`"),
    "corpus shorter": (change(corpus=CORPUS[:-1]), "6 passages"),
    "corpus longer": (change(corpus=[*CORPUS, "x"]), "8 passages"),
    "one bit flipped": (flip, "damaged"),
    "vectors empty": (vectors(b""), "no `.npy`"),
    "vectors cut in the magic": (cut(VECTORS, 5), "no `.npy`"),
    "vectors cut in the header": (cut(VECTORS, 60), "header"),
    "vectors cut in the numbers": (cut(VECTORS, 300), "bytes"),
    "vectors with more behind": (vectors(GOOD + b"\0\0\0\0"), "bytes"),
    "vectors a pipe": (pipe(VECTORS), "regular file"),
    "another file": (vectors(b"PK\3\4" + b"\0" * 100), "no `.npy`"),
    "a pickle": (vectors(pickle.dumps(OBJECTS.tolist())), "no `.npy`"),
    "an array of objects": (vectors(npy(OBJECTS, allow_pickle=True)), "never loaded"),
    "version 9": (vectors(described(shaped("(7, 3)"), version=b"\x09\0")), "no `.npy`"),
    "header of 4 GB": (vectors(described("", version=b"\2\0", length=2**32 - 1)), "header"),
    "header cut": (vectors(described(shaped("(7, 3)"), length=9000)), "header"),
    "header of code": (vectors(described("__import__('os').mkdir('planted')\n")), "header"),
    "header too deep": (vectors(described("(" * 9000)), "header"),
    "shape of code": (vectors(described(shaped("(7, 3*9**9**9)"))), "header"),
    "shape negative": (vectors(described(shaped("(-7, 3)"))), "header"),
    "shape huge": (vectors(described(shaped("(7, 99999999999999999999999999)"))), "dimensions"),
    "shape larger than the file": (vectors(described(shaped("(7, 60000)"))), "bytes"),
    "no dimensions": (vectors(described(shaped("(7, 0)"))), "dimensions"),
    "one axis": (vectors(npy(np.ones(7, dtype="<f4"))), "shape"),
    "three axes": (vectors(npy(np.ones((7, 1, 1), dtype="<f4"))), "shape"),
    "Fortran order": (vectors(npy(np.asfortranarray(np.ones((7, 3), "<f4")))), "C order"),
    "big-endian": (vectors(npy(np.ones((7, 3), dtype=">f4"))), "little-endian"),
    "whole numbers": (vectors(npy(np.ones((7, 3), dtype="<i8"))), "float32"),
    "half precision": (vectors(npy(np.ones((7, 3), dtype="<f2"))), "float32"),
    "records": (vectors(npy(np.ones((7, 3), dtype=[("a", "<f4")]))), "header"),
    "NaN": (vectors(npy(np.full((7, 3), np.nan, dtype="<f4"))), "passage 0"),
    "infinities": (vectors(npy(np.diag([np.inf, -np.inf] * 3 + [1.0]).astype("<f4"))), "passage 0"),
    "beyond float32": (vectors(npy(np.full((7, 3), 1e300))), "passage 0"),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
@pytest.mark.filterwarnings("ignore:overflow")
def test_damaged_and_hostile_files_are_refused(
    damage: Any, words: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naming the file, running nothing, and before much memory is taken."""
    damage(saved)
    monkeypatch.chdir(saved)
    with pytest.raises(SavedEmbeddingsError, match=words) as caught:
        loaded(saved)
    assert str(saved) in str(caught.value)
    assert not (saved / "planted").exists()


def long_header(saved: Path) -> None:
    vectors(described("", version=b"\2\0", length=1 << 26))(saved)
    os.truncate(saved / VECTORS, 1 << 27)  # a file full of holes takes no room


@pytest.mark.parametrize(
    "promise", [vectors(described(shaped("(7, 65536)"), bytes(1000))), long_header]
)
def test_header_that_promises_too_much_costs_no_memory(promise: Any, saved: Path) -> None:
    """Sizes are compared before anything is read."""
    promise(saved)
    tracemalloc.start()
    try:
        with pytest.raises(SavedEmbeddingsError, match=r"bytes|header"):
            loaded(saved)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_config_beyond_its_limit_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_files, "MAX_CONFIG_BYTES", 100)
    with pytest.raises(SavedEmbeddingsError, match="more than 100 bytes"):
        loaded(saved)


@pytest.mark.skipif(sys.platform == "win32", reason="needs `flock`")
def test_saves_and_loads_at_once_see_one_save_whole(tmp_path: Path) -> None:
    """Two savers would mix their files for good, in about every second of these rounds."""
    ours = dspy.Embeddings(CORPUS, letter_counts, k=3)
    other = dspy.Embeddings(CORPUS[:2], letter_counts, k=2)
    ours.save(tmp_path)
    meeting = threading.Barrier(3, timeout=20)

    def together(work: Callable[[], Any]) -> Any:
        meeting.wait()
        return work()

    works = [lambda: ours.save(tmp_path), lambda: other.save(tmp_path), lambda: loaded(tmp_path)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(60):
            *_, found = pool.map(together, works)
            for retriever in (found, loaded(tmp_path)):
                assert (retriever.corpus, retriever.k) in [(CORPUS, 3), (CORPUS[:2], 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, VECTORS]


@pytest.mark.skipif(sys.platform == "win32", reason="needs `flock`")
def test_lock_that_somebody_keeps_holds_nobody_up(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl  # not on every system

    monkeypatch.setattr(saved_files, "_MAX_WAIT_S", 0.05)
    opened = os.open(saved, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        loaded(saved).save(saved)
    finally:
        os.close(opened)
    assert loaded(saved).corpus == CORPUS
