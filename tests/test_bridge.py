"""Crossing between threads and event loops: asyncify, syncify, acall (B 3.1, 3.5)."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import anyio.from_thread
import pytest

import dspylite as dspy
from dspylite.runtime.bridge import call_async
from dspylite.runtime.loops import running_library


async def test_asyncify_returns_what_the_program_returns() -> None:
    """Arguments, results and errors pass unchanged."""

    def divide(a: int, *, by: int) -> float:
        return a / by

    ask = dspy.asyncify(divide)
    assert await ask(6, by=3) == 2
    assert ask.__name__ == "divide"  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        await ask(6, by=0)


async def test_asyncify_takes_modules() -> None:
    """A module has no `__name__`, and that must not matter."""

    class Double(dspy.Module):
        def forward(self, x: int) -> int:
            return 2 * x

    assert await dspy.asyncify(Double())(x=4) == 8


def test_asyncify_refuses_what_is_async_or_not_callable() -> None:
    """A coroutine handed to a thread would never be awaited."""

    async def already() -> None: ...

    with pytest.raises(dspy.ModuleError, match="already"):
        dspy.asyncify(already)
    with pytest.raises(dspy.ModuleError, match="5"):
        dspy.asyncify(5)  # type: ignore[arg-type]


async def test_an_asyncified_call_keeps_the_settings_of_its_start() -> None:
    """A `configure` made while it runs does not split it."""
    started, go_on = threading.Event(), threading.Event()

    def program() -> tuple[int, int]:
        before = dspy.settings.max_history_size
        started.set()
        assert go_on.wait(5)
        return before, dspy.settings.max_history_size

    old = dspy.settings.max_history_size

    async def reconfigure() -> None:
        while not started.is_set():
            await anyio.sleep(0.001)
        dspy.configure(max_history_size=old + 1)
        go_on.set()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(reconfigure)
            assert await dspy.asyncify(program)() == (old, old)
    finally:
        dspy.configure(max_history_size=old)


async def test_the_default_width_is_anyios_forty() -> None:
    """8 would starve a web service (B 3.1): 40 threads meet at one barrier."""
    barrier = threading.Barrier(40)
    meet = dspy.asyncify(functools.partial(barrier.wait, 10))
    async with anyio.create_task_group() as group:
        for _ in range(40):
            group.start_soon(meet)
    assert barrier.n_waiting == 0


async def test_no_more_threads_run_than_the_width() -> None:
    """The width is a limit, not a hint."""
    lock, state = threading.Lock(), {"now": 0, "peak": 0}
    together = threading.Barrier(3)

    def work() -> None:
        with lock:
            state["now"] += 1
            state["peak"] = max(state["peak"], state["now"])
        together.wait(5)
        with lock:
            state["now"] -= 1

    with dspy.context(async_max_workers=3):
        async with anyio.create_task_group() as group:
            for _ in range(9):
                group.start_soon(dspy.asyncify(work))
    assert state["peak"] == 3


async def test_a_width_set_in_a_context_leaves_no_trace() -> None:
    """`context(async_max_workers=1)` must not narrow the loop for good (B 3.1)."""
    with dspy.context(async_max_workers=1):
        assert await dspy.asyncify(lambda: "one")() == "one"
    await test_the_default_width_is_anyios_forty()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_two_event_loops_in_two_threads_both_finish(backend: str) -> None:
    """A limiter tied to the first loop would make the second wait for ever (B 3.1)."""
    barrier = threading.Barrier(2)
    results: list[int] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one)

    async def one() -> None:
        results.append(await dspy.asyncify(lambda: 1)())

    def run() -> None:
        barrier.wait(5)
        with dspy.context(async_max_workers=2):
            anyio.run(main, backend=backend)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 40


async def test_nested_asyncify_of_width_one_finishes_at_depth_three() -> None:
    """A call inside another must not wait for its own caller's thread (B 3.1)."""

    def at_depth(depth: int) -> int:
        if depth == 0:
            return 0
        return 1 + anyio.from_thread.run(dspy.asyncify(at_depth), depth - 1)

    with dspy.context(async_max_workers=1), anyio.fail_after(10):
        assert await dspy.asyncify(at_depth)(3) == 3


async def test_nested_fan_out_at_full_width_finishes() -> None:
    """Several inner calls of one outer call share its thread's slot."""

    async def inner_many() -> int:
        total = 0

        async def one() -> None:
            nonlocal total
            value = await dspy.asyncify(lambda: 1)()
            total += value

        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(one)
        return total

    def outer() -> int:
        return anyio.from_thread.run(inner_many)

    results: list[int] = []

    async def run() -> None:
        results.append(await dspy.asyncify(outer)())

    with dspy.context(async_max_workers=2), anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(run)
    assert results == [10] * 6


async def double(x: int) -> int:
    """Wait once, so that a loop is really needed, then double."""
    await anyio.sleep(0)
    return 2 * x


class AsyncOnly(dspy.Module):
    """Defines `aforward` alone."""

    async def aforward(self, x: int) -> int:
        return await double(x)


def _plainly(work: Callable[[], Any]) -> Any:
    return work()


