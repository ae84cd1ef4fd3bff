"""Every route, each kind of caller, own and others' things and none: each cell as the contract says.

The table is written out below, from the contract and not from the code. It must have a row for every route that the
gateway has and for no other: a route without a row fails. A running gateway is asked, by people who have logged in.
"""

import base64
import datetime as dt
import itertools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx
import pytest

from lucid.blueprints.access import own_routes
from lucid.core.exchange import Role
from lucid.core.rules.routes import Route
from lucid.core.security.jwt import TokenIssuer
from lucid.dev.embedded import Secantus, Valkey, free_port
from lucid.settings import load_settings
from lucid.settings.limits import named_limits
from tests.integration.conftest import clusters
from tests.support.servers import (
    SECRET,
    Backend,
    GatewayProcess,
    Received,
    Reply,
    clean_environment,
    own_redis,
    until,
)
from tests.support.wallet import Wallet

# A cell is a status, or the number of an error's code, whose status the registry of the platform gives.
STATUS_OF: Final = {
    "2001": 401,
    "2002": 401,
    "2003": 401,
    "2004": 403,
    "2005": 401,
    "2006": 401,
    "4001": 409,
    "4003": 404,
}

# Callers whose credential is none. What it would open were it good is all that an admin may do.
REFUSED: Final = {
    "nobody": "2001",
    "expired": "2002",
    "forged": "2003",
    "logged_out": "2003",
    "basic": "2003",
    "unknown_key": "2003",
    "revoked_key": "2003",
    "expired_key": "2002",
}

# Callers who are known, in the order of the table's columns. `key` is a user's API key; `low_key` one of an admin with
# the role `user`, `admin_key` with the role `admin`; `minted` an admin's token such as the command `lucid token` makes,
# of whom nothing is stored.
KNOWN: Final = ("key", "low_key", "admin_key", "user", "operator", "admin", "super", "minted")

TOKENS: Final = KNOWN[3:]

