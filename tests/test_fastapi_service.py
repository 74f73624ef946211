"""Web services under a real uvicorn: every request has its own model, key and answer.

Not here: what carries the settings (`test_propagation.py`).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import pytest

import dspylite as dspy
from dspylite.errors import LMInvalidRequestError
from dspylite.runtime.settings import SettingsChanges
from dspylite.testing import FakeLM, FakeServer, Reply
from tests.serving import served

ROOT = Path(__file__).resolve().parent.parent
TENANTS = 200
SYNC_THREADS = 40  # what anyio, and so FastAPI, gives sync handlers

# Inherits a listening socket, so that no port has to be guessed and no start-up waited for:
# connections made meanwhile stay in its queue.
SERVE = """
import socket, sys, uvicorn
listener = socket.socket(fileno=int(sys.argv[1]))
config = uvicorn.Config("examples.fastapi_app:app", log_level="warning")
uvicorn.Server(config).run(sockets=[listener])
"""


def question(number: int) -> str:
    return f"What is number {number}?"


def key(number: int) -> str:
    return f"sk-key-of-tenant-{number:03d}"


def asked(body: Mapping[str, object]) -> str:
    messages: Any = body["messages"]
    found = re.search(r"What is number \d+\?", messages[-1]["content"])
    assert found
    return found[0]


def answer_with_the_question(body: Mapping[str, object]) -> str:
    return f"[[ ## answer ## ]]\nre: {asked(body)}\n\n[[ ## completed ## ]]"


def post(port: int, path: str, body: object, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=50)
    try:
        sent = {"content-type": "application/json", **headers}
        connection.request("POST", path, json.dumps(body), sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


# --- The example, in a process of its own ------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(answer=answer_with_the_question) as server:
        yield server


@pytest.fixture
def provider(running: FakeServer) -> FakeServer:
    """Give the provider with an empty log."""
    running.wait_until_idle()
    running.clear()
    return running


@pytest.fixture(scope="module")
def port(running: FakeServer) -> Iterator[int]:
    """Run the example as `uvicorn examples.fastapi_app:app` does, and stop it politely."""
    environment = {"DSPYLITE_MODEL": "openai/m", "DSPYLITE_API_BASE": running.base_url}
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(listener.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            try:
                printed, _ = process.communicate(timeout=20)
            finally:
                process.kill()
    # After a clean end uvicorn hands the signal on, so that it shows in the exit code.
    assert process.returncode in {0, -signal.SIGTERM}
    assert printed == ""


def ask(port: int, path: str, number: int) -> tuple[int, Any]:
    return post(port, path, {"question": question(number)}, **{"x-llm-key": key(number)})


def test_two_hundred_tenants_at_once_get_their_own_answers(port: int, provider: FakeServer) -> None:
    """Half of them through sync handlers, half through async ones, each with a key of its own.

    All are sent while the provider holds its answers, so that every async handler and every thread
    for sync handlers is in the middle of a call at the same moment.
    """
    with ThreadPoolExecutor(TENANTS) as pool:
        with provider.hold():
            answers = [
                pool.submit(ask, port, ("/sync", "/async")[number % 2], number)
                for number in range(TENANTS)
            ]
            provider.wait_for_requests(TENANTS // 2 + SYNC_THREADS, timeout_s=45)
            together = provider.in_flight
        responses = [answer.result(45) for answer in answers]
    assert together == TENANTS // 2 + SYNC_THREADS
    assert [status for status, _ in responses] == [200] * TENANTS
    assert [body["answer"] for _, body in responses] == [
        f"re: {question(number)}" for number in range(TENANTS)
    ]
    seen = sorted((str(request.api_key), asked(request.json)) for request in provider.requests)
    assert seen == [(key(number), question(number)) for number in range(TENANTS)]


@pytest.mark.parametrize("path", ["/sync", "/async"])
def test_response_tells_the_tokens_that_the_provider_counted(
    path: str, port: int, provider: FakeServer
) -> None:
    """A tenant is billed for the tokens of its own request."""
    _, body = ask(port, path, 7)
    (request,) = provider.requests
    assert request.usage is not None
    assert body["total_tokens"] == request.usage["total_tokens"] > 0


@pytest.mark.parametrize("path", ["/sync", "/async"])
def test_request_without_a_key_is_refused(path: str, port: int, provider: FakeServer) -> None:
    """Nobody is served with a key that happens to lie around."""
    status, _ = post(port, path, {"question": question(1)})
    assert (status, provider.requests) == (422, ())


def test_stream_is_the_tenants_own_and_opens_before_its_status(
    port: int, provider: FakeServer
) -> None:
    """A refusal is a status; once the text flows, nothing but a cut could tell of it."""
    provider.script(Reply(chunks=["Par", "is"]), Reply(status=400))
    answers = []
    for number in (1, 2):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=50)
        body = json.dumps({"question": question(number)})
        sent = {"content-type": "application/json", "x-llm-key": key(number)}
        connection.request("POST", "/stream", body, sent)
        response = connection.getresponse()
        answers.append((response.status, response.read()))
        connection.close()
    assert answers[0] == (200, b"Paris")
    assert answers[1][0] == LMInvalidRequestError().to_http().status
    assert [request.api_key for request in provider.requests] == [key(1), key(2)]


# --- Handlers that configure the process -------------------------------------------------------


@pytest.fixture
def settings_restored() -> Iterator[None]:
    """Give the process its settings back, which the handlers change."""
    before: SettingsChanges = dspy.settings.snapshot().values  # type: ignore[assignment]
    yield
    dspy.configure(**before)


def post_to_each(port: int, paths: list[str]) -> list[tuple[int, Any]]:
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(lambda path: post(port, path, {}), paths))


@pytest.mark.usefixtures("settings_restored")
def test_four_sync_handlers_may_configure_at_once() -> None:
    """Four threads, none of them the one that imported the library: four times 200."""
    app = fastapi.FastAPI()
    together = threading.Barrier(4)
    lms = [FakeLM(lambda request: {"answer": "yes"}, model=f"fake/{name}") for name in "abcd"]

    @app.post("/configure/{number}")
    def configure(number: int) -> str:
        together.wait(10)
        dspy.configure(lm=lms[number])
        together.wait(10)
        return str(dspy.Predict("question -> answer")(question="Well?").answer)

    with served(app) as port:
        responses = post_to_each(port, [f"/configure/{number}" for number in range(4)])
    assert responses == [(200, "yes")] * 4
    assert dspy.settings.lm in lms
    assert sum(len(lm.requests) for lm in lms) == 4


@pytest.mark.usefixtures("settings_restored")
def test_async_handlers_may_configure_at_once() -> None:
    """Tasks of one loop, each with a context copy of its own, change the same process default."""
    app = fastapi.FastAPI()

    @app.post("/configure/{number}")
    async def configure(number: int) -> int:
        dspy.configure(num_threads=number + 1)
        return dspy.settings.num_threads

    with served(app) as port:
        responses = post_to_each(port, [f"/configure/{number}" for number in range(4)])
    assert responses == [(200, number + 1) for number in range(4)]
    assert dspy.settings.num_threads in {1, 2, 3, 4}
