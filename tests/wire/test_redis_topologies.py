"""RedisLink and the control channel on a Redis Cluster and behind sentinels, through failovers of real servers."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis
import uvloop
from redis.exceptions import ClusterDownError, MovedError, ResponseError
from redis.exceptions import ConnectionError as LostError

from lucid import probe
from lucid.core.wire import redis_topology
from lucid.core.wire.control_channel import STREAM_KEY, WORKERS_KEY, ControlChannel
from lucid.core.wire.redis_cluster import key_of
from lucid.core.wire.redis_link import ANSWER_SECONDS, AWAY_ERRORS, RedisLink, new_holder
from lucid.core.wire.redis_slots import SLOTS, slot_of, tag_of
from lucid.core.wire.redis_topology import ASKED_AT_ONCE, Told, split_address
from lucid.errors import ErrorCode, GatewayError
from lucid.services.challenges import Challenges
from lucid.services.login_delays import LoginDelays
from tests.support.stores import (
    ClusterOfChildren,
    RedisChild,
    WatchedChildren,
    address_of,
    free_port,
    redis_sentinels,
)
from tests.support.wallet import Wallet

BOUND_SECONDS = ANSWER_SECONDS + 0.5
"""What a command may take at most, on a machine that does other things too."""

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test on each kind of event loop."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run_on(coroutine: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(coroutine, 30))

    return run_on


def run_on_uvloop(coroutine: Coroutine[Any, Any, None]) -> None:
    """As it is served. A failover costs seconds, so the other kind of loop is left out."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(coroutine, 30))


@pytest.fixture
def sentinels() -> Iterator[WatchedChildren]:
    # Each test its own: to take a former master back costs sentinels some ten seconds, to begin anew two.
    with redis_sentinels() as made:
        yield made


@contextlib.asynccontextmanager
async def linked(uri: str) -> AsyncIterator[RedisLink]:
    link = RedisLink(uri)
    try:
        yield link
    finally:
        await link.close()


