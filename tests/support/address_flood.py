"""A worker's limiter under addresses that come once each.

`python -m tests.support.address_flood REDIS_URI COUNT WINDOW_SECONDS` prints `Flood` as JSON when all are decided. A
process of its own, so that its memory is that of the limiter.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import redis
import uvloop

from lucid.core.exchange import Limit
from lucid.core.rules.leases import LimitSet, Take
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.lease_store import LeaseStore
from lucid.core.wire.redis_link import RedisLink, new_holder
from lucid.dev.embedded import leashed
from tests.support import markers
from tests.support.limit_load import Sizes
from tests.support.servers import ROOT, clean_environment
from tests.support.stores import RedisChild

AT_ONCE = 128
"""Requests under way: as many as the keys of one call."""

PATIENCE_SECONDS = 1.0

MEBIBYTE = 1_024 * 1_024

WARM = 1_000
"""Addresses before the first look at the memory: what is loaded on first use is no growth."""


class Flood(msgspec.Struct):
    """What it took. Sizes in bytes."""

    admitted: int
    refused: int
    alone: int
    """Decided without Redis."""
    seconds: float
    resident_before: int
    resident_most: int
    redis_most: int
    keys_most: int
    keys_left: int = -1
    """Of the limiter, when no address can have anything to its account any more."""


def resident(pid: int | str = "self") -> int:
    """A process' resident set, in bytes (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1_024
    raise RuntimeError(f"no VmRSS of {pid}")


def flooded(count: int, window_seconds: int, most_seconds: float) -> Flood:
    """A Redis, a flood by a process of its own, and a look at what is left of it a window, a life and a slot later."""
    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        server = RedisChild(folder, "--appendonly", "no")
        server.start()
        with redis.Redis(port=server.port) as client:
            markers.plant(client)
        command = [
            sys.executable,
            "-m",
            "tests.support.address_flood",
            server.uri,
            str(count),
            str(window_seconds),
        ]
        try:
            done = subprocess.run(
                leashed(command),
                env=clean_environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                check=True,
                timeout=most_seconds,
            )
            sizes = Sizes(window_seconds)
            flood = msgspec.json.decode(done.stdout, type=Flood)
            with redis.Redis.from_url(server.uri) as client:
                # The journal of a window, reported when a lease's life is over, counts until the slot's end.
                time.sleep(sizes.counted + sizes.life + sizes.slot + 1.0)
                flood.keys_left = sum(1 for _ in client.scan_iter("rate_limit:*", count=1_000))
            return flood
        finally:
            server.kill()


def address(number: int) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


async def flood(redis_uri: str, count: int, window_seconds: int) -> Flood:
    link = RedisLink(redis_uri)
    holder = new_holder()
    control = ControlChannel(link, holder)
    # A busy machine must not make it a test of what is done without Redis.
    store = LeaseStore(link, holder, control, fleet_told=1, deadline_seconds=PATIENCE_SECONDS)
    await control.start()
    await store.start()
    limits = LimitSet((Limit("public", 100, window_seconds, "safe"),))
    numbers = iter(range(WARM, WARM + count))
    outcomes = {True: 0, False: 0}
    resident_most = redis_most = keys_most = 0

    async def ask(those: Iterable[int]) -> None:
        for number in those:
            text = address(number)
            claim = store.leases.claim(limits, text, text)
            verdict = claim.take(time.monotonic())
            if verdict is Take.WANTING:
                admitted = await store.admit(claim)
            else:
                admitted = verdict is Take.ADMITTED
                await asyncio.sleep(0)  # as between the requests of a worker
            claim.fields(time.monotonic())
            outcomes[admitted] += 1

    async def look() -> None:
        nonlocal resident_most, redis_most, keys_most
        while True:
            resident_most = max(resident_most, resident())
            redis_most = max(redis_most, int((await link.commands.info("memory"))["used_memory"]))
            keys_most = max(keys_most, await link.commands.dbsize())
            await asyncio.sleep(0.1)

    await ask(range(WARM))
    before, begun = resident(), time.monotonic()
    looking = asyncio.create_task(look())
    await asyncio.gather(*(ask(numbers) for _ in range(AT_ONCE)))
    seconds = time.monotonic() - begun
    looking.cancel()
    resident_most = max(resident_most, resident())
    told = Flood(
        outcomes[True] - WARM,
        outcomes[False],
        store.counters.degraded,
        seconds,
        before,
        resident_most,
        redis_most,
        keys_most,
    )
    await store.stop()
    await control.stop()
    await link.close()
    return told


def main(redis_uri: str, count: str, window_seconds: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told = runner.run(flood(redis_uri, int(count), int(window_seconds)))
    sys.stdout.write(msgspec.json.encode(told).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
