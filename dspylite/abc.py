"""The contracts between the floors: what each part may expect of another, as Protocols.

Not here: any behaviour. A low file that must name a high thing names its contract here.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar, runtime_checkable

import anyio

from dspylite.errors import AdapterParseError
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse, Message
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.signature import Signature

P = ParamSpec("P")
T = TypeVar("T")
X = TypeVar("X")
T_co = TypeVar("T_co", covariant=True)


class Dual(Protocol[P, T_co]):
    """A leaf that exists in two forms: one blocks its thread, one awaits."""

    def call(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Do it on this thread."""
        ...

    def acall(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T_co]:
        """Do it on this event loop."""
        ...


class Ticket(Protocol):
    """A place in a gate's queue.

    Attributes:
        granted: Whether the holder may pass.
        look_again_at: Clock time at which a holder that still waits must call `gate.look`; None
            where it need not, because another one does or only a leaver can let it in.
        wake: Set by the holder while it waits; the gate calls it, from any thread and outside its
            lock, after it changed one of the two above.
    """

    granted: bool
    look_again_at: float | None
    wake: Callable[[], None] | None


K = TypeVar("K", bound=Ticket)


class Gate(Protocol[K]):
    """Something that lets callers in by a rule of its own, from any thread and event loop.

    `Io.enter` turns it into a context manager. No method blocks. It makes its own kind of ticket.
    """

    def ask(self, now: float) -> K:
        """Queue up; the ticket is granted at once where that is possible."""
        ...

    def look(self, now: float) -> None:
        """Let in whom the time that has passed lets in."""
        ...

    def leave(self, ticket: K, now: float) -> None:
        """Give the place back, whether the ticket was granted or still waits; a repeat is idle."""
        ...


class Clock(Protocol):
    """Where drivers read the time and spend it."""

    def now(self) -> float:
        """Return seconds from an arbitrary start, never going back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block this thread."""
        ...

    async def asleep(self, seconds: float) -> None:
        """Wait on this event loop."""
        ...

    def wait(self, event: threading.Event, seconds: float | None) -> None:
        """Block this thread until the event is set or the seconds are over."""
        ...

    async def await_(self, event: anyio.Event, seconds: float | None) -> None:
        """Wait on this event loop until the event is set or the seconds are over."""
        ...


class Io(Protocol):
    """The only door through which a plan waits; one driver blocks, the other awaits."""

    def call(self, dual: Dual[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Call a leaf in the form that fits."""
        ...

    async def any(
        self, fn: Callable[P, T | Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a user's function, sync or async, without blocking what must not block."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        ...

    def now(self) -> float:
        """Return seconds from an arbitrary start, never going back."""
        ...

    async def map(
        self, plan: Callable[[X], Awaitable[T]], items: Sequence[X], *, limit: int
    ) -> list[T]:
        """Run a plan over items, at most `limit` at a time; results in the order of the items."""
        ...

    def time_left(self) -> float | None:
        """Return the seconds until the deadline of the call in progress; None without one."""
        ...

    def enter(self, gate: Gate[K]) -> AbstractAsyncContextManager[K]:
        """Wait for a place in `gate`, hold it for the block, give it back.

        Raises:
            DeadlineExceededError: The call's time ran out before a place was free.
        """
        ...


class Engine(Protocol):
    """What reaches a provider: a `Dual` from request to response that raises our errors only."""

    def call(self, request: LMRequest) -> LMResponse:
        """Send and wait on this thread."""
        ...

    async def acall(self, request: LMRequest) -> LMResponse:
        """Send and wait on this event loop."""
        ...


Next = Callable[[LMRequest], Awaitable[LMResponse]]
"""The rest of the chain, as a middleware sees it."""


class Middleware(Protocol):
    """A policy around a call; one body serves sync and async."""

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Answer the request, usually by awaiting `call_next(request)` once or more."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """What programs ask of a language model."""

    model: str

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do beyond text: `"json_schema"`, `"json_object"` ..."""
        ...

    @property
    def default_temperature(self) -> float | None:
        """The temperature used when a call names none."""
        ...

    async def plan(
        self,
        io: Io,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        *,
        stream: bool = False,
    ) -> LMResponse:
        """Run one call through the model's whole chain of policies.

        Args:
            io: The driver.
            messages: The chat so far.
            params: What this call asks for, over the model's own parameters.
            stream: Give `response.stream` instead of the outputs; the caller must close it.
        """
        ...


@runtime_checkable
class Adapter(Protocol):
    """Turns a signature and values into messages, and an answer into values. Pure text."""

    calls_models: ClassVar[bool]
    """Whether it makes calls of its own, beside the one that is read."""
    has_own_call: ClassVar[bool]
    """Whether it asks the model itself, by `__call__` and `acall`."""

    @property
    def fallback(self) -> Adapter | None:
        """The adapter to try once when an answer does not parse; None for none."""
        ...

    def needs_capabilities(self, signature: type[Signature]) -> bool:
        """Whether `prepare` looks at the model's capabilities, which may take a moment to find."""
        ...

    def prepare(
        self,
        signature: type[Signature],
        inputs: Mapping[str, Any],
        lm: LanguageModel,
        params: Mapping[str, Any],
    ) -> AdapterPlan:
        """Settle what is written, what is left to features of the model, and the parameters."""
        ...

    def format(
        self,
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[Message]:
        """Write the prompt."""
        ...

    def __call__(
        self,
        lm: LanguageModel,
        lm_kwargs: Mapping[str, Any],
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Ask a model and read its answers, on this thread."""
        ...

    def format_repair(
        self, signature: type[Signature], answer: str, error: AdapterParseError
    ) -> list[Message]:
        """Write what a model is told when its answer cannot be read."""
        ...

    async def read(self, io: Io, plan: AdapterPlan, output: LMOutput) -> dict[str, Any]:
        """Read the outputs from an answer, each with its declared type.

        Raises:
            AdapterParseError: The answer is not one complete value for every output.
        """
        ...


class StreamEar(Protocol):
    """Hears the answers to one question while they are written."""

    async def hear(
        self, io: Io, opened: LMResponse, adapter: Adapter, plan: AdapterPlan
    ) -> LMResponse:
        """Pass on what is new in each piece of an answer; return the whole answer.

        Args:
            io: The driver.
            opened: What the model gave: an open stream, or a whole answer.
            adapter: How it was asked.
            plan: What it was asked.

        Raises:
            LMError: The stream broke.
        """
        ...

    async def finish(self, io: Io, outputs: Mapping[str, Any]) -> None:
        """Pass on what is still missing of the outputs, which have been read."""
        ...


@runtime_checkable
class StreamSink(Protocol):
    """Takes what a program says while it runs, on its way to whoever reads the stream."""

    async def send(self, value: Any) -> None:
        """Say something of one's own, when there is room for it."""
        ...

    def send_nowait(self, value: Any) -> None:
        """Say something of one's own, without waiting."""
        ...

    def ear_for(self, predictor: object) -> StreamEar | None:
        """Return who wants to hear the next answer of a predictor; None if nobody does."""
        ...


@runtime_checkable
class Callback(Protocol):
    """Hears of calls; see `BaseCallback` for the methods. All are optional."""


@runtime_checkable
class Program(Protocol):
    """Anything that can be called from a thread and awaited on a loop, such as a `Module`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on this thread."""
        ...

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Run on this event loop."""
        ...
