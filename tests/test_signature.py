"""The signature class: its forms, its edits, and that it is a value that travels.

Not here: the text form (`test_grammar.py`), prompts and answers (`test_*_adapter.py`).
"""

import copy
import enum
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from typing import Any, Literal

import cloudpickle
import pydantic
import pytest

import dspylite
from dspylite import InputField, OutputField, Predict, Prediction, Signature, make_signature
from dspylite.errors import SignatureError
from dspylite.schema.signature import SignatureMeta, ensure_signature, infer_prefix
from tests import text_annotations
from tests.text_annotations import Trip


class QA(Signature):
    """Answer the question.

    Be brief.
    """

    question: str = InputField(desc="what is asked")
    k: int = InputField(default=3)
    answer: str = OutputField(desc="one word", max_length=20)
    score: float = OutputField(ge=0, le=1)


class Sourced(QA):
    """Answer with a source."""

    context: list[str] = InputField()
    source: str = OutputField(prefix="From:")


class Plain(Signature):
    text = InputField()
    tags: list[str] = OutputField()


def local_class() -> type[Signature]:
    class Inner(Signature):
        """Do it here."""

        text: str = InputField()
        mark: Literal["good", "bad"] = OutputField()

    return Inner


def types_of(signature: type[Signature]) -> dict[str, Any]:
    return {name: field.annotation for name, field in signature.fields.items()}


# --- class signatures ----------------------------------------------------------------------------


def test_fields_have_what_the_class_body_says() -> None:
    """Names, kinds, types, descriptions, defaults and bounds are all that a prompt is made from."""
    assert list(QA.input_fields) == ["question", "k"]
    assert list(QA.output_fields) == ["answer", "score"]
    assert types_of(QA) == {"question": str, "k": int, "answer": str, "score": float}
    question, k = QA.input_fields.values()
    assert (question.desc, question.prefix, question.required) == (
        "what is asked",
        "Question:",
        True,
    )
    assert (k.default, k.required) == (3, False)
    assert QA.output_fields["score"].constraints == (("ge", 0), ("le", 1))


def test_docstring_is_the_instructions() -> None:
    """The task is written where the class is, without its indentation."""
    assert QA.instructions == "Answer the question.\n\nBe brief."


def test_instructions_default_to_a_sentence_of_the_fields() -> None:
    """A model needs some task; the docstring of a base is not one."""
    assert Plain.instructions == "Given `text`, produce `tags`."
    assert make_signature("-> joke").instructions == "Produce `joke`."


def test_subclass_appends_to_the_fields_of_its_base() -> None:
    """One shared base holds what all signatures of a program have in common."""
    assert Sourced.signature == "question, k, context -> answer, score, source"
    assert Sourced.instructions == "Answer with a source."
    assert Sourced.output_fields["source"].prefix == "From:"


def test_subclass_without_a_docstring_keeps_the_instructions() -> None:
    """Narrowing a type does not change the task."""

    class Narrow(QA):
        answer: Literal["yes", "no"] = OutputField()

    assert Narrow.instructions == QA.instructions
    assert Narrow.signature == QA.signature
    assert types_of(Narrow)["answer"] == Literal["yes", "no"]
    assert types_of(QA)["answer"] is str


def test_text_annotations_are_resolved_where_the_class_stands() -> None:
    """`from __future__ import annotations` is in most modern modules."""
    assert types_of(Trip) == {
        "wish": str,
        "days": int,
        "places": list[text_annotations.Place],
        "start": date | None,
        "kind": Literal["walk", "swim"],
    }


def test_text_annotations_see_local_types() -> None:
    """Tests and notebooks define types and signatures inside functions."""
    found = text_annotations.local_signature().output_fields["found"]
    assert found.type_name == "list[Local]"


def test_text_annotation_of_an_unknown_type_is_refused() -> None:
    """The reader learns which class, and what to move where."""
    with pytest.raises(SignatureError, match=r"`Lost`.*Nowhere.*Define it before"):
        text_annotations.unresolvable_signature()


