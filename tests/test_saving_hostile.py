"""Files that somebody planted or damaged: nothing is imported, run, sent elsewhere or half-loaded.

Not here: files as they should be (`test_saving.py`).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import dspylite as dspy
from dspylite.models.states import CLASS_KEY
from dspylite.testing import FakeLM, FakeServer

SECRET = "sk-planted-secret-0123456789"

PLANTED = """
import pathlib
pathlib.Path(__file__).with_name("planted_ran").write_text("ran")
import dspylite
class Evil(dspylite.Module):
    pass
class EvilLM(dspylite.BaseLM):
    pass
class EvilSignature(dspylite.Signature):
    a: str = dspylite.InputField()
    b: str = dspylite.OutputField()
"""


def simple() -> Any:
    return dspy.Predict("question -> answer")


def state_with_lm(lm: Any) -> dict[str, Any]:
    return {**simple().dump_state(), "lm": lm}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a module where it can be imported; the file that it writes tells that it ran."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "planted_module.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
    return folder / "planted_ran"


# --- Classes -----------------------------------------------------------------------------------


def test_class_of_an_lm_is_imported_only_where_the_file_is_trusted(planted: Path) -> None:
    """A path in a file is code that somebody else chose (B 7.8)."""
    state = state_with_lm({CLASS_KEY: "planted_module.EvilLM", "model": "m"})
    program = simple()
    with pytest.raises(dspy.SavingError, match="allow_unsafe_lm_state"):
        program.load_state(state)
    assert not planted.exists()
    assert program.lm is None
    program.load_state(state, allow_unsafe_lm_state=True)
    assert type(program.lm).__name__ == "EvilLM"
    assert planted.exists()


@pytest.mark.parametrize(
    "path", ["os.system", "builtins.dict", "no_such.Thing", "x", "", "a..b", "../x:Y", 7, ["a"]]
)
def test_class_that_is_no_lm_is_refused_even_where_trusted(path: Any) -> None:
    for trusted in (False, True):
        if not path:
            continue  # no class is named
        with pytest.raises(dspy.SavingError):
            dspy.BaseLM.load_state({CLASS_KEY: path, "model": "m"}, allow_custom_lm_class=trusted)


def program_tree(**changes: Any) -> dict[str, Any]:
    node = {
        "module": "planted_module:Evil",
        "number": 0,
        "attributes": {"x": 1},
    }
    return {"format": "dspylite-program", "metadata": {}, "program": {**node, **changes}}


def write(folder: Path, tree: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (folder / "program.json").write_text(text)
    return folder


SIGNATURE: dict[str, Any] = {
    "name": "S",
    "instructions": None,
    "fields": [
        {"name": "a", "kind": "output", "type": "Evil", "desc": "", "prefix": "", "constraints": {}}
    ],
    "types": {"Evil": "planted_module:Evil"},
}


def holding(**attributes: Any) -> dict[str, Any]:
    return program_tree(module="dspylite.programs.base:Module", attributes=attributes)


@pytest.mark.parametrize(
    "tree",
    [
        program_tree(),
        holding(a={"module": "planted_module:Evil", "number": 1, "attributes": {}}),
        holding(a={"signature": {"class": "planted_module:EvilSignature"}}),
        holding(a=[{"tuple": [{"signature": SIGNATURE}]}]),
        program_tree(module="dspylite.not_loaded_so_far:Evil"),
    ],
)
@pytest.mark.parametrize("trust", [False, [], ["planted"], ["planted_module.sub"], ["dspylite"]])
def test_whole_program_imports_nothing_that_is_not_trusted(
    tree: Any, trust: Any, planted: Path, tmp_path: Path
) -> None:
    """All names are compared before the first is imported; a prefix of a name is another name."""
    folder = write(tmp_path / "program", tree)
    with pytest.raises(dspy.SavingError) as caught:
        dspy.load(folder, trust=trust)
    assert (
        "nothing was imported" in str(caught.value)
        or "no class" in str(caught.value)
        or ("cannot be imported" in str(caught.value))
    )
    assert not planted.exists()


AUDIT = """
import sys, dspylite
seen = []
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == "import" else None)
for use in (lambda: dspylite.load("PROGRAM"), lambda: dspylite.Predict("a -> b").load("STATE"),
            lambda: dspylite.load_settings("SETTINGS")):
    try:
        use()
    except dspylite.SavingError:
        pass
    else:
        raise SystemExit("loaded")
