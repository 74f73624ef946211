"""The settings saved to a file and loaded again.

Not here: programs (`test_saving.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dspylite as dspy
from dspylite.runtime.settings import KEYS
from dspylite.testing import FakeLM

VALUES: dict[str, Any] = {
    "track_usage": True,
    "cache_namespace": "tenant «a»",
    "parse_retries": 2,
    "deadline_s": 7.5,
    "disable_history": True,
    "max_history_size": 5,
    "max_history_bytes": 6,
    "max_trace_size": 7,
    "num_threads": 3,
    "max_errors": 4,
    "async_max_workers": 9,
    "provide_traceback": True,
    "warn_on_type_mismatch": False,
    "experimental": True,
    "allow_tool_async_sync_conversion": True,
    "trace": [],
    "extra": {"team": "a", "list": [1, {"b": None}]},
}


def test_every_plain_setting_survives_the_file(tmp_path: Path) -> None:
    """What one process was configured with configures the next."""
    path = tmp_path / "settings.json"
    with dspy.context(**VALUES):
        before = dspy.settings.copy()
        dspy.settings.save(path)
    loaded = dspy.load_settings(path)
    assert loaded == before
    assert set(loaded) == set(KEYS)
    with dspy.context(**loaded):  # type: ignore[arg-type]
        assert dspy.settings.copy() == before


def test_every_setting_is_plain_or_refused_by_name() -> None:
    """A new key cannot be forgotten here."""
    others = {"lm", "adapter", "callbacks", "usage_tracker", "budget", "redact_history"}
    others.add("send_stream")
    assert set(VALUES) | others == set(KEYS)


def test_lm_and_adapter_are_saved_by_what_they_are(tmp_path: Path) -> None:
    lm = dspy.LM("openai/m", temperature=0.5, api_key="sk-secret-0123")
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False, accept_truncated=True)
    with dspy.context(lm=lm, adapter=adapter):
        dspy.settings.save(tmp_path / "settings.json")
    assert b"sk-secret" not in (tmp_path / "settings.json").read_bytes()
    loaded = dspy.load_settings(tmp_path / "settings.json")
    assert (type(loaded["lm"]), loaded["lm"].kwargs) == (dspy.LM, {"temperature": 0.5})
    found = loaded["adapter"]
    assert type(found) is dspy.ChatAdapter
    assert (found.use_json_adapter_fallback, found.accept_truncated) == (False, True)
    with dspy.context(adapter=dspy.JSONAdapter()):
        dspy.settings.save(tmp_path / "settings.json")
    loaded = dspy.load_settings(tmp_path / "settings.json")
    assert type(loaded["adapter"]) is dspy.JSONAdapter


class Listener(dspy.BaseCallback):
    pass


class MyAdapter(dspy.ChatAdapter):
    pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("callbacks", [Listener()]),
        ("redact_history", lambda entry: entry),
        ("usage_tracker", dspy.UsageTracker()),
        ("budget", object()),
        ("trace", [(object(), {}, None)]),
        ("adapter", MyAdapter()),
        ("adapter", dspy.ChatAdapter(callbacks=[Listener()])),
        ("lm", dspy.LM("openai/m", middleware=[dspy.Retry()])),
        ("extra", {"thing": object()}),
        ("extra", {"api_key": "sk-secret-0123"}),
    ],
)
def test_what_no_file_can_hold_is_named_and_can_be_left_out(
    name: str, value: Any, tmp_path: Path
) -> None:
    """Left out silently, it would be missed in production only."""
    path = tmp_path / "settings.json"
    with dspy.context(**{name: value}):  # type: ignore[misc]
        with pytest.raises(dspy.SavingError) as caught:
            dspy.settings.save(path)
        assert f"`{name}`" in str(caught.value)
        assert f"exclude_keys=['{name}']" in str(caught.value)
        assert "sk-secret" not in str(caught.value)
        assert not path.exists()
        dspy.settings.save(path, exclude_keys=[name])
    assert name not in dspy.load_settings(path)


def test_misspelt_key_to_leave_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(dspy.SettingsError, match="`callbacks`"):
        dspy.settings.save(tmp_path / "s.json", exclude_keys=["callback"])
    with pytest.raises(dspy.SavingError, match="modules_to_serialize"):
        dspy.settings.save(tmp_path / "s.json", modules_to_serialize=[])


def write(path: Path, **settings: Any) -> Path:
    tree = {"format": "dspylite-settings", "version": 1, "settings": settings}
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_thread": 3}, "`num_threads`"),
        ({"num_threads": "many"}, "whole number"),
        ({"num_threads": 0}, "whole number"),
        ({"adapter": {"class": "os.system", "params": {}}}, "no adapter"),
        ({"adapter": {"class": ["a"], "params": {}}}, "no adapter"),
        ({"adapter": {"class": "ChatAdapter"}}, "no adapter"),
        ({"adapter": {"class": "ChatAdapter", "params": {"nope": 1}}}, "nope"),
        ({"adapter": {"class": "ChatAdapter", "params": {"callbacks": []}}}, "callbacks"),
        ({"adapter": "ChatAdapter"}, "no adapter"),
        ({"lm": {"_dspy_lm_class": "os.system", "model": "m"}}, "allow_unsafe_lm_state"),
        ({"lm": "gpt"}, "state of an LM"),
        ({"callbacks": {}}, "list of callbacks"),
        ({"redact_history": "print"}, "plain function"),
    ],
)
def test_file_with_impossible_settings_is_a_clear_error(
    settings: Any, told: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "settings.json", **settings)
    with pytest.raises(dspy.SavingError) as caught:
        dspy.load_settings(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_endpoint_is_taken_from_a_file_of_settings(tmp_path: Path) -> None:
    """As from the state of a program (B 7.8)."""
    lm = {"model": "openai/m", "api_base": "http://evil.example/v1"}
    path = write(tmp_path / "settings.json", lm=lm)
    assert dspy.load_settings(path)["lm"].kwargs == {}
    trusted = dspy.load_settings(path, allow_unsafe_lm_state=True)["lm"]
    assert trusted.kwargs == {"api_base": "http://evil.example/v1"}


def test_file_of_something_else_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    dspy.Predict("a -> b").save(tmp_path / "state.json")
    with pytest.raises(dspy.SavingError, match="holds no settings"):
        dspy.load_settings(tmp_path / "state.json")
    tree = {"format": "dspylite-settings", "version": 2, "settings": {}}
    (tmp_path / "s.json").write_text(json.dumps(tree))
    with pytest.raises(dspy.SavingError, match="update dspylite"):
        dspy.load_settings(tmp_path / "s.json")
    with pytest.raises(FileNotFoundError):
        dspy.load_settings(tmp_path / "none.json")


def test_lm_class_of_the_users_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with dspy.context(lm=FakeLM(["x"], model="fake/one")):
        dspy.settings.save(path)
    with pytest.raises(dspy.SavingError, match="FakeLM"):
        dspy.load_settings(path)
    loaded = dspy.load_settings(path, allow_unsafe_lm_state=True)["lm"]
    assert (type(loaded), loaded.model) == (FakeLM, "fake/one")
