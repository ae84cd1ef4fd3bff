"""What requests' fields may be: the types that msgspec decodes, and, where a pattern cannot say it, a function.

A value is taken or refused, never altered: what is stored, signed or compared is what was sent. Each function
returns what it was given and raises BAD_FIELD with the field and the reason; no reason repeats the value.

Every pattern is anchored, every text bounded, and the bound is looked at first. Patterns are shown in the OpenAPI
document, so they are regular expressions of ECMA-262 (with its flag `u`, as JSON Schema 6.3.3 asks) as well as
Python's. Python's `$` also matches before a final line feed, and ECMA-262 knows no `\\Z`; hence `(?!\\n)` behind
it, where the length alone does not settle the matter.
"""

import datetime as dt
import math
import re
import unicodedata
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from lucid.core.security.tron import ADDRESS_CHARACTERS, is_address
from lucid.errors import ErrorCode, GatewayError

# ---- credentials and wallets

TronAddress = Annotated[
    str,
    Meta(
        min_length=ADDRESS_CHARACTERS,
        max_length=ADDRESS_CHARACTERS,
        pattern="^T[1-9A-HJ-NP-Za-km-z]{33}$",
        description="A TRON address: base58check, 34 characters, beginning with T",
        examples=["TWdnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsYu"],
        extra_json_schema={"format": "tron-address"},
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

RefreshTokenText = Annotated[str, Meta(min_length=1, max_length=4_096)]
"""Ours have 43 characters; those of the authentication cluster may be tokens with claims."""
AccessTokenText = Annotated[str, Meta(min_length=1, max_length=4_096)]

MIN_PASSWORD_CHARACTERS: Final = 8
MAX_PASSWORD_CHARACTERS: Final = 128

Password = Annotated[
    str,
    Meta(
        min_length=MIN_PASSWORD_CHARACTERS,
        max_length=MAX_PASSWORD_CHARACTERS,
        description="8 to 128 characters, any that can be typed",
        extra_json_schema={"format": "password", "writeOnly": True},
    ),
]
"""Where one is chosen, pass it through `checked_password`; at login it is only compared."""

# Those of 8 characters and more that head the published lists of leaked passwords, less those that are one
# character repeated.
_COMMON_PASSWORDS: Final = frozenset(
    """
    12345678 123456789 1234567890 0123456789 987654321 87654321 0987654321 12341234 12344321 11223344
    1122334455 12121212 123123123 123321123 147258369 741852963 789456123 123654789 1q2w3e4r 1q2w3e4r5t
    1qaz2wsx 1qazxsw2 q1w2e3r4 q1w2e3r4t5 zaq12wsx qwer1234 1234qwer qwerty12 qwerty123 qwertyui
    qwertyuiop qwerty1234 asdfghjk asdfghjkl zxcvbnm1 zxcvbnm123 abcd1234 1234abcd abc12345 abcdefgh
    a1b2c3d4 aa123456 a1234567 a12345678 password password1 password12 password123 passw0rd p@ssw0rd
    p@ssword pa$$word passwort welcome1 welcome123 letmein1 iloveyou iloveyou1 sunshine princess princess1
    football football1 baseball superman starwars jennifer michelle computer corvette trustno1 whatever
    changeme changeme123 admin123 admin1234 administrator charlie1 samantha liverpool internet mercedes
    """.split()
)

Email = Annotated[
    str,
    Meta(
        min_length=6,
        max_length=254,
        pattern=(
            "^(?=.{1,64}@)[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
            "@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9]$(?!\\n)"
        ),
        description="An e-mail address in ASCII, such as name@example.org",
        extra_json_schema={"format": "email"},
    ),
]
"""The addresses that people have: see `checked_email`."""

# ---- ids, names and numbers

UserId = Annotated[
    str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9_-]+$(?!\\n)", description="A user's id")
]
SessionId = Annotated[
    str,
    Meta(
        min_length=8,
        max_length=64,
        pattern="^[A-Za-z0-9_-]+$(?!\\n)",
        description="A session's id: a UUID, or another of A-Z, a-z, 0-9, _ and -",
    ),
]

# C0, DEL and C1; the controls that turn the direction of writing (U+061C, U+200E and F, U+202A to E, U+2066 to 9),
# with which a name can be shown as another (CVE-2021-42574); U+2028 and 9, which end lines; noncharacters. Lone
# surrogates are not named: without the flag `u` they would be halves of good characters, and no UTF-8 holds any.
_UNFIT: Final = (
    "\\u0000-\\u001f\\u007f-\\u009f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069"
    "\\ufdd0-\\ufdef\\ufffe\\uffff"
)

ShortText = Annotated[str, Meta(min_length=1, max_length=128, pattern=f"^[^{_UNFIT}]+$(?!\\n)")]
"""Text for people, of one line. Pass it through `checked_text` (or `normal_text`) before it is stored."""

ApiKeyName = ShortText
SessionStatus = Literal["INITIALIZING", "ACTIVE", "COMPLETED", "TERMINATED", "FAILED"]

Moment = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
"""A time as an answer shows it: RFC 3339, UTC."""
Port = Annotated[int, Meta(ge=1, le=65_535)]

DEFAULT_PAGE: Final = 1
DEFAULT_PAGE_LIMIT: Final = 20
PageNumber = Annotated[int, Meta(ge=1, le=1_000_000, description="Which page, from 1; 1 where absent")]
"""Bounded, because a database walks over what it skips."""
PageLimit = Annotated[int, Meta(ge=1, le=100, description="How many on a page; 20 where absent")]

Timestamp = Annotated[dt.datetime, Meta(tz=True, description="A moment, RFC 3339 with its zone")]
"""Where it must lie ahead: `checked_future`."""

MAX_FILE_BYTES: Final = 100 * 1_048_576
MAX_CHUNK_BYTES: Final = 10 * 1_048_576
FileBytes = Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
ChunkBytes = Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]

