"""The embedding service as one process, with everything embedded.

Not here: Redis, Celery and a Chroma server (`test_embedding_service_redis.py`), and the page
(`test_embedding_page.py`).
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from array import array
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dspylite.errors import LMInvalidRequestError, SettingsError
from dspylite.testing import Reply
from examples.embedding_service.app import create_app
from examples.embedding_service.auth import ApiKeys
from examples.embedding_service.config import Config
from examples.embedding_service.documents import Document
from examples.embedding_service.errors import (
    RateLimitedError,
    UnauthorizedError,
    UnavailableError,
)
from examples.embedding_service.pipeline import SLICE, Failure, Pipeline
from examples.embedding_service.ratelimit import MemoryRateLimit
from examples.embedding_service.service import Service
from examples.embedding_service.sqlite_tasks import SqliteTasks
from examples.embedding_service.stores import BuiltinStore, Embedded
from examples.embedding_service.tasks import MAX_LOSSES
from tests.embedding_service_tools import (
    API_KEYS,
    KEYS,
    PROVIDER_KEY,
    ROOT,
    Client,
    Model,
    free_port,
    service,
    wait_until,
)
from tests.serving import served

pytestmark = [
    pytest.mark.timeout(120),
]


@contextmanager
def serving(**settings: Any) -> Generator[Client]:
    """Serve with these settings, in memory unless told where; give a client without a key."""
    with served(create_app(Config(**{"data": "", **settings}))) as port:
        yield Client(port)


@pytest.fixture(scope="module")
def models() -> Iterator[Model]:
    with Model() as started:
        yield started


@pytest.fixture
def model(models: Model) -> Model:
    models.poison = ""
    models.wait_until_idle()
    models.clear()
    return models


@pytest.fixture(scope="module")
def open_service() -> Iterator[Client]:
    with serving(rate_limit=0) as client:
        yield client


@pytest.fixture(params=["builtin", "chroma"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a service that keeps its files, with either store."""
    return {"data": str(tmp_path / "data"), "store": request.param}


# --- Storing and finding -----------------------------------------------------------------------


def test_document_is_stored_and_found_and_survives_a_restart(kept: dict[str, Any]) -> None:
    """What the README shows first."""
    with serving(**kept) as client:
        task = client.stored("The sun is a star.", title="sun", metadata={"shelf": "7"})
        client.stored("Cats sleep all day.", title="cat")
        assert (task["chunks_total"], task["chunks_done"], task["title"]) == (1, 1, "sun")
        assert task["created_at"] <= task["updated_at"]
    with serving(**kept) as client:
        found = client.search("Which star?", k=1)
        assert client.task(task["task_id"]) == task
        status, health = client.health()
    score = found[0].pop("score")
    assert 0 < score <= 1
    assert found == [
        {
            "document_id": task["document_id"],
            "title": "sun",
            "chunk": 0,
            "text": "The sun is a star.",
            "metadata": {"shelf": "7"},
        }
    ]
    assert (status, health) == (
        200,
        {
            "status": "ok",
            "queue": "memory",
            "store": kept["store"],
            "model": "offline/hashing",
            "documents": 2,
            "chunks": 2,
            "max_body_bytes": 1_048_576,
        },
    )


FORM = (
    b'--sep\r\nContent-Disposition: form-data; name="file"; filename="../../etc/passwd"\r\n'
    b"Content-Type: text/plain\r\n\r\nline one\r\nline two\n--sep--\r\n"
)


@pytest.mark.parametrize(
    ("content_type", "body", "title", "text"),
    [
        ("application/json", b'{"text": "line", "title": " a\\n b "}', "a b", "line"),
        ("text/plain", b"\xef\xbb\xbfline one\nline two", "of the query", "line one\nline two"),
        (
            "multipart/form-data; boundary=sep",
            FORM.replace(b"two\n--", b"two\r\n--"),
            "../../etc/passwd",
            "line one\r\nline two",
        ),
    ],
    ids=["json", "text", "form"],
)
def test_every_form_of_a_document_is_read(
    open_service: Client, content_type: str, body: bytes, title: str, text: str
) -> None:
    """A title is shown and never used as a path, so any title will do."""
    path = "/documents" if "plain" not in content_type else "/documents?title=of%20the%20query"
    status, answer, _ = open_service.ask("POST", path, body, {"content-type": content_type})
    assert status == 202
    assert open_service.settled(answer["task_id"])["title"] == title
    hits = [hit for hit in open_service.search(text) if hit["title"] == title]
    assert [hit["text"] for hit in hits] == [text]


