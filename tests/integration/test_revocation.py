"""What was revoked is refused by every worker of every pod within a second, whatever Redis does meanwhile.

Two pods of two workers each share one Redis and one MongoDB, each pod through proxies of its own that a test can cut. A
kept connection stays with the worker that took it, so one connection per worker asks all of them, again and again,
while something is revoked; what is measured counts from the answer to whoever revoked.
"""

import asyncio
import itertools
import math
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self, TypeVar

import httpx
import jwt
import pytest
from redis import Redis

from lucid.dev.embedded import LOOPBACK, free_port
from lucid.services.revocations import KEY
from tests.integration.conftest import Caller, clusters
from tests.integration.test_faults import ports_of
from tests.support.servers import (
    SECRET,
    START_SECONDS,
    Backend,
    GatewayProcess,
    clean_environment,
    until,
)
from tests.support.stores import MongoChild, RedisChild, mongodb
from tests.support.wallet import Wallet

T = TypeVar("T")

BOUND_SECONDS = 1.0
"""What is promised. `-s` prints what it took; docs/identity.md has the figures of an undisturbed machine."""
BUSY_SECONDS = 2.0
"""What a busy machine may add before a test fails: the question is whether the news comes, not by a question that would
have been asked anyway, half a minute later, or never.
"""
PUSHED_SECONDS = 0.5
"""The median where the channel brings it: without, it comes when MongoDB is asked."""
WORKERS = 2
NEW_POD_SECONDS = 0.7
"""For so long a pod that starts is asked from its first answer on: by then it knows, or never will."""
ROUND_SECONDS = 0.01
"""Between two questions on one connection: four of them must not be the load that they measure under."""
RELAPSE_SECONDS = 0.1
"""For so long each worker is asked on after all have refused."""
SEE_PROC = Path("/proc/net/tcp").exists()


class Proxy:
    """TCP to a port of this machine, in a thread. `cut` drops what there is and whatever comes until `mend`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connection, LOOPBACK, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            self._drop()
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others, timeout=5.0)

        self._in_loop(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def cut(self) -> None:
        async def cut() -> None:
            self._open = False
            self._drop()

        self._in_loop(cut())

    def mend(self) -> None:
        self._open = True

    def _in_loop(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(5.0)

    def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        self._writers.add(writer)
        try:
            if self._open:
                there, back = await asyncio.open_connection(LOOPBACK, self._target)
                ends.append(back)
                self._writers.add(back)
                if self._open:
                    await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except OSError:
            pass
        finally:
            for end in ends:
                self._writers.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # One side has gone, and so must the other.


class Connection:
    """One kept connection, and so one worker. `ask` is a GET with one line of credentials."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=START_SECONDS)
        self.local_port: int = self._socket.getsockname()[1]
        self.worker = f"port {port}"

    def ask(self, credential: str, path: str = "/api/v1/auth/status") -> tuple[int, str]:
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{credential}\r\n\r\n".encode())
        head, found, body = self._more(b"").partition(b"\r\n\r\n")
        while not found:
            head, found, body = self._more(head).partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body = self._more(body)
        return int(head[9:12]), body.decode()

    def missing(self) -> list[str]:
        """What the worker's readiness names."""
        told = self.ask("X: y", "/health/ready")[1]
        names: list[str] = httpx.Response(200, text=told).json()["missing"]
        # After a restart of Redis limits are held back for a window and more, which no revocation waits for.
        return [name for name in names if name != "limits"]

    def _more(self, data: bytes) -> bytes:
        piece = self._socket.recv(65_536)
        assert piece, f"{self.worker} hung up"
        return data + piece

    def close(self) -> None:
        self._socket.close()


