"""`BAMLAdapter`: the notation of types that it shows. Answers are read as by `JSONAdapter`."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
from typing import Any, Literal

import pydantic
import pytest

import dspylite as dspy
from dspylite import BAMLAdapter, InputField, JSONAdapter, OutputField
from dspylite.schema.signature import make_signature
from dspylite.testing import FakeLM

ADAPTER = BAMLAdapter()


class Address(pydantic.BaseModel):
    """Where somebody lives."""

    street: str
    country: Literal["US", "CA"]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(description="Full name.\nNo title.")
    address: Address | None
    homes: list[Address] = []
    short: str = pydantic.Field(alias="nick-name")


class Node(pydantic.BaseModel):
    """A node."""

    value: int
    kids: list[Node] = []
    parent: Node | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: float


def shape(annotation: Any, **options: Any) -> str:
    signature = make_signature(
        {"q": (str, InputField()), "out": (annotation, OutputField(**options))}
    )
    form = ADAPTER.format_field_structure(signature)
    return form.partition("\n\n{\n  ")[2].replace("\n}", "", 1)


@pytest.mark.parametrize(
    ("annotation", "written"),
    [
        (str, "string"),
        (int, "int"),
        (float, "float"),
        (bool, "boolean"),
        (Any, "any"),
        (datetime.date, "string (date)"),
        (list[str], "string[]"),
        (set[int], "int[]"),
        (list[list[int]], "int[][]"),
        (list[int | None], "(int or null)[]"),
        (int | None, "int or null"),
        (int | str | None, "int or string or null"),
        (Literal["a", 1, True], '"a" or 1 or true'),
        (Color, '"red" or "blue"'),
        (dict[str, list[int]], "dict[string, int[]]"),
        (dict[str, Any], "dict[string, any]"),
        (tuple[int, str], "[int, string]"),
        (tuple[int, ...], "int[]"),
        (Point, "{\n    x: int,\n    y: float,\n  }"),
    ],
    ids=str,
)
def test_each_type_has_its_notation(annotation: Any, written: str) -> None:
    """Short, and as the JSON value is written."""
    assert shape(annotation) == f"out: {written},"


def test_bounds_stand_behind_the_type() -> None:
    """What is out of bounds is refused, so the model is told them."""
    assert shape(int, ge=1, le=5) == "out: int (>= 1, <= 5),"
    assert shape(int | None, gt=1) == "out: (int or null) (> 1),"
    assert shape(str, pattern='"a+"') == 'out: string (pattern "\\"a+\\""),'


def test_models_are_shown_with_their_words_and_keys() -> None:
    """Descriptions and docstrings are comments; keys are those that the answer is read by."""
    assert shape(Person, desc="whom it is about") == (
        "# whom it is about\n"
        "  out: {\n"
        "    # Full name.\n"
        "    # No title.\n"
        "    name: string,\n"
        "    # Where somebody lives.\n"
        "    address: {\n"
        "      street: string,\n"
        '      country: "US" or "CA",\n'
        "    } or null,\n"
        "    # Where somebody lives.\n"
        "    homes: [\n"
        "      {\n"
        "        street: string,\n"
        '        country: "US" or "CA",\n'
        "      }\n"
        "    ],\n"
        '    "nick-name": string,\n'
        "  },"
    )


def test_a_model_that_holds_itself_is_named() -> None:
    """Where DSPy's adapter fails, the model is written once below the object."""
    assert shape(list[Node]) == (
        "out: Node[],\n\n# A node.\nNode: {\n  value: int,\n  kids: Node[],\n"
        "  parent: Node or null,\n}"
    )


def test_two_models_of_one_name_are_told_apart() -> None:
    """Each key shows the shape that it is read by."""
    other = pydantic.create_model("Address", planet=(str, ...))
    signature = make_signature({"a": (Address, OutputField()), "b": (other, OutputField())})
    form = ADAPTER.format_field_structure(signature)
    assert "street: string" in form
    assert "planet: string" in form


def test_the_prompt_holds_everything_and_no_schema() -> None:
    """Inputs, form, task, and the reminder behind the inputs."""
    signature = make_signature(
        {"note": (str, InputField(desc="as typed")), "person": (Person, OutputField())},
        "Find them.",
    )
    system, user = ADAPTER.format(signature, [], {"note": "Ada"})
    task = str(system["content"])
    assert "`note` (str) — as typed" in task
    assert task.endswith("Task: Find them.")
    assert '"type"' not in task
    assert len(task) < len(str(JSONAdapter().format(signature, [], {"note": "Ada"})[0]["content"]))
    assert "`person`" in str(user["content"])


def test_answers_are_read_as_json() -> None:
    """The values come back as the types, also over a call."""
    written = {"person": {"name": "Ada", "address": None, "nick-name": "A"}}
    signature = make_signature({"note": (str, InputField()), "person": (Person, OutputField())})
    with dspy.context(lm=FakeLM([json.dumps(written)]), adapter=BAMLAdapter()):
        found = dspy.Predict(signature)(note="Ada")
    assert found.person == Person.model_validate(written["person"])


def test_options_are_those_of_dspy() -> None:
    """Three of them, by position or by name."""
    adapter = BAMLAdapter(None, False, True)
    assert adapter.use_native_function_calling is False
    assert BAMLAdapter().use_native_function_calling is True
    assert adapter.native.parallel_tool_calls is True
