"""Redis that hangs (SIGSTOP): the first decision of a new key, those after it, and the way back."""

import asyncio
import os
import signal
import statistics
import time

import uvloop

from benchmarks.limiter.figures import Part, Row
from benchmarks.limiter.ground import Ground, Server, lease_store
from lucid.core.exchange import Limit
from lucid.core.rules.leases import LimitSet, Take
from lucid.core.wire.lease_store import LeaseStore

FLEET = 4
NEXT = 1_000
HUNG_SECONDS = (0.3, 3.0)
"""The longer one outlasts the answer's time-out, so that the connection was given up."""
BACK_SECONDS = 10.0


async def _decide(store: LeaseStore, limits: LimitSet, user: str) -> tuple[float, bool]:
    """Seconds until it was decided, and how."""
    began = time.perf_counter()
    claim = store.leases.claim(limits, user, "")
    verdict = claim.take(time.monotonic())
    admitted = await store.admit(claim) if verdict is Take.WANTING else verdict is Take.ADMITTED
    return time.perf_counter() - began, admitted


async def _hang(server: Server, seconds: float) -> Row:
    limits = LimitSet((Limit("public", 1_000),))
    async with lease_store(server.uri, fleet=FLEET) as store:
        await _decide(store, limits, "known")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            first_s, admitted = await _decide(store, limits, "new")
            new = [await _decide(store, limits, f"n{number}") for number in range(NEXT)]
            same = [await _decide(store, limits, f"n{number}") for number in range(NEXT)]
            await asyncio.sleep(max(0.0, stopped + seconds - time.monotonic()))
        finally:
            os.kill(server.pid, signal.SIGCONT)
        resumed = time.monotonic()
        while store.away and time.monotonic() < resumed + BACK_SECONDS:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.001)
        if store.away:
            raise RuntimeError(f"Redis answers, but {BACK_SECONDS:.0f} s later it still counts as away")
        back_s = time.monotonic() - resumed
    verdicts = [verdict for _, verdict in (*new, *same)]
    return Row(
        f"hung for {seconds:g} s",
        {
            "first_ms": first_s * 1e3,
            "new_us": statistics.median(each for each, _ in new) * 1e6,
            "same_us": statistics.median(each for each, _ in same) * 1e6,
            "back_ms": back_s * 1e3,
        },
        aim="first: 10 ms",
        note=f"first {'admitted' if admitted else 'refused'}, {sum(verdicts):,} of {len(verdicts):,} after it admitted",
    )


def hang(ground: Ground, _: int) -> list[Row]:
    rows = []
    for seconds in HUNG_SECONDS:
        with Server(ground) as server:
            rows.append(uvloop.run(_hang(server, seconds)))
    return rows


HANG = Part(
    "hang",
    f"While Redis hangs: a limit of 1,000 in `safe`, a fleet of {FLEET}",
    {
        "first_ms": "first decision, ms",
        "new_us": f"next {NEXT:,}, new keys, µs",
        "same_us": "the same keys again, µs",
        "back_ms": "back after SIGCONT, ms",
    },
    hang,
)