def one_for_each_worker(process: GatewayProcess, pod: str) -> list[Connection]:
    """Where /proc does not tell whose a connection is: as many as make it unlikely that a worker has none."""
    found: dict[int, Connection] = {}
    spare: list[Connection] = []
    for _ in range(20):
        opened = [Connection(process.port) for _ in range(6)]
        for connection in opened:
            assert connection.ask("X: y", "/health")[0] == 200
        spare += opened
        if not SEE_PROC:
            if len(spare) < 12:
                continue
            return spare
        held = {pid: ports_of(pid) for pid in process.workers()}
        for connection, (pid, ports) in itertools.product(opened, held.items()):
            if connection.local_port in ports:
                found.setdefault(pid, connection)
        if len(found) == WORKERS:
            break
    assert len(found) == WORKERS, f"workers that nobody reaches: {found}"
    for number, connection in enumerate(found.values()):
        connection.worker = f"{pod}{number}"
    for connection in set(spare) - set(found.values()):
        connection.close()
    return list(found.values())


def each_at_once(do: Callable[[GatewayProcess], T], pods: list[GatewayProcess]) -> list[T]:
    with ThreadPoolExecutor(len(pods)) as pool:
        return list(pool.map(do, pods))


class Probe:
    """Asks one worker with the credentials in turn, until it is told to stop."""

    def __init__(self, connection: Connection, credentials: list[str]) -> None:
        self.connection = connection
        self._credentials = credentials
        self.rounds = 0
        self.refused_at: float | None = None
        """When the first round had ended in which every credential was refused."""
        self.stall_seconds = 0.0
        """The longest round: how far off, on a busy machine, the measurement may be."""
        self.odd: list[str] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join(15.0)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        dead: set[str] = set()
        try:
            while not self._stopping:
                begun = time.monotonic()
                for credential in self._credentials:
                    status, body = self.connection.ask(credential)
                    if status == 401 and "LUCID_ERR_2003" in body:
                        dead.add(credential)
                    elif status != 200 or credential in dead:
                        self.odd.append(f"{self.connection.worker}: {status} {body}")
                now = time.monotonic()
                if self.refused_at is None and len(dead) == len(self._credentials):
                    self.refused_at = now
                self.rounds += 1
                time.sleep(ROUND_SECONDS)
                self.stall_seconds = max(self.stall_seconds, time.monotonic() - begun)
        except (OSError, AssertionError) as error:
            self.odd.append(f"{self.connection.worker}: {error!r}")


@dataclass
class Case:
    """Something to revoke, made while all is well."""

    name: str
    dead: list[str]
    """Credentials, each a header's line, that `end` must kill."""
    end: Callable[[], httpx.Response]
    again: Callable[[], str]
    """A credential of afterwards, which is good at once."""
    spared: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    """Refresh tokens that must be dead too."""


