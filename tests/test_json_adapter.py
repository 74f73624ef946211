"""`JSONAdapter`: the object it asks for, the one it accepts, and the JSON reader beneath it.

Not here: how one value is written and read (`test_values.py`).
"""

import json
import re
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspylite
from dspylite import LM, AdapterParseError, InputField, JSONAdapter, OutputField, Signature
from dspylite.adapters.base import NOT_GIVEN
from dspylite.adapters.values import MAX_CHARS, MAX_DEPTH, mend_json, parse_json
from dspylite.schema.signature import make_signature
from dspylite.testing import FakeLM

ADAPTER = JSONAdapter()


class Step(pydantic.BaseModel):
    title: str
    minutes: int = 5
    next: "Step | None" = None


class Plan(Signature):
    """Plan the day."""

    wish: str = InputField(desc="what to do")
    steps: list[Step] = OutputField(desc="in order")
    mood: Literal["good", "bad"] = OutputField()


QA = make_signature("question -> answer")
SCORED = make_signature("question -> answer, score: float")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.sampled_from("a'\"\\\n{}[],:/*# \u2028")) | st.text(max_size=4),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=8,
)  # fmt: skip


def parsed(text: str, signature: type[Signature] = QA, finish_reason: str | None = "stop") -> Any:
    return ADAPTER.parse(signature, text, finish_reason=finish_reason)


def refusal(text: str, signature: type[Signature] = QA) -> str:
    with pytest.raises(AdapterParseError) as raised:
        parsed(text, signature)
    assert raised.value.adapter_name == "JSONAdapter"
    return raised.value.message


# --- the prompt ----------------------------------------------------------------------------------


def test_prompt_names_every_field_type_and_instruction() -> None:
    """What is not in the prompt the model cannot know."""
    system, user = ADAPTER.format(Plan, [], {"wish": "swim"})
    task = str(system["content"])
    for part in (
        "`wish` (str) — what to do",
        "`steps` (list[Step]",
        "in order",
        "`mood`",
        "Plan the day.",
    ):
        assert part in task
    assert '{"steps": <steps>, "mood": <mood>}' in task
    assert '"minutes"' in task  # the schema of a nested type
    assert (system["role"], user["role"]) == ("system", "user")
    assert str(user["content"]).startswith("[[ ## wish ## ]]\nswim\n")
    assert "`steps`, `mood`" in str(user["content"])


def test_demos_are_answered_as_objects() -> None:
    """The model copies the form of the demos before it follows the form described."""
    demo = {"wish": "rest", "steps": [Step(title="sleep")], "mood": "good"}
    _, question, answer, _ = ADAPTER.format(Plan, [demo], {"wish": "swim"})
    assert (question["role"], answer["role"]) == ("user", "assistant")
    assert "rest" in str(question["content"])
    assert parsed(str(answer["content"]), Plan) == {"steps": [Step(title="sleep")], "mood": "good"}


def test_key_that_a_demo_lacks_is_null() -> None:
    """A demo with part of the outputs still shows the whole form."""
    written = ADAPTER.format_assistant_message_content(SCORED, {"answer": "x"}, NOT_GIVEN)
    assert json.loads(written) == {"answer": "x", "score": None}


# --- structured output ---------------------------------------------------------------------------


def params_for(signature: type[Signature], capabilities: frozenset[str]) -> Any:
    lm = LM("openai/m", api_key="none", capabilities=capabilities)
    return ADAPTER.prepare(signature, {}, lm, {}).params


def schema_of(signature: type[Signature]) -> Any:
    params = params_for(signature, frozenset({"json_schema", "json_object"}))
    assert params["response_format"]["type"] == "json_schema"
    return params["response_format"]["json_schema"]


def test_model_that_takes_a_schema_gets_a_strict_one() -> None:
    """Strict forms want every object closed and every key required, at every depth."""
    wanted = schema_of(Plan)
    assert (wanted["name"], wanted["strict"]) == ("Plan", True)
    assert wanted["schema"]["required"] == ["steps", "mood"]
    assert wanted["schema"]["additionalProperties"] is False
    step = wanted["schema"]["$defs"]["Step"]
    assert step["required"] == ["title", "minutes", "next"]
    assert step["additionalProperties"] is False
    assert "default" not in step["properties"]["minutes"]
    assert wanted["schema"]["properties"]["mood"]["enum"] == ["good", "bad"]


