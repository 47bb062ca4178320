"""The host's interface into the LAN, for networks of mode bridge: which may be one, and its way
out of our bridge again.

Context: a short-lived process. An uplink with addresses of the host is never taken: the host would
be cut off. `hostbridge` moves such a one, with a way back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from drivebay.errors import InUse, NotFound, StateError
from drivebay.net.links import Link, all_links, carried, find_link, set_link
from drivebay.net.model import Network, bridge_name

__all__ = ["bridge_for", "check_uplink", "is_wireless", "take_out"]

_SYSFS: Final = Path("/sys/class/net")


def bridge_for(name: str, uplink: str) -> str:
    """The bridge by which a network's VMs reach the LAN of an uplink: the one that has it already,
    or the network's own.

    Raises: NotFound, StateError when the uplink can't be one, InUse for another network's.
    """
    links = all_links()
    link = _find(links, uplink)
    refuse_unsuitable(link, is_wireless(uplink))
    if link.master is None:
        return bridge_name(name)
    master = links.get(link.master)
    if master is None or master.kind != "bridge":
        raise StateError(
            f"'{uplink}' is a part of '{link.master}', which is no bridge, so it is no uplink",
            hint=f"if '{link.master}' leads into the LAN: --uplink {link.master}",
        )
    if master.name.startswith("db-") and master.name != bridge_name(name):
        raise InUse(
            f"'{uplink}' is the uplink of another network, in bridge '{master.name}'",
            hint="one network for each uplink is enough: any number of VMs may join it",
        )
    return master.name


def refuse_unsuitable(link: Link, wireless: bool) -> None:
    """Raises: StateError for an interface that can be in no bridge, with the reason."""
    other_modes = "take mode nat or routed, which go with any uplink"
    if wireless:
        raise StateError(
            f"'{link.name}' is Wi-Fi, which can't be in a bridge: an access point takes no frames "
            "from other addresses than its own",
            hint=other_modes,
        )
    if link.kind == "bridge":
        raise StateError(
            f"'{link.name}' is a bridge itself, so it needs no network of ours",
            hint=f"drivebay vm create … --net bridge={link.name}",
        )
    if not link.ethernet or link.name == "lo":
        raise StateError(
            f"'{link.name}' is no Ethernet, so it can't be in a bridge", hint=other_modes
        )


def check_uplink(network: Network, link: Link) -> None:
    """Whether an uplink may be put into our bridge now. Raises: StateError when the host would
    lose it."""
    refuse_unsuitable(link, is_wireless(link.name))
    if link.master not in (None, network.bridge):
        raise StateError(
            f"'{link.name}' is a part of '{link.master}' now, and should be in '{network.bridge}'"
        )
    held = carried(link)
    if held:
        raise StateError(
            f"'{link.name}' carries the host's own traffic ({held[0]}), which it would lose in a "
            "bridge",
            hint=f"drivebay net host-bridge plan {link.name}",
        )


def load_uplink(network: Network) -> Link:
    """The uplink of a network. Raises: NotFound."""
    assert network.uplink is not None
    return _find(all_links(), network.uplink)


def _find(links: dict[str, Link], name: str) -> Link:
    link = links.get(name)
    if link is None:
        cards = sorted(link.name for link in links.values() if not link.kind and link.ethernet)
        raise NotFound(
            f"this host has no interface '{name}'", hint=f"it has {', '.join(cards) or 'none'}"
        )
    return link


def is_wireless(name: str) -> bool:
    """Whether sysfs says that an interface is Wi-Fi."""
    return any((_SYSFS / name / sign).exists() for sign in ("wireless", "phy80211"))


def take_out(network: Network, *, up: bool) -> None:
    """Take the uplink out of our bridge, if it is there and in it, and leave it ``up`` or down.

    Raises: HostError.
    """
    assert network.uplink is not None
    link = find_link(network.uplink)
    if link is None or link.master != network.bridge:
        return
    if not up:
        set_link(link.name, state="down")  # first: in the bridge it is found again after a kill
    set_link(link.name, master=0)
