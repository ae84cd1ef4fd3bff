"""Limits that a service charges, over a real store: by whom they are counted, and what the refused are told."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis

from lucid.core.exchange import Exchange, Limit, Principal, Role
from lucid.core.rules.claims import LimitSet
from lucid.core.wire.lease_store import LeaseStore
from lucid.core.wire.redis_link import RedisLink, new_holder
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller
from lucid.services.rate_limit_service import RateLimitService
from tests.support import markers
from tests.support.stores import RedisChild

PUBLIC = Limit("public", 50, 60)
LOGIN = Limit("login", 3, 60, per="address")
REFRESH = Limit("refresh", 2, 60)

Test = Callable[[RateLimitService, LeaseStore, RedisLink], Awaitable[None]]


@pytest.fixture
def run(redis_server: RedisChild) -> Callable[[Test], None]:
    @contextlib.asynccontextmanager
    async def served(jitter: float) -> AsyncIterator[tuple[RateLimitService, LeaseStore, RedisLink]]:
        link = RedisLink(redis_server.uri)
        with redis.Redis(port=redis_server.port) as client:
            client.flushall()
            markers.plant(client)
        # Its own deadline is for a busy fleet: here a slow machine must not decide alone.
        store = LeaseStore(link, new_holder(), fleet_told=1, deadline_seconds=2.0)
        await store.start()
        limits = {limit.name: limit for limit in (PUBLIC, LOGIN, REFRESH)}
        try:
            yield RateLimitService(store, limits, jitter=lambda: jitter), store, link
        finally:
            await store.stop()
            await link.close()

    def runner(test: Test, jitter: float = 0.0) -> None:
        async def main() -> None:
            async with served(jitter) as (service, store, link):
                await test(service, store, link)

        asyncio.run(main())

    return runner


async def refused(awaitable: Awaitable[None]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await awaitable
    assert caught.value.code is ErrorCode.RATE_LIMITED
    return caught.value


def test_ipv6_is_counted_by_its_network_as_everywhere(run: Callable[[Test], None]) -> None:
    async def test(service: RateLimitService, store: LeaseStore, link: RedisLink) -> None:
        for n in range(3):
            await service.charge("login", f"2001:db8::{n + 1}")
        await refused(service.charge("login", "2001:db8::ffff:1"))
        await service.charge("login", "2001:db8:0:1::1")
        await service.charge("login", "192.0.2.1")
        # A user is no address, whatever the id looks like.
        await service.charge("refresh", "2001:db8::1")
        keys = sorted(key.decode() for key in await link.execute("KEYS", "rate_limit:*"))
        assert keys == [
            "rate_limit:login:192.0.2.1",
            "rate_limit:login:2001:db8:0:1::/64",
            "rate_limit:login:2001:db8::/64",
            "rate_limit:refresh:2001:db8::1",
        ]
        assert (await service.look("login", "2001:db8::9")).spent == 3

    run(test)


def fields_of(exchange: Exchange, now: float) -> dict[str, str]:
    assert exchange.claim is not None
    lines = exchange.claim.fields(now).decode().split("\r\n")
    return {name: value for name, _, value in (line.partition(": ") for line in lines) if name}


def test_the_answer_shows_the_limit_that_was_charged_beside_those_of_its_route(
    run: Callable[[Test], None],
) -> None:
    async def test(service: RateLimitService, store: LeaseStore, link: RedisLink) -> None:
        for number in (1, 2, 3):
            exchange = Exchange(None, "192.0.2.1", "192.0.2.1", 0.0)
            exchange.claim = store.leases.claim(LimitSet((PUBLIC,)), "192.0.2.1", "192.0.2.1")
            assert await store.admit(exchange.claim)
            if number < 3:
                await service.charge("refresh", "u", exchange)
            else:
                error = await refused(service.charge("refresh", "u", exchange))
                assert error.details == {"limit": 2, "window_seconds": 60, "name": "refresh"}
            fields = fields_of(exchange, asyncio.get_running_loop().time())
            assert fields["RateLimit-Policy"] == '"public";q=50;w=60, "refresh";q=2;w=60'
            assert f'"public";r={50 - number}' in fields["RateLimit"]
            assert f'"refresh";r={max(0, 2 - number)}' in fields["RateLimit"]
            assert fields["X-RateLimit-Limit"] == "2"
            assert fields["X-RateLimit-Remaining"] == str(max(0, 2 - number))
        # On a route that is not counted, it stands alone.
        exchange = Exchange(None, "192.0.2.1", "192.0.2.1", 0.0)
        await service.charge("login", "192.0.2.1", exchange)
        assert fields_of(exchange, 0.0)["X-RateLimit-Limit"] == "3"
        # One that is off is not there.
        exchange = Exchange(None, "192.0.2.1", "192.0.2.1", 0.0)
        await service.charge("off", "192.0.2.1", exchange)
        assert exchange.claim is None

    run(test)


def test_what_one_limit_refuses_is_not_charged_to_the_others(run: Callable[[Test], None]) -> None:
    async def test(service: RateLimitService, store: LeaseStore, link: RedisLink) -> None:
        for number in range(5):
            exchange = Exchange(None, "192.0.2.1", "192.0.2.1", time.monotonic())
            exchange.claim = store.leases.claim(LimitSet((PUBLIC,)), "192.0.2.1", "192.0.2.1")
            assert await store.admit(exchange.claim)
            if number < REFRESH.requests:
                await service.charge("refresh", "u", exchange)
            else:
                await refused(service.charge("refresh", "u", exchange))
            # The slot before the charge's must be one that the store counts by itself.
            await asyncio.sleep(0.05)
        end = time.monotonic() + 5.0
        while (await service.look("public", "192.0.2.1")).spent != REFRESH.requests:
            assert time.monotonic() < end, await service.look("public", "192.0.2.1")
            await asyncio.sleep(0.02)
        assert store.leases.counters_of["public"].refunded == 3

    run(test)


def test_the_injected_jitter_is_in_retry_after(run: Callable[..., None]) -> None:
    async def test(service: RateLimitService, store: LeaseStore, link: RedisLink) -> None:
        for _ in range(REFRESH.requests):
            await service.charge("refresh", "u")
        error = await refused(service.charge("refresh", "u"))
        # A wait is never longer than some 60 s, so this is the 1,000 of the jitter.
        assert 1_000 < int(dict(error.fields)["Retry-After"]) < 1_100

    run(test, jitter=1_000.0)


def test_a_reset_is_recorded_with_whoever_asked_for_it(
    run: Callable[[Test], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(service: RateLimitService, store: LeaseStore, link: RedisLink) -> None:
        await service.charge("refresh", "alice")
        admin = Principal(Role.ADMIN, "admin", "root", "root")
        await service.reset("refresh", "alice", admin, Caller("192.0.2.9", "r-9"))
        assert (await service.look("refresh", "alice")).spent == 0
        with pytest.raises(GatewayError):
            await service.reset("unknown", "alice", admin, Caller("192.0.2.9", "r-9"))

    with caplog.at_level(logging.INFO, "lucid.audit"):
        run(test)
    told = [record.__dict__["audit"] for record in caplog.records if record.name == "lucid.audit"]
    assert told == [
        {
            "event": "limit_reset",
            "address": "192.0.2.9",
            "request_id": "r-9",
            "user_id": "root",
            "limit": "refresh",
            "identifier": "alice",
        }
    ]
