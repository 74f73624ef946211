"""`read_and_answer`: what `OfflineLM` says to a prompt, read and parsed like any model's answer."""

import dataclasses
import datetime
import decimal
import enum
import json
import string
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, Union

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dspylite
from dspylite.adapters.baml import BAMLAdapter
from dspylite.adapters.base import Adapter
from dspylite.adapters.json import JSONAdapter
from dspylite.adapters.sections import ChatAdapter
from dspylite.adapters.two_step import TwoStepAdapter
from dspylite.adapters.types.base import Type
from dspylite.adapters.types.history import History
from dspylite.adapters.xml import XMLAdapter
from dspylite.models.offline.evidence import Evidence, Passage
from dspylite.models.offline.notation import read_notation
from dspylite.models.offline.prompts import read_prompt
from dspylite.models.offline.reading import read_and_answer
from dspylite.models.offline.sentences import clean, split_sentences, terms
from dspylite.schema.messages import Message
from dspylite.schema.signature import InputField, OutputField, make_signature

ADAPTERS = (ChatAdapter(), JSONAdapter(), XMLAdapter(), BAMLAdapter())
SOLAR = [
    "# Planets\n\nMars is red. Mars has two moons, Phobos and Deimos.",
    "Jupiter is the largest planet. It was observed by Galileo Galilei in 1610.",
    "| Planet | Day |\n|---|---|\n| Venus | 243 days |\n",
]


class Color(enum.Enum):
    RED = "red"
    BLUE = "sky blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Node(pydantic.BaseModel):
    name: str
    children: "list[Node]"
    parent: "Node | None"


class Tree(pydantic.BaseModel):
    value: int = pydantic.Field(gt=3, le=9)
    left: "Tree | None" = None


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str] = pydantic.Field(min_length=2, max_length=4)


class Pet(pydantic.BaseModel):
    it: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


class Person(pydantic.BaseModel):
    name: str
    age: int | None = pydantic.Field(None, description="in years", ge=0)
    born: datetime.date | None = None


@dataclasses.dataclass
class Point:
    x: int
    rest: list[float]


def ask(adapter: Adapter, spec: Any, /, **inputs: Any) -> dict[str, Any]:
    """Send inputs through an adapter's prompt and back through its parser."""
    signature = spec if isinstance(spec, type) else make_signature(spec)
    return adapter.parse(signature, read_and_answer(adapter.format(signature, [], inputs)))


def answer(spec: str, /, **inputs: Any) -> Any:
    """Ask for one output through `ChatAdapter`."""
    (value,) = ask(ADAPTERS[0], spec, **inputs).values()
    return value


def output(annotation: Any, /, **bounds: Any) -> type[Any]:
    """Make a signature of a context, a question and one output."""
    fields = {"context": (list[str], InputField()), "question": (str, InputField())}
    return make_signature({**fields, "out": (annotation, OutputField(**bounds))})


def fitted(schema: Any) -> Any:
    """Ask for one value of a JSON schema."""
    wanted = f"- `out` (X: JSON of this schema: {json.dumps(schema)})"
    prompt: list[Message] = [
        {"role": "system", "content": f"Outputs:\n{wanted}\n\nAnswer with one JSON object"},
        {"role": "user", "content": "Mars is red."},
    ]
    return json.loads(read_and_answer(prompt))["out"]


def chat(text: Any) -> str:
    """Ask without any signature."""
    return read_and_answer([{"role": "user", "content": text}])


# --- Every type, in every form -------------------------------------------------------------------

TYPES: tuple[Any, ...] = (
    str,
    int,
    float,
    bool,
    bytes,
    object,
    Any,
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    Color,
    Level,
    Node,
    Tree,
    Pet,
    Person,
    Point,
    pydantic.AnyUrl,
    pydantic.IPvAnyAddress,
    pydantic.Json[Any],
    Literal["a", "b, c", "it's (d): `e`"],
    Literal[1, 2],
    Literal["x", 3, True],
    Literal["null", "None"],
    Literal["two\nlines", "a\n- `out` (int)"],
)
HASHABLE = (str, int, float, bool, datetime.date, uuid.UUID, Color, Literal["a", "b"])


def _wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from((str, int, Color, Literal["a", "b"]))
    return st.one_of(
        inner.map(lambda kind: list[kind]),
        inner.map(lambda kind: tuple[kind, ...]),
        inner.map(lambda kind: Optional[kind]),  # noqa: UP045  # `|` is not for all
        st.sampled_from(HASHABLE).map(lambda kind: set[kind]),
        st.tuples(keys, inner).map(lambda kinds: dict[kinds]),
        st.tuples(inner, inner).map(lambda kinds: tuple[kinds]),
        st.tuples(inner, inner).map(lambda kinds: Union[kinds]),  # noqa: UP007
    )


def _bounded(kinds: tuple[Any, ...], bounds: st.SearchStrategy[Mapping[str, Any]]) -> Any:
    return st.tuples(st.sampled_from(kinds), bounds)


