"""Reads the outputs of an answer while it is being written, piece by piece.

A reader holds back only what may still turn out to be no part of a value: the beginning of a
marker, an unfinished escape, white space at a value's end. Each character is looked at a bounded
number of times, however the answer is cut into pieces. JSON is in `streaming_json.py`. Not here:
whether an answer is complete and fits its types, which is for `parse` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

_MARGIN = re.compile(r"[ \t]*")
_BACKSLASHES = re.compile(r"\\*")
_OPENING = "[[ ## "


class FieldChunk(NamedTuple):
    """A piece of the text of one output.

    Attributes:
        field: Name of the output.
        text: What was written since the piece before, without markers and escapes.
        is_last: Whether the output has ended.
    """

    field: str
    text: str
    is_last: bool


class FieldReader(Protocol):
    """Finds the outputs in an answer that comes piece by piece.

    For an answer that `parse` accepts, the pieces of an output joined are the text that `parse`
    makes its value of. Of an answer that `parse` refuses, pieces come until what is wrong with it.
    """

    def feed(self, text: str) -> list[FieldChunk]:
        """Take the next piece of the answer and return what is new of its outputs."""
        ...

    def finish(self) -> list[FieldChunk]:
        """Return what was held back, because nothing more comes.

        An output that the answer itself has not ended gets no last piece.
        """
        ...


class ChunkWriter:
    """Puts what is found of the open output together, without the white space around it."""

    __slots__ = ("_chunks", "_has_begun", "_held", "_is_exact", "_name", "_parts")

    def __init__(self) -> None:
        self._chunks: list[FieldChunk] = []
        self._name: str | None = None
        self._parts: list[str] = []
        self._held: list[str] = []  # white space that may be the last
        self._has_begun = self._is_exact = False

    @property
    def name(self) -> str | None:
        """The output that is open."""
        return self._name

    def open(self, name: str, *, is_exact: bool = False) -> None:
        """Begin an output; an exact one keeps the white space around it."""
        self._name = name
        self._is_exact = is_exact
        self._has_begun = False

    def write(self, text: str) -> None:
        """Add to the open output, if one is."""
        if self._name is None:
            return
        if self._is_exact:
            self._parts.append(text)
            return
        if not self._has_begun:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._has_begun = True
            self._parts += self._held
            self._held.clear()
            self._parts.append(kept)
        if len(kept) < len(text):
            self._held.append(text[len(kept) :])

    def close(self) -> None:
        """End the open output, if one is."""
        self._flush(is_last=True)
        self.drop()

    def drop(self) -> None:
        """Let the open output have no end."""
        self._flush(is_last=False)
        self._held.clear()
        self._name = None

    def take(self) -> list[FieldChunk]:
        """Return what was written since the last time."""
        self._flush(is_last=False)
        chunks, self._chunks = self._chunks, []
        return chunks

    def _flush(self, *, is_last: bool) -> None:
        if self._name is not None and (self._parts or is_last):
            text = "".join(self._parts)
            if text or is_last:
                self._chunks.append(FieldChunk(self._name, text, is_last))
        self._parts.clear()


Step = Callable[[str, int], int]
"""Reads on from a place in a piece, and returns where the next step goes on."""


class SectionReader:
    r"""Reads outputs that stand below header lines, as `ChatAdapter` has them written.

    Args:
        outputs: Names of the outputs.
        end: Name in the end marker.

    Example:
        >>> reader = SectionReader(["answer"], "completed")
        >>> pieces = "[[ ## answer ## ]]\nPar", "is\n\n[[ ## comp", "leted ## ]]"
        >>> for piece in pieces:
        ...     print([tuple(chunk) for chunk in reader.feed(piece)])
        [('answer', 'Par', False)]
        [('answer', 'is', False)]
        [('answer', '', True)]
    """

    def __init__(self, outputs: Iterable[str], end: str) -> None:
        self._outputs = frozenset(outputs)
        self._end = end
        self._marks = {f"{_OPENING}{name} ## ]]": name for name in {*self._outputs, end}}
        self._found: set[str] = set()
        self._is_over = False
        self._out = ChunkWriter()
        self._begin_line(may_open=True)

    def _begin_line(self, *, may_open: bool) -> None:
        """Look whether a line begins with a header, or with one that is escaped.

        Args:
            may_open: Whether it is a line of its own; what follows a header in its line is none,
                but may be escaped.
        """
        self._may_open = may_open
        self._margin: list[str] = []
        self._backslashes = 0
        self._mark = ""
        self._step: Step = self._in_margin

    def feed(self, text: str) -> list[FieldChunk]:
        """Take the next piece of the answer and return what is new of its outputs."""
        place = 0
        while place < len(text) and not self._is_over:
            place = self._step(text, place)
        return self._out.take()

    def finish(self) -> list[FieldChunk]:
        """Return what was held back, because nothing more comes."""
        self._go_on()
        return self._out.take()

    def _go_on(self) -> None:
        """Take for text what was held back as the beginning of a line."""
        self._out.write("".join(self._margin) + "\\" * self._backslashes + self._mark)
        self._margin, self._backslashes, self._mark = [], 0, ""
        self._step = self._in_line

    def _in_line(self, text: str, place: int) -> int:
        stop = text.find("\n", place) + 1
        if not stop:
            self._out.write(text[place:])
            return len(text)
        self._out.write(text[place:stop])
        self._begin_line(may_open=True)
        return stop

    def _in_margin(self, text: str, place: int) -> int:
        stop = _end_of(_MARGIN, text, place)
        self._margin.append(text[place:stop])
        if stop < len(text):
            self._step = self._in_backslashes
        return stop

    def _in_backslashes(self, text: str, place: int) -> int:
        stop = _end_of(_BACKSLASHES, text, place)
        self._backslashes += stop - place
        if stop < len(text):
            self._step = self._in_mark
        return stop

    def _in_mark(self, text: str, place: int) -> int:
        mark = self._mark + text[place]
        if self._backslashes:
            if mark == _OPENING:  # escaped: one backslash is not the value's
                self._backslashes -= 1
                self._mark = mark
                self._go_on()
                return place + 1
            is_open = _OPENING.startswith(mark)
        elif self._may_open and mark in self._marks:
            self._open(self._marks[mark])
            return place + 1
        else:
            is_open = self._may_open and any(each.startswith(mark) for each in self._marks)
        if not is_open:
            self._go_on()
            return place
        self._mark = mark
        return place + 1

    def _open(self, name: str) -> None:
        self._out.close()
        is_end = name == self._end and (name not in self._outputs or name in self._found)
        if is_end or name in self._found:  # at a second time `parse` refuses the answer
            self._is_over = True
            return
        self._found.add(name)
        self._out.open(name)
        self._begin_line(may_open=False)


class ElementReader:
    r"""Reads outputs that stand between tags of their names.

    A tag of a field with backslashes behind its `<` is text, which has one backslash less.

    Args:
        outputs: Names of the outputs.
        fields: Names of all fields, whose tags may be escaped. None: those of the outputs.

    Example:
        >>> reader = ElementReader(["answer"])
        >>> for piece in ("<answer>\nParis</ans", "wer>"):
        ...     print([tuple(chunk) for chunk in reader.feed(piece)])
        [('answer', 'Paris', False)]
        [('answer', '', True)]
    """

    def __init__(self, outputs: Iterable[str], fields: Iterable[str] | None = None) -> None:
        self._outputs = frozenset(outputs)
        names = self._outputs.union(fields or ())
        self._tags = names | {f"/{name}" for name in names}
        self._found: set[str] = set()
        self._is_over = False
        self._out = ChunkWriter()
        self._step: Step = self._in_text
        self._forget_tag()

    def _forget_tag(self) -> None:
        self._is_tag = False
        self._backslashes = 0
        self._tag = ""
        self._tail: list[str] = []

    def feed(self, text: str) -> list[FieldChunk]:
        """Take the next piece of the answer and return what is new of its outputs."""
        place = 0
        while place < len(text) and not self._is_over:
            place = self._step(text, place)
        return self._out.take()

    def finish(self) -> list[FieldChunk]:
        """Return what was held back, because nothing more comes."""
        self._go_on()
        return self._out.take()

    def _go_on(self, end: str = "") -> None:
        """Take for text what was held back as the beginning of a tag."""
        if self._is_tag:
            slashes = "\\" * self._backslashes
            self._out.write(f"<{slashes}{self._tag}{''.join(self._tail)}{end}")
        self._forget_tag()
        self._step = self._in_text

    def _in_text(self, text: str, place: int) -> int:
        stop = text.find("<", place)
        if stop < 0:
            self._out.write(text[place:])
            return len(text)
        self._out.write(text[place:stop])
        self._is_tag = True
        self._step = self._in_backslashes
        return stop + 1

    def _in_backslashes(self, text: str, place: int) -> int:
        stop = _end_of(_BACKSLASHES, text, place)
        self._backslashes += stop - place
        if stop < len(text):
            self._step = self._in_name
        return stop

    def _in_name(self, text: str, place: int) -> int:
        tag = self._tag + text[place]
        if any(each.startswith(tag) for each in self._tags):
            self._tag = tag
            return place + 1
        if self._tag in self._tags:
            self._step = self._in_tail
        else:
            self._go_on()
        return place

    def _in_tail(self, text: str, place: int) -> int:
        stop = _end_of(_MARGIN, text, place)
        self._tail.append(text[place:stop])
        if stop == len(text):
            return stop
        if text[stop] != ">":
            self._go_on()
            return stop
        self._meet_tag()
        return stop + 1

    def _meet_tag(self) -> None:
        name, is_end, open_one = self._tag.removeprefix("/"), self._tag[0] == "/", self._out.name
        if self._backslashes:
            self._backslashes -= 1
            self._go_on(">")
            return
        if name not in self._outputs or open_one not in (None, name):
            self._go_on(">")
            return
        self._forget_tag()
        self._step = self._in_text
        if is_end and open_one is not None:
            self._out.close()
        elif not is_end and open_one is None and name not in self._found:
            self._found.add(name)
            self._out.open(name)
        else:  # `parse` refuses the answer
            self._is_over = True


def _end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Return where a run of characters ends that begins at a place, and may be empty."""
    match = pattern.match(text, place)
    return place if match is None else match.end()