def _on_a_worker_thread(work: Callable[[], Any]) -> Any:
    with dspy.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _inside_an_asyncio_loop(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return work()

    return asyncio.run(main())


def _inside_a_trio_loop(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return work()

    return anyio.run(main, backend="trio")


def _in_an_anyio_worker_thread_of_trio(work: Callable[[], Any]) -> Any:
    return anyio.run(anyio.to_thread.run_sync, work, backend="trio")


def _after_a_closed_loop(work: Callable[[], Any]) -> Any:
    asyncio.run(double(1))
    return work()


def _inside_an_async_module_called_from_sync(work: Callable[[], Any]) -> Any:
    class Outer(dspy.Module):
        async def aforward(self) -> Any:
            return work()

    return Outer()()


PLACES = [value for name, value in list(globals().items()) if name.startswith("_")]
PLACES = [
    place for place in PLACES if callable(place) and getattr(place, "__module__", "") == __name__
]


@pytest.mark.parametrize("place", PLACES, ids=lambda fn: fn.__name__.strip("_"))
def test_an_async_only_module_can_be_called_from_anywhere(
    place: Callable[[Callable[[], Any]], Any],
) -> None:
    """Plain thread, worker thread, inside a running loop, after closed loops (B 3.5)."""
    assert place(lambda: AsyncOnly()(x=4)) == 8
    assert place(lambda: dspy.syncify(double)(4)) == 8


def test_the_running_loop_is_not_patched() -> None:
    """Patched loops break other libraries (B 3.5)."""
    names = ["run_until_complete", "run_forever", "_run_once", "__init__"]
    before = [getattr(asyncio.BaseEventLoop, name) for name in names]
    run, get = asyncio.run, asyncio.get_event_loop
    _inside_an_asyncio_loop(lambda: AsyncOnly()(x=1))
    assert [getattr(asyncio.BaseEventLoop, name) for name in names] == before
    assert (asyncio.run, asyncio.get_event_loop) == (run, get)


def test_an_event_loop_that_is_over_is_not_kept() -> None:
    """A program that calls `asyncio.run` for each job would keep every loop it ever had (B 3.7)."""
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        assert await dspy.asyncify(str)(1) == "1"
        assert await dspy.Parallel(num_threads=2).acall([(str, (2,))]) == ["2"]

    asyncio.run(main())
    gc.collect()
    assert loops[0]() is None


def test_a_thread_that_outlives_its_event_loop_does_not_keep_it() -> None:
    """A cancelled call gives its place back to nobody when its loop is over (B 3.7)."""
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    started, released = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        released.wait(10)

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        task = asyncio.ensure_future(dspy.asyncify(work)())
        await asyncio.to_thread(started.wait, 10)
        task.cancel()

    asyncio.run(main())
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("AnyIO")]
    released.set()
    while threads:
        threads.pop().join(10)
    gc.collect()
    assert loops[0]() is None


def test_calls_on_one_thread_share_a_loop_and_leave_no_task_behind() -> None:
    """Connections can be kept from call to call; stray tasks cannot pile up."""
    loops: list[asyncio.AbstractEventLoop] = []
    strays: list[asyncio.Task[None]] = []

    async def work() -> None:
        loops.append(asyncio.get_running_loop())
        strays.append(asyncio.create_task(asyncio.sleep(3600)))

    call_async(work)
    call_async(work)
    assert loops[0] is loops[1]
    assert [stray.cancelled() for stray in strays] == [True, True]


def test_the_loop_of_a_thread_is_closed_with_the_thread() -> None:
    """A thread pool that comes and goes leaks no descriptors."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def work() -> None:
        loops.append(asyncio.get_running_loop())

    thread = threading.Thread(target=call_async, args=(work,))
    thread.start()
    thread.join()
    assert loops[0].is_closed()


def test_an_error_of_async_code_is_raised_in_sync_code() -> None:
    """Also when it crossed a helper thread."""

    async def fail() -> None:
        raise KeyError("inner")

    for place in (_plainly, _inside_an_asyncio_loop):
        with pytest.raises(KeyError, match="inner"):
            place(lambda: call_async(fail))


def test_an_interrupt_cancels_the_async_code_and_frees_the_loop() -> None:
    """Ctrl-C in the middle must not leave a half-run task for the next call."""
    left: list[str] = []

    async def interrupted() -> None:
        try:
            asyncio.get_running_loop().call_soon(interrupt)
            await asyncio.sleep(3600)
        finally:
            left.append("left")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_async(interrupted)
    assert left == ["left"]
    assert call_async(double, 2) == 4


def test_syncify_in_place_gives_a_module_a_sync_form() -> None:
    """DSPy's form: the module itself is changed and returned."""
    module = AsyncOnly()
    assert dspy.syncify(module) is module
    assert module.forward(x=3) == 6  # type: ignore[attr-defined]


def test_syncify_of_a_copy_leaves_the_module_alone() -> None:
    """With `in_place=False` the caller's module is not touched."""
    module = AsyncOnly()
    twin = dspy.syncify(module, in_place=False)
    assert twin is not module
    assert twin.forward(x=3) == 6  # type: ignore[attr-defined]
    assert not hasattr(module, "forward")


def test_syncify_refuses_what_is_not_async() -> None:
    """The mistake is named where it is made."""
    with pytest.raises(dspy.ModuleError, match="len"):
        dspy.syncify(len)


def test_a_thread_outside_any_loop_is_not_in_one() -> None:
    """Also a worker of a trio loop, whose context says "trio"."""

    async def main() -> tuple[str | None, str | None]:
        return running_library(), await anyio.to_thread.run_sync(dspy.bind(running_library))

    assert running_library() is None
    assert anyio.run(main, backend="trio") == ("trio", None)
    assert asyncio.run(main()) == ("asyncio", None)
