"""`LM` through each engine against a real server: what arrives, how often, with whose key.

Not here: which error a failure becomes (`test_translate.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite import LM, Embedder, context, track_usage
from dspylite.errors import (
    LMAuthError,
    LMError,
    LMRateLimitError,
    LMServerError,
)
from dspylite.programs.predict import Predict
from dspylite.testing import FakeClock, FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"
TENANTS = {"red": "sk-of-tenant-red", "blue": "sk-of-tenant-blue"}
RETRIED = [408, 409, 425, 429, 500, 502, 503, 504, 529]
REFUSED = [400, 401, 402, 403, 404, 413, 422]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address.

    It is asked once before any test: of several threads that come first at once, each would make a
    client, and all but one would be dropped with their sockets open.
    """
    with FakeServer(dimensions=4) as server:
        for key in (KEY, *TENANTS.values()):
            lm_of(server, api_key=key, engine="litellm")("warm-up")
        yield server


awaited = pytest.mark.usefixtures("one_loop")


pytestmark = pytest.mark.usefixtures("engine")


def lm_of(server: FakeServer, **options: object) -> LM:
    return LM("openai/m", **{"api_base": server.base_url, "api_key": KEY, **options})


def sent(server: FakeServer) -> dict[str, object]:
    """Return the body of the only request."""
    (request,) = server.requests
    return dict(request.json)


# --- One request is one request ----------------------------------------------------------------


@pytest.mark.parametrize("status", RETRIED + REFUSED)
def test_one_attempt_is_one_request(status: int, server: FakeServer) -> None:
    """litellm and the SDK below it would each retry on their own, unseen by any policy."""
    server.script(Reply(status=status))
    with pytest.raises(LMError):
        lm_of(server, num_retries=0)("hi")
    assert [request.status for request in server.requests] == [status]


@awaited
@pytest.mark.parametrize("status", [408, 429, 500, 503, 400])
async def test_one_awaited_attempt_is_one_request(status: int, server: FakeServer) -> None:
    """The async clients of litellm have retries of their own."""
    server.script(Reply(status=status))
    with pytest.raises(LMError):
        await lm_of(server, num_retries=0).acall("hi")
    assert [request.status for request in server.requests] == [status]


@pytest.mark.parametrize("status", RETRIED)
def test_two_retries_are_three_requests(status: int, server: FakeServer) -> None:
    """What may pass is sent again, exactly as often as asked for."""
    server.script(*[Reply(status=status)] * 3)
    with FakeClock() as clock, pytest.raises(LMError):
        lm_of(server, num_retries=2)("hi")
    assert [request.status for request in server.requests] == [status] * 3
    assert len(clock.sleeps) == 2


@awaited
@pytest.mark.parametrize("status", [408, 429, 503])
async def test_two_awaited_retries_are_three_requests(status: int, server: FakeServer) -> None:
    """Likewise on an event loop."""
    server.script(*[Reply(status=status)] * 3)
    with FakeClock() as clock, pytest.raises(LMError):
        await lm_of(server, num_retries=2).acall("hi")
    assert [request.status for request in server.requests] == [status] * 3
    assert len(clock.sleeps) == 2


@pytest.mark.parametrize("status", REFUSED)
def test_refused_request_is_never_sent_again(status: int, server: FakeServer) -> None:
    """A refusal costs one request, however many retries are allowed."""
    server.script(Reply(status=status))
    with FakeClock() as clock, pytest.raises(LMError):
        lm_of(server, num_retries=5)("hi")
    assert [request.status for request in server.requests] == [status]
    assert clock.sleeps == []


@pytest.mark.parametrize("drop", ["before", "headers", "body"])
def test_broken_connection_is_one_request_and_retried_by_us(drop: str, server: FakeServer) -> None:
    """The SDK retries connection errors too, unless it is told not to."""
    server.script(Reply(drop=drop), Reply(drop=drop), Reply(text="hello"))  # type: ignore[arg-type]
    with FakeClock() as clock:
        assert lm_of(server, num_retries=2)("hi") == ["hello"]
    assert (len(server.requests), len(clock.sleeps)) == (3, 2)


def test_hanging_server_gets_one_request(server: FakeServer) -> None:
    """A timeout must not multiply the load of a server that is too slow already."""
    server.script(Reply(hang=True))
    with pytest.raises(LMError):
        lm_of(server, num_retries=0, timeout=0.2)("hi")
    assert len(server.requests) == 1


