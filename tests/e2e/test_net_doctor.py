"""`drivebay doctor net` on a host whose firewall drops what it does not know, as docker's does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.net_bay import NetBay, drivebay, net_bay_in

DOCKER = """\
iptables -P FORWARD DROP
iptables -N DOCKER-USER
iptables -A DOCKER-USER -j RETURN
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""


@pytest.fixture
def bay(folder: Path) -> Iterator[NetBay]:
    with net_bay_in(folder) as bay:
        yield bay


def mends(bay: NetBay, code: int) -> dict[str, str]:
    """The mend of each subject that has one, as commands of root."""
    found = bay.run("doctor", "net", "--json")
    assert found.returncode == code, (found.stdout, found.stderr)
    return {
        finding["subject"]: finding["mend"].replace("sudo ", "")
        for finding in json.loads(found.stdout)
        if finding["mend"] and finding["level"] != "note"
    }


def test_guests_reach_a_server_after_the_mends(bay: NetBay) -> None:
    server, guest = bay.namespace("server"), bay.namespace("guest")
    bay.link(bay.host, "eno1", server, "eth0")
    bay.ip(bay.host, "addr add 10.99.0.1/24 dev eno1")
    bay.ip(server, "addr add 10.99.0.2/24 dev eth0")
    bay.answer_tcp(server, "10.99.0.2", 8000)
    bay.ok("net", "create", "lan", "--subnet", "192.168.100.0/24")
    bay.link(bay.host, "port", guest, "eth0")
    bay.ip(bay.host, "link set port master db-lan")
    bay.ip(guest, "addr add 192.168.100.9/24 dev eth0")
    bay.ip(guest, "route add default via 192.168.100.1")
    assert bay.seen_as(guest, "10.99.0.2", 8000) == "10.99.0.1"

    bay.ok_in(bay.host, "sh", "-ec", DOCKER)
    assert bay.seen_as(guest, "10.99.0.2", 8000) is None
    found = mends(bay, 1)
    assert set(found) == {"firewall"}
    bay.ok_in(bay.host, "sh", "-ec", found["firewall"])
    assert bay.seen_as(guest, "10.99.0.2", 8000) == "10.99.0.1"

    bay.ok_in(bay.host, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
    bay.ip(bay.host, "link delete db-lan")
    found = mends(bay, 1)
    assert found["networks"] == found["forwarding"] == "drivebay net start lan"
    bay.ok_in(bay.host, *drivebay("net", "start", "lan"))
    assert mends(bay, 0) == {}
