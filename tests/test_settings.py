"""Settings: one process default, overlays that name only what they change (B 1.2 to 1.5, 1.7)."""

from __future__ import annotations

import asyncio
import pickle
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextvars import Context, copy_context

import pytest

import dspylite as dspy
from dspylite.runtime import settings as module
from dspylite.testing import FakeLM


@pytest.fixture(autouse=True)
def clean_process_default() -> Iterator[None]:
    """Give every test the untouched process default and take back what it configured."""
    before = module._process
    module._process = {}
    yield
    module._process = before


def test_a_read_without_configure_gives_the_documented_default() -> None:
    """A program that configures nothing still has a defined behaviour."""
    assert dspy.settings.lm is None
    assert dspy.settings.num_threads == 8
    assert dspy.settings.callbacks == ()
    assert dspy.settings.trace is None


def test_configure_is_seen_by_every_thread() -> None:
    """The process default reaches plain threads without any help."""
    lm = FakeLM()
    dspy.configure(lm=lm)
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(dspy.settings.lm))
    thread.start()
    thread.join()
    assert seen == [lm]


def test_configure_in_a_worker_first_and_in_main_later_both_count() -> None:
    """No thread owns the settings (B 1.2); DSPy raises here."""
    first, second = FakeLM(model="first"), FakeLM(model="second")
    thread = threading.Thread(target=lambda: dspy.configure(lm=first))
    thread.start()
    thread.join()
    assert dspy.settings.lm is first
    dspy.configure(lm=second)
    assert dspy.settings.lm is second


def test_configure_works_in_two_asyncio_runs() -> None:
    """No task owns the settings (B 1.2)."""

    async def configure(lm: FakeLM) -> None:
        dspy.configure(lm=lm)

    for lm in (FakeLM(), FakeLM()):
        asyncio.run(configure(lm))
        assert dspy.settings.lm is lm


def test_concurrent_configures_never_show_half_of_a_change() -> None:
    """8 threads x 1,000 configures of two keys: a reader always sees a pair (B 1.2)."""
    dspy.configure(num_threads=1, max_history_size=1)
    start = threading.Barrier(9)
    torn: list[tuple[int, int]] = []
    stop = threading.Event()

    def write(first: int) -> None:
        start.wait()
        for step in range(1_000):
            value = first + 8 * step + 1
            dspy.configure(num_threads=value, max_history_size=value)

    def read() -> None:
        start.wait()
        while not stop.is_set():
            values = dspy.settings.copy()
            if values["num_threads"] != values["max_history_size"]:
                torn.append((values["num_threads"], values["max_history_size"]))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    reader = threading.Thread(target=read)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns thousands of times as often as usual
    try:
        for thread in (*writers, reader):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    assert torn == []


