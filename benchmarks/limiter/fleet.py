"""Four worker processes over one Redis: calls per 1,000 requests, and refusals below the limit.

Callers come at a steady pace, spread evenly over the workers. Every request's own time is kept, so that the worst
window is exact: it is looked for over all instants, not over a grid.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks.limiter.figures import Part, Row
from benchmarks.limiter.ground import Ground, Server, count_since
from benchmarks.limiter.worker import Task, Told
from benchmarks.peers.base import ROOT

WORKERS = 4
STOP_SECONDS = 20.0
LEAD_SECONDS = 0.3


class Scene(msgspec.Struct, frozen=True):
    """`load`: what one user asks for, in units of the limit. `windows`: warm-up, measured.

    Users are as many as stated for windows of 60 s, fewer for shorter ones: the pace stays the same.
    """

    name: str
    limit: int
    users: int
    load: float
    windows: tuple[int, int]
    aim: str = ""

    def users_of(self, window_seconds: int) -> int:
        return max(1, min(self.users, self.users * window_seconds // 60))

    def task(self, ground: Ground, server: Server, index: int) -> Task:
        window = ground.window_seconds
        users = self.users_of(window)
        return Task(
            uri=server.uri,
            out=str(server.data / f"told-{index}"),
            index=index,
            workers=WORKERS,
            limit=self.limit,
            window_seconds=window,
            users=users,
            rate_per_s=users * self.load * self.limit / window,
            warm_seconds=float(self.windows[0] * window),
            measured_seconds=float(self.windows[1] * window),
        )


class FleetError(Exception):
    """A worker ended or was silent."""


@contextlib.contextmanager
def _workers(tasks: Sequence[Task]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that are ready, in the registry and connected; ended in any case."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for task in tasks:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.limiter.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(task) + b"\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise FleetError("a worker did not start")
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.monotonic()))


def worst_window(times: Sequence[float], seconds: float) -> int:
    """The most of these times that lie in any [t, t + seconds)."""
    ordered = sorted(times)
    most = first = 0
    for last, at in enumerate(ordered):
        while at - ordered[first] >= seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def play(ground: Ground, scenes: Sequence[Scene]) -> list[Row]:
    """Light scenes at the same time, each with a store and workers of its own."""
    with contextlib.ExitStack() as stack:
        stages = []
        for scene in scenes:
            server = stack.enter_context(Server(ground))
            tasks = [scene.task(ground, server, index) for index in range(WORKERS)]
            stages.append((scene, server, tasks, stack.enter_context(_workers(tasks))))
        begin = time.monotonic() + LEAD_SECONDS
        for *_, processes in stages:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"%.6f\n" % begin)
                process.stdin.flush()
        instants = sorted(
            (begin + at, number)
            for number, (_, _, tasks, _) in enumerate(stages)
            for at in (tasks[0].warm_seconds, tasks[0].warm_seconds + tasks[0].measured_seconds)
        )
        stats: dict[int, list[dict[str, tuple[int, int]]]] = {number: [] for number in range(len(stages))}
        for when, number in instants:
            _sleep_until(when)
            stats[number].append(stages[number][1].calls())
        rows = []
        for number, (scene, _, tasks, processes) in enumerate(stages):
            told = []
            for index, process in enumerate(processes):
                try:
                    status = process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    raise FleetError(f"{scene.name}: a worker cannot keep the pace") from None
                if status:
                    raise FleetError(f"{scene.name}: a worker ended with {status}")
                told.append(msgspec.msgpack.decode(Path(tasks[index].out).read_bytes(), type=Told))
            rows.append(_row(scene, tasks[0], told, *stats[number]))
    return rows


def _row(
    scene: Scene,
    task: Task,
    told: Sequence[Told],
    before: dict[str, tuple[int, int]],
    after: dict[str, tuple[int, int]],
) -> Row:
    requests = sum(each.requests for each in told)
    users = {user for each in told for user in each.admitted}
    times = {user: [at for each in told for at in each.admitted.get(user, ())] for user in users}
    measured = [at for each in times.values() for at in each if at >= task.warm_seconds]
    windows = scene.windows[1]
    values = {
        "calls": 1_000 * count_since(before, after, "evalsha") / requests,
        "own_calls": 1_000 * sum(each.calls for each in told) / requests,
        "pushes": 1_000 * count_since(before, after, "xadd") / requests,
        "refused": float(sum(each.refused_ever for each in told)),
        "requests": float(requests),
        "worst": float(max((worst_window(each, task.window_seconds) for each in times.values()), default=0)),
        "cpu_us": 1e6 * sum(each.cpu_s for each in told) / requests,
        "degraded": float(sum(each.whole["degraded"] for each in told)),
        "late_ms": max(each.late_ms for each in told),
    }
    if scene.load > 1:
        values["share"] = 100 * len(measured) / (task.users * windows * scene.limit)
    notes = [f"{task.users:,} users"] * (task.users > 1)
    if values["worst"] > scene.limit:
        notes.append("OVER THE LIMIT")
    if values["degraded"]:
        notes.append("Redis counted as away for a while: not a figure to publish")
    return Row(scene.name, values, aim=scene.aim, note="; ".join(notes))


ROUND_TRIPS = (
    (
        Scene("one hot key, 20 times 100", 100, 1, 20, (1, 2), "60"),
        Scene("one hot key, 20 times 1,000", 1_000, 1, 20, (1, 2), "20"),
    ),
    (Scene("one hot key, 20 times 10,000", 10_000, 1, 20, (1, 2), "10"),),
    (Scene("many users, each 0.3 of 1,000", 1_000, 1_000, 0.3, (1, 1), "50"),),
)
BELOW = (
    (
        Scene("0.7 of 100", 100, 1, 0.7, (0, 2), "refused: 0"),
        Scene("0.9 of 1,000", 1_000, 1, 0.9, (0, 2), "refused: 0"),
    ),
)


def round_trips(ground: Ground, _: int) -> list[Row]:
    return [row for scenes in ROUND_TRIPS for row in play(ground, scenes)]


def refusals(ground: Ground, _: int) -> list[Row]:
    return [row for scenes in BELOW for row in play(ground, scenes)]


COLUMNS = {
    "calls": "EVALSHA per 1,000 (Redis)",
    "own_calls": "the same (workers)",
    "pushes": "recalls per 1,000",
    "requests": "requests",
    "refused": "refused, warm-up included",
    "worst": "most in any window",
    "share": "admitted, % of the limit",
    "cpu_us": "CPU µs/request",
    "degraded": "decided without Redis",
    "late_ms": "latest request, ms",
}
ROUND_TRIPS_PART = Part(
    "round_trips",
    f"{WORKERS} worker processes, a steady pace spread evenly; one window of warm-up",
    COLUMNS,
    round_trips,
    once=True,
)
REFUSALS = Part(
    "refusals",
    f"Below the limit: {WORKERS} worker processes, a steady pace spread evenly, from a cold start over two windows",
    {
        name: COLUMNS[name]
        for name in ("refused", "requests", "worst", "calls", "pushes", "degraded", "late_ms")
    },
    refusals,
    once=True,
)
