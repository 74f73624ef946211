"""`Predict` and `ChainOfThought`: one question to a model, answered as a signature says.

Not here: prompts and answers as text (`adapters/`), and the call to the model (`models/`).
"""

from __future__ import annotations

import functools
import logging
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar, overload

from dspylite.abc import Io, LanguageModel
from dspylite.adapters.content import formats_itself
from dspylite.adapters.values import check_readable
from dspylite.errors import (
    InputFieldError,
    LMConfigurationError,
    LMNotConfiguredError,
    nearest,
)
from dspylite.programs.asking import Question, ask
from dspylite.programs.base import Planned
from dspylite.programs.predictor_state import dump_predictor, read_predictor
from dspylite.runtime.clock import Deadline
from dspylite.runtime.settings import check_deadline, settings
from dspylite.runtime.tracking import record_trace
from dspylite.schema.records import Example, Prediction
from dspylite.schema.secrets import shown_params
from dspylite.schema.signature import (
    AnySignature,
    Field,
    OutputField,
    Signature,
    ensure_signature,
)

logger = logging.getLogger(__name__)

P = ParamSpec("P")
S = TypeVar("S")

_OVERRIDES = ("lm", "demos", "config", "signature", "deadline_s")
_SAMPLING_TEMPERATURE = 0.7
"""Used when several answers are asked for and the temperature would make them equal.

DSPy's value.
"""

_LM_TYPES: set[type] = set()
"""Classes that have passed `isinstance(..., LanguageModel)`, which costs more than the rest."""

_NO_LM = (
    "No LM is configured here. Write `configure(lm=LM('provider/model'))` once for the process, or "
    "`with context(lm=...):` around the call. A plain thread or pool sees the process default "
    "only: to carry a `context` into it use `dspylite.ThreadPoolExecutor`, `dspylite.bind(fn)`, or "
    "`dspylite.propagate_to_threads()`. For a try without any model: `LM('offline/extractive')`."
)


class Typed(Planned, Generic[P, S]):
    """A module whose inputs and outputs a type checker knows from its signature."""

    if typing.TYPE_CHECKING:

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> S: ...  # noqa: D102  # Module's

        async def acall(self, /, *args: P.args, **kwargs: P.kwargs) -> S: ...  # noqa: D102  # the same


