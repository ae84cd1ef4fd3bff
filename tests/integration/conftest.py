"""What the integration tests share: a gateway with everything behind it, and a caller."""

import json
import socket
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from lucid.dev.embedded import Secantus, Valkey, free_port
from tests.support.servers import SECRET, Backend, GatewayProcess, clean_environment, default_reply, own_redis
from tests.support.wallet import Wallet


@dataclass(eq=False)
class Caller:
    """Somebody with a wallet in front of a gateway."""

    gateway: GatewayProcess
    wallet: Wallet = field(default_factory=Wallet.generate)
    access_token: str = ""
    refresh_token: str = ""

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.gateway.url, timeout=10.0, trust_env=False)
        # Closed with its owner: some callers live for one line of a test.
        weakref.finalize(self, self.http.close)

    def login(self) -> dict[str, Any]:
        """The whole login: challenge, signature, tokens."""
        address = self.wallet.address
        challenge = self.http.post("/api/v1/auth/challenge", json={"tron_address": address})
        assert challenge.status_code == 200, challenge.text
        message = challenge.json()["message"]
        body = {"tron_address": address, "message": message, "signature": self.wallet.sign(message)}
        answer = self.http.post("/api/v1/auth/login", json=body)
        assert answer.status_code == 200, answer.text
        return self.take(answer)

    def take(self, answer: httpx.Response) -> dict[str, Any]:
        """Keep the tokens of a login's or a refresh's answer."""
        told: dict[str, Any] = answer.json()
        self.access_token, self.refresh_token = told["access_token"], told["refresh_token"]
        return told

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.access_token}"}

    def get(self, path: str, **fields: str) -> httpx.Response:
        return self.http.get(path, headers={**self.bearer, **fields})


def clusters(backend: Backend) -> dict[str, str]:
    """The settings that put one test backend in the place of all three clusters."""
    return {
        "BLOCKCHAIN_SERVICE_URL": backend.url,
        "SESSION_SERVICE_URL": backend.url,
        "NODE_SERVICE_URL": backend.url,
    }


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """One backend for the tests of a file; `fresh_backend` gives each test its usual answers."""
    server = Backend()
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def fresh_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if "backend" not in request.fixturenames:
        yield
        return
    server: Backend = request.getfixturevalue("backend")
    server.respond = default_reply
    server.received.clear()
    server.faults.clear()
    yield
    # A request that was cut off is what some tests want; anything else that is no HTTP is a bug of ours.
    assert not [fault for fault in server.faults if "peer closed connection" not in fault]


@pytest.fixture(scope="module")
def door(
    valkey: Valkey, secantus: Secantus, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """One gateway of two workers for the tests of a file, with room for many logins from one address."""
    folder = tmp_path_factory.mktemp("gateway")
    environment = {
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "METRICS_PORT": str(free_port()),
        "WORKERS": "2",
        "JWT_SECRET_KEY": SECRET,
        "LOG_FORMAT": "text",
        "REDIS_URI": own_redis(valkey),
        "MONGODB_URI": secantus.in_database(folder.name),
        "RATE_LIMIT_PUBLIC": "100000",
        "RATE_LIMIT_LOGIN": "1000",
        **clusters(backend),
    }
    process = GatewayProcess(clean_environment(**environment), folder, ("lucid", "serve"))
    process.wait_until_ready()
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log, process.log


@pytest.fixture
def caller(door: GatewayProcess) -> Caller:
    """A caller that has just logged in."""
    somebody = Caller(door)
    somebody.login()
    return somebody


def say(port: int, data: bytes, *, half_close: bool = False, seconds: float = 5.0) -> bytes:
    """Send bytes on a connection of their own; all that comes back until it closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while piece := connection.recv(65_536):
                received += piece
                if _is_whole(received):
                    break
        except TimeoutError:
            pass
    return received


def _is_whole(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return False


def error_of(answer: bytes) -> dict[str, Any]:
    """The envelope's error in a raw answer."""
    told: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return told
