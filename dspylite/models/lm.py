"""`LM`: a hosted or local language model by name, and `OfflineLM`, which needs neither.

Not here: what all models share (`models/base.py`), and the engines themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from dspylite.abc import Engine, Io
from dspylite.errors import LMConfigurationError, nearest
from dspylite.models.base import BaseLM, ModelType, check_url
from dspylite.models.litellm import LiteLLMChat, chat_capabilities
from dspylite.models.offline.engine import OFFLINE_MODEL, OFFLINE_PREFIX, OfflineEngine
from dspylite.schema.messages import LMResponse, Message

_NOT_IN_THIS_RUNTIME = frozenset(
    {
        "provider",
        "finetuning_model",
        "launch_kwargs",
        "train_kwargs",
        "async_engine",
        "prompt_cache",
    }
)
_ENGINES = ("auto", "litellm")
_OWN_PARAMETERS = ("use_developer_role", "capabilities")
_CAPABILITIES = frozenset({"json_object", "json_schema"})
_LITELLM = LiteLLMChat()
_OFFLINE = OfflineEngine()


class LM(BaseLM):
    """A language model by name, such as `LM("openai/gpt-4o-mini")`.

    Safe to share between threads, tasks and event loops. The key is taken from the provider's usual
    environment variable unless `api_key` is given; it never appears in reprs, errors or histories.
    `LM("offline/extractive")` is `OfflineLM()`.

    Args:
        model: Provider and model. For an OpenAI-compatible server of your own use
            `"openai/<name>"` with `api_base`.
        model_type: Kind of endpoint; chat.
        temperature: Sampling temperature; None leaves it to the provider.
        max_tokens: Longest answer in tokens; None leaves it to the provider.
        cache: Whether answers may be reused.
        callbacks: Told of every call, after those of the settings.
        num_retries: Further attempts after a failure that may pass; 0 sends each request once.
        use_developer_role: Whether system messages are sent as `developer` messages.
        engine: Who makes the call: `"auto"` or `"litellm"`.
        capabilities: What the model can do beyond text: `"json_schema"`, `"json_object"`. None:
            what litellm's table says of the model, which is nothing for models of your own.
        **kwargs: Sent with every request: `api_key` (a string, or a function that returns one),
            `api_base`, `timeout` (seconds), `extra_headers`, `top_p`, `stop` and so on.

    Raises:
        LMConfigurationError: A parameter cannot work; nothing was sent.

    Example:
        >>> LM("openai/gpt-4o-mini", temperature=0.2, api_key="sk-secret")
        LM('openai/gpt-4o-mini', temperature=0.2, api_key='...')
    """

    def __init__(
        self,
        model: str,
        model_type: ModelType = "chat",
        temperature: float | None = None,
        max_tokens: int | None = None,
        cache: bool = True,
        callbacks: Sequence[Any] | None = None,
        num_retries: int = 3,
        *,
        use_developer_role: bool = False,
        engine: str = "auto",
        capabilities: Collection[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if refused := [name for name in kwargs if name in _NOT_IN_THIS_RUNTIME]:
            raise LMConfigurationError(
                f"`{refused[0]}` is not part of dspylite, which runs programs and does not train "
                "models; leave it out."
            )
        if engine not in _ENGINES:
            raise LMConfigurationError(
                f"There is no engine {engine!r}. {nearest(str(engine), _ENGINES)}"
                f"Engines: {', '.join(_ENGINES)}."
            )
        if model_type != "chat":
            raise LMConfigurationError(
                f"`model_type` must be 'chat', not {model_type!r}; other endpoints are not "
                "supported yet."
            )
        if str(model).startswith(OFFLINE_PREFIX) and model != OFFLINE_MODEL:
            raise LMConfigurationError(
                f"There is no offline model {model!r}. {nearest(model, [OFFLINE_MODEL])}"
                f"`{OFFLINE_MODEL}` is the only one."
            )
        check_url(kwargs.get("api_base") or kwargs.get("base_url"))
        super().__init__(
            model, model_type, temperature, max_tokens, cache, callbacks, num_retries, **kwargs
        )
        self.use_developer_role = use_developer_role
        self._capabilities = _checked_capabilities(capabilities)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do beyond text; the first look may load litellm."""
        if self._capabilities is not None:
            return self._capabilities
        return frozenset() if self.model == OFFLINE_MODEL else chat_capabilities(self.model)

    async def plan(
        self, io: Io, messages: Sequence[Message], params: Mapping[str, Any]
    ) -> LMResponse:
        """Run one call through the chain, as `BaseLM.plan`."""
        if self.use_developer_role:
            messages = [
                {**message, "role": "developer"} if message["role"] == "system" else message
                for message in messages
            ]
        return await super().plan(io, messages, params)

    def copy(self, **changes: Any) -> Self:
        """Return an LM with an empty history of its own and some parameters changed.

        A change to None takes the parameter away.
        """
        own = {name: changes.pop(name) for name in _OWN_PARAMETERS if name in changes}
        twin = super().copy(**changes)
        if "use_developer_role" in own:
            twin.use_developer_role = own["use_developer_role"]
        if "capabilities" in own:
            twin._capabilities = _checked_capabilities(own["capabilities"])  # noqa: SLF001  # ours
        return twin

    @property
    def engine(self) -> Engine:
        """What makes the call."""
        return _OFFLINE if self.model == OFFLINE_MODEL else _LITELLM


class OfflineLM(LM):
    """A small deterministic reader that needs no key, network or weights.

    It reads the prompt as any model would, finds the wanted outputs and their types, and answers
    with the span of the inputs that fits best. For demos, tests and development: it knows nothing
    that is not in the prompt. It is never chosen silently.

    Example:
        >>> OfflineLM()("Which city is the capital of France? Paris is the capital of France.")
        ['Paris is the capital of France.']
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(OFFLINE_MODEL, **kwargs)


def _checked_capabilities(names: Collection[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    for name in [names] if isinstance(names, str) else names:
        if name not in _CAPABILITIES:
            raise LMConfigurationError(
                f"There is no capability {name!r}. {nearest(str(name), _CAPABILITIES)}"
                f"Give a set of: {', '.join(sorted(_CAPABILITIES))}."
            )
    return frozenset([names] if isinstance(names, str) else names)
