"""The client of the authentication cluster (Cluster 09): `POST /auth/login /auth/refresh /auth/logout /auth/verify`.

Who calls has already compared the challenge and checked the signature; the cluster gives the tokens. Its answers
are believed no more than a caller's request: bounded, decoded into exact types, and held against what was asked,
since an answer that belongs to somebody else (a cache in between, a mixed-up connection) would log one user in as
another. What the cluster's statuses become:

    status                   login, refresh    logout             verify
    200                      the tokens        done (any 2xx)     the principal, or why there is none
    401                      BAD_CREDENTIAL    done already       BAD_CREDENTIAL
    400, 422                 BAD_CREDENTIAL    BACKEND_BROKEN     BAD_CREDENTIAL
    403                      BAD_CREDENTIAL    ROLE_TOO_LOW       BACKEND_BROKEN
    404                      BACKEND_BROKEN    done already       BACKEND_BROKEN
    409                      BAD_CREDENTIAL    BACKEND_BROKEN     BACKEND_BROKEN
    429                      RATE_LIMITED      RATE_LIMITED       RATE_LIMITED
    all others               BACKEND_BROKEN    BACKEND_BROKEN     BACKEND_BROKEN

The contract has two answers to a login and a refresh, tokens or 401, and many servers say 400 for a refresh token
that is not good (RFC 6749, 5.2). A 403 of `verify` cannot mean the token, which is not what it is called with: then
the cluster does not let the gateway in, and telling its users that their tokens are bad would log all of them out.
No connection, an open breaker and a full pool are BACKEND_UNAVAILABLE; what comes too late is BACKEND_TIMEOUT.
"""

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from typing import Any, Final, TypeVar, cast

import httpx
import msgspec

from lucid.core.exchange import Principal
from lucid.core.security import jwt
from lucid.core.validation import bad_field
from lucid.core.wire.transport import BreakerOpen
from lucid.errors import AWAY_RETRY_SECONDS, ErrorCode, GatewayError
from lucid.services.cluster_answers import (
    ACCESS_TOKEN,
    ClusterLogin,
    ClusterTokens,
    Nonsense,
    RawTokens,
    RawVerified,
    checked_tokens,
    principal_of,
)

DEPENDENCY: Final = "auth-service"
CALL_SECONDS: Final = 5.0
VERIFY_SECONDS: Final = 2.0
"""`verify` stands between a request and its backend; the others only before a person who waits for a login."""
MAX_ANSWER_BYTES: Final = 65_536
MOST_RETRY_SECONDS: Final = 3_600

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETRY_AFTER: Final = re.compile(r"[0-9]{1,4}")

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

T = TypeVar("T")


class _Answer(msgspec.Struct, frozen=True):
    status: int
    content: bytes | None
    """None: longer than an answer may be."""
    content_type: str
    retry_after: str


_decode_tokens = msgspec.json.Decoder(RawTokens).decode
_decode_verified = msgspec.json.Decoder(RawVerified).decode

_LOGIN: Final = "/auth/login"
_REFRESHING: Final = "/auth/refresh"
_LOGOUT: Final = "/auth/logout"
_VERIFY: Final = "/auth/verify"
_NO_TOKENS: Final = frozenset({400, 401, 403, 409, 422})
_NOT_GOOD: Final = frozenset({400, 401, 422})
_LOGGED_OUT: Final = frozenset({401, 404})


