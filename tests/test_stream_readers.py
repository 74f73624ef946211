"""Readers of answers that come piece by piece: they say what `parse` reads, wherever it is cut.

Not here: where the pieces come from and who gets them (`test_streamify.py`).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspylite import Adapter, ChatAdapter, JSONAdapter, Signature, XMLAdapter
from dspylite.adapters.base import header, section
from dspylite.adapters.streaming import ElementReader, FieldChunk, FieldReader, SectionReader
from dspylite.adapters.streaming_json import ObjectReader
from dspylite.adapters.values import parse_json
from dspylite.errors import AdapterParseError
from dspylite.schema.signature import ensure_signature

TEXTS = ensure_signature("question -> first: str, second: str")
VALUES = ensure_signature("question -> first: str, second: dict")
CHAT, JSON, XML = ChatAdapter(), JSONAdapter(), XMLAdapter()

MARKS = [
    header("first"), header("second"), header("third"), header("completed"), "\\[[ ## ", "[[ ## ",
    "[[", " ## ]]", "<first>", "</first>", "<\\first>", "</second >",
    "<\\/first\t>", '"', "\\", "'", "{", "}",
    '", "second": "', "\n", "\n\n", "\r\n", " ", "\t", "\u2028", "//",
    "/*", "\\n", "\\u00e9", "x", "é", "😀",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=3)), max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 1_000), max_size=20)


def cut(text: str, places: Iterable[int]) -> list[str]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def read(reader: FieldReader, pieces: Iterable[str]) -> tuple[dict[str, str], list[FieldChunk]]:
    """Feed a reader; give the joined text of each output, and all chunks."""
    chunks = [chunk for piece in pieces for chunk in reader.feed(piece)] + reader.finish()
    joined: dict[str, str] = {}
    ended: set[str] = set()
    for chunk in chunks:
        assert chunk.field not in ended, "a piece after the last one"
        joined[chunk.field] = joined.get(chunk.field, "") + chunk.text
        if chunk.is_last:
            ended.add(chunk.field)
    return joined, chunks


def reader_of(adapter: Adapter, signature: type[Signature]) -> FieldReader:
    reader = adapter.stream_reader(signature)
    assert reader is not None
    return reader


def chat_answer(first: str, second: str) -> str:
    return "\n\n".join([section("first", first), section("second", second), header("completed")])


@given(first=TEXT, second=TEXT, prose=st.text(max_size=5), places=CUTS)
def test_sections_give_what_parse_reads_wherever_the_answer_is_cut(
    first: str, second: str, prose: str, places: list[int]
) -> None:
    """Values hold markers, escapes and white space; no chunk shows a marker of the answer's own."""
    text = prose.replace("[", "") + "\n" + chat_answer(first, second)
    expected = CHAT.parse(TEXTS, text)
    joined, chunks = read(reader_of(CHAT, TEXTS), cut(text, places))
    assert joined == expected == {"first": first.strip(), "second": second.strip()}
    assert [chunk.field for chunk in chunks if chunk.is_last] == ["first", "second"]


@given(parts=st.lists(st.sampled_from(MARKS), max_size=14), places=CUTS)
def test_hostile_sections_are_taken_apart_as_parse_takes_them(
    parts: list[str], places: list[int]
) -> None:
    """Whatever `parse` accepts has the same outputs; what it refuses does no harm."""
    text = "".join(parts)
    joined, _ = read(SectionReader(["first", "second"], "completed"), cut(text, places))
    whole, _ = read(SectionReader(["first", "second"], "completed"), [text])
    assert joined == whole
    try:
        expected = CHAT.parse(TEXTS, text)
    except AdapterParseError:
        return
    assert {name: joined.get(name, "") for name in expected} == expected


def test_an_output_that_is_named_like_the_end_marker_is_read() -> None:
    """Its header is the first of the name, and the end marker the second."""
    signature = ensure_signature("question -> completed: str")
    text = f"{header('completed')}\nyes\n{header('completed')}"
    joined, chunks = read(reader_of(CHAT, signature), text)
    assert joined == CHAT.parse(signature, text) == {"completed": "yes"}
    assert chunks[-1].is_last


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(
    first=TEXT,
    second=st.dictionaries(TEXT, JSON_VALUES, max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    fenced=st.booleans(),
    places=CUTS,
)
def test_objects_give_what_parse_reads_wherever_the_answer_is_cut(
    first: str, second: dict[str, Any], ascii_only: bool, indent: int | None, fenced: bool,
    places: list[int],
) -> None:  # fmt: skip
    """Texts come unescaped, other values as the JSON that was written."""
    value = {"other": [{"first": "not this"}], "first": first, "second": second}
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if fenced:
        text = f"```json\n{text}\n```"
    expected = JSON.parse(VALUES, text)
    joined, chunks = read(reader_of(JSON, VALUES), cut(text, places))
    assert joined["first"] == expected["first"] == first
    assert json.loads(joined["second"]) == expected["second"] == second
    assert [chunk.field for chunk in chunks if chunk.is_last] == ["first", "second"]


NOISY = [
    ("{'first': 'it\\'s', 'second': {'a': [1, 2,], 'b': True},}", "it's"),
    ('{"first": "a", // see: the second\n "second": {"a": 1 /* one */ }}', "a"),
    ('So {x} and { y }: {"first": "\\ud83d\\ude00", "second": {}} {z', None),
    ('Here: {"first": "\\ud83d\\ude00 \\u00e9\\/\\"", "second": {"}": "{"}} (done)', '😀 é/"'),
    ('{"note": "{"} then {"first": "b", "second": {}}', "b"),
]


@pytest.mark.parametrize(("text", "first"), NOISY)
@given(places=CUTS)
def test_objects_with_syntax_noise_are_read_as_parse_mends_them(
    places: list[int], text: str, first: str | None
) -> None:
    """Python's quotes, trailing commas, comments and prose with braces of its own."""
    joined, _ = read(ObjectReader(["first", "second"]), cut(text, places))
    if first is None:
        with pytest.raises(AdapterParseError):
            JSON.parse(VALUES, text)
        return
    expected = JSON.parse(VALUES, text)
    assert joined["first"] == expected["first"] == first
    assert parse_json(joined["second"]) == expected["second"]


PARTS = [*MARKS, "first", "second", ":", ","]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), places=CUTS)
def test_hostile_objects_do_not_depend_on_where_they_are_cut(
    parts: list[str], places: list[int]
) -> None:
    """Neither does a reader fail on them."""
    text = "{" + "".join(parts)
    joined, _ = read(ObjectReader(["first", "second"]), cut(text, places))
    whole, _ = read(ObjectReader(["first", "second"]), [text])
    assert joined == whole
    try:
        expected = JSON.parse(TEXTS, text)
    except AdapterParseError:
        return
    assert all(joined[name] in (value, f"{value}") for name, value in expected.items())


