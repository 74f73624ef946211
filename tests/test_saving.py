"""Programs saved as JSON and loaded again: states, values of demos, LMs, whole programs, files.

Not here: damaged and planted files (`test_saving_hostile.py`), the settings
(`test_saving_settings.py`), files that DSPy wrote (`test_saving_dspy.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import decimal
import enum
import json
import os
import stat
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import dspylite as dspy
from dspylite.runtime.files import write_json
from dspylite.testing import FakeLM


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(alias="fullName")
    born: datetime.date


@dataclasses.dataclass
class Place:
    city: str
    at: tuple[float, float]


class Report(dspy.Signature):
    """Write a report."""

    person: Person = dspy.InputField(desc="who")
    day: datetime.date = dspy.InputField()
    place: Place = dspy.InputField()
    mood: Mood = dspy.OutputField()
    lines: list[str] = dspy.OutputField(prefix="All lines:")
    kind: Literal["a", "b"] = dspy.OutputField()
    raw: bytes = dspy.OutputField()


class Desk(dspy.Module):
    def __init__(self) -> None:
        self.report = dspy.ChainOfThought(Report)
        self.steps = [dspy.Predict("question -> answer"), dspy.Predict("question -> query")]
        self.named = {"it's": dspy.Predict("text -> label"), 7: dspy.Predict("text -> title")}
        self.pair = (dspy.Predict("a -> b"), self.steps[0])


PATHS = ["report.predict", "steps[0]", "steps[1]", "named['it's']", "named['7']", "pair[0]"]

DEMO = {
    "person": Person(fullName="Ada", born=datetime.date(1815, 12, 10)),
    "day": datetime.date(2024, 5, 1),
    "place": Place("London", (51.5, -0.1)),
    "reasoning": "She «wrote» it.",
    "mood": Mood.GOOD,
    "lines": ["one", "two"],
    "kind": "a",
    "raw": b"bytes",
    "augmented": True,
}


def trained() -> Desk:
    desk = Desk()
    desk.report.predict.demos = [dspy.Example(DEMO), {"lines": ["only this"]}]
    desk.report.predict.signature = desk.report.predict.signature.with_instructions("Be brief.")
    desk.steps[0].lm = desk.steps[1].lm = dspy.LM("openai/m", temperature=0.5, api_key="sk-secret0")
    desk.steps[1].signature = desk.steps[1].signature.with_updated_fields("query", desc="short")
    desk.pair[0].train = [dspy.Example(a="1", b="2")]
    return desk


# --- States ------------------------------------------------------------------------------------


def test_predictors_have_the_paths_of_dspy() -> None:
    """A state goes by them, so each of them must be spelt as in a file of DSPy."""
    assert [path for path, _ in Desk().named_predictors()] == PATHS


def test_state_loads_into_the_same_program(tmp_path: Path) -> None:
    """What was trained is what the next process runs."""
    desk, fresh = trained(), Desk()
    desk.save(tmp_path / "state.json")
    assert fresh.load(tmp_path / "state.json") is None
    assert fresh.dump_state() == desk.dump_state()
    assert list(desk.dump_state()) == PATHS
    predict = fresh.report.predict
    assert predict.signature.instructions == "Be brief."
    assert predict.signature.output_fields["lines"].prefix == "All lines:"
    assert fresh.steps[1].signature.output_fields["query"].desc == "short"


def test_demos_come_back_with_the_types_of_their_fields() -> None:
    """Prompts with loaded demos are the prompts with the demos that were saved."""
    desk, fresh = trained(), Desk()
    fresh.load_state(json.loads(json.dumps(desk.dump_state())))
    assert fresh.report.predict.demos == [DEMO, {"lines": ["only this"]}]
    signature = desk.report.predict.signature
    adapter = dspy.ChatAdapter()
    before = adapter.format(signature, desk.report.predict.demos[:1], DEMO)
    after = adapter.format(fresh.report.predict.signature, fresh.report.predict.demos[:1], DEMO)
    assert after == before


def test_loaded_program_runs_with_its_demos() -> None:
    """The demos reach the model, not only the attribute."""
    fresh = dspy.Predict("question -> answer")
    trained_one = dspy.Predict("question -> answer")
    trained_one.demos = [dspy.Example(question="1+1?", answer="two")]
    fresh.load_state(trained_one.dump_state())
    lm = FakeLM([{"answer": "four"}])
    with dspy.context(lm=lm):
        assert fresh(question="2+2?").answer == "four"
    assert "1+1?" in str(lm.requests[0].messages)


def test_predictors_that_shared_an_lm_share_one_again() -> None:
    """Its history and its place in the settings of a program are one; `get_lm` finds it."""
    desk = Desk()
    desk.set_lm(dspy.LM("openai/m", temperature=0.5))
    fresh = Desk()
    fresh.load_state(desk.dump_state())
    assert repr(fresh.get_lm()) == repr(desk.get_lm())


def test_state_of_a_single_predictor_is_flat(tmp_path: Path) -> None:
    """As in DSPy: there is no path to go by."""
    predict = dspy.Predict("question -> answer")
    predict.demos = [{"question": "q", "answer": "a"}]
    assert set(predict.dump_state()) == {"traces", "train", "demos", "signature", "lm"}
    predict.save(tmp_path / "one.json")
    fresh = dspy.Predict("question -> answer")
    fresh.load(tmp_path / "one.json")
    assert fresh.demos == predict.demos
    assert fresh.load_state(predict.dump_state()) is fresh


def test_state_without_json_mode_keeps_the_objects() -> None:
    """DSPy's `json_mode=False`: a copy within one process."""
    desk, fresh = trained(), Desk()
    state = desk.dump_state(json_mode=False)
    assert state["report.predict"]["demos"][0] is desk.report.predict.demos[0]
    fresh.load_state(state)
    assert fresh.report.predict.demos == desk.report.predict.demos
    assert fresh.report.predict.demos[0] is not desk.report.predict.demos[0]


