"""Bodies: what is decoded, and how each fault is named."""

from typing import Annotated, Any

import msgspec
import pytest

from lucid.blueprints.access import MAX_BODY_BYTES
from lucid.blueprints.auth import (
    ChallengeBody,
    LogoutBody,
    PasswordLoginBody,
    RefreshBody,
    VerifyBody,
    WalletLoginBody,
)
from lucid.blueprints.coding import Body, Query
from lucid.blueprints.users import RegistrationBody
from lucid.core.validation import checked_address, is_user_id
from lucid.errors import ErrorCode, GatewayError
from tests.support.wallet import Wallet

ADDRESS = Wallet(bytes(31) + b"\x01").address
LOGIN: dict[str, Any] = {"tron_address": ADDRESS, "signature": "0" * 130, "message": "m"}
DEVICE = {"type": "ledger", "device_id": "d"}


def fault(kind: type[msgspec.Struct], body: bytes) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        Body(kind).read(body)
    return caught.value


def encoded(**changes: Any) -> bytes:
    merged = {**LOGIN, **changes}
    return msgspec.json.encode({key: value for key, value in merged.items() if value is not ...})


def test_good_bodies() -> None:
    body = Body(WalletLoginBody).read(encoded(signature="0x" + "aF" * 65, hardware_wallet=DEVICE))
    assert body.hardware_wallet is not None
    assert body.hardware_wallet.type == "ledger"
    assert Body(WalletLoginBody).read(encoded(hardware_wallet=None)).hardware_wallet is None
    assert Body(LogoutBody).read(b"{}").all_logins is False
    assert Body(LogoutBody).read(b' {"all_logins" : true} ').all_logins is True
    assert Body(ChallengeBody).read(b'{"tron_address":"%b"}' % ADDRESS.encode()).tron_address == ADDRESS


NO_JSON = {
    "empty": b"",
    "spaces": b"  ",
    "text": b"hello",
    "cut": encoded()[:-1],
    "two values": encoded() + b"{}",
    "bad UTF-8": b'{"tron_address":"\xff"}',
    "lone surrogate": b'{"tron_address":"\\ud800"}',
    "line feed in a text": b'{"tron_address":"\n"}',
    "single quotes": b"{'tron_address':1}",
    "trailing comma": b'{"tron_address":"x",}',
    "UTF-16": '{"tron_address":1}'.encode("utf-16"),
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON.keys())
def test_no_json(body: bytes) -> None:
    error = fault(WalletLoginBody, body)
    # A body that begins well may be refused for a field before its fault is reached.
    assert error.code in (ErrorCode.BAD_JSON, ErrorCode.BAD_FIELD)
    if body != NO_JSON["two values"]:
        assert error.code is ErrorCode.BAD_JSON or b"tron_address" in body


@pytest.mark.parametrize(
    "body", [b"", b"x", b"\xff", b'{"refresh_token":"\xff"}', b'{"refresh_token":"\\ud800"}']
)
def test_no_json_is_named_so(body: bytes) -> None:
    assert fault(RefreshBody, body).code is ErrorCode.BAD_JSON


BAD_FIELDS: dict[str, tuple[bytes, str]] = {
    "a list": (b"[]", "body"),
    "null": (b"null", "body"),
    "missing": (encoded(message=...), "message"),
    "unknown": (encoded(admin=True), "admin"),
    "wrong type": (encoded(message=7), "message"),
    "null where text is due": (encoded(message=None), "message"),
    "short address": (encoded(tron_address="T"), "tron_address"),
    "address with a line feed": (encoded(tron_address=ADDRESS[:-1] + "\n"), "tron_address"),
    "long address": (encoded(tron_address="T" * 60_000), "tron_address"),
    "no hex": (encoded(signature="g" * 130), "signature"),
    "short signature": (encoded(signature="0" * 128), "signature"),
    "signature with a line feed": (encoded(signature="0" * 130 + "\n"), "signature"),
    "odd signature": (encoded(signature="0" * 131), "signature"),
    "empty message": (encoded(message=""), "message"),
    "long message": (encoded(message="m" * 2_049), "message"),
    "unknown device": (encoded(hardware_wallet={**DEVICE, "type": "x"}), "hardware_wallet.type"),
    "device without id": (encoded(hardware_wallet={"type": "ledger"}), "hardware_wallet.device_id"),
    "device id with NUL": (
        encoded(hardware_wallet={**DEVICE, "device_id": "\0"}),
        "hardware_wallet.device_id",
    ),
    "device id of two lines": (
        encoded(hardware_wallet={**DEVICE, "device_id": "a\n"}),
        "hardware_wallet.device_id",
    ),
    "long device id": (
        encoded(hardware_wallet={**DEVICE, "device_id": "d" * 129}),
        "hardware_wallet.device_id",
    ),
    "unknown in the device": (encoded(hardware_wallet={**DEVICE, "x": 1}), "hardware_wallet.x"),
    "device a text": (encoded(hardware_wallet="ledger"), "hardware_wallet"),
}


