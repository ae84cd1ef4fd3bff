"""The simulator: each bound holds in a small world, and what breaks the limiter is told."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.simulator import __main__ as command
from benchmarks.simulator import measure, report
from benchmarks.simulator.demand import BURST_PERIOD_SECONDS, BURST_SECONDS, arrivals
from benchmarks.simulator.loop import Loop
from benchmarks.simulator.measure import Result, Tape, Worst
from benchmarks.simulator.scenarios import (
    EMPTY,
    KEEP,
    LOSSY,
    OLD,
    SCENARIOS,
    STOP,
    Kind,
    Outage,
    Partition,
    World,
)
from lucid.core.rules.bucket import Bucket

HOT = World(name="hot", workers=3, limit=60, times=10.0, minutes=3.0)
OUTAGE = World(
    name="outage", workers=4, limit=100, times=3.0, minutes=6.0, outages=(Outage(STOP, 100.0, 140.0),)
)


def run(world: World, seed: int = 1, **more: Any) -> Result:
    return Loop(msgspec.structs.replace(world, **more), seed).run()


def test_a_hot_key_is_never_over_and_hardly_under() -> None:
    result = run(HOT)
    assert result.broken == []
    assert result.worst.free == 0
    assert result.worst.edge is None
    assert result.admitted_percent > 98.5
    assert result.requests == result.admitted + result.refused
    assert result.asked < result.requests / 4
    assert result.calls <= result.requests / 4


def test_below_the_limit_nobody_is_refused() -> None:
    result = run(HOT, times=0.7)
    assert (result.refused, result.wrong, result.broken) == (0, 0, [])
    assert result.admitted_percent == pytest.approx(100.0, abs=0.2)


@pytest.mark.parametrize("spread", ["zipf", "sticky", "bursty"])
def test_other_spreads(spread: str) -> None:
    result = run(HOT, spread=spread, users=3, stay_seconds=5.0)
    assert result.broken == []
    assert result.worst.free == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_strict_is_never_over_whatever_happens(seed: int) -> None:
    result = run(
        OUTAGE,
        seed,
        redis_down="strict",
        network=LOSSY,
        kill_each_seconds=11.0,
        pause_each_seconds=7.0,
        step_back_each_seconds=31.0,
        outages=(Outage(OLD, 80.0, 3.0), Outage(STOP, 200.0, 20.0)),
        partitions=(Partition(0.5, 240.0, 20.0),),
    )
    assert result.broken == []
    assert result.worst.most() <= 0
    assert result.admitted > 150


@pytest.mark.parametrize("kind", [STOP, KEEP, EMPTY])
def test_safe_keeps_its_bounds_through_an_outage(kind: Kind) -> None:
    result = run(OUTAGE, outages=(Outage(kind, 100.0, 140.0),))
    assert result.broken == []
    assert result.worst.inside is not None and result.worst.inside <= 0
    assert result.worst.edge is not None
    assert result.degraded > 0
    assert any(begin <= 100.0 and end >= 240.0 for begin, end in result.away)


def test_a_partition_leaves_a_share_to_each_side() -> None:
    result = run(OUTAGE, outages=(), partitions=(Partition(0.5, 100.0, 80.0),))
    assert result.broken == []
    assert result.worst.edge is not None and 0 < result.worst.edge <= 75


def test_the_same_seed_is_the_same_world() -> None:
    one, same, other = (
        run(OUTAGE, seed, network=LOSSY, kill_each_seconds=20.0, spread="zipf") for seed in (5, 5, 6)
    )
    one.seconds = same.seconds = 0.0
    assert one == same
    assert one.curve != other.curve


def test_a_store_that_ignores_reservations_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bucket, "reserved", lambda self: 0)
    result = run(HOT, limit=600)
    assert result.worst.free is not None and result.worst.free > 0
    assert "without an absence" in result.broken[0]


def test_a_store_that_forgets_a_spend_too_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Bucket.advance

    def hasty(self: Bucket, now_ms: int, slot_ms: int) -> None:
        advance(self, now_ms, slot_ms)
        for slot in [slot for slot in self.ring if slot < self.slot - self.slots + 2]:
            self.spent -= self.ring.pop(slot)

    monkeypatch.setattr(Bucket, "advance", hasty)
    assert run(HOT).broken


def test_check_fails_when_a_bound_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCENARIOS, "small", (HOT, OUTAGE))
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    arguments = ["--scenario", "small", "--minutes", "4", "--check", "--out", str(out), "--plot", str(plot)]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "hot: 3 x 10 of 60" in shown and shown.count("| kept |") == 2
    assert [each["world"]["name"] for each in json.loads(out.read_text())] == ["hot", "outage"]
    assert plot.read_text().startswith("<svg") and plot.read_text().count("<g ") == 2
    monkeypatch.setattr(Bucket, "reserved", lambda self: 0)
    assert command.main([*arguments[:2], "--workers", "8", "--minutes", "2", "--check"]) == 1


def test_every_scenario_has_a_title_of_its_own() -> None:
    titles = [(world.title, world.redis_down) for name in SCENARIOS for world in SCENARIOS[name]]
    assert len(command.worlds(list(SCENARIOS), 0, 0.0)) == len(titles)
    assert {world.minutes for world in command.worlds(["hot"], 2, 1.5)} == {1.5}
    assert len(command.worlds(["hot"], 2, 1.5)) == 1


# --- the measures themselves


def test_the_fullest_window_is_found_and_its_kind() -> None:
    worst = Worst()
    times = [0.0, 59.9, 60.0, 100.0, 101.0, 102.0, 200.0]
    measure.worst_windows(worst, times, 2, [(90.0, 170.0)], [(99.0, 165.0)])
    assert worst == Worst(free=0, inside=1, edge=3)
    assert worst.most() == 3


def test_a_window_is_half_open() -> None:
    worst = Worst()
    measure.worst_windows(worst, [0.0, 60.0], 1, [], [])
    assert worst.free == 0


def test_a_refusal_is_wrong_if_the_demand_was_below() -> None:
    tape = Tape(2)
    for at in (0.0, 10.0, 60.4, 70.6):
        tape.arrivals.append(at)
    tape.refuse(1)
    assert tape.wrong == 1
    tape.refuse(2)
    assert tape.wrong == 1
    tape.refuse(3)
    assert (tape.wrong, tape.refused) == (2, 3)


def test_where_spans_overlap() -> None:
    assert measure.union([(3.0, 4.0), (1.0, 2.0), (1.5, 2.5)]) == [(1.0, 2.5), (3.0, 4.0)]
    assert measure.intersection([[(0.0, 5.0)], [(1.0, 2.0), (4.0, 9.0)]]) == [(1.0, 2.0), (4.0, 5.0)]
    assert measure.intersection([[(0.0, 5.0)], []]) == []


@pytest.mark.parametrize(
    "down, worst, words",
    [
        ("strict", Worst(edge=1), "strict"),
        ("safe", Worst(free=1), "without an absence"),
        ("safe", Worst(inside=1), "inside"),
        ("safe", Worst(edge=46), "45 may be"),
    ],
)
def test_each_broken_bound_has_its_words(down: str, worst: Worst, words: str) -> None:
    world = msgspec.structs.replace(HOT, workers=4, redis_down=down)
    assert words in measure.judge(world, worst)[0]
    assert measure.judge(world, Worst(free=0, inside=0, edge=0)) == []


def test_bursts_leave_gaps_and_keep_the_mean() -> None:
    world = msgspec.structs.replace(HOT, spread="bursty", times=20.0)
    times = [at for part in arrivals(world, random.Random(1), 0.5, 600.5) for at, _, _ in part]
    assert times == sorted(times)
    assert all((at - 0.5) % BURST_PERIOD_SECONDS <= BURST_SECONDS for at in times)
    assert len(times) == pytest.approx(60 * 20 * 10, rel=0.05)


def test_a_table_tells_wrong_refusals_in_percent() -> None:
    result = run(HOT, minutes=2.0)
    result.wrong = result.requests // 2
    assert "(50.00 %)" in report.table([result])
