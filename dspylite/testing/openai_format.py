"""OpenAI's formats as the fake server reads and writes them, without any input or output.

Not here: what is scripted (`replies.py`), and how the bytes travel (`delivery.py`).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, cast

from dspylite.testing.replies import Reply

Endpoint = Literal["chat", "completions", "embeddings", "models"]

DEFAULT_MODEL = "fake-model"
"""Named where a request names no model, and the one row of the list of models."""

DONE = b"data: [DONE]\n\n"
"""The event that ends a stream which was not cut."""

_CREATED = 1_700_000_000  # any fixed second: equal requests get equal answers
_MAX_CHOICES = 128  # OpenAI's own bound of `n`
_MAX_DIMENSIONS = 65_536  # guessed; the widest embedding models have 4,096 to 8,192
_ERROR_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_NO_BODY = {204, 304}
# Made once: with other separators than its own, `json.dumps` makes one for every call.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class InvalidRequestError(Exception):
    """A request whose body this server understands but refuses.

    Attributes:
        status: The HTTP status of the refusal.
        reason: One sentence for the error's message.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request's body, checked and narrowed to what an answer depends on.

    Attributes:
        endpoint: Which of the four was asked.
        model: The model named, or `DEFAULT_MODEL`.
        prompts: The last user text of a chat, or each prompt, or each text to embed.
        prompt_words: Words in all of what was sent to the model.
        choices: Choices for each prompt (`n`).
        stream: Whether events were asked for.
        include_usage: Whether a stream is to end with the usage.
        dimensions: Width of the vectors.
        as_base64: Whether vectors travel as base64 of little-endian float32.
    """

    endpoint: Endpoint
    model: str = DEFAULT_MODEL
    prompts: tuple[str, ...] = ()
    prompt_words: int = 0
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    dimensions: int = 8
    as_base64: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """An answer as bytes, not yet on its way.

    Attributes:
        content_type: Empty for an answer that has no body by its status.
        pieces: The events of a stream, or the body in one piece.
        is_stream: Whether each piece is to travel alone.
        usage: What the answer counts for; None where nothing was generated, or not to the end.
    """

    content_type: str
    pieces: Sequence[bytes]
    is_stream: bool = False
    usage: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class _Choice:
    text: str
    pieces: Sequence[str]
    tool_calls: Sequence[Mapping[str, object]]
    finish_reason: str


def read_question(endpoint: Endpoint, body: Mapping[str, object], *, dimensions: int) -> Question:
    """Check a request's body and narrow it to what an answer depends on.

    Args:
        endpoint: Where it was sent.
        body: The parsed JSON object.
        dimensions: Width of vectors where the request does not say.

    Raises:
        InvalidRequestError: A required field is missing, or one has a wrong type or size.
    """
    model = body.get("model")
    options = _mapping(body.get("stream_options"))
    prompts: tuple[str, ...] = (last_user_text(body),)
    if endpoint == "chat":
        words = _count_words(*_chat_texts(body))
    else:
        prompts = _texts(body, "input" if endpoint == "embeddings" else "prompt")
        words = _count_words(*prompts)
    encoding = body.get("encoding_format") or "float"
    if encoding not in {"float", "base64"}:
        raise InvalidRequestError(400, f"`encoding_format` is {encoding!r}, not float or base64")
    return Question(
        endpoint=endpoint,
        model=model if isinstance(model, str) else DEFAULT_MODEL,
        prompts=prompts,
        prompt_words=words,
        choices=_bounded(body, "n", default=1, largest=_MAX_CHOICES),
        stream=endpoint != "embeddings" and body.get("stream") is True,
        include_usage=options.get("include_usage") is True,
        dimensions=_bounded(body, "dimensions", default=dimensions, largest=_MAX_DIMENSIONS),
        as_base64=encoding == "base64",
    )


def last_user_text(body: Mapping[str, object]) -> str:
    """Return the text of the last user message, or the only prompt or input; else nothing."""
    for message in reversed(_sequence(body.get("messages"))):
        if _mapping(message).get("role") == "user":
            return " ".join(_content_texts(message))
    for name in ("prompt", "input"):
        single = body.get(name)
        if isinstance(single, str):
            return single
    return ""


def render(question: Question, reply: Reply, *, answer_id: int) -> Rendered:
    """Turn a reply into the bytes of an answer to this question.

    Args:
        question: What was asked.
        reply: What to say; without any text the prompt comes back with `echo: ` before it.
        answer_id: Number for the answer's `id`.
    """
    if reply.body is not None:
        raw = reply.body.encode() if isinstance(reply.body, str) else reply.body
        return Rendered(content_type=_sniff(raw), pieces=(raw,))
    if reply.status >= 400:
        message = reply.text or f"the fake server was told to answer with status {reply.status}"
        return render_error(reply.status, message, code=reply.error_code)
    if reply.status in _NO_BODY:
        return Rendered(content_type="", pieces=(b"",))
    if reply.status >= 300:
        return Rendered(content_type="text/plain", pieces=(b"",))
    if question.endpoint == "models":
        row = {"id": DEFAULT_MODEL, "object": "model", "created": _CREATED, "owned_by": "dspylite"}
        return _json({"object": "list", "data": [row]})
    if question.endpoint == "embeddings":
        return _render_embeddings(question, reply)
    return _render_text(question, reply, answer_id)


def render_error(status: int, message: str, *, code: str | None = None) -> Rendered:
    """Return an error in OpenAI's format, with the type and code usual for its status."""
    kind = {429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    code = code or _ERROR_CODES.get(status)
    return _json({"error": {"message": message, "type": kind, "param": None, "code": code}})


def embedding_bytes(text: str, dimensions: int) -> bytes:
    """Return a unit vector that depends on the text alone, as little-endian float32.

    Each byte of the text's hash is one of 256 angles, hence two components of fixed length, so
    that no norm has to be computed: 1,536 dimensions take microseconds, and the server is not
    what a benchmark of clients measures.

    Args:
        text: Any string. Equal texts have equal vectors, others in practice never.
        dimensions: Width, 1 or more.
    """
    seeds = _seeds(text, dimensions)
    vector = bytearray(8 * len(seeds))
    for place, table in enumerate(_pairs(dimensions).by_byte):
        vector[place::8] = seeds.translate(table)
    if dimensions % 2:
        vector[-8:] = struct.pack("<f", _last(seeds))
    return bytes(vector)


def _embedding_json(text: str, dimensions: int) -> bytes:
    """Return the same vector as JSON, each number as the float32 that it is."""
    seeds = _seeds(text, dimensions)
    written = _pairs(dimensions).written
    numbers = [written[seed] for seed in seeds]
    if dimensions % 2:
        # Through float32 and back, as in the tables.
        numbers[-1] = b"%r" % struct.unpack("<f", struct.pack("<f", _last(seeds)))
    return b"[%b]" % b",".join(numbers)


def _seeds(text: str, dimensions: int) -> bytes:
    return hashlib.shake_128(text.encode("utf-8", "surrogatepass")).digest((dimensions + 1) // 2)


def _last(seeds: bytes) -> float:
    """Return the component that an odd width leaves to the last angle, with all of its length."""
    length = 1 / math.sqrt(len(seeds))
    return length if seeds[-1] % 2 else -length


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The pair of float32 that each hash byte stands for: its 8 bytes one by one, and written."""

    by_byte: tuple[bytes, ...]
    written: tuple[bytes, ...]


@functools.lru_cache(maxsize=16)
def _pairs(dimensions: int) -> _Pairs:
    length = 1 / math.sqrt((dimensions + 1) // 2)
    # Half a step off the axes, so that no component is 0.
    angles = [math.tau * (step + 0.5) / 256 for step in range(256)]
    packed = [struct.pack("<2f", length * math.cos(a), length * math.sin(a)) for a in angles]
    return _Pairs(
        by_byte=tuple(bytes(pair[place] for pair in packed) for place in range(8)),
        written=tuple(b"%r,%r" % struct.unpack("<2f", pair) for pair in packed),
    )


def _render_embeddings(question: Question, reply: Reply) -> Rendered:
    rows: list[tuple[int, bytes]] = []
    if reply.vectors is not None:
        for index, vector in reply.vectors.items():
            numbers = [number for number in vector if number is not None]
            if question.as_base64 and len(numbers) == len(vector):  # base64 has no null
                rows.append((index, _base64_json(struct.pack(f"<{len(numbers)}f", *numbers))))
            else:
                rows.append((index, _dump(list(vector))))
    elif question.as_base64:
        for index, text in enumerate(question.prompts):
            rows.append((index, _base64_json(embedding_bytes(text, question.dimensions))))
    else:
        for index, text in enumerate(question.prompts):
            rows.append((index, _embedding_json(text, question.dimensions)))
    usage = reply.usage
    if usage is None:
        usage = {"prompt_tokens": question.prompt_words, "total_tokens": question.prompt_words}
    rest = _dump({"model": question.model} | _if_any(usage))
    # Put together by hand: `json.dumps` would take most of the time of a large answer.
    data = b",".join(b'{"object":"embedding","index":%d,"embedding":%b}' % row for row in rows)
    body = b'{"object":"list","data":[%b],%b' % (data, rest[1:])
    return Rendered(content_type="application/json", pieces=(body,), usage=usage)


def _base64_json(packed: bytes) -> bytes:
    return b'"%b"' % base64.b64encode(packed)


def _render_text(question: Question, reply: Reply, answer_id: int) -> Rendered:
    choices = _choices(question, reply)
    usage = reply.usage
    if usage is None:
        said = sum(_count_words(c.text, *_arguments(c.tool_calls)) for c in choices)
        usage = {
            "prompt_tokens": question.prompt_words,
            "completion_tokens": said,
            "total_tokens": question.prompt_words + said,
        }
    is_chat = question.endpoint == "chat"
    kind = "chat.completion" if is_chat else "text_completion"
    head: dict[str, object] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{answer_id}",
        "object": f"{kind}.chunk" if is_chat and question.stream else kind,
        "created": _CREATED,
        "model": question.model,
    }
    if not question.stream:
        rows = [_whole_choice(index, c, is_chat=is_chat) for index, c in enumerate(choices)]
        return _json(head | {"choices": rows} | _if_any(usage), usage=usage)
    if question.include_usage:
        head["usage"] = None

    def event(**changes: object) -> bytes:
        return b"data: %b\n\n" % _dump(head | changes)

    opening: list[bytes] = []
    if is_chat:
        opening = [
            event(choices=[_delta(index, {"role": "assistant", "content": ""})])
            for index in range(len(choices))
        ]
    said_events = [event(choices=[piece]) for piece in _stream_pieces(choices, is_chat=is_chat)]
    if reply.cut_after is not None or reply.keepalive_comments:
        events, counted = opening + said_events[: reply.cut_after or 0], None
    else:
        closing = [
            event(choices=[_delta(index, {} if is_chat else "", choice.finish_reason)])
            for index, choice in enumerate(choices)
        ]
        if question.include_usage:
            closing.append(event(choices=[], **_if_any(usage)))
        events, counted = [*opening, *said_events, *closing, DONE], usage
    return Rendered(content_type="text/event-stream", pieces=events, is_stream=True, usage=counted)


def _choices(question: Question, reply: Reply) -> list[_Choice]:
    calls = [_whole_call(index, call) for index, call in enumerate(reply.tool_calls)]
    finish_reason = reply.finish_reason or ("tool_calls" if calls else "stop")
    made: list[_Choice] = []
    for position in range(len(question.prompts) * question.choices):
        pieces: Sequence[str] | None = None
        if reply.texts:
            text = reply.texts[position % len(reply.texts)]
        else:
            pieces = reply.chunks or None
            if reply.text is not None:
                text = reply.text
            elif pieces or calls:
                text = "".join(pieces or ())
            else:
                text = f"echo: {question.prompts[position // question.choices]}"
        made.append(_Choice(text, pieces or re.findall(r"\S+\s*|\s+", text), calls, finish_reason))
    return made


def _whole_choice(index: int, choice: _Choice, *, is_chat: bool) -> Mapping[str, object]:
    row: dict[str, object] = {"index": index, "logprobs": None}
    row["finish_reason"] = choice.finish_reason
    if not is_chat:
        return row | {"text": choice.text}
    message: dict[str, object] = {"role": "assistant", "content": choice.text}
    if choice.tool_calls:
        message |= {"content": choice.text or None, "tool_calls": choice.tool_calls}
    return row | {"message": message}


def _stream_pieces(choices: Sequence[_Choice], *, is_chat: bool) -> Iterator[Mapping[str, object]]:
    """Yield the deltas of all choices, interleaved as a server that decodes them together does."""
    for round_of_pieces in zip_longest(*(choice.pieces for choice in choices)):
        for index, piece in enumerate(round_of_pieces):
            if piece is not None:
                yield _delta(index, {"content": piece} if is_chat else piece)
    for index, choice in enumerate(choices if is_chat else ()):
        for place, call in enumerate(choice.tool_calls):
            function = _mapping(call["function"])
            # The name first and the arguments after it, as OpenAI streams them.
            opening = {**call, "index": place, "function": {**function, "arguments": ""}}
            yield _delta(index, {"tool_calls": [opening]})
            rest = {"index": place, "function": {"arguments": function.get("arguments", "")}}
            yield _delta(index, {"tool_calls": [rest]})


def _delta(index: int, said: object, finish_reason: str | None = None) -> Mapping[str, object]:
    """Return one choice of one event; a chat's text is a mapping, a completion's a string."""
    name = "text" if isinstance(said, str) else "delta"
    return {"index": index, name: said, "logprobs": None, "finish_reason": finish_reason}


def _whole_call(index: int, call: Mapping[str, object]) -> Mapping[str, object]:
    function = call.get("function")
    if function is None:
        arguments = call.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        call = {"function": {"name": call.get("name"), "arguments": arguments}}
    return {"id": f"call_{index}", "type": "function", **call}


def _arguments(calls: Sequence[Mapping[str, object]]) -> Iterator[str]:
    for call in calls:
        yield str(_mapping(call["function"]).get("arguments", ""))


def _texts(body: Mapping[str, object], name: str) -> tuple[str, ...]:
    """Return the strings of a field that may be one string, several, or token numbers."""
    value = body.get(name)
    if isinstance(value, str):
        return (value,)
    items = _sequence(value)
    if not items:
        raise InvalidRequestError(400, f"`{name}` is missing or empty")
    if isinstance(items[0], int):
        return (" ".join(str(token) for token in items),)
    return tuple(
        item if isinstance(item, str) else " ".join(str(token) for token in _sequence(item))
        for item in items
    )


def _chat_texts(body: Mapping[str, object]) -> Iterator[str]:
    messages = _sequence(body.get("messages"))
    if not messages:
        raise InvalidRequestError(400, "`messages` is missing or empty")
    for message in messages:
        yield from _content_texts(message)


def _content_texts(message: object) -> Iterator[str]:
    content = _mapping(message).get("content")
    if isinstance(content, str):
        yield content
    for part in _sequence(content):
        text = _mapping(part).get("text")
        if isinstance(text, str):
            yield text


def _count_words(*texts: str) -> int:
    return sum(len(text.split()) for text in texts)


def _bounded(body: Mapping[str, object], name: str, *, default: int, largest: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise InvalidRequestError(400, f"`{name}` is {value!r}, not a number of 1 to {largest}")
    return value


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[object]:
    return cast("Sequence[object]", value) if isinstance(value, list) else ()


def _if_any(usage: Mapping[str, object]) -> dict[str, object]:
    return {"usage": usage} if usage else {}


def _sniff(body: bytes) -> str:
    start = body.lstrip()[:5]
    if start[:1] in {b"{", b"["}:
        return "application/json"
    if start[:1] == b"<":
        return "text/html"
    return "text/event-stream" if start == b"data:" or start[:1] == b":" else "text/plain"


def _dump(value: object) -> bytes:
    # A lone surrogate, which UTF-8 refuses, becomes the JSON escape that it arrived as.
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


def _json(value: object, *, usage: Mapping[str, object] | None = None) -> Rendered:
    return Rendered(content_type="application/json", pieces=(_dump(value),), usage=usage)
