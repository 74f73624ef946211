"""`inspect_history`: what is shown of the last calls, and that no text of theirs does harm.

Not here: what a history keeps (`test_history.py`).
"""

from __future__ import annotations

import io
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest

import dspylite as dspy
from dspylite.errors import SettingsError
from dspylite.runtime.history import GLOBAL_HISTORY
from dspylite.runtime.inspection import pretty_print_history
from dspylite.testing import FakeLM, FakeServer, Reply


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(history: Any, n: int = 1, file: Any = None) -> str:
    target = io.StringIO() if file is None else file
    pretty_print_history(history, n, target)
    text: str = target.getvalue()
    return text


def shown_of(**entry: Any) -> str:
    return shown([entry])


def test_last_calls_are_printed_with_all_that_was_said(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """One look tells what a model was really sent, and what it answered."""
    server.script(
        Reply(text="forgotten"),
        Reply(text="first", usage={"prompt_tokens": 5, "completion_tokens": 2}),
        Reply(texts=["second", "third"]),
    )
    lm = dspy.LM("openai/m", api_base=server.base_url, api_key="k", price=(1, 2))
    lm("an earlier question")
    lm(
        messages=[
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "line 1\nline 2", "name": "ada"},
        ]
    )
    lm("another", n=2)
    assert dspy.inspect_history(n=2) is None
    printed = capsys.readouterr().out
    assert "an earlier question" not in printed
    first, second = printed.split("\n[")[1:]
    entry = lm.history[1]
    assert first == (
        f"{entry.timestamp}] openai/m, 5 + 2 tokens, {entry.seconds:.3f} s, $0.000009\n\n"
        "System message:\n\nbe kind\n\n"
        "User message (ada):\n\nline 1\nline 2\n\n"
        "Response:\n\nfirst\n\n"
    )
    assert second.endswith("Response 1 of 2:\n\nsecond\n\nResponse 2 of 2:\n\nthird\n\n")


def test_lms_and_modules_show_their_own_calls() -> None:
    """Of many models in a program, one is looked at."""
    one, other = FakeLM(["ONE"]), FakeLM(default={"answer": "OTHER"})
    predict = dspy.Predict("question -> answer")
    with dspy.context(lm=other):
        predict(question="q")
    one("hello")
    by_lm, by_module, by_all = io.StringIO(), io.StringIO(), io.StringIO()
    one.inspect_history(5, by_lm)
    predict.inspect_history(file=by_module)
    dspy.inspect_history(2, by_all)
    assert ("ONE" in by_lm.getvalue(), "OTHER" in by_lm.getvalue()) == (True, False)
    assert ("ONE" in by_module.getvalue(), "OTHER" in by_module.getvalue()) == (False, True)
    assert by_all.getvalue() == by_module.getvalue() + by_lm.getvalue()


