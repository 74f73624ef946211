"""What `import dspylite` does not do: load slow libraries, write, connect, start threads.

Not here: how long it takes, which benchmarks measure.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dspylite
import dspylite.testing

ROOT = Path(__file__).resolve().parent.parent

SPY = """
import _thread, json, os, sys

seen = {"written": [], "sockets": [], "threads": [], "processes": [], "removed": []}
kinds = {
    "subprocess.Popen": "processes", "os.fork": "processes", "os.system": "processes",
    "os.mkdir": "written", "os.rename": "written", "os.remove": "removed", "os.rmdir": "removed",
}

def spy(event, args):
    if event == "open":
        path, mode, flags = args
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if (mode and set(mode) & set("wax+")) or (flags or 0) & writes:
            seen["written"].append(str(path))
    elif event.startswith("socket."):
        seen["sockets"].append(event)
    elif event in kinds:
        seen[kinds[event]].append(event)

def watched(start):  # there is no audit event for threads before Python 3.12
    def start_thread(*args, **kwargs):
        seen["threads"].append(repr(args[0]))
        return start(*args, **kwargs)
    return start_thread

for name in {"start_new_thread", "start_new", "start_joinable_thread"} & set(vars(_thread)):
    setattr(_thread, name, watched(getattr(_thread, name)))
