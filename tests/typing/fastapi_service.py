# pyright: reportUnnecessaryTypeIgnoreComment=true
"""The public names of `dspylite.integrations.fastapi`. Type checkers read this; nothing runs it."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI

import dspylite as dspy
from dspylite.integrations.fastapi import (
    RequestBoundary,
    install,
    lifespan,
    settings_per_request,
)
from dspylite.runtime.settings import SettingsChanges


def typed(x_key: str) -> SettingsChanges:
    return {"lm": dspy.LM("openai/m", api_key=x_key)}


def untyped() -> dict[str, Any]:
    return {"num_threads": 3}


async def awaited() -> Mapping[str, object]:
    return {"num_threads": 3}


def in_a_block() -> Iterator[dict[str, int]]:
    yield {"num_threads": 3}


async def in_an_async_block() -> AsyncIterator[SettingsChanges]:
    yield {"num_threads": 3}


@asynccontextmanager
async def own(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
    yield {"title": app.title}


def service(lm: dspy.LM) -> FastAPI:
    app = FastAPI(
        lifespan=lifespan(preload=[lm], sync_threads=100, inner=own),
        dependencies=[
            Depends(settings_per_request(typed)),
            Depends(settings_per_request(untyped)),
            Depends(settings_per_request(awaited)),
            Depends(settings_per_request(in_a_block)),
            Depends(settings_per_request(in_an_async_block)),
        ],
    )
    settings_per_request(lambda: 3)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
    install(app, errors=True, cancel_on_disconnect=False)
    FastAPI().add_middleware(RequestBoundary, cancel_on_disconnect=True)
    return app
