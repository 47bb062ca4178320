"""The uplink's state, the messages of the moves, and what is refused: with a kernel of lists.

The double keeps what it is told, as the kernel does; what the kernel itself makes of it is the
matter of tests/e2e/test_net_host_bridge.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivebay.errors import DrivebayError, UsageError
from drivebay.net.hostbridge import moves, plan
from drivebay.net.hostbridge import state as states
from drivebay.net.hostbridge.application import all_steps
from drivebay.net.hostbridge.kernel import Entry, attribute, redirected
from drivebay.net.hostbridge.managers import Manager
from drivebay.net.hostbridge.state import Before, aged

UPLINK = 2
FOREVER = 0xFFFFFFFF


def address(text: str, length: int = 24, *, valid: int = FOREVER, flags: int = 0x80) -> Entry:
    family = 10 if ":" in text else 2
    attrs: list[list[Any]] = [["IFA_ADDRESS", text], ["IFA_FLAGS", flags]]
    if family == 2:
        attrs += [["IFA_LOCAL", text], ["IFA_LABEL", "eno1"]]
    attrs.append(["IFA_CACHEINFO", {"ifa_preferred": valid, "ifa_valid": valid}])
    return {"family": family, "prefixlen": length, "flags": flags & 0xFF, "scope": 0,
            "attrs": attrs}  # fmt: skip


def route(target: str | None, length: int, gateway: str | None = None, table: int = 254) -> Entry:
    attrs: list[list[Any]] = [["RTA_TABLE", table], ["RTA_OIF", UPLINK]]
    attrs += [["RTA_DST", target]] if target else []
    attrs += [["RTA_GATEWAY", gateway]] if gateway else []
    return {"family": 2, "dst_len": length, "type": 1, "flags": 0, "proto": 4, "attrs": attrs}


def rule(priority: int, interface: str | None = None) -> Entry:
    attrs: list[list[Any]] = [["FRA_PRIORITY", priority], ["FRA_TABLE", 77]]
    return {"family": 2, "attrs": attrs + ([["FRA_IIFNAME", interface]] if interface else [])}


class ListKernel:
    """Devices, addresses, routes and rules in lists; what is there already stays as it is."""

    def __init__(self) -> None:
        self.next = 3
        self.devices: dict[int, dict[str, Any]] = {}
        self.on: dict[int, list[Entry]] = {}
        self.ways: list[Entry] = []
        self.ruled: list[Entry] = [rule(0)]
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def add_device(self, index: int, name: str, kind: str | None = None, **more: Any) -> None:
        attrs = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", more.get("address", "52:54:00:00:00:01")),
                 ("IFLA_MTU", more.get("mtu", 1500))]  # fmt: skip
        attrs += [("IFLA_MASTER", more["master"])] if more.get("master") else []
        attrs += [("IFLA_LINK", more["link"])] if "link" in more else []
        if kind is not None:
            data = [("IFLA_VLAN_ID", more["vlan_id"])] if "vlan_id" in more else []
            info = [("IFLA_INFO_KIND", kind), ("IFLA_INFO_DATA", {"attrs": data})]
            attrs.append(("IFLA_LINKINFO", {"attrs": info}))
        self.devices[index] = {"index": index, "attrs": attrs, "flags": 1, "ifi_type": 1}
        self.on.setdefault(index, [])

    def links(self) -> list[dict[str, Any]]:
        return list(self.devices.values())

    def link(self, name: str) -> dict[str, Any] | None:
        return next((each for each in self.links() if attribute(each, "IFLA_IFNAME") == name), None)

    def index(self, name: str) -> int | None:
        found = self.link(name)
        return None if found is None else int(found["index"])

    def addresses(self, index: int) -> list[Entry]:
        return copy.deepcopy(self.on.get(index, []))

    def routes(self, index: int) -> list[Entry]:
        return [each for each in copy.deepcopy(self.ways) if attribute(each, "RTA_OIF") == index]

    def rules(self) -> list[Entry]:
        return copy.deepcopy(self.ruled)

    def make_link(self, name: str, **settings: Any) -> None:
        self.asked.append((name, settings))
        self.add_device(self.next, name, **settings)
        self.next += 1

    def set_link(self, index: int, what: str, **settings: Any) -> None:
        if "master" in settings:
            attrs = [each for each in self.devices[index]["attrs"] if each[0] != "IFLA_MASTER"]
            attrs += [("IFLA_MASTER", settings["master"])] if settings["master"] else []
            self.devices[index]["attrs"] = attrs

    def delete_link(self, index: int) -> None:
        del self.devices[index]
        del self.on[index]
        self.ways = [each for each in self.ways if attribute(each, "RTA_OIF") != index]

    def add_address(self, entry: Entry, index: int) -> None:
        if _key(entry) not in [_key(each) for each in self.on[index]]:
            self.on[index].append(entry)

    def remove_address(self, entry: Entry, index: int) -> None:
        self.on[index] = [each for each in self.on[index] if _key(each) != _key(entry)]

    def add_route(self, entry: Entry) -> None:
        if entry not in self.ways:
            self.ways.append(entry)

    def remove_route(self, entry: Entry) -> None:
        self.ways = [each for each in self.ways if each != entry]

    def add_rule(self, entry: Entry) -> None:
        if entry not in self.ruled:
            self.ruled.append(entry)

    def remove_rule(self, entry: Entry) -> None:
        self.ruled = [each for each in self.ruled if each != entry]


def _key(entry: Entry) -> Any:
    return attribute(entry, "IFA_ADDRESS"), entry["prefixlen"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test looks at this machine's /proc/sys or managers, nor writes there."""
    monkeypatch.setattr(states, "SYSCTL", tmp_path)
    monkeypatch.setattr(plan, "find_manager", lambda link: Manager())


