"""Texts that are too long for a model: cut into chunks, cut off, and their vectors made one.

Not here: what a token is (`models/embedding/tokens.py`).
"""

from __future__ import annotations

import bisect
import math
import operator
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from dspylite.errors import EmbeddingShapeError, EmbeddingValueError, LMConfigurationError
from dspylite.models.embedding.tokens import Tokenizer

# Where a sentence ends, or a line: linear in the text, for a run of marks begins at one place only.
_BORDER = re.compile(
    r"(?<![.!?\u2026])([.!?\u2026\u061f\u06d4\u0964]++[\"'\u2019\u201d\u00bb)\]]{0,3}+)(?=\s)(?!\s++[a-z])"
    r"|([\u3002\uff01\uff1f\uff0e]++[\u300d\u300f\uff09\u201d\u2019]{0,3}+)"
    r"|[\n\r\u2028\u2029]\s*+"
)
_BLANK = re.compile(r"\s*+")
_GAPS = (" ", "\t", "\u3000", "\xa0")
_JOINER = "\u200d"
_JOINED = re.compile(
    "[\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f\u1160-\u11ff]"
)  # skins, tags, jamo
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")  # two of these letters are a flag
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SAME = 1e-6  # of the mean length: what is left of vectors that cancel out is rounding


class Chunk(NamedTuple):
    """A part of a text.

    Attributes:
        text: Without the blanks around it; never empty.
        tokens: How many it has, without the special ones.
    """

    text: str
    tokens: int


def split_text(
    text: str, max_tokens: int, tokenizer: Tokenizer, *, overlap: int = 0
) -> list[Chunk]:
    """Cut a text into chunks, in order.

    Each ends where a sentence, a line or a paragraph does, the last one that fits; where none does,
    between two words, and else between two tokens, but not inside a character that is made of
    several. Without overlap only blanks get lost between two chunks.

    Args:
        text: Any text. Of one with nothing but blanks there are no chunks; one that fits is one
            chunk.
        max_tokens: Most tokens of a chunk. Those that the model adds are not counted, so a caller
            who knows the model's limit takes `tokenizer.special` off it.
        tokenizer: What counts.
        overlap: Tokens at the end of a chunk that begin the next one too: about so many or fewer,
            so that it begins with a sentence or a word. 0 by default.

    Raises:
        LMConfigurationError: `max_tokens` is below 1, or less than one character of the text needs;
            `overlap` is below 0, or not below `max_tokens`.

    Example:
        >>> from dspylite.models.embedding.tokens import EstimatedTokens
        >>> [chunk.text for chunk in split_text("One. Two. Three.", 4, EstimatedTokens())]
        ['One. Two.', 'Three.']
    """
    check_limit(max_tokens)
    if not isinstance(overlap, int) or isinstance(overlap, bool) or not 0 <= overlap < max_tokens:
        raise LMConfigurationError(
            f"`overlap` must be a whole number from 0 to below `max_tokens`, {max_tokens}, "
            f"not {overlap!r}."
        )
    return list(_Cutter(text, tokenizer).chunks(max_tokens, overlap))


def truncate_text(text: str, max_tokens: int, tokenizer: Tokenizer) -> str:
    """Return the beginning of a text that has at most `max_tokens` tokens; all of it if it fits.

    Args:
        text: Any text.
        max_tokens: Most tokens, without those that the model adds.
        tokenizer: What counts.

    Raises:
        LMConfigurationError: `max_tokens` is below 1, or less than the first character needs.

    Example:
        >>> from dspylite.models.embedding.tokens import EstimatedTokens
        >>> truncate_text("One. Two. Three.", 3, EstimatedTokens())
        'One. Two'
    """
    check_limit(max_tokens)
    cutter = _Cutter(text, tokenizer)
    return text[: cutter.fit(0, 0, max_tokens, nicely=False).end]


def check_limit(max_tokens: object) -> None:
    """Refuse what is no number of tokens.

    Raises:
        LMConfigurationError: It is no whole number from 1.
    """
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise LMConfigurationError(
            f"`max_tokens` must be a whole number from 1, not {max_tokens!r:.100}."
        )


def pool(vectors: Sequence[array[float]], weights: Sequence[float]) -> array[float]:
    """Make the vectors of the chunks of a text one: their weighted mean, at length 1.

    Args:
        vectors: One for each chunk, of equal dimensions.
        weights: One for each vector: the tokens of its chunk.

    Returns:
        float32 numbers; all zero if all vectors are.

    Raises:
        EmbeddingShapeError: There are no vectors, or not as many as weights, or their dimensions
            differ.
        EmbeddingValueError: The vectors cancel out, so that their mean points nowhere; a weight is
            negative or not finite, or all are 0; a vector holds NaN or infinity.

    Example:
        >>> pool([array("f", [1, 0]), array("f", [0, 1])], [3, 4]).tolist()
        [0.6000000238418579, 0.800000011920929]

    Source:
        https://cookbook.openai.com/examples/embedding_long_inputs
    """
    dims = {len(vector) for vector in vectors}
    if len(dims) != 1 or len(vectors) != len(weights):
        raise EmbeddingShapeError(
            f"{len(vectors)} vectors of {sorted(dims)} dimensions and {len(weights)} weights "
            "cannot be made one vector."
        )
    if not all(map(math.isfinite, weights)) or min(weights) < 0 or not any(weights):
        raise EmbeddingValueError(
            "Weights must be finite numbers from 0, one of them above it, "
            f"not {list(weights)!r:.100}."
        )
    largest = max(weights)
    total = [0.0] * dims.pop()
    lengths = 0.0  # of all vectors, weighted
    for vector, weight in zip(vectors, weights, strict=True):
        share = weight / largest
        numbers = vector.tolist()
        lengths += share * _length(numbers)
        total = list(map(operator.add, total, map(operator.mul, numbers, repeat(share))))
    length = _length(total)
    if not math.isfinite(length):
        raise EmbeddingValueError("A vector of a chunk holds NaN or infinity.")
    if not lengths:
        return array("f", total)
    if length <= _SAME * lengths:
        raise EmbeddingValueError(
            "The vectors of the chunks of a text cancel out, so that their mean points nowhere."
        )
    return array("f", map(operator.truediv, total, repeat(length)))


