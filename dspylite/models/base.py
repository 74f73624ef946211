"""`BaseLM`: what every language model has in common, whatever engine answers.

Not here: the engines, and the policies of the chain (`models/middleware.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, TextIO

from dspylite.abc import Engine, Io, Middleware, Next
from dspylite.errors import LMConfigurationError
from dspylite.models.answers import read_chat_response
from dspylite.models.breaker import CircuitBreaker, Health
from dspylite.models.endpoints import endpoint_id
from dspylite.models.fallback import Fallback
from dspylite.models.knowledge import Price, checked_price
from dspylite.models.middleware import (
    chain,
    in_order,
)
from dspylite.models.parameters import check_params, copied
from dspylite.models.policies import POLICY_NAMES, Policies
from dspylite.models.recording import (
    BudgetCheck,
    Record,
    RecordedStream,
    plain_outputs,
    told_outputs,
)
from dspylite.models.states import dump_lm, load_lm
from dspylite.models.streams import LMStream
from dspylite.runtime.calls import Observed
from dspylite.runtime.cancellation import check_cancelled
from dspylite.runtime.clock import Deadline
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.history import History
from dspylite.runtime.inspection import pretty_print_history
from dspylite.runtime.settings import check_deadline, checked_callbacks, settings
from dspylite.runtime.workers import call_in_thread
from dspylite.schema.messages import LMRequest, LMResponse, Message, Usage
from dspylite.schema.secrets import shown_params

ModelType = Literal["chat", "text", "responses"]

_POLICY_CHANGES = POLICY_NAMES | {"num_retries"}
_OF_THE_LM = sorted(_POLICY_CHANGES | {"engine", "price", "capabilities", "model_type"})
_NOT_SENT = frozenset({"cache", "rollout_id"})  # of the cache, and not the provider's
_ENDPOINT = ("api_key", "api_base", "base_url")


class BaseLM:
    """A language model that programs can call from threads and tasks.

    Subclass it for a model of your own: override `forward(prompt, messages, **kwargs)` and return
    an OpenAI-shaped completion (object or dict), and `aforward` too if the model has an async form.

    Args:
        model: Name of the model; with the provider in front for hosted ones.
        model_type: Kind of endpoint.
        temperature: Sampling temperature; None leaves it to the provider.
        max_tokens: Longest answer in tokens; None leaves it to the provider.
        cache: Whether answers may be reused.
        callbacks: Told of every call, after those of the settings.
        num_retries: Further attempts after a failure that may pass; each is one request, and 0
            sends each request once. None: 3, and overload is waited out (see `Retry`).
        price: US dollars for a million tokens read and for a million written, such as
            `(0.15, 0.6)`; for `budget(usd=...)`.
        **kwargs: Sent with every request (`top_p`, `stop`, `api_key`, `api_base`, `timeout` ...),
            but for the policies, which are named as in `Policies`.

    Raises:
        LMConfigurationError: A parameter cannot work.
    """

    default_capabilities: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        model: str,
        model_type: ModelType = "chat",
        temperature: float | None = None,
        max_tokens: int | None = None,
        cache: bool = True,
        callbacks: Sequence[Any] | None = None,
        num_retries: int | None = None,
        price: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise LMConfigurationError(
                f"`model` must name a model, such as 'openai/gpt-4o-mini', not {model!r}."
            )
        check_params({**kwargs, "temperature": temperature, "max_tokens": max_tokens})
        self.model = model
        self.model_type = model_type
        self.cache = cache
        self.callbacks = checked_callbacks("callbacks", callbacks)
        self.policies = Policies(
            num_retries=num_retries,
            **{name: kwargs.pop(name) for name in list(kwargs) if name in POLICY_NAMES},
        )
        given = {"temperature": temperature, "max_tokens": max_tokens, **kwargs}
        self.kwargs: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.history = History()
        self._price = checked_price(price)
        self._start()

    def _start(self) -> None:
        """Make what an LM has in this process only."""
        self.middleware = self._build_middleware(self.kwargs)
        self._handlers: dict[Io, tuple[tuple[Middleware, ...], Engine, Next]] = {}

    def _build_middleware(self, params: Mapping[str, Any]) -> tuple[Middleware, ...]:
        endpoint = endpoint_id(self.model, params)
        return self.policies.build(
            endpoint, self.model, is_remote=self.is_remote, cache_kind=self.cache_kind
        )

    @property
    def cache_kind(self) -> str | None:
        """What tells cached answers from those of other models with the same name and parameters.

        None, as here: answers are not reused. A model of your own whose answers depend on nothing
        but its name, parameters and messages may return a text of its own.
        """
        return None

    @property
    def is_remote(self) -> bool:
        """Whether calls go over a network, so that there is an endpoint to be careful with."""
        return False

    @property
    def num_retries(self) -> int:
        """Further attempts after a failure that may pass."""
        return self.policies.retries

    def health(self) -> Health:
        """Tell how the endpoint has been lately, as its circuit breaker sees it.

        Example:
            >>> BaseLM("my/model", circuit_breaker=True).health().state
            'closed'
        """
        for policy in self.middleware:
            if isinstance(policy, CircuitBreaker):
                return policy.health()
        raise LMConfigurationError(
            f"`{self.model}` has no circuit breaker that would know; give it "
            "`circuit_breaker=True`."
        )

    def preload(self) -> None:
        """Load what the first call would load, here that of the fallbacks; nothing is sent."""
        for policy in self.middleware:
            for lm in policy.lms if isinstance(policy, Fallback) else ():
                if isinstance(lm, BaseLM):
                    lm.preload()

    @property
    def engine(self) -> Engine:
        """What makes the call; here the overridden `forward` and `aforward`."""
        return Forward(self)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do beyond text."""
        return self.default_capabilities

    @property
    def default_temperature(self) -> float | None:
        """The temperature used when a call names none."""
        return self.kwargs.get("temperature")

    def forward(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one request with an OpenAI-shaped completion; override it in your own model."""
        del prompt, messages, kwargs
        raise LMConfigurationError(
            f"`{type(self).__name__}` has no `forward(prompt, messages, **kwargs)`; define it, or "
            "use `LM(...)`."
        )

    async def aforward(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one request; unless overridden, through `forward` in a worker thread."""
        return await call_in_thread(self.forward, prompt, messages, **kwargs)

    async def plan(
        self,
        io: Io,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        stream: bool = False,
    ) -> LMResponse:
        """Run one call through the chain, tell the callbacks, count it and keep it.

        A call whose answer is streamed is told, counted and kept when its stream has ended.

        Raises:
            LMError: The call failed and the chain gave up.
            CallCancelledError: Somebody asked the work that makes the call to stop.
        """
        check_cancelled()
        if params:
            _check_call(params)
        merged = self._merged(params)
        deadline_s = merged.pop("deadline_s", None)
        messages = self._as_sent(messages)
        request = LMRequest(
            model=self.model,
            messages=messages,
            params=merged,
            asked=params,
            stream=stream,
            cache=self.cache if params.get("cache") is None else params["cache"],
            rollout_id=params.get("rollout_id", self.kwargs.get("rollout_id")),
        )
        record = Record(self, request)
        with (
            Deadline(
                settings.deadline_s
                if deadline_s is None
                else check_deadline("deadline_s", deadline_s)
            ),
            Observed("lm", self, {"messages": messages, **shown_params(params)}) as call,
        ):
            started = io.now()
            response = await self._handler(io, request)(request)
            if response.stream is not None:
                call.leave_open()
                return replace(response, stream=RecordedStream(response, record, call, io))
            response = record.keep(response, io.now() - started)
            if call.is_heard:
                call.outputs = told_outputs(response)
        return response

    def _merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in {**self.kwargs, **params}.items()
            if value is not None and name not in _NOT_SENT
        }

    def _handler(self, io: Io, request: LMRequest) -> Next:
        """Return the chain around the engine; kept, because it is the same for all calls."""
        if any(name in request.asked for name in _ENDPOINT):
            # Another tenant or endpoint has limits and troubles of its own.
            return self._chain(self._build_middleware(request.params), self.engine, io)
        engine, kept = self.engine, self._handlers.get(io)
        if kept is not None and kept[0] is self.middleware and kept[1] is engine:
            return kept[2]
        made = self._chain(self.middleware, engine, io)
        self._handlers[io] = (self.middleware, engine, made)
        return made

    def _chain(self, middleware: tuple[Middleware, ...], engine: Engine, io: Io) -> Next:
        return chain(in_order([*middleware, BudgetCheck(self)]), engine, io)

    def _as_sent(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages in the form that the model wants them."""
        return messages

    def price(self, *, look_up: bool) -> Price | None:
        """Return what the model's tokens cost; None if nobody knows.

        Args:
            look_up: Whether a table may be loaded for it, which takes a moment.
        """
        del look_up
        return self._price

    def cost_of(self, usage: Usage) -> float | None:
        """Return what tokens cost at this model in US dollars; None if nobody knows.

        Prices are the LM's own, else those of litellm's table, which is loaded for it and never
        fetched.

        Example:
            >>> from dspylite.schema.messages import Usage
            >>> BaseLM("my/model", price=(1, 4)).cost_of(Usage(prompt_tokens=1_000_000))
            1.0
        """
        price = self.price(look_up=True)
        return None if price is None else price.of(usage)

    def stream(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> LMStream:
        """Ask the model and give its answer piece by piece, as it is written.

        The retries and fallbacks of the LM work until the stream is open. One that breaks or is cut
        raises where it breaks, and is not begun anew, because pieces of it were seen.

        Args:
            prompt: One user message, if `messages` is not given.
            messages: The chat so far.
            **kwargs: Parameters that override the LM's own for this call.

        Returns:
            An iterator of `LMDelta`s, to be used in a `with` block, which closes the connection;
            its `response` is the whole answer, with its usage, after the last piece.

        Raises:
            LMError: The call failed.
        """
        plan = self.plan(BLOCKING, as_messages(prompt, messages), kwargs, stream=True)
        return LMStream(run_flow(plan))

    async def astream(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> LMStream:
        """Ask the model and give its answer piece by piece to `async for`; otherwise as `stream`.

        Use it in an `async with` block: `async with await lm.astream("Hi") as stream:`.
        """
        return LMStream(await self.plan(ASYNC, as_messages(prompt, messages), kwargs, stream=True))

    def __call__(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> list[str | dict[str, Any]]:
        """Ask the model and wait on this thread.

        Args:
            prompt: One user message, if `messages` is not given.
            messages: The chat so far.
            **kwargs: Parameters that override the LM's own for this call.

        Returns:
            The `n` answers: texts, or dicts where an answer holds more than text.

        Raises:
            LMError: The call failed.
        """
        plan = self.plan(BLOCKING, as_messages(prompt, messages), kwargs)
        return plain_outputs(_accepted(run_flow(plan)))

    async def acall(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> list[str | dict[str, Any]]:
        """Ask the model and await it; otherwise as `__call__`."""
        response = await self.plan(ASYNC, as_messages(prompt, messages), kwargs)
        return plain_outputs(_accepted(response))

    def inspect_history(self, n: int = 1, file: TextIO | None = None) -> None:
        """Print the last `n` calls of this LM; otherwise as `dspylite.inspect_history`."""
        pretty_print_history(self.history, n, file)

    def copy(self, **changes: Any) -> Self:
        """Return an LM with an empty history of its own and some parameters changed.

        A change to None takes the parameter away.
        """
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        twin.history = History()
        merged = {name: copied(value) for name, value in self.kwargs.items()}
        policies = {name: changes.pop(name) for name in list(changes) if name in _POLICY_CHANGES}
        for name, value in changes.items():
            if name in {"model", "model_type", "cache"}:
                setattr(twin, name, value)
            elif name == "callbacks":
                twin.callbacks = checked_callbacks(name, value)
            elif name == "price":
                twin._price = checked_price(value)  # noqa: SLF001  # ours
            else:
                merged[name] = value
        twin.kwargs = {k: v for k, v in merged.items() if v is not None}
        check_params(twin.kwargs)
        twin.policies = self.policies.with_changes(policies)
        twin._start()  # noqa: SLF001  # ours
        return twin

    def dump_state(self) -> dict[str, Any]:
        """Return the parameters and policies as plain data, for a file of JSON.

        Without secrets: keys, headers and what is secret in URLs are left out, and callbacks. A
        subclass with more than its parameters overrides it, and `load_state`.

        Raises:
            SavingError: A parameter is no data.
        """
        state: dict[str, Any] = dump_lm(self, self.kwargs, self.policies, self._price)
        return state

    @classmethod
    def load_state(cls, state: Mapping[str, Any], *, allow_custom_lm_class: bool = False) -> BaseLM:
        """Make an LM from what `dump_state` returned, here or in DSPy.

        Args:
            state: The parameters.
            allow_custom_lm_class: Whether the state is trusted: it may name the endpoint, to which
                prompts then go, and a class, which is then imported. Otherwise an endpoint is left
                out with a warning, and a class refused.

        Raises:
            SavingError: No LM can be made of it.

        Example:
            >>> BaseLM.load_state({"model": "openai/gpt-4o-mini", "temperature": 0.2})
            LM('openai/gpt-4o-mini', temperature=0.2)
        """
        return load_lm(BaseLM, cls, state, trusted=allow_custom_lm_class)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: the state of the policies."""
        here = {"middleware", "_handlers"}
        return {name: value for name, value in self.__dict__.items() if name not in here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take part in what this process knows of the endpoint."""
        self.__dict__.update(state)
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the parameters, not the history."""
        twin = self.copy()
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:
        shown = {
            **dict.fromkeys(self.kwargs, "..."),  # the secret ones named too
            **shown_params(self.kwargs),
        }
        inside = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.model!r}{inside})"


