"""What all calls to one endpoint with one key share: one thing each, without holding the key.

Not here: which things (`test_policies.py`).
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dspylite as dspy
from dspylite.models import endpoints
from dspylite.models.endpoints import endpoint_id, forget_endpoints, shared

KEY = "sk-a-key-that-must-not-be-seen"


class Thing:
    """Something with a state."""


def test_a_key_has_one_thing() -> None:
    """Two limits for one account would let twice as much through (B 4.5)."""
    first = shared("a", Thing)
    assert shared("a", Thing) is first
    assert shared("b", Thing) is not first


def test_many_threads_get_the_same_thing() -> None:
    """The first calls of a program often come all at once (B 4.5)."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(50):
            barrier, made = threading.Barrier(16), list[Thing]()

            def make(made: list[Thing] = made) -> Thing:
                made.append(Thing())
                return made[-1]

            def get(
                _: int,
                number: int = number,
                barrier: threading.Barrier = barrier,
                make: Callable[[], Thing] = make,
            ) -> Thing:
                barrier.wait(10)
                return shared(("raced", number), make)

            with ThreadPoolExecutor(16) as pool:
                got = list(pool.map(get, range(16)))
            assert len({id(thing) for thing in got}) == len(made) == 1
    finally:
        sys.setswitchinterval(before)


def test_things_are_remembered_for_the_next_lm() -> None:
    """A handler that makes an LM for each request must still know the limits (B 4.5)."""
    lm = dspy.LM("openai/m", api_base="http://x.invalid/v1", rpm=6)
    first = weakref.ref(lm.middleware[2])
    del lm
    gc.collect()
    again = dspy.LM("openai/m", api_base="http://x.invalid/v1", rpm=6)
    assert again.middleware[2] is first()


def test_memory_is_bounded_and_what_is_in_use_is_never_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service with a million tenants' keys must not keep a million states."""
    monkeypatch.setattr(endpoints, "_REMEMBERED", 100)
    in_use = shared("in use", Thing)
    refs = [weakref.ref(shared(("tenant", number), Thing)) for number in range(1000)]
    gc.collect()
    assert sum(ref() is not None for ref in refs) == 100
    assert all(ref() is not None for ref in refs[-100:])
    assert shared("in use", Thing) is in_use


def test_a_thing_that_is_asked_for_stays_among_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The busiest tenant is the last one to be forgotten."""
    monkeypatch.setattr(endpoints, "_REMEMBERED", 10)
    busy = weakref.ref(shared("busy", Thing))
    for number in range(200):
        shared(("tenant", number), Thing)
        assert shared("busy", Thing) is busy()


def test_a_maker_that_fails_leaves_nothing_behind() -> None:
    """A wrong parameter must not block the endpoint, nor be kept for it."""

    def fail() -> Thing:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        shared("failed", fail)
    assert isinstance(shared("failed", Thing), Thing)


def test_forgetting_makes_all_anew() -> None:
    """Two tests must not meet in the state of an endpoint; LMs made before keep theirs."""
    first = shared("a", Thing)
    lm = dspy.LM("openai/m", rpm=6)
    policy = lm.middleware[1]
    forget_endpoints()
    assert shared("a", Thing) is not first
    assert dspy.LM("openai/m", rpm=6).middleware[1] is not policy
    assert lm.middleware[1] is policy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_afresh_even_where_the_lock_was_held() -> None:
    """A lock held at the moment of the fork has no owner in the child (B 7.3)."""
    first = shared("a", Thing)
    reader, writer = os.pipe()
    with endpoints._SHARED._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                os.write(writer, b"same" if shared("a", Thing) is first else b"fresh")
            finally:
                os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    assert told == b"fresh"
    assert shared("a", Thing) is first


# --- The name of an endpoint ---------------------------------------------------------------------

BASE = "http://server:8000/v1"
SAME: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "slash": (("openai/m", {"api_base": BASE}), ("openai/m", {"api_base": BASE + "/"})),
    "spelling": (("openai/m", {"api_base": BASE}), ("openai/m", {"base_url": BASE})),
    "model": (("openai/a", {"api_base": BASE}), ("openai/b", {"api_base": BASE})),
    "provider": (("openai/a", {}), ("openai/b", {})),
    "bare name": (("gpt-4o", {}), ("openai/gpt-5", {})),
    "key": (("openai/m", {"api_key": KEY}), ("openai/n", {"api_key": str(KEY)})),
    "other parameters": (("openai/m", {"temperature": 1}), ("openai/m", {"timeout": 5})),
}
APART: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "key": (("openai/m", {"api_key": "a"}), ("openai/m", {"api_key": "b"})),
    "a key and none": (("openai/m", {"api_key": "a"}), ("openai/m", {})),
    "base": (("openai/m", {"api_base": BASE}), ("openai/m", {"api_base": BASE + "2"})),
    "a base and none": (("openai/m", {"api_base": BASE}), ("openai/m", {})),
    "provider": (("openai/m", {}), ("anthropic/m", {})),
    "key functions": (
        ("openai/m", {"api_key": lambda: "a"}),
        ("openai/m", {"api_key": lambda: "b"}),
    ),
    "odd keys": (("openai/m", {"api_key": ["a"]}), ("openai/m", {"api_key": ["b"]})),
}


@pytest.mark.parametrize(("one", "two"), list(SAME.values()), ids=list(SAME))
def test_one_endpoint_has_one_name(
    one: tuple[str, Mapping[str, Any]], two: tuple[str, Mapping[str, Any]]
) -> None:
    """What one account shares must be found however it is written (B 4.5)."""
    assert endpoint_id(*one) == endpoint_id(*two)
    assert hash(endpoint_id(*one)) == hash(endpoint_id(*two))


@pytest.mark.parametrize(("one", "two"), list(APART.values()), ids=list(APART))
def test_two_endpoints_have_two_names(
    one: tuple[str, Mapping[str, Any]], two: tuple[str, Mapping[str, Any]]
) -> None:
    """One tenant's overload must not hold up another (B 4.5)."""
    assert endpoint_id(*one) != endpoint_id(*two)


def test_the_name_of_an_endpoint_does_not_hold_the_key() -> None:
    """Names end up in dumps and debuggers (B 7.4)."""
    name = endpoint_id("openai/m", {"api_base": BASE, "api_key": KEY})
    assert KEY not in repr(name)
    assert KEY.encode() not in pickle.dumps(name)


def test_a_key_with_odd_characters_has_a_name() -> None:
    """A key read from a broken file fails at the provider, not here."""
    assert endpoint_id("openai/m", {"api_key": "\udcff"}) == endpoint_id(
        "openai/m", {"api_key": "\udcff"}
    )