def test_attribute_without_a_field_is_refused() -> None:
    """A forgotten `InputField()` would leave the field out of the prompt without a word."""
    with pytest.raises(SignatureError, match=r"`Bad.question` is neither.*InputField\(\)"):

        class Bad(Signature):
            question: str
            answer: str = OutputField()


def test_field_named_like_its_own_type_is_refused() -> None:
    """Python evaluates `date: date = ...` in a class body with the field as its own type."""
    with pytest.raises(SignatureError, match=r"`Bad.date`.*has the name of its type"):

        class Bad(Signature):
            text: str = InputField()
            date: date = OutputField()


def test_field_names_of_a_class_are_checked() -> None:
    """A class body allows names that no keyword argument of a record may have."""
    with pytest.raises(SignatureError, match="`_hidden` cannot be the name of a field"):

        class Bad(Signature):
            _hidden: str = InputField()
            answer: str = OutputField()


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: InputField(dsc="x"), "`InputField` takes no `dsc`. Did you mean `desc`?"),
        (
            lambda: OutputField(minlength=3),
            "`OutputField` takes no `minlength`. Did you mean `min_length`?",
        ),
        (lambda: OutputField(alias="x"), "`OutputField` takes no `alias`."),
        (lambda: InputField(default_factory=list), "Did you mean `default`?"),
        (lambda: OutputField(allow_inf_nan=True), "takes no `allow_inf_nan=True`"),
        (lambda: OutputField(json_schema_extra=list), "must be a dict, not"),
    ],
)
def test_misspelt_field_options_are_refused(make: Callable[[], Any], part: str) -> None:
    """An option that is silently dropped is a bound that silently does not hold."""
    with pytest.raises(SignatureError) as raised:
        make()
    assert part in str(raised.value)


def test_default_of_an_output_is_kept_and_warned_of() -> None:
    """DSPy takes it and never uses it; a program with one runs, and its writer is told."""
    with pytest.warns(UserWarning, match="has no effect.*`| None`") as warned:
        field = OutputField(default=3)
    assert field.default == 3
    assert warned[0].filename == __file__


@pytest.mark.parametrize("call", [InputField, OutputField])
@pytest.mark.parametrize("option", ["format", "parser"])
def test_options_of_old_dspy_programs_are_taken_with_a_warning(
    call: Callable[..., Any], option: str
) -> None:
    """They have no effect in DSPy either."""
    with pytest.warns(DeprecationWarning, match=f"`{option}` of .* has no effect") as warned:
        field = call(**{option: str})
    assert field.json_schema_extra[option] is str
    assert warned[0].filename == __file__


def test_field_is_read_as_dspy_programs_read_it() -> None:
    """They look for pydantic's names, and for the words in `json_schema_extra`."""
    made = make_signature(
        {
            "q": (str, InputField(description="what", title="Q", json_schema_extra={"unit": "m"})),
            "a": (float, OutputField(ge=0, allow_inf_nan=False, json_schema_extra={"desc": "d"})),
            "b": OutputField(),
        }
    )
    q, a, b = made.fields.values()
    assert (q.desc, q.description, q.title, q.is_required()) == ("what", "what", "Q", True)
    assert (b.desc, b.description, b.title) == ("", None, None)
    assert (a.desc, a.constraints) == ("d", (("ge", 0),))
    assert q.json_schema_extra == {
        "desc": "what",
        "prefix": "Q:",
        "title": "Q",
        "unit": "m",
        "__dspy_field_type": "input",
    }
    assert a.json_schema_extra["constraints"] == "ge=0"
    assert b.json_schema_extra["desc"] == "${b}"


def test_placeholder_of_dspy_is_no_description() -> None:
    """DSPy writes `${name}` into saved programs where nobody described a field."""
    assert make_signature({"q": InputField(desc="${q}"), "a": OutputField()}).fields["q"].desc == ""
    assert QA.with_updated_fields("question", desc="${question}").fields["question"].desc == ""


def test_words_of_a_field_cannot_be_written_through_the_back_door() -> None:
    """It would change nothing, or all threads' prompts; `with_updated_fields` makes a new one."""
    with pytest.raises(TypeError):
        QA.fields["answer"].json_schema_extra["desc"] = "x"  # type: ignore[index]


