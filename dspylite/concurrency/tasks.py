"""The tasks of an event loop that work on a run.

A run inside another shares its workers. Not here: what an item is (`concurrency/items.py`) and
how it ended (`concurrency/run.py`), and threads (`concurrency/crew.py`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from dspylite.concurrency.items import Item, invoke
from dspylite.concurrency.run import Budget, Run
from dspylite.runtime.bridge import came_from_thread
from dspylite.runtime.flow import ASYNC
from dspylite.runtime.interrupts import LOOK_EVERY_S, is_main_interrupted
from dspylite.runtime.loops import is_cancelled, post_quietly, poster, start_task
from dspylite.runtime.threads import InContext
from dspylite.runtime.workers import ON_DAEMONS

_TURN_S = 0.01
"""How long all tasks of a run together may keep the loop from its other tasks; guessed."""


class Tasks:
    """Runs a run as tasks of the running event loop.

    Args:
        num_tasks: Most items at once.
        room: Ended items that may wait to be fetched before the workers stand still. None: they
            are not fetched one by one.
    """

    def __init__(self, num_tasks: int, room: int | None = None) -> None:
        self._num_tasks = num_tasks
        self._room = room
        self._turn_s = _TURN_S / num_tasks
        self._ready: deque[Item] = deque()
        self._run: Run
        self._taking: anyio.Lock
        self._reading: anyio.CancelScope | None = None  # of the task that reads an async input
        self._live = 0
        self._all_ended: anyio.Event
        self._is_over = False
        self._error: BaseException | None = None
        self._something: anyio.Event  # set when an item is ready, or all is over
        self._fetched: anyio.Event  # set when there may be room again

    def hand_out(self, item: Item) -> None:
        """Take an ended item for `each`."""
        self._ready.append(item)
        self._something.set()

    async def work(self, run: Run) -> None:
        """Run to the end.

        Raises:
            CallCancelledError: The work that the run is part of was told to stop.
            KeyboardInterrupt: Ctrl-C met the main thread, while this loop runs in another.
        """
        self._run = run
        self._taking = anyio.Lock()
        self._all_ended = anyio.Event()
        run.open()
        limits = run.limits
        try:
            with anyio.move_on_after(limits.total_timeout_s) as whole:
                await self._work_together()
            if whole.cancelled_caught:
                run.stop_for_total_time()
                for item in run.active:
                    run.give_up(item, run.timed_out(item, time.monotonic() - item.started))
            run.flag.check()
        except BaseException:
            run.abort("it was cancelled")
            raise
        finally:
            run.close()

    async def each(self, run: Run) -> AsyncGenerator[Item, None]:
        """Run to the end and give each item when it has ended.

        The work is done by a task of its own, so that this generator may be left at any moment and
        closed by any task.

        Raises:
            CallCancelledError: As `work`.
            KeyboardInterrupt: As `work`.
        """
        self._something = anyio.Event()
        self._fetched = anyio.Event()
        scope = anyio.CancelScope()
        start_task(partial(self._work_aside, run, scope))
        try:
            while True:
                while self._ready:
                    item = self._ready.popleft()
                    self._fetched.set()
                    yield item
                if self._is_over:
                    break
                self._something = anyio.Event()
                await self._something.wait()
            if self._error is not None:
                raise self._error
        finally:
            scope.cancel()

    async def _work_aside(self, run: Run, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                await self.work(run)
        except BaseException as error:  # handed to the one who asks; trio breaks where it meets one
            self._error = error
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
        finally:
            self._is_over = True
            self._something.set()

    async def _work_together(self) -> None:
        run, width = self._run, self._num_tasks
        if run.total is not None:
            width = max(1, min(width, run.total))
        budget = run.outer_budget
        works_too = budget is not None
        if budget is None:
            budget = Budget(self._num_tasks)
            run.set_budget(budget)
        crew = budget.take(width - works_too)
        self._live = crew + works_too
        is_interrupted = False
        async with anyio.create_task_group() as group:
            run.flag.watch(partial(post_quietly, poster(), group.cancel_scope.cancel))
            for _ in range(crew):
                group.start_soon(self._work, budget)
            if works_too:
                await self._work(None)
            elif threading.current_thread() is not threading.main_thread():
                is_interrupted = await self._look_out()
                group.cancel_scope.cancel()
        if is_interrupted:
            raise KeyboardInterrupt

    async def _look_out(self) -> bool:
        """Wait until the workers have ended; tell whether Ctrl-C met the main thread before."""
        while not self._all_ended.is_set():
            with anyio.move_on_after(LOOK_EVERY_S):
                await self._all_ended.wait()
            if is_main_interrupted():
                return True
        return False

    async def _work(self, budget: Budget | None) -> None:
        try:
            turn_began = time.monotonic()
            while (item := await self._take()) is not None:
                await self._attend(item)
                if time.monotonic() - turn_began > self._turn_s:
                    await checkpoint()  # items that wait for nothing would stop the loop
                    turn_began = time.monotonic()
                if self._run.is_stopped and self._reading is not None:
                    self._reading.cancel()  # an input may never give its next item
                if self._room is not None:
                    await self._wait_for_room(self._room)
        finally:
            if budget is not None:
                budget.give()
            self._live -= 1
            if not self._live:
                self._all_ended.set()

    async def _take(self) -> Item | None:
        if not self._run.is_async:
            return self._run.take()
        async with self._taking:
            with anyio.CancelScope() as self._reading:
                return await self._run.atake()
        return None

    async def _attend(self, item: Item) -> None:
        """Keep the time of an item, and start it once more where that is asked for."""
        run, limits = self._run, self._run.limits
        if limits.timeout_s is None and limits.hedge_after_s is None:
            await self._attempt(item)
            return
        with anyio.move_on_after(limits.timeout_s) as scope:
            if limits.hedge_after_s is None:
                await self._attempt(item)
            else:
                await self._race(item, limits.hedge_after_s)
        if scope.cancelled_caught and limits.timeout_s is not None:
            run.give_up(item, run.timed_out(item, limits.timeout_s))

    async def _race(self, item: Item, hedge_after_s: float) -> None:
        run = self._run

        async def attempt() -> None:
            if not run.is_active(item):  # it ended before this task had its turn
                return
            await self._attempt(item)
            if not run.is_active(item):
                race.cancel_scope.cancel()

        async with anyio.create_task_group() as race:
            race.start_soon(attempt)
            await anyio.sleep(hedge_after_s)
            if run.begin_attempt(item):
                race.start_soon(attempt)

    async def _attempt(self, item: Item) -> None:
        run = self._run
        error: BaseException | None = None
        value: Any = None
        try:
            job = run.as_job(item.index, item.source)
            context = run.context_of(item)
            context.run(ON_DAEMONS.set, True)
            value = await InContext(context.run(invoke, ASYNC, job), context)
        except BaseException as caught:
            if _ends_the_task(caught):
                raise
            error = caught
        run.end_attempt(item, error, value)

    async def _wait_for_room(self, room: int) -> None:
        while len(self._ready) >= room:
            if self._fetched.is_set():  # else others wait for this very event
                self._fetched = anyio.Event()
            await self._fetched.wait()


def _ends_the_task(error: BaseException) -> bool:
    """Tell whether an exception is more than the end of one item.

    A Ctrl-C is, but not the `KeyboardInterrupt` of a worker thread, where no signal arrives; so is
    the closing of the task's coroutine; and a cancellation is, but not that of another task which
    the item awaited.
    """
    if isinstance(error, BaseExceptionGroup):
        return not came_from_thread(error) and any(map(_ends_the_task, error.exceptions))
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        return not came_from_thread(error)
    return isinstance(error, anyio.get_cancelled_exc_class()) and is_cancelled()
