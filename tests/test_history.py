"""Histories: what an entry tells, how much is kept, and what a redaction lets through.

Not here: which histories a call is kept in (`test_tracking.py`), how entries are shown
(`test_inspection.py`), and the log (`test_logging.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import dspylite as dspy
from dspylite.errors import SettingsError
from dspylite.runtime.history import (
    CUT_TEXT_CHARS,
    GLOBAL_HISTORY,
    History,
    HistoryEntry,
    keep_call,
)
from dspylite.schema.messages import LMOutput, LMResponse, Usage
from dspylite.testing import FakeLM, FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
IS_FULL = os.environ.get("DSPYLITE_SOAK") == "1"
LARGE = "x" * 20_000


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    return dspy.LM(
        "openai/m", api_base=server.base_url, api_key="sk-of-this-test", engine="direct", **options
    )


def entry_of(text: str = "hello", **changes: Any) -> HistoryEntry:
    given = {"model": "m", "messages": [{"role": "user", "content": text}], "outputs": ("hi",)}
    return HistoryEntry(**{**given, "usage": {}, "kwargs": {}, **changes})


# --- What an entry tells -------------------------------------------------------------------------

DSPY_KEYS = {
    *("prompt", "messages", "kwargs", "response", "outputs", "usage", "cost", "timestamp"),
    *("uuid", "model", "response_model", "model_type"),
}


def test_entry_has_every_key_that_dspy_programs_read(server: FakeServer) -> None:
    """A program that looks into `lm.history` keeps working (B 4.11)."""
    lm = lm_of(server, temperature=0.5)
    lm("hello", max_tokens=9)
    (entry,) = lm.history
    assert isinstance(entry, Mapping)
    assert set(entry) == DSPY_KEYS | {"cached", "seconds"}
    assert len(entry) == len(list(entry)) == len(entry.keys())
    assert dict(entry) == {name: getattr(entry, name) for name in entry}
    assert entry["prompt"] == "hello"
    assert entry["messages"] == [{"role": "user", "content": "hello"}]
    assert entry["kwargs"] == {
        "temperature": 0.5,
        "max_tokens": 9,
        "api_base": server.base_url,
    }
    assert (entry["model"], entry["model_type"], entry["response_model"]) == (
        "openai/m",
        "chat",
        entry["response"].model,
    )
    assert entry["outputs"] == tuple(output.text for output in entry.response.outputs)
    assert entry["usage"]["total_tokens"] == entry.response.usage.total_tokens > 0
    assert (entry.cached, entry.seconds > 0) == (False, True)


def test_entry_is_read_like_a_dict_and_never_changed() -> None:
    """Histories share their entries, so nobody may change one."""
    entry: Any = entry_of()
    assert (entry.get("cost"), entry.get("nothing", 3), "uuid" in entry) == (None, 3, True)
    assert "size_bytes" not in entry
    with pytest.raises(KeyError):
        entry["size_bytes"]
    with pytest.raises(TypeError):
        entry["model"] = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.model = "other"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([{"role": "user", "content": "one text"}], "one text"),
        ([{"role": "system", "content": "be kind"}], None),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], None),
        ([], None),
        (["no dict"], None),
    ],
)
def test_prompt_is_the_text_of_a_single_user_message(messages: Any, prompt: str | None) -> None:
    """DSPy's `prompt` is what `lm("...")` was given."""
    assert entry_of(messages=messages).prompt == prompt


def test_outputs_are_what_the_call_returned(server: FakeServer) -> None:
    """Tool calls would be lost if only texts were kept."""
    server.script(Reply(text="", tool_calls=[{"name": "look", "arguments": {"at": "sky"}}]))
    lm = lm_of(server)
    returned = lm("hello")
    (entry,) = lm.history
    assert list(entry.outputs) == returned
    assert entry.outputs[0]["tool_calls"][0]["function"]["name"] == "look"


def test_reasoning_is_kept_beside_the_text() -> None:
    """What a model thought explains what it said."""
    lm = FakeLM([LMResponse(outputs=(LMOutput(text="4", reasoning="2 + 2"),))])
    lm("hello")
    assert lm.history[0].outputs == ({"text": "4", "reasoning_content": "2 + 2"},)


