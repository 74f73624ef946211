"""`Code`, `Reasoning`, `Citations`, `Document` and `History`; citations and logprobs of answers.

Not here: how a prompt shows them.
"""

from __future__ import annotations

import base64
import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dspylite as dspy
from dspylite.models.answers import read_chat_response
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.rows import decode_row, encode_row, own_copy
from dspylite.models.deltas import Assembly
from dspylite.models.recording import plain_outputs
from dspylite.schema.messages import LMOutput, LMResponse
from dspylite.testing import FakeLM, FakeServer, Reply

# --- code ----------------------------------------------------------------------------------------

FENCED = {
    "plain": ("x = 1", "x = 1"),
    "plain with ticks": ("a `b` c", "a `b` c"),
    "fence": ("```\nx = 1\n```", "x = 1"),
    "fence of a language": ("```python\nx = 1\n```", "x = 1"),
    "among words": ("Here it is:\n```python\nx = 1\n```\nGood luck!", "x = 1"),
    "first of two": ("```\na\n```\nor\n```\nb\n```", "a"),
    "indented first line": ("```\n    x = 1\n    y = 2\n```", "    x = 1\n    y = 2"),
    "blank lines around": ("```\n\n\nx\n\n\n```", "x"),
    "no break before the end": ("```python\nprint(1)```", "print(1)"),
    "one line": ("```print(1)```", "print(1)"),
    "windows": ("```python\r\nx = 1\r\n```\r\n", "x = 1"),
    "longer fence": ("````\n```\nx\n```\n````", "```\nx\n```"),
    "fence in a docstring": (
        'def f():\n    """Do.\n\n    ```\n    f()\n    ```\n    """',
        'def f():\n    """Do.\n\n    ```\n    f()\n    ```\n    """',
    ),
    "words that open a fence": ("a\n```\nb", "a\n```\nb"),
    "empty": ("", ""),
    "empty fence": ("```\n```", ""),
}


@pytest.mark.parametrize(("text", "code"), FENCED.values(), ids=FENCED)
def test_code_is_taken_out_of_its_fence(text: str, code: str) -> None:
    made = dspy.Code(code=text)
    assert (made.code, str(made), made.format()) == (code, code, code)
    assert dspy.Code.model_validate(text) == made
    assert dspy.Code.model_validate({"code": text}) == made


def test_fence_that_is_never_closed_is_an_error() -> None:
    """It is the sign of an answer that was cut, and half a program does harm."""
    with pytest.raises(pydantic.ValidationError, match="never closed"):
        dspy.Code.model_validate("```python\nx = 1\ny =")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["```a\n", "```\n", "`", "   ```x\n```` \n", "\n"])
def test_reading_code_takes_no_longer_than_it_is_long(piece: str) -> None:
    """An answer must not hold a thread by what it is made of."""
    for text in (piece * 200_000, f"```\n{piece * 200_000}\n```"):
        try:
            dspy.Code.model_validate(text)
        except pydantic.ValidationError:
            pass


@given(st.text())
def test_code_without_a_fence_is_kept_as_it_is(text: str) -> None:
    if "`" not in text:
        assert dspy.Code(code=text).code == text


@pytest.mark.parametrize(
    "value", [None, 5, [], {}, {"code": 5}, {"text": "x"}, {"code": "x", "language": "c"}, b"x"]
)
def test_what_is_no_code_is_refused(value: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        dspy.Code.model_validate(value)


def test_language_belongs_to_the_class() -> None:
    java = dspy.Code["java"]
    assert (java.language, dspy.Code.language) == ("java", "python")
    assert dspy.Code["java"] is java
    assert dspy.Code["python"]["java"] is java
    assert issubclass(java, dspy.Code)
    assert "```java" in java.description()
    assert "java" in str(pydantic.TypeAdapter(java).json_schema())
    assert java.model_validate(java(code="x")) == java(code="x")
    assert java.model_validate(dspy.Code(code="x")) == java(code="x")
    with pytest.raises(pydantic.ValidationError):
        dspy.Code["c"].model_validate(java(code="x"))


@pytest.mark.parametrize("language", ["c++", "c#", "objective-c", "asp.net", "日本語", "F 90"])
def test_language_may_have_any_name(language: str) -> None:
    made = dspy.Code[language](code="x")
    twin = pickle.loads(pickle.dumps(made))
    assert (twin, type(twin)) == (made, type(made))


@pytest.mark.parametrize("language", ["", " ", "a\nb", "`", "x" * 51, 5, None, ("a", "b"), str])
def test_what_is_no_language_is_refused(language: Any) -> None:
    with pytest.raises(dspy.SignatureError, match="language"):
        dspy.Code[language]


@pytest.fixture
def restless() -> Iterator[None]:
    """Have threads take turns so often that they meet in the middle of anything."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("restless")
def test_class_of_a_language_is_made_once_by_all_threads() -> None:
    """Two classes of one name would not be equal, nor accept each other's values."""
    for attempt in range(50):
        meeting = Barrier(4, timeout=20)

        def make(_: int, meeting: Barrier = meeting, attempt: int = attempt) -> type[dspy.Code]:
            meeting.wait()
            return dspy.Code[f"language {attempt}"]

        with dspy.ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(make, range(4)))) == 1


