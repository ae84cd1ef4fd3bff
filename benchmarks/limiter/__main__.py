"""The limiter's figures, in interleaved rounds on a Redis of its own.

    python -m benchmarks.limiter --only decision compare --rounds 5 --out limiter.json

Redis has one core, the measuring process and the workers the other. Parts that need whole windows (`round_trips`,
`refusals`) take some minutes and are measured once.
"""

import argparse
import logging
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import procfs
from benchmarks.limiter.compare import COMPARE, skipped, versions
from benchmarks.limiter.decision import DECISION, WORKER_TIME
from benchmarks.limiter.figures import DISTURBED_PERCENT, Part, Round, tables
from benchmarks.limiter.fleet import REFUSALS, ROUND_TRIPS_PART
from benchmarks.limiter.ground import Ground, Server
from benchmarks.limiter.outage import HANG
from benchmarks.limiter.script import REDIS_BYTES, SCRIPT_TIME
from benchmarks.report import parse_cpu_model
from benchmarks.stage import choose_cores

PARTS = {
    part.name: part
    for part in (
        DECISION,
        COMPARE,
        ROUND_TRIPS_PART,
        REFUSALS,
        HANG,
        REDIS_BYTES,
        SCRIPT_TIME,
        WORKER_TIME,
    )
}


class Report(msgspec.Struct, frozen=True):
    """What `--out` keeps."""

    cpu: str
    kernel: str
    python: str
    versions: dict[str, str]
    seconds: float
    window_seconds: int
    rounds: list[Round]
    skipped: list[str]
    failed: dict[str, str]


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limiter", description="The limiter's figures."
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=list(PARTS), help=f"of {' '.join(PARTS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the short parts")
    parser.add_argument("--burst", type=float, default=1.0, help="seconds of one short measurement")
    parser.add_argument(
        "--seconds",
        type=int,
        default=60,
        help="window of the limits in round_trips and refusals; 60 is the real one",
    )
    parser.add_argument("--out", type=Path, help="keep every round as JSON")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.only if name not in PARTS]:
        parser.error(f"{' '.join(unknown)}: not of {' '.join(PARTS)}")
    if given.rounds < 1 or given.burst <= 0 or given.seconds < 1:
        parser.error("--rounds and --seconds start at 1, --burst above 0")
    return given


def _busy(ground: Ground) -> tuple[float, float]:
    """CPU seconds of both cores, and of all that is ours, what has ended already included."""
    ended = os.times()
    own = procfs.cpu_s(procfs.tree(os.getpid())) + ended.children_user + ended.children_system
    return sum(procfs.core_busy_s(core) for core in {ground.own_core, ground.store_core}), own


def measure(ground: Ground, part: Part, number: int) -> Round:
    began, (cores, own) = time.monotonic(), _busy(ground)
    rows = part.measure(ground, number)
    wall, (cores_after, own_after) = time.monotonic() - began, _busy(ground)
    foreign = max(0.0, cores_after - cores - (own_after - own))
    print(f"  round {number + 1} {part.name:12} {wall:6.1f} s", file=sys.stderr)
    return Round(part.name, number, 100 * foreign / wall, rows)


def run_rounds(
    ground: Ground, parts: list[Part], count: int, rounds: list[Round], failed: dict[str, str]
) -> None:
    """Fills `rounds` and `failed`; a part that fails once is out."""
    for number in range(count):
        shift = number % len(parts)
        for part in parts[shift:] + parts[:shift]:
            if part.name in failed or (part.once and number):
                continue
            try:
                rounds.append(measure(ground, part, number))
            except Exception as error:
                failed[part.name] = f"{type(error).__name__}: {error}"


def print_report(report: Report, ground: Ground, parts: Sequence[Part]) -> None:
    about = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    print(f"\n{report.cpu}, Linux {report.kernel}, Python {report.python}; {about}")
    if ground.own_core == ground.store_core:
        print("ONE core for everything: Redis and the worker wait for each other.")
    for part in parts:
        rounds = [each for each in report.rounds if each.part == part.name]
        if not rounds:
            continue
        count = "once" if len(rounds) == 1 else f"medians of {len(rounds)} rounds"
        window = f", windows of {report.window_seconds} s" if part.once else ""
        print(f"\n{part.title}; {count}{window}:\n\n{tables(part, rounds)}")
        worst = max(each.foreign_percent for each in rounds)
        if worst > DISTURBED_PERCENT:
            print(
                f"\nDISTURBED {part.name}: other processes took {worst:.0f} % of a core; not a figure to publish"
            )
    for name in report.skipped:
        print(f"skipped {name}: not installed")
    for name, reason in report.failed.items():
        print(f"FAILED {name}: {reason}")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0; 1 when a part failed, 130 after Ctrl-C or SIGTERM."""
    options = parse_options(argv)
    # That Redis counted as away is in the rows, by its count.
    logging.getLogger("lucid").setLevel(logging.ERROR)
    parts = [PARTS[name] for name in PARTS if name in options.only]
    own_core, store_core = choose_cores(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {own_core})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    rounds: list[Round] = []
    failed: dict[str, str] = {}
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        ground = Ground(Path(name), own_core, store_core, options.burst, options.seconds)
        with Server(ground) as server:
            store = dict([server.version().split()])
        try:
            run_rounds(ground, parts, options.rounds, rounds, failed)
        except KeyboardInterrupt:
            interrupted = True
    report = Report(
        cpu=parse_cpu_model(Path("/proc/cpuinfo").read_text()),
        kernel=platform.release(),
        python=platform.python_version(),
        versions=store | versions(),
        seconds=options.burst,
        window_seconds=options.seconds,
        rounds=rounds,
        skipped=skipped() if COMPARE in parts else [],
        failed=failed,
    )
    print_report(report, ground, parts)
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return 130 if interrupted else 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
