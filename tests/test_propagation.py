"""Every way to run work elsewhere, and every kind of context: one matrix (B 1.1, 1.6, 1.8).

`docs/concepts/propagation.md` is the same matrix for readers; a test here compares the two. A new
way is a function whose name begins with `in_`, a new kind one whose name begins with `kind_`.

Not here: web frameworks (`test_fastapi_service.py`), and streams of models (`test_streams.py`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio

import dspylite as dspy
from dspylite.runtime.cancellation import Cancellation
from dspylite.runtime.clock import Deadline, time_left
from dspylite.testing import FakeLM

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")

Work = Callable[[], Any]
Way = Callable[[Work], Any]
"""Runs a function somewhere and returns what it returned."""

ITEMS = [{}, {}]
"""Of a batch; the ways below return what became of the second."""


class Sync(dspy.Module):
    """A module around any function."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def forward(self) -> Any:
        return self.work()


class Async(dspy.Module):
    """The same for callers that await, with no sync form."""

    def __init__(self, work: Work) -> None:
        self.work = work

    async def aforward(self) -> Any:
        await anyio.sleep(0)
        return self.work()


# --- The ways: our own runs ----------------------------------------------------------------------


def in_a_direct_call(work: Work) -> Any:
    return work()


def in_parallel(work: Work) -> Any:
    return dspy.Parallel(num_threads=2)([(work, ()), (work, ())])[1]


def in_parallel_acall(work: Work) -> Any:
    return anyio.run(dspy.Parallel(num_threads=2).acall, [(Async(work), {}), (Async(work), {})])[1]


def in_batch(work: Work) -> Any:
    return Sync(work).batch(ITEMS, num_threads=2)[1]


def in_abatch(work: Work) -> Any:
    return anyio.run(Async(work).abatch, ITEMS, 2)[1]


def in_abatch_on_trio(work: Work) -> Any:
    return anyio.run(Async(work).abatch, ITEMS, 2, backend="trio")[1]


def in_a_sync_item_of_abatch(work: Work) -> Any:
    return anyio.run(Sync(work).abatch, ITEMS, 2)[1]


def in_batch_iter(work: Work) -> Any:
    return dict(Sync(work).batch_iter(ITEMS, num_threads=2))[1].value


def in_abatch_iter(work: Work) -> Any:
    async def main() -> Any:
        return {index: o.value async for index, o in Async(work).abatch_iter(ITEMS, num_threads=2)}

    return anyio.run(main)[1]


def in_abatch_iter_on_trio(work: Work) -> Any:
    async def main() -> Any:
        return {index: o.value async for index, o in Async(work).abatch_iter(ITEMS, num_threads=2)}

    return anyio.run(main, backend="trio")[1]


def in_a_nested_batch(work: Work) -> Any:
    return in_batch(lambda: in_batch(work))


def in_a_nested_abatch(work: Work) -> Any:
    class Outer(dspy.Module):
        async def aforward(self) -> Any:
            return (await Async(work).abatch(ITEMS, 2))[1]

    return anyio.run(Outer().abatch, ITEMS, 2)[1]


def _second_copy_works(work: Work) -> Work:
    """Let the first copy of an item hang until the second has worked."""
    copies, worked = itertools.count(), threading.Event()

    def copy() -> Any:
        if next(copies) == 0:
            worked.wait(10)
            raise ValueError("the slow copy")
        try:
            return work()
        finally:
            worked.set()

    return copy


def in_a_hedged_copy(work: Work) -> Any:
    pairs = [(int, ()), (_second_copy_works(work), ())]
    return dspy.Parallel(num_threads=1, hedge_after_s=0.01)(pairs)[1]


def in_a_hedged_copy_of_an_awaited_item(work: Work) -> Any:
    pairs = [(int, ()), (_second_copy_works(work), ())]
    return anyio.run(dspy.Parallel(num_threads=1, hedge_after_s=0.01).acall, pairs)[1]


# --- The ways: between sync and async ------------------------------------------------------------


def in_asyncify(work: Work) -> Any:
    return anyio.run(dspy.asyncify(work))


def in_asyncify_on_trio(work: Work) -> Any:
    return anyio.run(dspy.asyncify(work), backend="trio")


def in_a_nested_asyncify(work: Work) -> Any:
    return in_asyncify(lambda: in_asyncify(work))


def in_acall_of_a_sync_module(work: Work) -> Any:
    return anyio.run(Sync(work).acall)


def in_a_called_async_module(work: Work) -> Any:
    return Async(work)()


def in_an_async_module_called_inside_a_loop(work: Work) -> Any:
    async def main() -> Any:
        return Async(work)()

    return asyncio.run(main())


