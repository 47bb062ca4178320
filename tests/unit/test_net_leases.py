"""dnsmasq of a network: its configuration, judged by dnsmasq, and what its lease file says."""

from __future__ import annotations

import os
import subprocess
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivebay.errors import StateError
from drivebay.net.journal import Journal
from drivebay.net.leases import (
    Host,
    Lease,
    _check_passable,
    configuration,
    hosts_text,
    names_text,
    parse_leases,
    running,
)
from drivebay.net.model import Network
from drivebay.net.programs import find_program
from drivebay.net.store import Networks
from drivebay.system.processes import start_ticks

MAC = "52:54:00:00:00:01"
HOSTS = [
    Host(MAC, IPv4Address("192.168.100.2"), "web"),
    Host("52:54:00:00:00:02", IPv4Address("192.168.100.3"), None),
]


def network(mode: str = "nat", mtu: int | None = None) -> Network:
    return Network("lan", mode, "db-lan", IPv4Network("192.168.100.0/24"), mtu=mtu)


@pytest.mark.parametrize("mode", ["nat", "isolated", "routed"])
def test_dnsmasq_understands_its_configuration(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "dnsmasq.conf"
    path.write_text(configuration(network(mode, 1400), tmp_path))
    (tmp_path / "hosts").write_text(hosts_text(HOSTS))
    command = [find_program("dnsmasq"), "--test", f"--conf-file={path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_the_bridge_is_served_and_the_upper_half_is_given_away(tmp_path: Path) -> None:
    lines = configuration(network(), tmp_path).splitlines()
    assert {"interface=db-lan", "except-interface=lo", "bind-dynamic", "no-hosts"} < set(lines)
    assert "dhcp-range=192.168.100.128,192.168.100.254,255.255.255.0,1h" in lines
    assert "no-resolv" not in lines


def test_an_isolated_network_asks_nobody_and_has_no_router(tmp_path: Path) -> None:
    lines = configuration(network("isolated"), tmp_path).splitlines()
    assert "no-resolv" in lines
    assert "dhcp-option=option:router" in lines


def test_hosts_have_a_line_each_and_names_when_they_have_one() -> None:
    assert hosts_text(HOSTS) == (f"{MAC},192.168.100.2,web\n52:54:00:00:00:02,192.168.100.3\n")
    assert names_text(HOSTS) == "192.168.100.2 web\n"


def test_a_lease_file_is_read() -> None:
    text = (
        f"1764335000 {MAC.upper()} 192.168.100.2 web 01:{MAC}\n"
        "0 52:54:00:00:00:02 192.168.100.130 * *\n"
        "duid 00:01:00:01\n"
        "1764335000 1234 fd00::5 x 00:01\n"
    )
    assert list(parse_leases(text)) == [
        Lease(1764335000, MAC, IPv4Address("192.168.100.2"), "web"),
        Lease(0, "52:54:00:00:00:02", IPv4Address("192.168.100.130"), None),
    ]


@settings(deadline=None)
@given(st.text("019aF:.*- \n", max_size=60))
def test_any_lease_file_can_be_read(text: str) -> None:
    for lease in parse_leases(text):
        assert lease.expires >= 0


def test_a_process_with_the_id_of_an_earlier_dnsmasq_is_not_it(tmp_path: Path) -> None:
    networks = Networks(tmp_path)
    networks.of("lan").mkdir()
    journal = Journal(networks.of("lan"))
    assert running(networks, "lan") is None
    journal.note("dnsmasq", "dnsmasq", pid=os.getpid(), start_ticks=start_ticks(os.getpid()))
    assert running(networks, "lan") == os.getpid()
    journal.note("dnsmasq", "dnsmasq", pid=os.getpid(), start_ticks=1)
    assert running(networks, "lan") is None
    journal.note("dnsmasq", "dnsmasq", pid=os.getpid(), start_ticks=None)
    assert running(networks, "lan") is None


def test_a_folder_that_nobody_can_pass_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "lan").mkdir(parents=True)
    closed.chmod(0o700)
    with pytest.raises(StateError, match=f"can't pass through '{closed}'") as caught:
        _check_passable(closed / "lan")
    assert caught.value.hint == f"chmod o+x {closed}"
