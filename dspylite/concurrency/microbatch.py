"""`MicroBatcher`: many single calls become few calls of one function over lists.

Not here: who waits, and which batch goes out when (`concurrency/batching.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Set
from contextvars import Context, ContextVar
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from dspylite.abc import Io
from dspylite.concurrency.batching import Batch, Call, Kind, Line, Rules, closed_error
from dspylite.errors import (
    BatchError,
    BatchShapeError,
    CallCancelledError,
    DeadlineExceededError,
    ItemSkippedError,
    ModuleError,
    SettingsError,
)
from dspylite.runtime.cancellation import CANCELLATION, check_cancelled
from dspylite.runtime.clock import CLOCK, Deadline, deadline_error
from dspylite.runtime.flow import ASYNC, BLOCKING, run_flow
from dspylite.runtime.forks import watch_forks
from dspylite.runtime.settings import overlay, pin, settings
from dspylite.runtime.tracking import SharedTracker

X = TypeVar("X")
Y = TypeVar("Y")

_Outcome = tuple[Any, Exception | None]

_WITHIN: ContextVar[frozenset[object]] = ContextVar("dspylite_within_batches", default=frozenset())
"""The batchers for whose batches this context works."""


class MicroBatcher(Generic[X, Y]):
    """Turns single calls, from any thread and event loop, into calls of one function over lists.

    A call waits until `max_batch_size` items are there, or until `max_wait_time` seconds after the
    first of them. The function is then given the list, and each caller its own result. Batches run
    on threads of the batcher's own, which are started when needed and end when idle; no event loop
    is blocked, whether the function is sync or async.

    Calls share a batch only where their settings are the same, so that nothing crosses between the
    tenants of a service: what was changed by `context(...)` around the caller holds in the
    function too. Other context variables do not reach it. Tokens that the function spends are
    divided among the trackers of its callers.

    Where the function raises `BatchError`, each caller gets the result or the error at the index of
    its item; any other exception goes to all callers of the batch.

    Args:
        batch_fn: From a list of items to one result per item, in their order; sync or async.
        max_batch_size: Most items in one call of it.
        max_wait_time: Longest wait of a batch for further items, in seconds; 0 waits for none.
        max_concurrency: Most batches at once. While as many run, items gather. More than 1 needs
            a function that may run on several threads at once.
        max_queue: Most items that may wait to be sent; a further one is refused. None: no limit.

    Raises:
        ModuleError: `batch_fn` is no function.
        SettingsError: A parameter cannot work.

    Example:
        >>> def lengths(texts: list[str]) -> list[int]:
        ...     return [len(text) for text in texts]
        >>> with MicroBatcher(lengths, max_wait_time=0.01) as length_of:
        ...     length_of("four")
        4
    """

    def __init__(
        self,
        batch_fn: Callable[[list[X]], Iterable[Y] | Awaitable[Iterable[Y]]],
        max_batch_size: int = 32,
        max_wait_time: float = 0.1,
        *,
        max_concurrency: int = 1,
        max_queue: int | None = None,
    ) -> None:
        if not callable(batch_fn):
            raise ModuleError(f"`MicroBatcher` takes a function over a list, not {batch_fn!r}.")
        _check_count("max_batch_size", max_batch_size)
        _check_count("max_concurrency", max_concurrency)
        if max_queue is not None:
            _check_count("max_queue", max_queue)
        if (
            isinstance(max_wait_time, bool)
            or not isinstance(max_wait_time, int | float)
            or not 0 <= max_wait_time < math.inf
        ):
            raise SettingsError(
                f"`max_wait_time` must be a number of seconds, at least 0, not {max_wait_time!r}."
            )
        self.batch_fn = batch_fn
        self.max_batch_size = max_batch_size
        self.max_wait_time = max_wait_time
        self.max_concurrency = max_concurrency
        self.max_queue = max_queue
        self.reset_after_fork()
        watch_forks(self)

    def reset_after_fork(self) -> None:
        """Forget who waits: their threads are not here."""
        rules = Rules(self.max_batch_size, self.max_wait_time, self.max_concurrency, self.max_queue)
        clock = CLOCK.get()
        self._line = Line(self._answer, rules, clock)
        # Calls made by a batch are not held up by the limit, as the batch would wait for itself.
        free = Rules(self.max_batch_size, self.max_wait_time, math.inf, None)
        self._inner = Line(self._answer, free, clock)

    def __call__(self, input_item: X) -> Y:
        """Wait on this thread for the result of one item.

        A caller that gives up (its deadline, its cancellation) takes its item back where that is
        not sent yet. The others of its batch do not notice.

        Raises:
            BatchShapeError: The function did not return one result per item.
            CallCancelledError: This work was told to stop, or the function was.
            ClosedError: The batcher is closed.
            DeadlineExceededError: The time of the call, `settings.deadline_s`, is up.
            OverloadedError: `max_queue` items wait already.
            Exception: What the function raised.
        """
        return run_flow(self.plan(BLOCKING, input_item))

    async def acall(self, input_item: X) -> Y:
        """Await the result of one item; otherwise as a call."""
        return await self.plan(ASYNC, input_item)

    async def plan(self, io: Io, input_item: X) -> Y:
        """Wait for the result through a driver, as part of another plan."""
        check_cancelled()
        within = _WITHIN.get()
        if within and self._line.is_closed and self not in within:
            raise closed_error()
        outer = _copied(overlay())
        kind = Kind(_likeness(_shareable(outer)), within) if outer or within else _USUAL
        call = Call(self._inner if within else self._line, input_item, kind, outer)
        with Deadline(settings.deadline_s):
            try:
                async with io.enter(call):
                    pass
            except DeadlineExceededError:
                raise deadline_error("the item waited for its batch") from None
        if call.error is None:
            return cast("Y", call.value)
        try:
            raise call.error
        finally:
            call.error = None  # else it would hold itself, by its traceback and this frame

    # -- closing -----------------------------------------------------------------------------------

    def close(self, *, drop: bool = False) -> None:
        """Take no further items, send those that wait, and wait until all are answered.

        Later calls raise `ClosedError`. A repeat does no more than wait. Called by the function
        itself it does not wait.

        Args:
            drop: Whether items that wait get a `ClosedError` instead of being sent.
        """
        run_flow(self._close(BLOCKING, drop=drop))

    async def aclose(self, *, drop: bool = False) -> None:
        """Await the end; otherwise as `close`."""
        await self._close(ASYNC, drop=drop)

    async def _close(self, io: Io, *, drop: bool) -> None:
        self._line.close(drop=drop)
        if self in _WITHIN.get():
            return  # this batch is one of those that would be waited for
        async with io.enter(self._line):
            pass
        self._inner.close(drop=drop)
        async with io.enter(self._inner):
            pass

    def _leave(self, error: BaseException | None) -> bool:
        """Tell whether the end of a block must wait; after Ctrl-C or a cancellation it must not."""
        if error is None or isinstance(error, Exception):
            return True
        self._line.close(drop=True)
        self._inner.close(drop=True)
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; at once and without what waits, where Ctrl-C or the like ends the block."""
        if self._leave(exc):
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; at once and without what waits, where the task is cancelled."""
        if self._leave(exc):
            await self.aclose()

    # -- copies ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Keep the parameters; items wait where they were given."""
        return {
            "batch_fn": self.batch_fn,
            "max_batch_size": self.max_batch_size,
            "max_wait_time": self.max_wait_time,
            "max_concurrency": self.max_concurrency,
            "max_queue": self.max_queue,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start anew, open."""
        self.__init__(**state)  # type: ignore[misc]  # the parameters that it was made with

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return another one over the same function, which a copy of a program shares."""
        made = copy.copy(self)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:
        name = getattr(self.batch_fn, "__qualname__", None) or type(self.batch_fn).__name__
        return (
            f"{type(self).__name__}({name}, max_batch_size={self.max_batch_size}, "
            f"max_wait_time={self.max_wait_time})"
        )

    # -- one batch ---------------------------------------------------------------------------------

    def _answer(self, batch: Batch) -> None:
        calls = batch.sent or ()
        try:
            # An empty context: no caller's is that of its neighbours.
            outcomes = Context().run(run_flow, self._ask(batch, [call.item for call in calls]))
        except BaseException as error:  # noqa: BLE001  # whatever it is, nobody must wait for ever
            outcomes = _shared(error, len(calls))
        for call, (value, failure) in zip(calls, outcomes, strict=True):
            call.settle(value, failure)

    async def _ask(self, batch: Batch, items: list[X]) -> list[_Outcome]:
        trackers = [(call.overlay or {}).get(_TRACKER) for call in batch.sent or ()]
        if any(tracker is not None for tracker in trackers):
            pin({**(batch.overlay or {}), _TRACKER: SharedTracker(trackers)})
        else:
            pin(batch.overlay)
        CANCELLATION.set(batch.flag)
        _WITHIN.set(batch.kind.within | {self})
        count = len(items)
        made: Any = await BLOCKING.any(self.batch_fn, items)
        if isinstance(made, str | bytes | Mapping | Set) or not isinstance(made, Iterable):
            raise BatchShapeError(
                f"The batch function must return a list with one result for each of its {count} "
                f"items, not {made!r:.100}.",
                expected=count,
            )
        values: list[Any] = list(made)
        if len(values) != count:
            raise BatchShapeError(
                f"The batch function was given {count} items and returned {len(values)} results, "
                "so nobody knows whose they are, and none is used. It must return one result per "
                "item, in their order.",
                expected=count,
                returned=len(values),
            )
        return [(value, None) for value in values]


Unbatchify = MicroBatcher
"""`MicroBatcher` under the name that it has in DSPy."""


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"`{name}` must be a whole number of at least 1, not {value!r}.")


