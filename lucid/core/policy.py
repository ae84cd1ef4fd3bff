"""The gates that a request passes, in their order. Read this first.

    route          which row of the table is it?                404 405 413, a preflight's answer
    authenticate   who is asking, and may they?                 400 401 403
    admit          have they quota left?                        429
    guard          is the backend's breaker closed?             503

`judge` is synchronous and resumable. It answers None (forward), a Refusal or a Preflight (final), or a Need:
whoever meets the need calls `judge` again, and the exchange goes on at the gate where it stopped. The usual
request meets no need, so it is judged without waking a task and without I/O.

Authenticate stands before admit because limits are per principal; what it refuses is *pending* until admit has
charged the refused one, so that bad credentials cannot be tried without limit. Admit stands before guard because
a half-open breaker has few trial permits, and a request that is about to be refused must not use one.

No clock, no I/O, no randomness here: `now` is monotonic seconds, and the sources are injected.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

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
from lucid.core.rules.addresses import TrustedProxies, identifier
from lucid.core.rules.breaker import CircuitBreaker, Outcome
from lucid.core.rules.claims import Claim, LimitSet, Take
from lucid.core.rules.cors import Cors
from lucid.core.rules.framing import Fields
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.leases import Leases
from lucid.core.rules.refusals import over_limit
from lucid.core.rules.routes import MethodNotAllowed, Route, RouteTable
from lucid.core.rules.targets import Target, canonical
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.api_keys import digest as key_digest
from lucid.core.security.api_keys import is_api_key
from lucid.errors import ErrorCode

MOST_FAILURES = 100
"""Look-ups of credentials in a minute that found nobody, of one address; the public limit where that is less."""
LONGEST_REMEMBERED = 256
"""Characters of a target: 4,096 of them fill some 2 MB at the most."""

# Bound once: looking a member up in its enum costs 40 ns, and each exchange passes all gates.
_ROUTE, _AUTHENTICATE, _ADMIT, _GUARD = Phase.ROUTE, Phase.AUTHENTICATE, Phase.ADMIT, Phase.GUARD
_ADMITTED, _WANTING = Take.ADMITTED, Take.WANTING
_PUBLIC = Role.PUBLIC

REALM = 'Bearer realm="lucid"'
"""How to show who one is (RFC 6750, 3): on every 401 (RFC 9110, 15.5.2)."""
_remembered = lru_cache(4_096)(canonical)


class Policy:
    """The judge. Its tables are immutable and swapped whole; an exchange keeps the row that it matched."""

    def __init__(
        self,
        *,
        routes: RouteTable,
        tiers: Iterable[Limit],
        tokens: TokenMemory,
        keys: KeyMemory,
        leases: Leases,
        breakers: Mapping[str, CircuitBreaker],
        cors: Cors,
        proxies: TrustedProxies,
        jitter: Callable[[], float],
    ) -> None:
        """`tiers` are the tiers' limits by name (a tier that is off is absent); `jitter` gives [0, 1)."""
        self._routes = routes
        self._tiers = {limit.name: limit for limit in tiers}
        public = self._tiers.get("public")
        self._most_failures = math.inf if public is None else min(public.requests, MOST_FAILURES)
        self._limit_sets: dict[tuple[Route | None, str], LimitSet] = {}
        self._tokens = tokens
        self._keys = keys
        self._leases = leases
        self._breakers = breakers
        self._cors = cors
        self._proxies = proxies
        self._jitter = jitter

    # --- the gates -------------------------------------------------------------------------------------

    def judge(self, x: Exchange, now: float) -> Verdict:
        """Take the exchange as far as it goes. After a Need was met, call again."""
        phase = x.phase
        verdict: Verdict
        if phase <= _ROUTE:
            x.phase = _ROUTE
            verdict = self._route(x)
            if verdict is not None:
                return verdict
            phase = x.phase = _AUTHENTICATE
        if phase is _AUTHENTICATE:
            verdict = self._authenticate(x, now)
            if verdict is not None:
                return verdict
            phase = x.phase = _ADMIT
        if phase is _ADMIT:
            verdict = self._admit(x, now)
            if verdict is not None:
                return verdict
            x.phase = _GUARD
        return self._guard(x, now)

    def settle(self, x: Exchange, outcome: Outcome, now: float) -> None:
        """Close what guard opened, as soon as the outcome is known. Only the first call counts."""
        if x.permit is not None and x.outcome is None:
            x.outcome = outcome
            self._breakers[x.route.backend].settle(x.permit, outcome, now)

    def body_broke(self, x: Exchange, now: float) -> None:
        """An answer whose head had been settled broke off in its body: a failure of its own."""
        if x.permit is not None:
            x.outcome = Outcome.FAILURE
            self._breakers[x.route.backend].body_broke(x.permit, now)

    # --- route -----------------------------------------------------------------------------------------

    def _route(self, x: Exchange) -> Verdict:
        head = x.head
        if head.target == "*":
            return Preflight(fields=(("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),))
        # The usual target is one that was asked for before: 0.1 µs instead of 0.6.
        target = (
            _remembered(head.target) if len(head.target) <= LONGEST_REMEMBERED else canonical(head.target)
        )
        if not isinstance(target, Target):
            return Refusal(ErrorCode.MALFORMED_HEAD, target)
        x.target = target
        method = head.method
        fields = head.fields
        if method == "OPTIONS":
            preflight = self._preflight(target.path, fields)
            if preflight is not None:
                return preflight
        route = self._routes.match(method, target.path)
        if route is None:
            return Refusal(ErrorCode.NO_SUCH_ROUTE)
        if isinstance(route, MethodNotAllowed):
            return Refusal(ErrorCode.METHOD_NOT_ALLOWED, fields=(("Allow", route.allow),))
        x.route = route
        if head.length > route.max_body:
            return Refusal(ErrorCode.BODY_TOO_LARGE, details={"limit_bytes": route.max_body})
        return None

    def _preflight(self, path: str, fields: Fields) -> Preflight | None:
        methods = self._routes.methods(path)
        if methods is not None and not methods:
            return None
        return self._cors.preflight(fields.origin, fields.request_method, fields.request_headers, methods)

    # --- authenticate ----------------------------------------------------------------------------------

    def _authenticate(self, x: Exchange, now: float) -> Verdict:
        head, route = x.head, x.route
        fields = head.fields
        known: Principal | ErrorCode | LookUp | None = None
        if fields.authorization is not None:
            if fields.api_key is not None:
                known = ErrorCode.TWO_CREDENTIALS
            elif fields.token is None:
                known = ErrorCode.BAD_CREDENTIAL
            else:
                known = self._tokens.principal(fields.token, now)
                if known is None:
                    known = self._looked_up(x, fields.token, fields.token, now)
        elif fields.api_key is not None:
            if is_api_key(fields.api_key):
                known = self._looked_up(x, fields.api_key, "", now)
            else:
                known = ErrorCode.BAD_CREDENTIAL  # Nothing of another shape was ever given out.
        if isinstance(known, Principal):
            x.principal = principal = known
            if principal.role < route.access:
                x.pending = Refusal(ErrorCode.ROLE_TOO_LOW, details={"required": route.access.label})
        elif isinstance(known, LookUp):
            return known
        else:
            x.principal = self._public(x.address)
            if known is ErrorCode.TWO_CREDENTIALS:
                x.pending = Refusal(known)
            elif route.access > _PUBLIC:
                x.pending = _unauthenticated(known or ErrorCode.NO_CREDENTIAL)
        if x.pending is None and route.networks is not None and not route.networks.permits(x.address):
            x.pending = Refusal(ErrorCode.ADDRESS_NOT_ALLOWED)
        return None

    def _looked_up(self, x: Exchange, secret: str, token: str, now: float) -> Principal | ErrorCode | LookUp:
        """What others said of this credential lately, or the need to ask them. Nobody is asked for a route on which
        it changes nothing, nor twice where nobody could be asked."""
        digest = key_digest(secret)
        answer = self._keys.get(digest, now)
        if answer is not None:
            return answer
        route = x.route
        if x.credential_lost or (route.access is _PUBLIC and not route.counted):
            return ErrorCode.BAD_CREDENTIAL
        asker = identifier(x.address)
        # Where so many were bad, no public quota is left, and that is told without anybody being asked. Whoever shares
        # the address goes on with what was known lately, or is asked about in their turn.
        if not self._keys.may_ask(asker, self._most_failures, now):
            return self._keys.stale(digest, now) or ErrorCode.BAD_CREDENTIAL
        return LookUp(digest, token, asker)

    def _public(self, address: str) -> Principal:
        return Principal(Role.PUBLIC, "public", identifier(address))

    # --- admit -----------------------------------------------------------------------------------------

    def _admit(self, x: Exchange, now: float) -> Verdict:
        route, principal = x.route, x.principal
        if route.counted:
            claim = x.claim
            if claim is None:
                claim = x.claim = self._claim(x, route, principal)
            admitted = x.admitted
            if admitted is None:
                take = claim.take(now)
                if take is _WANTING:
                    return Lease(claim)
                admitted = take is _ADMITTED
            if not admitted:
                return over_limit(claim, now, self._jitter())
        if x.pending is not None:
            x.phase = _AUTHENTICATE
        return x.pending

    def _claim(self, x: Exchange, route: Route, principal: Principal) -> Claim:
        """The refused pay with their address's public quota; all others with their tier and the route's limits."""
        limits = () if x.pending is not None and principal.role is _PUBLIC else route.limits
        key = (route if limits else None, principal.tier)
        limit_set = self._limit_sets.get(key)
        if limit_set is None:
            tier = self._tiers.get(principal.tier)
            limit_set = self._limit_sets[key] = LimitSet((tier, *limits) if tier is not None else limits)
        address = principal.identifier if principal.role is _PUBLIC else identifier(x.address)
        return self._leases.claim(limit_set, principal.identifier, address)

    # --- guard -----------------------------------------------------------------------------------------

    def _guard(self, x: Exchange, now: float) -> Verdict:
        route = x.route
        if not route.backend:
            return None
        breaker = self._breakers[route.backend]
        x.permit = breaker.try_acquire(now)
        if x.permit is None:
            seconds = max(1, math.ceil(breaker.retry_after(now)))
            return Refusal(
                ErrorCode.BACKEND_UNAVAILABLE,
                f"{route.backend} is not available at present",
                details={"backend": route.backend},
                fields=(
                    ("Retry-After", str(seconds)),
                    ("Proxy-Status", "lucid; error=destination_unavailable"),
                ),
                source=Source.BACKEND,
            )
        return None

    # --- what the wire asks ----------------------------------------------------------------------------

    def client_address(self, peer: str, forwarded_for: tuple[str, ...]) -> str:
        """The caller's address: the peer, or the first untrusted hop behind trusted proxies."""
        return self._proxies.client(peer, forwarded_for)

    def forwarded_for(self, peer: str, received: tuple[str, ...]) -> str:
        """The X-Forwarded-For that backends get: the hops that are believed, the peer last."""
        return self._proxies.forwarded_for(peer, received)

    def forwarded_scheme(self, peer: str, received: str | None) -> str:
        """The scheme that the caller spoke to a trusted proxy; empty: none is believed."""
        return received if received in ("http", "https") and self._proxies.is_trusted(peer) else ""

    def swap_routes(self, routes: RouteTable) -> None:
        """Publish a new table; exchanges in flight keep the row that they matched."""
        self._routes = routes
        self._limit_sets = {}


def _unauthenticated(code: ErrorCode) -> Refusal:
    challenge = REALM if code is ErrorCode.NO_CREDENTIAL else f'{REALM}, error="invalid_token"'
    return Refusal(code, fields=(("WWW-Authenticate", challenge),))
