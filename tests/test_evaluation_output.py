"""What an evaluation shows and writes: tables, CSV, JSON.

Not here: what it finds (`test_evaluate.py`).
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pydantic
import pytest

import dspylite as dspy
from dspylite.programs.evaluation import export
from dspylite.programs.evaluation.table import clipped


def ask(question: str) -> dspy.Prediction:
    """Answer a, except for the third question."""
    if question == "q2":
        raise ValueError("no\nanswer")
    return dspy.Prediction(answer="a0", note=f"on {question}")


def is_right(example: Any, pred: Any, trace: Any = None) -> bool:
    return bool(example.answer == pred.answer)


def is_same(example: Any, pred: Any, trace: Any = None) -> bool:
    return True


def devset_of(count: int) -> list[dspy.Example]:
    return [
        dspy.Example(question=f"q{i}", answer=f"a{i}").with_inputs("question") for i in range(count)
    ]


class Refusing:
    """Refuses to be shown."""

    def __str__(self) -> NoReturn:
        raise RuntimeError("no")

    __repr__ = __str__


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def evaluate(devset: list[Any], program: Any = ask, metric: Any = is_right, **options: Any) -> Any:
    return dspy.Evaluate(devset=devset, metric=metric, num_threads=1, **options)(program)


def of(**values: Any) -> tuple[list[dspy.Example], Any]:
    """Make a devset of one and a program that gives some values."""
    return [dspy.Example(x=0).with_inputs("x")], lambda x: dspy.Prediction(**values)


# --- Files ----------------------------------------------------------------------------------------


def test_files_have_the_columns_and_values_of_dspy(tmp_path: Path) -> None:
    """It is what DSPy 3.4.1 writes for the same run, byte by byte and value by value."""
    table, objects = tmp_path / "o.csv", tmp_path / "o.json"
    evaluate(devset_of(2), save_as_csv=str(table), save_as_json=objects)
    assert table.read_bytes() == (
        b"question,example_answer,pred_answer,note,is_right\r\n"
        b"q0,a0,a0,on q0,True\r\n"
        b"q1,a1,a0,on q1,False\r\n"
    )
    assert json.loads(objects.read_bytes()) == [
        {"question": f"q{i}", "example_answer": f"a{i}", "pred_answer": "a0",
         "note": f"on q{i}", "is_right": i == 0}
        for i in range(2)
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [table, objects]


@pytest.mark.parametrize("first_fails", [False, True])
def test_files_have_the_same_columns_whichever_items_failed(
    tmp_path: Path, first_fails: bool
) -> None:
    """DSPy's CSV raises where the first row has fewer columns than a later one, and all is lost."""
    devset = devset_of(3)
    if first_fails:
        devset.reverse()
    table, objects = tmp_path / "o.csv", tmp_path / "o.json"
    evaluate(devset, failure_score=-0.5, save_as_csv=table, save_as_json=objects)
    rows = {row["question"]: row for row in read_csv(table)}
    assert rows["q2"] == {
        "question": "q2", "example_answer": "a2", "pred_answer": "", "note": "",
        "is_right": "-0.5", "error": "ValueError: no\nanswer",
    }  # fmt: skip
    assert rows["q0"]["error"] == ""
    failed = next(row for row in json.loads(objects.read_bytes()) if row["question"] == "q2")
    assert failed == {
        "question": "q2", "example_answer": "a2", "is_right": -0.5,
        "error": "ValueError: no\nanswer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("-5", "-5"),
        ("+3.5e2", "+3.5e2"),
        (-5, "-5"),
        ("a=1", "a=1"),
        ("", ""),
        ('say "hi",\r\nor not', 'say "hi",\r\nor not'),
        ("naïve 中文 👍", "naïve 中文 👍"),
        ("\ud800", "\\ud800"),
        ("nul\0", "nul\0"),
        (["=1"], "['=1']"),
        (Refusing(), "<Refusing>"),
    ],
)
def test_a_cell_keeps_its_text_and_computes_nothing(tmp_path: Path, value: Any, cell: str) -> None:
    """A model's answer must not run as a formula where somebody opens the file."""
    devset, program = of(answer=value)
    table = tmp_path / "o.csv"
    evaluate(devset, program, lambda e, p: 1, save_as_csv=table)
    assert read_csv(table) == [{"x": "0", "answer": cell, "<lambda>": "1"}]


def test_a_column_name_computes_nothing_either(tmp_path: Path) -> None:
    devset, program = of(**{"=1+1": "x"})
    table = tmp_path / "o.csv"
    evaluate(devset, program, lambda e, p: 1, save_as_csv=table)
    assert read_csv(table)[0] == {"x": "0", "'=1+1": "x", "<lambda>": "1"}