@pytest.mark.parametrize(
    ("annotation", "bounds"),
    [
        (str, {"ge": 1}),
        (int, {"pattern": "x"}),
        (float, {"min_length": 1}),
        (str, {"pattern": "("}),
        (str, {"min_length": "a"}),
        (list[str], {"max_length": "b"}),
    ],
)
def test_bounds_that_cannot_hold_are_refused_when_the_predictor_is_made(
    annotation: Any, bounds: dict[str, Any]
) -> None:
    """Found at the first answer, the mistake would have cost a call and looked like the model's."""
    with pytest.raises(SignatureError, match=r"`answer: .*bounds that go with it"):
        Predict({"q": InputField(), "answer": (annotation, OutputField(**bounds))})


class _NoSchema:
    """A class that pydantic can neither read nor describe."""


@pytest.mark.parametrize(
    "annotation", [_NoSchema, list[_NoSchema], dict[str], 5, Callable[[], int]]
)  # type: ignore[misc]
def test_output_type_that_no_text_can_become_is_refused_when_the_predictor_is_made(
    annotation: Any,
) -> None:
    """pydantic's own error would name neither the field nor what to use instead."""
    with pytest.raises(SignatureError, match=r"`answer: .*Use a type that pydantic reads"):
        Predict({"q": InputField(), "answer": (annotation, OutputField())})


def test_inputs_may_be_of_any_class() -> None:
    """They are only written, as text."""
    assert Predict({"q": (_NoSchema, InputField()), "answer": OutputField()}).signature is not None


class Asked(Signature):
    """Ask."""

    text: str = InputField()
    more: str = InputField()
    reply: str = OutputField()


class Rated(Signature):
    stars: int = OutputField()
    more: int = InputField(desc="how many")


class Helper:
    limit = 3


class Joined(Asked, Rated, Helper):
    note: str = OutputField()


def test_signatures_are_joined_as_python_joins_classes() -> None:
    """The order is DSPy's: the last base first; the first base wins where both have a field."""
    assert Joined.signature == "more, text -> stars, reply, note"
    assert types_of(Joined)["more"] is str
    assert Joined.instructions == "Ask."
    assert Joined.limit == 3


# --- what a signature class is not ---------------------------------------------------------------


def test_calling_a_signature_class_is_refused_with_the_remedy() -> None:
    """It looks like a dataclass, so people try; the text shows the line they wanted."""
    with pytest.raises(SignatureError) as raised:
        QA(question="x")  # type: ignore[call-arg]
    assert "write `Predict(QA)(question=..., k=...)`" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["instructions", "fields", "input_fields", "output_fields", "signature"]
)
def test_assigning_to_a_signature_raises(name: str) -> None:
    """Threads share signatures, and adapters keep what they wrote for one."""
    with pytest.raises(AttributeError):
        setattr(QA, name, "other")


