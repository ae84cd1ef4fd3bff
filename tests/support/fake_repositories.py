"""The repositories in memory: the same methods, answers and errors, held to it by tests/database/test_contract.py.

One process, nothing awaited inside an operation, so each is atomic. Rows do not go by TTL; where the real ones look
at the time themselves, these do too.
"""

import copy
import datetime as dt
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from lucid.core.validation import email_key
from lucid.database.documents import (
    ApiKeyDocument,
    FamilyDocument,
    HardwareWallet,
    OutboxEntry,
    RevokedLogins,
    SessionDocument,
    UserDocument,
    milliseconds,
    utc_now,
)
from lucid.errors import ErrorCode, GatewayError

Document = TypeVar("Document", UserDocument, ApiKeyDocument, SessionDocument)
replace = msgspec.structs.replace


def conflict(field: str) -> GatewayError:
    return GatewayError(ErrorCode.CONFLICT, details={"fields": [field]})


def cut(moment: dt.datetime | None) -> dt.datetime | None:
    return None if moment is None else milliseconds(moment)


def later(old: dt.datetime | None, new: dt.datetime) -> dt.datetime:
    """As $max does."""
    new = milliseconds(new)
    return new if old is None or new > old else old


def page(
    found: Iterable[Document], key: Callable[[Document], str], skip: int, limit: int
) -> tuple[list[Document], int]:
    ordered = sorted(found, key=key)
    ordered.sort(key=lambda each: each.created_at, reverse=True)  # stable: the key decides among equals
    return ordered[skip : skip + limit], len(ordered)


class FakeUserRepository:
    def __init__(self, clock: Callable[[], dt.datetime] = utc_now) -> None:
        self._clock = clock
        self._users: dict[str, UserDocument] = {}
        self._by_address: dict[str, str] = {}  # of live users: the ids
        self._by_email_key: dict[str, str] = {}

    async def find_by_id(self, user_id: str) -> UserDocument | None:
        user = self._users.get(user_id)
        return user if user is not None and user.live else None

    async def find_by_email(self, email: str) -> UserDocument | None:
        return self._users.get(self._by_email_key.get(email_key(email), ""))

    async def find_by_tron_address(self, tron_address: str) -> UserDocument | None:
        return self._users.get(self._by_address.get(tron_address, ""))

    async def create(self, user: UserDocument) -> UserDocument:
        if user.user_id in self._users:
            raise conflict("user_id")
        return self._store(
            replace(
                user,
                email_key=None if user.email is None else email_key(user.email),
                created_at=milliseconds(user.created_at),
                updated_at=milliseconds(user.updated_at),
                last_login_at=cut(user.last_login_at),
                tokens_revoked_at=cut(user.tokens_revoked_at),
                deleted_at=cut(user.deleted_at),
            )
        )

    async def upsert_by_tron_address(
        self, tron_address: str, new_user_id: str, hardware_wallet: HardwareWallet | None = None
    ) -> UserDocument:
        now = milliseconds(self._clock())
        user = await self.find_by_tron_address(tron_address)
        if user is None:
            if new_user_id in self._users:
                raise conflict("user_id")
            user = UserDocument(
                user_id=new_user_id,
                live=True,
                role="user",
                created_at=now,
                updated_at=now,
                tron_address=tron_address,
            )
        wallet = hardware_wallet or user.hardware_wallet
        return self._store(replace(user, updated_at=now, last_login_at=now, hardware_wallet=wallet))

    async def upsert_from_cluster(
        self, user_id: str, tron_address: str, role: str, hardware_wallet: HardwareWallet | None = None
    ) -> UserDocument:
        now = milliseconds(self._clock())
        user = self._users.get(user_id)
        if user is None:
            user = UserDocument(user_id=user_id, live=True, role=role, created_at=now, updated_at=now)
        elif not user.live:
            user = replace(user, live=True, email=None, email_key=None, password=None, deleted_at=None)
        return self._store(
            replace(
                user,
                tron_address=tron_address,
                role=role,
                updated_at=now,
                last_login_at=now,
                hardware_wallet=hardware_wallet or user.hardware_wallet,
            )
        )

    async def update(
        self,
        user_id: str,
        update_data: Mapping[str, Any],
        *,
        expected: Mapping[str, Any] | None = None,
        revoke_tokens_at: dt.datetime | None = None,
    ) -> UserDocument | None:
        user = await self.find_by_id(user_id)
        if user is None:
            return None
        if any(getattr(user, name) != value for name, value in (expected or {}).items()):
            return None
        changed = {
            name: milliseconds(value) if isinstance(value, dt.datetime) else value
            for name, value in update_data.items()
        }
        if "email" in changed:
            changed["email_key"] = None if changed["email"] is None else email_key(str(changed["email"]))
        if revoke_tokens_at is not None:
            changed["tokens_revoked_at"] = later(user.tokens_revoked_at, revoke_tokens_at)
        return self._store(replace(user, **changed, updated_at=milliseconds(self._clock())))

    async def delete(
        self,
        user_id: str,
        *,
        expected: Mapping[str, Any] | None = None,
        revoke_tokens_at: dt.datetime,
    ) -> bool:
        user = await self.find_by_id(user_id)
        if user is None or any(getattr(user, name) != value for name, value in (expected or {}).items()):
            return False
        now = milliseconds(self._clock())
        revoked = later(user.tokens_revoked_at, revoke_tokens_at)
        self._store(
            replace(
                user, live=False, deleted_at=now, updated_at=now, password=None, tokens_revoked_at=revoked
            )
        )
        return True

    async def list_users(
        self,
        skip: int,
        limit: int,
        *,
        email: str | None = None,
        tron_address: str | None = None,
        role: str | None = None,
        super_admin_addresses: frozenset[str] = frozenset(),
    ) -> tuple[list[UserDocument], int]:
        def counts(user: UserDocument) -> bool:
            effective = "super_admin" if user.tron_address in super_admin_addresses else user.role
            return (
                user.live
                and (email is None or user.email_key == email_key(email))
                and (tron_address is None or user.tron_address == tron_address)
                and (role is None or effective == role)
            )

        return page(filter(counts, self._users.values()), lambda each: each.user_id, skip, limit)

    async def revoked_since(self, moment: dt.datetime) -> list[tuple[str, dt.datetime]]:
        moment = milliseconds(moment)
        return [
            (user.user_id, user.tokens_revoked_at)
            for user in self._users.values()
            if user.tokens_revoked_at is not None and user.tokens_revoked_at >= moment
        ]

    def _store(self, user: UserDocument) -> UserDocument:
        """Raises CONFLICT and has changed nothing then."""
        before = self._users.get(user.user_id)
        tables = ((self._by_address, "tron_address"), (self._by_email_key, "email_key"))
        if user.live:
            for table, name in tables:
                if table.get(getattr(user, name), user.user_id) != user.user_id:
                    raise conflict("email" if name == "email_key" else name)
        for table, name in tables:
            if before is not None and before.live:
                table.pop(getattr(before, name), None)
            if user.live and getattr(user, name) is not None:
                table[getattr(user, name)] = user.user_id
        self._users[user.user_id] = user
        return user