def test_entry_of_a_stream_is_that_of_its_whole_answer(server: FakeServer) -> None:
    """A stream that has ended is an answered call, and nothing open is kept of it."""
    server.script(Reply(chunks=["a ", "b"]))
    lm = lm_of(server)
    with lm.stream("hello") as stream:
        list(stream)
    (entry,) = lm.history
    assert (entry.outputs, entry.response.stream, entry.response.verdict) == (("a b",), None, None)
    assert pickle.loads(pickle.dumps(entry)) == copy.deepcopy(entry) == entry


USD_OF_ONE = (1_000_000, 2_000_000)


@pytest.mark.parametrize(
    ("price", "usage", "cost"),
    [
        (USD_OF_ONE, {"prompt_tokens": 3, "completion_tokens": 4}, 11.0),
        (USD_OF_ONE, {}, None),  # the server counted nothing
        (None, {"prompt_tokens": 3, "completion_tokens": 4}, None),
        ((0, 0), {}, 0.0),
    ],
)
def test_cost_is_known_or_none(
    price: Any, usage: dict[str, int], cost: float | None, server: FakeServer
) -> None:
    """A cost of 0 that is really unknown would end in somebody's bill (B 4.8)."""
    server.script(Reply(usage=usage))
    lm = lm_of(server, price=price)
    lm("hello")
    assert lm.history[0].cost == cost


def test_cached_answer_costs_nothing() -> None:
    """Whatever the model's price, nobody was asked."""
    kept: list[Any] = []
    response = LMResponse(
        outputs=(LMOutput(text="a"),), usage=Usage(cached_calls=1), cached=True, model="m-1"
    )
    keep_call(model="m", messages=[], params={}, response=response, outputs=["a"], histories=[kept])
    assert (kept[0].cost, kept[0].cached, kept[0].response_model) == (0.0, True, "m-1")


class Judge:
    """Where a reader would say whether the answer is worth keeping; it holds a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def accept(self) -> None: ...

    def reject(self) -> None: ...


def test_nothing_alive_is_kept_of_an_answer() -> None:
    """An entry outlives its call, and is pickled."""
    lm = FakeLM([LMResponse(outputs=(LMOutput(text="a"),), verdict=Judge())])
    lm("hello")
    assert lm.history[0].response.verdict is None
    pickle.dumps(lm.history[0])


def test_entries_tell_when_and_which(server: FakeServer) -> None:
    """Lines of a log are joined with calls by these."""
    lm = lm_of(server)
    with dspy.ThreadPoolExecutor(8) as pool:
        list(pool.map(lm, ["hello"] * 24))
    ids = {entry["uuid"] for entry in lm.history}
    assert len(ids) == len({uuid.UUID(each) for each in ids}) == 24
    times = [datetime.fromisoformat(entry["timestamp"]) for entry in lm.history]
    assert {time.utcoffset() for time in times} == {timedelta(0)}


def test_entry_keeps_the_messages_of_then() -> None:
    """A chat goes on in the same list, and its history must not go on with it."""
    lm = FakeLM()
    call = {"id": "1", "function": {"name": "find", "arguments": "{}"}}
    picture = {"type": "image_url", "image_url": {"url": "http://a"}}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "first"}, picture]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    kept = copy.deepcopy(messages)
    lm(messages=messages)
    messages[0]["content"][0]["text"] = "changed"
    messages[0]["role"] = "assistant"
    messages.append({"role": "user", "content": "second"})
    picture["image_url"] = call["function"] = {"changed": "yes"}
    messages[1]["tool_calls"].append(call)
    assert lm.history[0].messages == kept


def test_messages_and_parameters_that_hold_themselves_are_kept() -> None:
    """A model of one's own may take what no server could; the ways through it have no end."""
    loop: list[Any] = []
    loop.extend([loop] * 50)
    message: Any = {"role": "user", "content": loop}
    history = History()
    keep_call(
        model="m",
        messages=[message],
        params={"extra_body": {"loop": loop}},
        response=LMResponse(outputs=(LMOutput(text="a"),)),
        outputs=["a"],
        histories=[history],
    )
    assert len(history[0].messages[0]["content"]) == 50