def in_syncify(work: Work) -> Any:
    async def async_work() -> Any:
        return work()

    return dspy.syncify(async_work)()


def in_syncify_inside_a_loop(work: Work) -> Any:
    async def main() -> Any:
        return in_syncify(work)

    return asyncio.run(main())


def _embedder(work: Work, found: list[Any]) -> dspy.Embedder:
    def embed(texts: list[str]) -> list[list[float]]:
        found.append(work())
        return [[1.0] for _ in texts]

    return dspy.Embedder(embed, batch_size=1, max_concurrency=2)


def in_an_embedders_batch(work: Work) -> Any:
    found: list[Any] = []
    _embedder(work, found).embed(["a", "b"])
    return found[-1]


def in_an_awaited_embedders_batch(work: Work) -> Any:
    found: list[Any] = []
    anyio.run(_embedder(work, found).aembed, ["a", "b"])
    return found[-1]


# --- The ways: threads of one's own --------------------------------------------------------------


def _on_thread(work: Work) -> Any:
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            result.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result.result()


def _in_pool(work: Work) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the worker is there before the work
        return pool.submit(work).result()


def _in_run_in_executor(work: Work) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)

    return asyncio.run(main())


def in_our_pool(work: Work) -> Any:
    with dspy.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        return pool.submit(work).result()


def in_our_pools_map(work: Work) -> Any:
    with dspy.ThreadPoolExecutor(1) as pool:
        return next(pool.map(lambda _: work(), [0]))


def in_a_plain_pool_with_bind(work: Work) -> Any:
    return _in_pool(dspy.bind(work))


def in_a_plain_thread_with_bind(work: Work) -> Any:
    return _on_thread(dspy.bind(work))


def in_run_in_executor_with_bind(work: Work) -> Any:
    return _in_run_in_executor(dspy.bind(work))


def in_a_bound_async_function(work: Work) -> Any:
    async def async_work() -> Any:
        await anyio.sleep(0)
        return work()

    bound = dspy.bind(async_work)
    return contextvars.Context().run(anyio.run, bound)


def _chunks(work: Work) -> Iterator[Any]:
    yield None
    yield work()


def in_bind_iter_on_changing_threads(work: Work) -> Any:
    iterator = dspy.bind_iter(_chunks(work))
    _on_thread(lambda: next(iterator))
    return _on_thread(lambda: next(iterator))


def in_bind_iter_of_an_async_generator(work: Work) -> Any:
    async def chunks() -> Any:
        yield None
        yield work()

    iterator = dspy.bind_iter(chunks())

    async def main() -> Any:
        return [chunk async for chunk in iterator][1]

    return contextvars.Context().run(asyncio.run, main())


def in_a_plain_pool_with_propagation(work: Work) -> Any:
    with dspy.propagate_to_threads():
        return _in_pool(work)


def in_a_plain_thread_with_propagation(work: Work) -> Any:
    with dspy.propagate_to_threads():
        return _on_thread(work)


def in_run_in_executor_with_propagation(work: Work) -> Any:
    with dspy.propagate_to_threads():
        return _in_run_in_executor(work)


def in_a_plain_pool(work: Work) -> Any:
    return _in_pool(work)


def in_a_plain_thread(work: Work) -> Any:
    return _on_thread(work)


def in_run_in_executor(work: Work) -> Any:
    return _in_run_in_executor(work)


def in_a_generator_on_changing_threads(work: Work) -> Any:
    iterator = _chunks(work)
    _on_thread(lambda: next(iterator))
    return _on_thread(lambda: next(iterator))


# --- The ways: tasks and threads of event loops --------------------------------------------------


def in_asyncio_to_thread(work: Work) -> Any:
    return asyncio.run(asyncio.to_thread(work))


def in_anyio_to_thread(work: Work) -> Any:
    return anyio.run(anyio.to_thread.run_sync, work)


def in_trio_to_thread(work: Work) -> Any:
    return trio.run(trio.to_thread.run_sync, work)


def in_an_asyncio_task(work: Work) -> Any:
    async def main() -> Any:
        async def task() -> Any:
            return work()

        return await asyncio.create_task(task())

    return asyncio.run(main())


def in_an_anyio_task_group(work: Work) -> Any:
    found: list[Any] = []

    async def task() -> None:
        found.append(work())

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(task)

    anyio.run(main)
    return found[0]


def in_a_trio_nursery(work: Work) -> Any:
    found: list[Any] = []

    async def task() -> None:
        found.append(work())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)

    trio.run(main)
    return found[0]


# --- What differs between the ways ---------------------------------------------------------------

