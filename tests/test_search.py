"""The search among vectors: exact, ties by place, and bit for bit the same without numpy.

Not here: retrievers (`test_retrieval.py`).
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspylite import EmbeddingMatrix
from dspylite.models.matrix import block_of
from dspylite.models.numpy_door import load_numpy
from dspylite.models.retrieval.search import Rows
from dspylite.models.vectors import cosine_candidates, dot, dot_candidates, lengths

Hits = list[tuple[int, float]]


@contextmanager
def without_numpy() -> Iterator[None]:
    with mock.patch.dict(sys.modules, {"numpy": None}):
        assert load_numpy() is None
        yield


def found(rows: list[list[float]], query: list[float], k: int) -> Hits:
    """Search both ways; what they give must be equal to the last bit."""
    vector = array("f", query)
    with_it = Rows(EmbeddingMatrix.from_rows(rows)).nearest(vector, k)
    with without_numpy():
        assert Rows(EmbeddingMatrix.from_rows(rows)).nearest(vector, k) == with_it
    return with_it


def naive(rows: list[list[float]], query: list[float], k: int) -> Hits:
    scores = []
    for row in rows:
        score = 0.0
        for one, other in zip(array("f", row), array("f", query), strict=True):
            score += one * other
        scores.append(score)
    order = sorted(range(len(rows)), key=lambda index: (-scores[index], index))
    return [(index, scores[index]) for index in order[:k]]


def blocks(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    def of(dim: int) -> st.SearchStrategy[Any]:
        row = st.lists(numbers, min_size=dim, max_size=dim)
        return st.tuples(st.lists(row, min_size=1, max_size=12), row, st.integers(1, 14))

    return st.integers(1, 5).flatmap(of)


ANY_FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([-1.0, 0.0, 0.5, 1.0])


@settings(deadline=None)
@given(blocks(FEW) | blocks(ANY_FLOAT32) | blocks(FEW | ANY_FLOAT32))
def test_both_ways_give_what_a_plain_loop_gives(case: Any) -> None:
    """Ties, zeros, and the largest and smallest numbers of float32 among them."""
    rows, query, k = case
    assert found(rows, query, k) == naive(rows, query, k)


@settings(deadline=None)
@given(blocks(FEW | ANY_FLOAT32))
def test_rows_become_the_same_unit_vectors_both_ways(case: Any) -> None:
    """A saved directory does not depend on what was installed."""
    rows, _, _ = case
    made = EmbeddingMatrix.from_rows(rows).normalized()
    with without_numpy():
        assert EmbeddingMatrix.from_rows(rows).normalized() == made
    for row, unit in zip(rows, made.tolist(), strict=True):
        length = math.hypot(*array("f", row))
        assert math.hypot(*unit) == pytest.approx(1.0 if length > 1e-10 else length * 1e10)


def naive_cosines(rows: list[list[float]], query: list[float]) -> list[float]:
    scores = []
    for row in rows:
        product = own = other = 0.0
        for one, two in zip(array("f", row), array("f", query), strict=True):
            product, own, other = product + one * two, own + one * one, other + two * two
        size = math.sqrt(own) * math.sqrt(other)
        scores.append(max(-1.0, min(1.0, product / size)) if size else 0.0)
    return scores


def best_cosines(rows: list[list[float]], query: list[float], k: int) -> Hits:
    scores = naive_cosines(rows, query)
    order = sorted(range(len(rows)), key=lambda index: (-scores[index], index))
    return [(index, scores[index]) for index in order[:k]]


@settings(deadline=None)
@given(blocks(FEW) | blocks(ANY_FLOAT32) | blocks(FEW | ANY_FLOAT32))
def test_cosines_are_those_of_a_plain_loop_both_ways(case: Any) -> None:
    """Rows of zeros, the smallest numbers, whose squares float32 cannot hold, and the largest."""
    rows, query, k = case
    matrix = EmbeddingMatrix.from_rows(rows)
    for numpy in (True, False):
        with nullcontext() if numpy else without_numpy():
            assert matrix.cosine(query) == naive_cosines(rows, query)
            assert matrix.top_k(query, k) == best_cosines(rows, query, k)
            products = [sum_left(row, array("f", query)) for row in matrix.tolist()]
            assert matrix.dot(array("f", query)) == products


def sum_left(row: list[float], other: Any) -> float:
    total = 0.0
    for one, two in zip(row, other, strict=True):
        total += one * two
    return total


@pytest.mark.parametrize("dim", [3, 384])
def test_cosines_of_many_rows_with_twins_are_ranked_as_by_a_plain_loop(dim: int) -> None:
    """The fast pass only leaves out, also where rows differ by their lengths alone."""
    random_of = random.Random(11)
    some = [[random_of.gauss(0, 1) for _ in range(dim)] for _ in range(120)]
    scales = [0.0, 1e-38, 1e-20, 1.0, 2.0, 1e18]
    rows = [[x * scale for x in random_of.choice(some)] for scale in scales * 60]
    query = random_of.choice(some)
    assert EmbeddingMatrix.from_rows(rows).top_k(query, 25) == best_cosines(rows, query, 25)


@pytest.mark.parametrize("dim", [3, 384])
def test_block_of_many_rows_with_twins_is_ranked_as_by_a_plain_loop(dim: int) -> None:
    """Large enough that the fast pass leaves rows out, and that a BLAS would part twins."""
    random_of = random.Random(7)
    some = [[random_of.gauss(0, 1) for _ in range(dim)] for _ in range(120)]
    rows = [random_of.choice(some) for _ in range(499)]
    query = random_of.choice(some)
    assert found(rows, query, 25) == naive(rows, query, 25)
    block = np.array(rows, dtype=np.float32)
    alone = [math.sqrt(dot(row, row)) for row in block.tolist()]
    assert lengths(np, block).tolist() == alone


def test_rows_that_float32_products_cannot_tell_apart_are_ranked_exactly() -> None:
    """The fast pass only leaves out; it never ranks."""
    random_of = random.Random(5)
    rows, query = [], [1.0] * 257
    for _ in range(300):
        half = [random_of.uniform(0, 1000) for _ in range(128)]
        row = [*half, *(-number for number in half), random_of.uniform(0, 1e-4)]
        random_of.shuffle(row)
        rows.append(row)
    exact = [sum(map(Fraction, array("f", row))) for row in rows]
    order = sorted(range(300), key=lambda index: (-exact[index], index))
    hits = found(rows, query, 40)
    assert [index for index, _ in hits] == order[:40]
    assert [score for _, score in hits] == pytest.approx([float(exact[i]) for i in order[:40]])


def test_products_beyond_float32_are_ranked_too() -> None:
    """Infinity less infinity is not a number in the fast pass, and zero in truth."""
    rows = [[3e38, 3e38], [1.0, 0.0], [0.0, 1.0]]
    assert [index for index, _ in found(rows, [3e38, -3e38], 2)] == [1, 0]


def test_fast_pass_leaves_nearly_all_rows_out() -> None:
    """Otherwise numpy would save little."""
    random_of = random.Random(3)
    rows = [[random_of.gauss(0, 1) for _ in range(64)] for _ in range(400)]
    block = block_of(EmbeddingMatrix.from_rows(rows))
    assert len(dot_candidates(np, block, np.array(rows[0]), 5)) < 10
    assert len(cosine_candidates(np, block, np.array(rows[0]), 5)) < 10


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))])
def test_twin_of_searched_rows_finds_the_same(twin_of: Any) -> None:
    """Retrievers cross processes."""
    rows = Rows(EmbeddingMatrix.from_rows([[1, 2], [3, 4], [2, 1]]).normalized())
    before = rows.nearest([1.0, 0.0], 2)
    assert twin_of(rows).nearest([1.0, 0.0], 2) == before
