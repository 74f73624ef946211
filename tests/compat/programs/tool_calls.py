"""A model calls tools in its own way, and the program makes the calls."""

import json
import os

import dspylite as dspy

lm = dspy.LM("openai/gpt-4o", api_base=os.environ["API_BASE"], api_key="none", cache=False)
dspy.configure(lm=lm, adapter=dspy.ChatAdapter(use_native_function_calling=True))


def weather(city: str, days: int = 1) -> str:
    """Get the weather forecast of a city."""
    return f"{days} days of rain in {city}"


class Ask(dspy.Signature):
    """Answer with the help of tools."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


tools = [dspy.Tool(weather)]
response = dspy.Predict(Ask)(question="Will it rain in Oslo?", tools=tools)
print(
    json.dumps(
        {
            "calls": [[call.name, call.args] for call in response.outputs.tool_calls],
            "results": [call.execute() for call in response.outputs.tool_calls],
            "given": [call.execute(functions=tools) for call in response.outputs.tool_calls],
            "schema": tools[0].format_as_litellm_function_call(),
        }
    )
)
