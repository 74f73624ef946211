"""What goes to a language model and what comes back, as frozen values.

Not here: how a prompt is written (`adapters/`) or sent (`models/`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from dspylite.schema.secrets import shown_params

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(TypedDict):
    """One chat message in the form every OpenAI-compatible provider takes."""

    role: Role
    content: str | list[dict[str, Any]] | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LMRequest:
    """One call to a model, complete: nothing about it is looked up later.

    Attributes:
        model: Name as the provider's engine takes it, such as `"openai/gpt-4o-mini"`.
        messages: The chat so far, in order.
        params: Sampling and provider parameters, such as `temperature`, `max_tokens`, `n`.
        asked: Those of `params` that this call named, without the model's own defaults; what
            another model is given when it takes the call over.
        stream: Whether the answer is wanted piece by piece, as `LMResponse.stream`.
        cache: Whether the answer may be an earlier one, and be kept for later.
        rollout_id: Tells it from equal requests, in the cache alone.
        is_written: Whether the model writes an answer; an embedding model only reads.
    """

    model: str
    messages: Sequence[Message]
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    asked: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stream: bool = False
    cache: bool = True
    rollout_id: Any = None
    is_written: bool = True

    def __repr__(self) -> str:
        params = shown_params(self.params)
        return f"LMRequest(model={self.model!r}, messages={self.messages!r}, params={params!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one or more calls, as the provider counted them.

    Attributes:
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
        total_tokens: Both, unless the provider counts more (reasoning, say).
        calls: How many answered requests are in this sum.
        cached_calls: How many calls took no request of their own: their answer was in the cache, or
            was on its way to another caller.
        details: The provider's further counts by name, such as `"cached_tokens"`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    calls: int = 0
    cached_calls: int = 0
    details: Mapping[str, int] = field(default_factory=dict[str, int])

    def __add__(self, other: Usage) -> Usage:
        """Sum field by field.

        Example:
            >>> (Usage(prompt_tokens=1, calls=1) + Usage(prompt_tokens=2, calls=1)).prompt_tokens
            3
        """
        details = dict(self.details)
        for name, count in other.details.items():
            details[name] = details.get(name, 0) + count
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            total_tokens=self.total_tokens + other.total_tokens,
            calls=self.calls + other.calls,
            cached_calls=self.cached_calls + other.cached_calls,
            details=details,
        )

    @classmethod
    def from_provider(cls, raw: Mapping[str, Any] | None) -> Usage:
        """Read the `usage` object of an OpenAI-compatible answer; what is missing counts as 0.

        Example:
            >>> Usage.from_provider({"prompt_tokens": 3, "completion_tokens": 2}).total_tokens
            5
        """
        raw = raw or {}
        prompt, completion = _count(raw, "prompt_tokens"), _count(raw, "completion_tokens")
        details: dict[str, int] = {}
        for group in ("prompt_tokens_details", "completion_tokens_details"):
            found = raw.get(group)
            for name, value in found.items() if isinstance(found, Mapping) else ():
                if isinstance(value, int) and value:
                    details[name] = details.get(name, 0) + value
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=_count(raw, "total_tokens") or prompt + completion,
            calls=1,
            details=details,
        )

    def as_dict(self) -> dict[str, int]:
        """Give the counts under the provider's names, further counts included if not 0."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "calls": self.calls,
            **({"cached_calls": self.cached_calls} if self.cached_calls else {}),
            **self.details,
        }


def _count(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LMOutput:
    """One of the `n` answers of a call.

    Attributes:
        text: What the model wrote; empty when it only called tools.
        finish_reason: Why it stopped (`"stop"`, `"length"`, `"tool_calls"` ...); None if unknown.
        reasoning: What a reasoning model wrote before its answer, where the provider shows it.
        tool_calls: Calls the model wants made, in the provider's form.
        citations: What in its sources the model points to, in the provider's form.
        logprobs: How likely each token was, in the provider's form; None unless it was asked for.
    """

    text: str
    finish_reason: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    citations: tuple[Mapping[str, Any], ...] = ()
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LMDelta:
    """One piece of a streamed answer.

    Attributes:
        index: Which of the `n` answers it belongs to.
        text: What was written since the piece before.
        reasoning: What was reasoned since the piece before.
        tool_calls: Pieces of tool calls in the provider's form: `index` says of which call; `id`
            and the function's `name` come once, its `arguments` in pieces to be joined.
        finish_reason: Why this answer ended; in its last piece only.
        item_index: Place in its batch of the item that opened the stream; None outside batches.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish_reason: str | None = None
    item_index: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request of a call, successful or not, or the cache's answer in its place.

    Attributes:
        model: The model asked.
        seconds: From the moment it was this attempt's turn until its end, waits in line included.
        error: Code of the failure, such as `"rate_limit"`; None for the one that succeeded.
        status: HTTP status of the failure, where there was one.
        usage: Tokens; none for a failure or a cached answer.
        cached: Whether no request was made, because the answer was there or on its way already.
    """

    model: str
    seconds: float
    error: str | None = None
    status: int | None = None
    usage: Usage = field(default_factory=Usage)
    cached: bool = False


class DeltaSource(Protocol):
    """An open stream: a `Dual` from nothing to the next piece."""

    def call(self) -> LMDelta | None:
        """Wait on this thread for the next piece; None at the proper end.

        Raises:
            LMError: The stream broke, or ended before its end.
        """
        ...

    def acall(self) -> Awaitable[LMDelta | None]:
        """Await the next piece on this event loop; otherwise as `call`."""
        ...

    def close(self) -> None:
        """Close the connection, from whatever thread; nothing happens where it is closed."""
        ...

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer; whole, with its usage, after the end."""
        ...


class Verdict(Protocol):
    """Where the reader of an answer says whether it is worth keeping; a repeat does nothing."""

    def accept(self) -> None:
        """Keep the answer for the next one who asks the same."""
        ...

    def reject(self) -> None:
        """Keep it no longer; the next one who asks the same is answered anew."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LMResponse:
    """The answer to one `LMRequest`.

    Attributes:
        outputs: The `n` answers, in the provider's order; never empty, unless `stream` is set.
        usage: Tokens of this call.
        model: The model that answered, as the provider names it.
        request_id: The provider's id of the answer, where it gives one.
        answered_by: Name of the LM that answered, which may be a fallback.
        attempts: Every request that was made for it, the successful one last.
        cached: Whether it took no request of its own: it was in the cache, or on its way to another
            caller.
        verdict: Awaits the judgement of whoever reads the answer; None where nothing hangs on it.
        stream: The open stream of a request that asked for one; whoever holds it must close it.
    """

    outputs: tuple[LMOutput, ...]
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    request_id: str | None = None
    answered_by: str = ""
    attempts: tuple[Attempt, ...] = ()
    cached: bool = False
    verdict: Verdict | None = field(default=None, repr=False, compare=False)
    stream: DeltaSource | None = field(default=None, repr=False, compare=False)

    def judge(self, *, is_readable: bool) -> None:
        """Say whether the answer is worth keeping."""
        if self.verdict is not None:
            if is_readable:
                self.verdict.accept()
            else:
                self.verdict.reject()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingResponse(LMResponse):
    """The answer to a request for vectors, which has no outputs.

    Attributes:
        rows: The rows as the provider sent them, in its order: `index` and `embedding`, unchecked.
    """

    rows: Sequence[Mapping[str, Any]] = ()
