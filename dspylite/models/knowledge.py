"""What is known of a model by its name: what it can do, how much it reads, what it costs.

From litellm's table, or, for calls that must not load litellm, from a small rule. Not here: the
lookup in the table itself (`models/litellm_door.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dspylite.errors import LMConfigurationError, nearest
from dspylite.schema.messages import Usage

CAPABILITIES = frozenset({"function_calling", "json_object", "json_schema", "reasoning"})
"""What an LM may be able to do beyond text: call tools, answer as JSON, answer as JSON of a given
schema, take `reasoning_effort`."""

_WITH_SCHEMA = ("gpt-4o", "gpt-4.1", "gpt-5", "o1", "o3", "o4")
_WITH_REASONING = ("gpt-5", "o1", "o3", "o4")
_WITH_TOOLS = (*_WITH_SCHEMA, "gpt-4", "gpt-3.5-turbo")
_SERVERS_WITH_SCHEMA = ("hosted_vllm", "lm_studio")  # both constrain what any model writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What is known of a model.

    Attributes:
        capabilities: Some of `CAPABILITIES`; what is not named may exist, but nobody knows.
        context_window: Most tokens it reads; None if unknown.
        price: What its tokens cost; None if unknown, which is not 0.
    """

    capabilities: frozenset[str] = frozenset()
    context_window: int | None = None
    price: Price | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model's tokens cost.

    Attributes:
        input_usd: US dollars for a token read.
        output_usd: US dollars for a token written.
    """

    input_usd: float
    output_usd: float

    @property
    def is_charged(self) -> bool:
        """Whether tokens cost anything."""
        return bool(self.input_usd or self.output_usd)

    def of(self, usage: Usage) -> float:
        """Return what a call cost in US dollars, without discounts for cached tokens.

        Example:
            >>> price = Price(input_usd=1e-6, output_usd=4e-6)
            >>> price.of(Usage(prompt_tokens=1000, completion_tokens=500))
            0.003
        """
        return usage.prompt_tokens * self.input_usd + usage.completion_tokens * self.output_usd


def known_without_table(model: str) -> Knowledge:
    """Tell what a small rule knows of an OpenAI-compatible model; litellm is not loaded.

    Example:
        >>> sorted(known_without_table("openai/gpt-4o-mini").capabilities)
        ['function_calling', 'json_object', 'json_schema']
        >>> sorted(known_without_table("hosted_vllm/any-model").capabilities)
        ['json_object', 'json_schema']
    """
    provider, slash, name = model.partition("/")
    if slash and provider in _SERVERS_WITH_SCHEMA:
        return Knowledge(capabilities=frozenset({"json_object", "json_schema"}))
    if slash and provider != "openai":
        return Knowledge()
    name = name or provider
    found: set[str] = set()
    if name.startswith(_WITH_TOOLS):
        found |= {"function_calling", "json_object"}
    if name.startswith(_WITH_SCHEMA):
        found.add("json_schema")
    if name.startswith(_WITH_REASONING):
        found.add("reasoning")
    return Knowledge(capabilities=frozenset(found))


def knowledge_of_row(row: Mapping[str, Any]) -> Knowledge:
    """Read one row of litellm's table."""
    params = row.get("supported_openai_params") or ()
    found: set[str] = set()
    if "response_format" in params or row.get("supports_response_schema"):
        found.add("json_object")
    if row.get("supports_response_schema"):
        found.add("json_schema")
    if row.get("supports_function_calling"):
        found.add("function_calling")
    if row.get("supports_reasoning"):
        found.add("reasoning")
    window = row.get("max_input_tokens")
    costs = (row.get("input_cost_per_token"), row.get("output_cost_per_token"))
    price = None
    # A row without costs is of a model whose price nobody entered, not of a free one.
    if all(isinstance(cost, int | float) for cost in costs) and any(costs):
        price = Price(input_usd=float(costs[0] or 0), output_usd=float(costs[1] or 0))
    return Knowledge(
        capabilities=frozenset(found),
        context_window=window if isinstance(window, int) else None,
        price=price,
    )


def checked_capabilities(names: Collection[str] | None) -> frozenset[str] | None:
    """Return the names as a set.

    Raises:
        LMConfigurationError: There is no such capability.
    """
    if names is None:
        return None
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if name not in CAPABILITIES:
            raise LMConfigurationError(
                f"There is no capability {name!r}. {nearest(str(name), CAPABILITIES)}"
                f"Give a set of: {', '.join(sorted(CAPABILITIES))}."
            )
    return frozenset(listed)


def checked_price(price: Any) -> Price | None:
    """Return a price given as dollars for a million tokens read and a million written.

    Raises:
        LMConfigurationError: It is no pair of numbers.

    Example:
        >>> checked_price((0.15, 0.6)).of(Usage(prompt_tokens=1_000_000))
        0.15
    """
    if price is None or isinstance(price, Price):
        return price
    if (
        not isinstance(price, tuple | list)
        or len(price) != 2
        or any(isinstance(each, bool) or not isinstance(each, int | float) for each in price)
        or not all(0 <= each < math.inf for each in price)
    ):
        raise LMConfigurationError(
            f"`price` must be two numbers, US dollars for a million tokens read and for a million "
            f"written, such as (0.15, 0.6), not {price!r}."
        )
    return Price(input_usd=price[0] / 1e6, output_usd=price[1] / 1e6)
