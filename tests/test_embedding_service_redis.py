"""The embedding service across processes: real Redis, real Celery workers, a real Chroma server.

Not here: what does not depend on them (`test_embedding_service.py`).
"""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.embedding_service import chroma_store
from examples.embedding_service.celery_app import make_celery
from examples.embedding_service.chroma_store import ChromaStore
from examples.embedding_service.config import Config
from examples.embedding_service.documents import Document
from examples.embedding_service.errors import QueueFullError, RateLimitedError, UnavailableError
from examples.embedding_service.ratelimit import RedisRateLimit
from examples.embedding_service.redis_tasks import PREFIX, QUEUE, RedisTasks, connect
from examples.embedding_service.stores import Embedded
from examples.embedding_service.tasks import MAX_LOSSES
from tests.embedding_service_tools import (
    API_KEYS,
    KEYS,
    PROVIDER_KEY,
    Client,
    Model,
    Running,
    environment,
    free_port,
    running,
    service,
    wait_until,
)

REDIS, CHROMA = (
    shutil.which("redis-server"),
    shutil.which("chroma", path=str(Path(sys.executable).parent)),
)
pytestmark = [
    pytest.mark.skipif(REDIS is None, reason="needs `redis-server`"),
    pytest.mark.skipif(CHROMA is None, reason="needs `chroma`, which comes with chromadb"),
    pytest.mark.timeout(240),
    # One Redis and one Chroma serve all of them, and the machine has few cores.
    pytest.mark.xdist_group("embedding_service_redis"),
]


# --- The servers -------------------------------------------------------------------------------


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def redis_server(directory: Path, port: int) -> Generator[Running]:
    """Run a Redis that writes down every change, as the README asks for."""
    assert REDIS is not None
    options = ("--port", str(port), "--dir", str(directory), "--appendonly", "yes", "--save", "")
    with running(REDIS, *options, "--bind", "127.0.0.1", log=directory / "log") as started:
        wait_until(lambda: is_listening(port))
        client = connect(f"redis://127.0.0.1:{port}/0")
        wait_until(lambda: answers(client))
        client.close()
        yield started


def answers(client: Any) -> bool:
    import redis

    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with redis_server(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="module")
def chroma_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert CHROMA is not None
    directory, port = tmp_path_factory.mktemp("chroma"), free_port()
    options = ("run", "--path", str(directory / "data"), "--port", str(port))
    with running(CHROMA, *options, log=directory / "log"):
        wait_until(lambda: is_listening(port))
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def models() -> Iterator[Model]:
    with Model() as started:
        yield started


@pytest.fixture
def settings(redis_url: str, chroma_url: str, models: Model) -> Iterator[dict[str, str]]:
    """Give the settings of a system with an empty Redis, and a model whose log is empty."""
    client = connect(redis_url)
    client.flushall()
    models.poison = ""
    models.wait_until_idle()
    models.clear()
    yield {
        "redis_url": redis_url,
        "chroma_url": chroma_url,
        "api_keys": API_KEYS,
        "rate_limit": "0",
        "lease_s": "2",
        "visibility_timeout_s": "5",
        "retry_max_s": "0.5",
        "instruction": f"{uuid.uuid4().hex}: ",  # and so, collections of its own
        **models.settings,
    }
    client.flushall()
    client.close()


def worker(
    log: Path, settings: dict[str, str], *, pool: str = "threads", concurrency: int = 16
) -> Any:
    """Start a worker as the README does."""
    command = (sys.executable, "-m", "celery", "-A", "examples.embedding_service.worker", "worker")
    options = ("--pool", pool, "--concurrency", str(concurrency), "-n", f"{log.name}@test")
    return running(*command, *options, "-l", "INFO", log=log, env=environment(**settings))


@contextmanager
def system(
    directory: Path, settings: dict[str, str], user: str = "ann"
) -> Generator[tuple[Client, Running]]:
    """Run the service and one worker; give a client and the worker."""
    port = free_port()
    with (
        service(directory / "service", port=port, **settings),
        worker(directory / "worker", settings) as started,
    ):
        yield Client(port, KEYS[user]), started


