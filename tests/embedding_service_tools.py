"""What the tests of the embedding service share: a client, processes, a model that refuses."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspylite.testing import FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 60  # far above what anything here takes
KEYS = {user: f"key-of-{user}-0123456789" for user in ("ann", "bob")}
API_KEYS = ",".join(f"{user}:{key}" for user, key in KEYS.items())
PROVIDER_KEY = "sk-provider-0123456789"


def wait_until(what: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Ask until the answer is true, and return it; another process can give no event."""
    end = time.monotonic() + limit_s
    while not (answer := what()):
        assert time.monotonic() < end, f"not so within {limit_s} s"
        time.sleep(0.03)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Client:
    """A user of the service."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port = port
        self.key = key

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = dict(headers or {})
        if self.key is not None:
            sent.setdefault("authorization", f"Bearer {self.key}")
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        lower = {name.lower(): value for name, value in response.getheaders()}
        is_json = "json" in lower.get("content-type", "")
        return response.status, json.loads(raw) if is_json else raw, lower

    def post(self, text: str, **more: Any) -> tuple[int, Any, Mapping[str, str]]:
        body = json.dumps({"text": text, **more}).encode()
        return self.ask("POST", "/documents", body, {"content-type": "application/json"})

    def posted(self, text: str, **more: Any) -> str:
        status, answer, _ = self.post(text, **more)
        assert status == 202, answer
        task_id: str = answer["task_id"]
        return task_id

    def task(self, task_id: str) -> dict[str, Any]:
        status, answer, _ = self.ask("GET", f"/tasks/{task_id}")
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def settled(self, task_id: str) -> dict[str, Any]:
        def over() -> dict[str, Any] | None:
            task = self.task(task_id)
            return task if task["status"] in {"done", "failed"} else None

        found: dict[str, Any] = wait_until(over)
        return found

    def stored(self, text: str, **more: Any) -> dict[str, Any]:
        task = self.settled(self.posted(text, **more))
        assert (task["status"], task["error"]) == ("done", None)
        return task

    def search(self, q: str, k: int = 50) -> list[dict[str, Any]]:
        from urllib.parse import quote

        status, answer, _ = self.ask("GET", f"/search?q={quote(q)}&k={k}")
        assert status == 200, answer
        found: list[dict[str, Any]] = answer["results"]
        return found

    def health(self) -> tuple[int, Any]:
        """Return status and body of the health check; 0 where nobody listens."""
        try:
            return self.ask("GET", "/healthz")[:2]
        except OSError:
            return 0, None


class Model(FakeServer):
    """An embedding server that refuses texts with a certain word, with one key."""

    def __init__(self) -> None:
        super().__init__(answer=self._refuse, dimensions=16, api_keys=[PROVIDER_KEY])
        self.poison = ""

    def _refuse(self, body: Mapping[str, object]) -> Reply:
        if self.poison and self.poison in json.dumps(body["input"]):
            return Reply(status=400, text="This input is not allowed.")
        return Reply()

    @property
    def settings(self) -> dict[str, str]:
        """What the service is told of it."""
        return {
            "model": "openai/m",
            "api_base": self.base_url,
            "embedding_key": PROVIDER_KEY,
        }


def environment(**settings: str) -> dict[str, str]:
    """Return this process' environment with the service's settings and no others of ours."""
    ours = ("DSPYLITE_", "OPENAI_", "EMBEDDING_SERVICE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    chosen = {f"EMBEDDING_SERVICE_{name.upper()}": value for name, value in settings.items()}
    return {**kept, "PYTHONPATH": str(ROOT), "DSPYLITE_CACHE": "off", **chosen}


class Running:
    """A process that a test started, in a group of its own."""

    def __init__(self, *command: str, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=None if env is None else dict(env),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def kill_group(self) -> None:
        """End it and its children, as the kernel does to those that take too much memory."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self, limit_s: float = 30) -> int:
        """Ask it politely to end, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(limit_s)
        finally:
            if self.process.poll() is None:
                self.kill_group()


@contextmanager
def running(*command: str, log: Path, env: Mapping[str, str] | None = None) -> Generator[Running]:
    """Run a process for as long as the block."""
    started = Running(*command, log=log, env=env)
    try:
        yield started
    finally:
        started.stop()


@contextmanager
def service(log: Path, *, port: int | None = None, **settings: str) -> Generator[Running]:
    """Run the service in a process of its own, up and answering; its port is `.port`."""
    chosen = port or free_port()
    command = (sys.executable, "-m", "examples.embedding_service")
    with running(*command, log=log, env=environment(port=str(chosen), **settings)) as started:
        wait_until(lambda: started.process.poll() is not None or Client(chosen).health()[0])
        assert started.process.poll() is None, started.printed()
        yield started