MAX_METADATA_BYTES: Final = 16_384
MAX_METADATA_DEPTH: Final = 8
MAX_METADATA_KEYS: Final = 256
MAX_METADATA_KEY_CHARACTERS: Final = 128
Metadata = Annotated[
    dict[str, Any],
    Meta(max_length=MAX_METADATA_KEYS, description="A JSON object of at most 16 KB and 8 levels"),
]
"""Pass it through `checked_metadata` before it is stored."""


class HardwareWalletText(Struct, frozen=True, forbid_unknown_fields=True):
    """Which hardware wallet signed, as the caller says; nothing rests on it."""

    type: Literal["ledger", "trezor", "keepkey"]
    device_id: ShortText


def bad_field(field: str, reason: str) -> GatewayError:
    """The error of one field, with the details that every such answer has."""
    return GatewayError(ErrorCode.BAD_FIELD, f"{field}: {reason}", details={"field": field, "reason": reason})


_USER_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SESSION_ID: Final = re.compile(r"[A-Za-z0-9_-]{8,64}")


def is_user_id(text: str) -> bool:
    """Whether `text` can be a user's id: a UUID, or what an operator chose for a token minted by hand."""
    return _USER_ID.fullmatch(text) is not None


def is_session_id(text: str) -> bool:
    """Whether `text` can be a session's id. A UUID, the spelling of those made here, is one of these texts too."""
    return _SESSION_ID.fullmatch(text) is not None


def checked_address(address: str, field: str = "tron_address") -> str:
    """`address` if its checksum is right. Raises BAD_FIELD."""
    if not is_address(address):
        raise bad_field(field, "must be an address whose checksum is right")
    return address


# ---- e-mail and passwords

_ATOM: Final = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LOCAL_PART: Final = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
HOST_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
MAX_HOST_CHARACTERS: Final = 253


