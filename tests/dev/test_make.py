"""What sets a working copy up: the Makefile's stamp and `.ci/run`, with stand-ins for pip, make and Python."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.servers import ROOT

# The lines by which pip 23 tells these apart.
NO_WHEEL = "ERROR: No matching distribution found for secantusdb==0.7.0b3"
NO_NETWORK = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n" + NO_WHEEL
BAD_HASH = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
NO_OTHER_WHEEL = "ERROR: No matching distribution found for uvloop==0.22.1"


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


Make = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def make_dev(tmp_path: Path) -> Make:
    """Makes `.dev` with a pip that fails to install dev.txt with this message; empty: it installs it."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".python").touch()

    def make(message: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "message").write_text(message)
        pip = script(
            tmp_path / "pip",
            f'echo "$@" >> {tmp_path}/calls',
            f'case "$*" in *dev.txt) cat {tmp_path}/message >&2; [ ! -s {tmp_path}/message ];; esac',
        )
        command = ["make", f"VENV={venv}", f"LOCKED={pip}", "PIP=true", f"{venv}/.dev"]
        environment = {"PATH": os.environ["PATH"]}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return make


def test_the_stamp_says_that_the_embedded_servers_are_there(make_dev: Make, tmp_path: Path) -> None:
    assert make_dev("").returncode == 0
    assert (tmp_path / "venv" / ".dev").exists()
    assert (tmp_path / "calls").read_text() == "-r requirements/dev.txt\n"


def test_without_a_wheel_the_gateway_installs_and_the_next_make_tries_again(
    make_dev: Make, tmp_path: Path
) -> None:
    for attempt in (1, 2):
        result = make_dev(NO_WHEEL)
        assert result.returncode == 0, result.stderr
        assert "have no wheel for this platform" in result.stdout
        assert not (tmp_path / "venv" / ".dev").exists()
        assert (tmp_path / "calls").read_text().count("requirements/run.txt") == attempt
    assert make_dev("").returncode == 0
    assert (tmp_path / "venv" / ".dev").exists()


@pytest.mark.parametrize("message", [NO_NETWORK, BAD_HASH, NO_OTHER_WHEEL, "ERROR: no space left on device"])
def test_any_other_failure_is_one(make_dev: Make, tmp_path: Path, message: str) -> None:
    result = make_dev(message)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / "venv" / ".dev").exists()
    assert "run.txt" not in (tmp_path / "calls").read_text()


@pytest.fixture
def ci_run(tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Runs `.ci/run` as somebody who is not root, with nothing on the PATH but what lies in `bin`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "sed"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    script(programs / "id", "echo 1000")
    script(programs / "apt-get", f"touch {tmp_path}/apt")

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(programs / "bash"), str(ROOT / ".ci" / "run")],
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_ci_says_what_is_missing(
    ci_run: Callable[[], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    script(tmp_path / "bin" / "python3", "exit 1")
    result = ci_run()
    assert (result.returncode, result.stdout) == (1, "")
    missing = ("make", "ps (procps)", "ensurepip of python3 (python3-venv)")
    assert result.stderr.splitlines() == [f".ci/run: missing: {what}" for what in missing]
    assert not (tmp_path / "apt").exists()


def test_ci_names_its_python_and_runs_both(
    ci_run: Callable[[], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    script(tmp_path / "bin" / "python3", 'case "$2" in *version*) echo CPython 3.x;; esac')
    script(tmp_path / "bin" / "make", 'echo "made $2"')
    script(tmp_path / "bin" / "ps")
    result = ci_run()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["CPython 3.x", "made check", "made test"]
