"""`XMLAdapter`: the elements it asks for and reads, and values written as nested elements.

Not here: cut and hostile answers (`test_adapter_fuzz.py`), quoted tags (`test_injection.py`).
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspylite as dspy
from dspylite import AdapterParseError, InputField, OutputField, XMLAdapter
from dspylite.adapters.base import NOT_GIVEN
from dspylite.schema.signature import make_signature
from dspylite.testing import FakeLM

ADAPTER = XMLAdapter()
QA = make_signature("question -> answer")
SCORED = make_signature("question -> answer, score: float")


class Person(pydantic.BaseModel):
    name: str
    tags: list[str] = []
    age: int | None = None
    friend: Person | None = None


def signature_of(annotation: Any) -> Any:
    return make_signature({"text": (str, InputField()), "out": (annotation, OutputField())})


def test_prompt_shows_the_elements_and_names_the_fields() -> None:
    """Inputs stand between tags of their own; a reminder follows them."""
    system, user = ADAPTER.format(SCORED, [], {"question": "why?"})
    assert "<answer>\n(answer)\n</answer>\n\n<score>\n(score)\n</score>" in str(system["content"])
    assert "`score` (float: a number)" in str(system["content"])
    assert str(user["content"]) == (
        "<question>\nwhy?\n</question>\n\n"
        "Write `<answer>`, then `<score>`, each closed by its end tag."
    )


def test_demos_are_answered_in_elements() -> None:
    """What a demo lacks is marked, as in every adapter."""
    _, _, answer, _ = ADAPTER.format(SCORED, [{"question": "q", "score": 1.5}], {"question": "q"})
    assert str(answer["content"]) == (f"<answer>\n{NOT_GIVEN}\n</answer>\n\n<score>\n1.5\n</score>")


@pytest.mark.parametrize(
    "text",
    [
        "<answer>x</answer><score>1</score>",
        "<score>1.0</score>\n<answer>\nx\n</answer>",
        "Sure!\n<answer >x</answer\t>\n<score>1</score>\nDone.",
        "```xml\n<answer>x</answer>\n<score>1</score>\n```",
        "<result><answer>x</answer><score>1</score></result>",
        "<answer>x</answer>\r\n<score>`1`</score>",
    ],
)
def test_elements_are_read_from_what_surrounds_them(text: str) -> None:
    """Prose, fences and a root element are passed over."""
    found = ADAPTER.parse(SCORED, text)
    assert found == {"answer": "x", "score": 1.0}
    assert list(found) == ["answer", "score"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "lacks `answer`, `score`"),
        ("<answer>x</answer>", "lacks `score`"),
        ("<answer>x</answer><answer>y</answer><score>1</score>", "`answer` comes twice"),
        ("<answer>x<answer>y</answer><score>1</score>", "a start tag inside of itself"),
        ("<answer>x</answer></answer><score>1</score>", "an end tag too many"),
        ("<answer>x</answer><score>1", "`score` is not closed"),
        ("<answer>x</answer><score>1</scor", "`score` is not closed"),
        ("<answer>x</answer><score>high</score>", "`score`: 'high' is not a number"),
        ("<answer>x</answer><score>nan</score>", "`score`: 'nan' is not a number"),
    ],
)
def test_answer_that_is_not_one_value_each_is_refused_with_its_reason(text: str, part: str) -> None:
    """Picking one of two, or half of one, would be a guess."""
    with pytest.raises(AdapterParseError) as raised:
        ADAPTER.parse(SCORED, text)
    assert part in raised.value.message
    assert raised.value.adapter_name == "XMLAdapter"


@pytest.mark.parametrize(
    "text", ["a < b > c", "<b>bold</b>", "<question>q</question>", "&lt;", "</b>"]
)
def test_other_tags_are_part_of_a_text(text: str) -> None:
    """HTML is a usual answer."""
    assert ADAPTER.parse(QA, f"<answer>{text}</answer>") == {"answer": text}


PIECES = [
    "<answer>",
    "</answer>",
    "<question>",
    "</question >",
    "<\\answer>",
    "\\",
    "<",
    "/",
    ">",
    " ",
]
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)


@given(text=hostile)
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back_as_it_was(text: str) -> None:
    """Escaping is undone exactly, blanks inside of tags included."""
    written = ADAPTER.format_assistant_message_content(QA, {"answer": text})
    assert ADAPTER.parse(QA, written) == {"answer": text.strip()}


# --- nested elements -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (
            Person,
            "<name>Ada</name><tags>a</tags><tags>b</tags>",
            Person(name="Ada", tags=["a", "b"]),
        ),
        (Person, "<name>A &amp; B</name><age>3</age>", Person(name="A & B", age=3)),
        (Person, "<name>A</name><tags><item>a</item></tags>", Person(name="A", tags=["a"])),
        (Person, "<name>A</name><tags/>", Person(name="A")),
        (
            Person,
            "<name>A</name><friend><name>B</name></friend>",
            Person(name="A", friend=Person(name="B")),
        ),
        (list[int], "<item>1</item><item>2</item>", [1, 2]),
        (list[Person], "<item><name>A</name></item>", [Person(name="A")]),
        (dict[str, int], "<a>1</a><b>2</b>", {"a": 1, "b": 2}),
        (Person, '{"name": "Ada"}', Person(name="Ada")),
    ],
)
def test_values_may_be_nested_elements(annotation: Any, text: str, expected: Any) -> None:
    """Models go on in XML where JSON was asked for; the schema of the type tells lists apart."""
    assert ADAPTER.parse(signature_of(annotation), f"<out>{text}</out>") == {"out": expected}


@pytest.mark.parametrize(
    "text",
    [
        "<name>A</name><name>B</name>",
        "<name>A</nam>",
        "<name>A",
        "<name>A</name>and more",
        "<name a='1'>A</name>",
        "<!-- c --><name>A</name>",
        "<nam>A</nam>",
        "<name>A</name>" + "<friend>" * 70 + "</friend>" * 70,
    ],
)
def test_broken_elements_are_refused(text: str) -> None:
    """Nothing is mended, nothing expanded."""
    with pytest.raises(AdapterParseError):
        ADAPTER.parse(signature_of(Person), f"<out>{text}</out>")


# --- over a call ---------------------------------------------------------------------------------


async def test_an_unreadable_answer_is_asked_for_once_more_as_json() -> None:
    """As with `ChatAdapter`, unless switched off."""
    for awaited in (True, False):
        lm = FakeLM(["no elements", '{"answer": "x"}'])
        with dspy.context(lm=lm, adapter=XMLAdapter()):
            predict = dspy.Predict(QA)
            found = await predict.acall(question="q") if awaited else predict(question="q")
        assert found.answer == "x"
        assert len(lm.requests) == 2
    lm = FakeLM(["no elements"])
    plain = XMLAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=plain), pytest.raises(AdapterParseError):
        await dspy.Predict(QA).acall(question="q")


def test_choices_are_read() -> None:
    """As every adapter reads them."""
    signature = signature_of(Literal["a", "b"])
    assert ADAPTER.parse(signature, "<out> 'A' </out>") == {"out": "a"}


def test_a_cut_answer_is_taken_where_that_is_asked_for() -> None:
    """A summary that ends early is better than none."""
    adapter = XMLAdapter(accept_truncated=True)
    assert adapter.parse(QA, "<answer>abc", finish_reason="length") == {"answer": "abc"}
    with pytest.raises(AdapterParseError):
        adapter.parse(QA, "<answer>abc", finish_reason="stop")
