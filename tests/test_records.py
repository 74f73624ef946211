"""`Example`, `Prediction`, `Completions`: what DSPy programs do with them, and that they travel."""

import copy
import datetime
import decimal
import operator
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import pydantic
import pytest

from dspylite import Completions, Example, Prediction, Usage

CARRIERS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle {n}": lambda r, n=n: pickle.loads(pickle.dumps(r, n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "cloudpickle": lambda r: pickle.loads(cloudpickle.dumps(r)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


class Model(pydantic.BaseModel):
    city: str


def example() -> Example:
    return Example(question="1+1?", answer="2", tags=["sum"]).with_inputs("question")


# --- reading and writing -------------------------------------------------------------------------


def test_values_are_read_as_attributes_and_as_items() -> None:
    """Both spellings are common in DSPy programs."""
    record = example()
    assert (record.answer, record["answer"], record.get("answer")) == ("2", "2", "2")
    assert record.get("nope", 3) == 3
    assert "answer" in record
    assert "nope" not in record


def test_values_are_written_as_attributes_and_as_items() -> None:
    """What one spelling writes, the other reads."""
    record = Example()
    record.a = 1
    record["b"] = 2
    assert dict(record.items()) == {"a": 1, "b": 2}
    del record.a
    del record["b"]
    assert len(record) == 0


def test_record_goes_over_its_names_in_the_order_given() -> None:
    """`dict(record)`, `list(record)` and `len` are those of a mapping."""
    record = example()
    assert list(record) == list(record.keys()) == ["question", "answer", "tags"]
    assert list(record.values()) == ["1+1?", "2", ["sum"]]
    assert len(record) == 3
    assert dict(record) == {"question": "1+1?", "answer": "2", "tags": ["sum"]}


def test_example_starts_from_another_and_overrides() -> None:
    """The base is left as it was; its inputs are kept."""
    base = example()
    changed = Example(base, answer="3", extra=True)
    assert changed.answer == "3"
    assert list(changed.inputs()) == ["question"]
    assert base.answer == "2"
    assert "extra" not in base
    assert Example({"a": 1}, b=2) == Example(base={"a": 1}, b=2) == Example(a=1, b=2)


def test_records_start_from_each_other() -> None:
    """A labelled example becomes a prediction, in a metric's test say; DSPy's would be empty."""
    assert Prediction(example()).answer == "2"
    assert Prediction(Prediction(answer="2"), score=1) == Prediction(answer="2", score=1)
    assert list(Example(Prediction(example())).inputs()) == ["question"]


@pytest.mark.parametrize("base", [3, "text", [1], [("a", 1, 2)]])
@pytest.mark.parametrize("kind", [Example, Prediction])
def test_record_from_something_else_is_refused(kind: Any, base: Any) -> None:
    """DSPy makes an empty record of it, and the values are lost."""
    with pytest.raises(TypeError, match=f"`{kind.__name__}` starts from a record or a dict, not"):
        kind(base)


@pytest.mark.parametrize("name", ["self", "items", "copy", "_store", "_input_keys", "a b", "__x"])
def test_values_may_have_any_name(name: str) -> None:
    """Columns of a data set are not for us to name; what is no attribute is read as an item."""
    for record in (Example(**{name: 1}), Prediction(**{name: 1}), Example({name: 1}).copy()):
        assert record[name] == record.get(name) == 1
        assert record.items() == [(name, 1)]
        assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == record


NOTED = Example(question="1+1?", dspy_uuid="u", answer="2").with_inputs("question")


def test_notes_are_kept_and_passed_over() -> None:
    """DSPy keeps ids and splits under `dspy_` names, which no prompt and no table is to show."""
    assert NOTED.keys() == ["question", "answer"]
    assert NOTED.values() == ["1+1?", "2"]
    assert NOTED.items() == [("question", "1+1?"), ("answer", "2")]
    assert len(NOTED) == 2
    assert dict(NOTED) == {"question": "1+1?", "answer": "2"}
    assert "dspy_uuid" not in repr(NOTED)
    assert NOTED.dspy_uuid == NOTED["dspy_uuid"] == NOTED.get("dspy_uuid") == "u"
    assert "dspy_uuid" in NOTED
    assert NOTED.copy().dspy_uuid == NOTED.labels().dspy_uuid == "u"
    assert NOTED.toDict() == {"question": "1+1?", "dspy_uuid": "u", "answer": "2"}


