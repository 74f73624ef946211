"""Reads an OpenAI-shaped answer, whether it comes as dicts or as objects of a library.

Not here: failures (`models/translate.py`), and answers that come in pieces (`models/deltas.py`).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dspylite.errors import ContentFilterError, LMInvalidRequestError, LMServerError
from dspylite.schema.messages import LMOutput, LMResponse, Message, Usage

# Open models write their thoughts like this where the server does not part them from the answer.
_THOUGHTS = re.compile(
    r"<(?P<tag>think|thinking)>(?P<thoughts>.*?)</(?P=tag)>(?P<text>.*)", re.DOTALL
)

_TAGS = ("<think>", "<thinking>")


def read_chat_response(answer: Any, *, model: str) -> LMResponse:
    """Read an OpenAI-shaped chat completion, object or dict.

    Raises:
        LMServerError: It has no choices.
        ContentFilterError: The provider's policy left nothing of the answer.
    """
    choices = _get(answer, "choices") or []
    given_id = _get(answer, "id")
    request_id = given_id if isinstance(given_id, str) else None
    if not choices:
        raise LMServerError(
            f"{model}: the answer has no choices.", model=model, request_id=request_id
        )
    with known_shape(model, request_id):
        if not isinstance(choices, list | tuple):
            raise TypeError("`choices` is no list")
        outputs = tuple(_read_choice(choice) for choice in choices)
    if error := answer_error(outputs, model=model, request_id=request_id):
        raise error
    usage = _get(answer, "usage")
    return LMResponse(
        outputs=outputs,
        usage=Usage.from_provider(as_mapping(usage)),
        model=_get(answer, "model") or model,
        request_id=request_id,
    )


@contextmanager
def known_shape(model: str, request_id: str | None) -> Generator[None, None, None]:
    """Let an answer of a shape that nobody foresaw be a failure of its server.

    Raises:
        LMServerError: The block met a value of another kind than it reads.
    """
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise LMServerError(
            f"{model}: the answer has a shape that cannot be read: {error}.",
            model=model,
            request_id=request_id,
        ) from error


def text_of(content: Any) -> str:
    """Return the text of a content, which may be a text, a list of parts, or nothing.

    Raises:
        TypeError: It is something else.

    Example:
        >>> text_of([{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris"}])
        'Paris'
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(str(as_mapping(part).get("text") or "") for part in content)
    raise TypeError(f"a content is neither text nor parts but {type(content).__name__}")


def split_thoughts(text: str) -> tuple[str | None, str]:
    """Part the thoughts that open models write in tags from the answer behind them.

    Example:
        >>> split_thoughts("<think>hm</think>4"), split_thoughts("4")
        (('hm', '4'), (None, '4'))
    """
    found = _THOUGHTS.match(text)
    return (None, text) if found is None else (found["thoughts"], found["text"])


class ThoughtsFilter:
    """Leaves out of an answer that comes piece by piece what `split_thoughts` parts from it.

    Example:
        >>> answer = ThoughtsFilter()
        >>> [answer.feed(piece) for piece in ("<thi", "nk>hm</th", "ink>4", "2")]
        ['', '', '4', '2']
    """

    def __init__(self) -> None:
        self._head = ""
        self._end_tag = ""
        self._held: list[str] = []
        self._window = ""
        self._is_through = False

    def feed(self, text: str) -> str:
        """Take the next piece and return what of the answer is new."""
        if self._is_through:
            return text
        if not self._end_tag:
            self._head += text
            if any(len(self._head) < len(tag) and tag.startswith(self._head) for tag in _TAGS):
                return ""
            tag = next((tag for tag in _TAGS if self._head.startswith(tag)), None)
            if tag is None:
                self._is_through = True
                return self._head
            self._end_tag = f"</{tag[1:]}"
            self._held.append(tag)
            text = self._head[len(tag) :]
        self._held.append(text)
        self._window += text
        stop = self._window.find(self._end_tag)
        if stop >= 0:
            self._is_through = True
            return self._window[stop + len(self._end_tag) :]
        self._window = self._window[1 - len(self._end_tag) :]
        return ""

    def finish(self) -> str:
        """Return what was held back, when nothing more comes: thoughts without an end are none."""
        if self._is_through:
            return ""
        self._is_through = True
        return "".join(self._held) or self._head


def read_responses_answer(answer: Any, *, model: str) -> LMResponse:
    """Read an answer of OpenAI's `/responses`, object or dict.

    Raises:
        LMServerError: It has no output.
    """
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Mapping[str, Any]] = []
    items = [as_mapping(item) for item in _get(answer, "output") or ()]
    for item in items:
        parts = [as_mapping(part) for part in item.get("content") or item.get("summary") or ()]
        said = [str(part["text"]) for part in parts if part.get("text")]
        match item.get("type"):
            case "message":
                texts += said
            case "reasoning":
                reasoning += said
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                calls.append({"id": item.get("call_id"), "type": "function", "function": function})
            case _:
                pass  # searches and the like, which are part of how the answer was found
    request_id = _get(answer, "id")
    if not (texts or calls or reasoning):
        raise LMServerError(
            f"{model}: the answer has no output.", model=model, request_id=request_id
        )
    details = as_mapping(_get(answer, "incomplete_details"))
    is_cut = details.get("reason") == "max_output_tokens"
    usage = as_mapping(_get(answer, "usage"))
    output = LMOutput(
        text="".join(texts),
        finish_reason="length" if is_cut else "tool_calls" if calls else "stop",
        reasoning="".join(reasoning) or None,
        tool_calls=tuple(calls),
    )
    return LMResponse(
        outputs=(output,),
        usage=Usage.from_provider(
            {
                "prompt_tokens": usage.get("input_tokens"),
                "completion_tokens": usage.get("output_tokens"),
                "total_tokens": usage.get("total_tokens"),
            }
        ),
        model=_get(answer, "model") or model,
        request_id=request_id,
    )


def check_texts(messages: Sequence[Message], model: str) -> None:
    """Refuse a prompt that cannot be sent, before anything is.

    Raises:
        LMInvalidRequestError: It holds half of a surrogate pair.
    """
    for message in messages:
        content = message.get("content")
        texts = [content] if isinstance(content, str) else _parts_texts(content)
        for text in texts:
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise surrogate_error(error, model) from error


def _parts_texts(parts: Any) -> list[str]:
    found = [part.get("text") for part in parts or () if isinstance(part, Mapping)]
    return [text for text in found if isinstance(text, str)]


def surrogate_error(error: UnicodeEncodeError, model: str) -> LMInvalidRequestError:
    """Make the error of a prompt that is no text."""
    return LMInvalidRequestError(
        f"{model}: the prompt holds half of a surrogate pair ({error.object[error.start]!r}), "
        "which is no text. Clean it, for instance by `text.encode('utf-8', 'replace').decode()`.",
        model=model,
    )


def answer_error(
    outputs: Sequence[LMOutput], *, model: str, request_id: str | None
) -> ContentFilterError | None:
    """Return the error that a finished answer really is; None for a good one."""
    for output in outputs:
        if output.finish_reason == "content_filter" and not (output.text or output.tool_calls):
            return ContentFilterError(
                f"{model}: the provider's content policy left nothing of the answer.",
                model=model,
                request_id=request_id,
            )
    return None


def _read_choice(choice: Any) -> LMOutput:
    if isinstance(choice, str | int | float | list):
        raise TypeError(f"a choice is {choice!r:.80}")
    message = _get(choice, "message")
    if message is None:  # a text completion
        return LMOutput(
            text=_get(choice, "text") or "",
            finish_reason=_get(choice, "finish_reason"),
            logprobs=plain_object(_get(choice, "logprobs")),
        )
    calls = _get(message, "tool_calls") or ()
    text = text_of(_get(message, "content"))
    reasoning = _get(message, "reasoning_content") or _get(message, "reasoning")
    if not reasoning:
        reasoning, text = split_thoughts(text)
    return LMOutput(
        text=text,
        finish_reason=_get(choice, "finish_reason"),
        reasoning=reasoning,
        tool_calls=tuple(_tool_call(call) for call in calls),
        citations=_citations(message),
        logprobs=plain_object(_get(choice, "logprobs")),
    )


def _citations(message: Any) -> tuple[dict[str, Any], ...]:
    """Return what a message cites; litellm gives Anthropic's grouped by the texts that cite."""
    fields = as_mapping(_get(message, "provider_specific_fields"))
    found = fields.get("citations") or _get(message, "citations")
    groups = found if isinstance(found, list | tuple) else ()
    return tuple(
        plain
        for group in groups
        for citation in (group if isinstance(group, list | tuple) else [group])
        if (plain := as_mapping(citation))
    )


def plain_object(value: Any) -> dict[str, Any] | None:
    """Return an object of an answer as a dict; None if it is none or empty."""
    return as_mapping(value) or None


def _tool_call(call: Any) -> dict[str, Any]:
    found = as_mapping(call)
    if not found:
        raise TypeError(f"a tool call is {call!r:.80}")
    return found


def _get(holder: Any, name: str) -> Any:
    # A plain dict is asked for first: what `Mapping` is costs much more to find out.
    if isinstance(holder, (dict, Mapping)):
        return holder.get(name)
    return getattr(holder, name, None)


def as_mapping(value: Any) -> dict[str, Any]:
    """Return a dict of what a provider's library gives as a dict or as an object."""
    if value is None or isinstance(value, str | bytes | int | float | list | tuple):
        return {}  # no object at all
    if isinstance(value, Mapping):
        return dict(value)
    if callable(getattr(value, "model_dump", None)):
        return dict(value.model_dump())
    return dict(vars(value))
