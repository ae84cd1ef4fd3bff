"""The only place that knows TRON: whether a wallet signed a message, and what an address looks like.

A wallet signs keccak256("\\x19TRON Signed Message:\\n" + decimal length in bytes + message) on secp256k1;
that is what TronWeb's `signMessageV2` and Ledger's TRON app do (TIP-191). TronWeb's older `signMessage`
writes `32` whatever the length; it is not accepted, so that one signature means one message.
"""

import re
from typing import Final

import base58
import coincurve
from Crypto.Hash import keccak

ADDRESS_CHARACTERS: Final = 34
CHAIN_ID: Final = "tron:0x2b6653dc"
"""The main network, as CAIP-2 spells it."""
SIGN_IN: Final = "{domain} wants you to sign in with your TRON account:"
"""How a CAIP-122 text begins."""
_ADDRESS_VERSION: Final = 0x41
_SIGNATURE_BYTES: Final = 65
_HEADER: Final = b"\x19TRON Signed Message:\n"

# SEC 2 v2.0, 2.4.1: the order of secp256k1. Half of it bounds s, as in EIP-2: (r, n - s) verifies as well as
# (r, s), so the upper half is refused and a signature has one spelling.
_N: Final = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
_HALF_N: Final = _N // 2

# TronWeb writes 27 or 28, Ledger the bare recovery id.
_RECOVERY_IDS: Final = {0: 0, 1: 1, 27: 0, 28: 1}

_ADDRESS_SHAPE: Final = re.compile(r"T[1-9A-HJ-NP-Za-km-z]{33}")
_SIGNATURE_SHAPE: Final = re.compile(r"(?:0x)?([0-9a-fA-F]{130})")


def _keccak256(data: bytes) -> bytes:
    return keccak.new(digest_bits=256, data=data).digest()


def is_address(text: str) -> bool:
    """Whether `text` is a TRON address: base58check of 0x41 and 20 bytes.

    The shape is checked first: base58 decoding is quadratic, 20,000 characters cost 0.17 s.
    """
    if _ADDRESS_SHAPE.fullmatch(text) is None:
        return False
    try:
        raw = base58.b58decode_check(text)
    except ValueError:
        return False
    return len(raw) == 21 and raw[0] == _ADDRESS_VERSION


def address_of(public_key: coincurve.PublicKey) -> str:
    """The address of a key: base58check(0x41 + last 20 bytes of keccak256(x + y))."""
    point = public_key.format(compressed=False)[1:]
    return base58.b58encode_check(bytes([_ADDRESS_VERSION]) + _keccak256(point)[-20:]).decode("ascii")


def message_hash(message: bytes) -> bytes:
    """The 32 bytes that a wallet signs for `message`."""
    return _keccak256(_HEADER + str(len(message)).encode("ascii") + message)


def recover_address(message: bytes, signature_hex: str) -> str | None:
    """The address whose key made this signature of `message`, or None where it is no signature at all.

    `signature_hex`: r (32 bytes), s (32), v (1) in hex, `0x` before it or not. Refused: another length, r
    or s of 0 or from n on, s > n/2, v outside {0, 1, 27, 28}, and r that is no point's x. Any other
    signature recovers to *some* address: compare it, or call `verify`.
    """
    match = _SIGNATURE_SHAPE.fullmatch(signature_hex)
    if match is None:
        return None
    raw = bytes.fromhex(match[1])
    recovery_id = _RECOVERY_IDS.get(raw[_SIGNATURE_BYTES - 1])
    if recovery_id is None:
        return None
    r = int.from_bytes(raw[:32], "big")
    s = int.from_bytes(raw[32:64], "big")
    # libsecp256k1 recovers high-s signatures without a word, so the bound stands here.
    if not (0 < r < _N and 0 < s <= _HALF_N):
        return None
    try:
        key = coincurve.PublicKey.from_signature_and_message(
            raw[:64] + bytes([recovery_id]), message_hash(message), hasher=None
        )
    except Exception:  # noqa: BLE001 — coincurve raises a bare Exception where no point has this x
        return None
    return address_of(key)


def verify(address: str, message: bytes, signature_hex: str) -> bool:
    """Whether the wallet of `address` signed `message`. False for anything malformed; never raises."""
    return is_address(address) and recover_address(message, signature_hex) == address