def test_retry_after_of_the_server_is_slept(server: FakeServer) -> None:
    """The wait that the provider asks for reaches the clock."""
    server.script(Reply(status=429, headers={"retry-after": "7"}))
    with FakeClock() as clock:
        lm_of(server, num_retries=1)("hi")
    assert clock.sleeps == [7.0]


def test_retry_after_beyond_the_cap_is_raised_at_once(server: FakeServer) -> None:
    """Nobody sleeps for an hour inside a call; the caller is told how long it would be."""
    server.script(Reply(status=429, headers={"retry-after": "3600"}))
    with FakeClock() as clock, pytest.raises(LMRateLimitError) as caught:
        lm_of(server, num_retries=5)("hi")
    assert (caught.value.retry_after_s, clock.sleeps, len(server.requests)) == (3600.0, [], 1)


def test_usage_counts_answers_and_not_attempts(server: FakeServer) -> None:
    """What the tracker says is what the server counted."""
    server.script(Reply(status=503), Reply(status=503))
    with FakeClock(), track_usage() as tracker:
        lm_of(server, num_retries=2)("one two three")
    counted = server.requests[-1].usage
    assert counted is not None
    assert tracker.total.calls == 1
    assert tracker.total.prompt_tokens == counted["prompt_tokens"] == 3
    assert tracker.total.total_tokens == counted["total_tokens"]


# --- What arrives ------------------------------------------------------------------------------


def test_prompt_arrives_as_a_user_message(server: FakeServer) -> None:
    """`lm("...")` is one user message, and nothing is added to it."""
    assert lm_of(server)("What is up?") == ["echo: What is up?"]
    assert sent(server) == {
        "model": "m",
        "messages": [{"role": "user", "content": "What is up?"}],
    }


def test_messages_arrive_as_they_are(server: FakeServer) -> None:
    """A chat is sent whole and in order."""
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
    ]
    assert lm_of(server)(messages=chat) == ["echo: Two"]
    assert sent(server)["messages"] == chat


def test_several_answers_are_asked_for_in_one_request(server: FakeServer) -> None:
    """`n=3` is one request with three choices, in the server's order."""
    server.script(Reply(texts=["a", "b", "c"]))
    assert lm_of(server)("hi", n=3) == ["a", "b", "c"]
    assert sent(server)["n"] == 3


def test_parameters_arrive_in_the_body(server: FakeServer) -> None:
    """Sampling parameters, the call's own and those of other servers, are all sent."""
    lm = lm_of(server, temperature=0.5, max_tokens=7, top_p=0.9)
    lm("hi", stop=["END"], seed=3, extra_body={"top_k": 5})
    body = sent(server)
    wanted = {"temperature": 0.5, "max_tokens": 7, "top_p": 0.9, "stop": ["END"], "seed": 3}
    assert {name: body[name] for name in wanted} == wanted
    assert body["top_k"] == 5


def test_parameters_of_a_call_win_over_those_of_the_lm(server: FakeServer) -> None:
    """A call may differ from its LM, and its None takes a parameter away."""
    lm_of(server, temperature=0.5, top_p=0.9)("hi", temperature=0.0, top_p=None)
    body = sent(server)
    assert body["temperature"] == 0.0
    assert "top_p" not in body


def test_key_and_headers_arrive(server: FakeServer) -> None:
    """A gateway in front of a model reads both."""
    lm_of(server, extra_headers={"x-tenant": "t-1"})("hi")
    (request,) = server.requests
    assert (request.api_key, request.headers["x-tenant"]) == (KEY, "t-1")


def test_key_function_is_asked_for_each_request(server: FakeServer) -> None:
    """Tokens that expire are renewed by whoever makes them, without a new LM."""
    keys = iter(["sk-first-token", "sk-second-token"])
    lm = lm_of(server, api_key=lambda: next(keys))
    lm("one")
    lm("two")
    assert [r.api_key for r in server.requests] == ["sk-first-token", "sk-second-token"]


