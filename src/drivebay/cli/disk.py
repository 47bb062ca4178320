"""`drivebay disk create|list|info|resize|snapshot|revert|clone|limit|delete`: what people use.

Context: a short-lived process that reaches the target through rpc.client only. A disk is a
volume in a pool, a file or device, or a part of one; disks.inventory tells which. What makes
and what changes disks is in disk_create and disk_change.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from drivebay.cli.arguments import Parser, add_json_option, add_socket_option, parse_size
from drivebay.cli.output import DONE, print_json, print_table
from drivebay.cli.steps import add_change_options
from drivebay.disks.connection import connect
from drivebay.disks.inventory import LIMITS, Disk, Inventory, read_inventory, short_name
from drivebay.disks.sizes import format_size

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["build_parser", "main", "show_disk"]

_EPILOG = """\
examples:
  drivebay disk create web --size 20G
  drivebay disk create db --file /srv/db.img --size 100G
  drivebay disk create --split /dev/nvme1n1 4
  drivebay disk snapshot web before-upgrade
  drivebay disk revert web before-upgrade
  drivebay disk clone web@before-upgrade web2

A disk is meant by NAME, by POOL/NAME, or by its uuid; its snapshots by NAME@SNAPSHOT.
"""

# The module that has the function of a subcommand's name.
_MODULES = {
    "create": "disk_create",
    "resize": "disk_change",
    "snapshot": "disk_change",
    "revert": "disk_change",
    "clone": "disk_clone",
    "limit": "disk_change",
    "delete": "disk_delete",
}


def main(arguments: list[str]) -> int:
    """Run one of the subcommands."""
    found = build_parser().parse_args(arguments)
    with connect(found.socket) as client:
        if found.subcommand == "list":
            return _list(client, found)
        if found.subcommand == "info":
            inventory = read_inventory(client)
            show_disk(inventory, inventory.disk(found.name), found)
            return DONE
        module = importlib.import_module(f"drivebay.cli.{_MODULES[found.subcommand]}")
        return int(getattr(module, found.subcommand)(client, found))


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("drivebay disk", description="Disks for virtual machines.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    def add(name: str, text: str, *, asks: bool = False, changes: bool = True) -> Parser:
        command: Parser = commands.add_parser(name, help=text)
        if changes:
            add_change_options(command, asks=asks)
        add_socket_option(command)
        add_json_option(command)
        command.add_argument("-q", "--quiet", action="store_true", help="print names only")
        return command

    _add_create(add("create", "make a disk: in a pool, on a file, or by splitting another"))
    add("list", "show all disks", changes=False)
    _name(add("info", "show one disk or snapshot", changes=False))
    resize = add("resize", "make a disk larger")
    _name(resize)
    resize.add_argument(
        "--size", metavar="SIZE", type=parse_size, required=True, help="the new size, such as 20G"
    )
    resize.add_argument(
        "--yes-shrink", action="store_true", help="also smaller: what lies behind the end is lost"
    )
    snapshot = add("snapshot", "keep a disk's present state")
    _name(snapshot)
    snapshot.add_argument(
        "snap", metavar="SNAPSHOT", nargs="?", help="its name (default: the time)"
    )
    revert = add("revert", "go back to a snapshot: what was written since is lost", asks=True)
    _name(revert)
    revert.add_argument("snap", metavar="SNAPSHOT", help="the snapshot to go back to")
    clone = add("clone", "make a new disk that begins with the content of another")
    clone.add_argument("name", metavar="DISK", help="a disk, or DISK@SNAPSHOT")
    clone.add_argument("new", metavar="NEW", help="the new disk's name")
    clone.add_argument(
        "--full", action="store_true", help="copy all of it, so that it needs the other no more"
    )
    _add_limit(add("limit", "bound how fast a disk may be"))
    delete = add("delete", "delete a disk or a snapshot", asks=True)
    _name(delete)
    delete.add_argument(
        "--with-snapshots", action="store_true", help="even when it has snapshots: delete them"
    )
    delete.add_argument(
        "--with-parts", action="store_true", help="even when it is split: join the parts again"
    )
    return parser


def _name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the disk")


def _add_create(create: argparse.ArgumentParser) -> None:
    create.add_argument("name", metavar="NAME", nargs="?", help="its name (not with --split)")
    create.add_argument("--size", metavar="SIZE", type=parse_size, help="such as 10G")
    where = create.add_mutually_exclusive_group()
    where.add_argument("--pool", metavar="POOL", help="in this pool (default: the only one)")
    where.add_argument("--file", metavar="FILE", help="on a file of its own, or a whole device")
    where.add_argument(
        "--split",
        metavar=("BASE", "N"),
        nargs=2,
        help="split a disk, file or device into N parts of --size each (default: all of it)",
    )
    create.add_argument(
        "--thick", action="store_true", help="reserve all of its space in the pool now"
    )
    create.add_argument(
        "--yes-use-existing",
        action="store_true",
        help="use a file or device that holds a file system, partitions or the like",
    )


def _add_limit(limit: argparse.ArgumentParser) -> None:
    _name(limit)
    for option, text in (
        ("--iops", "reads and writes a second"),
        ("--mbps", "MiB a second of reads and writes together"),
        ("--read-mbps", "MiB a second of reads"),
        ("--write-mbps", "MiB a second of writes"),
    ):
        limit.add_argument(option, metavar="N", type=_count, help=f"{text}; 0 lifts the limit")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0")
    return int(text)


# ---- showing ------------------------------------------------------------------------------------


def _list(client: Client, found: argparse.Namespace) -> int:
    inventory = read_inventory(client)
    disks = inventory.disks
    if found.quiet:
        print("".join(f"{disk.name}\n" for disk in disks), end="")
    elif found.json:
        print_json([as_json(inventory, disk) for disk in disks])
    else:
        print_table(
            ("disk", "pool", "size", "used", "snapshots", "controllers", "limits"),
            [
                (
                    disk.name,
                    disk.pool or spell_kind(disk),
                    format_size(disk.size),
                    "-" if disk.used is None else format_size(disk.used),
                    len(inventory.snapshots_of(disk)),
                    ", ".join(use.controller for use in disk.uses) or "-",
                    spell_limits(disk) or "-",
                )
                for disk in disks
            ],
        )
    return DONE


def spell_kind(disk: Disk) -> str:
    """Where a disk lies that is in no pool, in brackets as it is no pool's name."""
    return f"(part of {disk.base})" if disk.base is not None else f"({disk.kind})"


