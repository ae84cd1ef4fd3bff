"""The harness' own arithmetic: what wrk and /proc print, medians, the table; and that children end."""

import os
import sys
from pathlib import Path

import jwt
import pytest

from benchmarks import procfs, report, run, stage
from benchmarks.children import BenchError, Children, free_port
from benchmarks.load import PATH, SCENARIOS, head_fields, parse_wrk, wrk_command
from benchmarks.peers import ALL
from benchmarks.peers.base import Peer, Running, end_to_end, missing

WRK = """Running 2s test @ http://127.0.0.1:8080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.51ms  402.11us  10.20ms   82.64%
    Req/Sec    41.9k     1.2k    43.1k     73.68%
  Latency Distribution
     50%  950.00us
     75%    1.62ms
     90%    2.01ms
     99%    1.14s 
  83800 requests in 2.00s, 22.10MB read
Requests/sec:  41900.12
Transfer/sec:     11.05MB
"""  # noqa: W291 (wrk pads one-letter units to the width of two)


def test_wrk_report() -> None:
    result = parse_wrk(WRK)
    assert (result.requests, result.seconds, result.requests_per_s) == (83_800, 2.0, 41_900.12)
    assert (result.p50_ms, result.p99_ms) == pytest.approx((0.95, 1140.0))
    assert (result.non_2xx, result.socket_errors) == (0, 0)


def test_wrk_report_in_minutes() -> None:
    assert parse_wrk(WRK.replace("requests in 2.00s", "requests in 1.50m")).seconds == pytest.approx(90.0)


def test_wrk_errors_are_counted() -> None:
    errors = "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 17\n"
    result = parse_wrk(WRK.replace("Requests/sec", errors + "Requests/sec"))
    assert (result.non_2xx, result.socket_errors) == (17, 4321)


@pytest.mark.parametrize("lost", ["Requests/sec", "     99%", " requests in "])
def test_half_a_wrk_report_is_none(lost: str) -> None:
    with pytest.raises(ValueError, match="wrk printed no match"):
        parse_wrk(WRK.replace(lost, ""))


def test_wrk_command_pins_and_sends_the_same_head_in_every_scenario() -> None:
    fields = head_fields("token")
    assert len(fields) + 1 == 13  # with Host, which wrk adds
    for scenario in SCENARIOS.values():
        argv = wrk_command(8080, scenario, fields, core=1, seconds=5, connections=64)
        assert argv[:7] == ["taskset", "-c", "1", "wrk", "-t1", "-c64", "-d5s"]
        assert argv[-1] == f"http://127.0.0.1:8080{scenario.path}"
        assert [argv[i + 1] for i, word in enumerate(argv) if word == "-H"] == [
            f"{k}: {v}" for k, v in fields.items()
        ]
        scripts = [Path(argv[i + 1]) for i, word in enumerate(argv) if word == "-s"]
        assert all(script.is_file() for script in scripts)
        assert bool(scripts) == (scenario.script is not None)


def test_stat_line_with_a_name_made_to_confuse() -> None:
    line = "42 (a) b (c d) S 7 42 42 0 -1 4194304 101 0 1 0 120 30 0 0 20 0 1 0 45070 3133440 386"
    assert procfs.parse_stat(line) == (7, 150)


def test_core_ticks_leave_out_idle_iowait_steal_and_guest() -> None:
    text = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 100 100 8 16 100 100 100\ncpu1 1 0 0 0 0 0 0 0 0 0\nintr 5\n"
    assert procfs.parse_core_ticks(text, 0) == 31
    assert procfs.parse_core_ticks(text, 1) == 1
    with pytest.raises(ValueError, match="no core 2"):
        procfs.parse_core_ticks(text, 2)


def test_listeners_are_of_that_port_and_in_state_listen() -> None:
    text = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1\n"
        "   1: 0100007F:1F90 0100007F:C000 01 00000000:00000000 00:00000000 00000000     0        0 222 1\n"
        "   2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1\n"
    )
    assert procfs.parse_listeners(text, 8080) == {"111"}


def test_cpu_model() -> None:
    assert report.parse_cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n") == "AMD EPYC"
    assert report.parse_cpu_model("processor\t: 0\n")


def one_round(
    peer: str, rate: float, *, foreign: float = 0.0, mib: float = 0.0, p99_ms: float = 3.0
) -> report.Round:
    return report.Round("get65", peer, 0, 1000, rate, 1.5, p99_ms, 1e6 / rate, 0.0, 99.0, foreign, mib)


def test_rows_are_medians_of_each_figure() -> None:
    rows = report.summarise(
        [
            one_round("lucid", 100.0, p99_ms=1.0),
            one_round("envoy", 50.0),
            one_round("lucid", 400.0, p99_ms=9.0),
            one_round("lucid", 200.0, p99_ms=2.0),
        ]
    )
    assert [(row.peer, row.rounds, row.requests_per_s) for row in rows] == [
        ("lucid", 3, 200.0),
        ("envoy", 1, 50.0),
    ]
    assert rows[0].p99_ms == 2.0
    assert rows[0].spread_percent == pytest.approx(150.0)
    assert rows[0].cpu_us == pytest.approx(5000.0)


