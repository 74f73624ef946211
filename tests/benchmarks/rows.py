"""The rows of the table: what is measured, of whom, and what dspylite has to reach.

Not here: how a row is measured (`measuring.py`) and printed (`table.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TITLES = {
    "dspylite": "dspylite",
    "dspylite-litellm": "dspylite, engine litellm",
    "dspylite-cache": "dspylite, cache on",
    "dspy": "DSPy",
    "dspy-litellm": "DSPy, engine litellm",
    "litellm": "litellm",
    "openai": "openai SDK",
    "httpx": "httpx",
    "urllib3": "urllib3",
    "aiohttp": "aiohttp",
    "http.client": "http.client",
    "pool.map": "ThreadPoolExecutor.map",
    "anyio": "anyio.to_thread",
    "base": "pydantic + anyio + diskcache",
}
"""Every peer, as the table calls it."""

Unit = Literal["seconds", "megabytes", "per second", "percent", "times"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of each measurement."""

    key: str
    title: str
    unit: Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What one peer's figure must be: so many times another's, or so much by itself."""

    limit: float
    relation: Literal["<=", ">="] = "<="
    than: str | None = None
    peer: str = "dspylite"
    key: str = "cpu_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A workload and those who do it. Its first column is compared with that of `against`."""

    name: str
    title: str
    function: str
    """Module and function under `tests.benchmarks`; takes the peer, the port, the arguments."""
    peers: tuple[str, ...]
    columns: tuple[Column, ...]
    goals: tuple[Goal, ...]
    against: str = "dspy"
    arguments: tuple[str, ...] = ()
    """`{seconds}` and `{gathered}` stand for what the pace of the run says."""
    latency_ms: float | None = None
    """How long the server waits before it answers; None for work without a server."""
    serves: Literal["chat", "embeddings"] = "chat"
    """Which of the local servers it needs."""
    heavy: bool = False
    """Whether a round takes so long that fewer of them must do."""
    warm_up: bool = False
    """Whether a first round is thrown away, because it fills the file cache and writes bytecode."""


_CPU = Column(key="cpu_s", title="CPU per call", unit="seconds")
_WALL = Column(key="wall_s", title="wall per call", unit="seconds")
_MEMORY = Column(key="memory_mb", title="memory", unit="megabytes")
_RATE = Column(key="per_s", title="calls/s", unit="per second")
_IDEAL = Column(key="ideal", title="of ideal", unit="percent")
_FAILED = Column(key="failed", title="failed", unit="percent")
_SYNC = (
    "dspylite dspylite-litellm dspy dspy-litellm litellm openai httpx urllib3 http.client".split()
)
_ASYNC = "dspylite dspylite-litellm dspy dspy-litellm litellm openai httpx aiohttp".split()


def _threads(width: int, goal: Goal) -> Row:
    return Row(
        name=f"threads-{width}",
        title=f"{width} threads, 50 ms server latency",
        function="calls:on_threads",
        arguments=("{seconds}", str(width), "50"),
        latency_ms=50,
        heavy=True,
        peers=tuple(_SYNC),
        columns=(_RATE, _IDEAL, _CPU, _FAILED),
        goals=(goal,),
    )


def _serving(form: str, peers: str, bare: str | None) -> Row:
    goals = [Goal(limit=1.4, relation=">=", key="per_s", than="dspy")]
    if bare is not None:
        goals.append(Goal(limit=0.8, relation=">=", key="per_s", than=bare))
    return Row(
        name=f"serve-{form}",
        title=f"FastAPI, {form} handlers, one worker, 64 clients, 50 ms server latency",
        function="serving:serve",
        arguments=("{seconds}", form, "50"),
        latency_ms=50,
        heavy=True,
        peers=tuple(peers.split()),
        columns=(_RATE, _IDEAL, _CPU),
        goals=tuple(goals),
    )


def _hits(level: str) -> Row:
    return Row(
        name=f"hit-{level}",
        title=f"one `Predict` call answered from the cache, {level}",
        function="remembering:hits",
        arguments=("{seconds}", level),
        latency_ms=0,
        peers=("dspylite", "dspy"),
        columns=(_CPU, _WALL),
        goals=(Goal(limit=0.35, than="dspy"),),
    )


def _embeddings(latency_ms: int, than_dspy: float) -> Row:
    return Row(
        name=f"embed-{latency_ms}",
        title=f"10,000 texts x 1,536 dimensions in batches of 200, {latency_ms} ms server latency",
        function="embedding:embed",
        arguments=("10000",),
        latency_ms=latency_ms,
        serves="embeddings",
        heavy=True,
        peers=tuple("dspylite dspylite-cache dspylite-litellm dspy litellm openai aiohttp".split()),
        columns=(
            Column(key="per_s", title="texts/s", unit="per second"),
            Column(key="cpu_s", title="CPU per text", unit="seconds"),
        ),
        goals=(
            Goal(limit=than_dspy, relation=">=", key="per_s", than="dspy"),
            Goal(limit=0.6, relation=">=", key="per_s", than="aiohttp"),
        ),
    )