def test_entry_keeps_the_answer_of_then() -> None:
    """Callers read the arguments of a tool call in place."""
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "finish_reason": "tool_calls", "message": message}

    class Calling(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            return {"model": "m", "choices": [choice]}

    lm = Calling("my/model")
    answer: Any = lm("hello")[0]
    answer["tool_calls"][0]["function"]["arguments"] = {"changed": "yes"}
    assert "changed" not in repr(dict(lm.history[0]))


def test_module_that_calls_itself_keeps_each_call_once() -> None:
    """Its history is open at each depth."""

    class Countdown(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predict = dspy.Predict("question -> answer")

        def forward(self, depth: int) -> Any:
            return self(depth=depth - 1) if depth else self.predict(question="q")

    program = Countdown()
    with dspy.context(lm=FakeLM(default={"answer": "a"})):
        program(depth=3)
    assert len(program.history) == 1


def test_secrets_inside_of_parameters_are_not_kept() -> None:
    """Tools on remote servers bring keys and headers of their own (B 7.4)."""
    lm = FakeLM()
    schema = {"properties": {"api_key": {"type": "string"}, "token": {"anyOf": [{}]}}}
    deep: Any = "bottom"
    for _ in range(40):
        deep = [deep]
    lm(
        "hello",
        tools=[
            {
                "type": "mcp",
                "headers": {"Authorization": "Bearer hidden"},
                "authorization": "hidden",
            },
            {"type": "mcp", "headers": {"type": "x", "Authorization": "hidden", "X-Count": 5}},
            {"type": "mcp", "server_url": "https://me:hidden@host/sse?v=1&api-key=hidden"},
            {"type": "function", "parameters": schema},
        ],
        metadata=({"apiKey": "hidden", "x-api-key": "hidden", "token": ["hidden"]},),
        extra_body={"inner": {"api_key": "hidden", "top_k": 3}, "deep": deep},
    )
    kwargs = lm.history[0].kwargs
    assert "hidden" not in repr(kwargs)
    assert kwargs["tools"][2]["server_url"] == "https://...@host/sse?v=1&api-key=..."
    assert kwargs["tools"][3]["parameters"] == schema
    assert kwargs["extra_body"]["inner"] == {"api_key": "[redacted]", "top_k": 3}
    assert "bottom" not in repr(kwargs["extra_body"]["deep"])


# --- How much is kept ----------------------------------------------------------------------------


def test_history_is_bounded_in_bytes_by_dropping_the_oldest(server: FakeServer) -> None:
    """A thousand prompts are little or much, as they are long (B 4.11)."""
    lm = lm_of(server)
    server.script(*[Reply(text="ok")] * 12)
    with dspy.context(max_history_bytes=100_000):
        for number in range(12):
            lm(f"{number} {LARGE}")
    kept = [int(entry.prompt.partition(" ")[0]) for entry in lm.history]
    assert kept == [8, 9, 10, 11]
    assert 80_000 < lm.history.size_bytes <= 100_000


def test_sums_never_drift_while_16_threads_add_and_clear() -> None:
    """A sum that is off by a little each time is one day off by all."""
    history = History()
    entries = [entry_of("y" * size) for size in range(0, 4_000, 250)]
    barrier = threading.Barrier(16, timeout=20)

    def add(first: int) -> list[int]:
        barrier.wait()
        found = []
        for step in range(300):
            history.add(entries[(first + step) % len(entries)])
            if step == 150 and first == 3:
                history.clear()
            found.append(sum(entry.size_bytes for entry in history))
        return found

    limits = dspy.context(max_history_bytes=50_000, max_history_size=12)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with limits, dspy.ThreadPoolExecutor(16) as pool:
            seen = [size for sizes in pool.map(add, range(16)) for size in sizes]
    finally:
        sys.setswitchinterval(interval)
    assert max(seen) <= 50_000
    assert history.size_bytes == sum(entry.size_bytes for entry in history)
    history.clear()
    assert (len(history), history.size_bytes) == (0, 0)


def test_call_larger_than_the_bound_is_kept_with_its_texts_cut(server: FakeServer) -> None:
    """The call with the huge picture is often the one that somebody wants to look at."""
    server.script(Reply(text="z" * 5_000))
    lm, url = lm_of(server), "data:image/png;base64," + "A" * 300_000
    picture = {"type": "image_url", "image_url": {"url": url}}
    with dspy.context(max_history_bytes=20_000):
        lm("an earlier call")
        lm(messages=[{"role": "user", "content": [{"type": "text", "text": "what?"}, picture]}])
    entry = lm.history[-1]
    text, cut = entry.messages[0]["content"]
    assert text == {"type": "text", "text": "what?"}
    assert cut["image_url"]["url"].startswith(url[:CUT_TEXT_CHARS] + "… (299022 more characters)")
    assert entry.outputs == ("an earlier call",) or len(entry.outputs[0]) < 1_100
    assert entry.response is None
    assert lm.history.size_bytes <= 20_000


@pytest.mark.parametrize("most", [0, 3_000])
def test_call_that_is_too_large_even_when_cut_is_not_kept(most: int) -> None:
    """The bound holds whatever is asked."""
    lm, own = FakeLM(), History()
    with dspy.context(max_history_bytes=most):
        lm(LARGE)
        own.add(entry_of(LARGE, outputs=(LARGE, LARGE)))
    assert (len(lm.history), lm.history.size_bytes) == (len(own), own.size_bytes) == (0, 0)
    assert GLOBAL_HISTORY.size_bytes == sum(each.size_bytes for each in GLOBAL_HISTORY)


LARGE_IN: dict[str, dict[str, Any]] = {
    "a message": {"messages": [{"role": "user", "content": LARGE}]},
    "wide text": {"messages": [{"role": "user", "content": "鴨" * 10_000}]},
    "a picture": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": LARGE}}]}
        ]
    },
    "an answer": {"outputs": (LARGE,)},
    "a tool call": {"outputs": ({"tool_calls": [{"function": {"arguments": LARGE}}]},)},
    "a parameter": {"kwargs": {"extra_body": {"documents": [LARGE]}}},
    "an asked tool": {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": LARGE}}]}]
    },
}


