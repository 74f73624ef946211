"""One value as text and back, through both adapters: what was written is read, or nothing is.

Not here: the form of whole prompts and answers (`test_chat_adapter.py`, `test_json_adapter.py`).
"""

import dataclasses
import datetime as dt
import decimal
import enum
import math
import uuid
from typing import Any, Literal, NamedTuple, Optional

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from dspylite import AdapterParseError, ChatAdapter, Example, JSONAdapter, OutputField
from dspylite.adapters.base import Adapter
from dspylite.adapters.values import (
    check_readable,
    describe,
    format_value,
    parse_text,
    to_json,
    validate,
)
from dspylite.errors import SignatureError
from dspylite.schema.signature import Field, Signature, make_signature

CHAT, JSON = ChatAdapter(), JSONAdapter()
ADAPTERS: list[Adapter] = [CHAT, JSON]


class Colour(enum.Enum):
    RED = "red"
    NAVY = "dark blue"


class Crossed(enum.Enum):
    """Each member's value is the other's name; the value is what was written."""

    LEFT = "RIGHT"
    RIGHT = "LEFT"


class Odd(enum.Enum):
    NOTHING = None
    PAIR = (1, 2)
    YES = True
    HALF = 0.5


class Address(pydantic.BaseModel):
    city: str
    zip_code: str | None = pydantic.Field(default=None, alias="zipCode")


class Person(pydantic.BaseModel):
    name: str
    born: dt.date
    homes: list[Address] = []
    friend: Optional["Person"] = None


@dataclasses.dataclass
class Point:
    x: float
    label: str


class Row(TypedDict):
    n: int
    tags: list[str]


class Pair(NamedTuple):
    a: int
    b: str


MARKERS = [
    "[[ ## answer ## ]]",
    "[[ ## completed ## ]]",
    "[[ ## ",
    " ## ]]",
    "\\",
    "\n",
    "\r",
    "\t",
]
NOISE = [
    *MARKERS,
    " ",
    "{",
    "}",
    '"',
    "'",
    "```",
    "```json\n",
    "\u2028",
    "\x85",
    "\x0b",
    "é",
    "//",
    "null",
]
texts = st.lists(st.sampled_from(NOISE) | st.text(max_size=4), max_size=12).map("".join)
trimmed = texts.map(str.strip)  # a section's text has no edges that one could see
addresses = st.builds(lambda c, z: Address(city=c, zipCode=z), texts, st.none() | texts)
people = st.builds(
    Person,
    name=texts,
    born=st.dates(),
    homes=st.lists(addresses, max_size=2),
    friend=st.none() | st.builds(Person, name=texts, born=st.dates()),
)
zones = st.sampled_from([dt.UTC, dt.timezone(dt.timedelta(hours=5, minutes=30)), None])
zoned = st.builds(lambda d, z: d.replace(tzinfo=z), st.datetimes(), zones)
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)

