"""Stores of a test session's own: the embedded servers, on a port that they keep when they are ended and come back.

Two kinds of tests use them: those that need a running store (session fixtures `mongo` and `redis_server`, one of
each for all), and those that end it on the way (`mongodb`, `valkey`; `cluster`, `redis_sentinels`).
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from redis.exceptions import RedisError

from lucid.core.wire.control_channel import STREAM_KEY
from lucid.core.wire.redis_slots import SLOTS, slot_of
from lucid.dev.embedded import LOOPBACK, EmbeddedServer, Secantus, Valkey, find_valkey, free_port
from tests.support.servers import until

__all__ = ["MongoChild", "RedisChild", "free_port", "mongodb", "redis_cluster", "redis_sentinels", "valkey"]


class _Kept(EmbeddedServer):
    """Has a port before it runs, and comes back on it."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)  # type: ignore[call-arg, arg-type]  # what follows it takes a folder
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


# --- several Redis that stand for one

_REPLICATING = ("--repl-diskless-sync-delay", "0", "--appendfsync", "everysec")
"""redis-server waits five seconds for more replicas before it sends its data to one. What a failover loses is on no
disk anyway, and several servers that wait for one disk would be slow.
"""


def _says(port: int, *command: Any) -> Any:
    with redis.Redis(host=LOOPBACK, port=port, socket_timeout=2.0) as client:
        return client.execute_command(*command)


def _fact(port: int, *command: str, name: str) -> str:
    """One line of an answer in INFO's form."""
    answer = _says(port, *command)
    if isinstance(answer, dict):
        return str(answer.get(name, ""))
    text = answer.decode() if isinstance(answer, bytes) else str(answer)
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line).get(name, "")


class _ClusterChild(RedisChild):
    def __init__(self, folder: str, *more: str) -> None:
        self.bus = free_port()
        super().__init__(folder, "--cluster-enabled", "yes", "--cluster-port", str(self.bus), *more)


