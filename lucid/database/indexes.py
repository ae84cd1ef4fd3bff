"""The indexes that the repositories rely on, made and kept in step once MongoDB is there.

Ours are known by their names. One whose definition differs from what stands under its name is dropped and made
anew; names that earlier releases used are dropped; whatever else is there belongs to somebody else and stays.
Several workers do this at once: each looks, changes what it must and looks again, until nothing is left to do.
Since a drop and a make leave a moment without the index, a *unique* one whose definition changes takes a new name,
and its old name joins the retired ones, which go last.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pymongo.errors import DuplicateKeyError, OperationFailure

from lucid.core.validation import email_key
from lucid.database.connection import Connection, Document
from lucid.errors import GatewayError, away

RETRY_SECONDS: Final = 5.0
_PASSES: Final = 20
_PASS_SECONDS: Final = 0.05
_API_KEY_SECONDS: Final = 7 * 86_400

_log = logging.getLogger(__name__)

# Somebody else was faster: IndexNotFound, NamespaceNotFound, IndexOptionsConflict, IndexKeySpecsConflict,
# IndexBuildAborted, BackgroundOperationInProgressForNamespace.
_LOOK_AGAIN: Final = frozenset({27, 26, 85, 86, 276, 12_587})


class Index(msgspec.Struct, frozen=True):
    """One index. `where`: the filter of a partial one. `expire_after_seconds`: a TTL index."""

    collection: str
    name: str
    keys: tuple[tuple[str, int], ...]
    unique: bool = False
    where: Mapping[str, Any] | None = None
    expire_after_seconds: int | None = None

    def options(self) -> Document:
        """As the driver takes them."""
        options: Document = {"name": self.name}
        if self.unique:
            options["unique"] = True
        if self.where is not None:
            options["partialFilterExpression"] = dict(self.where)
        if self.expire_after_seconds is not None:
            options["expireAfterSeconds"] = self.expire_after_seconds
        return options

    def is_like(self, standing: Mapping[str, Any]) -> bool:
        """Whether what stands there, as the server lists it, does the same; its name does not matter."""
        where = standing.get("partialFilterExpression")
        return (
            list(standing["key"].items()) == list(self.keys)
            and bool(standing.get("unique")) == self.unique
            and (None if where is None else _plain(where)) == self.where
            and standing.get("expireAfterSeconds") == self.expire_after_seconds
            and not any(name in standing for name in ("sparse", "collation", "hidden"))
        )


def _live(field: str) -> Mapping[str, Any]:
    # Unique among *live* users only, and only where the field is there. `live: true` rather than
    # `deleted_at: null`, since a partial filter may ask for $exists: true but not for false.
    return {"live": True, field: {"$exists": True}}


def _there(field: str) -> Mapping[str, Any]:
    return {field: {"$exists": True}}


INDEXES: Final = (
    Index("users", "live_tron_address", (("tron_address", 1),), unique=True, where=_live("tron_address")),
    Index("users", "live_email_key", (("email_key", 1),), unique=True, where=_live("email_key")),
    Index("users", "newest_first", (("created_at", -1), ("_id", 1))),
    Index("users", "tokens_revoked", (("tokens_revoked_at", 1),), where=_there("tokens_revoked_at")),
    Index("refresh_tokens", "of_user", (("user_id", 1),)),
    Index("refresh_tokens", "expiry", (("expires_at", 1),), expire_after_seconds=0),
    Index("refresh_tokens", "revoked", (("revoked_at", 1),), where=_there("revoked_at")),
    Index("refresh_tokens", "lasting", (("lasting", 1),), where=_there("lasting")),
    Index("api_keys", "digest", (("digest", 1),), unique=True),
    Index("api_keys", "of_user_newest_first", (("user_id", 1), ("created_at", -1), ("_id", 1))),
    Index("api_keys", "revoked", (("revoked_at", 1),), expire_after_seconds=_API_KEY_SECONDS),
    Index("api_keys", "expiry", (("expires_at", 1),), expire_after_seconds=_API_KEY_SECONDS),
    Index("sessions", "newest_first", (("created_at", -1), ("_id", 1))),
    Index("sessions", "by_status", (("status", 1), ("created_at", -1), ("_id", 1))),
    Index("sessions", "of_user", (("user_id", 1), ("created_at", -1), ("_id", 1))),
    Index("sessions", "of_user_by_status", (("user_id", 1), ("status", 1), ("created_at", -1), ("_id", 1))),
    Index("sessions", "outbox_due", (("outbox_due_at", 1),), where=_there("outbox_due_at")),
)

RETIRED: Final = (("users", "live_email"), ("api_keys", "of_user"))
"""Names that earlier releases used."""


class Indexes:
    """Makes the indexes, once per worker.

    Operations whose correctness rests on a unique index call `ensure` first. `keep_trying` is the
    background task that makes them at start, so that usually nobody waits.
    """

    def __init__(
        self,
        connection: Connection,
        wanted: tuple[Index, ...] = INDEXES,
        retired: tuple[tuple[str, str], ...] = RETIRED,
    ) -> None:
        self._connection = connection
        self._wanted = wanted
        self._retired = retired
        self._lock = asyncio.Lock()
        self._made = False

    @property
    def made(self) -> bool:
        return self._made

    async def ensure(self) -> None:
        """Return once all indexes exist. Raises GatewayError DEPENDENCY_AWAY, or CONFLICT where stored rows
        are duplicates to a unique index; the log says which.
        """
        if not self._made:
            async with self._lock:
                if not self._made:  # by whoever held the lock before
                    await self._keep_in_step()
                    self._made = True

    async def keep_trying(self) -> None:
        """Run as a task: try until they are made, then end."""
        while not self.made:
            try:
                await self.ensure()
            except GatewayError as error:
                _log.warning("indexes are not made yet (%s)", error.code.value)
                await asyncio.sleep(RETRY_SECONDS)
        _log.info("indexes are made")

    async def _keep_in_step(self) -> None:
        await self._fill_in_email_keys()
        for _ in range(_PASSES):
            if await self._pass():
                return
            await asyncio.sleep(_PASS_SECONDS)
        # Only a rival of another release could undo each time what we do.
        _log.error("mongodb: the indexes do not stay as they are made")
        raise away("mongodb")

    async def _pass(self) -> bool:
        """Look and change what differs; whether all stood as it should."""
        in_step = True
        for collection in dict.fromkeys(index.collection for index in self._wanted):
            with self._connection.border():
                listed = await self._connection.database[collection].list_indexes().to_list(None)
            standing = {each["name"]: each for each in listed}
            for index in self._wanted:
                if index.collection == collection and not await self._stands(index, standing):
                    in_step = False
            # Last, so that there is always one of the two.
            for retired_from, name in self._retired:
                if retired_from == collection and name in standing:
                    in_step = False
                    await self._drop(collection, name)
        return in_step

    async def _stands(self, index: Index, standing: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether this index stands; if not, it is made, or is to be looked at again."""
        under_its_name = standing.get(index.name)
        if under_its_name is not None and index.is_like(under_its_name):
            return True
        if under_its_name is None and any(index.is_like(other) for other in standing.values()):
            return True  # Somebody made the same under a name of their own; MongoDB takes no second one.
        if under_its_name is not None:
            _log.info("mongodb: index %s.%s has changed and is made anew", index.collection, index.name)
            await self._drop(index.collection, index.name)
        with self._connection.border():
            try:
                await self._connection.database[index.collection].create_index(
                    list(index.keys), **index.options()
                )
            except DuplicateKeyError as error:
                self._say_duplicate(index, error)
                raise
            except OperationFailure as error:
                if error.code not in _LOOK_AGAIN:
                    raise
                if not index.unique and self._is_blocked(index, standing):
                    _log.error(
                        "mongodb: index %s.%s cannot be made beside one of the same keys and another kind",
                        index.collection,
                        index.name,
                    )
                    return True
        return False

    @staticmethod
    def _is_blocked(index: Index, standing: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether somebody else's index has its keys. Ours is for speed then, or for clearing up: go on
        without.
        """
        return any(
            name != index.name and list(other["key"].items()) == list(index.keys)
            for name, other in standing.items()
        )

    async def _drop(self, collection: str, name: str) -> None:
        with self._connection.border():
            try:
                await self._connection.database[collection].drop_index(name)
            except OperationFailure as error:
                if error.code not in _LOOK_AGAIN:
                    raise

    async def _fill_in_email_keys(self) -> None:
        """Users of an earlier release have an email without its key. Python makes the key, not the server: its
        $toLower knows ASCII alone.
        """
        users = self._connection.database["users"]
        with self._connection.border():
            async for user in users.find({"email": {"$type": "string"}, "email_key": None}, {"email": 1}):
                try:
                    await users.update_one(
                        {"_id": user["_id"], "email": user["email"], "email_key": None},
                        {"$set": {"email_key": email_key(user["email"])}},
                    )
                except DuplicateKeyError as error:
                    self._say_duplicate(next(i for i in self._wanted if i.name == "live_email_key"), error)
                    raise

    @staticmethod
    def _say_duplicate(index: Index, error: DuplicateKeyError) -> None:
        fields = ", ".join(name for name, _ in index.keys)
        # The server's text names one of the values, which the log may not hold: it can be an email.
        _log.error(
            "mongodb: %s.%s cannot be unique: several rows have the same %s (code %s); remove or change all but one",
            index.collection,
            index.name,
            fields,
            error.code,
        )


def _plain(value: Any) -> Any:
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, Mapping) else value
