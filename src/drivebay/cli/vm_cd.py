"""`drivebay vm eject`, and a start from the CD: what a VM has for its installation alone.

Context: a short-lived process; imported by each command of `drivebay vm`, so it imports little.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from drivebay.cli import vm_access
from drivebay.cli.arguments import Parser
from drivebay.cli.output import DONE, print_json
from drivebay.errors import UsageError

if TYPE_CHECKING:
    from drivebay.vm.lifecycle import BootFrom
    from drivebay.vm.store import Vm

__all__ = [
    "add_boot_options",
    "add_parsers",
    "add_text_option",
    "boot_from",
    "check_start",
    "eject",
    "follow",
    "look_for_installer",
]


class Adder(Protocol):
    """Makes the parser of one subcommand, with the VM's name as its first word."""

    def __call__(self, name: str, text: str, *, changes: bool = False) -> Parser: ...


def add_parsers(add: Adder) -> None:
    """Describe the command."""
    add("eject", "take the ISO out of a VM's CD drive, also while it runs", changes=True)


def add_boot_options(parser: argparse.ArgumentParser) -> None:
    """What is started, this time only."""
    parser.add_argument(
        "--boot",
        choices=("iso",),
        help="from its ISO this time, though there may be a system on its disk",
    )
    add_text_option(parser)


def add_text_option(parser: argparse.ArgumentParser) -> None:
    """For who has no screen."""
    parser.add_argument(
        "--text",
        action="store_true",
        help="start the installer on its ISO as text on the console, and open that",
    )


def boot_from(found: argparse.Namespace) -> BootFrom:
    """From what this start is. Raises: UsageError."""
    if found.text and found.wait:
        raise UsageError("--text opens the console, and --wait waits for a login: one of the two")
    if found.text:
        return "text"
    return "iso" if found.boot == "iso" else "disk"


def look_for_installer(iso: Path) -> None:
    """Look at an ISO, of which all names are read: seconds, for thousands of files.

    Raises: HostError, NotFound, UsageError.
    """
    from drivebay.cli.progress import print_line
    from drivebay.vm.installer import check_installer

    print_line(f"looking for the installer on '{iso.name}'")
    check_installer(iso)


def check_start(found: argparse.Namespace) -> None:
    """Whether a start that is from the CD could be. Raises: HostError, NotFound, UsageError."""
    boot = boot_from(found)
    if boot == "disk":
        return
    from drivebay.vm.lifecycle import check_cd
    from drivebay.vm.store import Vms

    vm = Vms().load(found.name)
    check_cd(vm, needed=True)
    if boot == "text" and vm.spec.iso is not None:
        look_for_installer(Path(vm.spec.iso))


def follow(found: argparse.Namespace, vm: Vm) -> None:
    """Open the console of an installer, where somebody can see it."""
    if found.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    if not vm_access.open_console(vm, wake=False):
        print(f"if it is installed: drivebay vm start {vm.name}")


def eject(found: argparse.Namespace) -> int:
    """Take the CD out of the running machine and out of vm.toml."""
    from drivebay.cli.steps import carry_out
    from drivebay.disks.plan import Plan
    from drivebay.errors import NotFound
    from drivebay.vm import cd, run
    from drivebay.vm.store import Vms
    from drivebay.vm.waiting import started_spec

    vms = Vms()
    with vms.locked(found.name):
        vm = vms.load(found.name)
        running = run.running(vm)
        plan = Plan()
        if running is not None and started_spec(vm, running).iso is not None:
            plan.add(f"take the CD out of the running VM '{vm.name}'", lambda: cd.eject(vm))
        if vm.spec.iso is not None:
            spec = replace(vm.spec, iso=None)
            plan.add(f"strike it from vm.toml of VM '{vm.name}'", lambda: vms.save(vm, spec))
        if not plan.texts:
            raise NotFound(f"VM '{vm.name}' has no CD", hint=f"drivebay vm info {vm.name}")
        if not carry_out(plan, found):
            return DONE
    if found.json:
        print_json({"name": vm.name, "ejected": vm.spec.iso})
    else:
        print(f"VM '{vm.name}' has no CD any more")
    return DONE
