"""The text form of signatures: what it accepts, and the sentence it has for everything else."""

import datetime
import decimal
import enum
import faulthandler
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Optional, Union

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspylite
from dspylite.errors import SignatureError
from dspylite.schema import grammar
from dspylite.schema.grammar import (
    REQUIRED,
    parse_signature,
    register_type,
    type_name,
    unknown_types,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(pydantic.BaseModel):
    city: str


def types_of(text: str, custom_types: dict[str, Any] | None = None) -> dict[str, Any]:
    inputs, outputs = parse_signature(text, custom_types)
    return {field.name: field.annotation for field in (*inputs, *outputs)}


def refusal(text: str, custom_types: dict[str, Any] | None = None) -> str:
    with pytest.raises(SignatureError) as raised:
        parse_signature(text, custom_types)
    return str(raised.value)


# --- what it accepts -----------------------------------------------------------------------------


def test_names_come_in_the_order_of_the_text() -> None:
    """The prompt lists fields in this order, and the model answers in it."""
    inputs, outputs = parse_signature("b, a, c -> z, y")
    assert [field.name for field in inputs] == ["b", "a", "c"]
    assert [field.name for field in outputs] == ["z", "y"]


def test_field_without_a_type_is_text() -> None:
    """Plain text is what most fields are."""
    (question,), (answer,) = parse_signature("question -> answer: str")
    assert (question.annotation, question.typed) == (str, False)
    assert (answer.annotation, answer.typed) == (str, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int", int),
        ("bool", bool),
        ("list[str]", list[str]),
        ("List[str]", list[str]),
        ("dict[str, list[float]]", dict[str, list[float]]),
        ("tuple[int, ...]", tuple[int, ...]),
        ("tuple[()]", tuple[()]),
        ("Optional[int]", Optional[int]),  # noqa: UP045  # what DSPy programs write
        ("typing.Optional[int]", Optional[int]),  # noqa: UP045
        ("int | None", Optional[int]),  # noqa: UP045
        ("Union[int, str]", Union[int, str]),  # noqa: UP007
        ("int | str", Union[int, str]),  # noqa: UP007
        ("Literal['a', 'b -> c', '#', ']']", Literal["a", "b -> c", "#", "]"]),
        ("Literal[-1, True, None]", Literal[-1, True, None]),
        ("datetime", datetime.datetime),
        ("datetime.date", datetime.date),
        ("Decimal", decimal.Decimal),
        ("UUID", uuid.UUID),
        ("Any", Any),
        ("'int'", int),
        ("None", None),
        ("Sequence[str]", Sequence[str]),
        ("typing.Mapping[str, int]", Mapping[str, int]),
        ("FrozenSet[str]", frozenset[str]),
        ("complex | NoneType", Optional[complex]),  # noqa: UP045
    ],
)
def test_types_are_read(text: str, expected: Any) -> None:
    """These are the spellings that DSPy programs use."""
    assert types_of(f"question -> answer: {text}")["answer"] == expected


def test_custom_types_are_found_by_their_name() -> None:
    """A pydantic model or enum of one's own serves as a type of a text signature."""
    custom = {"Place": Place, "geo.Colour": Colour}
    found = types_of("question -> place: list[Place], colour: geo.Colour | None", custom)
    assert found["place"] == list[Place]
    assert found["colour"] == Optional[Colour]  # noqa: UP045  # the equal type


def test_custom_types_may_hold_the_type_that_is_meant() -> None:
    """`Map.Place` with `custom_types={"Map": Map}`, as in DSPy; a value in it is no type."""

    class Map:
        Place = Place
        size = 3

    assert types_of("q -> a: list[Map.Place]", {"Map": Map})["a"] == list[Place]
    assert "`Map.size`" in refusal("q -> a: Map.size", {"Map": Map})


def test_custom_types_win_over_known_ones() -> None:
    """Whoever passes `date` means their own."""
    assert types_of("q -> when: date", {"date": Place})["when"] is Place


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", 3), ("-1.5", -1.5), ("'x -> y'", "x -> y"), ("[1, 2]", [1, 2]), ("None", None)],
)
def test_inputs_may_have_literal_defaults(text: str, expected: Any) -> None:
    """An input that seldom changes need not be passed at each call."""
    (field,), _ = parse_signature(f"k={text} -> answer")
    assert field.default == expected


def test_input_without_a_default_is_required() -> None:
    """None would be a default."""
    (field,), _ = parse_signature("k -> answer")
    assert field.default is REQUIRED


