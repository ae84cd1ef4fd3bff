"""The gates, one by one and in their order: what each refuses, what is charged, and what is not.

`charged` is what this worker's own window holds by the keys of the contract, with the store away, so that
every decision is made here; needs are met as the wire meets them, with a store in memory.
"""

import hashlib

import pytest

from lucid.core.exchange import (
    Exchange,
    Lease,
    Limit,
    LookUp,
    Phase,
    Preflight,
    Principal,
    Refusal,
    Role,
    Source,
    Verdict,
)
from lucid.core.policy import Policy
from lucid.core.rules.addresses import Networks, TrustedProxies
from lucid.core.rules.breaker import BreakerMode, Outcome
from lucid.core.rules.bucket import Store
from lucid.core.rules.cors import Cors
from lucid.core.rules.framing import Head, Memo, parse_head
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.leases import Leases
from lucid.core.rules.routes import Route, RouteTable
from lucid.core.rules.tokens import TokenMemory
from lucid.errors import ErrorCode
from tests.support.wire import ALICE, CREDENTIALS, PEER, ROOT, SpyBreaker

ADDRESS = f"rate_limit:public:{PEER}"
OPERATOR = Principal(Role.NODE_OPERATOR, "authenticated", "olga", "olga", "f", "j", 0.0, 1e9, "token")
TOKENS = {**CREDENTIALS, "olga": OPERATOR}
KEYS: dict[str, Principal | ErrorCode] = {
    "good": Principal(Role.USER, "authenticated", "alice", "alice", via="api_key"),
    "old": ErrorCode.CREDENTIAL_EXPIRED,
}
FOREIGN = {"foreign-good": ALICE}
CHAIN = Limit("chain", 3)
LOGIN = Limit("login", 2, per="address")
ROUTES = (
    Route("/open/**", "core", Role.PUBLIC),
    Route("/user/**", "core", methods=frozenset({"GET", "POST"})),
    Route("/operator/**", "core", Role.NODE_OPERATOR),
    Route("/admin/**", "core", Role.ADMIN),
    Route("/chain/**", "core", limits=(CHAIN,)),
    Route("/login", "", Role.PUBLIC, limits=(LOGIN,), max_body=65_536),
    Route("/inside", "core", Role.PUBLIC, networks=Networks(["10.0.0.0/8"])),
    Route("/health", "", Role.PUBLIC, counted=False),
)