def kernel_with(addresses: list[Entry], routes: list[Entry], rules: list[Entry]) -> Any:
    kernel = ListKernel()
    kernel.add_device(1, "lo", address="00:00:00:00:00:00")
    kernel.devices[1]["flags"] = 8 | 1
    kernel.add_device(UPLINK, "eno1")
    kernel.on[UPLINK] = addresses
    kernel.ways = routes
    kernel.ruled += rules
    return kernel


def typical() -> Any:
    return kernel_with(
        [address("10.9.0.2"), address("10.9.0.3"), address("fd00::2", 64)],
        [route(None, 0, "10.9.0.1"), route("10.9.0.0", 24), route("10.5.0.0", 16, table=77)],
        [rule(1000, "eno1"), rule(2000)],
    )


def move(kernel: Any, before: Before, steps: int = 99) -> None:
    for _, do in moves.move_steps(kernel, before)[:steps]:
        do()


def shown(kernel: Any) -> Any:
    """What is compared: the wishes among flags, without the order of routes and rules."""
    return (
        {name: sorted(map(_key, entries)) for name, entries in kernel.on.items()},
        sorted(map(repr, kernel.ways)),
        sorted(map(repr, kernel.ruled)),
        {key: [each for each in value["attrs"] if each[0] == "IFLA_MASTER"]
         for key, value in kernel.devices.items()},
    )  # fmt: skip


# ---- state --------------------------------------------------------------------------------------

_ADDRESSES = st.builds(
    lambda number, length, v6: address(
        f"fd00::{number:x}" if v6 else f"10.0.{number // 256}.{number % 256}", length
    ),
    st.integers(1, 0xFFFE), st.integers(8, 32), st.booleans(),
)  # fmt: skip
_ROUTES = st.builds(
    lambda number, length, gateway, table: route(
        f"10.{number}.0.0", length, "10.0.0.1" if gateway else None, table
    ),
    st.integers(0, 255), st.integers(8, 32), st.booleans(), st.integers(1, 252),
)  # fmt: skip
_RULES = st.builds(rule, st.integers(1, 30000), st.sampled_from(["eno1", None, "wlan0"]))


