"""`budget()`: what the calls of a block may cost, wherever they run.

Not here: what an LM does with it (`test_base_lm.py`), and counting alone (`test_tracking.py`).
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite
from dspylite import Module, Parallel, Usage, bind
from dspylite.errors import BudgetExceededError, LMConfigurationError, SettingsError
from dspylite.runtime.budgets import NOT_ASKED, Budget, budget, current_budget
from dspylite.testing import FakeServer, Reply


def call(tokens: int = 10, usd: float | None = 0.0, *, price: object = NOT_ASKED) -> None:
    """Do what an LM does: ask whether the call may be made, then say what it cost."""
    spending = current_budget()
    if spending is not None:
        spending.check(price)
        spending.add(Usage(total_tokens=tokens, calls=1), usd)


@pytest.fixture
def restless() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can, so that a missing lock shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# --- The limits ----------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict[str, Any], list[tuple[int, float | None]], int]] = {
    # limits, (tokens, usd) that calls would cost, how many of them are made
    "no limit": ({}, [(10**9, 1e9)] * 3, 3),
    "below both": ({"tokens": 100, "usd": 1}, [(10, 0.1)] * 3, 3),
    "tokens reached": ({"tokens": 100}, [(50, 0)] * 3, 2),
    "tokens overshot": ({"tokens": 100}, [(99, 0), (99, 0), (1, 0)], 2),
    "no tokens": ({"tokens": 0}, [(1, 0)], 0),
    "money reached": ({"usd": 0.5}, [(1, 0.25)] * 3, 2),
    "money overshot": ({"usd": 0.5}, [(1, 0.4)] * 3, 2),
    "no money": ({"usd": 0}, [(1, 0)], 0),
    "tokens before money": ({"tokens": 10, "usd": 9}, [(10, 1)] * 3, 1),
    "money before tokens": ({"tokens": 99, "usd": 1}, [(10, 1)] * 3, 1),
    "free calls": ({"usd": 0.5}, [(1, 0)] * 9, 9),
    "unknown price, tokens limited": ({"tokens": 20}, [(10, None)] * 3, 2),
}


@pytest.mark.parametrize(("limits", "costs", "made"), list(CALLS.values()), ids=list(CALLS))
def test_calls_are_made_until_a_limit_is_reached(
    limits: dict[str, Any], costs: list[tuple[int, float | None]], made: int
) -> None:
    """A loop that runs wild must not cost more than was allowed (B 4.8)."""
    with budget(**limits) as spending:
        for number, cost in enumerate(costs):
            if number < made:
                call(*cost)
            else:
                with pytest.raises(BudgetExceededError):
                    call(*cost)
    assert spending.calls == made
    assert spending.tokens_spent == sum(tokens for tokens, _ in costs[:made])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"tokens": 1_500},
            "The budget of 1,500 tokens is spent: 2 calls took 2,000. "
            "Raise `budget(tokens=...)`, or ask for less.",
        ),
        (
            {"usd": 0.03},
            "The budget of 0.03 USD is spent: 2 calls took 0.04 USD. "
            "Raise `budget(usd=...)`, or ask for less.",
        ),
    ],
)
def test_error_names_the_limit_and_what_was_spent(limits: dict[str, Any], message: str) -> None:
    """Whoever set the limit must see whether it was too low."""
    with budget(**limits):
        call(1_000, 0.02)
        call(1_000, 0.02)
        with pytest.raises(BudgetExceededError) as caught:
            call()
    assert str(caught.value) == message


# --- Unknown prices ------------------------------------------------------------------------------


@pytest.mark.parametrize("usd", [None, math.nan, math.inf, -0.1])
def test_an_unknown_price_makes_the_sum_unknown_and_not_zero(usd: float | None) -> None:
    """A bill of 0 for paid calls is worse than none (B 4.8)."""
    with budget() as outer, budget() as inner:
        assert inner.usd_spent == 0
        call(10, 0.25)
        assert inner.usd_spent == 0.25
        call(10, usd)
        assert inner.usd_spent is None
        call(10, 0.25)
    assert (inner.usd_spent, outer.usd_spent) == (None, None)
    assert (inner.tokens_spent, outer.tokens_spent) == (30, 30)


@pytest.mark.parametrize("limits", [{"usd": 5}, {"usd": 5, "tokens": 99}])
def test_a_call_of_unknown_price_is_refused_where_money_is_limited(limits: Any) -> None:
    """A limit that cannot be kept must not look as if it were (B 4.8)."""
    with budget(**limits) as spending:
        with pytest.raises(LMConfigurationError, match="price of this call is unknown"):
            call(price=None)
        call(price=0.5)
        call(10, None)
        with pytest.raises(LMConfigurationError, match="price of an earlier call"):
            call(price=0.5)
    assert spending.calls == 2


def test_a_call_of_unknown_price_is_made_where_only_tokens_are_limited() -> None:
    """Whoever counts tokens needs no prices."""
    with budget(tokens=99) as spending:
        call(10, None, price=None)
    assert (spending.calls, spending.usd_spent) == (1, None)


def test_spent_tokens_are_told_before_unknown_prices() -> None:
    """The limit that is reached is the plainer reason."""
    with budget(tokens=10, usd=1):
        call(10)
        with pytest.raises(BudgetExceededError):
            call(price=None)


@pytest.mark.parametrize(
    ("outer", "inner", "limited"),
    [({}, {}, False), ({"tokens": 1}, {}, False), ({}, {"usd": 1}, True), ({"usd": 1}, {}, True)],
)
def test_budget_says_whether_prices_must_be_known(outer: Any, inner: Any, limited: bool) -> None:
    """Looking a price up may load a large library, which nobody else should pay for."""
    with budget(**outer), budget(**inner) as spending:
        assert spending.limits_money is limited


# --- Blocks --------------------------------------------------------------------------------------


def test_nested_budgets_all_count_and_all_check() -> None:
    """A library's budget does not undo that of the program around it (B 4.8)."""
    with budget(tokens=30) as outer:
        with budget(tokens=20) as inner:
            call(20)
            with pytest.raises(BudgetExceededError, match="20 tokens"):
                call()
        with budget(tokens=1_000) as second:
            call(10)
            with pytest.raises(BudgetExceededError, match="30 tokens"):
                call()
        with pytest.raises(BudgetExceededError, match="30 tokens"):
            call()
    spent = [each.tokens_spent for each in (outer, inner, second)]
    assert spent == [30, 20, 10]


