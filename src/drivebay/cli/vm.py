"""`drivebay vm …`: virtual machines, each a folder with a vm.toml that a person can edit.

Context: a short-lived process. What makes VMs is in vm_create, what shows them in vm_show, what
changes them in vm_change, what goes into them (ssh, console, files) in vm_access.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING

from drivebay.cli import vm_access, vm_cd, vm_keeping, vm_screen, vm_several
from drivebay.cli.arguments import (
    Parser,
    add_json_option,
    add_socket_option,
    parse_seconds,
    parse_size,
)
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.cli.steps import add_change_options
from drivebay.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivebay.vm.store import Vm

__all__ = ["build_parser", "main"]

_EPILOG = """\
examples:
  drivebay vm create                               a Debian VM, made ready to log in
  drivebay vm create web --image debian --disk 20G --start
  drivebay vm ssh web
  drivebay vm create db --image debian --disk pool=fast,size=40G --disk bdev=default/data
  drivebay vm stop web
  drivebay vm delete web

A VM is a folder: 'drivebay vm info NAME' says where. Edit its vm.toml as you like; what you
change takes effect at the next start.
"""

# The module and the function of a subcommand.
_RUN = {
    "create": ("vm_create", "create"),
    "set": ("vm_change", "change"),
    "attach": ("vm_change", "attach"),
    "detach": ("vm_change", "detach"),
    "delete": ("vm_change", "delete"),
    "clone": ("vm_clone", "clone"),
    "eject": ("vm_cd", "eject"),
    "list": ("vm_show", "show_all"),
    "info": ("vm_show", "info"),
    "qemu-command": ("vm_show", "qemu_command"),
    "libvirt-xml": ("vm_show", "libvirt_xml"),
    **vm_keeping.RUN,
    **vm_screen.RUN,
    **vm_several.RUN,
}
_BUSES = ("virtio", "scsi", "nvme", "sata")


def main(arguments: list[str]) -> int:
    """Run one of the subcommands."""
    ours, words = vm_access.split_words(arguments)
    found = build_parser().parse_args(ours)
    if getattr(found, "several", False):
        return vm_several.switch(found)
    if found.subcommand in ("start", "stop", "restart"):
        return _switch(found)
    if found.subcommand not in _RUN:
        found.words = words
        return vm_access.run(found)
    module, function = _RUN[found.subcommand]
    run: Callable[[argparse.Namespace], int] = getattr(
        importlib.import_module(f"drivebay.cli.{module}"), function
    )
    return run(found)


# ---- on and off ---------------------------------------------------------------------------------


def _switch(found: argparse.Namespace) -> int:
    from drivebay.vm.lifecycle import stop
    from drivebay.vm.store import Vms

    if found.name is None:
        raise UsageError("name a VM", hint="drivebay vm list")
    vms = Vms()
    if found.subcommand != "stop":
        vm_cd.check_start(found)  # before anything is stopped
    if found.subcommand != "start":
        how = stop(vms, found.name, force=found.force, timeout_s=found.timeout)
        if found.subcommand == "stop":
            if found.json:
                print_json({"name": found.name, "ended": how})
            else:
                print(f"VM '{found.name}' {vm_several.ENDED[how]}")
            return DONE
    return start_and_say(found)


def start_and_say(found: argparse.Namespace) -> int:
    """Start VM ``found.name``, wait if that is wished, and say how to get in."""
    from drivebay.vm.lifecycle import start
    from drivebay.vm.shares import how_to_mount
    from drivebay.vm.store import Vms

    vms = Vms()
    started = start(vms, found.name, found.socket, boot_from=vm_cd.boot_from(found))
    if found.json:
        print_json(
            {
                "name": found.name,
                "pid": started.running.pid,
                "accelerator": started.running.accelerator,
                "seconds": round(started.seconds, 3),
            }
        )
    else:
        from drivebay.vm.kvm import choose_accelerator

        accelerator = choose_accelerator()
        print(f"VM '{found.name}' runs ({accelerator.name}: {accelerator.reason})", flush=True)
        vm = vms.load(found.name)
        print(f"  console  drivebay vm console {found.name}")
        if vm.spec.nets:
            print(f"  log in   drivebay vm ssh {found.name}")
        for share in vm.spec.shares:
            print(f"  folder   {how_to_mount(vm.spec, share)}")
    if found.text:
        vm_cd.follow(found, vms.load(found.name))
        return DONE
    _renew(vms.load(found.name))
    if found.wait:
        vm_access.wait_until_ready(vms.load(found.name))
    return DONE


def _renew(vm: Vm) -> None:
    """A clone that is not itself yet becomes it now, which takes as long as its guest's start."""
    from drivebay.vm import renewal

    if renewal.is_pending(vm):
        print_warning(f"'{vm.name}' waits for its guest agent, to be given its own identity")
        renewal.renew(vm)


