"""Which texts are sent together: so many, and of so many tokens.

Not here: sending them (`run.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dspylite.models.embedding.tokens import Tokenizer

MAX_BATCH_TOKENS = 250_000
"""Tokens in one request unless the user says otherwise; OpenAI takes at most 300,000. Source:
https://platform.openai.com/docs/api-reference/embeddings/create"""


def batched(
    texts: Sequence[str], *, max_count: int, max_tokens: int, tokenizer: Tokenizer
) -> list[list[str]]:
    """Split texts into batches, in order; a text longer than a batch may be is one by itself.

    Args:
        texts: What is sent.
        max_count: Most texts in a batch.
        max_tokens: Most tokens in a batch.
        tokenizer: Counts tokens, where there may be too many of them.

    Example:
        >>> from dspylite.models.embedding.tokens import EstimatedTokens
        >>> batched("abcde", max_count=2, max_tokens=100, tokenizer=EstimatedTokens())
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    made: list[list[str]] = []
    start = 0
    while start < len(texts):
        batch = list(texts[start : start + max_count])
        if most_tokens(batch) + len(batch) * tokenizer.special > max_tokens:
            batch = _first_of(batch, max_tokens, tokenizer)
        made.append(batch)
        start += len(batch)
    return made


def most_tokens(texts: Iterable[str]) -> int:
    """Return a number of tokens that texts do not have more of: their bytes, which cost no time."""
    return sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        for text in texts
    )


def _first_of(texts: list[str], max_tokens: int, tokenizer: Tokenizer) -> list[str]:
    tokens = 0
    for place, text in enumerate(texts):
        tokens += len(tokenizer.ends(text)) + tokenizer.special
        if tokens > max_tokens and place:
            return texts[:place]
    return texts
