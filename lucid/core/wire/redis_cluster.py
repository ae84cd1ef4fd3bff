"""A client that sends each command to the node of a Redis Cluster that has its key.

redis-py's own client for clusters is not used. Each time it looks at the topology anew it also reads the table of
all commands, which together kept the event loop for 18 ms (measured, 8.1.0), with every failed command while a
master is down; on CLUSTERDOWN it cuts the connections under commands that others have on their way; it raises
KeyError for a slot that nobody serves and AttributeError for an ASK to a node that it did not know yet.

*What is sent twice.* Only what a node refused to do: MOVED, ASK, TRYAGAIN. A connection that breaks is the
caller's to judge, as with one server.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import TimeoutError as LateError

from lucid.core.wire.redis_topology import Topology

MOST_REDIRECTS = 16
TRY_AGAIN_SECONDS = 0.05

_LOST: tuple[type[BaseException], ...] = (
    # Cancelled: mostly because it took too long.
    asyncio.CancelledError,
    ClusterDownError,
    LostError,
    LateError,
    OSError,
    TimeoutError,
)
_KEYLESS = frozenset(
    "PING ECHO INFO TIME DBSIZE SCRIPT CLUSTER CONFIG CLIENT COMMAND FLUSHALL FLUSHDB KEYS SLOWLOG LATENCY".split()
)


def key_of(arguments: Sequence[Any]) -> Any:
    """The first key of a command, None where it has none. Knows the commands that the gateway sends."""
    name = str(arguments[0]).upper().partition(" ")[0]
    if name in _KEYLESS or len(arguments) < 2:
        return None
    if name in ("EVAL", "EVALSHA"):
        return arguments[3] if int(arguments[2]) else None
    if name == "XREAD":
        words = [str(argument).upper() for argument in arguments]
        return arguments[words.index("STREAMS") + 1]
    return arguments[1]


class ClusterClient(Redis):
    """Every command at the master of its first key's slot; one without a key at every master, of which one answers for
    all if none fails. Not for what keeps a connection: transactions, subscriptions, MONITOR.
    """

    def __init__(self, topology: Topology, seconds: float) -> None:
        super().__init__(connection_pool=topology.any_pool(seconds))
        self._topology = topology
        self._seconds = seconds

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Raises TimeoutError when it all takes longer than an answer may, redirections included."""
        key = key_of(args)
        async with asyncio.timeout(self._seconds):
            if key is None:
                return await self._everywhere(args, options)
            slot = self._slot(key)
            return await self._redirected(await self._topology.master_of(slot), args, options)

    def pipeline(self, transaction: Any = False, shard_hint: Any = None) -> "ClusterPipeline":
        if transaction:
            raise ValueError("a cluster has no transaction over slots")
        return ClusterPipeline(self)

    async def execute_together(self, commands: Sequence[tuple[Any, Any]]) -> list[Any]:
        """The answers, errors that Redis answered among them. One message to each node. Raises what is lost."""
        async with asyncio.timeout(self._seconds):
            parts: dict[str, list[int]] = {}
            for number, (args, _) in enumerate(commands):
                address = await self._topology.master_of(self._slot(key_of(args)))
                parts.setdefault(address, []).append(number)
            answers: list[Any] = [None] * len(commands)
            lost = await asyncio.gather(
                *(self._part(address, numbers, commands, answers) for address, numbers in parts.items()),
                return_exceptions=True,
            )
            for error in lost:
                if error is not None:
                    raise error
            # In their order: of one key, what was refused, is done after what was done.
            for number, (args, options) in enumerate(commands):
                if isinstance(answers[number], (AskError, TryAgainError)):
                    try:
                        answers[number] = await self.execute_command(*args, **options)
                    except ResponseError as error:
                        answers[number] = error
            return answers

    async def _part(
        self, address: str, numbers: list[int], commands: Sequence[tuple[Any, Any]], answers: list[Any]
    ) -> None:
        pipeline = self._topology.client(address, self._seconds).pipeline(transaction=False)
        for number in numbers:
            args, options = commands[number]
            pipeline.execute_command(*args, **options)
        with self._doubting(address):
            told = await pipeline.execute(raise_on_error=False)
        for number, answer in zip(numbers, told, strict=True):
            answers[number] = answer
            if isinstance(answer, MovedError):
                self._topology.redirected(answer, address)
            elif isinstance(answer, ClusterDownError):
                self._topology.doubt(address)

    async def _everywhere(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        async def at(address: str) -> Any:
            with self._doubting(address):
                return await self._send(address, args, options)

        masters = await self._topology.masters()
        answers = await asyncio.gather(*(at(address) for address in masters), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers[0]

    async def _redirected(self, address: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        send = self._send
        for _ in range(MOST_REDIRECTS):
            try:
                with self._doubting(address):
                    return await send(address, args, options)
            except MovedError as error:
                address, send = self._topology.redirected(error, address), self._send
            except AskError as error:
                address, send = self._topology.redirected(error, address), self._send_asking
            except TryAgainError:
                await asyncio.sleep(TRY_AGAIN_SECONDS)
        raise ClusterDownError(f"redirected {MOST_REDIRECTS} times")

    async def _send(self, address: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        client = self._topology.client(address, self._seconds)
        return await client.execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def _send_asking(self, address: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        pipeline = self._topology.client(address, self._seconds).pipeline(transaction=False)
        pipeline.execute_command("ASKING")
        pipeline.execute_command(*args, **options)
        return (await pipeline.execute())[1]

    @contextlib.contextmanager
    def _doubting(self, address: str) -> Iterator[None]:
        try:
            yield
        except _LOST:
            self._topology.doubt(address)
            raise
        except ResponseError:
            self._topology.trust(address)
            raise
        self._topology.trust(address)

    def _slot(self, key: Any) -> int:
        encoded = self.get_encoder().encode(key)  # type: ignore[no-untyped-call]
        return key_slot(encoded)


class ClusterPipeline(Pipeline):
    """Commands that go together, each with a key; `execute` sends them."""

    def __init__(self, client: ClusterClient) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)
        self._client = client

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = [(args, options) for args, options in self.command_stack]
        await self.reset()  # type: ignore[no-untyped-call]
        answers = await self._client.execute_together(commands) if commands else []
        if raise_on_error:
            self.raise_first_error(commands, answers)
        return answers