TYPES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "str": (str, trimmed),
    "int": (int, st.integers()),
    "float": (float, floats),
    "bool": (bool, st.booleans()),
    "optional str": (str | None, st.none() | trimmed.filter(lambda s: s not in {"null", "None"})),
    "optional int": (int | None, st.none() | st.integers()),
    "literal": (
        Literal["yes", "no", "YES!", "'quoted'", '"q"', "[a]", "a\nb", 3, "", None],
        st.sampled_from(["yes", "no", "YES!", "'quoted'", '"q"', "[a]", "a\nb", 3, "", None]),
    ),
    "enum": (Colour, st.sampled_from(Colour)),
    "crossed enum": (Crossed, st.sampled_from(Crossed)),
    "odd enum": (Odd, st.sampled_from(Odd)),
    "optional enum": (Colour | None, st.none() | st.sampled_from(Colour)),
    "list[str]": (list[str], st.lists(texts, max_size=4)),
    "list[enum]": (list[Colour], st.lists(st.sampled_from(Colour))),
    "set[int]": (set[int], st.sets(st.integers())),
    "tuple": (tuple[int, str, bool], st.tuples(st.integers(), texts, st.booleans())),
    "named tuple": (Pair, st.builds(Pair, st.integers(), texts)),
    "dict[str, list]": (
        dict[str, list[float]],
        st.dictionaries(texts, st.lists(floats, max_size=3), max_size=3),
    ),
    "dict[int, str]": (dict[int, str], st.dictionaries(st.integers(), texts, max_size=3)),
    "dict[date, int]": (dict[dt.date, int], st.dictionaries(st.dates(), st.integers(), max_size=3)),
    "typed dict": (
        Row,
        st.fixed_dictionaries({"n": st.integers(), "tags": st.lists(texts, max_size=3)}),
    ),
    "model": (Person, people),
    "list of models": (list[Address], st.lists(addresses, max_size=3)),
    "dataclass": (Point, st.builds(Point, floats, texts)),
    "list of dataclasses": (list[Point], st.lists(st.builds(Point, floats, texts), max_size=2)),
    "date": (dt.date, st.dates()),
    "datetime": (dt.datetime, zoned),
    "time": (dt.time, st.times()),
    "timedelta": (
        dt.timedelta,
        st.timedeltas(dt.timedelta(days=-9999), dt.timedelta(days=9999)),
    ),
    "decimal": (decimal.Decimal, st.decimals(allow_nan=False, allow_infinity=False, places=3)),
    "uuid": (uuid.UUID, st.uuids()),
    "bytes": (bytes, trimmed.map(str.encode)),
    "list of any": (list[Any], st.lists(json_values, max_size=3)),
}


def of(annotation: Any, **bounds: Any) -> type[Signature]:
    return make_signature({"answer": (annotation, OutputField(**bounds)), "after": OutputField()})


def written(adapter: Adapter, annotation: Any, value: Any, *, after: str = "") -> str:
    values = {"answer": value, "after": after}
    return adapter.format_assistant_message_content(of(annotation), values)


def field(annotation: Any, **bounds: Any) -> Field:
    return of(annotation, **bounds).output_fields["answer"]


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_written_value_is_read_back_equal(adapter: Adapter, kind: str, data: st.DataObject) -> None:
    """Demos show the model this form, so an answer in it must give the value it stands for."""
    annotation, values = TYPES[kind]
    value = data.draw(values)
    signature = of(annotation)
    check_readable(signature.output_fields["answer"])
    answer = written(adapter, annotation, value, after="x")
    read = adapter.parse(signature, answer)
    assert read == {"answer": value, "after": "x"}
    assert type(read["answer"]) is type(value)


@given(value=texts)
@settings(max_examples=200, deadline=None)
def test_json_keeps_the_edges_of_a_text(value: str) -> None:
    """A JSON string has visible ends, so nothing is stripped."""
    read = JSON.parse(
        of(str), JSON.format_assistant_message_content(of(str), {"answer": value, "after": ""})
    )
    assert read["answer"] == value


@given(value=json_values)
@settings(max_examples=200, deadline=None)
def test_any_json_value_is_read_back_equal(value: Any) -> None:
    """An output without a type is whatever JSON can say."""
    assert (
        JSON.parse(
            of(Any), JSON.format_assistant_message_content(of(Any), {"answer": value, "after": ""})
        )["answer"]
        == value
    )


# --- cut anywhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("finish_reason", ["length", None])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_answer_cut_at_any_byte_is_whole_or_an_error(
    adapter: Adapter, finish_reason: str | None, data: st.DataObject
) -> None:
    """A price of 1234 must never be read from a 12345 that lost its tail (B 7.9)."""
    annotation, values = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    signature, value = of(annotation), data.draw(values)
    whole = adapter.format_assistant_message_content(
        signature, {"answer": value, "after": "the end"}
    )
    prose = data.draw(st.sampled_from(["", "Sure, here it is:\n"]))
    raw = (prose + whole + data.draw(st.sampled_from(["", "\n", "\nHope it helps."]))).encode()
    for end in range(len(raw)):
        text = raw[:end].decode(errors="ignore")
        try:
            read = adapter.parse(signature, text, finish_reason=finish_reason)
        except AdapterParseError:
            continue
        assert read == {"answer": value, "after": "the end"}


