"""The main job as a demonstration: questions over documents, answered in four ways at once.

Not here: the command line (`__main__.py`).
"""

from __future__ import annotations

import asyncio  # the demo is a script with an event loop of its own
import importlib.resources
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from dspylite.abc import LanguageModel
from dspylite.concurrency.executors import asyncify
from dspylite.concurrency.parallel import Parallel
from dspylite.errors import DSPyError
from dspylite.models.embedder import Embedder
from dspylite.models.lm import LM, OfflineLM
from dspylite.models.matrix import EmbeddingMatrix
from dspylite.programs.base import Module
from dspylite.programs.predict import Predict
from dspylite.runtime.settings import configure, context
from dspylite.runtime.threads import bind
from dspylite.runtime.tracking import track_usage
from dspylite.schema.records import Prediction

QUESTIONS = (
    "What does a configure call change?",
    "Which value does a read of a setting give?",
    "How do I carry a context into a plain thread pool?",
    "What happens when a setting is misspelt?",
    "What does a batch do when an item fails?",
    "In which order are the results of a batch returned?",
    "What does acall do with a module that has only forward?",
    "How is an async module called from a notebook?",
    "What does a run do with its settings when it starts?",
    "What is OfflineLM for?",
    "Where may a file import from?",
    "What is a plan?",
)

PASSAGES_PER_QUESTION = 3
MIN_PASSAGE_CHARS = 60
MAX_PASSAGE_CHARS = 1_200


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of a document.

    Attributes:
        source: Where it stands, such as `"concepts/settings.md, Reading"`.
        text: What it says.
    """

    source: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Passages with their vectors, to be searched.

    Attributes:
        passages: The passages.
        vectors: One unit vector per passage.
        embedder: What made the vectors, and makes those of questions.
    """

    passages: Sequence[Passage]
    vectors: EmbeddingMatrix
    embedder: Embedder

    def search(self, question: str, *, count: int) -> list[Passage]:
        """Return the passages nearest to a question, nearest first."""
        (vector,) = self.embedder.embed([question])
        scores = self.vectors.dot(vector)
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        return [self.passages[index] for index in best[:count]]


