"""What the repositories promise, on the real ones and on the fakes: one suite for both."""

import asyncio
import datetime as dt
import inspect
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from lucid.core.security import nonces
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.documents import (
    ApiKeyDocument,
    FamilyDocument,
    HardwareWallet,
    OutboxEntry,
    SessionDocument,
    UserDocument,
)
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.session_repository import SessionRepository
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from tests.support.fake_repositories import (
    FakeApiKeyRepository,
    FakeRefreshTokenRepository,
    FakeSessionRepository,
    FakeUserRepository,
)

NOW = dt.datetime(2030, 1, 2, 3, 4, 5, 678_000, tzinfo=dt.UTC)
MS = dt.timedelta(milliseconds=1)
MINUTE = dt.timedelta(minutes=1)
DAY = dt.timedelta(days=1)
FINE = dt.timedelta(microseconds=999)
"""What is finer than the stored times."""

PAIRS = (
    (UserRepository, FakeUserRepository),
    (RefreshTokenRepository, FakeRefreshTokenRepository),
    (ApiKeyRepository, FakeApiKeyRepository),
    (SessionRepository, FakeSessionRepository),
)

replace = msgspec.structs.replace
_numbers = itertools.count()


class World:
    """The four repositories of one kind over nothing, and their clock."""

    users: UserRepository | FakeUserRepository
    refresh_tokens: RefreshTokenRepository | FakeRefreshTokenRepository
    api_keys: ApiKeyRepository | FakeApiKeyRepository
    sessions: SessionRepository | FakeSessionRepository

    def __init__(self, connection: Connection | None) -> None:
        self.now = NOW
        if connection is None:
            self.users = FakeUserRepository(lambda: self.now)
            self.refresh_tokens = FakeRefreshTokenRepository()
            self.api_keys = FakeApiKeyRepository()
            self.sessions = FakeSessionRepository(lambda: self.now)
        else:
            indexes = Indexes(connection)
            self.users = UserRepository(connection, indexes, lambda: self.now)
            self.refresh_tokens = RefreshTokenRepository(connection)
            self.api_keys = ApiKeyRepository(connection, indexes)
            self.sessions = SessionRepository(connection, lambda: self.now)


def contract(test: Callable[[World], Awaitable[None]]) -> Callable[..., None]:
    """The test on the fakes and on the real repositories, in a database of its own."""

    @pytest.mark.parametrize("kind", ["fake", "real"])
    def both(kind: str, request: pytest.FixtureRequest) -> None:
        async def main() -> None:
            if kind == "fake":
                await test(World(None))
                return
            connection = Connection(
                request.getfixturevalue("mongo").in_database(f"contract_{next(_numbers)}")
            )
            try:
                await test(World(connection))
            finally:
                connection.close()

        asyncio.run(main())

    both.__doc__ = test.__doc__
    return both


async def conflict(awaitable: Awaitable[object], *fields: str) -> None:
    with pytest.raises(GatewayError) as caught:
        await awaitable
    assert caught.value.code is ErrorCode.CONFLICT
    assert caught.value.details == {"fields": list(fields)}


@pytest.mark.parametrize(("real", "fake"), PAIRS)
def test_the_fakes_have_the_same_methods(real: type, fake: type) -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}

    assert methods(fake) == methods(real)
    assert methods(real)


# ---- users


def user(**changes: Any) -> UserDocument:
    made = UserDocument(user_id=nonces.new_id(), live=True, role="user", created_at=NOW, updated_at=NOW)
    return replace(made, **changes)


@contract
async def test_a_user_is_stored_whole_and_found(w: World) -> None:
    given = user(
        tron_address="T1",
        email="Ann@Example.ORG",
        password="pbkdf2$...",
        hardware_wallet=HardwareWallet("ledger", "nano"),
        last_login_at=NOW + FINE,
        created_at=NOW + FINE,
        email_key="not this",
    )
    stored = await w.users.create(given)
    assert stored == replace(given, email_key="ann@example.org", last_login_at=NOW, created_at=NOW)
    assert await w.users.find_by_id(stored.user_id) == stored
    assert await w.users.find_by_tron_address("T1") == stored
    for spelling in ("Ann@Example.ORG", "ann@example.org", "ANN@EXAMPLE.ORG"):
        assert await w.users.find_by_email(spelling) == stored
    assert await w.users.find_by_id("x") is None
    assert await w.users.find_by_email("x") is None
    assert await w.users.find_by_email("") is None
    assert await w.users.find_by_tron_address("x") is None


@contract
async def test_letters_beyond_ascii_are_cased_too(w: World) -> None:
    stored = await w.users.create(user(email="ÄRGER@example.org"))
    assert await w.users.find_by_email("ärger@example.org") == stored
    await conflict(w.users.create(user(email="Ärger@example.org")), "email")