def test_key_of_the_environment_is_used_when_none_is_given(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider's usual variable is enough."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key-of-the-environment")
    LM("openai/m", api_base=server.base_url)("hi")
    assert server.requests[0].api_key == "sk-key-of-the-environment"


def test_base_url_is_another_name_of_api_base(server: FakeServer) -> None:
    """Both spellings are in use."""
    LM("openai/m", base_url=server.base_url, api_key=KEY)("hi")
    assert len(server.requests) == 1


def test_developer_role_replaces_the_system_role(server: FakeServer) -> None:
    """Newer models want instructions under another name; for others litellm changes it back."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    lm = LM("openai/o3-mini", api_base=server.base_url, api_key=KEY, use_developer_role=True)
    lm(messages=chat)
    assert sent(server)["messages"] == [{**chat[0], "role": "developer"}, chat[1]]
    assert chat[0]["role"] == "system"


def test_tool_calls_and_reasoning_are_returned_beside_the_text(server: FakeServer) -> None:
    """An answer that is more than text is a dict."""
    server.script(Reply(text="", tool_calls=[{"name": "look", "arguments": {"at": "sky"}}]))
    (answer,) = lm_of(server)("hi")
    assert isinstance(answer, dict)
    assert answer["text"] == ""
    assert answer["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "sky"}'}


@awaited
async def test_acall_answers(server: FakeServer) -> None:
    """One LM object serves sync and async callers, on both event loops."""
    assert await lm_of(server).acall("hi", n=2) == ["echo: hi", "echo: hi"]


@awaited
async def test_acalls_run_at_the_same_time(server: FakeServer) -> None:
    """None of eight calls can end before all have arrived, so they must be in flight together."""
    lm, answers = lm_of(server), dict[int, object]()

    async def ask(number: int) -> None:
        answers[number] = await lm.acall(f"question {number}")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            with server.hold():
                for number in range(8):
                    group.start_soon(ask, number)
                await anyio.to_thread.run_sync(server.wait_for_requests, 8)
                assert server.in_flight == 8
    assert answers == {number: [f"echo: question {number}"] for number in range(8)}


# --- Many threads, two tenants -----------------------------------------------------------------


def test_each_key_arrives_with_its_own_prompts_only(server: FakeServer) -> None:
    """Two LMs used by 32 threads at once: no key, endpoint or prompt may cross."""
    lms = {name: lm_of(server, api_key=key) for name, key in TENANTS.items()}
    together = threading.Barrier(32)

    questions = [(name, f"{name} {number}") for number in range(16) for name in TENANTS]

    def ask(name: str, prompt: str) -> list[object]:
        together.wait(20)
        return list(lms[name](prompt))

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, *zip(*questions, strict=True)))
    assert answers == [[f"echo: {prompt}"] for _, prompt in questions]
    seen = [(request.api_key, request.prompt) for request in server.requests]
    assert sorted(seen) == sorted((TENANTS[name], prompt) for name, prompt in questions)


def test_lm_of_the_context_is_used_per_thread(server: FakeServer) -> None:
    """One predictor shared by threads asks each thread's own LM."""
    predict = Predict("question -> answer")
    server.script_for(
        lambda request: True,
        *[Reply(text="[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]")] * 8,
    )
    together = threading.Barrier(8)

    def ask(number: int) -> str:
        with context(lm=lm_of(server, api_key=f"sk-of-thread-{number}")):
            together.wait(20)
            return str(predict(question=f"question {number}?").answer)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == ["yes"] * 8
    pairs = {request.api_key: request.prompt for request in server.requests}
    assert len(server.requests) == len(pairs) == 8
    assert all(f"question {key[-1]}?" in prompt for key, prompt in pairs.items() if key)


# --- First use ---------------------------------------------------------------------------------

FIRST_USE = """
import json, os, sys, threading

connected, looked_up = set(), set()

def spy(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        connected.add(args[1][:2])
    if event == "socket.getaddrinfo":
        looked_up.add(args[0])

sys.addaudithook(spy)
import dspylite as dspy

base, answers, errors = sys.argv[1], [], []
together = threading.Barrier(8)
lm = dspy.LM("openai/m", api_base=base, api_key="sk-first-use", num_retries=0)

def ask(number):
    together.wait(20)
    try:
        answers.append(lm(f"question {number}")[0])
    except BaseException as error:
        errors.append(repr(error))

before = "litellm" in sys.modules
threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({
    "before": before,
    "answers": sorted(answers),
    "errors": errors,
    "price list": os.environ.get("LITELLM_LOCAL_MODEL_COST_MAP"),
    "connected": sorted(connected),
    "looked up": sorted(map(str, looked_up)),
}))
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "LITELLM_LOCAL_MODEL_COST_MAP"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )


def test_first_use_by_eight_threads_at_once_works(engine: str, server: FakeServer) -> None:
    """What is loaded late is loaded by whoever comes first, talks to the LM alone, prints nothing.

    (B 7.6)
    """
    done = run_python(FIRST_USE, server.base_url)
    assert json.loads(done.stdout) == {
        "before": False,
        "answers": [f"echo: question {number}" for number in range(8)],
        "errors": [],
        "price list": "True" if engine == "litellm" else None,
        "connected": [["127.0.0.1", server.port]],
        "looked up": ["127.0.0.1"],
    }
    assert done.stderr == ""
    assert len(server.requests) == 8


def test_choice_of_the_user_about_the_price_list_is_kept(tmp_path: Path) -> None:
    """Who wants litellm to fetch prices says so in the environment, and we do not overrule it."""
    (tmp_path / "litellm.py").write_text("import os\nprint(os.environ[os.environ['ASKED']])\n")
    name = "LITELLM_LOCAL_MODEL_COST_MAP"
    code = "from dspylite.models.litellm_door import load_litellm; load_litellm()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_python(code, PYTHONPATH=path, ASKED=name, **{name: "False"})
    assert done.stdout == "False\n"


# --- Embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_one_batch_of_embeddings_is_one_request(status: int, server: FakeServer) -> None:
    """litellm's embedding takes a 0 for "not given" and would retry twice."""
    server.script(Reply(status=status))
    with pytest.raises(LMError):
        Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0).embed(["a"])
    assert [request.status for request in server.requests] == [status]


