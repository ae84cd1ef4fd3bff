import re
import uuid

import pytest

from lucid.core.security import api_keys, nonces


def test_sizes_and_shapes() -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", nonces.challenge_nonce())
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", nonces.refresh_token())
    assert uuid.UUID(nonces.new_id()).version == 4


def test_nothing_comes_twice() -> None:
    for make in (nonces.challenge_nonce, nonces.refresh_token, nonces.new_id, api_keys.new_api_key):
        assert len({make() for _ in range(1_000)}) == 1_000
    assert len({nonces.timed_id(1_000.0) for _ in range(1_000)}) == 1_000


def test_known_digest() -> None:
    # SHA-256 of "abc", FIPS 180-2, B.1.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert api_keys.digest("abc").hex() == known


@pytest.mark.parametrize("moment", [0.0, 0.001, 1_893_456_000.0, 1_893_456_000.123, 4_102_444_800.999])
def test_a_timed_id_tells_its_moment(moment: float) -> None:
    timed = nonces.timed_id(moment)
    parsed = uuid.UUID(timed)
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    told = nonces.moment_of(timed)
    assert told is not None
    assert 0 <= moment - told < 0.0011


@pytest.mark.parametrize("text", ["", "x", str(uuid.UUID(int=0)), "8f14e45f-ceea-467f-a8d9-3e1a3f5c0b11"])
def test_other_ids_tell_none(text: str) -> None:
    assert nonces.moment_of(text) is None


def test_api_keys() -> None:
    key = api_keys.new_api_key()
    assert api_keys.is_api_key(key)
    assert key.startswith("lucid_")
    assert len(api_keys.digest(key)) == 32
    for bad in ("", key[:-1], key + "A", key + "\n", "lucid-" + key[6:], key[:-1] + "=", key.upper()):
        assert not api_keys.is_api_key(bad)
