"""`Embeddings` and `EmbeddingsWithScores`: DSPy's results, from threads, tasks and processes.

Not here: the search among vectors (`test_search.py`) and the files (`test_saved_corpus.py`).
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import dspylite as dspy
from dspylite.errors import (
    EmbeddingShapeError,
    EmbeddingValueError,
    InputFieldError,
    LMConfigurationError,
    LMServerError,
)
from dspylite.models.retrieval.search import Rows
from dspylite.testing import FakeEmbedder, FakeServer, Reply
from tests.letters import CORPUS, letter_counts

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-key-of-this-test-0123456789"
LIMIT_S = 20

# What DSPy 3.4.1 with numpy 2.4.6 gave for CORPUS, letter_counts and k=4.
RIVER, OWLS, YEAR = (
    "Which river flows through Cologne?",
    "When do owls hunt?",
    "How long is a year?",
)
DSPYS: dict[bool, dict[str, tuple[list[int], list[float]]]] = {
    True: {
        RIVER: ([0, 1, 3, 2], [0.8909686803, 0.7142894268, 0.6864234209, 0.6778734922]),
        OWLS: ([0, 5, 3, 1], [0.8613637686, 0.8162328601, 0.7658942342, 0.7628081441]),
        YEAR: ([3, 4, 2, 0], [0.8300316334, 0.7858743072, 0.7719241977, 0.7171806693]),
    },
    False: {
        RIVER: ([0, 1, 3, 2], [59.84375, 58.59375, 48.96875, 38.34375]),
        OWLS: ([1, 0, 3, 2], [36.46875, 33.71875, 31.84375, 23.21875]),
        YEAR: ([3, 6, 1, 0], [32.84375, 31.71875, 29.46875, 26.71875]),
    },
}


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer(dimensions=4) as server:
        yield server


async def awaited_counts(texts: list[str]) -> list[list[float]]:
    await anyio.sleep(0)
    return letter_counts(texts)


def as_array(texts: list[str]) -> Any:
    return np.array(letter_counts(texts))


EMBEDDERS: dict[str, Any] = {
    "function": letter_counts,
    "async function": awaited_counts,
    "function giving an array": as_array,
    "embedder": dspy.Embedder(letter_counts, caching=False),
    "embedder of an async function": dspy.Embedder(awaited_counts, batch_size=2),
    "method": dspy.Embedder(letter_counts).embed,
    "partial": functools.partial(letter_counts),
}


# --- Results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedder", EMBEDDERS.values(), ids=EMBEDDERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_results_are_dspys(embedder: Any, normalize: bool) -> None:
    """(B 6.8) The same passages, places and scores, whatever embeds."""
    plain = dspy.Embeddings(corpus=CORPUS, embedder=embedder, k=4, normalize=normalize)
    scored = dspy.EmbeddingsWithScores(CORPUS, embedder, 4, None, False, 3, normalize)
    for query, (indices, scores) in DSPYS[normalize].items():
        found = scored(query)
        assert isinstance(found, dspy.Prediction)
        assert found.indices == indices
        assert found.passages == [CORPUS[index] for index in indices]
        assert found.scores == pytest.approx(scores, rel=1e-6)
        assert plain(query).toDict() == {"passages": found.passages, "indices": indices}
        assert plain.forward(query=query) == plain(query=query)


@pytest.mark.anyio
@pytest.mark.parametrize("embedder", EMBEDDERS.values(), ids=EMBEDDERS)
async def test_awaited_results_are_dspys(embedder: Any) -> None:
    """Made, asked and asked in a batch on an event loop."""
    search = await dspy.EmbeddingsWithScores.acreate(CORPUS, embedder, k=4)
    assert isinstance(search, dspy.EmbeddingsWithScores)
    for query, (indices, scores) in DSPYS[True].items():
        found = await search.acall(query)
        assert found.indices == indices
        assert found.scores == pytest.approx(scores, rel=1e-6)
    batch = await search.abatch([RIVER, YEAR])
    assert [found.indices for found in batch] == [DSPYS[True][q][0] for q in (RIVER, YEAR)]


def test_results_without_numpy_are_equal() -> None:
    """To the last bit, in a process that has no numpy."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import json, dspylite as dspy\n"
        "from tests.letters import CORPUS, letter_counts\n"
        "search = dspy.EmbeddingsWithScores(CORPUS, letter_counts, k=7)\n"
        f"print(json.dumps([search(q).toDict() for q in {list(DSPYS[True])!r}]))"
    )
    done = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60)
    search = dspy.EmbeddingsWithScores(CORPUS, letter_counts, k=7)
    assert json.loads(done) == [search(query).toDict() for query in DSPYS[True]]