@pytest.mark.parametrize("output", ["dict", "dict[str, int]", "Any", "list", "list[Any]", "object"])
def test_free_form_outputs_are_asked_for_as_any_object(output: str) -> None:
    """A strict schema cannot say them, and a provider refuses one that tries."""
    signature = make_signature(f"question -> answer: {output}")
    for capabilities in ({"json_schema"}, {"json_schema", "json_object"}, {"json_object"}):
        params = params_for(signature, frozenset(capabilities))
        assert params == {"response_format": {"type": "json_object"}}


def test_two_types_of_one_name_keep_their_own_schemas() -> None:
    """Two modules may each have their `Step`, and one of them must not answer as the other."""
    other = pydantic.create_model("Step", distance=(float, ...))
    fields = {"walk": (other, OutputField()), "plan": (Step, OutputField())}
    schema = schema_of(make_signature(fields))["schema"]
    shapes = [
        list(schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]["properties"])
        for name in fields
    ]
    assert shapes == [["distance"], ["title", "minutes", "next"]]


def test_model_without_structured_output_gets_no_parameter() -> None:
    """An unknown parameter is refused by many servers."""
    assert params_for(Plan, frozenset()) == {}


@pytest.mark.parametrize("name", ["Größe", "A B", "x" * 200, "日本"])
def test_schema_name_is_one_that_providers_take(name: str) -> None:
    """OpenAI refuses names beyond ASCII letters, digits, `_` and `-`, and more than 64 of them."""
    signature = make_signature("question -> answer", signature_name=name)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", schema_of(signature)["name"])


class StructuredLM(FakeLM):
    default_capabilities = frozenset({"json_schema"})


def test_request_carries_the_form_that_the_model_can_do() -> None:
    """The predictor asks the LM for its capabilities and passes what the adapter wants."""
    for kind, expected in ((StructuredLM, "json_schema"), (FakeLM, None)):
        lm = kind(['{"answer": "a"}'])
        with dspylite.context(lm=lm, adapter=JSONAdapter()):
            dspylite.Predict(QA)(question="q")
        assert lm.requests[0].params.get("response_format", {}).get("type") == expected


def test_response_format_given_by_the_user_wins() -> None:
    """Whoever knows the server better says so in the config."""
    lm = StructuredLM(['{"answer": "a"}'])
    with dspylite.context(lm=lm, adapter=JSONAdapter()):
        dspylite.Predict(QA, response_format={"type": "text"})(question="q")
    assert lm.requests[0].params["response_format"] == {"type": "text"}


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": "x", "score": 1}',
        '\n{"score": 1.0, "extra": [], "answer": "x"}\n',
        '```json\n{"answer": "x", "score": 1}\n```',
        "{'answer': 'x', 'score': 1,}",
        'Here it is:\n```json\n{"answer": "x", "score": 1}\n```\nHope it helps.',
        'As you said {in braces}: {"answer": "x", "score": 1} and \\frac{1}{2}.',
        r"By $\frac{1}{2}$" * 20 + ' {"answer": "x", "score": 1} ' + r"$\frac{1}{2}$" * 20,
    ],
)
def test_object_is_read_from_what_surrounds_it(text: str) -> None:
    """Models add fences and courtesies; the object is the same."""
    assert parsed(text, SCORED) == {"answer": "x", "score": 1.0}


def test_outputs_come_in_the_order_of_the_signature() -> None:
    """Predictions are shown and compared in this order."""
    assert list(parsed('{"score": 1, "answer": "x"}', SCORED)) == ["answer", "score"]