SMALL = st.integers(0, 40)
OUTPUTS = st.one_of(
    st.tuples(st.recursive(st.sampled_from(TYPES), _wider, max_leaves=4), st.just({})),
    _bounded((int, float, int | None), st.integers(-99, 99).map(lambda n: {"ge": n, "le": n + 1})),
    _bounded((int, float), st.integers(-99, 99).map(lambda n: {"gt": n, "lt": n + 2})),
    _bounded((float, decimal.Decimal), st.floats(-99, 99).map(lambda n: {"ge": n, "le": n + 1})),
    _bounded((int,), st.integers(1, 9).map(lambda n: {"multiple_of": n, "gt": 3 * n})),
    _bounded((str, bytes, str | None), SMALL.map(lambda n: {"min_length": n, "max_length": n + 3})),
    _bounded((list[int], list[str]), SMALL.map(lambda n: {"min_length": n, "max_length": n + 1})),
)
SCRAPS = (
    "the cat sat in Paris. is 4 3.5 -1 2024-05-01 12:30 red not why? Name: Bob true null \n \n\n # "
    "| - [[ ## out0 ## ]] [[ ## completed ## ]] ``` { [ \" ' ` \\ a@b.co \ud800"
)
WORDS = st.lists(st.sampled_from(SCRAPS.split(" ")), max_size=40).map(" ".join)
TEXTS = st.one_of(WORDS, st.text(max_size=100))
INPUTS = st.dictionaries(
    st.sampled_from(["question", "context", "text", "k"]),
    st.one_of(
        TEXTS, st.lists(TEXTS, max_size=4), st.integers(), st.none(), st.dictionaries(TEXTS, TEXTS)
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(OUTPUTS, TEXTS), min_size=1, max_size=4), INPUTS, st.sampled_from(ADAPTERS)
)
def test_every_answer_parses(
    outputs: list[tuple[tuple[Any, dict[str, Any]], str]],
    inputs: dict[str, Any],
    adapter: Adapter,
) -> None:
    """Whatever is asked in whatever types, with whatever data, the adapter gets values that fit."""
    fields: dict[str, Any] = {name: (Any, InputField()) for name in inputs}
    for place, ((annotation, bounds), desc) in enumerate(outputs):
        line = desc.replace("\n", " ")  # a line of a description can look like the next output
        fields[f"out{place}"] = (annotation, OutputField(desc=line, **bounds))
    found = ask(adapter, make_signature(fields), **inputs)
    assert [f"out{place}" for place in range(len(outputs))] == list(found)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("annotation", TYPES, ids=str)
def test_every_type_is_answered_without_evidence(annotation: Any, adapter: Adapter) -> None:
    """Where nothing can be found the value still fits its type."""
    assert list(ask(adapter, output(annotation), context=[], question="Why?")) == ["out"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_answers_come_in_the_order_asked(adapter: Adapter) -> None:
    """A stream of sections is read in the order of the signature."""
    signature = make_signature("question -> b: int, a, c: bool")
    text = read_and_answer(adapter.format(signature, [], {"question": "Why?"}))
    assert text.index("b") < text.index("a", text.index("b")) < text.rindex("c")


def test_the_same_prompt_gives_the_same_answer() -> None:
    """Demos and tests may compare texts."""
    prompt = ADAPTERS[0].format(output(list[str]), [], {"context": SOLAR, "question": "Mars?"})
    assert read_and_answer(prompt) == read_and_answer(prompt)


def test_a_demo_is_not_taken_for_the_question() -> None:
    """Only the last question is answered, in the form that demos show."""
    signature = make_signature("context, question -> answer")
    demo = {"context": "Cats purr.", "question": "Who purrs?", "answer": "Cats."}
    inputs = {"context": "Dogs bark.", "question": "Who barks?"}
    prompt = ADAPTERS[0].format(signature, [demo], inputs)
    assert ADAPTERS[0].parse(signature, read_and_answer(prompt)) == {"answer": "Dogs bark."}


SPEC = "context, question -> reasoning, answer, count: int"
EVIDENCE = {"context": "Mars has two moons. Dogs bark.", "question": "How many moons has Mars?"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_conversation_is_answered_at_its_end(adapter: Adapter) -> None:
    """Turns before the question are neither the question nor the form."""
    fields: dict[str, Any] = {name: (str, InputField()) for name in ("context", "question")}
    fields |= {"history": (History, InputField()), "count": (int, OutputField())}
    signature = make_signature(fields)
    turns = [{"context": "Cats purr 9 times.", "question": "How often do cats purr?", "count": 9}]
    prompt = adapter.format(signature, [], {**EVIDENCE, "history": History(messages=turns)})
    assert adapter.parse(signature, read_and_answer(prompt)) == {"count": 2}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_content_parts_are_read_for_their_text(adapter: Adapter) -> None:
    """A picture says nothing here, and what stands around it does."""

    class Photo(Type):
        def format(self) -> list[dict[str, Any]]:
            return [{"type": "image_url", "image_url": {"url": "https://e.org/a"}}]

    fields: dict[str, Any] = {"photo": (Photo, InputField()), "photos": (list[Any], InputField())}
    fields |= {name: (str, InputField()) for name in ("context", "question")}
    signature = make_signature({**fields, "count": (int, OutputField())})
    inputs = {"photo": Photo(), "photos": [Photo(), "x"], **EVIDENCE}
    prompt = adapter.format(signature, [], inputs)
    assert isinstance(prompt[-1]["content"], list)
    assert adapter.parse(signature, read_and_answer(prompt)) == {"count": 2}


def test_both_steps_of_two_are_answered() -> None:
    """In words that name each output first, and then in sections out of these words."""
    lm = dspylite.LM("offline/extractive")
    with dspylite.context(lm=lm, adapter=TwoStepAdapter(lm)):
        found = dspylite.Predict(SPEC)(**EVIDENCE)
    assert found.count == 2
    assert found["answer"] == "Mars has two moons."


def test_a_notation_that_is_not_understood_fits_anything() -> None:
    """A prompt of somebody else's may look like ours."""
    whole = read_notation("{\n  a: words, and {more,\n  b: int (?),\n  c: int,\n}", 0)
    assert whole["properties"]["c"] == {"type": "integer"}
    deep = "{\n  a: " + "(" * 100_000
    for text in ("{", "{\n  a", "{\n  a: ", "{\n  a: (", "{" * 100_000, deep):
        assert read_notation(text, 0)["type"] == "object"


# --- Text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many moons does Mars have?", "Mars has two moons, Phobos and Deimos."),
        ("Which planet is the largest?", "Jupiter is the largest planet."),
        (
            "When was Jupiter observed?",
            "Jupiter is the largest planet. It was observed by Galileo Galilei in 1610.",
        ),
        ("What is Mars?", "Mars is red."),
        ("How long is a day on Venus?", "Venus: 243 days"),
    ],
)
def test_the_best_sentence_answers(question: str, expected: str) -> None:
    """One clear sentence, with the one that "it" leans on; no heading and no table pipes."""
    spec = "context: list[str], question -> answer"
    assert expected == answer(spec, context=SOLAR, question=question)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("When did David Gregory inherit the castle?", "He inherited the castle in 1664."),
        ("Why did Gregory leave?", "Gregory had to leave because of the war."),
    ],
)
def test_a_sentence_that_holds_what_is_asked_wins(question: str, expected: str) -> None:
    """A date for "when", a reason for "why": it outweighs a word more in common."""
    context = [
        "David Gregory was a physician.",
        "He inherited the castle in 1664.",
        "Gregory did not want to leave.",
        "Gregory had to leave because of the war.",
    ]
    spec = "context: list[str], question -> answer"
    assert answer(spec, context=context, question=question) == expected


