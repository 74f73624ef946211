"""A worker: `celery -A examples.embedding_service.worker worker --pool threads --concurrency 32`.

Each message names a task. What threads ask for at the same time goes into common batches. Without
`--pool threads` Celery forks processes, each of which works on one document at a time.

Not here: how Celery is set (`celery_app.py`), and what is done with a document (`pipeline.py`).
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from celery.signals import worker_process_init, worker_ready, worker_shutting_down

import dspylite as dspy
from examples.embedding_service.celery_app import CeleryQueue, make_celery
from examples.embedding_service.config import Config
from examples.embedding_service.errors import UnavailableError
from examples.embedding_service.service import Service, make_tasks
from examples.embedding_service.tasks import Ticket

Batcher = dspy.MicroBatcher[Ticket, None]

logger = logging.getLogger(__name__)

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request to Chroma
config = Config.from_environment()
app = make_celery(config)

_MAX_DUE = 200  # messages sent again at a time; guessed
_lock = threading.Lock()  # guards the one below
_working: dict[int, tuple[Service, Batcher]] = {}  # by process: a forked child makes its own
_ending = threading.Event()
_forked = threading.Event()  # in a process that has one document at a time, none waits for others


def _parts() -> tuple[Service, Batcher]:
    """Return this process' own service, made when its first document comes."""
    with _lock:
        if os.getpid() not in _working:
            service = Service(config)
            batcher = dspy.MicroBatcher(
                service.runner.run,
                config.batch_documents,
                0 if _forked.is_set() else config.batch_wait_s,
                max_concurrency=2,  # while one batch is embedded, another one is stored
            )
            _working.clear()
            _working[os.getpid()] = service, batcher
        return _working[os.getpid()]


def process(task_id: str) -> None:
    """Work on a task until it is settled or given back.

    Failures of the task do not show here: its own state has them.
    """
    service, batcher = _parts()
    try:
        ticket = service.runner.begin(task_id)
    except UnavailableError as error:
        logger.warning("Task %s waits: %s", task_id, error)
        return
    if ticket is not None:
        batcher(ticket)


process_task = app.task(name="embedding_service.process")(process)


def _watch() -> None:
    """Send messages for tasks that are due: whose worker is gone, or that are tried again."""
    tasks, queue = make_tasks(config), CeleryQueue(app)
    assert tasks.lease_s is not None
    while not _ending.wait(min(1.0, tasks.lease_s / 4)):
        try:
            for task_id in tasks.due(_MAX_DUE):
                queue.submitted(task_id)
        except UnavailableError as error:
            logger.warning("%s", error)
        except Exception:
            logger.exception("Looking for tasks that are due failed")  # and goes on


@worker_process_init.connect  # type: ignore[untyped-decorator,unused-ignore]
def _alone(**_: Any) -> None:
    _forked.set()


@worker_ready.connect  # type: ignore[untyped-decorator,unused-ignore]
def _started(**_: Any) -> None:
    threading.Thread(target=_watch, name="embedding-due", daemon=True).start()


@worker_shutting_down.connect  # type: ignore[untyped-decorator,unused-ignore]
def _stopping(**_: Any) -> None:
    _ending.set()
