"""`drivebay vm clone`: VMs that go on from another one's disks."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from drivebay.cli.output import DONE, print_json
from drivebay.cli.steps import carry_out
from drivebay.disks.inventory import read_inventory
from drivebay.disks.starting import connect_or_start
from drivebay.errors import UsageError
from drivebay.vm import renewal
from drivebay.vm.clones import Clones, plan_clones
from drivebay.vm.store import Vms

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["clone"]

_COUNT_MOST = 256


def clone(found: argparse.Namespace) -> int:
    """Make one clone called NEW, or --count of them called NEW-1, NEW-2 …"""
    vms = Vms()
    if not 1 <= found.count <= _COUNT_MOST:
        raise UsageError(f"--count is {found.count}, and should be from 1 to {_COUNT_MOST}")
    names = [found.new]
    if found.count > 1:
        names = [f"{found.new}-{number + 1}" for number in range(found.count)]
    with vms.locked(found.name), connect_or_start(found.socket) as client:
        vm = vms.load(found.name)
        clones = plan_clones(vms, vm, names, client, read_inventory(client))
        if found.full:
            _plan_copies(clones, client, found)
        if not carry_out(clones.plan, found):
            return DONE
    if found.json:
        print_json({"clones": names, "consistency": clones.consistency or None})
        return DONE
    for name in names:
        print(f"VM '{name}' is made, a clone of '{found.name}'")
    if clones.consistency:
        print(f"its file systems are {clones.consistency}")
    if clones.specs[0].cloud_init is None:
        _say_what_is_equal(clones)
    return DONE


def _plan_copies(clones: Clones, client: Client, found: argparse.Namespace) -> None:
    from drivebay.cli.disk_clone import copy_parents

    for volume in clones.volumes:
        clones.plan.add(
            f"copy all that '{volume}' reads from snapshots",
            partial(copy_parents, client, found.socket, volume),
        )
    if clones.volumes:
        clones.plan.add("delete the snapshots again", clones.drop_snapshots)


def _say_what_is_equal(clones: Clones) -> None:
    """Without cloud-init, only the addresses of the network interfaces differ by themselves."""
    if clones.has_agent:
        print("its guest agent gives it a machine-id, host name and sshd's keys of its own at its "
              "first start")  # fmt: skip
        return
    print("the machine-id, the host name and sshd's keys stay equal; in the clone, as root:")
    for line in renewal.commands(clones.specs[0].name):
        print(f"  {line}")