@contract
async def test_address_and_email_are_unique_among_live_users_who_have_one(w: World) -> None:
    await w.users.create(user(tron_address="T1", email="a@b"))
    await conflict(w.users.create(user(tron_address="T1", email="c@b")), "tron_address")
    await conflict(w.users.create(user(tron_address="T2", email="A@B")), "email")
    for _ in range(3):  # any number without one of them, or without both
        await w.users.create(user())
    other = await w.users.create(user(email="c@b"))
    await conflict(w.users.create(user(user_id=other.user_id)), "user_id")
    await conflict(w.users.update(other.user_id, {"tron_address": "T1"}), "tron_address")
    await conflict(w.users.update(other.user_id, {"email": "A@b", "role": "admin"}), "email")
    assert await w.users.find_by_id(other.user_id) == other
    assert await w.users.find_by_email("c@b") == other


@contract
async def test_update_sets_and_removes(w: World) -> None:
    old = await w.users.create(user(email="a@b", tron_address="T1"))
    w.now = NOW + DAY + FINE
    new = await w.users.update(old.user_id, {"role": "node_operator", "email": None, "last_login_at": w.now})
    assert new == replace(
        old,
        role="node_operator",
        email=None,
        email_key=None,
        updated_at=NOW + DAY,
        last_login_at=NOW + DAY,
    )
    assert await w.users.find_by_id(old.user_id) == new
    assert await w.users.find_by_email("a@b") is None
    moved = await w.users.update(old.user_id, {"email": "New@B", "tron_address": "T2"})
    assert moved is not None
    assert (moved.email, moved.email_key) == ("New@B", "new@b")
    assert await w.users.find_by_email("new@b") == moved
    assert await w.users.find_by_tron_address("T1") is None
    await w.users.create(user(tron_address="T1", email="a@b"))  # both are free
    recased = await w.users.update(old.user_id, {"email": "NEW@b"})  # one's own is no conflict
    assert recased is not None
    assert recased.email == "NEW@b"
    assert await w.users.update("x", {"role": "admin"}) is None


@contract
async def test_update_only_as_expected(w: World) -> None:
    old = await w.users.create(user(password="p1", role="user"))
    assert await w.users.update(old.user_id, {"password": "p2"}, expected={"password": "p0"}) is None
    assert await w.users.update(old.user_id, {"password": "p2"}, expected={"password": None}) is None
    assert await w.users.update(old.user_id, {"role": "x"}, expected={"password": "p1", "role": "y"}) is None
    assert await w.users.find_by_id(old.user_id) == old
    new = await w.users.update(
        old.user_id, {"password": "p2"}, expected={"password": "p1", "email": None, "updated_at": NOW}
    )
    assert new is not None
    assert new.password == "p2"


@contract
async def test_the_moment_of_revocation_never_goes_back(w: World) -> None:
    old = await w.users.create(user(email="a@b"))
    new = await w.users.update(old.user_id, {"role": "admin"}, revoke_tokens_at=NOW + DAY + FINE)
    assert new is not None
    assert new.tokens_revoked_at == NOW + DAY
    assert await w.users.update(old.user_id, {}, revoke_tokens_at=NOW) == new
    assert (
        await w.users.update(
            old.user_id, {"role": "x"}, expected={"role": "y"}, revoke_tokens_at=NOW + 9 * DAY
        )
        is None
    )
    assert await w.users.find_by_id(old.user_id) == new


@contract
async def test_deleted_users_are_gone_and_what_was_theirs_is_free(w: World) -> None:
    old = await w.users.create(user(email="a@b", tron_address="T1", password="p"))
    assert await w.users.delete(old.user_id, revoke_tokens_at=NOW + MINUTE)
    assert not await w.users.delete(old.user_id, revoke_tokens_at=NOW + DAY)
    assert not await w.users.delete("x", revoke_tokens_at=NOW)
    assert await w.users.find_by_id(old.user_id) is None
    assert await w.users.find_by_tron_address("T1") is None
    assert await w.users.find_by_email("a@b") is None
    assert await w.users.update(old.user_id, {"role": "admin"}) is None
    await conflict(w.users.create(user(user_id=old.user_id)), "user_id")
    new = await w.users.create(user(email="A@B", tron_address="T1"))
    assert await w.users.find_by_email("a@b") == new
    assert await w.users.list_users(0, 10) == ([new], 1)
    assert await w.users.revoked_since(NOW) == [(old.user_id, NOW + MINUTE)]


@contract
async def test_revoked_since_tells_of_live_and_deleted_users(w: World) -> None:
    a, b, c = [await w.users.create(user(tron_address=name)) for name in "abc"]
    await w.users.update(a.user_id, {}, revoke_tokens_at=NOW)
    await w.users.delete(b.user_id, revoke_tokens_at=NOW + DAY)
    await w.users.update(c.user_id, {"role": "admin"})
    assert sorted(await w.users.revoked_since(NOW)) == sorted([(a.user_id, NOW), (b.user_id, NOW + DAY)])
    assert await w.users.revoked_since(NOW + MS) == [(b.user_id, NOW + DAY)]
    assert await w.users.revoked_since(NOW + DAY + FINE) == [(b.user_id, NOW + DAY)]
    assert await w.users.revoked_since(NOW + DAY + MS) == []


