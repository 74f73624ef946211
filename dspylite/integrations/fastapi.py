"""FastAPI: settings for each request, errors as answers, an end for work that nobody waits for.

Needs `pip install dspylite[fastapi]`. Not here: what carries settings into threads (context
variables, `runtime/threads.py`), the flag by which work is told to stop
(`runtime/cancellation.py`), and what an error says over HTTP (`errors.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from typing import Any, Final, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.abc import TaskGroup

from dspylite.errors import (
    AdapterParseError,
    CallCancelledError,
    DSPyError,
    MissingExtraError,
    SettingsError,
)
from dspylite.models.base import BaseLM
from dspylite.models.direct.engine import close_connections
from dspylite.runtime.cancellation import CANCELLATION, Cancellation
from dspylite.runtime.settings import context, overlay, pin
from dspylite.runtime.workers import call_in_thread

try:
    from fastapi import Depends, FastAPI
    from starlette.requests import HTTPConnection
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketState
except ImportError as missing:
    raise MissingExtraError(
        "`dspylite.integrations.fastapi` needs FastAPI, which is not installed: "
        "`pip install dspylite[fastapi]`."
    ) from missing

__all__ = ["RequestBoundary", "install", "lifespan", "settings_per_request"]

logger = logging.getLogger(__name__)
_BOUNDARY = "dspylite.boundary"  # the key in an ASGI scope that is inside one
_WEBSOCKET_FAILED, _WEBSOCKET_TRY_LATER = 1011, 1013
"""Codes that close a websocket. Source: https://www.iana.org/assignments/websocket"""
_CLIENT_LEFT: Final = 499
"""What nginx logs for such a request. Source: https://nginx.org/en/docs/dev/development_guide.html"""


def install(app: FastAPI, *, errors: bool = True, cancel_on_disconnect: bool = True) -> None:
    """Make an app answer dspylite's errors, end abandoned work and keep settings per request.

    Call it before the app takes its first request. Middleware added later stands around it.

    - Every `DSPyError` that leaves a handler or a dependency is answered as `error.to_http()` says:
      status, `Retry-After`, JSON body. From status 500 on the error itself is logged: in
      one line, for 500 itself with the traceback. A websocket is closed with code 1011, or 1013
      where trying later may help. After the first piece of a response was sent nothing can be
      answered any more: the connection is cut, and the server logs the error.
    - The work of a request whose client went away is ended (see `RequestBoundary`).
    - `settings_per_request` works.

    Args:
        app: The app. One that is mounted in it answers its own errors, so call this for it too.
        errors: Whether errors are answered.
        cancel_on_disconnect: Whether abandoned work is ended.

    Raises:
        RuntimeError: The app has taken requests already.

    Example:
        >>> app = FastAPI()
        >>> install(app)
    """
    app.add_middleware(RequestBoundary, cancel_on_disconnect=cancel_on_disconnect)
    if errors:
        # Starlette's type wants handlers that take any exception; it calls them with their own.
        app.add_exception_handler(DSPyError, cast("Any", _answer))


async def _answer(connection: HTTPConnection, error: DSPyError) -> JSONResponse | None:
    answer = error.to_http()
    if answer.status >= 500:
        logger.log(
            logging.ERROR if answer.status == 500 else logging.WARNING,
            "%s is answered with %d: %s: %s",
            connection.url.path,
            answer.status,
            type(error).__name__,
            _loggable(error),
            exc_info=error if answer.status == 500 else None,
        )
    if not isinstance(connection, WebSocket):
        return JSONResponse(answer.body, status_code=answer.status, headers=answer.headers)
    if connection.application_state is not WebSocketState.DISCONNECTED:
        may_pass = "retry-after" in answer.headers
        code = _WEBSOCKET_TRY_LATER if may_pass else _WEBSOCKET_FAILED
        await connection.close(code, reason=str(answer.body["error"]["code"]))
    return None


def _loggable(error: DSPyError) -> object:
    """Return what may be logged of an error: what the model wrote may quote what it was asked."""
    if not isinstance(error, AdapterParseError):
        return error
    logger.debug("%s", error)
    return f"`{error.adapter_name}` could not read the answer for `{error.signature}`."


