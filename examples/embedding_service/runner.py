"""Takes tasks, keeps hold of them while the pipeline works, and notes what became of them.

Not here: where tasks come from: a thread of the same process (`local_queue.py`) or Celery
(`worker.py`).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence

from examples.embedding_service.errors import UnavailableError
from examples.embedding_service.pipeline import Failure, Outcome, Pipeline
from examples.embedding_service.tasks import Tasks, Ticket

logger = logging.getLogger(__name__)


class Runner:
    """Works on tickets; any thread may give it some.

    Args:
        tasks: Where the tasks are kept.
        pipeline: What is done with their documents.
        max_attempts: How often a document is tried whose failures may pass.
        retry_max_s: Longest pause between two attempts; the first is one second.
    """

    def __init__(
        self, tasks: Tasks, pipeline: Pipeline, *, max_attempts: int, retry_max_s: float
    ) -> None:
        self._tasks = tasks
        self._pipeline = pipeline
        self._max_attempts = max_attempts
        self._retry_max_s = retry_max_s
        self._lock = threading.Lock()  # guards the three below
        self._held: dict[str, Ticket] = {}
        self._unsettled: list[Ticket] = []  # of tasks without a lease
        self._is_beating = False
        self._stop = threading.Event()

    def begin(self, task_id: str) -> Ticket | None:
        """Take a task, and hold it from now on; None where there is nothing to do.

        Raises:
            UnavailableError: The tasks cannot be reached.
        """
        ticket = self._tasks.begin(task_id)
        if ticket is not None:
            with self._lock:
                self._held[ticket.task_id] = ticket
                if self._tasks.lease_s is not None and not self._is_beating:
                    self._is_beating = True
                    args = (self._tasks.lease_s / 3,)
                    threading.Thread(
                        target=self._beat, args=args, name="embedding-leases", daemon=True
                    ).start()
        return ticket

    def run(self, tickets: Sequence[Ticket]) -> list[None]:
        """Store the documents of tickets and settle each; what cannot be settled comes back."""

        def progress(place: int, total: int, done: int) -> None:
            try:
                self._tasks.progress(tickets[place], total, done)
            except UnavailableError as error:
                logger.warning("Progress is not noted: %s", error)

        def is_held(place: int) -> bool:
            try:
                return self._tasks.renew(tickets[place])
            except UnavailableError as error:
                logger.warning("Whose task it is cannot be asked: %s", error)
                return False

        try:
            outcomes: list[Outcome] = self._pipeline.process(
                [ticket.document for ticket in tickets], progress, is_held
            )
        except Exception:
            # A fault of ours: the documents are innocent, and are tried again by themselves.
            logger.exception("The pipeline failed")
            outcomes = [Failure("internal", "The service failed.", may_pass=True)] * len(tickets)
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            try:
                self._settle(ticket, outcome)
            except Exception as error:  # noqa: BLE001  # the other tickets are settled all the same
                logger.warning("Task %s is not settled yet: %s", ticket.task_id, error)
                if self._tasks.lease_s is None:
                    with self._lock:
                        self._unsettled.append(ticket)
            finally:
                self._let_go(ticket)
        return [None] * len(tickets)

    def give_back(self) -> None:
        """Give back what could not be settled, where no lease does so.

        Raises:
            UnavailableError: The tasks still cannot be reached.
        """
        while self._unsettled:
            self._tasks.retry(self._unsettled[0], 1)
            with self._lock:
                del self._unsettled[0]

    def close(self) -> None:
        """End the heartbeat, and give back what is in hand: it is not what ends this process."""
        self._stop.set()
        with self._lock:
            left = [*self._held.values(), *self._unsettled]
        for ticket in left:
            try:
                self._tasks.release(ticket)
            except UnavailableError as error:
                logger.warning("Task %s is not given back: %s", ticket.task_id, error)

    def _settle(self, ticket: Ticket, outcome: Outcome) -> None:
        if isinstance(outcome, int):
            self._tasks.finish(ticket, outcome)
        elif outcome.may_pass and ticket.attempt < self._max_attempts:
            pause = min(self._retry_max_s, 2.0 ** min(ticket.attempt - 1, 30))
            # Some earlier, so that what failed together does not come back together.
            self._tasks.retry(ticket, pause * random.uniform(0.5, 1))
        else:
            self._tasks.fail(ticket, outcome.code, outcome.message)

    def _let_go(self, ticket: Ticket) -> None:
        with self._lock:
            self._held.pop(ticket.task_id, None)

    def _beat(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            with self._lock:
                held = list(self._held.values())
            for ticket in held:
                try:
                    self._tasks.renew(ticket)
                except UnavailableError as error:
                    logger.warning("Leases are not renewed: %s", error)
                    break
