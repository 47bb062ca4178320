"""Networks of VMs: what keeps guests from their network, or one from being made.

Context: a short-lived process. Findings are made of facts that were read before (`network_facts`),
so no check looks at the host by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from drivebay.errors import DrivebayError, NotFound
from drivebay.host.finding import Finding, failed
from drivebay.host.firewalls import blockers
from drivebay.host.network_facts import Facts, Listener, Standing, read_facts
from drivebay.net.bridge_helper import find_helper, has_rights
from drivebay.net.model import Network
from drivebay.net.store import Networks
from drivebay.vm.store import Vms

__all__ = ["check_network"]

_DNS, _DHCP = 53, 67
_UP: Final = "up"


def check_network() -> Iterator[Finding]:
    """Check all that networks need."""
    facts = read_facts(Networks(), _foreign_bridges())
    yield from findings(facts)
    yield _helper()


def findings(facts: Facts) -> Iterator[Finding]:
    """What there is to say of some facts."""
    yield from _kernel(facts)
    yield from _programs(facts)
    for standing in facts.networks:
        yield _standing(standing)
    yield from _forwarding(facts)
    yield from _strict(facts)
    yield from _firewalls(facts)
    yield from _listeners(facts)
    yield from _ping(facts)
    if facts.waiting is not None:
        yield Finding(
            "warning",
            "host-bridge",
            "a change of the host's uplink waits for confirmation, and is taken back in "
            f"{facts.waiting:.0f} seconds",
            "sudo drivebay net host-bridge confirm",
        )
    if not facts.root:
        yield Finding(
            "note",
            "networks",
            "only root sees firewalls, and who listens on which port",
            "sudo drivebay doctor net",
        )


def _foreign_bridges() -> Iterator[str]:
    """Bridges of others that this user's VMs join."""
    vms = Vms()
    for name in vms.names():
        try:
            nets = vms.load(name).spec.nets
        except DrivebayError:
            continue  # `drivebay doctor` says it
        yield from (net.bridge for net in nets if net.bridge is not None)


def _networks(facts: Facts) -> list[Network]:
    return [found.network for found in facts.networks if found.network is not None]


# ---- the kernel, programs -----------------------------------------------------------------------


def _kernel(facts: Facts) -> Iterator[Finding]:
    level = "problem" if facts.networks else "note"
    for can, what, module in (
        (facts.can_tap, "TAPs (/dev/net/tun), which VMs in a network have", "tun"),
        (facts.can_bridge, "bridges, which networks are", "bridge"),
        (facts.can_translate, "address translation by nftables, for --mode nat",
         "-a nf_tables nft_chain_nat nft_masq"),
    ):  # fmt: skip
        if can is False:
            yield Finding(level, "kernel", f"no {what}", f"sudo modprobe {module}")
        elif can:
            yield Finding("ok", "kernel", what)
    if not facts.can_vhost:
        yield Finding(
            "note",
            "kernel",
            "no /dev/vhost-net: QEMU copies the packets of networks itself, which is slower",
            "sudo modprobe vhost_net",
        )


def _programs(facts: Facts) -> Iterator[Finding]:
    for name, mend in facts.lacking.items():
        level = "problem" if any(net.subnet for net in _networks(facts)) else "note"
        yield Finding(level, "programs", f"no {name}, which named networks need", mend)


def _helper() -> Finding:
    try:
        helper = find_helper()
    except NotFound as error:
        return failed("programs", error, "note")
    if has_rights(helper):
        return Finding("ok", "programs", f"{helper} puts VMs of plain users into bridges")
    return Finding(
        "note",
        "programs",
        f"{helper} is not set-uid, so only root puts VMs into bridges",
        "sudo drivebay net create NAME --allow-user USER",
    )


# ---- networks -----------------------------------------------------------------------------------


def _standing(standing: Standing) -> Finding:
    name, state = standing.name, standing.state
    if standing.network is None:
        return Finding("warning", "networks", state, f"drivebay net info {name}")
    if state == _UP:
        return Finding("ok", "networks", f"network '{name}', mode {standing.network.mode}")
    return Finding(
        "warning", "networks", f"network '{name}' is {_spelled(state)}",
        f"sudo drivebay net start {name}"
    )  # fmt: skip


def _spelled(state: str) -> str:
    """A state is a word or a sentence."""
    return state if state == "down" or state.startswith("half made") else f"not up: {state}"


def _forwarding(facts: Facts) -> Iterator[Finding]:
    needing = [net.name for net in _networks(facts) if net.forwards]
    if facts.forwarding is False and needing:
        yield Finding(
            "problem",
            "forwarding",
            f"this host passes no packets on, so guests of {_listed(needing)} reach only each "
            "other and the host",
            f"sudo drivebay net start {needing[0]}",
        )


