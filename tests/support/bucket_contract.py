"""What the store's side must do, whoever does it: `bucket.Store`, or the script on a real server.

A driver has `call(keys, call, now_ms) -> Answer`. The window is 4 slots of 100 ms, so 5 slots are counted.
"""

from typing import Protocol

from lucid.core.rules.bucket import CURRENT_SLOT, Answer, Call, Entry, Group, KeyAnswer, Message, Op, Status

K = 4
SLOT_MS = 100
LONG_MS = 300
NOW = 1_700_000_000_000


class Driver(Protocol):
    def call(self, keys: list[str], call: Call, now_ms: int) -> Answer: ...


class Conversation:
    """Speaks to one driver; times are milliseconds since `NOW`."""

    def __init__(self, driver: Driver, key: str = "rate_limit:t:a", limit: int = 10) -> None:
        self.driver = driver
        self.key = key
        self.limit = limit
        self.calls = 0

    def send(
        self,
        at: int,
        messages: list[tuple[str, Message]],
        holder: str,
        groups: list[Group] | None = None,
        run: str = "r1",
        known: str = "",
    ) -> Answer:
        self.calls += 1
        call = Call(
            run=run,
            known=known,
            fresh=f"e{self.calls}",
            holder=holder,
            slots=K,
            messages=[m for _, m in messages],
            groups=groups or [],
        )
        return self.driver.call([k for k, _ in messages], call, NOW + at)

    def settle(
        self,
        at: int,
        holder: str,
        seq: int,
        *,
        keep: int = 0,
        want: int = 0,
        life: int = 200,
        oldest: int = 0,
        journal: list[Entry] | None = None,
        direct: int = 0,
        limit: int = 0,
        slot_ms: int = SLOT_MS,
        run: str = "r1",
        known: str = "",
    ) -> tuple[KeyAnswer, int]:
        message = Message(
            op=Op.SETTLE,
            limit=limit or self.limit,
            slot_ms=slot_ms,
            long_ms=LONG_MS,
            seq=seq,
            keep=keep,
            want=want,
            life_ms=life,
            short_ms=min(life, 100),
            oldest=oldest,
            journal=journal or [],
        )
        groups = [Group(direct, [0])] if direct else []
        answer = self.send(at, [(self.key, message)], holder, groups, run, known)
        return answer.keys[0], answer.direct[0] if direct else 0

    def plain(self, at: int, op: Op) -> KeyAnswer:
        message = Message(op=op, limit=self.limit, slot_ms=SLOT_MS, long_ms=LONG_MS)
        return self.send(at, [(self.key, message)], "operator").keys[0]

    def look(self, at: int) -> KeyAnswer:
        return self.plain(at, Op.LOOK)


def slot(at: int) -> int:
    return (NOW + at) // SLOT_MS


