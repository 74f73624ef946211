"""`Code` and `Reasoning`: texts of a certain kind.

Not here: how they stand in a prompt and are streamed (`adapters/`).
"""

from __future__ import annotations

import copyreg
import re
import threading
import typing
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Self, SupportsIndex, cast

import pydantic
from pydantic._internal._model_construction import ModelMetaclass
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from dspylite.abc import LanguageModel
from dspylite.adapters.types.base import Type
from dspylite.errors import SignatureError
from dspylite.schema.messages import LMDelta
from dspylite.schema.signature import Signature


class _Text(Type):
    """A value that a model writes as a plain text."""

    model_config = pydantic.ConfigDict(extra="forbid")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler, /
    ) -> JsonSchemaValue:
        """Ask a model for a text; the object with its one field is read as well."""
        if handler.mode == "serialization":
            return handler(core_schema)
        schema: JsonSchemaValue = {"type": "string", "title": cls.__name__}
        return {**schema, "description": said} if (said := cls.description()) else schema


def _one_field(kind: type[Type], name: str, value: Any) -> str:
    """Read the text of a value that is a text or an object with one field.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, Mapping):
        fields = dict(cast("Mapping[str, Any]", value))
        if fields.keys() != {name}:
            raise ValueError(f"an object of `{kind.__name__}` has the one field `{name}`")
        value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"`{kind.__name__}` is a text, not {type(value).__name__}")
    return value


@typing.dataclass_transform(kw_only_default=True, field_specifiers=(pydantic.Field,))
class _CodeMeta(ModelMetaclass):
    """Makes `Code["java"]`, one class per language, which pickles by its name."""

    def __getitem__(cls, language: str) -> type[Code]:  # noqa: N805  # of a metaclass
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            raise SignatureError(
                f"`{cls.__name__}[...]` takes the name of a language such as 'java', "
                f"not {language!r}."
            )
        base: Any = cls if cls not in _MADE_OF else _MADE_OF[cls][0]
        with _MAKING:
            made = _MADE.get((base, language))
            if made is None:
                name = f"{base.__name__}_{language}"
                names = {"language": language, "__module__": base.__module__}
                make: Any = type(cls)
                made = cast("type[Code]", make(name, (base,), names))
                _MADE[base, language] = made
                _MADE_OF[made] = (base, language)
        return made


_LANGUAGE = re.compile(r"[^\s\x00-\x1f`]([^\x00-\x1f`]{0,48}[^\s\x00-\x1f`])?")
_MAKING = threading.Lock()
_MADE: dict[tuple[type, str], type[Code]] = {}
_MADE_OF: dict[type, tuple[type[Code], str]] = {}


def _reduce(cls: type) -> Any:
    return cls.__qualname__ if cls not in _MADE_OF else (_of_language, _MADE_OF[cls])


def _of_language(base: type[Code], language: str) -> type[Code]:
    return base[language]


copyreg.pickle(_CodeMeta, cast("Any", _reduce))  # typeshed knows instances only


class Code(_Text, metaclass=_CodeMeta):
    r"""Source code, in the language of the class: `Code["java"]`; Python by default.

    As an output it may come in a Markdown fence, alone or among words; the first one counts. As an
    input a text will do.

    Attributes:
        code: The text, without a fence.
        language: The language's name, of the class.

    Raises:
        pydantic.ValidationError: It is no text, or its fence is never closed.

    Example:
        >>> answer = Code["java"].model_validate("It is:\n```java\nint a = 1;\n```")
        >>> str(answer), answer.language
        ('int a = 1;', 'java')
    """

    code: str

    language: ClassVar[str] = "python"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        if isinstance(value, Code) and (type(value) is Code or value.language == cls.language):
            return {"code": value.code}
        return {"code": _without_fence(_one_field(cls, "code", value))}

    def __str__(self) -> str:
        return self.code

    def format(self) -> str:
        """Write the code as it is."""
        return self.code

    @classmethod
    def description(cls) -> str:
        """Tell a model how to write it."""
        return (
            f"{cls.language} code, in a Markdown block that begins with ```{cls.language.lower()}"
        )


_OPENING = re.compile(r" {0,3}(?P<fence>`{3,})[^`\n]*")
_CLOSING = re.compile(r" {0,3}(?P<fence>`{3,})[ \t\r]*")


def _without_fence(text: str) -> str:
    """Take code out of the first Markdown fence; text without any is all code.

    Raises:
        ValueError: The fence that the text begins with is never closed.
    """
    lines = text.split("\n")
    start, opening = next(
        ((at, found) for at, line in enumerate(lines) if (found := _OPENING.fullmatch(line))),
        (0, None),
    )
    if opening is None:
        bare = text.strip()
        is_one_line = len(bare) > 6 and bare.startswith("```") and bare.endswith("```")
        return bare[3:-3].strip() if is_one_line and "`" not in bare[3:-3] else text
    fence = opening["fence"]
    for end in range(start + 1, len(lines)):
        closing = _CLOSING.fullmatch(lines[end])
        if closing is not None and len(closing["fence"]) >= len(fence):
            return _without_blank_lines(lines[start + 1 : end])
        if end == len(lines) - 1 and lines[end].rstrip().endswith(fence):
            last = lines[end].rstrip().removesuffix(fence)  # it forgot the line break
            return _without_blank_lines([*lines[start + 1 : end], last])
    if any(line.strip() for line in lines[:start]):
        return text  # it quotes a fence, and is none
    raise ValueError(f"the code begins with {fence}, which is never closed")


def _without_blank_lines(lines: list[str]) -> str:
    """Join lines, without the blank ones around them; the first one keeps its indentation."""
    start = next((at for at, line in enumerate(lines) if line.strip()), len(lines))
    return "\n".join(lines[start:]).rstrip()


class Reasoning(_Text):
    """What a model thought before it answered; used like a text.

    A model that reasons on its own, when it is asked to (`reasoning_effort`), fills it with that;
    any other writes it as a part of its answer.

    Attributes:
        content: The text.

    Raises:
        pydantic.ValidationError: It is no text.

    Example:
        >>> why = Reasoning(content="Two and two.")
        >>> why == "Two and two.", why.upper(), f"{why} So 4."
        (True, 'TWO AND TWO.', 'Two and two. So 4.')
    """

    content: str

    model_config = pydantic.ConfigDict(frozen=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        if isinstance(value, Reasoning):
            return {"content": value.content}
        return {"content": _one_field(cls, "content", value)}

    def format(self) -> str:
        """Write the text as it is."""
        return self.content

    @classmethod
    def adapt_to_native_lm_feature(
        cls,
        signature: type[Signature],
        field_name: str,
        lm: LanguageModel,
        lm_kwargs: MutableMapping[str, Any],
    ) -> type[Signature]:
        """Leave it to the model where it reasons on its own and is asked to."""
        own: Mapping[str, Any] = getattr(lm, "kwargs", None) or {}
        effort = lm_kwargs.get("reasoning_effort", own.get("reasoning_effort"))
        if effort is None or "reasoning" not in lm.capabilities:
            return signature
        if "gpt-5" in lm.model and getattr(lm, "model_type", "chat") == "chat":
            return signature  # OpenAI's chat API never shows what they reasoned
        return signature.delete(field_name)

    @classmethod
    def parse_lm_response(cls, response: Mapping[str, Any]) -> Self | None:
        """Take what the model reasoned."""
        content = response.get("reasoning_content")
        return cls(content=content) if isinstance(content, str) else None

    @classmethod
    def parse_stream_chunk(cls, chunk: LMDelta) -> str | None:
        """Take what the model reasons while it does."""
        return chunk.reasoning or None

    def __repr__(self) -> str:
        return repr(self.content)

    def __str__(self) -> str:
        return self.content

    def __format__(self, format_spec: str, /) -> str:
        return format(self.content, format_spec)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Reasoning):
            return self.content == other.content
        return self.content == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.content)

    def __lt__(self, other: Reasoning | str) -> bool:
        return self.content < _plain(other)

    def __le__(self, other: Reasoning | str) -> bool:
        return self.content <= _plain(other)

    def __gt__(self, other: Reasoning | str) -> bool:
        return self.content > _plain(other)

    def __ge__(self, other: Reasoning | str) -> bool:
        return self.content >= _plain(other)

    def __len__(self) -> int:
        return len(self.content)

    def __bool__(self) -> bool:
        return bool(self.content)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return self.content[key]

    def __contains__(self, item: Reasoning | str) -> bool:
        return _plain(item) in self.content

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter(self.content)

    @typing.overload
    def __add__(self, other: Reasoning) -> Reasoning: ...
    @typing.overload
    def __add__(self, other: str) -> str: ...
    def __add__(self, other: Reasoning | str) -> Reasoning | str:
        if isinstance(other, Reasoning):
            return Reasoning(content=self.content + other.content)
        return self.content + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return other + self.content if isinstance(other, str) else NotImplemented

    def __getattr__(self, name: str) -> Any:
        """Give the methods of the text; asked only for what a `Reasoning` does not have."""
        if not name.startswith("_") and hasattr(str, name):
            return getattr(self.content, name)
        raise AttributeError(
            f"`{type(self).__name__}` has no attribute `{name}`. It is a text with a text's "
            "methods; `str(reasoning)` or `reasoning.content` is the plain `str`.",
            name=name,
            obj=self,
        )


def _plain(other: Reasoning | str) -> str:
    """Return what a text is compared with.

    Raises:
        TypeError: It is no text.
    """
    if not isinstance(other, Reasoning | str):
        raise TypeError(f"A `Reasoning` is compared with texts, not with {type(other).__name__}.")
    return str(other)