def test_same_document_posted_at_once_is_stored_once(kept: dict[str, Any]) -> None:
    """Its id is its content; Chroma would refuse a batch in which an id comes twice."""
    with serving(**kept) as client:
        barrier = threading.Barrier(8)

        def post(number: int) -> str:
            barrier.wait(20)
            return client.posted("The same text.", title=f"copy {number}")

        with ThreadPoolExecutor(8) as pool:
            tasks = [client.settled(task_id) for task_id in pool.map(post, range(8))]
        assert {task["status"] for task in tasks} == {"done"}
        assert len({task["document_id"] for task in tasks}) == 1
        assert len(client.search("same")) == 1


def test_fewer_chunks_after_an_update_leave_no_stale_ones(kept: dict[str, Any]) -> None:
    """The settings of chunks changed, and the document was sent again."""
    text = " ".join(f"Sentence number {number} is here." for number in range(40))
    with serving(**kept, chunk_tokens=16, chunk_overlap=0) as client:
        before = client.stored(text)
        assert len(client.search("sentence")) == before["chunks_total"] > 10
    with serving(**kept, chunk_tokens=128, chunk_overlap=0) as client:
        client.stored("Another sentence.")
        after = client.stored(text)
        hits = [
            hit for hit in client.search("sentence") if hit["document_id"] == after["document_id"]
        ]
    assert before["document_id"] == after["document_id"]
    assert sorted(hit["chunk"] for hit in hits) == list(range(after["chunks_total"]))
    assert after["chunks_total"] < before["chunks_total"]


def test_stored_vectors_are_those_of_the_server(tmp_path: Path, model: Model) -> None:
    """A shifted row would be found under another text."""
    texts = [f"text {number}" for number in range(50)]
    config = Config(data=str(tmp_path), **model.settings)  # type: ignore[arg-type]
    with served(create_app(config)) as port:
        client = Client(port)
        for task_id in [client.posted(text) for text in texts]:
            assert client.settled(task_id)["status"] == "done"
        for text in texts[:5]:
            assert client.search(text, k=1)[0]["text"] == text
            assert client.search(text, k=1)[0]["score"] == pytest.approx(1, abs=1e-4)
    service = Service(config)
    try:
        collection = service.store._collection(config.collection_of("local"))  # type: ignore[attr-defined]
        rows = collection.get(include=["documents", "embeddings"])
    finally:
        service.close()
    found = {
        text: tuple(map(float, vector))
        for text, vector in zip(rows["documents"], rows["embeddings"], strict=True)
    }
    assert found == {text: pytest.approx(model.vector(text)) for text in texts}


# --- Failures ----------------------------------------------------------------------------------


def test_poison_fails_alone_and_leaves_nothing(model: Model, kept: dict[str, Any]) -> None:
    """Its neighbours share its batch, and one of its own chunks would have been fine."""
    poisoned = "All is well here. " * 12 + "But there is hemlock in it."
    with serving(**kept, **model.settings, chunk_tokens=32, chunk_overlap=0) as client:
        with model.hold():  # so that what comes now is taken together
            first = client.posted("The first one.")
            wait_until(lambda: model.in_flight)
            model.poison = "hemlock"
            good = [client.posted(f"Good document {number}.") for number in range(10)]
            bad = client.posted(poisoned)
        settled = [client.settled(task_id) for task_id in (first, *good)]
        task = client.settled(bad)
        hits = client.search("document")
    assert {task["status"] for task in settled} == {"done"}
    assert task["status"] == "failed"
    assert task["error"]["code"] == "invalid_request"
    assert re.match(r"Chunk \d of \d could not be embedded: ", task["error"]["message"])
    assert len(hits) == 11
    assert not [hit for hit in hits if hit["document_id"] == task["document_id"]]