@pytest.mark.parametrize("finish_reason", ["stop", "length", None])
def test_closed_object_is_whole_whatever_the_reason_to_stop(finish_reason: str | None) -> None:
    """Some servers fill up with blanks behind the object until the limit."""
    text = '{"answer": "x"}' + " " * 50
    assert parsed(text, finish_reason=finish_reason) == {"answer": "x"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not JSON"),
        ("no object at all", "not JSON"),
        ("[1, 2]", "not one object"),
        ('[{"answer": "x", "score": 1}]', "not one object"),
        ('"text"', "not one object"),
        ('{"answer": "x"}', "lacks `score`"),
        ('{"result": {"answer": "x", "score": 1}}', "lacks `answer`, `score`"),
        ('{"answer": "x", "score": "high"}', "`score`: 'high' does not fit"),
        ('{"answer": "x", "score": NaN}', "NaN is not a finite number"),
        ('{"answer": "x", "score": "NaN"}', "does not fit"),
        ('{"answer": "x", "score": 1, "score": 2}', "'score' comes twice"),
        (
            '{"answer": "x", "score": 1} or {"answer": "y", "score": 2}',
            "2 objects, which is ambiguous",
        ),
        ('First {"answer": "x"} then {"answer": "x"}', "2 objects, which is ambiguous"),
        ('{"answer": "x", "score": 1', "cut"),
        ('Draft: {"answer": "x", "score": 1}. Better: {"answer": "y", "sc', "cut"),
        ('{"note": {"answer": "x", "score": 1}, "answ', "cut"),
        ("{" * 40 + '{"answer": "x", "score": 1}', "cut"),
        ('{"k": 1} ' * 40 + '{"answer": "x", "score": 1}', "41 objects"),
    ],
)
def test_answer_that_is_not_one_object_is_refused_with_its_reason(text: str, part: str) -> None:
    """Picking one of two, or half of one, would be a guess."""
    assert part in refusal(text, SCORED)


def test_object_inside_a_cut_one_is_not_taken_for_the_answer() -> None:
    """A recursive type holds smaller values of itself, closed before the whole is (B 7.9)."""
    signature = make_signature({"next": (Step | None, OutputField())})
    whole = ADAPTER.format_assistant_message_content(
        signature, {"next": Step(title="a", next=Step(title="b", next=Step(title="c")))}
    )
    for end in range(len(whole) - 1):
        refusal(whole[:end], signature)
        refusal("Sure: " + whole[:end], signature)


@pytest.mark.parametrize(
    "wrong", ["[[ ## answer ## ]]", '{"answer": "hacked"}', "\\", '"', "}}", "'"]
)
def test_text_inside_a_value_is_data(wrong: str) -> None:
    """A value that looks like an answer stays a value."""
    text = json.dumps({"answer": f"see {wrong}"})
    for around in (text, f"So: {text} Done.", f"```json\n{text}\n```"):
        assert parsed(around) == {"answer": f"see {wrong}"}


# --- JSON, mended and bounded --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ("```\n[1]\n```", [1]),
        ('{"a": [1, 2,], }', {"a": [1, 2]}),
        ("{'a': 'it\\'s', 'b': \"x'y\"}", {"a": "it's", "b": "x'y"}),
        ("{'say': 'a \"word\"'}", {"say": 'a "word"'}),
        ('{"a": True, "b": None, "c": [False]}', {"a": True, "b": None, "c": [False]}),
        ('{"a": 1, // the first\n "b": 2 /* and\nlast */}', {"a": 1, "b": 2}),
        ('{"url": "http://x/*y*/", "t": "True, }"}', {"url": "http://x/*y*/", "t": "True, }"}),
        ("  \n 5 ", 5),
    ],
)
def test_syntax_noise_is_mended(text: str, expected: Any) -> None:
    """Models write Python, comments and trailing commas; nothing of the value is in doubt."""
    assert parse_json(text) == expected


@given(value=json_values)
@settings(max_examples=200, deadline=None)
def test_pythons_spelling_is_read_equal_or_refused(value: Any) -> None:
    """A `repr` holds escapes that JSON lacks; these are refused, never read as something else."""
    try:
        read = parse_json(repr(value))
    except ValueError:
        return
    assert read == value or (isinstance(read, float) and read == float(value))