class BucketContract:
    """Inherit it and give a fixture `driver`."""

    def test_a_direct_grant_counts_until_a_window_after_the_end_of_its_slot(self, driver: Driver) -> None:
        talk = Conversation(driver)
        answer, direct = talk.settle(0, "a", 1, direct=7)
        assert (direct, answer.free, answer.spent, answer.free_ms) == (7, 3, 7, 500)
        assert talk.settle(499, "a", 2, direct=9)[1] == 3
        answer, direct = talk.settle(500, "a", 3, direct=9)
        assert (direct, answer.free) == (7, 0)

    def test_a_refusal_says_when_quota_frees(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(30, "a", 1, direct=4)
        talk.settle(210, "a", 2, direct=6)
        answer, direct = talk.settle(250, "b", 1, direct=1)
        assert (direct, answer.free, answer.free_ms, answer.elsewhere) == (0, 0, 250, 0)
        assert talk.settle(499, "b", 2, direct=1)[1] == 0
        assert talk.settle(500, "b", 3, direct=1)[1] == 1

    def test_a_lease_takes_at_most_half_of_what_is_free_or_an_even_share(self, driver: Driver) -> None:
        talk = Conversation(driver, limit=100)
        assert talk.settle(0, "a", 1, want=80)[0].granted == 50
        assert talk.settle(0, "b", 1, want=80)[0].granted == 25
        answer, _ = talk.settle(0, "c", 1, want=80)
        assert (answer.granted, answer.free, answer.elsewhere, answer.holders) == (8, 17, 75, 3)
        assert answer.life_ms == 200
        assert talk.settle(0, "d", 1, want=3)[0].life_ms == 100  # less than a quarter is free: a short life
        assert talk.settle(0, "a", 2, keep=50, want=51)[0].granted == 1

    def test_an_expired_lease_is_spent_in_the_slot_of_its_expiry(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=250)
        assert talk.look(249).elsewhere == 5
        looked = talk.settle(250, "b", 1)[0]
        assert (looked.spent, looked.elsewhere, looked.free) == (5, 0, 5)
        assert talk.settle(699, "b", 2)[0].spent == 5
        assert talk.settle(700, "b", 3)[0].spent == 0

    def test_conversion_belongs_to_the_expiry_also_when_nobody_came_for_long(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=250)
        assert talk.settle(690, "b", 1)[0].spent == 5
        assert talk.settle(700, "b", 2)[0].spent == 0

    def test_a_report_moves_spends_from_the_reservation_to_their_slots(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=250)
        journal = [(1, slot(10), 2, 1), (1, slot(120), 1, 1)]
        answer, _ = talk.settle(150, "a", 2, keep=2, oldest=1, journal=journal)
        assert (answer.status, answer.spent, answer.free) == (Status.DONE, 3, 5)
        assert talk.settle(160, "a", 3, keep=0, oldest=2)[0].free == 7
        assert talk.look(500).spent == 1
        assert talk.look(600).spent == 0

    def test_a_lower_seq_is_nothing_and_an_equal_one_the_same_grant_again(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 5, want=4, life=200)
        journal = [(0, slot(0), 3, 1)]
        old, direct = talk.settle(10, "a", 4, want=4, journal=journal, direct=1)
        assert (old.status, old.granted, old.life_ms, old.spent, direct) == (Status.STALE, 0, 0, 0, 0)
        again, direct = talk.settle(50, "a", 5, want=4, journal=journal, direct=1)
        assert (again.status, again.granted, again.life_ms, again.spent) == (Status.STALE, 4, 150, 0)
        assert direct == 0
        # The double prolonged nothing.
        assert talk.settle(200, "b", 1)[0].spent == 4

    def test_only_entries_that_the_store_has_not_seen_are_applied(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5)
        talk.settle(10, "a", 2, keep=3, oldest=1, journal=[(1, slot(0), 2, 1)])
        # The answer to 2 was lost: 3 brings its entries again, and a new one.
        journal = [(1, slot(0), 2, 1), (2, slot(0), 1, 1)]
        answer, _ = talk.settle(20, "a", 3, keep=2, oldest=1, journal=journal)
        assert (answer.spent, answer.free) == (3, 5)

    def test_a_settle_after_conversion_gives_the_rest_back_once(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=150)
        assert talk.settle(200, "b", 1)[0].spent == 5
        answer, _ = talk.settle(210, "a", 2, oldest=1, journal=[(1, slot(100), 2, 1)])
        assert (answer.status, answer.spent, answer.free) == (Status.DONE, 2, 8)
        assert talk.settle(220, "a", 3, oldest=1, journal=[(1, slot(100), 2, 1)])[0].spent == 2

    def test_what_was_kept_over_a_conversion_is_not_the_workers_any_more(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=150)
        answer, _ = talk.settle(160, "a", 2, keep=3, oldest=1, journal=[(1, slot(100), 1, 1)])
        assert (answer.status, answer.spent, answer.free) == (Status.DROPPED, 4, 6)

    def test_a_converted_lease_that_left_the_ring_gives_nothing_back(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=150)
        talk.settle(590, "b", 1, direct=5)
        answer, _ = talk.settle(600, "a", 2, oldest=1)
        assert answer.spent == 5

    def test_a_record_below_the_oldest_tag_is_charged_in_full(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 3, want=5)
        answer, _ = talk.settle(10, "a", 9, keep=2, oldest=7, journal=[(7, slot(0), 1, 1)])
        assert (answer.status, answer.spent, answer.free) == (Status.DROPPED, 6, 4)

    def test_what_a_worker_keeps_without_a_record_is_dropped_and_its_spends_count(
        self, driver: Driver
    ) -> None:
        talk = Conversation(driver)
        answer, _ = talk.settle(0, "a", 9, keep=4, want=4, oldest=7, journal=[(7, slot(0), 2, 1)])
        assert (answer.status, answer.spent, answer.granted, answer.free) == (Status.DROPPED, 2, 4, 4)

    def test_a_spend_is_charged_at_most_to_the_current_slot_and_never_to_one_that_left(
        self, driver: Driver
    ) -> None:
        talk = Conversation(driver)
        journal = [(0, CURRENT_SLOT, 2, 0), (0, slot(-500), 3, 0), (0, slot(-400), 1, 0)]
        answer, _ = talk.settle(0, "a", 1, journal=journal)
        assert (answer.spent, answer.free_ms) == (3, 100)
        assert talk.look(100).spent == 2
        assert talk.look(500).spent == 0

    def test_a_clock_that_steps_back_stands_still(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(400, "a", 1, want=5, life=100)
        answer, _ = talk.settle(0, "b", 1, direct=1)
        assert answer.now_ms == NOW + 400
        assert talk.settle(450, "b", 2)[0].elsewhere == 5
        assert talk.settle(899, "b", 3)[0].spent == 6
        assert talk.settle(900, "b", 4)[0].spent == 5

    def test_a_reset_clears_the_ring_and_keeps_live_reservations(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=4, life=300)
        talk.settle(0, "b", 1, want=2, life=100)
        talk.settle(120, "c", 1, direct=2)
        answer = talk.plain(150, Op.RESET)
        assert (answer.spent, answer.elsewhere, answer.free) == (0, 4, 6)
        # b's lease was converted before: nothing of it comes back out of an empty ring.
        assert talk.settle(160, "b", 2, oldest=1)[0].free == 6
        assert talk.settle(300, "c", 2)[0].spent == 4

    def test_a_group_is_charged_to_all_its_limits_or_to_none(self, driver: Driver) -> None:
        talk = Conversation(driver)

        def message(limit: int, seq: int) -> Message:
            return Message(op=Op.SETTLE, limit=limit, slot_ms=SLOT_MS, long_ms=LONG_MS, seq=seq, life_ms=100)

        both = [("rate_limit:t:a", message(5, 1)), ("rate_limit:u:a", message(3, 2))]
        answer = talk.send(0, both, "a", [Group(2, [0, 1]), Group(4, [0, 1]), Group(9, [0])])
        assert answer.direct == [2, 1, 2]
        assert [key.spent for key in answer.keys] == [5, 3]
        both = [("rate_limit:t:a", message(5, 3)), ("rate_limit:u:a", message(3, 4))]
        answer = talk.send(500, both, "a", [Group(3, [1]), Group(1, [0, 1])])
        assert answer.direct == [3, 0]
        assert [key.spent for key in answer.keys] == [0, 3]

    def test_another_run_of_the_server_holds_everything_back(self, driver: Driver) -> None:
        talk = Conversation(driver)
        first, _ = talk.settle(0, "a", 1, want=4, life=300)
        assert (first.held_ms, first.granted) == (0, 4)
        answer, direct = talk.settle(100, "a", 2, keep=4, want=5, direct=1, run="r2", oldest=1)
        hold = (K + 2) * SLOT_MS + LONG_MS
        assert (answer.held_ms, answer.granted, direct, answer.free) == (hold, 0, 0, 0)
        assert talk.settle(100 + hold - 1, "b", 1, direct=1, run="r2")[1] == 0
        assert talk.settle(100 + hold, "b", 2, direct=1, run="r2")[1] == 1

    def test_a_marker_gone_is_a_loss_only_to_who_knew_one(self, driver: Driver) -> None:
        talk = Conversation(driver)
        assert talk.settle(0, "a", 1, direct=1)[1] == 1
        # "e1" was planted by the first call; somebody comes who knew an older one.
        assert talk.settle(1, "b", 1, known="e1", direct=1)[1] == 1
        answer, direct = talk.settle(2, "b", 2, known="e0", direct=1)
        assert (direct, answer.held_ms > 0) == (0, True)
        # The loss is dated by who noticed first; later ones do not prolong it.
        assert talk.settle(102, "c", 1, known="e0", direct=1)[0].held_ms == answer.held_ms - 100

    def test_a_store_that_lost_everything_holds_back(self, driver: Driver) -> None:
        talk = Conversation(driver)
        answer, direct = talk.settle(0, "a", 7, known="e9", direct=1, journal=[(6, slot(0), 2, 1)])
        assert (direct, answer.spent, answer.held_ms) == (0, 2, (K + 2) * SLOT_MS + LONG_MS)

    def test_another_window_under_the_same_name_counts_all_as_spent_now(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, direct=2)
        talk.settle(300, "a", 2, direct=2)
        assert talk.settle(350, "a", 3, slot_ms=70)[0].spent == 4
        left = ((NOW + 350) // 70 + K + 1) * 70 - NOW
        assert talk.settle(left - 1, "a", 4, slot_ms=70)[0].spent == 4
        assert talk.settle(left, "a", 5, slot_ms=70)[0].spent == 0

    def test_when_all_is_held_the_first_expiry_says_when_quota_frees(self, driver: Driver) -> None:
        talk = Conversation(driver, limit=4)
        talk.settle(0, "a", 1, want=2, life=250)
        talk.settle(0, "b", 1, want=1, life=100)
        answer, _ = talk.settle(10, "c", 1)
        assert (answer.free, answer.elsewhere, answer.free_ms) == (1, 3, (1 + K + 1) * 100 - 10)
        assert talk.look(10_000).free_ms == 0
