"""Which engine makes a call: by argument, environment, model and what the request says.

Not here: that both engines do the same (`test_engines.py`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

import dspylite as dspy
from dspylite.abc import Engine
from dspylite.errors import LMConfigurationError
from dspylite.models.direct.embedding import DirectEmbedding
from dspylite.models.direct.engine import SPOKEN, DirectChat
from dspylite.models.engines import (
    LITELLM,
    check_engine,
    checked_engine,
    uses_litellm,
)
from dspylite.models.litellm import LiteLLMChat, LiteLLMEmbedding, LiteLLMResponses, LiteLLMText
from dspylite.models.offline.engine import OfflineEngine
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse
from dspylite.testing import FakeServer

DIRECT = [
    "openai/m",
    "hosted_vllm/org/model",
    "litellm_proxy/m",
    "lm_studio/m",
    "gpt-4o-mini",
    "o3-mini",
    "chatgpt-4o-latest",
]
OTHERS = ["anthropic/claude-sonnet-4-5", "azure/gpt-4o", "ollama_chat/llama3", "claude-sonnet-4-5"]
ASKED = LMResponse(outputs=(LMOutput(text="asked"),))


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_engine_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no variable of the machine choose the engine."""
    monkeypatch.delenv("DSPYLITE_ENGINE", raising=False)


class Seen:
    """Which engine was asked, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Put a note in the place of what each engine would send."""
    found = Seen()

    def note(name: str) -> Any:
        def call(self: object, request: LMRequest) -> LMResponse:
            found.names.append(name)
            return ASKED

        async def acall(self: object, request: LMRequest) -> LMResponse:
            found.names.append(f"{name}, awaited")
            return ASKED

        return call, acall

    for cls, name in ((DirectChat, "direct"), (LiteLLMChat, "litellm")):
        call, acall = note(name)
        monkeypatch.setattr(cls, "call", call)
        monkeypatch.setattr(cls, "acall", acall)
    return found


def engine_of(lm: dspy.LM) -> type[Engine]:
    return type(lm.engine)


# --- By argument and environment -----------------------------------------------------------------


@pytest.mark.parametrize("model", DIRECT)
def test_direct_engine_is_taken_for_compatible_servers(model: str, seen: Seen) -> None:
    """The fast way is the usual one where it exists."""
    for engine in (None, "auto", "direct"):
        dspy.LM(model, api_base="http://x.invalid/v1", engine=engine)("hi")
    dspy.LM(model, engine="litellm")("hi")
    assert seen.names == ["direct", "direct", "direct", "litellm"]


@pytest.mark.parametrize("model", OTHERS)
def test_litellm_is_taken_for_other_providers(model: str, seen: Seen) -> None:
    """Every provider can be reached without a word about engines."""
    for engine in (None, "auto", "litellm"):
        dspy.LM(model, engine=engine)("hi")
    assert seen.names == ["litellm"] * 3


async def test_awaited_calls_take_the_same_engine(seen: Seen) -> None:
    """The async form is not a second set of rules."""
    await dspy.LM("openai/m").acall("hi")
    await dspy.LM("openai/m").acall("hi", logit_trick=1)
    await dspy.LM("anthropic/m").acall("hi")
    assert seen.names == ["direct, awaited", "litellm, awaited", "litellm, awaited"]