class Court:
    """A policy, and what it decides with. `now` moves only when the test moves it."""

    def __init__(
        self, *, away: bool = True, public: int = 5, user: int = 5, cors: Cors | None = None
    ) -> None:
        self.now = 1_000.0
        self.leases = Leases("worker", fleet=1)
        self.leases.shard.away = away
        self.store = Store()
        self.store.marker = ("", "served", 0)
        self.keys = KeyMemory()
        self.tokens = TokenMemory(self._verify, lambda: 0.0, 100)
        self.breaker = SpyBreaker("core")
        self.verified = 0
        self.policy = Policy(
            routes=RouteTable.build(ROUTES),
            tiers=[
                *([Limit("public", public)] if public else []),
                Limit("authenticated", user),
                Limit("admin", 9),
            ],
            tokens=self.tokens,
            keys=self.keys,
            leases=self.leases,
            breakers={"core": self.breaker},
            cors=cors or Cors(),
            proxies=TrustedProxies(),
            jitter=lambda: 0.5,
        )

    def _verify(self, token: str) -> Principal | ErrorCode | None:
        self.verified += 1
        if token.startswith("foreign"):
            return None
        return TOKENS.get(token, ErrorCode.BAD_CREDENTIAL)

    def exchange(self, request: str, *fields: str, address: str = PEER) -> Exchange:
        lines = "".join(f"{line}\r\n" for line in (f"{request} HTTP/1.1", "Host: gw", *fields, ""))
        head = parse_head(lines.encode(), Memo())
        assert isinstance(head, Head), head
        return Exchange(head, address, address, self.now)

    def judge(self, x: Exchange) -> Verdict:
        return self.policy.judge(x, self.now)

    def meet(self, x: Exchange, need: Verdict) -> None:
        if isinstance(need, LookUp) and need.token:
            said = FOREIGN.get(need.token, ErrorCode.BAD_CREDENTIAL)
            if isinstance(said, Principal):
                self.tokens.remember(need.token, said, self.now, 60.0)
            else:
                self.keys.put(need.digest, said, self.now)
        elif isinstance(need, LookUp):
            answers = {hashlib.sha256(shaped(name).encode()).digest(): known for name, known in KEYS.items()}
            self.keys.put(need.digest, answers.get(need.digest, ErrorCode.BAD_CREDENTIAL), self.now)
        else:
            assert isinstance(need, Lease)
            settled: list[bool] = []
            self.leases.wait(need.claim, settled.append)
            for flight in self.leases.compose(self.now):
                answer = self.store.call(flight.keys, flight.call, int(self.now * 1_000))
                self.leases.apply(flight, answer, self.now)
            (x.admitted,) = settled

    def decide(self, request: str, *fields: str, address: str = PEER) -> tuple[Verdict, Exchange]:
        """Judge to the end, needs met on the way."""
        x = self.exchange(request, *fields, address=address)
        verdict = self.judge(x)
        while isinstance(verdict, LookUp | Lease):
            self.meet(x, verdict)
            verdict = self.judge(x)
        return verdict, x

    def code(self, request: str, *fields: str, address: str = PEER) -> str:
        verdict, _ = self.decide(request, *fields, address=address)
        assert verdict is None or isinstance(verdict, Refusal)
        return "" if verdict is None else verdict.code.name

    @property
    def charged(self) -> dict[str, int]:
        leases = list(self.leases._by_key.values())
        return {lease.key: lease.history_sum for lease in leases if lease.history_sum}


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def shaped(text: str) -> str:
    """As keys are shaped: what is shaped otherwise is not even looked up."""
    return f"lucid_{text:0<43}"


def key(text: str) -> str:
    return f"X-API-Key: {shaped(text) if text else ''}"


# --- what counts against limits (the contract's section of that name) -------------------------------------


@pytest.mark.parametrize(
    "request_, fields, charged",
    [
        ("GET /health", (), {}),
        ("GET /health", (bearer("alice"),), {}),
        ("GET /%00", (), {}),
        ("GET /nowhere", (bearer("alice"),), {}),
        ("DELETE /user/a", (bearer("alice"),), {}),
        ("POST /login", ("Content-Length: 65537",), {}),
        ("OPTIONS *", (), {}),
        ("OPTIONS /user/a", ("Origin: https://app", "Access-Control-Request-Method: GET"), {}),
        ("GET /open/a", (), {ADDRESS: 1}),
        ("GET /open/a", (bearer("alice"),), {"rate_limit:authenticated:alice": 1}),
        ("GET /open/a", (key("good"),), {"rate_limit:authenticated:alice": 1}),
        ("GET /open/a", (bearer("bad"),), {ADDRESS: 1}),
        ("GET /user/a", (bearer("olga"),), {"rate_limit:authenticated:olga": 1}),
        ("GET /user/a", (bearer("root"),), {"rate_limit:admin:root": 1}),
        ("GET /user/a", (), {ADDRESS: 1}),
        ("GET /user/a", (bearer("bad"),), {ADDRESS: 1}),
        ("GET /user/a", (bearer("expired"),), {ADDRESS: 1}),
        ("GET /user/a", (key("bad"),), {ADDRESS: 1}),
        ("GET /user/a", (bearer("alice"), key("good")), {ADDRESS: 1}),
        ("GET /admin/a", (bearer("alice"),), {"rate_limit:authenticated:alice": 1}),
        (
            "GET /chain/a",
            (bearer("alice"),),
            {"rate_limit:authenticated:alice": 1, "rate_limit:chain:alice": 1},
        ),
        ("GET /chain/a", (bearer("bad"),), {ADDRESS: 1}),
        ("POST /login", (), {ADDRESS: 1, f"rate_limit:login:{PEER}": 1}),
        (
            "POST /login",
            (bearer("alice"),),
            {"rate_limit:authenticated:alice": 1, f"rate_limit:login:{PEER}": 1},
        ),
    ],
)
def test_what_is_charged(request_: str, fields: tuple[str, ...], charged: dict[str, int]) -> None:
    court = Court(cors=Cors(("https://app",)))
    court.decide(request_, *fields)
    assert court.charged == charged