def everything_in(redis_url: str) -> str:
    """Return all keys and values of all databases of a Redis."""
    client = connect(redis_url)
    client.connection_pool.connection_kwargs["encoding_errors"] = "replace"
    read = {
        "string": client.get,
        "hash": client.hgetall,
        "list": lambda key: client.lrange(key, 0, -1),
        "set": client.smembers,
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
    }
    shown = [repr((key, read[client.type(key)](key))) for key in client.scan_iter(count=1000)]
    databases = client.info("keyspace")
    client.close()
    assert set(databases) <= {"db0"}
    return "\n".join(shown)


def chunks_of(chroma_url: str, settings: dict[str, str], user: str) -> Any:
    """Return what Chroma itself holds of a user."""
    config = Config(**settings)  # type: ignore[arg-type]
    store = ChromaStore.at(chroma_url)
    try:
        collection = store._collection(config.collection_of(user))
        return collection.get(include=["documents", "embeddings", "metadatas"])
    finally:
        store.close()


# --- Nothing is lost ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "concurrency", "count"), [("threads", 16, 1_000), ("prefork", 2, 300)]
)
def test_killed_worker_loses_no_document(
    pool: str,
    concurrency: int,
    count: int,
    tmp_path: Path,
    settings: dict[str, str],
    redis_url: str,
    chroma_url: str,
    models: Model,
) -> None:
    """Two workers; one is killed, with its children, in the middle of its documents.

    Everything is stored once with the right vector, every task says so, and no key of the service
    or of the model's provider is anywhere in Redis, neither while it runs nor afterwards.
    """
    texts = [f"Document number {number}." for number in range(count)]
    port = free_port()
    client = Client(port, KEYS["ann"])
    with service(tmp_path / "service", port=port, **settings):
        with ThreadPoolExecutor(8) as posting:
            tasks = list(posting.map(client.posted, texts))
        with (
            worker(tmp_path / "one", settings, pool=pool, concurrency=concurrency) as one,
            worker(tmp_path / "two", settings, pool=pool, concurrency=concurrency),
        ):
            wait_until(lambda: one.printed().count(" succeeded in ") > count // 10)
            with models.hold():  # so that it certainly has some in hand
                wait_until(lambda: models.in_flight >= 2)
                one.kill_group()
                meanwhile = everything_in(redis_url)
            settled = [client.settled(task_id) for task_id in tasks]
        afterwards = everything_in(redis_url)
    assert {(task["status"], task["chunks_done"]) for task in settled} == {("done", 1)}
    assert " succeeded in " in (tmp_path / "two").read_text("utf-8")
    rows = chunks_of(chroma_url, settings, "ann")
    assert sorted(rows["documents"]) == sorted(texts)
    assert {fields["document_id"] for fields in rows["metadatas"]} == {
        task["document_id"] for task in settled
    }
    for text, vector in zip(rows["documents"], rows["embeddings"], strict=True):
        assert list(vector) == pytest.approx(models.vector(settings["instruction"] + text))
    assert "status" in meanwhile
    assert "status" in afterwards
    printed = "".join(path.read_text("utf-8") for path in tmp_path.iterdir())
    for secret in (*KEYS.values(), PROVIDER_KEY):
        assert secret not in meanwhile + afterwards + printed


def test_message_that_the_broker_lost_is_sent_again(
    tmp_path: Path, settings: dict[str, str], redis_url: str
) -> None:
    """Celery takes a message off the list before it notes who has it; a crash there loses it."""
    with service(tmp_path / "service", port=(port := free_port()), **settings):
        client = Client(port, KEYS["ann"])
        tasks = [client.posted(f"Lost {number}.") for number in range(5)]
        connection = connect(redis_url)
        assert connection.llen(QUEUE) == 5
        connection.delete(QUEUE)
        connection.close()
        with worker(tmp_path / "worker", settings):
            assert {client.settled(task_id)["status"] for task_id in tasks} == {"done"}


def test_worker_finishes_what_it_has_when_told_to_end(
    tmp_path: Path, settings: dict[str, str], models: Model
) -> None:
    """SIGTERM is what every deployment sends."""
    with system(tmp_path, settings) as (client, started):
        with models.hold():
            task_id = client.posted("In hand at the end.")
            wait_until(lambda: models.in_flight)
            started.process.terminate()
            wait_until(lambda: "Warm shutdown" in started.printed())
            assert client.task(task_id)["status"] == "running"
        assert started.process.wait(30) == 0
        assert client.task(task_id)["status"] == "done"
        assert len(models.requests) == 1


def test_restarted_service_knows_its_tasks(
    tmp_path: Path, settings: dict[str, str], models: Model
) -> None:
    """The web process keeps nothing of its own."""
    with service(tmp_path / "first", port=(port := free_port()), **settings) as first:
        client = Client(port, KEYS["ann"])
        tasks = [client.posted(f"Posted before {number}.") for number in range(3)]
        first.kill_group()
    with system(tmp_path, settings) as (client, _):
        assert {client.settled(task_id)["status"] for task_id in tasks} == {"done"}


def test_redis_may_go_and_come_back(
    tmp_path: Path, settings: dict[str, str], chroma_url: str
) -> None:
    """While it is away nothing is accepted; what was accepted before is done after."""
    (tmp_path / "redis").mkdir()
    redis_port = free_port()
    settings["redis_url"] = f"redis://127.0.0.1:{redis_port}/0"
    port = free_port()
    client = Client(port, KEYS["ann"])
    with (
        redis_server(tmp_path / "redis", redis_port) as redis,
        service(tmp_path / "service", port=port, **settings),
    ):
        before = client.posted("Accepted before the outage.")
        redis.kill_group()
        status, health = client.health()
        assert (status, health["error"]["code"]) == (503, "unavailable")
        status, answer, headers = client.post("Refused.")
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert int(headers["retry-after"]) >= 1
        assert str(redis_port) not in str((health, answer))
        with worker(tmp_path / "worker", settings), redis_server(tmp_path / "redis", redis_port):
            wait_until(lambda: client.health()[0] == 200)
            assert client.settled(before)["status"] == "done"
            client.stored("Accepted after the outage.")


# --- The system as a whole ---------------------------------------------------------------------


def test_documents_of_all_kinds_through_one_worker(
    tmp_path: Path, settings: dict[str, str], models: Model
) -> None:
    """Poison among neighbours, tenants, equal documents at once, a model that is away.

    One test, because starting the processes takes longer than all of them.
    """
    settings["chunk_tokens"], settings["chunk_overlap"] = "32", "0"
    with system(tmp_path, settings) as (ann, _):
        bob = Client(ann.port, KEYS["bob"])
        # One poisoned document among neighbours
        models.poison = "hemlock"
        good = [ann.posted(f"A good document, number {number}.") for number in range(20)]
        bad = ann.posted("All is well here. " * 12 + "But there is hemlock in it.")
        assert {ann.settled(task_id)["status"] for task_id in good} == {"done"}
        failed = ann.settled(bad)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_request")
        hits = ann.search("document")
        assert len(hits) == 20
        assert failed["document_id"] not in {hit["document_id"] for hit in hits}
        # Two tenants
        assert bob.search("document") == []
        assert bob.ask("GET", f"/tasks/{bad}")[0] == 404
        # The same document at once, of one user and of another
        with ThreadPoolExecutor(8) as pool:
            same = list(pool.map(ann.posted, ["The same text."] * 8))
        mine = bob.stored("The same text.")
        assert {ann.settled(task_id)["status"] for task_id in same} == {"done"}
        hits = [hit for hit in ann.search("same") if hit["document_id"] == mine["document_id"]]
        assert (len(hits), len(bob.search("same"))) == (1, 1)
        # The model's server is away for a while
        models.close()
        waiting = [bob.posted(f"Document in the outage, number {number}.") for number in range(5)]
        wait_until(lambda: all(_was_tried(bob.task(task_id)) for task_id in waiting))
        assert {bob.task(task_id)["status"] for task_id in waiting} <= {"queued", "running"}
        models.start()
        assert {bob.settled(task_id)["status"] for task_id in waiting} == {"done"}
        wait_until(lambda: ann.health()[1]["documents"] >= 27)
        assert ann.health()[1]["queue"] == "celery"


def _was_tried(task: dict[str, Any]) -> bool:
    return bool(task["updated_at"] > task["created_at"] + 0.001)


def test_messages_are_json_and_acknowledged_late(settings: dict[str, str]) -> None:
    """A pickle in the queue would be code of whoever can write to Redis."""
    app = make_celery(Config(**settings))  # type: ignore[arg-type]
    assert (app.conf.task_serializer, app.conf.accept_content) == ("json", ["json"])
    assert app.conf.task_acks_late
    assert app.conf.task_reject_on_worker_lost
    assert app.conf.worker_prefetch_multiplier == 1
    assert app.conf.broker_transport_options["visibility_timeout"] == 5


# --- Tasks in Redis ----------------------------------------------------------------------------


@pytest.fixture
def tasks(settings: dict[str, str]) -> Iterator[RedisTasks]:
    made = RedisTasks(settings["redis_url"], capacity=3, keep_s=60, lease_s=0.5)
    yield made
    made.close()


def document(text: str = "A text.") -> Document:
    return Document(user="ann", text=text, title="t", metadata={"a": "b"})


def test_task_has_one_holder(tasks: RedisTasks) -> None:
    """A second message for it does nothing, and its document is nobody else's meanwhile."""
    first, second = tasks.create(document()), tasks.create(document())
    with ThreadPoolExecutor(8) as pool:
        tickets = list(pool.map(tasks.begin, [first.task_id] * 8 + [second.task_id] * 8))
    held = [ticket for ticket in tickets if ticket is not None]
    assert len(held) == 1
    assert held[0].document == document()
    tasks.finish(held[0], 1)
    (other,) = {first.task_id, second.task_id} - {held[0].task_id}
    ticket = tasks.begin(other)
    assert ticket is not None
    tasks.fail(ticket, "code", "message")
    assert tasks.begin(other) is None
    state = tasks.get("ann", other)
    assert state is not None
    assert (state.status, state.error) == ("failed", ("code", "message"))
    assert tasks.get("bob", other) is None
    assert tasks.open_tasks() == 0


def test_silent_holder_loses_its_task_and_is_not_believed_any_more(tasks: RedisTasks) -> None:
    """A process that was suspended must not settle what another one has now."""
    task_id = tasks.create(document()).task_id
    old = tasks.begin(task_id)
    assert old is not None
    for _ in range(3):  # as long as it renews, it is longer than its lease
        time.sleep(0.3)
        tasks.renew(old)
        assert tasks.due(10) == []
    assert wait_until(lambda: tasks.due(10)) == [task_id]
    assert tasks.due(10) == []  # one message is enough for a while
    state = tasks.get("ann", task_id)
    assert state is not None
    assert state.status == "queued"
    new = tasks.begin(task_id)
    assert new is not None
    assert not tasks.renew(old)
    assert tasks.renew(new)
    tasks.finish(old, 1)
    tasks.fail(old, "code", "message")
    state = tasks.get("ann", task_id)
    assert state is not None
    assert state.status == "running"
    tasks.finish(new, 2)
    state = tasks.get("ann", task_id)
    assert state is not None
    assert (state.status, state.chunks_done) == ("done", 2)


def test_lost_message_is_sent_again_though_the_queue_is_never_empty(
    settings: dict[str, str],
) -> None:
    """A busy service must not starve the one whose message was lost."""
    tasks = RedisTasks(settings["redis_url"], capacity=3, keep_s=60, lease_s=0.01)
    tasks.client.rpush(QUEUE, "a message of another task")
    task_id = tasks.create(document()).task_id
    assert wait_until(lambda: tasks.due(10)) == [task_id]
    tasks.client.delete(QUEUE)
    tasks.close()


def test_settled_task_keeps_no_text_and_expires(tasks: RedisTasks) -> None:
    """Redis is for what is under way."""
    task_id = tasks.create(document("Private text.")).task_id
    key = f"{PREFIX}task:{task_id}"
    assert tasks.client.ttl(key) == -1  # open tasks never expire
    ticket = tasks.begin(task_id)
    assert ticket is not None
    tasks.finish(ticket, 1)
    assert 0 < tasks.client.ttl(key) <= 60
    assert "Private" not in str(tasks.client.hgetall(key))


def test_task_that_takes_its_workers_down_is_given_up(tasks: RedisTasks) -> None:
    """As in one process; retries that were reported do not count."""
    task_id = tasks.create(document()).task_id
    for _ in range(MAX_LOSSES + 1):
        ticket = tasks.begin(task_id)
        assert ticket is not None
        tasks.retry(ticket, 0)
    for _ in range(MAX_LOSSES):
        assert tasks.begin(task_id) is not None
        tasks.client.delete(*tasks.client.keys(f"{PREFIX}lock:*"))  # its lease has ended
    assert tasks.begin(task_id) is None
    state = tasks.get("ann", task_id)
    assert state is not None
    assert (state.status, state.error and state.error[0]) == ("failed", "worker_lost")


def test_queue_is_bounded(tasks: RedisTasks) -> None:
    """For all processes together, in one step."""

    def create(number: int) -> bool:
        try:
            tasks.create(document(f"Text {number}."))
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(20))) == 3


