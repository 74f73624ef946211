"""State files that DSPy 3.4.1 wrote (`data/make_dspy_states.py`) load into the same program.

Not here: our own files (`test_saving.py`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pydantic
import pytest

import dspylite as dspy
from dspylite.testing import FakeLM

STATES = Path(__file__).parent / "data" / "dspy_3_4_1"


class Grade(dspy.Signature):
    """Grade the essay like a kind teacher."""

    essay: str = dspy.InputField(desc="as it was handed in")
    mark: int = dspy.OutputField(desc="1 is best")
    remarks: list[str] = dspy.OutputField()


class Rag(dspy.Module):
    """The program of `make_dspy_states.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.ChainOfThought("context: list[str], question -> answer")
        self.steps = [
            dspy.Predict("question -> query"),
            dspy.Predict("query -> context: list[str]"),
        ]
        self.by_name = {"it's": dspy.Predict("text -> label"), 7: dspy.Predict("text -> title")}
        self.grade = dspy.Predict(Grade)

    def forward(self, question: str) -> Any:
        query = self.steps[0](question=question).query
        context = self.steps[1](query=query).context
        return self.answer(context=context, question=question)


PROGRAMS: dict[str, Any] = {
    "plain": Rag,
    "bootstrapped": Rag,
    "labeled": lambda: dspy.ChainOfThought("question -> answer"),
    "single": lambda: dspy.Predict(Grade),
}


def test_there_is_a_program_for_every_file() -> None:
    assert {path.stem for path in STATES.glob("*.json")} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_state_of_dspy_is_ours_but_for_what_dspy_writes_of_itself(name: str) -> None:
    """Loaded and dumped again it says the same: no demo, instruction or description is lost."""
    path = STATES / f"{name}.json"
    saved = json.loads(path.read_text("utf-8"))
    program = PROGRAMS[name]()
    program.load(path, allow_unsafe_lm_state=True)
    del saved["metadata"]
    if name == "bootstrapped":
        lm = saved["grade"]["lm"]
        saved["grade"]["lm"] = {key: value for key, value in lm.items() if value}
        del saved["grade"]["lm"]["num_retries"]  # DSPy's default, written out
    assert program.dump_state() == saved


def test_bootstrapped_program_of_dspy_runs_with_its_demos() -> None:
    """Every demo that DSPy found is in the prompt, augmented ones included."""
    program = Rag()
    program.load(STATES / "bootstrapped.json")
    lm = FakeLM([{"query": "q"}, {"context": ["c"]}, {"reasoning": "r", "answer": "Saturn"}])
    with dspy.context(lm=lm):
        assert program(question="Ringed planet?").answer == "Saturn"
    prompts = [str(request.messages) for request in lm.requests]
    for prompt in prompts:
        assert "Jupiter" in prompt
        assert "Mercury" in prompt
    assert [len(request.messages) for request in lm.requests] == [6, 6, 6]
    assert "Given the fields `question`, produce the fields `query`." in prompts[0]
    assert "It stands there." in prompts[2]


def test_lm_of_dspy_loads_without_its_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    """The file does not say where prompts go, unless it is trusted to (B 7.8)."""
    program = Rag()
    with caplog.at_level(logging.WARNING):
        program.load(STATES / "bootstrapped.json")
    lm: Any = program.grade.lm
    assert (type(lm), lm.model) == (dspy.LM, "openai/gpt-4o-mini")
    assert lm.kwargs == {"temperature": 0.3, "max_tokens": 500}
    assert lm.policies.num_retries is None
    assert "api_base" in caplog.text
    assert "Be strict — «très» strict." in program.grade.signature.instructions
    trusting = Rag()
    trusting.load(STATES / "bootstrapped.json", allow_unsafe_lm_state=True)
    trusted: Any = trusting.grade.lm
    assert trusted.kwargs["api_base"] == "http://models.example:8000/v1"


def test_description_that_nobody_wrote_stays_none() -> None:
    """DSPy writes `${name}` for it, which would be shown to the model here."""
    program = Rag()
    program.load(STATES / "plain.json")
    fields = program.answer.predict.signature.fields
    assert {field.desc for field in fields.values()} == {""}
    assert program.grade.signature.fields["mark"].desc == "1 is best"
    assert program.grade.signature is Grade


def test_what_a_later_dspy_adds_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """DSPy makes an attribute of whatever stands in the file; here nothing is set but the known."""
    program = dspy.Predict(Grade)
    state = json.loads((STATES / "single.json").read_text("utf-8"))
    state.update(fields={"mark": {"criteria": ["x"]}}, forward="x", config={"n": 9}, empty=None)
    with caplog.at_level(logging.WARNING):
        program.load_state(state)
    assert "config, fields, forward" in caplog.text
    assert program.config == {}
    assert not isinstance(vars(program).get("forward"), str)


class Painting(pydantic.BaseModel):
    title: str
    picture: dspy.Image


def _marked(part: dict[str, Any]) -> str:
    """Write a medium as DSPy 3.4.1 does in a demo."""
    inside = json.dumps([part])
    return f"<<CUSTOM-TYPE-START-IDENTIFIER>>{inside}<<CUSTOM-TYPE-END-IDENTIFIER>>"


CAT = _marked({"type": "image_url", "image_url": {"url": "https://x.example/cat.png"}})
CAT_IMAGE = dspy.Image("https://x.example/cat.png")


@pytest.mark.parametrize(
    ("kind", "saved", "value"),
    [
        (dspy.Image, CAT, CAT_IMAGE),
        (list[dspy.Image], [CAT, CAT], [CAT_IMAGE, CAT_IMAGE]),
        (dspy.Image | None, CAT, CAT_IMAGE),
        (Painting, {"title": "Cat", "picture": CAT}, Painting(title="Cat", picture=CAT_IMAGE)),
        (
            dspy.Audio,
            _marked({"type": "input_audio", "input_audio": {"data": "YQ==", "format": "wav"}}),
            dspy.Audio(data="YQ==", audio_format="wav"),
        ),
        (
            dspy.File,
            _marked({"type": "file", "file": {"file_id": "f-1", "filename": "a.txt"}}),
            dspy.File(file_id="f-1", filename="a.txt"),
        ),
    ],
)
def test_media_in_the_demos_of_dspy_are_media_again(kind: Any, saved: Any, value: Any) -> None:
    """DSPy saves them as the text from which its adapters make parts of a message."""
    fields = {"seen": (kind, dspy.InputField()), "answer": dspy.OutputField()}
    program = dspy.Predict(dspy.make_signature(fields))
    state = {**program.dump_state(), "demos": [{"seen": saved, "answer": "x"}]}
    program.load_state(state)
    assert program.demos == [{"seen": value, "answer": "x"}]
    again: Any = dspy.Predict(program.signature)
    again.load_state(program.dump_state())
    assert again.demos == program.demos


@pytest.mark.parametrize("inside", ["", "[", "[]", "{}", "[1]", '[{"type": 1}]', '[{"type": "a"}]'])
def test_damaged_media_of_dspy_stay_text(inside: str) -> None:
    text = f"<<CUSTOM-TYPE-START-IDENTIFIER>>{inside}<<CUSTOM-TYPE-END-IDENTIFIER>>"
    program = dspy.Predict("seen: dspy.Image -> a")
    program.load_state({**program.dump_state(), "demos": [{"seen": text, "a": "x"}]})
    assert program.demos == [{"seen": text, "a": "x"}]


def test_media_of_dspy_that_do_not_fit_their_field_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = dspy.Predict("heard: dspy.Audio -> a")
    program.load_state({**program.dump_state(), "demos": [{"heard": CAT, "a": "x"}]})
    assert program.demos == [{"heard": CAT, "a": "x"}]
    assert "`heard` is no Audio" in caplog.text


def test_our_metadata_names_no_version_that_dspy_does_not_know(tmp_path: Path) -> None:
    """DSPy looks each one up among its own and fails at any other."""
    dspy.Predict("a -> b").save(tmp_path / "state.json")
    metadata = json.loads((tmp_path / "state.json").read_text("utf-8"))["metadata"]
    assert set(metadata["dependency_versions"]) <= {"python", "dspy", "cloudpickle"}


def test_predictor_where_dspy_does_not_look_is_left_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """DSPy's files lack what stands in a list within a list; ours have it."""

    class Deep(dspy.Module):
        def __init__(self) -> None:
            self.first = dspy.Predict("a -> b")
            self.table = [[dspy.Predict("a -> b")]]

    trained, fresh = Deep(), Deep()
    trained.first.demos = trained.table[0][0].demos = [{"a": "1", "b": "2"}]
    state = trained.dump_state()
    fresh.load_state({"first": state["first"]})
    assert (len(fresh.first.demos), len(fresh.table[0][0].demos)) == (1, 0)
    assert "table[0][0]" in caplog.text
    fresh.load_state(state)
    assert len(fresh.table[0][0].demos) == 1
    with pytest.raises(dspy.SavingError, match=r"`first`, `table\[0\]\[0\]`|`first`"):
        fresh.load_state({"table[0][0]": state["first"]})