bad = [name for name in seen if "planted" in name or "pickle" in name]
raise SystemExit(str(bad) if bad else 0)
"""


def test_no_planted_name_reaches_the_import_system(tmp_path: Path) -> None:
    """Seen from an audit hook in a fresh process, not only from what a module does (B 7.8)."""
    write(tmp_path / "program", program_tree())
    state = state_with_lm({CLASS_KEY: "planted_module.EvilLM", "model": "m"})
    (tmp_path / "state.json").write_text(json.dumps(state))
    tree = {"format": "dspylite-settings", "version": 1, "settings": {"lm": state["lm"]}}
    (tmp_path / "settings.json").write_text(json.dumps(tree))
    script = AUDIT.replace("PROGRAM", str(tmp_path / "program"))
    script = script.replace("STATE", str(tmp_path / "state.json"))
    script = script.replace("SETTINGS", str(tmp_path / "settings.json"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


class Boom:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_no_pickle_is_ever_loaded(
    allow_pickle: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever `allow_pickle` says: there is no code for it."""
    import pickle

    data = pickle.dumps(Boom())
    (tmp_path / "program.pkl").write_bytes(data)
    (tmp_path / "state.json").write_bytes(data)
    (tmp_path / "state.pkl").write_bytes(data)
    for use in (
        lambda: dspy.load(tmp_path, allow_pickle=allow_pickle),
        lambda: simple().load(tmp_path / "state.json", allow_pickle=allow_pickle),
        lambda: simple().load(tmp_path / "state.pkl", allow_pickle=allow_pickle),
        lambda: dspy.load_settings(tmp_path / "state.pkl", allow_pickle=allow_pickle),
    ):
        with pytest.raises(dspy.SavingError, match=r"(is|holds) a pickle|: a pickle could run"):
            use()
    assert capsys.readouterr().out == ""


CODE = {**SIGNATURE["fields"][0], "type": "str, __import__('os').x"}


@pytest.mark.parametrize(
    "changes",
    [
        {"module": "dspylite.runtime.imports:importlib"},
        {"module": "dspylite.errors:DSPyError"},
        {"module": "dspylite.programs.saving:Path"},
        {"module": "dspylite.schema.records:Example"},
        {"module": 3},
        {"number": []},
        {"attributes": None},
        {"again": 5},
        {"again": []},
        {"module": "dspylite.programs.predict:Predict", "attributes": {}},
        {"module": "dspylite.programs.predict:Predict", "attributes": {"signature": 3}},
        {"attributes": {"x": {"tuple": 3}}},
        {"attributes": {"x": {"lm": 3}}},
        {"attributes": {"x": {"example": 3, "inputs": None}}},
        {"attributes": {"x": {"example": {"dict": {}}, "inputs": 3}}},
        {"attributes": {"x": {"example": {"dict": {}}, "inputs": [3]}}},
        {"attributes": {"x": {"eval": "1"}}},
        {"attributes": {"x": {"signature": {**SIGNATURE, "types": {"Evil": "os:system"}}}}},
        {"attributes": {"x": {"signature": {"class": "dspylite.programs.base:Module"}}}},
        {"attributes": {"x": {"signature": {**SIGNATURE, "types": {}}}}},
        {"attributes": {"x": {"signature": {**SIGNATURE, "types": {}, "fields": [CODE]}}}},
    ],
)  # fmt: skip
def test_whole_program_of_a_wrong_form_is_a_clear_error(changes: Any, tmp_path: Path) -> None:
    """Trusted or not: never an `AttributeError` of the inside, never something half made."""
    tree = program_tree(**{"module": "dspylite.programs.base:Module", **changes})
    folder = write(tmp_path / "program", tree)
    with pytest.raises(dspy.SavingError):
        dspy.load(folder, trust=["os"])


# --- Endpoints ---------------------------------------------------------------------------------

ENDPOINTS: dict[str, Any] = {
    "api_base": "http://evil.example/v1",
    "base_url": "http://evil.example/v1",
    "model_list": [{"litellm_params": {"api_base": "http://evil.example"}}],
    "azure_endpoint": "http://evil.example",
    "aws_bedrock_runtime_endpoint": "http://evil.example",
    "proxies": {"http": "http://evil.example"},
    "api_key": "sk-of-the-attacker",
    "organization": "org-of-the-attacker",
    "extra_headers": {"authorization": "x"},
    "custom_llm_provider": "custom_openai",
    "langfuse_host": "http://evil.example",
    "success_callback": ["langfuse"],
    "metadata": {"x": 1},
    "ssl_verify": False,
    "tools": [{"type": "mcp", "server_url": "http://evil.example"}],
    "extra_body": {"nested": [{"api_base": "http://evil.example"}]},
    "some_future_address": "evil.example:80",
}


