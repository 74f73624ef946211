"""The house rules: imports run downward only, in no cycle, and never through the package's face.

The floor table is read from `docs/architecture.md`. The checker is a set of pure functions over a
mapping of relative path to source text, so the second half of this file tests the checker itself.
"""

import ast
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = "dspylite"
ROOT = Path(__file__).resolve().parent.parent


# --- The checker -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import of the package's own code, wherever in a file it stands."""

    line: int
    wanted: str  # as written in the source, made absolute
    target: str | None  # the file it names; None where there is no such module
    face: bool = False  # it binds the name of the package itself


def read_floors(page: str) -> dict[str, int]:
    """Read place -> floor from the Markdown table between the `floors` markers."""
    if page.count("<!-- floors -->") != 1 or page.count("<!-- /floors -->") != 1:
        raise ValueError("the page needs one `<!-- floors -->` and one `<!-- /floors -->`")
    table = page.partition("<!-- floors -->")[2].partition("<!-- /floors -->")[0]
    floors: dict[str, int] = {}
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        if not cells[0].isdigit():
            continue  # the heading, the rule under it, an empty line
        for place in (name.strip(" `") for name in cells[1].split(",")):
            if place in floors:
                raise ValueError(f"`{place}` stands in the table twice")
            floors[place] = int(cells[0])
    if not floors:
        raise ValueError("the floor table has no row")
    return floors


def place_of(path: str, places: Iterable[str]) -> str | None:
    """Name the table entry that a file belongs to: itself, or the nearest folder around it."""
    around = [p for p in places if p == path or (p.endswith("/") and path.startswith(p))]
    return max(around, key=len, default=None)


