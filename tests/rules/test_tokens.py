"""The memory of tokens against a plain model of it. Both clocks are numbers here."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.exchange import Principal, Role
from lucid.core.rules.tokens import TokenMemory
from lucid.errors import ErrorCode

BAD, EXPIRED = ErrorCode.BAD_CREDENTIAL, ErrorCode.CREDENTIAL_EXPIRED
EPOCH = 1_893_456_000.0


class World:
    """Tokens that are good by signature, two clocks, and a count of verifications."""

    def __init__(self, capacity: int = 100, leeway: float = 5.0) -> None:
        self.wall = EPOCH
        self.now = 50.0
        self.verified: list[str] = []
        self.tokens: dict[str, Principal] = {}
        self.leeway = leeway
        self.memory = TokenMemory(self.verify, lambda: self.wall, capacity, leeway)

    def verify(self, token: str) -> Principal | ErrorCode | None:
        self.verified.append(token)
        if token.startswith("foreign"):
            return None
        principal = self.tokens.get(token)
        if principal is None:
            return BAD
        return principal if self.wall < principal.expires_at + self.leeway else EXPIRED

    def issue(self, token: str, life: float = 900.0, **changes: Any) -> Principal:
        given = {"user_id": "u", "family": "f", "token_id": token, "issued_at": self.wall, **changes}
        self.tokens[token] = Principal(
            role=Role.USER,
            tier="authenticated",
            identifier=given["user_id"],
            expires_at=self.wall + life,
            via="token",
            **given,
        )
        return self.tokens[token]

    def ask(self, token: str) -> Principal | ErrorCode | None:
        return self.memory.principal(token, self.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


def test_a_token_is_verified_once() -> None:
    world = World()
    principal = world.issue("a")
    assert [world.ask("a") for _ in range(5)] == [principal] * 5
    assert world.verified == ["a"]
    assert len(world.memory) == 1


def test_it_expires_with_its_leeway_and_is_not_verified_again() -> None:
    world = World()
    world.issue("a", life=900.0)
    world.advance(100.0)
    assert isinstance(world.ask("a"), Principal)
    world.advance(804.9)
    assert isinstance(world.ask("a"), Principal)
    world.advance(0.1)
    assert world.ask("a") is EXPIRED
    assert world.verified == ["a"]


def test_a_wall_clock_that_steps_back_lengthens_no_life() -> None:
    world = World()
    world.issue("a", life=900.0)
    world.ask("a")
    world.wall -= 3_600.0
    world.now += 905.0
    assert world.ask("a") is EXPIRED


def test_what_was_never_good_is_not_remembered() -> None:
    world = World()
    world.issue("old", life=-10.0)
    for token, code in (("x", BAD), ("y", BAD), ("old", EXPIRED)):
        assert world.ask(token) is code
        assert world.ask(token) is code
    assert len(world.memory) == 0
    assert world.verified == ["x", "x", "y", "y", "old", "old"]
    world.issue("x")
    assert isinstance(world.ask("x"), Principal)


def test_at_most_capacity_and_the_oldest_goes() -> None:
    world = World(capacity=3)
    for token in "abcd":
        world.issue(token)
        world.ask(token)
    assert len(world.memory) == 3
    for token in "bcd":
        world.ask(token)
    assert world.verified == list("abcd")
    world.ask("a")
    assert world.verified == list("abcda")
    assert len(world.memory) == 3


@pytest.mark.parametrize("capacity", [0, -1])
def test_no_capacity_is_a_mistake(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        World(capacity=capacity)


@pytest.mark.parametrize("known_before", [True, False], ids=["remembered", "new"])
def test_revocations_refuse_remembered_and_new_tokens(known_before: bool) -> None:
    world = World()
    world.issue("family", family="f1")
    world.issue("family too", family="f1", user_id="v")
    world.issue("token", family="f2", token_id="t")
    world.issue("user", family="f3", user_id="w")
    world.issue("other", family="f4", token_id="o", user_id="o")
    if known_before:
        for token in world.tokens:
            world.ask(token)
    until = world.wall + 900.0
    world.memory.revoke_family("f1", until)
    world.memory.revoke_token("t", until)
    world.memory.revoke_user("w", world.wall, until)
    for token in world.tokens:
        expected = world.tokens[token] if token == "other" else BAD
        assert world.ask(token) == expected
        assert world.ask(token) == expected
    assert len(world.verified) == 5


def test_a_user_may_log_in_again_at_once() -> None:
    world = World()
    world.issue("before", issued_at=world.wall + 0.250)
    world.issue("at", issued_at=world.wall + 0.300)
    world.issue("after", issued_at=world.wall + 0.301)
    world.memory.revoke_user("u", world.wall + 0.300, world.wall + 900.0)
    assert world.ask("before") is BAD
    assert world.ask("at") is BAD
    assert isinstance(world.ask("after"), Principal)
    # An older message that comes late takes nothing back.
    world.memory.revoke_user("u", world.wall, world.wall + 100.0)
    assert world.ask("at") is BAD


def test_a_revocation_of_a_user_compares_the_exact_moment() -> None:
    world = World()
    later = world.issue("later", moment=EPOCH + 0.5)
    world.issue("earlier", moment=EPOCH + 0.25)
    world.memory.revoke_user("u", EPOCH + 0.25, EPOCH + 900)
    assert (world.ask("later"), world.ask("earlier")) == (later, BAD)


def test_repeating_a_revocation_changes_nothing_and_a_shorter_one_shortens_nothing() -> None:
    world = World()
    world.issue("a", life=5_000.0)
    world.memory.revoke_family("f", world.wall + 5_100.0)
    world.memory.revoke_family("f", world.wall + 1.0)
    world.memory.revoke_token("a", world.wall + 5_100.0)
    world.memory.revoke_token("a", world.wall + 1.0)
    assert world.memory.revocations == 2
    world.advance(4_000.0)
    for i in range(2_000):
        world.memory.revoke_family(f"x{i}", world.wall + 1.0)
    assert world.ask("a") is BAD


def test_revocations_are_bounded_by_their_expiry() -> None:
    world = World()
    most = 0
    for i in range(20_000):
        world.advance(1.0)
        kind = (world.memory.revoke_family, world.memory.revoke_token)[i % 2]
        kind(f"{i}", world.wall + 900.0)
        if i % 3 == 0:
            world.memory.revoke_user(f"{i}", world.wall, world.wall + 900.0)
        most = max(most, world.memory.revocations)
    # 1,200 are active at any time; at most twice as many are held between two sweeps.
    assert most <= 2_500


def test_none_that_is_active_is_swept() -> None:
    world = World()
    world.issue("a", life=100_000.0, issued_at=world.wall)
    world.issue("b", life=100_000.0, family="g", user_id="v", issued_at=world.wall)
    world.memory.revoke_family("f", world.wall + 100_000.0)
    world.memory.revoke_user("v", world.wall, world.wall + 100_000.0)
    for i in range(10_000):
        world.advance(1.0)
        world.memory.revoke_family(f"{i}", world.wall + 10.0)
    assert world.ask("a") is BAD
    assert world.ask("b") is BAD


def test_what_others_said_is_believed_for_its_time_and_then_asked_for_again() -> None:
    world = World()
    said = world.issue("foreign")
    assert world.ask("foreign") is None
    world.memory.remember("foreign", said, world.now, 60.0)
    world.advance(59.9)
    assert world.ask("foreign") is said
    assert world.verified == ["foreign"]
    world.advance(0.1)
    assert world.ask("foreign") is None
    assert len(world.memory) == 0


def test_what_others_said_is_not_believed_beyond_the_expiry() -> None:
    world = World(leeway=0.0)
    said = world.issue("foreign", life=10.0)
    world.memory.remember("foreign", said, world.now, 60.0)
    world.advance(9.9)
    assert world.ask("foreign") is said
    world.advance(0.1)
    assert world.ask("foreign") is None


def test_revocations_hold_for_what_others_say_too() -> None:
    world = World()
    said = world.issue("foreign")
    world.memory.remember("foreign", said, world.now, 60.0)
    world.memory.revoke_family("f", world.wall + 900)
    assert world.ask("foreign") is BAD
    world.advance(60.0)
    world.memory.remember("foreign", said, world.now, 60.0)
    assert world.ask("foreign") is BAD


def test_what_others_said_takes_its_place_among_the_bounded() -> None:
    world = World(capacity=2)
    said = world.issue("foreign")
    for n in range(4):
        world.memory.remember(f"foreign {n % 3}", said, world.now, 60.0)
    assert len(world.memory) == 2
    assert [world.ask(f"foreign {n}") for n in range(3)] == [said, None, said]


def test_a_revocation_that_is_known_costs_nothing_again() -> None:
    world = World()
    world.issue("a")
    world.ask("a")
    for _ in range(2):
        world.memory.revoke_family("f2", EPOCH + 900)
        world.memory.revoke_token("t2", EPOCH + 900)
        world.memory.revoke_user("u2", EPOCH, EPOCH + 900)
        version = world.memory._version
    world.memory.revoke_user("u2", EPOCH - 1, EPOCH + 800)
    assert world.memory._version == version == 3


def test_forget() -> None:
    world = World()
    world.issue("a")
    world.ask("a")
    del world.tokens["a"]
    assert isinstance(world.ask("a"), Principal)
    world.memory.forget()
    assert world.ask("a") is BAD


actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("family"), st.integers(0, 3), st.integers(1, 40)),
        st.tuples(st.just("token"), st.integers(0, 7), st.integers(1, 40)),
        st.tuples(st.just("user"), st.integers(0, 1), st.integers(0, 10)),
        st.tuples(st.just("advance"), st.integers(0, 6), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None)  # the machine may be busy; nothing here is about speed
@given(actions, st.integers(1, 9))
def test_as_if_every_token_were_judged_anew(steps: list[tuple[str, int, int]], capacity: int) -> None:
    """Whatever happens, the answer is that of a plain model without any memory of tokens."""
    world = World(capacity, leeway=2.0)
    for i in range(8):
        life = 10.0 + 3 * i
        world.issue(f"{i}", life, family=f"f{i % 4}", user_id=f"u{i % 2}", issued_at=world.wall + i)
    families: set[str] = set()
    tokens: set[str] = set()
    users: dict[str, float] = {}
    for action, number, amount in steps:
        # Revocations last until what they name has expired, as those who make them see to it.
        until = world.wall + 60.0
        if action == "advance":
            world.advance(float(number))
        elif action == "family":
            world.memory.revoke_family(f"f{number}", until)
            families.add(f"f{number}")
        elif action == "token":
            world.memory.revoke_token(f"{number}", until)
            tokens.add(f"{number}")
        elif action == "user":
            world.memory.revoke_user(f"u{number}", EPOCH + amount, until)
            users[f"u{number}"] = max(EPOCH + amount, users.get(f"u{number}", 0.0))
        else:
            principal = world.tokens[f"{number}"]
            revoked = (
                principal.family in families
                or principal.token_id in tokens
                or principal.issued_at <= users.get(principal.user_id, 0.0)
            )
            answer = world.ask(f"{number}")
            if world.wall >= principal.expires_at + 2.0:
                assert answer in ((BAD, EXPIRED) if revoked else (EXPIRED,))
            else:
                assert answer == (BAD if revoked else principal)
        assert len(world.memory) <= capacity
