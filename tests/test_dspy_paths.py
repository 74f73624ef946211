"""DSPy's deeper module paths: modules that are not files, and lead to the package's own names.

Not here: which names and calls DSPy has (`test_dspy_names.py`).
"""

from __future__ import annotations

import copyreg
import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dspylite
from dspylite import dspy_paths
from dspylite.dspy_paths import ABSENT, ELSEWHERE, PATHS, install
from dspylite.runtime.history import GLOBAL_HISTORY
from tests.test_dspy_names import exists

ROOT = Path(dspylite.__file__).parent
TABLE = [(path, name) for path, names in PATHS.items() for name in names.split()]
LATER: set[str] = set()
"""Names that the table has already, and the package not yet."""


def is_real(path: str) -> bool:
    place = ROOT.joinpath(*path.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def run(code: str) -> str:
    """Run code in a fresh process; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("path", "name"), TABLE, ids=[f"{path}.{name}" for path, name in TABLE])
def test_path_leads_to_the_one_thing_of_that_name(path: str, name: str) -> None:
    """A second class by the same name would fail every `isinstance` of a program."""
    module = importlib.import_module(f"dspylite.{path}")
    if name in LATER and not hasattr(module, name):
        return
    thing = getattr(module, name)
    top = getattr(dspylite, name, None)
    assert top is None or thing is top
    assert name in dir(module)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        # Pickles and tracebacks name where it is defined.
        assert thing.__module__ != module.__name__ or is_real(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("utils", "DummyLM"),
        ("clients.base_lm", "GLOBAL_HISTORY"),
        ("evaluate.metrics", "EM"),
        ("adapters.types.tool", "Tool"),
        ("adapters.xml_adapter", "XMLAdapter"),
        ("retrievers.embeddings", "Embeddings"),
    ],
)
def test_path_is_importable_first_of_all(path: str, name: str) -> None:
    """A program's first import may be the deepest one; the face comes with it."""
    code = f"from dspylite.{path} import {name}; import sys; print('dspylite' in sys.modules)"
    assert run(code) == "True"


@pytest.mark.parametrize(
    "code",
    [
        "import dspylite.utils.callback; found = dspylite.utils.callback.BaseCallback",
        "import dspylite; found = dspylite.utils.callback.BaseCallback",
        "import dspylite as dspy; found = dspy.utils.callback.BaseCallback",
        "import dspylite.utils.callback as c; found = c.BaseCallback",
        "from dspylite.utils import callback; found = callback.BaseCallback",
        "from dspylite import utils; found = utils.BaseCallback",
        "from dspylite.utils.callback import *; found = BaseCallback",
        "import importlib as i; found = i.import_module('dspylite.utils').BaseCallback",
    ],
)
def test_every_form_of_import_works(code: str) -> None:
    """Python has many ways to say the same."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["found"] is dspylite.BaseCallback


def test_real_module_keeps_its_own_names_and_gets_those_of_dspys() -> None:
    """`dspylite.adapters` is a folder of ours and a module of DSPy's at once."""
    adapters = importlib.import_module("dspylite.adapters")
    assert Path(str(adapters.__file__)).parent.name == "adapters"
    assert adapters.JSONAdapter is dspylite.JSONAdapter
    assert adapters.json.JSONAdapter is dspylite.JSONAdapter


@pytest.mark.parametrize("path", sorted(PATHS))
def test_no_file_is_hidden_by_a_path(path: str) -> None:
    """What is written in a file of that name is what an import gives."""
    module = importlib.import_module(f"dspylite.{path}")
    is_table = module.__file__ == dspy_paths.__file__
    assert is_table is not is_real(path)


def test_file_that_nobody_has_imported_yet_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A door that the face does not import is found on the disk all the same."""
    (tmp_path / "utils.py").write_text("DummyLM = 'the file'\n")
    monkeypatch.setattr(dspy_paths, "PATHS", {"utils": "DummyLM BaseCallback", "clients": "LM"})
    face = ModuleType("a_face")
    face.__path__ = [str(tmp_path)]
    vars(face)["BaseCallback"] = "the face"
    for name in ("a_face", "a_face.utils", "a_face.clients"):
        monkeypatch.setitem(sys.modules, name, face)
    for name in ("a_face.utils", "a_face.clients"):
        monkeypatch.delitem(sys.modules, name)
    install(face)
    assert (face.utils.DummyLM, face.utils.BaseCallback) == ("the file", "the face")
    assert face.clients.__file__ == dspy_paths.__file__
    assert isinstance(face.utils, ModuleType)


def test_function_is_not_hidden_by_the_module_of_its_name() -> None:
    """`utils.syncify` is both in DSPy: as an attribute it is the function."""
    utils = importlib.import_module("dspylite.utils")
    assert utils.syncify is dspylite.syncify
    assert importlib.import_module("dspylite.utils.syncify").syncify is dspylite.syncify
    assert run("import dspylite.utils.syncify as s; print(s.__name__)") in {
        "syncify",
        "dspylite.utils.syncify",
    }


def test_unknown_name_says_where_to_look() -> None:
    """A name that is called otherwise here is on the page."""
    utils = importlib.import_module("dspylite.utils")
    with pytest.raises(AttributeError, match=r"`dspylite\.utils` has no 'Nope'.*coming-from-dspy"):
        utils.Nope  # noqa: B018
    assert not hasattr(utils, "__nope__")
    said = run("from dspylite.utils import Nope")
    assert said.startswith("ImportError: cannot import name 'Nope' from 'dspylite.utils'")
    assert "dspy_paths.py" in said
    assert "No module named 'dspylite.utils.nope'" in run("import dspylite.utils.nope")


def test_promised_name_that_is_not_there_yet_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of the face never fails for it."""
    monkeypatch.setattr(dspy_paths, "_find", lambda *_: None)
    with pytest.raises(AttributeError, match="`Unbatchify` is not part of this version"):
        importlib.import_module("dspylite.utils.unbatchify").Unbatchify  # noqa: B018


def test_failing_import_behind_a_name_is_not_taken_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a library is missing, its name must be in the error."""
    monkeypatch.setitem(sys.modules, "dspylite.testing", None)
    with pytest.raises(AttributeError, match="DummyLM"):
        importlib.import_module("dspylite.utils").DummyLM  # noqa: B018
    monkeypatch.setattr(dspy_paths, "ELSEWHERE", {"DummyLM": "a_door"})
    broken = ModuleNotFoundError("No module named 'numpy'", name="numpy")

    def fail(name: str) -> Any:
        raise broken

    monkeypatch.setattr(dspy_paths.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        sys.modules["dspylite.utils"].DummyLM  # noqa: B018


@pytest.mark.parametrize("name", [name for names in ABSENT.values() for name in names.split()])
def test_name_that_is_absent_on_purpose_says_why(name: str) -> None:
    """Whoever moves a program over learns what to do in place of it."""
    assert not exists(name)
    with pytest.raises(
        AttributeError, match=rf"DSPy's `{name}` is not part of dspylite: it \w+ .*; "
    ):
        getattr(dspylite, name)


def test_unknown_name_of_the_face_is_reported_as_python_does() -> None:
    """`hasattr` and mocks rely on it."""
    with pytest.raises(AttributeError, match="module 'dspylite' has no attribute 'nope'"):
        dspylite.nope  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore


def test_every_place_of_the_table_is_used() -> None:
    """A place without a path would be a name that nobody can reach."""
    assert set(ELSEWHERE) <= {name for _, name in TABLE}
    assert not {name for name in ELSEWHERE if name in dspylite.__all__}


def test_classes_reached_by_a_path_are_pickled_by_their_own_place() -> None:
    """A worker that never imported the path reads the pickle all the same."""
    error = importlib.import_module("dspylite.utils.exceptions").LMError("no")
    data = pickle.dumps(error)
    assert b"dspylite.errors" in data
    assert b"dspylite.utils" not in data
    assert copyreg.dispatch_table.get(type(error)) is None
    assert str(pickle.loads(data)) == "no"


def test_many_threads_may_ask_at_once() -> None:
    """A server's first requests come together."""
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
import dspylite
together = threading.Barrier(16)
def ask(_):
    together.wait(10)
    return dspylite.utils.DummyLM, dspylite.clients.base_lm.GLOBAL_HISTORY
with ThreadPoolExecutor(16) as pool:
    print(len(set(map(id, [thing for pair in pool.map(ask, range(16)) for thing in pair]))))
"""
    assert run(code) == "2"
    together = threading.Barrier(8)

    def ask(_: int) -> Any:
        together.wait(10)
        return importlib.import_module("dspylite.utils.dummies").DummyLM

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1


def test_installing_again_changes_nothing() -> None:
    """`importlib.reload` of the package, as notebooks do it."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("dspylite.")}
    install(dspylite)
    after = {name: module for name, module in sys.modules.items() if name.startswith("dspylite.")}
    assert after == before


def test_paths_load_nothing_before_they_are_used() -> None:
    """The fakes are for tests, and a service does not pay for them."""
    code = (
        "import dspylite, sys; print([n for n in sys.modules if n.startswith('dspylite.testing')])"
    )
    assert run(code) == "[]"


def test_reading_tools_can_look_at_every_module() -> None:
    """`inspect`, `help` and test runners ask every module in `sys.modules` for many things."""
    for path in PATHS:
        module = sys.modules[f"dspylite.{path}"]
        assert module.__spec__ is not None
        assert importlib.util.find_spec(module.__name__) is module.__spec__
        assert getattr(module, "__warningregistry__", None) is None or is_real(path)
        assert inspect.getmembers(module)
        assert re.match(r"<module 'dspylite\.", repr(module))


def test_global_history_is_the_live_one() -> None:
    """DSPy's programs read the last calls of all LMs from there."""
    from_path = importlib.import_module("dspylite.clients.base_lm").GLOBAL_HISTORY
    assert from_path is GLOBAL_HISTORY
    before = list(from_path)[-1:]
    dspylite.OfflineLM()("Which city? Paris.")
    assert [from_path[-1]] != before
    assert from_path[-1]["model"] == "offline/extractive"