@pytest.mark.parametrize("text", ["a,b->c", " a , b -> c ", "a,\n  b\n->\n  c", "a, b, -> c,"])
def test_white_space_and_trailing_commas_do_not_matter(text: str) -> None:
    """Long signatures are written over several lines."""
    inputs, outputs = parse_signature(text)
    assert [f.name for f in (*inputs, *outputs)] == ["a", "b", "c"]


def test_signature_may_have_no_input() -> None:
    """A program may just produce something."""
    inputs, outputs = parse_signature("-> joke")
    assert (inputs, [field.name for field in outputs]) == ((), ["joke"])


# --- types of the package, by their bare name -----------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setattr(grammar, "_registered", grammar._registered)
    register_type("Picture", lambda: Colour)
    return Colour


@pytest.mark.parametrize("name", ["Picture", "dspy.Picture", "dspylite.Picture"])
def test_registered_types_need_no_custom_types(name: str, registered: type) -> None:
    """`dspy.Image` in a text means our image, under whatever name the package is imported."""
    assert types_of(f"q: list[{name}] -> a")["q"] == list[registered]  # type: ignore[valid-type]


def test_custom_types_win_over_registered_ones(registered: type) -> None:
    """A program's own `Picture` is what its texts mean."""
    assert types_of("q: Picture -> a", {"Picture": Place})["q"] is Place


def test_misspelt_registered_type_gets_its_hint(registered: type) -> None:
    """As any other type."""
    assert "Did you mean `Picture`?" in refusal("q: Pictrue -> a")


def test_name_that_no_text_could_hold_is_not_registered() -> None:
    """It would never be found."""
    with pytest.raises(SignatureError, match="a-b"):
        register_type("a-b", lambda: Colour)


def test_types_registered_from_32_threads_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules may be imported from several threads at once."""
    monkeypatch.setattr(grammar, "_registered", grammar._registered)
    barrier = threading.Barrier(32, timeout=30)

    def register(number: int) -> None:
        barrier.wait()
        for step in range(50):
            register_type(f"Kind{number}x{step}", lambda: Colour)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # between any two steps another thread may go on
    try:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(register, range(32)))
    finally:
        sys.setswitchinterval(interval)
    assert sum(name.startswith("Kind") for name in grammar._registered) == 32 * 50


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("q: str -> a: list[int]", ()),
        (
            "q: Place -> a: dict[str, 'g.Place'] | Colour, b: Place",
            ("Place", "g.Place", "Colour"),
        ),
        ("q: Literal['Place'] -> a: typing.Literal['Colour']", ()),
        ("q: Optional[Box[Place]] -> a: tuple[Colour, ...]", ("Box", "Place", "Colour")),
        ("q: (lambda: 1)() -> a", ()),
    ],
)
def test_unknown_types_of_a_text_are_listed_once(text: str, names: tuple[str, ...]) -> None:
    """These are looked for where the caller stands, and nothing else is."""
    assert unknown_types(text) == names


# --- what it refuses, and how --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("question", "0 arrows"),
        ("", "0 arrows"),
        ("a -> b -> c", "2 arrows"),
        ("question ->", "names no output"),
        ("question -> ,", "does not parse"),
        ("a b -> c", "does not parse"),
        ("a: -> c", "does not parse"),
        ("1a -> c", "does not parse"),
        ("a-b -> c", "does not parse"),
        ("a\0 -> c", "does not parse"),
        ("a: \ud800 -> c", "does not parse"),
        ("*a -> c", "more than a list of fields"),
        ("a, /, b -> c", "more than a list of fields"),
        ("a, *, b -> c", "more than a list of fields"),
        ("**a -> c", "more than a list of fields"),
        ("a -> c = 3", "only inputs can have one"),
        ("a: 5 -> c", "`5` in"),
        ("a: int[str] -> c", "is no type"),
        ("a: Literal[1.5] -> c", "Literal[...]"),
        ("a: Literal[[1]] -> c", "Literal[...]"),
        ("a # the question\n -> c", "no comments"),
        ("a: list[int -> c", "never closed"),
        ("a: Literal['x] -> c", "never closed"),
        ("a: list]int[ -> c", "do not match"),
        ("a) -> c", "do not match"),
    ],
)
def test_text_that_is_no_signature_is_refused_with_its_reason(text: str, part: str) -> None:
    """A user sees what is wrong where the signature is written, not at the first call."""
    assert part in refusal(text)


@pytest.mark.parametrize("text", ["a, b, a -> c", "a -> a", "a -> c, c"])
def test_two_fields_of_one_name_are_refused(text: str) -> None:
    """One of the two values would be lost."""
    assert "comes twice" in refusal(text)


@pytest.mark.parametrize("name", ["class", "None", "lambda", "import"])
def test_keyword_names_are_refused(name: str) -> None:
    """They could never be passed as keyword arguments."""
    assert name in refusal(f"{name} -> answer")


@pytest.mark.parametrize("name", ["_a", "__class__", "_"])
def test_underscore_names_are_refused(name: str) -> None:
    """They would shadow what a record keeps to itself."""
    message = refusal(f"question -> {name}")
    assert f"`{name}`" in message
    assert "does not start with an underscore" in message


@pytest.mark.parametrize(
    ("unknown", "nearest"), [("lst", "list"), ("string", "str"), ("boolean", "bool")]
)
def test_unknown_type_is_refused_with_the_nearest_one(unknown: str, nearest: str) -> None:
    """Most unknown types are misspelt ones."""
    message = refusal(f"question -> answer: {unknown}")
    assert f"The type `{unknown}`" in message
    assert f"Did you mean `{nearest}`?" in message


def test_unknown_type_of_ones_own_is_refused_with_the_way_to_pass_it() -> None:
    """The text cannot see the names of the caller's module; `custom_types` can."""
    assert "custom_types={'Place': Place}".replace("'", '"') in refusal("q -> a: Place")


