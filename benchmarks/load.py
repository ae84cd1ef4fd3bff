"""The load: scenarios, the head that every request carries, wrk's command line and what it prints."""

import http.client
import re
import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.children import BenchError

PATH = "/api/v1/chain/blocks/latest"
MIB = 1024 * 1024
LUA = Path(__file__).parent / "lua"


class Scenario(msgspec.Struct, frozen=True):
    """`check_path` is asked for before and after the load; `mib` is what one request moves, for MB/s."""

    name: str
    path: str = PATH
    check_path: str = PATH
    method: str = "GET"
    script: str | None = None
    mib: int = 0


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("get65"),
        Scenario(
            "varied", path="/api/v1/chain/blocks", check_path="/api/v1/chain/blocks/7", script="varied.lua"
        ),
        Scenario("upload", method="POST", script="upload.lua", mib=1),
        Scenario("download", path="/api/v1/chain/blob", check_path="/api/v1/chain/blob", mib=1),
    )
}


def head_fields(token: str) -> dict[str, str]:
    """What a browser's script sends: 13 fields with Host, about 900 bytes of head with the token."""
    return {
        "Authorization": f"Bearer {token}",
        "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        "Accept": "application/json, text/plain;q=0.9",
        "Accept-Language": "en-GB,en;q=0.8,de;q=0.5",
        "Accept-Encoding": "gzip, deflate, br",
        "Referer": "https://desk.lucid.example/explorer/blocks",
        "Sec-Fetch-Dest": "empty",
        "Sec-Fetch-Mode": "cors",
        "Sec-Fetch-Site": "same-site",
        "DNT": "1",
        "Cache-Control": "no-cache",
        "Priority": "u=4",
    }


class Answer(msgspec.Struct, frozen=True):
    status: int
    fields: dict[str, str]
    body: bytes


def ask(port: int, scenario: Scenario, fields: Mapping[str, str]) -> Answer:
    """One request of a scenario on a connection of its own. Raises BenchError when no answer comes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = b"x" * MIB if scenario.method == "POST" else None
    try:
        connection.request(scenario.method, scenario.check_path, body, dict(fields))
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no answer to {scenario.method} {scenario.check_path}: {error!r}") from error
    finally:
        connection.close()


class WrkResult(msgspec.Struct, frozen=True):
    requests: int
    seconds: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    non_2xx: int
    socket_errors: int


_UNIT_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0, "h": 3_600_000.0}
_UNIT_S = {unit: factor / 1000 for unit, factor in _UNIT_MS.items()}


def parse_wrk(text: str) -> WrkResult:
    """Read the report of `wrk --latency` 4.x. Raises ValueError when a figure is missing."""

    def found(pattern: str) -> re.Match[str]:
        match = re.search(pattern, text, re.MULTILINE)
        if match is None:
            raise ValueError(f"wrk printed no match for {pattern!r}")
        return match

    def percentile_ms(name: str) -> float:
        match = found(rf"^\s+{name}%\s+([\d.]+)(us|ms|s|m|h)\s*$")
        return float(match[1]) * _UNIT_MS[match[2]]

    total = found(r"^\s+(\d+) requests in ([\d.]+)(us|ms|s|m|h), ")
    refused = re.search(r"^\s+Non-2xx or 3xx responses: (\d+)$", text, re.MULTILINE)
    errors = re.search(
        r"^\s+Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)$", text, re.MULTILINE
    )
    return WrkResult(
        requests=int(total[1]),
        seconds=float(total[2]) * _UNIT_S[total[3]],
        requests_per_s=float(found(r"^Requests/sec:\s+([\d.]+)$")[1]),
        p50_ms=percentile_ms("50"),
        p99_ms=percentile_ms("99"),
        non_2xx=int(refused[1]) if refused else 0,
        socket_errors=sum(map(int, errors.groups())) if errors else 0,
    )


def wrk_command(
    port: int, scenario: Scenario, fields: Mapping[str, str], *, core: int, seconds: int, connections: int
) -> list[str]:
    argv = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    # 10 s: an answer that comes late is a slow answer, not an error (wrk's own default is 2 s).
    argv += ["--timeout", "10s"]
    for name, value in fields.items():
        argv += ["-H", f"{name}: {value}"]
    if scenario.script:
        argv += ["-s", str(LUA / scenario.script)]
    return [*argv, f"http://127.0.0.1:{port}{scenario.path}"]


def run_wrk(argv: list[str], seconds: int) -> tuple[WrkResult, float]:
    """Run wrk; what it printed and the CPU seconds that it used itself. Raises BenchError when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 30, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise BenchError(f"wrk ended with {done.returncode}", done.stderr or done.stdout)
    try:
        result = parse_wrk(done.stdout)
    except ValueError as error:
        raise BenchError(str(error), done.stdout) from error
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