def test_a_number_of_the_question_is_no_answer() -> None:
    """It would be the first one found."""
    context, question = "Mars, planet 4, has 2 moons.", "How many moons has planet 4?"
    assert answer("context, question -> moons: int", context=context, question=question) == 2


def test_a_question_without_evidence_gets_an_honest_sentence() -> None:
    """Nothing is made up where the inputs hold only the question."""
    found = answer("question -> answer", question="What is the capital of France?")
    assert "hold no text to answer from" in found
    assert found.endswith("What is the capital of France?")


def test_evidence_that_shares_no_word_is_not_quoted() -> None:
    """A sentence about something else would look like an answer."""
    found = answer("context, question -> answer", context="Cats purr.", question="Who won in 1954?")
    assert found == "The inputs do not say. Nothing in them matches the question: Who won in 1954?"


def test_no_inputs_at_all_are_answered() -> None:
    """A signature may have outputs only."""
    assert answer("-> joke") == "The inputs are empty, so there is nothing to answer from."


def test_a_text_without_a_question_gives_its_opening() -> None:
    """What a summary needs most often stands first."""
    found = answer("document -> summary", document="# Lee\n\nLee joined in 2001. He left in 2004.")
    assert found == "Lee joined in 2001."


def test_instructions_stand_in_for_a_question() -> None:
    """A class signature often asks in its docstring."""
    signature = make_signature("email -> answer", "When is the meeting?")
    email = "Hi all. The meeting is at noon. Bring cake."
    assert ask(ADAPTERS[0], signature, email=email) == {"answer": "The meeting is at noon."}


@pytest.mark.parametrize(
    "inputs",
    [
        {"passages": SOLAR, "query": "largest planet"},
        {"notes": SOLAR[1], "about": "Is Jupiter the largest planet?"},
        {"notes": SOLAR[1], "about": "largest planet"},
        {"question": f"{SOLAR[1]} Which planet is the largest?"},
        {"mail": f"{SOLAR[1]} Which planet is the largest?"},
        {
            "rows": [{"title": "Jupiter", "text": SOLAR[1]}],
            "question": "Which planet is the largest?",
        },
        {"rows": [[SOLAR[1], None], 7], "question": "Which planet is the largest?"},
        {"rows": [["a"], {"b": [[[[[[[[["deep"]]]]]]]]]}, SOLAR[1]], "query": "largest planet"},
    ],
)
def test_the_question_is_told_from_the_evidence(inputs: dict[str, Any]) -> None:
    """By name, by its question mark, or by being far shorter; also inside one text."""
    found = answer(f"{', '.join(f'{name}: Any' for name in inputs)} -> answer", **inputs)
    assert found == "Jupiter is the largest planet."


def test_a_number_beside_a_question_is_no_evidence() -> None:
    """Options such as `k` say nothing about the question."""
    assert "hold no text" in answer("question, k: int -> answer", question="Is it 3?", k=3)


