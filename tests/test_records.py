"""`Example`, `Prediction`, `Completions`: what DSPy programs do with them, and that they travel."""

import copy
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
    assert Example({"a": 1}, b=2) == Example(a=1, b=2)


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
    with pytest.raises(ValueError, match=r"\['answer', 'question'\].*with_inputs"):
        Example(question="1+1?", answer="2").inputs()


def test_without_leaves_out_and_keeps_the_rest() -> None:
    """A demo without its answer is a question."""
    record = example()
    assert list(record.without("answer", "nope")) == ["question", "tags"]
    assert list(record) == ["question", "answer", "tags"]


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
    with pytest.raises(TypeError, match=r"with a `score`.*answer, points"):
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
