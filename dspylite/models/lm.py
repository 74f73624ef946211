"""`LM`: a hosted or local language model by name, and `OfflineLM`, which needs neither.

Not here: what all models share (`models/base.py`), and the engines themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Self

from dspylite.abc import Engine
from dspylite.errors import LMConfigurationError, nearest
from dspylite.models.base import BaseLM, Forward, ModelType, as_messages
from dspylite.models.completion import as_completion
from dspylite.models.direct.engine import list_models
from dspylite.models.engines import (
    chat_engine,
    check_engine,
    checked_engine,
    preload_engine,
    uses_litellm,
)
from dspylite.models.knowledge import (
    Knowledge,
    Price,
    checked_capabilities,
    known_without_table,
)
from dspylite.models.litellm_door import known_by_table
from dspylite.models.offline.engine import OFFLINE_MODEL, OFFLINE_PREFIX, OfflineEngine
from dspylite.models.states import BUILT_IN, CLASS_KEY, DSPY_LM
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.loops import running_library
from dspylite.runtime.settings import check_deadline
from dspylite.runtime.workers import call_in_thread
from dspylite.schema.messages import LMRequest, Message

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
_OWN_PARAMETERS = ("use_developer_role", "capabilities", "engine")
_OFFLINE = OfflineEngine()


class LM(BaseLM):
    """A language model by name, such as `LM("openai/gpt-4o-mini")`.

    Safe to share between threads, tasks and event loops. The key is taken from the provider's usual
    environment variable unless `api_key` is given; it never appears in reprs, errors or histories.
    `LM("offline/extractive")` is `OfflineLM()`.

    Args:
        model: Provider and model. For an OpenAI-compatible server of your own use
            `"openai/<name>"` with `api_base`.
        model_type: Kind of endpoint: `"chat"`, `"text"` (completions of a prompt) or
            `"responses"`; the latter two go through litellm.
        temperature: Sampling temperature; None leaves it to the provider.
        max_tokens: Longest answer in tokens; None leaves it to the provider.
        cache: Whether answers are kept, and an equal request is answered by one of them or by
            another one under way.
        callbacks: Told of every call, after those of the settings.
        num_retries: Further attempts after a failure that may pass; each is one request, and 0
            sends each request once. None: 3, and overload is waited out for `patience_s`.
        use_developer_role: Whether system messages are sent as `developer` messages.
        engine: Who makes the call. `"direct"` speaks to OpenAI-compatible servers (`openai/`,
            `hosted_vllm/`, `litellm_proxy/`, `lm_studio/`) itself, at a fraction of the cost;
            `"litellm"` reaches every provider; `"auto"` takes the first where it can. None: what
            the environment variable `DSPYLITE_ENGINE` says, else `"auto"`.
        capabilities: What the model can do beyond text: `"function_calling"`, `"json_object"`,
            `"json_schema"`, `"reasoning"`. None: what is known of the model by its name, which is
            nothing for most models of your own.
        price: US dollars for a million tokens read and for a million written, such as
            `(0.15, 0.6)`. None: what litellm's table says, where it is asked for.
        **kwargs: Sent with every request: `api_key` (a string, or a function that returns one),
            `api_base`, `timeout` (seconds for an attempt, 300), `max_response_bytes` (16 MB; direct
            engine), `extra_headers`, `extra_body`, `top_p`, `stop` and so on; `deadline_s` for the
            whole call; `rollout_id`, which is not sent, for an answer of its own in the cache.
            Policies around the call: `max_retry_wait_s`, `patience_s`, `max_concurrency`,
            `max_queue`, `rpm`, `tpm`, `fallbacks`, `fallback_on`, `circuit_breaker`, `adaptive`,
            `middleware` (see `Policies`).

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
        num_retries: int | None = None,
        *,
        use_developer_role: bool = False,
        engine: str | None = None,
        capabilities: Collection[str] | None = None,
        price: Any = None,
        **kwargs: Any,
    ) -> None:
        # Programs that hand on DSPy's defaults ask for nothing.
        kwargs = {k: v for k, v in kwargs.items() if v or k not in _NOT_IN_THIS_RUNTIME}
        if refused := [name for name in kwargs if name in _NOT_IN_THIS_RUNTIME]:
            raise LMConfigurationError(
                f"`{refused[0]}` is not part of dspylite, which runs programs and does not train "
                "models; leave it out."
            )
        check_deadline("deadline_s", kwargs.get("deadline_s"))
        if str(model).startswith(OFFLINE_PREFIX) and model != OFFLINE_MODEL:
            raise LMConfigurationError(
                f"There is no offline model {model!r}. {nearest(model, [OFFLINE_MODEL])}"
                f"`{OFFLINE_MODEL}` is the only one."
            )
        self.use_developer_role = use_developer_role
        self._capabilities = checked_capabilities(capabilities)
        self._engine_name = checked_engine(engine)
        super().__init__(
            model,
            model_type,
            temperature,
            max_tokens,
            cache,
            callbacks,
            num_retries,
            price,
            **kwargs,
        )
        self._check_engine()

    def _check_engine(self) -> None:
        # Offline there is one engine, whatever the environment says of the others.
        name = "auto" if self.model == OFFLINE_MODEL else self._engine_name
        check_engine(name, self.model, self.model_type)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do beyond text; the first look may load litellm."""
        return self._known().capabilities if self._capabilities is None else self._capabilities

    @property
    def is_remote(self) -> bool:
        """Whether calls go over a network."""
        return self.model != OFFLINE_MODEL

    @property
    def cache_kind(self) -> str | None:
        """The kind of endpoint.

        None for the offline model, which is as quick as a cache, and where `forward` is overridden,
        because nobody knows on what its answers depend.
        """
        return self.model_type if self.is_remote and not self._has_own_forward() else None

    @property
    def supports_function_calling(self) -> bool:
        """Whether the model is known to call tools."""
        return "function_calling" in self.capabilities

    @property
    def supports_response_schema(self) -> bool:
        """Whether the model is known to answer as JSON of a given schema."""
        return "json_schema" in self.capabilities

    @property
    def supports_reasoning(self) -> bool:
        """Whether the model is known to take `reasoning_effort`."""
        return "reasoning" in self.capabilities

    @property
    def context_window(self) -> int | None:
        """Most tokens the model reads; None if unknown. The first look loads litellm's table."""
        return None if self.model == OFFLINE_MODEL else known_by_table(self.model).context_window

    def price(self, *, look_up: bool) -> Price | None:
        """Return what the model's tokens cost; None if nobody knows.

        Args:
            look_up: Whether litellm's table may be loaded for it, which takes a moment.
        """
        if self.model == OFFLINE_MODEL:
            return Price(input_usd=0, output_usd=0)
        if self._price is None and look_up:
            return known_by_table(self.model).price
        return self._price

    def list_models(self) -> list[str]:
        """Return the names of the models that the endpoint serves.

        Raises:
            LMError: It could not be asked, or speaks another protocol than OpenAI's.
        """
        return run_flow(list_models(BLOCKING, self.model, self.kwargs))

    async def alist_models(self) -> list[str]:
        """Return the names of the models that the endpoint serves, awaited."""
        if running_library() != "asyncio":
            return await call_in_thread(self.list_models)
        return await list_models(ASYNC, self.model, self.kwargs)

    def preload(self) -> None:
        """Load the libraries of the engine, and of the fallbacks, before the first call.

        A server does it before it takes requests: litellm costs seconds to load, the libraries of
        the direct engine a tenth of one. Nothing is sent. A repeat costs nothing.

        Example:
            >>> LM("openai/gpt-4o-mini", api_key="sk-secret").preload()
        """
        super().preload()
        if self.model != OFFLINE_MODEL:
            preload_engine(self._engine_name, self.model, self.model_type, self.kwargs)

    def _known(self) -> Knowledge:
        if self.model == OFFLINE_MODEL:
            return Knowledge()
        # What the direct engine serves must not cost the loading of litellm.
        if uses_litellm(self._engine_name, self.model, self.model_type):
            return known_by_table(self.model)
        return known_without_table(self.model)

    def _as_sent(self, messages: Sequence[Message]) -> Sequence[Message]:
        if not self.use_developer_role:
            return messages
        return [
            {**message, "role": "developer"} if message["role"] == "system" else message
            for message in messages
        ]

    def copy(self, **changes: Any) -> Self:
        """Return an LM with an empty history of its own and some parameters changed.

        A change to None takes the parameter away.
        """
        own = {name: changes.pop(name) for name in _OWN_PARAMETERS if name in changes}
        twin = super().copy(**changes)
        if "use_developer_role" in own:
            twin.use_developer_role = own["use_developer_role"]
        if "capabilities" in own:
            twin._capabilities = checked_capabilities(own["capabilities"])  # noqa: SLF001  # ours
        if "engine" in own:
            twin._engine_name = checked_engine(own["engine"])  # noqa: SLF001  # ours
        twin._check_engine()  # noqa: SLF001  # ours
        return twin

    def dump_state(self) -> dict[str, Any]:
        """Return the parameters and policies as plain data; otherwise as `BaseLM.dump_state`."""
        state = super().dump_state()
        if self.use_developer_role:
            state["use_developer_role"] = True
        if self._engine_name != "auto":
            state["engine"] = self._engine_name
        if self._capabilities is not None:
            state["capabilities"] = sorted(self._capabilities)
        return state

    def forward(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Send one request, past the cache, limits, callbacks and history; for overriding.

        What a subclass's `forward` returns is the answer of every call; `super().forward(...)` asks
        the model, and gives a completion in OpenAI's shape that may be changed.

        Args:
            prompt: One user message, if `messages` is not given.
            messages: The chat so far.
            **kwargs: Parameters that override the LM's own.

        Raises:
            LMError: The request failed.
        """
        return as_completion(self._own_engine().call(self._one_request(prompt, messages, kwargs)))

    async def aforward(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Send one request and await it; where `forward` alone is overridden, by that one."""
        kind = type(self)
        if kind.aforward is LM.aforward and kind.forward is not LM.forward:
            return await super().aforward(prompt, messages, **kwargs)
        request = self._one_request(prompt, messages, kwargs)
        return as_completion(await self._own_engine().acall(request))

    def _one_request(
        self, prompt: str | None, messages: Sequence[Message] | None, params: dict[str, Any]
    ) -> LMRequest:
        merged = self._merged(params)
        merged.pop("deadline_s", None)  # kept by whoever makes the call
        return LMRequest(
            model=self.model,
            messages=self._as_sent(as_messages(prompt, messages)),
            params=merged,
            asked=params,
            cache=False,
        )

    def _has_own_forward(self) -> bool:
        kind = type(self)
        return kind.forward is not LM.forward or kind.aforward is not LM.aforward

    @property
    def engine(self) -> Engine:
        """What makes the call; a subclass's `forward` and `aforward` where it has its own."""
        return Forward(self) if self._has_own_forward() else self._own_engine()

    def _own_engine(self) -> Engine:
        if self.model == OFFLINE_MODEL:
            return _OFFLINE
        return chat_engine(self._engine_name, self.model, self.model_type)


BUILT_IN[DSPY_LM] = LM


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

    def dump_state(self) -> dict[str, Any]:
        """Return the parameters as those of `LM("offline/extractive")`, which is the same."""
        state = super().dump_state()
        return {**state, CLASS_KEY: DSPY_LM} if type(self) is OfflineLM else state