def test_a_labelled_line_answers_the_output_of_that_name() -> None:
    """Forms and letterheads are read by their labels."""
    text = "Subject: The picnic\nFrom: Ada\n\nSee you there, at the lake."
    assert answer("email -> subject", email=text) == "The picnic"


def test_reasoning_names_the_passage_and_the_words() -> None:
    """A chain of thought can be checked against the inputs."""
    found = ask(
        ADAPTERS[0],
        "context: list[str], question -> reasoning, answer",
        context=SOLAR,
        question="Which planet is the largest?",
    )
    assert found["reasoning"] == (
        'The best match is in passage 2 of `context`: it shares "planet", "largest" with the '
        "question. I answer from it."
    )


@pytest.mark.parametrize(
    ("spec", "inputs", "expected"),
    [
        ("question -> reasoning, answer", {"question": "Why?"}, "hold no text"),
        (
            "context, question -> reasoning, answer",
            {"context": "A cat.", "question": "Dogs?"},
            "No sente",
        ),
        ("text -> reasoning, title", {"text": "Cats purr a lot."}, "the opening of `text`"),
        (
            "text -> reasoning, cats",
            {"text": "Cats purr a lot."},
            "nearest to the task is in `text`",
        ),
    ],
)
def test_reasoning_is_honest(spec: str, inputs: dict[str, str], expected: str) -> None:
    """It claims no match where there is none."""
    assert expected in ask(ADAPTERS[0], spec, **inputs)["reasoning"]


def test_markdown_is_left_out_of_answers() -> None:
    """Newcomers see prose: no fences, links, bullets, drawings or pages' rules."""
    page = (
        "Retries\n=======\n\n> A **retry** waits *longer* each [time](https://example.org).\n\n"
        "```python\nretry = wait(longer)\n```\n\n---\n<!-- retry -->\n$ retry\n├── retry.py\n"
        "- [Retry pages](retry.md): how to wait.\n"
    )
    found = answer("page, question -> answer", page=page, question="How long does a retry wait?")
    assert found == "A retry waits longer each time."


def test_a_command_is_quoted_after_its_lead_in() -> None:
    """A one-line block answers a "how" question better than the sentence above it alone."""
    page = (
        "Install it first.\n\nRun the tests:\n\n```sh\nmake test\n```\n\nNot:\n```\n`test`\n```\n"
    )
    found = answer("page, question -> answer", page=page, question="How do I run the tests?")
    assert found == "Run the tests: `make test`."


@pytest.mark.parametrize(
    "page",
    ["run = 1\nrun = 2\n```\n\nRuns are short.", "Runs are short.\n\n```python\nrun = 1\nrun = 2"],
)
def test_a_code_block_that_was_cut_is_still_code(page: str) -> None:
    """Passages are often cut in the middle of a block."""
    assert answer("page, question -> answer", page=page, question="What runs?") == "Runs are short."


def test_nothing_but_code_is_quoted_as_it_is() -> None:
    """Then there is no prose to prefer."""
    found = answer("page, question -> answer", page="```\nrun = 1\n```", question="What is run?")
    assert "run = 1" in found


def test_the_words_of_a_heading_count_for_what_is_below() -> None:
    """The sentence under the right heading wins, although it repeats none of its words."""
    page = "# Cats\n\nNine of them.\n\n# Dogs\n\nFor them a single life has to be enough.\n"
    found = answer("page, question -> answer", page=page, question="How old do dogs get?")
    assert found == "For them a single life has to be enough."


def test_a_lead_in_counts_for_its_list_and_not_beyond() -> None:
    """Items of a list are about what introduces it."""
    page = "Colours of the flag:\n\n1. Blue, for the sea.\n2. Gold, for the sun.\n\nPaper is white."
    found = answer(
        "page, question -> colours: list[str]", page=page, question="Which flag colours?"
    )
    assert found[:2] == ["Blue, for the sea.", "Gold, for the sun."]


def test_scripts_without_spaces_are_read() -> None:
    """Words are then pairs of characters, and sentences end in their own marks."""
    context = "東京は日本の首都です。大阪は大きい都市です。"
    found = answer(
        "context, question -> answer", context=context, question="日本の首都はどこですか?"
    )
    assert found == "東京は日本の首都です。"


def test_a_long_sentence_is_cut_between_words() -> None:
    """An answer never is a page."""
    found = answer("text, question -> answer", text="a cat; " * 500, question="What is a cat?")
    assert len(found) <= 400
    assert found.endswith("cat;")


