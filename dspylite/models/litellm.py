"""The engine that reaches every provider through litellm. The only file that imports it.

litellm's own retries are off: one request is one request. Not here: policies around a call
(`models/middleware.py`), and what its errors mean (`models/translate.py`).
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dspylite.models.translate import read_chat_response, shows_secret, translate_error
from dspylite.runtime.bridge import call_in_thread, running_library
from dspylite.schema.messages import LMRequest, LMResponse, Usage, is_secret

DEFAULT_TIMEOUT_S = 300.0
"""Longest wait for one answer unless the LM says otherwise; litellm's own default is 6,000 s."""

_LOAD_LOCK = threading.Lock()  # guards the first import: litellm imports itself in circles
_loaded: list[Any] = []


def load_litellm() -> Any:
    """Import litellm once, whatever thread asks first, and return the module.

    It is told to use the price list it ships instead of fetching one over the network, unless the
    user chose otherwise through `LITELLM_LOCAL_MODEL_COST_MAP`, and not to print advice.
    """
    if not _loaded:
        with _LOAD_LOCK:
            if not _loaded:
                os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
                import litellm  # noqa: PLC0415  # costs seconds, so on the first call only

                litellm.suppress_debug_info = True
                _loaded.append(litellm)
    return _loaded[0]


@functools.lru_cache(maxsize=1024)
def chat_capabilities(model: str) -> frozenset[str]:
    """Look up in litellm's own table what a chat model can do; never asks the network.

    Returns:
        `"json_schema"` and `"json_object"`, as far as the model takes such a `response_format`;
        nothing for models that the table does not know.
    """
    try:
        known = load_litellm().get_model_info(model)
    except Exception:  # noqa: BLE001  # an unknown model, whatever litellm raises for it
        return frozenset()
    found: set[str] = set()
    if "response_format" in (known.get("supported_openai_params") or ()):
        found.add("json_object")
    if known.get("supports_response_schema"):
        found |= {"json_object", "json_schema"}
    return frozenset(found)


def _secrets(arguments: Mapping[str, Any]) -> list[str]:
    """Return every string that no error may show: the call's own and the environment's."""
    found: list[Any] = []
    for name, value in (*arguments.items(), *os.environ.items()):
        if is_secret(name):
            found += value.values() if isinstance(value, Mapping) else [value]
    # A key read from a file may end in a line break, with which nobody would quote it.
    texts = [value.strip() for value in found if isinstance(value, str)]
    return texts + [text.partition(" ")[2] for text in texts]  # "Bearer" is no part of the secret


@contextmanager
def _border(arguments: Mapping[str, Any]) -> Generator[None, None, None]:
    """Let every failure of the block leave as one of ours."""
    handled = sys.exception()
    try:
        yield
    except Exception as error:  # the border: what a provider's library raises is translated here
        secrets = _secrets(arguments)
        ours = translate_error(error, model=arguments["model"], secrets=secrets, handled=handled)
        if ours is error:
            raise
        # Causes are printed with the traceback; where one holds a key, none must be.
        raise ours from (None if shows_secret(error, secrets) else error)


def _arguments(model: str, params: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {"timeout": DEFAULT_TIMEOUT_S, **params, "model": model}
    arguments.update(num_retries=0, max_retries=0)  # litellm's and the SDK's; ours are in the chain
    if callable(key := arguments.get("api_key")):
        arguments["api_key"] = key()
    return arguments


class LiteLLMChat:
    """Chat completions through litellm; stateless, so it is shared, copied and pickled at will."""

    __slots__ = ()

    def call(self, request: LMRequest) -> LMResponse:
        """Send and wait on this thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        arguments = _arguments(request.model, request.params)
        with _border(arguments):
            answer = load_litellm().completion(messages=list(request.messages), **arguments)
            return read_chat_response(answer, model=request.model)

    async def acall(self, request: LMRequest) -> LMResponse:
        """Send and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # litellm's async form knows no other
            return await call_in_thread(self.call, request)
        arguments = _arguments(request.model, request.params)
        with _border(arguments):
            litellm = await _load_without_blocking()
            answer = await litellm.acompletion(messages=list(request.messages), **arguments)
            return read_chat_response(answer, model=request.model)


class _NoRetries(int):
    """A 0 that counts as given: litellm's embedding reads `max_retries or 2`."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


class LiteLLMEmbedding:
    """Embeddings through litellm: a batch of texts to the raw rows of the answer."""

    __slots__ = ("model", "params")

    def __init__(self, model: str, params: Mapping[str, Any]) -> None:
        self.model = model
        self.params = dict(params)

    def call(self, texts: Sequence[str]) -> tuple[list[Any], Usage]:
        """Send one batch and wait on this thread; return its rows as they came.

        Raises:
            LMError: Of the class that fits the failure.
        """
        arguments = self._arguments()
        with _border(arguments):
            return _read_rows(load_litellm().embedding(input=list(texts), **arguments))

    async def acall(self, texts: Sequence[str]) -> tuple[list[Any], Usage]:
        """Send one batch and wait on this event loop; under trio, in a worker thread.

        Raises:
            LMError: Of the class that fits the failure.
        """
        if running_library() != "asyncio":  # litellm's async form knows no other
            return await call_in_thread(self.call, texts)
        arguments = self._arguments()
        with _border(arguments):
            litellm = await _load_without_blocking()
            return _read_rows(await litellm.aembedding(input=list(texts), **arguments))

    def _arguments(self) -> dict[str, Any]:
        return _arguments(self.model, self.params) | {"max_retries": _NoRetries()}


async def _load_without_blocking() -> Any:
    return _loaded[0] if _loaded else await call_in_thread(load_litellm)


def _read_rows(answer: Any) -> tuple[list[Any], Usage]:
    rows = [row if isinstance(row, Mapping) else dict(row) for row in answer.data or ()]
    usage = answer.usage.model_dump() if answer.usage is not None else {}
    return rows, Usage.from_provider(usage)