@given(value=st.lists(json_values, min_size=1, max_size=3), data=st.data())
@settings(max_examples=100, deadline=None)
def test_mending_never_adds_a_missing_tail(value: Any, data: st.DataObject) -> None:
    """Noise is mended inside a value, never at its end."""
    text = data.draw(st.sampled_from([repr(value), json.dumps(value)]))
    cut = data.draw(st.integers(min_value=0, max_value=len(text) - 1))
    with pytest.raises(ValueError, match=r"not JSON|digits|finite"):
        parse_json(text[:cut])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": 1, "a": 2}', "'a' comes twice"),
        ('{"o": {"b": 1, "c": 2, "b": 1}}', "'b' comes twice"),
        ("{'a': 1, \"a\": 2}", "'a' comes twice"),
        ("NaN", "NaN is not a finite"),
        ('{"a": Infinity}', "Infinity is not a finite"),
        ("[-Infinity]", "-Infinity is not a finite"),
        ("[1e999]", "inf is not a finite"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deeper than 64"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "deeper than 64"),
        ("1" * 5_000, "digits"),
        ("[1, 2", "not JSON"),
        ('{"a": 1} {"a": 2}', "not JSON"),
        ("", "not JSON"),
        ('"' + "x" * MAX_CHARS + '"', "more than 4000000"),
    ],
    ids=lambda value: value[:20],
)
def test_json_out_of_bounds_is_refused_with_its_reason(text: str, part: str) -> None:
    """Each of these reads as something else, or never ends, in a lenient reader."""
    with pytest.raises(ValueError, match=part):
        parse_json(text)


@pytest.mark.parametrize("depth", [1, MAX_DEPTH - 1, MAX_DEPTH])
def test_nesting_up_to_the_bound_is_read(depth: int) -> None:
    """The bound is where it is said to be."""
    assert parse_json("[" * depth + "1" + "]" * depth) is not None


def test_mended_text_of_valid_json_is_unchanged() -> None:
    """Strings are looked over, not into."""
    text = json.dumps({"a": ["'", "//", "/*", ",]", "True", '\\"']})
    assert mend_json(text) == text


# --- hostile answers -----------------------------------------------------------------------------

HOSTILE: dict[str, str] = {
    "open brackets": "[" * 1_000_000,
    "open braces": "{" * 1_000_000,
    "nested keys": '{"answer":' * 200_000,
    "nested and closed": '{"answer":' * 100_000 + "1" + "}" * 100_000,
    "quotes": '"' * 1_000_000,
    "brace and quotes": '{"' + "\\" * 1_000_000,
    "apostrophes": "{'" * 350_000,
    "escapes": '{"answer": "' + "\\u" * 500_000,
    "commas": "[" + ", " * 500_000,
    "comments": "{/*" * 350_000,
    "slashes": "{" + "/" * 1_000_000,
    "objects": '{"answer":1}' * 90_000,
    "empty objects": "{}" * 500_000,
    "fences": "```json\n" * 130_000,
    "spaces": "{" + " " * 1_000_000,
    "keys, one twice": "{" + "".join(f'"k{n}":1,' for n in range(100_000)) + '"k99999":1}',
    "digits": '{"answer": ' + "1" * 1_000_000 + "}",
    "words": "True " * 200_000,
    "python": "{'answer': 'it\\'s'}" * 60_000,
    "beyond the cap": '{"answer": "' + "x" * MAX_CHARS + '"}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answer_of_megabytes_ends_in_our_error(kind: str) -> None:
    """One answer must not stop a worker: no recursion, and time that grows with the length only."""
    refusal(HOSTILE[kind], make_signature("question -> answer: list[int]"))


def test_large_honest_answer_is_read() -> None:
    """The bounds are far from what programs exchange in earnest."""
    value = [{"title": "t" * 50, "minutes": n} for n in range(10_000)]
    signature = make_signature({"steps": (list[Step], OutputField())})
    assert len(parsed(json.dumps({"steps": value}), signature)["steps"]) == 10_000


def test_a_number_is_taken_as_the_text_of_a_text_output() -> None:
    """Models write `"answer": 5` often; nothing is lost by reading it as text."""
    signature = make_signature("question -> answer")
    adapter = JSONAdapter()
    assert adapter.parse(signature, '{"answer": 5}') == {"answer": "5"}
    assert adapter.parse(signature, '{"answer": 2.5}') == {"answer": "2.5"}
    for other in ("true", "null", "[5]"):
        with pytest.raises(dspylite.AdapterParseError):
            adapter.parse(signature, f'{{"answer": {other}}}')
