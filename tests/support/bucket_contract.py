"""What the store's side must do, whoever does it: `bucket.Store`, or the script on a real server.

A driver has `call(keys, call, now_ms) -> Answer`. The window is 4 slots of 100 ms, so 5 slots are counted.
"""

from typing import Any, Protocol

from lucid.core.rules.bucket import CURRENT_SLOT, Answer, Call, Entry, Group, KeyAnswer, Message, Op, Status

K = 4
SLOT_MS = 100
LONG_MS = 300
NOW = 1_700_000_000_000


class Driver(Protocol):
    def call(self, keys: list[str], call: Call, now_ms: int) -> Answer: ...


class Conversation:
    """Speaks to one driver; times are milliseconds since `NOW`."""

    def __init__(self, driver: Driver, key: str = "rate_limit:t:a", limit: int = 10, slots: int = K) -> None:
        self.driver = driver
        self.key = key
        self.limit = limit
        self.slots = slots
        self.calls = 0
        self.roll = ""
        """The roll call that the last answer named."""
        self.epoch = ""

    def send(
        self,
        at: int,
        messages: list[tuple[str, Message]],
        holder: str,
        groups: list[Group] | None = None,
        run: str = "r1",
        known: str = "",
        **roll_call: Any,
    ) -> Answer:
        """`roll_call`: fleet, back, reported, roll, roll_ms. The call plants `e{its number}` where one is due."""
        self.calls += 1
        call = Call(
            run=run,
            known=known,
            fresh=f"e{self.calls}",
            holder=holder,
            slots=self.slots,
            messages=[m for _, m in messages],
            groups=groups or [],
            **roll_call,
        )
        answer = self.driver.call([k for k, _ in messages], call, NOW + at)
        self.roll, self.epoch = answer.roll, answer.epoch
        return answer

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
        need: int = 0,
        share: int = 0,
        young: int = 0,
        direct: int = 0,
        limit: int = 0,
        slot_ms: int = SLOT_MS,
        run: str = "r1",
        known: str = "",
        **roll_call: Any,
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
            need=need,
            share=share,
            young_ms=young,
        )
        groups = [Group(direct, [0])] if direct else []
        answer = self.send(at, [(self.key, message)], holder, groups, run, known, **roll_call)
        return answer.keys[0], answer.direct[0] if direct else 0

    def plain(self, at: int, op: Op, holder: str = "operator") -> KeyAnswer:
        message = Message(op=op, limit=self.limit, slot_ms=SLOT_MS, long_ms=LONG_MS)
        return self.send(at, [(self.key, message)], holder).keys[0]

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

    def test_over_its_limit_more_than_one_slot_must_leave(self, driver: Driver) -> None:
        """The limit was lowered, or more was admitted while the store was away."""
        talk = Conversation(driver)
        for number in range(5):
            talk.settle(100 * number, "a", number + 1, direct=2)
        assert talk.settle(450, "b", 1, limit=10)[0].free_ms == 50
        assert talk.settle(450, "b", 2, limit=7)[0].free_ms == 150
        assert talk.settle(450, "b", 3, limit=2)[0].free_ms == 450
        assert talk.settle(450, "b", 4, limit=1)[0].free_ms == 450
        assert talk.settle(900, "b", 5, direct=1, limit=1)[1] == 1

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
        first = f"e1@{NOW}"
        assert talk.settle(0, "a", 1, direct=1)[1] == 1
        assert talk.epoch == first
        # That was planted by the first call; somebody comes who knew an older one.
        assert talk.settle(1, "b", 1, known=first, direct=1)[1] == 1
        answer, direct = talk.settle(2, "b", 2, known="e0", direct=1)
        assert (direct, answer.held_ms > 0) == (0, True)
        # The loss is dated by who noticed first; later ones do not prolong it.
        assert talk.settle(102, "c", 1, known="e0", direct=1)[0].held_ms == answer.held_ms - 100

    def test_what_may_be_a_first_start_is_held_for_who_may_know_better(self, driver: Driver) -> None:
        talk = Conversation(driver)
        answer, direct = talk.settle(0, "a", 1, want=4, direct=1, young=50)
        assert (direct, answer.granted, answer.free, answer.held_ms) == (0, 0, 0, 50)
        assert talk.settle(1, "a", 2, direct=1)[1] == 1, "another key's limit asks for less"
        assert talk.settle(49, "b", 1, direct=1, young=50)[1] == 0
        assert talk.settle(50, "b", 2, direct=1, young=50, known=talk.epoch)[1] == 1
        # A loss that was told of is none.
        answer, _ = talk.settle(60, "b", 3, direct=1, young=50, run="r2")
        assert answer.held_ms == (K + 2) * SLOT_MS + LONG_MS

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

    # --- need

    def test_what_requests_wait_for_is_granted_before_the_even_share(self, driver: Driver) -> None:
        talk = Conversation(driver)
        assert talk.settle(0, "a", 1, want=9, need=7)[0].granted == 7
        assert talk.settle(0, "b", 1, want=9, need=1)[0].granted == 1
        assert talk.settle(0, "c", 1, want=9, need=5)[0].granted == 2  # all that is free
        assert talk.settle(0, "d", 1, want=9, need=5)[0].granted == 0

    def test_a_need_is_granted_besides_what_is_kept_and_never_beyond_what_is_wanted(
        self, driver: Driver
    ) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=2)
        answer, _ = talk.settle(0, "a", 2, keep=2, want=7, need=5, oldest=1)
        assert (answer.granted, answer.free) == (5, 3)
        assert talk.settle(0, "a", 3, keep=7, want=8, need=3, oldest=2)[0].granted == 1

    def test_a_need_less_than_the_even_share_changes_nothing(self, driver: Driver) -> None:
        talk = Conversation(driver, limit=100)
        assert talk.settle(0, "a", 1, want=80, need=3)[0].granted == 50

    def test_a_need_is_not_granted_while_held_back_nor_twice(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=3, need=3)
        assert talk.settle(1, "a", 1, want=9, need=9)[0].granted == 3
        assert talk.settle(2, "a", 2, want=9, need=9, run="r2")[0].granted == 0

    # --- refunds

    def test_a_refund_comes_out_of_the_first_charged_slot_from_the_one_that_it_names(
        self, driver: Driver
    ) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=1, direct=3)
        talk.settle(210, "b", 1, direct=2)
        answer, _ = talk.settle(220, "a", 2, keep=1, oldest=1, journal=[(1, slot(0), -2, 0)])
        assert (answer.status, answer.spent, answer.free) == (Status.DROPPED, 4, 6)  # a's lease expired
        # From slot 100 on there is one of b's two in slot 200, after the one of a's lease.
        answer, _ = talk.settle(230, "a", 3, oldest=2, journal=[(2, slot(100), -2, 0)])
        assert (answer.spent, answer.free) == (2, 8)
        assert talk.look(499).spent == 2
        assert talk.look(500).spent == 1
        assert talk.look(700).spent == 0

    def test_a_refund_takes_no_more_than_there_is(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=1, life=300, direct=1)
        talk.settle(100, "b", 1, direct=4)
        answer, _ = talk.settle(150, "a", 2, oldest=1, journal=[(1, slot(100), -9, 0)])
        assert (answer.spent, answer.free_ms) == (1, 350)

    def test_a_refund_that_names_no_counted_slot_is_nothing(self, driver: Driver) -> None:
        """What was charged before the window may have left it."""
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=1, direct=2)
        journal: list[Entry] = [(1, slot(100), -1, 0), (1, CURRENT_SLOT, -1, 0), (1, slot(-500), -1, 0)]
        assert talk.settle(50, "a", 2, keep=1, oldest=1, journal=journal)[0].spent == 2
        journal = [(2, slot(0), -1, 0)]
        assert talk.settle(500, "b", 1, direct=3)[0].spent == 3 + 1  # a's lease expired
        assert talk.settle(510, "a", 3, oldest=2, journal=journal)[0].spent == 3

    def test_an_entry_of_nothing_has_the_store_record_its_worker(self, driver: Driver) -> None:
        """So that a refund for a key on which nothing is held has a record to be told to."""
        talk = Conversation(driver)
        talk.settle(0, "a", 1, direct=3)
        talk.settle(10, "a", 2, oldest=1, journal=[(1, slot(0), 0, 0)])
        refund: list[Entry] = [(2, slot(0), -1, 0)]
        assert talk.settle(20, "a", 3, oldest=2, journal=refund)[0].spent == 2
        assert talk.settle(30, "a", 3, oldest=2, journal=refund)[0].spent == 2

    def test_what_a_reset_cleared_is_not_refunded(self, driver: Driver) -> None:
        """Nor what was charged in its slot: nobody can tell which of the two it was."""
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=1, life=450, direct=3)
        talk.plain(110, Op.RESET)
        talk.settle(120, "b", 1, direct=2)
        talk.settle(230, "b", 2, direct=2)
        journal: list[Entry] = [(1, slot(0), -1, 0), (1, slot(100), -1, 0), (1, slot(200), -1, 0)]
        answer, _ = talk.settle(310, "a", 2, keep=1, oldest=1, journal=journal)
        assert (answer.spent, answer.free) == (3, 6)
        # Where the window is configured anew, slots are numbered anew.
        answer, _ = talk.settle(340, "a", 3, oldest=2, slot_ms=70, journal=[(2, slot(0), -1, 0)])
        assert answer.spent == 3

    def test_a_refund_is_applied_once(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=1, direct=5)
        journal: list[Entry] = [(1, slot(0), -1, 0)]
        assert talk.settle(10, "a", 2, keep=1, oldest=1, journal=journal)[0].spent == 4
        assert talk.settle(10, "a", 2, keep=1, oldest=1, journal=journal)[0].spent == 4
        # The answer to 2 was lost: 3 brings the entry again.
        assert talk.settle(20, "a", 3, keep=1, oldest=1, journal=journal)[0].spent == 4

    def test_a_refund_after_a_conversion_counts_beside_what_is_given_back(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=4, life=150, direct=2)
        journal: list[Entry] = [(1, slot(100), 1, 1), (1, slot(0), -1, 0)]
        answer, _ = talk.settle(210, "a", 2, oldest=1, journal=journal)
        assert (answer.spent, answer.free) == (2, 8)
        assert talk.look(500).spent == 1

    def test_a_refund_without_a_record_is_left_out(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "b", 1, direct=3)
        journal: list[Entry] = [(6, slot(0), -2, 0), (6, slot(0), 1, 0)]
        assert talk.settle(10, "a", 7, oldest=6, journal=journal)[0].spent == 4

    def test_a_refund_to_a_store_that_was_rolled_back_is_left_out(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 3, want=2, direct=3)
        answer, _ = talk.settle(10, "a", 9, oldest=7, journal=[(7, slot(0), -2, 0)])
        assert (answer.status, answer.spent, answer.free) == (Status.DONE, 5, 5)

    # --- roll call

    def test_after_an_outage_the_shares_of_who_has_not_told_are_reserved(self, driver: Driver) -> None:
        talk = Conversation(driver, limit=12)
        answer, direct = talk.settle(0, "a", 1, share=3, direct=12, fleet=4, back=True)
        assert (direct, answer.free, answer.elsewhere, answer.holders) == (3, 0, 9, 0)
        assert talk.roll == "e1"
        # a has told all: it is here, and so is b, who asks; c and d are missing.
        answer, direct = talk.settle(1, "a", 2, share=3, fleet=4, reported=True, roll="e1")
        assert (answer.elsewhere, talk.roll) == (9, "")
        answer, direct = talk.settle(2, "b", 1, share=3, direct=9, fleet=4, back=True)
        assert (direct, answer.elsewhere, talk.roll) == (3, 6, "e1")

    def test_when_all_are_here_the_roll_call_ends(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, share=5, fleet=2, back=True)
        talk.settle(1, "a", 2, share=5, fleet=2, reported=True, roll="e1")
        assert talk.settle(2, "c", 1, share=5, fleet=2)[0].elsewhere == 0
        answer, direct = talk.settle(3, "b", 1, share=5, direct=10, fleet=2, reported=True, roll="e1")
        assert (direct, answer.elsewhere, talk.roll) == (10, 0, "")
        # It is over: who still knew it is not asked, who was away begins another.
        talk.settle(4, "c", 2, share=5, fleet=2, roll="e1")
        assert talk.roll == ""
        assert talk.settle(5, "c", 3, share=5, fleet=2, back=True, roll="e1")[0].elsewhere == 5
        assert talk.roll == "e6"

    def test_a_roll_call_ends_by_itself(self, driver: Driver) -> None:
        talk = Conversation(driver)
        answer, _ = talk.settle(0, "a", 1, share=5, fleet=9, back=True, roll_ms=300)
        assert (answer.free, answer.elsewhere, answer.free_ms, talk.roll) == (0, 40, 300, "e1")
        answer, direct = talk.settle(299, "a", 2, share=5, direct=1, fleet=9, roll="e1", roll_ms=300)
        assert (direct, answer.free_ms, talk.roll) == (0, 1, "e1")
        answer, direct = talk.settle(300, "a", 3, share=5, direct=1, fleet=9, roll="e1", roll_ms=300)
        assert (direct, answer.elsewhere, talk.roll) == (1, 0, "")
        # Whoever comes back after that begins another.
        talk.settle(301, "b", 1, share=5, fleet=9, back=True, roll_ms=300)
        assert talk.roll == "e4"

    def test_who_was_away_does_not_begin_again_what_others_began(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, share=2, fleet=3, back=True)
        talk.settle(1, "a", 2, share=2, fleet=3, reported=True, roll="e1")
        talk.settle(2, "b", 1, share=2, fleet=3, back=True)
        assert talk.roll == "e1"
        answer, _ = talk.settle(3, "b", 2, share=2, fleet=3, reported=True, roll="e1")
        assert (answer.elsewhere, talk.roll) == (2, "")

    def test_who_knew_the_roll_call_and_was_away_since_begins_another(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, share=2, fleet=3, back=True)
        talk.settle(1, "a", 2, share=2, fleet=3, reported=True, roll="e1")
        talk.settle(2, "b", 1, share=2, fleet=3, reported=True, roll="e1")
        answer, _ = talk.settle(3, "b", 2, share=2, fleet=3, reported=True, back=True, roll="e1")
        # What was said of the former proves nothing for the new one: nobody is here.
        assert (answer.elsewhere, talk.roll) == (4, "e4")
        talk.settle(4, "a", 3, share=2, fleet=3, reported=True, roll="e1")
        assert talk.roll == "e4"

    def test_a_call_from_before_the_outage_proves_nothing(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, share=5, fleet=2, back=True)
        talk.settle(1, "b", 1, share=5, fleet=2, reported=True)
        assert talk.roll == "e1"
        assert talk.settle(2, "c", 1, share=5, fleet=2, reported=True, roll="e0")[0].elsewhere == 5
        assert talk.roll == "e1"
        answer, direct = talk.settle(3, "a", 2, share=5, direct=9, fleet=2, reported=True, roll="e1")
        assert (direct, answer.elsewhere) == (5, 5)
        # To be told of the roll call is not to have reported.
        talk.settle(4, "b", 2, share=5, fleet=2, roll="e1")
        assert talk.roll == "e1"

    def test_the_largest_fleet_that_anyone_named_counts(self, driver: Driver) -> None:
        talk = Conversation(driver)
        assert talk.settle(0, "a", 1, share=1, fleet=4, back=True)[0].elsewhere == 3
        # A newcomer who was told of no fleet neither ends the roll call nor takes what is reserved.
        answer, direct = talk.settle(1, "b", 1, share=1, direct=9, reported=True, roll="e1")
        assert (direct, answer.elsewhere) == (7, 3)
        answer, _ = talk.settle(2, "c", 1, share=1, fleet=6, reported=True, roll="e1")
        assert answer.elsewhere == 4

    def test_of_a_fleet_that_nobody_named_somebody_is_missing(self, driver: Driver) -> None:
        talk = Conversation(driver)
        assert talk.settle(0, "a", 1, share=10, direct=10, back=True)[1] == 0
        assert talk.roll == "e1"
        talk.settle(1, "a", 2, share=5, reported=True, roll="e1")
        assert talk.settle(2, "b", 1, share=5, fleet=2)[0].elsewhere == 0
        assert talk.roll == "e1"

    def test_a_limit_that_nobody_kept_alone_reserves_nothing(self, driver: Driver) -> None:
        talk = Conversation(driver)
        answer, direct = talk.settle(0, "a", 1, direct=10, fleet=9, back=True)
        assert (direct, answer.elsewhere) == (10, 0)

    def test_a_share_is_reserved_besides_what_others_hold(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=3, life=300)
        answer, _ = talk.settle(10, "b", 1, want=9, share=2, fleet=3, back=True)
        assert (answer.granted, answer.elsewhere, answer.free) == (1, 7, 2)
        assert talk.look(20).elsewhere == 4

    def test_a_call_without_keys_can_begin_a_roll_call_and_be_here(self, driver: Driver) -> None:
        talk = Conversation(driver)
        assert talk.send(0, [], "a", fleet=2, back=True).roll == "e1"
        assert talk.send(1, [], "a", fleet=2, reported=True, roll="e1").roll == ""
        assert talk.send(2, [], "b", fleet=2).roll == "e1"

    # --- sizes

    def test_a_limit_of_a_thousand_million_is_counted_to_the_last(self, driver: Driver) -> None:
        talk = Conversation(driver, limit=10**9)
        assert talk.settle(0, "a", 1, want=10**9, need=10**9)[0].granted == 10**9
        journal: list[Entry] = [(1, slot(0), 10**9 - 7, 1)]
        answer, direct = talk.settle(10, "a", 2, oldest=1, journal=journal, direct=10)
        assert (answer.spent, direct, answer.free) == (10**9, 7, 0)
        assert talk.settle(500, "b", 1, direct=10**9)[1] == 10**9

    def test_a_call_of_128_keys_judges_each(self, driver: Driver) -> None:
        talk = Conversation(driver)
        for round_, at in enumerate((0, 120, 240, 480, 600)):
            messages = [
                (
                    f"rate_limit:t:{number}",
                    Message(
                        op=Op.SETTLE,
                        limit=50 + number,
                        slot_ms=SLOT_MS,
                        long_ms=LONG_MS,
                        seq=1 + 128 * round_ + number,
                        want=number % 7,
                        life_ms=200,
                        short_ms=100,
                    ),
                )
                for number in range(128)
            ]
            groups = [Group(1, [number]) for number in range(128)]
            answer = talk.send(at, messages, "a", groups)
            assert answer.direct == [1] * 128
            assert [key.granted for key in answer.keys] == [number % 7 for number in range(128)]

    def test_many_holders_are_each_their_own(self, driver: Driver) -> None:
        talk = Conversation(driver, limit=10_000)
        names = [f"{number:016x}" for number in range(40)]
        for number, name in enumerate(names):
            assert talk.settle(number, name, 1, want=number + 1, life=300)[0].granted == number + 1
        looked = talk.look(40)
        assert (looked.holders, looked.elsewhere) == (40, 820)
        for number, name in enumerate(names[:20]):
            talk.settle(50, name, 2, keep=1, oldest=1, journal=[(1, slot(40), number, 1)], life=300)
        looked = talk.look(60)
        assert (looked.holders, looked.elsewhere, looked.spent) == (40, 630, 190)
        # Those of the second twenty expire one by one.
        assert [talk.look(at).elsewhere for at in (319, 320, 321)] == [630, 609, 587]
        assert talk.look(350).holders == 0
        assert talk.look(350).spent == 820

    def test_when_the_first_to_expire_renews_the_next_says_when_quota_frees(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=3, life=100)
        talk.settle(0, "b", 1, want=2, life=200)
        talk.settle(10, "a", 2, keep=3, oldest=1, life=300)
        assert talk.look(20).free_ms == (2 + K + 1) * 100 - 20
        talk.settle(30, "b", 2, keep=2, oldest=1, life=290)
        assert talk.look(40).free_ms == (3 + K + 1) * 100 - 40
        talk.settle(50, "a", 3, oldest=2)
        assert (talk.look(60).holders, talk.look(60).free_ms) == (1, (3 + K + 1) * 100 - 60)

    def test_another_window_gives_nothing_back_of_what_was_converted_before(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=150)
        assert talk.settle(200, "b", 1)[0].spent == 5
        assert talk.settle(210, "c", 1, slot_ms=70)[0].spent == 5
        answer, _ = talk.settle(220, "a", 2, oldest=1, journal=[(1, CURRENT_SLOT, 2, 1)], slot_ms=70)
        # Its record means nothing any more: what it reports is charged once more.
        assert (answer.status, answer.spent) == (Status.DONE, 7)

    def test_a_lease_outlives_another_window(self, driver: Driver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=5, life=300)
        assert talk.settle(10, "b", 1, slot_ms=70)[0].elsewhere == 5
        assert talk.settle(300, "b", 2, slot_ms=70)[0].spent == 5
        assert talk.settle(310, "a", 2, oldest=1, slot_ms=70)[0].spent == 0

    def test_a_holder_that_resets_gets_nothing_back_of_what_was_converted(self, driver: Driver) -> None:
        for looked in (True, False):  # converted before the reset, or by it
            talk = Conversation(driver, key=f"rate_limit:t:{looked}")
            talk.settle(0, "a", 1, want=5, life=120)
            if looked:
                talk.look(130)
            talk.plain(150, Op.RESET, "a")
            answer, _ = talk.settle(160, "a", 2, oldest=1, journal=[(1, slot(100), 2, 1)])
            assert (answer.status, answer.spent) == (Status.DONE, 2)
