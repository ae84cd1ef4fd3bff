"""Which master of a cluster answers for a key, as far as this worker knows."""

from collections.abc import Iterable

from lucid.core.rules.leases import MARKER
from lucid.core.rules.shards import Partition, Shard
from lucid.core.wire.redis_slots import slot_of, tag_of


def marker_of(slot: int) -> str:
    """The key by which the limiter knows whether this hash slot lost anything; it lies in the slot itself."""
    return f"{MARKER}:{{{tag_of(slot)}}}"


class ClusterShards:
    """A shard for each master, a partition for each hash slot in use.

    What no master is known for lies on a shard that stays away. Call `learn` with what the cluster tells.
    """

    def __init__(self) -> None:
        self.nobody = Shard("nobody")
        """Of the slots that no master is known for."""
        self.nobody.away = True
        self._by_address: dict[str, Shard] = {}
        self._addresses: list[str] = []
        self._partitions: dict[int, Partition] = {}

    @property
    def complete(self) -> bool:
        return bool(self._addresses) and all(self._addresses)

    def partitions(self) -> list[Partition]:
        return list(self._partitions.values())

    def partition_of(self, key: str) -> Partition:
        return self._of_slot(slot_of(key))

    def probed(self, shard: Shard) -> Partition | None:
        """A partition to try the shard with; None where it has no slot."""
        for partition in self._partitions.values():
            if partition.shard is shard:
                return partition
        for slot, address in enumerate(self._addresses):
            if address == shard.name:
                return self._of_slot(slot)
        return None

    def _of_slot(self, slot: int) -> Partition:
        partition = self._partitions.get(slot)
        if partition is None:
            partition = self._partitions[slot] = Partition(marker_of(slot), self._shard_of(slot))
        return partition

    def _shard_of(self, slot: int) -> Shard:
        address = self._addresses[slot] if self._addresses else ""
        return self._by_address[address] if address else self.nobody

    def learn(self, addresses: Iterable[str]) -> tuple[list[Shard], list[Shard]]:
        """Takes the cluster's present layout: each slot's master. The shards that came, and those that went.

        Those that came are away until somebody has tried them. A partition with a call on its way moves when that has
        ended. Call `Leases.refile` for every shard afterwards.
        """
        self._addresses = list(addresses)
        present = set(self._addresses) - {""}
        came = [Shard(address) for address in sorted(present - self._by_address.keys())]
        went = [shard for address, shard in self._by_address.items() if address not in present]
        for shard in went:
            del self._by_address[shard.name]
        for shard in came:
            shard.away = True
            self._by_address[shard.name] = shard
        for slot, partition in self._partitions.items():
            partition.move(self._shard_of(slot))
        return came, went
