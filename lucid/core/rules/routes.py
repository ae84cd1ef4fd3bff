"""The route table: which row a request belongs to, and what the row says about it.

1. A pattern is literal segments, `*` for any one segment, and at its end `**` for zero or more. Literals are
   compared with the segments of the canonical path (`targets.py`), case and all.
2. The more specific path wins, segment by segment from the left: literal, then `*`, then `**`; where the
   path ends, a pattern that ends there too goes before one with a `**` left over. What has no match further
   right does not count: `/a/b/c` falls back to `/a/*/c` if nothing below `/a/b` fits.
3. The path is decided before the method. Rows of one path share out its methods; a method that none of them
   has is 405, even where a less specific path would take it. GET implies HEAD.
4. One trailing slash means nothing here, in patterns and in paths; it is kept when forwarding.
5. A table is immutable and replaced whole. Requests in flight keep the row that they matched.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import msgspec

from lucid.core.exchange import Limit, Role
from lucid.core.rules.addresses import Networks
from lucid.core.rules.targets import Target, canonical
from lucid.settings import BackendSettings, RouteSettings, Timeouts

ALL_METHODS: Final = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
"""What `allow_header` says of a row that takes every method."""

_REMEMBERED = 4096
_LONGEST_REMEMBERED = 256
"""Characters of a path: with the count above, a flood of distinct ones fills 1.7 MB and no more."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class Backend(msgspec.Struct, frozen=True, eq=False):
    """A group of endpoints that serve the same. The wire attaches its pools and breaker by `name`."""

    name: str
    endpoints: tuple[str, ...]
    """Labels, `scheme://host:port`."""
    max_connections: int = 256
    """Per worker and endpoint."""
    health_path: str = ""
    """Empty: no active check."""

    @classmethod
    def from_settings(cls, settings: BackendSettings) -> "Backend":
        labels = tuple(endpoint.label for endpoint in settings.endpoints)
        return cls(settings.name, labels, settings.max_connections, settings.health_path)


class Route(msgspec.Struct, frozen=True, eq=False):
    """One row. Compared by identity, so that it is a cheap key for what is counted per row."""

    pattern: str
    backend: str = ""
    """The name of a backend; empty: the gateway's own, answered by the control plane."""
    access: Role = Role.USER
    methods: frozenset[str] | None = None
    """None: all. HEAD is added where GET is."""
    strip_prefix: str = ""
    max_body: int = 100 * 1_048_576
    """Bytes."""
    timeouts: Timeouts = Timeouts()
    websocket: bool = False
    networks: Networks | None = None
    """None: open to every address."""
    limits: tuple[Limit, ...] = ()
    """Besides the caller's tier."""
    counted: bool = True
    """False: charged to no limit at all, as `/health` is."""
    allow_header: str = ""
    """Made from `methods`; what is given for it is lost."""

    def __post_init__(self) -> None:
        methods = self.methods
        if methods is not None and "GET" in methods:
            methods |= {"HEAD"}
            msgspec.structs.force_setattr(self, "methods", methods)
        msgspec.structs.force_setattr(self, "allow_header", _allow(methods))

    @classmethod
    def from_settings(cls, settings: RouteSettings) -> "Route":
        """The row of a settings' route. Raises ValueError for an allow or deny that is no network."""
        limits = (
            Limit(limit.name, limit.requests, limit.window, limit.redis_down, limit.per)
            for limit in settings.limits
        )
        return cls(
            pattern=settings.path,
            backend=settings.backend,
            access=settings.access,
            methods=frozenset(settings.methods) or None,
            strip_prefix=settings.strip_prefix,
            max_body=settings.max_body,
            timeouts=settings.timeouts,
            websocket=settings.websocket,
            networks=Networks(settings.allow, settings.deny) if settings.allow or settings.deny else None,
            limits=tuple(limits),
        )


class MethodNotAllowed(msgspec.Struct, frozen=True):
    """The path has rows, none for this method: 405. `allow` is the value of the answer's Allow field."""

    allow: str


class _Place:
    """What the rows of one pattern make of a method: a look-up, and what holds for all others."""

    __slots__ = ("by_method", "methods", "otherwise")

    def __init__(self, routes: list[Route]) -> None:
        self.by_method: dict[str, Route] = {}
        self.otherwise: Route | MethodNotAllowed | None = None
        self.methods: frozenset[str] | None = frozenset()
        for route in routes:
            if route.methods is None:
                self.otherwise, self.methods = route, None
                return
            self.by_method.update(dict.fromkeys(route.methods, route))
        if routes:
            self.methods = frozenset(self.by_method)
            self.otherwise = MethodNotAllowed(_allow(self.methods))


class _Node:
    """A position in the patterns. `here`: patterns that end; `rest`: those whose `**` begins here."""

    __slots__ = ("any", "here", "literals", "rest")

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        self.any: _Node | None = None
        self.here: _Place | None = None
        self.rest: _Place | None = None


