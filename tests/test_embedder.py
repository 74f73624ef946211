"""`Embedder`: hosted models through a real server, functions sync and async, offline hashing.

Not here: the block it returns (`test_embedding_matrix.py`).
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest

import dspylite as dspy
from dspylite.errors import (
    BatchError,
    EmbeddingShapeError,
    EmbeddingValueError,
    InputFieldError,
    LMConfigurationError,
    LMRateLimitError,
    LMServerError,
)
from dspylite.testing import FakeClock, FakeServer, RecordedRequest, Reply

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"
LETTERS = list("abcdefgh")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module: litellm keeps a client, and a socket, for each address.

    It is asked once before any test: of several threads that come first at once, each would make a
    client, and all but one would be dropped with their sockets open.
    """
    with FakeServer(dimensions=4) as server:
        hosted(server).embed(["warm-up"])
        yield server


awaited = pytest.mark.usefixtures("one_loop")


def hosted(server: FakeServer, **options: Any) -> dspy.Embedder:
    options = {"api_base": server.base_url, "api_key": KEY, "num_retries": 0, **options}
    return dspy.Embedder("openai/m", **options)


def batches(server: FakeServer) -> list[Any]:
    return [request.json["input"] for request in server.requests]


def holds(text: str) -> Any:
    """Make a rule: requests whose batch holds this text."""

    def applies(request: RecordedRequest) -> bool:
        texts = request.json["input"]
        return isinstance(texts, list) and text in texts

    return applies


# --- Hosted models -----------------------------------------------------------------------------


def test_hosted_vectors_are_the_servers_in_order(server: FakeServer) -> None:
    """Row i belongs to text i, each number exactly as sent."""
    block = hosted(server).embed(LETTERS)
    assert block.shape == (8, 4)
    assert block.tolist() == [list(server.vector(letter)) for letter in LETTERS]


@awaited
async def test_awaited_hosted_vectors_are_the_servers_in_order(server: FakeServer) -> None:
    """Likewise on an event loop."""
    block = await hosted(server, batch_size=3).aembed(LETTERS)
    assert block.tolist() == [list(server.vector(letter)) for letter in LETTERS]


def test_shuffled_rows_are_put_in_order(server: FakeServer) -> None:
    """The `index` of a row says whose it is; servers that batch answer out of order."""
    server.script(Reply(vectors={2: [3.0, 3.0], 0: [1.0, 1.0], 1: [2.0, 2.0]}))
    assert hosted(server).embed(["a", "b", "c"]).tolist() == [[1, 1], [2, 2], [3, 3]]


def test_rows_without_an_index_are_taken_as_they_come(server: FakeServer) -> None:
    """Some servers send none; then the order is all there is."""
    rows = [{"embedding": [1.0]}, {"embedding": [2.0]}]
    server.script(Reply(body=json.dumps({"object": "list", "data": rows, "model": "m"})))
    assert hosted(server).embed(["a", "b"]).tolist() == [[1], [2]]


WRONG_COUNTS: dict[str, Any] = {
    "too few": {0: [1.0], 1: [2.0]},
    "too many": {0: [1.0], 1: [2.0], 2: [3.0], 3: [4.0]},
    "none": {},
    "a hole": {0: [1.0], 1: [2.0], 7: [3.0]},
}