def test_ipv6_is_charged_by_its_64() -> None:
    court = Court()
    court.decide("POST /login", address="2001:db8::1")
    court.decide("POST /login", address="2001:db8::2")
    assert court.charged == {"rate_limit:public:2001:db8::/64": 2, "rate_limit:login:2001:db8::/64": 2}
    assert court.code("POST /login", address="2001:db8::3") == "RATE_LIMITED"
    assert court.code("POST /login", address="2001:db8:0:1::1") == ""


def test_all_limits_or_none() -> None:
    court = Court()
    for _ in range(3):
        assert court.code("GET /chain/a", bearer("alice")) == ""
    for _ in range(9):
        assert court.code("GET /chain/a", bearer("alice")) == "RATE_LIMITED"
    assert court.charged == {"rate_limit:authenticated:alice": 3, "rate_limit:chain:alice": 3}
    assert court.code("GET /open/a", bearer("alice")) == ""
    assert court.code("GET /open/a", bearer("alice")) == ""
    assert court.code("GET /open/a", bearer("alice")) == "RATE_LIMITED", "the tier's five are spent"


def test_what_a_429_says() -> None:
    court = Court()
    for _ in range(3):
        court.decide("GET /chain/a", bearer("alice"))
    court.now += 10.0
    verdict, x = court.decide("GET /chain/a", bearer("alice"))
    assert isinstance(verdict, Refusal)
    assert verdict.details == {"limit": 3, "window_seconds": 60, "name": "chain"}
    (name, value), *more = verdict.fields
    # What is left of the window of 60 s in slots of half a second, and the jitter of half a second.
    assert (name, more) == ("Retry-After", [])
    assert 50 <= int(value) <= 52
    assert x.phase is Phase.ADMIT
    court.now += int(value)
    assert court.code("GET /chain/a", bearer("alice")) == ""


def test_a_tier_that_is_off_charges_nothing() -> None:
    court = Court()
    court.policy._tiers.pop("public")
    for _ in range(20):
        assert court.code("GET /open/a") == ""
    assert court.charged == {}
    court.decide("POST /login")
    assert court.charged == {f"rate_limit:login:{PEER}": 1}


# --- credentials ------------------------------------------------------------------------------------------

BASIC = "Authorization: Basic YTpi"
CREDENTIAL_TABLE = [
    # fields, who on a public route, refusal for users, refusal for operators, refusal for admins
    ((), "", "NO_CREDENTIAL", "NO_CREDENTIAL", "NO_CREDENTIAL"),
    ((bearer("bad"),), "", "BAD_CREDENTIAL", "BAD_CREDENTIAL", "BAD_CREDENTIAL"),
    ((bearer("expired"),), "", "CREDENTIAL_EXPIRED", "CREDENTIAL_EXPIRED", "CREDENTIAL_EXPIRED"),
    ((BASIC,), "", "BAD_CREDENTIAL", "BAD_CREDENTIAL", "BAD_CREDENTIAL"),
    (("Authorization:",), "", "BAD_CREDENTIAL", "BAD_CREDENTIAL", "BAD_CREDENTIAL"),
    (("Authorization: Bearer",), "", "BAD_CREDENTIAL", "BAD_CREDENTIAL", "BAD_CREDENTIAL"),
    ((key("bad"),), "", "BAD_CREDENTIAL", "BAD_CREDENTIAL", "BAD_CREDENTIAL"),
    ((key(""),), "", "BAD_CREDENTIAL", "BAD_CREDENTIAL", "BAD_CREDENTIAL"),
    ((key("old"),), "", "CREDENTIAL_EXPIRED", "CREDENTIAL_EXPIRED", "CREDENTIAL_EXPIRED"),
    ((bearer("alice"),), "alice", "", "ROLE_TOO_LOW", "ROLE_TOO_LOW"),
    (("authorization: bEARER alice",), "alice", "", "ROLE_TOO_LOW", "ROLE_TOO_LOW"),
    ((key("good"),), "alice", "", "ROLE_TOO_LOW", "ROLE_TOO_LOW"),
    ((bearer("olga"),), "olga", "", "", "ROLE_TOO_LOW"),
    ((bearer("root"),), "root", "", "", ""),
]