@contract
async def test_a_wallets_login_makes_its_user_once(w: World) -> None:
    w.now = NOW + FINE
    first = await w.users.upsert_by_tron_address("T1", "id-1")
    assert first == replace(user(), user_id="id-1", tron_address="T1", last_login_at=NOW)
    w.now = NOW + DAY
    await w.users.update("id-1", {"role": "admin"})
    device = HardwareWallet("ledger", "nano-1")
    second = await w.users.upsert_by_tron_address("T1", "id-2", device)
    assert second == replace(
        first, role="admin", updated_at=w.now, last_login_at=w.now, hardware_wallet=device
    )
    assert (await w.users.upsert_by_tron_address("T1", "id-3")).hardware_wallet == device
    assert (await w.users.upsert_by_tron_address("T2", "id-4")).user_id == "id-4"
    await conflict(w.users.upsert_by_tron_address("T3", "id-1"), "user_id")
    await w.users.delete("id-1", revoke_tokens_at=NOW)
    new = await w.users.upsert_by_tron_address("T1", "id-5")
    assert (new.user_id, new.role, new.hardware_wallet) == ("id-5", "user", None)


@contract
async def test_the_clusters_user_is_made_and_follows_it(w: World) -> None:
    first = await w.users.upsert_from_cluster("$id", "$T", "$role")  # nothing of it is an expression
    assert first == replace(user(), user_id="$id", tron_address="$T", role="$role", last_login_at=NOW)
    assert await w.users.find_by_tron_address("$T") == first
    device = HardwareWallet("trezor", "$x")
    await w.users.update("$id", {"email": "a@b", "password": "p"})
    w.now = NOW + DAY
    second = await w.users.upsert_from_cluster("$id", "T2", "admin", device)
    assert second == replace(
        first,
        tron_address="T2",
        role="admin",
        email="a@b",
        email_key="a@b",
        password="p",
        updated_at=w.now,
        last_login_at=w.now,
        hardware_wallet=device,
    )
    other_device = HardwareWallet("ledger", "y")
    assert (await w.users.upsert_from_cluster("$id", "T2", "admin")).hardware_wallet == device
    assert (await w.users.upsert_from_cluster("$id", "T2", "x", other_device)).hardware_wallet == other_device
    assert await w.users.find_by_tron_address("$T") is None


@contract
async def test_the_clusters_user_may_not_have_anothers_address(w: World) -> None:
    mine = await w.users.create(user(tron_address="T1"))
    await conflict(w.users.upsert_from_cluster("c", "T1", "user"), "tron_address")
    assert await w.users.find_by_id("c") is None
    await w.users.upsert_from_cluster("c", "T2", "user")
    await conflict(w.users.upsert_from_cluster("c", "T1", "admin"), "tron_address")
    assert (await w.users.upsert_from_cluster("c", "T2", "user")).role == "user"
    await w.users.delete(mine.user_id, revoke_tokens_at=NOW)
    assert (await w.users.upsert_from_cluster("c", "T1", "user")).user_id == "c"


@contract
async def test_the_cluster_brings_a_deleted_user_back(w: World) -> None:
    old = await w.users.create(user(user_id="c", tron_address="T1", email="a@b", password="p"))
    await w.users.delete("c", revoke_tokens_at=NOW + MINUTE)
    other = await w.users.create(user(email="a@b"))  # meanwhile somebody else's
    w.now = NOW + DAY
    back = await w.users.upsert_from_cluster("c", "T1", "node_operator")
    assert back == replace(
        old,
        role="node_operator",
        email=None,
        email_key=None,
        password=None,
        updated_at=w.now,
        last_login_at=w.now,
        tokens_revoked_at=NOW + MINUTE,
    )
    assert await w.users.find_by_id("c") == back
    assert await w.users.find_by_email("a@b") == other


@contract
async def test_pages_of_users(w: World) -> None:
    made = [await w.users.create(user(tron_address=f"T{i}", created_at=NOW + i * DAY)) for i in range(3)]
    twins = [await w.users.create(user(user_id=f"id-{i}", created_at=NOW)) for i in (2, 1)]
    newest_first = [made[2], made[1], *sorted([made[0], *twins], key=lambda each: each.user_id)]
    assert await w.users.list_users(0, 10) == (newest_first, 5)
    assert await w.users.list_users(0, 2) == (newest_first[:2], 5)
    assert await w.users.list_users(4, 2) == (newest_first[4:], 5)
    assert await w.users.list_users(5, 2) == ([], 5)