@pytest.mark.parametrize("vectors", WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_wrong_number_of_rows_is_an_error(vectors: Any, server: FakeServer) -> None:
    """Two vectors for three texts were shifted and returned as success elsewhere."""
    server.script(Reply(vectors=vectors))
    with pytest.raises(EmbeddingShapeError, match="3 texts gave"):
        hosted(server).embed(["a", "b", "c"])


@pytest.mark.parametrize("indices", [(0, 0, 2), (0, 1, 2, 2)], ids=str)
def test_index_sent_twice_is_an_error(indices: tuple[int, ...], server: FakeServer) -> None:
    """Nobody knows which of two vectors for one text is meant."""
    rows = [{"embedding": [1.0], "index": index} for index in indices]
    server.script(Reply(body=json.dumps({"object": "list", "data": rows, "model": "m"})))
    with pytest.raises(EmbeddingShapeError, match="indices"):
        hosted(server).embed(["a", "b", "c"])


def test_row_with_an_index_among_rows_without_is_an_error(server: FakeServer) -> None:
    """Nobody knows whose the others are."""
    rows = [{"embedding": [1.0], "index": 1}, {"embedding": [1.0]}]
    server.script(Reply(body=json.dumps({"object": "list", "data": rows, "model": "m"})))
    with pytest.raises(EmbeddingShapeError, match="indices"):
        hosted(server).embed(["a", "b"])


@pytest.mark.parametrize("bad", [math.nan, None], ids=repr)
def test_bad_value_names_the_text_in_the_users_list(bad: Any, server: FakeServer) -> None:
    """The user has ten thousand texts and wants to know which one."""
    server.script(Reply(vectors={0: [1.0], 1: [2.0]}), Reply(vectors={0: [3.0], 1: [bad]}))
    with pytest.raises(BatchError, match="text 4") as caught:
        hosted(server, batch_size=2, max_concurrency=1).embed(["a", "b", "a", "c", "d"])
    (error,) = caught.value.errors.values()
    assert isinstance(error, EmbeddingValueError)
    assert (list(caught.value.errors), error.index) == ([4], 4)
    assert {i: list(row) for i, row in caught.value.results.items()} == {
        0: [1],
        1: [2],
        2: [1],
        3: [3],
    }


@pytest.mark.parametrize("bad", [math.nan, None], ids=repr)
def test_bad_value_of_an_only_text_is_the_error_itself(bad: Any, server: FakeServer) -> None:
    """Where nothing else is to be saved there is no batch to speak of."""
    server.script(Reply(vectors={0: [bad]}))
    with pytest.raises(EmbeddingValueError, match="text 0") as caught:
        hosted(server).embed(["a", "a"])
    assert caught.value.index == 0


@pytest.mark.parametrize("row", [[1.0, 2.0, 3.0], []], ids=["longer", "empty"])
def test_wrong_dimension_names_the_text_in_the_users_list(row: Any, server: FakeServer) -> None:
    """A block has one width, over all batches."""
    server.script(Reply(vectors={0: [1.0, 1.0], 1: [2.0, 2.0]}), Reply(vectors={0: row}))
    with pytest.raises(BatchError, match="text 3") as caught:
        hosted(server, batch_size=2, max_concurrency=1).embed(["a", "b", "a", "c"])
    (error,) = caught.value.errors.values()
    assert isinstance(error, EmbeddingShapeError)
    assert (list(caught.value.errors), error.index) == ([3], 3)
    assert list(caught.value.results) == [0, 1, 2]


def test_equal_texts_are_sent_once(server: FakeServer) -> None:
    """Ten copies of a text cost what one costs, and each gets its row."""
    block = hosted(server).embed(["a", "b", "a", "a", "c", "b"])
    assert batches(server) == [["a", "b", "c"]]
    assert block.tolist() == [list(server.vector(letter)) for letter in "abaacb"]


def test_batches_have_the_size_asked_for_and_keep_the_order(server: FakeServer) -> None:
    """A provider's limit of texts per request is kept to."""
    block = hosted(server, batch_size=3).embed(LETTERS)
    assert sorted(batches(server)) == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]
    assert block.tolist() == [list(server.vector(letter)) for letter in LETTERS]


def test_no_texts_make_no_request(server: FakeServer) -> None:
    """Nothing to do is no error and costs nothing."""
    assert (hosted(server).embed([]).shape, server.requests) == ((0, 0), ())


def test_batches_in_flight_are_bounded(server: FakeServer) -> None:
    """Three batches are held at the server at once, and never a fourth beside them."""
    embedder = hosted(server, batch_size=1, max_concurrency=3)
    with ThreadPoolExecutor(1) as pool:
        with server.hold():
            block = pool.submit(embedder.embed, LETTERS)
            server.wait_for_requests(3, timeout_s=20)
        assert block.result(20).shape == (8, 4)
    assert (len(server.requests), server.max_in_flight) == (8, 3)


@awaited
async def test_awaited_batches_in_flight_are_bounded(server: FakeServer) -> None:
    """Likewise as tasks of an event loop."""
    embedder = hosted(server, batch_size=1, max_concurrency=3)
    blocks: list[dspy.EmbeddingMatrix] = []

    async def embed() -> None:
        blocks.append(await embedder.aembed(LETTERS))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            with server.hold():
                group.start_soon(embed)
                await anyio.to_thread.run_sync(server.wait_for_requests, 3)
    assert blocks[0].shape == (8, 4)
    assert (len(server.requests), server.max_in_flight) == (8, 3)


