"""Shows the last calls to people: as text, in colour on a terminal, as HTML in a notebook.

Not here: what is kept of a call (`runtime/history.py`).
"""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TextIO

from dspylite.errors import SettingsError, clip
from dspylite.runtime.history import GLOBAL_HISTORY, History
from dspylite.runtime.loops import is_in_notebook

MAX_PLACEHOLDER_CHARS = 200
"""Longest text shown of a part that is no text, such as an image's URL."""

Style = Literal["plain", "quiet", "title", "answer"]

_ANSI: Mapping[Style, str] = {"quiet": "\x1b[2m", "title": "\x1b[31m", "answer": "\x1b[32m"}
_CSS: Mapping[Style, str] = {"quiet": "opacity:0.6", "title": "color:#b33", "answer": "color:#383"}

# Control characters move a terminal's cursor, set its title, or worse; those of Unicode's
# bidirectional text show it in another order than it is in.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class Piece(NamedTuple):
    """A text and how it is to look."""

    style: Style
    text: str


def inspect_history(n: int = 1, file: TextIO | None = None) -> None:
    """Print the last `n` calls of this process, whatever LM and program made them.

    `lm.inspect_history()` and `program.inspect_history()` show only their own. In a notebook the
    calls are shown as HTML; in colour on a terminal, unless `NO_COLOR` is set.

    Args:
        n: How many calls; all that are kept if it is more than these, and 0 prints nothing.
        file: Where to print. None: standard output, or the cell of the notebook.

    Raises:
        SettingsError: `n` is no whole number of at least 0.

    Example:
        >>> inspect_history(n=0)
    """
    pretty_print_history(GLOBAL_HISTORY, n, file)