def test_tool_calls_and_reasoning_are_shown(server: FakeServer) -> None:
    """An answer without text is no empty answer."""
    server.script(Reply(text="", tool_calls=[{"name": "look", "arguments": {"at": "sky"}}]))
    lm = dspy.LM("openai/m", api_base=server.base_url, api_key="k")
    lm(messages=[{"role": "tool", "tool_call_id": "c-1", "content": "blue"}])
    text = shown(lm.history)
    assert "Tool message to c-1:\n\nblue\n\n" in text
    assert text.endswith('Response:\n\nTool call: look({"at": "sky"})\n\n')
    output = {"text": "4", "reasoning_content": "2 + 2", "tool_calls": ["odd"]}
    assert shown_of(outputs=[output]).endswith("Reasoning: 2 + 2\n\n4\n\nTool call: odd\n\n")
    calls = [{"function": {"name": "look", "arguments": {"at": "sky"}}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    text = shown_of(messages=[message])
    assert 'Assistant message:\n\nTool call: look({"at": "sky"})\n\nNo response' in text


DATA = "data:image/png;base64," + "A" * 9_000
PARTS: dict[str, tuple[Any, str]] = {
    "text": ({"type": "text", "text": "see"}, "see"),
    "a string": ("see", "see"),
    "picture": (
        {"type": "image_url", "image_url": {"url": DATA}},
        "<image_url: image/png;base64, 9022 characters>",
    ),
    "link": (
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        "<image_url: https://example.org/a.png>",
    ),
    "sound": (
        {"type": "input_audio", "input_audio": {"data": "B" * 5_000, "format": "wav"}},
        "<input_audio: wav, 5000 characters>",
    ),
    "file": (
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "C" * 300}},
        "<file: a.pdf, 300 characters>",
    ),
    "unknown": ({"type": "hologram", "depth": 3}, "<hologram: type, depth>"),
    "an object": (3, "3"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_are_no_text_are_told_in_a_few_words(kind: str) -> None:
    """A picture's 9,000 letters would push the question off the screen."""
    part, expected = PARTS[kind]
    text = shown_of(messages=[{"role": "user", "content": [part]}])
    assert f"User message:\n\n{expected}\n\n" in text


def test_dicts_with_some_of_the_keys_are_shown() -> None:
    """Models of users keep what they like in a list of their own."""
    assert shown_of() == ("\n[time unknown] model unknown\n\nUser message:\n\nNo response\n\n")
    text = shown_of(prompt="hi", outputs=["yo"], cached=True, cost=0.0, messages=None)
    assert text == (
        "\n[time unknown] model unknown, $0.000000, cached\n\n"
        "User message:\n\nhi\n\nResponse:\n\nyo\n\n"
    )
    assert "\n\nas text\n\n" in shown_of(messages=["as text"])


@pytest.mark.parametrize("n", [-1, 1.0, True, "3", None])
def test_count_that_is_none_is_refused(n: Any) -> None:
    """DSPy prints everything for 0, and something else for -1."""
    with pytest.raises(SettingsError, match="`n` must be a whole number of at least 0"):
        dspy.inspect_history(n)


def test_count_beyond_the_history_shows_all_and_0_shows_nothing() -> None:
    """Nobody counts first."""
    history = [{"outputs": [str(number)]} for number in range(3)]
    assert shown(history, 9).count("Response:") == 3
    assert shown(history, 0) == ""
    assert shown([], 4) == "No calls are kept here.\n"


# --- Terminals -----------------------------------------------------------------------------------

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9be\x00f\u202eg\ud800h\r\ni\tj"
WRITTEN_OUT = "a\\x1b[2Jb\\x1b]0;title\\x07c\\rd\\x9be\\x00f\\u202eg\\ud800h\ni\tj"


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [{"role": "user", "content": HOSTILE}]},
        {"messages": [{"role": HOSTILE, "content": "x"}]},
        {"outputs": [HOSTILE]},
        {"outputs": [{"reasoning_content": HOSTILE}]},
        {"outputs": [{"tool_calls": [HOSTILE]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": HOSTILE}]}]},
        {"model": HOSTILE},
        {"timestamp": HOSTILE},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_control_characters_are_written_out(entry: dict[str, Any]) -> None:
    """An answer must not clear the screen, set a title or turn the text around."""
    expected = WRITTEN_OUT if "'role': 'a" not in str(entry) else WRITTEN_OUT.capitalize()
    text = shown_of(**entry)
    assert expected.lower() in text.lower()
    assert not set(text) & set("\x1b\x07\x9b\x00\r\u202e\ud800")


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with escape sequences in it is a nuisance to read."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    entry = {"outputs": ["yes"]}
    assert "\x1b[32myes" in shown([entry], file=Terminal())
    assert "\x1b" not in shown([entry])
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in shown([entry], file=Terminal())


@pytest.mark.parametrize("value", ["1", "0", "anything"])
def test_no_color_is_obeyed(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its value, as its page says."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", value)
    assert "\x1b" not in shown([{"outputs": ["yes"]}], file=Terminal())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_any_text_is_printed_in_any_encoding(encoding: str) -> None:
    """A Windows console must not turn a smiling answer into an error."""
    raw = io.BytesIO()
    target = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    pretty_print_history([{"outputs": ["鴨 😀 \ud83d"]}], file=target)
    target.flush()
    text = raw.getvalue().decode(encoding)
    assert ("鴨 😀" in text) == encoding.startswith("utf")
    assert "\\ud83d" in text


def test_program_without_a_console_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows starts such programs without a standard output."""
    monkeypatch.setattr(sys, "stdout", None)
    pretty_print_history([{"outputs": ["yes"]}])


def test_each_look_is_one_write() -> None:
    """Two threads that print at once must not mix their lines."""

    class Counting(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            return super().write(text)

    target = Counting()
    pretty_print_history([{"outputs": ["a"]}, {"outputs": ["b"]}], 2, target)
    assert target.writes == 1


def test_history_is_shown_while_threads_add_to_it() -> None:
    """A debug page looks while the service works."""
    lm, stop = FakeLM(default="yes"), threading.Event()

    def call() -> None:
        while not stop.is_set():
            lm("hello")

    threads = [threading.Thread(target=call) for _ in range(4)]
    lm("hello")
    for thread in threads:
        thread.start()
    try:
        texts = [shown(lm.history, 3) for _ in range(50)]
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert all(1 <= text.count("Response:\n\nyes") <= 3 for text in texts)


# --- Notebooks -----------------------------------------------------------------------------------


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have this process look like a notebook's; what its cell shows is listed."""
    pages: list[str] = []
    shell = types.SimpleNamespace(kernel=object())
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    display: Any = types.ModuleType("IPython.display")
    display.HTML, display.display = str, pages.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pages


def test_notebook_shows_html_in_which_nothing_runs(
    cells: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's answer, or a page that it was sent, must not act in the reader's notebook."""
    lm = FakeLM(["<script>alert(1)</script>\x1b\u202e"])
    lm(messages=[{"role": "user", "content": "<img src=x onerror=alert(1)> & \"'"}])
    dspy.inspect_history()
    (page,) = cells
    assert page.startswith("<pre")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b\\u202e" in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &quot;&#x27;" in page
    inside = page.removeprefix('<pre style="white-space:pre-wrap">').removesuffix("</pre>")
    tags = {part.partition(">")[0].partition(" ")[0] for part in inside.split("<")[1:]}
    assert tags == {"span", "/span"}
    assert capsys.readouterr().out == ""


def test_notebook_prints_into_a_file_that_is_given(cells: list[str]) -> None:
    """Whoever names a file wants text."""
    assert shown([{"outputs": ["yes"]}]).endswith("Response:\n\nyes\n\n")
    assert cells == []


def test_history_of_all_is_what_is_inspected() -> None:
    """`dspylite.inspect_history` needs no LM at hand."""
    GLOBAL_HISTORY.clear()
    target = io.StringIO()
    dspy.inspect_history(file=target)
    assert target.getvalue() == "No calls are kept here.\n"