def test_equal_passages_come_in_the_order_of_the_corpus() -> None:
    """The same question gives the same context, on any machine."""
    search = dspy.EmbeddingsWithScores(["b", "a", "b", "a", "a"], letter_counts, k=4)
    found = search("a")
    assert found.indices == [1, 3, 4, 0]
    assert found.scores[0] == found.scores[2] > found.scores[3]


def test_batch_embeds_all_queries_together_and_answers_in_order() -> None:
    """One request to the provider for many questions."""
    embedder = FakeEmbedder()
    search = dspy.Embeddings(CORPUS, embedder, k=2)
    batch = search.batch([RIVER, OWLS, RIVER])
    assert embedder.batches == [CORPUS, [RIVER, OWLS]]
    assert batch == [search(RIVER), search(OWLS), search(RIVER)]
    assert search.batch([]) == []


def test_search_over_http_asks_once_for_the_corpus_and_once_per_query(server: FakeServer) -> None:
    """The server's log is the judge; its order decides the ranking."""
    embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0)
    search = dspy.EmbeddingsWithScores(CORPUS, embedder, k=1)
    found = [search(passage) for passage in CORPUS]
    assert [each.passages for each in found] == [[passage] for passage in CORPUS]
    assert [each.scores for each in found] == [[pytest.approx(1.0)]] * len(CORPUS)
    assert [request.json["input"] for request in server.requests] == [
        CORPUS,
        *[[passage] for passage in CORPUS],
    ]


def test_failing_provider_is_the_callers_error(server: FakeServer) -> None:
    """An empty list of passages would look like an answer."""
    embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0)
    search = dspy.Embeddings(CORPUS, embedder)
    server.script(Reply(status=500))
    with pytest.raises(LMServerError):
        search(RIVER)
    assert len(search(RIVER).passages) == 5


# --- Edges ---------------------------------------------------------------------------------------


def test_fewer_passages_than_k_are_all_given() -> None:
    assert dspy.Embeddings(CORPUS, letter_counts, k=100)(OWLS).indices[:2] == [0, 5]
    assert len(dspy.Embeddings(CORPUS, letter_counts, k=100)(OWLS).indices) == len(CORPUS)


@pytest.mark.parametrize("make", [dspy.Embeddings, dspy.EmbeddingsWithScores])
def test_empty_corpus_gives_nothing_and_asks_nobody(make: Any) -> None:
    """Nor does a query then cost anything."""
    embedder = FakeEmbedder()
    found = make([], embedder)("anything")
    assert {tuple(values) for values in found.toDict().values()} == {()}
    assert embedder.batches == []


def test_corpus_may_be_any_iterable_and_is_copied() -> None:
    """What the caller does with its list later changes no result."""
    mine = list(CORPUS)
    search = dspy.Embeddings(mine, letter_counts, k=1)
    mine.clear()
    assert search(OWLS).passages == CORPUS[:1]
    assert search.corpus == CORPUS
    assert dspy.Embeddings(iter(CORPUS), letter_counts, k=1)(OWLS).passages == CORPUS[:1]


@pytest.mark.parametrize("corpus", ["one text", b"bytes", None, 5, ["a", None], ["a", 3], [["a"]]])
def test_corpus_that_is_no_list_of_strings_is_refused(corpus: Any) -> None:
    embedder = FakeEmbedder()
    with pytest.raises(InputFieldError, match=r"(?i)passage"):
        dspy.Embeddings(corpus, embedder)
    assert embedder.batches == []


@pytest.mark.parametrize("query", [None, 3, ["a"], b"a", {"query": "a"}])
def test_query_that_is_no_string_is_refused(query: Any) -> None:
    search = dspy.Embeddings(CORPUS, letter_counts)
    with pytest.raises(InputFieldError, match="not a string"):
        search(query)


def test_one_string_is_no_batch() -> None:
    """Else each of its letters would be a query."""
    with pytest.raises(InputFieldError, match="list of strings"):
        dspy.Embeddings(CORPUS, letter_counts).batch("abc")


def test_empty_query_is_a_query_like_any_other() -> None:
    """Whether it makes sense, the embedder knows."""
    assert len(dspy.Embeddings(CORPUS, dspy.Embedder("offline/hashing"), k=2)("").passages) == 2


@pytest.mark.parametrize("k", [0, -1, 2.5, "3", True, None])
def test_k_that_cannot_work_is_refused_when_given(k: Any) -> None:
    """Zero gave everything and minus one nearly everything elsewhere."""
    with pytest.raises(LMConfigurationError, match="`k`"):
        dspy.Embeddings(CORPUS, letter_counts, k=k)
    search = dspy.Embeddings(CORPUS, letter_counts)
    with pytest.raises(LMConfigurationError, match="`k`"):
        search.k = k
    assert search.k == 5