@pytest.mark.parametrize("name", ENDPOINTS)
def test_no_endpoint_is_taken_from_a_file(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts would go to whoever wrote the file; what is dropped is named (B 7.8)."""
    lm = {"model": "openai/m", "temperature": 0.5, name: ENDPOINTS[name]}
    program = simple()
    with caplog.at_level(logging.WARNING):
        program.load_state(state_with_lm(lm))
    assert program.lm.kwargs == {"temperature": 0.5}
    assert name in caplog.text
    assert "allow_unsafe_lm_state" in caplog.text
    assert "evil" not in caplog.text


@pytest.mark.parametrize("name", ["api_base", "base_url", "organization", "extra_body"])
def test_a_trusted_file_may_name_the_endpoint(name: str) -> None:
    lm = {"model": "openai/m", name: ENDPOINTS[name]}
    program = simple()
    program.load_state(state_with_lm(lm), allow_unsafe_lm_state=True)
    assert program.lm.kwargs == {name: ENDPOINTS[name]}


def test_a_fallback_in_a_file_brings_no_endpoint_either() -> None:
    state = {"model": "openai/m", "fallbacks": [{"model": "openai/n", "api_base": "http://evil"}]}
    lm = dspy.BaseLM.load_state(state)
    assert [each.kwargs for each in lm.policies.fallbacks] == [{}]  # type: ignore[attr-defined]


def test_a_model_name_that_is_an_address_is_refused() -> None:
    """litellm asks the URL in `huggingface/https://...`."""
    state = state_with_lm({"model": "huggingface/https://evil.example/x"})
    with pytest.raises(dspy.SavingError, match="allow_unsafe_lm_state"):
        simple().load_state(state)


def test_a_loaded_program_asks_the_usual_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the servers: the planted one hears nothing."""
    reply = "[[ ## answer ## ]]\nhere\n\n[[ ## completed ## ]]"
    with FakeServer(answer=reply) as usual, FakeServer(answer=reply) as evil:
        monkeypatch.setenv("OPENAI_BASE_URL", usual.base_url)
        monkeypatch.setenv("OPENAI_API_BASE", usual.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        program = simple()
        lm = {"model": "openai/m", "engine": "direct", "api_base": evil.base_url}
        program.load_state(state_with_lm(lm))
        assert program(question="where?").answer == "here"
        assert (len(usual.requests), len(evil.requests)) == (1, 0)


def test_a_loaded_whole_program_asks_the_usual_endpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The parameters of a predictor go with the caller's key: as those of an LM (B 7.8)."""
    reply = "[[ ## answer ## ]]\nhere\n\n[[ ## completed ## ]]"
    with FakeServer(answer=reply) as usual, FakeServer(answer=reply) as evil:
        program = simple()
        program.config = {"temperature": 0.5, "parse_retries": 0, "api_base": evil.base_url}
        program.save(tmp_path / "program", save_program=True)
        with caplog.at_level(logging.WARNING):
            loaded = dspy.load(tmp_path / "program")
        assert loaded.config == {"temperature": 0.5, "parse_retries": 0}  # type: ignore[attr-defined]
        assert "api_base" in caplog.text
        lm = dspy.LM("openai/m", api_key=SECRET, api_base=usual.base_url)
        with dspy.context(lm=lm):
            assert loaded(question="where?").answer == "here"
        assert (len(usual.requests), len(evil.requests)) == (1, 0)
    trusted = dspy.load(tmp_path / "program", allow_unsafe_lm_state=True)
    assert trusted.config == program.config  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "told"), [([1], "`config`"), ({"model": "huggingface/http://evil"}, "endpoint")]
)
def test_a_planted_config_is_a_clear_error(config: Any, told: str, tmp_path: Path) -> None:
    program = simple()
    program.config = config
    program.save(tmp_path / "program", save_program=True)
    with pytest.raises(dspy.SavingError, match=told):
        dspy.load(tmp_path / "program")


