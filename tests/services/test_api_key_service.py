import asyncio
import datetime as dt
import logging
from typing import Any

import pytest

from lucid.core.exchange import Role
from lucid.core.security import api_keys as keys
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode, GatewayError
from lucid.services.api_key_service import MOST_KEYS, NewApiKey
from lucid.services.callers import Caller
from tests.support.accounts import CALLER, Accounts, Run, principal_of, runner
from tests.support.outcomes import refused
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet

ROLES = ("user", "node_operator", "admin", "super_admin")


@pytest.fixture
def run(redis_server: RedisChild) -> Run:
    """Over stores in memory: for what does not depend on the store."""
    return runner(redis_server)


@pytest.fixture
def run_stored(mongo: MongoChild, redis_server: RedisChild) -> Run:
    """Over a real database."""
    return runner(redis_server, mongo)


async def make(
    world: Accounts,
    user: UserDocument,
    role: str = "user",
    *,
    name: str = "a key",
    seconds: float | None = None,
    via: str = "token",
    acts_as: str = "",
) -> NewApiKey:
    expires_at = None if seconds is None else world.utc_now() + dt.timedelta(seconds=seconds)
    principal = world.principal(user, via, acts_as)
    return await world.key_service.create(name, role, expires_at, principal, CALLER)


