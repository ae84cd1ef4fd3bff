"""One parent and its workers: what happens when one of them dies, stops, or cannot begin.

A small Sanic app stands in for the gateway, as everything here is about processes and one socket.
"""

import http.client
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lucid.dev.embedded import LOOPBACK, free_port
from lucid.server import StartError, bind
from lucid.settings import ServerSettings
from tests.support.certificates import self_signed
from tests.support.servers import GatewayProcess, alive, until

STORES = {"REDIS_URI": "redis://127.0.0.1:1/0", "MONGODB_URI": "mongodb://127.0.0.1:1/x"}
Start = Callable[..., GatewayProcess]


@pytest.fixture
def standin(gateway: Start) -> Start:
    def start(workers: int = 2, *, wait: bool = True, **env: str) -> GatewayProcess:
        module = ("tests.support.standin",)
        process = gateway(workers, {**STORES, **env}, wait=wait, module=module)
        if wait:
            until(lambda: "ready" in process.log, 20.0, "every worker is ready")
        return process

    return start


def get(port: int, path: str = "/health") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10.0)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def answering(port: int, requests: int = 60) -> Counter[int]:
    """Which workers answer new connections."""
    return Counter(json.loads(get(port)[1])["pid"] for _ in range(requests))


def test_a_stop_is_clean_and_frees_the_port(standin: Start) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = standin()
        workers = process.workers()
        assert len(workers) == 2
        began = time.monotonic()
        assert process.stop(number) == 0
        assert time.monotonic() - began < 5.0
        assert not any(map(alive, workers))
        assert "Traceback" not in process.log
        bind(ServerSettings(host=LOOPBACK, port=process.port)).close()


def test_requests_in_flight_are_answered_before_the_end(standin: Start) -> None:
    process = standin()
    answers: list[tuple[int, bytes]] = []
    asking = threading.Thread(target=lambda: answers.append(get(process.port, "/slow")))
    asking.start()
    until(lambda: _established(process.port), what="the request is on its way")
    time.sleep(0.2)
    process.process.send_signal(signal.SIGTERM)
    until(lambda: not _accepts(process.port), 5.0, "the port is closed while the request is still open")
    assert asking.is_alive()
    asking.join(10.0)
    assert answers == [(200, b"done")]
    assert process.process.wait(10.0) == 0


def test_the_same_signal_twice_at_once_is_one_stop(standin: Start) -> None:
    process = standin()
    answers: list[tuple[int, bytes]] = []
    asking = threading.Thread(target=lambda: answers.append(get(process.port, "/slow")))
    asking.start()
    until(lambda: _established(process.port))
    time.sleep(0.2)
    process.process.send_signal(signal.SIGINT)
    process.process.send_signal(signal.SIGINT)
    asking.join(10.0)
    assert answers == [(200, b"done")]
    assert process.process.wait(10.0) == 0


def test_a_killed_worker_is_back_within_two_seconds_and_the_others_lose_nothing(standin: Start) -> None:
    process = standin()
    victim, survivor = process.workers()
    stop = threading.Event()
    lost: list[str] = []
    served = Counter[int]()

    def ask() -> None:
        """One keep-alive connection; where it hangs on the victim it may break once, else never."""
        while not stop.is_set():
            connection = http.client.HTTPConnection(LOOPBACK, process.port, timeout=10.0)
            pid = 0
            try:
                while not stop.is_set():
                    connection.request("GET", "/health")
                    pid = json.loads(connection.getresponse().read())["pid"]
                    served[pid] += 1
            except (OSError, http.client.HTTPException) as error:
                if pid != victim and pid != 0:
                    lost.append(f"{pid}: {error!r}")
            finally:
                connection.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: served[survivor] > 50)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(set(process.workers()) - {victim, survivor}) == 1, 2.0, "another worker")
    (heir,) = set(process.workers()) - {victim, survivor}
    # It accepts as soon as somebody connects anew: these threads hold on to their connections.
    until(lambda: heir in answering(process.port, 20), 2.0 - (time.monotonic() - killed), "the heir answers")
    stop.set()
    for thread in threads:
        thread.join(10.0)
    assert not lost
    assert f"worker {victim} was ended by SIGKILL; another takes its place" in process.log


