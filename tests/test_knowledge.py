"""What is known of a model by its name: capabilities, window, price; and what that is used for.

Not here: what a budget does with a price (`test_budgets.py`).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dspylite as dspy
from dspylite.errors import BudgetExceededError, LMConfigurationError, LMError
from dspylite.models.knowledge import (
    CAPABILITIES,
    Knowledge,
    Price,
    checked_capabilities,
    checked_price,
    knowledge_of_row,
    known_without_table,
)
from dspylite.schema.messages import Usage
from dspylite.testing import FakeClock, FakeLM, FakeServer, Reply

ROOT = Path(__file__).resolve().parent.parent
ALL = {"function_calling", "json_object", "json_schema", "reasoning"}
SCHEMA = {"json_object", "json_schema"}
UNKNOWN = "a-model-that-nobody-knows"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_engine_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no variable of the machine choose the engine."""
    monkeypatch.delenv("DSPYLITE_ENGINE", raising=False)


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    given = {"api_base": server.base_url, "api_key": "sk-test", "engine": "direct"}
    return dspy.LM("openai/m", **{**given, **options})


# --- Capabilities --------------------------------------------------------------------------------

RULE: dict[str, set[str]] = {
    "openai/gpt-4o-mini": {"function_calling", *SCHEMA},
    "gpt-4o": {"function_calling", *SCHEMA},
    "openai/gpt-4.1-nano": {"function_calling", *SCHEMA},
    "openai/gpt-5-mini": ALL,
    "gpt-5": ALL,
    "openai/o3-mini": ALL,
    "openai/gpt-4-turbo": {"function_calling", "json_object"},
    "openai/gpt-3.5-turbo": {"function_calling", "json_object"},
    "hosted_vllm/any-model": SCHEMA,
    "lm_studio/any-model": SCHEMA,
    "litellm_proxy/gpt-4o": set(),
    f"openai/{UNKNOWN}": set(),
    "openai/": set(),
    "azure/gpt-4o": set(),
    "": set(),
}


@pytest.mark.parametrize(("model", "wanted"), list(RULE.items()))
def test_a_small_rule_knows_the_usual_models(model: str, wanted: set[str]) -> None:
    """What a model can do must not cost seconds of loading litellm to find out."""
    assert known_without_table(model) == Knowledge(capabilities=frozenset(wanted))


@pytest.mark.parametrize("engine", ["auto", "direct"])
def test_models_served_directly_are_known_by_the_rule(engine: str) -> None:
    """The adapter that asks for JSON by schema is told that it can."""
    lm = dspy.LM("openai/gpt-5-mini", engine=engine)
    assert lm.capabilities == ALL
    assert lm.supports_function_calling
    assert lm.supports_response_schema
    assert lm.supports_reasoning
    assert dspy.LM(f"openai/{UNKNOWN}", engine=engine).capabilities == frozenset()


def test_capabilities_of_the_direct_engine_never_load_litellm() -> None:
    """A program on the direct engine starts in milliseconds; one look must not cost seconds."""
    code = (
        "import sys, dspylite as dspy\n"
        "for name in ('openai/gpt-4o', 'hosted_vllm/m', 'gpt-5', 'openai/own'):\n"
        "    for engine in ('auto', 'direct'):\n"
        "        lm = dspy.LM(name, engine=engine, price=(1, 2))\n"
        "        lm.capabilities, lm.supports_response_schema, lm.price(look_up=True)\n"
        "dspy.OfflineLM().capabilities, dspy.OfflineLM().price(look_up=True)\n"
        "assert dspy.OfflineLM().context_window is None\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'litellm'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "DSPYLITE_ENGINE"},
    )
    assert done.stdout.strip() == "[]"


def test_litellms_table_is_asked_where_litellm_makes_the_calls() -> None:
    """There the table knows hundreds of models, and is loaded anyway."""
    lm = dspy.LM("openai/gpt-4o-mini", engine="litellm")
    assert lm.capabilities == {"function_calling", *SCHEMA}
    assert dspy.LM("anthropic/claude-sonnet-4-5").supports_function_calling
    assert dspy.LM(f"openai/{UNKNOWN}", engine="litellm").capabilities == frozenset()


def test_litellms_table_is_asked_for_other_kinds_of_calls() -> None:
    """Text and responses go through litellm whatever the provider, so it knows of them too."""
    assert dspy.LM("anthropic/claude-sonnet-4-5", "responses").supports_function_calling
    assert dspy.LM("azure/gpt-4o", "responses").supports_response_schema


