"""Rate limiters of Python, each in the fastest correct way that it documents for asyncio and Redis.

All of them send one script per decision over their client's own pool: redis-py with hiredis, or valkey-py with
libvalkey where a limiter can use that. One that is not installed is skipped by name.
"""

import contextlib
import importlib
import importlib.util
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import msgspec

from benchmarks.limiter.ground import lease_store, without_redis
from lucid.core.exchange import Limit
from lucid.core.rules.leases import LimitSet, Take

WINDOW_SECONDS = 60

Decide = Callable[[], "bool | Awaitable[bool]"]
"""One decision: made at once, or to be awaited."""


class Open(msgspec.Struct, frozen=True):
    """`for_key` gives what decides for a caller's key; `amiss` says afterwards what went wrong, if anything."""

    for_key: Callable[[str], Decide]
    amiss: Callable[[], str] = str


Opener = Callable[[str, int], "contextlib.AbstractAsyncContextManager[Open]"]
"""Of the server's URI and the limit."""


class Rival(msgspec.Struct, frozen=True):
    """`at_once`: so many decisions one task makes in a turn of the loop; 0: every caller is a task of its own."""

    name: str
    package: str
    open: Opener
    at_once: int = 0
    note: str = ""


@contextlib.asynccontextmanager
async def lucid(uri: str, limit: int) -> AsyncIterator[Open]:
    limits = LimitSet((Limit("authenticated", limit, WINDOW_SECONDS),))
    async with lease_store(uri) as store:
        leases, clock = store.leases, time.monotonic

        def for_key(key: str) -> Decide:
            def decide() -> bool | Awaitable[bool]:
                claim = leases.claim(limits, key, "")
                verdict = claim.take(clock())
                if verdict is Take.WANTING:
                    return store.admit(claim)
                return verdict is Take.ADMITTED

            return decide

        yield Open(for_key, lambda: without_redis(store))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _limits(strategy: str) -> Opener:
    @contextlib.asynccontextmanager
    async def opened(uri: str, limit: int) -> AsyncIterator[Open]:
        storage_of = importlib.import_module("limits.aio.storage")
        strategies = importlib.import_module("limits.aio.strategies")
        item = importlib.import_module("limits").RateLimitItemPerMinute(limit)
        through, where = ("redispy", uri)
        if _installed("valkey") and _installed("libvalkey"):
            # The faster of its clients, some 10 % before redis-py with hiredis.
            through, where = "valkey", uri.replace("redis://", "valkey://", 1)
        storage = storage_of.RedisStorage(f"async+{where}", implementation=through)
        limiter = getattr(strategies, strategy)(storage)
        try:
            yield Open(lambda key: lambda: limiter.hit(item, key))
        finally:
            await storage.bridge.storage.aclose()

    return opened


def _throttled(algorithm: str) -> Opener:
    @contextlib.asynccontextmanager
    async def opened(uri: str, limit: int) -> AsyncIterator[Open]:
        throttled = importlib.import_module("throttled.asyncio")
        store = throttled.RedisStore(server=uri)
        quota = throttled.rate_limiter.per_duration(timedelta(seconds=WINDOW_SECONDS), limit, burst=limit)
        throttle = throttled.Throttled(using=algorithm, quota=quota, store=store)

        async def decide(key: str) -> bool:
            result = await throttle.limit(key)
            return not result.limited

        try:
            yield Open(lambda key: lambda: decide(key))
        finally:
            await store._backend.get_client().aclose()

    return opened


@contextlib.asynccontextmanager
async def _pyrate(uri: str, limit: int) -> AsyncIterator[Open]:
    pyrate: Any = importlib.import_module("pyrate_limiter")
    client = importlib.import_module("redis.asyncio").Redis.from_url(uri)
    rates = [pyrate.Rate(limit, WINDOW_SECONDS * 1_000)]
    limiters: list[Any] = []
    digest = await client.script_load(
        importlib.import_module("pyrate_limiter.buckets.redis_bucket").LuaScript.PUT_ITEM
    )

    def for_key(key: str) -> Decide:
        # What `RedisBucket.init` does, but for loading the same script again for every key.
        limiter = pyrate.Limiter(pyrate.RedisBucket(rates, client, key, digest))
        limiters.append(limiter)

        def decide() -> Awaitable[bool]:
            # `try_acquire_async` holds a lock meanwhile, which only blocking needs: one caller at a time.
            asked: Awaitable[bool] = limiter.try_acquire(key, blocking=False)
            return asked

        return decide

    try:
        yield Open(for_key)
    finally:
        for limiter in limiters:
            limiter.close()
        await client.aclose()


AT_ONCE = 64
RIVALS = (
    Rival(
        "lucid", "lucid-api-gateway", lucid, note="every caller a task, a turn of the loop for each decision"
    ),
    Rival(
        "lucid, no tasks", "lucid-api-gateway", lucid, AT_ONCE, f"a turn of the loop for {AT_ONCE} decisions"
    ),
    Rival(
        "limits, fixed window",
        "limits",
        _limits("FixedWindowRateLimiter"),
        note="up to twice the limit in a window",
    ),
    Rival("limits, moving window", "limits", _limits("MovingWindowRateLimiter")),
    Rival(
        "throttled-py, fixed window",
        "throttled-py",
        _throttled("fixed_window"),
        note="up to twice the limit in a window",
    ),
    Rival("throttled-py, gcra", "throttled-py", _throttled("gcra")),
    Rival("pyrate-limiter", "pyrate-limiter", _pyrate),
)
