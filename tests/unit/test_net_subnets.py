"""Which addresses are free: none of the host's, and none of another network's."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivebay.errors import StateError
from drivebay.net.model import Network
from drivebay.net.subnets import Route, check_free, choose, overlapping_routes


def route(to: str, interface: str | None = "eth0") -> Route:
    return Route(IPv4Network(to), interface)


def network(subnet: str) -> Network:
    return Network("other", "nat", "db-other", IPv4Network(subnet))


def test_the_first_free_subnet_is_chosen() -> None:
    assert str(choose([], [])) == "192.168.100.0/24"
    taken = [route("192.168.100.0/24"), route("192.168.101.7/32")]
    assert str(choose(taken, [network("192.168.102.0/23")])) == "192.168.104.0/24"


def test_when_all_are_taken_a_subnet_has_to_be_named() -> None:
    with pytest.raises(StateError, match="none of 192.168.100.0/24 to 192.168.250.0/24"):
        choose([route("192.168.0.0/16", "tun0")], [])


@pytest.mark.parametrize("to", ["0.0.0.0/1", "128.0.0.0/1"])
def test_a_default_route_takes_nothing(to: str) -> None:
    check_free(IPv4Network("192.168.100.0/24"), [route(to)], [])


@pytest.mark.parametrize("to", ["192.168.100.128/25", "192.0.0.0/8", "192.168.100.3/32"])
def test_an_overlap_names_the_route_and_its_interface(to: str) -> None:
    with pytest.raises(StateError) as caught:
        check_free(IPv4Network("192.168.100.0/24"), [route("10.0.0.0/8"), route(to, "wg0")], [])
    assert f"overlaps a route of this host: {to} by wg0" in str(caught.value)


def test_a_route_to_nowhere_is_one() -> None:
    with pytest.raises(StateError, match="192.168.0.0/16, to nowhere"):
        check_free(IPv4Network("192.168.100.0/24"), [route("192.168.0.0/16", None)], [])


def test_an_overlap_with_a_network_names_it() -> None:
    with pytest.raises(StateError, match="overlaps 192.168.0.0/16 of network 'other'"):
        check_free(IPv4Network("192.168.100.0/24"), [], [network("192.168.0.0/16")])


def test_the_widest_route_is_named() -> None:
    taken = [route("192.168.100.1/32", "lo"), route("192.168.100.0/24", "virbr0")]
    assert overlapping_routes(IPv4Network("192.168.100.0/24"), taken)[0].interface == "virbr0"


subnets = st.builds(
    lambda number, prefix: IPv4Network((number, prefix), strict=False),
    st.integers(0xC0A80000, 0xC0A8FFFF),
    st.integers(18, 32),
)


@settings(deadline=None)
@given(st.lists(subnets, max_size=12), st.lists(subnets, max_size=4))
def test_what_is_chosen_is_free(routes: list[IPv4Network], others: list[IPv4Network]) -> None:
    networks = [network(str(subnet)) for subnet in others]
    taken = [Route(to, "eth0") for to in routes]
    try:
        found = choose(taken, networks)
    except StateError:
        return
    check_free(found, taken, networks)
    assert not any(found.overlaps(subnet) for subnet in [*routes, *others])