PLAIN = {
    in_a_plain_pool, in_a_plain_thread, in_run_in_executor, in_a_generator_on_changing_threads,
}  # fmt: skip
"""Threads that get nothing but the process default."""
PINNED = {
    in_parallel, in_parallel_acall, in_batch, in_abatch, in_abatch_on_trio,
    in_a_sync_item_of_abatch, in_batch_iter, in_abatch_iter, in_abatch_iter_on_trio,
    in_a_nested_batch, in_a_nested_abatch,
    in_a_hedged_copy, in_a_hedged_copy_of_an_awaited_item, in_asyncify, in_asyncify_on_trio,
    in_a_nested_asyncify,
}  # fmt: skip
"""Runs, which keep the settings of their start."""
BATCHES = PINNED - {in_asyncify, in_asyncify_on_trio, in_a_nested_asyncify}
"""Ways whose work is an item of their own; the way returns what became of the item at index 1."""


# --- The kinds: each returns what arrived and what was sent --------------------------------------


def kind_settings(way: Way) -> tuple[Any, Any]:
    """The settings of a `context` block."""
    lm = FakeLM()
    with dspy.context(lm=lm):
        return way(lambda: dspy.settings.lm), lm


def kind_configure(way: Way) -> tuple[Any, Any]:
    """A process default set elsewhere while the work runs: kept out by runs, seen by all others."""
    before = dspy.settings.max_history_size

    def work() -> int:
        contextvars.Context().run(dspy.configure, max_history_size=before + 1)
        return dspy.settings.max_history_size

    try:
        return way(work), before if way in PINNED else before + 1
    finally:
        dspy.configure(max_history_size=before)


def kind_variable(way: Way) -> tuple[Any, Any]:
    """The user's own context variable."""
    token = request_id.set("r-1")
    try:
        return way(request_id.get), "r-1"
    finally:
        request_id.reset(token)


def _heard(work: Work) -> Sync:
    """Make a module that callbacks hear of, so that its call has a frame."""
    module = Sync(work)
    module.callbacks = (dspy.BaseCallback(),)
    return module


def _frame() -> Any:
    return dspy.current_call()


def kind_parent(way: Way) -> tuple[Any, Any]:
    """The call that work belongs to, as callbacks are told it."""
    inner = _heard(lambda: _frame().parent_id)
    seen, sent = _heard(lambda: (way(inner), _frame().call_id))()
    return seen, sent


def kind_item(way: Way) -> tuple[Any, Any]:
    """The index of the batch item that work is for: of the innermost batch."""
    inner = _heard(lambda: _frame().item_index)
    pairs = [(int, ()), (int, ()), (int, ()), (lambda: way(inner), ())]
    return dspy.Parallel(num_threads=4)(pairs)[3], 1 if way in BATCHES else 3


def kind_usage(way: Way) -> tuple[Any, Any]:
    """The tracker that counts tokens."""
    lm = FakeLM()
    with dspy.track_usage() as tracker:
        way(lambda: lm("two words"))
    assert lm.requests
    return tracker.total.prompt_tokens, 2 * len(lm.requests)


def kind_history(way: Way) -> tuple[Any, Any]:
    """The histories of the modules around a call."""
    lm = FakeLM()
    outer = Sync(lambda: way(lambda: lm("hello")))
    outer()
    assert lm.requests
    return len(outer.history), len(lm.requests)


def kind_budget(way: Way) -> tuple[Any, Any]:
    """What calls may cost: counted, and refused once it is spent."""
    lm = FakeLM()

    def work() -> str:
        try:
            lm("hello")
        except dspy.BudgetExceededError:
            return "refused"
        return "made"

    with dspy.budget(tokens=1_000) as spending:
        first = way(work)
    made = len(lm.requests)
    with dspy.budget(tokens=0):
        second = way(work)
    assert first == "made"
    return (spending.calls, second), (made, "refused")


def kind_deadline(way: Way) -> tuple[Any, Any]:
    """The deadline of the call in progress."""
    with Deadline(60):
        left = way(time_left)
    return left is not None and 0 < left <= 60, True


def kind_cancel(way: Way) -> tuple[Any, Any]:
    """The flag that tells work to stop."""
    seen: set[str] = set()
    ended = threading.Event()
    with Cancellation() as flag:

        def work() -> None:
            flag.cancel("the test says so")
            try:
                dspy.check_cancelled()
            except dspy.CallCancelledError:
                seen.add("told")
            else:
                seen.add("not told")
            ended.set()

        try:
            way(work)
        except dspy.CallCancelledError:
            pass  # the way is part of the work that is told to stop
    assert ended.wait(10)
    return seen, {"told"}


