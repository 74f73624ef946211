"""What is known of a task, and what keeps tasks must be able to do.

Not here: the two that do: `sqlite_tasks.py` in one process, `redis_tasks.py` across many.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal, Protocol

from examples.embedding_service.documents import Document

Status = Literal["queued", "running", "done", "failed"]

MAX_LOSSES = 5
"""How often a task may take its worker down, or be there when it goes down, before it is given
up; guessed. A document that kills whoever reads it must not do so for ever."""

LOST = "worker_lost", f"The worker ended {MAX_LOSSES} times while it had the document."


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The state of one task, as its user sees it.

    Attributes:
        chunks_total: 0 until the document is split.
        chunks_done: Chunks that have a vector. That all are stored is what `done` says.
        error: (code, message) where the task failed for good.
        created_at: Seconds since 1970, UTC.
        updated_at: Likewise, of the last change.
    """

    task_id: str
    document_id: str
    title: str
    status: Status
    chunks_total: int = 0
    chunks_done: int = 0
    error: tuple[str, str] | None = None
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to work on a task, until it is settled or not renewed in time.

    Attributes:
        token: Tells this holder from a later one.
        attempt: The how manieth, from 1.
    """

    task_id: str
    token: str
    document: Document
    attempt: int


class Tasks(Protocol):
    """Keeps tasks with their documents until they are settled.

    Whatever is not settled comes back: `due` names it again when its holder is gone. All that a
    holder says is ignored when the task has passed to another one.

    Every method raises `UnavailableError` where the database does not answer.
    """

    @property
    def lease_s(self) -> float | None:
        """How long a ticket lives without `renew`; None where a holder cannot be lost alone."""
        ...

    def create(self, document: Document) -> Task:
        """Keep a new task for good before it returns.

        Raises:
            QueueFullError: As many as allowed are open.
        """
        ...

    def get(self, user: str, task_id: str) -> Task | None:
        """Return a task, None where the user has no such task."""
        ...

    def due(self, limit: int) -> list[str]:
        """Name open tasks that somebody must look at now, each once in a while."""
        ...

    def begin(self, task_id: str) -> Ticket | None:
        """Take a task; None where it is settled, or another holder has it or its document."""
        ...

    def renew(self, ticket: Ticket) -> bool:
        """Go on holding a ticket; False where the task has passed to another holder."""
        ...

    def progress(self, ticket: Ticket, total: int, done: int) -> None:
        """Note how far the document is."""
        ...

    def finish(self, ticket: Ticket, chunks: int) -> None:
        """Settle: all chunks are stored."""
        ...

    def fail(self, ticket: Ticket, code: str, message: str) -> None:
        """Settle: the document will not be stored."""
        ...

    def retry(self, ticket: Ticket, after_s: float) -> None:
        """Give the ticket back; the task is due again later."""
        ...

    def release(self, ticket: Ticket) -> None:
        """Give the ticket back untouched, because this process ends."""
        ...

    def open_tasks(self) -> int:
        """Count the tasks that are not settled; what a health check asks."""
        ...

    def close(self) -> None:
        """Let go of the database."""
        ...


def new_task(document: Document, now: float) -> Task:
    """Return the first state of a task, with an id that nobody can guess."""
    return Task(
        task_id=uuid.uuid4().hex,
        document_id=document.document_id,
        title=document.title,
        status="queued",
        created_at=now,
        updated_at=now,
    )


def as_json(task: Task) -> dict[str, object]:
    """Return a task as the service answers it."""
    code_and_message = task.error
    plain: dict[str, object] = {
        name: getattr(task, name)
        for name in (
            *("task_id", "document_id", "title", "status", "chunks_total", "chunks_done"),
            *("created_at", "updated_at"),
        )
    }
    plain["error"] = (
        None
        if code_and_message is None
        else {"code": code_and_message[0], "message": code_and_message[1]}
    )
    return plain
