"""The harness: one peer at a time on one core, wrk and the backend on the other, rounds interleaved.

    python -m benchmarks --rounds 3 --seconds 5 --scenario get65,varied --peers lucid,envoy --out result.json

Each measurement starts the peer anew, checks that it does what it claims, warms it up, loads it, checks it
again and ends it. Ctrl-C ends everything that was started and prints what is there.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import procfs
from benchmarks.children import BenchError, Children, free_port
from benchmarks.load import SCENARIOS, Scenario, ask, run_wrk, wrk_command
from benchmarks.peers import ALL
from benchmarks.peers.base import Peer, Running, missing
from benchmarks.report import DISTURBED_PERCENT, Report, Round, environment, summarise, table, warnings
from benchmarks.stage import Stage, choose_cores, find_program, set_stage

WARM_UP_S = 1


class Options(msgspec.Struct, frozen=True):
    rounds: int
    seconds: int
    connections: int
    retries: int
    peers: list[Peer]
    scenarios: list[Scenario]
    out: Path | None


def parse_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Lucid and its peers, side by side."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="length of one measurement")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument(
        "--retries", type=int, default=2, help="repeats of a round that other processes disturbed"
    )
    parser.add_argument("--peers", default=",".join(ALL), help="comma list, default all: %(default)s")
    parser.add_argument("--scenario", default="get65", help=f"comma list of {','.join(SCENARIOS)}, or all")
    parser.add_argument("--out", type=Path, help="keep every round and the environment as JSON")
    given = parser.parse_args(argv)
    names = list(SCENARIOS) if given.scenario == "all" else given.scenario.split(",")
    for name, known in [(n, ALL) for n in given.peers.split(",")] + [(n, SCENARIOS) for n in names]:
        if name not in known:
            parser.error(f"{name}: not one of {', '.join(known)}")
    if min(given.rounds, given.seconds, given.connections) < 1:
        parser.error("--rounds, --seconds and --connections start at 1")
    peers = [ALL[name] for name in given.peers.split(",")]
    scenarios = [SCENARIOS[name] for name in names]
    return Options(given.rounds, given.seconds, given.connections, given.retries, peers, scenarios, given.out)


def check(stage: Stage, peer: Peer, scenario: Scenario, port: int) -> None:
    """Raises BenchError unless the peer gives the backend's own answer and refuses who shows no token."""
    expected = ask(stage.backend_port, scenario, stage.fields)
    answer = ask(port, scenario, stage.fields)
    if answer.status != 200:
        raise BenchError(f"status {answer.status} instead of 200: {answer.body[:200]!r}")
    if answer.body != expected.body:
        raise BenchError(f"body of {len(answer.body)} bytes is not the backend's of {len(expected.body)}")
    absent = [name for name in peer.answer_fields if name not in answer.fields]
    if absent:
        raise BenchError(f"the answer lacks {', '.join(absent)}")
    if peer.authenticates:
        anonymous = {name: value for name, value in stage.fields.items() if name != "Authorization"}
        status = ask(port, scenario, anonymous).status
        if status != 401:
            raise BenchError(f"status {status} without a token instead of 401")


def measure(stage: Stage, peer: Peer, scenario: Scenario, options: Options, number: int) -> Round:
    """One round of one peer, from its start to its end. Raises BenchError when anything was amiss."""
    port = free_port()
    try:
        running = peer.start(stage, port)
        try:
            check(stage, peer, scenario, port)
            _load(stage, scenario, port, options.connections, WARM_UP_S)
            measured = _measure_load(stage, peer, scenario, options, number, running, port)
            check(stage, peer, scenario, port)
            return measured
        except BenchError as error:
            stage.children.stop_all(keep=stage.backend)  # so that its last words are written
            error.log = error.log or running.gateway.tail()
            raise
    finally:
        stage.children.stop_all(keep=stage.backend)


def _load(stage: Stage, scenario: Scenario, port: int, connections: int, seconds: int) -> tuple[float, ...]:
    argv = wrk_command(
        port, scenario, stage.fields, core=stage.load_core, seconds=seconds, connections=connections
    )
    result, wrk_cpu_s = run_wrk(argv, seconds)
    if result.non_2xx or result.socket_errors:
        raise BenchError(f"{result.non_2xx} answers were errors, {result.socket_errors} socket errors")
    if not result.requests:
        raise BenchError("no request was answered")
    return result.requests, result.requests_per_s, result.p50_ms, result.p99_ms, wrk_cpu_s


