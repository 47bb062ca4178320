"""Which interface of a host can be an uplink, by what the kernel says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drivebay.errors import InUse, NotFound, StateError
from drivebay.net import uplinks
from drivebay.net.links import Link
from drivebay.net.model import Network

ENO1 = Link(2, "eno1", "3c:00:00:00:00:01", 1500, True, True, "", "", None)
BR0 = replace(ENO1, index=3, name="br0", kind="bridge")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Link]:
    """The interfaces of a host, and what they carry ('' is Wi-Fi's sign)."""
    found = {"eno1": ENO1, "br0": BR0}
    monkeypatch.setattr(uplinks, "all_links", lambda: found)
    monkeypatch.setattr(uplinks, "is_wireless", lambda name: name.startswith("wl"))
    monkeypatch.setattr(uplinks, "carried", lambda link: ["192.0.2.1/24"] * (link.name == "eno1"))
    return found


def test_an_uplink_in_no_bridge_gets_ours(host: dict[str, Link]) -> None:
    assert uplinks.bridge_for("out", "eno1") == "db-out"


def test_the_bridge_that_an_uplink_is_in_is_used(host: dict[str, Link]) -> None:
    host["eno1"] = replace(ENO1, master="br0")
    assert uplinks.bridge_for("out", "eno1") == "br0"


def test_another_networks_uplink_is_refused(host: dict[str, Link]) -> None:
    host["db-x"] = replace(BR0, name="db-x")
    host["eno1"] = replace(ENO1, master="db-x")
    with pytest.raises(InUse, match="in bridge 'db-x'"):
        uplinks.bridge_for("out", "eno1")


def test_a_part_of_a_bond_is_refused(host: dict[str, Link]) -> None:
    host["bond0"] = replace(ENO1, name="bond0", kind="bond")
    host["eno1"] = replace(ENO1, master="bond0")
    with pytest.raises(StateError, match="part of 'bond0', which is no bridge") as caught:
        uplinks.bridge_for("out", "eno1")
    assert caught.value.hint == "if 'bond0' leads into the LAN: --uplink bond0"


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (replace(ENO1, name="wlp3s0"), "is Wi-Fi, which can't be in a bridge"),
        (BR0, "is a bridge itself"),
        (replace(ENO1, name="wg0", ethernet=False, kind="wireguard"), "is no Ethernet"),
        (replace(ENO1, name="lo", ethernet=False), "is no Ethernet"),
    ],
)
def test_what_can_be_in_no_bridge_is_refused(host: dict[str, Link], link: Link, said: str) -> None:
    host[link.name] = link
    with pytest.raises(StateError, match=said):
        uplinks.bridge_for("out", link.name)


def test_an_interface_that_is_missing_is_named_with_those_that_there_are(
    host: dict[str, Link],
) -> None:
    with pytest.raises(NotFound, match="no interface 'eth0'") as caught:
        uplinks.bridge_for("out", "eth0")
    assert caught.value.hint == "it has eno1"


def test_an_uplink_that_carries_the_host_is_never_taken(host: dict[str, Link]) -> None:
    network = Network("out", "bridge", "db-out", uplink="eno1")
    with pytest.raises(StateError, match=r"carries the host's own traffic \(192.0.2.1/24\)") as e:
        uplinks.check_uplink(network, ENO1)
    assert e.value.hint == "drivebay net host-bridge plan eno1"
    uplinks.check_uplink(network, replace(ENO1, name="eno2"))
    with pytest.raises(StateError, match="is a part of 'br0' now"):
        uplinks.check_uplink(network, replace(ENO1, name="eno2", master="br0"))
