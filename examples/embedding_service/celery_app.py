"""The Celery app that web processes send to and workers receive from, and why it is set as it is.

Not here: the work (`worker.py`), and the tasks themselves: messages carry ids alone.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from examples.embedding_service.config import Config
from examples.embedding_service.errors import UnavailableError
from examples.embedding_service.redis_tasks import QUEUE

PROCESS = "embedding_service.process"
"""The name of the one kind of message: process the task with this id."""


def make_celery(config: Config) -> Any:
    """Make the app; nothing is connected yet."""
    assert config.redis_url is not None
    app = Celery("embedding_service", broker=config.redis_url.get_secret_value())
    app.conf.update(
        task_default_queue=QUEUE,
        # A message is acknowledged when its work has ended, and goes back where the process that
        # had it was killed.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        # A message that a killed worker had comes back after this long. A longer task is safe: a
        # second message for it finds it held, and does nothing. (And whatever the broker loses is
        # sent again when the lease of its task ends.)
        broker_transport_options={
            "visibility_timeout": config.visibility_timeout_s,
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "retry_on_timeout": True,
        },
        # No code ever comes out of a message.
        task_serializer="json",
        accept_content=["json"],
        # Results are the business of the tasks' own hashes.
        task_ignore_result=True,
        result_backend=None,
        task_publish_retry=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    return app


class CeleryQueue:
    """Sends messages to the workers.

    Args:
        app: From `make_celery`.
    """

    name = "celery"

    def __init__(self, app: Any) -> None:
        self._app = app

    def start(self) -> None:
        """Do nothing: workers are processes of their own."""

    def submitted(self, task_id: str) -> None:
        """Tell a worker of a task.

        Raises:
            UnavailableError: The broker does not answer.
        """
        try:
            self._app.send_task(PROCESS, args=[task_id])
        except OperationalError as error:
            raise UnavailableError("The queue cannot be reached.", retry_after=5) from error

    def close(self, wait_s: float) -> int:
        """Close the connections; nothing is lost by it."""
        del wait_s
        self._app.close()
        return 0