class Fleet:
    """Two pods and their stores. `connections` has one for each worker, those of the first pod first."""

    def __init__(self, stack: ExitStack, folder: Path, backend: Backend) -> None:
        self._folder, self._backend = folder, backend
        self.redis_folder = folder / "redis"
        self.redis = RedisChild(str(self.redis_folder))
        stack.callback(self.redis.kill)
        self.redis.start()
        self.mongo: MongoChild = stack.enter_context(mongodb())
        self.redis_links = [stack.enter_context(Proxy(self.redis.port)) for _ in range(2)]
        self.mongo_links = [stack.enter_context(Proxy(self.mongo.port)) for _ in range(2)]
        self.root = Wallet.generate()
        ports = [(r.port, m.port) for r, m in zip(self.redis_links, self.mongo_links, strict=True)]
        self.pods = [self.start_pod(*each) for each in ports]
        stack.callback(lambda: each_at_once(GatewayProcess.stop, self.pods))
        for pod in self.pods:
            pod.wait_until_ready()
        self.admin = Caller(self.pods[0], self.root)
        self.connections: list[Connection] = []

    def start_pod(self, redis_port: int, mongo_port: int) -> GatewayProcess:
        environment = {
            "HOST": LOOPBACK,
            "PORT": str(free_port()),
            "METRICS_PORT": str(free_port()),
            "WORKERS": str(WORKERS),
            "JWT_SECRET_KEY": SECRET,
            "LOG_FORMAT": "text",
            "REDIS_URI": f"redis://{LOOPBACK}:{redis_port}/0",
            # Direct: what answers there says that it is a replica set, and where, which would lead past the proxy.
            "MONGODB_URI": f"mongodb://{LOOPBACK}:{mongo_port}/revocation?directConnection=true",
            "ADMIN_TRON_ADDRESSES": self.root.address,
            **dict.fromkeys((f"RATE_LIMIT_{n}" for n in ("PUBLIC", "AUTHENTICATED", "ADMIN")), "1000000"),
            **dict.fromkeys(("RATE_LIMIT_LOGIN", "RATE_LIMIT_REFRESH"), "100000"),
            # A pod that never reached Redis would refuse, and what it refuses tells nothing.
            "RATE_LIMIT_REDIS_DOWN": "open",
            **clusters(self._backend),
        }
        return GatewayProcess(clean_environment(**environment), self._folder, ("lucid", "serve"))

    def settle(self) -> None:
        """All is there, all see it, and every worker is reached."""
        for link in (*self.redis_links, *self.mongo_links):
            link.mend()
        for store in (self.redis, self.mongo):
            if not store.answers():
                store.start()
        for connection in self.connections:
            connection.close()
        self.connections = [
            connection
            for pod, name in zip(self.pods, "AB", strict=True)
            for connection in one_for_each_worker(pod, name)
        ]
        until(lambda: self.listening() == 2 * WORKERS, 10.0, "every worker listens to the channel")
        until(lambda: not any(c.missing() for c in self.connections), 15.0, "nothing is missing")
        until(self.admin.login, 5.0)

    def listening(self) -> int:
        with Redis(port=self.redis.port, socket_timeout=2.0) as client:
            return sum(each["cmd"] == "xread" for each in client.client_list())

    def kept(self, token: str) -> bool:
        """Whether Redis has the revocation of the login that this token is of."""
        family: str = jwt.decode(token, options={"verify_signature": False})["sid"]
        with Redis(port=self.redis.port, socket_timeout=2.0) as client:
            return any(family.encode() in each for each in client.zrange(KEY, 0, -1))

    def empty_redis(self) -> None:
        shutil.rmtree(self.redis_folder)

    def measure(
        self,
        case: Case,
        *,
        then: Callable[[], object] | None = None,
        within: float = BOUND_SECONDS,
        seen_by: slice = slice(None),
    ) -> float:
        """Revoke, then `then` at once. The seconds after the answer until the last worker refused, asserted to be
        `within`; nothing odd may be answered, and what is refused stays refused.
        """
        probes = [Probe(connection, case.dead) for connection in self.connections[seen_by]]
        try:
            until(lambda: all(p.rounds > 2 or p.odd for p in probes), 5.0, f"{case.name}: all are asked")
            early = [(p.connection.worker, p.refused_at, p.odd) for p in probes if p.refused_at or p.odd]
            assert not early, (case.name, early)
            sent = time.monotonic()
            answer = case.end()
            answered = time.monotonic()
            if then is not None:
                then()
            assert answer.status_code in (200, 204), answer.text
            while any(p.refused_at is None for p in probes) and time.monotonic() < answered + within + 3.0:
                time.sleep(ROUND_SECONDS)
            time.sleep(RELAPSE_SECONDS)
        finally:
            for probe in probes:
                probe.stop()
        took = {
            p.connection.worker: None if p.refused_at is None else round(p.refused_at - answered, 3)
            for p in probes
        }
        stall = max(p.stall_seconds for p in probes)
        told = (
            f"{case.name}: answered after {answered - sent:.3f} s, refused {took} s after the answer, "
            f"longest round of a probe {stall:.3f} s"
        )
        print(told)
        assert not [odd for p in probes for odd in p.odd], (told, [p.odd for p in probes])
        worst = max(math.inf if t is None else t for t in took.values())
        assert worst <= within + BUSY_SECONDS, told
        return worst

    def assert_dead(self, case: Case) -> None:
        """On every worker, and no refresh brings it back."""
        for connection, credential in itertools.product(self.connections, case.dead):
            assert connection.ask(credential)[0] == 401, (case.name, connection.worker)
        for number, token in enumerate(case.logins):
            answer = self.refresh(number % 2, token)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "LUCID_ERR_2003"), case.name

    def assert_others_live(self, case: Case) -> None:
        """What was not meant is good, and so is what is issued now."""
        for connection, credential in itertools.product(self.connections, [*case.spared, case.again()]):
            status, body = connection.ask(credential)
            assert status == 200, (case.name, connection.worker, body)

    def refresh(self, pod: int, token: str) -> httpx.Response:
        url = f"{self.pods[pod].url}/api/v1/auth/refresh"
        return httpx.post(url, json={"refresh_token": token}, trust_env=False, timeout=10.0)