class ClusterOfChildren:
    """Masters with equal parts of the slots, and replicas of one of them. Each may be killed, and started again, in the
    main thread: a child dies with the thread that started it.
    """

    def __init__(self, nodes: Sequence[_ClusterChild], masters: int, followed: int) -> None:
        self.nodes = nodes
        self.followed = followed
        self.firsts = nodes[:masters]
        """Who were masters in the beginning."""
        self.replicas = nodes[masters:]

    @property
    def uri(self) -> str:
        return "redis+cluster://" + ",".join(address_of(node) for node in self.nodes)

    def at(self, address: str) -> RedisChild:
        return next(node for node in self.nodes if address_of(node) == address)

    def slots(self) -> Any:
        """As a node that runs tells them: first, last, master, replicas. The master may be dead."""
        return _says(next(node for node in self.nodes if node.answers()).port, "CLUSTER", "SLOTS")

    def masters(self) -> list[RedisChild]:
        ports = {port for _, _, (_, port, *_), *_ in self.slots()}
        return [node for node in self.nodes if node.port in ports]

    def master_of(self, key: str) -> RedisChild:
        for first, last, master, *_ in self.slots():
            if first <= slot_of(key) <= last:
                return self.at(f"{LOOPBACK}:{master[1]}")
        raise AssertionError(f"no master for {key}")

    def _join(self) -> None:
        masters = len(self.firsts)
        for number, node in enumerate(self.firsts):
            _says(node.port, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            first, last = SLOTS * number // masters, SLOTS * (number + 1) // masters - 1
            _says(node.port, "CLUSTER", "ADDSLOTSRANGE", first, last)
        bus = self.nodes[0].port, self.nodes[0].bus
        for node in self.nodes[1:]:
            _says(node.port, "CLUSTER", "MEET", LOOPBACK, *bus)
        followed = _says(self.nodes[self.followed].port, "CLUSTER", "MYID").decode()
        for node in self.replicas:
            until(lambda node=node: followed in str(_says(node.port, "CLUSTER", "NODES")))  # type: ignore[misc]
            _says(node.port, "CLUSTER", "REPLICATE", followed)
        self.mend()

    def mend(self) -> None:
        """Starts who was killed, and waits until nobody could tell: all know each other, all slots have a master, and
        replicas have their data.
        """
        for node in self.nodes:
            if not node.answers():
                node.start()
        until(self._whole, what="the cluster is whole")

    def _whole(self) -> bool:
        for node in self.nodes:
            if _fact(node.port, "CLUSTER", "INFO", name="cluster_state") != "ok":
                return False
            slots = _says(node.port, "CLUSTER", "SLOTS")
            if sum(len(entry) - 2 for entry in slots) != len(self.nodes):
                return False
        links = [_fact(node.port, "INFO", name="master_link_status") for node in self.nodes]
        return sorted(filter(None, links)) == ["up"] * len(self.replicas)


def address_of(child: RedisChild) -> str:
    return f"{LOOPBACK}:{child.port}"


@contextmanager
def redis_cluster(
    masters: int = 3,
    replicas: int = 1,
    *,
    follow: str = "",
    timeout_ms: int = 500,
    full_coverage: bool = False,
) -> Iterator[ClusterOfChildren]:
    """A cluster of its own. `follow`: replicas are the master's that has this key. A failover takes one to two seconds
    with `timeout_ms` 500. `full_coverage`: where a slot has no master, no node answers.
    """
    options = {
        "--cluster-node-timeout": str(timeout_ms),
        "--cluster-require-full-coverage": "yes" if full_coverage else "no",
        "--cluster-allow-replica-migration": "no",
        "--cluster-replica-validity-factor": "0",
    }
    more = [word for pair in options.items() for word in pair]
    with ExitStack() as kept:
        nodes = []
        for _ in range(masters + replicas):
            folder = kept.enter_context(tempfile.TemporaryDirectory(prefix="lucid-test-"))
            node = _ClusterChild(folder, *more, *_REPLICATING)
            kept.callback(node.kill)
            node.start()
            nodes.append(node)
        # As `_join` deals the slots.
        bounds = [SLOTS * (number + 1) // masters for number in range(masters)]
        followed = next(number for number, bound in enumerate(bounds) if slot_of(follow) < bound)
        cluster = ClusterOfChildren(nodes, masters, followed)
        cluster._join()
        yield cluster


class _Watching(EmbeddedServer):
    """A sentinel; its settings are in its folder before it starts."""

    def __init__(self, data: Path) -> None:
        binary = find_valkey()
        assert binary is not None
        super().__init__("sentinel", lambda _: [binary, "sentinel.conf", "--sentinel"], _pid_of, data)


def _pid_of(port: int) -> int | None:
    with contextlib.suppress(RedisError, OSError):
        return int(_fact(port, "INFO", "server", name="process_id"))
    return None


class SentinelChild(_Kept, _Watching):
    """One of the watchers."""


class WatchedChildren:
    """A master and its replica, and the sentinels that watch over them, under the name `main`."""

    def __init__(self, servers: Sequence[RedisChild], sentinels: Sequence[SentinelChild]) -> None:
        self.servers = servers
        self.sentinels = sentinels

    @property
    def uri(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/main/0"

    def master(self) -> RedisChild:
        """As a sentinel that runs says it; may be one that is dead."""
        asked = next(sentinel for sentinel in self.sentinels if sentinel.answers())
        _, port = _says(asked.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
        return next(server for server in self.servers if server.port == int(port))


@contextmanager
def redis_sentinels(*, sentinels: int = 3, down_after_ms: int = 500) -> Iterator[WatchedChildren]:
    """One master, one replica, and who watches over them. They are told of each other, which they would find out within
    seconds by themselves.
    """
    with ExitStack() as kept:

        def folder() -> str:
            return kept.enter_context(tempfile.TemporaryDirectory(prefix="lucid-test-"))

        master = RedisChild(folder(), *_REPLICATING)
        replica = RedisChild(folder(), *_REPLICATING, "--replicaof", LOOPBACK, str(master.port))
        watchers = [SentinelChild(Path(folder())) for _ in range(sentinels)]
        for child in (master, replica, *watchers):
            kept.callback(child.kill)
        master.start()
        replica.start()
        ids = [f"{number:040x}" for number in range(1, sentinels + 1)]
        for watcher, own_id in zip(watchers, ids, strict=True):
            lines = [
                f"bind {LOOPBACK}",
                f"port {watcher.port}",
                f"sentinel myid {own_id}",
                f"sentinel monitor main {LOOPBACK} {master.port} {sentinels // 2 + 1}",
                f"sentinel down-after-milliseconds main {down_after_ms}",
                "sentinel failover-timeout main 2000",
                f"sentinel known-replica main {LOOPBACK} {replica.port}",
            ]
            for other, other_id in zip(watchers, ids, strict=True):
                if other is not watcher:
                    lines.append(f"sentinel known-sentinel main {LOOPBACK} {other.port} {other_id}")
            (watcher.data / "sentinel.conf").write_text("\n".join(lines) + "\n")
            watcher.start()
        until(
            lambda: all(_ready(watcher.port, sentinels) for watcher in watchers), what="sentinels are ready"
        )
        yield WatchedChildren((master, replica), watchers)


def _ready(port: int, sentinels: int) -> bool:
    """Whether it can hold and win an election: it sees the master, its replica and the other sentinels alive."""
    with redis.Redis(host=LOOPBACK, port=port, socket_timeout=2.0) as client:
        (replica,) = client.sentinel_slaves("main")
        others = client.sentinel_sentinels("main")
        seen = [client.sentinel_masters()["main"], replica, *others]
    alive = all(not one["is_sdown"] and not one["is_disconnected"] for one in seen)
    return alive and len(others) == sentinels - 1 and replica["master-link-status"] == "ok"


@pytest.fixture(scope="session")
def mongo() -> Iterator[MongoChild]:
    with mongodb() as child:
        yield child


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisChild]:
    with valkey() as child:
        yield child


@pytest.fixture(scope="session")
def _kept_cluster() -> Iterator[ClusterOfChildren]:
    # One for all: a master takes two seconds until it may be written to.
    with redis_cluster(follow=STREAM_KEY) as made:
        yield made


@pytest.fixture
def cluster(_kept_cluster: ClusterOfChildren) -> ClusterOfChildren:
    """Whole, with what tests before left in it. The replica is the control channel's master's."""
    _kept_cluster.mend()
    return _kept_cluster
