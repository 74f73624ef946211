"""Understands a prompt: which outputs it wants, of which types and in which form, and its inputs.

A prompt is read as text, like any model would. Not here: what is answered (`reading.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from dspylite.models.offline.notation import read_notation
from dspylite.schema.messages import Message

Form = Literal["sections", "elements", "json", "words", "text"]

END = "completed"
"""Name of the section that ends an answer."""

_NOT_GIVEN = "(not given in this example)"  # must match `adapters/base.py`

_OPENING_TAG = re.compile(r"^<([^\s<>/\\]+)>\n", re.MULTILINE)
_ESCAPED_TAG = re.compile(r"<\\(\\*/?[^\s<>/\\]+[ \t]*>)")

# `\S`, not `\w`: an identifier may hold marks that are no word characters, as in Hindi.
_HEADER = re.compile(r"^\[\[ ## (\S+) ## \]\][ \t]*$", re.MULTILINE)
_MARKER_LINE = re.compile(r"^([ \t]*)(\\*)(\[\[ ## )", re.MULTILINE)
_ESCAPED_LINE = re.compile(r"^([ \t]*)\\(\\*\[\[ ## )", re.MULTILINE)
_NAMED_SECTION = re.compile(r"`\[\[ ## (\S+) ## \]\]`")
_NAMED_KEYS = re.compile(
    r"\bJSON object\b[^`?\n]{0,60}\b(?:keys|fields)\b[^`?\n]{0,20}"
    r"(`[^`\s]+`(?:(?: \([^`()]{0,200}\))?,?(?: and| then)? `[^`\s]+`)*)"
)
_NAMED_TAGS = re.compile(r"`<([^<>`\s]+)>`(?=, then `<|, each closed by its end tag)")
_OUTPUTS = re.compile(
    r"^(?:Outputs:|Your output fields are:|Answer in your own words\. .*:)[ \t]*$", re.MULTILINE
)
_IN_WORDS = "Answer in your own words. Another model will read the answer"
_NOTATION = "all keys in double quotes, of this form:\n\n{"
_ENTRY = re.compile(r"^(?:-|\d{1,3}\.) `([^`\s]+)` \(", re.MULTILINE)
_LIST_ENDS = (
    "\n\nWrite each output below its header line",
    "\n\nWrite each output between its tags",
    "\n\nAnswer with one JSON object",
    "\nAll interactions will be structured",
)
_TASK = re.compile(r"^Task: ", re.MULTILINE)

_MADE_TASK = re.compile(  # made from the names of the fields, which say more by themselves
    r"(?:Given (?:`[^`\s]+`,? )+produce|Produce) (?:`[^`\s]+`(?:, )?)+\."
)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\"""", re.DOTALL)
_CHOICES_END = re.compile(
    r"`(?=, or `null`|, (?:gt|ge|lt|le|multiple_of|min_length|max_length|pattern)=|\)(?: — |$))",
    re.MULTILINE,
)
_BOUND = re.compile(r"(?:, )?(gt|ge|lt|le|multiple_of|min_length|max_length|pattern)=")
_NUMBER = re.compile(r"(?:Decimal\(')?([-+]?[\d.]{1,400}(?:e[-+]?\d{1,3})?)(?:'\))?")
_BOUND_KEYS: Mapping[str, tuple[str, ...]] = {
    "gt": ("exclusiveMinimum",),
    "ge": ("minimum",),
    "lt": ("exclusiveMaximum",),
    "le": ("maximum",),
    "multiple_of": ("multipleOf",),
    "min_length": ("minLength", "minItems", "minProperties"),
    "max_length": ("maxLength", "maxItems"),
    "pattern": ("pattern",),
}
_FORMS: Mapping[str, Mapping[str, Any]] = {
    "a whole number": {"type": "integer"},
    "a number": {"type": "number"},
    "`true` or `false`": {"type": "boolean"},
    "a date as YYYY-MM-DD": {"type": "string", "format": "date"},
    "a date and time in ISO 8601": {"type": "string", "format": "date-time"},
    "text": {"type": "string"},
}
_TYPES: Mapping[str, Mapping[str, Any]] = {  # for prompts that name a type and no form
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "list[str]": {"type": "array", "items": {"type": "string"}},
    "list[int]": {"type": "array", "items": {"type": "integer"}},
    "list[float]": {"type": "array", "items": {"type": "number"}},
    "dict[str, str]": {"type": "object"},
    "dict[str, Any]": {"type": "object"},
}
_SCHEMA = "JSON of this schema: "
_CHOICES = "exactly one of `"
_NULL = ", or `null`"
_DECODER = json.JSONDecoder()
_DATE_END = re.compile(r"\)(?=,|\))|$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One output that the prompt asks for.

    Attributes:
        name: Its name.
        schema: A JSON schema of its value, as far as the prompt tells.
        desc: What it means, in the prompt's words.
        as_json: Whether it is written as JSON even where other texts are written as they are.
    """

    name: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    desc: str = ""
    as_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, understood.

    Attributes:
        form: How the answer is to be written: "sections" under headers, "elements" between
            tags, one "json" object, "words" that name each output, or "text" where no form is
            recognised.
        wanted: The outputs, in the order asked; none where the form is "text".
        instructions: The task in words.
        inputs: The inputs by name, JSON already read; one named "" where there are no sections.
        earlier: What the user said before, where there are no sections.
        names: The names of all inputs and outputs.
    """

    form: Form
    wanted: tuple[Wanted, ...] = ()
    instructions: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    earlier: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def fence(text: str) -> str:
    r"""Escape lines of a value that look like headers, as the adapters do.

    Example:
        >>> fence("[[ ## answer ## ]]")
        '\\[[ ## answer ## ]]'
    """
    return _MARKER_LINE.sub(r"\1\\\2\3", text) if "[[ ##" in text else text


def escape_tags(text: str, names: Sequence[str]) -> str:
    r"""Put a backslash into tags of these names, as `XMLAdapter` does.

    Example:
        >>> print(escape_tags("</a>", ["a"]))
        <\/a>
    """
    if "<" not in text:
        return text
    listed = "|".join(re.escape(name) for name in names)
    return re.sub(rf"<(?=\\*/?(?:{listed})[ \t]*>)", r"<\\", text)


def header(name: str) -> str:
    """Return the line that opens a section of an answer."""
    return f"[[ ## {name} ## ]]"


def read_prompt(messages: Sequence[Message]) -> Prompt:
    """Find out what a prompt asks for; never fails, at worst it asks for a plain text.

    Example:
        >>> read_prompt([{"role": "user", "content": "Who are you?"}]).form
        'text'
    """
    said = [(str(message.get("role")), _text_of(message)) for message in messages]
    system = "\n\n".join(text for role, text in said if role in {"system", "developer"})
    users = [text for role, text in said if role == "user"] or [said[-1][1] if said else ""]
    asking = next((text for text in reversed(users) if _reminded(text)[1]), users[-1]).rstrip()
    form, names = _reminded(asking)
    reminded = bool(names)
    if not reminded:
        form = "json" if "JSON object" in system else "text"
        form = "words" if _IN_WORDS in system else form
        form = "sections" if header(END) in system else form
    task = list(_TASK.finditer(system))
    shown = system.rfind(_NOTATION) if form == "json" else -1
    if shown >= 0:
        listed = _read_shown(system, shown + len(_NOTATION) - 1)
    else:
        until = task[-1].start() if task else len(system)
        listed = _read_outputs(system[:until], names, typed_choices=form == "json")
    wanted = [listed.get(name, Wanted(name=name)) for name in names] or list(listed.values())
    if form == "text" or not wanted:
        return Prompt(form="text", inputs={"": asking}, earlier=tuple(users[:-1]))
    instructions = system[task[-1].end() :].strip() if task else ""
    return Prompt(
        form=form,
        wanted=tuple(wanted),
        instructions="" if _MADE_TASK.fullmatch(instructions) else instructions,
        inputs=(
            _read_elements(asking)
            if form == "elements"
            else _read_inputs(asking, reminded=reminded)
        ),
        names=tuple(dict.fromkeys([*_ENTRY.findall(system), *names])),
    )


def _read_shown(system: str, start: int) -> dict[str, Wanted]:
    """Read the outputs off an object that shows their types."""
    whole = read_notation(system, start)
    definitions = {"$defs": whole["$defs"]} if "$defs" in whole else {}
    return {
        name: Wanted(
            name=name,
            schema={**{k: v for k, v in schema.items() if k != "description"}, **definitions},
            desc=str(schema.get("description", "")),
            as_json=True,
        )
        for name, schema in whole["properties"].items()
    }


def _text_of(message: Message) -> str:
    content: object = message.get("content")
    if isinstance(content, str):
        return encodable(content)
    parts = cast("list[object]", content) if isinstance(content, list) else []
    texts = (
        cast("dict[str, object]", part).get("text") for part in parts if isinstance(part, dict)
    )
    return encodable("\n".join(text for text in texts if isinstance(text, str)))


def encodable(text: str) -> str:
    """Drop halves of surrogate pairs, which no wire format and no file can carry."""
    return text.encode("utf-8", "ignore").decode("utf-8")


def _reminded(text: str) -> tuple[Form, list[str]]:
    """Read the form of the answer off the last paragraph, which says what to write."""
    last = text[text.rfind("\n\n") + 1 :]
    names: list[str] = _NAMED_SECTION.findall(last)
    if names and names[-1] == END:  # an output may have that name too, and then stands before it
        names.pop()
    if names:
        return "sections", list(dict.fromkeys(names))
    if tags := _NAMED_TAGS.findall(last):
        return "elements", list(dict.fromkeys(tags))
    if keys := _NAMED_KEYS.search(last):
        return "json", list(dict.fromkeys(re.findall(r"`([^`\s]+)`", keys[1])))
    return "text", []


def _read_outputs(system: str, names: Sequence[str], *, typed_choices: bool) -> dict[str, Wanted]:
    """Read the list of outputs: "- `name` (type: form) — desc" each.

    Args:
        system: The system message.
        names: The outputs to look for; any if there are none.
        typed_choices: Whether to give choices as the values they are, where text would not do.
    """
    opening = _OUTPUTS.search(system)
    if opening is None:
        return {}
    ends = [place for mark in _LIST_ENDS if (place := system.find(mark, opening.end())) >= 0]
    listed = system[opening.end() : min(ends, default=len(system))]
    found: list[Wanted] = []
    sought = set(names)
    place = end = 0
    while entry := _ENTRY.search(listed, place):
        place = entry.end()
        if names and entry[1] not in sought:
            continue
        sought.discard(entry[1])
        if found:
            found[-1] = replace(found[-1], desc=_desc(listed[end : entry.start()]))
        type_name, start = _split_type(listed, place)
        schema, as_json, end = _read_type(listed, start, type_name, typed_choices=typed_choices)
        found.append(Wanted(name=entry[1], schema=schema, as_json=as_json))
        place = end
    found[-1:] = [replace(wanted, desc=_desc(listed[end:])) for wanted in found[-1:]]
    return {wanted.name: wanted for wanted in found}


def _desc(rest: str) -> str:
    return rest.partition(") — ")[2].strip()


def _read_type(
    text: str, start: int, type_name: str, *, typed_choices: bool
) -> tuple[dict[str, Any], bool, int]:
    """Read a form with its bounds, and whether null will do, from a place on."""
    schema, as_json, start = _read_form(text, start, type_name, typed_choices=typed_choices)
    bounds, start = _read_bounds(text, start)
    nullable = text.startswith(_NULL, start)
    if nullable:
        more, start = _read_bounds(text, start + len(_NULL))
        bounds |= more
    schema = _bounded({**schema, **bounds}, bounds)
    if nullable:
        definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
        schema = {"anyOf": [schema, {"type": "null"}], **definitions}
    return schema, as_json, start


def _bounded(schema: dict[str, Any], bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Put bounds into the alternatives too, as for a decimal, which is a number or a text."""
    if bounds and isinstance(branches := schema.get("anyOf"), list):
        inner = [{**branch, **bounds} for branch in cast("list[dict[str, Any]]", branches)]
        return {**schema, "anyOf": inner}
    return schema


def _split_type(text: str, start: int) -> tuple[str, int]:
    """Read a type, whose quoted parts may hold anything; give it and the place of its form."""
    place, depth = start, 0
    while place < len(text):
        char = text[place]
        if char in "'\"" and (quoted := _QUOTED.match(text, place)):
            place = quoted.end()
            continue
        if char in "[(":
            depth += 1
        elif char == "]" or (char == ")" and depth):
            depth -= 1
        elif depth == 0 and char == ")":
            return text[start:place], place
        elif depth == 0 and text.startswith(": ", place):
            return text[start:place], place + 2
        place += 1
    return text[start:], place


def _read_form(
    text: str, start: int, type_name: str, *, typed_choices: bool
) -> tuple[dict[str, Any], bool, int]:
    """Read the form of a value: its schema, whether it is written as JSON, and where it ends."""
    if text.startswith(_SCHEMA, start):
        start += len(_SCHEMA)
        try:
            schema, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return {}, True, start
        return dict(cast("dict[str, Any]", schema)) if isinstance(schema, dict) else {}, True, end
    if text.startswith(_CHOICES, start):
        start += len(_CHOICES)
        closing = _CHOICES_END.search(text, start)
        stop = closing.start() if closing else len(text)
        choices: list[Any] = text[start:stop].split("`, `")
        end = min(stop + 1, len(text))
        if typed_choices and text.startswith(_NULL, end):
            choices = [_typed(choice, type_name) for choice in choices]
        return {"enum": choices}, False, end
    for form, schema in _FORMS.items():
        if text.startswith(form, start):
            return dict(schema), False, start + len(form)
    if text.startswith("JSON", start):
        return {}, True, start + len("JSON")
    schema = _TYPES.get(type_name, {"type": "string"})
    return dict(schema), schema.get("type") in {"array", "object"}, start


def _typed(choice: str, type_name: str) -> Any:
    """Give a choice as the value it is, where the type does not show it as a text."""
    if repr(choice) in type_name:
        return choice
    try:
        value = json.loads(choice)
    except (ValueError, RecursionError):
        return choice
    return value if isinstance(value, int | float) else choice


def _read_bounds(rest: str, start: int) -> tuple[dict[str, Any], int]:
    """Read "ge=1, max_length=5, pattern='a'" into the schema's words for them."""
    bounds: dict[str, Any] = {}
    while found := _BOUND.match(rest, start):
        value: object
        if quoted := _QUOTED.match(rest, found.end()):
            value, start = _unquote(quoted[0]), quoted.end()
        elif number := _NUMBER.match(rest, found.end()):
            value, start = _number(number[1]), number.end()
        else:  # a date, say, which JSON's schema has no bound for
            stop = _DATE_END.search(rest, found.end())
            start = stop.end() if stop else len(rest)
            continue
        if value is not None:
            bounds.update(dict.fromkeys(_BOUND_KEYS[found[1]], value))
    return bounds, start


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return None


def _unquote(text: str) -> str:
    """Undo Python's `repr` of a text, as far as patterns need it."""
    return re.sub(r"\\([\\'\"])", r"\1", text[1:-1])


def _read_inputs(content: str, *, reminded: bool) -> dict[str, Any]:
    """Read the sections of the user's message, without the paragraph that says what to write."""
    end = content.rfind("\n\n") + 2 if "\n\n" in content else 0
    only_tells = reminded and content.startswith(("Write ", "Respond "), end)
    body = content[:end] if only_tells else content
    marks = list(_HEADER.finditer(body))
    if not marks:
        return {"": body} if body.strip() else {}
    inputs: dict[str, Any] = {}
    for mark, stop in zip(marks, [*(m.start() for m in marks[1:]), len(body)], strict=True):
        text = body[mark.end() : stop].strip()
        if "[[ ##" in text:
            text = _ESCAPED_LINE.sub(r"\1\2", text)
        if text not in {_NOT_GIVEN, "null", ""}:
            inputs[mark[1]] = _value(text)
    return inputs


def _read_elements(content: str) -> dict[str, Any]:
    """Read the elements of the user's message, and undo the escaping of tags in them."""
    inputs: dict[str, Any] = {}
    place = 0
    while opening := _OPENING_TAG.search(content, place):
        name = opening[1]
        closing = content.find(f"\n</{name}>", opening.end() - 1)
        if closing < 0:
            break
        text = _ESCAPED_TAG.sub(r"<\1", content[opening.end() : closing]).strip()
        place = closing + len(name) + 4
        if text not in {_NOT_GIVEN, "null", ""}:
            inputs[name] = _value(text)
    return inputs


def _value(text: str) -> Any:
    if text[:1] in {"[", "{"}:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text
