"""`lucid dev` as people start it: everything comes up, works, is stopped by Ctrl-C and found again."""

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lucid.dev import command
from lucid.dev.embedded import LOOPBACK, free_port
from tests.support.servers import alive, children, clean_environment, until


class Dev(subprocess.Popen[bytes]):
    """`lucid dev` in a folder."""

    def __init__(self, folder: Path, log: Path, *arguments: str) -> None:
        self.file = log
        with log.open("wb") as opened:
            command = [sys.executable, "-m", "lucid", "dev", *arguments]
            super().__init__(command, cwd=folder, env=clean_environment(), stdout=opened, stderr=opened)

    @property
    def log(self) -> str:
        return self.file.read_text()

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.poll() is None, self.log
            return "Ctrl-C stops all of it" in self.log

        until(is_ready, 60.0, "lucid dev is ready")

    def family(self) -> list[int]:
        """Its children and theirs."""
        return [pid for child in children(self.pid) for pid in (child, *children(child))]


Start = Callable[..., Dev]


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Start]:
    """Starts `lucid dev` in an empty folder."""
    started: list[Dev] = []

    def start(*arguments: str) -> Dev:
        started.append(Dev(tmp_path, tmp_path / f"{len(started)}.log", *arguments))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(30.0)


def fetch(url: str, token: str, body: bytes | None = None, method: str = "GET") -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"authorization": f"Bearer {token}"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10.0) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_from_nothing_to_an_answer_and_back_again(dev: Start, tmp_path: Path) -> None:
    port = free_port()
    process = dev("--port", str(port), "--workers", "2")
    process.wait_until_ready()
    text = process.log
    url = f"http://{LOOPBACK}:{port}"
    assert f"Lucid is ready on {url}" in text

    # The request that it prints works as it is printed.
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith("curl "))
    words = shlex.split(line)
    target, token_command = words[-1], re.search(r"\$\((.*)\)", line)
    assert token_command is not None
    tokenise = shlex.split(token_command[1])
    tokenise[:1] = [sys.executable, "-m", "lucid"] if tokenise[0].endswith("lucid") else tokenise[:1]
    token = subprocess.run(
        tokenise, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout.strip()
    status, body = fetch(target, token)
    assert (status, json.loads(body)["chain"]) == (200, "lucid_blocks")

    # The clusters are there, and the stores are kept.
    assert fetch(f"{url}/api/v1/sessions/recording-1/chunks/0", token, b"chunk", "PUT")[0] == 200
    assert fetch(f"{url}/api/v1/sessions/recording-1/chunks/0", token) == (200, b"chunk")
    assert fetch(f"{url}/api/v1/nodes", token)[0] == 200
    data = tmp_path / ".lucid"
    assert stat.S_IMODE((data / "jwt_secret").stat().st_mode) == 0o600
    assert _set_in_redis(text, "SET kept 1") == b"+OK\r\n"

    everything = process.family()
    assert len(everything) >= 5
    process.send_signal(signal.SIGINT)
    assert process.wait(30.0) == 0, process.log
    until(lambda: not any(map(alive, everything)), 5.0, "nothing is left behind")
    assert "Traceback" not in process.log

    # A second start finds the data of the first and accepts its token.
    process = dev("--port", str(port), "--no-demo")
    process.wait_until_ready()
    assert _set_in_redis(process.log, "INCR kept") == b":2\r\n"
    assert fetch(f"{url}/api/v1/auth/status", token)[0] == 200

    # Nobody starts on the same data, nor on the same port.
    second = dev("--port", str(free_port()))
    assert second.wait(30.0) == 1
    assert second.log == "lucid: another lucid dev uses .lucid; give --data another folder\n"
    third = dev("--port", str(port), "--data", "other")
    assert third.wait(30.0) == 1
    assert third.log == f"lucid: cannot listen on HOST 127.0.0.1, PORT {port}: Address already in use\n"

    # Killed without a chance to clean up, it takes everything along.
    everything = process.family()
    process.kill()
    process.wait()
    if sys.platform == "linux":
        until(lambda: not any(map(alive, everything)), 10.0, "nothing is left behind")


def _set_in_redis(text: str, line: str) -> bytes:
    port = re.search(r"redis://127\.0\.0\.1:(\d+)", text)
    assert port is not None
    with socket.create_connection((LOOPBACK, int(port[1])), 5.0) as connection:
        connection.sendall(f"{line}\r\n".encode())
        return connection.recv(100)


def test_ctrl_c_while_it_starts_leaves_nothing_behind(dev: Start) -> None:
    process = dev("--port", str(free_port()))
    until(lambda: children(process.pid), 20.0, "the first server")
    seen = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(30.0) in (0, 130)
    until(lambda: not any(map(alive, seen)), 10.0)
    assert "Traceback" not in process.log


def test_a_key_of_the_environment_goes_before_the_kept_one(tmp_path: Path) -> None:
    made = command.with_kept_secret({}, tmp_path, make=True)
    assert command.with_kept_secret({}, tmp_path, make=True) == made
    assert len(made["JWT_SECRET_KEY"]) >= 32
    assert command.with_kept_secret({}, tmp_path, make=False) == made
    assert command.with_kept_secret({"JWT_SECRET_KEY": "x"}, tmp_path, make=True) == {"JWT_SECRET_KEY": "x"}
    asymmetric = {"JWT_ALGORITHM": "EdDSA"}
    assert command.with_kept_secret(asymmetric, tmp_path, make=True) == asymmetric
    assert command.with_kept_secret({}, tmp_path / "empty", make=False) == {}


def test_the_metrics_port_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        usual = taken.getsockname()[1]
        monkeypatch.setattr(command, "_METRICS_PORT", usual)
        found = command._metrics_port("8080")
        assert found not in (usual, 8080)
    monkeypatch.setattr(command, "_METRICS_PORT", free := free_port())
    assert command._metrics_port("8080") == free
    assert command._metrics_port(str(free)) != free


def test_the_first_request_names_a_program_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    assert command._own_name() == f"{scripts / 'python'} -m lucid"
    (scripts / "lucid").touch(mode=0o755)
    assert command._own_name() == ".venv/bin/lucid"
    monkeypatch.setenv("PATH", str(scripts))
    assert command._own_name() == "lucid"
