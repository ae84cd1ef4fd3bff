"""What schemathesis cannot know of this gateway, loaded by it in a process of its own (SCHEMATHESIS_HOOKS).

What formats mean; which credential goes with a request; the examples that only this run knows, such as ids of what is
there; and what a document cannot say. `FUZZ_PLAN` is a `Plan` as JSON.
"""

import itertools
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import base58
import msgspec
import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import Failure
from schemathesis.hooks import HookContext
from schemathesis.openapi.checks import RejectedPositiveData, UseAfterFree

from lucid.core.exchange import ROLES
from lucid.core.security.jwt import TokenIssuer
from lucid.settings import TokenSettings


class Plan(msgspec.Struct):
    """One run."""

    secret: str
    log: str
    """A line for each answer: operation, status."""
    role: str = ""
    """Of the tokens; empty: no credential."""
    user_id: str = ""
    spare_users: tuple[str, ...] = ()
    """Who calls what may end its caller's tokens."""
    parameters: dict[str, list[str]] = {}
    """Values of path parameters that are there."""
    bodies: dict[str, list[Any]] = {}
    """By operation id."""


ENDING = frozenset({"auth.logout", "users.update", "users.delete"})
ELSEWHERE = ("405", "408", "414", "417", "431", "500", "501", "505")
"""What the answer `default` stands for, besides 400."""

_plan = msgspec.json.decode(os.environ["FUZZ_PLAN"], type=Plan)
_issuer = TokenIssuer(TokenSettings(secret_key=_plan.secret))
_spare = itertools.cycle(_plan.spare_users or (_plan.user_id,))

# --- formats ----------------------------------------------------------------------------------------

_label = st.from_regex(r"[a-z0-9](?:[a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
_word = st.from_regex(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}", fullmatch=True)

schemathesis.openapi.format(
    "tron-address",
    st.binary(min_size=20, max_size=20).map(lambda tail: base58.b58encode_check(b"\x41" + tail).decode()),
)
schemathesis.openapi.format(
    "email",
    st.builds(
        lambda local, labels, top: f"{'.'.join(local)}@{'.'.join(labels)}.{top}",
        st.lists(_word, min_size=1, max_size=2),
        st.lists(_label, min_size=1, max_size=2),
        st.sampled_from(["org", "example", "xn--p1ai"]),
    ),
)
schemathesis.openapi.format(
    "password",
    st.text(
        st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=12, max_size=64
    ).filter(lambda text: len(set(text.casefold())) > 4),
)


schemathesis.openapi.format("signature", st.binary(min_size=65, max_size=65).map(bytes.hex))

OWN_FORMATS = frozenset({"tron-address", "email", "password", "signature"})
_SIGNATURE = "{130}$"


def _simplified(schema: Any) -> None:
    """A format of ours stands for its pattern and bounds: drawing from those takes minutes and says no more."""
    if isinstance(schema, list):
        for each in schema:
            _simplified(each)
    elif isinstance(schema, dict):
        if _SIGNATURE in str(schema.get("pattern", "")):
            schema["format"] = "signature"
        if schema.get("format") in OWN_FORMATS:
            for key in ("pattern", "minLength", "maxLength"):
                schema.pop(key, None)
        for each in schema.values():
            _simplified(each)


# --- credentials ------------------------------------------------------------------------------------


@schemathesis.auth(refresh_interval=None)
class FreshToken:
    """A token of a login of its own for each request, so that what ends a login ends no other request's."""

    def get(self, case: schemathesis.Case, _: schemathesis.AuthContext) -> str | None:
        if not _plan.role:
            return None
        ending = _id_of(case) in ENDING
        user_id = next(_spare) if ending else _plan.user_id
        family = str(uuid.uuid4())
        return _issuer.issue(user_id=user_id, role=ROLES[_plan.role], family=family, now=time.time()).token

    def set(self, case: schemathesis.Case, data: str | None, _: schemathesis.AuthContext) -> None:
        if data is not None:
            case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def before_call(_: HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Nobody ends the user who calls everything else, though its id is learned from answers."""
    parameters = case.path_parameters or {}
    if _id_of(case) in ENDING and parameters.get("user_id") == _plan.user_id:
        parameters["user_id"] = "me"


def _id_of(case: schemathesis.Case) -> str:
    return str(case.operation.definition.raw.get("operationId"))


# --- the document -----------------------------------------------------------------------------------


@schemathesis.hook
def before_load_schema(_: HookContext, raw_schema: dict[str, Any]) -> None:
    """`default` would let every status pass: its own are spelled out. What is there becomes an example."""
    _simplified(raw_schema)
    for item in raw_schema["paths"].values():
        for operation in item.values():
            default = operation["responses"].pop("default")
            for status in ELSEWHERE:
                operation["responses"].setdefault(status, default)
            for parameter in operation.get("parameters", ()):
                values = _plan.parameters.get(parameter["name"], ()) if parameter["in"] == "path" else ()
                if values:
                    parameter["examples"] = {value: {"value": value} for value in values}
            bodies = _plan.bodies.get(operation["operationId"], ())
            if bodies:
                content = operation["requestBody"]["content"]["application/json"]
                content["examples"] = {str(at): {"value": body} for at, body in enumerate(bodies)}


# --- what a document cannot say ---------------------------------------------------------------------

UNSTATED = re.compile(
    # Nothing in JSON Schema knows what time it is, how deep or large a value is, or Unicode's forms.
    r"expires_at: must lie in the future|expires_at: must be a moment of the years"
    r"|metadata.*: must (?:have|be|hold)"
    r"|(?:name|hardware_wallet\.device_id): must (?:be in Unicode's composed form|have no control characters)"
    r"|identifier: must be 1 to 128 printable characters"
    # What goes with what: descriptions tell.
    r"|(?:signature|message|current_password|email): (?:is missing|is needed|belongs to|must be absent)"
    r"|Send either Authorization or X-API-Key, not both"
)
"""Why a request may be refused that the document permits."""


@schemathesis.hook
def filter_failure(
    _: HookContext, failure: Failure, case: schemathesis.Case, response: schemathesis.Response
) -> bool:
    if isinstance(failure, RejectedPositiveData) and response.status_code == 400:
        return UNSTATED.match(response.json()["error"]["message"]) is None
    # A session that is terminated stays visible: what ends is the recording.
    return not (isinstance(failure, UseAfterFree) and case.operation.path.startswith("/api/v1/sessions/"))


# --- what happened ----------------------------------------------------------------------------------


@schemathesis.hook
def after_call(_: HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
    with Path(_plan.log).open("a") as log:
        log.write(f"{_id_of(case)} {response.status_code}\n")
