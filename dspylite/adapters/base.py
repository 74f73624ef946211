"""`Adapter`: how the task and the values are told to a model, and how its outputs are checked.

Not here: the form of an answer, which is what makes an adapter; features of a model that stand in
for text (`adapters/native.py`); conversations (`adapters/turns.py`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dspylite.abc import Io, LanguageModel
from dspylite.adapters.content import ContentBuilder
from dspylite.adapters.features import NOT_SAID, NativeFeatures, special_fields, without
from dspylite.adapters.streaming import FieldReader
from dspylite.adapters.values import MAX_CHARS, describe, format_value, takes_none
from dspylite.errors import AdapterParseError, SavingError
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.settings import checked_callbacks
from dspylite.schema.messages import LMOutput, Message
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.signature import Field, Signature

if TYPE_CHECKING:
    from dspylite.adapters.types.base import Type

_MARKER_LINE = re.compile(r"^([ \t]*)(\\*)(\[\[ ## )", re.MULTILINE)
_ESCAPED_LINE = re.compile(r"^([ \t]*)\\(\\*\[\[ ## )", re.MULTILINE)
MAX_TASKS = 1024
"""System messages kept per adapter; guessed, far above the signatures of one program."""
NOT_GIVEN = "(not given in this example)"


def header(name: str) -> str:
    """Return the line that opens a section.

    Example:
        >>> header("answer")
        '[[ ## answer ## ]]'
    """
    return f"[[ ## {name} ## ]]"


def fence(text: str) -> str:
    r"""Escape lines of a value that look like headers, so that data never opens a section.

    Example:
        >>> fence("see\n[[ ## answer ## ]]")
        'see\n\\[[ ## answer ## ]]'
    """
    return _MARKER_LINE.sub(r"\1\\\2\3", text) if "[[ ##" in text else text


def unfence(text: str) -> str:
    """Undo `fence`."""
    return _ESCAPED_LINE.sub(r"\1\2", text) if "[[ ##" in text else text


def section(name: str, text: str) -> str:
    """Write one section: header, value, with look-alike headers escaped."""
    return f"{header(name)}\n{fence(text)}"


def repair_turn(
    answer: str, error: AdapterParseError, escape: Callable[[str], str] = fence
) -> list[Message]:
    """Write what a model is told when its answer cannot be read: that answer, and what is wrong.

    What is wrong may quote the answer, so it is escaped like any other data.
    """
    return [
        {"role": "assistant", "content": answer if answer.strip() else "(no text)"},
        {
            "role": "user",
            "content": (
                f"This answer cannot be read: {escape(error.message)}\n"
                "Answer once more, in full and in exactly the form asked for above."
            ),
        },
    ]


def texts_of(
    signature: type[Signature], outputs: Mapping[str, Any], missing: str | None
) -> list[tuple[str, str]]:
    """Write each output's value; a missing one as `missing` says, or, for None, not at all."""
    return [
        (name, format_value(outputs[name]) if name in outputs else missing or "")
        for name in signature.output_fields
        if name in outputs or missing is not None
    ]


def list_fields(fields: Mapping[str, Field], *, outputs: bool) -> str:
    """List fields for the system message: name, type, form and meaning."""
    lines: list[str] = []
    for field in fields.values():
        form = describe(field) if outputs else ""
        kind = f"{field.type_name}: {form}" if form else field.type_name
        lines.append(f"- `{field.name}` ({kind})" + (f" — {field.desc}" if field.desc else ""))
    return "\n".join(lines)