@pytest.mark.parametrize("body,field", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_fields_are_named(body: bytes, field: str) -> None:
    error = fault(WalletLoginBody, body)
    assert error.code is ErrorCode.BAD_FIELD
    assert error.details["field"] == field
    assert error.details["reason"]


def test_reasons() -> None:
    assert fault(WalletLoginBody, encoded(message=...)).details["reason"] == "is missing"
    assert fault(WalletLoginBody, encoded(x=1)).details["reason"] == "is not a field of this request"
    assert fault(WalletLoginBody, encoded(message=7)).details["reason"] == "Expected `str`, got `int`"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"tron_address":[', b'{"all_logins":{"a":'])
def test_deep_nesting_is_a_fault_and_no_crash(opening: bytes) -> None:
    body = opening * (MAX_BODY_BYTES // len(opening))
    for kind in (WalletLoginBody, LogoutBody, VerifyBody):
        assert fault(kind, body).code in (ErrorCode.BAD_JSON, ErrorCode.BAD_FIELD)


def test_a_body_of_several_shapes_is_the_one_that_its_names_say() -> None:
    body: Body[msgspec.Struct] = Body(WalletLoginBody, PasswordLoginBody)
    assert isinstance(body.read(b'{"email": "a@b.example", "password": "p"}'), PasswordLoginBody)
    assert isinstance(body.read(encoded()), WalletLoginBody)
    for text, field in (
        (b"{}", "tron_address"),
        (b'{"password": "p"}', "email"),
        (b'{"email": "a@b.example", "password": "p", "other": 1}', "other"),
        (b'{"tron_address": 1, "email": "a@b.example"}', "tron_address"),
    ):
        with pytest.raises(GatewayError) as caught:
            body.read(text)
        assert (caught.value.code, caught.value.details["field"]) == (ErrorCode.BAD_FIELD, field)
    for text in (b"", b"x", b'{"a"'):
        with pytest.raises(GatewayError) as caught:
            body.read(text)
        assert caught.value.code is ErrorCode.BAD_JSON


def test_an_absent_body_is_the_default_where_it_may_be_absent() -> None:
    assert Body(LogoutBody, optional=True).read(b"") == LogoutBody()
    assert fault(LogoutBody, b"").code is ErrorCode.BAD_JSON


class PageQuery(msgspec.Struct, forbid_unknown_fields=True):
    page: Annotated[int, msgspec.Meta(ge=1)] = 1
    name: str | None = None


def test_query_strings() -> None:
    query = Query(PageQuery)
    assert query.read("") == PageQuery()
    assert query.read("page=7&name=%C3%A9+b") == PageQuery(7, "é b")
    assert query.read("name=") == PageQuery(name="")
    for text, field in (
        ("page=0", "page"),
        ("page=", "page"),
        ("page=1.5", "page"),
        ("page=1.0", "page"),
        ("page=1e3", "page"),
        ("page=01", "page"),
        ("page=%2B1", "page"),
        ("page=%201", "page"),
        ("page=%EF%BC%91", "page"),
        ("page=1&page=2", "page"),
        ("pages=1", "pages"),
        ("name=%ff", "query"),
        ("&".join(f"a{n}=" for n in range(40)), "query"),
    ):
        with pytest.raises(GatewayError) as caught:
            query.read(text)
        assert (caught.value.code, caught.value.details["field"]) == (ErrorCode.BAD_FIELD, field), text


def test_small_checks() -> None:
    assert checked_address(ADDRESS) == ADDRESS
    assert is_user_id("a-B_9")
    assert not any(is_user_id(text) for text in ("", "a b", "a\n", "é", "a" * 65, "a/b"))


@pytest.mark.parametrize(
    "body",
    [
        WalletLoginBody(ADDRESS, "s3cret", "s3cret"),
        PasswordLoginBody("ann@example.org", "s3cret"),
        RefreshBody("s3cret"),
        VerifyBody("s3cret"),
        RegistrationBody("ann@example.org", "s3cret"),
    ],
)
def test_no_log_can_show_what_a_body_keeps_secret(body: msgspec.Struct) -> None:
    assert repr(body) == f"{type(body).__name__}(***)"
