"""From a lab's file and the world to what `up` does, and what `down` does.

Context: a short-lived process that holds the lab's lock. Planning only looks: whatever can be
known to fail is refused before the first step. The order is that of who needs whom:

    VMs that go ─► pools ─► networks ─► changed VMs ─► disks that go ─► disks, before their parts ─►
    disks that VMs get ─► images ─► new VMs ─► what is started
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drivebay.disks.inventory import Inventory
from drivebay.disks.plan import Plan
from drivebay.errors import NotFound, StateError
from drivebay.vm import run
from drivebay.vm.lab.changes import plan_new_disks, plan_settings
from drivebay.vm.lab.disks import in_order, part_of, plan_disk
from drivebay.vm.lab.model import Lab
from drivebay.vm.lab.networks import plan_networks, refuse_recreation
from drivebay.vm.lab.pools import plan_default, plan_pool
from drivebay.vm.lab.record import Record, Thing
from drivebay.vm.lab.removal import in_removal_order, name_of, remover, words_of
from drivebay.vm.lab.site import Site, Up, told_at
from drivebay.vm.lab.vms import is_there, plan_image, plan_vm
from drivebay.vm.lab.words import nearest
from drivebay.vm.several import Outcome, start_several, stop_several
from drivebay.vm.store import Vms

__all__ = ["Doings", "lab_vms", "plan_delete", "plan_up"]


@dataclass(frozen=True)
class Doings:
    """What `up` would do; ``left`` names what the file does not describe any more."""

    up: Up
    left: Sequence[str]

    @property
    def plan(self) -> Plan:
        return self.up.plan


def plan_up(site: Site, lab: Lab, recreate: Sequence[str] = (), *, prune: bool = False) -> Doings:
    """Plan what makes the world as the file says. Raises: what would make that impossible."""
    doomed = _closure(site, [_named(site, name) for name in recreate])
    refuse_recreation(doomed)
    inventory = _without(site, site.inventory(), doomed)
    up = Up(site, lab, inventory, frozenset((each.kind, each.name) for each in doomed))
    leaving = [thing for thing in in_removal_order(_leaving(site, lab)) if thing not in doomed]
    if doomed:
        up.question = "Delete these, and make them anew?"
    elif prune and leaving:
        up.question = "Delete what is not in the file any more?"
    halted = _plan_halt(up, doomed)
    for thing in in_removal_order(doomed):
        up.add(words_of(site, thing), remover(site, thing))
    if prune:
        _plan_pruned(up, leaving, ("vm",))
    for pool in lab.pools:
        plan_pool(up, pool)
    plan_networks(up)
    there = []
    for vm in lab.vms:
        with told_at(lab.source, vm.place):
            if is_there(up, vm):
                there.append(vm)
                plan_settings(up, vm)
    if prune:
        _plan_pruned(up, leaving, ("network", "parts", "disk", "pool"))
    new = [vm for vm in lab.vms if vm not in there]
    placed = [disk.pool for disk in lab.disks if disk.in_pool]
    placed += [vm.pool for vm in new if vm.has_system_disk]
    if None in placed:
        plan_default(up)
    for disk in in_order(lab.disks):
        plan_disk(up, disk)
    for vm in there:
        plan_new_disks(up, vm)
    for vm in new:
        with told_at(lab.source, (*vm.place, "image")):
            plan_image(up, vm)
    for vm in new:
        plan_vm(up, vm)
    _plan_start(up, halted)
    return Doings(up, () if prune else [name_of(site, thing) for thing in leaving])


def _plan_pruned(up: Up, leaving: Sequence[Thing], kinds: Sequence[str]) -> None:
    for thing in leaving:
        if thing.kind in kinds:
            up.add(words_of(up.site, thing), remover(up.site, thing))


def _leaving(site: Site, lab: Lab) -> list[Thing]:
    """What this lab has made, and its file does not describe any more."""
    kept = {("pool", pool.name) for pool in lab.pools}
    kept |= {("vm", vm.name) for vm in lab.vms}
    kept |= {("network", net.name) for net in lab.nets if net.is_made}
    kept |= {("disk", disk.name) for disk in lab.disks if disk.base is None}
    kept |= {("parts", disk.group) for disk in lab.disks if disk.base is not None}
    return [thing for key, thing in site.record.things.items() if key not in kept]


# ---- making anew --------------------------------------------------------------------------------


def _named(site: Site, name: str) -> Thing:
    """The thing that --recreate means: by the file's name, its table's, or that of the world."""
    things = site.record.things.values()
    short = name.removeprefix(f"{site.name}-")
    found = [thing for thing in things if name in (thing.name, _table(thing))]
    found = found or [thing for thing in things if thing.name == short]
    if not found:
        known = [thing.name for thing in things]
        raise NotFound(f"this lab has made nothing called '{name[:80]}'", hint=nearest(name, known))
    if len(found) > 1:
        raise StateError(
            f"'{name}' is the name of several things of this lab",
            hint=f"write {' or '.join(_table(thing) for thing in found)}",
        )
    return found[0]


def _table(thing: Thing) -> str:
    """As its table in the file is called."""
    table = {"parts": "disk", "network": "net"}.get(thing.kind, thing.kind)
    return f"{table}.{thing.name}"


def _closure(site: Site, named: Sequence[Thing]) -> list[Thing]:
    """With all that stands on them: disks in a pool, VMs that began in it, parts of a disk."""
    doomed = list(named)
    for thing in doomed:  # it grows meanwhile
        for other in site.record.things.values():
            if other not in doomed and _stands_on(site, other, thing):
                doomed.append(other)
    return doomed


def _without(site: Site, inventory: Inventory, doomed: Sequence[Thing]) -> Inventory:
    """What there will be when the doomed are gone."""
    pools = {site.full(thing.name) for thing in doomed if thing.kind == "pool"}
    disks = {thing.bdev for thing in doomed if thing.kind in ("disk", "vm")}
    parts = [thing for thing in doomed if thing.kind == "parts"]
    return Inventory(
        tuple(pool for pool in inventory.pools if pool.name not in pools),
        tuple(
            disk
            for disk in inventory.volumes
            if disk.reference not in disks and not any(part_of(thing, disk.bdev) for thing in parts)
        ),
    )


def _stands_on(site: Site, other: Thing, thing: Thing) -> bool:
    if thing.kind == "pool":
        return other.kind in ("disk", "vm") and other.bdev.startswith(f"{site.full(thing.name)}/")
    if other.kind != "parts":
        return False
    if thing.kind == "parts":
        return part_of(thing, other.bdev)
    return thing.kind == "disk" and _is_whole(site, other, thing)


def _is_whole(site: Site, parts: Thing, disk: Thing) -> bool:
    there = next((each for each in site.inventory().volumes if each.reference == disk.bdev), None)
    return there is not None and parts.bdev == there.bdev


def _plan_halt(up: Up, doomed: Sequence[Thing]) -> list[str]:
    """Stop the VMs that have a doomed disk, and stay themselves; returns their full names."""
    disks = {thing.bdev for thing in doomed if thing.kind == "disk"}
    parts = [thing for thing in doomed if thing.kind == "parts"]
    kept = {up.site.full(thing.name) for thing in doomed if thing.kind == "vm"}
    halted = []
    for name in lab_vms(up.site.name, up.site.record, up.site.vms):
        vm = up.site.vms.load(name)
        bdevs = [disk.bdev for disk in vm.spec.disks if disk.bdev is not None]
        has = any(bdev in disks or any(part_of(thing, bdev) for thing in parts) for bdev in bdevs)
        if has and name not in kept and run.running(vm) is not None:
            halted.append(name)
    if halted:
        up.add(f"stop {_list(halted)}", lambda: _raise_first(stop_several(up.site.vms, halted)))
    return halted


# ---- on and off ---------------------------------------------------------------------------------


def _plan_start(up: Up, halted: Sequence[str]) -> None:
    off = [
        up.site.full(vm.name)
        for vm in up.lab.vms
        if ("vm", vm.name) in up.doomed
        or up.site.full(vm.name) in halted
        or not _runs(up.site, up.site.full(vm.name))
    ]
    if off:
        up.add(
            f"start {_list(off)}",
            lambda: _raise_first(start_several(up.site.vms, off, up.site.socket)),
        )


def _runs(site: Site, name: str) -> bool:
    return name in site.vms.names() and run.running(site.vms.load(name)) is not None


def _list(names: Sequence[str]) -> str:
    return f"VM{'s' * (len(names) > 1)} {', '.join(names)}"


def _raise_first(outcomes: Iterable[Outcome[Any]]) -> None:
    """Wait for all, so that one that fails keeps no other from its turn."""
    failed = [(each.name, each.error) for each in outcomes if each.error is not None]
    if not failed:
        return
    name, error = failed[0]
    told = f"VM '{name}': {error}"
    if len(failed) > 1:
        told += f"; and so it is with {', '.join(name for name, _ in failed[1:])}"
    raise StateError(told, hint=error.hint) from error


def lab_vms(lab: str, record: Record, vms: Vms) -> list[str]:
    """A lab's VMs that are there, by their full names."""
    there = set(vms.names())
    names = [f"{lab}-{name}" for kind, name in record.things if kind == "vm"]
    return [name for name in names if name in there and vms.load(name).spec.lab == lab]


def plan_delete(site: Site) -> Plan:
    """Plan the end of all that a lab has made."""
    plan = Plan()
    for thing in in_removal_order(site.record.things.values()):
        plan.add(words_of(site, thing), remover(site, thing))
    return plan
