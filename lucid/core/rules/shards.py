"""Where keys live, as far as a worker's decisions depend on it: what travels together, and what is away together.

One server is one shard of one partition. In a cluster each master is a shard, and each hash slot a partition: a
command's keys must lie in one slot, and a master that dies takes only its own slots along.
"""

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lucid.core.rules.key_lease import KeyLease
    from lucid.core.rules.leases import Waiter


class Shard:
    """One server of the store. While it is `away` its keys are decided by this worker alone."""

    __slots__ = ("absences", "away", "back_at", "due", "name", "summoned", "waiting")

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.away = False
        self.absences = 0
        self.back_at = float("inf")
        """When it answered again after the last absence."""
        self.waiting: deque[Waiter] = deque()
        """Requests that need this shard next."""
        self.due: dict[KeyLease, None] = {}
        """Keys to be told of with the next call, in this order."""
        self.summoned: dict[Partition, None] = {}
        """Partitions to be called though there is no key to tell of: somebody waits for this worker's word."""

    def leave(self) -> None:
        """It does not answer (`Leases.leave`). Each partition's next call says that this worker was on its own."""
        self.away = True
        self.absences += 1
        self.back_at = float("inf")

    def arrive(self, now: float) -> None:
        """It answers again, in time."""
        self.away = False
        self.back_at = now


class Partition:
    """Keys that may travel in one call, and what is known of the store's memory of them.

    `marker` is the name of the key by which the store knows whether it lost anything.
    """

    __slots__ = ("known", "marker", "next", "open", "owing", "roll", "rolled_at", "shard", "told")

    def __init__(self, marker: str, shard: Shard) -> None:
        self.marker = marker
        self.shard = shard
        self.known = ""
        """The store's epoch; empty: never heard."""
        self.roll = ""
        """The last roll call that this worker heard of."""
        self.rolled_at = float("-inf")
        """When a roll call was last known to be on."""
        # Of an absence that it is first used in, it was told nothing.
        self.told = shard.absences - (shard.away and shard.absences > 0)
        """Absences of the shard that the store was told of."""
        self.owing: set[KeyLease] = set()
        """Keys with admissions of this worker alone that the store does not know yet."""
        self.open = 0
        """Calls on their way."""
        self.next: Shard | None = None
        """Where it moves once no call is on its way any more."""

    @property
    def heads(self) -> list[str]:
        """The keys that stand before those of the messages in a call: the marker, and who is here (`bucket`)."""
        return [self.marker, f"{self.marker}:here"]

    def move(self, shard: Shard) -> bool:
        """Another server answers for these keys now. False: not yet, a call is still on its way to the old one."""
        if self.open:
            self.next = shard
            return False
        self.next = None
        if shard is not self.shard:
            self.shard = shard
            # What the new server knows of this worker is uncertain: it is told as after an absence.
            self.told = shard.absences - 1
        return True
