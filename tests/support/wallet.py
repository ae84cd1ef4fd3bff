"""A TRON wallet for tests: signs as TronWeb's `signMessageV2` does, or as a Ledger does."""

import secrets

import coincurve

from lucid.core.security import tron


class Wallet:
    """A key pair. `Wallet.generate()` makes a fresh one; `sign` gives 65 bytes in hex."""

    def __init__(self, private_key: bytes, ledger: bool = False) -> None:
        self._key = coincurve.PrivateKey(private_key)
        self._ledger = ledger
        self.address = tron.address_of(self._key.public_key)

    @classmethod
    def generate(cls, ledger: bool = False) -> "Wallet":
        return cls(secrets.token_bytes(32), ledger)

    def sign(self, message: str | bytes) -> str:
        raw = message.encode() if isinstance(message, str) else message
        signature = self._key.sign_recoverable(tron.message_hash(raw), hasher=None)
        if self._ledger:
            return signature.hex()
        return "0x" + signature[:64].hex() + format(signature[64] + 27, "02x")
