"""Memory of a worker before and after many requests.

    python -m benchmarks.memory --peer lucid --requests 100000

The worker is the process of the gateway's tree that spent the most CPU on the load. The load comes twice:
growth that the second does not repeat is warm-up (caches, pools), growth that it repeats is a leak.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import procfs
from benchmarks.children import BenchError, Children, free_port
from benchmarks.load import SCENARIOS, run_wrk, wrk_command
from benchmarks.peers import ALL
from benchmarks.peers.base import missing
from benchmarks.run import check
from benchmarks.stage import Stage, choose_cores, set_stage

CONNECTIONS = 64


def send(stage: Stage, port: int, wanted: int) -> int:
    """At least so many requests, each with a head of its own; wrk counts time, so in slices of a second."""
    sent = 0
    while sent < wanted:
        argv = wrk_command(
            port, SCENARIOS["varied"], stage.fields, core=stage.load_core, seconds=1, connections=CONNECTIONS
        )
        result, _ = run_wrk(argv, 1)
        if result.non_2xx or result.socket_errors or not result.requests:
            raise BenchError(
                f"{result.requests} answered, {result.non_2xx} errors, {result.socket_errors} broken"
            )
        sent += result.requests
    return sent


def measure(stage: Stage, peer_name: str, wanted: int) -> list[str]:
    """Rows of a Markdown table: worker and whole tree, before, after the first and after the second load."""
    peer, port = ALL[peer_name], free_port()
    gateway = peer.start(stage, port).gateway
    check(stage, peer, SCENARIOS["varied"], port)
    pids = procfs.tree(gateway.pid)
    idle_cpu = {pid: procfs.cpu_s([pid]) for pid in pids}
    states = [("before", {pid: procfs.memory_kb(pid) for pid in pids})]
    for _ in range(2):
        sent = send(stage, port, wanted)
        states.append((f"after {sent:,} more", {pid: procfs.memory_kb(pid) for pid in pids}))
    worker = max(pids, key=lambda pid: procfs.cpu_s([pid]) - idle_cpu[pid])
    rows = ["| | worker RSS MiB | worker PSS MiB | all processes PSS MiB |", "| --- | ---: | ---: | ---: |"]
    for name, kb in states:
        total = sum(each["pss"] for each in kb.values())
        figures = (kb[worker]["rss"], kb[worker]["pss"], total)
        rows.append(f"| {name} | {' | '.join(f'{figure / 1024:.1f}' for figure in figures)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0, or 2 when something is missing or does not work."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Memory of a worker under load."
    )
    parser.add_argument("--peer", default="lucid", choices=sorted(ALL))
    parser.add_argument("--requests", type=int, default=100_000)
    given = parser.parse_args(argv)
    if lacking := missing(ALL[given.peer]):
        print(f"skipped {given.peer}: missing {', '.join(lacking)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as name, Children(Path(name)) as children:
        try:
            stage = set_stage(Path(name), children, *choose_cores(os.sched_getaffinity(0)))
            print("\n".join(measure(stage, given.peer, given.requests)))
        except BenchError as error:
            print(f"FAILED {given.peer}: {error}\n{error.log}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