@pytest.mark.parametrize("place", LARGE_IN)
def test_size_counts_texts_wherever_they_are(place: str) -> None:
    """Whatever is not counted would grow without bound."""
    size = entry_of(**LARGE_IN[place]).size_bytes - entry_of().size_bytes
    assert 19_000 < size < 22_000


def test_size_of_values_that_hold_themselves_ends() -> None:
    """Parameters of a model of one's own may be anything."""
    ring: list[Any] = []
    ring.append(ring)
    assert 1_000 < entry_of(kwargs={"ring": ring}).size_bytes < 3_000
    lm = FakeLM()
    with dspy.context(max_history_bytes=10_000):
        lm(LARGE, ring=ring, numbers=(1, 2))
    assert len(lm.history) == 1


class Brief(dspy.BaseLM):
    """A model that keeps nothing itself."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        usage = {"prompt_tokens": 3_000, "completion_tokens": 1_000}
        return {
            "choices": [
                {"message": {"content": "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"}}
            ],
            "usage": usage,
        }


def test_estimate_is_near_what_is_really_taken() -> None:
    """A bound in bytes that is off by a factor is none."""
    lm, predict = Brief("own/brief"), dspy.Predict("question -> answer")
    GLOBAL_HISTORY.clear()
    with dspy.context(lm=lm, max_history_bytes=100_000_000):
        predict(question="warm-up")
        lm.history.clear()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(300):
                predict(question=f"{number} ")
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    print(f"{(after - before) / 300} bytes a call, {lm.history.size_bytes / 300} by estimate")
    assert len(lm.history) == 300
    assert 0.7 < lm.history.size_bytes / (after - before) < 1.4


@pytest.mark.parametrize(
    "off", [{"disable_history": True}, {"max_history_size": 0}, {"max_history_bytes": 0}]
)
def test_history_that_is_off_keeps_nothing_anywhere(off: Any, server: FakeServer) -> None:
    """Not of a call, a stream or a module, and not in the history of all (B 4.11)."""
    lm, predict = lm_of(server), dspy.Predict("question -> answer")
    server.script(Reply(text="[[ ## answer ## ]]\nyes"), Reply(chunks=["a"]))
    with dspy.context(lm=lm, **off):
        predict(question="confidential")
        with lm.stream("confidential") as stream:
            list(stream)
    assert (len(lm.history), len(predict.history)) == (0, 0)
    assert "confidential" not in repr(list(GLOBAL_HISTORY))


def test_disabled_history_makes_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs one look at the settings."""
    made: list[HistoryEntry] = []
    with dspy.context(disable_history=True, redact_history=made.append):
        FakeLM()("hello")
    assert made == []


