"""What is stored, as structs. `_id` is the key; times are UTC with milliseconds, MongoDB's own precision.

Field names here are those of the collections, so that a document converts in one step. A document that does
not convert was written by somebody else's hand; that is an internal error, not a caller's.
"""

import datetime as dt
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


class HardwareWallet(msgspec.Struct, frozen=True):
    """The hardware wallet of the last login that came from one."""

    type: str
    device_id: str


class UserDocument(msgspec.Struct, frozen=True, rename={"user_id": "_id"}):
    """Collection `users`. A deleted user keeps its row with `live` false, its address and email are free
    again.

    `email` has the spelling that was given, `email_key` is what is unique and looked up: `email_key(email)`.
    `password` is the text of a PBKDF2 hash, `repr` does not show it. Access tokens of the user that were issued
    at `tokens_revoked_at` or earlier are dead.
    """

    user_id: str
    live: bool
    role: str
    created_at: dt.datetime
    updated_at: dt.datetime
    tron_address: str | None = None
    email: str | None = None
    email_key: str | None = None
    password: str | None = None
    hardware_wallet: HardwareWallet | None = None
    last_login_at: dt.datetime | None = None
    tokens_revoked_at: dt.datetime | None = None
    deleted_at: dt.datetime | None = None

    def __repr__(self) -> str:
        shown = (
            f"{name}={'***' if name == 'password' else repr(value)}"
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None
        )
        return f"UserDocument({', '.join(shown)})"


class FamilyDocument(msgspec.Struct, frozen=True, rename={"family": "_id"}):
    """Collection `refresh_tokens`, `kind` "family": one login. `current` is the digest of its one good
    token.
    """

    family: str
    user_id: str
    current: bytes
    created_at: dt.datetime
    expires_at: dt.datetime
    revoked_at: dt.datetime | None = None


class RevokedLogins(msgspec.Struct, frozen=True):
    """What ended before its time.

    `families`: (family, when it was revoked, until when its tokens would have lived; None: a login's own, so for a
    token's life). `users`: (user id, the moment at or before which all access tokens of that user that are dead were
    issued).
    """

    families: list[tuple[str, dt.datetime, dt.datetime | None]]
    users: list[tuple[str, dt.datetime]]


class ApiKeyDocument(msgspec.Struct, frozen=True, rename={"key_id": "_id"}):
    """Collection `api_keys`. `digest` is SHA-256 of the key, 32 bytes."""

    key_id: str
    digest: bytes
    user_id: str
    name: str
    role: str
    created_at: dt.datetime
    expires_at: dt.datetime | None = None
    last_used_at: dt.datetime | None = None
    revoked_at: dt.datetime | None = None


class OutboxEntry(msgspec.Struct, frozen=True):
    """Something that session management has yet to be told of a session, as it was `at` that moment."""

    entry_id: str
    kind: Literal["create", "terminate"]
    at: dt.datetime


class SessionDocument(msgspec.Struct, frozen=True, rename={"session_id": "_id"}):
    """Collection `sessions`. `outbox` is what is still to be told, the oldest first; `outbox_due_at` is when
    the next worker may try to, None while there is nothing.
    """

    session_id: str
    user_id: str
    status: str
    metadata: dict[str, Any]
    created_at: dt.datetime
    updated_at: dt.datetime
    ended_at: dt.datetime | None = None
    outbox: tuple[OutboxEntry, ...] = ()
    outbox_due_at: dt.datetime | None = None


def read(document: Mapping[str, Any], kind: type[T]) -> T:
    """The struct of a stored document; fields that this release does not know are passed over."""
    return msgspec.convert(document, kind)


def row(document: msgspec.Struct) -> dict[str, Any]:
    """The document to store for a struct: fields that are None are absent, times are cut to milliseconds."""
    fields = msgspec.to_builtins(document, builtin_types=(dt.datetime, bytes))
    return {name: stored(value) for name, value in fields.items() if value is not None}


def stored(value: Any) -> Any:
    """One value as it is stored: a time has milliseconds, a struct is a document."""
    if isinstance(value, dt.datetime):
        return milliseconds(value)
    return row(value) if isinstance(value, msgspec.Struct) else value


def milliseconds(moment: dt.datetime) -> dt.datetime:
    """`moment` as MongoDB will give it back."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def utc_now() -> dt.datetime:
    """The wall clock."""
    return dt.datetime.now(dt.UTC)