@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize("given", [[], ["json_schema"], {"reasoning", "function_calling"}])
def test_given_capabilities_win(engine: str, given: Any) -> None:
    """Who runs a server knows better than any table what it can do."""
    lm = dspy.LM("openai/gpt-4o", engine=engine, capabilities=given)
    assert lm.capabilities == frozenset(given)
    assert lm.copy(temperature=0.5).capabilities == frozenset(given)
    assert lm.copy(capabilities=["json_object"]).capabilities == {"json_object"}


def test_taking_given_capabilities_away_asks_the_rule_again() -> None:
    """`None` means "as known"."""
    lm = dspy.LM("openai/gpt-4o", capabilities=[], engine="direct")
    assert lm.copy(capabilities=None).capabilities == {"function_calling", *SCHEMA}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["json_shema"], "Did you mean `json_schema`"),
        ({"telepathy"}, "There is no capability 'telepathy'"),
        ("tools", "There is no capability 'tools'"),
        ([5], "There is no capability 5"),
    ],
)
def test_an_unknown_capability_is_refused(given: Any, message: str) -> None:
    """A misspelt one would silently switch a feature off."""
    with pytest.raises(LMConfigurationError, match=message):
        dspy.LM("openai/m", capabilities=given)
    with pytest.raises(LMConfigurationError, match=message):
        dspy.LM("openai/m").copy(capabilities=given)


def test_one_capability_may_be_given_as_a_string() -> None:
    """Its letters are no names."""
    assert checked_capabilities("reasoning") == {"reasoning"}
    assert checked_capabilities(None) is None


def test_every_capability_can_be_given() -> None:
    """The names in the documentation are the names that are taken."""
    assert checked_capabilities(ALL) == CAPABILITIES == ALL


# --- Rows of the table ---------------------------------------------------------------------------

ROWS: dict[str, tuple[dict[str, Any], Knowledge]] = {
    "empty": ({}, Knowledge()),
    "all": (
        {
            "supports_function_calling": True,
            "supports_response_schema": True,
            "supports_reasoning": True,
            "max_input_tokens": 128_000,
            "input_cost_per_token": 1e-6,
            "output_cost_per_token": 2e-6,
        },
        Knowledge(
            capabilities=frozenset(ALL),
            context_window=128_000,
            price=Price(input_usd=1e-6, output_usd=2e-6),
        ),
    ),
    "JSON without schema": (
        {"supported_openai_params": ["response_format"]},
        Knowledge(capabilities=frozenset({"json_object"})),
    ),
    "nulls": (
        {"max_input_tokens": None, "input_cost_per_token": None, "supports_reasoning": None},
        Knowledge(),
    ),
    "window as text": ({"max_input_tokens": "128k"}, Knowledge()),
    "no price entered": ({"input_cost_per_token": 0, "output_cost_per_token": 0.0}, Knowledge()),
    "half a price": ({"input_cost_per_token": 1e-6}, Knowledge()),
    "free to read": (
        {"input_cost_per_token": 0, "output_cost_per_token": 2e-6},
        Knowledge(price=Price(input_usd=0, output_usd=2e-6)),
    ),
}


@pytest.mark.parametrize(("row", "wanted"), list(ROWS.values()), ids=list(ROWS))
def test_a_row_of_the_table_is_read_with_care(row: dict[str, Any], wanted: Knowledge) -> None:
    """A price that nobody entered is unknown, not 0 (B 4.8)."""
    assert knowledge_of_row(row) == wanted


def test_context_window_is_looked_up() -> None:
    """A program can cut its prompt to what the model reads."""
    window = dspy.LM("openai/gpt-4o-mini").context_window
    assert window is not None
    assert window > 100_000
    assert dspy.LM(f"openai/{UNKNOWN}").context_window is None
    assert dspy.OfflineLM().context_window is None


# --- Prices --------------------------------------------------------------------------------------


def test_a_price_is_given_for_a_million_tokens() -> None:
    """That is how every provider writes its list."""
    price = checked_price((0.15, 0.6))
    assert price is not None
    assert price.of(Usage(prompt_tokens=1_000_000)) == pytest.approx(0.15)
    assert price.of(Usage(completion_tokens=1_000_000)) == pytest.approx(0.6)
    assert price.of(Usage()) == 0
    assert checked_price(price) is price
    assert checked_price(None) is None
    assert checked_price([0, 0]) == Price(input_usd=0, output_usd=0)


