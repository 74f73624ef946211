"""The pages under `docs/` and the README: their code runs, their links lead somewhere.

Not here: the README's commands (`test_readme.py`) and the floor table (`test_architecture.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dspylite
from dspylite.runtime.settings import SettingsChanges

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README, INDEX = ROOT / "README.md", DOCS / "index.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A piece of Python on a page."""

    page: Path
    line: int
    code: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in _BLOCK.finditer(text):
            line = text.count("\n", 0, found.start(1)) + 1
            yield Block(page, line, found[1])


BLOCKS = list(blocks())


def links(page: Path) -> list[str]:
    """List the links of a page, except those in code."""
    return _LINK.findall(_ANY_BLOCK.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """List what `#...` can name on a page, by GitHub's rule."""
    headings = _HEADING.findall(_ANY_BLOCK.sub("", page.read_text("utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.fixture
def settings_restored() -> Iterator[None]:
    """Give the process its settings back, which a page's `configure` changes."""
    before: SettingsChanges = dspylite.settings.snapshot().values  # type: ignore[assignment]
    yield
    dspylite.configure(**before)


def test_pages_have_code() -> None:
    """A pattern that finds no block would let every page pass."""
    assert len(BLOCKS) >= 10


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{name_of(block.page)}:{block.line}")
def test_code_on_the_page_runs(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Each piece stands for itself: whoever copies it has all that it needs."""
    padding = "\n" * (block.line - 1)  # so that a traceback names the page's own line
    code = compile(padding + block.code, name_of(block.page), "exec")
    exec(code, {"__name__": "a_page"})
    if "print(" in block.code:
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if DOCS in page.parents and page.name != "index.md"],
    ids=name_of,
)
def test_page_is_linked_from_the_index(page: Path) -> None:
    """What cannot be found from the front page is not read."""
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(INDEX)}
    assert page in linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_a_file_and_its_heading(page: Path) -> None:
    """A page that was moved takes its links along."""
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue  # another host's affair, and no test talks to the network
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_begins_with_its_title(page: Path) -> None:
    """The demo and every renderer take the first heading for the page's name."""
    assert re.match(r"# \S", page.read_text("utf-8"))


def test_every_public_name_is_listed_with_the_first_words_of_its_docstring() -> None:
    """Whoever looks for a name finds it, and what is said there is said once."""
    page = (ROOT / "docs" / "reference" / "names.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, flags=re.MULTILINE))
    public = {name: getattr(dspylite, name) for name in dspylite.__all__}
    expected = {
        name: (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
        for name, value in public.items()
        if not (isinstance(value, type) and issubclass(value, dspylite.DSPyError))
    }
    assert listed == expected