CODE = [
    "__import__('os').system('touch owned')",
    "print('x')",
    "(lambda: 1)()",
    "[x for x in ()]",
    "(yield)",
    "(x := 5)",
    "f'{1}'",
    "open('owned', 'w')",
    "().__class__.__bases__[0].__subclasses__()",
    "1 if True else 2",
]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("form", ["a: {} -> c", "a: list[{}] -> c", "a={} -> c", "a -> c: {}"])
def test_code_is_never_run(form: str, code: str) -> None:
    """Signature texts may come from files and users; they name things and compute nothing."""
    refusal(form.format(code))


@pytest.mark.parametrize(
    "text",
    [
        "a): pass\nimport os\ndef f(b -> c",
        "a\n): pass\nraise SystemExit\ndef f(b -> c",
        "a, b=1): return 1\ndef g(c -> d",
        "a -> b): pass\nclass X(object",
        "a) -> (b",
    ],
)
def test_text_cannot_leave_its_parameter_list(text: str) -> None:
    """The parser wraps the text into a function head, which it must not close."""
    refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "list[" * 5_000 + "int" + "]" * 5_000 + " -> c",
        "a: " + "(" * 5_000 + " -> c",
        "a: " + "[" * 90 + "]" * 90 + " -> c",
        "a: " + " | ".join(["int"] * 2_500) + " -> c",
        "a: " + "~" * 1_000 + "int -> c",
        "a: " + "~" * 15_000 + "int -> c",
        "a: " + "x." * 1_500 + "int -> c",
        "a: " + "x." * 9_000 + "int -> c",
        "a=" + "1+" * 1_500 + "1 -> c",
        "a=" + "-" * 1_000 + "1 -> c",
        "a: Literal[" + "-" * 1_000 + "1] -> c",
    ],
    ids=lambda text: f"{text[:12]}.. {len(text)}",
)
def test_deep_nesting_is_refused(text: str) -> None:
    """A hostile text ends in our error, never in a `RecursionError` or a crash of the parser."""
    refusal(text)


def test_as_many_alternatives_as_a_person_writes_are_read() -> None:
    """The bound against hostile texts is far from what is written in earnest."""
    words = ", ".join(f"'{number}'" for number in range(500))
    assert len(types_of(f"q -> a: Literal[{words}] | None")["a"].__args__) == 2
    assert types_of("q -> a: " + " | ".join(["int", "str", "None"] * 10))["a"] is not None


@pytest.mark.parametrize(
    "text", ["a" * 1_000_000, "a, " * 333_333 + "-> b", "q -> a: " + "[" * 999_992, "->" * 500_000]
)
def test_megabyte_of_text_is_refused_unread(text: str) -> None:
    """Refusing costs nothing, and does not quote a megabyte."""
    message = refusal(text)
    assert "too long" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    "text",
    [
        "a" * 19_000,
        "a, " * 6_000 + "a -> b",
        "q -> a: " + "x" * 19_000,
        "q -> a: " + "x(" * 30 + "'" + "y" * 18_000 + "'" + ")" * 30,
        "class" + " " * 18_000 + " -> a",
    ],
)
def test_refusals_are_short(text: str) -> None:
    """An error quotes enough to recognise the text, and never all of a long one."""
    assert len(refusal(text)) < 3_000


