"""The types that requests' fields have, as msgspec decodes them. What a pattern cannot say is a function
below.

Every pattern is anchored and every text bounded in length. Python's `$` also matches before a final line
feed, and OpenAPI knows no `\\Z`; hence `(?!\\n)` behind it, where the length alone does not settle the
matter.
"""

import re
import unicodedata
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from lucid.core.security import tron
from lucid.errors import ErrorCode, GatewayError

TronAddress = Annotated[
    str,
    Meta(
        min_length=tron.ADDRESS_CHARACTERS,
        max_length=tron.ADDRESS_CHARACTERS,
        pattern="^T[1-9A-HJ-NP-Za-km-z]{33}$",
        description="A TRON address: base58check, 34 characters, beginning with T",
        examples=["TWdnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsYu"],
    ),
]
"""The shape only; `checked_address` looks at the checksum."""

SignatureHex = Annotated[
    str,
    Meta(
        min_length=130,
        max_length=132,
        pattern="^(0x)?[0-9a-fA-F]{130}$(?!\\n)",
        description="r, s and v, 65 bytes in hex",
    ),
]

ChallengeText = Annotated[str, Meta(min_length=1, max_length=2_048)]
"""The challenge as it was given out. Compared whole, so nothing more is asked of it."""

RefreshTokenText = Annotated[str, Meta(min_length=1, max_length=256)]
AccessTokenText = Annotated[str, Meta(min_length=1, max_length=4_096)]

ShortText = Annotated[
    str,
    Meta(min_length=1, max_length=128, pattern="^[^\\u0000-\\u001f\\u007f-\\u009f\\u2028\\u2029]+$(?!\\n)"),
]
"""Text for people, of one line. Pass it through `normal_text` before it is stored."""


class HardwareWalletText(Struct, frozen=True, forbid_unknown_fields=True):
    """Which hardware wallet signed, as the caller says; nothing rests on it."""

    type: Literal["ledger", "trezor", "keepkey"]
    device_id: ShortText


_USER_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_user_id(text: str) -> bool:
    """Whether `text` can be a user's id: a UUID, or what an operator chose for a token minted by hand."""
    return _USER_ID.fullmatch(text) is not None


def checked_address(address: str, field: str = "tron_address") -> str:
    """`address` if its checksum is right. Raises BAD_FIELD."""
    if not tron.is_address(address):
        raise bad_field(field, "must be a TRON address: its checksum is wrong")
    return address


def normal_text(text: str) -> str:
    """`text` in Unicode's composed form (NFC), so that what looks the same is the same."""
    return unicodedata.normalize("NFC", text)


def bad_field(field: str, reason: str) -> GatewayError:
    """The error of one field, with the details that every such answer has."""
    return GatewayError(ErrorCode.BAD_FIELD, f"{field}: {reason}", details={"field": field, "reason": reason})
