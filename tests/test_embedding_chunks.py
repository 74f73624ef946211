"""Texts that are too long: cut into chunks, cut off, and their vectors made one.

Not here: what a token is (`test_embedding_tokens.py`).
"""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspylite import EmbeddingShapeError, EmbeddingValueError, LMConfigurationError
from dspylite.models.embedding.chunks import Chunk, pool, split_text, truncate_text
from dspylite.models.embedding.tokens import (
    EstimatedTokens,
    FunctionTokens,
    OpenAITokens,
    Tokenizer,
)


class Words:
    """Each word is a token, together with the blanks before it: easy to count by hand."""

    name = "words"
    special = 0

    def ends(self, text: str) -> Sequence[int]:
        words = text.split()
        found, place = [], 0
        for word in words:
            place = text.index(word, place) + len(word)
            found.append(place)
        return [*found[:-1], len(text)] if text else []


class Bytes:
    """Each byte is a token."""

    name = "bytes"
    special = 0

    def ends(self, text: str) -> Sequence[int]:
        raw = (len(char.encode("utf-8", "surrogatepass")) for char in text)
        return [at + (byte == size) for at, size in enumerate(raw) for byte in range(1, size + 1)]


class Whole:
    """Everything is one token, until it is longer than that: cutting never makes it less."""

    name = "whole"
    special = 0

    def ends(self, text: str) -> Sequence[int]:
        return [*range(1, len(text)), len(text), len(text)] if text else []


TOKENIZERS: dict[str, Tokenizer] = {
    "words": Words(),
    "bytes": Bytes(),
    "estimate": EstimatedTokens(),
    "OpenAI": OpenAITokens(),
    "function": FunctionTokens(lambda text: list(text.encode("utf-8", "replace"))),
}

by_all = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))

texts = st.lists(
    st.text(st.characters(exclude_categories=()), max_size=12)
    | st.sampled_from(
        (
            "One sentence. |Really?! |no end |\n\n|    |。|「本当。」|人工智能|\r\n|"
            "👩‍👩‍👧|🇩🇪🇯🇵|e\u0301\u0301|👍🏽|\ud83d\ude00|Autobahngeschwindigkeit|각"
        ).split("|")
    ),
    max_size=30,
).map("".join)


def places(text: str, chunks: list[Chunk]) -> list[int]:
    """Find each chunk in the text behind the one before it; only blanks may lie between them."""
    found, place = [], 0
    for chunk in chunks:
        start = text.index(chunk.text, place)
        assert not text[place:start].strip()
        found.append(start)
        place = start + len(chunk.text)
    assert not text[place:].strip()
    return found


# --- What always holds -------------------------------------------------------------------------


@by_all
@settings(deadline=None)  # the first text loads a vocabulary
@given(text=texts, most=st.integers(12, 40))
def test_chunks_are_the_text_without_blanks_between_them_and_none_is_too_long(
    tokenizer: Tokenizer, text: str, most: int
) -> None:
    """A part that is lost is never found again, one that is too long is cut by the server."""
    chunks = split_text(text, most, tokenizer)
    places(text, chunks)
    for chunk in chunks:
        assert chunk.text.strip()
        assert chunk.tokens == len(tokenizer.ends(chunk.text)) <= most


@by_all
@settings(deadline=None)  # the first text loads a vocabulary
@given(text=texts, most=st.integers(12, 40), data=st.data())
def test_with_overlap_nothing_is_lost_and_each_chunk_goes_on(
    tokenizer: Tokenizer, text: str, most: int, data: st.DataObject
) -> None:
    """Whatever the overlap, it ends, and the chunks cover the text in order."""
    overlap = data.draw(st.integers(0, most - 1))
    chunks = split_text(text, most, tokenizer, overlap=overlap)
    reached = {0}  # where the chunks so far may end, for a text may repeat itself
    for chunk in chunks:
        assert chunk.tokens == len(tokenizer.ends(chunk.text)) <= most
        found = {place for place in range(len(text)) if text.startswith(chunk.text, place)}
        reached = {
            place + len(chunk.text)
            for end in reached
            for place in found
            if not text[end:place].strip() and place + len(chunk.text) > end
        }
    assert any(not text[end:].strip() for end in reached)


