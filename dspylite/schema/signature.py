"""The signature: which values a model is given and which it must produce, with their types.

A signature is an immutable class; every edit returns a new one. Not here: its fields
(`schema/fields.py`), how a text is read (`schema/grammar.py`), how it becomes a prompt
(`adapters/`).
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any, dataclass_transform

from dspylite.errors import SignatureError, nearest
from dspylite.schema.callers import type_seen_by_callers
from dspylite.schema.fields import Field, InputField, Kind, OutputField, infer_prefix
from dspylite.schema.grammar import check_name, parse_signature, unknown_types
from dspylite.schema.records import Outputs
from dspylite.schema.signature_state import dumped_words, loaded_words

__all__ = [
    "AnySignature",
    "Field",
    "InputField",
    "OutputField",
    "Signature",
    "SignatureMeta",
    "ensure_signature",
    "infer_prefix",
    "make_signature",
]


def _own_hints(cls: type, frame: FrameType) -> dict[str, Any]:
    """Resolve the annotations of the class body, also those written as text.

    `frame` is where the class stands; its local names serve signatures written inside a function.
    """
    own = inspect.get_annotations(cls)
    if not any(isinstance(value, str) for value in own.values()):
        return dict(own)
    module = sys.modules.get(cls.__module__)
    probe = type(cls.__name__, (), {"__annotations__": own, "__module__": cls.__module__})
    names = {**(vars(module) if module else {}), **frame.f_globals, **frame.f_locals}
    try:
        return typing.get_type_hints(probe, globalns=names, include_extras=True)
    except Exception as error:  # whatever the user's annotation raises is reported as ours
        raise SignatureError(
            f"A type of the signature `{cls.__name__}` cannot be resolved: {error}. Define it "
            "before the signature, where its module can see it."
        ) from error


@dataclass_transform(kw_only_default=True, field_specifiers=(InputField, OutputField))
class SignatureMeta(type):
    """Makes signature classes from their bodies; holds what one can ask of and do with one."""

    __fields__: dict[str, Field]
    __instructions__: str | None

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> SignatureMeta:
        """Collect the fields of the class body, after those of its bases."""
        own = {key: value for key, value in namespace.items() if isinstance(value, Field)}
        body = {key: value for key, value in namespace.items() if key not in own}
        cls = super().__new__(mcs, name, bases, body, **kwargs)
        if "__fields__" in body:  # built from finished fields
            return cls
        fields: dict[str, Field] = {}
        for base in reversed(cls.__mro__[1:]):
            fields.update(base.__dict__.get("__fields__", {}))
        cls.__fields__ = fields
        # The class body's frame; `inspect.currentframe()` is the same, but may be None.
        frame = sys._getframe(1)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        hints = _own_hints(cls, frame) if bases else {}
        for key in hints:
            if key not in own and not key.startswith("_"):
                raise SignatureError(
                    f"`{name}.{key}` is neither an input nor an output: "
                    f"write `{key}: ... = InputField()` or `= OutputField()`."
                )
        for key, field in own.items():
            check_name(key, name)
            if isinstance(hints.get(key), Field):  # Python assigns first and annotates then
                raise SignatureError(
                    f"The field `{name}.{key}` has the name of its type, which it hides; rename "
                    "the field, or import the type by another name."
                )
            fields[key] = field.named(key, hints.get(key, str))
        doc = body.get("__doc__")
        cls.__instructions__ = inspect.cleandoc(doc) if doc and fields else None
        return cls

    if not TYPE_CHECKING:  # checkers must see the constructor that `dataclass_transform` makes

        def __call__(cls, signature=None, instructions=None, *args, **kwargs):
            """Make a signature from a text: `Signature("question -> answer")`."""
            if cls is not Signature:
                inputs = ", ".join(f"{name}=..." for name in cls.input_fields)
                raise SignatureError(
                    f"`{cls.__name__}` describes a call and is not called itself: "
                    f"write `Predict({cls.__name__})({inputs})`."
                )
            return make_signature(signature, instructions, *args, **kwargs)

        def __instancecheck__(cls, instance):
            """A prediction that has every output of a signature is a value of it."""
            if cls is Signature or not isinstance(instance, Outputs):
                return False
            return all(name in instance for name in cls.output_fields)

    @property
    def fields(cls) -> Mapping[str, Field]:
        """All fields by name, inputs first."""
        return MappingProxyType({**cls.input_fields, **cls.output_fields})

    @property
    def input_fields(cls) -> Mapping[str, Field]:
        """The inputs by name, in order."""
        return cls._of_kind("input")

    @property
    def output_fields(cls) -> Mapping[str, Field]:
        """The outputs by name, in order."""
        return cls._of_kind("output")

    def _of_kind(cls, kind: str) -> Mapping[str, Field]:
        """Pick the fields of a kind; kept, because each call asks several times."""
        kept: dict[str, Mapping[str, Field]] | None = cls.__dict__.get("__by_kind__")
        if kept is None:
            sorted_by_kind: dict[str, dict[str, Field]] = {"input": {}, "output": {}}
            for name, field in cls.__fields__.items():
                sorted_by_kind[field.kind][name] = field
            kept = {each: MappingProxyType(fields) for each, fields in sorted_by_kind.items()}
            type.__setattr__(cls, "__by_kind__", kept)
        return kept[kind]

    @property
    def instructions(cls) -> str:
        """The task in words: the docstring, or a sentence made from the field names."""
        for base in cls.__mro__:
            if text := base.__dict__.get("__instructions__"):
                return str(text)
        inputs, outputs = _names(cls.input_fields), _names(cls.output_fields)
        return f"Given {inputs}, produce {outputs}." if inputs else f"Produce {outputs}."

    @property
    def signature(cls) -> str:
        """The field names as a signature text, such as `"context, question -> answer"`."""
        return f"{', '.join(cls.input_fields)} -> {', '.join(cls.output_fields)}"

    def with_instructions(cls, instructions: str) -> type[AnySignature]:
        """Return a signature with other instructions.

        Raises:
            SignatureError: They are no text.
        """
        _check_instructions(instructions)
        return _build(cls.__name__, tuple(cls.__fields__.values()), inspect.cleandoc(instructions))

    def append_instructions(cls, instructions: str) -> type[AnySignature]:
        """Return a signature whose instructions go on, after a blank line, with `instructions`."""
        return cls.with_instructions(f"{cls.instructions}\n\n{inspect.cleandoc(instructions)}")

    def with_updated_fields(
        cls, name: str, type_: Any = None, **options: Any
    ) -> type[AnySignature]:
        """Return a signature in which the field `name` has another type or other options.

        Args:
            name: The field to change.
            type_: Its new type; the old one by default.
            **options: What `InputField` and `OutputField` take. A word of your own is kept in
                `json_schema_extra`, for programs that read it there.

        Raises:
            SignatureError: There is no such field, or an option looks like a misspelt one.
        """
        field = cls._existing(name)
        changed = field.changed(type_, **options)
        return cls._with(tuple(changed if f is field else f for f in cls.__fields__.values()))

    def append(cls, name: str, field: Any, type_: Any = None) -> type[AnySignature]:
        """Return a signature with a further field, after the others of its kind."""
        return cls.insert(-1, name, field, type_)

    def prepend(cls, name: str, field: Any, type_: Any = None) -> type[AnySignature]:
        """Return a signature with a further field, before the others of its kind."""
        return cls.insert(0, name, field, type_)

    def insert(cls, index: int, name: str, field: Any, type_: Any = None) -> type[AnySignature]:
        """Return a signature with a further field at a place among the others of its kind.

        Args:
            index: The place; negative counts from the end, -1 is the last place.
            name: The new field's name.
            field: `InputField(...)` or `OutputField(...)`.
            type_: The new field's type; `str` by default.

        Raises:
            SignatureError: The name is taken or impossible, or there is no such place.
        """
        check_name(name, cls.__name__)
        if name in cls.__fields__:
            raise SignatureError(
                f"`{cls.__name__}` has a field `{name}` already; choose another name."
            )
        if not isinstance(field, Field):
            raise SignatureError(
                f"`{name}` needs `InputField(...)` or `OutputField(...)`, not {field!r}."
            )
        inputs, outputs = list(cls.input_fields.values()), list(cls.output_fields.values())
        kin = inputs if field.kind == "input" else outputs
        place = index if index >= 0 else len(kin) + index + 1
        if not 0 <= place <= len(kin):
            raise SignatureError(f"There is no place {index} among {len(kin)} {field.kind} fields.")
        kin.insert(place, field.named(name, type_))
        return cls._with((*inputs, *outputs))

    def delete(cls, name: str) -> type[AnySignature]:
        """Return a signature without the field `name`; the same one if it has no such field."""
        if name not in cls.__fields__:
            return typing.cast("type[AnySignature]", cls)
        return cls._with(tuple(f for f in cls.__fields__.values() if f.name != name))

    def equals(cls, other: object) -> bool:
        """Tell whether two signatures have the same fields in the same order and instructions."""
        return (
            isinstance(other, SignatureMeta)
            and cls.instructions == other.instructions
            and list(cls.fields.values()) == list(other.fields.values())
        )

    def dump_state(cls) -> dict[str, Any]:
        """Return instructions, prefixes and descriptions as plain data, in DSPy's form."""
        words = [dumped_words(each.name, each.prefix, each.desc) for each in cls.fields.values()]
        return {"instructions": cls.instructions, "fields": words}

    def load_state(cls, state: Mapping[str, Any]) -> type[AnySignature]:
        """Return this signature with saved instructions, prefixes and descriptions.

        Raises:
            SavingError: It is no state of a signature with so many fields.
        """
        instructions, words = loaded_words(state, cls.__name__, tuple(cls.fields))
        fields = tuple(
            dataclasses.replace(each, prefix=words[each.name].prefix, desc=words[each.name].desc)
            for each in cls.__fields__.values()
        )
        if instructions == cls.instructions and fields == tuple(cls.__fields__.values()):
            return typing.cast("type[AnySignature]", cls)  # still the class that was written
        return _build(cls.__name__, fields, instructions)

    def __repr__(cls) -> str:
        sides = (
            ", ".join(f"{field.name}: {field.type_name}" for field in fields.values())
            for fields in (cls.input_fields, cls.output_fields)
        )
        return f"{cls.__name__}({' -> '.join(sides)})"

    def _existing(cls, name: str) -> Field:
        try:
            return cls.__fields__[name]
        except KeyError:
            raise SignatureError(
                f"`{cls.__name__}` has no field `{name}`. {nearest(name, cls.__fields__)}"
                f"It has: {', '.join(cls.fields)}."
            ) from None

    def _with(cls, fields: tuple[Field, ...]) -> type[AnySignature]:
        given = next(
            (text for b in cls.__mro__ if (text := b.__dict__.get("__instructions__"))), None
        )
        return _build(cls.__name__, fields, given)