def test_refusal_can_be_printed() -> None:
    """A message with half a surrogate pair would break the log that it is written to."""
    refusal("a: \ud800 -> c").encode("utf-8")
    refusal("a -> b: 'c\ud800'").encode("utf-8")


@pytest.mark.parametrize("value", [None, 5, ["question -> answer"], b"question -> answer", object])
def test_what_is_no_text_is_refused(value: Any) -> None:
    """A list of fields, say, is a plausible mistake and gets the three accepted forms."""
    with pytest.raises(SignatureError, match=r"a text like 'question -> answer', a dict of fields"):
        dspylite.Predict(value)


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    """There is no third way out: no foreign exception, whatever the text."""
    try:
        _, outputs = parse_signature(text)
    except SignatureError:
        return
    assert outputs


_PIECES = [
    "a",
    "b",
    "->",
    ",",
    ":",
    "=",
    "int",
    "list",
    "[",
    "]",
    "(",
    ")",
    "|",
    "'",
    '"',
    "1",
    ".",
]


@given(
    pieces=st.lists(
        st.sampled_from([*_PIECES, "\\", "\n", "#", "*", "Literal", "..."]), max_size=20
    )
)
@settings(max_examples=500, deadline=None)
def test_any_sequence_of_pieces_is_read_or_refused(pieces: list[str]) -> None:
    """Texts that are nearly signatures reach every branch of the parser."""
    try:
        _, outputs = parse_signature(" ".join(pieces))
    except SignatureError:
        return
    assert outputs


# --- in threads ----------------------------------------------------------------------------------


def test_32_threads_parse_200_signatures_at_once() -> None:
    """`ast.parse` fails at random in threads on CPython 3.11; nobody may see that (B 7.8)."""
    threads, texts = 32, [f"a{n}: list[str], b -> c{n}: Literal['x', {n}]" for n in range(200)]
    grammar._parse_text.cache_clear()
    barrier = threading.Barrier(threads, timeout=30)

    def parse_all(start: int) -> list[list[str]]:
        barrier.wait()
        turned = texts[start * 6 :] + texts[: start * 6]  # each thread begins at another text
        return sorted([field.name for side in parse_signature(t) for field in side] for t in turned)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(parse_all, range(threads)))
    expected = sorted([f"a{n}", "b", f"c{n}"] for n in range(200))
    assert found == [expected] * threads


def test_32_threads_build_predictors_of_equal_text_at_once() -> None:
    """A module built anew for each request does exactly this."""
    barrier = threading.Barrier(32, timeout=30)

    def build(number: int) -> Any:
        barrier.wait()
        return dspylite.Predict(f"thread_question_{number % 4} -> answer: float").signature

    with ThreadPoolExecutor(32) as pool:
        built = list(pool.map(build, range(32)))
    assert all(found.equals(built[number % 4]) for number, found in enumerate(built))


# --- types as text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (str, "str"),
        (list[dict[str, int]], "list[dict[str, int]]"),
        (int | None, "int | None"),
        (Literal["a", 1, None], "Literal['a', 1, None]"),
        (Literal[Colour.RED], "Literal[Colour.RED]"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Any, "Any"),
        (Place, "Place"),
        (None, "None"),
    ],
)
def test_type_name_is_how_the_text_would_spell_it(annotation: Any, expected: str) -> None:
    """The prompt and the errors name types in the words of the grammar."""
    assert type_name(annotation) == expected


@pytest.mark.parametrize(
    "annotation",
    [int, list[str], dict[str, float] | None, Literal["x", 2], tuple[int, ...], Any, set[bool]],
)
def test_type_name_reads_back_as_the_same_type(annotation: Any) -> None:
    """What an error shows can be pasted into a signature."""
    assert types_of(f"q -> a: {type_name(annotation)}")["a"] == annotation


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_can_read_signatures_though_a_thread_was_reading_at_the_fork() -> None:
    """(B 7.3)"""
    held = threading.Event()

    def hold() -> None:
        with grammar.PARSE_LOCK:
            held.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(20, exit=True)  # a child that hangs ends with 1
        parse_signature("forked -> child")
        os._exit(0)
    holder.join(20)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