@by_all
@settings(deadline=None)  # the first text loads a vocabulary
@given(text=texts, most=st.integers(12, 40))
def test_text_that_is_cut_off_is_its_longest_beginning_or_nearly(
    tokenizer: Tokenizer, text: str, most: int
) -> None:
    """It fits, it is the beginning, and of a text that fits nothing is taken."""
    cut = truncate_text(text, most, tokenizer)
    assert text.startswith(cut)
    if len(tokenizer.ends(text)) <= most:
        assert cut == text
    else:
        assert 0 < len(tokenizer.ends(cut)) <= most


# --- Where it is cut ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("One two. Three four. Five.", 4, ["One two. Three four.", "Five."]),
        ("One two. Three four. Five.", 3, ["One two.", "Three four. Five."]),
        ("Is it? Yes! So be it.", 3, ["Is it? Yes!", "So be it."]),
        ('He said "no." Then he left.', 4, ['He said "no."', "Then he left."]),
        ("one two\nthree four five", 4, ["one two", "three four five"]),
        (
            "# Title\n\nA paragraph here\n\n\nand more",
            4,
            ["# Title", "A paragraph here", "and more"],
        ),
        ("a b c d e f g", 3, ["a b c", "d e f", "g"]),
        ("  one two three  ", 2, ["one two", "three"]),
        ("See e.g. this one here. And more.", 5, ["See e.g. this one here.", "And more."]),
        ("Version 3.14 is out now.", 3, ["Version 3.14 is", "out now."]),
        ("one two three", 3, ["one two three"]),
        (" fits as it is ", 4, [" fits as it is "]),
        ("", 3, []),
        (" \n\t ", 3, []),
    ],
)
def test_text_is_cut_where_sentences_and_lines_end_and_else_between_words(
    text: str, most: int, expected: list[str]
) -> None:
    """A chunk that ends in the middle of a thought is found by neither half of it."""
    assert [chunk.text for chunk in split_text(text, most, Words())] == expected


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("これは。それは。あれは。", 26, ["これは。それは。", "あれは。"]),
        ("「本当。」それは。", 16, ["「本当。」", "それは。"]),
        ("人工智能", 6, ["人工", "智能"]),
        ("Unfathomable", 5, ["Unfat", "homab", "le"]),
        ("ab cd ef", 6, ["ab cd", "ef"]),
    ],
)
def test_scripts_without_blanks_are_cut_behind_their_full_stops(
    text: str, most: int, expected: list[str]
) -> None:
    """A full stop of Chinese or Japanese is followed by no blank."""
    assert [chunk.text for chunk in split_text(text, most, Bytes())] == expected


