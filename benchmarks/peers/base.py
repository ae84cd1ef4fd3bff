"""What a peer is, and what the Python peers have in common."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from benchmarks.children import Child
from benchmarks.stage import Stage, find_program

ROOT = Path(__file__).resolve().parents[2]
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
    )
)


class Running(msgspec.Struct, frozen=True):
    """A started peer. CPU of `gateway` and its descendants is the peer's; that of `stores` is kept apart."""

    gateway: Child
    stores: tuple[Child, ...] = ()


class Peer(msgspec.Struct, frozen=True):
    """`start(stage, port)` returns once the peer listens. What it needs is looked for before anything starts:
    `programs` in PATH, `packages` by distribution, `modules` as files of this repository.

    `authenticates`: a request without a token must be answered 401. `answer_fields`: fields that prove
    that a feature is on. `proxies`: false for what answers by itself and so has no upload and download.
    """

    name: str
    title: str
    start: Callable[[Stage, int], Running]
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    authenticates: bool = False
    proxies: bool = True
    answer_fields: tuple[str, ...] = ()


def missing(peer: Peer) -> list[str]:
    """What this machine lacks for the peer, by name; empty when it can run."""
    lacking = [name for name in peer.programs if find_program(name) is None]
    lacking += [name for name in peer.packages if package_version(name) is None]
    return lacking + [name for name in peer.modules if not (ROOT / name).is_file()]


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def start_python(stage: Stage, port: int, module: str, name: str) -> Running:
    """Run a peer's module as a program: `python -m module port backend_url` (see `arguments`)."""
    argv = [sys.executable, "-m", module, str(port), stage.backend_url]
    env = {"PYTHONPATH": str(ROOT)}
    child = stage.children.start(name, argv, core=stage.gateway_core, env=env, port=port)
    return Running(child)


def arguments() -> tuple[int, str]:
    """Port and backend's URL, as `start_python` passes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("backend")
    given = parser.parse_args()
    return given.port, given.backend


def end_to_end(fields: Iterable[tuple[str, str]] | Mapping[str, str]) -> list[tuple[str, str]]:
    """The fields that a proxy passes on (RFC 9110 7.6.1); lengths are the HTTP library's own business."""
    pairs = fields.items() if isinstance(fields, Mapping) else fields
    return [(name, value) for name, value in pairs if name.lower() not in HOP_BY_HOP]
