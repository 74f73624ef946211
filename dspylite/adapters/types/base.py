"""`Type`: a field's type that writes itself into a prompt, also as parts that are no text.

Not here: the types themselves, and where in a message they stand (`adapters/content.py`).
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar, Self

import pydantic

from dspylite.abc import LanguageModel
from dspylite.adapters.content import PartsSink, formatted
from dspylite.schema.messages import LMDelta
from dspylite.schema.signature import Signature


class Type(pydantic.BaseModel):
    """Base of field types that say themselves how they stand in a prompt.

    Subclass it, declare pydantic fields and override `format`. Values work alone, in lists, dicts
    and other models.

    Example:
        >>> class Sticker(Type):
        ...     url: str
        ...
        ...     def format(self) -> list[dict[str, Any]]:
        ...         return [{"type": "image_url", "image_url": {"url": self.url}}]
        >>> Sticker(url="https://example.org/a.png").format()[0]["type"]
        'image_url'
    """

    __field_kind__: ClassVar[str] = "value"

    # What pydantic reads and writes values with is made at their first use, and not at import.
    model_config = pydantic.ConfigDict(defer_build=True)

    def format(self) -> Any:
        """Write the value for a prompt.

        Returns:
            Text; a JSON value; or a list of content parts as OpenAI's chat API knows them, each a
            dict with a `"type"`.
        """
        raise NotImplementedError(f"`{type(self).__name__}` needs a method `format`.")

    @classmethod
    def description(cls) -> str:
        """Tell a model what such a value is, or how to write one; empty if its schema says it."""
        return ""

    @classmethod
    def extract_custom_type_from_annotation(cls, annotation: Any) -> list[type[Self]]:
        """List the types of this class in an annotation, however deep they lie.

        Example:
            >>> class Sticker(Type):
            ...     url: str
            >>> [
            ...     kind.__name__
            ...     for kind in Type.extract_custom_type_from_annotation(dict[str, list[Sticker]])
            ... ]
            ['Sticker']
        """
        if isinstance(annotation, type) and typing.get_origin(annotation) is None:
            return [annotation] if issubclass(annotation, cls) else []
        return [
            kind
            for argument in typing.get_args(annotation)
            for kind in cls.extract_custom_type_from_annotation(argument)
        ]

    @classmethod
    def adapt_to_native_lm_feature(
        cls,
        signature: type[Signature],
        field_name: str,
        lm: LanguageModel,
        lm_kwargs: MutableMapping[str, Any],
    ) -> type[Signature]:
        """Leave an output to a feature of the model where it has one.

        Args:
            signature: What is asked.
            field_name: The output of this type.
            lm: Who is asked.
            lm_kwargs: The request's parameters, to be changed in place.

        Returns:
            The signature without the field, whose value then comes from `parse_lm_response`; or as
            it is, if the model must write the value itself.
        """
        del field_name, lm, lm_kwargs
        return signature

    @classmethod
    def is_native_output(cls) -> bool:
        """Tell whether a feature of a model may give the value, because the type knows how."""
        hook = "adapt_to_native_lm_feature"
        own = next(base for base in cls.__mro__ if hook in vars(base))
        return own is not Type

    @classmethod
    def parse_lm_response(cls, response: Mapping[str, Any]) -> Any:
        """Read the value from what a model gave beside its text; None if it gave none.

        Args:
            response: The answer as a dict: `"text"`, `"reasoning_content"`, `"tool_calls"` and
                `"citations"`, as far as it has them.
        """
        del response

    @classmethod
    def parse_stream_chunk(cls, chunk: LMDelta) -> str | None:
        """Read what a piece of a streamed answer adds to an output left to a feature of the model.

        Returns:
            Text for whoever listens to the output; None, as here, if the piece has none.
        """
        del chunk
        return None

    @pydantic.model_serializer(mode="wrap")
    def _serialize(self, handler: Callable[[Any], Any], info: pydantic.SerializationInfo) -> Any:
        """Inside of another value that is written into a prompt, write as `format` says."""
        sink: PartsSink | None = info.context if hasattr(info.context, "put") else None
        return handler(self) if sink is None else formatted(self, sink)
