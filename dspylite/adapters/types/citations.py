"""`Document` and `Citations`: sources given to a model, and what it points to in them.

Not here: how citations stand in a provider's answer (`models/answers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal, Self, SupportsIndex, cast, overload

import pydantic

from dspylite.abc import LanguageModel
from dspylite.adapters.types.base import Type
from dspylite.adapters.types.media import MAX_FILE_BYTES, check_base64
from dspylite.errors import clip
from dspylite.schema.signature import Signature

_PLACES = ("document_index", "start_char_index", "end_char_index")


class Citations(Type):
    """What a model points to in its sources; a sequence of `Citations.Citation`.

    Anthropic's models give them beside their answer for each `Document` they were given; any other
    model writes them as a part of its answer.

    Attributes:
        citations: In the order of the answer.

    Raises:
        pydantic.ValidationError: A citation lacks its text or its place.

    Example:
        >>> found = Citations.from_dict_list(
        ...     [
        ...         {
        ...             "cited_text": "Water boils at 100 °C.",
        ...             "document_index": 0,
        ...             "start_char_index": 0,
        ...             "end_char_index": 22,
        ...         }
        ...     ]
        ... )
        >>> len(found), found[0].cited_text
        (1, 'Water boils at 100 °C.')
    """

    class Citation(Type):
        """One place in a source.

        What else a provider says of it (`start_page_number`, `url` ...) is kept by that name.

        Attributes:
            type: `"char_location"`, or another kind of place.
            cited_text: The words there.
            document_index: Which of the sources; None where it is none of those given.
            document_title: Its title.
            start_char_index: Where in it the words begin; None where another kind of place counts.
            end_char_index: Where they end.
            supported_text: The part of the answer that they support.
        """

        type: str = "char_location"
        cited_text: str
        document_index: int | None = None
        document_title: str | None = None
        start_char_index: int | None = None
        end_char_index: int | None = None
        supported_text: str | None = None

        model_config = pydantic.ConfigDict(
            extra="allow",
            json_schema_extra={
                "description": "One place in a source, with the words there.",
                "required": ["cited_text", *_PLACES],
                "additionalProperties": False,  # which a model that writes one must not add
            },
        )

        @pydantic.model_validator(mode="after")
        def _check_place(self) -> Self:
            missing = [name for name in _PLACES if getattr(self, name) is None]
            if self.type == "char_location" and missing:
                raise ValueError(f"a citation by characters needs {', '.join(missing)}")
            return self

        def format(self) -> dict[str, Any]:
            """Write what is known of it."""
            return self.model_dump(exclude_none=True)

    citations: list[Citation]

    model_config = pydantic.ConfigDict(
        extra="forbid",
        json_schema_extra={"description": "Places in the sources that support the answer."},
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {"citations": cast("Sequence[Any]", value)}
        if isinstance(value, Mapping) and "citations" not in value and "cited_text" in value:
            return {"citations": [value]}
        return value

    @classmethod
    def from_dict_list(cls, citations_dicts: Sequence[Mapping[str, Any]]) -> Self:
        """Make them of dicts, as providers give them.

        Raises:
            pydantic.ValidationError: A citation lacks its text or its place.
        """
        return cls.model_validate({"citations": [dict(each) for each in citations_dicts]})

    def format(self) -> tuple[dict[str, Any], ...]:
        """Write them as JSON; a tuple, for a list of such dicts would pass for content parts."""
        return tuple(citation.format() for citation in self.citations)

    @classmethod
    def description(cls) -> str:
        """Tell a model how to write them."""
        return "Places in the sources that support the answer, each with the exact words there."

    @classmethod
    def adapt_to_native_lm_feature(
        cls,
        signature: type[Signature],
        field_name: str,
        lm: LanguageModel,
        lm_kwargs: MutableMapping[str, Any],
    ) -> type[Signature]:
        """Leave them to models that cite on their own."""
        del lm_kwargs
        return signature.delete(field_name) if lm.model.startswith("anthropic/") else signature

    @classmethod
    def parse_lm_response(cls, response: Mapping[str, Any]) -> Self | None:
        """Take what the model cited."""
        found = response.get("citations")
        return cls.from_dict_list(found) if isinstance(found, list | tuple) else None

    def __iter__(self) -> Iterator[Citation]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter(self.citations)

    def __len__(self) -> int:
        return len(self.citations)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Citation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Citation]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Citation | list[Citation]:
        return self.citations[index]


class Document(Type):
    """A source that a model can cite.

    Attributes:
        data: Its text; for a PDF its bytes in base64.
        title: What citations call it.
        media_type: `"text/plain"` or `"application/pdf"`.
        context: What the model should know of it, and not cite.

    Raises:
        pydantic.ValidationError: It has no such form.

    Example:
        >>> Document(data="Water boils at 100 °C.", title="Physics").format()[0]["title"]
        'Physics'
    """

    data: str
    title: str | None = None
    media_type: Literal["text/plain", "application/pdf"] = "text/plain"
    context: str | None = None

    model_config = pydantic.ConfigDict(
        extra="forbid",
        json_schema_extra={"description": "A source: its text, and a title to cite it by."},
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.media_type == "application/pdf":
            check_base64(self.data, max_bytes=MAX_FILE_BYTES, wanted="a PDF")
        return self

    def __str__(self) -> str:
        title = f"{self.title!r}, " if self.title else ""
        return f"Document({title}{len(self.data)} characters)"

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Shorten what may be a whole book."""
        args = list(super().__repr_args__())
        return [(n, clip(v, 200) if isinstance(v, str) else v) for n, v in args]

    def format(self) -> list[dict[str, Any]]:
        """Write it as a content part, in Anthropic's form."""
        source = {
            "type": "text" if self.media_type == "text/plain" else "base64",
            "media_type": self.media_type,
            "data": self.data,
        }
        part: dict[str, Any] = {
            "type": "document",
            "source": source,
            "citations": {"enabled": True},
        }
        part |= {"title": self.title} if self.title else {}
        part |= {"context": self.context} if self.context else {}
        return [part]

    @classmethod
    def description(cls) -> str:
        """Tell a model what it is."""
        return "A source whose text can be cited."
