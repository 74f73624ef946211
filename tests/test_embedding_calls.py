"""One call of an embedder when something happens: what is kept, sent in parts, counted, given up.

Not here: what servers get wrong in an answer (`test_embedding_traps.py`), and plain calls
(`test_embedder.py`).
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import tokenizers

import dspylite as dspy
from dspylite.errors import (
    BatchError,
    BudgetExceededError,
    DeadlineExceededError,
    LMAuthError,
    LMInvalidRequestError,
    LMServerError,
    OverloadedError,
)
from dspylite.runtime.cancellation import Cancellation
from dspylite.testing import FakeClock, FakeServer, RecordedRequest, Reply
from tests.caching import cache_in

LETTERS = list("abcdefgh")
POISON = "the text that breaks it"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(dimensions=4) as server:
        yield server


def hosted(server: FakeServer, model: str = "openai/m", **options: Any) -> dspy.Embedder:
    options = {"api_base": server.base_url, "api_key": "sk-1", "num_retries": 0, **options}
    return dspy.Embedder(model, **options)


def batches(server: FakeServer) -> list[list[str]]:
    return [inputs(request) for request in server.requests]


def inputs(request: RecordedRequest) -> list[str]:
    texts: Any = request.json["input"]
    return list(texts)


def vectors(server: FakeServer, texts: list[str]) -> list[list[float]]:
    return [list(server.vector(text)) for text in texts]


# --- Kept, each under its own text ---------------------------------------------------------------


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dspy.Cache]:
    with cache_in(tmp_path / "cache" if request.param == "disk" else None) as mine:
        yield mine


def forget_memory(cache: dspy.Cache) -> None:
    """Leave the vectors to the disk, where there is one."""
    if cache.disk_cache is not None:
        assert cache.flush(10)
        cache.reset_memory_cache()


def test_vectors_are_kept_by_text_and_not_by_batch(cache: dspy.Cache, server: FakeServer) -> None:
    """B 6.3: `[b, a]` after `[a, b]` makes no call, and a new text is sent alone."""
    embedder = hosted(server)
    embedder.embed(["a", "b"])
    forget_memory(cache)
    assert embedder.embed(["b", "a"]).tolist() == vectors(server, ["b", "a"])
    assert embedder.embed(["c", "b", "a"]).tolist() == vectors(server, ["c", "b", "a"])
    assert batches(server) == [["a", "b"], ["c"]]


async def test_sync_and_async_share_what_is_kept(server: FakeServer) -> None:
    """B 5.3: one key for both."""
    with cache_in(None):
        await anyio.to_thread.run_sync(hosted(server).embed, LETTERS)
        block = await hosted(server).aembed(LETTERS)
    assert (block.tolist(), len(server.requests)) == (vectors(server, LETTERS), 1)


DIFFERENCES: dict[str, dict[str, Any]] = {
    "model": {"model": "openai/other"},
    "key": {"api_key": "sk-2"},
    "dimensions": {"dimensions": 2},
    "parameter": {"user": "u"},
    "instruction": {"instruction": "passage: "},
    "endpoint": {"api_base": "http://127.0.0.1:1/v1"},
    "header": {"extra_headers": {"x-tenant": "t"}},
}


@pytest.mark.parametrize("changes", DIFFERENCES.values(), ids=DIFFERENCES)
def test_whatever_may_change_a_vector_is_part_of_its_key(
    changes: dict[str, Any], server: FakeServer
) -> None:
    """B 6.3: model 2 was served model 1's vectors elsewhere, also in a later process."""
    with cache_in(None) as cache:
        hosted(server).embed(["a"])
        misses = cache.stats().misses
        other = hosted(server).copy(**changes)
        if "api_base" in changes:
            with pytest.raises(dspy.LMError):
                other.embed(["a"])
        else:
            other.embed(["a"])
            assert len(server.requests) == 2
        assert cache.stats().misses == misses + 1


def test_a_query_and_a_document_of_the_same_text_are_two_texts(server: FakeServer) -> None:
    """B 6.5: `query_instruction` stands before queries, `instruction` before documents."""
    embedder = hosted(server, instruction="passage: ", query_instruction="query: ")
    with cache_in(None):
        document = embedder.embed(["a"])
        query = embedder.embed(["a"], query=True)
    assert batches(server) == [["passage: a"], ["query: a"]]
    assert (document.tolist(), query.tolist()) == (
        vectors(server, ["passage: a"]),
        vectors(server, ["query: a"]),
    )


