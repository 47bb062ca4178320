"""`drivebay net create|list|info|delete|start|host-bridge`: the networks that VMs join.

Context: a short-lived process. Only root makes and changes networks; everybody may look.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack, suppress
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from drivebay.cli import net_host_bridge
from drivebay.cli.arguments import Parser, add_json_option
from drivebay.cli.output import DONE, REFUSED, print_error, print_json, print_table, table_lines
from drivebay.cli.steps import add_change_options, carry_out
from drivebay.errors import DrivebayError, UsageError
from drivebay.net.model import MODES, read_subnet
from drivebay.net.store import Networks, require_root

if TYPE_CHECKING:
    from drivebay.net.model import Network

__all__ = ["build_parser", "main"]

_EPILOG = """\
examples:
  sudo drivebay net create lan                        NAT, DHCP and names; a free subnet
  sudo drivebay net create lab --mode isolated --subnet 192.168.120.0/24
  sudo drivebay net create office --mode bridge --uplink eno1
  drivebay net list
"""


def main(arguments: list[str]) -> int:
    """Run one of the subcommands."""
    found = build_parser().parse_args(arguments)
    return int(found.run(found))


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("drivebay net", description="Networks that VMs join.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    _add_create(commands)
    listing = commands.add_parser("list", help="show all networks")
    listing.set_defaults(run=_list)
    info = commands.add_parser("info", help="show one network, and who is in it")
    info.add_argument("name", metavar="NAME", help="the network")
    info.set_defaults(run=_info)
    delete = commands.add_parser("delete", help="delete a network, and all that was made for it")
    delete.add_argument("name", metavar="NAME", help="the network")
    add_change_options(delete, asks=True)
    delete.set_defaults(run=_delete)
    start = commands.add_parser("start", help="make what is missing of networks, as after a boot")
    start.add_argument("names", metavar="NAME", nargs="*", help="a network (default: all)")
    start.set_defaults(run=_start)
    net_host_bridge.add_parser(commands)
    for command in (listing, info, delete, start):
        add_json_option(command)
        command.add_argument("-q", "--quiet", action="store_true", help="print names only")
    return parser


def _add_create(commands: Any) -> None:
    create = commands.add_parser("create", help="make a network")
    create.add_argument("name", metavar="NAME", help="its name: 1 to 12 letters, digits and '-'")
    create.add_argument(
        "--mode",
        choices=MODES,
        default="nat",
        help="nat: guests reach what the host reaches, behind its address (the default); "
        "isolated: only each other and the host; routed: with their own addresses; "
        "bridge: they are in the host's LAN",
    )
    create.add_argument(
        "--subnet", metavar="CIDR", type=_subnet, help="its addresses (default: a free /24)"
    )
    create.add_argument(
        "--uplink", metavar="IFACE", help="of mode bridge: the host's interface into the LAN"
    )
    create.add_argument("--mtu", metavar="N", type=int, help="the largest packet, in bytes")
    create.add_argument(
        "--allow-user",
        metavar="USER",
        action="append",
        default=[],
        help="a user who may put VMs into it without being root; repeatable",
    )
    add_change_options(create)
    add_json_option(create)
    create.add_argument("-q", "--quiet", action="store_true", help="print its name only")
    create.set_defaults(run=_create)


def _subnet(text: str) -> IPv4Network:
    try:
        return read_subnet(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error}; {error.hint}") from error


# ---- showing ------------------------------------------------------------------------------------


def _list(found: argparse.Namespace) -> int:
    networks = Networks()
    if found.quiet:
        print("".join(f"{name}\n" for name in networks.names()), end="")
        return DONE
    shown = [_summary(networks, name) for name in networks.names()]
    if found.json:
        print_json(shown)
        return DONE
    rows = [
        (entry["name"], entry["mode"] or "-", entry["subnet"] or "-", entry["bridge"] or "-",
         ", ".join(entry["vms"] or ["-"]), entry["state"])
        for entry in shown
    ]  # fmt: skip
    print_table(("network", "mode", "subnet", "bridge", "VMs", "state"), rows)
    return DONE


def _summary(networks: Networks, name: str) -> dict[str, Any]:
    """One line of the list; a network that is broken has its reason as its state."""
    from drivebay.net.members import users
    from drivebay.net.reconcile import state

    network: Network | None = None
    vms: list[str] = []
    try:
        network = networks.load(name)
        vms = users(networks, name)
        now = state(networks, network)
    except DrivebayError as error:
        now = str(error)
    return {
        "name": name,
        "mode": network and network.mode,
        "subnet": str(network.subnet) if network and network.subnet else None,
        "bridge": network and network.bridge,
        "uplink": network and network.uplink,
        "vms": vms,
        "state": now,
    }


def _info(found: argparse.Namespace) -> int:
    networks = Networks()
    network = networks.load(found.name)
    if found.quiet:
        print(network.name)
        return DONE
    shown = _details(networks, network)
    if found.json:
        print_json(shown)
        return DONE
    rows = [
        ("network", network.name),
        ("mode", network.mode),
        ("state", shown["state"]),
        ("bridge", network.bridge),
        ("uplink", shown["uplink"]),
        ("subnet", shown["subnet"]),
        ("gateway", shown["gateway"] and f"{shown['gateway']}, the host; DHCP and DNS, too"),
        ("names", shown["domain"] and f"NAME or NAME.{shown['domain']}"),
        ("mtu", network.mtu),
        ("users", ", ".join(network.allow_users)),
        ("refused", None if shown["refused"] is None else f"{shown['refused']} packets"),
        ("folder", shown["folder"]),
    ]
    print("\n".join(f"{key:8}  {value}" for key, value in rows if value not in (None, "")))
    if shown["members"]:
        print()
        print("\n".join(_member_lines(shown["members"])))
    return DONE


def _member_lines(members: list[dict[str, Any]]) -> list[str]:
    rows = [
        (entry["vm"] or "-", "-" if entry["interface"] is None else str(entry["interface"]),
         entry["mac"], entry["address"] or "by the LAN's DHCP", entry["name"] or "-",
         entry["lease"] or "-")
        for entry in members
    ]  # fmt: skip
    return table_lines(("VM", "interface", "MAC", "address", "name", "lease until"), rows)


def _details(networks: Networks, network: Network) -> dict[str, Any]:
    from drivebay.net.firewall import refused_packets

    subnet = network.subnet
    refused: int | None = None
    if subnet is not None and os.geteuid() == 0:  # nft shows nothing to others
        with suppress(DrivebayError):
            refused = refused_packets(network)
    return {
        **_summary(networks, network.name),
        "gateway": None if subnet is None else str(network.gateway),
        "domain": None if subnet is None else network.name,
        "mtu": network.mtu,
        "allow_users": list(network.allow_users),
        "refused": refused,
        "folder": str(networks.of(network.name)),
        "members": _members(networks, network),
    }


def _members(networks: Networks, network: Network) -> list[dict[str, Any]]:
    """Who has a place, with the lease of each, then who has a lease without one."""
    from drivebay.net.leases import read_leases
    from drivebay.net.members import hosts_of, read_members

    places = read_members(networks, network.name)
    names = {host.mac: host.name for host in hosts_of(places)}
    now = time.time()
    leases = {
        lease.mac: lease
        for lease in read_leases(networks, network.name)
        if lease.expires == 0 or lease.expires > now
    }
    shown = [
        {
            "vm": place.vm,
            "interface": place.index,
            "mac": place.mac,
            "address": None if place.address is None else str(place.address),
            "name": names.get(place.mac),
            "lease": _until(leases[place.mac].expires) if place.mac in leases else None,
        }
        for place in places
    ]
    known = {place.mac for place in places}
    shown += [
        {
            "vm": None,
            "interface": None,
            "mac": lease.mac,
            "address": str(lease.address),
            "name": lease.name,
            "lease": _until(lease.expires),
        }
        for lease in leases.values()
        if lease.mac not in known
    ]
    return shown


def _until(expires: int) -> str:
    if expires == 0:
        return "for ever"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(expires))


# ---- changing -----------------------------------------------------------------------------------


def _create(found: argparse.Namespace) -> int:
    from drivebay.disks.plan import Plan
    from drivebay.net.creation import Wish, plan_creation

    require_root(f"net create {found.name}")
    networks = Networks()
    wish = Wish(found.mode, found.subnet, found.uplink, found.mtu, tuple(found.allow_user))
    plan = Plan()
    with ExitStack() as stack:
        if not found.dry_run:
            stack.enter_context(networks.locked(found.name, new=True))
        plan_creation(plan, networks, found.name, wish)
        if not carry_out(plan, found):
            return DONE
    network = networks.load(found.name)
    if found.json:
        print_json(_details(networks, network))
    elif found.quiet:
        print(network.name)
    elif network.subnet is not None:
        print(
            f"network '{network.name}': mode {network.mode}, subnet {network.subnet}, bridge "
            f"{network.bridge}; a VM joins it by --net {network.name}"
        )
    else:
        print(
            f"network '{network.name}': bridge {network.bridge}, uplink {network.uplink}; a VM "
            f"joins it by --net {network.name}"
        )
    return DONE


def _delete(found: argparse.Namespace) -> int:
    from drivebay.disks.plan import Plan
    from drivebay.net.deletion import plan_deletion
    from drivebay.net.members import users
    from drivebay.vm.store import Vms

    require_root(f"net delete {found.name}")
    networks = Networks()
    plan = Plan()
    with networks.locked(found.name):
        # A folder that a person has removed: nobody else could give its places back.
        gone = sorted(set(users(networks, found.name)) - set(Vms().names()))
        plan.facts += [f"VM '{vm}', which had a place in it, is no more" for vm in gone]
        plan_deletion(plan, networks, networks.load(found.name), gone)
        if carry_out(plan, found, f"Delete network '{found.name}'?"):
            if found.json:
                print_json({"deleted": found.name})
            else:
                print(found.name if found.quiet else f"network '{found.name}' deleted")
    return DONE


def _start(found: argparse.Namespace) -> int:
    """Each that can be started is; the others have their reasons."""
    from drivebay.net.reconcile import reconcile

    require_root(" ".join(["net start", *found.names]))
    networks = Networks()
    names = found.names or networks.names()
    for name in found.names:
        networks.load(name)  # a name that is wrong is said before anything is done
    code = DONE
    done: dict[str, list[str]] = {}
    for name in names:
        try:
            done[name] = reconcile(networks, networks.load(name))
        except DrivebayError as error:
            code = print_error(error) and REFUSED
            continue
        if found.quiet:
            print(name)
        elif not found.json:
            print("\n".join(f"{name}: {text}" for text in done[name] or ["nothing to do"]))
    if found.json:
        print_json(done)
    return code
