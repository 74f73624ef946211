"""What counts the tokens of a text as an embedding model would.

Not here: cutting texts by it (`models/embedding/chunks.py`), reading vocabularies
(`models/embedding/tokenizer_door.py`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from dspylite.errors import LMConfigurationError
from dspylite.models.embedding.tokenizer_door import load_cl100k, read_tokenizer_file

_SURROGATE = re.compile("[\ud800-\udfff]")
_OPENAI = re.compile(r"(?:.*/)?text-embedding-(?:3-small|3-large|ada-002)")
_MAX_BLANKS = 1_000
_BLANKS = re.compile(rf"(?<!\s)\s{{{_MAX_BLANKS},}}+")
_CONTINUED = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character

# Pieces of a text, and how many tokens one is taken for: `tokens` for each `chars` characters that
# it has or begins. Chosen so that texts of `tests/test_embedding_tokens.py` get no fewer than with
# cl100k_base, nor than with BERT's WordPiece, which spells out words of other languages. The space
# before a word is part of its token. The order matters.
_KINDS: tuple[tuple[str, int, int], ...] = (
    (r" ?[A-Za-z0-9+/]{32,}", 1, 1),  # base64, hexadecimal numbers, noise
    (r" ?[A-Z]?[a-z]{14,}", 1, 2),  # compounds
    (r" ?[A-Z]?[a-z]{10,}", 2, 5),
    (r" ?[A-Z]?[a-z]+", 1, 4),
    (r" ?[A-Z]+(?![a-z])", 2, 3),
    (r" ?[\u0400-\u052f]+", 7, 8),  # Cyrillic
    (r" ?[\u0370-\u03ff\u0590-\u08ff]+", 1, 1),  # Greek, Hebrew, Arabic
    (r"[\u3040-\u30ff]+", 1, 1),  # kana
    (r" +|\n+|\t+", 1, 8),
    (r"[\x00-\u02ff]", 1, 1),  # digits and signs each; letters with accents
    (r"[\u1200-\u139f\u3400-\u4dbf\U0001f000-\U0001faff]", 3, 1),  # Ethiopic, rare Han, emoji
    (r"[\u0300-\uffff]", 2, 1),  # Han, Hangul, the scripts of India, accents by themselves
    (r"[\U00010000-\U0010ffff]", 4, 1),
)
_PIECE = re.compile("|".join(f"({pattern})" for pattern, _, _ in _KINDS))


@runtime_checkable
class Tokenizer(Protocol):
    """What counts tokens: any object with these three. Threads share it.

    Attributes:
        name: Tells it from others, in errors.
        special: Tokens that the model adds around each text, such as 2 for `[CLS]` and `[SEP]`.
            `ends` does not count them.
    """

    @property
    def name(self) -> str:
        """Tells it from others."""
        ...

    @property
    def special(self) -> int:
        """Tokens that the model adds around each text."""
        ...

    def ends(self, text: str) -> Sequence[int]:
        """Return where each token ends, as an offset in characters.

        The offsets never go down, and the last one is the length of the text. `text[: ends[n - 1]]`
        has n tokens or fewer, for of a character made of several tokens only the last one ends
        behind it; one more where the cut makes two of a token.
        """
        ...


class EstimatedTokens:
    """Guesses the tokens of a text without a vocabulary, on the high side.

    Measured against OpenAI's `cl100k_base`, it gives 1.7 to 1.8 times as many for English and code,
    up to 2.6 for English of long words, 1.3 to 1.6 for German, 1.5 for base64, 1.5 to 2.2 for JSON,
    1.2 to 1.9 for Chinese, Japanese and Korean, 1.6 to 2.2 for Cyrillic, 1 to 1.4 for other scripts
    and languages of Europe and Arabic, 1.1 for emoji, 3 for digits.

    Against the English WordPiece of BERT and MiniLM, which has few words of other languages, it
    gives 1.5 for English and code, 1.1 to 1.2 for German, Dutch and Cyrillic, 1 to 1.3 for Romance
    languages.

    It gives too few for words of letters thrown together (0.6), rare Han signs (0.8) and, by
    WordPiece, Indonesian (0.9): give the model's own `tokenizer` for those.

    Example:
        >>> EstimatedTokens().ends("Two words, 7 tokens.")
        [3, 6, 9, 10, 11, 12, 15, 19, 20]
    """

    name = "estimate-2"
    special = 2  # what most models add

    def ends(self, text: str) -> Sequence[int]:
        """Return where each guessed token ends."""
        found: list[int] = []
        for piece in _PIECE.finditer(text):
            start, end = piece.span()
            _, tokens, chars = _KINDS[cast("int", piece.lastindex) - 1]
            count = -(-(end - start) * tokens // chars)
            if count == 1:
                found.append(end)
            else:
                length = end - start
                found.extend(start + length * i // count for i in range(1, count + 1))
        return found

    def __repr__(self) -> str:
        return "EstimatedTokens()"


class OpenAITokens:
    """The tokens of OpenAI's embedding models: `cl100k_base`, from the file that litellm ships."""

    name = "cl100k_base"
    special = 0

    def ends(self, text: str) -> Sequence[int]:
        """Return where each token ends."""
        encoding = load_cl100k()
        if encoding is None:  # pickled where there was one
            raise LMConfigurationError("The vocabulary `cl100k_base` is not in this environment.")
        clean = _without_surrogates(text)
        found = [token for part in _cut_blanks(clean) for token in encoding.encode_ordinary(part)]
        # A token is a string of bytes; a character ends where the next one's first byte follows.
        parts = encoding.decode_tokens_bytes(found)
        begun = itertools.accumulate(len(part.translate(None, _CONTINUED)) for part in parts)
        ends = list(begun)
        for i in range(len(parts) - 1):
            if _continues(parts[i + 1]):
                ends[i] -= 1
        return ends

    def __repr__(self) -> str:
        return "OpenAITokens()"


