"""`python -m benchmarks.simulator`: worlds by name, a table, and what else is asked for."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.simulator import report
from benchmarks.simulator.loop import Loop
from benchmarks.simulator.measure import Result
from benchmarks.simulator.scenarios import SCENARIOS, World


def worlds(names: Sequence[str], workers: int, minutes: float) -> list[World]:
    """Those of the scenarios named, each once, with the fleet and the time asked for (0: their own)."""
    chosen: dict[World, None] = {}
    for name in names:
        for world in SCENARIOS[name]:
            changed = msgspec.structs.replace(
                world, workers=workers or world.workers, minutes=minutes or world.minutes
            )
            chosen[changed] = None
    return list(chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--scenario", nargs="+", choices=[*SCENARIOS, "all"], default=["all"], metavar="NAME")
    parser.add_argument("--workers", type=int, default=0, help="instead of the scenarios' own")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the virtual clock, likewise")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every figure, as JSON")
    parser.add_argument("--plot", type=Path, help="windows over time, as SVG")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bound is broken")
    chosen = parser.parse_args(arguments)
    names = list(SCENARIOS) if "all" in chosen.scenario else chosen.scenario
    results: list[Result] = []
    try:
        for world in worlds(names, chosen.workers, chosen.minutes):
            result = Loop(world, chosen.seed).run()
            results.append(result)
            speed = f"{result.requests:,} requests in {result.seconds:.1f} s"
            print(f"{world.title} ({world.redis_down}): {speed}", *result.broken, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("ended early", file=sys.stderr)
    print(report.table(results))
    if chosen.out:
        chosen.out.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    if chosen.plot:
        chosen.plot.write_text(report.plot(results), encoding="utf-8")
    return int(chosen.check and any(result.broken for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