CLUSTERS = {
    "accents": "e\u0301\u0323",
    "family": "👩‍👩‍👧",
    "flag": "🇩🇪",
    "skin": "👍🏽",
    "keycap": "1️⃣",
    "tags": "🏴\U000e0067\U000e0062\U000e007f",
    "jamo": "\u1100\u1161\u11a8",
    "halves": "\ud83d\ude00",
    "Devanagari": "नि",
}


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=list(CLUSTERS))
def test_what_is_shown_as_one_character_is_not_cut(cluster: str) -> None:
    """Half a flag is a letter, and half a surrogate pair no text at all."""
    size = len(Bytes().ends(cluster))
    for most in range(size, 3 * size):
        for chunk in split_text(cluster * 12, most, Bytes()):
            assert chunk.text == cluster * (len(chunk.text) // len(cluster))
        cut = truncate_text(cluster * 12, most, Bytes())
        assert cut == cluster * (most // size)


def test_character_that_does_not_fit_whole_is_cut_between_its_parts() -> None:
    """A letter with a thousand accents must not be an error where each of them would fit."""
    text = "a" + "\u0301" * 1_000
    chunks = split_text(text, 7, Bytes())
    assert "".join(chunk.text for chunk in chunks) == text
    assert max(chunk.tokens for chunk in chunks) <= 7


@pytest.mark.parametrize("call", [split_text, truncate_text])
def test_limit_that_no_character_fits_in_is_an_error(call: Any) -> None:
    """To give less would lose text, to give more would break the limit."""
    with pytest.raises(LMConfigurationError, match="'😀' alone has 4 tokens"):
        call("😀😀", 3, Bytes())


def test_tokenizer_that_counts_more_in_parts_is_obeyed() -> None:
    """A part is counted by itself: there is one token more in each than in the whole."""
    chunks = split_text("abcdefghij", 4, Whole())
    assert [chunk.text for chunk in chunks] == ["abc", "def", "ghi", "j"]
    assert [chunk.tokens for chunk in chunks] == [4, 4, 4, 2]


# --- Overlap -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most", "overlap", "expected"),
    [
        ("a b c d e f g", 4, 2, ["a b c d", "c d e f", "e f g"]),
        ("a b c d e f g", 4, 3, ["a b c d", "b c d e", "c d e f", "d e f g"]),
        ("A b. C d. E f. G h.", 4, 2, ["A b. C d.", "C d. E f.", "E f. G h."]),
        ("A b. C d. E f. G h.", 4, 3, ["A b. C d.", "C d. E f.", "E f. G h."]),
        ("A b. C d e f. G h.", 4, 1, ["A b.", "b. C d e", "e f. G h."]),
        ("one two three", 3, 2, ["one two three"]),
    ],
)
def test_overlap_begins_with_a_sentence_or_a_word(
    text: str, most: int, overlap: int, expected: list[str]
) -> None:
    """What is at a border is found by both chunks."""
    found = [chunk.text for chunk in split_text(text, most, Words(), overlap=overlap)]
    assert found == expected


@settings(deadline=None)  # the first text loads a vocabulary
@given(st.integers(2, 30), st.data())
def test_overlap_is_no_longer_than_was_asked(most: int, data: st.DataObject) -> None:
    """Each token that is repeated is paid twice."""
    overlap = data.draw(st.integers(0, most - 1))
    words = [str(number) for number in range(200)]
    chunks = split_text(" ".join(words), most, Words(), overlap=overlap)
    for one, other in itertools.pairwise(chunks):
        shared = set(one.text.split()) & set(other.text.split())
        assert len(shared) <= overlap


# --- What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "8", None, math.nan], ids=repr)
@pytest.mark.parametrize("call", [split_text, truncate_text])
def test_limit_that_is_no_number_of_tokens_is_refused(call: Any, most: object) -> None:
    """It is named, and what is right too."""
    with pytest.raises(LMConfigurationError, match="`max_tokens` must be a whole number from 1"):
        call("text", most, Words())


@pytest.mark.parametrize("overlap", [-1, 8, 9, True, 1.5, "1", None], ids=repr)
def test_overlap_that_leaves_no_room_is_refused(overlap: Any) -> None:
    """As large as a chunk, it would never come to an end."""
    with pytest.raises(LMConfigurationError, match="`overlap` must be a whole number from 0 to"):
        split_text("text", 8, Words(), overlap=overlap)


HOSTILE = {
    "a letter": "a" * 1_000_000,
    "blanks": " " * 1_000_000,
    "blanks between": "a" + " " * 1_000_000 + "b",
    "lines": "\n" * 1_000_000,
    "marks": "!" * 1_000_000,
    "marks and blanks": ". " * 300_000,
    "full stops": "。" * 300_000,
    "emoji": "😀" * 200_000,
    "flags": "🇩" * 200_000,
    "accents": "a" + "\u0301" * 400_000,
    "joiners": "\u200d" * 300_000,
    "halves": "\ud83d\ude00" * 200_000,
}


@pytest.mark.parametrize("tokenizer", [EstimatedTokens(), OpenAITokens()], ids=repr)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_megabyte_of_one_thing_is_cut_in_time(tokenizer: Tokenizer, text: str) -> None:
    """Time that grows with the square would be hours."""
    chunks = split_text(text, 5_000, tokenizer)
    assert "".join("".join(chunk.text for chunk in chunks).split()) == "".join(text.split())
    assert all(chunk.tokens <= 5_000 for chunk in chunks)
    truncate_text(text, 5_000, tokenizer)


# --- Pooling -----------------------------------------------------------------------------------

numbers = st.floats(-100, 100, width=32).filter(lambda number: abs(number) > 1e-3 or number == 0)


@settings(deadline=None)  # the first text loads a vocabulary
@given(
    st.integers(1, 6).flatmap(
        lambda dim: st.lists(
            st.tuples(st.lists(numbers, min_size=dim, max_size=dim), st.integers(1, 8_191)),
            min_size=1,
            max_size=5,
        )
    )
)
def test_pooled_vector_is_the_weighted_mean_at_length_one(
    rows: list[tuple[list[float], int]],
) -> None:
    """As OpenAI's recipe has it, computed here by another way."""
    total = sum(weight for _, weight in rows)
    mean = [
        math.fsum(row[column] * weight for row, weight in rows) / total
        for column in range(len(rows[0][0]))
    ]
    vectors, weights = [array("f", row) for row, _ in rows], [weight for _, weight in rows]
    lengths = math.fsum(math.hypot(*row) * weight for row, weight in rows) / total
    if lengths and math.hypot(*mean) <= 2e-6 * lengths:
        return  # they cancel out, or nearly
    found = pool(vectors, weights)
    assert found.typecode == "f"
    length = math.hypot(*mean) or 1.0
    assert found.tolist() == pytest.approx([number / length for number in mean], abs=1e-6)


def test_zeros_stay_zeros() -> None:
    """A function of a user's own may give them for a text without words; so may its chunks be."""
    assert pool([array("f", [0, 0]), array("f", [0, 0])], [1, 2]).tolist() == [0, 0]


def test_one_chunk_without_a_vector_does_not_count() -> None:
    """Zeros have no direction."""
    assert pool([array("f", [0, 0]), array("f", [0, 5])], [9, 1]).tolist() == [0, 1]


def test_vectors_that_cancel_out_are_an_error() -> None:
    """What rounding leaves of them would be a direction without a meaning."""
    one = array("f", [random.Random(n).uniform(-1, 1) for n in range(1_536)])
    other = array("f", (-3 * number for number in one))
    with pytest.raises(EmbeddingValueError, match="cancel out"):
        pool([one, other], [3, 1])


def test_large_numbers_and_weights_do_not_overflow() -> None:
    """float32 ends at 3e38, and so may a vector's numbers."""
    assert pool([array("f", [3e38, 0])] * 3, [1e308] * 3).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("vectors", "weights"), [([], []), ([[1, 2]], []), ([[1, 2], [1]], [1, 1]), ([[1]], [1, 1])]
)
def test_vectors_that_do_not_go_together_are_refused(
    vectors: list[list[float]], weights: list[float]
) -> None:
    """Two models, or a chunk that got no vector."""
    with pytest.raises(EmbeddingShapeError, match="cannot be made one vector"):
        pool([array("f", vector) for vector in vectors], weights)


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [math.nan, 1], [math.inf, 1]])
def test_weights_that_weigh_nothing_are_refused(weights: list[float]) -> None:
    """They would give NaN."""
    with pytest.raises(EmbeddingValueError, match="Weights must be"):
        pool([array("f", [1, 2])] * 2, weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_vector_that_is_not_finite_is_refused(bad: float) -> None:
    """One NaN poisons the vector of the whole text."""
    with pytest.raises(EmbeddingValueError, match="NaN or infinity"):
        pool([array("f", [1, 2]), array("f", [1, bad])], [1, 1])