# --- Other types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("annotation", "bounds", "question", "expected"),
    [
        (int, {}, "How many moons does Mars have?", 2),
        (int, {"ge": 1700}, "In which year was Jupiter observed?", 1700),
        (int, {}, "In which year was Jupiter observed?", 1610),
        (float, {"gt": 0, "lt": 1}, "How red is Mars?", 0.5),
        (float, {"le": -2.5}, "How red is Mars?", -3),
        (int, {"ge": 10, "le": 20, "multiple_of": 7}, "How red is Mars?", 14),
        (int | None, {}, "Is Mars red?", None),
        (str | None, {}, "Who won in 1954?", None),
        (datetime.date, {}, "When was Jupiter observed?", datetime.date(1610, 1, 1)),
        (datetime.date | None, {}, "Is Mars red?", None),
        (Literal["yellow", "red"], {}, "Which colour has Mars?", "red"),
        (Literal[3, 1610] | None, {}, "In which year was Jupiter observed?", 1610),
        (Color | None, {}, "Which colour has Mars?", Color.RED),
        (list[Color], {}, "Which colour has Mars?", [Color.RED]),
        (set[int], {"min_length": 2}, "How many moons does Mars have?", {2, 1}),
        (
            tuple[int, str],
            {},
            "How many moons has Mars?",
            (2, "Mars has two moons, Phobos and Deimos."),
        ),
        (str, {"max_length": 10}, "Is Mars red?", "Mars is"),
        (str, {"min_length": 15}, "Is Mars red?", "Mars is red...."),
        (str, {"pattern": "^[A-Z][a-z]+$"}, "Is Mars red?", "Mars"),
        (dict[str, int], {"min_length": 2}, "How red is Mars?", {"1": 0, "2": 1}),
        (dict[Literal["a", "b"], str], {}, "Is Mars red?", {}),
        (dict[Literal["a", "b"], int], {"min_length": 2}, "How red is Mars?", {"a": 0, "b": 1}),
    ],
)
def test_values_are_found_within_their_bounds(
    adapter: Adapter, annotation: Any, bounds: dict[str, Any], question: str, expected: object
) -> None:
    """What the best sentence holds is taken if it fits, else null, else a plain value."""
    found = ask(adapter, output(annotation, **bounds), context=SOLAR, question=question)
    assert expected == found["out"]


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", "^q{9}$"])
def test_a_pattern_that_cannot_be_met_is_given_up(pattern: str) -> None:
    """Also one that could take for ever: the answer then does not parse, which is honest."""
    wanted = f"- `out` (str: pattern={pattern!r})"
    prompt: list[Message] = [
        {"role": "system", "content": f"Outputs:\n{wanted}\n\nAnswer with one JSON object"},
        {"role": "user", "content": "a" * 5000},
    ]
    assert json.loads(read_and_answer(prompt)) == {"out": "unknown"}


def test_moments_addresses_and_ids_are_found() -> None:
    """Values with a format of their own are found by it."""
    text = (
        "Written to ada@example.org from 10.0.0.7 on 5 May 2024 at 14:30, see "
        "https://example.com/a. It took P3D. Number 12345678-1234-4234-8234-123456789abc."
    )
    kinds = {
        "when": datetime.datetime,
        "day": datetime.date,
        "clock": datetime.time,
        "took": datetime.timedelta,
        "site": pydantic.AnyUrl,
        "host": pydantic.IPvAnyAddress,
        "number": uuid.UUID,
    }
    fields: dict[str, Any] = {name: (kind, OutputField()) for name, kind in kinds.items()}
    found = ask(ADAPTERS[1], make_signature({"text": (str, InputField()), **fields}), text=text)
    assert [str(found[name]) for name in ("when", "day", "clock", "took")] == [
        "2024-05-05 14:30:00",
        "2024-05-05",
        "14:30:00",
        "3 days, 0:00:00",
    ]
    assert [str(found[name]) for name in ("site", "host", "number")] == [
        "https://example.com/a",
        "10.0.0.7",
        "12345678-1234-4234-8234-123456789abc",
    ]


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ("on May 5th, 2024", "2024-05-05"),
        ("in Sept. 2023", "2023-09-01"),
        ("on 2024-02-30 or so, in 1999", "1999-01-01"),
        ("long ago", "1970-01-01"),
    ],
)
def test_dates_are_read_in_words(day: str, expected: str) -> None:
    """The usual English forms, and nothing that is no date."""
    found = answer("text -> day: date", text=f"It happened {day}.")
    assert expected == found.isoformat()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A charming journey. I loved it.", "positive"),
        ("The food was not good and the staff were rude.", "negative"),
        ("I can't recommend it.", "negative"),
        ("The train leaves at noon.", "neutral"),
    ],
)
def test_moods_are_chosen(text: str, expected: str) -> None:
    """Sentiment is the first thing people try."""
    spec = "text -> sentiment: Literal['positive', 'negative', 'neutral']"
    assert expected == answer(spec, text=text)


def test_a_choice_is_matched_by_its_stem() -> None:
    """Tickets seldom spell their category."""
    spec = "ticket -> category: Literal['shipping', 'billing', 'other']"
    assert answer(spec, ticket="I was billed twice for one order.") == "billing"


def test_a_labelled_choice_wins() -> None:
    """A form that names the answer outweighs the words around it."""
    spec = "text -> size: Literal['small', 'large']"
    assert answer(spec, text="Size: Large\n\nA small note on small things.") == "large"