def _unlike(entries: st.SearchStrategy[Entry]) -> st.SearchStrategy[list[Entry]]:
    return st.lists(entries, max_size=5, unique_by=repr)


@given(
    st.lists(_ADDRESSES, max_size=5, unique_by=_key), _unlike(_ROUTES), _unlike(_RULES),
    st.integers(0, 9),
)  # fmt: skip
def test_whatever_it_has_and_wherever_the_moves_stop_restore_makes_it_as_it_was(
    addresses: list[Entry], routes: list[Entry], rules: list[Entry], steps: int
) -> None:
    kernel = kernel_with(addresses, routes, rules)
    before = states.read_uplink(kernel, "eno1", "br0")
    assert Before.from_json(before.to_json()) == before
    old = shown(kernel)
    move(kernel, before, steps)
    moves.restore(kernel, before)
    assert shown(kernel) == old
    moves.restore(kernel, before)
    assert shown(kernel) == old


def test_all_of_it_is_on_the_bridge_and_nothing_is_left_on_the_uplink() -> None:
    kernel = typical()
    before = states.read_uplink(kernel, "eno1", "br0")
    move(kernel, before)
    bridge = kernel.index("br0")
    assert kernel.on[UPLINK] == []
    assert [_key(each)[0] for each in kernel.on[bridge]] == ["10.9.0.2", "10.9.0.3", "fd00::2"]
    assert [attribute(each, "IFA_LABEL") for each in kernel.on[bridge]] == ["br0", "br0", None]
    assert kernel.routes(UPLINK) == []
    assert [each["dst_len"] for each in kernel.routes(bridge)] == [24, 16, 0], "gateways last"
    assert [attribute(each, "FRA_IIFNAME") for each in kernel.rules()] == [None, None, "br0"]


def test_the_bridge_has_the_uplinks_mac_and_no_delay() -> None:
    kernel = typical()
    move(kernel, states.read_uplink(kernel, "eno1", "br0"), 1)
    assert kernel.asked == [
        ("br0", {"kind": "bridge", "br_stp_state": 0, "br_forward_delay": 0,
                 "address": "52:54:00:00:00:01"}),
    ]  # fmt: skip


def test_a_vlan_device_is_made_again_on_the_bridge_and_then_on_the_uplink() -> None:
    kernel = typical()
    kernel.add_device(9, "eno1.5", "vlan", link=UPLINK, vlan_id=5, mtu=1400)
    kernel.on[9] = [address("10.5.0.2")]
    before = states.read_uplink(kernel, "eno1", "br0")
    request = {"kind": "vlan", "vlan_id": 5, "address": "52:54:00:00:00:01", "mtu": 1400}
    move(kernel, before)
    bridge = kernel.index("br0")
    assert kernel.asked[-1] == ("eno1.5", {**request, "link": bridge})
    assert [_key(each)[0] for each in kernel.on[kernel.index("eno1.5")]] == ["10.5.0.2"]
    moves.restore(kernel, before)
    assert kernel.asked[-1] == ("eno1.5", {**request, "link": UPLINK})
    assert [_key(each)[0] for each in kernel.on[kernel.index("eno1.5")]] == ["10.5.0.2"]


def test_somebody_elses_bridge_of_that_name_is_left_alone() -> None:
    kernel = typical()
    before = states.read_uplink(kernel, "eno1", "br0")
    kernel.add_device(7, "br0", "bridge", address="52:54:00:99:99:99")
    moves.restore(kernel, before)
    assert kernel.index("br0") == 7


def test_lifetimes_go_on_and_end_last() -> None:
    entry = address("10.9.0.2", valid=100)
    assert attribute(aged(entry, 30.5), "IFA_CACHEINFO")["ifa_valid"] == 70
    left = attribute(aged(entry, 1000), "IFA_CACHEINFO")
    assert (left["ifa_preferred"], left["ifa_valid"]) == (0, 1)
    assert attribute(aged(address("10.9.0.2"), 5), "IFA_CACHEINFO")["ifa_valid"] == FOREVER