@contract
async def test_users_filtered(w: World) -> None:
    async def ids(**filters: Any) -> str:
        found, total = await w.users.list_users(0, 10, **filters)
        assert total == len(found)
        return "".join(each.user_id for each in found)

    for name, role in (("a", "user"), ("b", "admin"), ("c", "super_admin"), ("d", "user"), ("e", "weird")):
        await w.users.create(user(user_id=name, tron_address=f"T{name}", email=f"{name}@B", role=role))
    await w.users.create(user(user_id="n", role="user"))  # no address at all
    listed = frozenset({"Tb", "Td", "Tz"})
    assert await ids() == "abcden"
    assert await ids(email="A@b") == "a"
    assert await ids(email="z@b") == ""
    assert await ids(tron_address="Tb") == "b"
    assert await ids(tron_address="Tb", email="a@b") == ""
    assert await ids(role="user") == "adn"
    assert await ids(role="user", super_admin_addresses=listed) == "an"
    assert await ids(role="admin", super_admin_addresses=listed) == ""
    assert await ids(role="super_admin") == "c"
    assert await ids(role="super_admin", super_admin_addresses=listed) == "bcd"
    assert await ids(role="super_admin", tron_address="Td", super_admin_addresses=listed) == "d"
    assert await ids(role="user", tron_address="Td", super_admin_addresses=listed) == ""
    assert await ids(role="weird", super_admin_addresses=listed) == "e"
    assert await ids(super_admin_addresses=listed) == "abcden"
    found, total = await w.users.list_users(1, 1, role="user")
    assert ([each.user_id for each in found], total) == (["d"], 3)


# ---- refresh tokens

FIRST, SECOND, THIRD = (bytes([i]) * 32 for i in (1, 2, 3))


async def family(
    w: World,
    name: str = "f",
    user_id: str = "u",
    token: bytes = FIRST,
    expires_at: dt.datetime = NOW + 7 * DAY,
) -> None:
    await w.refresh_tokens.start_family(name, user_id, token, NOW, expires_at)


async def found_family(w: World, token: bytes, now: dt.datetime = NOW) -> FamilyDocument:
    found = await w.refresh_tokens.find_family(token, now)
    assert found is not None
    return found


@contract
async def test_a_family_is_found_by_every_token_it_ever_had(w: World) -> None:
    await family(w)
    found = await found_family(w, FIRST)
    assert found == FamilyDocument("f", "u", FIRST, NOW, NOW + 7 * DAY)
    assert await w.refresh_tokens.rotate(found, FIRST, SECOND, NOW + DAY)
    assert await w.refresh_tokens.rotate(found, SECOND, THIRD, NOW + 2 * DAY)
    for token in (FIRST, SECOND, THIRD):
        assert await found_family(w, token, NOW + 3 * DAY) == replace(found, current=THIRD)
    assert not await w.refresh_tokens.rotate(found, FIRST, b"x" * 32, NOW)
    assert (await found_family(w, b"x" * 32)).current == THIRD  # known from then on, and not good
    assert await w.refresh_tokens.find_family(b"y" * 32, NOW) is None
    assert await w.refresh_tokens.find_family(b"f", NOW) is None


@contract
async def test_a_family_ends_at_its_first_expiry(w: World) -> None:
    await family(w, expires_at=NOW + 7 * DAY + FINE)
    found = await found_family(w, FIRST, NOW + 7 * DAY - MS)
    assert await w.refresh_tokens.find_family(FIRST, NOW + 7 * DAY) is None
    assert not await w.refresh_tokens.rotate(found, FIRST, SECOND, NOW + 7 * DAY)


@contract
async def test_a_family_and_a_token_start_once(w: World) -> None:
    await family(w)
    await conflict(family(w, token=SECOND), "_id")
    await conflict(family(w, name="g"), "_id")
    found = await found_family(w, FIRST)
    assert found.family == "f"
    await conflict(w.refresh_tokens.rotate(found, FIRST, FIRST, NOW), "_id")


@contract
async def test_a_revoked_family_cannot_be_advanced(w: World) -> None:
    await family(w)
    found = await found_family(w, FIRST)
    assert await w.refresh_tokens.revoke_family("f", NOW + FINE)
    assert not await w.refresh_tokens.revoke_family("f", NOW + DAY)
    assert not await w.refresh_tokens.revoke_family("x", NOW)
    assert not await w.refresh_tokens.rotate(found, FIRST, SECOND, NOW)
    assert await found_family(w, FIRST) == replace(found, revoked_at=NOW)
    assert (await w.refresh_tokens.revoked_since(NOW)).families == [("f", NOW, None)]


