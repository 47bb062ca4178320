"""`drivebay disk delete`: refuses while something stands on the disk, and says what."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from drivebay.cli.output import DONE, print_json
from drivebay.cli.steps import carry_out
from drivebay.disks.deleting import plan_disk_deletion
from drivebay.disks.inventory import read_inventory
from drivebay.disks.plan import Plan

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["delete"]


def delete(client: Client, found: argparse.Namespace) -> int:
    """Delete a disk with its content, or let go of a file or device, whose content stays."""
    inventory = read_inventory(client)
    disk = inventory.disk(found.name)
    plan = Plan()
    question = plan_disk_deletion(
        plan,
        client,
        inventory,
        disk,
        with_snapshots=found.with_snapshots,
        with_parts=found.with_parts,
    )
    if carry_out(plan, found, question):
        if found.json:
            print_json({"deleted": disk.name, "pool": disk.pool})
        else:
            what = "snapshot" if disk.snapshot else "disk"
            print(disk.name if found.quiet else f"{what} '{disk.name}' deleted")
    return DONE
