"""Tasks in Redis, shared by any number of web processes and workers.

Every change is one Lua script, so no crash can leave half of one. A task lies in a hash, and its
id in a sorted set `open` until it is settled, by the time at which somebody must look at it again:
when its holder's lease ends, when it is to be tried again, or when its message should long have
been taken. Whoever looks (`due`) sends a new message, which makes the service independent of what
the broker may lose.

Not here: what a task is (`tasks.py`), and the messages (`celery_app.py`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import redis

from examples.embedding_service.documents import Document
from examples.embedding_service.errors import QueueFullError, UnavailableError
from examples.embedding_service.tasks import LOST, MAX_LOSSES, Status, Task, Ticket, new_task

PREFIX = "embedding-service:"
QUEUE = "embedding-service"
"""The list of Celery's messages, which is named as its queue."""

_OPEN_KEY = PREFIX + "open"
_PATIENCE = 60  # leases after which a message counts as lost though others still wait; guessed
_FIRST_BUSY_S = 1  # how soon a task is looked at whose document another task has in hand; guessed

_SHOWN = (
    *("user", "task_id", "document_id", "title", "status", "chunks_total", "chunks_done"),
    *("error", "created_at", "updated_at"),
)

# Lua's clock is Redis' own, so the clocks of the machines may differ. What begins with `local now`
# stands before every script.
_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
"""
_CREATE = """
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[1]) then return 0 end
local fields = {}
for i = 4, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[2])
return 1
"""
# `phase` says why an open task is in the set: `sent` (a message is under way), `held`, `waiting`.
_DUE = """
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
local backlog = redis.call('LLEN', KEYS[2]) > 0
local due = {}
for _, id in ipairs(ids) do
  local task = ARGV[3] .. 'task:' .. id
  local phase = redis.call('HGET', task, 'phase')
  if not phase then
    redis.call('ZREM', KEYS[1], id)
  else
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), id)
    -- While messages lie in the queue, that of this task is probably among them; but a queue may
    -- never be empty.
    local looks = redis.call('HINCRBY', task, 'looks', 1)
    if phase ~= 'sent' or not backlog or looks % tonumber(ARGV[4]) == 0 then
      redis.call('HSET', task, 'phase', 'sent', 'status', 'queued')
      due[#due + 1] = id
    end
  end
end
return due
"""
_SETTLE = """
local function settle(task, open, id, keep, ...)
  redis.call('HSET', task, 'updated_at', string.format('%.6f', now), 'phase', 'over', ...)
  redis.call('HDEL', task, 'text', 'metadata')
  redis.call('ZREM', open, id)
  redis.call('EXPIRE', task, keep)
end
"""
_BEGIN = (
    _SETTLE
    + """
local id, token, lease, prefix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local t = redis.call('HMGET', KEYS[1], 'status', 'user', 'document_id', 'text', 'title',
                     'metadata', 'losses', 'attempts')
if t[1] ~= 'queued' and t[1] ~= 'running' then
  redis.call('ZREM', KEYS[2], id)
  return false
end
local lock = prefix .. 'lock:' .. t[2] .. ':' .. t[3]
local holder = redis.call('GET', lock)
if holder then
  if string.sub(holder, 1, #id + 1) ~= id .. ':' then  -- the same document in another task
    redis.call('HSET', KEYS[1], 'phase', 'waiting', 'status', 'queued')
    redis.call('ZADD', KEYS[2], now + tonumber(ARGV[7]), id)
  end
  return false
end
if tonumber(t[7]) >= tonumber(ARGV[5]) then
  settle(KEYS[1], KEYS[2], id, ARGV[6], 'status', 'failed', 'error', ARGV[8])
  return false
end
redis.call('SET', lock, id .. ':' .. token, 'PX', math.ceil(lease * 1000))
redis.call('HSET', KEYS[1], 'status', 'running', 'phase', 'held',
           'updated_at', string.format('%.6f', now),
           'losses', tonumber(t[7]) + 1, 'attempts', tonumber(t[8]) + 1)
redis.call('ZADD', KEYS[2], now + lease, id)
return {t[2], t[4], t[5], t[6], tostring(tonumber(t[8]) + 1)}
"""
)
# What a holder says. KEYS: task, open, lock; ARGV: id, token, verb, numbers and texts.
_SAY = (
    _SETTLE
    + """
local id, verb = ARGV[1], ARGV[3]
if redis.call('GET', KEYS[3]) ~= id .. ':' .. ARGV[2] then return 0 end
if verb == 'renew' then
  redis.call('PEXPIRE', KEYS[3], math.ceil(tonumber(ARGV[4]) * 1000))
  redis.call('ZADD', KEYS[2], 'XX', now + tonumber(ARGV[4]), id)
  return 1
elseif verb == 'progress' then
  redis.call('HSET', KEYS[1], 'chunks_total', ARGV[4], 'chunks_done', ARGV[5],
             'updated_at', string.format('%.6f', now))
  return 1
elseif verb == 'finish' then
  settle(KEYS[1], KEYS[2], id, ARGV[4], 'status', 'done',
         'chunks_total', ARGV[5], 'chunks_done', ARGV[5])
elseif verb == 'fail' then
  settle(KEYS[1], KEYS[2], id, ARGV[4], 'status', 'failed', 'error', ARGV[5])
elseif verb == 'retry' then
  redis.call('HSET', KEYS[1], 'status', 'queued', 'phase', 'waiting',
             'updated_at', string.format('%.6f', now))
  redis.call('HINCRBY', KEYS[1], 'losses', -1)
  redis.call('HINCRBY', KEYS[1], 'attempts', ARGV[5])
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[4]), id)
end
redis.call('DEL', KEYS[3])
return 1
"""
)


class RedisTasks:
    """The tasks of all processes that use one Redis.

    Open tasks never expire. Neither key of the service nor of the model's provider comes here.

    Args:
        url: Of the database.
        capacity: Most open tasks.
        keep_s: How long settled tasks are kept.
        lease_s: How long a holder may be silent before its task is given to another one.
    """

    def __init__(self, url: str, *, capacity: int, keep_s: int, lease_s: float) -> None:
        self.lease_s: float = lease_s
        self._capacity = capacity
        self._keep_s = keep_s
        self.client = connect(url)
        script = self.client.register_script
        self._create, self._due = script(_NOW + _CREATE), script(_NOW + _DUE)
        self._begin, self._say_script = script(_NOW + _BEGIN), script(_NOW + _SAY)

    def create(self, document: Document) -> Task:
        """Keep a new task for good before it returns."""
        task = new_task(document, time.time())
        fields: dict[str, str | int] = {
            "task_id": task.task_id,
            "user": document.user,
            "document_id": task.document_id,
            "title": task.title,
            "status": task.status,
            "phase": "sent",
            "chunks_total": 0,
            "chunks_done": 0,
            "created_at": f"{task.created_at:.6f}",
            "updated_at": f"{task.updated_at:.6f}",
            "text": document.text,
            "metadata": json.dumps(document.metadata),
            "losses": 0,
            "attempts": 0,
        }
        flat: list[str | int] = [part for field in fields.items() for part in field]
        with reaching_redis():
            is_taken = self._create(
                keys=[_task_key(task.task_id), _OPEN_KEY],
                args=[self._capacity, task.task_id, self.lease_s, *flat],
            )
        if not is_taken:
            raise QueueFullError(
                f"{self._capacity} documents wait already; try again later.", retry_after=5
            )
        return task

    def get(self, user: str, task_id: str) -> Task | None:
        """Return a task, None where the user has no such task."""
        with reaching_redis():
            # Not all: an open task has its text, too.
            values = cast("list[str | None]", self.client.hmget(_task_key(task_id), list(_SHOWN)))
        row = {name: value or "" for name, value in zip(_SHOWN, values, strict=True)}
        if row["user"] != user:
            return None
        error = json.loads(row["error"]) if row["error"] else None
        return Task(
            task_id=row["task_id"],
            document_id=row["document_id"],
            title=row["title"],
            status=cast("Status", row["status"]),
            chunks_total=int(row["chunks_total"]),
            chunks_done=int(row["chunks_done"]),
            error=None if error is None else (error[0], error[1]),
            created_at=float(row["created_at"]),
            updated_at=float(row["updated_at"]),
        )

    def due(self, limit: int) -> list[str]:
        """Name open tasks for which a message must be sent, and put off the next look at them."""
        with reaching_redis():
            found = self._due(
                keys=[_OPEN_KEY, QUEUE], args=[limit, self.lease_s, PREFIX, _PATIENCE]
            )
        return cast("list[str]", found)

    def begin(self, task_id: str) -> Ticket | None:
        """Take a task and the lock of its document."""
        token = uuid.uuid4().hex
        with reaching_redis():
            row = cast(
                "list[str] | None",
                self._begin(
                    keys=[_task_key(task_id), _OPEN_KEY],
                    args=[
                        *(task_id, token, self.lease_s, PREFIX, MAX_LOSSES),
                        *(self._keep_s, _FIRST_BUSY_S, json.dumps(LOST)),
                    ],
                ),
            )
        if row is None:
            return None
        user, text, title, metadata, attempt = row
        document = Document(user=user, text=text, title=title, metadata=json.loads(metadata))
        return Ticket(task_id, token, document, int(attempt))

    def renew(self, ticket: Ticket) -> bool:
        """Go on holding a ticket; False where its lease has ended."""
        return self._say(ticket, "renew", self.lease_s)

    def progress(self, ticket: Ticket, total: int, done: int) -> None:
        """Note how far the document is."""
        self._say(ticket, "progress", total, done)

    def finish(self, ticket: Ticket, chunks: int) -> None:
        """Settle: all chunks are stored."""
        self._say(ticket, "finish", self._keep_s, chunks)

    def fail(self, ticket: Ticket, code: str, message: str) -> None:
        """Settle: the document will not be stored."""
        self._say(ticket, "fail", self._keep_s, json.dumps([code, message]))

    def retry(self, ticket: Ticket, after_s: float) -> None:
        """Give the ticket back; the task is due again later."""
        self._say(ticket, "retry", after_s, 0)

    def release(self, ticket: Ticket) -> None:
        """Give the ticket back untouched, because this process ends."""
        self._say(ticket, "retry", 0, -1)

    def open_tasks(self) -> int:
        """Count the tasks that are not settled."""
        with reaching_redis():
            return self.client.zcard(_OPEN_KEY)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _say(self, ticket: Ticket, verb: str, *values: str | float) -> bool:
        document = ticket.document
        lock = f"{PREFIX}lock:{document.user}:{document.document_id}"
        with reaching_redis():
            is_holder = self._say_script(
                keys=[_task_key(ticket.task_id), _OPEN_KEY, lock],
                args=[ticket.task_id, ticket.token, verb, *values],
            )
        return bool(is_holder)


def connect(url: str) -> redis.Redis:
    """Return a client that any thread may use and that waits for nothing long."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=5,
        socket_connect_timeout=2,
        health_check_interval=30,
    )


@contextmanager
def reaching_redis() -> Generator[None]:
    """Say `UnavailableError` where Redis does not answer, without naming where it is.

    Raises:
        UnavailableError: It does not answer, is full, or still loads its data.
    """
    try:
        yield
    except redis.RedisError as error:
        raise UnavailableError(
            f"The queue cannot be reached ({type(error).__name__}).", retry_after=5
        ) from error


def _task_key(task_id: str) -> str:
    return f"{PREFIX}task:{task_id}"
