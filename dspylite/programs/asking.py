"""One question through an adapter: what is asked, and what is made of the answers.

Not here: what a caller may ask (`programs/predict.py`), and the text of it (`adapters/`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspylite.abc import Adapter, Io, LanguageModel, StreamEar
from dspylite.adapters.features import special_fields
from dspylite.adapters.sections import ChatAdapter
from dspylite.errors import AdapterParseError, SettingsError, TruncatedError
from dspylite.runtime.calls import Observed
from dspylite.runtime.flow import own_form
from dspylite.runtime.settings import settings
from dspylite.runtime.tracking import track_usage
from dspylite.schema.messages import LMOutput, LMResponse, Message, Usage
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.records import Prediction
from dspylite.schema.signature import Signature

logger = logging.getLogger(__name__)

_DEFAULT_ADAPTER = ChatAdapter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything one call needs, settled before any request goes out."""

    signature: type[Signature]
    demos: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, Any]
    lm: LanguageModel
    params: Mapping[str, Any]
    parse_retries: int
    deadline_s: float | None
    ear: StreamEar | None = None  # hears the answers while they are written


async def ask(io: Io, question: Question) -> Prediction:
    """Ask through the adapter; if its answer does not parse, once more through its fallback."""
    adapter: Adapter = settings.adapter or _DEFAULT_ADAPTER
    if not (adapter.calls_models or adapter.has_own_call):
        return await _asked(io, adapter, question)
    with track_usage() as tracker:  # the adapter's own calls belong to the prediction, too
        prediction = await (_own_way if adapter.has_own_call else _asked)(io, adapter, question)
    prediction.set_lm_usage(tracker.by_model)
    return prediction


async def _own_way(io: Io, adapter: Adapter, question: Question) -> Prediction:
    """Ask through the `__call__` or `acall` that a user has written."""
    door = await own_form(io, adapter, "__call__", "acall") or adapter
    rows = await io.any(
        door,
        question.lm,
        lm_kwargs=dict(question.params),
        signature=question.signature,
        demos=list(question.demos),
        inputs=dict(question.inputs),
    )
    given: Any = rows  # callers without a checker come here
    if not isinstance(given, list) or not given or not isinstance(given[0], Mapping):
        raise SettingsError(
            f"The adapter's own `{type(adapter).__name__}.__call__` must return a list with a dict "
            f"of outputs for each answer, not {given!r:.200}."
        )
    return await _made_of(io, question, rows)


async def _made_of(io: Io, question: Question, rows: Sequence[dict[str, Any]]) -> Prediction:
    """Make the prediction of the outputs; calls of tools in it know the tools of the question.

    Whoever listens hears what it has not heard yet.
    """
    found = special_fields(question.signature)
    if found.calls is not None and found.tools is not None:
        for row in rows:
            offer = getattr(row.get(found.calls), "offer", None)
            if offer is not None:  # an adapter of the user's own may give anything
                offer(question.inputs[found.tools])
    if question.ear is not None:
        await question.ear.finish(io, rows[0])
    return Prediction.from_completions(list(rows)) if len(rows) > 1 else Prediction(rows[0])


async def _asked(io: Io, adapter: Adapter, question: Question) -> Prediction:
    responses: list[LMResponse] = []
    try:
        rows = await _Asking(io, adapter, question, responses).rows()
    except AdapterParseError as error:
        # In another form the answer would be as long, and cut again.
        if adapter.fallback is None or isinstance(error, TruncatedError):
            raise
        logger.debug("%s; asking again through %s", error.message, type(adapter.fallback).__name__)
        try:
            rows = await _Asking(io, adapter.fallback, question, responses).rows()
        except AdapterParseError as second:
            raise second from error
    prediction = await _made_of(io, question, rows)
    usage: dict[str, Usage] = {}
    for response in responses:
        name = response.answered_by or question.lm.model
        usage[name] = usage.get(name, Usage()) + response.usage
    prediction.set_lm_usage(usage)
    prediction.set_lm_attempts([attempt for each in responses for attempt in each.attempts])
    return prediction