def test_k_and_embedder_may_be_set() -> None:
    """As DSPy's programs do."""
    search = dspy.Embeddings(CORPUS, letter_counts)
    search.k = 2
    assert len(search(OWLS).passages) == 2
    search.embedder = EMBEDDERS["embedder"]
    assert search.embedder is EMBEDDERS["embedder"]
    assert search(OWLS).indices == [0, 5]
    assert (search.normalize, search.index) == (True, None)
    assert repr(search) == "Embeddings(7 passages, 14 dimensions, k=2)"


@pytest.mark.parametrize("embedder", [None, 3, "openai/text-embedding-3-small"])
def test_embedder_that_cannot_be_called_is_refused_with_the_remedy(embedder: Any) -> None:
    with pytest.raises(LMConfigurationError, match=r"`embedder` must be") as caught:
        dspy.Embeddings(CORPUS, embedder)
    assert ("Embedder('openai" in str(caught.value)) == isinstance(embedder, str)


def test_cache_is_refused_with_the_remedy() -> None:
    with pytest.raises(LMConfigurationError, match="caching=True"):
        dspy.Embeddings(CORPUS, letter_counts, cache=True)


class Endless(list[Any]):
    """Takes for ever to be shown, as a million vectors nearly do."""

    def __repr__(self) -> str:
        raise AssertionError("nobody reads all of it")


NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (None, EmbeddingShapeError, "no vectors for 2"),
    "too few": ([[1.0]], EmbeddingShapeError, "1 vectors for 2"),
    "too many": ([[1.0]] * 3, EmbeddingShapeError, "3 vectors for 2"),
    "too many to show": (Endless([[1.0]] * 3), EmbeddingShapeError, "3 vectors for 2"),
    "no dimension": (np.array(1.0), EmbeddingShapeError, "no vectors"),
    "rows by name": ({"a": [1.0], "b": [2.0]}, EmbeddingShapeError, "no vectors"),
    "rows in no order": ({(1.0,), (2.0,)}, EmbeddingShapeError, "no vectors"),
    "numbers by name": ([{1: 2.0}, {3: 4.0}], EmbeddingShapeError, "text 0"),
    "numbers in no order": ([{1.0, 2.0}, {3.0, 4.0}], EmbeddingShapeError, "text 0"),
    "one vector": ([1.0, 2.0], EmbeddingShapeError, "not a list of numbers"),
    "a generator": (iter([[1.0], [2.0]]), EmbeddingShapeError, "no vectors"),
    "two lengths": ([[1.0, 2.0], [1.0]], EmbeddingShapeError, "dimensions"),
    "empty": ([[], []], EmbeddingShapeError, "empty"),
    "NaN": ([[1.0], [NAN]], EmbeddingValueError, "text 1"),
    "infinity": ([[INF], [1.0]], EmbeddingValueError, "text 0"),
    "beyond float32": ([[1e300], [1.0]], EmbeddingValueError, "text 0"),
    "words": ([["a"], ["b"]], EmbeddingValueError, "text 0"),
}


@pytest.mark.parametrize(("made", "error", "words"), WRONG.values(), ids=WRONG)
def test_vectors_that_cannot_be_are_refused(made: Any, error: Any, words: str) -> None:
    """A NaN would rank anywhere, and a shifted row belongs to another passage."""
    with pytest.raises(error, match=words):
        dspy.Embeddings(["a", "b"], lambda texts: made)


def test_query_of_another_dimension_is_refused() -> None:
    """Mixed up embedders are the usual cause, and the message says so."""
    search = dspy.Embeddings(CORPUS, letter_counts)
    search.embedder = dspy.Embedder("offline/hashing", dimensions=16)
    with pytest.raises(EmbeddingShapeError, match=r"16 dimensions.* 14.*same embedder"):
        search(OWLS)


def test_query_vector_with_nan_is_refused() -> None:
    search = dspy.Embeddings(CORPUS, letter_counts)
    search.embedder = lambda texts: [[NAN] * 14]
    with pytest.raises(EmbeddingValueError, match="NaN"):
        search(OWLS)


def test_vector_of_zeros_is_near_to_nothing() -> None:
    """Its cosine is undefined, and taken for zero as DSPy does."""
    search = dspy.EmbeddingsWithScores(["x", "a"], lambda ts: [[t.count("a"), 0] for t in ts])
    assert search("a").scores == [1.0, 0.0]
    assert search("x").scores == [0.0, 0.0]


