"""What a child process measures of a FastAPI service that makes one call per request.

The service runs under uvicorn in the child, its clients in a process of their own. Not here: how a
library makes its call (`peers.py`).
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from tests.benchmarks.limits import allow_many_files
from tests.benchmarks.peers import ASYNC, SYNC, check

CLIENTS = 64
SYNC_THREADS = 128
"""For sync handlers, of all peers alike; anyio's own 40 would be the limit of every one of them."""
_WARM_UP_S = 1.0
_REQUEST = b"GET /ask HTTP/1.1\r\nHost: service\r\n\r\n"


def serve(peer: str, port: str, seconds: str, form: str, latency_ms: str) -> dict[str, float]:
    """Serve for some seconds; requests per second, and the service's CPU time for each.

    Args:
        peer: Who makes the calls.
        port: Of the language model.
        seconds: How long is measured.
        form: `"sync"` or `"async"` handlers, or `"asyncify"`: async ones that make sync calls.
        latency_ms: How long the language model waits.
    """
    allow_many_files()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        # asyncio does it for sockets of its own making only; without it answers wait for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(
            target=_run_service, args=(peer, int(port), form, listener), daemon=True
        ).start()
        code = "from tests.benchmarks.serving import ask; ask()"
        clients = subprocess.Popen(
            [sys.executable, "-c", code, str(listener.getsockname()[1]), seconds],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert clients.stdout is not None
        clients.stdout.readline()  # they are warm
        cpu = time.process_time()
        answered, elapsed = clients.stdout.readline().split()
        cpu = time.process_time() - cpu
    if clients.wait():
        raise RuntimeError("the clients met an answer that is not the service's")
    per_s = int(answered) / float(elapsed)
    return {
        "per_s": per_s,
        "ideal": 100 * per_s * float(latency_ms) / 1000 / CLIENTS,
        "cpu_s": cpu / max(1, int(answered)),
    }


def _run_service(peer: str, port: int, form: str, listener: socket.socket) -> None:
    import anyio.to_thread
    import fastapi
    import uvicorn

    async def start() -> None:
        anyio.to_thread.current_default_thread_limiter().total_tokens = SYNC_THREADS
        app = fastapi.FastAPI()
        handler: Any
        if form == "async":
            acall = await ASYNC[peer](port)

            async def handler() -> str:
                return str(await acall())

        else:
            call = SYNC[peer](port, SYNC_THREADS)
            if form == "asyncify":
                dspy: Any = __import__(peer)
                in_thread = dspy.asyncify(call)

                async def handler() -> str:
                    return str(await in_thread())

            else:

                def handler() -> str:
                    return str(call())

        app.get("/ask")(handler)
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        await uvicorn.Server(config).serve(sockets=[listener])

    asyncio.run(start())


def ask() -> None:
    """Ask a service from many connections, without a pause; print how many answers came."""
    asyncio.run(_ask(int(sys.argv[1]), float(sys.argv[2])))


async def _ask(port: int, seconds: float) -> None:
    answered = 0

    async def client() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            writer.write(_REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split()[0]
            check((await reader.readexactly(int(length))).decode())
            answered += 1

    tasks = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    while answered < CLIENTS:
        await _look_at(tasks, 0.05)
    await _look_at(tasks, _WARM_UP_S)
    print("warm", flush=True)
    start, before = time.perf_counter(), answered
    await _look_at(tasks, seconds)
    print(answered - before, time.perf_counter() - start, flush=True)
    for task in tasks:
        task.cancel()


async def _look_at(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    """Wait for some seconds, or until a client fails."""
    failed, _ = await asyncio.wait(tasks, timeout=seconds)
    for task in failed:
        await task
