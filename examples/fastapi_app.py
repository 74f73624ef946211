"""A web service in which every request has a language model and key of its own.

Run it with `uvicorn examples.fastapi_app:app` (needs `pip install dspylite[fastapi] uvicorn`) and
post `{"question": "..."}` to `/sync`, `/async` or `/stream`, with the tenant's key in the header
`x-llm-key`. Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE).
"""

import os
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, Header
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import dspylite as dspy
from dspylite.integrations.fastapi import install, lifespan, settings_per_request

shared = dspy.LM(
    os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
    api_base=os.environ.get("DSPYLITE_API_BASE"),
    api_key="each tenant has its own",
)
predict = dspy.Predict("question -> answer")  # shared by all requests: it holds no tenant's state


class Question(BaseModel):
    """What a tenant asks."""

    question: str


class Answer(BaseModel):
    """What came out, and the tokens it took."""

    answer: str
    total_tokens: int


async def of_tenant(x_llm_key: Annotated[str, Header()]) -> dict[str, object]:
    return {"lm": shared.copy(api_key=x_llm_key)}  # `async`: it waits for no free thread


app = FastAPI(
    title="One LM per request",
    lifespan=lifespan(preload=[shared]),
    dependencies=[Depends(settings_per_request(of_tenant))],
)
install(app)  # errors become answers; work whose client went away ends


def as_answer(prediction: dspy.Prediction) -> Answer:
    usage = prediction.get_lm_usage() or {}
    return Answer(
        answer=prediction.answer, total_tokens=sum(u["total_tokens"] for u in usage.values())
    )


@app.post("/sync")
def ask(question: Question) -> Answer:
    return as_answer(predict(question=question.question))


@app.post("/async")
async def aask(question: Question) -> Answer:
    return as_answer(await predict.acall(question=question.question))


@app.post("/stream")
async def stream(question: Question) -> StreamingResponse:
    lm = dspy.settings.lm
    assert isinstance(lm, dspy.BaseLM)  # `of_tenant` put it there
    opened = await lm.astream(question.question)  # what fails here still gets a status

    async def pieces() -> AsyncIterator[str]:
        async with opened:
            async for piece in opened:
                yield piece.text

    return StreamingResponse(pieces(), media_type="text/plain")