def test_vectors_can_be_read_and_not_changed() -> None:
    """Threads rely on it."""
    search = dspy.Embeddings(CORPUS, letter_counts)
    vectors = np.asarray(search.corpus_embeddings)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="read-only"):
        vectors[0, 0] = 1.0


# --- Subclasses, callbacks, programs -------------------------------------------------------------


class Shouted(dspy.Embeddings):
    """A retriever as users write them for DSPy."""

    def forward(self, query: str) -> dspy.Prediction:
        found = super().forward(query)
        return dspy.Prediction(passages=[passage.upper() for passage in found.passages])


@pytest.mark.anyio
async def test_subclass_with_its_own_forward_is_called_and_awaited() -> None:
    search = Shouted(CORPUS, letter_counts, k=1)
    assert search(OWLS).passages == [CORPUS[0].upper()]
    assert (await search.acall(OWLS)).passages == [CORPUS[0].upper()]


def test_embedder_subclass_with_its_own_call_is_asked_by_it() -> None:
    """Programs wrap what they need in one."""

    class Own(dspy.Embedder):
        def __call__(self, inputs: Any) -> Any:
            return letter_counts(inputs)

    search = dspy.Embeddings(CORPUS, Own("offline/hashing"), k=4)
    assert search(RIVER).indices == DSPYS[True][RIVER][0]


class Noted(dspy.BaseCallback):
    """Notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.heard.append((type(instance).__name__, inputs))

    def on_module_end(
        self, call_id: str, outputs: Any, exception: BaseException | None = None
    ) -> None:
        self.heard.append(outputs if exception is None else type(exception).__name__)


def test_callbacks_hear_of_each_query() -> None:
    """Those given to the retriever, and those of the settings."""
    own, general = Noted(), Noted()
    search = dspy.Embeddings(CORPUS, letter_counts, k=1, callbacks=[own])
    with dspy.context(callbacks=[general]):
        found = search(OWLS)
        with pytest.raises(InputFieldError):
            search(None)  # type: ignore[arg-type]
    expected = [("Embeddings", {"query": OWLS}), found]
    expected += [("Embeddings", {"query": None}), "InputFieldError"]
    assert own.heard == general.heard == expected


class Rag(dspy.Module):
    """A program that retrieves."""

    def __init__(self, search: dspy.Embeddings) -> None:
        self.search = search
        self.answer = dspy.Predict("context: list[str], question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        return self.answer(context=self.search(question).passages, question=question)


def test_program_with_a_retriever_runs_in_a_batch_and_copies() -> None:
    """A copy of a program does not copy its corpus."""
    search = dspy.Embeddings(CORPUS, dspy.Embedder("offline/hashing"), k=2)
    program = Rag(search)
    with dspy.context(lm=dspy.OfflineLM()):
        twin = program.reset_copy()
        answers = twin.batch([{"question": "Which river flows through Egypt?"}] * 8, num_threads=4)
    assert {"Nile" in answer.answer for answer in answers} == {True}
    assert twin.search is not search
    assert twin.search._state.rows is search._state.rows
    assert twin.search.embedder is not search.embedder


def test_retriever_is_an_item_of_parallel() -> None:
    search = dspy.Embeddings(CORPUS, letter_counts, k=4)
    found = dspy.Parallel(num_threads=3)([(search, {"query": query}) for query in DSPYS[True]])
    assert [each.indices for each in found] == [row[0] for row in DSPYS[True].values()]


# --- Threads, tasks, processes -------------------------------------------------------------------


def test_queries_from_many_threads_get_their_own_answers() -> None:
    """All of them are in the embedder at once, and none is given another's vector."""
    barrier = threading.Barrier(8, timeout=LIMIT_S)

    def meets(texts: list[str]) -> list[list[float]]:
        if len(texts) == 1:
            barrier.wait()
        return letter_counts(texts)

    search = dspy.Embeddings(CORPUS, meets, k=3)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(search, CORPUS[:4] * 20, timeout=LIMIT_S))
    quiet = dspy.Embeddings(CORPUS, letter_counts, k=3)
    assert found == [quiet(passage) for passage in CORPUS[:4]] * 20