class Point(pydantic.BaseModel):
    x: int


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("=1+1", "=1+1"),
        ("\ud800 中", "\ud800 中"),
        (Point(x=1), {"x": 1}),
        ([Point(x=1), dspy.Prediction(y=2)], [{"x": 1}, {"y": 2}]),
        ({1: "a", None: 2}, {"1": "a", "null": 2}),
        ({(1, 2): "a"}, "{(1, 2): 'a'}"),
        ({"a"}, ["a"]),
        (float("nan"), "nan"),
        (CYCLE, "[[...]]"),
        (b"raw", "b'raw'"),
        ([Refusing()], ["<Refusing>"]),
        (Refusing(), "<Refusing>"),
        (None, None),
    ],
)
def test_json_keeps_every_value_or_its_text(tmp_path: Path, value: Any, found: Any) -> None:
    """DSPy raises at the first value that JSON does not know, after everything was paid for."""
    devset, program = of(answer=value)
    objects = tmp_path / "o.json"
    evaluate(devset, program, lambda e, p: 1, save_as_json=objects)
    strict = json.loads(objects.read_bytes(), parse_constant=pytest.fail)
    assert strict == [{"x": 0, "answer": found, "<lambda>": 1}]


def test_a_score_with_words_is_a_number_in_csv_and_whole_in_json(tmp_path: Path) -> None:
    table, objects = tmp_path / "o.csv", tmp_path / "o.json"
    devset, program = of(answer="a")
    metric = lambda e, p: dspy.Prediction(score=0.25, feedback="short")  # noqa: E731
    evaluate(devset, program, metric, save_as_csv=table, save_as_json=objects)
    assert read_csv(table)[0]["<lambda>"] == "0.25"
    assert json.loads(objects.read_bytes())[0]["<lambda>"] == {"score": 0.25, "feedback": "short"}


@pytest.mark.parametrize(
    ("made", "row"),
    [
        ("text", {"prediction": "text"}),
        (None, {"prediction": ""}),
        ({"answer": 1}, {"answer": "1"}),
        (types.SimpleNamespace(items=3), {"prediction": "namespace(items=3)"}),
        (dict, {"prediction": "<class 'dict'>"}),
    ],
)
def test_predictions_without_names_stand_in_one_column(tmp_path: Path, made: Any, row: Any) -> None:
    table = tmp_path / "o.csv"
    devset, _ = of()
    evaluate(devset, lambda x: made, lambda e, p: 1, save_as_csv=table)
    (found,) = read_csv(table)
    assert found == {"x": "0", **row, "<lambda>": "1"}


def test_a_column_named_as_the_metric_is_kept(tmp_path: Path) -> None:
    """In DSPy the score overwrites the value."""

    def answer(example: Any, pred: Any) -> bool:
        if pred.error:
            raise ValueError("so")
        return True

    table = tmp_path / "o.csv"
    devset = [dspy.Example(x=x).with_inputs("x") for x in range(2)]
    program = lambda x: dspy.Prediction(answer="a", error="e" * x)  # noqa: E731
    evaluate(devset, program, answer, save_as_csv=table)
    assert read_csv(table) == [
        {"x": "0", "answer": "a", "error": "", "metric_answer": "True", "metric_error": ""},
        {"x": "1", "answer": "", "error": "", "metric_answer": "0.0",
         "metric_error": "MetricError: The metric `answer` failed: ValueError: so"},
    ]  # fmt: skip


def test_no_value_takes_the_column_of_another(tmp_path: Path) -> None:
    """A shared name gets a prefix, and may then be that of another value."""
    table, whole = tmp_path / "o.csv", tmp_path / "o.json"
    given = {"q": 1, "a": 2, "pred_a": 3, "example_a": 4, "=b": 5, "'=b": 6}
    evaluate(
        [dspy.Example(**given).with_inputs("q")],
        lambda q: dspy.Prediction(a=7, pred_pred_a=8),
        is_same,
        save_as_csv=table,
        save_as_json=whole,
    )
    (found,) = json.loads(whole.read_text())
    assert found == {
        "q": 1, "example_example_a": 2, "pred_a": 3, "example_a": 4, "=b": 5, "'=b": 6,
        "pred_pred_pred_a": 7, "pred_pred_a": 8, "is_same": True,
    }  # fmt: skip
    header, line = csv.reader(table.read_text().splitlines())
    assert len(header) == len(line) == 9
    assert line == [*map(str, list(found.values())[:-1]), "True"]


# --- Where files go -------------------------------------------------------------------------------


def refusing(**inputs: Any) -> NoReturn:
    pytest.fail("nothing may be called")


@pytest.mark.parametrize("option", ["save_as_csv", "save_as_json"])
@pytest.mark.parametrize(
    ("path", "words"),
    [("missing/o", "there is no directory"), (".", "is no file"), ("link", "there is no direct")],
)
def test_an_impossible_place_is_named_before_the_run(
    tmp_path: Path, option: str, path: str, words: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "o")
    with pytest.raises(dspy.EvaluationError, match=words) as raised:
        evaluate(devset_of(1), refusing, **{option: tmp_path / path})
    assert f"`{option}=" in str(raised.value)


