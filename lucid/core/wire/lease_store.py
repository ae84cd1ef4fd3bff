"""A worker's limiter as a whole: its leases, a courier for each shard of Redis, and what workers say to each other.

*Data loss.* The script refuses to grant for a window, a lease's life and a slot when the server's run or the
marker changed (`rules/bucket.py`); each key in question is then decided here, as if the store were away,
while spends go on being reported. `strict` is exact through all of it. What only a dead worker knew is gone with it:
of its leases the store counts every token as spent, of what it admitted alone nothing.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from redis.exceptions import MovedError

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import KeyAnswer, Message, Op
from lucid.core.rules.claims import Claim, Standing, Take
from lucid.core.rules.key_lease import RECALL_STEPS_SECONDS, Counters, KeyLease, Shape, key_of
from lucid.core.rules.leases import Leases
from lucid.core.rules.shards import Partition, Shard
from lucid.core.wire.cluster_shards import ClusterShards
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.lease_courier import FAILURES, Courier, read_script
from lucid.core.wire.redis_link import AWAY_ERRORS, RedisLink, end_tasks

SWEEP_SECONDS = 0.1
LAYOUT_SECONDS = 10.0
"""Between two looks at a cluster's layout while all is well."""
NEXT_LAYOUT_SECONDS = 0.5
"""While a master is away."""
FLEET_MEMORY_SECONDS = 3_600.0
"""So long the largest fleet is remembered after it shrank: a worker that is cut off from the registry but not from
its callers still admits its share of that fleet."""

STOP_SECONDS = 1.0
"""How long `stop` tries to return what is held; the rest expires by itself."""

_log = logging.getLogger("lucid.limiter")


class StoreAwayError(Exception):
    """Redis did not do what an operator asked."""