def _language(value: dspy.Code) -> tuple[str, str, type[dspy.Code]]:
    return value.language, value.code, type(value)


def test_class_of_a_language_travels_to_another_process(pool: ProcessPoolExecutor) -> None:
    made = dspy.Code["only here"](code="x")
    assert pool.submit(_language, made).result(timeout=60) == ("only here", "x", type(made))


def test_class_of_a_language_is_found_by_a_process_that_never_made_it(tmp_path: Path) -> None:
    code = dspy.Code["elsewhere"]
    (tmp_path / "p").write_bytes(pickle.dumps([dspy.Code, code, code(code="x")]))
    program = (
        "import pickle, sys; base, made, value = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert type(value) is made is base['elsewhere'], made\n"
        "assert made.language == 'elsewhere'"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "p")], check=True, timeout=60)


def test_subclass_names_its_language_and_has_others() -> None:
    assert Script.language == "bash"
    assert issubclass(Script["zsh"], Script)
    assert Script["zsh"].language == "zsh"
    for kind in (Script, Script["zsh"], dspy.Code):
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert copy.deepcopy(kind) is kind


class Script(dspy.Code):
    language = "bash"


def test_signature_with_code_survives_a_pickle() -> None:
    signature = dspy.make_signature({"text": (str, dspy.InputField()), "code": _code_output("sql")})
    twin = pickle.loads(pickle.dumps(signature))
    assert twin.output_fields["code"].annotation is dspy.Code["sql"]


def _code_output(language: str) -> tuple[Any, Any]:
    return dspy.Code[language], dspy.OutputField()


# --- reasoning -----------------------------------------------------------------------------------

WHY = "Two and Two."


def test_reasoning_is_used_like_a_text() -> None:
    why = dspy.Reasoning(content=WHY)
    assert why == WHY
    assert WHY == why  # noqa: SIM300  # that way round too
    assert why == dspy.Reasoning(content=WHY)
    assert why != "other"
    assert why != 5
    assert (len(why), str(why), repr(why), why[0], why[-3:]) == (12, WHY, repr(WHY), "T", "wo.")
    assert ("and" in why, "xyz" in why, list(why)[:2]) == (True, False, ["T", "w"])
    assert (why + "!", "!" + why, f"{why}", f"{why:>13}") == (f"{WHY}!", f"!{WHY}", WHY, f" {WHY}")
    assert isinstance(why + why, dspy.Reasoning)
    assert (hash(why), {WHY: 1}[why]) == (hash(WHY), 1)
    assert (why < "U", why <= WHY, why > "U", why >= "U") == (True, True, False, False)
    assert sorted([why, "A", dspy.Reasoning(content="B")]) == ["A", "B", WHY]
    assert (bool(why), bool(dspy.Reasoning(content=""))) == (True, False)
    assert "%s" % why == WHY  # noqa: UP031


METHODS = [
    ("upper", ()),
    ("split", ()),
    ("replace", ("Two", "2")),
    ("startswith", ("Two",)),
    ("find", ("and",)),
    ("strip", (".",)),
    ("encode", ()),
    ("splitlines", ()),
    ("isalpha", ()),
    ("partition", (" ",)),
]


@pytest.mark.parametrize(("name", "args"), METHODS)
def test_reasoning_has_the_methods_of_a_text(name: str, args: tuple[Any, ...]) -> None:
    assert getattr(dspy.Reasoning(content=WHY), name)(*args) == getattr(WHY, name)(*args)


def test_unknown_attribute_of_reasoning_names_the_text() -> None:
    with pytest.raises(AttributeError, match=r"`nope`.*str\(reasoning\)") as caught:
        _ = dspy.Reasoning(content=WHY).nope
    assert caught.value.name == "nope"