def test_one_file_for_both_forms_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "o")
    with pytest.raises(dspy.EvaluationError, match="are one file"):
        evaluate(devset_of(1), refusing, save_as_csv=tmp_path / "o", save_as_json=tmp_path / "link")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(dspy.EvaluationError, match="cannot be written to"):
        evaluate(devset_of(1), refusing, save_as_csv=tmp_path / "o")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("No space left too")]
)
def test_a_file_that_cannot_be_written_leaves_the_results_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A disk that is full after an hour costs the file, neither the hour nor the file before."""
    table = tmp_path / "o.csv"
    table.write_text("before")

    def full(self: Path, target: Path) -> NoReturn:
        raise error

    monkeypatch.setattr(export.Path, "replace", full)
    with pytest.raises(dspy.EvaluationError, match=r"No space left.*result") as raised:
        evaluate(devset_of(2), save_as_csv=table)
    assert raised.value.result.score == 50.0
    assert len(raised.value.result.results) == 2
    assert table.read_text() == "before"
    assert list(tmp_path.iterdir()) == [table]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "o.json")
    evaluate(devset_of(1), save_as_json=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "o.json").read_bytes())[0]["question"] == "q0"


@pytest.mark.anyio
async def test_files_and_table_are_made_by_the_async_form_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "o.csv"
    measured = dspy.Evaluate(devset=devset_of(2), metric=is_right)
    with anyio.fail_after(10):
        await measured.acall(ask, save_as_csv=table, display_table=True)
    assert [row["is_right"] for row in read_csv(table)] == ["True", "False"]
    assert "✔ [True]" in capsys.readouterr().out


# --- Tables ---------------------------------------------------------------------------------------


def test_a_table_shows_values_scores_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(devset_of(3), display_table=True)
    assert capsys.readouterr().out.splitlines() == [
        "question  example_answer  pred_answer  note   is_right   error",
        "--------  --------------  -----------  -----  ---------  ----------------------",
        "q0        a0              a0           on q0  ✔ [True]",
        "q1        a1              a0           on q1  ✘ [False]",
        r"q2        a2                                  ✘ [0.000]  ValueError: no\nanswer",
    ]


@pytest.mark.parametrize(
    ("asked", "rows"), [(True, 4), (2, 4), (1, 3), (9, 4), (False, 0), (0, 0), (None, 0)]
)
def test_a_number_shows_that_many_rows(
    capsys: pytest.CaptureFixture[str], asked: Any, rows: int
) -> None:
    evaluate(devset_of(2), display_table=asked)
    lines = capsys.readouterr().out.splitlines()
    is_cut = asked == 1 and asked is not True
    assert len(lines) == rows + is_cut
    assert ("... and 1 more" in lines) is is_cut


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (0.5, "✔ [0.500]"),
        (1, "✔ [1]"),
        (0, "✘ [0]"),
        (dspy.Prediction(score=1 / 3), "✔ [0.333]"),
        (-0.25, "✘ [-0.250]"),
    ],
)
def test_scores_are_shown_in_short(
    capsys: pytest.CaptureFixture[str], score: Any, shown: str
) -> None:
    devset, program = of(answer="a")
    evaluate(devset, program, lambda e, p: score, display_table=True)
    assert capsys.readouterr().out.splitlines()[-1].endswith(shown)


def test_what_a_model_wrote_cannot_move_the_cursor_or_fill_the_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    devset, program = of(a="\x1b[2J\r\n\x9b\u202e\ud800" + "x" * 10_000, b=Refusing())
    evaluate(devset, program, lambda e, p: 1, display_table=True)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert [len(line) < 80 for line in out.splitlines()] == [True] * 3
    assert r"\x1b[2J\r\n\x9b\u202e\ud800xx" in out
    assert "<Refusing>" in out


def test_a_text_is_clipped_only_where_it_is_too_long() -> None:
    assert [clipped("abcdef", limit) for limit in (5, 6, 7)] == ["abcd…", "abcdef", "abcdef"]


def test_a_terminal_that_knows_ascii_alone_is_shown_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
    devset, program = of(answer="naïve")
    result = evaluate(devset, program, lambda e, p: 1, display_table=True)
    assert result.score == 100.0
    assert rb"na\xefve" in raw.getvalue()


def test_a_closed_stdout_costs_the_table_alone(monkeypatch: Any, caplog: Any) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert evaluate(devset_of(2), display_table=True).score == 50.0
    assert "could not be shown" in caplog.text


class Tags(HTMLParser):
    """Lists the tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert attrs == []
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_notebook_gets_html_in_which_nothing_is_a_tag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """IPython is there only in a notebook; what it calls is `_repr_html_`."""
    displayed: list[Any] = []
    notebook = types.SimpleNamespace(
        get_ipython=lambda: types.SimpleNamespace(kernel=object()),
        display=types.SimpleNamespace(display=displayed.append),
    )
    monkeypatch.setitem(sys.modules, "IPython", notebook)  # type: ignore[arg-type]
    devset, program = of(**{"<b>": "<script>alert('1')</script> & \"x\""})
    evaluate(devset * 2, program, lambda e, p: 1, display_table=1)
    (table,) = displayed
    page = Tags(table._repr_html_())
    assert page.tags == ["table", *("tr th th th".split()), *("tr td td td".split()), "p"]
    assert page.text == [
        "x", "<b>", "<lambda>", "0", "<script>alert('1')</script> & \"x\"", "✔ [1]",
        "... and 1 more",
    ]  # fmt: skip
    assert capsys.readouterr().out == ""
