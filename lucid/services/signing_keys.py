"""Keeps the verification keys fresh where they come from a JWK set elsewhere (`JWKS_URL`)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import KeyMaterialError, TokenVerifier

REFRESH_SECONDS: Final = 300.0
RETRY_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


class SigningKeys:
    """Fetches the key set, and again every five minutes. `fetch` gets a URL and returns the body of a 200
    answer.
    """

    def __init__(
        self,
        url: str,
        fetch: Callable[[str], Awaitable[bytes]],
        verifier: TokenVerifier,
        memory: TokenMemory,
    ) -> None:
        self._url = url
        self._fetch = fetch
        self._verifier = verifier
        self._memory = memory
        self._document = b""
        self.loaded = False

    async def load(self) -> bool:
        """Fetch once. False where that failed: the keys held so far stay in use, and the log says why."""
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
