"""`drivebay vm snapshot|snapshots|revert`: a VM's disks of one instant, kept and gone back to."""

from __future__ import annotations

import argparse
from typing import Any, Final

from drivebay.cli.output import DONE, print_json, print_table, print_warning
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import connect
from drivebay.disks.inventory import Inventory, read_inventory
from drivebay.disks.sizes import format_size
from drivebay.disks.starting import connect_or_start
from drivebay.errors import DrivebayError, InUse, Unreachable
from drivebay.vm import run
from drivebay.vm.disks import inventory_when_let_go
from drivebay.vm.snapshots import (
    Snapshot,
    all_of,
    find,
    plan_deletion,
    plan_return,
    plan_taking,
)
from drivebay.vm.store import Vm, Vms

__all__ = ["list_snapshots", "revert", "snapshot"]

MEMORY: Final = "what was in its memory is not part of it"


def snapshot(found: argparse.Namespace) -> int:
    """Take a snapshot, or delete one."""
    vms = Vms()
    with vms.locked(found.name), connect_or_start(found.socket) as client:
        vm = vms.load(found.name)
        if found.delete:
            doomed = find(vm, found.tag)
            plan = plan_deletion(vm, doomed, client, read_inventory(client))
            if carry_out(plan, found, f"Delete snapshot '{doomed.tag}' of VM '{vm.name}'?"):
                _say_deleted(vm, doomed, found)
            return DONE
        runs = run.running(vm) is not None
        # One that runs and that nobody knows of could not be held still.
        inventory = (read_inventory(client) if runs
                     else inventory_when_let_go(client, vm.name, vm.spec.disks))  # fmt: skip
        taking = plan_taking(vm, found.tag, runs, client, inventory)
        if not carry_out(taking.plan, found):
            return DONE
    taken = find(vm, found.tag)
    if found.json:
        print_json({"vm": vm.name, **_as_json(taken, None)})
        return DONE
    print(f"VM '{vm.name}' has the snapshot '{taken.tag}': {', '.join(taking.volumes)}")
    print(f"  its file systems are {taken.consistency}; {MEMORY}")
    print(f"  go back: drivebay vm revert {vm.name} {taken.tag}")
    return DONE


def _say_deleted(vm: Vm, doomed: Snapshot, found: argparse.Namespace) -> None:
    if found.json:
        print_json({"vm": vm.name, "deleted": doomed.tag})
    else:
        print(f"VM '{vm.name}' has the snapshot '{doomed.tag}' no more")


def revert(found: argparse.Namespace) -> int:
    """Go back to a snapshot."""
    vms = Vms()
    with vms.locked(found.name), connect_or_start(found.socket) as client:
        vm = vms.load(found.name)
        if run.running(vm) is not None:
            raise InUse(
                f"VM '{vm.name}' runs, and its disks can't change under it",
                hint=f"drivebay vm stop {vm.name}",
            )
        goal = find(vm, found.tag)
        inventory = inventory_when_let_go(client, vm.name, vm.spec.disks)
        plan = plan_return(vms, vm, goal, client, inventory)
        question = f"Lose what was written to the disks of VM '{vm.name}' since '{goal.tag}'?"
        if not carry_out(plan, found, question):
            return DONE
    if found.json:
        print_json({"vm": vm.name, "reverted": goal.tag, "facts": plan.facts})
        return DONE
    print("\n".join([f"VM '{vm.name}' is as it was at '{goal.tag}', {_when(goal)}", *plan.facts]))
    return DONE


# ---- listing ------------------------------------------------------------------------------------


def list_snapshots(found: argparse.Namespace) -> int:
    """List all; how much they hold is known only to a target that runs."""
    vm = Vms().load(found.name)
    tags = all_of(vm)
    if found.quiet:
        print("".join(f"{tag}\n" for tag in tags), end="")
        return DONE
    try:
        with connect(found.socket) as client:
            inventory = read_inventory(client)
    except Unreachable:
        inventory = None
    shown = []
    for tag in tags:
        try:
            shown.append(find(vm, tag))
        except DrivebayError as error:
            print_warning(str(error))
    shown.sort(key=lambda each: each.taken)
    if found.json:
        print_json([_as_json(each, inventory) for each in shown])
    elif not shown:
        print(f"VM '{vm.name}' has no snapshot: drivebay vm snapshot {vm.name} TAG")
    else:
        print_table(
            ("snapshot", "taken", "disks", "holds", "file systems"),
            [
                (
                    each.tag,
                    _when(each),
                    ", ".join(kept.disk for kept in each.volumes),
                    _spell_size(each, inventory),
                    each.consistency.partition(":")[0],
                )
                for each in shown
            ],
        )
    return DONE


def _when(shown: Snapshot) -> str:
    return shown.taken.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _spell_size(shown: Snapshot, inventory: Inventory | None) -> str:
    size = None if inventory is None else _size(shown, inventory)
    if size is None:
        return "-" if inventory is None else "a part is gone"
    return format_size(size)


def _size(shown: Snapshot, inventory: Inventory) -> int | None:
    """Bytes that only the pool's snapshots hold; None when one of them was deleted."""
    there = {volume.bdev: volume for volume in inventory.volumes}
    found = [there.get(kept.bdev) for kept in shown.volumes]
    return None if None in found else sum(each.used or 0 for each in found if each is not None)


def _as_json(shown: Snapshot, inventory: Inventory | None) -> dict[str, Any]:
    return {
        "snapshot": shown.tag,
        "taken": shown.taken.isoformat(),
        "consistency": shown.consistency,
        "volumes": {kept.disk: f"{kept.volume}@{shown.tag}" for kept in shown.volumes},
        "complete": None if inventory is None else _size(shown, inventory) is not None,
        "holds": None if inventory is None else _size(shown, inventory),
    }
