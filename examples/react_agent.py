"""An agent with a sync and an async tool, called from a thread and awaited.

The offline model cannot plan, so a script stands in for a model: it says what a real one would. Put
`dspylite.LM("openai/gpt-4o-mini")` in its place and nothing else changes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import dspylite as dspy
from dspylite.testing import FakeLM

RIVERS = {"Basel": "Rhine", "Cairo": "Nile"}
LENGTHS_KM = {"Rhine": 1_230, "Nile": 6_650}


def river_of(city: str) -> str:
    """Name the river that a city lies on."""
    return RIVERS[city]


async def length_of(river: str) -> int:
    """Tell the length of a river in kilometres."""
    await asyncio.sleep(0)
    return LENGTHS_KM[river]


def step(thought: str, tool: str, **args: str) -> dict[str, Any]:
    return {"next_thought": thought, "next_tool_name": tool, "next_tool_args": args}


SCRIPT = [
    step("Which river is it?", "river_of", city="Bassel"),
    step("I misspelt the city.", "river_of", city="Basel"),
    step("Now its length.", "length_of", river="Rhine"),
    step("That is all I need.", "finish"),
    {"reasoning": "The tool says 1230.", "kilometres": 1230},
]

agent = dspy.ReAct("question -> kilometres: int", tools=[river_of, length_of])
QUESTION = "How long is the river that Basel lies on?"


def main() -> None:
    with dspy.context(lm=FakeLM(SCRIPT)):
        result = agent(question=QUESTION)
    for number in range(4):
        name = result.trajectory[f"tool_name_{number}"]
        print(f"{name:>9}: {result.trajectory[f'observation_{number}']}")
    print(f"   called: {result.kilometres} km")

    async def ask() -> Any:
        with dspy.context(lm=FakeLM(SCRIPT)):
            return await agent.acall(question=QUESTION)

    print(f"  awaited: {asyncio.run(ask()).kilometres} km")


if __name__ == "__main__":
    main()