def _strict(facts: Facts) -> Iterator[Finding]:
    if len(facts.uplinks) < 2 or not facts.strict:
        return
    if any(net.forwards or net.uplink for net in _networks(facts)):
        yield Finding(
            "warning",
            "rp_filter",
            f"with several uplinks ({', '.join(facts.uplinks)}) answers to guests may come by "
            f"another one than they went, and rp_filter of {', '.join(facts.strict)} drops them",
            "sudo sysctl net.ipv4.conf.all.rp_filter=2",
        )


def _listed(names: list[str]) -> str:
    return ", ".join(f"network '{name}'" for name in names)


# ---- firewalls ----------------------------------------------------------------------------------


def _firewalls(facts: Facts) -> Iterator[Finding]:
    if facts.rules is None:
        return
    for net in _networks(facts):
        who = f"guests of network '{net.name}'"
        if net.forwards or facts.bridged_filtered:
            yield from _dropped(facts, "forward", net.bridge, _loss(facts, who, net))
        if net.subnet is not None:
            loss = f"{who} get no address and no name by DHCP and DNS"
            yield from _dropped(facts, "input", net.bridge, loss)
    named = {net.bridge for net in _networks(facts)}
    for bridge in facts.foreign_bridges if facts.bridged_filtered else ():
        if bridge not in named:
            loss = f"guests in bridge '{bridge}' reach nobody by IPv4"
            yield from _dropped(facts, "forward", bridge, f"{loss} {_WHY_BRIDGED}")


_WHY_BRIDGED: Final = (
    "(it sees what passes inside a bridge, too: net.bridge.bridge-nf-call-iptables is 1)"
)


def _loss(facts: Facts, who: str, net: Network) -> str:
    if not facts.bridged_filtered:
        return f"{who} reach nothing outside"
    if net.forwards:
        return f"{who} reach nothing outside, and not each other {_WHY_BRIDGED}"
    return f"{who} reach nobody but the host {_WHY_BRIDGED}"


def _dropped(facts: Facts, hook: str, bridge: str, loss: str) -> Iterator[Finding]:
    assert facts.rules is not None
    for blocker in blockers(facts.rules, facts.legacy_rules, hook, bridge):
        yield Finding(
            "problem",
            "firewall",
            f"{blocker} lets through only what it knows, and has no rule for '{bridge}': {loss}",
            blocker.mend(bridge),
        )


# ---- who else gives addresses and names ---------------------------------------------------------


def _listeners(facts: Facts) -> Iterator[Finding]:
    if not facts.root:
        return  # nobody else is told whose process listens, so ours would be found, too
    ours = {standing.dnsmasq for standing in facts.networks} - {None}
    for standing in facts.networks:
        net = standing.network
        if net is None or net.subnet is None:
            continue
        for listener in facts.listeners:
            if listener.pid is not None and listener.pid in ours:
                continue
            found = _conflict(listener, standing, net)
            if found is not None:
                yield found


def _conflict(listener: Listener, standing: Standing, net: Network) -> Finding | None:
    program = listener.program or "another program"
    who = program if listener.pid is None else f"{program} (process {listener.pid})"
    here = listener.interface == net.bridge or listener.address == str(net.gateway)
    if listener.port == _DHCP and listener.kind == "udp" and (here or listener.everywhere):
        return Finding(
            "problem" if here else "warning",
            "DHCP",
            f"{who} listens for DHCP {_where(listener)}, and may give guests of network "
            f"'{net.name}' addresses of its own",
            _elsewhere(program, net),
        )
    # Once ours has its port, who listens everywhere is no harm to it.
    if listener.port == _DNS and standing.dnsmasq is None and (here or listener.everywhere):
        return Finding(
            "problem",
            "DNS",
            f"{who} listens on port {_DNS}/{listener.kind} {_where(listener)}, so network "
            f"'{net.name}' can't have its own name server",
            _elsewhere(program, net),
        )
    return None


def _where(listener: Listener) -> str:
    if listener.interface is not None:
        return f"on {listener.interface}"
    return "on all interfaces" if listener.everywhere else f"at {listener.address}"


def _elsewhere(program: str, net: Network) -> str:
    if program == "dnsmasq":
        return (
            f"printf 'bind-dynamic\\nexcept-interface={net.bridge}\\n' | "
            "sudo tee /etc/dnsmasq.d/drivebay.conf && sudo systemctl restart dnsmasq"
        )
    return f"let {program} listen on the interfaces only that it is for, and not on {net.bridge}"


# ---- user mode ----------------------------------------------------------------------------------


def _ping(facts: Facts) -> Iterator[Finding]:
    if facts.ping_groups is None:
        return
    low, high = facts.ping_groups
    if not any(low <= group <= high for group in facts.groups):
        yield Finding(
            "note",
            "ping",
            "guests in user mode can't ping, since the host does not let QEMU",
            "sudo sysctl net.ipv4.ping_group_range='0 2147483647'",
        )
