"""`Cached`: the policy by which a call is answered from the cache, or by an equal one under way.

Not here: where answers are kept (`cache.py`), and what makes requests equal (`keys.py`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from anyio.lowlevel import current_token

from dspylite.abc import Io, Next
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import current_cache
from dspylite.models.cache.flights import LEADING, Flight
from dspylite.models.cache.keys import describe
from dspylite.models.cache.rows import own_copy
from dspylite.models.middleware import Place
from dspylite.models.streams import WatchedStream
from dspylite.runtime.flow import BLOCKING
from dspylite.runtime.frames import is_second_start
from dspylite.runtime.loops import STANDING_STILL, running_library
from dspylite.runtime.settings import settings
from dspylite.runtime.workers import holds_worker
from dspylite.schema.messages import Attempt, DeltaSource, LMRequest, LMResponse, Usage, Verdict

logger = logging.getLogger(__name__)

_LEADERS_AWAITED = 2
"""How many leaders may fail before those who waited ask for themselves, all at once: a queue of
callers that time out one after the other would be as long as their number."""


@dataclass(frozen=True, slots=True)
class Cached:
    """Answers a call from the cache, or by an equal one under way, if it can.

    Of equal calls under way at once, in whatever threads and loops, one makes the request. If it
    fails or is cancelled, another one does. An answer is kept when its reader has accepted it.

    Attributes:
        kind: What tells the model's answers from those of others with the same name.
        manner: How long and how often the model tries: nobody in a hurry waits for a patient one.
    """

    place: ClassVar[Place] = "cache"

    kind: str
    manner: str = ""

    async def handle(self, request: LMRequest, call_next: Next, io: Io) -> LMResponse:
        """Answer from memory, from disk, from a call under way, or by making the request."""
        cache = current_cache()
        # One salt for all keys of a call, also where the directory gets its own meanwhile.
        salt = cache.salt if cache.is_salt_kept else functools.cache(cache.salt)
        key = self.key(request, cache, salt) if request.cache and cache.is_on else None
        if key is None:
            return await call_next(request)
        started = io.now()
        found = cache.read(key)
        if found is not None:
            return _reused(found, request, io.now() - started, _Kept(cache, key))
        if request.stream or key in LEADING.get() or is_second_start():
            return await self._ask(_Asked(self, request, cache, key, salt), call_next)
        loop = None if io is BLOCKING else current_token().native_token
        # Whoever is in a hurry must not wait for one that has more time.
        name = f"{key} {request.params.get('timeout')} {self.manner}"
        for _ in range(_LEADERS_AWAITED):
            flight, is_leader = cache.flights.join(name, loop)
            if is_leader:
                return await self._lead(
                    _Asked(self, request, cache, key, salt, flight=flight), call_next, io
                )
            if not _goes_on(flight, loop):
                break
            async with io.enter(flight):
                pass
            if flight.response is not None:
                cache.count("shared")
                return _reused(own_copy(flight.response), request, io.now() - started, None)
        return await self._ask(_Asked(self, request, cache, key, salt), call_next)

    async def _lead(self, asked: _Asked, call_next: Next, io: Io) -> LMResponse:
        """Answer for all who wait."""
        flights, flight = asked.cache.flights, cast("Flight", asked.flight)
        token = LEADING.set(LEADING.get() | {asked.key})
        started = io.now()
        try:
            # Another may have kept the answer since this one looked; what is kept is in memory.
            cache = asked.cache
            found = (cache.recall if cache.enable_memory_cache else cache.read)(asked.key)
            if found is not None:
                flights.answered(flight, found)
                flights.end(flight)
                kept = _Kept(asked.cache, asked.key)
                return _reused(own_copy(found), asked.request, io.now() - started, kept)
            response = await self._ask(asked, call_next)
        except BaseException:
            flights.end(flight)
            raise
        finally:
            try:
                LEADING.reset(token)
            except ValueError:
                pass  # closed from another context: what was set ended with the one it was set in
        if response.verdict is asked and asked.response is not None:
            flights.answered(flight, asked.response)
        else:  # it is not kept, or by another model that answered
            flights.end(flight)
        return response

    @staticmethod
    async def _ask(asked: _Asked, call_next: Next) -> LMResponse:
        asked.cache.count("misses")
        response = await call_next(asked.request)
        if response.answered_by or response.verdict is not None:
            return response
        if not asked.is_unchanged():
            logger.debug("a request to %s changed under way; not kept", asked.request.model)
            return response
        if response.stream is not None:
            return replace(response, stream=_KeptStream(response.stream, asked))
        # Whoever listens to the call may change the answer before its reader has judged it.
        asked.response = own_copy(replace(response, attempts=()))
        return replace(response, verdict=asked)

    def key(
        self, request: LMRequest, cache: Cache, salt: Callable[[], bytes] | None = None
    ) -> str | None:
        """Return the key of a request; None if it can have none, and is never kept.

        Args:
            request: The request.
            cache: Where its answer is kept.
            salt: Gives the salt of fingerprints. None: that of the cache.
        """
        try:
            return cache.cache_key(
                describe(
                    request,
                    kind=self.kind,
                    namespace=settings.cache_namespace,
                    salt=cache.salt if salt is None else salt,
                )
            )
        # A function among the parameters, or a key's function that fails: the engine says more.
        except Exception as error:  # noqa: BLE001  # logged here; the call goes on
            logger.debug("a call to %s cannot be cached: %s", request.model, type(error).__name__)
            return None


def _goes_on(flight: Flight, loop: object) -> bool:
    """Tell whether a request goes on while this caller waits for it."""
    if loop is None and running_library() is not None:
        # The loop of this thread will stand still, with all calls in it that others wait for.
        return False
    if flight.loop is not None and holds_worker():
        return False
    if flight.thread == threading.get_ident():
        return loop is not None and flight.loop is loop
    return flight.thread not in STANDING_STILL.get()


class _Kept:
    """The verdict on an answer that came from the cache."""

    __slots__ = ("_cache", "_key")

    def __init__(self, cache: Cache, key: str) -> None:
        self._cache = cache
        self._key = key

    def accept(self) -> None:
        """Leave it where it is."""

    def reject(self) -> None:
        """Forget it, or whoever asks the same would never get another."""
        self._cache.drop(self._key)


class _Asked:
    """A request that is made, and the verdict on its answer.

    Attributes:
        request: The request.
        cache: Where the answer is kept.
        key: Under what.
        flight: Where others wait for it; None where nobody can.
        response: The answer.
    """

    __slots__ = (
        "_context", "_is_open", "_policy", "_salt", "cache", "flight", "key", "request", "response",
    )  # fmt: skip

    def __init__(
        self,
        policy: Cached,
        request: LMRequest,
        cache: Cache,
        key: str,
        salt: Callable[[], bytes],
        *,
        flight: Flight | None = None,
    ) -> None:
        self._policy = policy
        self._salt = salt
        # For the key, which is made once more where its salt was not the directory's.
        self._context = None if cache.is_salt_kept else copy_context()
        self._is_open = True
        self.request = request
        self.cache = cache
        self.key = key
        self.flight = flight
        self.response: LMResponse | None = None

    def is_unchanged(self) -> bool:
        """Tell whether the request still is what its key says.

        Lists and dicts in it are the caller's, and its key's function and the environment may say
        something else by now: the answer may be that to another request, or for another tenant.
        """
        return self._policy.key(self.request, self.cache, self._salt) == self.key

    def accept(self) -> None:
        """Keep the answer."""
        if not self._is_open:
            return
        self._is_open = False
        key: str | None = self.key
        if self._context is not None:
            # The directory is made now, and another process may have been faster with the salt.
            self.cache.salt(make=True)
            key = self._context.run(self._policy.key, self.request, self.cache)
            if not self._context.run(self.is_unchanged):
                key = None
        try:
            if key is not None and self.response is not None and _is_whole(self.response):
                self.cache.write(key, self.response)
                self.key = key
        except (TypeError, ValueError, RecursionError):
            logger.debug("an answer of %s has no form in JSON", self.request.model)
        finally:
            self._end()

    def reject(self) -> None:
        """Let the next one who asks the same ask for itself."""
        if self._is_open:
            self._is_open = False
            self._end()

    def _end(self) -> None:
        if self.flight is not None:
            self.cache.flights.end(self.flight)

    def __del__(self) -> None:
        """Take no verdict for a rejection."""
        if self.flight is not None:
            self.reject()


class _KeptStream(WatchedStream):
    """A stream whose answer can be kept when it has come to its proper end."""

    def __init__(self, source: DeltaSource, asked: _Asked) -> None:
        super().__init__(source)
        self._asked = asked

    @property
    def response(self) -> LMResponse:
        """All pieces so far as one answer; after the end, to be judged."""
        response = super().response
        if self._asked.response is None or response.verdict is not None:
            return response
        return replace(response, verdict=self._asked)

    def ended(self) -> None:
        response = self.response
        if not response.answered_by:  # a fallback keeps its answers itself
            whole = replace(response, attempts=(), stream=None, verdict=None)
            self._asked.response = own_copy(whole)


def _is_whole(response: LMResponse) -> bool:
    """Tell whether each output says something, and none was cut out by the provider's policy."""
    return all(
        (output.text or output.tool_calls) and output.finish_reason != "content_filter"
        for output in response.outputs
    )


def _reused(
    found: LMResponse, request: LMRequest, seconds: float, verdict: Verdict | None
) -> LMResponse:
    """Return a kept or shared answer as that of a call that took no request."""
    return LMResponse(
        outputs=found.outputs,
        usage=Usage(cached_calls=1),
        model=found.model,
        request_id=found.request_id,
        attempts=(Attempt(model=request.model, seconds=seconds, cached=True),),
        cached=True,
        verdict=verdict,
    )