class _Cut(NamedTuple):
    end: int
    tokens: int


class _Cutter:
    """One text, the ends of its tokens, and the places where it may be cut.

    A part of a text can have more tokens than it had in the whole, as where a long word is cut in
    two, so each is counted again by itself, and made smaller until it fits.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._ends = tokenizer.ends(text)
        self._borders: list[int] = []

    def chunks(self, most: int, overlap: int) -> Iterator[Chunk]:
        text = self._text
        if len(self._ends) <= most:
            if self._skip_blank(0) < len(text):
                yield Chunk(text, len(self._ends))
            return
        found = _BORDER.finditer(text)
        self._borders = [match.end() if match.lastindex else match.start() for match in found]
        start = done = self._skip_blank(
            0
        )  # where the chunk begins; all before `done` has been in one
        while done < len(text):
            end, tokens = self.fit(start, done, most, nicely=True)
            if end <= done:  # what was to be repeated leaves no room
                end, tokens = self.fit(done, done, most, nicely=True)
                start = done
            yield Chunk(text[start:end].rstrip(), tokens)
            done = self._skip_blank(end)
            start = self._back(start, end, done, overlap) if overlap else done

    def fit(self, start: int, done: int, most: int, *, nicely: bool) -> _Cut:
        """Find the part from `start` that has no more than `most` tokens, and ends behind `done`.

        Its end is not behind `done` where nothing fits; where `start` is `done`, that is an error.
        """
        text, ends = self._text, self._ends
        first = self._tokens_before(start)
        room = most
        while room > 0:
            last = min(first + room, len(ends)) - 1
            end = ends[last] if last >= first else len(text)
            if end < len(text):
                end = self._nicer(start, done, end) if nicely else self._whole(done, end)
            if end <= done:
                break
            tokens = self._count(start, end, nicely=nicely)
            if tokens <= most:
                return _Cut(end, tokens)
            room -= tokens - most
        if start < done or start == len(text):
            return _Cut(done, 0)
        end = start + (2 if _PAIR.match(text, start) else 1)
        tokens = self._count(start, end, nicely=nicely)
        if tokens > most:
            raise LMConfigurationError(
                f"`max_tokens` is {most}, but {text[start:end]!r} alone has {tokens} tokens."
            )
        return _Cut(end, tokens)

    def _count(self, start: int, end: int, *, nicely: bool) -> int:
        part = self._text[start:end]
        return len(self._tokenizer.ends(part.rstrip() if nicely else part))

    def _tokens_before(self, place: int) -> int:
        """Count the tokens that end before a character does that begins at `place`."""
        index = bisect.bisect_left(self._ends, place)
        at = index < len(self._ends) and self._ends[index] == place
        return index + 1 if at and place else index

    def _nicer(self, start: int, done: int, end: int) -> int:
        """Return the best place to cut between `done` and `end`."""
        text, borders = self._text, self._borders
        index = bisect.bisect_right(borders, end) - 1
        if index >= 0 and borders[index] > done:
            return borders[index]
        if text[end].isspace():
            return end
        half = max(done, end - (end - start) // 2)
        gap = max(text.rfind(blank, half, end) for blank in _GAPS)
        return gap if gap > done else self._whole(done, end)

    def _whole(self, done: int, end: int) -> int:
        """Move back to where no visible character is cut, if there is such a place."""
        for place in range(end, done, -1):
            if not self._inside(place, done):
                return place
        return end - 1 if _PAIR.match(self._text, end - 1) else end

    def _inside(self, place: int, low: int) -> bool:
        """Tell whether the characters around `place` are shown as one."""
        before, after = self._text[place - 1], self._text[place]
        if before < "\u0300" and after < "\u0300":
            return before == "\r" and after == "\n"
        if (
            _JOINER in {before, after}
            or _JOINED.match(after)
            or unicodedata.category(after)[0] == "M"
        ):
            return True
        if _FLAG.match(before) and _FLAG.match(after):
            run = place
            while run > low and _FLAG.match(self._text[run - 1]):
                run -= 1
            return (place - run) % 2 == 1
        return _PAIR.match(self._text, place - 1) is not None

    def _back(self, start: int, end: int, done: int, overlap: int) -> int:
        """Return where a chunk begins that repeats up to `overlap` tokens of the one before it."""
        text, borders = self._text, self._borders
        last = self._tokens_before(end) - overlap - 1
        low = max(self._ends[last] if last >= 0 else 0, start + 1)
        index = bisect.bisect_left(borders, low)
        if index < len(borders) and (place := self._skip_blank(borders[index])) < done:
            return place
        gaps = [gap for blank in _GAPS if (gap := text.find(blank, low - 1, end)) >= 0]
        if gaps and (place := self._skip_blank(min(gaps))) < done:
            return place
        while low < end and self._inside(low, start):
            low += 1
        return min(self._skip_blank(low), done)

    def _skip_blank(self, place: int) -> int:
        match: Any = _BLANK.match(self._text, place)
        return int(match.end())


def _length(numbers: list[float]) -> float:
    return math.sqrt(math.fsum(map(operator.mul, numbers, numbers)))