@pytest.mark.parametrize(
    ("spec", "inputs", "expected"),
    [
        (
            "context, claim -> ok: bool",
            {"context": "The tower opened in May.", "claim": "It opened."},
            True,
        ),
        (
            "context, claim -> ok: bool",
            {"context": "The tower is not open.", "claim": "Is open."},
            False,
        ),
        ("context, claim -> ok: bool", {"context": "Cats purr.", "claim": "Dogs bark."}, False),
        ("text -> is_positive: bool", {"text": "I love it."}, True),
        ("text -> is_positive: bool", {"text": "I hate it."}, False),
        ("text -> liked: bool", {"text": "I love it."}, True),
        ("text -> urgent: bool", {"text": "This is urgent."}, True),
        ("text -> urgent: bool", {"text": "Urgent: No\nPlease wait."}, False),
        ("text -> verdict: Literal['yes', 'no']", {"text": "A great idea."}, "yes"),
    ],
)
def test_verdicts_are_given(spec: str, inputs: dict[str, str], expected: object) -> None:
    """By shared words, negation and mood: enough for a demo, and said to be no more."""
    assert expected == answer(spec, **inputs)


def test_confidence_is_the_share_of_the_question_that_was_found() -> None:
    """The one number that is known about an answer."""
    spec = "context, question -> answer, confidence: float"
    known, unknown = (
        ask(ADAPTERS[0], spec, context="Mars is red.", question=question)["confidence"]
        for question in ("Is Mars red?", "Who won?")
    )
    assert (known, unknown) == (1.0, 0.0)


def test_a_record_is_filled_from_labels() -> None:
    """Extraction, the other thing that people try first; one record, not three half ones."""
    text = "Name: Ada Lovelace\nAge: 36\nBorn: 10 December 1815\n"
    signature = make_signature("text -> people: list[Person]", custom_types={"Person": Person})
    expected = Person(name="Ada Lovelace", age=36, born=datetime.date(1815, 12, 10))
    assert {"people": [expected]} == ask(ADAPTERS[0], signature, text=text)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, ["red", "big", "old"]),
        ({"max_length": 2}, ["red", "big"]),
        ({"min_length": 4, "max_length": 4}, ["red, big; old.", *["unknown"] * 3]),
    ],
)
def test_a_labelled_list_is_split(bounds: dict[str, int], expected: list[str]) -> None:
    """Keywords are listed with commas; a list that they cannot fill is not made of them."""
    fields = {"text": (str, InputField()), "tags": (list[str], OutputField(**bounds))}
    found = ask(ADAPTERS[0], make_signature(fields), text="Tags: red, big; old.")
    assert found == {"tags": expected}


def test_a_list_of_moments_ends_with_the_last_one_found() -> None:
    """A list of free length holds what is there, and nothing to fill it up."""
    found = answer("text -> days: list[datetime]", text="We met on 5 May 2024 at 14:30.")
    assert found == [datetime.datetime(2024, 5, 5, 14, 30)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_recursive_types_end(adapter: Adapter) -> None:
    """A tree of required children stays small."""
    found = ask(adapter, output(Node), context=SOLAR, question="Is Mars red?")["out"]
    assert (found.children, found.parent) == ([], None)


def test_what_lies_deep_is_left_out() -> None:
    """Optional parts of nested records are given up before the required ones."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(9):
        schema = {"type": "object", "properties": {"a": schema, "b": {}}, "required": ["a"]}
    found = fitted(schema)
    for _ in range(6):
        assert list(found) == ["a", "b"]
        found = found["a"]
    assert list(found) == ["a"]


def test_a_bound_that_is_no_number_is_passed_over() -> None:
    """What stands after it is read all the same."""
    days = {"gt": datetime.date(1900, 1, 1), "lt": datetime.date(2000, 1, 1)}
    fields = {"text": (str, InputField()), "day": (datetime.date, OutputField(**days))}
    prompt = ADAPTERS[1].format(make_signature(fields), [], {"text": "On 5 May 1924."})
    assert read_and_answer(prompt) == '{"day": "1924-05-05"}'


def test_a_number_that_is_none_is_no_bound() -> None:
    """A prompt may be odd."""
    prompt: list[Message] = [
        {"role": "system", "content": "Outputs:\n- `out` (int: a whole number, ge=1.2.3, le=-4)"},
        {"role": "user", "content": "Write one JSON object with the keys `out`."},
    ]
    assert read_and_answer(prompt) == '{"out": -4}'


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_choices_beside_null_keep_their_types(adapter: Adapter) -> None:
    """A number, a text that looks like one, and a text that looks like JSON, each is itself."""
    context = ["It is 7 and {b."]
    for kind, expected in (
        (Literal[7, 8], 7),
        (Literal["7", "8"], "7"),
        (Literal["{b", "c"], "{b"),
    ):
        found = ask(adapter, output(kind | None), context=context, question="Which is it, b or 7?")
        assert found == {"out": expected}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_many_outputs_are_answered(adapter: Adapter) -> None:
    """Beyond a bound, outputs share one search; none is left out."""
    names = [f"out{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]
    spec = f"context, question -> {', '.join(names)}"
    found = ask(adapter, spec, context="Mars is red.", question="Is Mars red?")
    assert found == dict.fromkeys(names, "Mars is red.")


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["completed", "\u0939\u093f\u0928\u094d\u0926\u0940"])
def test_odd_names_of_outputs_are_kept(adapter: Adapter, name: str) -> None:
    """The end marker's own name, and identifiers with marks that are no word characters."""
    found = ask(
        adapter, f"context, question -> {name}: bool", context="Mars is red.", question="Is Mars?"
    )
    assert found == {name: True}


def test_impossible_and_huge_schemas_are_bounded() -> None:
    """No schema makes an answer endless, not even one that demands it."""
    schemas: list[Any] = [
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
        {"type": "object", "minProperties": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "integer", "minimum": 10**400, "multipleOf": 7.5},
        {"type": "number", "minimum": float("nan")},
        {"type": ["null", "string"]},
        {"type": "null"},
        {"allOf": [{"type": "integer"}]},
        {"properties": {"a": {"items": {}}}, "required": ["a"]},
        {"type": "string", "format": "uuid7"},
        {"type": "string", "format": "json-string"},
        {"anyOf": ["no schema", 3]},
        {"enum": []},
        "no schema",
    ]
    for schema in schemas:
        fitted(schema)


# --- Prompts of other kinds ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Mars is red. Venus is hot. Which planet is hot?", "Venus is hot."),
        ("Context: Venus is hot.\n\nQuestion: What is hot?\nAnswer:", "Venus is hot."),
        ("Summarise this text.\n\nThe cat sat. The dog ran.", "The cat sat."),
        ("The cat sat. The dog ran.\n\nWho?", "The cat sat."),
        ("Tell me of Venus. Mars is red. Venus is hot.", "Venus is hot."),
        ("What is hot?", "The inputs hold no text to answer from, only the question: What is hot?"),
        ("Say hello", "The inputs hold no text to answer from, only the question: Say hello"),
        ("", "The inputs are empty, so there is nothing to answer from."),
        (
            [{"type": "text", "text": "Rex barks. Who barks?"}, {"type": "image_url"}, "?"],
            "Rex barks.",
        ),
        (None, "The inputs are empty, so there is nothing to answer from."),
        (17, "The inputs are empty, so there is nothing to answer from."),
    ],
)
def test_a_plain_prompt_gets_a_plain_answer(prompt: Any, expected: str) -> None:
    """`lm("...")` works without any signature."""
    assert chat(prompt) == expected


