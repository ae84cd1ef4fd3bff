"""What is stored, as structs. `_id` is the key; times are UTC with milliseconds, MongoDB's own precision.

Field names here are those of the collections, so that a document converts in one step. A document that does
not convert was written by somebody else's hand; that is an internal error, not a caller's.
"""

import datetime as dt
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


class HardwareWallet(msgspec.Struct, frozen=True):
    """The hardware wallet of the last login that came from one."""

    type: str
    device_id: str


class UserDocument(msgspec.Struct, frozen=True, rename={"user_id": "_id"}):
    """Collection `users`. A deleted user keeps its row with `live` false, its address and email are free
    again.
    """

    user_id: str
    live: bool
    role: str
    created_at: dt.datetime
    updated_at: dt.datetime
    tron_address: str | None = None
    email: str | None = None
    hardware_wallet: HardwareWallet | None = None
    last_login_at: dt.datetime | None = None
    deleted_at: dt.datetime | None = None


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


class ApiKeyDocument(msgspec.Struct, frozen=True, rename={"key_id": "_id"}):
    """Collection `api_keys`. `digest` is SHA-256 of the key, 32 bytes."""

    key_id: str
    digest: bytes
    user_id: str
    name: str
    role: str
    created_at: dt.datetime
    expires_at: dt.datetime | None = None


def read(document: Mapping[str, Any], kind: type[T]) -> T:
    """The struct of a stored document; fields that this release does not know are passed over."""
    return msgspec.convert(document, kind)


def milliseconds(moment: dt.datetime) -> dt.datetime:
    """`moment` as MongoDB will give it back."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