# ---- the parser ---------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("drivebay vm", description="Virtual machines on disks of ours.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    def add(
        name: str, text: str, *, asks: bool = False, changes: bool = False, named: bool = True
    ) -> Parser:
        command: Parser = commands.add_parser(name, help=text)
        if named:
            command.add_argument("name", metavar="NAME", help="the VM")
        if changes:
            add_change_options(command, asks=asks)
        add_socket_option(command)
        add_json_option(command)
        return command

    create = add("create", "make a VM", changes=True, named=False)
    create.add_argument("name", metavar="NAME", nargs="?", help="its name (default: its image's)")
    _add_create(create)
    vm_cd.add_text_option(create)
    _add_machine(create)
    importing = add("import", "make a VM of a disk image's file", changes=True, named=False)
    vm_keeping.add_import(importing)
    _add_create(importing)
    _add_machine(importing)
    change = add("set", "change a VM; it takes effect at its next start", changes=True)
    _add_machine(change)
    change.add_argument("--machine", metavar="TYPE", help="QEMU's machine type, such as pc-q35-9.2")
    _add_power(add)
    listing = add("list", "show all VMs", named=False)
    listing.add_argument("-q", "--quiet", action="store_true", help="print names only")
    add("info", "show one VM")
    attach = add("attach", "give a VM another disk, also while it runs", changes=True)
    _add_disk(attach, required=True)
    detach = add("detach", "take a disk from a VM, also while it runs", changes=True)
    detach.add_argument("disk", metavar="DISK", help="the disk's name in the VM")
    clone = add("clone", "make VMs that go on from another's disks, also while it runs",
                changes=True)  # fmt: skip
    clone.add_argument("new", metavar="NEW", help="the clone's name")
    clone.add_argument("--count", metavar="N", type=int, default=1, help="make NEW-1 to NEW-N")
    clone.add_argument(
        "--full",
        action="store_true",
        help="copy what the original has written, and depend on its image alone",
    )
    delete = add("delete", "delete a VM and the disks that were made for it", asks=True,
                 changes=True)  # fmt: skip
    delete.add_argument("--keep-disks", action="store_true", help="leave its disks in their pools")
    delete.add_argument("--force", action="store_true", help="end it first, if it runs")
    vm_access.add_parsers(add)
    vm_screen.add_parsers(add)
    vm_keeping.add_parsers(add)
    vm_several.add_parsers(add)
    vm_cd.add_parsers(add)
    add("qemu-command", "print the command line that starts it")
    add("libvirt-xml", "print it as a libvirt domain")
    return parser


def _add_power(add: Callable[..., Parser]) -> None:
    start = add("start", "start a VM", named=False)
    vm_cd.add_boot_options(start)
    _add_wait(start)
    vm_several.add_names(start, "--autostart", "all that start with the host, and do not run")
    for name, text in (("stop", "switch a VM off"), ("restart", "switch it off, and start it")):
        stop = add(name, text, named=name == "restart")
        stop.add_argument("--force", action="store_true", help="as if the plug were pulled")
        stop.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=parse_seconds,
            default=90.0,
            help="how long the guest has to switch itself off (default: %(default)g)",
        )
        if name == "restart":
            vm_cd.add_boot_options(stop)
            _add_wait(stop)
        else:
            vm_several.add_names(stop, "--all", "all that run, at the same time")


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(boot=None, text=False)
    parser.add_argument(
        "--image",
        metavar="IMAGE",
        help="what its system disk begins with (default: Debian, built at the first use); "
        "'none' for empty disks, as with --iso",
    )
    parser.add_argument(
        "--overlay",
        action="store_true",
        help="make the system disk a qcow2 file on the image, which QEMU serves by itself",
    )
    _add_disk(parser, required=False)
    parser.add_argument("--bus", choices=_BUSES, default="virtio", help="how disks are attached")
    parser.add_argument("--firmware", choices=("bios", "uefi"), default="bios")
    parser.add_argument("--kernel", metavar="FILE", help="start this kernel directly")
    parser.add_argument("--initrd", metavar="FILE", help="with this initrd")
    parser.add_argument("--append", metavar="TEXT", default="", help="and this command line")
    parser.add_argument("--no-cloud-init", action="store_true", help="give it no cloud-init disk")
    parser.add_argument("--user-data", metavar="FILE", help="your own cloud-init user-data")
    parser.add_argument(
        "--qemu-arg", metavar="WORD", action="append", default=[], help="add to QEMU's words"
    )
    parser.add_argument("--start", action="store_true", help="start it, too")
    _add_wait(parser)


def _add_disk(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--disk",
        metavar="SPEC",
        action="append",
        default=[],
        required=required,
        help="20G, or pool=P,size=20G, or bdev=B; with name=N, bus=BUS, shared as further words. "
        "The first new one is the system disk of a VM with an image",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """What both a new and a present VM can be told."""
    parser.add_argument("--memory", metavar="SIZE", type=parse_size, help="such as 1G")
    parser.add_argument("--cpus", metavar="N", type=int)
    parser.add_argument(
        "--iso", metavar="FILE", help="an ISO in its CD drive, to install from; 'none' for none"
    )
    parser.add_argument("--qemu", metavar="PATH", help="the QEMU that runs it")
    parser.add_argument(
        "--net",
        metavar="NET",
        action="append",
        help="an interface: user (default), a network's name, bridge=br0 or tap,ifname=tap1; "
        "'none' for none",
    )
    parser.add_argument(
        "--forward",
        metavar="[ADDRESS:]PORT:GUESTPORT",
        action="append",
        help="a port of this host that leads to one of the guest, such as 8080:80",
    )
    parser.add_argument(
        "--share",
        metavar="DIR[:TAG][,ro]",
        action="append",
        help="a folder of this host that the guest may mount, such as ~/src or /srv:data,ro; "
        "'none' for none",
    )
    vm_screen.add_vnc_options(parser)
    parser.add_argument("--address", metavar="A/N", help="a static address, or 'dhcp'")
    parser.add_argument("--gateway", metavar="ADDRESS")
    parser.add_argument("--dns", metavar="ADDRESS", action="append")
    parser.add_argument("--hostname", metavar="NAME", help="the guest's (default: the VM's name)")
    parser.add_argument("--user", metavar="NAME", help="whom cloud-init makes")
    parser.add_argument(
        "--ssh-key", metavar="FILE", action="append", help="a public key that may log in, too"
    )
    parser.add_argument("--password", action="store_true", help="ask for the user's password")
    parser.add_argument("--password-file", metavar="FILE", help="or read it from a file")
    parser.add_argument("--packages", metavar="A,B", help="what cloud-init installs")


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="until it is ready to log in")
