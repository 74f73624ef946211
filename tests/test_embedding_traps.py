"""What embedding servers do wrong, by real HTTP through each engine: never a wrong vector.

Not here: calls that go well (`test_embedder.py`), and batches that fail
(`test_embedding_calls.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dspylite as dspy
from dspylite.errors import (
    BatchError,
    EmbeddingShapeError,
    EmbeddingValueError,
    LMConfigurationError,
)
from dspylite.models.offline.hashing import hash_embedding
from dspylite.testing import FakeServer, RecordedRequest, Reply
from tests.caching import cache_in

pytestmark = pytest.mark.usefixtures("engine")

FULL = 8
"""Dimensions of the servers' model."""

Row = Sequence[float | None]


@contextmanager
def server_with(row: Callable[[str, Mapping[str, Any]], Row]) -> Iterator[FakeServer]:
    """Start a server that gives each text the row a function makes of it and of the body."""

    def answer(body: Mapping[str, Any]) -> Reply:
        return Reply(vectors={place: row(text, body) for place, text in enumerate(body["input"])})

    with FakeServer(answer=answer) as server:
        yield server


def full(text: str) -> list[float]:
    return list(hash_embedding(text, FULL))


def cut(text: str, dimensions: int) -> list[float]:
    """Return what a good server gives: the first numbers, of length 1."""
    first = full(text)[:dimensions]
    length = math.hypot(*first)
    return [value / length for value in first]


def embedder_at(server: FakeServer, model: str = "openai/m", **options: Any) -> dspy.Embedder:
    return dspy.Embedder(model, api_base=server.base_url, api_key="k", num_retries=0, **options)


# --- Dimensions ----------------------------------------------------------------------------------


def test_dimensions_of_an_unknown_model_reach_its_server() -> None:
    """B 9D: litellm refuses them for names that it does not know; here the server is asked."""
    with server_with(lambda text, body: cut(text, body["dimensions"])) as server:
        block = embedder_at(server, "openai/nobody-knows-it", dimensions=4).embed(["one", "two"])
        (request,) = server.requests
    assert request.json["dimensions"] == 4
    assert np.asarray(block) == pytest.approx(np.array([cut("one", 4), cut("two", 4)]), abs=1e-6)


def test_a_server_that_ignores_dimensions_is_found_out() -> None:
    """B 9D, B 6.5: vectors of a model that was not trained for it are not cut behind one's back."""
    with server_with(lambda text, body: full(text)) as server:
        embedder = embedder_at(server, dimensions=4)
        with pytest.raises(EmbeddingShapeError, match=r"ignores `dimensions=4`.*matryoshka=True"):
            embedder.embed(["one"])


def test_a_server_that_ignores_dimensions_is_made_up_for_where_the_model_allows_it() -> None:
    """B 6.5: the model is known to be trained for it, so its vectors are cut here."""
    with server_with(lambda text, body: full(text)) as server:
        model = "hosted_vllm/Qwen/Qwen3-Embedding-4B"
        block = embedder_at(server, model, dimensions=4).embed(["one"])
    assert np.asarray(block) == pytest.approx(np.array([cut("one", 4)]), abs=1e-6)


def test_cutting_here_can_be_asked_for_and_forbidden() -> None:
    """B 6.5: `True` cuts any model's vectors and does not trouble the server; `False` cuts none."""
    with server_with(lambda text, body: full(text)) as server:
        block = embedder_at(server, dimensions=4, matryoshka=True).embed(["one"])
        assert "dimensions" not in server.requests[0].json
        assert np.asarray(block) == pytest.approx(np.array([cut("one", 4)]), abs=1e-6)
        strict = embedder_at(server, "openai/Qwen3-Embedding", dimensions=4, matryoshka=False)
        with pytest.raises(EmbeddingShapeError, match="ignores"):
            strict.embed(["one"])


def test_a_server_that_cuts_without_normalising_is_made_up_for() -> None:
    """B 9D: cosine by dot product would rank by length otherwise."""
    with server_with(lambda text, body: full(text)[: body["dimensions"]]) as server:
        block = embedder_at(server, dimensions=4).embed(["one", "two"])
    assert np.asarray(block) == pytest.approx(np.array([cut("one", 4), cut("two", 4)]), abs=1e-6)
    assert [math.hypot(*row) for row in block] == pytest.approx([1, 1], abs=1e-6)


