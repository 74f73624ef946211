"""The parts of the service, put together as the settings say.

Not here: the parts, one file each, and the web app (`app.py`).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Protocol

from dspylite.errors import SettingsError
from examples.embedding_service.celery_app import CeleryQueue, make_celery
from examples.embedding_service.config import Config
from examples.embedding_service.local_queue import LocalQueue
from examples.embedding_service.pipeline import Pipeline
from examples.embedding_service.ratelimit import MemoryRateLimit, RateLimit, RedisRateLimit
from examples.embedding_service.redis_tasks import RedisTasks
from examples.embedding_service.runner import Runner
from examples.embedding_service.sqlite_tasks import SqliteTasks
from examples.embedding_service.stores import BuiltinStore, Store
from examples.embedding_service.tasks import Tasks
from examples.embedding_service.vectors import Vectors


class Queue(Protocol):
    """Brings created tasks to whoever works on them."""

    name: str

    def start(self) -> None:
        """Begin."""
        ...

    def submitted(self, task_id: str) -> None:
        """Hear that a task was created."""
        ...

    def close(self, wait_s: float) -> int:
        """End within about so many seconds; return how many accepted documents are lost by it."""
        ...


class Service:
    """All parts but the web app; a worker uses the same without the queue.

    Args:
        config: The settings.

    Raises:
        SettingsError: Another process uses the same data.
        LMConfigurationError: The model's settings cannot work.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.keys = config.keys
        self.vectors = Vectors(config)
        self._lock_file = _hold(config)
        self.tasks: Tasks = make_tasks(config)
        self.store = _make_store(config)
        pipeline = Pipeline(self.vectors, self.store, config.collection_of)
        self.runner = Runner(
            self.tasks,
            pipeline,
            max_attempts=config.max_attempts,
            retry_max_s=config.retry_max_s,
        )
        self.limit: RateLimit
        self.queue: Queue
        if isinstance(self.tasks, RedisTasks):
            self.limit = RedisRateLimit(self.tasks.client, config.rate_limit, config.rate_window_s)
            self.queue = CeleryQueue(make_celery(config))
        else:
            self.limit = MemoryRateLimit(config.rate_limit, config.rate_window_s)
            self.queue = LocalQueue(
                self.tasks,
                self.runner,
                batch=config.batch_documents,
                is_kept=config.data_path is not None,
            )

    def close(self) -> int:
        """End all parts; return how many accepted documents are lost by it."""
        lost = self.queue.close(self.config.shutdown_s)
        self.runner.close()
        self.tasks.close()
        self.store.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
        return lost


def make_tasks(config: Config) -> Tasks:
    """Make what keeps the tasks."""
    if config.redis_url is not None:
        return RedisTasks(
            config.redis_url.get_secret_value(),
            capacity=config.queue_size,
            keep_s=config.keep_tasks_s,
            lease_s=config.lease_s,
        )
    path = config.data_path
    return SqliteTasks(
        path and path / "tasks.sqlite3", capacity=config.queue_size, keep_s=config.keep_tasks_s
    )


def _make_store(config: Config) -> Store:
    path = config.data_path
    has_chroma = importlib.util.find_spec("chromadb") is not None
    if (
        config.chroma_url
        or config.store == "chroma"
        or (config.store == "auto" and path is not None and has_chroma)
    ):
        # Chroma takes a second to load, which other stores need not wait for.
        from examples.embedding_service.chroma_store import ChromaStore  # noqa: PLC0415

        if config.chroma_url:
            return ChromaStore.at(config.chroma_url)
        assert path is not None
        return ChromaStore.embedded(path / "chroma")
    return BuiltinStore(path and path / "vectors.sqlite3")


def _hold(config: Config) -> int | None:
    """Keep other processes away from the embedded files, which one alone may use.

    Raises:
        SettingsError: Another process has them.
    """
    path: Path | None = config.data_path
    if path is None or config.redis_url is not None:
        return None
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        import fcntl  # noqa: PLC0415  # not on Windows, where nothing is held
    except ImportError:
        return held
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise SettingsError(
            f"Another process of the service uses `{path}`: run one process, or several with "
            "EMBEDDING_SERVICE_REDIS_URL."
        ) from None
    return held