def test_unchanged_signature_stays_the_class_that_was_written() -> None:
    """A checker and `isinstance` still know it, and its defaults still follow its fields."""
    predict = dspy.Predict(Report)
    predict.load_state(dspy.Predict(Report).dump_state())
    assert predict.signature is Report


def test_signature_state_has_the_form_of_dspy() -> None:
    signature = dspy.Signature("question -> answer", "Answer.")
    assert signature.dump_state() == {
        "instructions": "Answer.",
        "fields": [
            {"prefix": "Question:", "description": "${question}"},
            {"prefix": "Answer:", "description": "${answer}"},
        ],
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("steps[0]"), "missing in it: `steps[0]`"),
        (lambda state: state.update(extra=state["steps[0]"]), "not in the program: `extra`"),
        (lambda state: state.update({"steps[1]": 3}), "`steps[1]` is no dict"),
        (lambda state: state["steps[1]"].pop("signature"), "needs `signature`"),
        (lambda state: state["steps[1]"].pop("demos"), "needs `demos`"),
        (lambda state: state["steps[1]"].update(demos={}) or None, None),
        (lambda state: state["steps[1]"].update(demos="x"), "must be a list"),
        (lambda state: state["steps[1]"].update(demos=["x"]), "`demos[0]`"),
        (lambda state: state["steps[1]"].update(extended_signature={}), "DSPy 2.5"),
        (lambda state: state["steps[1]"].update(lm="gpt"), "state of an LM"),
        (lambda state: state["steps[1]"].update(lm={}), "must name its `model`"),
        (lambda state: state["steps[1]"].update(lm={"model": "m", "timeout": -1}), "`timeout`"),
        (lambda state: state["steps[1]"].update(lm={"model": "m", "nope": 1}), None),
        (
            lambda state: state["steps[1]"]["signature"]["fields"].pop(),
            "2 fields (question, query)",
        ),
        (lambda state: state["steps[1]"]["signature"].pop("instructions"), "`instructions`"),
        (lambda state: state["steps[1]"]["signature"].update(fields=[1, 2]), "`prefix`"),
        (lambda state: state["steps[1]"].update(signature=None), "state of a signature"),
    ],
)
def test_state_of_another_program_is_told_apart_and_changes_nothing(
    change: Any, told: str | None
) -> None:
    """All is checked before any of it is applied: a program is never half another one."""
    state = copy.deepcopy(trained().dump_state())
    change(state)
    fresh = Desk()
    before = [dict(vars(predictor)) for predictor in fresh.predictors()]
    if told is None:
        fresh.load_state(state)
        return
    with pytest.raises(dspy.SavingError) as caught:
        fresh.load_state(state)
    assert told in str(caught.value)
    assert [dict(vars(predictor)) for predictor in fresh.predictors()] == before


