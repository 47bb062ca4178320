"""What a move of an uplink into a bridge would do, and why one is refused.

Context: root; looks only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from drivebay.errors import AlreadyExists, InUse, NotFound, UsageError
from drivebay.net.hostbridge import clients
from drivebay.net.hostbridge.kernel import Entry, Kernel, attribute
from drivebay.net.hostbridge.managers import Manager, find_manager, name_servers
from drivebay.net.hostbridge.state import Before, kind_of, read_uplink
from drivebay.net.uplinks import is_wireless

__all__ = ["HostPlan", "look"]

_ETHERNET: Final = 1
_LOOPBACK: Final = 8
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")
_NO_UPLINK: Final = {"bridge", "tun", "macvlan", "macvtap", "ipvlan", "ipvtap", "vrf", "ifb"}
_EXCLUSIVE: Final = {"macvlan", "macvtap", "ipvlan", "ipvtap"}
_DMI: Final = Path("/sys/class/dmi/id")
# A word of the maker's or the product's name, and whose computer it is.
_CLOUDS: Final = (
    ("Amazon", "Amazon EC2"),
    ("Google", "Google Cloud"),
    ("Microsoft", "Microsoft Azure or Hyper-V"),
    ("DigitalOcean", "DigitalOcean"),
    ("Hetzner", "Hetzner"),
    ("Vultr", "Vultr"),
    ("Linode", "Linode"),
    ("Akamai", "Akamai"),
    ("Scaleway", "Scaleway"),
    ("OVH", "OVH"),
    ("UpCloud", "UpCloud"),
    ("Alibaba", "Alibaba Cloud"),
    ("Tencent", "Tencent Cloud"),
    ("OracleCloud", "Oracle Cloud"),
    ("OpenStack", "OpenStack"),
    ("VMware", "VMware"),
)


@dataclass(frozen=True)
class HostPlan:
    """Shown by `plan`, done by `apply`."""

    before: Before
    facts: list[str]
    warnings: list[str] = field(default_factory=list)


def look(kernel: Kernel, uplink: str, bridge: str) -> HostPlan:
    """Raises: UsageError, NotFound, InUse, AlreadyExists: why this uplink can't be moved."""
    link = kernel.link(uplink)
    if link is None:
        raise NotFound(f"there is no network device '{uplink[:40]}'", hint="ip -brief link")
    _check_uplink(kernel, uplink, link)
    _check_bridge(kernel, bridge)
    before = read_uplink(kernel, uplink, bridge)
    _check_routes(before)
    found = clients.find_clients(uplink)
    devices = {str(attribute(each, "IFLA_IFNAME")) for each in kernel.links()}
    if clients.dhcpcd_serves(uplink, devices):
        raise InUse(
            f"dhcpcd looks after '{uplink}', and can't be moved along",
            hint=f"put 'denyinterfaces {uplink}' into /etc/dhcpcd.conf, and use dhclient",
        )
    manager = _manager_of(before)
    before = replace(before, clients=[each.to_json() for each in found], manager=manager.to_json())
    return HostPlan(before, facts(before, found, manager), warnings(before))


def _manager_of(before: Before) -> Manager:
    """Whose configuration it is. That of /etc is about the network of the first process only."""
    if clients.namespace("self") != clients.namespace("1"):
        return Manager()
    return replace(find_manager(before.uplink), dns=name_servers(before.uplink.name))


def _check_uplink(kernel: Kernel, name: str, link: dict[str, Any]) -> None:
    if link["flags"] & _LOOPBACK:
        raise UsageError(f"'{name}' is the loopback device, and no uplink")
    if link["ifi_type"] != _ETHERNET:
        raise UsageError(f"'{name}' is no Ethernet device, and only these can be in a bridge")
    if is_wireless(name):
        raise UsageError(
            f"'{name}' is Wi-Fi: an access point takes frames of one MAC only, so a bridge would "
            "carry nothing of the guests",
            hint="drivebay net create lan --mode nat",
        )
    kind = kind_of(link)
    if kind in _NO_UPLINK:
        raise UsageError(f"'{name}' is a {kind} device, and no uplink")
    master = attribute(link, "IFLA_MASTER")
    if master:
        above = next((each for each in kernel.links() if each["index"] == master), None)
        upper = "?" if above is None else attribute(above, "IFLA_IFNAME")
        what = "" if above is None else f" {kind_of(above)}"
        raise InUse(
            f"'{name}' is in the{what} '{upper}' already",
            hint=f"drivebay net create lan --mode bridge --uplink {name}"
            if what == " bridge"
            else f"take '{upper}' instead, if it has the address",
        )
    for other in kernel.links():
        if attribute(other, "IFLA_LINK") == link["index"] and kind_of(other) in _EXCLUSIVE:
            raise InUse(
                f"the {kind_of(other)} device '{attribute(other, 'IFLA_IFNAME')}' is on '{name}', "
                "which can't be in a bridge then",
                hint=f"ip link delete {attribute(other, 'IFLA_IFNAME')}",
            )


