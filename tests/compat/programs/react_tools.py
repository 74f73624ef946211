"""An agent with two tools, one of which fails once."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/scripted", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm)


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


def divide(a: int, b: int = 1) -> float:
    """Divide two numbers."""
    return a / b


agent = dspy.ReAct("question -> answer: float", tools=[get_weather, divide], max_iters=5)
prediction = agent(question="How much is 9 by 3, if it rains in Oslo?")
trajectory = prediction.trajectory
print(
    json.dumps(
        {
            "answer": prediction.answer,
            "tools": [trajectory[f"tool_name_{step}"] for step in range(4)],
            "args": [trajectory[f"tool_args_{step}"] for step in range(4)],
            "rain": trajectory["observation_0"],
            "failed": "ZeroDivisionError" in trajectory["observation_1"]
            or "division by zero" in trajectory["observation_1"],
            "quotient": trajectory["observation_2"],
            "keys": list(trajectory)[:4],
        }
    )
)
