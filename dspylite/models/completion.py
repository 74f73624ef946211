"""An answer in the shape of OpenAI's completions, for whoever overrides `LM.forward`.

Not here: reading such an answer (`answers.py`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dspylite.schema.messages import LMOutput, LMResponse


class Completion(SimpleNamespace):
    """An object of a completion, read by attributes or by names, and open to changes."""

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None


def as_completion(response: LMResponse) -> Completion:
    """Write an answer so that `answers.read_chat_response` reads the same one again.

    Example:
        >>> answer = as_completion(LMResponse(outputs=(LMOutput(text="Hi"),), model="m"))
        >>> answer.choices[0].message.content, answer["model"]
        ('Hi', 'm')
    """
    usage = response.usage
    read = {name: n for name, n in usage.details.items() if name.startswith("cache")}
    return Completion(
        id=response.request_id,
        model=response.model,
        choices=[_choice(index, output) for index, output in enumerate(response.outputs)],
        usage=Completion(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=read,
            completion_tokens_details={
                name: n for name, n in usage.details.items() if name not in read
            },
        ),
    )


def _choice(index: int, output: LMOutput) -> Completion:
    message = Completion(
        role="assistant",
        content=output.text,
        reasoning_content=output.reasoning,
        tool_calls=[dict(call) for call in output.tool_calls] or None,
        citations=[dict(each) for each in output.citations] or None,
    )
    return Completion(
        index=index,
        message=message,
        finish_reason=output.finish_reason,
        logprobs=output.logprobs,
    )
