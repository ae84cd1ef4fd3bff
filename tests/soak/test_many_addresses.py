"""A million addresses once each: the limiter in a process of its own, and a whole worker behind a proxy."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.integration.conftest import clusters
from tests.support.address_flood import MEBIBYTE, address, flooded, resident
from tests.support.limit_load import Line
from tests.support.servers import Backend, GatewayProcess

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="reads a process' memory in /proc"),
]

ADDRESSES = 1_000_000
MOST_GROWTH = 150 * MEBIBYTE
LINES = 64


@pytest.mark.parametrize("window_seconds", [10, 60])
def test_a_million_addresses_leave_nothing_behind(window_seconds: int) -> None:
    flood = flooded(ADDRESSES, window_seconds, 1_800.0)
    print(f"{flood.admitted / flood.seconds:,.0f} requests/s, {flood}")
    assert (flood.admitted, flood.refused) == (ADDRESSES, 0)
    assert flood.resident_most - flood.resident_before < MOST_GROWTH, flood
    assert flood.keys_left == 0, flood


def test_a_million_addresses_behind_a_proxy_leave_nothing_in_a_worker(
    gateway: Callable[..., GatewayProcess], backend: Backend
) -> None:
    process = gateway(workers=1, env={**clusters(backend), "TRUSTED_PROXIES": "1"})
    (worker,) = process.workers()
    statuses: dict[int, int] = {}

    async def ask(those: Iterator[int]) -> None:
        line = await Line.opened(process.port)
        for number in those:
            status = await line.get("/api/v1/meta/info", f"X-Forwarded-For: {address(number)}\r\n")
            statuses[status] = statuses.get(status, 0) + 1
        line.close()

    async def all_ask(those: Iterator[int]) -> None:
        await asyncio.gather(*(ask(those) for _ in range(LINES)))

    asyncio.run(all_ask(iter(range(ADDRESSES, ADDRESSES + 1_000))))
    before, begun = resident(worker), time.monotonic()
    asyncio.run(all_ask(iter(range(ADDRESSES))))
    seconds, after = time.monotonic() - begun, resident(worker)
    print(f"{ADDRESSES / seconds:,.0f} requests/s, {(after - before) / MEBIBYTE:.0f} MiB more, {statuses}")
    assert statuses == {200: ADDRESSES + 1_000}
    assert after - before < MOST_GROWTH
