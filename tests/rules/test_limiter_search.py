"""Never over: all that may happen in a small world of real workers and a real store, on a network of any temper.

That the search would find a fault is proven by leaving out each rule (`limiter_faults`). The larger worlds and the
deeper faults are `make soak`'s, which prints what it searched.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from lucid.core.rules.bucket import Bucket
from tests.support.limiter_faults import ABSENCES, ABSENT_FAULTS, FAULTS, REFUNDED_RESET, WORLDS, Fault
from tests.support.limiter_states import key, replay, restore, search, snapshot, unnamed, walks
from tests.support.limiter_world import EPOCH_MS, SLOT_MS, OverError, Size, World

QUICK_STATES = 1_000
QUICK = [fault for fault in FAULTS if fault.quick]


@pytest.mark.parametrize("name", WORLDS)
def test_the_first_steps_of_all_paths_are_never_over(name: str) -> None:
    found = search(WORLDS[name], most_states=QUICK_STATES)
    assert found.path is None, found


def test_no_path_of_one_worker_is_over() -> None:
    found = search(Size(letters="rcpdag", air=1))
    assert found.path is None and found.exhaustive, found


@pytest.mark.parametrize("fault", QUICK, ids=[fault.name for fault in QUICK])
def test_a_rule_left_out_is_found(fault: Fault) -> None:
    found = search(fault.size, fault.rules)
    assert found.path is not None, found
    # What was found is true without snapshots too, and not so with the rule.
    with pytest.raises(OverError):
        replay(fault.size, found.path, fault.rules)
    replay(fault.size, found.path)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_rule_left_out_is_over_on_its_shortest_path(fault: Fault) -> None:
    with pytest.raises(OverError):
        replay(fault.size, fault.path.split(), fault.rules)
    replay(fault.size, fault.path.split())


@pytest.mark.parametrize("workers, limit, slots", [(2, 2, 1), (2, 4, 1), (3, 3, 1), (2, 2, 2)])
def test_the_first_steps_around_an_absence_are_within_its_bounds(
    workers: int, limit: int, slots: int
) -> None:
    """In `safe`: the limit, and `limit (N - 1) / N` more where the window holds the absence's beginning."""
    size = Size(workers, limit, slots, "rcpdaq", "wy", {"w": 1}, air=1, mode="safe")
    found = search(size, most_states=QUICK_STATES)
    assert found.path is None, found