# --- Settings for each request -------------------------------------------------------------------

Changes = Mapping[str, object]
"""Settings by name, as `context(**changes)` takes them."""


def settings_per_request(
    make: Callable[..., Changes | Awaitable[Changes] | Iterable[Changes] | AsyncIterable[Changes]],
) -> Callable[..., Awaitable[Changes]]:
    """Make a dependency that gives a request settings of its own.

    They hold in dependencies that come later, in sync and async handlers, in every piece of a
    streamed response, in its background tasks and in websockets; and end with the request. Use it
    in `dependencies=[Depends(...)]` of an app, a router or a route. Of several, the later override
    the earlier, key by key. The app must be given to `install`.

    Args:
        make: Any dependency of FastAPI's, sync or async, with or without `yield`: it may take
            headers, paths and other dependencies. It returns what `dspylite.context(**changes)`
            takes. Unless it blocks, make it `async def`: FastAPI runs a sync one on a thread, for
            which async handlers too then wait where all are busy.

    Returns:
        The dependency; its value is what `make` returned.

    Raises:
        SettingsError: In a request: a setting has an unknown name or an impossible value, `make`
            returned no mapping, or the app was not given to `install`.

    Example:
        >>> from dspylite.models.lm import LM
        >>> async def of_tenant(x_llm_key: str) -> dict[str, object]:
        ...     return {"lm": LM("openai/gpt-4o-mini", api_key=x_llm_key)}
        >>> app = FastAPI(dependencies=[Depends(settings_per_request(of_tenant))])
        >>> install(app)
    """

    # `async def` without `yield`: it runs in the task of the request, whose context the handler's
    # thread, the pieces of the body and the background tasks copy or share. FastAPI leaves the
    # block of a `yield` before the body in some versions and after it in others.
    async def use_settings(
        connection: HTTPConnection,
        changes: Any = Depends(make),  # noqa: B008  # how FastAPI takes dependencies
    ) -> Changes:
        if _BOUNDARY not in connection.scope:
            raise SettingsError(
                "Settings per request need a boundary at which they end: call "
                "`dspylite.integrations.fastapi.install(app)` where the app is made."
            )
        if not isinstance(changes, Mapping):
            name = getattr(make, "__name__", repr(make))
            raise SettingsError(
                f"`{name}` must return settings by name, such as {{'lm': lm}}, not {changes!r}."
            )
        context(**cast("Any", changes)).__enter__()  # the boundary undoes it
        return cast("Changes", changes)

    return use_settings


# --- The boundary of a request -------------------------------------------------------------------