about_to_fork: list[threading.Event] = []
"""Set when this process is about to fork, before any hook that was registered earlier runs."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: [event.set() for event in about_to_fork])


class Halting(HistoryEntry):
    """An entry whose size takes until a fork begins, the second time that it is asked for."""

    __slots__ = ("asked", "inside")

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        self.asked.append(1)
        if len(self.asked) == 2:  # it fits; then it is added, with the lock held
            self.inside.set()
            assert about_to_fork[0].wait(20)
        return 1_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_child_finds_a_history_whole_that_a_thread_was_changing() -> None:
    """A child that inherits a held lock hangs at its first call (B 7.3)."""
    history, inside = History(), threading.Event()
    entry = Halting.__new__(Halting)
    object.__setattr__(entry, "asked", [])
    object.__setattr__(entry, "inside", inside)
    about_to_fork.append(threading.Event())
    thread = threading.Thread(target=history.add, args=[entry])
    thread.start()
    try:
        assert inside.wait(20)
        child = os.fork()
        if child == 0:  # pragma: no cover -- coverage does not see such a child
            signal.alarm(10)
            history.add(entry_of())
            is_whole = history.size_bytes == sum(each.size_bytes for each in history)
            os._exit(0 if is_whole and len(history) == 2 else 1)
    finally:
        thread.join(20)
        about_to_fork.clear()
    assert os.waitpid(child, 0)[1] == 0


CALLS = """
import gc, json, sys, tracemalloc
from pathlib import Path
import dspylite as dspy

calls, rounds, width, url = int(sys.argv[1]), int(sys.argv[2]), 16, sys.argv[3]
lm = dspy.LM("openai/m", api_base=url, api_key="k", engine="direct")
predict = dspy.Predict("question -> answer")
filler = "x" * 20_000

def ask(number):
    predict(question=f"{number} {filler}")

def figures():
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return [sys.getallocatedblocks(), resident, len(lm.history), lm.history.size_bytes]

dspy.configure(lm=lm)
with dspy.ThreadPoolExecutor(width) as pool:
    for each in range(rounds):
        list(pool.map(ask, range(calls)))
        print(json.dumps(figures()), flush=True)
        sys.stdin.readline()
"""


@pytest.mark.soak
@pytest.mark.timeout(600 if IS_FULL else 60)
def test_memory_is_flat_over_large_calls_with_defaults() -> None:
    """10,000 calls of 20 kB leave no more behind than the first thousand (B 4.11)."""
    calls, rounds = (1_000, 11) if IS_FULL else (450, 3)
    answer = Reply(text="[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]")
    seen: list[list[int]] = []
    with FakeServer() as server:
        server.script_for(lambda request: True, *[answer] * (calls * rounds))
        command = [sys.executable, "-c", CALLS, str(calls), str(rounds), server.base_url]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for _ in range(rounds):
                seen.append(json.loads(process.stdout.readline()))
                print(seen[-1])
                server.clear()  # what it was asked is not ours to measure
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.returncode == 0
    (blocks, resident, *_), (last_blocks, last_resident, kept, kept_bytes) = seen[0], seen[-1]
    # A call that stays is 20 blocks and 20 kB; connections opened late are some hundred blocks.
    assert last_blocks - blocks < 3 * calls * (rounds - 1)
    assert last_resident - resident < (24_000_000 if IS_FULL else 12_000_000)
    assert (kept > 300, kept_bytes <= 8_000_000) == (True, True)


# --- Redaction -----------------------------------------------------------------------------------


def without_texts(entry: HistoryEntry) -> HistoryEntry:
    return dataclasses.replace(entry, messages=(), outputs=("[hidden]",))


class OwnList(dspy.BaseLM):
    """A model of a user's that keeps its history in a plain list."""

    def __init__(self) -> None:
        super().__init__("own/list")
        self.history: Any = []

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return {"choices": [{"message": {"content": "confidential"}}]}