def imports_of(path: str, sources: Mapping[str, str]) -> list[Import]:
    """List what a file imports from the package, also inside functions and `TYPE_CHECKING`."""
    modules = {_module_name(file): file for file in sources}
    package = _module_name(path) if path.endswith("__init__.py") else _parent(_module_name(path))
    found: list[Import] = []

    def note(line: int, wanted: str, *, face: bool = False) -> None:
        if wanted == PACKAGE or wanted.startswith(f"{PACKAGE}."):
            found.append(Import(line=line, wanted=wanted, target=modules.get(wanted), face=face))

    for node in ast.walk(ast.parse(sources[path], filename=path)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    # `import a.b` binds `a`; `import a.b as c` binds the module that is meant.
                    note(node.lineno, alias.name, face=alias.asname is None)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = _absolute(package, module, level)
                for alias in names:
                    inner = f"{base}.{alias.name}"
                    note(node.lineno, inner if inner in modules else base)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _imports_by_name(node):
                note(node.lineno, _by_name(name, package))
            case _:
                pass
    return found


def check_imports(sources: Mapping[str, str], floors: Mapping[str, int]) -> list[str]:
    """Check each import by itself: it names a module, which lies below or in the same folder.

    A single file is no wing: it may use what else is on its floor, as `__main__.py` uses `demo.py`.
    """
    problems: list[str] = []
    for path in sorted(sources):
        place = place_of(path, floors)
        for each in imports_of(path, sources):
            where = f"`{path}` line {each.line}"
            if each.face or each.target == "__init__.py":
                problems.append(f"{where} imports the package's own face, `{each.wanted}`")
            elif each.target is None:
                problems.append(f"{where} imports `{each.wanted}`, which does not exist")
            elif _is_own_face(path, each.target):
                problems.append(f"{where} imports the face of its own folder, `{each.wanted}`")
            else:
                there = place_of(each.target, floors)
                if place is None or there is None or place == there:
                    continue
                own, other = f"{place} (floor {floors[place]})", f"{there} (floor {floors[there]})"
                if floors[there] > floors[place]:
                    problems.append(f"{where} imports `{each.wanted}` upward: {own} from {other}")
                elif floors[there] == floors[place] and place.endswith("/"):
                    problems.append(f"{where} imports `{each.wanted}` sideways: {own} from {other}")
    return problems


def check_places(sources: Mapping[str, str], floors: Mapping[str, int]) -> list[str]:
    """Check that the files and the table's entries are the same."""
    homeless = [path for path in sorted(sources) if place_of(path, floors) is None]
    used = {place_of(path, floors) for path in sources}
    return [f"`{path}` is not in the floor table" for path in homeless] + [
        f"`{place}` is in the floor table, but there is no such file or folder"
        for place in floors
        if place not in used
    ]


def check_cycles(sources: Mapping[str, str]) -> list[str]:
    """Name one shortest cycle through each file that is in one, each cycle once."""
    graph = {
        path: sorted({each.target for each in imports_of(path, sources) if each.target})
        for path in sorted(sources)
    }
    cycles: dict[frozenset[str], list[str]] = {}
    for path in graph:
        cycle = _shortest_cycle(graph, path)
        if cycle:
            cycles.setdefault(frozenset(cycle), cycle)
    return [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles.values()]


def check_house(sources: Mapping[str, str], floors: Mapping[str, int]) -> list[str]:
    """List every broken house rule as a sentence; an empty list is a house in order."""
    return [
        *check_places(sources, floors),
        *check_imports(sources, floors),
        *check_cycles(sources),
    ]


def _module_name(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def _absolute(package: str, module: str | None, level: int) -> str:
    if level == 0:
        return module or ""
    for _ in range(level - 1):
        package = _parent(package)
    return f"{package}.{module}" if module else package


def _imports_by_name(call: ast.Call) -> bool:
    names = {"import_module", "__import__"}
    return (isinstance(call.func, ast.Name) and call.func.id in names) or (
        isinstance(call.func, ast.Attribute) and call.func.attr in names
    )


def _by_name(name: str, package: str) -> str:
    bare = name.lstrip(".")
    return _absolute(package, bare, len(name) - len(bare))


def _is_own_face(path: str, target: str) -> bool:
    folder, _, name = target.rpartition("/")
    return name == "__init__.py" and path != target and path.startswith(f"{folder}/")


def _shortest_cycle(graph: Mapping[str, list[str]], start: str) -> list[str]:
    queue = deque([[start]])
    seen: set[str] = set()
    while queue:
        road = queue.popleft()
        for step in graph[road[-1]]:
            if step == start:
                return [*road, start]
            if step not in seen:
                seen.add(step)
                queue.append([*road, step])
    return []


# --- The house ---------------------------------------------------------------------------------


def _house() -> dict[str, str]:
    package = ROOT / PACKAGE
    return {
        file.relative_to(package).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(package.rglob("*.py"))
    }


def test_house_is_in_order() -> None:
    """A house without upward imports and cycles can be read, and changed, floor by floor."""
    floors = read_floors((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    problems = check_house(_house(), floors)
    assert problems == [], "\n".join(problems)


# --- The checker, checked ----------------------------------------------------------------------

FLOORS = {
    "errors.py": 1,
    "runtime/": 4,
    "models/": 5,
    "adapters/": 5,
    "programs/": 6,
    "__init__.py": 7,
    "__main__.py": 7,
    "demo.py": 7,
    "doors/": 7,
}


def _sound() -> Iterator[tuple[str, str]]:
    """A small house that breaks no rule and uses each form of import that is allowed."""
    yield "errors.py", "class LMError(Exception): ..."
    yield "runtime/__init__.py", "from dspylite.runtime.settings import current"
    yield "runtime/settings.py", "from ..errors import LMError\ncurrent = None"
    yield "runtime/flow.py", "from . import settings\nfrom dspylite.runtime import settings as s"
    yield "models/__init__.py", ""
    yield "models/base.py", "import dspylite.errors as errors\nfrom dspylite.runtime import current"
    yield "adapters/__init__.py", ""
    yield "adapters/deep/__init__.py", ""
    yield "adapters/deep/base.py", "import json\nfrom ...runtime.flow import run"
    yield "programs/__init__.py", ""
    yield "programs/predict.py", "from dspylite.models.base import LM\nfrom dspylite import errors"
    yield "doors/__init__.py", ""
    yield "demo.py", "def tour():\n    from dspylite.programs.predict import Predict"
    yield "__init__.py", "from dspylite.programs.predict import Predict"
    yield "__main__.py", "from dspylite.demo import tour\nfrom dspylite import doors"


def _problems(planted: Mapping[str, str], floors: Mapping[str, int] = FLOORS) -> list[str]:
    return check_house({**dict(_sound()), **planted}, floors)


def test_sound_house_has_no_problem() -> None:
    """Otherwise the checker would forbid what the rules allow."""
    assert _problems({}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from dspylite.models.base import LM",
        "from dspylite.models import base",
        "import dspylite.models.base as base",
        "from ..models import base",
        "def late():\n    from dspylite.models import base",
        "import typing\nif typing.TYPE_CHECKING:\n    from dspylite.models import base",
        "import importlib\nimportlib.import_module('dspylite.models.base')",
        "import importlib\nimportlib.import_module('..models.base', __package__)",
    ],
)
def test_upward_import_is_reported_in_every_form(source: str) -> None:
    """An upward import is the beginning of a cycle, however it is spelt."""
    line = len(source.splitlines())
    assert _problems({"runtime/late.py": source}) == [
        f"`runtime/late.py` line {line} imports `dspylite.models.base` upward: "
        "runtime/ (floor 4) from models/ (floor 5)"
    ]


def test_import_from_another_wing_is_reported() -> None:
    """Wings of one floor are joined from above, so that each can be changed alone."""
    assert _problems({"adapters/chat.py": "from dspylite.models.base import LM"}) == [
        "`adapters/chat.py` line 1 imports `dspylite.models.base` sideways: "
        "adapters/ (floor 5) from models/ (floor 5)"
    ]


def test_folder_must_not_import_a_file_of_its_floor() -> None:
    """A file may use the wings of its floor; a wing knows nothing beside it."""
    assert _problems({"doors/cli.py": "from dspylite.__main__ import main"}) == [
        "`doors/cli.py` line 1 imports `dspylite.__main__` sideways: "
        "doors/ (floor 7) from __main__.py (floor 7)"
    ]


def test_cycle_through_a_function_level_import_is_reported() -> None:
    """An import inside a function hides a cycle from Python, but not from the reader."""
    planted = {
        "runtime/a.py": "from dspylite.runtime import b",
        "runtime/b.py": "def late():\n    from dspylite.runtime.a import name",
    }
    assert _problems(planted) == ["import cycle: runtime/a.py -> runtime/b.py -> runtime/a.py"]


def test_long_cycle_is_reported_once() -> None:
    """Three files in a ring are one problem, not three."""
    planted = {
        "runtime/a.py": "from dspylite.runtime import b",
        "runtime/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import c",
        "runtime/c.py": "from .a import name",
    }
    assert _problems(planted) == [
        "import cycle: runtime/a.py -> runtime/b.py -> runtime/c.py -> runtime/a.py"
    ]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("import dspylite", "dspylite"),
        ("import dspylite as dspy", "dspylite"),
        ("from dspylite import Predict", "dspylite"),
        ("from dspylite import *", "dspylite"),
        ("from .. import Predict", "dspylite"),
        ("import dspylite.errors", "dspylite.errors"),
        ("__import__('dspylite')", "dspylite"),
    ],
)
def test_import_of_the_face_is_reported(source: str, wanted: str) -> None:
    """The face imports everything, so whoever imports the face is in a cycle with everything."""
    found = check_imports({**dict(_sound()), "programs/late.py": source}, FLOORS)
    assert found == [f"`programs/late.py` line 1 imports the package's own face, `{wanted}`"]


@pytest.mark.parametrize(
    "source", ["from dspylite.runtime import current", "from . import current"]
)
def test_import_of_the_own_folders_face_is_reported(source: str) -> None:
    """A folder's `__init__.py` is for those outside."""
    assert _problems({"runtime/late.py": source}) == [
        "`runtime/late.py` line 1 imports the face of its own folder, `dspylite.runtime`"
    ]


def test_import_of_a_missing_module_is_reported() -> None:
    """A misspelt late import would otherwise be found by a user."""
    assert _problems({"models/late.py": "def late():\n    import dspylite.eros as e"}) == [
        "`models/late.py` line 2 imports `dspylite.eros`, which does not exist"
    ]


def test_file_outside_the_table_is_reported() -> None:
    """Each file has a floor, or nobody knows what it may import."""
    assert _problems({"utils.py": ""}) == ["`utils.py` is not in the floor table"]


def test_table_entry_without_a_file_is_reported() -> None:
    """A table that names what is gone misleads its reader."""
    assert _problems({}, {**FLOORS, "cellar/": 1}) == [
        "`cellar/` is in the floor table, but there is no such file or folder"
    ]


def test_floor_table_is_read_from_the_page() -> None:
    """A floor may have several rows, and a row several places."""
    page = """Words.
<!-- floors -->
| Floor | Place | What lives there |
|------:|-------|------------------|
| 5 | `models/`, `adapters/` | Wings. |
| 5 | `concurrency/` | A wing, too. |
| 1 | `errors.py` | The tree. |
<!-- /floors -->
| 9 | `not/a/floor` | |
"""
    expected = {"models/": 5, "adapters/": 5, "concurrency/": 5, "errors.py": 1}
    assert expected == read_floors(page)


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("no marker", "the page needs one"),
        ("<!-- floors -->\n<!-- /floors -->", "has no row"),
        ("<!-- floors -->\n| 1 | a.py, a.py | x |\n<!-- /floors -->", "`a.py` stands in the table"),
    ],
)
def test_unreadable_floor_table_raises(page: str, problem: str) -> None:
    """A table that cannot be read must not pass as a house without rules."""
    with pytest.raises(ValueError, match=problem):
        read_floors(page)