def test_the_mapping_of_fields_cannot_be_changed() -> None:
    """An edit through the back door would change every predictor of the signature."""
    with pytest.raises(TypeError):
        QA.fields["extra"] = QA.fields["answer"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        QA.fields["answer"].desc = "other"  # type: ignore[misc]
    QA.input_fields.pop("k") if isinstance(QA.input_fields, dict) else None
    assert list(QA.input_fields) == ["question", "k"]


def test_predictions_that_have_the_outputs_are_instances() -> None:
    """`isinstance` narrows the type for a checker, so it must tell the truth at run time."""
    whole = Prediction(answer="yes", score=0.5)
    assert isinstance(whole, QA)
    assert not isinstance(Prediction(answer="yes"), QA)
    assert not isinstance({"answer": "yes", "score": 0.5}, QA)
    assert not isinstance(whole, Signature)


# --- make_signature ------------------------------------------------------------------------------


def test_signature_called_with_a_text_makes_one() -> None:
    """DSPy's way of writing it, with instructions as the second argument."""
    found = Signature("question -> answer: int", "Count.")  # type: ignore[call-arg]
    assert (found.signature, found.instructions) == ("question -> answer", "Count.")
    assert isinstance(found, SignatureMeta)


def test_equal_texts_give_the_same_class() -> None:
    """A module that is built anew for every request does not fill the memory with classes."""
    assert make_signature("a -> b: int") is make_signature("a -> b: int")
    assert make_signature("a -> b: int") is not make_signature("a -> b: int", "Do it.")


def test_name_and_types_may_come_by_position() -> None:
    """`Signature` takes what `make_signature` takes, in the same order."""
    found = Signature("q -> a: Kind", "Do.", "Named", {"Kind": Literal["x"]})  # type: ignore[call-arg]
    assert repr(found) == "Named(q: str -> a: Literal['x'])"


def test_dict_of_another_signatures_fields_keeps_their_types() -> None:
    """`Signature(dict(other.fields))` is how DSPy programs copy one."""
    assert types_of(make_signature(dict(QA.fields))) == types_of(QA)
    assert types_of(make_signature({"q": (None, InputField()), "a": OutputField()})) == {
        "q": str,
        "a": str,
    }


def test_dict_of_fields_makes_a_signature() -> None:
    """Programs that compute their fields have no text and no class."""
    found = make_signature(
        {"text": (list[str], InputField(desc="what")), "n": (int, OutputField(ge=1))},
        "Count.",
        "Counting",
    )
    assert repr(found) == "Counting(text: list[str] -> n: int)"
    assert found.instructions == "Count."


def test_custom_types_serve_one_signature_only() -> None:
    """Two modules may each have their own `Place`."""

    class Place(pydantic.BaseModel):
        x: int

    first = make_signature("q -> place: Place", custom_types={"Place": Place})
    second = make_signature("q -> place: Place", custom_types={"Place": text_annotations.Place})
    assert types_of(first)["place"] is Place
    assert types_of(second)["place"] is text_annotations.Place
    with pytest.raises(SignatureError):
        make_signature("q -> place: Place", custom_types={})


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"q": (str, InputField()), "a": str}, "`a` needs `InputField(...)` or `OutputField(...)`"),
        ({"q": InputField(), "class": OutputField()}, "`class` cannot be the name"),
        ({1: InputField(), "a": OutputField()}, "Names of fields are texts, not 1"),
        ({"q": (str, InputField(), 3), "a": OutputField()}, "`q` needs `InputField(...)`"),
        ({"q": ("int", InputField()), "a": OutputField()}, "The type of `q` is the text 'int'"),
        ({"q": InputField()}, "no outputs"),
        ({}, "no outputs"),
    ],
)
def test_dict_that_is_no_signature_is_refused(fields: dict[str, Any], part: str) -> None:
    """Whoever computes fields makes mistakes too."""
    with pytest.raises(SignatureError) as raised:
        Predict(fields)
    assert part in str(raised.value)


def test_class_without_outputs_is_refused_by_predict() -> None:
    """There would be nothing to ask for."""

    class OnlyInputs(Signature):
        text: str = InputField()

    with pytest.raises(SignatureError, match="`OnlyInputs` has no outputs"):
        Predict(OnlyInputs)


def test_ensure_signature_replaces_instructions_where_given() -> None:
    """`Predict(QA, instructions=...)` changes the task of this predictor alone."""
    assert ensure_signature(QA) is QA
    assert ensure_signature(QA, "Guess.").instructions == "Guess."
    assert QA.instructions.startswith("Answer the question.")


# --- edits ---------------------------------------------------------------------------------------

EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "append": (lambda s: s.append("hint", InputField()), "question, k, hint -> answer, score"),
    "prepend": (lambda s: s.prepend("why", OutputField()), "question, k -> why, answer, score"),
    "insert": (lambda s: s.insert(1, "mid", InputField()), "question, mid, k -> answer, score"),
    "insert last": (lambda s: s.insert(-1, "z", OutputField()), "question, k -> answer, score, z"),
    "insert before last": (
        lambda s: s.insert(-2, "y", OutputField()),
        "question, k -> answer, y, score",
    ),
    "delete": (lambda s: s.delete("score"), "question, k -> answer"),
    "with_instructions": (lambda s: s.with_instructions("Guess."), "question, k -> answer, score"),
    "append_instructions": (
        lambda s: s.append_instructions("Now."),
        "question, k -> answer, score",
    ),
    "with_updated_fields": (
        lambda s: s.with_updated_fields("answer", list[str], desc="new"),
        "question, k -> answer, score",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_gives_a_new_signature_and_leaves_the_old_one(edit: str) -> None:
    """Other predictors and other threads hold the old one."""
    change, expected = EDITS[edit]
    before = (QA.signature, QA.instructions, dict(QA.fields))
    edited = change(QA)
    assert edited.signature == expected
    assert not edited.equals(QA)
    assert (QA.signature, QA.instructions, dict(QA.fields)) == before


def test_edit_changes_what_it_names_and_nothing_else() -> None:
    """An edit that lost a bound or a description would change the program."""
    edited = QA.with_updated_fields("answer", list[str], desc="new")
    assert edited.fields["answer"].annotation == list[str]
    assert edited.fields["answer"].desc == "new"
    assert edited.fields["answer"].constraints == (("max_length", 20),)
    assert edited.fields["score"] == QA.fields["score"]
    assert edited.instructions == QA.instructions
    assert QA.append_instructions("Now.").instructions == f"{QA.instructions}\n\nNow."


def test_edits_take_dspys_keywords() -> None:
    """Programs written for DSPy name the parameters."""
    made = QA.append(name="x", field=InputField(), type_=int)
    made = made.prepend(name="y", field=OutputField(), type_=list[int])
    made = made.insert(index=0, name="z", field=InputField(), type_=bool)
    made = made.delete(name="k").with_updated_fields(name="x", type_=float)
    made = made.with_instructions(instructions="A.").append_instructions(instructions="B.")
    assert made.signature == "z, question, x -> y, answer, score"
    assert (types_of(made)["x"], types_of(made)["y"]) == (float, list[int])
    assert made.instructions == "A.\n\nB."


def test_updated_field_takes_every_option_and_words_of_ones_own() -> None:
    """DSPy keeps whatever it is given in `json_schema_extra`."""
    made = QA.with_updated_fields(
        "k", prefix="How many:", default=5, ge=1, unit="pieces", format=str
    )
    field = made.fields["k"]
    assert (field.prefix, field.default, field.constraints) == ("How many:", 5, (("ge", 1),))
    assert field.json_schema_extra["unit"] == "pieces"
    assert field.json_schema_extra["format"] is str
    again = made.with_updated_fields("k", description="new", unit="kg").fields["k"]
    assert (again.desc, again.json_schema_extra["unit"], again.default) == ("new", "kg", 5)


def test_deleting_what_is_not_there_changes_nothing() -> None:
    """DSPy says so; programs delete a field from signatures that may not have it."""
    assert QA.delete("nope") is QA


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda: QA.with_updated_fields("k", dsc="x"), "no option `dsc`. Did you mean `desc`?"),
        (lambda: QA.with_updated_fields("k", __dspy_field_type="output"), "no option `__dspy"),
        (lambda: QA.with_updated_fields("k", "int"), "is the text 'int'"),
        (lambda: QA.with_updated_fields("scores"), "Did you mean `score`?"),
        (lambda: QA.append("answer", OutputField()), "has a field `answer` already"),
        (lambda: QA.append("class", OutputField()), "`class` cannot be the name"),
        (lambda: QA.append("hint", str), "needs `InputField(...)`"),
        (lambda: QA.insert(5, "hint", InputField()), "no place 5 among 2 input fields"),
        (lambda: QA.insert(-5, "hint", InputField()), "no place -5 among 2 input fields"),
    ],
)
def test_impossible_edits_are_refused(edit: Callable[[], Any], part: str) -> None:
    """Each names the value and the nearest thing that is possible."""
    with pytest.raises(SignatureError) as raised:
        edit()
    assert part in str(raised.value)


