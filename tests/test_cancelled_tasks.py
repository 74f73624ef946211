"""Tasks that are cancelled in the middle of our awaits, by every way that event loops have (B 3.2).

Not here: what the threads behind them see (`test_cancellation.py`, `test_worker_places.py`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio

import dspylite as dspy
from dspylite.runtime.cancellation import Cancellation
from dspylite.runtime.workers import _loop
from dspylite.testing import FakeServer, Reply

SOON_S = 5.0
"""Far above what anything here takes on a busy machine; whatever takes longer hangs."""


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """Start one server for the module."""
    with FakeServer(dimensions=4) as server:
        yield server


def lm_of(server: FakeServer, **options: Any) -> dspy.LM:
    given = {"api_base": server.base_url, "api_key": "none", "num_retries": 0, "engine": "direct"}
    return dspy.LM("openai/m", **given | options)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


async def until(is_so: Callable[[], object]) -> None:
    """Await until something is so, and fail if that takes long."""
    with anyio.fail_after(SOON_S):
        while not is_so():
            await anyio.sleep(0.001)


# --- What is cancelled ----------------------------------------------------------------------------


class OnlyForward(dspy.Module):
    """A module that must be run in a thread, and asks a model there."""

    def __init__(self, lm: dspy.LM) -> None:
        self.lm = lm

    def forward(self, question: str) -> Any:
        return self.lm(question)


async def acall(server: FakeServer) -> None:
    await lm_of(server, num_retries=3).acall("held")


async def acall_of_a_program(server: FakeServer) -> None:
    with dspy.context(lm=lm_of(server)):
        await dspy.Predict("question -> answer").acall(question="held")


async def acall_of_a_sync_module(server: FakeServer) -> None:
    await OnlyForward(lm_of(server)).acall(question="held")


async def asyncified(server: FakeServer) -> None:
    await dspy.asyncify(lm_of(server))("held")


async def abatch(server: FakeServer) -> None:
    await dspy.Parallel(num_threads=3).aover(lm_of(server), ["held"] * 9)


async def abatch_of_a_sync_module(server: FakeServer) -> None:
    await OnlyForward(lm_of(server)).abatch([{"question": "held"}] * 9, 3)


async def abatch_with_limits(server: FakeServer) -> None:
    parallel = dspy.Parallel(num_threads=3, timeout_s=60, hedge_after_s=50, total_timeout_s=70)
    await parallel.aover(lm_of(server), ["held"] * 9)


async def abatch_one_by_one(server: FakeServer) -> None:
    async for _ in dspy.Parallel(num_threads=3).aeach(lm_of(server), ["held"] * 9):
        raise AssertionError("nothing is answered")


async def opening_a_stream(server: FakeServer) -> None:
    async with await lm_of(server).astream("held"):
        raise AssertionError("nothing is answered")


async def reading_a_stream(server: FakeServer) -> None:
    server.script(Reply(chunks=["a"] * 500, chunk_delay_s=0.02))
    async with await lm_of(server).astream("read") as stream:
        async for _ in stream:
            pass


async def aembed(server: FakeServer) -> None:
    embedder = dspy.Embedder(
        "openai/m",
        api_base=server.base_url,
        api_key="none",
        engine="direct",
        batch_size=2,
        max_concurrency=3,
    )
    await embedder.aembed([f"held {number}" for number in range(20)])


async def between_attempts(server: FakeServer) -> None:
    server.script(Reply(status=503, headers={"retry-after": "20"}))
    await lm_of(server, num_retries=3, adaptive=False).acall("busy")


WORK = [
    acall, acall_of_a_program, acall_of_a_sync_module, asyncified, abatch, abatch_of_a_sync_module,
    abatch_with_limits, abatch_one_by_one, opening_a_stream, reading_a_stream, aembed,
    between_attempts,
]  # fmt: skip

ANSWERED = {reading_a_stream, between_attempts}
"""What is cancelled after its answer has begun."""

# --- How it is cancelled --------------------------------------------------------------------------

Run = Callable[[], Coroutine[Any, Any, None]]
Begun = Callable[[], Awaitable[object]]


async def by_cancelling_the_task(work: Run, begun: Begun) -> None:
    task = asyncio.create_task(work())
    await begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_wait_for(work: Run, begun: Begun) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(work(), 0.15)


async def by_a_timeout(work: Run, begun: Begun) -> None:
    async def end_it() -> None:
        await begun()
        limit.reschedule(0)

    with pytest.raises(TimeoutError):  # noqa: PT012
        async with asyncio.timeout(None) as limit:
            other = asyncio.create_task(end_it())
            await work()
    await other


async def by_move_on_after(work: Run, begun: Begun) -> None:
    async def end_it() -> None:
        await begun()
        scope.deadline = -1

    async with anyio.create_task_group() as group:
        with anyio.move_on_after(60) as scope:
            group.start_soon(end_it)
            await work()
        assert scope.cancelled_caught


async def by_the_end_of_a_group(work: Run, begun: Begun) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await begun()
        group.cancel_scope.cancel()


async def by_a_nursery_of_trio(work: Run, begun: Begun) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await begun()
        nursery.cancel_scope.cancel()


async def by_a_scope_of_trio(work: Run, begun: Begun) -> None:
    async def end_it() -> None:
        await begun()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(end_it)
            await work()
        assert scope.cancelled_caught


WAYS = [
    ("asyncio", by_cancelling_the_task), ("asyncio", by_wait_for), ("asyncio", by_a_timeout),
    ("asyncio", by_move_on_after), ("asyncio", by_the_end_of_a_group),
    ("trio", by_move_on_after), ("trio", by_a_nursery_of_trio), ("trio", by_a_scope_of_trio),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "way"), WAYS, ids=lambda it: getattr(it, "__name__", it))
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_a_cancelled_task_ends_at_once_and_leaves_nothing(
    work: Callable[[FakeServer], Coroutine[Any, Any, None]],
    backend: str,
    way: Callable[[Run, Begun], Awaitable[None]],
    server: FakeServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No task, no place, no socket, no noise; and the loop goes on as before (B 3.2, 3.7)."""
    before = 0

    async def begun() -> None:
        await anyio.to_thread.run_sync(server.wait_for_requests, 1)

    async def once() -> None:
        server.clear()
        started = time.monotonic()
        with nullcontext() if work in ANSWERED else server.hold():
            await way(lambda: work(server), begun)
            assert time.monotonic() - started < SOON_S
            await anyio.to_thread.run_sync(server.wait_until_idle)
        await until(lambda: _loop().limiter().statistics().borrowed_tokens == 0)
        assert await lm_of(server).acall("later") == ["echo: later"]
        # Three at once, and one that was on its way when it was cancelled may be read at any time.
        assert len(server.requests) <= 3 + 1
        assert all(each.client_left or each.status == 503 for each in server.requests[:1])

    async def main() -> None:
        nonlocal before
        await lm_of(server).acall("warm")
        await once()
        before = descriptors()
        for _ in range(2):
            await once()
        if backend == "asyncio":
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        await until(lambda: descriptors() <= before + 1)

    with Cancellation() as flag:
        anyio.run(main, backend=backend)
    assert flag._watchers == {}
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= 30] == []
    assert capfd.readouterr().err == ""