class FakeRefreshTokenRepository:
    def __init__(self) -> None:
        self._untold = 0
        self._tokens: dict[bytes, str] = {}
        self._families: dict[str, FamilyDocument] = {}  # tombstones too, with an empty `current`
        self._users: dict[str, tuple[dt.datetime, dt.datetime]] = {}  # revoked at, expires at

    async def start_family(
        self, family: str, user_id: str, digest: bytes, now: dt.datetime, expires_at: dt.datetime
    ) -> None:
        if digest in self._tokens:
            raise conflict("_id")
        self._tokens[digest] = family
        if family in self._families:
            raise conflict("_id")
        self._families[family] = FamilyDocument(
            family=family,
            user_id=user_id,
            current=digest,
            created_at=milliseconds(now),
            expires_at=milliseconds(expires_at),
        )

    async def find_family(self, digest: bytes, now: dt.datetime) -> FamilyDocument | None:
        family = self._families.get(self._tokens.get(digest, ""))
        return None if family is None or family.expires_at <= milliseconds(now) else family

    async def rotate(self, family: FamilyDocument, spent: bytes, fresh: bytes, now: dt.datetime) -> bool:
        if fresh in self._tokens:
            raise conflict("_id")
        self._tokens[fresh] = family.family
        known = self._families.get(family.family)
        if (
            known is None
            or known.current != spent
            or known.revoked_at is not None
            or known.expires_at <= milliseconds(now)
        ):
            return False
        self._families[family.family] = replace(known, current=fresh)
        return True

    async def revoke_family(
        self, family: str, now: dt.datetime, *, user_id: str = "", expires_at: dt.datetime | None = None
    ) -> bool:
        now = milliseconds(now)
        known = self._families.get(family)
        if known is None:
            if not user_id or expires_at is None:
                return False
            known = FamilyDocument(
                family=family,
                user_id=user_id,
                current=b"",
                created_at=now,
                expires_at=milliseconds(expires_at),
            )
        elif known.revoked_at is not None:
            return False
        until = known.expires_at if expires_at is None else later(known.expires_at, expires_at)
        self._families[family] = replace(known, revoked_at=now, expires_at=until)
        return True

    async def revoke_user(
        self, user_id: str, now: dt.datetime, *, tokens_until: dt.datetime | None = None
    ) -> int:
        now = milliseconds(now)
        alive = [f for f in self._families.values() if f.user_id == user_id and f.revoked_at is None]
        for family in alive:
            self._families[family.family] = replace(family, revoked_at=now)
        if tokens_until is not None:
            revoked_at, expires_at = self._users.get(user_id, (None, None))
            self._users[user_id] = (later(revoked_at, now), later(expires_at, tokens_until))
        return len(alive)

    async def count_untold(self) -> None:
        self._untold += 1

    async def untold(self) -> int:
        return self._untold

    async def revoked_since(self, moment: dt.datetime, *, lasting: bool = False) -> RevokedLogins:
        moment = milliseconds(moment)
        return RevokedLogins(
            families=[
                (family.family, family.revoked_at, None if family.current else family.expires_at)
                for family in self._families.values()
                if family.revoked_at is not None
                and (family.revoked_at >= moment or (lasting and not family.current))
            ],
            users=[(user_id, at) for user_id, (at, _) in self._users.items() if lasting or at >= moment],
        )


