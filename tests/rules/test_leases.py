"""The worker's side alone: a real pure store answers, time is a number."""

from collections.abc import Callable

import pytest

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import CURRENT_SLOT, Answer, Op, Store
from lucid.core.rules.claims import Claim, LimitSet, Standing, Take
from lucid.core.rules.key_lease import RECALL_STEPS_SECONDS, KeyLease, Shape
from lucid.core.rules.leases import Flight, Leases

EPOCH_MS = 1_700_000_000_000

PUBLIC = Limit("public", 100, 60, per="address")
USER = Limit("user", 10, 60)


class World:
    """One store, a worker's clock that begins elsewhere, calls that go well unless a test says otherwise."""

    def __init__(self) -> None:
        self.store = Store()
        self.seconds = 0.0

    def now(self, leases: Leases) -> float:
        return self.seconds + 5_000.0

    def answer(self, flight: Flight) -> Answer:
        return self.store.call(flight.keys, flight.call, EPOCH_MS + round(self.seconds * 1_000))

    def compose(self, leases: Leases, **options: bool) -> Flight | None:
        """The next call, there being one server."""
        flights = leases.compose(self.now(leases), **options)
        assert len(flights) <= 1
        return flights[0] if flights else None

    def call(self, leases: Leases, **options: bool) -> Flight | None:
        flight = self.compose(leases, **options)
        if flight is not None:
            leases.apply(flight, self.answer(flight), self.now(leases))
        return flight

    def ask(self, leases: Leases, claim: Claim, count: int = 1) -> int:
        """So many requests at once; how many were admitted."""
        admitted: list[bool] = []
        for _ in range(count):
            take = claim.take(self.now(leases))
            if take is Take.WANTING:
                leases.wait(claim, admitted.append)
            else:
                admitted.append(take is Take.ADMITTED)
        while leases.shard.waiting:
            self.call(leases)
        return sum(admitted)


@pytest.fixture
def world() -> World:
    return World()


def worker(world: World, limits: tuple[Limit, ...] = (USER,), **options: int) -> tuple[Leases, Claim]:
    leases = Leases("me", **options)
    leases.partition.known = "e"
    world.store.marker = ("", "e", 0)
    return leases, leases.claim(LimitSet(limits), "alice", "192.0.2.1")


def other(world: World, limit: Limit = USER) -> tuple[Leases, Claim]:
    leases = Leases("other")
    return leases, leases.claim(LimitSet((limit,)), "alice", "192.0.2.1")


def test_no_limits_admit_and_say_nothing(world: World) -> None:
    _, claim = worker(world, ())
    assert claim.take(1.0) is Take.ADMITTED
    assert (claim.fields(1.0), claim.retry_after(1.0), claim.standings(1.0)) == (b"", 0.0, ())
    with pytest.raises(ValueError, match="empty"):
        claim.tightest(1.0)


@pytest.mark.parametrize("limit", [Limit("off", 0), Limit("never", 1, 0)])
def test_a_limit_of_nothing_is_refused(limit: Limit) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LimitSet((limit,))


def test_a_cold_key_is_granted_directly_and_holds_nothing(world: World) -> None:
    leases, claim = worker(world)
    assert claim.take(world.now(leases)) is Take.WANTING
    assert world.ask(leases, claim, 3) == 3
    assert (leases.counters.direct, leases.counters.granted, leases.counters.calls) == (3, 0, 1)
    assert world.store.buckets["rate_limit:user:alice"].reserved() == 0
    assert not leases.live


def test_over_the_limit_is_refused_from_memory_until_quota_frees(world: World) -> None:
    leases, claim = worker(world)
    world.seconds = 0.2
    assert world.ask(leases, claim, 12) == 10
    assert (leases.counters.refused, leases.counters.calls) == (2, 1)
    world.seconds = 30.0
    assert claim.take(world.now(leases)) is Take.DENIED
    # The slot of 0.0 to 0.5 counts until a window after its end.
    assert claim.retry_after(world.now(leases)) == pytest.approx(30.5)
    assert claim.tightest(world.now(leases)) is USER
    world.seconds = 60.4
    assert world.ask(leases, claim) == 0
    assert leases.counters.calls == 1
    world.seconds += claim.retry_after(world.now(leases))
    assert world.ask(leases, claim) == 1
    assert leases.counters.refused_from_memory == 2


