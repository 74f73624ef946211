"""The scripts in `examples/`, as users run them, and the standard thread-pool program.

Not here: the web service (`test_fastapi_service.py`), the embedding service, which is a package
(`test_embedding_service.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import dspylite
from dspylite.runtime.settings import SettingsChanges
from dspylite.testing import FakeServer

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"


def run_example(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would, with nothing of this machine's environment decided for it."""
    ours = ("DSPYLITE_", "OPENAI_", "LITELLM_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, f"examples/{name}.py"],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), "DSPYLITE_CACHE": "memory", **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


OFFLINE = {
    "streaming": "".join(
        f"""
{way} (looking into the encyclopedia for 'rain')
{way} (found 'rain: see clouds')
{way} reasoning: 'Water falls'
{way} reasoning: ' as rain.'
{way} reasoning: ''
{way} answer: 'From'
{way} answer: ' the'
{way} answer: ' sky.'
{way} answer: ''
{way} = From the sky."""
        for way in ("sync: ", "async:")
    )
    + "\n",
    "react_agent": """
 river_of: Execution error in river_of: KeyError: 'Bassel'
 river_of: Rhine
length_of: 1230
   finish: Completed.
   called: 1230 km
  awaited: 1230 km
""",
    "saving": """
Answer from the context alone. (1 demo)
Jupiter is the largest planet.
'guide.json' does not fit: The state of a predictor needs `signature`; it has answer.predict.
""",
    "evaluate": """
always_nile: EvaluationResult(score=25.0, results=<list of 4 results>)
Ask: EvaluationResult(score=50.0, results=<list of 4 results>, errors=<of 1 item>)
question           example_answer        pred_answer            overlap    error
-----------------  --------------------  ---------------------  ---------  -----------------
What flows north?  the Nile flows north  The Nile flows north.  ✔ [1.000]
What is wide?      The Amazon is wide!   The Amazon is wide.    ✔ [1.000]
What is long?      The Rhine             The Rhine is long.     ✔ [0.500]
                   What do you mean?                            ✘ [0.000]  ValueError: empty
failed: item 3, ValueError: empty
""",
    "thread_pool": """
Which planet is the largest?  Jupiter is the largest planet.
Which planet is nearest to the sun?  Mercury is the planet nearest to the sun.
Which planet has the strongest winds?  Neptune has the strongest winds.
Which planet has the brightest rings?  Saturn has the brightest rings.
""",
    "async_app": """
      acall: The Nile flows north. The Amazon carries the most water. The Rhine flows through Basel.
     abatch: The Nile flows north. The Amazon carries the most water. The Rhine flows through Basel.
abatch_iter: The Nile flows north. The Amazon carries the most water. The Rhine flows through Basel.
   asyncify: The Nile flows north. The Amazon carries the most water. The Rhine flows through Basel.
""",
    "batch": """
My login does not work since the update. -> login
(empty) -> failed: an empty ticket
The billing address on my invoice is wrong. -> billing
When does shipping of my order start? -> shipping
3 calls, NUMBER tokens
""",
    "resilient_calls": """
 healthy: said by the first model (failed attempts: 0)
 healthy: said by the first model (failed attempts: 0)
 healthy: said by the first model (failed attempts: 0)
 healthy: said by the first model (failed attempts: 0)
 healthy: the first model's circuit is closed
  outage: said by the second model (failed attempts: 2)
  outage: said by the second model (failed attempts: 2)
  outage: said by the second model (failed attempts: 1)
  outage: said by the second model (failed attempts: 1)
  outage: the first model's circuit is open
8 calls answered
""",
    "best_of_n": """
one call:  The museum is open daily except on Mondays, from nine to five.
best of 3: Nine to five. (2 tries)
refined:   Nine to five. (5 calls, advice included)
majority:  Nine to five.
""",
    "caching": """
20 at once: 1 asked, 19 not, NUMBER tokens, 1 requests in all
next time: 0 asked, 1 not, NUMBER tokens, 1 requests in all
once more: 1 asked, 0 not, NUMBER tokens, 2 requests in all
""",
    "rag": """
Which lake is the deepest? -> Baikal in Siberia is the deepest lake. [0, 1]
Where does the Danube flow to? -> The Danube flows to the Black Sea. [3, 2]
What is the highest peak of Mount Kenya? -> Batian is the highest peak of Mount Kenya. [4, 5]
""",
    "opentelemetry_tracing": "".join(
        f"""
Guide (item {item})
  execute_tool atlas (item {item})
  ChainOfThought (item {item})
    Predict (item {item})
      chat extractive (item {item}, counted its tokens)"""
        for item in (0, 1)
    )
    + "\n",
}


@pytest.mark.parametrize("name", OFFLINE)
def test_example_runs_offline_with_the_expected_output(name: str) -> None:
    """A newcomer's first run needs no key, and its answers are right."""
    done = run_example(name)
    assert re.sub(r"\d+ tokens", "NUMBER tokens", done.stdout) == OFFLINE[name].lstrip("\n")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_progress_of_the_batch_goes_to_stderr() -> None:
    """stdout is for results, so that they can be piped."""
    done = run_example("batch")
    assert "1 of 4, " in done.stderr
    assert " of 4, " not in done.stdout


def test_every_example_is_tested() -> None:
    """An example that nobody runs is soon one that does not run."""
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    examples |= {path.parent.name for path in (ROOT / "examples").glob("*/__main__.py")}
    assert examples == {*OFFLINE, "fastapi_app", "embedding_service"}


def answer_with_the_question(body: Mapping[str, object]) -> str:
    """Answer as a model would in `ChatAdapter`'s form, with the question in the answer."""
    return as_answer(f"to {question_in(body)!r}")


def question_in(body: Mapping[str, object]) -> str:
    messages: Any = body["messages"]
    asked = re.search(r"\[\[ ## question ## \]\]\n(.+)", messages[-1]["content"])
    assert asked
    return asked[1]


def as_answer(text: str) -> str:
    return f"[[ ## answer ## ]]\n{text}\n\n[[ ## completed ## ]]"


def test_thread_pool_example_asks_the_model_it_is_given() -> None:
    """Three environment variables put a real server in the place of the offline model."""
    with FakeServer(answer=answer_with_the_question, api_keys=[KEY]) as server:
        done = run_example(
            "thread_pool",
            DSPYLITE_MODEL="openai/some-model",
            DSPYLITE_API_BASE=server.base_url,
            OPENAI_API_KEY=KEY,
        )
        requests = server.requests
    questions = [
        line.partition("?")[0] + "?" for line in OFFLINE["thread_pool"].strip().splitlines()
    ]
    expected = [f"{question}  to {question!r}" for question in questions]
    assert (done.stdout.splitlines(), done.returncode, done.stderr) == (expected, 0, "")
    assert sorted(question_in(request.json) for request in requests) == sorted(questions)
    assert {(request.status, request.json["model"]) for request in requests} == {
        (200, "some-model")
    }


# --- The standard thread-pool program ----------------------------------------------------------

PROGRAM = """
IMPORT
from concurrent.futures import ThreadPoolExecutor

lm = NAME.LM("openai/m", api_base=API_BASE, api_key=KEY)
NAME.settings.configure(lm=lm)
predict = NAME.Predict("question -> answer")
questions = [f"question {number}?" for number in range(40)]

def with_context(question):
    with NAME.context(lm=lm):
        return predict(question=question).answer

def without_context(question):
    return predict(question=question).answer

with ThreadPoolExecutor(max_workers=8) as pool:
    answers = list(pool.map(WORK, questions))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer(answer=answer_with_the_question) as running:
        lm = dspylite.LM("openai/m", api_base=running.base_url, api_key=KEY)
        # Once before the threads: of those that come first, each would make litellm a client, and
        # all but one would be dropped with their sockets open.
        with dspylite.context(lm=lm):
            dspylite.Predict("question -> answer")(question="warm-up?")
        yield running


@pytest.fixture
def settings_restored() -> Iterator[None]:
    """Give the process its settings back, which the program's `configure` changes."""
    before: SettingsChanges = dspylite.settings.snapshot().values  # type: ignore[assignment]
    yield
    dspylite.configure(**before)


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("work", ["with_context", "without_context"])
@pytest.mark.parametrize(
    ("line", "name"), [("import dspylite", "dspylite"), ("import dspylite as dspy", "dspy")]
)
def test_standard_thread_pool_program_answers_in_order(
    line: str, name: str, work: str, server: FakeServer
) -> None:
    """What every DSPy user writes first must run under a plain pool, with and without `context`."""
    server.clear()
    code = PROGRAM.replace("IMPORT", line).replace("NAME", name).replace("WORK", work)
    namespace: dict[str, Any] = {"API_BASE": server.base_url, "KEY": KEY}
    exec(code, namespace)
    assert namespace["answers"] == [f"to {question!r}" for question in namespace["questions"]]
    asked = sorted(question_in(request.json) for request in server.requests)
    assert asked == sorted(namespace["questions"])
