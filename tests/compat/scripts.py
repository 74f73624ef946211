"""What the scripted server answers to each program of `programs/`.

A model is not asked by its place in a sequence but by what stands in its prompt, so that both
libraries, whose prompts and orders differ, get the same answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dspylite.testing import Reply

Body = Mapping[str, Any]
Say = str | Reply | Callable[[Body], str | Reply]
Row = tuple[tuple[str, ...], Say]


def chat(**outputs: str) -> str:
    """Write outputs in the sections that both libraries ask for by default."""
    sections = [f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in outputs.items()]
    return "".join([*sections, "[[ ## completed ## ]]"])


def in_turn(*answers: str) -> Callable[[Body], str | Reply]:
    """Give the next answer each time, or all of them to a request that wants so many."""
    rest = itertools.cycle(answers)

    def say(body: Body) -> str | Reply:
        return Reply(texts=answers) if body.get("n", 1) == len(answers) else next(rest)

    return say


def thinking(**outputs: str) -> str:
    """Write outputs after some reasoning."""
    return chat(reasoning="Let me see.", **outputs)


SCRIPTS: Mapping[str, Sequence[Row]] = {
    "classification": [
        (("vulnerable",), chat(sentiment="fear", confidence="0.9")),
        (("lovely",), chat(sentiment="joy", confidence="1")),
        ((), chat(sentiment="anger", confidence="0.75")),
    ],
    "extraction": [
        (
            (),
            chat(
                headline="Two people",
                people='[{"name": "Ada", "age": 36, "addresses": [{"city": "London", "country": '
                '"UK"}, {"city": "Turin"}]}, {"name": "Blaise", "age": "39"}]',
                by_city='{"London": ["Ada"], "Turin": ["Ada"]}',
            ),
        )
    ],
    "rag": [((), thinking(response="The Nile."))],
    "multi_hop": [
        (
            ("new_notes", "Franz Kafka was born"),
            thinking(new_notes='["He was born in Prague."]', done="True"),
        ),
        (("new_notes",), thinking(new_notes='["Kafka wrote The Castle."]', done="False")),
        (("Kafka wrote",), thinking(query="birthplace of Franz Kafka")),
        ((), thinking(query="author of The Castle")),
    ],
    "react_tools": [
        (
            ("`[[ ## next_tool_name ## ]]`", "observation_2"),
            chat(next_thought="Done.", next_tool_name="finish", next_tool_args="{}"),
        ),
        (
            ("`[[ ## next_tool_name ## ]]`", "observation_1"),
            chat(
                next_thought="Not by 0.",
                next_tool_name="divide",
                next_tool_args='{"a": 9, "b": 3}',
            ),
        ),
        (
            ("`[[ ## next_tool_name ## ]]`", "observation_0"),
            chat(
                next_thought="Divide.", next_tool_name="divide", next_tool_args='{"a": 9, "b": 0}'
            ),
        ),
        (
            ("`[[ ## next_tool_name ## ]]`",),
            chat(
                next_thought="Rain?",
                next_tool_name="get_weather",
                next_tool_args='{"city": "Oslo"}',
            ),
        ),
        ((), thinking(answer="3.0")),
    ],
    "chat_history": [
        (("When was he born",), chat(answer="In 1749.")),
        ((), chat(answer="Goethe.")),
    ],
    "images": [((), chat(same="False", words="A cat,\n\na dot and a dog."))],
    "streaming": [
        (
            (),
            Reply(
                chunks=[
                    "[[ ## ans",
                    "wer ## ]]\nBecause ",
                    "blue light ",
                    "is scattered",
                    " most.\n\n[[ ## sou",
                    "rce ## ]]\nA book",
                    ".\n\n[[ ## completed ## ]]",
                ]
            ),
        )
    ],
    "evaluation": [
        (("France",), chat(answer="Paris")),
        (("Peru",), chat(answer="lima")),
        ((), chat(answer="Mombasa")),
    ],
    "best_of_n": [
        (
            ("Belgium",),
            in_turn(
                thinking(answer="It is Brussels"),
                thinking(answer="Perhaps Brussels"),
                thinking(answer="Brussels"),
            ),
        ),
        (
            (),
            in_turn(
                chat(answer="Rio"),
                chat(answer="Brasilia"),
                chat(answer="BRASILIA"),
            ),
        ),
    ],
    "typed_lists": [
        (
            ("fire",),
            chat(
                topics='["fire", "hall"]',
                counts='{"fire": 1}',
                urgent="True",
                score="0.99",
                note="Call for help.",
            ),
        ),
        ((), chat(topics="[]", counts="{}", urgent="False", score="0", note="-")),
    ],
    "code_generation": [
        (
            (),
            thinking(
                code="```python\ndef double(x):\n    return x * 2\n```",
                tests='["double(2) == 4"]',
            ),
        )
    ],
    "tool_calls": [
        (
            (),
            Reply(
                text="",
                tool_calls=[
                    {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
                    {"name": "weather", "arguments": {"city": "Bergen"}},
                ],
            ),
        )
    ],
    "own_lm": [
        (("polite",), chat(answer="An Answer")),
        (("awaited",), chat(answer="Awaited")),
        ((), "Neither"),
    ],
    "rich_types": [
        (
            (),
            chat(
                by_value="high",
                by_name="LOW",
                author='{"name": "Ada", "age": 36, "tags": ["x"], "score": {"value": 1.5}}',
                people='[{"name": "Blaise", "age": "39"}]',
                row='{"a": 1, "b": "z"}',
                point='{"x": 1, "label": "q"}',
                none="None",
                some="7",
                number="12",
                words="abc",
                at="2024-05-06T07:08:09",
                pair='[1, "b"]',
                unique="[1, 2, 2]",
                nested='{"a": {"b": [1]}}',
                choice="b",
                anything='{"k": 1}',
                big="1e3",
            ),
        )
    ],
    "status_messages": [
        (
            (),
            Reply(
                chunks=["[[ ## ans", "wer ## ]]\nFor", "ty ", "two", "\n\n[[ ## completed ## ]]"]
            ),
        )
    ],
    "composition": [((), lambda body: chat(answer=body["model"]))],
}


def answer_of(name: str) -> Callable[[Body], str | Reply]:
    """Make the function by which the server of one program answers."""

    def answer(body: Body) -> str | Reply:
        content = body["messages"][-1]["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        question = "".join(parts)
        say = next(say for needles, say in SCRIPTS[name] if all(n in question for n in needles))
        return say(body) if callable(say) else say

    return answer