class Predict(Typed[P, S]):
    """Asks a model one question in the form of a signature.

    The LM is the predictor's own if it has one, else that of the settings. Statically, a class
    signature gives the call its inputs and the result its outputs; a text signature leaves both
    open.

    Args:
        signature: A signature class, or a text such as `"context: list[str], question -> answer"`.
        callbacks: Told of every call, after those of the settings.
        **config: Request parameters of this predictor (`temperature`, `n` ...), and
            `parse_retries`, which overrides that of the settings.

    Attributes:
        signature: The signature class.
        demos: Worked examples put before each question; records or dicts.
        lm: The predictor's own LM, or None.
        config: Request parameters of every call.

    Raises:
        SignatureError: The signature cannot be built.

    Example:
        >>> from dspylite.models.lm import OfflineLM
        >>> from dspylite.runtime.settings import context
        >>> with context(lm=OfflineLM()):
        ...     Predict("context, question -> answer")(
        ...         context="The Nile is the longest river of Africa. It flows north.",
        ...         question="What is the longest river of Africa?",
        ...     ).answer
        'The Nile is the longest river of Africa.'
    """

    kind: ClassVar[str] = "predictor"

    @overload
    def __init__(
        self: Predict[..., Prediction],
        signature: str | Signature | type[AnySignature],
        callbacks: Sequence[Any] | None = ...,
        **config: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        signature: Callable[P, S],
        callbacks: Sequence[Any] | None = ...,
        **config: Any,
    ) -> None: ...

    def __init__(
        self, signature: Any, callbacks: Sequence[Any] | None = None, **config: Any
    ) -> None:
        super().__init__(callbacks)
        self.signature = _usable_signature(signature, config.pop("instructions", None))
        self.config = _usable_config(config)
        self.reset()

    def reset(self) -> None:
        """Forget demos, traces and the predictor's own LM."""
        self.lm: LanguageModel | None = None
        self.demos: list[Any] = []
        self.traces: list[Any] = []
        self.train: list[Any] = []

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Return demos, instructions, descriptions and the predictor's own LM as plain data.

        Args:
            json_mode: Whether all is plain data. False keeps demos as the objects they are.

        Raises:
            SavingError: A value is no data; it is named.
        """
        records = {"traces": self.traces, "train": self.train, "demos": self.demos}
        signature = _usable_signature(self.signature)
        return dump_predictor(signature, self.lm, records, json_mode=json_mode)

    def load_state(self, state: Mapping[str, Any], *, allow_unsafe_lm_state: bool = False) -> Self:
        """Take what `dump_state` returned, here or in DSPy 3; if it does not fit, change nothing.

        Raises:
            SavingError: It is no state of a predictor with this signature.
        """
        signature = _usable_signature(self.signature)
        loaded = read_predictor(signature, state, trusted=allow_unsafe_lm_state)
        vars(self).update(loaded._asdict())
        return self

    def update_config(self, **config: Any) -> None:
        """Change request parameters of every call from now on."""
        self.config = {**self.config, **_usable_config(config)}

    def get_config(self) -> dict[str, Any]:
        """Return the request parameters of every call."""
        return self.config

    def _shown(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        shown = super()._shown(args, kwargs)
        config = shown.get("config")
        if isinstance(config, Mapping) and "config" not in self.signature.input_fields:
            shown["config"] = shown_params(config)
        return shown

    async def steps(self, io: Io, /, *args: Any, **kwargs: Any) -> Any:
        """Ask the model and read its answer."""
        question = self._question(args, kwargs)
        with Deadline(question.deadline_s):
            prediction = await ask(io, question)
        record_trace(self, question.inputs, prediction)
        return prediction

    def _question(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Question:
        """Settle one call, finding every mistake of the caller.

        Raises:
            InputFieldError: Positional arguments, an unknown input or a missing one.
            LMNotConfiguredError: No LM is in sight.
        """
        overrides = {
            name: kwargs[name]
            for name in _OVERRIDES
            if name in kwargs and name not in self.signature.input_fields
        }
        signature = _usable_signature(overrides.get("signature", self.signature))
        inputs = checked_inputs(
            signature, args, {k: v for k, v in kwargs.items() if k not in overrides}
        )
        own = self.lm if overrides.get("lm") is None else overrides["lm"]
        lm = _usable(settings.lm if own is None else own)
        # Checked once more, because `config` is an attribute that anybody may set.
        params = _usable_config({**self.config, **_usable_config(overrides.get("config"))})
        parse_retries = params.pop("parse_retries", None)
        if (params.get("n") or 1) > 1:
            temperature = params.get("temperature", lm.default_temperature)
            if temperature is None or temperature <= 0.15:
                params["temperature"] = _SAMPLING_TEMPERATURE
        sink = settings.send_stream
        return Question(
            signature=signature,
            demos=_usable_demos(overrides.get("demos", self.demos)),
            inputs=inputs,
            lm=lm,
            params=params,
            parse_retries=settings.parse_retries if parse_retries is None else parse_retries,
            deadline_s=check_deadline("deadline_s", overrides.get("deadline_s")),
            ear=None if sink is None else sink.ear_for(self),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.signature!r})"


class ChainOfThought(Typed[P, S]):
    """Like `Predict`, but the model first writes its reasoning, as an output named `reasoning`.

    An output of that name which the signature has already is kept and comes first.

    Args:
        signature: A signature class or text.
        rationale_field: Another `OutputField(...)` for the reasoning, also in place of the
            signature's own.
        rationale_field_type: Type of the reasoning.
        **config: Request parameters.

    Attributes:
        predict: The predictor that asks.

    Raises:
        SignatureError: The signature cannot be built, or has an input named `reasoning`.
    """

    @overload
    def __init__(
        self: ChainOfThought[..., Prediction],
        signature: str | Signature | type[AnySignature],
        rationale_field: Any = ...,
        rationale_field_type: Any = ...,
        **config: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        signature: Callable[P, S],
        rationale_field: Any = ...,
        rationale_field_type: Any = ...,
        **config: Any,
    ) -> None: ...

    def __init__(
        self,
        signature: Any,
        rationale_field: Any = None,
        rationale_field_type: Any = str,
        **config: Any,
    ) -> None:
        super().__init__(config.pop("callbacks", None))
        plain = ensure_signature(signature)
        field, type_ = rationale_field, rationale_field_type
        own = plain.output_fields.get("reasoning")
        if own is not None:
            plain = plain.delete("reasoning")
            if field is None:
                field, type_ = own, None
        field = field or OutputField(desc="think step by step towards the other outputs")
        extended = plain.prepend("reasoning", field, type_)
        self.predict: Predict[..., Any] = Predict(extended, **config)

    async def steps(self, io: Io, /, *args: Any, **kwargs: Any) -> Any:
        """Ask through `predict`."""
        return await self.predict.plan(io, args, kwargs)


def checked_inputs(
    signature: type[Signature], args: Sequence[Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the value of each input of a call, defaults included.

    Raises:
        InputFieldError: Positional arguments, an unknown input or a missing one.
    """
    fields = signature.input_fields
    call = f"predict({', '.join(f'{name}=...' for name in fields)})"
    if args:
        raise InputFieldError(
            f"Inputs are passed by name, not by position ({len(args)} given): write `{call}`."
        )
    for name in given:
        if name not in fields:
            raise InputFieldError(
                f"`{signature.signature}` has no input `{name}`. {nearest(name, fields)}"
                f"Write `{call}`."
            )
    inputs = {
        name: given.get(name, field.default)
        for name, field in fields.items()
        if name in given or not field.required
    }
    if missing := [name for name in fields if name not in inputs]:
        listed = ", ".join(f"`{name}`" for name in missing)
        raise InputFieldError(f"`{signature.signature}` needs {listed} too: write `{call}`.")
    if settings.warn_on_type_mismatch:
        for name, value in given.items():
            _warn_of_type(fields[name], value)
    return inputs


