"""What programs take and give: `Example`, `Prediction`, `Completions`.

Not here: turning a model's text into these (`adapters/`, `programs/`).
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import TYPE_CHECKING, Any, Self

from dspylite.errors import nearest
from dspylite.schema.messages import Attempt, Usage


class Example:
    """A record of named values, readable as attributes and as items.

    Args:
        base: An example or mapping to start from.
        **values: Values that override those of `base`.

    Example:
        >>> example = Example(question="1+1?", answer="2").with_inputs("question")
        >>> example.answer, dict(example.inputs().items())
        ('2', {'question': '1+1?'})
    """

    _store: dict[str, Any]
    _input_keys: frozenset[str] | None

    def __init__(self, base: Example | Mapping[str, Any] | None = None, **values: Any) -> None:
        start: dict[str, Any] = {}
        keys: frozenset[str] | None = None
        if isinstance(base, Example):
            start, keys = base._store, base._input_keys  # noqa: SLF001  # of its own class
        elif base is not None:
            start = dict(base)
        self.__dict__["_store"] = {**start, **values}
        self.__dict__["_input_keys"] = keys

    def with_inputs(self, *keys: str) -> Self:
        """Return a copy in which exactly `keys` are inputs; the other values are labels."""
        copy = self.copy()
        copy.__dict__["_input_keys"] = frozenset(keys)
        return copy

    def inputs(self) -> Self:
        """Return a copy holding the inputs alone.

        Raises:
            ValueError: `with_inputs` was never called, so nobody knows which values are inputs.
        """
        if self._input_keys is None:
            raise ValueError(
                f"This example does not say which of {sorted(self._store)} are inputs; "
                'call `example.with_inputs("question", ...)` first.'
            )
        return self._only(key for key in self._store if key in (self._input_keys or ()))

    def labels(self) -> Self:
        """Return a copy holding what is not an input."""
        inputs = self._input_keys or frozenset()
        return self._only(key for key in self._store if key not in inputs)

    def _only(self, keys: Iterator[str]) -> Self:
        copy = self.copy()
        copy.__dict__["_store"] = {key: self._store[key] for key in keys}
        return copy

    def without(self, *keys: str) -> Self:
        """Return a copy lacking `keys`."""
        return self._only(key for key in self._store if key not in keys)

    def copy(self, **values: Any) -> Self:
        """Return a shallow copy with `values` overridden."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        copy.__dict__["_store"] = {**self._store, **values}
        return copy

    __copy__ = copy  # `copy.copy` would share the values' dict

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        return self._store.get(key, default)

    def keys(self) -> KeysView[str]:
        """Return the names, in the order they were given."""
        return self._store.keys()

    def values(self) -> ValuesView[Any]:
        """Return the values, in the order they were given."""
        return self._store.values()

    def items(self) -> ItemsView[str, Any]:
        """Return (name, value) pairs, in the order they were given."""
        return self._store.items()

    def toDict(self) -> dict[str, Any]:  # noqa: N802  # DSPy's spelling
        """Return the values as plain dicts and lists, examples and pydantic models included."""
        return {key: _plain(value) for key, value in self._store.items()}

    if not TYPE_CHECKING:  # a checker must not take every attribute of a Signature for an Any

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            store = self.__dict__.get("_store", {})
            try:
                return store[name]
            except KeyError:
                raise AttributeError(
                    f"{type(self).__name__} has no value `{name}`. {nearest(name, store)}"
                    f"It has: {', '.join(store) or 'none'}."
                ) from None

        def __setattr__(self, name: str, value: Any) -> None:
            if name in self.__dict__ or name.startswith("_"):
                self.__dict__[name] = value
            else:
                self._store[name] = value

        def __delattr__(self, name: str) -> None:
            try:
                del self._store[name]
            except KeyError:
                raise AttributeError(name) from None

    def __getitem__(self, key: str) -> Any:
        return self._store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._store[key] = value

    def __delitem__(self, key: str) -> None:
        del self._store[key]

    def __contains__(self, key: object) -> bool:
        return key in self._store

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        return self._store == other._store

    def __hash__(self) -> int:
        return hash(tuple((key, _hashable(value)) for key, value in sorted(self._store.items())))

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self._store.items())
        return f"{type(self).__name__}({inside})"


def _plain(value: Any) -> Any:
    if isinstance(value, Example):
        return value.toDict()
    if callable(dump := getattr(value, "model_dump", None)):
        return dump()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _hashable(value: Any) -> Any:
    """Give something that hashes equally for equal values, also for those that cannot be hashed."""
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in value)
    try:
        hash(value)
    except TypeError:
        return frozenset(value) if isinstance(value, set) else type(value).__name__
    return value