class _Same:
    """A value that is like itself alone; it is never compared."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


_TRACKER = "usage_tracker"


def _shareable(outer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that all callers of a batch must have.

    Whoever counts usage gets a share of the batch's: each module and each item of a batch counts
    its own, and would have no neighbours else.
    """
    return {} if outer is None else {k: v for k, v in outer.items() if k != _TRACKER}


_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})


def _likeness(value: object, depth: int = 0) -> Hashable:
    """Return what equals that of another value only where the two are the same to a program.

    Plain data by its value, all else by identity: models, budgets, lists to record into.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is tuple and depth < 4:
        return kind, tuple([_likeness(part, depth + 1) for part in cast("tuple[Any, ...]", value)])
    if kind is dict and depth < 4:
        pairs = cast("dict[Any, Any]", value).items()
        return kind, frozenset([(_likeness(k, 4), _likeness(v, depth + 1)) for k, v in pairs])
    return _Same(value)


def _copied(value: Any, depth: int = 0) -> Any:
    """Copy what `_likeness` compares by its value.

    What one caller changes in it while the batch waits would else hold for its neighbours.
    """
    if type(value) is dict and depth < 4:
        held: dict[Any, Any] = value
        return {key: _copied(part, depth + 1) for key, part in held.items()}
    if type(value) is tuple and depth < 4:
        parts: tuple[Any, ...] = value
        return tuple([_copied(part, depth + 1) for part in parts])
    return value


_USUAL = Kind(_likeness({}), frozenset())
"""That of callers who have changed no settings."""


def _shared(error: BaseException, count: int) -> list[_Outcome]:
    """Give each caller its part of what a batch function raised."""
    if isinstance(error, BatchError) and _tells_all(error, count):
        return [_part(error, index) for index in range(count)]
    return [(None, _own(error)) for _ in range(count)]


def _tells_all(error: BatchError, count: int) -> bool:
    """Tell whether it is of this batch, and not of another one that the function made inside."""
    known = {*error.results, *error.errors}
    if not known or not known <= set(range(count)):
        return False
    return error.untried is None or len(known) + error.untried == count


def _part(error: BatchError, index: int) -> _Outcome:
    if index in error.results:
        return error.results[index], None
    if index in error.errors:
        return None, _own(error.errors[index])
    return None, ItemSkippedError("The batch stopped before it came to this item.", index=index)


def _own(error: BaseException) -> Exception:
    """Return an exception for one caller.

    Raised by many callers at once, a shared one would gather the frames of all. Where it cannot be
    copied it is shared after all.
    """
    if not isinstance(error, Exception):
        # Raised on its way through an event loop, it would end the loop and all that is in it.
        stopped = CallCancelledError(
            f"The batch function was ended by {type(error).__name__}, so its items have no results."
        )
        stopped.__cause__ = error
        return stopped
    try:
        twin = copy.copy(error)
        if type(twin) is not type(error) or twin is error or str(twin) != str(error):
            return error
    except Exception:  # noqa: BLE001  # a user's exception, whose constructor may do anything
        return error
    twin.__context__ = error.__context__
    twin.__cause__ = error.__cause__
    twin.__suppress_context__ = error.__suppress_context__
    if notes := getattr(error, "__notes__", None):
        twin.__notes__ = list(notes)
    return twin.with_traceback(error.__traceback__)
