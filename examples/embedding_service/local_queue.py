"""The queue of a service that is one process: one thread that works on what is due.

Not here: where the documents wait (`sqlite_tasks.py`).
"""

from __future__ import annotations

import logging
import threading
import time

from examples.embedding_service.errors import UnavailableError
from examples.embedding_service.runner import Runner
from examples.embedding_service.tasks import Tasks, Ticket

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # how often it looks for what is to be tried again; guessed


class LocalQueue:
    """Takes all that waits, up to a number of documents, embeds it together, and so on.

    One thread is enough: the embedder itself asks its server several things at once.

    Args:
        tasks: Where the documents wait.
        runner: What is done with them.
        batch: Most documents at a time.
        is_kept: Whether `tasks` outlive the process, which decides how it ends.
    """

    name = "memory"

    def __init__(self, tasks: Tasks, runner: Runner, *, batch: int, is_kept: bool) -> None:
        self._tasks = tasks
        self._runner = runner
        self._batch = batch
        self._is_kept = is_kept
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._drain_until = 0.0
        self._thread = threading.Thread(target=self._work, name="embedding-queue", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submitted(self, task_id: str) -> None:
        """Hear that a task was created."""
        del task_id  # found by being due
        self._wake.set()

    def close(self, wait_s: float) -> int:
        """End, and return how many accepted documents are lost by it.

        What is in hand is finished, if that takes no longer than `wait_s` seconds. What waits is
        kept where tasks outlive the process; otherwise it is worked on for as long, too.
        """
        if not self._is_kept:
            self._drain_until = time.monotonic() + wait_s
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(wait_s + 0.5)
        left = self._tasks.open_tasks()
        if left and self._is_kept:
            logger.info("%d documents wait on the disk for the next start", left)
        elif left:
            logger.error(
                "%d accepted documents are lost: they were kept in memory alone; "
                "EMBEDDING_SERVICE_DATA keeps them",
                left,
            )
        return 0 if self._is_kept else left

    def _work(self) -> None:
        while True:
            self._wake.clear()
            tickets = self._take()
            if tickets:
                self._runner.run(tickets)
            if self._closing.is_set() and not self._goes_on():
                return
            if not tickets:
                self._wake.wait(_LOOK_S if not self._closing.is_set() else 0.05)

    def _goes_on(self) -> bool:
        return time.monotonic() < self._drain_until and self._tasks.open_tasks() > 0

    def _take(self) -> list[Ticket]:
        """Take what is due, up to where the tasks cannot be reached."""
        tickets: list[Ticket] = []
        try:
            self._runner.give_back()
            for task_id in self._tasks.due(self._batch):
                ticket = self._runner.begin(task_id)
                if ticket is not None:
                    tickets.append(ticket)
        except UnavailableError as error:
            logger.warning("%s", error)
        except Exception:
            logger.exception("The queue failed")  # and goes on: nobody else would
        return tickets