@awaited
async def test_one_awaited_batch_of_embeddings_is_one_request(server: FakeServer) -> None:
    """Likewise on an event loop."""
    server.script(Reply(status=503))
    embedder = Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0)
    with pytest.raises(LMServerError):
        await embedder.aembed(["a"])
    assert len(server.requests) == 1


def test_wrong_key_is_told_by_class(server: FakeServer) -> None:
    """A key that the server does not know is no reason to try again."""
    with FakeServer(api_keys=["sk-the-right-key"]) as strict:
        with pytest.raises(LMAuthError):
            lm_of(strict, api_key="sk-the-wrong-key")("hi")
        assert lm_of(strict, api_key="sk-the-right-key")("hi") == ["echo: hi"]
        assert [request.status for request in strict.requests] == [401, 200]


# --- What the model can do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"model": "openai/gpt-4o-mini"}, "json_schema"),
        ({"model": "openai/m"}, None),
        ({"model": "openai/m", "capabilities": {"json_schema"}}, "json_schema"),
        ({"model": "openai/m", "capabilities": ["json_object"]}, "json_object"),
        ({"model": "openai/gpt-4o-mini", "capabilities": ()}, None),
    ],
    ids=str,
)
def test_a_schema_is_sent_where_the_model_has_it(
    server: FakeServer, options: dict[str, Any], wanted: str | None
) -> None:
    """A server that does not know `response_format` may refuse the whole request."""
    server.script(Reply(text='{"answer": "yes"}'))
    lm = LM(**options, api_base=server.base_url, api_key=KEY)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict("question -> answer")(question="?").answer == "yes"
    form: Any = sent(server).get("response_format")
    assert (form["type"] if form else None) == wanted
    if wanted == "json_schema":
        assert form["json_schema"]["schema"]["required"] == ["answer"]


@awaited
async def test_a_schema_is_sent_by_awaited_calls_too(server: FakeServer) -> None:
    """Looking the model up must not block the event loop, nor be left out there."""
    server.script(Reply(text='{"answer": "yes"}'))
    lm = LM("openai/gpt-4o-mini", api_base=server.base_url, api_key=KEY)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        prediction = await dspy.Predict("question -> answer").acall(question="?")
    assert prediction.answer == "yes"
    assert "response_format" in sent(server)


def test_a_copy_can_have_other_capabilities() -> None:
    """They are the LM's own and never sent as request parameters."""
    lm = LM("openai/m").copy(capabilities={"json_object"}, use_developer_role=True)
    assert lm.capabilities == {"json_object"}
    assert lm.use_developer_role
    assert lm.kwargs == {}


def test_an_unknown_capability_is_refused_when_the_lm_is_made() -> None:
    """A typo would silently switch structured output off."""
    with pytest.raises(dspy.LMConfigurationError, match="Did you mean `json_schema`"):
        LM("openai/m", capabilities={"json_shema"})
