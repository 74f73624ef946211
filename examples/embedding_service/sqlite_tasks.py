"""Tasks in one SQLite file, or in memory: the queue of a service that is one process.

Not here: what a task is (`tasks.py`), and the lock by which a second process is kept away
(`service.py`).
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.embedding_service.documents import Document
from examples.embedding_service.errors import QueueFullError, UnavailableError
from examples.embedding_service.tasks import LOST, MAX_LOSSES, Task, Ticket, new_task

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    task_id TEXT PRIMARY KEY, user TEXT NOT NULL, document_id TEXT NOT NULL, title TEXT NOT NULL,
    status TEXT NOT NULL, chunks_total INTEGER NOT NULL DEFAULT 0,
    chunks_done INTEGER NOT NULL DEFAULT 0, error TEXT,
    created_at REAL NOT NULL, updated_at REAL NOT NULL,
    text TEXT, metadata TEXT, due_at REAL, losses INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS tasks_due ON tasks (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_settled ON tasks (updated_at) WHERE due_at IS NULL;
"""
# `due_at` is NULL for what is settled, and for what is held.
_OPEN = "status IN ('queued', 'running')"


class SqliteTasks:
    """The tasks of one process; those of a file outlive it.

    Args:
        path: The file; None keeps all in memory.
        capacity: Most open tasks.
        keep_s: How long settled tasks are kept.
    """

    lease_s = None  # a holder is lost with the whole process, after which `__init__` cleans up

    def __init__(self, path: Path | None, *, capacity: int, keep_s: float) -> None:
        self._capacity = capacity
        self._keep_s = keep_s
        self._lock = threading.Lock()  # guards the connection and the count
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {_SCHEMA}")
        with self._db:
            now = time.time()
            self._db.execute(  # held by a process that is no more, or by its clock
                "UPDATE tasks SET status = 'queued', due_at = ?, updated_at = ? "
                f"WHERE {_OPEN} AND (due_at IS NULL OR due_at > ?)",
                (now, now, now),
            )
        self._latest = now
        self._open = self._db.execute(f"SELECT count(*) FROM tasks WHERE {_OPEN}").fetchone()[0]

    def create(self, document: Document) -> Task:
        """Keep a new task for good before it returns."""
        task = new_task(document, time.time())
        row = (
            *(task.task_id, document.user, task.document_id, task.title, task.status),
            *(task.created_at, task.updated_at, document.text, json.dumps(document.metadata)),
            task.created_at,
        )
        with self._writing(at_once=True) as db:
            if self._open >= self._capacity:
                raise QueueFullError(
                    f"{self._open} documents wait already; try again later.", retry_after=5
                )
            db.execute(
                "INSERT INTO tasks (task_id, user, document_id, title, status, created_at, "
                "updated_at, text, metadata, due_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            db.execute(
                f"DELETE FROM tasks WHERE due_at IS NULL AND updated_at < ? AND NOT ({_OPEN})",
                (task.created_at - self._keep_s,),
            )
            self._open += 1
        return task

    def get(self, user: str, task_id: str) -> Task | None:
        """Return a task, None where the user has no such task."""
        with self._writing() as db:
            row = db.execute(
                "SELECT task_id, document_id, title, status, chunks_total, chunks_done, error, "
                "created_at, updated_at FROM tasks WHERE task_id = ? AND user = ?",
                (task_id, user),
            ).fetchone()
        if row is None:
            return None
        error = None if row[6] is None else json.loads(row[6])
        return Task(
            task_id=row[0],
            document_id=row[1],
            title=row[2],
            status=row[3],
            chunks_total=row[4],
            chunks_done=row[5],
            error=None if error is None else (error[0], error[1]),
            created_at=row[7],
            updated_at=row[8],
        )

    def due(self, limit: int) -> list[str]:
        """Name open tasks that nobody holds and whose time has come, the oldest first."""
        now = time.time()
        with self._writing() as db:
            if now < self._latest - 1:  # the clock was put back, maybe by years
                db.execute("UPDATE tasks SET due_at = ? WHERE due_at > ?", (now, now))
            self._latest = now
            rows = db.execute(
                "SELECT task_id FROM tasks WHERE due_at <= ? ORDER BY due_at LIMIT ?",
                (now, limit),
            ).fetchall()
        return [row[0] for row in rows]

    def begin(self, task_id: str) -> Ticket | None:
        """Take a task that nobody holds."""
        now = time.time()
        with self._writing() as db:
            row = db.execute(
                "SELECT user, text, title, metadata, losses, attempts FROM tasks "
                "WHERE task_id = ? AND due_at IS NOT NULL",
                (task_id,),
            ).fetchone()
            if row is None:
                return None
            if row[4] >= MAX_LOSSES:
                self._settle(db, task_id, "failed", now, error=LOST)
                return None
            db.execute(
                "UPDATE tasks SET status = 'running', due_at = NULL, updated_at = ?, "
                "losses = losses + 1, attempts = attempts + 1 WHERE task_id = ?",
                (now, task_id),
            )
        document = Document(user=row[0], text=row[1], title=row[2], metadata=json.loads(row[3]))
        return Ticket(task_id, "", document, row[5] + 1)

    def renew(self, ticket: Ticket) -> bool:
        """Go on holding a ticket: it lives as long as the process."""
        del ticket
        return True

    def progress(self, ticket: Ticket, total: int, done: int) -> None:
        """Note how far the document is."""
        with self._writing() as db:
            db.execute(
                "UPDATE tasks SET chunks_total = ?, chunks_done = ?, updated_at = ? "
                "WHERE task_id = ?",
                (total, done, time.time(), ticket.task_id),
            )

    def finish(self, ticket: Ticket, chunks: int) -> None:
        """Settle: all chunks are stored."""
        with self._writing() as db:
            db.execute(
                "UPDATE tasks SET chunks_total = ?, chunks_done = ? WHERE task_id = ?",
                (chunks, chunks, ticket.task_id),
            )
            self._settle(db, ticket.task_id, "done", time.time())

    def fail(self, ticket: Ticket, code: str, message: str) -> None:
        """Settle: the document will not be stored."""
        with self._writing() as db:
            self._settle(db, ticket.task_id, "failed", time.time(), error=(code, message))

    def retry(self, ticket: Ticket, after_s: float) -> None:
        """Give the ticket back; the task is due again later."""
        self._give_back(ticket, after_s, attempts=0)

    def release(self, ticket: Ticket) -> None:
        """Give the ticket back untouched, because this process ends."""
        self._give_back(ticket, 0, attempts=1)

    def open_tasks(self) -> int:
        """Count the tasks that are not settled."""
        with self._writing() as db:
            count: int = db.execute(f"SELECT count(*) FROM tasks WHERE {_OPEN}").fetchone()[0]
        return count

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _settle(
        self,
        db: sqlite3.Connection,
        task_id: str,
        status: str,
        now: float,
        error: tuple[str, str] | None = None,
    ) -> None:
        done = db.execute(
            "UPDATE tasks SET status = ?, error = ?, updated_at = ?, due_at = NULL, "
            f"text = NULL, metadata = NULL WHERE task_id = ? AND {_OPEN}",
            (status, json.dumps(error) if error else None, now, task_id),
        )
        self._open -= done.rowcount

    def _give_back(self, ticket: Ticket, after_s: float, attempts: int) -> None:
        now = time.time()
        with self._writing() as db:
            db.execute(
                "UPDATE tasks SET status = 'queued', due_at = ?, updated_at = ?, "
                "losses = losses - 1, attempts = attempts - ? "
                f"WHERE task_id = ? AND {_OPEN} AND due_at IS NULL",
                (now + after_s, now, attempts, ticket.task_id),
            )

    @contextmanager
    def _writing(self, *, at_once: bool = False) -> Generator[Any]:
        """Use the connection alone, in one transaction.

        Args:
            at_once: Whether it is on the disk when the block has ended, also for a machine that
                loses its power. Of the rest only a repeat is at stake.
        """
        with self._lock:
            counted = self._open
            try:
                if at_once:
                    self._db.execute("PRAGMA synchronous=FULL")
                with self._db:
                    yield self._db
                if at_once:
                    self._db.execute("PRAGMA synchronous=NORMAL")
            except sqlite3.Error as error:
                self._open = counted  # nothing of it happened
                raise UnavailableError(
                    f"The file of the tasks cannot be used: {error}.", retry_after=5
                ) from error
