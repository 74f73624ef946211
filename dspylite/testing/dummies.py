"""`DummyLM` and `DummyVectorizer`: DSPy's fakes, as tests written for it use them.

Not here: `FakeLM`, which does more (`testing/models.py`).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dspylite.adapters.base import Adapter
from dspylite.adapters.sections import ChatAdapter
from dspylite.errors import LMConfigurationError, MissingExtraError
from dspylite.models.numpy_door import load_numpy
from dspylite.models.offline.engine import respond
from dspylite.schema.messages import LMOutput, LMRequest, LMResponse, Message
from dspylite.testing.models import FakeLM, written

_USED_UP = "No more responses"
_REASONING = "Some reasoning"
"""DSPy's texts, which tests may compare with."""


class DummyLM(FakeLM):
    """An LM that gives scripted outputs, with DSPy's arguments and manners.

    Everything that `FakeLM` has works here too: threads, loops, `requests`, `hold`.

    Args:
        answers: A list of outputs by name, taken one by one, `n` of them for a call with `n`; when
            it is used up, an `answer` says so. Or a dict from a piece of the last message to
            outputs.
        follow_examples: Whether the answer is that of the demo whose inputs are those of the call;
            `answers` are not used then.
        reasoning: Whether answers carry a `reasoning_content`, as those of reasoning models.
        adapter: Whose form outputs are written in; `ChatAdapter` unless given.

    Attributes:
        answers: As given.

    Raises:
        LMConfigurationError: `answers` is neither of these.

    Example:
        >>> from dspylite.programs.predict import Predict
        >>> predict = Predict("question -> answer")
        >>> predict.lm = DummyLM([{"answer": "red"}])
        >>> [predict(question="What colour is it?").answer for _ in range(2)]
        ['red', 'No more responses']
    """

    def __init__(
        self,
        answers: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
        follow_examples: bool = False,
        reasoning: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        by_piece = isinstance(answers, Mapping)
        each = list(answers.values() if isinstance(answers, Mapping) else answers)
        for outputs in each:
            if not isinstance(outputs, Mapping):
                # Callers without a checker come here.
                kind = "dict of dicts" if by_piece else "list of dicts"  # type: ignore[unreachable]
                raise LMConfigurationError(
                    f"`DummyLM` takes a {kind}, such as `[{{'answer': 'red'}}]`, and one of them "
                    f"is {outputs!r:.200}; `FakeLM` takes texts, errors and functions too."
                )
        self.answers = answers
        self.follow_examples = follow_examples
        self.reasoning = reasoning
        self.adapter = adapter or ChatAdapter()
        self._left = [] if by_piece else each
        self._taking = threading.Lock()  # guards `_left`
        super().__init__(self._answer, model="dummy", temperature=0.0, max_tokens=1000)

    def get_convo(self, index: int) -> tuple[Any, Any]:
        """Return the messages and the outputs of a call in the history."""
        entry = self.history[index]
        return entry["messages"], entry["outputs"]

    def _answer(self, request: LMRequest) -> LMResponse:
        texts = [self._text(request) for _ in range(max(1, int(request.params.get("n") or 1)))]
        thought = _REASONING if self.reasoning else None
        once = replace(request, params={**request.params, "n": 1})  # each text is counted once
        outputs = [LMOutput(text=t, finish_reason="stop", reasoning=thought) for t in texts]
        return replace(respond(once, " ".join(texts)), outputs=tuple(outputs))

    def _text(self, request: LMRequest) -> str:
        last = str(request.messages[-1]["content"])
        if self.follow_examples:
            return _followed(request.messages, last) or _USED_UP
        if isinstance(self.answers, Mapping):
            found = next((a for piece, a in self.answers.items() if piece in last), None)
            return _USED_UP if found is None else written(found, self.adapter)
        with self._taking:
            outputs = self._left.pop(0) if self._left else {"answer": _USED_UP}
        return written(outputs, self.adapter)


def _followed(messages: Sequence[Message], last: str) -> str | None:
    """Find the answer that a demo gives to the inputs of the last message; the nearest demo's."""
    asked = last.partition("\n\n")[0]
    for place in range(len(messages) - 2, 0, -1):
        shown, answer = messages[place - 1], messages[place]
        if answer["role"] == "assistant" and asked in str(shown["content"]):
            return str(answer["content"])
    return None


class DummyVectorizer:
    """Turns texts into vectors by counting pieces of them; equal texts give equal vectors.

    Each vector has the mean 0 and the length 1. The numbers are those of DSPy's. Needs the extra
    `numpy`; `FakeEmbedder` needs nothing.

    Args:
        max_length: Length of a vector.
        n_gram: Characters in a piece.

    Raises:
        MissingExtraError: When called without numpy.

    Example:
        >>> DummyVectorizer(max_length=8)(["hello", "hello there"]).shape
        (2, 8)
    """

    def __init__(self, max_length: int = 100, n_gram: int = 2) -> None:
        self.max_length = max_length
        self.n_gram = n_gram
        own = random.Random(123)  # the same numbers each time
        self.coeffs = [own.randrange(1, _PRIME) for _ in range(n_gram)]

    def __call__(self, texts: Sequence[str]) -> Any:
        """Return an array of float32 of shape (number of texts, max_length)."""
        numpy = load_numpy()
        if numpy is None:
            raise MissingExtraError(
                "`DummyVectorizer` gives numpy arrays: `pip install dspylite[numpy]`, or use "
                "`FakeEmbedder(...).embed(texts)`, which needs no numpy."
            )
        counts = numpy.zeros((len(texts), self.max_length), numpy.float32)
        for row, text in enumerate(texts):
            for start in range(len(text) - self.n_gram + 1):
                counts[row, self._place(text[start : start + self.n_gram])] += 1
        counts -= counts.mean(axis=1, keepdims=True)
        return counts / (numpy.linalg.norm(counts, axis=1, keepdims=True) + 1e-10)

    def _place(self, piece: str) -> int:
        """Hash a piece by a polynomial, so that it is the same in every process."""
        hashed = 1
        for factor, letter in zip(self.coeffs, piece, strict=True):
            hashed = (hashed * factor + ord(letter)) % _PRIME
        return hashed % self.max_length


_PRIME = 10**9 + 7
