"""Who counts against what, over several workers and a real Redis."""

import time
from collections.abc import Callable

import httpx
import jwt
import pytest

from tests.integration.conftest import clusters
from tests.support.servers import SECRET, Backend, GatewayProcess


def token_for(user: str, role: str = "user", **claims: object) -> str:
    """A token as `lucid token` makes it, or one that differs in `claims`."""
    now = int(time.time())
    standard = {
        "sub": user,
        "role": role,
        "sid": "family-1",
        "jti": f"{user}-{time.monotonic_ns()}",
        "iat": now,
        "exp": now + 600,
        "iss": "lucid",
        "aud": "lucid",
        "typ": "access",
    }
    return jwt.encode({**standard, **claims}, SECRET, "HS256")


def statuses(url: str, path: str, count: int, **fields: str) -> list[int]:
    """The statuses of `count` requests, a connection each."""
    return [httpx.get(url + path, headers=fields, trust_env=False).status_code for _ in range(count)]


@pytest.fixture
def url(gateway: Callable[..., GatewayProcess], backend: Backend) -> str:
    small = {
        "RATE_LIMIT_PUBLIC": "10",
        "RATE_LIMIT_AUTHENTICATED": "30",
        "RATE_LIMIT_CHAIN": "20",
        "RATE_LIMIT_LOGIN": "5",
    }
    return gateway(workers=2, env={**clusters(backend), **small}).url


def test_bad_credentials_are_charged_to_their_address(url: str) -> None:
    bad = {"Authorization": "Bearer no.such.token"}
    assert statuses(url, "/api/v1/nodes/x", 13, **bad) == [401] * 10 + [429] * 3
    assert statuses(url, "/api/v1/meta/info", 1) == [429]
    good = {"Authorization": f"Bearer {token_for('u1')}"}
    assert statuses(url, "/api/v1/nodes/x", 1, **good) == [200], "the address's quota is not the user's"


def test_several_limits_are_charged_together_or_not_at_all(url: str) -> None:
    bearer = {"Authorization": f"Bearer {token_for('u2')}"}
    assert statuses(url, "/api/v1/chain/x", 23, **bearer) == [200] * 20 + [429] * 3
    # The three refused ones cost nothing: ten of thirty are left.
    assert statuses(url, "/api/v1/nodes/x", 12, **bearer) == [200] * 10 + [429] * 2


def test_what_is_not_counted(url: str) -> None:
    for path in ("/health", "/health/ready", "/no/such/route", "/api/v1/meta/../x"):
        assert 429 not in statuses(url, path, 15)
    assert httpx.post(f"{url}/api/v1/meta/info", trust_env=False).status_code == 405
    assert statuses(url, "/api/v1/meta/info", 11) == [200] * 10 + [429]


def test_logins_have_a_limit_of_their_own_per_address(url: str) -> None:
    body = {"tron_address": "T" * 34, "signature": "00" * 65, "message": "m"}
    answers = [httpx.post(f"{url}/api/v1/auth/login", json=body, trust_env=False) for _ in range(7)]
    assert [answer.status_code for answer in answers][5:] == [429] * 2
    assert answers[-1].json()["error"]["details"]["name"] == "login"


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"iat": 1_000_000_000, "exp": 1_000_000_600}, "LUCID_ERR_2002"),
        ({"aud": "somebody"}, "LUCID_ERR_2003"),
        ({"iss": "somebody"}, "LUCID_ERR_2003"),
        ({"typ": "refresh"}, "LUCID_ERR_2003"),
        ({"role": "emperor"}, "LUCID_ERR_2003"),
        ({"sub": "a\r\nX-User-Role: admin"}, "LUCID_ERR_2003"),
    ],
)
def test_a_token_that_is_not_good(url: str, claims: dict[str, object], code: str) -> None:
    answer = httpx.get(
        f"{url}/api/v1/nodes/x",
        headers={"Authorization": f"Bearer {token_for('u', **claims)}"},
        trust_env=False,
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
    assert answer.headers["www-authenticate"].startswith("Bearer ")


def test_roles_and_both_credentials(url: str) -> None:
    user = {"Authorization": f"Bearer {token_for('u3')}"}
    answer = httpx.get(f"{url}/api/v1/rate-limits/public/127.0.0.1", headers=user, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "LUCID_ERR_2004")
    both = {**user, "X-API-Key": "k"}
    assert statuses(url, "/api/v1/nodes/x", 1, **both) == [400]
    assert statuses(url, "/api/v1/nodes/x", 1) == [401]
    assert statuses(url, "/api/v1/nodes/x", 1, **{"X-API-Key": "lucid_" + "0" * 43}) == [401]
