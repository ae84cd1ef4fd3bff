"""From where a request came, and the audit log's line that tells of it."""

import datetime as dt
import logging
from typing import Any, Final

import msgspec

from lucid.core.rules.refusals import ClaimHolder

_audit: Final = logging.getLogger("lucid.audit")


class Caller(msgspec.Struct, frozen=True):
    """From where a request came.

    `address` is the whole address, as the audit log tells it; whoever charges a limit counts an IPv6 one by its
    network. `exchange` is told what was charged on top; None: nobody shows it. `token` is the access token that
    the request came with, which the authentication cluster wants to see at a logout.
    """

    address: str
    request_id: str = ""
    exchange: ClaimHolder | None = None
    token: str = ""

    def __repr__(self) -> str:
        token = "***" if self.token else ""
        return f"Caller(address={self.address!r}, request_id={self.request_id!r}, token={token!r})"


def record(event: str, caller: Caller, **fields: Any) -> None:
    """One line in the audit log. What is secret does not come in: ids and codes only."""
    shown = {"address": caller.address, "request_id": caller.request_id, **fields}
    _audit.info(event, extra={"audit": {"event": event, **shown}})


def utc(seconds: float) -> dt.datetime:
    """Seconds since the epoch as the moment that is stored."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
