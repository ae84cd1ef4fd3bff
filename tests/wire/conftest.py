"""A Valkey of this test session, a child of this process on a free port; empty for each test."""

from collections.abc import Iterator

import pytest
import redis

from tests.support import markers
from tests.support.stores import RedisChild, valkey


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[RedisChild]:
    with valkey() as child:
        yield child


@pytest.fixture
def server(valkey_server: RedisChild) -> RedisChild:
    """Running and empty, also when a test before ended it and failed."""
    if not valkey_server.answers():
        valkey_server.stop()
        valkey_server.start()
    with redis.Redis(port=valkey_server.port) as client:
        assert client.info("server")["process_id"] == valkey_server.pid
        client.flushall()
        client.script_flush()
        markers.plant(client)
    return valkey_server