def test_notes_are_shown_if_asked_for() -> None:
    """By DSPy's keyword, or by position."""
    assert NOTED.keys(include_dspy=True) == NOTED.keys(True) == ["question", "dspy_uuid", "answer"]
    assert NOTED.values(include_dspy=True) == ["1+1?", "u", "2"]
    assert NOTED.items(include_dspy=True)[1] == ("dspy_uuid", "u")


class Counted(Example):
    """A record class of a user, with things of its own."""

    seen = 0

    def __init__(self, base: Any = None, **values: Any) -> None:
        super().__init__(base, **values)
        self._size = 1

    @property
    def size(self) -> int:
        return self._size

    @size.setter
    def size(self, value: int) -> None:
        self._size = value


def test_attributes_of_a_users_class_are_no_values() -> None:
    """What the class defines is read and written as in any class."""
    record = Counted(a=1)
    record.seen = 3
    record.size = 4
    assert (record.seen, record.size, dict(record)) == (3, 4, {"a": 1})
    assert (record.copy().seen, record.with_inputs("a").inputs().size) == (3, 4)
    assert isinstance(record.without("a"), Counted)
    del record.seen
    assert record.seen == 0


def test_value_never_hides_a_method() -> None:
    """In DSPy an assignment by a method's name breaks the record."""
    record = Example(a=1)
    record.keys = 5
    assert record["keys"] == 5
    assert record.keys() == ["a", "keys"]
    with pytest.raises(AttributeError):
        Prediction(a=1).completions = []


@pytest.mark.parametrize("record", [example(), Prediction(question="1+1?", answer="2")])
def test_unknown_attribute_names_the_nearest(record: Example) -> None:
    """A misspelt field is the commonest mistake of all."""
    with pytest.raises(AttributeError) as raised:
        _ = record.anwser
    assert "has no value `anwser`. Did you mean `answer`?" in str(raised.value)
    assert "It has: question, answer" in str(raised.value)
    assert getattr(record, "anwser", "default") == "default"
    assert not hasattr(record, "anwser")


def test_deleting_an_unknown_attribute_raises_an_attribute_error() -> None:
    """As of any object."""
    with pytest.raises(AttributeError, match="nope"):
        del example().nope


@pytest.mark.parametrize("name", ["__len_hint__", "__deepcopy__", "__array__", "_ipython_display_"])
def test_special_names_are_never_values(name: str) -> None:
    """Libraries look for their hooks on every object; an answer there would confuse them."""
    assert not hasattr(Example(a=1), name)


# --- inputs and labels ---------------------------------------------------------------------------


def test_inputs_and_labels_share_out_the_values() -> None:
    """A batch passes the inputs; a metric reads the labels."""
    record = example()
    assert dict(record.inputs()) == {"question": "1+1?"}
    assert dict(record.labels()) == {"answer": "2", "tags": ["sum"]}


def test_with_inputs_returns_a_copy() -> None:
    """Two programs may take different inputs from one data set."""
    record = example()
    other = record.with_inputs("answer")
    assert list(other.inputs()) == ["answer"]
    assert list(record.inputs()) == ["question"]


def test_inputs_unsaid_raise_with_the_remedy() -> None:
    """Passing everything, labels included, would tell the model the answer."""
    record = Example(question="1+1?", answer="2")
    for read in (record.inputs, record.labels, example().labels().inputs):
        with pytest.raises(ValueError, match=r"\['answer', .*\].*with_inputs"):
            read()


