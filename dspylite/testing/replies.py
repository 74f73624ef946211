"""The scripted answer of the fake server: what it says, and everything that goes wrong on the way.

Not here: the formats it is rendered into (`openai_format.py`), and how it is sent (`delivery.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One scripted answer: what is said, and everything that goes wrong on the way.

    What is not given is as usual, so that `Reply(delay_s=1)` is the answer the server would have
    given, a second later. Of several texts the first given of `texts`, `text`, `chunks` is said.
    Times are in seconds; a fault that takes time ends when the client leaves or the server closes.

    Attributes:
        text: What the model says, in every choice; the message of an error. None takes the
            server's own answer, or for an error a sentence with the status.
        texts: One text for each choice, taken round and round where `n` asks for more.
        chunks: The pieces of a stream, joined where no stream was asked for. None given: words.
        tool_calls: In OpenAI's form, or short as `{"name": ..., "arguments": {...}}`.
        finish_reason: Why the model stopped. None means `"tool_calls"` with tool calls, else
            `"stop"`.
        usage: Sent as it is in place of the counted one; an empty mapping sends no usage.
        vectors: Rows of an embeddings answer by `index`, sent in this order, in place of those
            asked for: too few, too short, shuffled, with `None` or `nan`.
        status: 200 to 599. From 400 on the body is an error in OpenAI's format.
        error_code: The `code` of that error, such as `"context_length_exceeded"`.
        headers: Added to the answer's, or put in their place where the name is the same. A wrong
            `content-length` is sent as it is, and the connection closed after the body.
        body: Sent as it is in place of anything rendered: a proxy's HTML page, broken JSON,
            malformed events, or nothing (`""`). Without a `content-type` among the headers its
            first character decides.
        padding_bytes: So many spaces after the body, made while they are sent, in chunks: a huge
            answer, and with `gzip` a compression bomb, that costs this process no memory.
        gzip: Compress the body, asked for or not.
        delay_s: Wait before the first byte.
        byte_delay_s: Wait between any two bytes of the body.
        chunk_delay_s: Wait between any two events of a stream.
        hang: Never answer.
        drop: Reset the connection: `"before"` the first byte, after the `"headers"`, or amid the
            `"body"` (after `cut_after` pieces where that is given).
        cut_after: End a stream politely after so many pieces, with neither a finish reason nor
            `[DONE]`.
        keepalive_comments: In place of the answer, or of what would follow `cut_after` pieces or
            the given `body`, send SSE comments (where no stream was asked for: spaces) without end.
    """

    text: str | None = None
    texts: Sequence[str] = ()
    chunks: Sequence[str] = ()
    tool_calls: Sequence[Mapping[str, object]] = ()
    finish_reason: str | None = None
    usage: Mapping[str, object] | None = None
    vectors: Mapping[int, Sequence[float | None]] | None = None
    status: int = 200
    error_code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes | str | None = None
    padding_bytes: int = 0
    gzip: bool = False
    delay_s: float = 0.0
    byte_delay_s: float = 0.0
    chunk_delay_s: float = 0.0
    hang: bool = False
    drop: Literal["", "before", "headers", "body"] = ""
    cut_after: int | None = None
    keepalive_comments: bool = False

    def __post_init__(self) -> None:
        """Refuse what could not be sent, here rather than in the middle of a test.

        Raises:
            ValueError: A status, time, count or place out of range, a string given for a sequence
                of strings, or a header that no HTTP message can hold.
        """
        if not 200 <= self.status <= 599:
            raise ValueError(f"`status` is {self.status!r}, not 200 to 599")
        if self.drop not in {"", "before", "headers", "body"}:
            raise ValueError(f"`drop` is {self.drop!r}, not '', 'before', 'headers' or 'body'")
        for name in ("delay_s", "byte_delay_s", "chunk_delay_s", "padding_bytes", "cut_after"):
            number: float | None = getattr(self, name)
            if number is not None and not 0 <= number < math.inf:
                raise ValueError(f"`{name}` is {number!r}, not 0 or more")
        for name in ("texts", "chunks"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` is one string, not a sequence of them")
        for name, value in self.headers.items():
            if not re.fullmatch(r"[!-9;-~]+", name) or not re.fullmatch(r"[ -~\xa0-\xff]*", value):
                raise ValueError(f"header `{name!r}: {value!r}` cannot be sent")

    @property
    def says_nothing(self) -> bool:
        """Whether the words are left to the server's own answer."""
        own = self.texts or self.chunks or self.tool_calls or self.vectors is not None
        return not own and self.text is None and self.body is None and self.status < 300
