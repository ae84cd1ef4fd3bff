"""What a change of a user needs besides a right: the current password, a wallet's signature, what nobody else has."""

import msgspec
from msgspec import UNSET

from lucid.core.validation import bad_field, checked_password
from lucid.database.documents import UserDocument
from lucid.database.user_repository import UserRepository
from lucid.errors import ErrorCode, GatewayError
from lucid.services.callers import Caller, record
from lucid.services.challenges import Challenges
from lucid.services.login_delays import Attempt, LoginDelays
from lucid.services.password_hashing import PasswordHashing
from lucid.services.unbroken import Unbroken
from lucid.services.user_rules import UserChanges, conflict


class Proven(msgspec.Struct):
    """What the caller has proven in this request. It outlives a judgement: a challenge is spent once."""

    verified: str | None = None
    """The stored password that the current one was found to be."""
    hashed: str | None = None
    """The new password, ready to be stored."""
    spent: bool = False
    """The challenge for the new address."""


class UserProofs:
    """One per worker; its `UserService` calls it. `passwords` are that service's own, `delays` the logins'."""

    def __init__(
        self,
        *,
        users: UserRepository,
        challenges: Challenges,
        passwords: PasswordHashing,
        delays: LoginDelays,
        unbroken: Unbroken,
    ) -> None:
        self._users = users
        self._challenges = challenges
        self._passwords = passwords
        self._delays = delays
        self._unbroken = unbroken

    async def check(self, user: UserDocument, changes: UserChanges, proven: Proven, caller: Caller) -> None:
        """What `changes` need besides a right; what was proven is noted in `proven`. All the cheap questions first: two
        passwords hashed are 0.4 s of a core, too much for a change that cannot be. Last what cannot be taken back.

        Raises BAD_FIELD, CONFLICT (an email or address that another has), BAD_CREDENTIAL (the current password),
        RATE_LIMITED after too many wrong ones, BAD_SIGNATURE, UNKNOWN_CHALLENGE, BACKEND_UNAVAILABLE where too many
        passwords are being checked, DEPENDENCY_AWAY.
        """
        if changes.password is not UNSET:
            _check_password_fields(user, changes)
        taken = []
        if changes.email is not UNSET and await self._is_taken(user, email=changes.email):
            taken.append("email")
        if changes.tron_address is not UNSET and await self._is_taken(
            user, tron_address=changes.tron_address
        ):
            taken.append("tron_address")
        # Looked at before the challenge is spent. Whoever loses a race for the address after this needs a new one:
        # spending comes before writing, since a challenge that lets two requests write is worse.
        nonce = None
        if changes.tron_address is not UNSET and not proven.spent:
            signed = await self._challenges.signed(
                str(changes.tron_address), str(changes.message), str(changes.signature)
            )
            if isinstance(signed, ErrorCode):
                raise _wallet_refused(signed, user, caller)
            nonce = signed
        if taken:
            raise conflict(*taken)
        if changes.password is not UNSET:
            await self._check_password(user, changes, proven, caller)
            if proven.hashed is None:
                proven.hashed = await self._passwords.hash(changes.password)
        if nonce is not None:
            if not await self._challenges.spend(str(changes.tron_address), nonce):
                raise _wallet_refused(ErrorCode.UNKNOWN_CHALLENGE, user, caller)
            proven.spent = True

    async def _is_taken(
        self, user: UserDocument, *, email: str | None = None, tron_address: str | None = None
    ) -> bool:
        """Whether another live user has it. The unique index decides in the end."""
        if email is not None:
            holder = await self._users.find_by_email(email)
        else:
            holder = await self._users.find_by_tron_address(tron_address or "")
        return holder is not None and holder.user_id != user.user_id

    async def _check_password(
        self, user: UserDocument, changes: UserChanges, proven: Proven, caller: Caller
    ) -> None:
        if user.password is None or proven.verified == user.password:
            return
        # A stolen token is no way to guess the password that it does not tell, so guesses here are slowed down as
        # they are at the login. The answer is a 401 as for every other proof that fails, a signature's too; what
        # failed the details say, so that nobody takes it for the token.
        attempt = await self._delays.admit(str(user.email or changes.email), caller.address)
        await self._unbroken(
            self._judge_guess(attempt, str(changes.current_password), user.user_id, user.password, caller)
        )
        proven.verified = user.password

    async def _judge_guess(
        self, attempt: Attempt, guess: str, user_id: str, stored: str, caller: Caller
    ) -> None:
        try:
            right = await self._passwords.verify(guess, stored)
        except GatewayError:
            await self._delays.withdrawn(attempt)
            raise
        if not right:
            record("password_change_failed", caller, user_id=user_id)
            raise GatewayError(
                ErrorCode.BAD_CREDENTIAL,
                "The current password is not right",
                details={"field": "current_password"},
            )
        await self._delays.succeeded(attempt)


def _check_password_fields(user: UserDocument, changes: UserChanges) -> None:
    """Whether a new password may be set with what the body names. Raises BAD_FIELD."""
    email = user.email if changes.email is UNSET else changes.email
    if email is None:
        raise bad_field("email", "is needed to log in with a password")
    checked_password(str(changes.password), email)
    if user.password is None:
        if changes.current_password is not UNSET:
            raise bad_field("current_password", "must be absent: no password is set yet")
    elif changes.current_password is UNSET:
        raise bad_field("current_password", "is missing")


def _wallet_refused(code: ErrorCode, user: UserDocument, caller: Caller) -> GatewayError:
    """The error of a wallet's proof that fails, recorded."""
    record("wallet_change_failed", caller, user_id=user.user_id, code=code.value)
    return GatewayError(code)