def test_two_keys_with_one_spelling_are_refused() -> None:
    """In DSPy's spelling 7 and "7" are one path, and one of the two would be lost."""
    program = dspy.Module()
    program.parts = {7: dspy.Predict("a -> b"), "7": dspy.Predict("a -> b")}  # type: ignore[attr-defined]
    with pytest.raises(dspy.SavingError, match=r"Two predictors have the path `parts\['7'\]`"):
        program.dump_state()


def test_predictor_named_metadata_is_refused(tmp_path: Path) -> None:
    program = dspy.Module()
    program.metadata = dspy.Predict("a -> b")  # type: ignore[attr-defined]
    with pytest.raises(dspy.SavingError, match="`metadata`"):
        program.save(tmp_path / "state.json")
    assert list(tmp_path.iterdir()) == []


# --- Values of demos ---------------------------------------------------------------------------


class Thing:
    pass


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def holding_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Thing(), "`demos[0].question` is a `"),
        (object, "`demos[0].question`"),
        (lambda: 1, "`demos[0].question`"),
        ([1, {"deep": Thing()}], "`demos[0].question[1].deep`"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (b"\xff\xfe", "UTF-8"),
        ("\ud800", "lone surrogate"),
        ({("a", 1): 2}, "texts as keys"),
        ({1: "a", "1": "b"}, "Two keys"),
        (holding_itself(), "holds itself"),
        (nested(5_000), "nests deeper"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_value_that_no_file_can_hold_is_named(value: Any, told: str, tmp_path: Path) -> None:
    """Nothing is lost silently, and the file of before is still there."""
    program = dspy.ChainOfThought("question -> answer")
    program.save(tmp_path / "state.json")
    before = (tmp_path / "state.json").read_bytes()
    program.predict.demos = [{"question": value}]
    with pytest.raises(dspy.SavingError) as caught:
        program.save(tmp_path / "state.json")
    assert told in str(caught.value)
    assert "`predict`" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert (tmp_path / "state.json").read_bytes() == before


TYPED: list[tuple[Any, Any]] = [
    (str, st.text(st.characters(exclude_categories=["Cs"]))),
    (int, st.integers(-(2**70), 2**70)),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bool, st.booleans()),
    (list[int], st.lists(st.integers(), max_size=4)),
    (dict[str, float], st.dictionaries(st.text("abc"), st.floats(-5, 5), max_size=3)),
    (tuple[int, str], st.tuples(st.integers(), st.text("xyz"))),
    (set[int], st.sets(st.integers(0, 9))),
    (datetime.date, st.dates()),
    (datetime.datetime, st.datetimes()),
    (datetime.time, st.times()),
    (datetime.timedelta, st.timedeltas(datetime.timedelta(0), datetime.timedelta(days=9))),
    (decimal.Decimal, st.decimals(-9, 9, places=2)),
    (uuid.UUID, st.uuids()),
    (Mood, st.sampled_from(Mood)),
    (int | None, st.none() | st.integers()),
    (
        list[Person],
        st.lists(st.builds(Person, fullName=st.text("ab"), born=st.dates()), max_size=2),
    ),
    (Place, st.builds(Place, st.text("ab"), st.tuples(st.floats(-9, 9), st.floats(-9, 9)))),
    (bytes, st.text("abcä").map(str.encode)),
]


@pytest.mark.parametrize(("kind", "values"), TYPED, ids=[str(kind) for kind, _ in TYPED])
def test_value_of_each_type_survives_the_file(kind: Any, values: Any) -> None:
    """The value is the same, the prompt is the same, and saving it again changes nothing."""
    signature = dspy.Signature(
        {"value": (kind, dspy.InputField()), "out": (str, dspy.OutputField())}
    )
    adapter = dspy.ChatAdapter()

    @given(values)
    @hypothesis_settings(max_examples=25, deadline=None)
    def check(value: Any) -> None:
        predict, fresh = dspy.Predict(signature), dspy.Predict(signature)
        predict.demos = [dspy.Example(value=value, out="x")]
        state = json.loads(json.dumps(predict.dump_state()))
        fresh.load_state(state)
        assert fresh.demos == [{"value": value, "out": "x"}]
        assert type(fresh.demos[0]["value"]) is type(value)
        assert fresh.dump_state() == state
        inputs = {"value": value}
        assert adapter.format(signature, fresh.demos, inputs) == adapter.format(
            signature, predict.demos, inputs
        )

    check()


# --- Files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.pkl", "state.pickle", "state", "state.JSON", "state.yaml"])
def test_only_json_files_are_written_and_read(name: str, tmp_path: Path) -> None:
    program = dspy.Predict("a -> b")
    for use in (program.save, program.load):
        with pytest.raises(dspy.SavingError, match=r"`\.json`"):
            use(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dspy.Predict("a -> b").load(tmp_path / "none.json")


def test_paths_are_texts_or_path_objects(tmp_path: Path) -> None:
    program = dspy.Predict("a -> b")
    program.save(str(tmp_path / "a.json"))
    program.save(tmp_path / "b.json")
    program.load(str(tmp_path / "b.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_failed_write_leaves_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk costs the new state, not the old one."""
    program, path = dspy.Predict("a -> b"), tmp_path / "state.json"
    program.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    program.demos = [{"a": "1", "b": "2"}]
    with pytest.raises(OSError, match="No space"):
        program.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]


def test_a_private_file_stays_private_and_a_link_a_link(tmp_path: Path) -> None:
    program, path, link = dspy.Predict("a -> b"), tmp_path / "state.json", tmp_path / "link.json"
    program.save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    program.demos = [{"a": "1"}]
    program.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b'"1"' in path.read_bytes()


def test_writers_in_many_threads_leave_one_whole_file(tmp_path: Path) -> None:
    """Readers meanwhile see one of the states and never a mixture."""
    path = tmp_path / "state.json"
    programs = []
    for number in range(8):
        program = dspy.Predict("a -> b")
        program.demos = [{"a": str(number), "b": "x" * 20_000}] * (number + 1)
        programs.append(program)
    programs[0].save(path)
    start = threading.Barrier(12)
    seen: list[tuple[int, set[str]]] = []
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            start.wait(10)
            for _ in range(10):
                if number < 8:
                    programs[number].save(path)
                else:
                    fresh = dspy.Predict("a -> b")
                    fresh.load(path)
                    seen.append((len(fresh.demos), {demo["a"] for demo in fresh.demos}))
        except BaseException as error:  # noqa: BLE001  # shown below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert len(seen) == 40
    assert all(names == {str(count - 1)} for count, names in seen)
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]


def test_a_text_too_large_to_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspylite.runtime.files.MAX_FILE_BYTES", 100)
    with pytest.raises(dspy.SavingError, match="bytes"):
        write_json(tmp_path / "a.json", "x" * 100)
    write_json(tmp_path / "a.json", "x" * 90)


# --- Language models ---------------------------------------------------------------------------


def full_lm() -> dspy.LM:
    return dspy.LM(
        "openai/m",
        temperature=0.5,
        max_tokens=77,
        cache=False,
        num_retries=2,
        use_developer_role=True,
        engine="direct",
        capabilities=["json_schema"],
        price=(0.15, 0.6),
        api_base="http://models.example:8000/v1",
        top_p=0.9,
        stop=["END"],
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        max_retry_wait_s=3.0,
        patience_s=4.0,
        max_concurrency=5,
        max_queue=6,
        rpm=7,
        tpm=8,
        adaptive=False,
        fallbacks=[dspy.LM("openai/second", api_base="http://second.example/v1"), dspy.OfflineLM()],
        fallback_on=(dspy.LMServerError, TimeoutError),
        circuit_breaker=dspy.CircuitBreaker(min_calls=9),
    )


def test_every_parameter_of_an_lm_survives_where_the_file_is_trusted() -> None:
    """Policies are data like any other parameter."""
    lm = full_lm()
    state = json.loads(json.dumps(lm.dump_state()))
    loaded = dspy.BaseLM.load_state(state, allow_custom_lm_class=True)
    assert type(loaded) is dspy.LM
    assert loaded.dump_state() == lm.dump_state()
    assert loaded.kwargs == lm.kwargs
    assert loaded.policies.retries == 2
    assert loaded.policies.fallback_on == (dspy.LMServerError, TimeoutError)
    assert [each.model for each in loaded.policies.fallbacks] == [
        "openai/second",
        lm.policies.fallbacks[1].model,
    ]
    assert loaded.price(look_up=False) == lm.price(look_up=False)


def test_an_lm_without_policies_has_no_more_than_dspy_knows() -> None:
    """DSPy sends what it does not know to the provider."""
    assert dspy.LM("openai/m", temperature=0.5).dump_state() == {
        "_dspy_lm_class": "dspy.clients.lm.LM",
        "model": "openai/m",
        "model_type": "chat",
        "cache": True,
        "temperature": 0.5,
    }


@pytest.mark.parametrize("retries", [None, 0, 3, 5])
def test_retries_are_those_that_were_given(retries: int | None) -> None:
    """None waits overload out and 3 does not, so one must not become the other."""
    loaded = dspy.LM.load_state(dspy.LM("openai/m", num_retries=retries).dump_state())
    assert loaded.policies.num_retries == retries


def test_dspys_written_out_default_of_retries_is_our_default() -> None:
    state = {"model": "openai/m", "num_retries": 3, "finetuning_model": None, "launch_kwargs": {}}
    assert dspy.LM.load_state(state).policies.num_retries is None
    assert dspy.LM.load_state({**state, "num_retries": 2}).policies.num_retries == 2


class MyError(Exception):
    pass


class MyPolicy:
    async def handle(self, request: Any, call_next: Any, io: Any) -> Any:
        return await call_next(request)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"middleware": [MyPolicy()]}, "middleware"),
        ({"fallback_on": (MyError,), "fallbacks": [dspy.OfflineLM()]}, "MyError"),
        ({"extra_body": {"x": Thing()}}, "extra_body"),
        ({"response_format": Person}, "response_format"),
    ],
)
def test_a_parameter_that_no_file_can_hold_is_named(params: dict[str, Any], told: str) -> None:
    predict = dspy.Predict("a -> b")
    predict.lm = dspy.LM("openai/m", **params)
    with pytest.raises(dspy.SavingError, match=told):
        predict.dump_state()


