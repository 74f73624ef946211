"""What every LM has in common: models of one's own, copies, pickles, what is shown and kept.

Not here: hosted models (`test_lm_over_http.py`), and the policies (`test_middleware.py`).
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import dspylite as dspy
from dspylite.errors import (
    LMConfigurationError,
    LMNotConfiguredError,
    LMServerError,
)
from dspylite.models.answers import read_chat_response
from dspylite.models.completion import as_completion
from dspylite.models.offline.engine import OfflineEngine
from dspylite.runtime.history import GLOBAL_HISTORY
from dspylite.schema.messages import LMOutput, LMResponse, Usage
from dspylite.testing import FakeClock, FakeLM, FakeServer

KEY = "sk-key-of-this-test-0123456789"


def completion(*texts: str, **more: object) -> dict[str, Any]:
    """Return an answer in OpenAI's form."""
    choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    return {"choices": choices, "usage": usage, **more}


class Shout(dspy.BaseLM):
    """A model of a user's own: it repeats the last message in capitals."""

    def forward(
        self, prompt: str | None = None, messages: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        return completion(messages[-1]["content"].upper())


class Noting(dspy.BaseLM):
    """Tells what it was called with, and on which thread."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("own/noting", **kwargs)
        self.calls: list[tuple[Any, Any, dict[str, Any]]] = []
        self.threads: list[int] = []

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        self.calls.append((prompt, messages, kwargs))
        self.threads.append(threading.get_ident())
        return completion("ok")


class BothWays(dspy.BaseLM):
    """Has an async form of its own."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return completion("sync")

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return completion("async")


# --- Models of one's own -----------------------------------------------------------------------


def test_own_model_answers_with_a_dict() -> None:
    """One method makes a model, and its answer may be plain data."""
    assert Shout("own/shout")("hello") == ["HELLO"]


def test_own_model_answers_with_an_object() -> None:
    """An SDK's response object is as good as a dict."""

    class Wrapped(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            message = SimpleNamespace(content="from an object", tool_calls=None)
            usage = SimpleNamespace(prompt_tokens=2, completion_tokens=1, total_tokens=3)
            choice = SimpleNamespace(message=message, finish_reason="stop")
            return SimpleNamespace(choices=[choice], usage=usage, model="w", id="answer-1")

    with dspy.track_usage() as tracker:
        assert Wrapped("own/wrapped")("hi") == ["from an object"]
    assert tracker.total.total_tokens == 3


def test_own_text_completion_is_understood() -> None:
    """Older endpoints answer with `text` in place of a message."""

    class Old(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return {"choices": [{"text": "plain", "finish_reason": "stop"}]}

    assert Old("own/old")("hi") == ["plain"]


def test_own_model_may_give_reasoning_and_tool_calls() -> None:
    """What is more than text arrives as a dict, like that of a hosted model."""

    class Deep(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            message = {"content": "42", "reasoning_content": "6 * 7", "tool_calls": [{"id": "c"}]}
            return {"choices": [{"message": message, "finish_reason": "stop"}]}

    assert Deep("own/deep")("hi") == [
        {"text": "42", "reasoning_content": "6 * 7", "tool_calls": [{"id": "c"}]}
    ]


def test_own_model_without_choices_is_a_server_error() -> None:
    """An empty answer is never an empty success."""

    class Empty(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return {"choices": []}

    with FakeClock(), pytest.raises(LMServerError, match="no choices"):
        Empty("own/empty")("hi")


def test_forward_receives_messages_and_the_parameters_of_lm_and_call() -> None:
    """The call's parameters win, and its None takes one away."""
    lm = Noting(temperature=0.5, top_p=0.9, seed=1)
    lm("hi", temperature=0.0, top_p=None)
    assert lm.calls == [
        (None, [{"role": "user", "content": "hi"}], {"temperature": 0.0, "seed": 1})
    ]


async def test_awaited_model_with_forward_alone_runs_beside_the_loop() -> None:
    """A blocking model must not stop every other task."""
    lm = Noting()
    assert await lm.acall("hi") == ["ok"]
    assert lm.threads != [threading.get_ident()]


async def test_awaited_model_uses_its_own_async_form() -> None:
    """With both forms each is used on its own side."""
    assert await BothWays("own/both").acall("hi") == ["async"]
    assert BothWays("own/both")("hi") == ["sync"]


def test_model_without_forward_says_what_to_define() -> None:
    """A subclass that forgot its one method is told so by name."""

    class Forgetful(dspy.BaseLM):
        pass

    with pytest.raises(LMConfigurationError, match="`Forgetful` has no `forward"):
        Forgetful("own/none")("hi")


def test_call_without_a_prompt_is_refused() -> None:
    """`lm()` would send an empty chat."""
    with pytest.raises(LMConfigurationError, match="needs a prompt"):
        Noting()()


def test_predictor_asks_an_own_model() -> None:
    """An own model is configured like any other."""

    class Sections(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return completion("[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]")

    with dspy.context(lm=Sections("own/sections")):
        prediction = dspy.Predict("question -> answer")(question="Well?")
    assert prediction.answer == "yes"
    assert prediction.get_lm_usage()["own/sections"]["total_tokens"] == 3


def test_own_model_is_retried_like_a_hosted_one() -> None:
    """An own model that raises our errors gets the same policies."""
    failures = [LMServerError("down"), LMServerError("down")]

    class Flaky(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            if failures:
                raise failures.pop()
            return completion("up again")

    with FakeClock() as clock:
        assert Flaky("own/flaky", num_retries=2)("hi") == ["up again"]
    assert len(clock.sleeps) == 2


def test_bug_in_an_own_model_is_raised_as_it_is() -> None:
    """A user's own exception is theirs; it is neither wrapped nor retried."""

    class Broken(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        Broken("own/broken")("hi")


# --- Copies ------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def used_lm(server: FakeServer, calls: int = 1) -> dspy.LM:
    lm = dspy.LM(
        "openai/m",
        api_base=server.base_url,
        api_key=KEY,
        extra_headers={"x-tenant": "t-1"},
        temperature=0.25,
        max_tokens=9,
        timeout=11,
        num_retries=1,
        top_p=0.5,
    )
    for number in range(calls):
        lm(f"question {number}")
    return lm


TWINS = {
    "copy": lambda lm: lm.copy(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda lm: pickle.loads(pickle.dumps(lm)),
}
each_twin = pytest.mark.parametrize("twin_of", list(TWINS.values()), ids=list(TWINS))


@each_twin
def test_twin_of_a_used_lm_asks_the_same_endpoint_in_the_same_way(
    twin_of: Any, server: FakeServer
) -> None:
    """A worker that silently asked the default endpoint with another key was seen elsewhere."""
    lm = used_lm(server)
    assert twin_of(lm)("question 0") == ["echo: question 0"]
    first, second = server.requests
    assert (second.api_key, second.headers["x-tenant"]) == (KEY, "t-1")
    assert second.json == first.json


@each_twin
def test_twin_has_all_parameters_and_a_history_of_its_own(twin_of: Any, server: FakeServer) -> None:
    """No field may be forgotten, and no call of one may show up in the other."""
    lm = used_lm(server)
    twin = twin_of(lm)
    assert len(twin.history) == 0
    # The policies are the same, and what they know of the endpoint is shared within the process.
    own = {"history": None, "middleware": None, "_handlers": None}
    mine, its = ({**vars(each), **own} for each in (lm, twin))
    assert its == mine
    assert [type(policy) for policy in twin.middleware] == [type(p) for p in lm.middleware]
    twin("more")
    assert (len(lm.history), len(twin.history)) == (1, 1)


def test_copy_changes_what_it_is_told_to(server: FakeServer) -> None:
    """A variant of an LM shares nothing that the original would notice."""
    lm = used_lm(server)
    variant = lm.copy(temperature=1.0, top_p=None, num_retries=0, api_key="sk-another-key")
    variant("hi")
    request = server.requests[-1]
    assert (request.api_key, request.json["temperature"]) == ("sk-another-key", 1.0)
    assert "top_p" not in request.json
    assert (lm.kwargs["temperature"], lm.kwargs["top_p"], lm.num_retries) == (0.25, 0.5, 1)


def test_copy_with_other_retries_retries_that_often() -> None:
    """`num_retries` is a policy, which a copy must renew."""

    def failing(request: object) -> LMServerError:
        return LMServerError("down")

    lm = FakeLM(failing, num_retries=1).copy(num_retries=3)
    with FakeClock() as clock, pytest.raises(LMServerError):
        lm("hi")
    assert len(clock.sleeps) == 3


def test_pickle_after_many_calls_is_no_larger_than_a_fresh_one(server: FakeServer) -> None:
    """What was said so far does not travel to every worker."""
    fresh = len(pickle.dumps(used_lm(server, calls=0)))
    assert len(pickle.dumps(used_lm(server, calls=10))) <= fresh < 1_500


def test_unpickled_twins_wait_differently() -> None:
    """Workers that share the state of one random generator would all come back at the same time."""
    raw = pickle.dumps(dspy.LM("openai/m", num_retries=50))
    (_, one, _), (_, other, _) = (pickle.loads(raw).middleware for _ in range(2))
    failure = LMServerError()
    waits = [[retry.delay(n, failure) for n in range(1, 50)] for retry in (one, other)]
    assert waits[0] != waits[1]


def test_own_model_survives_pickle() -> None:
    """A subclass needs nothing of its own for it."""
    assert pickle.loads(pickle.dumps(Shout("own/shout", top_p=0.5)))("hi") == ["HI"]


# --- What is shown and kept --------------------------------------------------------------------

SECRETS: dict[str, Any] = {
    "api_key": KEY,
    "headers": {"authorization": KEY},
    "extra_headers": {"authorization": KEY},
    "default_headers": {"authorization": KEY},
    "aws_secret_access_key": KEY,
    "aws_session_token": KEY,
    "azure_ad_token": KEY,
    "client_secret": KEY,
    "vertex_credentials": KEY,
}
each_secret = pytest.mark.parametrize("name", list(SECRETS))


@each_secret
def test_repr_shows_that_there_is_a_secret_and_not_which(name: str) -> None:
    """A repr ends up in notebooks, logs and bug reports."""
    shown = repr(dspy.LM("openai/m", temperature=0.5, **{name: SECRETS[name]}))
    assert shown == f"LM('openai/m', temperature=0.5, {name}='...')"


def test_repr_hides_secrets_inside_of_parameters() -> None:
    """Tools on remote servers bring keys and headers of their own (B 7.4)."""
    lm = dspy.LM(
        "openai/m",
        api_base="https://me:hidden@host/v1?api-key=hidden",
        extra_body={"token": "hidden", "top_k": 3},
        tools=[{"type": "mcp", "headers": {"Authorization": "Bearer hidden"}}],
    )
    assert "hidden" not in repr(lm)
    assert "'top_k': 3" in repr(lm)


@each_secret
def test_history_keeps_no_secret(name: str) -> None:
    """Histories are printed and saved."""
    lm = Noting(seed=1, **{name: SECRETS[name]})
    lm("hi", **{name: SECRETS[name]})
    assert dict(lm.history[0].kwargs) == {"seed": 1}


@each_secret
def test_callbacks_are_told_no_secret(name: str) -> None:
    """A callback sends what it hears to a tracing service."""
    heard: list[dict[str, Any]] = []

    class Listener(dspy.BaseCallback):
        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append(inputs)

    Noting(callbacks=[Listener()])("hi", seed=1, **{name: SECRETS[name]})
    assert heard == [{"messages": [{"role": "user", "content": "hi"}], "seed": 1}]


@each_secret
def test_repr_of_a_request_shows_no_secret(name: str) -> None:
    """Policies and fakes see requests, and whoever writes one prints them."""
    lm = FakeLM(["ok"], seed=1, **{name: SECRETS[name]})
    lm("hi")
    assert KEY not in repr(lm.requests)
    assert "'seed': 1" in repr(lm.requests)


def test_limits_are_no_secrets() -> None:
    """`max_tokens` has a secret's name almost, and is worth seeing."""
    assert repr(dspy.LM("openai/m", max_tokens=5)) == "LM('openai/m', max_tokens=5)"


def test_history_keeps_what_was_asked_and_answered() -> None:
    """`history[-1]` is how people look at what a model was really sent; it reads like DSPy's."""
    lm = Shout("own/shout", temperature=0.5)
    before = len(GLOBAL_HISTORY)
    lm("hello", seed=1)
    (entry,) = lm.history
    assert entry.model == entry["model"] == "own/shout"
    assert entry["messages"] == [{"role": "user", "content": "hello"}]
    assert entry["outputs"] == ("HELLO",)
    assert entry["kwargs"] == {"temperature": 0.5, "seed": 1}
    assert entry["usage"]["total_tokens"] == 3
    assert GLOBAL_HISTORY[-1] == entry
    assert before <= len(GLOBAL_HISTORY) <= before + 1


def test_history_is_a_ring() -> None:
    """A service must not grow by everything it ever said."""
    lm = Shout("own/shout")
    with dspy.context(max_history_size=3):
        for number in range(5):
            lm(f"call {number}")
    assert [entry["outputs"] for entry in lm.history] == [("CALL 2",), ("CALL 3",), ("CALL 4",)]


def test_disabled_history_keeps_nothing() -> None:
    """Prompts may be confidential."""
    lm = Shout("own/shout")
    before = len(GLOBAL_HISTORY)
    with dspy.context(disable_history=True):
        lm("secret")
    assert (len(lm.history), len(GLOBAL_HISTORY)) == (0, before)


def test_failed_call_is_not_in_the_history() -> None:
    """The history tells of answers."""
    lm = FakeLM([LMServerError("down")])
    with pytest.raises(LMServerError):
        lm("hi")
    assert len(lm.history) == 0


# --- Mistakes found when the LM is made --------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "no scheme": ({"api_base": "localhost:8000"}, "`api_base` must be a URL"),
    "no host": ({"api_base": "http://"}, "`api_base` must be a URL"),
    "not HTTP": ({"api_base": "ftp://host/v1"}, "`api_base` must be a URL"),
    "no text": ({"api_base": 8000}, "`api_base` must be a URL"),
    "no URL at all": ({"api_base": "http://[::1"}, "`api_base` must be a URL"),
    "other spelling": ({"base_url": "localhost"}, "`api_base` must be a URL"),
    "negative retries": ({"num_retries": -1}, "`num_retries` must be 0 or more, not -1"),
    "retries as text": ({"num_retries": "3"}, "`num_retries` must be 0 or more, not '3'"),
    "unknown engine": ({"engine": "lightllm"}, "Did you mean `litellm`?"),
    "unknown kind": ({"model_type": "audio"}, "`model_type` must be one of chat, text, responses"),
    "negative temperature": ({"temperature": -1}, "`temperature` must be a number of 0 or more"),
    "no tokens": ({"max_tokens": 0}, "`max_tokens` must be a number of more than 0"),
    "no time": ({"timeout": 0}, "`timeout` must be a number of more than 0"),
    "training": ({"provider": "x"}, "`provider` is not part of dspylite"),
    "more training": ({"train_kwargs": {"epochs": 1}}, "`train_kwargs` is not part of dspylite"),
}


@pytest.mark.parametrize(("options", "told"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_impossible_parameter_is_refused_when_made(options: dict[str, object], told: str) -> None:
    """The traceback points at the line with the mistake, and nothing was sent."""
    with pytest.raises(LMConfigurationError) as caught:
        dspy.LM("openai/m", **options)  # type: ignore[arg-type]
    assert told in str(caught.value)


@pytest.mark.parametrize("model", ["", "  ", None, 5])
def test_lm_without_a_name_is_refused_when_made(model: object) -> None:
    """An empty environment variable is a frequent cause."""
    with pytest.raises(LMConfigurationError, match="`model` must name a model"):
        dspy.LM(model)  # type: ignore[arg-type]


def test_unknown_offline_model_is_refused_when_made() -> None:
    """A misspelt offline model must not be looked for at a provider."""
    with pytest.raises(LMConfigurationError, match="Did you mean `offline/extractive`"):
        dspy.LM("offline/extractiv")


# --- Offline -----------------------------------------------------------------------------------


def test_repr_hides_a_password_in_the_endpoint() -> None:
    """Basic auth in a URL is a secret like a key."""
    shown = repr(dspy.LM("openai/m", api_base="http://user:pass-word-1@localhost:8000/v1"))
    assert "pass-word-1" not in shown
    assert "localhost:8000/v1" in shown


@pytest.mark.parametrize("lm", [dspy.OfflineLM(), dspy.LM("offline/extractive")], ids=repr)
def test_offline_model_answers_from_the_prompt(lm: dspy.LM) -> None:
    """Both spellings give the small reader, which needs no key and no network."""
    assert isinstance(lm.engine, OfflineEngine)
    assert lm("Which city is big? Oslo is small. Paris is a big city.") == ["Paris is a big city."]


async def test_offline_model_can_be_awaited() -> None:
    """It serves event loops like any other model."""
    answer = await dspy.OfflineLM().acall("Which city is big? Oslo is small. Paris is a big city.")
    assert answer == ["Paris is a big city."]


def test_offline_model_is_never_chosen_silently() -> None:
    """Without an LM a program must fail rather than answer from a toy."""
    with dspy.context(lm=None), pytest.raises(LMNotConfiguredError):
        dspy.Predict("question -> answer")(question="What?")


class Edited(dspy.LM):
    """A hosted model with a form of its own in front, as DSPy programs make them."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        said = [{"role": "user", "content": "edited"}]
        answer = super().forward(prompt, said, **{**kwargs, "top_p": 0.5})
        answer.choices[0].message.content += "!"
        return answer


class EditedTwice(Edited):
    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        said = [{"role": "user", "content": "awaited"}]
        return await super().aforward(prompt, said, **kwargs)


def at(server: FakeServer, kind: type[dspy.LM], **more: Any) -> dspy.LM:
    return kind("openai/m", api_base=server.base_url, api_key="none", **more)


def test_forward_of_a_hosted_model_may_be_overridden() -> None:
    """Its answers are those of all calls, and never come from the cache of the plain model."""
    with FakeServer(answer=lambda body: body["messages"][0]["content"]) as server:
        assert at(server, dspy.LM)("plain") == ["plain"]
        lm = at(server, Edited, deadline_s=60)
        assert [lm("plain"), lm("plain"), anyio.run(lm.acall, "plain")] == [["edited!"]] * 3
        assert anyio.run(at(server, EditedTwice).acall, "plain") == ["awaited"]
        bodies = [request.body for request in server.requests]
    assert [body.get("top_p") for body in bodies] == [None, 0.5, 0.5, 0.5, None]
    assert not any("deadline_s" in body for body in bodies)
    assert len(lm.history) == 3
    assert lm.history[-1]["usage"]["total_tokens"] > 0


def test_forward_of_a_hosted_model_gives_a_completion_past_the_history() -> None:
    """DSPy's `lm.forward(prompt=...)`, by attributes and by names."""
    with FakeServer(answer=lambda _: "Hi") as server:
        lm = at(server, dspy.LM)
        answer = lm.forward(prompt="x")
        awaited = anyio.run(lm.aforward, "x")
    assert answer.choices[0].message.content == answer["choices"][0]["message"]["content"] == "Hi"
    assert awaited.usage.total_tokens == answer.usage.total_tokens > 0
    assert len(lm.history) == 0
    with pytest.raises(KeyError):
        answer["nothing"]


def test_completion_of_an_answer_reads_as_the_same_answer() -> None:
    """Nothing is lost between `super().forward()` and the program."""
    response = LMResponse(
        outputs=(
            LMOutput(
                text="a",
                finish_reason="tool_calls",
                reasoning="why",
                tool_calls=({"id": "1", "function": {"name": "f", "arguments": "{}"}},),
                citations=({"cited_text": "x"},),
                logprobs={"content": [{"token": "a"}]},
            ),
            LMOutput(text="b"),
        ),
        usage=Usage(
            prompt_tokens=3,
            completion_tokens=2,
            total_tokens=6,
            calls=1,
            details={"cached_tokens": 1, "reasoning_tokens": 2},
        ),
        model="m",
        request_id="r",
    )
    assert read_chat_response(as_completion(response), model="other") == response
