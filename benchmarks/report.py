"""From rounds to a table: medians, ratios, the environment they were measured in."""

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.peers.base import Peer, package_version
from benchmarks.stage import find_program

RATIO_TO = {"envoy": "× Envoy", "nginx": "× nginx", "fastapi_aiohttp": "× FastAPI"}
DISTURBED_PERCENT = 5.0


class Round(msgspec.Struct, frozen=True):
    """One peer under one load. `cpu_us`: of the gateway's process tree, user and system, per request.

    `gateway_core_percent` below 90 says that the load, not the gateway, was the limit. `foreign_percent` is
    what processes of others took of the more disturbed core. `stores_cpu_us`: Redis and MongoDB, per request.
    """

    scenario: str
    peer: str
    number: int
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    stores_cpu_us: float
    gateway_core_percent: float
    foreign_percent: float
    mib_per_s: float = 0.0


class Row(msgspec.Struct, frozen=True):
    """Medians over the rounds of one peer; `spread_percent` is (highest - lowest) / median of requests/s."""

    peer: str
    rounds: int
    requests_per_s: float
    spread_percent: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    gateway_core_percent: float
    foreign_percent: float
    mib_per_s: float


class Environment(msgspec.Struct, frozen=True):
    cpu: str
    cores: int
    gateway_core: int
    load_core: int
    kernel: str
    python: str
    versions: dict[str, str]


class Report(msgspec.Struct, frozen=True):
    """What `--out` keeps."""

    environment: Environment
    seconds: int
    connections: int
    rounds: list[Round]
    skipped: dict[str, str]
    failed: dict[str, str]


def summarise(rounds: Sequence[Round]) -> list[Row]:
    """One row per peer of one scenario, each figure its own median, in the order of first appearance."""
    by_peer: dict[str, list[Round]] = {}
    for each in rounds:
        by_peer.setdefault(each.peer, []).append(each)
    return [_row(peer, own) for peer, own in by_peer.items()]


def _row(peer: str, own: Sequence[Round]) -> Row:
    rates = [each.requests_per_s for each in own]
    rate = statistics.median(rates)
    return Row(
        peer=peer,
        rounds=len(own),
        requests_per_s=rate,
        spread_percent=100 * (max(rates) - min(rates)) / rate if rate else 0.0,
        p50_ms=statistics.median(each.p50_ms for each in own),
        p99_ms=statistics.median(each.p99_ms for each in own),
        cpu_us=statistics.median(each.cpu_us for each in own),
        gateway_core_percent=statistics.median(each.gateway_core_percent for each in own),
        foreign_percent=statistics.median(each.foreign_percent for each in own),
        mib_per_s=statistics.median(each.mib_per_s for each in own),
    )


def table(rows: Iterable[Row], titles: Mapping[str, str]) -> str:
    """A Markdown table, fastest first, with the ratio of requests/s to each yardstick that ran."""
    ordered = sorted(rows, key=lambda row: row.requests_per_s, reverse=True)
    rates = {row.peer: row.requests_per_s for row in ordered}
    yardsticks = {peer: label for peer, label in RATIO_TO.items() if rates.get(peer)}
    bodies = any(row.mib_per_s for row in ordered)
    head = [
        "gateway",
        "requests/s",
        *(["MiB/s"] if bodies else []),
        "spread",
        "p50 ms",
        "p99 ms",
        "CPU µs/request",
    ]
    head += ["core", *yardsticks.values()]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in ordered:
        cells = [titles.get(row.peer, row.peer), f"{row.requests_per_s:,.0f}"]
        cells += [f"{row.mib_per_s:,.0f}"] if bodies else []
        cells += [
            f"{row.spread_percent:.0f} %",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.cpu_us:.1f}",
        ]
        cells += [f"{row.gateway_core_percent:.0f} %"]
        cells += [f"{row.requests_per_s / rates[peer]:.2f}" for peer in yardsticks]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def warnings(rows: Iterable[Row]) -> list[str]:
    return [
        f"{row.peer}: other processes took {row.foreign_percent:.0f} % of a core; not a figure to publish"
        for row in rows
        if row.foreign_percent > DISTURBED_PERCENT
    ]


def parse_cpu_model(text: str) -> str:
    """The model's name from `/proc/cpuinfo`; ARM kernels print none."""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def environment(peers: Iterable[Peer], gateway_core: int, load_core: int) -> Environment:
    """What a reader needs to judge the figures; no host's name, no paths."""
    versions = {name: _program_version(name) for name in ("wrk", "nginx")}
    for peer in peers:
        versions |= {name: found for name in peer.packages if (found := package_version(name))}
    return Environment(
        cpu=parse_cpu_model(Path("/proc/cpuinfo").read_text()),
        cores=os.cpu_count() or 1,
        gateway_core=gateway_core,
        load_core=load_core,
        kernel=platform.release(),
        python=platform.python_version(),
        versions=versions,
    )


def _program_version(name: str) -> str:
    program = find_program(name)
    if program is None:
        return "missing"
    done = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
    match = re.search(r"\d+\.\d+[\w.\-+]*", done.stdout + done.stderr)
    return match[0] if match else "unknown"