def kind_trace(way: Way) -> tuple[Any, Any]:
    """The list that records what predictors did."""
    trace: list[Any] = []
    predict = dspy.Predict("question -> answer")
    predict.lm = lm = FakeLM(default={"answer": "Paris"})
    with dspy.context(trace=trace):
        way(lambda: predict(question="?"))
    assert lm.requests
    return len(trace), len(lm.requests)


# --- The matrix ----------------------------------------------------------------------------------


def _id(fn: Any) -> str:
    return str(fn.__name__).removeprefix("in_").removeprefix("kind_")


WAYS = [value for name, value in list(globals().items()) if name.startswith("in_")]
KINDS = [value for name, value in list(globals().items()) if name.startswith("kind_")]


def carries(way: Way, kind: Callable[[Way], Any]) -> bool:
    return way not in PLAIN or kind is kind_configure


@pytest.mark.parametrize("kind", KINDS, ids=_id)
@pytest.mark.parametrize("way", WAYS, ids=_id)
def test_context_arrives(way: Way, kind: Callable[[Way], tuple[Any, Any]]) -> None:
    """Work started elsewhere never silently uses other settings than its caller (B 1.1, 1.6).

    A plain thread does, until it gets help; that it does keeps the other cases honest.
    """
    seen, sent = kind(way)
    if carries(way, kind):
        assert seen == sent
    else:
        assert seen != sent


PAGE = Path(__file__).parent.parent / "docs" / "concepts" / "propagation.md"
CELLS = re.compile(r"^\| `(\w+)` \|(.+)\|$", re.MULTILINE)
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def cell(way: Way, kind: Callable[[Way], Any]) -> str:
    """Say what the page must say."""
    if kind is kind_configure:
        return "kept out" if way in PINNED else "seen"
    if not carries(way, kind):
        return "**no**"
    if kind is kind_item:
        return "its own" if way in BATCHES else "yes"
    return "yes"


def test_the_page_has_a_cell_for_every_case_and_no_other() -> None:
    """A promise on the page that no test keeps, or a case that no reader finds, is a gap."""
    text = PAGE.read_text("utf-8")
    head = re.search(r"^\| Way \|(.+)\|$", text, re.MULTILINE)
    assert head
    kinds = re.findall(r"`(\w+)`", head[1])
    assert len(kinds) == len(set(kinds))
    on_page = {
        (way, kind): said.strip()
        for way, row in CELLS.findall(text[head.end() :].partition("\n\n")[0])
        for kind, said in zip(kinds, row.split("|"), strict=True)
    }
    assert on_page == {(_id(way), _id(kind)): cell(way, kind) for way in WAYS for kind in KINDS}


def test_every_test_that_the_page_names_exists() -> None:
    """A cell whose test is gone promises nothing."""
    text = PAGE.read_text("utf-8")
    here = Path(__file__).parent
    named = set(NAMED.findall(text))
    missing = {
        (file, name)
        for file, name in named
        if not (here / file).is_file()
        or not re.search(rf"def {name}\(", (here / file).read_text("utf-8"))
    }
    assert named
    assert missing == set()


# --- Beside the matrix ---------------------------------------------------------------------------


def test_a_worker_without_lm_is_told_how_context_crosses_threads() -> None:
    """The likeliest cause of "no LM" is a context that stayed behind (B 1.8)."""
    predict = dspy.Predict("question -> answer")
    with (
        dspy.context(lm=FakeLM()),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        pytest.raises(dspy.LMNotConfiguredError, match=r"dspylite\.ThreadPoolExecutor") as caught,
    ):
        pool.submit(predict, question="?").result()
    for remedy in ("configure(", "bind", "propagate_to_threads"):
        assert remedy in str(caught.value)


def test_what_one_task_sets_is_not_seen_by_the_next() -> None:
    """Each task has its own copy of the context, also on the same worker (B 1.7)."""

    def work(value: str) -> str:
        before = request_id.get()
        request_id.set(value)
        return before

    with dspy.ThreadPoolExecutor(1) as pool:
        assert list(pool.map(work, ["a", "b", "c"])) == ["none"] * 3
    assert dspy.Parallel(num_threads=1)([(work, ("a",)), (work, ("b",))]) == ["none"] * 2
    bound = dspy.bind(work)
    assert [bound("a"), bound("b")] == ["none"] * 2


def test_one_thread_runs_items_off_the_callers_thread_like_many_do() -> None:
    """One thread and N threads run the same code path (B 1.7)."""
    names = dspy.Parallel(num_threads=1)([(lambda: threading.current_thread().name, ())])
    assert names[0].startswith("dspylite-worker-")