@pytest.mark.parametrize("row", CREDENTIAL_TABLE, ids=lambda row: ", ".join(row[0]) or "none")
def test_credentials(row: tuple[tuple[str, ...], str, str, str, str]) -> None:
    fields, who, *refusals = row
    verdict, x = Court().decide("GET /open/a", *fields)
    assert verdict is None, "on public routes a bad credential makes the caller public, never 401"
    assert x.principal is not None
    assert x.principal.user_id == who
    for path, refusal in zip(("user", "operator", "admin"), refusals, strict=True):
        verdict, x = Court().decide(f"GET /{path}/a", *fields)
        assert ("" if verdict is None else verdict.code.name) == refusal  # type: ignore[union-attr]
        if verdict is None:
            continue
        assert isinstance(verdict, Refusal)
        assert verdict.source is Source.CALLER
        assert verdict.code.status == (403 if refusal == "ROLE_TOO_LOW" else 401)
        challenge = dict(verdict.fields).get("WWW-Authenticate", "")
        if refusal == "ROLE_TOO_LOW":
            assert (challenge, verdict.details) == ("", {"required": x.route.access.label})  # type: ignore[union-attr]
        else:
            assert challenge.startswith('Bearer realm="lucid"')
            assert ("invalid_token" in challenge) == bool(fields)


@pytest.mark.parametrize("path", ["open", "user", "admin"])
@pytest.mark.parametrize("token", ["alice", "bad"])
def test_two_credentials_are_one_too_many_anywhere(path: str, token: str) -> None:
    court = Court()
    assert court.code(f"GET /{path}/a", bearer(token), key("good")) == "TWO_CREDENTIALS"
    assert ErrorCode.TWO_CREDENTIALS.status == 400
    assert court.verified == 0


def test_addresses_that_may_not() -> None:
    court = Court()
    assert court.code("GET /inside") == "ADDRESS_NOT_ALLOWED"
    assert court.code("GET /inside", bearer("root")) == "ADDRESS_NOT_ALLOWED"
    assert court.code("GET /inside", address="10.1.2.3") == ""
    assert court.charged == {ADDRESS: 1, "rate_limit:admin:root": 1, "rate_limit:public:10.1.2.3": 1}


# --- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, within",
    [((), "NO_CREDENTIAL"), ((bearer("bad"),), "BAD_CREDENTIAL"), ((key("bad"),), "BAD_CREDENTIAL")],
)
def test_bad_credentials_are_charged_first(fields: tuple[str, ...], within: str) -> None:
    court = Court()
    codes = [court.code("GET /user/a", *fields) for _ in range(7)]
    assert codes == 5 * [within] + 2 * ["RATE_LIMITED"]
    assert court.code("GET /user/a", bearer("alice")) == "", "another tier, another count"


def test_who_is_refused_takes_no_permit() -> None:
    court = Court()
    for _ in range(9):
        court.decide("GET /user/a")
        court.decide("GET /admin/a", bearer("alice"))
    assert not court.breaker.given


