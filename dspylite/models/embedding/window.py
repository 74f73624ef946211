"""What becomes of texts that are longer than the model reads.

Not here: where a text is cut (`chunks.py`), and how tokens are counted (`tokens.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dspylite.errors import ContextWindowExceededError, LMConfigurationError
from dspylite.models.embedding.batches import most_tokens
from dspylite.models.embedding.chunks import Chunk, split_text, truncate_text
from dspylite.models.embedding.tokens import Tokenizer

Overflow = Literal["error", "truncate", "pool"]


@dataclass(frozen=True, slots=True)
class Window:
    """How many tokens of a text the model reads, and what is done with longer texts.

    Attributes:
        model: For the error.
        max_tokens: Tokens of one text, with its instruction and what the model adds.
        overflow: What is done.
        tokenizer: Counts them.
    """

    model: str
    max_tokens: int
    overflow: Overflow
    tokenizer: Tokenizer

    def room(self, instruction: str) -> int:
        """Return how many tokens are left for a text behind an instruction.

        Raises:
            LMConfigurationError: None are.
        """
        taken = self.tokenizer.special
        if instruction:
            taken += len(self.tokenizer.ends(instruction))
        if taken >= self.max_tokens:
            raise LMConfigurationError(
                f"`max_tokens={self.max_tokens}` leaves no room for a text: the instruction and "
                f"what the model adds take {taken}."
            )
        return self.max_tokens - taken

    def fitted(self, text: str, room: int, index: int) -> list[Chunk]:
        """Return the parts of a text that are sent; one for a text that fits.

        Args:
            text: Without its instruction.
            room: As `room` says.
            index: Place of the text in the input, for the error.

        Raises:
            ContextWindowExceededError: It is too long, and `overflow` is `"error"`.
        """
        most = most_tokens([text])
        if most <= room:
            return [Chunk(text, most)]
        tokens = len(self.tokenizer.ends(text))
        if tokens <= room:
            return [Chunk(text, tokens)]
        if self.overflow == "pool" and (chunks := split_text(text, room, self.tokenizer)):
            return chunks
        if self.overflow != "error":  # of nothing but blanks there are no chunks to pool
            return [Chunk(truncate_text(text, room, self.tokenizer), room)]
        raise ContextWindowExceededError(
            message=f"Text {index} has {tokens} tokens by {self.tokenizer.name}, and `max_tokens` "
            f"leaves room for {room}. Split it, or give `overflow='truncate'` or `'pool'`.",
            model=self.model,
        )