class FakeApiKeyRepository:
    def __init__(self) -> None:
        self._keys: dict[str, ApiKeyDocument] = {}
        self._by_digest: dict[bytes, str] = {}
        self._by_user: dict[str, set[str]] = {}

    async def create(self, key: ApiKeyDocument) -> None:
        if key.key_id in self._keys:
            raise conflict("key_id")
        if key.digest in self._by_digest:
            raise conflict("digest")
        self._keys[key.key_id] = replace(
            key,
            created_at=milliseconds(key.created_at),
            expires_at=cut(key.expires_at),
            last_used_at=cut(key.last_used_at),
            revoked_at=cut(key.revoked_at),
        )
        self._by_digest[key.digest] = key.key_id
        self._by_user.setdefault(key.user_id, set()).add(key.key_id)

    async def find_by_digest(self, digest: bytes) -> ApiKeyDocument | None:
        key = self._keys.get(self._by_digest.get(digest, ""))
        return None if key is None or key.revoked_at is not None else key

    async def list_of_user(self, user_id: str, skip: int, limit: int) -> tuple[list[ApiKeyDocument], int]:
        return page(self._live(user_id), lambda each: each.key_id, skip, limit)

    async def count_live(self, user_id: str, now: dt.datetime | None = None) -> int:
        return sum(
            now is None or key.expires_at is None or key.expires_at > now for key in self._live(user_id)
        )

    async def revoke(self, user_id: str, key_id: str, now: dt.datetime) -> ApiKeyDocument | None:
        key = self._keys.get(key_id)
        if key is None or key.user_id != user_id or key.revoked_at is not None:
            return None
        self._keys[key_id] = replace(key, revoked_at=milliseconds(now))
        return self._keys[key_id]

    async def revoke_all(self, user_id: str, now: dt.datetime) -> int:
        live = self._live(user_id)
        for key in live:
            await self.revoke(user_id, key.key_id, now)
        return len(live)

    async def revoked_since(self, moment: dt.datetime) -> list[bytes]:
        moment = milliseconds(moment)
        return [k.digest for k in self._keys.values() if k.revoked_at is not None and k.revoked_at >= moment]

    async def touch(self, uses: Mapping[str, dt.datetime]) -> None:
        for key_id, moment in uses.items():
            if (key := self._keys.get(key_id)) is not None:
                self._keys[key_id] = replace(key, last_used_at=later(key.last_used_at, moment))

    def _live(self, user_id: str) -> list[ApiKeyDocument]:
        keys = (self._keys[key_id] for key_id in self._by_user.get(user_id, ()))
        return [key for key in keys if key.revoked_at is None]


