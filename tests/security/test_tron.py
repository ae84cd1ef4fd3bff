"""Signatures by TronWeb and by Ledger's library as known answers, and all that must not pass as one."""

import json
import time
from pathlib import Path
from typing import Any

import base58
import coincurve
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid.core.security import tron
from tests.support.wallet import Wallet

N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "wallets" / "vectors.json").read_text("utf-8")
)["vectors"]


def made_by(*makers: str) -> list[Any]:
    return [
        pytest.param(v, id=f"{v['by']}-{v['name'][:20]}-{v['address'][:5]}")
        for v in VECTORS
        if v["by"] in makers
    ]


def parts(signature: str) -> tuple[int, int, int]:
    raw = bytes.fromhex(signature.removeprefix("0x"))
    return int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:64], "big"), raw[64]


def joined(r: int, s: int, v: int) -> str:
    return f"{r:064x}{s:064x}{v:02x}"


@pytest.mark.parametrize("vector", made_by("tronweb_v2", "ledger", "ledger_recorded"))
def test_wallets_own_signatures(vector: dict[str, Any]) -> None:
    message = bytes.fromhex(vector["message_hex"])
    address, signature = vector["address"], vector["signature"]
    assert tron.recover_address(message, signature) == address
    assert tron.verify(address, message, signature)
    assert tron.verify(address, message, signature.removeprefix("0x"))
    assert tron.verify(address, message, "0x" + signature.removeprefix("0x").upper())
    # Nobody else's, and for nothing else.
    assert not tron.verify(Wallet.generate().address, message, signature)
    assert not tron.verify(address, message + b" ", signature)
    assert not tron.verify(address, message[:-1] if message else b"x", signature)


def test_the_fixtures_hold_every_recovery_id_of_both_makers() -> None:
    seen = {(v["by"], parts(v["signature"])[2]) for v in VECTORS}
    assert {("tronweb_v2", 27), ("tronweb_v2", 28), ("ledger", 0), ("ledger", 1)} <= seen


@pytest.mark.parametrize("vector", made_by("tronweb_v1"))
def test_the_old_scheme_means_something_else(vector: dict[str, Any]) -> None:
    """v1 writes 32 as every message's length, so it agrees with v2 for messages of 32 bytes alone."""
    message = bytes.fromhex(vector["message_hex"])
    assert tron.verify(vector["address"], message, vector["signature"]) is (len(message) == 32)


def test_composed_and_decomposed_text_are_two_messages() -> None:
    by_name = {v["name"]: v for v in VECTORS if v["by"] == "tronweb_v2"}
    composed, decomposed = by_name["composed"], by_name["decomposed"]
    assert composed["address"] == decomposed["address"]
    assert not tron.verify(
        composed["address"], bytes.fromhex(composed["message_hex"]), decomposed["signature"]
    )


WALLET = Wallet(bytes(31) + b"\x07")
MESSAGE = b"gateway.lucid.example wants you to sign in"
SIGNATURE = WALLET.sign(MESSAGE)
R, S, V = parts(SIGNATURE)


def test_the_signature_that_the_refusals_start_from_is_good() -> None:
    assert tron.verify(WALLET.address, MESSAGE, joined(R, S, V))
    assert tron.verify(WALLET.address, MESSAGE, joined(R, S, V - 27))


