"""`LM.preload`, and the closing of one event loop's connections: what servers do at start and end.

Not here: the lifespan that calls them (`test_fastapi_integration.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dspylite as dspy
from dspylite.models.direct.engine import close_connections
from dspylite.testing import FakeServer

ROOT = Path(__file__).resolve().parent.parent

LOADED = """
import json, socket, sys
import dspylite as dspy

def refuse(*args, **kwargs):
    raise AssertionError("a connection was made")

socket.socket.connect = socket.create_connection = refuse
{code}
print(json.dumps([name for name in ("aiohttp", "litellm", "urllib3") if name in sys.modules]))
"""


def loaded_by(code: str) -> list[str]:
    """Run a program without any network, and list which of the slow libraries it has loaded."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DSPYLITE_")}
    printed = subprocess.check_output(
        [sys.executable, "-c", LOADED.format(code=code)],
        cwd=ROOT,
        env={**environment, "OPENAI_API_KEY": "sk-none"},
        text=True,
        timeout=50,
    )
    return list(json.loads(printed))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("dspy.LM('openai/m')", []),
        ("dspy.LM('openai/m').preload()", ["aiohttp", "urllib3"]),
        ("dspy.OfflineLM().preload()", []),
        (
            "dspy.BaseLM('my/model', fallbacks=[dspy.LM('openai/m')]).preload()",
            ["aiohttp", "urllib3"],
        ),
    ],
)
def test_preload_loads_what_the_calls_need_and_asks_no_network(
    code: str, expected: list[str]
) -> None:
    """The first request of a server must not pay for imports, nor its start for a network."""
    assert loaded_by(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        "dspy.LM('anthropic/m').preload()",
        "dspy.LM('openai/m', engine='litellm').preload()",
        "dspy.LM('openai/m', spoken_by_litellm_only=1).preload()",
        "dspy.LM('openai/m', model_type='responses').preload()",
    ],
)
def test_preload_loads_litellm_where_the_calls_go_through_it(code: str) -> None:
    """It is the library that costs seconds."""
    assert "litellm" in loaded_by(code)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_closed_connections_are_opened_anew() -> None:
    """The end of one part of a program that shares its loop with others is not the end of those."""
    with FakeServer(answer="Paris") as server:
        lm = dspy.LM("openai/m", api_base=server.base_url, api_key="sk-1")
        for _ in range(2):
            assert await lm.acall("Capital?") == ["Paris"]
            await close_connections()
            await close_connections()
        assert len({request.connection for request in server.requests}) == 2


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_closing_connections_where_there_are_none_does_nothing() -> None:
    """Trio's calls go through threads, whose connections belong to the process."""
    await close_connections()
