"""`AdapterPlan`: what is settled about one question before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspylite.schema.signature import Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """How one question is put to one model.

    Attributes:
        signature: What is asked.
        written: What of it stands in the prompt and in the text of the answer. The other outputs
            come by a feature of the model, such as its tool calls.
        params: Parameters of the request.
    """

    signature: type[Signature]
    written: type[Signature]
    params: Mapping[str, Any]
