"""Revocations while Redis is away, over the real control channel: nothing of them is lost."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import redis

from lucid.core.exchange import Principal
from lucid.core.rules.tokens import TokenMemory
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.redis_link import RedisLink, new_holder
from lucid.errors import ErrorCode, GatewayError
from lucid.services import revocations as module
from lucid.services.revocations import KEY, USERS_KEY, Revocation, Revocations, of_user
from tests.support.stores import MongoChild, RedisChild, valkey
from tests.support.wallet import Wallet
from tests.support.workers import CALLER, Fleet, Worker, database_name


async def until(true: Callable[[], bool], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


class Wired:
    """A worker of the identity part behind a control channel of its own, put together as in the app."""

    def __init__(self, fleet: Fleet, mongodb_uri: str, redis_uri: str) -> None:
        self.link = RedisLink(redis_uri)
        self.channel = ControlChannel(self.link, new_holder())
        self.worker = Worker(fleet, mongodb_uri, redis_uri, publish=self._publish)
        revocations = self.worker.revocations
        self.channel.subscribe("revocation", revocations.on_revocation, revocations.load_revocations)

    async def _publish(self, body: Mapping[str, Any]) -> bool:
        return await self.channel.publish("revocation", body)


@contextlib.asynccontextmanager
async def wired(count: int, fleet: Fleet, mongodb_uri: str, redis_uri: str) -> AsyncIterator[list[Wired]]:
    made = [Wired(fleet, mongodb_uri, redis_uri) for _ in range(count)]
    try:
        for each in made:
            await each.channel.start()
        yield made
    finally:
        for each in made:
            await each.channel.stop()
            await each.link.close()
            await each.worker.close()


@pytest.mark.parametrize("all_logins", [False, True])
def test_a_logout_while_redis_is_away_reaches_all_once_it_is_back(
    mongo: MongoChild, all_logins: bool
) -> None:
    fleet = Fleet()
    uri = mongo.in_database(database_name())

    def kept(server: RedisChild) -> int:
        with redis.Redis(port=server.port) as client:
            return int(client.zcard(KEY)) + int(client.zcard(USERS_KEY))

    async def main(server: RedisChild) -> None:
        async with wired(2, fleet, uri, server.uri) as (a, b):
            pair = await a.worker.login(Wallet.generate())
            principal = a.worker.judge(pair.access_token)
            server.stop()
            await until(lambda: not a.channel.connected)
            await a.worker.auth.logout(principal, all_logins, CALLER)
            assert a.worker.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL
            assert isinstance(b.worker.judge(pair.access_token), Principal)
            server.start()
            await until(lambda: b.worker.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL)
            # It is stored as well, with nothing more to call for it, so one that starts afterwards knows it.
            await until(lambda: kept(server) == 1 + all_logins)
            async with wired(1, fleet, uri, server.uri) as (late,):
                assert late.worker.judge(pair.access_token) is ErrorCode.BAD_CREDENTIAL

    with valkey() as server:
        asyncio.run(main(server))


class Script:
    """What Redis would do next, and what was published. For what no real server does at a given moment."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.published: list[dict[str, Any]] = []
        self.reached = True
        self.mongodb_away = False
        self.untold = 0

    async def publish(self, body: dict[str, Any]) -> bool:
        self.published.append(body)
        return self.reached

    async def count_untold(self) -> None:
        self.untold += 1
        if self.mongodb_away:
            raise GatewayError(ErrorCode.DEPENDENCY_AWAY)

    def memory(self) -> TokenMemory:
        return TokenMemory(lambda _: ErrorCode.BAD_CREDENTIAL, lambda: self.now, 10)


