"""`EmbeddingMatrix`: a float32 block that is sliced, compared, pickled and shared with numpy.

Not here: making the vectors (`test_embedder.py`).
"""

from __future__ import annotations

import copy
import math
import pickle
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspylite import (
    EmbeddingMatrix,
    EmbeddingShapeError,
    EmbeddingValueError,
    LMConfigurationError,
)
from dspylite.models import matrix
from dspylite.models.matrix import read_vector

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]

float32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
tables = st.integers(1, 5).flatmap(
    lambda dim: st.lists(st.lists(float32, min_size=dim, max_size=dim), min_size=1, max_size=8)
)


@pytest.fixture
def block() -> EmbeddingMatrix:
    return EmbeddingMatrix.from_rows(ROWS)


# --- Reading -----------------------------------------------------------------------------------


@given(tables)
def test_rows_come_back_exactly_and_in_order(rows: list[list[float]]) -> None:
    """float32 in, the same float32 out, whatever the shape."""
    made = EmbeddingMatrix.from_rows(rows)
    assert made.tolist() == rows
    assert [row.tolist() for row in made] == rows
    assert made.shape == (len(rows), len(rows[0])) == (len(made), made.dim)


@given(tables, st.data())
def test_index_and_slice_do_what_those_of_a_list_do(
    rows: list[list[float]], data: st.DataObject
) -> None:
    """No slice, forwards or backwards, may be off by one row."""
    made = EmbeddingMatrix.from_rows(rows)
    index = data.draw(st.integers(-len(rows), len(rows) - 1))
    assert made[index].tolist() == rows[index]
    bounds = st.none() | st.integers(-12, 12)
    step = data.draw(st.none() | st.integers(-4, 4).filter(bool))
    part = slice(data.draw(bounds), data.draw(bounds), step)
    assert made[part].tolist() == rows[part]
    assert made[part].dim == len(rows[0])


@pytest.mark.parametrize("index", [4, -5, 99])
def test_row_that_is_not_there_is_an_index_error(block: EmbeddingMatrix, index: int) -> None:
    """Iteration and `in` rely on it."""
    with pytest.raises(IndexError, match="There are 4 vectors"):
        block[index]


def test_no_rows_are_a_block_of_none() -> None:
    """Nothing to embed is no error."""
    empty = EmbeddingMatrix.from_rows([])
    assert (empty.shape, empty.tolist(), list(empty)) == ((0, 0), [], [])


def test_repr_shows_the_shape_and_not_a_million_numbers(block: EmbeddingMatrix) -> None:
    """A block is printed by accident often enough."""
    assert repr(block) == "EmbeddingMatrix(shape=(4, 2))"


def test_bytes_are_raw_float32(block: EmbeddingMatrix) -> None:
    """What is stored is what any other program reads."""
    assert block.tobytes() == array("f", [1, 2, 3, 4, 5, 6, 7, 8]).tobytes()


def test_dot_is_the_product_with_each_row(block: EmbeddingMatrix) -> None:
    """Search without numpy needs no more; a row of another block is a vector too."""
    assert block.dot([1.0, 0.5]) == [2.0, 5.0, 8.0, 11.0]
    assert block.dot(block[0]) == [5.0, 11.0, 17.0, 23.0]


def test_dot_with_another_dimension_is_refused(block: EmbeddingMatrix) -> None:
    """Vectors of two models must not be compared."""
    with pytest.raises(EmbeddingShapeError, match="3 dimensions does not match rows of 2"):
        block.dot([1.0, 2.0, 3.0])


def test_normalized_rows_have_length_one_and_zeros_stay() -> None:
    """In memory of their own: the block itself is not changed."""
    block = EmbeddingMatrix.from_rows([[3, 4], [0, 0], [0, -5]])
    unit = block.normalized()
    assert unit.tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [0, -1]]
    assert block.tolist() == [[3, 4], [0, 0], [0, -5]]
    assert not np.shares_memory(np.asarray(unit), np.asarray(block))
    np.asarray(unit)[0, 0] = 9
    assert unit[0][0] == 9


