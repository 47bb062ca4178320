"""Places in networks: kept, found again, given back, and told to DHCP and DNS."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivebay.errors import AlreadyExists, NotFound, StateError, UsageError
from drivebay.net import members
from drivebay.net.model import Network
from drivebay.net.store import Networks

MACS = [f"52:54:00:00:00:{number:02x}" for number in range(16)]


@pytest.fixture
def networks(tmp_path: Path) -> Networks:
    """One of each kind: 'lan' has 126 fixed addresses, 'small' two (.2 and .3)."""
    networks = Networks(tmp_path / "networks")
    networks.folder.mkdir()
    networks.create(Network("lan", "nat", "db-lan", IPv4Network("192.168.100.0/24")))
    networks.create(Network("small", "isolated", "db-small", IPv4Network("192.168.101.0/29")))
    networks.create(Network("out", "bridge", "br0", uplink="eno1"))
    return networks


def test_a_place_is_found_again(networks: Networks) -> None:
    first = members.keep(networks, "lan", "web", 0, MACS[0])
    assert first == IPv4Address("192.168.100.2")
    assert members.keep(networks, "lan", "web", 0, MACS[0]) == first
    assert members.keep(networks, "lan", "db", 0, MACS[1]) == IPv4Address("192.168.100.3")
    assert members.users(networks, "lan") == ["db", "web"]


def test_a_wanted_address_is_given_and_stays(networks: Networks) -> None:
    wanted = IPv4Address("192.168.100.200")  # of the upper half, too
    assert members.keep(networks, "lan", "web", 0, MACS[0], wanted) == wanted
    assert members.keep(networks, "lan", "web", 0, MACS[0]) == wanted
    other = IPv4Address("192.168.100.9")
    assert members.keep(networks, "lan", "web", 0, MACS[0], other) == other


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("192.168.101.2", "is not in network 'lan'"),
        ("192.168.100.0", "first or last"),
        ("192.168.100.255", "first or last"),
        ("192.168.100.1", "the host's own address"),
    ],
)
def test_an_address_that_no_guest_can_have_is_refused(
    networks: Networks, wanted: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        members.keep(networks, "lan", "web", 0, MACS[0], IPv4Address(wanted))
    assert members.users(networks, "lan") == []


def test_another_vms_address_is_refused(networks: Networks) -> None:
    address = members.keep(networks, "lan", "web", 0, MACS[0])
    with pytest.raises(AlreadyExists, match="kept for VM 'web'"):
        members.keep(networks, "lan", "db", 0, MACS[1], address)


def test_another_vms_mac_is_refused(networks: Networks) -> None:
    members.keep(networks, "lan", "web", 0, MACS[0])
    with pytest.raises(AlreadyExists, match="VM 'web' has the MAC address"):
        members.keep(networks, "lan", "db", 0, MACS[0])


def test_an_interface_with_another_mac_keeps_its_address(networks: Networks) -> None:
    address = members.keep(networks, "lan", "web", 0, MACS[0])
    assert members.keep(networks, "lan", "web", 0, MACS[1]) == address
    assert [member.mac for member in members.read_members(networks, "lan")] == [MACS[1]]


def test_a_full_network_says_so(networks: Networks) -> None:
    for number in range(2):
        members.keep(networks, "small", f"vm{number}", 0, MACS[number])
    with pytest.raises(StateError, match="is full: each of its 2 addresses"):
        members.keep(networks, "small", "vm2", 0, MACS[2])
    members.give_back(networks, "vm0")
    assert str(members.keep(networks, "small", "vm2", 0, MACS[2])) == "192.168.101.2"


def test_a_lease_of_an_earlier_holder_ends_when_another_gets_the_address(
    networks: Networks,
) -> None:
    leases = networks.of("small") / "leases"
    others = f"99 {MACS[8]} 192.168.101.5 b *\nduid 00:01\n"
    leases.write_text(f"99 {MACS[9]} 192.168.101.2 old *\n{others}")
    assert str(members.keep(networks, "small", "a", 0, MACS[0])) == "192.168.101.2"
    assert leases.read_text() == others
    own = f"99 {MACS[0]} 192.168.101.2 a *\n"
    leases.write_text(own + others)
    members.keep(networks, "small", "b", 0, MACS[1])
    assert leases.read_text() == own + others
    members.give_back(networks, "a")
    assert leases.read_text() == others
    members.keep(networks, "small", "c", 0, MACS[2], IPv4Address("192.168.101.5"))
    assert leases.read_text() == "duid 00:01\n"


def test_in_the_lan_of_the_host_no_address_is_ours_to_give(networks: Networks) -> None:
    assert members.keep(networks, "out", "web", 0, MACS[0]) is None
    assert members.users(networks, "out") == ["web"]
    assert not (networks.of("out") / "hosts").exists()


def test_all_places_of_a_vm_are_given_back_but_those_it_keeps(networks: Networks) -> None:
    for index, name in enumerate(networks.names()):
        members.keep(networks, name, "web", index, MACS[index])
    members.keep(networks, "lan", "db", 0, MACS[9])
    members.give_back(networks, "web", but=[("out", MACS[1])])
    assert [members.users(networks, name) for name in networks.names()] == [["db"], ["web"], []]
    members.give_back(networks, "web")
    assert members.users(networks, "out") == []


def test_a_broken_file_is_named_and_blocks_no_deletion(networks: Networks) -> None:
    members.keep(networks, "small", "web", 0, MACS[0])
    (networks.of("lan") / "members.json").write_text('{"a": 3}')
    with pytest.raises(UsageError, match="is not what Drivebay wrote"):
        members.users(networks, "lan")
    members.give_back(networks, "web")
    assert members.users(networks, "small") == []


def test_a_network_that_is_not_there_is_named(networks: Networks) -> None:
    with pytest.raises(NotFound, match="no network 'wan'"):
        members.keep(networks, "wan", "web", 0, MACS[0])


def test_dhcp_and_dns_are_told(networks: Networks) -> None:
    members.keep(networks, "lan", "Web", 0, MACS[0])
    members.keep(networks, "lan", "Web", 2, MACS[1])
    members.keep(networks, "lan", "db", 1, MACS[2])
    folder = networks.of("lan")
    assert (folder / "hosts").read_text().splitlines() == [
        f"{MACS[0]},192.168.100.2,web",
        f"{MACS[1]},192.168.100.3,web-2",
        f"{MACS[2]},192.168.100.4,db",
    ]
    assert (folder / "names").read_text().splitlines() == [
        "192.168.100.2 web",
        "192.168.100.3 web-2",
        "192.168.100.4 db",
    ]
    assert (folder / "hosts").stat().st_mode & 0o777 == 0o644  # dnsmasq is nobody


def test_the_name_of_a_second_interface_is_never_another_vms(networks: Networks) -> None:
    members.keep(networks, "lan", "web", 0, MACS[0])
    members.keep(networks, "lan", "web", 1, MACS[1])
    members.keep(networks, "lan", "web-1", 0, MACS[2])
    assert (networks.of("lan") / "names").read_text().splitlines() == [
        "192.168.100.2 web",
        "192.168.100.4 web-1",
    ]


wishes = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 1),
    st.sampled_from(MACS[:6]),
    st.none() | st.integers(0, 9).map(lambda number: IPv4Address(0xC0A86500 + number)),
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
@given(st.lists(wishes | st.sampled_from(["a", "b", "c"]), max_size=12))
def test_no_two_places_ever_share_an_address(networks: Networks, steps: list[object]) -> None:
    for vm in ("a", "b", "c"):
        members.give_back(networks, vm)
    for step in steps:
        if isinstance(step, str):
            members.give_back(networks, step)
            assert step not in members.users(networks, "small")
            continue
        assert isinstance(step, tuple)
        try:
            given_address = members.keep(networks, "small", *step)
        except (AlreadyExists, StateError, UsageError):
            pass
        else:
            assert step[3] in (None, given_address)
        found = members.read_members(networks, "small")
        addresses = [member.address for member in found]
        assert len(set(addresses)) == len(addresses)
        assert len({(member.vm, member.index) for member in found}) == len(found)