def test_failed_batch_is_sent_again_alone(server: FakeServer) -> None:
    """What succeeded is not paid for twice."""
    server.script_for(holds("c"), Reply(status=503), Reply(status=429))
    with FakeClock() as clock:
        block = hosted(server, batch_size=2, num_retries=2).embed(LETTERS)
    assert sorted(batches(server)) == [["a", "b"], *[["c", "d"]] * 3, ["e", "f"], ["g", "h"]]
    assert len(clock.sleeps) == 2
    assert block.tolist() == [list(server.vector(letter)) for letter in LETTERS]


@awaited
async def test_awaited_failed_batch_is_sent_again_alone(server: FakeServer) -> None:
    """Likewise on an event loop."""
    server.script_for(holds("c"), Reply(status=503), Reply(status=429))
    with FakeClock() as clock:
        await hosted(server, batch_size=2, num_retries=2).aembed(LETTERS)
    assert sorted(batches(server)) == [["a", "b"], *[["c", "d"]] * 3, ["e", "f"], ["g", "h"]]
    assert len(clock.sleeps) == 2


def test_batch_that_fails_for_good_fails_the_call(server: FakeServer) -> None:
    """Vectors with holes would be worse than an error."""
    server.script(Reply(status=429, headers={"retry-after": "3600"}))
    with pytest.raises(LMRateLimitError) as caught:
        hosted(server, num_retries=3).embed(["a"])
    assert caught.value.retry_after_s == 3600


def test_usage_is_the_servers_count_over_all_batches(server: FakeServer) -> None:
    """Embeddings cost tokens too; failed attempts do not count."""
    server.script(Reply(status=503))
    embedder = hosted(server, batch_size=2, num_retries=1, max_concurrency=1)
    with FakeClock(), dspy.track_usage() as tracker:
        embedder.embed(["one two", "three", "four five six"])
    counted = [request.usage["prompt_tokens"] for request in server.requests if request.usage]
    assert tracker.by_model["openai/m"].prompt_tokens == sum(counted) == 6  # type: ignore[arg-type]
    assert tracker.total.calls == len(counted) == 2


def test_parameters_key_and_headers_arrive(server: FakeServer) -> None:
    """What is given to the embedder is in every request."""
    embedder = hosted(server, dimensions=2, extra_headers={"x-tenant": "t-1"})
    assert embedder.embed(["a"]).shape == (1, 2)
    (request,) = server.requests
    assert (request.api_key, request.headers["x-tenant"]) == (KEY, "t-1")
    assert request.json["dimensions"] == 2


