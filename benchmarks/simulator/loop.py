"""The world: the heap of events, the requests between them, and the fleet."""

import gc
import random
import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from benchmarks.simulator import contact, measure
from benchmarks.simulator.contact import Leases, Limit, LimitSet, Store, Take
from benchmarks.simulator.demand import arrivals
from benchmarks.simulator.measure import Result, Tape
from benchmarks.simulator.pod import Pod
from benchmarks.simulator.scenarios import OLD, STOP, World
from benchmarks.simulator.server import SNAPSHOT_SECONDS, Server

WARM_SECONDS = 0.5
"""Workers start that long before demand does."""

Event = Callable[[float, Any], None]


class Loop:
    """Run it once. `leases` and `store` may be other kinds, to see what a change of theirs does."""

    def __init__(
        self,
        world: World,
        seed: int = 1,
        *,
        leases: type[Leases] = Leases,
        store: Callable[[], Store] = Store,
    ) -> None:
        self.world = world
        self.dice = random.Random(f"{seed}.{world.title}.{world.redis_down}")
        self.at = 0.0
        self.calls = 0
        self.asked = 0
        self.heap: list[tuple[float, int, Event, Any]] = []
        self._added = 0
        self._kind = leases
        limit = Limit(contact.LIMIT_NAME, world.limit, 60, redis_down=world.redis_down)
        self.limits = LimitSet((limit,))
        self.server = Server(world, self.dice, store)
        self.users = [f"user{number}" for number in range(world.users)]
        self.tapes = [Tape(world.limit) for _ in self.users]
        self._dead: deque[float] = deque()
        self._beats: dict[int, int] = {}
        self._gone: list[Pod] = []
        self.pods = [Pod(self, number, leases, self.dice) for number in range(world.workers)]

    def add(self, at: float, what: Event, arg: Any) -> None:
        self._added += 1
        heappush(self.heap, (at, self._added, what, arg))

    # --- the run

    def run(self) -> Result:
        begun = time.perf_counter()
        for pod in self.pods:
            pod.start()
        end = WARM_SECONDS + self.world.minutes * 60.0
        self._plan(end)
        # Nothing here is cyclic garbage that matters, and a collection walks all tapes.
        frozen = gc.isenabled()
        gc.disable()
        try:
            self._run(end)
        finally:
            if frozen:
                gc.enable()
        for pod in self.pods:
            pod.end(end)
        return self._result(end, time.perf_counter() - begun)

    def _run(self, end: float) -> None:
        heap = self.heap
        tapes, users, limits = self.tapes, self.users, self.limits
        admitted, denied = Take.ADMITTED, Take.DENIED
        for part in arrivals(self.world, self.dice, WARM_SECONDS, end):
            for at, number, user in part:
                if heap[0][0] <= at:
                    self._until(at)
                pod = self.pods[number]
                if at < pod.paused_until or not pod.serving:
                    self._elsewhere(at, pod, user)
                    continue
                claim = pod.leases.claim(limits, users[user], "")
                tape = tapes[user]
                tape.arrivals.append(at)
                # A clock of its own, so that a mix-up of two workers' times would show.
                pod.at = at
                verdict = claim.take(at * pod.pace + pod.skew)
                if verdict is admitted:
                    tape.admitted.append(at)
                    tape.charged.append(at)
                elif verdict is denied:
                    tape.refuse(len(tape.arrivals) - 1)
                else:
                    self.asked += 1
                    pod.ask(at, claim, tape, len(tape.arrivals) - 1)
        self._until(end)

    def _until(self, at: float) -> None:
        heap = self.heap
        while heap and heap[0][0] <= at:
            self.at, _, what, arg = heappop(heap)
            what(self.at, arg)

    def request(self, at: float, pod: Pod, user: int) -> None:
        """As in `_run`, for the few that do not come straight."""
        claim = pod.leases.claim(self.limits, self.users[user], "")
        tape = self.tapes[user]
        tape.arrivals.append(at)
        pod.at = at
        verdict = claim.take(pod.now())
        if verdict is Take.ADMITTED:
            tape.admit(at, at)
        elif verdict is Take.DENIED:
            tape.refuse(len(tape.arrivals) - 1)
        else:
            self.asked += 1
            pod.ask(at, claim, tape, len(tape.arrivals) - 1)

    def _elsewhere(self, at: float, pod: Pod, user: int) -> None:
        """A paused worker gets it and answers later; one that starts is not asked yet, its neighbour is."""
        if pod.serving:
            self.add(pod.paused_until, pod.late_request, user)
            return
        serving = [other for other in self.pods if other.serving and at >= other.paused_until]
        if serving:
            self.request(at, self.dice.choice(serving), user)

    # --- between workers and Redis

    def serve(self, at: float, arg: Any) -> None:
        pod, flight, run = arg
        opens = self.server.open_at(at, pod.number)
        if opens == float("inf"):
            self.add(at, pod.failed, flight)
            return
        answer = self.server.execute(at, flight, run)
        back = at + self.server.delay()
        self.add(max(back, self.server.open_at(back, pod.number)), pod.answered, (flight, answer, at))

    def run_late(self, at: float, arg: Any) -> None:
        """A message whose answer nobody takes: its connection broke, or it came before."""
        flight, run = arg
        if run == self.server.run and self.server.reachable(at, -1):
            self.server.execute(at, flight, run)

    def publish(self, pod: Pod, keys: list[str], report: bool) -> None:
        at = self.at
        if not self.server.reachable(at, pod.number):
            return
        self.add(at + self.server.delay() + self.server.delay(), self._recalled, (pod, keys, report))

    def _recalled(self, at: float, arg: Any) -> None:
        sender, keys, report = arg
        for pod in self.pods:
            if pod is not sender and pod.serving and self.server.reachable(at, pod.number):
                pod.on_recall(at, (keys, report))

    def registry(self, at: float, number: int) -> tuple[bool, int]:
        """Whether this worker hears of it, and the fleet as it heard last: the dead are in it for some seconds."""
        reachable = self.server.reachable(at, number)
        if reachable:
            dead = self._dead
            while dead and at - dead[0] >= contact.DEAD_SECONDS:
                dead.popleft()
            self._beats[number] = self.world.workers + len(dead)
        return reachable, self._beats.get(number, 0)

    # --- faults

    def _plan(self, end: float) -> None:
        world = self.world
        for outage in world.outages:
            if outage.kind != STOP:
                if outage.kind == OLD:
                    self.add(outage.at_seconds - SNAPSHOT_SECONDS, self._snapshot, None)
                self.add(outage.at_seconds, self._break, None)
                self.add(outage.at_seconds + outage.seconds - 1e-6, self._restart, outage.kind)
        for period, what in (
            (world.kill_each_seconds, self._kill),
            (world.pause_each_seconds, self._pause),
            (world.step_back_each_seconds, self._step_back),
        ):
            at = period
            while 0 < at < end:
                self.add(at, what, None)
                at += period
        self.add(float("inf"), self._nothing, None)

    def _nothing(self, at: float, arg: Any) -> None:
        """The heap is never empty."""

    def _snapshot(self, at: float, arg: Any) -> None:
        self.server.snapshot()

    def _break(self, at: float, arg: Any) -> None:
        for pod in self.pods:
            if pod.flying is not None:
                self.add(at + self.server.delay(), pod.failed, pod.flying)

    def _restart(self, at: float, kind: object) -> None:
        self.server.restart(str(kind))

    def _kill(self, at: float, arg: Any) -> None:
        old = self.dice.choice(self.pods)
        old.kill(at)
        self._gone.append(old)
        self._dead.append(at)
        new = Pod(self, old.number, self._kind, self.dice)
        self.pods[old.number] = new
        new.start()

    def _pause(self, at: float, arg: Any) -> None:
        self.dice.choice(self.pods).paused_until = at + self.dice.expovariate(1.0 / self.world.pause_seconds)

    def _step_back(self, at: float, arg: Any) -> None:
        self.server.stepped_ms += 1_000.0

    # --- what comes out

    def _result(self, end: float, seconds: float) -> Result:
        every = self.pods + self._gone
        # Until a worker notices that Redis is away it goes on spending what it holds: that counts as an absence too.
        absences = [[*pod.absences, *self.server.spans(pod.number)] for pod in every]
        away = measure.union(span for own in absences for span in own)
        all_away = measure.intersection([measure.union(own) for own in absences[: len(self.pods)]])
        worst, charged = measure.Worst(), measure.Worst()
        fullest = (-1, self.tapes[0])
        for tape in self.tapes:
            own = measure.Worst()
            measure.worst_windows(own, tape.admitted, tape.limit, away, all_away)
            for kind in ("free", "inside", "edge"):
                if (over := getattr(own, kind)) is not None:
                    worst.add(kind, over)
            measure.worst_windows(charged, tape.charged, tape.limit, away, all_away)
            if own.most() + tape.limit > fullest[0]:
                fullest = (own.most() + tape.limit, tape)
        windows, admitted_percent = measure.shares(self.tapes, end)
        requests = sum(len(tape.arrivals) for tape in self.tapes)
        admitted = sum(len(tape.admitted) for tape in self.tapes)
        refused = sum(tape.refused for tape in self.tapes)
        return Result(
            world=self.world,
            seconds=seconds,
            requests=requests,
            admitted=admitted,
            refused=refused,
            wrong=sum(tape.wrong for tape in self.tapes),
            lost=requests - admitted - refused,
            calls=self.calls,
            scripts=self.server.calls,
            recalls=sum(pod.recalls for pod in every),
            asked=self.asked,
            degraded=sum(contact.counters(pod.leases).degraded for pod in every),
            worst=worst,
            worst_charged=charged,
            windows=windows,
            admitted_percent=admitted_percent,
            broken=measure.judge(self.world, charged),
            away=away,
            curve=measure.curve(fullest[1], end),
        )
