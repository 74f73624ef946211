"""What is logged, at which level, by which logger; and that no logger is changed.

Not here: the log of a redaction that fails (`test_history.py`).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dspylite as dspy
from dspylite.schema.messages import LMOutput, LMResponse, Usage
from dspylite.testing import FakeLM, FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
KEY, HEADER, OWN_KEY = "sk-key-0123456789", "Bearer header-0123456789", "sk-environment-0123456789"
SECRETS = (KEY, HEADER.split()[1], OWN_KEY)
MARK = "confidential-input"
ANSWER = "[[ ## answer ## ]]\nconfidential-answer\n\n[[ ## completed ## ]]"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("dspylite")]


# --- The line of a call --------------------------------------------------------------------------


def test_each_answered_call_is_one_line_at_debug(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks for DEBUG sees what goes on without reading whole prompts (B 4.11)."""
    lm = dspy.LM("openai/m", api_base=server.base_url, api_key=KEY, engine="direct")
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    server.script(Reply(text="a\nb" * 200, usage=usage), Reply(chunks=["c"], usage=usage))
    with caplog.at_level(logging.DEBUG):
        lm("first line\n" + "q" * 5_000)
        with lm.stream("again") as stream:
            list(stream)
    told, streamed = [each for each in caplog.record_tuples if each[0].startswith("dspylite")]
    seconds = [f"{entry.seconds:.3f}" for entry in lm.history]
    question, answer = "first line\\n" + "q" * 189, ("a\\nb" * 67)[:-1]
    assert told == (
        "dspylite.runtime.history",
        logging.DEBUG,
        f"openai/m answered with 2 tokens for 5 in {seconds[0]} s: "
        f"'{question}'… (5011 characters) -> '{answer}'… (600 characters)",
    )
    assert streamed[2] == f"openai/m answered with 2 tokens for 5 in {seconds[1]} s: 'again' -> 'c'"


async def test_awaited_call_is_a_line_too(caplog: pytest.LogCaptureFixture) -> None:
    """The same on an event loop."""
    with caplog.at_level(logging.DEBUG, logger="dspylite"):
        await FakeLM(["yes"], model="fake/lm").acall("hello")
    (line,) = lines(caplog)
    assert line.startswith("fake/lm answered with 1 tokens for 1 in ")
    assert line.endswith(": 'hello' -> 'yes'")


def test_line_tells_of_parts_tools_and_cached_answers(caplog: pytest.LogCaptureFixture) -> None:
    """None of them is a text, and none breaks the line."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 99}}
    call = {"function": {"name": "look", "arguments": "{}"}}
    lm = FakeLM(
        [
            LMResponse(outputs=(LMOutput(text="", tool_calls=(call,)),), usage=Usage()),
            LMResponse(outputs=(LMOutput(text="4", reasoning="2+2"),), cached=True),
        ]
    )
    with caplog.at_level(logging.DEBUG, logger="dspylite"):
        lm(messages=[{"role": "user", "content": [{"type": "text", "text": "see"}, picture, 3]}])
        lm(messages=[{"role": "assistant", "content": None}])
    first, second = lines(caplog)
    assert ": 'see <image_url>' -> " in first
    assert "look" in first
    assert ", cached: '' -> '4'" in second


def test_call_of_a_fallback_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Two lines would look like two bills."""
    second = FakeLM(["yes"], model="second/lm")
    lm = FakeLM([dspy.LMServerError("down")], model="first/lm", fallbacks=[second], num_retries=0)
    with caplog.at_level(logging.DEBUG, logger="dspylite"):
        lm("hello")
    (line,) = lines(caplog)
    assert line.startswith("second/lm answered")