def test_a_budget_ends_with_its_block() -> None:
    """What comes after it is another account."""
    assert current_budget() is None
    with budget(tokens=5) as spending:
        assert current_budget() is spending
        call(5)
    assert current_budget() is None
    call(5)
    assert spending.tokens_spent == 5


def test_a_budget_ends_with_its_block_also_by_an_error() -> None:
    """Otherwise one failure would limit the rest of the program."""
    with pytest.raises(BudgetExceededError), budget(tokens=0):
        call()
    assert current_budget() is None


# --- Threads and tasks ---------------------------------------------------------------------------


class Slow(int):
    """A count that lets other threads run while it is added."""

    def __radd__(self, other: int) -> int:
        for _ in range(50):
            pass
        return other + int(self)


@pytest.mark.usefixtures("restless")
def test_no_call_is_lost_among_threads() -> None:
    """Lost updates would let a budget be overdrawn unseen (B 4.8)."""
    barrier = threading.Barrier(16)

    def work(_: int) -> None:
        barrier.wait(10)
        for _ in range(200):
            call(Slow(3), 0.5)

    with budget() as outer, budget() as inner, dspylite.ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    for each in (inner, outer):
        assert (each.calls, each.tokens_spent, each.usd_spent) == (3_200, 9_600, 1_600)