def test_what_was_not_stored_is_stored_and_published_again_with_the_next_revocation() -> None:
    async def main(server: RedisChild) -> None:
        script = Script()
        async with contextlib.AsyncExitStack() as stack:
            link = RedisLink(server.uri)
            stack.push_async_callback(link.close)
            revocations = Revocations(link.commands, script.memory(), script.publish, lambda: script.now)
            server.stop()
            await revocations.revoke(Revocation(family="a", until=2_000.0))
            await revocations.revoke(of_user("u", 990.0), Revocation(family="old", until=1_001.0))
            with pytest.raises(GatewayError) as caught:
                await revocations.load_revocations()
            assert caught.value.details == {"dependency": "redis"}
            assert [body.get("family") or body["user"] for body in script.published] == ["a", "u", "old"]
            server.start()
            script.published.clear()
            await revocations.revoke(Revocation(family="b", until=2_000.0))
            assert [body.get("family") or body["user"] for body in script.published] == ["a", "u", "old", "b"]
            script.published.clear()
            await revocations.revoke(Revocation(family="c", until=2_000.0))
            assert [body["family"] for body in script.published] == ["c"]
            other = script.memory()
            await Revocations(link.commands, other, script.publish, lambda: script.now).load_revocations()
            assert other.revocations == 5

    with valkey() as server:
        asyncio.run(main(server))


def test_loading_anew_stores_what_waits() -> None:
    async def main(server: RedisChild) -> None:
        script = Script()
        link = RedisLink(server.uri)
        revocations = Revocations(link.commands, script.memory(), script.publish, lambda: script.now)
        await revocations.revoke(Revocation(family="a", until=2_000.0))
        server.start()
        await revocations.load_revocations()
        assert await link.commands.zcard(KEY) == 1
        assert [body["family"] for body in script.published] == ["a", "a"]
        await link.close()

    with valkey(start=False) as server:
        asyncio.run(main(server))


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "MOST_UNKEPT", 3)

    async def main(server: RedisChild) -> None:
        script = Script()
        link = RedisLink(server.uri)
        revocations = Revocations(link.commands, script.memory(), script.publish, lambda: script.now)
        for n in range(5):
            await revocations.revoke(Revocation(family=f"f{n}", until=2_000.0))
        assert len(script.published) == 5
        server.start()
        await revocations.load_revocations()
        kept = await link.commands.zrange(KEY, 0, -1)
        assert sorted(kept) == [b'{"until":2000.0,"family":"f%d"}' % n for n in (2, 3, 4)]
        await link.close()

    with valkey(start=False) as server, caplog.at_level(logging.ERROR):
        asyncio.run(main(server))
    assert sum("too many revocations" in record.message for record in caplog.records) == 2


def test_a_caller_that_leaves_takes_no_revocation_along() -> None:
    async def main() -> None:
        script = Script()
        stored = asyncio.Event()

        class Slow:
            def pipeline(self, transaction: bool) -> "Slow":
                return self

            def zremrangebyscore(self, *_: Any) -> None: ...

            def zadd(self, *_: Any, **__: Any) -> None: ...

            async def execute(self) -> None:
                await stored.wait()

        revocations = Revocations(Slow(), script.memory(), script.publish, lambda: script.now)
        caller = asyncio.create_task(revocations.revoke(Revocation(family="a", until=2_000.0)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        stored.set()
        await until(lambda: len(script.published) == 1)

    asyncio.run(main())


def test_what_redis_could_not_be_told_is_counted_in_mongodb() -> None:
    """For those whom Redis reaches while it does not reach us: they look at the count."""

    async def main(server: RedisChild) -> None:
        script = Script()
        async with contextlib.AsyncExitStack() as stack:
            link = RedisLink(server.uri)
            stack.push_async_callback(link.close)
            revocations = Revocations(
                link.commands,
                script.memory(),
                script.publish,
                lambda: script.now,
                count_untold=script.count_untold,
            )
            for reached, away, untold in (
                (True, False, 0),
                (False, False, 1),
                (False, True, 2),
                (True, False, 2),
            ):
                script.reached, script.mongodb_away = reached, away
                await revocations.revoke(Revocation(family=f"f{untold}{reached}{away}", until=2_000.0))
                assert script.untold == untold

    with valkey() as server:
        asyncio.run(main(server))