TWINS = {"pickle": lambda e: pickle.loads(pickle.dumps(e)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
def test_twin_of_a_used_embedder_asks_the_same_endpoint(twin_of: Any, server: FakeServer) -> None:
    """A worker that silently asked the default endpoint with another key was seen elsewhere."""
    embedder = hosted(server, batch_size=2, max_concurrency=1, extra_headers={"x-tenant": "t-1"})
    embedder.embed(["a", "b", "c"])
    twin_of(embedder).embed(["a", "b", "c"])
    seen = [(r.api_key, r.headers["x-tenant"], r.json) for r in server.requests]
    assert seen[:2] == seen[2:]


def test_repr_shows_no_secret(server: FakeServer) -> None:
    """It ends up in logs like any other."""
    assert repr(hosted(server)) == "Embedder('openai/m', batch_size=200)"


# --- Functions ---------------------------------------------------------------------------------


def lengths(texts: list[str], factor: float = 1.0) -> list[list[float]]:
    """Embed each text as its length."""
    return [[len(text) * factor] for text in texts]


async def alengths(texts: list[str]) -> list[list[float]]:
    await anyio.lowlevel.checkpoint()
    return lengths(texts)


class Lengths:
    """A callable object with an async call."""

    async def __call__(self, texts: list[str]) -> list[list[float]]:
        return await alengths(texts)


FORMS = {"sync": lengths, "async": alengths, "async object": Lengths()}
each_form = pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)


@each_form
def test_function_is_called_from_sync_code(function: Any) -> None:
    """A plain script may use an async client's function."""
    embedder = dspy.Embedder(function, batch_size=2)
    assert embedder.embed(["a", "bb", "ccc"]).tolist() == [[1], [2], [3]]


@each_form
async def test_function_is_called_from_async_code(function: Any) -> None:
    """An event loop may use a blocking function, without being blocked."""
    embedder = dspy.Embedder(function, batch_size=2)
    assert (await embedder.aembed(["a", "bb", "ccc"])).tolist() == [[1], [2], [3]]


async def test_blocking_function_runs_beside_the_loop() -> None:
    """The function waits for something that only the loop can do."""
    called_by_loop = threading.Event()

    def blocking(texts: list[str]) -> list[list[float]]:
        assert called_by_loop.wait(10)
        return lengths(texts)

    async with anyio.create_task_group() as group:
        group.start_soon(dspy.Embedder(blocking).aembed, ["a"])
        await anyio.lowlevel.checkpoint()
        called_by_loop.set()


def test_function_gets_the_keywords_of_the_embedder() -> None:
    """A local model's options belong to the embedder."""
    assert dspy.Embedder(lengths, factor=2.0).embed(["aa"]).tolist() == [[4]]


def test_function_sees_the_callers_context() -> None:
    """Batches run on threads of their own, under the settings of the caller."""
    seen: list[int] = []

    def noting(texts: list[str]) -> list[list[float]]:
        seen.append(dspy.settings.num_threads)
        return lengths(texts)

    with dspy.context(num_threads=3):
        dspy.Embedder(noting, batch_size=1).embed(LETTERS)
    assert seen == [3] * 8


def test_function_may_return_an_array() -> None:
    """Local models return numpy."""
    made = dspy.Embedder(lambda texts: np.array(lengths(texts), dtype=np.float64))
    assert made.embed(["a", "bb"]).tolist() == [[1], [2]]


@pytest.mark.parametrize("made", [[], [[1.0]], [[1.0]] * 3, None, 5], ids=repr)
def test_function_with_a_wrong_number_of_rows_is_an_error(made: Any) -> None:
    """A function is checked like a server."""
    with pytest.raises(EmbeddingShapeError):
        dspy.Embedder(lambda texts: made).embed(["a", "b"])


def test_failure_of_the_function_is_raised_as_it_is() -> None:
    """A user's own exception is theirs; it is neither wrapped nor retried."""
    calls: list[list[str]] = []

    def broken(texts: list[str]) -> Any:
        calls.append(texts)
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        dspy.Embedder(broken).embed(["a"])
    assert calls == [["a"]]


async def test_failed_batch_cancels_the_others() -> None:
    """Once the call has failed, no further batch is paid for."""
    calls: list[list[str]] = []

    async def broken(texts: list[str]) -> Any:
        calls.append(texts)
        raise LMServerError("down")

    with pytest.raises(LMServerError):
        await dspy.Embedder(broken, batch_size=1, max_concurrency=1).aembed(LETTERS)
    assert calls == [["a"]]


# --- Offline, and numpy ------------------------------------------------------------------------


def test_offline_vectors_depend_on_the_text_alone() -> None:
    """Two embedders, two batch sizes, two orders: one vector per text, of length 1."""
    one = dspy.Embedder("offline/hashing").embed(["a cat", "a dog"])
    other = dspy.Embedder("offline/hashing", batch_size=1).embed(["a dog", "a cat"])
    assert one.tolist() == other[::-1].tolist()
    assert one.shape == (2, 512)
    assert one[0].tolist() != one[1].tolist()
    assert math.hypot(*one[0]) == pytest.approx(1)


async def test_offline_vectors_are_the_same_when_awaited() -> None:
    """Sync and async code may share what they stored."""
    embedder = dspy.Embedder("offline/hashing", dimensions=32)
    assert await embedder.aembed(["a cat"]) == embedder.embed(["a cat"])


async def test_call_gives_a_numpy_array() -> None:
    """DSPy's call: a matrix for texts, a vector for one text, also when awaited."""
    embedder = dspy.Embedder("offline/hashing", dimensions=16)
    matrix, vector = embedder(["a cat", "a dog"]), embedder("a cat")
    assert (matrix.dtype, matrix.shape, vector.shape) == (np.float32, (2, 16), (16,))
    assert (await embedder.acall(["a cat", "a dog"])).tolist() == matrix.tolist()
    assert (await embedder.acall("a cat")).tolist() == vector.tolist() == matrix[0].tolist()


def test_numpy_is_needed_by_the_call_only() -> None:
    """Without the extra the block works, and the call says what to install."""
    code = """
import sys
sys.modules["numpy"] = None  # an import of it fails now
import dspylite as dspy
calls = []
embedder = dspy.Embedder(lambda texts: calls.append(1) or [[1.0, 2.0] for _ in texts])
print(embedder.embed(["a", "b"]).shape)
try:
    embedder(["a"])
except dspy.MissingExtraError as error:
    print(error, len(calls))
"""
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, cwd=ROOT, text=True, timeout=30)
    shape, told = out.splitlines()
    assert shape == "(2, 2)"
    assert "pip install dspylite[numpy]" in told
    assert "embedder.embed(texts)" in told
    assert told.endswith(" 1")  # nothing was paid for what cannot be given