def test_concurrent_configures_of_different_keys_are_all_kept() -> None:
    """A swap under the lock loses no other thread's key."""
    start = threading.Barrier(2)
    lost: list[str] = []

    def configure(key: str) -> None:
        start.wait()
        for value in range(1, 2_000):
            dspy.configure(**{key: value})  # type: ignore[arg-type]
            if dspy.settings[key] != value:  # nobody else writes this key
                lost.append(key)

    threads = [
        threading.Thread(target=configure, args=("num_threads",)),
        threading.Thread(target=configure, args=("max_history_size",)),
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert lost == []


def test_a_configure_inside_a_context_is_visible_at_once_for_other_keys() -> None:
    """A block that overrides one key stays open for the others (B 1.3)."""
    lm = FakeLM()
    with dspy.context(num_threads=3):
        dspy.configure(lm=lm)
        assert dspy.settings.lm is lm
        assert dspy.settings.num_threads == 3


def test_a_configure_of_an_overridden_key_warns_and_the_block_keeps_its_value() -> None:
    """Otherwise the caller would think that the change took effect (B 1.3)."""
    with dspy.context(num_threads=3):
        with pytest.warns(dspy.SettingsWarning, match="`num_threads`") as caught:
            dspy.configure(num_threads=5)
        assert caught[0].filename == __file__
        assert dspy.settings.num_threads == 3
    assert dspy.settings.num_threads == 5


def test_a_configure_outside_any_context_does_not_warn() -> None:
    """The warning is for the surprising case alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dspy.configure(num_threads=5)


def test_contexts_nest_key_by_key() -> None:
    """The inner block adds to the outer one instead of replacing it."""
    with dspy.context(num_threads=3, max_errors=4):
        with dspy.context(num_threads=5):
            assert (dspy.settings.num_threads, dspy.settings.max_errors) == (5, 4)
        assert dspy.settings.num_threads == 3
    assert dspy.settings.num_threads == 8


def test_a_context_ends_when_its_block_raises() -> None:
    """An error must not leave one tenant's settings to the next."""
    with pytest.raises(RuntimeError), dspy.context(num_threads=3):
        raise RuntimeError
    assert dspy.settings.num_threads == 8


@pytest.mark.parametrize("change", [dspy.configure, dspy.context])
def test_a_misspelt_key_raises_and_names_the_nearest(change: object) -> None:
    """A silent typo would leave the program on other settings than it says (B 1.4)."""
    with pytest.raises(dspy.SettingsError, match="Did you mean `num_threads`"):
        change(num_thread=3)  # type: ignore[operator]


def test_an_impossible_configure_changes_nothing() -> None:
    """All keys of one call are checked before any is set."""
    with pytest.raises(dspy.SettingsError):
        dspy.configure(num_threads=3, nonsense=1)  # type: ignore[call-arg]
    assert dspy.settings.num_threads == 8


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("lm", "openai/gpt-4o", r"lm=LM\('openai/gpt-4o'\)"),
        ("lm", FakeLM, "FakeLM"),
        ("lm", 5, "5"),
        ("adapter", "chat", "'chat'"),
        ("num_threads", 0, "0"),
        ("num_threads", True, "True"),
        ("num_threads", "8", "'8'"),
        ("max_errors", -1, "-1"),
        ("async_max_workers", 0, "0"),
        ("callbacks", print, "print"),
        ("track_usage", 1, "1"),
        ("trace", (), r"\(\)"),
        ("extra", [], r"\[\]"),
    ],
)
def test_an_impossible_value_is_refused_naming_it(key: str, value: object, named: str) -> None:
    """Mistakes are found where they are made, not at the first call."""
    with pytest.raises(dspy.SettingsError, match=named):
        dspy.configure(**{key: value})  # type: ignore[arg-type]


def test_an_unknown_setting_cannot_be_read() -> None:
    """Reading a typo raises too, and names the nearest setting."""
    with pytest.raises(AttributeError, match="`lm`"):
        _ = dspy.settings.lmm


def test_settings_are_not_assigned() -> None:
    """`settings.lm = ...` would look local and be global."""
    with pytest.raises(dspy.SettingsError, match="configure"):
        dspy.settings.lm = FakeLM()  # type: ignore[misc,assignment]


def test_users_values_have_a_place_of_their_own() -> None:
    """`extra` holds what settings do not know (B 1.4)."""
    with dspy.context(extra={"tenant": "a"}):
        assert dspy.settings.extra["tenant"] == "a"


def test_lists_given_to_settings_are_copied() -> None:
    """A list shared between threads would change under their feet (B 1.7)."""
    callbacks: list[object] = [dspy.BaseCallback()]
    dspy.configure(callbacks=callbacks)
    callbacks.append("later")
    assert len(dspy.settings.callbacks) == 1


def test_the_trace_list_is_the_users_own() -> None:
    """DSPy programs read the list that they passed."""
    trace: list[object] = []
    with dspy.context(trace=trace):
        assert dspy.settings.trace is trace


def test_a_context_left_in_another_context_does_not_raise() -> None:
    """Frameworks enter and leave a sync generator on different threads (B 1.5)."""
    block = dspy.context(num_threads=3)
    Context().run(block.__enter__)
    block.__exit__(None, None, None)
    assert dspy.settings.num_threads == 8


