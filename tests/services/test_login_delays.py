"""What guesses of passwords cost: the waits, over a real Redis, on a clock that the test advances."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable

import pytest
import redis
import redis.asyncio

from lucid.errors import ErrorCode, GatewayError
from lucid.services.login_delays import (
    FORGOTTEN_SECONDS,
    FREE_ACCOUNT_FAILURES,
    FREE_ADDRESS_FAILURES,
    KNOWN_SECONDS,
    MOST_ACCOUNT_SECONDS,
    MOST_ADDRESS_SECONDS,
    Attempt,
    LoginDelays,
    waits_seconds,
)
from tests.support.servers import until
from tests.support.stores import RedisChild, free_port

EMAIL = "ann@example.org"
HERE, THERE = "192.0.2.1", "198.51.100.7"


class World:
    """Two workers' delays over one Redis, and the clock."""

    def __init__(self, uri: str) -> None:
        self.now = 1_893_456_000.5
        self.redis = redis.asyncio.Redis.from_url(uri)
        self.workers = [LoginDelays(self.redis, lambda: self.now) for _ in range(2)]
        self.turn = 0

    async def attempt(self, email: str = EMAIL, address: str = HERE) -> Attempt | int:
        """The attempt, or how many seconds it has to wait."""
        self.turn += 1
        try:
            return await self.workers[self.turn % 2].admit(email, address)
        except GatewayError as error:
            refusal = error
        assert refusal.code is ErrorCode.RATE_LIMITED
        seconds = refusal.details["retry_after_seconds"]
        assert isinstance(seconds, int)
        assert refusal.fields == (("Retry-After", str(seconds)),)
        return seconds

    async def fail(self, times: int, email: str = EMAIL, address: str = HERE) -> None:
        for _ in range(times):
            assert isinstance(await self.attempt(email, address), Attempt)


Test = Callable[[World], Awaitable[None]]


@pytest.fixture
def run(redis_server: RedisChild) -> Callable[[Test], None]:
    def runner(test: Test) -> None:
        async def main() -> None:
            world = World(redis_server.uri)
            await world.redis.flushall()
            try:
                await test(world)
            finally:
                await world.redis.aclose()

        asyncio.run(main())

    return runner


Run = Callable[[Test], None]