@pytest.mark.parametrize("operand", [5, None, b"x", []])
def test_reasoning_is_added_to_texts_only(operand: Any) -> None:
    with pytest.raises(TypeError):
        dspy.Reasoning(content=WHY) + operand
    with pytest.raises(TypeError):
        operand + dspy.Reasoning(content=WHY)
    with pytest.raises(TypeError):
        _ = dspy.Reasoning(content=WHY) < operand
    with pytest.raises(TypeError):
        _ = operand in dspy.Reasoning(content=WHY)


@pytest.mark.parametrize("value", [None, 5, [], {}, {"content": 5}, {"content": "a", "x": 1}])
def test_what_is_no_reasoning_is_refused(value: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        dspy.Reasoning.model_validate(value)


def test_model_is_asked_for_reasoning_as_a_text() -> None:
    assert pydantic.TypeAdapter(dspy.Reasoning).json_schema()["type"] == "string"
    assert pydantic.TypeAdapter(dspy.Reasoning).validate_python("a") == "a"


def lm_with(*capabilities: str, model: str = "openai/m", **kwargs: Any) -> dspy.LM:
    return dspy.LM(model, capabilities=capabilities, **kwargs)


ASKED = dspy.make_signature("question -> answer").append("why", dspy.OutputField(), dspy.Reasoning)


@pytest.mark.parametrize(
    ("lm", "params", "is_left"),
    [
        (lm_with("reasoning"), {"reasoning_effort": "low"}, True),
        (lm_with("reasoning", reasoning_effort="low"), {}, True),
        (lm_with("reasoning", reasoning_effort="low"), {"reasoning_effort": None}, False),
        (lm_with("reasoning"), {}, False),
        (lm_with(), {"reasoning_effort": "low"}, False),
        (lm_with("reasoning", model="openai/gpt-5-mini"), {"reasoning_effort": "low"}, False),
        (FakeLM(["x"]), {"reasoning_effort": "low"}, False),
    ],
)
def test_reasoning_is_left_to_a_model_that_is_asked_to_reason(
    lm: Any, params: dict[str, Any], is_left: bool
) -> None:
    adapted = dspy.Reasoning.adapt_to_native_lm_feature(ASKED, "why", lm, params)
    assert ("why" in adapted.output_fields) is not is_left
    assert "answer" in adapted.output_fields
    assert "why" in ASKED.output_fields


def test_reasoning_is_read_from_the_answer() -> None:
    assert dspy.Reasoning.parse_lm_response({"text": "a", "reasoning_content": WHY}) == WHY
    assert dspy.Reasoning.parse_lm_response({"text": "a"}) is None
    assert dspy.Reasoning.parse_lm_response({"text": "a", "reasoning_content": None}) is None


# --- citations and documents ---------------------------------------------------------------------

CITED = {
    "type": "char_location",
    "cited_text": "Water boils.",
    "document_index": 0,
    "document_title": "Physics",
    "start_char_index": 3,
    "end_char_index": 15,
    "supported_text": "It boils.",
}
BY_PAGE = {
    "type": "page_location",
    "cited_text": "x",
    "document_index": 1,
    "start_page_number": 2,
    "end_page_number": 3,
}
FROM_WEB = {"type": "web_search_result_location", "cited_text": "x", "url": "https://h/a"}


def test_citations_are_a_sequence() -> None:
    found = dspy.Citations.from_dict_list([CITED, BY_PAGE])
    assert len(found) == 2
    assert [each.cited_text for each in found] == ["Water boils.", "x"]
    assert isinstance(found[0], dspy.Citations.Citation)
    assert found[-1:] == found.citations[1:]
    assert found.format() == (CITED, BY_PAGE)
    assert found.citations[0].format() == CITED


@pytest.mark.parametrize("given", [[CITED], (CITED,), CITED, {"citations": [CITED]}])
def test_citations_are_read_from(given: Any) -> None:
    expected = dspy.Citations.from_dict_list([CITED])
    assert pydantic.TypeAdapter(dspy.Citations).validate_python(given) == expected
    assert dspy.Citations.model_validate(expected) is expected
    assert dspy.Citations(citations=expected.citations) == expected


@pytest.mark.parametrize(
    "given",
    [
        None,
        "text",
        {},
        [5],
        [{}],
        {"citations": None},
        {"citations": [CITED], "x": 1},
        [{"cited_text": "x"}],
        [{**CITED, "start_char_index": None}],
        [{**CITED, "cited_text": 5}],
    ],
)
def test_what_is_no_citation_is_refused(given: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        dspy.Citations.model_validate(given)


def test_citations_of_other_places_keep_what_is_said_of_them() -> None:
    """A PDF is cited by pages, the web by addresses; neither has characters to count."""
    found = dspy.Citations.from_dict_list([BY_PAGE, FROM_WEB])
    assert found[0].start_page_number == 2  # type: ignore[attr-defined,unused-ignore]
    assert found.format()[1] == FROM_WEB
    assert dspy.Citations.model_validate_json(found.model_dump_json()) == found


def test_citations_are_left_to_models_that_cite() -> None:
    signature = dspy.make_signature("question -> answer").append(
        "sources", dspy.OutputField(), dspy.Citations
    )
    adapt = dspy.Citations.adapt_to_native_lm_feature
    claude, other = dspy.LM("anthropic/claude"), dspy.LM("openai/m")
    assert list(adapt(signature, "sources", claude, {}).output_fields) == ["answer"]
    assert adapt(signature, "sources", other, {}) is signature
    assert dspy.Citations.parse_lm_response({"text": "a"}) is None
    read = dspy.Citations.parse_lm_response({"text": "a", "citations": [CITED]})
    assert read == dspy.Citations.from_dict_list([CITED])


def test_document_is_a_part_that_can_be_cited() -> None:
    document = dspy.Document(data="Water boils.", title="Physics", context="a textbook")
    assert document.format() == [
        {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "Water boils."},
            "citations": {"enabled": True},
            "title": "Physics",
            "context": "a textbook",
        }
    ]
    assert dspy.Document.model_validate("Water boils.").title is None
    pdf = dspy.Document(data=base64.b64encode(b"%PDF").decode(), media_type="application/pdf")
    assert pdf.format()[0]["source"]["type"] == "base64"
    assert "title" not in pdf.format()[0]
    assert len(repr(dspy.Document(data="x" * 10_000))) < 500
    assert "10000 characters" in str(dspy.Document(data="x" * 10_000))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"data": 5},
        {"data": "x", "media_type": "text/html"},
        {"data": "x", "extra": 1},
        {"data": "no base64!", "media_type": "application/pdf"},
        5,
        None,
    ],
)
def test_what_is_no_document_is_refused(given: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        dspy.Document.model_validate(given)


# --- conversations -------------------------------------------------------------------------------


def test_history_keeps_turns_of_its_own() -> None:
    turns = [{"question": "a", "answer": dspy.Image("https://h/a")}]
    history = dspy.History(messages=turns)
    turns.append({})
    turns[0]["question"] = "changed"
    assert history.messages == [{"question": "a", "answer": dspy.Image("https://h/a")}]
    history.messages.append({"question": "b", **dspy.Prediction(answer="c")})
    assert history.messages[1] == {"question": "b", "answer": "c"}
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        history.messages = []


@pytest.mark.parametrize(
    "given",
    [{}, {"messages": None}, {"messages": "x"}, {"messages": [5]}, {"messages": [], "x": 1}],
)
def test_what_is_no_history_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        dspy.History(**given)


# --- all of them ---------------------------------------------------------------------------------

texts = st.text(max_size=20)
values = st.one_of(
    texts.map(lambda text: dspy.Reasoning(content=text)),
    texts.filter(lambda text: "`" not in text).map(lambda text: dspy.Code["java"](code=text)),
    st.builds(dspy.Document, data=texts, title=st.none() | texts, context=st.none() | texts),
    st.lists(st.sampled_from([CITED, BY_PAGE, FROM_WEB])).map(dspy.Citations.from_dict_list),
    st.lists(st.dictionaries(texts, texts | st.integers() | st.lists(texts), max_size=2)).map(
        lambda turns: dspy.History(messages=turns)
    ),
)


@given(values)
def test_plain_fields_and_json_validate_back(value: Any) -> None:
    kind = type(value)
    assert isinstance(value.model_dump(), dict)
    assert kind.model_validate(value.model_dump()) == value
    assert kind.model_validate_json(value.model_dump_json()) == value


@given(values)
def test_copies_and_pickles_are_equal(value: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
        assert (twin, type(twin)) == (value, type(value))


@pytest.mark.parametrize(
    "kind", [dspy.Code, dspy.Reasoning, dspy.Citations, dspy.Document, dspy.History]
)
def test_json_schema_says_nothing_of_a_docstring(kind: Any) -> None:
    shown = json.dumps(pydantic.TypeAdapter(kind).json_schema())
    assert "Raises" not in shown
    assert "Attributes" not in shown


# --- answers of models ---------------------------------------------------------------------------

LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}


def chat(message: dict[str, Any], **choice: Any) -> dict[str, Any]:
    whole = {"role": "assistant", "content": "a", **message}
    return {
        "id": "1",
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": whole, **choice}],
    }


SHAPES: dict[str, Any] = {
    "groups": {"provider_specific_fields": {"citations": [[CITED], [BY_PAGE]]}},
    "flat": {"provider_specific_fields": {"citations": [CITED, BY_PAGE]}},
    "of the message": {"citations": [CITED, BY_PAGE]},
}


@pytest.mark.parametrize("message", SHAPES.values(), ids=SHAPES)
def test_citations_of_an_answer_are_kept(message: dict[str, Any]) -> None:
    response = read_chat_response(chat(message), model="m")
    assert response.outputs[0].citations == (CITED, BY_PAGE)
    assert plain_outputs(response) == [{"text": "a", "citations": [CITED, BY_PAGE]}]


@pytest.mark.parametrize("citations", [None, [], "text", 5, ["https://h/a"], [[None]], {"a": 1}])
def test_citations_of_another_kind_do_no_harm(citations: Any) -> None:
    message = {"provider_specific_fields": {"citations": citations}}
    assert read_chat_response(chat(message), model="m").outputs[0].citations == ()


def test_citations_of_litellms_objects_are_kept() -> None:
    from litellm.types.utils import ModelResponse

    answer = ModelResponse(**chat(SHAPES["groups"], logprobs=LOGPROBS))
    (output,) = read_chat_response(answer, model="m").outputs
    assert output.citations == (CITED, BY_PAGE)
    assert output.logprobs is not None
    assert output.logprobs["content"][0]["logprob"] == -0.5
    assert json.dumps(plain_outputs(LMResponse(outputs=(output,))))


def test_citations_of_litellms_pieces_are_kept() -> None:
    from litellm.types.utils import Delta, ModelResponseStream, StreamingChoices

    assembly = Assembly(model="m")
    for cited in (CITED, BY_PAGE):
        delta = Delta(content="", provider_specific_fields={"citation": cited})
        assembly.add(ModelResponseStream(choices=[StreamingChoices(index=0, delta=delta)]))
    assert assembly.response.outputs[0].citations == (CITED, BY_PAGE)


def test_logprobs_of_pieces_are_joined() -> None:
    assembly = Assembly(model="m")
    for token in "abc":
        logprobs = {"content": [{"token": token, "logprob": -1.0}], "refusal": None}
        assembly.add({"choices": [{"index": 0, "delta": {"content": token}, "logprobs": logprobs}]})
        before = assembly.response.outputs[0].logprobs
    assert before is not None
    assert [each["token"] for each in before["content"]] == ["a", "b", "c"]


@pytest.mark.parametrize("engine", ["direct", "litellm"])
def test_logprobs_reach_who_asked_for_them(
    engine: str, cache_in: Callable[..., Cache], tmp_path: Path
) -> None:
    """From the server, from the cache in memory, and from the disk alike."""
    with FakeServer() as server:
        server.script(Reply(body=json.dumps(chat({}, logprobs=LOGPROBS))))
        lm = dspy.LM("openai/m", api_base=server.base_url, api_key="k", engine=engine)
        cache_in(tmp_path, enable_memory_cache=True)
        found = [lm("hi", logprobs=True) for _ in range(2)]
        cache_in(tmp_path)
        found.append(lm("hi", logprobs=True))
        assert server.pending_replies == 0
    for (output,) in found:
        assert isinstance(output, dict)
        assert output["text"] == "a"
        assert output["logprobs"]["content"][0]["logprob"] == -0.5


def test_answer_without_extras_is_a_text() -> None:
    assert plain_outputs(read_chat_response(chat({}, logprobs=None), model="m")) == ["a"]


def test_row_keeps_extras_and_older_rows_are_read() -> None:
    output = LMOutput(text="a", citations=(CITED, BY_PAGE), logprobs=LOGPROBS)
    response = LMResponse(outputs=(output,), model="m")
    assert decode_row("k", encode_row("k", response)) == response
    plain = LMResponse(outputs=(LMOutput(text="a"),), model="m")
    row = encode_row("k", plain)
    assert b"citations" not in row  # as it was written before there were any
    assert decode_row("k", row) == plain


def test_reader_of_a_kept_answer_changes_a_copy() -> None:
    kept = LMResponse(outputs=(LMOutput(text="a", citations=(dict(CITED),), logprobs={"c": []}),))
    taken = own_copy(kept)
    taken.outputs[0].citations[0]["cited_text"] = "changed"
    taken.outputs[0].logprobs["c"].append(1)
    plain = plain_outputs(kept)[0]
    assert isinstance(plain, dict)
    plain["citations"][0]["cited_text"] = "changed"
    assert kept.outputs[0].citations == (CITED,)
    assert kept.outputs[0].logprobs == {"c": []}