@pytest.fixture(scope="module")
def started(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        fleet = Fleet(stack, tmp_path_factory.mktemp("fleet"), backend)
        yield fleet
        logs = [pod.log for pod in fleet.pods]
        for connection in fleet.connections:
            connection.close()
    traces = [log[at : at + 4_000] for log in logs if (at := log.find("Traceback")) >= 0]
    assert not traces, traces[0]


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """The fleet with all well: what a test has broken is whole again for the next."""
    started.settle()
    return started


# --- what can be revoked, each on the first pod


def bearer(caller: Caller) -> str:
    return f"Authorization: Bearer {caller.access_token}"


def login_again(caller: Caller) -> Callable[[], str]:
    def again() -> str:
        caller.login()
        return bearer(caller)

    return again


def wallet_user(fleet: Fleet) -> Caller:
    caller = Caller(fleet.pods[0])
    caller.login()
    return caller


def user_id(caller: Caller) -> str:
    told: str = caller.get("/api/v1/auth/status").json()["user_id"]
    return told


def new_key(caller: Caller) -> tuple[str, str]:
    """A key's header line, and its id."""
    made = caller.http.post("/api/v1/users/me/api-keys", json={"name": "k"}, headers=caller.bearer)
    assert made.status_code == 201, made.text
    return f"X-API-Key: {made.json()['key']}", made.json()["key_id"]


def logout(fleet: Fleet) -> Case:
    caller = wallet_user(fleet)
    other = Caller(fleet.pods[1], caller.wallet)
    other.login()
    return Case(
        "logout",
        [bearer(caller)],
        lambda: caller.http.post("/api/v1/auth/logout", headers=caller.bearer, json={}),
        login_again(caller),
        spared=[bearer(other)],
        logins=[caller.refresh_token],
    )


def logout_everywhere(fleet: Fleet) -> Case:
    caller = wallet_user(fleet)
    other = Caller(fleet.pods[1], caller.wallet)
    other.login()
    return Case(
        "logout of all logins",
        [bearer(caller), bearer(other)],
        lambda: caller.http.post("/api/v1/auth/logout", headers=caller.bearer, json={"all_logins": True}),
        login_again(other),
        logins=[caller.refresh_token, other.refresh_token],
    )


def first_password(fleet: Fleet) -> Case:
    """Of a user who had none: nothing to guess, so it needs no Redis."""
    caller = wallet_user(fleet)
    change = {"email": f"{caller.wallet.address.lower()}@example.com", "password": "a first Passw0rd"}
    return Case(
        "first password",
        [bearer(caller)],
        lambda: caller.http.patch("/api/v1/users/me", headers=caller.bearer, json=change),
        login_again(caller),
        logins=[caller.refresh_token],
    )


def new_password(fleet: Fleet) -> Case:
    caller = Caller(fleet.pods[0])
    email, old, new = f"{caller.wallet.address.lower()}@example.com", "an old Passw0rd", "a new Passw0rd"
    made = caller.http.post("/api/v1/users", json={"email": email, "password": old})
    assert made.status_code == 201, made.text

    def login(password: str) -> str:
        caller.take(caller.http.post("/api/v1/auth/login", json={"email": email, "password": password}))
        return bearer(caller)

    change = {"password": new, "current_password": old}
    return Case(
        "new password",
        [login(old)],
        lambda: caller.http.patch("/api/v1/users/me", headers=caller.bearer, json=change),
        lambda: login(new),
        logins=[caller.refresh_token],
    )


def new_role(fleet: Fleet) -> Case:
    caller = wallet_user(fleet)
    path = f"/api/v1/users/{user_id(caller)}"

    def again() -> str:
        # The login lives on, and what it gives from now on has the new role.
        caller.take(fleet.refresh(1, caller.refresh_token))
        assert caller.get("/api/v1/auth/status").json()["role"] == "node_operator"
        return bearer(caller)

    return Case(
        "new role",
        [bearer(caller)],
        lambda: fleet.admin.http.patch(path, headers=fleet.admin.bearer, json={"role": "node_operator"}),
        again,
    )


def deletion(fleet: Fleet) -> Case:
    caller = wallet_user(fleet)
    path = f"/api/v1/users/{user_id(caller)}"
    return Case(
        "deletion",
        [bearer(caller), new_key(caller)[0]],
        lambda: fleet.admin.http.delete(path, headers=fleet.admin.bearer),
        login_again(caller),  # as a new user: the address is free
        logins=[caller.refresh_token],
    )


def key_revoked(fleet: Fleet) -> Case:
    caller = wallet_user(fleet)
    (key, key_id), (other, _) = new_key(caller), new_key(caller)
    return Case(
        "API key",
        [key],
        lambda: caller.http.delete(f"/api/v1/users/me/api-keys/{key_id}", headers=caller.bearer),
        lambda: new_key(caller)[0],
        spared=[bearer(caller), other],
    )


Kind = Callable[[Fleet], Case]
NEED_NO_REDIS: list[Kind] = [logout, logout_everywhere, first_password, new_role, deletion, key_revoked]
EVERY_KIND = [*NEED_NO_REDIS, new_password]


# --- what Redis does meanwhile


def test_every_kind_while_all_is_well(fleet: Fleet) -> None:
    took = []
    for kind in EVERY_KIND:
        case = kind(fleet)
        took.append(fleet.measure(case))
        fleet.assert_dead(case)
        fleet.assert_others_live(case)
    # It was pushed: three workers that ask MongoDB now and then are hardly ever all that fast.
    assert median(took) <= PUSHED_SECONDS, took


def test_every_kind_while_redis_hangs(fleet: Fleet) -> None:
    cases = [kind(fleet) for kind in NEED_NO_REDIS]
    os.kill(fleet.redis.pid, signal.SIGSTOP)
    try:
        # The first at once, while the workers still believe in Redis.
        for case in cases:
            fleet.measure(case)
            fleet.assert_dead(case)
    finally:
        os.kill(fleet.redis.pid, signal.SIGCONT)
    fleet.settle()
    for case in cases:
        fleet.assert_dead(case)
        fleet.assert_others_live(case)


@pytest.mark.parametrize("emptied", [False, True], ids=["with its data", "empty"])
def test_redis_dies_before_and_comes_back(fleet: Fleet, emptied: bool) -> None:
    case = logout(fleet)
    fleet.redis.kill()
    fleet.measure(case)
    fleet.assert_dead(case)
    if emptied:
        fleet.empty_redis()
    fleet.redis.start()
    until(lambda: fleet.kept(case.dead[0].split()[-1]), 5.0, "Redis is told late")
    fleet.assert_dead(case)
    assert_known_to_new_pods(fleet, [case], fleet.redis.port)
    fleet.settle()
    fleet.assert_dead(case)
    fleet.assert_others_live(case)


def test_redis_dies_with_the_answer(fleet: Fleet) -> None:
    for kind in (logout, logout_everywhere):
        fleet.settle()
        case = kind(fleet)
        fleet.measure(case, then=fleet.redis.kill)
        fleet.assert_dead(case)


def test_a_pod_that_starts_without_redis(fleet: Fleet) -> None:
    """One finds Redis hung, one finds nobody."""
    cases = [logout(fleet), new_role(fleet)]
    for case in cases:
        fleet.measure(case)
    os.kill(fleet.redis.pid, signal.SIGSTOP)
    try:
        assert_known_to_new_pods(fleet, cases, fleet.redis.port, free_port())
    finally:
        os.kill(fleet.redis.pid, signal.SIGCONT)


def assert_known_to_new_pods(fleet: Fleet, cases: list[Case], *redis_ports: int) -> None:
    """From its first answer on, a pod that starts now refuses what is dead."""
    dead = [credential for case in cases for credential in case.dead]
    with ExitStack() as stack:
        pods = [fleet.start_pod(port, fleet.mongo.port) for port in redis_ports]
        for pod in pods:
            stack.callback(pod.stop, signal.SIGKILL)
        answers = each_at_once(lambda pod: first_answers(pod, dead), pods)
    for each in answers:
        good = [moment for moment, status in each if status != 401]
        told = f"a new pod gave {len(each)} answers, of these {len(good)} no refusals, until {good[-1:]} s"
        print(told)
        assert not good, told


def first_answers(pod: GatewayProcess, credentials: list[str]) -> list[tuple[float, int]]:
    """What a pod says that is starting: the seconds since its first answer, and the status."""
    first: float | None = None
    answers: list[tuple[float, int]] = []
    deadline = time.monotonic() + 30.0
    while first is None or time.monotonic() < first + NEW_POD_SECONDS:
        assert time.monotonic() < deadline, pod.log
        time.sleep(ROUND_SECONDS / 5)
        with suppress(ConnectionRefusedError):
            # A connection each time: who answers is not known, and both workers are to.
            connection = Connection(pod.port)
            for credential in credentials:
                status = connection.ask(credential)[0]
                now = time.monotonic()
                first = first or now
                answers.append((round(now - first, 3), status))
            connection.close()
    return answers


def test_all_stores_away(fleet: Fleet) -> None:
    """It serves and says what it cannot know; what was not revoked is not half revoked."""
    case = logout(fleet)
    fleet.redis.kill()
    fleet.mongo.kill()
    missing = ["mongodb", "redis", "revocations"]
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(case.end)  # MongoDB is given five seconds to turn up.
        until(lambda: all(c.missing() == missing for c in fleet.connections), 10.0, "readiness says so")
        assert [connection.ask(case.dead[0])[0] for connection in fleet.connections] == [200] * 2 * WORKERS
        refused = ending.result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "LUCID_ERR_5004")
    assert [connection.ask(case.dead[0])[0] for connection in fleet.connections] == [200] * 2 * WORKERS
    fleet.settle()
    fleet.measure(case)
    fleet.assert_dead(case)
    fleet.assert_others_live(case)