@contract
async def test_the_end_of_a_login_without_a_row_is_kept(w: World) -> None:
    revoke = w.refresh_tokens.revoke_family
    assert not await revoke("minted", NOW, user_id="u")  # until when is not known
    assert not await revoke("minted", NOW, expires_at=NOW + DAY)  # nor whose it is
    assert (await w.refresh_tokens.revoked_since(NOW - DAY)).families == []
    assert await revoke("minted", NOW + FINE, user_id="u", expires_at=NOW + DAY + FINE)
    assert not await revoke("minted", NOW + MINUTE, user_id="u", expires_at=NOW + 2 * DAY)
    assert not await revoke("minted", NOW + MINUTE)
    assert (await w.refresh_tokens.revoked_since(NOW)).families == [("minted", NOW, NOW + DAY)]
    assert (await w.refresh_tokens.revoked_since(NOW + MS)).families == []
    assert (await w.refresh_tokens.revoked_since(NOW + MS, lasting=True)).families == [
        ("minted", NOW, NOW + DAY)
    ]
    assert await w.refresh_tokens.revoke_user("u", NOW) == 0  # it is no live login
    assert await w.refresh_tokens.find_family(b"", NOW) is None


@contract
async def test_the_row_of_an_ended_login_stays_as_long_as_its_last_access_token(w: World) -> None:
    await family(w, expires_at=NOW + MINUTE)
    await family(w, "long", token=SECOND)
    for name in ("f", "long"):
        assert await w.refresh_tokens.revoke_family(name, NOW, user_id="u", expires_at=NOW + 15 * MINUTE)
    families = (await w.refresh_tokens.revoked_since(NOW)).families
    assert sorted(families) == [("f", NOW, None), ("long", NOW, None)]
    assert [
        await w.refresh_tokens.find_family(token, NOW + 2 * MINUTE) is None for token in (FIRST, SECOND)
    ] == [
        False,
        False,
    ]


@contract
async def test_what_could_not_be_told_is_counted(w: World) -> None:
    assert await w.refresh_tokens.untold() == 0
    await asyncio.gather(*(w.refresh_tokens.count_untold() for _ in range(5)))
    assert await w.refresh_tokens.untold() == 5
    revoked = await w.refresh_tokens.revoked_since(NOW - 1_000 * DAY, lasting=True)
    assert (revoked.families, revoked.users) == ([], [])


@contract
async def test_all_logins_of_one_user_end(w: World) -> None:
    for i, owner in enumerate(["u", "u", "u", "v"]):
        await family(w, f"f{i}", owner, bytes([i]) * 32)
    await w.refresh_tokens.revoke_family("f0", NOW)
    assert await w.refresh_tokens.revoke_user("u", NOW + DAY) == 2
    assert await w.refresh_tokens.revoke_user("u", NOW + DAY) == 0
    assert (await found_family(w, bytes([3]) * 32)).revoked_at is None
    revoked = await w.refresh_tokens.revoked_since(NOW)
    assert sorted(name for name, _, _ in revoked.families) == ["f0", "f1", "f2"]
    assert revoked.users == []
    assert len((await w.refresh_tokens.revoked_since(NOW + MS)).families) == 2


@contract
async def test_word_that_all_access_tokens_of_a_user_are_dead(w: World) -> None:
    revoke = w.refresh_tokens.revoke_user
    await family(w)
    assert await revoke("u", NOW + DAY + FINE, tokens_until=NOW + 9 * DAY) == 1
    assert await revoke("u", NOW, tokens_until=NOW + 2 * DAY) == 0  # late, and has nothing to add
    assert await revoke("nobody", NOW, tokens_until=NOW + DAY) == 0
    assert sorted((await w.refresh_tokens.revoked_since(NOW)).users) == [("nobody", NOW), ("u", NOW + DAY)]
    revoked = await w.refresh_tokens.revoked_since(NOW + MS)
    assert revoked.users == [("u", NOW + DAY)]
    assert revoked.families == [("f", NOW + DAY, None)]
    await revoke("u", NOW + 3 * DAY, tokens_until=NOW + 10 * DAY)
    assert (await w.refresh_tokens.revoked_since(NOW + 3 * DAY)).users == [("u", NOW + 3 * DAY)]


# ---- API keys


def key(name: str = "k", user_id: str = "u", **changes: Any) -> ApiKeyDocument:
    made = ApiKeyDocument(
        key_id=name,
        digest=name.encode().ljust(32, b"."),
        user_id=user_id,
        name="my key",
        role="user",
        created_at=NOW,
    )
    return replace(made, **changes)


@contract
async def test_api_keys_by_digest(w: World) -> None:
    stored = key()
    await w.api_keys.create(replace(stored, created_at=NOW + FINE))
    assert await w.api_keys.find_by_digest(stored.digest) == stored
    assert await w.api_keys.find_by_digest(bytes(32)) is None
    await conflict(w.api_keys.create(replace(stored, key_id="other")), "digest")
    await conflict(w.api_keys.create(replace(stored, digest=bytes(32))), "key_id")


