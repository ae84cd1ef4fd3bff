import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from lucid.core.exchange import Principal, Role
from lucid.core.security.roles import PERMISSIONS
from lucid.database.documents import UserDocument
from lucid.errors import ErrorCode, GatewayError
from lucid.services.user_service import effective_role
from tests.support.stores import MongoChild, RedisChild
from tests.support.wallet import Wallet
from tests.support.workers import EPOCH, database_name, fleet_of


def test_self_and_admins_see_a_user_and_nobody_else(mongo: MongoChild, redis_server: RedisChild) -> None:
    async def main() -> None:
        wallet, other = Wallet.generate(), Wallet.generate()
        async with fleet_of(1, mongo.in_database(database_name()), redis_server.uri) as (_, (worker,)):
            mine, theirs = await worker.login(wallet), await worker.login(other)
            me = worker.judge(mine.access_token)
            get = worker.user_service.get
            view = await get("me", me)
            assert view == await get(mine.user.user_id, me)
            assert (view.user_id, view.tron_address) == (mine.user.user_id, wallet.address)
            assert (view.role, view.permissions) == ("user", PERMISSIONS[Role.USER])
            assert view.email is None
            assert view.last_login_at is not None

            admin = Principal(Role.ADMIN, "admin", "x", "x", via="token")
            operator = Principal(Role.NODE_OPERATOR, "authenticated", "y", "y", via="token")
            assert (await get(theirs.user.user_id, admin)).user_id == theirs.user.user_id
            for call in (
                get(theirs.user.user_id, me),
                get(theirs.user.user_id, operator),
                get("nobody", me),
                get("nobody", admin),
                get("me", admin),  # a token minted by hand has no stored user
                get("../" + mine.user.user_id, admin),
                get("$ne", admin),
                get("", admin),
            ):
                await not_found(call)
            await worker.users.delete(mine.user.user_id)
            await not_found(get("me", me))

    async def not_found(call: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(GatewayError) as caught:
            await call
        assert caught.value.code is ErrorCode.NOT_FOUND
        assert str(caught.value) == "No such user"

    asyncio.run(main())


def test_effective_roles() -> None:
    import datetime as dt

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