# --- What had finished ----------------------------------------------------------------------------


def _item_that_hangs(begun: Callable[[], None]) -> Callable[[int], Any]:
    async def item(number: int) -> int:
        if number >= 3:
            begun()
            await anyio.sleep(4 * SOON_S)
        return number * 10

    return item


def _sync_item_that_hangs(begun: Callable[[], None]) -> Callable[[int], Any]:
    def item(number: int) -> int:
        if number >= 3:
            begun()
            ends_at = time.monotonic() + 4 * SOON_S
            while time.monotonic() < ends_at:
                dspy.check_cancelled()
        return number * 10

    return item


@pytest.mark.parametrize(
    ("backend", "way"),
    [("asyncio", "cancel"), ("asyncio", "wait_for"), ("asyncio", "scope"), ("trio", "scope")],
)
@pytest.mark.parametrize("make", [_item_that_hangs, _sync_item_that_hangs])
def test_what_a_cancelled_batch_had_finished_can_be_found(
    backend: str, way: str, make: Callable[[Callable[[], None]], Callable[[int], Any]]
) -> None:
    """In whatever the event loop makes of the cancellation (B 3.2, 2.2)."""
    started = threading.Event()
    caught: list[BaseException] = []

    async def run() -> None:
        try:
            await dspy.Parallel(num_threads=1).aover(make(started.set), range(9))
        except BaseException as error:
            caught.append(error)
            raise

    async def main() -> None:
        if way == "wait_for":
            try:
                await asyncio.wait_for(run(), 0.5)
            except TimeoutError as error:
                caught.append(error)
        elif way == "cancel":
            task = asyncio.create_task(run())
            await until(started.is_set)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError as error:
                caught.append(error)
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(run)
                await until(started.is_set)
                group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
    assert len(caught) == (1 if way == "scope" else 2)
    for error in caught:
        assert dspy.finished_results(error) == {0: 0, 1: 10, 2: 20}


# --- Streams of trio, which are opened and read in threads ----------------------------------------


@pytest.mark.parametrize("engine", ["direct", "litellm"])
def test_a_stream_opened_for_a_task_that_is_gone_is_closed(engine: str, server: FakeServer) -> None:
    """Nobody else could: the task never got it (B 3.2, 3.4)."""
    opened, go_on = threading.Event(), threading.Event()
    lm = lm_of(server, engine=engine)
    lm("a first call, which may load litellm")
    server.clear()
    call = type(lm.engine).call

    def slowly(self: Any, request: Any) -> Any:
        response = call(self, request)
        opened.set()
        assert go_on.wait(SOON_S)  # the task is cancelled between the opening and the return
        return response

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lm.astream, "hi")
            await anyio.to_thread.run_sync(opened.wait, SOON_S)
            group.cancel_scope.cancel()
        go_on.set()
        await anyio.to_thread.run_sync(server.wait_until_idle)

    server.script(Reply(chunks=["a"] * 500, chunk_delay_s=0.02))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lm.engine), "call", slowly)
        anyio.run(main, backend="trio")
    assert [request.client_left for request in server.requests] == [True]


def test_a_read_that_was_cancelled_ends_its_thread(server: FakeServer) -> None:
    """Though no further piece comes, and the stream's holder does not close it (B 3.2, 3.4)."""
    server.script(Reply(chunks=["a", "b"], cut_after=1, keepalive_comments=True))

    async def main() -> None:
        stream = await lm_of(server).astream("hi")
        assert (await anext(stream)).text == "a"
        with anyio.move_on_after(0.1):
            await anext(stream)
        await until(lambda: _loop().limiter().statistics().borrowed_tokens == 0)
        await anyio.to_thread.run_sync(server.wait_until_idle)

    anyio.run(main, backend="trio")
    assert [request.client_left for request in server.requests] == [True]