def test_a_retriever_asks_with_the_query_instruction(server: FakeServer) -> None:
    """B 6.5, 6.8: passages and queries are told apart where the model wants it."""
    embedder = hosted(server, instruction="passage: ", query_instruction="query: ")
    search = dspy.Embeddings(["a", "b"], embedder, k=1)
    search("a")
    assert batches(server) == [["passage: a", "passage: b"], ["query: a"]]


def test_functions_are_kept_under_a_cache_id_only() -> None:
    """B 6.3: two functions of one name gave each other's vectors elsewhere."""
    calls: list[list[str]] = []

    def ones(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        return [[1.0] for _ in texts]

    def twos(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        return [[2.0] for _ in texts]

    twos.__name__, twos.__qualname__ = ones.__name__, ones.__qualname__
    with cache_in(None):
        for function in (ones, twos, ones):
            dspy.Embedder(function).embed(["a"])
        assert calls == [["a"]] * 3
        first = dspy.Embedder(ones, cache_id="ones-1").embed(["a"])
        again = dspy.Embedder(ones, cache_id="ones-1").embed(["a"])
        other = dspy.Embedder(twos, cache_id="twos-1").embed(["a"])
    assert (first.tolist(), again.tolist(), other.tolist()) == ([[1]], [[1]], [[2]])
    assert len(calls) == 5


def test_caching_can_be_turned_off(server: FakeServer) -> None:
    """For the embedder, and for one call in DSPy's way."""
    with cache_in(None):
        hosted(server, caching=False).embed(["a"])
        embedder = hosted(server)
        embedder(["a"], caching=False)
        embedder(["a"])
        embedder(["a"])
    assert len(server.requests) == 3


def test_what_the_user_changes_changes_nothing_that_is_kept(server: FakeServer) -> None:
    """B 1.7: blocks are the caller's own."""
    with cache_in(None):
        block = hosted(server).embed(["a"])
        block[0][0] = 7.0
        assert hosted(server).embed(["a"]).tolist() == vectors(server, ["a"])


def test_nothing_of_a_key_is_in_the_cache(tmp_path: Path, server: FakeServer) -> None:
    """B 5.3: only a salted fingerprint is."""
    secret = "sk-secret-of-the-embedder-123456"
    with cache_in(tmp_path) as cache:
        hosted(server, api_key=secret).embed(["a"])
        assert cache.flush(10)
    assert any(secret.encode() not in file.read_bytes() for file in tmp_path.rglob("*.db"))
    assert not any(secret.encode() in file.read_bytes() for file in tmp_path.rglob("*.*"))


OTHER_PROCESS = """
import sys, dspylite as dspy
dspy.configure_cache(disk_cache_dir=sys.argv[2])
embedder = dspy.Embedder("openai/m", api_base=sys.argv[1], api_key="sk-1", num_retries=0)
print(embedder.embed(["b", "a"]).tolist())
"""


def test_another_process_finds_what_this_one_kept(tmp_path: Path, server: FakeServer) -> None:
    """B 5.3: the salt is the directory's, and so the key is the same."""
    with cache_in(tmp_path) as cache:
        hosted(server).embed(["a", "b"])
        assert cache.flush(10)
    told = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, server.base_url, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(told.stdout) == vectors(server, ["b", "a"])
    assert len(server.requests) == 1


def test_vectors_kept_before_the_model_changed_are_forgotten(server: FakeServer) -> None:
    """A server that got another model under the same name: an error, and the next call is right."""
    server.script(Reply(vectors={0: [1.0, 2.0]}))
    with cache_in(None):
        hosted(server).embed(["a"])
        with pytest.raises(BatchError, match="the model has changed"):
            hosted(server).embed(["a", "b"])
        assert hosted(server).embed(["a", "b"]).tolist() == vectors(server, ["a", "b"])


def test_a_call_that_needed_no_request_is_counted_as_cached(server: FakeServer) -> None:
    """B 4.10: itemised like an LM's."""
    with cache_in(None), dspy.track_usage() as tracker:
        for _ in range(3):
            hosted(server).embed(["one two", "three"])
    counts = tracker.counts["openai/m"]
    assert (counts.answered, counts.cached) == (1, 2)
    assert tracker.total.prompt_tokens == 3


# --- A batch that one text breaks ----------------------------------------------------------------


def poisoned(status: int, is_poison: Callable[[str], bool] = POISON.__eq__) -> FakeServer:
    """Make a server that refuses every batch with such a text in it."""

    def answer(body: Mapping[str, Any]) -> Reply:
        return Reply(status=status if any(map(is_poison, body["input"])) else 200)

    return FakeServer(answer=answer, dimensions=4)


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_one_poison_text_costs_its_neighbours_nothing(status: int) -> None:
    """B 9D, B 6.2: 100 texts in one batch, one of which the server cannot take."""
    texts = [f"text {number}" for number in range(100)]
    texts[37] = POISON
    with poisoned(status) as server:
        with pytest.raises(BatchError) as caught:
            hosted(server).embed(texts)
        made = caught.value
        assert (list(made.errors), made.untried) == ([37], 0)
        assert isinstance(
            made.errors[37], LMServerError if status == 500 else LMInvalidRequestError
        )
        assert made.errors[37] is made.__cause__
        assert {place: list(row) for place, row in made.results.items()} == {
            place: list(server.vector(text)) for place, text in enumerate(texts) if text != POISON
        }
        # Halves of 100 down to one text: seven levels, two requests on each.
        assert len(server.requests) <= 15


async def test_poison_is_found_on_an_event_loop_too() -> None:
    """The same body serves both."""
    with poisoned(400) as server, pytest.raises(BatchError) as caught:
        await hosted(server).aembed(["a", POISON, "b"])
    assert (list(caught.value.errors), list(caught.value.results)) == ([1], [0, 2])


def test_several_poison_texts_in_several_batches_are_found() -> None:
    """Each costs itself."""
    texts = [f"text {number}" for number in range(64)]
    poison = {texts[3], texts[4], texts[50]}
    with poisoned(400, poison.__contains__) as server, pytest.raises(BatchError) as caught:
        hosted(server, batch_size=16, max_concurrency=1).embed(texts)
    assert list(caught.value.errors) == [3, 4, 50]
    assert len(caught.value.results) == 61


@pytest.mark.parametrize(
    "poison",
    [range(5), range(100), range(195, 200), range(100, 200), range(0, 200, 5), range(99, 101)],
    ids=["head", "first half", "tail", "second half", "every fifth", "middle"],
)
def test_neighbouring_poison_texts_cost_the_others_nothing(poison: range) -> None:
    """B 9D: the empty lines of a table stand together, and often at its beginning."""
    texts = [f"text {number}" for number in range(200)]
    bad = {texts[number] for number in poison}
    with poisoned(400, bad.__contains__) as server, pytest.raises(BatchError) as caught:
        hosted(server).embed(texts)
    assert sorted(caught.value.errors) == list(poison)
    assert len(caught.value.results) == 200 - len(poison)


def test_half_a_surrogate_pair_is_found_without_sending_it(server: FakeServer) -> None:
    """B 4.13: it can be in no request; the other texts can."""
    with pytest.raises(BatchError) as caught:
        hosted(server).embed(["a", "b \ud800", "c"])
    assert (list(caught.value.errors), list(caught.value.results)) == ([1], [0, 2])
    assert isinstance(caught.value.errors[1], LMInvalidRequestError)
    assert sorted(text for batch in batches(server) for text in batch) == ["a", "c"]


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_refuses_everything_is_not_asked_for_each_text(status: int) -> None:
    """A wrong parameter breaks every batch: a few requests show it, and the rest is not sent."""
    with FakeServer(answer=lambda _: Reply(status=status)) as server:
        kind = LMServerError if status == 500 else LMInvalidRequestError
        with pytest.raises(kind):
            hosted(server, batch_size=100, max_concurrency=1).embed(
                [f"text {number}" for number in range(1000)]
            )
        assert len(server.requests) == 13


def test_a_function_is_not_called_with_parts_of_a_batch() -> None:
    """What a user's function raises is theirs; other batches are still made."""
    calls: list[list[str]] = []

    def picky(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        if "c" in texts:
            raise ZeroDivisionError("a bug")
        return [[1.0] for _ in texts]

    with pytest.raises(BatchError) as caught:
        dspy.Embedder(picky, batch_size=2).embed(LETTERS)
    assert (list(caught.value.errors), calls) == (
        [2, 3],
        [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]],
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# --- Failures of the endpoint --------------------------------------------------------------------


def test_what_succeeded_survives_and_no_further_batch_is_sent(server: FakeServer) -> None:
    """B 6.2: a key that is revoked in the middle: results so far, and no request in vain."""
    server.script(Reply(), Reply(status=401))
    with pytest.raises(BatchError) as caught:
        hosted(server, batch_size=2, max_concurrency=1).embed(LETTERS)
    made = caught.value
    assert {place: list(row) for place, row in made.results.items()} == {
        0: list(server.vector("a")),
        1: list(server.vector("b")),
    }
    assert (list(made.errors), made.untried, len(server.requests)) == ([2, 3], 4, 2)
    assert isinstance(made.__cause__, LMAuthError)
    assert "4 were never sent" in str(made)


def test_what_is_missing_can_be_asked_for_again(server: FakeServer) -> None:
    """The next call sends what has no vector yet, and nothing else."""
    server.script(Reply(), Reply(status=401))
    embedder = hosted(server, batch_size=2, max_concurrency=1)
    with cache_in(None):
        with pytest.raises(BatchError):
            embedder.embed(LETTERS)
        assert embedder.embed(LETTERS).tolist() == vectors(server, LETTERS)
    assert batches(server)[2:] == [["c", "d"], ["e", "f"], ["g", "h"]]


def test_the_error_of_a_batch_keeps_everything_through_pickle(server: FakeServer) -> None:
    """B 7.1: results, errors and what was never sent."""
    server.script(Reply(), Reply(status=401))
    with pytest.raises(BatchError) as caught:
        hosted(server, batch_size=2, max_concurrency=1).embed(LETTERS)
    twin = pickle.loads(pickle.dumps(caught.value))
    assert twin.results == caught.value.results
    assert all(isinstance(row, array) for row in twin.results.values())
    assert (list(twin.errors), twin.untried, str(twin)) == ([2, 3], 4, str(caught.value))


def test_overload_is_waited_out(server: FakeServer) -> None:
    """B 4.12: without `num_retries` an embedder is as patient as an LM."""
    server.script(*[Reply(status=503)] * 6)
    with FakeClock():
        block = hosted(server, num_retries=None).embed(["a"])
    assert (block.tolist(), len(server.requests)) == (vectors(server, ["a"]), 7)


def test_a_deadline_keeps_what_is_there(server: FakeServer) -> None:
    """B 4.4: the call ends in time, with the vectors that came before."""
    server.script(Reply(), Reply(hang=True))
    embedder = hosted(server, batch_size=2, max_concurrency=1, deadline_s=0.5)
    with pytest.raises(BatchError) as caught:
        embedder.embed(LETTERS)
    assert isinstance(caught.value.__cause__, DeadlineExceededError)
    assert (list(caught.value.results), caught.value.untried) == ([0, 1], 4)


async def embed_awaited(embedder: dspy.Embedder) -> Any:
    return await embedder.aembed(LETTERS)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("limit", [None, 1])
def test_a_deadline_ends_a_call_whose_function_hangs(limit: int | None, *, is_async: bool) -> None:
    """B 4.4: also a function that cannot be told to hurry, and with the vectors of its others."""
    goes_on = threading.Event()
    calls: list[str] = []

    def hanging(texts: list[str]) -> list[list[float]]:
        calls.extend(texts)
        if "b" in texts:
            goes_on.wait(30)
        return [[1.0] for _ in texts]

    embedder = dspy.Embedder(hanging, batch_size=1, deadline_s=0.5, max_concurrency=limit)
    call = partial(anyio.run, embed_awaited, embedder) if is_async else partial(embedder, LETTERS)
    try:
        with pytest.raises(BatchError) as caught:
            call()
    finally:
        goes_on.set()
    assert isinstance(caught.value.__cause__, DeadlineExceededError)
    assert (list(caught.value.results), caught.value.untried, calls) == ([0], 6, ["a", "b"])


def test_a_cancelled_call_sends_nothing_more(server: FakeServer) -> None:
    """B 3.2: the flag of whoever asked is seen between two batches."""
    with Cancellation() as flag, ThreadPoolExecutor(1) as pool, server.hold():
        embedder = hosted(server, batch_size=1, max_concurrency=1)
        running = pool.submit(dspy.bind(embedder.embed), LETTERS)
        server.wait_for_requests(1, timeout_s=20)
        flag.cancel("the client went away")
        with pytest.raises(dspy.CallCancelledError):
            running.result(20)
    assert len(server.requests) == 1


INTERRUPTED = """
import os, signal, threading
import dspylite as dspy
from dspylite.testing import FakeServer, Reply

with FakeServer(answer=lambda _: Reply(hang=True)) as server:
    embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key="k", batch_size=1)

    def interrupt():
        server.wait_for_requests(4, timeout_s=20)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        embedder.embed(list("abcdefgh"))
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_ctrl_c_ends_a_call_whose_server_hangs() -> None:
    """B 2.6: nobody waits for batches that are not wanted any more, nor does the process's end."""
    told = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=30, check=True
    )
    assert (told.stdout, told.stderr) == ("interrupted\n", "")


def test_embedders_and_lms_share_the_limits_of_an_endpoint(server: FakeServer) -> None:
    """B 4.5, B 6.2: with one key there is one server, whatever it is asked."""
    lm = dspy.LM(
        "openai/l", api_base=server.base_url, api_key="sk-1", max_concurrency=1, max_queue=0
    )
    embedder = hosted(server, max_concurrency=1, max_queue=0)
    with ThreadPoolExecutor(1) as pool, server.hold():
        held = pool.submit(embedder.embed, ["a"])
        server.wait_for_requests(1, timeout_s=20)
        with pytest.raises(OverloadedError):
            lm("hi")
        other = hosted(server, max_concurrency=1, max_queue=0, api_key="sk-2")
        apart = ThreadPoolExecutor(1)
        second = apart.submit(other.embed, ["a"])
        server.wait_for_requests(2, timeout_s=20)
    assert held.result(20).tolist() == second.result(20).tolist()
    apart.shutdown()


def test_the_limit_holds_over_all_calls_and_threads(server: FakeServer) -> None:
    """B 4.5: sixteen threads, eight batches each, three requests at once."""
    embedder = hosted(server, batch_size=1, max_concurrency=3)
    with ThreadPoolExecutor(16) as pool:
        for block in pool.map(embedder.embed, [LETTERS] * 16):
            assert block.shape == (8, 4)
    assert server.max_in_flight <= 3


def test_a_function_is_called_by_one_thread_at_a_time_where_that_is_said() -> None:
    """A model on one GPU: `max_concurrency=1` holds over all threads, too."""
    inside, most = 0, 0
    lock = threading.Lock()
    gate = threading.Barrier(4)

    def counting(texts: list[str]) -> list[list[float]]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        with lock:
            inside -= 1
        return [[1.0] for _ in texts]

    embedder = dspy.Embedder(counting, batch_size=1, max_concurrency=1)

    def work(_: int) -> None:
        gate.wait(10)
        embedder.embed(LETTERS)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == 1


LIMITED = {
    "a call of its own": lambda e: partial(e, batch_size=1),
    "copy": lambda e: e.copy(instruction="x").embed,
    "deepcopy": lambda e: copy.deepcopy(e).embed,
}


@pytest.mark.parametrize("of", LIMITED.values(), ids=LIMITED)
def test_copies_of_an_embedder_share_the_limit_of_its_function(of: Any) -> None:
    """DSPy's call with a `batch_size` of its own makes a copy, as deep-copied programs are one."""
    inside = threading.Semaphore(1)
    crossed: list[bool] = []
    met = threading.Event()
    gate = threading.Barrier(4)

    def function(texts: list[str]) -> list[list[float]]:
        is_free = inside.acquire(blocking=False)
        crossed.append(not is_free)
        if not is_free:
            met.set()
        met.wait(0.002)  # for another thread, which must not come
        if is_free:
            inside.release()
        return [[1.0] for _ in texts]

    embedder = dspy.Embedder(function, batch_size=1, max_concurrency=1)

    def work(_: int) -> None:
        call = of(embedder)
        gate.wait(10)
        call(LETTERS)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (len(crossed), any(crossed)) == (4 * 8, False)


async def test_a_cancelled_function_keeps_its_place_until_it_ends() -> None:
    """B 3.2: a thread cannot be broken off, and the next caller would be a second one inside."""
    began, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    calls: list[str] = []

    def function(texts: list[str]) -> list[list[float]]:
        calls.extend(texts)
        if texts == ["a"]:
            began.set()
            goes_on.wait(30)
            ended.set()
        else:
            assert ended.is_set()
        return [[1.0] for _ in texts]

    embedder = dspy.Embedder(function, max_concurrency=1)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(embedder.aembed, ["a"])
            assert await anyio.to_thread.run_sync(began.wait, 30)
            tasks.cancel_scope.cancel()
        with anyio.move_on_after(0.05):
            await embedder.aembed(["b"])
        assert calls == ["a"]
    finally:
        goes_on.set()
    assert (await embedder.aembed(["c"])).shape == (1, 1)


def test_an_unlimited_function_is_called_with_one_batch_after_the_other() -> None:
    """A local model need not be safe to call from several threads; DSPy does not either."""
    threads: set[int] = set()

    def noting(texts: list[str]) -> list[list[float]]:
        threads.add(threading.get_ident())
        return [[1.0] for _ in texts]

    dspy.Embedder(noting, batch_size=1).embed(LETTERS)
    assert threads == {threading.get_ident()}


def test_tokens_a_minute_count_what_is_read(server: FakeServer) -> None:
    """B 4.5: an embedding has no answer, so nothing is set aside for one."""
    embedder = hosted(server, tpm=20, deadline_s=1)
    embedder.embed(["x " * 10])  # 5 tokens by the guess, 10 by the server's count
    embedder.embed(["y " * 10])
    with pytest.raises(DeadlineExceededError):
        embedder.embed(["z " * 10])
    assert len(server.requests) == 2


def test_middleware_sees_every_batch(server: FakeServer) -> None:
    """A policy of the user's stands around embeddings as around answers."""
    seen: list[int] = []

    class Counting:
        async def handle(self, request: Any, call_next: Any, io: Any) -> Any:
            seen.append(len(request.messages))
            return await call_next(request)

    hosted(server, batch_size=3, max_concurrency=1, middleware=[Counting()]).embed(LETTERS)
    assert seen == [3, 3, 2]


# --- Counted -------------------------------------------------------------------------------------


def test_a_budget_of_tokens_ends_a_call_and_keeps_what_is_there(server: FakeServer) -> None:
    """B 4.8: checked before each request, embeddings included."""
    embedder = hosted(server, batch_size=1, max_concurrency=1)
    with dspy.budget(tokens=4) as spending, pytest.raises(BatchError) as caught:
        embedder.embed(["one two", "three four", "five six"])
    assert isinstance(caught.value.__cause__, BudgetExceededError)
    assert (list(caught.value.results), spending.tokens_spent) == ([0, 1], 4)


def test_a_budget_of_money_knows_the_price(server: FakeServer) -> None:
    """B 4.8: the embedder's own price, in dollars for a million tokens."""
    with dspy.budget(usd=1) as spending, dspy.track_usage() as tracker:
        hosted(server, price=20).embed(["one two"])
    assert spending.usd_spent == pytest.approx(40e-6)
    assert tracker.cost_usd == pytest.approx(40e-6)


def test_progress_is_told_after_each_batch(server: FakeServer) -> None:
    """Different texts, of how many, and how many failed."""
    server.script(Reply(), Reply(status=422))
    told: list[tuple[int, int | None, int]] = []
    embedder = hosted(server, batch_size=1, max_concurrency=1)
    with pytest.raises(BatchError):
        embedder.embed(["a", "b", "a", "c"], progress=lambda *state: told.append(state))
    assert told == [(1, 3, 0), (2, 3, 1), (3, 3, 1)]


def test_progress_counts_texts_that_are_too_long_to_be_sent(server: FakeServer) -> None:
    """They have ended, too: a bar that stops short looks like a hang."""
    told: list[tuple[int, int | None, int]] = []
    embedder = hosted(server, max_tokens=8)
    with pytest.raises(BatchError):
        embedder.embed(["a", "b" * 100, "c"], progress=lambda *state: told.append(state))
    assert told == [(1, 3, 1), (3, 3, 1)]


def test_a_progress_callback_that_fails_harms_nothing(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken display is a line in the log."""

    def broken(done: int, total: int | None, errors: int) -> None:
        raise ZeroDivisionError

    assert hosted(server).embed(["a"], progress=broken).shape == (1, 4)
    assert "progress callback failed" in caplog.text


def test_a_relative_path_of_a_tokenizer_is_the_file_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B 7.2: the worker that unpickles it may stand in another folder."""
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, "?")).save(str(tmp_path / "t.json"))
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(dspy.Embedder("offline/hashing", tokenizer="t.json"))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).split("a b", 2) == ["a b"]


