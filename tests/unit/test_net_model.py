"""What a network may be, and how its file is read and written."""

from __future__ import annotations

import tomllib
from ipaddress import IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivebay.errors import UsageError
from drivebay.net.model import (
    MODES,
    Network,
    bridge_name,
    check_network_name,
    read_network,
    read_subnet,
    write_network,
)

LAN = Network("lan", "nat", "db-lan", IPv4Network("192.168.100.0/24"))


@pytest.mark.parametrize("name", ["lan", "a", "a-b", "0", "twelve-lette"])
def test_a_name_fits_into_an_interface(name: str) -> None:
    check_network_name(name)
    assert len(bridge_name(name)) <= 15


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "Lan", "a_b", "thirteen-lett", "a b", "ä", "user", "none", "a\n"]
)
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of a network"):
        check_network_name(name)


def test_what_is_made_is_named_after_the_network() -> None:
    network = Network("my-lan", "nat", "db-my-lan", IPv4Network("10.1.0.0/16"))
    assert network.own_bridge
    assert network.table == "drivebay_my_lan"
    assert str(network.gateway) == "10.1.0.1"
    assert network.mac != LAN.mac
    assert int(network.mac[:2], 16) & 3 == 2  # of one interface, and locally administered


@pytest.mark.parametrize("prefix", range(16, 30))
def test_fixed_and_dynamic_addresses_share_no_address(prefix: int) -> None:
    subnet = IPv4Network(f"10.64.0.0/{prefix}")
    network = Network("lan", "nat", "db-lan", subnet)
    first, last = network.dynamic()
    assert subnet[1] not in (subnet[network.fixed()[0] - int(subnet[0])], first)
    assert network.fixed()[0] == int(subnet[2])
    assert network.fixed()[-1] + 1 == int(first)
    assert last == subnet[-2]


networks = st.builds(
    Network,
    name=st.just("lan"),
    mode=st.sampled_from([mode for mode in MODES if mode != "bridge"]),
    bridge=st.just("db-lan"),
    subnet=st.sampled_from([IPv4Network("192.168.100.0/24"), IPv4Network("10.0.0.0/16")]),
    mtu=st.none() | st.integers(576, 65521),
    allow_users=st.sets(st.sampled_from(["anna", "b.o_b", "c-1"])).map(tuple),
    made=st.booleans(),
)
bridged = st.builds(
    Network,
    name=st.just("lan"),
    mode=st.just("bridge"),
    bridge=st.sampled_from(["db-lan", "br0"]),
    uplink=st.sampled_from(["eno1", "enp0s31f6"]),
)


@settings(deadline=None)
@given(networks | bridged)
def test_a_network_that_was_written_is_read_again(network: Network) -> None:
    assert read_network("lan", write_network(network)) == network


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subnet": "192.168.100.0"}, "is no IPv4 subnet"),
        ({"subnet": "192.169.0.0/15"}, "is no IPv4 subnet"),
        ({"subnet": "192.168.100.0/30"}, "wrong size"),
        ({"subnet": "10.0.0.0/15"}, "wrong size"),
        ({"subnet": "1.1.1.0/24"}, "not private"),
        ({"subnet": "1.1.1.0/24", "mode": "isolated"}, "not private"),
        ({"subnet": "127.0.0.0/24", "mode": "routed"}, "meaning of its own"),
        ({"subnet": "224.0.0.0/24", "mode": "routed"}, "meaning of its own"),
        ({"mode": "bridge"}, "has no subnet"),
        ({"mode": "switch"}, "one of nat, isolated, routed, bridge"),
        ({"uplink": "eno1"}, "only mode bridge has an uplink"),
        ({"bridge": "br0"}, "'bridge' should be db-lan"),
        ({"mtu": 575}, "'mtu' should be from"),
        ({"mtu": "1500"}, "should be a number"),
        ({"allow_users": ["a b"]}, "name of a user"),
        ({"allow_users": ["all\nallow virbr0"]}, "name of a user"),
        ({"colour": "red"}, "unknown: 'colour'"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, object], said: str) -> None:
    import tomlkit

    values = {**tomllib.loads(write_network(LAN)), **change}
    with pytest.raises(UsageError, match=said):
        read_network("lan", tomlkit.dumps(values))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('mode = "nat"\nbridge = "db-lan"', "needs a subnet"),
        ('mode = "bridge"\nbridge = "br0"', "needs an uplink"),
        ('mode = "bridge"\nuplink = "a/b"\nbridge = "br0"', "name of an interface"),
        ('mode = "bridge"\nuplink = "eno1"\nbridge = ".."', "name of an interface"),
        ("mode = ", "is not TOML"),
    ],
)
def test_a_file_that_lacks_something_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_network("lan", text)


def test_routed_networks_may_be_public() -> None:
    text = write_network(Network("lan", "routed", "db-lan", IPv4Network("8.8.8.0/24")))
    assert read_network("lan", text).mode == "routed"


def test_a_subnet_with_bits_of_a_host_is_explained() -> None:
    with pytest.raises(UsageError) as caught:
        read_subnet("192.168.100.7/24")
    assert caught.value.hint == "is 192.168.100.0/24 meant?"
