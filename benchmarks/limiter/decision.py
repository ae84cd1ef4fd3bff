"""A decision from memory, and what a worker pays for a call to Redis; both through the real store of leases."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial

import uvloop

from benchmarks.limiter.figures import Part, Row
from benchmarks.limiter.ground import Ground, Server, count_since, lease_store, without_redis
from lucid.core.exchange import Limit
from lucid.core.rules.leases import LimitSet, Take
from lucid.core.wire.lease_store import LeaseStore
from lucid.core.wire.redis_link import RedisLink

BURST = 100
KEYS_PER_CALL = 32
HUGE = 10**9
"""A limit that refuses nobody."""

AIM = "must: 1,000"


class _Want(Exception):
    """A decision was not made from memory."""


def _bursts(take: Callable[[float], Take], expected: Take) -> Callable[[], float]:
    """Nanoseconds per decision of one burst, the reading of the clock included. Raises _Want."""
    clock, counter, counts = time.monotonic, time.perf_counter_ns, range(BURST)

    def run() -> float:
        missed = 0
        began = counter()
        for _ in counts:
            if take(clock()) is not expected:
                missed += 1
        took = counter() - began
        if missed:
            raise _Want
        return took / BURST

    return run


async def _median_ns(
    store: LeaseStore, limits: LimitSet, user: str, expected: Take, seconds: float
) -> dict[str, float]:
    """Bursts with the look-up of the claim and without it take turns; the loop runs between any two."""
    leases = store.leases
    claim = leases.claim(limits, user, "")
    runs = {
        "decision_ns": _bursts(lambda now: leases.claim(limits, user, "").take(now), expected),
        "take_ns": _bursts(claim.take, expected),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    asked = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, run in runs.items():
            try:
                found[name].append(run())
            except _Want:
                asked += 1
                if claim.take(time.monotonic()) is Take.WANTING:
                    await store.admit(claim)
            await asyncio.sleep(0)
    values = {name: statistics.median(each) for name, each in found.items()}
    values["p99_ns"] = statistics.quantiles(found["decision_ns"], n=100)[98]
    values["asked_percent"] = 100 * asked / (asked + sum(map(len, found.values())))
    return values


async def _decide(ground: Ground, uri: str) -> list[Row]:
    one = LimitSet((Limit("public", HUGE),))
    two = LimitSet((Limit("public", HUGE), Limit("chain", HUGE, per="address")))
    small = LimitSet((Limit("small", 100),))
    rows = []
    async with lease_store(uri) as store:
        for name, limits, expected in (
            ("one limit, tokens at hand", one, Take.ADMITTED),
            ("two limits, tokens at hand", two, Take.ADMITTED),
            ("refused from memory", small, Take.DENIED),
        ):
            claim = store.leases.claim(limits, "caller", "")
            while await store.admit(claim) and expected is Take.DENIED:
                pass
            values = await _median_ns(store, limits, "caller", expected, ground.seconds)
            rows.append(Row(name, values, AIM if limits is one else "", note=without_redis(store)))
    return rows


def decision(ground: Ground, _: int) -> list[Row]:
    with Server(ground) as server:
        return uvloop.run(_decide(ground, server.uri))


async def _calls(ground: Ground, server: Server) -> list[Row]:
    limits = LimitSet((Limit("public", HUGE),))
    rows = []
    link = RedisLink(server.uri)
    digest = await link.execute("SCRIPT", "LOAD", "return ARGV[1]")

    async def bare() -> None:
        await link.execute("EVALSHA", digest, 1, "key", "x" * 100)

    async with lease_store(server.uri) as store:
        numbers = iter(range(10**9))

        async def fresh(count: int) -> None:
            claims = [store.leases.claim(limits, f"u{next(numbers)}", "") for _ in range(count)]
            if count == 1:
                await store.admit(claims[0])
            else:
                await asyncio.gather(*(store.admit(claim) for claim in claims))

        for name, count in (("one new key a call", 1), (f"{KEYS_PER_CALL} new keys a call", KEYS_PER_CALL)):
            values = await _cost(ground, server, partial(fresh, count), count)
            rows.append(Row(name, values, note=without_redis(store)))
    rows.append(Row("redis-py alone: a script that echoes", await _cost(ground, server, bare, 1)))
    await link.close()
    return rows


async def _cost(
    ground: Ground, server: Server, step: Callable[[], Awaitable[None]], keys: int
) -> dict[str, float]:
    for _ in range(20):
        await step()
    before, busy = server.calls(), server.cpu_s()
    began, cpu = time.monotonic(), time.process_time()
    end = began + ground.seconds
    while time.monotonic() < end:
        await step()
    cpu, wall, busy = time.process_time() - cpu, time.monotonic() - began, server.cpu_s() - busy
    calls = max(1, count_since(before, server.calls(), "evalsha"))
    return {
        "call_us": cpu / calls * 1e6,
        "key_us": cpu / calls / keys * 1e6,
        "calls_per_s": calls / wall,
        "store_us": busy / calls * 1e6,
    }


def worker_time(ground: Ground, _: int) -> list[Row]:
    with Server(ground) as server:
        return uvloop.run(_calls(ground, server))


DECISION = Part(
    "decision",
    "A decision from memory (`Leases.claim` + the clock + `Claim.take`), real lease store, real Redis",
    {
        "decision_ns": "ns",
        "take_ns": "ns without the claim's look-up",
        "p99_ns": "p99 of bursts",
        "asked_percent": "bursts that met the network, %",
    },
    decision,
)
WORKER_TIME = Part(
    "worker_time",
    "What a worker pays for one EVALSHA and its answer",
    {
        "call_us": "CPU µs/call",
        "key_us": "CPU µs/key",
        "calls_per_s": "calls/s, one after another",
        "store_us": "Redis CPU µs/call",
    },
    worker_time,
)