# --- Batches -------------------------------------------------------------------------------------


def test_batches_are_split_by_tokens_too(server: FakeServer) -> None:
    """B 6.2: a provider's limit of tokens in a request is kept to; a longer text goes alone."""
    texts = ["x " * 40, "y " * 40, "z " * 40, "w " * 400, "v"]
    hosted(server, max_batch_tokens=100, max_concurrency=1).embed(texts)
    assert [len(batch) for batch in batches(server)] == [2, 1, 1, 1]


def test_copies_change_one_thing_and_keep_the_rest(server: FakeServer) -> None:
    """A template for tenants: another key, the same endpoint and policies."""
    template = hosted(server, batch_size=2, max_concurrency=1, instruction="p: ", rpm=1000)
    twin = template.copy(api_key="sk-2", batch_size=3)
    twin.embed(["a", "b", "c"])
    (request,) = server.requests
    assert (request.api_key, inputs(request)) == ("sk-2", ["p: a", "p: b", "p: c"])
    assert (template.batch_size, template.kwargs["api_key"]) == (2, "sk-1")
    assert (twin.max_concurrency, twin.policies.rpm) == (1, 1000)


def test_a_change_to_none_takes_a_parameter_away() -> None:
    """It is then what it is where nobody gives it."""
    made = dspy.Embedder("openai/m", **{n: v for n, v in FIELDS.items() if n != "engine"})
    plain = dspy.Embedder("openai/m")
    bare = made.copy(**dict.fromkeys(FIELDS, None))
    state, usual = dict(vars(bare)), dict(vars(plain))
    state.pop("_plan"), usual.pop("_plan")
    assert state == usual