class AuthCluster:
    """One per worker. Its methods raise GatewayError alone, with the details `{"dependency": "auth-service"}` where
    the cluster failed. Call `aclose` at the end.

    `retry_after` says after how many seconds the breaker lets calls pass again. Every call has a deadline for all of
    it; the time-outs inside it are shorter, because a call that only the deadline ended says nothing to the breaker.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        issuers: Collection[str],
        wall_clock: Callable[[], float] = time.time,
        retry_after: Callable[[], float] | None = None,
        call_seconds: float = CALL_SECONDS,
        verify_seconds: float = VERIFY_SECONDS,
    ) -> None:
        self._client = client
        self._issuers = frozenset(issuers) - {""}
        self._wall_clock = wall_clock
        self._retry_after = retry_after
        self._call_seconds = call_seconds
        self._verify_seconds = verify_seconds

    async def aclose(self) -> None:
        """Close the client. Calls from then on are refused as BACKEND_UNAVAILABLE."""
        await self._client.aclose()

    def issues(self, token: str) -> bool:
        """Whether this token claims one of the cluster's issuers, so that `verify` is to be asked about it."""
        return jwt.issuer_of(token) in self._issuers

    async def login(self, body: Mapping[str, Any], request_id: str) -> ClusterLogin:
        """Tokens for the wallet `body["tron_address"]`; the body goes on as it is.

        Check the challenge and the signature first. Raises BAD_CREDENTIAL, RATE_LIMITED, BACKEND_…. Never sent twice.
        """
        address = body.get("tron_address")
        if not isinstance(address, str):
            raise bad_field("tron_address", "must be given")
        answer = await self._post(_LOGIN, body, request_id, self._call_seconds)
        if answer.status != 200:
            raise self._refusal(_LOGIN, answer, request_id, _NO_TOKENS)
        try:
            tokens = checked_tokens(_decoded(_decode_tokens, answer))
            if not isinstance(tokens, ClusterLogin):
                raise Nonsense("the user is missing")
            if tokens.tron_address != address:
                raise Nonsense("user.tron_address is not the one that logged in")
        except Nonsense as nonsense:
            raise _broken(_LOGIN, str(nonsense), request_id) from None
        return tokens

    async def refresh(self, refresh_token: str, request_id: str) -> ClusterTokens:
        """A new pair: a `ClusterLogin` where the answer says whose it is, which it need not.

        Raises BAD_CREDENTIAL, RATE_LIMITED, BACKEND_…. Never sent twice: the first time may have spent the token.
        """
        body = {"refresh_token": refresh_token}
        answer = await self._post(_REFRESHING, body, request_id, self._call_seconds)
        if answer.status != 200:
            raise self._refusal(_REFRESHING, answer, request_id, _NO_TOKENS)
        try:
            return checked_tokens(_decoded(_decode_tokens, answer))
        except Nonsense as nonsense:
            raise _broken(_REFRESHING, str(nonsense), request_id) from None

    async def logout(self, access_token: str | None, all_logins: bool, request_id: str) -> None:
        """End the login of this token of the cluster's, or all logins of its user; one that has ended is no error.

        Raises NO_CREDENTIAL without a token, ROLE_TOO_LOW, RATE_LIMITED, BACKEND_…. What this worker remembers
        of the token is the caller's to forget.
        """
        if access_token is None:
            raise GatewayError(ErrorCode.NO_CREDENTIAL)
        if ACCESS_TOKEN.fullmatch(access_token) is None:
            raise GatewayError(ErrorCode.BAD_CREDENTIAL)
        answer = await self._post(
            _LOGOUT, {"all_logins": all_logins}, request_id, self._call_seconds, access_token
        )
        if 200 <= answer.status < 300 or answer.status in _LOGGED_OUT:
            return
        if answer.status == 403:
            raise GatewayError(ErrorCode.ROLE_TOO_LOW)
        raise self._refusal(_LOGOUT, answer, request_id, frozenset())

    async def verify(self, token: str, request_id: str) -> Principal | ErrorCode:
        """The caller that the cluster says this token names, or CREDENTIAL_EXPIRED, or BAD_CREDENTIAL.

        A token that does not claim one of the issuers is BAD_CREDENTIAL without being shown to the cluster. Raises
        RATE_LIMITED, BACKEND_…. Nothing is remembered here.
        """
        claimed = jwt.claimed(token)
        if claimed is None or claimed.iss not in self._issuers:
            return ErrorCode.BAD_CREDENTIAL
        answer = await self._post(_VERIFY, {"token": token}, request_id, self._verify_seconds)
        if answer.status in _NOT_GOOD:
            return ErrorCode.BAD_CREDENTIAL
        if answer.status != 200:
            raise self._refusal(_VERIFY, answer, request_id, frozenset())
        try:
            verified = _decoded(_decode_verified, answer)
            if not verified.active:
                return ErrorCode.BAD_CREDENTIAL
            return principal_of(verified, claimed, self._wall_clock())
        except Nonsense as nonsense:
            raise _broken(_VERIFY, str(nonsense), request_id) from None

    async def _post(
        self, path: str, body: Mapping[str, Any], request_id: str, seconds: float, bearer: str = ""
    ) -> _Answer:
        if self._client.is_closed:
            raise self._unavailable(None)
        # Identity: a few bytes of gzip may stand for gigabytes.
        fields = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if _REQUEST_ID.fullmatch(request_id):
            fields["X-Request-ID"] = request_id
        if bearer:
            fields["Authorization"] = f"Bearer {bearer}"
        content = _encode(body)
        try:
            async with asyncio.timeout(seconds):
                try:
                    return await self._exchange(path, content, fields, seconds)
                except httpx.ReadError:
                    # A kept connection that the cluster closed meanwhile. Only `verify` changes nothing there.
                    if path != _VERIFY:
                        raise
                return await self._exchange(path, content, fields, seconds)
        except (httpx.ConnectError, httpx.PoolTimeout) as error:
            raise self._unavailable(error) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _failed(ErrorCode.BACKEND_TIMEOUT) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise _broken(path, f"{type(error).__name__} while it came", request_id) from None

    async def _exchange(
        self, path: str, content: bytes, fields: Mapping[str, str], seconds: float
    ) -> _Answer:
        short = 0.2 * seconds
        request = self._client.build_request(
            "POST",
            path,
            content=content,
            headers=fields,
            timeout=httpx.Timeout(connect=short, pool=short, write=short, read=0.5 * seconds),
        )
        response = await self._client.send(request, stream=True, follow_redirects=False)
        try:
            # Also where only the status counts: a body left unread costs its connection.
            read = await _read(response) if response.status_code < 500 else b""
        finally:
            await response.aclose()
        return _Answer(
            response.status_code,
            read,
            response.headers.get("content-type", ""),
            response.headers.get("retry-after", ""),
        )

    def _refusal(
        self, path: str, answer: _Answer, request_id: str, no_tokens: frozenset[int]
    ) -> GatewayError:
        if answer.status in no_tokens:
            return GatewayError(ErrorCode.BAD_CREDENTIAL)
        if answer.status == 429:
            seconds = int(answer.retry_after) if _RETRY_AFTER.fullmatch(answer.retry_after) else 0
            return _failed(ErrorCode.RATE_LIMITED, seconds if seconds <= MOST_RETRY_SECONDS else 0)
        return _broken(path, f"its status is {answer.status}", request_id)

    def _unavailable(self, error: httpx.TransportError | None) -> GatewayError:
        seconds = float(AWAY_RETRY_SECONDS)
        if isinstance(error, BreakerOpen) and self._retry_after is not None:
            seconds = self._retry_after()
        return _failed(ErrorCode.BACKEND_UNAVAILABLE, math.ceil(min(max(1.0, seconds), MOST_RETRY_SECONDS)))