def pretty_print_history(
    history: History | Sequence[Mapping[str, Any]], n: int = 1, file: TextIO | None = None
) -> None:
    """Print the last `n` calls of a history, oldest first.

    Pictures, sounds and files are told in a few words; control characters are shown as escapes.

    Args:
        history: Entries, or dicts with some of their keys.
        n: How many; all if it is more than there are, and 0 prints nothing.
        file: Where to print. None: standard output, or the cell of the notebook.

    Raises:
        SettingsError: `n` is no whole number of at least 0.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise SettingsError(f"`n` must be a whole number of at least 0, not {n!r}.")
    if n == 0:
        return
    entries = list(history)[-n:]
    pieces = [piece for entry in entries for piece in _pieces(entry)]
    if not entries:
        pieces = [Piece("quiet", "No calls are kept here.\n")]
    if file is None and is_in_notebook():
        _show_html(_as_html(pieces))
        return
    target: TextIO | None = sys.stdout if file is None else file
    if target is None:  # a program without a console has no standard output
        return
    text = _as_text(pieces, in_colour=_takes_colour(target))
    encoding = str(getattr(target, "encoding", None) or "utf-8")
    # In one piece, so that lines of other threads do not come in between.
    target.write(text.encode(encoding, "backslashreplace").decode(encoding))


# --- What is shown -------------------------------------------------------------------------------


def _pieces(entry: Mapping[str, Any]) -> Iterator[Piece]:
    yield Piece("quiet", f"\n[{entry.get('timestamp') or 'time unknown'}] {_summary(entry)}\n\n")
    messages = entry.get("messages") or [{"role": "user", "content": entry.get("prompt") or ""}]
    for message in messages:
        if isinstance(message, Mapping):
            yield from _message(message)
        else:
            yield Piece("plain", f"{message}\n\n")
    outputs = list(entry.get("outputs") or ())
    for number, output in enumerate(outputs, 1):
        title = "Response" if len(outputs) == 1 else f"Response {number} of {len(outputs)}"
        yield Piece("title", f"{title}:\n\n")
        yield from _output(output)
    if not outputs:
        yield Piece("title", "No response\n\n")


def _summary(entry: Mapping[str, Any]) -> str:
    usage, cost, seconds = entry.get("usage") or {}, entry.get("cost"), entry.get("seconds")
    said = [str(entry.get("model") or "model unknown")]
    if usage:
        read, written = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        said.append(f"{read} + {written} tokens")
    if seconds is not None:
        said.append(f"{seconds:.3f} s")
    if cost is not None:
        said.append(f"${cost:.6f}")
    if entry.get("cached"):
        said.append("cached")
    return ", ".join(said)


def _message(message: Mapping[str, Any]) -> Iterator[Piece]:
    name = f" ({message['name']})" if message.get("name") else ""
    call = f" to {message['tool_call_id']}" if message.get("tool_call_id") else ""
    yield Piece("title", f"{str(message.get('role', '')).capitalize()} message{name}{call}:\n\n")
    content = message.get("content")
    parts: Iterable[Any] = content if isinstance(content, list) else [content or ""]
    for part in parts:
        if part:
            yield Piece("plain", f"{_part(part)}\n\n")
    yield from _tool_calls(message.get("tool_calls"))


def _output(output: Any) -> Iterator[Piece]:
    if not isinstance(output, Mapping):
        yield Piece("answer", f"{output}\n\n")
        return
    if output.get("reasoning_content"):
        yield Piece("quiet", f"Reasoning: {output['reasoning_content']}\n\n")
    if output.get("text"):
        yield Piece("answer", f"{output['text']}\n\n")
    yield from _tool_calls(output.get("tool_calls"))


def _tool_calls(calls: Any) -> Iterator[Piece]:
    for call in calls or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            arguments = function.get("arguments", "")
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, default=str, ensure_ascii=False)
            text = f"{function.get('name')}({arguments})"
        else:
            text = str(call)
        yield Piece("answer", f"Tool call: {text}\n\n")


def _part(part: Any) -> str:
    """Return a part of a message as text, a picture or the like in a few words."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return clip(str(part), MAX_PLACEHOLDER_CHARS)
    kind = str(part.get("type", "part"))
    if isinstance(part.get("text"), str):
        return str(part["text"])
    inside = part.get(kind, part)
    if isinstance(inside, Mapping):
        found = [
            inside[name]
            for name in ("filename", "format", "url", "file_id", "data", "file_data")
            if isinstance(inside.get(name), str)
        ]
        told = ", ".join(_source(each) for each in found) or ", ".join(map(str, inside))
    else:
        told = _source(str(inside))
    return f"<{kind}: {told}>"


def _source(text: str) -> str:
    """Return a URL or a name, and of data only what it is and how long."""
    if text.startswith("data:"):
        return f"{clip(text[5:].partition(',')[0], 60)}, {len(text)} characters"
    return text if len(text) <= MAX_PLACEHOLDER_CHARS else f"{len(text)} characters"


# --- How it is shown -----------------------------------------------------------------------------


def harmless(text: str) -> str:
    r"""Return a text whose control characters, but for line ends and tabs, are written out.

    Example:
        >>> print(harmless("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    return _HARMFUL.sub(
        lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n")
    )


def _as_text(pieces: Iterable[Piece], *, in_colour: bool) -> str:
    shown: list[str] = []
    for style, text in pieces:
        start = _ANSI.get(style, "") if in_colour else ""
        shown.append(f"{start}{harmless(text)}\x1b[0m" if start else harmless(text))
    return "".join(shown)


def _as_html(pieces: Iterable[Piece]) -> str:
    inside = "".join(
        f'<span style="{_CSS.get(style, "")}">{html.escape(harmless(text))}</span>'
        for style, text in pieces
    )
    return f'<pre style="white-space:pre-wrap">{inside}</pre>'


def _takes_colour(target: TextIO) -> bool:
    """Tell whether this is a terminal that shows colours, and whether they are wanted.

    Source: https://no-color.org
    """
    is_terminal = getattr(target, "isatty", lambda: False)()
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _show_html(text: str) -> None:
    # Only where IPython runs already, which is what `is_in_notebook` asks.
    display: Any = importlib.import_module("IPython.display")
    display.display(display.HTML(text))