def _warn_of_type(field: Field, value: Any) -> None:
    if _fits(field.annotation, value):
        return
    logger.warning(
        "the input %r is declared as %s and got a %s; it is written into the prompt as it is",
        field.name,
        field.type_name,
        type(value).__name__,
    )


def _fits(annotation: Any, value: Any) -> bool:
    """Tell whether a value is of a type, as far as `isinstance` can tell; in doubt it is."""
    if annotation is None:
        return value is None
    wanted = typing.get_origin(annotation) or annotation
    if wanted is typing.Annotated:
        return _fits(typing.get_args(annotation)[0], value)
    if wanted is str and formats_itself(type(value)):  # it writes itself, as text is written
        return True
    if wanted in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in typing.get_args(annotation))
    if not isinstance(wanted, type) or (wanted is float and isinstance(value, int)):
        return True
    try:
        return isinstance(value, wanted)
    except TypeError:  # typed dicts and most protocols refuse to be asked
        return True


def _usable_config(config: Any) -> dict[str, Any]:
    if config is not None and not isinstance(config, Mapping):
        raise InputFieldError(f"`config` must be a dict of request parameters, not {config!r}.")
    for name in _OVERRIDES:
        if config and name in config:
            raise InputFieldError(
                f"`{name}` is no request parameter: set `predict.{name} = ...`, or pass it to the "
                "call itself."
            )
    usable = dict(config or {})
    retries = usable.get("parse_retries")
    if retries is not None and (
        isinstance(retries, bool) or not isinstance(retries, int) or retries < 0
    ):
        raise InputFieldError(
            f"`parse_retries` must be a whole number of at least 0, not {retries!r}."
        )
    return usable


def _usable_demos(demos: Any) -> list[dict[str, Any]]:
    if not isinstance(demos, Iterable):
        raise InputFieldError(f"`demos` must be a list of examples or dicts, not {demos!r}.")
    checked: list[dict[str, Any]] = []
    for demo in demos:
        if not isinstance(demo, Example | Mapping):
            raise InputFieldError(f"One of `demos` is {demo!r}; each must be an example or a dict.")
        checked.append(dict(demo.items()))
    return checked


def _usable_signature(given: Any, instructions: str | None = None) -> type[Signature]:
    signature = ensure_signature(given, instructions)
    _check_outputs(signature)
    return signature


@functools.lru_cache(maxsize=1024)  # a program may build its predictors anew for each request
def _check_outputs(signature: type[Signature]) -> None:
    for field in signature.output_fields.values():
        check_readable(field)


def _usable(lm: Any) -> LanguageModel:
    if lm is None:
        raise LMNotConfiguredError(_NO_LM)
    if type(lm) not in _LM_TYPES:
        if not isinstance(lm, LanguageModel):
            hint = f"; write `LM({lm!r})`" if isinstance(lm, str) else ""
            raise LMConfigurationError(f"`lm` must be an LM, not {lm!r}{hint}.")
        _LM_TYPES.add(type(lm))
    checked: LanguageModel = lm
    return checked
