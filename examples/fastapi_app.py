"""A web service in which every request has a language model and key of its own.

Run it with `uvicorn examples.fastapi_app:app` (needs `pip install dspylite[fastapi] uvicorn`) and
post `{"question": "..."}` to `/sync` or `/async`, with the tenant's key in the header `x-llm-key`.
Offline by default; DSPYLITE_MODEL names another model (with DSPYLITE_API_BASE).
"""

import os
from typing import Annotated

from fastapi import FastAPI, Header
from pydantic import BaseModel

import dspylite as dspy

app = FastAPI(title="One LM per request")
predict = dspy.Predict("question -> answer")  # shared by all requests: it holds no tenant's state


class Question(BaseModel):
    """What a tenant asks."""

    question: str


class Answer(BaseModel):
    """What came out, and the tokens it took."""

    answer: str
    total_tokens: int


def lm_of_tenant(key: str) -> dspy.LM:
    return dspy.LM(
        os.environ.get("DSPYLITE_MODEL", "offline/extractive"),
        api_base=os.environ.get("DSPYLITE_API_BASE"),
        api_key=key,
    )


def as_answer(prediction: dspy.Prediction) -> Answer:
    usage = prediction.get_lm_usage() or {}
    return Answer(
        answer=prediction.answer, total_tokens=sum(u["total_tokens"] for u in usage.values())
    )


@app.post("/sync")
def ask(question: Question, x_llm_key: Annotated[str, Header()]) -> Answer:
    with dspy.context(lm=lm_of_tenant(x_llm_key)):
        return as_answer(predict(question=question.question))


@app.post("/async")
async def aask(question: Question, x_llm_key: Annotated[str, Header()]) -> Answer:
    with dspy.context(lm=lm_of_tenant(x_llm_key)):
        return as_answer(await predict.acall(question=question.question))
