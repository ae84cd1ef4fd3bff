"""Stores of a test session's own: the embedded servers, on a port that they keep when they are ended and come back.

Two kinds of tests use them: those that need a running store (session fixtures `mongo` and `redis_server`, one of
each for all), and those that end it on the way (`mongodb`, `valkey`).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from lucid.dev.embedded import EmbeddedServer, Secantus, Valkey, free_port

__all__ = ["MongoChild", "RedisChild", "free_port", "mongodb", "valkey"]


class _Kept(EmbeddedServer):
    """Has a port before it runs, and comes back on it."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)  # type: ignore[call-arg]  # what stands behind it in a class's order takes a folder
        self.port = free_port()

    def start(self, port: int = 0) -> None:
        super().start(port or self.port)

    def answers(self) -> bool:
        """Whether it runs and what answers on its port is it."""
        return self._process is not None and self._identify(self.port) == self._process.pid


AnyChild = TypeVar("AnyChild", bound="_Kept")


class MongoChild(_Kept, Secantus):
    """SecantusDB, durable."""


class RedisChild(_Kept, Valkey):
    """Valkey, durable. `more`: arguments besides."""

    def __init__(self, folder: str, *more: str) -> None:
        super().__init__(Path(folder))
        plain = self._command
        self._command = lambda port: [*plain(port), "--appendfsync", "always", *more]


@contextmanager
def mongodb(start: bool = True) -> Iterator[MongoChild]:
    """A server with an empty folder of its own, running or yet to be started."""
    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        yield from _lent(MongoChild(Path(folder)), start)


@contextmanager
def valkey(start: bool = True) -> Iterator[RedisChild]:
    """A server with an empty folder of its own, running or yet to be started."""
    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        yield from _lent(RedisChild(folder), start)


def _lent(child: AnyChild, start: bool) -> Iterator[AnyChild]:
    if start:
        child.start()
    try:
        yield child
    finally:
        child.kill()  # its folder is about to go, so there is nothing to save


@pytest.fixture(scope="session")
def mongo() -> Iterator[MongoChild]:
    with mongodb() as child:
        yield child


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisChild]:
    with valkey() as child:
        yield child
