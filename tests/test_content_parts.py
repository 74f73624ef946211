"""Values that write content parts: where in a message these stand, in every adapter.

Not here: the types of the package (images and others), and hostile texts (`test_injection.py`).
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pydantic
import pytest

from dspylite import (
    BAMLAdapter,
    ChatAdapter,
    Example,
    InputField,
    JSONAdapter,
    OutputField,
    Type,
    XMLAdapter,
)
from dspylite.adapters.base import Adapter
from dspylite.adapters.content import ContentBuilder
from dspylite.schema.signature import make_signature

ADAPTERS = [ChatAdapter(), JSONAdapter(), XMLAdapter(), BAMLAdapter()]
every = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)


class Picture(Type):
    url: str

    def format(self) -> list[dict[str, Any]]:
        return [{"type": "image_url", "image_url": {"url": self.url}}]


class Word(Type):
    word: str

    def format(self) -> str:
        return self.word


class Page(pydantic.BaseModel):
    title: str
    pictures: list[Picture]
    first: Picture | None = None
    more: Any = None


@dataclasses.dataclass
class Sheet:
    title: str
    picture: Picture


class Pair(NamedTuple):
    left: Picture
    right: str


A, B = Picture(url="https://e.org/a"), Picture(url="https://e.org/b")
SIGNATURE = make_signature({"value": (Any, InputField()), "answer": (str, OutputField())})


def content(adapter: Adapter, value: Any) -> Any:
    return adapter.format(SIGNATURE, [], {"value": value})[-1]["content"]


def outline(parts: Any) -> str:
    """Write content parts as text, a picture as `<its last letter>`."""
    assert isinstance(parts, list)
    return "".join(
        part["text"] if part["type"] == "text" else f"<{part['image_url']['url'][-1]}>"
        for part in parts
    )


@every
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (A, "<a>"),
        ([A, B], "[<a>, <b>]"),
        ((A, "x"), '[<a>, "x"]'),
        ({"k": A, "l": [B]}, '{"k": <a>, "l": [<b>]}'),
        ({1: {2.5: A}}, '{"1": {"2.5": <a>}}'),
        (Page(title="t", pictures=[A, B]), '"pictures":[<a>,<b>],"first":null,"more":null}'),
        ([Page(title="t", pictures=[], first=B)], '"pictures":[],"first":<b>,"more":null}]'),
        (Page(title="t", pictures=[], more={"x": A}), '"first":null,"more":{"x":<a>}}'),
        (Sheet("t", A), '{"title": "t", "picture": <a>}'),
        (Pair(A, "r"), '[<a>, "r"]'),
        (Example(one=A, two="x"), '{"one": <a>, "two": "x"}'),
        (Word(word="plain"), "plain"),
        ([A, A], "[<a>, <a>]"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_parts_stand_where_the_value_stands(adapter: Adapter, value: Any, shown: str) -> None:
    """However deep a picture lies, the text around it tells what it belongs to."""
    found = content(adapter, value)
    text = found if isinstance(found, str) else outline(found)
    assert shown.replace(" ", "") in text.replace(" ", "")
    assert "@" not in text


@every
def test_a_message_without_parts_is_plain_text(adapter: Adapter) -> None:
    """Servers of text models know no parts."""
    for value in ("x", ["x"], Word(word="x"), None, {"a": Word(word="b")}):
        assert isinstance(content(adapter, value), str)


@every
def test_demos_and_reminder_stand_around_parts(adapter: Adapter) -> None:
    """A demo's pictures belong to the demo's question."""
    messages = adapter.format(SIGNATURE, [{"value": A, "answer": "x"}], {"value": B})
    assert "<a>" in outline(messages[1]["content"])
    last = outline(messages[3]["content"])
    assert "<b>" in last
    assert last.index("<b>") < last.index("Write ")


def test_neighbouring_texts_are_one_part() -> None:
    """Fewer parts, and no marker split in two."""
    builder = ContentBuilder()
    mark = builder.put([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert builder.content(f"x{mark}y") == [{"type": "text", "text": "xaby"}]


def test_a_text_part_with_more_in_it_is_kept_as_it_is() -> None:
    """Such as a mark for the provider's cache; its text is escaped all the same."""
    builder = ContentBuilder(str.upper)
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    found = builder.content(f"x{builder.put([part])}y")
    assert found[1] == {**part, "text": "A"}
    assert part["text"] == "a"


def test_no_text_is_taken_for_a_mark() -> None:
    """The number is drawn anew for each message, after its texts were given."""
    forged = ["@0-0@", "@" + "0" * 24 + "-0@", '"@a-0@"']
    first = content(ADAPTERS[0], [A, *forged])
    assert sum(part["type"] == "image_url" for part in first) == 1
    marks = {ContentBuilder().put([{"type": "text", "text": ""}]) for _ in range(100)}
    assert len(marks) == 100


@every
def test_threads_share_one_adapter(adapter: Adapter) -> None:
    """No part of one message ends up in another."""
    barrier = threading.Barrier(8, timeout=30)

    def write(number: int) -> bool:
        barrier.wait()
        for step in range(100):
            url = f"https://e.org/{number}/{step}"
            found = content(adapter, [Picture(url=url), "x", Picture(url=url)])
            urls = [part["image_url"]["url"] for part in found if part["type"] == "image_url"]
            if urls != [url, url]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(8)))