class RequestBoundary:
    """ASGI middleware at which what belongs to one request begins and ends.

    `install` adds it; other ASGI frameworks may take it alone. Inside another one it does nothing.

    Settings that the request's own task changes without a block end here, so that a server that
    runs several requests in one task starts each of them clean. The server itself never sees them:
    it may start the next request of a connection, or go on to read it, from where it takes the
    last piece of this one's response.

    When the client goes away before its response is complete, the task of the request is
    cancelled, which ends async handlers and closes async bodies. The thread of a sync handler, or
    of a piece of a sync body, cannot be cancelled: it meets a `CallCancelledError` at its next
    model call, wait between attempts or `dspylite.check_cancelled()`. A sync body that is not asked
    for another piece is closed when it is collected. Once the last piece of the response was handed
    to the server nothing is cancelled: background tasks run on. Those of a response that was not
    completed do not run. Middleware around the boundary sees a status of 499 where no response had
    begun.

    To hear of it, the boundary reads what the client sends, at most one message ahead of the app;
    so while an upload is read slowly, or not at all, it is not noticed. A client that waits for
    `100 Continue` gets it when the app asks for the body. Websockets are told by their own
    `receive`, and are not cancelled.

    Args:
        app: The app inside.
        cancel_on_disconnect: Whether the work of a client that went away is ended.
    """

    def __init__(self, app: ASGIApp, *, cancel_on_disconnect: bool = True) -> None:
        self.app = app
        self.cancel_on_disconnect = cancel_on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app inside for one connection."""
        if scope["type"] not in {"http", "websocket"} or _BOUNDARY in scope:
            await self.app(scope, receive, send)
            return
        scope[_BOUNDARY] = True
        server = _Server(receive, send)
        with context():  # leaving it undoes whatever was set in it
            if self.cancel_on_disconnect and scope["type"] == "http":
                await _Exchange(server.receive, server.send).run(self.app, scope)
            else:
                await self.app(scope, server.receive, server.send)


class _Server:
    """The server's `receive` and `send`, called as from outside of the boundary.

    What a server schedules while it is called inherits the context of its caller: a pipelined
    request begins where uvicorn sends the end of the response before it, and the reader of a
    connection that was paused is added anew where uvicorn resumes it.
    """

    __slots__ = ("_flag", "_overlay", "_receive", "_send")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._overlay = overlay()
        self._flag = CANCELLATION.get()

    async def receive(self) -> Message:
        values, flag = self._leave()
        try:
            return await self._receive()
        finally:
            pin(values)
            CANCELLATION.set(flag)

    async def send(self, message: Message) -> None:
        values, flag = self._leave()
        try:
            await self._send(message)
        finally:
            pin(values)
            CANCELLATION.set(flag)

    def _leave(self) -> tuple[Mapping[str, Any] | None, Cancellation | None]:
        inside = overlay(), CANCELLATION.get()
        pin(self._overlay)
        CANCELLATION.set(self._flag)
        return inside


class _Exchange:
    """One request and its response, and the task that waits for the client to go away."""

    __slots__ = (
        "_came",
        "_failure",
        "_flag",
        "_is_complete",
        "_is_gone",
        "_is_listening",
        "_is_started",
        "_messages",
        "_receive",
        "_send",
        "_taken",
        "_tasks",
    )

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._flag = Cancellation(CANCELLATION.get())
        self._tasks: TaskGroup
        self._messages: deque[Message] = deque()  # what was read and the app has not asked for
        self._came: anyio.Event | None = None  # set when the app waits for a message
        self._taken: anyio.Event | None = None  # set when the listener waits for the app
        self._failure: Exception | None = None
        self._is_listening = False
        self._is_started = False
        self._is_complete = False
        self._is_gone = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the app; return quietly where it was ended because its client went away."""
        failure: Exception | None = None
        with self._flag:
            async with anyio.create_task_group() as self._tasks:
                # Asking for the body would invite a client to send one that the app may refuse.
                if not _is_asked_first(scope["headers"]):
                    self._listen_once()
                try:
                    await app(scope, self.receive, self.send)
                except Exception as error:  # noqa: BLE001  # raised below, outside of the group
                    failure = error
                except anyio.get_cancelled_exc_class():
                    self._flag.cancel("the server stopped the request")  # or the client did, before
                    raise
                if self._is_complete:
                    # Servers tell the listener of the end; cancelling it costs twice its own end.
                    await anyio.lowlevel.cancel_shielded_checkpoint()
                if not self._is_gone:
                    self._tasks.cancel_scope.cancel()
        if failure is not None and not (self._is_gone and _is_cancelled(failure)):
            try:
                raise failure
            finally:
                del failure  # else its traceback would hold it, and with it the whole request
        if self._is_gone and not self._is_started:
            await self._answer_nobody()

    async def receive(self) -> Message:
        """Give the app the next message; without a pause where there is one."""
        self._listen_once()
        while not self._messages:
            if self._failure is not None:
                raise self._failure
            if self._is_gone:
                return {"type": "http.disconnect"}
            if self._came is None:
                self._came = anyio.Event()
            await self._came.wait()
        message = self._messages.popleft()
        if self._taken is not None:
            self._taken.set()
        return message

    async def send(self, message: Message) -> None:
        """Pass a message on, and see whether it is the last."""
        if self._is_gone and not self._is_started:
            # Ends the task; a server would take half of a message.
            await anyio.lowlevel.checkpoint()
            return
        self._is_started = True
        if message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        elif message["type"] == "http.response.pathsend":
            self._is_complete = True
        await self._send(message)

    async def _answer_nobody(self) -> None:
        """Give middleware around the boundary a response; Starlette's own raises without one."""
        with suppress(OSError):  # what newer servers say to whoever answers a client that is gone
            await self._send({"type": "http.response.start", "status": _CLIENT_LEFT, "headers": []})
            await self._send({"type": "http.response.body"})

    def _listen_once(self) -> None:
        if not self._is_listening:
            self._is_listening = True
            self._tasks.start_soon(self._listen)

    async def _listen(self) -> None:
        try:
            while (message := await self._receive())["type"] != "http.disconnect":
                self._messages.append(message)
                self._tell()
                # After the last piece of the body only the end of the connection can follow.
                while self._messages and message.get("more_body", False):
                    self._taken = anyio.Event()
                    await self._taken.wait()
        except Exception as error:  # noqa: BLE001  # belongs to whoever reads the body
            self._failure = error
            self._tell()
            return
        self._is_gone = True
        self._tell()
        if not self._is_complete:  # servers say the same after a complete response
            self._flag.cancel("the client went away")
            self._tasks.cancel_scope.cancel()

    def _tell(self) -> None:
        came, self._came = self._came, None
        if came is not None:
            came.set()