def test_a_worker_that_dies_alone_comes_back_too(standin: Start) -> None:
    process = standin(workers=1)
    (victim,) = process.workers()
    os.kill(victim, signal.SIGKILL)
    # In between connections wait in the queue of the socket, which the parent holds: none is refused.
    ((heir, answers),) = answering(process.port, 5).items()
    assert (heir != victim, answers) == (True, 5)


def test_every_worker_answers_new_connections(standin: Start) -> None:
    process = standin()
    until(lambda: set(answering(process.port)) == set(process.workers()), 10.0)


def test_workers_die_with_their_parent_however_it_died(standin: Start) -> None:
    process = standin()
    workers = process.workers()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not any(map(alive, workers)), 2.0, "the workers are gone")
    bind(ServerSettings(host=LOOPBACK, port=process.port)).close()


@pytest.mark.parametrize(
    "fails,reason",
    [
        ("factory", "RuntimeError: the table has no legs"),
        ("start", "ConnectionRefusedError: the store is away"),
    ],
)
def test_a_start_that_fails_is_one_line_and_status_1(standin: Start, fails: str, reason: str) -> None:
    process = standin(wait=False, STANDIN_FAILS=fails)
    assert process.process.wait(20.0) == 1
    assert process.log == f"lucid: {reason}\n"


def test_a_protocol_that_is_not_there_is_a_start_that_fails(standin: Start) -> None:
    process = standin(wait=False, STANDIN_PROTOCOL="lucid.nowhere:Protocol")
    assert process.process.wait(20.0) == 1
    assert process.log == "lucid: ModuleNotFoundError: No module named 'lucid.nowhere'\n"


def test_a_taken_port_is_one_line_and_status_1(standin: Start) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        process = standin(wait=False, PORT=str(port))
        assert process.process.wait(20.0) == 1
        assert process.log == f"lucid: cannot listen on HOST 127.0.0.1, PORT {port}: Address already in use\n"


def test_tls_is_ended_here_when_there_is_a_certificate(standin: Start, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    process = standin(wait=False, TLS_CERT_FILE=str(certificate), TLS_KEY_FILE=str(key))
    until(lambda: "ready" in process.log, 20.0, process.log)
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False  # It names nobody: that must not keep it from being served.
    connection = http.client.HTTPSConnection(LOOPBACK, process.port, timeout=10.0, context=context)
    try:
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        assert connection.sock.version() in ("TLSv1.2", "TLSv1.3")
    finally:
        connection.close()


def test_workers_run_the_settings_that_the_parent_read(standin: Start, tmp_path: Path) -> None:
    """A file that is edited later, even into nonsense, is read at the next start, not when a worker dies."""
    file = tmp_path / "gateway.toml"
    file.write_text('[[routes]]\npath = "/x"\nbackend = "nodes"\n')
    process = standin(workers=1, GATEWAY_CONFIG=str(file))
    file.write_text("[[")
    (victim,) = process.workers()
    os.kill(victim, signal.SIGKILL)
    assert victim not in answering(process.port, 1)


@pytest.mark.parametrize(
    "host,family", [("127.0.0.1", socket.AF_INET), ("localhost", None), ("::", socket.AF_INET6)]
)
def test_every_spelling_of_a_host_is_bound(host: str, family: socket.AddressFamily | None) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with bind(ServerSettings(host=host, port=free_port())) as listener:
        assert family in (None, listener.family)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        if host == "::":
            socket.create_connection((LOOPBACK, listener.getsockname()[1]), 2.0).close()


def test_a_host_that_is_none_is_one_line() -> None:
    with pytest.raises(StartError, match=r"cannot listen on HOST 192\.0\.2\.1, PORT 8080: ."):
        bind(ServerSettings(host="192.0.2.1"))


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), 1.0).close()
    except ConnectionRefusedError:
        return False
    return True


def _established(port: int) -> bool:
    """Whether a worker has taken a request: it then answers others while that one is open."""
    return get(port)[0] == 200
