"""What a run says: the bounds, exactly, from the times of decision; and what it cost."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import msgspec

from benchmarks.simulator.scenarios import World

WINDOW_SECONDS = 60.0
GRACE_SECONDS = 60.5
"""Who asks for no more than the limit in any such window is not to be refused: a window and a slot."""

Spans = list[tuple[float, float]]


class Tape:
    """One key: every arrival, every admission, and how many were refused."""

    __slots__ = ("admitted", "arrivals", "charged", "limit", "refused", "wrong")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.arrivals = array("d")
        self.admitted = array("d")
        self.charged = array("d")
        """As `admitted`; what the store charged directly at the store's moment, before the answer came."""
        self.refused = 0
        self.wrong = 0

    def admit(self, at: float, charged_at: float) -> None:
        self.admitted.append(at)
        self.charged.append(charged_at)

    def refuse(self, number: int) -> None:
        """`number`: which arrival. Wrongly, if no more than the limit had come in the time up to it."""
        self.refused += 1
        before = number - self.limit
        if before < 0 or self.arrivals[before] <= self.arrivals[number] - GRACE_SECONDS:
            self.wrong += 1


class Worst(msgspec.Struct):
    """The fullest windows, less the limit. `free` meets no absence from Redis; `inside`: all workers away
    through all of it; `edge`: the others. None where no such window is.
    """

    free: int | None = None
    inside: int | None = None
    edge: int | None = None

    def add(self, kind: str, over: int) -> None:
        before = getattr(self, kind)
        setattr(self, kind, over if before is None else max(before, over))

    def most(self) -> int:
        return max((over for over in (self.free, self.inside, self.edge) if over is not None), default=0)


class Result(msgspec.Struct):
    world: World
    seconds: float
    """Real ones that the run took."""
    requests: int
    admitted: int
    refused: int
    wrong: int
    lost: int
    """Requests whose worker was killed while they waited."""
    calls: int
    scripts: int
    recalls: int
    asked: int
    """Requests that waited for Redis."""
    degraded: int
    worst: Worst
    worst_charged: Worst
    """By the store's moments of direct charges."""
    windows: list[float]
    """Percent admitted of what could be, in each window of a minute after the first."""
    admitted_percent: float
    """The same over the windows that end at each second: how the minutes fall does not matter."""
    broken: list[str]
    away: Spans
    curve: list[tuple[float, int]]
    """Admitted in the window that ends at that second; of the key with the fullest window."""

    @property
    def ten_percent(self) -> float:
        return sum(self.windows) / len(self.windows) if self.windows else 0.0

    @property
    def calls_per_1000(self) -> float:
        return 1_000 * self.calls / max(1, self.requests)


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def intersection(every: Sequence[Spans]) -> Spans:
    """Where all of them are on."""
    steps = sorted(
        [(begin, 1) for own in every for begin, _ in own] + [(end, -1) for own in every for _, end in own]
    )
    spans: Spans = []
    depth = 0
    for at, step in steps:
        if depth == len(every) and step < 0:
            spans[-1] = (spans[-1][0], at)
        depth += step
        if depth == len(every) and step > 0:
            spans.append((at, at))
    return [(begin, end) for begin, end in spans if end > begin]


def _meets(spans: Spans, begin: float, end: float) -> bool:
    at = bisect_left(spans, (end,)) - 1
    return at >= 0 and spans[at][1] > begin


def _within(spans: Spans, begin: float, end: float) -> bool:
    at = bisect_right(spans, (begin, float("inf"))) - 1
    return at >= 0 and spans[at][1] >= end


def worst_windows(worst: Worst, times: Sequence[float], limit: int, some: Spans, all_: Spans) -> None:
    """Every window is judged that begins with an admission: no other can be fuller than all of these."""
    times = sorted(times)
    last = 0
    for first, begin in enumerate(times):
        end = begin + WINDOW_SECONDS
        while last < len(times) and times[last] < end:
            last += 1
        if not some or not _meets(some, begin, end):
            kind = "free"
        else:
            kind = "inside" if _within(all_, begin, end) else "edge"
        worst.add(kind, last - first - limit)


def admitted_shares(tapes: Sequence[Tape], begins: Iterable[float]) -> list[float]:
    """Percent: admitted over `min(demand, limit)` of all keys, in the windows that begin then."""
    begins = list(begins)
    got, could = [0] * len(begins), [0] * len(begins)
    for tape in tapes:
        arrivals, admitted = tape.arrivals, sorted(tape.charged)
        for at, begin in enumerate(begins):
            demand = bisect_left(arrivals, begin + WINDOW_SECONDS) - bisect_left(arrivals, begin)
            could[at] += min(demand, tape.limit)
            got[at] += bisect_left(admitted, begin + WINDOW_SECONDS) - bisect_left(admitted, begin)
    return [100.0 * one / of if of else 100.0 for one, of in zip(got, could, strict=True)]


def shares(tapes: Sequence[Tape], end: float) -> tuple[list[float], float]:
    """Per whole minute after the first; and the mean over the windows that end at each second after it."""
    last = int(end - WINDOW_SECONDS)
    minutes = admitted_shares(tapes, range(60, last + 1, 60))
    step = 1 if len(tapes) == 1 else 7
    sliding = admitted_shares(tapes, range(60, last + 1, step))
    return minutes, sum(sliding) / len(sliding) if sliding else 0.0


def curve(tape: Tape, end: float) -> list[tuple[float, int]]:
    times = sorted(tape.admitted)
    return [
        (float(at), bisect_right(times, at) - bisect_right(times, at - WINDOW_SECONDS))
        for at in range(0, int(end) + 1, 2)
    ]


def judge(world: World, worst: Worst) -> list[str]:
    """The bounds that are broken (design: what the limiter promises)."""
    broken: list[str] = []
    share = max(1, world.limit // world.workers)
    if worst.free is not None and worst.free > 0:
        broken.append(f"{worst.free} over in a window without an absence")
    if world.redis_down == "strict" and worst.most() > 0:
        broken.append(f"{worst.most()} over in strict")
    if world.redis_down == "safe":
        if worst.inside is not None and worst.inside > 0:
            broken.append(f"{worst.inside} over in a window inside an outage")
        if worst.edge is not None and worst.edge > (world.workers - 1) * share:
            broken.append(f"{worst.edge} over at an outage's edge, {(world.workers - 1) * share} may be")
    return broken
