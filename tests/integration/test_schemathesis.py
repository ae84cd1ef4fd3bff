"""Every operation of the document against a running gateway, by schemathesis: whatever the document permits must be
taken, whatever it forbids refused, and every answer be one that it tells of.

Which operations there are the document says: a new one is tested the day it is declared, and one that never succeeded
fails the test. A usual run is short and always the same; `FUZZ_EXAMPLES` sets the examples of each operation, and
every role then goes through all phases, each time with another seed.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from lucid.core.exchange import ROLES
from lucid.dev.embedded import Secantus, Valkey, free_port
from tests.integration.conftest import Caller, clusters
from tests.support.servers import SECRET, Backend, GatewayProcess, clean_environment, own_redis

pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
USUAL_EXAMPLES = 4
USUAL_PHASES = {"admin": "examples,coverage", "user": "examples,fuzzing,stateful", "": "examples,fuzzing"}
ALL_PHASES = "examples,coverage,fuzzing,stateful"
LONGEST_SECONDS = 300 + 30 * EXAMPLES
PASSWORD = "correct horse battery staple"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "unsupported_method",
    "allow_header_conformance",
    "missing_required_header",
    "ignored_auth",
    "use_after_free",
    "ensure_resource_availability",
)


@pytest.fixture(scope="module")
def door(
    valkey: Valkey, secantus: Secantus, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway whose limits are out of the way: a 429 tells nothing of what is behind it."""
    folder = tmp_path_factory.mktemp("gateway")
    limits = ("PUBLIC", "AUTHENTICATED", "ADMIN", "LOGIN", "REFRESH", "CHAIN")
    environment = {
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "METRICS_PORT": str(free_port()),
        "WORKERS": "1",
        "JWT_SECRET_KEY": SECRET,
        "LOG_FORMAT": "text",
        "REDIS_URI": own_redis(valkey),
        "MONGODB_URI": secantus.in_database(folder.name),
        **{f"RATE_LIMIT_{name}": "1000000" for name in limits},
        **clusters(backend),
    }
    process = GatewayProcess(clean_environment(**environment), folder, ("lucid", "serve"))
    process.wait_until_ready()
    yield process
    assert process.stop() == 0
    _, trace, rest = process.log.partition("Traceback")
    assert not trace, rest[:4_000]


def plan_of(door: GatewayProcess, role: str, log: Path) -> dict[str, Any]:
    """What tests/support/openapi_formats.py is to do: who calls, and what is there to be named."""
    caller = Caller(door)
    user_id = caller.login()["user"]["user_id"]
    others = [Caller(door).login() for _ in range(8)]
    made = [caller.http.post("/api/v1/sessions", json={}, headers=caller.bearer) for _ in range(4)]
    keys = [
        caller.http.post("/api/v1/users/me/api-keys", json={"name": f"key {number}"}, headers=caller.bearer)
        for number in range(4)
    ]
    account = {"email": f"{uuid.uuid4()}@example.org", "password": PASSWORD}
    registered = caller.http.post("/api/v1/users", json=account)
    assert {answer.status_code for answer in (*made, *keys, registered)} == {201}
    return {
        "secret": SECRET,
        "log": str(log),
        "role": role,
        "user_id": user_id,
        "spare_users": [told["user"]["user_id"] for told in others],
        "parameters": {
            "user_id": ["me", *(told["user"]["user_id"] for told in others[:2])],
            "session_id": [answer.json()["session_id"] for answer in made],
            "key_id": [answer.json()["key_id"] for answer in keys],
            "name": ["authenticated"],
            "identifier": [user_id],
        },
        "bodies": {
            "auth.login": [account],
            "auth.refresh": [{"refresh_token": told["refresh_token"]} for told in others],
            "sessions.update": [{"metadata": {"note": "changed"}}],
            "users.register": [{"email": f"{uuid.uuid4()}@example.org", "password": PASSWORD}],
            "users.update": [{"email": f"{uuid.uuid4()}@example.org"}],
        },
    }


def unreached(door: GatewayProcess, role: str, log: str) -> set[str]:
    """The operations that the role may call and never saw a success of."""
    document = httpx.get(f"{door.url}/openapi.json", trust_env=False).json()
    rank = {"public": 0, **ROLES}
    permitted = {
        operation["operationId"]
        for path, item in document["paths"].items()
        for operation in item.values()
        # Schemathesis itself reads the document and asks no more of it.
        if path != "/openapi.json" and rank[operation["x-lucid-access"]] <= rank[role or "public"]
    }
    return permitted - {line.split()[0] for line in log.splitlines() if line.split()[1].startswith("2")}


@pytest.mark.parametrize("role", ["admin", "user", ""], ids=["admin", "user", "nobody"])
def test_the_gateway_does_what_its_document_says(door: GatewayProcess, role: str, tmp_path: Path) -> None:
    plan = plan_of(door, role, tmp_path / "answers")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{door.url}/openapi.json"),
        *("--checks", ",".join(CHECKS)),
        *("--phases", ALL_PHASES if EXAMPLES else USUAL_PHASES[role]),
        *("--max-examples", str(EXAMPLES or USUAL_EXAMPLES), "--generation-database", "none"),
        *(() if EXAMPLES else ("--seed", "1")),
        *("--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "10"),
    ]
    environment = clean_environment(
        SCHEMATHESIS_HOOKS="tests.support.openapi_formats", FUZZ_PLAN=msgspec.json.encode(plan).decode()
    )
    result = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not unreached(door, role, (tmp_path / "answers").read_text())


def test_the_pages_are_served_with_a_policy_of_their_own(door: GatewayProcess) -> None:
    page = httpx.get(f"{door.url}/docs", trust_env=False)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers.get_list("content-security-policy") == [page.headers["content-security-policy"]]
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    document = httpx.get(f"{door.url}/openapi.json", trust_env=False)
    assert document.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert document.json()["openapi"] == "3.1.0"
    assert httpx.head(f"{door.url}/docs/", trust_env=False).status_code == 200
