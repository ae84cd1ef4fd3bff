"""Every place where the simulator touches the limiter's code: one server, so one shard of one partition.

`pod` mirrors the timing of `wire/lease_courier.py` and `wire/lease_store.py`; its numbers are theirs.
"""

import random

from lucid.core.exchange import Limit
from lucid.core.rules.bucket import Answer, Store
from lucid.core.rules.claims import Claim, LimitSet, Take
from lucid.core.rules.key_lease import RECALL_STEPS_SECONDS, Counters, KeyLease
from lucid.core.rules.leases import Flight, Leases
from lucid.core.wire.control_channel import DEAD_SECONDS
from lucid.core.wire.lease_courier import (
    BACKGROUND_SECONDS,
    FIRST_PROBE_SECONDS,
    LAG_SECONDS,
    LONGEST_PROBE_SECONDS,
    MOST_DEADLINES,
)
from lucid.core.wire.lease_store import SWEEP_SECONDS
from lucid.core.wire.redis_link import ANSWER_SECONDS

__all__ = [
    "ANSWER_SECONDS",
    "BACKGROUND_SECONDS",
    "DEADLINE_SECONDS",
    "DEAD_SECONDS",
    "FIRST_PROBE_SECONDS",
    "LAG_SECONDS",
    "LIMIT_NAME",
    "LONGEST_PROBE_SECONDS",
    "MOST_DEADLINES",
    "RECALL_STEPS_SECONDS",
    "SWEEP_SECONDS",
    "Answer",
    "Claim",
    "Flight",
    "KeyLease",
    "Leases",
    "Limit",
    "LimitSet",
    "Store",
    "Take",
    "compose",
    "counters",
    "execute",
    "new_leases",
]

DEADLINE_SECONDS = 0.025
"""`LeaseStore`'s default."""


LIMIT_NAME = "sim"


def new_leases(kind: type[Leases], dice: random.Random) -> Leases:
    """A new process' leases: another holder each time (rule 8)."""
    leases = kind(f"{dice.getrandbits(64):016x}")
    leases.shard.away = True
    return leases


def compose(leases: Leases, now: float) -> Flight | None:
    flights = leases.compose(now)
    assert len(flights) <= 1
    return flights[0] if flights else None


def counters(leases: Leases) -> Counters:
    """Of the one limit there is; it changes as the worker's does."""
    return leases.counters_of.setdefault(LIMIT_NAME, Counters())


def execute(store: Store, flight: Flight, run: str, now_ms: int) -> Answer:
    flight.call.run = run
    return store.call(flight.keys, flight.call, now_ms)
