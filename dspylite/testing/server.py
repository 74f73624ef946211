"""The fake server: an OpenAI-compatible HTTP server whose answers and faults a test scripts.

Not here: what a `Reply` can be (`replies.py`), OpenAI's formats (`openai_format.py`), how an answer
travels (`delivery.py`), HTTP's syntax (`wire.py`), and the log with its counts (`journal.py`).
"""

from __future__ import annotations

import asyncio  # noqa: TID251 -- a test server on raw streams, with a loop and a thread of its own
import contextlib
import itertools
import os
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Self, cast

from dspylite.testing.delivery import deliver
from dspylite.testing.journal import Journal, RecordedRequest
from dspylite.testing.openai_format import (
    Endpoint,
    InvalidRequestError,
    Question,
    Rendered,
    embedding_bytes,
    read_question,
    render,
    render_error,
)
from dspylite.testing.replies import Reply
from dspylite.testing.wire import (
    MAX_HEAD_BYTES,
    UnreadableRequestError,
    WatchedReader,
    head_bytes,
    read_request,
)

__all__ = ["Answer", "FakeServer", "RecordedRequest", "Reply"]

Answer = str | Reply | Callable[[Mapping[str, object]], str | Reply | None]
"""What a server says when nothing is scripted: a text, a reply, or a function of the request's
parsed body, whose None means the usual echo."""

_BACKLOG = 1024  # connections the kernel keeps while the loop is busy; guessed
_LINGER_S = 0.5  # how long a refused client may go on sending before it is cut off; guessed
_JOIN_S = 5.0  # far above what closing takes, so that a blocked `answer` is named, not waited for
_ENDPOINTS: dict[str, tuple[str, Endpoint]] = {
    "/chat/completions": ("POST", "chat"),  # before the next, which is its ending too
    "/completions": ("POST", "completions"),
    "/embeddings": ("POST", "embeddings"),
    "/models": ("GET", "models"),
}