# --- types, one by one ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (int, " 42 ", 42),
        (int, "`42`", 42),
        (int, "+5", 5),
        (int, "3.0", 3),
        (float, "1e5", 1e5),
        (float, ".5", 0.5),
        (bool, "Yes", True),
        (bool, "FALSE", False),
        (Literal["yes", "no"], "Yes", "yes"),
        (Literal["a", "A"], "A", "A"),
        (Literal[1, 2], "2", 2),
        (Colour, "navy", Colour.NAVY),
        (Colour, "Dark Blue", Colour.NAVY),
        (int | None, "None", None),
        (dt.date, "2024-05-01", dt.date(2024, 5, 1)),
        (dt.date, '"2024-05-01"', dt.date(2024, 5, 1)),
        (list[int], "```json\n[1, 2,]\n```", [1, 2]),
        (str, '"Paris"', '"Paris"'),
        (str | None, "12", "12"),
        (list[str] | str, "plain", "plain"),
        (decimal.Decimal, "1.50", decimal.Decimal("1.50")),
    ],
)
def test_text_is_read_as_its_type(annotation: Any, text: str, expected: Any) -> None:
    """These are the spellings models use where the form leaves room."""
    value = parse_text(field(annotation), text)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "about 42"),
        (int, "3.7"),
        (int, "1,234"),
        (int, "0x10"),
        (int, ""),
        (int, "1" * 5_000),
        (float, "nan"),
        (float, "Infinity"),
        (float, "-inf"),
        (float, "1e999"),
        (float, "1" * 400),
        (list[float], '["NaN"]'),
        (Point, '{"x": "NaN", "label": ""}'),
        (list[Point], '[{"x": "-Infinity", "label": ""}]'),
        (bool, "maybe"),
        (Literal["yes", "no"], "yes and no"),
        (Literal["Ab", "aB"], "ab"),
        (Colour, "RED, NAVY"),
        (list[int], "1, 2"),
        (list[int], '["a"]'),
        (list[str] | str, '["a", "b"'),
        (dict[str, int], "{a: 1}"),
        (dt.date, "2024-02-30"),
        (dt.date, "soon"),
        (Address, '{"town": "x"}'),
    ],
)
def test_text_that_is_no_value_of_the_type_is_refused(annotation: Any, text: str) -> None:
    """A guess would be an answer that the model never gave."""
    with pytest.raises(ValueError, match=r"does not fit|not a finite|is not|not JSON"):
        parse_text(field(annotation), text)


@pytest.mark.parametrize("text", ["'Tis the season", "'abc\\", "'", "it's", "'a' or 'b", '"open'])
def test_text_that_begins_with_a_quote_is_kept_whole(text: str) -> None:
    """A lone apostrophe opens no string, so nothing may be cut off as its closing quote."""
    assert parse_text(field(str | int), text) == text
    assert parse_text(field(Any), text) == text


class Priced(pydantic.BaseModel):
    price: float