def test_failed_update_leaves_the_earlier_form_whole(model: Model, tmp_path: Path) -> None:
    """All chunks of a document, or none; here those of before."""
    text = " ".join(f"Sentence number {number} is here." for number in range(30)) + " hemlock"
    same = {"data": str(tmp_path), "store": "builtin", "chunk_overlap": 0, **model.settings}
    with serving(**same, chunk_tokens=16) as client:
        before = client.stored(text)
    model.poison = "hemlock"
    with serving(**same, chunk_tokens=64) as client:
        after = client.settled(client.posted(text))
        hits = client.search("sentence")
    assert after["status"] == "failed"
    assert len(hits) == before["chunks_total"]


def test_documents_wait_while_the_embedding_server_is_down(kept: dict[str, Any]) -> None:
    """They are queued, which is the truth, and done soon after it is back."""
    with Model() as model, serving(**kept, **model.settings, retry_max_s=0.2) as client:
        client.stored("Before the outage.")
        model.close()
        tasks = [client.posted(f"Document {number}.") for number in range(5)]

        def tried() -> bool:
            states = [client.task(task_id) for task_id in tasks]
            assert {task["status"] for task in states} <= {"queued", "running"}
            return all(task["updated_at"] > task["created_at"] for task in states)

        wait_until(tried)
        model.start()
        assert {client.settled(task_id)["status"] for task_id in tasks} == {"done"}


def test_attempts_end_and_the_reason_is_told(model: Model) -> None:
    """A wrong provider's key is the operator's fault, and its text is not shown to users."""
    settings = {**model.settings, "embedding_key": "sk-wrong-0123456789"}
    with serving(**settings, max_attempts=2, retry_max_s=0.01) as client:
        task = client.settled(client.posted("A document."))
    assert task["status"] == "failed"
    assert "sk-" not in json.dumps(task)


@pytest.mark.parametrize(
    "answer", [Reply(status=404, text="No such model."), Reply(vectors={0: [1.0] * 8})]
)
def test_fault_of_the_operator_kills_no_document(answer: Reply) -> None:
    """A wrong model or width is mended by whoever runs the service; the text is innocent."""
    with Model() as model, serving(**model.settings, dimensions=16, retry_max_s=0.05) as client:
        model.script(answer)
        assert client.stored("A document.")
        assert len(model.requests) >= 2


class HalfBroken(BuiltinStore):
    """A store that refuses a write with one certain document."""

    def __init__(self) -> None:
        super().__init__(None)
        self.writes: list[list[str]] = []

    def replace(self, collection: str, documents: Sequence[Embedded]) -> None:
        self.writes.append([item.document.text for item in documents])
        if any("refused" in item.document.text for item in documents):
            raise UnavailableError("It does not like that one.")
        super().replace(collection, documents)


class Counting:
    """Vectors of one number, and the batches in which they were asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def split(self, text: str) -> list[str]:
        return text.split("|")

    def embed(self, chunks: Sequence[str]) -> list[array[float] | BaseException]:
        self.batches.append(list(chunks))
        return [
            LMInvalidRequestError("no") if "bad" in chunk else array("f", [1.0]) for chunk in chunks
        ]


def processed(*texts: str) -> tuple[list[Any], Counting, HalfBroken]:
    vectors, store = Counting(), HalfBroken()
    pipeline = Pipeline(vectors, store, lambda user: user)  # type: ignore[arg-type]
    documents = [Document(user="ann", text=text) for text in texts]
    return pipeline.process(documents, lambda *_: None), vectors, store


def test_write_that_fails_is_taken_apart() -> None:
    """One document that the store refuses is tried again alone, the others are stored."""
    outcomes, _, store = processed("a", "b|b", "refused", "d")
    assert [outcomes[0], outcomes[1], outcomes[3]] == [1, 2, 1]
    assert (outcomes[2].code, outcomes[2].may_pass) == ("unavailable", True)
    assert store.count() == (3, 4)
    store.close()


def test_equal_documents_of_a_batch_are_written_once() -> None:
    """Chroma refuses a write in which an id comes twice."""
    outcomes, _, store = processed("same", "other", "same")
    assert (outcomes, store.writes) == ([1, 1, 1], [["same", "other"]])
    store.close()


def test_chunks_of_all_documents_share_batches() -> None:
    """And a permanent fault goes before one that may pass."""
    outcomes, vectors, store = processed("a|b", "c", "bad|d")
    assert vectors.batches == [["a", "b", "c", "bad", "d"]]
    assert outcomes[:2] == [2, 1]
    assert isinstance(outcomes[2], Failure)
    assert not outcomes[2].may_pass
    store.close()


def test_document_that_cannot_be_cut_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that stumbles over one text is no reason to fail its neighbours."""

    def split(_: Counting, text: str) -> list[str]:
        if text == "odd":
            raise ValueError(text)
        return [text]

    monkeypatch.setattr(Counting, "split", split)
    outcomes, _, store = processed("a", "odd", "b")
    assert (outcomes[0], outcomes[2]) == (1, 1)
    assert (outcomes[1].code, outcomes[1].may_pass) == ("internal", True)
    store.close()


