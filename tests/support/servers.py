"""Fixtures with real servers: Valkey, SecantusDB, the gateway as a process, and a backend to play with.

Every server is a child of the test process, on a free port of the loopback interface, and ends with it.
"""

import asyncio
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h11
import pytest
import redis

from lucid.dev.command import health
from lucid.dev.embedded import LOOPBACK, Secantus, Valkey, free_port, leashed
from tests.support import markers

SECRET = "only-for-tests-only-for-tests-only-for-tests"
ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0
BODY = b'{"service":"test-backend","ok":true,"padding":"xxxxxxxxxxxxxxxx"}'


def until(condition: Callable[[], object], seconds: float = 10.0, what: str = "") -> None:
    """Waits until the condition holds. For what other processes do; unit tests have no need of it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


def clean_environment(**variables: str) -> dict[str, str]:
    """What a process needs to run, nothing that would be a setting, and the given variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in {"PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV"}
    }
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


def alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it died in between, or there is no /proc here
        return not Path("/proc/self/stat").exists()
    return state != "Z"


def children(pid: int) -> list[int]:
    """The direct children of a process, by age. Needs ps, as macOS has no /proc."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.split() for line in listing.splitlines()]
    return sorted(int(child) for child, parent in pairs if parent == str(pid) and alive(int(child)))


class GatewayProcess:
    """`lucid serve` as a child. `log` is what it has written; `stop` must be called at the end."""

    def __init__(self, environment: Mapping[str, str], folder: Path, module: tuple[str, ...]) -> None:
        self.port = int(environment["PORT"])
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._file = folder / f"gateway-{self.port}.log"
        with self._file.open("ab") as log:
            self.process = subprocess.Popen(
                leashed([sys.executable, "-m", *module]),
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    @property
    def log(self) -> str:
        return self._file.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        return children(self.pid)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not health(LOOPBACK, self.port):
            assert self.process.poll() is None, (
                f"the gateway ended with {self.process.returncode}:\n{self.log}"
            )
            assert time.monotonic() < deadline, f"the gateway is not ready:\n{self.log}"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Asks it to end and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@dataclass
class Received:
    """A request as it arrived at the backend, with the body whole."""

    method: str
    target: str
    fields: list[tuple[str, str]]
    body: bytes = b""

    def field(self, name: str) -> str | None:
        """The value of a field, None if it is absent; joined if there are several."""
        values = [value for known, value in self.fields if known == name.lower()]
        return ", ".join(values) if values else None


@dataclass
class Reply:
    """What the backend answers. `body` may be bytes or several pieces, sent as chunks."""

    status: int = 200
    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | list[bytes] = BODY
    delay_seconds: float = 0.0
    close: bool = False


class HangupError(Exception):
    """Raised by a `respond` to close the connection without an answer."""


def default_reply(_: Received) -> Reply:
    """65 bytes of JSON."""
    return Reply()


def echo(received: Received) -> Reply:
    """The request as it arrived, as JSON."""
    told = {
        "method": received.method,
        "target": received.target,
        "fields": received.fields,
        "size": len(received.body),
        "sha256": hashlib.sha256(received.body).hexdigest(),
    }
    return Reply(body=json.dumps(told).encode())


class Backend:
    """An HTTP/1.1 backend in a thread of the test process, strict about what it receives (h11).

    `respond` decides the answer and may be replaced at any time. `received` collects the requests. `kill`
    drops all connections and the port; `start` comes back on the same port.
    """

    def __init__(self) -> None:
        self.respond: Callable[[Received], Reply] = default_reply
        self.received: list[Received] = []
        self.connections = 0
        self.faults: list[str] = []
        self.port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def forwarded(self) -> list[Received]:
        """What a caller sent through the gateway: the gateway's own health checks come at any moment."""
        return [received for received in self.received if received.field("x-request-id") is not None]

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10.0), "the backend did not start"

    def kill(self) -> None:
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10.0)
        self._loop = None

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._connection, LOOPBACK, self.port)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stopping.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=65_536)
        try:
            while await self._exchange(http, reader, writer):
                http.start_next_cycle()
        except h11.RemoteProtocolError as error:
            self.faults.append(str(error))
        except (OSError, HangupError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _exchange(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request and its answer; whether another may follow on the connection."""
        received: Received | None = None
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    writer.write(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                http.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Request):
                fields = [(name.decode(), value.decode("latin-1")) for name, value in event.headers]
                received = Received(event.method.decode(), event.target.decode("latin-1"), fields)
            elif isinstance(event, h11.Data):
                assert received is not None
                received.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert received is not None
        self.received.append(received)
        reply = self.respond(received)
        if reply.delay_seconds:
            await asyncio.sleep(reply.delay_seconds)
        await self._answer(http, writer, reply)
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    async def _answer(self, http: h11.Connection, writer: asyncio.StreamWriter, reply: Reply) -> None:
        pieces = [reply.body] if isinstance(reply.body, bytes) else reply.body
        fields = list(reply.fields)
        if isinstance(reply.body, bytes) and reply.status not in (204, 304):
            fields.append(("content-length", str(len(reply.body))))
        if reply.close:
            fields.append(("connection", "close"))
        writer.write(http.send(h11.Response(status_code=reply.status, headers=fields)) or b"")
        for piece in pieces:
            writer.write(http.send(h11.Data(data=piece)) or b"")
            await writer.drain()
        writer.write(http.send(h11.EndOfMessage()) or b"")
        await writer.drain()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One Valkey for all tests; whoever starts a gateway finds it empty."""
    with Valkey(tmp_path_factory.mktemp("valkey"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def secantus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secantus]:
    """One SecantusDB for all tests; each gateway has a database of its own in it."""
    with Secantus(tmp_path_factory.mktemp("secantus"), durable=False) as server:
        yield server


@pytest.fixture
def backend() -> Iterator[Backend]:
    server = Backend()
    server.start()
    yield server
    server.kill()
    assert not server.faults, f"the backend was sent what is no HTTP: {server.faults}"


@pytest.fixture
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """`gateway(workers=1, env={...}, wait=True)` starts `lucid serve`, as often as it is called.

    Stores that `env` does not name are the shared ones, Redis emptied. `module` replaces `lucid serve`.
    """
    started: list[GatewayProcess] = []

    def start(
        workers: int = 1,
        env: Mapping[str, str] | None = None,
        *,
        wait: bool = True,
        module: tuple[str, ...] = ("lucid", "serve"),
    ) -> GatewayProcess:
        given = dict(env or {})
        if "REDIS_URI" not in given:
            server: Valkey = request.getfixturevalue("valkey")
            given["REDIS_URI"] = own_redis(server)
        if "MONGODB_URI" not in given:
            name = f"test_{os.getpid()}_{time.monotonic_ns()}"
            given["MONGODB_URI"] = request.getfixturevalue("secantus").in_database(name)
        base = {
            "HOST": LOOPBACK,
            "PORT": str(free_port()),
            "METRICS_PORT": str(free_port()),
            "WORKERS": str(workers),
            "JWT_SECRET_KEY": SECRET,
            "LOG_FORMAT": "text",
        }
        process = GatewayProcess(clean_environment(**{**base, **given}), tmp_path, module)
        started.append(process)
        if wait:
            process.wait_until_ready()
        return process

    yield start
    for process in started:
        process.stop()


_redis_numbers = itertools.cycle(range(16))


def own_redis(server: Valkey) -> str:
    """An empty database of the server: gateways that run side by side must not count into each other's keys."""
    number = next(_redis_numbers)
    with redis.Redis(host=LOOPBACK, port=server.port, db=number) as client:
        client.flushdb()
        markers.plant(client)
    return f"redis://{LOOPBACK}:{server.port}/{number}"