def spell_limits(disk: Disk) -> str:
    """Its limits as people write them: '20000 IOPS, 100 MiB/s read'."""
    return ", ".join(f"{value} {LIMITS[name]}" for name, value in disk.limits)


def as_json(inventory: Inventory, disk: Disk) -> dict[str, Any]:
    """All that is known of a disk or snapshot."""
    return {
        "name": disk.name,
        "pool": disk.pool,
        "kind": "snapshot" if disk.snapshot else disk.kind,
        "bdev": disk.bdev,
        "size": disk.size,
        "used": disk.used,
        "place": disk.place,
        "base": disk.base,
        "parent": disk.parent,
        "snapshots": [short_name(disk, other) for other in inventory.snapshots_of(disk)],
        "clones": [other.name for other in inventory.clones_of(disk)],
        "parts": [other.name for other in inventory.parts_of(disk)],
        "controllers": [
            {"name": use.controller, "sessions": use.sessions} for use in disk.uses
        ],
        "limits": dict(disk.limits),
    }  # fmt: skip


def show_disk(inventory: Inventory, disk: Disk, found: argparse.Namespace) -> None:
    """Print one disk, as ``--json`` and ``-q`` want it."""
    if found.quiet:
        print(disk.name)
        return
    if found.json:
        print_json(as_json(inventory, disk))
        return
    print(f"{'snapshot' if disk.snapshot else 'disk':<12}{disk.name}")
    if disk.pool is not None:
        print(f"pool        {disk.pool} ({disk.kind})")
    elif disk.place is not None:
        print(f"on          {disk.place}")
    else:
        print(f"kind        {spell_kind(disk)}")
    print(f"size        {format_size(disk.size)}, blocks of {disk.block_size} bytes")
    if disk.used is not None:
        print(f"used        {format_size(disk.used)}")
    if disk.parent is not None:
        print(f"begins with {disk.parent}")
    for title, names in _lists(inventory, disk):
        if names:
            print(f"{title:<12}{', '.join(names)}")
    print(f"limits      {spell_limits(disk) or 'none'}")
    print(f"bdev        {disk.bdev}")


def _lists(inventory: Inventory, disk: Disk) -> list[tuple[str, list[str]]]:
    uses = [
        f"{use.controller} ({use.sessions} connected)" if use.sessions else use.controller
        for use in disk.uses
    ]
    return [
        ("snapshots", [short_name(disk, other) for other in inventory.snapshots_of(disk)]),
        ("clones", [other.name for other in inventory.clones_of(disk)]),
        ("parts", [other.name for other in inventory.parts_of(disk)]),
        ("controllers", uses),
    ]