def test_redis_that_is_away_is_unavailable_and_not_named() -> None:
    """Its address may hold a password."""
    tasks = RedisTasks(
        f"redis://:secret@127.0.0.1:{free_port()}/0", capacity=1, keep_s=1, lease_s=1
    )
    with pytest.raises(UnavailableError) as caught:
        tasks.create(document())
    tasks.close()
    assert "secret" not in str(caught.value)


# --- The rate limit ----------------------------------------------------------------------------


def test_rate_limit_is_exact_and_its_window_always_ends(settings: dict[str, str]) -> None:
    """Exactly N of M pass, from many threads and two clients, and no key is without an end."""
    clients = [connect(settings["redis_url"]) for _ in range(2)]
    limits = [RedisRateLimit(client, 100, 60) for client in clients]
    key, ends, is_over = f"{PREFIX}rate:ann", [], threading.Event()
    waits: list[float] = []

    def watch() -> None:
        while not is_over.is_set():
            ends.append(clients[0].pttl(key))

    def passes(number: int) -> bool:
        try:
            limits[number % 2].check("ann")
        except RateLimitedError as error:
            waits.append(error.retry_after or 0)
            return False
        return True

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            passed = sum(pool.map(passes, range(1_000)))
    finally:
        is_over.set()
        watching.join(20)
    assert passed == 100
    assert 0 < min(waits) <= max(waits) <= 60
    assert ends
    assert -1 not in ends  # which is a key that would stay for ever
    clients[0].persist(key)
    assert not passes(0)
    assert clients[0].pttl(key) > 0  # a key without an end, whoever made it, is given one
    for client in clients:
        client.close()


