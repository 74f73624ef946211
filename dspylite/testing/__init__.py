"""Fakes for testing programs: a scripted LM, a scripted HTTP server, an embedder, a clock.

Everything here is public and shipped to users.
"""

from dspylite.testing.clock import FakeClock
from dspylite.testing.dummies import DummyLM, DummyVectorizer
from dspylite.testing.models import FakeEmbedder, FakeLM
from dspylite.testing.server import FakeServer, RecordedRequest, Reply

__all__ = [
    "DummyLM",
    "DummyVectorizer",
    "FakeClock",
    "FakeEmbedder",
    "FakeLM",
    "FakeServer",
    "RecordedRequest",
    "Reply",
]