def test_a_busy_key_gets_a_lease_and_needs_no_store_then(world: World) -> None:
    limit = Limit("busy", 1_000)
    leases, claim = worker(world, (limit,))
    assert world.ask(leases, claim, 20) == 20
    assert (leases.counters.direct, leases.counters.granted) == (20, 20)
    woken: list[bool] = []
    leases.wake = lambda shard: woken.append(True)
    for _ in range(18):
        assert claim.take(world.now(leases)) is Take.ADMITTED
    assert not woken
    assert claim.take(world.now(leases)) is Take.ADMITTED
    assert woken == [True]
    assert claim.take(world.now(leases)) is Take.ADMITTED
    flight = world.call(leases)
    assert flight is not None
    assert [entry[2:] for entry in flight.call.messages[0].journal] == [(20, 1)]
    assert world.store.buckets["rate_limit:busy:alice"].spent == 40
    assert claim.take(world.now(leases)) is Take.ADMITTED
    assert leases.counters.calls == 2


def test_nothing_is_asked_for_early_while_nothing_is_free(world: World) -> None:
    limit = Limit("busy", 40)
    leases, claim = worker(world, (limit,))
    assert world.ask(leases, claim, 20) == 20
    rival, rivals = other(world, limit)
    world.ask(rival, rivals, 100)
    lease = claim.all[0]
    leases.shard.due[lease] = None
    world.call(leases)
    assert lease.free == 0
    while lease.has:
        assert claim.take(world.now(leases)) is Take.ADMITTED
    assert not leases.shard.due
    assert claim.take(world.now(leases)) is Take.DENIED