def _measure_load(
    stage: Stage, peer: Peer, scenario: Scenario, options: Options, number: int, running: Running, port: int
) -> Round:
    cores = (stage.gateway_core, stage.load_core)
    gateway_pids = procfs.tree(running.gateway.pid)
    store_pids = [pid for child in running.stores for pid in procfs.tree(child.pid)]

    def clocks() -> list[float]:
        own = [procfs.cpu_s(pids) for pids in (gateway_pids, store_pids, [stage.backend.pid])]
        return [time.monotonic(), *own, *(procfs.core_busy_s(core) for core in cores)]

    before = clocks()
    requests, requests_per_s, p50_ms, p99_ms, wrk_s = _load(
        stage, scenario, port, options.connections, options.seconds
    )
    wall_s, gateway_s, stores_s, backend_s, gateway_core_s, load_core_s = (
        after - earlier for after, earlier in zip(clocks(), before, strict=True)
    )
    load_s = backend_s + stores_s + wrk_s
    if cores[0] == cores[1]:
        foreign_s = gateway_core_s - gateway_s - load_s
    else:
        foreign_s = max(gateway_core_s - gateway_s, load_core_s - load_s)
    return Round(
        scenario=scenario.name,
        peer=peer.name,
        number=number,
        requests=int(requests),
        requests_per_s=requests_per_s,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        cpu_us=1e6 * gateway_s / requests,
        stores_cpu_us=1e6 * stores_s / requests,
        gateway_core_percent=100 * gateway_s / wall_s,
        foreign_percent=100 * max(0.0, foreign_s) / wall_s,
        mib_per_s=requests_per_s * scenario.mib,
    )


def measure_quietly(stage: Stage, peer: Peer, scenario: Scenario, options: Options, number: int) -> Round:
    """Measure again while others disturb; keep the least disturbed: the noise chooses, never the figure."""
    best = measure(stage, peer, scenario, options, number)
    for _ in range(options.retries):
        if best.foreign_percent <= DISTURBED_PERCENT:
            break
        best = min(
            best, measure(stage, peer, scenario, options, number), key=lambda each: each.foreign_percent
        )
    return best


def run_rounds(
    stage: Stage, options: Options, peers: list[Peer], rounds: list[Round], failed: dict[str, str]
) -> None:
    """Fill `rounds` and `failed`. A peer that fails once is out."""
    for number in range(options.rounds):
        shift = number % len(peers)  # nobody is always the one who follows nginx
        for scenario in options.scenarios:
            for peer in peers[shift:] + peers[:shift]:
                if peer.name in failed or (scenario.mib and not peer.proxies):
                    continue
                try:
                    measured = measure_quietly(stage, peer, scenario, options, number)
                except BenchError as error:
                    failed[peer.name] = f"{scenario.name}: {error}"
                    print(f"  {peer.name} FAILED in {failed[peer.name]}\n{error.log}", file=sys.stderr)
                    continue
                rounds.append(measured)
                print(
                    f"  round {number + 1}/{options.rounds} {scenario.name:8} {peer.name:16}"
                    f" {measured.requests_per_s:10,.0f}/s {measured.cpu_us:8.1f} µs",
                    file=sys.stderr,
                )


def print_report(report: Report, scenarios: Sequence[Scenario]) -> None:
    titles = {peer.name: peer.title for peer in ALL.values()}
    about = report.environment
    print(f"\n{about.cpu}, {about.cores} cores, Linux {about.kernel}, Python {about.python};", end=" ")
    print(", ".join(f"{name} {version}" for name, version in about.versions.items()))
    if about.gateway_core == about.load_core:
        print("ONE core for gateway, backend and wrk: compare ratios only, and expect them to be flattered.")
    for scenario in scenarios:
        rows = summarise([each for each in report.rounds if each.scenario == scenario.name])
        if rows:
            print(f"\n{scenario.name}, {report.connections} connections, {report.seconds} s, medians:\n")
            print(table(rows, titles))
            for warning in warnings(rows):
                print(f"DISTURBED {warning}")
    for name, reason in report.skipped.items():
        print(f"skipped {name}: missing {reason}")
    for name, reason in report.failed.items():
        print(f"FAILED {name}: {reason}")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0; 1 when a peer failed, 2 when the harness lacks something, 130 after Ctrl-C or SIGTERM."""
    options = parse_options(argv)
    if lacking := [name for name in ("wrk", "nginx", "taskset") if find_program(name) is None]:
        print(f"the benchmarks need {', '.join(lacking)} (see benchmarks/README.md)", file=sys.stderr)
        return 2
    skipped = {peer.name: ", ".join(lacks) for peer in options.peers if (lacks := missing(peer))}
    peers = [peer for peer in options.peers if peer.name not in skipped]
    rounds: list[Round] = []
    failed: dict[str, str] = {}
    interrupted = False
    cores = choose_cores(os.sched_getaffinity(0))
    about = environment(peers, *cores)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, Children(Path(name)) as children:
        try:
            stage = set_stage(Path(name), children, *cores)
            if peers:
                run_rounds(stage, options, peers, rounds, failed)
        except KeyboardInterrupt:
            interrupted = True
        except BenchError as error:
            print(f"the backend did not start: {error}\n{error.log}", file=sys.stderr)
            return 2
    report = Report(about, options.seconds, options.connections, rounds, skipped, failed)
    print_report(report, options.scenarios)
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return 130 if interrupted else 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
