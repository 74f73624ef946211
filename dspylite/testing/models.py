"""`FakeLM` and `FakeEmbedder`: models whose answers a test writes down.

They remember every call. Not here: a fake provider behind real HTTP (`testing/server.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from dspylite.abc import Engine, Io, Middleware, Next
from dspylite.adapters.base import Adapter
from dspylite.adapters.sections import ChatAdapter
from dspylite.models.base import BaseLM
from dspylite.models.embedder import Embedder
from dspylite.models.middleware import Place
from dspylite.models.offline.engine import respond
from dspylite.models.offline.hashing import hash_embedding
from dspylite.runtime.gates import Pass, wake
from dspylite.schema.messages import LMRequest, LMResponse
from dspylite.schema.signature import OutputField, make_signature

Scripted = str | Mapping[str, Any] | LMResponse | BaseException
"""One answer: a text, outputs by name, a whole response, or an exception to raise."""

Answer = Scripted | Callable[[LMRequest], Scripted]
Answers = Sequence[Answer] | Mapping[str, Answer] | Callable[[LMRequest], Scripted]


class _Door:
    """A gate that lets everybody in while open and nobody while closed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all below; wakes are called outside it
        self._closed = 0
        self._until: int | None = None
        self._waiting: list[Pass] = []
        self.inside = 0
        self.most_inside = 0
        self.arrived = 0

    def ask(self, now: float) -> Pass:
        del now
        ticket = Pass()
        with self._changed:
            self.arrived += 1
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self._changed.notify_all()
            if not self._closed:
                ticket.granted = True
                return ticket
            self._waiting.append(ticket)
            full = self._until is not None and len(self._waiting) >= self._until
        if full:
            self.open()
        return ticket

    def look(self, now: float) -> None:
        """Do nothing: time opens no door."""

    def leave(self, ticket: Pass, now: float) -> None:
        del now
        with self._changed:
            self.inside -= 1
            if not ticket.granted:
                self._waiting.remove(ticket)

    def close(self, until: int | None) -> None:
        with self._changed:
            self._closed, self._until = 1, until

    def open(self) -> None:
        with self._changed:
            self._closed, self._until = 0, None
            let_in, self._waiting = self._waiting, []
            for ticket in let_in:
                ticket.granted = True
        for ticket in let_in:
            wake(ticket)

    def wait_for(self, count: int, timeout_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.arrived >= count, timeout_s):
                raise TimeoutError(f"{self.arrived} of {count} calls arrived within {timeout_s} s.")


class _HoldAtDoor:
    """The middleware that makes a caller wait at the door."""

    place: ClassVar[Place] = "attempt"

    def __init__(self, door: _Door) -> None:
        self._door = door

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        async with io.enter(self._door):
            return await call_next(request)


class FakeLM(BaseLM):
    """An LM that gives scripted answers, remembers requests and can hold its callers.

    Safe to call from any number of threads and loops. Usage counts words.

    Args:
        answers: A list taken one by one (when it is used up, `default` answers); a dict from a
            piece of the last message to the answer; or a function of the request. An answer is a
            text, a dict of outputs (written as the adapter's answers look), an `LMResponse`, or an
            exception.
        default: Answer when the script has none.
        adapter: Whose form dicts are written in; `ChatAdapter` unless given.
        **kwargs: As of every LM.

    Example:
        >>> from dspylite.programs.predict import Predict
        >>> lm = FakeLM([{"answer": "Paris"}])
        >>> predict = Predict("question -> answer")
        >>> predict.lm = lm
        >>> predict(question="Capital of France?").answer, len(lm.requests)
        ('Paris', 1)
    """

    def __init__(
        self,
        answers: Answers = (),
        *,
        default: Answer = "No more answers are scripted.",
        adapter: Adapter | None = None,
        model: str = "fake/lm",
        num_retries: int = 0,
        **kwargs: Any,
    ) -> None:
        self._engine = _Script(answers, default, adapter or ChatAdapter())
        self._door = _Door()
        super().__init__(model, num_retries=num_retries, **kwargs)

    def _build_middleware(self, params: Mapping[str, Any]) -> tuple[Middleware, ...]:
        return (*super()._build_middleware(params), _HoldAtDoor(self._door))

    @property
    def engine(self) -> Engine:
        """The script."""
        return self._engine

    @property
    def requests(self) -> tuple[LMRequest, ...]:
        """Every request so far, in the order they were answered."""
        return tuple(self._engine.requests)

    @property
    def max_in_flight(self) -> int:
        """Most calls that were under way at once."""
        return self._door.most_inside

    @contextmanager
    def hold(self, *, until: int | None = None) -> Generator[None, None, None]:
        """Hold all callers during the block; they are let go at its end.

        Args:
            until: Let all go as soon as so many wait, which proves that they ran at the same time.
        """
        self._door.close(until)
        try:
            yield
        finally:
            self._door.open()

    def wait_for_calls(self, count: int, *, timeout_s: float = 5.0) -> None:
        """Block until so many calls have arrived in all, held ones included.

        Raises:
            TimeoutError: They did not arrive in time.
        """
        self._door.wait_for(count, timeout_s)


class _Script:
    def __init__(self, answers: Answers, default: Answer, adapter: Adapter) -> None:
        self._lock = threading.Lock()  # guards `_left` and `requests`
        self._answers = answers
        self._left = [] if callable(answers) or isinstance(answers, Mapping) else list(answers)
        self._default = default
        self._adapter = adapter
        self.requests: list[LMRequest] = []

    def call(self, request: LMRequest) -> LMResponse:
        answer = self._pick(request)
        with self._lock:
            self.requests.append(request)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, LMResponse):
            return answer
        text = answer if isinstance(answer, str) else written(answer, self._adapter)
        return respond(request, text)

    async def acall(self, request: LMRequest) -> LMResponse:
        return self.call(request)

    def _pick(self, request: LMRequest) -> Answer:
        if callable(self._answers):
            return self._answers(request)
        if isinstance(self._answers, Mapping):
            last = str(request.messages[-1]["content"])
            return next((a for piece, a in self._answers.items() if piece in last), self._default)
        with self._lock:
            return self._left.pop(0) if self._left else self._default


def written(outputs: Mapping[str, Any], adapter: Adapter) -> str:
    """Write outputs as a model would that follows an adapter's prompt."""
    signature = make_signature({name: (Any, OutputField()) for name in outputs})
    return adapter.format_assistant_message_content(signature, outputs)


class FakeEmbedder(Embedder):
    """An embedder with deterministic vectors of unit length that remembers every batch it made.

    Args:
        dimensions: Length of a vector.
        **kwargs: As of every embedder.

    Example:
        >>> embedder = FakeEmbedder(dimensions=4)
        >>> embedder.embed(["a", "b", "a"]).shape, embedder.batches
        ((3, 4), [['a', 'b']])
    """

    def __init__(self, dimensions: int = 8, **kwargs: Any) -> None:
        self.batches: list[list[str]] = []
        self._dimensions = dimensions
        super().__init__(self._vectors, **kwargs)

    def _vectors(self, texts: list[str]) -> list[Sequence[float]]:
        self.batches.append(list(texts))
        return [hash_embedding(text, self._dimensions) for text in texts]
