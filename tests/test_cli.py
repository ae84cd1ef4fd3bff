"""The `lucid` command: what it prints, and that every fault is one line with the right status."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from lucid import __version__, probe
from lucid.cli import main
from lucid.core.exchange import Principal, Role
from lucid.core.security.jwt import TokenVerifier
from lucid.dev.embedded import LOOPBACK, Secantus, Valkey, free_port
from lucid.settings import TokenSettings
from tests.support.servers import SECRET, Backend, clean_environment

Run = Callable[..., tuple[int, str, str]]
COMMANDS = [("serve",), ("dev",), ("check",), ("routes",), ("token", "--user", "a"), ("openapi",)]


@pytest.fixture
def lucid(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in this process with nothing but the given variables: status, output, complaints."""

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        monkeypatch.setattr(os, "environ", dict(environ))
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    monkeypatch.chdir(tmp_path)
    return run


def call(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command as a process of its own."""
    command = [sys.executable, "-m", "lucid", *arguments]
    environment = clean_environment(**(env or {}))
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("serve", "--port", "1"),
        ("dev", "--port", "0"),
        ("dev", "--port", "x"),
        ("dev", "--workers", "0"),
        ("dev", "--hos", "x"),
        ("check", "now"),
        ("token",),
        ("token", "--user", "a", "--role", "root"),
        ("token", "--user", "a", "--minutes", "0"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(lucid: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = lucid(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"lucid.*\(see lucid.* --help\)\n", err)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_wrong_settings_are_a_line_each_and_status_2_from_every_command(
    lucid: Run, arguments: tuple[str, ...]
) -> None:
    status, out, err = lucid(*arguments, JWT_SECRET_KEY="s" * 32, RATE_LIMIT_PUBLIC="none", LUCID_X="1")
    assert (status, out) == (2, "")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["RATE_LIMIT_PUBLIC", "LUCID_X"]


def test_no_traceback_reaches_the_terminal(tmp_path: Path) -> None:
    result = call("serve", cwd=tmp_path, env={"PORT": "nowhere"})
    assert (result.returncode, result.stdout) == (2, "")
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["PORT", "JWT_SECRET_KEY"]


def test_help_and_version(lucid: Run) -> None:
    assert lucid("--version") == (0, f"lucid {__version__}\n", "")
    status, out, _ = lucid("--help")
    assert status == 0
    for command in ("serve", "dev", "check", "routes", "token", "openapi"):
        assert f"    {command} " in out
        assert lucid(command, "--help")[0] == 0


def test_routes_prints_the_table_as_it_would_run(lucid: Run, tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text('[[routes]]\npath = "/x"\nbackend = "nodes"\nmethods = ["GET"]\naccess = "admin"\n')
    status, out, err = lucid("routes", GATEWAY_CONFIG=str(file), RATE_LIMIT_CHAIN="7")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["path", "methods", "access", "backend", "max", "body", "limits", "options"]
    assert ["/api/v1/chain/**", "all", "user", "blockchain"] in [row[:4] for row in rows]
    assert "chain 7/60s per user" in out
    assert rows[-1][:4] == ["/x", "GET", "admin", "nodes"]


def test_routes_prints_a_row_for_whatever_the_gateway_answers_itself(lucid: Run, tmp_path: Path) -> None:
    _, out, _ = lucid("routes")
    rows = [line.split() for line in out.splitlines()[1:]]
    printed: dict[str, str] = {}
    for path, methods, _, backend, *_ in rows:
        if backend == "gateway":
            # The methods of one path may be in several rows, each with its own access.
            printed[path] = ",".join(sorted({*methods.split(","), *filter(None, [printed.get(path)])}))
    answered = json.loads(call("openapi", cwd=tmp_path).stdout)["paths"]
    assert printed == {
        re.sub(r"\{[^}]*\}", "*", path): ",".join(sorted(map(str.upper, operations)))
        for path, operations in answered.items()
    }
    assert "login 10/60s per address" in out


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lucid routes | true"
    result = subprocess.run(
        command,
        shell=True,
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""


# --- token ----------------------------------------------------------------------------------------


def verify(token: str, settings: TokenSettings) -> Principal:
    principal = TokenVerifier(settings).verify(token)
    assert isinstance(principal, Principal)
    return principal


def test_token_prints_the_token_alone(lucid: Run) -> None:
    status, out, err = lucid("token", "--user", "u-1", JWT_SECRET_KEY=SECRET)
    assert (status, err) == (0, "")
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", out)
    principal = verify(out.strip(), TokenSettings(secret_key=SECRET))
    assert (principal.user_id, principal.role) == ("u-1", Role.USER)
    assert principal.expires_at - principal.issued_at == pytest.approx(900, abs=1)


def test_token_takes_a_role_and_a_life(lucid: Run) -> None:
    arguments = ("token", "--user", "u", "--role", "super_admin", "--minutes", "2")
    _, out, _ = lucid(*arguments, JWT_SECRET_KEY=SECRET, JWT_ISSUER="me")
    principal = verify(out.strip(), TokenSettings(secret_key=SECRET, issuer="me"))
    assert principal.role is Role.SUPER_ADMIN
    assert principal.expires_at - time.time() == pytest.approx(120, abs=5)


def test_token_uses_the_key_of_lucid_dev_when_the_environment_names_none(lucid: Run, tmp_path: Path) -> None:
    data = tmp_path / ".lucid"
    data.mkdir()
    (data / "jwt_secret").write_text("d" * 40)
    _, out, _ = lucid("token", "--user", "u")
    assert verify(out.strip(), TokenSettings(secret_key="d" * 40)).user_id == "u"
    _, out, _ = lucid("token", "--user", "u", JWT_SECRET_KEY=SECRET)
    assert verify(out.strip(), TokenSettings(secret_key=SECRET)).user_id == "u"
    data.rename(tmp_path / "elsewhere")
    assert lucid("token", "--user", "u")[0] == 2
    assert lucid("token", "--user", "u", "--data", str(tmp_path / "elsewhere"))[0] == 0


def test_a_key_that_only_verifies_makes_no_token(lucid: Run) -> None:
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    text = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    status, out, err = lucid("token", "--user", "u", JWT_ALGORITHM="EdDSA", JWT_PUBLIC_KEY=text.decode())
    assert (status, out) == (2, "")
    assert err.startswith("JWT_PRIVATE_KEY: must be set to issue tokens")


@pytest.mark.parametrize("user", ["", "a b", "ü", "x" * 129])
def test_a_user_that_cannot_be_one(lucid: Run, user: str) -> None:
    status, out, err = lucid("token", "--user", user, JWT_SECRET_KEY=SECRET)
    assert (status, out) == (2, "")
    assert "--user" in err
    assert err.count("\n") == 1


# --- check ----------------------------------------------------------------------------------------


def test_check_passes_when_everything_answers(
    lucid: Run, valkey: Valkey, secantus: Secantus, backend: Backend, tmp_path: Path
) -> None:
    file = tmp_path / "g.toml"
    file.write_text(
        '[backends.nodes.health]\npath = "/alive"\n[backends.more]\nendpoints = ["' + backend.url + '"]'
    )
    clusters = dict.fromkeys(
        ("BLOCKCHAIN_SERVICE_URL", "SESSION_SERVICE_URL", "NODE_SERVICE_URL"), backend.url
    )
    stores = {"REDIS_URI": valkey.uri, "MONGODB_URI": secantus.uri}
    status, out, err = lucid("check", JWT_SECRET_KEY=SECRET, GATEWAY_CONFIG=str(file), **stores, **clusters)
    assert (status, err) == (0, "")
    assert SECRET not in out
    assert out.count(": answers") == 6
    assert "/api/v1/chain/**" in out
    # `more` has no path to ask for: that its port is open must do.
    assert sorted(received.target for received in backend.received) == ["/alive", "/health", "/health"]


def test_check_has_a_line_for_each_dependency_that_does_not_answer(lucid: Run, backend: Backend) -> None:
    backend.kill()
    nobody = f"http://{LOOPBACK}:{free_port()}"
    began = time.monotonic()
    status, out, err = lucid(
        "check",
        JWT_SECRET_KEY=SECRET,
        REDIS_URI=f"redis://u:hush@{LOOPBACK}:{free_port()}/0",
        MONGODB_URI=f"mongodb://u:hush@{LOOPBACK}:{free_port()}/x",
        BLOCKCHAIN_SERVICE_URL=nobody,
        SESSION_SERVICE_URL=nobody,
        NODE_SERVICE_URL=f"{nobody},{backend.url}",
    )
    assert status == 1
    assert time.monotonic() - began < 10.0
    assert "hush" not in out + err
    labels = [re.split(r" |:", line)[0] for line in err.splitlines()]
    assert sorted(labels) == sorted(["MongoDB", "Redis", *["backend"] * 4])


def test_check_asks_backends_itself_whatever_proxy_the_environment_names(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{LOOPBACK}:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert asyncio.run(probe._attempt(probe._get_try(f"{backend.url}/health"))) == ""
    assert [received.target for received in backend.received] == ["/health"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_this_version_does_not_do_is_refused_by_every_command(
    lucid: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[[routes]]\npath = "/api/v1/live/**"\nbackend = "nodes"\nwebsocket = true\n')
    status, out, err = lucid(
        *command,
        JWT_SECRET_KEY=SECRET,
        GATEWAY_CONFIG=str(file),
    )
    assert (status, out) == (2, "")
    assert re.fullmatch(r"GATEWAY_CONFIG: .* must .* not served by this version yet\n", err)


# --- openapi --------------------------------------------------------------------------------------


def test_openapi_prints_a_document_without_a_key_and_without_a_store(tmp_path: Path) -> None:
    result = call("openapi", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__
    assert "get" in document["paths"]["/health"]
    assert "post" in document["paths"]["/api/v1/auth/login"]
    names = re.compile(r"\{(\w+)\}")
    for path, operations in document["paths"].items():
        assert "<" not in path
        for operation in operations.values():
            parameters = operation.get("parameters", ())
            declared = {parameter["name"] for parameter in parameters if parameter["in"] == "path"}
            assert declared == set(names.findall(path))
    assert msgspec.json.encode(document)
