"""The networks of a lab: [net.X] with a mode other than "user", made by `up` as `net create` does.

Context: a short-lived process that holds the lab's lock. Only root makes networks; a lab without
such ones needs no root.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from drivebay.disks.plan import Plan
from drivebay.errors import AlreadyExists, StateError
from drivebay.net.creation import Wish, plan_creation
from drivebay.net.deletion import plan_deletion
from drivebay.net.model import Network
from drivebay.net.reconcile import differences, reconcile
from drivebay.net.store import Networks, require_root
from drivebay.vm.lab.model import LabNet, network_name
from drivebay.vm.lab.record import Thing
from drivebay.vm.lab.site import Site, Up, told_at

__all__ = ["coming_networks", "plan_networks", "refuse_recreation", "remove_network"]


def plan_networks(up: Up) -> None:
    """Plan what makes the networks of the file. Raises: what would make that impossible."""
    # Those whose addresses are said come first, so that no other one chooses these.
    for net in sorted(up.lab.nets, key=lambda net: net.subnet is None):
        if net.is_made:
            with told_at(up.lab.source, net.place):
                _plan_network(up, net)


def coming_networks(up: Up) -> set[str]:
    """The networks that are not there yet when the plan begins."""
    there = Networks().names()
    names = {up.lab.network_name(net.name) for net in up.lab.nets if net.is_made}
    return names - set(there)


def refuse_recreation(things: Iterable[Thing]) -> None:
    """Raises: StateError for a network, in which VMs may be that stay."""
    for thing in things:
        if thing.kind == "network":
            raise StateError(
                f"a network is not made anew while VMs may be in it, and so not '{thing.name}'",
                hint="give it another name in the file: the VMs move to that one, and --prune "
                "deletes this one",
            )


def _plan_network(up: Up, net: LabNet) -> None:
    full = up.lab.network_name(net.name)
    networks = Networks()
    thing = up.site.record.find("network", net.name)
    there = networks.load(full) if full in networks.names() else None
    if there is not None and thing is None:
        raise AlreadyExists(
            f"there is a network '{full}' already, and this lab did not make it",
            hint=f'to join it: network = "{full}"; or another name for the lab',
        )
    if there is not None and thing is not None and there.made:
        _compare(there, net)
        if not thing.finished:
            up.settled.append(thing)
        if os.geteuid() == 0 and any(True for _ in differences(networks, there)):
            up.add(f"start network '{full}'", lambda: reconcile(networks, there))
        return
    if os.geteuid() != 0:
        raise StateError(
            f"only root makes networks, and [net.{net.name}] is one of mode {net.mode}",
            hint=f"sudo drivebay up {up.lab.source.path}; or root makes it with 'drivebay net "
            f"create NAME --allow-user {os.environ.get('USER', 'YOU')}', and the file says "
            'network = "NAME"',
        )
    plan_creation(Plan(), networks, full, _wish(net))
    up.add(f"make network '{full}', mode {net.mode}, for [net.{net.name}]", lambda: _make(up, net))


def _make(up: Up, net: LabNet) -> None:
    networks = Networks()
    full = up.lab.network_name(net.name)
    with networks.locked(full, new=True):
        plan = Plan()
        plan_creation(plan, networks, full, _wish(net))
        up.site.make(Thing("network", net.name), plan)


def _wish(net: LabNet) -> Wish:
    return Wish(net.mode, net.subnet, net.uplink, net.mtu)


def _compare(there: Network, net: LabNet) -> None:
    """Raises: StateError for a network that is another one than the file says."""
    for key, has, said in (
        ("mode", there.mode, net.mode),
        ("subnet", there.subnet, net.subnet),
        ("uplink", there.uplink, net.uplink),
        ("mtu", there.mtu, net.mtu),
    ):
        if said not in (None, has):
            raise StateError(
                f"network '{there.name}' has {key} {has}, and the file says {said}: a network "
                "stays as it was made",
                hint="put the old value back; or give it another name in the file: the VMs move "
                "to that one, and --prune deletes this one",
            )


def remove_network(site: Site, thing: Thing) -> None:
    """Delete a network of the lab, if it is there. Raises: InUse, StateError, HostError."""
    networks = Networks()
    full = network_name(site.name, thing.name)
    if full not in networks.names():
        return
    require_root(f"down {site.record.file} --delete")
    with networks.locked(full):
        plan = Plan()
        plan_deletion(plan, networks, networks.load(full))
        plan.run()
