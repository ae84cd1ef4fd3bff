"""The breaker's rules one by one, then all at once against a model that keeps history instead of counters.

Time is a number here. Durations are sums of eighths of a second, so that the model and the breaker
compute equal numbers, not close ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from lucid.core.rules.breaker import (
    FAILURE_STATUSES,
    BreakerMode,
    BreakerSnapshot,
    BreakerState,
    CircuitBreaker,
    Outcome,
    Permit,
    Reason,
    Transition,
    summarize,
)

SUCCESS, FAILURE, NEUTRAL = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def acquire(breaker: CircuitBreaker, now: float) -> Permit:
    permit = breaker.try_acquire(now)
    assert permit is not None
    return permit


def call(breaker: CircuitBreaker, outcome: Outcome, now: float) -> Permit:
    permit = acquire(breaker, now)
    breaker.settle(permit, outcome, now)
    return permit


def state(breaker: CircuitBreaker, now: float) -> BreakerState:
    return breaker.snapshot(now).state


def opened(now: float = 100.0, *, jitter: Callable[[], float] = lambda: 0.0) -> CircuitBreaker:
    """A breaker with the default numbers that opened at `now`."""
    breaker = CircuitBreaker("chain", jitter=jitter)
    for _ in range(5):
        call(breaker, FAILURE, now)
    assert state(breaker, now) is OPEN
    return breaker


def heard(breaker: CircuitBreaker) -> list[Transition]:
    transitions: list[Transition] = []
    breaker.subscribe(transitions.append)
    return transitions


class TestClosed:
    def test_five_failures_in_a_row_open(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=5, recovery_timeout=30, success_threshold=2)
        for _ in range(4):
            call(breaker, FAILURE, 1.0)
        assert state(breaker, 1.0) is CLOSED
        call(breaker, FAILURE, 1.0)
        assert state(breaker, 1.0) is OPEN
        assert breaker.try_acquire(1.0) is None

    def test_a_success_between_starts_the_count_again(self) -> None:
        breaker = CircuitBreaker("chain")
        for outcome in [FAILURE] * 4 + [SUCCESS] + [FAILURE] * 4:
            call(breaker, outcome, 1.0)
        assert state(breaker, 1.0) is CLOSED
        call(breaker, FAILURE, 1.0)
        assert state(breaker, 1.0) is OPEN

    def test_a_neutral_end_neither_counts_nor_breaks_the_row(self) -> None:
        breaker = CircuitBreaker("chain")
        for outcome in [FAILURE] * 4 + [NEUTRAL] * 10:
            call(breaker, outcome, 1.0)
        seen = breaker.snapshot(1.0)
        assert (seen.state, seen.consecutive_failures, seen.calls) == (CLOSED, 4, 4)
        call(breaker, FAILURE, 1.0)
        assert state(breaker, 1.0) is OPEN

    def test_it_is_the_order_of_the_ends_that_counts(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=2)
        first, second, third = (acquire(breaker, 1.0) for _ in range(3))
        breaker.settle(third, FAILURE, 2.0)
        breaker.settle(second, SUCCESS, 3.0)
        breaker.settle(first, FAILURE, 4.0)
        assert state(breaker, 4.0) is CLOSED

    @pytest.mark.parametrize("first", Outcome)
    @pytest.mark.parametrize("second", Outcome)
    def test_a_second_settle_does_nothing(self, first: Outcome, second: Outcome) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=2)
        permit = acquire(breaker, 1.0)
        was_settled = permit.settled
        breaker.settle(permit, first, 1.0)
        assert (was_settled, permit.settled) == (False, True)
        before = breaker.snapshot(1.0)
        breaker.settle(permit, second, 1.0)
        assert breaker.snapshot(1.0) == before


class TestFailureRate:
    def test_nine_of_ten_open_though_never_five_in_a_row(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=5, failure_rate=0.5, minimum_calls=20)
        transitions = heard(breaker)
        calls = 0
        for outcome in itertools.cycle([FAILURE] * 4 + [SUCCESS]):
            permit = breaker.try_acquire(1.0)
            if permit is None:
                break
            breaker.settle(permit, outcome, 1.0)
            calls += 1
        # The twentieth call is a success, and only a failure opens.
        assert calls == 21
        assert [one.reason for one in transitions] == [Reason.FAILURE_RATE]

    def test_the_rate_at_the_limit_opens_and_just_below_it_does_not(self) -> None:
        # 0.07 x 100 is 7.000000000000001: whoever multiplies does not open at seven.
        for failures, expected in ((7, OPEN), (6, CLOSED)):
            breaker = CircuitBreaker("chain", failure_threshold=8, failure_rate=0.07, minimum_calls=100)
            outcomes = [SUCCESS] * (100 - failures) + [FAILURE] * failures
            for outcome in outcomes:
                call(breaker, outcome, 1.0)
            assert state(breaker, 1.0) is expected

    def test_fewer_calls_than_the_minimum_say_nothing(self) -> None:
        breaker = CircuitBreaker("chain", minimum_calls=20)
        for outcome in [FAILURE, FAILURE, SUCCESS] * 6 + [FAILURE]:
            call(breaker, outcome, 1.0)
        assert state(breaker, 1.0) is CLOSED
        call(breaker, FAILURE, 1.0)
        assert state(breaker, 1.0) is OPEN

    def test_none_turns_it_off(self) -> None:
        breaker = CircuitBreaker("chain", failure_rate=None)
        for outcome in [FAILURE, FAILURE, FAILURE, FAILURE, SUCCESS] * 100:
            call(breaker, outcome, 1.0)
        assert state(breaker, 1.0) is CLOSED

    def test_calls_leave_the_window_slot_by_slot(self) -> None:
        breaker = CircuitBreaker("chain", rate_window_seconds=10.0)
        for second in range(20):
            call(breaker, SUCCESS if second % 2 else FAILURE, float(second))
        looks = [breaker.snapshot(19.0 + later) for later in range(11)]
        assert [(seen.calls, seen.failures) for seen in looks] == [
            (10, 5), (9, 4), (8, 4), (7, 3), (6, 3), (5, 2), (4, 2), (3, 1), (2, 1), (1, 0), (0, 0),
        ]  # fmt: skip

    @pytest.mark.parametrize("outcome", [SUCCESS, FAILURE])
    def test_a_call_after_a_long_silence_stands_alone(self, outcome: Outcome) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=100)
        for _ in range(19):
            call(breaker, FAILURE, 5.5)
        call(breaker, outcome, 1_000_000.5)
        seen = breaker.snapshot(1_000_000.5)
        assert (seen.state, seen.calls, seen.failures) == (CLOSED, 1, int(outcome is FAILURE))
        assert seen.failure_rate == seen.failures

    def test_no_calls_are_no_failures(self) -> None:
        assert CircuitBreaker("chain").snapshot(7.0).failure_rate == 0.0


class TestOpen:
    def test_it_refuses_until_the_time_is_over_and_tells_how_long(self) -> None:
        breaker = opened(100.0)
        for now, left in ((100.0, 30.0), (110.0, 20.0), (129.875, 0.125)):
            assert breaker.try_acquire(now) is None
            assert breaker.retry_after(now) == left
            assert breaker.snapshot(now).half_open_in_seconds == left
            assert breaker.snapshot(now).opened_seconds_ago == now - 100.0
        assert breaker.snapshot(129.875).refused == 3
        assert breaker.try_acquire(130.0) is not None

    @pytest.mark.parametrize("outcome", Outcome)
    def test_late_results_do_not_move_the_moment_of_opening(self, outcome: Outcome) -> None:
        breaker = CircuitBreaker("chain")
        slow = [acquire(breaker, 90.0) for _ in range(20)]
        for _ in range(5):
            call(breaker, FAILURE, 100.0)
        for permit in slow:
            breaker.settle(permit, outcome, 120.0)
        seen = breaker.snapshot(120.0)
        assert (seen.state, seen.late_results, seen.opened_seconds_ago) == (OPEN, 20, 20.0)
        assert state(breaker, 130.0) is HALF_OPEN

    def test_a_late_result_counts_once(self) -> None:
        breaker = CircuitBreaker("chain")
        slow = acquire(breaker, 90.0)
        for _ in range(5):
            call(breaker, FAILURE, 100.0)
        breaker.settle(slow, SUCCESS, 101.0)
        breaker.settle(slow, NEUTRAL, 101.0)
        breaker.body_broke(slow, 102.0)
        assert breaker.snapshot(102.0).late_results == 1

    @pytest.mark.parametrize(
        "jitter,seconds",
        [(0.0, 30.0), (0.5, 31.5), (1.0, 33.0), (7.0, 33.0), (-1.0, 30.0), (math.nan, 30.0)],
    )
    def test_jitter_adds_up_to_a_tenth_and_takes_nothing(self, jitter: float, seconds: float) -> None:
        assert opened(100.0, jitter=lambda: jitter).retry_after(100.0) == pytest.approx(seconds)

    def test_one_draw_of_jitter_per_opening(self) -> None:
        draws = iter([0.5])
        breaker = opened(100.0, jitter=lambda: next(draws))
        assert breaker.retry_after(100.0) == breaker.snapshot(100.0).half_open_in_seconds == 31.5

    def test_it_grows_while_trials_fail_up_to_a_bound_and_starts_anew_once_closed(self) -> None:
        breaker = opened(0.0)
        now, lengths = 0.0, []
        for _ in range(5):
            lengths.append(breaker.retry_after(now))
            now += lengths[-1]
            call(breaker, FAILURE, now)
        assert lengths == [30.0, 60.0, 120.0, 120.0, 120.0]
        now += 120.0
        call(breaker, SUCCESS, now)
        call(breaker, SUCCESS, now)
        for _ in range(5):
            call(breaker, FAILURE, now)
        assert breaker.retry_after(now) == 30.0

    def test_a_bound_below_the_recovery_timeout_does_not_shorten_it(self) -> None:
        breaker = CircuitBreaker(
            "chain", failure_threshold=1, recovery_timeout=300.0, maximum_recovery_timeout=120.0
        )
        call(breaker, FAILURE, 0.0)
        call(breaker, FAILURE, 300.0)
        assert breaker.retry_after(300.0) == 300.0


class TestHalfOpen:
    def test_two_successes_close(self) -> None:
        breaker = opened(100.0)
        call(breaker, SUCCESS, 130.0)
        seen = breaker.snapshot(130.0)
        assert (seen.state, seen.trials_succeeded, seen.opened_seconds_ago) == (HALF_OPEN, 1, 30.0)
        assert seen.half_open_in_seconds is None
        call(breaker, SUCCESS, 131.0)
        assert breaker.snapshot(131.0).opened_seconds_ago is None
        assert state(breaker, 131.0) is CLOSED

    def test_no_more_trials_at_once_than_successes_needed(self) -> None:
        breaker = opened(100.0)
        first = acquire(breaker, 130.0)
        acquire(breaker, 130.0)
        assert breaker.try_acquire(130.0) is None
        breaker.settle(first, SUCCESS, 131.0)
        # One succeeded and one in flight: a third could only be one call too many on a weak backend.
        assert breaker.try_acquire(131.0) is None
        assert breaker.retry_after(131.0) == 1.0
        assert breaker.snapshot(131.0).trials_in_flight == 1

    def test_one_failure_opens_again_and_the_other_trial_is_late(self) -> None:
        breaker = opened(100.0)
        first, second = acquire(breaker, 130.0), acquire(breaker, 130.0)
        breaker.settle(first, FAILURE, 131.0)
        breaker.settle(second, SUCCESS, 132.0)
        seen = breaker.snapshot(132.0)
        assert (seen.state, seen.opened_seconds_ago, seen.late_results, seen.opened) == (OPEN, 1.0, 1, 2)

    def test_a_neutral_trial_gives_its_place_back(self) -> None:
        breaker = opened(100.0)
        for _ in range(50):
            first, second = acquire(breaker, 130.0), acquire(breaker, 130.0)
            breaker.settle(first, NEUTRAL, 130.0)
            breaker.settle(second, NEUTRAL, 130.0)
        seen = breaker.snapshot(130.0)
        assert (seen.state, seen.trials_in_flight, seen.trials_succeeded) == (HALF_OPEN, 0, 0)

    def test_an_old_success_does_not_close(self) -> None:
        breaker = CircuitBreaker("chain")
        slow = [acquire(breaker, 90.0) for _ in range(2)]
        for _ in range(5):
            call(breaker, FAILURE, 100.0)
        assert state(breaker, 130.0) is HALF_OPEN
        for permit in slow:
            breaker.settle(permit, SUCCESS, 130.0)
        assert state(breaker, 130.0) is HALF_OPEN

    def test_closing_forgets_the_calls_before(self) -> None:
        breaker = opened(100.0)
        call(breaker, SUCCESS, 130.0)
        call(breaker, SUCCESS, 130.0)
        seen = breaker.snapshot(130.0)
        assert (seen.state, seen.consecutive_failures, seen.calls, seen.failures) == (CLOSED, 0, 0, 0)

    @pytest.mark.parametrize("now", [170.0, 175.0])
    @pytest.mark.parametrize(
        "look",
        [
            lambda breaker, permit, now: breaker.try_acquire(now),
            lambda breaker, permit, now: breaker.tick(now),
            lambda breaker, permit, now: breaker.snapshot(now),
            lambda breaker, permit, now: breaker.settle(permit, SUCCESS, now),
            lambda breaker, permit, now: breaker.settle(permit, NEUTRAL, now),
        ],
        ids=["try_acquire", "tick", "snapshot", "settle as success", "settle as neutral"],
    )
    def test_a_trial_past_its_deadline_has_failed_at_its_deadline(
        self, look: Callable[[CircuitBreaker, Permit, float], object], now: float
    ) -> None:
        breaker = opened(100.0)
        trial = acquire(breaker, 130.0)
        acquire(breaker, 135.0)
        transitions = heard(breaker)
        breaker.tick(169.875)
        assert transitions == []
        look(breaker, trial, now)
        assert transitions == [
            Transition("chain", HALF_OPEN, OPEN, Reason.TRIAL_TIMED_OUT, BreakerMode.AUTO, 3, 170.0)
        ]
        assert breaker.retry_after(now) == 230.0 - now

    def test_an_unseen_timeout_and_recovery_are_made_up_for_in_order(self) -> None:
        breaker = opened(100.0)
        acquire(breaker, 130.0)
        transitions = heard(breaker)
        assert breaker.try_acquire(1000.0) is not None
        assert [(one.new, one.reason, one.at) for one in transitions] == [
            (OPEN, Reason.TRIAL_TIMED_OUT, 170.0),
            (HALF_OPEN, Reason.RECOVERY_TIMEOUT, 230.0),
        ]

    @pytest.mark.parametrize(
        "act",
        [lambda breaker: breaker.override(BreakerMode.CLOSED, 200.0), lambda breaker: breaker.reset(200.0)],
        ids=["override", "reset"],
    )
    def test_what_an_operator_does_comes_after_what_was_due_before(
        self, act: Callable[[CircuitBreaker], None]
    ) -> None:
        breaker = opened(100.0)
        acquire(breaker, 130.0)
        transitions = heard(breaker)
        act(breaker)
        assert [(one.old, one.new, one.at) for one in transitions] == [
            (HALF_OPEN, OPEN, 170.0),
            (OPEN, CLOSED, 200.0),
        ]


class TestBrokenBodies:
    def test_the_failure_leaves_the_window_with_its_call(self) -> None:
        breaker = CircuitBreaker("chain", rate_window_seconds=10.0)
        breaker.body_broke(call(breaker, SUCCESS, 0.0), 9.0)
        seen = breaker.snapshot(10.0)
        assert (seen.calls, seen.failures) == (0, 0)

    def test_a_success_becomes_a_failure_once(self) -> None:
        breaker = CircuitBreaker("chain")
        permit = call(breaker, SUCCESS, 1.0)
        breaker.body_broke(permit, 2.0)
        breaker.body_broke(permit, 2.0)
        seen = breaker.snapshot(2.0)
        assert (seen.calls, seen.failures, seen.consecutive_failures, seen.broken_bodies) == (1, 1, 1, 1)

    def test_a_backend_whose_bodies_all_break_is_opened_by_the_rate(self) -> None:
        breaker = CircuitBreaker("chain", minimum_calls=20)
        for number in range(20):
            now = number / 8
            breaker.body_broke(call(breaker, SUCCESS, now), now)
        assert state(breaker, 3.0) is OPEN

    def test_broken_at_once_open_like_other_failures(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=5)
        for permit in [call(breaker, SUCCESS, 1.0) for _ in range(5)]:
            breaker.body_broke(permit, 2.0)
        assert state(breaker, 2.0) is OPEN

    def test_old_streams_that_end_together_are_only_counted(self) -> None:
        breaker = CircuitBreaker("chain")
        streams = [call(breaker, SUCCESS, 0.0) for _ in range(1000)]
        for permit in streams:
            breaker.body_broke(permit, 3600.0)
        seen = breaker.snapshot(3600.0)
        assert (seen.state, seen.consecutive_failures, seen.broken_bodies) == (CLOSED, 0, 1000)

    @pytest.mark.parametrize("now,failures", [(9.875, 1), (10.0, 0)])
    def test_old_is_what_has_left_the_window(self, now: float, failures: int) -> None:
        breaker = CircuitBreaker("chain", rate_window_seconds=10.0)
        breaker.body_broke(call(breaker, SUCCESS, 0.0), now)
        assert breaker.snapshot(now).consecutive_failures == failures

    def test_a_trial_whose_body_breaks_opens_again(self) -> None:
        breaker = opened(100.0)
        trial = call(breaker, SUCCESS, 130.0)
        breaker.body_broke(trial, 131.0)
        seen = breaker.snapshot(131.0)
        assert (seen.state, seen.opened_seconds_ago) == (OPEN, 0.0)

    def test_in_a_later_generation_it_is_late(self) -> None:
        breaker = opened(100.0)
        trials = [call(breaker, SUCCESS, 130.0) for _ in range(2)]
        breaker.body_broke(trials[0], 131.0)
        seen = breaker.snapshot(131.0)
        assert (seen.state, seen.failures, seen.late_results, seen.broken_bodies) == (CLOSED, 0, 1, 1)

    def test_before_the_head_was_settled_it_settles(self) -> None:
        breaker = CircuitBreaker("chain")
        permit = acquire(breaker, 1.0)
        breaker.body_broke(permit, 1.0)
        breaker.settle(permit, SUCCESS, 1.0)
        seen = breaker.snapshot(1.0)
        assert (seen.calls, seen.failures, seen.consecutive_failures, seen.broken_bodies) == (1, 1, 1, 0)

    @pytest.mark.parametrize("outcome", [FAILURE, NEUTRAL])
    def test_after_a_failure_or_a_caller_who_left_it_says_nothing_new(self, outcome: Outcome) -> None:
        breaker = CircuitBreaker("chain")
        permit = call(breaker, outcome, 1.0)
        before = breaker.snapshot(1.0)
        breaker.body_broke(permit, 1.0)
        assert breaker.snapshot(1.0) == before


class TestOverride:
    def test_forced_open_refuses_for_good(self) -> None:
        breaker = CircuitBreaker("chain", recovery_timeout=30.0)
        breaker.override(BreakerMode.OPEN, 1.0)
        assert breaker.mode is BreakerMode.OPEN
        for now in (1.0, 31.0, 1e6):
            assert breaker.try_acquire(now) is None
            assert breaker.retry_after(now) == 30.0
        seen = breaker.snapshot(1e6)
        assert (seen.state, seen.half_open_in_seconds) == (OPEN, None)

    def test_forced_closed_lets_all_pass_and_observes(self) -> None:
        breaker = CircuitBreaker("chain")
        breaker.override(BreakerMode.CLOSED, 1.0)
        for _ in range(50):
            call(breaker, FAILURE, 1.0)
        seen = breaker.snapshot(1.0)
        assert (seen.state, seen.mode) == (CLOSED, BreakerMode.CLOSED)
        assert (seen.consecutive_failures, seen.calls, seen.failure_rate) == (50, 50, 1.0)

    def test_forced_closed_ends_an_opening(self) -> None:
        breaker = opened(100.0)
        breaker.override(BreakerMode.CLOSED, 101.0)
        assert breaker.try_acquire(101.0) is not None

    def test_back_from_forced_closed_it_starts_afresh(self) -> None:
        breaker = CircuitBreaker("chain")
        breaker.override(BreakerMode.CLOSED, 1.0)
        for _ in range(50):
            call(breaker, FAILURE, 1.0)
        breaker.override(BreakerMode.AUTO, 2.0)
        for _ in range(4):
            call(breaker, FAILURE, 2.0)
        assert state(breaker, 2.0) is CLOSED
        call(breaker, FAILURE, 2.0)
        assert state(breaker, 2.0) is OPEN

    @pytest.mark.parametrize("before", [opened, lambda: CircuitBreaker("chain")], ids=["opened", "fresh"])
    def test_back_from_forced_open_it_probes_and_a_failed_trial_opens_for_the_first_length(
        self, before: Callable[[], CircuitBreaker]
    ) -> None:
        breaker = before()
        breaker.override(BreakerMode.OPEN, 101.0)
        breaker.override(BreakerMode.AUTO, 200.0)
        assert state(breaker, 200.0) is HALF_OPEN
        call(breaker, FAILURE, 200.0)
        assert breaker.retry_after(200.0) == 30.0

    @pytest.mark.parametrize("mode", BreakerMode)
    def test_the_same_mode_again_changes_nothing(self, mode: BreakerMode) -> None:
        breaker = opened(100.0)
        breaker.override(mode, 101.0)
        before, transitions = breaker.snapshot(110.0), heard(breaker)
        breaker.override(mode, 110.0)
        assert breaker.snapshot(110.0) == before
        assert transitions == []

    @pytest.mark.parametrize("mode", [BreakerMode.OPEN, BreakerMode.CLOSED])
    def test_calls_begun_before_an_override_are_late_after_it(self, mode: BreakerMode) -> None:
        breaker = CircuitBreaker("chain")
        permit = acquire(breaker, 1.0)
        breaker.override(mode, 1.0)
        breaker.settle(permit, FAILURE, 1.0)
        seen = breaker.snapshot(1.0)
        assert (seen.late_results, seen.consecutive_failures) == (1, 0)


class TestReset:
    def test_it_closes_and_forgets(self) -> None:
        breaker = opened(100.0)
        generation = breaker.generation
        breaker.reset(101.0)
        seen = breaker.snapshot(101.0)
        assert (seen.state, seen.calls, seen.generation) == (CLOSED, 0, generation + 1)

    def test_calls_in_flight_are_late(self) -> None:
        breaker = CircuitBreaker("chain")
        permit = acquire(breaker, 1.0)
        breaker.reset(1.0)
        breaker.settle(permit, FAILURE, 1.0)
        assert breaker.snapshot(1.0).late_results == 1

    def test_it_leaves_the_override(self) -> None:
        breaker = CircuitBreaker("chain")
        breaker.override(BreakerMode.OPEN, 1.0)
        breaker.reset(2.0)
        seen = breaker.snapshot(1e6)
        assert (seen.state, seen.mode, seen.opened) == (OPEN, BreakerMode.OPEN, 1)


class TestListeners:
    def test_they_hear_every_change_after_it_was_made(self) -> None:
        breaker = CircuitBreaker("chain")
        transitions = heard(breaker)
        states: list[BreakerState] = []
        breaker.subscribe(lambda one: states.append(breaker.snapshot(one.at).state))
        for _ in range(5):
            call(breaker, FAILURE, 100.0)
        call(breaker, SUCCESS, 131.0)
        call(breaker, SUCCESS, 132.0)
        breaker.override(BreakerMode.CLOSED, 140.0)
        breaker.override(BreakerMode.OPEN, 150.0)
        breaker.override(BreakerMode.AUTO, 160.0)
        call(breaker, FAILURE, 161.0)
        breaker.reset(170.0)
        auto, forced_open, forced_closed = BreakerMode.AUTO, BreakerMode.OPEN, BreakerMode.CLOSED
        assert transitions == [
            Transition("chain", CLOSED, OPEN, Reason.CONSECUTIVE_FAILURES, auto, 1, 100.0),
            Transition("chain", OPEN, HALF_OPEN, Reason.RECOVERY_TIMEOUT, auto, 2, 130.0),
            Transition("chain", HALF_OPEN, CLOSED, Reason.TRIALS_SUCCEEDED, auto, 3, 132.0),
            Transition("chain", CLOSED, CLOSED, Reason.OVERRIDE, forced_closed, 4, 140.0),
            Transition("chain", CLOSED, OPEN, Reason.OVERRIDE, forced_open, 5, 150.0),
            Transition("chain", OPEN, HALF_OPEN, Reason.OVERRIDE, auto, 6, 160.0),
            Transition("chain", HALF_OPEN, OPEN, Reason.TRIAL_FAILED, auto, 7, 161.0),
            Transition("chain", OPEN, CLOSED, Reason.RESET, auto, 8, 170.0),
        ]
        assert states == [one.new for one in transitions]

    def test_one_that_raises_is_counted_and_reaches_neither_the_call_nor_the_others(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=1)

        def broken(_: Transition) -> None:
            raise RuntimeError("listener")

        breaker.subscribe(broken)
        transitions = heard(breaker)
        call(breaker, FAILURE, 1.0)
        assert [one.new for one in transitions] == [OPEN]
        assert breaker.snapshot(1.0).listener_errors == 1

    def test_one_that_changes_the_breaker_is_heard_by_all_in_the_same_order(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=1)

        def pin(transition: Transition) -> None:
            if transition.reason is Reason.CONSECUTIVE_FAILURES:
                breaker.override(BreakerMode.CLOSED, transition.at)

        before = heard(breaker)
        breaker.subscribe(pin)
        after = heard(breaker)
        call(breaker, FAILURE, 1.0)
        assert [one.generation for one in before] == [1, 2]
        assert before == after
        assert breaker.try_acquire(1.0) is not None

    def test_one_that_closes_the_breaker_in_try_acquire(self) -> None:
        breaker = opened(100.0)
        breaker.subscribe(lambda one: breaker.override(BreakerMode.CLOSED, one.at))
        permits = [acquire(breaker, 130.0) for _ in range(10)]
        assert breaker.snapshot(130.0).trials_in_flight == 0
        assert {one.generation for one in permits} == {breaker.generation}

    def test_an_exit_of_the_process_passes_and_leaves_the_others_working(self) -> None:
        breaker = CircuitBreaker("chain", failure_threshold=1)
        exits = iter([SystemExit])

        def leave(_: Transition) -> None:
            for one in exits:
                raise one

        breaker.subscribe(leave)
        transitions = heard(breaker)
        with pytest.raises(SystemExit):
            call(breaker, FAILURE, 1.0)
        assert breaker.try_acquire(31.0) is not None
        assert [one.new for one in transitions] == [HALF_OPEN]


class TestPermits:
    def test_they_carry_their_generation(self) -> None:
        breaker = opened(100.0)
        assert breaker.generation == 1
        trial = acquire(breaker, 130.0)
        assert trial.generation == breaker.generation == 2
        breaker.settle(trial, FAILURE, 131.0)
        assert (trial.generation, breaker.generation) == (2, 3)

    def test_one_of_a_replaced_breaker_is_late(self) -> None:
        old, new = CircuitBreaker("chain"), CircuitBreaker("chain")
        permit = acquire(old, 1.0)
        assert permit.generation == new.generation
        new.settle(permit, FAILURE, 1.0)
        seen = new.snapshot(1.0)
        assert (seen.late_results, seen.consecutive_failures) == (1, 0)


def test_only_a_gateways_failures_are_failures() -> None:
    assert frozenset({502, 503, 504}) == FAILURE_STATUSES


@pytest.mark.parametrize(
    "parameter,value",
    [
        *itertools.product(["failure_threshold", "success_threshold", "minimum_calls"], [0, -1]),
        *itertools.product(
            ["recovery_timeout", "rate_window_seconds", "trial_timeout", "maximum_recovery_timeout"],
            [0.0, -1.0, math.inf, math.nan],
        ),
        *itertools.product(["failure_rate"], [0.0, 1.5, math.nan]),
    ],
)
def test_numbers_out_of_range_are_named(parameter: str, value: float) -> None:
    with pytest.raises(ValueError, match=parameter):
        CircuitBreaker("chain", **{parameter: value})  # type: ignore[arg-type]


def test_a_snapshot_travels_as_json() -> None:
    for breaker in (CircuitBreaker("chain"), opened(100.0)):
        seen = breaker.snapshot(120.0)
        assert msgspec.json.decode(msgspec.json.encode(seen), type=BreakerSnapshot) == seen


def test_the_fleet_is_the_sum_of_its_workers() -> None:
    fresh, half_open = CircuitBreaker("chain"), opened(90.0)
    call(fresh, FAILURE, 119.0)
    call(fresh, SUCCESS, 119.0)
    pinned, shut = CircuitBreaker("chain"), CircuitBreaker("chain")
    pinned.override(BreakerMode.CLOSED, 119.0)
    call(pinned, SUCCESS, 119.0)
    call(pinned, SUCCESS, 119.0)
    late = acquire(shut, 118.0)
    shut.override(BreakerMode.OPEN, 119.0)
    shut.settle(late, SUCCESS, 119.0)
    assert shut.try_acquire(119.0) is None
    fleet = summarize(one.snapshot(120.0) for one in (fresh, half_open, pinned, shut, opened(110.0)))
    assert msgspec.structs.asdict(fleet) == {
        "workers": 5, "closed": 2, "open": 2, "half_open": 1, "forced_open": 1, "forced_closed": 1,
        "calls": 4, "failures": 1, "failure_rate": 0.25, "refused": 1, "opened": 3, "late_results": 1,
    }  # fmt: skip
    assert summarize([]).failure_rate == 0.0


# --- all rules at once ---


@dataclass(frozen=True)
class Numbers:
    failure_threshold: int
    success_threshold: int
    failure_rate: float | None
    minimum_calls: int
    recovery_timeout: float = 4.0
    trial_timeout: float = 5.0
    maximum_recovery_timeout: float = 12.0
    rate_window_seconds: float = 10.0


@dataclass(eq=False)
class ModelCall:
    """One call as the model remembers it: `outcome` is None in flight, `ended` the moment of its head."""

    generation: int
    begun: float
    outcome: Outcome | None = None
    ended: float = 0.0
    is_broken: bool = False


@dataclass
class Model:
    """The breaker's rules told from history: no counters, every number is found by looking through all calls.

    It is told of every passing eighth of a second, so nothing is ever made up for afterwards.
    """

    numbers: Numbers
    jitter: Iterator[float]
    now: float = 0.0
    state: BreakerState = CLOSED
    mode: BreakerMode = BreakerMode.AUTO
    generation: int = 0
    calls: list[ModelCall] = field(default_factory=list)
    row: list[Outcome] = field(default_factory=list)  # what was reported into this generation, in order
    history: list[tuple[BreakerState, Reason, float]] = field(default_factory=list)
    openings_in_a_row: int = 0
    half_open_at: float | None = None
    late: int = 0

    def ours(self) -> list[ModelCall]:
        return [one for one in self.calls if one.generation == self.generation]

    def in_flight(self) -> list[ModelCall]:
        return [one for one in self.ours() if one.outcome is None]

    def succeeded(self) -> list[ModelCall]:
        return [one for one in self.ours() if one.outcome is SUCCESS]

    def streak(self) -> int:
        return len(list(itertools.takewhile(lambda outcome: outcome is FAILURE, reversed(self.row))))

    def in_window(self) -> list[ModelCall]:
        if self.state is not CLOSED:
            return []
        oldest_second = math.floor(self.now) - 9
        return [
            one for one in self.ours() if one.outcome in (SUCCESS, FAILURE) and one.ended >= oldest_second
        ]

    def failed(self) -> list[ModelCall]:
        return [one for one in self.in_window() if one.outcome is FAILURE or one.is_broken]

    def change(self, state: BreakerState, reason: Reason) -> None:
        self.half_open_at = None
        if state is CLOSED or self.mode is BreakerMode.OPEN:
            self.openings_in_a_row = 0
        elif state is OPEN:
            length = min(4.0 * 2**self.openings_in_a_row, 12.0)
            self.half_open_at = self.now + length * (1.0 + 0.1 * next(self.jitter))
            self.openings_in_a_row += 1
        self.state = state
        self.generation += 1
        self.row = []
        self.history.append((state, reason, self.now))

    def due(self) -> float | None:
        if self.state is HALF_OPEN:
            return min((one.begun + 5.0 for one in self.in_flight()), default=None)
        return self.half_open_at

    def pass_time(self, eighths: int) -> None:
        for _ in range(eighths):
            self.now += 0.125
            due = self.due()
            if due is not None and self.now >= due:
                if self.state is OPEN:
                    self.change(HALF_OPEN, Reason.RECOVERY_TIMEOUT)
                else:
                    self.change(OPEN, Reason.TRIAL_TIMED_OUT)

    def acquire(self) -> ModelCall | None:
        places = {CLOSED: math.inf, OPEN: 0, HALF_OPEN: self.numbers.success_threshold}[self.state]
        if self.state is HALF_OPEN:
            places -= len(self.in_flight()) + len(self.succeeded())
        if places <= 0:
            return None
        self.calls.append(ModelCall(self.generation, self.now))
        return self.calls[-1]

    def settle(self, one: ModelCall, outcome: Outcome) -> None:
        if one.outcome is not None:
            return
        one.outcome, one.ended = outcome, self.now
        if one.generation != self.generation:
            one.outcome = NEUTRAL  # whatever it was, nobody may hear of it again
            self.late += 1
        elif outcome is not NEUTRAL:
            self.report(outcome)

    def break_body(self, one: ModelCall) -> None:
        if one.outcome is None:
            self.settle(one, FAILURE)
        elif one.outcome is SUCCESS and not one.is_broken:
            one.is_broken = True
            if one.generation != self.generation:
                self.late += 1
            elif self.state is HALF_OPEN or one in self.in_window():
                self.report(FAILURE)

    def report(self, outcome: Outcome) -> None:
        self.row.append(outcome)
        if self.state is HALF_OPEN:
            if outcome is FAILURE:
                self.change(OPEN, Reason.TRIAL_FAILED)
            elif len(self.succeeded()) == self.numbers.success_threshold:
                self.change(CLOSED, Reason.TRIALS_SUCCEEDED)
        elif outcome is FAILURE and self.mode is BreakerMode.AUTO:
            calls, rate = len(self.in_window()), self.numbers.failure_rate
            if self.streak() >= self.numbers.failure_threshold:
                self.change(OPEN, Reason.CONSECUTIVE_FAILURES)
            elif (
                rate is not None
                and calls >= self.numbers.minimum_calls
                and len(self.failed()) >= rate * calls
            ):
                self.change(OPEN, Reason.FAILURE_RATE)

    def override(self, mode: BreakerMode) -> None:
        if mode is not self.mode:
            was, self.mode = self.mode, mode
            if mode is BreakerMode.OPEN:
                self.change(OPEN, Reason.OVERRIDE)
            else:
                is_probing = mode is BreakerMode.AUTO and was is BreakerMode.OPEN
                self.change(HALF_OPEN if is_probing else CLOSED, Reason.OVERRIDE)

    def reset(self) -> None:
        self.change(OPEN if self.mode is BreakerMode.OPEN else CLOSED, Reason.RESET)


@dataclass(eq=False)
class Call:
    watched: Permit
    unwatched: Permit
    model: ModelCall


class BreakerMachine(RuleBasedStateMachine):
    """Two breakers get the same calls. One is looked at after every step, the other never before the end."""

    calls = Bundle("calls")

    @initialize(
        numbers=st.builds(
            Numbers,
            failure_threshold=st.sampled_from([1, 2, 3, 5, 50]),
            success_threshold=st.integers(1, 3),
            failure_rate=st.sampled_from([None, 0.25, 0.5, 0.75, 1.0]),
            minimum_calls=st.integers(2, 8),
        ),
        # Eighths again: 0.1 x 0.625 x 4 s and so on need not be exact, only computed alike.
        jitter=st.lists(st.sampled_from([0.0, 0.5, 0.625, 1.0]), min_size=1, max_size=4),
    )
    def build(self, numbers: Numbers, jitter: list[float]) -> None:
        self.numbers = numbers
        self.model = Model(numbers, itertools.cycle(jitter))
        self.watched = CircuitBreaker("w", **vars(numbers), jitter=itertools.cycle(jitter).__next__)
        self.unwatched = CircuitBreaker("w", **vars(numbers), jitter=itertools.cycle(jitter).__next__)
        self.heard = heard(self.watched), heard(self.unwatched)
        self.begun: list[Call] = []

    @property
    def now(self) -> float:
        return self.model.now

    @property
    def current(self) -> list[Call]:
        in_flight = self.model.in_flight()
        return [one for one in self.begun if one.model in in_flight]

    @rule(eighths=st.one_of(st.integers(1, 16), st.sampled_from([79, 80, 81, 200])))
    def time_passes(self, eighths: int) -> None:
        self.model.pass_time(eighths)

    @rule(eighths=st.integers(-1, 1))
    def time_passes_until_about_when_something_is_due(self, eighths: int) -> None:
        due = self.model.due()
        if due is not None:
            self.model.pass_time(max(0, math.ceil((due - self.now) * 8) + eighths))

    @rule(target=calls, count=st.integers(1, 4))
    def calls_begin(self, count: int) -> MultipleResults[Call]:
        return multiple(*filter(None, [self.begin() for _ in range(count)]))

    def begin(self) -> Call | None:
        model = self.model.acquire()
        watched, unwatched = self.watched.try_acquire(self.now), self.unwatched.try_acquire(self.now)
        if model is None:
            assert watched is unwatched is None
            assert self.watched.retry_after(self.now) == self.unwatched.retry_after(self.now) > 0.0
            return None
        assert watched is not None
        assert unwatched is not None
        assert watched.generation == unwatched.generation == model.generation
        self.begun.append(Call(watched, unwatched, model))
        return self.begun[-1]

    @rule(one=calls, outcome=st.sampled_from([SUCCESS, FAILURE, FAILURE, NEUTRAL]))
    def ends(self, one: Call, outcome: Outcome) -> None:
        self.model.settle(one.model, outcome)
        self.watched.settle(one.watched, outcome, self.now)
        self.unwatched.settle(one.unwatched, outcome, self.now)

    @rule(outcomes=st.lists(st.sampled_from([SUCCESS, FAILURE]), min_size=1, max_size=12))
    def calls_in_sequence(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            one = self.begin()
            if one is not None:
                self.ends(one, outcome)

    # Any call may be picked above, and most are of old generations; these are the ones that matter now.
    @precondition(lambda self: self.current)
    @rule(pick=st.integers(0, 3), outcome=st.sampled_from([SUCCESS, SUCCESS, FAILURE, NEUTRAL]))
    def a_call_in_flight_ends(self, pick: int, outcome: Outcome) -> None:
        self.ends(self.current[pick % len(self.current)], outcome)

    @precondition(lambda self: self.model.state is CLOSED)
    @rule()
    def backend_is_down_until_it_would_be_tried_again(self) -> None:
        self.calls_in_sequence([FAILURE] * self.numbers.failure_threshold)
        self.time_passes_until_about_when_something_is_due(0)

    @rule(one=calls)
    def body_breaks(self, one: Call) -> None:
        self.model.break_body(one.model)
        self.watched.body_broke(one.watched, self.now)
        self.unwatched.body_broke(one.unwatched, self.now)

    @rule(mode=st.sampled_from([BreakerMode.AUTO, *BreakerMode, None]))
    def operator_acts(self, mode: BreakerMode | None) -> None:
        if mode is None:
            self.model.reset()
            self.watched.reset(self.now)
            self.unwatched.reset(self.now)
        else:
            self.model.override(mode)
            self.watched.override(mode, self.now)
            self.unwatched.override(mode, self.now)

    @invariant()
    def the_watched_one_is_as_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        seen, model = self.watched.snapshot(self.now), self.model
        assert (seen.state, seen.mode, seen.generation) == (model.state, model.mode, model.generation)
        assert (seen.consecutive_failures, seen.late_results) == (
            model.streak() * (model.state is CLOSED),
            model.late,
        )
        assert (seen.calls, seen.failures) == (len(model.in_window()), len(model.failed()))
        assert 0.0 <= seen.failure_rate <= 1.0
        if model.state is HALF_OPEN:
            assert (seen.trials_in_flight, seen.trials_succeeded) == (
                len(model.in_flight()),
                len(model.succeeded()),
            )
            assert seen.trials_in_flight + seen.trials_succeeded <= self.numbers.success_threshold
        else:
            assert seen.trials_in_flight == seen.trials_succeeded == 0
        left = None if model.half_open_at is None else model.half_open_at - model.now
        assert seen.half_open_in_seconds == left
        if model.state is not CLOSED:
            opened_at = [
                at for new, reason, at in model.history if new is OPEN and reason is not Reason.RESET
            ][-1]
            assert seen.opened_seconds_ago == model.now - opened_at

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        seen, unseen = self.watched.snapshot(self.now), self.unwatched.snapshot(self.now)
        assert seen == unseen
        assert self.heard[0] == self.heard[1]
        assert [(one.new, one.reason) for one in self.heard[0]] == [one[:2] for one in self.model.history]
        assert [one.generation for one in self.heard[0]] == list(range(1, seen.generation + 1))


TestAgainstTheModel = BreakerMachine.TestCase
TestAgainstTheModel.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
