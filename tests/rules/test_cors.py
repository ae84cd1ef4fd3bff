"""What browsers are told."""

import pytest

from lucid.core.exchange import Preflight
from lucid.core.rules.cors import Cors

APP = "https://app.example"
LIMIT_FIELDS = (
    "ratelimit",
    "ratelimit-policy",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
)


def told(preflight: Preflight | None) -> dict[str, str]:
    assert preflight is not None
    fields = dict(preflight.fields)
    assert len(fields) == len(preflight.fields), "a field twice"
    return fields


def listed(value: str) -> list[str]:
    return value.split(", ")


class TestOff:
    def test_an_options_request_is_an_ordinary_one(self) -> None:
        cors = Cors()
        assert not cors.enabled
        assert cors.preflight(APP, "POST", None, None) is None

    def test_answers_are_left_alone(self) -> None:
        cors = Cors((), allow_credentials=True)
        assert cors.answer_fields(APP) == cors.answer_fields(None) == ()
        assert not cors.drops("access-control-allow-origin")
        assert not cors.allows(APP)


class TestPreflight:
    cors = Cors((APP, "http://localhost:3000"))

    @pytest.mark.parametrize("origin, method", [(None, "POST"), (APP, None), (None, None)])
    def test_takes_an_origin_and_a_method(self, origin: str | None, method: str | None) -> None:
        assert self.cors.preflight(origin, method, "content-type", None) is None

    def test_names_what_the_route_takes(self) -> None:
        fields = told(self.cors.preflight(APP, "POST", None, frozenset({"POST", "GET", "HEAD"})))
        assert fields["Access-Control-Allow-Origin"] == APP
        assert fields["Access-Control-Allow-Methods"] == "GET, HEAD, POST"
        assert fields["Access-Control-Max-Age"] == "600"
        assert fields["Vary"] == "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
        assert "Access-Control-Allow-Credentials" not in fields

    def test_does_not_name_a_method_that_the_route_lacks(self) -> None:
        fields = told(self.cors.preflight(APP, "DELETE", None, frozenset({"GET"})))
        assert fields["Access-Control-Allow-Methods"] == "GET"

    @pytest.mark.parametrize(
        "requested, more", [("PUT", []), ("PURGE", ["PURGE"]), ("PU RGE", []), ("A\r\nB", []), ("", [])]
    )
    def test_a_route_for_all_methods_names_them_and_the_one_asked_for(
        self, requested: str, more: list[str]
    ) -> None:
        fields = told(self.cors.preflight(APP, requested, None, None))
        usual = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]
        assert listed(fields["Access-Control-Allow-Methods"]) == usual + more

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "https://app.example:8443", "null", "", APP + "/"]
    )
    def test_of_a_stranger_is_answered_with_nothing_to_go_on(self, origin: str) -> None:
        fields = told(self.cors.preflight(origin, "POST", "authorization", None))
        assert list(fields) == ["Vary"]
        assert "Origin" in listed(fields["Vary"])

    def test_allows_the_fields_of_our_own_api(self) -> None:
        for cors in (self.cors, Cors((APP,), allow_credentials=True)):
            fields = told(cors.preflight(APP, "POST", None, None))
            allowed = listed(fields["Access-Control-Allow-Headers"])
            assert {"authorization", "content-type", "x-api-key", "x-request-id", "traceparent"} <= set(
                allowed
            )
            assert "*" not in allowed

    def test_allows_a_backends_fields_as_asked(self) -> None:
        requested = "X-Chunk,content-type, x-chunk ,,bad name,x\r\ny," + "z" * 65
        fields = told(self.cors.preflight(APP, "POST", requested, None))
        allowed = listed(fields["Access-Control-Allow-Headers"])
        assert allowed[-1] == "x-chunk"
        assert allowed[:-1] == listed(
            told(self.cors.preflight(APP, "POST", None, None))["Access-Control-Allow-Headers"]
        )

    def test_looks_at_so_many_fields_and_no_more(self) -> None:
        requested = ",".join(f"x-{number}" for number in range(1000))
        fields = told(self.cors.preflight(APP, "POST", requested, None))
        asked = [name for name in listed(fields["Access-Control-Allow-Headers"]) if name[2:].isdigit()]
        assert asked == [f"x-{number}" for number in range(64)]

    def test_with_credentials_only_the_fixed_fields_are_allowed(self) -> None:
        cors = Cors((APP,), allow_credentials=True)
        fields = told(cors.preflight(APP, "POST", "x-chunk", frozenset({"POST"})))
        assert fields["Access-Control-Allow-Credentials"] == "true"
        assert fields["Access-Control-Allow-Origin"] == APP
        assert "x-chunk" not in listed(fields["Access-Control-Allow-Headers"])

    def test_for_every_origin(self) -> None:
        fields = told(Cors(("*", APP)).preflight("https://anyone.example", "POST", None, frozenset({"POST"})))
        assert fields["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in fields
        assert "Origin" not in listed(fields["Vary"])


class TestAnswers:
    def test_an_allowed_origin_may_read_the_answer_and_our_fields(self) -> None:
        fields = dict(Cors((APP,)).answer_fields(APP))
        assert fields["Access-Control-Allow-Origin"] == APP
        assert fields["Vary"] == "Origin"
        assert {*LIMIT_FIELDS, "retry-after", "x-request-id"} <= set(
            listed(fields["Access-Control-Expose-Headers"])
        )
        assert "Access-Control-Allow-Credentials" not in fields

    def test_with_credentials_it_says_so(self) -> None:
        fields = dict(Cors((APP,), allow_credentials=True).answer_fields(APP))
        assert fields["Access-Control-Allow-Credentials"] == "true"
        assert "*" not in fields["Access-Control-Expose-Headers"]

    @pytest.mark.parametrize("origin", [None, "https://evil.example", "null", "HTTPS://APP.EXAMPLE"])
    def test_for_others_it_only_varies(self, origin: str | None) -> None:
        for credentials in (False, True):
            assert Cors((APP,), credentials).answer_fields(origin) == (("Vary", "Origin"),)

    @pytest.mark.parametrize("origin", [None, APP, "https://anyone.example", "null"])
    def test_for_every_origin_it_is_always_the_same(self, origin: str | None) -> None:
        fields = dict(Cors(("*", APP)).answer_fields(origin))
        assert set(fields) == {"Access-Control-Allow-Origin", "Access-Control-Expose-Headers"}
        assert fields["Access-Control-Allow-Origin"] == "*"

    def test_backends_do_not_speak_for_us(self) -> None:
        cors = Cors((APP,))
        assert cors.enabled
        assert cors.drops("access-control-allow-origin")
        assert cors.drops("access-control-expose-headers")
        assert not cors.drops("vary")
        assert not cors.drops("content-type")


class TestOrigins:
    @pytest.mark.parametrize(
        "configured, sent",
        [
            ("HTTPS://App.Example", APP),
            ("https://app.example:443", APP),
            ("http://app.example:80", "http://app.example"),
            ("https://app.example:80", "https://app.example:80"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ],
    )
    def test_are_compared_as_browsers_write_them(self, configured: str, sent: str) -> None:
        cors = Cors((configured,))
        assert cors.allows(sent)
        assert ("Access-Control-Allow-Origin", sent) in cors.answer_fields(sent)

    NO_ORIGINS = """
    null app.example https:// https://app.example/ https://app.example/x https://*.example https://user@app.example
    https://app.example:x https://büro.example https://[app]
    """

    @pytest.mark.parametrize("origin", ["", f" {APP}", f"{APP}\r\nx: y", *NO_ORIGINS.split()])
    def test_that_are_none_are_named(self, origin: str) -> None:
        with pytest.raises(ValueError, match="is no origin") as caught:
            Cors((APP, origin))
        assert repr(origin) in str(caught.value)

    def test_every_origin_with_credentials_is_a_fault(self) -> None:
        with pytest.raises(ValueError, match="credentials"):
            Cors(("*",), allow_credentials=True)

    def test_every_origin_may_call(self) -> None:
        assert Cors(("*",)).allows("https://anyone.example")