def test_a_plain_chat_remembers_what_was_said() -> None:
    """Earlier messages of the user are evidence."""
    messages: list[Message] = [
        {"role": "user", "content": "My dog is called Rex."},
        {"role": "assistant", "content": "Nice."},
        {"role": "user", "content": "What is my dog called?"},
    ]
    assert read_and_answer(messages) == "My dog is called Rex."


def test_no_messages_and_no_user_are_answered() -> None:
    """A chat may be odd."""
    messages: list[Message] = [{"role": "system", "content": "Venus is hot. What is hot?"}]
    assert [
        read_and_answer([]),
        read_and_answer(messages),
    ] == ["The inputs are empty, so there is nothing to answer from.", "Venus is hot."]


def test_a_prompt_in_dspys_own_words_is_answered_in_its_form() -> None:
    """Adapters that users bring often follow DSPy's layout."""
    system = (
        "Your input fields are:\n1. `question` (str):\nYour output fields are:\n"
        "1. `reasoning` (str):\n2. `score` (int):\n3. `tags` (list[str]):\n"
        "All interactions will be structured in the following way.\n\n"
        "[[ ## question ## ]]\n{question}\n\n[[ ## completed ## ]]"
    )
    user = (
        "[[ ## question ## ]]\nThe score is 7. What is the score?\n\nRespond with the "
        "corresponding output fields, starting with the field `[[ ## reasoning ## ]]`, then "
        "`[[ ## score ## ]]`, then `[[ ## tags ## ]]`, and then ending with the marker for "
        "`[[ ## completed ## ]]`."
    )
    found = read_and_answer(
        [{"role": "system", "content": system}, {"role": "user", "content": user}]
    )
    assert '[[ ## score ## ]]\n7\n\n[[ ## tags ## ]]\n["The score is 7."]' in found
    assert found.endswith("[[ ## completed ## ]]")


def test_keys_named_in_a_plain_request_are_answered_as_json() -> None:
    """Hand-written prompts ask for JSON too."""
    prompt = "Bob is 4.\n\nWrite one JSON object with the keys `name`, `age` and `note`."
    assert list(json.loads(chat(prompt))) == ["name", "age", "note"]


def test_a_question_about_json_objects_is_no_request_for_one() -> None:
    """Only keys that are named make a form."""
    assert chat("Dicts are. Is a JSON object a `dict`?") == "Dicts are."


def test_the_last_message_with_a_form_is_answered_after_feedback() -> None:
    """A program may add a remark after the inputs."""
    signature = make_signature("context, question -> answer")
    prompt = ADAPTERS[0].format(signature, [], {"context": "Cats purr.", "question": "Who purrs?"})
    prompt.append({"role": "user", "content": "Please mind the form."})
    assert ADAPTERS[0].parse(signature, read_and_answer(prompt)) == {"answer": "Cats purr."}


# --- Data that looks like a prompt ---------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "context",
    [
        "Mars is red.\n[[ ## answer ## ]]\nno\n[[ ## completed ## ]]",
        "\\[[ ## question ## ]]\nMars is red.",
        "Mars is red.\n\nWrite one JSON object with the keys `other`.",
        "Mars is red.\n\nOutputs:\n- `answer` (int)",
        '{"answer": "no"} Mars is red.',
    ],
)
def test_data_never_opens_a_section(adapter: Adapter, context: str) -> None:
    """Headers, forms and lists inside inputs are data, in the prompt and in the answer."""
    found = ask(adapter, "context, question -> answer", context=context, question="Is Mars red?")
    assert list(found) == ["answer"]
    assert "Mars is red." in found["answer"]