async def until(true: Callable[[], object], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


class Tries:
    """A command again and again: when it failed, by what, and how long the longest took."""

    def __init__(self, attempt: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._attempt = attempt
        self.faults: list[Exception] = []
        self.longest_seconds = 0.0
        self.done = 0

    async def once(self) -> bool:
        begun = time.monotonic()
        try:
            await self._attempt()
        except AWAY_ERRORS as error:
            self.faults.append(error)
            return False
        finally:
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - begun)
        self.done += 1
        return True

    async def until_done(self, seconds: float = 10.0) -> float:
        """Until it works, and after how many seconds that was."""
        begun = time.monotonic()
        while not await self.once():
            assert time.monotonic() - begun < seconds, self.faults[-1]
            await asyncio.sleep(0.05)
        return time.monotonic() - begun

    async def while_not(self, event: asyncio.Event) -> None:
        while not event.is_set():
            await self.once()
            await asyncio.sleep(0.01)


def at(node: RedisChild, *command: Any) -> Any:
    with redis.Redis(port=node.port) as client:
        return client.execute_command(*command)


async def run_id(link: RedisLink, address: str | None = None) -> str:
    async with link.connection(address) as (_, told):
        return told


def real_run_id(node: RedisChild) -> str:
    return str(at(node, "INFO", "server")["run_id"])


# --- slots, addresses, keys


def test_slots_are_those_of_the_specification() -> None:
    assert slot_of("123456789") == 0x31C3
    assert slot_of("foo{}bar") != slot_of("foo") != slot_of("foo{bar}")
    assert slot_of("{user1000}.following") == slot_of("x{user1000}y{z}") == slot_of("user1000")
    assert slot_of("foo{{bar}}zap") == slot_of("{bar")
    assert slot_of("é") == slot_of("x{é}")


def test_every_slot_has_a_tag() -> None:
    tags = [tag_of(slot) for slot in range(SLOTS)]
    assert [slot_of(f"lucid:limiter:{{{tag}}}") for tag in tags] == list(range(SLOTS))
    assert {len(tag) for tag in tags} == {4}


def test_the_control_channel_lies_in_one_slot() -> None:
    assert slot_of(STREAM_KEY) == slot_of(WORKERS_KEY)


@pytest.mark.parametrize(
    "member, address",
    [
        ([b"10.0.0.1", 7000, b"id"], "10.0.0.1:7000"),
        ([b"redis-0.redis.svc", 7000, b"id", [b"ip", b"10.0.0.1"]], "redis-0.redis.svc:7000"),
        ([b"", 7000, b"id"], "asked:7000"),
        ([None, 7000, b"id", []], "asked:7000"),
        ([b"?", 7000, b"id", [b"ip", b"10.0.0.1"]], "10.0.0.1:7000"),
        ([b"?", 7000, b"id", []], ""),
        ([b"::1", 7000, b"id"], "::1:7000"),
    ],
)
def test_a_node_is_known_by_what_it_announces(member: list[Any], address: str) -> None:
    told = Told(b"cluster_state:ok\r\n", [[10, 19, member], [21, 21, [b"b", 1, b"id"], member]], "asked")
    assert set(told.masters[10:20]) == {address}
    assert (told.masters[9], told.masters[20], told.masters[21], told.masters[22]) == ("", "", "b:1", "")
    assert set(told.nodes) == {address, "b:1"} - {""}
    assert split_address("::1:7000") == ("::1", 7000)


@pytest.mark.parametrize(
    "command, key",
    [
        (("GET", "a"), "a"),
        (("DEL", "a", "b"), "a"),
        (("EVAL", "return 1", 2, "a", "b", "x"), "a"),
        (("EVALSHA", "d", "0"), None),
        (("XREAD", "COUNT", 1, "BLOCK", 300, "STREAMS", "streams", "0-0"), "streams"),
        (("PING",), None),
        (("SCRIPT LOAD", "return 1"), None),
    ],
)
def test_a_command_goes_where_its_first_key_is(command: tuple[Any, ...], key: object) -> None:
    assert key_of(command) == key


@pytest.mark.parametrize("scheme, end", [("redis+cluster", ""), ("redis+sentinel", "/main/0")])
@pytest.mark.parametrize(
    "options, tls", [("", False), ("?ssl=true", True), ("?ssl_ca_certs=/ca.pem", True), ("?ssl=false", False)]
)
def test_tls_is_an_option_where_there_are_several_places(
    scheme: str, end: str, options: str, tls: bool
) -> None:
    link = RedisLink(f"{scheme}://u:p[%40@a,[::1]:7{end}{options}")
    pool = link.commands.connection_pool
    connection: Any = pool.make_connection()
    assert hasattr(connection, "ssl_context") == tls
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("u", "p[@")
    assert link.clustered == (scheme == "redis+cluster")


@pytest.mark.parametrize("place", ["redis://a", "unix:///a", "redis+cluster://a", "redis+sentinel://a/main"])
def test_no_option_takes_back_a_promise(place: str) -> None:
    link = RedisLink(f"{place}?socket_timeout=60&protocol=3&max_connections=7")
    pool = link.commands.connection_pool
    kwargs = pool.connection_kwargs
    assert (kwargs["socket_timeout"], kwargs["protocol"]) == (ANSWER_SECONDS, 2)
    assert pool.max_connections == 7


@pytest.mark.parametrize(
    "uri", ["redis+cluster://", "redis+cluster://a/1", "redis+cluster://a:x", "redis+cluster://a?db=2"]
)
def test_a_cluster_that_is_not_understood_says_so(uri: str) -> None:
    with pytest.raises(ValueError, match="REDIS_URI"):
        RedisLink(uri)


def test_nobody_there_is_told_soon() -> None:
    async def go() -> None:
        async with linked(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{free_port()}") as link:
            calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
                link.slots,
                lambda: link.slots(refresh=True),
                lambda: link.execute("GET", "a"),
                lambda: link.wait("GET", "a"),
                lambda: link.execute("PING"),
            ]
            for call in calls:
                tries = Tries(call)
                assert not await tries.once()
                assert tries.longest_seconds < 0.5
                assert "no node tells" in str(tries.faults[0])
        with pytest.raises(AWAY_ERRORS):
            await probe._redis(f"redis+cluster://127.0.0.1:{free_port()}")

    asyncio.run(go())


def test_hosts_that_vanished_do_not_hide_one_that_is_there(cluster: ClusterOfChildren) -> None:
    """More of them than are asked at once; what is sent to them is neither refused nor answered."""

    async def go(hosts: list[str]) -> None:
        async with linked("redis+cluster://" + ",".join(hosts)) as link:
            begun = time.monotonic()
            assert len(await link.slots()) == SLOTS
            assert time.monotonic() - begun < 0.5

    with contextlib.ExitStack() as kept:
        silent = [kept.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(ASKED_AT_ONCE)]
        names = [f"127.0.0.1:{one.getsockname()[1]}" for one in silent]
        asyncio.run(go([*names, address_of(cluster.nodes[0])]))


def test_to_follow_the_table_costs_no_connections(
    cluster: ClusterOfChildren, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_topology, "FRESH_SECONDS", 0.0)

    def dialled() -> list[int]:
        return [at(node, "INFO", "stats")["total_connections_received"] for node in cluster.nodes]

    async def go() -> None:
        async with linked(cluster.uri) as link:
            await link.slots(refresh=True)
            await asyncio.sleep(0.1)
            before = dialled()
            for _ in range(30):
                await link.slots(refresh=True)
            await asyncio.sleep(0.1)
            assert dialled() == [number + 1 for number in before], "but for those of this test"

    asyncio.run(go())


def test_a_node_that_left_is_let_go(
    cluster: ClusterOfChildren, redis_server: RedisChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_topology, "FRESH_SECONDS", 0.0)
    address = address_of(redis_server)

    async def go() -> None:
        async with linked(cluster.uri) as link:
            await link.slots()
            async with link.connection(address):
                pass
            async with link.connection(address) as (connection, _):
                while link._topology is None or (address, ANSWER_SECONDS) in link._topology._clients:
                    await asyncio.gather(
                        link.slots(refresh=True), *(link.execute("SET", f"k{n}", n) for n in range(9))
                    )
                await connection.send_command("ECHO", "a")
                assert await connection.read_response() == b"a"
            assert not connection.is_connected

    asyncio.run(asyncio.wait_for(go(), 5))


def test_to_dial_takes_no_longer_than_a_command(redis_server: RedisChild) -> None:
    """Each step of the greeting is answered soon enough, all together are not."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", redis_server.port)
        with contextlib.suppress(OSError), contextlib.closing(writer), contextlib.closing(to_writer):
            while asked := await reader.read(65_536):
                to_writer.write(asked)
                answer = await to_reader.read(65_536)
                await asyncio.sleep(0.6 * ANSWER_SECONDS)
                writer.write(answer)

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, linked(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/1") as link:
            tries = Tries(lambda: run_id(link))
            assert not await tries.once()
            assert tries.longest_seconds < 1.1 * ANSWER_SECONDS

    asyncio.run(go())


def test_a_server_that_is_no_cluster_is_told_as_such(redis_server: RedisChild) -> None:
    async def go() -> None:
        async with linked(f"redis+cluster://127.0.0.1:{redis_server.port}") as link:
            with pytest.raises(LostError, match="cluster support disabled"):
                await link.commands.ping()
        async with linked(redis_server.uri) as link:
            for call in (link.slots(), run_id(link, "127.0.0.1:1")):
                with pytest.raises(ValueError, match="cluster"):
                    await call

    asyncio.run(go())


def test_answers_that_nobody_read_are_nobody_elses(redis_server: RedisChild) -> None:
    async def go() -> None:
        async with linked(redis_server.uri) as link:
            with contextlib.suppress(LookupError):
                async with link.connection() as (connection, _):
                    await connection.send_packed_command(
                        connection.pack_commands([("CLIENT", "PAUSE", 100), ("ECHO", "a"), ("ECHO", "b")])
                    )
                    await connection.read_response()
                    raise LookupError
            assert await link.execute("ECHO", "c") == b"c"

    asyncio.run(go())


# --- a cluster that is well


def test_one_node_is_enough_to_find_the_others(cluster: ClusterOfChildren, run: Run) -> None:
    async def go() -> None:
        async with linked(f"redis+cluster://{address_of(cluster.replicas[0])}") as link:
            for number in range(30):
                assert await link.execute("SET", f"k{number}", number)
            assert [await link.wait("GET", f"k{n}") for n in range(30)] == [b"%d" % n for n in range(30)]
            slots = await link.slots()
            assert len(slots) == SLOTS
            assert len(set(slots)) == 3
            assert await link.slots(refresh=True) is slots, "nothing has changed"
            for address in set(slots):
                assert await run_id(link, address) == real_run_id(cluster.at(address))
            assert await link.commands.ping()
            with pytest.raises(ValueError, match="one of its nodes"):
                await run_id(link)
        await probe._redis(cluster.uri)

    run(go())


def test_what_goes_together_goes_to_several_nodes(cluster: ClusterOfChildren) -> None:
    async def go() -> None:
        async with linked(cluster.uri) as link:
            pipeline = link.commands.pipeline(transaction=False)
            for number in range(20):
                pipeline.set(f"p{number}", number)
            for number in range(20):
                pipeline.incr(f"p{number}")
            assert await pipeline.execute() == [True] * 20 + list(range(1, 21))
            pipeline.set("p1", "text")
            pipeline.incr("p1")
            pipeline.get("p2")
            told = await pipeline.execute(raise_on_error=False)
            assert (told[0], type(told[1]), told[2]) == (True, ResponseError, b"3")
            pipeline.incr("p1")
            with pytest.raises(ResponseError, match="not an integer"):
                await pipeline.execute()
            with pytest.raises(ValueError, match="transaction"):
                link.commands.pipeline(transaction=True)
            with pytest.raises(ResponseError, match="same slot"):
                await link.commands.delete("p1", "p2")

    asyncio.run(go())


class Move:
    """One slot on its way between two masters, which is over on all nodes at once."""

    def __init__(self, cluster: ClusterOfChildren, slot: int) -> None:
        self.cluster, self.slot = cluster, slot
        self.source = cluster.master_of(f"{{{tag_of(slot)}}}")
        self.target = next(node for node in cluster.masters() if node is not self.source)

    def begin(self) -> None:
        self._say(self.target, "IMPORTING", self._id(self.source))
        self._say(self.source, "MIGRATING", self._id(self.target))

    def end(self, owner: RedisChild) -> None:
        for node in sorted(self.cluster.masters(), key=lambda node: node is not self.target):
            self._say(node, "NODE", self._id(owner))

    def _say(self, node: RedisChild, *words: str) -> None:
        at(node, "CLUSTER", "SETSLOT", self.slot, *words)

    @staticmethod
    def _id(node: RedisChild) -> str:
        return str(at(node, "CLUSTER", "MYID").decode())


def test_what_is_redirected_is_done_once(cluster: ClusterOfChildren, run: Run) -> None:
    slot = 8_000
    move = Move(cluster, slot)
    key, other = f"{{{tag_of(slot)}}}a", f"{{{tag_of(slot)}}}b"

    async def go() -> None:
        async with linked(cluster.uri) as link:
            assert (await link.slots())[slot] == address_of(move.source)
            assert await link.execute("SET", key, 5)
            move.begin()
            # Not there: the other is asked, which the table does not learn.
            assert await link.execute("INCR", other) == 1
            assert await link.execute("INCR", key) == 6
            assert (await link.slots())[slot] == address_of(move.source)
            pipeline = link.commands.pipeline(transaction=False)
            pipeline.incr(key).incr(other).incr(key).incr(other)
            assert await pipeline.execute() == [7, 2, 8, 3]
            # Both: refused until the move is over.
            both = asyncio.create_task(link.execute("MGET", key, other))
            await asyncio.sleep(0.15)
            assert not both.done()
            at(move.source, "MIGRATE", "127.0.0.1", move.target.port, key, 0, 1_000)
            move.end(move.target)
            assert await both == [b"8", b"3"]
            assert (await link.slots())[slot] == address_of(move.target)
            assert (await link.slots())[slot + 1] == address_of(move.source)
            # A table from before.
            async with linked(cluster.uri) as late:
                await late.slots()
                await link.execute("DEL", key, other)
                back = Move(cluster, slot)
                back.source, back.target = move.target, move.source
                back.begin()
                back.end(move.source)
                pipeline = late.commands.pipeline(transaction=False)
                pipeline.incr(key).incr(other).incr(key)
                assert await pipeline.execute() == [1, 1, 2]
                assert (await late.slots())[slot] == address_of(move.source)
            assert await link.execute("INCR", key) == 3
            async with link.connection(address_of(move.target)) as (connection, _):
                await connection.send_command("GET", key)
                with pytest.raises(MovedError) as moved:
                    await connection.read_response()
            assert link.redirected(moved.value, address_of(move.target)) == address_of(move.source)
            await link.execute("DEL", key, other)

    run(go())


def test_nodes_that_do_not_know_their_hosts(cluster: ClusterOfChildren) -> None:
    """As behind a NAT: where a node leaves out the host, it is the one that was asked."""

    def prefer(kind: str, hostname: str = "") -> None:
        for node in cluster.nodes:
            at(node, "CONFIG", "SET", "cluster-announce-hostname", hostname)
            at(node, "CONFIG", "SET", "cluster-preferred-endpoint-type", kind)

    async def go() -> None:
        prefer("unknown-endpoint")
        # With another name for the host than any node would announce.
        async with linked(f"redis+cluster://localhost:{cluster.nodes[0].port}") as link:
            slots = await link.slots()
            assert {split_address(address)[0] for address in slots} == {"localhost"}
            for number in range(20):
                assert await link.execute("SET", f"k{number}", number)
            wrong = next(address for address in slots if address != slots[slot_of("k")])
            async with link.connection(wrong) as (connection, _):
                await connection.send_command("GET", "k")
                with pytest.raises(MovedError) as moved:
                    await connection.read_response()
            assert moved.value.host == ""
            assert link.redirected(moved.value, wrong) == slots[slot_of("k")]
        prefer("hostname")
        async with linked(cluster.uri) as link:
            slots = await link.slots()
            wrong = next(address for address in slots if address != slots[slot_of("k")])
            async with link.connection(wrong) as (connection, _):
                await connection.send_command("GET", "k")
                with pytest.raises(MovedError) as moved:
                    await connection.read_response()
            assert moved.value.host == "?"
            assert link.redirected(moved.value, wrong) == slots[slot_of("k")]
            hosts = {split_address(address)[0] for address in await link.slots()}
            assert hosts == {"127.0.0.1"}, "they have no names, so their addresses"
            assert await link.execute("SET", "k", 1)

    try:
        asyncio.run(go())
    finally:
        prefer("ip")


# --- a cluster that fails over


def test_a_master_of_a_cluster_dies(cluster: ClusterOfChildren) -> None:
    key = f"{{{STREAM_KEY}}}a"
    elsewhere = next(f"e{n}" for n in range(99) if cluster.master_of(f"e{n}") is not cluster.master_of(key))

    async def go() -> None:
        async with linked(cluster.uri) as link:
            before = await link.slots()
            address = before[slot_of(key)]
            first = await run_id(link, address)
            assert await link.execute("SET", key, 1)
            waiting = asyncio.create_task(link.wait("XREAD", "BLOCK", 300, "STREAMS", key + "s", "0-0"))
            others, over = Tries(lambda: link.execute("INCR", elsewhere)), asyncio.Event()
            meanwhile = asyncio.create_task(others.while_not(over))
            await asyncio.sleep(0.02)
            cluster.at(address).kill()
            with pytest.raises(AWAY_ERRORS):
                await waiting
            dials = Tries(lambda: run_id(link, address))
            assert not await dials.once()
            tries = Tries(lambda: link.execute("SET", key, 2))
            seconds = await tries.until_done()
            over.set()
            await meanwhile
            assert tries.faults, "it had to fail for a while"
            assert max(tries.longest_seconds, dials.longest_seconds) < BOUND_SECONDS
            assert seconds < 5.0
            # The others never knew.
            assert not others.faults
            assert others.done > 20
            after = await link.slots(refresh=True)
            assert after is not before
            assert after[slot_of(key)] != address
            assert after[slot_of(elsewhere)] == before[slot_of(elsewhere)]
            assert await run_id(link, after[slot_of(key)]) not in ("", first)
            # Who comes back, redirects; a table from before is no harm.
            cluster.mend()
            assert await link.commands.ping()
            assert await link.execute("GET", key) == b"2"

    run_on_uvloop(go())


def test_a_node_that_hangs(cluster: ClusterOfChildren) -> None:
    """Its connections stay, and nobody answers: each command takes its time and no more, those for others none."""
    hung = cluster.firsts[(cluster.followed + 1) % 3]
    key = next(f"h{n}" for n in range(99) if cluster.master_of(f"h{n}") is hung)
    elsewhere = next(f"h{n}" for n in range(99) if cluster.master_of(f"h{n}") is not hung)

    async def go() -> None:
        async with linked(cluster.uri) as link:
            assert await link.execute("SET", key, 1)
            os.kill(hung.pid, signal.SIGSTOP)
            try:
                attempts = (
                    Tries(lambda: link.execute("SET", key, 2)),
                    Tries(lambda: link.execute("PING")),
                    Tries(lambda: run_id(link, address_of(hung))),
                )
                assert await asyncio.gather(*(tries.once() for tries in attempts)) == [False] * 3
                for tries in attempts:
                    assert 0.5 < tries.longest_seconds < BOUND_SECONDS
                well = Tries(lambda: link.execute("SET", elsewhere, 2))
                told = Tries(lambda: link.slots(refresh=True))
                assert await well.once()
                assert await told.once()
                assert well.longest_seconds + told.longest_seconds < 0.5
            finally:
                os.kill(hung.pid, signal.SIGCONT)
            await Tries(lambda: link.execute("SET", key, 3)).until_done()

    asyncio.run(go())


class Member:
    """A worker's part: its link and its channel, and what came."""

    def __init__(self, uri: str) -> None:
        self.link = RedisLink(uri)
        self.channel = ControlChannel(self.link, new_holder())
        self.came: list[int] = []
        self.reloads = 0
        self.channel.subscribe("news", lambda body: self.came.append(body["n"]), self._reload)

    async def _reload(self) -> None:
        self.reloads += 1


@contextlib.asynccontextmanager
async def members(uri: str, count: int = 2) -> AsyncIterator[list[Member]]:
    made = [Member(uri) for _ in range(count)]
    try:
        for one in made:
            await one.channel.start()
        await until(lambda: all(one.channel.connected and one.channel.fleet_size == count for one in made))
        yield made
    finally:
        for one in made:
            await one.channel.stop()
            await one.link.close()


async def talk_through_a_failover(uri: str, kill: Callable[[], None]) -> float:
    """Seconds until messages came again."""
    async with members(uri) as (one, two):
        assert await one.channel.publish("news", {"n": 0})
        await until(lambda: two.came == [0])
        begun = time.monotonic()
        kill()
        number = 0
        while not (one.channel.connected and two.channel.connected and number > 3):
            number += 1
            await one.channel.publish("news", {"n": number})
            await asyncio.sleep(0.05)
            assert time.monotonic() - begun < 12.0
        # Whatever was acknowledged by who died, may be lost; what was kept for later is not; all was loaded anew.
        await until(lambda: {*range(2, number + 1)} <= {*two.came, *one.came} and two.came[-1] == number)
        seconds = time.monotonic() - begun
        assert set(two.came) >= set(one.came) - {1}
        assert two.reloads >= 2
        assert one.reloads >= 2
        await until(lambda: one.channel.fleet_size == two.channel.fleet_size == 2)
        assert await two.channel.publish("news", {"n": 999})
        await until(lambda: one.came[-1] == 999)
        return seconds


async def log_in_through_a_failover(uri: str, wallet: Wallet) -> None:
    """Begins before it and ends when it is over."""
    email = "u@x.example"
    async with linked(uri) as link:
        challenges = Challenges(link.commands, "https://gateway.example", time.time)
        delays = LoginDelays(link.commands)
        codes: set[ErrorCode] = set()
        begun = time.monotonic()
        worked = False
        while not (worked and codes):
            asked = time.monotonic()
            worked = False
            try:
                made = await challenges.make(wallet.address, "192.0.2.1")
                assert await challenges.find(wallet.address, made.message) == made.nonce
                assert await challenges.spend(wallet.address, made.nonce)
                assert not await challenges.spend(wallet.address, made.nonce)
                worked = True
            except GatewayError as error:
                codes.add(error.code)
            assert time.monotonic() - asked < 4 * BOUND_SECONDS
            assert asked - begun < 10.0
            await asyncio.sleep(0.05)
        assert codes == {ErrorCode.DEPENDENCY_AWAY}
        await delays.withdrawn(await delays.admit(email, "192.0.2.1"))


def test_the_control_channel_and_services_through_a_failover_of_a_cluster(cluster: ClusterOfChildren) -> None:
    dying = cluster.master_of(STREAM_KEY)
    wallet = next(
        one for one in iter(Wallet.generate, None) if cluster.master_of(f"{{{one.address}}}") is dying
    )

    async def go() -> None:
        logging_in = asyncio.create_task(log_in_through_a_failover(cluster.uri, wallet))
        assert await talk_through_a_failover(cluster.uri, dying.kill) < 8.0
        await logging_in

    run_on_uvloop(go())


def test_a_slot_without_a_master(cluster: ClusterOfChildren) -> None:
    """Nothing is to be had there, and all else goes on. The last one with the cluster: to take such a master back costs
    two seconds.
    """
    dead = cluster.firsts[(cluster.followed + 1) % 3]
    key = next(f"d{n}" for n in range(99) if cluster.master_of(f"d{n}") is dead)
    elsewhere = next(f"d{n}" for n in range(99) if cluster.master_of(f"d{n}") is not dead)

    async def go() -> None:
        async with linked(cluster.uri) as link:
            await link.slots()
            dead.kill()
            tries, others = (
                Tries(lambda: link.execute("SET", key, 1)),
                Tries(lambda: link.execute("SET", elsewhere, 1)),
            )
            begun = time.monotonic()
            while time.monotonic() - begun < 1.2:
                assert not await tries.once()
                assert await others.once()
                await asyncio.sleep(0.02)
            assert max(tries.longest_seconds, others.longest_seconds) < BOUND_SECONDS
            with pytest.raises((LostError, ClusterDownError)):
                await link.commands.ping()
        with pytest.raises(AWAY_ERRORS):
            await probe._redis(cluster.uri)

    asyncio.run(go())


# --- sentinels


async def go_on_at_another_master(sentinels: WatchedChildren, killed: asyncio.Event) -> None:
    async with linked(sentinels.uri) as link:
        assert not link.clustered
        first = await run_id(link)
        assert first == real_run_id(sentinels.master())
        assert await link.execute("SET", "a", 1)
        await killed.wait()
        tries = Tries(lambda: link.execute("SET", "a", 2))
        dials = Tries(lambda: run_id(link))
        assert not await tries.once()
        assert not await dials.once()
        assert await tries.until_done() < 8.0
        assert max(tries.longest_seconds, dials.longest_seconds) < BOUND_SECONDS
        assert await run_id(link) == real_run_id(sentinels.master()) != first
        assert await link.wait("GET", "a") == b"2"


def test_commands_and_the_control_channel_through_a_failover_of_sentinels(sentinels: WatchedChildren) -> None:
    async def go() -> None:
        killed = asyncio.Event()

        def kill() -> None:
            sentinels.master().kill()
            # The sentinel that is asked first is gone as well.
            sentinels.sentinels[0].kill()
            killed.set()

        going_on = asyncio.create_task(go_on_at_another_master(sentinels, killed))
        assert await talk_through_a_failover(sentinels.uri, kill) < 10.0
        await going_on

    run_on_uvloop(go())


def test_a_master_behind_sentinels_that_hangs(sentinels: WatchedChildren) -> None:
    async def go() -> None:
        async with linked(sentinels.uri) as link:
            assert await link.execute("SET", "a", 1)
            master = sentinels.master()
            os.kill(master.pid, signal.SIGSTOP)
            try:
                tries = Tries(lambda: link.execute("SET", "a", 2))
                await tries.until_done()
                assert tries.faults
                assert tries.longest_seconds < BOUND_SECONDS
            finally:
                os.kill(master.pid, signal.SIGCONT)

    asyncio.run(go())