def test_table_is_sorted_and_has_ratios_to_the_yardsticks_that_ran() -> None:
    rows = report.summarise(
        [one_round("envoy", 20_000.0), one_round("lucid", 40_000.0), one_round("nginx", 50_000.0)]
    )
    lines = report.table(rows, {"lucid": "**Lucid**"}).splitlines()
    assert lines[0] == (
        "| gateway | requests/s | spread | p50 ms | p99 ms | CPU µs/request | core | × Envoy | × nginx |"
    )
    assert lines[2] == "| nginx | 50,000 | 0 % | 1.50 | 3.00 | 20.0 | 99 % | 2.50 | 1.00 |"
    assert lines[3] == "| **Lucid** | 40,000 | 0 % | 1.50 | 3.00 | 25.0 | 99 % | 2.00 | 0.80 |"
    assert len({line.count("|") for line in lines}) == 1


def test_table_shows_throughput_where_bodies_were_moved() -> None:
    lines = report.table(report.summarise([one_round("nginx", 800.0, mib=800.0)]), {}).splitlines()
    assert lines[0].startswith("| gateway | requests/s | MiB/s | spread |")
    assert lines[2].startswith("| nginx | 800 | 800 | 0 % |")


def test_a_disturbed_row_is_named() -> None:
    rows = report.summarise([one_round("envoy", 1.0, foreign=4.0), one_round("nginx", 1.0, foreign=40.0)])
    assert report.warnings(rows) == ["nginx: other processes took 40 % of a core; not a figure to publish"]


def test_cores() -> None:
    assert stage.choose_cores({3, 1, 2}) == (1, 2)
    assert stage.choose_cores({5}) == (5, 5)


def test_token_has_the_claims_of_an_access_token() -> None:
    token = stage.mint_token("k" * 64, 1_000_000_000)
    claims = jwt.decode(
        token, "k" * 64, ["HS256"], options={"verify_exp": False}, audience="lucid", issuer="lucid"
    )
    assert set(claims) == {"sub", "role", "sid", "jti", "iat", "exp", "iss", "aud", "typ"}
    assert (claims["typ"], claims["role"]) == ("access", "user")


def test_backend_body_is_65_bytes() -> None:
    assert len(stage.BODY_65) == 65


def test_end_to_end_drops_hop_by_hop_fields() -> None:
    fields = [("Connection", "keep-alive"), ("Content-Length", "3"), ("Accept", "a"), ("Accept", "b")]
    assert end_to_end(fields) == [("Accept", "a"), ("Accept", "b")]


def test_options() -> None:
    options = run.parse_options(["--peers", "nginx,envoy", "--scenario", "all", "--rounds", "2"])
    assert [peer.name for peer in options.peers] == ["nginx", "envoy"]
    assert [scenario.name for scenario in options.scenarios] == list(SCENARIOS)
    assert (options.rounds, options.seconds, options.connections) == (2, 5, 64)


@pytest.mark.parametrize("argv", [["--peers", "nobody"], ["--scenario", "get66"], ["--rounds", "0"]])
def test_wrong_options(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.parse_options(argv)
    assert end.value.code == 2


def test_what_a_peer_lacks_is_named() -> None:
    def start(_stage: stage.Stage, _port: int) -> Running:
        raise AssertionError

    peer = Peer(
        "x",
        "x",
        start,
        programs=("no-such-program",),
        packages=("no-such-package", "msgspec"),
        modules=("x.py",),
    )
    assert missing(peer) == ["no-such-program", "no-such-package", "x.py"]
    assert set(ALL) == {"lucid", "nginx", "envoy", "sanic_hello", "fastapi_aiohttp", "sanic_httpx"}
    assert PATH.startswith("/api/v1/chain/")


# A parent that ignores SIGTERM's effect on its child: the grandchild must not outlive the bench.
LISTENER = """
import socket, subprocess, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
child.wait()
"""


def test_children_are_pinned_found_by_their_port_and_end_with_their_own_children(tmp_path: Path) -> None:
    port, core = free_port(), min(os.sched_getaffinity(0))
    with Children(tmp_path) as children:
        child = children.start("listener", [sys.executable, "-c", LISTENER, str(port)], core=core, port=port)
        assert os.sched_getaffinity(child.pid) == {core}
        assert not procfs.owns_port([os.getpid()], port)
        pids = procfs.tree(child.pid)
        while len(pids) < 2:
            pids = procfs.tree(child.pid)
        assert procfs.memory_kb(child.pid)["pss"] > 0
    assert child.process.returncode is not None
    assert [pid for pid in pids if _alive(pid)] == []


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def test_a_child_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with Children(tmp_path) as children, pytest.raises(BenchError, match="mute ended with 3") as error:
        children.start(
            "mute",
            [sys.executable, "-c", "import sys; print('no config'); sys.exit(3)"],
            core=min(os.sched_getaffinity(0)),
            port=free_port(),
        )
    assert error.value.log == "no config"


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with Children(tmp_path) as children, pytest.raises(BenchError, match="ghost cannot be started"):
        children.start("ghost", ["no-such-program"], core=min(os.sched_getaffinity(0)))