if TYPE_CHECKING:
    _Base = Outputs  # what a call returns is a value of its signature
else:
    _Base = object


class Signature(_Base, metaclass=SignatureMeta):
    """What a model is given and what it must produce.

    Write one as a class: annotated attributes made with `InputField` and `OutputField`, the
    docstring being the instructions. `Signature("question -> answer")` makes one from text.

    Example:
        >>> class Grade(Signature):
        ...     \"\"\"Grade the essay.\"\"\"
        ...
        ...     essay: str = InputField()
        ...     mark: int = OutputField(ge=1, le=6)
        >>> Grade.signature, Grade.instructions
        ('essay -> mark', 'Grade the essay.')
        >>> Signature("question -> answer: int")
        StringSignature(question: str -> answer: int)
    """

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class AnySignature(Signature):
    """A signature known only at run time: for a type checker every field of it is an `Any`."""

    if TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...


def make_signature(
    signature: str | Mapping[str, Any],
    instructions: str | None = None,
    signature_name: str = "StringSignature",
    custom_types: Mapping[str, Any] | None = None,
) -> type[AnySignature]:
    """Make a signature from a text, or from a dict of fields.

    Args:
        signature: `"inputs -> outputs"`, or a dict from name to `InputField()`, `OutputField()`, or
            a pair of a type and one of these.
        instructions: The task in words; by default a sentence made from the field names.
        signature_name: Name of the class made.
        custom_types: Types of your own that the text names. Without this argument they are looked
            for where the callers stand, nearest first; nothing is imported or run for it.

    Returns:
        A signature. Equal texts give the same class, which is safe because it never changes.

    Raises:
        SignatureError: The text does not parse, a name comes twice, a type is unknown, or
            `instructions` or `custom_types` are of another kind.

    Example:
        >>> made = make_signature("context: list[str], question -> answer")
        >>> made.input_fields["context"].type_name
        'list[str]'
    """
    if instructions is not None:
        _check_instructions(instructions)
    if isinstance(signature, str):
        if custom_types is not None:
            if not isinstance(custom_types, Mapping):
                raise SignatureError(
                    f"`custom_types` is a dict from names to types, not {custom_types!r:.200}."
                )
            return _build_from_text(signature, instructions, signature_name, custom_types)
        if not (unknown := unknown_types(signature)):
            return _from_text(signature, instructions, signature_name, ())
        seen = {name: type_seen_by_callers(name) for name in unknown}
        found = tuple((name, kind) for name, kind in seen.items() if kind is not None)
        # Not by the text alone: the same word is another type in another module.
        by_types = all(_is_plain_class(kind) for _, kind in found)
        build = _from_text if by_types else _from_text.__wrapped__
        return build(signature, instructions, signature_name, found)
    if not isinstance(signature, Mapping):
        raise SignatureError(
            f"A signature is a text like 'question -> answer', a dict of fields or a class, "
            f"not {signature!r}."
        )
    fields: list[Field] = []
    for name, value in signature.items():
        check_name(name, signature_name)
        annotation, field = value if _is_pair(value) else (None, value)
        if not isinstance(field, Field):
            raise SignatureError(
                f"`{name}` needs `InputField(...)` or `OutputField(...)`, not {field!r}."
            )
        fields.append(field.named(name, annotation))
    return _build(signature_name, tuple(fields), instructions and inspect.cleandoc(instructions))