QUERIES: dict[str, Callable[[list[float]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": lambda query: array("f", query),
    "numpy": lambda query: np.array(query, dtype=np.float32),
    "float64": np.array,
    "row": lambda query: EmbeddingMatrix.from_rows([query])[0],
}


@pytest.mark.parametrize("form", QUERIES.values(), ids=list(QUERIES))
def test_rows_most_like_a_vector_come_first(form: Callable[[list[float]], Any]) -> None:
    """Whatever their lengths; of twins the first is first."""
    block = EmbeddingMatrix.from_rows([[0, 2], [5, 0], [0, 0], [-1, 0], [9, 0], [1, 1]])
    query = form([0.5, 0.0])
    assert block.cosine(query) == pytest.approx([0, 1, 0, -1, 1, math.sqrt(0.5)])
    assert block.top_k(query, 3) == [(1, 1.0), (4, 1.0), (5, pytest.approx(math.sqrt(0.5)))]
    assert [row for row, _ in block.top_k(query, 99)] == [1, 4, 5, 0, 2, 3]


def test_vector_of_zeros_is_like_nothing(block: EmbeddingMatrix) -> None:
    """No direction, no cosine; and no division by zero."""
    assert block.cosine([0, 0]) == [0, 0, 0, 0]
    assert block.top_k([0, 0], 2) == [(0, 0.0), (1, 0.0)]


def test_slice_and_read_only_block_are_searched(block: EmbeddingMatrix) -> None:
    """They share the memory of the whole."""
    assert [row for row, _ in block[1:3].top_k([0, 1], 9)] == [0, 1]
    assert block.toreadonly().cosine(block[2])[2] == 1.0
    assert block.toreadonly().normalized() == block.normalized()


def test_nothing_is_found_among_no_rows() -> None:
    """An empty corpus is no error, whatever the vector."""
    empty = EmbeddingMatrix.from_rows([])
    assert (empty.top_k([1, 2], 3), empty.cosine([1]), empty.normalized()) == ([], [], empty)
    assert empty.dot([]) == []
    assert empty.copy() == empty


@pytest.mark.parametrize("ask", ["dot", "cosine", "top_k"])
@pytest.mark.parametrize("vector", [[1.0], [1.0, 2.0, 3.0]], ids=len)
def test_vector_of_another_dimension_is_refused(
    block: EmbeddingMatrix, ask: str, vector: list[float]
) -> None:
    """Vectors of two models must not be compared."""
    with pytest.raises(EmbeddingShapeError, match="dimensions does not match rows of 2"):
        getattr(block, ask)(vector, *([1] if ask == "top_k" else []))


@pytest.mark.parametrize("ask", ["cosine", "top_k"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "1"], ids=repr)
def test_query_that_is_no_number_is_refused(block: EmbeddingMatrix, ask: str, bad: Any) -> None:
    """Compared with NaN nothing is larger, so that any rows would be the best."""
    with pytest.raises(EmbeddingValueError, match="The vector holds") as caught:
        getattr(block, ask)([1.0, bad], *([1] if ask == "top_k" else []))
    assert caught.value.index is None


@pytest.mark.parametrize("bad", ["12", None, 5, {1.0, 2.0}], ids=repr)
def test_query_that_is_no_vector_is_refused(block: EmbeddingMatrix, bad: Any) -> None:
    """A text must be embedded first."""
    with pytest.raises(EmbeddingShapeError, match="The vector is not a list of numbers"):
        block.top_k(bad, 1)


@pytest.mark.parametrize("k", [0, -1, True, 1.5, "2", None], ids=repr)
def test_count_of_rows_that_is_none_is_refused(block: EmbeddingMatrix, k: Any) -> None:
    """It is an error of the caller, not an empty answer."""
    with pytest.raises(LMConfigurationError, match="`k` must be a whole number from 1"):
        block.top_k([1, 2], k)


# --- Memory ------------------------------------------------------------------------------------


def test_numpy_shares_the_memory(block: EmbeddingMatrix) -> None:
    """A million vectors are not copied to be searched."""
    matrix = np.asarray(block)
    assert (matrix.dtype, matrix.shape) == (np.float32, (4, 2))
    assert matrix.tolist() == ROWS
    matrix[1, 0] = 99
    assert block[1].tolist() == [99, 4]


def test_rows_and_slices_share_the_memory(block: EmbeddingMatrix) -> None:
    """Reading a row or a range copies nothing."""
    row, part, matrix = block[2], block[1:3], np.asarray(block)
    matrix[2] = [50, 60]
    assert row.tolist() == [50, 60]
    assert part.tolist() == [[3, 4], [50, 60]]
    assert np.shares_memory(np.asarray(part), matrix)


def test_numpy_keeps_the_memory_alive() -> None:
    """The array must not read freed memory when the block is gone."""
    matrix = np.asarray(EmbeddingMatrix.from_rows(ROWS))
    assert matrix.tolist() == ROWS


def test_copy_has_memory_of_its_own_and_can_be_changed(block: EmbeddingMatrix) -> None:
    """A cached block is read only; whoever wants to change it takes a copy."""
    twin = block.toreadonly()[1:].copy()
    np.asarray(twin)[0, 0] = 99
    assert twin.tolist() == [[99, 4], [5, 6], [7, 8]]
    assert block.tolist() == ROWS


def test_empty_block_is_an_empty_array() -> None:
    """numpy reads the interface of a block without memory too."""
    assert np.asarray(EmbeddingMatrix.from_rows([])).shape == (0, 0)


TWINS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("twin_of", list(TWINS.values()), ids=list(TWINS))
@pytest.mark.parametrize("part", [slice(None), slice(1, 3), slice(None, None, -2), slice(0, 0)])
def test_twin_is_equal_and_has_memory_of_its_own(
    block: EmbeddingMatrix, part: slice, twin_of: Callable[[Any], Any]
) -> None:
    """A block goes to worker processes and back, a slice of it without the rest."""
    original = block[part]
    twin = twin_of(original)
    assert twin == original
    assert twin.shape == original.shape
    assert not np.shares_memory(np.asarray(twin), np.asarray(block))


def test_pickle_is_as_large_as_the_numbers() -> None:
    """4 bytes a number, whatever part of a block it is."""
    large = EmbeddingMatrix.from_rows([[float(i)] * 100 for i in range(100)])
    assert len(pickle.dumps(large)) < 40_000 + 200
    assert len(pickle.dumps(large[:1])) < 400 + 200


def test_equality_is_of_shape_and_values(block: EmbeddingMatrix) -> None:
    """The same numbers in another shape are other vectors."""
    assert block == EmbeddingMatrix.from_rows(ROWS)
    assert block != EmbeddingMatrix.from_rows([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert block != EmbeddingMatrix.from_rows([*ROWS[:3], [7, 9]])
    assert block != ROWS


def test_block_cannot_be_hashed(block: EmbeddingMatrix) -> None:
    """Its memory can change under a dict."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(block)


# --- What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, None, "1.0", [1.0], 1e300], ids=repr
)
def test_value_that_is_no_float32_is_refused_with_its_row(bad: object) -> None:
    """One NaN poisons every comparison, and nobody sees where it came from."""
    with pytest.raises(EmbeddingValueError, match="text 2") as caught:
        EmbeddingMatrix.from_rows([[1, 2], [3, 4], [5, bad]])  # type: ignore[list-item]
    assert caught.value.index == 2


@pytest.mark.parametrize(
    "row", [[5.0], [5.0, 6.0, 7.0], [], None, 5.0, "56", b"56", bytearray(b"12345678")], ids=repr
)
def test_row_of_another_shape_is_refused_with_its_number(row: object) -> None:
    """A short row would shift all that follow."""
    with pytest.raises(EmbeddingShapeError, match="text 2") as caught:
        EmbeddingMatrix.from_rows([[1, 2], [3, 4], row])  # type: ignore[list-item]
    assert caught.value.index == 2


def test_numbers_that_are_no_rows_are_refused() -> None:
    """7 numbers are no rows of 2, doubles are no float32, and rows have a length."""
    with pytest.raises(EmbeddingShapeError, match="not rows of 2"):
        EmbeddingMatrix(array("f", range(7)), 2)
    with pytest.raises(EmbeddingShapeError, match="format 'd'"):
        EmbeddingMatrix(array("d", range(8)), 2)
    with pytest.raises(EmbeddingShapeError, match="not rows of 0"):
        EmbeddingMatrix(array("f", range(8)), 0)
    with pytest.raises(EmbeddingShapeError, match="not rows of -2"):
        EmbeddingMatrix(array("f", range(8)), -2)


FORMS: dict[str, Callable[[list[list[float]]], Any]] = {
    "lists": lambda rows: rows,
    "arrays": lambda rows: [array("f", row) for row in rows],
    "memoryviews": lambda rows: [memoryview(array("f", row)) for row in rows],
    "doubles": lambda rows: [array("d", row) for row in rows],
    "rows of numpy": lambda rows: [np.array(row, dtype=np.float32) for row in rows],
    "other steps": lambda rows: [
        np.repeat(np.array(row, dtype=np.float32), 2)[::2] for row in rows
    ],
    "other order of bytes": lambda rows: [np.array(row, dtype=">f4") for row in rows],
    "float64 of numpy": lambda rows: np.array(rows),
    "float32 of numpy": lambda rows: np.array(rows, dtype=np.float32),
    "columns first": lambda rows: np.asfortranarray(rows, dtype=np.float32),
    "read only": lambda rows: [memoryview(array("f", row)).toreadonly() for row in rows],
    "one after the other": iter,
}

by_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


@by_form
@given(tables)
def test_every_form_of_rows_gives_the_same_block_in_memory_of_its_own(
    form: Callable[[list[list[float]]], Any], rows: list[list[float]]
) -> None:
    """What is float32 already is taken as bytes, and so must be taken right."""
    given_rows = form(rows)
    made = EmbeddingMatrix.from_rows(given_rows)
    assert made == EmbeddingMatrix.from_rows(rows)
    if isinstance(given_rows, np.ndarray):
        assert not np.shares_memory(np.asarray(made), given_rows)
    np.asarray(made)[0, 0] = 7  # it can be changed, too
    assert made[0][0] == 7


@by_form
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf], ids=repr)
def test_value_that_is_not_finite_is_found_in_every_form(
    form: Callable[[list[list[float]]], Any], bad: float
) -> None:
    """Wherever it stands; the row is named."""
    for place in range(3):
        row = [3.0, 4.0, 5.0]
        row[place] = bad
        with pytest.raises(EmbeddingValueError, match="text 1 holds NaN or infinity") as caught:
            EmbeddingMatrix.from_rows(form([[1.0, 2.0, 3.0], row]))
        assert caught.value.index == 1


@by_form
def test_numbers_up_to_the_end_of_float32_are_taken(
    form: Callable[[list[list[float]]], Any],
) -> None:
    """The quick look at the high bytes must not refuse what is large and finite."""
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    rows = [[largest, -largest], [1.8e38, -1e-45]]
    assert EmbeddingMatrix.from_rows(form(rows)) == EmbeddingMatrix.from_rows(rows)


def test_rows_in_one_buffer_that_changes_are_copied_one_by_one() -> None:
    """A generator may fill the same array again and again."""
    buffer = array("f", [0, 0])

    def rows() -> Iterator[array[float]]:
        for number in range(3):
            buffer[0] = number
            yield buffer

    assert EmbeddingMatrix.from_rows(rows()).tolist() == [[0, 0], [1, 0], [2, 0]]
    vector = read_vector(buffer, 0)
    buffer[0] = 9
    assert vector.tolist() == [2, 0]


def test_hidden_values_of_a_masked_array_are_not_taken() -> None:
    """Its memory holds a number where it shows none."""
    masked = np.ma.masked_array([1, 2], mask=[False, True], dtype=np.float32)
    with pytest.raises(EmbeddingValueError, match="text 0"):
        EmbeddingMatrix.from_rows([masked])


@pytest.mark.parametrize("order", ["little", "big"])
def test_high_byte_is_looked_for_where_the_machine_has_it(order: str) -> None:
    """0x7f as the lowest byte of a number means nothing."""
    high = slice(3 if order == "little" else 0, None, 4)
    raw = array("f", [math.inf])
    if order != sys.byteorder:
        raw.byteswap()
    assert raw.tobytes()[high] == b"\x7f"
    assert (high == matrix._HIGH_BYTES) == (order == sys.byteorder)


@pytest.mark.parametrize("rows", [np.zeros((2, 0), "f"), np.zeros((2, 0)), [array("f")]], ids=repr)
def test_rows_without_numbers_are_refused(rows: Any) -> None:
    """In one block or one by one."""
    with pytest.raises(EmbeddingShapeError, match="text 0 is empty"):
        EmbeddingMatrix.from_rows(rows)


def test_block_of_no_rows_is_a_block_of_none() -> None:
    """As no list of rows is."""
    assert EmbeddingMatrix.from_rows(np.zeros((0, 5), "f")).shape == (0, 0)


def test_rows_may_be_arrays() -> None:
    """numpy's rows, arrays and tuples are rows of numbers."""
    assert EmbeddingMatrix.from_rows(np.array(ROWS, dtype=np.float64)).tolist() == ROWS
    assert EmbeddingMatrix.from_rows(array("f", row) for row in ROWS).tolist() == ROWS
    assert EmbeddingMatrix.from_rows(tuple(map(tuple, ROWS))).tolist() == ROWS
