"""Which engine makes a call: by the name the user gave, the model, and what the request says.

Not here: the engines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dspylite.abc import Engine
from dspylite.errors import LMConfigurationError, nearest
from dspylite.models.direct.engine import SPOKEN, DirectChat
from dspylite.models.direct.engine import preload as preload_direct
from dspylite.models.direct.providers import provider_of
from dspylite.models.litellm import LiteLLMChat, LiteLLMResponses, LiteLLMText
from dspylite.models.litellm_door import load_litellm
from dspylite.schema.messages import LMRequest, LMResponse

MODEL_TYPES = ("chat", "text", "responses")
LITELLM = LiteLLMChat()
_LITELLM_OTHERS: Mapping[str, Engine] = {"text": LiteLLMText(), "responses": LiteLLMResponses()}
_DIRECT = DirectChat()
_ENGINES = ("auto", "direct", "litellm")
_ENGINE_VARIABLE = "DSPYLITE_ENGINE"


class _Auto:
    """Takes the direct engine where it can say what the request says, else litellm."""

    __slots__ = ()

    def call(self, request: LMRequest) -> LMResponse:
        return _fitting(request).call(request)

    async def acall(self, request: LMRequest) -> LMResponse:
        return await _fitting(request).acall(request)


def _fitting(request: LMRequest) -> Engine:
    return _DIRECT if _is_plain(request.params) else LITELLM


def _is_plain(params: Mapping[str, Any]) -> bool:
    return SPOKEN.issuperset(params) and not isinstance(params.get("response_format"), type)


_AUTO = _Auto()


def chat_engine(engine: str, model: str, model_type: str) -> Engine:
    """Return what makes the calls of an LM; its parameters were checked when it was made."""
    if model_type != "chat":
        return _LITELLM_OTHERS[model_type]
    if engine == "direct":
        return _DIRECT
    return _AUTO if engine == "auto" and provider_of(model) is not None else LITELLM


def uses_litellm(engine: str, model: str, model_type: str) -> bool:
    """Tell whether every call of an LM goes through litellm, so that loading it costs no more."""
    return model_type != "chat" or chat_engine(engine, model, model_type) is LITELLM


def preload_engine(engine: str, model: str, model_type: str, params: Mapping[str, Any]) -> None:
    """Load the libraries that calls with these parameters go through; nothing is sent."""
    chosen = chat_engine(engine, model, model_type)
    if chosen is _DIRECT or (chosen is _AUTO and _is_plain(params)):
        preload_direct()
    else:
        load_litellm()


def check_engine(engine: str, model: str, model_type: str) -> None:
    """Refuse an engine that cannot make the calls of an LM.

    Raises:
        LMConfigurationError: There is no such kind of calls, or the engine speaks another protocol.
    """
    if model_type not in MODEL_TYPES:
        raise LMConfigurationError(
            f"`model_type` must be one of {', '.join(MODEL_TYPES)}, not {model_type!r}."
        )
    if engine == "direct" and (model_type != "chat" or provider_of(model) is None):
        raise LMConfigurationError(
            f"The direct engine makes chat calls to OpenAI-compatible servers, not {model_type!r} "
            f"calls to {model!r}; leave `engine` out, or write 'openai/<name>' with `api_base=` if "
            "the server is compatible."
        )


def checked_engine(engine: str | None) -> str:
    """Return the engine's name; without one, what the environment says, else `"auto"`.

    Raises:
        LMConfigurationError: There is no such engine.
    """
    source = "`engine`"
    if engine is None:
        source, engine = f"`{_ENGINE_VARIABLE}`", os.environ.get(_ENGINE_VARIABLE) or "auto"
    if engine not in _ENGINES:
        raise LMConfigurationError(
            f"There is no engine {engine!r}, which {source} names. "
            f"{nearest(str(engine), _ENGINES)}Engines: {', '.join(_ENGINES)}."
        )
    return engine
