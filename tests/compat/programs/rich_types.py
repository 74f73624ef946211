"""Outputs of every kind: enums, models, typed dicts, dataclasses, dates, options."""

import dataclasses
import datetime
import enum
import json
import os
from typing import Any, Literal, Optional, Union

import pydantic
from typing_extensions import TypedDict

import dspylite as dspy

dspy.configure(
    lm=dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
)


class Level(enum.Enum):
    LOW = "low"
    HIGH = "high"


class Score(pydantic.BaseModel):
    value: float


class Person(pydantic.BaseModel):
    name: str
    age: int
    tags: list[str] = []
    score: Optional[Score] = None  # noqa: UP045


class Row(TypedDict):
    a: int
    b: str


@dataclasses.dataclass
class Point:
    x: int
    label: str


class Everything(dspy.Signature):
    """Fill in a form."""

    text: str = dspy.InputField()
    level: Level = dspy.InputField()
    person: Person = dspy.InputField()
    by_value: Level = dspy.OutputField()
    by_name: Level = dspy.OutputField()
    author: Person = dspy.OutputField()
    people: list[Person] = dspy.OutputField()
    row: Row = dspy.OutputField()
    point: Point = dspy.OutputField()
    none: Optional[int] = dspy.OutputField()  # noqa: UP045
    some: Optional[int] = dspy.OutputField()  # noqa: UP045
    number: Union[int, str] = dspy.OutputField()  # noqa: UP007
    words: int | str = dspy.OutputField()
    at: datetime.datetime = dspy.OutputField()
    pair: tuple[int, str] = dspy.OutputField()
    unique: set[int] = dspy.OutputField()
    nested: dict[str, dict[str, list[int]]] = dspy.OutputField()
    choice: Literal["a", "b"] = dspy.OutputField()
    anything: Any = dspy.OutputField()
    big: float = dspy.OutputField()


result = dspy.Predict(Everything)(
    text="A form.", level=Level.LOW, person=Person(name="Ada", age=36)
)
print(json.dumps({name: repr(value) for name, value in result.items()}))