def test_a_key_is_shown_once_and_stored_as_a_digest(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add("admin")
        made = await make(world, user, "node_operator", name="Bäckup ✓", seconds=90.5)
        assert keys.is_api_key(made.key)
        assert (made.name, made.role) == ("Bäckup ✓", "node_operator")
        assert (made.created_at, made.expires_at) == ("2030-01-01T00:00:00Z", "2030-01-01T00:01:31Z")
        assert made.last_used_at is None
        assert made.key not in repr(made)
        stored = await world.api_keys.find_by_digest(keys.digest(made.key))
        assert (stored.key_id, stored.user_id, stored.role) == (made.key_id, user.user_id, "node_operator")
        assert world.connection is not None
        row = await world.connection.database["api_keys"].find_one({"_id": made.key_id})
        assert made.key not in repr(row)

        await world.api_keys.touch({made.key_id: world.utc_now() + dt.timedelta(seconds=5)})
        page = await world.key_service.list_keys(1, 20, world.principal(user))
        (shown,) = page.items
        assert (page.page, page.limit, page.total) == (1, 20, 1)
        assert (shown.key_id, shown.last_used_at) == (made.key_id, "2030-01-01T00:00:05Z")
        assert "key" not in shown.__struct_fields__

    run_stored(test)


def test_pages_of_ones_own_keys(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add()
        made = []
        for number in range(5):
            world.now += 1
            made.append((await make(world, user, name=f"key {number}")).key_id)
        await make(world, other)
        newest_first = made[::-1]

        async def ids(page: int, limit: int) -> tuple[list[str], int]:
            found = await world.key_service.list_keys(page, limit, world.principal(user))
            return [key.key_id for key in found.items], found.total

        assert await ids(1, 2) == (newest_first[:2], 5)
        assert await ids(3, 2) == (newest_first[4:], 5)
        assert await ids(4, 2) == ([], 5)
        await world.key_service.revoke(made[2], world.principal(user), CALLER)
        assert await ids(1, 20) == ([key_id for key_id in newest_first if key_id != made[2]], 4)
        nobody = principal_of("minted-by-hand", Role.USER)
        assert (await world.key_service.list_keys(1, 20, nobody)).items == []

    run_stored(test)


@pytest.mark.parametrize("owner", [*ROLES, "listed"])
def test_a_keys_role_is_no_higher_than_its_owners(run: Run, owner: str) -> None:
    wallet = Wallet.generate()

    async def test(world: Accounts) -> None:
        user = await world.add(tron_address=wallet.address) if owner == "listed" else await world.add(owner)
        highest = ROLES.index("super_admin" if owner == "listed" else owner)
        for number, role in enumerate(ROLES):
            if number <= highest:
                assert (await make(world, user, role)).role == role
            else:
                await refused(ErrorCode.ROLE_TOO_LOW, make(world, user, role))
        # Nor than that of the token that makes it, whatever is stored.
        for number, role in enumerate(ROLES):
            if number:
                await refused(ErrorCode.ROLE_TOO_LOW, make(world, user, role, acts_as="user"))
        assert (await make(world, user, "user", acts_as="user")).role == "user"

    run(test, admins=frozenset({wallet.address}))


def test_a_token_that_is_older_than_its_owners_fall_makes_no_strong_key(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        await refused(ErrorCode.ROLE_TOO_LOW, make(world, user, "admin", acts_as="super_admin"))
        await refused(ErrorCode.ROLE_TOO_LOW, make(world, user, "node_operator", acts_as="super_admin"))

    run(test)


def test_keys_are_managed_with_a_token_from_a_login_only(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add("super_admin")
        made = await make(world, user)
        by_key = world.principal(user, "api_key")
        await refused(ErrorCode.ROLE_TOO_LOW, make(world, user, via="api_key"))
        await refused(ErrorCode.ROLE_TOO_LOW, world.key_service.list_keys(1, 20, by_key))
        await refused(ErrorCode.ROLE_TOO_LOW, world.key_service.revoke(made.key_id, by_key, CALLER))
        page = await world.key_service.list_keys(1, 20, world.principal(user))
        assert [key.key_id for key in page.items] == [made.key_id]

    run(test)


def test_a_key_needs_an_owner_who_is_stored_and_live(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        await world.users.delete(user.user_id, revoke_tokens_at=world.utc_now())
        for principal in (world.principal(user), principal_of("minted-by-hand", Role.SUPER_ADMIN)):
            await refused(ErrorCode.NOT_FOUND, world.key_service.create("n", "user", None, principal, CALLER))
            assert await world.api_keys.count_live(principal.user_id) == 0

    run_stored(test)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "n" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\u202eb"}, "name"),
        ({"name": "e\u0301"}, "name"),
        ({"seconds": 0}, "expires_at"),
        ({"seconds": -1}, "expires_at"),
    ],
)
def test_fields(run: Run, fields: dict[str, Any], field: str) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        error = await refused(ErrorCode.BAD_FIELD, make(world, user, **fields))
        assert error.details["field"] == field
        assert await world.api_keys.count_live(user.user_id) == 0

    run(test)


def test_an_expiry_in_another_zone_is_the_same_moment(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        zone = dt.timezone(dt.timedelta(hours=5))
        moment = (world.utc_now() + dt.timedelta(hours=1)).astimezone(zone)
        made = await world.key_service.create("n", "user", moment, world.principal(user), CALLER)
        assert made.expires_at == "2030-01-01T01:00:00Z"
        past = world.utc_now().replace(tzinfo=zone)  # five hours ago
        await refused(
            ErrorCode.BAD_FIELD, world.key_service.create("n", "user", past, world.principal(user), CALLER)
        )

    run(test)


def test_fifty_keys_are_the_most(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add()
        made = [await make(world, user, seconds=60) for _ in range(MOST_KEYS)]
        error = await refused(ErrorCode.CONFLICT, make(world, user))
        assert error.details == {"limit": 50}
        await make(world, other)
        await world.key_service.revoke(made[0].key_id, world.principal(user), CALLER)
        await make(world, user)
        await refused(ErrorCode.CONFLICT, make(world, user))
        world.now += 61
        await make(world, user)  # the others have expired

    run(test)


def test_many_at_once_do_not_become_more(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        for _ in range(MOST_KEYS - 3):
            await make(world, user)
        answers = await asyncio.gather(*(make(world, user) for _ in range(20)), return_exceptions=True)
        made = [answer for answer in answers if isinstance(answer, NewApiKey)]
        assert all(
            isinstance(answer, NewApiKey)
            or (isinstance(answer, GatewayError) and answer.code is ErrorCode.CONFLICT)
            for answer in answers
        )
        assert await world.api_keys.count_live(user.user_id) == MOST_KEYS - 3 + len(made) <= MOST_KEYS
        for key in made:
            assert await world.api_keys.find_by_digest(keys.digest(key.key)) is not None

    run_stored(test)


def test_an_ended_key_is_dead_here_and_everywhere(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add("super_admin")
        made, kept = await make(world, user), await make(world, user)
        digest, kept_digest = keys.digest(made.key), keys.digest(kept.key)
        for each in (digest, kept_digest):
            world.keys.put(each, world.principal(user, "api_key"), 0.0)
        for call in (
            world.key_service.revoke(made.key_id, world.principal(other), CALLER),
            world.key_service.revoke("unknown", world.principal(user), CALLER),
            world.key_service.revoke("", world.principal(user), CALLER),
            world.key_service.revoke("$ne", world.principal(user), CALLER),
        ):
            assert str(await refused(ErrorCode.NOT_FOUND, call)) == "No such API key"
        assert world.published == []
        assert world.keys.get(digest, 0.0) is not None

        await world.key_service.revoke(made.key_id, world.principal(user), CALLER)
        assert await world.api_keys.find_by_digest(digest) is None
        assert world.keys.get(digest, 0.0) is None
        assert world.keys.get(kept_digest, 0.0) is not None
        (message,) = world.published
        assert message == {"key": digest.hex(), "until": world.now + 60}
        await refused(
            ErrorCode.NOT_FOUND, world.key_service.revoke(made.key_id, world.principal(user), CALLER)
        )

    run_stored(test)


def test_a_caller_who_leaves_does_not_keep_a_key_alive(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        made = await make(world, user)
        digest = keys.digest(made.key)
        world.keys.put(digest, world.principal(user, "api_key"), 0.0)
        written, go_on = asyncio.Event(), asyncio.Event()
        real = world.api_keys.revoke

        async def slow(*arguments: Any) -> Any:
            answer = await real(*arguments)
            written.set()
            await go_on.wait()
            return answer

        world.api_keys.revoke = slow
        request = asyncio.create_task(world.key_service.revoke(made.key_id, world.principal(user), CALLER))
        async with asyncio.timeout(5):
            await written.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        go_on.set()
        async with asyncio.timeout(5):
            while world.key_service._unbroken._tasks:
                await asyncio.wait(world.key_service._unbroken._tasks)
        assert world.keys.get(digest, 0.0) is None

    run(test)


def test_the_audit_log_tells_ids_and_no_key(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    made: list[NewApiKey] = []

    async def test(world: Accounts) -> None:
        user = await world.add("admin")
        me = world.principal(user)
        caller = Caller("192.0.2.9", "r-9")
        made.append(await world.key_service.create("backup", "admin", None, me, caller))
        await world.key_service.revoke(made[0].key_id, me, caller)
        with pytest.raises(GatewayError):
            await world.key_service.create("b", "super_admin", None, me, caller)

    with caplog.at_level(logging.INFO):
        run(test)
    told = [record.__dict__["audit"] for record in caplog.records if record.name == "lucid.audit"]
    assert [(each["event"], each["key_id"], each.get("role")) for each in told] == [
        ("api_key_created", made[0].key_id, "admin"),
        ("api_key_revoked", made[0].key_id, None),
    ]
    assert all(each["user_id"].startswith("admin-") for each in told)
    assert made[0].key not in repr([record.__dict__ for record in caplog.records])
