"""What every test shares: async tests run on asyncio and on trio."""

import pytest


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Name the event loop that an async test or fixture runs on."""
    backend: str = request.param
    return backend