def test_a_half_open_breaker_keeps_its_trials_for_those_who_are_admitted() -> None:
    court = Court(public=1)
    court.breaker.override(BreakerMode.OPEN, court.now)
    court.breaker.override(BreakerMode.AUTO, court.now)
    assert court.code("GET /open/a") == ""
    for _ in range(9):
        assert court.code("GET /open/a") == "RATE_LIMITED"
    assert court.code("GET /open/a", bearer("alice")) == "", "the second trial is still there"
    assert court.code("GET /open/a", bearer("alice")) == "BACKEND_UNAVAILABLE"


def test_an_open_breaker() -> None:
    court = Court()
    for _ in range(5):
        verdict, x = court.decide("GET /open/a", bearer("root"))
        assert verdict is None
        court.policy.settle(x, Outcome.FAILURE, court.now)
    court.now += 0.5
    verdict, x = court.decide("GET /open/a", bearer("root"))
    assert isinstance(verdict, Refusal)
    assert (verdict.code, verdict.source) == (ErrorCode.BACKEND_UNAVAILABLE, Source.BACKEND)
    assert dict(verdict.fields) == {
        "Retry-After": "30",
        "Proxy-Status": "lucid; error=destination_unavailable",
    }
    assert (x.phase, x.permit) == (Phase.GUARD, None)
    assert court.charged == {"rate_limit:admin:root": 6}
    court.now += 30.0
    assert court.code("GET /open/a", bearer("root")) == ""


def test_our_own_routes_have_no_breaker() -> None:
    court = Court()
    court.breaker.override(BreakerMode.OPEN, court.now)
    verdict, x = court.decide("POST /login")
    assert (verdict, x.permit) == (None, None)


def test_a_permit_is_settled_once() -> None:
    court = Court()
    _, x = court.decide("GET /open/a")
    court.policy.settle(x, Outcome.SUCCESS, court.now)
    court.policy.settle(x, Outcome.FAILURE, court.now)
    assert [outcome for _, outcome in court.breaker.outcomes] == [Outcome.SUCCESS]
    court.policy.body_broke(x, court.now)
    assert (x.outcome, court.breaker.snapshot(court.now).failures) == (Outcome.FAILURE, 1)
    _, own = court.decide("POST /login")
    court.policy.settle(own, Outcome.FAILURE, court.now)
    court.policy.body_broke(own, court.now)
    assert len(court.breaker.outcomes) == 1


# --- needs ------------------------------------------------------------------------------------------------


def test_a_key_is_looked_up_once_and_judging_goes_on_where_it_stopped() -> None:
    court = Court()
    x = court.exchange("GET /user/a", key("good"))
    need = court.judge(x)
    assert need == LookUp(hashlib.sha256(shaped("good").encode()).digest(), asker=PEER)
    assert x.phase is Phase.AUTHENTICATE
    assert court.judge(x) == need, "not met, so asked for again"
    assert court.charged == {}
    court.meet(x, need)
    assert court.judge(x) is None
    assert x.principal == KEYS["good"]
    assert court.charged == {"rate_limit:authenticated:alice": 1}
    assert court.judge(court.exchange("GET /user/a", key("good"))) is None


def test_a_key_of_another_shape_is_not_even_looked_up() -> None:
    court = Court()
    for text in ("zzz", "lucid_short", "lucid_" + "0" * 44, "Lucid_" + "0" * 43):
        x = court.exchange("GET /user/a", f"X-API-Key: {text}")
        assert not isinstance(court.judge(x), LookUp)
        assert x.pending is not None
        assert x.pending.code is ErrorCode.BAD_CREDENTIAL


def test_a_token_that_others_must_judge_is_asked_about_once() -> None:
    court = Court()
    x = court.exchange("GET /user/a", bearer("foreign-good"))
    need = court.judge(x)
    assert need == LookUp(hashlib.sha256(b"foreign-good").digest(), "foreign-good", PEER)
    assert "foreign-good" not in repr(need)
    court.meet(x, need)
    assert court.judge(x) is None
    assert x.principal == ALICE
    assert court.judge(court.exchange("GET /user/a", bearer("foreign-good"))) is None
    court.now += 60.0
    assert isinstance(court.judge(court.exchange("GET /user/a", bearer("foreign-good"))), LookUp)