FORKED = """
import os, sys, threading
import dspylite as dspy

dspy.configure_cache(enable_disk_cache=False)
embedder = dspy.Embedder("openai/m", api_base=sys.argv[1], api_key="k", batch_size=1)
alone = embedder.copy(caching=False)
busy = [
    threading.Thread(target=embedder.embed, args=([str(n) for n in range(start, start + 50)],))
    for start in range(0, 400, 50)
]
for thread in busy:
    thread.start()
children = []
for child in range(4):
    pid = os.fork()
    if not pid:
        texts = [f"{child}-{n}" for n in range(20)]
        made = embedder.embed(texts).tolist()
        os._exit(made != [alone.embed([text]).tolist()[0] for text in texts])
    children.append(pid)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
for thread in busy:
    thread.join()
"""


def test_children_of_a_busy_parent_embed_for_themselves(server: FakeServer) -> None:
    """B 7.3: also where the parent is just loading what its first calls need; no vector is lost."""
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, server.base_url],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (told.stdout, told.stderr) == ("[0, 0, 0, 0]\n", "")


TWINS = {"pickle": lambda e: pickle.loads(pickle.dumps(e)), "deepcopy": copy.deepcopy}
FIELDS: dict[str, Any] = {
    "batch_size": 3,
    "caching": False,
    "max_concurrency": 2,
    "num_retries": 1,
    "engine": "litellm",
    "dimensions": 2,
    "matryoshka": True,
    "instruction": "p: ",
    "query_instruction": "q: ",
    "max_tokens": 9,
    "overflow": "truncate",
    "max_batch_tokens": 77,
    "price": 3.0,
    "rpm": 100,
    "timeout": 7,
    "extra_headers": {"x-tenant": "t"},
}


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
def test_no_parameter_is_lost_on_the_way(twin_of: Any, server: FakeServer) -> None:
    """B 7.2: every parameter is one of the twin's, after use."""
    made = hosted(server, **FIELDS)
    made.embed(["a"])
    twin = twin_of(made)
    state, own = dict(vars(twin)), dict(vars(made))
    state.pop("_plan"), own.pop("_plan")
    assert state == own
    assert len(pickle.dumps(made)) == len(pickle.dumps(hosted(server, **FIELDS)))
    twin.embed(["a"])
    first, second = server.requests
    assert (first.json, first.api_key, first.headers["x-tenant"]) == (
        second.json,
        second.api_key,
        second.headers["x-tenant"],
    )
