"""An authentication cluster to play with: a real HTTP service in a thread, honest until it is told otherwise.

It gives out JWTs of its own issuer, rotates refresh tokens, verifies and logs out. `fault` changes its honest
answers: `server.fault = slow(1.0)`, `server.fault = lying(role="root")`; None makes it honest again.
"""

import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import jwt as pyjwt

from lucid.core.exchange import ROLES
from lucid.core.security import tron
from lucid.core.security.roles import PERMISSIONS
from tests.support.servers import Backend, HangupError, Received, Reply

ISSUER = "auth-cluster"
SECRET = "the-auth-cluster-s-own-secret-for-tests"
ENDLESS_PIECES = 4_096

Fault = Callable[[Received, Reply], Reply]


@dataclass
class Login:
    """A line of refresh tokens."""

    address: str
    current: str
    alive: bool = True


class AuthClusterServer:
    """`start`, then `url`; `stop` at the end, or use it with `with`. `stop` and `start` again keep port and state.

    `roles` gives addresses other roles than `user`. `wall_clock` is what its tokens are dated by.
    """

    def __init__(self, *, prefix: str = "", wall_clock: Callable[[], float] = time.time) -> None:
        self.backend = Backend()
        self.backend.respond = self._respond
        self.fault: Fault | None = None
        self.roles: dict[str, str] = {}
        self.users: dict[str, str] = {}
        """Address to user id."""
        self.logins: dict[str, Login] = {}
        self.access_seconds = 900
        self._prefix = prefix
        self._wall_clock = wall_clock
        self._families: dict[str, str] = {}
        """Each refresh token there ever was, to its family."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert not self.backend.faults, f"it was sent what is no HTTP: {self.backend.faults}"

    @property
    def url(self) -> str:
        return self.backend.url + self._prefix

    @property
    def received(self) -> list[Received]:
        return self.backend.received

    def start(self) -> None:
        self.backend.start()

    def stop(self) -> None:
        self.backend.kill()

    def user_id(self, address: str) -> str:
        return self.users.setdefault(address, str(uuid.uuid4()))

    def token(self, address: str, family: str = "", **claims: Any) -> str:
        """A validly signed access token; `claims` replace or, as None, remove what it would say."""
        now = int(self._wall_clock())
        said = {
            "sub": self.user_id(address),
            "role": self.roles.get(address, "user"),
            "sid": family or self.new_login(address)[0],
            "jti": str(uuid.uuid4()),
            "iat": now,
            "exp": now + self.access_seconds,
            "iss": ISSUER,
            **claims,
        }
        return pyjwt.encode(
            {name: value for name, value in said.items() if value is not None}, SECRET, algorithm="HS256"
        )

    def new_login(self, address: str) -> tuple[str, str]:
        """The family and the refresh token of a new login."""
        family, refresh_token = str(uuid.uuid4()), secrets.token_urlsafe(32)
        self.logins[family] = Login(address, refresh_token)
        self._families[refresh_token] = family
        return family, refresh_token

    def _respond(self, received: Received) -> Reply:
        paths = {
            f"{self._prefix}/auth/login": self._login,
            f"{self._prefix}/auth/refresh": self._refresh,
            f"{self._prefix}/auth/logout": self._logout,
            f"{self._prefix}/auth/verify": self._verify,
        }
        operation = paths.get(received.target)
        if operation is None or received.method != "POST":
            reply = _json({"detail": "no such path"}, 404)
        else:
            reply = operation(json.loads(received.body), received)
        return reply if self.fault is None else self.fault(received, reply)

    def _login(self, body: dict[str, Any], _: Received) -> Reply:
        address = body["tron_address"]
        if not tron.verify(address, body["message"].encode(), body["signature"]):
            return _json({"detail": "the signature does not match"}, 401)
        family, refresh_token = self.new_login(address)
        return self._pair(address, family, refresh_token)

    def _refresh(self, body: dict[str, Any], _: Received) -> Reply:
        spent = body["refresh_token"]
        login = self.logins.get(self._families.get(spent, ""))
        if login is None or not login.alive or login.current != spent:
            if login is not None:
                login.alive = False
            return _json({"detail": "not valid"}, 401)
        family = self._families[spent]
        login.current = secrets.token_urlsafe(32)
        self._families[login.current] = family
        return self._pair(login.address, family, login.current)

    def _logout(self, body: dict[str, Any], received: Received) -> Reply:
        claims = self._claims((received.field("authorization") or "").removeprefix("Bearer "))
        if claims is None:
            return _json({"detail": "not valid"}, 401)
        mine = self.logins[claims["sid"]]
        for login in self.logins.values():
            if login is mine or (body["all_logins"] and login.address == mine.address):
                login.alive = False
        return Reply(204, body=b"")

    def _verify(self, body: dict[str, Any], _: Received) -> Reply:
        claims = self._claims(body["token"])
        return _json({"active": False} if claims is None else {"active": True, **claims})

    def _pair(self, address: str, family: str, refresh_token: str) -> Reply:
        role = self.roles.get(address, "user")
        user = {
            "user_id": self.user_id(address),
            "tron_address": address,
            "role": role,
            "permissions": list(PERMISSIONS[ROLES[role]]),
        }
        pair = {
            "access_token": self.token(address, family),
            "refresh_token": refresh_token,
            "token_type": "Bearer",
            "expires_in": self.access_seconds,
            "user": user,
        }
        return _json(pair)

    def _claims(self, token: str) -> dict[str, Any] | None:
        """What a good token says; None: it is not good."""
        try:
            claims: dict[str, Any] = pyjwt.decode(
                token,
                SECRET,
                algorithms=["HS256"],
                issuer=ISSUER,
                # It is the clock of this server that counts; odd types are what tests ask for.
                options={
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_jti": False,
                    "verify_sub": False,
                },
            )
        except pyjwt.InvalidTokenError:
            return None
        login = self.logins.get(claims.get("sid", ""))
        good = claims["exp"] > self._wall_clock() and (login is None or login.alive)
        return claims if good else None


# --- faults --------------------------------------------------------------------------------------------


def slow(seconds: float) -> Fault:
    """It thinks for so long before its head."""

    def fault(_: Received, reply: Reply) -> Reply:
        reply.delay_seconds = seconds
        return reply

    return fault


def answering(status: int, body: bytes = b"", *fields: tuple[str, str]) -> Fault:
    """Something else instead; JSON by its type unless `fields` say otherwise."""
    return lambda _, reply: Reply(status, list(fields) or reply.fields, body)


def with_fields(*fields: tuple[str, str]) -> Fault:
    """The honest answer with more fields in its head."""

    def fault(_: Received, reply: Reply) -> Reply:
        reply.fields += fields
        return reply

    return fault


def of_type(content_type: str) -> Fault:
    """The honest body under another Content-Type; empty: under none."""
    fields = [("Content-Type", content_type)] if content_type else []
    return lambda _, reply: Reply(reply.status, fields, reply.body)


def lying(**members: Any) -> Fault:
    """The honest answer with other members; None removes one, `user__role` is the role inside `user`."""

    def fault(_: Received, reply: Reply) -> Reply:
        assert isinstance(reply.body, bytes)
        answer = json.loads(reply.body)
        for path, value in members.items():
            *outer, name = path.split("__")
            inner = answer
            for step in outer:
                inner = inner[step]
            if value is None:
                inner.pop(name, None)
            else:
                inner[name] = value
        return _json(answer, reply.status)

    return fault


def bad_gateway(_: Received, reply: Reply) -> Reply:
    """What a proxy in front of a dead service says."""
    return Reply(502, [("Content-Type", "text/html")], b"<html><h1>502 Bad Gateway</h1></html>")


def hanging_up(_: Received, reply: Reply) -> Reply:
    """The connection ends without an answer."""
    raise HangupError


def cut_off(_: Received, reply: Reply) -> Reply:
    """The head promises the whole body; half of it comes, then the connection ends."""
    assert isinstance(reply.body, bytes)
    reply.fields.append(("Content-Length", str(len(reply.body))))
    reply.body = _CutOff([reply.body[: len(reply.body) // 2]])
    return reply


def promising(length: int) -> Fault:
    """The head promises so many bytes; 64 KB at most come, then the connection ends."""

    def fault(_: Received, reply: Reply) -> Reply:
        reply.fields.append(("Content-Length", str(length)))
        reply.body = _CutOff([b" " * min(length - 1, 65_536)])
        return reply

    return fault


class Endless:
    """A body of 64 KB pieces of white space, 256 MB of them in the end; `taken` says how many were sent."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, _: Received, reply: Reply) -> Reply:
        reply.body = _Endless(self)
        return reply


class _CutOff(list[bytes]):
    def __iter__(self) -> Iterator[bytes]:
        yield from super().__iter__()
        raise HangupError


class _Endless(list[bytes]):
    def __init__(self, told: Endless) -> None:
        super().__init__()
        self._told = told

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(ENDLESS_PIECES):
            self._told.taken += 1
            yield b" " * 65_536


def _json(answer: Any, status: int = 200) -> Reply:
    return Reply(status, [("Content-Type", "application/json; charset=utf-8")], json.dumps(answer).encode())
