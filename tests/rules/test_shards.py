"""A store of several servers: what travels together, what is away together, and who moves where."""

import pytest

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import Answer, Store
from lucid.core.rules.claims import LimitSet, Take
from lucid.core.rules.leases import Flight, Leases
from lucid.core.rules.shards import Partition, Shard

EPOCH_MS = 1_700_000_000_000
A, B = Limit("a", 10, 60), Limit("b", 20, 60)


class Cluster:
    """Two masters with a store each; keys of limit `a` lie on one, those of `b` on the other."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.shards = {name: Shard(name) for name in "ab"}
        self.partitions = {name: Partition(f"m:{name}", shard) for name, shard in self.shards.items()}
        self.stores = {name: Store() for name in "abc"}
        for store in self.stores.values():
            store.marker = ("", "served", 0)
        self.leases = Leases("me", fleet=2, partition_of=lambda key: self.partitions[key.split(":")[1]])
        self.woken: list[Shard] = []
        self.leases.wake = self.woken.append

    @property
    def now(self) -> float:
        return self.seconds + 5_000.0

    def answer(self, flight: Flight) -> Answer:
        store = self.stores[flight.partition.shard.name]
        return store.call(flight.keys, flight.call, EPOCH_MS + round(self.seconds * 1_000))

    def call(self, name: str) -> list[Flight]:
        flights = self.leases.compose(self.now, self.shards[name])
        for flight in flights:
            self.leases.apply(flight, self.answer(flight), self.now)
        return flights

    def calls(self) -> None:
        """Until nobody waits for a server that answers."""
        for _ in range(10):
            for name, shard in self.shards.items():
                if not shard.away:
                    self.call(name)

    def ask(self, *limits: Limit, count: int = 1) -> list[bool]:
        settled: list[bool] = []
        claim = self.leases.claim(LimitSet(limits), "alice", "192.0.2.1")
        for _ in range(count):
            take = claim.take(self.now)
            if take is Take.WANTING:
                self.leases.wait(claim, settled.append)
            else:
                settled.append(take is Take.ADMITTED)
        self.calls()
        return settled

    def spent(self, name: str, store: str = "") -> int:
        """What counts, once everything was told."""
        bucket = self.stores[store or name].buckets[f"rate_limit:{name}:alice"]
        return bucket.spent + bucket.reserved()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_call_goes_to_the_server_of_its_keys(cluster: Cluster) -> None:
    assert cluster.ask(A, count=2) + cluster.ask(B) == [True] * 3
    assert (cluster.spent("a"), cluster.spent("b")) == (2, 1)
    assert not cluster.stores["b"].buckets.keys() & {"rate_limit:a:alice"}


@pytest.mark.parametrize("limits", [(A, B), (B, A)])
def test_limits_on_two_servers_are_charged_together_or_not_at_all(
    cluster: Cluster, limits: tuple[Limit, ...]
) -> None:
    assert cluster.ask(*limits, count=12).count(True) == 10
    for _ in range(300):  # what was leased for those that were refused goes back
        cluster.seconds += 0.1
        cluster.leases.sweep(cluster.now)
        cluster.calls()
    assert (cluster.spent("a"), cluster.spent("b")) == (10, 10)


def test_the_last_token_is_leased_to_who_needs_it_elsewhere_too(cluster: Cluster) -> None:
    """At most half of what is free is leased: of one token that would be none."""
    assert cluster.ask(A, count=9) == [True] * 9
    assert cluster.ask(A, B) == [True]
    assert cluster.ask(A, B) == [False]


def test_a_server_that_is_away_leaves_the_others_keys_alone(cluster: Cluster) -> None:
    cluster.shards["a"].leave()
    assert cluster.ask(A, count=7) == [True] * 5 + [False] * 2, "a share of a fleet of two"
    assert cluster.ask(B, count=21).count(True) == 20
    assert cluster.leases.counters_of["a"].degraded == 7
    assert cluster.leases.counters_of["b"].degraded == 0


def test_of_two_limits_the_one_that_is_away_is_decided_alone(cluster: Cluster) -> None:
    cluster.shards["a"].leave()
    assert cluster.ask(A, B, count=7).count(True) == 5
    cluster.leases.sweep(cluster.now)
    cluster.calls()
    assert cluster.stores["b"].buckets["rate_limit:b:alice"].spent == 5, "what was refused counts nothing"


def test_who_waits_for_a_server_that_goes_away_is_decided_alone(cluster: Cluster) -> None:
    settled: list[bool] = []
    claim = cluster.leases.claim(LimitSet((A, B)), "alice", "")
    for _ in range(7):
        cluster.leases.wait(claim, settled.append)
    (flight,) = cluster.leases.compose(cluster.now, cluster.shards["a"])
    cluster.shards["a"].leave()
    cluster.leases.abandon(flight, cluster.now)
    assert settled == []  # the other limit is still to be asked for
    cluster.calls()
    assert settled.count(True) == 5
    cluster.leases.fail(flight, cluster.now)


def told(cluster: Cluster, shard: str = "a") -> list[tuple[bool, bool]]:
    """Of each call that goes out next: whether it says that the worker was away, and that it told everything."""
    flights = cluster.leases.compose(cluster.now, cluster.shards[shard])
    said = [(flight.call.back, flight.call.reported) for flight in flights]
    for flight in flights:
        cluster.leases.apply(flight, cluster.answer(flight), cluster.now)
    return said


def test_after_an_absence_the_store_is_told_so_and_waits_for_this_workers_word(cluster: Cluster) -> None:
    cluster.ask(A)
    cluster.shards["a"].leave()
    assert cluster.ask(A, count=2) == [True] * 2
    cluster.shards["a"].arrive(cluster.now)
    (lease,) = cluster.partitions["a"].owing
    (probe,) = [cluster.leases.probe(cluster.now, cluster.partitions["a"])]
    assert (probe.call.back, probe.call.reported) == (True, False)
    cluster.leases.apply(probe, cluster.answer(probe), cluster.now)
    # It has heard of the roll call, so it is called again at once, key or no key; the sweep brings the key along.
    assert cluster.shards["a"].summoned
    cluster.leases.sweep(cluster.now)
    assert told(cluster) == [(False, True)]
    assert not cluster.partitions["a"].owing
    assert lease.journal == []
    # The other worker of the fleet has not: half of the limit is held back for it.
    assert cluster.ask(A, count=9).count(True) == 10 - 3 - 5


def test_an_absence_of_long_ago_is_not_told_any_more(cluster: Cluster) -> None:
    cluster.ask(A)
    cluster.shards["a"].leave()
    cluster.shards["a"].arrive(cluster.now)
    cluster.seconds += 3.5
    assert cluster.leases.probe(cluster.now, cluster.partitions["a"]).call.back is False


def test_whose_word_is_waited_for_is_called(cluster: Cluster) -> None:
    cluster.leases.give_back("rate_limit:a:alice")
    assert cluster.woken == []
    cluster.leases.give_back("rate_limit:a:alice", report=True)
    assert cluster.woken == [cluster.shards["a"]]
    assert told(cluster) == [(False, True)]


def test_a_partition_moves_when_its_calls_have_ended(cluster: Cluster) -> None:
    settled: list[bool] = []
    claim = cluster.leases.claim(LimitSet((A,)), "alice", "")
    cluster.leases.wait(claim, settled.append)
    (flight,) = cluster.leases.compose(cluster.now, cluster.shards["a"])
    cluster.leases.wait(claim, settled.append)
    new = cluster.shards["c"] = Shard("c")
    assert not cluster.partitions["a"].move(new)
    assert cluster.partitions["a"].shard is cluster.shards["a"], "its call is still on its way"
    cluster.leases.fail(flight, cluster.now)
    assert cluster.partitions["a"].shard is new
    assert (len(new.waiting), settled) == (2, [])
    assert told(cluster, "c") == [(True, True)], "what the new server knows of us is uncertain"
    assert settled == [True, True]
    # What the call that failed may have been granted is told to the new server: nothing stays behind.
    assert cluster.spent("a", "c") == 2


def test_what_was_due_moves_along(cluster: Cluster) -> None:
    cluster.ask(A, count=5)
    (lease,) = cluster.leases.claim(LimitSet((A,)), "alice", "").all
    cluster.shards["a"].due[lease] = None
    new = cluster.shards["c"] = Shard("c")
    cluster.shards["a"].summoned[cluster.partitions["a"]] = None
    for _ in range(2):
        assert cluster.partitions["a"].move(new)
        cluster.leases.refile(cluster.shards["a"])
    assert (list(new.summoned), list(cluster.shards["a"].summoned)) == ([cluster.partitions["a"]], [])
    new.summoned.clear()
    assert (list(new.due), list(cluster.shards["a"].due)) == ([lease], [])
    # Where the name of a key is filed with the old one all the same, it is sent on.
    cluster.shards["a"].due[lease] = None
    assert cluster.leases.compose(cluster.now, cluster.shards["a"]) == []
    assert list(new.due) == [lease]


def test_who_waits_at_the_wrong_server_is_sent_on(cluster: Cluster) -> None:
    settled: list[bool] = []
    claim = cluster.leases.claim(LimitSet((A,)), "alice", "")
    waiter = cluster.leases.wait(claim, settled.append)
    cluster.shards["a"].waiting.clear()
    cluster.shards["b"].waiting.append(waiter)
    assert cluster.leases.compose(cluster.now, cluster.shards["b"]) == []
    cluster.calls()
    assert settled == [True]


def test_one_server_needs_none_of_this() -> None:
    leases = Leases("me")
    assert leases.lease(A, "alice").partition is leases.partition
    assert leases.partition.shard is leases.shard