def test_redaction_comes_before_every_history(server: FakeServer) -> None:
    """A text that was kept somewhere for a moment was kept."""
    lm, own, program = lm_of(server), OwnList(), dspy.Predict("question -> answer")
    server.script(Reply(text="[[ ## answer ## ]]\nconfidential"), Reply(chunks=["confidential"]))
    with dspy.context(lm=lm, redact_history=without_texts):
        program(question="confidential")
        with lm.stream("confidential") as stream:
            list(stream)
        own("confidential")
    kept = [*lm.history, *program.history, *own.history, *list(GLOBAL_HISTORY)[-3:]]
    assert len(kept) == 7
    assert {entry.outputs for entry in kept} == {("[hidden]",)}
    assert "confidential" not in repr([dict(entry) for entry in kept])


async def test_redaction_comes_before_histories_of_awaited_calls() -> None:
    """The same on an event loop."""
    lm = FakeLM(["confidential"])
    with dspy.context(redact_history=without_texts):
        await lm.acall("confidential")
    assert (lm.history[0].prompt, lm.history[0].outputs) == (None, ("[hidden]",))


def test_call_that_redaction_answers_with_none_is_not_kept() -> None:
    """It chooses what is kept, too."""
    lm = FakeLM(["a", "b"])
    with dspy.context(redact_history=lambda entry: None if "no" in entry.prompt else entry):
        lm("no")
        lm("yes")
    assert [entry.prompt for entry in lm.history] == ["yes"]


def raises(entry: HistoryEntry) -> HistoryEntry:
    raise ValueError(f"cannot read {entry.prompt}")


def gives_a_dict(entry: HistoryEntry) -> Any:
    return dict(entry)


def gives_broken(entry: HistoryEntry) -> HistoryEntry:
    return dataclasses.replace(entry, messages=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("redaction", [raises, gives_a_dict, gives_broken])
def test_failing_redaction_keeps_nothing_and_harms_no_call(
    redaction: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """To keep a text because hiding it failed would be the worst of both."""
    lm, before = FakeLM(default="fine"), len(GLOBAL_HISTORY)
    with caplog.at_level(logging.INFO), dspy.context(redact_history=redaction):
        assert lm("confidential") == lm("confidential") == ["fine"]
    assert (len(lm.history), len(GLOBAL_HISTORY)) == (0, before)
    (record,) = caplog.records  # told once
    assert (record.levelname, redaction.__name__ in record.getMessage()) == ("WARNING", True)
    assert "confidential" not in caplog.text


def test_failures_of_redaction_are_told_up_to_a_bound(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that is made anew for each request must fill neither the log nor the memory."""
    from dspylite.runtime import history

    monkeypatch.setattr(history, "_TOLD", {(str(each), "") for each in range(100)})
    with dspy.context(redact_history=lambda entry: 1 / 0):
        FakeLM()("hello")
    assert (caplog.records, len(history._TOLD)) == ([], 100)


def test_calls_made_by_a_redaction_are_not_redacted_in_turn() -> None:
    """A redaction may ask a small model of its own, and must end."""
    judge = FakeLM(default="harmless")

    def judged(entry: HistoryEntry) -> HistoryEntry | None:
        return entry if judge(entry.prompt) == ["harmless"] else None

    lm = FakeLM()
    with dspy.context(redact_history=judged):
        lm("hello")
    assert (len(lm.history), len(judge.requests), len(judge.history)) == (1, 1, 0)


async def hides_later(entry: HistoryEntry) -> HistoryEntry:
    return entry


@pytest.mark.parametrize("value", ["hide", 3, hides_later])
def test_redaction_that_is_no_plain_function_is_refused(value: Any) -> None:
    """A mistake here would keep what must not be kept, or lose what should be."""
    with pytest.raises(SettingsError, match="`redact_history` must be a plain function"):
        dspy.configure(redact_history=value)


def test_redaction_travels_with_the_settings() -> None:
    """A worker in another process hides the same."""
    with dspy.context(redact_history=without_texts):
        carried = pickle.loads(pickle.dumps(dspy.settings.snapshot()))
    lm = FakeLM()
    with dspy.settings.restore(carried):
        lm("hello")
    assert lm.history[0].outputs == ("[hidden]",)
