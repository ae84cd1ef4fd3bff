"""Which node of a Redis Cluster has which slot, and the clients of its nodes. One table serves all of a process.

*After a failover.* A node that failed or went down is doubted: the next command for it looks at the topology
first, so the first command after the election succeeds. Commands for other nodes are not kept.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError
from redis.exceptions import ConnectionError as LostError

from lucid.core.wire.redis_slots import SLOTS

FRESH_SECONDS = 0.1
"""So long the topology is not asked for again. An election takes longer than that."""

ASKED_AT_ONCE = 5
GRACE_SECONDS = 0.1
"""How long one from a node in better health is waited for after the first answer, and any answer at all before more
nodes are asked.
"""

PoolOf = Callable[[str, int, float], ConnectionPool]


def split_address(address: str) -> tuple[str, int]:
    """`host:port`, the host of which may be an IPv6 address without brackets, as nodes announce it."""
    host, _, port = address.rpartition(":")
    return host, int(port)


class Told:
    """What one node says of its cluster. `asked` is the host under which it was reached: a node that does not know
    its own, announces none.
    """

    def __init__(self, info: bytes, slots: Sequence[Any], asked: str) -> None:
        facts = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
        masters = [""] * SLOTS
        nodes: dict[str, None] = {}
        for first, last, *members in slots:
            addresses = [_address(member, asked) for member in members]
            nodes.update(dict.fromkeys(filter(None, addresses)))
            masters[first : last + 1] = [addresses[0] if addresses else ""] * (last + 1 - first)
        self.masters: Sequence[str] = tuple(masters)
        self.nodes: Sequence[str] = tuple(nodes)
        self.healthy = facts.get(b"cluster_state") == b"ok"
        self.epoch = int(facts.get(b"cluster_current_epoch", 0))
        self.rank = (self.healthy, self.epoch, len(nodes))


def _address(member: Sequence[Any], asked: str) -> str:
    """A node as CLUSTER SLOTS tells it: host, port, id, and from Redis 7 on its other names. The host is empty or null
    where it is the one that was asked, and "?" where only the other names say it (`cluster-preferred-endpoint-type`).
    """
    host = bytes(member[0] or b"").decode()
    if host == "?":
        others = list(member[3]) if len(member) > 3 else []
        names = dict(zip(others[::2], others[1::2], strict=False))
        host = bytes(names.get(b"ip") or names.get(b"hostname") or b"").decode()
        if not host:
            return ""
    return f"{host or asked}:{int(member[1])}"


class Topology:
    """The table, and the clients of single nodes. Nothing is dialled before it is needed; `close` it at the end.

    `pool_of` makes a pool for a host, a port and the seconds that an answer may take.
    """

    def __init__(self, seeds: Sequence[tuple[str, int]], pool_of: PoolOf, seconds: float) -> None:
        self._seeds = [f"{host}:{port}" for host, port in seeds]
        self._pool_of = pool_of
        self._seconds = seconds
        self._clients: dict[tuple[str, float], Redis] = {}
        self._leaving: set[tuple[str, float]] = set()
        self._masters: Sequence[str] = ()
        self._nodes: Sequence[str] = ()
        self._doubted: set[str] = set()
        self._fault = ""
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[Told | str]] = {}

    def client(self, address: str, seconds: float) -> Redis:
        """The client of one node."""
        found = self._clients.get((address, seconds))
        if found is None:
            pool = self._pool_of(*split_address(address), seconds)
            found = self._clients[address, seconds] = Redis(connection_pool=pool)
        return found

    def any_pool(self, seconds: float) -> ConnectionPool:
        return self.client(self._seeds[0], seconds).connection_pool

    # --- who has what

    async def slots(self, *, refresh: bool = False) -> Sequence[str]:
        """The address of the master of each slot, "" where there is none. A table once told never changes: another
        takes its place. Raises LostError if nobody tells.
        """
        if refresh or not self._masters:
            await self.refresh()
            if self._fault:
                raise LostError(self._fault)
        return self._masters

    async def master_of(self, slot: int) -> str:
        """Raises LostError, ClusterDownError."""
        masters = self._masters
        if not masters or not masters[slot] or masters[slot] in self._doubted:
            await self.refresh()
            masters = self._masters
        if not masters:
            raise LostError(self._fault)
        if not masters[slot]:
            raise ClusterDownError(f"no node serves slot {slot}")
        return masters[slot]

    async def masters(self) -> Sequence[str]:
        """All of them, once each. Raises LostError, ClusterDownError where a slot has none."""
        if "" in self._masters or not self._doubted.isdisjoint(self._masters):
            await self.refresh()
        found = set(await self.slots())
        if "" in found:
            raise ClusterDownError("not all slots are served")
        return sorted(found)

    def doubt(self, address: str) -> None:
        self._doubted.add(address)

    def trust(self, address: str) -> None:
        self._doubted.discard(address)

    def redirected(self, error: AskError, asked: str) -> str:
        """Where MOVED or ASK points, said by the node at `asked`. MOVED is also remembered for its slot, and the whole
        table is read anew in the background, as slots seldom move alone.
        """
        address = f"{error.host or split_address(asked)[0]}:{error.port}"
        if error.host == "?":
            # It has no name (see `_address`), but a port.
            known = [node for node in self._nodes if split_address(node)[1] == error.port]
            address = known[0] if known else f"{split_address(asked)[0]}:{error.port}"
        if isinstance(error, MovedError):
            self.trust(address)
            if self._masters and self._masters[error.slot_id] != address:
                changed = list(self._masters)
                changed[error.slot_id] = address
                self._masters = tuple(changed)
                self._read()
        return address

    async def refresh(self) -> None:
        """The table is now as fresh as `FRESH_SECONDS`, or `_fault` says why not. Never raises."""
        if (reading := self._read()) is not None:
            await asyncio.shield(reading)

    def _read(self) -> asyncio.Task[None] | None:
        """The reading that is on, begun if the last one is not fresh."""
        if self._reading is not None and not self._reading.done():
            return self._reading
        if time.monotonic() - self._read_at < FRESH_SECONDS:
            return None
        self._reading = asyncio.create_task(self._read_slots(), name="lucid redis topology")
        return self._reading

    async def _read_slots(self) -> None:
        best, faults = await self._healthiest()
        self._read_at = time.monotonic()
        if best is None:
            self._fault = f"no node tells who has which slot: {faults[0] if faults else 'no answer in time'}"
            return
        self._fault = ""
        if best.masters != self._masters:
            self._masters = best.masters
        self._nodes = best.nodes
        self._doubted &= set(best.nodes)
        await self._let_go({*best.nodes, *self._seeds})

    async def _let_go(self, kept: set[str]) -> None:
        """Closes connections to nodes that left, after what is on its way there. Their clients go with the reading
        after this one: somebody may have been about to use them.
        """
        left = {key for key in self._clients if key[0] not in kept}
        for key in left:
            pool = (self._clients.pop(key) if key in self._leaving else self._clients[key]).connection_pool
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
                await pool.disconnect(inuse_connections=False)
        self._leaving = left - self._leaving

    def _by_turns(self) -> Iterator[Sequence[str]]:
        """Nodes to ask at once, in random order: not all workers ask the same. Those that are doubted come late. Those
        that the settings name may be gone, but so may all others: they are the second choice.
        """
        known = random.sample(self._nodes, len(self._nodes))
        known.sort(key=self._doubted.__contains__)
        seeds = random.sample(self._seeds, len(self._seeds))
        order = list(dict.fromkeys([*known[:ASKED_AT_ONCE], *seeds, *known[ASKED_AT_ONCE:]]))
        for at in range(0, len(order), ASKED_AT_ONCE):
            yield order[at : at + ASKED_AT_ONCE]

    async def _healthiest(self) -> tuple[Told | None, list[str]]:
        """The best answer within the time that one may take, and why others did not answer.

        A master that was cut off goes on telling the old table, but says that its cluster is down; so does every
        node where a slot has no master, and then the latest epoch is believed. Where nobody answers, not even with a
        refusal, more are asked meanwhile: the packets to a host that is gone may vanish.
        """
        turns = self._by_turns()
        end = time.monotonic() + self._seconds
        faults: list[str] = []
        best: Told | None = None
        done: set[asyncio.Task[Told | str]] = set()
        pending: set[asyncio.Task[Told | str]] = set()
        while not (best and best.healthy) and (left := end - time.monotonic()) > 0:
            if best is None and not (done and pending):
                pending |= {self._asked(address) for address in next(turns, ())}
            if not pending:
                break
            done, pending = await asyncio.wait(
                pending, timeout=min(GRACE_SECONDS, left), return_when=asyncio.FIRST_COMPLETED
            )
            if best is not None and not done:
                break
            for said in (task.result() for task in done):
                if isinstance(said, str):
                    faults.append(said)
                elif best is None or said.rank > best.rank:
                    best = said
        return best, faults

    def _asked(self, address: str) -> asyncio.Task[Told | str]:
        """A question to this node, which is on until it is answered or lost, heard or not: to cancel it would cost the
        connection, a handshake for each node and reading. There is one at a time.
        """
        asking = self._asking.get(address)
        if asking is None:
            asking = asyncio.create_task(self._ask(address), name=f"lucid redis topology of {address}")
            self._asking[address] = asking
            asking.add_done_callback(lambda _: self._asking.pop(address))
        return asking

    async def _ask(self, address: str) -> Told | str:
        pipeline = self.client(address, self._seconds).pipeline(transaction=False)
        # In two words: redis-py would make something of the answer to "CLUSTER SLOTS".
        pipeline.execute_command("CLUSTER", "INFO")
        pipeline.execute_command("CLUSTER", "SLOTS")
        try:
            async with asyncio.timeout(self._seconds):
                info, slots = await pipeline.execute()
            return Told(info, slots, split_address(address)[0])
        except Exception as error:  # noqa: BLE001 (an answer that is not understood too must not end who follows the table)
            return str(error) or type(error).__name__

    async def close(self) -> None:
        tasks = {
            task for task in (self._reading, *self._asking.values()) if task is not None and not task.done()
        }
        while tasks:
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=0.05)
        for client in list(self._clients.values()):
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await client.connection_pool.disconnect()