class AnswerFromDocuments(Module):
    """Finds the passages nearest to a question and asks a model to answer from them."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.library = library
        self.answer = Predict("context: list[str], question -> answer")

    def forward(self, question: str) -> Prediction:
        """Answer one question, telling where the answer stands and who worked on it."""
        passages, started = self._find(question)
        found = self.answer(context=[passage.text for passage in passages], question=question)
        return self._told(found, passages, started, threading.current_thread().name)

    async def aforward(self, question: str) -> Prediction:
        """Answer one question as a task of an event loop."""
        passages, started = self._find(question)
        found = await self.answer.acall(context=[p.text for p in passages], question=question)
        task = asyncio.current_task()
        return self._told(found, passages, started, task.get_name() if task else "task")

    def _find(self, question: str) -> tuple[list[Passage], float]:
        started = time.perf_counter()
        return self.library.search(question, count=PASSAGES_PER_QUESTION), started

    @staticmethod
    def _told(
        found: Prediction, passages: Sequence[Passage], started: float, worker: str
    ) -> Prediction:
        source = next((p.source for p in passages if found.answer in p.text), passages[0].source)
        seconds = time.perf_counter() - started
        return Prediction(answer=found.answer, source=source, worker=worker, seconds=seconds)


def run_demo(
    *,
    folder: Path | None = None,
    questions: Sequence[str] = (),
    threads: int = 8,
    out: TextIO | None = None,
) -> int:
    """Answer questions over documents in four ways and print a table of what came out.

    Args:
        folder: Documents to read (`*.md`, `*.txt`); the project's own documentation by default.
        questions: What to ask; `QUESTIONS` by default.
        threads: Threads of the batch and of the plain pool.
        out: Where to print; stdout by default.

    Returns:
        0 if every way answered every question, and on the offline model all with the same words.
    """
    say = partial(print, file=out or sys.stdout)
    questions = list(questions) or list(QUESTIONS)
    try:
        lm = _language_model()
        library = _build_library(folder)
    except (DSPyError, OSError) as error:
        say(f"dspylite demo: {error}")
        return 2
    offline = isinstance(lm, OfflineLM)
    say(f"Model: {lm.model}{'' if offline else ' over HTTP'}. Documents: ", end="")
    say(f"{len(library.passages)} passages. Questions: {len(questions)}, asked in 4 ways.\n")
    program = AnswerFromDocuments(library)
    configure(lm=lm)
    answers: dict[str, list[Prediction]] = {}
    with track_usage() as tracker:
        for name, way in _ways(program, lm, threads).items():
            started = time.perf_counter()
            try:
                answers[name] = way(questions)
            except DSPyError as error:
                say(f"{name}: {error}")
                return 1
            say(f"{name:<40} {len(questions)} answers in {time.perf_counter() - started:.3f} s")
    say()
    _print_table(questions, answers, say)
    for model, usage in tracker.by_model.items():
        say(
            f"Usage of {model}: {usage.calls} calls, {usage.prompt_tokens} tokens read, "
            f"{usage.completion_tokens} written."
        )
    return _compare(answers, say, offline=offline)


def _language_model() -> LanguageModel:
    model = os.environ.get("DSPYLITE_MODEL")
    if not model:
        return OfflineLM()
    # Each of the four ways asks; from the cache, three of them would not.
    return LM(model, api_base=os.environ.get("DSPYLITE_API_BASE"), temperature=0.0, cache=False)


def _ways(
    program: AnswerFromDocuments, lm: LanguageModel, threads: int
) -> dict[str, Callable[[Sequence[str]], list[Prediction]]]:
    def on_parallel_threads(questions: Sequence[str]) -> list[Prediction]:
        pairs = [(program, {"question": question}) for question in questions]
        found: list[Prediction] = Parallel(num_threads=threads, progress=True)(pairs)
        return found

    def in_plain_pool(questions: Sequence[str]) -> list[Prediction]:
        with context(lm=lm), ThreadPoolExecutor(threads, "plain-pool") as pool:
            return list(pool.map(bind(program), questions))

    def by_asyncify(questions: Sequence[str]) -> list[Prediction]:
        return asyncio.run(_gather(asyncify(program), questions))

    def by_acall(questions: Sequence[str]) -> list[Prediction]:
        return asyncio.run(_gather(program.acall, questions))

    return {
        f"Parallel on {threads} threads": on_parallel_threads,
        "plain ThreadPoolExecutor under context": in_plain_pool,
        "asyncio through asyncify": by_asyncify,
        "asyncio through acall": by_acall,
    }


async def _gather(ask: Callable[..., Any], questions: Sequence[str]) -> list[Prediction]:
    found: list[Prediction] = await asyncio.gather(*(ask(question=q) for q in questions))
    return found


def _compare(
    answers: dict[str, list[Prediction]], say: Callable[..., None], *, offline: bool
) -> int:
    columns = zip(*([p.answer for p in column] for column in answers.values()), strict=True)
    different = sum(1 for row in columns if len(set(row)) > 1)
    if not different:
        say("All four ways gave the same answers.")
        return 0
    say(f"{different} questions were answered with different words by different ways.")
    return 1 if offline else 0


def _print_table(
    questions: Sequence[str], answers: dict[str, list[Prediction]], say: Callable[..., None]
) -> None:
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    wrap = partial(textwrap.wrap, width=width - 11)
    for index, question in enumerate(questions):
        predictions = [column[index] for column in answers.values()]
        workers = ", ".join(f"{p.worker} {p.seconds * 1000:.0f} ms" for p in predictions)
        rows = {
            f"{index + 1:>2} asked": question,
            "answer": str(predictions[0].answer),
            "source": predictions[0].source,
            "worker": workers,
        }
        for label, text in rows.items():
            lines = wrap(text) or [""]
            say(f"{label:>9}  {lines[0]}")
            for line in lines[1:]:
                say(f"{'':>9}  {line}")
        say()


def _build_library(folder: Path | None) -> Library:
    """Read and embed the documents.

    Raises:
        FileNotFoundError: There are none.
    """
    passages = list(_passages_in(folder) if folder else _own_documentation())
    if not passages:
        raise FileNotFoundError(
            f"there is nothing to read in {folder}: it needs .md or .txt files with paragraphs of "
            f"at least {MIN_PASSAGE_CHARS} characters"
        )
    embedder = Embedder("offline/hashing", dimensions=1024)
    vectors = embedder.embed([f"{passage.source} {passage.text}" for passage in passages])
    return Library(passages=passages, vectors=vectors, embedder=embedder)


def _own_documentation() -> Iterator[Passage]:
    """Read `docs/` of a checkout; in an installed package the docstrings of the modules."""
    docs = Path(__file__).parent.parent / "docs"
    if docs.is_dir():
        yield from _passages_in(docs)
        return
    for file in importlib.resources.files("dspylite").iterdir():
        if file.is_dir():
            for inner in file.iterdir():
                if inner.name.endswith(".py"):
                    yield from _paragraphs(inner.name, inner.read_text("utf-8").split('"""')[1:2])


def _passages_in(folder: Path) -> Iterator[Passage]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".md", ".txt"} and path.is_file():
            text = path.read_text("utf-8", errors="replace")
            yield from _paragraphs(path.relative_to(folder).as_posix(), text.split("\n\n"))


def _paragraphs(name: str, parts: Sequence[str]) -> Iterator[Passage]:
    heading, in_code = "", False
    for part in parts:
        lines = [line for line in part.splitlines() if line.strip()]
        if lines and lines[0].startswith("#"):
            heading = lines.pop(0).lstrip("# ")
        fences = sum(line.lstrip().startswith("```") for line in lines)
        was_code, in_code = in_code, in_code ^ bool(fences % 2)
        text = " ".join(line.strip() for line in lines)
        if was_code or fences or text.startswith(("|", "<!--")) or len(text) < MIN_PASSAGE_CHARS:
            continue
        source = f"{name}, {heading}" if heading else name
        yield Passage(source=source, text=text[:MAX_PASSAGE_CHARS])