def test_rate_limit_passes_again_when_its_window_ends(settings: dict[str, str]) -> None:
    client = connect(settings["redis_url"])
    limit = RedisRateLimit(client, 1, 0.2)
    limit.check("ann")

    def passes() -> bool:
        try:
            limit.check("ann")
        except RateLimitedError:
            return False
        return True

    assert not passes()
    wait_until(passes, 20)
    client.close()


# --- Chroma as a server ------------------------------------------------------------------------


def embedded(text: str, *chunks: str) -> Embedded:
    from array import array

    vectors = [array("f", [float(number), 1.0]) for number in range(len(chunks))]
    return Embedded(Document(user="ann", text=text), chunks, vectors)


def test_chroma_server_keeps_one_form_of_a_document(chroma_url: str) -> None:
    """A row that is stored again is replaced, and none is left beyond a shorter form's end."""
    store = ChromaStore.at(chroma_url)
    store.replace("es-forms", [embedded("a", "a0", "a1", "a2"), embedded("b", "b0")])
    store.replace("es-forms", [embedded("a", "A0", "A1"), embedded("c", "c0")])
    rows = store._collection("es-forms").get()
    store.close()
    assert sorted(rows["documents"]) == ["A0", "A1", "b0", "c0"]


def test_chroma_server_that_is_away_is_unavailable() -> None:
    store = ChromaStore.at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError):
        store.count()


def test_chroma_server_that_hangs_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chroma's own client would wait for ever, and its worker with it."""
    monkeypatch.setattr(chroma_store, "_CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = ChromaStore.at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UnavailableError):
            store.count()


def test_chroma_server_that_falls_silent_is_unavailable(
    chroma_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it has answered before."""
    monkeypatch.setattr(chroma_store, "_ANSWER_S", 0.001)  # no server is so quick
    store = ChromaStore.at(chroma_url)
    with pytest.raises(UnavailableError):
        store.replace("es-silent", [embedded("a", *["a"] * 500)])
    store.close()