def test_a_token_that_others_refuse_is_remembered_and_charged_to_its_address() -> None:
    court = Court()
    assert court.code("GET /user/a", bearer("foreign-bad")) == "BAD_CREDENTIAL"
    assert court.charged == {ADDRESS: 1}
    assert isinstance(court.judge(court.exchange("GET /user/a", bearer("foreign-bad"))), Refusal)
    assert court.code("GET /open/a", bearer("foreign-bad")) == ""


@pytest.mark.parametrize("credential", [key("good"), bearer("foreign-good")])
def test_nobody_is_asked_where_the_answer_changes_nothing(credential: str) -> None:
    court = Court()
    x = court.exchange("GET /health", credential)
    assert court.judge(x) is None
    assert x.principal.role is Role.PUBLIC


@pytest.mark.parametrize("credential", [key("good"), bearer("foreign-good")])
def test_a_credential_that_nobody_can_be_asked_about_makes_its_caller_public(credential: str) -> None:
    court = Court()
    x = court.exchange("GET /open/a", credential)
    assert isinstance(court.judge(x), LookUp)
    x.credential_lost = True
    assert court.judge(x) is None
    assert x.principal.role is Role.PUBLIC
    assert court.charged == {ADDRESS: 1}


def test_an_address_whose_credentials_were_bad_too_often_is_asked_about_now_and_then() -> None:
    court = Court(public=5)
    court.keys.put(hashlib.sha256(shaped("good").encode()).digest(), KEYS["good"], court.now)
    for number in range(5):
        assert court.code("GET /user/a", key(f"bad{number}")) == "BAD_CREDENTIAL"
        court.keys.failed(PEER, court.now)
    assert isinstance(court.judge(court.exchange("GET /user/a", key("bad5"))), LookUp)
    assert not isinstance(court.judge(court.exchange("GET /user/a", key("bad6"))), LookUp)
    assert court.code("GET /user/a", key("bad7")) == "RATE_LIMITED"
    # Others are asked about, and what was known of those behind the same address stands in until they are.
    elsewhere = court.exchange("GET /user/a", key("bad8"), address="192.0.2.99")
    assert isinstance(court.judge(elsewhere), LookUp)
    court.now += 30.0
    assert isinstance(court.judge(court.exchange("GET /user/a", key("bad9"))), LookUp)
    assert court.code("GET /user/a", key("good")) == ""
    court.now += 31.0
    assert isinstance(court.judge(court.exchange("GET /user/a", key("bad7"))), LookUp)


def test_without_a_public_limit_there_is_nothing_to_be_over() -> None:
    court = Court(public=0)
    for number in range(200):
        court.keys.failed(PEER, court.now)
        assert isinstance(court.judge(court.exchange("GET /user/a", key(f"bad{number}"))), LookUp)


def test_a_bad_key_is_remembered_too() -> None:
    court = Court()
    assert court.code("GET /user/a", key("bad")) == "BAD_CREDENTIAL"
    verdict = court.judge(court.exchange("GET /user/a", key("bad")))
    assert isinstance(verdict, Refusal)
    court.now += 5.0
    assert isinstance(court.judge(court.exchange("GET /user/a", key("bad"))), LookUp)


def test_quota_is_fetched_once_and_charged_once() -> None:
    court = Court(away=False)
    x = court.exchange("GET /open/a")
    need = court.judge(x)
    assert isinstance(need, Lease)
    assert (x.phase, x.permit) == (Phase.ADMIT, None)
    court.meet(x, need)
    assert court.judge(x) is None
    assert x.permit is not None
    assert court.store.buckets[ADDRESS].spent == 1
    assert x.claim is not None
    assert x.claim.standings(court.now)[0].remaining == 4


def test_what_the_store_refuses_is_refused() -> None:
    court = Court(away=False)
    assert [court.code("GET /open/a") for _ in range(7)] == 5 * [""] + 2 * ["RATE_LIMITED"]
    assert court.store.buckets[ADDRESS].spent == 5
    assert len(court.breaker.given) == 5


