"""What every part stands on: two cores, stores of its own, lease stores over them."""

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import redis

from benchmarks import procfs
from lucid.core.rules.leases import MARKER
from lucid.core.wire.lease_store import LeaseStore
from lucid.core.wire.redis_link import RedisLink, new_holder
from lucid.dev.embedded import Valkey


class Ground(msgspec.Struct, frozen=True):
    """`seconds`: length of one short measurement. `window_seconds`: of the limits that are measured over windows.

    The measuring process, and all that it starts but for stores, stays on `own_core`.
    """

    folder: Path
    own_core: int
    store_core: int
    seconds: float
    window_seconds: int


class Server(Valkey):
    """A store that keeps nothing on disk, by the program given or whichever there is, pinned to its core."""

    def __init__(self, ground: Ground, program: str = "") -> None:
        folder = ground.folder / f"store-{time.monotonic_ns()}"
        super().__init__(folder, durable=False)
        self._core = ground.store_core
        plain = self._command
        if program:
            self._command = lambda port: [program, *plain(port)[1:]]

    def start(self, port: int = 0) -> None:
        before = os.sched_getaffinity(0)
        # Inherited, by every thread that the server makes.
        os.sched_setaffinity(0, {self._core})
        try:
            super().start(port)
        finally:
            os.sched_setaffinity(0, before)
        self.clear()

    def clear(self) -> None:
        """Nothing is left but the marker: what may be a first start would be held for a while."""
        with self.client() as client:
            client.flushall()
            client.set(MARKER, f"{client.info('server')['run_id']} cleared 0")

    @contextlib.contextmanager
    def client(self) -> Iterator["redis.Redis"]:
        with redis.Redis(port=self.port) as client:
            yield client

    def calls(self) -> dict[str, tuple[int, int]]:
        """`(calls, microseconds)` by command since the server began; scripts' own commands count there too."""
        with self.client() as client:
            told: dict[str, Any] = client.info("commandstats")
        return {
            name.removeprefix("cmdstat_"): (int(each["calls"]), int(each["usec"]))
            for name, each in told.items()
        }

    def version(self) -> str:
        with self.client() as client:
            told: dict[str, Any] = client.info("server")
        name = "valkey-server" if "valkey_version" in told else "redis-server"
        return f"{name} {told.get('valkey_version', told['redis_version'])}"

    def cpu_s(self) -> float:
        return procfs.cpu_s([self.pid])


def count_since(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], name: str) -> int:
    return after.get(name, (0, 0))[0] - before.get(name, (0, 0))[0]


@contextlib.asynccontextmanager
async def lease_store(uri: str, *, fleet: int = 1) -> AsyncIterator[LeaseStore]:
    """One worker's store of leases, as the gateway makes it, but for the control channel."""
    link = RedisLink(uri)
    store = LeaseStore(link, new_holder(), None, fleet_told=fleet)
    await store.start()
    try:
        yield store
    finally:
        await store.stop()
        await link.close()


def without_redis(store: LeaseStore) -> str:
    """What a row must say where Redis did not answer in time: some decisions were not what they are taken for."""
    count = store.counters.degraded
    return f"{count:,} decisions without Redis: not a figure to publish" if count else ""