def test_tokens_die_before_the_store_gives_them_away(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    assert world.ask(leases, claim, 20) == 20
    life = 2.0
    world.seconds = life - 0.002 - life / 1_000 - 0.001
    assert claim.take(world.now(leases)) is Take.ADMITTED
    world.seconds += 0.002
    assert claim.take(world.now(leases)) is Take.WANTING
    assert leases.counters.expired == 19


def test_a_late_answer_dates_its_tokens_by_the_sending(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    for _ in range(20):
        leases.wait(claim, lambda admitted: None)
    flight = world.compose(leases)
    assert flight is not None
    world.seconds = 0.5
    answer = world.answer(flight)
    world.seconds = 1.5
    leases.shard.away = True
    leases.abandon(flight, world.now(leases))
    leases.shard.away = False
    leases.apply(flight, answer, world.now(leases))
    assert claim.take(world.now(leases)) is Take.ADMITTED
    world.seconds = 1.999
    assert claim.take(world.now(leases)) is Take.WANTING


def test_spends_are_reported_in_the_slot_of_their_use(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    world.ask(leases, claim, 20)
    first = EPOCH_MS // 500
    for at, count in ((0.1, 2), (0.6, 3), (1.1, 1)):
        world.seconds = at
        for _ in range(count):
            assert claim.take(world.now(leases)) is Take.ADMITTED
    world.seconds = 1.6
    leases.sweep(world.now(leases))
    flight = world.call(leases)
    assert flight is not None
    assert [entry[1:] for entry in flight.call.messages[0].journal] == [
        (first, 2, 1),
        (first + 1, 3, 1),
        (first + 2, 1, 1),
    ]
    assert claim.all[0].journal == []


def test_an_idle_lease_goes_back_before_it_expires(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    world.ask(leases, claim, 20)
    bucket = world.store.buckets["rate_limit:busy:alice"]
    claim.all[0].counted = 0
    world.seconds = 1.6
    leases.sweep(world.now(leases))
    assert world.call(leases) is not None
    assert (leases.counters.returned, bucket.reserved(), bucket.spent) == (20, 0, 20)
    leases.sweep(world.now(leases))
    assert not leases.live
    assert world.call(leases) is None


def test_closing_returns_everything_out_of_memory_first(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    world.ask(leases, claim, 20)
    claim.take(world.now(leases))
    flight = world.compose(leases, closing=True)
    assert flight is not None
    assert claim.all[0].has == 0
    assert claim.take(world.now(leases)) is Take.WANTING
    leases.apply(flight, world.answer(flight), world.now(leases))
    assert world.store.buckets["rate_limit:busy:alice"].reserved() == 0
    assert world.store.buckets["rate_limit:busy:alice"].spent == 21
    assert world.compose(leases, closing=True) is None


# --- several limits


def test_two_limits_are_charged_together_or_not_at_all(world: World) -> None:
    leases, claim = worker(world, (PUBLIC, USER))
    assert world.ask(leases, claim, 15) == 10
    spent = {key: bucket.spent + bucket.reserved() for key, bucket in world.store.buckets.items()}
    assert spent["rate_limit:user:alice"] == 10
    assert world.store.buckets["rate_limit:public:192.0.2.1"].spent == 10
    assert claim.take(world.now(leases)) is Take.DENIED
    assert claim.tightest(world.now(leases)) is USER


def test_a_token_put_aside_comes_back_when_the_other_limit_refuses(world: World) -> None:
    tier = Limit("tier", 1_000)
    leases, both = worker(world, (tier, USER))
    alone = leases.claim(LimitSet((tier,)), "alice", "")
    assert world.ask(leases, alone, 20) == 20
    has = both.all[0].has
    assert has == 20
    rival, rivals = other(world)
    world.ask(rival, rivals, 10)
    admitted: list[bool] = []
    assert both.take(world.now(leases)) is Take.WANTING
    leases.wait(both, admitted.append)
    flight = world.compose(leases)
    assert flight is not None
    assert flight.keys == ["rate_limit:user:alice"]
    assert both.all[0].has == has - 1
    leases.apply(flight, world.answer(flight), world.now(leases))
    assert admitted == [False]
    assert (both.all[0].has, both.all[0].aside, leases.counters.spent) == (has, 0, 0)


def test_a_token_put_aside_is_spent_when_the_other_limit_grants(world: World) -> None:
    tier = Limit("tier", 1_000)
    leases, both = worker(world, (tier, USER))
    world.ask(leases, leases.claim(LimitSet((tier,)), "alice", ""), 20)
    has = both.all[0].has
    assert world.ask(leases, both) == 1
    assert (both.all[0].has, both.all[0].aside) == (has - 1, 0)
    assert world.store.buckets["rate_limit:user:alice"].spent == 1


def test_whose_token_put_aside_expired_meanwhile_asks_once_more(world: World) -> None:
    tier = Limit("tier", 1_000)
    leases, both = worker(world, (tier, USER))
    world.ask(leases, leases.claim(LimitSet((tier,)), "alice", ""), 20)
    admitted: list[bool] = []
    leases.wait(both, admitted.append)
    flight = world.compose(leases)
    assert flight is not None
    answer = world.answer(flight)
    world.seconds = 3.0
    leases.apply(flight, answer, world.now(leases))
    both.all[0].roll(world.now(leases))
    assert (admitted, both.all[0].aside, both.all[0].has) == ([], 0, 0)
    for _ in range(3):
        world.call(leases)
        leases.sweep(world.now(leases))
    assert admitted == [True]
    assert world.store.buckets["rate_limit:user:alice"].spent == 1, "the first charge was given back"


def test_what_is_granted_to_who_was_decided_alone_is_given_back(world: World) -> None:
    leases, claim = worker(world, fleet=2)
    admitted: list[bool] = []
    for _ in range(3):
        leases.wait(claim, admitted.append)
    late = world.compose(leases)
    assert late is not None
    leases.leave(leases.shard, world.now(leases))
    leases.abandon(late, world.now(leases))
    assert admitted == [True] * 3
    leases.apply(late, world.answer(late), world.now(leases))
    leases.shard.arrive(world.now(leases))
    for _ in range(4):
        world.seconds += 0.1
        leases.sweep(world.now(leases))
        world.call(leases)
    assert world.store.buckets["rate_limit:user:alice"].spent == 3


def test_a_share_is_kept_of_what_was_put_aside_too(world: World) -> None:
    """A request that waits for another limit has no claim to a token that its worker may not spend alone."""
    tier = Limit("tier", 40)
    leases, both = worker(world, (tier, USER), fleet=20)
    world.ask(leases, leases.claim(LimitSet((tier,)), "alice", ""), 10)
    assert both.all[0].has > 2
    flights = []
    for _ in range(5):
        leases.wait(both, lambda admitted: None)
    flights = leases.compose(world.now(leases))
    assert both.all[0].aside == 5
    leases.leave(leases.shard, world.now(leases))
    assert (both.all[0].has, both.all[0].aside) == (0, 0), "ten in the window, of a share of two"
    leases.abandon(flights[0], world.now(leases))
    assert both.all[0].has == 0


def test_one_limit_does_not_stand_twice_in_a_set() -> None:
    with pytest.raises(ValueError, match="twice"):
        LimitSet((USER, USER))


def test_with_all_tokens_at_hand_two_limits_need_no_store(world: World) -> None:
    limits = (Limit("a", 1_000), Limit("b", 1_000))
    leases, claim = worker(world, limits)
    world.ask(leases, claim, 20)
    woken: list[bool] = []
    leases.wake = lambda shard: woken.append(True)
    for _ in range(20):
        assert claim.take(world.now(leases)) is Take.ADMITTED
    assert [lease.has for lease in claim.all] == [0, 0]
    assert len(woken) == 2
    assert claim.take(world.now(leases)) is Take.WANTING


# --- what goes wrong


def test_a_call_given_up_gets_another_seq_and_its_spends_are_told_again(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    world.ask(leases, claim, 20)
    for _ in range(5):
        claim.take(world.now(leases))
    lease = claim.all[0]
    leases.shard.due[lease] = None
    lost = world.compose(leases)
    assert lost is not None
    world.answer(lost)
    leases.fail(lost, world.now(leases))
    assert claim.take(world.now(leases)) is Take.ADMITTED
    leases.sweep(world.now(leases))
    flight = world.call(leases)
    assert flight is not None
    assert flight.call.messages[0].seq == lost.call.messages[0].seq + 1
    assert [
        (entry[0] - lost.call.messages[0].seq, entry[2]) for entry in flight.call.messages[0].journal
    ] == [
        (-1, 5),
        (0, 1),
    ]
    assert world.store.buckets["rate_limit:busy:alice"].spent == 26


def test_a_grant_that_was_lost_is_fetched_back(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    for _ in range(20):
        leases.wait(claim, lambda admitted: None)
    lost = world.compose(leases)
    assert lost is not None
    world.answer(lost)
    leases.shard.away = True
    leases.fail(lost, world.now(leases))
    leases.shard.away = False
    bucket = world.store.buckets["rate_limit:busy:alice"]
    assert bucket.reserved() == 20
    claim.all[0].counted = 0
    leases.sweep(world.now(leases))
    world.call(leases)
    assert bucket.reserved() == 0


def test_who_does_not_wait_any_more_costs_nothing(world: World) -> None:
    leases, claim = worker(world)
    leases.wait(claim, lambda admitted: pytest.fail("settled")).gone = True
    assert world.compose(leases) is None
    leases.wait(claim, lambda admitted: pytest.fail("settled")).gone = True
    leases.shard.away = True
    leases.abandon(leases.probe(1.0), 1.0)
    assert not leases.shard.waiting


def test_data_lost_leaves_the_key_to_this_worker_until_it_is_safe_again(world: World) -> None:
    leases, claim = worker(world, (Limit("user", 10, 60, "safe"),), fleet=2)
    world.ask(leases, claim, 2)
    world.store = Store()
    # Two of its share of five were admitted before the loss.
    assert world.ask(leases, claim, 9) == 3
    assert claim.take(world.now(leases)) is Take.DENIED
    assert leases.counters.degraded > 0
    leases.sweep(world.now(leases))
    world.call(leases)
    assert world.store.buckets["rate_limit:user:alice"].spent == 3
    held = claim.all[0].held_until - world.now(leases)
    assert held == pytest.approx(60 + 10 + 1)
    world.seconds += held + 0.1
    assert world.ask(leases, claim) == 1
    assert leases.counters.direct == 3


def test_a_store_rolled_back_takes_the_tokens_with_it(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    world.ask(leases, claim, 20)
    del world.store.buckets["rate_limit:busy:alice"]
    leases.shard.due[claim.all[0]] = None
    world.call(leases)
    assert (leases.counters.expired, leases.counters.granted) == (20, 40)
    assert claim.all[0].has == 20


# --- without the store


@pytest.mark.parametrize(
    "mode, fleet, admitted",
    [("strict", 1, 0), ("safe", 1, 7), ("safe", 4, 1), ("safe", 99, 0), ("safe", 0, 0), ("open", 9, 40)],
)
def test_away_each_limit_has_its_rule(world: World, mode: str, fleet: int, admitted: int) -> None:
    leases, claim = worker(world, (Limit("user", 10, 60, mode),), fleet=fleet)  # type: ignore[arg-type]
    before = 1 if fleet > 1 else 3
    assert world.ask(leases, claim, before) == before
    leases.shard.away = True
    assert world.ask(leases, claim, 40) == admitted
    assert leases.counters.degraded == 40
    wait = claim.retry_after(world.now(leases))
    assert wait == pytest.approx({"strict": 1.0, "safe": 1.0 if fleet == 0 else 60.5, "open": 0.0}[mode])
    assert claim.tightest(world.now(leases)).name == "user"


def test_in_safe_the_own_window_slides(world: World) -> None:
    leases, claim = worker(world, (Limit("user", 10, 60, "safe"),), fleet=2)
    leases.shard.away = True
    assert world.ask(leases, claim, 3) == 3
    world.seconds = 30.2
    assert world.ask(leases, claim, 9) == 2
    world.seconds = 60.6
    assert world.ask(leases, claim, 9) == 3
    leases.shard.away = False
    leases.sweep(world.now(leases))
    flight = world.call(leases)
    assert flight is not None
    # It never knew the store's time: all of it counts as spent now.
    assert [entry[1:] for entry in flight.call.messages[0].journal] == [(CURRENT_SLOT, 8, 0)]
    assert world.store.buckets["rate_limit:user:alice"].spent == 8


def test_tokens_at_hand_are_spent_also_while_away(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000, 60, "strict"),))
    world.ask(leases, claim, 20)
    leases.shard.away = True
    assert world.ask(leases, claim, 30) == 20
    assert claim.fields(world.now(leases)).split(b"\r\n")[1].startswith(b'RateLimit: "busy";r=0;')


def test_the_keys_of_an_outage_are_bounded_and_forgotten(world: World) -> None:
    limit = Limit("user", 10, 60, "safe")
    leases = Leases("me", fleet=1, most_claims=4)
    leases.shard.away = True
    limits = LimitSet((limit,))
    assert [world.ask(leases, leases.claim(limits, f"u{n}", "")) for n in range(6)] == [1, 1, 1, 1, 0, 0]
    world.seconds = 10.0
    leases.sweep(world.now(leases))
    assert len(leases.live) == 4
    world.seconds = 70.0
    leases.sweep(world.now(leases))
    assert not leases.live


def test_abandoned_requests_are_decided_alone_and_the_late_answer_is_used(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000, 60, "safe"),), fleet=100)
    settled: list[bool] = []
    for _ in range(20):
        leases.wait(claim, settled.append)
    flight = world.compose(leases)
    assert flight is not None
    leases.wait(claim, settled.append)
    leases.shard.away = True
    leases.abandon(flight, world.now(leases))
    assert (settled.count(True), settled.count(False)) == (10, 11)
    leases.shard.away = False
    leases.apply(flight, world.answer(flight), world.now(leases))
    assert len(settled) == 21
    assert claim.take(world.now(leases)) is Take.ADMITTED


# --- operators and tables


def test_a_reset_is_asked_for_again_at_once(world: World) -> None:
    leases, claim = worker(world)
    world.ask(leases, claim, 11)
    assert claim.take(world.now(leases)) is Take.DENIED
    world.store.buckets["rate_limit:user:alice"].reset()
    leases.reset("user", "nobody")
    assert claim.take(world.now(leases)) is Take.DENIED
    leases.reset("user", "alice")
    assert world.ask(leases, claim) == 1
    world.ask(leases, claim, 20)
    leases.forget_refusals()
    assert claim.take(world.now(leases)) is Take.WANTING


def busy(world: World, recalls: list[list[KeyLease]]) -> tuple[Leases, Claim, Leases, int]:
    """This worker, another one that holds tokens of a limit of ten, and what that one has admitted."""
    there, theirs = other(world)
    there.known = "e"
    here, ours = worker(world)
    here.recall = recalls.append
    admitted = world.ask(there, theirs, 5)
    assert theirs.all[0].has > 0
    return here, ours, there, admitted


def test_what_another_worker_holds_is_asked_for_before_anybody_is_refused(world: World) -> None:
    recalls: list[list[KeyLease]] = []
    here, claim, there, admitted = busy(world, recalls)
    told: list[bool] = []
    for _ in range(12):
        here.wait(claim, told.append)
    world.call(here)
    assert len(recalls) == 1
    assert (sum(told), len(told), admitted + len(told) < 10) == (len(told), len(told), True)
    # Until the others have had their time, newcomers wait with the rest, and nobody is refused from memory.
    assert claim.take(world.now(here)) is Take.WANTING
    here.wait(claim, told.append)
    assert world.call(here) is None
    here.recall_step(recalls[0])
    world.call(here)  # too early: the other one has not answered yet
    assert len(recalls) == 1
    there.give_back(recalls[0][0].key)
    world.call(there)
    here.recall_step(recalls[0])
    world.call(here)
    here.recall_step(recalls[0])
    world.call(here)
    assert admitted + sum(told) == 10
    assert len(told) == 13
    assert claim.take(world.now(here)) is Take.DENIED


def test_a_holder_that_does_not_answer_is_asked_once_and_then_the_caller_is_refused(world: World) -> None:
    recalls: list[list[KeyLease]] = []
    here, claim, _, _ = busy(world, recalls)
    told: list[bool] = []
    for _ in range(12):
        here.wait(claim, told.append)
    world.call(here)
    for _ in RECALL_STEPS_SECONDS:
        assert len(told) < 12
        here.recall_step(recalls[0])
        world.call(here)
    assert len(recalls) == 1
    assert len(told) == 12
    assert not told[-1]
    assert claim.take(world.now(here)) is Take.DENIED
    world.seconds += 0.6
    world.ask(here, claim)
    assert len(recalls) == 2


def test_a_recall_ends_with_the_store(world: World) -> None:
    recalls: list[list[KeyLease]] = []
    here, claim, _, _ = busy(world, recalls)
    told: list[bool] = []
    for _ in range(12):
        here.wait(claim, told.append)
    world.call(here)
    here.shard.away = True
    here.decide_waiting(world.now(here))
    assert len(told) == 12


def test_who_holds_nothing_gives_nothing_back(world: World) -> None:
    leases, claim = worker(world)
    world.ask(leases, claim)
    leases.give_back(claim.all[0].key)
    leases.give_back("rate_limit:user:nobody")
    assert world.call(leases) is None


def test_nobody_waits_for_others_where_another_limit_refuses_anyway(world: World) -> None:
    recalls: list[list[KeyLease]] = []
    tight = Limit("tight", 1, 60)
    there, theirs = other(world)
    there.known = "e"
    world.ask(there, theirs, 5)
    here, claim = worker(world, (USER, tight))
    here.recall = recalls.append
    assert world.ask(here, claim, 12) == 1
    assert not recalls


def test_claims_are_kept_by_what_their_limits_count_by(world: World) -> None:
    leases, _ = worker(world)
    by_user, by_address, by_both = LimitSet((USER,)), LimitSet((PUBLIC,)), LimitSet((PUBLIC, USER))
    assert leases.claim(by_user, "bob", "a") is leases.claim(by_user, "bob", "b")
    assert leases.claim(by_address, "bob", "a") is leases.claim(by_address, "eve", "a")
    assert leases.claim(by_both, "bob", "a") is not leases.claim(by_both, "bob", "b")
    # Equal limits in another table: another claim on the same lease.
    again = leases.claim(LimitSet((USER,)), "bob", "a")
    assert again is not leases.claim(by_user, "bob", "a")
    assert again.all[0] is leases.claim(by_user, "bob", "a").all[0]


def test_claims_are_bounded_and_the_used_ones_stay(world: World) -> None:
    leases = Leases("me", most_claims=8)
    limits = LimitSet((USER,))
    kept = leases.claim(limits, "kept", "")
    for number in range(50):
        leases.claim(limits, f"u{number}", "")
        assert leases.claim(limits, "kept", "") is kept
    assert len(leases._young) + len(leases._old) <= 8
    assert len(leases._by_key) <= 8


def test_seqs_never_come_again_when_a_key_was_forgotten(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),), most_claims=2)
    world.ask(leases, claim, 20)
    seq = world.store.buckets["rate_limit:busy:alice"].holders["me"].seq
    fresh = KeyLease(leases, claim.all[0].limit, "alice", claim.all[0].shape, leases.partition)
    assert fresh.message(world.now(leases), 0, 0, False).seq > seq


def test_a_new_size_under_an_old_name_takes_the_lease_over(world: World) -> None:
    leases, claim = worker(world, (Limit("busy", 1_000),))
    world.ask(leases, claim, 20)
    claim.take(world.now(leases))
    wider = leases.claim(LimitSet((Limit("busy", 2_000, 120),)), "alice", "")
    assert wider.all[0] is claim.all[0]
    assert wider.take(world.now(leases)) is Take.ADMITTED
    assert b'"busy";q=2000;w=120\r\n' in wider.fields(world.now(leases))
    leases.shard.due[wider.all[0]] = None
    assert world.call(leases) is not None
    bucket = world.store.buckets["rate_limit:busy:alice"]
    assert (bucket.slot_ms, bucket.spent) == (1_000, 22)


def test_a_journal_is_bounded_and_loses_nothing(world: World) -> None:
    leases, claim = worker(world, (Limit("user", 100_000, 60, "open"),))
    lease = claim.all[0]
    world.ask(leases, claim)
    leases.shard.away = True
    total = 0
    for number in range(700):
        world.seconds = 1.0 + number * 0.05
        world.ask(leases, claim)
        total += 1
        # As if a call was given up each time: the tag moves on.
        leases.seq += 1
        lease.sent = leases.seq
    assert len(lease.journal) <= 2 * lease.shape.slots
    assert sum(count for _, _, count, _ in lease.journal) == total


@pytest.mark.parametrize(
    "waiting, counted, elapsed, wanted, life_ms",
    [
        (1, 0, 100.0, 0, 10_000),  # one request is no rate
        (4, 0, 100.0, 16, 8_000),  # four at once: 2 a second, 16 tokens' time
        (1, 15, 4.0, 16, 4_000),
        (0, 100, 5.0, 40, 2_000),
        (0, 9, 12.0, 6, 10_000),  # the older half is forgotten
        (0, 900, 60.0, 0, 2_000),  # and all of it after a pause
    ],
)
def test_the_size_of_a_lease_follows_the_own_rate(
    world: World, waiting: int, counted: int, elapsed: float, wanted: int, life_ms: int
) -> None:
    _, claim = worker(world, (Limit("busy", 1_000),))
    lease = claim.all[0]
    lease.counted, lease.since = counted, 1_000.0 - elapsed
    assert lease.plan(1_000.0, waiting) == (wanted, life_ms)


def test_shapes_cover_the_window() -> None:
    for seconds in (1, 2, 7, 59, 60, 61, 3_600):
        shape = Shape.of(Limit("x", 1, seconds))
        assert shape.slots * shape.slot_ms >= seconds * 1_000
        assert 0 < shape.short_ms <= shape.long_ms <= max(seconds * 1_000 // 6, 10_000)
    assert Shape.of(USER) == Shape(120, 500, 2_000, 10_000)


# --- what the caller sees


def test_fields_of_one_limit(world: World) -> None:
    leases, claim = worker(world, (PUBLIC,))
    world.seconds = 0.3
    assert world.ask(leases, claim, 3) == 3
    world.seconds = 17.0
    assert claim.fields(world.now(leases)) == (
        b'RateLimit-Policy: "public";q=100;w=60\r\n'
        b'RateLimit: "public";r=97;t=44\r\n'
        b"X-RateLimit-Limit: 100\r\nX-RateLimit-Remaining: 97\r\nX-RateLimit-Reset: 44\r\n"
    )
    assert claim.standings(world.now(leases)) == (Standing(PUBLIC, 97, 44),)


def test_fields_list_all_limits_and_the_tightest(world: World) -> None:
    leases, claim = worker(world, (PUBLIC, USER))
    world.seconds = 0.3
    assert world.ask(leases, claim, 4) == 4
    fields = (
        b'RateLimit-Policy: "public";q=100;w=60, "user";q=10;w=60\r\n'
        b'RateLimit: "public";r=%d;t=61, "user";r=%d;t=61\r\n'
        b"X-RateLimit-Limit: 10\r\nX-RateLimit-Remaining: %d\r\nX-RateLimit-Reset: 61\r\n"
    )
    assert claim.fields(world.now(leases)) == fields % (96, 6, 6)
    assert world.ask(leases, claim) == 1
    assert claim.fields(world.now(leases)) == fields % (95, 5, 5)
    assert claim.tightest(world.now(leases)) is USER


def test_remaining_is_a_lower_bound_and_counts_what_is_at_hand(world: World) -> None:
    limit = Limit("busy", 100)
    leases, claim = worker(world, (limit,))
    world.ask(leases, claim, 20)
    lease = claim.all[0]
    assert lease.has == 20
    assert lease.remaining(world.now(leases)) == 80
    claim.take(world.now(leases))
    assert lease.remaining(world.now(leases)) == 79
    world.seconds = 3.0
    # The lease died: until the store is asked, only what was free is sure.
    assert lease.remaining(world.now(leases)) == 60


@pytest.mark.parametrize("limits", [1, 2])
def test_odd_names_are_quoted(world: World, limits: int) -> None:
    odd = Limit('a"b\\c%d', 5)
    _, claim = worker(world, (odd, USER)[:limits])
    assert claim.fields(1.0).startswith(b'RateLimit-Policy: "a\\"b\\\\c%d";q=5;w=60')
    assert b'RateLimit: "a\\"b\\\\c%d";r=0;t=61' in claim.fields(1.0)


def test_an_operators_call_names_the_worker(world: World) -> None:
    leases, _ = worker(world)
    one, two = (leases.call(leases.partition, [], []) for _ in range(2))
    assert (one.holder, one.known) == ("me", "e")
    assert one.fresh != two.fresh
    assert Op.LOOK not in {message.op for message in one.messages}


def test_settle_is_called_once(world: World) -> None:
    leases, claim = worker(world)
    settled: list[bool] = []
    callback: Callable[[bool], None] = settled.append
    leases.wait(claim, callback)
    world.call(leases)
    world.call(leases)
    assert settled == [True]