@pytest.mark.anyio
async def test_awaited_queries_do_not_wait_for_each_other() -> None:
    """A sync embedder runs in worker threads; the loop goes on."""
    barrier = threading.Barrier(2, timeout=LIMIT_S)

    def meets(texts: list[str]) -> list[list[float]]:
        barrier.wait()
        return letter_counts(texts)

    search = dspy.Embeddings(CORPUS, letter_counts, k=4)
    search.embedder = meets
    found: dict[str, Any] = {}

    async def ask(query: str) -> None:
        found[query] = await search.acall(query)

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(ask, RIVER)
            group.start_soon(ask, OWLS)
    assert {query: each.indices for query, each in found.items()} == {
        query: DSPYS[True][query][0] for query in (RIVER, OWLS)
    }


@pytest.mark.anyio
async def test_awaited_search_does_not_hold_the_loop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large corpus takes milliseconds of CPU, or without numpy a second."""
    search = dspy.Embeddings(CORPUS, awaited_counts)
    threads: list[int] = []

    def noted(rows: Rows, vector: Any, k: int) -> list[tuple[int, float]]:
        threads.append(threading.get_ident())
        return [(0, 1.0)]

    monkeypatch.setattr(Rows, "nearest", noted)
    await search.acall(OWLS)
    search(OWLS)
    assert [thread == threading.get_ident() for thread in threads] == [False, True]


@pytest.mark.anyio
async def test_retriever_is_asked_and_made_inside_a_running_loop() -> None:
    """Notebooks call the sync form there, with an async embedder, too."""
    search = dspy.Embeddings(CORPUS, awaited_counts, k=4)
    assert search(RIVER).indices == DSPYS[True][RIVER][0]


def test_load_during_queries_gives_each_one_corpus_or_the_other(tmp_path: Path) -> None:
    """Never a place in one and a passage of the other."""
    other = [f"{passage} And {index}." for index, passage in enumerate(CORPUS * 3)]
    wanted = []
    for name, corpus in (("a", CORPUS), ("b", other)):
        made = dspy.Embeddings(corpus, letter_counts, k=len(name))
        made.save(tmp_path / name)
        wanted.append(made(RIVER))
    search = dspy.Embeddings.from_saved(tmp_path / "a", letter_counts)
    stop = threading.Event()

    def swap() -> int:
        count = 0
        while not stop.is_set():
            search.load(tmp_path / "ab"[count % 2], letter_counts)
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        swapping = pool.submit(swap)
        try:
            found = list(pool.map(search, [RIVER] * 400, timeout=LIMIT_S))
        finally:
            stop.set()
        assert swapping.result(LIMIT_S) > 1
    assert all(each in wanted for each in found)


def asked(search: dspy.Embeddings) -> dict[str, Any]:
    """Ask a retriever that came from elsewhere."""
    return search(RIVER).toDict()


TWINS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda search: pickle.loads(pickle.dumps(search)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("make", [dspy.Embeddings, dspy.EmbeddingsWithScores, Shouted])
def test_twin_of_a_used_retriever_finds_the_same(twin_of: Any, make: Any) -> None:
    search = make(CORPUS, dspy.Embedder(letter_counts), k=4, callbacks=[Noted()])
    search(OWLS)
    search.note = ["mine"]
    twin = twin_of(search)
    assert type(twin) is make
    assert asked(twin) == asked(search)
    assert twin.note == ["mine"]
    twin.k = 1
    assert (twin.k, search.k) == (1, 4)


def test_deepcopy_shares_callbacks_and_copies_the_rest() -> None:
    """They are told of both; what may change is each one's own."""
    noted = Noted()
    search = dspy.Embeddings(CORPUS, letter_counts, callbacks=[noted])
    search.note = ["mine"]  # type: ignore[attr-defined]
    twin: Any = copy.deepcopy(search)
    assert twin.callbacks == (noted,)
    assert twin.note is not search.note  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [dspy.Embeddings, dspy.EmbeddingsWithScores])
def test_retriever_works_in_a_spawned_process(
    make: Any, pool: ProcessPoolExecutor, server: FakeServer
) -> None:
    """With its endpoint and key, and without embedding the corpus again."""
    embedder = dspy.Embedder("openai/m", api_base=server.base_url, api_key=KEY, num_retries=0)
    search = make(CORPUS, embedder, k=4)
    here = asked(search)
    assert pool.submit(asked, search).result(60) == here
    assert [len(request.json["input"]) for request in server.requests] == [7, 1, 1]
    assert {request.api_key for request in server.requests} == {KEY}


def test_names_stand_where_dspy_has_them() -> None:
    from dspylite.retrievers import Embeddings
    from dspylite.retrievers.embeddings import EmbeddingsWithScores

    assert dspy.retrievers.Embeddings is dspy.Embeddings is Embeddings
    assert dspy.retrievers.embeddings.EmbeddingsWithScores is EmbeddingsWithScores
    assert dspy.EmbeddingsWithScores is EmbeddingsWithScores
