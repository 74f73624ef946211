"""Every way to run work elsewhere carries every kind of context (B 1.1, 1.6, 1.8)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

import dspylite as dspy
from dspylite.testing import FakeLM

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")

Work = Callable[[], Any]


def on_this_thread(work: Work) -> Any:
    return work()


def in_parallel(work: Work) -> Any:
    return dspy.Parallel(num_threads=2)([(work, ()), (work, ())])[1]


class Wrapped(dspy.Module):
    """A module around any function."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def forward(self, **_: Any) -> Any:
        return self.work()


def in_batch(work: Work) -> Any:
    return Wrapped(work).batch([{}, {}], num_threads=2)[1]


def in_nested_parallel(work: Work) -> Any:
    return in_parallel(lambda: in_parallel(work))


def in_abatch(work: Work) -> Any:
    return anyio.run(functools.partial(Wrapped(work).abatch, [{}, {}], 2))[1]


def in_our_pool(work: Work) -> Any:
    with dspy.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def in_our_pools_map(work: Work) -> Any:
    with dspy.ThreadPoolExecutor(1) as pool:
        return next(pool.map(lambda _: work(), [0]))


def in_plain_pool_bound(work: Work) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the worker exists before the context does
        return pool.submit(dspy.bind(work)).result()


def _on_thread(work: Work) -> Any:
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(work()))
    thread.start()
    thread.join()
    return box[0]


def in_plain_thread_bound(work: Work) -> Any:
    return _on_thread(dspy.bind(work))


def in_run_in_executor_bound(work: Work) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, dspy.bind(work))

    return asyncio.run(main())


def in_plain_pool_with_propagation(work: Work) -> Any:
    with dspy.propagate_to_threads(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def in_plain_thread_with_propagation(work: Work) -> Any:
    with dspy.propagate_to_threads():
        return _on_thread(work)


def in_run_in_executor_with_propagation(work: Work) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)

    with dspy.propagate_to_threads():
        return asyncio.run(main())


def in_asyncify(work: Work) -> Any:
    return anyio.run(dspy.asyncify(work))


def in_asyncify_on_trio(work: Work) -> Any:
    return anyio.run(dspy.asyncify(work), backend="trio")


def in_asyncio_to_thread(work: Work) -> Any:
    return asyncio.run(asyncio.to_thread(work))


def in_anyio_to_thread(work: Work) -> Any:
    return anyio.run(anyio.to_thread.run_sync, work)


def in_a_task(work: Work) -> Any:
    async def main() -> Any:
        async def task() -> Any:
            return work()

        return await asyncio.create_task(task())

    return asyncio.run(main())


def in_acall_of_a_sync_module(work: Work) -> Any:
    return anyio.run(Wrapped(work).acall)


def in_a_called_async_module(work: Work) -> Any:
    class Async(dspy.Module):
        async def aforward(self) -> Any:
            return work()

    return Async()()


def in_an_async_module_called_inside_a_loop(work: Work) -> Any:
    async def main() -> Any:
        return in_a_called_async_module(work)

    return asyncio.run(main())


def in_syncify(work: Work) -> Any:
    async def async_work() -> Any:
        return work()

    return dspy.syncify(async_work)()


def in_a_bound_async_function(work: Work) -> Any:
    async def async_work() -> Any:
        await anyio.sleep(0)
        return work()

    bound = dspy.bind(async_work)
    return contextvars.Context().run(anyio.run, bound)


def in_bind_iter(work: Work) -> Any:
    def chunks() -> Any:
        yield None
        yield work()

    iterator = dspy.bind_iter(chunks())
    contextvars.Context().run(next, iterator)
    return contextvars.Context().run(next, iterator)


def in_async_bind_iter(work: Work) -> Any:
    async def chunks() -> Any:
        yield None
        yield work()

    iterator = dspy.bind_iter(chunks())

    async def main() -> Any:
        return [chunk async for chunk in iterator][1]

    return contextvars.Context().run(asyncio.run, main())


WAYS = [value for name, value in list(globals().items()) if name.startswith(("in_", "on_"))]


class ParentIds(dspy.BaseCallback):
    """Notes the parent of every module call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        frame = dspy.current_call()
        assert frame is not None
        self.seen.append((call_id, frame.parent_id))


def _settings(run: Callable[[Work], Any]) -> None:
    lm = FakeLM()
    with dspy.context(lm=lm):
        assert run(lambda: dspy.settings.lm) is lm


def _users_own_variable(run: Callable[[Work], Any]) -> None:
    token = request_id.set("r-1")
    try:
        assert run(request_id.get) == "r-1"
    finally:
        request_id.reset(token)


def _usage(run: Callable[[Work], Any]) -> None:
    lm = FakeLM(default="four words in answer")
    with dspy.track_usage() as tracker:
        run(lambda: lm("two words"))
    assert tracker.total.calls == len(lm.requests) > 0
    assert tracker.total.prompt_tokens == 2 * len(lm.requests)


def _history(run: Callable[[Work], Any]) -> None:
    lm = FakeLM()

    class Outer(dspy.Module):
        def forward(self) -> None:
            run(lambda: lm("hello"))

    outer = Outer()
    outer()
    assert len(outer.history) == len(lm.history) == len(lm.requests) > 0


def _parent_of_a_call(run: Callable[[Work], Any]) -> None:
    callback = ParentIds()
    inner = Wrapped(lambda: None)

    class Outer(dspy.Module):
        def forward(self) -> None:
            run(inner)

    with dspy.context(callbacks=[callback]):
        Outer()()
    calls = dict(callback.seen)
    outermost = next(call_id for call_id, parent in callback.seen if parent is None)
    last = callback.seen[-1][0]
    assert last != outermost
    parent: str | None = last
    while parent is not None and parent != outermost:
        parent = calls[parent]
    assert parent == outermost


WHAT = [_settings, _users_own_variable, _usage, _history, _parent_of_a_call]


@pytest.mark.parametrize("what", WHAT, ids=lambda fn: fn.__name__.strip("_"))
@pytest.mark.parametrize("way", WAYS, ids=lambda fn: fn.__name__)
def test_every_way_carries_every_kind_of_context(
    way: Callable[[Work], Any], what: Callable[[Callable[[Work], Any]], None]
) -> None:
    """Work started elsewhere never silently uses the global settings (B 1.1, 1.6)."""
    what(way)


@pytest.mark.parametrize("way", [in_our_pool, _on_thread], ids=lambda fn: fn.__name__)
def test_the_process_default_reaches_every_thread(way: Callable[[Work], Any]) -> None:
    """`configure` needs no propagation at all."""
    before = dspy.settings.max_history_size
    dspy.configure(max_history_size=before + 1)
    try:
        assert way(lambda: dspy.settings.max_history_size) == before + 1
    finally:
        dspy.configure(max_history_size=before)


def test_a_plain_thread_without_help_does_not_see_the_overlay() -> None:
    """Says why `bind` exists; it keeps the other tests honest."""
    with dspy.context(num_threads=3):
        assert _on_thread(lambda: dspy.settings.num_threads) != 3


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