def _is_asked_first(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether a client waits with its body until it is asked for it."""
    return any(name == b"expect" and b"100-continue" in value.lower() for name, value in headers)


def _is_cancelled(error: BaseException | None) -> bool:
    """Tell whether an error is how sync code ended that saw the flag; servers need not log it."""
    if isinstance(
        error, BaseExceptionGroup
    ):  # older versions of Starlette leave the group around it
        return all(map(_is_cancelled, error.exceptions))
    return isinstance(error, CallCancelledError) or (
        error is not None and _is_cancelled(error.__cause__)
    )


# --- The life of the app -------------------------------------------------------------------------

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
"""What `FastAPI(lifespan=...)` takes."""


def lifespan(
    *,
    preload: Iterable[BaseLM] = (),
    sync_threads: int | None = None,
    inner: Lifespan | None = None,
) -> Lifespan:
    """Make a lifespan that prepares models before the first request and cleans up after the last.

    At shutdown it closes the connections that this event loop keeps to model endpoints, after
    `inner` has ended.

    Args:
        preload: Models whose libraries are loaded in a worker thread before the app starts, so that
            neither the first request nor the event loop waits for it. No network is asked.
        sync_threads: How many sync handlers, sync dependencies and pieces of sync streams run at
            once. None: as many as before, which is anyio's 40.
        inner: The app's own lifespan, run inside; what it yields becomes the app's state.

    Raises:
        SettingsError: `sync_threads` is no positive number, or `preload` holds what is no LM.

    Example:
        >>> from dspylite.models.lm import LM
        >>> lm = LM("openai/gpt-4o-mini", api_key="sk-secret")
        >>> app = FastAPI(lifespan=lifespan(preload=[lm], sync_threads=100))
    """
    if isinstance(preload, BaseLM):
        raise SettingsError("`preload` must be a list of LMs: write `preload=[lm]`.")
    models = tuple(preload)
    for model in models:
        if not isinstance(model, BaseLM):
            raise SettingsError(f"`preload` must be a list of LMs; {model!r} is none.")
    if sync_threads is not None and (type(sync_threads) is not int or sync_threads < 1):
        raise SettingsError(
            f"`sync_threads` must be a whole number of at least 1, not {sync_threads!r}."
        )

    @asynccontextmanager
    async def life(app: Any) -> AsyncGenerator[Any, None]:
        for model in models:
            await call_in_thread(model.preload)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_close_connections)
            if sync_threads is not None:
                _set_threads(stack, sync_threads)
            yield await stack.enter_async_context(inner(app)) if inner is not None else None

    return life


def _set_threads(stack: AsyncExitStack, count: int) -> None:
    limiter = anyio.to_thread.current_default_thread_limiter()
    stack.callback(setattr, limiter, "total_tokens", limiter.total_tokens)
    limiter.total_tokens = count


async def _close_connections() -> None:
    with anyio.CancelScope(shield=True):
        await close_connections()
