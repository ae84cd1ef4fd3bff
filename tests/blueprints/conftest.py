from collections.abc import Iterator

import pytest

from tests.support import stores


@pytest.fixture(scope="session")
def mongo() -> Iterator[stores.MongoChild]:
    with stores.mongodb() as child:
        yield child


@pytest.fixture(scope="session")
def redis_server() -> Iterator[stores.RedisChild]:
    with stores.valkey() as child:
        yield child