def checked_email(text: str, field: str = "email") -> str:
    """`text` if it is an e-mail address that mail can be sent to from anywhere.

    That is less than RFC 5321 allows, on purpose. ASCII only: an address beyond it needs SMTPUTF8 (RFC 6531) on
    every hop, and two that look alike would be two accounts; a domain of other letters is written as `xn--…`. The
    local part is a dot-atom of at most 64 characters: quoted ones (`"a b"@…`) are what nobody has and what breaks
    the programs downstream. A domain of two labels at least, the last of which begins with a letter: no address
    literals (`[127.0.0.1]`), no bare IPv4 addresses, no names of the local network. 254 characters in all (RFC
    3696, erratum 1690). Whether it is anybody's only a mail can tell.
    """
    if not 6 <= len(text) <= 254:
        raise bad_field(field, "must have 6 to 254 characters")
    if not text.isascii():
        raise bad_field(field, "must be in ASCII; a domain of other letters is written as xn--...")
    local, at, domain = text.rpartition("@")
    if not at or len(local) > 64 or _LOCAL_PART.fullmatch(local) is None:
        raise bad_field(field, "must have 1 to 64 plain characters before its @, no quotes, no dots in a row")
    labels = domain.split(".")
    if len(labels) < 2 or any(HOST_LABEL.fullmatch(label) is None for label in labels):
        raise bad_field(field, "must have a domain such as example.org after its @")
    if len(labels[-1]) < 2 or not labels[-1][0].isalpha():
        raise bad_field(field, "must have a domain that ends in a top-level name, such as example.org")
    return text


def email_key(email: str) -> str:
    """What two e-mail addresses are compared by: RFC 5321, 2.4, lets a host tell `Ann@` from `ann@`, and none that
    people use does. Look accounts up by it, and send mail to what was given.
    """
    return email.lower()


def checked_password(password: str, email: str | None = None, field: str = "password") -> str:
    """`password` if it may be chosen. `email`: the account's own, if it has one.

    NIST SP 800-63B, 5.1.1.2: long enough, all characters allowed, no rules of composition; refused if it is
    common, repetitive or names the account. Never altered and never shortened.
    """
    if not MIN_PASSWORD_CHARACTERS <= len(password) <= MAX_PASSWORD_CHARACTERS:
        raise bad_field(field, f"must have {MIN_PASSWORD_CHARACTERS} to {MAX_PASSWORD_CHARACTERS} characters")
    # HMAC takes a key and the same key with NULs behind it for one, besides that nobody can type them.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in password):
        raise bad_field(field, "must have no control characters")
    folded = normal_text(password).casefold()
    if len(set(folded)) == 1:
        raise bad_field(field, "must not be one character repeated")
    if folded in _COMMON_PASSWORDS:
        raise bad_field(field, "is one of the most common passwords; choose another")
    if email is not None:
        address = normal_text(email).casefold()
        if folded in (address, address.rpartition("@")[0]):
            raise bad_field(field, "must not be the e-mail address or its first part")
    return password


# ---- texts

_NOT_FIT: Final = re.compile(f"[{_UNFIT}\\ud800-\\udfff]")


def normal_text(text: str) -> str:
    """`text` in Unicode's composed form (NFC), so that what looks the same is the same.

    For what the gateway itself compares or records of a device. A field that people choose is not altered:
    `checked_text` asks for this form.
    """
    return unicodedata.normalize("NFC", text)


def checked_text(text: str, field: str, max_length: int) -> str:
    """`text` if it is one line of 1 to `max_length` characters, in NFC and without what cannot be seen but
    changes what is seen: controls, turns of direction, noncharacters, lone surrogates.
    """
    if not 1 <= len(text) <= max_length:
        raise bad_field(field, f"must have 1 to {max_length} characters")
    if _NOT_FIT.search(text) is not None or any(ord(character) & 0xFFFE == 0xFFFE for character in text):
        raise bad_field(field, "must have no control characters, line ends or controls of direction")
    if not unicodedata.is_normalized("NFC", text):
        raise bad_field(field, "must be in Unicode's composed form (NFC)")
    return text


# ---- numbers and moments


def checked_file_size(size: int, field: str = "size") -> int:
    """`size`, in bytes, if a file may have it: 1 to MAX_FILE_BYTES."""
    return _checked_size(size, MAX_FILE_BYTES, field)


