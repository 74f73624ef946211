"""Loops that threads of ours keep end with them, and with what was opened in them (B 3.5, 3.7)."""

from __future__ import annotations

import gc
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dspylite as dspy
from dspylite.runtime.loops import start_thread
from dspylite.testing import FakeServer


class AsyncOnly(dspy.Module):
    def __init__(self) -> None:
        self.ask = dspy.Predict("question -> answer")

    async def aforward(self, question: str) -> Any:
        return await self.ask.acall(question=question)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    text = "[[ ## answer ## ]]\nParis\n\n[[ ## completed ## ]]"
    with FakeServer(answer=text) as server:
        yield server


def batch(program: AsyncOnly) -> list[str]:
    examples = [{"question": str(number)} for number in range(4)]
    return [result.answer for result in program.batch(examples, num_threads=2)]


def stream(program: AsyncOnly) -> list[str]:
    streamed = dspy.streamify(program, async_streaming=False, is_async_program=False)
    return [item.answer for item in streamed(question="?") if isinstance(item, dspy.Prediction)]


async def within_a_loop(program: AsyncOnly) -> list[str]:
    return [program(question="?").answer]  # a sync call, which another thread must run


def from_a_loop(program: AsyncOnly) -> list[str]:
    import anyio

    return anyio.run(within_a_loop, program)


@pytest.mark.parametrize("way", [batch, stream, from_a_loop])
def test_connections_are_closed_with_the_thread_that_opened_them(
    way: Callable[[AsyncOnly], list[str]], server: FakeServer
) -> None:
    """Left to the garbage collector, they warn in the middle of somebody else's work."""
    before = set(threading.enumerate())
    lm = dspy.LM("openai/m", api_base=server.base_url, api_key="none", cache=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        with dspy.context(lm=lm):
            assert set(way(AsyncOnly())) == {"Paris"}
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        gc.collect()
    assert [str(each.message) for each in caught if "transport" in str(each.message)] == []


def test_a_thread_ends_quietly_while_another_one_loads_what_keeps_loops(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python shows a module to other threads before it is whole."""
    name = f"{start_thread.__module__.rpartition('.')[0]}.thread_loops"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    done = threading.Event()
    start_thread(done.set, "a-test")
    assert done.wait(10)
    for thread in threading.enumerate():
        if thread.name == "a-test":
            thread.join(10)
    assert capfd.readouterr().err == ""
