"""What the gateway itself costs per exchange: everything but the kernel.

`python -m benchmarks.micro` drives one connection of the data plane with transports that go nowhere: a head comes in,
is judged, goes to an idle upstream connection, its answer comes back and is handed on. Best of several repeats, so
that a busy machine disturbs little. Absolute figures belong to the machine; what counts is before against after.
"""

import argparse
import asyncio
import datetime as dt
import os
import random
import time
from collections.abc import Callable
from typing import Any, cast

from lucid.core.exchange import Exchange, Limit, Principal, Role
from lucid.core.gateway import Gateway
from lucid.core.policy import Policy
from lucid.core.rules.addresses import TrustedProxies
from lucid.core.rules.breaker import CircuitBreaker
from lucid.core.rules.cors import Cors
from lucid.core.rules.framing import Memo, parse_head
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.leases import Leases
from lucid.core.rules.routes import Route, RouteTable
from lucid.core.rules.tokens import TokenMemory
from lucid.core.wire.access_log import AccessLog
from lucid.core.wire.connection import Wire
from lucid.core.wire.forwarding import Forwarding
from lucid.core.wire.pool import Balancer, Pool
from lucid.core.wire.upstream import Upstream

TOKEN = "x" * 300
FIELDS = (
    "Host: 127.0.0.1:8080\r\nAuthorization: Bearer {token}\r\nUser-Agent: lucid-desktop/3.1\r\n"
    "Accept: application/json\r\nAccept-Encoding: gzip, deflate, br\r\nAccept-Language: en-GB,en;q=0.9\r\n"
    "Cache-Control: no-cache\r\nX-Client-Version: 3.1.4{extra}\r\n\r\n"
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Tue, 24 Nov 2026 07:59:16 GMT\r\n"
    b"Content-Type: application/json\r\nContent-Length: 65\r\nConnection: keep-alive\r\n\r\n" + b"x" * 65
)


class Nowhere(asyncio.Transport):
    """A transport whose bytes go nowhere."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 40_000)})

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def write(self, data: Any) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...
    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Door(Forwarding):
    def __init__(self, wire: Wire) -> None:
        self._set_up(wire)


def build() -> tuple[Door, Callable[[], Upstream]]:
    principal = Principal(
        Role.USER, "authenticated", "u1", user_id="u1", expires_at=time.time() + 3_600, via="token"
    )
    limits = {"authenticated": Limit("authenticated", 10**9), "chain": Limit("chain", 10**9)}
    leases = Leases("bench", fleet=1)
    cors, keys = Cors(), KeyMemory()
    tokens = TokenMemory(lambda _: principal, time.time, 1_000)
    routes = RouteTable.build([Route("/api/v1/chain/**", backend="chain", limits=(limits["chain"],))])
    policy = Policy(
        routes=routes,
        tiers=[limits["authenticated"]],
        tokens=tokens,
        keys=keys,
        leases=leases,
        breakers={"chain": CircuitBreaker("chain")},
        cors=cors,
        proxies=TrustedProxies(),
        jitter=random.random,
    )
    log = AccessLog(write=lambda _: None, utc_now=lambda: dt.datetime.now(dt.UTC))
    gateway = Gateway(
        policy,
        cors=cors,
        keys=keys,
        tokens=tokens,
        admit=cast("Any", None),
        look_up=cast("Any", None),
        recorder=log,
        monotonic=time.monotonic,
        utc_now=lambda: dt.datetime.now(dt.UTC),
        random_bytes=os.urandom,
    )
    for limit in limits.values():
        lease = leases.lease(limit, "u1")
        lease.has, lease.until = 10**12, time.monotonic() + 10**6
        _KEPT.append(lease)
    pool = Pool(scheme="http", host="127.0.0.1", port=9, max_connections=8, monotonic=time.monotonic)
    wire = Wire(gateway, {"chain": Balancer("chain", [pool], time.monotonic)}, scheme="http")
    door = Door(wire)
    door.connection_made(Nowhere())
    upstream = Upstream(pool.label, pool._memo, pool._came_idle, pool._lost)
    upstream.connection_made(Nowhere())
    pool._all.add(upstream)
    pool._came_idle(upstream)
    return door, lambda: upstream


_KEPT: list[Any] = []


def best(run: Callable[[], object], count: int, repeats: int) -> float:
    """Microseconds per call, the best of `repeats`."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(count):
            run()
        times.append((time.perf_counter() - began) / count * 1e6)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    door, upstream = build()
    fields = FIELDS.format(token=TOKEN, extra="")
    head = f"GET /api/v1/chain/blocks/latest HTTP/1.1\r\n{fields}".encode()
    numbers = iter(range(10**9))

    def exchange() -> None:
        door.data_received(head)
        upstream().data_received(ANSWER)

    def varied() -> None:
        number = next(numbers)
        text = FIELDS.format(token=TOKEN, extra=f"\r\nX-Number: {number}")
        door.data_received(f"GET /api/v1/chain/blocks/{number} HTTP/1.1\r\n{text}".encode())
        upstream().data_received(ANSWER)

    memo: Memo[Any] = Memo()
    gateway = door._gateway

    def verdict() -> Exchange:
        x = gateway.open(cast("Any", parse_head(head, memo)), "127.0.0.1", "127.0.0.1")
        gateway.judge(x)
        return x

    for name, run in (
        ("exchange", exchange),
        ("exchange, nothing repeats", varied),
        ("head to verdict", verdict),
    ):
        print(f"{name:<28}{best(run, options.count, options.repeats):8.2f} µs")


if __name__ == "__main__":
    main()
