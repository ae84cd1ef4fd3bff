"""The nouns of a request's life: what passes through the phases, and what the phases answer.

Everything here is a value or a plain record. `Policy` fills an `Exchange` phase by phase; whoever holds
one must see to it that `Gateway.finish` is called for it exactly once, whatever happened.
"""

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from lucid.errors import ErrorCode

if TYPE_CHECKING:
    from lucid.core.rules.breaker import Outcome, Permit
    from lucid.core.rules.claims import Claim
    from lucid.core.rules.framing import Head
    from lucid.core.rules.routes import Route
    from lucid.core.rules.targets import Target


class Phase(enum.IntEnum):
    """The phases in their order; the names are also those of methods, log fields, labels and test files."""

    PARSE = 0
    ROUTE = 1
    AUTHENTICATE = 2
    ADMIT = 3
    GUARD = 4
    FORWARD = 5
    RESPOND = 6
    LOG = 7


RoleName = Literal["user", "node_operator", "admin", "super_admin"]


class Role(enum.IntEnum):
    """Who may: each role holds all that the ones before it hold. PUBLIC is the absence of a role."""

    PUBLIC = 0
    USER = 1
    NODE_OPERATOR = 2
    ADMIN = 3
    SUPER_ADMIN = 4

    @property
    def label(self) -> RoleName:
        return cast("RoleName", self.name.lower())


ROLES: Mapping[str, Role] = {role.label: role for role in Role if role is not Role.PUBLIC}


class Source(enum.Enum):
    """Whose doing a failure was."""

    CALLER = "caller"
    GATEWAY = "gateway"
    BACKEND = "backend"


RedisDown = Literal["safe", "strict", "open"]


class Limit(msgspec.Struct, frozen=True):
    """A named limit: at most `requests` in any `window_seconds` for one identifier."""

    name: str
    requests: int
    window_seconds: int = 60
    redis_down: RedisDown = "safe"
    per: Literal["user", "address"] = "user"


class Principal(msgspec.Struct, frozen=True):
    """Who is asking. `tier` names the rate tier; `identifier` is what the tier is counted by."""

    role: Role
    tier: Literal["public", "authenticated", "admin"]
    identifier: str
    user_id: str = ""
    family: str = ""
    token_id: str = ""
    issued_at: float = 0.0
    expires_at: float = 0.0
    """Seconds since the epoch; 0: never."""
    via: Literal["none", "token", "api_key"] = "none"
    moment: float = 0.0
    """What revocations compare: `issued_at` more exactly, or beyond a revocation that was known. 0: as issued."""


class Refusal(msgspec.Struct, frozen=True):
    """A final answer made by the gateway instead of a forward. A value, never raised by rules or policy."""

    code: ErrorCode
    message: str = ""
    status: int = 0
    """0: the code's own status."""
    details: Mapping[str, Any] = {}
    fields: tuple[tuple[str, str], ...] = ()
    close: bool = False
    """The connection cannot be used again: its framing is lost, or the rest of the body is unwanted."""
    source: Source = Source.CALLER


class Preflight(msgspec.Struct, frozen=True):
    """The answer to an OPTIONS that the gateway speaks for, a CORS preflight above all: 204 and these fields."""

    fields: tuple[tuple[str, str], ...]


class LookUp(msgspec.Struct, frozen=True):
    """A need: a credential that this worker cannot judge from memory. Meet it, then judge again."""

    digest: bytes
    """SHA-256 of the credential. An API key itself goes no further than the head."""
    token: str = ""
    """The token, where it is one: of another issuer, or under a key that may be new. Empty: it is an API key."""
    asker: str = ""
    """What limits count the caller's address by."""

    def __repr__(self) -> str:
        return f"LookUp({'token' if self.token else 'key'} {self.digest.hex()[:8]})"


class Lease(msgspec.Struct, frozen=True):
    """A need: quota for this claim must be fetched from the store. Meet it, then judge again."""

    claim: "Claim"


Need = LookUp | Lease
Verdict = Refusal | Preflight | LookUp | Lease | None


class Exchange:
    """One request, from its head to its record. Made by the wire, filled by the policy, ended by `finish`."""

    __slots__ = (
        "address",
        "admitted",
        "bytes_in",
        "bytes_out",
        "claim",
        "credential_lost",
        "endpoint",
        "error",
        "failed_by",
        "finished",
        "head",
        "outcome",
        "peer",
        "pending",
        "permit",
        "phase",
        "principal",
        "request_id",
        "route",
        "span_id",
        "started",
        "status",
        "target",
        "trace_continued",
        "trace_flags",
        "trace_id",
        "upstream_seconds",
        "upstream_started",
    )

    # Set by the wire and the phases in their order. A phase relies on what the earlier ones have set, so these are
    # typed as set; whoever looks at an exchange that may have ended early asks `known_…`.
    head: "Head"
    target: "Target"
    route: "Route"
    principal: Principal

    def __init__(
        self,
        head: "Head | None",
        peer: str,
        address: str,
        started: float,
        ids: tuple[str, str, str] = ("", "", ""),
    ) -> None:
        """`started` is monotonic seconds; `ids` are the trace's, the request's and the span's."""
        self.head = head  # type: ignore[assignment]
        self.peer = peer
        self.address = address
        self.started = started
        self.phase = Phase.PARSE
        self.target = None  # type: ignore[assignment]
        self.route = None  # type: ignore[assignment]
        self.principal = None  # type: ignore[assignment]
        self.pending: Refusal | None = None
        self.claim: Claim | None = None
        self.admitted: bool | None = None
        self.credential_lost = False
        """Nobody could be asked about its credential: on a public route its caller is then the public."""
        self.permit: Permit | None = None
        self.outcome: Outcome | None = None
        self.trace_id, self.request_id, self.span_id = ids
        self.trace_flags = "00"
        self.trace_continued = False
        self.endpoint = ""
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.upstream_started = 0.0
        self.upstream_seconds = 0.0
        self.failed_by: Source | None = None
        self.error: ErrorCode | None = None
        self.finished = False

    @property
    def known_head(self) -> "Head | None":
        """None: there was no head to believe."""
        return self.head

    @property
    def known_route(self) -> "Route | None":
        """None: it ended in parse or route."""
        return self.route

    @property
    def known_principal(self) -> Principal | None:
        """None: it ended before authenticate."""
        return self.principal