# --- Secrets -----------------------------------------------------------------------------------

HOLDING_SECRETS: dict[str, Any] = {
    "api_key": SECRET,
    "headers": {"x-any": SECRET},
    "extra_headers": {"authorization": f"Bearer {SECRET}"},
    "extra_body": {"auth_token": SECRET, "kept": 1},
    "api_base": f"http://user:{SECRET}@models.example/v1?api-key={SECRET}&v=1",
    "base_url": f"http://{SECRET}@models.example/v1",
    "aws_secret_access_key": SECRET,
    "azure_ad_token": SECRET,
    "vertex_credentials": SECRET,
    "user": f"http://me:{SECRET}@x.example",
    "stop": [f"http://me:{SECRET}@x.example"],
    **{
        name: {"nested": {name: SECRET, "kept": 1}}
        for name in (
            "auth apiKey api_keys private_key privateKey passphrase passwd bearer jwt cookie "
            "cookies credential aws_bearer_token_bedrock access_tokens"
        ).split()
    },
}


@pytest.mark.parametrize("name", HOLDING_SECRETS)
def test_no_file_holds_a_secret(name: str, tmp_path: Path) -> None:
    """In whichever parameter it stands, in whichever file (B 7.4)."""
    lm = dspy.LM("openai/m", **{name: HOLDING_SECRETS[name]})
    around = dspy.LM("openai/n", fallbacks=[lm])
    for each in (lm, around):
        program = dspy.ChainOfThought("question -> answer")
        program.set_lm(each)
        program.save(tmp_path / "state.json")
        program.save(tmp_path / "program", save_program=True)
        with dspy.context(lm=each):
            dspy.settings.save(tmp_path / "settings.json")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert [path.name for path in files if SECRET.encode() in path.read_bytes()] == []


class Holder(dspy.Module):
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


Holder.__module__ = "holder_of_secrets"


def holder_module() -> types.ModuleType:
    module = types.ModuleType(Holder.__module__)
    vars(module)["Holder"] = Holder
    return module


