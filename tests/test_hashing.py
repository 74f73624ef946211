"""`hash_embedding`: the same unit vector everywhere, and near where texts share words."""

import math
import os
import subprocess
import sys
import zlib
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspylite.errors import EmbeddingError, EmbeddingShapeError
from dspylite.models.offline.hashing import hash_embedding

PARAGRAPH = (
    "The cache keeps answers on disk, keyed by the whole request. A second call with the same "
    "request is answered from there, and costs nothing. Nothing is kept of a call that failed."
)
PINNED = {"hello world": 1258295593, PARAGRAPH: 669273874, "": 734233195}


def fingerprint(vector: "array[float]") -> int:
    """Sum up which coordinates are positive, negative or nothing; roundings do not matter."""
    signs = ("0" if abs(value) < 1e-6 else "+" if value > 0 else "-" for value in vector)
    return zlib.crc32("".join(signs).encode())


def cosine(one: str, other: str) -> float:
    """Compare two texts."""
    return sum(map(float.__mul__, hash_embedding(one), hash_embedding(other)))


def test_a_short_text_gives_the_pinned_vector() -> None:
    """Stored vectors stay usable: no release may change them silently."""
    expected = [-0.102062, 0.102062, 0.306186, 0.0, -0.204124, 0.102062, -0.714435, -0.102062]
    expected += [-0.102062, 0.0, -0.408248, -0.204124, 0.0, -0.306186, 0.0, 0.0]
    assert list(hash_embedding("hello world", 16)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("text", PINNED)
def test_long_vectors_keep_their_fingerprint(text: str) -> None:
    """The pin covers stop words, pairs, repeated words and the default number of dimensions."""
    assert PINNED[text] == fingerprint(hash_embedding(text))


def test_another_process_gives_the_same_vector() -> None:
    """Python's own hash differs between processes, so it must play no part."""
    code = (
        "import sys; from dspylite.models.offline.hashing import hash_embedding;"
        "sys.stdout.write(hash_embedding(sys.argv[1], 64).tobytes().hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, PARAGRAPH],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert {hash_embedding(PARAGRAPH, 64).tobytes().hex()} == found


@given(st.text(), st.integers(min_value=1, max_value=700))
def test_every_text_gives_a_unit_vector_of_float32(text: str, dimensions: int) -> None:
    """Cosines are dot products, whatever is embedded."""
    vector = hash_embedding(text, dimensions)
    assert ("f", dimensions) == (vector.typecode, len(vector))
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


def test_texts_without_words_share_a_vector_of_their_own() -> None:
    """An empty text is near nothing but other empty texts, and no cosine is undefined."""
    assert hash_embedding("") == hash_embedding("?! ...")
    assert abs(cosine("", PARAGRAPH)) < 0.2


def test_weights_that_cancel_still_give_a_unit_vector() -> None:
    """With one dimension, words of opposite sign can add up to nothing."""
    lengths = {abs(hash_embedding(f"{a} {b}", 1)[0]) for a in "abcdefgh" for b in "abcdefgh"}
    assert {1.0} == lengths


@pytest.mark.parametrize(
    ("query", "near", "far"),
    [
        ("How are requests cached?", PARAGRAPH, "Retries wait longer after each failure."),
        ("limit the rate of calls", "A rate limit bounds calls per minute.", "Cats sleep all day."),
        ("configuring threads", "Threads share one configuration.", "A cat sleeps in the sun."),
        ("retrying", "retry", "caching"),
        ("the disk", "disk", "the cat"),
    ],
)
def test_texts_that_share_words_or_pieces_are_nearer(query: str, near: str, far: str) -> None:
    """What a search relies on: related texts come first, also where endings differ."""
    assert cosine(query, near) > cosine(query, far) + 0.05


def test_the_order_of_words_counts() -> None:
    """Pairs of neighbours tell texts apart that have the same words."""
    assert cosine("dog bites man", "man bites dog") < cosine("dog bites man", "a dog bites man")


def test_case_and_punctuation_do_not_count() -> None:
    """A title and a sentence about the same thing meet."""
    assert hash_embedding("Rate limit!") == hash_embedding("rate, limit")


def test_half_a_surrogate_pair_is_embedded() -> None:
    """Broken text must not break a batch."""
    assert math.hypot(*hash_embedding("a\ud800b")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dimensions", [0, -1])
def test_no_dimensions_are_refused(dimensions: int) -> None:
    """The message says what to ask for."""
    with pytest.raises(EmbeddingShapeError, match="ask for 1 or more") as caught:
        hash_embedding("a", dimensions)
    assert isinstance(caught.value, EmbeddingError)