def test_without_leaves_out_and_keeps_the_rest() -> None:
    """A demo without its answer is a question."""
    record = example()
    assert list(record.without("answer")) == ["question", "tags"]
    assert list(record.without("question").inputs()) == []
    assert list(record) == ["question", "answer", "tags"]
    with pytest.raises(KeyError, match="Did you mean `answer`"):
        record.without("anwser")


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [lambda r: r.copy(), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("record", [example(), Prediction(answer="2"), Prediction(score=1.0)])
def test_writing_to_a_copy_leaves_the_original(
    record: Example, copied: Callable[[Any], Any]
) -> None:
    """Threads get copies of one example and write into them."""
    before = dict(record)
    twin = copied(record)
    twin.answer = "other"
    twin["new"] = 1
    assert dict(record) == before
    assert type(twin) is type(record)


def test_copy_overrides_values() -> None:
    """`copy(answer=...)` is how demos are varied."""
    assert example().copy(answer="3").answer == "3"
    assert list(example().copy(answer="3").inputs()) == ["question"]


def test_copy_is_shallow_and_deepcopy_is_not() -> None:
    """As of any container."""
    record = example()
    assert record.copy().tags is record.tags
    assert copy.deepcopy(record).tags is not record.tags


@pytest.mark.parametrize("carrier", CARRIERS)
def test_example_survives_its_journey(carrier: str) -> None:
    """Inputs go to worker processes and come back in errors."""
    record = example()
    twin = CARRIERS[carrier](record)
    assert twin == record
    assert list(twin.inputs()) == ["question"]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_prediction_survives_its_journey_with_completions_and_usage(carrier: str) -> None:
    """What a batch on processes paid for comes back whole."""
    prediction = Prediction.from_completions({"answer": ["a", "b"]})
    prediction.set_lm_usage({"m": Usage(prompt_tokens=2, calls=1)})
    twin = CARRIERS[carrier](prediction)
    assert twin == prediction
    assert twin.completions.answer == ["a", "b"]
    assert twin.get_lm_usage() == prediction.get_lm_usage()
    assert twin.get_lm_usage()["m"]["prompt_tokens"] == 2


# --- equality and hash ---------------------------------------------------------------------------


def test_records_are_equal_by_their_values() -> None:
    """Which of the values are inputs is not part of the value."""
    assert example() == example().with_inputs("answer")
    assert example() != example().copy(answer="3")
    assert Prediction(a=1) == Prediction(a=1)
    assert example() != {"question": "1+1?", "answer": "2", "tags": ["sum"]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Example(a=1, b=2), Example(b=2, a=1)),
        (Example(a=[1]), Example(a=[1.0])),
        (Example(a={"x": 1, "y": 2}), Example(a={"y": 2, "x": 1})),
        (Example(a=([1], {2, 3})), Example(a=([1], {3, 2}))),
        (Example(a=Model(city="x")), Example(a=Model(city="x"))),
        (Example(a=1), Prediction(a=True)),
    ],
)
def test_equal_records_have_equal_hashes(one: Example, other: Example) -> None:
    """Else a set would hold the same example twice."""
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1


def test_records_that_differ_in_a_list_have_different_hashes() -> None:
    """Training sets hold lists, and a hash that ignored them would make every lookup a scan."""
    assert len({hash(Example(a=[n])) for n in range(100)}) == 100


# --- plain form ----------------------------------------------------------------------------------


def test_to_dict_gives_plain_dicts_and_lists() -> None:
    """The result goes into `json.dumps`."""
    record = Example(a=Example(b=[Model(city="x"), (Example(c=1),)]), d={"e": Model(city="y")})
    assert record.toDict() == {"a": {"b": [{"city": "x"}, [{"c": 1}]]}, "d": {"e": {"city": "y"}}}


def test_repr_shows_class_and_values() -> None:
    """Logs and tests print it."""
    assert repr(Prediction(answer="Paris", n=2)) == "Prediction(answer='Paris', n=2)"
    assert str(Example(a=[1])) == "Example(a=[1])"
    assert repr(Prediction.from_completions({"a": [1, 2]})) == "Prediction(a=1) (2 completions)"


def test_to_dict_leaves_what_json_does_not_know() -> None:
    """As DSPy does: a reader gets dates, and `json.dumps(..., default=str)` writes them."""
    day = datetime.date(2024, 5, 1)
    assert Example(day=day, kind=Model).toDict() == {"day": day, "kind": Model}


def test_to_dict_asks_what_can_tell() -> None:
    """A record class of another library, DSPy's among them, knows its own plain form."""

    class Foreign:
        def toDict(self) -> dict[str, int]:  # noqa: N802
            return {"x": 1}

    assert Example(a=[Foreign()]).toDict() == {"a": [{"x": 1}]}


# --- predictions as numbers ----------------------------------------------------------------------


def test_predictions_add_and_divide_by_score() -> None:
    """Metrics that return predictions are averaged by the evaluator."""
    low, high = Prediction(score=0.5), Prediction(score=2)
    assert low + high == high + low == 2.5
    assert low + 1 == 1 + low == 1.5
    assert sum([low, high]) == 2.5
    assert high / low == 4
    assert (high / 4, 1 / low) == (0.5, 2)
    assert float(high) == 2.0


