"""`python -m examples.embedding_service`: the service under uvicorn.

Not here: workers, which `celery -A examples.embedding_service.worker worker` starts.
"""

from __future__ import annotations

import logging
import sys

import uvicorn

from dspylite.errors import DSPyError
from examples.embedding_service.app import create_app
from examples.embedding_service.config import Config


def main() -> None:
    """Serve until told to stop; exit with 2 where the settings cannot work."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request to Chroma
    try:
        config = Config.from_environment()
    except DSPyError as error:
        sys.exit(f"{error}")
    uvicorn.run(
        create_app(config),
        host=config.host,
        port=config.port,
        timeout_graceful_shutdown=config.shutdown_s,
        log_config=None,
        access_log=False,
    )


if __name__ == "__main__":
    main()
