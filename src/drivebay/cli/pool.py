"""`drivebay pool create|list|info|grow|delete`: where disks live.

Context: a short-lived process that reaches the target through rpc.client only. A pool is a
logical volume store on a file, a partition or a whole device below a partition table of ours;
the bdev between the two is called ``pool-NAME``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivebay.cli.arguments import Parser, add_json_option, add_socket_option, parse_size
from drivebay.cli.output import DONE, print_json, print_table, print_warning
from drivebay.cli.steps import add_change_options, carry_out
from drivebay.disks.connection import connect, find_socket
from drivebay.disks.deleting import plan_pool_deletion, refuse_shown
from drivebay.disks.growing import plan_pool_growth
from drivebay.disks.inventory import Inventory, Pool, check_name, read_inventory
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.disks.space import space_of
from drivebay.errors import AlreadyExists, InUse

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["build_parser", "main"]

_EPILOG = """\
examples:
  drivebay pool create fast --file /srv/fast.img --size 300G
  drivebay pool create nvme --device /dev/nvme0n1 --size 300G
  drivebay pool list
"""


def main(arguments: list[str]) -> int:
    """Run one of the subcommands."""
    found = build_parser().parse_args(arguments)
    with connect(found.socket) as client:
        run = {
            "create": _create,
            "list": _list,
            "info": _info,
            "grow": _grow,
            "delete": _delete,
        }[found.subcommand]
        return run(client, found)


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("drivebay pool", description="Pools: where disks live.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a pool in a file or on a disk")
    create.add_argument("name", metavar="NAME", help="its name")
    where = create.add_mutually_exclusive_group(required=True)
    where.add_argument("--file", metavar="FILE", help="in a file, which takes up what is used")
    where.add_argument(
        "--device",
        metavar="DEVICE",
        help="on one new partition in a disk's free space, or on a partition that is empty",
    )
    create.add_argument(
        "--size", metavar="SIZE", type=parse_size, help="such as 300G (a device: all that is free)"
    )
    add_change_options(create, asks=True)
    listing = commands.add_parser("list", help="show all pools")
    info = commands.add_parser("info", help="show one pool and its disks")
    info.add_argument("name", metavar="NAME", help="the pool")
    grow = commands.add_parser("grow", help="make a pool larger")
    grow.add_argument("name", metavar="NAME", help="the pool")
    grow.add_argument(
        "--size", metavar="SIZE", type=parse_size, help="the file's new size (a device: its own)"
    )
    add_change_options(grow)
    delete = commands.add_parser("delete", help="delete a pool")
    delete.add_argument("name", metavar="NAME", help="the pool")
    delete.add_argument(
        "--with-disks", action="store_true", help="even when there are disks in it: delete them"
    )
    add_change_options(delete, asks=True)
    for command in (create, listing, info, grow, delete):
        add_socket_option(command)
        add_json_option(command)
        command.add_argument("-q", "--quiet", action="store_true", help="print names only")
    return parser


# ---- showing ----------------------------------------------------------------------------------


def _as_json(inventory: Inventory, pool: Pool) -> dict[str, Any]:
    space = space_of(inventory, pool)
    return {
        "name": pool.name,
        "uuid": pool.uuid,
        "place": pool.place,
        "bdev": pool.base,
        "size": pool.size,
        "used": pool.used,
        "promised": space.promised,
        "real": space.real,
        "cluster_size": pool.cluster_bytes,
        "warning": space.warning(pool),
        "disks": [disk.name for disk in inventory.disks_of(pool)],
    }


# ---- commands ---------------------------------------------------------------------------------


def _list(client: Client, found: argparse.Namespace) -> int:
    inventory = read_inventory(client)
    if found.quiet:
        print("".join(f"{pool.name}\n" for pool in inventory.pools), end="")
        return DONE
    if found.json:
        print_json([_as_json(inventory, pool) for pool in inventory.pools])
        return DONE
    rows, warnings = [], []
    for pool in inventory.pools:
        space = space_of(inventory, pool)
        promised = f"{format_size(space.promised)} of {format_size(space.real)}"
        rows.append(
            (pool.name, format_size(pool.size), format_size(pool.used), promised, space.disks,
             pool.place or pool.base)
        )  # fmt: skip
        warnings.append(space.warning(pool))
    print_table(("pool", "size", "used", "promised", "disks", "on"), rows)
    for warning in filter(None, warnings):
        print_warning(warning)
    return DONE


def _info(client: Client, found: argparse.Namespace) -> int:
    inventory = read_inventory(client)
    _show(inventory, inventory.pool(found.name), found)
    return DONE


def _show(inventory: Inventory, pool: Pool, found: argparse.Namespace) -> None:
    if found.quiet:
        print(pool.name)
        return
    if found.json:
        print_json(_as_json(inventory, pool))
        return
    space = space_of(inventory, pool)
    print(f"pool      {pool.name}")
    print(f"on        {pool.place or pool.base}")
    print(f"size      {format_size(pool.size)}, in clusters of {format_size(pool.cluster_bytes)}")
    print(f"used      {format_size(pool.used)}")
    promised, real = format_size(space.promised), format_size(space.real)
    print(f"promised  {promised} of {real} that there really are")
    print(f"uuid      {pool.uuid}")
    disks = inventory.disks_of(pool)
    if disks:
        print()
        print_table(
            ("disk", "size", "used", "kind"),
            [
                (disk.name, format_size(disk.size), format_size(disk.used or 0), disk.kind)
                for disk in disks
            ],
        )
    warning = space.warning(pool)
    if warning:
        print_warning(warning)


def _create(client: Client, found: argparse.Namespace) -> int:
    from drivebay.disks.device_pool import plan_device_pool
    from drivebay.disks.pools import plan_file_pool

    check_name(found.name, "pool")
    inventory = read_inventory(client)
    if any(pool.name == found.name for pool in inventory.pools):
        raise AlreadyExists(f"there is a pool '{found.name}' already", hint="drivebay pool list")
    plan = Plan()
    question = None
    if found.file is not None:
        socket = find_socket(found.socket)
        plan_file_pool(plan, client, found.name, Path(found.file).absolute(), found.size, socket)
    else:
        question = plan_device_pool(plan, client, found.name, found.device, found.size)
    if carry_out(plan, found, question):
        inventory = read_inventory(client)
        _show(inventory, inventory.pool(found.name), found)
    return DONE


def _grow(client: Client, found: argparse.Namespace) -> int:
    pool = read_inventory(client).pool(found.name)
    plan = Plan()
    plan_pool_growth(plan, client, pool, found.size)
    if carry_out(plan, found):
        inventory = read_inventory(client)
        _show(inventory, inventory.pool(found.name), found)
    return DONE


def _delete(client: Client, found: argparse.Namespace) -> int:
    inventory = read_inventory(client)
    pool = inventory.pool(found.name)
    disks = inventory.disks_of(pool)
    names = ", ".join(disk.name for disk in disks)
    refuse_shown(inventory, pool)
    if disks and not found.with_disks:
        raise InUse(
            f"pool '{pool.name}' holds {len(disks)} disk{'s' if len(disks) > 1 else ''}: {names}",
            hint="delete or move them first, or add --with-disks to delete them too",
        )
    plan = Plan()
    plan_pool_deletion(plan, client, inventory, pool)
    if carry_out(plan, found, f"Delete pool '{pool.name}' with all that is in it?"):
        _tell_deleted(pool, [disk.name for disk in disks], found)
    return DONE


def _tell_deleted(pool: Pool, disks: list[str], found: argparse.Namespace) -> None:
    if found.json:
        print_json({"deleted": pool.name, "disks": disks})
    else:
        print(pool.name if found.quiet else f"pool '{pool.name}' deleted")