def test_an_object_that_is_called_like_an_lm_but_has_no_state_is_named() -> None:
    predict = dspy.Predict("a -> b")
    predict.lm = Thing()  # type: ignore[assignment]
    with pytest.raises(dspy.SavingError, match="dump_state"):
        predict.dump_state()


# --- Whole programs ----------------------------------------------------------------------------

APP = """
import datetime
import dspylite as dspy
import pydantic

made = []

class Person(pydantic.BaseModel):
    name: str

class Ask(dspy.Signature):
    '''Ask kindly.'''

    who: Person = dspy.InputField()
    answer: int = dspy.OutputField(ge=1)

class App(dspy.Module):
    def __init__(self, k):
        super().__init__()
        made.append(self)
        self.k = k
        self.names = ("a", [1.5, None], {"b": True})
        self.example = dspy.Example(x=1, y=(2, {"z": 3}), dspy_uuid="u").with_inputs("x")
        self.unsure = dspy.Example(x=self.example)
        self.ask = dspy.ChainOfThought(Ask)
        self.plain = dspy.Predict(Ask, temperature=0.2)
        text = "who: Person, k: int = 3 -> days: list[datetime.date] | None"
        self.typed = dspy.Predict(dspy.Signature(text, custom_types={"Person": Person}))
        self.again = [self.plain, self]
        self.signature = Ask
        self.judge = dspy.LM("openai/judge", api_base="http://judge.example/v1")

    def forward(self, who):
        return self.ask(who=who)
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "saved_app.py").write_text(APP)
    monkeypatch.syspath_prepend(str(folder))
    import saved_app

    yield saved_app
    sys.modules.pop("saved_app", None)


def test_whole_program_is_made_without_its_constructor(app: Any, tmp_path: Path) -> None:
    program = app.App(k=5)
    program.plain.demos = [dspy.Example(who=app.Person(name="Ada"), answer=3)]
    program.save(tmp_path / "program", save_program=True)
    assert sorted(each.name for each in (tmp_path / "program").iterdir()) == ["program.json"]
    where = tmp_path / "program"
    loaded: Any = dspy.load(where, trust=["saved_app"], allow_unsafe_lm_state=True)
    assert type(loaded) is app.App
    assert app.made == [program]
    assert loaded.k == 5
    assert loaded.names == program.names
    assert loaded.example == program.example
    assert loaded.example.inputs().keys() == ["x"]
    assert loaded.unsure == program.unsure
    with pytest.raises(ValueError, match="with_inputs"):
        loaded.unsure.inputs()
    assert loaded.signature is app.Ask
    assert loaded.again == [loaded.plain, loaded]
    assert loaded.plain.config == {"temperature": 0.2}
    assert loaded.plain.demos == [{"who": app.Person(name="Ada"), "answer": 3}]
    assert loaded.judge.kwargs == program.judge.kwargs
    assert loaded.typed.signature.equals(program.typed.signature)
    assert loaded.ask.predict.signature.equals(program.ask.predict.signature)
    assert loaded.dump_state() == program.dump_state()
    with dspy.context(lm=FakeLM([{"reasoning": "r", "answer": 4}])):
        assert loaded(who=app.Person(name="x")).answer == 4


@pytest.mark.parametrize(
    "trust", [True, ["saved_app"], ["saved_app:App", "saved_app:Ask", "saved_app:Person"]]
)
def test_trust_names_modules_or_classes(trust: Any, app: Any, tmp_path: Path) -> None:
    app.App(k=1).save(tmp_path / "program", save_program=True)
    assert type(dspy.load(tmp_path / "program", trust=trust)) is app.App


def test_trust_takes_the_classes_themselves(app: Any, tmp_path: Path) -> None:
    app.App(k=1).save(tmp_path / "program", save_program=True)
    loaded = dspy.load(tmp_path / "program", trust=[app.App, app.Ask, app.Person])
    assert type(loaded) is app.App


def test_programs_of_our_own_classes_need_no_trust(tmp_path: Path) -> None:
    program = dspy.ChainOfThought("context: list[str], question -> answer: float")
    program.predict.demos = [{"question": "q", "answer": 0.5}]
    program.save(tmp_path / "program", save_program=True)
    loaded = dspy.load(tmp_path / "program")
    assert loaded.dump_state() == program.dump_state()


class Outside(dspy.Module):
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (print, "`value` is a `"),
        (Thing(), "`value` is a `"),
        ([{"a": Thing()}], "`value[0]['a']`"),
        ({1: 2}, "texts as keys"),
        (datetime.date(2024, 1, 1), "`value`"),
        (dspy.Example(on=datetime.date(2024, 1, 1)), "`value['on']`"),
        (float("nan"), "`value` is nan"),
        (holding_itself(), "holds itself"),
    ],
)
def test_attribute_that_no_file_can_hold_is_named_when_saved(
    value: Any, told: str, tmp_path: Path
) -> None:
    with pytest.raises(dspy.SavingError) as caught:
        Outside(value).save(tmp_path / "program", save_program=True)
    assert told in str(caught.value)
    assert not (tmp_path / "program").exists()


def test_class_that_is_not_found_by_its_name_is_refused_when_saved(tmp_path: Path) -> None:
    class Local(dspy.Module):
        pass

    with pytest.raises(dspy.SavingError, match="not found by that name"):
        Local().save(tmp_path / "program", save_program=True)


def test_class_of_the_script_that_runs_is_refused_when_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another script's `__main__` is another module."""
    monkeypatch.setattr(Outside, "__module__", "__main__")
    with pytest.raises(dspy.SavingError, match="script that runs"):
        Outside(1).save(tmp_path / "program", save_program=True)


def test_callbacks_of_a_whole_program_are_named(tmp_path: Path) -> None:
    program = dspy.Predict("a -> b", callbacks=[Thing()])
    with pytest.raises(dspy.SavingError, match="`callbacks"):
        program.save(tmp_path / "program", save_program=True)


def test_directory_and_file_are_not_confused(tmp_path: Path) -> None:
    program = dspy.Predict("a -> b")
    with pytest.raises(dspy.SavingError, match="without a suffix"):
        program.save(tmp_path / "x.json", save_program=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        program.save(tmp_path / "file", save_program=True)
    with pytest.raises(dspy.SavingError, match="modules_to_serialize"):
        program.save(tmp_path / "p", save_program=True, modules_to_serialize=[])
    program.save(tmp_path / "state.json")
    with pytest.raises(dspy.SavingError, match=r"program\.load"):
        dspy.load(tmp_path / "state.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(dspy.SavingError, match="no `program"):
        dspy.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        dspy.load(tmp_path / "nothing")