@pytest.mark.soak
@pytest.mark.parametrize("workers, limit, slots", [(2, 2, 1), (2, 4, 1), (3, 3, 1), (2, 2, 2)])
def test_no_path_around_an_absence_is_over_its_bounds(
    workers: int, limit: int, slots: int, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Size(workers, limit, slots, "rcpdaq", "wy", {"w": 1}, air=1, mode="safe")
    found = search(size, most_states=600_000, seconds=900.0)
    with capsys.disabled():
        print(f"\n  safe, {workers} workers, limit {limit}   {found}")
    assert found.path is None, found


@pytest.mark.soak
@pytest.mark.parametrize("name", WORLDS)
def test_no_path_is_over(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(WORLDS[name], most_states=600_000, seconds=900.0)
    with capsys.disabled():
        print(f"\n  {name:24}{found}")
    assert found.path is None, found


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_the_search_finds_each_rule_left_out(fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(fault.size, fault.rules, most_states=600_000, seconds=900.0)
    with capsys.disabled():
        print(f"\n  {fault.name:28}{found}")
    assert found.path is not None and len(found.path) <= len(fault.path.split()), found


# --- through an absence and past its end


@pytest.mark.parametrize("name", ABSENCES)
def test_the_end_of_an_absence_costs_nothing(name: str) -> None:
    """In every window that begins with the absence or later, the end included: the limit; see `ABSENCES`."""
    walked = walks(ABSENCES[name], most=350)
    assert walked.path is None, walked


@pytest.mark.parametrize("fault", ABSENT_FAULTS, ids=[fault.name for fault in ABSENT_FAULTS])
def test_a_rule_of_absences_left_out_is_found(fault: Fault) -> None:
    walked = walks(fault.size, fault.rules, most=350, seconds=60.0)
    assert walked.path is not None, walked
    for path in (walked.path, fault.path.split()):
        with pytest.raises(OverError):
            replay(fault.size, path, fault.rules)
        replay(fault.size, path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ABSENCES)
def test_long_walks_through_an_absence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    walked = walks(ABSENCES[name], seed=2, seconds=120.0)
    with capsys.disabled():
        print(f"\n  {name:24}{walked}")
    assert walked.path is None, walked


# --- what was found, and is mended


def test_a_refund_told_after_a_reset() -> None:
    replay(REFUNDED_RESET, "c0 f0 z r0 c0 r0 c0".split())


def test_a_newcomer_is_first_at_an_emptied_store() -> None:
    replay(Size(letters="rck", events="e"), "c0 c0 e k0 c0 c0".split())


def test_a_journal_that_is_shortened() -> None:
    replay(WORLDS["limit of 4"], "p0 d0 a0 p0 t r0 t r0 d0 a0 r0 c0 c0".split())


ABSENT = Size(workers=4, limit=4, letters="rpdaq", events="wy", mode="safe")


@pytest.mark.parametrize("path", ["p0 d0 a0 w t t r0 r0 r1 r2 r3", "p0 d0 w t t r0 a0 r0 r0 r1 r2 r3"])
def test_a_window_wholly_inside_an_absence(path: str) -> None:
    replay(ABSENT, path.split())


# --- what the search relies on


def test_every_field_of_the_searched_objects_is_known() -> None:
    assert unnamed(World(Size())) == []


@pytest.mark.parametrize(
    "size", [*WORLDS.values(), *ABSENCES.values()], ids=[*WORLDS, *(f"away, {name}" for name in ABSENCES)]
)
def test_a_state_that_was_come_back_to_goes_on_alike(size: Size) -> None:
    """Beside a world that was never interrupted, so that a field that a snapshot left out would be seen."""
    straight, back = World(size), World(size)
    for at in range(60):
        actions = [action for action in size.actions() if straight.possible(action)]
        kept = snapshot(back)
        for action in actions:
            back.step(action)
            restore(back, kept)
        action = actions[(at * 7 + at // 3) % len(actions)]
        assert straight.step(action) == back.step(action)
        assert key(straight) == key(back), action


def test_a_bucket_looked_at_often_is_as_one_looked_at_once() -> None:
    """What the worlds that are not lazy rely on."""
    for life in range(1, 8):
        once, often = (Bucket(1) for _ in range(2))
        for bucket in (once, often):
            bucket.advance(EPOCH_MS, SLOT_MS)
            bucket.charge(bucket.slot, 1)
        end = EPOCH_MS + life * SLOT_MS // 2
        for ms in (*range(EPOCH_MS, end, SLOT_MS // 4), end):
            often.advance(ms, SLOT_MS)
        once.advance(end, SLOT_MS)
        assert (once.ring, once.spent, once.holders) == (often.ring, often.spent, often.holders)


# --- longer paths, at random


LETTERS = "rcbspodnDalgkh"


class Walk(RuleBasedStateMachine):
    """Whatever is possible, in any order: Hypothesis shortens what it finds. `World` checks each admission."""

    size = Size(workers=3, limit=4, slots=2, letters=LETTERS, events="ij", most={"j": 2}, lazy=True)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.size)

    @rule(letter=st.sampled_from(LETTERS), place=st.integers(0, 2))
    def worker(self, letter: str, place: int) -> None:
        self.world.step(f"{letter}{place}")

    @rule(place=st.integers(0, 2), times=st.integers(1, 4))
    def spend(self, place: int, times: int) -> None:
        for _ in range(times):
            self.world.step(f"r{place}")

    @rule(ticks=st.integers(1, 3))
    def time(self, ticks: int) -> None:
        for _ in range(ticks):
            self.world.step("t")

    @precondition(lambda self: self.world.ghost is not None)
    @rule()
    def ghost(self) -> None:
        self.world.step("i")

    @rule()
    def clock(self) -> None:
        self.world.step("j")


class RefundingWalk(Walk):
    """With refunds and resets too."""

    size = Size(3, 4, 2, LETTERS + "fF", "ijz", {"j": 2}, lazy=True)

    @rule(letter=st.sampled_from("fF"), place=st.integers(0, 2))
    def refund(self, letter: str, place: int) -> None:
        self.world.step(f"{letter}{place}")

    @rule()
    def reset(self) -> None:
        self.world.step("z")


Walk.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
RefundingWalk.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestWalk = Walk.TestCase
TestRefundingWalk = RefundingWalk.TestCase
