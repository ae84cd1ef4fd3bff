"""What a worker remembers about API keys, and for how long. Time is a number here."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid.core.exchange import Principal, Role
from lucid.core.rules.keys import KeyMemory
from lucid.errors import ErrorCode

FOUND = Principal(Role.USER, "authenticated", "u1", user_id="u1", via="api_key")
MISSED = ErrorCode.BAD_CREDENTIAL
ANSWERS = [FOUND, MISSED]


def digest(number: int) -> bytes:
    return number.to_bytes(32)


@pytest.mark.parametrize(
    "answer, seconds", [(FOUND, 10.0), (MISSED, 5.0), (ErrorCode.CREDENTIAL_EXPIRED, 5.0)]
)
def test_an_answer_is_known_for_its_seconds_and_no_longer(
    answer: Principal | ErrorCode, seconds: float
) -> None:
    keys = KeyMemory()
    assert keys.get(digest(1), 100.0) is None
    keys.put(digest(1), answer, 100.0)
    for later in (0.0, seconds / 2, seconds - 0.125):
        assert keys.get(digest(1), 100.0 + later) is answer
    for later in (seconds, seconds + 0.125, 1e9):
        assert keys.get(digest(1), 100.0 + later) is None
    assert keys.get(digest(2), 100.0) is None


def test_both_times_can_be_chosen() -> None:
    keys = KeyMemory(found_seconds=2.0, missed_seconds=30.0)
    keys.put(digest(1), FOUND, 0.0)
    keys.put(digest(2), MISSED, 0.0)
    assert [keys.get(digest(number), 2.0) for number in (1, 2)] == [None, MISSED]
    assert keys.get(digest(2), 30.0) is None


def test_a_look_does_not_prolong_what_is_known() -> None:
    """Else a withdrawn key would live for as long as it is used."""
    keys = KeyMemory()
    keys.put(digest(1), FOUND, 0.0)
    assert [keys.get(digest(1), float(now)) for now in range(12)] == [FOUND] * 10 + [None] * 2


@pytest.mark.parametrize(
    "first, second, until", [(FOUND, MISSED, 8.0), (MISSED, FOUND, 13.0), (FOUND, FOUND, 13.0)]
)
def test_a_later_answer_takes_the_place_of_the_earlier(
    first: Principal | ErrorCode, second: Principal | ErrorCode, until: float
) -> None:
    keys = KeyMemory()
    keys.put(digest(1), first, 0.0)
    keys.put(digest(1), second, 3.0)
    assert len(keys) == 1
    assert keys.get(digest(1), until - 0.125) is second
    assert keys.get(digest(1), until) is None


def test_where_there_is_no_room_the_oldest_answer_goes() -> None:
    keys = KeyMemory(3)
    for number in (1, 2, 3):
        keys.put(digest(number), FOUND, float(number))
    keys.put(digest(1), FOUND, 4.0)  # asked for again: now 2 is the oldest
    assert len(keys) == 3
    keys.put(digest(4), FOUND, 5.0)
    assert [keys.get(digest(number), 5.0) for number in (1, 2, 3, 4)] == [FOUND, None, FOUND, FOUND]
    assert len(keys) == 3


def test_a_flood_of_bad_keys_pushes_no_good_one_out() -> None:
    keys = KeyMemory(3)
    keys.put(digest(0), FOUND, 0.0)
    for number in range(1, 100):
        keys.put(digest(number), MISSED, 1.0)
    assert keys.get(digest(0), 2.0) is FOUND
    assert len(keys) == 4


def test_a_key_that_was_withdrawn_is_asked_for_again_and_no_other() -> None:
    keys = KeyMemory()
    for number in (0, 1):
        keys.put(digest(number), FOUND, 0.0)
    keys.forget(digest(0))
    keys.forget(digest(7))
    assert [keys.get(digest(number), 0.0) for number in (0, 1)] == [None, FOUND]


def test_all_keys_of_a_user_are_asked_for_again() -> None:
    other = Principal(Role.USER, "authenticated", "u2", user_id="u2", via="api_key")
    keys = KeyMemory()
    for number, answer in enumerate([FOUND, other, FOUND, MISSED]):
        keys.put(digest(number), answer, 0.0)
    keys.forget_user("u1")
    assert [keys.get(digest(number), 0.0) for number in range(4)] == [None, other, None, MISSED]


@pytest.mark.parametrize(
    "withdraw", [lambda keys: keys.forget(digest(0)), lambda keys: keys.forget_user("u1")]
)
def test_an_answer_from_before_a_withdrawal_is_not_kept(withdraw: Callable[[KeyMemory], None]) -> None:
    keys = KeyMemory()
    asked_in = keys.generation
    withdraw(keys)
    keys.put(digest(0), FOUND, 0.0, generation=asked_in)
    assert keys.get(digest(0), 0.0) is None
    keys.put(digest(0), FOUND, 0.0, generation=keys.generation)
    assert keys.get(digest(0), 0.0) is FOUND


def test_a_key_is_not_known_beyond_its_own_end() -> None:
    keys = KeyMemory()
    keys.put(digest(0), FOUND, 100.0, seconds_left=2.0)
    assert (keys.get(digest(0), 101.9), keys.get(digest(0), 102.0)) == (FOUND, None)
    keys.put(digest(0), FOUND, 100.0, seconds_left=1_000.0)
    assert (keys.get(digest(0), 109.9), keys.get(digest(0), 110.0)) == (FOUND, None)


def test_who_failed_too_often_is_asked_about_once_a_second() -> None:
    keys = KeyMemory()
    for _ in range(3):
        assert keys.may_ask("a", 3, 100.0)
        keys.failed("a", 100.0)
    asked = [keys.may_ask("a", 3, 100.0 + step / 4) for step in range(9)]
    assert asked == [True, False, False, False, True, False, False, False, True]
    assert keys.may_ask("b", 3, 100.0)
    assert all(keys.may_ask("a", 3, 160.0) for _ in range(3)), "a minute after the first"
    keys.failed("a", 160.0)
    assert keys.may_ask("a", 2, 160.0)


def test_failures_are_bounded() -> None:
    keys = KeyMemory(capacity=3)
    for number in range(10):
        keys.failed(f"a{number}", 0.0)
        keys.may_ask(f"a{number}", 1, 0.0)
    assert [keys.may_ask(f"a{number}", 1, 0.5) for number in range(10)] == [True] * 7 + [False] * 3


def test_what_was_known_lately_may_stand_in_unless_it_was_withdrawn() -> None:
    keys = KeyMemory()
    keys.put(digest(0), FOUND, 100.0)
    keys.put(digest(1), FOUND, 100.0, seconds_left=20.0)
    keys.put(digest(2), MISSED, 100.0)
    assert [keys.get(digest(n), 115.0) for n in range(3)] == [None] * 3
    assert [keys.stale(digest(n), 115.0) for n in range(3)] == [FOUND, FOUND, None]
    assert [keys.stale(digest(n), 120.0) for n in range(2)] == [FOUND, None], "never beyond its own end"
    assert [keys.stale(digest(0), now) for now in (169.9, 170.0)] == [FOUND, None]
    keys.forget(digest(0))
    assert keys.stale(digest(0), 115.0) is None


step = st.tuples(st.integers(0, 7), st.sampled_from([None, *ANSWERS]), st.sampled_from([0.0, 0.5, 1.0, 4.5]))


@given(st.integers(1, 4), st.lists(step, max_size=60))
def test_it_is_bounded_and_never_wrong(
    capacity: int, steps: list[tuple[int, Principal | ErrorCode | None, float]]
) -> None:
    """Against the whole history: the last `capacity` answers are known, each until its time; others, never wrongly."""
    keys = KeyMemory(capacity)
    history: dict[int, tuple[float, Principal | ErrorCode]] = {}
    now = 0.0
    for number, answer, pause in steps:
        now += pause
        if answer is not None:
            keys.put(digest(number), answer, now)
            history.pop(number, None)
            history[number] = (now + (10.0 if answer is FOUND else 5.0), answer)
        recent = list(history)[-capacity:]
        for key in range(8):
            expected = history[key][1] if key in history and now < history[key][0] else None
            known = keys.get(digest(key), now)
            assert known == expected or (known is None and key not in recent)
        assert len(keys) <= 2 * capacity