def test_progress_counts_vectors_and_not_attempts() -> None:
    """`chunks_done` is what has a vector."""
    store, told = BuiltinStore(None), []
    pipeline = Pipeline(Counting(), store, lambda user: user)  # type: ignore[arg-type]
    text = "|".join(["bad"] * SLICE + ["good"] * SLICE)
    pipeline.process([Document(user="ann", text=text)], lambda *said: told.append(said))
    store.close()
    assert told == [(0, 2 * SLICE, 0), (0, 2 * SLICE, 0), (0, 2 * SLICE, SLICE)]


def test_document_that_is_not_held_any_more_is_not_stored() -> None:
    """Its next holder may have stored a later form of it."""
    store = BuiltinStore(None)
    pipeline = Pipeline(Counting(), store, lambda user: user)  # type: ignore[arg-type]
    documents = [Document(user="ann", text=text) for text in ("lost", "held")]
    outcomes = pipeline.process(documents, lambda *_: None, lambda place: place == 1)
    assert isinstance(outcomes[0], Failure)
    assert (outcomes[0].may_pass, outcomes[1], store.count()) == (True, 1, (1, 1))
    store.close()


def test_vectors_of_another_width_never_mix() -> None:
    """A server that has another model under the old name would shift all rows."""
    store = BuiltinStore(None)

    def put(text: str, width: int) -> None:
        vector = array("f", [1.0] * width)
        store.replace("c", [Embedded(Document(user="ann", text=text), [text], [vector])])

    put("a", 8)
    with pytest.raises(UnavailableError, match="4 and 8"):
        put("b", 4)
    assert [hit.text for hit in store.search("c", [1.0] * 8, 5)] == ["a"]
    put("a", 4)  # the only one may change
    store.close()


def test_document_with_more_chunks_than_one_write_takes_is_refused() -> None:
    """A half-stored document must not be possible."""
    outcomes, vectors, store = processed("|".join("x" * (BuiltinStore.max_rows + 1)))
    assert (outcomes[0].code, store.count()) == ("too_many_chunks", (0, 0))
    assert vectors.batches == []  # nor does it cost anything
    store.close()


def test_task_that_takes_its_worker_down_is_given_up(tmp_path: Path) -> None:
    """Otherwise one document that exhausts the memory would stop the service for ever."""
    path = tmp_path / "tasks.sqlite3"
    tasks = SqliteTasks(path, capacity=5, keep_s=60)
    task_id = tasks.create(Document(user="ann", text="deadly")).task_id
    for _ in range(MAX_LOSSES):
        assert tasks.begin(task_id) is not None
        tasks.close()  # the process is gone, and another one starts
        tasks = SqliteTasks(path, capacity=5, keep_s=60)
    assert tasks.begin(task_id) is None
    task = tasks.get("ann", task_id)
    tasks.close()
    assert task is not None
    assert (task.status, task.error and task.error[0]) == ("failed", "worker_lost")


