"""Every adapter's reader against hostile and cut answers: one whole value, or `AdapterParseError`.

Not here: what good answers look like (`test_chat_adapter.py`, `test_json_adapter.py`,
`test_xml_adapter.py`), and text that is quoted in them (`test_injection.py`).
"""

from __future__ import annotations

import datetime
import enum
import subprocess
import sys
from typing import Any, Literal

import pydantic
import pytest

from dspylite import (
    AdapterParseError,
    BAMLAdapter,
    ChatAdapter,
    InputField,
    JSONAdapter,
    OutputField,
    XMLAdapter,
)
from dspylite.adapters.base import Adapter, header
from dspylite.schema.signature import make_signature

ADAPTERS: dict[str, Adapter] = {
    "chat": ChatAdapter(),
    "json": JSONAdapter(),
    "xml": XMLAdapter(),
    "baml": BAMLAdapter(),
}
END = header("completed")


class Color(enum.Enum):
    RED = "red"
    BLUE = "sky blue"


class Node(pydantic.BaseModel):
    name: str
    size: int = 1
    next: Node | None = None


VALUES: dict[str, tuple[Any, Any]] = {
    "str": (str, "a text\n\nof [two] {lines}, 12"),
    "int": (int, 1234),
    "float": (float, -12.75),
    "bool": (bool, True),
    "literal": (Literal["good", "goods"], "goods"),
    "enum": (Color, Color.BLUE),
    "date": (datetime.date, datetime.date(2024, 5, 17)),
    "optional": (int | None, 120),
    "list": (list[int], [1, 22, 333]),
    "dict": (dict[str, float], {"a": 1.5, "b": 22.25}),
    "model": (Node, Node(name="a", size=12, next=Node(name="b"))),
    "models": (list[Node], [Node(name="a"), Node(name="}]", size=3)]),
    "union": (int | str, "12a"),
    "any": (Any, {"k": [1, {"l": None}]}),
}


def signature_of(*names: str) -> Any:
    fields: dict[str, Any] = {"question": (str, InputField())}
    for place, name in enumerate(names):
        fields[f"out{place}"] = (VALUES[name][0], OutputField())
    return make_signature(fields)