def _check_instructions(given: object) -> None:
    if not isinstance(given, str):
        raise SignatureError(f"`instructions` of a signature must be a text, not {given!r:.200}.")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2  # pyright: ignore[reportUnknownArgumentType]


def _is_plain_class(kind: Any) -> bool:
    """Whether a type is equal to itself alone, so that a cache may tell it from others."""
    meta: Any = type(kind)
    return isinstance(kind, type) and (meta.__eq__, meta.__hash__) == (type.__eq__, type.__hash__)


def ensure_signature(signature: Any, instructions: str | None = None) -> type[Signature]:
    """Return the signature that a user passed in any accepted form.

    Raises:
        SignatureError: It is neither a signature class nor a text nor a dict of fields.
    """
    found: type[Signature]
    if not isinstance(signature, SignatureMeta):
        found = make_signature(signature, instructions)
    else:
        found = typing.cast("type[Signature]", signature)
        found = found if instructions is None else found.with_instructions(instructions)
    if not found.output_fields:
        raise SignatureError(f"`{found.__name__}` has no outputs; add one with `OutputField()`.")
    return found


def _build_from_text(
    text: str, instructions: str | None, name: str, custom_types: Mapping[str, Any] | None
) -> type[AnySignature]:
    inputs, outputs = parse_signature(text, custom_types)
    kinds: tuple[tuple[Kind, Any], ...] = (("input", inputs), ("output", outputs))
    fields = tuple(
        Field(kind=kind, default=parsed.default).named(parsed.name, parsed.annotation)
        for kind, side in kinds
        for parsed in side
    )
    return _build(name, fields, instructions and inspect.cleandoc(instructions))