class FileTokens:
    """The tokens by a Hugging Face `tokenizer.json`. A pickle of it is the path, not the file.

    Raises:
        LMConfigurationError: The file is missing, cannot be read or is something else.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        read = read_tokenizer_file(self._path)
        self._tokenizer = read.tokenizer
        self.name = f"tokenizer.json-{read.digest}"
        self.special = read.special

    def ends(self, text: str) -> Sequence[int]:
        """Return where each token ends.

        Raises:
            LMConfigurationError: The process that this was pickled for has no such file.
        """
        if not text:
            return []
        if self._tokenizer is None:  # threads that come at once get the same one
            self._tokenizer = self._read_again()
        clean = _without_surrogates(text)
        offsets = self._tokenizer.encode(clean, add_special_tokens=False).offsets
        starts = (start for start, _ in itertools.islice(offsets, 1, None))
        # What lies between two tokens, such as a space, ends the first of them.
        return [*itertools.accumulate(starts, max), len(text)]

    def _read_again(self) -> Any:
        read = read_tokenizer_file(self._path)
        if not self.name.endswith(read.digest):
            raise LMConfigurationError(f"`tokenizer={self._path!r}` is not the file it was.")
        return read.tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: it can be many megabytes."""
        return {**self.__dict__, "_tokenizer": None}

    def __deepcopy__(self, memo: object) -> FileTokens:
        """Return the same, which nobody changes."""
        return self

    def __repr__(self) -> str:
        return f"FileTokens({self.name!r})"


class FunctionTokens:
    """The tokens by a user's function, which tells how many there are, but not where.

    They are put where `EstimatedTokens` has its own.

    Args:
        function: Gives the tokens of a text, such as the `encode` of any tokenizer. It must be
            safe to call from several threads.
    """

    special = 0

    def __init__(self, function: Callable[[str], Sequence[int]]) -> None:
        self._function = function
        module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
        self.name = f"{module}.{name}" if name else type(function).__qualname__

    def ends(self, text: str) -> Sequence[int]:
        """Return where each token ends, nearly."""
        if not text:
            return []
        tokens: Any = self._function(text)
        if isinstance(tokens, str | bytes | Mapping) or not hasattr(tokens, "__len__"):
            raise LMConfigurationError(
                f"`tokenizer` {self.name} must give the tokens of a text as a list, "
                f"not {type(tokens).__name__}."
            )
        count = max(1, len(tokens))
        guessed = [0, *_ESTIMATE.ends(text)]
        last = len(guessed) - 1
        return [guessed[last * i // count] for i in range(1, count + 1)]

    def __repr__(self) -> str:
        return f"FunctionTokens({self.name})"


_ESTIMATE = EstimatedTokens()


def tokenizer_for(
    model: str, given: str | os.PathLike[str] | Callable[[str], Sequence[int]] | Tokenizer | None
) -> Tokenizer:
    """Find what counts the tokens of a model. The network is never asked.

    Args:
        model: Its name, with or without the provider.
        given: A path of a Hugging Face `tokenizer.json`; a function from a text to its tokens, such
            as the `encode` of any tokenizer; a `Tokenizer`. None takes the model's own where that
            is at hand, as it is for OpenAI's `text-embedding-3-*` and `text-embedding-ada-002`, and
            else `EstimatedTokens`.

    Raises:
        LMConfigurationError: It is none of these, or the file cannot be read.

    Example:
        >>> tokenizer_for("openai/text-embedding-3-small", None)
        OpenAITokens()
        >>> tokenizer_for("hosted_vllm/Qwen/Qwen3-Embedding-4B", None)
        EstimatedTokens()
    """
    if given is None:
        is_openai = _OPENAI.fullmatch(model) and load_cl100k() is not None
        return OpenAITokens() if is_openai else _ESTIMATE
    if isinstance(given, str | os.PathLike):
        return FileTokens(os.fspath(given))
    if isinstance(given, Tokenizer) and not isinstance(given, type):
        return given
    if callable(given):
        return FunctionTokens(given)
    raise LMConfigurationError(
        "`tokenizer` must be the path of a Hugging Face `tokenizer.json`, a function that gives "
        "the tokens of a text, or an object with `name`, `special` and `ends(text)`, "
        f"not {given!r:.100}."
    )


def _cut_blanks(text: str) -> list[str]:
    """Cut inside of very long runs of blanks, over which the stack of `tiktoken` overflows."""
    places = [0]
    for run in _BLANKS.finditer(text):
        places.extend(range(run.start() + _MAX_BLANKS, run.end(), _MAX_BLANKS))
    return [text[start:end] for start, end in itertools.pairwise([*places, len(text)])]


def _without_surrogates(text: str) -> str:
    """Put a sign of the same length in the place of each half character, as JSON decoders do."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _continues(part: bytes) -> bool:
    return 0x80 <= part[0] < 0xC0