# One cell: all callers alike, for the route is public. Eight: those of KNOWN, and the others as REFUSED says.
# Behind the path: what is asked for. Of users and sessions: whose, after what is to change. `me` and `own` are the
# caller's; `user`, `operator`, `admin` and `super` somebody else's with that role, `listed` one whose address is in
# ADMIN_TRON_ADDRESSES; `none` is nobody's. ANY is every method.
#
# The contract leaves some cells open. Admins may touch admins only where they could have made them, so else a super
# admin's rights could be taken by taking the user. An API key is no token from a login: it neither logs out nor
# changes credentials or roles, as it manages no API keys.
TABLE: Final = """
GET    /health                                  -                  200
GET    /health/ready                            -                  200
GET    /docs                                    -                  200
GET    /openapi.json                            -                  200
GET    /api/v1/meta/info                        -                  200
GET    /api/v1/meta/version                     -                  200
GET    /api/v1/rate-limits/me                   -                  200

POST   /api/v1/auth/challenge                   -                  200
POST   /api/v1/auth/login                       good               200
POST   /api/v1/auth/login                       unknown            2006
POST   /api/v1/auth/login                       signed_by_another  2005
POST   /api/v1/auth/refresh                     good               200
POST   /api/v1/auth/refresh                     unknown            2003
POST   /api/v1/users                            new                201
POST   /api/v1/users                            taken              4001

POST   /api/v1/auth/logout                      this_login         2004 2004 2004 204  204  204  204  204
POST   /api/v1/auth/logout                      all_logins         2004 2004 2004 204  204  204  204  204
POST   /api/v1/auth/verify                      own                200  200  200  200  200  200  200  200
POST   /api/v1/auth/verify                      forged             200  200  200  200  200  200  200  200
GET    /api/v1/auth/status                      -                  200  200  200  200  200  200  200  200

GET    /api/v1/users                            -                  2004 2004 200  2004 2004 200  200  200
GET    /api/v1/users/{user_id}                  me                 200  200  200  200  200  200  200  4003
GET    /api/v1/users/{user_id}                  own                200  200  200  200  200  200  200  4003
GET    /api/v1/users/{user_id}                  user               4003 4003 200  4003 4003 200  200  200
GET    /api/v1/users/{user_id}                  operator           4003 4003 200  4003 4003 200  200  200
GET    /api/v1/users/{user_id}                  admin              4003 4003 200  4003 4003 200  200  200
GET    /api/v1/users/{user_id}                  super              4003 4003 200  4003 4003 200  200  200
GET    /api/v1/users/{user_id}                  listed             4003 4003 200  4003 4003 200  200  200
GET    /api/v1/users/{user_id}                  none               4003 4003 4003 4003 4003 4003 4003 4003

PATCH  /api/v1/users/{user_id}                  email:me           2004 2004 2004 200  200  200  200  4003
PATCH  /api/v1/users/{user_id}                  email:own          2004 2004 2004 200  200  200  200  4003
PATCH  /api/v1/users/{user_id}                  email:user         4003 4003 2004 4003 4003 200  200  200
PATCH  /api/v1/users/{user_id}                  email:operator     4003 4003 2004 4003 4003 200  200  200
PATCH  /api/v1/users/{user_id}                  email:admin        4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  email:super        4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  email:listed       4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  email:none         4003 4003 2004 4003 4003 4003 4003 4003
PATCH  /api/v1/users/{user_id}                  password:me        2004 2004 2004 200  200  200  200  4003
PATCH  /api/v1/users/{user_id}                  password:user      4003 4003 2004 4003 4003 2004 2004 2004
PATCH  /api/v1/users/{user_id}                  wallet:me          2004 2004 2004 200  200  200  200  4003
PATCH  /api/v1/users/{user_id}                  wallet:user        4003 4003 2004 4003 4003 2004 2004 2004

PATCH  /api/v1/users/{user_id}                  user:me            2004 2004 2004 2004 2004 2004 2004 2004
PATCH  /api/v1/users/{user_id}                  super_admin:own    2004 2004 2004 2004 2004 2004 2004 2004
PATCH  /api/v1/users/{user_id}                  node_operator:user 4003 4003 2004 4003 4003 200  200  200
PATCH  /api/v1/users/{user_id}                  admin:user         4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  super_admin:user   4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  user:operator      4003 4003 2004 4003 4003 200  200  200
PATCH  /api/v1/users/{user_id}                  admin:operator     4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  user:admin         4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  super_admin:admin  4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  user:super         4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  user:listed        4003 4003 2004 4003 4003 2004 200  2004
PATCH  /api/v1/users/{user_id}                  user:none          4003 4003 2004 4003 4003 4003 4003 4003

DELETE /api/v1/users/{user_id}                  me                 2004 2004 2004 204  204  204  204  4003
DELETE /api/v1/users/{user_id}                  own                2004 2004 2004 204  204  204  204  4003
DELETE /api/v1/users/{user_id}                  user               4003 4003 204  4003 4003 204  204  204
DELETE /api/v1/users/{user_id}                  operator           4003 4003 204  4003 4003 204  204  204
DELETE /api/v1/users/{user_id}                  admin              4003 4003 2004 4003 4003 2004 204  2004
DELETE /api/v1/users/{user_id}                  super              4003 4003 2004 4003 4003 2004 204  2004
DELETE /api/v1/users/{user_id}                  listed             4003 4003 2004 4003 4003 2004 204  2004
DELETE /api/v1/users/{user_id}                  none               4003 4003 4003 4003 4003 4003 4003 4003

GET    /api/v1/users/me/api-keys                -                  2004 2004 2004 200  200  200  200  200
POST   /api/v1/users/me/api-keys                user               2004 2004 2004 201  201  201  201  4003
POST   /api/v1/users/me/api-keys                node_operator      2004 2004 2004 2004 201  201  201  4003
POST   /api/v1/users/me/api-keys                admin              2004 2004 2004 2004 2004 201  201  4003
POST   /api/v1/users/me/api-keys                super_admin        2004 2004 2004 2004 2004 2004 201  4003
DELETE /api/v1/users/me/api-keys/{key_id}       own                2004 2004 2004 204  204  204  204  4003
DELETE /api/v1/users/me/api-keys/{key_id}       user               2004 2004 2004 4003 4003 4003 4003 4003
DELETE /api/v1/users/me/api-keys/{key_id}       none               2004 2004 2004 4003 4003 4003 4003 4003

POST   /api/v1/sessions                         -                  201  201  201  201  201  201  201  201
GET    /api/v1/sessions                         -                  200  200  200  200  200  200  200  200
GET    /api/v1/sessions                         own                200  200  200  200  200  200  200  200
GET    /api/v1/sessions                         user               2004 2004 200  2004 2004 200  200  200
GET    /api/v1/sessions/{session_id}            own                200  200  200  200  200  200  200  200
GET    /api/v1/sessions/{session_id}            user               4003 4003 200  4003 4003 200  200  200
GET    /api/v1/sessions/{session_id}            admin              4003 4003 200  4003 4003 200  200  200
GET    /api/v1/sessions/{session_id}            super              4003 4003 200  4003 4003 200  200  200
GET    /api/v1/sessions/{session_id}            none               4003 4003 4003 4003 4003 4003 4003 4003
PATCH  /api/v1/sessions/{session_id}            own                200  200  200  200  200  200  200  200
PATCH  /api/v1/sessions/{session_id}            user               4003 4003 200  4003 4003 200  200  200
PATCH  /api/v1/sessions/{session_id}            admin              4003 4003 200  4003 4003 200  200  200
PATCH  /api/v1/sessions/{session_id}            super              4003 4003 200  4003 4003 200  200  200
PATCH  /api/v1/sessions/{session_id}            none               4003 4003 4003 4003 4003 4003 4003 4003
DELETE /api/v1/sessions/{session_id}            own                204  204  204  204  204  204  204  204
DELETE /api/v1/sessions/{session_id}            user               4003 4003 204  4003 4003 204  204  204
DELETE /api/v1/sessions/{session_id}            admin              4003 4003 204  4003 4003 204  204  204
DELETE /api/v1/sessions/{session_id}            super              4003 4003 204  4003 4003 204  204  204
DELETE /api/v1/sessions/{session_id}            none               4003 4003 4003 4003 4003 4003 4003 4003

GET    /api/v1/rate-limits/{tier}/{identifier}  own                2004 2004 200  2004 2004 200  200  200
GET    /api/v1/rate-limits/{tier}/{identifier}  user               2004 2004 200  2004 2004 200  200  200
GET    /api/v1/rate-limits/{tier}/{identifier}  none               2004 2004 4003 2004 2004 4003 4003 4003
DELETE /api/v1/rate-limits/{tier}/{identifier}  own                2004 2004 204  2004 2004 204  204  204
DELETE /api/v1/rate-limits/{tier}/{identifier}  user               2004 2004 204  2004 2004 204  204  204
DELETE /api/v1/rate-limits/{tier}/{identifier}  none               2004 2004 4003 2004 2004 4003 4003 4003

ANY    /api/v1/chain/**                         -                  200  200  200  200  200  200  200  200
ANY    /api/v1/nodes/**                         -                  200  200  200  200  200  200  200  200
ANY    /api/v1/sessions/*/chunks/**             own                200  200  200  200  200  200  200  200
ANY    /api/v1/sessions/*/chunks/**             user               200  200  200  200  200  200  200  200
ANY    /api/v1/sessions/*/manifest/**           own                200  200  200  200  200  200  200  200
ANY    /api/v1/sessions/*/manifest/**           user               200  200  200  200  200  200  200  200
ANY    /api/v1/sessions/*/pipeline/**           own                200  200  200  200  200  200  200  200
ANY    /api/v1/sessions/*/pipeline/**           user               200  200  200  200  200  200  200  200

GET    /api/v1/reports/**                       -                  200
POST   /api/v1/reports/**                       -                  200  200  200  200  200  200  200  200
PUT    /api/v1/reports/**                       -                  2004 2004 200  2004 200  200  200  200
PATCH  /api/v1/reports/**                       -                  2004 2004 200  2004 2004 200  200  200
DELETE /api/v1/reports/**                       -                  2004 2004 2004 2004 2004 2004 200  2004
"""