async def _read(response: httpx.Response) -> bytes | None:
    """The body as it came, cut off at the bound; None: there was more."""
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_ANSWER_BYTES:
        return None
    content = bytearray()
    async with contextlib.aclosing(cast("AsyncGenerator[bytes]", response.aiter_raw())) as pieces:
        async for piece in pieces:
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                return None
    return bytes(content)


def _decoded(decode: Callable[[bytes], T], answer: _Answer) -> T:
    if answer.content_type.partition(";")[0].strip().lower() != "application/json":
        raise Nonsense("it is no JSON by its Content-Type")
    if answer.content is None:
        raise Nonsense(f"it has more than {MAX_ANSWER_BYTES} bytes")
    try:
        return decode(answer.content)
    except msgspec.ValidationError as error:
        # Names types and the field's path, never a value.
        raise Nonsense(str(error)) from None
    except (ValueError, msgspec.DecodeError, RecursionError):
        raise Nonsense("it is no JSON") from None


def _broken(path: str, reason: str, request_id: str) -> GatewayError:
    """The error of an answer that was not understood, and the one line about it."""
    _log.warning(
        "%s: the answer to POST %s was not understood: %s (request %s)", DEPENDENCY, path, reason, request_id
    )
    return _failed(ErrorCode.BACKEND_BROKEN)


def _failed(code: ErrorCode, retry_after_seconds: int = 0) -> GatewayError:
    fields = (("Retry-After", str(retry_after_seconds)),) if retry_after_seconds else ()
    return GatewayError(code, details={"dependency": DEPENDENCY}, fields=fields)
