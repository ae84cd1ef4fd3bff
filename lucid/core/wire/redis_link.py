"""The one place that makes Redis clients: from a URI, with timeouts, without hidden retries.

A retry by the client would send a message twice after its first fate was decided here, so there is none:
each user decides for itself what to do again.
"""

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import RedisError, ResponseError

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


class _Sends:
    """What a transport says that was reset meanwhile is a lost connection: uvloop raises RuntimeError, which redis-py
    lets through.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except RuntimeError as error:
            raise LostError(f"the connection was lost: {error}") from error


class _Tcp(_Sends, Connection):
    pass


class _Tls(_Sends, SSLConnection):
    pass


class _Unix(_Sends, UnixDomainSocketConnection):
    pass


_CLASSES: dict[str, type[AbstractConnection]] = {"redis": _Tcp, "rediss": _Tls, "unix": _Unix}


class RedisLink:
    """Clients for one Redis. Nothing is dialled before the first command; call `close` at the end.

    `commands` answers or fails within some `ANSWER_SECONDS`; `blocking` is for commands that wait in the
    server for up to `BLOCK_SECONDS`. Both answer bytes.

    Raises ValueError for a URI that is not understood.
    """

    def __init__(self, uri: str) -> None:
        self._runs: weakref.WeakKeyDictionary[AbstractConnection, str] = weakref.WeakKeyDictionary()
        self._sentinels: list[Sentinel] = []
        self.commands = self._client(uri, ANSWER_SECONDS)
        self.blocking = self._client(uri, BLOCK_SECONDS + ANSWER_SECONDS)

    def _client(self, uri: str, answer_seconds: float) -> Redis:
        options: dict[str, Any] = {
            "socket_timeout": answer_seconds,
            "socket_connect_timeout": ANSWER_SECONDS,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": self._greet,
            # RESP3 brings pushes that nobody here listens to.
            "protocol": 2,
        }
        scheme = uri.partition("://")[0]
        if scheme == "redis+sentinel":
            return self._behind_sentinels(uri, options)
        if scheme == "redis+cluster":
            raise ValueError(
                "REDIS_URI: redis+cluster:// is not served yet: one call carries keys of several hash slots. "
                "Name one server (redis://, rediss://, unix://) or sentinels (redis+sentinel://)"
            )
        if scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("REDIS_URI: must begin with redis://, rediss://, unix:// or redis+sentinel://")
        pool: ConnectionPool = ConnectionPool.from_url(uri, **options)
        pool.connection_class = _CLASSES[scheme]
        return Redis(connection_pool=pool)

    def _behind_sentinels(self, uri: str, options: dict[str, Any]) -> Redis:
        """`redis+sentinel://[user:password@]a[:26379],b/master[/db]`; the credentials are the server's."""
        split = urlsplit(uri)
        credentials, _, hosts = split.netloc.rpartition("@")
        master, _, database = split.path.strip("/").partition("/")
        if not hosts or not master or not (database or "0").isdigit():
            raise ValueError(
                "REDIS_URI: redis+sentinel:// needs hosts and a master: redis+sentinel://a,b/master/0"
            )
        addresses: list[tuple[str, int]] = []
        for host in hosts.split(","):
            name, colon, port = host.rpartition(":")
            if not colon or host.endswith("]"):
                name, port = host, "26379"
            if not port.isdigit():
                raise ValueError(f"REDIS_URI: a sentinel's port must be a number, not {port!r}")
            addresses.append((name.strip("[]"), int(port)))
        username, _, password = credentials.partition(":")
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            addresses,
            sentinel_kwargs={"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS},
        )
        self._sentinels.append(sentinel)
        client: Redis = sentinel.master_for(
            master,
            db=int(database or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
            **options,
        )
        return client

    async def _greet(self, connection: AbstractConnection) -> None:
        """Every connection learns which server process it reached, before any command goes over it."""
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
    async def connection(self) -> AsyncIterator[tuple[AbstractConnection, str]]:
        """A connected connection and the `run_id` of the server process that it reaches ("": not told).

        It changes when Redis was restarted or failed over. A command that says which server it is meant for
        must go over this connection, not through `commands`, which might dial anew in between.
        """
        pool = self.commands.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            yield connection, self._runs.get(connection, "")
        finally:
            await pool.release(connection)

    async def close(self) -> None:
        clients = [self.commands, self.blocking]
        for sentinel in self._sentinels:
            clients += sentinel.sentinels
        for client in clients:
            with contextlib.suppress(*AWAY_ERRORS):
                await client.aclose()
                # A pool that was handed over is not closed with its client.
                await client.connection_pool.disconnect()
