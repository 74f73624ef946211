"""Where vectors come from: a hosted model, a function of the user's, or offline hashing.

Not here: which texts make a batch (`run.py`), and whether rows are vectors (`rows.py`).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Concatenate, Protocol, TypeGuard

from dspylite.abc import Engine, Io, Next
from dspylite.errors import (
    CallCancelledError,
    ContentFilterError,
    ContextWindowExceededError,
    EmbeddingShapeError,
    LMError,
    LMInvalidRequestError,
)
from dspylite.models.cache.keys import describe
from dspylite.models.embedding.rows import in_order_of_index
from dspylite.models.endpoints import endpoint_id
from dspylite.models.knowledge import Price
from dspylite.models.litellm_door import known_by_table
from dspylite.models.middleware import chain, in_order
from dspylite.models.offline.hashing import hash_embedding
from dspylite.models.policies import Policies
from dspylite.models.recording import BudgetCheck, cost_of
from dspylite.runtime.budgets import current_budget
from dspylite.runtime.flow import within_deadline
from dspylite.runtime.gates import Pass, Places
from dspylite.runtime.settings import settings
from dspylite.runtime.threads import is_async
from dspylite.schema.messages import EmbeddingResponse, LMRequest, LMResponse, Usage

EmbedFunction = Callable[Concatenate[list[str], ...], Any]
"""From a list of texts to one vector per text, sync or async; takes further keywords too."""

_OF_A_TEXT = frozenset({400, 413, 422, 500})
"""Statuses that a single text may be the reason of; 500 too, because servers fail on odd texts."""


class Source(Protocol):
    """What turns one batch of texts into rows.

    Attributes:
        name: Of the model, for usage and errors.
        width: Most batches of one call under way at once.
        is_divisible: Whether a batch that fails may be sent in parts.
    """

    name: str
    width: int
    is_divisible: ClassVar[bool]

    async def rows(self, texts: list[str], io: Io) -> list[Any]:
        """Return one row per text, unchecked.

        Raises:
            EmbeddingShapeError: There was not one row per text.
        """
        ...

    def described(self, salt: Callable[[], bytes]) -> Mapping[str, Any] | None:
        """Say all that a vector depends on beside its text, to make a key of; None: not cached."""
        ...


class Hosted:
    """A hosted model: each batch is a request that goes through the policies of its endpoint."""

    is_divisible: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        params: Mapping[str, Any],
        *,
        engine: Engine,
        policies: Policies,
        width: int,
        price: Price | None,
    ) -> None:
        self.name = model
        self.width = width
        self.engine = engine
        self._params = dict(params)
        self._price = price
        middleware = policies.build(endpoint_id(model, params), model, is_remote=True)
        self._middleware = in_order([*middleware, BudgetCheck(self)])
        self._handlers: dict[Io, Next] = {}

    def price(self, *, look_up: bool) -> Price | None:
        """Return what tokens cost; None if nobody knows.

        Args:
            look_up: Whether litellm's table may be loaded for it, which takes a moment.
        """
        if self._price is None and look_up:
            return known_by_table(self.name).price
        return self._price

    async def rows(self, texts: list[str], io: Io) -> list[Any]:
        """Send one batch through the policies.

        Raises:
            LMError: It failed, and the policies gave up.
        """
        request = LMRequest(
            model=self.name,
            messages=[{"role": "user", "content": text} for text in texts],
            params=self._params,
            cache=False,
            is_written=False,
        )
        response = await self._handler(io)(request)
        self._count(response)
        if not _has_rows(response):
            raise EmbeddingShapeError(
                f"{self.name}: a middleware gave an answer without `rows`, which are an embedding "
                "model's; return what `call_next` returns."
            )
        return in_order_of_index(response.rows, len(texts))

    def _handler(self, io: Io) -> Next:
        """Return the chain around the engine; kept, because it is the same for all batches."""
        made = self._handlers.get(io)
        if made is None:
            made = self._handlers[io] = chain(self._middleware, self.engine, io)
        return made

    def _count(self, response: LMResponse) -> None:
        spending, tracker = current_budget(), settings.usage_tracker
        if spending is not None:
            price = self.price(look_up=spending.limits_money)
            spending.add(response.usage, cost_of(price, response.usage))
        if tracker is not None:
            known = cost_of(self._price, response.usage)
            tracker.add(self.name, response.usage, self._look_up_cost if known is None else known)

    def _look_up_cost(self, usage: Usage) -> float | None:
        return cost_of(self.price(look_up=True), usage)

    def described(self, salt: Callable[[], bytes]) -> Mapping[str, Any] | None:
        """Say what a vector depends on: endpoint, model, parameters, tenant."""
        request = LMRequest(model=self.name, messages=(), params=self._params)
        namespace = settings.cache_namespace
        return describe(request, kind="embedding", namespace=namespace, salt=salt)


def _has_rows(response: LMResponse) -> TypeGuard[EmbeddingResponse]:
    return isinstance(response, EmbeddingResponse)


class _KeptPlace:
    """One place of a limit, kept until the function has ended, also where its caller left before.

    A thread cannot be broken off: what it runs goes on when the caller is cancelled.
    """

    def __init__(self, places: Places) -> None:
        self.ask = places.ask
        self.look = places.look
        self._leave = places.leave
        self._lock = threading.Lock()  # guards the next three
        self._is_running = False
        self._is_gone = False
        self._left: list[tuple[Pass, float]] = []

    def leave(self, ticket: Pass, now: float) -> None:
        """Give the place back, or have it given back."""
        with self._lock:
            if self._is_running:
                self._left.append((ticket, now))
                return
            self._is_gone = True
        self._leave(ticket, now)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run the function, unless its caller has left already.

        Raises:
            CallCancelledError: It has.
        """
        with self._lock:
            if self._is_gone:
                raise CallCancelledError("The embedding function was not called: nobody waits.")
            self._is_running = True
        try:
            return function()
        finally:
            with self._lock:
                self._is_running = False
            for ticket, now in self._left:
                self._leave(ticket, now)


