"""Which row a request belongs to."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid.core.exchange import Limit, Role
from lucid.core.rules import routes as module
from lucid.core.rules.routes import Backend, MethodNotAllowed, Route, RouteTable, forward_path, lies_under
from lucid.core.rules.targets import Target
from lucid.settings import BackendSettings, EndpointSettings, LimitSettings, RouteSettings, Timeouts


def row(pattern: str, methods: str = "") -> Route:
    return Route(pattern, "b", methods=frozenset(methods.split()) or None)


def table(*patterns: str) -> RouteTable:
    return RouteTable.build(row(pattern) for pattern in patterns)


def winner(routes: RouteTable, path: str, method: str = "GET") -> str | None:
    found = routes.match(method, path)
    assert not isinstance(found, MethodNotAllowed)
    return found.pattern if found else None


class TestThePath:
    @pytest.mark.parametrize(
        "patterns, path, expected",
        [
            ("/", "/", "/"),
            ("/**", "/", "/**"),
            ("/ /**", "/", "/"),
            ("/a", "/", None),
            ("/*", "/", None),
            ("/a", "/a", "/a"),
            ("/a", "/a/", "/a"),
            ("/a/", "/a", "/a/"),
            ("/a", "/A", None),
            ("/a", "/a/b", None),
            ("/a", "/ab", None),
            ("/*", "/x", "/*"),
            ("/*", "/x/", "/*"),
            ("/*", "/x/y", None),
            ("/a/**", "/a", "/a/**"),
            ("/a/**", "/a/", "/a/**"),
            ("/a/**", "/a/b/c/d/", "/a/**"),
            ("/a/**", "/ab", None),
            ("/a/*/**", "/a", None),
            ("/a/*/**", "/a/b", "/a/*/**"),
            ("/a /a/* /a/**", "/a", "/a"),
            ("/a/** /a/*", "/a/b", "/a/*"),
            ("/a/** /a/*", "/a/b/c", "/a/**"),
            ("/a/*/c /a/b/**", "/a/b/c", "/a/b/**"),
            ("/a/*/c /a/b/**", "/a/x/c", "/a/*/c"),
            ("/a/*/c /a/b/d", "/a/b/c", "/a/*/c"),
            ("/a/*/c /a/b/d /a/**", "/a/b/e", "/a/**"),
            ("/*/b /a/*", "/a/b", "/a/*"),
            ("/** /*/b", "/x/c", "/**"),
            ("/a/%20 /a/*", "/a/%20", "/a/%20"),
            ("/a/%2A /a/*", "/a/*", "/a/*"),
            ("/a", "*", None),
            ("/**", "*", None),
            ("", "/", None),
        ],
    )
    def test_the_more_specific_wins_from_the_left(
        self, patterns: str, path: str, expected: str | None
    ) -> None:
        rows = patterns.split()
        for order in (rows, rows[::-1]):
            routes = table(*order)
            # The second time it is answered from memory.
            assert [winner(routes, path), winner(routes, path)] == [expected, expected]

    def test_a_long_path_is_matched_too_and_not_remembered(self) -> None:
        routes = table("/a/**", "/a/*/c")
        deep = "/a/" + "x/" * 4000
        for _ in range(2):
            assert winner(routes, deep) == "/a/**"
            assert winner(routes, "/b" + deep) is None
            assert winner(routes, "/a/" + "x" * 4000 + "/c") == "/a/*/c"
        assert routes._remembered.cache_info().currsize == 0

    def test_a_flood_of_paths_fills_a_bounded_memory_and_changes_no_answer(self) -> None:
        routes = table("/a/**", "/a/*/c")
        for number in range(2 * module._REMEMBERED):
            assert winner(routes, f"/a/{number}") == "/a/**"
            assert winner(routes, f"/nowhere/{number}") is None
        assert routes._remembered.cache_info().currsize == module._REMEMBERED
        assert winner(routes, "/a/0/c") == "/a/*/c"


class TestTheMethod:
    def test_get_implies_head(self) -> None:
        route = row("/a", "GET")
        routes = RouteTable.build([route])
        assert routes.match("GET", "/a") is routes.match("HEAD", "/a") is route
        assert route.methods == frozenset({"GET", "HEAD"})
        assert route.allow_header == "GET, HEAD"

    def test_head_alone_implies_nothing(self) -> None:
        assert RouteTable.build([row("/a", "HEAD")]).match("GET", "/a") == MethodNotAllowed("HEAD")

    def test_a_row_without_methods_takes_all(self) -> None:
        route = row("/a/**")
        routes = RouteTable.build([route])
        assert {routes.match(method, "/a/b") for method in ("GET", "OPTIONS", "PURGE")} == {route}
        assert route.allow_header == "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"

    def test_a_method_that_the_winner_lacks_is_refused_though_others_have_it(self) -> None:
        routes = RouteTable.build([row("/a/b", "POST"), row("/a/*", "GET"), row("/**")])
        for path in ("/a/b", "/a/b/"):
            assert routes.match("GET", path) == MethodNotAllowed("POST")
            assert routes.match("OPTIONS", path) == MethodNotAllowed("POST")

    def test_methods_are_compared_as_they_are(self) -> None:
        assert RouteTable.build([row("/a", "GET")]).match("get", "/a") == MethodNotAllowed("GET, HEAD")

    def test_rows_of_one_path_share_out_its_methods(self) -> None:
        sign_up, look = row("/users", "POST"), row("/users/", "GET DELETE")
        routes = RouteTable.build([sign_up, look])
        assert routes.match("POST", "/users") is sign_up
        assert routes.match("HEAD", "/users/") is look
        assert routes.match("PUT", "/users") == MethodNotAllowed("DELETE, GET, HEAD, POST")

    def test_a_preflight_is_told_of_all_rows_of_the_path(self) -> None:
        routes = RouteTable.build([row("/users", "POST"), row("/users", "GET"), row("/all/**")])
        assert routes.methods("/users/") == frozenset({"GET", "HEAD", "POST"})
        assert routes.methods("/all/x") is None
        assert routes.methods("/nowhere") == frozenset()


_segment = st.sampled_from(["a", "b", "*"])
_pattern = st.builds(
    lambda segments, rest: "/" + "/".join(segments + rest),
    st.lists(_segment, max_size=4),
    st.sampled_from([[], ["**"]]),
)


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return True
    return bool(path) and pattern[0] in ("*", path[0]) and _matches(pattern[1:], path[1:])


def _rank(pattern: list[str], path: list[str]) -> list[int]:
    """0 literal, 1 `*`, 2 `**` for each segment of the path; last, 1 for a `**` that is left over."""
    ranks = [["*", "**"].index(segment) + 1 if "*" in segment else 0 for segment in pattern[: len(path)]]
    ranks += [2] * (len(path) - len(ranks))
    return [*ranks, len(pattern) > len(path)]


@given(
    st.lists(_pattern, max_size=8, unique=True),
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6), min_size=1, max_size=4),
    st.booleans(),
)
def test_it_agrees_with_trying_every_pattern(
    patterns: list[str], paths: list[list[str]], slash: bool
) -> None:
    routes = table(*patterns)
    for path in paths:
        fitting = [p for p in patterns if _matches([s for s in p.split("/") if s], path)]
        expected = min(fitting, key=lambda p: _rank([s for s in p.split("/") if s], path), default=None)
        text = "/" + "/".join(path)
        assert winner(routes, text + "/" if slash and path else text) == expected


def test_the_order_of_rows_means_nothing() -> None:
    rows = ["/**", "/a/**", "/a/*", "/a/b", "/a/*/c", "/a/b/**", "/*/b"]
    paths = ["/", "/a", "/a/b", "/a/x", "/a/x/c", "/a/b/c", "/x/b", "/x/y/z"]
    expected = [winner(table(*rows), path) for path in paths]
    shuffled = random.Random(7)
    for _ in range(20):
        shuffled.shuffle(rows)
        assert [winner(table(*rows), path) for path in paths] == expected


class TestFaults:
    @pytest.mark.parametrize(
        "fields, fault",
        [
            ({"pattern": "a/b"}, "must begin with /"),
            ({"pattern": ""}, "must begin with /"),
            ({"pattern": "/a//b"}, "empty segment"),
            ({"pattern": "/a/../b"}, "dot segment"),
            ({"pattern": "/a b"}, "not allowed"),
            ({"pattern": "/a?b"}, "no query"),
            ({"pattern": "/%41%c3%a9"}, r"spelled /A%C3%A9$"),
            ({"pattern": "/**/a"}, "last segment"),
            ({"pattern": "/**/**"}, "last segment"),
            ({"pattern": "/a*"}, "whole segments"),
            ({"pattern": "/***"}, "whole segments"),
            ({"pattern": "/a", "methods": frozenset()}, "methods must"),
            ({"pattern": "/a", "methods": frozenset({"GET", "A B"})}, "methods must"),
            ({"pattern": "/a", "methods": frozenset({"POST"}), "websocket": True}, "WebSocket"),
            ({"pattern": "/a", "max_body": -1}, "max_body"),
            ({"pattern": "/a/b/**", "strip_prefix": "/"}, "strip_prefix"),
            ({"pattern": "/a/b/**", "strip_prefix": "a"}, "strip_prefix"),
            ({"pattern": "/a/b/**", "strip_prefix": "/a/"}, "strip_prefix"),
            ({"pattern": "/a/b/**", "strip_prefix": "/b"}, "strip_prefix"),
            ({"pattern": "/a/b/**", "strip_prefix": "/a/b/c"}, "strip_prefix"),
            ({"pattern": "/a/bc/**", "strip_prefix": "/a/b"}, "strip_prefix"),
            ({"pattern": "/a/*/c", "strip_prefix": "/a/*"}, "strip_prefix"),
        ],
    )
    def test_a_row_with_a_fault_is_named_with_it(self, fields: dict[str, object], fault: str) -> None:
        with pytest.raises(ValueError, match=fault) as caught:
            RouteTable.build([row("/fine"), Route(**fields)])  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"route {fields['pattern']}: ")

    @pytest.mark.parametrize(
        "one, other",
        [
            (row("/a"), row("/a")),
            (row("/a"), row("/a/", "GET")),
            (row("/a", "GET"), row("/a")),
            (row("/a/*", "GET POST"), row("/a/*", "POST PUT")),
            (row("/a/**", "GET"), row("/a/**", "HEAD")),
        ],
    )
    def test_two_rows_for_one_path_and_method(self, one: Route, other: Route) -> None:
        with pytest.raises(ValueError, match="second row"):
            RouteTable.build([one, row("/a/b"), other])


class TestForwarding:
    @pytest.mark.parametrize(
        "strip, path, query, sent",
        [
            ("", "/api/v1/reports/7/", "?a=%2f", "/api/v1/reports/7/?a=%2f"),
            ("/api/v1", "/api/v1/reports/7", "", "/reports/7"),
            ("/api/v1", "/api/v1/reports/", "?", "/reports/?"),
            ("/api/v1/reports", "/api/v1/reports/7", "?x", "/7?x"),
            ("/api/v1/reports", "/api/v1/reports/", "", "/"),
            ("/api/v1/reports", "/api/v1/reports", "?x", "/?x"),
        ],
    )
    def test_a_prefix_is_stripped_and_all_else_kept(
        self, strip: str, path: str, query: str, sent: str
    ) -> None:
        route = Route("/api/v1/reports/**", "reports", strip_prefix=strip)
        assert RouteTable.build([route]).match("GET", path) is route
        assert forward_path(route, Target(path, query)) == sent


@pytest.mark.parametrize(
    "pattern, own, under",
    [
        ("/health", "/health", True),
        ("/health/", "/health", True),
        ("/health/**", "/health", True),
        ("/healthy", "/health", False),
        ("/docs/x", "/docs/**", True),
        ("/docs", "/docs/**", True),
        ("/api/v1/users/7/photos", "/api/v1/users/*", True),
        ("/api/v1/users/*", "/api/v1/users/me", False),
        ("/api/v1/users/*", "/api/v1/users/*", True),
        ("/api/v1/users/**", "/api/v1/users", True),
        ("/api/v1/**", "/api/v1/users", False),
        ("/**", "/health", False),
        ("/*/health", "/health", False),
        ("/anything", "/", True),
    ],
)
def test_what_lies_under_a_path_of_the_gateways_own(pattern: str, own: str, under: bool) -> None:
    assert lies_under(pattern, own) is under


class TestFromSettings:
    def test_a_route(self) -> None:
        route = Route.from_settings(
            RouteSettings(
                "/api/v1/reports/**",
                "reports",
                access=Role.ADMIN,
                methods=("GET", "POST"),
                strip_prefix="/api/v1",
                max_body=10,
                timeouts=Timeouts(total=3.0),
                websocket=True,
                allow=("10.0.0.0/8",),
                deny=("10.1.0.0/16",),
                limits=(LimitSettings("reports", 500, 30, "address", "strict"),),
            )
        )
        assert (route.pattern, route.backend, route.access) == ("/api/v1/reports/**", "reports", Role.ADMIN)
        assert route.methods == frozenset({"GET", "HEAD", "POST"})
        assert (route.strip_prefix, route.max_body, route.timeouts.total) == ("/api/v1", 10, 3.0)
        assert route.websocket
        assert route.counted
        assert route.limits == (Limit("reports", 500, 30, "strict", "address"),)
        assert route.networks is not None
        assert route.networks.permits("10.2.0.1")
        assert not route.networks.permits("10.1.0.1")
        assert not route.networks.permits("192.0.2.1")

    def test_what_is_absent_is_open(self) -> None:
        route = Route.from_settings(RouteSettings("/a", "b"))
        assert route.methods is None
        assert route.networks is None
        assert route.limits == ()
        assert Route.from_settings(RouteSettings("/a", "b", deny=("10.0.0.0/8",))).networks is not None

    def test_a_bad_network_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
            Route.from_settings(RouteSettings("/a", "b", allow=("10.0.0.1/8",)))

    def test_a_backend(self) -> None:
        endpoints = (EndpointSettings("http", "10.0.0.5", 9000), EndpointSettings("https", "::1", 443))
        backend = Backend.from_settings(BackendSettings("reports", endpoints, 7, "/health"))
        assert backend.endpoints == ("http://10.0.0.5:9000", "https://[::1]:443")
        assert (backend.name, backend.max_connections, backend.health_path) == ("reports", 7, "/health")


def test_rows_are_told_apart_by_identity() -> None:
    one, other = row("/a"), row("/a")
    assert one != other
    assert {one: 1}[one] == 1
    assert RouteTable.build([one]).routes == (one,)
