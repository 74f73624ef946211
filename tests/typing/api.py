# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Every public signature, used once as a user would. Type checkers read this; nothing runs it.

A line that must be an error says so twice, once for each checker; when the error goes away, mypy's
`warn_unused_ignores` and the first line of this file make both checkers fail.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, assert_type

import dspylite as dspy
from dspylite.testing import (
    DummyLM,
    FakeClock,
    FakeEmbedder,
    FakeLM,
    FakeServer,
    RecordedRequest,
    Reply,
)


class QA(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField(desc="what to answer")
    k: int = dspy.InputField(default=3)
    answer: str = dspy.OutputField()


class Grade(dspy.Signature):
    """Grade the essay."""

    essay: str = dspy.InputField(desc="the text", prefix="Essay:", max_length=10_000)
    marks: list[int] = dspy.OutputField(desc="one per criterion", min_length=1)
    passed: bool = dspy.OutputField()


# -- the static promise: inputs and outputs of a class signature are known ------------------------


def outputs_are_known() -> None:
    result = dspy.Predict(QA)(question="x")
    assert_type(result, QA)
    assert_type(result.answer, str)
    assert_type(result.question, str)
    assert_type(dspy.Predict(Grade)(essay="...").marks, list[int])
    assert_type(dspy.Predict(Grade)(essay="...").passed, bool)
    print(result.nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    result.answer.nope()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def inputs_are_known() -> None:
    predict = dspy.Predict(QA)
    predict(question="x")
    predict(question="x", k=5)
    predict(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict(k=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    predict("x")  # type: ignore[misc]  # pyright: ignore[reportCallIssue]
    predict(question=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    predict(question="x", k="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    predict(question="x", answer="y")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def a_result_is_a_record_too() -> None:
    result = dspy.Predict(QA)(question="x")
    assert_type(result["answer"], Any)
    assert_type(result.toDict(), dict[str, Any])
    assert_type(result.completions, dspy.Completions)
    assert_type(result.get_lm_usage(), dict[str, dict[str, int]] | None)


async def it_survives_acall() -> None:
    predict = dspy.Predict(QA)
    assert_type(await predict.acall(question="x"), QA)
    assert_type((await predict.acall(question="x", k=5)).answer, str)
    await predict.acall(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await predict.acall(question=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    print((await predict.acall(question="x")).nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def it_survives_asyncify() -> None:
    ask = dspy.asyncify(dspy.Predict(QA))
    assert_type(await ask(question="x"), QA)
    assert_type((await ask(question="x", k=5)).answer, str)
    await ask(qestion="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await ask(question=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    print((await ask(question="x")).nope)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def it_survives_batch(choice: dspy.parallel.OnError) -> None:
    predict = dspy.Predict(QA)
    inputs = [{"question": "x"}]
    assert_type(predict.batch(inputs), list[QA])
    assert_type(predict.batch(inputs, 4, 1, on_error="raise"), list[QA])
    assert_type(predict.batch(inputs, on_error="return"), list[dspy.Outcome[QA]])
