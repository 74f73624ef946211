"""The fields of a signature, and `InputField` and `OutputField`, which declare them.

Not here: the class that holds them (`schema/signature.py`).
"""

from __future__ import annotations

import re
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from dspylite.errors import SignatureError, nearest
from dspylite.schema.grammar import REQUIRED, type_name

Kind = Literal["input", "output"]

CONSTRAINTS = frozenset(
    {"gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern", "examples"}
    | {"max_digits", "decimal_places"}
)
"""What pydantic's `Field` checks or shows and a field of a signature may carry."""

_WITHOUT_EFFECT = frozenset({"format", "parser"})
"""Options of old DSPy programs, which DSPy itself has stopped to read."""

_WORDS = ("desc", "prefix", "description", "title", "json_schema_extra", "allow_inf_nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One input or output of a signature.

    Attributes:
        name: The keyword it is passed or read by.
        kind: `"input"` or `"output"`.
        annotation: Its type.
        desc: What it means, in words for the model; empty if the name says it all.
        prefix: A label in words; made from the name unless given.
        default: The value of an input that is not passed; `...` if it must be passed.
        constraints: Bounds that an output must keep, as (name, value) pairs of pydantic's `Field`.
        extra: Further (name, value) pairs for programs that read `json_schema_extra`.
    """

    kind: Kind
    name: str = ""
    annotation: Any = str
    desc: str = ""
    prefix: str = ""
    default: Any = REQUIRED
    constraints: tuple[tuple[str, Any], ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def required(self) -> bool:
        """Whether an input must be passed."""
        return self.default is REQUIRED

    def is_required(self) -> bool:
        """Tell whether it has no default, in the spelling of pydantic."""
        return self.required

    @property
    def description(self) -> str | None:
        """What it means, or None, in the spelling of pydantic."""
        return self.desc or None

    @property
    def title(self) -> str | None:
        """The title it was declared with."""
        title: str | None = dict(self.extra).get("title")
        return title

    @property
    def type_name(self) -> str:
        """The type as it would stand in a signature text."""
        return type_name(self.annotation)

    @property
    def json_schema_extra(self) -> Mapping[str, Any]:
        """The description and prefix where DSPy programs look for them; it cannot be written to."""
        words: dict[str, Any] = {"desc": self.desc, "prefix": self.prefix}
        if not self.desc and self.name:
            words["desc"] = _placeholder(self.name)
        if self.constraints:
            words["constraints"] = ", ".join(
                f"{name}={bound!r}" for name, bound in self.constraints
            )
        return MappingProxyType({**dict(self.extra), **words, "__dspy_field_type": self.kind})

    def named(self, name: str, annotation: Any = None) -> Field:
        """Return it as the field `name` of a signature, with another type if one is given.

        Raises:
            SignatureError: The type is written as text.
        """
        return replace(
            self,
            name=name,
            annotation=self.annotation if annotation is None else _checked_type(name, annotation),
            desc="" if self.desc == _placeholder(name) else self.desc,
            prefix=self.prefix or f"{infer_prefix(name)}:",
        )

    def changed(self, annotation: Any = None, **options: Any) -> Field:
        """Return it with another type or other options; unknown ones are kept as `extra`.

        Raises:
            SignatureError: An option looks like a misspelt one, or the type is written as text.
        """
        known = {
            name: options[name] for name in options if name in {"default", *_WORDS, *CONSTRAINTS}
        }
        changed = _with_options(self, known, f"with_updated_fields({self.name!r}, ...)")
        own: dict[str, Any] = {name: options[name] for name in options if name not in known}
        for name in own:
            hint = nearest(name, ("default", *_WORDS, *CONSTRAINTS))
            if name.startswith("_") or (hint and name not in _WITHOUT_EFFECT):
                raise SignatureError(
                    f"The field `{self.name}` has no option `{name}`. {hint}".strip()
                )
        changed = replace(changed, extra=_merged(changed.extra, own))
        return changed.named(self.name, annotation)


def _placeholder(name: str) -> str:
    """Give what DSPy writes in place of a description that nobody gave."""
    return f"${{{name}}}"


def _checked_type(name: str, annotation: Any) -> Any:
    if isinstance(annotation, str):
        raise SignatureError(
            f"The type of `{name}` is the text {annotation!r}; pass the type itself, unquoted."
        )
    return annotation


def _merged(
    pairs: tuple[tuple[str, Any], ...], more: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
    return tuple({**dict(pairs), **more}.items())


def _with_options(field: Field, options: Mapping[str, Any], call: str) -> Field:
    """Apply the options that both kinds of fields take, and refuse all others."""
    inner: Any = options.get("json_schema_extra") or {}
    if not isinstance(inner, Mapping):
        raise SignatureError(f"`json_schema_extra` of `{call}` must be a dict, not {inner!r}.")
    extra: dict[str, Any] = dict(typing.cast("Mapping[str, Any]", inner))
    given = dict(options)
    for word in ("desc", "prefix"):
        if word in extra and not given.get(word):
            given[word] = extra[word]
        extra.pop(word, None)
    bounds = {name: value for name, value in given.items() if name in CONSTRAINTS}
    for name, value in given.items():
        if name in _WITHOUT_EFFECT:
            warnings.warn(
                f"`{name}` of `{call}` has no effect; leave it out.",
                DeprecationWarning,
                stacklevel=3,
            )
            extra[name] = value
        elif name == "title":
            extra[name] = value
        elif name == "allow_inf_nan" and value:
            raise SignatureError(
                f"`{call}` takes no `allow_inf_nan=True`: JSON knows no infinity and no NaN."
            )
        elif name not in CONSTRAINTS and name not in {"default", *_WORDS}:
            known = ["desc", "prefix", "default", "description", "title", *sorted(CONSTRAINTS)]
            raise SignatureError(
                f"`{call}` takes no `{name}`. {nearest(name, known)}It takes {', '.join(known)}."
            )
    desc, description = given.get("desc"), given.get("description")
    return replace(
        field,
        desc=next((str(text) for text in (desc, description) if text is not None), field.desc),
        prefix=given.get("prefix") or field.prefix,
        default=given.get("default", field.default),
        constraints=_merged(field.constraints, bounds),
        extra=_merged(field.extra, extra),
    )


def InputField(  # noqa: N802  # DSPy's spelling
    *,
    desc: str | None = None,
    prefix: str = "",
    default: Any = REQUIRED,
    init: Literal[True] = True,  # noqa: ARG001  # read by type checkers: part of the constructor
    **options: Any,
) -> Any:
    """Declare an input of a class signature.

    Args:
        desc: What it means, in words for the model; `description` is the same.
        prefix: A label in words; made from the name by default.
        default: The value when it is not passed. Without one it must be passed.
        init: For type checkers; leave it alone.
        **options: Kept with the field: bounds and `examples` of pydantic's `Field`, `title`,
            `json_schema_extra`. `format` and `parser`, of old DSPy programs, have no effect.

    Raises:
        SignatureError: An unknown keyword.
    """
    options |= {"desc": desc, "prefix": prefix, "default": default}
    return _with_options(Field(kind="input"), options, "InputField")


def OutputField(  # noqa: N802  # DSPy's spelling
    *,
    desc: str | None = None,
    prefix: str = "",
    default: Any = REQUIRED,
    init: Literal[False] = False,  # noqa: ARG001  # read by type checkers: not in the constructor
    **options: Any,
) -> Any:
    """Declare an output of a class signature.

    Args:
        desc: What it means, in words for the model; `description` is the same.
        prefix: A label in words; made from the name by default.
        default: Kept with the field and never used, of which a warning tells: an answer that lacks
            an output does not parse. Give the output a type with `| None` instead.
        init: For type checkers; leave it alone.
        **options: Bounds the answer must keep: `gt`, `ge`, `lt`, `le`, `multiple_of`,
            `min_length`, `max_length`, `pattern`, `max_digits`, `decimal_places`. An answer outside
            them does not parse. Also `examples`, `title`, `json_schema_extra`. `format` and
            `parser`, of old DSPy programs, have no effect.

    Raises:
        SignatureError: An unknown keyword.
    """
    if default is not REQUIRED:
        warnings.warn(
            "`default` of an `OutputField` has no effect: an answer that lacks an output does not "
            "parse. For an output that may be missing use a type with `| None`.",
            stacklevel=2,
        )
    options |= {"desc": desc, "prefix": prefix, "default": default}
    return _with_options(Field(kind="output"), options, "OutputField")


_BETWEEN_WORDS = re.compile(
    r"(?<=[a-z0-9])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])|_+"
)


def infer_prefix(attribute_name: str) -> str:
    """Make a label in words from an attribute's name.

    Example:
        >>> infer_prefix("shortAnswer_2"), infer_prefix("HTMLText")
        ('Short Answer 2', 'HTML Text')
    """
    words = _BETWEEN_WORDS.sub(" ", attribute_name).split()
    return " ".join(word if word.isupper() else word.capitalize() for word in words)