class RouteTable:
    """All rows, made with `build`. A path seen lately costs two look-ups."""

    __slots__ = ("_depth", "_exact", "_nowhere", "_remembered", "_root", "routes")

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self.routes: Final = routes
        self._nowhere = _Place([])
        self._root = _Node()
        self._exact: dict[str, _Place] = {}
        self._depth = 0
        # An exact memo with the least recently used dropped: a flood of paths costs hits, never memory.
        self._remembered = lru_cache(_REMEMBERED)(self._find)
        places: dict[tuple[str, ...], list[Route]] = {}
        for route in routes:
            places.setdefault(_segments(route.pattern), []).append(route)
        for segments, sharing in places.items():
            self._insert(segments, _Place(sharing))

    @classmethod
    def build(cls, routes: Iterable[Route]) -> "RouteTable":
        """A table of these rows, in any order. Raises ValueError that names the row and its fault."""
        rows = tuple(routes)
        taken: dict[tuple[str, ...], list[Route]] = {}
        for route in rows:
            fault = _fault(route)
            if fault:
                raise ValueError(f"route {route.pattern}: {fault}")
            sharing = taken.setdefault(_segments(route.pattern), [])
            for other in sharing:
                if route.methods is None or other.methods is None or route.methods & other.methods:
                    raise ValueError(f"route {route.pattern}: a second row for the same path and method")
            sharing.append(route)
        return cls(rows)

    def _insert(self, segments: tuple[str, ...], place: _Place) -> None:
        node = self._root
        self._depth = max(self._depth, len(segments))
        for segment in segments:
            if segment == "**":
                node.rest = place
                return
            if segment == "*":
                node.any = node.any or _Node()
                node = node.any
            else:
                node = node.literals.setdefault(segment, _Node())
        node.here = place
        if "*" not in segments:
            path = "/" + "/".join(segments)
            # A literal path is beaten by nothing: literal at every segment and ended where the path ends.
            self._exact[path] = self._exact[path.removesuffix("/") + "/"] = place

    def match(self, method: str, path: str) -> Route | MethodNotAllowed | None:
        """The row for a canonical path; MethodNotAllowed: 405; None: 404."""
        place = self._exact.get(path)
        if place is None:
            place = self._remembered(path) if len(path) <= _LONGEST_REMEMBERED else self._find(path)
        return place.by_method.get(method, place.otherwise)

    def methods(self, path: str) -> frozenset[str] | None:
        """All methods of a path's rows, as a preflight is told. None: every one; empty: no such path."""
        return self._find(path).methods

    def _find(self, path: str) -> _Place:
        if not path.startswith("/"):
            return self._nowhere
        # Deeper than any pattern only `**` matches, so the rest need not be taken apart, however long it is.
        segments = path.removesuffix("/").split("/", self._depth + 1)
        del segments[0]
        return _walk(self._root, segments, 0) or self._nowhere


def _walk(node: _Node, segments: list[str], at: int) -> _Place | None:
    """The most specific match below `node`. A tree, so each node is looked at once at most."""
    if at == len(segments):
        return node.here or node.rest
    literal = node.literals.get(segments[at])
    found = _walk(literal, segments, at + 1) if literal else None
    if found is None and node.any:
        found = _walk(node.any, segments, at + 1)
    return found or node.rest


def forward_path(route: Route, target: Target) -> str:
    """The request target to send to the backend of `route`, which `target.path` has matched."""
    if not route.strip_prefix:
        return target.path + target.query
    return (target.path[len(route.strip_prefix) :] or "/") + target.query


def lies_under(pattern: str, own: str) -> bool:
    """Whether a pattern names the same place as one of the gateway's own or one below it.

    For the loader of the optional file, which refuses such rows; both patterns must be valid.
    """
    ours, theirs = _segments(own), _segments(pattern)
    if ours[-1:] == ("**",):
        ours = ours[:-1]
    return len(theirs) >= len(ours) and all(
        segment in ("*", other) for segment, other in zip(ours, theirs, strict=False)
    )


def _segments(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.removesuffix("/").split("/")[1:])


def _allow(methods: frozenset[str] | None) -> str:
    return ", ".join(ALL_METHODS if methods is None else sorted(methods))


def _fault(route: Route) -> str:
    """What is wrong with a row taken alone; empty: nothing."""
    form = canonical(route.pattern)
    if isinstance(form, str):
        return form
    if form.query:
        return "a pattern has no query"
    if form.path != route.pattern:
        return f"the path must be spelled {form.path}"
    segments = _segments(route.pattern)
    if "**" in segments[:-1]:
        return "** may only be the last segment"
    if any("*" in segment and segment not in ("*", "**") for segment in segments):
        return "* and ** stand for whole segments"
    methods = route.methods
    if methods is not None and not (methods and all(map(_TOKEN.fullmatch, methods))):
        return "methods must be names of methods, one at least"
    if methods is not None and route.websocket and "GET" not in methods:
        return "a WebSocket begins with GET, which the methods lack"
    if route.max_body < 0:
        return "max_body must not be negative"
    prefix = _segments(route.strip_prefix)
    if route.strip_prefix and (
        not prefix
        or route.strip_prefix != "/" + "/".join(prefix)
        or prefix != segments[: len(prefix)]
        or "*" in route.strip_prefix
    ):
        return "strip_prefix must be the path's first segments, literal ones, without a slash at the end"
    return ""