def _statement(name: str, title: str, limit: float) -> Row:
    return Row(
        name=name,
        title=title,
        function="parts:statement",
        arguments=(name,),
        peers=("dspylite", "dspy"),
        columns=(Column(key="cpu_s", title="CPU", unit="seconds"),),
        goals=(Goal(limit=limit, than="dspy"),),
    )


ROWS = (
    Row(
        name="import",
        title="import",
        function="starting:importing",
        peers=("dspylite", "dspy", "litellm", "openai", "base"),
        columns=(
            Column(key="cpu_s", title="CPU", unit="seconds"),
            Column(key="wall_s", title="wall", unit="seconds"),
            _MEMORY,
        ),
        goals=(Goal(limit=0.25, than="dspy"), Goal(limit=30, key="memory_mb")),
        warm_up=True,
    ),
    Row(
        name="first-answer",
        title="process start to first answer",
        function="starting:first_answer",
        latency_ms=0,
        peers=("dspylite", "dspylite-litellm", "dspy", "dspy-litellm"),
        columns=(
            Column(key="cpu_s", title="CPU", unit="seconds"),
            Column(key="process_s", title="wall", unit="seconds"),
            _MEMORY,
        ),
        goals=(Goal(limit=0.5, than="dspy"),),
        warm_up=True,
    ),
    Row(
        name="call",
        title="one call, sync, no latency",
        function="calls:one_by_one",
        arguments=("{seconds}",),
        latency_ms=0,
        peers=tuple(_SYNC),
        columns=(_CPU, _WALL),
        goals=(
            Goal(limit=0.40, than="dspy"),
            Goal(limit=1.0, than="httpx"),
            Goal(limit=1.10, than="litellm", peer="dspylite-litellm"),
        ),
    ),
    Row(
        name="acall",
        title="one call, async, no latency",
        function="calls:one_by_one_async",
        arguments=("{seconds}",),
        latency_ms=0,
        peers=tuple(_ASYNC),
        columns=(_CPU, _WALL),
        goals=(Goal(limit=0.35, than="dspy"),),
    ),
    _threads(128, Goal(limit=85, relation=">=", key="ideal")),
    _threads(512, Goal(limit=5, relation=">=", key="per_s", than="dspy")),
    Row(
        name="gathered",
        title="{gathered} `acall`s gathered, 50 ms server latency",
        function="calls:gathered",
        arguments=("{gathered}",),
        latency_ms=50,
        heavy=True,
        peers=tuple(_ASYNC),
        columns=(_RATE, _CPU, _FAILED),
        goals=(
            Goal(limit=2.5, relation=">=", key="per_s", than="dspy"),
            Goal(limit=0.7, relation=">=", key="per_s", than="aiohttp"),
        ),
    ),
    Row(
        name="batch",
        title="`batch` of 20,000 items that do nothing, 8 threads",
        function="parts:batch",
        arguments=("20000", "1000", "8"),
        peers=("dspylite", "dspy", "pool.map"),
        against="pool.map",
        columns=(
            Column(key="cpu_s", title="CPU", unit="seconds"),
            Column(key="per_item_s", title="per item", unit="seconds"),
            Column(key="growth", title="x 1,000 items", unit="times"),
        ),
        goals=(Goal(limit=1.5, than="pool.map"), Goal(limit=25, key="growth")),
    ),
    _hits("memory"),
    _hits("disk"),
    Row(
        name="growth",
        title="memory that a call with 20 kB leaves behind, after 2,000 calls",
        function="remembering:growth",
        arguments=("2000", "6000", "20"),
        latency_ms=0,
        heavy=True,
        peers=("dspylite", "dspy"),
        columns=(Column(key="mb_per_call", title="memory per call", unit="megabytes"),),
        goals=(Goal(limit=0.002, key="mb_per_call"),),
    ),
    _statement("read", "`settings.lm`", 0.25),
    _statement("context", "`with context(lm=x)`", 1.0),
    _statement("format", "`ChatAdapter.format`", 0.35),
    _statement("parse", "`ChatAdapter.parse`", 0.35),
    _statement("build", '`Predict("question -> answer")`', 0.25),
    Row(
        name="asyncify",
        title="`asyncify` of a function that does nothing",
        function="parts:in_a_thread",
        arguments=("{seconds}",),
        peers=("dspylite", "dspy", "anyio"),
        against="anyio",
        columns=(_CPU, _WALL),
        goals=(Goal(limit=1.1, than="anyio"),),
    ),
    _embeddings(0, 25),
    _embeddings(50, 30),
    _serving("sync", "dspylite dspy dspy-litellm urllib3 http.client", "http.client"),
    _serving("async", "dspylite dspy dspy-litellm aiohttp", "aiohttp"),
    _serving("asyncify", "dspylite dspy", None),
)
"""In the order of the table. What comes first in `columns` is what `against` compares."""
