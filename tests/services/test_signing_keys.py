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
FIRST, SECOND, THIRD = (ed25519.Ed25519PrivateKey.generate() for _ in range(3))


def key_set(*keys: ed25519.Ed25519PrivateKey) -> bytes:
    to_jwk = pyjwt.get_algorithm_by_name("EdDSA").to_jwk
    return json.dumps({"keys": [json.loads(to_jwk(key.public_key())) for key in keys]}).encode()


def token(key: ed25519.Ed25519PrivateKey, **header: str) -> str:
    claims = {"sub": "u", "role": "user", "sid": "f", "jti": "t", "iat": NOW, "exp": NOW + 900}
    return pyjwt.encode(
        {**claims, "iss": "lucid", "aud": "lucid", "typ": "access"}, key, algorithm="EdDSA", headers=header
    )


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
        keys = SigningKeys(url, endpoint.fetch)
        keys.attach(verifier, memory)

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


def named_set(**keys: ed25519.Ed25519PrivateKey) -> bytes:
    to_jwk = pyjwt.get_algorithm_by_name("EdDSA").to_jwk
    return json.dumps(
        {"keys": [{**json.loads(to_jwk(key.public_key())), "kid": name} for name, key in keys.items()]}
    ).encode()


def test_a_token_that_names_a_new_key_has_the_set_fetched_at_most_every_thirty_seconds() -> None:
    async def main() -> None:
        now = 100.0
        endpoint = Endpoint()
        endpoint.answer = named_set(a=FIRST)
        keys = SigningKeys("http://keys.example/jwks", endpoint.fetch, lambda: now)
        settings = TokenSettings(algorithm="EdDSA", jwks_url="http://keys.example/jwks")
        verifier = TokenVerifier(settings, lambda: float(NOW), may_fetch=keys.may_fetch)
        memory = TokenMemory(verifier.verify, lambda: float(NOW), 10)
        keys.attach(verifier, memory)

        assert memory.principal(token(FIRST, kid="a"), now) is None, "nothing was fetched yet"
        await keys.load()
        assert isinstance(memory.principal(token(FIRST, kid="a"), now), Principal)

        endpoint.answer = named_set(a=FIRST, b=SECOND)
        now += 29.9
        fresh = token(SECOND, kid="b", jku="http://evil.example/", x5u="http://evil.example/")
        assert memory.principal(fresh, now) is ErrorCode.BAD_CREDENTIAL
        now += 0.1
        assert memory.principal(fresh, now) is None
        # Whom a fetch would not help is not waited for: no name, a known name, a good signature.
        assert memory.principal(token(SECOND), now) is ErrorCode.BAD_CREDENTIAL
        assert memory.principal(token(SECOND, kid="a"), now) is ErrorCode.BAD_CREDENTIAL
        assert isinstance(memory.principal(token(FIRST, kid="z"), now), Principal)
        await asyncio.gather(*(keys.load_for_unknown() for _ in range(50)))
        await asyncio.gather(*(keys.load_for_unknown() for _ in range(50)))
        assert len(endpoint.asked) == 2
        assert isinstance(memory.principal(fresh, now), Principal)
        assert memory.principal(token(THIRD, kid="invented"), now) is ErrorCode.BAD_CREDENTIAL
        assert set(endpoint.asked) == {"http://keys.example/jwks"}

    asyncio.run(main())
