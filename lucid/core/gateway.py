"""One exchange through all its phases, and the one exit.

The wire brings heads and sends bytes; the policy judges; this file is what lies between. Whatever happens to
an exchange (answered, refused, backend failed, caller left, worker draining) it leaves through `finish`, which
settles the breaker's permit and hands the one record on. It never raises.
"""

import asyncio
import datetime as dt
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from lucid.core.exchange import (
    Exchange,
    Lease,
    LookUp,
    Need,
    Preflight,
    Principal,
    Refusal,
    Role,
    Source,
    Verdict,
)
from lucid.core.policy import Policy
from lucid.core.rules.breaker import Outcome
from lucid.core.rules.claims import Claim
from lucid.core.rules.cors import Cors
from lucid.core.rules.framing import Fault, Head
from lucid.core.rules.headers import SECURITY_FIELDS, own_head, parent_trace, sane_request_id
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.tokens import TokenMemory
from lucid.errors import ErrorCode, GatewayError, away, envelope

IDS_DRAWN = 64
LOOK_UP_SECONDS = 3.0
"""For a credential that is not known here; a database that hangs must not hold its callers for longer."""
LEARNED_TOKEN_SECONDS = 60.0
"""How long others' word on a token is believed (the contract's bound)."""
NO_SPAN = "0" * 16
"""Invalid by W3C Trace Context 2.2.2.4."""

_PARSE_CODES = {
    405: ErrorCode.METHOD_NOT_ALLOWED,
    408: ErrorCode.TOO_SLOW,
    413: ErrorCode.BODY_TOO_LARGE,
    414: ErrorCode.HEAD_TOO_LARGE,
    431: ErrorCode.HEAD_TOO_LARGE,
    501: ErrorCode.NOT_IMPLEMENTED,
}


class Recorder(Protocol):
    """Takes the one record of each exchange. Called once per exchange; must not raise and must not wait."""

    def record(self, x: Exchange, now: float) -> None: ...


