"""`Module`: a program, and what one can ask of its parts.

Not here: the parts that call models (`programs/predict.py`).
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, ClassVar, Literal, Self, TextIO, TypeVar, Unpack, overload

from dspylite.abc import Io, LanguageModel
from dspylite.concurrency.outcome import Outcome
from dspylite.concurrency.parallel import BatchOptions, Parallel
from dspylite.errors import LMConfigurationError, ModuleError
from dspylite.programs.saving import Saved
from dspylite.runtime.calls import Observed
from dspylite.runtime.clock import Deadline
from dspylite.runtime.flow import ASYNC, BLOCKING, own_form, run_flow
from dspylite.runtime.history import History, recording_in
from dspylite.runtime.inspection import pretty_print_history
from dspylite.runtime.settings import checked_callbacks, settings
from dspylite.runtime.tracking import track_usage
from dspylite.schema.records import Outputs

T = TypeVar("T")


class Module(Saved):
    """A program: subclass it, keep predictors and modules as attributes, define `forward`.

    `forward` alone suffices: `acall` then runs it in a worker thread with its context. `aforward`
    alone suffices too: calling the module then works from a plain thread, a worker thread and
    inside a running event loop. With both, each is used on its own side.

    Args:
        callbacks: Told of every call of this module, after those of the settings.

    Attributes:
        callbacks: As given.
        history: The last model calls made by this module and the modules in it.

    Example:
        >>> class Shout(Module):
        ...     def forward(self, text: str) -> str:
        ...         return text.upper()
        >>> Shout()(text="hello")
        'HELLO'
    """

    kind: ClassVar[str] = "module"
    callbacks: Sequence[Any]
    history: History

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Set up what every module has, also where a subclass never calls `super().__init__()`."""
        del args, kwargs
        module = super().__new__(cls)
        module.callbacks = ()
        module.history = History()
        return module

    def __init__(self, callbacks: Sequence[Any] | None = None) -> None:
        self.callbacks = checked_callbacks("callbacks", callbacks)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the program and wait for it on this thread.

        Raises:
            ModuleError: It has neither `forward` nor `aforward`.
        """
        return run_flow(self.plan(BLOCKING, args, kwargs))

    async def acall(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the program and await it.

        Raises:
            ModuleError: It has neither `forward` nor `aforward`.
        """
        return await self.plan(ASYNC, args, kwargs)

    async def plan(self, io: Io, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the program through a driver: open a call frame, run the body, attach the usage."""
        with (
            Observed("module", self, self._shown(args, kwargs)) as call,
            recording_in(self.history),
            Deadline(settings.deadline_s),
        ):
            if settings.track_usage:
                with track_usage() as tracker:
                    result = await self._body(io, *args, **kwargs)
                if isinstance(result, Outputs):
                    result.set_lm_usage(tracker.by_model)
            else:
                result = await self._body(io, *args, **kwargs)
            call.outputs = result
        return result

    def _shown(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Give the inputs as callbacks are told them."""
        return dict(kwargs) if not args else {"args": tuple(args), **kwargs}

    async def _body(self, io: Io, /, *args: Any, **kwargs: Any) -> Any:
        body = await own_form(io, self, "forward", "aforward")
        if body is None:
            raise ModuleError(
                f"`{type(self).__name__}` has neither `forward` nor `aforward`, so it cannot be "
                "called; define `def forward(self, ...)`."
            )
        return await io.any(body, *args, **kwargs)

    # -- many inputs ------------------------------------------------------------------------------

    # `self` as a callable: a module typed by its signature gives a list of what its call returns.
    @overload
    def batch(
        self: Callable[..., T],
        examples: Iterable[Any],
        num_threads: int | None = ...,
        max_errors: int | None = ...,
        *,
        return_failed_examples: Literal[False] = ...,
        on_error: Literal["raise"] = ...,
        **options: Unpack[BatchOptions],
    ) -> list[T]: ...

    @overload
    def batch(
        self: Callable[..., T],
        examples: Iterable[Any],
        num_threads: int | None = ...,
        max_errors: int | None = ...,
        *,
        on_error: Literal["return"],
        **options: Unpack[BatchOptions],
    ) -> list[Outcome[T]]: ...

    @overload
    def batch(
        self: Callable[..., T],
        examples: Iterable[Any],
        num_threads: int | None = ...,
        max_errors: int | None = ...,
        *,
        return_failed_examples: Literal[True],
        **options: Unpack[BatchOptions],
    ) -> tuple[list[T | None], list[Any], list[BaseException]]: ...

    def batch(
        self,
        examples: Iterable[Any],
        num_threads: int | None = None,
        max_errors: int | None = None,
        **options: Any,
    ) -> Any:
        """Run the program over many inputs on several threads; results in input order.

        Args:
            examples: Inputs, each an `Example` with inputs, a dict of keywords or a tuple of
                positional arguments; read only as threads become free.
            num_threads: Threads. None: `settings.num_threads`.
            max_errors: Failures after which no further item is taken. None: as the settings say.
            **options: What else `Parallel` takes: `on_error`, `timeout_s`, `total_timeout_s`,
                `hedge_after_s`, `progress`, `return_failed_examples` and so on.

        Returns:
            One result per input, in input order; with `on_error="return"` one `Outcome` per input.

        Raises:
            BatchError: An item failed; it keeps what finished.
            BatchInterrupted: Ctrl-C, a `KeyboardInterrupt` that keeps what finished.
            FlowError: An event loop runs on this thread; await `abatch`.

        Example:
            >>> class Double(Module):
            ...     def forward(self, x: int) -> int:
            ...         return 2 * x
            >>> Double().batch([{"x": 1}, {"x": 2}], num_threads=2)
            [2, 4]
        """
        return Parallel(num_threads, max_errors, **options).over(self, examples)

    @overload
    async def abatch(
        self: Callable[..., T],
        examples: Iterable[Any] | AsyncIterable[Any],
        num_threads: int | None = ...,
        max_errors: int | None = ...,
        *,
        return_failed_examples: Literal[False] = ...,
        on_error: Literal["raise"] = ...,
        **options: Unpack[BatchOptions],
    ) -> list[T]: ...

    @overload
    async def abatch(
        self: Callable[..., T],
        examples: Iterable[Any] | AsyncIterable[Any],
        num_threads: int | None = ...,
        max_errors: int | None = ...,
        *,
        on_error: Literal["return"],
        **options: Unpack[BatchOptions],
    ) -> list[Outcome[T]]: ...

    @overload
    async def abatch(
        self: Callable[..., T],
        examples: Iterable[Any] | AsyncIterable[Any],
        num_threads: int | None = ...,
        max_errors: int | None = ...,
        *,
        return_failed_examples: Literal[True],
        **options: Unpack[BatchOptions],
    ) -> tuple[list[T | None], list[Any], list[BaseException]]: ...

    async def abatch(
        self,
        examples: Iterable[Any] | AsyncIterable[Any],
        num_threads: int | None = None,
        max_errors: int | None = None,
        **options: Any,
    ) -> Any:
        """Run the program over many inputs as tasks of this event loop; otherwise as `batch`."""
        return await Parallel(num_threads, max_errors, **options).aover(self, examples)

    def batch_iter(
        self: Callable[..., T],
        examples: Iterable[Any],
        num_threads: int | None = None,
        max_errors: int | None = None,
        **options: Unpack[BatchOptions],
    ) -> Generator[tuple[int, Outcome[T]], None, None]:
        """Run the program over many inputs and give each outcome as soon as it is there.

        For inputs without end or too many to keep: outcomes are not kept, and the workers do not
        run ahead of the one who asks by more than a few items. Closing the iterator, or dropping
        it, stops them; calls under way are broken off.

        Args:
            examples: As for `batch`.
            num_threads: As for `batch`.
            max_errors: As for `batch`.
            **options: As for `batch`, but for `on_error`: a failure is an outcome like any other.

        Yields:
            The place of an input among the inputs, and its `Outcome`, in the order of their ends.

        Raises:
            BatchError: After the last outcome, where the run stopped before its inputs ended: at
                `max_errors` or `total_timeout_s`, or because the input failed.
            FlowError: An event loop runs on this thread; use `abatch_iter`.

        Example:
            >>> class Double(Module):
            ...     def forward(self, x: int) -> int:
            ...         return 2 * x
            >>> sorted((i, o.value) for i, o in Double().batch_iter([{"x": 1}, {"x": 2}]))
            [(0, 2), (1, 4)]
        """
        return Parallel(num_threads, max_errors, **options).each(self, examples)

    def abatch_iter(
        self: Callable[..., T],
        examples: Iterable[Any] | AsyncIterable[Any],
        num_threads: int | None = None,
        max_errors: int | None = None,
        **options: Unpack[BatchOptions],
    ) -> AsyncGenerator[tuple[int, Outcome[T]], None]:
        """Run the program as tasks of this event loop; otherwise as `batch_iter`."""
        return Parallel(num_threads, max_errors, **options).aeach(self, examples)

    # -- parts ------------------------------------------------------------------------------------

    def named_sub_modules(
        self, type_: type[Any] | None = None, skip_compiled: bool = False
    ) -> Iterator[tuple[str, Any]]:
        """Give this module (as `"self"`) and every module inside it with its path, each once.

        The nearest come first, with paths such as `"self.steps[0].predict"`.

        Args:
            type_: Parts of this type are given in place of modules, such as tools.
            skip_compiled: Whether to leave out what is inside modules with a true `_compiled`,
                which DSPy's optimisers set.
        """
        wanted = Module if type_ is None else type_
        queue: deque[tuple[str, Any]] = deque([("self", self)])
        seen = {id(self)}
        while queue:
            path, part = queue.popleft()
            if isinstance(part, wanted):
                yield path, part
            inside: Iterable[tuple[str, Any]] = ()
            if isinstance(part, Module):
                if not (skip_compiled and getattr(part, "_compiled", False)):
                    inside = [(f"{path}.{name}", value) for name, value in vars(part).items()]
            elif isinstance(part, dict):
                inside = [(f"{path}[{key}]", value) for key, value in part.items()]
            elif isinstance(part, list | tuple):
                inside = [(f"{path}[{index}]", value) for index, value in enumerate(part)]
            for path_inside, value in inside:
                worth = isinstance(value, Module | dict | list | tuple | wanted)
                if worth and id(value) not in seen:
                    seen.add(id(value))
                    queue.append((path_inside, value))

    def named_predictors(self) -> list[tuple[str, Any]]:
        """Return every predictor with its path, such as `"answer"` or `"steps[0].predict"`."""
        found = [(path, part) for path, part, _ in _parts(self) if part.kind == "predictor"]
        return [("self", self), *found] if self.kind == "predictor" else found

    def predictors(self) -> list[Any]:
        """Return every predictor."""
        return [predictor for _, predictor in self.named_predictors()]

    def named_parameters(self) -> list[tuple[str, Any]]:
        """The same as `named_predictors()`: predictors are the parts that programs tune."""
        return self.named_predictors()

    def parameters(self) -> list[Any]:
        """The same as `predictors()`."""
        return self.predictors()

    def set_lm(self, lm: LanguageModel | None) -> None:
        """Give every predictor in this module an LM of its own; None takes it away.

        Raises:
            LMConfigurationError: `lm` is not an LM.
        """
        if lm is not None and not isinstance(lm, LanguageModel):
            # Callers without a checker come here.
            hint = f"; write `LM({lm!r})`" if isinstance(lm, str) else ""  # type: ignore[unreachable]
            raise LMConfigurationError(f"`set_lm` takes an LM, not {lm!r}{hint}.")
        for predictor in self.predictors():
            predictor.lm = lm

    def get_lm(self) -> LanguageModel | None:
        """Return the LM that all predictors share.

        Raises:
            LMConfigurationError: They have different ones, or there is no predictor.
        """
        lms = [predictor.lm for predictor in self.predictors()]
        if not lms:
            raise LMConfigurationError(f"`{type(self).__name__}` has no predictor, and so no LM.")
        if any(lm is not lms[0] for lm in lms):
            raise LMConfigurationError(
                f"`{type(self).__name__}` has {len(lms)} predictors that do not share one LM; "
                "read `predictor.lm` of each."
            )
        found: LanguageModel | None = lms[0]
        return found

    def map_named_predictors(self, fn: Callable[[Any], Any]) -> Self:
        """Replace every predictor in this module by `fn(predictor)`; return the module.

        A predictor that stands in several places is replaced by the same new one in all of them.
        """
        made: dict[int, Any] = {}
        for _, part, replace in list(_parts(self, every_place=True)):
            if part.kind == "predictor":
                if id(part) not in made:
                    made[id(part)] = fn(part)
                replace(made[id(part)])
        return self

    def inspect_history(self, n: int = 1, file: TextIO | None = None) -> None:
        """Print the last `n` calls made in this module; otherwise as `dspylite.inspect_history`."""
        pretty_print_history(self.history, n, file)

    def deepcopy(self) -> Self:
        """Return a copy that shares nothing that can change, but is told to the same callbacks.

        Raises:
            ModuleError: An attribute cannot be copied.
        """
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        memo.update({id(callback): callback for callback in self.callbacks})
        for name, value in list(vars(self).items()):
            try:
                twin.__dict__[name] = copy.deepcopy(value, memo)
            except ModuleError:  # of a part, which it names
                raise
            except TypeError as error:
                raise ModuleError(
                    f"`{type(self).__name__}.{name}` cannot be copied ({error}); give its class a "
                    "`__deepcopy__`, or set it after copying."
                ) from error
        return twin

    def reset_copy(self) -> Self:
        """Return a deep copy whose predictors have no demos and no LM of their own."""
        twin = copy.deepcopy(self)
        for predictor in twin.predictors():
            predictor.reset()
        return twin

    def __repr__(self) -> str:
        parts = "".join(f"\n  {path} = {part!r}" for path, part in self.named_predictors())
        return f"{type(self).__name__}({parts}\n)" if parts else f"{type(self).__name__}()"


class Planned(Module):
    """A module whose body is one plan, which serves the call and `acall` alike.

    The built-in programs are made this way. A subclass may still override `forward` or `aforward`.
    """

    async def steps(self, io: Io, /, *args: Any, **kwargs: Any) -> Any:
        """Do the work, waiting through `io` only; parts are run by `await part.plan(io, ...)`."""
        raise NotImplementedError

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the steps on this thread, without a call frame; call the module itself instead."""
        return run_flow(self.steps(BLOCKING, *args, **kwargs))

    async def aforward(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the steps on this event loop, without a call frame; use `acall` instead."""
        return await self.steps(ASYNC, *args, **kwargs)

    async def _body(self, io: Io, /, *args: Any, **kwargs: Any) -> Any:
        cls = type(self)
        if cls.forward is Planned.forward and cls.aforward is Planned.aforward:
            return await self.steps(io, *args, **kwargs)
        return await super()._body(io, *args, **kwargs)


_Replace = Callable[[Any], None]


def _parts(root: Module, *, every_place: bool = False) -> Iterator[tuple[str, Module, _Replace]]:
    """Walk the attributes of a module: modules, and those in lists, tuples and dicts.

    Each comes once, or as often as it stands somewhere with `every_place`.
    """
    seen = {id(root)}
    levels = [_attributes("", root)]
    while levels:
        place = next(levels[-1], None)
        if place is None:
            levels.pop()
            continue
        path, value, replace = place
        new = id(value) not in seen
        seen.add(id(value))
        if isinstance(value, Module):
            if new or every_place:
                yield path, value, replace
            if new:
                levels.append(_attributes(f"{path}.", value))
        elif new or (every_place and isinstance(value, tuple)):
            levels.append(_items(path, value, replace))


def _attributes(prefix: str, module: Module) -> Iterator[tuple[str, Any, _Replace]]:
    for name, value in list(vars(module).items()):
        if isinstance(value, Module | dict | list | tuple):
            yield f"{prefix}{name}", value, _setter(vars(module), name)


def _items(path: str, holder: Any, replace: _Replace) -> Iterator[tuple[str, Any, _Replace]]:
    pairs = list(holder.items()) if isinstance(holder, dict) else enumerate(holder)
    set_at: Callable[[Any], _Replace] = functools.partial(_setter, holder)
    if isinstance(holder, tuple):
        set_at = functools.partial(_tuple_setter, holder, list(holder), replace)
    for key, value in pairs:
        if isinstance(value, Module | dict | list | tuple):
            # In DSPy's spelling, because saved states go by these paths.
            place = f"['{key}']" if isinstance(holder, dict) else f"[{key}]"
            yield f"{path}{place}", value, set_at(key)


def _setter(holder: Any, key: Any) -> _Replace:
    def replace(value: Any) -> None:
        holder[key] = value

    return replace


def _tuple_setter(holder: Any, changed: list[Any], replace_holder: _Replace, key: int) -> _Replace:
    remake = getattr(holder, "_make", tuple)  # a named tuple stays one

    def replace(value: Any) -> None:
        changed[key] = value
        replace_holder(remake(changed))

    return replace
