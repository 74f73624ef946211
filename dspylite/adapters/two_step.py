"""`TwoStepAdapter`: one model answers freely, a second one puts the answer into the form.

Not here: the form of the second step, which is `ChatAdapter`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from dspylite.abc import Io, LanguageModel
from dspylite.adapters.base import Adapter, list_fields, texts_of
from dspylite.adapters.features import special_fields
from dspylite.adapters.native import read_native
from dspylite.adapters.sections import ChatAdapter
from dspylite.errors import AdapterParseError, LMConfigurationError
from dspylite.runtime.flow import BLOCKING, run_flow
from dspylite.schema.messages import LMOutput
from dspylite.schema.plans import AdapterPlan
from dspylite.schema.signature import (
    AnySignature,
    Field,
    InputField,
    OutputField,
    Signature,
    make_signature,
)


class TwoStepAdapter(Adapter):
    """Lets a model answer in its own words; a second, smaller one extracts the outputs.

    For models that reason well and keep to no form. Both calls count in usage and history.

    Args:
        extraction_model: Extracts the outputs.
        **kwargs: As for `Adapter`.

    Raises:
        LMConfigurationError: `extraction_model` is no LM.
    """

    calls_models: ClassVar[bool] = True

    def __init__(self, extraction_model: LanguageModel, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(extraction_model, LanguageModel):
            # Callers without a checker come here.
            raise LMConfigurationError(
                f"`extraction_model` must be an LM, not {extraction_model!r}."
            )
        self.extraction_model = extraction_model
        self._extracting = ChatAdapter(use_json_adapter_fallback=True)

    def format_field_description(self, signature: type[Signature]) -> str:
        """List the inputs, and what the answer must say."""
        parts: list[str] = []
        history = special_fields(signature).history
        inputs = {n: field for n, field in signature.input_fields.items() if n != history}
        if inputs:
            parts.append(f"Inputs:\n{list_fields(inputs, outputs=False)}")
        wanted = list_fields(signature.output_fields, outputs=True)
        parts.append(
            "Answer in your own words. Another model will read the answer and take these out of "
            f"it, so state each of them clearly:\n{wanted}"
        )
        return "\n\n".join(parts)

    def format_field_structure(self, signature: type[Signature]) -> str:
        """Ask for no form."""
        del signature
        return ""

    def format_assistant_message_content(
        self,
        signature: type[Signature],
        outputs: Mapping[str, Any],
        missing_field_message: str | None = None,
    ) -> str:
        """Write the outputs by name, as an answer in words could."""
        texts = texts_of(signature, outputs, missing_field_message)
        return "\n".join(f"{name}: {text}" for name, text in texts)

    async def read(self, io: Io, plan: AdapterPlan, output: LMOutput) -> dict[str, Any]:
        """Have the outputs extracted from one answer.

        Raises:
            AdapterParseError: The extraction cannot be read, or the answer is empty.
        """
        if type(self).parse is not TwoStepAdapter.parse:  # a user's own, which asks nobody
            return await super().read(io, plan, output)
        if plan.written is plan.signature and not output.tool_calls:
            return await self._extract(io, plan.signature, output.text)
        values: dict[str, Any] = {}
        if output.text.strip() and plan.written.output_fields:
            values = await self._extract(io, plan.written, output.text)
        return read_native(plan, output, lambda _signature, _output: values)

    def parse(
        self, signature: type[Signature], completion: str, *, finish_reason: str | None = "stop"
    ) -> dict[str, Any]:
        """Have the outputs extracted from the text of an answer, on this thread.

        Raises:
            AdapterParseError: The extraction cannot be read, or the answer is empty.
        """
        del finish_reason
        return run_flow(self._extract(BLOCKING, signature, completion))

    async def _extract(self, io: Io, signature: type[Signature], text: str) -> dict[str, Any]:
        if not text.strip():
            raise self.error(signature, text, "The model answered nothing to extract from.")
        asked = _extraction(signature)
        (source,) = asked.input_fields
        try:
            rows = await self._extracting.ask(
                io, self.extraction_model, {}, asked, (), {source: text}
            )
        except AdapterParseError as error:
            reason = f"The outputs could not be extracted: {error.message}"
            raise self.error(signature, text, reason) from error
        return {name: rows[0].get(name) for name in signature.output_fields}


@functools.lru_cache(maxsize=1024)
def _extraction(signature: type[Signature]) -> type[AnySignature]:
    """Make the signature of the second step: from a text to the outputs of the first."""
    source = "text"
    while source in signature.output_fields:
        source += "_"
    fields: dict[str, Any] = {source: (str, InputField(desc="the answer to take them out of"))}
    for name, field in signature.output_fields.items():
        fields[name] = (field.annotation, _output_like(field))
    names = ", ".join(f"`{name}`" for name in signature.output_fields)
    return make_signature(fields, f"Take {names} out of the text, as it states them.")


def _output_like(field: Field) -> Any:
    return OutputField(desc=field.desc, prefix=field.prefix, **dict(field.constraints))
