"""The one place that makes Redis clients: from a URI, with timeouts, without hidden retries.

A retry by the client would send a message twice after its first fate was decided here, so there is none:
each user decides for itself what to do again.
"""

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any
from urllib.parse import unquote

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.exceptions import AskError, RedisError, ResponseError
from redis.exceptions import ConnectionError as LostError

from lucid.core.wire.redis_cluster import ClusterClient
from lucid.core.wire.redis_topology import Topology

ANSWER_SECONDS = 1.0
"""After that a command's fate counts as unknown and its connection is closed."""

BLOCK_SECONDS = 0.3
"""How long a blocking read waits in the server; its connection's own timeout leaves room above that. A worker learns no
sooner than this that nothing comes from Redis any more (`ControlChannel.silent_seconds`).
"""

AWAY_ERRORS: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
"""Everything by which redis-py says that the server did not do it."""


def new_holder() -> str:
    """A worker's id for leases and the registry: random, so it never comes again. Draw it per process."""
    return secrets.token_hex(8)


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels until they have ended. Once is not enough for a task that awaits redis-py on Python 3.11: there
    `asyncio.wait_for`, in which redis-py sends, swallows a cancellation that meets the result.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.05)


class _Bounded:
    """Dialling takes no longer than a command may, although each step of it may take that long: asking sentinels, TLS,
    each answer to the greeting.

    What a transport says that was reset meanwhile is a lost connection: uvloop raises RuntimeError, which redis-py
    lets through.
    """

    async def connect(self) -> None:
        async with asyncio.timeout(ANSWER_SECONDS):
            await super().connect()  # type: ignore[misc]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except RuntimeError as error:
            raise LostError(f"the connection was lost: {error}") from error


class _Tcp(_Bounded, Connection):
    pass


class _Tls(_Bounded, SSLConnection):
    pass


class _Unix(_Bounded, UnixDomainSocketConnection):
    pass


class _BehindTcp(_Bounded, SentinelManagedConnection):
    pass


class _BehindTls(_Bounded, SentinelManagedSSLConnection):
    pass


_CLASSES: dict[str, type[AbstractConnection]] = {"redis": _Tcp, "rediss": _Tls, "unix": _Unix}