@pytest.mark.parametrize(
    ("settings", "is_shown"),
    [
        ({}, True),
        ({"disable_history": True}, False),
        ({"max_history_size": 0}, False),
        ({"redact_history": lambda entry: None}, False),
        ({"redact_history": lambda entry: 1 / 0}, False),
    ],
)
def test_text_that_is_not_kept_is_not_logged(
    settings: Any, is_shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever hides it from memory does not want it in a file."""
    with caplog.at_level(logging.DEBUG, logger="dspylite"), dspy.context(**settings):
        FakeLM(["hidden answer"])("hidden question")
    (line, *_) = [each for each in lines(caplog) if "answered with" in each]
    assert ("hidden" in line) == is_shown


def test_keys_that_a_server_echoes_are_replaced(
    server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the cut would leave the half of one (B 7.8)."""
    monkeypatch.setenv("SOME_API_KEY", OWN_KEY)
    lm = dspy.LM(
        "openai/m",
        api_base=server.base_url,
        api_key=KEY,
        extra_headers={"Authorization": HEADER},
        engine="direct",
    )
    server.script(Reply(text=f"you sent {KEY} and {HEADER}"), Reply(text="x" * 195 + KEY))
    with caplog.at_level(logging.DEBUG, logger="dspylite"):
        lm(f"my key is {OWN_KEY}")
        lm("hello")
    text = "\n".join(lines(caplog))
    assert text.count("[redacted]") == 3
    assert KEY[:4] not in text
    assert not [secret for secret in SECRETS if secret in text]


def test_variable_taken_away_meanwhile_harms_no_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread may change the environment while it is looked through for secrets."""

    class Fleeting(UserDict[str, str]):
        def __getitem__(self, name: str) -> str:
            raise KeyError(name)

        def get(self, name: str, default: Any = None) -> Any:
            return default

    monkeypatch.setattr("os.environ", Fleeting({"GONE_API_KEY": OWN_KEY}))
    with caplog.at_level(logging.DEBUG, logger="dspylite"):
        assert FakeLM(["x"])("hello") == ["x"]


# --- Nothing of an input above DEBUG -------------------------------------------------------------

RUN = f"""
import json, logging, os, sys
from pathlib import Path

ROOT, MARK, SECRETS = logging.getLogger(), {MARK!r}, {SECRETS!r}
url, engine, level, has_handler = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "1"

class Keep(logging.Handler):
    records = []
    def emit(self, record):
        text = logging.Formatter("%(message)s").format(record)
        self.records.append([record.name, record.levelname, text])

def state():
    loggers = {{"root": ROOT, **ROOT.manager.loggerDict}}
    return {{
        name: [each.level, each.propagate, each.disabled, [str(h) for h in each.handlers]]
        for name, each in loggers.items() if isinstance(each, logging.Logger)
        and (name in ("root", "asyncio") or name.startswith("dspylite"))
    }}

def untouched(state):
    return {{
        name: each for name, each in state.items()
        if name.startswith("dspylite") and each != [0, True, False, []]
    }}

if has_handler:
    ROOT.addHandler(Keep())
    ROOT.setLevel(level)
last_resort, klass = logging.lastResort, logging.getLoggerClass()
before = state()["root"]
import dspylite as dspy
imported = state()
lm = dspy.LM(
    "openai/m", api_base=url, api_key={KEY!r}, engine=engine, num_retries=0,
    extra_headers={{"X-Key": {HEADER!r}}},
)

class Failing(dspy.BaseCallback):
    def on_lm_start(self, **details):
        raise RuntimeError("a callback's own words")

def attempt(run):
    try:
        run()
    except Exception:
        pass

predict = dspy.Predict("question: int -> answer")
long = MARK + " word" * 5000
with dspy.context(lm=lm, callbacks=[Failing()]):
    attempt(lambda: predict(question=long))
with dspy.context(lm=lm):
    for _ in range(2):  # answers that cannot be read, and a refusal
        attempt(lambda: predict(question=long))
    attempt(lambda: predict.batch([{{"question": long}}] * 2, num_threads=2))
    attempt(lambda: predict.batch([{{"question": long}}], num_threads=1, progress=print_nothing))
lm.inspect_history(file=open(os.devnull, "w"))
after = state()
# Not printed: threads of litellm write to the same place at the same time.
Path(sys.argv[5]).write_text(json.dumps({{
    "records": Keep.records,
    "root_same": before == imported["root"] == after["root"],
    "touched": untouched(after),
    "same_class": klass is logging.getLoggerClass() and last_resort is logging.lastResort,
    "calls": len(lm.history),
}}))
""".replace("print_nothing", "lambda *told: 1 / 0")


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
@pytest.mark.parametrize("engine_name", ["direct", "litellm"])
def test_inputs_and_secrets_stay_out_of_the_log(
    level: str, engine_name: str, server: FakeServer, tmp_path: Path
) -> None:
    """A log is read by more people, and kept longer, than what a program is asked (B 4.11)."""
    seen = run(server, engine_name, level, tmp_path / "seen.json", has_handler=True)
    assert seen["calls"] > 0
    assert (seen["root_same"], seen["touched"], seen["same_class"]) == (True, {}, True)
    ours = [record for record in seen["records"] if record[0].startswith("dspylite")]
    assert bool(ours) == (level != "ERROR")
    for name, of_level, text in seen["records"]:
        if of_level != "DEBUG":
            assert MARK not in text, name
        assert not [secret for secret in SECRETS if secret in text and name.startswith("dspy")]
    for _, of_level, text in ours:
        assert len(text) < (2_500 if of_level != "DEBUG" else 5_000)
    if level == "DEBUG":
        assert [text for _, _, text in ours if "answered with" in text and "cut" not in text]


def test_without_logging_set_up_nothing_is_printed_of_inputs(
    server: FakeServer, tmp_path: Path
) -> None:
    """Python prints warnings of unconfigured programs to stderr."""
    seen = run(server, "direct", "DEBUG", tmp_path / "seen.json", has_handler=False)
    assert (seen["root_same"], seen["touched"], seen["same_class"]) == (True, {}, True)
    assert MARK not in seen["stderr"]


def run(
    server: FakeServer, engine: str, level: str, seen: Path, *, has_handler: bool
) -> dict[str, Any]:
    server.script(
        Reply(text=ANSWER),
        *[Reply(text=f"no form, but {MARK}")] * 2,
        *[Reply(status=400, text=f"bad: {MARK} {KEY}")],
        *[Reply(text=ANSWER)] * 2,
        *[Reply(text=f"no form, but {MARK}")] * 2,
    )
    command = [sys.executable, "-c", RUN, server.base_url, engine, level]
    command += [str(int(has_handler)), str(seen)]
    environment = {**os.environ, "OTHER_API_KEY": OWN_KEY}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(seen.read_text("utf-8"))
    if level != "DEBUG" or engine == "direct":  # litellm's own log shows headers at DEBUG
        assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    return {**found, "stderr": done.stderr}
