"""The script by the store's contract and against the pure store, on Valkey and on Redis."""

import importlib.resources
import json
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lucid.core.rules.bucket import Answer, Call, Entry, Group, Message, Op, Store
from tests.support.bucket_contract import LONG_MS, NOW, SLOT_MS, BucketContract, Conversation, K, slot
from tests.support.stores import RedisChild

MARKER_KEY = "lucid:limiter"
HERE_KEY = f"{MARKER_KEY}:here"
SCRIPT = (importlib.resources.files("lucid.core.wire") / "bucket.lua").read_text(encoding="ascii")
SPARE_MS = 4 * SLOT_MS
"""A key lives that much longer than it must, so that not every call needs to say how long."""
TIME_LINE = "local clock = redis_call('TIME')"


class ScriptDriver:
    """Runs the script as it is shipped, but for the one line that reads the clock."""

    def __init__(self, client: "redis.Redis") -> None:
        assert SCRIPT.count(TIME_LINE) == 1
        self.client = client
        self.run: Any = client.register_script(SCRIPT.replace(TIME_LINE, "local clock = {ARGV[2], ARGV[3]}"))

    def call(self, keys: list[str], call: Call, now_ms: int) -> Answer:
        arguments = [msgspec.msgpack.encode(call), now_ms // 1_000, now_ms % 1_000 * 1_000]
        raw = self.run(keys=[MARKER_KEY, HERE_KEY, *keys], args=arguments)
        return msgspec.msgpack.decode(raw, type=Answer)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def script_server(request: pytest.FixtureRequest) -> Iterator[RedisChild]:
    """The server that comes with `lucid[dev]`, and the `redis-server` of the machine, which may be an older one."""
    binary = shutil.which("redis-server") if request.param == "redis" else None
    if request.param == "redis" and binary is None:
        pytest.skip("no redis-server on this machine")
    with tempfile.TemporaryDirectory(prefix="lucid-test-") as folder:
        child = RedisChild(folder, "--appendonly", "no", "--save", "")
        if binary is not None:
            plain = child._command
            child._command = lambda port: [binary, *plain(port)[1:]]
        child.start()
        try:
            yield child
        finally:
            child.kill()


@pytest.fixture
def driver(script_server: RedisChild) -> Iterator[ScriptDriver]:
    with redis.Redis(port=script_server.port) as client:
        client.flushall()
        yield ScriptDriver(client)


def full_ring(driver: ScriptDriver, holders: int) -> Conversation:
    """A key with a spend in each counted slot of a ring as long as a real one."""
    talk = Conversation(driver, limit=10**6, slots=120)
    journal: list[Entry] = [(0, slot(-SLOT_MS * 120 + SLOT_MS * number), 500, 0) for number in range(121)]
    for number in range(holders):
        talk.settle(number, f"{number:016x}", 1, want=100, life=300)
        talk.settle(number, f"{number:016x}", 2, keep=100, journal=journal if number == 3 else [], life=300)
    return talk


class TestScript(BucketContract):
    def test_keys_go_away_by_themselves(self, driver: ScriptDriver) -> None:
        talk = Conversation(driver, key="rate_limit:public:192.0.2.1")
        talk.settle(0, "a", 1, want=4, direct=2, fleet=2, back=True)
        talk.settle(0, "a", 2, keep=4, fleet=2, reported=True, roll="e1")
        names = sorted(name.decode() for name in driver.client.scan_iter())
        assert names == [MARKER_KEY, HERE_KEY, "rate_limit:public:192.0.2.1"]
        longest = (K + 2) * SLOT_MS + LONG_MS
        assert longest - 100 < driver.client.pttl("rate_limit:public:192.0.2.1") <= longest + SPARE_MS
        assert driver.client.pttl(HERE_KEY) > 3_000
        assert driver.client.pttl(MARKER_KEY) == -1

    def test_keys_hold_plain_values(self, driver: ScriptDriver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, want=4, direct=2, fleet=3)
        fields = driver.client.hgetall(talk.key)
        kept_ms = (K + 2) * SLOT_MS + LONG_MS + SPARE_MS
        assert json.loads(fields.pop(b"m")) == [NOW, SLOT_MS, 2, 0, 4, 1, 200, 1, kept_ms, 15, -1]
        assert json.loads(fields.pop(b":a")) == [1, 4, NOW + 200, 4, 1]
        assert fields == {str(slot(0) % (K + 1)).encode(): b"2"}
        assert driver.client.get(MARKER_KEY) == f"r1 e1@{NOW} 0".encode()
        talk.settle(1, "a", 2, known="e0", fleet=3, back=True)
        talk.settle(2, "a", 3, fleet=3, reported=True, roll="e2")
        assert driver.client.get(MARKER_KEY) == f"r1 e1@{NOW} {NOW + 1} e2 {NOW + 1} 3".encode()
        assert driver.client.smembers(HERE_KEY) == {b"a"}

    def test_a_key_stays_small_with_a_full_ring(self, driver: ScriptDriver) -> None:
        """1,100 bytes and 50 for each holder: a hash of one piece."""
        talk = full_ring(driver, holders=16)
        assert driver.client.object("encoding", talk.key) == b"listpack"
        size = driver.client.memory_usage(talk.key, samples=0)
        assert size is not None and size <= 1_100 + 16 * 50

    def test_a_warm_call_reads_and_writes_once_however_many_hold(self, driver: ScriptDriver) -> None:
        talk = full_ring(driver, holders=16)
        driver.client.config_resetstat()
        journal = [(2, slot(60), 1, 1)]
        talk.settle(
            70,
            f"{3:016x}",
            3,
            keep=1,
            want=9,
            oldest=2,
            journal=journal,
            known=talk.epoch,
            direct=1,
            limit=10**6,
        )
        stats = driver.client.info("commandstats")
        names = {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}
        assert {name: names.get(name, 0) for name in ("get", "hmget", "hset")} == {
            "get": 1,
            "hmget": 1,
            "hset": 1,
        }
        assert not {"hget", "hgetall", "hdel", "set", "pexpire"} & set(names)

    @pytest.mark.parametrize("garbage", ["nothing", "[1,2]", '{"a":1}', "[" * 40])
    @pytest.mark.parametrize("field", ["m", ":a", ":b", str(slot(0) % (K + 1))])
    def test_what_others_wrote_into_a_key_takes_no_other_along(
        self, driver: ScriptDriver, field: str, garbage: str
    ) -> None:
        """It counts as forgotten where it is needed, as a key that was deleted would be."""
        talk = Conversation(driver)
        for holder in "ab":
            talk.settle(0, holder, 1, want=2, direct=1)
        driver.client.hset(talk.key, field, garbage)
        one = (
            talk.key,
            Message(op=Op.SETTLE, limit=10, slot_ms=SLOT_MS, long_ms=LONG_MS, seq=2, life_ms=200),
        )
        other = ("rate_limit:u:a", Message(op=Op.SETTLE, limit=10, slot_ms=SLOT_MS, long_ms=LONG_MS, seq=3))
        for at in (10, 220, 450):
            answer = talk.send(at, [one, other], "a", [Group(1, [1])])
            assert answer.direct == [1]
            assert 0 <= answer.keys[0].free <= 10

    def test_a_key_of_another_type_begins_anew(self, driver: ScriptDriver) -> None:
        talk = Conversation(driver)
        driver.client.set(talk.key, "garbage")
        assert talk.settle(0, "a", 1, direct=4)[1] == 4
        assert talk.look(10).spent == 4

    def test_a_marker_that_is_not_one_counts_as_lost(self, driver: ScriptDriver) -> None:
        talk = Conversation(driver)
        driver.client.set(MARKER_KEY, "garbage")
        assert talk.settle(0, "a", 1, direct=4)[0].held_ms == (K + 2) * SLOT_MS + LONG_MS
        driver.client.set(MARKER_KEY, "r1 e 99999999999999")
        assert talk.settle(10, "a", 2)[0].held_ms == (K + 2) * SLOT_MS + LONG_MS

    def test_a_probe_fails_where_nothing_can_be_written(self, driver: ScriptDriver) -> None:
        talk = Conversation(driver)
        talk.settle(0, "a", 1, direct=4)
        driver.client.config_set("maxmemory", 1)
        try:
            with pytest.raises(redis.ResponseError, match="memory"):
                talk.send(10, [], "a")
        finally:
            driver.client.config_set("maxmemory", 0)
        assert talk.send(20, [], "a").direct == []

    def test_holders_that_are_gone_leave_nothing_behind(self, driver: ScriptDriver) -> None:
        talk = Conversation(driver, limit=1_000)
        for number in range(300):
            # Each reports once and dies.
            talk.settle(10 * number, f"h{number}", 1, journal=[(0, slot(10 * number), 1, 0)])
        assert len(driver.client.hkeys(talk.key)) < 1 + (K + 1) + 100
        assert talk.look(10 * 299).spent == 40 + 10


HOLDERS = "abcdefghijklmnopqrstuvwxyz"
"""More than the script lets come before it looks for those that are gone."""

step = st.fixed_dictionaries(
    {
        "after": st.sampled_from([0, 1, 7, 50, 99, 100, 101, 150, 250, 400, 500, 700, 1_500, -120]),
        "holder": st.sampled_from("abc" * 6 + HOLDERS),
        "seq": st.integers(0, 3),
        "keep": st.integers(0, 6),
        "want": st.integers(0, 9),
        "need": st.sampled_from([0, 0, 0, 1, 4, 20]),
        "share": st.sampled_from([0, 0, 1, 3]),
        "life": st.sampled_from([50, 100, 220, 300]),
        "oldest": st.integers(0, 3),
        "journal": st.lists(
            st.tuples(
                st.integers(0, 3),
                st.integers(-7, 1),
                st.sampled_from([1, 2, 3, -1, -2]),
                st.sampled_from([0, 1]),
            ),
            max_size=4,
        ),
        "direct": st.lists(st.tuples(st.integers(1, 4), st.sampled_from([[0], [1], [0, 1]])), max_size=2),
        "op": st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2]),
        "run": st.sampled_from(["r1"] * 12 + ["r2", ""]),
        "known": st.sampled_from([""] * 6 + ["last", "last", "e0"]),
        "young": st.sampled_from([0, 0, 90, 2_000]),
        "slot_ms": st.sampled_from([SLOT_MS] * 15 + [70]),
        "fleet": st.sampled_from([0, 2, 3, 3, 3]),
        "back": st.sampled_from([False] * 5 + [True]),
        "reported": st.booleans(),
        "knows_roll": st.sampled_from(["", "last", "last", "e0"]),
        "roll_ms": st.sampled_from([300] * 4 + [5_000]),
    }
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(step, max_size=40))
def test_script_and_pure_store_say_the_same(driver: ScriptDriver, steps: list[dict[str, Any]]) -> None:
    """Any conversation, sensible or not: seqs that come again, lies about what is kept, steps back."""
    driver.client.flushall()
    pure = Store()
    at = 0
    roll = epoch = ""
    seqs = dict.fromkeys(HOLDERS, 0)
    for number, step in enumerate(steps):
        at += step["after"]
        base = seqs[step["holder"]]
        seq = max(0, base + step["seq"] - 1)
        seqs[step["holder"]] = max(base, seq)
        journal: list[Entry] = [
            (max(0, base + tag - 2), slot(at) + where, count, reserved)
            for tag, where, count, reserved in step["journal"]
        ]
        messages = [
            Message(
                op=step["op"],
                limit=limit,
                slot_ms=step["slot_ms"],
                long_ms=LONG_MS,
                seq=seq,
                keep=step["keep"],
                want=step["want"],
                life_ms=step["life"],
                short_ms=50,
                oldest=max(0, base + step["oldest"] - 2),
                journal=journal,
                need=step["need"],
                share=step["share"],
                young_ms=step["young"],
            )
            for limit in (10, 14)
        ]
        call = Call(
            run=step["run"],
            known=epoch if step["known"] == "last" else step["known"],
            fresh=f"e{number}",
            holder=step["holder"],
            slots=K,
            messages=messages,
            groups=[Group(count, members) for count, members in step["direct"]],
            fleet=step["fleet"],
            back=step["back"],
            reported=step["reported"],
            roll=roll if step["knows_roll"] == "last" else step["knows_roll"],
            roll_ms=step["roll_ms"],
        )
        keys = ["rate_limit:t:a", "rate_limit:u:a"]
        answer = driver.call(keys, call, NOW + at)
        assert answer == pure.call(keys, call, NOW + at)
        roll, epoch = answer.roll or roll, answer.epoch
