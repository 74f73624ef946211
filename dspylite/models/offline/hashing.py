"""Turns a text into a vector by hashing its words and pieces of words, with no model at all.

Not here: the embedder that users make, its chunks and its cache.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import zlib
from array import array
from collections import Counter

from dspylite.errors import EmbeddingShapeError

MAX_WORD_CHARS = 64
"""Characters of one word that are looked at; longer ones are base64, hashes and the like."""

# Changing any number or word below changes every vector, and makes stored ones useless.
_WORD_WEIGHT, _PAIR_WEIGHT, _PIECE_WEIGHT, _STOP_WEIGHT = 1.0, 0.5, 0.25, 0.1  # guessed
_STOP_WORDS = frozenset(
    "a an and are as at be but by can could did do does for from had has have how i if in into is "
    "it its may me my no not of on or our should so than that the their them then there these they "
    "this those to was we were what when where which who why will with would you your".split()
)
_WORD = re.compile(r"\w+")
_NO_WORDS = " "  # which no word and no piece of one is


def hash_embedding(text: str, dimensions: int = 512) -> array[float]:
    """Map a text to a point on the unit sphere, near those of texts that share words with it.

    Each word, each pair of neighbouring words and each piece of 3 to 5 characters of a word adds
    `±(1 + ln(count)) * weight` to the coordinate that a hash of it names; another bit of the hash
    gives the sign, so that collisions cancel on average instead of adding up. Pieces of words let
    "cache" meet "caching". Case and punctuation do not count.

    The vector depends on the text alone: it is the same in every process, on every platform and
    Python version, up to rounding in the last digits and to letters new in Unicode.

    Args:
        text: Any string, also one without words.
        dimensions: Length of the vector, at least 1; more dimensions mean fewer collisions.

    Returns:
        `dimensions` float32 numbers of Euclidean length 1. All texts without a word (the empty one,
        `"?!"`) share one vector, which is also of length 1, so that a cosine is always defined.

    Raises:
        EmbeddingShapeError: `dimensions` is below 1.

    Example:
        >>> query, near, far = map(
        ...     hash_embedding, ["caching on disk", "The disk cache.", "Cats sleep."]
        ... )
        >>> len(query), round(sum(x * x for x in query), 4)
        (512, 1.0)
        >>> sum(map(float.__mul__, query, near)) > 0.3 > sum(map(float.__mul__, query, far))
        True

    Source:
        Weinberger, Dasgupta, Langford, Smola, Attenberg: Feature Hashing for Large Scale Multitask
        Learning, ICML 2009, https://arxiv.org/abs/0902.2206. Pieces of words with marked ends are
        those of Bojanowski et al. 2017, https://arxiv.org/abs/1607.04606.
    """
    if dimensions < 1:
        raise EmbeddingShapeError(
            f"A vector of {dimensions} dimensions is none; ask for 1 or more."
        )
    sums = [0.0] * dimensions
    words = [word[:MAX_WORD_CHARS] for word in _WORD.findall(text.lower())]
    pieces: Counter[int] = Counter()
    for word, count in Counter(words).items():
        stop = word in _STOP_WORDS
        _add(sums, _hash(word), (_STOP_WEIGHT if stop else _WORD_WEIGHT) * (1.0 + math.log(count)))
        if not stop:
            for piece in _pieces(word):
                pieces[piece] += count
    for pair, count in Counter(itertools.pairwise(words)).items():
        _add(sums, _hash(f"{pair[0]} {pair[1]}"), _PAIR_WEIGHT * (1.0 + math.log(count)))
    for piece, count in pieces.items():
        _add(sums, piece, _PIECE_WEIGHT * (1.0 + math.log(count)))
    length = math.hypot(*sums)
    if length < 1e-9:  # no words, or all of them cancelled
        sums = [0.0] * dimensions
        _add(sums, _hash(_NO_WORDS), 1.0)
        length = 1.0
    return array("f", [value / length for value in sums])


def _add(sums: list[float], feature: int, weight: float) -> None:
    place = (feature >> 1) % len(sums)
    sums[place] += weight if feature & 1 else -weight


def _hash(feature: str) -> int:
    """Spread a feature over 32 bits.

    CRC alone is linear: features with the same difference would collide all or none. Multiplying
    breaks that; the constant is murmur3's.
    """
    mixed = zlib.crc32(feature.encode("utf-8", "surrogatepass"))
    mixed ^= mixed >> 16
    mixed = mixed * 0x85EBCA6B & 0xFFFFFFFF
    return mixed ^ mixed >> 13


@functools.lru_cache(maxsize=4096)
def _pieces(word: str) -> array[int]:
    """Hash the runs of 3 to 5 characters of a word whose ends are marked."""
    marked = f"<{word}>"
    return array(
        "L",
        [
            _hash(marked[start : start + size])
            for size in (3, 4, 5)
            for start in range(len(marked) - size + 1)
        ],
    )
