"""The only file that imports `tokenizers` and `tiktoken`, which litellm brings; asks no network.

Not here: what is done with the tokens (`models/embedding/tokens.py`).
"""

from __future__ import annotations

import binascii
import functools
import hashlib
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from dspylite.errors import LMConfigurationError

# litellm ships OpenAI's file under the name by which tiktoken would keep a downloaded copy.
_CL100K_FILE = "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
_CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# As `tiktoken_ext/openai_public.py` has it; calling that would fetch the file over the network.
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

_LOAD_LOCK = threading.Lock()  # guards the two caches: a vocabulary is read once, not per thread


class TokenizerFile(NamedTuple):
    """A `tokenizer.json` that was read.

    Attributes:
        tokenizer: What `tokenizers` made of it; it neither cuts nor pads.
        digest: First digits of the SHA-256 of the file.
        special: Tokens it adds around each text.
    """

    tokenizer: Any
    digest: str
    special: int


def load_cl100k() -> Any | None:
    """Return OpenAI's `cl100k_base` from the file that litellm ships; None where it is not there.

    litellm itself, which takes seconds to import, is not imported.
    """
    with _LOAD_LOCK:
        return _cl100k()


@functools.cache
def _cl100k() -> Any | None:
    try:
        import tiktoken  # noqa: PLC0415  # loaded when the first text is counted
    except ImportError:
        return None
    litellm = importlib.util.find_spec("litellm")
    for folder in litellm.submodule_search_locations or [] if litellm else []:
        try:
            raw = Path(folder, _CL100K_FILE).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(raw).hexdigest() == _CL100K_SHA256:
            pairs = (line.split() for line in raw.splitlines() if line)
            ranks = {binascii.a2b_base64(token): int(rank) for token, rank in pairs}
            return tiktoken.Encoding(
                "cl100k_base", pat_str=_CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={}
            )
    return None


def read_tokenizer_file(path: str) -> TokenizerFile:
    """Read a Hugging Face `tokenizer.json`; one that did not change is read once.

    Raises:
        LMConfigurationError: It is missing, cannot be read or is no such file.
    """
    try:
        stat = os.stat(path)
        with _LOAD_LOCK:
            return _read(path, (stat.st_mtime_ns, stat.st_size))
    except OSError as error:
        raise LMConfigurationError(
            f"`tokenizer={path!r}` cannot be read: {error.strerror or error}. Give the path of a "
            "Hugging Face `tokenizer.json`, a function that gives the tokens of a text, or nothing."
        ) from None


@functools.lru_cache(maxsize=16)
def _read(path: str, version: tuple[int, int]) -> TokenizerFile:  # noqa: ARG001  # part of the key
    raw = Path(path).read_bytes()
    try:
        import tokenizers  # noqa: PLC0415  # loaded when the first file is read

        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        # Files of embedding models often cut at 512 tokens, and would so count no more than that.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except ImportError:
        raise LMConfigurationError(
            "Reading a `tokenizer.json` needs the package `tokenizers`: pip install tokenizers"
        ) from None
    except Exception as error:  # noqa: BLE001  # it raises plain `Exception` for what it cannot read
        raise LMConfigurationError(
            f"`tokenizer={path!r}` is no Hugging Face `tokenizer.json`: {error!s:.200}."
        ) from None
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    return TokenizerFile(tokenizer, hashlib.sha256(raw).hexdigest()[:16], special)