def test_only_hops_over_the_uplink_go_another_way() -> None:
    hops = [{"oif": UPLINK, "attrs": []}, {"oif": 8, "attrs": []}]
    entry = {"family": 2, "attrs": [["RTA_MULTIPATH", hops]]}
    found = attribute(redirected(entry, {UPLINK: 5}), "RTA_MULTIPATH")
    assert [hop["oif"] for hop in found] == [5, 8]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"uplink": 1}', '{"uplink": {}, "vlans": []}'])
def test_a_broken_file_is_said_to_be_one(text: str) -> None:
    with pytest.raises(UsageError, match="not what was written"):
        Before.from_json(text)


# ---- plan ---------------------------------------------------------------------------------------


def refused(kernel: Any, name: str = "eno1", bridge: str = "br0") -> str:
    with pytest.raises(DrivebayError) as caught:
        plan.look(kernel, name, bridge)
    return str(caught.value)


def test_the_plan_shows_what_there_is_and_the_steps() -> None:
    found = plan.look(typical(), "eno1", "br0")
    assert "  address 10.9.0.2/24" in found.facts
    assert "  route 0.0.0.0/0 via 10.9.0.1" in found.facts
    assert "  route 10.5.0.0/16 in table 77" in found.facts
    assert [text for text, _ in all_steps(typical(), found.before)] == [
        "make the bridge 'br0' with the MAC 52:54:00:00:00:01, MTU 1500, without spanning tree",
        "put 'eno1' into 'br0'",
        "move 3 addresses and 3 routes to 'br0'",
        "let 1 rule name 'br0', not 'eno1'",
    ]


def test_what_is_no_uplink_is_refused() -> None:
    kernel = typical()
    kernel.add_device(5, "br7", "bridge")
    kernel.add_device(6, "bond0", "bond")
    kernel.add_device(7, "eth1", master=6)
    kernel.add_device(8, "eth2", master=5)
    kernel.add_device(9, "tun0", "tun")
    assert "is the loopback device" in refused(kernel, "lo")
    assert "there is no network device 'nix'" in refused(kernel, "nix")
    assert "is a bridge device, and no uplink" in refused(kernel, "br7")
    assert "is a tun device" in refused(kernel, "tun0")
    assert "is in the bond 'bond0' already" in refused(kernel, "eth1")
    assert "is in the bridge 'br7' already" in refused(kernel, "eth2")
    assert "there is a device 'br7' already" in refused(kernel, bridge="br7")
    assert "can't be the name of a bridge" in refused(kernel, bridge="br 7")
    assert "can't be the name of a bridge" in refused(kernel, bridge="b" * 16)
    kernel.add_device(10, "guest", "macvtap", link=UPLINK)
    assert "the macvtap device 'guest' is on 'eno1'" in refused(kernel)


def test_wifi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "is_wireless", lambda name: name == "eno1")
    assert "is Wi-Fi" in refused(typical())


def test_nexthop_objects_are_refused() -> None:
    kernel = typical()
    kernel.ways[0]["attrs"].append(["RTA_NH_ID", 4])
    assert "nexthop objects" in refused(kernel)


@pytest.mark.parametrize(
    ("file", "said", "cloud"),
    [
        ("sys_vendor", "Amazon EC2\n", "Amazon EC2"),
        ("product_name", "Google Compute Engine\n", "Google Cloud"),
        ("sys_vendor", "Hetzner\n", "Hetzner"),
        ("chassis_asset_tag", "OracleCloud.com\n", "Oracle Cloud"),
        ("sys_vendor", "Dell Inc.\n", None),
        ("sys_vendor", "QEMU\n", None),
    ],
)
def test_a_cloud_is_known_by_its_firmware(
    tmp_path: Path, file: str, said: str, cloud: str | None
) -> None:
    (tmp_path / file).write_text(said)
    assert plan.cloud_of(tmp_path) == cloud


def test_guests_on_a_cloud_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "cloud_of", lambda: "Amazon EC2")
    (warning,) = plan.look(typical(), "eno1", "br0").warnings
    assert "drops frames of MACs" in warning
