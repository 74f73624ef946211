"""Puts the pieces of a streamed answer together, and knows whether it is complete.

Serves every engine. Not here: where the pieces come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from dspylite.errors import LMError, LMServerError
from dspylite.models.answers import (
    answer_error,
    as_mapping,
    known_shape,
    split_thoughts,
    text_of,
)
from dspylite.models.translate import error_of_answer, status_of_error
from dspylite.schema.messages import LMDelta, LMOutput, LMResponse, Usage

END = b"[DONE]"


class _Choice:
    """One of the `n` answers, as far as it has come."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.citations: list[Mapping[str, Any]] = []
        self.logprobs: dict[str, Any] = {}
        self.finish_reason: str | None = None

    def add_call(self, piece: Mapping[str, Any]) -> None:
        self.calls.setdefault(self._slot(piece), _Call()).add(piece)

    def add_extras(self, choice: Mapping[str, Any], delta: Mapping[str, Any]) -> None:
        """Take what stands beside the text; both come in pieces, a citation at a time."""
        cited = as_mapping(delta.get("provider_specific_fields")).get("citation")
        if cited := as_mapping(cited):
            self.citations.append(cited)
        for name, value in as_mapping(choice.get("logprobs")).items():
            if not isinstance(value, list):
                self.logprobs.setdefault(name, value)
            elif isinstance(so_far := self.logprobs.get(name), list):
                so_far.extend(value)
            else:
                self.logprobs[name] = list(value)

    def _slot(self, piece: Mapping[str, Any]) -> int:
        """Return which call a piece belongs to; without an index, a new id begins a new call."""
        index = piece.get("index")
        if isinstance(index, int):
            return index
        if not self.calls:
            return 0
        last = max(self.calls)
        is_new = piece.get("id") and piece["id"] != self.calls[last].id
        return last + 1 if is_new else last

    def output(self) -> LMOutput:
        text, reasoning = "".join(self.text), "".join(self.reasoning) or None
        if reasoning is None:
            reasoning, text = split_thoughts(text)
        return LMOutput(
            text=text,
            finish_reason=self.finish_reason,
            reasoning=reasoning,
            tool_calls=tuple(self.calls[index].whole() for index in sorted(self.calls)),
            citations=tuple(self.citations),
            logprobs=deepcopy(self.logprobs) or None,  # more may come
        )


class _Call:
    """A tool call, as far as it has come."""

    def __init__(self) -> None:
        self.id: Any = None
        self.name = ""
        self.arguments: list[str] = []

    def add(self, piece: Mapping[str, Any]) -> None:
        self.id = piece.get("id") or self.id
        function = as_mapping(piece.get("function"))
        name, arguments = function.get("name") or "", function.get("arguments") or ""
        if not (isinstance(name, str) and isinstance(arguments, str)):
            raise TypeError("a tool call's name or arguments are no text")
        if name != self.name:  # some servers repeat it in each piece
            self.name += name
        self.arguments.append(arguments)

    def whole(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Assembly:
    """A streamed answer in the making.

    Args:
        model: The model asked; named in errors.
        secrets: Strings that no error may show.
        request_id: The provider's id, where its headers gave one.
    """

    def __init__(
        self, *, model: str, secrets: Iterable[str] = (), request_id: str | None = None
    ) -> None:
        self._model = model
        self._secrets = list(secrets)
        self._request_id = request_id
        self._answer_id: str | None = None
        self._answered_by = ""
        self._choices: dict[int, _Choice] = {}
        self._usage = Usage(calls=1)
        self.is_ended = False

    def read_event(self, data: bytes) -> list[LMDelta]:
        """Take the data of one event and return what it adds.

        Raises:
            LMError: The event is an error, or no JSON object.
        """
        if data.strip() == END:
            self.is_ended = True
            return []
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._broken("an event is no JSON") from error
        if not isinstance(chunk, Mapping):
            raise self._broken("an event is no JSON object")
        if chunk.get("error"):
            raise self._error_event(chunk["error"], data)
        with known_shape(self._model, self._request_id):
            return self.add(chunk)

    def add(self, chunk: Any) -> list[LMDelta]:
        """Take one chunk in OpenAI's form, a dict or an object, and return what it adds."""
        chunk = as_mapping(chunk)
        self._answer_id = self._answer_id or chunk.get("id")
        self._answered_by = self._answered_by or chunk.get("model") or ""
        if usage := chunk.get("usage"):
            self._usage = Usage.from_provider(as_mapping(usage))
        found: list[LMDelta] = []
        for choice in chunk.get("choices") or ():
            delta = self._read_choice(as_mapping(choice))
            if delta is not None:
                found.append(delta)
        return found

    def forget_ends(self) -> None:
        """Forget the finish reasons, which somebody on the way has made up."""
        self.is_ended = False
        for choice in self._choices.values():
            choice.finish_reason = None

    def finish(self) -> None:
        """Check, when nothing more comes, that the answer is complete.

        Raises:
            LMServerError: It is empty, or was cut before its end.
        """
        if not self._choices:
            raise self._broken("it was empty")
        cut = any(choice.finish_reason is None for choice in self._choices.values())
        if cut and not self.is_ended:
            raise self._broken("it was cut before its end")
        outputs = self.response.outputs
        if error := answer_error(outputs, model=self._model, request_id=self._request_id):
            raise error

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer."""
        return LMResponse(
            outputs=tuple(self._choices[index].output() for index in sorted(self._choices)),
            usage=self._usage,
            model=self._answered_by or self._model,
            request_id=self._answer_id or self._request_id,
        )

    def _read_choice(self, choice: Mapping[str, Any]) -> LMDelta | None:
        index = choice.get("index") or 0
        delta = as_mapping(choice.get("delta"))
        text = text_of(delta.get("content") or choice.get("text"))
        reasoning = text_of(delta.get("reasoning_content") or delta.get("reasoning"))
        calls = tuple(as_mapping(call) for call in delta.get("tool_calls") or ())
        reason = choice.get("finish_reason")
        state = self._choices.setdefault(index, _Choice())
        state.text.append(text)
        state.reasoning.append(reasoning)
        for call in calls:
            state.add_call(call)
        state.add_extras(choice, delta)
        state.finish_reason = reason or state.finish_reason
        if not (text or reasoning or calls or reason):
            return None
        return LMDelta(
            index=index, text=text, reasoning=reasoning, tool_calls=calls, finish_reason=reason
        )

    def _error_event(self, error: Any, data: bytes) -> LMError:
        return error_of_answer(
            status=status_of_error(error),
            headers={"x-request-id": self._request_id} if self._request_id else {},
            body=data,
            model=self._model,
            secrets=self._secrets,
        )

    def _broken(self, how: str) -> LMServerError:
        return LMServerError(
            f"{self._model}: the stream is unusable: {how}.",
            model=self._model,
            request_id=self._request_id,
        )