def test_both_needs_one_after_the_other() -> None:
    court = Court(away=False)
    x = court.exchange("GET /chain/a", key("good"))
    first = court.judge(x)
    assert isinstance(first, LookUp)
    court.meet(x, first)
    second = court.judge(x)
    assert isinstance(second, Lease)
    court.meet(x, second)
    assert court.judge(x) is None
    assert {key_: bucket.spent for key_, bucket in court.store.buckets.items()} == {
        "rate_limit:authenticated:alice": 1,
        "rate_limit:chain:alice": 1,
    }


def test_a_refusal_that_is_pending_waits_for_the_quota() -> None:
    court = Court(away=False, public=1)
    x = court.exchange("GET /user/a", bearer("bad"))
    need = court.judge(x)
    assert isinstance(need, Lease)
    assert x.pending is not None
    court.meet(x, need)
    verdict = court.judge(x)
    assert isinstance(verdict, Refusal)
    assert verdict.code is ErrorCode.BAD_CREDENTIAL
    assert court.code("GET /user/a", bearer("bad")) == "RATE_LIMITED"


# --- routes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_, code, allow",
    [
        ("GET /open/../admin/a", "MALFORMED_HEAD", None),
        ("GET /open/%2e%2e/admin/a", "MALFORMED_HEAD", None),
        ("GET /open//a", "MALFORMED_HEAD", None),
        ("GET /nowhere", "NO_SUCH_ROUTE", None),
        ("DELETE /user/a", "METHOD_NOT_ALLOWED", "GET, HEAD, POST"),
        ("OPTIONS /user/a", "METHOD_NOT_ALLOWED", "GET, HEAD, POST"),
    ],
)
def test_refused_by_the_route(request_: str, code: str, allow: str | None) -> None:
    verdict, x = Court().decide(request_)
    assert isinstance(verdict, Refusal)
    assert (verdict.code.name, dict(verdict.fields).get("Allow")) == (code, allow)
    assert (x.phase, x.principal) == (Phase.ROUTE, None)


def test_a_body_that_is_announced_too_large_is_refused_before_the_credential() -> None:
    verdict, x = Court().decide("POST /login", "Content-Length: 65537", bearer("bad"))
    assert isinstance(verdict, Refusal)
    assert (verdict.code, verdict.details) == (ErrorCode.BODY_TOO_LARGE, {"limit_bytes": 65_536})
    assert x.principal is None


def test_a_preflight_is_answered_before_the_credential() -> None:
    asks = ("Origin: https://app", "Access-Control-Request-Method: POST")
    verdict, _ = Court(cors=Cors(("https://app",))).decide("OPTIONS /user/a", *asks)
    assert isinstance(verdict, Preflight)
    assert dict(verdict.fields)["Access-Control-Allow-Methods"] == "GET, HEAD, POST"
    court = Court(cors=Cors(("https://app",)))
    assert court.code("OPTIONS /nowhere", *asks) == "NO_SUCH_ROUTE"
    assert court.code("OPTIONS /open/a", "Origin: https://app") == "", "no preflight: an ordinary request"


def test_a_new_table_holds_for_those_who_come_after_it() -> None:
    court = Court(away=False)
    x = court.exchange("GET /chain/a", bearer("alice"))
    need = court.judge(x)
    court.policy.swap_routes(RouteTable.build([Route("/chain/**", "core", Role.ADMIN)]))
    court.meet(x, need)
    assert court.judge(x) is None
    assert court.code("GET /chain/a", bearer("alice")) == "ROLE_TOO_LOW"
    assert court.code("GET /open/a") == "NO_SUCH_ROUTE"


def test_a_token_is_verified_once() -> None:
    court = Court()
    for _ in range(4):
        assert court.code("GET /user/a", bearer("alice")) == ""
    assert court.verified == 1
    assert (ALICE.tier, ROOT.tier) == ("authenticated", "admin")
