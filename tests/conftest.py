"""What every test shares: async tests run on asyncio and on trio; litellm leaves nothing open."""

import inspect
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The tests of the cache ask for it; no other must be answered by what an earlier one asked. Before
# anything is imported, so that child processes inherit it.
os.environ["DSPYLITE_CACHE"] = "off"

from dspylite.models.cache.cache import Cache
from dspylite.models.cache.configure import current_cache, use_cache
from dspylite.models.endpoints import forget_endpoints
from dspylite.testing import FakeServer

# A machine with other things to do is no failure of a test.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell ignores SIGINT for what it runs in the background, and all children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_NO_CACHE = Cache(enable_disk_cache=False, enable_memory_cache=False)


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Name the event loop that an async test or fixture runs on."""
    backend: str = request.param
    return backend


@pytest.fixture(scope="module")
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Run the module's async tests on one loop, and close litellm's connections before it ends."""
    yield
    if anyio_backend == "asyncio" and "litellm" in sys.modules:
        from litellm.llms.custom_httpx import async_client_cleanup

        await async_client_cleanup.close_litellm_async_clients()


@pytest.fixture(params=["direct", "litellm"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once through each engine."""
    name: str = request.param
    monkeypatch.setenv("DSPYLITE_ENGINE", name)
    return name


@pytest.fixture(autouse=True)
def unknown_endpoints() -> None:
    """Let no test meet an endpoint that is held back for the failures of an earlier test."""
    forget_endpoints()


@pytest.fixture(autouse=True)
def unanswered_questions() -> None:
    """Let no test be answered by the cache of another one."""
    use_cache(_NO_CACHE)


@pytest.fixture
def cache_in() -> Iterator[Callable[..., Cache]]:
    """Give a test `cache_in(directory, **options)`, which makes a cache and has all calls use it.

    Memory keeps nothing unless it is asked to, so that what is read comes from the disk.
    """
    before = current_cache()

    def make(directory: Path, **options: Any) -> Cache:
        made = Cache(disk_cache_dir=directory, **{"enable_memory_cache": False, **options})
        use_cache(made)
        return made

    yield make
    use_cache(before)


@pytest.fixture
def server(running: FakeServer) -> Iterator[FakeServer]:
    """Give a test its module's `running` server with an empty log; its script must be used up."""
    running.clear()
    yield running
    assert running.pending_replies == 0


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A real pool of one spawned process, as services use them."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def litellms_sockets() -> Iterator[None]:
    """Close litellm's sockets at the session's end, so that no warning follows its summary."""
    yield
    litellm = sys.modules.get("litellm")
    if litellm is None:
        return
    for client in litellm.in_memory_llm_clients_cache.cache_dict.values():
        if not inspect.iscoroutinefunction(client.close):
            client.close()