class FakeServer:
    """A real OpenAI-compatible HTTP server on a free port of this machine, scripted and counting.

    It answers `POST .../chat/completions`, `.../completions`, `.../embeddings` and
    `GET .../models` under any prefix, streams included, from a thread of its own: use it from sync
    code and from any event loop alike. Its log is the judge of a test, because what it saw does
    not depend on what the client believes.

    A request takes the first reply of the first `script_for` rule that fits, else the next one of
    `script`, else `answer`. What the server itself refuses (400, 401, 404, 405) takes none. What
    cannot be read as HTTP is refused and not logged. A client that closes its connection ends the
    answer that it waits for.

    Usage is counted in words: a token is what `str.split()` finds in the messages, prompts or
    inputs, and in the answered texts and arguments of tool calls. Vectors depend on the text alone
    and have unit length. Equal requests get equal answers, except for their ids.

    All methods may be called from any thread. A process forked from this one has no part in the
    server: its copies of the sockets are closed and its copy of the log stands still.

    Args:
        answer: What is said when nothing is scripted. None echoes the prompt. A function is called
            for every `POST`, embeddings included, on the server's thread, so it must be quick:
            delays belong into a `Reply`. If it raises, the client gets a 500 that says so.
        latency_s: Seconds before each answer, in addition to a reply's own `delay_s`.
        dimensions: Width of vectors where a request does not say.
        api_keys: Keys let in, the others get 401. Empty lets everyone in.
        max_recorded: Latest requests kept in the log, so that long runs leave memory flat. None
            keeps all.
        max_body_bytes: A longer request is refused with 413.

    Raises:
        ValueError: A number is negative or 0, or `api_keys` is a single string.

    Example:
        >>> import http.client, json
        >>> with FakeServer(answer="Paris") as server:
        ...     server.script(Reply(status=503))
        ...     client = http.client.HTTPConnection("127.0.0.1", server.port)
        ...     body = json.dumps({"messages": [{"role": "user", "content": "Capital?"}]})
        ...     for _ in range(2):
        ...         client.request("POST", "/v1/chat/completions", body)
        ...         answer = json.loads(client.getresponse().read())
        ...     client.close()
        >>> answer["choices"][0]["message"]["content"]
        'Paris'
        >>> [request.status for request in server.requests]
        [503, 200]

    Source:
        Formats: https://platform.openai.com/docs/api-reference
    """

    def __init__(
        self,
        *,
        answer: Answer | None = None,
        latency_s: float = 0.0,
        dimensions: int = 8,
        api_keys: Collection[str] = (),
        max_recorded: int | None = None,
        max_body_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        if latency_s < 0 or dimensions < 1 or max_body_bytes < 1:
            raise ValueError(
                f"`latency_s={latency_s}` must be 0 or more, `dimensions={dimensions}` and "
                f"`max_body_bytes={max_body_bytes}` 1 or more"
            )
        if isinstance(api_keys, str):
            raise ValueError("`api_keys` is one string: write `api_keys=[key]`")
        self._answer = answer
        self._latency_s = latency_s
        self._dimensions = dimensions
        self._api_keys = frozenset(api_keys)
        self._max_body_bytes = max_body_bytes
        self._journal = Journal(max_recorded=max_recorded)
        self._script_lock = threading.Lock()  # guards the two below; nothing is called inside
        self._script: deque[Reply] = deque()
        self._rules: list[tuple[Callable[[RecordedRequest], bool], deque[Reply]]] = []
        self._lifecycle = threading.Lock()  # makes starting and closing one at a time
        self._port = 0
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._stop = asyncio.Event()
        # From here on the server's own thread writes.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False
        self._connection_numbers = itertools.count()
        self._conversations: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._watch_forks()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen and answer from now on; nothing happens where it does already.

        A server that was closed listens on its old port again, with its log and script as they
        were: to a client that was an outage with refused connections.

        Raises:
            OSError: No port is free, or the old one has been taken by somebody else.
        """
        with self._lifecycle:
            if self._thread is not None:
                return self
            listener = socket.create_server(("127.0.0.1", self._port), backlog=_BACKLOG)
            self._port = cast("int", listener.getsockname()[1])
            self._listener = listener
            self._stop = asyncio.Event()
            is_up = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(listener, is_up), name="dspylite-fake-server", daemon=True
            )
            self._thread.start()
            is_up.wait()
        return self

    def close(self) -> None:
        """Cut every connection and end the thread; nothing happens where that is done already.

        Raises:
            RuntimeError: The thread is stuck in an `answer` function.
        """
        with self._lifecycle:
            if self._thread is None:
                return
            self._post(self._stop.set)
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise RuntimeError(
                    f"the server's thread did not end within {_JOIN_S} s: its `answer` or a rule "
                    "of `script_for` blocks; let it return a `Reply` with `delay_s` or `hang`"
                )
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1.

        Raises:
            RuntimeError: The server was never started.
        """
        if not self._port:
            raise RuntimeError("the server has no port yet: use `with FakeServer() as server:`")
        return self._port

    @property
    def base_url(self) -> str:
        """What a client takes as `api_base`: `http://127.0.0.1:PORT/v1`.

        Raises:
            RuntimeError: The server was never started.
        """
        return f"http://127.0.0.1:{self.port}/v1"

    # -- script ----------------------------------------------------------------------------------

    def script(self, *replies: Reply) -> None:
        """Queue replies for the next requests, one each, in order of arrival.

        Raises:
            TypeError: One is no `Reply`.
        """
        _check_replies(replies)
        with self._script_lock:
            self._script.extend(replies)

    def script_for(self, applies: Callable[[RecordedRequest], bool], *replies: Reply) -> None:
        """Queue replies for the next requests that fit, such as those of one key or prompt.

        Args:
            applies: Asked on the server's thread, so it must be quick.
            *replies: One for each request that fits, before anything queued by `script`.

        Raises:
            TypeError: One is no `Reply`.
        """
        _check_replies(replies)
        if replies:
            with self._script_lock:
                self._rules.append((applies, deque(replies)))

    @property
    def pending_replies(self) -> int:
        """Replies scripted and not yet taken."""
        with self._script_lock:
            return len(self._script) + sum(len(replies) for _, replies in self._rules)

    def vector(self, text: str, *, dimensions: int | None = None) -> tuple[float, ...]:
        """Return the vector that this server has for a text, each number exactly a float32.

        Args:
            text: Any string.
            dimensions: Width. None takes the server's own.
        """
        width = self._dimensions if dimensions is None else dimensions
        return struct.unpack(f"<{width}f", embedding_bytes(text, width))

    # -- gate and log ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def hold(self) -> Generator[None]:
        """Leave every request that arrives in this block unanswered until the block ends.

        With `wait_for_requests` this proves what is in flight at once, without any sleep.

        Example:
            >>> import http.client
            >>> with FakeServer() as server:
            ...     clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in "ab"]
            ...     with server.hold():
            ...         for client in clients:
            ...             client.request("GET", "/v1/models")
            ...         server.wait_for_requests(2)
            ...         held = server.in_flight
            ...     codes = [client.getresponse().status for client in clients]
            ...     for client in clients:
            ...         client.close()
            >>> held, codes
            (2, [200, 200])
        """
        hold = self._journal.begin_hold()
        try:
            yield
        finally:
            self._journal.end_hold(hold)
            self._post(hold.wake)

    def wait_for_requests(self, count: int, *, timeout_s: float = 5.0) -> None:
        """Block until so many requests have arrived, in all since the start or `clear`.

        In async code run it in a worker thread, so that the loop can go on sending.

        Raises:
            TimeoutError: Fewer had arrived after `timeout_s` seconds; the message has the counts.
        """
        self._journal.wait_for_requests(count, timeout_s=timeout_s)

    def wait_until_idle(self, *, timeout_s: float = 5.0) -> None:
        """Block until no request is in flight, such as after a client was cancelled.

        Raises:
            TimeoutError: One still was after `timeout_s` seconds; the message has the counts.
        """
        self._journal.wait_until_idle(timeout_s=timeout_s)

    @property
    def requests(self) -> tuple[RecordedRequest, ...]:
        """All requests since the start or `clear`, in order of arrival, as they stand now."""
        return self._journal.records()

    @property
    def in_flight(self) -> int:
        """Requests received and not yet answered."""
        return self._journal.in_flight()

    @property
    def max_in_flight(self) -> int:
        """The most requests in flight at once since the start or `clear`."""
        return self._journal.max_in_flight()

    def clear(self) -> None:
        """Forget the log and its counts, such as after a warm-up; the script stays."""
        self._journal.clear()

    # -- the server's thread ---------------------------------------------------------------------

    def _run(self, listener: socket.socket, is_up: threading.Event) -> None:
        # A plain loop whatever policy the program has set, and quiet under `-X dev`.
        try:
            with asyncio.Runner(debug=False, loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._serve(listener, is_up))
        finally:
            is_up.set()  # also where it never came up, so that `start` cannot wait for ever

    async def _serve(self, listener: socket.socket, is_up: threading.Event) -> None:
        loop = asyncio.get_running_loop()

        def connect() -> asyncio.StreamReaderProtocol:
            reader = WatchedReader(limit=MAX_HEAD_BYTES, loop=loop)

            def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = loop.create_task(self._converse(reader, writer))
                self._conversations[task] = writer
                task.add_done_callback(self._hang_up)

            return asyncio.StreamReaderProtocol(reader, greet, loop=loop)

        self._loop, self._is_closing = loop, False
        server = await loop.create_server(connect, sock=listener, backlog=_BACKLOG)
        is_up.set()
        await self._stop.wait()
        self._is_closing = True
        # Accept no more, but let a connection just accepted become a conversation, which takes
        # three rounds of the loop: `server.close` would drop it half-made, with its socket open.
        loop.remove_reader(listener)
        for _ in range(3):
            await asyncio.sleep(0)
        server.close()
        for task in self._conversations:
            task.cancel()
        if self._conversations:
            await asyncio.wait(tuple(self._conversations))

    def _post(self, callback: Callable[[], object]) -> None:
        """Run a callback on the server's loop, if there is one."""
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(callback)
            except RuntimeError:
                pass  # the loop is closed, and nothing waits on it any more

    def _hang_up(self, task: asyncio.Task[None]) -> None:
        # All that was to be sent is with the kernel by now, so that aborting loses nothing. The
        # writer needs a name: since 3.13 it complains when it is dropped before it is closed.
        writer = self._conversations.pop(task)
        writer.transport.abort()

    async def _converse(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests until either side has had enough."""
        connection = next(self._connection_numbers)
        # `drain` then waits until the kernel has all, so that a reset loses nothing sent before.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            try:
                while await self._exchange(reader, writer, connection):
                    pass
            except UnreadableRequestError as error:
                await self._refuse(error, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the client left or the server closes; the log says what was under way
        finally:
            reader.on_gone = None

    async def _exchange(
        self, reader: WatchedReader, writer: asyncio.StreamWriter, connection: int
    ) -> bool:
        """Read, log and answer one request; return whether there can be another one."""
        request = await read_request(reader, writer, max_body_bytes=self._max_body_bytes)
        if request is None:
            return False
        entry, holds = self._journal.receive(request, connection=connection)
        task = cast("asyncio.Task[None]", asyncio.current_task())
        reader.on_gone = task.cancel
        if reader.at_eof():  # it left behind its request, before anybody listened for that
            task.cancel()
        status: int | None = None
        try:
            reply, answer = self._decide(entry.record)
            for hold in holds:
                await hold.wait()
            wait_s = self._latency_s + reply.delay_s
            if wait_s:
                await asyncio.sleep(wait_s)
            if reply.hang:
                await asyncio.Event().wait()
            status = None if reply.drop == "before" else reply.status
            usage = None if reply.drop else answer.usage
            is_open = await deliver(
                answer,
                reply,
                to=writer,
                request=request,
                request_id=entry.record.request_id,
                before_end=lambda: self._journal.settle(entry, status=status, usage=usage),
            )
        except (OSError, asyncio.CancelledError):
            self._journal.settle(entry, status=status, client_left=not self._is_closing)
            raise
        reader.on_gone = None
        return is_open

    async def _refuse(
        self,
        error: UnreadableRequestError,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Say why a request cannot be read, to a client that may still be sending it."""
        body = b"".join(render_error(error.status, error.reason).pieces)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": self._journal.next_request_id(),
        }
        writer.write(head_bytes(error.status, headers) + body)
        writer.write_eof()
        # Closing on unread bytes would reset the connection, and the answer might go unread.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while await reader.read(MAX_HEAD_BYTES):
                    pass

    # -- deciding --------------------------------------------------------------------------------

    def _decide(self, record: RecordedRequest) -> tuple[Reply, Rendered]:
        """Choose and render the answer to a request."""
        try:
            question = self._question(record)
        except InvalidRequestError as error:
            return _refusal(error.status, error.reason)
        try:
            reply = self._choose(record)
            return reply, render(question, reply, answer_id=record.index + 1)
        except Exception as error:  # noqa: BLE001 -- of the test's own functions; told to the client
            return _refusal(500, f"the server's script raised {type(error).__name__}: {error}")

    def _question(self, record: RecordedRequest) -> Question:
        suffix = next((suffix for suffix in _ENDPOINTS if record.path.endswith(suffix)), None)
        if suffix is None:
            raise InvalidRequestError(404, f"there is nothing at {record.path}")
        method, endpoint = _ENDPOINTS[suffix]
        if record.method != method:
            raise InvalidRequestError(405, f"{record.path} takes {method}, not {record.method}")
        if self._api_keys and record.api_key not in self._api_keys:
            raise InvalidRequestError(401, "the API key is missing or not one of this server's")
        if endpoint == "models":
            return Question(endpoint=endpoint)
        if not isinstance(record.body, dict):
            raise InvalidRequestError(400, "the body is no JSON object")
        return read_question(endpoint, record.json, dimensions=self._dimensions)

    def _choose(self, record: RecordedRequest) -> Reply:
        scripted = self._take_scripted(record)
        if scripted is not None and not scripted.says_nothing:
            return scripted
        said = self._answer
        if said is not None and not isinstance(said, str | Reply):
            said = said(record.json)
        usual = said if isinstance(said, Reply) else Reply(text=said)
        if scripted is None:
            return usual
        return replace(
            scripted,
            text=usual.text,
            texts=usual.texts,
            chunks=usual.chunks,
            tool_calls=usual.tool_calls,
            vectors=usual.vectors,
        )

    def _take_scripted(self, record: RecordedRequest) -> Reply | None:
        with self._script_lock:
            rules = tuple(self._rules)
        # Asked outside the lock, because a rule may look at the server. Only this thread takes
        # replies, so what is found here is still there below.
        for rule in rules:
            applies, replies = rule
            if applies(record):
                with self._script_lock:
                    reply = replies.popleft()
                    if not replies:
                        self._rules.remove(rule)
                return reply
        with self._script_lock:
            return self._script.popleft() if self._script else None

    # -- forks -----------------------------------------------------------------------------------

    def _watch_forks(self) -> None:
        if not hasattr(os, "register_at_fork"):  # pragma: no cover -- Windows
            return
        # Nothing can be unregistered, so the hook must not keep the server alive.
        abandon = weakref.WeakMethod(self._abandon)

        def in_child() -> None:  # pragma: no cover -- coverage does not see such a child
            method = abandon()
            if method is not None:
                method()

        os.register_at_fork(after_in_child=in_child)

    def _abandon(self) -> None:  # pragma: no cover -- coverage does not see such a child
        """Give up, in a forked child, its copies of the sockets.

        Otherwise a client would wait for the end of a connection that this process has closed
        long ago, because the child still holds it open. The numbers are pointed elsewhere rather
        than closed: the copied objects would close them once more, when they are somebody else's.
        """
        # Any lock may have been held at the moment of the fork, by a thread that is no more.
        self._journal.renew_lock()
        self._script_lock = threading.Lock()
        self._lifecycle = threading.Lock()
        if self._thread is None or self._listener is None:
            return
        sockets = [self._listener]
        sockets += [writer.get_extra_info("socket") for writer in self._conversations.values()]
        elsewhere = os.open(os.devnull, os.O_RDWR)
        for sock in sockets:
            if sock.fileno() >= 0:
                os.dup2(elsewhere, sock.fileno(), inheritable=False)
        os.close(elsewhere)
        self._thread = self._loop = None


def _refusal(status: int, reason: str) -> tuple[Reply, Rendered]:
    return Reply(status=status, text=reason), render_error(status, reason)


def _check_replies(replies: Sequence[object]) -> None:
    for reply in replies:
        if not isinstance(reply, Reply):
            raise TypeError(f"{reply!r:.80} is no Reply; write `Reply(text=...)`.")
