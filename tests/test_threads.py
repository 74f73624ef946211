"""`bind`, `bind_iter`, our pool and the opt-in patch of the standard ones (B 1.1, 1.5)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest

import dspylite as dspy
from dspylite.runtime.threads import is_async

STANDARD_SUBMIT = concurrent.futures.ThreadPoolExecutor.submit
STANDARD_START = threading.Thread.start


def standard_classes_are_restored() -> bool:
    return (
        concurrent.futures.ThreadPoolExecutor.submit is STANDARD_SUBMIT
        and threading.Thread.start is STANDARD_START
    )


def test_bound_functions_keep_name_signature_and_result() -> None:
    """A wrapper keeps what it wraps."""

    def named(a: int, *, b: int = 2) -> int:
        """Docs."""
        return a + b

    bound = dspy.bind(named)
    assert (bound.__name__, bound.__doc__, bound(1, b=3)) == ("named", "Docs.", 4)
    assert inspect.signature(bound) == inspect.signature(named)


def test_a_bound_function_runs_in_many_threads_at_once() -> None:
    """One context cannot be entered twice; each call has its own copy."""
    barrier = threading.Barrier(8)
    with dspy.context(num_threads=3):

        @dspy.bind
        def work() -> int:
            barrier.wait(5)
            return dspy.settings.num_threads

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work) for _ in range(8)]
        assert [future.result() for future in futures] == [3] * 8


def test_bind_keeps_async_functions_async() -> None:
    """Frameworks look at the function to decide how to call it."""

    async def work() -> None: ...

    assert inspect.iscoroutinefunction(dspy.bind(work))


async def test_a_bound_async_function_can_wait_and_be_cancelled() -> None:
    """Cancellation must reach the inner function on both backends."""
    seen: list[str] = []

    @dspy.bind
    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("left")

    with anyio.move_on_after(0.05) as scope:
        await work()
    assert (scope.cancelled_caught, seen) == (True, ["left"])


async def test_a_bound_async_function_passes_errors_both_ways() -> None:
    """An exception thrown inside arrives, and one thrown in can be handled inside."""

    @dspy.bind
    async def work() -> str:
        try:
            with anyio.fail_after(0.01):
                await anyio.sleep_forever()
        except TimeoutError:
            raise KeyError("inner") from None
        return "never"

    with pytest.raises(KeyError, match="inner"):
        await work()


def test_bind_iter_gives_every_chunk_the_overlay_from_changing_threads() -> None:
    """Seen elsewhere: the first chunk has tenant B, the others tenant A (B 1.5)."""

    def chunks() -> Iterator[int]:
        for _ in range(3):
            yield dspy.settings.num_threads

    with dspy.context(num_threads=3):
        iterator = dspy.bind_iter(chunks())
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        seen = [pool.submit(next, iterator).result() for _ in range(3)]
    assert seen == [3, 3, 3]


def test_bind_iter_lets_a_context_inside_the_generator_end_properly() -> None:
    """All steps share one context, so that a token set in one is reset in another."""

    def chunks() -> Iterator[int]:
        with dspy.context(num_threads=3):
            yield dspy.settings.num_threads
        yield dspy.settings.num_threads

    outside = dspy.settings.num_threads
    iterator = dspy.bind_iter(chunks())
    assert [contextvars.Context().run(next, iterator) for _ in range(2)] == [3, outside]


def test_closing_a_bound_iterator_closes_the_inner_one() -> None:
    """An abandoned stream must free its connection."""
    closed: list[bool] = []

    def chunks() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    iterator = dspy.bind_iter(chunks())
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert closed == [True]


async def test_closing_a_bound_async_iterator_closes_the_inner_one() -> None:
    """The async form too, on both backends."""
    closed: list[int] = []

    async def chunks() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(dspy.settings.num_threads)

    with dspy.context(num_threads=3):
        iterator = dspy.bind_iter(chunks())
    assert await anext(iterator) == 1
    await iterator.aclose()  # type: ignore[attr-defined]
    assert closed == [3]


def test_bind_iter_refuses_what_cannot_be_iterated() -> None:
    """The mistake is named where it is made."""
    with pytest.raises(dspy.InputFieldError, match="5"):
        dspy.bind_iter(5)  # type: ignore[call-overload]


def test_our_pool_takes_what_the_standard_one_takes() -> None:
    """It is a drop-in: initializer, prefix, exceptions, shutdown."""
    started: list[str] = []

    def fail() -> None:
        raise KeyError("inner")

    with dspy.ThreadPoolExecutor(
        1, thread_name_prefix="mine", initializer=started.append, initargs=("x",)
    ) as pool:
        assert isinstance(pool, concurrent.futures.ThreadPoolExecutor)
        assert pool.submit(lambda: threading.current_thread().name).result().startswith("mine")
        with pytest.raises(KeyError):
            pool.submit(fail).result()
    assert started == ["x"]


def test_propagation_is_off_by_default_and_undone_by_close() -> None:
    """A library must not change the standard one behind its user's back (B 1.1)."""
    assert standard_classes_are_restored()
    handle = dspy.propagate_to_threads()
    assert not standard_classes_are_restored()
    handle.close()
    handle.close()
    assert standard_classes_are_restored()