@pytest.mark.parametrize(
    "price",
    [
        0.15,
        "0.15",
        (0.15,),
        (0.1, 0.2, 0.3),
        ("0.1", "0.2"),
        (-1, 1),
        (1, math.inf),
        (math.nan, 1),
        (True, False),
        {"input": 1, "output": 2},
    ],
)
def test_what_is_no_price_is_refused(price: Any) -> None:
    """A wrong price would let a budget overrun, or refuse what was paid for."""
    with pytest.raises(LMConfigurationError, match="`price` must be two numbers"):
        dspy.LM("openai/m", price=price)
    with pytest.raises(LMConfigurationError, match="`price` must be two numbers"):
        dspy.LM("openai/m").copy(price=price)


def test_a_budget_in_dollars_ends_calls_by_the_given_price(server: FakeServer) -> None:
    """The bill is what the server counted times what the user said (B 4.8)."""
    lm = lm_of(server, price=(1_000_000, 0))  # a dollar for each token read
    with dspy.budget(usd=5) as spending:
        lm("one two three")
        assert spending.usd_spent == 3
        lm("four five")
        with pytest.raises(BudgetExceededError):
            lm("six")
    assert spending.usd_spent == 5
    assert [request.prompt for request in server.requests] == ["one two three", "four five"]


def test_a_budget_in_dollars_refuses_a_model_of_unknown_price(server: FakeServer) -> None:
    """A limit that cannot be kept must not look as if it were (B 4.8)."""
    lm = lm_of(server).copy(model=f"openai/{UNKNOWN}")
    with dspy.budget(usd=5) as spending, pytest.raises(LMConfigurationError, match="price"):
        lm("hi")
    assert len(server.requests) == 0
    assert (spending.calls, spending.usd_spent) == (0, 0)


async def test_an_awaited_call_of_unknown_price_is_refused_too(server: FakeServer) -> None:
    """The look into the table happens beside the event loop, with the same result (B 4.8)."""
    lm = lm_of(server).copy(model=f"openai/{UNKNOWN}")
    with dspy.budget(usd=5), pytest.raises(LMConfigurationError, match="price"):
        await lm.acall("hi")
    assert len(server.requests) == 0


def test_a_budget_in_tokens_takes_a_model_of_unknown_price(server: FakeServer) -> None:
    """Who counts tokens need not know prices; the sum in dollars is then unknown (B 4.8)."""
    with dspy.budget(tokens=1000) as spending:
        lm_of(server)("one two")
    assert spending.usd_spent is None
    assert spending.tokens_spent > 0


def test_a_price_of_the_table_is_used_where_none_is_given(server: FakeServer) -> None:
    """For known models a budget in dollars works without a list of one's own (B 4.8)."""
    lm = lm_of(server).copy(model="openai/gpt-4o-mini")
    with dspy.budget(usd=5) as spending:
        lm("one two")
    assert spending.usd_spent is not None
    assert 0 < spending.usd_spent < 0.01


def test_a_streamed_answer_costs_the_same(server: FakeServer) -> None:
    """Streaming is no way around a budget (B 4.8)."""
    lm = lm_of(server, price=(1_000_000, 0))
    with dspy.budget(usd=100) as spending:
        lm("one two three")
        with lm.stream("one two three") as stream:
            assert "".join(piece.text for piece in stream)
    assert (spending.calls, spending.usd_spent) == (2, 6)


def test_a_failed_attempt_costs_nothing(server: FakeServer) -> None:
    """Providers bill answers; a retried call is one of them (B 4.8)."""
    server.script(Reply(status=500))
    lm = lm_of(server, price=(1_000_000, 0))
    with FakeClock(), dspy.budget(usd=100) as spending:
        lm("one two three")
        server.script(Reply(status=400))
        with pytest.raises(LMError):
            lm("one two three")
    assert (spending.calls, spending.usd_spent) == (1, 3)


def test_the_offline_model_costs_nothing() -> None:
    """A demo must run under any budget (B 4.8)."""
    with dspy.budget(usd=1) as spending:
        dspy.OfflineLM()("What is up? The sky is up.")
    assert (spending.calls, spending.usd_spent) == (1, 0)
    assert dspy.OfflineLM().price(look_up=False) == Price(input_usd=0, output_usd=0)


def test_a_price_survives_copies() -> None:
    """A tenant's copy of an LM costs what the template costs, unless told otherwise."""
    lm = FakeLM(price=(1_000_000, 2_000_000))
    assert lm.copy(temperature=1.0).price(look_up=False) == Price(input_usd=1, output_usd=2)
    assert lm.copy(price=(0, 0)).price(look_up=False) == Price(input_usd=0, output_usd=0)
    assert lm.copy(price=None).price(look_up=False) is None