class Completions:
    """The `n` answers of one call, as columns: `completions.answer[2]` or `completions[2].answer`.

    Args:
        list_or_dict: A list of records, or a dict of equally long lists.
        signature: Ignored; accepted because DSPy programs pass it.
    """

    def __init__(
        self,
        list_or_dict: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        signature: object = None,
    ) -> None:
        del signature
        columns: dict[str, list[Any]] = {}
        if isinstance(list_or_dict, Mapping):
            columns = {name: list(values) for name, values in list_or_dict.items()}
        else:
            for row in list_or_dict:
                for name, value in row.items():
                    columns.setdefault(name, []).append(value)
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All fields need the same number of values, not {lengths}.")
        self._columns = columns

    def items(self) -> ItemsView[str, list[Any]]:
        """Return (name, values) pairs."""
        return self._columns.items()

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        if not -len(self) <= key < len(self):
            raise IndexError(f"There are {len(self)} completions, no number {key}.")
        return Prediction({name: values[key] for name, values in self._columns.items()})

    def __getattr__(self, name: str) -> list[Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._columns[name]
        except KeyError:
            raise AttributeError(
                f"Completions have no field `{name}`. {nearest(name, self._columns)}"
                f"They have: {', '.join(self._columns)}."
            ) from None

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __contains__(self, key: object) -> bool:
        return key in self._columns

    def __iter__(self) -> Iterator[Prediction]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Completions({self._columns!r})"


class Outputs(Example):
    """What a checker sees of a prediction whose fields are known: no attribute is invented."""

    _completions: Completions | None
    _usage: Mapping[str, Usage] | None

    def __init__(self, base: Example | Mapping[str, Any] | None = None, **values: Any) -> None:
        super().__init__(base, **values)
        self.__dict__["_completions"] = None
        self.__dict__["_usage"] = None

    @property
    def completions(self) -> Completions:
        """All answers of the call; this prediction holds the first of them."""
        if self._completions is None:
            return Completions([self._store])
        return self._completions

    def get_lm_usage(self) -> dict[str, dict[str, int]] | None:
        """Return the tokens spent on this prediction by model name; None if nobody counted.

        A `Predict` always counts its own calls. A module of several calls counts them when
        `settings.track_usage` is on.
        """
        if self._usage is None:
            return None
        return {model: usage.as_dict() for model, usage in self._usage.items()}

    def set_lm_usage(self, usage: Mapping[str, Usage]) -> None:
        """Attach what was spent, by model name."""
        self.__dict__["_usage"] = dict(usage)

    def get_lm_attempts(self) -> tuple[Attempt, ...]:
        """Return every request made for this, failed ones included, in order.

        Each says which model was asked, how it failed or what it cost, and how long it took.
        """
        attempts: tuple[Attempt, ...] = self.__dict__.get("_attempts", ())
        return attempts

    def set_lm_attempts(self, attempts: Iterable[Attempt]) -> None:
        """Attach the requests that were made."""
        self.__dict__["_attempts"] = tuple(attempts)


class Prediction(Outputs):
    """What a program returns: named output values, and what they cost.

    Predictions with a `score` add and compare by it, as metrics do.

    Example:
        >>> Prediction(answer="Paris", score=0.5).answer
        'Paris'
        >>> Prediction(score=0.5) + 1
        1.5
    """

    @classmethod
    def from_completions(
        cls,
        list_or_dict: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        signature: object = None,
    ) -> Self:
        """Build from the `n` answers of a call; the prediction's own values are the first's."""
        completions = Completions(list_or_dict, signature)
        prediction = cls({name: values[0] for name, values in completions.items()})
        prediction.__dict__["_completions"] = completions
        return prediction

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def _score(self) -> float:
        if "score" not in self._store:
            raise TypeError(
                f"Only predictions with a `score` can be added or compared; this one has "
                f"{', '.join(self._store) or 'no values'}."
            )
        return float(self._store["score"])

    def __float__(self) -> float:
        return self._score()

    def __add__(self, other: float | Prediction) -> float:
        return self._score() + float(other)

    def __radd__(self, other: float | Prediction) -> float:
        return float(other) + self._score()

    def __truediv__(self, other: float | Prediction) -> float:
        return self._score() / float(other)

    def __rtruediv__(self, other: float | Prediction) -> float:
        return float(other) / self._score()

    def __lt__(self, other: float | Prediction) -> bool:
        return self._score() < float(other)

    def __le__(self, other: float | Prediction) -> bool:
        return self._score() <= float(other)

    def __gt__(self, other: float | Prediction) -> bool:
        return self._score() > float(other)

    def __ge__(self, other: float | Prediction) -> bool:
        return self._score() >= float(other)