def test_fewer_dimensions_than_asked_for_are_an_error() -> None:
    """Nobody can make up numbers that are not there."""
    with server_with(lambda text, body: full(text)) as server:
        embedder = embedder_at(server, dimensions=9)
        with pytest.raises(EmbeddingShapeError, match="8 dimensions, fewer than `dimensions=9`"):
            embedder.embed(["one"])


def test_vectors_are_given_as_they_come_where_no_dimensions_were_asked_for() -> None:
    """A model whose vectors have other lengths means something by it."""
    with server_with(lambda text, body: [3.0, 4.0]) as server:
        assert embedder_at(server).embed(["one"]).tolist() == [[3.0, 4.0]]


# --- Rows ----------------------------------------------------------------------------------------


def test_too_few_rows_are_never_shifted(tmp_path: Path) -> None:
    """B 6.4, B 9D: two vectors for three texts; nothing of that answer is used or kept."""

    def answer(body: Mapping[str, Any]) -> Reply:
        texts = body["input"]
        return Reply(vectors={place: full(texts[place]) for place in range(len(texts) - 1)})

    with FakeServer(answer=answer) as server, cache_in(tmp_path):
        embedder = embedder_at(server)
        for _ in range(2):
            with pytest.raises(EmbeddingShapeError, match="3 texts gave 2 vectors"):
                embedder.embed(["a", "b", "c"])
        assert [request.json["input"] for request in server.requests] == [["a", "b", "c"]] * 2


def test_rows_are_put_in_the_order_of_their_index() -> None:
    """B 6.4, B 9D: the `index` of a row says whose it is."""

    def answer(body: Mapping[str, Any]) -> Reply:
        texts = body["input"]
        return Reply(vectors={place: full(texts[place]) for place in reversed(range(len(texts)))})

    with FakeServer(answer=answer) as server:
        texts = ["one", "two", "three"]
        assert embedder_at(server).embed(texts).tolist() == [full(text) for text in texts]


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_an_encoding_that_the_user_asks_for_is_read(encoding: str) -> None:
    """B 6.1: whichever engine it comes through; litellm hands base64 on as it is, and warns."""
    with FakeServer(dimensions=FULL) as server:
        made = embedder_at(server, encoding_format=encoding).embed(["a"])
        assert made.tolist() == [list(server.vector("a"))]


