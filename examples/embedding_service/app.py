"""The web app: what is asked over HTTP, and who may ask it.

Not here: the work behind it (`service.py` puts it together), and the page (`static/`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from dspylite.integrations.fastapi import install, lifespan
from examples.embedding_service.auth import LOCAL_USER, check_local
from examples.embedding_service.config import Config
from examples.embedding_service.documents import Document, check_question, read_document
from examples.embedding_service.errors import (
    InvalidInputError,
    NotFoundError,
    ServiceError,
    TooLargeError,
    UnavailableError,
)
from examples.embedding_service.service import Service
from examples.embedding_service.tasks import Task, as_json

logger = logging.getLogger("embedding_service")

STATIC = Path(__file__).parent / "static"
MAX_RESULTS = 50


def create_app(config: Config | None = None) -> FastAPI:
    """Make the app: `uvicorn --factory examples.embedding_service.app:create_app`.

    Args:
        config: The settings; None reads the environment.

    Raises:
        SettingsError: The settings cannot work.
    """
    chosen = config or Config.from_environment()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        service = await anyio.to_thread.run_sync(Service, chosen)
        app.state.service = service
        if not service.keys:
            logger.warning(
                "No EMBEDDING_SERVICE_API_KEYS: open to this machine's user `%s`, and to nobody "
                "else",
                LOCAL_USER,
            )
        service.queue.start()
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(service.close)

    # FastAPI's own pages would run scripts of another site where the page keeps its key.
    app = FastAPI(
        title="Embedding service", lifespan=lifespan(inner=life), docs_url=None, redoc_url=None
    )
    install(app)  # errors become answers; work whose client went away ends
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _confess)
    app.get("/", include_in_schema=False)(page)
    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False), name="static")
    app.post("/documents", status_code=202)(post_document)
    app.get("/tasks/{task_id}")(get_task)
    app.get("/search")(search)
    app.get("/healthz")(healthz)
    return app


# --- Who asks ------------------------------------------------------------------------------------


async def the_service(request: Request) -> Service:
    """Return the parts that the app runs on."""
    service: Service = request.app.state.service
    return service


async def the_user(request: Request, service: Annotated[Service, Depends(the_service)]) -> str:
    """Return whose request it is."""
    if service.keys:
        return service.keys.user_of(request.headers.get("authorization"))
    check_local(request.client.host if request.client else None, request.headers)
    return LOCAL_USER


def the_counted_user(
    user: Annotated[str, Depends(the_user)], service: Annotated[Service, Depends(the_service)]
) -> str:
    """Return whose request it is, and count it."""
    service.limit.check(user)
    return user


# --- What is asked -------------------------------------------------------------------------------


async def page() -> Response:
    """Show the page."""
    return FileResponse(
        STATIC / "index.html",
        headers={
            "content-security-policy": "frame-ancestors 'none'",
            "x-content-type-options": "nosniff",
        },
    )


async def post_document(
    request: Request,
    user: Annotated[str, Depends(the_counted_user)],
    service: Annotated[Service, Depends(the_service)],
    title: str = "",
) -> dict[str, object]:
    """Take a document in; it is kept for good before the answer is sent."""
    raw = await _body(request, service.config.max_body_bytes)
    content_type = request.headers.get("content-type", "")

    def submit() -> Task:
        document: Document = read_document(user, content_type, raw, title)
        task = service.tasks.create(document)
        try:
            service.queue.submitted(task.task_id)
        except UnavailableError as error:
            # It is kept, and a worker finds it without a message, too.
            logger.warning("Task %s waits for a worker to look: %s", task.task_id, error)
        return task

    task = await anyio.to_thread.run_sync(submit)
    return {"task_id": task.task_id, "document_id": task.document_id, "status": task.status}


def get_task(
    task_id: str,
    user: Annotated[str, Depends(the_user)],
    service: Annotated[Service, Depends(the_service)],
) -> dict[str, object]:
    """Say how far a task is."""
    is_possible = task_id.isascii() and task_id.isalnum() and len(task_id) == 32
    task = service.tasks.get(user, task_id) if is_possible else None
    if task is None:
        raise NotFoundError("There is no such task.")
    return as_json(task)


def search(
    user: Annotated[str, Depends(the_counted_user)],
    service: Annotated[Service, Depends(the_service)],
    q: str,
    k: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = 5,
) -> dict[str, object]:
    """Find the user's chunks that are nearest to a question."""
    vector = service.vectors.embed_query(check_question(q))
    hits = service.store.search(service.config.collection_of(user), vector, k)
    return {
        "results": [
            {
                "document_id": hit.document_id,
                "title": hit.title,
                "chunk": hit.chunk,
                "text": hit.text,
                "score": hit.score,
                **({"metadata": hit.metadata} if hit.metadata else {}),
            }
            for hit in hits
        ]
    }


def healthz(service: Annotated[Service, Depends(the_service)]) -> dict[str, object]:
    """Tell whether the queue and the store answer."""
    service.tasks.open_tasks()
    documents, chunks = service.store.count()
    return {
        "status": "ok",
        "queue": service.queue.name,
        "store": service.store.name,
        "model": service.config.model,
        "documents": documents,
        "chunks": chunks,
        "max_body_bytes": service.config.max_body_bytes,
    }


async def _body(request: Request, limit: int) -> bytes:
    """Read a body, and no more of it than is allowed.

    Raises:
        TooLargeError: It is longer.
    """
    refusal = TooLargeError(f"The body is longer than {limit} bytes.")
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and int(said[:20]) > limit:
        raise refusal
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > limit:
            raise refusal
    return bytes(raw)


# --- Refusals in one form ------------------------------------------------------------------------


def _answer(error: ServiceError) -> JSONResponse:
    answer = error.to_http()
    return JSONResponse(answer.body, status_code=answer.status, headers=answer.headers)


async def _refuse_parameters(request: Request, error: Any) -> JSONResponse:
    del request
    first = error.errors()[0]
    return _answer(InvalidInputError(f"`{first['loc'][-1]}`: {first['msg']}."))


async def _refuse_route(request: Request, error: Any) -> JSONResponse:
    del request
    refusal = ServiceError(str(error.detail), code=f"http_{error.status_code}")
    answer = refusal.to_http()
    return JSONResponse(
        answer.body,
        status_code=error.status_code,
        headers={**answer.headers, **(error.headers or {})},
    )


async def _confess(request: Request, error: Any) -> JSONResponse:
    del request, error  # the server logs it
    return _answer(ServiceError("The service failed."))
