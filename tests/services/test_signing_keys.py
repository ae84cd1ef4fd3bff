"""Keys from elsewhere: fetched, kept, replaced, and kept when a fetch fails."""

import asyncio
import json

import jwt as pyjwt
from cryptography.hazmat.primitives.asymmetric import ed25519

from lucid.core.exchange import Principal
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import TokenVerifier
from lucid.errors import ErrorCode
from lucid.services.signing_keys import SigningKeys
from lucid.settings import TokenSettings

NOW = 1_893_456_000
FIRST, SECOND = (ed25519.Ed25519PrivateKey.generate() for _ in range(2))


def key_set(*keys: ed25519.Ed25519PrivateKey) -> bytes:
    to_jwk = pyjwt.get_algorithm_by_name("EdDSA").to_jwk
    return json.dumps({"keys": [json.loads(to_jwk(key.public_key())) for key in keys]}).encode()


def token(key: ed25519.Ed25519PrivateKey) -> str:
    claims = {"sub": "u", "role": "user", "sid": "f", "jti": "t", "iat": NOW, "exp": NOW + 900}
    return pyjwt.encode({**claims, "iss": "lucid", "aud": "lucid", "typ": "access"}, key, algorithm="EdDSA")


class Endpoint:
    """What the URL answers with."""

    def __init__(self) -> None:
        self.answer: bytes | Exception = ConnectionError("not there yet")
        self.asked: list[str] = []

    async def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_keys_come_stay_and_go() -> None:
    async def main() -> None:
        url = "http://keys.example/jwks"
        endpoint = Endpoint()
        verifier = TokenVerifier(TokenSettings(algorithm="EdDSA", jwks_url=url), lambda: float(NOW))
        memory = TokenMemory(verifier.verify, lambda: float(NOW), 10)
        keys = SigningKeys(url, endpoint.fetch, verifier, memory)

        def good(key: ed25519.Ed25519PrivateKey) -> bool:
            verdict = memory.principal(token(key), 0.0)
            assert isinstance(verdict, Principal) or verdict is ErrorCode.BAD_CREDENTIAL
            return isinstance(verdict, Principal)

        assert not await keys.load()
        assert not keys.loaded
        assert not good(FIRST)

        endpoint.answer = key_set(FIRST)
        assert await keys.load()
        assert keys.loaded
        assert (good(FIRST), good(SECOND)) == (True, False)
        assert len(memory) == 1
        assert await keys.load()  # the same set: nothing is verified anew
        assert len(memory) == 1

        for broken in (TimeoutError(), b"<html>", b'{"keys":[]}'):
            endpoint.answer = broken
            assert not await keys.load()
            assert good(FIRST)

        endpoint.answer = key_set(FIRST, SECOND)
        assert await keys.load()
        assert (good(FIRST), good(SECOND)) == (True, True)
        endpoint.answer = key_set(SECOND)
        assert await keys.load()
        assert (good(FIRST), good(SECOND)) == (False, True)  # although it was remembered
        assert set(endpoint.asked) == {url}

    asyncio.run(main())
