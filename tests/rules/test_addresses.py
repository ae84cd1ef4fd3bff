"""Whose address counts, and what is told of it."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid.core.rules.addresses import Networks, TrustedProxies, identifier, network, parse


@pytest.mark.parametrize(
    "text, address",
    [
        ("203.0.113.9", "203.0.113.9"),
        (" 203.0.113.9\t", "203.0.113.9"),
        ("203.0.113.9:567", "203.0.113.9"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]:1", "fe80::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("[::ffff:cb00:7109]:80", "203.0.113.9"),
        ("::ffff:0.0.0.0", "0.0.0.0"),
    ],
)
def test_one_spelling_per_address(text: str, address: str) -> None:
    assert str(parse(text)) == address


NO_ADDRESSES = """
unknown _hidden 1.2.3 1.2.3.4.5 01.2.3.4 256.1.1.1 1.2.3.4: 1.2.3.4:123456 1.2.3.4:x 1.2.3.4%eth0 １.2.3.4
1.2.3.4/32 [::1 ::1] [1.2.3.4 [] [::1]x [::1]: fe80::1% "[::1]" /
"""


@pytest.mark.parametrize("text", ["", "1.2.3.4 5", "1" * 10_000, ":" * 10_000, *NO_ADDRESSES.split()])
def test_what_is_no_address(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "address, counted",
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("/run/lucid.sock", "/run/lucid.sock"),
        ("", ""),
    ],
)
def test_what_an_address_counts_as(address: str, counted: str) -> None:
    assert identifier(address) == counted


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_a_site_cannot_multiply_its_quota(address: ipaddress.IPv6Address, host: int) -> None:
    neighbour = ipaddress.IPv6Address(int(address) >> 64 << 64 | host)
    if address.ipv4_mapped or neighbour.ipv4_mapped:
        return  # A whole Internet in one /64: counted as IPv4 instead.
    assert identifier(str(address)) == identifier(str(neighbour))
    assert identifier(str(address)) == str(ipaddress.ip_network(f"{address}/64", strict=False))


class TestTrustedProxies:
    def test_alone_the_gateway_believes_nobody(self) -> None:
        proxies = TrustedProxies()
        assert not proxies.is_trusted("203.0.113.9")
        assert proxies.client("203.0.113.9", ["198.51.100.1"]) == "203.0.113.9"
        assert proxies.forwarded_for("203.0.113.9", ["198.51.100.1"]) == "203.0.113.9"

    def test_the_peer_is_spelled_as_all_addresses_are(self) -> None:
        proxies = TrustedProxies()
        assert proxies.client("::ffff:203.0.113.9", None) == "203.0.113.9"
        assert proxies.client("fe80::1%2", None) == "fe80::1"
        assert proxies.client("/run/lucid.sock", None) == "/run/lucid.sock"

    def test_only_peers_in_the_networks_are_trusted(self) -> None:
        proxies = TrustedProxies(["10.0.0.0/8", "fd00::/8", "192.0.2.7"])
        trusted = ["10.255.0.1", "::ffff:10.0.0.1", "fd12::1", "192.0.2.7"]
        others = ["11.0.0.1", "192.0.2.8", "fe80::1", "a00::1", "", "/run/lucid.sock"]
        assert all(proxies.is_trusted(peer) for peer in trusted)
        assert not any(proxies.is_trusted(peer) for peer in others)

    @pytest.mark.parametrize(
        "received, chain",
        [
            (None, "10.0.0.1"),
            ([], "10.0.0.1"),
            ([""], "10.0.0.1"),
            ([" , ,"], "10.0.0.1"),
            (["203.0.113.9"], "203.0.113.9, 10.0.0.1"),
            (["203.0.113.9:4711"], "203.0.113.9, 10.0.0.1"),
            (["[2001:db8::1]:4711"], "2001:db8::1, 10.0.0.1"),
            (["1.1.1.1, 203.0.113.9"], "203.0.113.9, 10.0.0.1"),
            (["1.1.1.1, 203.0.113.9,10.0.0.3 , 10.0.0.2"], "203.0.113.9, 10.0.0.3, 10.0.0.2, 10.0.0.1"),
            (["1.1.1.1", "203.0.113.9", "10.0.0.2"], "203.0.113.9, 10.0.0.2, 10.0.0.1"),
            (["203.0.113.9,, 10.0.0.2,"], "203.0.113.9, 10.0.0.2, 10.0.0.1"),
            (["10.0.0.3, 10.0.0.2"], "10.0.0.3, 10.0.0.2, 10.0.0.1"),
            (["1.1.1.1, unknown, 10.0.0.2"], "10.0.0.2, 10.0.0.1"),
            (["1.1.1.1, unknown"], "10.0.0.1"),
            (["1.1.1.1, ::ffff:10.0.0.2"], "1.1.1.1, 10.0.0.2, 10.0.0.1"),
        ],
    )
    def test_the_first_untrusted_hop_from_the_right_is_the_client(
        self, received: list[str] | None, chain: str
    ) -> None:
        proxies = TrustedProxies(["10.0.0.0/8"])
        assert proxies.forwarded_for("10.0.0.1", received) == chain
        assert proxies.client("10.0.0.1", received) == chain.partition(",")[0]

    @pytest.mark.parametrize(
        "hops, received, chain",
        [
            (0, "1.1.1.1, 2.2.2.2", "9.9.9.9"),
            (1, "1.1.1.1, 2.2.2.2", "2.2.2.2, 9.9.9.9"),
            (2, "0.0.0.0, 1.1.1.1, 2.2.2.2", "1.1.1.1, 2.2.2.2, 9.9.9.9"),
            (2, "0.0.0.0, 1.1.1.1,, 2.2.2.2", "1.1.1.1, 2.2.2.2, 9.9.9.9"),
            (3, "1.1.1.1, 2.2.2.2", "1.1.1.1, 2.2.2.2, 9.9.9.9"),
            (2, "1.1.1.1, ?, 2.2.2.2", "2.2.2.2, 9.9.9.9"),
        ],
    )
    def test_or_hops_are_counted(self, hops: int, received: str, chain: str) -> None:
        proxies = TrustedProxies(hops=hops)
        assert proxies.forwarded_for("9.9.9.9", [received]) == chain
        assert proxies.client("9.9.9.9", [received]) == chain.partition(",")[0]

    def test_counted_hops_may_come_through_a_unix_socket(self) -> None:
        assert TrustedProxies(hops=1).client("/run/lucid.sock", ["1.1.1.1, 2.2.2.2"]) == "2.2.2.2"

    def test_both_together_trust_what_either_trusts(self) -> None:
        proxies = TrustedProxies(["10.0.0.0/8"], hops=1)
        assert proxies.client("9.9.9.9", ["1.1.1.1, 2.2.2.2, 10.0.0.1"]) == "2.2.2.2"

    def test_a_field_as_long_as_a_head_is_walked_a_little_way(self) -> None:
        proxies = TrustedProxies(["10.0.0.0/8"])
        field = "1.1.1.1, " + ", ".join(["10.0.0.2"] * 1000)
        assert proxies.forwarded_for("10.0.0.1", [field]).count("10.0.0.2") == 32

    @given(st.text(st.sampled_from("1.:[] ,%a\tx"), max_size=40), st.sampled_from([0, 1, 3]))
    def test_what_the_caller_writes_moves_nothing_to_the_right_of_it(self, invented: str, hops: int) -> None:
        """The real client's address stands where our proxy put it, whatever comes before it."""
        proxies = TrustedProxies(["10.0.0.0/8"], hops=hops and 1)
        assert proxies.client("10.0.0.1", [invented, "203.0.113.9"]) == "203.0.113.9"
        assert proxies.client("10.0.0.1", [f"{invented},203.0.113.9"]) == "203.0.113.9"

    @pytest.mark.parametrize("bad", ["10.0.0.1/8", "nonsense", "", "10.0.0.0/33", "::1/64"])
    def test_a_bad_network_is_named(self, bad: str) -> None:
        with pytest.raises(ValueError) as caught:
            TrustedProxies(["10.0.0.0/8", bad])
        assert bad in str(caught.value)

    def test_hops_are_not_negative(self) -> None:
        with pytest.raises(ValueError, match="-1"):
            TrustedProxies(hops=-1)


class TestNetworks:
    def test_without_lists_all_addresses_may(self) -> None:
        assert Networks().permits("203.0.113.9")

    def test_what_is_no_address_may_not(self) -> None:
        assert not Networks(deny=["10.0.0.0/8"]).permits("/run/lucid.sock")
        assert not Networks(allow=["0.0.0.0/0"]).permits("")

    def test_allow_shuts_all_others_out(self) -> None:
        networks = Networks(allow=["10.0.0.0/8", "2001:db8::/32"])
        assert networks.permits("10.1.2.3")
        assert networks.permits("::ffff:10.1.2.3")
        assert networks.permits("2001:db8:1::1")
        assert not networks.permits("11.0.0.1")
        assert not networks.permits("2001:db9::1")

    def test_deny_is_stronger(self) -> None:
        networks = Networks(["10.0.0.0/8"], ["10.1.0.0/16"])
        assert networks.permits("10.2.0.1")
        assert not networks.permits("10.1.0.1")
        assert not networks.permits("192.0.2.1")

    def test_deny_alone_leaves_the_others_in(self) -> None:
        networks = Networks(deny=["10.0.0.0/8"])
        assert networks.permits("11.0.0.1")
        assert not networks.permits("10.0.0.1")

    def test_a_mapped_network_holds_what_mapped_addresses_are_read_as(self) -> None:
        assert str(network("::ffff:10.0.0.0/104")) == "10.0.0.0/8"
        assert str(network("::ffff:0:0/96")) == "0.0.0.0/0"
        assert str(network("2001:db8::/100")) == "2001:db8::/100"
        assert str(network("::/0")) == "::/0"
        assert not Networks(deny=["::ffff:10.0.0.0/104"]).permits("10.0.0.1")

    def test_a_bad_network_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
            Networks(deny=["10.0.0.1/8"])

    @given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4))
    def test_it_agrees_with_arithmetic(
        self, base: ipaddress.IPv4Address, bits: int, address: ipaddress.IPv4Address
    ) -> None:
        shift = 32 - bits
        inside = int(base) >> shift == int(address) >> shift
        text = f"{ipaddress.IPv4Address(int(base) >> shift << shift)}/{bits}"
        assert Networks(allow=[text]).permits(str(address)) is inside
        assert Networks(deny=[text]).permits(str(address)) is not inside