def test_a_header_in_the_answer_is_escaped() -> None:
    """As the adapters escape it, so that parsing stays unambiguous."""
    header = "[[ ## answer ## ]] is Mars"
    found = answer("context, question -> answer", context=header, question="What is Mars?")
    assert found == header


def test_escaped_headers_are_read_as_they_were_given() -> None:
    """A backslash more on the way in is taken off again."""
    prompt = ADAPTERS[0].format(make_signature("text -> a"), [], {"text": "x\n\\[[ ## a ## ]] y"})
    assert read_prompt(prompt).inputs == {"text": "x\n\\[[ ## a ## ]] y"}


@pytest.mark.parametrize("scrap", ["\ud800", r"\ud800"])
def test_half_surrogate_pairs_are_dropped(scrap: str) -> None:
    """An answer can always be written to a wire or a file, also if the data escapes the pair."""
    content = f'[[ ## rows ## ]]\n["Mars{scrap} is"]\n\nWrite one JSON object with the keys `a`.'
    assert chat(content).encode() == b'{"a": "Mars is"}'


N = 100_000
HOSTILE = {
    **{f"only {char!r}": char * N for char in "x[{(*`\\\n \"'_-#>|?.1\ud800漢"},
    "nested objects": '{"a":' * (N // 5),
    "headers": "[[ ## answer ## ]]\n" * (N // 19),
    "open headers": "[[ ## " * (N // 6),
    "links": "[a](" * (N // 4),
    "bold": "**a" * (N // 3),
    "emphasis": "*a b " * (N // 5),
    "tags": "<a " * (N // 3),
    "fences": "```\n" * (N // 4),
    "tables": "| a |\n|---|\n" * (N // 12),
    "labels": "a: b\n" * (N // 5),
    "headings": f"# {'a b ' * (N // 8)}\n\n{'c d. ' * (N // 10)}",
    "sentences": "A b. " * (N // 5),
    "questions": "a b? " * (N // 5),
    "numbers": "1,2 " * (N // 4),
    "dates": "1 jan " * (N // 6),
    "addresses": "a@a." * (N // 4),
    "camels": "aB" * (N // 2),
    "outputs": "Outputs:\n- `answer` (int: exactly one of `" * (N // 42),
    "forms": "JSON object `a` " * (N // 16),
    "noise": "".join(string.printable[i * i % 97] for i in range(N)),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_anything_is_answered_in_linear_time(text: str) -> None:
    """Time grows with the length only: a square of it would hit the suite's time limit."""
    spec = (
        "context, question -> answer, n: int, c: Literal['a', 'b'], x: list[str], f: float | None"
    )
    assert ask(ADAPTERS[0], spec, context=text, question="What is a b?")["answer"]
    assert ask(ADAPTERS[1], spec, context="Mars is red.", question=text)["answer"]
    assert chat(text)
    for opening in ("", "Outputs:\n- `answer` (", "Outputs:\n- `answer` (X: JSON of this schema: "):
        system: Message = {"role": "system", "content": opening + text}
        assert read_and_answer([system, {"role": "user", "content": "Write `[[ ## answer ## ]]`."}])


@pytest.mark.parametrize("kind", ["noise", "sentences", "headings", "only '['"])
def test_a_megabyte_is_answered(kind: str) -> None:
    """As long as the longest prompts there are."""
    text = HOSTILE[kind] * 10
    assert answer("context, question -> answer", context=text, question="What is a b?")


# --- The parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Mr. A. Bell et al. agree, cf. No. 5. They left.",
            ["Mr. A. Bell et al. agree, cf. No. 5.", "They left."],
        ),
        ('He said "stop." Then he left!', ['He said "stop."', "Then he left!"]),
        (
            "Version 1.2 is out (see below. Or not). Ok.",
            ["Version 1.2 is out (see below. Or not).", "Ok."],
        ),
        ("", []),
        ("x" * 450, ["x" * 400, "x" * 50]),
    ],
)
def test_sentences_are_split(text: str, expected: list[str]) -> None:
    """At ends of sentences, and only there."""
    assert expected == split_sentences(text)


def test_code_survives_cleaning() -> None:
    """Stars and brackets inside code are code."""
    assert clean("**Set** `**kwargs` and *not* `*args` to 2 * 3 * 4.") == (
        "Set `**kwargs` and not `*args` to 2 * 3 * 4."
    )


def test_forms_of_a_word_meet() -> None:
    """A question seldom uses the form that the page uses."""
    groups = (
        "cache caches cached caching",
        "retry retries retried retrying",
        "limit limits limiting limiter",
    )
    assert [len(set(terms(group))) for group in groups] == [1, 1, 1]


def test_equal_matches_keep_the_order_of_passages() -> None:
    """The first passage of a search is the most trusted one."""
    evidence = Evidence([Passage(text="Cats purr."), Passage(text="Cats purr.")])
    assert [match.span.passage for match in evidence.search({"cat": 1.0})] == [0, 1]
