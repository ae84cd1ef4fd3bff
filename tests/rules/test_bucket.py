"""The pure store by the contract that the script obeys too, and a search for what must never happen."""

import pytest

from lucid.core.rules.bucket import Bucket, Call, Message, Op, Store
from tests.support.bucket_contract import BucketContract


class TestStore(BucketContract):
    @pytest.fixture
    def driver(self) -> Store:
        return Store()


def test_each_key_needs_a_message() -> None:
    call = Call("r", "", "e", "a", 4, [Message(op=Op.LOOK, limit=1, slot_ms=1, long_ms=1)])
    with pytest.raises(ValueError, match="zip"):
        Store().call(["one", "two"], call, 1)


def test_a_bucket_without_spends_or_leases_frees_nothing() -> None:
    bucket = Bucket(4)
    bucket.advance(1_000, 100)
    assert (bucket.free_ms(10), bucket.reserved(), bucket.slot) == (0, 0, 10)
