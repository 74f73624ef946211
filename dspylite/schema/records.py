"""What programs take and give: `Example`, `Prediction`, `Completions`.

Not here: turning a model's text into these (`adapters/`, `programs/`).
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, SupportsFloat, TypeAlias

from dspylite.errors import nearest
from dspylite.schema.messages import Attempt, Usage


class Example:
    """A record of named values, readable as attributes and as items.

    Values whose names begin with `dspy_` are a program's own notes: `keys`, `values`, `items`,
    `len` and the repr pass over them.

    Args:
        base: An example, a prediction or a mapping to start from.
        **values: Values that override those of `base`.

    Raises:
        TypeError: `base` is something else.

    Example:
        >>> example = Example(question="1+1?", answer="2").with_inputs("question")
        >>> example.answer, dict(example.inputs().items())
        ('2', {'question': '1+1?'})
    """

    _store: dict[str, Any]
    _input_keys: frozenset[str] | None

    def __init__(self, /, base: Example | Mapping[str, Any] | None = None, **values: Any) -> None:
        start: dict[str, Any] = {}
        keys: frozenset[str] | None = None
        if isinstance(base, Example):
            start, keys = base._store, base._input_keys  # noqa: SLF001  # of its own class
        elif base is not None:
            try:
                start = dict(base)
            except (TypeError, ValueError):
                raise TypeError(
                    f"`{type(self).__name__}` starts from a record or a dict, not {base!r:.200}; "
                    "pass values by name."
                ) from None
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
        """Return a copy holding what is not an input; it does not say which values are inputs.

        Raises:
            ValueError: `with_inputs` was never called.
        """
        inputs = self.inputs()
        labels = self._only(key for key in self._store if key not in inputs)
        labels.__dict__["_input_keys"] = None
        return labels

    def _only(self, keys: Iterator[str]) -> Self:
        copy = self.copy()
        copy.__dict__["_store"] = {key: self._store[key] for key in keys}
        return copy

    def without(self, *keys: str) -> Self:
        """Return a copy lacking `keys`.

        Raises:
            KeyError: There is no value of such a name.
        """
        for key in keys:
            if key not in self._store:
                raise KeyError(f"no value {key!r}. {nearest(key, self._store)}".strip())
        return self._only(key for key in self._store if key not in keys)

    def copy(self, /, **values: Any) -> Self:
        """Return a shallow copy with `values` overridden."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        copy.__dict__["_store"] = {**self._store, **values}
        return copy

    __copy__ = copy  # `copy.copy` would share the values' dict

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        return self._store.get(key, default)

    def keys(self, include_dspy: bool = False) -> list[str]:  # noqa: FBT001, FBT002  # as in DSPy
        """Return the names, in the order they were given; also `dspy_` ones if asked to."""
        return [key for key in self._store if include_dspy or not _is_note(key)]

    def values(self, include_dspy: bool = False) -> list[Any]:  # noqa: FBT001, FBT002  # as in DSPy
        """Return the values, in the order they were given; also `dspy_` ones if asked to."""
        return [self._store[key] for key in self.keys(include_dspy)]

    def items(self, include_dspy: bool = False) -> list[tuple[str, Any]]:  # noqa: FBT001, FBT002
        """Return (name, value) pairs, in the order they were given; `dspy_` ones if asked to."""
        return [(key, self._store[key]) for key in self.keys(include_dspy)]

    def toDict(self) -> dict[str, Any]:  # noqa: N802  # DSPy's spelling
        """Return all values as plain dicts and lists, examples and pydantic models included.

        What JSON does not know, such as dates, stays as it is: `json.dumps(..., default=str)`.
        """
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
            if name in self.__dict__ or name.startswith("_") or _is_of_class(type(self), name):
                object.__setattr__(self, name, value)
            else:
                self._store[name] = value

        def __delattr__(self, name: str) -> None:
            if name in self.__dict__ or _is_of_class(type(self), name):
                object.__delattr__(self, name)
                return
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
        return len(self.keys())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        return self._store == other._store

    def __hash__(self) -> int:
        return hash(tuple((key, _hashable(value)) for key, value in sorted(self._store.items())))

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self.items())
        return f"{type(self).__name__}({inside})"


def _is_note(name: object) -> bool:
    """Whether a value is a program's own note, which no prompt and no table shows."""
    return isinstance(name, str) and name.startswith("dspy_")


def _is_of_class(kind: type, name: str) -> bool:
    """Whether an attribute is that of a user's class or a property, and not a value.

    A value by the name of one of our methods is a value all the same: it is read as an item, and
    the method stays whole.
    """
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__module__ != __name__ or hasattr(base.__dict__[name], "__set__")
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return value
    if callable(to_dict := getattr(value, "toDict", None)):
        return to_dict()
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