def test_full_disk_costs_no_room_in_the_queue_and_no_document(tmp_path: Path) -> None:
    """What was refused does not count, and what was in hand goes on when there is space again."""
    service = Service(Config(data=str(tmp_path), store="builtin", queue_size=5))
    tasks = service.tasks
    assert isinstance(tasks, SqliteTasks)
    first, second = (
        tasks.create(Document(user="ann", text=f"Document {number}. {'x' * 9_000}")).task_id
        for number in range(2)
    )

    def full(*, is_full: bool) -> None:
        pages = tasks._db.execute("PRAGMA page_count").fetchone()[0] if is_full else 1_000_000
        tasks._db.execute(f"PRAGMA max_page_count = {pages}")

    full(is_full=True)
    for _ in range(10):
        with pytest.raises(UnavailableError):
            tasks.create(Document(user="ann", text="y" * 90_000))
    full(is_full=False)
    runner, begin, settle = service.runner, tasks.begin, tasks.finish
    fails = ["begin", "finish"]

    def begin_once(task_id: str) -> Any:
        if task_id == second and "begin" in fails:
            fails.remove("begin")
            raise UnavailableError("The disk is full.")
        return begin(task_id)

    def finish_once(*args: Any) -> None:
        if "finish" in fails:
            fails.remove("finish")
            raise UnavailableError("The disk is full.")
        settle(*args)

    tasks.begin, tasks.finish = begin_once, finish_once  # type: ignore[method-assign]
    service.queue.start()
    states = [lambda one=one: tasks.get("ann", one) for one in (first, second)]
    wait_until(lambda: [state().status for state in states] == ["done", "done"], 20)  # type: ignore[union-attr,no-untyped-call]
    assert fails == []
    for number in range(5):
        tasks.create(Document(user="ann", text=f"As many as before: {number}."))
    runner.close()
    service.close()