class _Asking:
    """One question through one adapter: what is asked, and what is made of the answers."""

    __slots__ = ("_adapter", "_io", "_plan", "_question", "_responses")

    def __init__(
        self, io: Io, adapter: Adapter, question: Question, responses: list[LMResponse]
    ) -> None:
        self._io = io
        self._adapter = adapter
        self._question = question
        self._responses = responses  # receives all, also of the adapter before

    async def rows(self) -> list[dict[str, Any]]:
        """Ask, and read each of the answers.

        Raises:
            AdapterParseError: One cannot be read, nor what came in its place.
        """
        question, adapter = self._question, self._adapter
        if adapter.needs_capabilities(question.signature):
            await self._io.any(lambda: question.lm.capabilities)
        self._plan = plan = adapter.prepare(
            question.signature, question.inputs, question.lm, question.params
        )
        shown = {"signature": plan.written, "demos": question.demos, "inputs": question.inputs}
        with Observed("adapter_format", adapter, shown) as call:
            messages = adapter.format(plan.written, question.demos, question.inputs)
            call.outputs = messages
        params = plan.params
        response = await self._send(messages, params, question.ear)
        rows: list[dict[str, Any]] = []
        unreadable: dict[int, AdapterParseError] = {}
        try:
            for index, output in enumerate(response.outputs):
                try:
                    rows.append(await self._read(output))
                except AdapterParseError as error:
                    unreadable[index] = error
                    rows.append({})
        except BaseException:
            response.judge(is_readable=False)
            raise
        response.judge(is_readable=not unreadable)
        for index, problem in unreadable.items():
            output = response.outputs[index]
            ear = None if index else question.ear
            rows[index] = await self._repaired(messages, params, output, problem, ear)
        return rows

    async def _send(
        self, messages: Sequence[Message], params: Mapping[str, Any], ear: StreamEar | None
    ) -> LMResponse:
        lm, io = self._question.lm, self._io
        if ear is None:
            response = await lm.plan(io, messages, params)
        else:
            opened = await lm.plan(io, messages, params, stream=True)
            response = await ear.hear(io, opened, self._adapter, self._plan)
        self._responses.append(response)
        return response

    async def _repaired(
        self,
        messages: Sequence[Message],
        params: Mapping[str, Any],
        output: LMOutput,
        error: AdapterParseError,
        ear: StreamEar | None,
    ) -> dict[str, Any]:
        """Tell the model what is wrong with its answer, as often as it may be; read the next one.

        Raises:
            AdapterParseError: The last answer cannot be read either.
        """
        for _ in range(self._question.parse_retries):
            if isinstance(error, TruncatedError):  # the next one would be cut as well
                break
            logger.debug("%s; telling the model", error.message)
            turn = self._adapter.format_repair(self._plan.written, output.text, error)
            messages = [*messages, *turn]
            response = await self._send(messages, {**params, "n": None}, ear)
            output = response.outputs[0]
            is_readable = False
            try:
                row = await self._read(output)
                is_readable = True
            except AdapterParseError as again:
                error = again
            else:
                return row
            finally:
                response.judge(is_readable=is_readable)
        raise error

    async def _read(self, output: LMOutput) -> dict[str, Any]:
        shown = {"signature": self._plan.written, "completion": output.text}
        with Observed("adapter_parse", self._adapter, shown) as call:
            row = await _read(self._io, self._adapter, self._plan, output)
            call.outputs = row
        return row


async def _read(io: Io, adapter: Adapter, plan: AdapterPlan, output: LMOutput) -> dict[str, Any]:
    try:
        return await adapter.read(io, plan, output)
    except AdapterParseError as error:
        if output.finish_reason != "length":
            raise
        raise TruncatedError(
            error.adapter_name,
            plan.signature,
            output.text,
            "The model stopped at its length limit before the answer was complete; give it room by "
            f"`max_tokens=`. {error.message}",
            error.parsed_result,
        ) from error
