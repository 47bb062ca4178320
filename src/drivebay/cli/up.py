"""`drivebay up [FILE]`: a whole lab from one file, made, changed and started.

Context: a short-lived process. What is made is planned in vm.lab; here it is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivebay.cli.arguments import Parser, add_json_option, add_socket_option
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.cli.steps import add_change_options, carry_out
from drivebay.errors import DrivebayError, StateError

if TYPE_CHECKING:
    from drivebay.vm.lab.planning import Doings
    from drivebay.vm.lab.record import Labs, Record

__all__ = ["LAB_FILE", "build_parser", "main", "record_for"]

LAB_FILE = "lab.toml"

_EPILOG = """\
examples:
  drivebay up                           what lab.toml in this folder describes
  drivebay up examples/four-vms.toml
  drivebay up --dry-run                 what it would do
  drivebay up --prune                   delete also what is not in the file any more
  drivebay down                         stop it again

A second 'up' changes nothing. Edit the file, and the next one changes what differs.
"""


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        "drivebay up",
        description="Make and start what a lab's file describes: pools, disks and VMs.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default=LAB_FILE, help="the lab's (default: lab.toml)"
    )
    parser.add_argument(
        "--prune", action="store_true", help="delete what is not in the file any more"
    )
    parser.add_argument(
        "--recreate",
        metavar="NAME",
        action="append",
        default=[],
        help="delete a VM, disk or pool of the file with all that stands on it, and make it anew",
    )
    add_change_options(parser, asks=True)
    add_socket_option(parser)
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the VMs' names only")
    return parser


def main(arguments: list[str]) -> int:
    """Bring a lab up."""
    found = build_parser().parse_args(arguments)
    from drivebay.cli.progress import Phases
    from drivebay.disks.connection import find_socket
    from drivebay.disks.starting import connect_or_start
    from drivebay.vm.lab.planning import plan_up
    from drivebay.vm.lab.reading import read_lab
    from drivebay.vm.lab.record import Labs
    from drivebay.vm.lab.site import Site

    path = Path(found.file).resolve()
    lab = read_lab(path)
    labs = Labs()
    done: list[str] = []

    def say(line: str) -> None:
        done.append(line)
        if not (found.json or found.quiet):
            print(line, flush=True)

    with labs.locked(lab.name), connect_or_start(found.socket) as client, Phases() as phases:
        record = record_for(labs, lab.name, path)
        site = Site(lab.name, record, client, find_socket(found.socket), say=say, report=phases)
        doings = plan_up(site, lab, found.recreate, prune=found.prune)
        if not found.dry_run:
            doings.up.settle()
        _carry_out(doings, found)
        phases.close()
        if not (found.dry_run and found.json):
            _show(doings, done, found)
    return DONE


def record_for(labs: Labs, name: str, path: Path) -> Record:
    """The record of the lab that a file describes. Raises: StateError when another file has it."""
    from drivebay.vm.lab.record import Record

    record = labs.load(name)
    if record is None:
        return Record(labs.path(name), str(path))
    if record.file != str(path):
        raise StateError(
            f"the lab '{name}' is that of '{record.file}', and not of '{path}'",
            hint=f'another name for one of them: name = "…"; or, if that file was moved, change '
            f"'file' in {record.path}",
        )
    return record


def _carry_out(doings: Doings, found: argparse.Namespace) -> None:
    try:
        carry_out(doings.plan, found, doings.up.question)
    except DrivebayError:
        if doings.up.site.record.things:
            print_warning("what is made stays, and the next 'drivebay up' goes on from there")
        raise


# ---- showing ------------------------------------------------------------------------------------


def _show(doings: Doings, done: list[str], found: argparse.Namespace) -> None:
    from drivebay.disks.space import space_of

    vms = [] if found.dry_run else _vms(doings)
    lab = doings.up.lab
    if found.json:
        print_json(
            {"lab": lab.name, "file": str(lab.source.path), "did": done,
             "left": list(doings.left), "vms": vms}
        )  # fmt: skip
        return
    if found.quiet:
        print("".join(f"{vm['name']}\n" for vm in vms), end="")
        return
    if not doings.plan.texts:
        print(f"lab '{lab.name}' is as '{found.file}' says: nothing to do")
    elif not found.dry_run:
        print(f"lab '{lab.name}' is up; to get in: drivebay vm console {vms[0]['name']}"
              if vms else f"lab '{lab.name}' is made")  # fmt: skip
    for vm in vms:
        for line in vm["pending"]:
            print(f"VM '{vm['name']}' waits for a restart: {line}")
        if vm["pending"]:
            print(f"  restart it: drivebay vm restart {vm['name']}")
    for name in doings.left:
        print(f"not in the file any more: {name}; --prune deletes it")
    if not found.dry_run:
        inventory = doings.up.site.inventory()
        for pool in inventory.pools:
            warning = space_of(inventory, pool).warning(pool)
            if warning and pool.name in map(lab.full, (each.name for each in lab.pools)):
                print_warning(warning)


def _vms(doings: Doings) -> list[dict[str, Any]]:
    from drivebay.cli.vm_show import pending
    from drivebay.vm import run

    shown = []
    site = doings.up.site
    for each in doings.up.lab.vms:
        vm = site.vms.load(site.full(each.name))
        running = run.running(vm)
        forward = [str(forward) for net in vm.spec.nets for forward in net.forward]
        shown.append(
            {
                "name": vm.name,
                "state": "off" if running is None else "running",
                "forward": forward,
                "pending": [] if running is None else pending(vm, running),
            }
        )
    return shown