def test_clock_that_is_put_back_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may start in another year, and learn the time when it has a network."""
    tasks = SqliteTasks(None, capacity=5, keep_s=60)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e8)
    new, again = (tasks.create(Document(user="ann", text=text)).task_id for text in "ab")
    assert set(tasks.due(5)) == {new, again}
    ticket = tasks.begin(again)
    assert ticket is not None
    tasks.retry(ticket, 10)
    assert tasks.due(5) == [new]
    monkeypatch.setattr(time, "time", lambda: now)
    assert set(tasks.due(5)) == {new, again}
    tasks.close()


def test_polite_end_is_no_loss_of_a_worker(tmp_path: Path, model: Model) -> None:
    """However often the service is restarted while its model hangs, the document lives."""
    config = Config(data=str(tmp_path), store="builtin", shutdown_s=0, **model.settings)  # type: ignore[arg-type]
    path, threads = tmp_path / "tasks.sqlite3", []
    with model.hold():
        for number in range(MAX_LOSSES + 1):
            service = Service(config)
            if number == 0:
                task_id = service.tasks.create(Document(user="ann", text="Patience.")).task_id
            service.queue.start()
            model.wait_for_requests(number + 1)
            service.close()
            threads.append(service.queue._thread)  # type: ignore[attr-defined]
    for thread in threads:
        thread.join(20)
    tasks = SqliteTasks(path, capacity=5, keep_s=60)
    ticket = tasks.begin(task_id)
    tasks.close()
    assert ticket is not None
    assert ticket.attempt == 1


# --- Ends and beginnings -----------------------------------------------------------------------


def test_accepted_documents_survive_a_kill(tmp_path: Path) -> None:
    """They were on the disk before they were accepted, so nothing has to be asked of a signal."""
    port, settings = free_port(), {"data": str(tmp_path / "data"), "store": "builtin"}
    with Model() as model:
        client = Client(port)
        with (
            service(tmp_path / "1", port=port, **settings, **model.settings) as first,
            model.hold(),
        ):
            tasks = [client.posted(f"Document {number}.") for number in range(30)]
            wait_until(lambda: model.in_flight)
            first.kill_group()
        with service(tmp_path / "2", port=port, **settings, **model.settings) as second:
            states = [client.settled(task_id)["status"] for task_id in tasks]
            health = client.health()[1]
            assert second.stop() in {0, -15}
    assert states == ["done"] * 30
    assert (health["documents"], health["chunks"]) == (30, 30)
    assert PROVIDER_KEY not in first.printed() + second.printed()


def test_end_finishes_what_waits_in_memory() -> None:
    """Without files, waiting is all that can be done."""
    with Model() as model:
        service = Service(Config(data="", shutdown_s=20, batch_documents=1, **model.settings))  # type: ignore[arg-type]
        for number in range(5):
            service.tasks.create(Document(user="ann", text=f"Document {number}."))
        service.queue.start()
        assert service.close() == 0
        assert {text for request in model.requests for text in request.json["input"]} == {
            f"Document {number}." for number in range(5)
        }


def test_end_says_what_it_loses(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """An honest loss is in the log, with the remedy."""
    with model.hold():
        service = Service(Config(data="", shutdown_s=0, **model.settings))  # type: ignore[arg-type]
        service.tasks.create(Document(user="ann", text="A document."))
        service.queue.start()
        model.wait_for_requests(1)
        with caplog.at_level(logging.ERROR):
            assert service.queue.close(0.1) == 1
    assert "1 accepted documents are lost" in caplog.text
    assert "EMBEDDING_SERVICE_DATA" in caplog.text
    service.queue._thread.join(20)  # type: ignore[attr-defined]
    service.tasks.close()
    service.store.close()


def test_second_process_on_the_same_files_is_refused(tmp_path: Path) -> None:
    """Two would each keep an index of half of the documents."""
    config = Config(data=str(tmp_path), store="builtin")
    first = Service(config)
    with pytest.raises(SettingsError, match="EMBEDDING_SERVICE_REDIS_URL"):
        Service(config)
    first.close()
    Service(config).close()


# --- Hostile input -----------------------------------------------------------------------------

JSON = "application/json"


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        (JSON, b'{"text": ""}', 422, "empty"),
        (JSON, b'{"text": " \\n "}', 422, "empty"),
        (JSON, b"{", 422, "invalid_input"),
        (JSON, b"[" * 100_000, 422, "invalid_input"),
        (JSON, b"[]", 422, "invalid_input"),
        (JSON, b'{"text": 7}', 422, "invalid_input"),
        (JSON, b'{"txt": "a"}', 422, "invalid_input"),
        (JSON, b'{"text": "\\ud800"}', 422, "invalid_input"),
        (JSON, b'{"text": "a\\u0000b"}', 422, "invalid_input"),
        (JSON, b'{"text": "\xff"}', 422, "invalid_input"),
        (JSON, b'{"text": "a", "title": "a\\u0000b"}', 422, "invalid_input"),
        (JSON, b'{"text": "a", "title": "%s"}' % (b"t" * 201), 422, "invalid_input"),
        (JSON, b'{"text": "a", "metadata": {"$or": "x"}}', 422, "invalid_input"),
        (JSON, b'{"text": "a", "metadata": {"a": {"$ne": ""}}}', 422, "invalid_input"),
        (JSON, b'{"text": "a", "metadata": {"a": "%s"}}' % (b"v" * 1_001), 422, "invalid_input"),
        ("text/plain", b"\xff\xfe", 422, "not_utf8"),
        ("text/plain", b"", 422, "empty"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx", 422, "invalid_input"),
        ("multipart/form-data", b"", 422, "invalid_input"),
        (  # a head whose reading would take most of a minute
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"%b\r\n\r\nx\r\n--b--'
            % (b";a" * 500_000),
            422,
            "invalid_input",
        ),
        ("application/pdf", b"%PDF", 415, "unsupported_media_type"),
        ("", b"text", 415, "unsupported_media_type"),
        ("text/plain", b"a" * 1_048_577, 413, "too_large"),
    ],
)
def test_body_that_cannot_be_used_is_refused(
    open_service: Client, content_type: str, body: bytes, status: int, code: str
) -> None:
    """Each in the one form of errors, with nothing stored."""
    headers = {"content-type": content_type} if content_type else {}
    got, answer, _ = open_service.ask("POST", "/documents", body, headers)
    assert (got, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/search", 422),
        ("/search?q=", 422),
        ("/search?q=%00", 422),
        ("/search?q=a&k=0", 422),
        ("/search?q=a&k=51", 422),
        ("/search?q=" + "a" * 4_001, 422),
        ("/tasks/nobody", 404),
        ("/tasks/..%2f..%2fetc%2fpasswd", 404),
        ("/tasks/" + "a" * 32, 404),
        ("/tasks/" + "*" * 32, 404),
        ("/static/..%2fapp.py", 404),
        ("/nowhere", 404),
        ("/documents", 405),
    ],
)
def test_request_that_cannot_be_used_is_refused(
    open_service: Client, path: str, status: int
) -> None:
    """Errors of the framework have the same form as ours."""
    got, answer, _ = open_service.ask("GET", path)
    assert got == status
    assert set(answer["error"]) >= {"code", "message"}


def test_endless_body_is_cut_early(open_service: Client) -> None:
    """A body of unknown length is read no further than the limit."""
    piece = b"10000\r\n" + b"a" * 65_536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", open_service.port), timeout=20) as connection:
        connection.sendall(
            f"POST /documents HTTP/1.1\r\nHost: 127.0.0.1:{open_service.port}\r\n"
            "Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        sent = 0
        try:
            while sent < 200:
                connection.sendall(piece)
                sent += 1
        except OSError:
            pass  # cut off
        answer = b""
        try:
            answer = connection.recv(4_096)
        except OSError:
            assert sent < 200
    assert sent < 200 or b" 413 " in answer


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_runs_scripts_of_another_site(path: str, open_service: Client) -> None:
    """The tab's key lies where any script of the same origin can read it."""
    assert open_service.ask("GET", path)[0] == 404


