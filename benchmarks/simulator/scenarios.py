"""What is simulated, as data: a world and what happens in it. A name stands for one or several worlds."""

from typing import Any, Literal

import msgspec

from lucid.core.exchange import RedisDown

Spread = Literal["even", "zipf", "sticky", "bursty"]

Kind = Literal["stop", "keep", "old", "empty"]
STOP: Kind = "stop"
KEEP: Kind = "keep"
OLD: Kind = "old"
EMPTY: Kind = "empty"


class Outage(msgspec.Struct, frozen=True):
    """`stop`: the process is stopped and continued. `keep`: killed, comes back with its data under another run.
    `old`: as `keep`, but the last second is forgotten. `empty`: killed, comes back with nothing.
    """

    kind: Kind
    at_seconds: float
    seconds: float


class Partition(msgspec.Struct, frozen=True):
    """The first `share` of the workers do not reach Redis, nor it them."""

    share: float
    at_seconds: float
    seconds: float


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """One way. `tail` of the messages take an exponential time more; what is lost fails as a connection does."""

    least_ms: float = 0.1
    most_ms: float = 0.5
    tail: float = 0.001
    tail_ms: float = 5.0
    lost: float = 0.0
    doubled: float = 0.0


class World(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    workers: int = 4
    limit: int = 1_000
    times: float = 20.0
    """Demand of one user as a multiple of the limit."""
    users: int = 1
    spread: Spread = "even"
    stay_seconds: float = 30.0
    """`sticky`: how long a user stays with one worker, on average."""
    redis_down: RedisDown = "safe"
    minutes: float = 11.0
    """The first one warms up and is left out of all figures but the bounds."""
    network: Network = Network()
    outages: tuple[Outage, ...] = ()
    partitions: tuple[Partition, ...] = ()
    kill_each_seconds: float = 0.0
    pause_each_seconds: float = 0.0
    pause_seconds: float = 1.0
    step_back_each_seconds: float = 0.0
    """Redis' clock steps back by a second so often."""

    @property
    def rate(self) -> float:
        """Requests per second, of all users."""
        return self.users * self.limit * self.times / 60.0

    @property
    def title(self) -> str:
        crowd = f", {self.users:,} users" if self.users > 1 else ""
        return f"{self.name}: {self.workers:,} x {self.times:g} of {self.limit:,}{crowd}"


LOSSY = Network(tail=0.02, tail_ms=30.0, lost=0.003, doubled=0.01)
SLOW = Network(least_ms=5.0, most_ms=20.0)
"""Half of the calls take longer than the deadline of 25 ms."""


def _outage(name: str, kind: Kind, **more: Any) -> tuple[World, ...]:
    world = World(name=name, times=3.0, minutes=8.0, outages=(Outage(kind, 150.0, 100.0),))
    return tuple(msgspec.structs.replace(world, workers=workers, **more) for workers in (4, 16))


SCENARIOS: dict[str, tuple[World, ...]] = {
    "hot": tuple(World(name="hot", workers=workers) for workers in (4, 16, 100, 1_000)),
    "limits": tuple(World(name="limits", limit=limit) for limit in (100, 1_000, 10_000)),
    "below": tuple(
        World(name="below", workers=workers, limit=limit, times=times)
        for workers in (4, 16)
        for limit, times in ((100, 0.3), (100, 0.7), (1_000, 0.3), (1_000, 0.7), (1_000, 0.9), (10_000, 0.9))
    ),
    "above": tuple(World(name="above", workers=workers, times=1.5) for workers in (4, 16)),
    "users": (World(name="users", users=1_000, times=0.3, minutes=4.0),),
    "sticky": tuple(
        World(name="sticky", users=20, times=times, spread="sticky", minutes=6.0) for times in (0.9, 20.0)
    ),
    "skewed": tuple(World(name="skewed", workers=16, times=times, spread="zipf") for times in (0.9, 20.0)),
    "bursty": tuple(World(name="bursty", times=times, spread="bursty") for times in (0.7, 0.9, 20.0)),
    "lossy": tuple(
        World(name="lossy", times=times, redis_down=down, network=LOSSY, step_back_each_seconds=97.0)
        for times in (0.9, 20.0)
        for down in ("strict", "safe")
    ),
    "slow": tuple(
        World(name="slow", times=3.0, redis_down=down, network=SLOW, minutes=6.0)
        for down in ("strict", "safe")
    ),
    "kills": tuple(
        World(name="kills", times=times, redis_down="strict", kill_each_seconds=20.0, pause_each_seconds=15.0)
        for times in (0.9, 20.0)
    ),
    "outage_safe": _outage("outage_safe", STOP) + _outage("outage_safe", STOP, times=0.9),
    "outage_moving": tuple(
        msgspec.structs.replace(world, spread="sticky", stay_seconds=20.0, name="outage_moving")
        for world in _outage("", STOP)
    ),
    "outage_strict": _outage("outage_strict", STOP, redis_down="strict"),
    "restart_keep": _outage("restart_keep", KEEP) + _outage("restart_keep", KEEP, redis_down="strict"),
    "restart_old": _outage("restart_old", OLD, redis_down="strict"),
    "restart_empty": _outage("restart_empty", EMPTY) + _outage("restart_empty", EMPTY, redis_down="strict"),
    "partition": tuple(
        World(name="partition", workers=8, times=3.0, minutes=8.0, redis_down=down, partitions=parts)
        for down in ("safe", "strict")
        for parts in [(Partition(0.5, 150.0, 100.0),)]
    ),
}
