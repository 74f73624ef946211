"""`deadline_s` against a real server: whatever takes too long, the call ends in time.

Not here: waiting by a fake clock (`test_flow.py`), and the time limits of single attempts
(`test_direct_wire.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite import LM, Embedder, context
from dspylite.errors import (
    DeadlineExceededError,
    LMError,
    LMRateLimitError,
    LMServerError,
    SettingsError,
)
from dspylite.testing import FakeServer, Reply

KEY = "sk-key-of-this-test-0123456789"
DEADLINE_S = 0.3
LATE_S = 0.3
"""What is promised."""
SLACK_S = 1.0
"""For a machine whose cores are busy with something else; far below any library's own limits."""

ANSWERS = {
    "hang": Reply(hang=True),
    "slow drip": Reply(text="word " * 20, byte_delay_s=0.02),
    "429": Reply(status=429),
    "429 with a wait": Reply(status=429, headers={"retry-after": "0.2"}),
    "503": Reply(status=503),
}
ENDS: Mapping[str, type[LMError]] = {
    "hang": DeadlineExceededError,
    "slow drip": DeadlineExceededError,
    # Where no further attempt fits into the time left, what the last one met is told at once.
    "429": LMRateLimitError,
    "429 with a wait": LMRateLimitError,
    "503": LMServerError,
}