@contract
async def test_an_api_key_expires(w: World) -> None:
    stored = key(expires_at=NOW + DAY)
    await w.api_keys.create(stored)
    assert await w.api_keys.find_by_digest(stored.digest) == stored  # whoever asks looks at its end
    assert await w.api_keys.list_of_user("u", 0, 10) == ([stored], 1)  # its owner sees why it opens nothing
    assert await w.api_keys.count_live("u") == 1
    assert await w.api_keys.count_live("u", NOW + DAY - MS) == 1
    assert await w.api_keys.count_live("u", NOW + DAY) == 0


@contract
async def test_api_keys_of_a_user(w: World) -> None:
    keys = [key(f"k{i}", created_at=NOW + i * DAY) for i in range(4)]
    for each in keys:
        await w.api_keys.create(each)
    twin = key("a", created_at=NOW)
    await w.api_keys.create(twin)
    await w.api_keys.create(key("other", "v"))
    await w.api_keys.revoke("u", "k3", NOW)
    newest_first = [keys[2], keys[1], twin, keys[0]]
    assert await w.api_keys.list_of_user("u", 0, 10) == (newest_first, 4)
    assert await w.api_keys.list_of_user("u", 1, 2) == (newest_first[1:3], 4)
    assert await w.api_keys.list_of_user("u", 4, 2) == ([], 4)
    assert await w.api_keys.list_of_user("x", 0, 2) == ([], 0)
    assert [await w.api_keys.count_live(each) for each in "uvx"] == [4, 1, 0]
    assert await w.api_keys.count_live("u", NOW) == 4


@contract
async def test_an_api_key_is_revoked_by_its_owner_once(w: World) -> None:
    await w.api_keys.create(key())
    assert await w.api_keys.revoke("v", "k", NOW) is None
    assert await w.api_keys.revoke("u", "x", NOW) is None
    assert await w.api_keys.find_by_digest(key().digest) == key()
    assert await w.api_keys.revoke("u", "k", NOW + DAY + FINE) == key(revoked_at=NOW + DAY)
    assert await w.api_keys.revoke("u", "k", NOW + 2 * DAY) is None
    assert await w.api_keys.find_by_digest(key().digest) is None
    await conflict(w.api_keys.create(key("other", digest=key().digest)), "digest")
    assert await w.api_keys.revoked_since(NOW + DAY) == [key().digest]
    assert await w.api_keys.revoked_since(NOW + DAY + MS) == []


@contract
async def test_all_api_keys_of_a_user_are_revoked(w: World) -> None:
    for each in (key("a"), key("b"), key("c"), key("other", "v")):
        await w.api_keys.create(each)
    await w.api_keys.revoke("u", "c", NOW)
    assert await w.api_keys.revoke_all("u", NOW + DAY) == 2
    assert await w.api_keys.revoke_all("u", NOW + DAY) == 0
    assert sorted(await w.api_keys.revoked_since(NOW + DAY)) == [key("a").digest, key("b").digest]
    assert await w.api_keys.count_live("v") == 1


@contract
async def test_the_last_use_of_api_keys(w: World) -> None:
    for each in (key("a"), key("b"), key("c")):
        await w.api_keys.create(each)
    await w.api_keys.touch({})
    await w.api_keys.touch({"a": NOW + DAY + FINE, "b": NOW, "unknown": NOW})
    await w.api_keys.touch({"a": NOW, "b": NOW + MINUTE})
    found, total = await w.api_keys.list_of_user("u", 0, 10)
    assert [each.last_used_at for each in found] == [NOW + DAY, NOW + MINUTE, None]
    assert total == 3


# ---- sessions

LEASE = 30 * MINUTE
LIVE = frozenset({"INITIALIZING", "ACTIVE"})


def entry(name: str = "e1", kind: str = "create") -> OutboxEntry:
    return OutboxEntry(name, "create" if kind == "create" else "terminate", NOW)


def session(name: str = "s", user_id: str = "u", **changes: Any) -> SessionDocument:
    made = SessionDocument(
        session_id=name,
        user_id=user_id,
        status="INITIALIZING",
        metadata={},
        created_at=NOW,
        updated_at=NOW,
    )
    return replace(made, **changes)


METADATA = {"a": [1, 2.5, None, True, {"b": "c"}], "$set": "$x", "a.b": {"$ne": 1}, "": "", "ü": "\0"}


@contract
async def test_a_session_is_stored_whole_and_found(w: World) -> None:
    given = session(metadata=METADATA, created_at=NOW + FINE)
    assert await w.sessions.create(given) == replace(given, created_at=NOW)
    assert await w.sessions.find_by_id("s") == replace(given, created_at=NOW)
    assert await w.sessions.find_by_id("x") is None
    await conflict(w.sessions.create(session(user_id="v")), "session_id")
    full = session(
        "full",
        ended_at=NOW + FINE,
        outbox=(replace(entry(), at=NOW + FINE), entry("e2", "terminate")),
        outbox_due_at=NOW + DAY + FINE,
    )
    stored = replace(full, ended_at=NOW, outbox=(entry(), entry("e2", "terminate")), outbox_due_at=NOW + DAY)
    assert await w.sessions.create(full) == stored
    assert await w.sessions.find_by_id("full") == stored