def test_predictions_subtract_and_multiply_by_score() -> None:
    """Weights and improvements are computed from scores, too."""
    low, high = Prediction(score=0.5), Prediction(score=2)
    assert (high - low, high - 1, 1 - low) == (1.5, 1, 0.5)
    assert (high * low, high * 3, 3 * low) == (1, 6, 1.5)
    assert low + decimal.Decimal(1) == 1.5


@pytest.mark.parametrize("other", ["1", None, [1], 1j, Example(score=1)])
@pytest.mark.parametrize(
    "compute",
    [
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
    ],
)
def test_prediction_and_what_is_no_number_cannot_be_computed_with(
    compute: Callable[[Any, Any], Any], other: Any
) -> None:
    """A text that looks like a number is a mistake, not a number."""
    for pair in ((Prediction(score=1), other), (other, Prediction(score=1))):
        with pytest.raises(TypeError):
            compute(*pair)


def test_predictions_compare_by_score() -> None:
    """The best of several attempts is the one with the highest score."""
    low, high = Prediction(score=0.5), Prediction(score=2)
    assert low < high
    assert low <= high
    assert high > low
    assert high >= low
    assert low < 1 <= high
    assert max([low, high]) is high
    assert low <= Prediction(score=0.5) >= low
    assert not low < Prediction(score=0.5)
    assert not low > Prediction(score=0.5)


@pytest.mark.parametrize(
    "compute",
    [
        lambda p: p + 1,
        lambda p: 1 / p,
        lambda p: p < 1,
        lambda p: p >= 1,
        float,
        lambda p: sum([p]),
    ],
)
def test_prediction_without_a_score_cannot_be_computed_with(
    compute: Callable[[Prediction], Any],
) -> None:
    """The error says which values there are, for the score may have another name."""
    with pytest.raises(ValueError, match=r"with a `score`.*answer, points"):
        compute(Prediction(answer="x", points=3))


# --- completions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [{"answer": ["a", "b"], "n": [1, 2]}, [{"answer": "a", "n": 1}, {"answer": "b", "n": 2}]],
)
def test_completions_are_read_by_column_and_by_row(source: Any) -> None:
    """`completions.answer[1]` and `completions[1].answer` are both DSPy's."""
    found = Completions(source)
    assert found.answer == found["answer"] == ["a", "b"]
    assert found[1] == Prediction(answer="b", n=2)
    assert found[-1] == found[1]
    assert [row.n for row in found] == [1, 2]
    assert len(found) == 2
    assert "answer" in found
    assert dict(found.items()) == {"answer": ["a", "b"], "n": [1, 2]}


def test_prediction_holds_the_first_completion() -> None:
    """Programs that want one answer read the prediction itself."""
    prediction = Prediction.from_completions([{"answer": "a"}, {"answer": "b"}])
    assert prediction.answer == "a"
    assert prediction.completions.answer == ["a", "b"]


def test_prediction_of_one_answer_has_one_completion() -> None:
    """Code that loops over completions works for one too."""
    assert Prediction(answer="a").completions.answer == ["a"]


def test_completions_of_unequal_length_are_refused() -> None:
    """Rows could not be told any more."""
    with pytest.raises(ValueError, match=r"'a': 2, 'b': 1"):
        Completions({"a": [1, 2], "b": [1]})


@pytest.mark.parametrize("values", ["ab", 5, None, {"x": 1}])
def test_column_that_is_no_list_is_refused(values: Any) -> None:
    """The letters of a text would pass for its answers."""
    with pytest.raises(ValueError, match="`a` needs a list of values, not"):
        Completions({"a": values})


@pytest.mark.parametrize("second", [{"b": 1}, {}, {"a": 1, "b": 2}])
def test_completions_with_different_fields_are_refused(second: dict[str, int]) -> None:
    """Their values would move into the rows of others; in DSPy they do."""
    with pytest.raises(ValueError, match=r"the first has \['a'\], number 1 has"):
        Completions([{"a": 1}, second])


def test_completions_are_made_from_completions_and_records() -> None:
    """Programs pass on what they have."""
    rows = Completions([Prediction(a=1), Example(a=2)])
    assert (
        rows.a == Completions(rows).a == Prediction.from_completions(rows).completions.a == [1, 2]
    )


