"""Answers a prompt in the form it asks for, out of its own text alone: the brain of `OfflineLM`.

Not here: what a prompt asks for (`prompts.py`), which sentence fits (`evidence.py`)
and what value fits a type (`fitting.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from dspylite.models.offline.evidence import Evidence, Inquiry, Match
from dspylite.models.offline.fitting import Fitter, clip_text
from dspylite.models.offline.prompts import (
    END,
    Prompt,
    Wanted,
    encodable,
    escape_tags,
    fence,
    header,
    read_prompt,
)
from dspylite.models.offline.sentences import MAX_SPAN_CHARS, Passage, clean, split_sentences, terms
from dspylite.schema.messages import Message

MAX_QUESTION_CHARS = 2_000
"""Longest text taken for a question; a longer one is evidence that holds a question."""

_REASONING_NAMES = frozenset({"reasoning", "rationale"})
_QUESTION_WORDS = frozenset(
    "ask claim hypothesis instruction problem prompt q query question request statement".split()
)
_EVIDENCE_WORDS = frozenset(
    "article chunk context document email essay evidence fact history message note page paragraph "
    "passage post premise review sentence source story text transcript".split()
)
_TITLE_KEYS = frozenset({"title", "heading", "name", "source", "url", "id", "path", "page"})
_LABELLED_QUESTION = re.compile(r"(?:question|query|q)\s*:\s*", re.IGNORECASE)
_LABELLED_TEXT = re.compile(
    r"^(?:context|document|passage|text)s?:\s+", re.IGNORECASE | re.MULTILINE
)
_QUESTION_MARKS = ("?", "\uff1f")
_SCALAR = re.compile(r"-?[\d.]+|true|false")
_MAX_INPUT_DEPTH = 8


def read_and_answer(messages: Sequence[Message]) -> str:
    """Answer a chat from the text of its last user message.

    The answer is extracted: the sentence that shares the rarest words with the question wins.
    Nothing is known, inferred, translated or computed. Equal messages give equal answers.

    Args:
        messages: A prompt as the adapters write it, or any other.

    Returns:
        The wanted outputs in the wanted form, each of its declared type as far as a JSON schema can
        tell it; one plain text where no form is recognised. Where the inputs hold no answer, a text
        says so, and other types get null if they may, else a value within their bounds.

    Example:
        >>> read_and_answer(
        ...     [{"role": "user", "content": "Cats purr. Dogs bark at night. When do dogs bark?"}]
        ... )
        'Dogs bark at night.'
    """
    prompt = read_prompt(messages)
    question, task, passages = _question_and_passages(prompt)
    inquiry = Inquiry(question, task or prompt.instructions, Evidence(passages))
    if prompt.form == "text":
        return encodable(_answer_text(inquiry, ""))
    main = next((w.name for w in prompt.wanted if w.name not in _REASONING_NAMES), "")
    values = {wanted.name: _value(wanted, inquiry, main) for wanted in prompt.wanted}
    if prompt.form == "json":
        return encodable(json.dumps(values, ensure_ascii=False))
    if prompt.form in {"elements", "words"}:
        return encodable(_plainly(prompt, values))
    parts = [
        f"{header(wanted.name)}\n{fence(_written(wanted, values[wanted.name]))}"
        for wanted in prompt.wanted
    ]
    return encodable("\n\n".join([*parts, header(END)]))


def _plainly(prompt: Prompt, values: Mapping[str, Any]) -> str:
    """Write values between tags, or each on a line behind its name."""
    texts = {wanted.name: _written(wanted, values[wanted.name]) for wanted in prompt.wanted}
    if prompt.form == "words":
        return "\n".join(f"{name}: {text}" for name, text in texts.items())
    return "\n\n".join(
        f"<{name}>\n{escape_tags(text, prompt.names)}\n</{name}>" for name, text in texts.items()
    )


def _value(wanted: Wanted, inquiry: Inquiry, main: str) -> Any:
    if wanted.schema == {"type": "string"}:
        if wanted.name in _REASONING_NAMES:
            return _reasoning(inquiry, main)
        return _answer_text(
            inquiry, f"{wanted.name} {wanted.desc}"[:MAX_SPAN_CHARS], label=wanted.name
        )
    definitions = wanted.schema.get("$defs")
    fitter = Fitter(
        inquiry, cast("dict[str, Any]", definitions) if isinstance(definitions, dict) else None
    )
    return fitter.fit(wanted.schema, f"{wanted.name} {wanted.desc}"[:MAX_SPAN_CHARS]).value


def _written(wanted: Wanted, value: Any) -> str:
    """Write a value into a section: a text as it is, unless it would be taken for JSON."""
    if isinstance(value, str) and not wanted.as_json:
        branches = wanted.schema.get("anyOf")
        is_choice = isinstance(branches, list) and "enum" in branches[0]  # or null
        if not (is_choice and (value.startswith(("{", "[", '"')) or "```" in value)):
            return value
    return json.dumps(value, ensure_ascii=False)


def _answer_text(inquiry: Inquiry, topic: str, label: str = "") -> str:
    if label and (found := inquiry.label(label)):
        return found
    if matches := inquiry.find(topic):
        return matches[0].span.answer
    if not inquiry.question:
        return "The inputs are empty, so there is nothing to answer from."
    asked = clip_text(inquiry.question, MAX_SPAN_CHARS // 2)
    if inquiry.evidence.spans:
        return f"The inputs do not say. Nothing in them matches the question: {asked}"
    return f"The inputs hold no text to answer from, only the question: {asked}"


def _reasoning(inquiry: Inquiry, main: str) -> str:
    """Say which passage the answer is taken from, and why."""
    matches = inquiry.find(main)
    if not matches:
        if inquiry.evidence.spans:
            return "No sentence of the inputs shares a word with the question, so none answers it."
        return "The inputs hold no text to answer from, and I know nothing beyond them."
    where = _place(inquiry, matches[0])
    if words := inquiry.shared_words(matches[0])[:4]:
        listed = ", ".join(f'"{word}"' for word in words)
        return (
            f"The best match is in {where}: it shares {listed} with the question. I answer from it."
        )
    if matches[0].shared:
        return f"The sentence nearest to the task is in {where}. I answer from it."
    return f"No question is among the inputs, so I take the opening of {where}."


def _place(inquiry: Inquiry, match: Match) -> str:
    passage = inquiry.evidence.passages[match.span.passage]
    source = f"`{passage.source}`" if passage.source else "the prompt"
    return f"passage {passage.number} of {source}" if passage.number else source


def _question_and_passages(prompt: Prompt) -> tuple[str, str, list[Passage]]:
    """Tell the question, or else the order given, from what may answer it."""
    inputs = prompt.inputs
    asking = _asking(inputs)
    others = [name for name in inputs if name not in asking]
    question = " ".join(clean(str(inputs[name])) for name in asking)
    if asking and others:  # a number beside a question is an option, not evidence
        others = [name for name in others if not _SCALAR.fullmatch(str(inputs[name])[:40])]
    passages = [passage for name in others for passage in _passages(name, inputs[name])]
    single = list(inputs) if len(inputs) == 1 else [] if passages else asking[-1:]
    if single and isinstance(text := inputs[name := single[0]], str):
        must_ask = bool(asking) or prompt.form == "text"
        question, rest = _split_plain(text, must_ask=must_ask)
        passages = [
            Passage(text=text, source=name) for text in (rest, *reversed(prompt.earlier)) if text
        ]
        if not name and passages and not question.endswith(_QUESTION_MARKS):
            return "", question, passages
    return question, "", passages


def _asking(inputs: Mapping[str, Any]) -> list[str]:
    """Pick the inputs that ask: by name, else by a question mark, else the one far shorter text."""
    texts = {
        name: text
        for name, text in inputs.items()
        if isinstance(text, str) and len(text) <= MAX_QUESTION_CHARS
    }
    words = {name: {word.rstrip("s") for word in name.lower().split("_")} for name in inputs}
    if named := [name for name in texts if words[name] & _QUESTION_WORDS]:
        return named
    if asking := [
        name for name, text in texts.items() if len(inputs) > 1 and text.rstrip().endswith("?")
    ]:
        return asking
    lengths = {name: len(str(value)) for name, value in inputs.items()}
    shortest = min((n for n in texts if terms(texts[n])), key=lengths.__getitem__, default="")
    is_short = bool(shortest) and lengths[shortest] <= min(200, max(lengths.values()) / 3)
    return [shortest] if is_short and not words[shortest] & _EVIDENCE_WORDS else []


def _split_plain(text: str, *, must_ask: bool) -> tuple[str, str]:
    """Split a text into the question it holds and the rest.

    Args:
        text: A text in which question and evidence are not told apart.
        must_ask: Whether to take the first or last sentence for the question if none ends with "?".
    """
    if must_ask:
        text = _LABELLED_TEXT.sub("", text)
    paragraphs = [
        part for part in re.split(r"\n[ \t]*\n|\n(?=(?i:question|query)\s*:)", text) if part.strip()
    ]
    for place in range(len(paragraphs) - 1, -1, -1):
        sentences = split_sentences(clean(paragraphs[place]))
        for index in range(len(sentences) - 1, -1, -1):
            if sentences[index].endswith(_QUESTION_MARKS):
                rest = [*paragraphs[:place], " ".join(sentences[:index] + sentences[index + 1 :])]
                return _unlabelled(sentences[index]), "\n\n".join(
                    [*rest, *paragraphs[place + 1 :]]
                ).strip()
    if not must_ask:
        return "", text
    if len(paragraphs) > 1:
        place = 0 if len(paragraphs[0]) <= len(paragraphs[-1]) else len(paragraphs) - 1
        rest = paragraphs[:place] + paragraphs[place + 1 :]
        return _unlabelled(clip_text(clean(paragraphs[place]), MAX_QUESTION_CHARS)), "\n\n".join(
            rest
        )
    sentences = split_sentences(clean(text))
    return _unlabelled(sentences[0]) if sentences else "", " ".join(sentences[1:])


def _unlabelled(question: str) -> str:
    return _LABELLED_QUESTION.sub("", question, count=1)


def _passages(name: str, value: object) -> Iterator[Passage]:
    """Make passages of an input: one of a text, one for each item of a list."""
    if isinstance(value, list):
        for number, item in enumerate(cast("list[object]", value), 1):
            yield _passage(name, item, number)
    else:
        yield _passage(name, value, 0)


def _passage(name: str, value: object, number: int) -> Passage:
    if isinstance(value, str):
        return Passage(text=value, source=name, number=number)
    title = ""
    if isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        titles = [inner for key, inner in fields.items() if key in _TITLE_KEYS]
        title = " ".join(inner for inner in titles if isinstance(inner, str))
    lines = _lines(value, "", 0)  # pyright: ignore[reportUnknownArgumentType]  # a narrowed object
    return Passage(text="\n".join(lines), source=name, number=number, title=title)


def _lines(value: object, label: str, depth: int) -> Iterator[str]:
    """Write a JSON value as lines of text: long texts as they are, short ones after their key."""
    if depth > _MAX_INPUT_DEPTH or value is None:
        return
    if isinstance(value, dict):
        for key, inner in cast("dict[str, object]", value).items():
            yield from _lines(inner, str(key), depth + 1)
    elif isinstance(value, list):
        for inner in cast("list[object]", value):
            yield from _lines(inner, label, depth + 1)
    elif isinstance(value, str) and (value.count(" ") > 5 or not label):
        yield f"\n{value}\n"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        yield f"{label}: {text}" if label else text