def test_a_generator_stepped_in_changing_contexts_does_not_raise() -> None:
    """A sync streaming response is stepped in a fresh context for each chunk (B 1.5)."""

    def chunks() -> Iterator[int]:
        with dspy.context(num_threads=3):
            yield dspy.settings.num_threads
            yield 0

    generator = chunks()
    assert copy_context().run(next, generator) == 3
    assert copy_context().run(next, generator) == 0
    assert copy_context().run(next, generator, "end") == "end"


def test_a_context_entered_twice_at_once_is_refused() -> None:
    """One object cannot remember two places to go back to."""
    block = dspy.context(num_threads=3)
    with block, pytest.raises(dspy.SettingsError, match="entered already"):
        block.__enter__()


def test_a_context_can_be_used_again_after_its_end() -> None:
    """A block kept in a variable is a convenience that costs nothing."""
    block = dspy.context(num_threads=3)
    for _ in range(2):
        with block:
            assert dspy.settings.num_threads == 3
        assert dspy.settings.num_threads == 8


async def test_tasks_do_not_see_each_others_context() -> None:
    """Two tenants in one event loop keep their own settings."""
    entered = [threading.Event(), threading.Event()]

    async def tenant(number: int) -> int:
        with dspy.context(num_threads=number + 1):
            entered[number].set()
            while not all(event.is_set() for event in entered):
                await anyio_checkpoint()
            return dspy.settings.num_threads

    import anyio

    results: dict[int, int] = {}

    async def run(number: int) -> None:
        results[number] = await tenant(number)

    async with anyio.create_task_group() as group:
        group.start_soon(run, 0)
        group.start_soon(run, 1)
    assert results == {0: 1, 1: 2}


async def anyio_checkpoint() -> None:
    from anyio.lowlevel import checkpoint

    await checkpoint()


def test_a_snapshot_keeps_every_setting_of_its_moment() -> None:
    """Work that starts later runs with the settings it was given."""
    with dspy.context(num_threads=3):
        snapshot = dspy.settings.snapshot()
    dspy.configure(num_threads=5, max_errors=2)
    with dspy.settings.restore(snapshot):
        assert (dspy.settings.num_threads, dspy.settings.max_errors) == (3, None)
    assert dspy.settings.num_threads == 5


def test_a_snapshot_survives_pickle_without_what_belongs_to_its_process() -> None:
    """Workers in other processes restore it (B 7.2)."""
    lm = dspy.LM("openai/x", temperature=0.5)
    with dspy.context(lm=lm, num_threads=3, trace=[]), dspy.track_usage():
        snapshot = pickle.loads(pickle.dumps(dspy.settings.snapshot()))
    with dspy.settings.restore(snapshot):
        assert dspy.settings.lm.kwargs == {"temperature": 0.5}
        assert (dspy.settings.num_threads, dspy.settings.trace) == (3, None)
        assert dspy.settings.usage_tracker is None


def test_settings_read_like_a_mapping_too() -> None:
    """DSPy programs use `settings.get`, `settings['lm']`, `'lm' in settings` and `copy()`."""
    with dspy.context(num_threads=3):
        assert dspy.settings.get("num_threads") == dspy.settings["num_threads"] == 3
        assert dspy.settings.get("nonsense", "default") == "default"
        assert "lm" in dspy.settings
        assert "nonsense" not in dspy.settings
        assert dspy.settings.copy()["num_threads"] == 3
        assert "num_threads" in list(dspy.settings.keys())
    with pytest.raises(KeyError):
        dspy.settings["nonsense"]


def test_every_setting_is_known_to_type_checkers_and_documented() -> None:
    """The typed changes, the keys and the docstring are three views of one list."""
    keys = set(module.KEYS)
    assert set(module.SettingsChanges.__annotations__) == keys
    for key in keys:
        assert re.search(rf"^ +{key}: ", module.Settings.__doc__ or "", re.MULTILINE), key