@pytest.mark.parametrize("name", HOLDING_SECRETS)
def test_no_whole_program_holds_a_secret(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the config of a predictor, and in the attributes of modules at any depth (B 7.4)."""
    monkeypatch.setitem(sys.modules, Holder.__module__, holder_module())
    value = HOLDING_SECRETS[name]
    asking = dspy.Predict("question -> answer", temperature=0.5, **{name: value})
    program = Holder(ask=asking, deep=[{"more": ({name: value},)}], k=1, **{name: value})
    with caplog.at_level(logging.WARNING):
        program.save(tmp_path / "program", save_program=True)
    text = (tmp_path / "program" / "program.json").read_text()
    assert SECRET not in text
    assert SECRET not in caplog.text
    for place in (f"ask.config.{name}", f"deep[0]['more'][0]['{name}']", f", {name}"):
        assert place in caplog.text
    loaded: Any = dspy.load(tmp_path / "program", trust=True, allow_unsafe_lm_state=True)
    assert loaded.k == 1
    assert loaded.ask.config["temperature"] == 0.5


def test_what_only_has_the_name_of_a_secret_stays_in_a_whole_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, Holder.__module__, holder_module())
    named = {"sort_key": "name", "end_token": "<|end|>", "headers": ["Title", "Author"]}
    holder = Holder(token=simple(), auth=[simple()], key=3, secret=None, max_tokens="9", **named)
    holder.save(tmp_path / "program", save_program=True)
    loaded: Any = dspy.load(tmp_path / "program", trust=True)
    assert [path for path, _ in loaded.named_predictors()] == ["token", "auth[0]"]
    assert {name: getattr(loaded, name) for name in named} == named
    assert (loaded.key, loaded.secret, loaded.max_tokens) == (3, None, "9")


def test_a_program_of_ours_keeps_an_attribute_that_is_named_like_a_key(tmp_path: Path) -> None:
    compare = dspy.MultiChainComparison("question -> answer", M=1)
    compare.save(tmp_path / "program", save_program=True)
    loaded = dspy.load(tmp_path / "program")
    with dspy.context(lm=FakeLM([{"rationale": "r", "answer": "b"}])):
        assert loaded([{"answer": "a"}], question="?").answer == "b"


def test_the_password_in_a_models_name_is_not_saved(caplog: pytest.LogCaptureFixture) -> None:
    lm = dspy.LM(f"huggingface/https://me:{SECRET}@models.example/x")
    assert lm.dump_state()["model"] == "huggingface/https://models.example/x"
    assert SECRET not in caplog.text
    assert "model" in caplog.text


def test_a_secret_that_is_repeated_elsewhere_is_left_out_there(tmp_path: Path) -> None:
    lm = dspy.LM("openai/m", api_key=SECRET, user=f"as {SECRET}", extra_body={"deep": [SECRET]})
    assert SECRET not in json.dumps(lm.dump_state())


def test_what_is_left_out_beside_the_key_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Who loads the file must give it again."""
    lm = dspy.LM("openai/m", api_key=SECRET, extra_headers={"x-team": "a"})
    with caplog.at_level(logging.WARNING):
        lm.dump_state()
    assert "extra_headers" in caplog.text
    assert "api_key" not in caplog.text


def test_every_parameter_that_an_lm_names_is_saved_or_left_out_on_purpose() -> None:
    """A new parameter of `LM` cannot be forgotten here."""
    import inspect

    from dspylite.models.policies import POLICY_NAMES

    values: dict[str, Any] = {
        "model": "openai/other", "model_type": "text", "temperature": 0.5, "max_tokens": 5,
        "cache": False, "num_retries": 1, "use_developer_role": True, "engine": "litellm",
        "capabilities": ["reasoning"], "price": (1, 2), "max_retry_wait_s": 1.0, "patience_s": 1.0,
        "max_concurrency": 1, "max_queue": 1, "rpm": 1, "tpm": 1,
        "fallbacks": [dspy.OfflineLM()], "fallback_on": (OSError,), "circuit_breaker": True,
        "adaptive": False,
    }  # fmt: skip
    parameters = set(inspect.signature(dspy.LM.__init__).parameters) - {"self", "kwargs"}
    assert set(values) == (parameters | POLICY_NAMES) - {"callbacks", "middleware"}
    state = dspy.LM(**values).dump_state()
    assert set(values) <= set(state)
    assert dspy.BaseLM.load_state(state).dump_state() == state


# --- Damage ------------------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    """Each of the beginnings of a file is damaged, but the whole of it."""
    program = simple()
    program.demos = [{"question": "ä?", "answer": "b"}]
    path = tmp_path / "state.json"
    program.save(path)
    data = path.read_bytes()
    fresh = simple()
    before = dict(vars(fresh))
    for length in range(len(data) - 1):  # the last byte is the end of the line
        path.write_bytes(data[:length])
        with pytest.raises(dspy.SavingError):
            fresh.load(path)
        assert dict(vars(fresh)) == before
    path.write_bytes(data)
    fresh.load(path)
    assert fresh.demos == program.demos


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("[" * 70 + "]" * 70, "nested deeper"),
        ('{"demos": [], "demos": []}', "twice"),
        ('{"demos": NaN}', "finite"),
        ('{"demos": 1e999}', "finite"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("", "damaged"),
        ("{'a': 1}", "damaged"),
        ('{"a": 1,}', "damaged"),
        ('{"metadata": {"dspylite": {"format": 2}}}', "update dspylite"),
        ('{"metadata": 3}', "signature"),
        ("{}", "signature"),
    ],
)
def test_a_damaged_file_is_a_clear_error(text: str, told: str, tmp_path: Path) -> None:
    """Strictly read: never a `RecursionError`, never the second of two values."""
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(dspy.SavingError) as caught:
        simple().load(tmp_path / "state.json")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 3_000
    write(tmp_path / "program", text)
    with pytest.raises(dspy.SavingError):
        dspy.load(tmp_path / "program", trust=True)
    with pytest.raises(dspy.SavingError):
        dspy.load_settings(tmp_path / "state.json")


def test_a_file_larger_than_the_bound_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspylite.runtime.files.MAX_FILE_BYTES", 100)
    (tmp_path / "state.json").write_text(" " * 101)
    with pytest.raises(dspy.SavingError, match="more than the 100 bytes"):
        simple().load(tmp_path / "state.json")


def test_a_file_that_is_no_text_or_no_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(dspy.SavingError, match="UTF-8"):
        simple().load(tmp_path / "state.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(dspy.SavingError, match="no file"):
        simple().load(tmp_path / "folder.json")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Some editors write one."""
    simple().save(tmp_path / "state.json")
    path = tmp_path / "state.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    simple().load(path)