def test_calls_under_way_overshoot_by_what_they_cost_and_no_more() -> None:
    """What cannot be known before it is answered is documented, and bounded by the threads."""
    barrier = threading.Barrier(8)

    def work(_: int) -> int:
        made = 0
        spending = current_budget()
        assert spending is not None
        spending.check()
        barrier.wait(10)  # all 8 have been let in, and none has been counted
        spending.add(Usage(total_tokens=10, calls=1), None)
        for _ in range(50):
            try:
                call(10)
            except BudgetExceededError:
                continue
            made += 1
        return made

    with budget(tokens=10) as spending, dspylite.ThreadPoolExecutor(8) as pool:
        more = sum(pool.map(work, range(8)))
    assert (spending.calls, more) == (8, 0)


def in_our_pool() -> None:
    with dspylite.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: call(), range(4)))


def in_a_bound_function() -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bind(lambda _: call()), range(4)))


def in_anyio_threads() -> None:
    async def main() -> None:
        for _ in range(4):
            await anyio.to_thread.run_sync(call)

    anyio.run(main)


def in_tasks(backend: str = "asyncio") -> None:
    async def one() -> None:
        call()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(one)

    anyio.run(main, backend=backend)


def in_trio_tasks() -> None:
    in_tasks("trio")


class Spender(Module):
    """A program that makes one call."""

    def forward(self, number: int) -> int:
        call()
        return number


def in_parallel() -> None:
    Parallel(num_threads=4)([(Spender(), {"number": number}) for number in range(4)])


def in_a_batch() -> None:
    Spender().batch([{"number": number} for number in range(4)], num_threads=4)


@pytest.mark.parametrize(
    "work",
    [
        in_our_pool,
        in_a_bound_function,
        in_anyio_threads,
        in_tasks,
        in_trio_tasks,
        in_parallel,
        in_a_batch,
    ],
)
def test_calls_started_from_the_block_count_wherever_they_run(work: Callable[[], None]) -> None:
    """A budget that threads slip past is none (B 4.8)."""
    with budget(tokens=40) as spending:
        work()
        assert (spending.calls, spending.tokens_spent) == (4, 40)
        with pytest.raises(BudgetExceededError):
            call()


# --- The object ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        *({"tokens": value} for value in (-1, 1.5, True, "9", math.nan)),
        *({"usd": value} for value in (-0.01, True, "9", math.nan, math.inf)),
    ],
    ids=repr,
)
def test_impossible_limit_is_refused(limits: dict[str, Any]) -> None:
    """A limit of NaN would never be reached."""
    (name,) = limits
    with pytest.raises(SettingsError, match=f"`{name}` of a budget must be"), budget(**limits):
        raise AssertionError


def test_a_snapshot_leaves_the_budget_in_its_process() -> None:
    """Another process cannot spend from it, and its lock cannot be pickled."""
    with budget(tokens=5):
        snapshot = pickle.loads(pickle.dumps(dspylite.settings.snapshot()))
    with dspylite.settings.restore(snapshot):
        assert current_budget() is None


def test_repr_tells_limits_and_what_was_spent() -> None:
    """It is what a debugger shows."""
    mine = Budget(tokens=9)
    mine.add(Usage(total_tokens=5), None)
    shown = "Budget(tokens=9, usd=None, tokens_spent=5, usd_spent=None, calls=1)"
    assert repr(mine) == shown


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_goes_on_from_what_was_spent() -> None:
    """The thread that held the lock does not exist in the child."""
    with budget(tokens=30) as spending:
        call(20)
        with spending._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                try:
                    call(10)
                    os._exit(0 if spending.tokens_spent == 30 else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
        assert spending.tokens_spent == 20


def test_money_is_not_counted_as_none_where_the_server_counted_no_tokens() -> None:
    """What nobody counted has cost something; the limit could not be kept (B 4.8)."""
    with FakeServer() as server:
        server.script(Reply(usage={}))
        lm = dspylite.LM("openai/m", api_base=server.base_url, api_key="none", price=(1, 1))
        with dspylite.budget(usd=1) as spending:
            lm("first")
            assert spending.usd_spent is None
            with pytest.raises(dspylite.LMConfigurationError, match="price of an earlier call"):
                lm("second")
