"""`request_cache`: users' functions answered from the cache of the process.

Not here: the cache itself (`test_cache_*.py`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import dspylite
from dspylite.errors import InputFieldError
from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import use_cache
from dspylite.models.cache.remembered import request_cache
from tests.cache_tools import ROOT, python, said_by

CALLED: list[Any] = []


@pytest.fixture(autouse=True)
def cache() -> Cache:
    """Give each test a cache in memory, which the suite's own fixture takes away again."""
    CALLED.clear()
    mine = Cache(enable_disk_cache=False)
    use_cache(mine)
    return mine


@request_cache()
def plain(x: Any, y: Any = 1, **more: Any) -> Any:
    """Say what it was given."""
    CALLED.append(x)
    return {"x": x, "y": y, **more}


@request_cache()
async def awaited(x: Any) -> Any:
    """Say what it was given, later."""
    CALLED.append(x)
    return [x]


def test_equal_calls_are_made_once() -> None:
    """However the arguments are passed, and whether a default is named."""
    first = plain(3)
    assert first == plain(x=3) == plain(3, 1) == plain(y=1, x=3) == {"x": 3, "y": 1}
    assert CALLED == [3]
    assert [plain(3, 2)["y"], plain(3, z=1)["z"], plain(4)["x"]] == [2, 1, 4]
    assert CALLED == [3, 3, 3, 4]


def test_answer_is_the_callers_own() -> None:
    """Who changes what it got changes nobody else's."""
    plain(3)["x"] = "spoilt"
    plain(3)["x"] = "spoilt"
    assert plain(3)["x"] == 3


@pytest.mark.anyio
async def test_async_function_stays_one_and_is_made_once() -> None:
    """The decorator of a sync function serves an async one too."""
    assert [await awaited(1), await awaited(x=1), await awaited(2)] == [[1], [1], [2]]
    assert CALLED == [1, 2]


def test_function_keeps_its_name_and_words() -> None:
    """Tools and docs read them."""
    assert (plain.__name__, plain.__doc__) == ("plain", "Say what it was given.")