class Physical(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(allow_inf_nan=True)
    energy: float


@pytest.mark.parametrize("spelled", ["NaN", "Infinity", "-inf"])
@pytest.mark.parametrize("annotation", [Priced, list[Priced], dict[str, Priced], Priced | None])
def test_numbers_inside_models_are_finite_too(annotation: Any, spelled: str) -> None:
    """pydantic reads `"NaN"` as a number; a price that is not one must not get that far."""
    value: Any = {"price": spelled}
    wrapped = {list[Priced]: [value], dict[str, Priced]: {"k": value}}.get(annotation, value)
    with pytest.raises(ValueError, match="not a finite number"):
        validate(field(annotation), wrapped)


def test_model_that_allows_infinity_gets_it() -> None:
    """Whoever says so in the model's own config means it."""
    assert validate(field(Physical), {"energy": "Infinity"}).energy == math.inf


@pytest.mark.parametrize(
    ("annotation", "bounds", "good", "bad"),
    [
        (int, {"ge": 1, "le": 5}, "5", "6"),
        (float, {"gt": 0}, "0.1", "0"),
        (int, {"multiple_of": 5}, "15", "16"),
        (str, {"pattern": "^[A-Z]{2}$"}, "DE", "Germany"),
        (str, {"min_length": 2, "max_length": 3}, "abc", "abcd"),
        (list[int], {"min_length": 1}, "[1]", "[]"),
        (int | None, {"ge": 1}, "null", "0"),
        (int | str, {"ge": 1}, "2", "two"),
        (dt.date, {"ge": dt.date(2024, 1, 1)}, "2024-01-01", "2023-12-31"),
    ],
)
def test_bounds_hold(annotation: Any, bounds: dict[str, Any], good: str, bad: str) -> None:
    """A bound is a promise to the program that reads the value."""
    parse_text(field(annotation, **bounds), good)
    with pytest.raises(ValueError, match="does not fit"):
        parse_text(field(annotation, **bounds), bad)


def test_examples_are_no_bound() -> None:
    """They are shown; other values are fine."""
    assert parse_text(field(int, examples=[1, 2]), "3") == 3
    assert "examples" not in describe(field(int, examples=[1, 2]))


def test_reasons_are_short_whatever_the_answer() -> None:
    """A hostile answer must not fill the log through its own error."""
    key = "k" * 1_000_000
    for text in (f'{{"{key}": 1, "{key}": 2}}', f'{{"{key}": "no number"}}', f'"{key}"'):
        with pytest.raises(AdapterParseError) as raised:
            CHAT.parse(of(dict[str, int]), f"[[ ## answer ## ]]\n{text}\n[[ ## after ## ]]\n")
        assert len(str(raised.value)) < 10_000


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a text", "a text"),
        (5, "5"),
        (True, "true"),
        (None, "null"),
        (Colour.RED, "red"),
        (["ü", 1], '["ü", 1]'),
        (
            {Colour.RED: 1, (1, 2): 2, dt.date(2024, 1, 2): 3},
            '{"red": 1, "(1, 2)": 2, "2024-01-02": 3}',
        ),
        (Address(city="x", zipCode="1"), '{"city": "x", "zipCode": "1"}'),
        (Example(a=1, b=[Example(c=2)]), '{"a": 1, "b": [{"c": 2}]}'),
        (Point(x=0.5, label="p"), '{"x": 0.5, "label": "p"}'),
        ({3, 1, 2}, "[1, 2, 3]"),
        (b"caf\xc3\xa9 \xff", '"café \\\\xff"'),
        (decimal.Decimal("1.5"), '"1.5"'),
        (range(2), '"range(0, 2)"'),
    ],
)
def test_any_value_is_written(value: Any, expected: str) -> None:
    """Inputs may be of any class, and a prompt never fails for one."""
    assert format_value(value) == expected


def test_writing_does_not_use_up_an_iterator() -> None:
    """The program may want to go over it afterwards."""
    numbers = iter([1, 2])
    to_json({"numbers": numbers})
    assert list(numbers) == [1, 2]


@pytest.mark.parametrize(
    ("annotation", "part"),
    [
        (int, "a whole number"),
        (bool, "`true` or `false`"),
        (Literal["a", 2], "exactly one of `a`, `2`"),
        (Colour, "exactly one of `red`, `dark blue`"),
        (int | None, "a whole number, or `null`"),
        (str | None, "text, or `null`"),
        (dt.date, "YYYY-MM-DD"),
        (list[int], '"type": "integer"'),
        (Address, '"zipCode"'),
    ],
)
def test_description_says_what_is_accepted(annotation: Any, part: str) -> None:
    """The model can only keep to a form that it was told."""
    assert part in describe(field(annotation))


def test_unreadable_type_is_refused_with_its_field() -> None:
    """The message stands where the signature was written."""
    with pytest.raises(SignatureError, match=r"`answer: object \| range`"):
        check_readable(field(object | range))