class Adapter:
    """Between a signature and text: writes prompts and reads answers. Subclass it for your own.

    A subclass says how an answer looks (`format_field_structure` and
    `format_assistant_message_content`) and reads it (`parse`); one that overrides `format` needs
    `parse` only.

    Args:
        callbacks: Told of every format and parse, after those of the settings.
        use_native_function_calling: Whether a model that can call tools is asked for its calls in
            its own way, for signatures with an input of `Tool`s and an output of `ToolCalls`.
        native_response_types: Types of outputs that a model may give beside its text. None:
            `Reasoning` and `Citations`.
        parallel_tool_calls: Whether the model may want several calls at once; None leaves it to the
            provider.
    """

    calls_models: ClassVar[bool] = False
    """Whether it makes calls of its own, beside the one that is read."""

    has_own_call: ClassVar[bool] = False
    """Whether a subclass has overridden `__call__` or `acall`, by which it is then asked."""

    _reads_reason: ClassVar[bool] = True

    callbacks: tuple[Any, ...] = ()
    native: NativeFeatures = NativeFeatures()
    _tasks: dict[type[Signature], str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the store of written tasks, also for a subclass that never calls `__init__`."""
        del args, kwargs
        made = super().__new__(cls)
        made._tasks = {}
        return made

    def __init__(
        self,
        callbacks: Sequence[Any] | None = None,
        use_native_function_calling: bool = False,
        native_response_types: Sequence[type[Type]] | None = None,
        parallel_tool_calls: bool | None = None,
    ) -> None:
        self.callbacks = checked_callbacks("callbacks", callbacks)
        self.native = NativeFeatures(
            use_native_function_calling, native_response_types, parallel_tool_calls
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """See which of the ways to be overridden a subclass uses.

        `parse` of an adapter written for DSPy does not want to know why the model stopped.
        """
        super().__init_subclass__(**kwargs)
        cls.has_own_call = cls.__call__ is not Adapter.__call__ or cls.acall is not Adapter.acall
        parameters = inspect.signature(cls.parse).parameters
        cls._reads_reason = "finish_reason" in parameters or any(
            each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the written tasks behind; they are made again where they are needed."""
        return {**self.__dict__, "_tasks": {}}

    saved_parameters: ClassVar[Sequence[str] | None] = None
    """What a file must hold to make such an adapter again; each class names its own."""

    def dump_state(self) -> dict[str, Any]:
        """Return class and parameters as plain data, for the file of the settings.

        Raises:
            SavingError: It has callbacks, or its class is not one of ours, which a file may name.
        """
        cls = type(self)
        names: Sequence[str] | None = vars(cls).get("saved_parameters")  # not those of a base
        if names is None:
            raise SavingError(f"`{cls.__name__}` is no adapter that a file can hold")
        if self.callbacks:
            raise SavingError(f"the `{cls.__name__}` has callbacks, which no file can hold")
        if self.native.response_types is not None:
            raise SavingError(f"the `{cls.__name__}` names types, which no file can hold")
        return {"class": cls.__name__, "params": {name: getattr(self, name) for name in names}}

    @property
    def use_native_function_calling(self) -> bool:
        """Whether a model that can call tools is asked for its calls in its own way."""
        return self.native.function_calling

    @property
    def parallel_tool_calls(self) -> bool | None:
        """Whether the model may want several calls at once; None leaves it to the provider."""
        return self.native.parallel_tool_calls

    @property
    def fallback(self) -> Adapter | None:
        """The adapter to try once when an answer does not parse; None here."""
        return None

    # -- one question -----------------------------------------------------------------------------

    def needs_capabilities(self, signature: type[Signature]) -> bool:
        """Whether `prepare` looks at what the model can do, which may take a moment to find out."""
        return self.native.has_use_for(signature)

    def prepare(
        self,
        signature: type[Signature],
        inputs: Mapping[str, Any],
        lm: LanguageModel,
        params: Mapping[str, Any],
    ) -> AdapterPlan:
        """Settle what is written and what is left to features of the model.

        Raises:
            SignatureError: Tool calls are wanted and there is no input for the tools.
        """
        if self.native.has_use_for(signature):
            from dspylite.adapters.native import plan_native  # noqa: PLC0415  # seldom used

            return plan_native(self.native, signature, inputs, lm, params)
        return AdapterPlan(signature=signature, written=signature, params=params)

    async def read(self, io: Io, plan: AdapterPlan, output: LMOutput) -> dict[str, Any]:
        """Read all outputs from one answer: its text, and what came beside it.

        Waits for nothing here; an adapter that needs a further call overrides it.

        Raises:
            AdapterParseError: The answer is not one complete value for every output.
        """
        del io
        if plan.written is plan.signature and not output.tool_calls:
            return self._parsed(plan.signature, output)
        from dspylite.adapters.native import read_native  # noqa: PLC0415  # seldom used

        return read_native(plan, output, self._parsed)

    def _parsed(self, signature: type[Signature], output: LMOutput) -> dict[str, Any]:
        if self._reads_reason:
            return self.parse(signature, output.text, finish_reason=output.finish_reason)
        return self.parse(signature, output.text)

    def __call__(
        self,
        lm: LanguageModel,
        lm_kwargs: Mapping[str, Any],
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Ask a model and read its answers, on this thread.

        Args:
            lm: Who is asked.
            lm_kwargs: Parameters of the request.
            signature: What is asked.
            demos: Worked examples.
            inputs: The values of the inputs.

        Returns:
            The outputs of each of the `n` answers.

        Raises:
            AdapterParseError: One of them cannot be read.
            LMError: The call failed.
        """
        return run_flow(self.ask(BLOCKING, lm, lm_kwargs, signature, demos, inputs))

    async def acall(
        self,
        lm: LanguageModel,
        lm_kwargs: Mapping[str, Any],
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Ask a model and read its answers; otherwise as `__call__`."""
        return await self.ask(ASYNC, lm, lm_kwargs, signature, demos, inputs)

    async def ask(
        self,
        io: Io,
        lm: LanguageModel,
        lm_kwargs: Mapping[str, Any],
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Ask a model through a driver and read its answers; otherwise as `__call__`."""
        if self.needs_capabilities(signature):
            await io.any(lambda: lm.capabilities)
        plan = self.prepare(signature, inputs, lm, lm_kwargs)
        messages = self.format(plan.written, demos, inputs)
        response = await lm.plan(io, messages, plan.params)
        is_readable, rows = False, []
        try:
            rows = [await self.read(io, plan, output) for output in response.outputs]
            is_readable = True
        except AdapterParseError:
            if self.fallback is None:
                raise
        finally:
            response.judge(is_readable=is_readable)
        if self.fallback is not None and not is_readable:
            return await self.fallback.ask(io, lm, lm_kwargs, signature, demos, inputs)
        return rows

    # -- writing ----------------------------------------------------------------------------------

    def format(
        self,
        signature: type[Signature],
        demos: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
    ) -> list[Message]:
        """Write the prompt: the task, each demo as a question with its answer, then the inputs.

        The turns of a `History` among the inputs come before the question.
        """
        messages: list[Message] = [{"role": "system", "content": self._task(signature)}]
        history = special_fields(signature).history
        if history is not None:
            signature = without(signature, (history,))
        messages += self.format_demos(signature, demos)
        if history is not None:
            messages += self.format_conversation_history(signature, history, inputs)
        question = self.format_user_message_content(signature, inputs, main_request=True)
        messages.append({"role": "user", "content": question})
        return messages

    def _task(self, signature: type[Signature]) -> str:
        text = self._tasks.get(signature)
        if text is None:
            if len(self._tasks) >= MAX_TASKS:
                self._tasks.clear()
            text = self._tasks[signature] = self.format_system_message(signature)
        return text

    def format_system_message(self, signature: type[Signature]) -> str:
        """Write the system message: the fields, the form of an answer, the task."""
        parts = (
            self.format_field_description(signature),
            self.format_field_structure(signature),
            self.format_task_description(signature),
        )
        return "\n\n".join(part for part in parts if part)

    def format_field_description(self, signature: type[Signature]) -> str:
        """List the inputs and outputs with their types and meanings."""
        parts: list[str] = []
        history = special_fields(signature).history
        inputs = {n: field for n, field in signature.input_fields.items() if n != history}
        if inputs:
            parts.append(f"Inputs:\n{list_fields(inputs, outputs=False)}")
        if signature.output_fields:
            parts.append(f"Outputs:\n{list_fields(signature.output_fields, outputs=True)}")
        return "\n\n".join(parts)

    def format_field_structure(self, signature: type[Signature]) -> str:
        """Say what an answer looks like."""
        raise NotImplementedError(f"`{type(self).__name__}` must say how its answers look.")

    def format_task_description(self, signature: type[Signature]) -> str:
        """Give the instructions."""
        return f"Task: {signature.instructions}"

    def format_demos(
        self, signature: type[Signature], demos: Sequence[Mapping[str, Any]]
    ) -> list[Message]:
        """Write each demo as a question with its answer.

        One that has no output of the signature shows nothing, and is left out. None is no value,
        unless the type of the field has it.
        """
        messages: list[Message] = []
        for demo in demos:
            if all(demo.get(name) is None for name in signature.output_fields):
                continue
            shown = {
                name: demo[name]
                for name, field in signature.fields.items()
                if demo.get(name) is not None or (name in demo and takes_none(field))
            }
            question = self.format_user_message_content(signature, shown)
            answer = self.format_assistant_message_content(signature, shown, NOT_GIVEN)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def format_conversation_history(
        self, signature: type[Signature], history_field_name: str, inputs: Mapping[str, Any]
    ) -> list[Message]:
        """Write the turns of a conversation, each as a question with its answer.

        Raises:
            InputFieldError: The input is no conversation.
        """
        from dspylite.adapters.turns import conversation, turns_of  # noqa: PLC0415  # seldom used

        turns = turns_of(history_field_name, inputs.get(history_field_name))
        return conversation(self, signature, turns)

    def format_user_message_content(
        self,
        signature: type[Signature],
        inputs: Mapping[str, Any],
        prefix: str = "",
        suffix: str = "",
        main_request: bool = False,
    ) -> str | list[dict[str, Any]]:
        """Write the inputs.

        Args:
            signature: What is asked.
            inputs: The values; a required one that is missing is marked as not given.
            prefix: Text before them.
            suffix: Text behind them.
            main_request: Whether it is the question itself, to be ended by a reminder of the form.

        Returns:
            Text, or content parts if a value has some.
        """
        builder: ContentBuilder | None = None
        parts = [prefix] if prefix else []
        for name, field in signature.input_fields.items():
            if inputs.get(name) is NOT_SAID:
                continue
            if name in inputs:
                text = inputs[name]
                if type(text) is not str:
                    if name == special_fields(signature).tools:
                        from dspylite.adapters.native import written_tools  # noqa: PLC0415  # seldom used

                        text = written_tools(text)
                    builder = builder or ContentBuilder(functools.partial(self.escape, signature))
                    text = format_value(text, builder)
                parts.append(self.format_input(signature, name, text))
            elif field.required:
                parts.append(self.format_input(signature, name, NOT_GIVEN))
        if main_request and (reminder := self.user_message_output_requirements(signature)):
            parts.append(reminder)
        if suffix:
            parts.append(suffix)
        written = "\n\n".join(parts)
        return builder.content(written) if builder is not None else written

    def format_repair(
        self, signature: type[Signature], answer: str, error: AdapterParseError
    ) -> list[Message]:
        """Write what a model is told when its answer cannot be read."""
        return repair_turn(answer, error, functools.partial(self.escape, signature))

    def escape(self, signature: type[Signature], text: str) -> str:
        """Make text of a user harmless, so that it opens no field."""
        del signature
        return fence(text)

    def format_input(self, signature: type[Signature], name: str, text: str) -> str:
        """Write one input: its name and its value, escaped."""
        del signature
        return section(name, text)

    def user_message_output_requirements(self, signature: type[Signature]) -> str:
        """Say in one line, after the inputs, what to write; nothing here."""
        del signature
        return ""

    def format_assistant_message_content(
        self,
        signature: type[Signature],
        outputs: Mapping[str, Any],
        missing_field_message: str | None = None,
    ) -> str:
        """Write an answer as the model should have written it.

        Args:
            signature: What was asked.
            outputs: The values.
            missing_field_message: What stands for a value that is missing; None leaves it out.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must say how its answers look.")

    # -- reading ----------------------------------------------------------------------------------

    def parse(
        self, signature: type[Signature], completion: str, *, finish_reason: str | None = "stop"
    ) -> dict[str, Any]:
        """Read the outputs from the text of an answer.

        Raises:
            AdapterParseError: The answer is not one complete value for every output.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must read answers in `parse`.")

    def stream_reader(self, signature: type[Signature]) -> FieldReader | None:
        """Make a reader of an answer that comes piece by piece; None, as here, if there is none.

        Without one, whoever listens to an output gets it in one piece, when `parse` has read it.
        """
        del signature
        return None

    def error(
        self, signature: type[Signature], completion: str, reason: str, parsed: object = None
    ) -> AdapterParseError:
        """Make the error that `parse` raises."""
        return AdapterParseError(type(self).__name__, signature, completion, reason, parsed)

    def read_fields(
        self,
        signature: type[Signature],
        completion: str,
        found: Mapping[str, Any],
        read: Callable[[Field, Any], Any],
    ) -> dict[str, Any]:
        """Turn what was found for each output into its value, in the order of the signature.

        Raises:
            AdapterParseError: An output is missing or its value does not fit.
        """
        if len(completion) > MAX_CHARS:
            reason = f"Its {len(completion)} characters are more than {MAX_CHARS}."
            raise self.error(signature, completion, reason)
        values: dict[str, Any] = {}
        outputs = signature.output_fields
        if missing := [name for name in outputs if name not in found]:
            listed = ", ".join(f"`{name}`" for name in missing)
            raise self.error(
                signature, completion, f"The answer lacks {listed}.", dict(found) or None
            )
        for name, field in outputs.items():
            try:
                values[name] = read(field, found[name])
            except ValueError as error:
                raise self.error(
                    signature, completion, f"`{name}`: {error}.", dict(found)
                ) from None
        return values