def test_propagation_nests_and_ends_with_the_last_handle() -> None:
    """Two libraries may switch it on independently."""
    outer, inner = dspy.propagate_to_threads(), dspy.propagate_to_threads()
    outer.close()
    with dspy.context(num_threads=3):
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(dspy.settings.num_threads))
        thread.start()
        thread.join()
    assert seen == [3]
    inner.close()
    assert standard_classes_are_restored()


def test_a_patch_over_ours_is_not_lost_when_we_leave() -> None:
    """Tracing tools patch the same method; taking ours out must not take theirs."""
    handle = dspy.propagate_to_threads()
    ours = concurrent.futures.ThreadPoolExecutor.submit
    calls: list[str] = []

    @functools.wraps(ours)
    def theirs(pool: object, /, *args: object, **kwargs: object) -> object:
        calls.append("theirs")
        return ours(pool, *args, **kwargs)  # type: ignore[arg-type]

    concurrent.futures.ThreadPoolExecutor.submit = theirs  # type: ignore[method-assign,assignment]
    try:
        handle.close()
        with dspy.context(num_threads=3), concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: dspy.settings.num_threads).result() != 3
        assert calls == ["theirs"]
        with (
            dspy.propagate_to_threads(),
            dspy.context(num_threads=3),
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            assert pool.submit(lambda: dspy.settings.num_threads).result() == 3
    finally:
        concurrent.futures.ThreadPoolExecutor.submit = ours  # type: ignore[method-assign]
        dspy.propagate_to_threads().close()
    assert standard_classes_are_restored()


def test_a_pool_worker_started_under_propagation_keeps_nobodys_settings() -> None:
    """The first submitter's tenant must not stay in the worker for good."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with dspy.propagate_to_threads(), dspy.context(num_threads=3):
            assert pool.submit(lambda: dspy.settings.num_threads).result() == 3
        assert pool.submit(lambda: dspy.settings.num_threads).result() != 3


def test_a_thread_subclass_runs_its_own_run_under_propagation() -> None:
    """Not every thread has a target."""

    class Mine(threading.Thread):
        seen = 0

        def run(self) -> None:
            self.seen = dspy.settings.num_threads

    with dspy.propagate_to_threads(), dspy.context(num_threads=3):
        thread = Mine()
        thread.start()
    thread.join()
    assert thread.seen == 3


def test_async_functions_are_recognised_in_every_dress() -> None:
    """Partials and callable objects decide how the driver calls them."""

    class AsyncCallable:
        async def __call__(self) -> None: ...

    async def function() -> None: ...

    assert is_async(function)
    assert is_async(functools.partial(functools.partial(function)))
    assert is_async(AsyncCallable())
    assert not is_async(len)
    assert not is_async(asyncio.run)
    assert not is_async(AsyncCallable)
