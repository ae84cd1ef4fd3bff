"""The `lucid` command. Wrong usage and settings: one line per fault, status 2; other failures: status 1."""

import argparse
import asyncio
import os
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from msgspec.structs import replace

from lucid import __version__
from lucid.core.exchange import ROLES
from lucid.settings import Settings, SettingsError, load_settings


class _UsageError(Exception):
    """The command line is wrong; the text is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
        status: int = options.run(options, os.environ)
        sys.stdout.flush()
    except _UsageError as error:
        return _complain(2, str(error))
    except SettingsError as error:
        return _complain(2, *error.faults)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output had enough of it; nothing may be flushed into the broken pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _is_for_people(error):
            raise
        return _complain(1, f"lucid: {error}")
    return status


def _is_for_people(error: Exception) -> bool:
    from lucid.dev.embedded import EmbeddedError
    from lucid.server import StartError

    return isinstance(error, EmbeddedError | StartError)


def _complain(status: int, *lines: str) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return status


def _parser() -> _Parser:
    parser = _Parser(prog="lucid", description="The API gateway of the Lucid platform.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lucid {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def command(
        name: str, run: Callable[[Any, Mapping[str, str]], int], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    command("serve", _serve, "serve with the settings of the environment")
    dev = command(
        "dev", _dev, "serve with embedded stores and demo backends, for looking around and developing"
    )
    dev.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    dev.add_argument(
        "--port", type=_integer(1, 65_535), default=0, help="port to listen on (PORT, else 8080)"
    )
    dev.add_argument("--workers", type=_integer(1, 256), default=0, help="worker processes (WORKERS, else 1)")
    _add_data(dev, "folder for the stores' data and the token key")
    dev.add_argument(
        "--demo", action=argparse.BooleanOptionalAction, default=True, help="start demo backends"
    )
    command("check", _check, "read the settings, try every dependency, print what would run")
    command("routes", _routes, "print the route table as it would run")
    from lucid.core.security.jwt import LONGEST_LIFE_MINUTES

    token = command("token", _token, "print an access token made with the configured key")
    token.add_argument("--user", required=True, metavar="ID", help="the user id that it is for")
    token.add_argument("--role", choices=list(ROLES), default="user", help="its role (%(default)s)")
    token.add_argument(
        "--minutes",
        type=_integer(1, LONGEST_LIFE_MINUTES),
        metavar="N",
        help="its life (TOKEN_EXPIRE_MINUTES, else 15)",
    )
    _add_data(token, "folder of lucid dev, whose key is used when the environment names none")
    command("openapi", _openapi, "print the OpenAPI document of the gateway's own routes")
    return parser


def _add_data(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--data", type=Path, default=Path(".lucid"), metavar="DIR", help=f"{text} (%(default)s)"
    )


def _integer(low: int, high: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be an integer from {low} to {high}, not {text!r}")
        return int(text)

    return check


def _serve(_: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from lucid.server import serve

    return serve(load_settings(environ))


def _dev(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from lucid.dev.command import run

    return run(
        environ,
        host=options.host,
        port=options.port,
        workers=options.workers,
        data=options.data,
        demo=options.demo,
    )


def _check(_: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from lucid.probe import probe
    from lucid.settings.describe import columns, describe

    settings = load_settings(environ)
    print(columns([*describe(settings)]))
    print()
    print(_route_table(settings))
    print()
    faults = 0
    for label, fault in asyncio.run(probe(settings)):
        if fault:
            faults += 1
            sys.stdout.flush()
            print(f"{label}: {fault}", file=sys.stderr)
        else:
            print(f"{label}: answers")
    return 1 if faults else 0


def _routes(_: argparse.Namespace, environ: Mapping[str, str]) -> int:
    print(_route_table(load_settings(environ, serve=False)))
    return 0


def _route_table(settings: Settings) -> str:
    """All rows that requests are judged by: the backends' and the gateway's own."""
    from lucid.blueprints.access import own_routes
    from lucid.settings.describe import columns, route_rows
    from lucid.settings.limits import named_limits

    return columns(route_rows(settings, own_routes(named_limits(settings.rates))))


def _token(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from lucid.core.security.jwt import TokenIssuer
    from lucid.core.validation import is_user_id
    from lucid.dev.command import with_kept_secret

    # As `serve` would read it, so that a missing key is the same fault.
    issuer = TokenIssuer(load_settings(with_kept_secret(environ, options.data, make=False)).tokens)
    if not issuer.can_issue:
        raise SettingsError(
            ["JWT_PRIVATE_KEY: must be set to issue tokens; JWT_PUBLIC_KEY and JWKS_URL only verify them"]
        )
    if options.user == "me" or not is_user_id(options.user):
        # `me` is whoever asks, in /users/me.
        raise _UsageError(
            "lucid token: argument --user: must be 1 to 64 of A-Z, a-z, 0-9, _ and -, and not me"
        )
    try:
        issued = issuer.issue(
            user_id=options.user,
            role=ROLES[options.role],
            family=str(uuid.uuid4()),
            now=time.time(),
            minutes=options.minutes,
        )
    except ValueError as error:
        raise _UsageError(f"lucid token: {error}") from None
    print(issued.token)
    return 0


def _openapi(_: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = _readable(environ)
    import msgspec

    from lucid.app import create_app

    print(msgspec.json.format(create_app(settings).ctx.openapi).decode())
    return 0


def _readable(environ: Mapping[str, str]) -> Settings:
    """Settings to look at, not to serve: a missing key is made up, as the app cannot be built without one."""
    settings = load_settings(environ, serve=False)
    tokens = settings.tokens
    if tokens.secret_key or tokens.private_key or tokens.public_key or tokens.jwks_url:
        return settings
    return replace(
        settings,
        tokens=replace(tokens, algorithm="HS256", secret_key=secrets.token_hex(32), previous_keys=()),
    )