@pytest.mark.parametrize("reason", ["stop", "length", None])
@pytest.mark.parametrize("last", VALUES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_answer_cut_anywhere_is_whole_or_refused(
    kind: str, last: str, reason: str | None
) -> None:
    """Half of a value is a wrong value: 1234 cut to 12 looks right (B 7.9).

    Where a provider says `stop` and the end marker is missing, `ChatAdapter` believes it; then the
    last output alone may be short.
    """
    adapter, signature = ADAPTERS[kind], signature_of("int", "str", last)
    whole = {"out0": 1234, "out1": VALUES["str"][1], "out2": VALUES[last][1]}
    text = adapter.format_assistant_message_content(signature, whole)
    assert adapter.parse(signature, text, finish_reason=reason) == whole
    for end in range(len(text)):
        try:
            found = adapter.parse(signature, text[:end], finish_reason=reason)
        except AdapterParseError:
            continue
        if kind == "chat" and reason == "stop":
            assert "[[ ##" not in str(found["out2"])
            found["out2"] = whole["out2"]
        assert found == whole, (end, text[:end])


@pytest.mark.parametrize("kind", ["json", "xml", "baml"])
def test_a_cut_inside_prose_or_a_fence_is_seen(kind: str) -> None:
    """Wrapping hides the beginning of an answer, and never its end."""
    adapter, signature = ADAPTERS[kind], signature_of("model")
    whole = {"out0": VALUES["model"][1]}
    text = adapter.format_assistant_message_content(signature, whole)
    for before in ("Sure: ", "```json\n", "{note} "):
        for end in range(len(text)):
            with pytest.raises(AdapterParseError):
                adapter.parse(signature, before + text[:end])


UNITS = (
    "{ [ \" < [[ ## \\ ' &lt; & , <answer> </answer> <a> <\\ <!-- <![CDATA[ <?xml <a/> /* // */ {} "
    '` {"answer": {"answer":" {"answer":1} ":" <item>1</item> 1 - NaN Infinity None true nan,'
).split(" ")
ODD = {
    "nothing": "",
    "null character": "\0",
    "lone surrogate": "\ud800",
    "both halves apart": "\udc00 \ud800",
    "byte order mark": "\ufeff1",
    "line ends": "\r\n\r",
    "bomb": '<!DOCTYPE a [<!ENTITY b "xx"><!ENTITY c "&b;&b;">]><answer>&c;</answer>',
    "external": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><answer>&x;</answer>',
    "attribute": '<answer type="int">1</answer>',
    "comment": "<answer><!-- 1 --></answer>",
    "character data": "<answer><![CDATA[1]]></answer>",
    "instruction": "<?xml version='1.0'?><answer>one</answer>",
    "keys twice": '{"answer": 1, "answer": 2}',
    "other case": "<Answer>1</Answer> [[ ## Answer ## ]]",
    "prose": "I would rather not say.",
    "wide digits": "\uff11\uff12",
}


def wrapped(text: str) -> list[str]:
    """Put a text where a value, or half of one, would stand in each of the forms."""
    return [
        text,
        f"{header('answer')}\n{text}\n{END}",
        f"{header('answer')}\n{text}",
        f"<answer>{text}</answer>",
        f"<answer>{text}",
        f'{{"answer": "{text}"}}',
        f'{{"answer": {text}}}',
        f'So {text} {{"answer": "x"}} {text}',
    ]


@pytest.mark.parametrize("output", ["str", "int", "date", "list", "model", "dict", "optional"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_nothing_but_our_error_leaves_a_reader(kind: str, output: str) -> None:
    """Whatever stands in an answer, a worker that reads it lives on."""
    adapter = ADAPTERS[kind]
    signature = make_signature(
        {"question": (str, InputField()), "answer": (VALUES[output][0], OutputField())}
    )
    texts = [unit * count for unit in UNITS for count in (1, 2, 300)] + list(ODD.values())
    for text in texts:
        for answer in wrapped(text):
            for reason in ("stop", "length", None):
                try:
                    found = adapter.parse(signature, answer, finish_reason=reason)
                except AdapterParseError:
                    continue
                assert list(found) == ["answer"]


def test_entities_of_a_document_are_never_expanded() -> None:
    """The text is data to the end; no declaration in it has any effect."""
    signature = make_signature("question -> answer: list[str]")
    for name in ("bomb", "external"):
        with pytest.raises(AdapterParseError):
            ADAPTERS["xml"].parse(signature, ODD[name])
    assert ADAPTERS["xml"].parse(make_signature("q -> answer"), ODD["bomb"]) == {"answer": "&c;"}


_READ_ALL = """
import sys
from dspylite import AdapterParseError, BAMLAdapter, ChatAdapter, JSONAdapter, XMLAdapter
from dspylite.schema.signature import make_signature
from tests.test_adapter_fuzz import wrapped
adapter = {"chat": ChatAdapter, "json": JSONAdapter, "xml": XMLAdapter}[sys.argv[1]]()
signature = make_signature("question -> answer: list[int]")
for unit in sys.argv[2].split(" "):
    for answer in wrapped(unit * (400_000 // len(unit))):
        try:
            adapter.parse(signature, answer)
        except AdapterParseError:
            continue
        raise SystemExit(f"read: {unit}")
"""
_BIG = {
    "json": '{ [ \\ \' " , /* {"answer":',
    "xml": "< <a> <answer> </answer> &lt; <\\ <a/>",
    "chat": "[[ ## \\ [",
}


@pytest.mark.parametrize("kind", _BIG)
def test_megabytes_are_read_in_linear_time(kind: str) -> None:
    """A reader that looks twice at each character would take hours here (B 7.9)."""
    subprocess.run([sys.executable, "-c", _READ_ALL, kind, _BIG[kind]], check=True, timeout=300)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_deep_nesting_ends_in_our_error(kind: str) -> None:
    """A hundred thousand levels are far beyond Python's own stack."""
    depth = 100_000
    adapter, signature = ADAPTERS[kind], make_signature("question -> answer: list[int]")
    for text in (
        "[" * depth + "]" * depth,
        '{"answer":' * depth + "1" + "}" * depth,
        "<item>" * depth + "</item>" * depth,
    ):
        for answer in wrapped(text)[::2]:
            with pytest.raises(AdapterParseError):
                adapter.parse(signature, answer)