before = dict(os.environ)
sys.addaudithook(spy)
import MODULE
seen["environment"] = dict(os.environ) != before
seen["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(seen))
"""

SLOW = {
    *("litellm openai tiktoken tokenizers httpx httpcore aiohttp urllib3 requests".split()),
    *("numpy pandas diskcache sqlite3 fastapi starlette uvicorn rich tqdm trio".split()),
}


def imported(module: str) -> dict[str, Any]:
    """Import a module in a fresh process under audit, without writing byte code."""
    command = [sys.executable, "-B", "-c", SPY.replace("MODULE", module)]
    return dict(json.loads(subprocess.check_output(command, cwd=ROOT, text=True, timeout=30)))


@pytest.fixture(scope="module")
def after_import() -> dict[str, Any]:
    return imported("dspylite")


def test_import_loads_no_slow_library(after_import: dict[str, Any]) -> None:
    """litellm alone takes seconds; a command-line tool must not pay for what it does not use."""
    assert "dspylite" in after_import["modules"]
    assert SLOW & set(after_import["modules"]) == set()


@pytest.mark.parametrize("kind", ["written", "removed", "sockets", "threads", "processes"])
def test_import_touches_nothing(kind: str, after_import: dict[str, Any]) -> None:
    """An import that writes, connects or starts threads surprises whoever forks or sandboxes."""
    assert after_import[kind] == []


def test_import_leaves_the_environment_alone(after_import: dict[str, Any]) -> None:
    """litellm's variables are set when litellm is first used."""
    assert after_import["environment"] is False


@pytest.mark.parametrize("module", ["dspylite.testing", "dspylite.__main__"])
def test_fakes_and_command_line_are_as_light(module: str) -> None:
    """A test suite imports the fakes, and `dspylite --help` must answer at once."""
    seen = imported(module)
    assert SLOW & set(seen["modules"]) == set()
    assert seen["written"] == seen["sockets"] == seen["threads"] == seen["processes"] == []


def test_offline_call_loads_no_slow_library() -> None:
    """The embedded default works where nothing else is installed."""
    code = """
import sys
import dspylite as dspy
dspy.configure(lm=dspy.OfflineLM())
dspy.Predict("question -> answer").batch([{"question": "Is snow white? Snow is white."}] * 3)
dspy.Embedder("offline/hashing").embed(["a", "b"])
print(sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:])))
"""
    command = [sys.executable, "-c", code, *SLOW]
    out = subprocess.check_output(command, cwd=ROOT, text=True, timeout=30)
    assert out == "[]\n"


def test_spy_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A spy that sees nothing would let every test above pass."""
    (tmp_path / "noisy.py").write_text(
        "import os, socket, sqlite3, subprocess, sys, threading\n"
        "os.environ['NOISY'] = '1'\n"
        "socket.socket().close()\n"
        "open('noise.txt', 'w').close()\n"
        "os.remove('noise.txt')\n"
        "threading.Thread(target=int).start()\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
    )
    command = [sys.executable, "-B", "-c", SPY.replace("MODULE", "noisy")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True, timeout=30)
    seen = json.loads(out)
    assert "noise.txt" in seen["written"]
    assert all(seen[kind] for kind in ("removed", "sockets", "threads", "processes"))
    assert seen["environment"] is True
    assert "sqlite3" in seen["modules"]


# --- The public list ---------------------------------------------------------------------------

PUBLIC = [
    (module, name) for module in (dspylite, dspylite.testing) for name in sorted(module.__all__)
]
IDS = [f"{module.__name__}.{name}" for module, name in PUBLIC]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=IDS)
def test_public_name_exists_and_is_documented(module: Any, name: str) -> None:
    """`help(dspylite.X)` says what X is, in words of its own."""
    thing = getattr(module, name)
    documented = thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing)
    text = documented.__doc__ or ""
    assert text.strip()
    # What a dataclass writes by itself is its signature.
    assert not (dataclasses.is_dataclass(documented) and text.startswith(f"{name}("))


@pytest.mark.parametrize("module", [dspylite, dspylite.testing], ids=lambda m: m.__name__)
def test_public_list_names_each_name_once(module: Any) -> None:
    """A name listed twice hides one that was forgotten."""
    assert len(module.__all__) == len(set(module.__all__))


def test_public_list_is_what_the_package_shows() -> None:
    """What can be imported by a plain name is promised; nothing else is."""
    shown = {
        name
        for name, thing in vars(dspylite).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert shown - set(dspylite.__all__) == set()


def test_star_import_gives_the_public_list() -> None:
    """`from dspylite import *` in a notebook works."""
    namespace: dict[str, Any] = {}
    exec("from dspylite import *", namespace)
    assert set(dspylite.__all__) <= set(namespace)


# --- names that are loaded when they are used ---------------------------------------------------


def declared_for_checkers() -> dict[str, str]:
    """Read which names `__init__.py` imports for type checkers only, and from where."""
    tree = ast.parse((ROOT / "dspylite" / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [each for block in blocks for each in block.body if isinstance(each, ast.ImportFrom)]
    return {
        alias.name: str(each.module).removeprefix("dspylite.")
        for each in imports
        for alias in each.names
        if each.module != "dspylite"
    }


def test_later_names_are_those_that_checkers_see() -> None:
    """A name in one of the two lists alone would be missing for one of the two."""
    later = dspylite._LATER
    assert declared_for_checkers() == {
        name: file for file, names in later.items() for name in names.split()
    }


def test_rarer_names_are_loaded_by_their_use_and_not_before() -> None:
    """Most programs use none of them, and all would pay."""
    code = (
        "import sys, dspylite as dspy\n"
        "later = {f'dspylite.{file}' for file in dspy._LATER}\n"
        "early = later & set(sys.modules)\n"
        "dspy.Image, dspy.evaluate.SemanticF1, dspy.streamify\n"
        "print(sorted(early), len(later & set(sys.modules)) > 2, 'Refine' in dir(dspy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] True True\n"


def test_names_are_loaded_for_the_first_time_by_many_threads_at_once() -> None:
    """A service's first requests come together, and pydantic builds what they use then."""
    code = (
        "import threading, dspylite as dspy\n"
        "start, failures = threading.Barrier(16), []\n"
        "def work():\n"
        "    start.wait()\n"
        "    try:\n"
        "        image = dspy.Image(url='https://example.org/a.png')\n"
        "        calls = dspy.ToolCalls.model_validate([{'name': 'f', 'args': {'x': 1}}])\n"
        "        made = dspy.Signature('photo: Image, h: History -> calls: ToolCalls, c: Code')\n"
        "        turns = dspy.History(messages=[{'c': 'x'}])\n"
        "        text = dspy.ChatAdapter().format(made, [], {'photo': image, 'h': turns})\n"
        "        assert text[-1]['content'][1]['image_url']['url'] == image.url\n"
        "        assert calls.tool_calls[0].args == {'x': 1}\n"
        "        assert image.model_dump() == {'url': image.url}\n"
        "    except BaseException as error:\n"
        "        failures.append(repr(error))\n"
        "threads = [threading.Thread(target=work) for _ in range(16)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(failures)\n"
    )
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("[]\n", "")
