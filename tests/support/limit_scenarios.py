"""What happens to the limiter in the tests of faults, and what each window may hold then.

*The bounds* (design/limiter.md). `strict`: the limit, in every window. `safe`: the limit in every window that is
undisturbed or lies wholly inside an outage, and `limit + limit (N - 1) / N` where an outage begins or ends in it.

*N where workers were killed.* Each worker admits alone at most `limit / N`, earlier admissions of its own counted.
Over all n that lived in a window, dead ones and those that took their places, that is the sum of max(own, limit / N)
with the sum of own <= limit: at most `limit + limit (n - 1) / N`, as one at least has its own. A dead worker stays in
the registry for five seconds, so that the others count its successor besides: N reaches n, and the form stays. Here N
is the pods' workers and all that were killed, which is the larger bound of those that the workers may know.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lucid.dev.embedded import Secantus
from tests.integration.test_limits import token_for
from tests.support.limit_load import (
    LOG_SECONDS,
    PODS,
    WORKERS,
    Caller,
    Fault,
    Run,
    Scenario,
    Sizes,
    Span,
    World,
    admitted,
    environment,
    least,
    most,
    outside,
)
from tests.support.stores import RedisChild

PROBE_SECONDS = 1.0
"""A worker that did without Redis asks it again after so long at the latest."""

LEAST_SHARE = 0.9

MOST_WAIT_SECONDS = 2.0
"""Asserted. It is some milliseconds where nobody else uses the machine."""

BUSY_SECONDS = 0.5
"""Where a request waited longer, the machine had other things to do, and nothing is said about what was not used."""

MOST_CHANGES = 6
"""Of state, by each worker, in one scenario: there and back, and what a busy machine adds."""


def judged(sizes: Sizes) -> float:
    """How long the windows are that must be used well: what is free again may wait for a lease's end, and then for
    somebody who asks.
    """
    return sizes.counted + sizes.life + 0.6


def every_scenario(sizes: Sizes, limit: int, *, seed: int = 1, whole: bool = False) -> list[Scenario]:
    """What is to be performed side by side; `whole`: every fault in both modes."""
    calm = judged(sizes) + 1.2
    measured = judged(sizes) + 1.0
    outage = sizes.window + sizes.life + 1.0
    until_settled = sizes.counted + sizes.life + sizes.slot

    def after(seconds: float, fault: Fault) -> Fault:
        async def later(world: World) -> None:
            await asyncio.sleep(seconds)
            await fault(world)

        return later

    async def killed(world: World) -> None:
        for number in range(3):
            await world.kill_worker(number % PODS)
            await asyncio.sleep(1.5)

    async def paused_and_killed(world: World) -> None:
        pausing = asyncio.create_task(world.pause_redis(outage))
        await asyncio.sleep(sizes.life + 0.5)
        await world.kill_worker(0)
        await pausing

    faults: dict[str, tuple[Fault, float]] = {
        "paused": (lambda world: world.pause_redis(outage), outage + until_settled),
        "restarted": (lambda world: world.restart_redis(2.0, empty=False), 2.3 + sizes.hold + PROBE_SECONDS),
        "emptied": (lambda world: world.restart_redis(2.0, empty=True), 2.3 + sizes.hold + PROBE_SECONDS),
        "killed": (killed, 4.5 + until_settled),
        "paused and killed": (paused_and_killed, outage + until_settled),
    }
    # While Redis is well the mode makes no difference, so each of the two last has its half of the short form.
    pairs = [(name, mode) for name in faults for mode in ("strict", "safe")]
    left_out = () if whole else (("killed", "safe"), ("paused and killed", "strict"))
    wanted = [pair for pair in pairs if pair not in left_out]
    return [
        Scenario(
            name=f"{mode} {name}",
            redis_down=mode,
            sizes=sizes,
            fault=after(calm, faults[name][0]),
            seconds=calm + faults[name][1] + measured,
            callers=callers(sizes, limit),
            pods=1 if mode == "open" else PODS,
            seed=seed * 100 + number,
        )
        for number, (name, mode) in enumerate([*wanted, ("paused", "open")])
    ]


def callers(sizes: Sizes, limit: int) -> list[Caller]:
    """Two far over their limits, on both planes, and one at half of its own."""
    few = limit * 3 // 4
    return [
        Caller("user", limit, 2.6 * limit / sizes.window, "/api/v1/nodes/x", _bearer("busy")),
        Caller("public", few, 2.6 * few / sizes.window, "/api/v1/meta/info"),
        Caller("modest", limit, 0.5 * limit / sizes.window, "/api/v1/nodes/x", _bearer("modest")),
    ]


def _bearer(user: str) -> str:
    return f"Authorization: Bearer {token_for(user, exp=4_000_000_000)}\r\n"


def worst_case() -> Scenario:
    """What a caller can do at the most in `safe` that chooses its workers: `limit` on one before the outage, then its
    share on each (`edge`); a lease at hand as the outage begins (`lease`); its share on a worker that dies in the
    outage, and again on the one that takes its place (`late`). A window holds all of it.
    """
    sizes, limit = Sizes(30), 40
    edge, lease, late, other = (
        Caller(name, limit, 0.0, "/api/v1/meta/info", _bearer(name))
        for name in ("edge", "lease", "late", "other")
    )

    async def choose(world: World) -> None:
        await asyncio.sleep(2.5)  # until each worker knows of all
        lines = await world.lines()
        first, second, *_ = lines.values()
        await first.ask(edge, limit + 5)
        await first.ask(lease, 5)  # from four on it is leased to
        await asyncio.sleep(0.2)
        with world.paused_redis():
            for caller, count in ((other, 3), (lease, limit), (edge, limit), (late, limit)):
                for line in lines.values():
                    await line.ask(caller, count)
            world.kill(next(worker for worker, line in lines.items() if line is second))
            await asyncio.sleep(1.0)
            newcomer = await world.lines(lines)
            for line in newcomer.values():
                await line.ask(late, limit)
        await asyncio.sleep(2.0)  # until all have told that they are back
        for line in [*lines.values(), *newcomer.values()]:
            line.close()

    return Scenario("safe worst case", "safe", sizes, choose, 0.0, [edge, lease, late, other])


def settings_of(
    secantus: Secantus, database: str, more: Mapping[str, str]
) -> Callable[[Scenario, RedisChild], Mapping[str, str]]:
    def settings(scenario: Scenario, redis: RedisChild) -> Mapping[str, str]:
        name = f"{database}_{scenario.name.replace(' ', '_')}"
        user, public, *_ = scenario.callers
        limits = {
            "RATE_LIMIT_AUTHENTICATED": str(user.limit),
            "RATE_LIMIT_PUBLIC": str(public.limit),
            "RATE_LIMIT_WINDOW_SECONDS": str(scenario.sizes.window),
            "RATE_LIMIT_REDIS_DOWN": scenario.redis_down,
        }
        return environment(redis, secantus.in_database(name), **limits, **more)

    return settings


# --- which windows


def edge_bound(run: Run, limit: int) -> int:
    """What a window in `safe` may hold in which an outage begins or ends."""
    known = run.scenario.pods * WORKERS + len(run.world.kills)
    return limit + limit * (known - 1) // known


def undisturbed(run: Run) -> list[Span]:
    """When windows begin that no outage touches."""
    window = run.scenario.sizes.window
    return [(first, last - window) for first, last in outside(run.disturbed(), run.begin, run.end)]


def inside(run: Run) -> list[Span]:
    """When windows begin that lie wholly inside the outage: from when the last lease had run out, or the last answer
    had come that was under way, until Redis grants again.
    """
    sizes = run.scenario.sizes
    hold = (
        sizes.hold if run.world.lost_data else 0.0
    )  # it begins with the first call to the server that came back
    return [
        (first + max(sizes.life, LOG_SECONDS), last + hold - sizes.window)
        for first, last in run.world.stood_still
    ]


def settled(run: Run, length: float) -> list[Span]:
    """When windows of this length begin which must be used well: nothing had happened for so long that whatever was
    reserved in vain is free again."""
    sizes = run.scenario.sizes
    tail = PROBE_SECONDS if run.world.lost_data else sizes.counted + sizes.life + sizes.slot
    spans = [(first, last + tail) for first, last in run.disturbed()]
    spans += [(kill, kill + sizes.counted + sizes.life + sizes.slot) for kill in run.world.kills]
    return [
        (first, last - length)
        for first, last in outside(spans, run.begin + 0.5, run.end - 0.2)
        if last - first >= length
    ]


class Found(NamedTuple):
    """Of one caller in one run. A `bound` of 0: there were no such windows."""

    what: str
    count: int
    bound: int
    moment: float
    """Since the load began."""

    @property
    def over(self) -> bool:
        return self.count > self.bound > 0


def worst(run: Run, caller: Caller) -> list[Found]:
    """The fullest windows, against what they may hold."""
    let_in, window = admitted(caller.asked), run.scenario.sizes.window
    everywhere = [(run.begin, run.end)]
    if run.scenario.redis_down == "strict":
        kinds = [("any", everywhere, caller.limit)]
    else:
        kinds = [
            ("any", everywhere, edge_bound(run, caller.limit)),
            ("undisturbed", undisturbed(run), caller.limit),
            ("inside", inside(run), caller.limit),
        ]
    found = []
    for what, spans, bound in kinds:
        some = any(first <= last for first, last in spans)
        count, begin = most(let_in, window, spans)
        found.append(Found(what, count, bound if some else 0, begin - run.begin))
    return found


def emptiest(run: Run, caller: Caller) -> Found:
    """The emptiest of the windows that must be used well.

    By the moments of sending, so that slow answers do not look like refusals. Left out are windows in which the caller
    did not ask for more than its limit.
    """
    length = judged(run.scenario.sizes)
    let_in = [each._replace(answered=each.sent) for each in admitted(caller.asked)]
    every = sorted(each._replace(answered=each.sent) for each in caller.asked)
    count, begin = least(let_in, length, settled(run, length), every, caller.limit * 3 // 2)
    return Found("least", count, int(LEAST_SHARE * caller.limit) if count >= 0 else 0, begin - run.begin)


def longest_wait(run: Run) -> float:
    return max(each.answered - each.sent for each in run.asked if each.status)


def refused_below(run: Run) -> int:
    """Refusals of callers at half of their limit, while nothing was wrong."""
    quiet = settled(run, 0.0)
    return sum(
        each.status == 429 and any(first <= each.sent and each.answered <= last for first, last in quiet)
        for caller in run.scenario.callers
        if 0.0 < caller.rate * run.scenario.sizes.window < caller.limit
        for each in caller.asked
    )


def wrong(run: Run) -> list[str]:
    """All that must not be, in words: what the tests of `test_limits_in_faults` look at one by one."""
    faults = []
    busy = longest_wait(run) > BUSY_SECONDS
    for caller in run.scenario.callers:
        faults += [f"{caller.name}: {found}" for found in worst(run, caller) if found.over]
        found = emptiest(run, caller)
        if 0 <= found.count < found.bound and not busy:
            faults.append(f"{caller.name}: {found}")
    if below := refused_below(run):
        faults.append(f"{below} refusals below the limit")
    statuses = {each.status for each in run.asked} - {0, 200, 429}
    unanswered = sum(each.status == 0 for each in run.asked)
    if statuses or unanswered > 5 * len(run.world.kills):
        faults.append(f"statuses {statuses}, {unanswered} unanswered")
    if longest_wait(run) > MOST_WAIT_SECONDS:
        faults.append(f"one waited {longest_wait(run)} s")
    return faults


def table(runs: Sequence[Run]) -> str:
    """All of it, for people."""
    lines = []
    for run in runs:
        for caller in run.scenario.callers:
            kinds = [*worst(run, caller), emptiest(run, caller)]
            told = "  ".join(f"{found.what} {found.count}/{found.bound}" for found in kinds)
            lines.append(f"{run.scenario.name:24} {caller.name:8} {told}")
        statuses = sorted({each.status for each in run.asked})
        gone = [f"{first - run.begin:.2f}-{last - run.begin:.2f}" for first, last in run.absences()]
        lines.append(
            f"{'':24} waited {longest_wait(run) * 1_000:.0f} ms, {len(run.asked)} requests, statuses {statuses}, "
            f"refused below {refused_below(run)}, lines {len(run.lines)}, away {' '.join(gone)}"
        )
    return "\n".join(lines)