REFUSED = {
    "r is 0": joined(0, S, V),
    "r is n": joined(N, S, V),
    "r is n + 1": joined(N + 1, S, V),
    "r is all ones": joined(2**256 - 1, S, V),
    "s is 0": joined(R, 0, V),
    "s is n": joined(R, N, V),
    "s is n - 1": joined(R, N - 1, V),
    "s is n/2 + 1": joined(R, N // 2 + 1, V),
    "s is all ones": joined(R, 2**256 - 1, V),
    "high s, same v": joined(R, N - S, V),
    "high s, other v (which recovers to the signer)": joined(R, N - S, 55 - V),
    "high s, other v, as Ledger writes it": joined(R, N - S, 28 - V),
    "v 2": joined(R, S, 2),
    "v 3": joined(R, S, 3),
    "v 26": joined(R, S, 26),
    "v 29": joined(R, S, 29),
    "v 31": joined(R, S, 31),
    "v of EIP-155": joined(R, S, V + 10),
    "v 255": joined(R, S, 255),
    "empty": "",
    "0x alone": "0x",
    "64 bytes": joined(R, S, V)[:-2],
    "66 bytes": joined(R, S, V) + "00",
    "130 and a half bytes": joined(R, S, V) + "0",
    "0x twice": "0x0x" + joined(R, S, V),
    "0X": "0X" + joined(R, S, V),
    "line feed": joined(R, S, V) + "\n",
    "space inside": joined(R, S, V)[:64] + " " + joined(R, S, V)[65:],
    "sign": "+" + joined(R, S, V)[1:],
    "no hex": "g" + joined(R, S, V)[1:],
    "full-width digits": joined(R, S, V)[:-1] + "\uff11",
}


@pytest.mark.parametrize("signature", REFUSED.values(), ids=REFUSED.keys())
def test_refused_signatures(signature: str) -> None:
    assert tron.recover_address(MESSAGE, signature) is None
    assert not tron.verify(WALLET.address, MESSAGE, signature)


def test_the_library_alone_would_take_the_high_s() -> None:
    """Why the bound stands in our code: were coincurve to refuse it, this would tell."""
    raw = bytes.fromhex(joined(R, N - S, (V - 27) ^ 1))
    key = coincurve.PublicKey.from_signature_and_message(raw, tron.message_hash(MESSAGE), hasher=None)
    assert tron.address_of(key) == WALLET.address


@pytest.mark.parametrize("r", [1, 5, N - 1])
def test_edges_of_r_are_somebody_elses_or_nobodys(r: int) -> None:
    for v in (0, 1, 27, 28):
        recovered = tron.recover_address(MESSAGE, joined(r, S, v))
        assert recovered is None or (recovered != WALLET.address and tron.is_address(recovered))


def test_r_that_is_no_points_x() -> None:
    # x = 5 is on no point of secp256k1 (125 + 7 = 132 is no square there); x = 1 is on two.
    assert tron.recover_address(MESSAGE, joined(5, S, 27)) is None
    assert tron.recover_address(MESSAGE, joined(1, S, 27)) is not None


def test_the_greatest_s_that_is_allowed() -> None:
    assert tron.recover_address(MESSAGE, joined(R, N // 2, V)) is not None


@settings(deadline=None)  # the machine may be busy; nothing here is about speed
@given(st.binary(max_size=600), st.booleans())
def test_what_a_wallet_signs_verifies(message: bytes, ledger: bool) -> None:
    wallet = Wallet(b"\x01" * 32, ledger)
    assert tron.verify(wallet.address, message, wallet.sign(message))


@settings(deadline=None)
@given(st.text(max_size=140))
def test_no_text_raises(text: str) -> None:
    assert tron.recover_address(b"", text) is None
    assert not tron.is_address(text)
    assert not tron.verify(text, b"", text)


GOOD = "TWdnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsYu"
BAD_ADDRESSES = {
    "one character changed": GOOD[:-1] + "v",
    "two characters exchanged": "TdWnWBzFdBP1b8sqZ5RcFDbkV3sBmnxsYu",
    "another version byte": base58.b58encode_check(b"\x42" + bytes(20)).decode(),
    "Bitcoin": "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa",
    "hex form": "41" + "00" * 20,
    "lower case": GOOD.lower(),
    "33 characters": GOOD[:-1],
    "35 characters": GOOD + "u",
    "trailing space": GOOD[:-1] + " ",
    "trailing line feed": GOOD[:-1] + "\n",
    "line feed after it": GOOD + "\n",
    "a zero": "T0" + GOOD[2:],
    "other letters": "T" + "\u0416" * 33,
    "empty": "",
}


@pytest.mark.parametrize("address", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES.keys())
def test_refused_addresses(address: str) -> None:
    assert not tron.is_address(address)
    assert not tron.verify(address, MESSAGE, SIGNATURE)


def test_addresses() -> None:
    assert all(tron.is_address(vector["address"]) for vector in VECTORS)
    assert tron.is_address(base58.b58encode_check(b"\x41" + bytes(20)).decode())


def test_a_long_text_is_refused_before_it_is_decoded() -> None:
    """base58 needs some 0.2 s for 20,000 characters; refusing them unread takes microseconds."""
    before = time.process_time()
    for _ in range(100):
        assert not tron.is_address("T" + "z" * 20_000)
    assert time.process_time() - before < 0.2
