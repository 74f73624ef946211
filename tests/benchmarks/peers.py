"""How each library asks the local server one question, sync and async.

Each function sets the library up as its users do and returns one call. Not here: how often it is
called (`calls.py`). Libraries are imported inside, because a child process loads one of them only.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

Call = Callable[[], Any]
AsyncCall = Callable[[], Awaitable[Any]]

KEY = "sk-bench"
# A name in the price tables of litellm and DSPy, and the one that the server answers with: DSPy
# searches its whole table in every call for a name that is not there, which doubles its CPU time.
MODEL = "gpt-4o-mini"
# Longer than any measurement, so that no library gives up in the middle of one.
TIMEOUT_S = 120.0

# What ChatAdapter makes of `question -> answer`, so that all peers send about as many bytes.
MESSAGES = [
    {
        "role": "system",
        "content": "Your input fields are:\n1. `question` (str):\nYour output fields are:\n"
        "1. `answer` (str):\nAll interactions will be structured in the following way, with the "
        "appropriate values filled in.\n\n[[ ## question ## ]]\n{question}\n\n[[ ## answer ## ]]\n"
        "{answer}\n\n[[ ## completed ## ]]\nIn adhering to this structure, your objective is: \n"
        "        Given the fields `question`, produce the fields `answer`.",
    },
    {
        "role": "user",
        "content": "[[ ## question ## ]]\nWhat is the capital of France?\n\nRespond with the "
        "corresponding output fields, starting with the field `[[ ## answer ## ]]`, and then "
        "ending with the marker for `[[ ## completed ## ]]`.",
    },
]
QUESTION = "What is the capital of France?"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


def base(port: int) -> str:
    """Return the address that OpenAI's clients call `base_url`."""
    return f"http://127.0.0.1:{port}/v1"


def predictor(module: str, engine: str, port: int) -> Any:
    """Configure dspylite or DSPy for the local server and build one `Predict`."""
    dspy: Any = __import__(module)
    lm = dspy.LM(
        f"openai/{MODEL}",
        api_base=base(port),
        api_key=KEY,
        engine=engine,
        cache=False,
        num_retries=0,
    )
    dspy.configure(lm=lm)
    return dspy.Predict("question -> answer")


# Every question differs, so that no library can answer two of them with one request.


def _predict(module: str, engine: str) -> Callable[[int, int], Call]:
    def make(port: int, width: int) -> Call:
        predict, number = predictor(module, engine, port), itertools.count()
        return lambda: predict(question=f"{QUESTION} ({next(number)})").answer

    return make


def _apredict(module: str, engine: str) -> Callable[[int], Awaitable[AsyncCall]]:
    async def make(port: int) -> AsyncCall:
        predict, number = predictor(module, engine, port), itertools.count()

        async def call() -> Any:
            return (await predict.acall(question=f"{QUESTION} ({next(number)})")).answer

        return call

    return make


def _litellm(port: int, width: int) -> Call:
    import litellm

    ask: Any = litellm.completion

    def call() -> Any:
        answer = ask(
            model=f"openai/{MODEL}",
            messages=MESSAGES,
            api_base=base(port),
            api_key=KEY,
            num_retries=0,
        )
        return answer.choices[0].message.content

    return call


def _openai(port: int, width: int) -> Call:
    from openai import OpenAI

    client = OpenAI(base_url=base(port), api_key=KEY, max_retries=0)
    create: Any = client.chat.completions.create
    return lambda: create(model=MODEL, messages=MESSAGES).choices[0].message.content


def _httpx(port: int, width: int) -> Call:
    import httpx

    limits = httpx.Limits(max_connections=width, max_keepalive_connections=width)
    client = httpx.Client(headers=HEADERS, limits=limits, timeout=TIMEOUT_S)
    url, body = f"{base(port)}/chat/completions", {"model": MODEL, "messages": MESSAGES}
    return lambda: content(client.post(url, json=body).raise_for_status().json())


def _urllib3(port: int, width: int) -> Call:
    import urllib3

    pool = urllib3.PoolManager(maxsize=width, headers=HEADERS, retries=False, timeout=TIMEOUT_S)
    url, body = f"{base(port)}/chat/completions", {"model": MODEL, "messages": MESSAGES}
    return lambda: content(pool.request("POST", url, json=body).json())


def _http_client(port: int, width: int) -> Call:
    import http.client
    import json
    import threading

    own = threading.local()  # such a connection is for one thread only
    body = {"model": MODEL, "messages": MESSAGES}

    def call() -> Any:
        connection = getattr(own, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
            own.connection = connection
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), HEADERS)
        return content(json.loads(connection.getresponse().read()))

    return call


async def _alitellm(port: int) -> AsyncCall:
    import litellm

    ask: Any = litellm.acompletion

    async def call() -> Any:
        answer = await ask(
            model=f"openai/{MODEL}",
            messages=MESSAGES,
            api_base=base(port),
            api_key=KEY,
            num_retries=0,
        )
        return answer.choices[0].message.content

    return call


async def _aopenai(port: int) -> AsyncCall:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=base(port), api_key=KEY, max_retries=0)
    create: Any = client.chat.completions.create

    async def call() -> Any:
        return (await create(model=MODEL, messages=MESSAGES)).choices[0].message.content

    return call


async def _ahttpx(port: int) -> AsyncCall:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(headers=HEADERS, limits=limits, timeout=TIMEOUT_S)
    url, body = f"{base(port)}/chat/completions", {"model": MODEL, "messages": MESSAGES}

    async def call() -> Any:
        return content((await client.post(url, json=body)).raise_for_status().json())

    return call


async def _aiohttp(port: int) -> AsyncCall:
    import aiohttp

    session = aiohttp.ClientSession(
        headers=HEADERS,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
    )
    url, body = f"{base(port)}/chat/completions", {"model": MODEL, "messages": MESSAGES}

    async def call() -> Any:
        async with session.post(url, json=body) as response:
            response.raise_for_status()
            return content(await response.json())

    return call


def content(answer: Any) -> Any:
    """Take the text out of a chat completion in JSON."""
    return answer["choices"][0]["message"]["content"]


def check(answer: Any) -> None:
    """Refuse an answer that is not the server's, so that no failure counts as a fast call."""
    if "Paris" not in str(answer):
        raise RuntimeError(f"the server's answer did not arrive: {answer!r}")


SYNC: dict[str, Callable[[int, int], Call]] = {
    "dspylite": _predict("dspylite", "direct"),
    "dspylite-litellm": _predict("dspylite", "litellm"),
    "dspy": _predict("dspy", "auto"),
    "dspy-litellm": _predict("dspy", "litellm"),
    "litellm": _litellm,
    "openai": _openai,
    "httpx": _httpx,
    "urllib3": _urllib3,
    "http.client": _http_client,
}
ASYNC: dict[str, Callable[[int], Awaitable[AsyncCall]]] = {
    "dspylite": _apredict("dspylite", "direct"),
    "dspylite-litellm": _apredict("dspylite", "litellm"),
    "dspy": _apredict("dspy", "auto"),
    "dspy-litellm": _apredict("dspy", "litellm"),
    "litellm": _alitellm,
    "openai": _aopenai,
    "httpx": _ahttpx,
    "aiohttp": _aiohttp,
}