class Function:
    """A function of the user's."""

    is_divisible: ClassVar[bool] = False

    def __init__(
        self,
        function: EmbedFunction,
        arguments: Mapping[str, Any],
        *,
        width: int,
        places: Places | None,
        cache_id: str | None,
    ) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.width = width
        self._function = function
        self._arguments = dict(arguments)
        self._places = places
        self._cache_id = cache_id

    async def rows(self, texts: list[str], io: Io) -> list[Any]:
        """Call it with one batch; what it raises is raised as it is."""
        called = partial(self._call, texts)
        made = await within_deadline(io, called, f"the embedding function `{self.name}` ran")
        if made is None or not hasattr(made, "__len__"):
            raise EmbeddingShapeError(
                f"The embedding function returned {made!r:.100} instead of one vector per text."
            )
        rows = list(made)
        if len(rows) != len(texts):
            raise EmbeddingShapeError(
                f"{len(texts)} texts gave {len(rows)} vectors; nothing of this batch is used."
            )
        return rows

    async def _call(self, texts: list[str], io: Io) -> Any:
        if self._places is None:
            return await io.any(self._function, texts, **self._arguments)
        place = _KeptPlace(self._places)
        async with io.enter(place):
            if is_async(self._function):
                return await io.any(self._function, texts, **self._arguments)
            return await io.any(place.call, partial(self._function, texts, **self._arguments))

    def described(self, salt: Callable[[], bytes]) -> Mapping[str, Any] | None:
        """Say what a vector depends on, which nobody but the user knows: their `cache_id`."""
        del salt
        if self._cache_id is None:
            return None
        return {
            "kind": "embedding function",
            "cache_id": self._cache_id,
            "params": self._arguments,
            "namespace": settings.cache_namespace,
        }


class Hashing:
    """Offline hashing, which is as quick as a cache."""

    is_divisible: ClassVar[bool] = False

    def __init__(self, name: str, dimensions: int) -> None:
        self.name = name
        self.width = 1
        self._dimensions = dimensions

    def _hash(self, texts: list[str]) -> list[array[float]]:
        return [hash_embedding(text, self._dimensions) for text in texts]

    async def rows(self, texts: list[str], io: Io) -> list[Any]:
        """Hash one batch."""
        rows: list[Any] = list(await io.any(self._hash, texts))
        tracker = settings.usage_tracker
        if tracker is not None:
            words = sum(len(text.split()) for text in texts)
            usage = Usage(prompt_tokens=words, total_tokens=words, calls=1)
            tracker.add(self.name, usage, 0.0)
        return rows

    def described(self, salt: Callable[[], bytes]) -> Mapping[str, Any] | None:
        """Keep nothing."""
        del salt
        return None


def may_be_one_text(error: BaseException) -> bool:
    """Tell whether a batch may have failed because of one of its texts.

    Example:
        >>> from dspylite.errors import LMAuthError, LMInvalidRequestError
        >>> may_be_one_text(LMInvalidRequestError("input 3 is empty", status=400))
        True
        >>> may_be_one_text(LMAuthError("wrong key", status=401))
        False
    """
    if isinstance(error, ContextWindowExceededError | ContentFilterError):
        return True
    if isinstance(error, LMInvalidRequestError) and error.status is None:
        return True  # it was refused before it was sent: a text that no request can hold
    return isinstance(error, LMError) and error.status in _OF_A_TEXT
