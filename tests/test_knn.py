"""`KNN`: DSPy's neighbours, from threads, tasks and processes.

Not here: the search among vectors (`test_search.py`).
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any
from unittest import mock

import anyio
import numpy as np
import pytest

import dspylite as dspy
from dspylite.errors import EmbeddingShapeError, InputFieldError, LMConfigurationError
from dspylite.testing import FakeEmbedder
from tests.letters import CORPUS, letter_counts

LIMIT_S = 20
TRAINSET = [
    dspy.Example(question=text, hint=str(place), answer=f"answer {place}").with_inputs(
        "question", "hint"
    )
    for place, text in enumerate(CORPUS)
]

# What DSPy 3.4.1 with numpy 2.4.6 gave for TRAINSET, letter_counts, k=3 and hint="9".
RIVER, OWLS, YEAR = (
    "Which river flows through Cologne?",
    "When do owls hunt?",
    "How long is a year?",
)
DSPYS = {RIVER: [1, 0, 3], OWLS: [1, 0, 3], YEAR: [1, 3, 0]}


def made(k: int = 3, vectorizer: Any = letter_counts) -> dspy.KNN:
    return dspy.KNN(k=k, trainset=TRAINSET, vectorizer=vectorizer)


@pytest.mark.parametrize("has_numpy", [True, False])
@pytest.mark.parametrize("vectorizer", [letter_counts, dspy.Embedder(letter_counts)])
def test_neighbours_are_dspys(vectorizer: Any, has_numpy: bool) -> None:
    """The examples themselves, the nearest first."""
    with mock.patch.dict(sys.modules, {} if has_numpy else {"numpy": None}):
        knn = made(vectorizer=vectorizer)
        for question, places in DSPYS.items():
            found = knn(question=question, hint="9")
            assert [TRAINSET.index(example) for example in found] == places
            assert all(
                example is TRAINSET[place] for example, place in zip(found, places, strict=True)
            )


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [True, False])
async def test_awaited_neighbours_are_dspys(is_async: bool) -> None:
    async def awaited(texts: list[str]) -> list[list[float]]:
        await anyio.sleep(0)
        return letter_counts(texts)

    knn = made(vectorizer=awaited if is_async else letter_counts)
    for question, places in DSPYS.items():
        found = await knn.acall(question=question, hint="9")
        assert [TRAINSET.index(example) for example in found] == places


def test_texts_are_the_inputs_by_name_as_dspy_writes_them() -> None:
    """Labels would give the answer away."""
    embedder = FakeEmbedder()
    knn = dspy.KNN(
        1,
        [
            dspy.Example(a=1, answer="x", b=[2]).with_inputs("b", "a"),
            dspy.Example(a="1", b=None).with_inputs("a"),
        ],
        embedder,
    )
    knn(b="2", a=3)
    assert embedder.batches == [["a: 1 | b: [2]", "a: 1"], ["b: 2 | a: 3"]]


def test_equally_near_examples_come_in_the_order_of_the_set() -> None:
    examples = [dspy.Example(x=x).with_inputs("x") for x in "abab"]
    found = dspy.KNN(3, examples, lambda texts: [[text.count("b")] for text in texts])(x="b")
    assert [id(example) for example in found] == [id(examples[place]) for place in (1, 3, 0)]


def test_fewer_examples_than_k_are_all_given() -> None:
    assert len(made(k=50)(question=OWLS, hint="")) == len(TRAINSET)
    assert dspy.KNN(3, [], letter_counts)(question=OWLS) == []
    assert dspy.KNN(3, TRAINSET[:1], letter_counts)(question=OWLS) == TRAINSET[:1]


@pytest.mark.parametrize("k", [0, -1, "3", True, None, 1.0])
def test_k_that_cannot_work_is_refused(k: Any) -> None:
    """Zero gave the whole set elsewhere."""
    with pytest.raises(LMConfigurationError, match="`k`"):
        made(k=k)


def test_vectorizer_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(LMConfigurationError, match="Embedder"):
        made(vectorizer="openai/text-embedding-3-small")


@pytest.mark.parametrize("example", [dspy.Example(question="q"), {"question": "q"}, None, "q"])
def test_example_that_does_not_know_its_inputs_is_named(example: Any) -> None:
    """With the remedy, before anything is embedded."""
    embedder = FakeEmbedder()
    with pytest.raises(InputFieldError, match="Example 7"):
        dspy.KNN(1, [*TRAINSET, example], embedder)
    assert embedder.batches == []


def test_call_without_inputs_is_refused() -> None:
    with pytest.raises(InputFieldError, match=r"knn\(question=\.\.\.\)"):
        made()()


def test_vectorizer_that_changes_its_dimension_is_refused() -> None:
    dims = iter([3, 4])

    def changing(texts: list[str]) -> list[list[float]]:
        return [[1.0] * dim for dim in [next(dims)] for _ in texts]

    with pytest.raises(EmbeddingShapeError, match="4 dimensions"):
        made(vectorizer=changing)(question=OWLS)


def test_attributes_are_dspys() -> None:
    knn = made()
    assert (knn.k, knn.trainset, knn.embedding) == (3, TRAINSET, letter_counts)
    assert np.asarray(knn.trainset_vectors).shape == (7, 14)
    assert repr(knn) == "KNN(k=3, 7 examples)"


def test_calls_from_many_threads_get_their_own_neighbours() -> None:
    barrier = threading.Barrier(3, timeout=LIMIT_S)

    def meets(texts: list[str]) -> list[list[float]]:
        if len(texts) == 1:
            barrier.wait()
        return letter_counts(texts)

    knn = made(vectorizer=meets)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda q: knn(question=q, hint="9"), [*DSPYS] * 20, timeout=LIMIT_S))
    assert [[TRAINSET.index(each) for each in row] for row in found] == [*DSPYS.values()] * 20


def asked(knn: dspy.KNN) -> list[str]:
    return [example.answer for example in knn(question=RIVER, hint="9")]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda knn: pickle.loads(pickle.dumps(knn))])
def test_twin_of_a_used_knn_finds_the_same(twin_of: Any) -> None:
    knn = made(vectorizer=dspy.Embedder(letter_counts))
    assert asked(twin_of(knn)) == asked(knn)


def test_knn_works_in_a_spawned_process(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(asked, made()).result(60) == asked(made())