# The file's part of the table: one row for each access that a row may have.
REPORTS: Final = {
    "GET": "public",
    "POST": "user",
    "PUT": "node_operator",
    "PATCH": "admin",
    "DELETE": "super_admin",
}

# Who registers a new user: a password takes a fifth of a second of a core. All callers ask for one that is taken.
FEW: Final = {"new": ("nobody", "forged", "key", "super")}

EVERY_METHOD: Final = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")

SECURITY: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
ORIGIN: Final = "https://app.example.org"
PASSWORD: Final = "correct horse battery staple"
ROLE_OF: Final = {"operator": "node_operator", "super": "super_admin", "listed": "super_admin"}
LISTED: Final = 8


@dataclass(frozen=True)
class Row:
    method: str
    path: str
    what: str
    cells: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.what}"

    @property
    def pattern(self) -> str:
        return re.sub(r"\{[a-z_]+\}", "*", self.path)

    @property
    def forwarded(self) -> bool:
        return self.path.endswith("/**")


def rows() -> Iterator[Row]:
    for line in filter(None, TABLE.splitlines()):
        method, path, what, *cells = line.split()
        if len(cells) == 1:
            yield Row(method, path, what, dict.fromkeys(FEW.get(what, (*REFUSED, *KNOWN)), cells[0]))
        else:
            yield Row(method, path, what, {**REFUSED, **dict(zip(KNOWN, cells, strict=True))})


ROWS: Final = tuple(rows())
PLACES: Final = tuple({(row.method, row.path): row for row in ROWS}.values())
"""One row of each method and path."""


@dataclass(frozen=True)
class Who:
    """A caller: what it sends, and who that is."""

    fields: Mapping[str, str]
    user_id: str = ""
    role: str = ""