def _check_bridge(kernel: Kernel, name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"'{name[:40]}' can't be the name of a bridge: at most 15 letters, digits, dots, "
            "dashes and underscores, a letter first",
            field="bridge",
        )
    if kernel.link(name) is not None:
        raise AlreadyExists(
            f"there is a device '{name}' already", hint="choose another name: --bridge br1"
        )


def _check_routes(before: Before) -> None:
    for link in (before.uplink, *before.vlans):
        if any(attribute(route, "RTA_NH_ID") is not None for route in link.routes):
            raise InUse(
                f"routes of '{link.name}' use nexthop objects, which can't be moved",
                hint="ip nexthop",
            )


# ---- in words -----------------------------------------------------------------------------------


def facts(before: Before, found: list[clients.Client], manager: Manager) -> list[str]:
    """What the uplink has now."""
    up = before.uplink
    lines = [f"'{up.name}': MAC {up.mac}, MTU {up.mtu}, {'up' if up.up else 'down'}"]
    lines += [f"  address {spell_address(each)}" for each in up.addresses]
    lines += [f"  route {spell_route(each)}" for each in up.routes]
    lines += [f"  rule {attribute(each, 'FRA_PRIORITY')} names it" for each in before.rules]
    lines += [f"  VLAN {each.vlan}: '{each.name}'" for each in before.vlans]
    lines += [f"  DHCP client {each.kind} (process {each.pid})" for each in found]
    lines += [f"  name servers {' '.join(manager.dns['dns'])}"] if manager.dns.get("dns") else []
    lines.append(f"  configured by {manager.name or 'nobody that we know'}")
    return lines


def spell_address(entry: Entry) -> str:
    local = attribute(entry, "IFA_LOCAL") or attribute(entry, "IFA_ADDRESS")
    valid = (attribute(entry, "IFA_CACHEINFO") or {}).get("ifa_valid", 0xFFFFFFFF)
    lifetime = "" if valid == 0xFFFFFFFF else f" (for {valid} s)"
    return f"{local}/{entry['prefixlen']}{lifetime}"


def spell_route(entry: Entry) -> str:
    target = attribute(entry, "RTA_DST")
    zero = "0.0.0.0" if entry["family"] == 2 else "::"
    words = [f"{target or zero}/{entry['dst_len']}"]
    for name, word in (("RTA_GATEWAY", "via"), ("RTA_PREFSRC", "from"), ("RTA_PRIORITY", "metric")):
        value = attribute(entry, name)
        if value is not None:
            words.append(f"{word} {value}")
    hops = attribute(entry, "RTA_MULTIPATH")
    if hops:
        words.append(f"over {len(hops)} gateways")
    table = attribute(entry, "RTA_TABLE")
    if table not in (None, 254):
        words.append(f"in table {table}")
    return " ".join(words)


def warnings(before: Before) -> list[str]:
    found = []
    cloud = cloud_of()
    if cloud is not None:
        found.append(
            f"this host is a virtual machine of {cloud}, whose network drops frames of MACs that "
            f"it has not given: guests in '{before.bridge}' may have no network; "
            "'drivebay net create lan --mode nat' does not need this"
        )
    if not before.uplink.up:
        found.append(f"'{before.uplink.name}' is down")
    if not before.uplink.addresses:
        found.append(
            f"'{before.uplink.name}' has no address: 'drivebay net create lan --mode bridge "
            f"--uplink {before.uplink.name}' is all that guests need"
        )
    return found


def cloud_of(folder: Path = _DMI) -> str | None:
    """Whose virtual machine this host is, by what its firmware says; None for other hosts."""
    said = ""
    for name in ("sys_vendor", "product_name", "chassis_asset_tag", "bios_vendor"):
        try:
            said += " " + (folder / name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue
    return next((cloud for word, cloud in _CLOUDS if word in said), None)
