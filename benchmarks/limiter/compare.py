"""Decisions per second from one process: Lucid's limiter and others', the same Redis, the same callers."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import uvloop

from benchmarks.limiter.figures import Part, Row
from benchmarks.limiter.ground import Ground, Server
from benchmarks.limiter.rivals import RIVALS, Decide, Rival
from benchmarks.peers.base import package_version

NEVER_REFUSED = 10**9
OVER = (100, 1_000)
TIMES_OVER = 20
CONCURRENCY = (1, 64)
CLIENTS = ("redis", "hiredis", "valkey", "libvalkey", "uvloop")


def installed(rival: Rival) -> bool:
    return rival.name.startswith("lucid") or package_version(rival.package) is not None


async def _caller(decide: Decide, count: int) -> int:
    """One caller after another; the number admitted."""
    admitted = 0
    for _ in range(count):
        verdict = decide()
        if verdict is True or verdict is False:
            admitted += verdict
            # An answer is written, the next request read: the loop turns.
            await asyncio.sleep(0)
        else:
            admitted += bool(await verdict)
    return admitted


async def _straight(decide: Decide, count: int, at_once: int) -> int:
    admitted = 0
    for begun in range(0, count, at_once):
        for _ in range(min(at_once, count - begun)):
            verdict = decide()
            admitted += verdict if verdict is True or verdict is False else bool(await verdict)
        await asyncio.sleep(0)
    return admitted


async def _phase(rival: Rival, decide: Decide, count: int, concurrency: int) -> int:
    if rival.at_once:
        return await _straight(decide, count, rival.at_once)
    callers = [_caller(decide, count // concurrency) for _ in range(concurrency)]
    return sum(await asyncio.gather(*callers))


async def _never_refused(
    rival: Rival, uri: str, concurrency: int, seconds: float
) -> tuple[float, float, int, str]:
    """Wall seconds, CPU seconds, decisions and a note. One hot key."""
    async with rival.open(uri, NEVER_REFUSED) as opened:
        decide = opened.for_key("hot")
        count = 10 * concurrency
        began = time.monotonic()
        await _phase(rival, decide, count, concurrency)
        # Phases of some 50 ms, a multiple of the callers.
        rate = count / (time.monotonic() - began)
        count = concurrency * max(1, int(rate * 0.05 / concurrency))
        decided = admitted = 0
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < began + seconds:
            admitted += await _phase(rival, decide, count, concurrency)
            decided += count
            # From a cold start Lucid's first phase is slow and would make all others short.
            count = concurrency * max(1, int(decided / (time.monotonic() - began) * 0.05 / concurrency))
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        notes = [opened.amiss()]
    if admitted != decided:
        notes.append(f"{decided - admitted:,} of {decided:,} refused")
    return wall, cpu, decided, "; ".join(filter(None, notes))


async def _over(
    limit: int, rival: Rival, uri: str, concurrency: int, seconds: float
) -> tuple[float, float, int, str]:
    """One key after another, each asked `TIMES_OVER` times its limit, as fast as that goes, and whole keys only."""
    count = TIMES_OVER * limit // concurrency * concurrency
    async with rival.open(uri, limit) as opened:
        await _phase(rival, opened.for_key("warm"), 10 * concurrency, concurrency)
        keys, admitted = 0, []
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < began + seconds:
            admitted.append(await _phase(rival, opened.for_key(f"hot-{keys}"), count, concurrency))
            keys += 1
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        notes = [opened.amiss(), f"admitted {min(admitted):,} to {max(admitted):,} of {limit:,}"]
    return wall, cpu, keys * count, "; ".join(filter(None, notes))


Load = Callable[[Rival, str, int, float], Awaitable[tuple[float, float, int, str]]]


def loads() -> dict[str, Load]:
    over = {
        f"callers at {TIMES_OVER} times their limit of {limit:,}": partial(_over, limit) for limit in OVER
    }
    return {"one hot key, nobody refused": _never_refused, **over}


def compare(ground: Ground, number: int) -> list[Row]:
    rivals = [rival for rival in RIVALS if installed(rival)]
    shift = number % len(rivals)
    rows: list[Row] = []
    with Server(ground) as server:
        for title, load in loads().items():
            for concurrency in CONCURRENCY:
                group = f"{title}, {concurrency} at a time:"
                measured = {
                    rival.name: _measure(ground, server, rival, load, concurrency, group)
                    for rival in rivals[shift:] + rivals[:shift]
                    if concurrency > 1 or not rival.at_once
                }
                rows += [measured[rival.name] for rival in rivals if rival.name in measured]
    return rows


def _measure(ground: Ground, server: Server, rival: Rival, load: Load, concurrency: int, group: str) -> Row:
    server.clear()

    async def run() -> tuple[float, float, int, str]:
        return await load(rival, server.uri, concurrency, ground.seconds)

    busy = server.cpu_s()
    wall, cpu, decided, note = uvloop.run(run())
    values = {
        "decisions_per_s": decided / wall,
        "cpu_us": 1e6 * cpu / decided,
        "store_us": 1e6 * (server.cpu_s() - busy) / decided,
    }
    return Row(rival.name, values, group=group, note="; ".join(each for each in (rival.note, note) if each))


def skipped() -> list[str]:
    return sorted({rival.package for rival in RIVALS if not installed(rival)})


def versions() -> dict[str, str]:
    names = {rival.package for rival in RIVALS if installed(rival) and not rival.name.startswith("lucid")}
    return {name: found for name in sorted({*names, *CLIENTS}) if (found := package_version(name))}


COMPARE = Part(
    "compare",
    "Decisions from one process on the same Redis (must: 50 times the best of the others)",
    {"decisions_per_s": "decisions/s", "cpu_us": "CPU µs/decision", "store_us": "Redis CPU µs/decision"},
    compare,
    ratio="decisions_per_s",
    ratio_rows=("lucid", "lucid, no tasks"),
)