def test_one_argument_may_hold_the_request() -> None:
    """DSPy's form: a dict says all, and what is beside it does not count."""

    def ask(request: dict[str, Any], retries: int = 0) -> Any:
        CALLED.append(retries)
        return request["q"]

    cached = request_cache(cache_arg_name="request", ignored_args_for_cache_key=["trace"])(ask)
    assert [cached({"q": 1, "trace": 1}), cached(request={"q": 1}, retries=5)] == [1, 1]
    assert cached({"q": 2}) == 2
    assert CALLED == [0, 0]
    with pytest.raises(InputFieldError, match=r"`request` of .* must be a dict.* is 'text'"):
        cached("text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputFieldError, match="has no argument `nope`"):
        request_cache("nope")(ask)


def test_ignored_arguments_make_no_difference() -> None:
    """Such as the object that a method belongs to."""

    class Client:
        @request_cache(ignored_args_for_cache_key=["self"])
        def ask(self, x: int) -> int:
            CALLED.append(x)
            return x

    assert [Client().ask(1), Client().ask(1)] == [1, 1]
    assert CALLED == [1]


def test_endpoint_and_key_keep_calls_apart(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer crosses from one tenant or server to another; the key itself is nowhere."""
    keyed: list[Any] = []
    read = cache.cache_key
    monkeypatch.setattr(cache, "cache_key", lambda request: keyed.append(request) or read(request))
    for api_key in ("sk-a-secret", "sk-another", "sk-a-secret"):
        for api_base in ("http://one", "http://two"):
            plain(1, api_key=api_key, api_base=api_base)
    assert len(CALLED) == 4
    assert "sk-" not in repr(keyed)


def test_namespace_keeps_calls_apart() -> None:
    """The setting that separates the answers of models separates these too."""
    for namespace in ("a", "b", "a"):
        with dspylite.context(cache_namespace=namespace):
            plain(1)
    assert len(CALLED) == 2


def test_functions_of_one_name_are_told_apart() -> None:
    """Two lambdas in a file, and closures over different values, are different functions."""
    double, square = request_cache()(lambda x: 2 * x), request_cache()(lambda x: x * x)
    assert [double(5), square(5)] == [10, 25]

    def adder(n: int) -> Callable[[int], int]:
        @request_cache()
        def add(x: int) -> int:
            CALLED.append(n)
            return x + n

        return add

    assert [adder(1)(5), adder(2)(5), adder(1)(5)] == [6, 7, 6]
    assert CALLED == [1, 2]


def test_failure_and_none_are_not_kept() -> None:
    """The next call tries again."""

    @request_cache()
    def fail(x: int) -> Any:
        CALLED.append(x)
        if len(CALLED) == 1:
            raise ValueError("once")
        return None

    with pytest.raises(ValueError, match="once"):
        fail(1)
    assert [fail(1), fail(1)] == [None, None]
    assert CALLED == [1, 1, 1]


@pytest.mark.parametrize(
    ("given", "result", "why"),
    [
        (1, (1, 2), "a tuple, does not come back from JSON"),
        (1, {1: 2}, "a dict, does not come back from JSON"),
        (1, object(), "a object, does not come back from JSON"),
        (1, float("nan"), "a float, does not come back from JSON"),
        (object(), 1, "makes no key"),
    ],
)
def test_what_has_no_form_in_json_is_returned_and_told_once(
    given: Any, result: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost, nothing comes back changed, and somebody learns why it is slow."""

    @request_cache(ignored_args_for_cache_key=["result"])
    def give(x: Any) -> Any:
        CALLED.append(x)
        return result

    with caplog.at_level(logging.WARNING, "dspylite"):
        assert give(given) is give(given) is result
    assert len(CALLED) == 2
    assert len(caplog.records) == 1
    assert why in caplog.text


def test_wrong_call_fails_as_the_function_does() -> None:
    """The error names the function's own parameters."""
    with pytest.raises(TypeError, match=r"plain\(\) missing 1 required positional argument: 'x'"):
        plain()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("thing", [functools.partial(plain, 1), 3, type("C", (), {})()])
def test_what_is_no_function_is_refused(thing: Any) -> None:
    """It has no name to be told apart by."""
    with pytest.raises(InputFieldError, match="goes around a function or method, not"):
        request_cache()(thing)


def test_no_cache_is_no_cache() -> None:
    """`configure_cache` and `DSPYLITE_CACHE=off` hold for these too."""
    use_cache(Cache(enable_disk_cache=False, enable_memory_cache=False))
    assert [plain(3), plain(3)] == [{"x": 3, "y": 1}] * 2
    assert CALLED == [3, 3]


def test_memory_can_be_left_out(tmp_path: Path) -> None:
    """Large results are kept on disk alone."""
    mine = Cache(disk_cache_dir=tmp_path)
    use_cache(mine)

    @request_cache(enable_memory_cache=False, maxsize=3)
    def large(x: int) -> str:
        CALLED.append(x)
        return "large" * x

    assert large(3) == "large" * 3
    assert mine.stats().memory_entries == 0
    assert mine.flush(20)
    assert large(3) == "large" * 3
    assert CALLED == [3]


SCRIPT = """
import sys
from dspylite.models.cache.remembered import request_cache

@request_cache()
def ask(x):
    print("made", end=" ")
    return x + {plus}

print(ask(1))
"""


def test_next_process_finds_it_and_another_script_does_not(tmp_path: Path) -> None:
    """Scripts share the name `__main__`, and must not share answers."""
    environment = {"DSPYLITE_CACHE": "on", "DSPYLITE_CACHE_DIR": str(tmp_path)}
    said = [
        said_by(python(SCRIPT.format(plus=plus), PYTHONPATH=str(ROOT), **environment)).strip()
        for plus in (1, 1, 2)
    ]
    assert said == ["made 2", "2", "made 3"]


def test_threads_may_call_at_once() -> None:
    """Each gets the answer to its own question."""
    together = threading.Barrier(8)

    def ask(n: int) -> Any:
        together.wait(10)
        return [plain(x)["x"] for x in range(n, n + 20)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [list(range(n, n + 20)) for n in range(8)]