@functools.lru_cache(maxsize=1024)
def _from_text(
    text: str, instructions: str | None, name: str, found: tuple[tuple[str, Any], ...]
) -> type[AnySignature]:
    return _build_from_text(text, instructions, name, dict(found))


def _build(name: str, fields: tuple[Field, ...], instructions: str | None) -> type[AnySignature]:
    body = {
        "__fields__": {field.name: field for field in fields},
        "__instructions__": instructions,
        "__module__": __name__,
        "__doc__": instructions,
    }
    return typing.cast("type[AnySignature]", SignatureMeta(name, (AnySignature,), body))


def _names(fields: Mapping[str, Field]) -> str:
    return ", ".join(f"`{name}`" for name in fields)


def _reduce(cls: SignatureMeta) -> str | tuple[Callable[..., object], tuple[object, ...]]:
    """Pickle a signature of a module by its name, and any other by its fields."""
    name = cls.__qualname__
    found: Any = sys.modules.get(cls.__module__)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is cls:
        return name
    given = next((text for b in cls.__mro__ if (text := b.__dict__.get("__instructions__"))), None)
    return _build, (cls.__name__, tuple(cls.__fields__.values()), given)


copyreg.pickle(SignatureMeta, typing.cast("Any", _reduce))  # typeshed knows instances only