BAD_ROWS: dict[str, list[Any]] = {
    "NaN": [math.nan, *[0.0] * 7],
    "infinity": [math.inf, *[0.0] * 7],
    "infinities that cancel": [math.inf, -math.inf, *[0.0] * 6],
    "null": [None, *[0.0] * 7],
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_numbers_cost_their_text_alone_and_are_not_kept(bad: Row, tmp_path: Path) -> None:
    """B 6.4, B 9D: the error names the text; its neighbours are kept, and it is asked again."""
    is_mended = False

    def row(text: str, body: Mapping[str, Any]) -> Row:
        return bad if text == "b" and not is_mended else full(text)

    with server_with(row) as server, cache_in(tmp_path):
        embedder = embedder_at(server)
        with pytest.raises(BatchError) as caught:
            embedder.embed(["a", "b", "c"])
        (error,) = caught.value.errors.values()
        assert isinstance(error, EmbeddingValueError)
        assert (list(caught.value.errors), error.index) == ([1], 1)
        assert {place: list(row) for place, row in caught.value.results.items()} == {
            0: full("a"),
            2: full("c"),
        }
        is_mended = True
        assert embedder.embed(["a", "b", "c"]).tolist() == [full(text) for text in "abc"]
        assert [request.json["input"] for request in server.requests] == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize(
    "rows",
    [[1, 2], [[1.0], [2.0]], [{"index": 0}, {"index": 1}], "no rows", {"0": []}, None],
    ids=["numbers", "lists", "no embedding", "text", "dict", "null"],
)
def test_an_answer_of_another_shape_is_an_error_of_ours(rows: Any) -> None:
    """Whatever is behind the address: a named error, and no vector."""
    body = json.dumps({"object": "list", "data": rows, "model": "m", "usage": {}})
    with FakeServer(answer=lambda _: Reply(body=body)) as server:
        embedder = embedder_at(server)
        with pytest.raises((dspy.LMError, EmbeddingShapeError)):
            embedder.embed(["a", "b"])


# --- Long texts ----------------------------------------------------------------------------------

HEAD = "the same words at the beginning of both texts, again and again. " * 12
TAILS = ("Cats sleep on warm stones. " * 12, "The parliament passed a budget. " * 12)


def read_so_far(text: str) -> str:
    """Return what a server that reads 64 words of a text sees of it."""
    return " ".join(text.split()[:64])


def test_a_server_that_truncates_silently_cannot_hide_the_tails() -> None:
    """B 9D: same head, other tails: equal vectors from the server, different ones from here."""
    texts = [HEAD + tail for tail in TAILS]
    with server_with(lambda text, body: list(hash_embedding(read_so_far(text), 256))) as server:
        silent = embedder_at(server).embed(texts)
        assert silent[0] == silent[1]
        pooled = embedder_at(server, max_tokens=48, overflow="pool").embed(texts)
        longest = max(len(text.split()) for r in server.requests[1:] for text in _inputs(r))
    assert sum(map(float.__mul__, pooled[0], pooled[1])) < 0.99
    assert [math.hypot(*row) for row in pooled] == pytest.approx([1, 1], abs=1e-6)
    assert longest <= 48


def _inputs(request: RecordedRequest) -> list[str]:
    texts: Any = request.json["input"]
    return list(texts)


def test_a_pooled_vector_is_the_mean_by_tokens_of_its_parts() -> None:
    """B 6.5: parts of the text, in order, nothing left out; their mean weighted by tokens."""
    text = "One two three four. Five six."
    with FakeServer(dimensions=FULL) as server:
        embedder = embedder_at(server, max_tokens=5, overflow="pool", tokenizer=words)
        block = embedder.embed([text])
        (request,) = server.requests
        parts = _inputs(request)
        rows = [server.vector(part) for part in parts]
    assert parts == ["One two three four.", "Five six."]
    mean = [4 * a + 2 * b for a, b in zip(*rows, strict=True)]
    length = math.hypot(*mean)
    assert block.tolist()[0] == pytest.approx([value / length for value in mean], abs=1e-6)


def test_a_long_text_of_blanks_does_not_cost_the_others_their_vectors() -> None:
    """B 6.5: it has no parts that could be pooled, so as much of it is sent as fits."""
    with FakeServer(dimensions=FULL) as server:
        blanks = " \n" * 3_000
        block = embedder_at(server, max_tokens=20, overflow="pool").embed(["one", blanks])
        (request,) = server.requests
        sent = _inputs(request)
        assert block.tolist() == [list(server.vector(text)) for text in sent]
    assert sent[0] == "one"
    assert sent[1]
    assert blanks.startswith(sent[1])
    assert len(sent[1]) < 200


def words(text: str) -> list[int]:
    """End a token where a word does."""
    ends = [place for place, letter in enumerate(text) if letter == " "]
    return [*ends, len(text)] if text else []


def test_a_long_text_is_an_error_unless_something_else_is_said() -> None:
    """B 6.5: found before anything is sent; the other texts have their vectors."""
    with FakeServer(dimensions=FULL) as server:
        embedder = embedder_at(server, max_tokens=3, tokenizer=words)
        with pytest.raises(dspy.ContextWindowExceededError, match="Text 0 has 4 tokens"):
            embedder.embed(["a b c d"])
        assert server.requests == ()
        with pytest.raises(BatchError) as caught:
            embedder.embed(["a b", "a b c d"])
        assert (list(caught.value.results), list(caught.value.errors)) == ([0], [1])
        assert [_inputs(request) for request in server.requests] == [["a b"]]


def test_a_long_text_can_be_cut_off() -> None:
    """B 6.5: the first tokens are sent, with the instruction inside the limit."""
    with FakeServer(dimensions=FULL) as server:
        options: Any = {"max_tokens": 4, "overflow": "truncate", "tokenizer": words}
        embedder_at(server, **options).embed(["a b c d e f"])
        embedder_at(server, instruction="doc: ", **options).embed(["a b c d e f"])
        assert [_inputs(request) for request in server.requests] == [["a b c d"], ["doc: a b"]]


def test_a_window_that_the_query_instruction_fills_is_refused() -> None:
    """Found when it is made: no query could ever be embedded."""
    with pytest.raises(LMConfigurationError, match="leaves no room for a text"):
        dspy.Embedder("openai/m", max_tokens=3, query_instruction="a b c d ", tokenizer=words)