def test_completions_keep_their_signature() -> None:
    """DSPy's `majority` looks there for the last output."""
    assert Completions({"a": [1]}, signature="q -> a").signature == "q -> a"
    assert Completions({"a": [1]}).signature is None


@pytest.mark.parametrize("carrier", CARRIERS)
def test_completions_survive_their_journey(carrier: str) -> None:
    """They travel inside predictions and alone."""
    twin = CARRIERS[carrier](Completions({"a": [1, 2]}))
    assert (twin.a, len(twin), twin[1].a) == ([1, 2], 2, 2)


def test_no_completions_are_none_at_all() -> None:
    """Length and iteration need no first column; DSPy's raise `StopIteration`."""
    assert len(Completions([])) == len(Completions({})) == 0
    assert list(Completions([])) == []
    assert len(Prediction.from_completions([])) == 0


@pytest.mark.parametrize("index", [2, -3])
def test_completion_out_of_range_is_an_index_error(index: int) -> None:
    """Iteration by index ends with it."""
    with pytest.raises(IndexError, match="There are 2 completions"):
        Completions({"a": [1, 2]})[index]


def test_unknown_completion_field_names_the_nearest() -> None:
    """As of predictions."""
    with pytest.raises(AttributeError, match=r"Did you mean `answer`\?"):
        _ = Completions({"answer": ["a"]}).anwser


@pytest.mark.parametrize("name", ["base", "self", "signature", "list_or_dict", "cls"])
def test_completion_fields_may_have_the_names_of_our_parameters(name: str) -> None:
    """Which words a signature uses is not for our constructors to restrict."""
    found = Completions([{name: "a"}, {name: "b"}])
    assert found[1][name] == "b"
    assert Prediction.from_completions(found)[name] == "a"


# --- usage ---------------------------------------------------------------------------------------


def test_usage_is_none_until_somebody_counted() -> None:
    """Zero would be a claim."""
    prediction = Prediction(answer="a")
    assert prediction.get_lm_usage() is None
    prediction.set_lm_usage(
        {"m": Usage(prompt_tokens=3, completion_tokens=1, total_tokens=4, calls=1)}
    )
    assert prediction.get_lm_usage() == {
        "m": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, "calls": 1}
    }


def test_usage_may_be_a_dict_as_in_dspy() -> None:
    """A program that sums the usage of its parts gives it back in the form that it got."""
    prediction = Prediction(answer="a")
    prediction.set_lm_usage({"m": {"prompt_tokens": 3, "completion_tokens": 1}})
    assert prediction.get_lm_usage() == {"m": {"prompt_tokens": 3, "completion_tokens": 1}}
    (prediction.get_lm_usage() or {})["m"]["prompt_tokens"] = 9
    assert (prediction.get_lm_usage() or {})["m"]["prompt_tokens"] == 3
    prediction.set_lm_usage(None)
    assert prediction.get_lm_usage() is None


@pytest.mark.parametrize(
    "copied", [lambda p: p.copy(), lambda p: p.without("answer"), lambda p: p.copy(answer="b")]
)
def test_copies_keep_the_usage(copied: Callable[[Prediction], Prediction]) -> None:
    """What was paid was paid; DSPy's copies forget it."""
    prediction = Prediction(answer="a")
    prediction.set_lm_usage({"m": Usage(calls=1)})
    assert copied(prediction).get_lm_usage() == prediction.get_lm_usage()


def test_usage_of_a_copy_is_its_own() -> None:
    """A copy that is counted further leaves the first prediction's bill alone."""
    first = Prediction(answer="a")
    first.set_lm_usage({"m": Usage(calls=1)})
    twin = first.copy()
    twin.set_lm_usage({"m": Usage(calls=2)})
    assert (first.get_lm_usage() or {})["m"]["calls"] == 1


def test_provider_usage_is_read_with_its_details() -> None:
    """What is missing or no number counts as 0, and calls are counted."""
    found = Usage.from_provider(
        {
            "prompt_tokens": 7,
            "completion_tokens": None,
            "prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": None},
        }
    )
    assert found.as_dict() == {
        "prompt_tokens": 7,
        "completion_tokens": 0,
        "total_tokens": 7,
        "calls": 1,
        "cached_tokens": 5,
    }
    assert (found + found).details == {"cached_tokens": 10}
    assert Usage.from_provider(None).total_tokens == 0