@contract
async def test_metadata_given_and_got_is_nobody_elses(w: World) -> None:
    given: dict[str, Any] = {"a": {"b": 1}}
    await w.sessions.create(session(metadata=given))
    given["a"]["b"] = 2
    found = await w.sessions.find_by_id("s")
    assert found is not None
    assert found.metadata == {"a": {"b": 1}}
    found.metadata["a"]["b"] = 3
    for got in ((await w.sessions.find_by_id("s")), (await w.sessions.list_sessions(0, 1))[0][0]):
        assert got == session(metadata={"a": {"b": 1}})


@contract
async def test_pages_of_sessions(w: World) -> None:
    made = [session(f"s{i}", "uv"[i % 2], created_at=NOW + i * DAY) for i in range(4)]
    made.append(session("a", "u", created_at=NOW, status="ACTIVE"))
    for each in made:
        await w.sessions.create(each)
    s0, s1, s2, s3, a = made
    assert await w.sessions.list_sessions(0, 10) == ([s3, s2, s1, a, s0], 5)
    assert await w.sessions.list_sessions(1, 2) == ([s2, s1], 5)
    assert await w.sessions.list_sessions(5, 2) == ([], 5)
    assert await w.sessions.list_sessions(0, 10, user_id="v") == ([s3, s1], 2)
    assert await w.sessions.list_sessions(0, 10, status="ACTIVE") == ([a], 1)
    assert await w.sessions.list_sessions(0, 10, status="ACTIVE", user_id="v") == ([], 0)
    assert await w.sessions.find_by_user("u", 0, 10) == ([s2, a, s0], 3)
    assert await w.sessions.find_by_user("u", 1, 1) == ([a], 3)
    assert await w.sessions.find_by_user("u", 0, 10, "INITIALIZING") == ([s2, s0], 2)
    assert await w.sessions.find_by_user("u", 0, 10, status="x") == ([], 0)
    assert await w.sessions.find_by_user("x", 0, 10) == ([], 0)


@contract
async def test_metadata_is_replaced_by_its_owner(w: World) -> None:
    await w.sessions.create(session(metadata={"old": 1}, outbox=(entry(),), outbox_due_at=NOW))
    w.now = NOW + DAY + FINE
    new = await w.sessions.update("s", metadata=METADATA)
    assert new == session(metadata=METADATA, updated_at=NOW + DAY, outbox=(entry(),), outbox_due_at=NOW)
    assert await w.sessions.find_by_id("s") == new
    assert await w.sessions.update("s", metadata={"x": 1}, user_id="v") is None
    assert await w.sessions.update("x", metadata={}) is None
    assert await w.sessions.find_by_id("s") == new
    mine = await w.sessions.update("s", metadata={}, user_id="u")
    assert mine is not None
    assert mine.metadata == {}


@contract
async def test_a_move_is_made_from_where_it_is_allowed(w: World) -> None:
    await w.sessions.create(session(metadata={"a": 1}))
    w.now = NOW + DAY + FINE
    move = w.sessions.update_status
    active = await move("s", "ACTIVE", allowed_from=frozenset({"INITIALIZING"}), ended=False, entry=None)
    assert active == session(status="ACTIVE", metadata={"a": 1}, updated_at=NOW + DAY)
    assert await w.sessions.find_by_id("s") == active
    for allowed, owner in ((frozenset({"INITIALIZING"}), "u"), (frozenset[str](), "u"), (LIVE, "v")):
        denied = await move(
            "s", "FAILED", allowed_from=allowed, user_id=owner, metadata={}, ended=True, entry=entry()
        )
        assert denied is None
    assert await move("x", "FAILED", allowed_from=LIVE, ended=True, entry=None) is None
    assert await w.sessions.find_by_id("s") == active
    w.now = NOW + 2 * DAY
    done = await move(
        "s", "COMPLETED", allowed_from=LIVE, user_id="u", metadata=METADATA, ended=True, entry=None
    )
    assert done == session(
        status="COMPLETED", metadata=METADATA, updated_at=NOW + 2 * DAY, ended_at=NOW + 2 * DAY
    )
    assert await w.sessions.find_by_id("s") == done
    assert await w.sessions.find_by_user("u", 0, 1, "COMPLETED") == ([done], 1)


@contract
async def test_an_empty_outbox_is_due_at_once(w: World) -> None:
    await w.sessions.create(session())
    w.now = NOW + MINUTE
    ended = await w.sessions.delete("s", allowed_from=LIVE, entry=entry())
    assert ended is not None
    assert (ended.outbox, ended.outbox_due_at) == ((entry(),), w.now)


