import asyncio
import datetime as dt
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from lucid.core.exchange import Principal, Role
from lucid.core.security import passwords
from lucid.core.security.roles import PERMISSIONS
from lucid.database.documents import ApiKeyDocument, UserDocument
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller
from lucid.services.login_delays import FREE_ACCOUNT_FAILURES
from lucid.services.user_rules import UserChanges, effective_role
from lucid.services.user_service import MOST_JUDGEMENTS
from tests.support.accounts import (
    CALLER,
    EPOCH,
    PASSWORD,
    Accounts,
    Run,
    accounts,
    database_name,
    principal_of,
    quick_hash,
    runner,
)
from tests.support.hang_ups import HangUp, audited
from tests.support.outcomes import refused
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet

NEW = "another password"


@pytest.fixture
def run(redis_server: RedisChild) -> Run:
    """Over stores in memory: for what does not depend on the store."""
    return runner(redis_server)


@pytest.fixture
def run_stored(mongo: MongoChild, redis_server: RedisChild) -> Run:
    """Over a real database."""
    return runner(redis_server, mongo)


async def bad(call: Coroutine[Any, Any, object]) -> str:
    """The field that is at fault."""
    return str((await refused(ErrorCode.BAD_FIELD, call)).details["field"])


def change(world: Accounts, user: UserDocument, by: Principal | None = None, **fields: Any) -> Any:
    by = by or world.principal(user)
    return world.service.update(user.user_id, msgspec.convert(fields, UserChanges), by, CALLER)


# ---- looking