@dataclass(frozen=True)
class Ask:
    who: Who
    path: str
    body: Any = None
    shows: Mapping[str, Any] | None = None
    """What a success's body has, among other things."""


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class World:
    """A gateway, and people of every kind who stand before it. Safe to be used by several threads at once."""

    def __init__(self, door: GatewayProcess, environment: Mapping[str, str], listed: list[Wallet]) -> None:
        self.door = door
        self.http = httpx.Client(base_url=door.url, trust_env=False, timeout=20.0)
        self._environment = environment
        self._listed = listed
        self._lock = threading.RLock()
        self._kept: dict[Any, Any] = {}
        self.root = Who(bearer(self.log_in(listed.pop())["access_token"]))

    def call(self, method: str, path: str, who: Who, body: Any = None, **fields: str) -> httpx.Response:
        return self.http.request(method, path, headers={**who.fields, **fields}, json=body)

    def done(self, status: int, method: str, path: str, who: Who, body: Any = None) -> Any:
        """The body of a call that only prepares: anything but `status` is a fault of the test."""
        answer = self.call(method, path, who, body)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """Made once: for cells that must change nothing."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            return self._kept[key]

    # --- people ----------------------------------------------------------------------------------------

    def signed(self, wallet: Wallet, by: Wallet | None = None) -> dict[str, str]:
        """A fresh challenge for the wallet, signed."""
        address = wallet.address
        told = self.done(200, "POST", "/api/v1/auth/challenge", Who({}), {"tron_address": address})
        signature = (by or wallet).sign(told["message"])
        return {"tron_address": address, "message": told["message"], "signature": signature}

    def log_in(self, wallet: Wallet) -> dict[str, Any]:
        told: dict[str, Any] = self.done(200, "POST", "/api/v1/auth/login", Who({}), self.signed(wallet))
        return told

    def person(self, kind: str) -> Who:
        """A new user of this kind, logged in."""
        wallet = self._listed.pop() if kind == "listed" else Wallet.generate()
        told = self.log_in(wallet)
        user_id, role = told["user"]["user_id"], ROLE_OF.get(kind, kind)
        if told["user"]["role"] != role:
            self.give(user_id, role)
            told = self.log_in(wallet)
        assert told["user"]["role"] == role
        return Who(bearer(told["access_token"]), user_id, role)

    def give(self, user_id: str, role: str) -> None:
        """A role. The user's tokens are dead then."""
        self.done(200, "PATCH", f"/api/v1/users/{user_id}", self.root, {"role": role})

    def with_key(self, owner: Who, role: str, **more: str) -> Who:
        body = {"name": "a key", "role": role, **more}
        key = self.done(201, "POST", "/api/v1/users/me/api-keys", owner, body)["key"]
        return replace(owner, fields={"X-API-Key": key}, role=role)

    def minted(self, user_id: str, seconds_ago: float = 0.0) -> Who:
        """An admin by a token that no login gave, as `lucid token` makes it: good for ten minutes from then."""
        issuer = TokenIssuer(load_settings(self._environment).tokens)
        issued = issuer.issue(
            user_id=user_id,
            role=Role.ADMIN,
            family=str(uuid.uuid4()),
            now=time.time() - seconds_ago,
            minutes=10,
        )
        return Who(bearer(issued.token), user_id, "admin")

    def new(self, caller: str) -> Who:
        """A caller of this kind whom nobody else uses."""
        if caller == "minted":
            return self.minted(str(uuid.uuid4()))
        if caller.endswith("key"):
            owner = self.person("user" if caller == "key" else "admin")
            return self.with_key(owner, "admin" if caller == "admin_key" else "user")
        return self.person(caller)

    def caller(self, caller: str) -> Who:
        who: Who = self.kept(("caller", caller), lambda: self._caller(caller))
        return who

    def _caller(self, caller: str) -> Who:
        if caller not in REFUSED:
            return self.new(caller)
        admin = self.caller("admin")
        token = admin.fields["Authorization"].removeprefix("Bearer ")
        if caller == "nobody":
            return replace(admin, fields={})
        if caller == "expired":
            return self.minted(admin.user_id, seconds_ago=3_600.0)
        if caller == "forged":
            return replace(admin, fields=bearer(token[:-8] + token[-8:].swapcase()))
        if caller == "basic":
            pair = base64.b64encode(b"admin:admin").decode()
            return replace(admin, fields={"Authorization": f"Basic {pair}"})
        if caller == "unknown_key":
            return replace(admin, fields={"X-API-Key": "lucid_" + "A" * 43})
        return self._ended(caller, admin)

    def _ended(self, caller: str, admin: Who) -> Who:
        """One whose credential was good a moment ago, and is refused by every worker by now."""
        if caller == "logged_out":
            who = self.person("admin")
            self.done(204, "POST", "/api/v1/auth/logout", who)
        elif caller == "revoked_key":
            who = self.with_key(admin, "admin")
            newest = self.done(200, "GET", "/api/v1/users/me/api-keys", admin)["items"][0]
            self.done(204, "DELETE", f"/api/v1/users/me/api-keys/{newest['key_id']}", admin)
        else:
            soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
            who = self.with_key(admin, "admin", expires_at=soon.isoformat())

        def refused() -> bool:
            # A connection each, so that all workers are asked.
            url = f"{self.door.url}/api/v1/auth/status"
            return all(
                httpx.get(url, headers=who.fields, trust_env=False, verify=False).status_code == 401
                for _ in range(6)
            )

        until(refused, 5.0, f"{caller} is refused")
        return replace(who, user_id=admin.user_id)

    # --- what they ask for -----------------------------------------------------------------------------

    def user(self, kind: str, fresh: bool) -> str:
        """The id of a user of this kind who is no caller."""
        if not fresh:
            return self.other(kind).user_id
        if kind in ("user", "listed"):
            return self.person(kind).user_id
        user_id = self.person("user").user_id
        self.give(user_id, ROLE_OF.get(kind, kind))
        return user_id

    def other(self, kind: str) -> Who:
        """Somebody of this kind who is no caller: what is theirs is left as it is."""
        who: Who = self.kept(("other", kind), lambda: self.person(kind))
        return who

    def session(self, owner: Who, fresh: bool) -> str:
        def make() -> str:
            return str(self.done(201, "POST", "/api/v1/sessions", owner, {})["session_id"])

        session_id: str = make() if fresh else self.kept(("session", owner.user_id), make)
        return session_id

    def key_id(self, owner: Who, fresh: bool) -> str:
        def make() -> str:
            body = {"name": "a key"}
            return str(self.done(201, "POST", "/api/v1/users/me/api-keys", owner, body)["key_id"])

        key_id: str = make() if fresh else self.kept(("key", owner.user_id), make)
        return key_id

    def ask(self, row: Row, caller: str, fresh: bool) -> Ask:
        """The request of a cell. `fresh`: it will change what it asks for, so nobody else may need that."""
        who = self.caller(caller)
        change, _, whose = row.what.rpartition(":")
        fresh = fresh and row.method != "GET"
        if row.path.startswith("/api/v1/auth/"):
            return self._ask_auth(row, caller, who, fresh)
        if row.path == "/api/v1/users/{user_id}":
            own = whose in ("me", "own")
            if own and fresh and change != "email":
                who = self.new(caller)
            if own:
                user_id = who.user_id
            elif whose == "none":
                user_id = str(uuid.uuid4())
            elif fresh and change == "email":
                # Others may change it again.
                user_id = self.kept(("renamed", whose), lambda: self.user(whose, fresh=True))
            else:
                user_id = self.user(whose, fresh)
            path = f"/api/v1/users/{'me' if whose == 'me' else user_id}"
            return Ask(who, path, self._change(change) if change else None, {"user_id": user_id})
        if row.path == "/api/v1/users" and row.method == "POST":
            email = f"{uuid.uuid4()}@example.org" if row.what == "new" else self.kept("email", self._register)
            return Ask(who, row.path, {"email": email, "password": PASSWORD})
        if row.path == "/api/v1/users/me/api-keys":
            body = {"name": "a key", "role": row.what} if row.method == "POST" else None
            return Ask(who, row.path, body)
        if row.path == "/api/v1/users/me/api-keys/{key_id}":
            owner = {"own": who, "user": self.other("user"), "none": None}[whose]
            if owner is None or owner.user_id == self.caller("minted").user_id:
                return Ask(who, f"/api/v1/users/me/api-keys/{uuid.uuid4()}")
            if owner is who and caller not in TOKENS:
                owner = self.other("user")
            return Ask(who, f"/api/v1/users/me/api-keys/{self.key_id(owner, fresh)}")
        if row.path == "/api/v1/sessions":
            query = {
                "-": "",
                "own": f"?user_id={who.user_id}",
                "user": f"?user_id={self.other('user').user_id}",
            }
            return Ask(who, row.path + query[whose], {} if row.method == "POST" else None)
        if row.path.startswith("/api/v1/sessions/"):
            session_id = str(uuid.uuid4())
            if whose != "none":
                mine = self.caller("admin") if caller in REFUSED else who
                session_id = self.session(mine if whose == "own" else self.other(whose), fresh)
            path = (
                row.path.replace("{session_id}", session_id).replace("*", session_id, 1).replace("**", "1/x")
            )
            body = {"status": "ACTIVE"} if row.method == "PATCH" and not row.forwarded else None
            return Ask(who, path, body, None if row.forwarded else {"session_id": session_id})
        if row.path.startswith("/api/v1/rate-limits/{"):
            tier = "nowhere" if whose == "none" else "authenticated"
            user_id = who.user_id if whose == "own" else self.other("user").user_id
            return Ask(who, f"/api/v1/rate-limits/{tier}/{user_id}")
        return Ask(who, row.path.replace("**", "some/thing"))

    def _ask_auth(self, row: Row, caller: str, who: Who, fresh: bool) -> Ask:
        wallet: Wallet = self.kept("wallet", Wallet.generate)
        if row.path.endswith("/logout"):
            # Its own login, of a user of its own: this ends it.
            who = self.new(caller) if fresh else who
            return Ask(who, row.path, {"all_logins": row.what == "all_logins"})
        if row.path.endswith("/challenge"):
            return Ask(who, row.path, {"tron_address": wallet.address})
        if row.path.endswith("/login"):
            body = self.signed(wallet, by=Wallet.generate() if row.what == "signed_by_another" else None)
            if row.what == "unknown":
                # What was asked for by another address is as unknown as what nobody was given.
                stranger = Wallet.generate()
                signature = stranger.sign(body["message"])
                body = {**body, "tron_address": stranger.address, "signature": signature}
            return Ask(who, row.path, body)
        if row.path.endswith("/refresh"):
            token = self.log_in(wallet)["refresh_token"] if row.what == "good" else str(uuid.uuid4())
            return Ask(who, row.path, {"refresh_token": token})
        if row.path.endswith("/verify"):
            of = self.caller("admin" if row.what == "own" else "forged")
            token = of.fields["Authorization"].removeprefix("Bearer ")
            return Ask(who, row.path, {"token": token}, {"active": row.what == "own"})
        return Ask(who, row.path, None, {"user_id": who.user_id, "role": who.role})

    def _change(self, change: str) -> dict[str, Any]:
        email = f"{uuid.uuid4()}@example.org"
        if change == "email":
            return {"email": email}
        if change == "password":
            return {"email": email, "password": PASSWORD}
        return dict(self.signed(Wallet.generate())) if change == "wallet" else {"role": change}

    def _register(self) -> str:
        email = f"{uuid.uuid4()}@example.org"
        self.done(201, "POST", "/api/v1/users", Who({}), {"email": email, "password": PASSWORD})
        return email

    def standing(self, row: Row) -> Any:
        """What cells that are refused ask to change, if it is somebody else's: as it is now."""
        kind = row.what.rpartition(":")[2]
        if row.method not in ("PATCH", "DELETE") or kind in ("me", "own", "none", "-"):
            return None
        if row.path == "/api/v1/users/{user_id}":
            return self.done(200, "GET", f"/api/v1/users/{self.user(kind, fresh=False)}", self.root)
        if row.path == "/api/v1/sessions/{session_id}":
            session_id = self.session(self.other(kind), fresh=False)
            return self.done(200, "GET", f"/api/v1/sessions/{session_id}", self.root)
        return None