def checked_chunk_size(size: int, field: str = "size") -> int:
    """`size`, in bytes, if a session's chunk may have it: 1 to MAX_CHUNK_BYTES."""
    return _checked_size(size, MAX_CHUNK_BYTES, field)


def _checked_size(size: int, most: int, field: str) -> int:
    if isinstance(size, bool) or not 1 <= size <= most:
        raise bad_field(field, f"must be from 1 to {most} bytes")
    return size


def checked_future(moment: dt.datetime, now: dt.datetime, field: str = "expires_at") -> dt.datetime:
    """`moment` in UTC if it lies after `now`. Both with their zone."""
    try:
        utc = moment.astimezone(dt.UTC)
    except OverflowError:  # the first and the last day of the calendar, seen from another zone
        raise bad_field(field, "must be a moment of the years 1 to 9999 in UTC") from None
    if utc <= now:
        raise bad_field(field, "must lie in the future")
    return utc


# ---- metadata

_NUL_OR_SURROGATE: Final = re.compile("[\\u0000\\ud800-\\udfff]")


def checked_metadata(value: dict[str, Any], field: str = "metadata") -> dict[str, Any]:
    """`value` if it is a JSON object that MongoDB stores as it is and that stays small: see the constants.

    A key has 1 to 128 printable characters, does not begin with `$` and holds no dot; a text holds no NUL; a whole
    number fits in 64 bits with its sign; other numbers are finite. The error's field is the path to the fault:
    `metadata.a[0].b`.
    """
    if not isinstance(value, dict):
        raise bad_field(field, "must be an object")
    _MetadataWalk(field).check(value, field, 1)
    if len(msgspec.json.encode(value)) > MAX_METADATA_BYTES:
        raise bad_field(field, _TOO_LARGE)
    return value


_TOO_LARGE: Final = f"must have at most {MAX_METADATA_BYTES} bytes as JSON"


class _MetadataWalk:
    """One walk over one object: it ends at the first fault, and after so many values as could not be small."""

    __slots__ = ("_field", "_keys", "_values")

    def __init__(self, field: str) -> None:
        self._field = field
        self._keys = 0
        self._values = 0

    def check(self, value: object, path: str, depth: int) -> None:
        # Each value takes two bytes at least, with its comma.
        self._values += 1
        if self._values > MAX_METADATA_BYTES // 2:
            raise bad_field(self._field, _TOO_LARGE)
        match value:
            case None | bool():
                pass
            case str():
                if len(value) > MAX_METADATA_BYTES:
                    raise bad_field(path, _TOO_LARGE)
                if _NUL_OR_SURROGATE.search(value) is not None:
                    raise bad_field(path, "must have no NUL and no lone surrogate")
            case int():
                if not -(2**63) <= value < 2**63:
                    raise bad_field(path, "must be a whole number of 64 bits")
            case float():
                if not math.isfinite(value):
                    raise bad_field(path, "must be a finite number")
            case dict() | list():
                if depth > MAX_METADATA_DEPTH:
                    raise bad_field(path, f"must have at most {MAX_METADATA_DEPTH} levels")
                if isinstance(value, dict):
                    self._check_keys(value, path)
                    for key, inner in value.items():
                        self.check(inner, f"{path}.{key}", depth + 1)
                else:
                    for place, inner in enumerate(value):
                        self.check(inner, f"{path}[{place}]", depth + 1)
            case _:
                raise bad_field(path, "must be JSON")

    def _check_keys(self, value: dict[Any, Any], path: str) -> None:
        self._keys += len(value)
        if self._keys > MAX_METADATA_KEYS:
            raise bad_field(path, f"must have at most {MAX_METADATA_KEYS} keys in all")
        for key in value:
            if not isinstance(key, str):
                raise bad_field(path, "must be JSON")
            if not 1 <= len(key) <= MAX_METADATA_KEY_CHARACTERS or not key.isprintable():
                raise bad_field(
                    path, f"must have keys of 1 to {MAX_METADATA_KEY_CHARACTERS} printable characters"
                )
            if key.startswith("$") or "." in key:
                raise bad_field(path, "must have no key that begins with $ or holds a dot")
