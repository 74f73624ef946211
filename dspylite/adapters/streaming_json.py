"""Reads the outputs of a JSON object while it is being written, piece by piece.

Not here: the other forms of an answer (`streaming.py`), and what is JSON (`values.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from dspylite.adapters.streaming import ChunkWriter, FieldChunk, Step

_SPACE = re.compile(r"\s*")
_SPACE_AND_COMMAS = re.compile(r"[\s,]*")
_BRACES = re.compile(r'[{}"]')
_OF_STRINGS = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}
_OF_VALUES = re.compile(r"""[{}\[\],"'/]""")
_HEX = re.compile(r"[0-9A-Fa-f]{4}")
_LOW_HALF = re.compile(r"\\u[Dd][C-Fc-f][0-9A-Fa-f]{2}")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "\\": "\\", "/": "/"}
_ESCAPE_CHARS = 12  # of a character in two halves, the longest


class ObjectReader:
    r"""Reads outputs that are the keys of one JSON object, as `JSONAdapter` has them written.

    Text comes unescaped and whole, any other value as the JSON that the model wrote. Prose and a
    code fence around the object are passed over, and so is syntax noise that `parse` mends.

    Args:
        outputs: Names of the outputs.

    Example:
        >>> reader = ObjectReader(["answer", "n"])
        >>> for piece in ('{"answer": "a\\', 'u00e9", "n": [1,', " 2]}"):
        ...     print([tuple(chunk) for chunk in reader.feed(piece)])
        [('answer', 'a', False)]
        [('answer', 'é', True), ('n', '[1,', False)]
        [('n', ' 2]', True)]
    """

    def __init__(self, outputs: Iterable[str]) -> None:
        self._outputs = frozenset(outputs)
        self._found: set[str] = set()
        self._is_over = False
        self._out = ChunkWriter()
        self._carry = ""  # what cannot be understood without the next piece; a few characters
        self._depth = 0
        self._key: list[str] = []
        self._quote = '"'
        self._say: Callable[[str], object] = self._out.write  # takes what is in a string
        self._after: Step = self._outside  # what follows a string or a comment
        self._step: Step = self._outside

    def feed(self, text: str) -> list[FieldChunk]:
        """Take the next piece of the answer and return what is new of its outputs."""
        text, self._carry = self._carry + text, ""
        place = 0
        while place < len(text) and not self._is_over:
            place = self._step(text, place)
            if place < 0:  # wait for more, from there on
                self._carry = text[~place:]
                break
        return self._out.take()

    def finish(self) -> list[FieldChunk]:
        """Return what was held back: nothing, because an object that is cut is no answer."""
        return self._out.take()

    # -- around the object ------------------------------------------------------------------------

    def _outside(self, text: str, place: int) -> int:
        start = text.find("{", place)
        if start < 0:
            return len(text)
        self._step = self._opened
        return start + 1

    def _opened(self, text: str, place: int) -> int:
        """Tell an object from braces in prose, inside of which `parse` looks for none."""
        place = _past(_SPACE, text, place)
        if place < len(text):
            self._depth = 1
            self._step = self._before_key if text[place] in "\"'/}" else self._in_braces
        return place

    def _in_braces(self, text: str, place: int) -> int:
        mark = _BRACES.search(text, place)
        if mark is None:
            return len(text)
        if mark[0] == '"':
            self._begin_string('"', lambda _: None, self._in_braces)
        else:
            self._depth += 1 if mark[0] == "{" else -1
            if not self._depth:
                self._step = self._outside
        return mark.end()

    def _leave(self) -> None:
        if self._found:
            self._is_over = True
        self._step = self._outside

    def _give_up(self, text: str) -> int:
        """Read no further: `parse` refuses the answer."""
        self._out.drop()
        self._is_over = True
        return len(text)

    # -- the object -------------------------------------------------------------------------------

    def _before_key(self, text: str, place: int) -> int:
        place = _past(_SPACE_AND_COMMAS, text, place)
        if place == len(text):
            return place
        char = text[place]
        if char in _OF_STRINGS:
            self._key = []
            self._begin_string(char, self._key.append, self._after_key)
        elif char == "}":
            self._leave()
        elif char == "/":
            return self._comment(text, place)
        else:
            return self._give_up(text)
        return place + 1

    def _after_key(self, text: str, place: int) -> int:
        place = _past(_SPACE, text, place)
        if place == len(text):
            return place
        if text[place] == "/":
            return self._comment(text, place)
        if text[place] != ":":
            return self._give_up(text)
        self._step = self._before_value
        return place + 1

    def _before_value(self, text: str, place: int) -> int:
        place = _past(_SPACE, text, place)
        if place == len(text):
            return place
        char = text[place]
        if char == "/":
            return self._comment(text, place)
        name = "".join(self._key)
        if name in self._found:
            return self._give_up(text)
        is_text = char in _OF_STRINGS
        if name in self._outputs:
            self._found.add(name)
            self._out.open(name, is_exact=is_text)
        if is_text:
            self._begin_string(char, self._out.write, self._after_text)
            return place + 1
        self._depth = 0
        self._step = self._in_value
        return place

    def _after_text(self, text: str, place: int) -> int:
        place = _past(_SPACE, text, place)
        if place == len(text):
            return place
        char = text[place]
        if char == "/":
            return self._comment(text, place)
        if char not in ",}":
            return self._give_up(text)
        self._step = self._before_key
        return place

    def _in_value(self, text: str, place: int) -> int:
        """Pass on the JSON of a value that is no text, to its end."""
        mark = _OF_VALUES.search(text, place)
        stop = len(text) if mark is None else mark.start()
        self._out.write(text[place:stop])
        if mark is None:
            return stop
        char = mark[0]
        if char == "/":
            return self._comment(text, stop)
        if char in ",}" and not self._depth:
            self._out.close()
            self._step = self._before_key
            return stop
        if char == "]" and not self._depth:
            return self._give_up(text)
        self._out.write(char)
        if char in _OF_STRINGS:
            self._quote = char
            self._step = self._in_inner_string
        else:
            self._depth += {"{": 1, "[": 1, ",": 0}.get(char, -1)
        return mark.end()

    def _in_inner_string(self, text: str, place: int) -> int:
        mark = _OF_STRINGS[self._quote].search(text, place)
        stop = len(text) if mark is None else mark.start()
        self._out.write(text[place:stop])
        if mark is None:
            return stop
        if mark[0] == self._quote:
            self._step = self._in_value
            stop += 1
        elif stop + 1 == len(text):
            return ~stop
        else:
            stop += 2
        self._out.write(text[mark.start() : stop])
        return stop

    # -- strings and comments ---------------------------------------------------------------------

    def _begin_string(self, quote: str, say: Callable[[str], object], after: Step) -> None:
        self._quote, self._say, self._after = quote, say, after
        self._step = self._in_string

    def _in_string(self, text: str, place: int) -> int:
        mark = _OF_STRINGS[self._quote].search(text, place)
        stop = len(text) if mark is None else mark.start()
        if stop > place:
            self._say(text[place:stop])
        if mark is None:
            return stop
        if mark[0] == "\\":
            return self._escape(text, stop)
        if self._after == self._after_text:
            self._out.close()
        self._step = self._after
        return stop + 1

    def _escape(self, text: str, place: int) -> int:
        ahead = text[place : place + _ESCAPE_CHARS]
        if len(ahead) < 2 or (ahead[1] == "u" and len(ahead) < 6):
            return ~place
        if ahead[1] != "u":
            known = ahead[1] if ahead[1] == self._quote else _ESCAPES.get(ahead[1], ahead[:2])
            self._say(known)
            return place + 2
        if _HEX.match(ahead, 2) is None:  # no JSON
            self._say(ahead[:2])
            return place + 2
        code = int(ahead[2:6], 16)
        if 0xD800 <= code < 0xDC00:
            rest = ahead[6:]
            if len(rest) < 6 and "\\u".startswith(rest[:2]):
                return ~place
            if _LOW_HALF.match(rest):
                low = int(rest[2:6], 16)
                self._say(chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)))
                return place + _ESCAPE_CHARS
        self._say(chr(code))
        return place + 6

    def _comment(self, text: str, place: int) -> int:
        """Pass over a comment, which `parse` takes out; elsewhere a slash is no JSON."""
        if place + 1 == len(text):
            return ~place
        self._after, kind = self._step, text[place : place + 2]
        if kind == "//":
            self._step = self._in_line_comment
        elif kind == "/*":
            self._step = self._in_block_comment
        else:
            return self._give_up(text)
        return place + 2

    def _in_line_comment(self, text: str, place: int) -> int:
        stop = text.find("\n", place)
        if stop >= 0:
            self._step = self._after
        return len(text) if stop < 0 else stop

    def _in_block_comment(self, text: str, place: int) -> int:
        stop = text.find("*/", place)
        if stop >= 0:
            self._step = self._after
            return stop + 2
        return ~(len(text) - 1) if text.endswith("*") else len(text)


def _past(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return place if match is None else match.end()