class FakeSessionRepository:
    def __init__(self, clock: Callable[[], dt.datetime] = utc_now) -> None:
        self._clock = clock
        self._sessions: dict[str, SessionDocument] = {}
        self._by_user: dict[str, set[str]] = {}
        self._due: dict[str, dt.datetime] = {}  # of those with something in the outbox

    async def find_by_id(self, session_id: str) -> SessionDocument | None:
        session = self._sessions.get(session_id)
        return None if session is None else _own_copy(session)

    async def find_by_user(
        self, user_id: str, skip: int, limit: int, status: str | None = None
    ) -> tuple[list[SessionDocument], int]:
        return await self.list_sessions(skip, limit, user_id=user_id, status=status)

    async def list_sessions(
        self, skip: int, limit: int, *, user_id: str | None = None, status: str | None = None
    ) -> tuple[list[SessionDocument], int]:
        ids = self._sessions if user_id is None else self._by_user.get(user_id, ())
        found = (self._sessions[each] for each in ids)
        wanted = (each for each in found if status is None or each.status == status)
        items, total = page(wanted, lambda each: each.session_id, skip, limit)
        return [_own_copy(each) for each in items], total

    async def create(self, session: SessionDocument) -> SessionDocument:
        if session.session_id in self._sessions:
            raise conflict("session_id")
        self._by_user.setdefault(session.user_id, set()).add(session.session_id)
        return self._store(
            replace(
                session,
                created_at=milliseconds(session.created_at),
                updated_at=milliseconds(session.updated_at),
                ended_at=cut(session.ended_at),
                outbox=tuple(replace(entry, at=milliseconds(entry.at)) for entry in session.outbox),
                outbox_due_at=cut(session.outbox_due_at),
            )
        )

    async def update(
        self, session_id: str, *, metadata: Mapping[str, Any], user_id: str | None = None
    ) -> SessionDocument | None:
        session = self._one(session_id, user_id)
        if session is None:
            return None
        return self._store(replace(session, metadata=dict(metadata), updated_at=milliseconds(self._clock())))

    async def update_status(
        self,
        session_id: str,
        status: str,
        *,
        allowed_from: frozenset[str],
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        ended: bool,
        entry: OutboxEntry | None,
    ) -> SessionDocument | None:
        session = self._one(session_id, user_id)
        if session is None or session.status not in allowed_from:
            return None
        now = milliseconds(self._clock())
        changed: dict[str, Any] = {"status": status, "updated_at": now}
        if metadata is not None:
            changed["metadata"] = dict(metadata)
        if ended:
            changed["ended_at"] = now
        if entry is not None:
            changed["outbox"] = (*session.outbox, replace(entry, at=milliseconds(entry.at)))
            changed["outbox_due_at"] = session.outbox_due_at or now
        return self._store(replace(session, **changed))

    async def delete(
        self,
        session_id: str,
        *,
        allowed_from: frozenset[str],
        user_id: str | None = None,
        entry: OutboxEntry | None,
    ) -> SessionDocument | None:
        return await self.update_status(
            session_id, "TERMINATED", allowed_from=allowed_from, user_id=user_id, ended=True, entry=entry
        )

    async def take_due(self, now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        if not self._due:
            return None
        oldest = min(self._due, key=self._due.__getitem__)
        return await self.claim(oldest, now, lease)

    async def claim(self, session_id: str, now: dt.datetime, lease: dt.timedelta) -> SessionDocument | None:
        due = self._due.get(session_id)
        if due is None or due > milliseconds(now):
            return None
        return self._store(replace(self._sessions[session_id], outbox_due_at=milliseconds(now + lease)))

    async def delivered(self, session_id: str, entry_id: str) -> SessionDocument | None:
        session = self._sessions.get(session_id)
        if session is None:
            return None
        left = tuple(entry for entry in session.outbox if entry.entry_id != entry_id)
        due = session.outbox_due_at if left else None
        return self._store(replace(session, outbox=left, outbox_due_at=due))

    async def put_off(self, session_id: str, until: dt.datetime) -> None:
        session = self._sessions.get(session_id)
        if session is not None and session.outbox:
            self._store(replace(session, outbox_due_at=milliseconds(until)))

    def _one(self, session_id: str, user_id: str | None) -> SessionDocument | None:
        session = self._sessions.get(session_id)
        return None if session is None or user_id not in (None, session.user_id) else session

    def _store(self, session: SessionDocument) -> SessionDocument:
        self._sessions[session.session_id] = _own_copy(session)
        if session.outbox and session.outbox_due_at is not None:
            self._due[session.session_id] = session.outbox_due_at
        else:
            self._due.pop(session.session_id, None)
        return session


def _own_copy(session: SessionDocument) -> SessionDocument:
    """What the caller changes in its metadata, and what it was given, stays its own."""
    return replace(session, metadata=copy.deepcopy(session.metadata)) if session.metadata else session