def _check_call(params: Mapping[str, Any]) -> None:
    """Refuse what a single call cannot change, and what no request could be made with.

    Raises:
        LMConfigurationError: There is such a parameter.
    """
    for name in _OF_THE_LM:
        if name in params:
            raise LMConfigurationError(
                f"`{name}` belongs to the LM and not to a call: write "
                f"`lm.copy({name}={params[name]!r})(...)`."
            )
    check_params(params)


class Forward:
    """The engine of a subclass of the user's: its own `forward` and `aforward`."""

    __slots__ = ("_lm",)

    def __init__(self, lm: BaseLM) -> None:
        self._lm = lm

    def call(self, request: LMRequest) -> LMResponse:
        """Answer by `forward`."""
        answer = self._lm.forward(None, request.messages, **request.params)
        return read_chat_response(answer, model=request.model)

    async def acall(self, request: LMRequest) -> LMResponse:
        """Answer by `aforward`."""
        answer = await self._lm.aforward(None, request.messages, **request.params)
        return read_chat_response(answer, model=request.model)


def _accepted(response: LMResponse) -> LMResponse:
    """Accept an answer whose reader takes it as it is."""
    if response.verdict is not None:
        response.verdict.accept()
    return response


def as_messages(prompt: str | None, messages: Sequence[Message] | None) -> Sequence[Message]:
    """Return the chat that is meant by either of two arguments."""
    if messages:
        return messages
    if prompt is None:
        raise LMConfigurationError("An LM needs a prompt: `lm('...')` or `lm(messages=[...])`.")
    return [{"role": "user", "content": prompt}]