class RedisLink:
    """Clients for one Redis: a server, what sentinels watch over, or a cluster. Nothing is dialled before the first
    command; call `close` at the end.

    `commands` answers or fails within some `ANSWER_SECONDS`; `blocking` is for commands that wait in the
    server for up to `BLOCK_SECONDS`. Both answer bytes. On a cluster a command goes where its first key lies, and one
    without a key, such as PING, to every master: it fails where one of them does.

    Raises ValueError for a URI that is not understood.
    """

    def __init__(self, uri: str) -> None:
        self._runs: weakref.WeakKeyDictionary[AbstractConnection, str] = weakref.WeakKeyDictionary()
        self._sentinels: list[Sentinel] = []
        self._topology: Topology | None = None
        if uri.startswith("redis+cluster://"):
            self._topology = self._cluster(uri)
        self.commands = self._client(uri, ANSWER_SECONDS)
        self.blocking = self._client(uri, BLOCK_SECONDS + ANSWER_SECONDS)

    @property
    def clustered(self) -> bool:
        """Whether keys lie in slots, each slot with a master of its own."""
        return self._topology is not None

    def _client(self, uri: str, answer_seconds: float) -> Redis:
        if self._topology is not None:
            return ClusterClient(self._topology, answer_seconds)
        scheme = uri.partition("://")[0]
        if scheme == "redis+sentinel":
            return self._behind_sentinels(uri, answer_seconds)
        if scheme not in _CLASSES:
            raise ValueError(
                "REDIS_URI: must begin with redis://, rediss://, unix://, redis+cluster:// or redis+sentinel://"
            )
        options = {**parse_url(uri), **self._options(answer_seconds), "connection_class": _CLASSES[scheme]}
        return Redis(connection_pool=ConnectionPool(**options))

    def _options(self, answer_seconds: float) -> dict[str, Any]:
        """What the promises of this module rest on; stronger than options of the URI."""
        return {
            "socket_timeout": answer_seconds,
            "socket_connect_timeout": ANSWER_SECONDS,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": self._greet,
            # RESP3 brings pushes that nobody here listens to.
            "protocol": 2,
        }

    def _cluster(self, uri: str) -> Topology:
        """`redis+cluster://[user:password@]a[:6379],b[?options]`."""
        place = _Place(uri, 6379)
        if place.path or place.options.pop("db", 0):
            raise ValueError("REDIS_URI: a cluster has database 0 alone: redis+cluster://a,b,c")

        def pool_of(host: str, port: int, answer_seconds: float) -> ConnectionPool:
            return ConnectionPool(
                connection_class=_Tls if place.tls else _Tcp,
                host=host,
                port=port,
                **{**place.options, **self._options(answer_seconds)},
            )

        return Topology(place.hosts, pool_of, ANSWER_SECONDS)

    def _behind_sentinels(self, uri: str, answer_seconds: float) -> Redis:
        """`redis+sentinel://[user:password@]a[:26379],b/master[/db][?options]`; the credentials are the server's."""
        place = _Place(uri, 26379)
        master, _, database = place.path.partition("/")
        if not master or not (database or "0").isdigit():
            raise ValueError(
                "REDIS_URI: redis+sentinel:// needs hosts and a master: redis+sentinel://a,b/master/0"
            )
        # They are asked in turn, and one that hangs must leave time for the others.
        seconds = ANSWER_SECONDS / (len(place.hosts) + 1)
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            place.hosts,
            sentinel_kwargs={
                "socket_timeout": seconds,
                "socket_connect_timeout": seconds,
                # Without it redis-py tries a dead one ten times, for seconds, before it asks the next.
                "retry": Retry(NoBackoff(), 0),
                "protocol": 2,
                "ssl": place.tls,
                **{name: value for name, value in place.options.items() if name.startswith("ssl_")},
            },
        )
        self._sentinels.append(sentinel)
        client: Redis = sentinel.master_for(
            master,
            connection_class=_BehindTls if place.tls else _BehindTcp,
            **{"db": int(database or 0), **place.options, **self._options(answer_seconds)},
        )
        return client

    async def _greet(self, connection: AbstractConnection) -> None:
        """Every connection learns which server process it reached, before any command goes over it."""
        self._runs.pop(connection, None)
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        try:
            text = await connection.read_response()
        except ResponseError:
            # Not permitted here: a restart is then seen only by the missing marker.
            return
        for line in bytes(text).split(b"\n"):
            if line.startswith(b"run_id:"):
                self._runs[connection] = line[7:].strip().decode("ascii", "replace")

    async def execute(self, *arguments: object) -> Any:
        """One command's answer. Raises one of `AWAY_ERRORS`."""
        return await self.commands.execute_command(*arguments)  # type: ignore[no-untyped-call]

    async def wait(self, *arguments: object) -> Any:
        """As `execute`, for a command that waits in the server."""
        return await self.blocking.execute_command(*arguments)  # type: ignore[no-untyped-call]

    @contextlib.asynccontextmanager
    async def connection(self, address: str | None = None) -> AsyncIterator[tuple[AbstractConnection, str]]:
        """A connected connection and the `run_id` of the server process that it reaches ("": not told). `address` is a
        node's of the cluster, as `slots` tells it; None the one server, with sentinels the present master.

        It changes when Redis was restarted or failed over. A command that says which server it is meant for
        must go over this connection, not through `commands`, which might dial anew in between.

        Raises one of `AWAY_ERRORS`, and of a cluster's node `MovedError` and its like come to the caller: `redirected`.
        """
        pool = self._pool(address)
        try:
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        except BaseException:
            if address is not None and self._topology is not None:
                self._topology.doubt(address)
            raise
        try:
            yield connection, self._runs.get(connection, "")
        except BaseException:
            # Whoever leaves like this may have left answers unread, which the next would take for its own.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    def _pool(self, address: str | None) -> ConnectionPool:
        if (address is None) == self.clustered:
            raise ValueError("a cluster's connection is to one of its nodes, any other to the one server")
        if self._topology is None or address is None:
            return self.commands.connection_pool
        return self._topology.client(address, ANSWER_SECONDS).connection_pool

    async def slots(self, *, refresh: bool = False) -> Sequence[str]:
        """For each of a cluster's 16,384 hash slots the address of its master, "" where there is none.

        `refresh`: as of some `FRESH_SECONDS` ago at most. A table once told never changes: another takes its place, so
        `is` says whether something changed. Raises one of `AWAY_ERRORS` if no node tells.
        """
        if self._topology is None:
            raise ValueError("only a cluster has slots")
        return await self._topology.slots(refresh=refresh)

    def redirected(self, error: AskError, asked: str) -> str:
        """The address that a MovedError or AskError from the node at `asked` names (it may leave out its host). What
        moved is in `slots` from now on.
        """
        if self._topology is None:
            raise ValueError("only a cluster redirects")
        return self._topology.redirected(error, asked)

    async def close(self) -> None:
        if self._topology is not None:
            await self._topology.close()
        clients = [self.commands, self.blocking]
        for sentinel in self._sentinels:
            clients += sentinel.sentinels
        for client in clients:
            with contextlib.suppress(*AWAY_ERRORS):
                await client.aclose()
                # A pool that was handed over is not closed with its client.
                await client.connection_pool.disconnect()


class _Place:
    """Where several hosts are named: `scheme://[user:password@]a[:port],[::1]:port[/path][?options]`.

    Options are redis-py's (`ssl_ca_certs` and its like, `username`, `password`, `db`), and `ssl=true`; any of TLS's own
    means TLS as well.
    """

    def __init__(self, uri: str, port: int) -> None:
        # Not by urllib.parse: later releases (3.11.12, 3.12.9, 3.13.2) take brackets for one whole host alone.
        scheme, _, rest = uri.partition("://")
        rest, _, query = rest.partition("?")
        places, _, path = rest.partition("/")
        credentials, _, hosts = places.rpartition("@")
        if not hosts:
            raise ValueError(f"REDIS_URI: {scheme}:// needs hosts, such as {scheme}://a,b")
        self.path = path.strip("/")
        self.hosts = [_host(host, port, scheme) for host in hosts.split(",")]
        self.options: dict[str, Any] = dict(parse_url(f"redis://h?{query}"))
        del self.options["host"]
        username, _, password = credentials.partition(":")
        for name, value in (("username", unquote(username)), ("password", unquote(password))):
            self.options[name] = value or self.options.get(name)
        asked = str(self.options.pop("ssl", "")).lower()
        self.tls = asked in ("1", "true", "yes") or (
            not asked and any(name.startswith("ssl_") for name in self.options)
        )
        if not self.tls:
            self.options = {k: v for k, v in self.options.items() if not k.startswith("ssl_")}


def _host(text: str, port: int, scheme: str) -> tuple[str, int]:
    name, colon, written = text.rpartition(":")
    if not colon or text.endswith("]"):
        return text.strip("[]"), port
    if not written.isdigit():
        raise ValueError(f"REDIS_URI: a port of {scheme}:// must be a number, not {written!r}")
    return name.strip("[]"), int(written)