@pytest.mark.parametrize(
    ("variable", "argument", "wanted"),
    [
        ("litellm", None, "litellm"),
        ("direct", None, "direct"),
        ("auto", None, "direct"),
        ("", None, "direct"),
        ("litellm", "direct", "direct"),
        ("direct", "litellm", "litellm"),
        ("nonsense", "direct", "direct"),
    ],
)
def test_the_environment_chooses_where_no_argument_does(
    variable: str,
    argument: str | None,
    wanted: str,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole program is switched to the other engine without a change of code."""
    monkeypatch.setenv("DSPYLITE_ENGINE", variable)
    dspy.LM("openai/m", engine=argument)("hi")
    assert seen.names == [wanted]


def test_the_environment_is_read_when_the_lm_is_made(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LM does not change its ways in the middle of a run, nor in a worker process."""
    monkeypatch.setenv("DSPYLITE_ENGINE", "litellm")
    lm = dspy.LM("openai/m")
    monkeypatch.setenv("DSPYLITE_ENGINE", "direct")
    for each in (lm, lm.copy(temperature=1.0), pickle.loads(pickle.dumps(lm))):
        each("hi")
    assert seen.names == ["litellm"] * 3


@pytest.mark.parametrize(
    ("name", "hint"), [("Direct", "Did you mean `direct`"), ("fast", "Engines: auto, direct")]
)
def test_an_unknown_engine_is_refused_and_its_source_named(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader must know whether to look at the code or at the environment."""
    with pytest.raises(LMConfigurationError, match="which `engine` names") as caught:
        dspy.LM("openai/m", engine=name)
    assert hint in str(caught.value)
    with pytest.raises(LMConfigurationError, match="which `engine` names"):
        dspy.LM("openai/m").copy(engine=name)
    with pytest.raises(LMConfigurationError, match="which `engine` names"):
        dspy.Embedder("openai/m", engine=name)
    monkeypatch.setenv("DSPYLITE_ENGINE", name)
    with pytest.raises(LMConfigurationError, match="which `DSPYLITE_ENGINE` names"):
        dspy.LM("openai/m")
    assert checked_engine("auto") == "auto"


# --- By the model's kind -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "engine"), [("text", LiteLLMText), ("responses", LiteLLMResponses)]
)
def test_text_and_responses_go_through_litellm(model_type: Any, engine: type[Engine]) -> None:
    """The direct engine speaks chat only."""
    for name in (None, "auto", "litellm"):
        assert engine_of(dspy.LM("openai/m", model_type, engine=name)) is engine
    assert uses_litellm("auto", "openai/m", model_type)
    assert not uses_litellm("auto", "openai/m", "chat")
    with pytest.raises(LMConfigurationError, match="The direct engine makes chat calls"):
        dspy.LM("openai/m", model_type, engine="direct")


@pytest.mark.parametrize("model", OTHERS)
def test_direct_engine_is_refused_for_other_providers(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that cannot be made is found when the LM is made."""
    with pytest.raises(LMConfigurationError, match="'openai/<name>' with `api_base=`"):
        dspy.LM(model, engine="direct")
    with pytest.raises(LMConfigurationError, match="'openai/<name>' with `api_base=`"):
        dspy.LM("openai/m", engine="direct").copy(model=model)
    monkeypatch.setenv("DSPYLITE_ENGINE", "direct")
    with pytest.raises(LMConfigurationError, match="'openai/<name>' with `api_base=`"):
        dspy.LM(model)


@pytest.mark.parametrize("model_type", ["chatt", "completion", "", None])
def test_an_unknown_kind_of_calls_is_refused(model_type: Any) -> None:
    """In a copy as in the first LM, not as a `KeyError` in the first call."""
    with pytest.raises(LMConfigurationError, match="`model_type` must be one of chat, text"):
        dspy.LM("openai/m", model_type)
    with pytest.raises(LMConfigurationError, match="`model_type` must be one of chat, text"):
        dspy.LM("openai/m").copy(model_type=model_type)
    with pytest.raises(LMConfigurationError, match="`model_type` must be one of chat, text"):
        check_engine("auto", "openai/m", model_type)


@pytest.mark.parametrize("name", ["auto", "direct", "litellm"])
def test_the_offline_model_has_its_own_engine_whatever_is_chosen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that is meant for hosted models must not break a demo that needs none."""
    monkeypatch.setenv("DSPYLITE_ENGINE", name)
    assert engine_of(dspy.OfflineLM()) is OfflineEngine
    assert engine_of(dspy.LM("offline/extractive").copy(temperature=1.0)) is OfflineEngine
    assert engine_of(dspy.LM("openai/m").copy(model="offline/extractive")) is OfflineEngine
    assert dspy.OfflineLM()("What is up? The sky is up.")


# --- By what the request says --------------------------------------------------------------------


class Schema(BaseModel):
    """A class as `response_format`, which litellm turns into a schema."""

    answer: str


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"temperature": 0.5, "max_tokens": 5, "n": 2, "stop": ["x"], "seed": 1}, "direct"),
        ({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}, "direct"),
        ({"extra_body": {"top_k": 3}, "timeout": 5, "extra_headers": {"x-a": "b"}}, "direct"),
        ({"top_k": 3, "guided_json": {}, "deadline_s": 5}, "direct"),
        ({"drop_params": True}, "litellm"),
        ({"thinking": {"type": "enabled"}}, "litellm"),
        ({"temperature": 0.5, "unknown_parameter": 1}, "litellm"),
        ({"response_format": Schema}, "litellm"),
        ({"unknown_parameter": None}, "direct"),
    ],
)
def test_auto_takes_litellm_for_what_the_direct_engine_does_not_know(
    params: dict[str, Any], wanted: str, seen: Seen
) -> None:
    """A parameter is never dropped or sent where it means nothing."""
    dspy.LM("openai/m")("hi", **params)
    dspy.LM("openai/m", **params)("hi")
    assert seen.names == [wanted] * 2


def test_engines_that_were_chosen_make_every_call(seen: Seen) -> None:
    """Whoever names an engine knows why."""
    dspy.LM("openai/m", engine="direct")("hi", unknown_parameter=1)
    dspy.LM("openai/m", engine="litellm")("hi", temperature=1.0)
    assert seen.names == ["direct", "litellm"]


def test_parameters_of_the_transport_are_known() -> None:
    """An LM with a key and an endpoint is the usual one, and must stay on the fast way."""
    wanted = {"api_key", "api_base", "base_url", "timeout", "extra_headers", "extra_body"}
    assert wanted <= SPOKEN


def test_a_streamed_call_takes_the_same_engine(server: FakeServer) -> None:
    """Streams are chosen by the same rule; the server sees which library asked."""
    lm = dspy.LM("openai/m", api_base=server.base_url, api_key="k")
    lm("hi")
    with lm.stream("hi") as stream:
        assert "".join(piece.text for piece in stream) == "echo: hi"
    whole, streamed = (request.headers.get("user-agent") for request in server.requests)
    assert whole == streamed
    assert "openai" not in str(whole).lower()


# --- Copies and embedders ------------------------------------------------------------------------


def test_copy_changes_the_engine(seen: Seen) -> None:
    """A template is switched over without naming its parameters again."""
    lm = dspy.LM("openai/m", engine="litellm", temperature=0.5)
    for twin in (lm, lm.copy(engine="direct"), lm.copy(engine="auto"), lm.copy(engine=None)):
        twin("hi")
        assert twin.kwargs == {"temperature": 0.5}
    assert seen.names == ["litellm", "direct", "direct", "direct"]
    assert lm.engine is LITELLM
    with pytest.raises(LMConfigurationError, match="The direct engine"):
        dspy.LM("anthropic/m").copy(engine="direct")


EMBEDDERS = {
    (None, "openai/text-embedding-3-small"): DirectEmbedding,
    ("auto", "text-embedding-3-small"): DirectEmbedding,
    ("direct", "hosted_vllm/e5"): DirectEmbedding,
    ("litellm", "openai/text-embedding-3-small"): LiteLLMEmbedding,
    (None, "cohere/embed-v3"): LiteLLMEmbedding,
    ("auto", "cohere/embed-v3"): LiteLLMEmbedding,
}


@pytest.mark.parametrize(("engine", "model"), list(EMBEDDERS))
def test_embedders_choose_by_the_same_rule(engine: str | None, model: str) -> None:
    """One set of names and one variable for both kinds of models."""
    source: Any = dspy.Embedder(model, engine=engine)._plan.source
    assert type(source.engine) is EMBEDDERS[engine, model]


def test_the_environment_chooses_for_embedders_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable switches the whole program."""
    monkeypatch.setenv("DSPYLITE_ENGINE", "litellm")
    source: Any = dspy.Embedder("openai/e")._plan.source
    assert type(source.engine) is LiteLLMEmbedding


def test_embedder_refuses_the_direct_engine_for_other_providers() -> None:
    """Found when it is made, with the way out."""
    with pytest.raises(LMConfigurationError, match="The direct engine asks OpenAI-compatible"):
        dspy.Embedder("cohere/embed-v3", engine="direct")


def test_offline_embedder_works_with_any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of them."""
    monkeypatch.setenv("DSPYLITE_ENGINE", "direct")
    assert dspy.Embedder("offline/hashing", dimensions=8).embed(["a"]).shape == (1, 8)


@pytest.mark.parametrize("engine", ["direct", "litellm"])
def test_embedder_asks_the_server_by_the_chosen_engine(engine: str, server: FakeServer) -> None:
    """The choice is what is really used."""
    embedder = dspy.Embedder("openai/e", engine=engine, api_base=server.base_url, api_key="k")
    assert embedder.embed(["one", "two"]).shape == (2, 8)
    (request,) = server.requests
    assert ("openai" in request.headers["user-agent"].lower()) is (engine == "litellm")