class LeaseStore:
    """Owns this worker's `leases` and settles what they cannot. `start` it in the worker, `stop` it last.

    `fleet_told`: how many workers there are at most, for one that starts while Redis is away: it then admits its share
    (in `safe`), a window after it came; 0: nothing, until it has read the registry once. `clock` is that of the `now`
    which `Claim.take` gets.
    """

    def __init__(
        self,
        link: RedisLink,
        holder: str,
        control: ControlChannel | None = None,
        *,
        fleet_told: int,
        deadline_seconds: float = 0.025,
        clock: Callable[[], float] = time.monotonic,
        shape: Callable[[Limit], Shape] = Shape.of,
        script: str | None = None,
    ) -> None:
        self._link = link
        self._cluster = ClusterShards() if link.clustered else None
        partition_of = self._cluster.partition_of if self._cluster is not None else None
        self.leases = Leases(holder, fleet=fleet_told, shape=shape, partition_of=partition_of)
        self.leases.wake = self._wake_soon
        self._control = control
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._script = script if script is not None else read_script()
        self._couriers: dict[Shard, Courier] = {}
        self._fleet_told = fleet_told
        self._fleets: deque[tuple[float, int]] = deque()
        self._next_look: asyncio.Future[None] | None = None
        self._layout_doubted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._pushing: set[asyncio.Task[bool]] = set()
        if self._cluster is None:
            self.leases.shard.away = True
            self._couriers[self.leases.shard] = self._courier(self.leases.shard)
        if control is not None:
            control.subscribe("limit_reset", self._on_reset, self._on_gap)
            control.subscribe("lease_recall", self._on_recall)

    def _courier(self, shard: Shard) -> Courier:
        return Courier(
            self.leases,
            shard,
            self._link,
            script=self._script,
            deadline_seconds=self._deadline_seconds,
            clock=self._clock,
            probed=self._probed,
            moved=self._have_looked,
            left=self._layout_doubted.set,
        )

    def _probed(self, shard: Shard) -> Partition | None:
        return self.leases.partition if self._cluster is None else self._cluster.probed(shard)

    @property
    def counters(self) -> Counters:
        return self.leases.counters

    @property
    def away(self) -> bool:
        """Whether any server of the store is not asked at present; `away_since` (by the clock) says since when."""
        return self.away_since is not None

    @property
    def away_since(self) -> float | None:
        return min((each.away_since for each in self._couriers.values() if each.shard.away), default=None)

    @property
    def troubled(self) -> bool:
        """Whether some keys are decided by each worker alone: servers are away, or hold back after a loss of data."""
        return self.away or self._clock() < self.leases.held_until

    # --- requests

    async def admit(self, claim: Claim) -> bool:
        """Settles one request whose `take` said WANTING. True: admitted and charged to all its limits."""
        verdict = claim.take(self._clock())
        if verdict is not Take.WANTING:
            return verdict is Take.ADMITTED
        if not self._tasks and not self._stopping:
            raise RuntimeError("LeaseStore.start was not called")
        settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def settle(admitted: bool) -> None:
            if not settled.done():
                settled.set_result(admitted)

        waiter = self.leases.wait(claim, settle)
        self._wake(self.leases.shard_of(waiter))
        try:
            return await settled
        finally:
            waiter.gone = True

    def refund(self, claim: Claim, since: float) -> None:
        """A request that began at `since` (by the clock) and was admitted is refused by another limit after all."""
        self.leases.refund(claim, self._clock(), since)

    def peek(self, claim: Claim) -> tuple[Standing, ...]:
        """Where the caller stands, from memory."""
        return claim.standings(self._clock())

    # --- operators

    async def look(self, limit: Limit, identifier: str) -> KeyAnswer:
        """The key as the store has it, for all workers. Raises StoreAwayError."""
        return await self._ask(limit, identifier, Op.LOOK)

    async def reset(self, limit: Limit, identifier: str) -> None:
        """Clears what was spent, keeps live reservations, and tells every worker. Raises StoreAwayError."""
        await self._ask(limit, identifier, Op.RESET)
        self.leases.reset(limit.name, identifier)
        if self._control is not None:
            await self._control.publish("limit_reset", {"limit": limit.name, "identifier": identifier})

    async def _ask(self, limit: Limit, identifier: str, op: Op) -> KeyAnswer:
        shape = self.leases.shape(limit)
        key = key_of(limit.name, identifier)
        message = Message(op=op, limit=limit.requests, slot_ms=shape.slot_ms, long_ms=shape.long_ms)
        partition = self.leases.partition_of(key)
        call = self.leases.call(partition, [message], [])
        try:
            try:
                answer = await self._courier_of(partition.shard).ask(partition, [key], call)
            except MovedError as error:
                self._link.redirected(error, partition.shard.name)
                await self._have_looked()
                answer = await self._courier_of(partition.shard).ask(partition, [key], call)
        except FAILURES as error:
            raise StoreAwayError(str(error)) from error
        return answer.keys[0]

    def _courier_of(self, shard: Shard) -> Courier:
        courier = self._couriers.get(shard)
        if courier is None:
            raise StoreAwayError("no server of the cluster answers for this key")
        return courier

    # --- other workers

    def _recall(self, leases: list[KeyLease]) -> None:
        """Pushed to all workers; those that hold nothing of these keys do nothing."""
        loop = asyncio.get_running_loop()
        if self._control is not None:
            now = self._clock()
            body = {
                "holder": self.leases.holder,
                "keys": [lease.key for lease in leases],
                "report": any(self.leases.rolling(lease, now) for lease in leases),
            }
            pushing = loop.create_task(
                self._control.publish("lease_recall", body), name="lucid limiter recall"
            )
            self._pushing.add(pushing)
            pushing.add_done_callback(self._pushing.discard)
        for seconds in RECALL_STEPS_SECONDS:
            loop.call_later(seconds, self._recall_step, leases)

    def _recall_step(self, leases: list[KeyLease]) -> None:
        self.leases.recall_step(leases)
        for courier in self._couriers.values():
            courier.wake()

    def _on_recall(self, body: Mapping[str, Any]) -> None:
        if body.get("holder") == self.leases.holder:
            return
        for key in body.get("keys", ()):
            self.leases.give_back(str(key), report=bool(body.get("report")))
        # Somebody waits for it: the call is not to be gathered with others for long.
        for shard, courier in self._couriers.items():
            if shard.due or shard.summoned:
                courier.wake_now()

    def _on_reset(self, body: Mapping[str, Any]) -> None:
        self.leases.reset(str(body.get("limit", "")), str(body.get("identifier", "")))

    async def _on_gap(self) -> None:
        """Resets may have been missed. And where Redis was emptied, a newcomer cannot know: it is told so now."""
        self.leases.forget_refusals()
        for partition in self._partitions():
            partition.shard.summoned[partition] = None
            self._wake_soon(partition.shard)

    def _partitions(self) -> Iterable[Partition]:
        return (self.leases.partition,) if self._cluster is None else self._cluster.partitions()

    # --- life

    async def start(self) -> None:
        """Tries Redis once, with patience; whether it answers or not, the worker may serve afterwards."""
        if self._tasks:
            return
        if self._control is not None:
            self.leases.alone_from = self._clock()
        self._watch_the_fleet(self._clock())
        await self._look_at_layout()
        await asyncio.gather(*(courier.start() for courier in self._couriers.values()))
        self._tasks = [asyncio.create_task(self._sweep_always(), name="lucid limiter sweep")]
        if self._cluster is not None:
            self._tasks.append(asyncio.create_task(self._follow_layout(), name="lucid limiter layout"))

    async def stop(self) -> None:
        """Returns what is held, out of memory first. What comes later is decided without the store."""
        if not self._tasks:
            return
        self._stopping = True
        await end_tasks(self._tasks)
        self._tasks = []
        if self._next_look is not None:
            self._next_look.set_result(None)
            self._next_look = None
        for courier in self._couriers.values():
            await courier.stop()
        self.leases.sweep(self._clock())
        await asyncio.gather(*(self._return(courier) for courier in self._couriers.values()))
        for shard in self._shards():
            shard.away = True
        for shard in self._shards():
            self.leases.decide_waiting(self._clock(), shard)
        self._stopping = False

    async def _return(self, courier: Courier) -> None:
        if not courier.shard.away:
            with contextlib.suppress(TimeoutError, *FAILURES):
                async with asyncio.timeout(STOP_SECONDS):
                    await courier.return_all()

    def _wake(self, shard: Shard) -> None:
        if courier := self._couriers.get(shard):
            courier.wake()

    def _wake_soon(self, shard: Shard) -> None:
        if courier := self._couriers.get(shard):
            courier.wake_soon()

    async def _sweep_always(self) -> None:
        while True:
            now = self._clock()
            self._watch_the_fleet(now)
            self.leases.sweep(now)
            for shard, courier in self._couriers.items():
                if shard.due or shard.summoned:
                    courier.wake_now()
            for shard in self._shards():
                # Filed there while it was away already, as another shard gave it up or a slot lost its master.
                if shard.away and shard.waiting:
                    self.leases.decide_waiting(now, shard)
            await asyncio.sleep(SWEEP_SECONDS)

    def _shards(self) -> list[Shard]:
        return [*self._couriers, *([self._cluster.nobody] if self._cluster is not None else [])]

    def _watch_the_fleet(self, now: float) -> None:
        """The largest fleet of the last while, and whether other workers can be asked for anything."""
        if self._control is None:
            return
        self.leases.recall = self._recall if self._control.connected else None
        size = self._control.fleet_size
        if size:
            while self._fleets and self._fleets[-1][1] <= size:
                self._fleets.pop()
            self._fleets.append((now, size))
        while len(self._fleets) > 1 and self._fleets[0][0] < now - FLEET_MEMORY_SECONDS:
            self._fleets.popleft()
        if self._fleets:
            self.leases.alone_from = float("-inf")
        self.leases.fleet = max(self._fleet_told, self._fleets[0][1] if self._fleets else 0)

    # --- a cluster's layout

    async def _follow_layout(self) -> None:
        while True:
            settled = self._cluster is not None and self._cluster.complete and not self.away
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAYOUT_SECONDS if settled else NEXT_LAYOUT_SECONDS):
                    await self._layout_doubted.wait()
            self._layout_doubted.clear()
            asked, self._next_look = self._next_look, None
            try:
                await self._look_at_layout()
            except Exception:  # noqa: BLE001 (a fault of ours must not end it)
                _log.exception("the look at the cluster's layout failed and is tried again")
            finally:
                if asked is not None:
                    asked.set_result(None)

    async def _have_looked(self) -> None:
        """Has the cluster's layout looked at, by the one task that does, and waits for that."""
        if not self._tasks:
            return
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().create_future()
        self._layout_doubted.set()
        await asyncio.shield(self._next_look)

    async def _look_at_layout(self) -> None:
        """Learns which master answers for which keys. Never fails."""
        if self._cluster is None:
            return
        try:
            addresses = await self._link.slots(refresh=True)
        except AWAY_ERRORS as error:
            _log.debug("limiter: nobody tells the cluster's layout (%s)", error)
            return
        before = [*self._couriers, self._cluster.nobody]
        came, went = self._cluster.learn(addresses)
        for shard in before:
            self.leases.refile(shard)
        for shard in came:
            self._couriers[shard] = self._courier(shard)
        for shard in went:
            # Its calls end now, and with them its partitions move.
            await self._couriers.pop(shard).stop()
        if self._tasks:
            await asyncio.gather(*(self._couriers[shard].start() for shard in came))