def answer(body: Mapping[str, Any]) -> Reply | None:
    """Answer as the last line of the prompt says."""
    prompt = str(body["messages"][-1]["content"] if "messages" in body else body["input"][0])
    return next((ANSWERS[name] for name in sorted(ANSWERS)[::-1] if name in prompt), None)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module, and let both engines load what they need, which takes time.

    What litellm has left behind on a thread ends with the server.
    """
    with FakeServer(answer=answer) as server:
        for engine in ("direct", "litellm"):
            lm_of(server, engine)("warm-up")
        yield server


awaited = pytest.mark.usefixtures("one_loop")
each = pytest.mark.parametrize("prompt", list(ANSWERS))


@pytest.fixture(params=["direct", "litellm"])
def engine(request: pytest.FixtureRequest) -> str:
    """Run a test through both engines."""
    name: str = request.param
    return name


def lm_of(server: FakeServer, engine: str, **options: Any) -> LM:
    given = {"api_base": server.base_url, "api_key": KEY, "engine": engine}
    return LM("openai/m", **given | options)


class InTime:
    """A block that must end with an error of ours, in time.

    Attributes:
        error: What it ended with.
        started: When it was entered.
    """

    error: LMError

    def __enter__(self) -> InTime:
        self.started = time.monotonic()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        seconds = time.monotonic() - self.started
        if not isinstance(error, LMError):
            return False
        assert seconds < DEADLINE_S + LATE_S + SLACK_S
        self.error = error
        return True


def check_silence(server: FakeServer, block: InTime) -> None:
    """Check that no request came after the deadline, and that none still comes."""
    seen = len(server.requests)
    assert server.requests[-1].received_at - block.started < DEADLINE_S + LATE_S
    lm_of(server, "direct", api_key="sk-of-a-later-caller")("is anybody there?")
    assert len(server.requests) == seen + 1


# --- Whatever takes too long ---------------------------------------------------------------------


@each
def test_call_ends_at_its_deadline(prompt: str, server: FakeServer, engine: str) -> None:
    """Whoever waits for a page or a job was promised an end, whatever the server does (B 4.4)."""
    with InTime() as block:
        lm_of(server, engine, deadline_s=DEADLINE_S)(prompt)
    assert type(block.error) in {ENDS[prompt], DeadlineExceededError}
    check_silence(server, block)


@awaited
@each
async def test_awaited_call_ends_at_its_deadline(
    prompt: str, server: FakeServer, engine: str
) -> None:
    """Likewise on either event loop (B 4.4)."""
    with InTime() as block:
        await lm_of(server, engine, deadline_s=DEADLINE_S).acall(prompt)
    assert type(block.error) in {ENDS[prompt], DeadlineExceededError}
    check_silence(server, block)


@pytest.mark.parametrize("prompt", ["hang", "slow drip"])
def test_stream_ends_at_its_deadline(prompt: str, server: FakeServer, engine: str) -> None:
    """The deadline covers the body, piece by piece, and not only its beginning (B 4.4)."""
    with InTime() as block, lm_of(server, engine, deadline_s=DEADLINE_S).stream(prompt) as stream:
        list(stream)
    assert type(block.error) is DeadlineExceededError


@awaited
@pytest.mark.parametrize("prompt", ["hang", "slow drip"])
async def test_awaited_stream_ends_at_its_deadline(
    prompt: str, server: FakeServer, engine: str
) -> None:
    """Likewise on either event loop (B 4.4)."""
    lm = lm_of(server, engine, deadline_s=DEADLINE_S)
    with InTime() as block:
        async with await lm.astream(prompt) as stream:
            async for _ in stream:
                pass
    assert type(block.error) is DeadlineExceededError


def test_waiting_in_line_ends_at_the_deadline(server: FakeServer, engine: str) -> None:
    """A full queue is no better than a slow server, and what never left is not sent (B 4.4)."""
    lm = lm_of(server, engine, max_concurrency=1)
    with server.hold():
        first = threading.Thread(target=lm, args=("first",))
        first.start()
        server.wait_for_requests(1)
        with InTime() as block:
            lm("second", deadline_s=DEADLINE_S)
        assert len(server.requests) == 1
    first.join()
    assert type(block.error) is DeadlineExceededError
    assert [request.prompt for request in server.requests] == ["first"]


@awaited
async def test_awaited_waiting_in_line_ends_at_the_deadline(
    server: FakeServer, engine: str
) -> None:
    """Likewise on either event loop (B 4.4)."""
    lm = lm_of(server, engine, max_concurrency=1)
    async with anyio.create_task_group() as group:
        with server.hold():
            group.start_soon(lm.acall, "first")
            await anyio.to_thread.run_sync(server.wait_for_requests, 1)
            with InTime() as block:
                await lm.acall("second", deadline_s=DEADLINE_S)
    assert type(block.error) is DeadlineExceededError
    assert [request.prompt for request in server.requests] == ["first"]


def test_embedding_ends_at_its_deadline(server: FakeServer, engine: str) -> None:
    """An index that is being built has a deadline too (B 4.4)."""
    embedder = Embedder("openai/m", api_base=server.base_url, api_key=KEY, engine=engine)

    class Index(dspy.Module):
        def forward(self) -> Any:
            return embedder.embed(["hang"])

    with InTime() as block, context(deadline_s=DEADLINE_S):
        Index()()
    assert type(block.error) is DeadlineExceededError


# --- Wherever it is given ------------------------------------------------------------------------


def test_deadline_of_the_settings_counts(server: FakeServer) -> None:
    """A service says it once, for all programs (B 4.4)."""
    lm = lm_of(server, "direct")
    dspy.configure(deadline_s=DEADLINE_S)
    try:
        with InTime() as block:
            lm("hang")
    finally:
        dspy.configure(deadline_s=None)
    assert type(block.error) is DeadlineExceededError


def test_deadline_of_a_block_counts(server: FakeServer) -> None:
    """A handler says it for one request (B 4.4)."""
    with InTime() as block, context(deadline_s=DEADLINE_S):
        lm_of(server, "direct")("hang")
    assert type(block.error) is DeadlineExceededError


def test_deadline_of_a_call_counts(server: FakeServer) -> None:
    """One call may be in a hurry where its LM is not; the server never hears of it (B 4.4)."""
    with InTime() as block:
        lm_of(server, "direct", deadline_s=30)("hang", deadline_s=DEADLINE_S)
    assert type(block.error) is DeadlineExceededError
    assert "deadline_s" not in server.requests[0].json


@pytest.mark.parametrize("prompt", ["hang", "429"])
def test_deadline_of_a_prediction_counts(prompt: str, server: FakeServer) -> None:
    """It covers all calls that the prediction makes (B 4.4)."""
    predict = dspy.Predict("question -> answer")
    with InTime() as block, context(lm=lm_of(server, "direct")):
        predict(question=prompt, deadline_s=DEADLINE_S)
    assert type(block.error) in {ENDS[prompt], DeadlineExceededError}


@awaited
async def test_deadline_of_an_awaited_prediction_counts(server: FakeServer) -> None:
    """Likewise on either event loop (B 4.4)."""
    predict = dspy.Predict("question -> answer")
    with InTime() as block, context(lm=lm_of(server, "direct")):
        await predict.acall(question="hang", deadline_s=DEADLINE_S)
    assert type(block.error) is DeadlineExceededError


@pytest.mark.parametrize(("outer_s", "inner_s"), [(DEADLINE_S, 30), (30, DEADLINE_S)])
def test_the_smaller_of_two_deadlines_counts(
    outer_s: float, inner_s: float, server: FakeServer
) -> None:
    """A step cannot take more time than the whole, nor the whole give a step more (B 4.4)."""
    with InTime() as block, context(deadline_s=outer_s, lm=lm_of(server, "direct")):
        dspy.Predict("question -> answer")(question="hang", deadline_s=inner_s)
    assert type(block.error) is DeadlineExceededError


def test_steps_of_a_program_share_its_deadline(server: FakeServer) -> None:
    """The second step has what the first has left, not as much again (B 4.4)."""

    class TwoSteps(dspy.Module):
        def forward(self) -> None:
            lm = lm_of(server, "direct")
            with pytest.raises(DeadlineExceededError):
                lm("hang")
            lm("hang again")

    with InTime() as block, context(deadline_s=DEADLINE_S):
        TwoSteps()()
    assert type(block.error) is DeadlineExceededError
    assert len(server.requests) <= 2


def test_call_in_time_is_not_touched_by_its_deadline(server: FakeServer) -> None:
    """A deadline that is far away changes nothing."""
    assert lm_of(server, "direct", deadline_s=60)("quick") == ["echo: quick"]


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), "soon", True])
def test_impossible_deadline_is_refused_at_once(deadline_s: Any) -> None:
    """A mistake is found when the LM is made, not when the first call ends early."""
    with pytest.raises((SettingsError, dspy.LMConfigurationError), match="deadline_s"):
        LM("openai/m", deadline_s=deadline_s)


@pytest.mark.parametrize("deadline_s", [1e12, float("inf")])
def test_a_deadline_beyond_all_clocks_is_none(deadline_s: float, server: FakeServer) -> None:
    """Calls that wait in line do so as long as it takes, which the system's waits refuse to."""
    lm = LM("openai/m", api_base=server.base_url, api_key="k", engine="direct", max_concurrency=1)
    with context(deadline_s=deadline_s), dspy.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lm, [f"hi {n}" for n in range(8)]))
    assert len(answers) == 8