Rows: TypeAlias = "Sequence[Mapping[str, Any] | Example]"
"""Records of the same names."""


class Completions:
    """The `n` answers of one call, as columns: `completions.answer[2]` or `completions[2].answer`.

    Args:
        list_or_dict: A list of records with the same names, or a dict of equally long lists.
        signature: Kept as `signature`, for programs that read it there.

    Raises:
        ValueError: The names or lengths differ, or a column is no list.
    """

    signature: Any

    def __init__(
        self,
        list_or_dict: Rows | Completions | Mapping[str, Sequence[Any]],
        signature: object = None,
    ) -> None:
        self.signature = signature
        columns: dict[str, list[Any]] = {}
        if isinstance(list_or_dict, Mapping | Completions):
            for name, values in list_or_dict.items():
                if isinstance(values, str) or not isinstance(values, Sequence):
                    raise ValueError(f"`{name}` needs a list of values, not {values!r:.200}.")
                columns[name] = list(values)
        else:
            for index, row in enumerate(list_or_dict):
                names = [name for name, _ in row.items()]
                if index and set(names) != set(columns):
                    raise ValueError(
                        f"All completions need the same fields: the first has {list(columns)}, "
                        f"number {index} has {names}."
                    )
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
        if not isinstance(key, int):
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
    _usage: Mapping[str, Usage | Mapping[str, Any]] | None

    def __init__(self, /, base: Example | Mapping[str, Any] | None = None, **values: Any) -> None:
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
        return {
            model: usage.as_dict() if isinstance(usage, Usage) else dict(usage)
            for model, usage in self._usage.items()
        }

    def set_lm_usage(self, usage: Mapping[str, Usage | Mapping[str, Any]] | None) -> None:
        """Attach what was spent, by model name; None takes it off."""
        self.__dict__["_usage"] = None if usage is None else dict(usage)

    def get_lm_attempts(self) -> tuple[Attempt, ...]:
        """Return every request made for this, failed ones included, in order.

        Each says which model was asked, how it failed or what it cost, and how long it took.
        """
        attempts: tuple[Attempt, ...] = self.__dict__.get("_attempts", ())
        return attempts

    def set_lm_attempts(self, attempts: Iterable[Attempt]) -> None:
        """Attach the requests that were made."""
        self.__dict__["_attempts"] = tuple(attempts)

    def keep_cost_of(self, other: Outputs) -> None:
        """Attach the usage and the requests of another prediction, which this one was made from."""
        self.__dict__["_usage"] = other._usage
        self.set_lm_attempts(other.get_lm_attempts())


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
        list_or_dict: Rows | Completions | Mapping[str, Sequence[Any]],
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

    def __repr__(self) -> str:
        number = len(self._completions) if self._completions is not None else 1
        return super().__repr__() + (f" ({number} completions)" if number > 1 else "")

    def __float__(self) -> float:
        if "score" not in self._store:
            raise ValueError(
                f"Only predictions with a `score` can be added or compared; this one has "
                f"{', '.join(self._store) or 'no values'}."
            )
        return float(self._store["score"])

    def __add__(self, other: SupportsFloat) -> float:
        return float(self) + float(other) if _is_number(other) else NotImplemented

    def __radd__(self, other: SupportsFloat) -> float:
        return float(other) + float(self) if _is_number(other) else NotImplemented

    def __sub__(self, other: SupportsFloat) -> float:
        return float(self) - float(other) if _is_number(other) else NotImplemented

    def __rsub__(self, other: SupportsFloat) -> float:
        return float(other) - float(self) if _is_number(other) else NotImplemented

    def __mul__(self, other: SupportsFloat) -> float:
        return float(self) * float(other) if _is_number(other) else NotImplemented

    def __rmul__(self, other: SupportsFloat) -> float:
        return float(other) * float(self) if _is_number(other) else NotImplemented

    def __truediv__(self, other: SupportsFloat) -> float:
        return float(self) / float(other) if _is_number(other) else NotImplemented

    def __rtruediv__(self, other: SupportsFloat) -> float:
        return float(other) / float(self) if _is_number(other) else NotImplemented

    def __lt__(self, other: SupportsFloat) -> bool:
        return float(self) < float(other) if _is_number(other) else NotImplemented

    def __le__(self, other: SupportsFloat) -> bool:
        return float(self) <= float(other) if _is_number(other) else NotImplemented

    def __gt__(self, other: SupportsFloat) -> bool:
        return float(self) > float(other) if _is_number(other) else NotImplemented

    def __ge__(self, other: SupportsFloat) -> bool:
        return float(self) >= float(other) if _is_number(other) else NotImplemented


def _is_number(other: object) -> bool:
    return hasattr(type(other), "__float__")
