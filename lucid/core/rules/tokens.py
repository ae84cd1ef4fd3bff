"""Which tokens this worker knows to be good, and which it was told to refuse.

Verifying a signature costs 18 µs (HS256) to some 200 (ES256), a look-up 0.25, and the same token comes with
every request of its holder. So a verified token is remembered until it expires. The rules:

1. A remembered token is answered from memory; its expiry was moved to the monotonic scale when it was
   verified, so that a wall clock that steps back does not lengthen its life.
2. A revocation refuses remembered and new tokens alike, until the moment after which the tokens that it
   names have expired by themselves. Revoking touches no remembered token: it advances a version, and a
   token last judged under an older version is judged again when it next comes. So revoking costs the same
   for one token or 50,000.
3. What was validly signed but is expired or revoked is answered from memory too; what was never valid is
   not remembered (its spellings are endless), only verified again.
4. At most `capacity` tokens are remembered; the oldest goes first.
5. A token that others must be asked about (another issuer's, or one under a key that may be new) is None until
   `remember` tells what they said, and again once that is too old.
"""

from collections import OrderedDict
from collections.abc import Callable

from lucid.core.exchange import Principal
from lucid.errors import ErrorCode

Verify = Callable[[str], Principal | ErrorCode | None]


class _Known:
    """One remembered token."""

    __slots__ = ("deadline", "learned", "principal", "revoked", "version")

    def __init__(
        self, principal: Principal, deadline: float, version: int, revoked: bool, learned: bool = False
    ) -> None:
        """`learned`: from others, who are asked again after the deadline."""
        self.learned = learned
        self.principal = principal
        self.deadline = deadline
        self.version = version
        self.revoked = revoked


class TokenMemory:
    """Verified tokens and active revocations of one worker.

    `verify` says whose a token is (CREDENTIAL_EXPIRED or another code if nobody's, None if others must be asked);
    `wall_clock` gives
    seconds since the epoch, the scale of tokens and revocations; `leeway_seconds` is what `verify` grants
    beyond a token's expiry.
    """

    def __init__(
        self,
        verify: Verify,
        wall_clock: Callable[[], float],
        capacity: int,
        leeway_seconds: float = 0.0,
    ) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self._verify = verify
        self._wall_clock = wall_clock
        self._capacity = capacity
        self._leeway_seconds = leeway_seconds
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._version = 0
        self._families: dict[str, float] = {}
        self._tokens: dict[str, float] = {}
        self._users: dict[str, tuple[float, float]] = {}
        """User id to (issued at or before, until)."""
        self._sweep_at = 1_024

    def __len__(self) -> int:
        return len(self._known)

    @property
    def revocations(self) -> int:
        """How many revocations are held, expired ones that were not swept yet included."""
        return len(self._families) + len(self._tokens) + len(self._users)

    def principal(self, token: str, now: float) -> Principal | ErrorCode | None:
        """The caller that `token` names at the monotonic time `now`, or why it names none; None: ask others, then
        `remember` their answer."""
        known = self._known.get(token)
        if known is None:
            return self._learn(token, now)
        if known.version != self._version:
            known.revoked = self._is_revoked(known.principal)
            known.version = self._version
        if known.revoked:
            return ErrorCode.BAD_CREDENTIAL
        if now < known.deadline:
            return known.principal
        if known.learned:
            del self._known[token]
            return self._learn(token, now)
        return ErrorCode.CREDENTIAL_EXPIRED

    def remember(self, token: str, principal: Principal, now: float, seconds: float) -> None:
        """Others say that this is the token's caller: believe it for `seconds`, and never beyond its expiry."""
        remaining = principal.expires_at + self._leeway_seconds - self._wall_clock()
        self._keep(token, principal, now + min(seconds, remaining), learned=True)

    def revoke_family(self, family: str, until: float) -> None:
        """Refuse every token of this login until `until`, seconds since the epoch."""
        if until > self._families.get(family, 0.0):
            self._families[family] = until
            self._revoked()

    def revoke_token(self, token_id: str, until: float) -> None:
        """Refuse the token with this `jti`."""
        if until > self._tokens.get(token_id, 0.0):
            self._tokens[token_id] = until
            self._revoked()

    def revoke_user(self, user_id: str, issued_at_or_before: float, until: float) -> None:
        """Refuse the user's tokens that were issued at this moment or earlier; later ones are good."""
        before, earlier_until = self._users.get(user_id, (-1.0, 0.0))
        if issued_at_or_before > before or until > earlier_until:
            self._users[user_id] = (max(issued_at_or_before, before), max(until, earlier_until))
            self._revoked()

    def forget(self) -> None:
        """Drop all remembered tokens, so that each is verified anew: call it when the keys have changed."""
        self._known.clear()

    def _learn(self, token: str, now: float) -> Principal | ErrorCode | None:
        verdict = self._verify(token)
        if not isinstance(verdict, Principal):
            return verdict
        remaining = verdict.expires_at + self._leeway_seconds - self._wall_clock()
        revoked = self._keep(token, verdict, now + remaining)
        return ErrorCode.BAD_CREDENTIAL if revoked else verdict

    def _keep(self, token: str, principal: Principal, deadline: float, learned: bool = False) -> bool:
        """Whether it is revoked."""
        revoked = self._is_revoked(principal)
        self._known.pop(token, None)
        if len(self._known) >= self._capacity:
            self._known.popitem(last=False)
        self._known[token] = _Known(principal, deadline, self._version, revoked, learned)
        return revoked

    def _is_revoked(self, principal: Principal) -> bool:
        if principal.family in self._families or principal.token_id in self._tokens:
            return True
        before = self._users.get(principal.user_id)
        return before is not None and (principal.moment or principal.issued_at) <= before[0]

    def _revoked(self) -> None:
        """After each revocation: advance the version, and sweep the expired ones when their number has
        doubled.
        """
        self._version += 1
        if self.revocations < self._sweep_at:
            return
        wall = self._wall_clock()
        self._families = {key: until for key, until in self._families.items() if until > wall}
        self._tokens = {key: until for key, until in self._tokens.items() if until > wall}
        self._users = {key: value for key, value in self._users.items() if value[1] > wall}
        self._sweep_at = max(1_024, 2 * self.revocations)
