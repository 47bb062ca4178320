"""TAPs in a namespace: made in a bridge with several queues, opened by name, gone with their
descriptors; what is no TAP and no bridge is refused.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.e2e.net_bay import NetBay

pytestmark = pytest.mark.needs_root

# Runs in the namespace: makes what it is told, says what the kernel says of it, and lets go.
PROGRAM = """
import json, subprocess, sys
from drivebay.errors import DrivebayError
from drivebay.net import taps

def link(name):
    words = ["ip", "-json", "-details", "link", "show", name]
    return json.loads(subprocess.run(words, capture_output=True, check=True).stdout)[0]

said = []
for kind, name, queues in json.loads(sys.argv[1]):
    try:
        if kind == "bridge":
            tap = taps.open_tap(name, queues=queues, alias="a test")
        else:
            tap = taps.open_named_tap(name, queues=queues, alias="a test")
        said.append({"queues": len(tap.descriptors), **link(tap.interface)})
        if kind == "kept":
            taps.set_persistent(tap, True)
        tap.close()
    except DrivebayError as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def bay(net_bay: NetBay) -> NetBay:
    """A bridge with an uplink, a TAP with one queue and one that may have many."""
    net_bay.link(net_bay.host, "eno1", net_bay.namespace("street"), "eth0")
    net_bay.ip(net_bay.host, "link add br0 mtu 1400 type bridge")
    net_bay.ip(net_bay.host, "link set eno1 mtu 1400 master br0")
    net_bay.ip(net_bay.host, "link set br0 up")
    net_bay.ip(net_bay.host, "tuntap add dev single mode tap")
    net_bay.ip(net_bay.host, "tuntap add dev many mode tap multi_queue")
    return net_bay


def opened(bay: NetBay, *wanted: tuple[str, str, int]) -> list[Any]:
    text = bay.ok_in(bay.host, sys.executable, "-c", PROGRAM, json.dumps(wanted))
    found = json.loads(text)
    assert isinstance(found, list)
    return found


def mac(bay: NetBay, interface: str) -> str:
    return str(json.loads(bay.ip(bay.host, f"-json link show {interface}"))[0]["address"])


def test_a_tap_is_in_its_bridge_and_gone_with_its_descriptors(bay: NetBay) -> None:
    """Its MAC address is above each card's: the bridge keeps its own, on which the host hangs."""
    before = mac(bay, "br0")
    (tap,) = opened(bay, ("bridge", "br0", 4))
    assert (tap["queues"], tap["linkinfo"]["info_data"]["numqueues"]) == (4, 4)
    assert (tap["master"], tap["mtu"], tap["ifalias"]) == ("br0", 1400, "a test")
    assert "UP" in tap["flags"]
    assert tap["address"].startswith("fe:")
    assert mac(bay, "br0") == before
    assert bay.links(bay.host) == ["br0", "eno1", "lo", "many", "single"]


def test_a_tap_that_is_there_is_opened_as_what_it_is(bay: NetBay) -> None:
    wanted = [("named", name, queues) for name in ("single", "many", "new") for queues in (1, 4)]
    found = opened(bay, *wanted, ("kept", "ours", 2))
    assert [tap["queues"] for tap in found] == [1, 1, 1, 4, 1, 4, 2]
    assert ["UP" in tap["flags"] for tap in found] == 4 * [False] + 3 * [True]
    assert bay.links(bay.host) == ["br0", "eno1", "lo", "many", "ours", "single"]
    bay.ip(bay.host, "link delete ours")


def test_what_is_no_tap_and_no_bridge(bay: NetBay) -> None:
    found = opened(
        bay, ("named", "eno1", 1), ("named", "eno1", 2), ("bridge", "eno1", 1),
        ("bridge", "gone", 1),
    )  # fmt: skip
    assert [text.split(",")[0] for text in found] == [
        "StateError: the interface 'eno1' is no TAP",
        "StateError: the interface 'eno1' is no TAP",
        "StateError: the interface 'eno1' is no bridge",
        "NotFound: this host has no bridge 'gone'",
    ]
    assert bay.links(bay.host) == ["br0", "eno1", "lo", "many", "single"]
