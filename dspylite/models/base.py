"""`BaseLM`: what every language model has in common, whatever engine answers.

Not here: the engines, and the policies of the chain (`models/middleware.py`).
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from dspylite.abc import Engine, Io, Middleware
from dspylite.errors import LMConfigurationError
from dspylite.models.middleware import Retry, chain
from dspylite.models.translate import read_chat_response
from dspylite.runtime.bridge import call_in_thread
from dspylite.runtime.calls import Observed
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.tracking import History, record_call
from dspylite.schema.messages import (
    LMOutput,
    LMRequest,
    LMResponse,
    Message,
    is_secret,
    without_secrets,
)

ModelType = Literal["chat", "text", "responses"]

GLOBAL_HISTORY = History()
"""The last calls of all LMs of this process."""


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
        num_retries: Further attempts after a failure that may pass.
        **kwargs: Sent with every request (`top_p`, `stop`, `api_key`, `api_base`, `timeout` ...).

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
        num_retries: int = 3,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise LMConfigurationError(
                f"`model` must name a model, such as 'openai/gpt-4o-mini', not {model!r}."
            )
        check_numbers(temperature=temperature, max_tokens=max_tokens, timeout=kwargs.get("timeout"))
        self.model = model
        self.model_type = model_type
        self.cache = cache
        self.callbacks = tuple(callbacks or ())
        self.num_retries = num_retries
        given = {"temperature": temperature, "max_tokens": max_tokens, **kwargs}
        self.kwargs: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.history = History()
        self.middleware: tuple[Middleware, ...] = (Retry(max_retries=num_retries),)

    @property
    def engine(self) -> Engine:
        """What makes the call; here the overridden `forward` and `aforward`."""
        return _Forward(self)

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
        self, io: Io, messages: Sequence[Message], params: Mapping[str, Any]
    ) -> LMResponse:
        """Run one call through the chain, tell the callbacks, count it and keep it.

        Raises:
            LMError: The call failed and the chain gave up.
        """
        merged = {k: v for k, v in {**self.kwargs, **params}.items() if v is not None}
        request = LMRequest(model=self.model, messages=messages, params=merged)
        shown = without_secrets(params)
        with Observed("lm", self, {"messages": messages, **shown}) as call:
            response = await chain(self.middleware, self.engine, io)(request)
            call.outputs = [_plain_output(output) for output in response.outputs]
        record_call(
            model=self.model,
            messages=messages,
            params=merged,
            response=response,
            histories=(self.history, GLOBAL_HISTORY),
        )
        return response

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
        response = run_flow(self.plan(BLOCKING, _as_messages(prompt, messages), kwargs))
        return [_plain_output(output) for output in response.outputs]

    async def acall(
        self,
        prompt: str | None = None,
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> list[str | dict[str, Any]]:
        """Ask the model and await it; otherwise as `__call__`."""
        response = await self.plan(ASYNC, _as_messages(prompt, messages), kwargs)
        return [_plain_output(output) for output in response.outputs]

    def copy(self, **changes: Any) -> Self:
        """Return an LM with an empty history of its own and some parameters changed.

        A change to None takes the parameter away.
        """
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        twin.history = History()
        merged = {name: _own_copy(value) for name, value in self.kwargs.items()}
        for name, value in changes.items():
            if name == "num_retries":
                twin.num_retries = value
                twin.middleware = (Retry(max_retries=value), *self.middleware[1:])
            elif name in {"model", "model_type", "cache", "callbacks"}:
                setattr(twin, name, value)
            else:
                merged[name] = value
        twin.kwargs = {k: v for k, v in merged.items() if v is not None}
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the parameters, not the history."""
        twin = self.copy()
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:
        shown = {
            name: "..." if is_secret(name) else _without_userinfo(value)
            for name, value in self.kwargs.items()
        }
        inside = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({self.model!r}{inside})"


def _own_copy(value: Any) -> Any:
    """Copy what a parameter can be changed in; a client or function among them is shared."""
    if isinstance(value, dict):
        return {key: _own_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_own_copy(item) for item in value]
    return value


def _without_userinfo(value: Any) -> Any:
    """Hide `user:password@` of a URL."""
    return re.sub(r"://[^/@\s]+@", "://...@", value) if isinstance(value, str) else value


class _Forward:
    """The engine of a `BaseLM` subclass: its own `forward` and `aforward`."""

    __slots__ = ("_lm",)

    def __init__(self, lm: BaseLM) -> None:
        self._lm = lm

    def call(self, request: LMRequest) -> LMResponse:
        answer = self._lm.forward(None, request.messages, **request.params)
        return read_chat_response(answer, model=request.model)

    async def acall(self, request: LMRequest) -> LMResponse:
        answer = await self._lm.aforward(None, request.messages, **request.params)
        return read_chat_response(answer, model=request.model)


def _as_messages(prompt: str | None, messages: Sequence[Message] | None) -> Sequence[Message]:
    if messages:
        return messages
    if prompt is None:
        raise LMConfigurationError("An LM needs a prompt: `lm('...')` or `lm(messages=[...])`.")
    return [{"role": "user", "content": prompt}]


def _plain_output(output: LMOutput) -> str | dict[str, Any]:
    if not output.reasoning and not output.tool_calls:
        return output.text
    plain: dict[str, Any] = {"text": output.text}
    if output.reasoning:
        plain["reasoning_content"] = output.reasoning
    if output.tool_calls:
        plain["tool_calls"] = [dict(call) for call in output.tool_calls]
    return plain


def check_url(url: Any) -> None:
    """Refuse an endpoint that no request can be sent to; None is the provider's own.

    Raises:
        LMConfigurationError: It is no http or https URL with a host.
    """
    if url is None:
        return
    try:
        parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    except ValueError:  # such as an unclosed bracket
        parts = None
    if parts is None or parts.scheme not in {"http", "https"} or not parts.netloc:
        raise LMConfigurationError(
            f"`api_base` must be a URL such as 'http://localhost:8000/v1', not {url!r}."
        )


def check_numbers(**numbers: Any) -> None:
    """Refuse parameters that no provider could take; None is not given.

    Raises:
        LMConfigurationError: One is no number, or too small.
    """
    for name, value in numbers.items():
        if value is None:
            continue
        least = 0 if name == "temperature" else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            bound = "0 or more" if name == "temperature" else "more than 0"
            raise LMConfigurationError(f"`{name}` must be a number of {bound}, not {value!r}.")
