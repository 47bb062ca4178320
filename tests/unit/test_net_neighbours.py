"""net/neighbours.py: the addresses of a guest, from leases and from the kernel's tables."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from drivebay.net import neighbours
from drivebay.net.leases import Lease, parse_leases
from drivebay.net.neighbours import Neighbour, of_mac
from drivebay.net.store import Networks

OURS = "52:54:00:aa:00:01"
THEIRS = "52:54:00:aa:00:02"
STALE, REACHABLE, INCOMPLETE, FAILED, NOARP = 0x04, 0x02, 0x01, 0x20, 0x40
NOW = 1000.0


def lease(address: str, mac: str = OURS, expires: int = 2000) -> Lease:
    return Lease(expires, mac, IPv4Address(address), "web")


def met(address: str, mac: str = OURS, state: int = STALE) -> Neighbour:
    return Neighbour(mac, address, "db-lan", state)


def test_leases_come_first_and_each_address_once() -> None:
    leases = [lease("192.168.9.7"), lease("192.168.9.8", THEIRS)]
    seen = [met("192.168.9.5"), met("192.168.9.7"), met("192.168.9.6", THEIRS)]
    assert of_mac(OURS.upper(), leases, seen, NOW) == ["192.168.9.7", "192.168.9.5"]


def test_a_lease_that_has_run_out_is_none_and_one_without_end_stays() -> None:
    leases = [lease("10.0.0.1", expires=999), lease("10.0.0.2", expires=0)]
    assert of_mac(OURS, leases, [], NOW) == ["10.0.0.2"]


@pytest.mark.parametrize("state", [INCOMPLETE, FAILED, NOARP, FAILED | STALE])
def test_who_never_answered_has_no_address(state: int) -> None:
    assert of_mac(OURS, [], [met("10.0.0.1", state=state)], NOW) == []


def test_addresses_are_in_order_and_those_of_one_link_say_which() -> None:
    seen = [met("fe80::5", state=REACHABLE), met("fd00::5"), met("10.0.0.10"), met("10.0.0.9")]
    seen += [met("169.254.1.1"), met("ff02::16"), met("127.0.0.1"), met("0.0.0.0")]
    assert of_mac(OURS, [], seen, NOW) == [
        "10.0.0.9", "10.0.0.10", "fd00::5", "169.254.1.1", "fe80::5%db-lan",
    ]  # fmt: skip


def test_what_a_guest_calls_itself_does_nothing_to_a_terminal() -> None:
    text = (
        f"2000 {OURS.upper()} 10.0.0.1 web-1.lan_ 01:{OURS}\n"
        f"2000 {OURS} 10.0.0.2 a\x1b[2Jb *\n"
        f"2000 {OURS} 10.0.0.3 * *\n"
        f"2000 {OURS} 10.0.0.4 b\u00fcro *\n"
        f"soon {OURS} 10.0.0.5 web *\n"
        f"2000 {OURS} fd00::5 web *\n"
        "duid 00:01\n"
    )
    assert list(parse_leases(text)) == [
        Lease(2000, OURS, IPv4Address("10.0.0.1"), "web-1.lan_"),
        Lease(2000, OURS, IPv4Address("10.0.0.2"), None),
        Lease(2000, OURS, IPv4Address("10.0.0.3"), None),
        Lease(2000, OURS, IPv4Address("10.0.0.4"), None),
    ]


def test_all_networks_are_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, address in (("lan", "10.0.0.1"), ("dmz", "10.1.0.1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.toml").touch()
        (tmp_path / name / "leases").write_text(f"0 {OURS} {address} * *\n")
    monkeypatch.setattr(neighbours, "_met", lambda: [met("fd00::1")])
    assert neighbours.addresses(Networks(tmp_path), OURS) == ["10.1.0.1", "10.0.0.1", "fd00::1"]
    assert neighbours.addresses(Networks(tmp_path / "none"), THEIRS) == []