# --- Mistakes ----------------------------------------------------------------------------------


def test_iterator_of_texts_is_read_once() -> None:
    """A generator must not end in a block without rows."""
    block = dspy.Embedder(lengths).embed(text for text in ["a", "bb", "a"])  # type: ignore[arg-type]
    assert block.tolist() == [[1], [2], [1]]


@pytest.mark.parametrize("texts", ["one text", None, 5, {"a"}, {"a": "b"}], ids=repr)
def test_texts_that_are_no_list_are_refused(texts: Any) -> None:
    """A string would be embedded letter by letter, a set in an order that nobody knows."""
    with pytest.raises(InputFieldError, match="takes a list of texts"):
        dspy.Embedder(lengths).embed(texts)


@pytest.mark.parametrize("bad", [None, 5, b"c", ["c"]], ids=repr)
def test_text_that_is_no_string_is_refused_with_its_index(bad: Any) -> None:
    """An empty cell of a table is a frequent cause, and nothing is sent before it is found."""
    calls: list[Any] = []
    with pytest.raises(InputFieldError, match="Text 2 is not a string"):
        dspy.Embedder(calls.append, batch_size=1).embed(["a", "b", bad])
    assert calls == []


MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no name": (("",), {}, "`model` must be a name"),
    "no model": ((None,), {}, "`model` must be a name"),
    "unknown offline model": (("offline/bert",), {}, "is the only offline embedder"),
    "offline with a key": (("offline/hashing",), {"api_key": "k"}, "takes no ['api_key']"),
    "no dimensions": (
        ("offline/hashing",),
        {"dimensions": 0},
        "`dimensions` must be a whole number of at least 1",
    ),
    "no batch": (
        ("openai/m",),
        {"batch_size": 0},
        "`batch_size` must be a whole number of at least 1",
    ),
    "flag as batch": (
        ("openai/m",),
        {"batch_size": True},
        "`batch_size` must be a whole number of at least 1",
    ),
    "no batches": (
        ("openai/m",),
        {"max_concurrency": 0},
        "`max_concurrency` must be a whole number of at least 1",
    ),
    "negative retries": (("openai/m",), {"num_retries": -1}, "`num_retries` must be 0 or more"),
    "retries of a function": ((lengths,), {"num_retries": 2}, "`num_retries` is a policy"),
    "rate of a function": ((lengths,), {"rpm": 60}, "`rpm` is a policy around requests"),
    "rate of hashing": (("offline/hashing",), {"rpm": 60}, "`rpm` is a policy around requests"),
    "a fallback": (("openai/m",), {"fallbacks": [dspy.LM("openai/n")]}, "takes no `fallbacks`"),
    "cache_id of a model": (("openai/m",), {"cache_id": "1"}, "`cache_id` names a function"),
    "unknown overflow": (("openai/m",), {"overflow": "cut"}, "error, truncate, pool, not 'cut'"),
    "no room": (
        ("openai/m",),
        {"max_tokens": 4, "instruction": "far too long an instruction for that: "},
        "leaves no room",
    ),
    "no room behind the one with more tokens": (
        ("openai/m",),
        {"max_tokens": 8, "instruction": "\U0001f600\U0001f600", "query_instruction": "some words"},
        "leaves no room",
    ),
    "instruction that is none": (("openai/m",), {"instruction": 5}, "`instruction` must be a text"),
    "bad URL": (("openai/m",), {"api_base": "localhost:8000"}, "`api_base` must be a URL"),
    "no time": (("openai/m",), {"timeout": 0}, "`timeout` must be a number of more than 0"),
}


@pytest.mark.parametrize(("arguments", "options", "told"), MISTAKES.values(), ids=MISTAKES)
def test_impossible_parameter_is_refused_when_made(
    arguments: tuple[Any, ...], options: dict[str, Any], told: str
) -> None:
    """The traceback points at the line with the mistake."""
    with pytest.raises(LMConfigurationError) as caught:
        dspy.Embedder(*arguments, **options)
    assert told in str(caught.value)
