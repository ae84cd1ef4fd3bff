"""Who asks when, and at which worker: Poisson arrivals, made in slices."""

import itertools
import random
from collections.abc import Iterator

from benchmarks.simulator.scenarios import World

BURST_PERIOD_SECONDS = 10.0
BURST_SECONDS = 1.0
"""`bursty`: all of ten seconds' demand comes within the first."""

SLICE_REQUESTS = 2_000

Arrival = tuple[float, int, int]
"""`(seconds, worker, user)`."""


def arrivals(world: World, dice: random.Random, begin: float, end: float) -> Iterator[list[Arrival]]:
    """Slices in the order of time; `sticky` users move, and bursts begin, between slices."""
    bursts = world.spread == "bursty"
    rate = world.rate * (BURST_PERIOD_SECONDS / BURST_SECONDS if bursts else 1.0)
    length = max(0.02, min(1.0, SLICE_REQUESTS / rate))
    homes = [dice.randrange(world.workers) for _ in range(world.users)]
    weights = list(itertools.accumulate(1.0 / (1 + number) for number in range(world.workers)))
    numbers = range(world.workers)
    at = begin
    while at < end:
        if bursts and (phase := (at - begin) % BURST_PERIOD_SECONDS) >= BURST_SECONDS - 1e-9:
            at += BURST_PERIOD_SECONDS - phase
            continue
        left = BURST_SECONDS - (at - begin) % BURST_PERIOD_SECONDS if bursts else length
        until = min(at + min(length, left), end)
        times: list[float] = []
        now = at + dice.expovariate(rate)
        draw = dice.expovariate
        while now < until:
            times.append(now)
            now += draw(rate)
        count = len(times)
        users = [int(dice.random() * world.users) for _ in range(count)] if world.users > 1 else [0] * count
        if world.spread == "sticky":
            move = (until - at) / world.stay_seconds
            homes = [dice.randrange(world.workers) if dice.random() < move else home for home in homes]
            workers = [homes[user] for user in users]
        elif world.spread == "zipf":
            workers = dice.choices(numbers, cum_weights=weights, k=count)
        else:
            workers = [int(dice.random() * world.workers) for _ in range(count)]
        yield list(zip(times, workers, users, strict=True))
        at = until