class Gateway:
    """Shared by all connections of a worker."""

    def __init__(
        self,
        policy: Policy,
        *,
        cors: Cors,
        keys: KeyMemory,
        tokens: TokenMemory,
        admit: Callable[[Claim], Awaitable[bool]],
        look_up: Callable[[LookUp], Awaitable[Principal | ErrorCode]],
        recorder: Recorder,
        monotonic: Callable[[], float],
        utc_now: Callable[[], dt.datetime],
        random_bytes: Callable[[int], bytes],
        secure: bool = False,
    ) -> None:
        """`admit` and `look_up` meet the two needs; `random_bytes(n)` gives n random bytes."""
        self.policy = policy
        self.cors = cors
        self.monotonic = monotonic
        self._keys = keys
        self._tokens = tokens
        self._admit = admit
        self._look_up = look_up
        self._recorder = recorder
        self._utc_now = utc_now
        self._random_bytes = random_bytes
        self._ids: list[tuple[str, str, str]] = []
        strict_transport = (("Strict-Transport-Security", "max-age=31536000"),) if secure else ()
        self._own_fields = (("Content-Type", "application/json"), *SECURITY_FIELDS, *strict_transport)
        self.security_fields = (*SECURITY_FIELDS, *strict_transport)

    # --- the beginning ---------------------------------------------------------------------------------

    def open(self, head: Head | None, peer: str, address: str) -> Exchange:
        """A new exchange with its ids. `head` is None when there was no head to believe; `address` is the peer's
        in its one spelling."""
        x = Exchange(head, peer, address, self.monotonic(), (self._ids or self._draw_ids()).pop())
        if head is not None and head.fields.about_itself:
            fields = head.fields
            if fields.forwarded_for:
                x.address = self.policy.client_address(peer, fields.forwarded_for)
            if fields.request_id is not None:
                x.request_id = sane_request_id(fields.request_id) or x.request_id
            if fields.traceparent is not None:
                parent = parent_trace(fields.traceparent)
                if parent is not None:
                    x.trace_id, x.trace_flags = parent
                    x.trace_continued = True
        return x

    def _draw_ids(self) -> list[tuple[str, str, str]]:
        """(trace id, request id, span id), drawn many at a time: one by one they cost 2 % of an exchange.

        A trace id is 128 bits, the request id the same bits spelled as a UUID of version 4 and variant 1.
        """
        text = self._random_bytes(24 * IDS_DRAWN).hex()
        for at in range(0, len(text), 48):
            a, b, c, d, e = (
                text[at : at + 8],
                text[at + 8 : at + 12],
                text[at + 13 : at + 16],
                text[at + 17 : at + 20],
                text[at + 20 : at + 32],
            )
            span = text[at + 32 : at + 48]
            self._ids.append(
                (f"{a}{b}4{c}a{d}{e}", f"{a}-{b}-4{c}-a{d}-{e}", span if span != NO_SPAN else "1" * 16)
            )
        return self._ids

    # --- the middle ------------------------------------------------------------------------------------

    def judge(self, x: Exchange) -> Verdict:
        return self.policy.judge(x, self.monotonic())

    async def meet(self, x: Exchange, need: Need) -> None:
        """Meet a need; then judge again. Raises GatewayError when a dependency is away, but for a public route: a
        credential that nobody can be asked about makes its caller public there, as a bad one does.
        """
        if isinstance(need, Lease):
            x.admitted = await self._admit(need.claim)
            return
        generation = self._keys.generation
        try:
            answer = await self._ask(need)
        except GatewayError:
            if x.route.access > Role.PUBLIC:
                raise
            x.credential_lost = True
            return
        now = self.monotonic()
        if not isinstance(answer, Principal):
            self._keys.put(need.digest, answer, now)
            if answer is ErrorCode.BAD_CREDENTIAL:
                self._keys.failed(need.asker, now)
        elif need.token:
            self._tokens.remember(need.token, answer, now, LEARNED_TOKEN_SECONDS)
        else:
            left = answer.expires_at - self._utc_now().timestamp() if answer.expires_at else math.inf
            self._keys.put(need.digest, answer, now, generation=generation, seconds_left=left)

    async def _ask(self, need: LookUp) -> Principal | ErrorCode:
        try:
            async with asyncio.timeout(LOOK_UP_SECONDS):
                return await self._look_up(need)
        except TimeoutError:
            raise away("auth-service" if need.token else "mongodb") from None

    # --- answers of the gateway's own ------------------------------------------------------------------

    def parse_refusal(self, fault: Fault) -> Refusal:
        """The refusal of a head or a body that cannot be believed: the connection ends with it."""
        return Refusal(
            _PARSE_CODES.get(fault.status, ErrorCode.MALFORMED_HEAD), fault.reason, fault.status, close=True
        )

    def body_refusal(self, reason: str) -> Refusal:
        """The refusal of a body whose framing is lost."""
        return Refusal(ErrorCode.MALFORMED_BODY, reason, close=True)

    def error_refusal(self, error: GatewayError) -> Refusal:
        source = Source.GATEWAY if error.code.status >= 500 else Source.CALLER
        return Refusal(error.code, str(error), details=error.details, fields=error.fields, source=source)

    def refusal_answer(self, x: Exchange, refusal: Refusal, *, close: bool) -> bytes:
        """The whole answer, as bytes; notes in the exchange what the record needs."""
        code = refusal.code
        x.status = refusal.status or code.status
        x.error = code
        x.failed_by = refusal.source
        body = envelope(code, refusal.message, refusal.details, x.request_id, self._utc_now())
        fields = [
            *self._own_fields,
            ("Content-Length", str(len(body))),
            *refusal.fields,
            *self.added_fields(x),
        ]
        if close:
            fields.append(("Connection", "close"))
        answer = own_head(x.status, fields)
        if x.known_head is not None and x.head.method == "HEAD":
            return answer
        x.bytes_out = len(body)
        return answer + body

    def preflight_answer(self, x: Exchange, preflight: Preflight, *, close: bool) -> bytes:
        x.status = 204
        fields = [
            *preflight.fields,
            ("X-Request-ID", x.request_id),
            ("Date", self.http_date()),
            *self.security_fields,
        ]
        if close:
            fields.append(("Connection", "close"))
        return own_head(204, fields)

    def added_fields(self, x: Exchange) -> list[tuple[str, str]]:
        """What the gateway adds to its own answers about this exchange: id, date, limits, CORS."""
        fields = [("X-Request-ID", x.request_id), ("Date", self.http_date())]
        fields.extend(self.limit_fields(x))
        if self.cors.enabled and x.known_head is not None:
            fields.extend(self.cors.answer_fields(x.head.fields.origin))
        return fields

    def limit_fields(self, x: Exchange) -> list[tuple[str, str]]:
        if x.claim is None:
            return []
        lines = x.claim.fields(self.monotonic()).decode("latin-1")
        return [
            (name, value) for name, _, value in (line.partition(": ") for line in lines.split("\r\n")) if name
        ]

    def http_date(self) -> str:
        """IMF-fixdate (RFC 9110 5.6.7)."""
        moment = self._utc_now()
        day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.weekday()]
        month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[
            moment.month - 1
        ]
        return f"{day}, {moment.day:02} {month} {moment.year} {moment:%H:%M:%S} GMT"

    def timestamp(self) -> dt.datetime:
        return self._utc_now()

    # --- the end ---------------------------------------------------------------------------------------

    def finish(self, x: Exchange) -> None:
        """The one exit. Call it once the last byte was handed over, or it is known that none will follow."""
        if x.finished:
            return
        x.finished = True
        now = self.monotonic()
        if x.permit is not None and x.outcome is None:
            self.policy.settle(x, Outcome.NEUTRAL, now)
        self._recorder.record(x, now)

    def abandon(self, x: Exchange) -> None:
        """The caller left: 499 in the record, neutral for the breaker."""
        if not x.finished:
            x.status = 499
            x.failed_by = Source.CALLER
            self.finish(x)