def test_half_of_a_character_stays_alone_where_no_other_half_follows() -> None:
    """As `json` reads it; with the next escape untouched."""
    text = '{"first": "\\ud83d\\n\\ud83d\\u0041\\ud83d"}'
    joined, _ = read(ObjectReader(["first"]), text)
    assert joined["first"] == json.loads(text)["first"]


@given(first=TEXT, second=TEXT, places=CUTS)
def test_elements_give_their_text_wherever_the_answer_is_cut(
    first: str, second: str, places: list[int]
) -> None:
    """Tags of fields in a value are escaped by a backslash; all other tags are text."""
    one, other = XML.escape(TEXTS, first), XML.escape(TEXTS, second)
    text = f"Well: <first>\n{one}\n</first> and <second>{other}</second>"
    joined, chunks = read(reader_of(XML, TEXTS), cut(text, places))
    assert joined == XML.parse(TEXTS, text) == {"first": first.strip(), "second": second.strip()}
    assert [chunk.field for chunk in chunks if chunk.is_last] == ["first", "second"]


@given(parts=st.lists(st.sampled_from(MARKS), max_size=14), places=CUTS)
def test_hostile_elements_are_taken_apart_as_parse_takes_them(
    parts: list[str], places: list[int]
) -> None:
    """Whatever `parse` accepts has the same outputs; what it refuses does no harm."""
    text = f"<first>{''.join(parts)}</first><second></second>"
    joined, _ = read(reader_of(XML, TEXTS), cut(text, places))
    assert joined == read(reader_of(XML, TEXTS), [text])[0]
    try:
        expected = XML.parse(TEXTS, text)
    except AdapterParseError:
        return
    assert {name: joined.get(name, "") for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<first>a</first><first>b</first>", {"first": "a"}),
        ("</first><first>b</first>", {}),
        ("<first>a<first>b</first>", {"first": "a"}),
        ("<first>a<second>b</second></first>", {"first": "a<second>b</second>"}),
        ("<third>c</third><first >a < b</first\t>", {"first": "a < b"}),
        ("<first>cut", {"first": "cut"}),
    ],
)
def test_elements_that_are_ambiguous_end_the_reading(text: str, expected: dict[str, str]) -> None:
    """What was given before them is what a strict reader would have met before them."""
    assert read(ElementReader(["first", "second"]), text)[0] == expected


@pytest.mark.parametrize(
    ("reader", "opening", "filler"),
    [
        (lambda: SectionReader(["first"], "completed"), "[[ ## first ## ]]", filler)
        for filler in (" ", "\n", "\\", "[", "[[ ## first ## ]\n", "x", "\n\\[[ ## ", "\n[[ ## f")
    ]
    + [
        (lambda: ObjectReader(["first"]), '{"first": "', filler)
        for filler in ("x", "\\n", "\\ud83d", "\\\\", "\\u0041")
    ]
    + [
        (lambda: ObjectReader(["first"]), '{"first": [', filler)
        for filler in ("1, ", "[", '"a\\"", ', " ", "/* */", "/*")
    ]
    + [(lambda: ObjectReader(["first"]), "", filler) for filler in ("{", "{x}", '{"a": 1} ', " {")]
    + [
        (lambda: ElementReader(["first"]), "<first>", filler)
        for filler in ("<", "<\\", "</first", "</first ", "\\", " ", "</firs")
    ],
)
def test_reading_takes_time_in_proportion_to_the_text(
    reader: Callable[[], FieldReader], opening: str, filler: str
) -> None:
    """Fed by single characters, 16 times the text takes no more than some 16 times the steps."""

    def steps(count: int) -> int:
        made, calls = reader(), 0

        def count_call(frame: Any, event: str, arg: Any) -> None:
            nonlocal calls
            calls += event in {"call", "c_call"}

        text = opening + filler * (count // len(filler))
        sys.setprofile(count_call)
        try:
            for char in text:
                made.feed(char)
        finally:
            sys.setprofile(None)
        return calls

    assert steps(4_000) <= 20 * steps(250) + 200
