"""Keeps the verification keys fresh where they come from a JWK set elsewhere (`JWKS_URL`)."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import TokenVerifier
from lucid.core.security.key_material import KeyMaterialError

REFRESH_SECONDS: Final = 300.0
RETRY_SECONDS: Final = 5.0
UNKNOWN_KEY_SECONDS: Final = 30.0
"""Between two fetches for tokens that name an unknown key: anyone can invent such tokens."""

_log = logging.getLogger(__name__)


class SigningKeys:
    """Fetches the key set, again every five minutes, and when a token names a key that is not in it. `fetch` gets a
    URL and returns the body of a 200 answer. Hand it its verifier with `attach` before anything else.
    """

    def __init__(
        self,
        url: str,
        fetch: Callable[[str], Awaitable[bytes]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._fetch = fetch
        self._monotonic = monotonic
        self._document = b""
        self._fetched_at = -UNKNOWN_KEY_SECONDS
        self._loading: asyncio.Task[bool] | None = None
        self.loaded = False

    def attach(self, verifier: TokenVerifier, memory: TokenMemory) -> None:
        self._verifier = verifier
        self._memory = memory

    def may_fetch(self) -> bool:
        """Whether a token that names an unknown key may cause a fetch now, or can wait for one that is under way."""
        if self._loading is not None and not self._loading.done():
            return True
        return self._monotonic() - self._fetched_at >= UNKNOWN_KEY_SECONDS

    async def load_for_unknown(self) -> None:
        """Fetch for a token that names an unknown key, or wait for a fetch that is under way; at most one each
        `UNKNOWN_KEY_SECONDS`, however many ask.
        """
        if self.may_fetch():
            await self.load()

    async def load(self) -> bool:
        """Fetch once; who asks meanwhile shares it. False where that failed: the keys held so far stay in use, and
        the log says why.
        """
        if self._loading is None or self._loading.done():
            self._fetched_at = self._monotonic()
            self._loading = asyncio.create_task(self._load(), name="lucid signing keys")
        return await asyncio.shield(self._loading)

    async def _load(self) -> bool:
        try:
            document = await self._fetch(self._url)
            if document == self._document:
                return True
            usable = self._verifier.load_jwks(document)
        except KeyMaterialError as error:
            _log.warning("%s", error)
            return False
        except Exception as error:  # noqa: BLE001 — whatever the injected client raises, keys in use stay in use
            _log.warning("JWKS_URL could not be fetched: %s", type(error).__name__)
            return False
        # A token that was good under a key now withdrawn must be verified anew.
        self._memory.forget()
        self._document = document
        self.loaded = True
        _log.info("%d keys from JWKS_URL", usable)
        return True

    async def keep_fresh(self) -> None:
        """Run as a task."""
        while True:
            loaded = await self.load()
            await asyncio.sleep(REFRESH_SECONDS if loaded else RETRY_SECONDS)