@contract
async def test_a_session_is_terminated_once(w: World) -> None:
    await w.sessions.create(session(outbox=(entry(),), outbox_due_at=NOW + DAY))
    w.now = NOW + MINUTE
    last = entry("e2", "terminate")
    assert await w.sessions.delete("s", allowed_from=LIVE, user_id="v", entry=last) is None
    ended = await w.sessions.delete("s", allowed_from=LIVE, user_id="u", entry=replace(last, at=NOW + FINE))
    assert ended == session(
        status="TERMINATED",
        updated_at=w.now,
        ended_at=w.now,
        outbox=(entry(), last),
        outbox_due_at=NOW + DAY,  # whoever tells of the first, or has put it off, goes on to the second
    )
    assert await w.sessions.find_by_id("s") == ended
    assert await w.sessions.delete("s", allowed_from=LIVE, entry=last) is None
    assert await w.sessions.find_by_id("s") == ended


@contract
async def test_what_is_due_is_claimed_the_oldest_first(w: World) -> None:
    assert await w.sessions.take_due(NOW, LEASE) is None
    for name, due in (("b", 2), ("a", 1), ("c", 3)):
        await w.sessions.create(session(name, outbox=(entry(),), outbox_due_at=NOW + due * MINUTE))
    await w.sessions.create(session("idle"))
    await w.sessions.create(session("odd", outbox_due_at=NOW))  # somebody else's hand: due for nothing
    assert await w.sessions.take_due(NOW + MINUTE - MS, LEASE) is None
    taken = await w.sessions.take_due(NOW + 2 * MINUTE + FINE, LEASE + FINE)
    assert taken == session("a", outbox=(entry(),), outbox_due_at=NOW + 2 * MINUTE + LEASE + MS)
    assert await w.sessions.find_by_id("a") == taken
    second = await w.sessions.take_due(NOW + 2 * MINUTE, LEASE)
    assert second is not None
    assert second.session_id == "b"
    assert await w.sessions.take_due(NOW + 2 * MINUTE, LEASE) is None
    # The lease of `b` is over, and nobody has told.
    again = [await w.sessions.take_due(NOW + 2 * MINUTE + LEASE, LEASE) for _ in range(3)]
    assert [each and each.session_id for each in again] == ["c", "b", None]


@contract
async def test_one_session_is_claimed(w: World) -> None:
    await w.sessions.create(session(outbox=(entry(),), outbox_due_at=NOW))
    await w.sessions.create(session("idle"))
    await w.sessions.create(session("odd", outbox_due_at=NOW))
    claimed = await w.sessions.claim("s", NOW, LEASE)
    assert claimed == session(outbox=(entry(),), outbox_due_at=NOW + LEASE)
    assert await w.sessions.claim("s", NOW + LEASE - MS, LEASE) is None
    for name in ("idle", "odd", "x"):
        assert await w.sessions.claim(name, NOW + DAY, LEASE) is None
    assert await w.sessions.claim("s", NOW + LEASE, LEASE) is not None


@contract
async def test_what_has_been_told_is_struck_out(w: World) -> None:
    both = session(outbox=(entry("$e"), entry("e2", "terminate")), outbox_due_at=NOW)
    await w.sessions.create(both)
    assert await w.sessions.delivered("x", "$e") is None
    assert await w.sessions.delivered("s", "other") == both
    left = replace(both, outbox=both.outbox[1:])
    assert await w.sessions.delivered("s", "$e") == left
    assert await w.sessions.delivered("s", "$e") == left
    assert await w.sessions.claim("s", NOW, LEASE) == replace(left, outbox_due_at=NOW + LEASE)
    assert await w.sessions.delivered("s", "e2") == session()
    assert await w.sessions.find_by_id("s") == session()
    assert await w.sessions.delivered("s", "e2") == session()
    assert await w.sessions.take_due(NOW + DAY, LEASE) is None
    # And what comes later is due again.
    w.now = NOW + DAY
    await w.sessions.delete("s", allowed_from=LIVE, entry=entry("e3", "terminate"))
    due = await w.sessions.take_due(NOW + DAY, LEASE)
    assert due is not None
    assert due.outbox == (entry("e3", "terminate"),)


@contract
async def test_what_could_not_be_told_is_put_off(w: World) -> None:
    await w.sessions.create(session(outbox=(entry(),), outbox_due_at=NOW))
    await w.sessions.create(session("idle"))
    for name in ("s", "idle", "x"):
        await w.sessions.put_off(name, NOW + DAY + FINE)
    assert await w.sessions.find_by_id("idle") == session("idle")
    assert await w.sessions.take_due(NOW + DAY - MS, LEASE) is None
    found = await w.sessions.take_due(NOW + DAY, LEASE)
    assert found is not None
    assert found.session_id == "s"