def test_self_and_admins_see_a_user_and_nobody_else(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        get = world.service.get
        wallet = Wallet.generate()
        user = await world.users.upsert_by_tron_address(wallet.address, "somebody")
        other = await world.add()
        me = world.principal(user)
        view = await get("me", me)
        assert view == await get(user.user_id, me)
        assert (view.user_id, view.tron_address) == (user.user_id, wallet.address)
        assert (view.role, view.permissions) == ("user", PERMISSIONS[Role.USER])
        assert view.email is None
        assert view.last_login_at == "2030-01-01T00:00:00Z"
        assert (await get("me", world.principal(other))).email == other.email

        admin, operator = principal_of("x", Role.ADMIN), principal_of("y", Role.NODE_OPERATOR)
        assert (await get(other.user_id, admin)).user_id == other.user_id
        await world.users.delete(other.user_id, revoke_tokens_at=world.utc_now())
        for call in (
            get(other.user_id, me),
            get(other.user_id, operator),
            get(user.user_id, operator),
            get(other.user_id, admin),  # deleted
            get("nobody", me),
            get("nobody", admin),
            get("me", admin),  # a token minted by hand has no stored user
            get("../" + user.user_id, admin),
            get("$ne", admin),
            get("", admin),
        ):
            assert str(await refused(ErrorCode.NOT_FOUND, call)) == "No such user"

    run_stored(test)


def test_effective_roles() -> None:
    moment = dt.datetime.fromtimestamp(EPOCH, dt.UTC)

    def user(role: str, address: str | None) -> UserDocument:
        return UserDocument("u", True, role, moment, moment, tron_address=address)

    listed = frozenset({"T1"})
    assert effective_role(user("user", "T1"), listed) is Role.SUPER_ADMIN
    assert effective_role(user("admin", "T2"), listed) is Role.ADMIN
    assert effective_role(user("super_admin", None), listed) is Role.SUPER_ADMIN
    assert effective_role(user("user", None), listed) is Role.USER
    for unknown in ("", "root", "PUBLIC", "public", "Admin"):
        assert effective_role(user(unknown, "T2"), listed) is Role.USER


def test_admins_list_users_by_page_and_filter(run_stored: Run) -> None:
    wallet, listed = Wallet.generate(), Wallet.generate()

    async def test(world: Accounts) -> None:
        made = []
        for role, address in (
            ("user", None),
            ("user", listed.address),
            ("admin", wallet.address),
            ("super_admin", None),
        ):
            world.now += 1
            made.append((await world.add(role, tron_address=address)).user_id)
        plain, by_list, admin, stored_super = made
        world.now += 1
        gone = await world.add()
        await world.users.delete(gone.user_id, revoke_tokens_at=world.utc_now())
        by = principal_of("x", Role.ADMIN)

        async def ids(page: int = 1, limit: int = 20, **filters: str) -> tuple[list[str], int]:
            found = await world.service.list_users(page, limit, by, **filters)
            assert (found.page, found.limit) == (page, limit)
            return [user.user_id for user in found.items], found.total

        assert await ids() == ([stored_super, admin, by_list, plain], 4)
        assert await ids(1, 3) == ([stored_super, admin, by_list], 4)
        assert await ids(2, 3) == ([plain], 4)
        assert await ids(3, 3) == ([], 4)
        assert await ids(role="user") == ([plain], 1)
        assert await ids(role="super_admin") == ([stored_super, by_list], 2)
        assert await ids(tron_address=wallet.address) == ([admin], 1)
        assert await ids(tron_address=wallet.address, role="user") == ([], 0)
        email = (await world.stored(plain)).email or ""
        assert await ids(email=email.upper()) == ([plain], 1)
        assert await ids(email=gone.email or "") == ([], 0)
        (shown,) = (await world.service.list_users(1, 1, by, tron_address=listed.address)).items
        assert (shown.role, shown.permissions) == ("super_admin", PERMISSIONS[Role.SUPER_ADMIN])

        assert await bad(world.service.list_users(1, 1, by, tron_address="T" + "1" * 33)) == "tron_address"
        for role in (Role.USER, Role.NODE_OPERATOR):
            await refused(ErrorCode.ROLE_TOO_LOW, world.service.list_users(1, 1, principal_of("y", role)))

    run_stored(test, admins=frozenset({listed.address}))


# ---- registering


def test_registration_makes_a_plain_user(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        view = await world.service.register("Ann@Example.org", NEW, CALLER)
        assert (view.email, view.role, view.tron_address) == ("Ann@Example.org", "user", None)
        assert (view.created_at, view.last_login_at) == ("2030-01-01T00:00:00Z", None)
        user = await world.users.find_by_email("ann@example.org")
        assert (user.user_id, user.password) == (view.user_id, quick_hash(NEW))
        assert world.hasher.hashed == [NEW]
        assert await world.service.get("me", world.principal(user)) == view

        error = await refused(ErrorCode.CONFLICT, world.service.register("aNN@example.ORG", NEW, CALLER))
        assert error.details == {"fields": ["email"]}
        assert world.hasher.hashed == [NEW]  # a conflict that is known costs no hash
        await world.service.delete("me", world.principal(user), CALLER)
        again = await world.service.register("ann@example.org", NEW, CALLER)
        assert again.user_id != view.user_id

        assert await bad(world.service.register("ann", NEW, CALLER)) == "email"
        assert await bad(world.service.register("bob@example.org", "short", CALLER)) == "password"
        assert await bad(world.service.register("bob@example.org", "password123", CALLER)) == "password"
        assert await bad(world.service.register("bob@example.org", "bob@example.org", CALLER)) == "password"
        assert await world.users.find_by_email("bob@example.org") is None

    run_stored(test)


def test_of_200_registrations_of_one_email_at_once_one_makes_a_user(
    mongo: MongoChild, redis_server: RedisChild
) -> None:
    async def main() -> None:
        uri = mongo.in_database(database_name())
        async with accounts(redis_server.uri, uri) as one, accounts(redis_server.uri, uri) as two:
            spellings = ("ann@example.org", "Ann@example.org", "ANN@EXAMPLE.ORG")
            calls = [
                (one, two)[number % 2].service.register(spellings[number % 3], NEW, CALLER)
                for number in range(200)
            ]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            made = [answer for answer in answers if not isinstance(answer, BaseException)]
            assert len(made) == 1
            conflicts = [answer for answer in answers if isinstance(answer, GatewayError)]
            assert len(conflicts) == 199
            assert {(error.code, *error.details["fields"]) for error in conflicts} == {
                (ErrorCode.CONFLICT, "email")
            }
            assert one.connection is not None
            assert await one.connection.database["users"].count_documents({}) == 1
            # One hash in each worker at most: the others waited for it.
            assert len(one.hasher.hashed) + len(two.hasher.hashed) <= 2
            assert not one.service._registering

    asyncio.run(main())


def test_registration_with_a_real_hash(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        from lucid.services.password_hashing import PasswordHashing

        world.service._passwords = world.proofs._passwords = PasswordHashing()
        await world.service.register("ann@example.org", NEW, CALLER)
        user = await world.users.find_by_email("ann@example.org")
        assert passwords.verify_password(NEW, user.password)
        await change(world, user, password="yet another one", current_password=NEW)
        user = await world.users.find_by_email("ann@example.org")
        assert passwords.verify_password("yet another one", user.password)

    run_stored(test)


def test_emails_and_passwords_may_be_the_clusters_business(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        await refused(ErrorCode.NOT_IMPLEMENTED, world.service.register("ann@example.org", NEW, CALLER))
        await refused(ErrorCode.NOT_IMPLEMENTED, change(world, user, password=NEW, current_password=PASSWORD))
        assert (await change(world, user, email="ann@example.org")).email == "ann@example.org"
        assert await world.stored(user.user_id) == msgspec.structs.replace(
            user, email="ann@example.org", email_key="ann@example.org"
        )

    run(test, registration=False)


# ---- who may what

TARGETS = ("self", "user", "node_operator", "admin", "super_admin", "listed", "gone")
RULES = """
caller         what                self  user  node_operator  admin  super_admin  listed  gone

user           get                 200   404   404            404    404          404     404
user           email               200   404   404            404    404          404     404
user           password            200   404   404            404    404          404     404
user           wallet              200   404   404            404    404          404     404
user           role:user           403   404   404            404    404          404     404
user           role:node_operator  403   404   404            404    404          404     404
user           role:admin          403   404   404            404    404          404     404
user           role:super_admin    403   404   404            404    404          404     404
user           delete              204   404   404            404    404          404     404

node_operator  get                 200   404   404            404    404          404     404
node_operator  email               200   404   404            404    404          404     404
node_operator  password            200   404   404            404    404          404     404
node_operator  wallet              200   404   404            404    404          404     404
node_operator  role:user           403   404   404            404    404          404     404
node_operator  role:node_operator  403   404   404            404    404          404     404
node_operator  role:admin          403   404   404            404    404          404     404
node_operator  role:super_admin    403   404   404            404    404          404     404
node_operator  delete              204   404   404            404    404          404     404

admin          get                 200   200   200            200    200          200     404
admin          email               200   200   200            403    403          403     404
admin          password            200   403   403            403    403          403     403
admin          wallet              200   403   403            403    403          403     403
admin          role:user           403   200   200            403    403          403     404
admin          role:node_operator  403   200   200            403    403          403     404
admin          role:admin          403   403   403            403    403          403     403
admin          role:super_admin    403   403   403            403    403          403     403
admin          delete              204   204   204            403    403          403     404

super_admin    get                 200   200   200            200    200          200     404
super_admin    email               200   200   200            200    200          200     404
super_admin    password            200   403   403            403    403          403     403
super_admin    wallet              200   403   403            403    403          403     403
super_admin    role:user           403   200   200            200    200          200     404
super_admin    role:node_operator  403   200   200            200    200          200     404
super_admin    role:admin          403   200   200            200    200          200     404
super_admin    role:super_admin    403   200   200            200    200          200     404
super_admin    delete              204   204   204            204    204          204     404

listed         get                 200   200   200            200    200          200     404
listed         email               200   200   200            200    200          200     404
listed         password            200   403   403            403    403          403     403
listed         wallet              200   403   403            403    403          403     403
listed         role:user           403   200   200            200    200          200     404
listed         role:admin          403   200   200            200    200          200     404
listed         delete              204   204   204            204    204          204     404
"""
# With an API key: nobody's credentials are changed, and nobody's role.
RULES_OF_KEYS = """
caller         what                self  user  node_operator  admin  super_admin  listed  gone

user           get                 200   404   404            404    404          404     404
user           email               403   404   404            404    404          404     404
user           password            403   404   404            404    404          404     404
user           wallet              403   404   404            404    404          404     404
user           role:node_operator  403   404   404            404    404          404     404
user           delete              403   404   404            404    404          404     404

super_admin    get                 200   200   200            200    200          200     404
super_admin    email               403   403   403            403    403          403     403
super_admin    password            403   403   403            403    403          403     403
super_admin    wallet              403   403   403            403    403          403     403
super_admin    role:user           403   403   403            403    403          403     403
super_admin    role:admin          403   403   403            403    403          403     403
super_admin    delete              403   204   204            204    204          204     404
"""


def cells(table: str) -> list[tuple[str, str, str, int]]:
    head, *rows = (line.split() for line in table.splitlines() if line)
    assert tuple(head[2:]) == TARGETS
    return [
        (row[0], row[1], name, int(status))
        for row in rows
        for name, status in zip(TARGETS, row[2:], strict=True)
    ]


@pytest.mark.parametrize(("table", "via"), [(RULES, "token"), (RULES_OF_KEYS, "api_key")])
def test_the_rules(run: Run, table: str, via: str) -> None:
    list_of = [Wallet.generate() for _ in range(200)]
    free = [wallet.address for wallet in list_of]

    async def add(world: Accounts, kind: str) -> UserDocument:
        if kind == "listed":
            return await world.add("user", tron_address=free.pop())
        return await world.add("user" if kind == "gone" else kind)

    async def cell(world: Accounts, caller: str, what: str, target: str) -> tuple[int, bool]:
        """The status, and whether what was asked for is done."""
        by = await add(world, caller)
        about = by if target == "self" else await add(world, target)
        if target == "gone":
            await world.users.delete(about.user_id, revoke_tokens_at=world.utc_now())
        before = await world.users.find_by_id(about.user_id)
        principal = world.principal(by, via)
        wallet = Wallet.generate()
        name, _, role = what.partition(":")
        fields = {
            "email": {"email": f"new.{about.email}"},
            "password": {"password": NEW, "current_password": PASSWORD},
            "wallet": await world.wallet_proof(wallet),
            "role": {"role": role},
        }
        try:
            if name == "get":
                assert (await world.service.get(about.user_id, principal)).user_id == about.user_id
                return 200, before is not None
            if name == "delete":
                await world.service.delete(about.user_id, principal, CALLER)
                return 204, await world.users.find_by_id(about.user_id) is None
            await change(world, about, principal, **fields[name])
        except GatewayError as error:
            assert await world.users.find_by_id(about.user_id) == before
            return error.code.status, False
        after = await world.stored(about.user_id)
        wanted = {
            "email": (after.email, f"new.{about.email}"),
            "password": (after.password, quick_hash(NEW)),
            "wallet": (after.tron_address, wallet.address),
            "role": (after.role, role),
        }
        return 200, wanted[name][0] == wanted[name][1]

    async def test(world: Accounts) -> None:
        wrong = []
        for caller, what, target, status in cells(table):
            found = await cell(world, caller, what, target)
            if found != (status, status < 300):
                wrong.append((caller, what, target, status, found))
        assert not wrong

    run(test, admins=frozenset(free))


def test_every_caller_meets_every_target_in_the_table() -> None:
    asked = {(caller, what) for caller, what, _, _ in cells(RULES)}
    whats = {what for _, what in asked}
    assert len(whats) == 9
    for caller in ("user", "node_operator", "admin", "super_admin"):
        assert {what for each, what in asked if each == caller} == whats


def test_what_is_wrong_with_a_body_is_told_by_its_field(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user, bare = await world.add(), await world.add(email=None, password=None)
        taken = (await world.add()).email
        proof = await world.wallet_proof(Wallet.generate())
        for fields, field in (
            ({}, "body"),
            ({"current_password": PASSWORD}, "current_password"),
            ({"email": "x@example.org", "current_password": PASSWORD}, "current_password"),
            ({"password": NEW}, "current_password"),
            ({"password": "password123", "current_password": PASSWORD}, "password"),
            ({"password": user.email, "current_password": PASSWORD}, "password"),
            (
                {"password": "me@example.org", "current_password": PASSWORD, "email": "me@example.org"},
                "password",
            ),
            ({"signature": proof["signature"]}, "signature"),
            ({"message": "m", "email": "x@example.org"}, "message"),
            ({"tron_address": proof["tron_address"], "message": "m"}, "signature"),
            ({"tron_address": proof["tron_address"], "signature": proof["signature"]}, "message"),
            ({**proof, "tron_address": "T" + "1" * 33}, "tron_address"),
        ):
            assert await bad(change(world, user, **fields)) == field
        assert await bad(change(world, bare, password=NEW)) == "email"
        assert await bad(change(world, bare, password=NEW, **proof)) == "email"
        assert (
            await bad(change(world, bare, password=NEW, current_password=NEW, email="x@example.org"))
            == "current_password"
        )
        # The fault of a field is told before the conflict of another.
        assert await bad(change(world, user, email=taken, password=NEW)) == "current_password"
        assert await world.stored(user.user_id) == user
        assert world.hasher.hashed == []
        assert "password" in repr(msgspec.convert({"password": NEW}, UserChanges))
        assert NEW not in repr(msgspec.convert({"password": NEW, "current_password": NEW}, UserChanges))

    run(test)


# ---- what a change ends


def test_a_new_password_ends_tokens_and_logins(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add()
        token, others_token = world.login(user), world.login(other)
        family, others_family = await world.family(user), await world.family(other)
        world.now += 10
        view = await change(world, user, world.judge(token), password=NEW, current_password=PASSWORD)
        assert (view.user_id, view.updated_at) == (user.user_id, "2030-01-01T00:00:10Z")
        stored = await world.stored(user.user_id)
        assert stored.password == quick_hash(NEW)
        assert stored.tokens_revoked_at is not None
        assert stored.tokens_revoked_at.timestamp() == world.now + 2
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL
        assert not await world.family_lives(family)
        # Whoever had read the user before the change and issues only now:
        assert world.judge(world.login(user)) is ErrorCode.BAD_CREDENTIAL
        # Who has read the change:
        assert world.judge(world.login(stored)).user_id == user.user_id
        assert world.judge(others_token).user_id == other.user_id
        assert await world.family_lives(others_family)
        assert [body["user"] for body in world.published] == [user.user_id]

        for wrong in (PASSWORD, "", NEW + " "):
            error = await refused(
                ErrorCode.BAD_CREDENTIAL, change(world, stored, password=PASSWORD, current_password=wrong)
            )
            assert error.details == {"field": "current_password"}
        await change(world, stored, password=PASSWORD, current_password=NEW)

    run_stored(test)


def test_a_first_password_needs_an_email(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add(email=None, password=None)
        await change(world, user, password=NEW, email="me@example.org")
        stored = await world.users.find_by_email("ME@example.org")
        assert (stored.user_id, stored.password) == (user.user_id, quick_hash(NEW))
        other = await world.add(password=None)
        await change(world, other, password=NEW)
        assert (await world.stored(other.user_id)).password == quick_hash(NEW)

    run_stored(test)


def test_guessing_the_current_password_gets_slower(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        for number in range(FREE_ACCOUNT_FAILURES + 1):
            await refused(
                ErrorCode.BAD_CREDENTIAL,
                change(world, user, password=NEW, current_password=f"guess {number}"),
            )
        right = {"password": NEW, "current_password": PASSWORD}
        await refused(ErrorCode.RATE_LIMITED, change(world, user, **right))
        assert len(world.hasher.verified) == FREE_ACCOUNT_FAILURES + 1
        world.now += 1
        await change(world, user, **right)
        # The success has cleared the count.
        await refused(ErrorCode.BAD_CREDENTIAL, change(world, user, password=NEW, current_password=PASSWORD))

    run(test)


def test_an_email_changes_by_itself(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add()
        token, family = world.login(user), await world.family(user)
        error = await refused(ErrorCode.CONFLICT, change(world, user, email=str(other.email).upper()))
        assert error.details == {"fields": ["email"]}
        assert (await change(world, user, email=str(user.email).upper())).email == str(user.email).upper()
        assert (await change(world, user, email="new@example.org")).email == "new@example.org"
        assert await world.users.find_by_email(str(user.email)) is None
        assert (await world.add(email=user.email)).email == user.email  # free again
        assert world.judge(token).user_id == user.user_id
        assert await world.family_lives(family)
        assert world.published == []

    run_stored(test)


def test_a_change_is_whole_or_nothing(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add()
        token, family = world.login(user), await world.family(user)
        wallet = Wallet.generate()
        proof = await world.wallet_proof(wallet)
        new = {"password": NEW, "current_password": PASSWORD}
        error = await refused(ErrorCode.CONFLICT, change(world, user, email=other.email, **new, **proof))
        assert error.details == {"fields": ["email"]}
        await refused(
            ErrorCode.BAD_SIGNATURE,
            change(world, user, email="new@example.org", **new, **{**proof, "signature": "00" * 65}),
        )
        assert await bad(change(world, user, email=other.email, password=NEW, **proof)) == "current_password"
        # What cannot be is told before anything is hashed, and is no guess.
        assert world.hasher.verified == []
        assert await world.redis.keys("lucid:login_failures:*") == []
        await refused(
            ErrorCode.BAD_CREDENTIAL,
            change(world, user, email="new@example.org", password=NEW, current_password="x", **proof),
        )
        await refused(
            ErrorCode.UNKNOWN_CHALLENGE,
            change(world, user, email="new@example.org", **new, **{**proof, "message": "other"}),
        )
        assert await world.stored(user.user_id) == user
        assert world.judge(token).user_id == user.user_id
        assert await world.family_lives(family)
        assert world.hasher.hashed == []
        # And the challenge is still good.
        await change(world, user, email="new@example.org", **new, **proof)
        stored = await world.stored(user.user_id)
        assert (stored.email, stored.password, stored.tron_address) == (
            "new@example.org",
            quick_hash(NEW),
            wallet.address,
        )

    run(test)


def test_what_is_so_already_changes_nothing(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add("node_operator")
        token = world.login(user)
        world.now += 10
        by = principal_of("x", Role.ADMIN)
        view = await change(world, user, by, role="node_operator", email=user.email)
        assert view.updated_at == "2030-01-01T00:00:00Z"
        assert await world.stored(user.user_id) == user
        assert world.judge(token).role is Role.NODE_OPERATOR

    run(test)


# ---- wallets


def test_an_address_needs_a_fresh_challenge_that_its_wallet_has_signed(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        old, new, strange = Wallet.generate(), Wallet.generate(), Wallet.generate()
        user = await world.add(tron_address=old.address)
        token = world.login(user)
        proof = await world.wallet_proof(new)
        for fields, code in (
            ({**proof, "signature": strange.sign(proof["message"])}, ErrorCode.BAD_SIGNATURE),
            ({**proof, "signature": old.sign(proof["message"])}, ErrorCode.BAD_SIGNATURE),
            ({**proof, "message": proof["message"] + " "}, ErrorCode.UNKNOWN_CHALLENGE),
            ({**proof, "tron_address": strange.address}, ErrorCode.UNKNOWN_CHALLENGE),
        ):
            await refused(code, change(world, user, **fields))
        # None of these has spent it.
        assert (await change(world, user, **proof)).tron_address == new.address
        assert await world.users.find_by_tron_address(old.address) is None
        assert world.judge(token).user_id == user.user_id  # the role is what it was
        other = await world.add()
        await refused(ErrorCode.UNKNOWN_CHALLENGE, change(world, other, **proof))  # spent
        await refused(ErrorCode.UNKNOWN_CHALLENGE, change(world, user, **proof))

        proof = await world.wallet_proof(new)
        error = await refused(ErrorCode.CONFLICT, change(world, other, **proof))
        assert error.details == {"fields": ["tron_address"]}
        await world.service.delete("me", world.principal(user), CALLER)
        # The conflict has not spent it, and a deleted user's address is free.
        assert (await change(world, other, **proof)).tron_address == new.address

        proof = await world.wallet_proof(strange)
        await world.redis.flushall()  # it has expired
        await refused(ErrorCode.UNKNOWN_CHALLENGE, change(world, other, **proof))

    run_stored(test)


def test_one_challenge_serves_one_of_two_at_once(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        wallet = Wallet.generate()
        proof = await world.wallet_proof(wallet)
        users = [await world.add() for _ in range(8)]
        answers = await asyncio.gather(
            *(change(world, user, **proof) for user in users), return_exceptions=True
        )
        done = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(done) == 1
        codes = {answer.code for answer in answers if isinstance(answer, GatewayError)}
        assert codes <= {ErrorCode.UNKNOWN_CHALLENGE, ErrorCode.CONFLICT}
        assert (await world.users.find_by_tron_address(wallet.address)).user_id == done[0].user_id

    run_stored(test)


def test_a_listed_address_makes_a_super_admin_and_its_loss_unmakes_one(run: Run) -> None:
    listed, plain = Wallet.generate(), Wallet.generate()

    async def test(world: Accounts) -> None:
        user = await world.add()
        token = world.login(user)
        view = await change(world, user, **await world.wallet_proof(listed))
        assert (view.role, view.permissions) == ("super_admin", PERMISSIONS[Role.SUPER_ADMIN])
        assert (await world.stored(user.user_id)).role == "user"
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL
        world.now += 10
        user = await world.stored(user.user_id)
        token = world.login(user)
        assert world.judge(token).role is Role.SUPER_ADMIN
        assert (await change(world, user, **await world.wallet_proof(plain))).role == "user"
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL

    run(test, admins=frozenset({listed.address}))


# ---- roles


def test_another_role_ends_tokens_and_keeps_logins(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        token, family = world.login(user), await world.family(user)
        digest = b"d" * 32
        world.keys.put(digest, world.principal(user, "api_key"), 0.0)
        view = await change(world, user, principal_of("x", Role.ADMIN), role="node_operator")
        assert (view.role, view.permissions) == ("node_operator", PERMISSIONS[Role.NODE_OPERATOR])
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL
        assert world.judge(world.login(user)) is ErrorCode.BAD_CREDENTIAL
        assert world.judge(world.login(await world.stored(user.user_id))).role is Role.NODE_OPERATOR
        assert await world.family_lives(family)
        assert world.keys.get(digest, 0.0) is None  # its keys are asked about again

    run_stored(test)


# ---- races


def just_before(world: Accounts, name: str, *actions: Callable[[], Awaitable[object]]) -> None:
    """Do these, one before each next call of a method of `users`."""
    real, waiting = getattr(world.users, name), list(actions)

    async def wrapped(*arguments: Any, **named: Any) -> Any:
        if waiting:
            await waiting.pop(0)()
        return await real(*arguments, **named)

    setattr(world.users, name, wrapped)


def test_who_has_become_an_admin_meanwhile_is_judged_as_one(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        update = world.users.update
        just_before(world, "update", lambda: update(user.user_id, {"role": "admin"}))
        for fields in ({"email": "new@example.org"}, {"role": "node_operator"}):
            await refused(
                ErrorCode.ROLE_TOO_LOW, change(world, user, principal_of("x", Role.ADMIN), **fields)
            )
        stored = await world.stored(user.user_id)
        assert (stored.role, stored.email) == ("admin", user.email)

    run_stored(test)


def test_a_password_that_was_changed_meanwhile_is_not_current_any_more(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        update = world.users.update
        just_before(world, "update", lambda: update(user.user_id, {"password": quick_hash("third")}))
        await refused(ErrorCode.BAD_CREDENTIAL, change(world, user, password=NEW, current_password=PASSWORD))
        assert (await world.stored(user.user_id)).password == quick_hash("third")

    run_stored(test)


def test_a_judgement_made_again_asks_for_no_second_challenge(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        update = world.users.update
        just_before(world, "update", lambda: update(user.user_id, {"role": "node_operator"}))
        wallet = Wallet.generate()
        fields = {"password": NEW, "current_password": PASSWORD, **await world.wallet_proof(wallet)}
        view = await change(world, user, **fields)
        assert (view.tron_address, view.role) == (wallet.address, "node_operator")
        assert world.hasher.verified == [PASSWORD]
        assert world.hasher.hashed == [NEW]

    run_stored(test)


def test_who_never_stands_still_is_a_conflict(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        update = world.users.update
        roles = ["node_operator", "user"] * MOST_JUDGEMENTS
        just_before(
            world,
            "update",
            *(lambda role=role: update(user.user_id, {"role": role}) for role in roles[:MOST_JUDGEMENTS]),
        )
        by = principal_of("x", Role.ADMIN)
        await refused(ErrorCode.CONFLICT, change(world, user, by, email="new@example.org"))
        assert (await world.stored(user.user_id)).email == user.email
        await change(world, user, by, email="new@example.org")

    run(test)


def test_deleted_meanwhile_is_not_there(run: Run) -> None:
    async def test(world: Accounts) -> None:
        by = principal_of("x", Role.ADMIN)
        for name, call in (
            ("update", lambda user: change(world, user, by, role="node_operator")),
            ("delete", lambda user: world.service.delete(user.user_id, by, CALLER)),
        ):
            user = await world.add()
            delete = world.users.delete

            async def remove(user: UserDocument = user, delete: Any = delete) -> None:
                await delete(user.user_id, revoke_tokens_at=world.utc_now())

            just_before(world, name, remove)
            await refused(ErrorCode.NOT_FOUND, call(user))

    run(test)


def test_one_email_goes_to_one_of_many_at_once(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        users = [await world.add() for _ in range(20)]
        answers = await asyncio.gather(
            *(change(world, user, email="wanted@example.org") for user in users), return_exceptions=True
        )
        done = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(done) == 1
        for answer in answers:
            if isinstance(answer, GatewayError):
                assert (answer.code, answer.details) == (ErrorCode.CONFLICT, {"fields": ["email"]})
        assert (await world.users.find_by_email("wanted@example.org")).user_id == done[0].user_id

    run_stored(test)


def test_one_user_changed_by_many_at_once_keeps_a_change_of_each(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        wallet = Wallet.generate()
        by = principal_of("x", Role.ADMIN)
        proof = await world.wallet_proof(wallet)
        await asyncio.gather(
            change(world, user, email="new@example.org"),
            change(world, user, by, role="node_operator"),
            change(world, user, password=NEW, current_password=PASSWORD),
            change(world, user, **proof),
        )
        stored = await world.stored(user.user_id)
        assert (stored.email, stored.role, stored.password, stored.tron_address) == (
            "new@example.org",
            "node_operator",
            quick_hash(NEW),
            wallet.address,
        )

    run_stored(test)


# ---- when something breaks in between


def failing(method: Callable[..., Awaitable[Any]], *, after: int = 0) -> Callable[..., Awaitable[Any]]:
    """`method`, which is away from its call number `after` on."""
    calls = 0

    async def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise GatewayError(ErrorCode.DEPENDENCY_AWAY)
        return await method(*arguments, **named)

    return wrapped


def test_a_password_that_could_not_be_written_has_ended_logins_and_nothing_else(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        token, family = world.login(user), await world.family(user)
        real, world.users.update = world.users.update, failing(world.users.update)
        fields = {"password": NEW, "current_password": PASSWORD}
        await refused(ErrorCode.DEPENDENCY_AWAY, change(world, user, **fields))
        assert await world.stored(user.user_id) == user
        assert world.judge(token).user_id == user.user_id
        assert not await world.family_lives(family)
        # So that, had the process died behind the write instead, the login would not have lived on.
        world.users.update = real
        await change(world, user, **fields)

    run(test)


def test_a_password_is_not_written_while_logins_cannot_be_ended(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        world.refresh_tokens.revoke_user = failing(world.refresh_tokens.revoke_user)
        await refused(ErrorCode.DEPENDENCY_AWAY, change(world, user, password=NEW, current_password=PASSWORD))
        assert await world.stored(user.user_id) == user

    run(test)


def test_what_is_written_is_done_although_something_breaks_behind_it(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user, other = await world.add(), await world.add()
        token, others = world.login(user), world.login(other)
        real = world.refresh_tokens.revoke_user
        world.refresh_tokens.revoke_user = failing(real, after=1)
        await change(world, user, password=NEW, current_password=PASSWORD)
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL
        world.api_keys.revoke_all = failing(world.api_keys.revoke_all)
        await world.service.delete("me", world.principal(other), CALLER)
        assert await world.users.find_by_id(other.user_id) is None
        assert world.judge(others) is ErrorCode.BAD_CREDENTIAL

    run(test)


def test_a_login_of_the_old_password_that_began_meanwhile_ends_too(run: Run) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        families = []

        async def begin() -> None:
            families.append(await world.family(user))

        just_before(world, "update", begin)
        await change(world, user, password=NEW, current_password=PASSWORD)
        assert len(families) == 1
        assert not await world.family_lives(families[0])

    run(test)


@pytest.mark.parametrize("what", ["role", "password", "delete"])
def test_a_caller_who_leaves_interrupts_nothing(run: Run, what: str) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        token, family = world.login(user), await world.family(user)
        written, go_on = asyncio.Event(), asyncio.Event()
        name = "delete" if what == "delete" else "update"
        real = getattr(world.users, name)

        async def slow(*arguments: Any, **named: Any) -> Any:
            answer = await real(*arguments, **named)
            written.set()
            await go_on.wait()
            return answer

        setattr(world.users, name, slow)
        by = principal_of("x", Role.ADMIN)
        call = {
            "role": lambda: change(world, user, by, role="node_operator"),
            "password": lambda: change(world, user, password=NEW, current_password=PASSWORD),
            "delete": lambda: world.service.delete(user.user_id, by, CALLER),
        }[what]()
        request = asyncio.create_task(call)
        async with asyncio.timeout(5):
            await written.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        go_on.set()
        async with asyncio.timeout(5):
            while world.service._unbroken._tasks:
                await asyncio.wait(world.service._unbroken._tasks)
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL
        assert await world.family_lives(family) is (what == "role")

    run(test)


def test_a_guess_is_recorded_whenever_its_caller_leaves(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lucid.audit")

    async def test(world: Accounts) -> None:
        service = world.service
        for at in itertools.count(1):
            user = await world.add()
            caplog.clear()
            hang_up = HangUp(at, (world.proofs, "_delays"), (world.proofs, "_passwords"))
            call = change(world, user, password=NEW, current_password="a guess")
            hung_up = await hang_up(call, service)
            # Whoever leaves before anybody looks at the password has guessed nothing.
            assert audited(caplog) == ([] if at == 1 else ["password_change_failed"])
            if not hung_up:
                break
        assert hang_up.calls == ["admit", "verify"]
        user = await world.add()
        right = change(world, user, password=NEW, current_password=PASSWORD)
        hang_up = HangUp(3, (world.proofs, "_delays"), (world.proofs, "_passwords"))
        assert await hang_up(right, service)
        assert hang_up.calls == ["admit", "verify", "succeeded"]
        assert await world.stored(user.user_id) == user
        guess = world.login(user)
        assert world.judge(guess).user_id == user.user_id

    run(test)


def test_a_registration_is_recorded_whenever_its_caller_leaves(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lucid.audit")

    async def test(world: Accounts) -> None:
        service = world.service
        for at in itertools.count(1):
            email = f"new{at}@example.org"
            caplog.clear()
            hang_up = HangUp(at, (service, "_users"), (service, "_passwords"))
            hung_up = await hang_up(service.register(email, NEW, CALLER), service)
            made = await world.users.find_by_email(email) is not None
            assert audited(caplog) == (["user_created"] if made else [])
            assert made is (at > 2)
            if not hung_up:
                break
        assert hang_up.calls == ["find_by_email", "hash", "create"]

    run(test)


# ---- deleting


def test_a_deleted_user_is_gone_with_all_that_was_theirs(run_stored: Run) -> None:
    async def test(world: Accounts) -> None:
        wallet = Wallet.generate()
        user = await world.add(tron_address=wallet.address)
        token, family = world.login(user), await world.family(user)
        key = ApiKeyDocument("k", b"d" * 32, user.user_id, "n", "user", world.utc_now())
        await world.api_keys.create(key)
        world.keys.put(key.digest, world.principal(user, "api_key"), 0.0)
        assert await world.service.delete("me", world.judge(token), CALLER) is None
        assert world.judge(token) is ErrorCode.BAD_CREDENTIAL
        assert world.judge(world.login(user)) is ErrorCode.BAD_CREDENTIAL
        assert not await world.family_lives(family)
        assert await world.api_keys.find_by_digest(key.digest) is None
        assert world.keys.get(key.digest, 0.0) is None
        for by in (world.principal(user), principal_of("x", Role.SUPER_ADMIN)):
            await refused(ErrorCode.NOT_FOUND, world.service.delete(user.user_id, by, CALLER))
            await refused(ErrorCode.NOT_FOUND, world.service.get(user.user_id, by))
            await refused(ErrorCode.NOT_FOUND, change(world, user, by, email="new@example.org"))
        assert world.connection is not None
        row = await world.connection.database["users"].find_one({"_id": user.user_id})
        assert row is not None
        assert row["live"] is False
        assert "password" not in row
        assert row["tokens_revoked_at"].timestamp() == world.now + 2
        again = await world.add(email=user.email, tron_address=wallet.address)
        assert again.user_id != user.user_id

    run_stored(test)


@pytest.mark.parametrize("skew_seconds", [0.0, -1.9])
def test_of_two_changes_at_once_the_second_ends_the_tokens_of_between(run: Run, skew_seconds: float) -> None:
    async def test(world: Accounts) -> None:
        user = await world.add()
        by = principal_of("x", Role.ADMIN)
        for number, role in enumerate(("node_operator", "user", "node_operator", "")):
            token = world.login(await world.stored(user.user_id))
            assert world.judge(token).user_id == user.user_id
            if number:
                world.now += skew_seconds  # another worker, whose clock is behind
            if role:
                await change(world, user, by, role=role)
            else:
                await world.service.delete(user.user_id, by, CALLER)
            if number:
                world.now -= skew_seconds
            assert world.judge(token) is ErrorCode.BAD_CREDENTIAL

    run(test)


# ---- the audit log


def test_the_audit_log_tells_what_changed_and_no_secret(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    wallet = Wallet.generate()
    ids: dict[str, str] = {}

    async def test(world: Accounts) -> None:
        caller = Caller("192.0.2.9", "r-9")

        async def update(user: UserDocument, by: Principal, **fields: Any) -> None:
            await world.service.update(user.user_id, msgspec.convert(fields, UserChanges), by, caller)

        view = await world.service.register("ann@example.org", NEW, caller)
        user = await world.stored(view.user_id)
        ids["user"] = user.user_id
        me, admin = world.principal(user), principal_of("x", Role.ADMIN)
        await update(user, admin, role="node_operator")
        with pytest.raises(GatewayError):
            await update(user, me, password=PASSWORD, current_password="a wrong one")
        await update(user, me, password=PASSWORD, current_password=NEW)
        proof = await world.wallet_proof(wallet)
        for wrong in ({"message": "never given out"}, {"signature": Wallet.generate().sign("x")}):
            with pytest.raises(GatewayError):
                await update(user, me, **{**proof, **wrong})
        await update(user, me, email="other@example.org", **proof)
        with pytest.raises(GatewayError):
            await update(user, me, role="admin")
        await world.service.delete("me", me, caller)
        other = await world.add()
        ids["other"] = other.user_id
        await world.service.delete(other.user_id, principal_of("x", Role.ADMIN, "api_key"), caller)

    with caplog.at_level(logging.INFO):
        run(test, admins=frozenset({wallet.address}))
    told = [record.__dict__["audit"] for record in caplog.records if record.name == "lucid.audit"]
    user = ids["user"]
    common = {"address": "192.0.2.9", "request_id": "r-9", "user_id": user}
    own = {**common, "by": user, "via": "token"}
    assert told == [
        {"event": "user_created", **common},
        {
            "event": "role_changed",
            **common,
            "by": "x",
            "via": "token",
            "from": "user",
            "to": "node_operator",
        },
        {"event": "password_change_failed", **common},
        {"event": "password_changed", **own},
        {"event": "wallet_change_failed", **common, "code": ErrorCode.UNKNOWN_CHALLENGE.value},
        {"event": "wallet_change_failed", **common, "code": ErrorCode.BAD_SIGNATURE.value},
        {
            "event": "role_changed",
            **own,
            "from": "node_operator",
            "to": "super_admin",
            "stored": "node_operator",
        },
        {"event": "email_changed", **own},
        {"event": "wallet_changed", **own},
        {"event": "user_deleted", **own},
        {"event": "user_deleted", **common, "user_id": ids["other"], "by": "x", "via": "api_key"},
    ]
    everything = repr([record.__dict__ for record in caplog.records])
    for secret in (NEW, PASSWORD, "a wrong one", "example.org", quick_hash(NEW), wallet.address):
        assert secret not in everything