def test_the_waits_grow_to_their_bound() -> None:
    assert waits_seconds(5, 60) == (0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60)
    assert waits_seconds(0, 1) == (1,)
    assert waits_seconds(1, 8) == (0, 1, 2, 4, 8)
    address = waits_seconds(FREE_ADDRESS_FAILURES, MOST_ADDRESS_SECONDS)
    assert address == (*[0] * 20, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    # A count that is forgotten sooner than its wait ends would make waiting pointless.
    assert max(MOST_ACCOUNT_SECONDS, MOST_ADDRESS_SECONDS) < FORGOTTEN_SECONDS


def test_an_account_waits_longer_with_every_failure(run: Run) -> None:
    async def test(world: World) -> None:
        await world.fail(FREE_ACCOUNT_FAILURES)
        for wait in (1, 2, 4, 8, 16, 32, 60, 60, 60):
            await world.fail(1)
            assert await world.attempt() == wait
            world.now += wait - 0.5
            # Whole seconds, never fewer than are left; and asking did not lengthen it.
            assert await world.attempt() == 1
            assert await world.attempt(EMAIL.upper(), THERE) == 1
            world.now += 0.5

    run(test)


def test_an_address_waits_for_whatever_account(run: Run) -> None:
    async def test(world: World) -> None:
        number = 0

        async def other() -> Attempt | int:
            nonlocal number
            number += 1
            return await world.attempt(f"user{number}@example.org", HERE)

        for _ in range(FREE_ADDRESS_FAILURES + 1):
            assert isinstance(await other(), Attempt)
        for wait in (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300):
            assert await other() == wait
            assert isinstance(await world.attempt(f"o{number}@example.org", f"10.0.0.{number}"), Attempt)
            world.now += wait
            assert isinstance(await other(), Attempt)

    run(test)


def test_an_ipv6_address_is_its_network(run: Run) -> None:
    async def test(world: World) -> None:
        for number in range(FREE_ADDRESS_FAILURES + 1):
            await world.fail(1, f"u{number}@example.org", f"2001:db8:1:2::{number:x}")
        assert await world.attempt(EMAIL, "2001:db8:1:2:ffff::1") == 1
        assert isinstance(await world.attempt(EMAIL, "2001:db8:1:3::1"), Attempt)

    run(test)


def test_a_refused_attempt_counts_nowhere(run: Run) -> None:
    async def test(world: World) -> None:
        # The account refuses: the address is not charged for it, however often.
        await world.fail(FREE_ACCOUNT_FAILURES + 1, EMAIL, THERE)
        for _ in range(3 * FREE_ADDRESS_FAILURES):
            assert await world.attempt(EMAIL, HERE) == 1
        for number in range(FREE_ADDRESS_FAILURES + 1):
            await world.fail(1, f"x{number}@example.org", HERE)
        # The address refuses: the account is not charged for it.
        for _ in range(3 * FREE_ACCOUNT_FAILURES):
            assert await world.attempt("bob@example.org", HERE) == 1
        await world.fail(FREE_ACCOUNT_FAILURES, "bob@example.org", "203.0.113.9")

    run(test)


def test_a_success_clears_the_account_and_gives_the_address_its_own_back(run: Run) -> None:
    async def test(world: World) -> None:
        await world.fail(FREE_ACCOUNT_FAILURES)
        right = await world.attempt()
        assert isinstance(right, Attempt)
        await world.workers[0].succeeded(right)
        await world.fail(FREE_ACCOUNT_FAILURES + 1)
        # The address has failed 11 times; the success counts neither way.
        for number in range(FREE_ADDRESS_FAILURES - 11 + 1):
            await world.fail(1, f"u{number}@example.org")
        assert await world.attempt("another@example.org") == 1

    run(test)


def test_guesses_from_elsewhere_keep_no_known_address_out(run: Run) -> None:
    async def test(world: World) -> None:
        right = await world.attempt(EMAIL, HERE)
        assert isinstance(right, Attempt)
        await world.workers[0].succeeded(right)
        ttl = await world.redis.ttl(right.known_key)
        assert KNOWN_SECONDS - 60 < ttl <= KNOWN_SECONDS
        assert "ann" not in right.known_key
        # Somebody takes each moment in which there is no wait, each time from another address.
        number = 0
        for _ in range(2):
            for _ in range(40):
                number += 1
                world.now += MOST_ACCOUNT_SECONDS
                await world.fail(1, EMAIL, f"203.0.{number}.1")
            assert await world.attempt(EMAIL, THERE) == MOST_ACCOUNT_SECONDS
            assert await world.attempt("bob@example.org", HERE) != MOST_ACCOUNT_SECONDS
            right = await world.attempt(EMAIL.upper(), HERE)
            assert isinstance(right, Attempt)
            await world.workers[1].succeeded(right)
            # And that sets nobody else free.
            assert await world.attempt(EMAIL, THERE) == MOST_ACCOUNT_SECONDS

    run(test)


def test_a_known_address_waits_for_its_own_failures_and_for_that_account_only(run: Run) -> None:
    async def test(world: World) -> None:
        right = await world.attempt(EMAIL, "2001:db8:1:2::1")
        assert isinstance(right, Attempt)
        await world.workers[0].succeeded(right)
        for wait in (*[0] * FREE_ACCOUNT_FAILURES, 0, 1, 2, 4, 8):
            world.now += wait
            await world.fail(1, EMAIL, "2001:db8:1:2::2")
        assert await world.attempt(EMAIL, "2001:db8:1:2::3") == 16
        # Its failures keep nobody else out.
        await world.fail(FREE_ACCOUNT_FAILURES + 1, EMAIL, THERE)
        assert await world.attempt(EMAIL, HERE) == 1
        # Nor is it known to another account.
        await world.fail(FREE_ACCOUNT_FAILURES + 1, "bob@example.org", THERE)
        assert await world.attempt("bob@example.org", "2001:db8:1:2::1") == 1

    run(test)


def test_an_account_of_ones_own_does_not_free_an_address(run: Run) -> None:
    async def test(world: World) -> None:
        for number in range(FREE_ADDRESS_FAILURES + 1):
            mine = await world.attempt("mallory@example.org")
            assert isinstance(mine, Attempt)
            await world.workers[1].succeeded(mine)
            await world.fail(1, f"u{number}@example.org")
        assert await world.attempt("mallory@example.org") == 1

    run(test)


def test_a_withdrawn_attempt_leaves_everything_as_it_was(run: Run) -> None:
    async def test(world: World) -> None:
        first = await world.attempt()
        assert isinstance(first, Attempt)
        await world.workers[0].withdrawn(first)
        assert await world.redis.keys("*") == []

        await world.fail(FREE_ACCOUNT_FAILURES + 1)
        world.now += 1
        for _ in range(3):
            attempt = await world.attempt()
            assert isinstance(attempt, Attempt)
            assert await world.attempt() == 2
            await world.workers[0].withdrawn(attempt)
        # Another attempt that came since keeps its own wait: the seventh failure's, from its own moment.
        slow = await world.attempt()
        assert isinstance(slow, Attempt)
        world.now += 2
        await world.fail(1)
        assert await world.attempt() == 4
        await world.workers[0].withdrawn(slow)
        assert await world.attempt() == 2

    run(test)


def test_failures_are_forgotten_after_the_last_one(run: Run) -> None:
    async def test(world: World) -> None:
        await world.fail(FREE_ACCOUNT_FAILURES + 1)
        world.now += FORGOTTEN_SECONDS - 0.01
        await world.fail(1)
        assert await world.attempt() == 2
        world.now += FORGOTTEN_SECONDS
        await world.fail(FREE_ACCOUNT_FAILURES + 1)
        assert await world.attempt() == 1
        for key in await world.redis.keys("*"):
            assert FORGOTTEN_SECONDS - 60 < await world.redis.ttl(key) <= FORGOTTEN_SECONDS

    run(test)


def test_no_email_is_stored(run: Run) -> None:
    async def test(world: World) -> None:
        await world.fail(2)
        keys = [key.decode() for key in await world.redis.keys("*")]
        assert sorted(key.partition(":{")[0] for key in keys) == ["lucid:login_failures"] * 2
        assert not any("ann" in key or "example" in key for key in keys)
        values = [await world.redis.hgetall(key) for key in keys]
        assert [set(value) for value in values] == [{b"failures", b"at"}] * 2

    run(test)


def test_a_hundred_guesses_at_once_find_no_gap(run: Run) -> None:
    async def test(world: World) -> None:
        outcomes = await asyncio.gather(*(world.attempt(EMAIL, f"10.0.{n}.1") for n in range(100)))
        assert sum(isinstance(outcome, Attempt) for outcome in outcomes) == FREE_ACCOUNT_FAILURES + 1
        outcomes = await asyncio.gather(*(world.attempt(f"u{n}@example.org") for n in range(100)))
        assert sum(isinstance(outcome, Attempt) for outcome in outcomes) == FREE_ADDRESS_FAILURES + 1

    run(test)


def test_a_clock_that_was_set_back_makes_nobody_wait_longer(run: Run) -> None:
    async def test(world: World) -> None:
        await world.fail(FREE_ACCOUNT_FAILURES + 1)
        world.now -= 3_600
        assert await world.attempt() == 1
        world.now += 1
        await world.fail(1)

    run(test)


def test_redis_own_clock(redis_server: RedisChild) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url(redis_server.uri)
        await client.flushall()
        delays = LoginDelays(client)
        for _ in range(FREE_ACCOUNT_FAILURES):
            await delays.admit(EMAIL, HERE)
        # Three failures more, each in the moment when the wait before it is over by that clock.
        key = (await client.keys("*account*"))[0]
        for wait in (0, 1, 2):
            await client.hincrby(key, "at", -wait * 1_000)
            await delays.admit(EMAIL, HERE)
            seconds, _ = await client.time()
            assert abs(int(await client.hget(key, "at")) / 1_000 - seconds) < 10
        with pytest.raises(GatewayError) as caught:
            await delays.admit(EMAIL, HERE)
        assert caught.value.details == {"retry_after_seconds": 4}
        await client.aclose()

    asyncio.run(main())


def test_without_redis_nobody_guesses() -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url("redis://127.0.0.1:9/0")
        delays = LoginDelays(client)
        with pytest.raises(GatewayError) as caught:
            await delays.admit(EMAIL, HERE)
        assert caught.value.code is ErrorCode.DEPENDENCY_AWAY
        await client.aclose()

    asyncio.run(main())


def test_a_redis_that_goes_away_meanwhile_undoes_no_login() -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
            child = RedisChild(folder)
            child.start()
            client = redis.asyncio.Redis.from_url(child.uri)
            delays = LoginDelays(client)
            try:
                attempt = await delays.admit(EMAIL, HERE)
            finally:
                child.kill()
            await delays.succeeded(attempt)
            await delays.withdrawn(attempt)
            await client.aclose()

    asyncio.run(main())


def test_on_a_cluster() -> None:
    async def main(port: int) -> None:
        client = redis.asyncio.RedisCluster(host="127.0.0.1", port=port)
        delays = LoginDelays(client)
        attempt = await delays.admit(EMAIL, HERE)
        await delays.withdrawn(attempt)
        for _ in range(FREE_ACCOUNT_FAILURES + 1):
            attempt = await delays.admit(EMAIL, HERE)
        with pytest.raises(GatewayError):
            await delays.admit(EMAIL, HERE)
        await delays.succeeded(attempt)
        await delays.admit(EMAIL, HERE)
        await client.aclose()

    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        child = RedisChild(folder, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        child.start()
        try:
            with redis.Redis(port=child.port) as node:
                node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
                until(lambda: node.cluster("info")["cluster_state"] == "ok")
            asyncio.run(main(child.port))
        finally:
            child.kill()
