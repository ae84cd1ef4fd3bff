"""The pool: places, waiting, dialling, idling, closing, and the choice among endpoints. Time is stepped."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from lucid.core.wire.pool import IDLE_SECONDS, Balancer, Pool
from lucid.core.wire.upstream import Failure, FailureKind, Upstream
from tests.support.talks import ANSWERED, ASKED, GET, OK
from tests.support.wire import PEER, Caller, World, in_loop


async def got(pool: Pool, *, wait: float = 2.0) -> Upstream:
    return await pool.acquire(connect_seconds=1.0, wait_seconds=wait)


def later(pool: Pool, *, wait: float = 2.0) -> "asyncio.Task[Upstream]":
    return asyncio.get_running_loop().create_task(got(pool, wait=wait))


async def fails(waiting: Any) -> FailureKind:
    with pytest.raises(Failure) as caught:
        await waiting
    assert str(caught.value) == caught.value.reason
    return caught.value.kind


def full_world() -> tuple[World, Pool]:
    world = World(max_connections=2)
    return world, world.pool


# --- places ----------------------------------------------------------------------------------------------


@in_loop
async def test_the_last_used_is_lent_first() -> None:
    _, pool = full_world()
    assert pool.take() is None
    one, two = await got(pool), await got(pool)
    assert (pool.open, pool.idle, pool.in_flight) == (2, 0, 2)
    pool.give_back(one)
    pool.give_back(two)
    assert (pool.open, pool.idle, pool.in_flight) == (2, 2, 0)
    assert pool.take() is two
    assert await got(pool) is one


@in_loop
async def test_never_more_than_its_connections_and_who_waits_first_is_first() -> None:
    world, pool = full_world()
    one, two = await got(pool), await got(pool)
    waiting = [later(pool) for _ in range(3)]
    await asyncio.sleep(0.5)
    assert (pool.open, pool.in_flight, len(world.dialled)) == (2, 5, 2)
    pool.give_back(two)
    pool.give_back(one)
    assert await waiting[0] is two
    assert await waiting[1] is one
    assert not waiting[2].done()
    pool.give_back(one)
    assert await waiting[2] is one
    assert pool.in_flight == 2


@in_loop
async def test_dials_under_way_take_places() -> None:
    world, pool = full_world()
    world.hangs = asyncio.Event()
    tasks = [later(pool, wait=10.0) for _ in range(5)]
    await world.breathe()
    assert (len(world.dialled), pool.open) == (2, 2)
    world.hangs.set()
    pool.give_back(await tasks[0])
    assert await tasks[2]
    for task in tasks:
        task.cancel()


@in_loop
async def test_waiting_is_bounded() -> None:
    world, pool = full_world()
    await got(pool), await got(pool)
    began = world.loop.now
    assert await fails(got(pool, wait=2.0)) is FailureKind.OVERLOAD
    assert world.loop.now - began == pytest.approx(2.0)
    assert pool.in_flight == 2


@in_loop
async def test_waiting_without_a_bound() -> None:
    _, pool = full_world()
    one, _ = await got(pool), await got(pool)
    waiting = later(pool, wait=0.0)
    await asyncio.sleep(1_000.0)
    pool.give_back(one)
    assert await waiting is one


@in_loop
async def test_waiting_is_bounded_also_for_those_who_are_overtaken() -> None:
    world, pool = full_world()
    one, _ = await got(pool), await got(pool)
    began = world.loop.now
    waiting = later(pool)
    await asyncio.sleep(1.9)
    newcomer = later(pool)
    one.abort()
    await world.settle_and_breathe()
    await newcomer
    assert await fails(waiting) is FailureKind.OVERLOAD
    assert world.loop.now - began == pytest.approx(2.0)


@pytest.mark.parametrize("end", ["lost", "dial failed"])
@in_loop
async def test_a_place_that_comes_free_is_given_on(end: str) -> None:
    world, pool = full_world()
    one = await got(pool)
    if end == "lost":
        await got(pool)
    else:
        world.hangs = asyncio.Event()
        dialling = later(pool)
        await world.breathe()
    waiting = [later(pool), later(pool)]
    await world.breathe()
    if end == "lost":
        one.abort()
        await world.settle_and_breathe()
    else:
        world.refuses = ConnectionRefusedError(111, "refused")
        assert world.hangs is not None
        world.hangs.set()
        assert await fails(dialling) is FailureKind.REFUSED
        # Whoever is given the place fails as well, and gives it on.
        for task in waiting:
            assert await fails(task) is FailureKind.REFUSED
        assert (pool.open, pool.in_flight) == (1, 1)
        return
    assert (await waiting[0]).usable
    assert pool.open == 2
    waiting[1].cancel()


# --- those who leave -------------------------------------------------------------------------------------


@in_loop
async def test_who_leaves_while_dialling_leaves_a_connection_for_the_next() -> None:
    world, pool = full_world()
    world.hangs = asyncio.Event()
    gone, gone_too = later(pool), later(pool)
    waiting = later(pool)
    await world.breathe()
    gone.cancel()
    gone_too.cancel()
    await world.breathe()
    assert pool.open == 2, "they are being dialled still"
    world.hangs.set()
    assert (await waiting).usable
    await world.breathe()
    assert (pool.open, pool.idle, pool.in_flight) == (2, 1, 1)


@in_loop
async def test_who_leaves_while_dialling_is_told_of_no_failure() -> None:
    world, pool = full_world()
    world.hangs = asyncio.Event()
    world.refuses = ConnectionRefusedError(111, "refused")
    gone = later(pool)
    await world.breathe()
    gone.cancel()
    world.hangs.set()
    await world.breathe()
    assert (pool.open, pool.in_flight) == (0, 0)


@in_loop
async def test_who_leaves_while_waiting_takes_no_place() -> None:
    world, pool = full_world()
    one, _ = await got(pool), await got(pool)
    gone, waiting = later(pool), later(pool)
    await world.breathe()
    gone.cancel()
    await world.breathe()
    assert pool.in_flight == 3
    pool.give_back(one)
    assert await waiting is one


@pytest.mark.parametrize("what", ["connection", "place"])
@in_loop
async def test_who_leaves_at_the_very_moment_passes_on_what_was_meant_for_them(what: str) -> None:
    world, pool = full_world()
    one, _ = await got(pool), await got(pool)
    gone, waiting = later(pool), later(pool)
    await world.breathe()
    if what == "connection":
        pool.give_back(one)
    else:
        pool._lost(one)
    gone.cancel()
    await world.breathe()
    assert gone.cancelled()
    assert waiting.done()


@in_loop
async def test_a_connection_that_comes_at_the_very_moment_of_the_timeout_is_not_lost() -> None:
    world, pool = full_world()
    one, two = await got(pool), await got(pool)
    waiting = later(pool, wait=2.0)
    await world.breathe()
    world.loop.now += 2.0
    world.loop.call_soon(pool.give_back, one)
    await world.breathe()
    assert waiting.done()
    if waiting.exception() is None:
        pool.give_back(waiting.result())
    pool.give_back(two)
    assert (pool.idle, pool.in_flight) == (2, 0)


# --- connections that end --------------------------------------------------------------------------------


@in_loop
async def test_what_the_backend_closed_is_not_lent() -> None:
    world, pool = full_world()
    await world.warm(2)
    world.upstreams[1].closing = True
    assert pool.take() is not None
    assert pool.take() is None


@pytest.mark.parametrize(
    "when",
    [
        "before",
        "behind",
    ],
)
@in_loop
async def test_a_backend_that_accepts_and_closes_takes_no_places(when: str) -> None:
    world, pool = full_world()
    genuine = world.loop.dial
    assert genuine is not None

    async def dial(factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        transport, protocol = await genuine(factory, host, port)

        def lose() -> None:
            transport.closing = transport.lost = True
            protocol.connection_lost(ConnectionResetError())

        lose() if when == "before" else world.loop.call_soon(lose)
        return transport, protocol

    world.loop.dial = dial
    await fails(got(pool))
    assert (pool.open, pool.in_flight) == (0, 0)
    caller = Caller(world, PEER)
    await caller.send(GET)
    assert "502 Bad Gateway" in caller.log.text
    assert world.outcomes == ["failure"]
    world.check()


@in_loop
async def test_idle_connections_are_closed_before_the_backend_does_it() -> None:
    world, pool = full_world()
    one, two = await got(pool), await got(pool)
    pool.give_back(one)
    world.loop.now += 20.0
    pool.give_back(two)
    pool.sweep(world.loop.now + IDLE_SECONDS - 20.0)
    await world.settle()
    assert (pool.open, pool.idle) == (2, 2)
    pool.sweep(world.loop.now + IDLE_SECONDS - 10.0)
    await world.settle()
    assert (pool.open, pool.idle) == (1, 1)
    assert pool.take() is two


@in_loop
async def test_the_wire_sweeps_the_pools() -> None:
    world = World()
    await world.warm(3)
    await world.advance(IDLE_SECONDS - 1.0)
    assert world.pool.idle == 3
    await world.advance(3.0)
    assert world.pool.open == 0


@in_loop
async def test_close_ends_what_is_idle_now_and_what_is_lent_when_it_comes_back() -> None:
    world, pool = full_world()
    one, two = await got(pool), await got(pool)
    pool.give_back(one)
    pool.close()
    await world.settle()
    assert (pool.open, pool.idle) == (1, 0)
    assert two.usable
    pool.give_back(two)
    await world.settle()
    assert (pool.open, pool.idle) == (0, 0)


@in_loop
async def test_close_ends_what_is_being_dialled() -> None:
    world, pool = full_world()
    world.hangs = asyncio.Event()
    dialling = later(pool)
    await world.breathe()
    pool.close()
    world.hangs.set()
    assert await fails(dialling) is FailureKind.REFUSED
    await world.settle()
    assert pool.open == 0
    assert world.upstreams[0].lost


@in_loop
async def test_dialling_is_bounded() -> None:
    world, pool = full_world()
    world.hangs = asyncio.Event()
    began = world.loop.now
    assert await fails(got(pool)) is FailureKind.CONNECT_TIMEOUT
    assert world.loop.now - began == pytest.approx(1.0)
    assert pool.open == 0


@pytest.mark.parametrize(
    "scheme, host, port, authority, label",
    [
        ("http", "core", 8084, "core:8084", "core:8084"),
        ("http", "core", 80, "core", "core:80"),
        ("http", "core", 443, "core:443", "core:443"),
        ("https", "core", 443, "core", "core:443"),
        ("http", "::1", 8084, "[::1]:8084", "[::1]:8084"),
    ],
)
def test_names(scheme: str, host: str, port: int, authority: str, label: str) -> None:
    pool = Pool(scheme=scheme, host=host, port=port, max_connections=1, monotonic=lambda: 0.0)
    assert (pool.authority, pool.label) == (authority, label)


# --- endpoints -------------------------------------------------------------------------------------------


@in_loop
async def test_the_endpoint_with_the_fewest_requests_in_flight_is_next_and_ties_rotate() -> None:
    world = World(endpoints=3)
    balancer = Balancer("core", world.pools, world.loop.time)
    one, two, three = world.pools
    assert {balancer.choose().label for _ in range(3)} == {"core:8084", "core1:8084", "core2:8084"}
    busy = await got(one)
    await got(two)
    assert [balancer.choose() for _ in range(3)] == [three] * 3
    await got(three)
    await got(three)
    one.give_back(busy)
    assert [balancer.choose() for _ in range(3)] == [one] * 3
    balancer.close()
    await world.settle()
    assert one.open == 0


@in_loop
async def test_what_was_never_sent_goes_to_another_endpoint() -> None:
    world = World(endpoints=2)
    genuine = world.loop.dial
    assert genuine is not None

    async def dial(factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        if host == "core":
            raise ConnectionRefusedError(111, "refused")
        return await genuine(factory, host, port)

    world.loop.dial = dial
    for _ in range(4):
        caller = Caller(world, PEER)
        await caller.send(GET)
        assert world.backend.text.endswith(ASKED.replace("core:", "core1:"))
        world.upstreams[-1].deliver(OK)
        assert caller.log.text == ANSWERED