@pytest.mark.parametrize("back", ["redis", "mongodb"])
def test_a_pod_cut_off_from_both_catches_up_when_one_is_back(fleet: Fleet, back: str) -> None:
    first, other = fleet.connections[:WORKERS], fleet.connections[WORKERS:]
    case = logout(fleet)
    links = {"redis": fleet.redis_links[1], "mongodb": fleet.mongo_links[1]}
    for link in links.values():
        link.cut()
    until(lambda: all("revocations" in c.missing() for c in other), 10.0, "readiness says so")
    fleet.measure(case, seen_by=slice(0, WORKERS))
    assert not any("revocations" in c.missing() for c in first)
    time.sleep(BOUND_SECONDS)
    assert [c.ask(case.dead[0])[0] for c in other] == [200] * WORKERS, "it cannot know"
    mended = time.monotonic()
    links[back].mend()
    until(lambda: all(c.ask(case.dead[0])[0] == 401 for c in other), 10.0, "it catches up")
    print(f"caught up {time.monotonic() - mended:.3f} s after {back} was back")
    until(lambda: not any("revocations" in c.missing() for c in other), 5.0, "and says so")


def test_only_the_pod_that_revokes_is_cut_off_from_redis(fleet: Fleet) -> None:
    """For the other pod nothing is silent, and nothing comes."""
    case = logout(fleet)
    # A silence sets the clock by which a connected worker asks MongoDB now and then: this must hold just behind a
    # question too.
    fleet.redis_links[1].cut()
    time.sleep(1.5)
    fleet.redis_links[1].mend()
    until(lambda: fleet.listening() == 2 * WORKERS, 5.0)
    time.sleep(1.0)
    fleet.redis_links[0].cut()
    fleet.measure(case)
    fleet.assert_dead(case)