def test_signatures_equal_by_fields_order_and_instructions() -> None:
    """A program that was saved and loaded compares equal to itself."""
    text = make_signature("a, b -> c: int")
    assert text.equals(
        make_signature({"a": InputField(), "b": InputField(), "c": (int, OutputField())})
    )
    assert not text.equals(make_signature("b, a -> c: int"))
    assert not text.equals(make_signature("a, b -> c: float"))
    assert not text.equals(make_signature("a, b -> c: int", "Other."))
    assert not text.equals("a, b -> c: int")


# --- journeys ------------------------------------------------------------------------------------

TRAVELLERS: dict[str, Callable[[], type[Signature]]] = {
    "text": lambda: make_signature("context: list[str], k: int = 3 -> answer: Literal['a', 'b']"),
    "text with instructions": lambda: make_signature("q -> a", "Do it."),
    "module-level class": lambda: QA,
    "class with text annotations": lambda: Trip,
    "function-local class": local_class,
    "edited text": lambda: make_signature("q -> a").append(
        "b", OutputField(desc="more", ge=1), int
    ),
    "edited class": lambda: Sourced.delete("k").with_instructions("Other."),
}

CARRIERS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle {n}": lambda s, n=n: pickle.loads(pickle.dumps(s, n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "cloudpickle": lambda s: pickle.loads(cloudpickle.dumps(s)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("traveller", TRAVELLERS)
def test_signature_survives_its_journey(traveller: str, carrier: str) -> None:
    """Programs are pickled to processes and copied by optimisers, signatures and all (B 7.2)."""
    signature = TRAVELLERS[traveller]()
    twin = CARRIERS[carrier](signature)
    assert twin.equals(signature)
    assert repr(twin) == repr(signature)


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("traveller", TRAVELLERS)
def test_signature_survives_a_journey_to_another_process_and_back(
    traveller: str, dumps: Callable[[Any], bytes], pool: ProcessPoolExecutor
) -> None:
    """Only another process shows whether anything was left behind."""
    signature = TRAVELLERS[traveller]()
    assert pool.submit(pickle.loads, dumps(signature)).result(30).equals(signature)


def test_module_level_class_comes_back_as_itself() -> None:
    """Its methods and its place in the class tree are those of its module."""
    assert pickle.loads(pickle.dumps(QA)) is QA
    assert pickle.loads(pickle.dumps(Trip)) is Trip


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("question", "Question:"),
        ("short_answer", "Short Answer:"),
        ("someHTML", "Some HTML:"),
        ("HTMLParser", "HTML Parser:"),
        ("text2number", "Text 2 Number:"),
        ("B_é2aCa_", "B É2 A Ca:"),
    ],
)
def test_prefix_is_made_from_the_name(name: str, expected: str) -> None:
    """DSPy programs read `json_schema_extra["prefix"]`."""
    assert f"{infer_prefix(name)}:" == expected  # DSPy's function gives the words alone
    assert make_signature(f"{name} -> x").fields[name].json_schema_extra["prefix"] == expected


def test_repr_shows_fields_and_types() -> None:
    """It stands in errors and in the reprs of predictors."""

    class Level(enum.Enum):
        LOW = 1

    found = make_signature("q -> level: Level | None", custom_types={"Level": Level})
    assert repr(found) == "StringSignature(q: str -> level: Level | None)"
    assert repr(dspylite.Predict(found)) == f"Predict({found!r})"


@pytest.mark.parametrize("instructions", [["Be kind."], 5, b"Be kind."])
def test_instructions_that_are_no_text_are_a_clear_error(instructions: Any) -> None:
    fields: dict[str, Any] = {"q": InputField(), "a": OutputField()}
    for make in (
        lambda: make_signature("q -> a", instructions),
        lambda: make_signature(fields, instructions),
        lambda: make_signature("q -> a").with_instructions(instructions),
    ):
        with pytest.raises(SignatureError, match="`instructions` of a signature must be"):
            make()


def test_custom_types_that_are_no_dict_are_a_clear_error() -> None:
    wrong: Any = ["Foo"]
    with pytest.raises(SignatureError, match="`custom_types` is a dict"):
        make_signature("q -> a: Foo", custom_types=wrong)