def test_metadata_cannot_pass_for_what_the_service_keeps(kept: dict[str, Any]) -> None:
    """The store's own fields are not a user's to set."""
    forged = {"document_id": "0" * 64, "chunk": "99", "title": "forged", "user": "bob"}
    with serving(**kept, api_keys=API_KEYS) as anybody:
        ann, bob = (Client(anybody.port, KEYS[user]) for user in ("ann", "bob"))
        task = ann.stored("Text of ann.", title="true", metadata=forged)
        (hit,) = ann.search("text")
        assert bob.search("text") == []
    assert (hit["document_id"], hit["chunk"], hit["title"]) == (task["document_id"], 0, "true")
    assert hit["metadata"] == forged


# --- Who may ask, and how often ----------------------------------------------------------------


def test_tenants_never_cross(kept: dict[str, Any]) -> None:
    """Not by search, not by a task's id, and not by having the same document."""
    with serving(**kept, api_keys=API_KEYS) as anybody:
        ann, bob = (Client(anybody.port, KEYS[user]) for user in ("ann", "bob"))
        secret = ann.stored("The treasure is under the oak.", title="ann's")
        ann.stored("A text of both.", title="ann's")
        bob.stored("A text of both.", title="bob's")
        assert {hit["title"] for hit in bob.search("treasure oak text")} == {"bob's"}
        assert {hit["title"] for hit in ann.search("treasure oak text")} == {"ann's"}
        assert bob.ask("GET", f"/tasks/{secret['task_id']}")[0] == 404
        for key in (None, "wrong-key-0123456789", KEYS["ann"][:-1], ""):
            status, answer, headers = Client(anybody.port, key).post("text")
            assert (status, answer["error"]["code"]) == (401, "unauthorized")
            assert headers["www-authenticate"] == "Bearer"
        assert anybody.health()[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
def test_service_without_keys_serves_no_foreign_page(
    open_service: Client, headers: dict[str, str]
) -> None:
    """A site that is open in the user's browser reaches this machine, too."""
    sent = {"content-type": "text/plain", **headers}
    status, answer, _ = open_service.ask("POST", "/documents", b"text", sent)
    assert (status, answer["error"]["code"]) == (403, "forbidden")


def test_service_without_keys_serves_its_own_page(open_service: Client) -> None:
    """A browser sends the page's own origin with each post."""
    host = f"127.0.0.1:{open_service.port}"
    sent = {"content-type": "text/plain", "origin": f"http://{host}", "host": host}
    assert open_service.ask("POST", "/documents", b"text", sent)[0] == 202
    status, shown, headers = open_service.ask("GET", "/")
    assert status == 200
    assert b"<!doctype html>" in shown
    assert headers["content-security-policy"] == "frame-ancestors 'none'"


def test_rate_limit_says_when_to_come_back() -> None:
    """It counts each user alone."""
    with serving(api_keys=API_KEYS, rate_limit=3, rate_window_s=30) as anybody:
        ann, bob = (Client(anybody.port, KEYS[user]) for user in ("ann", "bob"))
        task_id = ann.posted("One.")
        assert [ann.post("Two.")[0], ann.ask("GET", "/search?q=a")[0]] == [202, 200]
        status, answer, headers = ann.post("Three.")
        assert (status, answer["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(headers["retry-after"]) <= 30
        assert ann.task(task_id)  # asking for a task is free
        assert bob.post("One.")[0] == 202


def test_rate_limit_in_memory_is_exact_under_threads() -> None:
    limit = MemoryRateLimit(50, 60)

    def passes(_: int) -> bool:
        try:
            limit.check("ann")
        except RateLimitedError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(passes, range(400))) == 50


def test_full_queue_refuses_and_recovers(model: Model) -> None:
    """Bounded, so that memory and waiting are."""
    with serving(**model.settings, queue_size=3) as client:
        with model.hold():
            tasks = [client.posted(f"Document {number}.") for number in range(3)]
            status, answer, headers = client.post("One more.")
            assert (status, answer["error"]["code"]) == (503, "queue_full")
            assert int(headers["retry-after"]) >= 1
        assert {client.settled(task_id)["status"] for task_id in tasks} == {"done"}
        client.stored("One more.")


# --- Settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PROT": "1"}, "EMBEDDING_SERVICE_PROT is no setting. DID YOU MEAN PORT"),
        ({"PORT": "many"}, "EMBEDDING_SERVICE_PORT: Input should be a valid integer"),
        ({"HOST": "0.0.0.0"}, "set EMBEDDING_SERVICE_API_KEYS"),
        ({"API_KEYS": "ann:secret-123"}, "shorter than 16"),
        ({"API_KEYS": "secret-0123456789"}, "pair 1 is not `user:key`"),
        ({"API_KEYS": f"ann:{KEYS['ann']},bob:{KEYS['ann']}"}, "another user's as well"),
        ({"API_KEYS": "ann:sécret-0123456789"}, "no header can carry"),
        ({"API_KEYS": "ann:secret 0123456789"}, "no header can carry"),
        ({"API_KEYS": ","}, "no `user:key` pairs"),
        ({"REDIS_URL": "secret-0123456789"}, "must begin with redis://"),
        ({"REDIS_URL": "redis://:secret-0123456789@h/0"}, "set EMBEDDING_SERVICE_CHROMA_URL"),
        ({"CHUNK_TOKENS": "16", "CHUNK_OVERLAP": "9"}, "at most half"),
        ({"STORE": "chroma", "DATA": ""}, "needs EMBEDDING_SERVICE_DATA"),
    ],
)
def test_impossible_settings_stop_the_start(environment: dict[str, str], said: str) -> None:
    """All faults are named at once, and no secret is in what is said."""
    given = {f"EMBEDDING_SERVICE_{name}": value for name, value in environment.items()}
    with pytest.raises(SettingsError) as caught:
        Config.from_environment(given)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


def test_settings_show_no_secret() -> None:
    """They may end up in any log."""
    config = Config(api_keys=API_KEYS, embedding_key=PROVIDER_KEY)  # type: ignore[arg-type]
    shown = f"{config!r} {config} {config.keys!r} {config.model_dump()}"
    assert not [key for key in (*KEYS.values(), PROVIDER_KEY) if key in shown]


def test_keys_may_be_replaced_without_an_outage() -> None:
    """A user with two keys may use either."""
    keys = ApiKeys("ann:old-key-0123456789, ann:new-key-0123456789,")
    assert {keys.user_of(f"bearer {age}-key-0123456789") for age in ("old", "new")} == {"ann"}
    for wrong in (None, "", "Basic old-key-0123456789", "Bearer", "Bearer ol\udcffd"):
        with pytest.raises(UnauthorizedError):
            keys.user_of(wrong)


def test_readme_names_every_setting_and_no_other() -> None:
    """A table that is not compared is soon wrong."""
    readme = (ROOT / "examples/embedding_service/README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \|", readme, re.MULTILINE)
    assert sorted(rows) == sorted(name.upper() for name in Config.model_fields)