@pytest.fixture(scope="module")
def environment(
    valkey: Valkey, secantus: Secantus, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Limits out of the way, and a file with a row for every access."""
    folder = tmp_path_factory.mktemp("gateway")
    file = folder / "gateway.toml"
    file.write_text(
        f'[backends.reports]\nendpoints = ["{backend.url}"]\n'
        + "".join(
            f'[[routes]]\npath = "/api/v1/reports/**"\nbackend = "reports"\naccess = "{access}"\n'
            f'methods = ["{method}"]\n'
            for method, access in REPORTS.items()
        )
    )
    limits = ("PUBLIC", "AUTHENTICATED", "ADMIN", "LOGIN", "REFRESH", "CHAIN")
    return clean_environment(
        **{
            "HOST": "127.0.0.1",
            "PORT": str(free_port()),
            "METRICS_PORT": str(free_port()),
            "WORKERS": "2",
            "JWT_SECRET_KEY": SECRET,
            "LOG_FORMAT": "text",
            "REDIS_URI": own_redis(valkey),
            "MONGODB_URI": secantus.in_database(folder.name),
            "CORS_ORIGINS": ORIGIN,
            "GATEWAY_CONFIG": str(file),
            **{f"RATE_LIMIT_{name}": "1000000" for name in limits},
            **clusters(backend),
        }
    )


@pytest.fixture(scope="module")
def world(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    wallets = [Wallet.generate() for _ in range(LISTED)]
    environment = {**environment, "ADMIN_TRON_ADDRESSES": ",".join(wallet.address for wallet in wallets)}
    door = GatewayProcess(environment, tmp_path_factory.mktemp("door"), ("lucid", "serve"))
    door.wait_until_ready()
    world = World(door, environment, wallets)
    yield world
    world.http.close()
    assert door.stop() == 0
    assert "Traceback" not in door.log, door.log


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture(autouse=True)
def quiet_backend(backend: Backend, fresh_backend: None) -> None:
    """An answer to HEAD has no body."""
    backend.respond = lambda received: Reply(body=b"" if received.method == "HEAD" else b"{}")


def forwarded(backend: Backend, request_id: str) -> list[Received]:
    return [received for received in backend.received if received.field("x-request-id") == request_id]


def faults_of_own(answer: httpx.Response, expected: str) -> Iterator[str]:
    """What every answer of the gateway's own must have, and lacks."""
    for name, value in SECURITY.items():
        if answer.headers.get(name) != value:
            yield f"{name}: {answer.headers.get(name)}"
    policy = answer.headers.get("content-security-policy", "")
    if "default-src 'none'" not in policy or "frame-ancestors 'none'" not in policy:
        yield f"content-security-policy: {policy}"
    if answer.request.method == "HEAD":
        return
    if answer.status_code >= 400:
        error = answer.json()["error"]
        if len(expected) == 4 and error["code"] != f"LUCID_ERR_{expected}":
            yield f"{error}"
        if error["request_id"] != answer.headers["x-request-id"]:
            yield f"the request's id in {error}"
    if (
        answer.request.url.path not in ("/docs", "/openapi.json")
        and answer.headers.get("cache-control") != "no-store"
    ):
        yield f"cache-control: {answer.headers.get('cache-control')}"


def faults_of_cell(world: World, row: Row, backend: Backend, caller: str) -> Iterator[str]:
    expected = row.cells[caller]
    succeeds = len(expected) == 3 and expected < "300"
    methods: tuple[str, ...] = (row.method,)
    if row.method == "ANY":
        methods = EVERY_METHOD
    elif row.method == "GET":
        methods = ("GET", "HEAD")
    ask = world.ask(row, caller, succeeds)
    for method in methods:
        request_id = f"{caller}.{uuid.uuid4().hex}"
        answer = world.call(method, ask.path, ask.who, ask.body, **{"X-Request-ID": request_id})
        status = STATUS_OF.get(expected) or int(expected)
        where = f"{method} {ask.path} by {caller}"
        if answer.status_code != status:
            yield f"{where}: {answer.status_code} instead of {expected}: {answer.text}"
            continue
        if answer.headers.get("x-request-id") != request_id:
            yield f"{where}: X-Request-ID {answer.headers.get('x-request-id')}"
        if method == "HEAD" and answer.content:
            yield f"{where}: a body"
        if not (row.forwarded and succeeds):
            yield from (f"{where}: {fault}" for fault in faults_of_own(answer, expected))
        locked = row.cells["nobody"] == REFUSED["nobody"]
        if locked and status == 401 and not answer.headers.get("www-authenticate", "").startswith("Bearer"):
            yield f"{where}: no WWW-Authenticate"
        if status == 201 and row.path != "/api/v1/users" and row.path not in answer.headers["location"]:
            yield f"{where}: Location {answer.headers['location']}"
        if status == 200 and method != "HEAD" and ask.shows:
            told = answer.json()
            if any(told.get(name) != value for name, value in ask.shows.items()):
                yield f"{where}: {told} instead of {ask.shows}"
        if row.forwarded:
            yield from (
                f"{where}: {fault}" for fault in faults_behind(ask.who, caller, backend, request_id, succeeds)
            )


def faults_behind(who: Who, caller: str, backend: Backend, request_id: str, succeeds: bool) -> Iterator[str]:
    """What reached the backend must say who asks, in the gateway's words alone; what is refused reaches none."""
    received = forwarded(backend, request_id)
    if len(received) != succeeds:
        yield f"the backend got it {len(received)} times"
    for each in received:
        known = caller in KNOWN
        if each.field("x-user-id") != (who.user_id if known else None):
            yield f"X-User-Id {each.field('x-user-id')}"
        if known and each.field("x-user-role") != who.role:
            yield f"X-User-Role {each.field('x-user-role')}"
        if each.field("authorization") or each.field("x-api-key"):
            yield "the credential was passed on"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_cell_is_as_the_table_says(
    row: Row, world: World, backend: Backend, pool: ThreadPoolExecutor
) -> None:
    before = world.standing(row)
    found = pool.map(lambda caller: list(faults_of_cell(world, row, backend, caller)), row.cells)
    faults = [fault for faults in found for fault in faults]
    assert not faults, "\n".join(faults)
    assert world.standing(row) == before, "a refused request has changed something"


def test_every_route_has_its_row(world: World, environment: dict[str, str]) -> None:
    settings = load_settings(environment)
    own = own_routes(named_limits(settings.rates))
    behind = [Route.from_settings(route) for route in settings.routes]
    routes = {
        (method, route.pattern)
        for route in (*own, *behind)
        for method in (route.methods - {"HEAD"} if route.methods else {"ANY"})
    }
    assert {(row.method, row.pattern) for row in ROWS} == routes
    document = world.http.get("/openapi.json").json()
    operations = {
        (method.upper(), re.sub(r"\{[a-z_]+\}", "*", path))
        for path, item in document["paths"].items()
        for method in item
    }
    assert {(row.method, row.pattern) for row in ROWS if not row.forwarded} == operations


def place(row: Row) -> str:
    """A path of the row, of nothing that is there."""
    path = re.sub(r"\{tier\}", "public", row.path).replace("**", "some/thing")
    return re.sub(r"\{[a-z_]+\}|\*", str(uuid.uuid4()), path)


def methods_of(path: str) -> set[str]:
    methods = {row.method for row in ROWS if row.path == path}
    return set(EVERY_METHOD) if "ANY" in methods else methods | ({"HEAD"} if "GET" in methods else set())


@pytest.mark.parametrize("path", dict.fromkeys(row.path for row in ROWS if row.method != "ANY"))
def test_a_method_without_a_row_is_not_allowed(path: str, world: World) -> None:
    allowed = methods_of(path)
    target = place(next(row for row in ROWS if row.path == path))
    for method in sorted({*EVERY_METHOD, "PROPFIND", "TRACE"} - allowed):
        for caller in ("nobody", "forged", "admin"):
            answer = world.call(method, target, world.caller(caller))
            assert answer.status_code == 405, f"{method} {target} by {caller}: {answer.status_code}"
            assert answer.headers["allow"].split(", ") == sorted(allowed)
            assert not list(faults_of_own(answer, "1005"))


@pytest.mark.parametrize("path", dict.fromkeys(row.path for row in ROWS))
def test_a_preflight_needs_no_credential_and_tells_the_methods(path: str, world: World) -> None:
    target = place(next(row for row in ROWS if row.path == path))
    asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
    answer = world.call("OPTIONS", target, Who({}), **asked, Origin=ORIGIN)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-methods"].split(", ") == sorted(methods_of(path))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    other = world.call("OPTIONS", target, Who({}), **asked, Origin="https://elsewhere.example.org")
    assert not [name for name in other.headers if name.startswith("access-control-allow-")]


@pytest.mark.parametrize("row", PLACES, ids=str)
def test_two_credentials_at_once_are_refused_everywhere(row: Row, world: World, backend: Backend) -> None:
    token, key = world.caller("admin").fields, world.caller("admin_key").fields
    forged, unknown = world.caller("forged").fields, world.caller("unknown_key").fields
    methods = {"ANY": EVERY_METHOD, "GET": ("GET", "HEAD")}.get(row.method, (row.method,))
    for method, pair in itertools.product(
        methods, ({**token, **key}, {**forged, **key}, {**token, **unknown})
    ):
        answer = world.call(method, place(row), Who(pair), {} if method == "POST" else None)
        assert answer.status_code == 400, f"{method}: {answer.status_code} {answer.text}"
        assert not list(faults_of_own(answer, "2008"))
    assert not backend.forwarded


@pytest.mark.parametrize(
    "path", ["/", "/api/v1", "/api/v1/nowhere", "/metrics", "/api/v1/users/a/b", "/docs/x"]
)
def test_what_is_no_route_is_there_for_nobody(path: str, world: World) -> None:
    for method, caller in itertools.product(("GET", "POST"), ("nobody", "forged", "user", "super")):
        answer = world.call(method, path, world.caller(caller))
        assert answer.status_code == 404
        assert not list(faults_of_own(answer, "1004"))


def test_lists_hold_what_their_caller_may_see(world: World) -> None:
    other = world.other("user")
    theirs = world.session(other, fresh=False)
    for caller in KNOWN:
        who = world.caller(caller)
        own = world.session(who, fresh=True)
        found = world.done(200, "GET", "/api/v1/sessions?limit=100", who)["items"]
        ids = {session["session_id"] for session in found}
        assert own in ids
        if who.role in ("admin", "super_admin"):
            asked = world.done(200, "GET", f"/api/v1/sessions?limit=100&user_id={other.user_id}", who)[
                "items"
            ]
            assert theirs in {session["session_id"] for session in asked}
        else:
            assert {session["user_id"] for session in found} == {who.user_id}
